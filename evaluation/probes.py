"""What the latents know: linear probes and clustering, given each subset of the modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from torch import Tensor

from mmzoo.data import MultimodalDataset
from mmzoo.evaluation.pair import Pair, quiet, subset_name
from mmzoo.evaluation.rowwise import (
    Progress,
    Subset,
    TaskRows,
    as_rows,
    check_sizes,
    labels_of,
    latents_given,
    mean_and_error,
    shared_sites,
    subsets_of,
    unanswered,
)

__all__ = ["clustering", "linear_probe"]

Latent = Literal["mean", "draw"]
_MIN_ROWS = 2


def linear_probe(
    pair: Pair,
    train: MultimodalDataset | Mapping[str, Tensor],
    test: MultimodalDataset | Mapping[str, Tensor],
    labels: str | tuple[np.ndarray | Tensor, np.ndarray | Tensor] | None = None,
    *,
    given: Sequence[str | Sequence[str]] | str | None = None,
    kind: Literal["classes", "numbers"] | None = None,
    latent: Latent = "mean",
    sites: Sequence[str] | str | None = None,
    penalty: float = 1.0,
    num_draws: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> xr.Dataset:
    """How well a linear model reads a label off the latents, given each subset.

    Logistic regression for classes, ridge regression for numbers, both on latents standardised by
    the training rows. Rows count where they have all of the subset and a label.

    Args:
        pair: The pair.
        train: Rows that the linear model is fitted to; a data set, or name to values.
        test: Rows that it is judged on.
        labels: Name of a label in both, or arrays for both in which NaN stands for no label;
            default: the only one that there is.
        given: Subsets, each a name or several names; default: all.
        kind: Of the label; default: numbers if it has a floating type.
        latent: ``"mean"`` of ``q(z | x_S)``, in closed form or of `num_draws` draws, or a
            ``"draw"``.
        sites: Latent sites; default: all but private codes.
        penalty: Of the squared weights: the inverse of C, or ridge's alpha.
        num_draws: Draws for a mean without closed form.
        batch_size: Rows at a time.
        seed: Of the draws.
        on_progress: Called with the subsets done and in all.

    Returns:
        Over ``subset``: ``accuracy`` (of classes) or ``r2`` (of numbers, with respect to the mean
        of the test rows), ``standard_error`` over test rows, ``chance`` (of always naming the
        commonest class of the training rows; zero for numbers), ``num_train``, ``num_test`` and
        ``note``, why one is empty.

    Raises:
        ValueError: For unknown names, or labels of a single class.
    """
    where = "linear_probe"
    check_sizes(where, num_draws=num_draws, batch_size=batch_size)
    _check_latent(latent, where)
    if kind not in (None, "classes", "numbers"):
        raise ValueError(f"{where} kind: expected 'classes' or 'numbers', found {kind!r}")
    if not penalty > 0:
        raise ValueError(f"{where} penalty: expected a positive number, found {penalty}")
    own = labels if isinstance(labels, tuple) else (labels, labels)
    parts = [_Labelled(pair, *each, where) for each in zip((train, test), own, strict=True)]
    numbers = parts[0].truth.dtype.kind == "f" if kind is None else kind == "numbers"
    score = _regressed if numbers else _classified
    subsets = subsets_of(pair, given, where)
    chosen = shared_sites(pair, sites, where)
    options = {"latent": latent, "num_draws": num_draws, "batch_size": batch_size}
    found = []
    for done, subset in enumerate(subsets):
        reason = unanswered(pair, subset) or ""
        sizes = [0, 0] if reason else [len(part.index(subset)) for part in parts]
        if not reason and min(sizes) < _MIN_ROWS:
            reason = f"{sizes[0]} rows to train on and {sizes[1]} to test on have it and a label"
        scores = (np.nan, np.nan, np.nan)
        if not reason:
            (z, y), (z_new, y_new) = (p.latents(subset, chosen, seed, options) for p in parts)
            scores = score(*_standardised(z, z_new), y, y_new, penalty)
        found.append((*scores, *sizes, reason))
        if on_progress:
            on_progress(done + 1, len(subsets))
    kinds = ("r2" if numbers else "accuracy", "standard_error", "chance", "num_train", "num_test")
    return _over_subsets(subsets, found, (*kinds, "note")).assign_attrs(
        {
            "latent": latent,
            "sites": ", ".join(chosen),
            "penalty": penalty,
            "units": "share of variance" if numbers else "share of rows",
            "pair": pair.title,
            "seed": seed,
        }
    )


def clustering(
    pair: Pair,
    data: MultimodalDataset | Mapping[str, Tensor],
    labels: str | np.ndarray | Tensor | None = None,
    *,
    observed: Mapping[str, Tensor] | None = None,
    given: Sequence[str | Sequence[str]] | str | None = None,
    num_clusters: int | None = None,
    method: Literal["kmeans", "gmm"] = "kmeans",
    latent: Latent = "mean",
    sites: Sequence[str] | str | None = None,
    num_draws: int = 100,
    num_starts: int = 10,
    num_bootstrap: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> xr.Dataset:
    """How well clusters of latents agree with classes that no model saw, given each subset.

    Normalised mutual information (arithmetic mean), the adjusted Rand index, and the accuracy of
    the best one-to-one assignment of clusters to classes. Rows count where they have all of the
    subset and a label.

    Args:
        pair: The pair.
        data: The rows: a data set, or name to values ``(N, *event_shape)``.
        labels: As for :func:`mmzoo.evaluation.coherence.coherence`.
        observed: Name to bool mask ``(N,)``; of a data set its own.
        given: Subsets, each a name or several names; default: all.
        num_clusters: Default: the number of classes.
        method: ``"kmeans"``, or ``"gmm"``: a mixture of Gaussians with full covariances.
        latent: As for :func:`linear_probe`.
        sites: Latent sites; default: all but private codes.
        num_draws: Draws for a mean without closed form.
        num_starts: Starts of the clustering, of which the best is kept.
        num_bootstrap: Resamplings of the rows, with their clusters fixed, for standard errors.
        batch_size: Rows at a time.
        seed: Of the draws, the starts and the resampling.
        on_progress: Called with the subsets done and in all.

    Returns:
        Over ``subset``: ``nmi``, ``ari`` and ``accuracy``, each with its ``…_standard_error`` over
        rows (clusters fixed), ``num_rows`` and ``note``, why one is empty.

    Raises:
        ValueError: For unknown names, or labels of a single class.
    """
    where = "clustering"
    sizes = {"num_draws": num_draws, "num_starts": num_starts, "batch_size": batch_size}
    check_sizes(where, num_bootstrap=num_bootstrap, **sizes)
    _check_latent(latent, where)
    if method not in ("kmeans", "gmm"):
        raise ValueError(f"{where} method: expected 'kmeans' or 'gmm', found {method!r}")
    rows = _Labelled(pair, data, labels, where, observed)
    classes = np.unique(rows.truth[rows.labelled.numpy()])
    if len(classes) < 2:
        raise ValueError(f"{where} labels: expected at least two classes, found {classes.tolist()}")
    count = len(classes) if num_clusters is None else num_clusters
    check_sizes(where, num_clusters=count)
    subsets = subsets_of(pair, given, where)
    chosen = shared_sites(pair, sites, where)
    options = {"latent": latent, "num_draws": num_draws, "batch_size": batch_size}
    found = []
    for done, subset in enumerate(subsets):
        reason = unanswered(pair, subset) or ""
        num_rows = 0 if reason else len(rows.index(subset))
        if not reason and num_rows < max(count, _MIN_ROWS):
            reason = f"{num_rows} rows have it and a label, fewer than {count} clusters"
        scores: tuple[float, ...] = (np.nan,) * 6
        if not reason:
            z, y = rows.latents(subset, chosen, seed, options)
            clusters = _clusters(z, count, method, num_starts, seed)
            scores = _agreement(clusters, np.unique(y, return_inverse=True)[1], num_bootstrap, seed)
        found.append((*scores, num_rows, reason))
        if on_progress:
            on_progress(done + 1, len(subsets))
    measures = ("nmi", "ari", "accuracy")
    kinds = (*measures, *(f"{name}_standard_error" for name in measures), "num_rows", "note")
    return _over_subsets(subsets, found, kinds).assign_attrs(
        {
            "method": method,
            "num_clusters": count,
            "latent": latent,
            "sites": ", ".join(chosen),
            "units": "1 is perfect agreement; nmi and ari are 0 by chance",
            "pair": pair.title,
            "seed": seed,
        }
    )


class _Labelled:
    """Rows with their labels, and the latents of those that have a subset."""

    def __init__(
        self,
        pair: Pair,
        data: MultimodalDataset | Mapping[str, Tensor],
        labels: str | np.ndarray | Tensor | None,
        where: str,
        observed: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.pair = pair
        self.rows: TaskRows = as_rows(pair, data, observed, where)
        self.truth, self.labelled = labels_of(pair, data, labels, self.rows, where)

    def index(self, subset: Subset) -> Tensor:
        """Numbers of the rows that have all of the subset and a label."""
        return (self.rows.having(subset) & self.labelled).nonzero().squeeze(-1)

    def latents(
        self, subset: Subset, sites: Sequence[str], seed: int, options: Mapping[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Latents ``(n, D)`` and labels ``(n,)``."""
        index = self.index(subset)
        with quiet(self.pair, seed):
            parts = list(latents_given(self.pair, self.rows, subset, index, sites, **options))
        return np.concatenate(parts), self.truth[index.numpy()]


def _check_latent(latent: str, where: str) -> None:
    if latent not in ("mean", "draw"):
        raise ValueError(f"{where} latent: expected 'mean' or 'draw', found {latent!r}")


def _standardised(z: np.ndarray, z_new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both by mean and spread of the first; a constant dimension stays as it is."""
    loc, scale = z.mean(0), z.std(0)
    # Round-off of a constant must not be blown up into a feature.
    scale = np.where(scale > 1e-12 * (1.0 + np.abs(loc)), scale, 1.0)
    return (z - loc) / scale, (z_new - loc) / scale


def _classified(
    z: np.ndarray, z_new: np.ndarray, y: np.ndarray, y_new: np.ndarray, penalty: float
) -> tuple[float, float, float]:
    """Accuracy, standard error, and accuracy of the commonest class."""
    from sklearn.linear_model import LogisticRegression

    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise ValueError(
            f"linear_probe labels: expected at least two classes to train on, found "
            f"{classes.tolist()}; use kind='numbers' or other rows"
        )
    model = LogisticRegression(C=1.0 / penalty, max_iter=5000).fit(z, y)
    share, error, _ = mean_and_error((model.predict(z_new) == y_new).astype(float))
    return share, error, float((y_new == classes[counts.argmax()]).mean())


def _regressed(
    z: np.ndarray, z_new: np.ndarray, y: np.ndarray, y_new: np.ndarray, penalty: float
) -> tuple[float, float, float]:
    """R squared, its standard error by the delta method, and chance."""
    from sklearn.linear_model import Ridge

    y, y_new = y.astype(float), y_new.astype(float)
    variance = y_new.var()
    if not variance > 0:
        raise ValueError("linear_probe labels: expected numbers that differ, found a constant")
    residual = np.square(y_new - Ridge(alpha=penalty).fit(z, y).predict(z_new))
    ratio = residual.mean() / variance
    influence = (residual - ratio * np.square(y_new - y_new.mean())) / variance
    return float(1 - ratio), float(influence.std(ddof=1) / np.sqrt(len(y_new))), 0.0


def _clusters(z: np.ndarray, count: int, method: str, num_starts: int, seed: int) -> np.ndarray:
    """Number of the cluster of each row."""
    if method == "gmm":
        from sklearn.mixture import GaussianMixture

        mixture = GaussianMixture(count, n_init=num_starts, random_state=seed, max_iter=500)
        return mixture.fit_predict(z)
    from sklearn.cluster import KMeans

    count = min(count, len(np.unique(z, axis=0)))  # identical latents cannot be told apart
    return KMeans(count, n_init=num_starts, random_state=seed).fit_predict(z)


def _agreement(
    clusters: np.ndarray, classes: np.ndarray, num_bootstrap: int, seed: int
) -> tuple[float, ...]:
    """NMI, ARI, accuracy, and their standard errors by resampling rows."""
    table = np.zeros((clusters.max() + 1, classes.max() + 1))
    np.add.at(table, (clusters, classes), 1)
    # Resampled rows with fixed clusters are a multinomial draw of the contingency table.
    random = np.random.default_rng(seed)
    share = (table / table.sum()).ravel()
    tables = random.multinomial(len(classes), share, num_bootstrap).reshape(-1, *table.shape)
    again = np.array([_scores(each) for each in tables])
    spread = again.std(0, ddof=1) if num_bootstrap > 1 else np.full(3, np.nan)
    return (*_scores(table), *spread.tolist())


def _scores(table: np.ndarray) -> tuple[float, float, float]:
    """NMI, ARI and assignment accuracy from a contingency table ``(clusters, classes)``."""
    from scipy.optimize import linear_sum_assignment

    best = table[linear_sum_assignment(table, maximize=True)].sum()
    return _nmi(table), _ari(table), float(best / table.sum())


def _nmi(table: np.ndarray) -> float:
    """Mutual information over the arithmetic mean of the entropies.

    Cluster Ensembles (Strehl & Ghosh, 2002), https://www.jmlr.org/papers/v3/strehl02a.html
    """
    joint = table / table.sum()
    parts = [joint.ravel(), joint.sum(0), joint.sum(1)]
    entropy = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in parts]
    mean = (entropy[1] + entropy[2]) / 2
    # Without any entropy, clusters and classes are one, and agree.
    return float(max(entropy[1] + entropy[2] - entropy[0], 0.0) / mean) if mean > 0 else 1.0


def _ari(table: np.ndarray) -> float:
    """Comparing partitions (Hubert & Arabie, 1985), https://doi.org/10.1007/BF01908075 ."""

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, one, other = pairs(table), pairs(table.sum(0)), pairs(table.sum(1))
    expected = one * other / pairs(table.sum(keepdims=True))
    most = (one + other) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def _over_subsets(
    subsets: list[Subset], found: list[tuple[Any, ...]], kinds: Sequence[str]
) -> xr.Dataset:
    columns = [np.array(column) for column in zip(*found, strict=True)]
    variables = {kind: ("subset", column) for kind, column in zip(kinds, columns, strict=True)}
    return xr.Dataset(variables, coords={"subset": [subset_name(each) for each in subsets]})
