"""Retrieval: which row does an observation of one modality belong to, among all of another one?

Each query row looks for itself among the candidates, the rows that have the target. Scores are

- ``"cosine"``, ``"euclidean"``: between means of ``q(z | x_query)`` and ``q(z | x_target)``,
- ``"wasserstein"``: ``|m - m'|^2 + |s - s'|^2``, exact for diagonal Gaussians,
- ``"likelihood"``: ``log mean_k p(x_target | z_k)`` with ``z_k ~ q(z | x_query)``.

Candidates that score alike are in random order, so that a pair that ignores its input is at chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from torch import Tensor

from mmzoo.data import MultimodalDataset
from mmzoo.evaluation.pair import Pair, device_of, dtype_of, named_subsets, quiet, subset_name
from mmzoo.evaluation.rowwise import (
    Progress,
    Subset,
    TaskRows,
    as_rows,
    check_sizes,
    decode_rows,
    latent_moments,
    mean_and_error,
    shared_sites,
    unanswered,
)

__all__ = ["retrieval"]

Method = Literal["cosine", "euclidean", "wasserstein", "likelihood"]
_METHODS = ("cosine", "euclidean", "wasserstein", "likelihood")
_DRAWS = 100  # for moments without closed form
_ENTRIES = 1 << 22  # entries of a block of densities
_TIE = 100.0  # scores this many round-offs apart are equal
_BOOTSTRAP = 200


def retrieval(
    pair: Pair,
    data: MultimodalDataset | Mapping[str, Tensor],
    *,
    observed: Mapping[str, Tensor] | None = None,
    query: Sequence[str | Sequence[str]] | str | None = None,
    target: Sequence[str | Sequence[str]] | str | None = None,
    k: Sequence[int] = (1, 5, 10),
    method: Method = "cosine",
    sites: Sequence[str] | str | None = None,
    num_draws: int = 100,
    batch_size: int = 64,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> xr.Dataset:
    """Recall at k and median rank of the right row, from one modality to another.

    Args:
        pair: The pair.
        data: The rows: a data set, or name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``; of a data set its own.
        query: What is seen, each a name or several names; default: each modality alone.
        target: What is searched; default: each modality alone.
        k: How many candidates are looked at.
        method: How candidates are scored, see the module.
        sites: Latent sites that are compared; default: all but private codes.
        num_draws: Draws of z for each row: for the likelihood, and for means and spreads where the
            posterior has no closed form.
        batch_size: Rows at a time; memory goes with this number times the number of rows.
        seed: Of the draws, and of the resampling behind the median's standard error.
        on_progress: Called with the batches of queries done and in all.

    Returns:
        Over ``query``, ``target`` and ``k``: ``recall``, its ``standard_error`` over queries, and
        ``chance``. Over ``query`` and ``target``: ``median_rank`` (1 is best) with
        ``median_rank_standard_error`` and ``median_rank_chance``, ``num_queries``,
        ``num_candidates`` and ``note``, why one is empty.

    Raises:
        ValueError: For unknown names or methods, or a pair that is conditional.
    """
    check_sizes("retrieval", num_draws=num_draws, batch_size=batch_size)
    if method not in _METHODS:
        raise ValueError(f"retrieval method: unknown {method!r}; known: {', '.join(_METHODS)}")
    if pair.always_given:
        raise ValueError(
            f"retrieval: expected a pair with a posterior given each modality alone, found "
            f"{pair.title}, which is conditional on {', '.join(pair.always_given)}"
        )
    if len(k) == 0:
        raise ValueError("retrieval k: expected at least one number, found none")
    for each in k:
        check_sizes("retrieval", k=each)
    rows = as_rows(pair, data, observed, "retrieval")
    chosen = shared_sites(pair, sites, "retrieval")
    queries, targets = (_subsets(pair, part, "retrieval") for part in (query, target))
    search = _Search(pair, rows, method, chosen, num_draws, batch_size, seed)
    shape = (len(queries), len(targets))
    recall = np.full((3, *shape, len(k)), np.nan)
    rank = np.full((3, *shape), np.nan)
    counts = np.zeros((2, *shape), dtype=int)
    note = np.full(shape, "", dtype=object)
    for q, t in np.ndindex(shape):
        note[q, t] = search.reason(queries[q], targets[t])
    steps = _Steps(
        on_progress,
        sum(search.num_batches(queries[q], targets[t]) for q, t in np.argwhere(note == "")),
    )
    for q, t in np.ndindex(shape):
        if not note[q, t]:
            better, ties, candidates = search.ranks(queries[q], targets[t], steps)
            counts[:, q, t] = len(better), candidates
            rank[:, q, t] = *_median(better + 1 + ties / 2, seed), (candidates + 1) / 2
            for i, size in enumerate(k):
                hits = ((size - better) / (ties + 1)).clip(0.0, 1.0)
                recall[:2, q, t, i] = mean_and_error(hits)[:2]
                recall[2, q, t, i] = min(size / candidates, 1.0)
    pairs, cells = ("query", "target"), ("query", "target", "k")
    return xr.Dataset(
        {
            "recall": (cells, recall[0]),
            "standard_error": (cells, recall[1]),
            "chance": (cells, recall[2]),
            "median_rank": (pairs, rank[0]),
            "median_rank_standard_error": (pairs, rank[1]),
            "median_rank_chance": (pairs, rank[2]),
            "num_queries": (pairs, counts[0]),
            "num_candidates": (pairs, counts[1]),
            "note": (pairs, note.astype(str)),
        },
        coords={
            "query": [subset_name(each) for each in queries],
            "target": [subset_name(each) for each in targets],
            "k": list(k),
        },
        attrs={
            "method": method,
            "sites": ", ".join(chosen),
            "num_draws": num_draws,
            "units": "share of queries",
            "pair": pair.title,
            "seed": seed,
        },
    )


def _subsets(
    pair: Pair, names: Sequence[str | Sequence[str]] | str | None, where: str
) -> list[Subset]:
    """Subsets in the order of the modalities; default: each alone."""
    return named_subsets(pair, list(pair.modalities) if names is None else names, where)


class _Steps:
    """Counts batches of queries."""

    def __init__(self, on_progress: Progress | None, total: int) -> None:
        self.on_progress, self.total, self.done = on_progress, total, 0

    def step(self) -> None:
        self.done += 1
        if self.on_progress:
            self.on_progress(self.done, self.total)


class _Search:
    """Ranks of the right rows for one pair and one set of rows."""

    def __init__(
        self,
        pair: Pair,
        rows: TaskRows,
        method: Method,
        sites: Sequence[str],
        num_draws: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.pair, self.rows, self.method, self.sites = pair, rows, method, sites
        self.num_draws, self.batch_size, self.seed = num_draws, batch_size, seed
        self.known: dict[Subset, tuple[Tensor, Tensor]] = {}

    def reason(self, asked: Subset, sought: Subset) -> str:
        """Why there is nothing to be found; empty if there is."""
        if set(asked) & set(sought):
            return "the query holds the target"
        needed = (asked,) if self.method == "likelihood" else (asked, sought)
        for subset in needed:
            if reason := unanswered(self.pair, subset):
                return reason
        if not self.rows.having((*asked, *sought)).any():
            return "no row has both"
        return ""

    def num_batches(self, asked: Subset, sought: Subset) -> int:
        """How many batches of queries there are."""
        return -(-int(self.rows.having((*asked, *sought)).sum()) // self.batch_size)

    def ranks(
        self, asked: Subset, sought: Subset, steps: _Steps
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """For each query: how many candidates are better, how many others tie; and their number."""
        has = self.rows.having(sought)
        candidates = has.nonzero().squeeze(-1)
        queries = (has & self.rows.having(asked)).nonzero().squeeze(-1)
        place = has.cumsum(0) - 1  # of a row among the candidates
        better, ties = [], []
        with quiet(self.pair, self.seed):
            for part, scores, slack in self._scores(asked, sought, queries, candidates):
                own = place[part].to(scores.device)[:, None]
                right = scores.gather(1, own)
                equal = (scores - right).abs() <= slack
                equal |= scores == right  # both without any density
                above = (scores > right) & ~equal
                better.append(above.sum(1).cpu().numpy())
                ties.append(equal.sum(1).cpu().numpy() - 1)
                steps.step()
        return np.concatenate(better), np.concatenate(ties), len(candidates)

    def _scores(
        self, asked: Subset, sought: Subset, queries: Tensor, candidates: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Some queries, their scores ``(q, C)`` of all candidates, and the round-off of these."""
        eps = _TIE * torch.finfo(dtype_of(self.pair)).eps
        if self.method == "likelihood":
            for part in queries.split(self.batch_size):
                x = self.rows.take(asked, part, device_of(self.pair))
                fns = decode_rows(self.pair, x, self.num_draws)
                scores = self._densities({name: fns[name] for name in sought}, candidates)
                finite = torch.where(scores.isfinite(), scores, 0.0)
                yield part, scores, eps * finite.abs().amax(1, keepdim=True)
            return
        one, other = self._moments(asked), self._moments(sought)
        far = (other[0][candidates], other[1][candidates])
        # Equal latents differ by the round-off of the latents, not by that of their distance.
        size = torch.stack([each.abs().amax() for each in (*far, *(m[queries] for m in one))]).max()
        scale = {"cosine": torch.ones_like(size), "euclidean": size, "wasserstein": size**2}
        for part in queries.split(self.batch_size):
            near = (one[0][part], one[1][part])
            yield part, _similarity(near, far, self.method), eps * scale[self.method]

    def _moments(self, subset: Subset) -> tuple[Tensor, Tensor]:
        """Mean and spread of ``q(z | x_S)``, ``(N, D)``; NaN in rows without S."""
        if subset not in self.known:
            index = self.rows.having(subset).nonzero().squeeze(-1)
            parts = [
                latent_moments(
                    self.pair,
                    self.rows.take(subset, part, device_of(self.pair)),
                    self.sites,
                    self.num_draws,
                )
                for part in index.split(self.batch_size)
            ]
            found = tuple(torch.cat([part[i] for part in parts]).cpu() for i in (0, 1))
            blank = found[0].new_full((self.rows.num_rows, found[0].shape[-1]), torch.nan)
            loc, scale = (blank.index_copy(0, index, each) for each in found)
            self.known[subset] = loc, scale
        return self.known[subset]

    def _densities(self, fns: Mapping[str, TorchDistribution], candidates: Tensor) -> Tensor:
        """``log mean_k p(x_target | z_k)`` of every candidate, ``(q, C)``."""
        shape = next(iter(fns.values())).batch_shape  # (K, q)
        size = sum(math.prod(self.pair.modalities[n].event_shape) for n in fns)
        block = max(1, _ENTRIES // (shape.numel() * size))
        found = []
        for part in candidates.split(block):
            x = self.rows.take(list(fns), part, device_of(self.pair))
            log_prob = sum(
                (fn.log_prob(x[name][:, None, None]) for name, fn in fns.items()),
                torch.zeros(()),
            )  # (c, K, q)
            found.append(log_prob.double().logsumexp(1).T - math.log(shape[0]))
        return torch.cat(found, 1)


def _similarity(near: tuple[Tensor, ...], far: tuple[Tensor, ...], method: Method) -> Tensor:
    """Scores ``(q, C)`` from means and spreads of queries and candidates."""
    (loc, scale), (other_loc, other_scale) = (
        tuple(each.double() for each in moments) for moments in (near, far)
    )
    if method == "cosine":
        one, other = (torch.nn.functional.normalize(each, dim=-1) for each in (loc, other_loc))
        return one @ other.T
    distance = torch.cdist(loc, other_loc, compute_mode="donot_use_mm_for_euclid_dist")
    if method == "euclidean":
        return -distance
    spread = torch.cdist(scale, other_scale, compute_mode="donot_use_mm_for_euclid_dist")
    return -(distance.square() + spread.square())


def _median(ranks: np.ndarray, seed: int) -> tuple[float, float]:
    """Median and its standard error by resampling the queries."""
    random = np.random.default_rng(seed)
    again = [np.median(random.choice(ranks, len(ranks))) for _ in range(_BOOTSTRAP)]
    return float(np.median(ranks)), float(np.std(again, ddof=1))
