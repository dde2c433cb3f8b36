r"""CMVAE: MMVAE+ whose shared code falls into clusters.

Generative story, with learned weights and centres:

    c ~ pi,    z | c ~ N(mu_c, I),    w_m ~ N(0, I),    x_m ~ p(x_m | z, w_m)

The cluster is summed out, ``p(z) = sum_c pi_c N(z; mu_c, I)``, and read off afterwards:

    p(c | z) = pi_c N(z; mu_c, I) / p(z),    p(c | x_S) ~= E_{q(z | x_S)} p(c | z)

Posterior and objective are those of MMVAE+, log p(z) the mixture's:

    q(z | x_S) = (1 / |S|) sum_{m in S} q_m(z),    q(w_m | x_m),    w_n ~ p for n not in S

    (1/|O|) sum_m E log (1/K) sum_k exp{ l_m(z, w_m) + sum_{n != m} l_n(z, w~_n)
        + beta [ log p(z) + log p(w_m) - log q(z | x_O) - log q(w_m | x_m) ] }

Deep Generative Clustering with Multimodal Diffusion Variational Autoencoders
(Palumbo et al., 2024), https://openreview.net/forum?id=k5THrhXDV3

Differs from the paper: its diffusion decoders, a second stage for sharper images, and its search
for the number of clusters are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmzoo.distributions import Mixture
from mmzoo.models.mmvaeplus import MMVAEPlus
from mmzoo.vae import Rows

__all__ = ["CMVAE"]


class CMVAE(MMVAEPlus):
    """Mixture of experts, private codes, and a mixture of Gaussians for prior.

    Args:
        modalities: The modalities, any number.
        latent_dim: Size of z.
        num_clusters: Components C of the prior.
        private_dim: Size of every private code, or sizes by name (others have none).
        separate_encoders: Whether private codes have encoders of their own.

    Example:
        >>> from mmzoo import Modality
        >>> parts = [Modality("a", (4,)), Modality("b", (3,))]
        >>> vae = CMVAE(parts, latent_dim=2, num_clusters=3)
        >>> vae.clusters({"a": torch.zeros(5, 4)}).shape
        torch.Size([5])
    """

    name = "cmvae"
    title = "CMVAE"
    paper = "Deep Generative Clustering with Multimodal VAEs (Palumbo et al., 2024)"
    year = 2024
    url = "https://openreview.net/forum?id=k5THrhXDV3"
    latents = "shared (clusters), private"
    families = ("normal",)
    posterior_kind = "mixture of experts; private codes"
    objective_name = "importance weighted, auxiliary priors, clustered prior"

    def __init__(
        self,
        modalities: Any,
        latent_dim: int = 16,
        *,
        num_clusters: int = 10,
        private_dim: int | Mapping[str, int] = 8,
        separate_encoders: bool = False,
    ) -> None:
        super().__init__(
            modalities, latent_dim, private_dim=private_dim, separate_encoders=separate_encoders
        )
        if num_clusters < 1:
            raise ValueError(f"CMVAE: expected num_clusters >= 1, found {num_clusters}")
        self.options["num_clusters"] = num_clusters
        self.generative.cluster_logits = nn.Parameter(torch.zeros(num_clusters))
        self.generative.cluster_loc = nn.Parameter(torch.randn(num_clusters, latent_dim))

    def prior(self, x: Rows | None = None) -> Mixture:
        """``p(z)``, the mixture over clusters, batch ``()``, event ``(D,)``."""
        parts: Any = self.generative
        loc: Tensor = parts.cluster_loc
        return Mixture(parts.cluster_logits, loc, torch.ones_like(loc))

    def log_cluster(self, z: Tensor) -> Tensor:
        """``log p(c | z)``, ``(*, C)``, of latents ``(*, D)``."""
        return self.prior().component_log_prob(z).log_softmax(-1)

    @torch.no_grad()
    def cluster_probs(
        self,
        x: Rows,
        observed: Mapping[str, Tensor] | None = None,
        *,
        num_samples: int = 100,
    ) -> Tensor:
        """``E_{q(z | x_S)} p(c | z)``, ``(N, C)``, with draws from every component in turn.

        Args:
            x: Name to values ``(N, *event_shape)``.
            observed: Name to bool mask ``(N,)``.
            num_samples: Draws of each row, at least one for each of its components.
        """
        q = self.posterior(x, observed)
        assert isinstance(q, Mixture)
        draws = q.stratify(num_samples)
        return (draws.log_coef.exp().unsqueeze(-1) * self.log_cluster(draws.value).exp()).sum(0)

    def clusters(
        self, x: Rows, observed: Mapping[str, Tensor] | None = None, *, num_samples: int = 100
    ) -> Tensor:
        """The most probable cluster of each row, ``(N,)``."""
        return self.cluster_probs(x, observed, num_samples=num_samples).argmax(-1)
