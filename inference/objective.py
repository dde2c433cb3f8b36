"""What our objectives share: they know whose networks they train, and can say their terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from pyro.infer.enum import get_importance_trace
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from mmzoo.vae import MultimodalVAE

__all__ = [
    "LinearWarmup",
    "Objective",
    "ObjectiveModule",
    "Schedule",
    "at_step",
    "check_weights",
    "frozen",
    "merged_terms",
    "own_networks",
    "owner",
    "recorded_terms",
    "scale_sites",
    "steps_ahead",
    "trace_terms",
]

Schedule = float | Callable[[int], float]


@dataclass(frozen=True)
class LinearWarmup:
    """A weight that grows linearly from ``start`` to ``end`` over the first ``steps`` steps.

    Example:
        >>> weight = LinearWarmup(steps=100)
        >>> weight(0), weight(50), weight(1000)
        (0.0, 0.5, 1.0)
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __call__(self, step: int) -> float:
        """The weight at a step."""
        return self.start + (self.end - self.start) * min(step / max(self.steps, 1), 1.0)


def check_weights(where: str, **weights: Any) -> None:
    """Rejects negative weights: numbers, or numbers by name."""
    for what, given in weights.items():
        each = {what: given}
        if isinstance(given, Mapping):
            each = {f"{what}[{key!r}]": value for key, value in given.items()}
        for key, value in each.items():
            if not value >= 0:
                raise ValueError(
                    f"{where}: expected {key} >= 0, found {value}; 0 leaves the term out"
                )


def at_step(schedule: Schedule, step: int, expected: str) -> float:
    """The value of a number or of a function of the step; an error begins with ``expected``."""
    found = schedule(step) if callable(schedule) else schedule
    try:
        value = float(found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expected} >= 0, found {found!r} at step {step}") from error
    if not value >= 0:
        raise ValueError(f"{expected} >= 0, found {value} at step {step}")
    return value


@contextmanager
def steps_ahead(elbo: ELBO, steps: int) -> Iterator[None]:
    """Within it, schedules have the values of so many steps later, in nested objectives too."""
    counted = [part for part in _parts(elbo) if isinstance(getattr(part, "step", None), int)]
    before = [part.step for part in counted]
    for part in counted:
        part.step += steps
    try:
        yield
    finally:
        for part, step in zip(counted, before, strict=True):
            part.step = step


def _parts(elbo: Any) -> Iterator[Any]:
    yield elbo
    for part in vars(elbo).values():
        if isinstance(part, ELBO):
            yield from _parts(part)


def owner(fn: Callable[..., Any]) -> nn.Module | None:
    """The module that a model or guide belongs to: itself, or the object of a bound method."""
    if isinstance(fn, nn.Module):
        return fn
    found = getattr(fn, "__self__", None)
    return found if isinstance(found, nn.Module) else None


class ObjectiveModule(ELBOModule):
    """An objective bound to a pair: ``module(x, observed)`` is the loss, its parameters the pair's.

    Pyro's own module is empty for bound methods; this one owns the networks behind them.
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], elbo: ELBO) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "guide", guide)
        self.elbo = elbo
        owners = (owner(model), owner(guide))
        unique = {id(module): module for module in owners if module is not None}
        self.owners = nn.ModuleList(unique.values())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a batch, summed over rows."""
        with ExitStack() as stack:
            for module in self.owners:
                if isinstance(module, MultimodalVAE):
                    stack.enter_context(module.unregistered())
                    stack.enter_context(module.mixed_networks())
            return self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)


class Objective(ELBO):
    """An ELBO of our own: a subclass says its differentiable loss, summed over rows.

    Attributes:
        terms: Of the last batch, by name: the sum over rows and the number of rows of
            ``log p(x_m | z)``, of ``log q - log p`` of each latent, and of alignment terms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> ObjectiveModule:
        """The loss of a pair as a module, ``(x, observed) -> loss`` summed over rows."""
        return ObjectiveModule(model, guide, self)

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Minus the objective of a batch, in nats summed over rows, without a gradient."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The loss, after adding its gradient to the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)


def trace_terms(model_trace: Trace, guide_trace: Trace) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over rows, and numbers of rows, of the terms of a bound.

    Returns:
        ``log p(x_m | z)`` under each observed site's name, ``log q - log p`` under each latent's.
    """
    terms = {}
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or "log_prob" not in site:
            continue
        log_p = site["unscaled_log_prob"]
        mask = _rows(site)
        if not site["is_observed"]:
            if name not in guide_trace.nodes:
                continue
            log_p = guide_trace.nodes[name]["unscaled_log_prob"] - log_p
        log_p = log_p.detach()
        if mask is None:
            count = torch.as_tensor(log_p.numel())
        else:
            mask = mask.expand(log_p.shape)
            log_p, count = torch.where(mask, log_p, 0.0), mask.sum()
        terms[name] = (log_p.sum(), count)
    return terms


def merged_terms(
    terms: Iterable[dict[str, tuple[Tensor, Tensor]]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Terms of several visits to a batch, added up by name."""
    merged: dict[str, tuple[Tensor, Tensor]] = {}
    for each in terms:
        for name, (total, count) in each.items():
            before = merged.get(name, (torch.zeros(()), torch.zeros(())))
            merged[name] = (before[0] + total, before[1] + count)
    return merged


def own_networks(
    where: str, model: Callable[..., Any], guide: Callable[..., Any], kind: type[MultimodalVAE]
) -> Any:
    """The model behind a pair, where an objective needs the networks of both to be its own."""
    vae = owner(model)
    if not isinstance(vae, kind) or owner(guide) is not vae:
        found = [getattr(fn, "__qualname__", type(fn).__name__) for fn in (model, guide)]
        raise ValueError(
            f"{where}: expected model and guide of one {kind.__name__}, found {found[0]} and "
            f"{found[1]}; use SubsetELBO for a guide of your own"
        )
    return vae


@contextmanager
def frozen(module: nn.Module, *, but: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Within it, the parameters are constants: what is computed has no gradient for them.

    Args:
        module: Whose parameters.
        but: Parts of it that are not frozen.
    """
    free = {id(value) for part in but for value in part.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad and id(p) not in free]
    for value in trained:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in trained:
            value.requires_grad_(True)


def _rows(site: dict[str, Any]) -> Tensor | None:
    """The rows that a site counts for, or None for all of them."""
    scored = getattr(site["fn"], "scored", None)
    mask = site["mask"]
    if not isinstance(mask, Tensor):
        return scored
    return mask if scored is None else mask & scored


@contextmanager
def recorded_terms(elbo: ELBO) -> Iterator[list[dict[str, tuple[Tensor, Tensor]]]]:
    """Collects the terms of every particle that a stock Pyro ELBO visits."""
    found: list[dict[str, tuple[Tensor, Tensor]]] = []
    get_trace = getattr(elbo, "_get_trace", None)
    if get_trace is None:
        yield found
        return

    def recording(*args: Any, **kwargs: Any) -> tuple[Trace, Trace]:
        traces = get_trace(*args, **kwargs)
        found.append(trace_terms(*traces))
        return traces

    elbo._get_trace = recording
    try:
        yield found
    finally:
        del elbo._get_trace


def scale_sites(factors: dict[str, float]) -> poutine.messenger.Messenger:
    """Multiplies the log probability of the named sites; a factor of zero leaves a site out."""
    return _ScaleSites(factors)


class _ScaleSites(poutine.messenger.Messenger):
    def __init__(self, factors: dict[str, float]) -> None:
        super().__init__()
        self.factors = factors

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        factor = self.factors.get(msg["name"], 1.0)
        if factor == 0.0:
            msg["mask"] = False  # poutine.scale refuses a zero
        elif factor != 1.0:
            msg["scale"] = factor * msg["scale"]
