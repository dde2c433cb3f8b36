"""Tables: standard errors that cover what they say, several seeds, and text that says the same."""

import csv
import io
import math
import re

import numpy as np
import pytest
import xarray as xr

from mmzoo.evaluation.tables import (
    FLAGGED_SHARE,
    ROW_VARIABLES,
    aggregate_seeds,
    paired_differences,
    table_cells,
    table_note,
    table_of_rows,
    to_csv,
    to_latex,
    to_markdown,
    to_pandas,
)

EXACT = 1e-12
# Standard errors that a simulated mean may be off: beyond 5 once in two million.
ERRORS = 5.0


def make(log_prob, *, mcse=0.0, k=0.0, models=None, quantities=None, note=None, **attrs):
    """A table of these values of rows, ``(M, Q, N)``."""
    values = np.asarray(log_prob, dtype=float)
    rows = {"log_prob": values}
    for kind, value in (("mcse", mcse), ("pareto_k", k)):
        rows[kind] = np.where(np.isnan(values), np.nan, np.broadcast_to(value, values.shape))
    coords = {
        "model": models or [f"m{i}" for i in range(len(values))],
        "quantity": quantities or [f"q{i}" for i in range(values.shape[1])],
    }
    note = np.full(values.shape[:2], "", dtype=object) if note is None else note
    attrs = {"num_samples": 100, "prior_share": 0.0, "seed": 0, **attrs}
    return table_of_rows(rows, coords, note=note, attrs=attrs)


def simulated(replicates=2000, rows=100, gain=0.3, spread=1.0, mcse=0.8):
    """Two models on rows that differ much: the second is better by `gain` on average.

    Each quantity is a replicate of its own; the estimates have a Monte Carlo error.
    """
    rng = np.random.default_rng(0)
    row = 30 * rng.standard_normal((1, replicates, rows))
    own = gain * np.array([0, 1]).reshape(2, 1, 1)
    own = own + spread / math.sqrt(2) * rng.standard_normal((2, replicates, rows))
    noise = mcse * rng.standard_normal((2, replicates, rows))
    return make(row + own + noise, mcse=mcse)


# The summary of rows ----------------------------------------------------------------------------


def test_summary_of_rows_is_that_of_the_rows_that_count():
    values = [[[-1.0, np.nan, -4.0, -2.5]], [[np.nan] * 4]]
    k = np.array([0.1, 0.2, 0.9, 0.3])
    found = make(values, mcse=np.array([0.3, 0.1, 0.4, 1.2]), k=k).isel(quantity=0)
    first = found.isel(model=0)
    assert first["mean"] == -2.5 and first.num_rows == 3
    np.testing.assert_allclose(first.standard_error, np.std([-1, -4, -2.5], ddof=1) / 3**0.5)
    np.testing.assert_allclose(first.mcse, 1.3 / 3)
    np.testing.assert_allclose(first.pareto_k, 1 / 3)
    assert found.isel(model=1).num_rows == 0 and np.isnan(found["mean"][1])


def test_cell_with_a_note_is_empty():
    note = np.array([["cannot"]], dtype=object)
    found = make([[[-1.0, -2.0]]], note=note)
    assert np.isnan(found["mean"]).all() and np.isnan(found.num_rows).all()


# Paired differences -----------------------------------------------------------------------------


def test_paired_interval_covers_the_true_difference():
    gain, table = 0.3, simulated()
    found = paired_differences(table, reference="m0").isel(model=1)
    z = (found.difference - gain) / found.standard_error
    covered = (abs(z) < 1.984).mean()  # of Student's t with 99 degrees of freedom: 95 %
    margin = ERRORS * math.sqrt(0.95 * 0.05 / z.size)
    assert abs(covered - 0.95) < min(margin, 0.025)
    # An error that left the Monte Carlo part out would not cover.
    without = (abs(z) < 1.984 / math.sqrt(1 + 2 * 0.8**2)).mean()
    assert without < 0.95 - 2 * margin
    np.testing.assert_allclose(found.z, found.difference / found.standard_error, rtol=EXACT)


def test_rows_that_differ_much_hide_an_unpaired_difference():
    table = simulated()
    paired = paired_differences(table, reference="m0").standard_error.isel(model=1)
    unpaired = np.hypot(*table.standard_error.values)
    assert (unpaired > 15 * paired.values).all()


def test_monte_carlo_error_is_a_part_of_the_paired_error():
    # Where models differ by nothing else it is all of it; otherwise the parts add in quadrature.
    for spread in (0.0, 1.0):
        found = paired_differences(simulated(spread=spread), reference="m0").isel(model=1)
        np.testing.assert_allclose(found.mcse, 0.8 * math.sqrt(2 / 100), rtol=EXACT)
        variance = float((found.standard_error**2).mean())
        expected = (spread**2 + 2 * 0.8**2) / 100
        relative = math.sqrt(2 / 99 / found.sizes["quantity"])
        assert abs(variance / expected - 1) < ERRORS * relative


def test_differences_by_hand():
    values = [[[-1.0, -2.0, -6.0, np.nan]], [[-2.0, -2.5, -6.5, -100.0]], [[np.nan] * 4]]
    found = paired_differences(make(values, mcse=0.1)).isel(quantity=0)
    assert found.reference == "m0"  # on the rows in common; the fourth row does not count
    np.testing.assert_allclose(found.difference, [0, -2 / 3, np.nan], rtol=EXACT)
    error = np.std([-1, -0.5, -0.5], ddof=1) / math.sqrt(3)
    np.testing.assert_allclose(found.standard_error, [0, error, np.nan], rtol=EXACT)
    np.testing.assert_allclose(found.mcse[1], 0.1 * math.sqrt(2 / 3), rtol=EXACT)
    assert found.num_rows.values.tolist() == [3, 3, 0]
    assert np.isnan(found.z[0]) and found.z[1] < 0
    other = paired_differences(make(values), reference="m1").isel(quantity=0)
    np.testing.assert_allclose(other.difference, [2 / 3, 0, np.nan], rtol=EXACT)


def test_best_is_chosen_for_each_quantity():
    values = [[[-1.0, -1.0], [-3.0, -3.0]], [[-2.0, -2.0], [-2.0, -2.0]]]
    found = paired_differences(make(values))
    assert found.reference.values.tolist() == ["m0", "m1"]
    assert (found.difference <= 0).all()


def test_without_common_rows_there_is_no_difference():
    found = paired_differences(make([[[-1.0, np.nan]], [[np.nan, -2.0]]]))
    assert found.reference.values.tolist() == [""] and np.isnan(found.difference).all()
    nobody = paired_differences(make([[[np.nan, np.nan]]]))
    assert nobody.reference.values.tolist() == [""]
    named = paired_differences(make([[[-1.0, np.nan]], [[np.nan, -2.0]]]), reference="m0")
    assert named.num_rows.values.tolist() == [[2 - 1], [0]]


def test_row_of_zero_likelihood_is_an_infinite_difference_without_an_error():
    found = paired_differences(make([[[-1.0, -2.0]], [[-np.inf, -2.0]]])).isel(quantity=0)
    assert found.reference == "m0" and found.difference[1] == -np.inf
    assert np.isnan(found.standard_error[1])


def test_unreliable_estimates_mark_their_differences():
    k = np.zeros((3, 1, 10))
    k[1, 0, :1] = 0.8  # a tenth of the rows is not yet too many
    k[2, 0, :2] = 0.8
    values = -np.arange(3.0).reshape(3, 1, 1) * np.ones(10)
    found = paired_differences(make(values, k=k)).isel(quantity=0)
    np.testing.assert_allclose(found.pareto_k, [0, 0.1, 0.2], rtol=EXACT)
    assert found.unreliable.values.tolist() == [False, False, True]
    # The reference's own rows count for the others.
    other = paired_differences(make(values, k=k), reference="m2").isel(quantity=0)
    assert other.unreliable.values.tolist() == [True, True, True]


def test_differences_are_over_every_dimension():
    values = np.random.default_rng(0).standard_normal((2, 3, 2, 5))
    rows = {"log_prob": values, "mcse": values * 0, "pareto_k": values * 0}
    coords = {"model": ["a", "b"], "quantity": ["x", "y", "z"], "proposal": ["p", "q"]}
    table = table_of_rows(rows, coords, note=np.full((2, 3, 2), "", dtype=object))
    found = paired_differences(table.transpose("row", "proposal", ...), reference="a")
    expected = (values[1] - values[0]).mean(-1)
    by_name = found.difference.sel(model="b").transpose("quantity", "proposal")
    np.testing.assert_allclose(by_name, expected, rtol=EXACT)
    assert found.reference.dims == ("proposal", "quantity")


def test_differences_need_rows_and_a_known_reference():
    table = make([[[-1.0, -2.0]]])
    with pytest.raises(ValueError, match="expected reference to be one of m0, found 'm9'; name"):
        paired_differences(table, reference="m9")
    with pytest.raises(ValueError, match="expected the values of single rows, found no variable"):
        paired_differences(table.drop_dims("row"))


# Seeds ------------------------------------------------------------------------------------------


def crossed(replicates, seeds, rows, *, of_seeds, of_rows, rest):
    """Tables of several seeds; each quantity is a replicate, of true mean zero."""
    rng = np.random.default_rng(0)
    values = of_seeds * rng.standard_normal((seeds, replicates, 1))
    values = values + of_rows * rng.standard_normal((1, replicates, rows))
    values = values + rest * rng.standard_normal((seeds, replicates, rows))
    return [make(each[None], mcse=0.5, seed=i) for i, each in enumerate(values)]


@pytest.mark.parametrize(
    "spread",
    [
        {"of_seeds": 0.3, "of_rows": 2.0, "rest": 1.0},
        {"of_seeds": 0.3, "of_rows": 0.5, "rest": 2.0},
        {"of_seeds": 0.0, "of_rows": 2.0, "rest": 0.5},
    ],
)
def test_error_over_seeds_and_rows_is_that_of_the_mean(spread):
    replicates, seeds, rows = 2000, 8, 40
    found = aggregate_seeds(crossed(replicates, seeds, rows, **spread)).isel(model=0)
    exact = spread["of_seeds"] ** 2 / seeds + spread["of_rows"] ** 2 / rows
    exact += spread["rest"] ** 2 / (seeds * rows)
    spread_of_mean = float((found["mean"] ** 2).mean())
    assert abs(spread_of_mean / exact - 1) < ERRORS * math.sqrt(2 / replicates)
    square = found.standard_error**2
    margin = ERRORS * float(square.std() / math.sqrt(replicates))
    assert abs(float(square.mean()) - exact) < margin + 0.01 * exact  # the floor adds a little
    if spread["of_seeds"]:  # the error over rows alone is far too small
        of_rows = float((found.standard_error**2 - found.seed_std**2 / seeds).mean())
        assert exact - of_rows > 5 * margin


def test_seeds_by_hand():
    values = [[[[-1.0, -3.0, np.nan]]], [[[-2.0, -5.0, np.nan]]]]
    tables = [make(each, mcse=0.2, k=0.9, seed=7 + i) for i, each in enumerate(values)]
    found = aggregate_seeds(tables)
    assert found.attrs["seeds"] == [7, 8] and found.attrs["num_seeds"] == 2
    cell = found.isel(model=0, quantity=0)
    assert cell["mean"] == -2.75 and cell.num_rows == 2 and cell.num_seeds == 2
    np.testing.assert_allclose(cell.seed_std, np.std([-2, -3.5], ddof=1), rtol=EXACT)
    of_seeds, of_rows = 1.5**2 / 4, 2.5**2 / 4  # of two values with that distance
    np.testing.assert_allclose(cell.standard_error**2, of_seeds + of_rows - 0.25**2, rtol=EXACT)
    each = math.sqrt(2 * 0.2**2) / 2
    np.testing.assert_allclose(cell.mcse, math.sqrt(2) * each / 2, rtol=EXACT)
    assert cell.pareto_k == 1
    one = aggregate_seeds(tables[:1])
    np.testing.assert_allclose(one.standard_error, tables[0].standard_error, rtol=EXACT)
    assert np.isnan(one.seed_std).all() and (one.num_seeds == 1).all()


def test_seeds_of_tables_without_rows_share_the_error_of_the_rows():
    tables = crossed(5, 4, 10, of_seeds=1.0, of_rows=2.0, rest=0.5)
    found = aggregate_seeds([table.drop_dims("row") for table in tables]).isel(model=0)
    errors = np.stack([table.standard_error.values[0] for table in tables])
    expected = (errors**2).mean(0) + found.seed_std.values**2 / 4
    np.testing.assert_allclose(found.standard_error**2, expected, rtol=EXACT)


def test_seed_without_an_answer_does_not_count():
    note = np.array([["", "cannot"]], dtype=object)
    first = make(np.full((1, 2, 3), [[-1.0], [np.nan]]), note=note)
    second = make(np.full((1, 2, 3), -2.0))
    found = aggregate_seeds([first, second]).isel(model=0)
    assert found.num_seeds.values.tolist() == [2, 1]
    assert found["mean"].values.tolist() == [-1.5, -2.0]
    neither = aggregate_seeds([first, first]).isel(model=0)
    assert neither.num_seeds.values.tolist() == [2, 0]
    assert np.isnan(neither["mean"][1]) and neither.note.values.tolist() == ["", "cannot"]


def test_cells_say_how_many_seeds_count():
    note = np.array([["", "cannot"]], dtype=object)
    first = make(np.full((1, 2, 3), [[-1.0], [np.nan]]), note=note)
    second = make(np.full((1, 2, 3), -2.0))
    found = aggregate_seeds([first, second])
    assert table_cells(found) == {
        "q0": {"m0": "-1.50 ± 0.50"},
        "q1": {"m0": "-2.00 ± 0.00 (1 of 2 seeds)"},
    }
    assert "mean over 2 seeds, or as many as a cell says, ± standard error" in table_note(found)
    for text in (to_markdown(found), to_latex(found)):
        assert text.count("(1 of 2 seeds)") == 1
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert [line["num_seeds"] for line in lines] == ["2", "1"]
    # Seeds that all count, or of which none does, need no words.
    for tables in ([second, second], [first, first]):
        whole = aggregate_seeds(tables)
        assert "of 2 seeds" not in to_markdown(whole)
        assert "mean over 2 seeds ± standard error" in table_note(whole)


def test_accuracies_are_averaged_over_seeds():
    tables = []
    for share in (0.5, 0.7):
        table = make([[[-1.0, -2.0]]], rows=2)
        coords = {"predicted": ["label | image"]}
        table["accuracy"] = xr.DataArray([[share]], dims=("model", "predicted"), coords=coords)
        tables.append(table)
    found = aggregate_seeds(tables)
    assert table_cells(found)["accuracy label | image"]["m0"] == "60.0 %"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make([[[-1.0, -2.0, -3.0]]]), "same rows, found 3 instead of 2; aggregate"),
        (make([[[-1.0, -2.0]]], models=["b"]), "same models, found b; aggregate"),
        (make([[[-1.0, -2.0]]], quantities=["p"]), "same quantitys, found p"),
        (make([[[-1.0, -2.0]]], data_seed=1), "same rows, found data_seed = 1 instead of None"),
        (make([[[-1.0, np.nan]]]), "m0, q0: expected the same rows in every table, found row 1"),
    ],
)
def test_tables_that_do_not_go_together_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        aggregate_seeds([make([[[-1.0, -2.0]]]), other])
    with pytest.raises(ValueError, match="expected at least one table, found none"):
        aggregate_seeds([])


# Text -------------------------------------------------------------------------------------------


def written(**options):
    """Two models; the second is better at the first quantity, and nobody is at the other."""
    rng = np.random.default_rng(0)
    row = 10 * rng.standard_normal((1, 2, 50)) - 20
    gain = np.array([[0.0, 0.0], [0.5, 0.0]])[..., None]
    values = row + gain + 0.1 * rng.standard_normal((2, 2, 50))
    names = {"models": ["M_1 & co", "β|VAE"], "quantities": ["log p(image)", "log p(image | y_1)"]}
    return make(values, **names, **options)


def test_cells_say_mean_error_and_share():
    table = written(k=np.array([0, 1]).reshape(1, 2, 1))
    cells = table_cells(table)
    assert list(cells) == ["log p(image)", "log p(image | y_1)"]
    for quantity, mark in (("log p(image)", ""), ("log p(image | y_1)", " !100%")):
        cell = table.sel(model="M_1 & co", quantity=quantity)
        expected = f"{float(cell['mean']):.2f} ± {float(cell.standard_error):.2f}{mark}"
        assert cells[quantity]["M_1 & co"] == expected
    assert "not reliable" in table_note(table) and "not reliable" not in table_note(written())


def test_note_says_what_is_known():
    assert table_note(written()) == (
        "Nats per row, mean ± standard error over 50 test rows, 100 importance samples each."
    )
    assert "20 % of them from the prior." in table_note(written(prior_share=0.2))
    bare = written().drop_dims("row")
    bare.attrs.clear()
    assert table_note(bare) == "Nats per row, mean ± standard error over the test rows."
    assert "mean over 1 seeds ± standard error over" in table_note(aggregate_seeds([written()]))


def test_cells_of_differences():
    cells = table_cells(paired_differences(written()))
    assert cells["log p(image)"]["β|VAE"] == "reference"
    assert re.fullmatch(r"-0\.\d\d ± 0\.0\d \*", cells["log p(image)"]["M_1 & co"])
    assert not any("*" in cell for cell in cells["log p(image | y_1)"].values())
    lonely = paired_differences(make([[[-1.0]], [[-2.0]]]))
    assert table_cells(lonely)["q0"]["m1"] == "-1.00"
    assert "best of each quantity" in table_note(lonely) and "of 1 test rows" in table_note(lonely)


def test_markdown_has_one_cell_for_each_column():
    for table in (written(), paired_differences(written()), aggregate_seeds([written()])):
        lines = to_markdown(table).splitlines()
        counts = {len(re.split(r"(?<!\\)\|", line)) for line in lines[:4]}
        assert counts == {5} and lines[4] == ""
        assert r"log p(image \| y_1)" in lines[0] and r"β\|VAE" in lines[3]
        assert table_note(table).split("*")[0] in lines[5].replace("\\", "")


def test_latex_is_escaped_and_has_one_cell_for_each_column():
    for table in (written(k=1.0), paired_differences(written()), aggregate_seeds([written()])):
        text = to_latex(table)
        body = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert [len(re.split(r"(?<!\\)&", line)) for line in body] == [3, 3, 3]
        assert text.startswith("\\begin{tabular}{lrr}\n\\toprule\n")
        assert r"M\_1 \& co" in text and r"log p(image \textbar{} y\_1)" in text
        code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
        assert not re.search(r"(?<!\\)[%_#]|±|–", code)
        assert code.count("$") % 2 == 0 and code.count("{") == code.count("}")
    assert r"$-0" in to_latex(paired_differences(written())) and r"\%" in to_latex(written(k=1.0))


def test_latex_does_not_read_a_name_as_an_argument():
    r"""Brackets and a star after `\\` or a rule would be its argument, across the line's end."""
    table = make([[[-1.0, -2.0]]] * 3, models=["[a]", "*b*", "[c]"])
    lines = to_latex(table).splitlines()
    assert [line.split(" & ")[0] for line in lines[4:7]] == ["{}[a]", "{}*b*", "{}[c]"]


def test_only_a_significantly_best_model_is_bold():
    bold = re.findall(r"β\\textbar\{\}VAE & \\textbf\{", to_latex(written()))
    assert len(bold) == 1 and to_latex(written()).count(r"\textbf") == 1
    # Heavy tails, a single model, or no values of rows: nothing is certain.
    for table in (written(k=1.0), written().isel(model=[0]), written().drop_dims("row")):
        assert r"\textbf" not in to_latex(table)
    # Better than one of two is not enough.
    three = xr.concat([written(), written().isel(model=[1]).assign_coords(model=["x"])], "model")
    assert r"\textbf" not in to_latex(three)


def test_frame_holds_what_the_table_holds():
    table = written(k=np.array([0, 1]).reshape(1, 2, 1), rows=50)
    coords = {"predicted": ["label | image"]}
    table["accuracy"] = xr.DataArray([[0.5], [0.25]], dims=("model", "predicted"), coords=coords)
    frame = to_pandas(table)
    assert len(frame) == 4 + 2 and "row" not in frame and "log_prob" not in frame
    for line in frame.head(4).itertuples():
        cell = table.sel(model=line.model, quantity=line.quantity)
        assert line.mean == cell["mean"] and line.standard_error == cell.standard_error
        assert line.unreliable == (cell.pareto_k > FLAGGED_SHARE)
    assert frame["quantity"].iloc[-1] == "accuracy label | image"
    assert frame["mean"].iloc[-1] == 0.25


def test_csv_is_read_back(tmp_path):
    found = paired_differences(written())
    text = to_csv(found)
    assert to_csv(found, tmp_path / "it.csv") is None
    assert (tmp_path / "it.csv").read_text() == text
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["model"] for line in lines] == ["M_1 & co", "M_1 & co", "β|VAE", "β|VAE"]
    assert float(lines[0]["difference"]) == float(found.difference[0, 0])
    assert {line["unreliable"] for line in lines} == {"False"}


def test_models_of_one_name_are_refused():
    """Cells are found by name: two lines would show the numbers of one."""
    twice = make([[[-1.0, -2.0]], [[-3.0, -4.0]]], models=["a", "a"])
    for write in (paired_differences, table_cells, to_latex):
        with pytest.raises(ValueError, match="expected each model once, found 'a' twice; rename"):
            write(twice)
    with pytest.raises(ValueError, match="table_cells: expected each quantity once, found 'q'"):
        table_cells(make([[[-1.0, -2.0], [-3.0, -4.0]]], quantities=["q", "q"]))


def test_names_of_variables_of_rows():
    assert set(ROW_VARIABLES.values()) < set(written().data_vars)


# The picture ------------------------------------------------------------------------------------


def test_forest_plot_of_differences_has_a_line_at_the_reference():
    from mmzoo.evaluation.figures_likelihood import plot_likelihood_table

    found = paired_differences(written(k=np.array([0, 1]).reshape(1, 2, 1)), reference="β|VAE")
    for ax, quantity in zip(plot_likelihood_table(found).axes, found["quantity"].values):
        cell = found.sel(quantity=quantity)
        assert ax.get_title() == quantity and "difference" in ax.get_xlabel()
        upright = [line for line in ax.lines if list(line.get_xdata()) == [0.0, 0.0]]
        assert upright
        bars = [each.lines[0].get_xdata()[0] for each in ax.containers]
        assert bars == cell.difference.values.tolist()
        face = ax.containers[0].lines[0].get_markerfacecolor()
        assert (face == "white") == bool(cell.unreliable[0])
    plain = plot_likelihood_table(written()).axes[0]
    assert plain.get_xlabel() == "nats per row"


def test_a_probability_above_one_is_marked_and_never_the_best() -> None:
    rows = {"log_prob": np.array([[[0.4, 0.6]], [[-0.5, -0.7]], [[-0.6, -0.9]]])}
    rows |= {"mcse": np.zeros((3, 1, 2)), "pareto_k": np.zeros((3, 1, 2))}
    coords = {"model": ["liar", "good", "fair"], "quantity": ["log p(y | x)"]}
    table = table_of_rows(rows, coords, note=np.full((3, 1), "", dtype=object))
    assert str(paired_differences(table)["reference"].item()) == "liar"
    table["impossible"] = (("model", "quantity"), np.array([[True], [False], [False]]))
    found = paired_differences(table)
    assert str(found["reference"].item()) == "good"
    np.testing.assert_allclose(found["difference"].values[:, 0], [1.1, 0.0, -0.15])
    cells = table_cells(table)["log p(y | x)"]
    assert "‡" in cells["liar"]
    assert "‡" not in cells["good"] + cells["fair"]
    assert "a probability above one" in table_note(table)
