r"""Numeric core of the ArviZ export: draws of some rows, their scores, their predictions.

Raw draws come from the guide. Importance-resampled draws (sampling-importance resampling) are taken
with replacement from many more draws of the guide, row by row, with probabilities

    w_k / sum_j w_j,        w_k = p(z_k) p(x_O | z_k) / q(z_k | x_O),

O what the row has of the subset. They approach the exact p(z | x_O) as the proposals grow, unless
Pareto k of the weights says that they do not: above 0.7 a few draws stand for all.

`Using the SIR algorithm to simulate posterior distributions (Rubin, 1988)`, Bayesian Statistics 3
`Pareto Smoothed Importance Sampling (Vehtari et al., 2024)`, https://arxiv.org/abs/1507.02646
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from mmzoo.evaluation.pair import Pair
from mmzoo.evaluation.pareto import pareto_k
from mmzoo.inference.draws import check_density, draw, latent_values, log_joint, log_proposal

__all__ = ["RowDraws", "draw_rows", "predict_rows"]

# Pairs of a draw and a row that are decoded at a time.
_CHUNK = 4096


class RowDraws(NamedTuple):
    """K draws for each of N rows.

    Attributes:
        latents: Site name to ``(K, N, *event)``.
        log_likelihood: Modality to ``log p(x_m | z)``, ``(K, N)``, NaN where a row lacks it;
            and "joint", the sum over what a row has.
        lp: ``log p(x_O, z)``, ``(K, N)``.
        log_weight: ``lp - log q(z | x_O)`` of each draw, ``(K, N)``.
        pareto_k: Shape of the tail of the weights, ``(N,)``.
        ess: Effective sample size of the weights, ``(N,)``.
    """

    latents: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    lp: Tensor
    log_weight: Tensor
    pareto_k: Tensor
    ess: Tensor


class _Chunk(NamedTuple):
    """Some draws of some rows, with the weight of each in an average."""

    latents: dict[str, Tensor]
    scores: dict[str, Tensor]
    lp: Tensor
    log_weight: Tensor
    log_coef: Tensor


def draw_rows(
    pair: Pair,
    x: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    num_draws: int,
    *,
    guide: Callable[..., Any] | None = None,
    num_proposals: int = 0,
) -> RowDraws:
    """Draws of ``z | x_O`` with their scores; a row without anything holds draws of the prior.

    Args:
        pair: The pair, inside :func:`mmzoo.evaluation.pair.quiet`.
        x: Name to values ``(N, *event_shape)``.
        masks: Name to what of them is seen and scored, ``(N,)``.
        num_draws: K.
        guide: A guide over the same sites in place of the pair's own.
        num_proposals: Draws of the guide from which K are resampled; 0: the K draws are the
            guide's.
    """
    seen = torch.stack(list(masks.values())).any(0)
    parts = [
        (index, _draw_some(pair, x, masks, index, bool(blank), num_draws, guide, num_proposals))
        for blank, index in enumerate((seen, ~seen))
        if index.any()
    ]
    return _splice(parts) if len(parts) > 1 else parts[0][1]


def predict_rows(
    pair: Pair, x: Mapping[str, Tensor], latents: Mapping[str, Tensor], num_rows: int
) -> dict[str, Tensor]:
    """A draw of every modality for each draw of the latents, ``(K, N, *event_shape)``.

    Args:
        pair: The pair, inside :func:`mmzoo.evaluation.pair.quiet`.
        x: The rows' values, of which only what is always given is used.
        latents: Site name to ``(K, N, *event)``.
        num_rows: N.
    """
    unseen: dict[str, Tensor | None] = dict.fromkeys(pair.modalities)
    unseen |= {name: x[name] for name in pair.always_given}
    num_draws = len(next(iter(latents.values())))
    model = poutine.trace(poutine.condition(pair.model, data=dict(latents)))
    with pyro.plate("draws", num_draws, dim=-2):
        trace = model.get_trace(unseen, num_rows=num_rows)
    found = {}
    for name, modality in pair.modalities.items():
        if unseen[name] is None:
            shape = (num_draws, num_rows, *modality.event_shape)
            found[name] = trace.nodes[name]["value"].expand(shape)
    return found


def _draw_some(
    pair: Pair,
    x: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    index: Tensor,
    blank: bool,
    num_draws: int,
    guide: Callable[..., Any] | None,
    num_proposals: int,
) -> RowDraws:
    """The rows of one kind: those that have something, or those that have nothing."""
    rows = int(index.sum())
    x = {name: value[index] for name, value in x.items()}
    masks = {name: mask[index] for name, mask in masks.items()}
    program = pair.model if blank else guide or pair.guide
    given = {name: x[name] for name in pair.always_given} if blank else x
    extra = {"num_rows": rows} if blank else {}
    total = num_proposals or num_draws
    size = max(1, _CHUNK // rows)
    chunks: list[_Chunk] = []
    for start in range(0, total, size):
        num = min(size, total - start)
        draws = draw(
            program,
            given,
            None if blank else masks,
            num,
            start=start,
            total=total,
            stratified=bool(num_proposals) and not blank,
            strict=False,
            **extra,
        )
        if not blank:
            check_density(draws)
        lp, trace = log_joint(pair.model, x, masks, draws, num, scored=pair.modalities)
        scores = {
            name: trace.nodes[name]["log_prob"].expand(num, rows).where(mask, torch.nan)
            for name, mask in masks.items()
            if name in trace.nodes
        }
        scores["joint"] = _joint(scores, lp)
        weight = lp - log_proposal(draws, rows)
        coef = draws.log_coef.expand(num, rows)
        chunks.append(_Chunk(latent_values(draws), scores, lp, weight, coef))
    return _select(chunks, num_draws if num_proposals else 0)


def _joint(scores: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The sum over what a row has; NaN where it has nothing."""
    if not scores:
        return torch.full_like(like, torch.nan)
    stacked = torch.stack(list(scores.values()))
    return stacked.nansum(0).where(~stacked.isnan().all(0), torch.nan)


def _select(chunks: list[_Chunk], num_draws: int) -> RowDraws:
    """Joins the chunks and, if ``num_draws`` is not 0, resamples that many draws of each row."""
    latents = _join([chunk.latents for chunk in chunks])
    scores = _join([chunk.scores for chunk in chunks])
    lp = torch.cat([chunk.lp for chunk in chunks])
    weight = torch.cat([chunk.log_weight for chunk in chunks])
    log_w = (weight + torch.cat([chunk.log_coef for chunk in chunks])).double()
    share = log_w.softmax(0)
    summary = torch.as_tensor(pareto_k(log_w)), 1 / share.square().sum(0)
    if not num_draws:
        return RowDraws(latents, scores, lp, weight, *summary)
    index = torch.multinomial(share.mT, num_draws, replacement=True).mT  # (K, N)

    def pick(value: Tensor) -> Tensor:
        where = index.reshape(*index.shape, *(1 for _ in value.shape[2:]))
        return value.gather(0, where.expand(num_draws, *value.shape[1:]))

    latents = {name: pick(value) for name, value in latents.items()}
    scores = {name: pick(value) for name, value in scores.items()}
    return RowDraws(latents, scores, pick(lp), pick(weight), *summary)


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _splice(parts: list[tuple[Tensor, RowDraws]]) -> RowDraws:
    """Puts rows of both kinds back in their order."""

    def join(values: list[Tensor], axis: int) -> Tensor:
        # Back in order: concatenated rows stand at the places that their masks name.
        places = torch.cat([index.nonzero().squeeze(-1) for index, _ in parts]).argsort()
        return torch.cat(values, axis).index_select(axis, places)

    found = [part for _, part in parts]
    return RowDraws(
        {name: join([p.latents[name] for p in found], 1) for name in found[0].latents},
        {
            name: join([p.log_likelihood[name] for p in found], 1)
            for name in found[0].log_likelihood
        },
        join([p.lp for p in found], 1),
        join([p.log_weight for p in found], 1),
        join([p.pareto_k for p in found], 0),
        join([p.ess for p in found], 0),
    )
