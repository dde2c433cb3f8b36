"""What a step of MVAE costs with 2, 4 and 8 modalities, and how many rows its networks see.

Every modality has 98 values and networks 98-256-256-32. The published objective visits all
modalities, each alone, and one random subset: M + 2 subsets (3 for M = 2). A decoder should run on
the rows of the subsets that score its modality and no others: one of all, one of its own, and
whatever the random subset has; so the cost of a step grows linearly in M, not with M (M + 2).
Encoders run once. A second table takes away half of the values of each modality.
"""

import pytest
import torch
from measure import seconds_in_turn
from torch import Tensor, nn

from mmzoo import Modality
from mmzoo.data import missing_completely_at_random
from mmzoo.models import MVAE

pytestmark = pytest.mark.benchmark

BATCH, STEPS, ROUNDS = 128, 10, 7


@pytest.fixture(autouse=True)
def float32() -> None:
    torch.set_default_dtype(torch.float32)


class Steps:
    """Training steps of a model with M modalities; counts the rows that its networks see."""

    def __init__(self, num_modalities: int, missing: float) -> None:
        net = {"kind": "mlp", "hidden": [256, 256]}
        names = [f"m{i}" for i in range(num_modalities)]
        self.vae = MVAE([Modality(n, (98,), encoder=net, decoder=net) for n in names], 32)
        self.optim = torch.optim.Adam(self.vae.parameters(), fused=True)
        self.objective = self.vae.objective()
        self.x = {name: torch.randn(BATCH, 98) for name in names}
        self.observed = missing_completely_at_random(BATCH, dict.fromkeys(names, missing), seed=0)
        if missing == 0:
            self.observed = {}
        self.rows = {"encoder": 0, "decoder": 0}
        for expert in self.vae.experts.values():
            expert.register_forward_pre_hook(self._count("encoder"))
        for decoder in self.vae.generative.decoders.values():
            decoder.register_forward_pre_hook(self._count("decoder"))

    def _count(self, kind: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.rows[kind] += len(args[0])

        return hook

    def __call__(self) -> None:
        for _ in range(STEPS):
            loss = self.objective.differentiable_loss(
                self.vae.model, self.vae.guide, self.x, self.observed
            )
            self.optim.zero_grad(set_to_none=True)
            loss.backward()
            self.optim.step()


@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_step_by_number_of_modalities(missing: float, capsys: pytest.CaptureFixture[str]) -> None:
    contestants = {f"M = {m}": Steps(m, missing) for m in (2, 4, 8)}
    seconds = seconds_in_turn(contestants, rounds=ROUNDS)
    steps, base = STEPS * (ROUNDS + 1), min(seconds["M = 2"])
    with capsys.disabled():
        print(f"\nmissing {missing:.0%}: {'ms/step (best)':>18}{'over M = 2':>12}", end="")
        print(f"{'rows/encoder':>14}{'rows/decoder':>14}{'subsets x N':>13}")
        for name, one in contestants.items():
            m, best = len(one.x), min(seconds[name])
            encoded, decoded = (one.rows[kind] / steps / m for kind in ("encoder", "decoder"))
            subsets = m + 1 + (m > 2)
            print(f"{name:>12}: {1e3 * best / STEPS:18.2f}{best / base:12.2f}", end="")
            print(f"{encoded:14.1f}{decoded:14.1f}{subsets * BATCH:13}")
