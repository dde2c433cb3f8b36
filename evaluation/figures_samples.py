"""Pictures of what a model makes of data: reconstructions and samples.

House style, colours and conventions are those of :mod:`mmzoo.evaluation.figures_style`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmzoo.evaluation.figures_style import (
    _BLUE,
    _GREY,
    _INK,
    _VERMILION,
    Style,
    _style,
)
from mmzoo.evaluation.pair import Pair, quiet, row_masks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mmzoo.modality import Modality

__all__ = ["Values", "plot_reconstructions", "plot_samples"]

_MAX_BARS = 12
_TEXT_HEIGHT, _GAP = 0.34, 0.12  # of a strip, in widths of a cell

Values = Mapping[str, Tensor]


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


def _each_and_all(vae: Pair, names: list[str]) -> list[list[str]]:
    """Each modality alone and all of them, all beside what must be given."""
    found = []
    for chosen in [[name] for name in names] + [names]:
        subset = [name for name in names if name in chosen or name in vae.always_given]
        if subset not in found:
            found.append(subset)
    return found


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
