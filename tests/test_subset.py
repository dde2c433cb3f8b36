"""SubsetELBO against the exact bounds of a linear-Gaussian world."""

import itertools

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from mmzoo import Modality
from mmzoo.exact import LinearGaussianWorld
from mmzoo.inference import (
    ImportanceWeightedELBO,
    LinearWarmup,
    SubsetELBO,
    Wasserstein,
)
from mmzoo.inference.alignment import alignment_terms
from mmzoo.models import MMVAE, MVAE, MoPoE

# A few thousand operations on numbers of order a hundred, each rounded to float64.
ROUND_OFF = 1e5 * torch.finfo(torch.float64).eps
NAMES = ("a", "b", "c")
SIZES = {"a": 4, "b": 3, "c": 2}
D = 2
COPIES = 100  # of each row, in each of RUNS runs
RUNS = 25
PATTERNS = torch.tensor([p for p in itertools.product((True, False), repeat=3) if any(p)])
SUBSETS = [c for size in (1, 2, 3) for c in itertools.combinations(NAMES, size)]
SINGLES = [(name,) for name in NAMES]


def close(found: Tensor, expected: Tensor, tolerance: float = ROUND_OFF) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def world(*, diagonal: bool = False) -> LinearGaussianWorld:
    return LinearGaussianWorld.random(SIZES, D, seed=0, diagonal=diagonal)


def small(modalities: list[Modality]) -> list[Modality]:
    """The same modalities with small random encoders: bounds that are far from tight."""
    encoder = {"kind": "mlp", "hidden": [6]}
    return [
        Modality(m.name, m.event_shape, m.likelihood, encoder=encoder, decoder=m.decoder)
        for m in modalities
    ]


def batch() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A row with each pattern of missing modalities; NaN where there is nothing."""
    x = world().sample(len(PATTERNS), seed=1)
    observed = dict(zip(NAMES, PATTERNS.unbind(-1), strict=True))
    return {m: torch.where(observed[m].unsqueeze(-1), x[m], torch.nan) for m in x}, observed


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.repeat_interleave(COPIES, 0) for name, value in tensors.items()}


def term(vae, x, observed, given, scored, beta=1.0, factors=None) -> Tensor:
    """Exact ELBO of each row of q(z | x_given), scoring ``scored``; ``(N,)``."""
    masks = {m: observed[m] & (m in given) for m in NAMES}
    q = vae.posterior(x, masks)
    filled = {m: x[m].nan_to_num() for m in NAMES}
    if beta == 1.0 and not factors:
        return world().elbo(q, filled, observed, scored=scored)
    prior = Independent(Normal(torch.zeros(D), torch.ones(D)), 1)
    total = -beta * kl_divergence(q, prior)
    for m in scored:
        loc, scale = q.base_dist.loc, q.base_dist.scale
        expected = world().expected_log_likelihood(m, loc, scale, filled[m])
        total = total + (factors or {}).get(m, 1.0) * observed[m] * expected
    return total


def exact(vae, x, observed, subsets, *, scored="given", weights="sum", **options) -> Tensor:
    """The objective of a batch by its definition; ``subsets`` may hold the word "all"."""
    total, count = torch.zeros(len(PATTERNS)), torch.zeros(len(PATTERNS))
    for given in subsets:
        names = NAMES if given == "all" else given
        complete = torch.stack([observed[m] for m in names]).all(0)
        counts = torch.ones_like(complete) if given == "all" else complete
        scores = names if scored == "given" else NAMES
        total = total + counts * term(vae, x, observed, names, scores, **options)
        count = count + counts
    return (total / count.clamp(min=1) if weights == "mean" else total).sum()


def estimate(objective, model, guide, x, observed) -> tuple[Tensor, Tensor]:
    """Mean over runs of the objective for one copy of the batch, and its standard error."""
    rows = (copies(x), copies(observed))
    found = torch.tensor([-objective.loss(model, guide, *rows) / COPIES for _ in range(RUNS)])
    return found.mean(), found.std() / RUNS**0.5


def agrees(objective, vae, expected, guide=None) -> None:
    mean, error = estimate(objective, vae.model, guide or vae.guide, *batch())
    assert 0 < error < 0.02 * expected.abs()  # else the comparison says nothing
    assert abs(mean - expected) < 5 * error


def model() -> MVAE:
    return MVAE(small(world().modalities()), latent_dim=D)


# Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["sum", "mean"])
@pytest.mark.parametrize("scored", ["given", "observed"])
@pytest.mark.parametrize(
    ("given", "subsets"),
    [
        ("all", ["all"]),
        ("singles", SINGLES),
        ("powerset", SUBSETS),
        ([("a", "c")], [("a", "c")]),
        (("all", "singles", ("b", "c")), ["all", *SINGLES, ("b", "c")]),
    ],
)
def test_value_is_the_exact_bound(given, subsets, scored, weights):
    vae = model()
    x, observed = batch()
    options = {"scored": scored, "weights": weights}
    expected = exact(vae, x, observed, subsets, **options).detach()
    agrees(SubsetELBO(given, elbo=TraceMeanField_ELBO(), **options), vae, expected)


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_beta_and_modality_weights_scale_their_terms(elbo, vectorized):
    vae = model()
    factors = {"a": 3.0, "b": 0.0}
    expected = exact(
        vae, *batch(), ["all", *SINGLES], beta=0.25, factors=factors, scored="observed"
    )
    objective = SubsetELBO(
        ("all", "singles"),
        scored="observed",
        beta=0.25,
        modality_weights=factors,
        elbo=elbo(),
        vectorized=vectorized,
    )
    agrees(objective, vae, expected.detach())


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_kl_of_the_mean_field_elbo_is_exact_at_any_beta(beta):
    """With no likelihood left, nothing random is left."""
    vae, (x, observed) = model(), batch()
    objective = SubsetELBO(
        "powerset",
        beta=beta,
        modality_weights=dict.fromkeys(NAMES, 0.0),
        elbo=TraceMeanField_ELBO(),
    )
    none = dict.fromkeys(NAMES, 0.0)
    expected = -exact(vae, x, observed, SUBSETS, beta=beta, factors=none)
    close(torch.tensor(objective.loss(vae.model, vae.guide, x, observed)), expected.detach())


def test_schedules_follow_the_steps():
    vae, (x, observed) = model(), batch()
    none = dict.fromkeys(NAMES, 0.0)
    kl = -exact(vae, x, observed, ["all"], beta=2.0, factors=none).detach() / 2
    objective = SubsetELBO(
        "all",
        beta=LinearWarmup(steps=4, end=2.0),
        modality_weights={**none, "a": lambda step: 0.0},
        elbo=TraceMeanField_ELBO(),
    )
    for beta in (0.0, 0.5, 1.0, 1.5, 2.0, 2.0):
        for _ in range(2):  # a loss without a gradient is no step
            close(torch.tensor(objective.loss(vae.model, vae.guide, x, observed)), beta * kl)
        loss = objective.differentiable_loss(vae.model, vae.guide, x, observed)
        close(loss.detach(), beta * kl)


def test_linear_warmup():
    weight = LinearWarmup(steps=10, start=2.0, end=4.0)
    assert [weight(step) for step in (0, 5, 10, 99)] == [2.0, 3.0, 4.0, 4.0]
    assert LinearWarmup(steps=0)(0) == 0.0
    assert LinearWarmup(steps=0)(1) == 1.0


def test_random_subsets_are_drawn_evenly():
    """Their expectation: num_random / (2^M - 1) of the sum over the subsets met by each row."""
    vae, (x, observed) = model(), batch()
    none = dict.fromkeys(NAMES, 0.0)
    objective = SubsetELBO((), num_random=2, modality_weights=none, elbo=TraceMeanField_ELBO())
    # A random subset is cut to what the row observes, and counts where something is left.
    values = []
    for given in SUBSETS:
        some = torch.stack([observed[m] for m in given]).any(0)
        values.append((some * term(vae, x, observed, given, (), factors=none)).sum().detach())
    values = torch.stack(values)
    num = 200
    found = torch.tensor([-objective.loss(vae.model, vae.guide, x, observed) for _ in range(num)])
    error = (2 * values.var(correction=0) / num).sqrt()
    assert abs(found.mean() - 2 * values.mean()) < 5 * error
    pairs = values + values.unsqueeze(-1)
    assert all((pairs - value).abs().min() < ROUND_OFF * value.abs() for value in found)
    assert len(found.round(decimals=6).unique()) > 14  # of 28 pairs, order aside


def test_terms_are_reported_per_scored_row():
    vae, (x, observed) = model(), batch()
    objective = SubsetELBO(("all", "singles"), elbo=TraceMeanField_ELBO())
    objective.loss(vae.model, vae.guide, x, observed)
    counts = {name: int(count) for name, (_, count) in objective.terms.items()}
    rows = PATTERNS.sum(0)  # each row that has m scores it twice: with all, and alone
    assert counts == {m: 2 * int(n) for m, n in zip(NAMES, rows, strict=True)} | {
        "z": 7 + int(PATTERNS.sum())
    }


def test_terms_add_up_to_the_loss():
    vae, (x, observed) = model(), batch()
    term = Wasserstein(0.5)
    objective = SubsetELBO("powerset", alignment=term)
    loss = objective.loss(vae.model, vae.guide, x, observed)
    sums = {name: total for name, (total, _) in objective.terms.items()}
    close(sums["wasserstein"], alignment_terms(vae, x, observed, term).sum().detach())
    bound = sum(sums[m] for m in NAMES) - sums["z"]
    close(torch.tensor(loss), 0.5 * sums["wasserstein"] - bound)


# Missing rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("weights", ["sum", "mean"])
def test_rows_that_meet_no_subset_count_nothing(weights, vectorized):
    vae, (x, observed) = model(), batch()
    objective = SubsetELBO(
        [("a", "c")], weights=weights, vectorized=vectorized, elbo=TraceMeanField_ELBO()
    )
    met = observed["a"] & observed["c"]

    def loss(rows: Tensor) -> Tensor:
        pyro.set_rng_seed(1)
        chosen = [{m: v[rows] for m, v in each.items()} for each in (x, observed)]
        value = objective.differentiable_loss(vae.model, vae.guide, *chosen)
        return value, torch.autograd.grad(value, list(vae.parameters()), allow_unused=True)

    value, gradients = loss(~met)
    assert value == 0
    assert all(gradient is None or not gradient.any() for gradient in gradients)
    value, _ = loss(met)
    assert value > 0


@pytest.mark.parametrize("vectorized", [True, False])
def test_what_is_missing_changes_no_bit(vectorized):
    vae, (x, observed) = model(), batch()

    def outcome(filler):
        pyro.set_rng_seed(2)
        filled = {m: torch.where(observed[m].unsqueeze(-1), x[m], filler) for m in x}
        objective = SubsetELBO("powerset", scored="observed", vectorized=vectorized)
        loss = objective.differentiable_loss(vae.model, vae.guide, filled, observed)
        return [loss, *torch.autograd.grad(loss, [p for p in vae.parameters() if p.requires_grad])]

    assert all(torch.equal(a, b) for a, b in zip(outcome(torch.nan), outcome(1e30), strict=True))


# Loops and plates ------------------------------------------------------------------------------


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("scored", ["given", "observed"])
def test_a_loop_is_the_sum_of_its_subsets(scored, elbo):
    vae, (x, observed) = model(), batch()

    def outcome(parts, vectorized):
        pyro.set_rng_seed(4)
        options = {"scored": scored, "vectorized": vectorized, "beta": 0.5}
        losses = [
            SubsetELBO(given, elbo=elbo(), **options).differentiable_loss(
                vae.model, vae.guide, x, observed
            )
            for given in parts
        ]
        loss = torch.stack(losses).sum()
        return [loss, *torch.autograd.grad(loss, [p for p in vae.parameters() if p.requires_grad])]

    looped = outcome([["all", ("a",), ("b", "c")]], vectorized=False)
    alone = outcome(["all", [("a",)], [("b", "c")]], vectorized=True)
    for mine, other in zip(looped, alone, strict=True):
        close(mine, other)


@pytest.mark.parametrize("weights", ["sum", "mean"])
@pytest.mark.parametrize("scored", ["given", "observed"])
def test_loop_and_plate_have_the_same_expectation(scored, weights):
    vae = model()
    options = {"scored": scored, "weights": weights}
    expected = exact(vae, *batch(), SUBSETS, **options).detach()
    objective = SubsetELBO("powerset", vectorized=False, elbo=TraceMeanField_ELBO(), **options)
    agrees(objective, vae, expected)


class MeanEncoder(nn.Module):
    """A user's network, with a guide that expects one row dimension and the plate "data" only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(sum(SIZES.values()), 2 * D)

    def posterior(self, x, observed):
        parts = [torch.where(observed[m].unsqueeze(-1), x[m], 0.0) for m in NAMES]
        loc, raw = self.linear(torch.cat(parts, -1)).chunk(2, -1)
        return Independent(Normal(loc, nn.functional.softplus(raw) + 0.1), 1)


@pytest.mark.parametrize("scored", ["given", "observed"])
def test_a_users_guide_that_knows_no_other_plates(scored):
    network, vae = MeanEncoder(), model()

    def guide(x, observed=None):
        pyro.module("mean_encoder", network)
        assert observed["a"].shape == (len(x["a"]),)
        loc, scale = (
            getattr(network.posterior(x, observed).base_dist, p) for p in ("loc", "scale")
        )
        with pyro.plate("data", len(x["a"])):
            pyro.sample("z", pyro.distributions.Normal(loc, scale).to_event(1))

    x, observed = batch()
    expected = torch.zeros(())
    for given in SUBSETS:
        masks = {m: observed[m] & (m in given) for m in NAMES}
        q = network.posterior(x, masks)
        filled = {m: x[m].nan_to_num() for m in NAMES}
        scores = given if scored == "given" else NAMES
        counts = torch.stack([observed[m] for m in given]).all(0)
        expected = expected + (counts * world().elbo(q, filled, observed, scored=scores)).sum()
    objective = SubsetELBO("powerset", scored=scored, vectorized=False, elbo=TraceMeanField_ELBO())
    agrees(objective, vae, expected.detach(), guide)


def test_svi_trains_a_users_guide():
    network, vae = MeanEncoder(), model()

    def guide(x, observed=None):
        pyro.module("mean_encoder", network)
        with pyro.plate("data", len(x["a"])):
            q = network.posterior(x, observed).base_dist
            pyro.sample("z", pyro.distributions.Normal(q.loc, q.scale).to_event(1))

    objective = SubsetELBO("all", vectorized=False, elbo=TraceMeanField_ELBO())
    svi = SVI(vae.model, guide, Adam({"lr": 0.03}), objective)
    x, observed = batch()

    def bound() -> Tensor:
        filled = {m: x[m].nan_to_num() for m in NAMES}
        return world().elbo(network.posterior(x, observed), filled, observed).sum().detach()

    before, frozen = bound(), [p.clone() for p in vae.parameters()]
    best = world().log_prob({m: x[m].nan_to_num() for m in NAMES}, observed, of=NAMES).sum()
    for _ in range(200):
        svi.step(x, observed)
    assert before < best - 50  # there was something to gain
    assert bound() > before + 0.5 * (best - before)
    assert bound() < best
    assert all(torch.equal(a, b) for a, b in zip(frozen, vae.parameters(), strict=True))


# Alignment ----------------------------------------------------------------------------------------


def test_alignment_is_added_to_the_loss_and_to_nothing_else():
    vae, (x, observed) = model(), batch()
    terms = [Wasserstein(2.0), Wasserstein(3.0, form="barycenter")]

    def loss(alignment):
        pyro.set_rng_seed(5)
        return SubsetELBO("all", alignment=alignment).loss(vae.model, vae.guide, x, observed)

    expected = sum(t.weight * alignment_terms(vae, x, observed, t).sum() for t in terms).detach()
    close(torch.tensor(loss(terms) - loss(())), expected)
    trace = poutine.trace(vae.model).get_trace(x, observed)
    assert set(trace.nodes) - {"_INPUT", "_RETURN", "data", "z", *NAMES} == {
        name for name, site in trace.nodes.items() if site["type"] == "param"
    }


def test_weight_zero_is_no_alignment():
    vae, (x, observed) = model(), batch()

    def loss(**options):
        pyro.set_rng_seed(5)
        return SubsetELBO("all", **options).loss(vae.model, vae.guide, x, observed)

    assert loss(alignment=Wasserstein(0.0)) == loss()


# Mixtures ---------------------------------------------------------------------------------------


def test_published_bound_of_mopoe_is_below_the_exact_one():
    """At beta = 1 they differ by sum_S pi_S KL(q_S || mixture) in each row."""
    truth = world()
    # Decoders that hardly look at z: the noise of their likelihoods would hide the difference.
    faint = LinearGaussianWorld(
        {m: 0.02 * w for m, w in truth.weights.items()}, truth.biases, truth.scales
    )
    vae = MoPoE(small(faint.modalities()), latent_dim=D)
    x, observed = batch()
    rows = (copies(x), copies(observed))
    q = vae.posterior(*rows)
    draws = q.components.sample((25,))  # (K, N, C, D)
    log_q = q.log_prob(draws.movedim(-2, 0)).movedim(0, -1)
    log_ratio = q.components.log_prob(draws) - log_q
    gaps = torch.where(q.present, q.log_weights.exp() * log_ratio, 0.0).sum(-1).detach()
    gaps = gaps.reshape(-1, len(PATTERNS), COPIES).sum(1)  # (K, copies) of the whole batch
    found = [(gaps.mean(), gaps.std() / gaps.numel() ** 0.5)]
    for objective in (vae.objective(beta=1.0), vae.objective(exact=True)):
        found.append(estimate(objective, vae.model, vae.guide, x, observed))
    (gap, low, high), errors = zip(*found, strict=True)
    error = torch.stack(errors).square().sum().sqrt()
    assert gap > 10 * error  # the difference can be seen
    assert abs(high - low - gap) < 5 * error


def test_components_are_the_products_of_the_subsets():
    vae = MoPoE(small(world().modalities()), latent_dim=D)
    x, observed = batch()
    experts = vae.encode(x, observed)
    expected = torch.zeros(len(PATTERNS))
    for given in SUBSETS:
        index = [NAMES.index(m) for m in given]
        tau = experts.scale[:, index] ** -2
        loc, scale = (tau * experts.loc[:, index]).sum(1) / tau.sum(1), tau.sum(1) ** -0.5
        counts = PATTERNS[:, index].all(-1)
        filled = {m: x[m].nan_to_num() for m in NAMES}
        bound = world().elbo((loc, scale), filled, observed)
        expected = expected + torch.where(counts, bound, 0.0)
    num = 2 ** PATTERNS.sum(-1) - 1
    agrees(vae.objective(beta=1.0), vae, (expected / num).sum().detach())


def test_a_mixture_needs_another_elbo():
    vae = MMVAE(small(world().modalities()), latent_dim=D)
    x, observed = batch()
    with pytest.raises(ValueError, match="guide site 'z': expected a reparameterised posterior"):
        SubsetELBO(elbo=TraceMeanField_ELBO()).loss(vae.model, vae.guide, x, observed)


# Zero variance --------------------------------------------------------------------------------


class TrainableExpert(nn.Module):
    """The exact expert of a diagonal world, an affine map, with parameters to be trained."""

    def __init__(self, exact_world: LinearGaussianWorld, name: str) -> None:
        super().__init__()
        size = exact_world.event_sizes[name]
        offset, scale = exact_world.expert(name, torch.zeros(size))
        rows, _ = exact_world.expert(name, torch.eye(size))
        self.weight = nn.Parameter(rows - offset)
        self.offset = nn.Parameter(offset)
        self.log_scale = nn.Parameter(scale.log())

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        loc = value @ self.weight + self.offset
        return loc, self.log_scale.exp().expand_as(loc)


def exact_mvae() -> MVAE:
    truth = world(diagonal=True)
    return MVAE(
        [
            Modality(
                m.name,
                m.event_shape,
                m.likelihood,
                encoder=TrainableExpert(truth, m.name),
                decoder=m.decoder,
            )
            for m in truth.modalities()
        ],
        latent_dim=D,
    )


def test_exact_posteriors_leave_no_variance():
    """Log w = log p(x_O) for each draw; sticking the landing, the guide's gradient is zero."""
    vae, (x, observed) = exact_mvae(), batch()
    expected = world(diagonal=True).log_prob({m: x[m].nan_to_num() for m in x}, observed, of=NAMES)
    objective = ImportanceWeightedELBO(1, gradient="stl")
    bounds = objective.row_bounds(vae.model, vae.guide, x, observed)
    close(bounds.detach(), expected, 1e-10)
    loss = objective.differentiable_loss(vae.model, vae.guide, x, observed)
    close(loss.detach(), -expected.sum(), 1e-10)
    for gradient in torch.autograd.grad(loss, list(vae.experts.parameters())):
        assert gradient.abs().max() < 1e-10


def test_the_bound_of_exact_posteriors_is_stationary_on_average():
    """The plain gradient is zero in expectation only, and so is that of every subset."""
    vae, (x, observed) = exact_mvae(), batch()
    objective = SubsetELBO("powerset", elbo=TraceMeanField_ELBO())
    parameters = list(vae.experts.parameters())
    rows = (copies(x), copies(observed))
    gradients = []
    for _ in range(RUNS):
        loss = objective.differentiable_loss(vae.model, vae.guide, *rows) / COPIES
        found = torch.autograd.grad(loss, parameters)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    gradients = torch.stack(gradients)
    error = gradients.std(0) / RUNS**0.5
    assert (error > 0).all()
    assert (gradients.mean(0).abs() < 5 * error).all()


# Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": "pairs"}, "expected given among all, singles, powerset .*found 'pairs'"),
        ({"given": ("all", "double")}, "expected given among all, .*found 'double'"),
        ({"given": ()}, "expected at least one subset, found none"),
        ({"scored": "none"}, "expected scored one of given, observed, found 'none'"),
        ({"weights": "max"}, "expected weights one of sum, mean, found 'max'"),
        ({"given": [()]}, "expected at least one modality in each subset, found an empty one"),
        ({"num_random": -1}, "expected num_random >= 0, found -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SubsetELBO(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": [("a", "d")]}, "SubsetELBO given: unknown modality 'd'; this model has a, b, c"),
        (
            {"modality_weights": {"d": 1.0}},
            "SubsetELBO modality_weights: unknown modality 'd'; this model has a, b, c",
        ),
        ({"beta": -1.0}, "expected beta >= 0, found -1.0 at step 0"),
        ({"beta": lambda step: float("nan")}, "expected beta >= 0, found nan at step 0"),
        ({"beta": "abc"}, "expected beta >= 0, found 'abc' at step 0"),
        (
            {"modality_weights": {"a": -2.0}},
            r"expected modality_weights\['a'\] >= 0, found -2.0 at step 0",
        ),
    ],
)
def test_bad_options_seen_with_the_batch(options, message):
    vae = model()
    with pytest.raises(ValueError, match=message):
        SubsetELBO(**options).loss(vae.model, vae.guide, *batch())


def test_a_foreign_model_is_refused():
    def foreign(x, observed=None):
        pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))

    with pytest.raises(
        ValueError, match="expected the model of a MultimodalVAE, .*found .*foreign"
    ):
        SubsetELBO().loss(foreign, foreign, *batch())
