"""The report's sections about checks: calibration, latents, numbers of samples, uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import numpy as np
import xarray as xr

from mmzoo.evaluation.calibration import calibration_ecdf, coverage
from mmzoo.evaluation.figures_checks import (
    plot_calibration,
    plot_coherence,
    plot_likelihood_curve,
)
from mmzoo.evaluation.figures_latents import plot_contraction
from mmzoo.evaluation.report_parts import figure_html, folded, note_html, section, table_html

__all__ = ["check_sections"]

_LEVEL = 0.9
_PER_FIGURE = 6  # models in one picture; more could not be told apart
_NONE = "–"

Checks = Mapping[str, xr.DataTree]
Columns = dict[str, dict[str, str]]


def check_sections(checks: Checks) -> list[str]:
    """The sections of what the models were checked for; none without checks.

    Args:
        checks: Name of each model to the result of :func:`mmzoo.evaluation.check_model`.
    """
    if not checks:
        return []
    found = [_calibration(checks), _latents(checks), _samples(checks), _uses(checks)]
    unanswered = _unanswered(checks)
    if unanswered:
        found[-1] = found[-1].replace("\n</section>", f"\n{unanswered}</section>")
    return found


def _calibration(checks: Checks) -> str:
    columns: Columns = {}
    figures = ""
    for title, found in _answered(checks, "calibration"):
        held = coverage(found, levels=(_LEVEL,))
        for subset in map(str, found["subset"].values):
            cell = held.sel(subset=subset, level=_LEVEL)
            share = float(cell["coverage"].mean())
            passes = bool(found["passes"].sel(subset=subset))
            text = f"{100 * share:.0f}\u00a0%" + ("" if passes else " ✗")
            columns.setdefault(f"given {_plain(subset)}", {})[title] = text
        figure = plot_calibration(calibration_ecdf(found)).get_figure(root=True)
        caption = (
            f"{title}: how far the ranks of simulated latents among draws of the guide are from "
            "uniform. Outside the grey band a latent is not calibrated."
        )
        figures += folded(f"Ranks: {title}", figure_html(caption, figure))
    text = note_html(
        f"Rows are simulated from each model, and its guide is asked for them. Share of latents in "
        f"their central {100 * _LEVEL:.0f} % interval, which should be {100 * _LEVEL:.0f} %: less, "
        "and the posterior is too narrow. ✗: the ranks are not uniform (5 % level, all latents of "
        "the subset together). Given enough samples the likelihoods above correct for that; given "
        "too few, which Pareto k tells, they are too low."
    )
    body = text + _table("Calibration", list(checks), columns) + figures
    return section("Can the posteriors be believed?", body)


def _latents(checks: Checks) -> str:
    columns: Columns = {}

    def put(column: str, title: str, text: str) -> None:
        columns.setdefault(column, {})[title] = text

    for title, found in _answered(checks, "active_units"):
        last = found.isel(subset=_largest(found))
        put("active units", title, f"{int(last['num_active'])} of {found.sizes['latent']}")
    for title, found in _answered(checks, "kl"):
        last = found.isel(subset=_largest(found))
        put("KL, nats", title, _number(float(last["total"]), float(last["total_error"]), 1))
        put("collapsed", title, _percent(float(last["collapsed_share"])))
    figures = ""
    for title, found in _answered(checks, "contraction"):
        for subset in map(str, found["subset"].values):
            value = float(found["contraction"].sel(subset=subset).mean())
            put(f"contraction given {_plain(subset)}", title, f"{value:.2f}")
        figure = plot_contraction(found).get_figure(root=True)
        caption = f"{title}: how much each observed subset narrows each latent; 1 is certainty."
        figures += folded(f"Contraction: {title}", figure_html(caption, figure))
    for title, found in _answered(checks, "agreement"):
        overlap = found["overlap"].values.copy()
        np.fill_diagonal(overlap, np.nan)
        if np.isfinite(overlap).any():
            put("overlap of unimodal posteriors", title, f"{np.nanmean(overlap):.2f}")
    for title, found in _answered(checks, "shares"):
        for name in map(str, found["modality"].values):
            share = float(found["latent_gradient_share"].sel(modality=name))
            put(f"gradient share of {name}", title, _percent(share))
    text = note_html(
        "Active units move with the data (variance of the posterior mean above 0.01); the KL "
        "divergence from the prior and the collapsed latents (below 0.01 nats) are given "
        "everything. Contraction is 1 \u2212 Var q / Var p, the mean over latents. Overlap is "
        "Bhattacharyya's coefficient of the posteriors given one modality each, 1 if they are the "
        "same. The gradient share says which modality pulls at the latents."
    )
    return section(
        "What the latents hold", text + _table("Latents", list(checks), columns) + figures
    )


def _samples(checks: Checks) -> str:
    curves = dict(_answered(checks, "curve"))
    body = ""
    for part in _batched(curves.items(), _PER_FIGURE):
        figure = plot_likelihood_curve(part).get_figure(root=True)
        body += figure_html(
            "log p of everything that is observed, against the number of importance samples. "
            "Where a curve still rises, or its marker is hollow, more samples or a better proposal "
            "are needed: the estimate is then too low rather than too high.",
            figure,
        )
    return section("Were enough samples drawn?", body or note_html("No model has an answer."))


def _uses(checks: Checks) -> str:
    columns: Columns = {}

    def put(column: str, title: str, text: str) -> None:
        columns.setdefault(column, {})[title] = text

    judged: dict[str, str] = {}
    for title, found in _answered(checks, "coherence"):
        for target in map(str, found["target"].values):
            here = found.sel(target=target)
            accuracy = float(here["classifier_accuracy"])
            if np.isfinite(accuracy) and accuracy < 1:
                judged[target] = f"{100 * accuracy:.1f} % of the real {target}s"
            for subset in map(str, found["subset"].values):
                cell = here.sel(subset=subset)
                if bool(cell["cross"]) and np.isfinite(float(cell["coherence"])):
                    value, error = float(cell["coherence"]), float(cell["standard_error"])
                    put(f"{target} from {_plain(subset)}", title, _share(value, error))
    for title, found in _answered(checks, "joint_coherence"):
        value, error = float(found["joint_coherence"]), float(found["standard_error"])
        put("samples agree", title, _share(value, error))
    for title, found in _answered(checks, "probe"):
        for subset in map(str, found["subset"].values):
            cell = found.sel(subset=subset)
            if "accuracy" in cell and np.isfinite(float(cell["accuracy"])):
                value, error = float(cell["accuracy"]), float(cell["standard_error"])
                put(f"probe given {_plain(subset)}", title, _share(value, error))
    for title, found in _answered(checks, "clustering"):
        cell = found.isel(subset=0)
        if np.isfinite(float(cell["ari"])):
            put(
                f"ARI given {_plain(str(cell['subset'].values))}",
                title,
                f"{float(cell['ari']):.2f}",
            )
    for title, found in _answered(checks, "retrieval"):
        k = int(found["k"].values[-1])
        for query in map(str, found["query"].values):
            for target in map(str, found["target"].values):
                cell = found.sel(query=query, target=target, k=k)
                if query != target and np.isfinite(float(cell["recall"])):
                    text = _share(float(cell["recall"]), float(cell["standard_error"]))
                    put(f"{target} found by {query}, {k} tries", title, text)
    text = note_html(
        "Does what is generated show the right class? A classifier of real rows reads it"
        + "".join(f"; it names {each}" for each in judged.values())
        + ". Probes are linear classifiers on posterior means; ARI is the adjusted Rand index of "
        "k-means with the classes. Plus or minus one standard error over rows."
    )
    body = text + _table("Uses", list(checks), columns)
    averages = {
        title: found
        for title, found in _answered(checks, "coherence")
        if found["average"].notnull().any() and found.sizes["size"] > 2
    }
    for part in _batched(averages.items(), _PER_FIGURE):
        figure = plot_coherence(part).get_figure(root=True)
        body += figure_html("Accuracy against how many modalities were given.", figure)
    return section("What they can be used for", body)


def _unanswered(checks: Checks) -> str:
    notes = [
        f"{title}: {node.attrs['note']}"
        for title, tree in checks.items()
        for node in tree.children.values()
        if "note" in node.attrs
    ]
    body = "".join(note_html(each) for each in notes)
    return folded("What some models have no answer to", body) if notes else ""


# Cells --------------------------------------------------------------------------------------------


def _answered(checks: Checks, group: str) -> Iterable[tuple[str, xr.Dataset]]:
    """The models that answer a question, with their answers."""
    for title, tree in checks.items():
        if group in tree.children and "note" not in tree[group].attrs:
            yield title, tree[group].to_dataset()


def _table(label: str, titles: list[str], columns: Columns) -> str:
    rows = [[title, *(each.get(title, _NONE) for each in columns.values())] for title in titles]
    return table_html(label, ["model", *columns], rows)


def _largest(found: xr.Dataset) -> int:
    """Index of the subset that has most modalities."""
    return max(
        range(found.sizes["subset"]),
        key=[str(n).count("+") for n in found["subset"].values].__getitem__,
    )


def _batched(items: Iterable[tuple[str, xr.Dataset]], size: int) -> Iterator[dict[str, xr.Dataset]]:
    rest = iter(items)
    while part := dict(islice(rest, size)):
        yield part


def _plain(subset: str) -> str:
    return subset.replace("+", " + ")


def _number(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _share(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}\u00a0%"
