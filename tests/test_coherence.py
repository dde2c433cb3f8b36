"""Coherence where it can be enumerated: a class that is seen through noisy letters."""

import itertools
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from mmzoo import Modality
from mmzoo.data import MultimodalDataset
from mmzoo.evaluation.classifiers import Classifier, class_probabilities, train_classifier
from mmzoo.evaluation.coherence import coherence, joint_coherence
from mmzoo.evaluation.pair import PyroPair
from mmzoo.evaluation.runs import class_accuracy
from mmzoo.exact import DiscreteWorld
from mmzoo.likelihoods import Categorical
from mmzoo.models import MODELS, MVAE

ERRORS = 5.0
CLASSES = 3
NAMES = ("a", "b", "c")
SUBSETS = [s for size in (1, 2, 3) for s in itertools.combinations(NAMES, size)]


def letters(pair_share: float = 0.8) -> DiscreteWorld:
    """Three letters for each of three classes: as noisy as `pair_share` says, in a, b and c."""
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    tables = {}
    for name, share in zip(NAMES, (pair_share, 0.7, 0.95), strict=True):
        table = torch.full((CLASSES, CLASSES), (1 - share) / (CLASSES - 1), dtype=torch.float64)
        tables[name] = table.fill_diagonal_(share)
    return DiscreteWorld(prior, categorical=tables)


class Programs:
    """The world as a Pyro program whose latent is the one-hot class; its posterior as guide."""

    def __init__(self, world: DiscreteWorld, *, blind: bool = False) -> None:
        self.world, self.blind = world, blind

    def model(self, x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["a"]), dim=-1):
            z = pyro.sample("z", dist.OneHotCategorical(self.world.prior))
            for name, table in self.world.tables.items():
                pyro.sample(name, dist.OneHotCategorical(z @ table), obs=x[name])

    def guide(self, x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["a"]), dim=-1):
            probs = self.world.posterior(x, observed).probs
            probs = self.world.prior.expand_as(probs) if self.blind else probs
            pyro.sample("z", dist.OneHotCategorical(probs))


def own_pair(world: DiscreteWorld, *, blind: bool = False, **options: Any) -> PyroPair:
    programs = Programs(world, blind=blind)
    parts = [Modality(name, (CLASSES,), "one_hot_categorical") for name in NAMES]
    return PyroPair(programs.model, programs.guide, parts, **options)


def drawn_rows(world: DiscreteWorld, count: int, seed: int) -> tuple[dict[str, Tensor], np.ndarray]:
    """Rows and the classes that they come from."""
    rng = torch.Generator().manual_seed(seed)
    c = torch.multinomial(world.prior, count, replacement=True, generator=rng)
    x = {}
    for name, table in world.tables.items():
        index = torch.multinomial(table[c], 1, generator=rng).squeeze(-1)
        x[name] = F.one_hot(index, CLASSES).double()
    return x, c.numpy()


def expected(
    world: DiscreteWorld, x: dict[str, Tensor], c: np.ndarray, subset: tuple[str, ...], target: str
) -> np.ndarray:
    """Probability that a letter drawn from p(x_target | z), z ~ p(z | x_S), is the row's class."""
    posterior = world.posterior({name: x[name] for name in subset}).probs  # (N, C)
    return (posterior @ world.tables[target])[torch.arange(len(c)), torch.as_tensor(c)].numpy()


@pytest.fixture
def world() -> DiscreteWorld:
    return letters()


def test_every_cell_is_the_enumerated_one(world: DiscreteWorld) -> None:
    x, c = drawn_rows(world, 400, 1)
    found = coherence(own_pair(world), x, {}, labels=c, num_draws=20, mean=False)
    assert found.sizes["subset"] == 7
    for subset, target in itertools.product(SUBSETS, NAMES):
        exact = expected(world, x, c, subset, target)
        cell = found.sel(subset="+".join(subset), target=target)
        # Given the rows, the error is that of the draws alone.
        monte_carlo = np.sqrt((exact * (1 - exact)).sum() / 20) / len(c)
        assert abs(float(cell.coherence) - exact.mean()) < ERRORS * monte_carlo
        assert bool(cell.cross) == (target not in subset)
        assert int(cell.num_rows) == 400


def test_pair_that_ignores_its_input_is_at_chance(world: DiscreteWorld) -> None:
    x, c = drawn_rows(world, 2000, 2)
    found = coherence(own_pair(world, blind=True), x, {}, labels=c, mean=False)
    exact = coherence(own_pair(world), x, {}, labels=c, mean=False)
    for target in NAMES:
        chance = float((world.prior @ world.tables[target] * world.prior).sum())
        cells = found.sel(target=target)
        gap = abs(cells.coherence.values - chance)
        assert (gap < ERRORS * cells.standard_error.values).all()
        full = exact.sel(target=target, subset="a+b+c")
        assert float(full.coherence) > chance + 0.2


def test_standard_errors_are_those_of_repetition(world: DiscreteWorld) -> None:
    """The average of cells shares rows; adding the errors in squares would be too small."""
    runs = []
    for seed in range(40):
        x, c = drawn_rows(world, 60, 100 + seed)
        given = ["a", "b", "c"]
        found = coherence(
            own_pair(world), x, {}, labels=c, given=given, pool=True, num_draws=30, seed=seed
        )
        runs.append((found.average.item(), found.average_standard_error.item()))
    averages, errors = np.array(runs).T
    spread = averages.std(ddof=1)
    # The spread of 40 runs is known to 1 / sqrt(78) of itself.
    assert abs(np.sqrt(np.mean(errors**2)) / spread - 1) < ERRORS / np.sqrt(78)


def test_pooled_draws_vote(world: DiscreteWorld) -> None:
    """With many draws the likeliest letter given the subset is chosen, where it is clearly so."""
    x, c = drawn_rows(world, 300, 3)
    probs = world.posterior({"a": x["a"], "b": x["b"]}).probs @ world.tables["c"]
    top = probs.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 0.2  # five errors of 800 draws
    assert 100 < int(clear.sum())
    x = {name: value[clear] for name, value in x.items()}
    c, best = c[clear.numpy()], probs.argmax(-1)[clear].numpy()
    options = {"labels": c, "given": [["a", "b"]], "num_draws": 800}
    found = coherence(own_pair(world), x, {}, pool=True, **options)
    assert found.coherence.sel(target="c").item() == pytest.approx((best == c).mean(), abs=1e-12)
    single = coherence(own_pair(world), x, {}, pool=False, **options)
    assert single.coherence.sel(target="c").item() < found.coherence.sel(target="c").item() - 0.05


def test_masks_are_respected_and_filler_is_never_seen(world: DiscreteWorld) -> None:
    x, c = drawn_rows(world, 60, 4)
    observed = {"a": torch.arange(60) % 3 != 0, "b": torch.arange(60) % 4 != 0}
    holes = {name: value.clone() for name, value in x.items()}
    for name, mask in observed.items():
        holes[name][~mask] = torch.nan
    labels = c.astype(float)
    labels[7] = np.nan
    found = coherence(own_pair(world), holes, {}, labels=labels, observed=observed)
    both = (observed["a"] & observed["b"]).numpy() & (np.arange(60) != 7)
    assert found.num_rows.sel(subset="a+b").values.tolist() == [both.sum()] * 3
    assert int(found.num_rows.sel(subset="c", target="a")) == 59
    kept = torch.as_tensor(both)
    dense = coherence(
        own_pair(world), {n: v[kept] for n, v in x.items()}, {}, labels=c[both], given=[["a", "b"]]
    )
    cells = ["coherence", "standard_error", "num_rows"]
    xr.testing.assert_identical(
        found[cells].sel(subset=["a+b"]).drop_attrs(),
        dense[cells].drop_attrs(),
    )
    judged = found.classifier_accuracy.sel(target="a")
    seen = observed["a"].numpy() & (np.arange(60) != 7)
    assert float(judged) == pytest.approx((x["a"].argmax(-1).numpy() == c)[seen].mean(), abs=1e-12)


def test_repeatable_and_nothing_is_left_behind(world: DiscreteWorld) -> None:
    x, c = drawn_rows(world, 50, 5)
    pair = own_pair(world)
    net = Classifier("a", nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), np.arange(3)).train()
    pair.train()
    state = torch.get_rng_state()
    first, again, other = (
        coherence(pair, x, {"a": net}, labels=c, mean=False, seed=seed) for seed in (1, 1, 2)
    )
    xr.testing.assert_identical(first, again)
    assert not first.coherence.equals(other.coherence)
    assert torch.equal(torch.get_rng_state(), state)
    assert pair.training and net.training and net.network[1].training
    assert not dict(pyro.get_param_store())
    alone = coherence(pair, x, {"a": net}, labels=c, mean=False, given=["b"], seed=1)
    np.testing.assert_array_equal(
        alone.coherence.sel(subset="b"), first.coherence.sel(subset="b")
    )  # whatever else was asked for


def test_classifiers_of_all_kinds_agree(world: DiscreteWorld) -> None:
    x, c = drawn_rows(world, 40, 6)
    kinds = {
        "read": {},
        "classes": {name: lambda value: value.argmax(-1) for name in NAMES},
        "logits": {name: lambda value: 3 * value for name in NAMES},
    }
    found = [coherence(own_pair(world), x, each, labels=c) for each in kinds.values()]
    xr.testing.assert_identical(found[0], found[1])
    xr.testing.assert_identical(found[0], found[2])


def test_progress_counts_every_batch(world: DiscreteWorld) -> None:
    x, c = drawn_rows(world, 25, 6)
    told: list[tuple[int, int]] = []
    coherence(
        own_pair(world),
        x,
        {},
        labels=c,
        given=["a", ["a", "b"]],
        batch_size=10,
        on_progress=lambda *count: told.append(count),
    )
    assert told == [(i, 6) for i in range(1, 7)]


def test_subsets_that_a_guide_cannot_answer_are_empty_with_a_reason(world: DiscreteWorld) -> None:
    x, c = drawn_rows(world, 20, 7)
    pair = own_pair(world, subsets=[["a"], ["a", "b"]])
    found = coherence(pair, x, {}, labels=c)
    assert found.note.sel(subset="a").item() == ""
    assert "does not answer for b alone" in found.note.sel(subset="b").item()
    assert np.isnan(found.coherence.sel(subset="b")).all()
    assert not np.isnan(found.coherence.sel(subset="a+b")).any()


def test_joint_coherence_is_the_enumerated_one(world: DiscreteWorld) -> None:
    found = joint_coherence(own_pair(world), {}, num_samples=4000, mean=False)
    tables = torch.stack(list(world.tables.values()))  # (M, C, letters)
    exact = float(world.prior @ tables.prod(0).sum(-1))
    assert abs(float(found.joint_coherence) - exact) < ERRORS * float(found.standard_error)
    assert float(found.standard_error) == pytest.approx(
        np.sqrt(exact * (1 - exact) / 4000), rel=0.1
    )
    pair = float(world.prior @ (tables[0] * tables[1]).sum(-1))
    agreement = float(found.agreement.sel(modality="a", other="b"))
    assert abs(agreement - pair) < ERRORS * np.sqrt(pair * (1 - pair) / 4000)
    assert (np.diag(found.agreement) == 1).all()


def test_means_of_joint_samples_always_agree(world: DiscreteWorld) -> None:
    """The likeliest letter of each class is its own, whatever the noise."""
    found = joint_coherence(own_pair(world), {}, num_samples=100)
    assert float(found.joint_coherence) == 1.0


def label_pair() -> tuple[MVAE, MultimodalDataset]:
    parts = [Modality("x", (5,)), Modality("label", (4,), "one_hot_categorical")]
    rng = torch.Generator().manual_seed(0)
    classes = torch.randint(4, (50,), generator=rng)
    x = torch.randn(50, 5, generator=rng) + classes[:, None]
    data = {"x": x, "label": F.one_hot(classes, 4).double()}
    observed = {"label": torch.arange(50) % 5 != 0}
    rows = MultimodalDataset(data, observed, labels={"y": classes}, modalities=parts)
    return MVAE(parts, 2), rows


def test_pooled_label_accuracy_is_the_class_accuracy_of_runs() -> None:
    """Two estimates of one number; many draws make nearly every row's choice the same."""
    vae, rows = label_pair()
    table = class_accuracy(vae, rows, num_draws=1000)
    found = coherence(vae, rows, {}, labels="label", given=["x"], num_draws=1000, pool=True)
    assert found.coherence.item() == pytest.approx(table["label | x"], abs=1 / 40)
    assert found.num_rows.item() == 40


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("vae", "linear")])
def test_every_model_of_the_zoo(name: str) -> None:
    """Whatever a model lacks is said, and each cell counts the rows that it should."""
    parts = [Modality("x", (5,)), Modality("label", (4,), "one_hot_categorical")]
    options = {"condition": "label"} if name == "cvae" else {}
    vae = MODELS[name](parts, 2, **options)
    _, rows = label_pair()
    rows = rows.complete() if name == "cvae" else rows  # it takes no row without its condition
    alone = 40 if name == "cvae" else 50
    found = coherence(vae, rows, {"x": lambda value: (value[:, 0] > 0).long()}, labels="y")
    counts = [40 if "label" in subset else alone for subset in found.subset.values]
    wanted = np.where(found.note == "", counts, 0)
    np.testing.assert_array_equal(found.num_rows.sel(target="x"), wanted)
    assert (found.coherence.notnull() == (found.num_rows > 0)).all()
    assert (name == "jointvae") == bool((found.note != "").any())


# Classifiers --------------------------------------------------------------------------------------


def blobs(count: int = 300, noise: float = 0.3) -> MultimodalDataset:
    rng = torch.Generator().manual_seed(1)
    classes = torch.randint(3, (count,), generator=rng)
    centres = torch.tensor([[0.0, 3.0], [3.0, 0.0], [-3.0, -3.0]])
    x = {"v": centres[classes] + noise * torch.randn(count, 2, generator=rng)}
    image = torch.rand(count, 1, 8, 8, generator=rng) * 0.2
    image[torch.arange(count), 0, classes] = 1.0  # a bright line for each class
    x["image"] = image
    kinds = np.array(["left", "middle", "right"])[classes.numpy()]
    modalities = [Modality("v", (2,)), Modality("image", (1, 8, 8))]
    return MultimodalDataset(x, labels={"kind": kinds}, modalities=modalities)


@pytest.mark.parametrize("modality", ["v", "image"])
def test_separable_classes_are_learned(modality: str) -> None:
    state = torch.get_rng_state()
    with torch.no_grad():  # the caller's, not the training's
        found = train_classifier(blobs(), modality, "kind", epochs=4, batch_size=16)
    assert (found.accuracy, found.standard_error, found.num_rows) == (1.0, 0.0, 60)
    assert found.classes.tolist() == ["left", "middle", "right"]
    assert not found.training and torch.equal(torch.get_rng_state(), state)
    assert not any(each.requires_grad for each in found.parameters())
    again = train_classifier(blobs(), modality, epochs=4, batch_size=16)
    for one, other in zip(found.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_labels_of_noise_are_held_out_at_chance() -> None:
    """A memorised training set would report an accuracy near one."""
    random = np.random.default_rng(0).integers(0, 2, 300)
    found = train_classifier(blobs(), "v", random, epochs=20, held_out=0.5)
    assert abs(found.accuracy - 0.5) < ERRORS * found.standard_error < 0.25
    error = np.sqrt(found.accuracy * (1 - found.accuracy) / 149)
    assert found.standard_error == pytest.approx(error)


def test_rows_without_modality_or_label_are_left_out() -> None:
    rows = blobs().with_observed({"v": torch.arange(300) >= 100})
    labels = np.random.default_rng(0).integers(0, 2, 300).astype(float)
    labels[200:] = np.nan
    assert train_classifier(rows, "v", labels, epochs=1).num_rows == 20


def test_test_rows_are_judged() -> None:
    train, test = blobs().split([200, 100], seed=0)
    found = train_classifier(train, "v", test=test, epochs=6, batch_size=16)
    assert (found.accuracy, found.num_rows) == (1.0, 100)


def test_label_modalities_are_read() -> None:
    _, rows = label_pair()
    found = train_classifier(rows, "label", "y")
    assert (found.accuracy, found.num_rows) == (1.0, 40)
    assert "accuracy=1.000" in repr(found)
    parts = [Modality("digit", (), Categorical(3))]
    data = MultimodalDataset({"digit": torch.tensor([0, 2, 1])}, modalities=parts)
    reader = train_classifier(data, "digit")
    assert reader(torch.tensor([2, 0])).argmax(-1).tolist() == [2, 0]


def test_strings_are_compared_with_the_classes_of_a_classifier() -> None:
    rows = blobs(200, noise=2.0)
    judge = train_classifier(rows, "v", epochs=2)
    vae = MVAE([Modality("v", (2,)), Modality("image", (1, 8, 8))], 2)
    found = coherence(vae, rows, {"v": judge}, given=["image"])
    values = rows.tensors()[0]["v"]
    exact = (judge.classes[judge(values).argmax(-1).numpy()] == rows.labels["kind"]).mean()
    assert found.classifier_accuracy.item() == pytest.approx(exact)
    assert 0 < exact < 1


# Bad input ----------------------------------------------------------------------------------------


def test_bad_input_of_coherence(world: DiscreteWorld) -> None:
    x, c = drawn_rows(world, 10, 1)
    pair = own_pair(world)
    with pytest.raises(ValueError, match="num_draws of at least 1, found 0"):
        coherence(pair, x, {}, labels=c, num_draws=0)
    with pytest.raises(ValueError, match="unknown modality 'q'"):
        coherence(pair, x, {"q": lambda value: value}, labels=c)
    with pytest.raises(ValueError, match="coherence given: unknown modality 'q'"):
        coherence(pair, x, {}, labels=c, given=["q"])
    with pytest.raises(ValueError, match="found an empty subset"):
        coherence(pair, x, {}, labels=c, given=[[]])
    with pytest.raises(ValueError, match="at least one subset"):
        coherence(pair, x, {}, labels=c, given=[])
    with pytest.raises(TypeError, match="expected a dict from modality name to classifier"):
        coherence(pair, x, [], labels=c)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected one kind of label, found \['a', 'b', 'c'\]"):
        coherence(pair, x, {})
    with pytest.raises(ValueError, match="unknown label 'digit'; there are a, b, c"):
        coherence(pair, x, {}, labels="digit")
    with pytest.raises(ValueError, match=r"shape \(10,\), found \(9,\)"):
        coherence(pair, x, {}, labels=c[:9])
    with pytest.raises(ValueError, match="found NaN in all"):
        coherence(pair, x, {}, labels=np.full(10, np.nan))
    with pytest.raises(ValueError, match="such as the label .*left"):
        coherence(pair, x, {}, labels=np.array(["left"] * 10))
    data = MultimodalDataset(x, labels={"c": c})
    with pytest.raises(ValueError, match="found observed=… as well"):
        coherence(pair, data, {}, observed={})


def test_bad_classifiers_and_pairs(world: DiscreteWorld) -> None:
    x, c = drawn_rows(world, 10, 1)
    with pytest.raises(ValueError, match=r"gives logits \(10, C\) or classes"):
        coherence(own_pair(world), x, {"a": lambda value: value[:3]}, labels=c)
    with pytest.raises(ValueError, match="counted from 0"):
        class_probabilities(lambda value: torch.full((2,), -1), torch.zeros(2, 1), "here")
    plain = MVAE([Modality("x", (2,)), Modality("y", (2,))], 2)
    with pytest.raises(ValueError, match="train one with train_classifier"):
        coherence(plain, {"x": torch.zeros(4, 2)}, {}, labels=np.arange(4))
    with pytest.raises(ValueError, match="expected at least two, found x"):
        joint_coherence(plain, {"x": lambda value: value})
    parts = [Modality("x", (5,)), Modality("label", (4,), "one_hot_categorical")]
    cvae = MODELS["cvae"](parts, 2, condition="label")
    with pytest.raises(ValueError, match="conditional on label"):
        joint_coherence(cvae, {"x": lambda value: value})
    rows = label_pair()[1].complete()
    with pytest.raises(ValueError, match="expected label in every subset"):
        coherence(cvae, rows, {"x": lambda value: value}, labels="y", given=["x"])
    with pytest.raises(ValueError, match="a modality that .* generates, found"):
        coherence(cvae, rows, {}, labels="y")


def test_bad_input_of_classifiers() -> None:
    rows = blobs(30)
    with pytest.raises(ValueError, match="unknown modality 'q'"):
        train_classifier(rows, "q")
    with pytest.raises(ValueError, match="unknown label 'q'; there are kind"):
        train_classifier(rows, "v", "q")
    with pytest.raises(ValueError, match="0 < held_out < 1, found 1"):
        train_classifier(rows, "v", held_out=1.0)
    with pytest.raises(ValueError, match="epochs of at least 1, found 0"):
        train_classifier(rows, "v", epochs=0)
    with pytest.raises(ValueError, match="at least two classes, found"):
        train_classifier(rows, "v", np.zeros(30, dtype=int))
    with pytest.raises(ValueError, match="expected rows that have it and a label, found 0"):
        train_classifier(rows.with_observed({"v": torch.zeros(30, dtype=torch.bool)}), "v")
    with pytest.raises(ValueError, match="found an array; put it into the labels"):
        train_classifier(rows, "v", np.arange(30) % 2, test=rows, epochs=1)
    with pytest.raises(ValueError, match="expected one kind of label in the data set, found none"):
        train_classifier(MultimodalDataset({"v": torch.zeros(4, 2)}), "v")
