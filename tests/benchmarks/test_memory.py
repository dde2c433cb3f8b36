"""Peak memory of likelihood evaluation does not grow with the number of draws K.

Each K in a process of its own, which reports its largest resident size beyond what it held before,
less the result. Target: within 5 % from K = 100 to K = 10,000.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmark

SCRIPT = """
import gc, resource, sys
import torch
from measure import image_and_label, rows_of
from mmzoo.evaluation import log_likelihood
from mmzoo.models import MVAE

def peak():  # MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(1)
torch.manual_seed(0)
vae, x = MVAE(image_and_label(), latent_dim=64).eval(), rows_of(64)
log_likelihood(vae, rows_of(2), of="image", num_samples=30)  # imports and pools
before = peak()
log_likelihood(vae, x, of="image", num_samples=int(sys.argv[1]))
print(before, peak())
"""


def peak_memory(num_samples: int) -> tuple[float, float]:
    """Resident size before, and the largest one until after, in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(num_samples)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(float, done.stdout.split())
    return before, after


def test_peak_memory(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {num_samples: peak_memory(num_samples) for num_samples in (100, 1000, 10_000)}
    with capsys.disabled():
        print(f"\n{'K':>8}{'before, MiB':>14}{'peak, MiB':>14}{'beyond, MiB':>14}")
        for num_samples, (before, after) in sizes.items():
            print(f"{num_samples:8}{before:14.1f}{after:14.1f}{after - before:14.1f}")
        growth = sizes[10_000][1] / sizes[100][1] - 1
        print(f"growth of the peak from K = 100 to K = 10,000: {growth:+.1%} (target 5 %)")
