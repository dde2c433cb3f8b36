"""NUTS as the reference of a guide, against posteriors that are known."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from mmzoo import Modality
from mmzoo.evaluation.pair import PyroPair
from mmzoo.evaluation.reference import compare_with_reference, nuts_posterior
from mmzoo.exact import LinearGaussianWorld
from mmzoo.likelihoods import Normal
from mmzoo.models import MODELS, MVAE, LinearVAE

ERRORS = 5.0
SIZES = {"a": 3, "b": 2}
FEW = {"num_samples": 250, "warmup_steps": 60, "num_chains": 1}


def world(**options) -> LinearGaussianWorld:
    return LinearGaussianWorld.random(SIZES, 2, seed=3, **options)


def data(w) -> tuple[dict, dict]:
    """Row 0 is complete, row 1 lacks b, row 2 everything; the holes are NaN."""
    observed = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True, False, False])}
    x = w.sample(3, seed=4)
    return {n: v.masked_fill(~observed[n][:, None], math.nan) for n, v in x.items()}, observed


def off(vae, scale=1.0, shift=0.0):
    def guide(x, observed=None, **kwargs):
        q = vae.posterior(x, observed, **kwargs)
        with pyro.plate("data", q.batch_shape[-1], dim=-1):
            loc = q.mean + shift * q.stddev
            return pyro.sample("z", dist.Normal(loc, scale * q.stddev).to_event(1))

    return guide


@pytest.mark.parametrize(
    ("row", "given"),
    [
        pytest.param(0, None, id="all"),
        pytest.param(0, "b", id="one", marks=pytest.mark.slow),
        pytest.param(1, None, id="missing"),
        pytest.param(2, None, id="prior", marks=pytest.mark.slow),
    ],
)
def test_nuts_recovers_the_exact_posterior(row, given) -> None:
    w = world()
    x, observed = data(w)
    tree = nuts_posterior(LinearVAE(w.modalities(), 2), x, observed, row=row, given=given, **FEW)
    shown = {name: mask & (given is None or name in given) for name, mask in observed.items()}
    exact = w.posterior(x, shown)
    found = tree["diagnostics"]
    assert found["latent"].values.tolist() == ["z[0]", "z[1]"]
    mean, sd = exact.mean[row].numpy(), exact.stddev[row].numpy()
    assert (abs(found["mean"] - mean) < ERRORS * found["mcse_mean"]).all()
    assert (abs(found["sd"] - sd) < ERRORS * found["mcse_sd"]).all()
    assert (found["mcse_mean"] < 0.2 * sd).all() and (found["r_hat"] < 1.1).all()
    z = tree["posterior"]["z"]
    assert dict(z.sizes) == {"chain": 1, "draw": 250, "latent": 2}
    np.testing.assert_allclose(z.mean(("chain", "draw")), found["mean"])
    assert tree["sample_stats"]["diverging"].dims == ("chain", "draw")
    assert tree.attrs["row"] == row and not tree["sample_stats"]["diverging"].any()


def test_guide_that_is_off_is_reported_as_off() -> None:
    w = world(diagonal=True)
    vae = MVAE(w.modalities(encoder="exact"), latent_dim=2)
    x, observed = data(w)
    options = {"num_samples": 150, "warmup_steps": 60, "num_chains": 2}
    reference = nuts_posterior(vae, x, observed, row=0, **options)
    right = compare_with_reference(vae, reference, x, observed)
    assert not right["off"].any()
    error = right["mean_difference_error"]
    assert (abs(right["mean_difference"]) < ERRORS * error).all() and (error < 0.12).all()
    assert (abs(right["sd_ratio"] - 1) < ERRORS * right["sd_ratio_error"]).all()
    assert (right["wasserstein"] < ERRORS * right["wasserstein_floor"]).all()
    assert reference["posterior"].sizes["chain"] == 2
    assert abs(reference["posterior"]["z"][0] - reference["posterior"]["z"][1]).max() > 0.1
    for name, wrong, exact in (
        ("sd_ratio", {"scale": 1.5}, 1.5),
        ("mean_difference", {"shift": 0.5}, 0.5),
    ):
        found = compare_with_reference(vae, reference, x, observed, guide=off(vae, **wrong))
        assert found["off"].all(), name
        assert (abs(found[name] - exact) < ERRORS * found[f"{name}_error"]).all()
        # W1 of N(0, 1) to N(0.5, 1) is 0.5, to N(0, 1.5^2) it is 0.5 E|e| = 0.399
        distance = 0.5 if name == "mean_difference" else 0.5 * math.sqrt(2 / math.pi)
        slack = ERRORS * (error + right["wasserstein_floor"])
        assert (abs(found["wasserstein"] - distance) < slack).all()
        assert found["sliced_wasserstein"] > 2 * right["sliced_wasserstein"]
        # A bound of 0.6 tolerates all that.
        tolerant = {"guide": off(vae, **wrong), "tolerance": 0.6}
        assert not compare_with_reference(vae, reference, x, observed, **tolerant)["off"].any()


@pytest.mark.slow
def test_pair_of_ones_own_with_a_positive_latent() -> None:
    """A gamma prior and a normal likelihood: NUTS minds the support."""

    def model(x, observed):
        with pyro.plate("data", len(x["x"]), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(torch.full((1,), 2.0), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(rate, 1.0).to_event(1), obs=x["x"])

    def guide(x, observed):
        with pyro.plate("data", len(x["x"]), dim=-1):
            one = torch.ones(len(x["x"]), 1)
            pyro.sample("rate", dist.Gamma(2.0 * one, one).to_event(1))

    pair = PyroPair(model, guide, [Modality("x", (1,), Normal(1.0))])
    x = {"x": torch.tensor([[1.5]])}
    tree = nuts_posterior(pair, x, row=0, **FEW)
    grid = torch.linspace(1e-4, 12.0, 20_001)
    log_p = dist.Gamma(2.0, 1.0).log_prob(grid) + dist.Normal(grid, 1.0).log_prob(x["x"][0])
    weight = log_p.softmax(0)
    mean = (weight * grid).sum()
    sd = (weight * (grid - mean).square()).sum().sqrt()
    found = tree["diagnostics"]
    assert abs(found["mean"].item() - mean) < ERRORS * found["mcse_mean"].item()
    assert abs(found["sd"].item() - sd) < ERRORS * found["mcse_sd"].item()
    assert compare_with_reference(pair, tree, x)["off"].all()  # this guide is the prior


def test_private_codes_have_sites_of_their_own() -> None:
    parts = [Modality("a", (3,), Normal(1.0)), Modality("b", (2,), Normal(1.0))]
    vae = MODELS["dmvae"](parts, 2, private_dim={"a": 1}).train()
    x = vae.generate(num_rows=2)
    before, steps = torch.random.get_rng_state(), []
    options = {"row": 1, "num_samples": 20, "warmup_steps": 10, "num_chains": 1, "seed": 2}
    tree = nuts_posterior(vae, x, **options, on_progress=lambda *done: steps.append(done))
    assert set(tree["posterior"].data_vars) == {"z", "w_a"}
    assert tree["diagnostics"]["latent"].values.tolist() == ["z[0]", "z[1]", "w_a[0]"]
    assert tree["diagnostics"]["r_hat"].notnull().all()  # from the halves of the chain
    assert steps[-1] == (30, 30) and len(steps) == 30
    with torch.no_grad():
        assert tree.identical(nuts_posterior(vae, x, **options))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert vae.training and not pyro.get_param_store().keys()
    assert all(p.grad is None for p in vae.parameters())
    found = compare_with_reference(vae, tree, x)
    assert found["latent"].values.tolist() == ["z[0]", "z[1]", "w_a[0]"]
    assert found.identical(compare_with_reference(vae, tree, x))


def test_bad_arguments() -> None:
    w = world(diagonal=True)
    vae = MVAE(w.modalities(encoder="exact"), latent_dim=2)
    x = w.sample(2, seed=0)
    with pytest.raises(ValueError, match="nuts_posterior: expected a row from 0 to 1, found 2"):
        nuts_posterior(vae, x, row=2)
    with pytest.raises(ValueError, match="expected num_samples >= 8, warmup_steps >= 1 and num_ch"):
        nuts_posterior(vae, x, row=0, num_samples=2)
    with pytest.raises(ValueError, match="nuts_posterior given: unknown modality 'c'"):
        nuts_posterior(vae, x, row=0, given="c")
    tree = nuts_posterior(vae, x, row=0, num_samples=20, warmup_steps=20)
    with pytest.raises(ValueError, match="expected num_draws >= 2, found 1; 4000, say"):
        compare_with_reference(vae, tree, x, num_draws=1)
    parts = [Modality("a", (3,), Normal(1.0)), Modality("b", (2,), Normal(1.0))]
    other = MODELS["dmvae"](parts, 2, private_dim=1)
    with pytest.raises(ValueError, match="expected a reference with the sites z, w_a, w_b, found"):
        compare_with_reference(other, tree, x)
