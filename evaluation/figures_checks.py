"""Pictures of checks: weights, Pareto k, calibration, likelihood curves, coherence, differences.

House style, colours and conventions are those of :mod:`mmzoo.evaluation.figures_style`: what is not
to be relied on is hollow or crossed, and vermilion.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from torch import Tensor

from mmzoo.evaluation.figures_likelihood import _focus
from mmzoo.evaluation.figures_style import (
    _BLUE,
    _GREY,
    _INK,
    _VERMILION,
    Style,
    _despine,
    _new_figure,
    _palette,
    _style,
)
from mmzoo.evaluation.pareto import pareto_k
from mmzoo.evaluation.tables import FLAGGED_SHARE, UNRELIABLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "plot_calibration",
    "plot_coherence",
    "plot_coverage",
    "plot_differences",
    "plot_likelihood_curve",
    "plot_pareto_k",
    "plot_pit",
    "plot_weights",
]

_SIMULATIONS = 2000
_MAX_POINTS = 200
_MAX_LETTERS = 40  # of a line in a panel
_LEGEND_LETTERS = 60  # of a line above a panel; a handle takes the room of six
_BAND = "#D9D9D9"


# Weights ----------------------------------------------------------------------------------------


def plot_weights(
    log_weight: xr.DataTree | xr.DataArray | np.ndarray | Tensor,
    figure: Figure | SubFigure | None = None,
    *,
    columns: int = 3,
) -> Figure | SubFigure:
    """Are importance weights even enough? Their spread, how few draws carry all, Pareto k.

    The left panel pools all rows, each relative to its mean weight; the middle one says which share
    of a row's weight its largest draws carry, for the median row and for 90 % of them.

    Args:
        log_weight: Log weights `(K, N)`, or an array over draw (and chain) and row, or the tree of
            :func:`mmzoo.evaluation.to_datatree`.
        figure: Where to draw.
        columns: Panels side by side; 1 for a narrow page.

    Raises:
        ValueError: For an array of another shape, or weights that are not finite.
    """
    log_w = _log_weights(log_weight)
    peak = log_w.max(0)
    share = np.exp(log_w - peak)
    share = share / share.sum(0)
    relative = np.log(len(log_w)) + np.log(np.maximum(share, 1e-300))
    with _style():
        figure, grid = _grid(figure, 3, columns, (3.1, 2.9))
        left, middle, right = grid
        _draw_spread(left, relative)
        _draw_shares(middle, -np.sort(-share, axis=0))
        plot_pareto_k(np.asarray(pareto_k(log_w)), right)
    return figure


def plot_pareto_k(
    k: xr.Dataset | xr.DataArray | np.ndarray | Tensor, ax: Axes | None = None
) -> Axes:
    """Pareto k of every row in ascending order; above 0.7 a row is not to be relied on.

    Args:
        k: Values over rows, or a dataset with `pareto_k`, such as a result of
            :func:`mmzoo.evaluation.log_likelihood`. Rows of equal weights, the best case, whose k
            is -inf, have no place on the axis but count as rows below 0.7; those without k are
            left out. How many there are of either stands below.
        ax: Where to draw.
    """
    values = k["pareto_k"].values if isinstance(k, xr.Dataset) else np.asarray(k)
    values = values.ravel()
    finite = np.sort(values[np.isfinite(values)])
    bad = finite > UNRELIABLE
    with _style():
        ax = _new_figure(3.4, 2.9).subplots() if ax is None else ax
        place = np.arange(1, len(finite) + 1)
        dots: Style = {"s": 9, "rasterized": True}
        ax.scatter(place[~bad], finite[~bad], color=_BLUE, linewidths=0, **dots)
        ax.scatter(place[bad], finite[bad], color=_VERMILION, marker="x", linewidths=0.8, **dots)
        ax.axhline(UNRELIABLE, color=_INK, linewidth=0.8, linestyle=(0, (4, 2)))
        equal = int(np.isneginf(values).sum())
        known, without = len(finite) + equal, len(values) - len(finite) - equal
        share = (
            f"k > {UNRELIABLE} in {_percent(bad.sum() / known)} of rows" if known else "Pareto k"
        )
        ax.set_title(share)
        counts = {"with equal weights": equal, "without k": without}
        beside = ", ".join(f"{count} {words}" for words, count in counts.items() if count)
        ax.set_xlabel("rows, sorted" + f" ({beside})" * bool(beside))
        ax.set_ylabel("Pareto k")
        top = max(1.0, float(finite.max()) + 0.1) if len(finite) else 1.0
        ax.set_ylim(min(0.0, float(finite.min()) - 0.1) if len(finite) else 0.0, top)
        ax.locator_params(axis="x", nbins=5, integer=True)
        _despine(ax)
    return ax


def _log_weights(values: xr.DataTree | xr.DataArray | np.ndarray | Tensor) -> np.ndarray:
    """Finite log weights (K, N)."""
    if isinstance(values, xr.DataTree):
        values = values["sample_stats"]["log_weight"]
    if isinstance(values, xr.DataArray):
        draws = [dim for dim in values.dims if dim != "row"]
        values = values.stack(all_draws=draws).transpose("all_draws", "row").values
    array = np.asarray(values, dtype=float)
    if array.ndim != 2 or not len(array):
        raise ValueError(
            f"log_weight: expected shape (K, N), found {array.shape}; put the draws first"
        )
    rows = (array > -np.inf).any(0) & ~np.isnan(array).any(0) & (array < np.inf).all(0)
    if not rows.all():
        raise ValueError(
            f"log_weight: expected finite weights, found none or NaN in row {int(rows.argmin())}; "
            "leave such rows out"
        )
    return array


def _draw_spread(ax: Axes, relative: np.ndarray) -> None:
    low, high = float(np.quantile(relative, 0.002)), float(relative.max())
    edges = np.linspace(min(low, -1.0), max(high, 1.0), 51).tolist()
    ax.hist(relative.ravel(), edges, color=_BLUE, linewidth=0, log=True)
    ax.axvline(0, color=_INK, linewidth=0.8, linestyle=(0, (4, 2)))
    ax.set_title("Weights of all rows")
    ax.set_xlabel("log(weight / mean of its row)")
    ax.set_ylabel("draws")
    ax.locator_params(axis="x", nbins=6)
    _despine(ax)


def _draw_shares(ax: Axes, share: np.ndarray) -> None:
    """Shares (K, N), largest first."""
    carried = np.cumsum(share, 0)
    draws = np.arange(1, len(share) + 1) / len(share)
    low, middle, high = np.quantile(carried, [0.05, 0.5, 0.95], axis=1)
    ax.fill_between(100 * draws, 100 * low, 100 * high, color=_BLUE, alpha=0.25, linewidth=0)
    ax.plot(100 * draws, 100 * middle, color=_BLUE, linewidth=1.4, label="median row, 90 %")
    dashes: Style = {"color": _GREY, "linewidth": 0.9, "linestyle": (0, (4, 2))}
    ax.plot(100 * draws, 100 * draws, label="equal weights", **dashes)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_title("Weight in the largest draws")
    ax.set_xlabel("largest draws, %")
    ax.set_ylabel("share of the weight, %")
    ax.set_ylim(0, 103)
    ax.legend(loc="best", handlelength=1.4)
    _despine(ax)


# Calibration ------------------------------------------------------------------------------------


def plot_calibration(
    ecdf: xr.Dataset, figure: Figure | SubFigure | None = None, *, columns: int = 3
) -> Figure | SubFigure:
    """Simulation-based calibration: ECDF of the ranks minus uniform, one panel a subset.

    The grey band holds the whole curve of a calibrated latent with the probability at which it was
    made. A curve that leaves it is vermilion and named: above zero on the left and below on the
    right the posterior is too narrow (a hump before a trough), the other way round too wide, all on
    one side shifted. Dashed: statistics of all latents together, such as log p(x, z).

    Args:
        ecdf: Result of :func:`mmzoo.evaluation.calibration.calibration_ecdf`: `difference` over
            (subset, latent, point), `lower` and `upper` over point, and if known
            `statistic_difference` over (subset, statistic, point).
        figure: Where to draw.
        columns: Panels side by side; 1 for a narrow page.

    Raises:
        ValueError: For a dataset without these.
    """
    _need(ecdf, ("difference", "lower", "upper"), "ecdf", "calibration_ecdf")
    subsets = ecdf["subset"].values
    points, names = ecdf["point"].values, [str(name) for name in ecdf["latent"].values]
    if "statistic_difference" in ecdf:
        names += [str(name).replace("_", " ") for name in ecdf["statistic"].values]
    band = ecdf["lower"].values, ecdf["upper"].values
    with _style():
        figure, grid = _grid(figure, len(subsets), columns, (3.1, 2.5), sharex=True, sharey=True)
        for ax, subset in zip(grid, subsets, strict=True):
            here = ecdf.sel(subset=subset)
            curves = here["difference"].transpose("latent", "point").values
            if "statistic_difference" in here:
                statistics = here["statistic_difference"].transpose("statistic", "point").values
                curves = np.concatenate([curves, statistics])
            _draw_ecdf(ax, points, curves, names, band, len(here["latent"]))
            ax.set_title("given " + str(subset).replace("+", " + "))
            ax.set_xlabel("rank / number of draws")
            ax.set_ylabel("ECDF − uniform")
            ax.label_outer()
    return figure


def plot_coverage(coverage: xr.Dataset, ax: Axes | None = None) -> Axes:
    """How often intervals hold the truth, against how often they should; one line a subset.

    Points are means over the latents of central intervals, with 95 % intervals; below the diagonal
    the posterior is too narrow.

    Args:
        coverage: Result of :func:`mmzoo.evaluation.calibration.coverage`: `coverage` and
            `standard_error` over (subset, latent, level).
        ax: Where to draw.

    Raises:
        ValueError: For a dataset without these.
    """
    _need(coverage, ("coverage", "standard_error"), "coverage", "coverage")
    values = coverage["coverage"].mean("latent")
    # Latents of one row depend on each other: the mean is taken to be no better than each.
    errors = coverage["standard_error"].mean("latent")
    levels, subsets = coverage["level"].values, coverage["subset"].values
    with _style():
        # Two entries of the legend take a line.
        ax = _new_figure(3.6, 3.1 + 0.1 * len(subsets)).subplots() if ax is None else ax
        ax.plot([0, 1], [0, 1], color=_GREY, linewidth=0.9, linestyle=(0, (4, 2)))
        markers = itertools.cycle("osD^vPX")
        shift = np.linspace(-0.008, 0.008, len(subsets)) if len(subsets) > 1 else [0.0]
        for subset, color, marker, by in zip(
            subsets, _palette(len(subsets)), markers, shift, strict=False
        ):
            bar: Style = {"marker": marker, "markersize": 4, "capsize": 2, "linewidth": 1.2}
            ax.errorbar(
                levels + by,
                values.sel(subset=subset).values,
                1.96 * errors.sel(subset=subset).values,
                color=color,
                label="given " + str(subset).replace("+", " + "),
                **bar,
            )
        start = max(0.0, min(float(levels.min()), float(values.min())) - 0.1)
        ax.set_xlim(start, 1)
        ax.set_ylim(start, 1)
        ax.set_xlabel("nominal coverage")
        ax.set_ylabel("observed coverage")
        _legend_above(ax)
        _despine(ax)
    return ax


def plot_pit(pit: xr.Dataset, ax: Axes | None = None, *, level: float = 0.95) -> Axes:
    """ECDF of the probability integral transform minus uniform, one curve an entry.

    The band holds the whole curve of a calibrated entry with probability `level`; it is found by
    simulation. Curves that leave it are vermilion; among m calibrated entries (1 - level) m do.

    `Graphical test for discrete uniformity and its applications (Säilynoja et al., 2022)`,
    https://arxiv.org/abs/2103.10522

    Args:
        pit: Result of :func:`mmzoo.evaluation.arviz_checks.pit`: `pit` over (row, entry).
        ax: Where to draw.
        level: Probability of the band.

    Raises:
        ValueError: For a dataset without it, or a level outside (0, 1).
    """
    _need(pit, ("pit",), "pit", "pit")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a probability inside (0, 1), found {level}")
    values = pit["pit"].transpose("row", "entry").values
    values = values[:, np.isfinite(values).any(0)]
    num = int(np.isfinite(values).sum(0).max(initial=0))
    if not num:
        raise ValueError("pit: expected rows with values, found none; choose another target")
    points = np.linspace(0, 1, min(num, _MAX_POINTS) + 1)[1:-1] if num > 1 else np.array([0.5])
    curves = np.stack([_ecdf(column[np.isfinite(column)], points) for column in values.T])
    band = _simultaneous_band(num, points, level)
    outside = np.any((curves < band[0]) | (curves > band[1]), axis=1)
    with _style():
        ax = _new_figure(3.6, 2.8).subplots() if ax is None else ax
        _draw_ecdf(ax, points, curves, [], band)
        known = f" given {pit.attrs['given'].replace('+', ' + ')}" if pit.attrs.get("given") else ""
        ax.set_title(f"{pit.attrs.get('target', 'PIT')}{known}")
        ax.set_xlabel("probability integral transform")
        ax.set_ylabel("ECDF − uniform")
        if len(curves) > 1:
            text = f"{int(outside.sum())} of {len(curves)} entries leave the {_percent(level)} band"
        else:
            text = f"{'leaves' if outside[0] else 'inside'} the {_percent(level)} band"
        ax.text(0.02, 0.03, text, transform=ax.transAxes, fontsize=7.5, color=_GREY)
    return ax


def _draw_ecdf(
    ax: Axes,
    points: np.ndarray,
    curves: np.ndarray,
    names: Sequence[str],
    band: tuple[np.ndarray, np.ndarray],
    num_solid: int | None = None,
) -> None:
    """Curves over their band; those after the first `num_solid` are dashed."""
    lower, upper = band
    ends = np.concatenate([[0.0], points, [1.0]])
    ax.fill_between(ends, np.pad(lower, 1), np.pad(upper, 1), color=_BAND, linewidth=0)
    ax.axhline(0, color=_GREY, linewidth=0.7)
    outside = np.any((curves < lower) | (curves > upper), axis=1)
    for index, (curve, out) in enumerate(zip(curves, outside, strict=True)):
        style: Style = {"color": _VERMILION if out else _BLUE, "linewidth": 1.2 if out else 0.8}
        if num_solid is not None and index >= num_solid:
            style["linestyle"] = (0, (3, 1.5))
        faint = 1.0 if len(curves) <= 12 or out else 0.5
        ax.plot(ends, np.pad(curve, 1), alpha=faint, zorder=3 if out else 2, **style)
    far = -np.maximum(lower - curves, curves - upper).max(1)
    gone = [names[index] for index in np.argsort(far) if names and outside[index]]
    if gone:
        place: Style = {"transform": ax.transAxes, "fontsize": 7.5, "va": "bottom"}
        ax.text(0.02, 0.02, _outside(gone), color=_VERMILION, **place)
    ax.margins(y=0.18)
    ax.set_xlim(0, 1)
    ax.locator_params(nbins=5)
    _despine(ax)


def _outside(names: Sequence[str]) -> str:
    """The first names, as many as a panel has room for."""
    for count in range(len(names), 0, -1):
        rest = f" and {len(names) - count} more" if count < len(names) else ""
        text = f"outside: {', '.join(names[:count])}{rest}"
        if len(text) <= _MAX_LETTERS:
            break
    return text


def _ecdf(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Share of the values up to each point, minus uniform."""
    return np.searchsorted(np.sort(values), points, side="right") / len(values) - points


def _simultaneous_band(num: int, points: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Limits of the ECDF difference of `num` uniform draws that hold at all points at once."""
    from scipy.stats import binom

    cells = np.diff(np.concatenate([[0.0], points, [1.0]]))
    rng = np.random.default_rng(0)
    counts = rng.multinomial(num, cells, _SIMULATIONS).cumsum(1)[:, :-1]
    below = binom.cdf(counts, num, points)
    above = binom.sf(counts - 1, num, points)
    # The pointwise level at which so many of the simulated curves stay inside everywhere.
    gamma = np.quantile(2 * np.minimum(below, above).min(1), 1 - level)
    return (
        binom.ppf(gamma / 2, num, points) / num - points,
        binom.ppf(1 - gamma / 2, num, points) / num - points,
    )


# Likelihoods and tables -------------------------------------------------------------------------


def plot_likelihood_curve(
    curves: xr.Dataset | Mapping[str, xr.Dataset], ax: Axes | None = None, *, band: str = "mcse"
) -> Axes:
    """Estimates of log p(x) against the number of importance samples, mean over rows.

    A hollow marker says that Pareto k exceeds 0.7 in more than a tenth of the rows, or is unknown
    in them for want of draws: the curve may still rise. Rows are the same at every number of
    samples; so their spread says nothing about the shape of the curve, and the band is that of the
    Monte Carlo error unless asked otherwise.

    Args:
        curves: `log_prob`, `mcse` and `pareto_k` over (num_samples, row); or title to such.
        ax: Where to draw.
        band: "mcse", 1.96 Monte Carlo errors of the mean, or "rows", 1.96 standard errors over
            rows.

    Raises:
        ValueError: For a dataset without these, or another band.
    """
    if band not in ("mcse", "rows"):
        raise ValueError(f"band: expected 'mcse' or 'rows', found {band!r}")
    found = {"": curves} if isinstance(curves, xr.Dataset) else dict(curves)
    for each in found.values():
        _need(each, ("log_prob", "mcse"), "curves", "likelihood_curve")
    flagged = False
    with _style():
        ax = _new_figure(4.2, 3).subplots() if ax is None else ax
        for (title, curve), color in zip(found.items(), _palette(len(found)), strict=True):
            flagged |= _draw_likelihood_curve(ax, curve, title, color, band)
        ax.set_xscale("log")
        ax.set_xlabel("importance samples")
        ax.set_ylabel("log p(x), nats per row")
        ax.margins(x=0.06, y=0.12)
        _despine(ax)
        if flagged:
            hollow: Style = {"marker": "o", "markerfacecolor": "white", "linestyle": ""}
            ax.plot([], [], color=_GREY, label="k large or unknown", **hollow)
        if flagged or len(found) > 1:
            _legend_above(ax)
    return ax


def _draw_likelihood_curve(ax: Axes, curve: xr.Dataset, title: str, color: Any, band: str) -> bool:
    """Returns whether any point is flagged."""
    numbers = curve["num_samples"].values
    values = curve["log_prob"].transpose("num_samples", "row").values
    kept = np.isfinite(values).all(0)
    values, rows = values[:, kept], int(kept.sum())
    mean = values.mean(1)
    if band == "rows":
        error = values.std(1, ddof=1) / math.sqrt(rows)
    else:
        mcse = curve["mcse"].transpose("num_samples", "row").values[:, kept]
        error = np.sqrt(np.square(mcse).sum(1)) / rows
    share = np.zeros(len(numbers))
    if "pareto_k" in curve:
        k = curve["pareto_k"].transpose("num_samples", "row").values[:, kept]
        share = (np.isnan(k) | (k > UNRELIABLE)).mean(1)
    sides = mean - 1.96 * error, mean + 1.96 * error
    ax.fill_between(numbers, *sides, color=color, alpha=0.25, linewidth=0)
    ax.plot(numbers, mean, color=color, linewidth=1.4, label=title or None)
    for bad, face in ((False, color), (True, "white")):
        chosen = (share > FLAGGED_SHARE) == bad
        marks: Style = {"markersize": 5, "linestyle": "", "markerfacecolor": face}
        if chosen.any():
            ax.plot(numbers[chosen], mean[chosen], "o", color=color, label="_", **marks)
    return bool((share > FLAGGED_SHARE).any())


def plot_coherence(results: xr.Dataset | Mapping[str, xr.Dataset], ax: Axes | None = None) -> Axes:
    """Accuracy of what is generated, by a classifier, against how many modalities were given.

    The dotted line is the classifier's own accuracy on the data, which bounds what can be measured.

    Args:
        results: Result of :func:`mmzoo.evaluation.coherence.coherence`, with `average` and
            `average_standard_error` over size; or title to such.
        ax: Where to draw.

    Raises:
        ValueError: For a dataset without these.
    """
    found = {"": results} if isinstance(results, xr.Dataset) else dict(results)
    for each in found.values():
        _need(each, ("average", "average_standard_error"), "results", "coherence")
    sizes = sorted({int(size) for each in found.values() for size in each["size"].values})
    shift = np.linspace(-0.06, 0.06, len(found)) if len(found) > 1 else [0.0]
    with _style():
        ax = _new_figure(3.8, 3).subplots() if ax is None else ax
        markers = itertools.cycle("osD^vPX")
        for (title, each), color, marker, by in zip(
            found.items(), _palette(len(found)), markers, shift, strict=False
        ):
            bar: Style = {"marker": marker, "markersize": 5, "capsize": 2.5, "linewidth": 1.4}
            ax.errorbar(
                each["size"].values + by,
                each["average"].values,
                1.96 * each["average_standard_error"].values,
                color=color,
                label=title or None,
                **bar,
            )
        bounds = [
            each["classifier_accuracy"] for each in found.values() if "classifier_accuracy" in each
        ]
        if bounds:
            best = float(np.nanmean(bounds[0].values))
            dots: Style = {"color": _GREY, "linewidth": 1, "linestyle": ":"}
            ax.axhline(best, label="classifier on the data", **dots)
        ax.set_xticks(sizes)
        ax.set_xlim(sizes[0] - 0.3, sizes[-1] + 0.3)
        ax.set_ylim(0, 1.04)
        ax.set_xlabel("modalities given")
        ax.set_ylabel("coherence")
        if bounds or len(found) > 1:
            _legend_above(ax)
        _despine(ax)
    return ax


def plot_differences(
    differences: xr.Dataset, figure: Figure | SubFigure | None = None, *, columns: int = 3
) -> Figure | SubFigure:
    """Forest plot of paired differences to the reference model, one panel a quantity.

    Bars are 95 % intervals, 1.96 paired standard errors. Grey: the interval holds zero. Hollow:
    Pareto k exceeds 0.7 in more than a tenth of the rows of either model, with the share beside it.

    Args:
        differences: Result of :func:`mmzoo.evaluation.tables.paired_differences`: `difference` and
            `standard_error` over model and quantity, and if known `pareto_k`, `unreliable` and
            `reference`.
        figure: Where to draw.
        columns: Panels side by side; 1 for a narrow page.

    Raises:
        ValueError: For a dataset without these.
    """
    _need(differences, ("difference", "standard_error"), "differences", "paired_differences")
    models = [str(model) for model in differences["model"].values]
    rest = [str(dim) for dim in differences["difference"].dims if dim != "model"]
    cells = [
        dict(zip(rest, cell, strict=True))
        for cell in itertools.product(*(differences[dim].values for dim in rest))
    ]
    with _style():
        figure, grid = _grid(
            figure, len(cells), columns, (3.2, 0.3 * len(models) + 1.1), sharey=True
        )
        for ax, cell in zip(grid, cells, strict=True):
            _draw_differences(ax, differences.sel(cell), models)
            ax.set_title(", ".join(str(value) for value in cell.values()))
    return figure


def _draw_differences(ax: Axes, column: xr.Dataset, models: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.axvline(0, color=_INK, linewidth=0.8)
    reference = str(column["reference"].values) if "reference" in column else ""
    for place, model in enumerate(models):
        cell = column.sel(model=model)
        value, error = float(cell["difference"]), float(cell["standard_error"])
        if not np.isfinite(value):
            at: Style = {"transform": ax.get_yaxis_transform(), "va": "center", "ha": "center"}
            ax.text(0.5, place, "not available", color=_GREY, fontsize=8, style="italic", **at)
        elif model == reference or (not reference and value == 0 and error == 0):
            ax.plot(0, place, "D", color=_INK, markersize=5)
            _beside(ax, (0, place), "reference", _INK)
        else:
            _draw_difference(ax, cell, place, value, np.nan_to_num(error))
    ax.set_yticks(range(len(models)), models)
    ax.set_ylim(len(models) - 0.4, -0.6)
    ax.margins(x=0.25)
    _focus(ax, column["difference"].values, column["standard_error"].values)
    ax.set_xlabel("nats per row, against the reference")
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    _despine(ax)


def _draw_difference(ax: Axes, cell: xr.Dataset, place: int, value: float, error: float) -> None:
    share = float(cell["pareto_k"]) if "pareto_k" in cell else 0.0
    flagged = bool(cell["unreliable"]) if "unreliable" in cell else share > FLAGGED_SHARE
    within = abs(value) <= 1.96 * error
    color = _VERMILION if flagged else _GREY if within else _BLUE
    face = "white" if flagged else color
    bar: Style = {"fmt": "o", "markersize": 5, "capsize": 2.5, "markerfacecolor": face}
    ax.errorbar(value, place, xerr=1.96 * error, color=color, **bar)
    if flagged:
        known = f" in {_percent(share)}" if share else ""
        _beside(ax, (value, place), f"k > {UNRELIABLE}{known}", color)


def _legend_above(ax: Axes) -> None:
    """A legend that covers no data, however the curves run."""
    labels = ax.get_legend_handles_labels()[1]
    columns = max(1, min(3, len(labels), _LEGEND_LETTERS // (max(map(len, labels)) + 6)))
    place: Style = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": columns}
    ax.legend(fontsize=7.5, handlelength=1.6, columnspacing=1.2, **place)


def _beside(ax: Axes, place: tuple[float, float], text: str, color: str) -> None:
    """A small word over a marker, readable across the line at zero."""
    from matplotlib.patheffects import withStroke

    style: Style = {"textcoords": "offset points", "ha": "center", "fontsize": 7}
    style["path_effects"] = [withStroke(linewidth=2.5, foreground="white")]
    ax.annotate(text, place, (0, 5), color=color, **style)


def _grid(
    figure: Figure | SubFigure | None,
    panels: int,
    columns: int,
    size: tuple[float, float],
    *,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure | SubFigure, list[Axes]]:
    """So many panels of a size in inches; the rest of their grid is empty."""
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, found {columns}")
    columns = min(columns, panels)
    lines = math.ceil(panels / columns)
    if figure is None:
        figure = _new_figure(size[0] * columns + 0.4, size[1] * lines)
    grid = figure.subplots(lines, columns, sharex=sharex, sharey=sharey, squeeze=False).ravel()
    for ax in grid[panels:]:
        ax.set_axis_off()
    return figure, list(grid[:panels])


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share in (0, 1) or share > 0.9 else f"{100 * share:.0f} %"


def _need(data: xr.Dataset, names: Sequence[str], what: str, source: str) -> None:
    found = set(map(str, data.data_vars)) if isinstance(data, xr.Dataset) else set()
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"{what}: expected the variables {', '.join(names)}, found none named "
            f"{', '.join(missing)}; pass the result of {source}"
        )
