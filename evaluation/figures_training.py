"""Pictures of a training: bounds and their parts over the epochs.

House style, colours and conventions are those of :mod:`mmzoo.evaluation.figures_style`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mmzoo.evaluation.figures_style import (
    _BLUE,
    _GREY,
    Style,
    _despine,
    _new_figure,
    _palette,
    _style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["plot_history", "training_figure"]

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
