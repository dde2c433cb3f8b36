"""Export to ArviZ: latents, likelihoods and predictions of a pair as an `xarray.DataTree`.

| group | variables | dimensions after chain, draw |
|---|---|---|
| posterior | every latent site, such as `z`, given each subset | subset, row, latent |
| posterior_predictive | every modality, given all that a row has | row, ... |
| subset_predictive | every modality, given each subset; if asked for | subset, row, ... |
| log_likelihood | log p(x_m given z) and `joint`, their sum; z given all that the row has | row |
| sample_stats | `lp`, log p(x, z); `log_weight`, log p(x, z) - log q(z given x) | row |
| prior, prior_predictive | latents; modalities | ... |
| observed_data | every modality, NaN where it is missing | row, ... |
| constant_data | see below | row |

`constant_data` has the masks as `<name>_observed` over row and `observed` over (row, modality);
`subset_observed` over (subset, row), whether a row has something of the subset; `member` over
(subset, modality); log p(x) by importance sampling with its diagnostics; and, for resampled draws,
`posterior_pareto_k` and `posterior_ess` over (subset, row).

The posterior holds raw draws of the guide or, with `resampled=True`, draws that are resampled from
many more with importance weights: they stand for the exact posterior of the model as long as Pareto
k stays below 0.7. Their `log_weight` is then spent: it tells where they came from.

Draws are independent, so one chain holds them all; the subset that holds every modality comes
first. ArviZ 1.x takes the tree as it is, ArviZ 0.23 by `arviz.from_datatree(tree)`; a subset is
picked by its name, `coords={"subset": "image+label", "row": 0}`. The `log_likelihood` is given the
latents of the very row, so that ArviZ's `loo` and `waic` of it are not to be trusted: see
:mod:`mmzoo.evaluation.arviz_checks`.

`ArviZ a unified library for exploratory analysis of Bayesian models (Kumar et al., 2019)`,
https://doi.org/10.21105/joss.01143, and its schema,
https://python.arviz.org/en/stable/schema/schema.html
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from mmzoo.evaluation.pair import (
    Pair,
    PyroPair,
    device_of,
    named_subsets,
    quiet,
    row_masks,
    subset_name,
)
from mmzoo.evaluation.row_draws import draw_rows, predict_rows

__all__ = ["load_datatree", "save_datatree", "to_datatree"]

_ESTIMATES = ("log_prob", "mcse", "ess", "pareto_k")
_DIAGNOSTICS = ("posterior_pareto_k", "posterior_ess")
_TAKEN = (
    *("chain", "draw", "subset", "row", "row_label", "latent", "modality", "lp", "log_weight"),
    *("joint", "observed", "member", *_ESTIMATES, *_DIAGNOSTICS),
)
# Up to here every subset is drawn by default: 2^3 - 1 = 7 of them.
_MAX_ALL_SUBSETS = 3
_OVER_SUBSETS = ("posterior", "subset_predictive")

Labels = Sequence[Any] | np.ndarray | Tensor
Groups = dict[str, dict[str, list[np.ndarray]]]
_Arrays = dict[str, dict[str, Tensor]]


def to_datatree(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    labels: Labels | Mapping[str, Labels] | None = None,
    given: Sequence[Sequence[str]] | None = None,
    num_draws: int = 100,
    resampled: bool = False,
    num_proposals: int = 2000,
    subset_predictive: bool = False,
    guide: Callable[..., Any] | None = None,
    num_samples: int = 1000,
    prior_share: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> xr.DataTree:
    """Draw latents and predictions of a pair and label them for ArviZ.

    Args:
        pair: The pair; it is used in evaluation mode, and left as it was.
        x: Name to values `(N, *event_shape)`.
        observed: Name to bool mask `(N,)`.
        labels: One value for each row, kept as the coordinate `row_label`; or several such
            columns by name, kept as `row_<name>`.
        given: Subsets that the latents of `posterior` are given, beside all modalities; by
            default every non-empty subset, or each modality alone if there are more than three.
            A row is given what it has of a subset; if it has nothing, its latents are the prior's.
        num_draws: Draws of the latents for each subset and row.
        resampled: Whether the draws are resampled with importance weights, in place of raw draws
            of the guide.
        num_proposals: Draws of the guide for each subset and row from which they are resampled.
        subset_predictive: Whether to predict every modality from each subset, too.
        guide: A guide over the same sites in place of the pair's own.
        num_samples: Importance samples of the estimates of log p(x) in `constant_data`; 0 for none.
        prior_share: As in :func:`mmzoo.evaluation.log_likelihood`.
        batch_size: Rows that are drawn at a time.
        seed: Seed of the draws; the global random state is left as it was.
        on_progress: Called with the rows done and the rows in all.

    Returns:
        The tree described at the top of this module.

    Raises:
        ValueError: For an unknown name, or sizes that do not fit.
    """
    subsets = _subsets(pair, given)
    x, observed, rows = row_masks(pair, x, observed)
    if not isinstance(labels, Mapping):
        labels = {} if labels is None else {"label": labels}
    proposals = num_proposals if resampled else 0
    _check_sizes(pair, rows, labels, num_draws, proposals, batch_size)
    drawing = _Drawing(pair, subsets, num_draws, proposals, guide, subset_predictive)
    with quiet(pair, seed):
        groups = _collect(drawing, x, observed, batch_size, on_progress)
        prior = _draw_prior(pair, num_draws)
    constant = _masks(pair, observed, subsets)
    if num_samples:
        constant |= _estimates(pair, x, observed, guide, num_samples, prior_share, seed)
    arrays = {
        group: {name: _join(group, parts) for name, parts in variables.items()}
        for group, variables in groups.items()
        if variables
    }
    constant |= arrays.pop("constant_data", {})
    arrays["observed_data"] = _observed_data(x, constant)
    arrays["constant_data"] = constant
    tree = _label(pair, arrays, prior, subsets, labels)
    tree.attrs |= _attributes(pair, subsets, num_draws, num_samples, prior_share, seed)
    tree.attrs |= {"posterior": "importance" if resampled else "guide", "num_proposals": proposals}
    return tree


def save_datatree(tree: xr.DataTree, path: str | os.PathLike[str]) -> None:
    """Write a tree as NetCDF, through h5netcdf; a file of that name is replaced at once or kept."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        tree.to_netcdf(part, engine="h5netcdf")
        os.replace(part, path)


def load_datatree(path: str | os.PathLike[str]) -> xr.DataTree:
    """Read a tree that `save_datatree` wrote, into memory.

    Raises:
        ValueError: For a file that is missing or no NetCDF file.
    """
    try:
        with xr.open_datatree(path, engine="h5netcdf") as tree:
            return tree.load()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a NetCDF file with groups, found none that can be read "
            f"({error}); write it with save_datatree"
        ) from error


def _subsets(pair: Pair, given: Sequence[Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """Name of each subset, such as "image+label", to its members; all modalities first."""
    names = tuple(pair.modalities)
    if given is None:
        sizes = range(1, len(names)) if len(names) <= _MAX_ALL_SUBSETS else [1]
        given = [subset for size in sizes for subset in itertools.combinations(names, size)]
        given = [subset for subset in given if _answers(pair, subset)]
    chosen = [names]
    chosen += named_subsets(pair, given, "given")
    # A model that is conditional answers for no subset without its condition.
    needed = set(pair.always_given)
    return {subset_name(subset): subset for subset in chosen if needed <= set(subset)}


def _answers(pair: Pair, subset: Sequence[str]) -> bool:
    return not isinstance(pair, PyroPair) or pair.unsupported(subset) is None


def _check_sizes(
    pair: Pair,
    rows: int,
    labels: Mapping[str, Labels],
    num_draws: int,
    num_proposals: int,
    batch_size: int,
) -> None:
    for name, size in (("num_draws", num_draws), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, found {size}")
    if 0 < num_proposals < num_draws:
        raise ValueError(
            f"num_proposals: expected at least num_draws={num_draws}, found {num_proposals}; "
            "resampled draws are taken from many more"
        )
    taken = [name for name in pair.modalities if name in _TAKEN]
    if taken:
        raise ValueError(
            f"modality {taken[0]!r}: expected a name other than {', '.join(_TAKEN)}, which the "
            "tree uses itself; rename the modality for the export"
        )
    for name, values in labels.items():
        if len(values) != rows:
            raise ValueError(
                f"labels[{name!r}]: expected one for each of {rows} rows, found {len(values)}; "
                "pass the labels of the same rows"
            )


class _Drawing(NamedTuple):
    """What is drawn."""

    pair: Pair
    subsets: Mapping[str, tuple[str, ...]]
    num_draws: int
    num_proposals: int
    guide: Callable[..., Any] | None
    subset_predictive: bool

    def rows(self, x: dict[str, Tensor], observed: dict[str, Tensor]) -> _Arrays:
        """Some rows of every group: arrays (draw, [subset,] row, ...)."""
        found = {}
        for name, subset in self.subsets.items():
            shown = {each: mask & (each in subset) for each, mask in observed.items()}
            found[name] = draw_rows(
                self.pair,
                x,
                shown,
                self.num_draws,
                guide=self.guide,
                num_proposals=self.num_proposals,
            )
        whole = next(iter(found.values()))
        num_rows = whole.lp.shape[-1]
        groups = {
            "posterior": _stack([each.latents for each in found.values()]),
            "posterior_predictive": predict_rows(self.pair, x, whole.latents, num_rows),
            "log_likelihood": whole.log_likelihood,
            "sample_stats": {"lp": whole.lp, "log_weight": whole.log_weight},
        }
        if self.num_proposals:
            summaries = [(each.pareto_k, each.ess) for each in found.values()]
            named = [dict(zip(_DIAGNOSTICS, pair, strict=True)) for pair in summaries]
            groups["constant_data"] = _stack(named, 0)
        if self.subset_predictive:
            groups["subset_predictive"] = _stack(
                [predict_rows(self.pair, x, each.latents, num_rows) for each in found.values()]
            )
        return groups


def _stack(parts: Sequence[Mapping[str, Tensor]], axis: int = 1) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts], axis) for name in parts[0]}


def _collect(
    drawing: _Drawing,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor],
    batch_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> Groups:
    """Batches over rows of everything that has draws and rows."""
    groups: Groups = {}
    device, total = device_of(drawing.pair), len(next(iter(x.values())))
    for start in range(0, total, batch_size):
        part = slice(start, start + batch_size)
        values = {name: value[part].to(device) for name, value in x.items()}
        masks = {name: observed[name][part].to(device) for name in x}
        for group, variables in drawing.rows(values, masks).items():
            for name, value in variables.items():
                parts = groups.setdefault(group, {}).setdefault(name, [])
                parts.append(value.cpu().numpy())
        if on_progress:
            on_progress(min(start + batch_size, total), total)
    return groups


def _draw_prior(pair: Pair, num_draws: int) -> dict[str, dict[str, np.ndarray]]:
    """Draws of every site of the generative story; the rows of the plate serve as draws.

    A model that is conditional has none without its condition.
    """
    if pair.always_given:
        return {}
    trace = poutine.trace(pair.model).get_trace(dict.fromkeys(pair.modalities), num_rows=num_draws)
    nodes = {name: trace.nodes[name] for name in trace.stochastic_nodes}
    values = {
        name: node["value"][None].cpu().numpy()
        for name, node in nodes.items()
        if not site_is_subsample(node)
    }
    return {
        "prior": {name: v for name, v in values.items() if name not in pair.modalities},
        "prior_predictive": {name: values[name] for name in pair.modalities},
    }


def _masks(
    pair: Pair, observed: Mapping[str, Tensor], subsets: Mapping[str, tuple[str, ...]]
) -> dict[str, np.ndarray]:
    masks = {name: mask.cpu().numpy() for name, mask in observed.items()}
    seen = [np.any([masks[name] for name in subset], 0) for subset in subsets.values()]
    member = [[name in subset for name in pair.modalities] for subset in subsets.values()]
    named = {f"{name}_observed": masks[name] for name in pair.modalities}
    return named | {
        "observed": np.stack([masks[name] for name in pair.modalities], 1),
        "subset_observed": np.stack(seen),
        "member": np.array(member),
    }


def _estimates(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor],
    guide: Callable[..., Any] | None,
    num_samples: int,
    prior_share: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """Importance-sampling estimates of log p(x) of what each row has; NaN where undefined."""
    from mmzoo.evaluation.likelihood import log_likelihood

    of = [name for name in pair.modalities if name in x and name not in pair.always_given]
    masks = {name: observed[name] for name in x}
    if pair.unsupported(of, pair.always_given):
        rows = len(next(iter(x.values())))
        return {name: np.full(rows, np.nan) for name in _ESTIMATES}
    result = log_likelihood(
        pair,
        x,
        masks,
        of=of,
        given=pair.always_given,
        num_samples=num_samples,
        prior_share=prior_share,
        guide=guide,
        seed=seed,
    )
    return {name: result[name].values for name in _ESTIMATES}


def _join(group: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Joins batches (draw, [subset,] row, ...) along the rows, with one chain in front."""
    if group == "constant_data":
        return np.concatenate(parts, 1)
    return np.concatenate(parts, 2 if group in _OVER_SUBSETS else 1)[None]


def _observed_data(
    x: Mapping[str, Tensor], constant: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    data = {}
    for name, value in x.items():
        mask = constant[f"{name}_observed"]
        array = value.detach().cpu().numpy()
        if not mask.all():  # integers have no NaN
            array = array.astype(np.result_type(array.dtype, np.float32))
            array[~mask] = np.nan
        data[name] = array
    return data


def _label(
    pair: Pair,
    arrays: Mapping[str, dict[str, np.ndarray]],
    prior: Mapping[str, dict[str, np.ndarray]],
    subsets: Mapping[str, tuple[str, ...]],
    labels: Mapping[str, Labels],
) -> xr.DataTree:
    """Names every dimension; the prior has no rows, the predictions from subsets have both."""
    import arviz_base

    rows = len(arrays["constant_data"]["observed"])
    coords: dict[str, Any] = {"subset": list(subsets), "row": np.arange(rows)}
    coords["modality"] = list(pair.modalities)
    sites = {name: value.ndim - 4 for name, value in arrays["posterior"].items()}
    events = {name: _event(name, len(m.event_shape)) for name, m in pair.modalities.items()}
    events |= {site: _latent(site, size) for site, size in sites.items()}
    if events.get("z") == ["latent"]:
        coords["latent"] = np.arange(arrays["posterior"]["z"].shape[-1])
    over = {name: ["subset", "row", *event] for name, event in events.items()}
    dims = {name: over[name] if name in sites else ["row", *events[name]] for name in events}
    flat = [*(f"{name}_observed" for name in pair.modalities), *_ESTIMATES]
    dims |= {name: ["row"] for name in [*flat, "joint", "lp", "log_weight"]}
    dims |= {name: ["subset", "row"] for name in [*_DIAGNOSTICS, "subset_observed"]}
    dims |= {"observed": ["row", "modality"], "member": ["subset", "modality"]}
    rest = {name: group for name, group in arrays.items() if name != "subset_predictive"}
    tree = arviz_base.from_dict(rest, coords=coords, dims=dims)
    for extra, named in ((_only(arrays, "subset_predictive"), over), (prior, events)):
        if extra:
            for group, node in arviz_base.from_dict(extra, coords=coords, dims=named).items():
                tree[group] = node
    columns = {f"row_{name}": _column(name, values) for name, values in labels.items()}
    for node in tree.children.values():
        if "row" in node.dims:
            node.dataset = node.to_dataset().assign_coords(columns)
    return tree


def _event(name: str, size: int) -> list[str]:
    return [f"{name}_dim_{i}" for i in range(size)]


def _latent(site: str, size: int) -> list[str]:
    """Names of the dimensions of a latent: "latent" for the vector z, `<site>_dim` for others."""
    if size == 1:
        return ["latent" if site == "z" else f"{site}_dim"]
    return _event(site, size)


def _only(arrays: Mapping[str, Any], group: str) -> dict[str, Any]:
    return {group: arrays[group]} if group in arrays else {}


def _column(name: str, values: Labels) -> tuple[tuple[str, ...], np.ndarray]:
    """Labels as a coordinate; each row may have an array of them."""
    array = np.asarray(values)
    return ("row", *(f"row_{name}_dim_{i}" for i in range(array.ndim - 1))), array


def _attributes(
    pair: Pair,
    subsets: Mapping[str, Any],
    num_draws: int,
    num_samples: int,
    prior_share: float,
    seed: int,
) -> dict[str, str | int | float]:
    packages = ("mmzoo", "torch", "pyro-ppl", "arviz-base", "xarray")
    own: dict[str, str | int | float] = {"model": type(pair).__name__}
    if not isinstance(pair, PyroPair):
        own = {"model": pair.name, "latent_dim": pair.latent_dim}
    return own | {
        "title": pair.title,
        "modalities": json.dumps(list(pair.modalities)),
        "subsets": json.dumps(list(subsets)),
        "num_draws": num_draws,
        "num_samples": num_samples,
        "prior_share": prior_share,
        "seed": seed,
        "versions": json.dumps({name: version(name) for name in packages}),
    }
