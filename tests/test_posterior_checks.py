"""Posterior checks against worlds where every gap, divergence and gradient has a closed form."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from mmzoo import Modality
from mmzoo.combine import gaussian_kl, squared_wasserstein
from mmzoo.distributions import Mixture
from mmzoo.evaluation.amortization import amortization_gap
from mmzoo.evaluation.pair import PyroPair
from mmzoo.evaluation.posterior import (
    active_units,
    contraction,
    kl_per_dimension,
    modality_shares,
    posterior_agreement,
    sliced_wasserstein,
)
from mmzoo.evaluation.reference import nuts_posterior
from mmzoo.evaluation.scored import Shown
from mmzoo.exact import LinearGaussianWorld
from mmzoo.likelihoods import Normal
from mmzoo.models import MODELS, MVAE, LinearVAE

SIZES = {"a": 3, "b": 2, "c": 2}
NAMES = list(SIZES)
N, D = 8, 2
ERRORS = 5.0


def world(**options) -> LinearGaussianWorld:
    return LinearGaussianWorld.random(SIZES, D, seed=3, **options)


def tilted() -> LinearGaussianWorld:
    """Latents that are strongly correlated once something is observed."""
    w = world()
    weights = {name: 1.0 + 0.5 * weight for name, weight in w.weights.items()}
    return LinearGaussianWorld(weights, w.biases, w.scales)


def rows(w: LinearGaussianWorld, num: int = N) -> tuple[dict, dict]:
    """Row i lacks the modalities whose bit is in i, row 7 all of them; holes are NaN."""
    pattern = torch.arange(num)
    observed = {name: (pattern >> m) % 2 == 0 for m, name in enumerate(SIZES)}
    x = w.sample(num, seed=4)
    return {n: v.masked_fill(~observed[n][:, None], math.nan) for n, v in x.items()}, observed


def only(observed: dict, names) -> dict:
    return {name: mask & (name in names) for name, mask in observed.items()}


def off(w, scale=1.0, shift=0.0, best=False):
    """Diagonal guides beside the exact posterior; ``best``: scale 1 / sqrt of the precision."""

    def guide(x, observed=None, **kwargs):
        loc, deviation = moments(w, x, observed, best)
        with pyro.plate("data", len(loc), dim=-1):
            loc, deviation = loc + shift * deviation, scale * deviation
            return pyro.sample("z", dist.Normal(loc, deviation).to_event(1))

    return guide


def moments(w, x, observed=None, best=False):
    q = w.posterior(x, observed)
    return q.mean, q.precision_matrix.diagonal(dim1=-2, dim2=-1) ** -0.5 if best else q.stddev


def seen(observed, names=NAMES):
    return torch.stack([observed[name] for name in names]).any(0)


# Amortisation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, ["a", "b"]])
def test_gaps_are_divergences_from_the_exact_posterior(given) -> None:
    w = tilted()
    x, observed = rows(w)
    wrong = {"scale": 1.3, "shift": 0.5, "best": True}
    options = {"given": given, "num_steps": 150, "num_samples": 900, "guide": off(w, **wrong)}
    found = amortization_gap(LinearVAE(w.modalities(), D), x, observed, **options)
    shown = only(observed, given or NAMES)
    loc, deviation = moments(w, x, shown, best=True)
    bad = w.kl((loc + 0.5 * deviation, 1.3 * deviation), x, shown)
    best = w.kl((loc, deviation), x, shown)
    kept = seen(shown)
    assert best[kept].max() > 0.1 and (bad - best)[kept].min() > 0.1  # gaps that can be told
    for name, exact in {
        "amortization_gap": bad - best,
        "approximation_gap": best,
        "inference_gap": bad,
        "log_prob": w.log_prob(x, shown, of=given or NAMES),
    }.items():
        value = torch.tensor(found[name].values)[kept]
        error = torch.tensor(found[f"{name}_error"].values)[kept]
        slack = torch.tensor(found["remaining"].values)[kept] + 1e-3
        assert ((value - exact[kept]).abs() < ERRORS * error + slack).all(), name
        assert (error < 0.15).all(), name
    assert found["converged"].values[kept].all()
    assert not found["converged"].values[~kept].any()
    assert torch.tensor(found["elbo"].values).isnan().equal(~kept)


@pytest.mark.slow
def test_gaps_of_many_worlds() -> None:
    """200 worlds of one to three modalities and latents, every pattern of missing modalities."""
    off_by, sizes = [], []
    for seed in range(200):
        names, dim = NAMES[: 1 + seed % 3], 1 + seed // 3 % 3
        w = LinearGaussianWorld.random({n: SIZES[n] for n in names}, dim, seed=seed)
        pattern = torch.arange(2 ** len(names) - 1)
        observed = {name: (pattern >> m) % 2 == 0 for m, name in enumerate(names)}
        x = w.sample(len(pattern), seed=seed)
        vae = LinearVAE(w.modalities(), dim)
        guide = off(w, 1.2, 0.3, best=True)
        found = amortization_gap(vae, x, observed, num_steps=100, guide=guide, seed=seed)
        loc, deviation = moments(w, x, observed, best=True)
        bad = w.kl((loc + 0.3 * deviation, 1.2 * deviation), x, observed)
        best = w.kl((loc, deviation), x, observed)
        for name, value in {
            "amortization_gap": bad - best,
            "approximation_gap": best,
            "log_prob": w.log_prob(x, observed, of=names),
        }.items():
            slack = found["remaining"].values + 1e-3 if "gap" in name else 0.0
            error = found[f"{name}_error"].values
            off_by += list(abs(found[name].values - value.numpy()) / (error + slack / ERRORS))
            sizes += list(error)
    assert max(off_by) < ERRORS
    assert np.mean(off_by) > 0.3  # errors are not too wide, either: 0.8 if nothing is added to them
    assert np.median(sizes) < 0.1


def test_search_that_stops_early_says_so() -> None:
    w = world()
    x = w.sample(4, seed=4)
    options = {"num_samples": 90, "guide": off(w, shift=2.0)}
    vae = LinearVAE(w.modalities(), D)
    short = amortization_gap(vae, x, num_steps=3, **options)
    assert not short["converged"].any()
    # the slope tells how much: a mean that is off by t standard deviations costs t^2 / 2
    exact = torch.tensor(amortization_gap(vae, x, num_steps=200, **options)["best_elbo"].values)
    lost = exact - torch.tensor(short["best_elbo"].values)
    assert (torch.tensor(short["remaining"].values) / lost - 1).abs().max() < 0.3


def test_exact_guide_has_no_gap() -> None:
    w = world(diagonal=True)
    x, observed = rows(w)
    vae = MVAE(w.modalities(encoder="exact"), latent_dim=D)
    found = amortization_gap(vae, x, observed, num_steps=100, num_samples=300)
    kept = seen(observed)
    assert abs(found["elbo"].values - w.log_prob(x, observed, of=NAMES).numpy())[kept].max() < 1e-10
    gap, error = found["amortization_gap"], found["amortization_gap_error"]
    assert (abs(gap) < ERRORS * error + found["remaining"] + 1e-3).values[kept].all()


def test_mixture_can_beat_every_gaussian() -> None:
    vae = MODELS["mmvae"]([Modality(n, (2,), Normal(0.3)) for n in "ab"], 2, family="laplace")
    x = vae.generate(num_rows=3)
    found = amortization_gap(vae, x, num_steps=30, num_samples=60)
    assert found.attrs["family"] == "Laplace"
    assert (found["best_elbo"] < found["log_prob"] + 5 * found["log_prob_error"] + 1e-6).all()


def own_pair() -> PyroPair:
    """Values z + e with unit noise: z | x is N(x / 2, 1 / 2)."""

    def model(x, observed):
        with pyro.plate("data", len(x["x"]), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x["x"])

    def guide(x, observed):
        with pyro.plate("data", len(x["x"]), dim=-1):
            pyro.sample("z", dist.Normal(x["x"] / 2 + 0.5, math.sqrt(0.5)).to_event(1))

    return PyroPair(model, guide, [Modality("x", (2,), Normal(1.0))])


def test_gap_of_a_pair_of_ones_own() -> None:
    x = {"x": torch.randn(4, 2)}
    found = amortization_gap(own_pair(), x, num_steps=200, num_samples=900)
    gap, error = found["amortization_gap"].values, found["amortization_gap_error"].values
    assert (abs(gap - 0.5) < ERRORS * error + 2e-3).all()  # twice 0.5^2 / (2 * 0.5)
    gap, error = found["approximation_gap"].values, found["approximation_gap_error"].values
    assert (abs(gap) < ERRORS * error + 2e-3).all()


def test_gap_leaves_the_world_as_it_was() -> None:
    w = world(diagonal=True)
    vae = MVAE(w.modalities(), latent_dim=D).train()
    before = torch.random.get_rng_state()
    calls, options = [], {"num_steps": 3, "num_samples": 9, "seed": 7}
    progress = {"on_progress": lambda *done: calls.append(done)}
    with torch.no_grad():
        one = amortization_gap(vae, w.sample(70, seed=0), **options, **progress)
    assert one.identical(amortization_gap(vae, w.sample(70, seed=0), **options))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert vae.training and not pyro.get_param_store().keys()
    assert all(p.grad is None for p in vae.parameters())
    assert calls == [(64, 70), (70, 70)]


def test_gap_of_bad_arguments() -> None:
    w = world()
    vae = LinearVAE(w.modalities(), D)
    x = w.sample(2, seed=0)
    with pytest.raises(ValueError, match="expected num_steps >= 1, num_samples >= 3 and num_par"):
        amortization_gap(vae, x, num_samples=2)
    with pytest.raises(ValueError, match="amortization_gap given: unknown modality 'd'"):
        amortization_gap(vae, x, given="d")

    def model(x, observed):
        with pyro.plate("data", len(x["x"]), dim=-1):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x["x"])

    def guide(x, observed):
        with pyro.plate("data", len(x["x"]), dim=-1):
            pyro.sample("z", dist.LogNormal(x["x"], 1.0).to_event(1))

    pair = PyroPair(model, guide, [Modality("x", (2,), Normal(1.0))])
    with pytest.raises(ValueError, match="expected latents on the whole real line, found densit"):
        amortization_gap(pair, {"x": torch.zeros(2, 2)})


# Contraction, activity, divergence ----------------------------------------------------------------

SUBSETS = ["a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"]


def complete(observed: dict, subset: str) -> torch.Tensor:
    return torch.stack([observed[name] for name in subset.split("+")]).all(0)


def exact(w, x, observed, subset: str):
    """The exact posterior in the rows that have all of a subset."""
    kept = complete(observed, subset)
    return w.posterior({name: x[name][kept] for name in subset.split("+")})


def exact_pair(w, **options) -> PyroPair:
    """The world as a model and guide of one's own, the guide written as a Gaussian of each row."""

    def model(x, observed):
        num = len(next(iter(x.values())))
        with pyro.plate("data", num, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            for name in SIZES:
                loc = z @ w.weights[name].mT + w.biases[name]
                pyro.sample(name, dist.Normal(loc, w.scales[name]).to_event(1), obs=x[name])

    parts = [Modality(name, (size,), Normal(1.0)) for name, size in SIZES.items()]
    return PyroPair(model, off(w, **options), parts)


PAIRS = {
    "linear": lambda w: LinearVAE(w.modalities(), D),
    "mvae": lambda w: MVAE(w.modalities(encoder="exact"), latent_dim=D),
    "own": exact_pair,
}


@pytest.mark.parametrize("kind", PAIRS)
def test_contraction_activity_and_divergence_are_exact(kind) -> None:
    w = world(diagonal=kind != "linear")
    x, observed = rows(w, 40)
    pair = PAIRS[kind](w)
    narrow = contraction(pair, x, observed)
    active = active_units(pair, x, observed, threshold=0.3)
    cut = kl_per_dimension(pair, x, observed)["kl"].median().item()
    kl = kl_per_dimension(pair, x, observed, threshold=cut)
    assert narrow["subset"].values.tolist() == SUBSETS
    assert narrow["latent"].values.tolist() == ["z[0]", "z[1]"]
    for subset in SUBSETS:
        q = exact(w, x, observed, subset)
        np.testing.assert_allclose(narrow["contraction"].sel(subset=subset), 1 - q.variance[0])
        assert narrow["standard_error"].sel(subset=subset).max() < 1e-12  # the same in all rows
        variance = q.mean.var(0)
        np.testing.assert_allclose(active["variance"].sel(subset=subset), variance)
        np.testing.assert_array_equal(active["active"].sel(subset=subset), variance > 0.3)
        each = 0.5 * (q.variance + q.mean.square() - 1 - q.variance.log())
        np.testing.assert_allclose(kl["kl"].sel(subset=subset), each.mean(0), atol=1e-12)
        error = each.std(0) / len(each) ** 0.5
        np.testing.assert_allclose(kl["standard_error"].sel(subset=subset), error, atol=1e-12)
        np.testing.assert_array_equal(kl["collapsed"].sel(subset=subset), each.mean(0) < cut)
        prior = dist.MultivariateNormal(torch.zeros(D), torch.eye(D))
        total = torch.distributions.kl_divergence(q, prior).mean()
        np.testing.assert_allclose(kl["total"].sel(subset=subset), total, atol=1e-12)
        for found in (narrow, active, kl):
            assert found["num_rows"].sel(subset=subset) == complete(observed, subset).sum()
    assert kl["mcse"].max() < 1e-12
    assert 0 < kl["collapsed_share"].mean() < 1 and active["num_active"].max() > 0
    for size in (1, 2, 3):  # average over what each row has of that size
        some = [s for s in SUBSETS if s.count("+") == size - 1]
        has = torch.stack([complete(observed, s) for s in some]).double()
        each = torch.stack([1 - exact(w, x, observed, s).variance[0] for s in some])
        by_row = (has.T @ each)[has.any(0)] / has.sum(0)[has.any(0), None]
        np.testing.assert_allclose(narrow["size_contraction"].sel(size=size), by_row.mean(0))


def test_draws_where_there_is_no_closed_form() -> None:
    """Two sites, the second given the first: z_0 ~ N(m, s), z_1 | z_0 ~ N(c z_0, t)."""
    m, s, c, t = torch.tensor([0.5, -1.0, 2.0]).unsqueeze(-1), 0.5, 0.8, 0.3

    def model(x, observed):
        with pyro.plate("data", len(x["x"]), dim=-1):
            first = pyro.sample("z_0", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z = pyro.sample("z_1", dist.Normal(0.5 * first, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x["x"])

    def guide(x, observed):
        with pyro.plate("data", len(x["x"]), dim=-1):
            first = pyro.sample("z_0", dist.Normal(x["x"], s).to_event(1))
            pyro.sample("z_1", dist.Normal(c * first, t).to_event(1))

    pair = PyroPair(model, guide, [Modality("x", (1,), Normal(1.0))])
    x, draws = {"x": m}, 4000
    kl = kl_per_dimension(pair, x, num_draws=draws)
    unit = torch.ones(3, 1)
    first = gaussian_kl(m, s * unit, 0 * unit, unit).mean().item()
    np.testing.assert_allclose(kl["kl"][0, 0], first)
    shift = (c - 0.5) ** 2 * (m.square() + s**2)
    second = (0.5 * (t**2 + shift - 1) - math.log(t)).mean().item()
    assert 0 < kl["mcse"][0, 1] < 0.01
    assert abs(kl["kl"][0, 1] - second) < ERRORS * kl["mcse"][0, 1]
    assert abs(kl["total"][0] - first - second) < ERRORS * kl["total_mcse"][0]
    narrow = contraction(pair, x, num_draws=draws)
    exact_share = 1 - np.array([s**2, c**2 * s**2 + t**2]) / np.array([1.0, 1.25])
    off_by = abs(narrow["contraction"].values[0] - exact_share)
    # of a variance from 4000 draws in 3 rows, and of the prior's from 10,000
    assert (off_by < ERRORS * (1 - exact_share) * math.sqrt(2 / 12_000 + 2 / 10_000)).all()
    noisy = active_units(pair, x, num_draws=50, seed=3)
    spread = float(m.var())
    noise = 4 * spread * s**2 / 50 / 3 * 4  # cross term of signal and noise dominates
    assert abs(noisy["variance"][0, 0] - spread) < ERRORS * math.sqrt(noise)


def test_noise_of_drawn_means_is_taken_off() -> None:
    """Posteriors that are all the same: no variance, although means of ten draws scatter."""

    def model(x, observed):
        with pyro.plate("data", len(x["x"]), dim=-1):
            first = pyro.sample("u", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(first, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x["x"])

    def guide(x, observed):
        with pyro.plate("data", len(x["x"]), dim=-1):
            for name in ("u", "z"):
                pyro.sample(name, dist.Normal(torch.zeros(1), 1.0).to_event(1))

    pair = PyroPair(model, guide, [Modality("x", (1,), Normal(1.0))])
    found = active_units(pair, {"x": torch.randn(2000, 1)}, num_draws=10)
    assert (abs(found["variance"]) < ERRORS * found["standard_error"]).all()
    assert (found["standard_error"] < 0.01).all()  # the scatter of the means is 0.1
    assert not found["active"].any()


def test_marginals_of_mixtures() -> None:
    """Modalities that agree make a mixture of equal components: the divergence is a Gaussian's."""
    parts = [Modality(name, (2,), Normal(1.0)) for name in "ab"]
    vae = MODELS["mmvae"](parts, 2, family="normal", learned_prior=False)
    loc, scale = torch.tensor([0.7, 0.0]), torch.tensor([0.5, 1.0])
    vae.combine = lambda experts, mask: Mixture(
        torch.zeros(len(experts.loc), 2), loc.expand(2, 2), scale.expand(2, 2)
    )
    x = vae.generate(num_rows=5)
    found = kl_per_dimension(vae, x, given=[["a", "b"]], num_draws=1000)
    each = gaussian_kl(loc[:, None], scale[:, None], torch.zeros(2, 1), torch.ones(2, 1)).numpy()
    assert (abs(found["kl"][0] - each) < ERRORS * found["mcse"][0] + 1e-12).all()
    assert abs(found["total"][0] - each.sum()) < ERRORS * found["total_mcse"][0]
    assert found["collapsed"][0].values.tolist() == [False, True]
    assert found["collapsed_share"][0] == 0.5
    narrow = contraction(vae, x, given=[["a", "b"]])
    np.testing.assert_allclose(narrow["contraction"][0], 1 - scale**2)


def test_flow_has_no_marginals() -> None:
    parts = [Modality(name, (2,), Normal(1.0)) for name in "ab"]
    vae = MVAE(parts, 2, prior="flow")
    found = kl_per_dimension(vae, vae.generate(num_rows=5), num_draws=50)
    assert found["kl"].isnull().all() and found["total"].notnull().all()
    assert not found["collapsed"].any()
    assert found["collapsed_share"].isnull().all()  # nothing is known, not: nothing collapsed


def chosen() -> PyroPair:
    """A class and a positive size behind one number; the guide ignores what it sees."""

    def latents(logits: list[float], rate: float, beta: float) -> tuple:
        c = pyro.sample("c", dist.Categorical(logits=torch.tensor(logits)))
        s = pyro.sample("s", dist.Gamma(2.0, rate))
        u = pyro.sample("u", dist.Beta(2.0, beta))
        return c, s, u

    def model(x, observed=None):
        with pyro.plate("data", len(x["a"]), dim=-1):
            c, s, u = latents([0.0, 0.0], 1.0, 2.0)
            pyro.sample("a", dist.Normal(c * s + u, 1.0), obs=x["a"])

    def guide(x, observed=None):
        with pyro.plate("data", len(x["a"]), dim=-1):
            latents([0.0, math.log(3.0)], 2.0, 3.0)

    return PyroPair(model, guide, [Modality("a", (), Normal(1.0))])


def test_divergence_of_classes_and_of_bounded_latents_is_exact() -> None:
    found = kl_per_dimension(chosen(), {"a": torch.randn(5)})
    expected = [
        0.25 * math.log(0.5) + 0.75 * math.log(1.5),
        2 * math.log(2.0) - 1.0,  # Gamma of one shape: a log(r_q / r_p) - a (1 - r_p / r_q)
        math.log(2.0) - 1 / 3 - 1 / 4,  # log B(2, 2) / B(2, 3) + psi(3) - psi(5)
    ]
    assert found["latent"].values.tolist() == ["c", "s", "u"]
    np.testing.assert_allclose(found["kl"][0], expected, rtol=1e-10)
    np.testing.assert_allclose(found["total"][0], sum(expected), rtol=1e-10)
    assert found["collapsed_share"] == 0.0


def test_what_needs_a_gradient_refuses_classes() -> None:
    pair, x = chosen(), {"a": torch.randn(5)}
    for check in (modality_shares, amortization_gap, partial(nuts_posterior, row=0)):
        name = getattr(check, "func", check).__name__
        message = f"{name}: expected continuous latents, .* found discrete c; sum them out"
        with pytest.raises(ValueError, match=message):
            check(pair, x)


def test_every_latent_and_conditional_models() -> None:
    parts = [Modality("a", (3,), Normal(1.0)), Modality("b", (2,), Normal(1.0))]
    vae = MODELS["dmvae"](parts, 2, private_dim={"a": 1})
    x = vae.generate(num_rows=6)
    kl = kl_per_dimension(vae, x)
    assert kl["latent"].values.tolist() == ["z[0]", "z[1]", "w_a[0]"]
    assert abs(kl["kl"].sel(subset="b", latent="w_a[0]")) < 1e-12  # b knows nothing of it
    assert abs(contraction(vae, x)["contraction"].sel(subset="b", latent="w_a[0]")) < 1e-12
    cvae = MODELS["cvae"](parts, 2, condition="b", hidden=4, conditional_prior=True)
    narrow = contraction(cvae, x)
    assert narrow["subset"].values.tolist() == ["b", "a+b"]
    assert abs(narrow["contraction"].sel(subset="b")).max() < 1e-6  # that is the prior


def test_checks_of_bad_arguments() -> None:
    w = world(diagonal=True)
    vae = PAIRS["mvae"](w)
    x = w.sample(3, seed=0)
    with pytest.raises(ValueError, match="num_draws: expected at least 2 for a variance, found 1"):
        contraction(vae, x, num_draws=1)
    with pytest.raises(ValueError, match="active_units given: unknown modality 'd'"):
        active_units(vae, x, given=["d"])
    with pytest.raises(ValueError, match="expected rows that have all of one of c, found none"):
        kl_per_dimension(vae, x, {"c": torch.zeros(3, dtype=torch.bool)}, given=["c"])
    with pytest.raises(ValueError, match="expected at least two modalities, found x"):
        posterior_agreement(own_pair(), {"x": torch.zeros(2, 2)})
    joint = MODELS["jointvae"](w.modalities(), D, hidden=4)
    with pytest.raises(ValueError, match="no posterior given a; it has a posterior of complete"):
        posterior_agreement(joint, x)


# Modalities ---------------------------------------------------------------------------------------


def test_shares_are_those_of_the_quadratic_form() -> None:
    """With z Gaussian, l_m is a quadratic form, its gradient linear: both have known moments."""
    w = world(diagonal=True)
    x, observed = rows(w, 32)
    runs = [modality_shares(exact_pair(w), x, observed, num_draws=200, seed=i) for i in range(6)]
    q = w.posterior(x, observed)
    for name, weight in w.weights.items():
        kept = observed[name]
        gram = weight.mT @ weight / w.scales[name][0] ** 2
        residual = (x[name] - w.biases[name] - q.mean @ weight.mT) / w.scales[name] ** 2
        slope, cov = (residual @ weight)[kept], q.covariance_matrix[kept]
        spread = gram @ cov
        trace = spread.diagonal(dim1=-2, dim2=-1).sum(-1)
        variance = (slope.unsqueeze(-2) @ cov @ slope.unsqueeze(-1)).squeeze()
        variance = variance + 0.5 * (spread @ spread).diagonal(dim1=-2, dim2=-1).sum(-1)
        gradient = slope.square().sum(-1) + (gram @ spread.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
        moments = q.mean, q.stddev
        likelihood = w.expected_log_likelihood(name, *moments, x[name].nan_to_num())[kept]
        for kind, value in {
            "likelihood": likelihood.mean(),
            "variance": variance.mean(),
            "latent_gradient": gradient.mean().sqrt(),
        }.items():
            found = np.array([float(run[kind].sel(modality=name)) for run in runs])
            error = found.std(ddof=1) / math.sqrt(len(runs))
            assert abs(found.mean() - float(value)) < 2 * ERRORS * error, (name, kind)  # t, 5 d.f.
            assert error < 0.05 * abs(value)
        assert (trace > 0).all()
        assert runs[0]["num_rows"].sel(modality=name) == kept.sum()
    for kind in ("likelihood", "variance", "latent_gradient"):
        np.testing.assert_allclose(runs[0][f"{kind}_share"].sum(), 1.0)
    assert runs[0]["decoder_gradient"].isnull().all()  # of a pair of one's own


def test_parameter_gradients_are_those_of_the_mean_likelihood() -> None:
    w = world(diagonal=True)
    x, observed = rows(w, 16)
    parts = [Modality(name, (size,), Normal(0.7)) for name, size in SIZES.items()]
    vae = MVAE(parts, D)
    found = modality_shares(vae, x, observed, num_draws=4, guide=off(w, scale=1e-9))
    z = w.posterior(x, observed).mean  # draws without spread
    for name in SIZES:
        kept = observed[name]
        term = vae.likelihood(name, z[kept]).log_prob(x[name][kept]).mean()
        gradients = torch.autograd.grad(term, vae.generative.parameters(), allow_unused=True)
        norm = sum(g.square().sum() for g in gradients if g is not None) ** 0.5
        np.testing.assert_allclose(
            found["decoder_gradient"].sel(modality=name), norm.item(), rtol=1e-6
        )
    assert found["encoder_gradient"].isnull().all()  # this guide has no parameters
    own = modality_shares(vae, x, observed, num_draws=4)
    assert (own["encoder_gradient"] > 0).all()
    np.testing.assert_allclose(own["encoder_gradient_share"].sum(), 1.0)
    assert all(p.grad is None for p in vae.parameters())


def test_a_modality_on_a_larger_scale_dominates() -> None:
    parts = [Modality("a", (2,), Normal(1.0)), Modality("b", (2,), Normal(0.1))]
    for name in ("mmvae", "mopoe", "mvae"):
        vae = MODELS[name](parts, 2)
        x = vae.generate(num_rows=40)
        found = modality_shares(vae, x, num_draws=12)
        for kind in ("variance", "latent_gradient", "decoder_gradient", "encoder_gradient"):
            assert found[f"{kind}_share"].sel(modality="b") > 0.8, (name, kind)


@pytest.mark.parametrize("diagonal", [True, False])
def test_agreement_is_in_closed_form(diagonal) -> None:
    w = world(diagonal=diagonal)
    x, observed = rows(w, 16)
    pair = PAIRS["mvae" if diagonal else "linear"](w)
    found = posterior_agreement(pair, x, observed)
    for one in NAMES:
        for other in NAMES:
            cell = found.sel(modality=one, other=other)
            kept = observed[one] & observed[other]
            assert cell["num_rows"] == kept.sum()
            if one == other:
                assert cell["wasserstein"] == 0 and cell["overlap"] == 1
                continue
            q, p = (w.posterior({n: x[n][kept]}) for n in (one, other))
            kl = torch.distributions.kl_divergence
            np.testing.assert_allclose(cell["symmetric_kl"], (kl(q, p) + kl(p, q)).mean())
            z = q.sample((20_000,))
            ratio = (0.5 * (p.log_prob(z) - q.log_prob(z))).exp()
            error = ratio.mean(1).std() / math.sqrt(len(z))
            assert abs(cell["overlap"].item() - ratio.mean()) < ERRORS * error
            each = (ratio.mean(0) ** (1 / D)).mean()
            assert abs(cell["overlap_per_dimension"].item() - each) < ERRORS * error
            if diagonal:
                distance = squared_wasserstein(q.mean, q.stddev, p.mean, p.stddev)
            else:
                distance = torch.stack(
                    [
                        bures(*each)
                        for each in zip(q.mean, q.covariance_matrix, p.mean, p.covariance_matrix)
                    ]
                )
            np.testing.assert_allclose(cell["wasserstein"], distance.mean(), rtol=1e-6)
    np.testing.assert_array_equal(found["overlap"], found["overlap"].T)


def bures(mean1, cov1, mean2, cov2):
    """By the eigenvalues of the product, which are those of the symmetric form."""
    cross = torch.linalg.eigvals(cov1 @ cov2).real.clamp(min=0).sqrt().sum()
    return (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross


def test_agreement_from_draws_is_that_of_the_closed_form() -> None:
    w = world(diagonal=True)
    x = w.sample(6, seed=4)
    closed = posterior_agreement(PAIRS["mvae"](w), x)
    own = posterior_agreement(exact_pair(w), x)  # recognised as Gaussian
    for kind in ("wasserstein", "symmetric_kl", "overlap"):
        np.testing.assert_allclose(own[kind], closed[kind], rtol=1e-9, atol=1e-12)
    from mmzoo.evaluation import posterior

    q, p = (w.posterior({name: x[name]}) for name in ("a", "b"))
    parts = (q.mean, q.stddev, p.mean, p.stddev)
    runs = torch.stack([torch.stack(posterior._from_draws(q, p, 400)) for _ in range(30)])
    mean, error = runs.mean(0), runs.std(0) / math.sqrt(30)
    kl = torch.distributions.kl_divergence
    exact_values = torch.stack([kl(q, p) + kl(p, q), posterior._log_bhattacharyya(*parts)])
    # Jensen's bias of the logarithm of a mean of 800 is below its variance.
    assert ((mean[1:] - exact_values).abs() < ERRORS * error[1:] + runs[:, 1:].var(0)).all()
    shifted = q.sample((400,)) + torch.tensor([3.0, 4.0])
    sliced = sliced_wasserstein(shifted - torch.tensor([3.0, 4.0]), shifted)
    # D times the mean of the squared projections of the shift on 64 directions
    assert (abs(sliced - 25.0) < ERRORS * 25 / math.sqrt(2 * 64)).all()


def test_agreement_of_other_families() -> None:
    parts = [Modality(name, (2,), Normal(1.0)) for name in "ab"]
    vae = MODELS["mmvae"](parts, 2, family="laplace")
    x = vae.generate(num_rows=5)
    found = posterior_agreement(vae, x).sel(modality="a", other="b")
    q, p = (vae.posterior({n: x[n]}) for n in "ab")
    loc = [d.loc[:, i] for i, d in enumerate((q, p))]
    scale = [math.sqrt(2) * d.scale[:, i] for i, d in enumerate((q, p))]
    expected = squared_wasserstein(loc[0], scale[0], loc[1], scale[1]).mean()
    np.testing.assert_allclose(found["wasserstein"], expected.item())
    assert 0 < found["overlap"] <= 1 and found["symmetric_kl"] > 0
    for name in ("jnf", "mhvae", "mopoe", "dmvae"):
        other = MODELS[name](parts, 2, **({"hidden": 4} if name in ("jnf", "mhvae") else {}))
        result = posterior_agreement(other, x, num_draws=50)
        assert (result["overlap"] <= 1).all() and result["wasserstein"].notnull().all()


def test_sites_need_rows_of_one_kind() -> None:
    values = {"x": torch.zeros(2, 2)}
    shown = Shown(own_pair(), values, {"x": torch.tensor([True, False])})
    assert shown.draw(3)["z"].shape == (3, 2, 2)
    with pytest.raises(ValueError, match="expected rows that all have something, or none at all"):
        shown.sites(1)


def test_checks_leave_the_world_as_it_was() -> None:
    w = world(diagonal=True)
    vae = MVAE(w.modalities(), latent_dim=D).train()
    x, observed = rows(w)
    before = torch.random.get_rng_state()
    for check in (
        contraction,
        active_units,
        kl_per_dimension,
        modality_shares,
        posterior_agreement,
    ):
        done = []
        one = check(vae, x, observed, seed=3, on_progress=lambda *d, done=done: done.append(d))
        assert one.identical(check(vae, x, observed, seed=3)), check
        assert 0 < done[-1][0] <= done[-1][1]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert vae.training and not pyro.get_param_store().keys()
