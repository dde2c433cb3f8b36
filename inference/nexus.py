r"""Two levels of codes, each trained by a bound of its own: the objective of Nexus.

A modality has its own code z_m with posterior ``q_m = q(z_m | x_m)``; the shared latent z sees the
codes through messages h_m, averaged over those that are kept. Maximised is, per row, with sg for a
stopped gradient and O for the modalities that the row has,

    sum_{m in O} [ lambda_m E_{q_m} log p(x_m | z_m) - beta_m KL(q_m || N(0, I)) ]
    + E_{q(z | h)} sum_{m in O} gamma_m log N(sg z_m; g_m(z), I) - beta KL(q(z | h) || p(z))
    h = mean_{m kept} h_m(sg mu_m)

While it trains, messages are dropped: with the probability ``dropout`` a row keeps a random part of
its messages (all sizes from one to all but one are equally likely), while all of its codes are
scored. Encoders and decoders learn from the first line alone. It is no bound on log p(x_O).

Leveraging hierarchy in multimodal generative models for effective cross-modality inference
(Vasco et al., 2022), https://www.sciencedirect.com/science/article/abs/pii/S0893608021004470
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from mmzoo import combine
from mmzoo.batch import Batch, modality_names
from mmzoo.inference.objective import Objective, check_weights, own_networks, trace_terms
from mmzoo.vae import MultimodalVAE

__all__ = ["NexusELBO", "drop_messages"]


def drop_messages(mask: Tensor, rate: float) -> Tensor:
    """Forced perceptual dropout: some rows keep a random part of what they have.

    Args:
        mask: What each row has, ``(N, M)``.
        rate: Probability that a row with at least two is chosen; it loses 1 to all but one.

    Returns:
        What is kept, ``(N, M)``; never nothing of a row that has something.
    """
    order = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, torch.inf)
    rank = order.argsort(-1).argsort(-1)
    count = mask.sum(-1, keepdim=True)
    chance = torch.rand((2, *count.shape), device=mask.device)
    kept = 1 + (chance[0] * (count - 1)).long()  # 1 .. count - 1
    return mask & ((rank < kept) | (chance[1] >= rate) | (count < 2))


class NexusELBO(Objective):
    """The bounds of the modalities, and that of the latent above them.

    Args:
        dropout: Probability that a row loses messages, in training mode only.
        beta: Weight of the divergence of z.
        modality_weights: lambda by name; the others are one.
        modality_betas: beta_m by name; the others are one.
        code_weights: gamma by name; the others are one.
        sampled_messages: Messages ``h_m(sg z_m)`` of the drawn codes, as in the authors' code.

    Example:
        >>> from mmzoo import Modality
        >>> from mmzoo.models import Nexus
        >>> vae = Nexus([Modality("a", (3,)), Modality("b", (2,))], latent_dim=2)
        >>> x = {"a": torch.randn(8, 3), "b": torch.randn(8, 2)}
        >>> elbo = NexusELBO(code_weights={"b": 50.0})
        >>> elbo.loss(vae.model, vae.guide, x) > 0
        True
    """

    def __init__(
        self,
        *,
        dropout: float = 0.1,
        beta: float = 1.0,
        modality_weights: Mapping[str, float] | None = None,
        modality_betas: Mapping[str, float] | None = None,
        code_weights: Mapping[str, float] | None = None,
        sampled_messages: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"NexusELBO: expected 0 <= dropout <= 1, found {dropout}")
        check_weights(
            "NexusELBO",
            beta=beta,
            modality_weights=modality_weights or {},
            modality_betas=modality_betas or {},
            code_weights=code_weights or {},
        )
        self.dropout = dropout
        self.beta = beta
        self.modality_weights = dict(modality_weights or {})
        self.modality_betas = dict(modality_betas or {})
        self.code_weights = dict(code_weights or {})
        self.sampled_messages = sampled_messages

    def differentiable_loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Minus the objective of a batch, summed over rows."""
        found = own_networks("NexusELBO", model, guide, MultimodalVAE)
        if not hasattr(found, "nexus"):
            raise ValueError(
                f"NexusELBO: expected a model with a nexus, found {found.title}; use its own "
                "objective"
            )
        return self._loss(found, model, found.check(x, observed))

    def _loss(self, vae: Any, model: Callable[..., Any], batch: Batch) -> Tensor:
        vae._register("guide", vae, skip="generative.")  # for SVI, since the guide does not run
        mask = vae._full_mask(batch)  # (N, M)
        loc, scale = vae._encode(batch)
        codes = vae.diagonal(loc, scale).rsample()  # (N, M, D)
        kept = drop_messages(mask, self.dropout) if vae.training else mask
        source = codes if self.sampled_messages else loc
        q = vae.nexus(source.detach(), kept)
        z = q.rsample()  # (N, D)

        sites = vae.split(torch.cat([z, codes.flatten(-2)], -1))
        trace = poutine.trace(poutine.condition(model, sites)).get_trace(batch)
        trace.compute_log_prob()
        blank = torch.zeros_like(z), torch.ones_like(z)
        above = combine.gaussian_kl(q.base_dist.loc, q.base_dist.scale, *blank)  # (N,)
        own = combine.gaussian_kl(loc, scale, *(each.unsqueeze(-2) for each in blank))  # (N, M)
        lam, betas, gamma = (self._weights(vae, kind) for kind in _KINDS)
        loss = self.beta * above.sum()
        self.terms = trace_terms(trace, poutine.Trace())
        self.terms["z"] = (above.detach().sum(), mask.any(-1).sum())
        for index, name in enumerate(vae.modalities):
            there = mask[:, index]
            again = vae.code(name, z).log_prob(codes[:, index].detach())
            divergence = torch.where(there, own[:, index], 0.0)
            loss = loss + betas[name] * divergence.sum()
            loss = loss - gamma[name] * torch.where(there, again, 0.0).sum()
            if name in trace.nodes:
                loss = loss - lam[name] * trace.nodes[name]["log_prob"].sum()
            self.terms[f"z_{name}"] = (divergence.detach().sum(), there.sum())
        return loss

    def _weights(self, vae: Any, kind: str) -> dict[str, float]:
        found: dict[str, float] = getattr(self, kind)
        modality_names(vae.modalities, found, f"NexusELBO {kind}")
        return {name: found.get(name, 1.0) for name in vae.modalities}


_KINDS = ("modality_weights", "modality_betas", "code_weights")
