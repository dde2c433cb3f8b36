"""Simulation-based calibration: exact posteriors pass, for every subset, and others do not."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from mmzoo import Modality
from mmzoo.evaluation.calibration import (
    calibration_ecdf,
    coverage,
    simulation_based_calibration,
    uniformity_p_value,
)
from mmzoo.evaluation.pair import PyroPair
from mmzoo.exact import LinearGaussianWorld
from mmzoo.likelihoods import Normal
from mmzoo.models import CVAE, MODELS, MVAE, JointVAE, LinearVAE

SIZES = {"a": 3, "b": 2, "c": 2}
SUBSETS = ["a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"]
ROWS, DRAWS = 600, 99
ERRORS = 5.0


def exact_vae() -> MVAE:
    world = LinearGaussianWorld.random(SIZES, 2, seed=3, diagonal=True)
    return MVAE(world.modalities(encoder="exact"), latent_dim=2)


def off(vae, scale=1.0, shift=0.0):
    """The model's own posterior with its scale or its mean (in standard deviations) off."""

    def guide(x, observed=None, **kwargs):
        q = vae.posterior(x, observed, **kwargs)
        with pyro.plate("data", q.batch_shape[-1], dim=-1):
            loc = q.mean + shift * q.stddev
            return pyro.sample("z", dist.Normal(loc, scale * q.stddev).to_event(1))

    return guide


def missing(rows: int) -> dict[str, torch.Tensor]:
    """Every pattern of missing modalities in turn, the empty one included."""
    pattern = torch.arange(rows) % 8
    return {name: (pattern >> m) % 2 == 0 for m, name in enumerate(SIZES)}


def check(pair, **options):
    return simulation_based_calibration(
        pair, **{"num_rows": ROWS, "num_draws": DRAWS, "alpha": 0.01, **options}
    )


# The test of uniformity ---------------------------------------------------------------------------


def test_p_value_is_the_exact_one() -> None:
    """Against the enumeration of all samples of four ranks."""
    samples = np.array(list(itertools.product(range(4), repeat=4))).T  # (N, 256)
    below = np.stack([(samples < i).sum(0) for i in (1, 2, 3)])
    share = np.array([1, 2, 3])[:, None] / 4
    tail = np.minimum(stats.binom.cdf(below, 4, share), stats.binom.sf(below - 1, 4, share)).min(0)
    expected = [(tail <= t * (1 + 1e-9)).mean() for t in tail]
    np.testing.assert_allclose(uniformity_p_value(samples, 3), expected, rtol=0, atol=1e-12)


def test_p_values_of_uniform_ranks_are_uniform() -> None:
    ranks = np.random.default_rng(0).integers(0, 20, (300, 4000))
    p = uniformity_p_value(ranks, 19)
    for level in (0.01, 0.05, 0.3):
        error = math.sqrt(level * (1 - level) / 4000)
        # The statistic is discrete: it is a little rarer than the level, never more frequent.
        assert (p <= level).mean() < level + ERRORS * error
        assert (p <= level).mean() > 0.7 * level - ERRORS * error
    bent = np.minimum(ranks, np.random.default_rng(1).integers(0, 20, ranks.shape))
    assert (uniformity_p_value(bent, 19) < 1e-4).all()


def test_band_holds_whole_curves_at_its_level() -> None:
    result = check(exact_vae(), num_rows=200, num_draws=19, given=["a"])
    band = calibration_ecdf(result, level=0.9)
    ranks = np.random.default_rng(2).integers(0, 20, (4000, 200))
    counts = (ranks[..., None] < np.arange(1, 20)).sum(1) / 200 - band["point"].values
    inside = (
        (counts >= band["lower"].values - 1e-9) & (counts <= band["upper"].values + 1e-9)
    ).all(-1)
    error = math.sqrt(0.9 * 0.1 / 4000)
    assert 0.9 - ERRORS * error < inside.mean() < 0.9 + ERRORS * error + 0.03  # discrete
    expected = result["rank"].sel(subset="a", latent="z[1]").values[:, None] < np.arange(1, 20)
    found = band["difference"].sel(subset="a", latent="z[1]")
    np.testing.assert_allclose(found, expected.mean(0) - np.arange(1, 20) / 20, atol=1e-12)
    assert band["statistic_difference"].dims == ("subset", "statistic", "point")


# Guides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observed", [None, missing(ROWS)], ids=["complete", "missing"])
def test_exact_posterior_passes_for_every_subset(observed) -> None:
    result = check(exact_vae(), observed=observed)
    assert result["subset"].values.tolist() == SUBSETS
    assert result["latent"].values.tolist() == ["z[0]", "z[1]"]
    assert result["passes"].all(), result["subset_p_value"].values
    assert result["rank"].min() == 0 and result["rank"].max() == DRAWS


@pytest.mark.parametrize("observed", [None, missing(ROWS)], ids=["complete", "missing"])
@pytest.mark.parametrize(
    "wrong", [{"scale": 1.3}, {"scale": 1 / 1.3}, {"shift": 0.5}], ids=["wide", "narrow", "shifted"]
)
def test_wrong_posterior_fails_for_every_subset(wrong, observed) -> None:
    vae = exact_vae()
    if observed is not None:  # a row with nothing has the prior, which is right
        seen = torch.stack(list(observed.values())).any(0)
        observed = {name: mask | ~seen for name, mask in observed.items()}
    result = check(vae, guide=off(vae, **wrong), observed=observed)
    assert not result["passes"].any(), result["subset_p_value"].values


@pytest.mark.slow
def test_exact_posteriors_of_many_worlds_fail_as_often_as_they_may() -> None:
    """200 worlds of one to three modalities and latents; full covariances."""
    p_values = []
    for seed in range(200):
        names, dim = list(SIZES)[: 1 + seed % 3], 1 + seed // 3 % 3
        world = LinearGaussianWorld.random({n: SIZES[n] for n in names}, dim, seed=seed)
        vae = LinearVAE(world.modalities(), dim)
        result = check(vae, num_rows=100, num_draws=19, seed=seed)
        p_values.append(result["subset_p_value"].values.min() * result.sizes["subset"])
    p_values = np.array(p_values)
    for level in (0.05, 0.2):
        error = math.sqrt(level * (1 - level) / len(p_values))
        assert (p_values < level).mean() < level + ERRORS * error
    assert p_values.min() > 1e-5


def test_wrong_for_one_subset_fails_there_alone() -> None:
    """A guide that is too wide for one pair of modalities."""
    vae = exact_vae()

    def guide(x, observed=None, **kwargs):
        return off(vae, scale=1.3 if set(x) == {"a", "c"} else 1.0)(x, observed, **kwargs)

    result = check(vae, guide=guide)
    assert [s for s in SUBSETS if not result["passes"].sel(subset=s)] == ["a+c"]


def test_statistics_see_what_no_single_latent_does() -> None:
    """Right means and standard deviations, no correlation."""
    weights = {name: torch.ones(size, 2) for name, size in SIZES.items()}
    biases = {name: torch.zeros(size) for name, size in SIZES.items()}
    world = LinearGaussianWorld(weights, biases, dict.fromkeys(SIZES, 1.0))
    vae = LinearVAE(world.modalities(), 2)
    everything = [list(SIZES)]
    assert check(vae, given=everything)["passes"].all()
    result = check(vae, given=everything, guide=off(vae))
    assert (result["p_value"] > 0.01).all()
    assert (result["statistic_p_value"].sel(statistic="log_joint") < 1e-6).all()
    assert not result["passes"].any()


def test_coverage_is_that_of_the_normal_distribution() -> None:
    vae = exact_vae()
    levels = np.array([0.5, 0.8, 0.9, 0.95])
    for factor in (1.0, 1 / 1.3):
        options = {"guide": off(vae, scale=factor)}
        found = coverage(check(vae, num_rows=2000, given=[["a"], SIZES], **options))
        np.testing.assert_array_equal(found["level"], levels)
        # Beside the binomial error there is that of a quantile of 99 draws, which vanishes in the
        # mean of an exact posterior, and is of the order of 1/100 otherwise.
        slack = 0.0 if factor == 1.0 else 1 / 100
        central = 2 * stats.norm.cdf(stats.norm.ppf((1 + levels) / 2) * factor) - 1
        off_by = np.abs(found["coverage"] - central)
        assert (off_by < ERRORS * found["standard_error"] + slack).all()
        region = stats.chi2.cdf(stats.chi2.ppf(levels, 2) * factor**2, 2)
        off_by = np.abs(found["highest_density"] - region)
        assert (off_by < ERRORS * found["highest_density_error"] + slack).all()
        nominal = np.abs(found["coverage"] - levels) < ERRORS * found["standard_error"]
        assert nominal.all() == (factor == 1.0)


def test_coverage_has_an_error_where_it_is_complete() -> None:
    vae = exact_vae()
    result = check(vae, guide=off(vae, scale=20.0), num_rows=50, given=["a"])
    found = coverage(result, levels=[0.95])
    assert (found["coverage"] == 1).all() and (found["standard_error"] > 0.01).all()


def own_pair(factor=1.0) -> PyroPair:
    """Values z + e with unit noise: z | x is N(x / 2, 1 / 2)."""

    def model(x, observed):
        with pyro.plate("data", len(x["x"]), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x["x"])

    def guide(x, observed):
        with pyro.plate("data", len(x["x"]), dim=-1):
            pyro.sample("z", dist.Normal(x["x"] / 2, factor * math.sqrt(0.5)).to_event(1))

    return PyroPair(model, guide, [Modality("x", (2,), Normal(1.0))])


def test_pair_of_ones_own() -> None:
    assert check(own_pair())["passes"].all()
    assert not check(own_pair(1.3))["passes"].any()
    rows = torch.arange(ROWS) % 2 == 0  # rows without x have the prior, which the guide is not
    assert check(own_pair(), observed={"x": rows})["passes"].all()


def test_every_latent_site_is_looked_at() -> None:
    parts = [Modality("a", (3,), Normal(1.0)), Modality("b", (2,), Normal(1.0))]
    vae = MODELS["dmvae"](parts, 2, private_dim={"a": 3})
    result = check(vae, num_rows=30, num_draws=9)
    assert result["latent"].values.tolist() == ["z[0]", "z[1]", "w_a[0]", "w_a[1]", "w_a[2]"]
    # b says nothing of the private code of a, whose posterior is its prior
    own = check(vae, given=["b"])["p_value"].sel(latent=["w_a[0]", "w_a[1]", "w_a[2]"])
    assert (own > 1e-3).all()
    deep = MODELS["mhvae"](parts, 2, hidden=4)
    found = check(deep, num_rows=30, num_draws=9)["latent"].values.tolist()
    assert found == [f"{site}[{d}]" for site in deep.latent_sites for d in range(2)]


def test_conditional_model() -> None:
    parts = [Modality("a", (3,), Normal(1.0)), Modality("b", (2,), Normal(1.0))]
    vae = CVAE(parts, 2, condition="b", hidden=4)
    result = check(vae, num_rows=40, num_draws=9, x={"b": torch.randn(40, 2)})
    assert result["subset"].values.tolist() == ["b", "a+b"]
    with pytest.raises(ValueError, match=r"expected 40 rows of 'b' in x, .* found none; pass x="):
        check(vae, num_rows=40)
    with pytest.raises(ValueError, match="no posterior given a; CVAE is conditional on b"):
        check(vae, given=["a"], num_rows=40, x={"b": torch.randn(40, 2)})


def test_same_seed_same_ranks_and_nothing_else_moves() -> None:
    vae = exact_vae().train()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    calls = []
    one = check(vae, num_rows=100, seed=1, on_progress=lambda *done: calls.append(done))
    assert one.identical(check(vae, num_rows=100, seed=1))
    assert not one["rank"].equals(check(vae, num_rows=100, seed=2)["rank"])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert vae.training and not pyro.get_param_store().keys()
    assert calls[-1] == (100, 100) and len(calls) > 1


def test_default_subsets_of_many_modalities() -> None:
    parts = [Modality(name, (2,), Normal(1.0)) for name in "abcd"]
    result = check(MVAE(parts, 2), num_rows=4, num_draws=3)
    assert result["subset"].values.tolist() == ["a", "b", "c", "d", "a+b+c+d"]
    joint = JointVAE(parts, 2, hidden=4)
    assert check(joint, num_rows=4, num_draws=3)["subset"].values.tolist() == ["a+b+c+d"]


def test_bad_arguments() -> None:
    vae = exact_vae()
    with pytest.raises(ValueError, match="expected num_rows and num_draws of at least 1 and alpha"):
        check(vae, num_draws=0)
    with pytest.raises(ValueError, match="calibration given: unknown modality 'd'; this model has"):
        check(vae, given=[["a", "d"]])
    with pytest.raises(ValueError, match="calibration given: expected some of .* found an empty"):
        check(vae, given=[[]])
    with pytest.raises(ValueError, match=r"observed\['a'\]: expected a bool mask of shape \(9,\)"):
        check(vae, num_rows=9, observed={"a": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="expected a subset that MFM answers for, found none; the"):
        check(MODELS["mfm"]([Modality("a", (2,)), Modality("b", (2,))], 2, hidden=4))
    result = check(vae, num_rows=9, given=["a"])
    with pytest.raises(ValueError, match=r"coverage: expected levels in \(0, 1\), found 95"):
        coverage(result, levels=[95])
    with pytest.raises(ValueError, match=r"calibration_ecdf: expected levels in \(0, 1\), found 1"):
        calibration_ecdf(result, level=1)
