r"""Likelihoods p(x_m | z): from the raw output of a decoder to a Pyro distribution.

A likelihood says which tensors the decoder must give (:meth:`Likelihood.param_shapes`), turns them
into a distribution whose batch shape is what leads and whose event shape is that of the modality,
and knows its own support: what to fill masked values with, and what observed values must satisfy.
Outputs are unconstrained; scales that are predicted go through a softplus.

Differs from Pyro's own distributions: log densities of the Bernoulli, the continuous Bernoulli and
the one-hot categorical are written in terms of the logits, which is faster and exact in the tails.
"""

import copy
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, ClassVar, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor, nn
from torch.distributions import Distribution as TorchDistribution
from torch.nn.functional import softplus

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "CallableLikelihood",
    "Categorical",
    "ContinuousBernoulli",
    "Laplace",
    "Likelihood",
    "Normal",
    "OneHotCategorical",
    "StudentT",
    "as_likelihood",
    "likelihood_from_config",
]

Shape = tuple[int, ...]
Output = Tensor | Sequence[Tensor]
Scale = float | Literal["learned", "predicted"]

# A predicted scale never reaches zero, where the density is unbounded.
SCALE_FLOOR = 1e-4


class _LogitsBernoulli(dist.Bernoulli):
    """Bernoulli with log p(x) = x l - log(1 + e^l); values broadcast over leading dimensions."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits = self.logits
        value = value.to(logits.dtype)
        # Above the threshold softplus is the identity, exact in float64 from 40 on.
        log_prob = softplus(logits, threshold=40.0).neg_()
        if value.shape == logits.shape[logits.dim() - value.dim() :]:
            # In place: for thousands of draws, fresh memory costs more than the arithmetic.
            return log_prob.addcmul_(value, logits)
        return torch.addcmul(log_prob, value, logits)


class _LogitsContinuousBernoulli(dist.ContinuousBernoulli):
    r"""Continuous Bernoulli in terms of its logit: p(x) = e^{x l} l / (e^l - 1) on [0, 1].

    The continuous Bernoulli (Loaiza-Ganem & Cunningham, 2019), https://arxiv.org/abs/1907.06845
    """

    def _log_partition(self) -> Tensor:
        """Log of (e^l - 1) / l, with a series near l = 0 where its gradient cancels."""
        logits = self.logits
        small = logits.abs() < 0.1
        size = torch.where(small, torch.ones_like(logits), logits.abs())
        exact = logits.relu() + torch.log(-torch.expm1(-size)) - size.log()
        square = torch.where(small, logits, torch.zeros_like(logits)).square()
        series = square * (1 / 24 - square * (1 / 2880 - square / 181440))
        return torch.where(small, logits / 2 + series, exact)

    def _cont_bern_log_norm(self) -> Tensor:
        return softplus(self.logits, threshold=40.0) - self._log_partition()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return value * self.logits - self._log_partition()

    @property
    def mean(self) -> Tensor:
        logits = self.logits
        small = logits.abs() < 0.1
        safe = torch.where(small, torch.ones_like(logits), logits)
        square = logits.square()
        series = 0.5 + logits * (1 / 12 - square * (1 / 720 - square / 30240))
        return torch.where(small, series, -1 / torch.expm1(-safe) - 1 / safe)

    def cdf(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        size, up = self._size()
        value = value.clamp(0, 1)
        flipped = torch.where(up, 1 - value, value)
        lower = torch.expm1(-size * flipped) / torch.expm1(-size)
        return torch.where(up, 1 - lower, lower)

    def icdf(self, value: Tensor) -> Tensor:
        size, up = self._size()
        # Both ends of the open interval: the quantile there is finite, its gradient is not.
        eps = torch.finfo(size.dtype).eps
        value = torch.where(up, 1 - value, value).clamp(eps / 2, 1 - eps / 2)
        lower = -torch.log1p(value * torch.expm1(-size)) / size
        return torch.where(up, 1 - lower, lower).clamp(0, 1)

    def _size(self) -> tuple[Tensor, Tensor]:
        """|l|, kept off zero, and whether l > 0: e^{-|l|} cannot overflow, so all is flipped."""
        tiny = torch.finfo(self.logits.dtype).tiny ** 0.5
        return self.logits.abs().clamp(min=tiny), self.logits > 0


class _LogitsOneHotCategorical(dist.OneHotCategorical):
    """One-hot categorical with log p(x) = sum_c x_c log_softmax(l)_c; values broadcast."""

    def __init__(self, logits: Tensor) -> None:
        validate_args = _validation(logits)
        self._categorical = dist.Categorical(logits=logits, validate_args=validate_args)
        shape = logits.shape
        TorchDistribution.__init__(self, shape[:-1], shape[-1:], validate_args=validate_args)

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> "_LogitsOneHotCategorical":
        new = self._get_checked_instance(_LogitsOneHotCategorical, _instance)
        return super().expand(batch_shape, _instance=new)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (value * self.logits).sum(-1)


class _Independent(dist.Independent):
    """Event dimensions for a distribution, zero rows included, where torch's own sum fails."""

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.base_dist.log_prob(value)
        return log_prob.flatten(-self.reinterpreted_batch_ndims).sum(-1)


class Likelihood(nn.Module):
    """A family of distributions for one modality.

    Objects that users hold are descriptions and are never changed: a model calls :meth:`build`,
    which gives a copy that owns its learned parameters.
    """

    name: ClassVar[str] = "likelihood"
    #: whether log p(x | z) is a sum over the entries of x, so that single entries can be masked
    factorises: bool = True
    #: whether log p(x | z) is the logarithm of a probability, and no density
    is_discrete: bool = False

    def param_shapes(self, event_shape: Shape) -> dict[str, Shape]:
        """Name and event shape of each tensor that the decoder must give."""
        return {"logits": tuple(event_shape)}

    def distribution(self, event_shape: Shape, **params: Tensor) -> TorchDistributionMixin:
        """The distribution for raw parameters of shape (*, *param_shape)."""
        raise NotImplementedError

    def forward(
        self, output: Output, event_shape: Shape, *, where: str | None = None
    ) -> TorchDistributionMixin:
        """Turn the output of a decoder into a distribution.

        Args:
            output: one tensor for each of :meth:`param_shapes`, in that order, or a single tensor
                whose last dimension is split between them; (*, *param_shape).
            event_shape: event shape of the modality.
            where: beginning of error messages.

        Returns:
            Distribution, (*) | event_shape.
        """
        event_shape = tuple(event_shape)
        where = where or f"likelihood {self.name!r}"
        params = _split(output, self.param_shapes(event_shape), where)
        result = self.distribution(event_shape, **params)
        missing_dims = len(event_shape) - result.event_dim
        return _Independent(result, missing_dims) if missing_dims else result

    def build(self, event_shape: Shape) -> "Likelihood":
        """Return a fresh copy that owns its learned parameters; self is left as it is."""
        built = copy.deepcopy(self)
        built._create_parameters(tuple(event_shape))
        return built

    def _create_parameters(self, event_shape: Shape) -> None:
        """Create learned parameters; nothing by default."""

    def filler(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """One value inside the support, used in place of values that are masked."""
        return torch.zeros(event_shape, dtype=dtype, device=device)

    def cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Bring data to the dtype that networks and density expect."""
        return value.to(dtype)

    def check(self, value: Tensor, where: str) -> None:
        """Raise unless the observed values, (R, *event_shape), can be scored.

        Args:
            value: observed rows only.
            where: beginning of the message, such as ``modality 'image'``.
        """
        self.check_dtype(value, where)
        self.check_support(value, where)

    def check_dtype(self, value: Tensor, where: str) -> None:
        """Raise a TypeError unless the values are real numbers."""
        if value.is_complex():
            raise TypeError(f"{where}: expected real values, found {value.dtype}; split them")

    def check_support(self, value: Tensor, where: str) -> None:
        """Raise a ValueError for NaN, infinite values and values outside the support."""
        _check_nan(value, where)
        if value.is_floating_point() and value.isinf().any():
            raise ValueError(
                f"{where}: expected finite values, found an infinite one in an observed row; "
                "mask the row with observed or repair it"
            )

    def config(self) -> dict[str, Any]:
        """JSON-able description, read by :func:`likelihood_from_config`."""
        return {"name": self.name}


class Bernoulli(Likelihood):
    """Binary values (0 or 1, of any dtype); the decoder gives logits."""

    name = "bernoulli"
    is_discrete = True

    def distribution(self, event_shape: Shape, **params: Tensor) -> TorchDistributionMixin:
        """Bernoulli of the logits."""
        return _LogitsBernoulli(logits=params["logits"])

    def check_support(self, value: Tensor, where: str) -> None:
        """Raise unless every value is 0 or 1."""
        _check_nan(value, where)
        if not ((value == 0) | (value == 1)).all():
            raise ValueError(
                f"{where}: expected values 0 or 1 for likelihood 'bernoulli', found values "
                f"{_range(value)}; binarise them (the readers' `binarize=`) or use likelihood "
                "'continuous_bernoulli'"
            )


class ContinuousBernoulli(Likelihood):
    """Values in [0, 1], such as grey values; the decoder gives logits.

    The continuous Bernoulli (Loaiza-Ganem & Cunningham, 2019), https://arxiv.org/abs/1907.06845
    """

    name = "continuous_bernoulli"

    def distribution(self, event_shape: Shape, **params: Tensor) -> TorchDistributionMixin:
        """Continuous Bernoulli of the logits."""
        return _LogitsContinuousBernoulli(logits=params["logits"])

    def check_support(self, value: Tensor, where: str) -> None:
        """Raise unless every value lies in [0, 1]."""
        _check_nan(value, where)
        if not ((value >= 0) & (value <= 1)).all():
            raise ValueError(
                f"{where}: expected values in [0, 1] for likelihood 'continuous_bernoulli', found "
                f"values {_range(value)}; rescale them (8-bit grey values: divide by 255)"
            )


class Categorical(Likelihood):
    """Integer labels 0 .. num_classes - 1; the decoder gives logits (*event_shape, num_classes).

    Args:
        num_classes: number of classes, C.
    """

    name = "categorical"
    is_discrete = True
    factorises = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        with suppress(TypeError):  # numpy's integers and tensors of one are as good
            num_classes = operator.index(num_classes)
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(
                f"Categorical: expected num_classes of 2 or more, found {num_classes!r}"
            )
        self.num_classes = num_classes

    def param_shapes(self, event_shape: Shape) -> dict[str, Shape]:
        """Logits of shape (*event_shape, C)."""
        return {"logits": (*event_shape, self.num_classes)}

    def distribution(self, event_shape: Shape, **params: Tensor) -> TorchDistributionMixin:
        """Categorical of the logits."""
        logits = params["logits"]
        return dist.Categorical(logits=logits, validate_args=_validation(logits))

    def filler(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Class 0; the dtype is int64 whatever is asked for."""
        return torch.zeros(event_shape, dtype=torch.long, device=device)

    def cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Labels as int64."""
        return value.long()

    def check_dtype(self, value: Tensor, where: str) -> None:
        """Raise a TypeError unless labels are integers."""
        if value.is_floating_point() or value.is_complex():
            raise TypeError(
                f"{where}: expected integer labels for likelihood 'categorical', found "
                f"{value.dtype}; use .long(), or .argmax(-1) of one-hot rows"
            )

    def check_support(self, value: Tensor, where: str) -> None:
        """Raise unless every label is one of the classes."""
        labels = value.long()
        if not ((labels >= 0) & (labels < self.num_classes)).all():
            raise ValueError(
                f"{where}: expected labels 0 .. {self.num_classes - 1} "
                f"(num_classes={self.num_classes}), found labels {_range(labels)}; "
                "relabel them or raise num_classes"
            )

    def config(self) -> dict[str, Any]:
        """Name and number of classes."""
        return {"name": self.name, "num_classes": self.num_classes}


class OneHotCategorical(Likelihood):
    """One-hot vectors along the last dimension of the event; the decoder gives logits."""

    name = "one_hot_categorical"
    is_discrete = True
    factorises = False

    def param_shapes(self, event_shape: Shape) -> dict[str, Shape]:
        """Logits of the shape of the event, the last dimension being the classes."""
        if not event_shape:
            raise ValueError(
                "likelihood 'one_hot_categorical': expected event shape (num_classes,), found (); "
                "use Categorical(num_classes=...) for integer labels"
            )
        return {"logits": tuple(event_shape)}

    def distribution(self, event_shape: Shape, **params: Tensor) -> TorchDistributionMixin:
        """One-hot categorical of the logits."""
        return _LogitsOneHotCategorical(params["logits"])

    def filler(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The first class, one-hot: zeros are not in the support."""
        filler = torch.zeros(event_shape, dtype=dtype, device=device)
        filler[..., 0] = 1
        return filler

    def check_support(self, value: Tensor, where: str) -> None:
        """Raise unless each vector has one 1 and zeros elsewhere."""
        _check_nan(value, where)
        if not ((value == 0) | (value == 1)).all():
            raise ValueError(
                f"{where}: expected one-hot vectors of 0 and 1, found values {_range(value)}; "
                "use torch.nn.functional.one_hot or Categorical(num_classes=...)"
            )
        total = value.sum(-1)
        if not (total == 1).all():
            raise ValueError(
                f"{where}: expected one-hot vectors that sum to 1, found sums {_range(total)}; "
                "a row without a class is masked with observed, several classes want 'bernoulli'"
            )


class _LocationScale(Likelihood):
    """Location from the decoder; scale fixed, learned for each entry, or from the decoder too."""

    def __init__(self, scale: Scale = 1.0) -> None:
        super().__init__()
        self.scale = _positive_or(scale, ("learned", "predicted"), f"{type(self).__name__}: scale")

    def param_shapes(self, event_shape: Shape) -> dict[str, Shape]:
        """The location and, if it is predicted, the scale."""
        names = ("loc", "scale") if self.scale == "predicted" else ("loc",)
        return {name: tuple(event_shape) for name in names}

    def _create_parameters(self, event_shape: Shape) -> None:
        if self.scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(event_shape))

    def _scale(self, params: Mapping[str, Tensor]) -> float | Tensor:
        if self.scale == "predicted":
            return softplus(params["scale"]) + SCALE_FLOOR
        if self.scale == "learned":
            return self._learned("log_scale").exp()
        return float(self.scale)

    def _learned(self, name: str) -> Tensor:
        if name not in self._parameters:
            raise ValueError(
                f"likelihood {self.name!r}: its learned parameters do not exist yet; "
                "use likelihood.build(event_shape)"
            )
        return getattr(self, name)

    def config(self) -> dict[str, Any]:
        """Name and scale."""
        return {"name": self.name, "scale": self.scale}


class Normal(_LocationScale):
    """Real values with Gaussian noise.

    Args:
        scale: a positive number; ``"learned"``: one parameter for each entry of the event, starting
            at 1; ``"predicted"``: softplus of a second output of the decoder.
    """

    name = "normal"

    def distribution(self, event_shape: Shape, **params: Tensor) -> TorchDistributionMixin:
        """Normal around the location."""
        return dist.Normal(params["loc"], self._scale(params))


class Laplace(_LocationScale):
    """Real values with Laplace noise.

    Args:
        scale: a positive number; ``"learned"``: one parameter for each entry of the event, starting
            at 1; ``"predicted"``: softplus of a second output of the decoder.
    """

    name = "laplace"

    def distribution(self, event_shape: Shape, **params: Tensor) -> TorchDistributionMixin:
        """Laplace around the location."""
        return dist.Laplace(params["loc"], self._scale(params))


class StudentT(_LocationScale):
    """Real values with heavy-tailed noise.

    Args:
        df: degrees of freedom, a positive number, or ``"learned"``: 1 + exp of one parameter for
            each entry of the event, starting at 5, so that the mean always exists.
        scale: a positive number, ``"learned"`` or ``"predicted"``, as for :class:`Normal`.
    """

    name = "student_t"

    def __init__(self, df: float | Literal["learned"] = 5.0, *, scale: Scale = 1.0) -> None:
        super().__init__(scale)
        self.df = _positive_or(df, ("learned",), "StudentT: df")

    def _create_parameters(self, event_shape: Shape) -> None:
        super()._create_parameters(event_shape)
        if self.df == "learned":
            self.log_df_minus_one = nn.Parameter(torch.full(event_shape, math.log(4.0)))

    def distribution(self, event_shape: Shape, **params: Tensor) -> TorchDistributionMixin:
        """Student's t around the location."""
        learned = self.df == "learned"
        df = 1 + self._learned("log_df_minus_one").exp() if learned else float(self.df)
        return dist.StudentT(df, params["loc"], self._scale(params))

    def config(self) -> dict[str, Any]:
        """Name, degrees of freedom and scale."""
        return {"name": self.name, "df": self.df, "scale": self.scale}


class CallableLikelihood(Likelihood):
    """Any callable from the decoder's tensors to a Pyro distribution.

    Args:
        fn: without ``params`` it is called with the one output of the decoder, (*, *event_shape);
            with ``params`` by keyword, with one tensor for each name. Event dimensions that the
            result lacks are declared with ``to_event``.
        params: name -> shape, or a function from the event shape to such a dict.
        filler: a number inside the support, or a tensor of the event shape.
        factorises: whether the log density is a sum over entries.
    """

    name = "custom"

    def __init__(
        self,
        fn: Callable[..., TorchDistributionMixin],
        params: Mapping[str, Shape] | Callable[[Shape], Mapping[str, Shape]] | None = None,
        *,
        filler: float | Tensor = 0.0,
        factorises: bool = False,
    ) -> None:
        super().__init__()
        self.fn = fn
        self.params = params
        self.fill = filler
        self.factorises = factorises

    def param_shapes(self, event_shape: Shape) -> dict[str, Shape]:
        """What was given, or one tensor of the event shape."""
        params = self.params
        if params is None:
            return {"output": tuple(event_shape)}
        given = params(tuple(event_shape)) if callable(params) else params
        return {name: tuple(shape) for name, shape in given.items()}

    def distribution(self, event_shape: Shape, **params: Tensor) -> TorchDistributionMixin:
        """What the callable gives, with its type and its event shape checked."""
        rows = all(part.numel() for part in params.values())
        # Off for zero rows, where torch's check of vectors fails.
        with nullcontext() if rows else pyro.validation_enabled(False):
            result = self.fn(params["output"]) if self.params is None else self.fn(**params)
        if not isinstance(result, TorchDistributionMixin):
            raise TypeError(
                "likelihood 'custom': expected a distribution of pyro.distributions, found "
                f"{type(result).__name__}; return pyro.distributions.… from the callable"
            )
        full = tuple(result.shape())
        found = full[max(0, len(full) - len(event_shape)) :]
        if result.event_dim > len(event_shape) or found != event_shape:
            raise ValueError(
                f"likelihood 'custom': expected a distribution of event shape {event_shape}, "
                f"found batch shape {tuple(result.batch_shape)} and event shape "
                f"{tuple(result.event_shape)}; change the callable or event_shape"
            )
        return result

    def filler(
        self,
        event_shape: Shape,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """What was given, expanded to the event shape."""
        return torch.as_tensor(self.fill, dtype=dtype, device=device).expand(event_shape).clone()

    def config(self) -> dict[str, Any]:
        """A callable cannot be written down."""
        return {"name": self.name, "custom": True}


LIKELIHOODS: dict[str, type[Likelihood]] = {
    kind.name: kind
    for kind in (
        Bernoulli,
        ContinuousBernoulli,
        Categorical,
        OneHotCategorical,
        Normal,
        Laplace,
        StudentT,
    )
}


def as_likelihood(
    spec: str | Likelihood | Callable[..., TorchDistributionMixin], where: str = "likelihood"
) -> Likelihood:
    """Return the likelihood that a name, an object or a callable stands for.

    Args:
        spec: a name of :data:`LIKELIHOODS`, a :class:`Likelihood`, or a callable from the decoder's
            output to a Pyro distribution.
        where: beginning of error messages.
    """
    if isinstance(spec, Likelihood):
        return spec
    if isinstance(spec, str):
        return _by_name(spec, {}, where)
    for name, kind in LIKELIHOODS.items():
        if spec is kind:
            return _by_name(name, {}, where)
    if callable(spec):
        return CallableLikelihood(spec)
    raise TypeError(
        f"{where}: expected a name, a Likelihood or a callable as likelihood, found "
        f"{type(spec).__name__}"
    )


def likelihood_from_config(config: Mapping[str, Any], where: str = "likelihood") -> Likelihood:
    """Inverse of :meth:`Likelihood.config`, for all but callables."""
    options = dict(config)
    name = options.pop("name", None)
    if options.get("custom"):
        raise ValueError(
            f"{where}: expected a likelihood that has a name, found a custom callable, which is "
            "not stored; build it again and pass it yourself"
        )
    return _by_name(name, options, where)


def _by_name(name: object, options: Mapping[str, Any], where: str) -> Likelihood:
    if name not in LIKELIHOODS:
        known = ", ".join(repr(key) for key in LIKELIHOODS)
        raise ValueError(f"{where}: unknown likelihood {name!r}; known: {known}")
    if name == "categorical" and "num_classes" not in options:
        raise ValueError(
            f"{where}: expected a number of classes, found the name 'categorical' alone; "
            "use likelihood=Categorical(num_classes=10)"
        )
    try:
        return LIKELIHOODS[str(name)](**options)
    except TypeError as error:
        found = sorted(options)
        raise ValueError(f"{where}: likelihood {name!r} has no such options {found}") from error


def _positive_or(value: object, words: tuple[str, ...], where: str) -> Any:
    """Return a positive float or one of the words."""
    if isinstance(value, str) and value in words:
        return value
    number: Any = value
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.shape == ():
        number = value.item()  # such as a standard deviation of the data
    if isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf:
        return float(number)
    choices = " or ".join(repr(word) for word in words)
    raise ValueError(f"{where}: expected a positive number or {choices}, found {value!r}")


def _split(output: Output, shapes: Mapping[str, Shape], where: str) -> dict[str, Tensor]:
    """Name the tensors of a decoder's output, split one tensor if need be, and check shapes."""
    if not isinstance(output, Tensor):
        parts = list(output)
    elif len(shapes) == 1:
        parts = [output]
    else:
        parts = _split_last(output, list(shapes.values()))
    fits = len(parts) == len(shapes) and all(
        _ends_with(part.shape, shape) for part, shape in zip(parts, shapes.values(), strict=True)
    )
    if not fits:
        found = tuple(output.shape) if isinstance(output, Tensor) else _shapes(output)
        expected = ", ".join(f"{name} (*, {_inner(shape)})" for name, shape in shapes.items())
        raise ValueError(
            f"{where}: expected a decoder that gives {expected}, found {found}; change the decoder "
            "(likelihood.param_shapes(event_shape) says what it must give)"
        )
    return dict(zip(shapes, parts, strict=True))


def _split_last(output: Tensor, shapes: list[Shape]) -> list[Tensor]:
    """Split the last dimension by sizes; scalars take one place each. [] if that is impossible."""
    if output.dim() == 0 or any(shape[:-1] != shapes[0][:-1] for shape in shapes):
        return []
    sizes = [shape[-1] if shape else 1 for shape in shapes]
    if output.shape[-1] != sum(sizes):
        return []
    parts = output.split(sizes, -1)
    return [part if shape else part.squeeze(-1) for part, shape in zip(parts, shapes, strict=True)]


def _ends_with(found: Size, expected: Shape) -> bool:
    lead = len(found) - len(expected)
    return lead >= 0 and tuple(found[lead:]) == expected


def _inner(shape: Shape) -> str:
    return ", ".join(str(size) for size in shape)


def _shapes(parts: Sequence[Tensor]) -> list[Shape]:
    return [tuple(part.shape) for part in parts]


def _validation(logits: Tensor) -> bool | None:
    """Off for zero rows, where torch's check of vectors fails; else what is set globally."""
    return None if logits.numel() else False


def _check_nan(value: Tensor, where: str) -> None:
    if value.is_floating_point() and value.isnan().any():
        raise ValueError(
            f"{where}: expected numbers in every observed row, found NaN; mask the row with "
            "observed, or mask single entries with Modality(..., entrywise_missing=True)"
        )


def _range(value: Tensor) -> str:
    value = value.double()
    return f"from {value.min().item():g} to {value.max().item():g}"
