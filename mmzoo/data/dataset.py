"""A multimodal data set: arrays, masks and labels that share their rows.

Rows are selected by index and never copied: `subset`, `split` and `complete` hold row numbers, and
a batch is one `index_select` per modality. Arrays of type `numpy.memmap` stay on disk.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmzoo.likelihoods import Categorical
from mmzoo.modality import Modality

__all__ = ["Index", "MultimodalDataset"]

Index = int | slice | range | Sequence[int] | np.ndarray | Tensor
"""Which rows: numbers (negative ones count from the end), a slice, or one bool per row."""


def _to_tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor, sharing memory where torch can."""
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    elif array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # torch warns about read-only memory and refuses negative strides.
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def _to_batch(values: Tensor, modality: Modality | None) -> Tensor:
    dtype = torch.get_default_dtype()
    if values.is_floating_point():
        if modality is None or not isinstance(modality.likelihood, Categorical):
            return values.to(dtype)
        # Labels with holes, which pandas keeps as floats: masks say where the holes are.
        labels = values.nan_to_num(0.0)
        return labels.long() if bool((labels == labels.round()).all()) else values.to(dtype)
    if modality is not None:
        return modality.cast(values, dtype)
    # bool and uint8 are compact storage of binary and grey values; wider integers count or index.
    return values.to(dtype if values.dtype in (torch.bool, torch.uint8) else torch.int64)


@dataclasses.dataclass(frozen=True)
class _Column:
    """The stored values of one modality, and which of them are its rows (all if `rows` is None)."""

    values: Tensor | np.memmap
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values) if self.rows is None else len(self.rows)

    def subset(self, index: Tensor) -> _Column:
        return _Column(self.values, index if self.rows is None else self.rows[index])

    def read(self, index: Tensor | slice, device: torch.device) -> Tensor:
        if self.rows is not None:
            index = self.rows[index]
        if isinstance(self.values, Tensor):
            if isinstance(index, slice):
                return self.values[index].to(device)
            return self.values.index_select(0, index.to(self.values.device)).to(device)
        chosen = self.values[index if isinstance(index, slice) else index.numpy()]
        return _to_tensor(np.array(chosen)).to(device)

    def to(self, device: torch.device) -> _Column:
        if not isinstance(self.values, Tensor):
            return self
        if self.rows is None:
            return _Column(self.values.to(device))
        return _Column(self.values.index_select(0, self.rows.to(self.values.device)).to(device))


def _named(argument: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{argument}: expected a dict name -> array, found {type(values).__name__}; "
            f"write {argument}={{'image': array}}"
        )
    return dict(values)


def _is_real(values: np.ndarray | Tensor) -> bool:
    if isinstance(values, Tensor):
        return not values.is_complex()
    return values.dtype.kind in "biuf"


def _column(name: str, values: Any) -> _Column:
    if not isinstance(values, np.ndarray | Tensor):
        raise TypeError(
            f"x[{name!r}]: expected a numpy array or a tensor, found {type(values).__name__}; "
            "convert it, or use from_pandas or from_xarray"
        )
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(
            f"x[{name!r}]: expected a plain array, found a masked one; give its data, and in "
            f"observed[{name!r}] the rows that it has"
        )
    if not _is_real(values):
        raise TypeError(
            f"x[{name!r}]: expected numbers or booleans, found dtype {values.dtype}; "
            "encode it as numbers first"
        )
    if values.ndim == 0:
        raise ValueError(
            f"x[{name!r}]: expected shape (N, *event_shape), found a scalar; "
            "the first dimension counts the rows"
        )
    if isinstance(values, Tensor):
        return _Column(values.detach())
    return _Column(values if isinstance(values, np.memmap) else _to_tensor(values))


def _number_of_rows(columns: Mapping[str, _Column]) -> int:
    if not columns:
        raise ValueError("x: expected at least one modality, found none; give x={'image': array}")
    counts = {name: len(column) for name, column in columns.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"x: expected as many rows in every modality, found {counts}; give all rows and say in "
            "`observed` which of them are missing"
        )
    count = next(iter(counts.values()))
    if count == 0:
        raise ValueError(
            "x: expected at least one row, found none; check the files or the selection"
        )
    return count


def _mask(name: str, mask: Any, rows: int) -> Tensor:
    if not isinstance(mask, np.ndarray | Tensor) or mask.dtype not in (torch.bool, np.bool_):
        found = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(
            f"observed[{name!r}]: expected a bool array or tensor, found {found}; "
            "True stands for observed"
        )
    if tuple(mask.shape) != (rows,):
        raise ValueError(
            f"observed[{name!r}]: expected shape ({rows},), found {tuple(mask.shape)}; "
            "a mask has one entry per row"
        )
    return mask.cpu() if isinstance(mask, Tensor) else _to_tensor(mask)


def _masks(
    observed: Mapping[str, Any] | None, known: Sequence[str], rows: int
) -> dict[str, Tensor]:
    observed = _named("observed", {} if observed is None else observed)
    if unknown := [name for name in observed if name not in known]:
        raise ValueError(
            f"observed: expected masks for the modalities {list(known)}, found {unknown}; "
            "remove them or add their values to x"
        )
    return {name: _mask(name, mask, rows) for name, mask in observed.items()}


def _label(name: str, values: Any, rows: int) -> np.ndarray:
    values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if values.dtype.kind == "O":
        raise TypeError(
            f"labels[{name!r}]: expected numbers, booleans or strings, found dtype object; "
            "convert them to one type"
        )
    if values.shape[:1] != (rows,):
        raise ValueError(
            f"labels[{name!r}]: expected {rows} rows, found shape {values.shape}; "
            "labels have one entry per row"
        )
    return values


def _sizes(parts: Sequence[float], rows: int) -> list[int]:
    """Sizes of the parts; fractions are rounded cumulatively, so that they add up to `rows`."""
    if len(parts) > 0 and all(isinstance(part, int | np.integer) for part in parts):
        total, ends = sum(parts), np.cumsum(parts)
        if total != rows:
            raise ValueError(
                f"split: expected sizes that add up to {rows} rows, found {list(parts)} with sum "
                f"{total}; give the rest as one more part"
            )
    else:
        total = math.fsum(parts)
        if not math.isclose(total, 1.0):
            raise ValueError(
                f"split: expected fractions that add up to 1, found {list(parts)} with sum "
                f"{total:g}; give the rest as one more part"
            )
        ends = np.rint(np.cumsum(parts) * rows).astype(int)
    sizes = np.diff(ends, prepend=0).tolist()
    if min(sizes) < 1:
        raise ValueError(
            f"split: expected at least one row in each part, found sizes {sizes}; "
            "use fewer or larger parts"
        )
    return sizes


def _permutation(rows: int, seed: int | None, generator: torch.Generator | None) -> Tensor:
    if seed is not None and generator is not None:
        raise ValueError("batches: expected a seed or a generator, found both; give one of them")
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    device = "cpu" if generator is None else generator.device
    return torch.randperm(rows, generator=generator, device=device).cpu()


class MultimodalDataset:
    """Arrays of several modalities with the same rows, in memory or memory-mapped.

    Values are not copied: an array in memory is shared, a `numpy.memmap` stays on disk and is read
    batch by batch. Batches have torch's default floating-point type; integers have the type that
    their modality asks for (int64 for classes) or, without `modalities`, int64 if they are wider
    than uint8. What stands under a False mask is never looked at.

    Args:
        x: name -> array or tensor (N, *event_shape); an absent modality is missing everywhere.
        observed: name -> bool (N,), True where the row has it; an absent name means all.
        labels: name -> array (N, ...) of what no model sees: classes for probes and coherence.
        modalities: what the modalities are; checks names and event shapes.
        transform: from a batch `x` to the batch `x` that models see, for instance a scaling.
        sampler: from (row numbers, epoch, seed) to new values (N, *event_shape) of some modalities;
            what `resample` calls.

    Example:
        >>> import numpy as np
        >>> x = {"image": np.zeros((5, 1, 8, 8)), "label": np.eye(5)}
        >>> data = MultimodalDataset(x, observed={"label": np.arange(5) > 1})
        >>> len(data), len(data.complete())
        (5, 3)
        >>> [batch["image"].shape[0] for batch, observed in data.batches(2)]
        [2, 2, 1]
    """

    def __init__(
        self,
        x: Mapping[str, np.ndarray | Tensor],
        observed: Mapping[str, np.ndarray | Tensor] | None = None,
        labels: Mapping[str, np.ndarray | Tensor] | None = None,
        modalities: Sequence[Modality] | None = None,
        transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        *,
        sampler: Callable[[Tensor, int, int], dict[str, Tensor]] | None = None,
    ) -> None:
        self._columns = {name: _column(name, values) for name, values in _named("x", x).items()}
        rows = _number_of_rows(self._columns)
        self.modalities = None if modalities is None else list(modalities)
        self.device = torch.device("cpu")
        self.rows = torch.arange(rows)
        self._transform = transform
        self._sampler = sampler
        self.observed = _masks(observed, self.names, rows)
        labels = _named("labels", {} if labels is None else labels)
        self.labels = {name: _label(name, values, rows) for name, values in labels.items()}
        self._check_modalities()

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities that have values."""
        return tuple(self._columns)

    @property
    def memory_mapped(self) -> tuple[str, ...]:
        """The modalities whose values stay on disk."""
        return tuple(
            name for name, column in self._columns.items() if isinstance(column.values, np.memmap)
        )

    @property
    def _known(self) -> tuple[str, ...]:
        if self.modalities is None:
            return self.names
        return tuple(modality.name for modality in self.modalities)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        x, _ = self.batch([0])
        shapes = ", ".join(f"{name} {tuple(values.shape[1:])}" for name, values in x.items())
        return f"{type(self).__name__}({len(self)} rows: {shapes})"

    def _check_modalities(self) -> None:
        if self.modalities is None:
            return
        if unknown := [name for name in self.names if name not in self._known]:
            raise ValueError(
                f"x: expected the modalities {list(self._known)}, found {unknown}; "
                "remove them or add their Modality"
            )
        x, _ = self.batch([0])
        for modality in self.modalities:
            expected = tuple(modality.event_shape)
            if modality.name in x and x[modality.name].shape[1:] != expected:
                found = tuple(x[modality.name].shape[1:])
                raise ValueError(
                    f"modality {modality.name!r}: expected event shape {expected}, found {found}; "
                    f"reshape x[{modality.name!r}] or set event_shape={found}"
                )

    def _replace(self, **attributes: Any) -> MultimodalDataset:
        new = copy.copy(self)
        vars(new).update(attributes)
        return new

    def _index(self, indices: Index) -> Tensor:
        if isinstance(indices, slice):
            return torch.arange(len(self))[indices]
        if not isinstance(indices, Tensor):
            indices = torch.from_numpy(np.array(indices))
        index = indices.cpu()
        if index.dtype == torch.bool:
            if index.shape != (len(self),):
                raise ValueError(
                    f"rows: expected one bool for each of {len(self)} rows, found shape "
                    f"{tuple(index.shape)}; give a mask of the rows or their numbers"
                )
            return index.nonzero().squeeze(-1)
        if index.numel() > 0 and index.is_floating_point():
            raise TypeError(
                f"rows: expected row numbers, found dtype {index.dtype}; give integers or bools"
            )
        index = index.to(torch.int64).reshape(-1)
        outside = index[(index < -len(self)) | (index >= len(self))]
        if len(outside) > 0:
            raise ValueError(
                f"rows: expected numbers below {len(self)}, found {outside[0].item()}; "
                "row numbers count from 0 within this data set"
            )
        return torch.where(index < 0, index + len(self), index)

    def _read(self, index: Tensor | slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x = {name: column.read(index, self.device) for name, column in self._columns.items()}
        known = {modality.name: modality for modality in self.modalities or ()}
        x = {name: _to_batch(values, known.get(name)) for name, values in x.items()}
        observed = {name: mask[index] for name, mask in self.observed.items()}
        return (x if self._transform is None else self._transform(x)), observed

    def batch(self, indices: Index) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The chosen rows as (x, observed) on the data set's device."""
        return self._read(self._index(indices))

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All rows as (x, observed); reads memory-mapped modalities whole."""
        return self._read(slice(None))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """One pass over the rows, as (x, observed) of `batch_size` rows each.

        Args:
            batch_size: rows in a batch; the last one may be smaller.
            shuffle: visit the rows in random order.
            seed: of the order.
            generator: of the order; with neither, torch's global generator is used.
            drop_last: leave out a last batch that is smaller.
        """
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(
                f"batches: expected a batch_size of at least 1, found {batch_size!r}; "
                "give a positive integer"
            )
        order = _permutation(len(self), seed, generator) if shuffle else None
        stop = len(self) - len(self) % batch_size if drop_last else len(self)
        return self._batches(order, batch_size, stop)

    def _batches(
        self, order: Tensor | None, batch_size: int, stop: int
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        for start in range(0, stop, batch_size):
            rows = slice(start, start + batch_size)
            yield self._read(rows if order is None else order[rows])

    def subset(self, indices: Index) -> MultimodalDataset:
        """The chosen rows, with their masks and labels, without copying values."""
        index = self._index(indices)
        if len(index) == 0:
            raise ValueError("subset: expected at least one row, found none; choose other rows")
        on_device = index.to(self.device)
        return self._replace(
            _columns={name: column.subset(index) for name, column in self._columns.items()},
            observed={name: mask[on_device] for name, mask in self.observed.items()},
            labels={name: values[index.numpy()] for name, values in self.labels.items()},
            rows=self.rows[index],
        )

    def split(self, parts: Sequence[float], *, seed: int) -> tuple[MultimodalDataset, ...]:
        """A random partition of the rows.

        Args:
            parts: sizes (all integers, sum N) or fractions (sum 1).
            seed: of the partition.
        """
        sizes = _sizes(parts, len(self))
        order = _permutation(len(self), seed, None)
        return tuple(self.subset(rows) for rows in order.split(sizes))

    def complete(self) -> MultimodalDataset:
        """The rows in which every modality is observed; they need no masks."""
        absent = [name for name in self._known if name not in self.names]
        masks = [mask.cpu() for mask in self.observed.values()]
        everything = torch.stack([torch.ones(len(self), dtype=torch.bool), *masks]).all(0)
        if absent or not everything.any():
            reason = f"{absent} have no values" if absent else "each row lacks a modality"
            raise ValueError(
                f"complete: expected rows with all of {list(self._known)}, found none ({reason}); "
                "use the incomplete rows, or fewer modalities"
            )
        return self.subset(everything)._replace(observed={})

    def with_observed(self, masks: Mapping[str, np.ndarray | Tensor]) -> MultimodalDataset:
        """The same rows, observed where they were and where `masks` says so.

        A row that was missing stays missing: simulated missingness cannot bring values back.
        """
        masks = _masks(masks, self.names, len(self))
        new = {name: mask.to(self.device) for name, mask in masks.items()}
        both = {name: mask & self.observed.get(name, mask) for name, mask in new.items()}
        return self._replace(observed={**self.observed, **both})

    def to(self, device: torch.device | str) -> MultimodalDataset:
        """The data set on a device; memory-mapped modalities move batch by batch."""
        device = torch.device(device)
        return self._replace(
            _columns={name: column.to(device) for name, column in self._columns.items()},
            observed={name: mask.to(device) for name, mask in self.observed.items()},
            device=device,
        )

    def resample(self, epoch: int, seed: int) -> MultimodalDataset:
        """The data set of this epoch: fresh values where the data are sampled, itself otherwise.

        A function of (seed, epoch, original row): a subset of the resampled data and the resampled
        subset are the same.
        """
        if self._sampler is None:
            return self
        values = self._sampler(self.rows, epoch, seed)
        fresh = {name: _column(name, new).to(self.device) for name, new in values.items()}
        return self._replace(_columns={**self._columns, **fresh})
