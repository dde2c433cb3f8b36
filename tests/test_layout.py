"""The layout: arrows point down, `import mmzoo` is light, the wheel holds exactly the sources."""

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PACKAGE_FOLDERS, ROOT

# Lowest first: a module imports from its own layer and from those before it.
LAYERS = ("mmzoo", "mmzoo.inference", "mmzoo.models", "mmzoo.evaluation", "mmzoo.cli")
BARE = {"inference", "models", "evaluation"}
HEAVY = ("transformers", "seaborn", "matplotlib", "sklearn", "torchvision", "arviz", "lightning")


def installed_name(path: Path) -> str:
    """The path of a source file once it is installed: models/mvae.py is mmzoo/models/mvae.py."""
    return ("mmzoo" / path.relative_to(ROOT)).as_posix().replace("mmzoo/mmzoo/", "mmzoo/")


def module_name(path: Path) -> str:
    """The import name of a source file: models/mvae.py is mmzoo.models.mvae."""
    return installed_name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def layer(module: str) -> int:
    """The place of a module among the layers; the longest matching prefix counts."""
    inside = [i for i, name in enumerate(LAYERS) if f"{module}.".startswith(f"{name}.")]
    return max(inside, default=0)


def imports(source: str) -> Iterator[str]:
    """Every imported name, those inside functions too; relative ones keep their dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, module: str) -> list[str]:
    """The imports of `module` that are relative, bare, or point up."""
    return [
        name
        for name in imports(source)
        if name.startswith(".") or name.split(".")[0] in BARE or layer(name) > layer(module)
    ]


SOURCES = {
    module_name(path): path
    for folder in PACKAGE_FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}


@pytest.mark.parametrize("module", SOURCES)
def test_arrows_point_down(module: str) -> None:
    assert violations(SOURCES[module].read_text(), module) == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from mmzoo.models import MVAE", "mmzoo.vae"),
        ("from mmzoo import models", "mmzoo.vae"),
        ("def f():\n    import mmzoo.models.mvae", "mmzoo.inference.fit"),
        ("import mmzoo.cli", "mmzoo.evaluation.report"),
        ("from . import mvae", "mmzoo.models"),
        ("from models import MVAE", "mmzoo.evaluation"),
    ],
)
def test_an_arrow_up_is_seen(source: str, module: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from mmzoo.evaluation import log_likelihood", "mmzoo.cli"),
        ("import torchvision.models", "mmzoo.data"),
        ("from mmzoo.modality import Modality", "mmzoo.inference.fit"),
    ],
)
def test_an_arrow_down_is_allowed(source: str, module: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize("module", [name for name in SOURCES if "._" not in name])
def test_all_is_declared(module: str) -> None:
    """One `__all__` in each public module; the linter keeps it sorted (RUF022)."""
    names = [
        ast.unparse(node.targets[0])
        for node in ast.parse(SOURCES[module].read_text()).body
        if isinstance(node, ast.Assign)
    ]
    found = names.count("__all__")
    assert found == 1, (
        f"{module}: expected one __all__, found {found}; declare it after the imports"
    )


def test_import_is_light() -> None:
    code = f"import sys, mmzoo; print(*({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_wheel_holds_exactly_the_sources(wheel: Path) -> None:
    sources = {
        installed_name(path): path.read_bytes()
        for folder in PACKAGE_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("mmzoo/")]
        content = {name: archive.read(name) for name in names}
    assert sorted(content) == sorted(sources)
    assert content == sources
