"""One self-contained HTML page about a comparison of models: table, curves, pictures, config.

The page needs no network, no script and no second file: pictures are embedded, and the style is
readable on a phone, on paper, and in dark or light surroundings.
"""

from __future__ import annotations

import html
import math
import os
import re
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from mmzoo.evaluation.figures_checks import plot_differences
from mmzoo.evaluation.figures_likelihood import plot_likelihood_table
from mmzoo.evaluation.figures_training import training_figure
from mmzoo.evaluation.report_checks import check_sections
from mmzoo.evaluation.report_parts import figure_html, folded, section
from mmzoo.evaluation.tables import FLAGGED_SHARE, need_distinct, paired_differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

_MINUS, _NBSP = "\u2212", "\u00a0"
_OPEN_PICTURES = 30
_LISTED = 12  # shares of unreliable rows that are listed openly; more would be a wall of text
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1><p class="lead">{lead}</p></header>
{sections}
<footer><p>{footer}</p></footer>
</main>
</body>
</html>
"""
_STYLE = """
:root { --ink: #1d1f22; --soft: #5b6168; --paper: #ffffff; --line: #d9dde1; --tint: #f4f6f8;
  --flag: #b34700; --shade: #0003; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a4abb3; --paper: #16181b;
  --line: #3a3f45; --tint: #202327; --flag: #ff9a57; --shade: #fff3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
p, li, dd { max-width: 44rem; }
.lead, footer, figcaption, .note { color: var(--soft); }
.note, figcaption, footer { font-size: .9rem; }
/* A shadow at an edge says that there is more; a cover that moves along hides it at the end. */
.scroll, figure .picture { overflow-x: auto; }
.scroll { background:
  linear-gradient(to left, var(--paper) 1.5rem, transparent 3rem) right / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) top right / 1rem calc(100% - 2px)
  no-repeat scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .45rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }
thead th { border-bottom-width: 2px; font-weight: 600; }
th[scope="row"], thead th:first-child { text-align: left; padding-left: 0;
  position: sticky; left: 0; background: var(--paper); }
td .se { color: var(--soft); font-size: .88em; }
td.flagged, .flag { color: var(--flag); }
td.flagged .se { color: inherit; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); }
dl { margin: 1rem 0; display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--soft); }
figure { margin: 1rem 0 1.75rem; }
figure .picture { background: #ffffff; border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem; }
figure img { display: block; width: 100%; max-width: var(--width); min-width: min(100%, 30rem);
  height: auto; margin: 0 auto; }
figcaption { margin-top: .5rem; max-width: 44rem; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px;
  padding: .8rem 1rem; overflow-x: auto; font: .85rem/1.5 ui-monospace, Consolas, monospace; }
@media (max-width: 40rem) { main { padding: 1.25rem 1rem 2rem; } h1 { font-size: 1.45rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; }
  th, td { padding: .4rem .6rem; } figure img { min-width: 34rem; } }
@media screen and (max-width: 37rem) {
  figcaption::before { content: "Scroll the picture sideways. "; font-style: italic; } }
@media print { :root { --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --tint: #fff;
  --flag: #8a3600; } main { max-width: none; padding: 0; } body { font-size: 10pt; }
  h2 { break-after: avoid; } figure, table { break-inside: avoid; } .scroll { overflow: visible;
  background: none; } table { white-space: normal; } pre { white-space: pre-wrap; }
  figure .picture { overflow: visible; border: 0; padding: 0; } figure img { min-width: 0; } }
"""


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    table: xr.Dataset | None = None,
    histories: Mapping[str, xr.Dataset] | None = None,
    figures: Mapping[str, Figure | str | os.PathLike[str]] | None = None,
    checks: Mapping[str, xr.DataTree] | None = None,
    config: Mapping[str, Any] | str | None = None,
    command: str | None = None,
    lead: str = "",
) -> None:
    """Write the page; a file of that name is replaced at once, or kept if anything fails.

    Args:
        path: The file.
        title: Title of the page.
        table: Result of `likelihood_table`.
        histories: Name of each model to the history of its training.
        figures: Caption to a matplotlib figure, or to the path of a PNG file.
        checks: Name of each model to the result of :func:`mmzoo.evaluation.check_model`.
        config: What the run was configured with; nested dicts become sections, text stays.
        command: The command that repeats the run.
        lead: One sentence below the title.

    Raises:
        ValueError: For a picture that is missing or no PNG, a table without means, or two of its
            models of one name.
    """
    sections = []
    if table is not None:
        need_distinct(table, "write_report")
        sections.append(_likelihoods(table))
        if "log_prob" in table and table.sizes["model"] > 1:
            sections.append(_differences(table))
    sections += check_sections(checks or {})
    if histories:
        caption = (
            "Training curves. Solid: training rows; dashed: held-out rows. Bounds of different "
            "models are different quantities; compare likelihoods in the table instead."
        )
        sections.append(
            section(
                "Training", figure_html(caption, training_figure(histories).get_figure(root=True))
            )
        )
    pictures = "".join(
        _picture(caption, each, figures) for caption, each in (figures or {}).items()
    )
    if pictures:
        sections.append(section("What the models make of the data", pictures))
    if config or command:
        sections.append(section("To repeat this", _repeat(config, command)))
    page = _PAGE.format(
        title=html.escape(title),
        style=_STYLE,
        lead=html.escape(lead),
        sections="\n".join(sections),
        footer=html.escape(_versions()),
    )
    _write(Path(path), page)


def _picture(
    caption: str, figure: Figure | str | os.PathLike[str], among: Mapping[str, Any] | None
) -> str:
    """A picture; folded away where there are many."""
    shown = figure_html(caption, figure)
    return folded(caption, shown) if len(among or ()) > _OPEN_PICTURES else shown


def _write(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)


def _versions() -> str:
    names = ("mmzoo", "torch", "pyro-ppl")
    return "Written by " + ", ".join(f"{name} {version(name)}" for name in names) + "."


# The table ----------------------------------------------------------------------------------------


def _likelihoods(table: xr.Dataset) -> str:
    figure = plot_likelihood_table(table)  # says what is wrong with a table
    quantities = [str(quantity) for quantity in table["quantity"].values]
    head = "".join(f'<th scope="col">{html.escape(quantity)}</th>' for quantity in quantities)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(str(model))}</th>'
        + "".join(_cell(table.sel(model=model, quantity=quantity)) for quantity in quantities)
        + "</tr>\n"
        for model in table["model"].values
    )
    body = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Likelihoods">\n<table>\n'
        f'<thead><tr><th scope="col">model</th>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n'
        f"</table>\n</div>\n{_notes(table)}{_explanations(quantities)}"
    )
    caption = (
        "The same likelihoods. Bars are 95 % intervals over rows; a hollow marker flags an "
        "estimate whose importance weights are heavy-tailed."
    )
    return section(
        "Likelihoods of held-out rows", body + figure_html(caption, figure.get_figure(root=True))
    )


def _differences(table: xr.Dataset) -> str:
    differences = paired_differences(table)
    figure = plot_differences(differences).get_figure(root=True)
    caption = (
        "Differences to the model with the best mean in each column, row by row: the rows are the "
        "same, so that their spread cancels. Bars are 95 % intervals; grey: not to be told apart "
        "from the best. Hollow: weights too heavy-tailed in one of the two models, with the share "
        "of such rows."
    )
    return section("Which differences are real", figure_html(caption, figure))


def _cell(cell: xr.Dataset) -> str:
    mean = float(cell["mean"])
    if math.isnan(mean):
        reason = str(cell["note"].values) if "note" in cell else "not available"
        return f'<td title="{html.escape(reason)}">–</td>'
    error = float(cell["standard_error"])
    spread = "" if math.isnan(error) else f' <span class="se">±{_NBSP}{error:.2f}</span>'
    text = f"{mean:.2f}".replace("-", _MINUS) + (" ‡" if _impossible(cell) else "") + spread
    if not _flagged(cell):
        return f"<td>{text}</td>"
    share = _percent(float(cell["pareto_k"]))
    return f'<td class="flagged" title="Pareto k above 0.7 in {share} of the rows">{text} †</td>'


def _impossible(cell: xr.Dataset) -> bool:
    return "impossible" in cell and bool((cell["impossible"].fillna(0) > 0).any())


def _flagged(cell: xr.Dataset) -> bool:
    return "pareto_k" in cell and float(cell["pareto_k"]) > FLAGGED_SHARE


def _percent(share: float) -> str:
    return f"{100 * share:.0f}{_NBSP}%"


def _notes(table: xr.Dataset) -> str:
    """What the numbers are, and which of them not to trust."""
    error = "± is one standard error of the mean over rows"
    if "mcse" in table and table["mcse"].notnull().any():
        error += f" (the Monte Carlo part of it is at most {float(table['mcse'].max()):.2g})"
    rows = table["num_rows"].values.ravel().tolist() if "num_rows" in table else []
    counts = sorted({int(count) for count in rows if count == count and count > 0})
    if counts:
        span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        error += f"; {span} rows"
    notes = [f"Mean nats per row; larger is better. {error}."]
    if _impossible(table):
        notes.append(
            "‡ A probability above one: this is the difference of two estimates, and the one that "
            "is subtracted is too low."
        )
    notes += table.attrs.get("remarks", ())
    flagged = [
        f"{model}, {quantity}: {_percent(float(cell['pareto_k']))}"
        for model in table["model"].values
        for quantity in table["quantity"].values
        if _flagged(cell := table.sel(model=model, quantity=quantity))
        and not math.isnan(float(cell["mean"]))
    ]
    text = "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in notes)
    if not flagged:
        return text
    warning = (
        f"† Pareto k exceeds 0.7 in more than {_percent(FLAGGED_SHARE)} of the rows: the weights "
        "are too heavy-tailed for the estimate and its error to be believed; draw more samples, "
        "or use a better proposal."
    )
    shares = "Share of such rows: " + "; ".join(flagged) + "."
    if len(flagged) > _LISTED:
        text += f'<p class="note flag">{html.escape(warning)}</p>\n'
        body = f'<p class="note">{html.escape(shares)}</p>'
        return f"{text}<details><summary>Share of such rows</summary>{body}</details>\n"
    return text + f'<p class="note flag">{html.escape(f"{warning} {shares}")}</p>\n'


def _explanations(quantities: list[str]) -> str:
    items = [(quantity, _explain(quantity)) for quantity in quantities]
    terms = "".join(
        f"<dt>{html.escape(quantity)}</dt><dd>{html.escape(text)}</dd>\n"
        for quantity, text in items
        if text
    )
    return f"<dl>\n{terms}</dl>\n" if terms else ""


def _explain(quantity: str) -> str:
    """One line on a quantity such as "log p(image | label)"; nothing for other names."""
    match = re.fullmatch(r"log p\(([^|)]+?)(?:\s*\|\s*([^)]+))?\)", quantity)
    if not match:
        return ""
    of, given = (text and text.replace(", ", " and ") for text in match.groups())
    if given:
        return f"How well the model predicts {of} once it has seen {given}."
    if " and " in of:
        return f"How well the model describes {of} together: their joint likelihood."
    return f"How well the model describes {of} alone, everything else unseen."


# Pictures, configuration --------------------------------------------------------------------------


def _repeat(config: Mapping[str, Any] | str | None, command: str | None) -> str:
    parts = []
    if command:
        parts.append(f"<pre>{html.escape(command)}</pre>")
    if config:
        text = config if isinstance(config, str) else "\n".join(_lines(config))
        parts.append(f"<pre>{html.escape(text.strip())}</pre>")
    return "\n".join(parts)


def _lines(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `key = value`, nested dicts below a heading in brackets."""
    plain = [f"{key} = {_value(v)}" for key, v in config.items() if not isinstance(v, Mapping)]
    for key, value in config.items():
        if isinstance(value, Mapping):
            plain += ["", f"[{prefix}{key}]", *_lines(value, f"{prefix}{key}.")]
    return plain


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str | os.PathLike) else str(value)
