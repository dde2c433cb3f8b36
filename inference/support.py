"""Values that a likelihood of the user's own cannot score, found before they are scored.

The likelihoods of the library know their support. One that is any function from a decoder's output
to a distribution says what it takes only once there is a distribution, and with validation off, as
in a training loop, a count of -0.5 has a finite density.
"""

from typing import Any

import pyro
import torch
from pyro import poutine
from torch.distributions import constraints

from mmzoo.batch import Batch
from mmzoo.likelihoods import CallableLikelihood

__all__ = ["check_support"]


def check_support(pair: Any, batch: Batch, *, first: int = 0) -> None:
    """Looks at every observed value of modalities with a likelihood of the user's own.

    A support that depends on the parameters, as that of a uniform distribution, is not looked at.

    Args:
        pair: A model of the zoo or a pair of the user's own.
        batch: The rows, with one dimension.
        first: Number of the first row, for the message.

    Raises:
        ValueError: For a value outside the support.
    """
    for name, modality in pair.modalities.items():
        value = batch.x.get(name)
        if value is None or not isinstance(modality.likelihood, CallableLikelihood):
            continue
        if name in pair.always_given or (support := _support(pair, batch, name)) is None:
            continue
        good = support.check(value)
        if modality.entrywise_missing and good.shape == value.shape:
            good = good | value.isnan()
        good = good.reshape(len(value), -1).all(-1)
        mask = batch.observed.get(name)
        bad = (~good if mask is None else ~good & mask).nonzero().squeeze(-1)
        if len(bad):
            raise ValueError(
                f"modality {name!r}: expected values in the support of its likelihood, {support}, "
                f"found others in {len(bad)} of these rows, the first is row "
                f"{first + int(bad[0])}; mask such rows, or take another likelihood"
            )


def _support(pair: Any, batch: Batch, name: str) -> Any:
    """The support of a single entry or value, from one row; None if it depends on parameters."""
    # The data may wait on another device than the pair.
    device = next((parameter.device for parameter in pair.parameters()), batch.device)
    values = ((each, batch.x[each]) for each in (name, *pair.always_given))
    row = {each: value[:1].to(device) for each, value in values if value is not None}
    with torch.random.fork_rng(), torch.no_grad(), pair.unregistered():
        with pyro.validation_enabled(False):
            fn = poutine.trace(pair.model).get_trace(row).nodes[name]["fn"]
    while (inner := getattr(fn, "base_dist", getattr(fn, "base", None))) is not None:
        if isinstance(fn, torch.distributions.TransformedDistribution):
            break
        fn = inner
    support = type(fn).support
    fixed = isinstance(support, constraints.Constraint) and not constraints.is_dependent(support)
    return support if fixed else None
