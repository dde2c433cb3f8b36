"""Every example and README command runs, at a tiny size, as a subprocess.

Each file of `examples/` takes `--quick`. The README's ```python blocks run in order as one script;
`<!-- test: skip -->` before a block leaves it out. A ```bash block runs if `<!-- test: quick -->`
stands before it: its lines that begin with `mmzoo `, with what follows `quick` in the comment
appended to each, for example `<!-- test: quick --epochs 1 -->`.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(
    r"^(?:<!-- test: (?P<mark>[^\n]*?) ?-->\n+)?^```(?P<language>\w+)\n(?P<body>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)


def python_script(text: str) -> str:
    """The ```python blocks of a text, in order, less those marked `skip`."""
    found = BLOCK.finditer(text)
    return "\n".join(m["body"] for m in found if m["language"] == "python" and m["mark"] != "skip")


def commands(text: str) -> list[list[str]]:
    """The `mmzoo` lines of the ```bash blocks marked `quick`, split into words."""
    found = [m for m in BLOCK.finditer(text) if m["language"] == "bash" and m["mark"]]
    return [
        shlex.split(line, comments=True) + shlex.split(match["mark"])[1:]
        for match in found
        if match["mark"].split()[0] == "quick"
        for line in match["body"].replace("\\\n", " ").splitlines()
        if line.startswith("mmzoo ")
    ]


def check(command: list[str], cwd: Path) -> None:
    """Runs a command with this environment's scripts first on the path."""
    scripts = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    check([sys.executable, str(example), "--quick"], tmp_path)


def test_readme_python(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text(python_script(README))
    check([sys.executable, str(script)], tmp_path)


def test_readme_commands(tmp_path: Path) -> None:
    for command in commands(README):
        check(command, tmp_path)


def test_blocks_are_found() -> None:
    text = """
```python
a = 1
```

<!-- test: skip -->
```python
b = 2
```

<!-- test: quick --epochs 1 -->

```bash
# a comment
mmzoo compare \\
    --data digits  # the main job
pip install x
```

```bash
mmzoo models
```
"""
    assert python_script(text) == "a = 1\n"
    assert commands(text) == [["mmzoo", "compare", "--data", "digits", "--epochs", "1"]]
