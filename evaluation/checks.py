"""Every check of a trained model at a moderate size, as one tree: what the report shows.

The likelihood table says how good a model is. These say whether its posterior can be believed, what
its latents hold, what it can be used for, and whether enough importance samples were drawn.

| group | question | from |
|---|---|---|
| ``calibration`` | does q(z given a subset) hold the truth as often as it says? | simulation |
| ``contraction`` | how much does each observed subset narrow each latent? | test rows |
| ``active_units`` | which latents move with the data? | test rows |
| ``kl`` | what does each latent cost, and which collapsed? | test rows |
| ``shares`` | which modality dominates likelihood and gradients? | test rows |
| ``agreement`` | do the unimodal posteriors agree? | test rows |
| ``curve`` | does log p still rise with the number of samples? | test rows |
| ``coherence``, ``joint_coherence`` | is what is generated of the right class? | test rows, prior |
| ``probe``, ``clustering`` | can a class be read off the latents? | training and test rows |
| ``retrieval`` | does one modality find the other of its row? | test rows |
| ``reconstruction`` | how far is what is generated from the data? | test rows |

A group whose question the model, or the data, has no answer to holds the reason in its attribute
``note`` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import xarray as xr
from torch import Tensor

from mmzoo.data import MultimodalDataset
from mmzoo.evaluation.calibration import simulation_based_calibration
from mmzoo.evaluation.classifiers import ClassifierLike, train_classifier
from mmzoo.evaluation.coherence import coherence, joint_coherence
from mmzoo.evaluation.generation import reconstruction
from mmzoo.evaluation.likelihood import likelihood_curve
from mmzoo.evaluation.pair import Pair, device_of
from mmzoo.evaluation.posterior import (
    active_units,
    contraction,
    kl_per_dimension,
    modality_shares,
    posterior_agreement,
)
from mmzoo.evaluation.probes import clustering, linear_probe
from mmzoo.evaluation.retrieval import retrieval

__all__ = ["check_model", "default_classifiers"]

_CLASSIFIER_ROWS = 10_000
_PROBE_ROWS = 2000
_RETRIEVAL_ROWS = 200
_CURVE_ROWS = 100
_CLASSIFIER_STEPS, _CLASSIFIER_BATCH = 1500, 64
_CLASSIFIER_EPOCHS = 5, 70  # at least and at most
_IMAGE_DIMS = 3


def check_model(
    pair: Pair,
    test: MultimodalDataset,
    *,
    train: MultimodalDataset | None = None,
    classifiers: Mapping[str, ClassifierLike] | None = None,
    num_rows: int = 500,
    num_draws: int = 99,
    num_samples: tuple[int, ...] = (10, 100, 1000),
    prior_share: float = 0.0,
    seed: int = 0,
    on_check: Callable[[str, int, int], None] | None = None,
) -> xr.DataTree:
    """Runs every check that the pair and the data have an answer to.

    Args:
        pair: The model, or a pair of your own.
        test: Held-out rows.
        train: Rows that linear probes are fitted to; none: no probes.
        classifiers: Name to classifier, see :func:`mmzoo.evaluation.coherence.coherence`;
            label modalities need none.
        num_rows: Rows of each check, simulated or of the test rows; some checks take fewer.
        num_draws: Draws of the latents of each row.
        num_samples: Numbers of importance samples of the curve.
        prior_share: As in :func:`mmzoo.evaluation.log_likelihood`, for the curve.
        seed: Of everything that is random.
        on_check: Called with the name of a check, the checks done and the checks in all.

    Returns:
        One group for each check, see the top of this module.
    """
    if num_rows < 2:
        raise ValueError(f"check_model num_rows: expected at least 2, found {num_rows}")
    device = device_of(pair)
    test = test.subset(range(min(len(test), num_rows)))
    x, observed = test.to(device).tensors()
    few_x, few_observed = _first(x, observed, _CURVE_ROWS)
    known = None if train is None else train.subset(range(min(len(train), _PROBE_ROWS)))
    judges = dict(classifiers or {})
    scored = [name for name in pair.modalities if name in x and name not in pair.always_given]
    here = partial(_call, pair, x, observed, seed=seed)
    checks: dict[str, Callable[[], xr.Dataset]] = {
        "calibration": lambda: simulation_based_calibration(
            pair,
            x=x if pair.always_given else None,
            observed=observed if pair.always_given else None,
            num_rows=len(test) if pair.always_given else num_rows,
            num_draws=num_draws,
            seed=seed,
        ),
        "contraction": lambda: here(contraction, num_draws=num_draws),
        "active_units": lambda: here(active_units, num_draws=num_draws),
        "kl": lambda: here(kl_per_dimension, num_draws=num_draws),
        "shares": lambda: here(modality_shares),
        "agreement": lambda: here(posterior_agreement),
        "curve": lambda: likelihood_curve(
            pair,
            few_x,
            few_observed,
            of=scored,
            given=pair.always_given,
            num_samples=num_samples,
            prior_share=prior_share,
            seed=seed,
        ),
        "coherence": lambda: coherence(pair, test, judges, seed=seed),
        "joint_coherence": lambda: joint_coherence(pair, judges, num_samples=num_rows, seed=seed),
        "probe": lambda: _probe(pair, known, test, seed),
        "clustering": lambda: clustering(pair, test, seed=seed),
        "retrieval": lambda: retrieval(
            pair, test.subset(range(min(len(test), _RETRIEVAL_ROWS))), seed=seed
        ),
        "reconstruction": lambda: reconstruction(pair, test, seed=seed),
    }
    tree = xr.DataTree()
    for done, (name, check) in enumerate(checks.items()):
        if on_check:
            on_check(name, done, len(checks))
        try:
            found = check()
        except ValueError as error:  # every check says in one line what it lacks
            # Where it comes from inside a program, Pyro has added all shapes of its sites.
            found = xr.Dataset(attrs={"note": str(error).split("\n", 1)[0]})
        tree[name] = xr.DataTree(found)
    if on_check:
        on_check("", len(checks), len(checks))
    tree.attrs = {"title": pair.title, "rows": len(test), "seed": seed}
    return tree


def default_classifiers(
    train: MultimodalDataset, *, epochs: int | None = None, seed: int = 0
) -> dict[str, ClassifierLike]:
    """Classifiers of every image, and of what is a label already; none where rows have no label.

    Args:
        train: Training rows, of which at most 10,000 are used.
        epochs: Passes over them; default: 5 to 70, for some 1,500 steps.
        seed: Of weights and order.
    """
    rows = train.subset(range(min(len(train), _CLASSIFIER_ROWS)))
    if epochs is None:
        epochs = math.ceil(_CLASSIFIER_STEPS * _CLASSIFIER_BATCH / len(rows))
        epochs = min(max(epochs, _CLASSIFIER_EPOCHS[0]), _CLASSIFIER_EPOCHS[1])
    found: dict[str, ClassifierLike] = {}
    for modality in train.modalities or ():
        label = modality.likelihood.name in ("one_hot_categorical", "categorical")
        if not label and len(modality.event_shape) != _IMAGE_DIMS:
            continue
        try:
            found[modality.name] = train_classifier(
                rows, modality.name, epochs=epochs, batch_size=_CLASSIFIER_BATCH, seed=seed
            )
        except ValueError:  # no label that it could learn
            continue
    return found


def _call(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor],
    check: Callable[..., xr.Dataset],
    **options: object,
) -> xr.Dataset:
    return check(pair, x, observed, **options)


def _first(
    x: Mapping[str, Tensor], observed: Mapping[str, Tensor], num: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    part: slice = slice(num)
    return (
        {name: value[part] for name, value in x.items()},
        {name: mask[part] for name, mask in observed.items()},
    )


def _probe(
    pair: Pair, train: MultimodalDataset | None, test: MultimodalDataset, seed: int
) -> xr.Dataset:
    if train is None:
        raise ValueError("linear_probe train: expected rows to fit to, found none; pass train=…")
    with torch.no_grad():
        return linear_probe(pair, train, test, seed=seed)
