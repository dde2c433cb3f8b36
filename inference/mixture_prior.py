r"""Unimodal bounds whose prior is the mixture of the modalities' own posteriors.

With ``q_m = q(z | x_m)`` and O the modalities that a row has, the objective maximised is

    sum_n sum_{m in O} { lambda_m E_{q_m} log p(x_m | z_m) - beta KL(q_m || h_n) }
    h_n = alpha p(z) + (1 - alpha) (1/|O|) sum_{j in O} q_j,

each divergence by one reparameterised draw of z_m, which also makes the reconstruction. The
published code replaces it by the bound that the convexity of the divergence gives, in closed form:

    KL(q_m || h_n) <= alpha KL(q_m || p(z)) + (1 - alpha) (1/|O|) sum_{j in O} KL(q_m || q_j).

At alpha = 1 both are the unimodal ELBOs. Below it h depends on the data: the objective is no bound
on the likelihood of a fixed generative model.

Unity by Diversity: Improved Representation Learning in Multimodal VAEs (Sutter et al., 2024),
https://arxiv.org/abs/2403.05300
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from mmzoo import combine
from mmzoo.batch import modality_names
from mmzoo.inference.objective import (
    Objective,
    Schedule,
    at_step,
    check_weights,
    own_networks,
    trace_terms,
)
from mmzoo.vae import MultimodalVAE

__all__ = ["MixturePriorELBO"]


class MixturePriorELBO(Objective):
    """Each modality's own bound, with the mixture of all posteriors in place of the prior.

    Args:
        beta: Weight of the divergence, a number or a function of the step.
        prior_weight: alpha, the weight of p(z) in the mixture, a number or a function of the step
            (the authors anneal it to zero, ``LinearWarmup(steps, 1.0, 0.0)``).
        modality_weights: lambda by name; the others are one.
        pairwise: The closed-form bound of the published code, for Gaussian posteriors.

    Example:
        >>> from mmzoo import Modality
        >>> from mmzoo.models import MMVM
        >>> vae = MMVM([Modality("a", (3,)), Modality("b", (2,))], latent_dim=2)
        >>> x = {"a": torch.randn(8, 3), "b": torch.randn(8, 2)}
        >>> MixturePriorELBO(prior_weight=0.1).loss(vae.model, vae.guide, x) > 0
        True
    """

    def __init__(
        self,
        *,
        beta: Schedule = 1.0,
        prior_weight: Schedule = 0.0,
        modality_weights: Mapping[str, float] | None = None,
        pairwise: bool = False,
    ) -> None:
        super().__init__()
        check_weights("MixturePriorELBO", modality_weights=modality_weights or {})
        self.beta = beta
        self.prior_weight = prior_weight
        self.modality_weights = dict(modality_weights or {})
        self.pairwise = pairwise
        self.step = 0

    def differentiable_loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Minus the objective of a batch, summed over rows; counts as a step of the schedules."""
        vae = own_networks("MixturePriorELBO", model, guide, MultimodalVAE)
        if self.pairwise and vae.family != "normal":
            raise ValueError(
                "MixturePriorELBO: expected Gaussian posteriors (family 'normal') for the pairwise "
                f"bound, found {vae.family!r}; use pairwise=False"
            )
        modality_names(vae.modalities, self.modality_weights, "MixturePriorELBO modality_weights")
        beta = at_step(self.beta, self.step, "MixturePriorELBO: expected beta")
        alpha = at_step(self.prior_weight, self.step, "MixturePriorELBO: expected prior_weight")
        if alpha > 1:
            raise ValueError(f"MixturePriorELBO: expected 0 <= prior_weight <= 1, found {alpha}")
        batch = vae.check(x, observed)
        vae._register("guide", vae, skip="generative.")  # for SVI, since the guide does not run
        q, mask = vae.unimodal(batch, experts=vae._encode(batch))  # (M, N)
        z = q.rsample()
        singles = torch.eye(len(mask), dtype=torch.bool, device=mask.device).unsqueeze(1)
        rows = batch.seen_through(singles & mask.unsqueeze(-1), vae.modalities)
        with pyro.plate("subsets", len(mask), dim=-2):
            trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(rows)
        trace.compute_log_prob()
        loss = z.new_zeros(())
        for name in trace.observation_nodes:
            if name in vae.modalities:
                weight = self.modality_weights.get(name, 1.0)
                loss = loss - weight * trace.nodes[name]["log_prob"].sum()
        if self.pairwise:
            loc, scale = q.base_dist.loc, q.base_dist.scale
            divergence = pairwise_divergence(loc, scale, mask, alpha, vae.prior())
        else:
            divergence = mixture_divergence(q, z, mask, alpha, vae.prior())
        self.terms = trace_terms(trace, poutine.Trace())
        self.terms["z"] = (divergence.detach().sum(), mask.sum())
        self.step += torch.is_grad_enabled()
        return loss + beta * divergence.sum()


def mixture_divergence(q: Any, z: Tensor, mask: Tensor, alpha: float, prior: Any) -> Tensor:
    """``log q_m(z_m) - log h(z_m)`` of one draw from each posterior, zero where it is missing.

    Args:
        q: The posteriors, batch ``(M, N)``.
        z: A draw from each, ``(M, N, D)``.
        mask: Which rows have them, ``(M, N)``.
        alpha: Weight of the prior in h.
        prior: ``p(z)``, batch ``()``.

    Returns:
        ``(M, N)``.
    """
    each = q.log_prob(z.unsqueeze(1))  # (M, M, N): draw, density
    own = each.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    share = combine.mixture_weights(mask.movedim(0, -1)).movedim(-1, 0).to(z)  # (M, N)
    log_h = (each + share).logsumexp(1)
    if alpha > 0:
        weight = z.new_tensor([alpha, 1 - alpha]).log()
        log_h = torch.logaddexp(weight[0] + prior.log_prob(z), weight[1] + log_h)
    return torch.where(mask, own - log_h, 0.0)


def pairwise_divergence(
    loc: Tensor, scale: Tensor, mask: Tensor, alpha: float, prior: Any
) -> Tensor:
    """``alpha KL(q_m || p) + (1 - alpha) mean_j KL(q_m || q_j)``, zero where q_m is missing.

    Args:
        loc: Means, ``(M, N, D)``.
        scale: Standard deviations, ``(M, N, D)``.
        mask: Which rows have them, ``(M, N)``.
        alpha: Weight of the prior.
        prior: ``p(z)``, independent Gaussians.

    Returns:
        ``(M, N)``.
    """
    pairs = combine.gaussian_kl(loc.unsqueeze(1), scale.unsqueeze(1), loc, scale)  # (M, M, N)
    share = combine.mixture_weights(mask.movedim(0, -1)).movedim(-1, 0).to(loc).exp()
    own = combine.gaussian_kl(loc, scale, prior.base_dist.loc, prior.base_dist.scale)
    return torch.where(mask, alpha * own + (1 - alpha) * (share * pairs).sum(1), 0.0)
