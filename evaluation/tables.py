r"""Tables of likelihoods: which differences are real, several seeds, and how a table is written.

Every model of a table answers for the same rows, and rows differ from each other by far more than
models do. A difference of two models is therefore taken row by row, *paired*:

    d_i = log p_A(x_i) - log p_B(x_i),        mean_i d_i,        se = sd_i(d_i) / sqrt(N)

The Monte Carlo error of each row's estimate is part of the spread of ``d_i``, and so of ``se``.

A table has the dimensions ``model`` and ``quantity`` (and ``proposal`` where several are compared);
``log_prob``, ``row_mcse`` and ``row_pareto_k`` have the dimension ``row`` besides.

Leave-one-out cross-validation, section on paired comparisons (Vehtari et al., 2017),
https://arxiv.org/abs/1507.04544
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    import pandas

__all__ = [
    "FLAGGED_SHARE",
    "NOT_ASKED",
    "ROW_VARIABLES",
    "SIGNIFICANT",
    "UNRELIABLE",
    "aggregate_seeds",
    "need_distinct",
    "paired_differences",
    "table_cells",
    "table_note",
    "table_of_rows",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_pandas",
]

UNRELIABLE = 0.7
"""A row whose Pareto k is larger is not to be relied on."""

FLAGGED_SHARE = 0.1
"""A cell with a larger share of such rows is marked as unreliable."""

SIGNIFICANT = 2.0
"""A difference of more standard errors than these is called significant."""

ROW_VARIABLES = {"log_prob": "log_prob", "mcse": "row_mcse", "pareto_k": "row_pareto_k"}
"""Result of :func:`mmzoo.evaluation.log_likelihood` to its name in a table."""

NOT_ASKED = "not asked for"
"""The note of a cell that a layout leaves empty."""

_SUMMARIES = ("mean", "standard_error", "mcse", "pareto_k", "num_rows")
_IDENTITY = ("data", "binarize", "data_seed", "rows")
_NOTHING = "–"
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "–": "--",
    **{each: f"\\{each}" for each in "&%$#_{}"},
}

Rows = Mapping[str, np.ndarray]


def table_of_rows(
    rows: Rows,
    coords: Mapping[str, Sequence[str]],
    *,
    note: np.ndarray,
    attrs: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """A table from what each row says.

    Args:
        rows: ``log_prob``, ``mcse`` and ``pareto_k``, each ``(*dims, N)``; NaN where a row does not
            count.
        coords: The dimensions, with their names, in that order.
        note: Why a cell is empty, ``(*dims)``; ``""`` where it is not.
        attrs: Of the result.

    Returns:
        Over the dimensions ``mean``, ``standard_error`` of that mean over rows, ``mcse`` (the part
        of it that is Monte Carlo error), ``pareto_k`` (share of rows above 0.7), ``num_rows`` and
        ``note``; over rows besides ``log_prob``, ``row_mcse`` and ``row_pareto_k``.
    """
    shape = note.shape
    table = {kind: np.full(shape, np.nan) for kind in _SUMMARIES}
    for cell in np.ndindex(shape):
        if not note[cell]:
            for kind, value in _summary({key: each[cell] for key, each in rows.items()}).items():
                table[kind][cell] = value
    dims = tuple(coords)
    variables: dict[str, Any] = {kind: (dims, values) for kind, values in table.items()}
    variables["note"] = (dims, note.astype(str))
    variables |= {ROW_VARIABLES[kind]: ((*dims, "row"), rows[kind]) for kind in ROW_VARIABLES}
    count = rows["log_prob"].shape[-1]
    labels = {name: list(values) for name, values in coords.items()}
    return xr.Dataset(variables, {**labels, "row": np.arange(count)}, dict(attrs or {}))


def _summary(rows: Rows) -> dict[str, float]:
    kept = ~np.isnan(rows["log_prob"])
    count = int(kept.sum())
    if count == 0:
        return {"num_rows": 0.0}
    values = rows["log_prob"][kept]
    return {
        "mean": float(values.mean()),
        "standard_error": _standard_error(values),
        "mcse": float(np.sqrt(np.square(rows["mcse"][kept]).sum()) / count),
        "pareto_k": _heavy_share(rows["pareto_k"][kept]),
        "num_rows": float(count),
    }


def _standard_error(values: np.ndarray) -> float:
    """Of the mean; an infinite value has none."""
    if len(values) < 2 or not np.isfinite(values).all():
        return np.nan
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _heavy_share(k: np.ndarray) -> float:
    return float((k > UNRELIABLE).mean()) if not np.isnan(k).all() else np.nan


# Differences ------------------------------------------------------------------------------------


def paired_differences(table: xr.Dataset, *, reference: str | None = None) -> xr.Dataset:
    """How far every model is from the best one, row by row.

    The rows that two models have both are what their difference is taken over. Its standard error
    includes the Monte Carlo error of both estimates, which spreads the rows' differences; ``mcse``
    reports that part by itself, as if the draws of the two models were independent. Being chosen
    on the same rows, the best model looks a little better than it is, the more so the more
    models there are: name a reference beforehand where that matters.

    Args:
        table: Result of :func:`mmzoo.evaluation.likelihood_table`, or one of that kind.
        reference: The model that the others are compared with; default: for each quantity the one
            with the largest mean on the rows that all models have that answer it, those apart whose
            estimate is ``impossible`` (a probability above one).

    Returns:
        Over the table's dimensions ``difference`` (mean over rows of the model minus the
        reference, in nats), ``standard_error`` (paired), ``mcse``, ``z`` (difference in standard
        errors; NaN for the reference itself), ``num_rows`` (rows in common), ``pareto_k`` (share
        of them in which the k of either model exceeds 0.7), ``unreliable`` (whether that share
        exceeds 0.1); over the quantities ``reference``, which is ``""`` where no model answers, or
        where models share no row.

    Raises:
        ValueError: For a table without values of the rows, an unknown reference, or two models of
            one name.

    Example:
        >>> rows = {"log_prob": np.array([[[-3.0, -9.0, -6.0]], [[-2.9, -8.8, -6.0]]])}
        >>> rows |= {"mcse": np.zeros((2, 1, 3)), "pareto_k": np.zeros((2, 1, 3))}
        >>> coords = {"model": ["old", "new"], "quantity": ["log p(x)"]}
        >>> table = table_of_rows(rows, coords, note=np.full((2, 1), "", dtype=object))
        >>> found = paired_differences(table).sel(quantity="log p(x)")
        >>> str(found.reference.values), found.difference.values.round(3).tolist()
        ('new', [-0.1, 0.0])
    """
    _need_rows(table, "paired_differences")
    need_distinct(table, "paired_differences")
    models = _labels(table, "model")
    if reference is not None and reference not in models:
        raise ValueError(
            f"paired_differences: expected reference to be one of {', '.join(models)}, found "
            f"{reference!r}; name a model of the table"
        )
    rest = [str(dim) for dim in table["mean"].dims if dim != "model"]
    rows = table[[*ROW_VARIABLES.values()]].transpose("model", *rest, "row")
    shape = tuple(rows.sizes[dim] for dim in ("model", *rest))
    kinds = ("difference", "standard_error", "mcse", "z", "num_rows", "pareto_k")
    found = {kind: np.full(shape, np.nan) for kind in kinds}
    names = np.full(shape[1:], "", dtype=object)
    for cell in np.ndindex(shape[1:]):
        values = {k: rows[v].values[(slice(None), *cell)] for k, v in ROW_VARIABLES.items()}
        allowed = ~_impossible(table, dict(zip(rest, cell, strict=True)))
        index = _best(values["log_prob"], allowed) if reference is None else models.index(reference)
        if index is None or np.isnan(values["log_prob"][index]).all():
            continue
        names[cell] = models[index]
        for model in range(len(models)):
            for kind, value in _paired(values, model, index).items():
                found[kind][(model, *cell)] = value
    dims = ("model", *rest)
    variables: dict[str, Any] = {kind: (dims, values) for kind, values in found.items()}
    variables["unreliable"] = (dims, found["pareto_k"] > FLAGGED_SHARE)
    variables["reference"] = (tuple(rest), names.astype(str))
    attrs = {"rows": table.sizes["row"], **table.attrs}
    attrs["reference"] = reference or "best of each quantity"
    return xr.Dataset(variables, {dim: table[dim] for dim in dims}, attrs)


def _impossible(table: xr.Dataset, cell: Mapping[str, int]) -> np.ndarray:
    """Which models claim a probability above one, ``(M,)``."""
    if "impossible" not in table:
        return np.zeros(table.sizes["model"], dtype=bool)
    found = table["impossible"].isel(
        {k: v for k, v in cell.items() if k in table["impossible"].dims}
    )
    return np.asarray(found.fillna(0).values).astype(bool)


def _best(log_prob: np.ndarray, allowed: np.ndarray) -> int | None:
    """The model with the largest mean on the rows that all have which answer, from ``(M, N)``."""
    answered = ~np.isnan(log_prob).all(-1)
    answered = answered & allowed if (answered & allowed).any() else answered
    common = ~np.isnan(log_prob[answered]).any(0)
    if not answered.any() or not common.any():
        return None
    means = np.where(answered, log_prob[:, common].mean(-1), -np.inf)
    return int(means.argmax())


def _paired(rows: Rows, model: int, reference: int) -> dict[str, float]:
    value, other = rows["log_prob"][model], rows["log_prob"][reference]
    common = ~np.isnan(value) & ~np.isnan(other)
    count = int(common.sum())
    if count == 0:
        return {"num_rows": 0.0}
    heavy = np.fmax(rows["pareto_k"][model], rows["pareto_k"][reference])[common]
    found = {"num_rows": float(count), "pareto_k": _heavy_share(heavy)}
    if model == reference:
        return {**found, "difference": 0.0, "standard_error": 0.0, "mcse": 0.0}
    with np.errstate(invalid="ignore", divide="ignore"):  # rows of zero likelihood
        difference = value[common] - other[common]
        mean, error = difference.mean(), np.float64(_standard_error(difference))
        square = rows["mcse"][model] ** 2 + rows["mcse"][reference] ** 2
        mcse = np.sqrt(square[common].sum()) / count
        return found | {
            "difference": float(mean),
            "standard_error": float(error),
            "mcse": float(mcse),
            "z": float(mean / error),
        }


# Seeds ------------------------------------------------------------------------------------------


class _Aggregate(NamedTuple):
    mean: float = np.nan
    seed_std: float = np.nan
    standard_error: float = np.nan
    mcse: float = np.nan
    pareto_k: float = np.nan
    num_rows: float = np.nan
    num_seeds: int = 0


def aggregate_seeds(tables: Sequence[xr.Dataset]) -> xr.Dataset:
    r"""One table of the same models, each trained with several seeds.

    Rows and seeds are crossed, ``y_sr = mu + a_s + b_r + e_sr`` for the estimate of row r under
    the model of seed s, and both are samples: of data, and of trainings. The error of the mean
    over S seeds and N rows is

        se^2 = var_s(mean_r y) / S + var_r(mean_s y) / N - var(e) / (S N)

    with the variances over seeds, over rows, and of what neither explains (the last is in each of
    the first two and is counted once). Never less than the larger one of these two terms. It says
    how far the mean is from that of *all seeds on all rows*; ``seed_std`` by itself says how
    much one training differs from another on these rows. With two or three seeds both are rough.
    A single seed leaves the error over rows. Tables without values of the rows get the larger
    ``seed_std^2 / S + mean_s se_s^2``, since all seeds share the rows.

    Robust Inference with Multiway Clustering (Cameron et al., 2011),
    https://doi.org/10.1198/jbes.2010.07136

    Args:
        tables: One of each seed, of the same models, quantities and rows.

    Returns:
        A table with ``mean`` over seeds, ``seed_std`` (standard deviation between seeds),
        ``standard_error`` as above, ``mcse`` of the mean, ``pareto_k`` (mean share over seeds),
        ``num_rows``, ``num_seeds`` and ``note``. Accuracies are averaged, if there are any. The
        attribute ``seeds`` lists the seeds.

    Raises:
        ValueError: For no table, or tables of different models, quantities or rows.
    """
    if not tables:
        raise ValueError("aggregate_seeds: expected at least one table, found none")
    first = tables[0]
    for table in tables[1:]:
        _need_same(first, table)
    with_rows = all("log_prob" in table for table in tables)
    dims = tuple(map(str, first["mean"].dims))
    tables = [each[_cell_variables(each)].transpose(*dims, ...) for each in tables]
    stacked = {
        key: np.stack([table[key].values for table in tables])
        for key in (*_SUMMARIES, *(["log_prob"] if with_rows else []))
    }
    shape = first["mean"].shape
    found = {field: np.full(shape, np.nan) for field in _Aggregate._fields}
    for cell in np.ndindex(shape):
        here = {key: values[(slice(None), *cell)] for key, values in stacked.items()}
        where = ", ".join(str(first[dim].values[i]) for dim, i in zip(dims, cell, strict=True))
        for field, value in _aggregate(here, where)._asdict().items():
            found[field][cell] = value
    variables: dict[str, Any] = {field: (dims, values) for field, values in found.items()}
    variables["num_seeds"] = (dims, found["num_seeds"].astype(int))
    if "note" in first:
        variables["note"] = (dims, first["note"].transpose(*dims).values)
    result = xr.Dataset(variables, {dim: first[dim] for dim in dims}, dict(first.attrs))
    if all("accuracy" in table for table in tables):
        result["accuracy"] = sum(table["accuracy"] for table in tables) / len(tables)
    seeds = [table.attrs["seed"] for table in tables if "seed" in table.attrs]
    result.attrs.pop("seed", None)
    if "row" in first.sizes:
        result.attrs.setdefault("rows", first.sizes["row"])
    result.attrs |= {"num_seeds": len(tables), **({"seeds": seeds} if seeds else {})}
    return result


def _cell_variables(table: xr.Dataset) -> list[str]:
    names = (*_SUMMARIES, "note", "log_prob", "accuracy")
    return [name for name in names if name in table]


def _need_same(first: xr.Dataset, table: xr.Dataset) -> None:
    for dim in ("model", "quantity", "proposal", "row"):
        expected, found = (each.get(dim) for each in (first, table))
        if expected is None or found is None:
            continue
        if expected.shape != found.shape or (expected.values != found.values).any():
            what = (
                f"{found.size} instead of {expected.size}"
                if dim == "row"
                else ", ".join(map(str, found.values))
            )
            raise ValueError(
                f"aggregate_seeds: expected tables of the same {dim}s, found {what}; aggregate "
                "runs that differ in the seed of their training alone"
            )
    for key in _IDENTITY:
        if first.attrs.get(key) != table.attrs.get(key):
            raise ValueError(
                f"aggregate_seeds: expected tables of the same rows, found {key} = "
                f"{table.attrs.get(key)} instead of {first.attrs.get(key)}; evaluate the models of "
                "all seeds on one test set"
            )


def _aggregate(cell: Rows, where: str) -> _Aggregate:
    """Of one cell, from arrays ``(S,)`` and ``log_prob (S, N)``."""
    kept = ~np.isnan(cell["mean"])
    if not kept.any():
        return _Aggregate()
    means, count = cell["mean"][kept], int(kept.sum())
    seed_std = float(means.std(ddof=1)) if count > 1 else np.nan
    if "log_prob" in cell:
        error = _crossed_error(_common_rows(cell["log_prob"][kept], where))
    else:
        square = np.square(cell["standard_error"][kept]).mean()
        error = float(np.sqrt(square + (seed_std**2 / count if count > 1 else 0.0)))
    return _Aggregate(
        mean=float(means.mean()),
        seed_std=seed_std,
        standard_error=error,
        mcse=float(np.sqrt(np.square(cell["mcse"][kept]).sum()) / count),
        pareto_k=float(cell["pareto_k"][kept].mean()),
        num_rows=float(cell["num_rows"][kept][0]),
        num_seeds=count,
    )


def _common_rows(log_prob: np.ndarray, where: str) -> np.ndarray:
    missing = np.isnan(log_prob)
    if (missing != missing[0]).any():
        row = int((missing != missing[0]).any(0).argmax())
        raise ValueError(
            f"aggregate_seeds {where}: expected the same rows in every table, found row {row} in "
            "some of them only; evaluate the models of all seeds on one test set"
        )
    return log_prob[:, ~missing[0]]


def _crossed_error(y: np.ndarray) -> float:
    """Standard error of the mean of ``(S, N)`` over crossed seeds and rows."""
    seeds, rows = y.shape
    if rows < 2 or not np.isfinite(y).all():
        return np.nan
    of_rows = y.mean(0).var(ddof=1) / rows
    if seeds < 2:
        return float(np.sqrt(of_rows))
    of_seeds = y.mean(1).var(ddof=1) / seeds
    rest = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean()
    both = np.square(rest).sum() / ((seeds - 1) * (rows - 1) * seeds * rows)
    return float(np.sqrt(max(of_rows, of_seeds, of_rows + of_seeds - both)))


# As text ----------------------------------------------------------------------------------------


def table_cells(table: xr.Dataset) -> dict[str, dict[str, str]]:
    """A table as text: column to model to cell; an unreliable mean has a mark ``!`` and the share.

    Args:
        table: A table of likelihoods, or the result of :func:`paired_differences`.

    Raises:
        ValueError: For two models or two quantities of one name.
    """
    need_distinct(table, "table_cells")
    columns: dict[str, dict[str, str]] = {}
    write = _difference_cell if "difference" in table else _mean_cell
    for name, column in _columns(table):
        columns[name] = {
            model: write(column.isel(model=i), model)
            for i, model in enumerate(_labels(table, "model"))
        }
    for predicted in _labels(table, "predicted") if "predicted" in table.dims else ():
        accuracy = table["accuracy"].sel(predicted=predicted)
        columns[f"accuracy {predicted}"] = {
            str(model): _NOTHING if np.isnan(share) else f"{100 * float(share):.1f} %"
            for model, share in zip(table["model"].values, accuracy.values, strict=True)
        }
    return columns


def _columns(table: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    """Every quantity with every proposal that it has, over ``model``."""
    value = "difference" if "difference" in table else "mean"
    for i, quantity in enumerate(_labels(table, "quantity")):
        column = table.isel(quantity=i)
        if "proposal" not in table.dims:
            yield quantity, column
            continue
        for j, proposal in enumerate(_labels(table, "proposal")):
            if not bool(column[value].isel(proposal=j).isnull().all()):
                yield f"{quantity} by {proposal}", column.isel(proposal=j)


def _mean_cell(cell: xr.Dataset, model: str) -> str:
    mean, error = float(cell["mean"]), float(cell["standard_error"])
    if np.isnan(mean):
        return _NOTHING
    text = f"{mean:.2f}" if np.isnan(error) else f"{mean:.2f} ± {error:.2f}"
    if _lacks_seeds(cell):
        text += f" ({int(cell['num_seeds'])} of {cell.attrs['num_seeds']} seeds)"
    return text + _mark(cell)


def _lacks_seeds(table: xr.Dataset) -> bool:
    """Whether any mean is that of some seeds only, since the others gave no answer."""
    if "num_seeds" not in table:
        return False
    count = table["num_seeds"]
    return bool(((count > 0) & (count < table.attrs["num_seeds"])).any())


def _difference_cell(cell: xr.Dataset, model: str) -> str:
    if model == str(cell["reference"].values):
        return "reference" + _mark(cell)
    difference, error = float(cell["difference"]), float(cell["standard_error"])
    if np.isnan(difference):
        return _NOTHING
    text = f"{difference:+.2f}" if np.isnan(error) else f"{difference:+.2f} ± {error:.2f}"
    star = " *" if abs(float(cell["z"])) > SIGNIFICANT else ""
    return text + star + _mark(cell)


def _mark(cell: xr.Dataset) -> str:
    share = float(cell["pareto_k"])
    above = "impossible" in cell and bool(cell["impossible"].fillna(0))
    return (" ‡" if above else "") + (f" !{100 * share:.0f}%" if share > FLAGGED_SHARE else "")


def table_note(table: xr.Dataset) -> str:
    """What the numbers of a table are."""
    attrs = table.attrs
    rows = attrs.get("rows", table.sizes.get("row"))
    over = "the test rows" if rows is None else f"{rows} test rows"
    if "difference" in table:
        note = (
            "Difference in nats per row to the reference, which is the "
            f"{attrs['reference']}, ± paired standard error over the rows that both have, of "
            f"{over}. *: more than {SIGNIFICANT:g} standard errors."
        )
    elif "num_seeds" in table:
        fewer = ", or as many as a cell says," if _lacks_seeds(table) else ""
        note = (
            f"Nats per row, mean over {attrs['num_seeds']} seeds{fewer} ± standard error over "
            f"seeds and {over}."
        )
    else:
        note = f"Nats per row, mean ± standard error over {over}"
        if "num_samples" in attrs:
            note += f", {attrs['num_samples']} importance samples each"
        share = attrs.get("prior_share", 0.0)
        note += f", {100 * share:g} % of them from the prior." if share else "."
        note = " ".join([note, *attrs.get("remarks", ())])
    if bool((table["pareto_k"] > FLAGGED_SHARE).any()):
        note += " !n%: not reliable, Pareto k > 0.7 in n% of the rows."
    if "impossible" in table and bool((table["impossible"].fillna(0) > 0).any()):
        note += " ‡: a probability above one, since what is subtracted is estimated too low."
    return note


def to_pandas(table: xr.Dataset) -> pandas.DataFrame:
    """One line for each model and quantity, accuracies below; values of single rows are left out.

    Args:
        table: A table of any kind of this module.

    Returns:
        The variables as columns, and ``unreliable``: Pareto k > 0.7 in more than a tenth of the
        rows.
    """
    import pandas as pd

    flat = table.drop_dims(["predicted", "row"], errors="ignore")
    frame = flat.to_dataframe().reset_index()
    if "note" in frame:
        frame = frame[frame["note"] != NOT_ASKED].reset_index(drop=True)
    frame["unreliable"] = frame["pareto_k"] > FLAGGED_SHARE
    if "predicted" not in table.dims:
        return frame
    accuracy = table["accuracy"].to_dataframe().reset_index()
    accuracy["quantity"] = "accuracy " + accuracy.pop("predicted")
    accuracy["num_rows"] = table.attrs["rows"]
    return pd.concat([frame, accuracy.rename(columns={"accuracy": "mean"})], ignore_index=True)


def to_csv(table: xr.Dataset, path: str | os.PathLike[str] | None = None) -> str | None:
    """:func:`to_pandas` as CSV, in full precision.

    Args:
        table: A table of any kind of this module.
        path: Where to write it; None: it is returned.
    """
    text: str | None = to_pandas(table).to_csv(path, index=False)
    return text


def to_markdown(table: xr.Dataset) -> str:
    """A table in Markdown: models down, quantities across, a note below.

    Args:
        table: A table of any kind of this module.
    """
    columns = table_cells(table)
    lines = ["| model | " + " | ".join(each.replace("|", "\\|") for each in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for model in _labels(table, "model"):
        cells = " | ".join(each[model].replace("*", "\\*") for each in columns.values())
        name = model.replace("|", "\\|")
        lines.append(f"| {name} | {cells} |")
    return "\n".join([*lines, "", table_note(table).replace("*", "\\*"), ""])


def to_latex(table: xr.Dataset) -> str:
    """A table in LaTeX, for the package booktabs; the note is a comment below.

    The best model of a quantity is bold only where it is significantly the best one: its paired
    difference to *every* other model exceeds two standard errors, and none of these estimates is
    marked as unreliable. Without values of single rows nothing is bold.

    Args:
        table: A table of any kind of this module.
    """
    columns, bold = table_cells(table), _significantly_best(table)
    lines = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    lines += [" & ".join(["model", *map(_tex, columns)]) + r" \\", r"\midrule"]
    for model in _labels(table, "model"):
        cells = [
            rf"\textbf{{{_tex(cells[model])}}}" if bold.get(name) == model else _tex(cells[model])
            for name, cells in columns.items()
        ]
        guard = "{}" if model.startswith(("[", "*")) else ""  # not an argument of the line before
        lines.append(" & ".join([guard + _tex(model), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", f"% {table_note(table)}"]
    if bold:
        lines.append(
            f"% Bold: better than every other model by more than {SIGNIFICANT:g} paired standard "
            "errors."
        )
    return "\n".join([*lines, ""])


def _significantly_best(table: xr.Dataset) -> dict[str, str]:
    """Column to the model that is better than all others beyond doubt, if there is one."""
    if "log_prob" not in table or "difference" in table:
        return {}
    found = {}
    for name, column in _columns(paired_differences(table)):
        best = str(column["reference"].values)
        answered = column["model"].values[column["difference"].notnull().values].tolist()
        others = column.sel(model=[model for model in answered if model != best])
        clear = (others["z"] < -SIGNIFICANT) & ~others["unreliable"]
        if others.sizes["model"] and bool(clear.all()):
            found[name] = best
    return found


def _tex(text: str) -> str:
    escaped = "".join(_TEX.get(each, each) for each in text)
    return re.sub(r"(?<![\w.$-])[+-]\d[\d.]*", r"$\g<0>$", escaped)  # a sign, not a hyphen


def _labels(table: xr.Dataset, dim: str) -> list[str]:
    return [str(label) for label in table[dim].values]


def need_distinct(table: xr.Dataset, where: str) -> None:
    """Raises unless every model, quantity and proposal has a name of its own.

    Args:
        table: A table of any kind of this module.
        where: Who asks, for the message.

    Raises:
        ValueError: For two of one name: cells are found by name.
    """
    for dim in ("model", "quantity", "proposal"):
        labels = _labels(table, dim) if dim in table.dims else []
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"{where}: expected each {dim} once, found {label!r} twice; rename one of them"
                )


def _need_rows(table: xr.Dataset, where: str) -> None:
    missing = [name for name in ROW_VARIABLES.values() if name not in table]
    if missing:
        raise ValueError(
            f"{where}: expected the values of single rows, found no variable "
            f"{', '.join(missing)}; evaluate the models again with likelihood_table or mmzoo "
            "evaluate"
        )
