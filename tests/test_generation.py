"""Reconstruction, structural similarity and Fréchet distance where the answer is known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from own import own_pair
from torch import Tensor, nn

from mmzoo import Modality
from mmzoo.data import MultimodalDataset
from mmzoo.evaluation.generation import (
    frechet_distance,
    gaussian_frechet_distance,
    reconstruction,
    ssim,
    torchvision_features,
)
from mmzoo.exact import LinearGaussianWorld
from mmzoo.likelihoods import Categorical
from mmzoo.models import MODELS, MVAE

ERRORS = 5.0
SIZES = {"a": 3, "b": 2}


def exact_mse(
    world: LinearGaussianWorld, x: dict[str, Tensor], subset: list[str], target: str, draws: float
) -> Tensor:
    """E over draws of the squared error of the mean over `draws` generated means, ``(N,)``."""
    q = world.posterior({name: x[name] for name in subset})
    weight = world.weights[target]
    bias = x[target] - (q.mean @ weight.mT + world.biases[target])
    spread = (weight @ q.covariance_matrix @ weight.mT).diagonal(dim1=-2, dim2=-1)
    return (bias.square() + spread / draws).mean(-1)


@pytest.mark.parametrize("pool", [False, True])
def test_mse_is_the_exact_one(pool: bool) -> None:
    world = LinearGaussianWorld.random(SIZES, latent_dim=2, seed=3)
    x = world.sample(100, seed=1)
    pair = own_pair(world)
    options = {"num_draws": 10, "pool": pool}
    runs = xr.concat([reconstruction(pair, x, seed=s, **options).mse for s in range(20)], "run")
    error = runs.std("run", ddof=1) / np.sqrt(20)
    found = reconstruction(pair, x, **options)
    for subset in (["a"], ["b"], ["a", "b"]):
        for target in SIZES:
            exact, other = (
                exact_mse(world, x, subset, target, 10 if each else 1) for each in (pool, not pool)
            )
            where = {"subset": "+".join(subset), "target": target}
            tolerance = ERRORS * error.sel(where).item()
            assert abs(runs.sel(where).mean().item() - float(exact.mean())) < tolerance
            assert abs(runs.sel(where).mean().item() - float(other.mean())) > tolerance
            rows = found.mse_standard_error.sel(where).item()
            assert rows == pytest.approx(float(exact.std() / 10), rel=0.5)
    assert found.ssim.isnull().all()
    assert found.cross.sel(subset="a").values.tolist() == [False, True]


def test_masks_are_respected_and_filler_is_never_seen() -> None:
    world = LinearGaussianWorld.random(SIZES, latent_dim=2, seed=3)
    x = world.sample(30, seed=1)
    observed = {"a": torch.arange(30) % 3 != 0, "b": torch.arange(30) % 5 != 0}
    holes = {name: value.clone() for name, value in x.items()}
    for name, mask in observed.items():
        holes[name][~mask] = torch.nan
    found = reconstruction(own_pair(world), holes, observed=observed)
    both = int((observed["a"] & observed["b"]).sum())
    assert found.num_rows.values.tolist() == [[20, both], [both, 24], [both, both]]
    assert found.mse.notnull().all()
    again = reconstruction(own_pair(world), holes, observed=observed)
    xr.testing.assert_identical(found, again)


def test_labels_are_compared_with_their_probabilities() -> None:
    parts = [Modality("x", (2,)), Modality("label", (), Categorical(3))]
    vae = MVAE(parts, 2)
    decoder = vae.generative.decoders["label_"]
    for parameter in decoder.parameters():
        nn.init.zeros_(parameter)  # every class is as likely
    x = {"x": torch.randn(8, 2), "label": torch.arange(8) % 3}
    found = reconstruction(vae, x, given=["x"])
    brier = ((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 3
    assert found.mse.sel(target="label").item() == pytest.approx(brier)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("vae", "linear")])
def test_every_model_of_the_zoo(name: str) -> None:
    parts = [Modality("x", (1, 8, 8), "bernoulli"), Modality("y", (4,), "one_hot_categorical")]
    options = {"condition": "y"} if name == "cvae" else {}
    vae = MODELS[name](parts, 2, **options)
    x = {"x": torch.rand(5, 1, 8, 8).round(), "y": F.one_hot(torch.arange(5) % 4, 4).double()}
    found = reconstruction(vae, x)
    answered = found.note == ""
    assert bool(answered.all()) == (name != "jointvae")
    assert (found.ssim.sel(target="x").notnull() == answered).all()
    assert (abs(found.ssim.sel(target="x")[answered]) < 1).all()


def test_ssim_of_constants_is_the_formula() -> None:
    x, y = torch.full((2, 1, 16, 16), 0.3), torch.full((2, 1, 16, 16), 0.7)
    c1 = 0.01**2
    expected = (2 * 0.3 * 0.7 + c1) / (0.3**2 + 0.7**2 + c1)
    torch.testing.assert_close(ssim(x, y), torch.full((2,), expected))
    wide = ssim(255 * x, 255 * y, data_range=255.0)
    torch.testing.assert_close(wide, torch.full((2,), expected))


def test_ssim_in_one_window_is_computed_by_hand() -> None:
    random = np.random.default_rng(0)
    x, y = random.random((2, 2, 11, 11))
    steps = np.arange(11) - 5
    weight = np.exp(-(steps**2) / (2 * 1.5**2))
    weight = np.outer(weight, weight) / weight.sum() ** 2
    by_channel = []
    for one, other in zip(x, y, strict=True):
        m_x, m_y = (weight * one).sum(), (weight * other).sum()
        s_x, s_y = (weight * (one - m_x) ** 2).sum(), (weight * (other - m_y) ** 2).sum()
        s_xy = (weight * (one - m_x) * (other - m_y)).sum()
        c1, c2 = 0.01**2, 0.03**2
        top = (2 * m_x * m_y + c1) * (2 * s_xy + c2)
        by_channel.append(top / ((m_x**2 + m_y**2 + c1) * (s_x + s_y + c2)))
    found = ssim(torch.as_tensor(x)[None], torch.as_tensor(y)[None])
    assert found.item() == pytest.approx(np.mean(by_channel), abs=1e-12)


def test_ssim_slides_over_the_image() -> None:
    """Windows inside the image, each on its own; shapes with leading dimensions broadcast."""
    x, y = torch.rand(3, 1, 12, 11), torch.rand(3, 1, 12, 11)
    parts = [ssim(x[..., i : i + 11, :], y[..., i : i + 11, :]) for i in (0, 1)]
    torch.testing.assert_close(ssim(x, y), torch.stack(parts).mean(0))
    assert ssim(x.expand(4, 3, 1, 12, 11), y).shape == (4, 3)
    torch.testing.assert_close(ssim(x, x), torch.ones(3))
    torch.testing.assert_close(ssim(x, y), ssim(y, x))
    assert (ssim(x, 1 - x) < 0).all()  # the covariance changes sign
    small = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(ssim(*small), ssim(*small, window_size=7))


def test_ssim_reaches_the_table() -> None:
    parts = [Modality("x", (1, 8, 8), "bernoulli"), Modality("y", (2,))]
    vae = MVAE(parts, 2)
    decoder = vae.generative.decoders["x_"]
    for parameter in decoder.parameters():
        nn.init.zeros_(parameter)  # grey everywhere
    x = {"x": torch.rand(4, 1, 8, 8).round(), "y": torch.randn(4, 2)}
    found = reconstruction(vae, x, given=["y"])
    exact = ssim(torch.full_like(x["x"], 0.5), x["x"]).mean()
    assert found.ssim.sel(target="x").item() == pytest.approx(float(exact))
    other = reconstruction(vae, x, given=["y"], data_range={"x": 2.0})
    assert other.ssim.sel(target="x").item() != found.ssim.sel(target="x").item()


# Fréchet distance -----------------------------------------------------------------------------


def covariance(size: int, seed: int, rank: int | None = None) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((size, rank or size))
    return root @ root.T


def test_distance_of_commuting_gaussians_is_by_dimension() -> None:
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))
    one, other = np.array([1.0, 4.0, 9.0, 0.0]), np.array([4.0, 4.0, 1.0, 2.0])
    loc = np.array([1.0, 2.0, 0.0, 0.0])
    found = gaussian_frechet_distance(
        loc, (basis * one) @ basis.T, np.zeros(4), (basis * other) @ basis.T
    )
    assert found == pytest.approx(5.0 + np.square(np.sqrt(one) - np.sqrt(other)).sum())


def test_distance_is_that_of_the_matrix_square_root_and_symmetric() -> None:
    from scipy.linalg import sqrtm

    one, other = covariance(5, 1), covariance(5, 2)
    zero = np.zeros(5)
    expected = np.trace(one + other - 2 * np.real(sqrtm(one @ other)))
    assert gaussian_frechet_distance(zero, one, zero, other) == pytest.approx(expected)
    back = gaussian_frechet_distance(zero, other, zero, one)
    assert back == pytest.approx(expected, rel=1e-12)
    flat = covariance(5, 3, rank=2)  # singular: no complex numbers, no blow-up
    assert gaussian_frechet_distance(zero, flat, zero, flat) == pytest.approx(0.0, abs=1e-6)


def test_sample_distance_is_zero_on_itself_and_the_gaussian_one_otherwise() -> None:
    rng = torch.Generator().manual_seed(0)
    real, other = torch.randn(200, 3, generator=rng), torch.randn(150, 3, generator=rng) * 2 + 1
    assert frechet_distance(real, real).distance.item() == pytest.approx(0.0, abs=1e-6)
    found, back = frechet_distance(real, other), frechet_distance(other, real)
    exact = gaussian_frechet_distance(
        real.mean(0).numpy(), real.T.cov().numpy(), other.mean(0).numpy(), other.T.cov().numpy()
    )
    assert found.distance.item() == pytest.approx(exact)
    assert found.distance.item() == pytest.approx(back.distance.item())
    parts = found.of_means.item() + found.of_covariances.item()
    assert found.distance.item() == pytest.approx(parts)
    assert np.isnan(found.extrapolated.item())


def test_extrapolation_removes_the_bias_of_small_samples() -> None:
    """Two samples of one Gaussian are at distance 0; the estimate is of order D^2 / N above it."""
    runs = []
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        pair = (torch.randn(120, 8, generator=rng) for _ in range(2))
        found = frechet_distance(*pair, num_sizes=8, seed=seed)
        runs.append((found.distance.item(), found.extrapolated.item()))
        assert found.bias.item() == pytest.approx(runs[-1][0] - runs[-1][1])
    (plain, limit), errors = np.mean(runs, 0), np.std(runs, 0, ddof=1) / np.sqrt(20)
    assert plain > ERRORS * errors[0]
    assert abs(limit) < 0.25 * plain


def test_features_come_in_batches() -> None:
    told, sizes = [], []

    def features(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows.flatten(1)[:, :3]

    real, other = torch.randn(70, 2, 4), torch.randn(50, 2, 4)
    found = frechet_distance(
        real, other, features, batch_size=30, on_progress=lambda *count: told.append(count)
    )
    plain = frechet_distance(real.flatten(1)[:, :3], other.flatten(1)[:, :3])
    assert found.distance.item() == plain.distance.item()
    assert sizes == [30, 30, 10, 30, 20] and told[-1] == (120, 120)
    assert told[2] == (70, 120)


def normalised(images: Tensor, size: int, mean: list[float], scale: list[float]) -> Tensor:
    images = images.expand(-1, 3, -1, -1)
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    loc, width = (torch.tensor(each).view(-1, 1, 1) for each in (mean, scale))
    return (images - loc) / width


def test_features_of_torchvision_need_a_file_with_their_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torchvision import models

    network = models.resnet18(weights=None)
    save_file(network.state_dict(), tmp_path / "resnet.safetensors")
    features = torchvision_features("resnet18", tmp_path / "resnet.safetensors")
    images = torch.rand(1, 1, 16, 16)
    network.fc = nn.Identity()
    inputs = normalised(images, 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    found = features.train()(images)  # stays in evaluation mode
    assert found.shape == (1, 512)
    torch.testing.assert_close(network.eval()(inputs), found)
    with pytest.raises(ValueError, match="1 or 3, height, width"):
        features(torch.rand(1, 2, 16, 16))


@pytest.mark.slow
def test_inception_reads_what_torch_saves(tmp_path: Path) -> None:
    from torchvision import models

    network = models.inception_v3(weights=None, init_weights=False, aux_logits=True)
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    images = torch.rand(1, 3, 32, 32)
    network.fc = nn.Identity()
    inputs = normalised(images, 299, [0.5] * 3, [0.5] * 3)
    found = torchvision_features("inception_v3", tmp_path / "inception.pth")(images)
    assert found.shape == (1, 2048)
    torch.testing.assert_close(network.eval()(inputs), found)


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("unpickled",)


def test_bad_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="unknown network 'vgg'; known: inception_v3, resnet18"):
        torchvision_features("vgg", tmp_path / "x.pth")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found no such file; nothing is downloaded"):
        torchvision_features("resnet18", tmp_path / "x.pth")
    torch.save({"layer": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected the weights of torchvision's resnet18"):
        torchvision_features("resnet18", tmp_path / "other.pth")
    torch.save({"layer": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        torchvision_features("resnet18", tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        torchvision_features("resnet18", tmp_path / "broken.safetensors")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"images \(\*, C, height, width\), found shapes"):
        ssim(torch.zeros(8, 8), torch.zeros(8, 8))
    with pytest.raises(ValueError, match="odd positive number, found 4"):
        ssim(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), window_size=4)
    with pytest.raises(ValueError, match="data_range: expected a positive number, found 0"):
        ssim(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), data_range=0)
    with pytest.raises(ValueError, match=r"real: .* at least two rows .*found \(1, 3\)"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="as many features of both, found 3 and 2"):
        frechet_distance(torch.zeros(5, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="generated: expected finite features"):
        frechet_distance(torch.zeros(5, 3), torch.full((5, 3), math.nan))
    with pytest.raises(ValueError, match="num_sizes: expected 0 or at least 3, found 2"):
        frechet_distance(torch.zeros(5, 3), torch.zeros(5, 3), num_sizes=2)
    parts = [Modality("x", (2,)), Modality("y", (2,))]
    vae, x = MVAE(parts, 2), {"x": torch.zeros(4, 2), "y": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match="data_range: expected names of images"):
        reconstruction(vae, x, data_range={"x": 1.0})
    with pytest.raises(ValueError, match="batch_size of at least 1, found 0"):
        reconstruction(vae, x, batch_size=0)
    with pytest.raises(ValueError, match="use dataset.with_observed"):
        reconstruction(vae, MultimodalDataset(x), observed={})
