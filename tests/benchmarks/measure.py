"""How the benchmarks measure: contestants in turn, in one run, compared round by round.

On a machine that does other work too, the seconds of one contestant mean little; the ratio of two
that ran one after the other means more, and the median of many such ratios means most.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from mmzoo import Modality

__all__ = ["image_and_label", "median_ratio", "rows_of", "seconds_in_turn"]


def seconds_in_turn(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int
) -> dict[str, list[float]]:
    """Wall-clock seconds of each contestant in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        # Every other round goes backwards, so that nobody always runs after the same neighbour.
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            contestants[name]()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the seconds of one contestant over those of another."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def image_and_label(hidden: tuple[int, ...] = (512, 512)) -> list[Modality]:
    """The modalities of MNIST with the networks of the targets, 784-512-512-64."""
    network = {"kind": "mlp", "hidden": list(hidden)}
    return [
        Modality("image", (784,), "bernoulli", encoder=network, decoder=network),
        Modality("label", (10,), "one_hot_categorical", encoder=network, decoder=network),
    ]


def rows_of(num_rows: int) -> dict[str, torch.Tensor]:
    """Binary images and one-hot labels; their values do not change the cost of a step."""
    image = (torch.rand(num_rows, 784) < 0.2).to(torch.get_default_dtype())
    label = torch.nn.functional.one_hot(torch.arange(num_rows) % 10, 10)
    return {"image": image, "label": label.to(image.dtype)}
