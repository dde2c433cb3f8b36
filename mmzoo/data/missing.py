"""Simulated missingness: masks, name -> bool (N,), True where a row keeps the modality.

`dataset.with_observed(masks)` applies them. Every function is a deterministic function of its seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mmzoo.data.dataset import MultimodalDataset

__all__ = ["label_dependent", "missing_completely_at_random", "paired_fraction"]


def _rows_and_names(
    rows: MultimodalDataset | int, names: Sequence[str] | None
) -> tuple[int, list[str]]:
    if isinstance(rows, MultimodalDataset):
        known = list(rows.names)
        if names is not None and set(names) != set(known):
            raise ValueError(
                f"names: expected {known} as in the data set, found {list(names)}; leave names out"
            )
        return len(rows), known
    if not isinstance(rows, int | np.integer) or rows < 1:
        raise ValueError(
            f"rows: expected a data set or a positive number of rows, found {rows!r}; "
            "give len(dataset)"
        )
    return int(rows), list(names or ())


def _check_probability(where: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{where}: expected a value in [0, 1], found {value}; give a probability")


def _check_unmasked(rows: MultimodalDataset | int) -> None:
    if isinstance(rows, MultimodalDataset) and rows.observed:
        raise ValueError(
            f"rows: expected a data set without masks, found masks for {list(rows.observed)}, so a "
            "row could be left with nothing; use dataset.complete(), or give len(dataset)"
        )


def _keep_one(observed: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Give each empty row one entry of a row that has several; column sums stay as they are.

    Each non-empty row keeps one entry, drawn at random; the others are on offer. There are enough
    of them whenever the entries are at least as many as the rows.
    """
    observed = observed.copy()  # (N, M)
    empty = np.flatnonzero(~observed.any(-1))
    kept = np.where(observed, random.random(observed.shape), -1.0).argmax(-1)
    offers = observed.copy()
    offers[np.arange(len(observed)), kept] = False
    chosen = random.permutation(np.argwhere(offers))[: len(empty)]
    observed[chosen[:, 0], chosen[:, 1]] = False
    observed[empty, chosen[:, 1]] = True
    return observed


def missing_completely_at_random(
    rows: MultimodalDataset | int,
    fractions: Mapping[str, float],
    *,
    seed: int,
    keep_one: bool = True,
    names: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Remove a modality from a random set of rows, whatever their values.

    Counts are exact: modality m is missing in round(fractions[m] * N) rows, and every row is as
    likely to be among them as any other. The draws of the modalities are independent of each other,
    except that with `keep_one` a row that would lose everything takes over an entry from a row that
    has more than one; counts do not change.

    Args:
        rows: the data set, or N.
        fractions: name -> fraction of rows in which this modality is missing.
        seed: of the draw.
        keep_one: leave no row without any modality.
        names: all modalities, where `rows` is a number; by default those of `fractions`.

    Returns:
        A mask for each name in `fractions`.

    Example:
        >>> masks = missing_completely_at_random(8, {"a": 0.5, "b": 0.25}, seed=0)
        >>> {name: int(mask.sum()) for name, mask in masks.items()}
        {'a': 4, 'b': 6}
    """
    count, known = _rows_and_names(rows, names)
    known = known or list(fractions)
    if unknown := [name for name in fractions if name not in known]:
        raise ValueError(f"fractions: expected names among {known}, found {unknown}; remove them")
    for name, fraction in fractions.items():
        _check_probability(f"fractions[{name!r}]", fraction)
    random = np.random.default_rng(seed)
    missing = np.array([round(fractions.get(name, 0.0) * count) for name in known])
    observed = np.stack([random.permutation(count) >= number for number in missing], -1)  # (N, M)
    if keep_one:
        _check_unmasked(rows)
        if observed.sum() < count:
            raise ValueError(
                f"fractions: expected at least {count} observed entries for {count} rows, found "
                f"{observed.sum()}; lower the fractions or set keep_one=False"
            )
        observed = _keep_one(observed, random)
    masks = {name: observed[:, number] for number, name in enumerate(known)}
    return {name: torch.from_numpy(masks[name].copy()) for name in fractions}


def paired_fraction(
    rows: MultimodalDataset | int,
    fraction: float,
    *,
    seed: int,
    names: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Keep round(fraction * N) random rows complete; each other row keeps exactly one modality.

    The incomplete rows are spread evenly: numbers of rows per modality differ by one at most.
    The weakly supervised experiments of the MVAE paper remove pairs in this way:
    Multimodal Generative Models for Scalable Weakly-Supervised Learning (Wu & Goodman, 2018),
    https://arxiv.org/abs/1802.05335

    Args:
        rows: the data set, or N.
        fraction: of the rows that stay complete.
        seed: of the draw.
        names: the modalities, needed where `rows` is a number.
    """
    count, known = _rows_and_names(rows, names)
    if not known:
        raise ValueError("names: expected the modalities, found none; give names=['image', …]")
    _check_unmasked(rows)
    _check_probability("fraction", fraction)
    random = np.random.default_rng(seed)
    paired = round(fraction * count)
    order = random.permutation(count)
    only = np.arange(count - paired) % len(known)
    observed = np.ones((count, len(known)), dtype=bool)
    observed[order[paired:]] = only[:, None] == random.permutation(len(known))
    return {name: torch.from_numpy(observed[:, m].copy()) for m, name in enumerate(known)}


def label_dependent(
    labels: np.ndarray | Tensor,
    probabilities: Mapping[object, float] | Sequence[float] | np.ndarray,
    *,
    name: str,
    seed: int,
) -> dict[str, Tensor]:
    """Remove one modality with a probability that depends on the row's label.

    Rows are drawn independently, so the number that is missing in a class is binomial.

    Args:
        labels: (N,) classes.
        probabilities: label -> probability that the modality is missing; a sequence is read as the
            probabilities of the labels 0, 1, ….
        name: of the modality.
        seed: of the draw.

    Returns:
        `{name: mask}`.

    Example:
        >>> label_dependent(np.array([0, 1, 1]), [0.0, 1.0], name="image", seed=0)
        {'image': tensor([ True, False, False])}
    """
    labels = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels: expected shape (N,), found {labels.shape}; give one per row")
    if not isinstance(probabilities, Mapping):
        probabilities = dict(enumerate(probabilities))
    for label, probability in probabilities.items():
        _check_probability(f"probabilities[{label!r}]", probability)
    classes, inverse = np.unique(labels, return_inverse=True)
    if absent := [label for label in classes.tolist() if label not in probabilities]:
        raise ValueError(
            f"probabilities: expected one for every label, found none for {absent}; add them"
        )
    missing = np.array([probabilities[label] for label in classes.tolist()])[inverse]
    observed = np.random.default_rng(seed).random(len(labels)) >= missing
    return {name: torch.from_numpy(observed)}
