"""Data sets: rows, masks and labels stay together; readers give the known numbers."""

import functools
import gzip
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from mmzoo.data import (
    DATASETS,
    MultimodalDataset,
    digits,
    fashion_mnist,
    from_numpy,
    from_pandas,
    from_xarray,
    label_dependent,
    load,
    missing_completely_at_random,
    mnist,
    nan_rows_to_masks,
    paired_fraction,
)
from mmzoo.likelihoods import Categorical
from mmzoo.modality import Modality

N = 23
# Sums of all pixels of the published training and test files.
PARTS = {"MNIST": (1567298545, 264923200), "FashionMNIST": (3431114169, 573469082)}
READERS = {"MNIST": mnist, "FashionMNIST": fashion_mnist}
MNIST_COUNTS = (
    [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
)


def numbered(**options) -> MultimodalDataset:
    """Rows whose values, mask and label all tell the row number."""
    number = np.arange(N)
    x = {"a": np.stack([number, number + 0.5], -1), "b": number[:, None].astype(np.float32)}
    return MultimodalDataset(x, {"b": number % 3 > 0}, {"row": number}, **options)


def assert_consistent(data: MultimodalDataset) -> None:
    x, observed = data.tensors()
    row = torch.as_tensor(data.labels["row"], dtype=torch.float64)
    assert torch.equal(x["a"], torch.stack([row, row + 0.5], -1))
    assert torch.equal(x["b"], row[:, None])
    assert torch.equal(observed["b"], row % 3 > 0)
    assert torch.equal(data.rows.double(), row)


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [5, 5, 5, 5, 3]), (True, [5] * 4)])
def test_batches_visit_each_row_once(shuffle, drop_last, sizes):
    batches = list(
        numbered().batches(5, shuffle=shuffle, seed=3 if shuffle else None, drop_last=drop_last)
    )
    assert [len(x["a"]) for x, _ in batches] == sizes
    rows = torch.cat([x["b"][:, 0] for x, _ in batches]).tolist()
    assert len(set(rows)) == sum(sizes)
    assert (rows == sorted(rows)) is not shuffle
    for x, observed in batches:
        assert torch.equal(observed["b"], x["b"][:, 0] % 3 > 0)
        assert torch.equal(x["a"][:, 1], x["b"][:, 0] + 0.5)


def order(data, **options) -> list[float]:
    batches = data.batches(4, shuffle=True, **options)
    return torch.cat([x["b"][:, 0] for x, _ in batches]).tolist()


def test_order_is_a_function_of_the_seed():
    data = numbered()
    assert order(data, seed=1) == order(data, seed=1) != order(data, seed=2)
    generator = torch.Generator().manual_seed(1)
    first = order(data, generator=generator)
    assert first == order(data, seed=1) != order(data, generator=generator)
    torch.manual_seed(1)
    assert first == order(data)


def test_subset_keeps_rows_masks_and_labels_together():
    data = numbered()
    part = data.subset([4, 20, -1, 4])
    assert part.rows.tolist() == [4, 20, 22, 4]
    assert_consistent(part)
    assert_consistent(part.subset(slice(1, 3)))
    assert part.subset(np.array([True, False, True, False])).rows.tolist() == [4, 22]
    assert data.subset(range(2, 8, 3)).rows.tolist() == [2, 5]
    assert data.subset(torch.tensor([7])).rows.tolist() == [7]
    assert_consistent(next(iter(part.split([0.5, 0.5], seed=0))))


@pytest.mark.parametrize(
    ("parts", "sizes"), [([13, 7, 3], [13, 7, 3]), ([0.5, 0.3, 0.2], [12, 6, 5]), ([1.0], [23])]
)
def test_split_is_a_partition(parts, sizes):
    data = numbered().split(parts, seed=5)
    assert [len(part) for part in data] == sizes
    assert torch.cat([part.rows for part in data]).sort().values.tolist() == list(range(N))
    for part, again in zip(data, numbered().split(parts, seed=5), strict=True):
        assert_consistent(part)
        assert torch.equal(part.rows, again.rows)


def test_split_depends_on_the_seed():
    first, second = (numbered().split([0.5, 0.5], seed=seed)[0].rows for seed in (0, 1))
    assert not torch.equal(first, second)


def test_batch_reads_single_rows():
    x, observed = numbered().batch(5)
    assert x["a"].tolist() == [[5.0, 5.5]]
    assert observed["b"].tolist() == [True]


def test_complete_keeps_rows_with_everything():
    complete = numbered().complete()
    assert complete.rows.tolist() == [row for row in range(N) if row % 3]
    x, observed = complete.tensors()
    assert observed == {}
    assert torch.equal(x["b"][:, 0], complete.rows.double())


def test_with_observed_never_brings_values_back():
    keep = np.arange(N) % 2 == 0
    data = numbered().with_observed({"b": keep, "a": ~keep})
    assert data.observed["b"].tolist() == [n % 3 > 0 and n % 2 == 0 for n in range(N)]
    assert data.observed["a"].tolist() == [n % 2 == 1 for n in range(N)]
    assert "a" not in numbered().observed


def test_a_modality_may_be_absent():
    modalities = [Modality(name, (size,)) for name, size in (("a", 2), ("b", 1), ("c", 4))]
    data = numbered(modalities=modalities)
    assert data.names == ("a", "b")
    assert sorted(data.batch([0])[0]) == ["a", "b"]
    with pytest.raises(ValueError, match=r"complete: expected rows with all of .*'c'\] have no"):
        data.complete()


def test_to_device_moves_what_batches_give():
    meta = numbered().subset(range(6)).to("meta")
    x, observed = meta.batch([0, 3])
    assert {value.device.type for value in (*x.values(), *observed.values())} == {"meta"}
    assert_consistent(numbered().subset([3, 1]).to("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_to_cuda_keeps_values(tmp_path):
    mapped = np.memmap(tmp_path / "m.dat", dtype=np.float32, mode="w+", shape=(N, 2))
    mapped[:] = np.arange(2 * N).reshape(N, 2)
    for x in (mapped, np.array(mapped)):
        data = MultimodalDataset({"m": x}, {"m": np.arange(N) > 3}).to("cuda").subset([5, 2, 9])
        for seed in (0, 1):
            (value, observed), *_ = data.batches(3, shuffle=True, seed=seed)
            assert value["m"].is_cuda
            row = value["m"][:, 0].cpu() / 2
            assert sorted(row.tolist()) == [2.0, 5.0, 9.0]
            assert torch.equal(observed["m"].cpu(), row > 3)


# --- stored types -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "batch"),
    [
        ("bool", torch.float32),
        ("uint8", torch.float32),
        ("float16", torch.float32),
        ("float64", torch.float32),
        (">f4", torch.float32),
        ("longdouble", torch.float32),
        ("int32", torch.int64),
        ("uint16", torch.int64),
        (">i2", torch.int64),
    ],
)
def test_batches_have_the_default_dtype(stored, batch):
    torch.set_default_dtype(torch.float32)
    values = (np.arange(6) % 2).astype(stored).reshape(3, 2)
    x, _ = MultimodalDataset({"a": values}).tensors()
    assert x["a"].dtype == batch
    assert x["a"].tolist() == [[0, 1]] * 3


def test_classes_stay_integers_whatever_stores_them():
    modalities = [Modality("y", (), Categorical(num_classes=3))]
    data = MultimodalDataset({"y": np.array([2, 0, 1], dtype=np.uint8)}, modalities=modalities)
    assert data.tensors()[0]["y"].dtype == torch.int64


def test_memory_is_shared_and_read_only_memory_is_copied():
    values = np.zeros((4, 2))
    data = MultimodalDataset({"a": values, "b": np.broadcast_to(np.float64(1.0), (4, 2))})
    values[2] = 7.0
    assert data.tensors()[0]["a"][2].tolist() == [7.0, 7.0]
    assert data.tensors()[0]["b"].tolist() == [[1.0, 1.0]] * 4


def test_memory_mapped_values_stay_on_disk(tmp_path):
    values = np.arange(12 * N).reshape(N, 3, 4).astype(np.uint8)
    np.save(tmp_path / "image.npy", values)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    data = MultimodalDataset({"image": mapped, "label": np.eye(N)}, {"image": np.arange(N) > 4})
    part = data.subset(slice(1, None)).split([0.5, 0.5], seed=0)[1].to("cpu").resample(1, seed=0)
    assert data.memory_mapped == part.memory_mapped == ("image",)
    assert part._columns["image"].values is mapped
    rows = []
    for x, observed in part.batches(4, shuffle=True, seed=1):
        row = x["label"].argmax(-1)
        rows += row.tolist()
        assert x["image"].dtype == torch.float64
        assert torch.equal(x["image"], torch.from_numpy(values[row.numpy()]).double())
        assert torch.equal(observed["image"], row > 4)
    assert sorted(rows) == sorted(part.rows.tolist())
    whole, _ = data.tensors()
    assert torch.equal(whole["image"], torch.from_numpy(values).double())


def test_transform_acts_on_batches():
    data = numbered(transform=lambda x: {**x, "a": -x["a"]})
    assert torch.equal(data.batch([3, 4])[0]["a"], -numbered().batch([3, 4])[0]["a"])


def test_repr_says_rows_and_shapes():
    assert repr(numbered()) == "MultimodalDataset(23 rows: a (2,), b (1,))"


# --- bad input ----------------------------------------------------------------------------------

A = np.zeros((4, 2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MultimodalDataset(A), TypeError, r"x: expected a dict .* found ndarray; write"),
        (lambda: MultimodalDataset({}), ValueError, "x: expected at least one modality"),
        (lambda: MultimodalDataset({"a": [1.0]}), TypeError, r"x\['a'\]: .* found list; convert"),
        (
            lambda: MultimodalDataset({"a": np.array(["u", None])}),
            TypeError,
            r"x\['a'\]: expected numbers or booleans, found dtype object",
        ),
        (
            lambda: MultimodalDataset({"a": torch.zeros(2, dtype=torch.complex64)}),
            TypeError,
            r"x\['a'\]: expected numbers or booleans, found dtype torch.complex64",
        ),
        (
            lambda: MultimodalDataset({"a": np.ma.masked_array(A)}),
            TypeError,
            r"x\['a'\]: expected a plain array, found a masked one",
        ),
        (lambda: MultimodalDataset({"a": np.array(1.0)}), ValueError, r"x\['a'\]: .* a scalar"),
        (lambda: MultimodalDataset({"a": A[:0]}), ValueError, "x: expected at least one row"),
        (
            lambda: MultimodalDataset({"a": A, "b": A[:3]}),
            ValueError,
            r"x: expected as many rows in every modality, found \{'a': 4, 'b': 3\}",
        ),
        (
            lambda: MultimodalDataset({"a": A}, {"b": A[:, 0] > 0}),
            ValueError,
            r"observed: expected masks for the modalities \['a'\], found \['b'\]",
        ),
        (
            lambda: MultimodalDataset({"a": A}, A > 0),
            TypeError,
            "observed: expected a dict name -> array, found ndarray",
        ),
        (
            lambda: MultimodalDataset({"a": A}, {"a": np.ones(4)}),
            TypeError,
            r"observed\['a'\]: expected a bool array or tensor, found float64",
        ),
        (
            lambda: MultimodalDataset({"a": A}, {"a": [True] * 4}),
            TypeError,
            r"observed\['a'\]: expected a bool array or tensor, found list",
        ),
        (
            lambda: MultimodalDataset({"a": A}, {"a": A > 0}),
            ValueError,
            r"observed\['a'\]: expected shape \(4,\), found \(4, 2\)",
        ),
        (
            lambda: MultimodalDataset({"a": A}, labels={"y": np.arange(3)}),
            ValueError,
            r"labels\['y'\]: expected 4 rows, found shape \(3,\)",
        ),
        (
            lambda: MultimodalDataset({"a": A}, labels={"y": [None, 1, 2, 3]}),
            TypeError,
            r"labels\['y'\]: .* found dtype object",
        ),
        (
            lambda: MultimodalDataset({"a": A}, modalities=[Modality("b", (2,))]),
            ValueError,
            r"x: expected the modalities \['b'\], found \['a'\]",
        ),
        (
            lambda: MultimodalDataset({"a": A}, modalities=[Modality("a", (1, 2))]),
            ValueError,
            r"modality 'a': expected event shape \(1, 2\), found \(2,\); reshape x\['a'\] or set",
        ),
        (lambda: numbered().batches(0), ValueError, "batches: expected a batch_size of at least 1"),
        (
            lambda: numbered().batches(2, shuffle=True, seed=0, generator=torch.Generator()),
            ValueError,
            "batches: expected a seed or a generator, found both",
        ),
        (lambda: numbered().subset([]), ValueError, "subset: expected at least one row"),
        (lambda: numbered().subset([1.5]), TypeError, "rows: expected row numbers, found dtype"),
        (lambda: numbered().subset([3, 23]), ValueError, "rows: .* below 23, found 23"),
        (lambda: numbered().batch([-24]), ValueError, "rows: expected numbers below 23, found -24"),
        (lambda: numbered().subset([True]), ValueError, r"rows: .* each of 23 rows, found shape"),
        (lambda: numbered().split([20, 4], seed=0), ValueError, "split: .* add up to 23 rows"),
        (lambda: numbered().split([0.5, 0.4], seed=0), ValueError, "split: .* add up to 1, found"),
        (lambda: numbered().split([], seed=0), ValueError, "split: .* add up to 1, found"),
        (lambda: numbered().split([23, 0], seed=0), ValueError, "split: .* one row in each part"),
        (
            lambda: numbered().with_observed({"c": np.ones(N, dtype=bool)}),
            ValueError,
            r"observed: expected masks for the modalities \['a', 'b'\], found \['c'\]",
        ),
        (
            lambda: numbered().subset([0, 3]).complete(),
            ValueError,
            "complete: .* found none .each row lacks a modality",
        ),
    ],
)
def test_bad_input_says_what_to_do(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- digits -------------------------------------------------------------------------------------


def rounded(x):
    return (x["image"] * 16).round().long()


def test_digits_are_the_known_data():
    train, test = digits(binarize=None)
    assert (len(train), len(test)) == (1437, 360) == DATASETS["digits"].rows
    assert sorted(torch.cat([train.rows, test.rows]).tolist()) == list(range(1797))
    images = [rounded(part.tensors()[0]) for part in (train, test)]
    assert sum(image.sum().item() for image in images) == 561718
    counts = [np.bincount(part.labels["digit"]) for part in (train, test)]
    assert np.sum(counts, 0).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # Stratified: each class has its share of the test rows up to rounding.
    assert np.abs(counts[1] - 360 / 1797 * np.sum(counts, 0)).max() < 1


def test_digits_keep_image_label_and_row_together():
    from sklearn.datasets import load_digits

    source = load_digits()
    for part in digits(binarize=None, seed=4, test_fraction=0.3):
        x, observed = part.tensors()
        assert observed == {}
        assert torch.equal(rounded(x)[:, 0], torch.as_tensor(source.images[part.rows]).long())
        assert torch.equal(x["label"].argmax(-1), torch.as_tensor(source.target[part.rows]))
        assert torch.equal(x["label"].sum(-1), torch.ones(len(part)))
        assert np.array_equal(part.labels["digit"], source.target[part.rows])


@pytest.mark.parametrize(
    ("binarize", "likelihood"),
    [("fixed", "bernoulli"), ("epoch", "bernoulli"), (None, "continuous_bernoulli")],
)
def test_modalities_say_the_likelihood(binarize, likelihood):
    image, label = digits(binarize=binarize)[0].modalities
    assert (image.name, image.event_shape, image.likelihood.name) == (
        "image",
        (1, 8, 8),
        likelihood,
    )
    assert (label.name, label.event_shape) == ("label", (10,))
    assert label.likelihood.name == "one_hot_categorical"


def assert_bernoulli(draws: list[torch.Tensor], grey: torch.Tensor) -> None:
    """Each draw has mean p; two draws are independent. Bounds: 5 exact standard deviations."""
    for draw in draws:
        assert set(draw.unique().tolist()) <= {0.0, 1.0}
        assert (draw - grey).sum().abs() < 5 * (grey * (1 - grey)).sum().sqrt()
        assert torch.equal(draw[grey == 0], grey[grey == 0])
        assert torch.equal(draw[grey == 1], grey[grey == 1])
        # A weight per pixel sees a dependence on the grey value that the plain mean does not.
        slope = ((draw - grey) * grey).sum().abs()
        assert slope < 5 * (grey**3 * (1 - grey)).sum().sqrt()
    variance = grey * (1 - grey)
    for first, second in zip(draws, draws[1:], strict=False):
        product = ((first - grey) * (second - grey)).sum().abs()
        assert product < 5 * (variance**2).sum().sqrt()


def images(data: MultimodalDataset, *epochs: int, seed: int = 0) -> list[torch.Tensor]:
    return [data.resample(epoch, seed).tensors()[0]["image"] for epoch in epochs]


def test_fixed_binarisation_is_bernoulli_and_fixed():
    grey = digits(binarize=None)
    for part, number in ((0, 0), (1, 1)):
        fixed, again = (digits()[number].tensors()[0]["image"] for _ in range(2))
        assert torch.equal(fixed, again)
        assert_bernoulli([fixed], grey[part].tensors()[0]["image"])
    train = digits()[0]
    assert torch.equal(*images(train, 0, 1))


def test_fixed_binarisation_depends_on_the_seed():
    # The split depends on the seed as well: compare the rows that both have.
    first, second = (digits(seed=seed)[0] for seed in (0, 1))
    kept = [a.subset(torch.isin(a.rows, b.rows)) for a, b in ((first, second), (second, first))]
    assert torch.equal(kept[0].rows, kept[1].rows)
    draws = [data.tensors()[0]["image"] for data in kept]
    grey = digits(binarize=None)[0]
    everything = {
        row.item(): image for row, image in zip(grey.rows, images(grey, 0)[0], strict=True)
    }
    both = torch.tensor([row.item() in everything for row in kept[0].rows])
    assert_bernoulli(
        [draw[both] for draw in draws],
        torch.stack([everything[row.item()] for row in kept[0].rows[both]]),
    )


def test_epoch_binarisation_is_fresh_and_repeats():
    grey = digits(binarize=None)[0].tensors()[0]["image"]
    train, test = digits(binarize="epoch")
    assert_bernoulli(images(train, 0, 1, 2, 3), grey)
    assert torch.equal(*images(train, 2, 2))
    assert_bernoulli([*images(train, 2, seed=0), *images(train, 2, seed=1)], grey)
    assert torch.equal(*images(test, 1, 2))
    assert torch.equal(images(test, 5)[0], digits()[1].tensors()[0]["image"])
    assert torch.equal(*(x.tensors()[0]["image"] for x in (train, digits()[0])))


def test_epoch_binarisation_commutes_with_selection():
    train, _ = digits(binarize="epoch")
    rows = torch.tensor([1300, 3, 1029, 3])
    pick = [train.subset(rows).resample(4, 1), train.resample(4, 1).subset(rows)]
    assert torch.equal(*(x.tensors()[0]["image"] for x in pick))
    assert torch.equal(pick[0].batch([1])[0]["image"], pick[0].batch([3])[0]["image"])
    part = train.split([0.5, 0.5], seed=0)[1].resample(1, 0).resample(2, 0)
    expected = {
        row.item(): image for row, image in zip(train.rows, images(train, 2)[0], strict=True)
    }
    for row, image in zip(part.rows, part.tensors()[0]["image"], strict=True):
        assert torch.equal(image, expected[row.item()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"binarize": "often"}, "binarize: expected 'fixed', 'epoch' or None, found 'often'"),
        ({"test_fraction": 1.0}, "test_fraction: expected a value between 0 and 1, found 1.0"),
    ],
)
def test_digits_reject_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        digits(**options)


# --- MNIST and Fashion-MNIST --------------------------------------------------------------------


@functools.cache
def grey_parts(folder: str, root: Path):
    return READERS[folder](root, binarize=None)


@pytest.mark.parametrize("folder", READERS)
def test_files_have_the_known_content(folder, data_root):
    torch.set_default_dtype(torch.float32)
    parts = grey_parts(folder, data_root)
    counts = MNIST_COUNTS if folder == "MNIST" else ([6000] * 10, [1000] * 10)
    first = [5, 7] if folder == "MNIST" else [9, 9]
    for part, total, count, start, rows in zip(
        parts, PARTS[folder], counts, first, DATASETS["mnist"].rows, strict=True
    ):
        pixels = 0
        for x, _ in part.batches(10_000):
            assert x["image"].shape[1:] == (1, 28, 28)
            assert x["image"].dtype == torch.float32
            assert 0 <= x["image"].min() < x["image"].max() == 1
            pixels += (x["image"] * 255).round().long().sum().item()
        label = part.tensors()[0]["label"]
        assert pixels == total
        assert (len(part), label.argmax(-1)[0].item()) == (rows, start)
        assert label.sum(0).tolist() == count
        assert np.array_equal(label.argmax(-1).numpy(), part.labels["digit"])


def test_mnist_images_match_their_labels(data_root):
    """A shuffled label file would give 10 %; the nearest class mean is right on 82.03 %."""
    train, test = (part.tensors()[0] for part in grey_parts("MNIST", data_root))
    means = torch.einsum("nk,nd->kd", train["label"], train["image"].flatten(1))
    means /= train["label"].sum(0)[:, None]
    nearest = torch.cdist(test["image"].flatten(1), means).argmin(-1)
    assert (nearest == test["label"].argmax(-1)).sum().item() == 8203


@pytest.mark.parametrize("number", [0, 1])
def test_mnist_binarisation_has_the_right_mean(number, data_root):
    grey = grey_parts("MNIST", data_root)[number].batch(slice(0, 3000))[0]["image"]
    fixed = mnist(data_root)[number].batch(slice(0, 3000))[0]["image"]
    part = mnist(data_root, binarize="epoch")[number].subset(slice(0, 3000))
    assert_bernoulli(images(part, 0, 1) if number == 0 else images(part, 1), grey)
    assert torch.equal(images(part, 0)[0], fixed)


def test_parts_and_blocks_of_rows_have_independent_noise(tmp_path):
    write(tmp_path, grey=np.full((1100, 28, 28), 128, dtype=np.uint8))
    train, test = (part.tensors()[0]["image"] for part in mnist(tmp_path))
    assert_bernoulli([train, test], torch.full_like(train, 128 / 255))
    assert_bernoulli([train[:76], train[1024:]], torch.full_like(train[:76], 128 / 255))


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + bytes(values)


def write(root: Path, grey=None, digit=None, suffix="") -> Path:
    """A small data set in torchvision's layout."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    grey = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8) if grey is None else grey
    digit = np.arange(len(grey), dtype=np.uint8) % 10 if digit is None else digit
    for part in ("train", "t10k"):
        for name, values in (("images-idx3", grey), ("labels-idx1", digit)):
            content = idx(values)
            path = raw / f"{part}-{name}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)
    return raw


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_are_read_unpacked_or_as_distributed(suffix, tmp_path, monkeypatch):
    write(tmp_path, suffix=suffix)
    monkeypatch.setenv("MMZOO_DATA", str(tmp_path))
    for part in mnist(binarize=None):
        x, _ = part.tensors()
        expected = torch.arange(3 * 784).reshape(3, 1, 28, 28).remainder(256)
        assert torch.equal((x["image"] * 255).round().long(), expected)
        assert part.labels["digit"].tolist() == [0, 1, 2]


def test_the_root_is_needed(monkeypatch):
    monkeypatch.delenv("MMZOO_DATA", raising=False)
    with pytest.raises(ValueError, match="root: expected a folder .* pass root .--root. or set"):
        mnist()


@pytest.mark.parametrize(
    "name", ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "train-images-idx3-ubyte"]
)
def test_a_missing_file_is_named(name, tmp_path):
    (write(tmp_path) / name).unlink()
    message = rf"MNIST/raw/{name}: expected .* under the root {tmp_path}, .* download=True"
    with pytest.raises(FileNotFoundError, match=message):
        mnist(tmp_path)


def test_download_fetches_only_what_is_missing(tmp_path, monkeypatch):
    import torchvision

    calls = []

    def fetch(root, download):
        calls.append((root, download))
        write(Path(root))

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    for _ in range(2):
        assert [len(part) for part in mnist(tmp_path, download=True)] == [3, 3]
    assert calls == [(str(tmp_path), True)]


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".gz", lambda c: c[:-20], "t10k-images-idx3-ubyte.gz: expected a gzip file, .* damaged"),
        (".gz", lambda c: b"<html>", "t10k-images-idx3-ubyte.gz: expected a gzip file"),
        (".gz", lambda c: c[:40] + b"\xff" * 8 + c[48:], "t10k-images-idx3-ubyte.gz: .* gzip file"),
        ("", lambda c: c[:-1], r"t10k-images-idx3-ubyte: expected 2352 values .* found 2351"),
        ("", lambda c: c + b"\0", r"t10k-images-idx3-ubyte: .* \(3, 28, 28\), found 2353"),
        (
            "",
            lambda c: b"\0\0\x08\x01" + c[4:],
            r"t10k-images-idx3-ubyte: .* 3 dim.* '00 00 08 01'",
        ),
        ("", lambda c: c[:9], "t10k-images-idx3-ubyte: expected an idx file of uint8"),
    ],
)
def test_a_damaged_file_is_named(suffix, damage, message, tmp_path):
    path = write(tmp_path, suffix=suffix) / f"t10k-images-idx3-ubyte{suffix}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        mnist(tmp_path)


@pytest.mark.parametrize(
    ("digit", "message"),
    [
        ([0, 10, 1], r"train-labels-idx1-ubyte: expected labels in 0, …, 9, found \[0, 1, 10\]"),
        ([0, 1], "train-labels-idx1-ubyte: expected 3 labels as in train-images-.* found 2"),
        ([], r"train-labels-idx1-ubyte: expected labels in 0, …, 9, found \[\]"),
    ],
)
def test_labels_must_fit(digit, message, tmp_path):
    write(tmp_path, digit=np.array(digit, dtype=np.uint8))
    with pytest.raises(ValueError, match=message):
        mnist(tmp_path)


# --- the list -----------------------------------------------------------------------------------


def test_load_finds_readers_by_name(tmp_path):
    assert [len(part) for part in load("digits", "ignored", test_fraction=0.5)] == [898, 899]
    write(tmp_path)
    assert [len(part) for part in load("mnist", tmp_path, binarize=None)] == [3, 3]
    with pytest.raises(ValueError, match=r"one of \['digits', 'mnist', .*found 'minst'; choose"):
        load("minst")


@pytest.mark.parametrize("name", DATASETS)
def test_the_list_tells_the_truth(name, request):
    info = DATASETS[name]
    root = request.getfixturevalue("data_root") if info.needs_root else None
    parts = load(name, root)
    assert info.name == name
    assert tuple(len(part) for part in parts) == info.rows
    described = tuple(f"{m.name} {m.event_shape}" for m in parts[0].modalities)
    assert described == info.modalities


# --- arrays of the user -------------------------------------------------------------------------

NAN = np.nan
HOLES = {"a": np.array([[1.0, 2.0], [NAN, NAN], [0.0, 0.0]]), "b": np.arange(3)}


def test_nan_rows_become_masks_and_zeros_do_not():
    masks = nan_rows_to_masks({**HOLES, "c": torch.tensor([[NAN], [0.0], [NAN]])})
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [True, False, True],
        "c": [False, True, False],
    }


def test_nan_rows_are_found_in_every_chunk(tmp_path):
    mapped = np.memmap(tmp_path / "m.dat", dtype=np.float32, mode="w+", shape=(10_000, 2))
    missing = [0, 4095, 4096, 9999]
    mapped[missing] = NAN
    assert torch.nonzero(~nan_rows_to_masks({"a": mapped})["a"]).flatten().tolist() == missing
    data = from_numpy({"a": mapped}, nan_missing=True)
    assert data.memory_mapped == ("a",)
    assert (~data.observed["a"]).sum() == 4


def test_single_missing_entries_must_be_asked_for():
    partly = {"a": np.array([[1.0, 2.0], [NAN, NAN], [0.0, NAN]])}
    with pytest.raises(ValueError, match=r"modality 'a': .* found 1 in part NaN, .* row 2; set"):
        nan_rows_to_masks(partly)
    assert nan_rows_to_masks(partly, entrywise=["a"])["a"].tolist() == [True, False, True]
    modalities = [Modality("a", (2,), "normal", entrywise_missing=True)]
    data = from_numpy(partly, modalities=modalities, nan_missing=True)
    assert data.observed["a"].tolist() == [True, False, True]
    with pytest.raises(ValueError, match="modality 'a': .* found NaN in 1 of them, .* row 1; mark"):
        from_numpy(partly, modalities=modalities)


def test_from_numpy_looks_at_observed_rows_only():
    with pytest.raises(ValueError, match="modality 'a': expected numbers in observed rows, found"):
        from_numpy(HOLES)
    masked = from_numpy(HOLES, {"a": np.array([False, False, True])})
    assert masked.observed["a"].tolist() == [False, False, True]
    both = from_numpy(HOLES, {"a": np.array([False, True, True])}, nan_missing=True)
    assert both.observed["a"].tolist() == [False, False, True]
    assert "b" not in both.observed


def test_from_xarray_puts_rows_first():
    rng = np.random.default_rng(0)
    genes, image = rng.normal(size=(3, 5)), rng.normal(size=(5, 2, 2))
    source = xr.Dataset(
        {
            "genes": (("gene", "row"), genes),
            "image": (("row", "h", "w"), image),
            "has_image": ("row", np.arange(5) > 1),
            "weights": ("gene", np.ones(3)),
        },
        coords={"tissue": ("row", list("uvuvu"))},
    )
    data = from_xarray(source, observed={"image": "has_image"}, labels=["tissue"])
    x, observed = data.tensors()
    assert sorted(x) == ["genes", "image"]
    assert torch.equal(x["genes"], torch.tensor(genes.T))
    assert torch.equal(x["image"], torch.tensor(image))
    assert observed["image"].tolist() == [False, False, True, True, True]
    assert data.labels["tissue"].tolist() == list("uvuvu")
    only = from_xarray(source, modalities=[Modality("genes", (3,))])
    assert only.names == ("genes",)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"dim": "sample"},
            ValueError,
            r"dim: expected one of .*'row'.*, found 'sample'; set dim=",
        ),
        ({"labels": ["y"]}, ValueError, r"observed and labels: expected names among .*\['y'\]"),
        ({"observed": {"b": "a"}}, ValueError, r"observed: expected names among .*found \['b'\]"),
    ],
)
def test_from_xarray_names_what_is_unknown(options, error, message):
    with pytest.raises(error, match=message):
        from_xarray(xr.Dataset({"a": ("row", np.zeros(2))}), **options)


def test_from_xarray_wants_a_dataset():
    with pytest.raises(
        TypeError, match="data: expected an xarray.Dataset, found DataTree; convert"
    ):
        from_xarray(xr.DataTree())


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "g1": [1.0, NAN, 3.0],
            "g2": [4.0, NAN, 6.0],
            "age": pd.array([50, 60, None], dtype="Int64"),
            "seen": [True, True, False],
            "tissue": ["u", "v", "u"],
        }
    )


def test_from_pandas_groups_columns():
    data = from_pandas(
        frame(), {"genes": ["g2", "g1"], "age": ["age"]}, labels=["tissue"], nan_missing=True
    )
    x, observed = data.tensors()
    assert x["genes"][[0, 2]].tolist() == [[4.0, 1.0], [6.0, 3.0]]
    assert x["age"][:2].tolist() == [[50.0], [60.0]]
    assert {name: mask.tolist() for name, mask in observed.items()} == {
        "genes": [True, False, True],
        "age": [True, True, False],
    }
    assert data.labels["tissue"].tolist() == ["u", "v", "u"]
    masked = from_pandas(frame(), {"age": ["age"]}, observed={"age": "seen"})
    assert masked.observed["age"].tolist() == [True, True, False]


def test_from_pandas_takes_flags_beside_numbers():
    table = pd.DataFrame({"flag": [True, False, True], "age": [50.0, 60.0, 70.0], "n": [1, 2, 3]})
    table["whole"] = pd.array([4, None, 6], dtype="Int64")
    table["maybe"] = pd.array([True, None, False], dtype="boolean")
    columns = {"all": ["flag", "age", "n"], "two": ["flag", "n"], "holes": ["whole", "maybe"]}
    x, observed = from_pandas(table, columns, nan_missing=True).tensors()
    assert x["all"].tolist() == [[1.0, 50.0, 1.0], [0.0, 60.0, 2.0], [1.0, 70.0, 3.0]]
    assert x["two"].tolist() == [[1.0, 1.0], [0.0, 2.0], [1.0, 3.0]]
    assert x["holes"][[0, 2]].tolist() == [[4.0, 1.0], [6.0, 0.0]]
    assert observed["holes"].tolist() == [True, False, True]


def test_labels_with_holes_are_labels():
    """Integers with holes, which pandas keeps as floats, where the model wants integers."""
    table = pd.DataFrame({"g": [1.0, 2.0, 3.0], "kind": [2, None, 1]})
    parts = [Modality("g", (1,)), Modality("kind", (1,), Categorical(3))]
    columns = {"g": ["g"], "kind": ["kind"]}
    x, observed = from_pandas(table, columns, modalities=parts, nan_missing=True).tensors()
    assert x["kind"].dtype == torch.int64
    assert x["kind"][[0, 2], 0].tolist() == [2, 1]
    assert observed["kind"].tolist() == [True, False, True]
    table["kind"] = [0.5, None, 1]
    data = from_pandas(table, columns, modalities=parts, nan_missing=True)
    with pytest.raises(TypeError, match="modality 'kind': expected integer labels"):
        data.modalities[1].check(data.tensors()[0]["kind"])


@pytest.mark.parametrize(
    ("columns", "options", "error", "message"),
    [
        ({"g": "g1"}, {}, TypeError, r"columns\['g'\]: .* found the string 'g1'; write \['g1'\]"),
        ({"g": ["g3"]}, {}, ValueError, r"columns\['g'\]: expected names among .* \['g3'\]"),
        (
            {"t": ["g1", "tissue"]},
            {},
            TypeError,
            r"columns\['t'\]: expected numbers or booleans, found tissue \((object|str)\); encode",
        ),
        ({"g": ["g1"]}, {"labels": ["y"]}, ValueError, r"observed and labels: .* \['y'\]"),
        ({"g": ["g1"]}, {"observed": {"h": "seen"}}, ValueError, r"observed: .* found \['h'\]"),
        ({"g": ["g1"]}, {}, ValueError, "modality 'g': expected numbers in observed rows"),
    ],
)
def test_from_pandas_says_what_is_wrong(columns, options, error, message):
    with pytest.raises(error, match=message):
        from_pandas(frame(), columns, **options)


# --- missingness --------------------------------------------------------------------------------


def stacked(masks) -> np.ndarray:
    return np.stack([mask.numpy() for mask in masks.values()], -1)


@pytest.mark.parametrize("keep_one", [False, True])
@pytest.mark.parametrize(
    "fractions", [{"a": 0.5, "b": 0.25}, {"a": 0.5, "b": 0.5}, {"a": 0.7, "b": 0.6, "c": 0.65}]
)
def test_random_missingness_has_exact_counts(fractions, keep_one):
    count = 1000
    masks = missing_completely_at_random(count, fractions, seed=0, keep_one=keep_one)
    missing = {name: (~mask).sum().item() for name, mask in masks.items()}
    assert missing == {name: round(fraction * count) for name, fraction in fractions.items()}
    empty = (~stacked(masks).any(-1)).sum()
    assert empty == 0 if keep_one else empty > 0


def test_random_missingness_is_independent_between_modalities():
    """Without keep_one the overlap is hypergeometric: bounds are 5 of its standard deviations."""
    count, a, b = 10_000, 4000, 2500
    masks = missing_completely_at_random(count, {"a": 0.4, "b": 0.25}, seed=1, keep_one=False)
    both = (~masks["a"] & ~masks["b"]).sum().item()
    variance = a * b * (count - a) * (count - b) / count**2 / (count - 1)
    assert abs(both - a * b / count) < 5 * variance**0.5


@pytest.mark.parametrize(("rows", "fraction"), [(8, 0.5), (10, 0.4)])
def test_every_row_is_as_likely_to_be_missing(rows, fraction):
    """Counts over many seeds are binomial for each row, also where rows are repaired."""
    seeds, fractions = range(2000), {"a": fraction, "b": fraction}
    masks = [stacked(missing_completely_at_random(rows, fractions, seed=seed)) for seed in seeds]
    missing = (~np.stack(masks)).sum(0)  # (rows, 2)
    deviation = (len(seeds) * fraction * (1 - fraction)) ** 0.5
    assert np.abs(missing - len(seeds) * fraction).max() < 5 * deviation


def test_no_pair_of_modalities_is_preferred():
    """With equal fractions the pairs are equally frequent: 5 standard errors of the run."""
    masks = [
        stacked(missing_completely_at_random(30, dict.fromkeys("abc", 0.5), seed=seed))
        for seed in range(1000)
    ]
    patterns = np.stack(masks) @ [4, 2, 1]  # (seeds, 30)
    ab, ac, bc = ((patterns == pattern).sum(-1) for pattern in (6, 5, 3))
    for difference in (ab - ac, ab - bc, ac - bc):
        assert abs(difference.mean()) < 5 * difference.std(ddof=1) / len(difference) ** 0.5


def test_the_tightest_fractions_leave_one_modality_each():
    masks = stacked(missing_completely_at_random(30, dict.fromkeys("abc", 2 / 3), seed=0))
    assert masks.sum(-1).tolist() == [1] * 30
    assert masks.sum(0).tolist() == [10] * 3


def test_a_modality_that_is_never_missing_keeps_rows_alive():
    fractions = {"b": 1.0}
    (mask,) = missing_completely_at_random(9, fractions, seed=0, names=["a", "b"]).values()
    assert not mask.any()
    data = MultimodalDataset({"a": np.zeros(9), "b": np.zeros(9)})
    masks = missing_completely_at_random(data, fractions, seed=0)
    assert list(masks) == ["b"]
    assert not data.with_observed(masks).observed["b"].any()


def test_masks_are_functions_of_the_seed():
    labels = np.arange(100) % 3
    functions = [
        lambda seed: missing_completely_at_random(100, {"a": 0.5, "b": 0.3}, seed=seed),
        lambda seed: paired_fraction(100, 0.3, names=["a", "b"], seed=seed),
        lambda seed: label_dependent(labels, [0.2, 0.5, 0.8], name="a", seed=seed),
    ]
    for function in functions:
        assert np.array_equal(stacked(function(0)), stacked(function(0)))
        assert not np.array_equal(stacked(function(0)), stacked(function(1)))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_paired_fraction_has_exact_counts(fraction):
    masks = stacked(paired_fraction(101, fraction, seed=0, names=["a", "b", "c"]))
    per_row = masks.sum(-1)
    paired = round(101 * fraction)
    assert np.bincount(per_row, minlength=4).tolist() == [0, 101 - paired, 0, paired]
    alone = masks[per_row == 1].sum(0)
    assert alone.max() - alone.min() <= 1


def test_paired_fraction_takes_the_names_of_the_data():
    data = MultimodalDataset({"a": np.zeros(10), "b": np.zeros(10)})
    masks = paired_fraction(data, 0.5, seed=0)
    assert len(data.with_observed(masks).complete()) == 5


@pytest.mark.parametrize("as_dict", [False, True])
def test_label_dependent_missingness_is_binomial_in_each_class(as_dict):
    labels = np.repeat([0, 1, 2, 3], 2000)
    probabilities = [0.0, 0.3, 0.8, 1.0]
    given = dict(enumerate(probabilities)) if as_dict else probabilities
    mask = label_dependent(torch.tensor(labels), given, name="image", seed=0)["image"].numpy()
    for label, probability in enumerate(probabilities):
        missing = (~mask[labels == label]).sum()
        deviation = (2000 * probability * (1 - probability)) ** 0.5
        assert abs(missing - 2000 * probability) <= 5 * deviation


def test_label_dependent_missingness_takes_names():
    masks = label_dependent(np.array(["u", "v", "u"]), {"u": 1.0, "v": 0.0}, name="a", seed=0)
    assert masks["a"].tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: missing_completely_at_random(10, {"a": 0.6, "b": 0.6}, seed=0),
            "fractions: expected at least 10 observed entries for 10 rows, found 8; lower",
        ),
        (
            lambda: missing_completely_at_random(10, {"a": 1.2}, seed=0),
            r"fractions\['a'\]: expected a value in \[0, 1\], found 1.2",
        ),
        (
            lambda: missing_completely_at_random(numbered().complete(), {"c": 0.1}, seed=0),
            r"fractions: expected names among \['a', 'b'\], found \['c'\]",
        ),
        (
            lambda: missing_completely_at_random(numbered(), {"a": 0.1}, seed=0),
            r"rows: expected a data set without masks, found masks for \['b'\]",
        ),
        (
            lambda: missing_completely_at_random(0, {"a": 0.1}, seed=0),
            "rows: expected a data set or a positive number of rows, found 0",
        ),
        (lambda: paired_fraction(5, 0.5, seed=0), "names: expected the modalities, found none"),
        (
            lambda: paired_fraction(numbered(), 0.5, names=["a"], seed=0),
            r"names: expected \['a', 'b'\] as in the data set, found \['a'\]",
        ),
        (
            lambda: paired_fraction(5, -0.5, names=["a"], seed=0),
            r"fraction: expected a value in \[0, 1\], found -0.5",
        ),
        (
            lambda: label_dependent(np.array([0, 2]), [0.1, 0.2], name="a", seed=0),
            r"probabilities: expected one for every label, found none for \[2\]",
        ),
        (
            lambda: label_dependent(np.array([0]), [1.5], name="a", seed=0),
            r"probabilities\[0\]: expected a value in \[0, 1\], found 1.5",
        ),
        (
            lambda: label_dependent(np.zeros((2, 2)), [0.5], name="a", seed=0),
            r"labels: expected shape \(N,\), found \(2, 2\)",
        ),
    ],
)
def test_bad_missingness_says_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
