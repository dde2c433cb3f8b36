"""The command line: a thin face over the library.

`mmzoo compare --data digits` trains a selection of models and prints their marginal likelihoods.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand, TyperGroup, TyperOption

if TYPE_CHECKING:
    import xarray as xr

    from mmzoo.config import RunConfig
    from mmzoo.evaluation.runs import OnChunk, Run
    from mmzoo.vae import MultimodalVAE

__all__ = ["app", "main"]

_DIVERGED, _ERROR, _INTERRUPTED = 1, 2, 130
_EXPECTED = (ValueError, TypeError, OSError)


class _OneLineErrors(TyperGroup):
    """Says what is wrong in one line; ``--debug``, anywhere, shows the traceback instead."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words
        words = [word for word in words if word != "--debug"]
        options.pop("standalone_mode", None)
        try:
            sys.exit(super().main(words, *rest, **{**options, "standalone_mode": False}))
        except typer.Abort:
            sys.exit(_INTERRUPTED)
        except Exception as error:
            usage = hasattr(error, "format_message")
            if debug or not (usage or isinstance(error, _EXPECTED)):
                raise
            print(f"mmzoo: error: {_first_paragraph(error)}", file=sys.stderr)
            sys.exit(_ERROR)


class _SaysDefaults(TyperCommand):
    """Help with the defaults of the configuration, which are read when help is asked for."""

    def format_help(self, *given: Any) -> None:
        """Writes the help."""
        from mmzoo.config import defaults

        said = defaults()
        for param in self.params:
            if isinstance(param, TyperOption) and param.name in said:
                param.show_default = said[param.name]
        super().format_help(*given)


def _first_paragraph(error: Any) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}; check the path, or choose another --out"
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    # Pyro appends the shapes of all sites to what a model or guide raises.
    text = text.split("Trace Shapes:")[0].strip().split("\n\n")[0]
    text = text.replace("use download=True", "fetch it with mmzoo data --download NAME")
    return " ".join(text.split())


app = typer.Typer(
    cls=_OneLineErrors,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Runs the command line."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """A zoo of multimodal variational autoencoders.

    Start with [bold]mmzoo compare --data digits[/bold].
    """
    if version:
        from mmzoo import __version__

        print(f"mmzoo {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


# Arguments ----------------------------------------------------------------------------------------

_Data = Annotated[str | None, typer.Option("--data", help="Data set; see `mmzoo data`.")]
_Root = Annotated[
    Path | None,
    typer.Option("--root", help="Folder of the data sets.", envvar="MMZOO_DATA"),
]
_Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run.")]
_Config = Annotated[Path | None, typer.Option("--config", help="Repeat this config.toml.")]
_Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the rows.")]
_Batch = Annotated[int | None, typer.Option("--batch-size", help="Rows for each step.")]
_Rate = Annotated[float | None, typer.Option("--learning-rate", help="Of Adam.")]
_Latent = Annotated[int | None, typer.Option("--latent-dim", help="Size of z.")]
_Network = Annotated[str | None, typer.Option("--network", help="mlp, conv or default.")]
_Hidden = Annotated[
    list[int] | None, typer.Option("--hidden", help="Width of a layer of mlp; once for each layer.")
]
_Binarize = Annotated[
    str | None,
    typer.Option("--binarize", help="Pixels drawn fixed, anew in each epoch, or none (grey)."),
]
_Seed = Annotated[int | None, typer.Option("--seed", help="Of everything random.")]
_DataSeed = Annotated[
    int | None,
    typer.Option("--data-seed", help="Of split, binarisation and missingness alone."),
]
_Missing = Annotated[
    list[str] | None,
    typer.Option("--missing", help="label=0.5: half of the training rows lack their label."),
]
_Limit = Annotated[int | None, typer.Option("--limit", help="Only the first so many rows.")]
_TestRows = Annotated[
    int | None, typer.Option("--test-rows", help="Only the first so many test rows.")
]
_Option = Annotated[
    list[str] | None,
    typer.Option("--option", help="beta=2 of train; mvae.beta=2 of compare."),
]
_Samples = Annotated[
    int | None, typer.Option("--num-samples", help="Importance samples of each row.")
]
_PriorShare = Annotated[
    float | None,
    typer.Option("--prior-share", help="Share of the samples that the prior gives, not the guide."),
]
_Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
_Threads = Annotated[int | None, typer.Option("--threads", help="Threads of the processor.")]
_Checks = Annotated[
    bool, typer.Option("--checks/--no-checks", help="Calibration, coherence, probes and so on.")
]
_Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep the finished models of --out; one that was interrupted starts from epoch 1.",
    ),
]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove what --out holds.")]


# Commands -----------------------------------------------------------------------------------------


@app.command()
def models(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As the table of the README.")
    ] = False,
) -> None:
    """List the models."""
    from mmzoo.data import DATASETS
    from mmzoo.models import MODELS

    if markdown:
        print(_markdown_of_models())
        return
    table = _new_table(leading=1)
    table.add_column("model", no_wrap=True)
    table.add_column("paper, posterior, objective")
    table.add_column("latents, modalities", no_wrap=True)
    for name, cls in MODELS.items():
        what = f"{cls.paper}\n{cls.posterior_kind}\n{cls.objective_name}"
        table.add_row(
            f"[bold]{name}[/bold]\n{cls.title}\n{cls.year}",
            what,
            f"{cls.latents}\n{_limits(cls)}",
        )
    _console().print(table, highlight=False)
    least = min(len(info.modalities) for info in DATASETS.values())
    few = [cls.title for cls in MODELS.values() if (cls.max_modalities or least) < least]
    _console().print(
        f"Every data set of the command line has at least {least} modalities; {', '.join(few)} "
        "and Linear, which takes Gaussian ones only, are trained from Python.",
        highlight=False,
    )


def _limits(cls: type[MultimodalVAE]) -> str:
    """How many modalities a model takes."""
    least, most = cls.min_modalities, cls.max_modalities
    if most is None:
        return f"{least} or more"
    return str(most) if most == least else f"{least} to {most}"


def _markdown_of_models() -> str:
    from mmzoo.models import MODELS

    lines = [
        "| name | model | year | latents | posterior q(z given x_S) | objective | modalities |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cls in sorted(MODELS.items(), key=lambda item: (item[1].year, item[0])):
        title = f"[{cls.title}]({cls.url})" if cls.url else cls.title
        cells = (cls.latents, cls.posterior_kind, cls.objective_name, _limits(cls))
        lines.append(f"| `{name}` | {title} | {cls.year} | {' | '.join(cells)} |")
    return "\n".join(lines)


@app.command()
def data(
    root: _Root = None,
    download: Annotated[
        str | None, typer.Option("--download", help="Fetch this data set to --root first.")
    ] = None,
) -> None:
    """List the data sets and whether their files are there."""
    from mmzoo.data import DATASETS, load

    if download is not None:
        _check_data(download)
        if DATASETS[download].needs_root:
            load(download, root, download=True)

    table = _new_table(leading=1)
    table.add_column("data set", no_wrap=True)
    table.add_column("modalities, source")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("files", no_wrap=True)
    for name, info in DATASETS.items():
        what = f"{', '.join(info.modalities)}\n{info.source}\n{info.url} ({info.licence})"
        rows = "\n".join((f"{info.rows[0]:,} train", f"{info.rows[1]:,} test"))
        found = "[green]built in[/]"
        if info.needs_root:
            found = "[green]found[/]" if _is_there(name, root) else "[yellow]missing[/]"
        table.add_row(f"[bold]{name}[/bold]\n{info.title}", what, rows, found)
    _console().print(table, highlight=False)
    where = "no --root and no MMZOO_DATA" if root is None else str(root)
    _console().print(f"Files are looked for under: {where}", soft_wrap=True, highlight=False)


def _check_data(name: str) -> None:
    from mmzoo.data import DATASETS

    if name not in DATASETS:
        raise ValueError(f"data set {name!r}: unknown; known data sets: {', '.join(DATASETS)}")


def _is_there(name: str, root: Path | None) -> bool:
    from mmzoo.data import load

    try:
        load(name, root, binarize=None)
    except (OSError, ValueError):
        return False
    return True


@app.command(cls=_SaysDefaults)
def train(
    model: Annotated[str | None, typer.Argument(help="See `mmzoo models`.")] = None,
    data: _Data = None,
    root: _Root = None,
    out: _Out = None,
    config: _Config = None,
    epochs: _Epochs = None,
    batch_size: _Batch = None,
    learning_rate: _Rate = None,
    latent_dim: _Latent = None,
    network: _Network = None,
    hidden: _Hidden = None,
    binarize: _Binarize = None,
    seed: _Seed = None,
    data_seed: _DataSeed = None,
    missing: _Missing = None,
    limit: _Limit = None,
    test_rows: _TestRows = None,
    option: _Option = None,
    num_samples: _Samples = None,
    prior_share: _PriorShare = None,
    device: _Device = None,
    threads: _Threads = None,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
) -> None:
    """Train one model and keep it in a run folder."""
    from mmzoo.evaluation.runs import read_run

    given = _given(locals())
    if model is not None:
        given["models"] = (model,)
    made = _configure("train", config, data, given)
    made = made.replace(options=_options(option, made.models, nested=False))
    name = made.models[0]
    folder = out or Path("runs") / f"{made.data}-{name}"
    rows = _prepare(made, folder, "train", resume, overwrite)
    if resume and (folder / "history.nc").is_file():
        run = read_run(folder)[0]
        print(f"{folder}: is trained already")
    else:
        with _interruptible(folder, made, single=True):
            run = _train(made, name, folder, rows)
        print(f"Kept in {folder}. Next: mmzoo evaluate {folder}")
    if run.diverged:
        raise typer.Exit(_DIVERGED)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of train or compare.")],
    num_samples: _Samples = None,
    prior_share: _PriorShare = None,
    limit: _Limit = None,
    checks: _Checks = True,
    threads: _Threads = None,
) -> None:
    """Estimate likelihoods and run the checks of the models in a run folder."""
    from mmzoo.config import check_prior_share
    from mmzoo.evaluation.checks import default_classifiers
    from mmzoo.evaluation.runs import evaluate_run, load_data, merge_tables

    check_prior_share(prior_share or 0.0)
    for name, value in (("num_samples", num_samples), ("limit", limit), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
    _set_threads(threads)
    runs, unfinished = _read_runs([run])
    train, test = load_data(runs[0].config)
    with _console().status("classifiers of real rows"):
        classifiers = default_classifiers(train) if checks else None
    done = []
    for each in runs:
        with _evaluation_bar(each, limit or len(test)) as on_chunk:
            done.append(
                evaluate_run(
                    each,
                    train=train,
                    test=test,
                    num_samples=num_samples,
                    prior_share=prior_share,
                    limit=limit,
                    checks=checks,
                    classifiers=classifiers,
                    on_chunk=on_chunk,
                )
            )
    _print_table(merge_tables(done, unfinished=unfinished))
    print(f"Kept in {run}. Next: mmzoo report {run}")


@app.command(cls=_SaysDefaults)
def compare(
    context: typer.Context,
    runs: Annotated[list[Path] | None, typer.Argument(help="Evaluated runs.")] = None,
    data: _Data = None,
    models: Annotated[
        str | None, typer.Option("--models", help="Names, with commas between them, or: all.")
    ] = None,
    root: _Root = None,
    out: _Out = None,
    config: _Config = None,
    epochs: _Epochs = None,
    batch_size: _Batch = None,
    learning_rate: _Rate = None,
    latent_dim: _Latent = None,
    network: _Network = None,
    hidden: _Hidden = None,
    binarize: _Binarize = None,
    seed: _Seed = None,
    data_seed: _DataSeed = None,
    missing: _Missing = None,
    limit: _Limit = None,
    test_rows: _TestRows = None,
    option: _Option = None,
    num_samples: _Samples = None,
    prior_share: _PriorShare = None,
    device: _Device = None,
    threads: _Threads = None,
    checks: _Checks = True,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
) -> None:
    """Train and evaluate several models and print their table; or print that of finished runs."""
    from mmzoo.evaluation.checks import default_classifiers

    if runs:
        _only_given(context, ("runs", "out"))
        _compare_runs(runs, out)
        return
    given = _given(locals())
    chosen = (
        None if models is None else [name.strip() for name in models.split(",") if name.strip()]
    )
    if chosen == ["all"]:
        chosen = _models_for(config, data, given)
    if chosen is not None:
        given["models"] = tuple(chosen)
    made = _configure("compare", config, data, given)
    made = made.replace(options=_options(option, made.models, nested=True))
    folder = out or Path("runs") / made.data
    rows = _prepare(made, folder, "compare", resume, overwrite)
    with _interruptible(folder, made):

        @functools.cache
        def classifiers() -> Mapping[str, Any] | None:
            with _console().status("classifiers of real rows"):
                return default_classifiers(rows[0]) if checks else None

        finished = [_finish(made, name, folder / name, rows, classifiers) for name in made.models]
        _summarise(finished, [], folder, made.command("compare"))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Evaluated runs.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the report; needed for more than one run."),
    ] = None,
) -> None:
    """Write tables, pictures and one self-contained page about evaluated runs."""
    if out is None and len(runs) > 1:
        raise ValueError(
            f"report: expected --out with {len(runs)} runs, found none; name the folder of the "
            "report about them all"
        )
    folder = out or runs[0]
    command = f"mmzoo report {' '.join(map(str, runs))}"
    _summarise(*_read_runs(runs), folder, command, show=False)


# From words to configurations ---------------------------------------------------------------------


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command that are fields of a configuration."""
    sizes = ("epochs", "batch_size", "learning_rate", "latent_dim", "network", "binarize", "seed")
    plain = (
        *sizes,
        "data_seed",
        "limit",
        "test_rows",
        "num_samples",
        "prior_share",
        "device",
        "threads",
    )
    given = {name: arguments[name] for name in plain}
    root = arguments["root"]
    given["root"] = None if root is None else str(root)
    given["hidden"] = tuple(arguments["hidden"] or ()) or None
    given["missing"] = _fractions(arguments["missing"])
    return given


def _only_given(context: typer.Context, allowed: Sequence[str]) -> None:
    """Refuses what the command line says, not the environment, beside the allowed arguments."""
    others = [
        param.opts[0]
        for param in context.command.params
        if param.name not in allowed
        and getattr(context.get_parameter_source(param.name or ""), "name", "") == "COMMANDLINE"
    ]
    if others:
        raise ValueError(
            f"compare: expected RUN folders or what to train, found both: {', '.join(others)}; "
            "leave out one of them (finished runs are compared as they are)"
        )


def _pair(flag: str, text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise ValueError(f"{flag} {text!r}: expected name=value")
    return name.strip(), value.strip()


def _models_for(path: Path | None, data: str | None, given: Mapping[str, Any]) -> list[str]:
    """The models that take the modalities of the data; says why the others do not."""
    from mmzoo.evaluation.runs import build, load_data
    from mmzoo.models import MODELS

    config = _configure("compare", path, data, given)
    _check_data(config.data)
    modalities = load_data(dataclasses.replace(config, missing={}))[0].modalities or ()
    found = []
    for name in MODELS:
        try:
            build(dataclasses.replace(config, options={}), name, modalities)
            found.append(name)
        except ValueError as error:
            print(f"{name}: left out, {error}")
    return found


def _fractions(texts: Sequence[str] | None) -> dict[str, float] | None:
    fractions = {}
    for name, value in (_pair("--missing", text) for text in texts or ()):
        try:
            fractions[name] = float(value)
        except ValueError:
            fractions[name] = math.nan
        if not 0.0 <= fractions[name] <= 1.0:
            raise ValueError(f"--missing {name}={value}: expected a fraction between 0 and 1")
    return fractions or None


def _options(
    texts: Sequence[str] | None, models: Sequence[str], *, nested: bool
) -> dict[str, dict[str, Any]] | None:
    """Options by model; values are TOML, or else text."""
    options: dict[str, dict[str, Any]] = {}
    for name, value in (_pair("--option", text) for text in texts or ()):
        model, dot, key = name.partition(".") if nested else (models[0], ".", name)
        if not dot or model not in models:
            raise ValueError(
                f"--option {name}={value}: expected MODEL.name=value with one of the models "
                f"{', '.join(models)}"
            )
        options.setdefault(model, {})[key] = _parse(value)
    return options or None


def _parse(text: str) -> Any:
    if text.lower() in ("true", "false"):  # TOML has no capitals, Python has
        return text.lower() == "true"
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return values["value"] if list(values) == ["value"] else text


def _configure(
    command: str, path: Path | None, data: str | None, given: Mapping[str, Any]
) -> RunConfig:
    from mmzoo.config import RunConfig, read_config

    if path is None:
        if data is None or (command == "train" and "models" not in given):
            wanted = "MODEL and --data" if command == "train" else "RUN folders, --data"
            raise ValueError(f"{command}: expected {wanted} or --config; see mmzoo {command} -h")
        return RunConfig.make(data, **given)
    wrote, made = read_config(path)
    if wrote != command:
        raise ValueError(f"{path}: was written by mmzoo {wrote}; use mmzoo {wrote} --config {path}")
    return made.replace(data=data, **given)


def _prepare(
    config: RunConfig, folder: Path, command: str, resume: bool, overwrite: bool
) -> tuple[Any, Any]:
    """Everything that can go wrong goes wrong here, before the first model is trained."""
    from mmzoo.evaluation.runs import check_step, load_data, model_class, prepare_folder

    for name in config.models:
        model_class(name)
    _set_threads(config.threads)
    _check_device(config.device)
    _check_data(config.data)
    rows = load_data(config)
    for name in config.models:
        check_step(config, name, rows[0])
    prepare_folder(folder, config, command, resume=resume, overwrite=overwrite)
    return rows


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device, found none; use --device cpu")


# Work ---------------------------------------------------------------------------------------------


def _train(config: RunConfig, model: str, folder: Path, rows: tuple[Any, Any]) -> Run:
    """A trained model; says in a line of its own if it diverged."""
    from mmzoo.evaluation.runs import train_run

    with warnings.catch_warnings():
        # fit's own and Pyro's about a loss that is not finite, said below.
        warnings.filterwarnings("ignore", message="fit: the loss of|Encountered ")
        run = train_run(config, model, folder, data=rows)
    if run.diverged:
        print(
            f"mmzoo: {run.vae.title}: training stopped in epoch "
            f"{run.history.sizes.get('epoch', 0) + 1} since the loss is not finite; kept are its "
            f"last good weights. Try a --learning-rate below {config.learning_rate:g}",
            file=sys.stderr,
        )
    return run


def _finish(
    config: RunConfig,
    model: str,
    folder: Path,
    rows: tuple[Any, Any],
    classifiers: Callable[[], Mapping[str, Any] | None],
) -> Run:
    """A trained and evaluated model, from its folder as far as it is there."""
    from mmzoo.evaluation.runs import evaluate_run, read_run

    if (folder / "history.nc").is_file():
        run = read_run(folder)[0]
        if run.table is not None:
            print(f"{run.vae.title}: finished already, from {folder}")
            return run
    else:
        run = _train(config, model, folder, rows)
    judges = classifiers()
    with _evaluation_bar(run, len(rows[1])) as on_chunk:
        return evaluate_run(
            run,
            train=rows[0],
            test=rows[1],
            checks=judges is not None,
            classifiers=judges,
            on_chunk=on_chunk,
        )


@contextmanager
def _interruptible(folder: Path, config: RunConfig, *, single: bool = False) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        kept = [name for name in config.models if (folder / name / "history.nc").is_file()]
        text = f"mmzoo: interrupted; {folder} keeps {', '.join(kept) or 'no finished model'}"
        if not single:
            text += "; add --resume to go on"
        print(f"\n{text}", file=sys.stderr)
        raise typer.Exit(_INTERRUPTED) from None


def _read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The models of some runs, and the titles of those that are not finished, which it tells."""
    from mmzoo.evaluation.runs import read_run, unfinished_models

    runs = [run for folder in folders for run in read_run(folder)]
    absent = [title for folder in dict.fromkeys(folders) for title in unfinished_models(folder)]
    for title in absent:
        print(f"{title}: not finished, left out")
    return list({run.folder.resolve(): run for run in runs}.values()), absent


def _compare_runs(folders: Sequence[Path], out: Path | None) -> None:
    from mmzoo.evaluation.runs import merge_tables

    runs, unfinished = _read_runs(folders)
    if out is None:
        _print_table(merge_tables(runs, unfinished=unfinished))
    else:
        _summarise(runs, unfinished, out, f"mmzoo compare {' '.join(map(str, folders))}")


def _summarise(
    runs: Sequence[Run], unfinished: Sequence[str], folder: Path, command: str, *, show: bool = True
) -> None:
    from mmzoo.evaluation.runs import merge_tables, write_summary

    if show:
        _print_table(merge_tables(runs, unfinished=unfinished))
    with _console().status("tables, pictures and the report") as status:
        write_summary(
            runs,
            folder,
            command,
            unfinished=unfinished,
            on_model=lambda title: status.update(f"pictures of {title}"),
        )
    print(f"Kept in {folder}. Open {folder / 'report.html'}")


# What is shown ------------------------------------------------------------------------------------


def _console() -> Console:
    return Console()


def _new_table(**options: Any) -> Table:
    from rich import box

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", **options)


@contextmanager
def _evaluation_bar(run: Run, rows: int) -> Iterator[OnChunk]:
    """A bar over the rows of every marginal likelihood."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    names = len(run.vae.modalities)
    marginals = 1 + names * (names > 1) + names * (names > 2)
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[quantity]}"),
        TimeRemainingColumn(),
    )
    done = 0
    with Progress(*columns) as progress:
        task = progress.add_task(run.vae.title, total=marginals * rows, quantity="")

        def on_chunk(title: str, some: int, total: int) -> None:
            nonlocal done
            progress.update(
                task,
                completed=done + some,
                quantity=title.removeprefix(f"{run.vae.title} "),
            )
            done += total * (some == total)

        yield on_chunk
        progress.update(task, completed=marginals * rows, quantity="evaluated")


def _print_table(table: xr.Dataset) -> None:
    """The table, in as many pieces as the width asks for."""
    from mmzoo.evaluation.runs import table_cells, table_note

    console = _console()
    columns = table_cells(table)
    names = [str(model) for model in table["model"].values]
    for piece in _pieces(columns, max(map(len, [*names, "model"])), console.width):
        shown = _new_table()
        shown.add_column("model", no_wrap=True)
        for column in piece:
            shown.add_column(column, justify="right", no_wrap=True)
        for name in names:
            cells = (columns[column][name] for column in piece)
            shown.add_row(name, *(f"[yellow]{c}[/]" if "!" in c else c for c in cells))
        console.print(shown)
    console.print(table_note(table), style="dim", highlight=False)


def _pieces(
    columns: Mapping[str, Mapping[str, str]], first: int, width: int
) -> Iterator[list[str]]:
    """Columns that fit side by side, three blanks between them, with the models in front."""
    piece: list[str] = []
    edges, gap = 2, 3
    used = edges + first
    for name, cells in columns.items():
        size = gap + max(map(len, [name, *cells.values()]))
        if piece and used + size > width:
            yield piece
            piece, used = [], edges + first
        piece.append(name)
        used += size
    yield piece
