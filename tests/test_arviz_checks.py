"""Comparison and calibration through ArviZ, against the exact worlds and by hand."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from scipy import stats
from torch import Tensor

from mmzoo import Modality
from mmzoo.evaluation.arviz_checks import compare_models, conditional_loo, elpd_data, pit
from mmzoo.evaluation.datatree import to_datatree
from mmzoo.evaluation.likelihood import log_likelihood
from mmzoo.evaluation.pair import PyroPair
from mmzoo.exact import LinearGaussianWorld
from mmzoo.likelihoods import Categorical
from mmzoo.models import MODELS
from mmzoo.vae import MultimodalVAE

ROWS = 300


def world(scale: float = 1.0, seed: int = 0) -> LinearGaussianWorld:
    """A world whose noise is so many times as large as it should be."""
    right = LinearGaussianWorld.random({"image": 5, "label": 3}, 2, seed=seed, diagonal=True)
    scales = {name: scale * value for name, value in right.scales.items()}
    return LinearGaussianWorld(right.weights, right.biases, scales)


def exact_vae(scale: float = 1.0) -> MultimodalVAE:
    return MODELS["mvae"](world(scale).modalities(encoder="exact"), latent_dim=2)


def result(values: Tensor, **variables: Tensor) -> xr.Dataset:
    found = {"log_prob": ("row", values.numpy())}
    return xr.Dataset(found | {name: ("row", v.numpy()) for name, v in variables.items()})


def read(table: object, title: str) -> dict[str, float]:
    """A line of ArviZ's table, in the signs and names of ArviZ 1.x."""
    line = table.loc[title].to_dict()
    if "elpd_loo" in line:
        line |= {"elpd": line["elpd_loo"], "elpd_diff": -line["elpd_diff"], "p": line["p_loo"]}
    return line


@pytest.mark.parametrize("method", ["stacking", "BB-pseudo-BMA", "pseudo-BMA"])
def test_comparison_is_the_paired_difference_by_hand(method: str) -> None:
    x = world().sample(ROWS, seed=1)
    names = ["image", "label"]
    exact = {f"{s}": world(s).log_prob(x, of=names) for s in (1.0, 1.3, 2.0)}
    table = compare_models({name: result(v) for name, v in exact.items()}, method=method)
    order = sorted(exact, key=lambda name: -exact[name].sum())
    assert list(table.index) == order
    assert table["rank"].tolist() == [0, 1, 2]
    best = exact[order[0]]
    for name in order:
        line, difference = read(table, name), exact[name] - best
        assert line["p"] == 0
        assert line["elpd"] == pytest.approx(float(exact[name].sum()), rel=1e-12)
        assert line["elpd_diff"] == pytest.approx(float(difference.sum()), rel=1e-10, abs=1e-9)
        error = float(difference.std(correction=0)) * math.sqrt(ROWS)
        assert line["dse"] == pytest.approx(error, rel=1e-10, abs=1e-9)
        if method == "stacking":
            spread = float(exact[name].std(correction=0)) * math.sqrt(ROWS)
            assert line["se"] == pytest.approx(spread, rel=1e-12)
    assert table["weight"].sum() == pytest.approx(1, abs=1e-6)
    assert table["weight"].iloc[0] > 0.9


def test_stacking_survives_thousands_of_nats() -> None:
    """The weights depend on differences within rows alone; ArviZ takes exp of the values."""
    torch.manual_seed(0)
    near = torch.randn(3, ROWS)
    tables = [
        compare_models({str(i): result(v + shift) for i, v in enumerate(near)})
        for shift in (0.0, -5000.0)
    ]
    for name in "012":
        np.testing.assert_allclose(
            tables[0].loc[name, "weight"], tables[1].loc[name, "weight"], atol=1e-4
        )
    assert tables[1]["weight"].between(0.01, 0.99).all()


def test_rows_without_values_are_left_out_of_all_and_large_k_is_marked() -> None:
    a, b = torch.randn(2, ROWS)
    a[3] = torch.nan
    b[5] = -torch.inf
    k = torch.zeros(ROWS)
    k[7] = 0.8
    table = compare_models({"a": result(a, pareto_k=k), "b": result(b, pareto_k=0 * k)})
    kept = torch.isfinite(a) & torch.isfinite(b)
    for name, values in (("a", a), ("b", b)):
        assert read(table, name)["elpd"] == pytest.approx(float(values[kept].sum()), rel=1e-12)
    marks = table["warning"] if "warning" in table else table["diag_elpd"] != ""
    assert marks["a"]
    assert not marks["b"]


def test_elpd_data_prints_as_arviz_does() -> None:
    x = world().sample(ROWS, seed=1)
    found = log_likelihood(exact_vae(), x, of=["image", "label"], num_samples=20)
    with np.errstate(all="ignore"):  # ArviZ 0.23 multiplies an empty bin by its infinite width
        text = str(elpd_data(found))
    total = float(world().log_prob(x, of=["image", "label"]).sum())
    assert "Computed from 20 posterior samples and 300 observations" in text
    assert f"{total:.2f}" in text


def test_conditional_loo_is_right_only_where_k_is_small() -> None:
    """Rows that say little about z: PSIS-LOO is log p(x). Others: too high, and k says so."""
    vague, x = exact_vae(8.0), world(8.0).sample(40, seed=2)
    tree = to_datatree(vague, x, num_draws=4000, num_samples=0, given=[])
    found = conditional_loo(tree)
    exact = world(8.0).log_prob(x, of=["image", "label"]).numpy()
    draws = tree["log_likelihood"]["joint"].values[0]  # (K, N)
    weight = np.exp(exact - draws)  # mean 1: the harmonic identity
    error = weight.std(0) / math.sqrt(4000)
    assert (found["pareto_k"] < 0.7).all()
    assert (np.abs(found["elpd"] - exact) < 5 * error).all()
    sharp, x = exact_vae(0.3), world(0.3).sample(40, seed=2)
    x["image"][0] = torch.nan
    observed = {"image": torch.arange(40) > 0}
    tree = to_datatree(sharp, x, observed, num_draws=4000, num_samples=0, given=[])
    with pytest.warns(
        UserWarning,
        match="Pareto k exceeds 0.7 in .* % of the rows, which are not to be relied on",
    ):
        found = conditional_loo(tree)
    exact = world(0.3).log_prob(x, observed, of=["image", "label"]).numpy()
    assert (found["elpd"] - exact).mean() > 1
    assert (found["pareto_k"] > 0.7).mean() > 0.8
    with pytest.warns(UserWarning, match="Pareto k"):
        found = conditional_loo(tree, "image")
    assert found["elpd"].isnull().values.tolist() == [True] + [False] * 39


# Calibration ------------------------------------------------------------------------------------


def uniform(values: xr.DataArray) -> float:
    """Smallest Kolmogorov-Smirnov p-value of the entries, times their number."""
    each = [stats.kstest(column[np.isfinite(column)], "uniform").pvalue for column in values.T]
    return min(each) * len(each)


@pytest.mark.parametrize("given", [None, []])
def test_pit_is_uniform_in_the_exact_world_only(given: list[str] | None) -> None:
    x = world().sample(1000, seed=4)
    options = {"target": "image", "given": given, "batch_size": 250}
    right = pit(exact_vae(), x, **options)
    assert right["pit"].dims == ("row", "entry")
    assert right["pit"].shape == (1000, 5)
    assert 0 < right["pit"].min() and right["pit"].max() < 1
    assert uniform(right["pit"].values) > 1e-3
    wide = pit(exact_vae(1.5), x, **options)["pit"].values
    assert uniform(wide) < 1e-6
    assert (np.abs(wide - 0.5) < 0.25).mean() > 0.55  # bell-shaped: the predictions are too wide


def test_pit_of_a_biased_guide_is_cured_by_resampling() -> None:
    x = world().sample(500, seed=4)

    def guide(x: dict[str, Tensor], observed: dict[str, Tensor] | None = None) -> None:
        exact = world().posterior(x, observed)
        scale = exact.variance.sqrt()
        with pyro.plate("data", len(x["image"]), dim=-1):
            pyro.sample("z", dist.Normal(exact.mean + scale, 1.3 * scale).to_event(1))

    options = {"target": "image", "guide": guide, "num_draws": 100, "batch_size": 250}
    assert uniform(pit(exact_vae(), x, **options)["pit"].values) < 1e-6
    cured = pit(exact_vae(), x, resampled=True, num_proposals=500, **options)
    assert uniform(cured["pit"].values) > 1e-3
    assert cured.attrs["num_proposals"] == 500


def discrete_pair() -> PyroPair:
    """One site of each discrete kind; their values come from the model itself."""
    modalities = [
        Modality("touch", (2,), "bernoulli"),
        Modality("type", (3,), "one_hot_categorical"),
        Modality("digit", (), Categorical(4)),
    ]

    def model(x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["touch"]), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            touch = dist.Bernoulli(logits=2 * z[..., :2]).to_event(1)
            pyro.sample("touch", touch, obs=x["touch"])
            pyro.sample("type", dist.OneHotCategorical(logits=2 * z), obs=x["type"])
            logits = torch.cat([z, 0 * z[..., :1]], -1)
            pyro.sample("digit", dist.Categorical(logits=logits), obs=x["digit"])

    def guide(x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["touch"]), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    return PyroPair(model, guide, modalities)


@pytest.mark.parametrize(("target", "entries"), [("touch", 2), ("type", 1), ("digit", 1)])
def test_pit_of_discrete_values_is_uniform(target: str, entries: int) -> None:
    pair = discrete_pair()
    x = pair.generate({}, num_rows=600)
    options = {"target": target, "batch_size": 200}
    found = pit(pair, x, given=[], num_draws=100, **options)["pit"].values
    assert found.shape == (600, entries)
    assert uniform(found) > 1e-3
    # Given the others the prior is wrong, but importance-resampled draws are right.
    others = [name for name in x if name != target]
    cured = pit(pair, x, num_draws=50, resampled=True, num_proposals=200, **options)
    assert uniform(cured["pit"].values) > 1e-3
    assert cured.attrs["given"] == "+".join(others)
    wrong = {**x, "digit": torch.zeros_like(x["digit"])} if target == "digit" else None
    if wrong:
        assert uniform(pit(pair, wrong, target=target, given=[])["pit"].values) < 1e-6


def test_pit_skips_holes_and_repeats() -> None:
    x = world().sample(20, seed=4)
    observed = {"image": torch.arange(20) != 3, "label": torch.arange(20) % 2 == 0}
    x["image"][3] = torch.nan
    state = torch.get_rng_state()
    done = []
    options = {"target": "image", "num_draws": 20, "batch_size": 8}
    first = pit(exact_vae(), x, observed, on_progress=lambda *a: done.append(a), **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert done == [(8, 20), (16, 20), (20, 20)]
    assert first["pit"].isnull().all("entry").values.tolist() == [i == 3 for i in range(20)]
    xr.testing.assert_identical(first, pit(exact_vae(), x, observed, **options))
    assert not first.equals(pit(exact_vae(), x, observed, seed=1, **options))


def test_errors() -> None:
    x = world().sample(6, seed=1)
    vae = exact_vae()
    one = result(torch.zeros(6))
    with pytest.raises(ValueError, match="compare_models: expected at least two models, found 1"):
        compare_models({"a": one})
    with pytest.raises(ValueError, match="expected the same rows of every model, found 5, 6"):
        compare_models({"a": one, "b": result(torch.zeros(5))})
    with pytest.raises(ValueError, match="expected the same quantities .* found log p.a., log p"):
        named = [one.assign_attrs(quantity=f"log p({name})") for name in "ab"]
        compare_models(dict(zip("ab", named)))
    with pytest.raises(ValueError, match="expected log_prob over row for 'b', found"):
        compare_models({"a": one, "b": xr.Dataset()})
    with pytest.raises(ValueError, match="expected rows with a finite log_prob in every model"):
        compare_models({"a": one, "b": one * torch.nan})
    tree = to_datatree(vae, x, num_draws=3, num_samples=0)
    with pytest.raises(ValueError, match="of: expected one of image, label, joint, found 'sound'"):
        conditional_loo(tree, "sound")
    with pytest.raises(ValueError, match="pit: expected a target that is not given, found 'image'"):
        pit(vae, x, target="image", given=["image"])
    with pytest.raises(ValueError, match="pit target.*'sound'"):
        pit(vae, x, target="sound")
    with pytest.raises(ValueError, match="pit: expected values of the target 'image', found label"):
        pit(vae, {"label": x["label"]}, target="image")
    with pytest.raises(ValueError, match="pit: expected num_draws and batch_size of at least 1"):
        pit(vae, x, target="image", num_draws=0)
    conditional = MODELS["cvae"](
        [Modality("image", (5,)), Modality("label", (3,))], 2, condition="label"
    )
    with pytest.raises(ValueError, match="pit: expected given to hold label, .*found nothing"):
        pit(conditional, x, target="image", given=[])
