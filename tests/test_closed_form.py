"""Objectives with closed-form divergences: against the exact bounds of a linear-Gaussian world."""

import math

import pyro
import pytest
import torch
from patterns import (
    NAMES,
    PATTERNS,
    WEIGHTS,
    Fixture,
    close,
    kl,
    means_agree,
    product,
    seeded,
    world,
)
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from zoo import batch, case

from mmzoo.exact import LinearGaussianWorld
from mmzoo.inference import LinearWarmup, MixtureELBO, SubsetELBO, TotalCorrelationELBO
from mmzoo.models import MODELS, MVTCAE
from mmzoo.vae import Experts

# MVTCAE -----------------------------------------------------------------------------------------


def total_correlation(fixture, alpha, beta, weights):
    total = 0.0
    for row, present in enumerate(PATTERNS):
        members = [m for m in range(3) if present[m]]
        if not members:
            continue
        n = len(members)
        q = product(fixture.loc[row, members], fixture.scale[row, members])
        likelihood = sum(
            weights.get(NAMES[m], 1.0) * fixture.expected(NAMES[m], *q, row) for m in members
        )
        to_experts = sum(kl(q, (fixture.loc[row, m], fixture.scale[row, m])) for m in members)
        total = total + (n - alpha) / n * likelihood
        total = total - beta * (alpha / n * to_experts + (1 - alpha) * kl(q))
    return total


@pytest.mark.parametrize(("alpha", "weights"), [(5 / 6, {}), (0.3, WEIGHTS)])
def test_total_correlation_bound_of_every_pattern(alpha, weights):
    fixture = Fixture("mvtcae")
    exact = total_correlation(fixture, alpha, 2.5, weights)
    elbo = fixture.vae.objective(alpha=alpha, modality_weights=weights)
    means_agree(fixture, elbo, exact)


def test_published_settings_of_mvtcae():
    elbo = case("mvtcae", 2).objective()
    assert (elbo.alpha, elbo.beta) == (5 / 6, 2.5)


def test_total_correlation_without_conditional_terms_is_the_elbo():
    fixture = Fixture("mvtcae")
    x, observed = fixture.repeated(1)
    close(
        seeded(fixture, TotalCorrelationELBO(0.0, beta=2.0), x, observed),
        seeded(fixture, SubsetELBO("all", beta=2.0, elbo=TraceMeanField_ELBO()), x, observed),
    )


# CRMVAE -----------------------------------------------------------------------------------------


def test_coordination_objective_of_every_pattern():
    fixture, beta = Fixture("crmvae"), 1.5
    exact = 0.0
    for row, present in enumerate(PATTERNS):
        members = [m for m in range(3) if present[m]]
        if not members:
            continue
        single = {m: (fixture.loc[row, m], fixture.scale[row, m]) for m in members}
        q = product(fixture.loc[row, members], fixture.scale[row, members])
        value = -beta * (kl(q) + sum(kl(q, single[m]) for m in members))
        for m in members:
            each = [fixture.expected(NAMES[m], *posterior, row) for posterior in (q, single[m])]
            value = value + WEIGHTS.get(NAMES[m], 1.0) * sum(each)
        exact = exact + value / (len(members) + 1)
    means_agree(fixture, fixture.vae.objective(beta=beta, modality_weights=WEIGHTS), exact)


# mmJSD ------------------------------------------------------------------------------------------


def test_jensen_shannon_objective_of_every_pattern():
    fixture, beta = Fixture("mmjsd"), 1.5
    exact = 0.0
    for row, present in enumerate(PATTERNS):
        members = [m for m in range(3) if present[m]]
        if not members:
            continue
        n = len(members)
        single = [(fixture.loc[row, m], fixture.scale[row, m]) for m in members]
        p = [(torch.zeros(2), torch.ones(2)), *single]
        tau = sum(scale**-2 for _, scale in p) / (n + 1)
        f = sum(loc * scale**-2 for loc, scale in p) / (n + 1) / tau, tau**-0.5
        everything = sum(
            WEIGHTS.get(NAMES[m], 1.0) * fixture.expected(NAMES[m], *q, row)
            for q in single
            for m in members
        )
        exact = exact + everything / n - beta * sum(kl(each, f) for each in p) / (n + 1)
    means_agree(fixture, fixture.vae.objective(beta=beta, modality_weights=WEIGHTS), exact)


# CoDE-VAE ---------------------------------------------------------------------------------------


def consensus(loc, scale, rho):
    """Dependent experts by linear algebra, each dimension for itself."""
    pairs = []
    for mu, s in zip(loc.unbind(-1), scale.unbind(-1)):
        covariance = s.outer(s) * torch.full((len(s), len(s)), rho).fill_diagonal_(1.0)
        row = covariance.inverse().sum(0)
        pairs.append((row @ mu / row.sum(), row.sum() ** -0.5))
    return tuple(map(torch.stack, zip(*pairs)))


def subset_bounds(fixture, row, weights, beta=1.0):
    """Log weights and exact bounds of the subsets of what a row has."""
    logits, bounds = [], []
    for logit, members in zip(fixture.vae.subset_logits.detach(), fixture.vae.members):
        if not (members & ~PATTERNS[row]).any():
            q = consensus(fixture.loc[row, members], fixture.scale[row, members], fixture.vae.rho)
            likelihood = sum(
                weights.get(name, 1.0) * fixture.expected(name, *q, row)
                for name, present in zip(NAMES, PATTERNS[row])
                if present
            )
            logits.append(logit)
            bounds.append(likelihood - beta * kl(q))
    return torch.stack(logits).log_softmax(0), torch.stack(bounds)


@pytest.mark.parametrize("rho", [0.7, -0.4])
def test_mixture_bound_of_every_pattern(rho):
    fixture, beta, gamma = Fixture("codevae", rho=rho), 1.5, 3.0
    fixture.vae.subset_logits.data = torch.randn(7)
    exact = 0.0
    for row in range(1, 8):
        log_pi, bounds = subset_bounds(fixture, row, WEIGHTS, beta)
        entropy = -(log_pi.exp() * log_pi).sum()
        exact = exact + log_pi.exp() @ bounds + gamma * (entropy - math.log(len(log_pi)))
    options = {"beta": beta, "entropy_weight": gamma, "modality_weights": WEIGHTS}
    means_agree(fixture, fixture.vae.objective(**options), exact)


def test_bound_of_exact_experts_is_the_evidence():
    """Experts that are all the exact posterior, hardly more than one opinion: all subsets agree.

    The constant is what makes this the evidence and not log 7 more.
    """
    exact_world = LinearGaussianWorld.random({"a": 3, "b": 2, "c": 2}, 2, seed=1, diagonal=True)
    vae = MODELS["codevae"](exact_world.modalities(), latent_dim=2, rho=1 - 1e-12)
    x = exact_world.sample(1, seed=2)
    q = exact_world.posterior(x)
    scale = q.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    evidence = exact_world.log_prob(x, of=list(x))
    copies, losses = 400, []
    vae._encode = lambda batch: Experts(
        *(part.unsqueeze(1).expand(copies, 3, 2) for part in (q.mean, scale))
    )
    many = {name: value.expand(copies, -1) for name, value in x.items()}
    for _ in range(30):
        losses.append(-vae.objective().loss(vae.model, vae.guide, many) / copies)
    losses = torch.tensor(losses)
    se = losses.std() / math.sqrt(30)
    assert (losses.mean() - evidence).abs() < 5 * se
    assert 5 * se < math.log(7) / 5


def test_weights_are_learned_to_be_those_of_the_posterior_over_subsets():
    """The bound is highest at pi_S prop. to exp ELBO_S: there its gradient vanishes on average."""
    fixture, row = Fixture("codevae", rho=0.3), 7
    _, bounds = subset_bounds(fixture, row, {})
    fixture.repeated(1)
    copies, runs = 200, 40
    fixture.vae._encode = lambda batch: Experts(
        *(part[row].expand(copies, 3, 2) for part in (fixture.loc, fixture.scale))
    )
    x = {name: value[row].expand(copies, -1) for name, value in fixture.x.items()}
    z = {}
    for where, logits in (("uniform", torch.zeros(7)), ("best", bounds)):
        fixture.vae.subset_logits.data = logits
        grads = []
        for _ in range(runs):
            loss = fixture.vae.objective().differentiable_loss(
                fixture.vae.model, fixture.vae.guide, x
            )
            grads.append(torch.autograd.grad(loss, fixture.vae.subset_logits)[0])
        grads = torch.stack(grads)
        # A share of one leaves a gradient of round-off.
        se = grads.std(0) / math.sqrt(runs) + 1e-9
        z[where] = (grads.mean(0) / se).abs().max()
    assert z["best"] < 5 < z["uniform"]


def test_equal_weights_leave_the_mean_of_the_bounds():
    fixture = Fixture("mopoe")
    x, observed = fixture.repeated(1)
    mean = SubsetELBO(
        "powerset", scored="observed", weights="mean", components=True, elbo=TraceMeanField_ELBO()
    )
    assert math.isclose(
        seeded(fixture, MixtureELBO(), x, observed), seeded(fixture, mean, x, observed)
    )


def test_posterior_that_is_no_mixture_over_subsets():
    for name in ("mvtcae", "mmjsd"):
        vae = case(name, 2)
        message = r"^MixtureELBO: expected a posterior that is a mixture over all subsets .* of \w+"
        with pytest.raises(ValueError, match=message):
            MixtureELBO().loss(vae.model, vae.guide, batch(vae))


def test_negative_weight_of_the_entropy():
    with pytest.raises(ValueError, match="expected entropy_weight >= 0, found -1"):
        MixtureELBO(-1.0)


def test_rho_is_checked_when_the_model_is_built():
    with pytest.raises(ValueError, match=r"^rho: expected a number between -0\.5 and 1, found 1"):
        MODELS["codevae"](world().modalities(), 2, rho=1)


# Hoelder ----------------------------------------------------------------------------------------


def test_gradients_that_hold_for_constant_weights_are_refused():
    for gradient in ("dreg", "stl"):
        message = f"^HoelderVAE: expected gradient 'plain', found '{gradient}'"
        with pytest.raises(ValueError, match=message):
            case("hoelder", 2).objective(gradient=gradient)


def test_agreement_of_experts_decides_the_weight_of_their_pair():
    vae = case("hoelder", 2)
    x = batch(vae)
    scale = torch.ones(6, 2, 2)
    for distance in (0.0, 1.0, 50.0):
        loc = torch.tensor([0.0, distance]).view(1, 2, 1).expand(6, 2, 2)
        q = vae.posterior(x, experts=Experts(loc, scale))
        pair = 2 * math.exp(-2 * distance**2 / 8)  # two dimensions, BC = exp(-d^2 / 8) in each
        close(q.log_weights[0].exp(), torch.tensor([1.0, 1.0, pair]) / (2 + pair))
        close(q.loc[0, 2], torch.full((2,), distance / 2))
        assert not q.log_weights.isinf().any()


# What they share --------------------------------------------------------------------------------

#: Draws that count for each term: six rows, two of which have the second modality.
COUNTS = {
    "mvtcae": {"vector": 6, "image": 2, "z": 6, "klalignment": 6},
    "crmvae": {"vector": 12, "image": 4, "z": 14, "klalignment": 6},
    "mmjsd": {"vector": 8, "image": 4, "z": 8, "jensen_shannon": 6},
    "codevae": {"vector": 10, "image": 6, "z": 10, "entropy": 6},
}
OBJECTIVES = tuple(COUNTS)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_schedules_follow_the_steps(name):
    vae = case(name, 2)
    x = batch(vae)
    scheduled = vae.objective(beta=LinearWarmup(4, 0.0, 2.0))
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-6}), scheduled)
    for step in range(3):
        fixed = vae.objective(beta=0.5 * step)
        losses = []
        for elbo in (scheduled, fixed):
            pyro.set_rng_seed(step)
            losses.append(elbo.loss(vae.model, vae.guide, x))
        assert losses[0] == losses[1]  # a loss alone is no step
        svi.step(x)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_terms_are_reported(name):
    vae = case(name, 2)
    elbo = vae.objective()
    x = batch(vae)
    elbo.loss(vae.model, vae.guide, x, {"image": torch.arange(6) < 2})
    assert {key: int(count) for key, (_, count) in elbo.terms.items()} == COUNTS[name]
    assert all(total.isfinite() for total, _ in elbo.terms.values())


def test_noted_divergences_are_those_of_the_rows():
    fixture = Fixture("mvtcae")
    elbo = fixture.vae.objective()
    x, observed = fixture.repeated(1)
    elbo.loss(fixture.vae.model, fixture.vae.guide, x, observed)
    expected = 0.0
    for row, present in enumerate(PATTERNS):
        members = [m for m in range(3) if present[m]]
        if members:
            q = product(fixture.loc[row, members], fixture.scale[row, members])
            alone = [(fixture.loc[row, m], fixture.scale[row, m]) for m in members]
            expected = expected + sum(kl(q, each) for each in alone)
    found, count = elbo.terms["klalignment"]
    assert count == 7  # the empty row has none
    close(found, expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_guides_are_refused(name):
    vae = case(name, 2)
    message = r"^\w+: expected model and guide of one MultimodalVAE, found .*other.*SubsetELBO"

    def other(x, observed=None):
        return vae.guide(x, observed)

    with pytest.raises(ValueError, match=message):
        vae.objective().loss(vae.model, other, batch(vae))


def test_laplace_posteriors_are_refused():
    vae = case("mmvae", 2)
    with pytest.raises(ValueError, match=r"expected Gaussian posteriors .* found 'laplace'"):
        TotalCorrelationELBO().loss(vae.model, vae.guide, batch(vae))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, r"TotalCorrelationELBO: expected beta >= 0, found -1.0 at step 0"),
        (
            {"modality_weights": {"image": -2.0}},
            r"expected modality_weights\['image'\] >= 0, found -2.0 at step 0",
        ),
        ({"modality_weights": {"sound": 1.0}}, r"modality_weights: unknown modality 'sound'"),
    ],
)
def test_bad_weights(options, message):
    vae = case("mvtcae", 2)
    with pytest.raises(ValueError, match=message):
        TotalCorrelationELBO(**options).loss(vae.model, vae.guide, batch(vae))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=r"expected alpha in \[0, 1\], found"):
        MVTCAE(world().modalities(), 2).objective(alpha=alpha)
