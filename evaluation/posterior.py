r"""What a posterior says, modality by modality: contraction, divergence, activity, agreement.

Of every subset S of the modalities, over the rows that have all of S,

    contraction     1 - Var q(z_d | x_S) / Var p(z_d)               1: known, 0: as the prior
    activity        Var_x E_q[z_d | x_S]                            a unit is active above 0.01
    divergence      KL(q(z_d | x_S) || p(z_d))                      nats; near 0: collapsed

each in closed form where the distributions allow it, from draws otherwise. Of every modality,
which share it has in the likelihood and in its gradients; of every two, how far their posteriors
are apart.

Toward a Principled Bayesian Workflow (Betancourt, 2018), for contraction,
https://betanalpha.github.io/assets/case_studies/principled_bayesian_workflow.html
Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2015), for active units,
https://arxiv.org/abs/1509.00519
Don't Blame the ELBO! (Lucas et al., 2019), for posterior collapse, https://arxiv.org/abs/1911.02469
Mitigating Modality Collapse in Multimodal VAEs via Impartial Optimization (Javaloy, Meghdadi &
Valera, 2022), for the gradients of the modalities, https://arxiv.org/abs/2206.04496
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, kl_divergence

from mmzoo import combine
from mmzoo.distributions import FlowMixture, Mixture
from mmzoo.evaluation.pair import Pair, check_continuous, device_of, quiet, row_masks
from mmzoo.evaluation.scored import (
    Shown,
    Site,
    blocks,
    find_subsets,
    flatten,
    latent_names,
    mean_and_error,
    unflatten,
)
from mmzoo.inference.draws import draw, latent_values, log_joint
from mmzoo.vae import MultimodalVAE

__all__ = [
    "active_units",
    "contraction",
    "kl_per_dimension",
    "modality_shares",
    "posterior_agreement",
    "sliced_wasserstein",
]

# Draws of a prior whose variance is not known.
_PRIOR_DRAWS = 10_000
_DIRECTIONS = 64

Array = np.ndarray
Program = Callable[..., Any]
Progress = Callable[[int, int], None]
Subsets = Iterable[str | Sequence[str]]


# Moments, contraction, activity -------------------------------------------------------------------


def contraction(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    given: Subsets | None = None,
    num_draws: int = 100,
    guide: Program | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> xr.Dataset:
    """How much narrower than the prior the posterior is, as modalities arrive.

    Args:
        pair: A model of the zoo or a pair of your own.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        given: Subsets; default: every non-empty one, or each modality alone and all together if
            there are more than three.
        num_draws: Draws of each row and subset, where the variance is not known in closed form.
        guide: A Pyro guide over the same sites, in place of the pair's own.
        seed: Of the draws.
        on_progress: Called with the rows done and the rows in all, subsets together.

    Returns:
        ``contraction`` (subset, latent), the mean over the rows that have all of the subset, and
        its ``standard_error``; ``size_contraction`` (size, latent), averaged over the subsets of
        one size that a row has, and ``size_standard_error``; ``num_rows`` (subset).

    Raises:
        ValueError: For unknown names, a bad batch, or a subset that the pair does not answer for.
    """
    subsets = find_subsets(pair, given, "contraction")
    run = _Run(pair, x, observed, guide, num_draws, seed)
    found = run.of_subsets(subsets, _contraction_of, on_progress)
    mean, error = mean_and_error(found, 1)
    sizes = np.array([len(subset) for subset in subsets.values()])
    by_size = [mean_and_error(found[sizes == size])[0] for size in np.unique(sizes)]
    size_mean, size_error = mean_and_error(np.stack(by_size), 1)
    dims = ("subset", "latent")
    return xr.Dataset(
        {
            "contraction": (dims, mean),
            "standard_error": (dims, error),
            "size_contraction": (("size", "latent"), size_mean),
            "size_standard_error": (("size", "latent"), size_error),
            "num_rows": ("subset", _rows_in(found)),
        },
        coords={"subset": list(subsets), "latent": run.latents, "size": np.unique(sizes)},
        attrs=run.settings("share of the prior variance"),
    )


def active_units(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    given: Subsets | None = None,
    threshold: float = 0.01,
    num_draws: int = 100,
    guide: Program | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> xr.Dataset:
    """Which latent dimensions move with the data: ``Var_x E_q[z_d | x_S]`` above a threshold.

    Args:
        pair: A model of the zoo or a pair of your own.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        given: Subsets, as for :func:`contraction`.
        threshold: Least variance of an active unit, in squared units of the latent.
        num_draws: Draws of each row and subset, where the mean is not known in closed form; what
            their noise adds to the variance is taken off.
        guide: A Pyro guide over the same sites, in place of the pair's own.
        seed: Of the draws.
        on_progress: Called with the rows done and the rows in all, subsets together.

    Returns:
        ``variance`` (subset, latent) over the rows that have all of the subset, its
        ``standard_error``, ``active`` (subset, latent), ``num_active`` and ``num_rows`` (subset).

    Raises:
        ValueError: As :func:`contraction`.
    """
    subsets = find_subsets(pair, given, "active_units")
    run = _Run(pair, x, observed, guide, num_draws, seed)
    found = run.of_subsets(subsets, _means_of, on_progress)  # (subset, N, 2 T)
    mean, noise = np.split(found, 2, -1)
    count = _rows_in(found)[:, None]
    center = mean_and_error(mean, 1)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = (mean - center[:, None]) ** 2 * (count / (count - 1.0))[:, None] - noise
    variance, error = mean_and_error(squares, 1)
    dims = ("subset", "latent")
    active = variance > threshold
    return xr.Dataset(
        {
            "variance": (dims, variance),
            "standard_error": (dims, error),
            "active": (dims, active),
            "num_active": ("subset", active.sum(-1)),
            "num_rows": ("subset", count[:, 0]),
        },
        coords={"subset": list(subsets), "latent": run.latents},
        attrs={**run.settings("squared units of the latent"), "threshold": threshold},
    )


def _contraction_of(run: _Run, shown: Shown, x: dict[str, Tensor]) -> Tensor:
    prior = run.prior_variance(shown, x)
    return 1 - _moments(shown, run.num_draws, closed=run.closed)[1] / prior


def _means_of(run: _Run, shown: Shown, x: dict[str, Tensor]) -> Tensor:
    mean, _, noise = _moments(shown, run.num_draws, closed=run.closed)
    return torch.cat([mean, noise], -1)


def _moments(shown: Shown, num_draws: int, *, closed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance ``(N, T)``, and the variance of the mean's own error."""
    sites = shown.sites(1).values() if closed else ()
    known = _closed_moments([site.guide for site in sites], shown.num_rows)
    if known is not None:
        return *known, torch.zeros_like(known[0])
    z = flatten(shown.draw(num_draws))
    return z.mean(0), z.var(0), z.var(0) / num_draws


def _closed_moments(fns: Sequence[Any], num_rows: int) -> tuple[Tensor, Tensor] | None:
    """Mean and variance ``(N, T)`` of independent sites; None if one is not known."""
    family = torch.distributions
    known = (Independent, Mixture, family.MultivariateNormal, family.Normal, family.Laplace)
    if not fns or any(not isinstance(fn, known) or isinstance(fn, FlowMixture) for fn in fns):
        return None
    try:
        moments = [(fn.mean, fn.variance) for fn in fns]
    except NotImplementedError:
        return None
    mean, variance = (
        torch.cat([_rows_of(part, fn, num_rows) for part, fn in zip(parts, fns, strict=True)], -1)
        for parts in zip(*moments, strict=True)
    )
    return mean, variance


def _rows_of(value: Tensor, fn: Any, num_rows: int) -> Tensor:
    """A parameter of a site with batch ``(1, N)``, or less, as ``(N, T)``."""
    return value.expand(1, num_rows, *fn.event_shape).reshape(num_rows, -1)


class _Run:
    """One pass of some function of posteriors over subsets and rows, in flat memory."""

    def __init__(
        self,
        pair: Pair,
        x: Mapping[str, Tensor],
        observed: Mapping[str, Tensor] | None,
        guide: Program | None,
        num_draws: int,
        seed: int,
    ) -> None:
        if num_draws < 2:
            raise ValueError(
                f"num_draws: expected at least 2 for a variance, found {num_draws}; 100, say"
            )
        self.pair, self.guide, self.num_draws, self.seed = pair, guide, num_draws, seed
        self.x, self.masks, self.num_rows = row_masks(pair, x, observed)
        self.device = device_of(pair)
        self.closed = _is_closed(pair, guide)
        self.latents: list[str] = []

    def settings(self, units: str) -> dict[str, Any]:
        """Attributes of a result."""
        return {
            "title": self.pair.title,
            "num_draws": self.num_draws,
            "seed": self.seed,
            "units": units,
        }

    def rows(
        self, names: Iterable[str], index: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values and masks of some modalities in some rows."""
        here = {
            n: self.x[n][index.to(self.x[n].device)].to(self.device) for n in names if n in self.x
        }
        return here, {
            n: self.masks[n][index.to(self.masks[n].device)].to(self.device) for n in here
        }

    def of_subsets(
        self,
        subsets: Mapping[str, tuple[str, ...]],
        function: Callable[[_Run, Shown, dict[str, Tensor]], Tensor],
        on_progress: Progress | None,
    ) -> Array:
        """A function of the rows that have all of each subset, ``(subset, N, ...)``; else NaN."""
        done, total = 0, self.num_rows * len(subsets)
        found: list[Array] = []
        with quiet(self.pair, self.seed):
            for subset in subsets.values():
                parts: list[tuple[Array, Array]] = []
                for index in self._complete(subset):
                    x, masks = self.rows(subset, index)
                    shown = Shown(self.pair, x, masks, self.guide)
                    if not self.latents:
                        self.latents = latent_names({n: s.value for n, s in shown.sites(1).items()})
                    value = function(self, shown, x)
                    parts.append((index.cpu().numpy(), value.double().cpu().numpy()))
                    if on_progress:
                        on_progress(done + int(index[-1]) + 1, total)
                done += self.num_rows
                found.append(self._scatter(parts))
        width = max(each.shape[-1] for each in found)
        if width == 0:
            raise ValueError(
                f"posterior: expected rows that have all of one of {', '.join(subsets)}, found "
                "none; name smaller subsets in given"
            )
        full = [e if e.shape[-1] else np.full((self.num_rows, width), np.nan) for e in found]
        return np.stack(full)

    def _complete(self, subset: Iterable[str]) -> Iterator[Tensor]:
        """Indices of the rows that have all of a subset, block by block."""
        index = torch.stack([self.masks[name] for name in subset]).all(0).nonzero().squeeze(-1)
        for block in blocks(len(index), self.num_draws, self.device):
            yield index[block]

    def _scatter(self, parts: Sequence[tuple[Array, Array]]) -> Array:
        width = parts[0][1].shape[-1] if parts else 0
        full = np.full((self.num_rows, width), np.nan)
        for index, value in parts:
            full[index] = value
        return full

    def prior_variance(self, shown: Shown, x: dict[str, Tensor]) -> Tensor:
        """Variance of each latent under the prior, ``(N, T)`` or ``(1, T)``."""
        sites = shown.sites(1).values() if _is_closed(self.pair, None) else ()
        known = _closed_moments([site.prior for site in sites], shown.num_rows)
        if known is not None:
            return known[1]
        always = {name: x[name] for name in self.pair.always_given}
        size = (self.num_draws, shown.num_rows) if always else (10, _PRIOR_DRAWS // 10)
        drawn = draw(self.pair.model, always, None, size[0], stratified=False, num_rows=size[1])
        z = flatten(latent_values(drawn))
        return z.var(0) if always else z.flatten(0, 1).var(0, keepdim=True)


def _is_closed(pair: Pair, guide: Program | None) -> bool:
    """Whether no latent site depends on the draw of another, so that its moments are marginal.

    The private codes of a model of the zoo are independent of what it shares.
    """
    sites = list(pair.latent_sites)
    if isinstance(pair, MultimodalVAE) and guide is None:
        sites = [name for name in sites if not name.startswith("w_")]
    return len(sites) == 1


def _rows_in(found: Array) -> Array:
    """Number of rows of each subset."""
    return (~np.isnan(found[..., 0])).sum(1)


# Divergence from the prior ------------------------------------------------------------------------


def kl_per_dimension(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    given: Subsets | None = None,
    threshold: float = 0.01,
    num_draws: int = 100,
    guide: Program | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> xr.Dataset:
    """``KL(q(z_d | x_S) || p(z_d))`` of every latent dimension, and which of them collapsed.

    Of latents that are drawn one after another, each given those before it. Dimensions of one site
    that the posterior or the prior couples (a mixture, a full covariance) are looked at one by one,
    by their marginals; where these are not known either, as of a flow, they are NaN, and do not
    count in the share that collapsed.

    Args:
        pair: A model of the zoo or a pair of your own.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        given: Subsets, as for :func:`contraction`.
        threshold: Divergence below which a dimension counts as collapsed, in nats.
        num_draws: Draws of each row and subset, for what has no closed form.
        guide: A Pyro guide over the same sites, in place of the pair's own.
        seed: Of the draws.
        on_progress: Called with the rows done and the rows in all, subsets together.

    Returns:
        ``kl`` (subset, latent) in nats, the mean over the rows that have all of the subset, its
        ``standard_error`` over rows and ``mcse``, the part of it that is Monte Carlo error (0 for
        a closed form); ``collapsed`` (subset, latent); of all latents together ``total``,
        ``total_error`` and ``total_mcse``; ``collapsed_share`` and ``num_rows`` (subset).

    Raises:
        ValueError: As :func:`contraction`.
    """
    subsets = find_subsets(pair, given, "kl_per_dimension")
    run = _Run(pair, x, observed, guide, num_draws, seed)
    found = run.of_subsets(subsets, _divergences_of, on_progress)  # (subset, N, 2 (T + 1))
    values, variances = np.split(found, 2, -1)
    mean, error = mean_and_error(values, 1)
    count = _rows_in(values[..., -1:])[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        mcse = np.sqrt(np.nansum(variances, 1)) / count
    mcse = np.where(np.isnan(mean), np.nan, mcse)
    dims = ("subset", "latent")
    collapsed, known = mean[:, :-1] < threshold, ~np.isnan(mean[:, :-1])
    with np.errstate(invalid="ignore"):
        collapsed_share = collapsed.sum(-1) / known.sum(-1)  # NaN if nothing is known
    return xr.Dataset(
        {
            "kl": (dims, mean[:, :-1]),
            "standard_error": (dims, error[:, :-1]),
            "mcse": (dims, mcse[:, :-1]),
            "collapsed": (dims, collapsed),
            "total": ("subset", mean[:, -1]),
            "total_error": ("subset", error[:, -1]),
            "total_mcse": ("subset", mcse[:, -1]),
            "collapsed_share": ("subset", collapsed_share),
            "num_rows": ("subset", count[:, 0]),
        },
        coords={"subset": list(subsets), "latent": run.latents},
        attrs={**run.settings("nats"), "threshold": threshold},
    )


def _divergences_of(run: _Run, shown: Shown, x: dict[str, Tensor]) -> Tensor:
    """Divergences of every dimension and of all together, and the variances of their errors."""
    sites = shown.sites(run.num_draws)
    each = torch.cat([_site_divergence(site) for site in sites.values()], -1)  # (K, N, T)
    shape = each.shape[:2]
    total = sum(_joint_divergence(site).expand(shape) for site in sites.values())
    total = torch.as_tensor(total).unsqueeze(-1)
    every = torch.cat([each, total], -1)
    # Where nothing was drawn all K are equal, and round-off is no error.
    return torch.cat([every.mean(0), every.var(0) / run.num_draws], -1)


def _joint_divergence(site: Site) -> Tensor:
    """Divergence of a whole site given the draws before it, ``(K, N)`` or broadcast to it."""
    try:
        return kl_divergence(site.guide, site.prior)
    except (NotImplementedError, ValueError):  # the mixtures' own message is for training
        return site.guide.log_prob(site.value) - site.prior.log_prob(site.value)


def _site_divergence(site: Site) -> Tensor:
    """Divergence of each dimension given the draws before, ``(K, N, T)``."""
    value, shape = site.value, site.value.shape
    size = (*shape[:2], math.prod(shape[2:]))
    q, p = _marginals(site.guide), _marginals(site.prior)
    if q is None or p is None:
        return torch.full(size, torch.nan, device=value.device)
    try:
        found = kl_divergence(q, p)
    except NotImplementedError:
        found = q.log_prob(value) - p.log_prob(value)
    return found.expand(shape).reshape(size)


def _marginals(fn: Any) -> Any:
    """The distribution of each dimension alone, batch ``(K, N, *event)``; None if not known."""
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return dist.Normal(fn.mean, fn.variance.sqrt(), validate_args=False)
    if isinstance(fn, FlowMixture):
        return None
    if isinstance(fn, Mixture):
        weights = fn.log_weights.unsqueeze(-2).expand(*fn.batch_shape, fn.loc.shape[-1], -1)
        return MixtureSameFamily(
            torch.distributions.Categorical(logits=weights, validate_args=False),
            fn.family(fn.loc.mT, fn.scale.mT, validate_args=False),
            validate_args=False,
        )
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return None if fn.event_shape else fn


# Modalities against each other --------------------------------------------------------------------


def modality_shares(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    num_draws: int = 32,
    guide: Program | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> xr.Dataset:
    """Which modality dominates: in the likelihood, and in its gradients.

    With l_m = log p(x_m | z), z ~ q(z | all that a row has), for every modality m over the rows
    that have it:

    - ``likelihood``: E l_m, in nats; its share is of the absolute values;
    - ``variance``: mean over rows of Var_q l_m: how sharply x_m tells draws of z apart;
    - ``latent_gradient``: root mean square over rows and draws of |d l_m / dz|;
    - ``decoder_gradient``, ``encoder_gradient``: norm of d E l_m / d parameters, averaged over the
      rows that have m, of the generative networks and of the others. NaN for a pair of your own,
      which does not say which is which, and ``encoder_gradient`` for draws without a gradient.

    Args:
        pair: A model of the zoo or a pair of your own.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        num_draws: Draws of each row, at least two, and at least one for each component of a
            mixture.
        guide: A Pyro guide over the same sites, in place of the pair's own.
        seed: Of the draws.
        on_progress: Called with the rows done and the rows in all.

    Returns:
        The five over ``modality``, ``<name>_share`` of each (they add up to 1), and ``num_rows``.
        What is always given is not scored, and left out.

    Raises:
        ValueError: For a bad batch, too few draws, or a discrete latent.
    """
    check_continuous(pair, "modality_shares")
    run = _Run(pair, x, observed, guide, num_draws, seed)
    names = [name for name in pair.modalities if name in run.x and name not in pair.always_given]
    totals = _Totals(pair, names)
    kept = torch.stack([run.masks[name] for name in run.x]).any(0).nonzero().squeeze(-1)
    with quiet(pair, seed), torch.enable_grad():
        for block in blocks(len(kept), num_draws, run.device):
            values, masks = run.rows(run.x, kept[block])
            totals.add(guide or pair.guide, values, masks, num_draws)
            if on_progress:
                on_progress(block.stop, len(kept))
    found = totals.result()
    for name in list(found):
        size = np.abs(found[name])
        with np.errstate(invalid="ignore", divide="ignore"):
            found[f"{name}_share"] = size / np.nansum(size)
    count = [int(run.masks[name].sum()) for name in names]
    return xr.Dataset(
        {**{n: ("modality", v) for n, v in found.items()}, "num_rows": ("modality", count)},
        coords={"modality": names},
        attrs=run.settings("likelihood: nats; variance: squared nats; gradients: nats per unit"),
    )


class _Totals:
    """Sums over rows of what :func:`modality_shares` asks for, modality by modality."""

    def __init__(self, pair: Pair, names: list[str]) -> None:
        self.pair, self.names = pair, names
        own = isinstance(pair, MultimodalVAE)
        named = [(n, p) for n, p in pair.named_parameters() if p.requires_grad and own]
        self.groups = {
            "decoder_gradient": [p for n, p in named if n.startswith("generative.")],
            "encoder_gradient": [p for n, p in named if not n.startswith("generative.")],
        }
        self.sums = np.zeros((4, len(names)))  # rows, likelihood, variance, squared gradient
        self.gradients: dict[str, list[list[Tensor]]] = {
            group: [[torch.zeros_like(p) for p in found] for _ in names]
            for group, found in self.groups.items()
        }
        self.reparameterised = own

    def add(
        self,
        guide: Program,
        x: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        num_draws: int,
    ) -> None:
        """Adds some rows."""
        shown = {name: mask for name, mask in masks.items() if not bool(mask.all())}
        # Every component in turn: so draws of a mixture carry gradients, each with its weight.
        draws = draw(guide, x, shown, num_draws)
        values = latent_values(draws)
        self.reparameterised &= any(value.requires_grad for value in values.values())
        free = {n: v if v.requires_grad else v.requires_grad_() for n, v in values.items()}
        _, trace = log_joint(
            self.pair.model, x, shown, draws, num_draws, values=free, scored=self.pair.modalities
        )
        weight = draws.log_coef.exp()
        for i, name in enumerate(self.names):
            mask = masks[name]
            if not bool(mask.any()):
                continue
            term = trace.nodes[name]["log_prob"].expand(num_draws, len(mask))[:, mask]
            self._add_term(i, term, weight.expand(num_draws, len(mask))[:, mask], free, mask)

    def _add_term(
        self, i: int, term: Tensor, weight: Tensor, free: dict[str, Tensor], mask: Tensor
    ) -> None:
        mean = (weight * term).sum(0)  # (rows,)
        slopes = torch.autograd.grad(
            term.sum(), list(free.values()), retain_graph=True, allow_unused=True
        )
        square = sum(s.square().reshape(*s.shape[:2], -1).sum(-1) for s in slopes if s is not None)
        square = torch.as_tensor(square).expand(len(weight), len(mask))[:, mask]
        values = (
            torch.ones_like(mean),
            mean,
            (weight * (term - mean).square()).sum(0) * (len(term) / (len(term) - 1)),
            (weight * square).sum(0),
        )
        self.sums[:, i] += [float(value.detach().double().sum()) for value in values]
        for group, parameters in self.groups.items():
            if not parameters:
                continue
            found = torch.autograd.grad(
                mean.sum(), parameters, retain_graph=True, allow_unused=True
            )
            for total, gradient in zip(self.gradients[group][i], found, strict=True):
                if gradient is not None:
                    total += gradient

    def result(self) -> dict[str, Array]:
        """The averages, ``(M,)`` each."""
        count, likelihood, variance, square = self.sums
        with np.errstate(invalid="ignore", divide="ignore"):
            found = {
                "likelihood": likelihood / count,
                "variance": variance / count,
                "latent_gradient": np.sqrt(square / count),
            }
            for group, totals in self.gradients.items():
                norms = [math.sqrt(sum(float(t.square().sum()) for t in each)) for each in totals]
                found[group] = np.array(norms) / count
        if not self.groups["decoder_gradient"]:
            found["decoder_gradient"] = np.full(len(count), np.nan)
        if not self.groups["encoder_gradient"] or not self.reparameterised:
            found["encoder_gradient"] = np.full(len(count), np.nan)
        return found


def posterior_agreement(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    num_draws: int = 500,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> xr.Dataset:
    r"""How far the posteriors of two modalities of a row are apart, averaged over rows.

    - ``wasserstein``: squared 2-Wasserstein distance, in squared units of the latent. From draws it
      is D times the sliced one, the same for posteriors that differ by a shift;
    - ``symmetric_kl``: KL(q_m || q_n) + KL(q_n || q_m), in nats;
    - ``overlap``: Bhattacharyya's coefficient, the integral of sqrt(q_m q_n): 1 for equal
      posteriors, 0 for disjoint ones, whatever the units of the latent;
    - ``overlap_per_dimension``: its D-th root, which does not fall with the number of dimensions.

    Closed forms for Gaussian posteriors (diagonal or full; Laplace: all but the overlap), draws for
    others. Of the shared latent alone: private codes are not compared.

    Args:
        pair: A model of the zoo or a pair of your own.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``; a pair of modalities is compared in rows with both.
        num_draws: Draws of each row, where there is no closed form.
        seed: Of the draws.
        on_progress: Called with the pairs of modalities done and all of them.

    Returns:
        The four over ``modality`` and ``other``, each with its standard error over rows
        ``<name>_error``, and ``num_rows``. The diagonal holds 0 and 1; what no row has is NaN.

    Raises:
        ValueError: For a bad batch, fewer than two modalities, or a model without posteriors of
            single modalities.
    """
    run = _Run(pair, x, observed, None, num_draws, seed)
    names = list(pair.modalities)
    if len(names) < 2:
        raise ValueError(
            f"posterior_agreement: expected at least two modalities, found {', '.join(names)}"
        )
    find_subsets(pair, [[name] for name in names], "posterior_agreement")
    kinds = ("wasserstein", "symmetric_kl", "overlap", "overlap_per_dimension")
    size = (len(names), len(names))
    found = {kind: np.full((2, *size), np.nan) for kind in kinds}
    count = np.zeros(size, dtype=int)
    pairs = list(itertools.combinations_with_replacement(range(len(names)), 2))
    with quiet(pair, seed):
        for done, (i, j) in enumerate(pairs, 1):
            rows = _distances(run, names[i], names[j])
            count[i, j] = count[j, i] = rows.shape[-1]
            if rows.shape[-1]:
                for kind, values in zip(kinds, rows, strict=True):
                    mean, error = mean_and_error(values)
                    found[kind][:, i, j] = found[kind][:, j, i] = mean, error
            if on_progress:
                on_progress(done, len(pairs))
    dims = ("modality", "other")
    variables: dict[str, Any] = {kind: (dims, each[0]) for kind, each in found.items()}
    variables |= {f"{kind}_error": (dims, each[1]) for kind, each in found.items()}
    return xr.Dataset(
        {**variables, "num_rows": (dims, count)},
        coords={"modality": names, "other": names},
        attrs=run.settings("wasserstein: squared units of the latent; symmetric_kl: nats"),
    )


def _distances(run: _Run, one: str, other: str) -> Array:
    """The four measures in the rows that have both modalities, ``(4, rows)``."""
    if one not in run.x or other not in run.x:
        return np.empty((4, 0))
    index = (run.masks[one] & run.masks[other]).nonzero().squeeze(-1)
    if one == other:
        return np.repeat([[0.0], [0.0], [1.0], [1.0]], len(index), 1)
    found = [np.empty((4, 0))]
    for block in blocks(len(index), run.num_draws, run.device):
        q, p = (_law(run, name, index[block]) for name in (one, other))
        wasserstein, divergence, log_overlap = _compare(q, p, run.num_draws)
        dim = q.event_shape[-1]
        rows = (wasserstein, divergence, log_overlap.exp(), (log_overlap / dim).exp())
        found.append(torch.stack(rows).double().cpu().numpy())
    return np.concatenate(found, 1)


class _Drawn:
    """The posterior of a pair with several sites, by its draws and their density."""

    def __init__(self, shown: Shown) -> None:
        self.shown, self.like = shown, shown.draw(1)
        self.event_shape = flatten(self.like).shape[-1:]

    def sample(self, shape: tuple[int]) -> Tensor:
        return flatten(self.shown.draw(shape[0]))

    def log_prob(self, z: Tensor) -> Tensor:
        return self.shown.log_guide(unflatten(z, self.like))


def _law(run: _Run, name: str, index: Tensor) -> Any:
    """``q(z | x_m)`` of some rows, batch ``(N,)``, event ``(D,)``."""
    x, masks = run.rows([name], index)
    if isinstance(run.pair, MultimodalVAE):
        q = run.pair.posterior(x)
        return _single(q)
    shown = Shown(run.pair, x, masks)
    sites = list(shown.sites(1).values())
    fn = sites[0].guide
    gaussian = isinstance(fn, Independent) and isinstance(fn.base_dist, torch.distributions.Normal)
    if len(sites) > 1 or not gaussian or len(fn.event_shape) != 1:
        return _Drawn(shown)
    shape = (1, shown.num_rows, *fn.event_shape)
    loc, scale = (part.expand(shape)[0] for part in (fn.base_dist.loc, fn.base_dist.scale))
    return dist.Normal(loc, scale, validate_args=False).to_event(1)


def _single(q: Any) -> Any:
    """A mixture with one component in every row as that component."""
    if not isinstance(q, Mixture) or isinstance(q, FlowMixture):
        return q
    if not bool((q.present.sum(-1) == 1).all()):
        return q
    loc, scale = q.at(q.log_weights.argmax(-1).unsqueeze(0))
    return q.family(loc[0], scale[0], validate_args=False).to_event(1)


def _compare(q: Any, p: Any, num_draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squared Wasserstein distance, symmetric divergence, log overlap of each row."""
    for family, unit in ((torch.distributions.Normal, 1.0), (torch.distributions.Laplace, 2**0.5)):
        if not all(isinstance(d, Independent) and isinstance(d.base_dist, family) for d in (q, p)):
            continue
        parts = [each for d in (q, p) for each in (d.base_dist.loc, unit * d.base_dist.scale)]
        wasserstein = combine.squared_wasserstein(*parts)
        if unit == 1.0:
            divergence = combine.gaussian_kl(*parts) + combine.gaussian_kl(*parts[2:], *parts[:2])
            return wasserstein, divergence, _log_bhattacharyya(*parts)
        divergence = kl_divergence(q, p) + kl_divergence(p, q)
        return wasserstein, divergence, _from_draws(q, p, num_draws)[2]
    if all(isinstance(d, torch.distributions.MultivariateNormal) for d in (q, p)):
        return _full_gaussians(q, p)
    return _from_draws(q, p, num_draws)


def _log_bhattacharyya(loc1: Tensor, scale1: Tensor, loc2: Tensor, scale2: Tensor) -> Tensor:
    """Log of the integral of the root of the product of two diagonal Gaussians, ``(*)``."""
    total = scale1.square() + scale2.square()
    each = 0.5 * (2 * scale1 * scale2 / total).log() - (loc1 - loc2).square() / (4 * total)
    return each.sum(-1)


def _full_gaussians(q: Any, p: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same for full covariances (Givens & Shortt, 1984; Bhattacharyya, 1943)."""
    shift, a, b = q.mean - p.mean, q.covariance_matrix, p.covariance_matrix
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum(-1)
    trace = (a + b).diagonal(dim1=-2, dim2=-1).sum(-1)
    middle = 0.5 * (a + b)
    distance = torch.linalg.solve(middle, shift.unsqueeze(-1)).squeeze(-1)
    logs = middle.logdet() - 0.5 * (a.logdet() + b.logdet())
    return (
        shift.square().sum(-1) + trace - 2 * cross,
        kl_divergence(q, p) + kl_divergence(p, q),
        -(shift * distance).sum(-1) / 8 - 0.5 * logs,
    )


def _from_draws(q: Any, p: Any, num_draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same from draws of both, with their densities at each other's draws."""
    one, other = q.sample((num_draws,)), p.sample((num_draws,))
    ratio = q.log_prob(one) - p.log_prob(one)  # (K, N)
    back = p.log_prob(other) - q.log_prob(other)
    log_overlap = torch.cat([-0.5 * ratio, -0.5 * back]).logsumexp(0) - math.log(2 * num_draws)
    return sliced_wasserstein(one, other), ratio.mean(0) + back.mean(0), log_overlap.clamp(max=0)


def sliced_wasserstein(one: Tensor, other: Tensor) -> Tensor:
    """D times the sliced squared 2-Wasserstein distance of draws ``(K, N, D)``, ``(N,)``.

    Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015),
    https://doi.org/10.1007/s10851-014-0506-3
    """
    dim = one.shape[-1]
    directions = torch.randn(dim, _DIRECTIONS).to(one)
    directions = directions / directions.norm(dim=0)
    lines = [(z @ directions).sort(0).values for z in (one, other)]
    return dim * (lines[0] - lines[1]).square().mean((0, -1))
