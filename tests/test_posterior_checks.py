"""Posterior checks against worlds where every gap, divergence and gradient has a closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from mmzoo import Modality
from mmzoo.evaluation.amortization import amortization_gap
from mmzoo.evaluation.pair import PyroPair
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
    options = {"given": given, "num_steps": 200, "num_samples": 900, "guide": off(w, **wrong)}
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
