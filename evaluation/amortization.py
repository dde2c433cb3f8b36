r"""Where a bound is lost: to the family of posteriors, or to an encoder that serves all rows.

For each row, with F the factorised Gaussians (Laplace densities, for a model of that family),

    log p(x)  -  ELBO(q)  =  [log p(x) - ELBO(q*)]  +  [ELBO(q*) - ELBO(q)],
    inference gap             approximation gap         amortisation gap

    ELBO(q) = E_q[log p(x, z) - log q(z)],    q* = argmax over F of ELBO,

where q is what the guide gives, from an encoder, and q* is found for that row alone by Adam,
started from the moments of q. A guide outside of F, as a mixture, may do better than every member
of F: its amortisation gap is then negative.

log p(x) is estimated by importance sampling with a third of the draws each from q, from q*, and
from q* at twice its scale, weighted with the density of all three: q* is too narrow where the
posterior is correlated.

Inference Suboptimality in Variational Autoencoders (Cremer, Li & Duvenaud, 2018),
https://arxiv.org/abs/1801.03558
Sticking the Landing (Roeder, Wu & Duvenaud, 2017), https://arxiv.org/abs/1703.09194
Optimally Combining Sampling Techniques for Monte Carlo Rendering (Veach & Guibas, 1995),
https://doi.org/10.1145/218380.218498
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor

from mmzoo.evaluation.pair import Pair, check_continuous, device_of, quiet, row_masks
from mmzoo.evaluation.pareto import WeightSummary
from mmzoo.evaluation.scored import Shown, find_subsets, flatten, unflatten

__all__ = ["amortization_gap"]

_ROWS = 64
# Draws that are decoded at a time, of all rows of a block together.
_CHUNK = 1 << 13
# Batches of the gradient that tells how far from its maximum the search ended.
_GRADIENTS = 32
_MIN_SCALE = 1e-4
_KINDS = (
    "elbo",
    "elbo_error",
    "best_elbo",
    "best_elbo_error",
    "log_prob",
    "log_prob_error",
    "ess",
    "pareto_k",
    "remaining",
)


def amortization_gap(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    given: str | Sequence[str] | None = None,
    num_steps: int = 300,
    num_samples: int = 1000,
    num_particles: int = 8,
    learning_rate: float = 0.05,
    guide: Callable[..., Any] | None = None,
    tolerance: float = 0.05,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Amortisation and approximation gap of every row.

    Args:
        pair: A model of the zoo or a pair of your own, with latents on the whole real line.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        given: The modalities that are scored and seen, of which each row uses what it has;
            default: all.
        num_steps: Steps of Adam for each row, its rate falling to zero along a cosine.
        num_samples: Fresh draws of each bound, and of log p(x).
        num_particles: Draws of each gradient, half of them mirrored.
        learning_rate: Of Adam, in standard deviations of the guide.
        guide: A Pyro guide over the same sites, in place of the pair's own.
        tolerance: Nats that may remain for a search to count as ``converged``.
        seed: Of all draws.
        on_progress: Called with the rows done and the rows in all.

    Returns:
        Over ``row``, in nats: ``elbo``, ``best_elbo``, ``log_prob``, ``amortization_gap``,
        ``approximation_gap`` and ``inference_gap``, each with its Monte Carlo standard error
        ``<name>_error``; ``ess`` and ``pareto_k`` of log p(x); ``remaining``, what the search left
        undone according to the slope at its end (half the squared slope over the curvature), and
        ``converged``. Rows that have nothing of ``given`` are NaN.

    Raises:
        ValueError: For unknown names, sizes below one, a subset that the pair does not answer for,
            or a latent with another support.

    Example:
        >>> from mmzoo.exact import LinearGaussianWorld
        >>> from mmzoo.models import LinearVAE
        >>> world = LinearGaussianWorld.random({"a": 3, "b": 2}, latent_dim=2, seed=0)
        >>> vae = LinearVAE(world.modalities(), 2).double()
        >>> gap = amortization_gap(vae, world.sample(4, seed=1), num_steps=20, num_samples=90)
        >>> bool((abs(gap["elbo"] - gap["log_prob"]) < 1e-6 + 5 * gap["log_prob_error"]).all())
        True
    """
    where = "amortization_gap"
    if num_steps < 1 or num_samples < 3 or num_particles < 2:
        raise ValueError(
            f"{where}: expected num_steps >= 1, num_samples >= 3 and num_particles >= 2, found "
            f"{num_steps}, {num_samples} and {num_particles}"
        )
    check_continuous(pair, where)
    names = list(pair.modalities) if given is None else given
    title, subset = next(iter(find_subsets(pair, [names], where).items()))
    values, masks, num_rows = row_masks(pair, x, observed)
    scored = [masks[name] for name in subset if name not in pair.always_given]
    kept = torch.stack(scored).any(0).nonzero().squeeze(-1).cpu()
    found = {kind: np.full(num_rows, np.nan) for kind in _KINDS}
    search = _Search(num_steps, num_samples, num_particles, learning_rate)
    with quiet(pair, seed):
        for start in range(0, len(kept), _ROWS):
            index = kept[start : start + _ROWS]
            shown = _shown(pair, values, masks, subset, index, guide)
            for kind, value in search.run(shown, _family(pair)).items():
                found[kind][index.numpy()] = value.double().cpu().numpy()
            if on_progress:
                on_progress(start + len(index), len(kept))
    settings = {
        "title": pair.title,
        "given": title,
        "num_steps": num_steps,
        "num_samples": num_samples,
        "num_particles": num_particles,
        "learning_rate": learning_rate,
        "family": _family(pair).__name__,
        "tolerance": tolerance,
        "seed": seed,
        "units": "nats",
    }
    return _label(found, settings)


def _shown(
    pair: Pair,
    values: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    subset: Sequence[str],
    index: Tensor,
    guide: Callable[..., Any] | None,
) -> Shown:
    device = device_of(pair)
    x = {name: v[index.to(v.device)].to(device) for name, v in values.items()}
    seen = {name: masks[name][index.to(masks[name].device)].to(device) for name in subset}
    return Shown(pair, x, seen, guide)


def _family(pair: Pair) -> type[dist.Normal] | type[dist.Laplace]:
    return dist.Laplace if getattr(pair, "family", "normal") == "laplace" else dist.Normal


def _label(found: dict[str, np.ndarray], settings: dict[str, Any]) -> xr.Dataset:
    for gap, more, less in (
        ("amortization_gap", "best_elbo", "elbo"),
        ("approximation_gap", "log_prob", "best_elbo"),
        ("inference_gap", "log_prob", "elbo"),
    ):
        found[gap] = found[more] - found[less]
        found[f"{gap}_error"] = np.hypot(found[f"{more}_error"], found[f"{less}_error"])
    result = xr.Dataset(
        {name: ("row", value) for name, value in found.items()},
        coords={"row": np.arange(len(found["elbo"]))},
        attrs=settings,
    )
    result["converged"] = result["remaining"] < settings["tolerance"]
    return result


class _Factorised:
    """A factorised density with these means and standard deviations, ``(N, T)``."""

    def __init__(
        self, family: type[dist.Normal] | type[dist.Laplace], loc: Tensor, deviation: Tensor
    ) -> None:
        self.family = family
        unit = math.sqrt(0.5) if family is dist.Laplace else 1.0
        self.base = family(loc, unit * deviation, validate_args=False)

    def rsample(self, num: int) -> Tensor:
        return self.base.rsample((num,))  # (K, N, T)

    def mirrored(self, num: int) -> Tensor:
        """Draws of which the second half are the first half's reflections."""
        half = self.base.rsample(((num + 1) // 2,))
        return torch.cat([half, 2 * self.base.loc - half])[:num]

    def log_prob(self, z: Tensor) -> Tensor:
        return self.base.log_prob(z).sum(-1)

    def stopped(self) -> _Factorised:
        return _Factorised(self.family, self.base.loc.detach(), self.base.stddev.detach())

    def widened(self, factor: float) -> _Factorised:
        return _Factorised(self.family, self.base.loc, factor * self.base.stddev)


class _Search(NamedTuple):
    """The bounds of a block of rows, and the search for its best posteriors."""

    num_steps: int
    num_samples: int
    num_particles: int
    learning_rate: float

    def run(
        self, shown: Shown, family: type[dist.Normal] | type[dist.Laplace]
    ) -> dict[str, Tensor]:
        like = shown.draw(1)

        def log_joint(z: Tensor) -> Tensor:
            return shown.log_joint(unflatten(z, like))

        def log_guide(z: Tensor) -> Tensor:
            return shown.log_guide(unflatten(z, like))

        def of_guide(num: int) -> Tensor:
            return flatten(shown.draw(num))

        num_rows = shown.num_rows
        z = torch.cat([of_guide(num) for num in self._chunks(num_rows)])
        start = _Factorised(family, z.mean(0), z.std(0).clamp(min=_MIN_SCALE))
        _check_real(log_joint, start)
        elbo = self._bound(z, log_joint, log_guide)
        best = self._climb(start, log_joint)
        z = torch.cat([best.rsample(num) for num in self._chunks(num_rows)])
        best_elbo = self._bound(z, log_joint, best.log_prob)
        summary = self._evidence(log_joint, log_guide, of_guide, best, num_rows)
        return {
            "elbo": elbo[0],
            "elbo_error": elbo[1],
            "best_elbo": best_elbo[0],
            "best_elbo_error": best_elbo[1],
            "log_prob": summary["log_prob"],
            "log_prob_error": summary["mcse"],
            "ess": summary["ess"],
            "pareto_k": summary["pareto_k"],
            "remaining": self._remaining(best, log_joint),
        }

    def _chunks(self, num_rows: int, total: int | None = None) -> list[int]:
        total = self.num_samples if total is None else total
        size = max(1, _CHUNK // num_rows)
        return [min(size, total - start) for start in range(0, total, size)]

    def _bound(
        self, z: Tensor, log_joint: Callable[[Tensor], Tensor], log_q: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The ELBO and its standard error, ``(N,)``."""
        sizes = self._chunks(z.shape[1])
        found = torch.cat([(log_joint(part) - log_q(part)).double() for part in z.split(sizes)])
        return found.mean(0), found.std(0) / math.sqrt(len(found))

    def _slopes(
        self, at: tuple[Tensor, Tensor], start: _Factorised, log_joint: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """Gradient of the ELBO in ``(loc - loc_0) / sd_0`` and ``log(sd / sd_0)``."""
        with torch.enable_grad():
            shift, stretch = (each.detach().requires_grad_() for each in at)
            unit = start.base.stddev
            q = _Factorised(start.family, start.base.loc + unit * shift, unit * stretch.exp())
            z = q.mirrored(self.num_particles)
            # The score of q has mean zero; without it the gradient has no noise at the posterior.
            elbo = (log_joint(z) - q.stopped().log_prob(z)).mean(0)
            return torch.autograd.grad(elbo.sum(), (shift, stretch))

    def _climb(self, start: _Factorised, log_joint: Callable[[Tensor], Tensor]) -> _Factorised:
        """The best member of the family for each row; Adam keeps the rows apart."""
        at = tuple(torch.zeros_like(start.base.loc, requires_grad=True) for _ in range(2))
        adam = torch.optim.Adam(at, lr=self.learning_rate)
        for step in range(self.num_steps):
            rate = 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
            adam.param_groups[0]["lr"] = self.learning_rate * rate
            for each, slope in zip(at, self._slopes((at[0], at[1]), start, log_joint), strict=True):
                each.grad = -slope
            adam.step()
        shift, stretch = (each.detach() for each in at)
        unit = start.base.stddev
        return _Factorised(start.family, start.base.loc + unit * shift, unit * stretch.exp())

    def _remaining(self, best: _Factorised, log_joint: Callable[[Tensor], Tensor]) -> Tensor:
        """What a Newton step would still gain, ``(N,)``, the noise of the slope taken off.

        In units of its own scale the curvature of the ELBO at its maximum is 1 in each mean, and 2
        in each logarithm of a scale (exactly so for a Gaussian posterior).
        """
        zero = torch.zeros_like(best.base.loc)
        batches = (self._slopes((zero, zero), best, log_joint) for _ in range(_GRADIENTS))
        gain = zero[:, 0]
        for slopes, curvature in zip(zip(*batches, strict=True), (1.0, 2.0), strict=True):
            slope = torch.stack(slopes)  # (batch, N, T)
            square = slope.mean(0).square() - slope.var(0) / _GRADIENTS
            gain = gain + square.sum(-1) / (2 * curvature)
        return gain.clamp(min=0)

    def _evidence(
        self,
        log_joint: Callable[[Tensor], Tensor],
        log_guide: Callable[[Tensor], Tensor],
        of_guide: Callable[[int], Tensor],
        best: _Factorised,
        num_rows: int,
    ) -> dict[str, Tensor]:
        """Estimates log p(x) with draws of the guide, of the best posterior and of a wider one."""
        wide = best.widened(2.0)
        share = self.num_samples // 3
        shares = (share, share, self.num_samples - 2 * share)
        logs = [math.log(each / self.num_samples) for each in shares]
        summary = WeightSummary(self.num_samples, num_strata=3)
        for stratum, draw in enumerate((of_guide, best.rsample, wide.rsample)):
            for num in self._chunks(num_rows, shares[stratum]):
                z = draw(num)
                each = (log_guide(z), best.log_prob(z), wide.log_prob(z))
                log_q = torch.stack([q + w for q, w in zip(each, logs, strict=True)]).logsumexp(0)
                log_w = log_joint(z) - log_q
                summary.update(log_w, stratum=torch.full_like(log_w, stratum))
        return summary.result()


def _check_real(log_joint: Callable[[Tensor], Tensor], start: _Factorised) -> None:
    far = start.base.loc + 4 * start.base.stddev * torch.tensor([[[-1.0]], [[1.0]]]).to(
        start.base.loc
    )
    if not bool(log_joint(far).isfinite().all()):
        raise ValueError(
            "amortization_gap: expected latents on the whole real line, found densities that are "
            "not finite four standard deviations from the guide's mean; write a positive latent as "
            "the exponential of a real one"
        )
