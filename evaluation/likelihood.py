r"""Likelihoods of a model, in nats, with their error.

For sets A and B of modalities, and K draws ``z_k ~ q(z | x_A, x_B)`` of each row,

    log p(x_A, x_B)  =  log (1/K) sum_k p(z_k) p(x_A, x_B | z_k) / q(z_k | x_A, x_B)
    log p(x_A | x_B) =  log p(x_A, x_B) - log p(x_B)

each estimate with the proposal that sees exactly what is scored, and with draws of its own. The
draws of a mixture posterior are stratified and weighted with the density of the whole mixture. No
weight of a training objective enters. A row uses what it has: a modality that it lacks is neither
scored nor seen.

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
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mmzoo.batch import modality_names
from mmzoo.evaluation.pair import Pair, device_of, quiet
from mmzoo.evaluation.pareto import WeightSummary
from mmzoo.inference.draws import draw, log_joint, log_prior, log_proposal, replay
from mmzoo.vae import MultimodalVAE

__all__ = ["likelihood_table", "log_likelihood", "quantity_name"]

_ESTIMATES = ("log_prob", "mcse", "ess", "pareto_k")
_ROWS = 64
_CHUNK = {"cpu": 2048, "cuda": 1 << 17}
_UNRELIABLE = 0.7

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
    guide: Callable[..., Any] | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    on_chunk: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """``log p(x_A | x_B)`` of every row by importance sampling.

    Args:
        vae: The model, or a pair of your own (:class:`mmzoo.evaluation.PyroPair`).
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        of: The names in A, what is scored.
        given: The names in B, what is known; none of A.
        proposal: What the guide sees for ``log p(x_A, x_B)``; default: exactly A and B. Seeing
            more makes the weights heavy-tailed, seeing less makes them uneven.
        num_samples: K, draws of each row.
        prior_share: Share of them that comes from the prior, below one: the defensive proposal.
        guide: A Pyro guide over the same sites, in place of the model's own.
        chunk_size: Draws that are decoded at a time; memory does not grow with K or N.
        seed: Of the draws.
        on_chunk: Called with the rows done and the rows in all.

    Returns:
        Over ``row``: ``log_prob`` in nats, ``mcse`` (its Monte Carlo standard error), ``ess``
        (effective sample size; the smaller one of the two estimates of a conditional) and
        ``pareto_k`` (the larger one; above 0.7 the row is not to be relied on). A row that has
        nothing of A is NaN; the attribute ``rows_without`` counts them.

    Raises:
        ValueError: For unknown names, A and B that overlap, a bad batch, or a quantity that the
            model does not define.

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
    sampler = _Sampler(vae, x, observed, num_samples, prior_share, guide, chunk_size, on_chunk)
    sampler.reject_empty()
    joint = sampler.marginal((*of, *given), sees, seed)
    result = joint
    if given:
        result = _difference(joint, sampler.marginal(tuple(given), None, seed + 1), empty=0.0)
    absent = ~sampler.has(of)
    for values in result.values():
        values[absent] = np.nan
    variables = {name: ("row", result[name]) for name in _ESTIMATES}
    return xr.Dataset(
        variables,
        coords={"row": np.arange(sampler.num_rows)},
        attrs={
            "quantity": quantity_name(of, given),
            "proposal": ", ".join((*of, *given) if sees is None else sees),
            "num_samples": num_samples,
            "prior_share": prior_share,
            "rows_without": int(absent.sum()),
            "units": "nats",
            "seed": seed,
        },
    )


def likelihood_table(
    models: Mapping[str, Pair],
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    quantities: Sequence[tuple[str | Sequence[str], str | Sequence[str]]] | None = None,
    num_samples: int = 1000,
    prior_share: float = 0.0,
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
        chunk_size: Draws that are decoded at a time.
        seed: Of the draws.
        on_chunk: Called with the quantity's title, the rows done and the rows in all.

    Returns:
        Over ``model`` and ``quantity``: ``mean`` over rows in nats, ``standard_error`` of that
        mean over rows, ``mcse`` (the part of it that is Monte Carlo error), ``pareto_k`` (share of
        rows above 0.7) and ``num_rows``. A quantity that a model cannot answer is NaN, with the
        reason in ``note``.
    """
    if not models:
        raise ValueError(
            "likelihood_table: expected at least one model, found none; pass {title: vae}"
        )
    known_names = {name: m for vae in models.values() for name, m in vae.modalities.items()}
    for what, mapping in (("x", x), ("observed", observed or {})):
        modality_names(known_names, mapping, f"likelihood_table {what}")
    quantities = _default_quantities(list(known_names)) if quantities is None else quantities
    pairs = [(_as_tuple(of), _as_tuple(given)) for of, given in quantities]
    titles = [quantity_name(of, given) for of, given in pairs]
    kinds = ("mean", "standard_error", "mcse", "pareto_k", "num_rows")
    table = {kind: np.full((len(models), len(pairs)), np.nan) for kind in kinds}
    note = np.full((len(models), len(pairs)), "", dtype=object)
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
                sampler = _Sampler(
                    vae, here, masks, num_samples, prior_share, None, chunk_size, None
                )
                if len(here) == len(x):  # what a smaller model cannot see may be elsewhere
                    sampler.reject_empty()
            sampler.on_chunk = _telling(on_chunk, f"{title} {titles[j]}")
            rows = _conditional(sampler, known, of, given, seed)
            for kind, value in _summary(rows).items():
                table[kind][i, j] = value
    variables: dict[str, Any] = {k: (("model", "quantity"), v) for k, v in table.items()}
    variables["note"] = (("model", "quantity"), note.astype(str))
    return xr.Dataset(
        variables,
        coords={"model": list(models), "quantity": titles},
        attrs={
            "num_samples": num_samples,
            "prior_share": prior_share,
            "seed": seed,
            "units": "nats per row",
        },
    )


def quantity_name(of: Sequence[str], given: Sequence[str] = ()) -> str:
    """How a quantity is written.

    Example:
        >>> quantity_name(["image"], ["label"])
        'log p(image | label)'
    """
    known = f" | {', '.join(given)}" if given else ""
    return f"log p({', '.join(of)}{known})"


class _Sampler:
    """Importance sampling of marginals of one model on one set of rows, in flat memory."""

    def __init__(
        self,
        vae: Pair,
        x: Mapping[str, Tensor],
        observed: Mapping[str, Tensor] | None,
        num_samples: int,
        prior_share: float,
        guide: Callable[..., Any] | None,
        chunk_size: int | None,
        on_chunk: Callable[[int, int], None] | None,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"log_likelihood: expected num_samples >= 1, found {num_samples}")
        if not 0 <= prior_share < 1:
            raise ValueError(
                f"log_likelihood: expected 0 <= prior_share < 1, found {prior_share}; it is the "
                "share of the draws that the prior gives, the guide gives the others"
            )
        batch = vae.check(x, observed)
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
        self.num_samples = num_samples
        self.from_prior = min(round(prior_share * num_samples), num_samples - 1)
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

    def marginal(self, scored: Sequence[str], sees: Sequence[str] | None, seed: int) -> Arrays:
        """``log p(x_scored)`` of every row; NaN in rows that have nothing of it."""
        result = {kind: np.full(self.num_rows, np.nan) for kind in _ESTIMATES}
        rows = torch.as_tensor(self.has(scored)).nonzero().squeeze(-1)
        sees = scored if sees is None else sees
        per_block = max(1, min(_ROWS, self.chunk_size)) if self.device.type == "cpu" else 1024
        with quiet(self.vae, seed):
            for start in range(0, len(rows), per_block):
                index = rows[start : start + per_block]
                block = self._block(index, scored, sees)
                for kind, values in block.items():
                    result[kind][index.numpy()] = values.cpu().numpy()
                if self.on_chunk:
                    self.on_chunk(min(start + per_block, len(rows)), len(rows))
        return result

    def _select(
        self, index: Tensor, names: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        names = [name for name in self.vae.modalities if name in names and name in self.x]
        x = {name: self.x[name][index.to(self.x[name].device)].to(self.device) for name in names}
        masks = {name: self.masks[name][index] for name in names}
        return x, {name: m.to(self.device) for name, m in masks.items() if not bool(m.all())}

    def _block(
        self, index: Tensor, scored: Sequence[str], sees: Sequence[str]
    ) -> dict[str, Tensor]:
        """All draws of some rows, a chunk at a time."""
        x, observed = self._select(index, scored)
        given, seen = self._select(index, sees)
        num_rows = len(index)
        kwargs: dict[str, Any] = {} if given else {"num_rows": num_rows}
        if self.guide is None and given and isinstance(self.vae, MultimodalVAE):
            kwargs["experts"] = self.vae.encode(given, seen)
        guide = self.vae.guide if self.guide is None else self.guide
        from_guide = self.num_samples - self.from_prior
        summary: WeightSummary | None = None
        strata = 1
        for start, num in self._chunks(from_guide, num_rows):
            draws = draw(guide, given, seen, num, start=start, total=from_guide, **kwargs)
            log_p, trace = log_joint(self.vae.model, x, observed, draws, num)
            log_q = self._defended(log_proposal(draws, num_rows), log_prior(trace, num_rows))
            if summary is None:
                strata = 1 if draws.mixture is None else draws.mixture.log_weights.shape[-1]
                extra = int(self.from_prior > 0)
                summary = WeightSummary(self.num_samples, num_strata=strata + extra)
            coef = draws.log_coef + math.log(from_guide / self.num_samples)
            stratum = draws.component
            if stratum is None and self.from_prior:
                stratum = torch.zeros_like(coef)
            summary.update(log_p - log_q, coef, stratum)
        assert summary is not None
        always = {name: given[name] for name in self.vae.always_given}
        for start, num in self._chunks(self.from_prior, num_rows):
            # Without observations the model itself is the guide that draws from the prior.
            draws = draw(
                self.vae.model,
                always,
                None,
                num,
                start=start,
                total=self.from_prior,
                stratified=False,  # a prior may have more components than draws
                num_rows=num_rows,
            )
            log_p, trace = log_joint(self.vae.model, x, observed, draws, num)
            again = replay(guide, given, seen, draws, num, **kwargs)
            log_q = self._defended(log_proposal(again, num_rows), log_prior(trace, num_rows))
            coef = draws.log_coef + math.log(self.from_prior / self.num_samples)
            summary.update(log_p - log_q, coef, coef.new_full((1, 1), strata))
        return summary.result()

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
    }


def _conditional(
    sampler: _Sampler,
    known: dict[tuple[str, ...], Arrays],
    of: tuple[str, ...],
    given: tuple[str, ...],
    seed: int,
) -> Arrays:
    def marginal(names: Iterable[str]) -> Arrays:
        key = tuple(name for name in sampler.vae.modalities if name in set(names))
        if key not in known:
            # A seed of its own for each marginal: differences are of independent draws.
            known[key] = sampler.marginal(key, None, seed + len(known))
        return known[key]

    rows = marginal((*of, *given))
    rows = _difference(rows, marginal(given), empty=0.0) if given else dict(rows)
    absent = ~sampler.has(of)
    return {kind: np.where(absent, np.nan, values) for kind, values in rows.items()}


def _summary(rows: Arrays) -> dict[str, float]:
    kept = ~np.isnan(rows["log_prob"])
    count = int(kept.sum())
    if count == 0:
        return {"num_rows": 0.0}
    values, k = rows["log_prob"][kept], rows["pareto_k"][kept]
    return {
        "mean": float(values.mean()),
        "standard_error": float(values.std(ddof=1) / np.sqrt(count)) if count > 1 else np.nan,
        "mcse": float(np.sqrt(np.square(rows["mcse"][kept]).sum()) / count),
        "pareto_k": float((k > _UNRELIABLE).mean()) if not np.isnan(k).all() else np.nan,
        "num_rows": float(count),
    }


def _as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


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
