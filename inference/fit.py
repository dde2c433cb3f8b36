"""The training loop: stochastic variational inference on Lightning's Fabric."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn

from mmzoo.batch import check_batch
from mmzoo.data import MultimodalDataset
from mmzoo.inference.alignment import Wasserstein, alignment_terms
from mmzoo.inference.objective import ObjectiveModule, owner, recorded_terms, steps_ahead
from mmzoo.inference.subset import SubsetELBO
from mmzoo.inference.support import check_support
from mmzoo.seeding import seeded
from mmzoo.vae import MultimodalVAE

__all__ = ["FitResult", "fit"]

_KEPT_CHECK_ROWS = 4096


@dataclass
class FitResult:
    """What a training run leaves behind.

    Attributes:
        history: One entry for each epoch: ``loss`` and ``validation_loss`` (minus the bound, nats
            per row), ``log_likelihood`` (E log p(x_m | z) by modality, nats per row that has it),
            ``kl`` (by latent site, nats per row), ``alignment`` (by term, unweighted, per row),
            ``wasserstein`` (squared distance between unimodal posteriors, summed over pairs,
            whether or not it is optimised), ``gradient_norm``, ``learning_rate``, ``seconds``.
        stopped: Why the run ended: ``"epochs"``, ``"early stopping"`` or ``"diverged"``.
        best_epoch: The epoch whose weights the model has now.
    """

    history: xr.Dataset
    stopped: str
    best_epoch: int


@dataclass
class _Record:
    """Sums over the batches of an epoch."""

    sums: dict[tuple[str, str], float] = field(default_factory=dict)
    counts: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, kind: str, name: str, total: Any, count: Any = 1.0) -> None:
        key = (kind, name)
        self.sums[key] = self.sums.get(key, 0.0) + float(total)
        self.counts[key] = self.counts.get(key, 0.0) + float(count)

    def means(self) -> dict[tuple[str, str], float]:
        return {
            key: total / self.counts[key] if self.counts[key] else math.nan
            for key, total in self.sums.items()
        }


def fit(
    vae: MultimodalVAE,
    train: MultimodalDataset,
    *,
    validation: MultimodalDataset | None = None,
    guide: Callable[..., Any] | None = None,
    objective: ELBO | None = None,
    epochs: int = 50,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    gradient_clip: float | None = None,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
    accelerator: str = "auto",
    devices: int | str = 1,
    precision: Any = None,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
) -> FitResult:
    """Trains a model, and its own guide or yours.

    Args:
        vae: The model; trained in place, on the device that Fabric chooses, and left in eval mode.
        train: The rows.
        validation: Rows whose bound is watched; with ``patience`` the best weights are kept. The
            objective's schedules (``LinearWarmup``) have the values of the last step of the last
            epoch there, so that every epoch is judged by the same bound.
        guide: A Pyro guide over the same sites, in place of the model's own.
        objective: A Pyro ELBO or one of ours; default ``vae.objective()``, which visits subsets one
            by one for a guide of yours, so that masks are ``(N,)``.
        epochs: Passes over the rows.
        batch_size: Rows for each step.
        learning_rate: Of the default optimiser, Adam.
        optimizer: Called with the parameters, gives a ``torch.optim.Optimizer``.
        scheduler: Called with the optimiser, gives a schedule that is stepped after each *step*.
        gradient_clip: Largest norm of the gradient.
        patience: Epochs without a better validation bound after which to stop.
        seed: Of order, draws and subsets; the same seed on the same device repeats exactly. The
            global generators of Python, numpy and torch are seeded with it, as Fabric does.
        progress: Whether to show a progress bar with the running bound.
        accelerator: As Fabric takes it: ``"auto"``, ``"cpu"``, ``"cuda"``, …
        devices: As Fabric takes it.
        precision: As Fabric takes it. Mixed precision is for encoders and decoders: data, densities
            and the bound keep that of the parameters.
        on_epoch: Called after each epoch with its number and its figures.

    Returns:
        The history, why the run ended, and which epoch's weights the model has.

    Raises:
        TypeError: For rows that are no :class:`mmzoo.data.MultimodalDataset`.
        ValueError: For settings out of range, data that do not fit the model, a row with nothing
            observed, or what Pyro's validation finds on the first rows; none is done after them.
    """
    from lightning.fabric import Fabric

    if epochs < 1 or batch_size < 1:
        raise ValueError(f"fit: expected epochs, batch_size >= 1, found {epochs}, {batch_size}")
    if not 0 <= learning_rate < math.inf:
        raise ValueError(f"fit: expected a finite learning_rate >= 0, found {learning_rate}")
    if patience is not None and validation is None:
        raise ValueError(
            "fit: expected validation rows for patience, found none; pass validation=…"
        )
    for what, rows in (("train", train), ("validation", validation)):
        if rows is not None:
            check_rows(vae, rows, what)
    fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)
    fabric.launch()
    pyro.set_rng_seed(seed + fabric.global_rank)
    vae.to(fabric.device).train()
    guide = vae.guide if guide is None else guide
    loss = _loss_module(vae, guide, objective)
    first_x, first_observed = train.batch(np.arange(min(len(train), 8)))
    with pyro.validation_enabled(True):  # once, whatever the user has set
        parameters = _parameters(loss, _Rows(first_x, first_observed, fabric))
    made = optimizer or _adam
    optim = made(parameters, lr=learning_rate)
    module, optim = fabric.setup(loss, optim)
    schedule = scheduler(optim) if scheduler else None
    trainer = _Trainer(vae, module, optim, schedule, parameters, fabric, gradient_clip)
    with pyro.validation_enabled(False):
        return trainer.run(
            train, validation, epochs, batch_size, seed, patience, progress, on_epoch
        )


def check_rows(vae: MultimodalVAE, rows: MultimodalDataset, what: str) -> None:
    """Looks at every value once, and rejects rows with nothing observed."""
    if not isinstance(rows, MultimodalDataset):
        raise TypeError(
            f"fit {what}: expected a MultimodalDataset, found {type(rows).__name__}; a dict of "
            "arrays becomes one by MultimodalDataset(arrays, observed)"
        )
    for start in range(0, len(rows), _KEPT_CHECK_ROWS):
        x, observed = rows.batch(np.arange(start, min(start + _KEPT_CHECK_ROWS, len(rows))))
        batch = check_batch(vae.modalities, x, observed, values=True)
        check_support(vae, batch, first=start)
        mask = batch.mask(vae.modalities)
        empty = [] if mask is None else (~mask.any(-1)).nonzero().squeeze(-1).tolist()
        if empty:
            raise ValueError(
                f"{what}: expected something observed in every row, found nothing in row "
                f"{start + empty[0]} and {len(empty) - 1} others of its block; drop such rows"
            )


def _adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, fused=True)


class _Rows:
    """A batch on its device. No collection, in which Fabric would round x to a mixed precision."""

    def __init__(self, x: dict[str, Tensor], observed: dict[str, Tensor], fabric: Any) -> None:
        self.x = {name: value.to(fabric.device) for name, value in x.items()}
        self.observed = {name: mask.to(fabric.device) for name, mask in observed.items()}


class _Loss(ObjectiveModule):
    """The loss of a batch, summed over rows."""

    def forward(self, rows: _Rows) -> Tensor:
        return super().forward(rows.x, rows.observed)


def _loss_module(vae: MultimodalVAE, guide: Any, objective: ELBO | None) -> _Loss:
    if objective is None:
        objective = vae.objective()
        if isinstance(objective, SubsetELBO) and owner(guide) is not vae:
            objective.vectorized = False
    return _Loss(vae.model, guide, objective)


def _parameters(loss: _Loss, rows: _Rows) -> list[nn.Parameter]:
    """Trainable parameters of the networks, and those that a guide of the user's registers."""
    with torch.random.fork_rng(), torch.no_grad(), poutine.trace(param_only=True) as capture:
        loss(rows)
    found = {id(p): p for p in loss.parameters() if p.requires_grad}
    for site in capture.trace.nodes.values():
        if site["type"] == "param":
            leaf = site["value"].unconstrained()
            found.setdefault(id(leaf), leaf)
    if not found:
        raise ValueError(
            "fit: expected something to train, found no parameter that requires a gradient; "
            "unfreeze the model or the guide"
        )
    return list(found.values())


@dataclass
class _Trainer:
    vae: MultimodalVAE
    module: Any
    optim: Any
    schedule: Any
    parameters: list[nn.Parameter]
    fabric: Any
    gradient_clip: float | None

    def run(
        self,
        train: MultimodalDataset,
        validation: MultimodalDataset | None,
        epochs: int,
        batch_size: int,
        seed: int,
        patience: int | None,
        progress: bool,
        on_epoch: Callable[[int, dict[str, float]], None] | None,
    ) -> FitResult:
        history: list[dict[tuple[str, str], float]] = []
        good, best, best_epoch = self._state(), math.inf, -1
        stopped = "epochs"
        steps = math.ceil(len(train) / batch_size)
        with _bar(
            epochs * steps, f"{self.vae.title}", progress and self.fabric.is_global_zero
        ) as bar:
            for epoch in range(epochs):
                record = self._epoch(train.resample(epoch, seed), batch_size, seed, epoch, bar)
                if record is None:
                    self._restore(good)
                    stopped = "diverged"
                    warnings.warn(
                        f"fit: the loss of {self.vae.title} is not finite in epoch {epoch}; the "
                        "model has its last good weights. Lower the learning rate or clip "
                        "gradients",
                        stacklevel=3,
                    )
                    break
                if validation is not None:
                    # One bound for all epochs, or a warm-up would choose its own beginning.
                    left = (epochs - epoch - 1) * steps
                    with steps_ahead(self.module.elbo, left - 1):
                        self._validate(validation, batch_size, record)
                self._distance(train, batch_size, record)
                means = record.means()
                history.append(means)
                bar.tell(epoch, epochs, means)
                if on_epoch:
                    on_epoch(epoch, {name or kind: value for (kind, name), value in means.items()})
                watched = means.get(("validation_loss", ""), -float(epoch))
                if patience is None or watched < best:
                    best, best_epoch, good = watched, epoch, self._state()
                elif epoch - best_epoch >= patience:
                    self._restore(good)
                    stopped = "early stopping"
                    break
        if patience is not None and stopped == "epochs":
            self._restore(good)
        self.vae.eval()
        always = [("loss", ""), ("gradient_norm", ""), ("learning_rate", ""), ("seconds", "")]
        if validation is not None:
            always.insert(1, ("validation_loss", ""))
        found = _history(history, list(self.vae.modalities), always)
        return FitResult(found, stopped, best_epoch)

    def _epoch(
        self, rows: MultimodalDataset, batch_size: int, seed: int, epoch: int, bar: Any
    ) -> _Record | None:
        self.vae.train()
        record, start = _Record(), time.perf_counter()
        order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for x, observed in rows.batches(batch_size, shuffle=True, generator=order):
            num = len(next(iter(x.values())))
            with recorded_terms(self.module.elbo) as terms:
                loss = self.module(_Rows(x, observed, self.fabric)) / num
            if not loss.requires_grad:
                raise ValueError(
                    "fit: expected a loss that depends on what is trained, found a constant; give "
                    f"data that {self.vae.title} scores, not only {', '.join(x)}"
                )
            value = float(loss.detach())
            if not math.isfinite(value):
                return None
            self.optim.zero_grad(set_to_none=True)
            self.fabric.backward(loss)
            norm = self._norm()
            if not math.isfinite(norm):
                return None
            self.optim.step()
            if self.schedule is not None:
                self.schedule.step()
            record.add("loss", "", value * num, num)
            record.add("gradient_norm", "", norm)
            for each in (*terms, getattr(self.module.elbo, "terms", {})):
                self._add_terms(record, each)
            bar.step(value)
        record.add("learning_rate", "", self.optim.param_groups[0]["lr"])
        record.add("seconds", "", time.perf_counter() - start)
        return record

    def _norm(self) -> float:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.gradient_clip, norm)
        return float(norm)

    def _add_terms(self, record: _Record, terms: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (total, count) in terms.items():
            if name in self.vae.modalities:
                record.add("log_likelihood", name, total, count)
            elif name.split("_")[0] in ("z", "w"):  # sites of latents
                record.add("kl", name, total, count)
            else:
                record.add("alignment", name, total, count)

    @torch.no_grad()
    def _validate(self, rows: MultimodalDataset, batch_size: int, record: _Record) -> None:
        self.vae.eval()
        # The same draws in every epoch, and none taken from training.
        with seeded(0):
            for x, observed in rows.batches(max(batch_size, 512), shuffle=False):
                num = len(next(iter(x.values())))
                loss = self.module(_Rows(x, observed, self.fabric))
                record.add("validation_loss", "", float(loss), num)

    @torch.no_grad()
    def _distance(self, rows: MultimodalDataset, batch_size: int, record: _Record) -> None:
        """Squared Wasserstein distance between unimodal posteriors, optimised or not."""
        if len(self.vae.modalities) < 2 or not self.vae.has_diagonal_experts:
            return
        self.vae.eval()
        first = _Rows(*rows.batch(np.arange(min(len(rows), 1024))), self.fabric)
        distance = alignment_terms(self.vae, first.x, first.observed, Wasserstein())
        record.add("wasserstein", "", distance.sum(), distance.numel())

    def _state(self) -> list[Tensor]:
        return [t.detach().clone() for t in (*self.parameters, *self.vae.buffers())]

    def _restore(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, kept in zip((*self.parameters, *self.vae.buffers()), state, strict=True):
                tensor.copy_(kept)


class _Bar:
    """A progress bar that says the running bound; silent without a terminal to speak to."""

    def __init__(self, progress: Any, task: Any) -> None:
        self.progress, self.task = progress, task
        self.smooth: float | None = None

    def step(self, loss: float) -> None:
        self.smooth = loss if self.smooth is None else 0.98 * self.smooth + 0.02 * loss
        if self.progress is not None:
            self.progress.update(self.task, advance=1, bound=f"{-self.smooth:.2f}")

    def tell(self, epoch: int, epochs: int, means: dict[tuple[str, str], float]) -> None:
        if self.progress is None:
            return
        held = means.get(("validation_loss", ""))
        text = "" if held is None else f"  held out {-held:.2f}"
        self.progress.update(self.task, epoch=f"epoch {epoch + 1}/{epochs}{text}")


class _bar:
    def __init__(self, total: int, title: str, show: bool) -> None:
        self.total, self.title, self.show = total, title, show

    def __enter__(self) -> _Bar:
        if not self.show:
            return _Bar(None, None)
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description:8}"),
            BarColumn(bar_width=24),
            TextColumn("bound {task.fields[bound]} nats/row"),
            TextColumn("{task.fields[epoch]}"),
            TimeRemainingColumn(),
        )
        self.progress.start()
        task = self.progress.add_task(self.title, total=self.total, bound="…", epoch="")
        return _Bar(self.progress, task)

    def __exit__(self, *_: object) -> None:
        if self.show:
            self.progress.stop()


def _history(
    rows: list[dict[tuple[str, str], float]], names: list[str], always: list[tuple[str, str]]
) -> xr.Dataset:
    """One variable for each figure; modalities, latents and alignment terms are dimensions."""
    dims = {"log_likelihood": "modality", "kl": "latent", "alignment": "term"}
    keys = list(dict.fromkeys(key for row in rows for key in row)) or always
    epochs = np.arange(len(rows))
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(kind for kind, _ in keys):
        members = [name for k, name in keys if k == kind]
        if kind == "log_likelihood":
            members = [name for name in names if name in members]
        values = np.array([[row.get((kind, name), np.nan) for name in members] for row in rows])
        values = values.reshape(len(rows), len(members))  # also without any epoch
        if kind in dims:
            found[kind] = xr.DataArray(
                values, dims=("epoch", dims[kind]), coords={"epoch": epochs, dims[kind]: members}
            )
        else:
            found[kind] = xr.DataArray(values[:, 0], dims="epoch", coords={"epoch": epochs})
    return xr.Dataset(found, attrs={"units": "nats per row"})
