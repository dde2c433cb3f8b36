"""What a run is configured with, and how that is kept in `config.toml`.

The standard library reads TOML (https://toml.io) but does not write it; :func:`to_toml` writes the
part that a configuration needs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["DEFAULT_MODELS", "RunConfig", "defaults", "read_config", "to_toml", "write_config"]

DEFAULT_MODELS = ("mvae", "mmvae", "mopoe", "jmvae", "mwvae")
"""What `mmzoo compare` trains unless told otherwise."""

_SIZES: dict[str, dict[str, Any]] = {
    "digits": {
        "epochs": 60,
        "batch_size": 64,
        "latent_dim": 16,
        "hidden": (256, 256),
        # Networks this small lose more by threads that wait for each other than they win.
        "threads": 1,
    },
}
_CHOICES = {
    "network": ("mlp", "conv", "default"),
    "binarize": ("fixed", "epoch", "none"),
    "device": ("auto", "cpu", "cuda"),
}
_AT_LEAST = {
    "epochs": 1,
    "batch_size": 1,
    "latent_dim": 1,
    "limit": 1,
    "test_rows": 1,
    "num_samples": 1,
    "threads": 1,
    "seed": 0,
    "data_seed": 0,
}
_MOST_SEED = 2**31 - 1  # room below what numpy takes, for seeds that are derived from it
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TYPES: dict[str, tuple[type, ...]] = {
    "data": (str,),
    "root": (str,),
    "learning_rate": (int, float),
    "prior_share": (int, float),
    **dict.fromkeys(_CHOICES, (str,)),
    **dict.fromkeys(_AT_LEAST, (int,)),
    **dict.fromkeys(("models", "hidden"), (list, tuple)),
    **dict.fromkeys(("missing", "options"), (dict,)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that is needed to repeat a run.

    Args:
        data: Name of the data set.
        models: Names of the models.
        root: Folder of the data; None: the environment variable MMZOO_DATA.
        epochs: Passes over the training rows.
        batch_size: Rows for each step.
        learning_rate: Of Adam.
        latent_dim: Size of z.
        network: ``"mlp"``, ``"conv"`` (for images; others as by default) or ``"default"``.
        hidden: Widths of the hidden layers of ``"mlp"``; empty: chosen from the shape.
        binarize: Pixels drawn ``"fixed"`` or anew for each ``"epoch"``; ``"none"``: grey values.
        missing: Modality to the fraction of training rows that lack it, completely at random.
        limit: Only the first so many training and test rows; None: all.
        test_rows: Only the first so many test rows; None: all.
        options: Model to its options, those of its constructor and of its objective.
        num_samples: Importance samples of each row and likelihood.
        prior_share: Share of them that the prior gives, see
            :func:`mmzoo.evaluation.log_likelihood`.
        seed: Of everything that is random.
        data_seed: Of the data alone: how they are split, binarised, made missing; None: `seed`.
            Runs that share it differ in their training only and have the same test rows.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: Of the processor; None: torch's choice.

    Raises:
        ValueError: For a value that is not allowed.
    """

    data: str
    models: tuple[str, ...] = DEFAULT_MODELS
    root: str | None = None
    epochs: int = 50
    batch_size: int = 128
    learning_rate: float = 1e-3
    latent_dim: int = 64
    network: str = "mlp"
    hidden: tuple[int, ...] = ()
    binarize: str = "epoch"
    missing: Mapping[str, float] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    test_rows: int | None = None
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    num_samples: int = 1000
    prior_share: float = 0.2
    seed: int = 0
    data_seed: int | None = None
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, types in _TYPES.items():
            _check_type(name, getattr(self, name), types)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}"
                )
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")
        for name in ("seed", "data_seed"):
            if (getattr(self, name) or 0) > _MOST_SEED:
                raise ValueError(
                    f"{name}: expected at most {_MOST_SEED}, found {getattr(self, name)}"
                )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(
                f"learning_rate: expected a positive number, found {self.learning_rate}"
            )
        check_prior_share(self.prior_share)
        for name, share in self.missing.items():
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if not (number and 0 <= share <= 1):
                raise ValueError(
                    f"missing {name}: expected a fraction between 0 and 1, found {share!r}"
                )
        for name, options in self.options.items():
            if not isinstance(options, Mapping):
                raise ValueError(
                    f"options {name}: expected options by name, found {options!r}; write them "
                    f"below [options.{name}]"
                )
            if name not in self.models:
                raise ValueError(
                    f"options {name}: expected one of the models {', '.join(self.models)}; leave "
                    "out its options, or name it in models"
                )
        if any(not isinstance(width, int) or width < 1 for width in self.hidden):
            raise ValueError(f"hidden: expected positive widths, found {list(self.hidden)}")
        if self.hidden and self.network != "mlp":
            raise ValueError(
                f"hidden: expected network 'mlp', found {self.network!r}; leave out one of them"
            )
        if not self.models:
            raise ValueError("models: expected at least one model, found none")
        object.__setattr__(self, "models", tuple(dict.fromkeys(self.models)))
        object.__setattr__(self, "hidden", tuple(self.hidden))

    @classmethod
    def make(cls, data: str, **given: Any) -> RunConfig:
        """The configuration of a data set: its own sizes, and what is given and not None."""
        sizes = {"hidden": (512, 512), **_SIZES.get(data, {})}
        given = {key: value for key, value in given.items() if value is not None}
        if given.get("network", "mlp") != "mlp":
            del sizes["hidden"]
        return cls(data=data, **{**sizes, **given})

    def replace(self, **given: Any) -> RunConfig:
        """A copy with what is given and not None; fractions and options are added one by one.

        Options of models that are no longer among `models` are left out.
        """
        given = {key: value for key, value in given.items() if value is not None}
        given["missing"] = {**self.missing, **given.get("missing", {})}
        new = given.get("options", {})
        given["options"] = {
            model: {**self.options.get(model, {}), **new.get(model, {})}
            for model in given.get("models", self.models)
            if model in self.options or model in new
        }
        if given.get("network", self.network) != "mlp":
            given = {"hidden": (), **given}
        return dataclasses.replace(self, **given)

    def only(self, model: str) -> RunConfig:
        """The configuration of one of the models."""
        options = {key: value for key, value in self.options.items() if key == model}
        return dataclasses.replace(self, models=(model,), options=options)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without what is None or empty; tables come last."""
        fields = dataclasses.asdict(self)
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return {k: v for k, v in plain.items() if v is not None and v not in ({}, [])}

    def command(self, name: str) -> str:
        """The command line that repeats the run; `name` is "train" or "compare"."""
        words = ["mmzoo", name, *(self.models if name == "train" else ()), "--data", self.data]
        if name == "compare":
            words += ["--models", ",".join(self.models)]
        prefix = {model: "" if name == "train" else f"{model}." for model in self.options}
        for key, value in self.as_dict().items():
            flag = f"--{key.replace('_', '-')}"
            if key == "hidden":
                words += [word for width in value for word in (flag, str(width))]
            elif key == "missing":
                words += [word for item in value.items() for word in (flag, "{}={}".format(*item))]
            elif key == "options":
                for model, each in value.items():
                    for k, v in each.items():
                        words += ["--option", f"{prefix[model]}{k}={_value(v)}"]
            elif key not in ("data", "models"):
                words += [flag, str(value)]
        return shlex.join(words)


def check_prior_share(share: float) -> None:
    """Raises a ValueError unless it is a share that leaves draws of the guide."""
    if not 0 <= share < 1:
        raise ValueError(f"prior_share: expected 0 <= share < 1, found {share}")


def defaults() -> dict[str, str]:
    """The default of each field in words, and where a data set has another one; for the help."""
    own = {data: RunConfig.make(data) for data in ("", *_SIZES)}
    said = {}
    for field in dataclasses.fields(RunConfig)[1:]:  # all but the data
        words = {data: _in_words(getattr(each, field.name)) for data, each in own.items()}
        general = words.pop("")
        others = [f"{data}: {text}" for data, text in words.items() if text != general]
        if text := "; ".join(filter(None, [general, *others])):
            said[field.name] = text
    return said


def _in_words(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))  # which a narrow terminal can wrap
    return "" if value is None or value == {} else str(value)


def read_config(path: str | os.PathLike[str]) -> tuple[str, RunConfig]:
    """Which command wrote a `config.toml`, and what it holds.

    Raises:
        ValueError: For a file that is missing, no TOML, or not of a run.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(
            f"{path}: expected the config.toml of a run, found none that can be read ({error}); "
            "name a file that mmzoo train or compare wrote"
        ) from error
    command = values.pop("command", None)
    values.pop("mmzoo", None)
    known = {field.name for field in dataclasses.fields(RunConfig)}
    unknown = sorted(set(values) - known)
    if command not in ("train", "compare") or "data" not in values or unknown:
        found = f"unknown keys {', '.join(unknown)}" if unknown else "no command or no data"
        raise ValueError(
            f"{path}: expected the config.toml of a run, found {found}; "
            "name a file that mmzoo train or compare wrote"
        )
    try:
        return command, RunConfig(**{"hidden": (), **values})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_config(config: RunConfig, command: str, path: str | os.PathLike[str]) -> None:
    """Writes `config.toml`, at once or not at all."""
    from mmzoo import __version__

    path = Path(path)
    text = to_toml({"command": command, "mmzoo": __version__, **config.as_dict()})
    head = f"# Written by mmzoo. To repeat this run: mmzoo {command} --config config.toml\n"
    part = path.with_name(f"{path.name}.part")
    part.write_text(head + text, encoding="utf-8")
    os.replace(part, path)


def to_toml(values: Mapping[str, Any]) -> str:
    """Strings, numbers, booleans, lists and nested dicts as TOML.

    Example:
        >>> print(to_toml({"seed": 0, "missing": {"label": 0.5}}), end="")
        seed = 0
        <BLANKLINE>
        [missing]
        label = 0.5
    """
    return "\n".join(_lines(values, ())) + "\n"


def _lines(values: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [
        f"{_key(key)} = {_value(value)}"
        for key, value in values.items()
        if not isinstance(value, Mapping)
    ]
    for key, value in values.items():
        if isinstance(value, Mapping):
            inside = (*path, key)
            lines += ["", f"[{'.'.join(map(_key, inside))}]", *_lines(value, inside)]
    return lines


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _text(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    raise TypeError(
        f"config.toml: expected text, numbers, booleans, lists or tables, found {value!r}; "
        "give it as text"
    )


def _text(value: str) -> str:
    # JSON's escapes are TOML's, but for this one character, which JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check_type(name: str, value: Any, types: tuple[type, ...]) -> None:
    optional = value is None and name in ("root", "limit", "test_rows", "data_seed", "threads")
    if optional or (isinstance(value, types) and not isinstance(value, bool)):
        return
    expected = " or ".join(each.__name__ for each in types)
    raise ValueError(f"{name}: expected {expected}, found {value!r}")
