"""The figures: what they draw is read back from the artists."""

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor, nn

from mmzoo import Modality
from mmzoo.evaluation.figures_likelihood import plot_likelihood_table
from mmzoo.evaluation.figures_planes import plot_latent_plane
from mmzoo.evaluation.figures_samples import plot_reconstructions, plot_samples
from mmzoo.evaluation.figures_training import plot_history, training_figure
from mmzoo.exact import LinearGaussianWorld
from mmzoo.models import MODELS
from mmzoo.vae import MultimodalVAE

ROWS = 12


def image_and_label() -> tuple[MultimodalVAE, dict[str, Tensor], Tensor]:
    """A model whose label decoder always says class 1, and data of three classes."""

    class Constant(nn.Module):
        def __init__(self, latent_dim: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(latent_dim, 3))

        def forward(self, z: Tensor) -> Tensor:
            return z @ self.weight + torch.tensor([0.0, 5.0, 0.0])

    vae = MODELS["mvae"](
        [
            Modality("image", (1, 6, 4), likelihood="bernoulli"),
            Modality("label", (3,), likelihood="one_hot_categorical", decoder=Constant),
        ],
        latent_dim=4,
    )
    classes = torch.arange(ROWS) % 3
    return (
        vae,
        {"image": torch.rand(ROWS, 1, 6, 4).round(), "label": torch.eye(3)[classes]},
        classes,
    )


def history(epochs: int = 20) -> xr.Dataset:
    steps = np.arange(epochs, dtype=float)
    return xr.Dataset(
        {
            "loss": ("epoch", 50 + 5 / (1 + steps)),
            "validation_loss": ("epoch", 51 + 5 / (1 + steps)),
            "log_likelihood": (("epoch", "modality"), np.stack([-steps, -2 * steps], 1)),
            "kl": (("epoch", "latent"), 3 * np.ones((epochs, 1))),
            "wasserstein": ("epoch", steps),
            "gradient_norm": ("epoch", steps),
        },
        coords={"epoch": np.arange(epochs), "modality": ["image", "label"], "latent": ["z"]},
    )


def table() -> xr.Dataset:
    dims = ("model", "quantity")
    return xr.Dataset(
        {
            "mean": (dims, np.array([[-20.0, -18.0], [-19.0, np.nan]])),
            "standard_error": (dims, np.array([[0.5, 0.25], [0.5, np.nan]])),
            "pareto_k": (dims, np.array([[0.34, 0.0], [0.1, np.nan]])),
        },
        coords={"model": ["MVAE", "CVAE"], "quantity": ["log p(image, label)", "log p(image)"]},
    )


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def check_texts(figure: Figure) -> None:
    """Renders without a warning; no text covers another one or leaves the figure."""
    FigureCanvasAgg(figure).draw()
    inside = [(text, text.get_window_extent()) for text in texts_of(figure)]
    for index, (text, box) in enumerate(inside):
        assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, text
        assert box.y0 >= -1 and box.y1 <= figure.bbox.height + 1, text
        for other, another in inside[:index]:
            # a pixel of padding belongs to no letter
            overlap = box.padded(-1).overlaps(another.padded(-1))
            assert not overlap, (text.get_text(), other.get_text())


def texts_of(figure: Figure) -> list[Text]:
    """All texts but the labels of ticks."""
    found = [text for legend in figure.legends for text in legend.get_texts()]
    for ax in figure.axes:
        found += [*ax.texts, *([ax.title, ax.xaxis.label, ax.yaxis.label] if ax.axison else [])]
    return [text for text in found if text.get_text()]


def test_bound_is_minus_the_loss() -> None:
    ax = plot_history(history())
    training, held_out = ax.lines
    np.testing.assert_array_equal(training.get_ydata(), -history()["loss"])
    np.testing.assert_array_equal(held_out.get_ydata(), -history()["validation_loss"])
    np.testing.assert_array_equal(training.get_xdata(), np.arange(1, 21))
    assert ax.get_ylabel() == "nats per row"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["training", "held out"]


def test_quantities_are_drawn_whole_or_by_part() -> None:
    both = plot_history(history(), quantity="log_likelihood")
    assert [line.get_label() for line in both.lines] == ["image", "label"]
    one = plot_history(history(), quantity="log_likelihood/label", ax=Figure().subplots())
    np.testing.assert_array_equal(one.lines[0].get_ydata(), -2 * np.arange(20))
    assert one.get_title() == "Expected log p(label | z)"


def test_a_steep_start_does_not_flatten_the_rest() -> None:
    steep = history()
    steep["loss"][0] = 1e6
    low, high = plot_history(steep).get_ylim()
    assert -60 < low < high < -49


def test_training_figure_has_a_panel_for_each_quantity() -> None:
    other = history(10).drop_vars(["wasserstein", "validation_loss"])
    figure = training_figure({"MVAE": history(), "MMVAE": other})
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles[:4] == [
        "Bound (each model's own)",
        "Expected log p(image | z)",
        "Expected log p(label | z)",
        "KL to the prior",
    ]
    assert titles[4].startswith("Squared Wasserstein distance")
    assert [len(ax.lines) for ax in figure.axes[:5]] == [3, 2, 2, 2, 1]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["MVAE", "MMVAE", "training", "held out"]
    colors = [line.get_color() for line in figure.axes[1].lines]
    assert colors[0] != colors[1]
    check_texts(figure)
    check_texts(training_figure(history(1)))


def test_reconstructions_mark_wrong_classes_and_holes() -> None:
    vae, x, classes = image_and_label()
    observed = {"image": torch.arange(ROWS) != 2, "label": torch.arange(ROWS) != 1}
    x["image"][2], x["label"][1] = torch.nan, torch.nan
    ax = plot_reconstructions(vae, x, observed, num_rows=5)
    words = texts(ax)
    names = ["data", "given image", "given label", "given image\n+ label"]
    assert [word for word in words if word in names] == names
    cells = [word for word in words if word not in names]
    assert cells[:5] == ["0", "–", "2", "0", "1"]
    assert cells[5:10] == ["1 ×", "1", "–", "1 ×", "1"]  # row 1 has no truth, row 2 no image
    assert cells[10:15] == ["1 ×", "–", "1 ×", "1 ×", "1"]
    assert cells[15:] == ["1 ×", "1", "1 ×", "1 ×", "1"]
    assert len(ax.images) == 4 * 5 - 3
    assert len(ax.patches) == 3
    np.testing.assert_array_equal(ax.images[0].get_array(), x["image"][0, 0])
    check_texts(ax.figure)


def test_pictures_are_the_means_of_the_model() -> None:
    vae, x, _ = image_and_label()
    for parameter in vae.generative.decoders["image_"].parameters():
        nn.init.zeros_(parameter)  # every pixel has probability 1/2
    ax = plot_samples(vae, 7, columns=4)
    assert len(ax.images) == 7
    for image in ax.images:
        np.testing.assert_array_equal(image.get_array(), np.full((6, 4), 0.5))
    assert texts(ax) == ["", *["1"] * 4, "", *["1"] * 3]


def test_vectors_numbers_and_class_names() -> None:
    modalities = [
        Modality("spectrum", (30,)),
        Modality("few", (4,)),
        Modality("volts", ()),
        Modality("kind", (3,), likelihood="one_hot_categorical"),
        Modality("colour", (3, 4, 4), likelihood="bernoulli"),
    ]
    vae = MODELS["mvae"](modalities, latent_dim=3)
    x = {"spectrum": torch.randn(4, 30), "few": torch.randn(4, 4), "volts": torch.arange(4.0)}
    x |= {"kind": torch.eye(3)[[0, 1, 2, 0]], "colour": torch.rand(4, 3, 4, 4).round()}
    names = {"kind": ["ant", "bee", "cat"]}
    ax = plot_reconstructions(vae, x, given=[["spectrum", "kind"]], class_names=names)
    assert texts(ax)[:4] == ["data", "spectrum", "few", "colour"]
    assert texts(ax)[4:12] == ["ant", "bee", "cat", "ant", "0", "1", "2", "3"]
    assert len(ax.lines) == 2 * 4
    assert len(ax.containers) == 2 * 4
    assert ax.images[0].get_array().shape == (4, 4, 3)
    check_texts(ax.figure)
    only = plot_reconstructions(vae, x, given=["spectrum"], show=["few"])
    assert len(only.containers) == 2 * 4
    assert not only.lines


def test_draws_leave_the_random_state_and_the_modes() -> None:
    vae, x, classes = image_and_label()
    vae.train()
    state = torch.get_rng_state()
    pictures = [plot_samples(vae, 4, seed=seed).images[0].get_array() for seed in (0, 0, 1)]
    plot_latent_plane(vae, x, classes)
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert np.abs(pictures[0] - pictures[2]).max() > 0
    assert not matplotlib._pylab_helpers.Gcf.figs  # nothing is left in pyplot


def test_latent_plane_shows_every_row_that_has_the_subset() -> None:
    world = LinearGaussianWorld.random({"image": 5, "label": 3}, 2, seed=0, diagonal=True)
    vae = MODELS["mvae"](world.modalities(encoder="exact"), latent_dim=2)
    x = world.sample(200, seed=1)
    observed = {"image": torch.arange(200) % 4 > 0}
    labels = (torch.arange(200) % 2).numpy()
    figure = plot_latent_plane(vae, x, labels, observed)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["given image", "given label", "given image + label"]
    points = [np.asarray(ax.collections[0].get_offsets()) for ax in figure.axes]
    assert [len(each) for each in points] == [150, 200, 200]
    exact = world.posterior(x, {"image": observed["image"], "label": ~observed["image"] & False})
    z = torch.tensor(points[0])  # two dimensions are drawn as they are: draws of the posterior
    scores = (z - exact.mean[observed["image"]]) / exact.variance[observed["image"]].sqrt()
    assert scores.mean(0).abs().max() < 5 / 150**0.5
    assert (scores.var(0) - 1).abs().max() < 5 * (2 / 150) ** 0.5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1"]
    check_texts(figure)


def test_latent_plane_is_a_projection_on_the_largest_components() -> None:
    vae, x, _ = image_and_label()
    figure = plot_latent_plane(vae, x, np.linspace(0, 1, ROWS), subsets=[["image"], ["label"]])
    assert "% of variance" in figure.axes[0].get_xlabel()
    points = [np.asarray(ax.collections[0].get_offsets()) for ax in figure.axes[:2]]
    both = np.concatenate(points)
    assert abs(np.cov(both.T)[0, 1]) < 1e-10  # principal axes are uncorrelated over all subsets
    assert both[:, 0].var() >= both[:, 1].var()
    many = plot_latent_plane(vae, x, np.arange(ROWS) / 7.0)
    assert len(many.legends) == 1  # twelve values are classes
    check_texts(many)


def test_continuous_labels_have_a_colour_bar() -> None:
    world = LinearGaussianWorld.random({"image": 5, "label": 3}, 2, seed=0, diagonal=True)
    vae = MODELS["mvae"](world.modalities(encoder="exact"), latent_dim=2)
    figure = plot_latent_plane(vae, world.sample(50, seed=1), np.linspace(0, 1, 50))
    assert not figure.legends
    assert figure.axes[-1].get_ylabel() == "label"


def test_rows_without_a_label_are_grey() -> None:
    vae, x, classes = image_and_label()
    labels = classes.double()
    labels[3] = torch.nan
    names = np.array(["ant", "bee", "cat"], dtype=object)[classes.numpy()]
    names[3] = None
    plain = plot_latent_plane(vae, x, classes).axes[0].collections[0].get_offsets()
    for given, words in ((labels, ["0", "1", "2"]), (names, ["ant", "bee", "cat"])):
        figure = plot_latent_plane(vae, x, given)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [*words, "no label"]
        rest, known = figure.axes[0].collections
        assert [to_hex(color) for color in rest.get_facecolors()] == ["#6e6e6e"]
        np.testing.assert_array_equal(rest.get_offsets(), plain[[3]])
        np.testing.assert_array_equal(known.get_offsets(), np.delete(plain, 3, axis=0))
        check_texts(figure)
    world = LinearGaussianWorld.random({"image": 5, "label": 3}, 2, seed=0, diagonal=True)
    vae = MODELS["mvae"](world.modalities(encoder="exact"), latent_dim=2)
    numbers = np.linspace(0, 1, 50)
    numbers[0] = np.nan
    rest, known = plot_latent_plane(vae, world.sample(50, seed=1), numbers).axes[0].collections
    assert len(rest.get_offsets()) == 1
    assert known.get_clim() == (numbers[1], 1)


def test_forest_plot_shows_intervals_flags_and_absences() -> None:
    figure = plot_likelihood_table(table())
    joint, image = figure.axes
    segments = [bar.get_segments()[0] for c in joint.containers for bar in c[2]]
    np.testing.assert_allclose(segments[0][:, 0], [-20 - 0.98, -20 + 0.98], rtol=1e-12)
    np.testing.assert_allclose(segments[1][:, 0], [-19 - 0.98, -19 + 0.98], rtol=1e-12)
    assert texts(joint) == ["k > 0.7 in 34 %"]
    faces = [c[0].get_markerfacecolor() for c in joint.containers]
    assert faces[0] == "white"
    assert faces[1] != "white"
    assert texts(image) == ["not available"]
    assert [label.get_text() for label in joint.get_yticklabels()] == ["MVAE", "CVAE"]
    check_texts(figure)


def test_figures_can_be_drawn_into_others() -> None:
    figure = Figure(figsize=(16, 6), layout="constrained")
    left, right = figure.subfigures(1, 2)
    assert training_figure(history(), figure=left) is left
    assert plot_likelihood_table(table(), figure=right) is right
    vae, x, classes = image_and_label()
    ax = Figure().subplots()
    assert plot_samples(vae, 2, ax=ax) is ax
    check_texts(figure)


def test_errors() -> None:
    vae, x, classes = image_and_label()
    with pytest.raises(ValueError, match="quantity: expected one of loss, .*found 'fun'"):
        plot_history(history(), quantity="fun")
    with pytest.raises(ValueError, match="histories: expected histories of fit with a loss"):
        training_figure({"MVAE": xr.Dataset()})
    with pytest.raises(ValueError, match="given: unknown modality 'sound'.*image, label"):
        plot_reconstructions(vae, x, given=[["sound"]])
    with pytest.raises(ValueError, match="show: unknown modality 'sound'"):
        plot_samples(vae, 2, show=["sound"])
    with pytest.raises(ValueError, match="subsets: unknown modality 'sound'"):
        plot_latent_plane(vae, x, classes, subsets=[["sound"]])
    with pytest.raises(ValueError, match="labels: expected one for each of 12 rows, found 2"):
        plot_latent_plane(vae, x, [0, 1])
    with pytest.raises(ValueError, match=r"labels: expected shape \(12,\), found \(12, 3\);"):
        plot_latent_plane(vae, x, x["label"])
    with pytest.raises(ValueError, match="class_names: unknown modality 'labels'.*image, label"):
        plot_reconstructions(vae, x, class_names={"labels": ["ant", "bee", "cat"]})
    with pytest.raises(ValueError, match="class_names 'label': expected 3 names, found 2; .*each"):
        plot_samples(vae, 2, class_names={"label": ["ant", "bee"]})
    with pytest.raises(ValueError, match="class_names 'image': expected a modality of classes"):
        plot_samples(vae, 2, class_names={"image": ["ant", "bee"]})
    nothing = {"image": torch.zeros(ROWS, dtype=torch.bool)}
    with pytest.raises(ValueError, match="subsets: expected rows that have some of them"):
        plot_latent_plane(vae, x, classes, nothing, subsets=[["image"]])
    with pytest.raises(ValueError, match="table: .*found none named mean, standard_error"):
        plot_likelihood_table(xr.Dataset())


def test_a_model_far_behind_is_left_beside_the_axis() -> None:
    """It would press the others into one point; its value stands there in writing."""
    names = [f"m{i}" for i in range(7)]
    means = np.array([-90.0, -91.0, -92.0, -93.0, -94.0, -95.0, -290.0])
    table = xr.Dataset(
        {
            "mean": (("model", "quantity"), means[:, None]),
            "standard_error": (("model", "quantity"), np.full((7, 1), 0.5)),
        },
        {"model": names, "quantity": ["log p(x)"]},
    )
    ax = plot_likelihood_table(table).axes[0]
    left, right = ax.get_xlim()
    assert -100 < left < -95.98
    assert -89.02 < right < -80
    assert [text.get_text() for text in ax.texts] == ["◂ \u2212290.0"]
    near = plot_likelihood_table(table.isel(model=slice(6))).axes[0]
    assert not near.texts
