"""Networks: every input is used, every output depends on the latent, dry runs leave no trace."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot, silu

from mmzoo.likelihoods import Bernoulli, Categorical, Normal
from mmzoo.networks import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    default_decoder,
    default_encoder,
    feature_size,
    is_image,
)

# Blocked matrix products add in another order for another number of rows.
ROUND_OFF = {"rtol": 1e-10, "atol": 1e-12}
IMAGES = [(1, 8, 8), (3, 8, 11), (1, 9, 13), (1, 28, 28), (3, 28, 28), (3, 31, 17), (3, 64, 64)]
SHAPES = [*IMAGES, (), (1,), (10,), (200,), (5, 7), (3, 4, 4), (2, 3, 4, 5)]


def test_mlp_is_the_composition_of_its_layers():
    mlp = MLP((2, 3), (4, 1), hidden=(5,))
    first, _, last = mlp.layers
    x = torch.randn(7, 2, 3)
    expected = silu(x.reshape(7, 6) @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(mlp(x), expected.reshape(7, 4, 1), **ROUND_OFF)


def test_mlp_without_out_shape_ends_in_its_activation():
    mlp = MLP(6, hidden=(5, 4), activation=nn.ReLU)
    y = mlp(torch.randn(50, 6))
    assert y.shape == (50, 4)
    assert (y >= 0).all() and (y == 0).any()


@pytest.mark.parametrize("event_shape", [(), (3,)])
def test_labels_are_encoded_one_hot(event_shape):
    encoder = default_encoder(event_shape, Categorical(4), hidden=(8,))
    labels = torch.randint(4, (6, *event_shape))
    hot = one_hot(labels, 4).double().reshape(6, -1)
    torch.testing.assert_close(encoder(labels), encoder.layers(hot), **ROUND_OFF)


@pytest.mark.parametrize("event_shape", SHAPES)
def test_encoder_uses_every_entry_and_keeps_rows_apart(event_shape):
    encoder = default_encoder(event_shape)
    x = torch.randn(4, *event_shape, requires_grad=True)
    features = encoder(x)
    assert features.dim() == 2
    (gradient,) = torch.autograd.grad(features[1].sum(), x)
    assert (gradient[1] != 0).all()
    assert (gradient[[0, 2, 3]] == 0).all()
    torch.testing.assert_close(encoder(x[2:3]), features[2:3], **ROUND_OFF)


@pytest.mark.parametrize("event_shape", SHAPES)
@pytest.mark.parametrize("likelihood", [Bernoulli(), Normal("predicted")])
def test_decoder_reaches_every_entry_from_the_latent(event_shape, likelihood):
    shapes = likelihood.param_shapes(event_shape)
    decoder = default_decoder(5, shapes)
    z = torch.randn(5, requires_grad=True)
    output = decoder(torch.stack([z, torch.zeros(5)]))
    parts = output if isinstance(output, tuple) else (output,)
    assert [part.shape for part in parts] == [(2, *shape) for shape in shapes.values()]
    # forward differences: an entry that ignores z would not move
    moved = decoder(torch.stack([z + torch.randn(5), torch.zeros(5)]))
    moved = moved if isinstance(moved, tuple) else (moved,)
    for before, after in zip(parts, moved, strict=True):
        assert (before[0] != after[0]).all()
        torch.testing.assert_close(before[1], after[1], **ROUND_OFF)
    assert likelihood(output, event_shape).event_shape == event_shape


@pytest.mark.parametrize("event_shape", SHAPES)
def test_networks_take_zero_rows(event_shape):
    encoder = default_encoder(event_shape)
    features = feature_size(encoder, event_shape, Bernoulli())
    assert encoder(torch.zeros(0, *event_shape)).shape == (0, features)
    decoded = default_decoder(5, {"logits": event_shape})(torch.zeros(0, 5))
    assert decoded.shape == (0, *event_shape)
    decoded.sum().backward()


def test_zero_rows_of_labels():
    assert default_encoder((), Categorical(3), hidden=(8,))(torch.zeros(0).long()).shape == (0, 8)


def test_parameters_of_a_decoder_do_not_overlap():
    for shape in [(2, 9, 8), (6,)]:
        decoder = default_decoder(5, {"loc": shape, "scale": shape})
        z = torch.randn(3, 5)
        loc, scale = decoder(z)
        torch.testing.assert_close(torch.cat([loc, scale], 1), decoder.network(z), rtol=0, atol=0)


def test_choice_of_kind():
    assert isinstance(default_encoder((3, 8, 8)), ConvEncoder)
    assert isinstance(default_decoder(4, {"logits": (3, 8, 8)}), ConvDecoder)
    for shape in [(3, 7, 8), (64,), (8, 8), (1, 1, 8, 8)]:
        assert not is_image(shape)
        assert isinstance(default_encoder(shape), MLP)
        assert isinstance(default_decoder(4, {"logits": shape}), MLP)
    assert isinstance(default_encoder((3, 8, 8), kind="mlp"), MLP)
    assert isinstance(default_decoder(4, {"logits": (3, 8, 8)}, kind="mlp"), MLP)
    assert isinstance(default_encoder((3, 8, 8), Categorical(4)), MLP)


def test_sizes_are_as_asked():
    encoder = default_encoder((1, 16, 16), kind="conv", channels=(4, 6), features=10)
    assert [layer.out_channels for layer in encoder.convolutions[::2]] == [4, 6]
    assert feature_size(encoder, (1, 16, 16), Bernoulli()) == 10
    assert feature_size(default_encoder((9,), hidden=(20, 30)), (9,), Normal()) == 30
    decoder = default_decoder(4, {"logits": (9,)}, hidden=(20, 30))
    assert [layer.out_features for layer in decoder.layers[::2]] == [20, 30, 9]


def test_default_channels_leave_at_most_eight_pixels_a_side():
    for size in (8, 16, 28, 32, 64, 65, 128, 200):
        decoder = default_decoder(4, {"logits": (1, size, size)})
        assert decoder.sizes[0][0] <= 8
        assert decoder.sizes[-1] == (size, size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvEncoder((64,)), r"ConvEncoder: expected images .*found \(64,\); use 'mlp'"),
        (lambda: ConvDecoder(4, (1, 7, 9)), r"of at least 8 x 8, found \(1, 7, 9\)"),
        (lambda: default_encoder((64,), kind="conv"), r"encoder 'conv': .*found \(64,\)"),
        (lambda: default_decoder(4, {"loc": (64,)}, kind="conv"), r"decoder 'conv': expected im"),
        (
            lambda: default_encoder((1, 8, 8), Categorical(4), kind="conv"),
            "found labels of 4 classes; use encoder='mlp'",
        ),
        (
            lambda: default_decoder(4, {"a": (1, 8, 8), "b": (1, 9, 8)}, kind="conv"),
            r"expected parameters of one size, found .*; use decoder='mlp'",
        ),
    ],
)
def test_shapes_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- dry run ------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Draws random numbers and changes a buffer, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros(()))
        self.layers[2].eval()

    def forward(self, x):
        self.calls += 1
        return self.layers(x) + torch.randn(())


def test_dry_run_leaves_no_trace():
    encoder = Counting()
    flags = [module.training for module in encoder.modules()]
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    seed = torch.get_rng_state()
    assert feature_size(encoder, (3,), Normal()) == 4
    assert [module.training for module in encoder.modules()] == flags
    assert torch.equal(torch.get_rng_state(), seed)
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_dry_run_restores_after_a_failure():
    encoder = Counting()
    with pytest.raises(RuntimeError):
        feature_size(encoder, (5,), Normal())
    assert encoder.training and encoder.calls == 0


def test_dry_run_follows_dtype_labels_and_lazy_layers():
    assert feature_size(nn.Linear(3, 4).float(), (3,), Normal()) == 4
    assert feature_size(nn.Embedding(10, 6), (), Categorical(10)) == 6
    lazy = nn.LazyLinear(7)
    assert feature_size(lazy, (3,), Normal()) == 7
    assert lazy.weight.shape == (7, 3)


class Constant(nn.Module):
    def __init__(self, *shapes):
        super().__init__()
        self.shapes = shapes

    def forward(self, x):
        outputs = tuple(torch.zeros(shape) if shape else None for shape in self.shapes)
        return outputs if len(outputs) > 1 else outputs[0]


def test_encoder_that_gives_the_expert_itself():
    assert feature_size(Constant((2, 5), (2, 5)), (3,), Normal()) is None


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ([(2, 3, 4)], r"found \(2, 3, 4\)"),
        ([(2,)], r"found \(2,\)"),
        ([(3, 4)], r"found \(3, 4\)"),
        ([(2, 4), (2, 5)], r"found \(2, 4\), \(2, 5\)"),
        ([(2, 4), (2, 4), (2, 4)], r"found \(2, 4\), \(2, 4\), \(2, 4\)"),
        ([None], "found NoneType"),
    ],
)
def test_output_that_is_no_feature(shapes, found):
    with pytest.raises(ValueError, match=r"^modality 'm': expected features .*" + found):
        feature_size(Constant(*shapes), (3,), Normal(), where="modality 'm'")


def test_small_images_get_small_networks():
    networks = [default_encoder((1, 8, 8)), default_decoder(16, {"logits": (1, 8, 8)})]
    sizes = [sum(math.prod(p.shape) for p in network.parameters()) for network in networks]
    assert max(sizes) < 30_000
