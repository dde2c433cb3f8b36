"""Bad input: every message of the one entry of batches, and of building a model."""

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import JitTrace_ELBO
from zoo import batch, case, masks, modalities

from mmzoo import Modality, MultimodalVAE
from mmzoo.batch import check_batch, modality_names
from mmzoo.likelihoods import Categorical
from mmzoo.models import DMVAE, JMVAE, MODELS, MVAE, VAE

NAN = float("nan")


@pytest.fixture
def vae():
    return case("mvae", 4)


@pytest.fixture
def x(vae):
    return batch(vae, 5)


def entries(vae):
    """Everything of a model that takes a batch."""
    elbo = vae.objective()
    return (
        vae.model,
        vae.guide,
        vae.posterior,
        vae.generate,
        vae.encode,
        vae.unimodal,
        lambda x, observed=None: elbo.loss(vae.model, vae.guide, x, observed),
    )


def rejects(vae, x, observed, error, match):
    for entry in entries(vae):
        with pytest.raises(error, match=match):
            entry(x, observed)


# ---- names ---------------------------------------------------------------------------------------


def test_unknown_modality_in_x(vae, x):
    match = "^x: unknown modality 'imgae'; this model has vector, image, type, digit$"
    rejects(vae, {**x, "imgae": x["image"]}, None, ValueError, match)


def test_unknown_modality_in_observed(vae, x):
    match = "^observed: unknown modality 'imgae'; this model has vector, image, type, digit$"
    rejects(vae, x, {"imgae": torch.ones(5, dtype=torch.bool)}, ValueError, match)


def test_names_may_be_one_string():
    parts = {modality.name: modality for modality in modalities()}
    assert modality_names(parts, "image", "of") == ["image"]
    assert modality_names(parts, ("type", "image"), "of") == ["type", "image"]
    with pytest.raises(ValueError, match="^of: unknown modality 'audio'; this model has vector, "):
        modality_names(parts, ["image", "audio"], "of")


@pytest.mark.parametrize("what", ["x", "observed"])
@pytest.mark.parametrize("found", [torch.zeros(5, 3), [1], "vector"])
def test_something_that_is_no_dict(vae, x, what, found):
    match = f"^{what}: expected a dict from modality name to tensor, found {type(found).__name__}$"
    arguments = (found, None) if what == "x" else (x, found)
    rejects(vae, *arguments, TypeError, match)


# ---- missing keys --------------------------------------------------------------------------------


def test_absent_key_of_x_is_missing_for_every_row(vae, x):
    part = {"vector": x["vector"]}
    mask = {name: torch.full((5,), name == "vector") for name in x}
    z = vae.posterior(part).sample()
    torch.testing.assert_close(
        vae.posterior(part).log_prob(z), vae.posterior(x, mask).log_prob(z), rtol=1e-11, atol=1e-11
    )
    # A mask of a modality without values says nothing.
    both = {"image": torch.ones(5, dtype=torch.bool)}
    assert torch.equal(vae.posterior(part, both).log_prob(z), vae.posterior(part).log_prob(z))


def test_absent_key_of_observed_has_every_row(vae, x):
    some = {"image": masks(vae, 5)["image"]}
    full = {name: torch.ones(5, dtype=torch.bool) for name in x} | some
    z = vae.posterior(x).sample()
    found, expected = (vae.posterior(x, each).log_prob(z) for each in (some, full))
    assert torch.equal(found, expected)
    assert not torch.equal(found, vae.posterior(x).log_prob(z))


def test_batch_is_not_changed(vae, x):
    observed = masks(vae, 5)
    before = {name: value.clone() for name, value in x.items()}
    masks_before = {name: mask.clone() for name, mask in observed.items()}
    for entry in entries(vae):
        entry(x, observed)
    assert list(x) == list(before) and list(observed) == list(masks_before)
    assert all(torch.equal(x[name], before[name]) for name in x)
    assert all(torch.equal(observed[name], masks_before[name]) for name in x)


def test_no_values_at_all(vae):
    match = r"^x: expected values for at least one modality, found none; pass num_rows=… .* digit$"
    for nothing in ({}, None, {"image": None}):
        for entry in (vae.model, vae.guide, vae.posterior, vae.generate):
            with pytest.raises(ValueError, match=match):
                entry(nothing)


# ---- shapes --------------------------------------------------------------------------------------


def test_event_shape(vae, x):
    match = (
        r"^modality 'image': expected event shape \(1, 8, 8\), found \(64,\); "
        r"reshape x\['image'\] or set event_shape=\(64,\)$"
    )
    rejects(vae, {**x, "image": x["image"].flatten(1)}, None, ValueError, match)


def test_single_value(vae, x):
    match = r"^modality 'vector': expected a batch of shape \(N, 3\), .*use x\['vector'\]\[None\]$"
    rejects(vae, {"vector": x["vector"][0]}, None, ValueError, match)


def test_numbers_of_rows_differ(vae, x):
    match = (
        "^modality 'type': expected 5 rows as elsewhere in the batch, found 4; "
        "give every modality the same rows, masking what is missing$"
    )
    rejects(vae, {**x, "type": x["type"][:4]}, None, ValueError, match)


def test_number_of_rows_that_was_asked_for(vae, x):
    with pytest.raises(ValueError, match="^modality 'vector': expected 3 rows .* found 5"):
        vae.generate(x, num_rows=3)


def test_empty_batch(vae, x):
    match = "^x: expected at least one row, found an empty batch; drop empty batches$"
    rejects(vae, {name: value[:0] for name, value in x.items()}, None, ValueError, match)
    with pytest.raises(ValueError, match=match):
        vae.generate({}, num_rows=0)


def test_values_with_leading_dimensions(vae, x):
    match = (
        r"^modality 'vector': expected values of shape \(5, 3\) for its encoder, found "
        r"\(2, 5, 3\); make one row of each value$"
    )
    with pytest.raises(ValueError, match=match):
        vae.posterior({**x, "vector": x["vector"].expand(2, 5, 3)})


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [torch.ones(5, dtype=torch.double), torch.arange(5), [True] * 5])
def test_mask_that_is_not_bool(vae, x, mask):
    match = (
        r"^observed\['image'\]: expected a bool tensor \(5,\), found (torch.float64|torch.int64|"
        r"list); convert it with torch\.as_tensor\(mask\)\.bool\(\)$"
    )
    rejects(vae, x, {"image": mask}, TypeError, match)


@pytest.mark.parametrize("shape", [(4,), (), (5, 4), (5, 0), (5, 1)])
def test_mask_of_another_shape(vae, x, shape):
    match = (
        r"^observed\['image'\]: expected shape \(5,\), found \(.*\); one entry for each row of x$"
    )
    rejects(vae, x, {"image": torch.ones(shape, dtype=torch.bool)}, ValueError, match)


def test_mask_of_one_entry_is_for_every_row(vae, x):
    z = vae.posterior(x).sample()
    for flag in (True, False):
        one, full = ({"image": torch.full((rows,), flag)} for rows in (1, 5))
        assert torch.equal(vae.posterior(x, one).log_prob(z), vae.posterior(x, full).log_prob(z))
        losses = []
        for mask in (one, full):
            pyro.set_rng_seed(0)
            losses.append(vae.objective().loss(vae.model, vae.guide, x, mask))
        assert losses[0] == losses[1]


# ---- values --------------------------------------------------------------------------------------


def test_value_that_is_no_tensor(vae, x):
    match = r"^modality 'vector': expected a torch.Tensor, found list; use torch\.as_tensor\("
    rejects(vae, {**x, "vector": x["vector"].tolist()}, None, TypeError, match)


def test_float_labels(vae, x):
    match = (
        "^modality 'digit': expected integer labels for likelihood 'categorical', found "
        r"torch.float64; use \.long\(\), or \.argmax\(-1\) of one-hot rows$"
    )
    rejects(vae, {**x, "digit": x["digit"].double()}, None, TypeError, match)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(vae, x, label):
    x["digit"][2] = label
    match = r"^modality 'digit': expected labels 0 \.\. 2 \(num_classes=3\), found labels .*relabel"
    rejects(vae, x, None, ValueError, match)


def test_grey_values_for_a_bernoulli(vae, x):
    x["image"][1, 0, 2, 3] = 0.5
    match = (
        "^modality 'image': expected values 0 or 1 for likelihood 'bernoulli', found values .*"
        "binarise them .* or use likelihood 'continuous_bernoulli'$"
    )
    rejects(vae, x, None, ValueError, match)


@pytest.mark.parametrize("name", ["vector", "image", "type"])
def test_nan_in_an_observed_row(vae, x, name):
    x[name][1].view(-1)[0] = NAN
    match = f"^modality '{name}': expected numbers in every observed row, found NaN; mask the row"
    rejects(vae, x, None, ValueError, match)
    observed = {name: torch.arange(5) != 1}
    for entry in entries(vae):
        entry(x, observed)  # nobody looks at it


def test_infinite_value(vae, x):
    x["vector"][0, 0] = torch.inf
    match = "^modality 'vector': expected finite values, found an infinite one in an observed row"
    rejects(vae, x, None, ValueError, match)


def test_vectors_that_are_not_one_hot(vae, x):
    x["type"][0] = 0
    match = "^modality 'type': expected one-hot vectors that sum to 1, found sums"
    rejects(vae, x, None, ValueError, match)


def test_a_value_counts_if_any_leading_mask_sees_it(vae, x):
    x["vector"][1] = NAN
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 1] = False
    vae.posterior(x, {"vector": mask})
    mask[1, 1] = True
    with pytest.raises(ValueError, match="^modality 'vector': expected numbers .* found NaN"):
        vae.posterior(x, {"vector": mask})


def test_values_are_looked_at_while_pyro_validates():
    parts = {"image": Modality("image", (2,), "bernoulli")}
    grey = {"image": torch.full((3, 2), 0.5)}
    for validates in (True, False):
        with pyro.validation_enabled(validates):
            if validates:
                with pytest.raises(ValueError, match="expected values 0 or 1"):
                    check_batch(parts, grey)
            else:
                assert torch.equal(check_batch(parts, grey).x["image"], grey["image"])
    check_batch(parts, grey, values=False)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="expected values 0 or 1"):
        check_batch(parts, grey, values=True)
    # Shapes, dtypes and names always are.
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="expected event shape"):
        check_batch(parts, {"image": torch.zeros(3, 4)})


# ---- what comes out ------------------------------------------------------------------------------


def test_values_are_brought_to_the_precision_of_the_model():
    parts = {each.name: each for each in (Modality("a", (2,)), Modality("b", (), Categorical(3)))}
    x = {"a": torch.ones(4, 2, dtype=torch.uint8), "b": torch.zeros(4, dtype=torch.int32)}
    found = check_batch(parts, x, dtype=torch.float32)
    assert {name: value.dtype for name, value in found.x.items()} == {
        "a": torch.float32,
        "b": torch.int64,
    }
    assert check_batch(parts, x).x["a"].dtype == torch.float64  # the default dtype


def test_masks_side_by_side():
    parts = {name: Modality(name, (2,)) for name in "abc"}
    x = {"a": torch.zeros(3, 2), "b": torch.zeros(3, 2)}
    whole = check_batch(parts, x)
    assert whole.mask(["a", "b"]) is None and whole.shape == (3,)
    assert whole.mask(parts).tolist() == [[True, True, False]] * 3
    row = torch.tensor([[True, False, True], [False, False, True]])
    some = check_batch(parts, {**x, "c": None}, {"b": row})
    assert some.shape == (2, 3) and some.x["c"] is None
    assert not some.has("c") and not some.has("unknown") and some.has("a")
    assert torch.equal(some.mask(parts)[..., 1], row)
    assert some.mask(parts)[..., 0].all() and not some.mask(parts)[..., 2].any()


def test_rows_without_values():
    parts = {"a": Modality("a", (2,))}
    found = check_batch(parts, {"a": None}, num_rows=4)
    assert found.shape == (4,) and found.device is None
    assert found.mask(parts).tolist() == [[False]] * 4


# ---- building a model ----------------------------------------------------------------------------


def test_repeated_names():
    with pytest.raises(ValueError, match="^modalities: expected different names, found a, b, a$"):
        MVAE([Modality("a", (2,)), Modality("b", (2,)), Modality("a", (3,))])


@pytest.mark.parametrize(
    ("model", "number", "message"),
    [
        (VAE, 2, "^VAE: expected 1 modality, found 2; see `mmzoo models`"),
        (VAE, 0, "^VAE: expected 1 modality, found 0; see `mmzoo models`"),
        (JMVAE, 1, "^JMVAE: expected at least 2 modalities, found 1; see `mmzoo models`"),
        (MVAE, 0, "^MVAE: expected at least 1 modality, found 0; see `mmzoo models`"),
    ],
)
def test_number_of_modalities(model, number, message):
    with pytest.raises(ValueError, match=message):
        model(modalities(number), latent_dim=2)


def test_number_of_modalities_between_two_limits():
    class Some(MVAE):
        title, min_modalities, max_modalities = "Some", 2, 3

    with pytest.raises(ValueError, match="^Some: expected 2 to 3 modalities, found 4; see"):
        Some(modalities(4))


@pytest.mark.parametrize("latent_dim", [0, -1])
def test_latent_dimension(latent_dim):
    message = f"^latent_dim: expected at least 1, found {latent_dim}$"
    with pytest.raises(ValueError, match=message):
        MVAE(modalities(2), latent_dim)


def test_family():
    message = "^family: expected one of normal, laplace, found 'cauchy'$"
    with pytest.raises(ValueError, match=message):
        VAE(modalities(1), family="cauchy")


@pytest.mark.parametrize("found", ["image", {"name": "image"}, None])
def test_something_that_is_no_modality(found):
    message = f"^modalities: expected Modality objects, found {type(found).__name__}$"
    with pytest.raises(TypeError, match=message):
        MVAE([found, *modalities(1)])


def test_model_that_says_nothing():
    class Bare(MultimodalVAE):
        name = title = "bare"

    vae = Bare(modalities(2), 2)
    with pytest.raises(NotImplementedError, match="^Bare does not say how it combines experts$"):
        vae.posterior({"vector": torch.zeros(2, 3)})
    with pytest.raises(NotImplementedError, match="^Bare names no objective$"):
        vae.objective()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_a_compiled_loss_cannot_keep_masks():
    vae = MVAE([Modality("a", (3,)), Modality("b", (2,))], 2)
    x = {"a": torch.randn(6, 3), "b": torch.randn(6, 2)}
    elbo = JitTrace_ELBO(ignore_jit_warnings=True)
    message = "^observed: expected no masks while torch.jit traces, found those of b; .*Trace_ELBO"
    with pytest.raises(ValueError, match=message):
        elbo.differentiable_loss(vae.model, vae.guide, x, {"b": torch.arange(6) < 3})
    elbo = JitTrace_ELBO(ignore_jit_warnings=True)
    assert torch.isfinite(elbo.differentiable_loss(vae.model, vae.guide, x))


def integers(name: str, tmp_path) -> MultimodalVAE:
    """A model whose sizes are numpy's, saved and read again."""
    sizes = {"mhvae": {"num_levels": 2}, "dmvae": {"private_dim": 2}}.get(name, {})
    options = {key: np.int64(size) for key, size in sizes.items()}
    vae = MODELS[name](modalities(2), np.int64(3), **options)
    vae.save_pretrained(tmp_path)
    return MODELS[name].from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["mvae", "mhvae", "dmvae", "mfm", "nexus", "telbo"])
def test_sizes_may_be_integers_of_numpy(name, tmp_path):
    vae = integers(name, tmp_path)
    assert vae.latent_dim == 3
    assert all(type(value) is not np.int64 for value in vae.options.values())


def test_sizes_by_name_may_be_integers_of_numpy(tmp_path):
    DMVAE(modalities(2), 2, private_dim={"image": np.int64(2)}).save_pretrained(tmp_path)
    assert DMVAE.from_pretrained(tmp_path).private_dims["image"] == 2


@pytest.mark.parametrize("latent_dim", [2.5, 2.0, "2", None])
def test_latent_dimensions_that_are_no_integers(latent_dim):
    message = f"^latent_dim: expected an integer, found {latent_dim!r}; give a whole number"
    with pytest.raises(ValueError, match=message):
        MVAE([Modality("a", (3,))], latent_dim)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mmvm", {"beta": -1.0}, "MixturePriorELBO: expected beta >= 0, found -1.0"),
        ("mmvm", {"prior_weight": -0.5}, "MixturePriorELBO: expected prior_weight >= 0, found -0"),
        ("mmvm", {"modality_weights": {"a": -1}}, r"MixturePrior.*weights\['a'\] >= 0, found -1"),
        ("nexus", {"beta": -1.0}, "NexusELBO: expected beta >= 0, found -1.0; 0 leaves"),
        ("nexus", {"code_weights": {"a": -5}}, r"NexusELBO: expected code_weights\['a'\] >= 0"),
        ("nexus", {"modality_betas": {"a": -5}}, r"NexusELBO: expected modality_betas\['a'\] >= 0"),
        ("mfm", {"weight": -1.0}, "MMDObjective: expected weight >= 0, found -1.0; 0 leaves"),
        ("mfm", {"surrogate_weight": NAN}, "MMDObjective: expected surrogate_weight >= 0"),
        ("mfm", {"modality_weights": {"a": -1}}, r"MMD.*: expected modality_weights\['a'\] >= 0"),
    ],
)
def test_weights_below_zero(name, options, message):
    vae = MODELS[name](modalities(2), 2)
    with pytest.raises(ValueError, match=f"^{message}"):
        vae.objective(**options).loss(vae.model, vae.guide, batch(vae, 4))


def test_another_prior_for_a_checkpoint_whose_model_takes_none(tmp_path):
    DMVAE(modalities(2), 2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^DMVAE: expected a model that takes prior=…, found one"):
        DMVAE.from_pretrained(tmp_path, prior="flow")
