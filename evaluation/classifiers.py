"""Classifiers that judge what a model generates, by one call; or any callable of your own.

A coherence is only as good as its classifier, so that each knows its own held-out accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmzoo.batch import modality_names
from mmzoo.data import MultimodalDataset
from mmzoo.evaluation.pair import Pair
from mmzoo.evaluation.rowwise import (
    Progress,
    check_labels,
    check_sizes,
    is_label,
    mean_and_error,
)
from mmzoo.likelihoods import Likelihood, as_likelihood
from mmzoo.modality import Modality
from mmzoo.networks import default_encoder, feature_size
from mmzoo.seeding import seeded

__all__ = ["Classifier", "ClassifierLike", "class_probabilities", "train_classifier"]

ClassifierLike = Callable[[Tensor], Tensor]
"""From values ``(N, *event_shape)`` to classes, integers ``(N,)``, or to logits ``(N, C)``."""

_JUDGED_ROWS = 512


class Classifier(nn.Module):
    """A network from one modality to classes.

    Args:
        modality: Name of the modality.
        network: From values ``(N, *event_shape)`` to logits ``(N, C)``.
        classes: What the C classes stand for in the labels, ``(C,)``.

    Attributes:
        accuracy: Share of held-out rows that it classifies rightly.
        standard_error: Of this share, over rows.
        num_rows: Held-out rows.
    """

    def __init__(self, modality: str, network: nn.Module, classes: np.ndarray) -> None:
        super().__init__()
        self.modality, self.network, self.classes = modality, network, classes
        self.accuracy, self.standard_error, self.num_rows = float("nan"), float("nan"), 0

    def forward(self, value: Tensor) -> Tensor:
        """Logits, ``(N, C)``."""
        return self.network(value)

    def extra_repr(self) -> str:
        """What it reads, and how well."""
        return f"{self.modality!r}, accuracy={self.accuracy:.3f} ± {self.standard_error:.3f}"


class _Reader(nn.Module):
    """Reads a label, a one-hot vector or the probabilities of the classes, as logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, value: Tensor) -> Tensor:
        if value.dim() == 1:
            value = F.one_hot(value.long(), self.num_classes).to(torch.get_default_dtype())
        return value.log()


def train_classifier(
    dataset: MultimodalDataset,
    modality: str,
    labels: str | np.ndarray | Tensor | None = None,
    *,
    test: MultimodalDataset | None = None,
    held_out: float = 0.2,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Classifier:
    """A classifier of one modality: convolutions for images, a perceptron for everything else.

    Trained with Adam on the rows that have the modality and a label. Part of them is held out, on
    which it reports its accuracy. A label modality is read directly, nothing is trained for it.

    Args:
        dataset: The rows; train it on other rows than those that are to be judged.
        modality: Which modality it reads.
        labels: A label of the data set or a label modality by name, or an array ``(N,)`` in which
            NaN stands for no label; default: the data set's only one.
        test: Rows for the accuracy, where labels are a name; default: a random part of `dataset`.
        held_out: This part.
        epochs: Passes over the rows.
        batch_size: Rows for each step.
        learning_rate: Of Adam.
        seed: Of the held-out part, the weights and the order of the rows.
        on_progress: Called with the epochs done and in all.

    Returns:
        The classifier in evaluation mode, with ``accuracy`` and ``standard_error``.

    Raises:
        ValueError: For an unknown modality or label, or fewer than two classes.

    Example:
        >>> from mmzoo.data import load
        >>> train, test = load("digits")
        >>> train_classifier(train, "label").accuracy
        1.0
    """
    check_sizes("train_classifier", epochs=epochs, batch_size=batch_size)
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"train_classifier: expected 0 < held_out < 1, found {held_out}")
    index, classes = _labelled(dataset, modality, labels)
    described = {each.name: each for each in dataset.modalities or ()}.get(modality)
    if described is not None and is_label(described):
        return _reader(dataset, described, index, classes)
    names, target = np.unique(classes, return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"train_classifier {modality!r}: expected at least two classes, found {names.tolist()}"
        )
    with seeded(seed), torch.enable_grad():
        order = torch.randperm(len(index))
        if test is not None:
            held_rows = 0
        else:
            held_rows = min(max(1, round(held_out * len(index))), len(index) - 1)
        held, kept = order[:held_rows], order[held_rows:]
        shape = tuple(dataset.batch(index[:1])[0][modality].shape[1:])
        likelihood = None if described is None else described.likelihood
        network = _network(shape, likelihood, len(names)).to(dataset.device)
        classifier = Classifier(modality, network, names)
        targets = torch.from_numpy(target)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=learning_rate)
        for epoch in range(epochs):
            for part in kept[torch.randperm(len(kept))].split(batch_size):
                value = dataset.batch(index[part])[0][modality]
                loss = F.cross_entropy(classifier(value), targets[part].to(value.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if on_progress:
                on_progress(epoch + 1, epochs)
    classifier.eval().requires_grad_(False)
    if test is not None:
        return _judged(classifier, test, *_labelled(test, modality, _name_only(labels)))
    return _judged(classifier, dataset, index[held], classes[held.numpy()])


def _network(shape: tuple[int, ...], likelihood: Likelihood | None, num_classes: int) -> nn.Module:
    likelihood = as_likelihood("normal", "train_classifier") if likelihood is None else likelihood
    encoder = default_encoder(shape, likelihood)
    features = feature_size(encoder, shape, likelihood, where="train_classifier")
    assert features is not None
    return nn.Sequential(encoder, nn.Linear(features, num_classes))


def _labelled(
    dataset: MultimodalDataset, modality: str, labels: str | np.ndarray | Tensor | None
) -> tuple[Tensor, np.ndarray]:
    """Numbers of the rows that have the modality and a label, and these labels."""
    where = f"train_classifier {modality!r}"
    modality_names(dataset.names, [modality], "train_classifier")
    kept = torch.ones(len(dataset), dtype=torch.bool)
    readable = [each.name for each in dataset.modalities or () if is_label(each)]
    if labels is None:
        candidates = list(dataset.labels) or [n for n in readable if n in dataset.names]
        if len(candidates) != 1:
            raise ValueError(
                f"{where} labels: expected one kind of label in the data set, found "
                f"{candidates or 'none'}; name one, or give an array with one entry per row"
            )
        labels = candidates[0]
    if isinstance(labels, str) and labels not in dataset.labels:
        if labels not in readable or labels not in dataset.names:
            known = ", ".join((*dataset.labels, *readable)) or "none"
            raise ValueError(f"{where} labels: unknown label {labels!r}; there are {known}")
        value = dataset.tensors()[0][labels]
        values = (value if value.dim() == 1 else value.argmax(-1)).cpu().numpy()
        kept &= dataset.observed.get(labels, kept).cpu()
    else:
        source = dataset.labels[labels] if isinstance(labels, str) else labels
        values, there = check_labels(source, len(dataset), where)
        kept &= there
    kept &= dataset.observed.get(modality, kept).cpu()
    if int(kept.sum()) < 2:
        raise ValueError(
            f"{where}: expected rows that have it and a label, found {int(kept.sum())}; "
            "use other rows"
        )
    index = kept.nonzero().squeeze(-1)
    return index, values[index.numpy()]


def _name_only(labels: str | np.ndarray | Tensor | None) -> str | None:
    if labels is None or isinstance(labels, str):
        return labels
    raise ValueError(
        "train_classifier labels: expected a name, which the test rows have as well, found an "
        "array; put it into the labels of both data sets, or leave test out"
    )


def _reader(
    dataset: MultimodalDataset, modality: Modality, index: Tensor, classes: np.ndarray
) -> Classifier:
    """The classifier that reads a label as it stands."""
    return _judged(label_reader(modality), dataset, index, classes)


def label_reader(modality: Modality) -> Classifier:
    """The classifier of a label modality, whose classes count from 0."""
    shape = modality.event_shape
    number = shape[-1] if shape else int(getattr(modality.likelihood, "num_classes", 0))
    return Classifier(modality.name, _Reader(number), np.arange(number))


@torch.no_grad()
def _judged(
    classifier: Classifier, dataset: MultimodalDataset, index: Tensor, classes: np.ndarray
) -> Classifier:
    right = []
    for part in index.split(_JUDGED_ROWS):
        logits = classifier(dataset.batch(part)[0][classifier.modality])
        right.append(logits.argmax(-1).cpu().numpy())
    hits = classifier.classes[np.concatenate(right)] == classes
    found = mean_and_error(np.asarray(hits, dtype=float).reshape(len(index)))
    classifier.accuracy, classifier.standard_error, classifier.num_rows = found
    return classifier


def judges(
    pair: Pair, classifiers: Mapping[str, ClassifierLike], where: str
) -> dict[str, ClassifierLike]:
    """A classifier for each modality that has one; label modalities are read where none is."""
    if not isinstance(classifiers, Mapping):
        raise TypeError(
            f"{where} classifiers: expected a dict from modality name to classifier, found "
            f"{type(classifiers).__name__}"
        )
    modality_names(pair.modalities, classifiers, f"{where} classifiers")
    found: dict[str, ClassifierLike] = {}
    for name, modality in pair.modalities.items():
        if name in classifiers:
            found[name] = classifiers[name]
        elif is_label(modality):
            found[name] = label_reader(modality)
    if not found:
        raise ValueError(
            f"{where} classifiers: expected at least one, found none; train one with "
            f"train_classifier(dataset, {next(iter(pair.modalities))!r})"
        )
    return found


@contextmanager
def resting(classifiers: Mapping[str, ClassifierLike]) -> Iterator[None]:
    """Evaluation mode of those classifiers that are modules, restored afterwards."""
    parts = [c for c in classifiers.values() if isinstance(c, nn.Module)]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    with ExitStack() as stack:
        for module, training in modes:
            stack.callback(setattr, module, "training", training)
        for part in parts:
            part.eval()
        yield


def class_probabilities(classifier: ClassifierLike, value: Tensor, where: str) -> Tensor:
    """What a classifier says of values ``(N, *event_shape)``: probabilities ``(N, C)``.

    One that names a class is sure of it. Classes count up to the largest that it names.

    Raises:
        ValueError: If it gives neither classes ``(N,)`` nor logits ``(N, C)``.
    """
    found: Any = classifier(_at_home(classifier, value))
    if isinstance(found, Tensor) and len(found) == len(value):
        if found.dim() == 2 and found.is_floating_point():
            return found.double().softmax(-1)
        if found.dim() == 1 and not found.is_floating_point() and bool((found >= 0).all()):
            return F.one_hot(found.long()).double()
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    kind = f" of {found.dtype}" if isinstance(found, Tensor) else ""
    raise ValueError(
        f"{where}: expected a classifier that gives logits ({len(value)}, C) or classes "
        f"({len(value)},) counted from 0, found {shape}{kind}"
    )


def _at_home(classifier: ClassifierLike, value: Tensor) -> Tensor:
    """The values where the classifier lives, in its precision."""
    weights = classifier.parameters() if isinstance(classifier, nn.Module) else iter(())
    first = next((each for each in weights if each.is_floating_point()), None)
    if first is None:
        return value
    return (
        value.to(first.device, first.dtype) if value.is_floating_point() else value.to(first.device)
    )


def class_names(classifier: ClassifierLike, index: np.ndarray) -> np.ndarray:
    """Classes as they are called in the labels."""
    classes = getattr(classifier, "classes", None)
    return index if classes is None else np.asarray(classes)[index]
