"""The pair: what every model of the zoo shares.

The generative story is

    z ~ p(z),    x_m ~ p(x_m | z)    for each modality m,

and the guide is ``q(z | x_S)`` for any set S of observed modalities, row by row. With private codes

    w_m ~ N(0, I),    x_m ~ p(x_m | z, w_m),

and the guide has ``q(w_m | x_m)`` where a row has x_m, the prior of w_m where it has not. A model
of the zoo says how it encodes (:meth:`MultimodalVAE.encode`), how it combines what is observed
(:meth:`MultimodalVAE.combine`), and with which objective it was published.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from pyro.distributions.util import is_validation_enabled
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence

from mmzoo.batch import Batch, check_batch, modality_names
from mmzoo.distributions import Ancestral, Mixture, PriorRows, ScoredRows, mean_or_probs
from mmzoo.modality import Modality
from mmzoo.networks import feature_size
from mmzoo.priors import OwnPrior, PriorSpec, VampPrior, make_prior, prior_config

__all__ = ["Expert", "Experts", "MultimodalVAE"]

_FAMILIES: dict[str, type[dist.Normal] | type[dist.Laplace]] = {
    "normal": dist.Normal,
    "laplace": dist.Laplace,
}
_MIN_SCALE = 1e-4
_FORMAT = 1  # of config.json

Rows = Mapping[str, Tensor | None] | Batch
_fresh = itertools.count()


class _Pair(NamedTuple):
    loc: Tensor
    scale: Tensor


class Experts(_Pair):
    """What the encoders say: one Gaussian (or Laplace) for each of E networks.

    A pair: ``loc, scale = experts``. What they say of private codes travels along.
    For models that combine features of the modalities (``expert_dim``), ``loc`` holds those,
    ``(N, E, H)``, and ``scale`` is one.

    Attributes:
        loc: ``(N, E, D)``, zero where a row lacks the modality.
        scale: ``(N, E, D)``, one where a row lacks the modality.
        private: Name to location and scale of the private code, ``(N, P)``; none without codes.
    """

    private: Mapping[str, tuple[Tensor, Tensor]]

    def __new__(
        cls,
        loc: Tensor,
        scale: Tensor,
        private: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> Self:
        """The pair, and the private codes."""
        self = super().__new__(cls, loc, scale)
        self.private = private or {}
        return self


class Expert(nn.Module):
    """A network from features to a location and a scale, each ``(rows, D)``.

    Args:
        encoder: Network from a batch of one modality to features ``(rows, H)``, or to the pair
            ``(loc, scale)`` itself, with positive scales (looked at while Pyro validates).
        features: H, or None for an encoder that gives the pair itself.
        latent_dim: D.
    """

    def __init__(self, encoder: nn.Module, features: int | None, latent_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = None if features is None else nn.Linear(features, 2 * latent_dim)

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale for each row."""
        out = self.encoder(value)
        return out if self.head is None else loc_and_scale(self.head(out))


class Features(nn.Module):
    """A network from one modality to H features, for models that combine these.

    Args:
        encoder: Network from a batch of one modality to features, or to a pair ``(loc, scale)``.
        features: Their number.
        width: H.
    """

    def __init__(self, encoder: nn.Module, features: int, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head: nn.Module = nn.Linear(features, width)

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Features of each row, ``(rows, H)``, in the place of a location, and a scale of one."""
        out = self.encoder(value)
        found = self.head(out if isinstance(out, Tensor) else torch.cat(out, -1))
        return found, torch.ones_like(found)


def loc_and_scale(out: Tensor) -> tuple[Tensor, Tensor]:
    """Splits ``(*, 2 D)`` into a location and a positive scale, softplus with a small floor."""
    loc, raw = out.chunk(2, -1)
    return loc, F.softplus(raw) + _MIN_SCALE


class _Generative(nn.Module):
    """The networks of the model, apart from those of the guide: what ``model`` registers."""

    prior_loc: Tensor
    prior_raw: Tensor
    prior: nn.Module | None

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.decoders = nn.ModuleDict()
        self.likelihoods = nn.ModuleDict()
        self.set_prior(latent_dim, learned=False, prior=None)

    def set_prior(self, latent_dim: int, *, learned: bool, prior: nn.Module | None) -> None:
        """A diagonal prior, fixed or learned, or a module in its place."""
        for name in ("prior_loc", "prior_raw"):
            if hasattr(self, name):
                delattr(self, name)
        loc, raw = torch.zeros(latent_dim), torch.ones(latent_dim).expm1().log()
        if learned:
            self.prior_loc = nn.Parameter(loc)
            self.prior_raw = nn.Parameter(raw)
        else:
            self.register_buffer("prior_loc", loc, persistent=False)
            self.register_buffer("prior_raw", raw, persistent=False)
        self.prior = prior


class MultimodalVAE(nn.Module):
    """Base class of the zoo: a Pyro model, and a guide for any set of observed modalities.

    A subclass names itself, combines experts, and offers its published objective; see
    ``mmzoo.models`` for the recipe.

    Args:
        modalities: What is measured; each model gets its own copies of their networks.
        latent_dim: D.
        family: ``"normal"`` or ``"laplace"``: family of the prior and of the posteriors, where the
            model's way of combining experts allows it (``families``).
        learned_prior: Whether location and scale of the prior are trained; ``prior`` goes before.
        prior: ``"standard"`` (the default), ``"learned"``, ``"mixture"``, ``"vamp"``, ``"flow"``, a
            dict with one of them as its ``kind`` and options, or a callable or module of your own
            that returns a distribution with batch ``()`` and event ``(D,)``; see
            :mod:`mmzoo.priors`. An N(0, I) expert in a product stays what it is.
        private_dim: Size of the private code of every modality, or sizes by name (others have
            none). An encoder that gives the pair ``(loc, scale)`` itself gives D + P entries.
        separate_encoders: Whether private codes have encoders of their own, instead of a head of
            the modality's encoder.
        expert_dim: H, for models that combine features of the modalities; None: each modality
            has a Gaussian (or Laplace) over z.
        options: Further arguments of a subclass, kept so that it can be saved.

    Raises:
        ValueError: For repeated or unusable modalities, a latent dimension below one, or private
            codes of unknown modalities.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    year: ClassVar[int]
    url: ClassVar[str | None] = None
    latents: ClassVar[str] = "shared"
    posterior_kind: ClassVar[str]
    objective_name: ClassVar[str]
    max_modalities: ClassVar[int | None] = None
    min_modalities: ClassVar[int] = 1
    #: Whether the guide is the posterior p(z | x_S) itself, for every S.
    exact_posterior: ClassVar[bool] = False
    #: Families whose experts can be combined: mixtures and single encoders allow both.
    families: ClassVar[tuple[str, ...]] = ("normal",)
    #: Names of modalities that every row must have, since the model is conditional on them.
    always_given: tuple[str, ...] = ()
    _mixed: torch.dtype | None = None

    def __init__(
        self,
        modalities: Sequence[Modality],
        latent_dim: int = 16,
        *,
        family: str = "normal",
        learned_prior: bool = False,
        private_dim: int | Mapping[str, int] = 0,
        separate_encoders: bool = False,
        prior: PriorSpec | None = None,
        expert_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_options(type(self), options)
        self.modalities = modalities_by_name(modalities, type(self))
        latent_dim, private_dim = _plain(latent_dim), _plain(private_dim)
        if type(latent_dim) is not int:
            raise ValueError(
                f"latent_dim: expected an integer, found {latent_dim!r}; give a whole number of "
                "dimensions"
            )
        if latent_dim < 1:
            raise ValueError(f"latent_dim: expected at least 1, found {latent_dim}")
        _check_family(type(self), family)
        self.latent_dim = latent_dim
        self.private_dims = _private_dims(private_dim, self.modalities)
        self.expert_dim = latent_dim if expert_dim is None else expert_dim
        self._combines_features = expert_dim is not None
        self._separate_encoders = separate_encoders
        self.family = family
        options = {
            "family": family,
            "learned_prior": learned_prior,
            "private_dim": private_dim if isinstance(private_dim, int) else dict(private_dim),
            "separate_encoders": separate_encoders,
            **options,
        }
        if prior is not None:
            options["prior"] = prior_config(prior)
        taken = self.option_names()
        self.options = {key: _plain(value) for key, value in options.items() if key in taken}
        # A suffix: nn.ModuleDict refuses names such as "keys" or "type".
        self.experts = nn.ModuleDict()
        self.private_experts = nn.ModuleDict()
        self.generative = _Generative(latent_dim)
        self._set_prior(prior, learned_prior)
        for key, modality in self.modalities.items():
            self._add_modality(key, modality)
        self._registers = True
        self._uid = next(_fresh)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Gives a copy its own name in Pyro's parameter store, so that both can be trained."""
        super().__setstate__(state)
        self._uid = next(_fresh)

    # The pair -------------------------------------------------------------------------------

    def model(
        self,
        x: Rows | None = None,
        observed: Mapping[str, Tensor] | None = None,
        *,
        num_rows: int | None = None,
    ) -> Tensor:
        """Pyro model ``p(z) prod_m p(x_m | z)``, with plate ``data`` and sites ``z`` and the names.

        Private codes are sites ``w_<name>``, of every modality that has one.

        Args:
            x: Name to values ``(N, *event_shape)``. An absent modality is marginalised; None in
                place of a tensor makes it a site to be sampled, as ``obs=None`` does in Pyro.
            observed: Name to bool mask ``(*, N)``: the rows that are scored. Leading dimensions
                belong to plates around the call.
            num_rows: N, where ``x`` holds no values.

        Returns:
            The latent ``z``, ``(*, N, D)``.
        """
        batch = self.check(x, observed, num_rows=num_rows)
        self._register("model", self.generative)
        if isinstance(self.generative.prior, VampPrior):  # the encoders are part of p(z)
            self._register("guide", self, skip="generative.")
        with pyro.plate("data", batch.shape[-1], dim=-1):
            z = _sample(self.prior(batch))  # (*, N) | (D,)
            w = {name: self._sample_private(name) for name in self.private_names}
            decoded = self._decoder_input(z, batch)
            for name in self.modalities:
                self.observe(name, decoded, batch.x, batch.observed, w.get(name))
        return z

    def guide(
        self,
        x: Rows | None = None,
        observed: Mapping[str, Tensor] | None = None,
        *,
        experts: Experts | None = None,
        component: bool = False,
        private: Batch | None = None,
        num_rows: int | None = None,
    ) -> Tensor:
        """Pyro guide ``q(z | x_S)``, S the modalities that each row has; the prior if it has none.

        Private codes come from ``q(w_m | x_m)`` where S has m, and from their prior elsewhere.

        Args:
            x: As for :meth:`model`.
            observed: Name to bool mask ``(*, N)``: what the guide may see.
            experts: Result of :meth:`encode` for these rows, to encode once for many subsets.
            component: For mixtures over subsets, the component of S instead of the mixture.
            private: The checked rows that the private codes may see, where those are others.
            num_rows: N, where ``x`` holds no values.

        Returns:
            The latent ``z``, ``(*, N, D)``.
        """
        batch = self.check(x, observed, num_rows=num_rows)
        self._register("guide", self, skip="generative.")
        if experts is None and self.private_names and self._sees(private or batch):
            experts = self._encode(private or batch)
        codes = self._private(private or batch, experts)
        with pyro.plate("data", batch.shape[-1], dim=-1):
            z = _sample(self._posterior(batch, experts, component))  # (*, N) | (D,)
            for name, q in codes.items():
                pyro.sample(f"w_{name}", q)  # (*, N) | (P,)
        return z

    @property
    def latent_sites(self) -> tuple[str, ...]:
        """Names of the latent sites, in the order in which the model draws them."""
        prior = None if self.always_given else self.prior()
        sites = prior.names if isinstance(prior, Ancestral) else ("z",)
        return (*sites, *(f"w_{name}" for name in self.private_names))

    def split(self, z: Tensor) -> dict[str, Tensor]:
        """Latents by site name; ``z`` is a draw of :meth:`prior` or of a posterior, ``(*, D)``."""
        prior = None if self.always_given else self.prior()
        return prior.split(z) if isinstance(prior, Ancestral) else {"z": z}

    def prior(self, x: Rows | None = None) -> TorchDistribution:
        """``p(z)``, batch ``()``, event ``(D,)``, with an exact ``log_prob``.

        An ``Ancestral`` where z has several parts.

        Args:
            x: Values of what is always given, for a model whose prior depends on it.
        """
        if self.generative.prior is not None:
            return self.generative.prior(self)
        scale = F.softplus(self.generative.prior_raw)
        family = _FAMILIES[self.family]
        return family(self.generative.prior_loc, scale, validate_args=False).to_event(1)

    @property
    def private_names(self) -> tuple[str, ...]:
        """The modalities that have a private code."""
        return tuple(name for name, size in self.private_dims.items() if size)

    def private_prior(self, name: str) -> TorchDistribution:
        """``p(w_m)``, standard Normal (or Laplace), batch ``()``, event ``(P,)``."""
        loc = self.generative.prior_loc.new_zeros(self.private_dims[name])
        return self.diagonal(loc, loc + 1.0)

    def observe(
        self,
        name: str,
        z: Tensor,
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor | None],
        w: Tensor | None = None,
    ) -> None:
        """Writes the likelihood site of one modality, decoding only the rows that are scored.

        Args:
            name: The modality.
            z: Latents ``(*, N, D)``.
            x: Checked values, see :class:`mmzoo.batch.Batch`.
            observed: Checked masks.
            w: Private codes of the modality, ``(*, N, P)``, where it has one.
        """
        if name not in x:
            return
        value, mask = x[name], observed.get(name)
        if value is None:
            pyro.sample(name, self.likelihood(name, z, w))
            return
        if mask is not None:
            mask = mask.expand(z.shape[:-1])
            mask = None if bool(mask.all()) else mask
        if mask is None:
            fn = self._entrywise(name, self.likelihood(name, z, w), value)
        else:
            w = None if w is None else w.expand(*mask.shape, w.shape[-1])[mask]
            fn = self.likelihood(name, z[mask], w)
            if self.modalities[name].entrywise_missing:
                scored = value.expand(*mask.shape, *fn.event_shape)[mask]
                fn = self._entrywise(name, fn, scored)
            fn = ScoredRows(fn, mask)
        if self.modalities[name].entrywise_missing:
            value = self._fill_entries(name, value)
        pyro.sample(name, fn, obs=value)

    # What a model of the zoo changes ------------------------------------------------------------

    def encode(
        self,
        x: Rows,
        observed: Mapping[str, Tensor] | None = None,
    ) -> Experts:
        """Runs each encoder once, on the rows that have its modality.

        Returns:
            The experts, ``(N, M, D)``, in the order of the modalities.
        """
        return self._encode(self.check(x, observed))

    def combine(self, experts: Experts, mask: Tensor | None) -> TorchDistribution:
        """``q(z | x_S)`` from the experts, batch ``(*, N)``, event ``(D,)``.

        Args:
            experts: Result of :meth:`encode`, ``(N, E, D)``.
            mask: Who is in S, ``(*, N, M)``; None: everyone in every row. Rows without anyone get
                the prior afterwards, unless the posterior is an ``Ancestral``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it combines experts")

    def combine_component(self, experts: Experts, mask: Tensor | None) -> TorchDistribution:
        """The component of exactly S, for posteriors that are mixtures over subsets."""
        return self.combine(experts, mask)

    def objective(self, *args: Any, **options: Any) -> ELBO:
        """The objective that the model was published with; options go to its constructor."""
        raise NotImplementedError(f"{type(self).__name__} names no objective")

    def unsupported(self, of: Collection[str], given: Collection[str] = ()) -> str | None:
        """Why the model does not define ``log p(x_of | x_given)``; None if it does.

        Tables leave such a cell empty and print the reason.
        """
        return None

    def elbo(self) -> ELBO:
        """The Pyro ELBO for reparameterised posteriors: with the KL in closed form if there is one.

        ``TraceMeanField_ELBO`` for a prior whose divergence is known, ``Trace_ELBO`` for others.
        """
        return TraceMeanField_ELBO() if self._has_closed_kl() else Trace_ELBO()

    # Use --------------------------------------------------------------------------------------

    def posterior(
        self,
        x: Rows | None = None,
        observed: Mapping[str, Tensor] | None = None,
        *,
        experts: Experts | None = None,
        num_rows: int | None = None,
    ) -> TorchDistribution:
        """``q(z | x_S)`` with an exact ``log_prob``, batch ``(*, N)``, event ``(D,)``.

        Rows that observe nothing have the prior. Latents of several parts stand side by side, see
        :meth:`split`.
        """
        return self._posterior(self.check(x, observed, num_rows=num_rows), experts, False)

    def private(
        self,
        x: Rows | None = None,
        observed: Mapping[str, Tensor] | None = None,
        *,
        experts: Experts | None = None,
        num_rows: int | None = None,
    ) -> dict[str, TorchDistribution]:
        """``q(w_m | x_m)`` by name, batch ``(*, N)``, event ``(P,)``; the prior without x_m."""
        batch = self.check(x, observed, num_rows=num_rows)
        if experts is None and self.private_names and self._sees(batch):
            experts = self._encode(batch)
        return self._private(batch, experts)

    def unimodal(
        self,
        x: Rows,
        observed: Mapping[str, Tensor] | None = None,
        *,
        experts: Experts | None = None,
    ) -> tuple[TorchDistribution, Tensor]:
        """The posteriors ``q(z | x_m)`` of every modality alone.

        Returns:
            A distribution with batch ``(M, N)`` and event ``(D,)``, and the mask ``(M, N)`` of the
            rows that have each modality.
        """
        batch = self.check(x, observed)
        mask = self._full_mask(batch)  # (N, M)
        eye = torch.eye(len(self.modalities), dtype=torch.bool, device=mask.device)
        experts = self._encode(batch) if experts is None else experts
        return self._with_prior(experts, mask & eye.unsqueeze(1), True), mask.transpose(-1, -2)

    def likelihood(self, name: str, z: Tensor, w: Tensor | None = None) -> TorchDistribution:
        """``p(x_m | z, w_m)``, batch ``(*)``, event ``event_shape``.

        Args:
            name: The modality.
            z: Latents ``(*, D)``, and what else the decoder is given beside private codes.
            w: Private codes ``(*, P)``; None: drawn from their prior, if the modality has one.

        Raises:
            ValueError: For a decoder or a likelihood that does not give one density for each z.
        """
        lead = z.shape[:-1]
        if size := self.private_dims[name]:
            w = self.private_prior(name).sample(lead) if w is None else w
            if w.shape[-1] != size:
                raise ValueError(
                    f"modality {name!r}: expected private codes of size {size}, found shape "
                    f"{tuple(w.shape)}; give (*, {size})"
                )
            lead = torch.broadcast_shapes(lead, w.shape[:-1])
            z = torch.cat([z.expand(*lead, z.shape[-1]), w.expand(*lead, size)], -1)
        with self._networks():
            out = self.generative.decoders[f"{name}_"](z.reshape(-1, z.shape[-1]))
        if isinstance(out, Tensor):
            out = self._full(out.reshape(*lead, *out.shape[1:]))
        else:
            out = tuple(self._full(part.reshape(*lead, *part.shape[1:])) for part in out)
        likelihood: Any = self.generative.likelihoods[f"{name}_"]
        shape = self.modalities[name].event_shape
        p = likelihood(out, shape, where=f"modality {name!r}")
        if p.batch_shape != lead:  # it would broadcast against the rows, to another sum
            found = [tuple(out.shape)] if isinstance(out, Tensor) else [tuple(o.shape) for o in out]
            expected = [(*lead, *each) for each in likelihood.param_shapes(shape).values()]
            raise ValueError(
                f"modality {name!r}: expected a density of batch shape {tuple(lead)} from its "
                f"decoder and likelihood, found {tuple(p.batch_shape)}; the decoder gave "
                f"{_listed(found)}, let it give {_listed(expected)} (nn.Flatten(0) last, for one "
                "number), and the likelihood one density for each row"
            )
        return p

    def with_prior(self, prior: PriorSpec) -> Self:
        """A copy of the model with a fresh prior of another kind, everything else as it is.

        Raises:
            ValueError: For a model that takes no other prior.
        """
        _check_takes_prior(type(self))
        other = copy.deepcopy(self)
        other.options = {**self.options, "prior": prior_config(prior)}
        other._set_prior(prior, learned=False)
        before = self.generative.prior_loc
        other.to(device=before.device, dtype=before.dtype)
        return other

    def decode(
        self,
        z: Tensor,
        w: Mapping[str, Tensor] | None = None,
        *,
        x: Rows | None = None,
    ) -> dict[str, TorchDistribution]:
        """``p(x_m | z, w_m)`` of every modality that the model scores.

        Args:
            z: Latents ``(*, D)``.
            w: Name to private codes ``(*, P)``; those that are missing are drawn from their prior.
            x: Values of what is always given, for a model that is conditional.
        """
        w = w or {}
        modality_names(self.private_names, w, "decode w")
        if self.always_given:
            z = self._decoder_input(z, self.check(x))
        scored = [name for name in self.modalities if name not in self.always_given]
        return {name: self.likelihood(name, z, w.get(name)) for name in scored}

    @torch.no_grad()
    def generate(
        self,
        x: Rows | None = None,
        observed: Mapping[str, Tensor] | None = None,
        *,
        num_samples: int | None = None,
        num_rows: int | None = None,
        mean: bool = False,
    ) -> dict[str, Tensor]:
        """Draws every modality from whatever is observed.

        Args:
            x: Name to values ``(N, *event_shape)``; ``{}`` observes nothing.
            observed: Name to bool mask ``(N,)``.
            num_samples: Draws for each row; None: one, without a leading dimension.
            num_rows: N, where nothing is observed.
            mean: Whether to give the mean of ``p(x_m | z)`` for each drawn z instead of a draw;
                for class labels the probabilities of the classes.

        Returns:
            Name to ``((num_samples,) N, *event_shape)``; what is always given comes back as it is.
        """
        batch = self.check(x, observed, num_rows=num_rows)
        experts = self._encode(batch) if self._sees(batch) else None
        lead = () if num_samples is None else (num_samples,)
        z = self.posterior(batch, experts=experts).sample(lead)
        w = {name: q.sample(lead) for name, q in self._private(batch, experts).items()}
        decoded = self.decode(z, w, x=batch)
        found = {name: mean_or_probs(p) if mean else p.sample() for name, p in decoded.items()}
        for name in self.always_given:
            value = batch.x[name]
            assert value is not None
            found[name] = value.expand(*lead, *value.shape)
        return {name: found[name] for name in self.modalities}

    def check(
        self,
        x: Rows | None,
        observed: Mapping[str, Tensor] | None = None,
        *,
        num_rows: int | None = None,
    ) -> Batch:
        """The batch, checked against the modalities; see :func:`mmzoo.batch.check_batch`.

        A :class:`~mmzoo.batch.Batch` in the place of ``x`` was checked before.
        """
        if isinstance(x, Batch):
            return x
        dtype = self.generative.prior_loc.dtype
        return check_batch(self.modalities, x, observed, num_rows=num_rows, dtype=dtype)

    @contextmanager
    def unregistered(self) -> Iterator[None]:
        """Within it, the pair leaves Pyro's parameter store alone (its owner has an optimiser)."""
        before, self._registers = self._registers, False
        try:
            yield
        finally:
            self._registers = before

    @contextmanager
    def mixed_networks(self) -> Iterator[None]:
        """Within it, autocast is for encoders and decoders, and for nothing between or behind."""
        device = self.generative.prior_loc.device.type
        if not torch.is_autocast_enabled(device):
            yield
            return
        before, self._mixed = self._mixed, torch.get_autocast_dtype(device)
        try:
            with torch.autocast(device, enabled=False):
                yield
        finally:
            self._mixed = before

    # Saving -------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as plain data."""
        return {
            "format": _FORMAT,
            "model": self.name,
            "latent_dim": self.latent_dim,
            "options": self.options,
            "modalities": [modality.config() for modality in self.modalities.values()],
        }

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``config.json`` and ``model.safetensors``; nothing is pickled.

        Each file is written beside its place and then moved there, so that none is ever half done.
        """
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {key: value.contiguous().clone() for key, value in self.state_dict().items()}
        save_file(weights, directory / "model.safetensors.part")
        (directory / "config.json.part").write_text(json.dumps(self.config(), indent=2) + "\n")
        for file in ("model.safetensors", "config.json"):
            os.replace(directory / f"{file}.part", directory / file)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        modalities: Sequence[Modality] | None = None,
        prior: PriorSpec | None = None,
    ) -> Self:
        """Reads what :meth:`save_pretrained` wrote.

        Args:
            directory: The folder.
            modalities: The modalities, needed where they hold networks or likelihoods of your own;
                otherwise as they were saved.
            prior: The prior, needed where it is one of your own.

        Raises:
            ValueError: For a missing, corrupt or foreign checkpoint, or a model that takes no other
                prior.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = _read_config(Path(directory))
        if config["model"] != cls.name:
            raise ValueError(
                f"checkpoint {directory}: expected a {cls.name!r} model, found "
                f"{config['model']!r}; load it with mmzoo.models.MODELS[{config['model']!r}]"
            )
        if prior is not None:
            _check_takes_prior(cls)
        try:
            if modalities is None:
                modalities = [Modality.from_config(each) for each in config["modalities"]]
            else:
                _check_as_saved(directory, config["modalities"], modalities)
            own = {} if prior is None else {"prior": prior}
            vae = cls(modalities, config["latent_dim"], **{**config["options"], **own})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"checkpoint {directory}: expected a config.json with the options of {cls.title}, "
                f"found others ({error}); load it with the version of mmzoo that saved it"
            ) from error
        try:
            weights = load_file(Path(directory) / "model.safetensors")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"checkpoint {directory}: expected weights in model.safetensors, found none that "
                f"can be read ({error}); save the model again"
            ) from error
        try:
            floating = [value for value in weights.values() if value.is_floating_point()]
            vae.to(next(iter(floating), vae.generative.prior_loc).dtype)
            vae.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
            raise ValueError(
                f"checkpoint {directory}: its weights do not fit its config.json ({reason}); "
                "save the model again, or pass the modalities it was built with"
            ) from error
        return vae

    @classmethod
    def option_names(cls) -> set[str]:
        """Keyword arguments of the constructor, those that it hands on to the base included."""
        return {
            parameter.name
            for owner in _constructors(cls)
            for parameter in inspect.signature(owner).parameters.values()
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        } - {"self", "modalities", "latent_dim", "expert_dim"}

    @property
    def has_gaussian_experts(self) -> bool:
        """Whether every ``q(z | x_m)`` is a Gaussian, so that distances have closed forms."""
        return self.family == "normal"

    @property
    def has_diagonal_experts(self) -> bool:
        """Whether every ``q(z | x_m)`` has a location and a scale for each dimension."""
        return not self.exact_posterior and (self.family != "normal" or self.has_gaussian_experts)

    # Private --------------------------------------------------------------------------------------

    def _add_modality(self, key: str, modality: Modality) -> None:
        """Builds the networks of one modality."""
        encoder = modality.make_encoder()
        likelihood = modality.make_likelihood()
        features = feature_size(
            encoder, modality.event_shape, likelihood, where=f"modality {key!r}: encoder"
        )
        private = self.private_dims[key]
        own = self._separate_encoders and private > 0
        size = self.latent_dim if own else self.latent_dim + private
        self.experts[f"{key}_"] = (
            Features(encoder, features or 2 * self.latent_dim, self.expert_dim)
            if self._combines_features
            else Expert(encoder, features, size)
        )
        if own:
            self.private_experts[f"{key}_"] = Expert(modality.make_encoder(), features, private)
        decoder = modality.make_decoder(self._decoder_size() + private)
        self.generative.decoders[f"{key}_"] = decoder
        self.generative.likelihoods[f"{key}_"] = likelihood

    def _set_prior(self, prior: PriorSpec | None, learned: bool) -> None:
        spec = ("learned" if learned else "standard") if prior is None else prior
        module = make_prior(spec, self.latent_dim, self.family, self.modalities)
        learned = prior_config(spec) in ("learned", {"kind": "learned"})
        self.generative.set_prior(self.latent_dim, learned=learned, prior=module)

    def _has_closed_kl(self) -> bool:
        if self.generative.prior is None:
            return True
        if not isinstance(self.generative.prior, OwnPrior):
            return False
        loc = torch.zeros_like(self.generative.prior_loc)
        try:
            with torch.no_grad():
                kl_divergence(self.diagonal(loc, loc + 1.0), self.prior())
        except NotImplementedError:
            return False
        return True

    def _decoder_size(self) -> int:
        """Size of the decoders' input."""
        return self.latent_dim

    def _decoder_input(self, z: Tensor, batch: Batch) -> Tensor:
        """What the decoders are given: latents ``(*, N, D)``, and whatever stands beside them."""
        return z

    def _networks(self) -> AbstractContextManager[Any]:
        if self._mixed is None:
            return nullcontext()
        return torch.autocast(self.generative.prior_loc.device.type, dtype=self._mixed)

    def _full(self, out: Tensor) -> Tensor:
        """What a network gave, in the model's precision: densities in another are on a grid."""
        return out.to(self.generative.prior_loc.dtype)

    def _expert_of(
        self, name: str, value: Tensor, batch: Batch, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Runs one encoder on the rows of the batch with this index; None: all of them."""
        return self.experts[f"{name}_"](value)

    def _register(self, part: str, module: nn.Module, *, skip: str | None = None) -> None:
        # pyro.module would warn of every frozen parameter; this registers only trainable ones.
        if not self._registers:
            return
        for key, value in module.named_parameters():
            if value.requires_grad and not (skip and key.startswith(skip)):
                pyro.param(f"{type(self).__name__}_{self._uid}_{part}$$${key}", value)

    def _full_mask(self, batch: Batch) -> Tensor:
        mask = batch.mask(self.modalities)
        if mask is not None:
            return mask
        shape = (*batch.shape, len(self.modalities))
        return torch.ones(shape, dtype=torch.bool, device=batch.device)

    def _sees(self, batch: Batch) -> bool:
        """Whether any row has any modality."""
        mask = batch.mask(self.modalities)
        return mask is None or bool(mask.any())

    def _sample_private(self, name: str) -> Tensor:
        return pyro.sample(f"w_{name}", self.private_prior(name))  # (*, N) | (P,)

    def _private(self, batch: Batch, experts: Experts | None) -> dict[str, TorchDistribution]:
        """``q(w_m | x_m)`` in rows that have the modality, the prior elsewhere."""
        found = {}
        for name in self.private_names:
            if experts is None or not batch.has(name):
                found[name] = self.private_prior(name).expand(batch.shape)
                continue
            if not experts.private:  # made by hand: what they say of z alone
                experts = Experts(*experts, self._encode(batch).private)
            loc, scale = experts.private[name]
            mask = batch.observed.get(name)
            if mask is not None:
                loc = torch.where(mask.unsqueeze(-1), loc, 0.0)
                scale = torch.where(mask.unsqueeze(-1), scale, 1.0)
            shape = (*batch.shape, loc.shape[-1])
            found[name] = self.diagonal(loc.expand(shape), scale.expand(shape))
        return found

    def _encode(self, batch: Batch) -> Experts:
        dim, locs, scales, private = self.expert_dim, [], [], {}
        for name, size in self.private_dims.items():
            own = f"{name}_" in self.private_experts
            loc, scale = self._expert(name, batch, self.experts, dim + (0 if own else size))
            if own:
                private[name] = self._expert(name, batch, self.private_experts, size)
            elif size:
                private[name] = (loc[..., dim:], scale[..., dim:])
            locs.append(loc[..., :dim])
            scales.append(scale[..., :dim])
        return Experts(torch.stack(locs, -2), torch.stack(scales, -2), private)

    def _expert(
        self, name: str, batch: Batch, networks: nn.ModuleDict, size: int
    ) -> tuple[Tensor, Tensor]:
        """One expert ``(N, size)``; N(0, 1) in rows that lack the modality."""
        rows, value = batch.shape[-1], batch.x.get(name)
        blank = self.generative.prior_loc.new_zeros(rows, size)
        if value is None:
            return blank, blank + 1.0
        shape = (rows, *self.modalities[name].event_shape)
        if value.shape != shape:
            raise ValueError(
                f"modality {name!r}: expected values of shape {shape} for its encoder, found "
                f"{tuple(value.shape)}; make one row of each value"
            )
        if self.modalities[name].entrywise_missing:
            value = self._fill_entries(name, value)
        mask = batch.observed.get(name)
        if mask is not None:
            mask = mask.expand(*mask.shape[:-1], rows).reshape(-1, rows).any(0)
        index = None
        if mask is not None and not bool(mask.all()):
            index = mask.nonzero().squeeze(-1)
        seen = value if index is None else value[index]
        with self._networks():
            if networks is self.experts:
                loc, scale = self._expert_of(name, seen, batch, index)
            else:
                loc, scale = networks[f"{name}_"](seen)
        loc, scale = self._full(loc), self._full(scale)
        if loc.shape[-1] != size:
            raise ValueError(
                f"modality {name!r}: expected {size} entries of loc and scale from its encoder, "
                f"found {loc.shape[-1]}; give latent_dim entries, and then private_dim entries"
            )
        network = networks[f"{name}_"]
        if isinstance(network, Expert) and network.head is None and is_validation_enabled():
            _check_scale(name, scale)
        if index is None:
            return loc, scale
        return blank.index_copy(0, index, loc), (blank + 1.0).index_copy(0, index, scale)

    def _posterior(
        self, batch: Batch, experts: Experts | None, component: bool
    ) -> TorchDistribution:
        mask = batch.mask(self.modalities)
        if mask is not None and not bool(mask.any()):
            return self.prior().expand(batch.shape)
        experts = self._encode(batch) if experts is None else experts
        return self._with_prior(experts, mask, component)

    def _with_prior(
        self, experts: Experts, mask: Tensor | None, component: bool
    ) -> TorchDistribution:
        """Combines, and puts the prior where a row has nothing to combine."""
        q = (self.combine_component if component else self.combine)(experts, mask)
        if mask is None or isinstance(q, Ancestral):
            return q
        empty = ~mask.any(-1)
        if not bool(empty.any()):
            return q
        prior = self.prior()
        if isinstance(q, Mixture):
            if type(q) is not Mixture and _is_diagonal(prior, q.family):
                where, base = empty[..., None, None], prior.base_dist
                loc = torch.where(where, base.loc, q.loc)
                return q.like(q.log_weights, loc, torch.where(where, base.scale, q.scale))
            found = _as_mixture(prior, q.family)
            if type(q) is Mixture and found is not None:
                return _mixture_with_prior(q, found, empty)
        elif _is_diagonal(prior, _FAMILIES[self.family]) and hasattr(q, "base_dist"):
            base, where = q.base_dist, empty.unsqueeze(-1)
            loc = torch.where(where, prior.base_dist.loc, base.loc)
            return self.diagonal(loc, torch.where(where, prior.base_dist.scale, base.scale))
        return PriorRows(prior, q, empty)

    def diagonal(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """The posterior family with these parameters, batch ``(*)``, event ``(D,)``."""
        return _FAMILIES[self.family](loc, scale, validate_args=False).to_event(1)

    def mixture(self, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Mixture:
        """A mixture of the posterior family; weights ``(*, C)``, parameters ``(*, C, D)``."""
        return Mixture(log_weights, loc, scale, family=_FAMILIES[self.family])

    def _fill_entries(self, name: str, value: Tensor) -> Tensor:
        modality = self.modalities[name]
        filler = modality.likelihood.filler(modality.event_shape, value.dtype, value.device)
        return torch.where(value.isnan(), filler, value)

    def _entrywise(self, name: str, fn: TorchDistribution, value: Tensor) -> TorchDistribution:
        """The likelihood with single missing entries (NaN) of observed rows left out."""
        if not self.modalities[name].entrywise_missing:
            return fn
        entries = len(self.modalities[name].event_shape)
        base = fn.base_dist if entries else fn
        return base.mask(~value.isnan()).to_event(entries)


def _private_dims(
    private_dim: int | Mapping[str, int], modalities: Mapping[str, Modality]
) -> dict[str, int]:
    """The size of each modality's private code."""
    if isinstance(private_dim, int):
        private_dim = dict.fromkeys(modalities, private_dim)
    modality_names(modalities, private_dim, "private_dim")
    for name, size in private_dim.items():
        if size < 0:
            raise ValueError(
                f"private_dim: expected at least 0 for modality {name!r}, found {size}; 0 leaves "
                "it without a private code"
            )
    return {name: private_dim.get(name, 0) for name in modalities}


def _plain(value: Any) -> Any:
    """Integers of numpy as Python's, which JSON knows, in dicts too."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


def _check_scale(name: str, scale: Tensor) -> None:
    """Rejects what is no scale, such as the logarithm of a variance."""
    if bool((scale <= 0).any()):
        raise ValueError(
            f"modality {name!r}: expected positive scales from its encoder, found "
            f"{scale.min().item():g}; return softplus(raw) or (0.5 * logvar).exp() in its place"
        )


def _sample(q: TorchDistribution) -> Tensor:
    """The latents of a prior or a posterior, at the site z or at a site for each of their parts."""
    return q.draw(pyro.sample) if isinstance(q, Ancestral) else pyro.sample("z", q)


def _is_diagonal(p: TorchDistribution, family: type) -> bool:
    independent = isinstance(p, torch.distributions.Independent)
    return independent and isinstance(p.base_dist, family) and not p.batch_shape


def _as_mixture(p: TorchDistribution, family: type) -> Mixture | None:
    """A prior of this family as a mixture with batch ``()``; None if it is none."""
    if isinstance(p, Mixture):
        return p if p.family is family else None
    if not _is_diagonal(p, family):
        return None
    loc, scale = p.base_dist.loc, p.base_dist.scale
    return Mixture(loc.new_zeros(1), loc.unsqueeze(-2), scale.unsqueeze(-2), family=family)


def _mixture_with_prior(q: Mixture, prior: Mixture, empty: Tensor) -> Mixture:
    """The prior's components in the empty rows, in as many places as either needs."""
    where, log_w, family = empty[..., None, None], q.log_weights, q.family
    if len(prior.log_weights) > 1:  # otherwise every component of an empty row is the prior
        num = max(len(prior.log_weights), log_w.shape[-1])
        prior, q = _padded(prior, num), _padded(q, num)
        log_w = torch.where(empty.unsqueeze(-1), prior.log_weights, q.log_weights)
    loc = torch.where(where, prior.loc, q.loc)
    return Mixture(log_w, loc, torch.where(where, prior.scale, q.scale), family=family)


def _padded(q: Mixture, num: int) -> Mixture:
    """The same mixture with absent components, up to ``num`` of them."""
    more = num - q.log_weights.shape[-1]
    log_w = F.pad(q.log_weights, (0, more), value=-torch.inf)
    loc, scale = F.pad(q.loc, (0, 0, 0, more)), F.pad(q.scale, (0, 0, 0, more), value=1.0)
    return Mixture(log_w, loc, scale, family=q.family)


def _constructors(cls: type[MultimodalVAE]) -> Iterator[Any]:
    """The constructors that a class runs through, while each takes further arguments."""
    for owner in cls.__mro__:
        if "__init__" in vars(owner) and issubclass(owner, MultimodalVAE):
            yield vars(owner)["__init__"]
            parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                return


def _check_options(cls: type[MultimodalVAE], options: Mapping[str, Any]) -> None:
    """Rejects what no constructor of the class or of those above it has a name for."""
    known = {
        name
        for owner in cls.__mro__
        if "__init__" in vars(owner) and issubclass(owner, MultimodalVAE)
        for name in inspect.signature(vars(owner)["__init__"]).parameters
    }
    if unknown := sorted(set(options) - known):
        names = ", ".join(sorted(cls.option_names())) or "none"
        raise TypeError(f"{cls.title}: unknown option {unknown[0]!r}; its options: {names}")


def _check_takes_prior(cls: type[MultimodalVAE]) -> None:
    if "prior" not in cls.option_names():
        raise ValueError(
            f"{cls.title}: expected a model that takes prior=…, found one whose prior is part of "
            f"it; its options: {', '.join(sorted(cls.option_names())) or 'none'}"
        )


def _check_family(cls: type[MultimodalVAE], family: str) -> None:
    if family not in _FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(_FAMILIES)}, found {family!r}")
    if family not in cls.families:
        raise ValueError(
            f"{cls.title}: expected family {' or '.join(map(repr, cls.families))}, found "
            f"{family!r}; its experts are combined in a way that is closed for Gaussians only (a "
            "product of Laplace densities is none): use a mixture, such as mmvae, or a vae"
        )


def modalities_by_name(
    modalities: Sequence[Modality], cls: type[MultimodalVAE]
) -> dict[str, Modality]:
    """The modalities by name, checked against the limits of a model."""
    for modality in modalities:
        if not isinstance(modality, Modality):
            raise TypeError(
                f"modalities: expected Modality objects, found {type(modality).__name__}"
            )
    by_name = {modality.name: modality for modality in modalities}
    if len(by_name) < len(modalities):
        names = ", ".join(modality.name for modality in modalities)
        raise ValueError(f"modalities: expected different names, found {names}")
    most = cls.max_modalities
    if len(by_name) < cls.min_modalities or (most is not None and len(by_name) > most):
        least = cls.min_modalities
        span = f"at least {least}" if most is None else f"{least} to {most}"
        span = f"{least}" if most == least else span
        noun = "modality" if span.endswith(" 1") or span == "1" else "modalities"
        raise ValueError(
            f"{cls.title}: expected {span} {noun}, found {len(by_name)}; "
            "see `mmzoo models` for what each model takes"
        )
    return by_name


def _check_as_saved(
    directory: str | os.PathLike[str],
    saved: Sequence[Mapping[str, Any]],
    modalities: Sequence[Modality],
) -> None:
    """Refuses modalities that would give the weights another meaning.

    Raises:
        ValueError: Where something differs that is not a network or likelihood of the user's own.
    """
    names = [each["name"] for each in saved], [each.name for each in modalities]
    if names[0] != names[1]:
        raise ValueError(
            f"checkpoint {directory}: expected the modalities {', '.join(names[0])} in this order, "
            f"found {', '.join(names[1])}"
        )
    for before, modality in zip(saved, modalities, strict=True):
        now = json.loads(json.dumps(modality.config()))
        for what, value in before.items():
            own = isinstance(value, Mapping) and value.get("custom")
            if not own and now.get(what) != value:
                raise ValueError(
                    f"checkpoint {directory}: modality {modality.name!r} was saved with {what} "
                    f"{value}, found {now.get(what)}; pass the modalities it was saved with"
                )


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text())
        missing = {"model", "latent_dim", "options", "modalities"} - set(config)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"checkpoint {directory}: expected a folder with config.json and model.safetensors, "
            f"found none that can be read ({error}); name the folder of save_pretrained"
        ) from error
    if missing:
        raise ValueError(
            f"checkpoint {directory}: config.json lacks {', '.join(sorted(missing))}; it was not "
            "written by save_pretrained"
        )
    if config.get("format", _FORMAT) != _FORMAT:
        raise ValueError(
            f"checkpoint {directory}: expected a config.json of format {_FORMAT}, found "
            f"{config['format']!r}; load it with the version of mmzoo that saved it"
        )
    return config
