r"""Quality of what is generated: squared error, structural similarity, Fréchet distance.

Structural similarity compares means, variances and covariance under a sliding Gaussian window,

    SSIM(x, y) = (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2)).

The Fréchet distance between Gaussians, here of features of images, is

    d^2 = |m_1 - m_2|^2 + tr(S_1) + tr(S_2) - 2 tr((S_1^(1/2) S_2 S_1^(1/2))^(1/2)).

`Image Quality Assessment (Wang et al., 2004)`, https://doi.org/10.1109/TIP.2003.819861
`GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium
(Heusel et al., 2017)`, https://arxiv.org/abs/1706.08500
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from mmzoo.data import MultimodalDataset
from mmzoo.evaluation.pair import Pair, device_of, quiet, subset_name
from mmzoo.evaluation.rowwise import (
    Progress,
    as_rows,
    check_sizes,
    decode_rows,
    decoded_value,
    mean_and_error,
    subsets_of,
    unanswered,
)
from mmzoo.modality import Modality

__all__ = [
    "frechet_distance",
    "gaussian_frechet_distance",
    "reconstruction",
    "ssim",
    "torchvision_features",
]

_UNIT_RANGE = ("bernoulli", "continuous_bernoulli")
_K1, _K2 = 0.01, 0.03  # of Wang et al.
_BLOCK = 256


def reconstruction(
    pair: Pair,
    data: MultimodalDataset | Mapping[str, Tensor],
    *,
    observed: Mapping[str, Tensor] | None = None,
    given: Sequence[str | Sequence[str]] | str | None = None,
    num_draws: int = 1,
    pool: bool = False,
    data_range: Mapping[str, float] | None = None,
    window_size: int = 11,
    batch_size: int = 256,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> xr.Dataset:
    """Error of every modality generated from every subset: MSE, and SSIM for images.

    Compared is the mean of ``p(x_m | z)`` with ``z ~ q(z | x_S)``; a class label is compared as
    its one-hot vector with the probabilities. A row counts where it has the subset and the target.

    Args:
        pair: The pair.
        data: The rows: a data set, or name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``; of a data set its own.
        given: Subsets, each a name or several names; default: all.
        num_draws: K, draws of z for each row, whose errors are averaged.
        pool: Whether to average the K generated means first and compare their mean.
        data_range: Name to the largest minus the smallest possible value, for SSIM; default: 1 for
            Bernoulli images, what the rows span for others.
        window_size: Of SSIM; smaller images get the largest odd window that fits.
        batch_size: Rows at a time; memory goes with this number times K.
        seed: Of the draws.
        on_progress: Called with the batches done and in all.

    Returns:
        Over ``subset`` and ``target``: ``mse`` (mean over entries), ``ssim`` (NaN where the target
        is no image), each with its ``…_standard_error`` over rows, ``num_rows``, ``cross`` (the
        target is not in the subset). Over ``subset``: ``note``, why one is empty.
    """
    check_sizes("reconstruction", num_draws=num_draws, batch_size=batch_size)
    rows = as_rows(pair, data, observed, "reconstruction")
    subsets = subsets_of(pair, given, "reconstruction")
    targets = [n for n in pair.modalities if n not in pair.always_given and n in rows.x]
    ranges = _ranges(pair, rows.x, rows.masks, data_range)
    note = [unanswered(pair, subset) or "" for subset in subsets]
    index = [
        rows.having(subset).nonzero().squeeze(-1) if not reason else torch.empty(0)
        for subset, reason in zip(subsets, note, strict=True)
    ]
    total = sum(-(-len(part) // batch_size) for part in index)
    found = np.full((2, len(subsets), len(targets), rows.num_rows), np.nan)
    done, device = 0, device_of(pair)
    for s, subset in enumerate(subsets):
        if not len(index[s]):
            continue
        with quiet(pair, seed):
            for part in index[s].split(batch_size):
                fns = decode_rows(pair, rows.take(subset, part, device), num_draws)
                for t, name in enumerate(targets):
                    has = rows.masks[name].cpu()[part]
                    if not has.any():
                        continue
                    truth = rows.take([name], part[has], device)[name]
                    errors = _errors(
                        pair.modalities[name],
                        _chosen(fns[name], has.to(device), pool=pool),
                        truth,
                        ranges.get(name),
                        window_size,
                    )
                    found[:, s, t, part[has].numpy()] = errors
                done += 1
                if on_progress:
                    on_progress(done, total)
    cells = np.array([[[mean_and_error(v) for v in row] for row in each] for each in found])
    cell = ("subset", "target")
    return xr.Dataset(
        {
            "mse": (cell, cells[0, ..., 0]),
            "mse_standard_error": (cell, cells[0, ..., 1]),
            "ssim": (cell, cells[1, ..., 0]),
            "ssim_standard_error": (cell, cells[1, ..., 1]),
            "num_rows": (cell, cells[0, ..., 2].astype(int)),
            "cross": (cell, np.array([[t not in s for t in targets] for s in subsets])),
            "note": ("subset", np.array(note, dtype=str)),
        },
        coords={"subset": [subset_name(each) for each in subsets], "target": targets},
        attrs={
            "num_draws": num_draws,
            "pool": int(pool),
            "units": "mse: squared units of the modality; ssim: 1 is identity",
            "pair": pair.title,
            "seed": seed,
        },
    )


def ssim(
    x: Tensor,
    y: Tensor,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
) -> Tensor:
    """Mean structural similarity of images, over channels and windows inside the image.

    Args:
        x: Images ``(*, C, height, width)``.
        y: Images that broadcast with them.
        data_range: Largest minus smallest possible value.
        window_size: Odd width of the window; smaller images get the largest odd one that fits.
        sigma: Standard deviation of the Gaussian window in pixels.

    Returns:
        ``(*)``, 1 for equal images.

    Raises:
        ValueError: For something that is no image, an even window or a range that is not positive.
    """
    if x.dim() < 3 or y.dim() < 3 or x.shape[-3:] != y.shape[-3:]:
        raise ValueError(
            "ssim: expected two batches of images (*, C, height, width), found shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"ssim window_size: expected an odd positive number, found {window_size}")
    if not data_range > 0:
        raise ValueError(f"ssim data_range: expected a positive number, found {data_range}")
    lead = torch.broadcast_shapes(x.shape[:-3], y.shape[:-3])
    shape = x.shape[-3:]
    x, y = (each.expand(*lead, *shape).reshape(-1, 1, *shape[1:]) for each in (x, y))
    size = min(window_size, *(side - 1 + side % 2 for side in shape[1:]))
    steps = torch.arange(size, dtype=x.dtype, device=x.device) - (size - 1) / 2
    window = torch.exp(-0.5 * (steps / sigma).square())
    window = window / window.sum()

    def local(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    m_x, m_y = local(x), local(y)
    s_xx, s_yy, s_xy = local(x * x) - m_x**2, local(y * y) - m_y**2, local(x * y) - m_x * m_y
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    found = (2 * m_x * m_y + c1) * (2 * s_xy + c2)
    found = found / ((m_x**2 + m_y**2 + c1) * (s_xx + s_yy + c2))
    return found.flatten(1).mean(-1).reshape(*lead, shape[0]).mean(-1)


def frechet_distance(
    real: Tensor,
    generated: Tensor,
    features: Callable[[Tensor], Tensor] | None = None,
    *,
    num_sizes: int = 0,
    batch_size: int = _BLOCK,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> xr.Dataset:
    """Squared Fréchet distance between Gaussians fitted to features of two samples.

    The estimate is too large by about a constant over the number of rows: compare models with
    samples of the same size, or look at ``extrapolated``, the limit of infinite samples by a
    straight line in 1 / N, as in `Effectively Unbiased FID (Chong & Forsyth, 2020)`,
    https://arxiv.org/abs/1911.07023

    Args:
        real: Rows ``(N, ...)``.
        generated: Rows ``(N', ...)``.
        features: From rows to features ``(n, D)``; None: the rows are features.
        num_sizes: Smaller samples for the extrapolation, N / 2 to N rows of each; 0: none.
        batch_size: Rows that `features` gets at a time.
        seed: Of these samples.
        on_progress: Called with the rows done and in all.

    Returns:
        ``distance``, its parts ``of_means`` and ``of_covariances``, ``extrapolated`` with
        ``extrapolated_standard_error`` (of the straight line alone), and ``bias``, the difference.

    Raises:
        ValueError: For fewer than two rows, or features that are no finite ``(n, D)``.
    """
    check_sizes("frechet_distance", batch_size=batch_size)
    if num_sizes not in (0, *range(3, 1000)):
        raise ValueError(f"frechet_distance num_sizes: expected 0 or at least 3, found {num_sizes}")
    total = len(real) + len(generated)
    one, other = (
        _features(rows, features, batch_size, on_progress, start, total, name)
        for rows, start, name in ((real, 0, "real"), (generated, len(real), "generated"))
    )
    if one.shape[1] != other.shape[1]:
        raise ValueError(
            f"frechet_distance: expected as many features of both, found {one.shape[1]} and "
            f"{other.shape[1]}"
        )
    means, covariances = _parts(one, other)
    limit, error = _extrapolated(one, other, num_sizes, seed) if num_sizes else (np.nan, np.nan)
    return xr.Dataset(
        {
            "distance": means + covariances,
            "of_means": means,
            "of_covariances": covariances,
            "extrapolated": limit,
            "extrapolated_standard_error": error,
            "bias": means + covariances - limit,
        },
        attrs={
            "num_real": len(one),
            "num_generated": len(other),
            "num_features": one.shape[1],
            "units": "squared units of the features",
            "seed": seed,
        },
    )


def gaussian_frechet_distance(
    loc: np.ndarray, covariance: np.ndarray, other_loc: np.ndarray, other_covariance: np.ndarray
) -> float:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians, in closed form.

    ``tr((S_1^(1/2) S_2 S_1^(1/2))^(1/2))`` is the sum of the singular values of
    ``S_1^(1/2) S_2^(1/2)``, which is symmetric in the two and stable for singular covariances.

    Args:
        loc: Mean ``(D,)``.
        covariance: ``(D, D)``, positive semi-definite.
        other_loc: Mean of the other one.
        other_covariance: Its covariance.
    """
    means = float(np.square(np.asarray(loc) - np.asarray(other_loc)).sum())
    return means + _of_covariances(np.asarray(covariance), np.asarray(other_covariance))


def torchvision_features(
    name: Literal["inception_v3", "resnet18"], weights_path: str | os.PathLike[str]
) -> nn.Module:
    """A network of torchvision up to its last layer, with weights that you have as a file.

    Takes images ``(N, C, height, width)`` in [0, 1], C being 1 or 3, and scales them bilinearly to
    the size that the network was trained with. Inception's features are those of torchvision's
    weights, whose distances are not comparable to published ones (other weights, other scaling).

    Args:
        name: ``"inception_v3"`` (2048 features) or ``"resnet18"`` (512).
        weights_path: A state dict of this network, ``.safetensors`` or of ``torch.save``; nothing
            but tensors is unpickled.

    Raises:
        ValueError: For an unknown network, or a file that is missing or does not fit.
    """
    if name not in _NETWORKS:
        raise ValueError(
            f"torchvision_features: unknown network {name!r}; known: {', '.join(_NETWORKS)}"
        )
    return _TorchvisionFeatures(name, _read_weights(Path(weights_path), name))


# Name to size of its images, mean and scale of its pixels.
_NETWORKS: dict[str, tuple[int, tuple[float, ...], tuple[float, ...]]] = {
    "inception_v3": (299, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "resnet18": (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class _TorchvisionFeatures(nn.Module):
    """Images in [0, 1] to the features below the last layer."""

    loc: Tensor
    scale: Tensor

    def __init__(self, name: str, weights: Mapping[str, Tensor]) -> None:
        from torchvision import models

        super().__init__()
        self.size, loc, scale = _NETWORKS[name]
        if name == "inception_v3":
            network = models.inception_v3(weights=None, init_weights=False, aux_logits=True)
        else:
            network = models.resnet18(weights=None)
        try:
            network.load_state_dict(weights)
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"torchvision_features: expected the weights of torchvision's {name}, found others "
                f"({reason}); give the file of this network's state dict"
            ) from error
        network.fc = nn.Identity()
        self.network = network
        self.register_buffer("loc", torch.tensor(loc).view(-1, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                "torchvision_features: expected images (N, 1 or 3, height, width), found shape "
                f"{tuple(images.shape)}"
            )
        images = images.to(self.loc).expand(-1, 3, -1, -1)
        size = (self.size, self.size)
        images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return self.network((images - self.loc) / self.scale)

    def train(self, mode: bool = True) -> _TorchvisionFeatures:
        """Stays in evaluation mode, whose features are those of one image alone."""
        return super().train(False)


def _read_weights(path: Path, name: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"torchvision_features {path}: expected the weights of {name}, found no such file; "
            "nothing is downloaded, so fetch them yourself and give their path"
        )
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"torchvision_features {path}: expected a state dict of tensors, found a file that "
            f"holds none ({reason}); save network.state_dict()"
        ) from error


def _chosen(fn: TorchDistribution, has: Tensor, *, pool: bool) -> Tensor:
    """Generated means of some rows, ``(K, n, *event)``, or their mean over draws, ``(1, n, …)``."""
    value = decoded_value(fn, mean=True)[:, has]
    return value.mean(0, keepdim=True) if pool else value


def _errors(
    modality: Modality, value: Tensor, truth: Tensor, data_range: float | None, window_size: int
) -> np.ndarray:
    """MSE and SSIM of each row, ``(2, n)``."""
    if value.dim() > truth.dim() + 1:  # probabilities of classes
        truth = F.one_hot(truth.long(), value.shape[-1])
    truth = truth.to(value.dtype)
    squares = (value - truth).square()
    if modality.entrywise_missing:
        squares = torch.where(truth.isnan(), torch.nan, squares)
        mse = squares.flatten(2).nanmean(-1) if squares.dim() > 2 else squares
    else:
        mse = squares.flatten(2).mean(-1) if squares.dim() > 2 else squares
    similar = torch.full_like(mse, torch.nan)
    if data_range is not None:
        similar = ssim(value, truth, data_range=data_range, window_size=window_size)
    return torch.stack([mse.mean(0), similar.mean(0)]).double().cpu().numpy()


def _ranges(
    pair: Pair,
    x: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    given: Mapping[str, float] | None,
) -> dict[str, float]:
    """Range of the values of each image."""
    images = {
        name for name in x if len(pair.modalities[name].event_shape) == 3 and masks[name].any()
    }
    if unknown := [name for name in given or {} if name not in images]:
        raise ValueError(
            f"reconstruction data_range: expected names of images, {', '.join(sorted(images))}, "
            f"found {unknown}"
        )
    found = {}
    for name in images:
        if given and name in given:
            found[name] = given[name]
        elif pair.modalities[name].likelihood.name in _UNIT_RANGE:
            found[name] = 1.0
        else:
            seen = x[name][masks[name]]
            seen = seen[~seen.isnan()]
            found[name] = float(seen.max() - seen.min()) or 1.0
    return found


@torch.no_grad()
def _features(
    rows: Tensor,
    features: Callable[[Tensor], Tensor] | None,
    batch_size: int,
    on_progress: Progress | None,
    start: int,
    total: int,
    name: str,
) -> np.ndarray:
    """Features ``(N, D)`` in double precision, a batch at a time."""
    if not isinstance(rows, Tensor) or rows.dim() < 2 or len(rows) < 2:
        shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(
            f"frechet_distance {name}: expected a tensor of at least two rows (N, …), found {shape}"
        )
    parts = []
    for done in range(0, len(rows), batch_size):
        part = rows[done : done + batch_size]
        parts.append((part if features is None else features(part)).detach().double().cpu().numpy())
        if on_progress:
            on_progress(start + done + len(part), total)
    found = np.concatenate(parts)
    if found.ndim != 2 or len(found) != len(rows) or not np.isfinite(found).all():
        raise ValueError(
            f"frechet_distance {name}: expected finite features ({len(rows)}, D), found shape "
            f"{found.shape}; flatten them"
        )
    return found


def _parts(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Distance of the means and of the covariances."""
    means = float(np.square(one.mean(0) - other.mean(0)).sum())
    return means, _of_covariances(_covariance(one), _covariance(other))


def _covariance(rows: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(rows, rowvar=False))


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


def _of_covariances(one: np.ndarray, other: np.ndarray) -> float:
    overlap = np.linalg.svd(_root(one) @ _root(other), compute_uv=False).sum()
    return float(max(np.trace(one) + np.trace(other) - 2 * overlap, 0.0))


def _extrapolated(
    one: np.ndarray, other: np.ndarray, num_sizes: int, seed: int
) -> tuple[float, float]:
    """Intercept of a straight line in 1 / N and its standard error."""
    random = np.random.default_rng(seed)
    shares = np.linspace(0.5, 1.0, num_sizes)
    found = []
    for share in shares:
        parts = (
            rows[random.permutation(len(rows))[: max(2, round(share * len(rows)))]]
            for rows in (one, other)
        )
        found.append(sum(_parts(*parts)))
    design = np.stack([np.ones(num_sizes), 1 / shares], -1)
    (intercept, slope), *_ = np.linalg.lstsq(design, np.array(found), rcond=None)
    residual = np.array(found) - design @ np.array([intercept, slope])
    variance = np.square(residual).sum() / (num_sizes - 2)
    return float(intercept), float(np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0]))
