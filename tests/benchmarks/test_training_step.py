"""A training step of MVAE beside a hand-written PyTorch step of the same computation.

The computation: both encoders once, products of experts with the prior for {image, label}, {image}
and {label}, one z for each, the image decoder on the two subsets that score the image, the label
decoder on the two that score the label, analytic KL, backward, fused Adam. Networks 784-512-512-64
and 10-512-512-64, batch 128, float32, two threads. Targets: `fit` at most 1.10, `SVI.step` at most
1.35 of the hand-written seconds. `fit` includes what it does beyond a step: shuffled batches, the
norm of the gradient, the terms of the history.
"""

import pyro
import pytest
import torch
import torch.nn.functional as F
from measure import image_and_label, median_ratio, rows_of, seconds_in_turn
from pyro.infer import SVI
from torch import Tensor

from mmzoo.data import MultimodalDataset
from mmzoo.inference import fit
from mmzoo.models import MVAE

pytestmark = pytest.mark.benchmark

BATCH, STEPS, ROUNDS = 128, 25, 11


@pytest.fixture(autouse=True)
def two_threads_float32() -> None:
    torch.set_default_dtype(torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def hand_written_loss(vae: MVAE, image: Tensor, label: Tensor) -> Tensor:
    """The objective, summed over rows, in plain PyTorch on the networks of a model."""
    params = [vae.experts["image_"], vae.experts["label_"]]
    pairs = [
        expert.head(expert.encoder(x)).chunk(2, -1)
        for expert, x in zip(params, (image, label), strict=True)
    ]
    scales = [F.softplus(raw) + 1e-4 for _, raw in pairs]
    precision = [scale.square().reciprocal() for scale in scales]
    shift = [tau * loc for tau, (loc, _) in zip(precision, pairs, strict=True)]
    total = torch.stack([1 + precision[0] + precision[1], 1 + precision[0], 1 + precision[1]])
    loc = torch.stack([shift[0] + shift[1], shift[0], shift[1]]) / total  # (3, N, D)
    scale = total.rsqrt()
    z = loc + scale * torch.randn_like(loc)
    logits = vae.generative.decoders["image_"](z[:2].flatten(0, 1))
    target = image.expand(2, *image.shape).flatten(0, 1)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    logits = vae.generative.decoders["label_"](z[::2].flatten(0, 1))
    target = label.argmax(-1).repeat(2)
    loss = loss + F.cross_entropy(logits, target, reduction="sum")
    return loss + 0.5 * (loc.square() + scale.square() - 2 * scale.log() - 1).sum()


def test_the_hand_written_loss_is_the_same_computation() -> None:
    torch.set_default_dtype(torch.float64)
    vae, x = MVAE(image_and_label(), latent_dim=64), rows_of(BATCH)
    gradients = []
    for loss in (
        lambda: vae.objective().differentiable_loss(vae.model, vae.guide, x),
        lambda: hand_written_loss(vae, x["image"], x["label"]),
    ):
        vae.zero_grad()
        torch.manual_seed(1)
        value = loss()
        value.backward()
        gradients.append((value.detach(), *(p.grad.clone() for p in vae.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class HandWritten:
    """Steps of the loop that one would write without the library."""

    def __init__(self, x: dict[str, Tensor]) -> None:
        self.vae, self.x = MVAE(image_and_label(), latent_dim=64), x
        self.optim = torch.optim.Adam(self.vae.parameters(), lr=1e-3, fused=True)

    def __call__(self) -> None:
        order, total = torch.randperm(len(self.x["image"])), 0.0
        for rows in order.split(BATCH):
            loss = hand_written_loss(self.vae, self.x["image"][rows], self.x["label"][rows])
            self.optim.zero_grad(set_to_none=True)
            (loss / len(rows)).backward()
            self.optim.step()
            total += loss.item()


class PlainSVI:
    """Pyro's SVI in a plain script, over the same batches."""

    def __init__(self, x: dict[str, Tensor], *, validation: bool) -> None:
        vae = MVAE(image_and_label(), latent_dim=64)
        optim = pyro.optim.PyroOptim(torch.optim.Adam, {"lr": 1e-3, "fused": True})
        self.svi = SVI(vae.model, vae.guide, optim, vae.objective())
        self.x, self.validation = x, validation

    def __call__(self) -> None:
        order = torch.randperm(len(self.x["image"]))
        with pyro.validation_enabled(self.validation):
            for rows in order.split(BATCH):
                self.svi.step({name: value[rows] for name, value in self.x.items()})


class Fit:
    """One epoch of `fit`; `epoch` keeps the seconds without set-up and the closing figures."""

    def __init__(self, x: dict[str, Tensor]) -> None:
        self.vae, self.train = MVAE(image_and_label(), latent_dim=64), MultimodalDataset(x)
        self.epoch: list[float] = []

    def __call__(self) -> None:
        result = fit(self.vae, self.train, epochs=1, batch_size=BATCH, progress=False)
        self.epoch.append(float(result.history.seconds[0]))


def test_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    x = rows_of(BATCH * STEPS)
    ours = Fit(x)
    contestants = {
        "hand-written": HandWritten(x),
        "fit, whole call": ours,
        "SVI.step": PlainSVI(x, validation=False),
        "SVI.step, Pyro validation": PlainSVI(x, validation=True),
    }
    seconds = seconds_in_turn(contestants, rounds=ROUNDS)
    seconds["fit, epoch"] = ours.epoch[1:]
    with capsys.disabled():
        print(f"\n{'MVAE training step':28}{'ms/step (best)':>16}{'ratio (median)':>16}")
        for name, values in seconds.items():
            ratio = median_ratio(seconds, name, "hand-written")
            print(f"{name:28}{1e3 * min(values) / STEPS:16.2f}{ratio:16.2f}")
