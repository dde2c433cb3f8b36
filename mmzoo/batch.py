"""The one entry through which every batch passes: shapes, names, masks, values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor

from mmzoo.modality import Modality

__all__ = ["Batch", "check_batch", "modality_names"]


@dataclass(frozen=True)
class Batch:
    """Checked rows: values in the model's precision, and who has what.

    Attributes:
        x: Name to values ``(N, *event_shape)``, or None for a modality that is to be sampled.
        observed: Name to bool mask ``(*, N)``, or None where every row has the modality.
        shape: Shape of the rows, ``(*, N)``.
    """

    x: dict[str, Tensor | None]
    observed: dict[str, Tensor | None]
    shape: torch.Size

    def mask(self, names: Iterable[str]) -> Tensor | None:
        """Masks of the named modalities side by side, ``(*, N, M)``; None if nothing is missing."""
        names = list(names)
        if all(self.has(name) and self.observed.get(name) is None for name in names):
            return None
        device = self.device
        columns = []
        for name in names:
            column = self.observed.get(name)
            if not self.has(name):
                column = torch.zeros((), dtype=torch.bool, device=device)
            elif column is None:
                column = torch.ones((), dtype=torch.bool, device=device)
            columns.append(column.expand(self.shape))
        return torch.stack(columns, -1)

    def has(self, name: str) -> bool:
        """Whether any value of this modality was given."""
        return self.x.get(name) is not None

    def seen_through(self, mask: Tensor, names: Iterable[str]) -> Batch:
        """The same values under other masks, ``(*, N, M)``, which need no second check.

        Args:
            mask: Masks of the named modalities side by side; a mask may shrink, never grow.
            names: The modalities.
        """
        shape = torch.Size((*mask.shape[:-2], self.shape[-1]))
        columns = zip(names, mask.unbind(-1), strict=True)
        masks = {name: column.expand(shape) for name, column in columns if self.has(name)}
        return Batch(self.x, {**masks}, shape)

    @property
    def device(self) -> torch.device | None:
        """Where the values live; None if there are none."""
        return next((value.device for value in self.x.values() if value is not None), None)


def modality_names(modalities: Collection[str], names: Iterable[str], what: str) -> list[str]:
    """The names as a list, or a ValueError that lists the known ones."""
    if isinstance(names, str):
        names = [names]
    found = list(names)
    for name in found:
        if name not in modalities:
            raise ValueError(
                f"{what}: unknown modality {name!r}; this model has {', '.join(modalities)}"
            )
    return found


def check_batch(
    modalities: Mapping[str, Modality],
    x: Mapping[str, Tensor | None] | None,
    observed: Mapping[str, Tensor] | None = None,
    *,
    num_rows: int | None = None,
    dtype: torch.dtype | None = None,
    values: bool | None = None,
) -> Batch:
    """Checks a batch against the modalities of a model and brings it into one form.

    Args:
        modalities: Name to modality.
        x: Name to values ``(N, *event_shape)``; an absent key is missing for the whole batch, and
            None stands for a modality that the model is to sample.
        observed: Name to bool mask ``(*, N)``; an absent key has all rows.
        num_rows: N, needed where ``x`` holds no values.
        dtype: Floating type of the model.
        values: Whether to look at the values (NaN, support); default: while Pyro validates.

    Raises:
        ValueError: For an unknown name, wrong shape, empty batch or bad value; it names the place.
        TypeError: For something that is no dict of tensors, or no bool mask.
    """
    values = is_validation_enabled() if values is None else values
    x, observed = _as_dicts(modalities, x, observed)
    if observed and torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise ValueError(
            "observed: expected no masks while torch.jit traces, found those of "
            f"{', '.join(observed)}; which rows are decoded follows from them, so that a compiled "
            "loss would keep the first batch's: use Trace_ELBO() in place of JitTrace_ELBO()"
        )
    rows = _num_rows(modalities, x, num_rows)
    masks: dict[str, Tensor | None] = {}
    lead = torch.Size()
    for name, mask in observed.items():
        _check_mask(name, mask, rows)
        if x.get(name) is not None:
            masks[name] = mask
            # As a rule all masks are of one shape, and torch takes its time to find out.
            if mask.shape[:-1] != lead:
                lead = torch.broadcast_shapes(lead, mask.shape[:-1]) if lead else mask.shape[:-1]
    checked: dict[str, Tensor | None] = {}
    for name, value in x.items():
        if value is None:
            checked[name] = None
            continue
        seen = masks.get(name)
        if values:
            if seen is not None:
                seen = seen.expand(*seen.shape[:-1], rows).reshape(-1, rows).any(0)
            modalities[name].check(value, seen, values=True)
        checked[name] = modalities[name].cast(value, dtype or torch.get_default_dtype())
    return Batch(checked, masks, torch.Size((*lead, rows)))


def _as_dicts(
    modalities: Mapping[str, Modality],
    x: Mapping[str, Tensor | None] | None,
    observed: Mapping[str, Tensor] | None,
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    for what, mapping in (("x", x), ("observed", observed)):
        if mapping is not None and not isinstance(mapping, Mapping):
            raise TypeError(
                f"{what}: expected a dict from modality name to tensor, found "
                f"{type(mapping).__name__}"
            )
        modality_names(modalities, mapping or (), what)
    return dict(x or {}), dict(observed or {})


def _num_rows(
    modalities: Mapping[str, Modality], x: Mapping[str, Tensor | None], num_rows: int | None
) -> int:
    for name, value in x.items():
        if value is None:
            continue
        modalities[name].check(value, None, values=False)
        rows = value.shape[value.dim() - len(modalities[name].event_shape) - 1]
        if num_rows is not None and rows != num_rows:
            raise ValueError(
                f"modality {name!r}: expected {num_rows} rows as elsewhere in the batch, found "
                f"{rows}; give every modality the same rows, masking what is missing"
            )
        num_rows = rows
    if num_rows is None:
        raise ValueError(
            "x: expected values for at least one modality, found none; pass num_rows=… to sample "
            f"from the prior, or give some of {', '.join(modalities)}"
        )
    if num_rows < 1:
        raise ValueError("x: expected at least one row, found an empty batch; drop empty batches")
    return num_rows


def _check_mask(name: str, mask: Tensor, rows: int) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"observed[{name!r}]: expected a bool tensor ({rows},), found {found}; convert it with "
            "torch.as_tensor(mask).bool()"
        )
    # One entry stands for every row; (N, 1) would give every row the masks of all.
    if mask.dim() < 1 or (mask.shape[-1] != rows and mask.shape != (1,)):
        raise ValueError(
            f"observed[{name!r}]: expected shape ({rows},), found {tuple(mask.shape)}; one entry "
            "for each row of x"
        )
