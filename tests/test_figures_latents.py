"""The figures of latents: what they draw is read back from the artists."""

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from test_figures import ROWS, check_texts, image_and_label, texts
from torch import Tensor

from mmzoo import Modality
from mmzoo.evaluation.figures_latents import (
    plot_contraction,
    plot_cross_generation,
    plot_traversal,
)
from mmzoo.evaluation.figures_planes import plot_latent_plane
from mmzoo.evaluation.figures_samples import plot_reconstructions, plot_samples
from mmzoo.evaluation.pair import PyroPair
from mmzoo.exact import LinearGaussianWorld
from mmzoo.models import MODELS


def own_pair() -> PyroPair:
    """z[1] is the brightness of a picture and decides the class; z[0] does nothing."""
    modalities = [
        Modality("image", (1, 2, 2)),
        Modality("kind", (2,), "one_hot_categorical"),
    ]

    def model(x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["image"]), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
            w = pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            loc = (z[..., 1:] + 0.1 * w)[..., None, None].expand(*z.shape[:-1], 1, 2, 2)
            pyro.sample("image", dist.Normal(loc, 1.0).to_event(3), obs=x["image"])
            logits = torch.cat([0 * z[..., 1:], 9 * z[..., 1:]], -1)
            pyro.sample("kind", dist.OneHotCategorical(logits=logits), obs=x["kind"])

    def guide(x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["image"]), dim=-1):
            loc = x["image"].mean((-1, -2, -3))[:, None] * torch.tensor([0.0, 1.0])
            pyro.sample("z", dist.Normal(loc, 0.01).to_event(1))
            pyro.sample("w", dist.Normal(torch.full_like(loc[:, :1], 5.0), 0.01).to_event(1))

    return PyroPair(model, guide, modalities)


def contraction() -> xr.DataArray:
    values = np.array([[0.1, 0.9, 0.5], [0.0, 0.2, 0.4], [0.2, 0.95, 0.6]])
    coords = {"subset": ["image", "label", "image+label"], "latent": ["z[0]", "z[1]", "z[2]"]}
    return xr.DataArray(values, coords, ("subset", "latent"), "contraction")


def test_a_traversal_runs_over_quantiles_of_the_prior() -> None:
    ax = plot_traversal(own_pair(), dims=[1], num_values=5, show=["image", "kind"])
    assert texts(ax)[:5] == ["2.5 %", "26.2 %", "50 %", "73.8 %", "97.5 %"]
    assert texts(ax)[5] == "z[1]"
    assert texts(ax)[6:8] == ["0", "0"]
    assert texts(ax)[9:] == ["1", "1"]
    shades = np.array([np.asarray(image.get_array())[0, 0] for image in ax.images])
    levels = torch.linspace(0.025, 0.975, 5)
    exact = dist.Normal(0.0, 2.0).icdf(levels).numpy()
    # Pictures are scaled to the strip's range; quantiles of 4000 draws have their error.
    scaled = (exact - exact[0]) / np.ptp(exact)
    density = np.exp(-((exact / 2) ** 2) / 2) / (2 * np.pi) ** 0.5 / 2
    share = levels.numpy()
    error = np.sqrt(share * (1 - share) / 4000) / density / np.ptp(exact)
    assert (np.abs(shades - scaled) <= 5 * (error + error.max())).all()
    assert (np.diff(shades) > 0).all()
    check_texts(ax.figure)


def test_the_strongest_dimension_comes_first() -> None:
    ax = plot_traversal(own_pair(), show=["image"])
    assert [text for text in texts(ax) if "z[" in text] == ["z[1]", "z[0]"]
    still = np.stack([np.asarray(image.get_array()) for image in ax.images[9:]])
    assert np.ptp(still) == 0
    private = plot_traversal(own_pair(), site="w", num_values=3)
    assert "w[0]" in texts(private)


def test_a_traversal_starts_from_a_row() -> None:
    pair = own_pair()
    x = {"image": torch.full((2, 1, 2, 2), 3.0), "kind": torch.eye(2)}
    ax = plot_traversal(pair, x, dims=[0], num_values=3, show=["kind"])
    assert texts(ax)[-3:] == ["1", "1", "1"]  # the row is bright: class 1 whatever z[0] is
    dark = plot_traversal(pair, {"image": -x["image"]}, dims=[0], num_values=3, show=["kind"])
    assert texts(dark)[-3:] == ["0", "0", "0"]


def test_a_conditional_model_needs_a_row() -> None:
    parts = [Modality("image", (1, 4, 4)), Modality("label", (3,), "one_hot_categorical")]
    vae = MODELS["cvae"](parts, 2, condition="label")
    with pytest.raises(ValueError, match="x: expected a row with label, on which CVAE .*pass x"):
        plot_traversal(vae)
    x = {"image": torch.randn(2, 1, 4, 4), "label": torch.eye(3)[:2]}
    assert len(plot_traversal(vae, x, num_values=3).images) == 2 * 3


def test_every_site_of_a_model_with_private_codes() -> None:
    parts = [Modality("image", (1, 4, 4)), Modality("label", (3,), "one_hot_categorical")]
    vae = MODELS["mmvaeplus"](parts, 2, private_dim=2)
    vae.train()
    state = torch.get_rng_state()
    for site in vae.latent_sites:
        ax = plot_traversal(vae, site=site, num_values=3)
        assert len(ax.images) == 2 * 3
        moved = [np.ptp([np.asarray(i.get_array()) for i in ax.images[:3]], axis=0).max()]
        assert (moved[0] == 0) == (site == "w_label")  # another modality's code moves no pixel
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training


def test_cross_generation_draws_several_answers() -> None:
    vae, x, classes = image_and_label()
    x = {name: value[:4] for name, value in x.items()}
    observed = {"label": torch.arange(4) != 1}
    ax = plot_cross_generation(vae, x, observed, given="label", num_rows=4, num_draws=3)
    words = texts(ax)
    assert words[:5] == ["given label", "0", "–", "2", "0"]
    assert words[5:] == ["draw 1", "draw 2", "draw 3"]
    assert len(ax.images) == 3 * 3  # row 1 has nothing to be answered
    assert len(ax.patches) == 3
    pictures = np.stack([np.asarray(image.get_array()) for image in ax.images]).reshape(3, 3, 6, 4)
    assert np.ptp(pictures, axis=0).max() > 0  # draws differ
    check_texts(ax.figure)
    both = plot_cross_generation(vae, x, given="image", show=["label", "image"], num_draws=2)
    assert len(both.images) == 4 + 2 * 4
    again = plot_cross_generation(vae, x, observed, given="label", num_rows=4, num_draws=3)
    np.testing.assert_array_equal(again.images[0].get_array(), ax.images[0].get_array())


def test_rows_that_have_what_is_given_are_picked_first() -> None:
    vae, x, classes = image_and_label()
    rare = (torch.arange(ROWS) == 5) | (torch.arange(ROWS) == 10)
    options = {"given": "label", "num_draws": 1}
    two = plot_cross_generation(vae, x, {"label": rare}, num_rows=2, **options)
    assert texts(two)[:3] == ["given label", str(int(classes[5])), str(int(classes[10]))]
    assert len(two.images) == 2
    three = plot_cross_generation(vae, x, {"label": rare}, num_rows=3, **options)
    assert texts(three)[1:4] == ["–", str(int(classes[5])), str(int(classes[10]))]
    # All of what is given goes before a part of it.
    both = plot_cross_generation(
        vae, x, {"label": rare}, given=["image", "label"], show="image", num_rows=2, num_draws=1
    )
    np.testing.assert_array_equal(both.images[1].get_array(), x["image"][10, 0])
    rows = plot_reconstructions(vae, x, {"image": rare}, given=["image"], num_rows=2)
    np.testing.assert_array_equal(rows.images[0].get_array(), x["image"][5, 0])
    assert len(rows.images) == 4


def test_modalities_that_no_row_has_are_gaps_or_an_error() -> None:
    vae, x, _ = image_and_label()
    nothing = torch.zeros(ROWS, dtype=torch.bool)
    label = {"label": x["label"]}
    ax = plot_cross_generation(vae, label, given=["image", "label"], show="label", num_draws=1)
    assert not ax.images
    ax = plot_cross_generation(
        vae, x, {"image": nothing}, given=["image", "label"], show="label", num_draws=1
    )
    assert len(ax.patches) == 10
    message = "given: expected rows that have some of image, found none; check x and observed"
    for values, masks in ((x, {"image": nothing}), (label, None)):
        with pytest.raises(ValueError, match=message):
            plot_cross_generation(vae, values, masks, given="image")
        with pytest.raises(ValueError, match=message):
            plot_reconstructions(vae, values, masks, given=["image"], show=["image"])


def test_titles_over_several_pictures_have_a_line_of_their_own() -> None:
    """They stand above the pictures of their strip, and below those of the strip before."""
    modalities = [
        Modality("img", (1, 8, 8), likelihood="bernoulli"),
        Modality("lab", (4,), likelihood="one_hot_categorical"),
        Modality("vec", (7,)),
        Modality("volts", (1,)),
    ]
    x = {"img": torch.rand(4, 1, 8, 8).round(), "lab": torch.eye(4)}
    x |= {"vec": torch.randn(4, 7), "volts": torch.randn(4, 1)}
    vae = MODELS["mvae"](modalities, latent_dim=2)
    for ax, titles in (
        (plot_cross_generation(vae, x, given="lab", num_draws=2), 2),
        (plot_cross_generation(vae, x, given=["img", "vec"], show="volts", num_draws=2), 1),
        (plot_reconstructions(vae, x, show=["img", "vec"]), 6),
        (plot_traversal(vae, num_values=3, show=["img", "vec"]), 2),
    ):
        check_texts(ax.figure)
        bold = [text.get_window_extent() for text in ax.texts if text.get_weight() == "bold"]
        assert len(bold) == titles
        for cell in [*ax.images, *ax.patches]:
            box = cell.get_window_extent()
            for title in bold:
                assert title.y0 >= box.y1 or title.y1 <= box.y0


def test_contraction_as_map_and_bars() -> None:
    ax = plot_contraction(contraction().to_dataset())
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "image",
        "label",
        "image + label",
    ]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["z[1]", "z[2]", "z[0]"]
    np.testing.assert_array_equal(ax.images[0].get_array(), contraction().values[:, [1, 2, 0]])
    assert texts(ax)[:3] == [".90", ".50", ".10"]
    assert ax.images[0].get_clim() == (0, 1)
    check_texts(ax.figure)
    bars = plot_contraction(contraction(), kind="bar")
    widths = [patch.get_width() for patch in bars.patches]
    np.testing.assert_allclose(widths, contraction().mean("latent"))
    assert len(bars.collections[0].get_offsets()) == 9
    check_texts(bars.figure)
    many = contraction().isel(latent=[0, 1, 2] * 20)
    assert not texts(plot_contraction(many))


def test_latent_plane_by_tsne_keeps_clusters_apart() -> None:
    world = LinearGaussianWorld.random({"image": 8, "label": 6}, 3, seed=0, diagonal=True)
    vae = MODELS["mvae"](world.modalities(encoder="exact"), latent_dim=3)
    labels = torch.arange(60) % 2
    far = world.sample(60, seed=1)
    x = {
        name: value + 20 * labels[:, None] * world.weights[name].sum(-1)
        for name, value in far.items()
    }
    figure = plot_latent_plane(vae, x, labels, method="tsne")
    assert figure.axes[0].get_xlabel() == "t-SNE 1"
    points = [np.asarray(ax.collections[0].get_offsets()) for ax in figure.axes[:3]]
    assert [len(each) for each in points] == [60, 60, 60]
    means = [points[2][labels == label].mean(0) for label in (0, 1)]
    spread = max(points[2][labels == label].std(0).max() for label in (0, 1))
    assert np.linalg.norm(means[0] - means[1]) > 2 * spread
    again = plot_latent_plane(vae, x, labels, method="tsne").axes[0].collections[0].get_offsets()
    np.testing.assert_array_equal(again, points[0])
    check_texts(figure)


def test_planes_of_other_sites_and_own_pairs() -> None:
    pair = own_pair()
    x = pair.generate({}, num_rows=30)
    labels = np.arange(30) % 2
    with_image = [["image"], ["image", "kind"]]
    figure = plot_latent_plane(pair, x, labels, subsets=with_image, site="w")
    assert figure.axes[0].get_xlabel() == "w[0]"
    points = np.asarray(figure.axes[0].collections[0].get_offsets())
    np.testing.assert_allclose(points[:, 0], 5, atol=0.05)
    z = plot_latent_plane(pair, x, labels, subsets=with_image)
    points = np.asarray(z.axes[0].collections[0].get_offsets())
    np.testing.assert_allclose(points[:, 1], x["image"].mean((1, 2, 3)), atol=0.05)
    assert len(plot_reconstructions(pair, x, num_rows=3).images) == 3 * 4
    assert len(plot_samples(pair, 4).images) == 4


def test_pictures_are_drawn_where_they_are_told_and_leave_no_trace() -> None:
    before = dict(matplotlib.rcParams)
    vae, x, _ = image_and_label()
    for plot in (
        lambda ax: plot_traversal(vae, num_values=2, dims=[0], ax=ax),
        lambda ax: plot_cross_generation(vae, x, given="label", num_draws=1, ax=ax),
        lambda ax: plot_contraction(contraction(), ax),
    ):
        ax = Figure().subplots()
        assert plot(ax) is ax
    assert dict(matplotlib.rcParams) == before
    assert not matplotlib._pylab_helpers.Gcf.figs


def test_errors() -> None:
    vae, x, classes = image_and_label()
    with pytest.raises(ValueError, match="site: expected one of z, found 'w'"):
        plot_traversal(vae, site="w")
    with pytest.raises(ValueError, match="dims: expected dimensions of z from 0 to 3, found 4"):
        plot_traversal(vae, dims=[4])
    with pytest.raises(ValueError, match="num_values: expected at least 2, found 1"):
        plot_traversal(vae, num_values=1)
    with pytest.raises(ValueError, match="show: unknown modality 'sound'"):
        plot_traversal(vae, show=["sound"])
    with pytest.raises(ValueError, match="given: unknown modality 'sound'"):
        plot_cross_generation(vae, x, given="sound")
    with pytest.raises(ValueError, match="plot_cross_generation: expected something given"):
        plot_cross_generation(vae, x, given=["image", "label"])
    with pytest.raises(ValueError, match="kind: expected 'heat' or 'bar', found 'pie'"):
        plot_contraction(contraction(), kind="pie")
    with pytest.raises(ValueError, match="contraction: expected the variable contraction over"):
        plot_contraction(xr.Dataset())
    with pytest.raises(ValueError, match="method: expected 'pca' or 'tsne', found 'umap'"):
        plot_latent_plane(vae, x, classes, method="umap")
    with pytest.raises(ValueError, match="site: expected one of z, found 'w'"):
        plot_latent_plane(vae, x, classes, site="w")
    few = {name: value[:1] for name, value in x.items()}
    with pytest.raises(ValueError, match="method: expected at least 4 points for 'tsne', found 3"):
        plot_latent_plane(vae, few, classes[:1], method="tsne")
