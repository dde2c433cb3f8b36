"""Retrieval where ranks are known: by enumeration, by an exact density, or by chance."""

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from own import blind, own_pair
from torch import Tensor

from mmzoo import Modality
from mmzoo.evaluation.pair import draw_latents, quiet
from mmzoo.evaluation.retrieval import _similarity, retrieval
from mmzoo.evaluation.rowwise import latent_moments
from mmzoo.exact import LinearGaussianWorld
from mmzoo.models import MODELS, MVAE

ERRORS = 5.0
SIZES = {"a": 3, "b": 2}
METHODS = ("cosine", "euclidean", "wasserstein", "likelihood")


@pytest.fixture
def world() -> LinearGaussianWorld:
    return LinearGaussianWorld.random(SIZES, latent_dim=2, seed=3)


def exact_scores(world: LinearGaussianWorld, x: dict[str, Tensor], method: str) -> Tensor:
    """Scores of a -> b, ``(N, N)``, from the exact posteriors."""
    one, other = (world.posterior({name: x[name]}) for name in SIZES)
    if method == "likelihood":
        rows = len(x["a"])
        pairs = {
            "a": x["a"].repeat_interleave(rows, 0),
            "b": x["b"].repeat(rows, 1),
        }
        return world.log_prob(pairs, of=["b"], given=["a"]).reshape(rows, rows)
    loc, loc_b = one.mean, other.mean
    if method == "cosine":
        return torch.nn.functional.cosine_similarity(loc[:, None], loc_b, dim=-1)
    distance = (loc[:, None] - loc_b).square().sum(-1)
    if method == "euclidean":
        return -distance
    return -(distance + (one.stddev[:, None] - other.stddev).square().sum(-1))


@pytest.mark.parametrize("method", METHODS)
def test_ranks_are_the_exact_ones(world: LinearGaussianWorld, method: Any) -> None:
    x = world.sample(60, seed=1)
    found = retrieval(
        own_pair(world), x, query="a", target="b", method=method, num_draws=4000, batch_size=16
    )
    scores = exact_scores(world, x, method)
    ranks = 1 + (scores > scores.diagonal()[:, None]).sum(1).numpy()
    # Moments and densities of 4000 draws may swap close neighbours: a few ranks by one.
    assert abs(found.median_rank.item() - np.median(ranks)) <= 1
    for k in (1, 5, 10):
        assert found.recall.sel(k=k).item() == pytest.approx((ranks <= k).mean(), abs=3 / 60)
    assert found.recall.sel(k=10).item() > 2 * found.chance.sel(k=10).item()
    p = found.recall.sel(k=5).item()
    assert found.standard_error.sel(k=5).item() == pytest.approx(np.sqrt(p * (1 - p) / 59))


@pytest.mark.parametrize("method", METHODS)
def test_pair_that_ignores_its_input_is_at_chance(world: LinearGaussianWorld, method: Any) -> None:
    """All candidates tie but in the likelihood, which ranks them alike for every query."""
    x = world.sample(50, seed=1)
    found = retrieval(own_pair(world, blind), x, method=method, num_draws=2)
    for query, target in (("a", "b"), ("b", "a")):
        cell = found.sel(query=query, target=target)
        np.testing.assert_allclose(cell.recall, cell.chance, atol=1e-12)
        assert cell.chance.values.tolist() == [1 / 50, 5 / 50, 10 / 50]
        assert cell.median_rank.item() == cell.median_rank_chance.item() == 25.5


def test_masks_are_respected_and_filler_is_never_seen(world: LinearGaussianWorld) -> None:
    """Candidates have the target, queries have both."""
    x = world.sample(40, seed=1)
    observed = {"a": torch.arange(40) % 4 != 0, "b": torch.arange(40) % 5 != 0}
    for name, mask in observed.items():
        x[name][~mask] = torch.nan
    for method in METHODS:
        found = retrieval(own_pair(world), x, observed=observed, method=method, num_draws=5)
        both = int((observed["a"] & observed["b"]).sum())
        cell = found.sel(query="a", target="b")
        assert (cell.num_queries.item(), cell.num_candidates.item()) == (both, 32)
        assert cell.recall.notnull().all()
        assert found.sel(query="b", target="a").num_candidates.item() == 30


def test_repeatable_and_the_diagonal_is_empty(world: LinearGaussianWorld) -> None:
    x = world.sample(30, seed=2)
    state = torch.get_rng_state()
    told: list[tuple[int, int]] = []
    first, again = (
        retrieval(
            own_pair(world), x, num_draws=3, batch_size=20, on_progress=lambda *c: told.append(c)
        )
        for _ in range(2)
    )
    xr.testing.assert_identical(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.note.sel(query="a", target="a").item() == "the query holds the target"
    assert first.recall.sel(query="a", target="a").isnull().all()
    assert told == 2 * [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_rows_that_score_alike_up_to_round_off_tie() -> None:
    """The mean of a constant posterior is not the same to the bit in every batch."""
    vae = MVAE([Modality("x", (3,)), Modality("y", (2,))], 2).float()
    for parameter in vae.experts.parameters():
        torch.nn.init.zeros_(parameter)
    x = {"x": torch.randn(20, 3), "y": torch.randn(20, 2)}
    found = retrieval(vae, x, query="x", target="y", method="euclidean", batch_size=3)
    assert found.recall.values.ravel().tolist() == pytest.approx([1 / 20, 5 / 20, 10 / 20])


def test_wasserstein_looks_at_the_spread() -> None:
    loc = torch.zeros(1, 2)
    near, far = (loc, torch.ones(1, 2)), (torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [3.0, 2.0]]))
    torch.testing.assert_close(_similarity(near, far, "wasserstein"), torch.tensor([[0.0, -5.0]]))
    assert _similarity(near, far, "euclidean").tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("vae", "linear", "cvae")])
def test_every_model_of_the_zoo(name: str) -> None:
    vae = MODELS[name]([Modality("x", (3,)), Modality("y", (2,))], 2)
    x = {"x": torch.randn(12, 3), "y": torch.randn(12, 2)}
    for method in METHODS:
        found = retrieval(vae, x, query="x", target="y", method=method, num_draws=3, k=[12])
        if name == "jointvae":
            assert "posterior of complete rows only" in found.note.item()
        else:
            assert found.recall.item() == pytest.approx(1.0)
            assert 1 <= found.median_rank.item() <= 12


def test_bad_input(world: LinearGaussianWorld) -> None:
    pair, x = own_pair(world), world.sample(10, seed=1)
    with pytest.raises(ValueError, match="unknown 'dot'; known: cosine, euclidean"):
        retrieval(pair, x, method="dot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k of at least 1, found 0"):
        retrieval(pair, x, k=[0])
    with pytest.raises(ValueError, match="expected at least one number, found none"):
        retrieval(pair, x, k=[])
    with pytest.raises(ValueError, match="unknown modality 'q'"):
        retrieval(pair, x, query="q")
    with pytest.raises(ValueError, match="found an empty subset"):
        retrieval(pair, x, target=[[]])
    parts = [Modality("x", (2,)), Modality("y", (2,))]
    cvae = MODELS["cvae"](parts, 2, condition="y")
    with pytest.raises(ValueError, match="conditional on y"):
        retrieval(cvae, {"x": torch.zeros(4, 2), "y": torch.zeros(4, 2)})
    limited = own_pair(world, subsets=[["a"]])
    found = retrieval(limited, x, query="a", target="b")
    assert "does not answer for b alone" in found.note.item()
    assert retrieval(limited, x, query="a", target="b", method="likelihood").note.item() == ""
    few = {"a": torch.zeros(10, dtype=torch.bool)}
    found = retrieval(MVAE([*pair.modalities.values()], 2), x, observed=few, query="a", target="b")
    assert found.note.item() == "no row has both"


@pytest.mark.parametrize("name", ["mvae", "mmvae", "mopoe", "mwvae", "mhvae"])
def test_moments_are_those_of_draws(name: str) -> None:
    """Closed forms where a posterior has them, draws elsewhere: the same numbers."""
    vae = MODELS[name]([Modality("x", (3,)), Modality("y", (2,))], 2)
    x = {"x": torch.randn(4, 3), "y": torch.randn(4, 2)}
    sites = [site for site in vae.latent_sites if not site.startswith("w_")]
    with quiet(vae, 0):
        loc, scale = latent_moments(vae, x, sites, 4000)
    drawn = draw_latents(vae, x, num_draws=4000, seed=1)
    z = torch.cat([drawn[site] for site in sites], -1)
    assert ((loc - z.mean(0)).abs() < ERRORS * np.sqrt(2 / 4000) * scale).all()
    assert ((scale / z.std(0) - 1).abs() < ERRORS * np.sqrt(2 / 4000)).all()
