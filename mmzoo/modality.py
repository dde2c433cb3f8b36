"""What a modality is: a name, a shape, a likelihood, and the networks around it."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from mmzoo.likelihoods import Likelihood, as_likelihood, likelihood_from_config
from mmzoo.networks import default_decoder, default_encoder

__all__ = ["Modality"]

LikelihoodSpec = str | Likelihood | Callable[..., TorchDistributionMixin]
NetworkSpec = str | Mapping[str, Any] | nn.Module | Callable[..., nn.Module]

RESERVED = ("z", "data", "subsets", "particles")
ENCODER_OPTIONS = {"mlp": {"hidden"}, "conv": {"channels", "features"}}
DECODER_OPTIONS = {"mlp": {"hidden"}, "conv": {"channels"}}


@dataclass(frozen=True, eq=False, init=False)
class Modality:
    """One kind of measurement. A plain description: models build networks from it.

    Args:
        name: letters, digits and ``_``; ``z``, ``data``, ``subsets``, ``particles``, ``w_…`` and
            ``z_…`` are reserved.
        event_shape: shape of one value, without the batch; () for one number or one label.
        likelihood: a name such as ``"bernoulli"``, a :class:`~mmzoo.likelihoods.Likelihood`, or a
            callable from the decoder's output to a Pyro distribution.
        encoder: module (R, *event_shape) -> (R, H), or -> (loc, scale > 0); a function without
            arguments that makes one; ``"mlp"``, ``"conv"``, or a dict such as
            ``{"kind": "mlp", "hidden": [512, 512]}``; None: chosen from the shape.
        decoder: module from (R, L) to the parameters of the likelihood; a function of L that makes
            one; or as above.
        entrywise_missing: single NaN entries inside observed rows are masked; for likelihoods that
            factorise over entries.

    Modules are copied when a model is built, so that two models never share weights. Data of
    integer dtypes are accepted and brought to the model's dtype (:meth:`cast`).

    Example:
        >>> Modality("image", (1, 28, 28), likelihood="bernoulli").event_shape
        (1, 28, 28)
    """

    name: str
    event_shape: tuple[int, ...]
    likelihood: Likelihood
    encoder: NetworkSpec | None
    decoder: NetworkSpec | None
    entrywise_missing: bool

    def __init__(
        self,
        name: str,
        event_shape: Sequence[int],
        likelihood: LikelihoodSpec = "normal",
        *,
        encoder: NetworkSpec | None = None,
        decoder: NetworkSpec | None = None,
        entrywise_missing: bool = False,
    ) -> None:
        _check_name(name)
        where = f"modality {name!r}"
        values = {
            "name": name,
            "event_shape": _event_shape(event_shape, where),
            "likelihood": as_likelihood(likelihood, where),
            "encoder": encoder,
            "decoder": decoder,
            "entrywise_missing": bool(entrywise_missing),
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)  # the dataclass is frozen
        self._check_parts()

    def _check_parts(self) -> None:
        """Raise where shape, likelihood and networks do not go together."""
        with _prefixed(self._where):
            self.likelihood.param_shapes(self.event_shape)
        if self.entrywise_missing and not self.likelihood.factorises:
            raise ValueError(
                f"{self._where}: expected a likelihood that factorises over entries for "
                f"entrywise_missing=True, found {self.likelihood.name!r}; "
                "mask whole rows with observed"
            )
        _check_network(self.encoder, ENCODER_OPTIONS, f"{self._where}: encoder")
        _check_network(self.decoder, DECODER_OPTIONS, f"{self._where}: decoder")

    @property
    def _where(self) -> str:
        return f"modality {self.name!r}"

    def make_encoder(self) -> nn.Module:
        """A fresh encoder (R, *event_shape) -> (R, H); a module that was given is copied."""
        where = f"{self._where}: encoder"
        if _is_described(self.encoder):
            options = _options(self.encoder)
            with _prefixed(self._where):
                return default_encoder(self.event_shape, self.likelihood, **options)
        return _make(self.encoder, where)

    def make_decoder(self, latent_dim: int) -> nn.Module:
        """A fresh decoder (R, L) -> parameters of the likelihood; a given module is copied."""
        where = f"{self._where}: decoder"
        if _is_described(self.decoder):
            shapes = self.likelihood.param_shapes(self.event_shape)
            with _prefixed(self._where):
                return default_decoder(latent_dim, shapes, **_options(self.decoder))
        return _make(self.decoder, where, latent_dim)

    def make_likelihood(self) -> Likelihood:
        """A fresh likelihood that owns its learned parameters."""
        return self.likelihood.build(self.event_shape)

    def cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Bring data to the dtype of the model; labels of a categorical become int64."""
        return self.likelihood.cast(value, dtype)

    def check(self, value: object, observed: object = None, *, values: bool = True) -> None:
        """Raise a TypeError or a ValueError that says what is wrong with the data.

        Args:
            value: data, (*, N, *event_shape).
            observed: bool mask that broadcasts with (*, N); None: all observed. Values of rows that
                are not observed are never looked at.
            values: also look at the values; False checks types and shapes only.
        """
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{self._where}: expected a torch.Tensor, found {type(value).__name__}; "
                f"use torch.as_tensor(x[{self.name!r}])"
            )
        batch_shape = self._batch_shape(value)
        mask = self._mask(observed, batch_shape)
        self.likelihood.check_dtype(value, self._where)
        if values:
            rows = value.reshape(-1, *self.event_shape) if mask is None else value[mask]
            if self.entrywise_missing and rows.is_floating_point():
                filler = self.likelihood.filler(self.event_shape, rows.dtype, rows.device)
                rows = torch.where(rows.isnan(), filler, rows)
            if rows.numel():
                self.likelihood.check_support(rows, self._where)

    def _batch_shape(self, value: Tensor) -> torch.Size:
        """Leading dimensions (*, N) of the data."""
        lead = value.dim() - len(self.event_shape)
        if lead >= 1 and tuple(value.shape[lead:]) == self.event_shape:
            return value.shape[:lead]
        if tuple(value.shape) == self.event_shape:
            expected = ", ".join(["N", *map(str, self.event_shape)])
            raise ValueError(
                f"{self._where}: expected a batch of shape ({expected}), found a single value of "
                f"shape {self.event_shape}; use x[{self.name!r}][None]"
            )
        found = tuple(value.shape[1:])
        raise ValueError(
            f"{self._where}: expected event shape {self.event_shape}, found {found}; "
            f"reshape x[{self.name!r}] or set event_shape={found}"
        )

    def _mask(self, observed: object, batch_shape: torch.Size) -> Tensor | None:
        """Rows of the data, (*, N), that are observed in some element of the mask's batch."""
        if observed is None:
            return None
        if not isinstance(observed, Tensor) or observed.dtype != torch.bool:
            found = observed.dtype if isinstance(observed, Tensor) else type(observed).__name__
            raise TypeError(
                f"{self._where}: expected observed[{self.name!r}] to be a bool tensor, "
                f"found {found}; use torch.as_tensor(...).bool()"
            )
        try:
            full = torch.broadcast_shapes(observed.shape, batch_shape)
        except RuntimeError:
            full = None
        if full is None or observed.dim() == 0 or observed.shape[-1] != batch_shape[-1]:
            raise ValueError(
                f"{self._where}: expected observed[{self.name!r}] of shape {tuple(batch_shape)}, "
                f"found {tuple(observed.shape)}; give one entry for each row"
            )
        return observed.expand(full).long().sum_to_size(batch_shape) > 0

    def config(self) -> dict[str, Any]:
        """JSON-able description; modules and callables are recorded as ``{"custom": true}``."""
        return {
            "name": self.name,
            "event_shape": list(self.event_shape),
            "likelihood": self.likelihood.config(),
            "encoder": _network_config(self.encoder),
            "decoder": _network_config(self.decoder),
            "entrywise_missing": self.entrywise_missing,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Modality":
        """Inverse of :meth:`config`; custom parts cannot come back and are a ValueError."""
        options = dict(config)
        name = options["name"]
        for part in ("likelihood", "encoder", "decoder"):
            if isinstance(options[part], Mapping) and options[part].get("custom"):
                raise ValueError(
                    f"modality {name!r}: expected its {part} by name, found a custom one, "
                    "which is not stored; pass modalities=[…] with the same modalities as before"
                )
        likelihood = likelihood_from_config(options.pop("likelihood"), f"modality {name!r}")
        return cls(likelihood=likelihood, **options)


@contextmanager
def _prefixed(where: str) -> Iterator[None]:
    """Put the modality in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ValueError(
            f"modality {name!r}: expected a name of letters, digits and '_', found {name!r}; "
            "rename it, for instance 'image'"
        )
    if name in RESERVED or name.startswith(("w_", "z_")):
        raise ValueError(
            f"modality {name!r}: expected a name other than {', '.join(RESERVED)}, w_… and z_…, "
            f"which are sites and plates of the models, found {name!r}; rename it"
        )


def _event_shape(shape: object, where: str) -> tuple[int, ...]:
    valid = isinstance(shape, tuple | list) and all(
        isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0
        for size in shape
    )
    if not valid:
        raise ValueError(
            f"{where}: expected event_shape to be a tuple of positive integers, found {shape!r}; "
            "write (200,) for a vector of 200 entries"
        )
    return tuple(int(size) for size in shape)  # type: ignore[attr-defined]


def _is_described(spec: NetworkSpec | None) -> bool:
    return spec is None or isinstance(spec, str | Mapping)


def _options(spec: Any) -> dict[str, Any]:
    """Keyword arguments of the default networks."""
    return {"kind": spec} if spec is None or isinstance(spec, str) else dict(spec)


def _check_network(spec: object, options: Mapping[str, set[str]], where: str) -> None:
    if isinstance(spec, str | Mapping):
        found = _options(spec)
        kind = found.pop("kind", None)
        if kind not in options:
            known = ", ".join(repr(name) for name in options)
            raise ValueError(f"{where}: unknown kind of network {kind!r}; known: {known}")
        unknown = sorted(set(found) - options[kind])
        if unknown:
            raise ValueError(
                f"{where}: expected options {sorted(options[kind])} for kind {kind!r}, "
                f"found {unknown}"
            )
    elif spec is not None and not callable(spec):
        raise TypeError(
            f"{where}: expected None, 'mlp', 'conv', a dict, an nn.Module or a callable, "
            f"found {type(spec).__name__}"
        )


def _make(spec: Any, where: str, *args: int) -> nn.Module:
    """Copy a module, or call a factory."""
    if isinstance(spec, nn.Module):
        return copy.deepcopy(spec)
    network = spec(*args)
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"{where}: expected a factory that returns an nn.Module, found "
            f"{type(network).__name__}; return the network itself"
        )
    return network


def _network_config(spec: Any) -> Any:
    if spec is None or isinstance(spec, str):
        return spec
    return dict(spec) if isinstance(spec, Mapping) else {"custom": True}
