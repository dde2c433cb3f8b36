"""Default encoders and decoders: multilayer perceptrons for vectors, convolutions for images.

Encoders map (R, *event_shape) to features (R, H), decoders map (R, L) to the parameters of the
likelihood; R counts rows and may be zero. Leading dimensions are flattened by the models, so a
network of this file, or of a user, always sees exactly one batch dimension.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pixel_shuffle

from mmzoo.likelihoods import Categorical, Likelihood

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "SplitOutput",
    "default_decoder",
    "default_encoder",
    "feature_size",
    "is_image",
]

Shape = tuple[int, ...]
Network = TypeVar("Network", bound=nn.Module)
MIN_IMAGE_SIZE = 8


class MLP(nn.Module):
    """Multilayer perceptron over the flattened event.

    Args:
        in_shape: number of inputs, or their event shape.
        out_shape: number of outputs, or their shape; None: the last hidden layer is the output.
        hidden: widths of the hidden layers.
        activation: factory of the nonlinearity.
        num_classes: inputs are integer labels, which are encoded one-hot with so many classes.
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        out_shape: int | Sequence[int] | None = None,
        *,
        hidden: Sequence[int] = (512, 512),
        activation: Callable[[], nn.Module] = nn.SiLU,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.out_shape = None if out_shape is None else _as_shape(out_shape)
        widths = [math.prod(_as_shape(in_shape)) * (num_classes or 1), *hidden]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(before, after), activation()]
        if self.out_shape is not None:
            layers.append(nn.Linear(widths[-1], math.prod(self.out_shape)))
        self.layers = _he_initialised(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map (R, *in_shape) to (R, *out_shape)."""
        if self.num_classes is not None:
            weight = next(self.layers.parameters())
            x = one_hot(x.long(), self.num_classes).to(weight.dtype)
        y = self.layers(_flatten(x))  # (R, H)
        return y if self.out_shape is None else y.reshape(y.shape[0], *self.out_shape)


class ConvEncoder(nn.Module):
    """Convolutions of stride two, then one full layer.

    Args:
        event_shape: (C, height, width) of the images, any size of 8 or more.
        features: number of features, H.
        channels: channels after each halving of the size.
        activation: factory of the nonlinearity.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        features: int = 256,
        *,
        channels: Sequence[int] = (32, 64, 128),
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        in_channels, height, width = _image_shape(event_shape, "ConvEncoder")
        layers: list[nn.Module] = []
        for before, after in zip([in_channels, *channels], channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), activation()]
        height, width = _halvings(height, width, len(channels))[-1]
        self.convolutions = nn.Sequential(*layers)
        self.full = nn.Sequential(
            nn.Linear(([in_channels, *channels])[-1] * height * width, features), activation()
        )
        _he_initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (R, C, height, width) to (R, H)."""
        return self.full(_flatten(self.convolutions(x)))


class ConvDecoder(nn.Module):
    """One full layer, then sub-pixel convolutions that double the size, cropped to fit exactly.

    Real-time single image super-resolution using an efficient sub-pixel convolutional network
    (Shi et al., 2016), https://arxiv.org/abs/1609.05158; on small images several times as fast on a
    CPU as transposed convolutions.

    Args:
        latent_dim: size of the latent, L.
        out_shape: (C, height, width) of the output, any size of 8 or more.
        channels: channels before each doubling of the size, listed as for :class:`ConvEncoder`.
        activation: factory of the nonlinearity.
    """

    def __init__(
        self,
        latent_dim: int,
        out_shape: Sequence[int],
        *,
        channels: Sequence[int] = (32, 64, 128),
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        out_channels, height, width = _image_shape(out_shape, "ConvDecoder")
        self.sizes = _halvings(height, width, len(channels))[::-1]
        widths = [out_channels, *channels][::-1]
        self.first_shape = (widths[0], *self.sizes[0])
        self.full = nn.Linear(latent_dim, math.prod(self.first_shape))
        self.activation = activation()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, 4 * after, 3, padding=1)
            for before, after in zip(widths, widths[1:], strict=False)
        )
        _he_initialised(self)

    def forward(self, z: Tensor) -> Tensor:
        """Map (R, L) to (R, C, height, width)."""
        y = self.full(z).reshape(z.shape[0], *self.first_shape)
        for convolution, (height, width) in zip(self.convolutions, self.sizes[1:], strict=True):
            y = _double(convolution(self.activation(y)))[..., :height, :width]
        return y


class SplitOutput(nn.Module):
    """Cut one output along dimension 1 into a tuple of tensors (R, *shape).

    Args:
        network: gives (R, total) or, for images of one size, (R, total channels, height, width).
        sizes: how much of dimension 1 each part takes.
        shapes: shape of each part.
    """

    def __init__(self, network: nn.Module, sizes: Sequence[int], shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.network = network
        self.sizes = list(sizes)
        self.shapes = list(shapes)

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """Map (R, L) to one tensor for each part."""
        parts = self.network(z).split(self.sizes, 1)
        return tuple(
            part.reshape(z.shape[0], *shape) for part, shape in zip(parts, self.shapes, strict=True)
        )


def default_encoder(
    event_shape: Sequence[int],
    likelihood: Likelihood | None = None,
    *,
    kind: str | None = None,
    hidden: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    features: int | None = None,
) -> nn.Module:
    """An encoder (R, *event_shape) -> (R, H) that suits the shape and the likelihood.

    Args:
        event_shape: event shape of the modality.
        likelihood: labels of a :class:`Categorical` are encoded one-hot.
        kind: ``"mlp"``, ``"conv"``, or None: convolutions for images (C, height, width) of at
            least 8 x 8, a perceptron for everything else.
        hidden: widths of the perceptron; None: two layers of 512, or of 128 for small events.
        channels: channels of the convolutions; None: chosen from the size.
        features: number of features of the convolutional encoder.
    """
    event_shape = tuple(event_shape)
    num_classes = likelihood.num_classes if isinstance(likelihood, Categorical) else None
    if (kind or _kind([event_shape], num_classes)) == "mlp":
        hidden = hidden or _hidden(math.prod(event_shape) * (num_classes or 1))
        return MLP(event_shape, hidden=hidden, num_classes=num_classes)
    if num_classes is not None:
        raise ValueError(
            f"encoder 'conv': expected real values, found labels of {num_classes} classes; "
            "use encoder='mlp'"
        )
    _image_shape(event_shape, "encoder 'conv'")
    channels = channels or _channels(*event_shape[1:])
    return ConvEncoder(event_shape, features or _features(event_shape), channels=channels)


def default_decoder(
    latent_dim: int,
    param_shapes: Mapping[str, Shape],
    *,
    kind: str | None = None,
    hidden: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
) -> nn.Module:
    """A decoder (R, L) -> parameters of a likelihood: one tensor, or a tuple if there are several.

    Args:
        latent_dim: size of the latent, L.
        param_shapes: what ``likelihood.param_shapes(event_shape)`` gives.
        kind: ``"mlp"``, ``"conv"`` or None, as for :func:`default_encoder`.
        hidden: widths of the perceptron.
        channels: channels of the convolutions, listed as for the encoder.
    """
    shapes = [tuple(shape) for shape in param_shapes.values()]
    if (kind or _kind(shapes)) == "mlp":
        sizes = [math.prod(shape) for shape in shapes]
        out_shape = shapes[0] if len(shapes) == 1 else (sum(sizes),)
        network: nn.Module = MLP(latent_dim, out_shape, hidden=hidden or _hidden(max(sizes)))
    else:
        _, *size = _image_shape(shapes[0], "decoder 'conv'")
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise ValueError(
                f"decoder 'conv': expected parameters of one size, found {shapes}; "
                "use decoder='mlp'"
            )
        sizes = [shape[0] for shape in shapes]
        channels = channels or _channels(*size)
        network = ConvDecoder(latent_dim, (sum(sizes), *size), channels=channels)
    return network if len(shapes) == 1 else SplitOutput(network, sizes, shapes)


def feature_size(
    encoder: nn.Module,
    event_shape: Sequence[int],
    likelihood: Likelihood,
    *,
    where: str = "encoder",
) -> int | None:
    """Number of features H of an encoder, by a dry run that leaves no trace.

    Training flags, buffers and the state of the random generators stay as they were.

    Args:
        encoder: module from (R, *event_shape) to (R, H), or to a tuple (loc, scale) of (R, L).
        event_shape: event shape of the modality.
        likelihood: its filler stands for data.
        where: beginning of error messages.

    Returns:
        H, or None if the encoder gives (loc, scale), that is, the expert itself.
    """
    output = _dry_run(encoder, _filler_rows(encoder, tuple(event_shape), likelihood))
    parts = output if isinstance(output, tuple | list) else [output]
    shapes = [tuple(part.shape) if isinstance(part, Tensor) else () for part in parts]
    if all(len(shape) == 2 and shape[0] == 2 for shape in shapes):
        if isinstance(output, Tensor):
            return int(output.shape[1])
        if len(shapes) == 2 and shapes[0] == shapes[1]:
            return None
    found = [shape or type(part).__name__ for shape, part in zip(shapes, parts, strict=True)]
    raise ValueError(
        f"{where}: expected features of shape (2, H), or a tuple (loc, scale), for 2 rows, found "
        f"{', '.join(map(str, found))}; flatten the output to one vector for each row"
    )


def is_image(event_shape: Sequence[int]) -> bool:
    """Whether convolutions suit the shape: (C, height, width) of at least 8 x 8."""
    return len(event_shape) == 3 and min(event_shape[1:]) >= MIN_IMAGE_SIZE


def _filler_rows(encoder: nn.Module, event_shape: Shape, likelihood: Likelihood) -> Tensor:
    """Two rows of filler with the dtype and on the device of the encoder."""
    tensor = next((p for p in encoder.parameters() if p.is_floating_point()), torch.empty(0))
    return likelihood.filler(event_shape, tensor.dtype, tensor.device).expand(2, *event_shape)


def _dry_run(module: nn.Module, rows: Tensor) -> object:
    """Output of the module in evaluation mode; its buffers and flags are put back."""
    training = [(part, part.training) for part in module.modules()]
    # Buffers of lazy modules have no values before the first call.
    buffers = [b for b in module.buffers() if not nn.parameter.is_lazy(b)]
    saved = [buffer.clone() for buffer in buffers]
    devices = [rows.device] if rows.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            return module.eval()(rows)
    finally:
        for part, flag in training:
            part.training = flag
        for buffer, values in zip(buffers, saved, strict=True):
            buffer.copy_(values)


def _he_initialised(network: Network) -> Network:
    """Weights by He et al. (2015), https://arxiv.org/abs/1502.01852, and zero biases.

    With torch's own initialisation the signal shrinks from layer to layer, and on small data sets
    the posterior collapses onto the prior before the decoder has learned to use it.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def _as_shape(shape: int | Sequence[int]) -> Shape:
    return tuple(shape) if isinstance(shape, Iterable) else (operator.index(shape),)


def _flatten(x: Tensor) -> Tensor:
    # reshape(R, -1) is ambiguous for zero rows
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _image_shape(shape: Sequence[int], where: str) -> tuple[int, int, int]:
    if not is_image(shape):
        raise ValueError(
            f"{where}: expected images (channels, height, width) of at least "
            f"{MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE}, found {tuple(shape)}; use 'mlp'"
        )
    channels, height, width = shape
    return channels, height, width


def _halvings(height: int, width: int, times: int) -> list[tuple[int, int]]:
    """Sizes after 0, 1, .. convolutions of stride two."""
    sizes = [(height, width)]
    for _ in range(times):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


def _double(y: Tensor) -> Tensor:
    """Sub-pixels (R, 4 C, h, w) to (R, C, 2 h, 2 w)."""
    rows, channels, height, width = y.shape
    if rows == 0:  # pixel_shuffle has no gradient for zero rows
        return y.reshape(0, channels // 4, 2 * height, 2 * width)
    return pixel_shuffle(y, 2)


def _kind(shapes: Sequence[Shape], num_classes: int | None = None) -> str:
    images = all(is_image(shape) and shape[1:] == shapes[0][1:] for shape in shapes)
    return "conv" if images and num_classes is None else "mlp"


def _hidden(size: int) -> tuple[int, int]:
    return (128, 128) if size <= 128 else (512, 512)


def _channels(height: int, width: int) -> tuple[int, ...]:
    """Two halvings for tiny images, three up to 64 x 64, one more for each doubling beyond."""
    if max(height, width) <= 32:
        return (16, 32) if max(height, width) <= 16 else (16, 32, 64)
    more = max(0, math.ceil(math.log2(max(height, width) / 64)))
    return (32, 64, 128) + (128,) * more


def _features(event_shape: Shape) -> int:
    return 128 if max(event_shape[1:]) <= 16 else 256
