"""Lint, format, types and doctests, each as a subprocess: `pytest` alone checks everything."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT

# mypy must find this error, and no other: from the root it reports success without reading models/.
PLANTED = 'def planted() -> int:\n    """Return the wrong type."""\n    return "text"\n'


def run(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs `python -m command` and captures what it says."""
    words = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True)


def test_lint() -> None:
    done = run("ruff", "check", "--output-format", "concise", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_format() -> None:
    done = run("ruff", "format", "--check", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_types(installed: Path) -> None:
    planted = installed / "mmzoo" / "models" / "planted.py"
    planted.write_text(PLANTED)
    config = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    done = run("mypy", *config, "--package", "mmzoo", cwd=installed)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    unplanted = [line for line in errors if "planted.py" not in line]
    assert not unplanted, "\n".join(unplanted)
    assert len(errors) == 1, done.stdout + done.stderr


def test_doctests(installed: Path) -> None:
    config = ["-c", ROOT / "pyproject.toml", "--rootdir", installed, "-p", "no:cacheprovider"]
    done = run("pytest", *config, "-q", "--doctest-modules", "mmzoo", cwd=installed)
    assert done.returncode == 0, done.stdout + done.stderr
