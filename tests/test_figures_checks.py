"""The figures of checks: what they draw is read back from the artists."""

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_figures import check_texts, texts

from mmzoo.evaluation.arviz_checks import pit
from mmzoo.evaluation.calibration import calibration_ecdf, simulation_based_calibration
from mmzoo.evaluation.calibration import coverage as coverage_of
from mmzoo.evaluation.datatree import to_datatree
from mmzoo.evaluation.figures_checks import (
    _simultaneous_band,
    plot_calibration,
    plot_coherence,
    plot_coverage,
    plot_differences,
    plot_likelihood_curve,
    plot_pareto_k,
    plot_pit,
    plot_weights,
)
from mmzoo.evaluation.figures_latents import plot_contraction
from mmzoo.evaluation.figures_style import _VERMILION
from mmzoo.evaluation.likelihood import likelihood_table
from mmzoo.evaluation.pareto import pareto_k
from mmzoo.evaluation.posterior import contraction
from mmzoo.evaluation.tables import paired_differences
from mmzoo.exact import LinearGaussianWorld
from mmzoo.models import MODELS

SUBSETS = ["image", "label", "image+label"]


def weights() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(500, 40)) * np.linspace(0.1, 3, 40)


def ecdf() -> xr.Dataset:
    points = np.arange(1, 100) / 100
    values = np.zeros((3, 2, 99))
    values[1, 1] = 0.2 * np.sin(2 * np.pi * points)
    return xr.Dataset(
        {
            "difference": (("subset", "latent", "point"), values),
            "lower": ("point", np.full(99, -0.1)),
            "upper": ("point", np.full(99, 0.1)),
        },
        coords={"subset": SUBSETS, "latent": ["z[0]", "z[1]"], "point": points},
    )


def coverage() -> xr.Dataset:
    dims, levels = ("subset", "latent", "level"), [0.5, 0.9]
    values = np.broadcast_to([0.4, 0.8], (3, 2, 2)) + np.array([0.0, 0.1])[:, None]
    return xr.Dataset(
        {"coverage": (dims, values), "standard_error": (dims, np.full((3, 2, 2), 0.01))},
        coords={"subset": SUBSETS, "latent": ["z[0]", "z[1]"], "level": levels},
    )


def curve(shift: float = 0.0) -> xr.Dataset:
    dims = ("num_samples", "row")
    values = np.array([[-3.0, -5.0, np.nan], [-2.0, -4.0, np.nan], [-2.0, -4.0, np.nan]])
    k = np.array([[np.nan, np.nan, np.nan], [0.1, 0.9, 0.1], [0.1, 0.2, 0.1]])
    return xr.Dataset(
        {
            "log_prob": (dims, values + shift),
            "mcse": (dims, np.full((3, 3), 0.5)),
            "pareto_k": (dims, k),
        },
        coords={"num_samples": [5, 100, 1000]},
    )


def differences() -> xr.Dataset:
    dims = ("model", "quantity")
    return xr.Dataset(
        {
            "difference": (dims, np.array([[-2.0, -0.1], [0.0, 0.0], [-1.0, np.nan]])),
            "standard_error": (dims, np.array([[0.5, 0.2], [0.0, 0.0], [0.1, np.nan]])),
            "pareto_k": (dims, np.array([[0.0, 0.0], [0.0, 0.0], [0.34, np.nan]])),
            "unreliable": (dims, np.array([[False, False], [False, False], [True, False]])),
            "reference": ("quantity", ["JMVAE", "JMVAE"]),
        },
        coords={
            "model": ["MVAE", "JMVAE", "MoPoE"],
            "quantity": ["log p(image, label)", "log p(image)"],
        },
    )


def coherences() -> dict[str, xr.Dataset]:
    average = {"MVAE": [0.4, 0.6], "MoPoE": [0.6, 0.8]}
    return {
        name: xr.Dataset(
            {
                "average": ("size", values),
                "average_standard_error": ("size", [0.01, 0.02]),
                "classifier_accuracy": ("target", [0.9, 1.0]),
            },
            coords={"size": [1, 2]},
        )
        for name, values in average.items()
    }


def is_red(artist: object) -> bool:
    return to_hex(artist.get_color()).upper() == _VERMILION


# Weights ----------------------------------------------------------------------------------------


def test_weights_are_pooled_shared_and_diagnosed() -> None:
    log_w = weights()
    figure = plot_weights(log_w)
    spread, shares, tail = figure.axes
    heights = np.array([patch.get_height() for patch in spread.patches])
    share = np.exp(log_w) / np.exp(log_w).sum(0)
    relative = np.log(500 * share)
    edges = np.array([patch.get_x() for patch in spread.patches])
    expected = (relative >= edges[0]).sum()  # the lowest 0.2 % are cut off
    assert abs(heights.sum() - expected) <= 1
    carried = np.median(np.cumsum(-np.sort(-share, 0), 0), 1)
    np.testing.assert_allclose(shares.lines[0].get_ydata(), 100 * carried, rtol=1e-12)
    np.testing.assert_allclose(shares.lines[0].get_xdata(), np.arange(1, 501) / 5, rtol=1e-12)
    k = np.sort(pareto_k(log_w))
    drawn = np.concatenate([np.asarray(dots.get_offsets())[:, 1] for dots in tail.collections])
    np.testing.assert_allclose(np.sort(drawn), k, rtol=1e-12)
    assert len(tail.collections[1].get_offsets()) == (k > 0.7).sum() > 0
    assert tail.get_title() == f"k > 0.7 in {100 * (k > 0.7).mean():.0f} % of rows"
    check_texts(figure)


def test_weights_do_not_change_with_a_constant_or_the_container() -> None:
    log_w = weights()
    plain = plot_weights(log_w).axes[1].lines[0].get_ydata()
    shifted = plot_weights(torch.as_tensor(log_w - 4000)).axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(plain, shifted, rtol=1e-10)
    array = xr.DataArray(log_w[None], dims=("chain", "draw", "row"))
    tree = xr.DataTree.from_dict({"sample_stats": array.to_dataset(name="log_weight")})
    for found in (array, tree):
        np.testing.assert_array_equal(plot_weights(found).axes[1].lines[0].get_ydata(), plain)


def test_rows_without_a_tail_are_counted() -> None:
    k = xr.Dataset({"pareto_k": ("row", [0.1, -np.inf, 0.9, np.nan])})
    ax = plot_pareto_k(k, Figure().subplots())
    assert ax.get_title() == "k > 0.7 in 33 % of rows"
    assert ax.get_xlabel() == "rows, sorted (1 with equal weights, 1 without k)"
    assert plot_pareto_k(np.array([np.nan])).get_title() == "Pareto k"
    equal = plot_pareto_k(np.full(5, -np.inf))
    assert equal.get_title() == "k > 0.7 in 0 % of rows"
    assert equal.get_xlabel() == "rows, sorted (5 with equal weights)"


# Calibration ------------------------------------------------------------------------------------


def test_a_curve_that_leaves_the_band_is_named() -> None:
    figure = plot_calibration(ecdf())
    assert [ax.get_title() for ax in figure.axes] == [
        "given image",
        "given label",
        "given image + label",
    ]
    assert [texts(ax) for ax in figure.axes] == [[], ["outside: z[1]"], []]
    red = [[is_red(line) for line in ax.lines[1:]] for ax in figure.axes]
    assert red == [[False, False], [False, True], [False, False]]
    drawn = figure.axes[1].lines[2].get_ydata()
    np.testing.assert_array_equal(drawn[1:-1], ecdf()["difference"].values[1, 1])
    assert drawn[0] == drawn[-1] == 0
    check_texts(figure)
    narrow = plot_calibration(ecdf(), columns=1)
    assert narrow.get_figwidth() < 4
    check_texts(narrow)


def test_statistics_are_dashed_beside_the_latents() -> None:
    dims = ("subset", "statistic", "point")
    values = np.zeros((3, 1, 99))
    values[0] = 0.15
    more = ecdf().assign(statistic_difference=(dims, values))
    figure = plot_calibration(more.assign_coords(statistic=["log_joint"]))
    assert texts(figure.axes[0]) == ["outside: log joint"]
    assert [line.is_dashed() for line in figure.axes[0].lines[1:]] == [False, False, True]
    wide = ecdf().isel(latent=[1] * 6)
    wide = wide.assign_coords(latent=[f"a_long_name_{i}" for i in range(6)])
    figure = plot_calibration(wide)
    assert texts(figure.axes[1]) == ["outside: a_long_name_0 and 5 more"]
    check_texts(figure)


def test_pictures_of_what_the_checks_return() -> None:
    """The names of the datasets are those that the figures read."""
    world = LinearGaussianWorld.random({"image": 5, "label": 3}, 2, seed=0, diagonal=True)
    vae = MODELS["mvae"](world.modalities(encoder="exact"), latent_dim=2)
    found = simulation_based_calibration(vae, num_rows=40, num_draws=19)
    assert len(plot_calibration(calibration_ecdf(found)).axes) == 3
    assert len(plot_coverage(coverage_of(found)).containers) == 3
    heat = plot_contraction(contraction(vae, world.sample(20, seed=1), num_draws=20))
    assert heat.images[0].get_array().shape == (3, 2)
    x = world.sample(20, seed=1)
    other = MODELS["mvae"](world.modalities(), latent_dim=2)
    table = likelihood_table({"exact": vae, "fresh": other}, x, num_samples=50)
    figure = plot_differences(paired_differences(table))
    titles = [ax.get_title() for ax in figure.axes if ax.axison]
    assert titles == table["quantity"].values.tolist()
    assert all("reference" in texts(ax) for ax in figure.axes if ax.axison)


def test_coverage_stands_against_the_diagonal() -> None:
    ax = plot_coverage(coverage())
    assert [c.get_label() for c in ax.containers] == [
        "given image",
        "given label",
        "given image + label",
    ]
    np.testing.assert_allclose(ax.containers[1][0].get_ydata(), [0.45, 0.85])
    np.testing.assert_allclose(ax.containers[1][0].get_xdata(), [0.5, 0.9])
    low, high = ax.containers[1][2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.45 - 0.0196, 0.45 + 0.0196))
    check_texts(ax.figure)


def test_coverage_of_many_subsets_has_a_legend_beside_the_curves() -> None:
    names = ["img", "lab", "vec", "img+lab", "img+vec", "lab+vec", "img+lab+vec"]
    ax = plot_coverage(coverage().isel(subset=[0, 1, 2, 0, 1, 2, 0]).assign_coords(subset=names))
    FigureCanvasAgg(ax.figure).draw()
    legend, panel = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert not legend.padded(-1).overlaps(panel)
    assert legend.x0 >= 0 and legend.x1 <= ax.figure.bbox.width
    assert legend.y1 <= ax.figure.bbox.height
    assert panel.height > 0.5 * ax.figure.bbox.height
    check_texts(ax.figure)


@pytest.mark.parametrize("num", [20, 300])
def test_simultaneous_band_holds_so_many_curves(num: int) -> None:
    """Of uniform samples that the band was not made from."""
    points = np.linspace(0, 1, min(num, 100) + 1)[1:-1]
    lower, upper = _simultaneous_band(num, points, 0.9)
    rng = np.random.default_rng(1)
    values = np.sort(rng.random((2000, num)), 1)
    curves = (values[:, None, :] <= points[:, None]).mean(-1) - points
    inside = ((curves >= lower) & (curves <= upper)).all(1).mean()
    # Binomial error of both simulations; counts are discrete, which can only widen the band.
    error = np.hypot((0.1 * 0.9 / 2000) ** 0.5, (0.1 * 0.9 / 2000) ** 0.5)
    assert -5 * error < inside - 0.9 < 5 * error + 0.04
    wrong = np.sort(rng.random((200, num)) ** (2.5 if num == 20 else 1.4), 1)
    curves = (wrong[:, None, :] <= points[:, None]).mean(-1) - points
    assert ((curves >= lower) & (curves <= upper)).all(1).mean() < 0.6


def test_pit_curves_of_a_right_and_a_wrong_model() -> None:
    world = LinearGaussianWorld.random({"image": 5, "label": 3}, 2, seed=0, diagonal=True)
    scales = {name: 2 * scale for name, scale in world.scales.items()}
    wide = LinearGaussianWorld(world.weights, world.biases, scales)
    x = world.sample(400, seed=1)
    for truth, few in ((world, True), (wide, False)):
        vae = MODELS["mvae"](truth.modalities(encoder="exact"), latent_dim=2)
        found = pit(vae, x, target="image", num_draws=100, batch_size=200)
        ax = plot_pit(found)
        red = sum(is_red(line) for line in ax.lines[1:])
        assert (red <= 1) if few else (red == 5)
        assert texts(ax) == [f"{red} of 5 entries leave the 95 % band"]
        assert ax.get_title() == "image given label"
        column = found["pit"].values[:, 0]
        points = np.asarray(ax.lines[1].get_xdata())
        expected = (column[None] <= points[:, None]).mean(1) - points
        np.testing.assert_allclose(ax.lines[1].get_ydata(), expected, atol=1e-12)
        check_texts(ax.figure)


# Likelihoods and tables -------------------------------------------------------------------------


def test_likelihood_curve_has_means_bands_and_marks() -> None:
    ax = plot_likelihood_curve(curve())
    line, solid, hollow = ax.lines[:3]
    np.testing.assert_array_equal(line.get_xdata(), [5, 100, 1000])
    np.testing.assert_array_equal(line.get_ydata(), [-4, -3, -3])  # of the two whole rows
    np.testing.assert_array_equal(solid.get_xdata(), [1000])
    np.testing.assert_array_equal(hollow.get_xdata(), [5, 100])  # k unknown, k large
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    error = 1.96 * 0.5 / 2**0.5
    assert band.min() == pytest.approx(-4 - error)
    assert band.max() == pytest.approx(-3 + error)
    rows = plot_likelihood_curve(curve(), band="rows").collections[0].get_paths()[0].vertices
    assert rows[:, 1].min() == pytest.approx(-4 - 1.96)
    assert ax.get_xscale() == "log"
    assert ax.get_ylabel() == "log p(x), nats per row"
    both = plot_likelihood_curve({"MVAE": curve(), "JMVAE": curve(1.0)})
    names = [text.get_text() for text in both.get_legend().get_texts()]
    assert names == ["MVAE", "JMVAE", "k large or unknown"]
    check_texts(both.figure)


def test_coherence_by_number_of_modalities() -> None:
    ax = plot_coherence(coherences())
    np.testing.assert_allclose(ax.containers[1][0].get_ydata(), [0.6, 0.8])
    assert ax.get_xticks().tolist() == [1, 2]
    dotted = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert dotted[0].get_ydata()[0] == pytest.approx(0.95)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert set(names) == {"MVAE", "MoPoE", "classifier on the data"}
    check_texts(ax.figure)
    assert (
        plot_coherence(coherences()["MVAE"].drop_vars("classifier_accuracy")).get_legend() is None
    )


def test_differences_show_intervals_reference_flags_and_absences() -> None:
    figure = plot_differences(differences())
    joint, image = figure.axes
    assert joint.get_title() == "log p(image, label)"
    segments = [bar.get_segments()[0] for c in joint.containers for bar in c[2]]
    np.testing.assert_allclose(segments[0][:, 0], [-2 - 0.98, -2 + 0.98], rtol=1e-12)
    assert texts(joint) == ["reference", "k > 0.7 in 34 %"]
    assert texts(image) == ["reference", "not available"]
    faces = [c[0].get_markerfacecolor() for c in joint.containers]
    assert faces[1] == "white"
    colors = [c[0].get_color() for ax in (joint, image) for c in ax.containers]
    assert len({colors[0], colors[1], colors[2]}) == 3  # clear, flagged, within the error
    assert [label.get_text() for label in joint.get_yticklabels()] == ["MVAE", "JMVAE", "MoPoE"]
    check_texts(figure)
    check_texts(plot_differences(differences(), columns=1))
    bare = differences()[["difference", "standard_error"]].isel(quantity=0, drop=True)
    assert texts(plot_differences(bare).axes[0]) == ["reference"]


def test_pictures_are_drawn_where_they_are_told_and_leave_no_trace() -> None:
    before = dict(matplotlib.rcParams)
    figure = Figure(figsize=(12, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    assert plot_weights(weights(), top) is top
    assert plot_calibration(ecdf(), bottom) is bottom
    other = Figure(layout="constrained")
    assert plot_differences(differences(), other) is other
    for plot, data in (
        (plot_pareto_k, np.array([0.1, 0.9])),
        (plot_coverage, coverage()),
        (plot_likelihood_curve, curve()),
        (plot_coherence, coherences()),
        (plot_pit, xr.Dataset({"pit": (("row", "entry"), np.full((3, 1), 0.5))})),
    ):
        ax = Figure().subplots()
        assert plot(data, ax) is ax
    assert dict(matplotlib.rcParams) == before
    assert not matplotlib._pylab_helpers.Gcf.figs  # nothing is left in pyplot


def test_weights_of_a_tree() -> None:
    world = LinearGaussianWorld.random({"image": 5, "label": 3}, 2, seed=0, diagonal=True)
    vae = MODELS["mvae"](world.modalities(), latent_dim=2)
    tree = to_datatree(vae, world.sample(6, seed=1), num_draws=50, num_samples=0, given=[])
    offsets = [len(d.get_offsets()) for d in plot_weights(tree).axes[2].collections]
    assert sum(offsets) == 6


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"log_weight: expected shape \(K, N\), found \(3,\)"):
        plot_weights(np.zeros(3))
    with pytest.raises(ValueError, match="log_weight: expected finite weights, .* in row 1"):
        plot_weights(np.array([[0.0, np.nan], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="columns: expected at least 1, found 0"):
        plot_weights(weights(), columns=0)
    empty = xr.Dataset()
    for plot, names in (
        (plot_calibration, "ecdf: .*difference, lower, upper.*calibration_ecdf"),
        (plot_coverage, "coverage: .*coverage, standard_error"),
        (plot_pit, "pit: expected the variables pit"),
        (plot_likelihood_curve, "curves: .*log_prob, mcse"),
        (plot_coherence, "results: .*average"),
        (plot_differences, "differences: .*paired_differences"),
    ):
        with pytest.raises(ValueError, match=names):
            plot(empty)
    with pytest.raises(ValueError, match="band: expected 'mcse' or 'rows', found 'fun'"):
        plot_likelihood_curve(curve(), band="fun")
    some = xr.Dataset({"pit": (("row", "entry"), np.full((3, 1), np.nan))})
    with pytest.raises(ValueError, match="pit: expected rows with values, found none"):
        plot_pit(some)
    with pytest.raises(ValueError, match="level: expected a probability inside"):
        plot_pit(some, level=1.0)
