"""Pictures of latents: what they change, what is generated from them, what modalities add to them.

House style, colours and conventions are those of :mod:`mmzoo.evaluation.figures_style`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from mmzoo.distributions import mean_or_probs
from mmzoo.evaluation.figures_planes import _check_site
from mmzoo.evaluation.figures_samples import (
    Values,
    _check_names,
    _draw_strips,
    _first_rows,
    _rows_with,
    _values,
)
from mmzoo.evaluation.figures_style import Style, _despine, _new_figure, _palette, _style
from mmzoo.evaluation.pair import Pair, draw_latents, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_contraction", "plot_cross_generation", "plot_traversal"]

_PRIOR_DRAWS = 4000
# Dimensions that a traversal shows unless told otherwise.
_MAX_DIMS = 8


def plot_traversal(
    vae: Pair,
    x: Values | None = None,
    observed: Values | None = None,
    *,
    site: str | None = None,
    dims: Sequence[int] | None = None,
    num_values: int = 9,
    show: Sequence[str] | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """What each dimension of a latent does: it runs over quantiles of its prior, the rest stands.

    Every picture is the mean of p(x_m | latents). The other dimensions and sites rest at the median
    of the prior or, if a row is given, at the mean of its posterior.

    Args:
        vae: The model, or a pair of your own.
        x: Name to values of one row, from which the traversal starts; of several, the first.
        observed: Name to bool mask of that row.
        site: The latent site, shared such as "z" or private such as "w_image"; by default the
            first.
        dims: Dimensions of it, one strip each; by default those that change the means most, eight
            at most, the strongest first.
        num_values: Steps, from the 2.5 % to the 97.5 % quantile of the prior.
        show: Modalities that are drawn; by default all that the model generates.
        class_names: Names of the classes of a modality, in the order of their indices.
        seed: Seed of the draws; the global random state is left as it was.
        ax: Where to draw.

    Raises:
        ValueError: For an unknown site, dimension or name.
    """
    site = _check_site(vae, site)
    shown = [name for name in vae.modalities if name not in vae.always_given]
    shown = shown if show is None else list(show)
    _check_names(vae, shown, "show")
    if num_values < 2:
        raise ValueError(f"num_values: expected at least 2, found {num_values}")
    levels = np.linspace(0.025, 0.975, num_values)
    row = None if x is None else _first_rows(vae, x, observed, 1)
    with quiet(vae, seed):
        start, steps = _start(vae, row, site, levels)
        sizes = range(start[site].shape[-1])
        _check_dims(dims, sizes, site)
        means = {dim: _traverse(vae, row, start, site, dim, steps[dim]) for dim in sizes}
    if dims is None:
        strength = {dim: _strength(means[dim], shown) for dim in sizes}
        dims = sorted(sizes, key=lambda dim: -strength[dim])[:_MAX_DIMS]
    strips = [
        (
            f"{site}[{dim}]",
            {
                name: _values(vae.modalities[name], means[dim][name], predicted=True)
                for name in shown
            },
        )
        for dim in dims
    ]
    header = [f"{100 * level:.3g} %" for level in levels]
    return _draw_strips(vae, strips, shown, class_names, ax, compare=False, header=header)


def plot_cross_generation(
    vae: Pair,
    x: Values,
    observed: Values | None = None,
    *,
    given: str | Sequence[str],
    show: str | Sequence[str] | None = None,
    num_rows: int = 10,
    num_draws: int = 6,
    class_names: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Several answers of a model to the same question: what is given on top, draws below.

    Each picture is the mean of p(x_m | z) for a draw of z given that column's values: down a column
    one sees how varied the answers are, along a row whether they belong to what is given.

    Args:
        vae: The model, or a pair of your own.
        x: Name to values `(N, *event_shape)`.
        observed: Name to bool mask `(N,)`.
        given: The modalities that are given.
        show: Modalities that are generated; by default all others.
        num_rows: Number of rows of x that are drawn, one a column of the figure: the first ones
            that have what is given.
        num_draws: Draws for each.
        class_names: Names of the classes of a modality, in the order of their indices.
        seed: Seed of the draws; the global random state is left as it was.
        ax: Where to draw.

    Raises:
        ValueError: For an unknown name, nothing to show, or if no row has anything of what is
            given.
    """
    given = [given] if isinstance(given, str) else list(given)
    _check_names(vae, given, "given")
    others = [name for name in vae.modalities if name not in given]
    show = others if show is None else [show] if isinstance(show, str) else list(show)
    _check_names(vae, show, "show")
    if not show or not given:
        raise ValueError(
            f"plot_cross_generation: expected something given and something else to show, found "
            f"given={given} and show={show}"
        )
    x, observed = _rows_with(vae, x, observed, [given], num_rows)
    masks = {name: mask & (name in given) for name, mask in observed.items()}
    seen = torch.stack(list(masks.values())).any(0)
    with quiet(vae, seed):
        means = vae.generate(x, masks, num_samples=num_draws, mean=True)
    known = {name: _values(vae.modalities[name], x[name]) for name in given if name in x}
    for name, values in known.items():
        known[name] = [v if has else None for v, has in zip(values, masks[name], strict=True)]
    strips: list[tuple[str, Mapping[str, list[Any]]]] = [("given " + " + ".join(given), known)]
    for draw in range(num_draws):
        drawn = {
            name: _values(vae.modalities[name], means[name][draw], predicted=True) for name in show
        }
        kept = {
            name: [v if has else None for v, has in zip(values, seen, strict=True)]
            for name, values in drawn.items()
        }
        strips.append((f"draw {draw + 1}", kept))
    order = [name for name in vae.modalities if name in {*given, *show}]
    return _draw_strips(vae, strips, order, class_names, ax, compare=False)


def plot_contraction(
    contraction: xr.Dataset | xr.DataArray, ax: Axes | None = None, *, kind: str = "heat"
) -> Axes:
    """How much each observed subset narrows each latent: 0 is the prior, 1 is certainty.

    Args:
        contraction: `contraction` over (subset, latent), 1 - Var q / Var p: the result of
            :func:`mmzoo.evaluation.posterior.contraction`, or the variable itself. Latents are
            sorted by their mean.
        ax: Where to draw.
        kind: "heat" for a map with one cell a latent; "bar" for the mean over latents of each
            subset, with the latents as dots.

    Raises:
        ValueError: For another variable or kind.
    """
    if kind not in ("heat", "bar"):
        raise ValueError(f"kind: expected 'heat' or 'bar', found {kind!r}")
    values = contraction
    if isinstance(values, xr.Dataset):
        values = values["contraction"] if "contraction" in values else xr.DataArray()
    if set(values.dims) != {"subset", "latent"}:
        raise ValueError(
            f"contraction: expected the variable contraction over subset and latent, found "
            f"{values.dims}; pass the result of contraction"
        )
    values = values.transpose("subset", "latent")
    order = np.argsort(-values.mean("subset").values, kind="stable")
    values = values.isel(latent=order)
    lines = values.sizes["subset"]
    with _style():
        if ax is None:
            width = min(2.2 + 0.28 * values.sizes["latent"], 9) if kind == "heat" else 4.2
            ax = _new_figure(max(width, 3.6), 0.34 * lines + 1.1).subplots()
        names = [str(name).replace("+", " + ") for name in values["subset"].values]
        (_draw_heat if kind == "heat" else _draw_bars)(ax, values)
        ax.set_yticks(range(lines), names)
        ax.set_ylabel("given")
    return ax


# Parts ------------------------------------------------------------------------------------------


def _start(
    vae: Pair, row: Any, site: str, levels: np.ndarray
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Where the latents rest, `(*event)` by site, and the steps of each dimension of one site."""
    fixed = _condition(vae, row, _PRIOR_DRAWS)
    trace = poutine.trace(vae.model).get_trace(fixed, num_rows=_PRIOR_DRAWS)
    prior = {name: trace.nodes[name]["value"] for name in vae.latent_sites}
    if row is None:
        rest = {name: value.median(0).values for name, value in prior.items()}
    else:
        draws = draw_latents(vae, *row, num_draws=500)
        rest = {
            name: value[:, 0].mean(0).reshape(prior[name][0].shape) for name, value in draws.items()
        }
    columns = prior[site].double().quantile(torch.as_tensor(levels).to(prior[site].device), 0)
    return rest, list(columns.to(prior[site].dtype).unbind(-1))


def _condition(vae: Pair, row: Any, num: int) -> dict[str, Tensor | None]:
    """All modalities free, but for those that are always given, which repeat a row's values."""
    fixed: dict[str, Tensor | None] = dict.fromkeys(vae.modalities)
    for name in vae.always_given:
        if row is None or name not in row[0]:
            raise ValueError(
                f"x: expected a row with {name}, on which {vae.title} is conditional, found none; "
                "pass x"
            )
        value = row[0][name][:1]
        fixed[name] = value.expand(num, *value.shape[1:])
    return fixed


def _traverse(
    vae: Pair, row: Any, start: Mapping[str, Tensor], site: str, dim: int, steps: Tensor
) -> dict[str, Tensor]:
    """Means of every modality, one row a step."""
    num = len(steps)
    latents = {name: value.expand(num, *value.shape).clone() for name, value in start.items()}
    latents[site][:, dim] = steps
    fixed = _condition(vae, row, num)
    model = poutine.condition(vae.model, data=latents)
    trace = poutine.trace(model).get_trace(fixed, num_rows=num)
    nodes = {name: trace.nodes[name] for name, value in fixed.items() if value is None}
    return {name: mean_or_probs(node["fn"]) for name, node in nodes.items()}


def _check_dims(dims: Sequence[int] | None, sizes: range, site: str) -> None:
    for dim in dims or ():
        if dim not in sizes:
            raise ValueError(
                f"dims: expected dimensions of {site} from 0 to {len(sizes) - 1}, found {dim}"
            )


def _strength(means: Mapping[str, Tensor], shown: Sequence[str]) -> float:
    """Mean squared change over the steps, each modality by its own size."""
    return sum(float(means[name].double().var(0).mean()) for name in shown if name in means)


def _draw_heat(ax: Axes, values: xr.DataArray) -> None:
    span: Style = {"vmin": 0.0, "vmax": 1.0, "cmap": "viridis", "aspect": "auto"}
    image = ax.imshow(values.values, interpolation="nearest", **span)
    latents = values.sizes["latent"]
    if latents <= 12:
        for (line, column), value in np.ndenumerate(values.values):
            color = "white" if value < 0.6 else "black"
            style: Style = {"ha": "center", "va": "center", "fontsize": 7, "color": color}
            ax.text(column, line, f"{max(value, 0):.2f}".removeprefix("0"), **style)
    step = max(1, -(-latents // 16))
    names = [str(name) for name in values["latent"].values]
    rotate: Style = {"rotation": 90} if max(map(len, names)) > 2 else {}
    ax.set_xticks(range(0, latents, step), names[::step], **rotate)
    ax.set_xlabel("latent" + ", largest first" * (latents > 1))
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.figure.colorbar(image, ax=ax, label="contraction", pad=0.02)


def _draw_bars(ax: Axes, values: xr.DataArray) -> None:
    color = _palette(1)[0]
    places = np.arange(values.sizes["subset"])
    ax.barh(places, values.mean("latent").values, height=0.6, color=color, alpha=0.45)
    across = np.repeat(places, values.sizes["latent"])
    ax.scatter(values.values.ravel(), across, s=8, color=color, linewidths=0, zorder=3)
    ax.set_ylim(len(places) - 0.5, -0.5)
    ax.set_xlim(min(0.0, float(values.min()) - 0.02), 1)
    ax.set_xlabel("contraction: mean and latents")
    _despine(ax)
