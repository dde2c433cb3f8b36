r"""The bound of MMVAE+, whose cross-reconstructions take private codes from auxiliary priors.

For each modality m of a row the shared code is drawn from its expert, its private code from its own
posterior, and the private codes of the others from auxiliary priors ``r_n``. Maximised is

    (1/|O|) sum_{m in O} E log (1/K) sum_k exp{ l_m(z, w_m) + sum_{n in O, n != m} l_n(z, w~_n)
        + beta [ log p(z) + log p(w_m) - log q(z | x_O) - log q(w_m | x_m) ] },

    z ~ q(z | x_m),  w_m ~ q(w_m | x_m),  w~_n ~ r_n,  l_n(z, w) = log p(x_n | z, w),

with ``q(z | x_O)`` the mixture of the experts. Were w~_n taken from q(w_n | x_n), the private code
could carry all that is needed, and z nothing. For ``r_n = p(w_n)`` and beta = 1 it is a bound on
log p(x_O); for other r_n it is one for codes w~_n whose prior is r_n, hence not a likelihood.

MMVAE+: Enhancing the Generative Quality of Multimodal VAEs without Compromises
(Palumbo et al., 2023), https://openreview.net/forum?id=sdQGxouELX, equation 4
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from mmzoo import combine
from mmzoo.batch import Batch
from mmzoo.inference.draws import _Fix
from mmzoo.inference.objective import Objective, own_networks
from mmzoo.vae import Experts, MultimodalVAE

__all__ = ["CrossModalELBO"]


@runtime_checkable
class _Auxiliary(Protocol):
    def auxiliary(self, name: str) -> TorchDistribution:
        """``r_n``, batch ``()``, event ``(P,)``."""


class CrossModalELBO(Objective):
    """Importance-weighted bound within each modality's expert, with auxiliary private codes.

    Its gradient is the total derivative, unbiased for every K.

    Args:
        num_samples: K, draws from each expert.
        beta: Weight of the log ratios of the latents.
        cross: Private codes of the other modalities: ``"auxiliary"``, or their ``"prior"``.

    Raises:
        ValueError: For an unknown option, or a model without auxiliary priors.

    Example:
        >>> from mmzoo import Modality
        >>> from mmzoo.models import MMVAEPlus
        >>> vae = MMVAEPlus([Modality("a", (3,)), Modality("b", (2,))], latent_dim=2)
        >>> x = {"a": torch.randn(8, 3), "b": torch.randn(8, 2)}
        >>> CrossModalELBO(num_samples=5).row_bounds(vae.model, vae.guide, x).shape
        torch.Size([8])
    """

    def __init__(
        self, num_samples: int = 10, *, beta: float = 1.0, cross: str = "auxiliary"
    ) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"CrossModalELBO: expected num_samples >= 1, found {num_samples}")
        if not beta >= 0:
            raise ValueError(f"CrossModalELBO: expected beta >= 0, found {beta}")
        if cross not in ("auxiliary", "prior"):
            raise ValueError(
                f"CrossModalELBO: expected cross one of auxiliary, prior, found {cross!r}"
            )
        self.num_samples = num_samples
        self.beta = beta
        self.cross = cross

    def differentiable_loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Minus the bound of a batch, summed over rows."""
        return -self.row_bounds(model, guide, x, observed).sum()

    def row_bounds(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """One estimate of the bound for each row, ``(N,)``; zero for a row without modalities."""
        vae = self._owner(model, guide)
        vae._register("guide", vae, skip="generative.")  # this guide is not called
        batch = vae.check(x, observed)
        experts, present = vae._encode(batch), vae._full_mask(batch)  # (N, M)
        valid = present.transpose(-1, -2)  # (M, N)
        values, log_ratio = self._draw(vae, batch, experts, present)
        scored = present & valid.unsqueeze(-1)  # (M, N, M)
        trace = self._score(model, batch.seen_through(scored, vae.modalities), values)
        log_ratio["z"] = log_ratio["z"] - trace.nodes["z"]["unscaled_log_prob"]
        names = [name for name in vae.modalities if name in trace.nodes]
        log_p = {name: trace.nodes[name]["unscaled_log_prob"] for name in names}
        log_w = sum(log_p.values()) - self.beta * sum(log_ratio.values())  # (K, M, N)
        self.terms = self._terms(vae, log_p, log_ratio, present)
        bounds = log_w.logsumexp(0) - torch.tensor(float(self.num_samples)).log()
        share = combine.mixture_weights(present).to(bounds).exp().transpose(-1, -2)
        return torch.where(valid, share * bounds, 0.0).sum(0)

    # Private ------------------------------------------------------------------------------------

    def _owner(self, model: Callable[..., Any], guide: Callable[..., Any]) -> MultimodalVAE:
        vae = own_networks("CrossModalELBO", model, guide, MultimodalVAE)
        if self.cross == "auxiliary" and not isinstance(vae, _Auxiliary):
            raise ValueError(
                f"CrossModalELBO: expected a model with auxiliary priors, found {vae.title}; use "
                "cross='prior'"
            )
        return vae

    def _draw(
        self, vae: MultimodalVAE, batch: Batch, experts: Experts, present: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Latents ``(K, M, N, *)`` by site, expert by expert, and their ``log q`` less private p.

        The log ratio of z still lacks ``log p(z)``; that of a private code counts where it is the
        expert's own.
        """
        eye = torch.eye(present.shape[-1], dtype=torch.bool, device=present.device)
        z = vae.combine_component(experts, eye.unsqueeze(1) & present).rsample((self.num_samples,))
        values = {"z": z}
        log_ratio = {"z": vae.posterior(batch, experts=experts).log_prob(z)}
        source: Any = vae  # _owner has seen that it has auxiliary priors
        own_rows = dict(zip(vae.modalities, eye, strict=True))
        for name, q in vae._private(batch, experts).items():
            own = own_rows[name].unsqueeze(-1)  # (M, 1)
            prior = vae.private_prior(name)
            other = source.auxiliary(name) if self.cross == "auxiliary" else prior
            drawn = vae.diagonal(
                torch.where(own.unsqueeze(-1), q.base_dist.loc, other.base_dist.loc),
                torch.where(own.unsqueeze(-1), q.base_dist.scale, other.base_dist.scale),
            )
            w = drawn.rsample((self.num_samples,))  # (K, M, N, P)
            values[f"w_{name}"] = w
            log_ratio[f"w_{name}"] = torch.where(own, q.log_prob(w) - prior.log_prob(w), 0.0)
        return values, log_ratio

    def _score(self, model: Callable[..., Any], rows: Batch, values: Mapping[str, Tensor]) -> Trace:
        """The model at the drawn latents; likelihoods of what each expert explains."""
        num_experts = values["z"].shape[1]
        with (
            _Fix(values),
            pyro.plate("particles", self.num_samples, dim=-3),
            pyro.plate("subsets", num_experts, dim=-2),
        ):
            trace = poutine.trace(model).get_trace(rows)
        trace.compute_log_prob()
        return trace

    def _terms(
        self,
        vae: MultimodalVAE,
        log_p: Mapping[str, Tensor],
        log_ratio: Mapping[str, Tensor],
        present: Tensor,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums over draws, experts and rows, and how many there are of each."""
        valid = present.transpose(-1, -2)
        columns = dict(zip(vae.modalities, present.unbind(-1), strict=True))
        counts = {name: (valid & column).sum() for name, column in columns.items()}
        counts |= {"z": valid.sum(), **{f"w_{name}": c.sum() for name, c in columns.items()}}
        return {
            name: (torch.where(valid, value.detach(), 0.0).sum(), self.num_samples * counts[name])
            for name, value in {**log_p, **log_ratio}.items()
        }
