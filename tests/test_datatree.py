"""The ArviZ export, against the exact world."""

import importlib
import math
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from zoo import CASES, batch, case, masks

from mmzoo import Modality
from mmzoo.evaluation.datatree import load_datatree, save_datatree, to_datatree
from mmzoo.evaluation.pair import PyroPair
from mmzoo.exact import LinearGaussianWorld
from mmzoo.models import MODELS
from mmzoo.vae import MultimodalVAE

ROWS, DRAWS = 12, 400


def world() -> LinearGaussianWorld:
    return LinearGaussianWorld.random({"image": 5, "label": 3}, latent_dim=2, seed=0, diagonal=True)


def exact_vae() -> MultimodalVAE:
    return MODELS["mvae"](world().modalities(encoder="exact"), latent_dim=2)


def holed_data() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows 0, 3, 6, 9 lack the image, row 1 lacks the label; the holes are NaN."""
    x = world().sample(ROWS, seed=1)
    observed = {"image": torch.arange(ROWS) % 3 > 0, "label": torch.arange(ROWS) != 1}
    return {
        name: value.masked_fill(~observed[name][:, None], math.nan) for name, value in x.items()
    }, observed


@pytest.fixture
def tree() -> xr.DataTree:
    return to_datatree(exact_vae(), *holed_data(), num_draws=DRAWS, num_samples=0, batch_size=5)


@pytest.fixture
def arviz() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 announces its successor
        return importlib.import_module("arviz")


@pytest.mark.parametrize("subset", ["image+label", "image", "label"])
def test_latents_match_the_exact_posterior(tree: xr.DataTree, subset: str) -> None:
    x, observed = holed_data()
    seen = {name: mask & (name in subset) for name, mask in observed.items()}
    exact = world().posterior(x, seen)
    z = torch.tensor(tree["posterior"]["z"].sel(subset=subset, chain=0).values)  # (K, N, D)
    error = (z.mean(0) - exact.mean) / (exact.variance / DRAWS).sqrt()
    assert error.abs().max() < 5
    spread = (z.var(0) / exact.variance - 1) / (2 / DRAWS) ** 0.5
    assert spread.abs().max() < 5
    informed = tree["constant_data"]["subset_observed"].sel(subset=subset).values
    np.testing.assert_array_equal(informed, torch.stack(list(seen.values())).any(0))


def test_every_log_weight_is_the_exact_evidence(tree: xr.DataTree) -> None:
    """The guide is the exact posterior, so log w has no variance."""
    evidence = world().log_prob(*holed_data(), of=["image", "label"])
    log_weight = tree["sample_stats"]["log_weight"].values[0]
    np.testing.assert_allclose(log_weight, evidence.expand(DRAWS, ROWS), rtol=0, atol=1e-10)


def test_log_likelihoods_and_joint_density(tree: xr.DataTree) -> None:
    x, observed = holed_data()
    z = torch.tensor(tree["posterior"]["z"].values[0, :, 0])
    lp = exact_vae().prior().log_prob(z)
    for name, p in exact_vae().decode(z).items():
        expected = p.log_prob(x[name].nan_to_num()).where(observed[name], math.nan)
        found = tree["log_likelihood"][name].values[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
        lp = lp + expected.nan_to_num()
    np.testing.assert_allclose(tree["sample_stats"]["lp"].values[0], lp, rtol=0, atol=1e-10)


def test_predictions_match_the_exact_predictive(tree: xr.DataTree) -> None:
    x, observed = holed_data()
    posterior = world().posterior(x, observed)
    for name, weight in world().weights.items():
        loc = posterior.mean @ weight.mT + world().biases[name]
        cov = weight @ posterior.covariance_matrix @ weight.mT
        variance = cov.diagonal(dim1=-2, dim2=-1) + world().scales[name] ** 2
        found = torch.tensor(tree["posterior_predictive"][name].values[0])
        assert ((found.mean(0) - loc) / (variance / DRAWS).sqrt()).abs().max() < 5
        prior = torch.tensor(tree["prior_predictive"][name].values[0])
        variance = weight.square().sum(-1) + world().scales[name] ** 2
        error = (prior.mean(0) - world().biases[name]) / (variance / DRAWS).sqrt()
        assert error.abs().max() < 5


def test_observed_data_show_holes_as_nan(tree: xr.DataTree) -> None:
    x, observed = holed_data()
    for name in x:
        np.testing.assert_array_equal(tree["observed_data"][name].values, x[name])
        np.testing.assert_array_equal(
            tree["constant_data"][f"{name}_observed"].values, observed[name]
        )
    x, observed = holed_data()
    filled = {name: value.nan_to_num(77.0) for name, value in x.items()}
    options = {"num_draws": 3, "num_samples": 0}
    for group in (nan := to_datatree(exact_vae(), x, observed, **options)).children:
        other = to_datatree(exact_vae(), filled, observed, **options)[group]
        xr.testing.assert_equal(nan[group].to_dataset(), other.to_dataset())


def test_estimates_are_the_exact_evidence() -> None:
    tree = to_datatree(exact_vae(), *holed_data(), num_draws=2, num_samples=50)
    evidence = world().log_prob(*holed_data(), of=["image", "label"])
    constant = tree["constant_data"]
    np.testing.assert_allclose(constant["log_prob"].values, evidence, rtol=0, atol=1e-10)
    assert (constant["pareto_k"] == -math.inf).all()


def test_integer_and_absent_modalities() -> None:
    modalities = [
        Modality("touch", (4,), likelihood="bernoulli"),
        Modality("label", (3,), likelihood="one_hot_categorical"),
        Modality("volts", (), likelihood="normal"),
    ]
    vae = MODELS["mvae"](modalities, latent_dim=2)
    x = {"touch": torch.tensor([[1, 0, 0, 1]] * 4), "volts": torch.randn(4)}
    observed = {"touch": torch.tensor([True, False, True, True])}
    tree = to_datatree(vae, x, observed, num_draws=3, num_samples=0)
    assert tree["posterior_predictive"]["label"].shape == (1, 3, 4, 3)
    assert set(tree["observed_data"].data_vars) == {"touch", "volts"}
    assert tree["observed_data"]["touch"].isnull().any("touch_dim_0").values.tolist() == [
        False,
        True,
        False,
        False,
    ]
    assert not tree["constant_data"]["label_observed"].any()
    assert tree["log_likelihood"]["volts"].dims == ("chain", "draw", "row")
    names = ["touch+label+volts", "touch", "label", "volts"]
    names += ["touch+label", "touch+volts", "label+volts"]
    assert tree["posterior"]["subset"].values.tolist() == names


def test_labels_and_chosen_subsets() -> None:
    labels = [f"class {i % 2}" for i in range(ROWS)]
    x, observed = holed_data()
    tree = to_datatree(
        exact_vae(), x, observed, labels=labels, given=[["label"]], num_draws=3, num_samples=0
    )
    assert tree["posterior"]["subset"].values.tolist() == ["image+label", "label"]
    for group in ("posterior", "log_likelihood", "observed_data", "constant_data"):
        assert tree[group]["row_label"].values.tolist() == labels
    assert tree.attrs["model"] == "mvae"
    columns = {"speaker": torch.arange(ROWS), "traits": np.eye(ROWS, 3)}
    tree = to_datatree(exact_vae(), x, observed, labels=columns, num_draws=3, num_samples=0)
    assert tree["posterior"]["row_speaker"].values.tolist() == list(range(ROWS))
    assert tree["posterior"]["row_traits"].dims == ("row", "row_traits_dim_0")
    assert tree.attrs["seed"] == 0


def test_draws_repeat_and_leave_no_trace() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.9))

        def forward(self, value: Tensor) -> Tensor:
            return self.layers(value)

    modalities = [Modality("image", (5,), encoder=Dropping()), Modality("label", (3,))]
    vae = MODELS["mvae"](modalities, latent_dim=2)
    frozen = next(module for module in vae.modules() if isinstance(module, nn.Linear))
    frozen.eval()
    modes = [module.training for module in vae.modules()]
    state = torch.get_rng_state()
    options = {"num_draws": 3, "num_samples": 0}
    first, again = (to_datatree(vae, *holed_data(), seed=3, **options) for _ in range(2))
    other = to_datatree(vae, *holed_data(), seed=4, **options)
    xr.testing.assert_equal(first["posterior"].to_dataset(), again["posterior"].to_dataset())
    assert not first["posterior"]["z"].equals(other["posterior"]["z"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in vae.modules()] == modes
    assert not list(pyro.get_param_store())
    eyes = torch.stack([torch.tensor(t["prior"]["z"].values) for t in (first, other)])
    assert eyes[0].ne(eyes[1]).all()


def test_a_guide_of_ones_own_is_used() -> None:
    def guide(x: dict[str, Tensor], observed: dict[str, Tensor] | None = None) -> None:
        loc = 100.0 * (observed["image"] & observed["label"]).double()
        with pyro.plate("data", len(x["image"]), dim=-1):
            pyro.sample("z", dist.Normal(loc[:, None].expand(-1, 2), 1e-3).to_event(1))

    x, observed = holed_data()
    tree = to_datatree(exact_vae(), x, observed, guide=guide, num_draws=4, num_samples=0)
    z = tree["posterior"]["z"].mean(("chain", "draw", "latent"))
    expected = 100.0 * (observed["image"] & observed["label"])
    np.testing.assert_allclose(z.sel(subset="image+label"), expected, atol=5e-3 / 8**0.5)
    informed = observed["image"].numpy()  # the others hold the prior
    np.testing.assert_allclose(z.sel(subset="image")[informed], 0.0, atol=5e-3 / 8**0.5)
    assert (np.abs(z.sel(subset="image")[~informed]) > 5e-3 / 8**0.5).all()


def biased_guide(x: dict[str, Tensor], observed: dict[str, Tensor] | None = None) -> None:
    """The exact posterior, one deviation away and too wide: its weights are bounded."""
    exact = world().posterior(x, observed)
    scale = exact.variance.sqrt()
    with pyro.plate("data", len(next(iter(x.values()))), dim=-1):
        pyro.sample("z", dist.Normal(exact.mean + scale, 1.4 * scale).to_event(1))


@pytest.mark.parametrize("resampled", [False, True])
def test_resampled_draws_match_the_exact_posterior(resampled: bool) -> None:
    """Those of a biased guide do not, unless they are resampled; under every subset."""
    x, observed = holed_data()
    options = {"num_draws": 1000, "num_samples": 0, "guide": biased_guide}
    tree = to_datatree(exact_vae(), x, observed, resampled=resampled, num_proposals=4000, **options)
    worst = []
    for subset in ("image+label", "image", "label"):
        seen = {name: mask & (name in subset) for name, mask in observed.items()}
        informed = torch.stack(list(seen.values())).any(0)
        exact = world().posterior(x, seen)
        z = torch.tensor(tree["posterior"]["z"].sel(subset=subset, chain=0).values)[:, informed]
        # Errors of the proposals, by their effective number, and of the draw from them.
        share = 1 / 1000
        if resampled:
            ess = tree["constant_data"]["posterior_ess"].sel(subset=subset).values
            share = share + 1 / torch.tensor(ess)[informed, None]
        variance = exact.variance[informed]
        error = (z.mean(0) - exact.mean[informed]) / (variance * share).sqrt()
        spread = (z.var(0) / variance - 1) / (2 * torch.as_tensor(share)).sqrt()
        worst.append(max(float(error.abs().max()), float(spread.abs().max())))
    assert (max(worst) < 5) if resampled else (min(worst) > 10)
    assert tree.attrs["posterior"] == ("importance" if resampled else "guide")
    if resampled:
        k = tree["constant_data"]["posterior_pareto_k"]
        assert k.dims == ("subset", "row")
        assert (k < 0.7).all()
        assert (tree["constant_data"]["posterior_ess"] < 3600).any()


def test_resampled_scores_belong_to_the_resampled_draws() -> None:
    x, observed = holed_data()
    options = {"num_draws": 50, "num_samples": 0, "given": [], "guide": biased_guide}
    tree = to_datatree(exact_vae(), x, observed, resampled=True, num_proposals=200, **options)
    z = torch.tensor(tree["posterior"]["z"].values[0, :, 0])
    for name, p in exact_vae().decode(z).items():
        expected = p.log_prob(x[name].nan_to_num()).where(observed[name], math.nan)
        found = tree["log_likelihood"][name].values[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
    exact = world().posterior(x, observed)
    q = dist.Normal(exact.mean + exact.variance.sqrt(), 1.4 * exact.variance.sqrt()).to_event(1)
    lp = tree["sample_stats"]["lp"].values[0]
    expected = lp - q.log_prob(z).numpy()
    np.testing.assert_allclose(
        tree["sample_stats"]["log_weight"].values[0], expected, rtol=0, atol=1e-10
    )


def test_rows_without_anything_hold_the_prior() -> None:
    x = world().sample(ROWS, seed=1)
    observed = {name: torch.arange(ROWS) % 2 == 0 for name in x}
    for resampled in (False, True):
        options = {"num_draws": 1000, "num_samples": 0, "given": [], "resampled": resampled}
        tree = to_datatree(exact_vae(), x, observed, guide=biased_guide, **options)
        empty = tree.sel(row=slice(1, None, 2), subset="image+label")
        z = empty["posterior"]["z"]
        assert z.sizes["row"] == ROWS // 2
        assert (np.abs(z.mean(("chain", "draw"))) < 5 * (2 / 1000) ** 0.5).all()
        assert (np.abs(z.var(("chain", "draw")) - 1) < 5 * (4 / 1000) ** 0.5).all()
        np.testing.assert_allclose(empty["sample_stats"]["log_weight"], 0.0, atol=1e-10)
        assert empty["log_likelihood"]["joint"].isnull().all()


def test_joint_likelihood_is_the_sum_over_what_a_row_has(tree: xr.DataTree) -> None:
    parts = tree["log_likelihood"].to_dataset()
    both = parts["image"].fillna(0) + parts["label"].fillna(0)
    np.testing.assert_allclose(parts["joint"], both, rtol=0, atol=1e-10)


def test_coordinates_name_modalities_and_members(tree: xr.DataTree) -> None:
    constant = tree["constant_data"]
    assert constant["observed"].dims == ("row", "modality")
    _, observed = holed_data()
    np.testing.assert_array_equal(constant["observed"].sel(modality="image"), observed["image"])
    assert constant["member"].sel(subset="label").values.tolist() == [False, True]
    assert constant["member"].sel(subset="image+label").all()


def test_predictions_from_each_subset(arviz: ModuleType) -> None:
    x, observed = holed_data()
    options = {"num_draws": DRAWS, "num_samples": 0, "given": ["label"]}
    tree = to_datatree(exact_vae(), x, observed, subset_predictive=True, **options)
    found = tree["subset_predictive"]["image"]
    assert found.dims == ("chain", "draw", "subset", "row", "image_dim_0")
    exact = world().posterior(x, {"label": observed["label"], "image": ~observed["label"] & False})
    weight = world().weights["image"]
    loc = exact.mean @ weight.mT + world().biases["image"]
    cov = weight @ exact.covariance_matrix @ weight.mT
    variance = cov.diagonal(dim1=-2, dim2=-1) + world().scales["image"] ** 2
    drawn = torch.tensor(found.sel(subset="label").values[0])
    assert ((drawn.mean(0) - loc) / (variance / DRAWS).sqrt()).abs().max() < 5
    if hasattr(arviz, "from_datatree"):  # a group beside those of the schema
        assert "subset_predictive" in arviz.from_datatree(tree).groups()


def own_pair(**options: Any) -> PyroPair:
    """The world as a Pyro model with a scalar site beside the vector, and its exact guide."""

    def model(x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["image"]), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("offset", dist.Normal(0.0, 1.0))
            for name, weight in world().weights.items():
                loc = z @ weight.mT + world().biases[name]
                p = dist.Normal(loc, world().scales[name]).to_event(1)
                pyro.sample(name, p, obs=x[name])

    def guide(x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        exact = world().posterior(x, observed)
        with pyro.plate("data", len(x["image"]), dim=-1):
            q = dist.MultivariateNormal(exact.mean, exact.covariance_matrix)
            pyro.sample("z", q)
            pyro.sample("offset", dist.Normal(0.0, 1.0))

    modalities = [Modality("image", (5,)), Modality("label", (3,))]
    return PyroPair(model, guide, modalities, title="mine", **options)


def test_a_pair_of_ones_own() -> None:
    x, observed = holed_data()
    tree = to_datatree(own_pair(), x, observed, num_draws=DRAWS, num_samples=0, batch_size=5)
    test_latents_match_the_exact_posterior(tree, "image")
    test_latents_match_the_exact_posterior(tree, "image+label")
    test_every_log_weight_is_the_exact_evidence(tree)
    test_predictions_match_the_exact_predictive(tree)
    test_joint_likelihood_is_the_sum_over_what_a_row_has(tree)
    assert tree["posterior"]["offset"].dims == ("chain", "draw", "subset", "row")
    assert set(tree["prior"].data_vars) == {"z", "offset"}
    assert tree.attrs["title"] == "mine"
    assert tree.attrs["model"] == "PyroPair"
    some = own_pair(subsets=[["image", "label"], ["label"]])
    tree = to_datatree(some, world().sample(ROWS, seed=1), num_draws=2, num_samples=0)
    assert tree["posterior"]["subset"].values.tolist() == ["image+label", "label"]


@pytest.mark.parametrize("name", [n for n, size in CASES if size == 4])
def test_every_model_goes_into_a_tree(name: str) -> None:
    vae = case(name, 4)
    x = batch(vae, 5)
    tree = to_datatree(vae, x, masks(vae, 5), num_draws=2, num_samples=0, given=[])
    assert set(tree["posterior"].data_vars) == set(vae.latent_sites)
    scored = set(vae.modalities) - set(vae.always_given)
    assert set(tree["posterior_predictive"].data_vars) == scored
    joint = tree["log_likelihood"]["joint"]
    empty = ~tree["constant_data"]["observed"].sel(modality=sorted(scored)).any("modality")
    np.testing.assert_array_equal(joint.isnull().all(("chain", "draw")), empty)


def test_progress_is_told() -> None:
    done = []
    options = {"num_draws": 2, "num_samples": 0, "batch_size": 5}
    to_datatree(exact_vae(), *holed_data(), on_progress=lambda *a: done.append(a), **options)
    assert done == [(5, 12), (10, 12), (12, 12)]


def test_netcdf_round_trip(tree: xr.DataTree, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "evaluation.nc"
    save_datatree(tree, path)
    xr.testing.assert_identical(load_datatree(path), tree)
    assert os.listdir(path.parent) == ["evaluation.nc"]


def test_a_failed_write_keeps_the_old_file(
    tree: xr.DataTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "evaluation.nc"
    save_datatree(tree, path)
    before = path.read_bytes()

    def break_off(self: xr.DataTree, filepath: Path, **options: str) -> None:
        filepath.write_bytes(b"half of a")
        raise OSError("no space left on device")

    monkeypatch.setattr(xr.DataTree, "to_netcdf", break_off)
    with pytest.raises(OSError, match="no space left"):
        save_datatree(tree, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["evaluation.nc"]


def test_arviz_reads_it(tree: xr.DataTree, arviz: ModuleType, tmp_path: Path) -> None:
    save_datatree(tree, tmp_path / "evaluation.nc")
    tree = load_datatree(tmp_path / "evaluation.nc")
    coords = {"subset": "image+label", "row": [2, 4]}
    old = hasattr(arviz, "from_datatree")
    data = arviz.from_datatree(tree) if old else tree
    chosen = {"coords": coords} if old else {"coords": coords, "kind": "stats"}
    summary = arviz.summary(data, var_names=["z"], round_to=8 if old else "none", **chosen)
    assert len(summary) == 4
    exact = tree["posterior"]["z"].sel(coords).mean(("chain", "draw")).values.ravel()
    np.testing.assert_allclose(summary["mean"].astype(float), exact, rtol=0, atol=1e-7)
    if old:
        import matplotlib.pyplot as plt

        axes = arviz.plot_forest(data, var_names=["z"], coords=coords)
        assert len(axes[0].get_yticklabels()) == 4
        coords = {"subset": "image+label", "row": 2}
        assert arviz.plot_pair(data, var_names=["z"], coords=coords) is not None
        plt.close("all")


def test_errors(tmp_path: Path) -> None:
    x, observed = holed_data()
    vae = exact_vae()
    with pytest.raises(ValueError, match=r"given: unknown modality 'sound'.*image, label"):
        to_datatree(vae, x, observed, given=[["sound"]])
    with pytest.raises(ValueError, match="given: .*found an empty subset"):
        to_datatree(vae, x, observed, given=[[]])
    with pytest.raises(ValueError, match="num_draws: expected at least 1, found 0"):
        to_datatree(vae, x, observed, num_draws=0)
    with pytest.raises(ValueError, match="num_proposals: expected at least num_draws=100, found 9"):
        to_datatree(vae, x, observed, resampled=True, num_proposals=9)
    with pytest.raises(
        ValueError, match="labels.'label'.: expected one for each of 12 rows, found 3"
    ):
        to_datatree(vae, x, observed, labels=[1, 2, 3])
    row = MODELS["mvae"]([Modality("row", (2,)), Modality("label", (3,))], latent_dim=2)
    with pytest.raises(ValueError, match="modality 'row': expected a name other than chain"):
        to_datatree(row, {"row": torch.zeros(2, 2)})
    (tmp_path / "bad.nc").write_text("no data")
    for name in ("bad.nc", "absent.nc"):
        with pytest.raises(ValueError, match="expected a NetCDF file with groups, found none"):
            load_datatree(tmp_path / name)
