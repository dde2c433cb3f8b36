"""Probes and clusters of latents where the answer is known."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import Tensor

from mmzoo import Modality
from mmzoo.data import MultimodalDataset
from mmzoo.evaluation.pair import PyroPair
from mmzoo.evaluation.probes import _ari, _nmi, _scores, clustering, linear_probe
from mmzoo.models import DMVAE

ERRORS = 5.0
CENTRES = torch.tensor([[0.0, 4.0], [4.0, 0.0], [-4.0, -4.0]], dtype=torch.float64)


class Echo:
    """A pair whose latent is the mean of what is observed, with hardly any noise."""

    def __init__(self, *, blind: bool = False) -> None:
        self.blind = blind

    def model(self, x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["a"]), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            for name in ("a", "b"):
                pyro.sample(name, dist.Normal(z, 1.0).to_event(1), obs=x[name])

    def guide(self, x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["a"]), dim=-1):
            seen = torch.stack([observed[name] for name in x]).double().unsqueeze(-1)
            loc = (seen * torch.stack([x[name] for name in x])).sum(0) / seen.sum(0)
            loc = torch.zeros_like(loc) if self.blind else loc
            pyro.sample("z", dist.Normal(loc, 0.01).to_event(1))


def echo(**options: Any) -> PyroPair:
    programs = Echo(**options)
    parts = [Modality("a", (2,)), Modality("b", (2,))]
    return PyroPair(programs.model, programs.guide, parts)


def blobs(count: int, seed: int, noise: float = 0.4) -> MultimodalDataset:
    """`a` shows the class and a number; `b` is noise."""
    rng = torch.Generator().manual_seed(seed)
    classes = torch.randint(3, (count,), generator=rng)
    shift = noise * torch.randn(count, 2, generator=rng)
    x = {"a": CENTRES[classes] + shift, "b": torch.randn(count, 2, generator=rng)}
    labels = {
        "kind": np.array(["one", "two", "three"])[classes.numpy()],
        "number": (2.0 * x["a"][:, 0] - x["a"][:, 1] + 1.0).numpy(),
    }
    return MultimodalDataset(x, labels=labels)


def test_separated_classes_are_read_off_and_noise_is_at_chance() -> None:
    found = linear_probe(echo(), blobs(200, 1), blobs(300, 2), "kind", num_draws=5)
    a, b = (found.sel(subset=name) for name in ("a", "b"))
    assert (a.accuracy.item(), a.standard_error.item()) == (1.0, 0.0)
    assert abs(b.accuracy.item() - 1 / 3) < ERRORS * b.standard_error.item()
    share = b.accuracy.item()
    assert b.standard_error.item() == pytest.approx(np.sqrt(share * (1 - share) / 299))
    assert (found.num_train == 200).all() and (found.num_test == 300).all()


def test_pair_that_ignores_its_input_names_the_commonest_class() -> None:
    train, test = blobs(200, 1), blobs(300, 2)
    found = linear_probe(echo(blind=True), train, test, "kind", given=["a"], num_draws=5)
    seen = linear_probe(echo(), train, test, "kind", given=["a"], num_draws=5)
    assert found.accuracy.item() < 0.5 < seen.accuracy.item()
    kinds, counts = np.unique(train.labels["kind"], return_counts=True)
    assert found.chance.item() == (test.labels["kind"] == kinds[counts.argmax()]).mean()


def test_numbers_are_regressed() -> None:
    """The number is a linear function of `a` and has nothing to do with `b`."""
    train, test = blobs(200, 1), blobs(2000, 2)
    found = linear_probe(echo(), train, test, "number", num_draws=5, penalty=1e-6)
    a, b = (found.sel(subset=name) for name in ("a", "b"))
    assert a.r2.item() == pytest.approx(1.0, abs=1e-4)
    assert -0.2 < b.r2.item() < ERRORS * b.standard_error.item()
    assert linear_probe(echo(), train, test, "kind", given=["a"]).attrs["units"] == "share of rows"


def test_standard_error_of_r2_is_that_of_repetition() -> None:
    """On fresh test rows, with the linear model as it is."""
    train, runs = blobs(100, 0), []
    noisy = np.random.default_rng(0)

    def labels(rows: MultimodalDataset) -> np.ndarray:
        return rows.labels["number"] + 6 * noisy.standard_normal(len(rows))

    fixed = labels(train)
    for seed in range(60):
        test = blobs(150, 10 + seed)
        both = (fixed, labels(test))
        found = linear_probe(echo(), train, test, both, given=["a"], num_draws=2)
        runs.append((found.r2.item(), found.standard_error.item()))
    values, errors = np.array(runs).T
    ratio = np.sqrt(np.mean(errors**2)) / values.std(ddof=1)
    assert abs(ratio - 1) < ERRORS / np.sqrt(118)


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
def test_separated_clusters_are_found(method: Any) -> None:
    found = clustering(echo(), blobs(150, 3), "kind", method=method, num_draws=5, num_starts=3)
    a, b = (found.sel(subset=name) for name in ("a", "b"))
    for measure in ("nmi", "ari", "accuracy"):
        assert a[measure].item() == pytest.approx(1.0, abs=1e-12)
        assert a[f"{measure}_standard_error"].item() == pytest.approx(0.0, abs=1e-12)
    assert abs(b.ari.item()) < ERRORS * b.ari_standard_error.item() < 0.3
    assert b.nmi.item() < 0.1 and b.accuracy.item() < 0.55


def test_pair_that_ignores_its_input_has_one_cluster() -> None:
    """Identical latents: no information, and the accuracy of the commonest class."""
    rows = blobs(100, 3)
    vae = DMVAE([Modality("a", (2,)), Modality("b", (2,))], 2)
    for parameter in vae.experts.parameters():
        torch.nn.init.zeros_(parameter)
    found = clustering(vae, rows, "kind", given=["a"])
    commonest = np.unique(rows.labels["kind"], return_counts=True)[1].max() / 100
    assert (found.nmi.item(), found.ari.item()) == (0.0, 0.0)
    assert found.accuracy.item() == commonest


def test_scores_are_those_of_scikit_learn_and_of_all_assignments() -> None:
    from itertools import permutations

    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    random = np.random.default_rng(0)
    for size in (3, 4):
        clusters, classes = random.integers(0, size, (2, 50))
        table = np.zeros((size, size))
        np.add.at(table, (clusters, classes), 1)
        nmi, ari, accuracy = _scores(table)
        assert nmi == pytest.approx(normalized_mutual_info_score(classes, clusters))
        assert ari == pytest.approx(adjusted_rand_score(classes, clusters))
        best = max(sum(table[i, p[i]] for i in range(size)) for p in permutations(range(size)))
        assert accuracy == best / 50
    assert (_nmi(np.array([[5.0]])), _ari(np.array([[5.0]]))) == (1.0, 1.0)


def test_bootstrap_error_of_the_accuracy_is_binomial() -> None:
    from mmzoo.evaluation.probes import _agreement

    random = np.random.default_rng(1)
    classes = random.integers(0, 2, 400)
    clusters = np.where(random.random(400) < 0.8, classes, 1 - classes)
    _, _, accuracy, _, _, error = _agreement(clusters, classes, 500, 0)
    exact = np.sqrt(accuracy * (1 - accuracy) / 400)
    assert abs(error / exact - 1) < ERRORS / np.sqrt(2 * 499)


def test_rows_count_where_they_have_the_subset_and_a_label() -> None:
    rows = blobs(60, 1)
    x, _ = rows.tensors()
    kept = torch.arange(60) % 3 != 0
    x["a"][~kept] = torch.nan
    labels = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    labels[:10] = np.nan
    holes = MultimodalDataset(x, {"a": kept}, labels={"y": labels})
    both = kept.numpy() & ~np.isnan(labels)
    found = clustering(echo(), holes, num_draws=2, num_starts=2)
    assert found.num_rows.values.tolist() == [both.sum(), 50, both.sum()]
    dense = holes.subset(both).complete()
    again = clustering(echo(), dense, given=["a"], num_draws=2, num_starts=2)
    assert again.nmi.item() == found.nmi.sel(subset="a").item()
    probe = linear_probe(echo(), holes, holes, kind="classes", given=["a"], num_draws=2)
    assert (probe.num_train.item(), probe.num_test.item()) == (both.sum(), both.sum())


def test_repeatable_for_draws_and_private_codes_can_be_asked_for() -> None:
    vae = DMVAE([Modality("a", (2,)), Modality("b", (2,))], 2, private_dim=1)
    train, test = blobs(80, 1, noise=4.0), blobs(200, 2, noise=4.0)
    state = torch.get_rng_state()
    options = {"given": ["a"], "latent": "draw", "sites": ["z", "w_a"]}
    first, again, other = (
        linear_probe(vae, train, test, "kind", seed=seed, **options) for seed in (0, 0, 1)
    )
    xr.testing.assert_identical(first, again)
    assert first.accuracy.item() != other.accuracy.item()
    assert first.attrs["sites"] == "z, w_a"
    assert torch.equal(torch.get_rng_state(), state)
    assert linear_probe(vae, train, test, "kind", given=["a"]).attrs["sites"] == "z"


def test_too_few_rows_are_said() -> None:
    rows = blobs(20, 1).with_observed({"a": torch.arange(20) < 1})
    found = linear_probe(echo(), rows, rows, "kind", given=["a", "b"])
    assert "1 rows to train on" in found.note.sel(subset="a").item()
    assert np.isnan(found.accuracy.sel(subset="a").item())
    assert not np.isnan(found.accuracy.sel(subset="b").item())
    found = clustering(echo(), rows, "kind", given=["a"])
    assert "fewer than 3 clusters" in found.note.item()


def test_bad_input() -> None:
    rows = blobs(20, 1)
    with pytest.raises(ValueError, match="latent: expected 'mean' or 'draw', found 'mode'"):
        linear_probe(echo(), rows, rows, "kind", latent="mode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind: expected 'classes' or 'numbers'"):
        linear_probe(echo(), rows, rows, "kind", kind="class")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="penalty: expected a positive number, found 0"):
        linear_probe(echo(), rows, rows, "kind", penalty=0)
    with pytest.raises(ValueError, match=r"found \['kind', 'number'\]"):
        linear_probe(echo(), rows, rows)
    with pytest.raises(ValueError, match="sites: expected some of z, found"):
        linear_probe(echo(), rows, rows, "kind", sites=["q"])
    same = np.zeros(20, dtype=int)
    with pytest.raises(ValueError, match="at least two classes to train on"):
        linear_probe(echo(), rows, rows, (same, same))
    with pytest.raises(ValueError, match="expected numbers that differ"):
        linear_probe(echo(), rows, rows, (same, same), kind="numbers")
    with pytest.raises(ValueError, match="method: expected 'kmeans' or 'gmm', found 'ward'"):
        clustering(echo(), rows, "kind", method="ward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels: expected at least two classes"):
        clustering(echo(), rows, same)
    with pytest.raises(ValueError, match="num_clusters of at least 1, found 0"):
        clustering(echo(), rows, "kind", num_clusters=0)
