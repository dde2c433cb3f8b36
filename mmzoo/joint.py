"""What models with a joint network share: one encoder for complete rows beside unimodal ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from mmzoo import combine
from mmzoo.batch import Batch
from mmzoo.networks import feature_size
from mmzoo.vae import Experts, MultimodalVAE, loc_and_scale

__all__ = ["JointNetworkVAE"]


class JointNetworkVAE(MultimodalVAE):
    """Base of models with a network ``q(z | x_1, ..., x_M)`` and unimodal posteriors ``q_m``.

    The unimodal posteriors are prior times expert, ``q_m prop. to p(z) N(mu_m, sigma_m^2)``, hence
    never wider than the prior. An incomplete set S has the product of the prior and of its experts,

        q(z | x_S) prop. to p(z) prod_{m in S} N(mu_m, sigma_m^2) = p(z)^(1 - |S|) prod_S q_m(z),

    the conditional product of the unimodal posteriors.

    Args:
        modalities: Two or more modalities.
        latent_dim: Size of z.
        hidden: Width of the layer that joins the features.
        options: For :class:`~mmzoo.vae.MultimodalVAE`.
    """

    min_modalities = 2
    #: Names of the parts that belong to the unimodal posteriors.
    unimodal_parts: ClassVar[tuple[str, ...]] = ("experts",)

    def __init__(
        self, modalities: Any, latent_dim: int = 16, *, hidden: int = 256, **options: Any
    ) -> None:
        super().__init__(modalities, latent_dim, hidden=hidden, **options)
        encoders: list[nn.Module] = []
        features = 0
        for modality in self.modalities.values():
            encoder = modality.make_encoder()
            size = feature_size(encoder, modality.event_shape, modality.make_likelihood())
            features += 2 * latent_dim if size is None else size
            encoders.append(encoder)
        self.joint_encoders = nn.ModuleList(encoders)
        self.joint = nn.Sequential(
            nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent_dim)
        )

    def _encode(self, batch: Batch) -> Experts:
        """The unimodal posteriors and, last, the joint one; ``(N, M + 1, D)``."""
        found = super()._encode(batch)
        loc, scale = found
        # Prior times expert: never wider than the prior.
        loc, scale = combine.product_of_experts(loc.unsqueeze(-2), scale.unsqueeze(-2))
        mask = self._full_mask(batch)
        complete = mask.reshape(-1, *mask.shape[-2:]).any(0).all(-1)  # (N,)
        joint = self._joint(batch, complete)
        return Experts(
            torch.cat([loc, joint[0].unsqueeze(-2)], -2),
            torch.cat([scale, joint[1].unsqueeze(-2)], -2),
            found.private,
        )

    def _joint(self, batch: Batch, complete: Tensor) -> tuple[Tensor, Tensor]:
        blank = self.generative.prior_loc.new_zeros(len(complete), self.latent_dim)
        if not bool(complete.any()):
            return blank, blank + 1.0
        whole = bool(complete.all())
        index = complete.nonzero().squeeze(-1)
        features = []
        for (name, modality), encoder in zip(
            self.modalities.items(), self.joint_encoders, strict=True
        ):
            value = batch.x[name]
            assert value is not None
            value = self._fill_entries(name, value) if modality.entrywise_missing else value
            with self._networks():
                out = encoder(value if whole else value[index])
            features.append(self._full(out if isinstance(out, Tensor) else torch.cat(out, -1)))
        loc, scale = loc_and_scale(self._full(self.joint(torch.cat(features, -1))))
        if whole:
            return loc, scale
        return blank.index_copy(0, index, loc), (blank + 1.0).index_copy(0, index, scale)

    def combine(self, experts: Experts, mask: Tensor | None) -> TorchDistribution:
        """The joint posterior of complete sets, the conditional product of others."""
        joint = self.diagonal(experts.loc[..., -1, :], experts.scale[..., -1, :])
        if mask is None:
            return joint
        alone = Experts(experts.loc[..., :-1, :], experts.scale[..., :-1, :])
        loc, scale = combine.conditional_product(*alone, mask)
        complete = mask.all(-1, keepdim=True)
        return self.diagonal(
            torch.where(complete, joint.base_dist.loc, loc),
            torch.where(complete, joint.base_dist.scale, scale),
        )

    def expert_log_prob(self, experts: Experts, z: Tensor) -> Tensor:
        """``log q_m(z)`` of every unimodal posterior, ``(*, N, M)``, at z ``(*, N, D)``."""
        alone = self.diagonal(experts.loc[..., :-1, :], experts.scale[..., :-1, :])
        return alone.log_prob(z.unsqueeze(-2))
