"""The command line: what it leaves behind, that it can be repeated, and what it says when wrong."""

import csv
import math
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import xarray as xr
from conftest import ROOT
from typer.testing import CliRunner, Result

import mmzoo.evaluation.runs as runs_module
from mmzoo import cli
from mmzoo.config import DEFAULT_MODELS, RunConfig, read_config, to_toml, write_config
from mmzoo.data import DATASETS, digits
from mmzoo.evaluation import load_datatree
from mmzoo.evaluation.runs import build, class_accuracy, load_data, read_run
from mmzoo.evaluation.tables import aggregate_seeds
from mmzoo.models import MODELS

TINY = "--data digits --limit 24 --epochs 1 --num-samples 8 --latent-dim 2 --hidden 8".split()
TWO = ["compare", *TINY, "--models", "mvae,mmvae"]


def call(*words: object, width: int = 80) -> Result:
    """Runs the command line in this process, in a terminal of that width."""
    return CliRunner().invoke(cli.app, list(map(str, words)), env={"COLUMNS": str(width)})


def works(*words: object, width: int = 80) -> str:
    """Runs a command that must work, and gives what it prints."""
    result = call(*words, width=width)
    assert result.exit_code == 0, result.output
    return result.output


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny comparison; tests do not change it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    try:
        works(*TWO, "--out", folder)
    finally:
        torch.set_default_dtype(before)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, without a folder of data sets; threads are given back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMZOO_DATA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# What is listed -----------------------------------------------------------------------------------


def test_models_are_listed() -> None:
    shown = works("models")
    assert all(name in shown and str(cls.year) in shown for name, cls in MODELS.items())
    said = " ".join(shown.split())
    assert "at least 2 modalities; VAE and Linear, which takes Gaussian ones only, are" in said


def test_data_sets_are_listed() -> None:
    shown = works("data", width=200)
    assert all(info.url in shown for info in DATASETS.values())
    assert shown.count("missing") == sum(info.needs_root for info in DATASETS.values())
    assert "built in" in shown


def test_files_are_found(data_root: Path) -> None:
    assert "found" in works("data", "--root", data_root)


def test_help_names_every_command() -> None:
    shown = works()
    assert works("--help") == shown
    for name in ("models", "data", "train", "evaluate", "compare", "report"):
        assert f" {name} " in shown
        assert "Usage" in works(name, "--help")


def test_help_says_what_an_interruption_costs() -> None:
    for command in ("train", "compare"):
        assert "starts from epoch 1" in " ".join(works(command, "--help", width=200).split())


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_says_the_defaults(command: str) -> None:
    shown = works(command, "--help", width=200)
    lines = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│ --")}
    general, own = RunConfig.make("mnist"), RunConfig.make("digits")
    for flag in ("epochs", "batch-size", "learning-rate", "latent-dim", "num-samples"):
        first, second = (getattr(each, flag.replace("-", "_")) for each in (general, own))
        said = f"{first}" if first == second else f"{first}; digits: {second}"
        assert f"[default: ({said})]" in lines[f"--{flag}"]
    for flag in ("binarize", "prior-share", "seed", "network", "device"):
        assert f"[default: ({getattr(general, flag.replace('-', '_'))})]" in lines[f"--{flag}"]
    assert "[default: (512, 512; digits: 256, 256)]" in lines["--hidden"]
    if command == "compare":
        assert f"[default: ({', '.join(DEFAULT_MODELS)})]" in lines["--models"]


def test_version() -> None:
    assert works("--version") == "mmzoo 0.1.0\n"


def test_listing_imports_nothing_heavy() -> None:
    heavy = {
        "lightning",
        "matplotlib",
        "seaborn",
        "sklearn",
        "torchvision",
        "arviz",
        "transformers",
    }
    code = (
        "import sys\nfrom mmzoo.cli import main\nsys.argv = ['mmzoo', 'models']\n"
        "try:\n    main()\nexcept SystemExit:\n"
        f"    print('heavy:', *({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["heavy:"]


# What a comparison leaves -------------------------------------------------------------------------


def test_comparison_leaves_a_run_folder(compared: Path) -> None:
    files = {path.relative_to(compared).as_posix() for path in compared.rglob("*")}
    assert {"config.toml", *runs_module._SUMMARY_FILES, "figures/training.png"} <= files
    for model in ("mvae", "mmvae"):
        assert {f"{model}/{name}" for name in (*runs_module._MODEL_FILES, "config.toml")} <= files
        assert f"figures/{model}-reconstructions.png" in files
        assert load_datatree(compared / model / "evaluation.nc")["posterior"].sizes["row"] == 24
        with xr.open_dataset(compared / model / "history.nc") as history:
            assert history.sizes["epoch"] == 1
    assert not [name for name in files if name.endswith(".part")]
    assert 'src="http' not in (compared / "report.html").read_text()


def test_table_holds_what_was_estimated(compared: Path) -> None:
    rows = read_csv(compared / "table.csv")
    found = {(row["model"], row["quantity"]): float(row["mean"]) for row in rows}
    for run in read_run(compared):
        assert run.table is not None
        for quantity in run.table["quantity"].values:
            mean = run.table["mean"].sel(quantity=quantity).item()
            assert found[run.vae.title, str(quantity)] == pytest.approx(mean, rel=1e-12)
            assert f"{mean:.2f} ± " in (compared / "table.md").read_text()
        chain = [found[run.vae.title, f"log p({each})"] for each in ("label", "image | label")]
        assert sum(chain) == pytest.approx(found[run.vae.title, "log p(image, label)"], rel=1e-9)


def test_differences_are_those_of_the_rows(compared: Path) -> None:
    first, second = (run.table for run in read_run(compared))
    assert first is not None and second is not None
    assert first.sizes["row"] == 24
    gap = (first["log_prob"].isel(model=0) - second["log_prob"].isel(model=0)).mean("row")
    found = {(row["model"], row["quantity"]): row for row in read_csv(compared / "differences.csv")}
    text = (compared / "table.md").read_text()
    for quantity in map(str, first["quantity"].values):
        best, other = ("MVAE", "MMVAE") if gap.sel(quantity=quantity) > 0 else ("MMVAE", "MVAE")
        assert float(found[best, quantity]["difference"]) == 0
        line = found[other, quantity]
        assert line["reference"] == best and float(line["num_rows"]) == 24
        expected = -abs(float(gap.sel(quantity=quantity)))
        assert float(line["difference"]) == pytest.approx(expected, rel=1e-9)
        assert f"{expected:+.2f} ± {float(line['standard_error']):.2f}" in text
    assert text.count("| model |") == 2 and "paired standard error" in text
    assert (compared / "table.tex").read_text().count(r" \\") == 3


def test_evaluation_without_rows_is_still_read(compared: Path) -> None:
    shutil.copytree(compared, "old")
    for model in ("mvae", "mmvae"):  # as it was written before there were values of rows
        path = Path("old", model, "table.nc")
        with xr.open_dataset(path) as table:
            old = table.load().drop_dims("row")
        old.to_netcdf(path, engine="h5netcdf")
        works("compare", "old", "--out", "summary")
        lines = Path("summary/table.md").read_text()
        before = (compared / "table.md").read_text()
        assert lines.splitlines()[:4] == before.splitlines()[:4]
        has_rows = model == "mvae"  # then the other one still has them
        assert Path("summary/differences.csv").exists() == has_rows
    assert "paired" not in lines and r"\textbf" not in Path("summary/table.tex").read_text()


def test_same_command_gives_the_same_table(compared: Path) -> None:
    works(*TWO, "--out", "again")
    assert Path("again/table.csv").read_bytes() == (compared / "table.csv").read_bytes()


def test_config_repeats_a_comparison(compared: Path) -> None:
    works("compare", "--config", compared / "config.toml", "--out", "again")
    assert Path("again/table.csv").read_bytes() == (compared / "table.csv").read_bytes()
    works("train", "--config", compared / "mvae" / "config.toml", "--out", "mvae")
    weights = [path / "model.safetensors" for path in (Path("mvae"), compared / "mvae")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_seed_gives_another_table(compared: Path) -> None:
    config = compared / "config.toml"
    works("compare", "--config", config, "--seed", 1, "--models", "mvae", "--out", "again")
    before, now = (read_csv(folder / "table.csv")[0] for folder in (compared, Path("again")))
    assert before["model"] == now["model"]
    assert before["mean"] != now["mean"]


def test_seeds_of_training_are_aggregated_on_the_same_rows(compared: Path) -> None:
    config = compared / "config.toml"
    for seed in (1, 2):
        options = ("--seed", seed, "--data-seed", 0, "--models", "mvae")
        works("compare", "--config", config, *options, "--out", f"s{seed}")
    tables = [read_run(folder)[0].table for folder in (compared, "s1", "s2")]
    found = aggregate_seeds([table for table in tables if table is not None])
    assert found.attrs["seeds"] == [0, 1, 2] and (found["num_seeds"] == 3).all()
    assert (found["seed_std"] > 0).all()
    works("compare", "--config", config, "--seed", 3, "--models", "mvae", "--out", "s3")
    other = read_run("s3")[0].table
    assert other is not None and tables[0] is not None
    with pytest.raises(ValueError, match="same rows, found data_seed = 3 instead of 0"):
        aggregate_seeds([tables[0], other])


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(compared: Path, width: int) -> None:
    for command in (("compare", compared), ("models",), ("data",)):
        lines = works(*command, width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert not any("…" in line for line in lines if "https" not in line)


def test_pieces_hold_every_column_once() -> None:
    columns = {f"c{i}" * 5: {"m": "-12.34 ± 0.56"} for i in range(7)}
    for width in range(20, 140):
        pieces = list(cli._pieces(columns, 6, width))
        assert [name for piece in pieces for name in piece] == list(columns)
    assert len(list(cli._pieces(columns, 6, 1000))) == 1


def test_unreliable_cells_are_marked(compared: Path) -> None:
    table = runs_module.merge_tables(read_run(compared))
    table["pareto_k"][:] = 0.0
    table["pareto_k"][0, 1] = 0.25
    cells = runs_module.table_cells(table)
    marked = [(c, m) for c, column in cells.items() for m, cell in column.items() if "!" in cell]
    assert marked == [("log p(image)", "MVAE")]
    assert cells["log p(image)"]["MVAE"].endswith(" !25%")
    assert "not reliable" in runs_module.table_note(table)


def test_settings_that_differ_are_told(compared: Path) -> None:
    shutil.copytree(compared, "run")
    assert "8 importance samples each, 20 % of them" in Path("run/table.md").read_text()
    works("evaluate", "run/mmvae", "--num-samples", 5, "--prior-share", 0, "--no-checks")
    works("report", "run")
    told = "Importance samples (share of them from the prior): MVAE 8 (20 %), MMVAE 5 (0 %)."
    text = Path("run/table.md").read_text()
    assert text.count(told) == 1 and "each, 20 %" not in text
    assert told in Path("run/report.html").read_text()


def test_unfinished_models_are_told(compared: Path) -> None:
    shutil.copytree(compared, "run")
    Path("run/mmvae/history.nc").unlink()
    for command in (
        ("compare", "run"),
        ("evaluate", "run", "--no-checks", "--limit", 10),
        ("report", "run"),
    ):
        shown = works(*command)
        assert shown.startswith("MMVAE: not finished, left out\n")
        assert command[0] == "report" or "Not finished, left out: MMVAE." in shown
    for name in ("table.md", "report.html"):
        assert "Not finished, left out: MMVAE." in Path("run", name).read_text()


DIVERGING = (*TINY, "--batch-size", 4, "--learning-rate", "1e300")


def test_a_diverged_training_is_told() -> None:
    result = call("train", "mvae", *DIVERGING, "--out", "run")
    assert result.exit_code == 1
    said = "mmzoo: MVAE: training stopped in epoch 1 since the loss is not finite; kept are its"
    assert result.stderr.startswith(said) and result.stderr.count("\n") == 1
    assert call("train", "mvae", *DIVERGING, "--out", "run", "--resume").exit_code == 1
    works("evaluate", "run", "--no-checks")
    works("report", "run")
    for name in ("table.md", "report.html"):
        text = Path("run", name).read_text()
        assert "MVAE (diverged)" in text and "stopped since the loss was not finite" in text
    assert "<h2>Training</h2>" not in Path("run/report.html").read_text()


def test_a_diverged_model_of_a_comparison_is_marked(compared: Path) -> None:
    shutil.copytree(compared, "run")
    path = Path("run/mvae/history.nc")
    with xr.open_dataset(path) as history:
        stopped = history.load().isel(epoch=slice(0))
    stopped.attrs["stopped"] = "diverged"
    stopped.to_netcdf(path, engine="h5netcdf")
    shown = works("compare", "run", "--out", "run")
    assert shown.count("MVAE (diverged)") == shown.count("MMVAE") > 0
    assert "MVAE (diverged)," in Path("run/table.csv").read_text()
    assert "<h2>Training</h2>" in Path("run/report.html").read_text()


# Interruption -------------------------------------------------------------------------------------


def test_interrupted_comparison_keeps_and_resumes(
    compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run = runs_module.train_run
    trained = []

    def interrupted(config: RunConfig, model: str, *rest: object, **options: object) -> object:
        trained.append(model)
        if trained == ["mvae", "mmvae"]:
            raise KeyboardInterrupt
        return train_run(config, model, *rest, **options)

    monkeypatch.setattr(runs_module, "train_run", interrupted)
    result = call(*TWO, "--out", "run")
    assert result.exit_code == 130
    assert result.stderr.strip() == "mmzoo: interrupted; run keeps mvae; add --resume to go on"
    assert read_run("run")[0].table is not None
    works(*TWO, "--out", "run", "--resume")
    assert trained == ["mvae", "mmvae", "mmvae"]
    assert Path("run/table.csv").read_bytes() == (compared / "table.csv").read_bytes()


def test_resume_evaluates_what_is_only_trained(compared: Path) -> None:
    works(*TWO, "--out", "run")
    weights = Path("run/mvae/model.safetensors").read_bytes()
    Path("run/mvae/table.nc").unlink()
    shown = works(*TWO, "--out", "run", "--resume")
    assert "MMVAE: finished already" in shown
    assert "\nMVAE: finished already" not in shown
    assert Path("run/mvae/model.safetensors").read_bytes() == weights
    assert Path("run/table.csv").read_bytes() == (compared / "table.csv").read_bytes()


def test_overwrite_removes_the_older_run() -> None:
    works(*TWO, "--out", "run")
    Path("run/notes.txt").write_text("mine")
    works("compare", *TINY, "--models", "mopoe", "--out", "run", "--overwrite")
    assert [run.vae.name for run in read_run("run")] == ["mopoe"]
    assert not Path("run/mvae/model.safetensors").exists()
    assert Path("run/notes.txt").read_text() == "mine"


def test_table_of_models_in_the_readme_is_the_one_that_is_printed() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme.split("<!-- models -->\n")[1].split("<!-- end of models -->")[0]
    assert table == works("models", "--markdown")
    assert all(f"| `{name}` |" in table for name in MODELS)


def test_all_models_are_those_that_fit_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(cli, "_prepare", lambda made, *rest: found.append(made.models))
    shown = call("compare", *TINY, "--models", "all", "--option", "mvae.beta=2").output
    # One takes a single modality, the other Gaussian ones.
    assert set(found[0]) == set(MODELS) - {"vae", "linear"}
    assert "vae: left out, VAE: expected 1 modality, found 2" in shown
    assert "linear: left out, modality 'image': expected the likelihood Normal" in shown
    assert "compare: expected RUN folders, --data or --config" in fails(
        "compare", "--models", "all"
    )


# Train, evaluate, report --------------------------------------------------------------------------


def test_train_evaluate_report() -> None:
    works("train", "mwvae", *TINY, "--out", "run", "--missing", "label=0.5")
    assert read_config("run/config.toml")[1].missing == {"label": 0.5}
    shown = works("evaluate", "run", "--num-samples", 5, "--limit", 10)
    assert "10 test rows, 5 importance samples each, 20 % of them from" in " ".join(shown.split())
    shown = works("evaluate", "run", "--num-samples", 5, "--limit", 10, "--prior-share", 0)
    assert "5 importance samples each." in " ".join(shown.split())
    works("report", "run")
    assert "MW-VAE" in Path("run/report.html").read_text()
    shutil.copytree("run", "copy")
    shown = works("compare", "run", "copy", "run")
    assert shown.count("MW-VAE (run)") == shown.count("MW-VAE (copy)") > 0
    works("compare", "run", "copy", "--out", "both")
    assert {row["model"] for row in read_csv(Path("both/table.csv"))} == {
        "MW-VAE (run)",
        "MW-VAE (copy)",
    }


def test_default_folders() -> None:
    works("train", "mvae", *TINY)
    assert Path("runs/digits-mvae/model.safetensors").is_file()
    works("compare", *TINY, "--models", "mvae")
    assert Path("runs/digits/mvae/model.safetensors").is_file()


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", found.append)
        works("train", "mvae", *TINY, "--threads", 3)
    assert found == [3]


def test_command_line_of_a_config_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.make(
        "digits",
        models=("mwvae",),
        hidden=(8, 4),
        missing={"label": 0.25},
        options={"mwvae": {"alignment_weight": 2.5, "modality_weights": {"label": 10}}},
        seed=3,
        data_seed=5,
        limit=20,
    )
    found = []
    monkeypatch.setattr(cli, "_prepare", lambda made, *rest: found.append(made))
    for command in ("train", "compare"):
        call(*shlex.split(config.command(command))[1:])
    assert found == [config, config]


def test_options_are_added_to_those_of_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.make(
        "digits",
        models=("mwvae", "mopoe"),
        missing={"label": 0.25},
        options={"mwvae": {"alignment_weight": 2.5}, "mopoe": {"beta": 1}},
    )
    write_config(config, "compare", "several.toml")
    write_config(config.only("mwvae"), "train", "single.toml")
    found: list[RunConfig] = []

    def prepare(made: RunConfig, *rest: object) -> None:
        found.append(made)
        raise typer.Exit

    monkeypatch.setattr(cli, "_prepare", prepare)
    several = ("compare", "--config", "several.toml", "--option", "mwvae.beta=2")
    call(*several, "--missing", "image=0.5", "--missing", "label=0.75")
    call(*several, "--option", "mwvae.alignment_weight=3", "--models", "mwvae")
    call("train", "--config", "single.toml", "--option", "beta=2")
    both, one, single = found
    assert both.options == {"mwvae": {"alignment_weight": 2.5, "beta": 2}, "mopoe": {"beta": 1}}
    assert both.missing == {"label": 0.75, "image": 0.5}
    assert one.models == ("mwvae",)
    assert one.options == {"mwvae": {"alignment_weight": 3, "beta": 2}}
    assert single.options == {"mwvae": {"alignment_weight": 2.5, "beta": 2}}
    said = fails("compare", "--config", "several.toml", "--option", "mvae.beta=2")
    assert "with one of the models mwvae, mopoe" in said


@pytest.mark.parametrize("text", ["True", "False", "true", "FALSE"])
def test_true_and_false_in_any_case(text: str) -> None:
    works(*TRAIN, "--option", f"learned_prior={text}", "--out", "run")
    wanted = text.lower() == "true"
    assert read_config("run/config.toml")[1].options == {"mvae": {"learned_prior": wanted}}
    assert read_run("run")[0].vae.options["learned_prior"] is wanted


# Configurations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"a": 1, "b": -0.5, "c": 1e-05, "d": True, "e": False, "f": "x"},
        {"text": 'quote " backslash \\ newline \n tab \t del \x7f é 数 🦓', "empty": ""},
        {"list": [1, 2], "names": ["a", "b"], "none": [], "deep": [[1], [2, 3]]},
        {"table": {"x": {"y": 1, "z": {"w": "v"}}, "q": 2}, "after": 1},
        {"key with blank": 1, "dots.in.it": {"ü": {"": 2}}, "nothing": {}},
        {"large": 10**15, "inf": float("inf"), "list of tables": [{"a": 1}, {"b": [{}]}]},
    ],
)
def test_toml_is_read_back(values: dict[str, object]) -> None:
    assert tomllib.loads(to_toml(values)) == values


def test_toml_refuses_what_it_cannot_write() -> None:
    with pytest.raises(TypeError, match="expected text, numbers, booleans, lists or tables"):
        to_toml({"a": None})


def test_config_is_read_back(tmp_path: Path) -> None:
    config = RunConfig.make(
        "mnist",
        root="/data",
        hidden=(7, 5),
        missing={"label": 0.5},
        options={"mvae": {"beta": 2.0}},
        limit=10,
        threads=2,
        prior_share=0,
    )
    write_config(config, "compare", tmp_path / "config.toml")
    assert read_config(tmp_path / "config.toml") == ("compare", config)


def test_default_sizes() -> None:
    digit, mnist = (RunConfig.make(name) for name in ("digits", "mnist"))
    assert digit.models == mnist.models == DEFAULT_MODELS
    assert (mnist.latent_dim, mnist.hidden, mnist.num_samples) == (64, (512, 512), 1000)
    assert digit.binarize == mnist.binarize == "epoch"
    assert digit.limit is None
    assert RunConfig.make("digits", network="conv").hidden == ()


def test_options_reach_constructor_and_objective() -> None:
    modalities = digits()[0].modalities
    config = RunConfig.make(
        "digits",
        models=("mmvae", "mwvae"),
        options={
            "mmvae": {"family": "normal", "num_samples": 3},
            "mwvae": {"alignment_weight": 2.5, "prior": "flow"},
        },
    )
    mmvae, bound = build(config, "mmvae", modalities)
    assert (mmvae.family, bound.num_samples) == ("normal", 3)
    mwvae, aligned = build(config, "mwvae", modalities)
    assert (mwvae.options["prior"], aligned.alignment[0].weight) == ("flow", 2.5)


def test_networks_reach_the_modalities() -> None:
    modalities = digits()[0].modalities

    def first_layer(**given: object) -> list[str]:
        vae, _ = build(RunConfig.make("digits", **given), "mvae", modalities)
        kinds = [type(module).__name__ for module in vae.experts.modules()]
        widths = [
            each.out_features for each in vae.experts.modules() if hasattr(each, "in_features")
        ]
        return [kind for kind in kinds if kind in ("MLP", "ConvEncoder")] + widths[:2]

    assert first_layer(hidden=(7, 5)) == ["MLP", "MLP", 7, 5]
    assert first_layer(network="conv")[:2] == ["ConvEncoder", "MLP"]


def test_missing_rows_are_simulated_in_training_rows_only() -> None:
    config = RunConfig.make("digits", missing={"label": 0.5, "image": 0.25}, limit=100)
    train, test = load_data(config)
    assert {name: int(mask.sum()) for name, mask in train.observed.items()} == {
        "label": 50,
        "image": 75,
    }
    assert test.observed == {}
    assert bool(torch.stack(list(train.observed.values())).any(0).all())


def test_fewer_test_rows_leave_the_training_rows_alone() -> None:
    train, test = load_data(RunConfig.make("digits", limit=100, test_rows=7))
    assert (len(train), len(test)) == (100, 7)


def test_accuracy_needs_a_posterior_given_the_others() -> None:
    train, test = load_data(RunConfig.make("digits", limit=50))
    vae = MODELS["jointvae"](train.modalities or (), latent_dim=2)
    found = class_accuracy(vae, test)
    assert list(found) == ["label | image"]
    assert math.isnan(found["label | image"])


def test_accuracy_of_a_constant_prediction() -> None:
    """A decoder that always says three is right as often as there are threes."""
    config = RunConfig.make("digits", limit=50, hidden=(4,), latent_dim=2)
    _, test = load_data(config)
    vae, _ = build(config, "mvae", test.modalities)
    last = [m for m in vae.generative.decoders["label_"].modules() if hasattr(m, "out_features")][
        -1
    ]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.eye(10)[3])
    expected = float(np.mean(test.labels["digit"] == 3))
    assert class_accuracy(vae, test, num_draws=2) == {"label | image": pytest.approx(expected)}
    masks = {"label": torch.arange(50) % 2 == 0}
    half = float(np.mean(test.labels["digit"][::2] == 3))
    found = class_accuracy(vae, test.with_observed(masks), num_draws=2)
    assert found == {"label | image": pytest.approx(half)}


# Errors -------------------------------------------------------------------------------------------

TRAIN = ["train", "mvae", *TINY]
BAD = {
    "unknown model": (
        ["train", "foo", *TINY],
        "model 'foo': unknown; known models: linear, vae",
    ),
    "unknown models": (["compare", *TINY, "--models", "mvae,foo"], "model 'foo': unknown"),
    "no models": (["compare", *TINY, "--models", ","], "models: expected at least one model"),
    "unknown data": (
        ["train", "mvae", "--data", "foo"],
        "data set 'foo': unknown; known data sets",
    ),
    "download unknown": (["data", "--download", "foo"], "data set 'foo': unknown"),
    "no data": (["train", "mvae"], "train: expected MODEL and --data or --config"),
    "nothing": (["compare"], "compare: expected RUN folders, --data or --config"),
    "no root": (["train", "mvae", "--data", "mnist"], "pass root (--root) or set MMZOO_DATA"),
    "no file": (
        ["train", "mvae", "--data", "mnist", "--root", "nowhere"],
        "under the root nowhere, found neither",
    ),
    "no run": (["evaluate", "nowhere"], "run nowhere: expected a folder with config.toml"),
    "no run to compare": (["compare", "nowhere"], "run nowhere: expected a folder with config"),
    "runs and training": (
        ["compare", "some", *TINY, "--models", "mvae", "--option", "mvae.beta=2"],
        "found both: --data, --models, --epochs, --latent-dim, --hidden, --limit, --option",
    ),
    "runs and resume": (["compare", "some", "--resume"], "found both: --resume; leave out one"),
    "report of several": (["report", "a", "b"], "report: expected --out with 2 runs, found none"),
    "no run to report": (["report", "nowhere"], "run nowhere: expected a folder with config"),
    "no config": (["train", "--config", "nowhere"], "nowhere: expected the config.toml of a run"),
    "command": (["frobnicate"], "No such command 'frobnicate'"),
    "flag": (["train", "--frobnicate"], "No such option: --frobnicate"),
    "root flag": (["--frobnicate"], "No such option: --frobnicate"),
    "no number": ([*TRAIN, "--epochs", "x"], "Invalid value for '--epochs'"),
    "epochs": ([*TRAIN, "--epochs", "0"], "epochs: expected at least 1, found 0"),
    "batch size": ([*TRAIN, "--batch-size", "0"], "batch_size: expected at least 1, found 0"),
    "latent dim": ([*TRAIN, "--latent-dim", "0"], "latent_dim: expected at least 1, found 0"),
    "limit": ([*TRAIN, "--limit", "0"], "limit: expected at least 1, found 0"),
    "test rows": ([*TRAIN, "--test-rows", "0"], "test_rows: expected at least 1, found 0"),
    "seed": ([*TRAIN, "--seed", "-1"], "seed: expected at least 0, found -1"),
    "large seed": ([*TRAIN, "--seed", "9" * 23], "seed: expected at most 2147483647, found 9"),
    "large data seed": ([*TRAIN, "--data-seed", 2**31], "data_seed: expected at most 2147483647"),
    "evaluate share": (["evaluate", "x", "--prior-share", "2"], "prior_share: expected 0 <= share"),
    "threads": ([*TRAIN, "--threads", "0"], "threads: expected at least 1, found 0"),
    "samples": ([*TRAIN, "--num-samples", "0"], "num_samples: expected at least 1, found 0"),
    "evaluate samples": (["evaluate", "x", "--num-samples", "0"], "num_samples: expected at least"),
    "prior share": ([*TRAIN, "--prior-share", "1"], "prior_share: expected 0 <= share < 1, found"),
    "rate": ([*TRAIN, "--learning-rate", "-1"], "learning_rate: expected a positive number"),
    "hidden": ([*TRAIN, "--hidden", "0"], "hidden: expected positive widths, found [8, 0]"),
    "hidden conv": ([*TRAIN, "--network", "conv"], "hidden: expected network 'mlp', found 'conv'"),
    "network": ([*TRAIN, "--network", "foo"], "network: expected one of mlp, conv, default"),
    "binarize": ([*TRAIN, "--binarize", "foo"], "binarize: expected one of fixed, epoch, none"),
    "device": ([*TRAIN, "--device", "foo"], "device: expected one of auto, cpu, cuda"),
    "missing": ([*TRAIN, "--missing", "label"], "--missing 'label': expected name=value"),
    "fraction": ([*TRAIN, "--missing", "label=2"], "expected a fraction between 0 and 1"),
    "no fraction": ([*TRAIN, "--missing", "label=x"], "expected a fraction between 0 and 1"),
    "missing name": ([*TRAIN, "--missing", "foo=0.5"], "expected names among ['image', 'label']"),
    "option": ([*TRAIN, "--option", "foo=1"], "option 'foo': unknown to mvae; its options:"),
    "option words": ([*TRAIN, "--option", "foo"], "--option 'foo': expected name=value"),
    "option value": ([*TRAIN, "--option", "scored=x"], "expected scored one of given, observed"),
    "option type": (
        ["train", "mmvae", *TINY, "--option", "num_samples=x"],
        "check {'num_samples': 'x'}",
    ),
    "option flag": (
        [*TRAIN, "--option", "learned_prior=1"],
        "options of mvae: expected true or false for learned_prior, found 1",
    ),
    "option flag text": ([*TRAIN, "--option", "vectorized=no"], "true or false for vectorized"),
    "option model": ([*TWO, "--option", "beta=2"], "expected MODEL.name=value with one of the"),
    "modalities": (["train", "vae", *TINY], "see `mmzoo models` for what each model takes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str) -> None:
    words, message = BAD[case]
    result = call(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("mmzoo: error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not list(Path().iterdir())


def fails(*words: object) -> str:
    """Runs a command that must fail, and gives what it says."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_output_that_cannot_be_written() -> None:
    Path("file").write_text("")
    assert "check the path, or choose another --out" in fails(*TRAIN, "--out", "file/run")


def test_cuda_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "expected a CUDA device, found none" in fails(*TRAIN, "--device", "cuda")


def test_finished_runs_are_not_overwritten(compared: Path) -> None:
    before = (compared / "table.csv").read_bytes()
    assert "holds a run already; add --resume" in fails(*TWO, "--out", compared)
    changed = fails(*TWO, "--latent-dim", 3, "--out", compared, "--resume")
    assert "was made with latent_dim = 2, now it is 3" in changed
    changed = fails(*TWO, "--option", "mvae.beta=3", "--out", compared, "--resume")
    assert "mvae was made with the options {}" in changed
    assert (compared / "table.csv").read_bytes() == before


def test_weights_of_another_run_are_not_taken() -> None:
    works("train", "mvae", *TINY, "--option", "beta=50", "--out", "run/mvae")
    command = ("compare", *TINY, "--models", "mvae,jmvae", "--out", "run")
    assert "run: holds a run already; add --resume" in fails(*command)
    said = fails(*command, "--resume")
    assert "run/mvae: mvae was made with the options {'beta': 50}, now they are {}" in said
    said = fails(*command, "--resume", "--option", "mvae.beta=50", "--epochs", 2)
    assert "run/mvae: was made with epochs = 1, now it is 2" in said
    assert not Path("run/config.toml").exists() and not Path("run/jmvae").exists()
    shutil.move("run/mvae", "run/jmvae")
    assert "run/jmvae: expected a run of jmvae, found one of mvae" in fails(*command, "--resume")


def test_options_of_a_model_that_an_earlier_resume_left_out() -> None:
    def command(models: str, *rest: str) -> list[str]:
        return ["compare", *TINY, "--no-checks", "--models", models, "--out", "run", *rest]

    works(*command("mvae", "--option", "mvae.beta=50"))
    works(*command("jmvae", "--resume"))
    said = fails(*command("mvae,jmvae", "--resume"))
    assert "run/mvae: mvae was made with the options {'beta': 50}, now they are {}" in said


def test_a_folder_of_the_other_command(compared: Path) -> None:
    said = fails(*TRAIN, "--out", compared, "--resume")
    assert "expected a run of mmzoo train, found one of mmzoo compare" in said
    said = fails(*TWO, "--out", compared / "mvae", "--resume")
    assert "expected a run of mmzoo compare, found one of mmzoo train" in said


def test_a_bad_option_is_found_before_the_first_model_is_trained() -> None:
    said = fails(*TWO, "--option", "mmvae.beta=1", "--out", "run")
    assert "option 'beta': unknown to mmvae" in said
    command = ("compare", *TINY, "--no-checks", "--models", "mvae,mwvae", "--out", "run")
    said = fails(*command, "--option", "mwvae.beta=abc")
    assert "options of mwvae: SubsetELBO: expected beta >= 0, found 'abc' at step 0; check" in said
    assert not Path("run").exists()
    works(*command, "--option", "mwvae.beta=1")


@pytest.mark.parametrize(
    "option",
    ["beta=[1,2]", "beta=nan", "beta=-1", "num_random=1.5", "num_random=-1"]
    + [f"modality_weights={{label={weight}}}" for weight in ('"a"', "-3")],
)
def test_bad_values_of_options(option: str) -> None:
    said = fails(*TRAIN, "--option", option)
    assert "options of mvae: " in said and f"check {{'{option.partition('=')[0]}'" in said
    assert not list(Path().iterdir())


def test_a_failed_training_does_not_block_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("fit: expected better luck")

    for command in (("train", "mvae"), ("compare", "--models", "mvae", "--no-checks")):
        words = (*command, *TINY, "--out", command[0])
        with monkeypatch.context() as patch:
            patch.setattr(runs_module, "fit", broken)
            assert "expected better luck" in fails(*words)
        works(*words, "--seed", 1, *(["--resume"] if command[0] == "compare" else []))


def test_config_of_another_command(compared: Path) -> None:
    said = fails("train", "--config", compared / "config.toml")
    assert "was written by mmzoo compare; use mmzoo compare --config" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not toml", "expected the config.toml of a run, found none that can be read"),
        ("command = 'train'", "found no command or no data"),
        ("command = 'train'\ndata = 'digits'\nfoo = 1", "found unknown keys foo"),
        ("command = 'train'\ndata = 'digits'\nepochs = 'x'", "epochs: expected int, found 'x'"),
        ("command = 'train'\ndata = 'digits'\nseed = true", "seed: expected int, found True"),
        (
            "command = 'train'\ndata = 'digits'\n[missing]\nlabel = 'x'",
            "config.toml: missing label: expected a fraction between 0 and 1, found 'x'",
        ),
        (
            "command = 'train'\ndata = 'digits'\n[options]\nmvae = 3",
            "options mvae: expected options by name, found 3; write them below [options.mvae]",
        ),
        (
            "command = 'train'\ndata = 'digits'\n[options.nosuch]\nbeta = 3",
            "options nosuch: expected one of the models mvae, mmvae, mopoe, jmvae, mwvae; leave",
        ),
    ],
)
def test_damaged_config(text: str, message: str) -> None:
    Path("config.toml").write_text(text)
    assert message in fails("train", "--config", "config.toml")


def test_checkpoint_of_another_model(compared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mvae"
    folder.mkdir()
    for name in ("config.toml", "history.nc"):
        (folder / name).write_bytes((compared / "mvae" / name).read_bytes())
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((compared / "mmvae" / name).read_bytes())
    assert "expected a 'mvae' model, found 'mmvae'" in fails("evaluate", folder)
    (folder / "history.nc").write_text("damaged")
    (folder / "config.json").write_bytes((compared / "mvae" / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(
        (compared / "mvae" / "model.safetensors").read_bytes()
    )
    assert "expected a NetCDF file, found none that can be read" in fails("evaluate", folder)


@pytest.mark.parametrize(
    ("taken", "path", "message"),
    [
        ("history", "table", "expected a table of likelihoods, found a file of loss"),
        ("table", "history", "expected the history of a training, found a file of mean"),
        ("table", "checks", "expected a group for each check, found a file of mean"),
    ],
)
def test_files_of_a_run_that_are_exchanged(
    compared: Path, taken: str, path: str, message: str
) -> None:
    shutil.copytree(compared / "mvae", "run")
    shutil.copy(f"run/{taken}.nc", f"run/{path}.nc")
    assert f"run/{path}.nc: {message}" in fails("report", "run")


def test_run_without_a_trained_model(compared: Path) -> None:
    for name, command in (("single", "train"), ("several", "compare")):
        Path(name).mkdir()
        config = read_config(compared / "mvae" / "config.toml")[1]
        write_config(config, command, Path(name, "config.toml"))
        assert "expected a trained model, found none; finish it with" in fails("evaluate", name)


def test_comparison_of_runs_that_do_not_go_together(compared: Path) -> None:
    works("train", "mopoe", *TINY, "--out", "run")
    assert "expected likelihoods, found none; run mmzoo evaluate run" in fails("compare", "run")
    works("evaluate", "run", "--limit", 10)
    said = fails("compare", compared, "run")
    assert "expected likelihoods of the same rows" in said
    assert "rows = 10 instead of 24" in said


def test_trace_shapes_are_left_out() -> None:
    error = ValueError("modality 'image': expected\nthis\n Trace Shapes:\n  Param Sites:\n")
    assert cli._first_paragraph(error) == "modality 'image': expected this"


def test_debug_shows_the_traceback() -> None:
    result = call("train", "foo", *TINY, "--debug")
    assert isinstance(result.exception, ValueError)
    assert result.stderr == ""


def test_accuracy_that_a_model_does_not_have_is_an_empty_cell() -> None:
    works("compare", *TINY, "--models", "cvae,mvae", "--out", "run")  # CVAE is given the label
    first = Path("run/table.md").read_text().split("Nats per row")[0]
    rows = [line.split("|") for line in first.splitlines()]
    accuracy = {row[1].strip(): row[-2].strip() for row in rows if len(row) > 3}
    assert accuracy["CVAE"] == "–"
    assert accuracy["MVAE"].endswith(" %")
