"""Pictures of a run: training curves, reconstructions, samples, latent planes, likelihoods.

Every function draws into the `ax` or `figure` that it is given, or into a new one, and returns
it. New figures are free of pyplot's global state: save one with `figure.savefig(path)`.
Colours are told apart by readers with a colour vision deficiency (Okabe & Ito, 2008,
https://jfly.uni-koeln.de/color/), and no colour is the only sign of anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mmzoo.evaluation.pair import Pair, draw_latents, quiet, row_masks
from mmzoo.evaluation.tables import FLAGGED_SHARE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from mmzoo.modality import Modality

__all__ = [
    "plot_history",
    "plot_latent_plane",
    "plot_likelihood_table",
    "plot_reconstructions",
    "plot_samples",
    "training_figure",
]

_BLUE, _VERMILION, _GREY, _INK = "#0072B2", "#D55E00", "#6E6E6E", "#222222"
# From so many models on, one that is so many spreads away is left beside the axis.
_FOCUS_FROM, _FOCUS_REACH = 6, 5.0
_TITLES = {
    "loss": "Bound",
    "log_likelihood": "Expected log p({} | z)",
    "kl": "KL to the prior",
    "alignment": "Alignment",
    "wasserstein": "Squared Wasserstein distance\nbetween single-modality posteriors",
    "gradient_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "seconds": "Time of an epoch",
}
_UNITS = {
    "wasserstein": "distance²",
    "gradient_norm": "norm",
    "learning_rate": "rate",
    "seconds": "seconds",
}
_MAX_LEGEND_CLASSES = 20
_MAX_BARS = 12
_TEXT_HEIGHT, _GAP = 0.34, 0.12  # of a strip, in widths of a cell

Values = Mapping[str, Tensor]
Style = dict[str, Any]


# Training curves --------------------------------------------------------------------------------


def plot_history(
    history: xr.Dataset,
    ax: Axes | None = None,
    *,
    quantity: str = "loss",
    label: str | None = None,
    color: Any = None,
    title: str | None = None,
) -> Axes:
    """One quantity of a run over the epochs; the bound is minus the recorded loss.

    Args:
        history: History of `mmzoo.inference.fit`.
        ax: Where to draw.
        quantity: A variable of the history, or "log_likelihood/<modality>" and the like for one
            part of it. A variable "validation_<quantity>" is added as a dashed line.
        label: Name of the run in a legend.
        color: Colour of the run.
        title: Title of the panel in place of the quantity's name.

    Raises:
        ValueError: For a quantity that the history lacks.
    """
    name, _, part = quantity.partition("/")
    if name not in history:
        raise ValueError(
            f"quantity: expected one of {', '.join(map(str, history.data_vars))}, found {name!r}; "
            "choose one that was recorded"
        )
    with _style():
        ax = _new_figure(4, 3).subplots() if ax is None else ax
        for variable, dashed in ((name, False), (f"validation_{name}", True)):
            for key, values in _curves(history, variable, part).items():
                text = " ".join(word for word in (label, key, "held out" * dashed) if word)
                shade = color or (None if key else _BLUE)
                _draw_curve(ax, history["epoch"], values, text or "training", shade, dashed)
        _dress_curve(ax, name, title or _TITLES.get(name, name).format(part or "x"))
        if label is None and len(ax.lines) > 1:
            ax.legend()
    return ax


def training_figure(
    histories: Mapping[str, xr.Dataset] | xr.Dataset, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Small multiples of training curves, one panel a quantity and one colour a model.

    Panels: the bound (training solid, held out dashed), the expected log-likelihood of every
    modality, the KL, and the Wasserstein distance between the posteriors of single modalities.

    Args:
        histories: Name of each model to its history, or one history.
        figure: Where to draw.
    """
    if isinstance(histories, xr.Dataset):
        histories = {"": histories}
    panels, many = _panels(histories), len(histories) > 1
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with _style():
        figure = _new_figure(3.5 * columns, 2.6 * rows + 0.4) if figure is None else figure
        grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        colors = _palette(len(histories))
        for ax, quantity in zip(grid, panels, strict=False):
            for (model, history), color in zip(histories.items(), colors, strict=True):
                if quantity in _parts(history):
                    own = "Bound (each model's own)" if many and quantity == "loss" else None
                    plot_history(
                        history, ax, quantity=quantity, label=model, color=color, title=own
                    )
        for ax in grid[len(panels) :]:
            ax.set_axis_off()
        _training_legend(figure, histories, colors)
    return figure


def _parts(history: xr.Dataset) -> list[str]:
    """Names of all curves: "loss", "log_likelihood/image", ..."""
    found = []
    for name in ("loss", "log_likelihood", "kl", "wasserstein"):
        if name not in history:
            continue
        dims = [dim for dim in history[name].dims if dim != "epoch"]
        parts = [f"{name}/{part}" for part in history[dims[0]].values] if dims else [name]
        found += parts if name == "log_likelihood" or len(parts) > 1 else [name]
    return found


def _panels(histories: Mapping[str, xr.Dataset]) -> list[str]:
    panels = list(dict.fromkeys(part for h in histories.values() for part in _parts(h)))
    if not panels:
        raise ValueError(
            "histories: expected histories of fit with a loss, found none; pass result.history"
        )
    order = ["loss", "log_likelihood", "kl", "wasserstein"]
    return sorted(panels, key=lambda panel: order.index(panel.partition("/")[0]))


def _curves(history: xr.Dataset, variable: str, part: str) -> dict[str, np.ndarray]:
    """Values over the epochs, one entry for each part of the variable that is asked for."""
    if variable not in history:
        return {}
    values = history[variable]
    sign = -1.0 if variable.endswith("loss") else 1.0
    extra = [dim for dim in values.dims if dim != "epoch"]
    if not extra:
        return {"": sign * values.values}
    names = [str(name) for name in values[extra[0]].values]
    columns = dict(zip(names, values.transpose("epoch", ...).values.T, strict=True))
    if part or len(names) == 1:
        return {"": columns[part or names[0]]}
    return columns


def _draw_curve(
    ax: Axes, epochs: xr.DataArray, values: np.ndarray, label: str, color: Any, dashed: bool
) -> None:
    style: Style = {"linestyle": (0, (4, 2)) if dashed else "-", "linewidth": 1.4, "color": color}
    marker = "o" if len(values) < 3 else None  # a single epoch is no line
    ax.plot(epochs.values + 1, values, label=label, marker=marker, markersize=4, **style)


def _skip_the_start(ax: Axes) -> None:
    """Zooms to what follows the first epochs where those would flatten everything else."""
    curves = [np.asarray(line.get_ydata()) for line in ax.lines]
    later, whole = (
        np.concatenate([curve[len(curve) // part :] if part else curve for curve in curves])
        for part in (8, 0)
    )
    later, whole = later[np.isfinite(later)], whole[np.isfinite(whole)]
    ax.autoscale(axis="y")
    if later.size and np.ptp(whole) > 3 * np.ptp(later) > 0:
        margin = 0.08 * np.ptp(later)
        ax.set_ylim(later.min() - margin, later.max() + margin)


def _dress_curve(ax: Axes, name: str, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title)
    ax.set_xlabel("epoch")
    ax.set_ylabel(_UNITS.get(name, "nats per row"))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    _skip_the_start(ax)
    _despine(ax)


def _training_legend(
    figure: Figure | SubFigure, histories: Mapping[str, xr.Dataset], colors: Sequence[Any]
) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, linewidth=2, label=model)
        for model, color in zip(histories, colors, strict=True)
        if model
    ]
    if any("validation_loss" in history for history in histories.values()):
        dashes: Style = {"color": _GREY, "linewidth": 1.4}
        handles.append(Line2D([], [], label="training", **dashes))
        handles.append(Line2D([], [], label="held out", linestyle=(0, (4, 2)), **dashes))
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=min(6, len(handles)))


# Reconstructions and samples --------------------------------------------------------------------


def plot_reconstructions(
    vae: Pair,
    x: Values,
    observed: Values | None = None,
    *,
    given: Sequence[Sequence[str]] | None = None,
    show: Sequence[str] | None = None,
    num_rows: int = 10,
    class_names: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Data on top, below it what the model makes of each subset of the modalities.

    One draw of z for each picture, then the mean of p(x_m | z). A class stands over its picture:
    a predicted class that differs from the data is crossed and in vermilion.

    Args:
        vae: The model, or a pair of your own.
        x: Name to values `(N, *event_shape)`.
        observed: Name to bool mask `(N,)`.
        given: Subsets of modalities; by default each alone, then all.
        show: Modalities that are drawn; by default all.
        num_rows: Number of rows of x that are drawn, one a column of the figure: the first ones
            that have what is given.
        class_names: Names of the classes of a modality, in the order of their indices.
        seed: Seed of the draws; the global random state is left as it was.
        ax: Where to draw.

    Raises:
        ValueError: For an unknown name, or if no row has anything of what is given.
    """
    given = _each_and_all(vae, list(vae.modalities)) if given is None else given
    given = [[each] if isinstance(each, str) else list(each) for each in given]
    _check_names(vae, [name for each in given for name in each], "given")
    x, observed = _rows_with(vae, x, observed, given, num_rows)
    data = {name: _values(vae.modalities[name], value) for name, value in x.items()}
    for name in data:
        data[name] = [
            v if seen else None for v, seen in zip(data[name], observed[name], strict=True)
        ]
    strips = [("data", data)]
    for subset in given:
        title = "given " + ("\n+ ".join(subset))
        strips.append((title, _predict(vae, x, observed, subset, seed)))
    return _draw_strips(vae, strips, show, class_names, ax, compare=True)


def plot_samples(
    vae: Pair,
    num: int = 40,
    *,
    show: Sequence[str] | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
    columns: int = 10,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Joint samples: z from the prior, then the mean of every p(x_m | z), classes on top.

    Args:
        vae: The model, or a pair of your own.
        num: Number of samples.
        show: Modalities that are drawn; by default all.
        class_names: Names of the classes of a modality, in the order of their indices.
        columns: Samples side by side.
        seed: Seed of the draws; the global random state is left as it was.
        ax: Where to draw.
    """
    values = _predict(vae, {}, {}, [], seed, num_rows=num)
    strips = [
        ("", {name: value[start : start + columns] for name, value in values.items()})
        for start in range(0, num, columns)
    ]
    return _draw_strips(vae, strips, show, class_names, ax, compare=False)


def _check_names(vae: Pair, names: Sequence[str], where: str) -> None:
    for name in names:
        if name not in vae.modalities:
            raise ValueError(
                f"{where}: unknown modality {name!r}; this model has {', '.join(vae.modalities)}"
            )


def _check_class_names(vae: Pair, class_names: Mapping[str, Sequence[str]]) -> None:
    _check_names(vae, list(class_names), "class_names")
    for name, words in class_names.items():
        modality = vae.modalities[name]
        if _kind(modality) != "class":
            raise ValueError(
                f"class_names {name!r}: expected a modality of classes, found likelihood "
                f"{modality.likelihood.name!r}; leave it out"
            )
        number = modality.likelihood.param_shapes(modality.event_shape)["logits"][-1]
        if len(words) != number:
            raise ValueError(
                f"class_names {name!r}: expected {number} names, found {len(words)}; name each "
                "class, in the order of their indices"
            )


def _first_rows(
    vae: Pair, x: Values, observed: Values | None, num_rows: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first rows, checked, with a mask for every modality that has values."""
    values, masks, _ = row_masks(vae, x, observed)
    values = {name: value[:num_rows] for name, value in values.items()}
    return values, {name: masks[name][:num_rows] for name in values}


def _rows_with(
    vae: Pair, x: Values, observed: Values | None, given: Sequence[Sequence[str]], num_rows: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As :func:`_first_rows`, of rows that have most of one of the given subsets, in order."""
    values, masks = _first_rows(vae, x, observed, None)
    blank = torch.zeros_like(next(iter(masks.values())))
    shares = [
        torch.stack([masks.get(name, blank) for name in each]).double().mean(0)
        for each in given
        if each
    ]
    if not shares:
        return _first_rows(vae, x, observed, num_rows)
    share = torch.stack(shares).amax(0)
    if not share.any():
        names = dict.fromkeys(name for each in given for name in each)
        raise ValueError(
            f"given: expected rows that have some of {', '.join(names)}, found none; "
            "check x and observed"
        )
    rows = share.argsort(descending=True, stable=True)[:num_rows].sort().values
    return (
        {name: value[rows] for name, value in values.items()},
        {name: mask[rows] for name, mask in masks.items()},
    )


def _predict(
    vae: Pair,
    x: Values,
    observed: Values,
    subset: Sequence[str],
    seed: int,
    num_rows: int | None = None,
) -> dict[str, list[Any]]:
    """Means of every modality given a subset, None in rows that have nothing of it."""
    masks = {name: mask & (name in subset) for name, mask in observed.items()}
    with quiet(vae, seed):
        means = vae.generate(x, masks, num_rows=num_rows, mean=True)
    seen = torch.stack(list(masks.values())).any(0) if masks else None
    predicted = {}
    for name, value in means.items():
        drawn = _values(vae.modalities[name], value, predicted=True)
        predicted[name] = [v if seen is None or seen[i] else None for i, v in enumerate(drawn)]
    return predicted


def _kind(modality: Modality) -> str:
    """How a modality is drawn: "class", "image", "number" or "vector"."""
    shape, likelihood = modality.event_shape, modality.likelihood.name
    if likelihood == "one_hot_categorical" and len(shape) == 1:
        return "class"
    if len(shape) == 0:
        return "class" if likelihood == "categorical" else "number"
    return "image" if len(shape) in (2, 3) else "vector"


def _values(modality: Modality, value: Tensor, *, predicted: bool = False) -> list[Any]:
    """One entry a row: a class index, a picture (H, W) or (H, W, 3), a number or a vector."""
    kind, array = _kind(modality), value.detach().cpu().double().numpy()
    if modality.likelihood.name == "categorical" and predicted:  # probabilities of the classes
        array = array.argmax(-1).astype(float)
    elif kind == "class" and modality.event_shape:
        array = np.nan_to_num(array, nan=-1.0).argmax(-1).astype(float)
    if kind in ("class", "number"):
        return [float(number) for number in array]
    if kind == "image" and array.ndim == 4:
        array = np.moveaxis(array, 1, -1)
        array = array if array.shape[-1] == 3 else array.mean(-1)
    return list(array) if kind == "image" else list(array.reshape(len(array), -1))


def _draw_strips(
    vae: Pair,
    strips: Sequence[tuple[str, Mapping[str, list[Any]]]],
    show: Sequence[str] | None,
    class_names: Mapping[str, Sequence[str]] | None,
    ax: Axes | None,
    *,
    compare: bool,
    header: Sequence[str] = (),
) -> Axes:
    """Stacks strips of cells of width 1; texts stand over the first picture of a cell."""
    shown = list(vae.modalities) if show is None else list(show)
    _check_names(vae, shown, "show")
    _check_class_names(vae, class_names or {})
    texts = [name for name in shown if _kind(vae.modalities[name]) in ("class", "number")]
    pictures = [name for name in shown if name not in texts]
    heights = {name: _height(vae.modalities[name]) for name in pictures}
    limits = {name: _limits(vae.modalities[name], strips, name) for name in pictures}
    columns = max(len(next(iter(values.values()))) for _, values in strips)
    if len(pictures) > 1:  # bold titles on one line, above the names of the modalities
        strips = [(title.replace("\n", " "), values) for title, values in strips]
    lines = [line for title, _ in strips for line in title.split("\n")]
    margin = 0.2 + max(0.13 * len(line) for line in [*lines, *pictures[1:]])
    # A strip is as high as what it holds: one of classes alone has no room for pictures.
    below = [{n: h for n, h in heights.items() if n in values} for _, values in strips]
    lines_above = [
        max(sum(name in values for name in texts), int(len(part) > 1))  # a title needs one
        for (_, values), part in zip(strips, below, strict=True)
    ]
    above = [_TEXT_HEIGHT * number for number in lines_above]
    tops = [up + sum(each.values()) + _GAP for up, each in zip(above, below, strict=True)]
    bottoms = np.cumsum(tops)
    with _style():
        sides, top = (-margin, columns + 0.1), 0.45 if header else 0.1
        ax = _strip_axes(ax, sides, float(bottoms[-1]), top)
        for column, text in enumerate(header):
            ax.text(column + 0.5, 0.1, text, ha="center", fontsize=8, color=_GREY)
        for index, (title, values) in enumerate(strips):
            height, part = tops[index], below[index]
            top = height - float(bottoms[index]) - above[index]
            middle = top - sum(part.values()) / 2 if part else top + 0.4 * above[index]
            _name_strip(ax, title, middle, part, top)
            known = strips[0][1] if compare and index else {}
            held = [name for name in texts if name in values]
            _draw_texts(ax, vae, held, values, known, top, class_names or {})
            for name, size in part.items():
                top -= size
                _draw_pictures(ax, vae.modalities[name], values.get(name), top, limits[name])
    return ax


def _strip_axes(ax: Axes | None, sides: tuple[float, float], height: float, top: float) -> Axes:
    """Axes whose unit is a cell, 0.62 inches wide in a new figure."""
    if ax is None:
        from matplotlib.figure import Figure

        size = (0.62 * (sides[1] - sides[0]), 0.62 * (height + top))
        ax = Figure(figsize=size, dpi=150).add_axes((0, 0, 1, 1))
    ax.set_xlim(*sides)
    ax.set_ylim(-height, top)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return ax


def _height(modality: Modality) -> float:
    shape = modality.event_shape
    if _kind(modality) == "vector":
        return 0.6
    height, width = shape[-2:]
    return min(max(height / width, 0.25), 4.0)


def _limits(
    modality: Modality, strips: Sequence[tuple[str, Mapping[str, list[Any]]]], name: str
) -> tuple[float, float]:
    """Range of values that spans black to white, or the height of a line plot."""
    found = [v for _, values in strips[:1] for v in values.get(name, []) if v is not None]
    if not found:
        found = [v for _, values in strips for v in values.get(name, []) if v is not None]
    if not found:  # gaps alone
        return 0.0, 1.0
    low, high = np.nanmin(found), np.nanmax(found)
    if _kind(modality) == "image" and low >= 0 and high <= 1:
        return 0.0, 1.0
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _draw_pictures(
    ax: Axes,
    modality: Modality,
    values: Sequence[Any] | None,
    bottom: float,
    limits: tuple[float, float],
) -> None:
    """One modality of a strip, a picture or a small plot in each cell."""
    from matplotlib.image import AxesImage

    low, high = limits
    height = 0.94 * _height(modality)
    for column, value in enumerate(values or []):
        left, right = column + 0.03, column + 0.97
        if value is None:
            _draw_gap(ax, left, right, bottom, height)
        elif _kind(modality) == "image":
            extent = (left, right, bottom, bottom + height)
            # Axes.imshow would change the limits of the axes
            image = AxesImage(ax, cmap="gray", interpolation="nearest", extent=extent)
            image.set_data(np.clip((value - low) / (high - low), 0, 1))
            image.set_clim(0, 1)
            ax.add_image(image)
        else:
            scaled = np.clip((value - low) / (high - low), 0, 1)
            zero = float(np.clip(-low / (high - low), 0, 1))
            _draw_line(ax, bottom + height * scaled, (left, right), bottom + height * zero)


def _draw_gap(ax: Axes, left: float, right: float, bottom: float, height: float) -> None:
    from matplotlib.patches import Rectangle

    style: Style = {"fill": False, "linestyle": ":", "edgecolor": _GREY}
    ax.add_patch(Rectangle((left, bottom), right - left, height, **style))


def _draw_line(ax: Axes, heights: np.ndarray, sides: tuple[float, float], zero: float) -> None:
    """A vector: bars from zero for a few numbers, a line for many."""
    edges = np.linspace(*sides, len(heights) + 1)
    if len(heights) <= _MAX_BARS:
        width = 0.8 * (edges[1] - edges[0])
        style: Style = {"align": "edge", "color": _BLUE, "linewidth": 0}
        ax.bar(edges[:-1], heights - zero, width, zero, **style)
    else:
        ax.plot((edges[:-1] + edges[1:]) / 2, heights, color=_BLUE, linewidth=0.7)


def _draw_texts(
    ax: Axes,
    vae: Pair,
    texts: Sequence[str],
    values: Mapping[str, list[Any]],
    truth: Mapping[str, list[Any]],
    bottom: float,
    class_names: Mapping[str, Sequence[str]],
) -> None:
    """Classes and numbers of every cell; a wrong class is crossed and changes its colour."""
    for line, name in enumerate(reversed(texts)):
        is_class = _kind(vae.modalities[name]) == "class"
        for column, value in enumerate(values.get(name, [])):
            right = truth[name][column] if name in truth else None
            wrong = is_class and None not in (right, value) and right != value
            word = _word(value, is_class, class_names.get(name)) + (" ×" if wrong else "")
            color = _VERMILION if wrong else _BLUE if truth else _INK
            size = min(8.0, 48 / len(word))  # longer words would leave the cell
            style: Style = {
                "fontsize": size,
                "weight": "bold" if wrong else "normal",
                "ha": "center",
            }
            height = bottom + 0.03 + line * _TEXT_HEIGHT
            ax.text(column + 0.5, height, word, color=color, va="bottom", **style)


def _word(value: float | None, is_class: bool, names: Sequence[str] | None) -> str:
    if value is None:
        return "–"
    if not is_class:
        return f"{value:.3g}"
    return str(int(value)) if names is None else str(names[int(value)])


def _name_strip(
    ax: Axes, title: str, middle: float, heights: Mapping[str, float], top: float
) -> None:
    """Name of a strip, with the names of its modalities if it draws several."""
    style: Style = {"ha": "right", "fontsize": 8.5, "color": _INK, "linespacing": 1.1}
    if len(heights) < 2:
        ax.text(-0.12, middle, title, va="center", **style)
        return
    ax.text(-0.12, top + 0.05, title, va="bottom", weight="bold", **style)
    for name, height in heights.items():
        ax.text(-0.12, top - height / 2, name, va="center", **style)
        top -= height


# Latent planes ----------------------------------------------------------------------------------


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


def _each_and_all(vae: Pair, names: list[str]) -> list[list[str]]:
    """Each modality alone and all of them, all beside what must be given."""
    found = []
    for chosen in [[name] for name in names] + [names]:
        subset = [name for name in names if name in chosen or name in vae.always_given]
        if subset not in found:
            found.append(subset)
    return found


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


# Likelihoods ------------------------------------------------------------------------------------


def plot_likelihood_table(
    table: xr.Dataset, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Forest plot of a likelihood table: one panel a quantity, one line a model.

    Bars are 95 % intervals, 1.96 standard errors of the mean over rows. A hollow marker says that
    Pareto k exceeds 0.7 in more than a tenth of the rows, with the share beside it. Of paired
    differences, the reference is a line at zero: an interval that reaches it is no difference.

    Args:
        table: Result of `likelihood_table` or of `paired_differences`, dimensions (model,
            quantity).
        figure: Where to draw.
    """
    if "difference" in table:
        table = table.rename(difference="mean")
    missing = {"mean", "standard_error"} - set(map(str, table.data_vars))
    if missing:
        raise ValueError(
            f"table: expected the variables mean and standard_error, found none named "
            f"{', '.join(sorted(missing))}; pass the result of likelihood_table"
        )
    models = [str(model) for model in table["model"].values]
    quantities = [str(quantity) for quantity in table["quantity"].values]
    columns = min(3, len(quantities))
    lines = math.ceil(len(quantities) / columns)
    with _style():
        height = (0.3 * len(models) + 1.1) * lines
        figure = _new_figure(3.1 * columns + 0.8, height) if figure is None else figure
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for ax, quantity in zip(grid.ravel(), quantities, strict=False):
            _draw_forest(ax, table.sel(quantity=quantity), models)
            ax.set_title(quantity)
        for ax in grid.ravel()[len(quantities) :]:
            ax.set_axis_off()
    return figure


def _focus(ax: Axes, values: np.ndarray, errors: np.ndarray) -> None:
    """Leaves far outliers beside the axis, with an arrow and their value, one row each.

    A single model that is a hundred nats behind would press all the others into one point.
    """
    known = values[np.isfinite(values)]
    if len(known) < _FOCUS_FROM:
        return
    low, high = np.quantile(known, [0.25, 0.75])
    reach = _FOCUS_REACH * max(high - low, float(np.nanmax(np.nan_to_num(errors))))
    outside = (values < low - reach) | (values > high + reach)
    if not outside.any():
        return
    kept = ~outside & np.isfinite(values)
    bars = 1.96 * np.nan_to_num(errors[kept])
    left, right = float((values[kept] - bars).min()), float((values[kept] + bars).max())
    margin = 0.25 * (right - left)
    ax.set_xlim(left - margin, right + margin)
    for place in np.flatnonzero(outside):
        below = values[place] < low
        text = f"◂ {values[place]:.1f}" if below else f"{values[place]:.1f} ▸"
        side: Style = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 7.5}
        side |= {"ha": "left" if below else "right", "color": _VERMILION, "clip_on": False}
        ax.text(0.02 if below else 0.98, float(place), text.replace("-", "\u2212"), **side)


def _draw_forest(ax: Axes, column: xr.Dataset, models: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    label = "nats per row"
    if "reference" in column:
        label = "difference in nats per row"
        ax.axvline(0.0, color=_GREY, linewidth=0.8, zorder=0)
    means, errors = column["mean"].values, column["standard_error"].values
    shares = column["pareto_k"].values if "pareto_k" in column else np.zeros(len(models))
    for place, (mean, error, share) in enumerate(zip(means, errors, shares, strict=True)):
        if not np.isfinite(mean):
            at: Style = {"transform": ax.get_yaxis_transform(), "va": "center", "ha": "center"}
            ax.text(0.5, place, "not available", color=_GREY, fontsize=8, style="italic", **at)
            continue
        flagged = share > FLAGGED_SHARE
        color = _VERMILION if flagged else _BLUE
        face = "white" if flagged else color
        bar: Style = {"fmt": "o", "markersize": 5, "capsize": 2.5, "markerfacecolor": face}
        ax.errorbar(mean, place, xerr=1.96 * np.nan_to_num(error), color=color, **bar)
        if flagged:
            ax.annotate(
                f"k > 0.7 in {100 * share:.0f} %",
                (mean, place),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=color,
            )
    ax.set_yticks(range(len(models)), models)
    ax.set_ylim(len(models) - 0.4, -0.6)
    ax.margins(x=0.25)
    _focus(ax, means, errors)
    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    _despine(ax)


# Style ------------------------------------------------------------------------------------------


@contextmanager
def _style() -> Iterator[None]:
    import seaborn as sns
    from matplotlib import rc_context

    small: Style = {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.labelsize": 8.5,
        "legend.fontsize": 8.5,
    }
    small |= {"xtick.labelsize": 8, "ytick.labelsize": 8, "legend.frameon": False}
    small |= {"text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _GREY}
    with rc_context(sns.axes_style("ticks") | sns.plotting_context("paper") | small):
        yield


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _despine(ax: Axes) -> None:
    import seaborn as sns

    sns.despine(ax=ax)


def _palette(number: int) -> list[Any]:
    import seaborn as sns

    return list(sns.color_palette("colorblind" if number <= 10 else "husl", number))


def _darker(color: Any) -> tuple[float, ...]:
    return tuple(0.7 * channel for channel in color)
