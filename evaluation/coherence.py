r"""Coherence: does what is generated show the class of what was observed?

Conditional coherence of modality m given a subset S, with a classifier c_m of m and true class y,

    E [ c_m(x'_m) = y ],    x'_m ~ p(x_m | z),    z ~ q(z | x_S);

joint coherence is the share of x' ~ p(z) prod_m p(x_m | z) whose modalities are classified alike.

`Variational Mixture-of-Experts Autoencoders for Multi-Modal Deep Generative Models
(Shi et al., 2019)`, https://arxiv.org/abs/1911.03393
`Generalized Multimodal ELBO (Sutter et al., 2021)`, https://arxiv.org/abs/2105.02470
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from torch import Tensor

from mmzoo.data import MultimodalDataset
from mmzoo.evaluation.classifiers import (
    Classifier,
    ClassifierLike,
    class_names,
    class_probabilities,
    judges,
    resting,
)
from mmzoo.evaluation.pair import Pair, device_of, quiet, subset_name
from mmzoo.evaluation.rowwise import (
    Progress,
    Subset,
    TaskRows,
    as_rows,
    check_sizes,
    decode_rows,
    decoded_value,
    is_label,
    labels_of,
    mean_and_error,
    prior_distributions,
    subsets_of,
    unanswered,
)

__all__ = ["coherence", "joint_coherence"]


def coherence(
    pair: Pair,
    data: MultimodalDataset | Mapping[str, Tensor],
    classifiers: Mapping[str, ClassifierLike],
    *,
    labels: str | np.ndarray | Tensor | None = None,
    observed: Mapping[str, Tensor] | None = None,
    given: Sequence[str | Sequence[str]] | str | None = None,
    num_draws: int = 1,
    pool: bool = False,
    mean: bool = True,
    batch_size: int = 256,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> xr.Dataset:
    """Conditional coherence of every modality given every subset: cross-generation accuracy.

    A row counts where it has all of the subset and a label.

    Args:
        pair: The pair.
        data: The rows: a data set, or name to values ``(N, *event_shape)``.
        classifiers: Name to classifier: of :func:`train_classifier`, or a callable from values to
            logits ``(N, C)`` or classes ``(N,)``. Label modalities are read where none is given;
            modalities without a classifier are not judged.
        labels: Name of a label of the data set or of a label modality, or an array ``(N,)`` in
            which NaN stands for no label; default: the only one that there is.
        observed: Name to bool mask ``(N,)``; of a data set its own.
        given: Subsets, each a name or several names; default: all.
        num_draws: K, draws of z for each row, whose hits are averaged.
        pool: Whether the K draws vote instead, by the mean of their class probabilities: the
            likeliest class under ``mean_k p(class | z_k)``.
        mean: Whether to judge the mean of ``p(x_m | z)``, as is customary, or a draw from it.
        batch_size: Rows at a time; memory goes with this number times K.
        seed: Of the draws.
        on_progress: Called with the batches done and in all.

    Returns:
        Over ``subset`` and ``target``: ``coherence``, ``standard_error`` over rows, ``num_rows``,
        ``cross`` (the target is not in the subset). Over ``subset``: ``note``, why one is empty.
        Over ``size``: ``average`` of the cross cells given so many modalities, with its
        ``average_standard_error``. Over ``target``: ``classifier_accuracy`` on the rows
        themselves, with ``classifier_standard_error``, which bounds what can be measured.

    Raises:
        ValueError: For unknown names, labels that no classifier can give, or too few draws.
    """
    check_sizes("coherence", num_draws=num_draws, batch_size=batch_size)
    rows = as_rows(pair, data, observed, "coherence")
    truth, labelled = labels_of(pair, data, labels, rows, "coherence")
    chosen = {
        name: judge
        for name, judge in judges(pair, classifiers, "coherence").items()
        if name not in pair.always_given
    }
    if not chosen:
        raise ValueError(
            f"coherence classifiers: expected one of a modality that {pair.title} generates, found "
            f"{', '.join(classifiers) or 'none'}"
        )
    subsets = subsets_of(pair, given, "coherence")
    note = [unanswered(pair, subset) or "" for subset in subsets]
    index = [
        (rows.having(subset) & labelled).nonzero().squeeze(-1) if not reason else torch.empty(0)
        for subset, reason in zip(subsets, note, strict=True)
    ]
    total = sum(-(-len(part) // batch_size) for part in index)
    hits = np.full((len(subsets), len(chosen), rows.num_rows), np.nan)
    done = 0
    with resting(chosen):
        for s, subset in enumerate(subsets):
            if not len(index[s]):
                continue
            with quiet(pair, seed):
                for part in index[s].split(batch_size):
                    x = rows.take(subset, part, device_of(pair))
                    fns = decode_rows(pair, x, num_draws)
                    for t, name in enumerate(chosen):
                        args = (pair, chosen[name], name, fns[name], truth[part.numpy()])
                        hits[s, t, part.numpy()] = _hits(*args, pool=pool, mean=mean)
                    done += 1
                    if on_progress:
                        on_progress(done, total)
        real = [
            _real_hits(pair, rows, truth, labelled, n, c, batch_size) for n, c in chosen.items()
        ]
    return _table(subsets, list(chosen), hits, real, note).assign_attrs(
        {
            "num_draws": num_draws,
            "pool": int(pool),
            "generated": "mean of p(x | z)" if mean else "draw from p(x | z)",
            "units": "share of rows",
            "pair": pair.title,
            "seed": seed,
        }
    )


def joint_coherence(
    pair: Pair,
    classifiers: Mapping[str, ClassifierLike],
    *,
    num_samples: int = 1000,
    mean: bool = True,
    batch_size: int = 256,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> xr.Dataset:
    """Share of samples from the prior all of whose modalities are classified alike.

    Args:
        pair: The pair.
        classifiers: As for :func:`coherence`; at least two modalities must have one.
        num_samples: Draws of z from the prior.
        mean: Whether to judge the mean of ``p(x_m | z)`` or a draw from it.
        batch_size: Samples at a time.
        seed: Of the draws.
        on_progress: Called with the samples done and in all.

    Returns:
        ``joint_coherence`` and ``standard_error``, and over ``modality`` and ``other`` the
        ``agreement`` of two of them.

    Raises:
        ValueError: For fewer than two classifiers, or a pair that is conditional.
    """
    check_sizes("joint_coherence", num_samples=num_samples, batch_size=batch_size)
    chosen = judges(pair, classifiers, "joint_coherence")
    if len(chosen) < 2:
        raise ValueError(
            f"joint_coherence classifiers: expected at least two, found {', '.join(chosen)}; give "
            "one for each modality that is to agree"
        )
    found: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
    done = 0
    with quiet(pair, seed), resting(chosen):
        for fns in prior_distributions(pair, num_samples, batch_size, "joint_coherence"):
            for name, judge in chosen.items():
                found[name].append(_classes(pair, judge, name, fns[name], mean=mean)[0])
            done += len(found[name][-1])
            if on_progress:
                on_progress(done, num_samples)
    classes = {name: np.concatenate(parts) for name, parts in found.items()}
    same = np.array([[a == b for b in classes.values()] for a in classes.values()])
    share, error, _ = mean_and_error(same[0].all(0).astype(float))
    names = list(chosen)
    return xr.Dataset(
        {
            "joint_coherence": share,
            "standard_error": error,
            "agreement": (("modality", "other"), same.mean(-1)),
        },
        coords={"modality": names, "other": names},
        attrs={
            "num_samples": num_samples,
            "generated": "mean of p(x | z)" if mean else "draw from p(x | z)",
            "units": "share of samples",
            "pair": pair.title,
            "seed": seed,
        },
    )


def _judged(
    pair: Pair, judge: ClassifierLike, name: str, fn: TorchDistribution, *, mean: bool
) -> Tensor:
    """Class probabilities of what is generated, ``(K, N, C)``."""
    value = decoded_value(fn, mean=mean)
    modality = pair.modalities[name]
    own = not isinstance(judge, Classifier)
    if own and is_label(modality) and value.is_floating_point() and not modality.event_shape:
        value = value.argmax(-1)  # a classifier of classes, not of their probabilities
    shape = value.shape[:2]
    probs = class_probabilities(judge, value.flatten(0, 1), f"classifiers[{name!r}]")
    return probs.reshape(*shape, -1)


def _classes(
    pair: Pair, judge: ClassifierLike, name: str, fn: TorchDistribution, *, mean: bool
) -> np.ndarray:
    """Classes of what is generated, ``(K, N)``."""
    probs = _judged(pair, judge, name, fn, mean=mean)
    return class_names(judge, probs.argmax(-1).cpu().numpy())


def _hits(
    pair: Pair,
    judge: ClassifierLike,
    name: str,
    fn: TorchDistribution,
    truth: np.ndarray,
    *,
    pool: bool,
    mean: bool,
) -> np.ndarray:
    """Share of a row's draws that are classified rightly, ``(N,)``."""
    probs = _judged(pair, judge, name, fn, mean=mean)
    index = probs.mean(0, keepdim=True).argmax(-1) if pool else probs.argmax(-1)  # (K, N)
    return _equal(class_names(judge, index.cpu().numpy()), truth, name).mean(0)


def _equal(found: np.ndarray, truth: np.ndarray, name: str) -> np.ndarray:
    if (found.dtype.kind in "US") != (truth.dtype.kind in "US"):
        raise ValueError(
            f"classifiers[{name!r}]: expected classes such as the label {truth.flat[0]!r}, found "
            f"{found.flat[0]!r}; give a classifier with these classes, or labels that count from 0"
        )
    return np.asarray(found == truth, dtype=float)


@torch.no_grad()
def _real_hits(
    pair: Pair,
    rows: TaskRows,
    truth: np.ndarray,
    labelled: Tensor,
    name: str,
    judge: ClassifierLike,
    batch_size: int,
) -> np.ndarray:
    """Whether the rows themselves are classified rightly; empty if no row has the modality."""
    found = []
    index = (rows.having([name]) & labelled).nonzero().squeeze(-1)
    for part in index.split(batch_size) if len(index) else ():
        value = rows.take([name], part, device_of(pair))[name]
        probs = class_probabilities(judge, value, f"classifiers[{name!r}]")
        classes = class_names(judge, probs.argmax(-1).cpu().numpy())
        found.append(_equal(classes, truth[part.numpy()], name))
    return np.concatenate(found) if found else np.empty(0)


def _table(
    subsets: list[Subset],
    targets: list[str],
    hits: np.ndarray,
    real: list[np.ndarray],
    note: list[str],
) -> xr.Dataset:
    cells = np.array([[mean_and_error(each) for each in row] for row in hits])
    cross = np.array([[name not in subset for name in targets] for subset in subsets])
    sizes = sorted({len(subset) for subset, row in zip(subsets, cross, strict=True) if row.any()})
    by_size = [np.array([len(subset) == size for subset in subsets]) for size in sizes]
    averages = np.array([_average(hits[cross & same[:, None]]) for same in by_size]).reshape(-1, 2)
    judged = np.array([mean_and_error(each)[:2] for each in real])
    cell = ("subset", "target")
    variables: dict[str, Any] = {
        "coherence": (cell, cells[..., 0]),
        "standard_error": (cell, cells[..., 1]),
        "num_rows": (cell, cells[..., 2].astype(int)),
        "cross": (cell, cross),
        "note": ("subset", np.array(note, dtype=str)),
        "average": ("size", averages[:, 0]),
        "average_standard_error": ("size", averages[:, 1]),
        "classifier_accuracy": ("target", judged[:, 0]),
        "classifier_standard_error": ("target", judged[:, 1]),
    }
    names = [subset_name(subset) for subset in subsets]
    return xr.Dataset(variables, coords={"subset": names, "target": targets, "size": sizes})


def _average(hits: np.ndarray) -> tuple[float, float]:
    """Mean of the means of several cells ``(cells, N)`` and its standard error over rows.

    The cells share their rows, so their errors add up row by row, not in squares.
    """
    counts = (~np.isnan(hits)).sum(-1)
    hits, counts = hits[counts > 0], counts[counts > 0]
    if len(hits) == 0:
        return np.nan, np.nan
    means = np.nanmean(hits, -1)
    parts = np.nan_to_num((hits - means[:, None]) / counts[:, None], nan=0.0)
    rows = int((~np.isnan(hits)).any(0).sum())
    if rows < 2:
        return float(means.mean()), np.nan
    squares = np.square(parts.mean(0)).sum() * rows / (rows - 1)
    return float(means.mean()), float(np.sqrt(squares))
