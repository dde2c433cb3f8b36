"""Draws of a guide with their densities, subset by subset: what posterior checks are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from mmzoo.evaluation.pair import Pair, named_subsets, subset_name
from mmzoo.inference.draws import (
    Draws,
    check_density,
    draw,
    latent_values,
    log_joint,
    log_proposal,
    replay,
)
from mmzoo.inference.draws import log_prior as prior_of
from mmzoo.vae import MultimodalVAE

__all__ = [
    "Densities",
    "Shown",
    "Site",
    "blocks",
    "find_subsets",
    "flatten",
    "latent_names",
    "mean_and_error",
    "simulate",
    "unflatten",
]

# Up to here every subset is looked at by default: 2^3 - 1 = 7 of them.
_MAX_ALL_SUBSETS = 3
# Draws that are decoded at a time.
_CHUNK = {"cpu": 1 << 13, "cuda": 1 << 17}

Program = Callable[..., Any]
Masks = Mapping[str, Tensor]


class Densities(NamedTuple):
    """Log densities of draws, ``(K, N)`` each, in nats.

    Attributes:
        log_guide: ``log q(z | x_S)``.
        log_prior: ``log p(z)``.
        log_joint: ``log p(z, x_S)``.
    """

    log_guide: Tensor
    log_prior: Tensor
    log_joint: Tensor


class Site(NamedTuple):
    """A latent site.

    Attributes:
        value: Draws ``(K, N, *event)``.
        guide: The distribution that they came from, batch ``(K, N)`` or broadcast to it.
        prior: The site's distribution in the model, given the latents before it.
    """

    value: Tensor
    guide: Any
    prior: Any


class Shown:
    """Some rows, and what a guide is shown of them; rows without anything have the prior.

    Args:
        pair: The pair.
        x: Checked values ``(N, *event_shape)``, of whatever is shown somewhere.
        masks: Name to bool mask ``(N,)`` of what is shown, and scored.
        guide: A guide over the same sites in place of the pair's own.
    """

    def __init__(
        self,
        pair: Pair,
        x: Mapping[str, Tensor],
        masks: Masks,
        guide: Program | None = None,
    ) -> None:
        masks = {name: mask for name, mask in masks.items() if name in x and bool(mask.any())}
        self.num_rows = next(iter(x.values())).shape[0]
        device = next(iter(x.values())).device
        seen = torch.zeros(self.num_rows, dtype=torch.bool, device=device)
        for mask in masks.values():
            seen = seen | mask
        own = isinstance(pair, MultimodalVAE) and guide is None  # takes empty rows itself
        if own and bool(seen.any()):
            seen = torch.ones_like(seen)
        self._parts = [
            _Part(pair, index, x, masks if shown else {}, guide or pair.guide)
            for index, shown in ((seen, True), (~seen, False))
            if bool(index.any())
        ]

    def draw(self, num_draws: int, *, stratified: bool = False) -> dict[str, Tensor]:
        """Latents by site name, ``(K, N, *event)``."""
        return self._join([part.draw(num_draws, stratified) for part in self._parts])

    def densities(self, values: Mapping[str, Tensor]) -> Densities:
        """Densities of latents ``(K, N, *event)``, in the pair's precision."""
        found = [part.densities(values)._asdict() for part in self._parts]
        return Densities(**self._join(found))

    def log_guide(self, values: Mapping[str, Tensor]) -> Tensor:
        """``log q(z | x_S)`` alone, ``(K, N)``."""
        found = [{"log_guide": part.log_guide(values)} for part in self._parts]
        return self._join(found)["log_guide"]

    def log_joint(self, values: Mapping[str, Tensor]) -> Tensor:
        """``log p(z, x_S)`` alone, ``(K, N)``, with its gradient where there is one."""
        found = [{"log_joint": part.log_joint(values)[0]} for part in self._parts]
        return self._join(found)["log_joint"]

    def sites(self, num_draws: int) -> dict[str, Site]:
        """Draws of the latents with the distributions they came from, in the order of the guide.

        All rows must have something, or none: they need one distribution for each site.
        """
        if len(self._parts) > 1:
            raise ValueError("Shown.sites: expected rows that all have something, or none at all")
        return self._parts[0].sites(num_draws)

    def _join(self, found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if len(found) == 1:
            return dict(found[0])
        order = torch.cat([part.index for part in self._parts]).argsort()
        return {key: torch.cat([each[key] for each in found], 1)[:, order] for key in found[0]}


class _Part:
    """Rows of a batch that one program answers for: the guide, or the model without values."""

    def __init__(
        self,
        pair: Pair,
        index: Tensor,
        x: Mapping[str, Tensor],
        masks: Masks,
        guide: Program,
    ) -> None:
        self.index = index.nonzero().squeeze(-1)
        whole = bool(index.all())
        self.model, self.names = pair.model, tuple(pair.modalities)
        self.empty, self.always = not masks, pair.always_given
        names = pair.always_given if self.empty else masks
        self.x = {name: x[name] if whole else x[name][index] for name in names}
        shown = {name: mask if whole else mask[index] for name, mask in masks.items()}
        self.masks = {name: mask for name, mask in shown.items() if not bool(mask.all())}
        self.guide = pair.model if self.empty else guide
        self.rows = len(self.index)
        self.kwargs: dict[str, Any] = {"num_rows": self.rows} if self.empty else {}
        self._draws: Draws | None = None

    def draw(self, num_draws: int, stratified: bool) -> dict[str, Tensor]:
        return latent_values(self._draw(num_draws, stratified))

    def _draw(self, num_draws: int, stratified: bool = False) -> Draws:
        options = {"stratified": stratified and not self.empty, **self.kwargs}
        draws = draw(self.guide, self.x, self.masks, num_draws, **options)
        if not self.empty:
            check_density(draws)
        return draws

    def _fixed(self, values: Mapping[str, Tensor]) -> tuple[Draws, int]:
        """Draws of these values, and K."""
        here = {name: value[:, self.index] for name, value in values.items()}
        if self._draws is None:  # only the names of its sites are used
            with torch.no_grad():
                self._draws = self._draw(1)
        trace = self._draws.trace.copy()
        for name, value in here.items():
            trace.nodes[name]["value"] = value
        return self._draws._replace(trace=trace), len(next(iter(here.values())))

    def log_guide(self, values: Mapping[str, Tensor]) -> Tensor:
        draws, num = self._fixed(values)
        again = replay(self.guide, self.x, self.masks, draws, num, **self.kwargs)
        return log_proposal(again, self.rows)

    def log_joint(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``log p(z, x_S)`` and ``log p(z)``."""
        if self.empty:
            log_p = self.log_guide(values)
            return log_p, log_p
        draws, num = self._fixed(values)
        log_p, trace = log_joint(self.model, self.x, self.masks, draws, num, scored=self.names)
        shape = (num, self.rows)
        return log_p.expand(shape), prior_of(trace, self.rows).expand(shape)

    def sites(self, num_draws: int) -> dict[str, Site]:
        draws = self._draw(num_draws)
        always = {name: self.x[name] for name in self.always}
        prior = replay(self.model, always, None, draws, num_draws, num_rows=self.rows)
        nodes, others = draws.trace.nodes, prior.trace.nodes
        return {
            name: Site(value, nodes[name]["fn"], others[name]["fn"])
            for name, value in latent_values(draws).items()
        }

    def densities(self, values: Mapping[str, Tensor]) -> Densities:
        log_p, log_prior = self.log_joint(values)
        return Densities(self.log_guide(values), log_prior, log_p)


def find_subsets(
    pair: Pair, given: Iterable[str | Sequence[str]] | None, where: str
) -> dict[str, tuple[str, ...]]:
    """Name of each subset, such as "image+label", to its members, in the pair's order.

    Args:
        pair: The pair.
        given: The subsets; by default every non-empty one, or each modality alone and all together
            if there are more than three, those left out that the pair does not answer for.
        where: The caller, for messages.

    Raises:
        ValueError: For an unknown name, an empty subset, or one that the pair does not answer for.
    """
    names = tuple(pair.modalities)
    if given is None:
        sizes = range(1, len(names) + 1) if len(names) <= _MAX_ALL_SUBSETS else (1, len(names))
        wanted = [each for size in sizes for each in itertools.combinations(names, size)]
    else:
        wanted = named_subsets(pair, given, f"{where} given")
    chosen: dict[str, tuple[str, ...]] = {}
    reason: str | None = None
    for subset in wanted:
        why = _unsupported(pair, subset)
        if why is None:
            chosen[subset_name(subset)] = subset
            continue
        reason = why
        if given is not None:
            raise ValueError(f"{where}: no posterior given {subset_name(subset)}; {why}")
    if not chosen:
        raise ValueError(
            f"{where}: expected a subset that {pair.title} answers for, found none; {reason}"
        )
    return chosen


def _unsupported(pair: Pair, subset: Sequence[str]) -> str | None:
    missing = [name for name in pair.always_given if name not in subset]
    if missing:
        return f"{pair.title} is conditional on {', '.join(missing)}, which must be given"
    return pair.unsupported([n for n in subset if n not in pair.always_given], pair.always_given)


def simulate(
    pair: Pair, num_rows: int, always: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Latents and values of rows that the model draws, ``(N, *event)`` each.

    Args:
        pair: The pair.
        num_rows: N.
        always: Values of what is always given.
    """
    x: dict[str, Tensor | None] = {**dict.fromkeys(pair.modalities), **always}
    trace = poutine.trace(pair.model).get_trace(x, num_rows=num_rows)
    latents = {name: trace.nodes[name]["value"] for name in pair.latent_sites}
    values = {
        name: always[name] if name in always else trace.nodes[name]["value"]
        for name in pair.modalities
    }
    return latents, values


def latent_names(values: Mapping[str, Tensor]) -> list[str]:
    """Names of the latent dimensions, such as "z[0]", from values ``(K, N, *event)``."""
    found = []
    for name, value in values.items():
        shape = value.shape[2:]
        indices = itertools.product(*(range(size) for size in shape))
        found += [f"{name}[{','.join(map(str, i))}]" if i else name for i in indices]
    return found


def flatten(values: Mapping[str, Tensor]) -> Tensor:
    """All latents side by side, ``(K, N, T)``, from values ``(K, N, *event)``."""
    return torch.cat([value.reshape(*value.shape[:2], -1) for value in values.values()], -1)


def unflatten(z: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`flatten`, in the shapes of other latents."""
    sizes = [math.prod(value.shape[2:]) for value in like.values()]
    parts = z.split(sizes, -1)
    return {
        name: part.reshape(*part.shape[:-1], *value.shape[2:])
        for part, (name, value) in zip(parts, like.items(), strict=True)
    }


def blocks(num_rows: int, num_draws: int, device: torch.device) -> Iterator[slice]:
    """Slices of the rows, so that a block of them with all its draws fits in flat memory."""
    size = max(1, _CHUNK.get(device.type, _CHUNK["cpu"]) // num_draws)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def mean_and_error(values: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and its standard error over an axis, leaving NaN out; NaN where nothing is left."""
    kept = ~np.isnan(values)
    count = kept.sum(axis)
    total = np.where(kept, values, 0.0).sum(axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        squares = np.where(kept, (values - np.expand_dims(mean, axis)) ** 2, 0.0).sum(axis)
        return mean, np.sqrt(squares / (count - 1) / count)
