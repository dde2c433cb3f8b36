"""The bound of MMVAE+ and CMVAE: closed forms, the formula by hand, exact draws, gradients."""

import math

import pyro
import pytest
import torch
from private import PrivateWorld
from pyro.distributions import Normal
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn
from torch.distributions import kl_divergence
from zoo import batch, case, masks

from mmzoo.inference import CrossModalELBO, ImportanceWeightedELBO
from mmzoo.models import MMVAEPlus
from mmzoo.vae import Experts

SIZES = {"a": 5, "b": 4, "c": 4}
NAMES = list(SIZES)
ERRORS = 5.0


class Same(nn.Module):
    """The same expert of z for every value, and a code that follows the value."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.width = nn.Parameter(torch.tensor(0.9))

    def forward(self, value):
        loc, scale = (part.clone() for part in self.encoder(value))
        loc[:, :2], scale[:, :2] = torch.tensor([0.3, -0.2]), torch.tensor([0.6, 0.8])
        return loc, torch.cat([scale[:, :2], self.width * scale[:, 2:]], -1)


def equal_experts():
    """A world, and a model whose mixture is its only expert: the bound has a closed form."""
    world = PrivateWorld(SIZES)
    parts = world.parts("posteriors")
    for part in parts:
        object.__setattr__(part, "encoder", Same(part.encoder))
    vae = MMVAEPlus(parts, 2, private_dim=2)
    for shift, raw in enumerate(vae.auxiliary_raw.values()):
        raw.data -= 1.0 + 0.5 * shift  # scales of about 0.5
    return world, vae


def holes(x):
    rows = len(next(iter(x.values())))
    bits = 1 + torch.arange(rows) % 7
    observed = {name: (bits >> place) % 2 == 1 for place, name in enumerate(x)}
    x = {name: torch.where(observed[name][:, None], x[name], torch.nan) for name in x}
    return x, observed


def normal(loc, scale):
    return torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)


def closed_form(world, vae, x, observed, beta, cross):
    """The bound for K = 1 of all rows together, where every expert of z is the same."""
    x = {name: value.nan_to_num() for name, value in x.items()}
    codes = vae.private(x, observed)
    z = vae.posterior(x, observed).at(torch.zeros(len(x["a"]), dtype=torch.long).unsqueeze(0))
    z = tuple(part.squeeze(0) for part in z)
    present = torch.stack(list(observed.values()), -1)
    total = torch.zeros(len(x["a"]))
    for m in NAMES:
        locs, scales = [z[0]], [z[1]]
        for n in NAMES:
            q = {
                "posterior": codes[n],
                "prior": vae.private_prior(n).expand(z[0].shape[:1]),
                "auxiliary": vae.auxiliary(n).expand(z[0].shape[:1]),
            }["posterior" if n == m else cross]
            locs.append(q.base_dist.loc)
            scales.append(q.base_dist.scale)
        latent = torch.cat(locs, -1), torch.cat(scales, -1)
        scored = sum(
            torch.where(observed[n], world.expected_log_likelihood(n, *latent, x[n]), 0.0)
            for n in NAMES
        )
        one = normal(torch.zeros(2), torch.ones(2))
        kl = kl_divergence(normal(*z), one) + kl_divergence(codes[m], one)
        total = total + torch.where(observed[m], scored - beta * kl, 0.0)
    return (total / present.sum(-1)).sum()


def repeated(x, observed, times):
    x = {name: value.repeat(times, 1) for name, value in x.items()}
    return x, {name: mask.repeat(times) for name, mask in observed.items()}


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_bound_is_its_closed_form_with_auxiliary_codes_and_no_others(beta):
    world, vae = equal_experts()
    x, observed = holes(world.sample(7, seed=2))
    many = repeated(x, observed, 300)
    for cross in ("auxiliary", "prior"):
        elbo = CrossModalELBO(1, beta=beta, cross=cross)
        with torch.no_grad():
            bounds = elbo.row_bounds(vae.model, vae.guide, *many).view(300, 7).sum(-1)
            exact = {
                c: closed_form(world, vae, x, observed, beta, c)
                for c in ("auxiliary", "prior", "posterior")
            }
        error = {
            c: abs(float((bounds.mean() - value) / bounds.std())) * math.sqrt(300)
            for c, value in exact.items()
        }
        assert error.pop(cross) < ERRORS
        assert min(error.values()) > 2 * ERRORS  # the other codes would be told apart


def test_gradient_is_that_of_the_closed_form():
    world, vae = equal_experts()
    x, observed = holes(world.sample(7, seed=2))
    inputs = [*vae.auxiliary_raw.values()]
    inputs += [vae.experts[f"{name}_"].encoder.width for name in NAMES]
    exact = torch.autograd.grad(closed_form(world, vae, x, observed, 1.0, "auxiliary"), inputs)
    elbo, many, found = CrossModalELBO(1), repeated(x, observed, 100), []
    for _ in range(40):
        bound = elbo.row_bounds(vae.model, vae.guide, *many).sum() / 100
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(bound, inputs)]))
    found, exact = torch.stack(found), torch.cat([g.flatten() for g in exact])
    se = found.std(0) / math.sqrt(40)
    assert (exact.abs() > 10 * se).any()
    assert ((found.mean(0) - exact).abs() < ERRORS * se).all()


@pytest.mark.parametrize("name", ["mmvaeplus", "mmvaeplus-laplace", "cmvae"])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_bound_is_the_formula(name, num_samples, monkeypatch):
    vae = case(name, 4)
    for raw in vae.auxiliary_raw.values():
        raw.data += torch.rand(raw.shape)
    x, observed = batch(vae), masks(vae, empty=True)
    kept = {}
    draw = CrossModalELBO._draw

    def keeping(self, *args):
        values, log_ratio = draw(self, *args)
        kept.update(values)
        return values, log_ratio

    monkeypatch.setattr(CrossModalELBO, "_draw", keeping)
    found = CrossModalELBO(num_samples, beta=1.7).row_bounds(vae.model, vae.guide, x, observed)
    names, p, q = list(x), vae.prior(), vae.posterior(x, observed)
    codes = vae.private(x, observed)
    for row in range(6):
        here = [n for n in names if observed[n][row]]
        bound = torch.zeros(())
        for m in here:
            log_w = []
            for k in range(num_samples):
                at = (k, names.index(m), row)
                z, w = kept["z"][at], {n: kept[f"w_{n}"][at] for n in vae.private_names}
                pick = torch.zeros(1, 6, 2)
                pick[0, row] = z
                ratio = p.log_prob(z) - q.log_prob(pick)[0, row]
                if m in w:
                    own = codes[m].base_dist
                    own = type(own)(own.loc[row], own.scale[row]).to_event(1)
                    ratio = ratio + vae.private_prior(m).log_prob(w[m]) - own.log_prob(w[m])
                scored = sum(vae.likelihood(n, z, w.get(n)).log_prob(x[n][row]) for n in here)
                log_w.append(scored + 1.7 * ratio)
            within = torch.stack(log_w).logsumexp(0) - math.log(num_samples)
            bound = bound + within / len(here)
        torch.testing.assert_close(found[row], bound, rtol=1e-11, atol=1e-11)
    assert len({float(row.detach()) for row in found}) == 6 and found[-1] == 0  # an empty row


@pytest.mark.parametrize("cross", ["auxiliary", "prior"])
@pytest.mark.parametrize("num_samples", [1, 4])
def test_one_exact_expert_gives_the_likelihood_with_each_draw(cross, num_samples):
    world = PrivateWorld(SIZES, diagonal=True)
    vae = MMVAEPlus(world.parts("posteriors"), 2, private_dim=2)
    x = world.sample(5, seed=2)
    elbo = CrossModalELBO(num_samples, cross=cross)
    for name in NAMES:
        bounds = elbo.row_bounds(vae.model, vae.guide, {name: x[name]})
        assert (bounds - world.log_prob(x, of=[name])).abs().max() < 1e-10


def test_codes_from_their_prior_give_a_bound():
    world = PrivateWorld(SIZES)
    vae = MMVAEPlus(world.parts("posteriors"), 2, private_dim=2)
    for raw in vae.auxiliary_raw.values():
        raw.data.fill_(-3.0)
    x = world.sample(4, seed=2)
    evidence = world.log_prob(x, of=NAMES).sum()
    many = repeated(x, {n: torch.ones(4, dtype=torch.bool) for n in x}, 400)
    before = -math.inf
    for num_samples in (1, 20):
        elbo = CrossModalELBO(num_samples, cross="prior")
        with torch.no_grad():
            bounds = elbo.row_bounds(vae.model, vae.guide, *many).view(400, 4).sum(-1)
        se = float(bounds.std()) / math.sqrt(400)
        assert bounds.mean() < evidence + ERRORS * se
        assert bounds.mean() > before + ERRORS * se
        before = float(bounds.mean())


def test_terms_are_means_over_what_is_scored():
    world, vae = equal_experts()
    x, observed = holes(world.sample(7, seed=2))
    elbo = CrossModalELBO(2)
    elbo.loss(vae.model, vae.guide, x, observed)
    present = torch.stack(list(observed.values()))  # (M, N)
    counts = {name: int(count) for name, (_, count) in elbo.terms.items()}
    together = {n: 2 * int((present & mask).sum()) for n, mask in observed.items()}
    own = {f"w_{n}": 2 * int(mask.sum()) for n, mask in observed.items()}
    assert counts == {**together, **own, "z": 2 * int(present.sum())}
    # With one bound of K = 1 the terms are the bound.
    single = {"a": x["a"][observed["a"]]}
    loss = CrossModalELBO(1)
    value = loss.loss(vae.model, vae.guide, single)
    terms = {name: float(total) for name, (total, _) in loss.terms.items()}
    assert value == pytest.approx(terms["z"] + terms["w_a"] - terms["a"], rel=1e-12)


def test_plain_svi_trains_with_it():
    vae = case("mmvaeplus", 2)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.01}), vae.objective(num_samples=2))
    before = {key: value.clone() for key, value in vae.named_parameters()}
    svi.step(batch(vae), masks(vae))
    assert all(not torch.equal(value, before[key]) for key, value in vae.named_parameters())


@pytest.mark.parametrize("bound", ["pooled", "within"])
def test_doubly_reparameterised_gradient_holds_for_codes_beside_a_mixture(bound):
    world = PrivateWorld({"a": 3, "b": 2}, shared=1, private=1)
    rows = 20_000
    vae = MMVAEPlus(world.parts(), 1, private_dim=1)
    x = {name: value.expand(rows, -1) for name, value in world.sample(1, seed=2).items()}
    loc = torch.tensor([[-0.5], [0.8]]).repeat(rows, 1, 1).requires_grad_()
    scale = torch.tensor([[0.6], [0.9]]).repeat(rows, 1, 1).requires_grad_()
    private = {
        name: tuple(torch.full((rows, 1), v).requires_grad_() for v in (0.3, 0.7)) for name in x
    }
    vae._encode = lambda batch: Experts(loc, scale, private)
    inputs = [loc, scale, *private["a"], *private["b"]]
    estimates = []
    for gradient in ("plain", "dreg"):
        elbo = ImportanceWeightedELBO(3, bound=bound, gradient=gradient)
        loss = elbo.differentiable_loss(vae.model, vae.guide, x)
        grads = torch.autograd.grad(loss, inputs)
        estimates.append(torch.cat([grad.flatten(1) for grad in grads], -1))
    mean = [each.mean(0) for each in estimates]
    se = [each.std(0) / math.sqrt(rows) for each in estimates]
    assert (mean[0][4:].abs() > 10 * se[0][4:]).any()  # of the codes, too
    assert ((mean[0] - mean[1]).abs() < ERRORS * (se[0] ** 2 + se[1] ** 2).sqrt()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "^CrossModalELBO: expected num_samples >= 1, found 0"),
        ({"beta": -1.0}, "^CrossModalELBO: expected beta >= 0, found -1.0"),
        ({"cross": "posterior"}, "one of auxiliary, prior, found 'posterior'"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CrossModalELBO(**options)


def test_foreign_pairs_are_refused():
    vae, other = case("mmvaeplus", 2), case("mmvae", 2)
    x = batch(vae)

    def guide(x, observed=None):
        pyro.sample("z", Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="found .*guide; use SubsetELBO for a guide of your own"):
        CrossModalELBO().loss(vae.model, guide, x)
    with pytest.raises(ValueError, match="auxiliary priors, found MMVAE; use cross='prior'"):
        CrossModalELBO().loss(other.model, other.guide, x)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_without_codes_it_is_the_bound_of_mmvae(num_samples, monkeypatch):
    vae = case("mmvae", 4)
    x, observed = batch(vae), masks(vae)
    quantile = torch.distributions.Laplace.icdf
    monkeypatch.setattr(
        torch.distributions.Laplace,
        "rsample",
        lambda self, shape=(): quantile(self, torch.tensor(0.6)).expand(
            self._extended_shape(shape)
        ),
    )
    found, expected = (
        elbo.row_bounds(vae.model, vae.guide, x, observed)
        for elbo in (
            CrossModalELBO(num_samples, cross="prior"),
            ImportanceWeightedELBO(num_samples, bound="within"),
        )
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
