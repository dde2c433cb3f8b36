"""The ArviZ export, against the exact world."""

import importlib
import math
import os
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from mmzoo import Modality
from mmzoo.evaluation.datatree import load_datatree, save_datatree, to_datatree
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
    np.testing.assert_allclose(z.sel(subset="image"), 0 * expected, atol=5e-3 / 8**0.5)


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
    with pytest.raises(ValueError, match=r"given: .*image, label, found unknown modality 'sound'"):
        to_datatree(vae, x, observed, given=[["sound"]])
    with pytest.raises(ValueError, match="given: .*found an empty subset"):
        to_datatree(vae, x, observed, given=[[]])
    with pytest.raises(ValueError, match="num_draws: expected at least 1, found 0"):
        to_datatree(vae, x, observed, num_draws=0)
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
