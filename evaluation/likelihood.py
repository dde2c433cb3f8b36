r"""Likelihoods of a model, in nats, with their error.

For sets A and B of modalities, and K draws ``z_k ~ q(z | x_A, x_B)`` of each row,

    log p(x_A, x_B)  =  log (1/K) sum_k p(z_k) p(x_A, x_B | z_k) / q(z_k | x_A, x_B)
    log p(x_A | x_B) =  log p(x_A, x_B) - log p(x_B)

each estimate with the proposal that sees exactly what is scored, and with draws of its own. The
draws of a mixture posterior are stratified, where there are two or more for each component, and
weighted with the density of the whole mixture. No weight of a training objective enters. A row uses
what it has: a modality that it lacks is neither scored nor seen.

A guide that is too narrow, as one trained with few samples tends to be, finds too little mass, and
its weights have no bound. The defensive proposal draws a share a of the K from the prior and
weights *every* draw with the density of both, so that no weight exceeds p(x | z) / a:

    q_a(z) = (1 - a) q(z | x_A, x_B) + a p(z)

Importance Weighted Autoencoders (Burda et al., 2015), https://arxiv.org/abs/1509.00519
Weighted Average Importance Sampling and Defensive Mixture Distributions (Hesterberg, 1995),
https://doi.org/10.1080/00401706.1995.10484303
Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from mmzoo.batch import modality_names
from mmzoo.evaluation.pair import Pair, check_row_dimension, device_of, quiet
from mmzoo.evaluation.pareto import WeightSummary
from mmzoo.evaluation.tables import ROW_VARIABLES, table_of_rows
from mmzoo.inference.draws import (
    Draws,
    check_density,
    draw,
    log_joint,
    log_prior,
    log_proposal,
    replay,
)
from mmzoo.inference.support import check_support
from mmzoo.vae import MultimodalVAE

__all__ = [
    "all_quantities",
    "likelihood_curve",
    "likelihood_table",
    "log_likelihood",
    "quantity_name",
]

_ESTIMATES = ("log_prob", "mcse", "ess", "pareto_k")
_ROWS = 64
_CHUNK = {"cpu": 2048, "cuda": 1 << 17}

Arrays = dict[str, np.ndarray]


def log_likelihood(
    vae: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    of: str | Sequence[str],
    given: str | Sequence[str] = (),
    proposal: str | Sequence[str] | None = None,
    num_samples: int = 1000,
    prior_share: float = 0.0,
    target_mcse: float | None = None,
    max_samples: int | None = None,
    guide: Callable[..., Any] | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    on_chunk: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """``log p(x_A | x_B)`` of every row by importance sampling.

    With a target, rows whose standard error is above it get as many fresh draws again, pooled with
    those before, until they reach it or would exceed `max_samples`. To stop at an *estimated* error
    is slightly biased, as a rule upwards, since a large estimate has a small relative error: for a
    row whose error happens to lie right at the target by up to a fifth of it, for most rows by much
    less. Draws that have missed mass stop too early as well, with too small an estimate: start with
    enough of them (hundreds) for an error to be estimated at all, and mind ``pareto_k``.

    Args:
        vae: The model, or a pair of your own (:class:`mmzoo.evaluation.PyroPair`).
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        of: The names in A, what is scored.
        given: The names in B, what is known; none of A.
        proposal: What the guide sees for ``log p(x_A, x_B)``; default: exactly A and B. Seeing
            more makes the weights heavy-tailed, seeing less makes them uneven.
        num_samples: K, draws of each row; with a target, those that it starts with.
        prior_share: Share of them that comes from the prior, below one: the defensive proposal.
        target_mcse: Standard error in nats that every row should reach.
        max_samples: No row gets more draws than these for one estimate; default: 100 times
            `num_samples`. K doubles, so that the last one is `num_samples` times a power of two.
        guide: A Pyro guide over the same sites, in place of the model's own.
        chunk_size: Draws that are decoded at a time; memory does not grow with K or N.
        seed: Of the draws.
        on_chunk: Called with the rows done and the rows in all.

    Returns:
        Over ``row``: ``log_prob`` in nats, ``mcse`` (its Monte Carlo standard error), ``ess``
        (effective sample size; the smaller one of the two estimates of a conditional) and
        ``pareto_k`` (the larger one; above 0.7 the row is not to be relied on). A row that has
        nothing of A is NaN; the attribute ``rows_without`` counts them. With a target besides
        ``num_samples``, the draws that each row got (of a conditional: for the more expensive one
        of its two estimates), and the attribute ``rows_above_target``.

    Raises:
        ValueError: For unknown names, A and B that overlap, a bad batch, a quantity that the
            model does not define, or a bad number of draws.

    Example:
        >>> from mmzoo import Modality
        >>> from mmzoo.models import MVAE
        >>> vae = MVAE([Modality("a", (3,)), Modality("b", (2,))], latent_dim=2)
        >>> x = {"a": torch.randn(5, 3), "b": torch.randn(5, 2)}
        >>> log_likelihood(vae, x, of="a", given="b", num_samples=100).sizes["row"]
        5
    """
    of, given = _names(vae, of, "of"), _names(vae, given, "given")
    if not of or set(of) & set(given):
        raise ValueError(
            f"log_likelihood: expected disjoint sets and a non-empty 'of', found of={of}, "
            f"given={given}"
        )
    if reason := vae.unsupported(of, given):
        raise ValueError(f"log_likelihood: {quantity_name(of, given)} is not defined; {reason}")
    sees = None if proposal is None else _names(vae, proposal, "proposal")
    if sees is not None and set(sees) - set(of) - set(given):
        extra = ", ".join(sorted(set(sees) - set(of) - set(given)))
        warnings.warn(
            f"log_likelihood: the proposal sees {extra}, which is not scored; its weights are "
            "heavy-tailed, mind pareto_k",
            stacklevel=2,
        )
    growth = _Growth.make(num_samples, target_mcse, max_samples)
    sampler = _Sampler(vae, x, observed, growth, prior_share, guide, chunk_size, on_chunk)
    sampler.reject_empty()
    target = sampler.targets(given)
    result = sampler.marginal((*of, *given), sees, seed, target)
    if given:
        known = sampler.marginal(tuple(given), None, seed + 1, target)
        result = _difference(result, known, empty=0.0)
    absent = ~sampler.has(of)
    for values in result.values():
        values[absent] = np.nan
    variables: dict[str, Any] = {name: ("row", result[name]) for name in _ESTIMATES}
    attrs = {
        "quantity": quantity_name(of, given),
        "proposal": ", ".join((*of, *given) if sees is None else sees),
        "num_samples": num_samples,
        "prior_share": prior_share,
        "rows_without": int(absent.sum()),
        "units": "nats",
        "seed": seed,
    }
    if target_mcse is not None:
        variables["num_samples"] = ("row", _counts(result["num_samples"]))
        attrs |= growth.attrs()
        attrs["rows_above_target"] = int(growth.above(result).sum())
    return xr.Dataset(variables, {"row": np.arange(sampler.num_rows)}, attrs)


def likelihood_curve(
    vae: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    of: str | Sequence[str],
    given: str | Sequence[str] = (),
    proposal: str | Sequence[str] | None = None,
    num_samples: Sequence[int] = (10, 100, 1000, 10_000),
    prior_share: float = 0.0,
    guide: Callable[..., Any] | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    on_chunk: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How an estimate settles as the number of draws grows.

    Every K has fresh draws of its own, so that the points of the curve are independent: importance
    sampling is enough from where they stay within their errors. Its expectation rises with K.

    Args:
        vae: The model, or a pair of your own.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        of: The names that are scored.
        given: The names that are known.
        proposal: As in :func:`log_likelihood`.
        num_samples: The numbers of draws, each larger than the one before.
        prior_share: As in :func:`log_likelihood`.
        guide: As in :func:`log_likelihood`.
        chunk_size: As in :func:`log_likelihood`.
        seed: Of the draws; that of the i-th number is ``seed + 2 i``.
        on_chunk: Called with the draws done and the draws in all, in thousands of one row.

    Returns:
        Over ``num_samples`` and ``row``: ``log_prob`` in nats, ``mcse``, ``ess``, ``pareto_k``.

    Raises:
        ValueError: For numbers that do not grow, and as :func:`log_likelihood`.
    """
    numbers = [int(number) for number in num_samples]
    if not numbers or any(b <= a for a, b in zip(numbers, numbers[1:], strict=False)):
        raise ValueError(
            "likelihood_curve: expected num_samples that grow, such as (10, 100, 1000), found "
            f"{tuple(num_samples)}"
        )
    parts = 2 if given else 1
    units = [max(1, number * _num_rows(x) // 1000) for number in numbers]
    curve = []
    for i, number in enumerate(numbers):
        told = _Passes(on_chunk, parts * sum(units[:i]), units[i], parts * sum(units))
        point = log_likelihood(
            vae,
            x,
            observed,
            of=of,
            given=given,
            proposal=proposal,
            num_samples=number,
            prior_share=prior_share,
            guide=guide,
            chunk_size=chunk_size,
            seed=seed + 2 * i,
            on_chunk=told,
        )
        curve.append(point)
    result = xr.concat(curve, "num_samples", combine_attrs="drop_conflicts")
    return result.assign_coords(num_samples=numbers).assign_attrs(seed=seed)


def likelihood_table(
    models: Mapping[str, Pair],
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    quantities: Sequence[tuple[str | Sequence[str], str | Sequence[str]]] | None = None,
    num_samples: int = 1000,
    prior_share: float = 0.0,
    target_mcse: float | None = None,
    max_samples: int | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    on_chunk: Callable[[str, int, int], None] | None = None,
) -> xr.Dataset:
    """Marginal likelihoods of several models on the same rows.

    Each marginal is estimated once, with the proposal that sees exactly what it scores; a
    conditional is the difference of two of them, so that the chain rule holds in the table.

    Args:
        models: Title to model.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        quantities: Pairs ``(of, given)``; default: everything together, each modality alone, and
            each modality given the others, the modalities being those of all models.
        num_samples: K, draws of each row and marginal.
        prior_share: As in :func:`log_likelihood`.
        target_mcse: As in :func:`log_likelihood`. Where a conditional is asked for, every marginal
            is estimated to this over the root of two, so that the difference reaches it.
        max_samples: As in :func:`log_likelihood`.
        chunk_size: Draws that are decoded at a time.
        seed: Of the draws.
        on_chunk: Called with the quantity's title, the rows done and the rows in all.

    Returns:
        Over ``model`` and ``quantity``: ``mean`` over rows in nats, ``standard_error`` of that
        mean over rows, ``mcse`` (the part of it that is Monte Carlo error), ``pareto_k`` (share of
        rows above 0.7) and ``num_rows``. A quantity that a model cannot answer is NaN, with the
        reason in ``note``. Over ``row`` besides, so that models can be compared row by row
        (:func:`mmzoo.evaluation.tables.paired_differences`): ``log_prob``, ``row_mcse`` and
        ``row_pareto_k``. With a target besides ``row_num_samples`` and, over the cells,
        ``rows_above_target``.
    """
    if not isinstance(models, Mapping):
        raise TypeError(
            f"likelihood_table: expected {{title: vae}}, found {type(models).__name__}; give every "
            "model a title"
        )
    if not models:
        raise ValueError(
            "likelihood_table: expected at least one model, found none; pass {title: vae}"
        )
    for what, mapping in (("x", x), ("observed", observed or {})):
        if not isinstance(mapping, Mapping):
            raise TypeError(
                f"likelihood_table: expected {what} as a dict of tensors, found "
                f"{type(mapping).__name__}; a data set gives both by x, observed = data.tensors()"
            )
    known_names = {name: m for vae in models.values() for name, m in vae.modalities.items()}
    for what, mapping in (("x", x), ("observed", observed or {})):
        modality_names(known_names, mapping, f"likelihood_table {what}")
    quantities = _default_quantities(list(known_names)) if quantities is None else quantities
    pairs = [_question(each) for each in quantities]
    modality_names(
        known_names, [n for pair in pairs for each in pair for n in each], "likelihood_table"
    )
    titles = [quantity_name(of, given) for of, given in pairs]
    num_rows = _num_rows(x)
    growth = _Growth.make(num_samples, target_mcse, max_samples)
    kinds = (*ROW_VARIABLES, "num_samples")
    values = {kind: np.full((len(models), len(pairs), num_rows), np.nan) for kind in kinds}
    note = np.full((len(models), len(pairs)), "", dtype=object)
    discrete = np.zeros(note.shape, dtype=bool)
    for i, (title, vae) in enumerate(models.items()):
        known: dict[tuple[str, ...], Arrays] = {}
        sampler: _Sampler | None = None
        for j, (of, given) in enumerate(pairs):
            absent = [name for name in (*of, *given) if name not in vae.modalities]
            if absent:
                note[i, j] = f"{title} has no modality {', '.join(absent)}"
                continue
            if reason := vae.unsupported(of, given):
                note[i, j] = reason
                continue
            if sampler is None:
                here = {name: value for name, value in x.items() if name in vae.modalities}
                masks = {k: v for k, v in (observed or {}).items() if k in vae.modalities}
                sampler = _Sampler(vae, here, masks, growth, prior_share, None, chunk_size, None)
                if len(here) == len(x):  # what a smaller model cannot see may be elsewhere
                    sampler.reject_empty()
            sampler.on_chunk = _telling(on_chunk, f"{title} {titles[j]}")
            target = sampler.targets([name for _, each in pairs for name in each])
            discrete[i, j] = all(vae.modalities[name].likelihood.is_discrete for name in of)
            rows = _conditional(sampler, known, of, given, seed, target)
            for kind in values:
                values[kind][i, j] = rows[kind]
    attrs = {
        "num_samples": num_samples,
        "prior_share": prior_share,
        "seed": seed,
        "units": "nats per row",
    }
    coords = {"model": list(models), "quantity": titles}
    table = table_of_rows(values, coords, note=note, attrs=attrs)
    # The log of a probability: above zero, what is subtracted was estimated too low.
    table["impossible"] = (("model", "quantity"), discrete & (table["mean"].values > 0))
    if target_mcse is not None:
        table.attrs |= growth.attrs()
        counts = _counts(values["num_samples"])
        table["row_num_samples"] = (("model", "quantity", "row"), counts)
        table["rows_above_target"] = (("model", "quantity"), growth.above(values).sum(-1))
    return table


def quantity_name(of: Sequence[str], given: Sequence[str] = ()) -> str:
    """How a quantity is written.

    Example:
        >>> quantity_name(["image"], ["label"])
        'log p(image | label)'
    """
    known = f" | {', '.join(given)}" if given else ""
    return f"log p({', '.join(of)}{known})"


def all_quantities(
    names: Iterable[str], *, conditionals: bool = True, max_quantities: int = 1000
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Every question about subsets: ``log p(x_S)`` and ``log p(x_A | x_B)``.

    The order is that of the names; joint likelihoods come first. There are 2^M - 1 of them and
    3^M - 2^(M + 1) + 1 conditionals for M modalities, all of which are differences of the former:
    :func:`likelihood_table`, which takes this as `quantities`, estimates 2^M - 1 marginals.

    Args:
        names: The modalities.
        conditionals: Whether to ask for ``log p(x_A | x_B)`` as well.
        max_quantities: No list is longer than this.

    Raises:
        ValueError: For no names, a name that stands there twice, or more quantities than that.

    Example:
        >>> for of, given in all_quantities(["image", "label"]):
        ...     print(quantity_name(of, given))
        log p(image)
        log p(label)
        log p(image, label)
        log p(image | label)
        log p(label | image)
    """
    names = list(names)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"all_quantities: expected names of modalities, each once, found {names}")
    count = 3 ** len(names) - 2 ** len(names) if conditionals else 2 ** len(names) - 1
    if count > max_quantities:
        raise ValueError(
            f"all_quantities: expected at most {max_quantities} quantities, found {count} of "
            f"{len(names)} modalities; name fewer, leave out conditionals=True, or raise "
            "max_quantities"
        )
    found: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for num_given in range(len(names) if conditionals else 1):
        for num_of in range(1, len(names) - num_given + 1):
            for of in combinations(names, num_of):
                rest = [name for name in names if name not in of]
                found += [(of, given) for given in combinations(rest, num_given)]
    return found


class _Passes:
    """Tells how far several runs over the rows have come."""

    def __init__(
        self, tell: Callable[[int, int], None] | None, before: int, unit: int, total: int
    ) -> None:
        self.tell, self.before, self.unit, self.total = tell, before, unit, total

    def __call__(self, done: int, rows: int) -> None:
        if self.tell:
            self.tell(self.before + self.unit * done // rows, self.total)
        if done == rows:
            self.before += self.unit


class _Growth(NamedTuple):
    """How many draws a row gets: K, or twice as many until an error is small enough."""

    num_samples: int
    target: float | None
    max_samples: int

    @classmethod
    def make(cls, num_samples: int, target: float | None, max_samples: int | None) -> _Growth:
        if not isinstance(num_samples, Integral) or num_samples < 1:
            raise ValueError(
                f"log_likelihood: expected num_samples, a whole number >= 1, found {num_samples}"
            )
        if target is None:
            if max_samples is not None:
                raise ValueError(
                    f"log_likelihood: expected target_mcse with max_samples={max_samples}, found "
                    "none; set the standard error that rows should reach"
                )
            return cls(num_samples, None, num_samples)
        if not (target > 0 and math.isfinite(target)):
            raise ValueError(
                f"log_likelihood: expected target_mcse > 0, found {target}; it is a standard error "
                "in nats, such as 0.05"
            )
        most = 100 * num_samples if max_samples is None else max_samples
        if most < num_samples:
            raise ValueError(
                f"log_likelihood: expected max_samples of at least num_samples={num_samples}, "
                f"found {most}; rows start with num_samples draws"
            )
        return cls(num_samples, target, most)

    def attrs(self) -> dict[str, Any]:
        return {"target_mcse": self.target, "max_samples": self.max_samples}

    def above(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """The rows with an estimate whose error, to round-off, is above the target."""
        assert self.target is not None
        reached = rows["mcse"] <= self.target * (1 + 1e-12)
        return ~np.isnan(rows["log_prob"]) & ~reached


class _Sampler:
    """Importance sampling of marginals of one model on one set of rows, in flat memory."""

    def __init__(
        self,
        vae: Pair,
        x: Mapping[str, Tensor],
        observed: Mapping[str, Tensor] | None,
        growth: _Growth,
        prior_share: float,
        guide: Callable[..., Any] | None,
        chunk_size: int | None,
        on_chunk: Callable[[int, int], None] | None,
    ) -> None:
        if not 0 <= prior_share < 1:
            raise ValueError(
                f"log_likelihood: expected 0 <= prior_share < 1, found {prior_share}; it is the "
                "share of the draws that the prior gives, the guide gives the others"
            )
        batch = vae.check(x, observed)
        check_row_dimension(vae, batch)
        check_support(vae, batch)
        self.vae, self.guide = vae, guide
        self.x = {name: value for name, value in batch.x.items() if value is not None}
        self.num_rows = batch.shape[-1]
        self.masks = {
            name: torch.zeros(self.num_rows, dtype=torch.bool)
            if name not in self.x
            else self._mask(batch.observed.get(name))
            for name in vae.modalities
        }
        self.device = device_of(vae)
        self.growth, self.num_samples = growth, growth.num_samples
        self.from_prior = min(round(prior_share * self.num_samples), self.num_samples - 1)
        self.chunk_size = chunk_size or _CHUNK.get(self.device.type, _CHUNK["cpu"])
        self.on_chunk = on_chunk

    def _mask(self, mask: Tensor | None) -> Tensor:
        if mask is None:
            return torch.ones(self.num_rows, dtype=torch.bool)
        return mask.expand(self.num_rows).cpu()

    def reject_empty(self) -> None:
        """Raises where a row has nothing at all."""
        empty = ~self.has(self.masks)
        if empty.any():
            raise ValueError(
                f"log_likelihood: expected something observed in every row, found nothing in row "
                f"{int(empty.argmax())}; drop such rows"
            )

    def has(self, names: Iterable[str]) -> np.ndarray:
        """The rows that have any of the named modalities, ``(N,)``."""
        return torch.stack([self.masks[name] for name in names]).any(0).numpy()

    def targets(self, given: Sequence[str]) -> np.ndarray | None:
        """Standard error of each row that the two parts of a conditional need, ``(N,)``."""
        if self.growth.target is None:
            return None
        two = self.has(given) if given else np.zeros(self.num_rows, dtype=bool)
        return self.growth.target / np.sqrt(1.0 + two)

    def marginal(
        self,
        scored: Sequence[str],
        sees: Sequence[str] | None,
        seed: int,
        target: np.ndarray | None = None,
    ) -> Arrays:
        """``log p(x_scored)`` of every row; NaN in rows that have nothing of it."""
        kinds = (*_ESTIMATES, "num_samples")
        result = {kind: np.full(self.num_rows, np.nan) for kind in kinds}
        rows = torch.as_tensor(self.has(scored)).nonzero().squeeze(-1)
        sees = scored if sees is None else sees
        per_block = max(1, min(_ROWS, self.chunk_size)) if self.device.type == "cpu" else 1024
        with quiet(self.vae, seed):
            for start in range(0, len(rows), per_block):
                index = rows[start : start + per_block]
                for done, block in self._until(index, scored, sees, target):
                    for kind, values in block.items():
                        result[kind][done.numpy()] = values.cpu().numpy()
                if self.on_chunk:
                    self.on_chunk(min(start + per_block, len(rows)), len(rows))
        return result

    def _until(
        self,
        index: Tensor,
        scored: Sequence[str],
        sees: Sequence[str],
        target: np.ndarray | None,
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The results of some rows, as soon as they have enough draws."""
        total, summary = 1, None
        while len(index):
            # As many draws as there are, with a sum in the units of the first ones.
            times = total if summary else 0
            summary = self._block(index, scored, sees, max(times, 1), summary)
            total += times
            found = summary.result(partial=True)
            found["log_prob"] = found["log_prob"] - math.log(total)
            found["num_samples"] = torch.full_like(found["ess"], total * self.num_samples)
            more = torch.zeros_like(found["ess"], dtype=torch.bool)
            if target is not None and 2 * total * self.num_samples <= self.growth.max_samples:
                more = ~(found["mcse"] <= torch.as_tensor(target)[index].to(more.device))
            here = more.cpu()
            yield index[~here], {kind: values[~more] for kind, values in found.items()}
            summary.keep(more)
            index = index[here]

    def _select(
        self, index: Tensor, names: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        names = [name for name in self.vae.modalities if name in names and name in self.x]
        x = {name: self.x[name][index.to(self.x[name].device)].to(self.device) for name in names}
        masks = {name: self.masks[name][index] for name in names}
        return x, {name: m.to(self.device) for name, m in masks.items() if not bool(m.all())}

    def _block(
        self,
        index: Tensor,
        scored: Sequence[str],
        sees: Sequence[str],
        times: int,
        summary: WeightSummary | None,
    ) -> WeightSummary:
        """`times` K draws of some rows, a chunk at a time; weights are summed as if of K."""
        x, observed = self._select(index, scored)
        given, seen = self._select(index, sees)
        num_rows = len(index)
        kwargs: dict[str, Any] = {} if given else {"num_rows": num_rows}
        if self.guide is None and given and isinstance(self.vae, MultimodalVAE):
            kwargs["experts"] = self.vae.encode(given, seen)
        guide = self.vae.guide if self.guide is None else self.guide
        from_prior = times * self.from_prior
        from_guide = times * self.num_samples - from_prior
        extra = int(self.from_prior > 0)
        # Draws of the same kind throughout: who began without strata goes on without.
        stratified = summary is None or summary.num_strata > 1 + extra
        strata = 1
        for start, num in self._chunks(from_guide, num_rows):
            draws = draw(
                guide,
                given,
                seen,
                num,
                start=start,
                total=from_guide,
                stratified=stratified,
                strict=False,
                **kwargs,
            )
            check_density(draws)
            log_p, trace = self._log_joint(x, observed, draws, num)
            log_q = self._defended(log_proposal(draws, num_rows), log_prior(trace, num_rows))
            strata = 1 if draws.mixture is None else draws.mixture.log_weights.shape[-1]
            if summary is None:
                summary = WeightSummary(self.growth.max_samples, num_strata=strata + extra)
            coef = draws.log_coef + math.log(from_guide / self.num_samples)
            stratum = draws.component
            if stratum is None and self.from_prior:
                stratum = torch.zeros_like(coef)
            summary.update(log_p - log_q, coef, stratum)
        assert summary is not None
        always = {name: given[name] for name in self.vae.always_given}
        for start, num in self._chunks(from_prior, num_rows):
            # Without observations the model itself is the guide that draws from the prior.
            draws = draw(
                self.vae.model,
                always,
                None,
                num,
                start=start,
                total=from_prior,
                stratified=False,  # a prior may have more components than draws
                num_rows=num_rows,
            )
            log_p, trace = self._log_joint(x, observed, draws, num)
            again = replay(guide, given, seen, draws, num, **kwargs)
            log_q = self._defended(log_proposal(again, num_rows), log_prior(trace, num_rows))
            coef = draws.log_coef + math.log(from_prior / self.num_samples)
            summary.update(log_p - log_q, coef, coef.new_full((1, 1), strata))
        return summary

    def _log_joint(
        self, x: dict[str, Tensor], observed: dict[str, Tensor], draws: Draws, num: int
    ) -> tuple[Tensor, Trace]:
        return log_joint(self.vae.model, x, observed, draws, num, scored=self.vae.modalities)

    def _chunks(self, total: int, num_rows: int) -> Iterator[tuple[int, int]]:
        """First index and number of the draws of each chunk."""
        size = max(1, self.chunk_size // num_rows)
        for start in range(0, total, size):
            yield start, min(size, total - start)

    def _defended(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Density of the guide and the prior together, in the shares that were drawn."""
        if not self.from_prior:
            return log_q
        share = self.from_prior / self.num_samples
        return torch.logaddexp(log_q + math.log1p(-share), log_p + math.log(share))


def _names(vae: Pair, names: str | Sequence[str], what: str) -> list[str]:
    return modality_names(vae.modalities, names, f"log_likelihood {what}")


def _difference(joint: Arrays, known: Arrays, *, empty: float) -> Arrays:
    """Joint minus marginal; a row that knows nothing has ``empty`` to subtract."""
    nothing = np.isnan(known["log_prob"]) & np.isnan(known["ess"])
    subtract = np.where(nothing, empty, known["log_prob"])
    spread = np.where(nothing, 0.0, known["mcse"])
    return {
        "log_prob": joint["log_prob"] - subtract,
        "mcse": np.hypot(joint["mcse"], spread),
        "ess": np.where(nothing, joint["ess"], np.minimum(joint["ess"], known["ess"])),
        "pareto_k": np.where(
            nothing, joint["pareto_k"], np.maximum(joint["pareto_k"], known["pareto_k"])
        ),
        "num_samples": np.fmax(joint["num_samples"], known["num_samples"]),
    }


def _conditional(
    sampler: _Sampler,
    known: dict[tuple[str, ...], Arrays],
    of: tuple[str, ...],
    given: tuple[str, ...],
    seed: int,
    target: np.ndarray | None,
) -> Arrays:
    def marginal(names: Iterable[str]) -> Arrays:
        key = tuple(name for name in sampler.vae.modalities if name in set(names))
        if key not in known:
            # A seed of its own for each marginal: differences are of independent draws.
            known[key] = sampler.marginal(key, None, seed + len(known), target)
        return known[key]

    rows = marginal((*of, *given))
    rows = _difference(rows, marginal(given), empty=0.0) if given else dict(rows)
    absent = ~sampler.has(of)
    return {kind: np.where(absent, np.nan, values) for kind, values in rows.items()}


def _counts(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values).astype(int)


def _num_rows(x: Mapping[str, Tensor]) -> int:
    return next((len(v) for v in x.values() if isinstance(v, Tensor) and v.dim()), 0)


def _as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _question(pair: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if isinstance(pair, str) or len(pair) != 2:
        raise ValueError(
            f"likelihood_table quantities: expected pairs (of, given), found {pair!r}; log p(a) is "
            "('a', ()), log p(a, b | c) is (('a', 'b'), 'c')"
        )
    return _as_tuple(pair[0]), _as_tuple(pair[1])


def _default_quantities(names: list[str]) -> list[tuple[Sequence[str], Sequence[str]]]:
    everything: list[tuple[Sequence[str], Sequence[str]]] = [(names, ())]
    if len(names) == 1:
        return everything
    everything += [([name], ()) for name in names]
    return everything + [([name], [n for n in names if n != name]) for name in names]


def _telling(
    on_chunk: Callable[[str, int, int], None] | None, title: str
) -> Callable[[int, int], None] | None:
    if on_chunk is None:
        return None
    return lambda done, total: on_chunk(title, done, total)
