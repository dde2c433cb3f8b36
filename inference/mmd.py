r"""Deterministic codes that are held to the prior by the maximum mean discrepancy.

With a kernel k, the squared discrepancy of two distributions is

    MMD^2(P, Q) = E k(x, x') - 2 E k(x, y) + E k(y, y'),    x, x' ~ P,  y, y' ~ Q,

here with ``k(x, y) = exp(-|x - y|^2 / (2 h^2))`` and without the pairs of a draw with itself, which
makes estimates unbiased. Against N(0, I) two of the expectations are known in closed form.

The objective of MFM maximises, over a batch of N rows whose codes are z and w_m,

    sum_n { sum_{m in O} lambda_m log p(x_m | z, w_m)
            + (alpha / 2) sum_{S, O without S} sum_{m in O} log p(x_m | z', w'_m) }
    - lambda N sum_j MMD^2(j, N(0, I))

with j running over z and every w_m, each over the rows that have it, and z', w' the codes that are
found from a random part S of what the row has, or from the rest. It is no bound on a likelihood.

A Kernel Two-Sample Test (Gretton et al., 2012), https://jmlr.org/papers/v13/gretton12a.html
Learning Factorized Multimodal Representations (Tsai et al., 2019),
https://arxiv.org/abs/1806.06176
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from mmzoo.batch import modality_names
from mmzoo.inference.nexus import drop_messages
from mmzoo.inference.objective import Objective, check_weights, own_networks
from mmzoo.vae import MultimodalVAE

__all__ = ["MMDObjective", "mmd", "mmd_to_normal"]


def mmd(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """Unbiased estimate of the squared discrepancy of two samples; it may be below zero.

    Args:
        x: Draws of one distribution, ``(n, D)``, at least two.
        y: Draws of the other, ``(m, D)``, at least two.
        bandwidth: h.
    """
    return _within(x, bandwidth) - 2 * _kernel(x, y, bandwidth).mean() + _within(y, bandwidth)


def mmd_to_normal(x: Tensor, bandwidth: float) -> Tensor:
    r"""The same against N(0, I), whose expectations are exact, with $D$ the dimension of x.

    $E k(x, y) = (h^2/(h^2+1))^{D/2} \exp(-|x|^2 / (2 (h^2 + 1)))$ for $y \sim N(0, I)$, and
    $E k(y, y') = (h^2/(h^2+2))^{D/2}$.

    Args:
        x: Draws, ``(n, D)``, at least two.
        bandwidth: h.
    """
    square, half = bandwidth**2, x.shape[-1] / 2
    across = (square / (square + 1)) ** half * (-x.square().sum(-1) / (2 * square + 2)).exp()
    return _within(x, bandwidth) - 2 * across.mean() + (square / (square + 2)) ** half


def _kernel(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    distance = (x.unsqueeze(1) - y).square().sum(-1)
    return (-distance / (2 * bandwidth**2)).exp()


def _within(x: Tensor, bandwidth: float) -> Tensor:
    """Mean of the kernel over pairs of different draws."""
    num = len(x)
    if num < 2:
        raise ValueError(f"mmd: expected at least two draws of each distribution, found {num}")
    # The kernel of a draw with itself is one.
    return (_kernel(x, x, bandwidth).sum() - num) / (num * (num - 1))


class MMDObjective(Objective):
    """Reconstructions from all and from a part, and the discrepancy of the codes from N(0, I).

    Args:
        weight: lambda of the discrepancy, which counts once for each row of the batch.
        surrogate_weight: alpha.
        bandwidth: h of the kernel; default: ``D / sqrt(2)``, as in the authors' code.
        modality_weights: lambda_m by name; the others are one.
        sampled: Compare with draws of N(0, I), as published, in place of its expectations.

    Example:
        >>> from mmzoo import Modality
        >>> from mmzoo.models import MFM
        >>> vae = MFM([Modality("a", (3,)), Modality("b", (2,))], latent_dim=2)
        >>> x = {"a": torch.randn(8, 3), "b": torch.randn(8, 2)}
        >>> MMDObjective(weight=10.0).loss(vae.model, vae.guide, x) > 0
        True
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        surrogate_weight: float = 1.0,
        bandwidth: float | None = None,
        modality_weights: Mapping[str, float] | None = None,
        sampled: bool = False,
    ) -> None:
        super().__init__()
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(f"MMDObjective: expected bandwidth > 0, found {bandwidth}")
        check_weights(
            "MMDObjective",
            weight=weight,
            surrogate_weight=surrogate_weight,
            modality_weights=modality_weights or {},
        )
        self.weight = weight
        self.surrogate_weight = surrogate_weight
        self.bandwidth = bandwidth
        self.modality_weights = dict(modality_weights or {})
        self.sampled = sampled

    def differentiable_loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Minus the objective of a batch, summed over rows."""
        vae = own_networks("MMDObjective", model, guide, MultimodalVAE)
        modality_names(vae.modalities, self.modality_weights, "MMDObjective modality_weights")
        batch = vae.check(x, observed)
        present = vae._full_mask(batch)  # (N, M)
        given, scored = present.unsqueeze(0), present.unsqueeze(0)
        if self.surrogate_weight:
            several = present.sum(-1, keepdim=True) > 1
            part = drop_messages(present, 1.0)
            given = torch.stack([present, part, present & ~part])  # (3, N, M)
            scored = torch.stack([present, present & several, present & several])
        experts = vae._encode(batch)

        def on_plate(fn: Callable[..., Any], mask: Tensor, **kwargs: Any) -> poutine.Trace:
            rows = batch.seen_through(mask, vae.modalities)
            with pyro.plate("subsets", len(mask), dim=-2):
                return poutine.trace(fn).get_trace(rows, **kwargs)

        codes = on_plate(guide, given, experts=experts)
        found = on_plate(poutine.replay(model, codes), scored)
        found.compute_log_prob()
        self.terms = {}
        loss = present.new_zeros((), dtype=experts.loc.dtype)
        for index, name in enumerate(vae.modalities):
            if name in found.nodes:
                log_p = found.nodes[name]["log_prob"]  # (3, N)
                loss = loss - self.modality_weights.get(name, 1.0) * log_p[0].sum()
                loss = loss - self.surrogate_weight / 2 * log_p[1:].sum()
                self.terms[name] = (log_p[0].detach().sum(), present[:, index].sum())
        distance = self._discrepancy(vae, codes, present)
        self.terms["mmd"] = (distance.detach() * len(present), torch.as_tensor(len(present)))
        return loss + self.weight * len(present) * distance

    def _discrepancy(self, vae: MultimodalVAE, codes: poutine.Trace, present: Tensor) -> Tensor:
        """The discrepancies of all codes, added up; a code that fewer than two rows have has 0."""
        total = vae.generative.prior_loc.new_zeros(())
        for site in vae.latent_sites:
            own = [index for index, name in enumerate(vae.modalities) if site == f"w_{name}"]
            has = present[:, own[0]] if own else present.any(-1)
            code = codes.nodes[site]["value"][0][has]
            if len(code) < 2:
                continue
            width = self.bandwidth or code.shape[-1] / 2**0.5
            if self.sampled:
                total = total + mmd(code, torch.randn_like(code), width)
            else:
                total = total + mmd_to_normal(code, width)
        return total
