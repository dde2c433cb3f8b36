"""Pictures of likelihoods: a forest of intervals for each quantity.

House style, colours and conventions are those of :mod:`mmzoo.evaluation.figures_style`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mmzoo.evaluation.figures_style import (
    _BLUE,
    _GREY,
    _VERMILION,
    Style,
    _despine,
    _new_figure,
    _style,
)
from mmzoo.evaluation.tables import FLAGGED_SHARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["plot_likelihood_table"]

# From so many models on, one that is so many spreads away is left beside the axis.
_FOCUS_FROM, _FOCUS_REACH = 6, 5.0


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
