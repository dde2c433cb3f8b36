r"""The importance-weighted evidence lower bound, for plain and for mixture posteriors.

For a plain posterior, with ``w_k = p(x_O, z_k) / q(z_k | x_O)`` and K draws, the bound of a row is

    E log (1/K) sum_k w_k                                   (IWAE; ELBO for K = 1).

For a mixture posterior ``q = sum_c pi_c q_c`` with K draws from *each* component, every weight
holding the density of the whole mixture,

    within:   sum_c pi_c E log (1/K) sum_k w_ck
    pooled:   E log sum_c (pi_c / K) sum_k w_ck.

As K grows, ``pooled`` tends to log p(x_O); ``within`` stays below it, since the draws come from q_c
and the weights hold q.

Gradients of the guide's parameters (those of the model are the same in all):

- ``plain``: the total derivative of the bound. Unbiased, always.
- ``stl`` (sticking the landing, Roeder et al., 2017, https://arxiv.org/abs/1703.09194): the
  parameters in log q are constants. Unbiased for K = 1 only: for a mixture, with ``within``.
- ``dreg`` (doubly reparameterised, Tucker et al., 2019, https://arxiv.org/abs/1810.04152): unbiased
  when the density of the draws is the one in the weights. For mixtures with fixed weights this
  module derives the form below; the published one (Shi et al., 2019) is biased, and available as
  ``as_published=True``.

The doubly reparameterised gradient of a mixture. Write a = d log w/dz at constant parameters,
r_j(z) for the responsibilities, and T_j(z) = mu_j + sigma_j stop((z - mu_j) / sigma_j) for the path
of a draw that component j would have made. Then, with w^ the normalised weight (among the draws of
the component for ``within``, of all for ``pooled``), c = pi_m and kappa = 1/K, or c = 1 and
kappa = pi_m / K, the gradient is

    sum_m c_m sum_k { w^ a dT_m - sum_j r_j [ w^ (1 - w^) a + (w^ - kappa) d log r_m/dz ] dT_j }.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmzoo.distributions import Ancestral, Mixture, PriorRows
from mmzoo.inference.draws import (
    Draws,
    detach_parameters,
    draw,
    latent_values,
    log_joint,
    log_proposal,
)
from mmzoo.inference.objective import Objective, owner, trace_terms
from mmzoo.vae import Experts, MultimodalVAE

__all__ = ["ImportanceWeightedELBO"]

_MANY = 1 << 30


class ImportanceWeightedELBO(Objective):
    """Per-row importance-weighted bound of a pair, everything observed given and scored.

    Args:
        num_samples: K, for a mixture the number of draws from each component.
        bound: ``"pooled"`` or ``"within"``; no difference for plain posteriors.
        gradient: ``"plain"``, ``"stl"`` or ``"dreg"``.
        as_published: Allow the biased gradients of the literature: ``stl`` for K > 1, and for
            mixtures the DReG of Shi et al., which squares the weights and no more.

    Raises:
        ValueError: For an unknown option, or a gradient that is biased where it is asked for.

    Example:
        >>> from mmzoo import Modality
        >>> from mmzoo.models import MMVAE
        >>> vae = MMVAE([Modality("a", (3,)), Modality("b", (2,))], latent_dim=2)
        >>> elbo = ImportanceWeightedELBO(num_samples=5, gradient="dreg")
        >>> x = {"a": torch.randn(8, 3), "b": torch.randn(8, 2)}
        >>> elbo.loss(vae.model, vae.guide, x) > 0
        True
    """

    def __init__(
        self,
        num_samples: int = 10,
        *,
        bound: str = "pooled",
        gradient: str = "plain",
        as_published: bool = False,
    ) -> None:
        super().__init__()
        for what, found, known in (
            ("bound", bound, ("pooled", "within")),
            ("gradient", gradient, ("plain", "stl", "dreg")),
        ):
            if found not in known:
                raise ValueError(
                    f"ImportanceWeightedELBO: expected {what} one of {', '.join(known)}, "
                    f"found {found!r}"
                )
        if num_samples < 1:
            raise ValueError(
                f"ImportanceWeightedELBO: expected num_samples >= 1, found {num_samples}"
            )
        if gradient == "stl" and num_samples > 1 and not as_published:
            raise ValueError(
                "ImportanceWeightedELBO: expected gradient 'plain' or 'dreg' for num_samples > 1, "
                "found 'stl', which is biased there; as_published=True allows it"
            )
        self.num_samples = num_samples
        self.bound = bound
        self.gradient = gradient
        self.as_published = as_published

    def differentiable_loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Minus the bound of a batch, with the chosen gradient, summed over rows."""
        return self._loss(model, guide, x, observed)

    def _loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor] | None,
        experts: Experts | None = None,
    ) -> Tensor:
        draws, num = self._draw(guide, x, observed, owner(model), experts)
        doubly = self.gradient == "dreg" and torch.is_grad_enabled()
        routes = {name: _Route(draws, name) for name in latent_values(draws)} if doubly else {}
        values = {name: route.entrance() for name, route in routes.items()}
        log_w = self._log_w(model, x, observed, draws, num, values)
        bound = self._value(draws, log_w)
        if not doubly:
            return -bound.sum()
        share, normal = self._shares(draws, log_w.detach())
        surrogate = (share * log_w).sum()
        for route in routes.values():
            route.normal = normal
            if route.mixture is not None and not self.as_published:
                surrogate = surrogate - route.cross_terms(share)
        # The value of the bound, with the gradient of the surrogate.
        return -(bound.detach().sum() + surrogate - surrogate.detach())

    def row_bounds(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """One estimate of the bound for each row, ``(N,)``."""
        draws, num = self._draw(guide, x, observed, owner(model))
        return self._value(draws, self._log_w(model, x, observed, draws, num, {}))

    # Private ------------------------------------------------------------------------------------

    def _draw(
        self,
        guide: Callable[..., Any],
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor] | None,
        vae: Any,
        experts: Experts | None = None,
    ) -> tuple[Draws, int]:
        kwargs: dict[str, Any] = {}
        own = isinstance(vae, MultimodalVAE) and owner(guide) is vae
        if own:
            kwargs["experts"] = vae.encode(x, observed) if experts is None else experts
            posterior = vae.posterior(x, observed, **kwargs)
            mixture = posterior if isinstance(posterior, Mixture) else None
            if isinstance(posterior, Ancestral) and self.gradient != "plain":
                # Parameters of a later latent that are constants cut the path of the earlier ones.
                raise ValueError(
                    "ImportanceWeightedELBO: expected gradient 'plain' for latents that depend on "
                    f"each other, found {self.gradient!r}, which is biased there"
                )
        else:  # one draw tells what a guide of the user's is
            mixture = draw(guide, x, observed, 1, total=_MANY).mixture
        if mixture is not None and self.gradient == "dreg" and not self.as_published:
            weights = mixture.log_weights
            if own and weights.requires_grad:
                # Not those of rows that have the prior: their log w is zero, whatever z is.
                weights = vae.combine(kwargs["experts"], None).log_weights
            if weights.requires_grad:
                raise ValueError(
                    "ImportanceWeightedELBO: expected components of fixed weights for gradient "
                    "'dreg' of a mixture, found weights with a gradient, which it would miss; use "
                    "gradient='plain'"
                )
        present = 1 if mixture is None else int(mixture.present.sum(-1).max())
        pooled = self.bound == "pooled" and not self.as_published
        if self.gradient == "stl" and pooled and present > 1:
            raise ValueError(
                "ImportanceWeightedELBO: expected bound 'within' for gradient 'stl' of a mixture, "
                "found 'pooled', for which it is biased; as_published=True allows it"
            )
        num = self.num_samples * present
        draws = draw(guide, x, observed, num, **kwargs)
        if torch.is_grad_enabled():
            _check_reparameterised(draws)
        return _first_of_each(draws, self.num_samples), num

    def _log_w(
        self,
        model: Callable[..., Any],
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor] | None,
        draws: Draws,
        num: int,
        values: Mapping[str, Tensor],
    ) -> Tensor:
        log_p, trace = log_joint(model, x, observed, draws, num, values=values)
        stopped = self.gradient != "plain"
        log_q = log_proposal(draws, log_p.shape[-1], stopped=stopped, values=values)
        self.terms = trace_terms(trace, draws.trace)
        return log_p - log_q

    def _value(self, draws: Draws, log_w: Tensor) -> Tensor:
        """The bound of each row, ``(N,)``, differentiable."""
        if draws.component is None or self.bound == "pooled":
            return (log_w + draws.log_coef).logsumexp(0)
        bounds, weights = [], []
        for mine, log_pi in self._components(draws):
            # Rows without this component: any finite number, its weight is zero.
            kept = torch.where(mine | ~mine.any(0), log_w, -torch.inf)
            bounds.append(kept.logsumexp(0) - mine.sum(0).clamp(min=1).to(log_w.dtype).log())
            weights.append(log_pi.exp())
        return (torch.stack(weights) * torch.stack(bounds)).sum(0)

    def _shares(self, draws: Draws, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Derivative of the bound by each log weight, and the normalised weights, ``(K, N)``."""
        if draws.component is None or self.bound == "pooled":
            normal = (log_w + draws.log_coef).softmax(0)
            return normal, normal
        share, normal = torch.zeros_like(log_w), torch.zeros_like(log_w)
        for mine, log_pi in self._components(draws):
            within = torch.where(mine | ~mine.any(0), log_w, -torch.inf).softmax(0)
            normal = torch.where(mine, within, normal)
            share = torch.where(mine, log_pi.exp() * within, share)
        return share, normal

    def _components(self, draws: Draws) -> list[tuple[Tensor, Tensor]]:
        """For each component: which draws are its own ``(K, N)``, and ``log pi_c`` ``(N,)``."""
        assert draws.mixture is not None and draws.component is not None
        log_pi = draws.mixture.log_weights[0].unbind(-1)
        return [(draws.component == c, each) for c, each in enumerate(log_pi)]


def _first_of_each(draws: Draws, num: int) -> Draws:
    """Leaves out what a row draws beyond K from each of its components.

    Rows with fewer components than others draw as often; were they all counted, the bound of a row
    would depend on its neighbours, and K = 1 would not be K = 1.
    """
    if draws.mixture is None or draws.component is None:
        return draws
    count = draws.mixture.present[0].sum(-1)  # (N,)
    turn = torch.arange(len(draws.component), device=count.device).unsqueeze(-1)
    kept = turn < num * count  # the draws take the components in turn
    log_pi = draws.mixture.log_weights.gather(-1, draws.component.unsqueeze(-1)).squeeze(-1)
    return draws._replace(
        component=torch.where(kept, draws.component, -1),
        log_coef=torch.where(kept, log_pi - math.log(num), -torch.inf),
    )


def _check_reparameterised(draws: Draws) -> None:
    for name, site in draws.trace.nodes.items():
        if name in latent_values(draws) and not isinstance(site["fn"], Mixture):
            if not site["fn"].has_rsample:
                drop = (
                    "drop the rows that observe nothing, or "
                    if isinstance(site["fn"], PriorRows)
                    else ""
                )
                raise ValueError(
                    f"guide site {name!r}: expected reparameterised draws, found "
                    f"{type(site['fn']).__name__}, whose gradient would be wrong without notice; "
                    f"{drop}use Trace_ELBO() (score function)"
                )


class _Route:
    """A draw whose gradient is led back to the guide's parameters doubly reparameterised.

    The pair is evaluated at the entrance. The normalised weights ``normal`` ``(K, N)`` are known
    only then, and are set before the backward pass, in which ``w^ a`` (times whatever the caller
    has scaled the loss with) arrives there.
    """

    def __init__(self, draws: Draws, name: str) -> None:
        site = draws.trace.nodes[name]
        # Not the draws: their trace is about to hold what is computed from the entrance.
        self.component, self.log_coef = draws.component, draws.log_coef
        # Beside a mixture, a private code is a plain latent.
        self.mixture = draws.mixture if isinstance(site["fn"], Mixture) else None
        self.z = self.normal = z = site["value"]
        self.paths = z.new_zeros(())
        self.responsibility: Tensor | None = None
        if self.mixture is not None:
            q = self.mixture
            noise = ((z.unsqueeze(-2) - q.loc) / q.scale).detach()
            self.paths = q.loc + q.scale * noise  # T_j(z), (K, N, C, D)

    def entrance(self) -> Tensor:
        """The draw, with the way back to the parameters behind it.

        Neither this class nor its graph may hold what comes out: such a cycle is never freed.
        """
        return _LeadBack.apply(self.z, self.paths, self)

    def cross_terms(self, share: Tensor) -> Tensor:
        """``sum_j r_j (w^ - kappa) (d log r_m / dz) T_j`` with everything but T_j constant."""
        q: Mixture = detach_parameters(self.mixture)
        component = self.component
        assert component is not None
        component = component.clamp(min=0)  # what is left out has share and coefficient zero
        with torch.enable_grad():
            z = self.z.detach().requires_grad_()
            log_r = q.component_log_prob(z).log_softmax(-1)
            (slope,) = torch.autograd.grad(log_r.gather(-1, component.unsqueeze(-1)).sum(), z)
        self.responsibility = log_r.detach().exp().unsqueeze(-1)  # (K, N, C, 1)
        baseline = (share - self.log_coef.exp()).unsqueeze(-1)
        return (self.responsibility * (baseline * slope).unsqueeze(-2) * self.paths).sum()

    def backward(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of the draw's own path and of the paths ``T_j``."""
        normal = self.normal.reshape(*self.normal.shape, *(1,) * (gradient.dim() - 2))
        if self.responsibility is None:  # plain posterior, or as published
            return normal * gradient, None
        return gradient, -self.responsibility * ((1 - normal) * gradient).unsqueeze(-2)


class _LeadBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, paths: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        own, others = ctx.route.backward(gradients[0])
        return own, others, None
