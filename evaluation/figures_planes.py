"""Pictures of latents in a plane, a panel for each observed subset.

House style, colours and conventions are those of :mod:`mmzoo.evaluation.figures_style`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmzoo.evaluation.figures_samples import (
    Values,
    _check_names,
    _each_and_all,
    _first_rows,
)
from mmzoo.evaluation.figures_style import (
    _GREY,
    Style,
    _darker,
    _despine,
    _new_figure,
    _palette,
    _style,
)
from mmzoo.evaluation.pair import Pair, draw_latents

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["plot_latent_plane"]

_MAX_LEGEND_CLASSES = 20


def plot_latent_plane(
    vae: Pair,
    x: Values,
    labels: Sequence[Any] | np.ndarray | Tensor,
    observed: Values | None = None,
    *,
    subsets: Sequence[Sequence[str]] | None = None,
    site: str | None = None,
    method: str = "pca",
    max_rows: int = 2000,
    seed: int = 0,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Latents of every observed subset in one plane, coloured by class.

    One draw of the latent for each row. The plane is that of all subsets together: of their two
    largest principal components, or a t-SNE embedding of them, in which neighbours stay neighbours
    but distances, sizes and places of clusters mean nothing. A latent of two dimensions is drawn
    as it is. Rows that lack a subset's modality are left out of its panel. A class is named at the
    median of its rows, where there is room for it.

    `Visualizing data using t-SNE (van der Maaten & Hinton, 2008)`,
    https://www.jmlr.org/papers/v9/vandermaaten08a.html

    Args:
        vae: The model, or a pair of your own.
        x: Name to values `(N, *event_shape)`.
        labels: Class of each row, or a number, `(N,)`; a row whose label is NaN or None is grey.
        observed: Name to bool mask `(N,)`.
        subsets: Subsets of modalities; by default each alone, then all.
        site: The latent site; by default the first.
        method: "pca" or "tsne"; the latter takes seconds for a thousand points.
        max_rows: The first so many rows are drawn.
        seed: Seed of the draws; the global random state is left as it was.
        figure: Where to draw.
    """
    names = [name for name in vae.modalities if name in x]
    subsets = _each_and_all(vae, names) if subsets is None else subsets
    subsets = [[each] if isinstance(each, str) else list(each) for each in subsets]
    _check_names(vae, [name for each in subsets for name in each], "subsets")
    labels = np.asarray(labels)
    _check_labels(labels, len(next(iter(x.values()))))
    x, observed = _first_rows(vae, x, observed, max_rows)
    labels = labels[:max_rows]
    site = _check_site(vae, site)
    found = [_latents(vae, x, observed, each, site, seed + i) for i, each in enumerate(subsets)]
    points, axis_names = _plane([z[rows] for z, rows in found], site, method, seed)
    span = np.ptp(np.concatenate(points), axis=0) + 1e-12  # the panels share their axes
    columns = min(4, len(subsets))
    lines = math.ceil(len(subsets) / columns)
    with _style():
        figure = _new_figure(2.9 * columns + 0.9, 2.9 * lines + 0.3) if figure is None else figure
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for ax, subset, each, (_, rows) in zip(grid.ravel(), subsets, points, found, strict=False):
            handles = _scatter(ax, each, labels[rows], labels, span)
            ax.set_title("given " + " + ".join(subset))
        for ax in grid.ravel()[len(subsets) :]:
            ax.set_axis_off()
        for ax in grid[-1]:
            ax.set_xlabel(axis_names[0])
        for ax in grid[:, 0]:
            ax.set_ylabel(axis_names[1])
        _plane_legend(figure, grid, handles)
    return figure


def _check_labels(labels: np.ndarray, rows: int) -> None:
    if labels.ndim != 1:
        raise ValueError(
            f"labels: expected shape ({rows},), found {labels.shape}; pass the class of each row, "
            "such as onehot.argmax(-1)"
        )
    if len(labels) != rows:
        raise ValueError(
            f"labels: expected one for each of {rows} rows, found {len(labels)}; "
            "pass the labels of the same rows"
        )


def _check_site(vae: Pair, site: str | None) -> str:
    if site is not None and site not in vae.latent_sites:
        raise ValueError(
            f"site: expected one of {', '.join(vae.latent_sites)}, found {site!r}; "
            "name a latent of the model"
        )
    return vae.latent_sites[0] if site is None else site


def _latents(
    vae: Pair, x: Values, observed: Values, subset: Sequence[str], site: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A draw of a latent for each row (N, D), and the rows that have something of the subset."""
    z = draw_latents(vae, x, observed, given=subset, num_draws=1, batch_size=1024, seed=seed)[site]
    seen = torch.stack([mask & (name in subset) for name, mask in observed.items()]).any(0)
    return z[0].cpu().double().numpy(), seen.cpu().numpy()


def _plane(
    parts: Sequence[np.ndarray], site: str, method: str, seed: int
) -> tuple[list[np.ndarray], list[str]]:
    """Latents (*, D) of each subset in one plane (*, 2), and the names of its axes."""
    if method not in ("pca", "tsne"):
        raise ValueError(f"method: expected 'pca' or 'tsne', found {method!r}")
    z = np.concatenate(parts)
    if not len(z):
        raise ValueError(
            "subsets: expected rows that have some of them, found none; check observed"
        )
    if z.shape[-1] <= 2:
        plane = np.pad(z, [(0, 0), (0, 2 - z.shape[-1])])
        names = [f"{site}[0]", f"{site}[1]" if z.shape[-1] == 2 else ""]
    elif method == "tsne":
        plane, names = _embed(z, seed), ["t-SNE 1", "t-SNE 2"]
    else:
        center = z.mean(0)
        _, scales, axes = np.linalg.svd(z - center, full_matrices=False)
        share = 100 * scales**2 / (scales**2).sum()
        plane = (z - center) @ axes[:2].T
        names = [f"component {i + 1} ({share[i]:.0f} % of variance)" for i in range(2)]
    return np.split(plane, np.cumsum([len(part) for part in parts])[:-1]), names


def _embed(z: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    if len(z) < 4:
        raise ValueError(
            f"method: expected at least 4 points for 'tsne', found {len(z)}; use method='pca'"
        )
    perplexity = min(30.0, (len(z) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(z)


def _scatter(
    ax: Axes, points: np.ndarray, labels: np.ndarray, every: np.ndarray, span: np.ndarray
) -> Any:
    """Points of a panel; returns (class, colour) pairs, or the mappable of continuous labels."""
    from pandas import isna

    _despine(ax)
    ax.locator_params(nbins=5)
    size = float(np.clip(3000 / max(len(points), 1), 3, 14))
    dots: Style = {"s": size, "linewidths": 0, "alpha": 0.75, "rasterized": True}
    missing, rest = isna(labels), [("no label", _GREY)] if isna(every).any() else []
    if missing.any():
        ax.scatter(points[missing, 0], points[missing, 1], color=_GREY, **dots)
    points, labels, every = points[~missing], labels[~missing], every[~isna(every)]
    classes = np.unique(every)
    if len(classes) > _MAX_LEGEND_CLASSES and np.issubdtype(every.dtype, np.number):
        scale: Style = {"vmin": every.min(), "vmax": every.max(), "cmap": "viridis"}
        return ax.scatter(points[:, 0], points[:, 1], c=labels, **scale, **dots)
    colors = _palette(len(classes))
    pairs = list(zip(classes, colors, strict=True))
    shade = dict(pairs)
    if len(points):
        ax.scatter(
            points[:, 0], points[:, 1], c=[shade[label] for label in labels.tolist()], **dots
        )
    _name_clouds(ax, points, labels, pairs, span)
    return pairs + rest


def _name_clouds(
    ax: Axes,
    points: np.ndarray,
    labels: np.ndarray,
    pairs: Sequence[tuple[Any, Any]],
    span: np.ndarray,
) -> None:
    """Names classes at their medians, except where a name would cover another one."""
    taken: list[tuple[np.ndarray, str]] = []
    for each, color in pairs:
        if not (labels == each).any():
            continue
        place = np.median(points[labels == each], 0)
        name = _class_name(each)
        if all(_are_apart(place - p, span, len(name + other)) for p, other in taken):
            _name_cloud(ax, name, place, color)
            taken.append((place, name))


def _are_apart(offset: np.ndarray, span: np.ndarray, letters: int) -> bool:
    """Whether two names of so many letters in all fit into a panel without touching."""
    right, up = np.abs(offset) / span
    return bool(right > 0.025 * letters + 0.02 or up > 0.08)


def _class_name(label: Any) -> str:
    return f"{label:.3g}" if isinstance(label, float | np.floating) else str(label)


def _name_cloud(ax: Axes, text: str, place: np.ndarray, color: Any) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]
    style: Style = {"ha": "center", "va": "center", "fontsize": 9, "weight": "bold"}
    ax.text(place[0], place[1], text, color=_darker(color), path_effects=halo, **style)


def _plane_legend(figure: Figure | SubFigure, grid: np.ndarray, handles: Any) -> None:
    from matplotlib.lines import Line2D

    if not isinstance(handles, list):
        figure.colorbar(handles, ax=grid.ravel().tolist(), label="label", shrink=0.8)
        return
    style: Style = {"linestyle": "", "marker": "o", "markersize": 5}
    dots = [
        Line2D([], [], color=color, label=_class_name(each), **style) for each, color in handles
    ]
    figure.legend(handles=dots, loc="outside right center", title="class")
