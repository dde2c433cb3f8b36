"""The importance-weighted bound against quadrature, and its gradients against total derivatives."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from mmzoo import Modality
from mmzoo.distributions import Mixture
from mmzoo.exact import LinearGaussianWorld
from mmzoo.inference import ImportanceWeightedELBO
from mmzoo.models import MMVAE, MODELS, MVAE, MoPoE
from mmzoo.vae import Experts

# A few thousand operations on numbers of order ten, each rounded to float64.
ROUND_OFF = 1e4 * torch.finfo(torch.float64).eps
NAMES = ("a", "b", "c")
# Locations and scales of the experts of three modalities.
LOC, SCALE = (0.9, -0.7, 0.2), (0.5, 0.8, 0.6)
VALUES = (1.0, -0.5, 0.8)


def close(found: Tensor, expected: Tensor, tolerance: float = ROUND_OFF) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def world(num_modalities: int = 2, latent_dim: int = 1) -> LinearGaussianWorld:
    sizes = dict.fromkeys(NAMES[:num_modalities], latent_dim)
    return LinearGaussianWorld(
        {name: torch.eye(latent_dim) for name in sizes},
        {name: torch.zeros(latent_dim) for name in sizes},
        dict.fromkeys(sizes, 1.0),
    )


def setting(
    model: type,
    rows: int,
    num_modalities: int = 2,
    latent_dim: int = 1,
    *,
    patterns: list[tuple[bool, ...]] | None = None,
    locs: tuple[float, ...] = LOC,
    scales: tuple[float, ...] = SCALE,
    **options,
) -> SimpleNamespace:
    """A model of one row many times over, whose experts are leaves (N, M, D), one for each row."""
    vae = model(world(num_modalities, latent_dim).modalities(), latent_dim, **options)
    vae.requires_grad_(False)
    names = NAMES[:num_modalities]
    tilt = 1 + 0.2 * torch.arange(latent_dim)  # dimensions differ

    def repeated(values: tuple[float, ...]) -> Tensor:
        each = torch.tensor(values[:num_modalities]).unsqueeze(-1) * tilt
        return each.expand(rows, num_modalities, latent_dim).clone()

    x = dict(zip(names, repeated(VALUES).unbind(1), strict=True))
    mask = torch.ones(rows, num_modalities, dtype=torch.bool)
    if patterns is not None:
        mask = torch.tensor(patterns).repeat(rows // len(patterns), 1)
    observed = dict(zip(names, mask.unbind(-1), strict=True))
    loc, scale = repeated(locs).requires_grad_(), repeated(scales).requires_grad_()
    vae.encode = lambda x, observed=None: Experts(loc, scale)
    return SimpleNamespace(vae=vae, x=x, observed=observed, loc=loc, scale=scale)


def mean_gradient(
    objective: ImportanceWeightedELBO, case: SimpleNamespace, num_patterns: int = 1
) -> tuple[Tensor, Tensor]:
    """Mean over the rows of a pattern of the gradient by its experts, and its standard error."""
    vae = case.vae
    loss = objective.differentiable_loss(vae.model, vae.guide, case.x, case.observed)
    rows = torch.stack(torch.autograd.grad(-loss, (case.loc, case.scale)))  # (2, N, M, D)
    rows = rows.unflatten(1, (-1, num_patterns))
    return rows.mean(1), rows.std(1) / rows.shape[1] ** 0.5


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Whether all entries agree within five standard errors of their difference."""
    error = (found[1].square() + expected[1].square()).sqrt()
    # A missing modality has no gradient, and no error: it has to be zero in both.
    return bool(((found[0] - expected[0]).abs() <= 5 * error).all())


# Quadrature -----------------------------------------------------------------------------------
# The nodes do not move with the parameters: a derivative of these integrals uses no
# reparameterisation at all. Panels end where a Laplace density has its kink.

BROAD, SHARP = (1.2, 1.5), (0.35, 0.4)
# Experts of which one is far from the posterior, where the published gradient is far off.
APART = {"locs": (2.0, 0.5), "scales": (0.5, 0.8)}


def nodes(kinks: list[float]) -> tuple[Tensor, Tensor]:
    """Points and weights of Gauss-Legendre quadrature, 40 in each panel of [-40, 40]."""
    edges = np.array(sorted({-40.0, -15.0, -6.0, -3.0, 0.0, 3.0, 6.0, 15.0, 40.0, *kinks}))
    points, weights = np.polynomial.legendre.leggauss(40)
    half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    return torch.from_numpy((middle + half * points).ravel()), torch.from_numpy(
        (half * weights).ravel()
    )


class Curves:
    """Everything at the nodes, for MMVAE with two experts in one dimension."""

    def __init__(self, loc: Tensor, scale: Tensor, family: type = dist.Normal) -> None:
        z, step = nodes(loc.tolist())
        likelihood = sum(dist.Normal(z, 1.0).log_prob(torch.tensor(v)) for v in VALUES[:2])
        log_p = family(0.0, 1.0).log_prob(z) + likelihood
        experts = family(loc, scale).log_prob(z.unsqueeze(-1))  # (Z, 2)
        self.log_q = experts.mT + step.log()  # logarithms of quadrature weights, (2, Z)
        self.q = self.log_q.exp()
        self.log_w = log_p - experts.logsumexp(-1) + math.log(2)
        self.log_prob = (log_p + step.log()).logsumexp(0)

    def within(self) -> Tensor:
        """The bound with one draw from each component."""
        return (self.q @ self.log_w).mean()

    def pooled(self) -> Tensor:
        """The same, pooled: an integral over both draws."""
        log_w = torch.logaddexp(self.log_w.unsqueeze(-1), self.log_w) - math.log(2)
        return self.q[0] @ log_w @ self.q[1]

    def limit_within(self) -> Tensor:
        """Mean over the components of log E_{q_c} w, what ``within`` tends to."""
        return (self.log_q + self.log_w).logsumexp(-1).mean()

    def pooled_variance(self) -> Tensor:
        """K times the relative variance of the pooled average of weights."""
        w = (self.log_w - self.log_prob).exp()
        mean, second = self.q @ w, self.q @ w.square()
        return ((second - mean.square()) / 4).sum()


def curves(
    locs: tuple[float, ...] = LOC, scales: tuple[float, ...] = SCALE, family: type = dist.Normal
) -> Curves:
    return Curves(torch.tensor(locs[:2]), torch.tensor(scales[:2]), family)


def bounds(case: SimpleNamespace, num_samples: int, bound: str = "pooled") -> tuple[Tensor, Tensor]:
    """Mean of the bounds of all rows, and its standard error."""
    objective = ImportanceWeightedELBO(num_samples, bound=bound)
    vae = case.vae
    with torch.no_grad():
        found = objective.row_bounds(vae.model, vae.guide, case.x, case.observed)
    return found.mean(), found.std() / len(found) ** 0.5


def test_the_quadrature_is_right():
    x = {m: torch.tensor([[v]]) for m, v in zip(NAMES[:2], VALUES, strict=False)}
    for scales in (SCALE, BROAD, SHARP):
        found = curves(scales=scales)
        close(found.q.sum(-1), torch.ones(2), 1e-10)
        close(found.log_prob, world().log_prob(x, of=NAMES[:2]).squeeze(), 1e-10)
        close(curves(scales=scales, family=dist.Laplace).q.sum(-1), torch.ones(2), 1e-8)


# Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [SCALE, BROAD, SHARP])
def test_bounds_of_a_plain_posterior_are_ordered_below_log_p(scales):
    case = setting(MVAE, 40_000, scales=scales)
    q = case.vae.combine(Experts(case.loc[:1], case.scale[:1]), None)
    x = {m: v[:1] for m, v in case.x.items()}
    exact, log_prob = world().elbo(q, x).detach(), world().log_prob(x, of=NAMES[:2])
    (one, one_e), (five, five_e), (fifty, fifty_e) = (bounds(case, k) for k in (1, 5, 50))
    assert abs(one - exact) < 5 * one_e
    assert five - one > 5 * (one_e + five_e)
    assert fifty - five > 5 * (five_e + fifty_e)
    assert fifty < log_prob + 5 * fifty_e


FAMILIES = {"normal": dist.Normal, "laplace": dist.Laplace}


@pytest.mark.parametrize(
    "experts",
    [{}, {"scales": BROAD}, {"scales": SHARP}, APART],
    ids=["", "broad", "sharp", "apart"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_of_a_mixture(family, experts):
    true = curves(**experts, family=FAMILIES[family])
    case = setting(MMVAE, 10_000, family=family, learned_prior=False, **experts)
    for bound in ("within", "pooled"):
        (one, one_e), (five, five_e), (fifty, fifty_e) = (
            bounds(case, k, bound) for k in (1, 5, 50)
        )
        assert abs(one - getattr(true, bound)()) < 5 * one_e
        assert five - one > 5 * (one_e + five_e)
        assert fifty - five > 5 * (five_e + fifty_e)
        limit = true.log_prob if bound == "pooled" else true.limit_within()
        assert fifty < limit + 5 * fifty_e
    assert true.limit_within() < true.log_prob


@pytest.mark.parametrize("experts", [{"scales": BROAD}, APART], ids=["broad", "apart"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_tends_to_log_p_and_within_does_not(family, experts):
    true, num = curves(**experts, family=FAMILIES[family]), 100
    case = setting(MMVAE, 5000, family=family, learned_prior=False, **experts)
    (pooled, pooled_e), (within, within_e) = (bounds(case, num, b) for b in ("pooled", "within"))
    # log p - v / 2K to leading order, v / K the relative variance of the average weight.
    leading = true.pooled_variance() / (2 * num)
    assert 0.5 * leading - 5 * pooled_e < true.log_prob - pooled < 1.5 * leading + 5 * pooled_e
    assert within < true.limit_within() + 5 * within_e
    if experts is APART:  # a distance that no number of draws takes away
        assert true.log_prob - true.limit_within() > 0.1
        assert true.limit_within() - within < 0.1


def test_pooled_is_above_within():
    for k in (1, 3):
        case = setting(MMVAE, 40_000, family="normal", learned_prior=False)
        (low, low_e), (high, high_e) = (bounds(case, k, b) for b in ("within", "pooled"))
        assert high - low > 5 * (low_e + high_e)


def test_a_mixture_of_one_is_plain():
    """With one modality observed MMVAE has the posterior of that expert: the same draws."""
    case = setting(MMVAE, 100, family="normal", learned_prior=False)
    plain = setting(MVAE, 100)
    alone = dist.Normal(case.loc[:, 0], case.scale[:, 0]).to_event(1)
    plain.vae.combine = lambda experts, mask: alone
    outcomes = []
    for each in (case, plain):
        pyro.set_rng_seed(1)
        objective = ImportanceWeightedELBO(7, bound="within")
        outcomes.append(objective.row_bounds(each.vae.model, each.vae.guide, {"a": case.x["a"]}))
    close(*outcomes)


@pytest.mark.parametrize("bound", ["within", "pooled"])
@pytest.mark.parametrize("model", [MMVAE, MoPoE])
def test_a_row_does_not_depend_on_its_neighbours(model, bound):
    """K draws from each of *its* components, however many the others have."""
    options = {"family": "normal", "learned_prior": False} if model is MMVAE else {}
    patterns = [p for p in itertools.product((True, False), repeat=3) if any(p)]
    rows = 5600
    together = setting(model, rows * 7, 3, patterns=patterns, **options)
    objective = ImportanceWeightedELBO(1, bound=bound)

    def mean(case):
        vae = case.vae
        found = objective.row_bounds(vae.model, vae.guide, case.x, case.observed).detach()
        found = found.unflatten(0, (rows, -1))
        return found.mean(0), found.std(0) / rows**0.5

    found, error = mean(together)
    for index, pattern in enumerate(patterns):
        alone, alone_error = mean(setting(model, rows, 3, patterns=[pattern], **options))
        assert abs(alone[0] - found[index]) < 5 * (alone_error[0] + error[index])


def test_rows_that_are_permuted_have_permuted_bounds():
    """Exact posteriors have no variance: each row's bound is its own log p, wherever it stands."""
    truth = LinearGaussianWorld.random({"a": 3, "b": 3}, 2, seed=0, diagonal=True)
    vae = MVAE(truth.modalities("exact"), latent_dim=2)
    x = truth.sample(9, seed=1)
    expected = truth.log_prob(x, of=["a", "b"])
    assert expected.std() > 0.5
    order = torch.randperm(9)
    for k in (1, 4):
        objective = ImportanceWeightedELBO(k)
        close(objective.row_bounds(vae.model, vae.guide, x), expected)
        permuted = {name: value[order] for name, value in x.items()}
        close(objective.row_bounds(vae.model, vae.guide, permuted), expected[order])
        assert abs(objective.loss(vae.model, vae.guide, x) + expected.sum()) < 1e-10


@pytest.mark.parametrize("bound", ["within", "pooled"])
def test_each_row_has_its_own_bound(bound):
    """Rows of different surprise, one by one and together."""
    case = setting(MMVAE, 4000, family="normal", learned_prior=False)
    shift = torch.tensor([0.0, 2.0, 3.5, 5.0]).repeat(1000).unsqueeze(-1)
    case.x = {name: value + shift for name, value in case.x.items()}
    objective = ImportanceWeightedELBO(3, bound=bound)
    with torch.no_grad():
        together = objective.row_bounds(case.vae.model, case.vae.guide, case.x)
        together = together.unflatten(0, (1000, 4))
        for index in range(4):
            alone = setting(MMVAE, 1000, family="normal", learned_prior=False).vae
            x = {name: value[index::4] for name, value in case.x.items()}
            alone = objective.row_bounds(alone.model, alone.guide, x)
            error = (alone.var() / 1000 + together[:, index].var() / 1000).sqrt()
            assert abs(alone.mean() - together[:, index].mean()) < 5 * error
    spread = together.mean(0)
    assert (spread[:-1] - spread[1:] > 1).all()


# Gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["within", "pooled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_derivative_of_the_integral(family, bound):
    loc = torch.tensor(LOC[:2], requires_grad=True)
    scale = torch.tensor(SCALE[:2], requires_grad=True)
    value = getattr(Curves(loc, scale, FAMILIES[family]), bound)()
    expected = torch.stack(torch.autograd.grad(value, (loc, scale))).unsqueeze(-1)
    case = setting(MMVAE, 200_000, family=family, learned_prior=False)
    estimators = ["plain", "dreg"] + ["stl"] * (bound == "within")
    for gradient in estimators:
        objective = ImportanceWeightedELBO(1, bound=bound, gradient=gradient)
        found, error = mean_gradient(objective, case)
        assert error.max() < 0.02 * expected.abs().max()
        assert ((found[:, 0] - expected).abs() < 5 * error[:, 0]).all(), gradient


PLAIN = [(MVAE, {}, 2, 1), (MVAE, {}, 2, 2)]
MIXTURES = [
    (MMVAE, {"family": family, "learned_prior": False}, num, dim)
    for family, num, dim in [
        ("normal", 2, 1),
        ("normal", 3, 2),
        ("laplace", 2, 2),
        ("laplace", 3, 1),
    ]
] + [(MoPoE, {}, 2, 1)]


def patterns_of(num: int) -> list[tuple[bool, ...]]:
    """Everything, the first modality alone, and all but the first."""
    rest = (True,) * (num - 1)
    return [(True, *rest), (True, *(False,) * (num - 1)), (False, *rest)]


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize(
    ("model", "options", "num", "dim", "bound"),
    [(*case, "pooled") for case in PLAIN + MIXTURES] + [(*case, "within") for case in MIXTURES],
)
def test_estimators_agree_with_the_total_derivative(model, options, num, dim, bound, num_samples):
    rows = 66_000 if num_samples == 1 else 33_000
    patterns = patterns_of(num)
    far = {"locs": (2.0, 0.5, -1.0)}  # where wrong estimators are far off
    case = setting(model, rows * len(patterns), num, dim, patterns=patterns, **far, **options)
    plain = ImportanceWeightedELBO(num_samples, bound=bound)
    expected = mean_gradient(plain, case, len(patterns))
    # Of every modality that a pattern has, and of no other.
    assert torch.equal((expected[0] != 0).any(-1).any(0), torch.tensor(patterns))
    estimators = ["dreg"]
    if num_samples == 1 and (bound == "within" or model is MVAE):
        estimators.append("stl")
    for gradient in estimators:
        objective = ImportanceWeightedELBO(num_samples, bound=bound, gradient=gradient)
        assert same(mean_gradient(objective, case, len(patterns)), expected), gradient


ALLOWED = [("plain", False), ("stl", True), ("dreg", False), ("dreg", True)]  # for any K


@pytest.mark.parametrize("bound", ["within", "pooled"])
@pytest.mark.parametrize(("gradient", "as_published"), ALLOWED)
@pytest.mark.parametrize("model", [MVAE, MMVAE])
def test_a_scaled_loss_has_a_scaled_gradient(model, gradient, bound, as_published):
    options = {"family": "normal", "learned_prior": False} if model is MMVAE else {}
    case = setting(model, 32, patterns=[(True, True), (False, True)], **options)
    objective = ImportanceWeightedELBO(3, bound=bound, gradient=gradient, as_published=as_published)

    def gradients(factor: float) -> tuple[Tensor, ...]:
        pyro.set_rng_seed(6)
        vae = case.vae
        loss = objective.differentiable_loss(vae.model, vae.guide, case.x, case.observed)
        return torch.autograd.grad(factor * loss, (case.loc, case.scale))

    for whole, part in zip(gradients(1.0), gradients(1 / 32), strict=True):
        close(part, whole / 32)


def test_the_published_gradient_of_mixtures_is_biased():
    """Squared weights alone are right where the draws come from the density in the weights."""
    case = setting(MMVAE, 60_000, family="normal", learned_prior=False, **APART)
    for bound in ("within", "pooled"):
        expected = mean_gradient(ImportanceWeightedELBO(3, bound=bound), case)
        ours = ImportanceWeightedELBO(3, bound=bound, gradient="dreg")
        published = ImportanceWeightedELBO(3, bound=bound, gradient="dreg", as_published=True)
        assert same(mean_gradient(ours, case), expected)
        found = mean_gradient(published, case)
        error = (found[1].square() + expected[1].square()).sqrt()
        off = (found[0] - expected[0]).abs()
        assert (off > 20 * error).any()


def test_sticking_the_landing_is_biased_beyond_one_draw():
    for model, options in ((MVAE, {}), (MMVAE, {"family": "normal", "learned_prior": False})):
        case = setting(model, 200_000, **options)
        expected = mean_gradient(ImportanceWeightedELBO(3, bound="within"), case)
        stl = ImportanceWeightedELBO(3, bound="within", gradient="stl", as_published=True)
        found = mean_gradient(stl, case)
        error = (found[1].square() + expected[1].square()).sqrt()
        assert ((found[0] - expected[0]).abs() > 5 * error).any()


def test_sticking_the_landing_of_a_pooled_mixture_is_biased():
    case = setting(MMVAE, 200_000, family="normal", learned_prior=False)
    expected = mean_gradient(ImportanceWeightedELBO(1), case)
    found = mean_gradient(ImportanceWeightedELBO(1, gradient="stl", as_published=True), case)
    error = (found[1].square() + expected[1].square()).sqrt()
    assert ((found[0] - expected[0]).abs() > 5 * error).any()


@pytest.mark.parametrize("bound", ["within", "pooled"])
@pytest.mark.parametrize("model", [MVAE, MMVAE, MoPoE])
def test_estimators_share_the_gradients_of_the_model(model, bound):
    """With the same draws exactly: only the guide's parameters have different estimators."""
    small = {"kind": "mlp", "hidden": [5]}
    modalities = [Modality(name, (2,), encoder=small, decoder=small) for name in "ab"]
    options = {"learned_prior": True} if model is MMVAE else {}
    vae = model(modalities, latent_dim=2, **options)
    x = {"a": torch.randn(6, 2), "b": torch.randn(6, 2)}
    observed = {"b": torch.arange(6) < 4}
    generative = list(vae.generative.parameters())
    found = {}
    for gradient, as_published in ALLOWED:
        objective = ImportanceWeightedELBO(
            3, bound=bound, gradient=gradient, as_published=as_published
        )
        pyro.set_rng_seed(7)
        loss = objective.differentiable_loss(vae.model, vae.guide, x, observed)
        found[gradient, as_published] = [
            loss.detach(),
            *torch.autograd.grad(loss, generative, allow_unused=True),
        ]
    reference = found.pop(("plain", False))
    assert sum(gradient is not None and bool(gradient.any()) for gradient in reference) > 8
    for gradients in found.values():
        for mine, other in zip(gradients, reference, strict=True):
            assert (mine is None) == (other is None)
            if other is not None:
                close(mine, other)


def test_plain_gradient_by_hand():
    """Burda et al. (2016), equation 13, for a plain posterior: reseed and write it out."""
    small = {"kind": "mlp", "hidden": [5]}
    modalities = [Modality(name, (2,), encoder=small, decoder=small) for name in "ab"]
    vae = MVAE(modalities, latent_dim=2)
    x = {"a": torch.randn(6, 2), "b": torch.randn(6, 2)}
    parameters = list(vae.parameters())
    pyro.set_rng_seed(8)
    loss = ImportanceWeightedELBO(4).differentiable_loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(8)
    q = vae.posterior(x)
    z = q.rsample((4,))  # (K, N, D)
    log_w = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z)
    log_w = log_w + sum(p.log_prob(x[name]) for name, p in vae.decode(z).items())
    by_hand = -(log_w.exp().mean(0)).log().sum()
    close(loss, by_hand)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    weighted = -(log_w.softmax(0).detach() * log_w).sum()
    expected = torch.autograd.grad(weighted, parameters, allow_unused=True)
    assert sum(bool(g.any()) for g in expected if g is not None) > 12
    for mine, other in zip(found, expected, strict=True):
        assert (mine is None) == (other is None)
        if other is not None:
            close(mine, other)


@pytest.mark.parametrize("bound", ["within", "pooled"])
def test_plain_gradient_of_a_mixture_by_hand(bound):
    """Draws k of the components in turn, each weighted with the density of the whole mixture."""
    case = setting(MMVAE, 5, 3, 2, family="laplace", learned_prior=False)
    vae, num = case.vae, 2
    pyro.set_rng_seed(9)
    objective = ImportanceWeightedELBO(num, bound=bound)
    loss = objective.differentiable_loss(vae.model, vae.guide, case.x)
    pyro.set_rng_seed(9)
    turn = [k % 3 for k in range(3 * num)]
    loc, scale = (p[:, turn].movedim(1, 0) for p in (case.loc, case.scale))
    z = dist.Laplace(loc, scale).rsample()  # (3 K, N, D)
    prior = dist.Laplace(0.0, 1.0).log_prob(z).sum(-1)
    experts = [dist.Laplace(case.loc[:, m], case.scale[:, m]).log_prob(z).sum(-1) for m in range(3)]
    log_w = prior - torch.stack(experts).exp().mean(0).log()
    log_w = log_w + sum(p.log_prob(case.x[name]) for name, p in vae.decode(z).items())
    w = log_w.exp().unflatten(0, (num, 3))  # (K, 3, N)
    by_hand = w.mean((0, 1)).log() if bound == "pooled" else w.mean(0).log().mean(0)
    close(loss, -by_hand.sum())
    found = torch.autograd.grad(loss, (case.loc, case.scale))
    for mine, other in zip(found, torch.autograd.grad(-by_hand.sum(), (case.loc, case.scale))):
        close(mine, other)


# Guides of users --------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A user's network, of the first modality alone."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.raw = nn.Linear(1, 1), nn.Parameter(torch.tensor([0.3]))

    def guide(self, x, observed=None):
        pyro.module("encoder", self)
        with pyro.plate("data", len(x["a"]), dim=-1):
            loc = self.loc(x["a"])
            pyro.sample("z", dist.Normal(loc, self.raw.exp().expand_as(loc)).to_event(1))


def test_a_users_guide_has_the_bound_of_trace_elbo_at_one_draw():
    network, case = Encoder(), setting(MVAE, 50)
    outcomes = []
    for objective in (ImportanceWeightedELBO(1), Trace_ELBO()):
        pyro.set_rng_seed(10)
        if isinstance(objective, ImportanceWeightedELBO):
            # It draws once more beforehand, to see whether the guide is a mixture.
            state = torch.get_rng_state()
            network.guide(case.x)
            after = torch.get_rng_state()
            torch.set_rng_state(state)
        else:
            torch.set_rng_state(after)
        loss = objective.differentiable_loss(case.vae.model, network.guide, case.x)
        outcomes.append([loss, *torch.autograd.grad(loss, list(network.parameters()))])
    for mine, other in zip(*outcomes, strict=True):
        close(mine, other)


@pytest.mark.parametrize("gradient", ["plain", "dreg"])
def test_a_users_guide_tightens(gradient):
    network, case = Encoder(), setting(MVAE, 40_000)
    x = {m: v[:1] for m, v in case.x.items()}
    exact = world().elbo((network.loc(x["a"]), network.raw.exp()), x).detach()
    log_prob = world().log_prob(x, of=NAMES[:2])
    found = []
    for k in (1, 20):
        objective = ImportanceWeightedELBO(k, gradient=gradient)
        with torch.no_grad():
            rows = objective.row_bounds(case.vae.model, network.guide, case.x)
        found.append((rows.mean(), rows.std() / len(rows) ** 0.5))
    (one, one_e), (many, many_e) = found
    assert abs(one - exact) < 5 * one_e
    assert one + 5 * (one_e + many_e) < many < log_prob + 5 * many_e


def test_a_users_mixture_is_stratified():
    """The guide of MMVAE written out has the same bound, on the same draws."""
    case = setting(MMVAE, 30, family="normal", learned_prior=False)

    def guide(x, observed=None):
        with pyro.plate("data", 30, dim=-1):
            pyro.sample("z", Mixture(torch.zeros(2), case.loc, case.scale))

    outcomes = []
    for each in (case.vae.guide, guide):
        pyro.set_rng_seed(11)
        if each is not guide:  # one draw beforehand tells what a user's guide is
            torch.randn(1, 30, 1)
        objective = ImportanceWeightedELBO(3, gradient="dreg")
        loss = objective.differentiable_loss(case.vae.model, each, case.x)
        outcomes.append([loss, *torch.autograd.grad(loss, (case.loc, case.scale))])
    for mine, other in zip(*outcomes, strict=True):
        close(mine, other)


# Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": "best"}, "expected bound one of pooled, within, found 'best'"),
        ({"gradient": "vimco"}, "expected gradient one of plain, stl, dreg, found 'vimco'"),
        ({"num_samples": 0}, "expected num_samples >= 1, found 0"),
        ({"num_samples": 2, "gradient": "stl"}, "found 'stl', which is biased there; as_published"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ImportanceWeightedELBO(**options)


def test_biased_sticking_the_landing_of_mixtures_is_refused():
    case = setting(MMVAE, 4, family="normal", learned_prior=False)
    vae = case.vae
    objective = ImportanceWeightedELBO(1, gradient="stl", bound="pooled")
    with pytest.raises(ValueError, match="expected bound 'within' for gradient 'stl' of a mixture"):
        objective.loss(vae.model, vae.guide, case.x)
    allowed = ImportanceWeightedELBO(1, gradient="stl", bound="pooled", as_published=True)
    plain = ImportanceWeightedELBO(1, bound="pooled")
    losses = []
    for each in (allowed, plain):
        pyro.set_rng_seed(12)
        losses.append(each.loss(vae.model, vae.guide, case.x))
    assert losses[0] == losses[1]
    # One component each: nothing is pooled.
    objective.loss(vae.model, vae.guide, {"a": case.x["a"]})


@pytest.mark.parametrize("bound", ["within", "pooled"])
@pytest.mark.parametrize("whose", ["codevae", "hoelder", "user"])
def test_doubly_reparameterised_gradients_miss_learned_weights(whose, bound):
    vae = MODELS[whose if whose != "user" else "mvae"](world().modalities(), 1)
    x = dict.fromkeys(NAMES[:2], torch.ones(5, 1))
    logits = torch.zeros(2, requires_grad=True)

    def guide(x, observed=None):
        with pyro.plate("data", 5, dim=-1):
            loc, scale = torch.zeros(5, 2, 1), torch.ones(5, 2, 1)
            pyro.sample("z", Mixture(logits.log_softmax(-1), loc, scale))

    pair = (vae.model, guide if whose == "user" else vae.guide)
    objective = ImportanceWeightedELBO(2, bound=bound, gradient="dreg")
    message = "^ImportanceWeightedELBO: expected components of fixed weights for gradient 'dreg'"
    with pytest.raises(ValueError, match=message + ".*use gradient='plain'"):
        objective.differentiable_loss(*pair, x)
    # Without a gradient, or with one that is biased by consent, there is nothing to miss.
    assert math.isfinite(objective.loss(*pair, x))
    published = ImportanceWeightedELBO(2, bound=bound, gradient="dreg", as_published=True)
    assert torch.isfinite(published.differentiable_loss(*pair, x))


def test_rows_that_have_a_learned_mixture_as_prior_are_none_of_them():
    vae = MMVAE(world().modalities(), 1, prior={"kind": "mixture", "components": 3})
    x = dict.fromkeys(NAMES[:2], torch.ones(5, 1))
    seen = dict.fromkeys(NAMES[:2], torch.arange(5) < 3)
    objective = ImportanceWeightedELBO(2, gradient="dreg")
    assert objective.differentiable_loss(vae.model, vae.guide, x, seen) > 0
    nothing = dict.fromkeys(NAMES[:2], torch.zeros(5, dtype=torch.bool))
    loss = objective.differentiable_loss(vae.model, vae.guide, x, nothing)
    close(loss.detach(), torch.tensor(0.0))


def test_draws_that_carry_no_gradient_are_refused():
    case = setting(MVAE, 3)

    def guide(x, observed=None):
        rate = pyro.param("rate", torch.ones(3, 1), constraint=dist.constraints.positive)
        with pyro.plate("data", 3, dim=-1):
            pyro.sample("z", dist.Poisson(rate).to_event(1))

    with pytest.raises(ValueError, match="guide site 'z': expected reparameterised draws, found"):
        ImportanceWeightedELBO(2).differentiable_loss(case.vae.model, guide, case.x)


def test_a_model_with_more_latents_than_its_guide_is_refused():
    case = setting(MVAE, 3)

    def model(x, observed=None):
        with pyro.plate("data", 3, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="model site 'w': expected a value from the guide"):
        ImportanceWeightedELBO(2).loss(model, case.vae.guide, case.x)


@pytest.mark.parametrize("part", ["model", "guide"])
def test_latents_shared_by_all_rows_are_refused(part):
    """No weight of a single row exists then."""
    case = setting(MVAE, 3)

    def shared(x, observed=None):
        pyro.sample("theta", dist.Normal(0.0, 1.0))
        return (case.vae.model if part == "model" else case.vae.guide)(x, observed)

    pair = (case.vae.model, shared) if part == "guide" else (shared, case.vae.guide)
    message = "site 'theta'" if part == "guide" else "model site 'theta': expected a value"
    with pytest.raises(ValueError, match=message):
        ImportanceWeightedELBO(2).loss(*pair, case.x)


def test_a_guide_without_latents_is_refused():
    case = setting(MVAE, 3)
    with pytest.raises(ValueError, match="guide: expected at least one sample site, found none"):
        ImportanceWeightedELBO(2).loss(case.vae.model, lambda x, observed=None: None, case.x)


def test_a_second_mixture_site_is_refused():
    case = setting(MMVAE, 3, family="normal", learned_prior=False)

    def guide(x, observed=None):
        with pyro.plate("data", 3, dim=-1):
            for name in ("z", "w"):
                pyro.sample(name, Mixture(torch.zeros(2), case.loc, case.scale))

    with pytest.raises(ValueError, match="guide site 'w': expected at most one mixture site"):
        ImportanceWeightedELBO(2).loss(case.vae.model, guide, case.x)
