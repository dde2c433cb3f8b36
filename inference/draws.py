"""Draws from a guide with their densities, one row at a time: what importance weights are made of.

A pair is replayed under a plate of K particles. A mixture posterior is *stratified*: its draws come
from every component in turn, and each is weighted with the density of the whole mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import pyro
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.distributions.util import detach, scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from mmzoo.distributions import FlowMixture, Mixture, Strata

__all__ = [
    "Draws",
    "check_density",
    "check_observed",
    "detach_parameters",
    "draw",
    "latent_values",
    "log_joint",
    "log_prior",
    "log_proposal",
    "replay",
]


class Draws(NamedTuple):
    """K draws for each of N rows.

    Attributes:
        trace: The guide's trace; its latent values have shape ``(K, N, *event)``.
        log_coef: Logarithm of the weight of each draw in the average, ``(K, N)``: ``-log K`` for a
            plain guide, ``log(pi_c / n_c)`` for a stratified one.
        component: Mixture component of each draw, ``(K, N)``; None for a plain guide.
        mixture: The stratified posterior, batch ``(K, N)``; None for a plain guide.
    """

    trace: Trace
    log_coef: Tensor
    component: Tensor | None
    mixture: Mixture | None


class _Stratify(poutine.messenger.Messenger):
    """Takes the draws of a mixture from its components in turn."""

    def __init__(self, num: int, start: int, total: int, *, strict: bool) -> None:
        super().__init__()
        self.num, self.start, self.total, self.strict = num, start, total, strict
        self.strata: Strata | None = None
        self.mixture: Mixture | None = None

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if not isinstance(fn, Mixture) or msg["value"] is not None:
            return
        if self.strata is not None:
            raise ValueError(
                f"guide site {msg['name']!r}: expected at most one mixture site, found a second; "
                "stratified draws are defined for one"
            )
        # Batch (K, N): every particle holds the same mixture, so one of them is stratified.
        one = fn.like(fn.log_weights[0], fn.loc[0], fn.scale[0])
        if not self.strict and self.total < 2 * int(one.present.sum(-1).max()):
            return  # one draw alone in a stratum says nothing of its spread
        self.strata = one.stratify(self.num, start=self.start, total=self.total)
        self.mixture = fn
        msg["value"], msg["done"] = self.strata.value, True


def draw(
    guide: Callable[..., Any],
    x: Mapping[str, Tensor | None],
    observed: Mapping[str, Tensor] | None,
    num_samples: int,
    *,
    start: int = 0,
    total: int | None = None,
    stratified: bool = True,
    strict: bool = True,
    **kwargs: Any,
) -> Draws:
    """Runs a guide with K particles on a plate of their own.

    Args:
        guide: A Pyro guide whose latent sites are inside a plate over rows.
        x: What the guide sees.
        observed: Masks ``(N,)`` of what it sees.
        num_samples: K.
        start: Index of the first draw, and
        total: the number of draws altogether, where they are taken in chunks.
        stratified: Whether a mixture is drawn from component by component; a prior, which may
            have more components than there are draws, is not.
        strict: Whether fewer draws than components raise. Otherwise a mixture with fewer than two
            for each is drawn from as a whole, as every other guide is, without gradients.
        kwargs: Passed on to the guide.
    """
    total = num_samples if total is None else total
    stratify = _Stratify(num_samples, start, total, strict=strict)
    handler = stratify if stratified else nullcontext()
    with handler, pyro.plate("particles", num_samples, dim=-2):
        trace = poutine.trace(guide).get_trace(x, observed, **kwargs)
    rows = next((v.shape[0] for v in x.values() if v is not None), kwargs.get("num_rows"))
    _check_rows(trace, rows)
    if stratify.strata is None:
        some = next(iter(_latents(trace).values()))["value"]
        log_coef = some.new_full((num_samples, 1), total).log().neg()
        return Draws(trace, log_coef, None, None)
    return Draws(trace, stratify.strata.log_coef, stratify.strata.component, stratify.mixture)


def replay(
    guide: Callable[..., Any],
    x: Mapping[str, Tensor | None],
    observed: Mapping[str, Tensor] | None,
    draws: Draws,
    num_samples: int,
    **kwargs: Any,
) -> Draws:
    """The same latent values under another guide, whose density is wanted at them.

    Args:
        guide: A Pyro guide over the same latent sites.
        x: What it sees.
        observed: Masks ``(N,)`` of what it sees.
        draws: The draws.
        num_samples: K.
        kwargs: Passed on to the guide.
    """
    with pyro.plate("particles", num_samples, dim=-2), _Fix(latent_values(draws)):
        trace = poutine.trace(guide).get_trace(x, observed, **kwargs)
    return draws._replace(trace=trace)


def log_proposal(
    draws: Draws,
    num_rows: int,
    *,
    stopped: bool = False,
    values: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """``log q`` of each draw, ``(K, N)``.

    Args:
        draws: The draws.
        num_rows: N.
        stopped: Whether the parameters of q are constants (the draws never are).
        values: Latent values to be used in place of the trace's own.
    """
    total: Tensor | None = None
    for name, site in _latents(draws.trace).items():
        fn = detach_parameters(site["fn"]) if stopped else site["fn"]
        value = (values or {}).get(name, site["value"])
        total = _add(total, _log_prob(site, fn, value), name, num_rows)
    assert total is not None
    return total


def log_prior(trace: Trace, num_rows: int) -> Tensor:
    """``log p(z)`` of each draw, ``(K, N)``, from the trace that :func:`log_joint` returns."""
    total: Tensor | None = None
    for name, site in _latents(trace).items():
        total = _add(total, site["log_prob"], name, num_rows)
    assert total is not None
    return total


def latent_values(draws: Draws) -> dict[str, Tensor]:
    """The drawn latents by site name, ``(K, N, *event)``."""
    return {name: site["value"] for name, site in _latents(draws.trace).items()}


def check_density(draws: Draws) -> None:
    """Refuses a guide without a density, whose weights would all be ``p(x, z)`` of one point.

    Raises:
        ValueError: For a latent that the guide gives as a point mass.
    """
    for name, site in _latents(draws.trace).items():
        fn = site["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if isinstance(fn, Delta):
            raise ValueError(
                f"guide site {name!r}: expected a density, found a point mass; p(x, z) at one "
                "point is no likelihood, so give the guide a spread (AutoNormal instead of "
                "AutoDelta), or anneal from the prior"
            )


def log_joint(
    model: Callable[..., Any],
    x: Mapping[str, Tensor | None],
    observed: Mapping[str, Tensor] | None,
    draws: Draws,
    num_samples: int,
    *,
    values: Mapping[str, Tensor] | None = None,
    scored: Collection[str] | None = None,
) -> tuple[Tensor, Trace]:
    """``log p(x, z)`` of each draw, ``(K, N)``, and the model's trace.

    Args:
        model: A Pyro model over the same latent sites.
        x: What is scored.
        observed: Masks ``(N,)`` of what is scored.
        draws: The draws.
        num_samples: K.
        values: Latent values to be used in place of the trace's own.
        scored: The only sites that may be observed, where the result has to be a density of them:
            no term of a training objective may stand in it. Default: any.

    Raises:
        ValueError: For sites of the model that the guide does not have or the reverse, and for an
            observed site that is not scored.
    """
    found = latent_values(draws)
    with pyro.plate("particles", num_samples, dim=-2), _Fix({**found, **(values or {})}):
        trace = poutine.trace(model).get_trace(x, observed)
    num_rows = max(value.shape[1] for value in found.values())
    total: Tensor | None = None
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or _is_plate(site):
            continue
        if not site["is_observed"] and name not in found:
            raise ValueError(
                f"model site {name!r}: expected a value from the guide, found none; the guide must "
                f"sample every latent of the model, it samples {', '.join(found)}"
            )
        if scored is not None:
            check_observed(name, site, scored)
        total = _add(total, _log_prob(site, site["fn"], site["value"]), name, num_rows)
    for name in found:
        # Its density would stand in log q alone: the weights would no longer average to p(x).
        if name not in trace.nodes or trace.nodes[name]["is_observed"]:
            raise ValueError(
                f"guide site {name!r}: expected a latent of the model, found none of that name; "
                "the guide must sample what the model samples and nothing else"
            )
    assert total is not None
    return total, trace


def check_observed(name: str, site: Mapping[str, Any], scored: Collection[str]) -> None:
    """Refuses a sample site of a model that is observed and no modality.

    Raises:
        ValueError: For such a site; ``pyro.deterministic`` is none, its density is one.
    """
    if not site["is_observed"] or name in scored or site["infer"].get("_deterministic"):
        return
    kind = "a pyro.factor" if isinstance(site["fn"], Unit) else "another measurement"
    raise ValueError(
        f"model site {name!r}: expected no observed site beside {', '.join(scored)}, found {kind}, "
        "which would be counted in every likelihood; make it a modality, or move it to the "
        "objective or the guide"
    )


def detach_parameters(fn: Any) -> Any:
    """A distribution with the same parameters as constants."""
    if isinstance(fn, Mixture):
        if isinstance(fn, FlowMixture):
            raise ValueError(
                "guide site 'z': expected a mixture of Gaussians for gradient 'stl' or 'dreg', "
                "found one of flows, whose parameters are more than its own; use gradient='plain'"
            )
        return fn.like(*(p.detach() for p in (fn.log_weights, fn.loc, fn.scale)))
    return detach(fn)


class _Fix(poutine.messenger.Messenger):
    """Gives latent sites their values."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def _log_prob(site: dict[str, Any], fn: Any, value: Tensor) -> Tensor:
    """The site's log probability, masked as the pair says but never scaled."""
    log_prob = scale_and_mask(fn.log_prob(value), 1.0, site["mask"])
    site["unscaled_log_prob"] = site["log_prob"] = log_prob
    return log_prob


def _is_plate(site: dict[str, Any]) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def _latents(trace: Trace) -> dict[str, dict[str, Any]]:
    found = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not _is_plate(site)
    }
    if not found:
        raise ValueError("guide: expected at least one sample site, found none")
    return found


def _check_rows(trace: Trace, num_rows: int | None) -> None:
    # (K, 1) is a latent that all rows share: no weight of a single row exists then.
    for name, site in _latents(trace).items():
        if num_rows is not None and site["value"].shape[1] != num_rows:
            raise ValueError(
                f"guide site {name!r}: expected one draw for each of {num_rows} rows, found "
                f"{site['value'].shape[1]}; put every sample site inside the plate over rows"
            )


def _add(total: Tensor | None, log_prob: Tensor, name: str, num_rows: int) -> Tensor:
    if log_prob.dim() < 1 or log_prob.shape[-1] != num_rows:
        raise ValueError(
            f"site {name!r}: expected one log probability for each of {num_rows} rows, found shape "
            f"{tuple(log_prob.shape)}; put every sample site inside the plate over rows"
        )
    return log_prob if total is None else total + log_prob
