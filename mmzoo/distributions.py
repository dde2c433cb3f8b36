"""Distributions that Pyro lacks: mixtures of vectors, chains, and some rows of a distribution."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import Laplace, Normal, TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.infer.util import check_fully_reparametrized
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from mmzoo.flows import ConditionalFlow

__all__ = [
    "Ancestral",
    "FlowMixture",
    "Mixture",
    "Points",
    "PriorRows",
    "ScoredRows",
    "Strata",
    "mean_or_probs",
]

_NO_RSAMPLE = (
    "guide site 'z': expected a reparameterised posterior for TraceMeanField_ELBO, found a "
    "mixture; use vae.objective() (stratified, low variance) or Trace_ELBO() (score function)"
)


class Ancestral(TorchDistribution):
    """Latents of D dimensions drawn one after another, ``f_1(z_1) f_2(z_2 | z_1) ...``.

    One distribution of them all, side by side, with the exact density; in a Pyro program each is a
    site of its own, see :meth:`draw`.

    Args:
        names: Names of the sites, in the order in which they are drawn.
        first: Distribution of the first, batch ``(*)``, event ``(D,)``.
        conditionals: For each of the others a function from what was drawn before it, side by
            side, ``(*, j D)``, to its distribution.

    Example:
        >>> unit = Normal(torch.zeros(4, 2), 1.0).to_event(1)
        >>> p = Ancestral(("z_2", "z"), unit, [lambda z_2: Normal(0.5 * z_2, 1.0).to_event(1)])
        >>> p.batch_shape, p.event_shape, p.sample().shape
        (torch.Size([4]), torch.Size([4]), torch.Size([4, 4]))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        names: Sequence[str],
        first: TorchDistribution,
        conditionals: Sequence[Callable[[Tensor], TorchDistribution]],
    ) -> None:
        self.names = tuple(names)
        self.first = first
        self.conditionals = tuple(conditionals)
        event_shape = torch.Size((len(self.names) * first.event_shape[0],))
        super().__init__(first.batch_shape, event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Ancestral:
        """The same chain over a larger batch."""
        return Ancestral(self.names, self.first.expand(batch_shape), self.conditionals)

    def draw(self, sample: Callable[[str, TorchDistribution], Tensor]) -> Tensor:
        """All latents side by side, ``(*, T)``, each drawn by ``sample(name, distribution)``."""
        z = sample(self.names[0], self.first)
        for name, conditional in zip(self.names[1:], self.conditionals, strict=True):
            z = torch.cat([z, sample(name, conditional(z))], -1)
        return z

    def split(self, z: Tensor) -> dict[str, Tensor]:
        """The latents by site name, each ``(*, D)``; ``z`` is ``(*, T)``."""
        return dict(zip(self.names, z.split(self.first.event_shape[0], -1), strict=True))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Reparameterised draws ``(*sample_shape, *, T)``."""
        # The distributions after the first have the batch of what was drawn before them.
        first = self.names[0]
        return self.draw(lambda name, p: p.rsample(sample_shape) if name == first else p.rsample())

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``(*sample_shape, *, T)``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log density, ``(*)``."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        values = self.split(value.expand(*shape, *self.event_shape))
        terms: list[Tensor] = []

        def score(name: str, p: TorchDistribution) -> Tensor:
            terms.append(p.log_prob(values[name]))
            return values[name]

        self.draw(score)
        return torch.stack(terms).sum(0)


class Points(TorchDistribution):
    """A code without a distribution: one point in each row, or N(0, I) where nothing is known.

    ``log_prob`` is 0 at the point, up to round-off, and ``-inf`` elsewhere: it is no density.

    Args:
        loc: The points, ``(*, D)``.
        known: The rows that have one, ``(*)``.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, known: Tensor) -> None:
        shape = torch.broadcast_shapes(loc.shape[:-1], known.shape)
        self.known = known.expand(shape)
        self.loc = torch.where(self.known.unsqueeze(-1), loc, 0.0)
        super().__init__(shape, loc.shape[-1:], validate_args=False)

    @property
    def base_dist(self) -> Normal:
        """Location and scale of each dimension, as independent Gaussians have them."""
        scale = torch.where(self.known.unsqueeze(-1), 0.0, torch.ones_like(self.loc))
        return Normal(self.loc, scale, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Points:
        """The same points over a larger batch."""
        shape = torch.Size(batch_shape)
        return Points(self.loc.expand(*shape, *self.event_shape), self.known.expand(shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """The points, and draws of N(0, I), ``(*sample_shape, *, D)``."""
        base = self.base_dist
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=base.loc.dtype, device=base.loc.device)
        return base.loc + base.scale * noise

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """As :meth:`rsample`, without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """0 or ``-inf`` for a point, the normal density where nothing is known, ``(*)``."""
        tolerance = 100 * torch.finfo(value.dtype).eps
        there = torch.isclose(value, self.loc, rtol=tolerance, atol=tolerance).all(-1)
        point = torch.where(there, 0.0, value.new_full((), -torch.inf))
        free = Normal(0.0, value.new_ones(())).log_prob(value).sum(-1)
        return torch.where(self.known, point, free)


class Strata(NamedTuple):
    """Draws of a mixture, taken in turn from its components.

    With ``w`` any function of a draw, ``(log_coef.exp() * w(value)).sum(0)`` is an unbiased
    estimate of its expectation under the mixture.

    Attributes:
        value: Draws, shape ``(K, *, D)``.
        component: Index of the component of each draw, shape ``(K, *)``.
        log_coef: ``log(pi_c / n_c)``, ``n_c`` the number of draws from component c, ``(K, *)``.
    """

    value: Tensor
    component: Tensor
    log_coef: Tensor


class Mixture(TorchDistribution):
    """Mixture over whole vectors: ``sum_c pi_c prod_d f(z_d; loc_cd, scale_cd)``.

    ``sample`` and the exact ``log_prob`` make it a posterior for plain ``Trace_ELBO`` (by the score
    function); :meth:`stratify` gives reparameterised draws from every component in turn.

    Args:
        log_weights: Logarithms of the weights, ``-inf`` for an absent component, ``(*, C)``.
        loc: Locations ``(*, C, D)``.
        scale: Scales ``(*, C, D)``.
        family: ``Normal`` or ``Laplace`` of Pyro.

    Example:
        >>> q = Mixture(torch.zeros(3, 2), torch.zeros(3, 2, 5), torch.ones(3, 2, 5))
        >>> q.batch_shape, q.event_shape, q.stratify(4).component[:, 0].tolist()
        (torch.Size([3]), torch.Size([5]), [0, 1, 0, 1])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(
        self,
        log_weights: Tensor,
        loc: Tensor,
        scale: Tensor,
        *,
        family: type[Normal] | type[Laplace] = Normal,
        validate_args: bool | None = None,
    ) -> None:
        shape = torch.broadcast_shapes(log_weights.shape, loc.shape[:-1], scale.shape[:-1])
        self.log_weights = log_weights.log_softmax(-1).expand(shape)
        self.loc = loc.expand(*shape, loc.shape[-1])
        self.scale = scale.expand(*shape, loc.shape[-1])
        self.family = family
        super().__init__(shape[:-1], loc.shape[-1:], validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """False; to Pyro's mean-field ELBO it says what to use instead."""
        # Pyro's own message there names neither the site nor a way out.
        if sys._getframe(1).f_code is check_fully_reparametrized.__code__:
            raise ValueError(_NO_RSAMPLE)
        return False

    def like(self, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Mixture:
        """The same kind of mixture with other parameters."""
        return Mixture(log_weights, loc, scale, family=self.family, validate_args=False)

    @property
    def components(self) -> TorchDistribution:
        """The components, batch ``(*, C)``, event ``(D,)``."""
        return self.family(self.loc, self.scale, validate_args=False).to_event(1)

    @property
    def present(self) -> Tensor:
        """Which components have weight, ``(*, C)``."""
        return self.log_weights > -torch.inf

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture, ``(*, D)``."""
        return (self.log_weights.exp().unsqueeze(-1) * self.loc).sum(-2)

    @property
    def variance(self) -> Tensor:
        """Variance per dimension: mean variance plus variance of the means, ``(*, D)``."""
        weights = self.log_weights.exp().unsqueeze(-1)
        second = self.components.variance + (self.loc - self.mean.unsqueeze(-2)).square()
        return (weights * second).sum(-2)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Mixture:
        """The same mixture over a larger batch."""
        shape = torch.Size(batch_shape)
        num_components, dim = self.loc.shape[-2:]
        return self.like(
            self.log_weights.expand(*shape, num_components),
            self.loc.expand(*shape, num_components, dim),
            self.scale.expand(*shape, num_components, dim),
        )

    def component_log_prob(self, value: Tensor) -> Tensor:
        """``log pi_c + log f_c(value)``, shape ``(*, C)``; ``-inf`` for absent components."""
        return self.log_weights + self.components.log_prob(value.unsqueeze(-2))

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log density, ``(*)``."""
        if self._validate_args:
            self._validate_sample(value)
        return self.component_log_prob(value).logsumexp(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Independent draws ``(*sample_shape, *, D)``, component first."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            indicator = torch.distributions.Categorical(logits=self.log_weights)
            return self.draw(indicator.sample(shape))

    def score_parts(self, value: Tensor) -> ScoreParts:
        """The score-function form, since draws are not reparameterised."""
        log_prob = self.log_prob(value)
        return ScoreParts(log_prob, log_prob, 0)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """A draw, as ``pyro.sample`` takes it."""
        return self.sample(*args, **kwargs)

    def at(self, component: Tensor) -> tuple[Tensor, Tensor]:
        """``loc`` and ``scale`` ``(K, *, D)`` of the components with indices ``(K, *)``."""
        index = component[..., None, None].expand(*component.shape, 1, self.loc.shape[-1])
        full = (*component.shape, *self.loc.shape[-2:])
        loc = self.loc.expand(full).gather(-2, index).squeeze(-2)
        return loc, self.scale.expand(full).gather(-2, index).squeeze(-2)

    def draw(self, component: Tensor) -> Tensor:
        """One reparameterised draw ``(K, *, D)`` from each component named in ``(K, *)``."""
        loc, scale = self.at(component)
        return self.family(loc, scale, validate_args=False).rsample()

    def stratify(self, num: int, *, start: int = 0, total: int | None = None) -> Strata:
        """Draws ``start .. start + num`` out of ``total``, cycling through the present components.

        Args:
            num: Draws to take now, K.
            start: Index of the first of them, so that draws can be taken in chunks.
            total: Draws that will be taken altogether, at least the number of components.
        """
        total = num if total is None else total
        count = self.present.sum(-1)  # (*)
        if total < int(count.max()):
            raise ValueError(
                f"mixture posterior: expected at least one draw for each of its {int(count.max())} "
                f"components, found num_samples={total}; raise num_samples"
            )
        # The present components first, in their order.
        order = torch.argsort((~self.present).to(torch.uint8), dim=-1, stable=True)
        turn = torch.arange(start, start + num, device=count.device)
        rank = turn.view(-1, *(1,) * count.dim()) % count  # (K, *)
        component = order.expand(*rank.shape, -1).gather(-1, rank.unsqueeze(-1)).squeeze(-1)
        taken = total // count + (rank < total % count)
        log_pi = self.log_weights.expand(*rank.shape, -1).gather(-1, component.unsqueeze(-1))
        log_coef = log_pi.squeeze(-1) - taken.to(log_pi.dtype).log()
        return Strata(self.draw(component), component, log_coef)


class FlowMixture(Mixture):
    """Mixture of flows: component c is the law of ``loc_c + scale_c T_c^-1(e)``, e ~ N(0, I).

    Args:
        log_weights: As for :class:`Mixture`.
        loc: Locations of the components before their flow, ``(*, C, D)``.
        scale: Scales, ``(*, C, D)``.
        flows: The C maps T_c, each conditioned on loc_c and scale_c; None for a Gaussian component.
    """

    def __init__(
        self,
        log_weights: Tensor,
        loc: Tensor,
        scale: Tensor,
        *,
        flows: Sequence[ConditionalFlow | None],
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(log_weights, loc, scale, validate_args=validate_args)
        self.flows = tuple(flows)

    def like(self, log_weights: Tensor, loc: Tensor, scale: Tensor) -> FlowMixture:
        """The same flows with other parameters."""
        return FlowMixture(log_weights, loc, scale, flows=self.flows, validate_args=False)

    @property
    def components(self) -> TorchDistribution:
        """Refused: the components are no Gaussians."""
        raise NotImplementedError(
            "mixture of flows: expected Gaussian components for moments and for the doubly "
            "reparameterised gradient, found flows; use samples, and gradient='plain'"
        )

    @property
    def mean(self) -> Tensor:
        """Refused: flows have no moments in closed form."""
        return self.components.mean

    def component_log_prob(self, value: Tensor) -> Tensor:
        """``log pi_c + log f_c(value)``, shape ``(*, C)``; ``-inf`` for absent components."""
        terms = []
        for c, flow in enumerate(self.flows):
            loc, scale = self.loc[..., c, :], self.scale[..., c, :]
            if flow is None:
                fn = self.family(loc, scale, validate_args=False).to_event(1)
                terms.append(fn.log_prob(value))
            else:
                terms.append(flow.log_prob(value, loc, scale))
        return self.log_weights + torch.stack(terms, -1)

    def draw(self, component: Tensor) -> Tensor:
        """One reparameterised draw ``(K, *, D)`` from each component named in ``(K, *)``."""
        loc, scale = self.at(component)
        noise = self.family(torch.zeros_like(loc), 1.0, validate_args=False).rsample()
        z = loc + scale * noise
        for c, flow in enumerate(self.flows):
            rows = (component == c).nonzero(as_tuple=True)
            if flow is not None and len(rows[0]):
                z = z.index_put(rows, flow.draw(noise[rows], loc[rows], scale[rows]))
        return z


@register_kl(Mixture, Distribution)
def _kl_of_mixture(q: Mixture, p: Distribution) -> Tensor:
    raise ValueError(_NO_RSAMPLE)


class ScoredRows(TorchDistribution):
    """A likelihood that was computed for some rows only; the others have log probability zero.

    A modality is decoded only where some mask scores it. This class carries the decoded rows,
    knows where they belong, and never reads the values of other rows.

    Args:
        base: Distribution of the scored rows, batch ``(R,)``.
        mask: Which entries of the batch they are, ``(*, N)`` with R True entries.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(self, base: TorchDistribution, mask: Tensor) -> None:
        self.base = base
        self.scored = mask
        self.index = mask.nonzero(as_tuple=True)
        super().__init__(mask.shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Support of the likelihood."""
        return self.base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> ScoredRows:
        """Itself: the batch is complete by construction."""
        if torch.Size(batch_shape) != self.batch_shape:
            raise ValueError(
                f"likelihood of scored rows: expected batch shape {tuple(self.batch_shape)}, found "
                f"{tuple(batch_shape)}; sample z inside every plate that the likelihood is in"
            )
        return self

    def gather(self, value: Tensor) -> Tensor:
        """The scored rows of a value, ``(R, *event)``."""
        return value.expand(*self.batch_shape, *self.event_shape)[self.index]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of scored rows, zero elsewhere, ``(*, N)``."""
        scored = self._log_prob(self.gather(value))
        return scored.new_zeros(self.batch_shape).index_put(self.index, scored)

    def _log_prob(self, value: Tensor) -> Tensor:
        if len(value):
            return self.base.log_prob(value)
        # No rows, for which many densities fail. A gradient of zeros is wanted.
        found = [p for p in _parameters(self.base) if p.is_floating_point() and not p.numel()]
        return torch.stack([p.sum() for p in found] or [torch.zeros(())]).sum().expand(0)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws of the scored rows; the others are zero."""
        shape = torch.Size(sample_shape)
        draws = self.base.sample(shape)
        full = draws.new_zeros(*shape, *self.batch_shape, *self.event_shape)
        full[(slice(None),) * len(shape) + self.index] = draws
        return full


def _parameters(fn: Distribution) -> Iterator[Tensor]:
    """The tensors that a distribution holds, those of the distributions in it included."""
    for part in vars(fn).values():
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, Distribution):
            yield from _parameters(part)


class PriorRows(TorchDistribution):
    """The prior in the rows that observe nothing, a posterior in the others.

    For priors and posteriors that are not of one family. The density is exact in every row; draws
    and gradients of a row are those of the distribution that it has, reparameterised where that
    one is.

    Args:
        prior: Distribution with batch ``()``.
        posterior: Distribution with batch ``(*, N)``.
        empty: Which rows have the prior, bool ``(*, N)``.

    Example:
        >>> from pyro.distributions import Laplace
        >>> prior = Laplace(torch.zeros(2), 1.0).to_event(1)
        >>> q = Normal(torch.ones(3, 2), 0.5).to_event(1)
        >>> PriorRows(prior, q, torch.tensor([False, True, False])).sample().shape
        torch.Size([3, 2])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(
        self, prior: TorchDistribution, posterior: TorchDistribution, empty: Tensor
    ) -> None:
        self.prior = prior
        self.posterior = posterior
        self.empty = empty
        super().__init__(posterior.batch_shape, posterior.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether every row is reparameterised."""
        return bool(self.prior.has_rsample) and bool(self.posterior.has_rsample)

    @property
    def mean(self) -> Tensor:
        """Mean of each row, ``(*, N, D)``."""
        return torch.where(self.empty.unsqueeze(-1), self.prior.mean, self.posterior.mean)

    @property
    def variance(self) -> Tensor:
        """Variance of each row, ``(*, N, D)``."""
        return torch.where(self.empty.unsqueeze(-1), self.prior.variance, self.posterior.variance)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PriorRows:
        """The same rows over a larger batch."""
        shape = torch.Size(batch_shape)
        return PriorRows(self.prior, self.posterior.expand(shape), self.empty.expand(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log density, ``(*)``."""
        found = self.posterior.log_prob(value)
        empty = self.empty.expand(found.shape)
        value = value.expand(*found.shape, *self.event_shape)
        return found.masked_scatter(empty, self.prior.log_prob(value[empty]))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``(*sample_shape, *, D)``; those of a part without rsample have no gradient."""
        shape = torch.Size(sample_shape)
        value = _draw(self.posterior, shape)
        empty = self.empty.expand(value.shape[:-1])
        drawn = _draw(self.prior, torch.Size([int(empty.sum())]))
        return value.masked_scatter(empty.unsqueeze(-1), drawn)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def score_parts(self, value: Tensor) -> ScoreParts:
        """The score function for the rows that are not reparameterised, and for these only."""
        log_prob = self.log_prob(value)
        scored = torch.where(self.empty, not self.prior.has_rsample, not self.posterior.has_rsample)
        # The model's own log p cancels in rows that have the prior: they keep the entropy's term.
        entropy = torch.where(scored & ~self.empty, 0.0, log_prob)
        if not bool(scored.any()):
            return ScoreParts(log_prob, 0, entropy)
        return ScoreParts(log_prob, torch.where(scored, log_prob, 0.0), entropy)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """A draw, as ``pyro.sample`` takes it."""
        return self.rsample(*args, **kwargs)


def _draw(fn: TorchDistribution, shape: torch.Size) -> Tensor:
    return fn.rsample(shape) if fn.has_rsample else fn.sample(shape)


def mean_or_probs(p: Distribution) -> Tensor:
    """The mean; for integer labels, which have none, the probabilities of the classes.

    Example:
        >>> from pyro.distributions import Categorical
        >>> mean_or_probs(Categorical(torch.tensor([0.25, 0.75])))
        tensor([0.2500, 0.7500])
    """
    base: Any = p
    while hasattr(base, "base_dist"):
        base = base.base_dist
    return base.probs if isinstance(base, torch.distributions.Categorical) else p.mean
