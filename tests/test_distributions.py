"""Mixtures over whole vectors, and likelihoods of some rows, against torch and by counting."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.gof import auto_goodness_of_fit
from pyro.infer import Trace_ELBO
from torch.distributions import MixtureSameFamily, kl_divergence

from mmzoo.distributions import Mixture, ScoredRows

FAMILIES = [dist.Normal, dist.Laplace]
ABSENT = -torch.inf
MIN_P_VALUE = 1e-6  # with the seed free, a false alarm in a million runs of each test

every_family = pytest.mark.parametrize("family", FAMILIES)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def random_mixture(*batch, components=3, dim=2, family=dist.Normal, absent=()):
    log_weights = torch.randn(*batch, components)
    log_weights[..., list(absent)] = ABSENT
    loc = 2 * torch.randn(*batch, components, dim)
    return Mixture(log_weights, loc, torch.rand(*batch, components, dim) + 0.5, family=family)


# ---- mixtures ------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
def test_log_prob_is_that_of_torch(family, batch):
    q = random_mixture(*batch, family=family)
    expected = MixtureSameFamily(
        torch.distributions.Categorical(logits=q.log_weights),
        torch.distributions.Independent(family(q.loc, q.scale), 1),
    )
    z = 3 * torch.randn(7, *batch, 2)
    close(q.log_prob(z), expected.log_prob(z))
    close(q.component_log_prob(z).logsumexp(-1), expected.log_prob(z))
    close(q.mean, expected.mean)
    close(q.variance, expected.variance)
    assert (q.batch_shape, q.event_shape) == (expected.batch_shape, expected.event_shape)


def test_weights_are_normalised_and_parameters_broadcast():
    q = Mixture(torch.tensor([0.0, math.log(3.0)]), torch.zeros(4, 1, 2), torch.ones(2, 1))
    close(q.log_weights.exp(), torch.tensor([0.25, 0.75]).expand(4, 2))
    assert (q.batch_shape, q.event_shape, q.scale.shape) == ((4,), (2,), (4, 2, 2))


def test_absent_components_have_no_influence():
    q = random_mixture(4, absent=[1])
    filled = Mixture(q.log_weights, q.loc.clone(), q.scale.clone())
    filled.loc[:, 1], filled.scale[:, 1] = 1e6, 1e-3
    two = Mixture(q.log_weights[:, [0, 2]], q.loc[:, [0, 2]], q.scale[:, [0, 2]])
    z = q.sample((5,))
    close(filled.log_prob(z), two.log_prob(z))
    close(filled.mean, two.mean)
    close(filled.variance, two.variance)
    assert filled.present.tolist() == [[True, False, True]] * 4


def test_absent_components_have_no_gradient():
    q = random_mixture(4, absent=[1])
    loc, scale = (p.clone().requires_grad_() for p in (q.loc, q.scale))
    z = q.sample((5,))
    grads = torch.autograd.grad(Mixture(q.log_weights, loc, scale).log_prob(z).sum(), [loc, scale])
    for grad in grads:
        assert grad.isfinite().all() and (grad[:, 1] == 0).all() and (grad[:, 0] != 0).all()


def test_absent_components_are_never_drawn():
    q = random_mixture(3, components=4, absent=[0, 2])
    marked = Mixture(
        q.log_weights, torch.tensor([[100.0], [1], [200], [3]]), torch.tensor([[0.01]])
    )
    z = marked.sample((2000,))
    assert (z < 50).all()
    assert {0, 2}.isdisjoint(marked.stratify(7).component.unique().tolist())


@every_family
@pytest.mark.parametrize("dim", [1, 2])
def test_samples_have_the_density(family, dim):
    pyro.set_rng_seed(1)
    q = random_mixture(dim=dim, family=family, absent=[2])
    z = q.sample((20_000,))
    assert auto_goodness_of_fit(z, q.log_prob(z).exp(), dim=dim) > MIN_P_VALUE


@every_family
def test_samples_have_the_moments(family):
    q = random_mixture(2, family=family)
    z = q.sample((50_000,))
    for drawn, expected in ((z, q.mean), ((z - q.mean).square(), q.variance)):
        se = drawn.std(0) / math.sqrt(len(z))
        assert ((drawn.mean(0) - expected).abs() < 5 * se).all()
    # Whole vectors: both dimensions come from the same component.
    weights = q.log_weights.exp()
    cross = (weights * (q.loc[..., 0] * q.loc[..., 1])).sum(-1)
    drawn = z[..., 0] * z[..., 1]
    se = drawn.std(0) / math.sqrt(len(z))
    assert ((drawn.mean(0) - cross).abs() < 5 * se).all()


def test_draws_are_not_reparameterised():
    q = random_mixture(4)
    loc = q.loc.clone().requires_grad_()
    q = Mixture(q.log_weights, loc, q.scale)
    assert q.has_rsample is False
    assert not q.sample((3,)).requires_grad and not q().requires_grad
    parts = q.score_parts(q.sample())
    assert parts.score_function is parts.log_prob and parts.entropy_term == 0


@every_family
def test_expand(family):
    q = random_mixture(4, family=family, absent=[0])
    wide = q.expand((3, 4))
    assert (wide.batch_shape, wide.event_shape) == ((3, 4), (2,)) and wide.family is family
    z = wide.sample()
    assert z.shape == (3, 4, 2)
    close(wide.log_prob(z), q.log_prob(z))
    with pyro.plate("wide", 3, dim=-2), pyro.plate("data", 4, dim=-1):
        assert pyro.sample("z", q).shape == (3, 4, 2)


def test_log_prob_checks_the_value():
    q = Mixture(torch.zeros(2), torch.zeros(2, 3), torch.ones(3), validate_args=True)
    with pytest.raises(ValueError, match="event_shape|rightmost|Expected value"):
        q.log_prob(torch.zeros(4))


def test_mixture_has_no_closed_divergence():
    q = random_mixture(4)
    message = r"expected a reparameterised posterior .*use vae\.objective\(\).*Trace_ELBO\(\)"
    with pytest.raises(ValueError, match=message):
        kl_divergence(q, dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_one_component_is_the_component():
    q = random_mixture(4, components=1)
    base = dist.Normal(q.loc[:, 0], q.scale[:, 0]).to_event(1)
    z = base.sample()
    close(q.log_prob(z), base.log_prob(z))
    close(q.stratify(3).log_coef, torch.full((3, 4), -math.log(3)))


def test_elbo_of_a_mixture_by_the_score_function():
    """The gradient by the weight of two fixed components, which enumeration gives exactly."""
    logit = torch.zeros((), requires_grad=True)
    loc, scale = torch.tensor([[-1.0], [2.0]]), torch.tensor([[0.5], [0.5]])

    def guide():
        with pyro.plate("data", 20_000):
            pyro.sample("z", Mixture(torch.stack([logit, logit * 0]), loc, scale))

    def model():
        with pyro.plate("data", 20_000):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    (found,) = torch.autograd.grad(Trace_ELBO().differentiable_loss(model, guide), logit)
    q = Mixture(torch.stack([logit, logit * 0]), loc, scale)
    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    z = torch.linspace(-12, 12, 4801).unsqueeze(-1)  # the rule of step 0.005 is exact for both
    divergence = (0.005 * q.log_prob(z).exp() * (q.log_prob(z) - prior.log_prob(z))).sum()
    (expected,) = torch.autograd.grad(divergence, logit)
    # The score of the logit is the responsibility of its component less its weight.
    draws = q.sample((20_000,))
    score = q.component_log_prob(draws).log_softmax(-1)[:, 0].exp() - 0.5
    se = (score * (q.log_prob(draws) - prior.log_prob(draws))).std() * math.sqrt(20_000)
    assert (found - 20_000 * expected).abs() < 5 * se
    assert (20_000 * expected).abs() > 10 * se


# ---- stratified draws ----------------------------------------------------------------------------


@pytest.mark.parametrize("total", [3, 4, 10, 17])
def test_chunks_are_allocated_as_in_one_go(total):
    q = random_mixture(4, components=5, absent=[1])
    q.log_weights[2] = torch.tensor([ABSENT, ABSENT, 0.0, ABSENT, math.log(2.0)]).log_softmax(-1)
    q.log_weights[3, 0] = ABSENT
    q = Mixture(q.log_weights, q.loc, q.scale)
    total += 1  # at least the four components
    whole = q.stratify(total)
    for size in (1, 2, 5):
        starts = range(0, total, size)
        parts = [q.stratify(min(size, total - s), start=s, total=total) for s in starts]
        assert torch.equal(torch.cat([part.component for part in parts]), whole.component)
        assert torch.equal(torch.cat([part.log_coef for part in parts]), whole.log_coef)
    close(whole.log_coef.logsumexp(0), torch.zeros(4))
    for row in range(4):
        present = q.present[row].nonzero().squeeze(-1).tolist()
        taken = whole.component[:, row].bincount(minlength=5)
        assert taken.sum() == total and set(taken.nonzero().squeeze(-1).tolist()) == set(present)
        assert taken[present].max() - taken[present].min() <= 1
        expected = (
            q.log_weights[row, whole.component[:, row]].exp() / taken[whole.component[:, row]]
        )
        close(whole.log_coef[:, row].exp(), expected)


@every_family
def test_strata_are_unbiased(family):
    q = random_mixture(20_000, family=family)
    one = Mixture(q.log_weights[0], q.loc[0], q.scale[0], family=family)
    rows = one.expand((20_000,))  # replicates
    strata = rows.stratify(7)
    expected_log = one.log_prob(one.sample((400_000,)))
    cases = {
        "mean": (strata.value[..., 0], one.mean[0], 0.0),
        "square": (strata.value.square().sum(-1), (one.variance + one.mean.square()).sum(), 0.0),
        "entropy": (
            one.log_prob(strata.value),
            expected_log.mean(),
            expected_log.var() / len(expected_log),
        ),
    }
    for statistic, expected, variance in cases.values():
        estimates = (strata.log_coef.exp() * statistic).sum(0)  # (N,)
        se = (estimates.var() / len(estimates) + variance).sqrt()
        assert (estimates.mean() - expected).abs() < 5 * se


@every_family
def test_strata_come_from_their_components(family):
    q = random_mixture(5000, family=family)
    one = Mixture(q.log_weights[0], q.loc[0], q.scale[0], family=family).expand((5000,))
    strata = one.stratify(4)
    assert strata.component[:, 0].tolist() == [0, 1, 2, 0]
    for value, component in zip(strata.value, strata.component[:, 0]):
        noise = (value - one.loc[0, component]) / one.scale[0, component]
        unit = family(0.0, 1.0).variance
        se = noise.std(0) / math.sqrt(5000)
        assert (noise.mean(0).abs() < 5 * se).all()
        square = noise.square()
        assert ((square.mean(0) - unit).abs() < 5 * square.std(0) / math.sqrt(5000)).all()


def test_strata_are_reparameterised():
    q = random_mixture(4)
    loc, scale = (p.clone().requires_grad_() for p in (q.loc, q.scale))
    strata = Mixture(q.log_weights, loc, scale).stratify(3)
    (by_loc,) = torch.autograd.grad(strata.value.sum(), loc, retain_graph=True)
    close(by_loc, torch.ones(4, 3, 2))  # each component was drawn once
    (by_scale,) = torch.autograd.grad(strata.value.sum(), scale)
    noise = ((strata.value - q.loc.movedim(1, 0)) / q.scale.movedim(1, 0)).detach()
    torch.testing.assert_close(by_scale, noise.movedim(0, 1), rtol=1e-9, atol=1e-9)


def test_too_few_strata():
    q = random_mixture(4)
    message = (
        "^mixture posterior: expected at least one draw for each of its 3 components, found "
        "num_samples=2; raise num_samples$"
    )
    for arguments in ({"num": 2}, {"num": 1, "total": 2}):
        with pytest.raises(ValueError, match=message):
            q.stratify(**arguments)
    assert random_mixture(4, absent=[0]).stratify(2).component.shape == (2, 4)


# ---- scored rows ---------------------------------------------------------------------------------


def scored_rows(mask, event_shape=(3,)):
    """A likelihood over all rows, and the part of it for the rows of a mask."""
    loc = torch.randn(*mask.shape, *event_shape)
    full = dist.Normal(loc, 0.7).to_event(len(event_shape))
    part = dist.Normal(loc[mask], 0.7).to_event(len(event_shape))
    return full, ScoredRows(part, mask)


MASKS = {
    "some": torch.tensor([True, False, True, True, False]),
    "none": torch.zeros(5, dtype=torch.bool),
    "all": torch.ones(5, dtype=torch.bool),
    "subsets": torch.tensor([[True, False, True], [False, False, True]]),
}


def unseen_by(mask):
    """The rows that no leading entry of a mask scores."""
    return (~mask).reshape(-1, mask.shape[-1]).all(0)


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_scored_rows_have_the_log_prob_of_the_full_plate(mask, event_shape):
    full, part = scored_rows(mask, event_shape)
    assert (part.batch_shape, part.event_shape) == (mask.shape, event_shape)
    x = torch.randn(mask.shape[-1], *event_shape)
    expected = torch.where(mask, full.log_prob(x), 0.0)
    close(part.log_prob(x), expected)
    x[unseen_by(mask)] = torch.nan  # values that no mask scores are never read
    assert torch.equal(part.log_prob(x), part.log_prob(torch.nan_to_num(x, 1e30)))
    close(part.log_prob(x), expected)


def test_scored_rows_have_the_gradient_of_the_full_plate():
    mask = MASKS["some"]
    loc, x = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    weight = torch.arange(1.0, 6.0)
    full = torch.where(mask, dist.Normal(loc, 0.7).to_event(1).log_prob(x), 0.0)
    part = ScoredRows(dist.Normal(loc[mask], 0.7).to_event(1), mask).log_prob(x)
    found, expected = (torch.autograd.grad((weight * each).sum(), loc)[0] for each in (part, full))
    close(found, expected)
    assert (found[~mask] == 0).all() and (found[mask] != 0).all()


LIKELIHOODS = {
    "normal": lambda loc: dist.Normal(loc, 1.0).to_event(1),
    "number": lambda loc: dist.Normal(loc[:, 0], 1.0),
    "shared": lambda loc: dist.MultivariateNormal(loc, scale_tril=torch.eye(3)),
    "batched": lambda loc: dist.MultivariateNormal(loc, scale_tril=loc.exp().diag_embed()),
    "mixture": lambda loc: dist.MixtureSameFamily(
        dist.Categorical(logits=loc), dist.MultivariateNormal(loc.diag_embed(), torch.eye(3))
    ),
    "masked": lambda loc: dist.Normal(loc, 1.0).mask(loc > 0).to_event(1),
    "labels": lambda loc: dist.Categorical(logits=loc),
}


@pytest.mark.parametrize("make", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_no_scored_rows_have_log_prob_and_gradient_zero(make):
    """Whatever the likelihood is; torch's own of several dimensions fail there."""
    loc = torch.randn(5, 3, requires_grad=True)
    with pyro.validation_enabled(False):
        part = ScoredRows(make(loc[MASKS["none"]]), MASKS["none"])
    log_prob = part.log_prob(torch.zeros(5, *part.event_shape))
    assert log_prob.dtype == loc.dtype
    assert torch.equal(log_prob, torch.zeros(5))
    assert torch.equal(torch.autograd.grad(log_prob.sum(), loc)[0], torch.zeros(5, 3))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_scored_rows_in_a_trace(mask):
    full, part = scored_rows(mask)
    x = torch.randn(mask.shape[-1], 3)
    expected = torch.where(mask, full.log_prob(x), 0.0).sum()
    x[unseen_by(mask)] = torch.nan

    def model():
        with pyro.plate_stack("rows", mask.shape):
            pyro.sample("x", part, obs=x)

    trace = poutine.trace(model).get_trace()
    close(trace.log_prob_sum(), expected)
    assert trace.nodes["x"]["fn"].scored is mask


def test_scored_rows_stay_as_they_are():
    _, part = scored_rows(MASKS["some"])
    assert part.expand((5,)) is part
    message = (
        r"^likelihood of scored rows: expected batch shape \(5,\), found \(2, 5\); "
        "sample z inside every plate that the likelihood is in$"
    )
    with pytest.raises(ValueError, match=message):
        part.expand((2, 5))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_scored_rows_draw_the_scored_rows(mask):
    full, part = scored_rows(mask)
    draws = part.sample((5000,))
    assert draws.shape == (5000, *mask.shape, 3) and part.has_rsample is False
    assert (draws[:, ~mask] == 0).all()
    mean, se = draws[:, mask].mean(0), 0.7 / math.sqrt(5000)
    assert ((mean - full.mean[mask]).abs() < 5 * se).all()
    assert part.sample().shape == (*mask.shape, 3)
    assert part.support.check(draws).all()
