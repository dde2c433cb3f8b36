"""Readers: digits, MNIST and Fashion-MNIST with their label, and the user's own arrays.

Files are read under a root, given as an argument or in the environment variable MMZOO_DATA, in the
layout that torchvision uses, `<root>/MNIST/raw/train-images-idx3-ubyte`, as they are distributed
(`.gz`) or unpacked.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import os
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmzoo.data.dataset import MultimodalDataset
from mmzoo.modality import Modality

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = [
    "DATASETS",
    "Binarize",
    "DatasetInfo",
    "digits",
    "fashion_mnist",
    "from_numpy",
    "from_pandas",
    "from_xarray",
    "load",
    "mnist",
    "nan_rows_to_masks",
]

Binarize = Literal["fixed", "epoch"] | None
"""Pixels drawn once, pixels drawn afresh in each epoch (the test part: once), or grey values."""

Pair = tuple[MultimodalDataset, MultimodalDataset]

_BLOCK = 1024  # rows that share a random stream, so that a subset draws its own blocks only
_CHUNK = 4096  # rows that are searched for NaN at a time

# --- images with a label ------------------------------------------------------------------------


def _binarised(
    grey: np.ndarray, maximum: int, stream: int, rows: Tensor, epoch: int, seed: int
) -> dict[str, Tensor]:
    """Bernoulli draws with probability grey / maximum, a function of (seed, stream, epoch, row).

    An integer draw below `maximum` is smaller than the grey value with exactly that probability.
    """
    chosen = rows.numpy()
    image = np.empty((len(chosen), *grey.shape[1:]), dtype=bool)
    for block in np.unique(chosen // _BLOCK):
        random = np.random.default_rng([seed, stream, epoch, block])
        noise = random.integers(0, maximum, (_BLOCK, *grey.shape[1:]), dtype=np.uint8)
        here = np.flatnonzero(chosen // _BLOCK == block)
        image[here] = noise[chosen[here] - block * _BLOCK] < grey[chosen[here]]
    return {"image": torch.from_numpy(image)}


def _scaled(maximum: int, x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**x, "image": x["image"] / maximum}


def _image_and_label(
    grey: np.ndarray,
    digit: np.ndarray,
    *,
    maximum: int,
    binarize: Binarize,
    seed: int,
    stream: int,
    fresh: bool,
) -> MultimodalDataset:
    """The data set of uint8 images (N, 1, H, W) and labels (N,) in 0, …, 9."""
    if binarize not in ("fixed", "epoch", None):
        raise ValueError(
            f"binarize: expected 'fixed', 'epoch' or None, found {binarize!r}; choose one of them"
        )
    sampler = functools.partial(_binarised, grey, maximum, stream)
    pixels = "bernoulli" if binarize else "continuous_bernoulli"
    image = sampler(torch.arange(len(grey)), 0, seed)["image"] if binarize else grey
    return MultimodalDataset(
        {"image": image, "label": np.eye(10, dtype=np.uint8)[digit]},
        labels={"digit": digit},
        modalities=[
            Modality("image", event_shape=grey.shape[1:], likelihood=pixels),
            Modality("label", event_shape=(10,), likelihood="one_hot_categorical"),
        ],
        transform=None if binarize else functools.partial(_scaled, maximum),
        sampler=sampler if binarize == "epoch" and fresh else None,
    )


def digits(*, binarize: Binarize = "fixed", seed: int = 0, test_fraction: float = 0.2) -> Pair:
    """Handwritten digits embedded in scikit-learn: image (1, 8, 8) and one-hot label (10,).

    1797 images with 17 grey levels. The split keeps the class proportions. Optical recognition of
    handwritten digits (Alpaydin & Kaynak, 1998), https://doi.org/10.24432/C50P49

    Args:
        binarize: "fixed" draws each pixel once with its grey value as probability; "epoch" draws
            the training images afresh in each epoch (`MultimodalDataset.resample`); None keeps the
            grey values in [0, 1].
        seed: of the split and of the fixed draw.
        test_fraction: of the rows.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if not 0.0 < test_fraction < 1.0:
        raise ValueError(
            f"test_fraction: expected a value between 0 and 1, found {test_fraction}; "
            "0.2 is the default"
        )
    source = load_digits()
    grey = source.images.astype(np.uint8)[:, None]  # (N, 1, 8, 8), 0..16
    digit = source.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(digit)), test_size=test_fraction, stratify=digit, random_state=seed
    )
    data = functools.partial(
        _image_and_label, grey, digit, maximum=16, binarize=binarize, seed=seed, stream=0
    )
    return data(fresh=True).subset(np.sort(train)), data(fresh=False).subset(np.sort(test))


def mnist(
    root: str | Path | None = None,
    *,
    binarize: Binarize = "fixed",
    seed: int = 0,
    download: bool = False,
) -> Pair:
    """MNIST: image (1, 28, 28) and one-hot label (10,), 60,000 rows to train on and 10,000 to test.

    Gradient-based learning applied to document recognition (LeCun et al., 1998),
    https://doi.org/10.1109/5.726791

    Args:
        root: folder that contains `MNIST/raw`; by default the environment variable MMZOO_DATA.
        binarize: "fixed" draws each pixel once with its grey value as probability; "epoch" draws
            the training images afresh in each epoch (`MultimodalDataset.resample`); None keeps the
            grey values in [0, 1].
        seed: of the fixed draw.
        download: let torchvision download the files if they are missing.
    """
    return _read_pair("MNIST", root, binarize=binarize, seed=seed, download=download)


def fashion_mnist(
    root: str | Path | None = None,
    *,
    binarize: Binarize = "fixed",
    seed: int = 0,
    download: bool = False,
) -> Pair:
    """Fashion-MNIST: image (1, 28, 28) and one-hot label (10,), read as `mnist` is.

    Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms
    (Xiao et al., 2017), https://arxiv.org/abs/1708.07747

    Args:
        root: folder that contains `FashionMNIST/raw`; by default the variable MMZOO_DATA.
        binarize: as for `mnist`.
        seed: of the fixed draw.
        download: let torchvision download the files if they are missing.
    """
    return _read_pair("FashionMNIST", root, binarize=binarize, seed=seed, download=download)


# --- the idx format -----------------------------------------------------------------------------


def _root(root: str | Path | None) -> Path:
    found = root or os.environ.get("MMZOO_DATA")
    if not found:
        raise ValueError(
            "root: expected a folder with the data, found neither an argument nor MMZOO_DATA; "
            "pass root (--root) or set MMZOO_DATA"
        )
    return Path(found).expanduser()


def _find(root: Path, name: str) -> Path:
    """The file, unpacked or as distributed."""
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{name}: expected this file, or {name}.gz, under the root {root}, found neither; "
        "pass another root (--root), set MMZOO_DATA, or use download=True"
    )


def _read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """An array of uint8 from an idx file: bytes 0 0 8 ndim, big-endian sizes, values.

    http://yann.lecun.com/exdb/mnist/
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a gzip file, found a damaged one ({error}); download it again"
        ) from error
    start = 4 + 4 * ndim
    if len(content) < start or content[:4] != bytes((0, 0, 8, ndim)):
        raise ValueError(
            f"{path}: expected an idx file of uint8 with {ndim} dimensions, found the first bytes "
            f"{content[:4].hex(' ')!r}; download it again"
        )
    shape = np.frombuffer(content, dtype=">u4", count=ndim, offset=4).astype(int)
    if len(content) - start != shape.prod():
        raise ValueError(
            f"{path}: expected {shape.prod()} values for shape {tuple(shape.tolist())}, found "
            f"{len(content) - start}; download it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _read_part(raw: tuple[Path, str], part: str) -> tuple[np.ndarray, np.ndarray]:
    root, folder = raw
    image_file = _find(root, f"{folder}/raw/{part}-images-idx3-ubyte")
    label_file = _find(root, f"{folder}/raw/{part}-labels-idx1-ubyte")
    grey = _read_idx(image_file, ndim=3)[:, None]  # (N, 1, 28, 28)
    digit = _read_idx(label_file, ndim=1).astype(np.int64)
    if digit.size == 0 or digit.max() > 9:
        raise ValueError(
            f"{label_file}: expected labels in 0, …, 9, found {np.unique(digit).tolist()}; "
            "download it again"
        )
    if len(grey) != len(digit):
        raise ValueError(
            f"{label_file}: expected {len(grey)} labels as in {image_file.name}, found "
            f"{len(digit)}; download both files again"
        )
    return grey, digit


def _download(root: Path, folder: str) -> None:
    """Fetch the files with torchvision, unless they are there."""
    import torchvision

    getattr(torchvision.datasets, folder)(root=str(root), download=True)


def _read_pair(
    folder: str, root: str | Path | None, *, binarize: Binarize, seed: int, download: bool
) -> Pair:
    raw = _root(root), folder
    try:
        parts = _read_part(raw, "train"), _read_part(raw, "t10k")
    except FileNotFoundError:
        if not download:
            raise
        _download(*raw)
        parts = _read_part(raw, "train"), _read_part(raw, "t10k")
    train, test = (
        _image_and_label(
            *part, maximum=255, binarize=binarize, seed=seed, stream=stream, fresh=stream == 0
        )
        for stream, part in enumerate(parts)
    )
    return train, test


# --- the user's arrays --------------------------------------------------------------------------


def _nan_rows(values: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are NaN throughout, and which are so in part: two bool arrays (N,)."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    every, some = np.zeros((2, len(values)), dtype=bool)
    if values.dtype.kind != "f" or values[:1].size == 0:
        return every, some
    for start in range(0, len(values), _CHUNK):  # a memory-mapped array is never in memory whole
        chunk = slice(start, start + _CHUNK)
        nan = np.isnan(values[chunk]).reshape(len(values[chunk]), -1)
        every[chunk], some[chunk] = nan.all(-1), nan.any(-1)
    return every, some & ~every


def nan_rows_to_masks(
    x: Mapping[str, np.ndarray | Tensor], *, entrywise: Collection[str] = ()
) -> dict[str, Tensor]:
    """Masks that are False where a row is NaN throughout.

    Args:
        x: name -> array (N, *event_shape).
        entrywise: modalities whose observed rows may contain single NaN
            (`Modality(..., entrywise_missing=True)`).

    Returns:
        A bool mask (N,) for each modality that has such rows.

    Example:
        >>> nan_rows_to_masks({"a": np.array([[1.0, 2.0], [np.nan, np.nan]]), "b": np.ones((2, 3))})
        {'a': tensor([ True, False])}
    """
    masks = {}
    for name, values in x.items():
        every, some = _nan_rows(values)
        if some.any() and name not in entrywise:
            raise ValueError(
                f"modality {name!r}: expected rows that are NaN throughout or nowhere, found "
                f"{some.sum()} in part NaN, the first is row {some.argmax()}; set "
                f"Modality({name!r}, ..., entrywise_missing=True) for single missing entries"
            )
        if every.any():
            masks[name] = torch.from_numpy(~every)
    return masks


def _check_no_nan(x: Mapping[str, Any], observed: Mapping[str, Any], entrywise: list[str]) -> None:
    for name, values in x.items():
        every, some = _nan_rows(values)
        seen = np.asarray(observed.get(name, True))
        wrong = seen & (every if name in entrywise else every | some)
        if wrong.any():
            raise ValueError(
                f"modality {name!r}: expected numbers in observed rows, found NaN in {wrong.sum()} "
                f"of them, the first is row {wrong.argmax()}; mark them in `observed`, or set "
                "nan_missing=True to read rows of NaN as missing"
            )


def from_numpy(
    x: Mapping[str, np.ndarray | Tensor],
    observed: Mapping[str, np.ndarray | Tensor] | None = None,
    labels: Mapping[str, np.ndarray | Tensor] | None = None,
    modalities: Sequence[Modality] | None = None,
    *,
    nan_missing: bool = False,
) -> MultimodalDataset:
    """A data set from arrays, checked for NaN.

    Memory-mapped arrays are read once, in pieces; `MultimodalDataset` itself does not read them.

    Args:
        x: name -> array (N, *event_shape).
        observed: name -> bool (N,), True where the row has this modality.
        labels: name -> array (N, ...) that no model sees.
        modalities: what the modalities are.
        nan_missing: read rows that are NaN throughout as missing; an error otherwise.
    """
    data = MultimodalDataset(x, observed, labels, modalities)
    entrywise = [modality.name for modality in modalities or () if modality.entrywise_missing]
    if nan_missing:
        return data.with_observed(nan_rows_to_masks(x, entrywise=entrywise))
    _check_no_nan(x, data.observed, entrywise)
    return data


def _check_known(where: str, wanted: Collection[Any], known: Collection[Any]) -> None:
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(
            f"{where}: expected names among {list(known)}, found {unknown}; rename them"
        )


def from_xarray(
    data: xarray.Dataset,
    *,
    dim: str = "row",
    observed: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
    modalities: Sequence[Modality] | None = None,
    nan_missing: bool = False,
) -> MultimodalDataset:
    """A data set from an `xarray.Dataset`: each data variable with the row dimension is a modality.

    Args:
        data: variables with the dimension `dim`, in any place.
        dim: the dimension of the rows.
        observed: modality -> name of the bool variable (N,) that is its mask.
        labels: variables or coordinates that no model sees.
        modalities: what the modalities are; if given, other variables are left out.
        nan_missing: read rows that are NaN throughout as missing; an error otherwise.
    """
    import xarray

    if not isinstance(data, xarray.Dataset):
        raise TypeError(
            f"data: expected an xarray.Dataset, found {type(data).__name__}; "
            "convert it (for a DataTree: tree['group'].to_dataset())"
        )
    if dim not in data.dims:
        raise ValueError(
            f"dim: expected one of the dimensions {list(data.dims)}, found {dim!r}; set dim="
        )
    observed = dict(observed or {})
    rowwise = [str(name) for name in data.variables if dim in data[name].dims]
    extra = {*observed.values(), *labels}
    names = [name for name in rowwise if name in data.data_vars and name not in extra]
    if modalities is not None:
        names = [modality.name for modality in modalities if modality.name in names]
    _check_known("observed", observed, names)
    _check_known("observed and labels", extra, rowwise)
    values = {name: data[name].transpose(dim, ...).to_numpy() for name in rowwise}
    return from_numpy(
        {name: values[name] for name in names},
        {name: values[variable] for name, variable in observed.items()},
        {name: values[name] for name in labels},
        modalities,
        nan_missing=nan_missing,
    )


def _frame_values(frame: pandas.DataFrame, where: str) -> np.ndarray:
    """Columns as one array; pandas' own missing value becomes NaN."""
    others = [f"{n} ({dtype})" for n, dtype in frame.dtypes.items() if dtype.kind not in "biuf"]
    if others:
        raise TypeError(
            f"{where}: expected numbers or booleans, found {', '.join(others)}; encode such "
            "columns as numbers first, with pandas.get_dummies or astype('boolean')"
        )
    if len({dtype.kind for dtype in frame.dtypes}) > 1 or frame.isna().to_numpy().any():
        return frame.to_numpy(dtype=np.float64, na_value=np.nan)
    return frame.to_numpy()


def _label_values(column: pandas.Series) -> np.ndarray:
    values = column.to_numpy()
    if values.dtype.kind != "O" or not all(isinstance(value, str) for value in values):
        return values
    return values.astype(str)


def from_pandas(
    frame: pandas.DataFrame,
    columns: Mapping[str, Sequence[str]],
    *,
    observed: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
    modalities: Sequence[Modality] | None = None,
    nan_missing: bool = False,
) -> MultimodalDataset:
    """A data set from a table: each modality is a list of C columns, with event shape (C,).

    Args:
        frame: one row per row.
        columns: modality -> names of its columns.
        observed: modality -> name of the bool column that is its mask.
        labels: columns that no model sees.
        modalities: what the modalities are.
        nan_missing: read rows that are NaN throughout as missing; an error otherwise.
    """
    observed = dict(observed or {})
    for name, chosen in columns.items():
        if isinstance(chosen, str):
            raise TypeError(
                f"columns[{name!r}]: expected a list of columns, found the string {chosen!r}; "
                f"write [{chosen!r}]"
            )
        _check_known(f"columns[{name!r}]", chosen, frame.columns)
    _check_known("observed", observed, columns)
    _check_known("observed and labels", [*observed.values(), *labels], frame.columns)
    return from_numpy(
        {
            name: _frame_values(frame[list(chosen)], f"columns[{name!r}]")
            for name, chosen in columns.items()
        },
        {name: frame[column].to_numpy() for name, column in observed.items()},
        {name: _label_values(frame[name]) for name in labels},
        modalities,
        nan_missing=nan_missing,
    )


# --- the list of the command line ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What `mmzoo data` says about a data set."""

    name: str
    title: str
    reader: Callable[..., Pair]
    needs_root: bool
    rows: tuple[int, int]  # train, test
    modalities: tuple[str, ...]
    description: str
    source: str
    url: str
    licence: str


_IMAGE_AND_LABEL = ("image (1, 28, 28)", "label (10,)")

DATASETS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            name="digits",
            title="Handwritten digits",
            reader=digits,
            needs_root=False,
            rows=(1437, 360),
            modalities=("image (1, 8, 8)", "label (10,)"),
            description="Small handwritten digits and their label, embedded in scikit-learn.",
            source="Optical recognition of handwritten digits (Alpaydin & Kaynak, 1998)",
            url="https://doi.org/10.24432/C50P49",
            licence="CC BY 4.0",
        ),
        DatasetInfo(
            name="mnist",
            title="MNIST",
            reader=mnist,
            needs_root=True,
            rows=(60_000, 10_000),
            modalities=_IMAGE_AND_LABEL,
            description="Handwritten digits and their label.",
            source=("Gradient-based learning applied to document recognition (LeCun et al., 1998)"),
            url="https://doi.org/10.1109/5.726791",
            licence="CC BY-SA 3.0",
        ),
        DatasetInfo(
            name="fashion_mnist",
            title="Fashion-MNIST",
            reader=fashion_mnist,
            needs_root=True,
            rows=(60_000, 10_000),
            modalities=_IMAGE_AND_LABEL,
            description="Pictures of clothes and their kind.",
            source="Fashion-MNIST (Xiao et al., 2017)",
            url="https://arxiv.org/abs/1708.07747",
            licence="MIT",
        ),
    )
}


def load(name: str, root: str | Path | None = None, **options: Any) -> Pair:
    """The (train, test) pair of a data set by name.

    Args:
        name: a key of `DATASETS`.
        root: folder with the data, for data sets that need one; others ignore it.
        options: of the reader.
    """
    if name not in DATASETS:
        raise ValueError(
            f"data set: expected one of {list(DATASETS)}, found {name!r}; choose a known one"
        )
    info = DATASETS[name]
    return info.reader(root, **options) if info.needs_root else info.reader(**options)
