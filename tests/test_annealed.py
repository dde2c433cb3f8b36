"""Annealed importance sampling against worlds that are known, and bounds that enclose the truth."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from test_cvae import conditional
from test_likelihood import ERRORS, Constant, model, oracle, zero_variance
from torch import Tensor, nn

from mmzoo import Modality
from mmzoo.evaluation import annealed
from mmzoo.evaluation.annealed import annealed_log_likelihood, bidirectional
from mmzoo.evaluation.likelihood import log_likelihood
from mmzoo.evaluation.pair import PyroPair
from mmzoo.exact import LinearGaussianWorld, quadrature_log_prob
from mmzoo.likelihoods import Normal
from mmzoo.models import MFM, MMVAE, MVAE

EXACT = 1e-9
N = 64
# Where every chain is on its own and the weights are even, 64 of them make errors near normal.
RUN: dict[str, Any] = {"num_chains": 64, "num_steps": 10, "leapfrog_steps": 3, "batch_size": N}

X = dict[str, Tensor]


def random_case(seed: int) -> tuple[Any, LinearGaussianWorld, X, X, list[str], list[str]]:
    """A world of random size, a model with imperfect experts, rows with gaps, and a question."""
    rng = np.random.default_rng(seed)
    names = ["a", "b", "c"][: rng.integers(2, 4)]
    sizes = {name: int(rng.integers(1, 5)) for name in names}
    world = LinearGaussianWorld.random(sizes, int(rng.integers(1, 5)), seed=seed)
    vae = model("mvae", world, width=float(rng.uniform(0.7, 1.8)))
    x = world.sample(N, seed=seed)
    masks = torch.from_numpy(rng.random((N, len(names))) < 0.7)
    masks[torch.arange(N), torch.from_numpy(rng.integers(0, len(names), N))] = True
    observed = dict(zip(names, masks.unbind(-1), strict=True))
    x = {n: torch.where(observed[n].unsqueeze(-1), x[n], torch.nan) for n in names}
    order = [str(name) for name in rng.permutation(names)]
    number = int(rng.integers(1, len(names) + 1))
    given = order[number:] if rng.random() < 0.5 else []
    return vae, world, x, observed, order[:number], given


def assert_agrees(found: xr.Dataset, expected: Tensor, *, conditional: bool = False) -> None:
    """Every row within the error that it states, and the mean weight unbiased over all of them."""
    exact = expected.numpy()
    missing = np.isnan(exact)
    np.testing.assert_array_equal(np.isnan(found.log_prob), missing)
    assert found.rows_without == missing.sum()
    error = found.log_prob.values[~missing] - exact[~missing]
    mcse, k = found.mcse.values[~missing], found.pareto_k.values[~missing]
    reliable = k < 0.7
    assert reliable.mean() >= 0.7
    np.testing.assert_array_less(np.abs(error)[reliable], ERRORS * mcse[reliable] + EXACT)
    if not conditional:  # p^ / p has mean one, whatever the spread of log p^
        ratio = np.exp(error)
        spread = math.sqrt(np.square(ratio * mcse).sum()) / len(ratio)
        assert abs(ratio.mean() - 1) < ERRORS * spread + EXACT


def check_world(seed: int, *, rows: int, **run: Any) -> None:
    vae, world, x, observed, of, given = random_case(seed)
    x, observed = ({n: value[:rows] for n, value in each.items()} for each in (x, observed))
    start = ("posterior", "prior")[seed % 2]
    if start == "prior":
        run["num_steps"] *= 3
    found = annealed_log_likelihood(
        vae, x, observed, of=of, given=given, start=start, seed=seed, **run
    )
    exact = world.log_prob(x, observed, of=of, given=given)
    assert_agrees(found, exact, conditional=bool(given))
    assert 0.5 < found.acceptance.mean() < 0.9


# The exact worlds -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(16))
def test_random_worlds_agree(seed: int) -> None:
    check_world(seed, rows=N, **RUN)


@pytest.mark.slow
def test_two_hundred_random_worlds_agree() -> None:
    # Weights so even that the error of 200 x 16 estimates is near normal.
    run = {**RUN, "num_chains": 128, "num_steps": 20}
    for seed in range(100, 300):
        check_world(seed, rows=16, **run)


@pytest.mark.parametrize("name", ["mhvae", "dmvae", "mopoe", "jnf", "nexus"])
def test_latents_of_every_kind_move(name: str) -> None:
    # Several levels, private codes, a mixture of products, flows, a code for each modality.
    world = LinearGaussianWorld.random({"a": 3, "b": 2, "c": 2}, 2, seed=3)
    vae, x = model(name, world, 1.5), world.sample(24, seed=4)
    masks = {"b": torch.arange(24) % 3 > 0}
    run = {**RUN, "num_steps": 4} if name == "jnf" else RUN
    found = annealed_log_likelihood(vae, x, masks, of=["a", "b"], **run)
    assert_agrees(found, oracle(name, world).log_prob(x, masks, of=["a", "b"]))


def test_exact_posterior_gives_log_p_with_every_chain() -> None:
    world, vae = zero_variance()
    x = world.sample(8, seed=1)
    found = annealed_log_likelihood(vae, x, of=["a", "c"], given="b", num_chains=2, num_steps=5)
    exact = world.log_prob(x, of=["a", "c"], given=["b"])
    np.testing.assert_allclose(found.log_prob, exact, rtol=0, atol=EXACT)
    np.testing.assert_allclose(found.mcse, 0, atol=EXACT)
    bounds = bidirectional(vae, num_rows=8, num_chains=2, num_steps=5)
    np.testing.assert_allclose(bounds.gap, 0, atol=EXACT)


@pytest.mark.parametrize("learned", [False, True])
def test_conditional_models_are_annealed_given_their_condition(learned: bool) -> None:
    world, vae, exact = conditional(learned, width=1.6)
    x = world.sample(24, seed=4)
    for start in ("posterior", "prior"):
        found = annealed_log_likelihood(vae, x, of=["a"], given=["b", "c"], start=start, **RUN)
        assert_agrees(found, exact(x, {}, ["a"], ["b", "c"]), conditional=True)


def test_a_fixed_step_size_needs_no_pilot_run() -> None:
    vae, world, x, observed, of, _ = random_case(3)
    calls: list[tuple[int, int]] = []
    found = annealed_log_likelihood(
        vae, x, observed, of=of, step_size=0.2, on_progress=lambda *c: calls.append(c), **RUN
    )
    assert_agrees(found, world.log_prob(x, observed, of=of))
    assert found.attrs["step_size"] == 0.2 and len(calls) == RUN["num_steps"] - 1


def test_one_step_is_importance_sampling() -> None:
    vae, world, x, observed, of, given = random_case(4)
    found = annealed_log_likelihood(
        vae, x, observed, of=of, given=given, num_chains=64, num_steps=1, batch_size=N, seed=5
    )
    plain = log_likelihood(vae, x, observed, of=of, given=given, num_samples=64, seed=5)
    assert found.acceptance.isnull().all()
    exact = world.log_prob(x, observed, of=of, given=given)
    shared = np.isfinite(exact.numpy())
    for each in (found, plain):
        error = np.abs(each.log_prob.values - exact.numpy())[shared]
        np.testing.assert_array_less(error, 7 * each.mcse.values[shared])  # heavier tails than AIS
    ratio = (found.mcse.values / plain.mcse.values)[shared]
    assert abs(np.log(np.median(ratio))) < 0.5


def test_more_steps_make_the_weights_more_even() -> None:
    vae, _, x, observed, of, _ = random_case(5)
    errors = [
        annealed_log_likelihood(
            vae, x, observed, of=of, start="prior", **{**RUN, "num_steps": num}
        ).mcse.mean()
        for num in (4, 64)
    ]
    assert errors[0] > 2 * errors[1]


# What must fail ---------------------------------------------------------------------------------


def _always(log_ratio: Tensor) -> Tensor:
    return torch.ones_like(log_ratio, dtype=torch.bool)


def _nothing(momentum: Tensor) -> Tensor:
    return momentum.new_zeros(momentum.shape[:2])


@pytest.mark.parametrize(("part", "wrong"), [("_accepted", _always), ("_kinetic", _nothing)])
def test_a_wrong_transition_is_found_out(
    part: str, wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        vae, world, x, observed, of, _ = random_case(5)
        run = {**RUN, "start": "prior", "step_size": 0.7}
        found = annealed_log_likelihood(vae, x, observed, of=of, **run)
        assert_agrees(found, world.log_prob(x, observed, of=of))

    run()
    monkeypatch.setattr(annealed, part, wrong)
    with pytest.raises(AssertionError):
        run()


# Shapes that are hard ---------------------------------------------------------------------------


def two_modes(**options: Any) -> tuple[MVAE, X, Tensor]:
    """A prior with two narrow modes, an observation between them, and its exact log p(x)."""
    prior = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])),
        dist.Normal(torch.tensor([[-2.0], [2.0]]), 0.5).to_event(1),
    )
    own = Modality("a", (1,), Normal(scale=1.0), encoder=Constant(0, 3), decoder=nn.Identity())
    vae = MVAE([own], 1, prior=lambda: prior)
    x = {"a": torch.linspace(-3, 3, N).unsqueeze(-1)}
    parts = dist.Normal(torch.tensor([-2.0, 2.0]), math.sqrt(1.25)).log_prob(x["a"])
    return vae, x, (parts + torch.tensor([0.3, 0.7]).log()).logsumexp(-1)


@pytest.mark.parametrize("start", ["posterior", "prior"])
def test_prior_with_two_modes(start: str) -> None:
    vae, x, exact = two_modes()
    assert_agrees(annealed_log_likelihood(vae, x, of="a", start=start, **RUN), exact)


def apart() -> tuple[MMVAE, X, Callable[[list[str]], Tensor]]:
    """A mixture posterior whose components lie apart, of a model with a curved decoder."""

    class Curve(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.square()

    parts = [
        Modality(name, (1,), Normal(scale=0.5), encoder=Constant(loc, 0.3), decoder=Curve())
        for name, loc in (("a", -1.2), ("b", 1.2))
    ]
    vae = MMVAE(parts, 1, family="normal", learned_prior=False)
    rng = torch.Generator().manual_seed(2)
    x = {name: 1.4 + 0.5 * torch.randn(N, 1, generator=rng) for name in ("a", "b")}

    def exact(names: list[str]) -> Tensor:
        def score(z: Tensor) -> Tensor:
            return sum(dist.Normal(z.square(), 0.5).log_prob(x[name][:, 0]) for name in names)

        return quadrature_log_prob(score, 1, 200)

    return vae, x, exact


def test_mixture_posterior_is_stratified_and_annealed_as_a_whole() -> None:
    vae, x, exact = apart()
    found = annealed_log_likelihood(vae, x, of=["a", "b"], **RUN)
    assert_agrees(found, exact(["a", "b"]))


def test_prior_start_is_right_where_the_guide_is_not() -> None:
    # The guide knows one of the two modes of p(z | a) only, and that one badly.
    vae, x, exact = apart()
    truth = exact(["a"]).numpy()
    plain = log_likelihood(vae, x, of="a", num_samples=1000)
    assert (plain.log_prob.values - truth < -ERRORS * plain.mcse.values).mean() > 0.9
    narrow, world, rows, exact_narrow = narrow_guide()
    plain = log_likelihood(narrow, rows, of=list(rows), num_samples=1000)
    assert (plain.pareto_k > 0.7).mean() > 0.8
    assert (plain.log_prob.values - exact_narrow.numpy()).mean() < -0.2
    found = annealed_log_likelihood(narrow, rows, of=list(rows), start="prior", **RUN)
    assert_agrees(found, exact_narrow)
    found = annealed_log_likelihood(vae, x, of="a", start="prior", **RUN)
    assert_agrees(found, exact(["a"]))


def narrow_guide() -> tuple[MVAE, LinearGaussianWorld, X, Tensor]:
    """Experts that claim a quarter of the width that the posterior has."""
    world = LinearGaussianWorld.random({"a": 2, "b": 1}, 3, seed=8)
    x = world.sample(N, seed=9)
    return model("mvae", world, 0.25), world, x, world.log_prob(x, of=["a", "b"])


# Bounds from both sides -------------------------------------------------------------------------


def enclosing(num_steps: int, of: list[str], start: str = "prior") -> tuple[xr.Dataset, np.ndarray]:
    """The bounds on rows of the world, and the truth of the very rows that were drawn."""
    world = LinearGaussianWorld.random({"a": 4, "b": 3}, 3, seed=5)
    vae = model("mvae", world, 1.6)
    seen: list[X] = []
    inner = annealed._Path

    class Spy(inner):  # type: ignore[misc, valid-type]
        def __init__(self, pair: Any, x: X, *rest: Any) -> None:
            seen.append(x)
            super().__init__(pair, x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annealed, "_Path", Spy)
        found = bidirectional(
            vae, of=of, num_rows=200, num_chains=4, num_steps=num_steps, start=start, batch_size=200
        )
    x = {name: torch.cat([each[name] for each in seen]) for name in of}
    return found, world.log_prob(x, of=of).numpy()


@pytest.mark.parametrize("of", [["a", "b"], ["a"]])
def test_bounds_enclose_the_truth_and_close_in(of: list[str]) -> None:
    gaps = []
    for num_steps in (4, 40):
        found, exact = enclosing(num_steps, of)
        for name, sign in (("lower", 1), ("upper", -1)):
            below = sign * (exact - found[name].values)
            assert below.mean() > -ERRORS * below.std(ddof=1) / math.sqrt(len(below))
        gaps.append((float(found["mean"].sel(bound="gap")), float(found.standard_error[2])))
    (before, wide), (after, narrow) = gaps
    assert before > ERRORS * wide and before - after > ERRORS * math.hypot(wide, narrow)
    assert after > -ERRORS * narrow and after < before / 2


def test_bounds_tell_of_a_start_at_the_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    # Were the reversed chains not begun at an exact draw, the upper bound would be none.
    def forgetful(path: Any, steps: Any, values: Any, tell: Any) -> Any:
        shuffled = {name: value.flip(0) for name, value in values.items()}
        return right(path, steps, shuffled, tell)

    right = annealed._return
    found, exact = enclosing(12, ["a", "b"])
    monkeypatch.setattr(annealed, "_return", forgetful)
    wrong, _ = enclosing(12, ["a", "b"])
    np.testing.assert_array_equal(wrong.lower, found.lower)
    below = wrong.upper.values - exact
    assert below.mean() < -ERRORS * below.std(ddof=1) / math.sqrt(len(below))


# Pairs of one's own -----------------------------------------------------------------------------


def student(*, latent: str = "gamma") -> PyroPair:
    """A precision with a Gamma law: x is Student-t."""

    def model(x: X, observed: X) -> None:
        with pyro.plate("data", len(x["a"]), dim=-1):
            law = dist.Gamma(3.0, 2.0) if latent == "gamma" else dist.Poisson(2.0)
            tau = pyro.sample("tau", law)
            fn = dist.Normal(torch.zeros(2), (tau + 1e-9).rsqrt().unsqueeze(-1)).to_event(1)
            pyro.sample("a", fn, obs=x["a"])

    def guide(x: X, observed: X) -> None:
        with pyro.plate("data", len(x["a"]), dim=-1):
            law = dist.LogNormal(0.0, 1.0) if latent == "gamma" else dist.Poisson(2.0)
            pyro.sample("tau", law)

    return PyroPair(model, guide, [Modality("a", (2,), Normal(scale=1.0))])


@pytest.mark.parametrize("start", ["posterior", "prior"])
def test_bounded_latents_of_an_own_pair(start: str) -> None:
    x = {"a": 2 * torch.randn(N, 2)}
    found = annealed_log_likelihood(student(), x, of="a", start=start, **RUN)
    scale = math.sqrt(2.0 / 3.0)  # Gamma(a, b) precision: t with 2 a degrees, scale sqrt(b / a)
    exact = dist.MultivariateStudentT(6.0, torch.zeros(2), scale * torch.eye(2)).log_prob(x["a"])
    assert_agrees(found, exact)
    bounds = bidirectional(student(), start=start, num_steps=20, num_rows=60)
    gap = bounds.sel(bound="gap")
    assert abs(gap["mean"]) < 0.1 + ERRORS * gap.standard_error


def test_guide_of_ones_own() -> None:
    world = LinearGaussianWorld.random({"a": 3, "b": 2}, 2, seed=3)
    vae, x = model("mvae", world), world.sample(N, seed=1)

    def guide(x: X, observed: X | None = None) -> None:
        with pyro.plate("data", len(next(iter(x.values()))), dim=-1):
            pyro.sample("z", dist.StudentT(5.0, torch.zeros(2), 1.5).to_event(1))

    found = annealed_log_likelihood(vae, x, of="a", guide=guide, **RUN)
    assert_agrees(found, world.log_prob(x, of=["a"]))
    assert found.start == "guide"


# Manners ----------------------------------------------------------------------------------------


def test_same_seed_same_numbers_and_the_world_as_it_was() -> None:
    vae, _, x, observed, of, given = random_case(6)
    vae.train()
    short = {**RUN, "num_steps": 4}
    runs: list[Callable[[int], xr.Dataset]] = [
        lambda seed: annealed_log_likelihood(
            vae, x, observed, of=of, given=given, seed=seed, **short
        ),
        lambda seed: bidirectional(vae, num_rows=8, num_steps=4, seed=seed),
    ]
    for run in runs:
        state = torch.get_rng_state()
        with torch.no_grad():
            first = run(3)
        assert torch.equal(state, torch.get_rng_state())
        xr.testing.assert_identical(first, run(3))
        assert not first.equals(run(4))
    assert vae.training and all(p.grad is None for p in vae.parameters())
    assert not list(pyro.get_param_store().keys())


def test_rows_do_not_know_of_each_other_or_of_the_batch() -> None:
    vae, world, x, observed, of, _ = random_case(7)
    found = annealed_log_likelihood(vae, x, observed, of=of, **{**RUN, "batch_size": 10})
    assert_agrees(found, world.log_prob(x, observed, of=of))


def test_progress_is_told_to_the_end() -> None:
    vae, _, x, observed, of, _ = random_case(0)
    told: list[tuple[int, int]] = []
    short = {**RUN, "num_steps": 4, "batch_size": 40, "on_progress": lambda *c: told.append(c)}
    annealed_log_likelihood(vae, x, observed, of=of, **short)
    total = told[-1][1]
    assert told == [(done, total) for done in range(1, total + 1)]
    told.clear()
    bidirectional(vae, num_rows=50, **short)
    total = told[-1][1]
    assert told == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": "d"}, "annealed_log_likelihood of: unknown modality 'd'"),
        ({"of": []}, "expected disjoint sets and a non-empty 'of'"),
        ({"of": "a", "given": "a"}, "expected disjoint sets"),
        ({"start": "guide"}, "expected start one of posterior, prior, found 'guide'"),
        ({"schedule": "cubic"}, "expected schedule one of sigmoid, linear, found 'cubic'"),
        ({"num_chains": 1}, "expected num_chains of at least 2, found 1"),
        ({"num_steps": 0}, "expected num_steps of at least 1, found 0"),
        ({"leapfrog_steps": 0}, "expected leapfrog_steps of at least 1, found 0"),
        ({"batch_size": 0}, "expected batch_size of at least 1, found 0"),
        ({"step_size": 0.0}, "expected a positive step_size, found 0.0"),
        ({"start": "prior", "guide": print}, "expected no guide with start='prior'"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    world, vae = zero_variance()
    with pytest.raises(ValueError, match=message):
        annealed_log_likelihood(vae, world.sample(3, seed=0), **{"of": "a", **change})


def test_bad_rows_and_models_are_refused() -> None:
    world, vae = zero_variance()
    x = world.sample(3, seed=0)
    nothing = {name: torch.tensor([True, False, True]) for name in x}
    with pytest.raises(ValueError, match="something observed in every row, found nothing in row 1"):
        annealed_log_likelihood(vae, x, nothing, of="a")
    with pytest.raises(ValueError, match=r"bidirectional: expected num_rows of at least 2, found"):
        bidirectional(vae, num_rows=1)
    with pytest.raises(ValueError, match="bidirectional of: unknown modality 'd'"):
        bidirectional(vae, of="d")
    mfm = MFM([Modality("a", (2,)), Modality("b", (2,))], 2)
    with pytest.raises(ValueError, match="log p\\(a, b\\) is not defined; the codes of MFM"):
        bidirectional(mfm)
    mixture = apart()[0]
    with pytest.raises(ValueError, match="at least one draw for each of its 2 components"):
        mixture.posterior(apart()[1]).stratify(1)
    with pytest.raises(ValueError, match="'tau': expected a continuous latent, .* found Poisson"):
        annealed_log_likelihood(student(latent="poisson"), {"a": torch.zeros(2, 2)}, of="a")
