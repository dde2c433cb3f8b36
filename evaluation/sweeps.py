"""Any measure against the share of what is missing, at test or at training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from torch import Tensor

from mmzoo.data import MultimodalDataset, missing_completely_at_random
from mmzoo.evaluation.pair import Pair, PyroPair
from mmzoo.evaluation.rowwise import Progress
from mmzoo.vae import MultimodalVAE

__all__ = ["missingness_sweep"]

Measure = Callable[[Pair, MultimodalDataset], float | xr.Dataset]
Factory = Callable[[MultimodalDataset, int], Pair]
Pattern = Callable[[MultimodalDataset, float, int], Mapping[str, Tensor]]


def missingness_sweep(
    measure: Measure,
    pair: Pair | Factory,
    dataset: MultimodalDataset,
    fractions: Sequence[float],
    *,
    at: Literal["test", "train"] = "test",
    test: MultimodalDataset | None = None,
    names: Sequence[str] | None = None,
    pattern: Pattern | None = None,
    seeds: Sequence[int] = (0,),
    on_progress: Progress | None = None,
) -> xr.Dataset:
    """A measure for each share of missing entries and each seed.

    Args:
        measure: From a pair and a data set to a number, or to a Dataset of the same dimensions
            each time, such as ``lambda pair, rows: coherence(pair, rows, classifiers)``.
        pair: The pair; for ``at="train"`` a function of the masked rows and a seed that trains one.
        dataset: The rows that lose entries: those of the test, or those of the training.
        fractions: Shares that are missing.
        at: Whether rows are missing at ``"test"`` or at ``"train"``.
        test: For ``at="train"``: the rows that the measure sees, as they are.
        names: Modalities that lose this share of their rows; default: all of them.
        pattern: From the data set, the share and a seed to masks; default: missing completely at
            random, no row losing everything, by :func:`mmzoo.data.missing_completely_at_random`.
        seeds: Of the masks, and of the training.
        on_progress: Called with the cells done and in all.

    Returns:
        The measure's variables over ``fraction``, ``seed`` and their own dimensions (a number is
        ``value``), and ``missing``, the share that is missing indeed, of the named modalities.

    Raises:
        ValueError: For fractions outside [0, 1], or a pair or test rows that do not go with `at`.
        TypeError: For a measure that gives neither a number nor a Dataset.

    Example:
        >>> from mmzoo.data import load
        >>> from mmzoo.models import MVAE
        >>> train, test = load("digits")
        >>> vae = MVAE(train.modalities, 2)
        >>> masks = lambda pair, rows: float(rows.observed["image"].sum())
        >>> found = missingness_sweep(masks, vae, test, [0.1, 0.5], names=["image"])
        >>> found["value"].values.ravel().tolist()
        [324.0, 180.0]
    """
    _check(pair, dataset, fractions, at, test, names, seeds)
    parts = list(dataset.names) if names is None else list(names)
    masks_of = pattern or _at_random(parts)
    found: list[list[xr.Dataset]] = []
    done = 0
    for fraction in fractions:
        row = []
        for seed in seeds:
            masked = dataset.with_observed(masks_of(dataset, fraction, seed))
            if at == "train":
                assert test is not None
                cell = measure(pair(masked, seed), test)
            else:
                cell = measure(pair, masked)  # type: ignore[arg-type]
            row.append(_as_dataset(cell).assign(missing=_missing(masked, parts)))
            done += 1
            if on_progress:
                on_progress(done, len(fractions) * len(seeds))
        found.append(row)
    where = {"join": "outer", "combine_attrs": "drop_conflicts", "coords": "minimal"}
    options: dict[str, Any] = {**where, "compat": "equals", "data_vars": "all"}
    over_seeds = [xr.concat(row, _index("seed", seeds), **options) for row in found]
    joined = xr.concat(over_seeds, _index("fraction", fractions), **options)
    return joined.assign_attrs(at=at, missing_modalities=", ".join(parts))


def _index(name: str, values: Sequence[float]) -> xr.DataArray:
    return xr.DataArray(list(values), dims=name, coords={name: list(values)}, name=name)


def _check(
    pair: Pair | Factory,
    dataset: MultimodalDataset,
    fractions: Sequence[float],
    at: str,
    test: MultimodalDataset | None,
    names: Sequence[str] | None,
    seeds: Sequence[int],
) -> None:
    where = "missingness_sweep"
    if at not in ("test", "train"):
        raise ValueError(f"{where} at: expected 'test' or 'train', found {at!r}")
    if len(fractions) == 0 or len(seeds) == 0:
        raise ValueError(
            f"{where}: expected at least one fraction and one seed, found {list(fractions)} and "
            f"{list(seeds)}"
        )
    if bad := [each for each in fractions if not 0.0 <= each <= 1.0]:
        raise ValueError(f"{where} fractions: expected shares in [0, 1], found {bad}")
    for what, values in (("fractions", fractions), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"{where} {what}: expected each once, found {list(values)}")
    if unknown := [name for name in names or () if name not in dataset.names]:
        raise ValueError(
            f"{where} names: unknown modalities {unknown}; the data set has "
            f"{', '.join(dataset.names)}"
        )
    trained = isinstance(pair, MultimodalVAE | PyroPair)
    if at == "train" and (trained or test is None):
        raise ValueError(
            f"{where} at='train': expected a function (rows, seed) -> pair and test=…, found "
            f"{type(pair).__name__} and {'no test rows' if test is None else 'test rows'}"
        )
    if at == "test" and (not trained or test is not None):
        raise ValueError(
            f"{where} at='test': expected a trained pair and no test=…, found "
            f"{type(pair).__name__} and {'no test rows' if test is None else 'test rows'}; the "
            "rows that lose entries are the data set"
        )


def _at_random(names: Sequence[str]) -> Pattern:
    def pattern(dataset: MultimodalDataset, fraction: float, seed: int) -> dict[str, Tensor]:
        shares = dict.fromkeys(names, float(fraction))
        return missing_completely_at_random(dataset, shares, seed=seed)

    return pattern


def _missing(dataset: MultimodalDataset, names: Sequence[str]) -> float:
    """Share of the entries of the named modalities that is missing."""
    lost = [
        float((~dataset.observed[name]).double().mean()) if name in dataset.observed else 0.0
        for name in names
    ]
    return float(np.mean(lost))


def _as_dataset(found: float | xr.Dataset) -> xr.Dataset:
    if isinstance(found, xr.Dataset):
        return found
    if isinstance(found, xr.DataArray) and found.ndim > 0:
        return found.to_dataset(name=found.name or "value")
    try:
        return xr.Dataset({"value": float(found)})
    except (TypeError, ValueError) as error:
        raise TypeError(
            "missingness_sweep measure: expected a number or a Dataset, found "
            f"{type(found).__name__}"
        ) from error
