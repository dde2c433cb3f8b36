r"""Annealed importance sampling, and bounds on log p(x) from both sides.

From a start q0(z), a guide or the prior, to the posterior along a path of unnormalised densities,

    f_t(z) = q0(z)^(1 - b_t) p(x, z)^b_t,    0 = b_0 < b_1 < ... < b_T = 1,

a chain begins at ``z_0 ~ q0`` and makes one transition at each temperature, ``z_t ~ T_t(z_t-1)``,
where T_t leaves f_t as it is. Its weight is an unbiased estimate of p(x), however many steps there
are and however badly the chain mixes, and more steps make it more even:

    w = prod_t f_t(z_t-1) / f_t-1(z_t-1),    E w = p(x)

The transitions are Hamiltonian Monte Carlo, each chain of each row accepted or rejected by itself;
all latents of a row move together. The estimate is *unbiased only if no transition depends on the
chain that makes it*, beyond its state: step sizes and widths are therefore tuned on a pilot run of
a few chains of its own, for each row and temperature, and are constants in the run that counts.

Log p(x) itself is then estimated from below: ``E log mean_c w_c <= log p(x)`` (Jensen),
with the mean over chains. Where x was drawn from the model together with its latent z*, this z* is
an exact draw from p(z | x), and the same chain run backwards from it gives a bound from above:

    E[-log mean_c 1 / w_c] >= log p(x),    w_c of the reversed chains that all begin at z*

The gap between the two, on data of the model's own, says how far the estimates of *these settings*
are off at most on average. Both bounds hold in expectation: a single row may break them.

Annealed Importance Sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
Measuring the Reliability of MCMC Inference with Bidirectional Monte Carlo (Grosse et al., 2016),
https://arxiv.org/abs/1606.02275
On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017),
https://arxiv.org/abs/1611.04273
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform

from mmzoo.batch import modality_names
from mmzoo.distributions import Ancestral
from mmzoo.evaluation.likelihood import quantity_name
from mmzoo.evaluation.pair import Pair, device_of, quiet, row_masks
from mmzoo.evaluation.pareto import WeightSummary
from mmzoo.inference.draws import (
    Draws,
    check_density,
    draw,
    latent_values,
    log_joint,
    log_prior,
    log_proposal,
    replay,
)
from mmzoo.vae import MultimodalVAE

__all__ = ["annealed_log_likelihood", "bidirectional"]

_ESTIMATES = ("log_prob", "mcse", "ess", "pareto_k", "acceptance")
_STARTS = ("posterior", "prior")
_SCHEDULES = ("sigmoid", "linear")
_CHAINS = {"cpu": 2048, "cuda": 1 << 15}  # chains of all rows that move at a time
_PILOT_CHAINS = 4
_WARM_UP = 10  # transitions of the pilot run at its first temperature
_WIDTHS = 100  # that are kept for each row and latent, whatever the number of temperatures
_RATE = 0.2  # with which the pilot run learns
_ACCEPTANCE = 0.65
_JITTER = 0.2  # of the step size, against orbits that close

Arrays = dict[str, np.ndarray]
Names = str | Sequence[str]
OnProgress = Callable[[int, int], None]


def annealed_log_likelihood(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    of: Names,
    given: Names = (),
    start: str = "posterior",
    num_chains: int = 16,
    num_steps: int = 200,
    leapfrog_steps: int = 5,
    step_size: float | None = None,
    schedule: str = "sigmoid",
    guide: Callable[..., Any] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> xr.Dataset:
    """``log p(x_A | x_B)`` of every row by annealed importance sampling.

    A conditional is the difference of two independent runs; their variances add. One step costs
    ``leapfrog_steps`` gradients of the decoders for each chain, and the pilot run a quarter of that
    (with 16 chains).

    Args:
        pair: A model of the zoo, or a pair of your own. Its latents must be continuous; those that
            are bounded are moved on a scale where they are not.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        of: The names in A, what is scored.
        given: The names in B, what is known; none of A.
        start: ``"posterior"``, the guide that sees what is scored, or ``"prior"``, which is right
            whatever the guide is, and takes more steps.
        num_chains: C, chains of each row; of a mixture with at most half as many components the
            starts are stratified.
        num_steps: T; one step is plain importance sampling.
        leapfrog_steps: Gradients of one transition.
        step_size: Of the leapfrog, the same for every row and latent; default: tuned by the pilot
            run for an acceptance of 0.65, in units of the local width of each latent.
        schedule: ``"sigmoid"``, with small steps at both ends, or ``"linear"``.
        guide: A Pyro guide over the same sites, in place of the pair's own.
        batch_size: Rows at a time; default: so many that about 2000 chains move together.
            Memory does not grow with N or T.
        seed: Of the draws.
        on_progress: Called with the transitions done and their number in all.

    Returns:
        Over ``row``: ``log_prob`` in nats, ``mcse``, ``ess`` and ``pareto_k`` of the weights of the
        chains as in :func:`mmzoo.evaluation.log_likelihood` (k is NaN for fewer than 21 chains),
        and ``acceptance``, the mean over chains and steps (of a conditional the smaller one). A row
        that has nothing of A is NaN.

    Raises:
        ValueError: For unknown names, A and B that overlap, a bad batch or setting, discrete
            latents, or a quantity that the model does not define.

    Example:
        >>> from mmzoo import Modality
        >>> from mmzoo.models import MVAE
        >>> vae = MVAE([Modality("a", (3,)), Modality("b", (2,))], latent_dim=2)
        >>> x = {"a": torch.randn(5, 3), "b": torch.randn(5, 2)}
        >>> annealed_log_likelihood(vae, x, of="a", given="b", num_steps=5).sizes["row"]
        5
    """
    where = "annealed_log_likelihood"
    of, given = _names(pair, of, f"{where} of"), _names(pair, given, f"{where} given")
    _check_quantity(pair, of, given, where)
    settings = _Settings(start, num_chains, num_steps, leapfrog_steps, step_size, schedule, guide)
    settings.check(where, batch_size)
    rows = _Rows(pair, x, observed, settings, batch_size, where)
    runs = [(*of, *given), tuple(given)] if given else [tuple(of)]
    tell = _Teller(on_progress, sum(rows.num_blocks(names) for names in runs) * settings.moves)
    result = rows.marginal(runs[0], seed, tell)
    if given:
        result = _difference(result, rows.marginal(runs[1], seed + 1, tell))
    absent = ~rows.has(of)
    for values in result.values():
        values[absent] = np.nan
    return xr.Dataset(
        {name: ("row", result[name]) for name in _ESTIMATES},
        coords={"row": np.arange(rows.num_rows)},
        attrs={
            "quantity": quantity_name(of, given),
            **settings.attributes(),
            "rows_without": int(absent.sum()),
            "units": "nats",
            "seed": seed,
        },
    )


def bidirectional(
    pair: Pair,
    *,
    of: Names | None = None,
    num_rows: int = 100,
    start: str = "posterior",
    num_chains: int = 16,
    num_steps: int = 200,
    leapfrog_steps: int = 5,
    step_size: float | None = None,
    schedule: str = "sigmoid",
    guide: Callable[..., Any] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> xr.Dataset:
    """Bounds on ``log p(x)`` from both sides, on rows that the model itself draws.

    Each row is drawn with its latents, everything that is not scored is forgotten, and chains run
    forward from the start and backward from the latents that the row was drawn with, an exact draw
    from the posterior. The settings are those of :func:`annealed_log_likelihood`, so that a small
    gap validates them for rows like these. Real rows may be harder than the model's own.

    The mean of ``lower`` is not above that of ``log p(x)``, nor the mean of ``upper`` below it: in
    expectation, that is, within the stated errors; the bounds of a single row may cross.

    Args:
        pair: As in :func:`annealed_log_likelihood`.
        of: What is scored; default: every modality.
        num_rows: N, rows to be drawn.
        start: As in :func:`annealed_log_likelihood`, and so are
        num_chains: the chains in each direction,
        num_steps: the temperatures,
        leapfrog_steps: the gradients of a transition,
        step_size: their size,
        schedule: the path,
        guide: the start,
        batch_size: and the rows at a time.
        seed: Of the rows and of the draws.
        on_progress: Called with the transitions done and their number in all.

    Returns:
        Over ``row``: ``lower``, ``upper``, ``gap`` (upper - lower) in nats, and ``acceptance`` (the
        smaller one of the two directions). Over ``bound``, that is lower, upper and gap: ``mean``
        and its ``standard_error``, from the spread of the rows.

    Raises:
        ValueError: As :func:`annealed_log_likelihood`, and for fewer than two rows.

    Example:
        >>> from mmzoo import Modality
        >>> from mmzoo.models import MVAE
        >>> vae = MVAE([Modality("a", (3,)), Modality("b", (2,))], latent_dim=2)
        >>> bidirectional(vae, num_rows=4, num_steps=5).sizes["row"]
        4
    """
    where = "bidirectional"
    scored = list(pair.modalities) if of is None else _names(pair, of, f"{where} of")
    _check_quantity(pair, scored, [], where)
    if num_rows < 2:
        raise ValueError(f"{where}: expected num_rows of at least 2, found {num_rows}")
    settings = _Settings(start, num_chains, num_steps, leapfrog_steps, step_size, schedule, guide)
    settings.check(where, batch_size)
    size = batch_size or settings.rows_at_a_time(device_of(pair))
    blocks = [min(size, num_rows - first) for first in range(0, num_rows, size)]
    tell = _Teller(on_progress, len(blocks) * (settings.moves + num_steps - 1))
    parts: list[dict[str, Tensor]] = []
    with quiet(pair, seed):
        for rows in blocks:
            parts.append(_enclose(pair, scored, rows, settings, tell))
    found = {k: torch.cat([part[k] for part in parts]).cpu().numpy() for k in parts[0]}
    found["gap"] = found["upper"] - found["lower"]
    bounds = ("lower", "upper", "gap")
    values = np.stack([found[name] for name in bounds])
    return xr.Dataset(
        {
            **{name: ("row", found[name]) for name in (*bounds, "acceptance")},
            "mean": ("bound", values.mean(1)),
            "standard_error": ("bound", values.std(1, ddof=1) / math.sqrt(num_rows)),
        },
        coords={"row": np.arange(num_rows), "bound": list(bounds)},
        attrs={
            "quantity": quantity_name(scored),
            **settings.attributes(),
            "units": "nats",
            "seed": seed,
        },
    )


class _Settings(NamedTuple):
    """What both functions share."""

    start: str
    num_chains: int
    num_steps: int
    leapfrog_steps: int
    step_size: float | None
    schedule: str
    guide: Callable[..., Any] | None

    def check(self, where: str, batch_size: int | None) -> None:
        """Raises for a setting that makes no sense."""
        for what, value, known in (
            ("start", self.start, _STARTS),
            ("schedule", self.schedule, _SCHEDULES),
        ):
            if value not in known:
                raise ValueError(
                    f"{where}: expected {what} one of {', '.join(known)}, found {value!r}"
                )
        for what, least, number in (
            ("num_chains", 2, self.num_chains),  # one alone has no standard error
            ("num_steps", 1, self.num_steps),
            ("leapfrog_steps", 1, self.leapfrog_steps),
            ("batch_size", 1, 1 if batch_size is None else batch_size),
        ):
            if number < least:
                raise ValueError(f"{where}: expected {what} of at least {least}, found {number}")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(
                f"{where}: expected a positive step_size, found {self.step_size}; None tunes it"
            )
        if self.guide is not None and self.start == "prior":
            raise ValueError(
                f"{where}: expected no guide with start='prior', found one, which would not be "
                "used; take start='posterior'"
            )

    @property
    def moves(self) -> int:
        """Transitions of one run forward, pilot run included."""
        pilot = 0 if self.step_size or self.num_steps == 1 else self.num_steps - 2 + _WARM_UP
        return self.num_steps - 1 + pilot

    def temperatures(self) -> list[float]:
        """``b_0 = 0, ..., b_T = 1``."""
        steps = np.linspace(0.0, 1.0, self.num_steps + 1)
        if self.schedule == "sigmoid":  # between -4 and 4 (Wu et al., 2017)
            steps = 1 / (1 + np.exp(-4 * (2 * steps - 1)))
            steps = (steps - steps[0]) / (steps[-1] - steps[0])
        return [float(step) for step in steps]

    def rows_at_a_time(self, device: torch.device) -> int:
        """Default batch size."""
        return max(1, _CHAINS.get(device.type, _CHAINS["cpu"]) // self.num_chains)

    def attributes(self) -> dict[str, Any]:
        """For a result."""
        return {
            "start": self.start if self.guide is None else "guide",
            "num_chains": self.num_chains,
            "num_steps": self.num_steps,
            "leapfrog_steps": self.leapfrog_steps,
            "step_size": "tuned" if self.step_size is None else self.step_size,
            "schedule": self.schedule,
        }


class _Teller:
    """Counts transitions."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self.on_progress, self.total, self.done = on_progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        if self.on_progress:
            self.on_progress(self.done, self.total)


class _Rows:
    """Annealing of marginals of one pair on one set of rows, some of them at a time."""

    def __init__(
        self,
        pair: Pair,
        x: Mapping[str, Tensor],
        observed: Mapping[str, Tensor] | None,
        settings: _Settings,
        batch_size: int | None,
        where: str,
    ) -> None:
        self.pair, self.settings = pair, settings
        self.x, masks, self.num_rows = row_masks(pair, x, observed)
        self.masks = {name: mask.cpu() for name, mask in masks.items()}
        self.device = device_of(pair)
        self.batch_size = batch_size or settings.rows_at_a_time(self.device)
        empty = ~self.has(self.masks)
        if empty.any():
            raise ValueError(
                f"{where}: expected something observed in every row, found nothing in row "
                f"{int(empty.argmax())}; drop such rows"
            )

    def has(self, names: Sequence[str] | Mapping[str, Any]) -> np.ndarray:
        """The rows that have any of the named modalities, ``(N,)``."""
        return torch.stack([self.masks[name] for name in names]).any(0).numpy()

    def num_blocks(self, names: Sequence[str]) -> int:
        """How many batches of rows it takes."""
        return math.ceil(int(self.has(names).sum()) / self.batch_size)

    def marginal(self, scored: Sequence[str], seed: int, tell: _Teller) -> Arrays:
        """``log p(x_scored)`` of every row; NaN in rows that have nothing of it."""
        result = {kind: np.full(self.num_rows, np.nan) for kind in _ESTIMATES}
        rows = torch.as_tensor(self.has(scored)).nonzero().squeeze(-1)
        with quiet(self.pair, seed):
            for index in rows.split(self.batch_size) if len(rows) else ():
                path = _Path(self.pair, *self._select(index, scored), self.settings)
                found = _anneal(path, _tune(path, tell), tell)
                for kind, values in found.items():
                    result[kind][index.numpy()] = values.cpu().numpy()
        return result

    def _select(
        self, index: Tensor, names: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        names = [name for name in self.pair.modalities if name in names and name in self.x]
        x = {name: self.x[name][index.to(self.x[name].device)].to(self.device) for name in names}
        masks = {name: self.masks[name][index] for name in names}
        return x, {name: m.to(self.device) for name, m in masks.items() if not bool(m.all())}


class _State(NamedTuple):
    """Where the chains are: C of them for each of N rows.

    Attributes:
        position: ``(C, N, D)``, all latents of a row side by side, none of them bounded.
        log_q: ``log q0`` there, ``(C, N)``.
        log_p: ``log p(x, z)`` there, ``(C, N)``.
        grad_q: Gradient of the first, ``(C, N, D)``.
        grad_p: Gradient of the second, ``(C, N, D)``.
    """

    position: Tensor
    log_q: Tensor
    log_p: Tensor
    grad_q: Tensor
    grad_p: Tensor

    def log_density(self, beta: float) -> Tensor:
        """``log f``, ``(C, N)``."""
        return torch.lerp(self.log_q, self.log_p, beta)

    def gradient(self, beta: float) -> Tensor:
        """Its gradient, ``(C, N, D)``."""
        return torch.lerp(self.grad_q, self.grad_p, beta)

    def where(self, mask: Tensor, other: _State) -> _State:
        """This state where the mask ``(C, N)`` is True, the other one elsewhere."""
        pairs = zip(self, other, strict=True)
        return _State(
            *(torch.where(mask if a.dim() == 2 else mask.unsqueeze(-1), a, b) for a, b in pairs)
        )


class _Path:
    """Both ends of the path for some rows: densities and gradients, encoders run once.

    Args:
        pair: The pair.
        x: What is scored, and what the guide sees.
        observed: Masks ``(N,)`` of it.
        settings: Of the run.
    """

    def __init__(
        self,
        pair: Pair,
        x: dict[str, Tensor],
        observed: dict[str, Tensor],
        settings: _Settings,
    ) -> None:
        self.pair, self.x, self.observed, self.settings = pair, x, observed, settings
        self.betas = settings.temperatures()
        self.num_rows = len(next(iter(x.values())))
        self.kwargs: dict[str, Any] = {}
        self.guide = pair.guide if settings.guide is None else settings.guide
        self.exact: dict[tuple[str, ...], Any] | None = None
        if settings.start == "posterior" and settings.guide is None:
            self._encode()
        self.template = self.draw(_PILOT_CHAINS, stratified=False)
        self.shapes = {k: v.shape[2:] for k, v in latent_values(self.template).items()}
        _, trace = log_joint(
            pair.model, x, observed, self.template, _PILOT_CHAINS, scored=pair.modalities
        )
        self.transforms = {name: _unbounded(name, trace.nodes[name]["fn"]) for name in self.shapes}

    def _encode(self) -> None:
        """The guide's distributions, made once, where it is the guide that the zoo knows."""
        pair = self.pair
        if not isinstance(pair, MultimodalVAE):
            return
        self.kwargs["experts"] = pair.encode(self.x, self.observed)
        if type(pair).guide is not MultimodalVAE.guide:
            return
        q = pair.posterior(self.x, self.observed, **self.kwargs)
        codes = pair.private(self.x, self.observed, **self.kwargs)
        self.exact = {q.names if isinstance(q, Ancestral) else ("z",): q}
        self.exact.update({(f"w_{name}",): code for name, code in codes.items()})

    def draw(self, num: int, *, stratified: bool) -> Draws:
        """Draws from q0 for every row."""
        if self.settings.start == "posterior":
            x, observed, kwargs = self.x, self.observed, self.kwargs
            drawn = draw(
                self.guide, x, observed, num, stratified=stratified, strict=False, **kwargs
            )
            check_density(drawn)
            return drawn
        # Without observations the model itself is the guide that draws from the prior.
        always = {name: self.x[name] for name in self.pair.always_given}
        rows = self.num_rows
        return draw(self.pair.model, always, None, num, stratified=False, num_rows=rows)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Latents ``(C, N, *event)`` side by side on a scale without bounds, ``(C, N, D)``."""
        parts = []
        for name, transform in self.transforms.items():
            value = values[name] if transform is None else transform.inv(values[name])
            parts.append(value.reshape(*value.shape[:2], -1))
        return torch.cat(parts, -1)

    def at(self, position: Tensor) -> _State:
        """Densities and gradients at ``(C, N, D)``: every decoder runs once, there and back."""
        with torch.enable_grad():
            position = position.detach().requires_grad_()
            values, log_volume = self._unpack(position)
            log_p, trace = log_joint(
                self.pair.model,
                self.x,
                self.observed,
                self.template,
                len(position),
                values=values,
                scored=self.pair.modalities,
            )
            log_q = self._log_start(values, trace, len(position)) + log_volume
            log_p = log_p + log_volume
            # The networks are no inputs here: their gradients are not computed.
            (grad_q,) = torch.autograd.grad(log_q.sum(), position, retain_graph=True)
            (grad_p,) = torch.autograd.grad(log_p.sum(), position)
        return _State(position.detach(), log_q.detach(), log_p.detach(), grad_q, grad_p)

    def _unpack(self, position: Tensor) -> tuple[dict[str, Tensor], Tensor | float]:
        """Latents by site, and the log volume that bounded ones take on their new scale."""
        values: dict[str, Tensor] = {}
        log_volume: Tensor | float = 0.0
        first = 0
        lead = position.shape[:2]
        for name, transform in self.transforms.items():
            shape = self._free_shape(name)
            part = position[..., first : first + shape.numel()].reshape(*lead, *shape)
            first += shape.numel()
            values[name] = part if transform is None else transform(part)
            if transform is not None:
                volume = transform.log_abs_det_jacobian(part, values[name])
                log_volume = log_volume + volume.reshape(*lead, -1).sum(-1)
        return values, log_volume

    def _free_shape(self, name: str) -> torch.Size:
        transform = self.transforms[name]
        shape = self.shapes[name]
        return shape if transform is None else torch.Size(transform.inverse_shape(shape))

    def _log_start(self, values: Mapping[str, Tensor], trace: Any, num: int) -> Tensor:
        """``log q0``, ``(C, N)``."""
        if self.settings.start == "prior":
            return log_prior(trace, self.num_rows)
        if self.exact is None:
            draws = _at_values(self.template, values)
            again = replay(self.guide, self.x, self.observed, draws, num, **self.kwargs)
            return log_proposal(again, self.num_rows)
        shape = (num, self.num_rows)
        terms = [
            q.expand(shape).log_prob(torch.cat([values[name] for name in names], -1))
            for names, q in self.exact.items()
        ]
        return torch.stack(terms).sum(0)


def _at_values(draws: Draws, values: Mapping[str, Tensor]) -> Draws:
    """The draws with other latent values."""
    trace = draws.trace.copy()
    for name, value in values.items():
        trace.nodes[name] = {**trace.nodes[name], "value": value}
    return draws._replace(trace=trace)


def _unbounded(name: str, fn: Any) -> Transform | None:
    """The map from a scale without bounds to the support of a latent; None if it is the identity.

    Raises:
        ValueError: For a discrete latent.
    """
    support = fn.support
    if support.is_discrete:
        raise ValueError(
            f"model site {name!r}: expected a continuous latent, which can be moved along a "
            f"gradient, found {type(fn).__name__}; sum it out, or use log_likelihood"
        )
    base = support
    while hasattr(base, "base_constraint"):  # of independent entries, of a mixture
        base = base.base_constraint
    if base is constraints.real:
        return None
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"model site {name!r}: expected a latent whose support torch can map to the real line, "
            f"found {type(fn).__name__} on {support}; write it as a function of a real latent"
        ) from error


# The chains -------------------------------------------------------------------------------------


def _move(path: _Path, state: _State, beta: float, step: Tensor) -> tuple[_State, Tensor]:
    """One transition of Hamiltonian Monte Carlo that leaves ``f`` as it is.

    Args:
        path: The path.
        state: Where the chains are.
        beta: The temperature.
        step: Size of a step in every direction, ``(N, D)``.

    Returns:
        Where they are now, and the probability of acceptance, ``(C, N)``.
    """
    momentum = torch.randn_like(state.position)
    spread = torch.rand_like(state.log_p).unsqueeze(-1)
    step = step * (1 + _JITTER * (2 * spread - 1))  # (C, N, D)
    before = state.log_density(beta) - _kinetic(momentum)
    new, half = state, 0.5 * step
    for _ in range(path.settings.leapfrog_steps):
        momentum = momentum + half * new.gradient(beta)
        new = path.at(new.position + step * momentum)
        momentum = momentum + half * new.gradient(beta)
    log_ratio = new.log_density(beta) - _kinetic(momentum) - before
    log_ratio = log_ratio.nan_to_num(nan=-math.inf, posinf=-math.inf)  # it left the numbers
    return new.where(_accepted(log_ratio), state), log_ratio.clamp(max=0).exp()


def _kinetic(momentum: Tensor) -> Tensor:
    """Kinetic energy, ``(C, N)``."""
    return 0.5 * momentum.square().sum(-1)


def _accepted(log_ratio: Tensor) -> Tensor:
    """Metropolis' choice for each chain, ``(C, N)``."""
    return torch.rand_like(log_ratio).log() < log_ratio


class _Step(NamedTuple):
    """Of the leapfrog, in every direction.

    Attributes:
        size: ``(N, 1)``.
        width: ``(N, D)``, what it is a multiple of.
    """

    size: Tensor
    width: Tensor

    @property
    def vector(self) -> Tensor:
        """``(N, D)``."""
        return self.size * self.width


def _tune(path: _Path, tell: _Teller) -> list[_Step]:
    """Steps of the transitions, from chains that are then thrown away.

    The width of a latent is the reciprocal root of its mean squared gradient, which for a Gaussian
    is its standard deviation given the other latents.
    """
    settings = path.settings
    inner = path.betas[1:-1]
    position = path.pack(latent_values(path.template))
    if settings.step_size is not None:
        width = torch.ones_like(position[0])
        return [_Step(torch.full_like(width[:, :1], settings.step_size), width)] * len(inner)
    state = path.at(position)
    log_size = torch.full_like(position[0, :, :1], -0.25 * math.log(position.shape[-1]))
    precision = state.gradient(0.0).square().mean(0)  # (N, D)
    every = math.ceil(len(inner) / _WIDTHS)
    steps: list[_Step] = []
    for t, beta in enumerate(inner):
        for _ in range(1 if t else _WARM_UP):
            now = state.gradient(beta).square().mean(0).nan_to_num(posinf=1e12)
            precision = precision.lerp(now, _RATE).clamp(1e-12, 1e12)
            step = _Step(log_size.exp(), steps[-1].width if t % every else precision.rsqrt())
            state, accept = _move(path, state, beta, step.vector)
            log_size = log_size + _RATE * (accept.mean(0).unsqueeze(-1) - _ACCEPTANCE)
            tell()
        steps.append(step)
    return steps


def _anneal(path: _Path, steps: Sequence[_Step], tell: _Teller) -> dict[str, Tensor]:
    """Chains from the start to the posterior, and what their weights say of every row."""
    num = path.settings.num_chains
    draws = path.draw(num, stratified=path.settings.start == "posterior")
    state = path.at(path.pack(latent_values(draws)))
    log_w = torch.zeros_like(state.log_p, dtype=torch.float64)
    acceptance = torch.zeros_like(log_w[0])
    for t, last, beta in _increments(path):
        log_w += (beta - last) * (state.log_p - state.log_q).double()
        if t < len(steps):  # what comes after the last increment has no weight
            state, accept = _move(path, state, beta, steps[t].vector)
            acceptance += accept.mean(0) / len(steps)
            tell()
    strata = 1 if draws.mixture is None else draws.mixture.log_weights.shape[-1]
    summary = WeightSummary(num, num_strata=strata)
    summary.update(log_w, draws.log_coef, draws.component)
    return {**summary.result(), "acceptance": _mean_acceptance(acceptance, steps)}


def _return(
    path: _Path, steps: Sequence[_Step], values: Mapping[str, Tensor], tell: _Teller
) -> tuple[Tensor, Tensor]:
    """Chains from exact draws of the posterior back to the start.

    Args:
        path: The path.
        steps: Steps of its transitions, in the order of the way there.
        values: A draw of the latents for every row, ``(N, *event)``.
        tell: Of the progress.

    Returns:
        Log weights ``(C, N)``, of which ``E 1 / w = 1 / p(x)``, and the acceptance ``(N,)``.
    """
    num = path.settings.num_chains
    position = path.pack({name: value.unsqueeze(0) for name, value in values.items()})
    state = path.at(position.expand(num, *position.shape[1:]))
    log_w = torch.zeros_like(state.log_p, dtype=torch.float64)
    acceptance = torch.zeros_like(log_w[0])
    for t, last, beta in reversed(list(_increments(path))):
        if t < len(steps):  # each transition is its own reversal
            state, accept = _move(path, state, beta, steps[t].vector)
            acceptance += accept.mean(0) / len(steps)
            tell()
        log_w += (beta - last) * (state.log_p - state.log_q).double()
    return log_w, _mean_acceptance(acceptance, steps)


def _increments(path: _Path) -> Iterator[tuple[int, float, float]]:
    """Index, temperature before and temperature after each step."""
    for t, (last, beta) in enumerate(zip(path.betas[:-1], path.betas[1:], strict=True)):
        yield t, last, beta


def _mean_acceptance(total: Tensor, steps: Sequence[_Step]) -> Tensor:
    return total if steps else torch.full_like(total, math.nan)


def _enclose(
    pair: Pair, scored: Sequence[str], num_rows: int, settings: _Settings, tell: _Teller
) -> dict[str, Tensor]:
    """Rows of the model's own, and the bounds of each."""
    nothing = dict.fromkeys(pair.modalities)
    trace = poutine.trace(pair.model).get_trace(nothing, num_rows=num_rows)
    x = {name: trace.nodes[name]["value"] for name in pair.modalities if name in scored}
    latents = {name: trace.nodes[name]["value"] for name in pair.latent_sites}
    path = _Path(pair, x, {}, settings)
    steps = _tune(path, tell)
    found = _anneal(path, steps, tell)
    log_w, acceptance = _return(path, steps, latents, tell)
    return {
        "lower": found["log_prob"],
        "upper": math.log(len(log_w)) - torch.logsumexp(-log_w, 0),
        "acceptance": torch.minimum(found["acceptance"], acceptance),
    }


def _names(pair: Pair, names: Names, what: str) -> list[str]:
    return modality_names(pair.modalities, names, what)


def _check_quantity(pair: Pair, of: Sequence[str], given: Sequence[str], where: str) -> None:
    if not of or set(of) & set(given):
        raise ValueError(
            f"{where}: expected disjoint sets and a non-empty 'of', found of={list(of)}, "
            f"given={list(given)}"
        )
    if reason := pair.unsupported(of, given):
        raise ValueError(f"{where}: {quantity_name(of, given)} is not defined; {reason}")


def _difference(joint: Arrays, known: Arrays) -> Arrays:
    """Joint minus marginal of independent runs; a row that knows nothing subtracts nothing."""
    nothing = np.isnan(known["log_prob"])
    found = {
        "log_prob": joint["log_prob"] - known["log_prob"],
        "mcse": np.hypot(joint["mcse"], known["mcse"]),
        "ess": np.fmin(joint["ess"], known["ess"]),
        "pareto_k": np.fmax(joint["pareto_k"], known["pareto_k"]),
        "acceptance": np.fmin(joint["acceptance"], known["acceptance"]),
    }
    return {kind: np.where(nothing, joint[kind], values) for kind, values in found.items()}
