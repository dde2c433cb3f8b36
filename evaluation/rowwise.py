"""What the task measures share: who has what, what is decoded, means with standard errors.

A measure given a subset counts the rows that have *all* of the subset; what stands under a False
mask is never looked at. Draws of a subset do not depend on which other subsets are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor

from mmzoo.data import MultimodalDataset
from mmzoo.distributions import Mixture
from mmzoo.evaluation.pair import Pair, PyroPair, device_of, named_subsets, row_masks, subset_name
from mmzoo.inference.draws import draw, latent_values
from mmzoo.modality import Modality

__all__ = [
    "Progress",
    "Subset",
    "TaskRows",
    "as_rows",
    "decode_rows",
    "decoded_value",
    "is_label",
    "labels_of",
    "latent_moments",
    "latents_given",
    "mean_and_error",
    "prior_distributions",
    "shared_sites",
    "subsets_of",
    "unanswered",
]

Subset = tuple[str, ...]
Progress = Callable[[int, int], None]
_CLOSED = (torch.distributions.Normal, torch.distributions.Laplace)


@dataclass(frozen=True)
class TaskRows:
    """Checked rows.

    Attributes:
        x: Name to values ``(N, *event_shape)``.
        masks: Name to bool ``(N,)``, of every modality of the pair.
        num_rows: N.
    """

    x: dict[str, Tensor]
    masks: dict[str, Tensor]
    num_rows: int

    def having(self, names: Sequence[str]) -> Tensor:
        """Which rows have all of the named modalities, bool ``(N,)``."""
        everyone = torch.ones(self.num_rows, dtype=torch.bool)
        return torch.stack([everyone, *(self.masks[name].cpu() for name in names)]).all(0)

    def take(self, names: Sequence[str], index: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Values of the named modalities in some rows."""
        return {name: self.x[name][index.to(self.x[name].device)].to(device) for name in names}


def as_rows(
    pair: Pair,
    data: MultimodalDataset | Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None,
    where: str,
) -> TaskRows:
    """The rows of a data set, or of a dict with masks beside it, checked once."""
    if isinstance(data, MultimodalDataset):
        if observed is not None:
            raise ValueError(
                f"{where}: expected the masks of the data set, found observed=… as well; use "
                "dataset.with_observed(masks)"
            )
        x, observed = data.tensors()
        x = {name: value for name, value in x.items() if name in pair.modalities}
        observed = {name: mask for name, mask in observed.items() if name in x}
        return TaskRows(*row_masks(pair, x, observed))
    return TaskRows(*row_masks(pair, data, observed))


def subsets_of(
    pair: Pair, given: Sequence[str | Sequence[str]] | str | None, where: str
) -> list[Subset]:
    """The subsets that are observed, names in the order of the modalities.

    Args:
        pair: The pair.
        given: Subsets, each a name or several names; default: every one, the small ones first.
        where: Beginning of error messages.
    """
    names = list(pair.modalities)
    if given is None:
        every = chain.from_iterable(combinations(names, size + 1) for size in range(len(names)))
        return [subset for subset in every if set(pair.always_given) <= set(subset)]
    found = named_subsets(pair, given, f"{where} given")
    for subset in found:
        if lacking := [name for name in pair.always_given if name not in subset]:
            raise ValueError(
                f"{where} given: expected {', '.join(lacking)} in every subset, on which "
                f"{pair.title} is conditional, found {subset_name(subset)}; add it"
            )
    if not found:
        raise ValueError(f"{where} given: expected at least one subset, found none")
    return found


def unanswered(pair: Pair, subset: Subset) -> str | None:
    """Why the pair has no posterior given exactly this subset; None if it has one."""
    if isinstance(pair, PyroPair):
        return pair.unsupported(subset)
    known = pair.always_given
    everything = [name for name in pair.modalities if name not in known]
    of = [name for name in subset if name not in known]
    if not of or pair.unsupported(everything, known):  # it has no likelihoods, but draws
        return None
    return pair.unsupported(of, known)


def is_label(modality: Modality) -> bool:
    """Whether a value of this modality is one class."""
    name = modality.likelihood.name
    return name == "one_hot_categorical" or (name == "categorical" and not modality.event_shape)


def labels_of(
    pair: Pair,
    data: MultimodalDataset | Mapping[str, Tensor],
    labels: str | np.ndarray | Tensor | None,
    rows: TaskRows,
    where: str,
) -> tuple[np.ndarray, Tensor]:
    """The true label of each row, and which rows have one, bool ``(N,)``.

    Args:
        pair: The pair.
        data: The rows.
        labels: Name of a label of the data set or of a label modality, or an array ``(N,)`` in
            which NaN stands for no label; default: the only one that there is.
        rows: The checked rows.
        where: Beginning of error messages.
    """
    stored = data.labels if isinstance(data, MultimodalDataset) else {}
    known = {
        name: modality
        for name, modality in pair.modalities.items()
        if is_label(modality) and name in rows.x
    }
    if labels is None:
        candidates = list(stored) or list(known)
        if len(candidates) != 1:
            raise ValueError(
                f"{where} labels: expected one kind of label, found "
                f"{candidates or 'none'}; name one, or give an array with one entry per row"
            )
        labels = candidates[0]
    if isinstance(labels, str):
        if labels in stored:
            return check_labels(stored[labels], rows.num_rows, where)
        if labels in known:
            return _read_labels(known[labels], rows.x[labels]), rows.masks[labels].cpu()
        raise ValueError(
            f"{where} labels: unknown label {labels!r}; there are {', '.join((*stored, *known))}"
        )
    return check_labels(labels, rows.num_rows, where)


def check_labels(
    labels: np.ndarray | Tensor | Sequence[Any], num_rows: int, where: str
) -> tuple[np.ndarray, Tensor]:
    """Labels as an array ``(N,)``, and which of them are there (not NaN)."""
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.shape != (num_rows,):
        raise ValueError(
            f"{where} labels: expected one for each row, shape ({num_rows},), found "
            f"{values.shape}; give an array of classes"
        )
    there = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(num_rows, dtype=bool)
    if not there.any():
        raise ValueError(f"{where} labels: expected a label in some row, found NaN in all")
    return values, torch.from_numpy(there)


def _read_labels(modality: Modality, value: Tensor) -> np.ndarray:
    one_hot = modality.likelihood.name == "one_hot_categorical"
    return (value.argmax(-1) if one_hot else value).cpu().numpy()


def decode_rows(
    pair: Pair, x: Mapping[str, Tensor], num_draws: int, *, num_rows: int | None = None
) -> dict[str, TorchDistribution]:
    """``p(x_m | z_k)`` with ``z_k ~ q(z | x)``, batch ``(K, N)``, of every modality scored.

    Args:
        pair: The pair, inside :func:`mmzoo.evaluation.pair.quiet`.
        x: What is observed, in every row; nothing: the prior.
        num_draws: K.
        num_rows: N, where nothing is observed.
    """
    extra: dict[str, Any] = {} if x else {"num_rows": num_rows}
    latents = latent_values(draw(pair.guide, x, None, num_draws, stratified=False, **extra))
    free = {name: x[name] if name in pair.always_given else None for name in pair.modalities}
    rows = num_rows if num_rows is not None else len(next(iter(x.values())))
    model = poutine.trace(poutine.condition(pair.model, data=latents))
    with pyro.plate("particles", num_draws, dim=-2):
        trace = model.get_trace(free, num_rows=rows)
    return {
        name: trace.nodes[name]["fn"]
        for name, value in free.items()
        if value is None and name in trace.nodes
    }


def decoded_value(fn: TorchDistribution, *, mean: bool) -> Tensor:
    """The mean of ``p(x | z)`` (for a class the probabilities of all classes), or a draw."""
    if not mean:
        return fn.sample()
    base = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
    return base.probs if isinstance(base, torch.distributions.Categorical) else fn.mean


def shared_sites(pair: Pair, sites: Sequence[str] | None, where: str) -> list[str]:
    """Latent sites by name; default: all but the private codes ``w_<name>``."""
    if sites is None:
        return [name for name in pair.latent_sites if not name.startswith("w_")]
    sites = [sites] if isinstance(sites, str) else list(sites)
    if not sites or (unknown := [name for name in sites if name not in pair.latent_sites]):
        raise ValueError(
            f"{where} sites: expected some of {', '.join(pair.latent_sites)}, found "
            f"{unknown if sites else 'none'}"
        )
    return sites


def latent_moments(
    pair: Pair, x: Mapping[str, Tensor], sites: Sequence[str], num_draws: int
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ``q(z | x)``, each ``(N, D)``, sites side by side.

    In closed form where the posterior of a model of the zoo has one, from draws elsewhere.
    """
    if not isinstance(pair, PyroPair) and tuple(sites) == ("z",):
        q = pair.posterior(x)
        base = q.base_dist if isinstance(q, torch.distributions.Independent) else q
        # Not a subclass: a mixture of flows has no moments in closed form.
        if type(base) is Mixture or isinstance(base, _CLOSED):
            return q.mean, q.variance.sqrt()
    drawn = _side_by_side(pair, x, sites, num_draws)
    spread = drawn.std(0) if num_draws > 1 else torch.zeros_like(drawn[0])
    return drawn.mean(0), spread


def _side_by_side(
    pair: Pair, x: Mapping[str, Tensor], sites: Sequence[str], num_draws: int
) -> Tensor:
    """Draws ``(K, N, D)`` of ``q(z | x)``."""
    latents = latent_values(draw(pair.guide, x, None, num_draws, stratified=False))
    # A site may hold one number for each row, without a dimension of its own.
    return torch.cat([latents[name].reshape(*latents[name].shape[:2], -1) for name in sites], -1)


def latents_given(
    pair: Pair,
    rows: TaskRows,
    subset: Subset,
    index: Tensor,
    sites: Sequence[str],
    *,
    latent: str,
    num_draws: int,
    batch_size: int,
) -> Iterator[np.ndarray]:
    """Posterior means, or one draw each, of some rows given a subset, a batch at a time."""
    device = device_of(pair)
    for part in index.split(batch_size):
        x = rows.take(subset, part, device)
        if latent == "draw":
            found = _side_by_side(pair, x, sites, 1)[0]
        else:
            found = latent_moments(pair, x, sites, num_draws)[0]
        yield found.double().cpu().numpy()


def prior_distributions(
    pair: Pair, num_samples: int, batch_size: int, where: str
) -> Iterator[dict[str, TorchDistribution]]:
    """``p(x_m | z)`` with ``z ~ p(z)``, batch ``(1, n)``, until there are `num_samples`."""
    if pair.always_given:
        raise ValueError(
            f"{where}: expected a pair that generates from its prior, found {pair.title}, which is "
            f"conditional on {', '.join(pair.always_given)}; measure what it generates given that"
        )
    for start in range(0, num_samples, batch_size):
        yield decode_rows(pair, {}, 1, num_rows=min(batch_size, num_samples - start))


def check_sizes(where: str, **sizes: int) -> None:
    """Raises for numbers of draws, rows or samples below one."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{where}: expected {name} of at least 1, found {size!r}")


def mean_and_error(values: np.ndarray) -> tuple[float, float, int]:
    """Mean of what is not NaN, its standard error over rows, and the number of rows."""
    kept = values[~np.isnan(values)]
    if len(kept) == 0:
        return np.nan, np.nan, 0
    error = float(kept.std(ddof=1) / np.sqrt(len(kept))) if len(kept) > 1 else np.nan
    return float(kept.mean()), error, len(kept)
