"""Likelihood evaluation beside the decoder alone.

log p(image) of MVAE, networks 784-512-512-64, needs the image decoder at K draws for each row. What
it costs beyond that (draws, densities of z, the Bernoulli density, the summary of weights) should
leave at least 75 % of the decoder's own rate, timed in turn at the best chunk size of each.
"""

import pytest
import torch
from measure import image_and_label, median_ratio, rows_of, seconds_in_turn

from mmzoo.evaluation import log_likelihood
from mmzoo.models import MVAE

pytestmark = pytest.mark.benchmark

ROWS, DRAWS, ROUNDS = 64, 256, 5
CHUNKS = (512, 1024, 2048, 4096)


@pytest.fixture(autouse=True)
def float32() -> None:
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
def decode_all(vae: MVAE, z: torch.Tensor, chunk: int) -> None:
    """The decoder alone, on as many z as the likelihood needs."""
    for part in z.split(chunk):
        vae.generative.decoders["image_"](part)


def test_likelihood_beside_the_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    vae = MVAE(image_and_label(), latent_dim=64).eval()
    x, z = rows_of(ROWS), torch.randn(ROWS * DRAWS, 64)
    contestants = {}
    for chunk in CHUNKS:
        contestants[f"decoder, chunk {chunk}"] = lambda chunk=chunk: decode_all(vae, z, chunk)
        contestants[f"log p(image), chunk {chunk}"] = lambda chunk=chunk: log_likelihood(
            vae, {"image": x["image"]}, of="image", num_samples=DRAWS, chunk_size=chunk
        )
    seconds = seconds_in_turn(contestants, rounds=ROUNDS)
    typical = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    best = [
        min((name for name in typical if name.startswith(kind)), key=typical.__getitem__)
        for kind in ("decoder", "log")
    ]
    with capsys.disabled():
        print(f"\n{'':28}{'1000 draws/s (median)':>24}")
        for name, value in typical.items():
            print(f"{name:28}{ROWS * DRAWS / value / 1e3:24.1f}")
        share = median_ratio(seconds, best[0], best[1])
        print(f"rate of {best[1]!r} over {best[0]!r}: {share:.0%} (median; target 75 %)")
