"""Sweeps over what is missing: counts are exact, and each measure sees the rows that it should."""

import numpy as np
import pytest
import torch
import xarray as xr

from mmzoo import Modality
from mmzoo.data import MultimodalDataset, label_dependent
from mmzoo.evaluation.generation import reconstruction
from mmzoo.evaluation.pair import Pair
from mmzoo.evaluation.sweeps import missingness_sweep
from mmzoo.models import MVAE

PARTS = [Modality("a", (2,)), Modality("b", (3,))]


@pytest.fixture
def vae() -> MVAE:
    return MVAE(PARTS, 2)


def rows(count: int = 40) -> MultimodalDataset:
    rng = torch.Generator().manual_seed(0)
    x = {"a": torch.randn(count, 2, generator=rng), "b": torch.randn(count, 3, generator=rng)}
    return MultimodalDataset(x, labels={"y": np.arange(count) % 2}, modalities=PARTS)


def seen(pair: Pair, data: MultimodalDataset) -> float:
    return float(sum(mask.sum() for mask in data.observed.values()))


def test_numbers_at_test(vae: MVAE) -> None:
    told: list[tuple[int, int]] = []
    found = missingness_sweep(
        seen, vae, rows(), [0.0, 0.25, 0.5], seeds=[0, 7], on_progress=lambda *c: told.append(c)
    )
    assert found.value.dims == ("fraction", "seed")
    assert found.value.values.tolist() == [[80, 80], [60, 60], [40, 40]]
    np.testing.assert_allclose(found.missing, [[0, 0], [0.25, 0.25], [0.5, 0.5]])
    assert found.seed.values.tolist() == [0, 7] and found.fraction.values.tolist() == [0, 0.25, 0.5]
    assert told == [(i, 6) for i in range(1, 7)]


def test_tables_keep_their_dimensions_and_seeds_choose_the_rows(vae: MVAE) -> None:
    found = missingness_sweep(
        lambda pair, data: reconstruction(pair, data), vae, rows(), [0.1, 0.4], seeds=[0, 1, 2]
    )
    assert dict(found.mse.sizes) == {"fraction": 2, "seed": 3, "subset": 3, "target": 2}
    counts = found.num_rows.sel(subset="a", target="a")
    assert (counts == xr.DataArray([36, 24], dims="fraction")).all()
    cells = found.mse.sel(subset="a", target="a", fraction=0.4).values
    assert len(set(cells)) == 3
    again = missingness_sweep(
        lambda pair, data: reconstruction(pair, data), vae, rows(), [0.1, 0.4], seeds=[0, 1, 2]
    )
    xr.testing.assert_identical(found, again)


def test_one_modality_and_a_pattern_of_ones_own(vae: MVAE) -> None:
    found = missingness_sweep(seen, vae, rows(), [1.0], names=["a"])
    assert found.value.item() == 0 and found.missing.item() == 1.0
    labels = rows().labels["y"]

    def pattern(data: MultimodalDataset, share: float, seed: int) -> dict[str, torch.Tensor]:
        return label_dependent(labels, [0.0, share], name="a", seed=seed)

    found = missingness_sweep(seen, vae, rows(), [0.0, 1.0], names=["a"], pattern=pattern)
    assert found.value.values.ravel().tolist() == [40, 20]
    assert found.missing.values.ravel().tolist() == [0.0, 0.5]


def test_training_sees_the_holes_and_the_measure_the_test_rows() -> None:
    calls = []
    test = rows(10)

    def factory(data: MultimodalDataset, seed: int) -> MVAE:
        calls.append((seed, int(data.observed["a"].sum())))
        return MVAE(PARTS, 1 + calls[-1][1])

    def measure(pair: Pair, data: MultimodalDataset) -> float:
        assert data is test
        return pair.latent_dim  # type: ignore[union-attr]

    found = missingness_sweep(
        measure, factory, rows(), [0.25, 0.5], at="train", test=test, seeds=[3, 4]
    )
    assert calls == [(3, 30), (4, 30), (3, 20), (4, 20)]
    assert found.value.values.tolist() == [[31, 31], [21, 21]]
    assert found.attrs["at"] == "train"


def test_bad_input(vae: MVAE) -> None:
    with pytest.raises(ValueError, match="at: expected 'test' or 'train', found 'now'"):
        missingness_sweep(seen, vae, rows(), [0.1], at="now")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shares in \[0, 1\], found \[1.5\]"):
        missingness_sweep(seen, vae, rows(), [1.5])
    with pytest.raises(ValueError, match="at least one fraction and one seed"):
        missingness_sweep(seen, vae, rows(), [])
    with pytest.raises(ValueError, match=r"seeds: expected each once, found \[1, 1\]"):
        missingness_sweep(seen, vae, rows(), [0.1], seeds=[1, 1])
    with pytest.raises(ValueError, match=r"unknown modalities \['q'\]; the data set has a, b"):
        missingness_sweep(seen, vae, rows(), [0.1], names=["q"])
    with pytest.raises(ValueError, match=r"at='train': expected a function .* found MVAE"):
        missingness_sweep(seen, vae, rows(), [0.1], at="train", test=rows())
    with pytest.raises(ValueError, match="and no test rows"):
        missingness_sweep(seen, lambda data, seed: vae, rows(), [0.1], at="train")
    with pytest.raises(ValueError, match="at='test': expected a trained pair"):
        missingness_sweep(seen, lambda data, seed: vae, rows(), [0.1])
    with pytest.raises(TypeError, match="expected a number or a Dataset, found list"):
        missingness_sweep(lambda pair, data: [1], vae, rows(), [0.1])
    with pytest.raises(ValueError, match="without masks"):
        masked = rows().with_observed({"a": torch.arange(40) > 3})
        missingness_sweep(seen, vae, masked, [0.1])
