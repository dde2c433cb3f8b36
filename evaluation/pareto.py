r"""Numeric core for importance weights: log-mean, standard error, sample size, Pareto shape.

An importance-sampling estimate is the sum of weighted draws,

    log p^ = log sum_k c_k w_k,        c_k = 1 / K unless the draws are stratified.

Beside the estimate a reader needs to know whether to believe it: the Monte Carlo standard
error by the delta method, the effective sample size, and the shape k of the generalised
Pareto distribution that fits the largest weights. Above k = 0.7 neither the estimate nor
its standard error is reliable at practical numbers of draws.

`Pareto Smoothed Importance Sampling (Vehtari et al., 2024)`, https://arxiv.org/abs/1507.02646
`A New and Efficient Estimation Method for the Generalized Pareto Distribution
(Zhang & Stephens, 2009)`, https://doi.org/10.1198/tech.2009.08017
"""

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["WeightSummary", "pareto_k", "tail_size"]

# The smallest tail that the Pareto fit accepts, as in arviz and the R package loo.
_MIN_TAIL = 5
# Rows of the fit are cut so that its (rows, candidates, tail) block stays in the cache.
_BLOCK = 1 << 19


def tail_size(num_draws: int) -> int:
    """Number of largest weights that the Pareto fit uses, ceil(min(K / 5, 3 sqrt(K)))."""
    return math.ceil(min(num_draws / 5, 3 * num_draws**0.5))


def pareto_k(log_w: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """Shape of the generalised Pareto distribution of the largest importance weights.

    Takes log weights as they are (not negated): heavy upper tails give a large k. Constant
    weights give -inf, a tail of fewer than five draws NaN.
    `Pareto Smoothed Importance Sampling (Vehtari et al., 2024)`,
    https://arxiv.org/abs/1507.02646

    Args:
        log_w: Log weights, shape (K, *batch); the draws are the first dimension.

    Returns:
        k-hat, shape (*batch), of the same kind (tensor or array) as `log_w`, in float64.

    Example:
        >>> k = pareto_k(torch.distributions.Pareto(1.0, 2.0).sample((4000, 3)).log())
        >>> k.shape, bool((k > 0.2).all())  # P(w > t) = t^-2, hence k = 1/2
        (torch.Size([3]), True)
    """
    values = torch.as_tensor(log_w)
    if values.ndim == 0 or values.shape[0] == 0:
        raise ValueError(
            f"log_w: expected shape (K, *batch) with at least one draw, found "
            f"{tuple(values.shape)}; put the draws on the first dimension"
        )
    num_draws = values.shape[0]
    flat = values.detach().reshape(num_draws, values[0].numel())  # (K, N)
    top = flat.double().T.topk(min(tail_size(num_draws) + 1, num_draws)).values  # (N, T + 1)
    count = top.new_full((top.shape[0],), num_draws, dtype=torch.long)
    k = _tail_shape(top, count, _epsilon(flat)).reshape(values.shape[1:])
    return k.numpy() if isinstance(log_w, np.ndarray) else k


class WeightSummary:
    """Summary of importance weights that arrive in chunks of draws, in memory flat in K.

    The estimate is log sum_k exp(log_w + log_coef). Kept per row: the moments of the terms
    within each stratum, in units of the largest term so far, and the largest
    `tail_size(K) + 1` terms. All arithmetic is float64, whatever comes in.

    For stratified draws, n_c of them from component c, only the spread within strata counts:

        Var p^ = sum_c (c_c n_c)^2 var_c(w) / n_c = sum_c n_c var_c(c w).

    A term with coefficient zero (log_coef = -inf) does not count as a draw: so a row can do
    without a component. The Pareto shape is that of the terms exp(log_w + log_coef).

    Args:
        num_draws: K, the number of draws that all updates bring together.
        num_strata: Number of strata; 1 means independent draws from one proposal.

    Example:
        >>> summary = WeightSummary(num_draws=200)
        >>> for _ in range(2):
        ...     summary.update(torch.zeros(100, 3))
        >>> summary.result()["ess"]
        tensor([200., 200., 200.], dtype=torch.float64)
    """

    _shift: Tensor  # (N,)
    _count: Tensor  # (C, N), as are the next two
    _mean: Tensor
    _spread: Tensor

    def __init__(self, num_draws: int, *, num_strata: int = 1) -> None:
        if num_draws < 1 or num_strata < 1:
            raise ValueError(
                f"WeightSummary: expected num_draws and num_strata of at least 1, found "
                f"{num_draws} and {num_strata}; pass the total number of draws"
            )
        self.num_draws = num_draws
        self.num_strata = num_strata
        self._seen = 0
        self._eps = 0.0
        self._tail: list[Tensor] = []

    def update(
        self, log_w: Tensor, log_coef: Tensor | None = None, stratum: Tensor | None = None
    ) -> None:
        """Add a chunk of draws.

        Args:
            log_w: Log weights, shape (k, N).
            log_coef: Log coefficients, broadcastable to (k, N); -log K by default.
            stratum: Index of each draw's stratum, integers broadcastable to (k, N);
                needed if there are several strata.
        """
        log_w = torch.as_tensor(log_w).detach()
        self._check(log_w, stratum)
        self._eps = max(self._eps, _epsilon(log_w))
        if log_coef is None:
            terms = log_w.double() - math.log(self.num_draws)  # (k, N)
            counted = torch.ones_like(terms)
        else:  # a weight that is not counted may be anything, NaN included
            coef = log_coef.detach().double().expand_as(log_w)
            terms = (log_w + coef).masked_fill(coef == -math.inf, -math.inf)
            counted = (coef > -math.inf).double()
        if self._seen == 0:
            self._start(terms)
        self._seen += terms.shape[0]
        self._add_moments(terms, counted, stratum)
        self._add_tail(terms)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows only.

        Args:
            rows: Which, a bool mask (N,) or indices.
        """
        self._shift = self._shift[rows]
        self._count, self._mean, self._spread = (
            each[:, rows] for each in (self._count, self._mean, self._spread)
        )
        self._tail = [part[rows] for part in self._tail]

    def result(self, *, partial: bool = False) -> dict[str, Tensor]:
        """Estimate and diagnostics, each of shape (N,) in float64.

        Args:
            partial: Whether it is asked for before all draws have come.

        Returns:
            `log_prob`, log of the estimate; `mcse`, its standard error by the delta method
            (NaN where a stratum has a single draw or every weight is zero); `ess`, effective
            sample size (sum w)^2 / sum w^2; `pareto_k`, see `pareto_k`.
        """
        if self._seen != self.num_draws and not (partial and self._seen):
            raise ValueError(
                f"WeightSummary: expected {self.num_draws} draws, found {self._seen}; "
                "update it with every chunk before asking for the result"
            )
        count, mean, spread = self._count, self._mean, self._spread  # (C, N)
        total = (count * mean).sum(0)  # (N,)
        squares = (spread + count * mean.square()).sum(0)
        # 0 * (0 / 0) of a stratum without draws is nothing; a single draw tells no variance.
        variance = torch.where(count > 0, count * spread / (count - 1), 0.0).sum(0)
        self._reduce_tail(tail_size(self.num_draws) + 1)
        return {
            "log_prob": total.log() + self._shift,
            "mcse": variance.sqrt() / total,
            "ess": total.square() / squares,
            "pareto_k": _tail_shape(self._tail[0], count.sum(0).long(), self._eps),
        }

    def _check(self, log_w: Tensor, stratum: Tensor | None) -> None:
        if log_w.ndim != 2 or (self._seen and log_w.shape[1] != self._shift.shape[0]):
            rows = self._shift.shape[0] if self._seen else "N"
            raise ValueError(
                f"log_w: expected shape (k, {rows}), found {tuple(log_w.shape)}; "
                "put the draws on the first dimension and the rows on the second"
            )
        if self._seen + log_w.shape[0] > self.num_draws:
            raise ValueError(
                f"WeightSummary: expected {self.num_draws} draws in all, found "
                f"{self._seen + log_w.shape[0]}; raise num_draws"
            )
        if stratum is None and self.num_strata > 1:
            raise ValueError(
                f"stratum: expected indices of {self.num_strata} strata, found none; "
                "pass the component that each draw came from"
            )

    def _start(self, terms: Tensor) -> None:
        rows = terms.shape[1]
        self._shift = terms.new_full((rows,), -math.inf)
        self._count = terms.new_zeros(self.num_strata, rows)
        self._mean = terms.new_zeros(self.num_strata, rows)
        self._spread = terms.new_zeros(self.num_strata, rows)

    def _add_moments(self, terms: Tensor, counted: Tensor, stratum: Tensor | None) -> None:
        """Merge moments by Chan's update, both sides in units of exp(shift)."""
        shift = torch.maximum(self._shift, terms.amax(0))
        safe = torch.where(shift == -math.inf, 0.0, shift)
        rescale = (self._shift - safe).exp()  # 0 before the first finite term
        self._shift = shift
        mean, spread = self._mean * rescale, self._spread * rescale.square()
        values = (terms - safe).exp()  # (k, N), zero where not counted
        count, new_mean, new_spread = self._chunk_moments(values, counted, stratum)
        total = self._count + count
        share = count / total.clamp(min=1)
        delta = new_mean - mean
        self._spread = spread + new_spread + delta.square() * self._count * share
        self._mean = mean + delta * share
        self._count = total

    def _chunk_moments(
        self, values: Tensor, counted: Tensor, stratum: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and sum of squared deviations of a chunk in each stratum, (C, N)."""
        if stratum is None:
            count = counted.sum(0, keepdim=True)
            mean = values.sum(0, keepdim=True) / count.clamp(min=1)
            return count, mean, ((values - mean) * counted).square().sum(0, keepdim=True)
        index = stratum.expand_as(values).long()
        zeros = torch.zeros_like(self._mean)
        count = zeros.scatter_add(0, index, counted)
        mean = zeros.scatter_add(0, index, values) / count.clamp(min=1)
        deviation = (values - mean.gather(0, index)) * counted
        return count, mean, zeros.scatter_add(0, index, deviation.square())

    def _add_tail(self, terms: Tensor) -> None:
        """Keep the largest terms; small chunks wait, so that a reduction pays off."""
        size = tail_size(self.num_draws) + 1
        kept = terms.T  # (N, k)
        if kept.shape[1] > size:
            kept = kept.topk(size, sorted=False).values
        self._tail.append(kept)
        if sum(part.shape[1] for part in self._tail) > 3 * size:
            self._reduce_tail(size)

    def _reduce_tail(self, size: int) -> None:
        kept = torch.cat(self._tail, 1)
        self._tail = [kept.topk(min(size, kept.shape[1])).values]  # (N, T + 1), descending


def _epsilon(values: Tensor) -> float:
    return torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0


def _tail_shape(top: Tensor, count: Tensor, eps: float) -> Tensor:
    """Pareto shape (N,) from the largest log weights (N, T + 1), descending, of `count` draws.

    Draws at the threshold do not belong to the tail, so ties make it shorter: rows are
    fitted in groups of equal tail length (one group, as a rule).
    """
    shifted = top - top[:, :1]  # (N, T + 1); NaN where no weight is finite
    size = torch.minimum((count / 5), 3 * count.double().sqrt()).ceil().long()
    index = size.clamp(max=top.shape[1] - 1)
    threshold = shifted.gather(1, index[:, None])
    # Weights below the smallest normal number are zero: as in arviz they form no tail.
    threshold = threshold.clamp(min=math.log(torch.finfo(top.dtype).tiny))
    length = (shifted > threshold).sum(1).where(~threshold.isnan().squeeze(1), 0)
    k = torch.full_like(top[:, 0], math.nan)
    for n in length.unique().tolist():
        rows = (length == n).nonzero().squeeze(1)
        if n >= _MIN_TAIL:
            # exp(t) expm1(x - t) keeps the digits that exp(x) - exp(t) cancels
            excess = (shifted[rows, :n] - threshold[rows]).expm1() * threshold[rows].exp()
            k[rows] = _fit(excess.flip(1))
    # Weights equal to round-off have no tail at all; the scale of the round-off is |log w|. But
    # what differs by more than a hundredth of a nat is not equal, however large it is.
    slack = (eps**0.75 * top[:, 0].abs()).clamp(eps**0.75, 0.01)
    constant = (size >= _MIN_TAIL) & (-threshold.squeeze(1) <= slack)
    return k.masked_fill(constant, -math.inf)


def _fit(excess: Tensor) -> Tensor:
    """Zhang and Stephens' estimate of k (N,), shrunk by the PSIS prior, excesses ascending."""
    n = excess.shape[1]
    num_candidates = 30 + int(n**0.5)
    grid = torch.arange(1, num_candidates + 1, dtype=excess.dtype, device=excess.device)
    grid = (1 - (num_candidates / (grid - 0.5)).sqrt()) / 3  # (m,)
    block = max(1, _BLOCK // (n * num_candidates))
    return torch.cat([_fit_block(part, grid) for part in excess.split(block)])


def _fit_block(excess: Tensor, grid: Tensor) -> Tensor:
    n = excess.shape[1]
    quartile = excess[:, int(n / 4 + 0.5) - 1, None]
    b = grid / quartile + 1 / excess[:, -1:]  # (N, m)
    k = (-b[:, :, None] * excess[:, None]).log1p_().mean(-1)
    posterior = (n * ((-b / k).log() - k - 1)).softmax(-1)
    posterior = posterior.where(posterior >= 10 * torch.finfo(excess.dtype).eps, 0.0)
    b = (b * posterior).sum(-1, keepdim=True) / posterior.sum(-1, keepdim=True)
    k = (-b * excess).log1p().mean(-1)
    return (n * k + 5) / (n + 10)  # the prior: ten draws' worth of k = 1/2
