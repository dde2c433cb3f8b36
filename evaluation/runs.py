"""Runs: training and evaluating models from a configuration, and the folders that keep them.

The folder of a model is a run of its own, and a comparison is a folder of such folders:

    runs/digits/            config.toml  table.csv  table.md  table.tex  differences.csv
                            report.html  figures/
    runs/digits/mvae/       config.toml  config.json  model.safetensors  history.nc
                            evaluation.nc  checks.nc  table.nc

Each file is written beside its place and then moved there; `history.nc` says that training is over,
`table.nc` that the evaluation is.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro.infer import ELBO

from mmzoo.config import RunConfig, read_config, write_config
from mmzoo.data import DATASETS, MultimodalDataset, load, missing_completely_at_random
from mmzoo.evaluation.checks import check_model, default_classifiers
from mmzoo.evaluation.datatree import load_datatree, save_datatree, to_datatree
from mmzoo.evaluation.likelihood import likelihood_table
from mmzoo.evaluation.rowwise import unanswered
from mmzoo.evaluation.tables import (
    FLAGGED_SHARE,
    paired_differences,
    table_cells,
    table_note,
    to_csv,
    to_latex,
    to_markdown,
)
from mmzoo.inference import SubsetELBO, fit
from mmzoo.inference.objective import ObjectiveModule
from mmzoo.modality import Modality
from mmzoo.models import MODELS
from mmzoo.networks import is_image
from mmzoo.seeding import seeded
from mmzoo.vae import MultimodalVAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

    from mmzoo.evaluation.classifiers import ClassifierLike

__all__ = [
    "FLAGGED_SHARE",
    "Run",
    "build",
    "check_step",
    "class_accuracy",
    "evaluate_run",
    "load_data",
    "merge_tables",
    "model_class",
    "prepare_folder",
    "read_run",
    "table_cells",
    "table_note",
    "train_run",
    "unfinished_models",
    "write_summary",
]

OnChunk = Callable[[str, int, int], None]
_CHECKED_ROWS = 8
_KEPT_ROWS, _KEPT_DRAWS = 100, 100  # of evaluation.nc
_PICTURE_ROWS, _PLANE_ROWS = 10, 1000
_DIVERGED = "(diverged): training stopped since the loss was not finite; not to be compared."
_SETTINGS = ("num_samples", "prior_share")  # of an evaluation; rows are the same without them
_ACCURACY_DRAWS, _ACCURACY_ROWS = 100, 256
_MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "history.nc",
    "evaluation.nc",
    "checks.nc",
    "table.nc",
)
_SUMMARY_FILES = ("table.csv", "table.md", "table.tex", "differences.csv", "report.html")


@dataclasses.dataclass(frozen=True)
class Run:
    """One trained model in its folder.

    Attributes:
        folder: Where it is kept.
        config: What it was trained with; one model.
        vae: The model, in evaluation mode.
        history: Of its training.
        table: Its likelihoods and accuracies, None before it is evaluated.
        checks: What :func:`mmzoo.evaluation.checks.check_model` found, None where it was not asked.
    """

    folder: Path
    config: RunConfig
    vae: MultimodalVAE
    history: xr.Dataset
    table: xr.Dataset | None
    checks: xr.DataTree | None = None

    @property
    def diverged(self) -> bool:
        """Whether training stopped since the loss was not finite."""
        return bool(self.history.attrs.get("stopped") == "diverged")


# Making -----------------------------------------------------------------------------------------


def model_class(name: str) -> type[MultimodalVAE]:
    """The class of a model by its name on the command line."""
    if name not in MODELS:
        raise ValueError(f"model {name!r}: unknown; known models: {', '.join(MODELS)}")
    return MODELS[name]


def load_data(config: RunConfig) -> tuple[MultimodalDataset, MultimodalDataset]:
    """The training rows, with their simulated missingness, and the complete test rows."""
    binarize = None if config.binarize == "none" else config.binarize
    seed = _data_seed(config)
    train, test = load(config.data, config.root, binarize=binarize, seed=seed)
    if config.limit is not None:
        train, test = (rows.subset(range(min(len(rows), config.limit))) for rows in (train, test))
    if config.test_rows is not None:
        test = test.subset(range(min(len(test), config.test_rows)))
    if config.missing:
        masks = missing_completely_at_random(train, config.missing, seed=seed)
        train = train.with_observed(masks)
    return train, test


def _data_seed(config: RunConfig) -> int:
    return config.seed if config.data_seed is None else config.data_seed


def build(
    config: RunConfig, model: str, modalities: Sequence[Modality]
) -> tuple[MultimodalVAE, ELBO]:
    """A fresh model and its objective.

    Args:
        config: The configuration.
        model: Which of its models.
        modalities: What the data set has.

    Raises:
        ValueError: For an unknown model or option, or modalities that the model cannot take.
    """
    cls = model_class(model)
    options = dict(config.options.get(model, {}))
    ours = cls.option_names()
    theirs = _keywords(cls.objective)
    if _is_open(cls.objective):
        theirs |= _keywords(SubsetELBO) - {"alignment", "elbo"}  # objects, not words
    if unknown := sorted(set(options) - ours - theirs):
        raise ValueError(
            f"option {unknown[0]!r}: unknown to {model}; its options: "
            f"{', '.join(sorted(ours | theirs))}"
        )
    for name in sorted(_flags(cls) & set(options)):
        if not isinstance(options[name], bool):
            raise ValueError(
                f"options of {model}: expected true or false for {name}, found {options[name]!r}"
            )
    parts = [_with_networks(config, modality) for modality in modalities]
    with _blaming_options(model, options), seeded(config.seed):
        own = {key: value for key, value in options.items() if key in ours}
        vae = cls(parts, config.latent_dim, **own)
        return vae, vae.objective(**{k: v for k, v in options.items() if k not in ours})


@contextmanager
def _blaming_options(model: str, options: Mapping[str, Any]) -> Iterator[None]:
    """What goes wrong within it is laid on the options, if there are any."""
    try:
        yield
    except Exception as error:
        if not options:
            raise
        reason = str(error).split("Trace Shapes:")[0].strip()  # Pyro adds the shapes of all sites
        raise ValueError(f"options of {model}: {reason}; check {dict(options)}") from error


def check_step(config: RunConfig, model: str, rows: MultimodalDataset) -> None:
    """Takes a loss of a few rows, so that a value that an option cannot have is found at once.

    Args:
        config: The configuration.
        model: Which of its models.
        rows: The training rows.

    Raises:
        ValueError: For an unknown model or option, a value of an option that the objective cannot
            work with, or modalities that the model cannot take.
    """
    vae, objective = build(config, model, rows.modalities or ())
    x, observed = rows.batch(range(min(len(rows), _CHECKED_ROWS)))
    with _blaming_options(model, config.options.get(model, {})), seeded(config.seed):
        ObjectiveModule(vae.model, vae.guide, objective)(x, observed)


def _keywords(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}


def _flags(cls: type[MultimodalVAE]) -> set[str]:
    """Options of a model and its objective that are true or false."""
    constructors = [each.__init__ for each in cls.__mro__ if issubclass(each, MultimodalVAE)]
    functions: list[Callable[..., Any]] = [*constructors, cls.objective]
    if _is_open(cls.objective):
        functions.append(SubsetELBO)
    return {
        each.name
        for function in functions
        for each in inspect.signature(function).parameters.values()
        if isinstance(each.default, bool)
    }


def _is_open(function: Callable[..., Any]) -> bool:
    return any(
        each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values()
    )


def _with_networks(config: RunConfig, modality: Modality) -> Modality:
    """The modality with the networks that the configuration asks for."""
    network: Any = None
    if config.network == "conv" and is_image(modality.event_shape):
        network = "conv"
    elif config.network == "mlp":
        network = {"kind": "mlp", "hidden": list(config.hidden)} if config.hidden else "mlp"
    return Modality(
        modality.name,
        modality.event_shape,
        modality.likelihood,
        encoder=network,
        decoder=network,
        entrywise_missing=modality.entrywise_missing,
    )


def prepare_folder(
    folder: Path, config: RunConfig, command: str, *, resume: bool, overwrite: bool
) -> None:
    """Makes the folder of a run and writes its `config.toml`; finished runs are not overwritten.

    Args:
        folder: The folder.
        config: What is going to be run.
        command: ``"train"`` or ``"compare"``.
        resume: Keep the finished models of a run with the same configuration.
        overwrite: Remove the models of an older run.

    Raises:
        ValueError: If the folder holds a run already, or another one than is to be resumed.
    """
    path = folder / "config.toml"
    if overwrite:
        _clear(folder, config)
    elif finished := _finished(folder):
        if not resume:
            raise ValueError(
                f"{folder}: holds a run already; add --resume to keep its finished models, "
                "--overwrite to start again, or choose another --out"
            )
        if path.exists() and (wrote := read_config(path)[0]) != command:
            raise ValueError(
                f"{folder}: expected a run of mmzoo {command}, found one of mmzoo {wrote}; "
                f"repeat it with mmzoo {wrote}, or choose another --out"
            )
        for each in finished:
            _check_same(each, read_config(each / "config.toml")[1], config, alone=each == folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, command, path)


def _finished(folder: Path) -> list[Path]:
    """The folders of trained models: the folder of a run itself, or those of a comparison."""
    places = (folder, *(folder / model for model in MODELS))
    return [each for each in places if _is_trained(each)]


def _is_trained(folder: Path) -> bool:
    return (folder / "history.nc").is_file()


def _check_same(folder: Path, before: RunConfig, now: RunConfig, *, alone: bool) -> None:
    """Whether a trained model is the one that would be trained; options of others are free."""
    way_out = "repeat it as it was, start again with --overwrite, or choose another --out"
    free = ("models", "options", "root", "threads", "device")
    for field in dataclasses.fields(RunConfig):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if field.name not in free and old != new:
            raise ValueError(
                f"{folder}: was made with {field.name} = {old!r}, now it is {new!r}; {way_out}"
            )
    model = now.models[0] if alone else folder.name
    if before.models != (model,):
        raise ValueError(
            f"{folder}: expected a run of {model}, found one of {', '.join(before.models)}; "
            f"{way_out}"
        )
    old, new = (dict(each.options.get(model, {})) for each in (before, now))
    if model in now.models and old != new:
        raise ValueError(
            f"{folder}: {model} was made with the options {old}, now they are {new}; {way_out}"
        )


def _clear(folder: Path, config: RunConfig) -> None:
    """Removes what an older run left, and nothing else."""
    for each in (folder, *(folder / model for model in MODELS)):
        for name in (*_MODEL_FILES, "config.toml", *_SUMMARY_FILES):
            (each / name).unlink(missing_ok=True)
    if (folder / "figures").is_dir():
        shutil.rmtree(folder / "figures")


def train_run(
    config: RunConfig,
    model: str,
    folder: str | os.PathLike[str],
    *,
    data: tuple[MultimodalDataset, MultimodalDataset] | None = None,
    progress: bool = True,
) -> Run:
    """Trains one model of a configuration and keeps it in a folder.

    Args:
        config: The configuration.
        model: Which of its models.
        folder: Where to keep it.
        data: Training and test rows, if they are at hand.
        progress: Whether to show a progress bar.
    """
    folder = Path(folder)
    train, _ = load_data(config) if data is None else data
    vae, objective = build(config, model, train.modalities or ())
    folder.mkdir(parents=True, exist_ok=True)
    for name in _MODEL_FILES:
        (folder / name).unlink(missing_ok=True)
    write_config(config.only(model), "train", folder / "config.toml")
    result = fit(
        vae,
        train,
        objective=objective,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        progress=progress,
        accelerator=config.device,
    )
    pyro.clear_param_store()
    vae.save_pretrained(folder)
    result.history.attrs |= {"model": model, "stopped": result.stopped}
    _save(result.history, folder / "history.nc")
    return Run(folder, config.only(model), vae, result.history, None)


def read_run(folder: str | os.PathLike[str]) -> list[Run]:
    """The trained models of a run folder: of a single model, or of a comparison.

    Raises:
        ValueError: For a folder that is no run, or a checkpoint that does not fit.
    """
    folder = Path(folder)
    if not (folder / "config.toml").is_file():
        raise ValueError(
            f"run {folder}: expected a folder with config.toml, found none; name a folder that "
            "mmzoo train or compare wrote"
        )
    command, config = read_config(folder / "config.toml")
    if command == "train":
        return [_read_model(folder, config)]
    trained = [folder / model for model in config.models if _is_trained(folder / model)]
    if not trained:
        raise ValueError(
            f"run {folder}: expected a trained model, found none; finish it with "
            f"mmzoo compare --config {folder}/config.toml --resume"
        )
    return [run for each in trained for run in read_run(each)]


def unfinished_models(folder: str | os.PathLike[str]) -> list[str]:
    """Titles of the models of a comparison whose training is not over, and which are not read."""
    command, config = read_config(Path(folder) / "config.toml")
    if command == "train":
        return []
    return [
        model_class(name).title for name in config.models if not _is_trained(Path(folder) / name)
    ]


def _read_model(folder: Path, config: RunConfig) -> Run:
    if not _is_trained(folder):
        raise ValueError(
            f"run {folder}: expected a trained model, found none; finish it with "
            f"mmzoo train --config {folder}/config.toml --resume"
        )
    vae = model_class(config.models[0]).from_pretrained(folder).eval()
    history, table, checks = (folder / f"{name}.nc" for name in ("history", "table", "checks"))
    return Run(
        folder,
        config,
        vae,
        _read(history, "the history of a training", lambda found: "stopped" in found.attrs),
        _read(table, "a table of likelihoods", lambda found: "mean" in found)
        if table.is_file()
        else None,
        _read_checks(checks) if checks.is_file() else None,
    )


def _save(dataset: xr.Dataset, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    dataset.to_netcdf(part, engine="h5netcdf")
    os.replace(part, path)


def _read(path: Path, what: str, fits: Callable[[xr.Dataset], bool]) -> xr.Dataset:
    try:
        with xr.open_dataset(path, engine="h5netcdf") as dataset:
            found = dataset.load()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a NetCDF file, found none that can be read ({error}); "
            "train or evaluate the model again"
        ) from error
    _need(path, what, fits(found), found)
    return found


def _read_checks(path: Path) -> xr.DataTree:
    found = load_datatree(path)
    _need(path, "a group for each check", bool(found.children), found)
    return found


def _need(path: Path, what: str, fits: bool, found: xr.Dataset | xr.DataTree) -> None:
    if not fits:
        names = ", ".join(map(str, found.data_vars)) or "nothing"
        raise ValueError(
            f"{path}: expected {what}, found a file of {names}; train or evaluate the model again"
        )


# Evaluating -------------------------------------------------------------------------------------


def evaluate_run(
    run: Run,
    *,
    train: MultimodalDataset | None = None,
    test: MultimodalDataset | None = None,
    num_samples: int | None = None,
    prior_share: float | None = None,
    limit: int | None = None,
    checks: bool = True,
    classifiers: Mapping[str, ClassifierLike] | None = None,
    on_chunk: OnChunk | None = None,
) -> Run:
    """Likelihoods, accuracies, checks and the ArviZ export of a model, kept in its folder.

    Args:
        run: The trained model.
        train: Training rows, if they are at hand.
        test: Test rows, if they are at hand.
        num_samples: Importance samples of each row; default: as configured.
        prior_share: Share of them that the prior gives; default: as configured.
        limit: Only the first so many test rows.
        checks: Whether to run :func:`mmzoo.evaluation.checks.check_model`, too.
        classifiers: For the checks; default: those of
            :func:`mmzoo.evaluation.checks.default_classifiers`.
        on_chunk: As in :func:`mmzoo.evaluation.likelihood_table`; checks have no rows to count.
    """
    config, vae = run.config, run.vae
    if test is None or (checks and train is None):
        found = load_data(config)
        train, test = (
            known if known is not None else new
            for known, new in zip((train, test), found, strict=True)
        )
    if limit is not None:
        test = test.subset(range(min(len(test), limit)))
    num_samples = config.num_samples if num_samples is None else num_samples
    prior_share = config.prior_share if prior_share is None else prior_share
    vae.to(_device(config.device))
    x, observed = test.tensors()
    table = likelihood_table(
        {vae.title: vae},
        x,
        observed,
        num_samples=num_samples,
        prior_share=prior_share,
        seed=config.seed,
        on_chunk=on_chunk,
    )
    accuracy = class_accuracy(vae, test, seed=config.seed)
    table["accuracy"] = xr.DataArray(
        np.array([list(accuracy.values())]),
        dims=("model", "predicted"),
        coords={"predicted": list(accuracy)},
    )
    table.attrs |= _identity(config, len(test))
    few = test.subset(range(min(len(test), _KEPT_ROWS)))
    x, observed = few.to(_device(config.device)).tensors()
    tree = to_datatree(
        vae,
        x,
        observed,
        labels=few.labels,
        num_draws=_KEPT_DRAWS,
        num_samples=num_samples,
        prior_share=prior_share,
        seed=config.seed,
    )
    save_datatree(tree, run.folder / "evaluation.nc")
    checked = None
    (run.folder / "checks.nc").unlink(missing_ok=True)
    if checks:
        assert train is not None
        checked = check_model(
            vae,
            test,
            train=train,
            classifiers=default_classifiers(train) if classifiers is None else classifiers,
            prior_share=prior_share,
            seed=config.seed,
            on_check=_telling_checks(vae.title, on_chunk),
        )
        save_datatree(checked, run.folder / "checks.nc")
    _save(table, run.folder / "table.nc")  # the last one: its presence says that all is there
    vae.to("cpu")
    return dataclasses.replace(run, table=table, checks=checked)


def _telling_checks(title: str, on_chunk: OnChunk | None) -> Callable[[str, int, int], None] | None:
    if on_chunk is None:
        return None
    return lambda name, done, total: on_chunk(f"{title} {name.replace('_', ' ')}", 0, 0)


def _identity(config: RunConfig, rows: int) -> dict[str, Any]:
    """What tables must share to be compared."""
    return {
        "data": config.data,
        "binarize": config.binarize,
        "data_seed": _data_seed(config),
        "rows": rows,
    }


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


@torch.no_grad()
def class_accuracy(
    vae: MultimodalVAE, rows: MultimodalDataset, *, num_draws: int = _ACCURACY_DRAWS, seed: int = 0
) -> dict[str, float]:
    """How often the likeliest class is the true one, each class given all other modalities.

    The probabilities are ``mean_k p(label | z_k)`` with ``z_k ~ q(z | the others)``.

    Args:
        vae: The model.
        rows: The rows; those that lack the class, or everything else, do not count.
        num_draws: K.
        seed: Of the draws.

    Returns:
        A name such as ``"label | image"`` to the share of rows; NaN for a model that has no
        posterior given the others.
    """
    result = {}
    for name, modality in vae.modalities.items():
        others = [other for other in vae.modalities if other != name]
        if modality.likelihood.name not in ("one_hot_categorical", "categorical") or not others:
            continue
        if name in vae.always_given:
            continue
        if modality.likelihood.name == "categorical" and modality.event_shape:
            continue
        if unanswered(vae, tuple(others)):
            result[f"{name} | {', '.join(others)}"] = math.nan
            continue
        right = []
        with seeded(seed), vae.unregistered():
            for x, observed in rows.batches(_ACCURACY_ROWS):
                right.append(_right(vae, name, x, observed, num_draws))
        result[f"{name} | {', '.join(others)}"] = float(torch.cat(right).double().mean())
    return result


def _right(
    vae: MultimodalVAE, name: str, x: dict[str, Any], observed: dict[str, Any], num_draws: int
) -> torch.Tensor:
    """Whether the likeliest class is right, for the rows that have it and something else."""
    device = vae.generative.prior_loc.device
    batch = vae.check(
        {key: value.to(device) for key, value in x.items()},
        {k: v.to(device) for k, v in observed.items()},
    )
    mask = batch.mask(vae.modalities)
    index = list(vae.modalities).index(name)
    if mask is None:
        kept = torch.ones(batch.shape[-1], dtype=torch.bool, device=device)
    else:
        others = torch.cat([mask[..., :index], mask[..., index + 1 :]], -1)
        kept = mask[..., index] & others.any(-1)
    values = {key: value for key, value in batch.x.items() if value is not None}
    masks = {key: value for key, value in batch.observed.items() if value is not None}
    given = {key: value[kept] for key, value in values.items() if key != name}
    seen = {key: value[kept] for key, value in masks.items() if key in given}
    q = vae.posterior(given, seen)
    z = q.sample((num_draws,))
    p = vae.decode(z, x=given)[name] if vae.always_given else vae.likelihood(name, z)
    one_hot = vae.modalities[name].likelihood.name == "one_hot_categorical"
    found = (p.mean if one_hot else p.probs).mean(0).argmax(-1)
    truth = values[name][kept]
    return found == (truth.argmax(-1) if one_hot else truth)


# Summaries --------------------------------------------------------------------------------------


def merge_tables(runs: Sequence[Run], *, unfinished: Sequence[str] = ()) -> xr.Dataset:
    """One table of evaluated models; its attribute ``remarks`` says what a reader must know.

    Args:
        runs: The models.
        unfinished: Titles of those that should be there, see :func:`unfinished_models`.

    Raises:
        ValueError: For a model that was not evaluated, or evaluations of different rows.
    """
    tables = []
    titles = _titles(runs)
    for run, title in zip(runs, titles, strict=True):
        if run.table is None:
            raise ValueError(
                f"run {run.folder}: expected likelihoods, found none; run "
                f"mmzoo evaluate {run.folder}"
            )
        tables.append(run.table.assign_coords(model=[title]))
    for run, table in zip(runs, tables, strict=True):
        for key, value in tables[0].attrs.items():
            if table.attrs.get(key) != value and key not in (*_SETTINGS, "seed"):
                raise ValueError(
                    f"run {run.folder}: expected likelihoods of the same rows as in "
                    f"{runs[0].folder}, found {key} = {table.attrs.get(key)} instead of "
                    f"{value}; compare runs of one data set, seed and size"
                )
    merged = xr.concat(tables, "model", join="outer", combine_attrs="override")
    unlike = _unlike(dict(zip(titles, tables, strict=True)))
    if unlike:
        for key in _SETTINGS:
            merged.attrs.pop(key, None)
    diverged = any(run.diverged for run in runs)
    absent = f"Not finished, left out: {', '.join(unfinished)}." if unfinished else ""
    remarks = (unlike, _DIVERGED * diverged, absent)
    merged.attrs["remarks"] = [remark for remark in remarks if remark]
    return merged


def _unlike(tables: Mapping[str, xr.Dataset]) -> str:
    """With which settings each model was evaluated, if they are not the same."""
    found = {k: [each.attrs.get(key, 0) for key in _SETTINGS] for k, each in tables.items()}
    if len(set(map(tuple, found.values()))) == 1:
        return ""
    each = (f"{k} {num} ({100 * share:g} %)" for k, (num, share) in found.items())
    return f"Importance samples (share of them from the prior): {', '.join(each)}."


def _titles(runs: Sequence[Run]) -> list[str]:
    """Title of each model, and whether it diverged; the folder is added where two are the same."""
    titles = [run.vae.title + " (diverged)" * run.diverged for run in runs]
    return [
        title if titles.count(title) == 1 else f"{title} ({run.folder})"
        for title, run in zip(titles, runs, strict=True)
    ]


def write_summary(
    runs: Sequence[Run],
    folder: str | os.PathLike[str],
    command: str,
    *,
    unfinished: Sequence[str] = (),
    on_model: Callable[[str], None] | None = None,
) -> xr.Dataset:
    """Writes the tables, the figures and `report.html` of evaluated models.

    The tables are `table.csv`, `table.md` and `table.tex`, and `differences.csv`, the paired
    differences to the best model, which stand in `table.md` as well. Evaluations that an older
    version wrote without the values of single rows have no differences.

    Args:
        runs: The models.
        folder: Where to write.
        command: The command that repeats the run, for the report.
        unfinished: Titles of models that should be there, see :func:`unfinished_models`.
        on_model: Called with the title of each model before its pictures are drawn.

    Returns:
        The table.
    """
    from mmzoo.evaluation.figures_likelihood import plot_likelihood_table
    from mmzoo.evaluation.figures_training import training_figure
    from mmzoo.evaluation.report import write_report

    folder = Path(folder)
    table = merge_tables(runs, unfinished=unfinished)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tables(table, folder)
    histories = {  # a model may diverge before there is anything to draw
        title: run.history
        for title, run in zip(_titles(runs), runs, strict=True)
        if run.history.sizes.get("epoch", 0)
    }
    pictures = folder / "figures"
    pictures.mkdir(exist_ok=True)
    (pictures / "training.png").unlink(missing_ok=True)
    if histories:
        _save_figure(training_figure(histories), pictures / "training.png")
    _save_figure(plot_likelihood_table(table), pictures / "likelihoods.png")
    _, test = load_data(runs[0].config)
    captions = {}
    for title, run in zip(_titles(runs), runs, strict=True):
        if on_model:
            on_model(title)
        for kind, (caption, figure) in _pictures(run.vae, test, run.config.seed).items():
            path = pictures / f"{_slug(title)}-{kind}.png"
            _save_figure(figure, path)
            captions[f"{title}. {caption}"] = path
    first = runs[0].config
    write_report(
        folder / "report.html",
        title=f"Multimodal VAEs on {DATASETS[first.data].title}",
        table=table,
        histories=histories,
        figures=captions,
        checks={
            title: run.checks
            for title, run in zip(_titles(runs), runs, strict=True)
            if run.checks is not None
        },
        config={run.folder.name: run.config.as_dict() for run in runs},
        command=command,
        lead=_lead(table, first),
    )
    return table


def _write_tables(table: xr.Dataset, folder: Path) -> None:
    to_csv(table, folder / "table.csv")
    (folder / "table.tex").write_text(to_latex(table), encoding="utf-8")
    text = to_markdown(table)
    (folder / "differences.csv").unlink(missing_ok=True)
    if "log_prob" in table:
        differences = paired_differences(table)
        to_csv(differences, folder / "differences.csv")
        if table.sizes["model"] > 1:
            text += f"\n{to_markdown(differences)}"
    (folder / "table.md").write_text(text, encoding="utf-8")


def _lead(table: xr.Dataset, config: RunConfig) -> str:
    info = DATASETS[config.data]
    count = table.attrs.get("num_samples")
    samples = "importance sampling" if count is None else f"{count} importance samples each"
    return (
        f"{info.description} Likelihoods of {table.attrs['rows']} test rows with {samples}. "
        f"Data: {info.source}, {info.url}"
    )


def _pictures(
    vae: MultimodalVAE, test: MultimodalDataset, seed: int
) -> Mapping[str, tuple[str, Figure]]:
    from mmzoo.evaluation.figures_latents import plot_traversal
    from mmzoo.evaluation.figures_planes import plot_latent_plane
    from mmzoo.evaluation.figures_samples import plot_reconstructions, plot_samples

    x, observed = test.subset(range(min(len(test), _PICTURE_ROWS))).tensors()
    found: dict[str, tuple[str, Any]] = {
        "reconstructions": (
            "Test rows on top, below what the model makes of each observed subset.",
            plot_reconstructions(vae, x, observed, num_rows=_PICTURE_ROWS, seed=seed).figure,
        ),
    }
    if not vae.always_given:  # without its condition a conditional model has no samples
        found["samples"] = ("Samples from the prior.", plot_samples(vae, seed=seed).figure)
    for site in vae.latent_sites:
        found[f"traversal-{site}"] = (
            f"What single dimensions of {site} do: across, quantiles of the prior; the rest stays "
            "at the posterior mean of the first test row. Those that change most.",
            plot_traversal(vae, x, observed, site=site, seed=seed).figure,
        )
    if test.labels:
        label, values = next(iter(test.labels.items()))
        x, observed = test.subset(range(min(len(test), _PLANE_ROWS))).tensors()
        plane = plot_latent_plane(vae, x, values[:_PLANE_ROWS], observed, seed=seed)
        found["latents"] = (f"Latents given each observed subset, coloured by {label}.", plane)
    return found


def _slug(title: str) -> str:
    return "".join(each if each.isalnum() else "-" for each in title.lower()).strip("-")


def _save_figure(figure: Figure | SubFigure, path: Path) -> None:
    whole = figure.get_figure(root=True)
    assert whole is not None
    whole.savefig(path, facecolor="white")
