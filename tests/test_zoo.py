"""The contract: what every model of the zoo keeps, for every subset of its modalities."""

import copy
import gc
import json
import math
import os

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn
from zoo import CASES, ZOO, batch, case, least, masks, modalities, names_of

from mmzoo import Modality
from mmzoo.distributions import FlowMixture, Mixture, PriorRows
from mmzoo.exact import LinearGaussianWorld
from mmzoo.inference import ImportanceWeightedELBO, SubsetELBO
from mmzoo.likelihoods import Categorical, Normal
from mmzoo.models import (
    CMVAE,
    CRMVAE,
    DMVAE,
    JMVAE,
    JNF,
    MEME,
    MFM,
    MHVAE,
    MMJSD,
    MMVAE,
    MODELS,
    MVAE,
    MWBVAE,
    SMVAE,
    TELBO,
    VAE,
    WBVAE,
    CoDEVAE,
    HoelderVAE,
    JointVAE,
    MaskedPI,
    MMVAEPlus,
    MoPoE,
    Nexus,
)
from mmzoo.vae import Experts

SUBSETS = [
    (name, size, subset)
    for name, size in CASES
    for subset in names_of(size)
    if set(case(name, size).always_given) <= set(subset)
]
MIXTURES = (
    "mmvae",
    "mmvae-normal",
    "mopoe",
    "mopoe-full",
    "mwbvae",
    "mmjsd",
    "codevae",
    "codevae-negative",
    "hoelder",
    "mmvaeplus",
    "mmvaeplus-laplace",
    "meme",
    "cmvae",
    "mmvm",
)
# posteriors with a closed-form KL to the prior
GAUSSIAN = (
    "linear",
    "vae",
    "jmvae",
    "mvae",
    "mwvae",
    "wbvae",
    "mvtcae",
    "crmvae",
    "smvae",
    "mpi",
    "mvaef",
    "jointvae",
    "telbo",
)
# options that take the chance out of the choice of subsets
EVERY_SUBSET = {SMVAE: {"subsets": "powerset"}, MaskedPI: {"subsets": "powerset"}}
WITHOUT_CHANCE = {
    MVAE: {"num_random": 0},
    WBVAE: {"num_random": 0},
    **EVERY_SUBSET,
    Nexus: {"dropout": 0.0},
    MFM: {"surrogate_weight": 0.0},
}
# The same, with private codes; their worlds are in test_private.py.
PRIVATE = ("dmvae", "dmvae-own", "fmwvae", "fmwvae-own")

# One latent of two dimensions, whose density a grid integrates.
FLAT = [(name, size) for name, size in CASES if case(name, size).latent_sites == ("z",)]

every_case = pytest.mark.parametrize(("name", "size"), CASES)
every_subset = pytest.mark.parametrize(("name", "size", "subset"), SUBSETS)


def close(found, expected):
    """Equal to round-off: sums of at most some thousand float64 terms."""
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def only(values, subset):
    return {name: values[name] for name in subset}


def known(vae, x):
    """What must be given, of these values."""
    return only(x, vae.always_given)


def scored(vae):
    """The modalities that have a likelihood: all, but for conditional models."""
    return [name for name in vae.modalities if name not in vae.always_given]


def latents(q, num=3):
    return q.sample((num,))


def codes(vae, z):
    """Some private codes for latents (*, D), by name."""
    return {
        name: (0.5 + z[..., :1]) * torch.linspace(-1, 1.5, vae.private_dims[name])
        for name in vae.private_names
    }


def log_joint(vae, x, observed, z):
    """The model's log p(x, z | w) of each row, where it has private codes at some values w."""
    w = {f"w_{name}": value for name, value in codes(vae, z).items()}
    conditioned = poutine.condition(vae.model, {**vae.split(z), **w})
    trace = poutine.trace(conditioned).get_trace(x, observed)
    trace.compute_log_prob()
    return sum(
        site["log_prob"]
        for site in trace.nodes.values()
        if site["type"] == "sample" and "log_prob" in site and site["name"] not in ("data", *w)
    )


def gradients(vae, loss):
    vae.zero_grad()
    if loss.requires_grad:  # a conditional model that scores nothing has a constant
        loss.backward()
    return {key: value.grad for key, value in vae.named_parameters()}


def reaching(vae):
    """The model's objective, where every step reaches every parameter.

    Attention to a subset of one modality does not compare, and few rows may draw no other subset.
    """
    return vae.objective(**EVERY_SUBSET.get(type(vae), {}))


def seeded_loss(vae, elbo, x, observed, seed=3):
    pyro.set_rng_seed(seed)
    return elbo.differentiable_loss(vae.model, vae.guide, x, observed)


def test_every_model_is_in_the_zoo():
    assert {case(name, 2).name for name in ZOO} == set(MODELS)
    assert all(type(case(name, 2)) is MODELS[name] for name in MODELS)


# ---- shapes and sites ----------------------------------------------------------------------------


@every_subset
def test_shapes(name, size, subset):
    vae = case(name, size)
    x = only(batch(vae), subset)
    q = vae.posterior(x)
    total = 2 * (len(vae.latent_sites) - len(vae.private_names))
    assert (q.batch_shape, q.event_shape) == ((6,), (total,))
    wide = vae.posterior(x, only(masks(vae, 6, 5, 3, empty=True), subset))
    assert (wide.batch_shape, wide.event_shape) == ((5, 3, 6), (total,))
    decoded = vae.decode(wide.sample((4,)), x=known(vae, x))
    assert list(decoded) == scored(vae)
    for key, p in decoded.items():
        event_shape = vae.modalities[key].event_shape
        assert (p.batch_shape, p.event_shape) == ((4, 5, 3, 6), event_shape)
    for num, lead in ((None, (6,)), (1, (1, 6)), (4, (4, 6))):
        draws = vae.generate(x, num_samples=num)
        shapes = {key: (*lead, *m.event_shape) for key, m in vae.modalities.items()}
        assert {key: tuple(value.shape) for key, value in draws.items()} == shapes


@every_case
def test_generate_from_nothing_has_the_asked_number_of_rows(name, size):
    vae = case(name, size)
    for mean in (False, True):
        start = least(vae, 5)
        for key, value in vae.generate(start, num_rows=5, num_samples=2, mean=mean).items():
            labels = isinstance(vae.modalities[key].likelihood, Categorical)
            extra = (3,) if mean and labels else ()  # probabilities of its classes
            assert value.shape == (2, 5, *vae.modalities[key].event_shape, *extra)


@every_case
def test_generated_means_are_those_of_the_decoder(name, size):
    vae = case(name, size)
    start = least(vae, 5)
    pyro.set_rng_seed(1)
    means = vae.generate(start, num_rows=5, mean=True)
    pyro.set_rng_seed(1)
    z = vae.posterior(start, num_rows=5).sample()
    w = {key: vae.private_prior(key).sample((5,)) for key in vae.private_names}
    for key, p in vae.decode(z, w, x=start).items():
        labels = isinstance(vae.modalities[key].likelihood, Categorical)
        close(means[key], p.probs if labels else p.mean)


@every_subset
def test_model_and_guide_have_the_same_sites(name, size, subset):
    vae = case(name, size)
    x = only(batch(vae), subset)
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, guide)).get_trace(x)
    assert guide.stochastic_nodes == model.stochastic_nodes == ["data", *vae.latent_sites]
    assert set(model.observation_nodes) == set(subset) - set(vae.always_given)
    for trace in (model, guide):
        trace.compute_log_prob()
        sites = [node for node in trace.nodes.values() if node["type"] == "sample"]
        assert all(
            site["log_prob"].shape == (6,) and site["cond_indep_stack"][-1].name == "data"
            for site in sites
            if site["name"] != "data"
        )


# ---- the posterior is a density, and it is that of its samples -----------------------------------


def grid(half_width, num):
    axis = torch.linspace(-half_width, half_width, num)
    points = torch.cartesian_prod(axis, axis)  # (Q, 2)
    return points.unsqueeze(1), (2 * half_width / (num - 1)) ** 2


@pytest.mark.parametrize(("name", "size"), FLAT)
def test_posterior_integrates_to_one_and_has_the_moments_of_its_samples(name, size):
    vae = case(name, size)
    x, observed = batch(vae, 3), masks(vae, 3, empty=True)
    shape = vae.encode(x).loc.shape  # JMVAE has one more expert than modalities
    experts = Experts(4 * torch.rand(shape) - 2, 0.4 + 0.6 * torch.rand(shape))
    q = vae.posterior(x, observed, experts=experts)
    points, area = grid(12.0, 241)
    density = q.log_prob(points).exp() * area  # (Q, N)
    # The trapezoidal rule is exact, exp(-2 pi^2 scale^2 / step^2), for a Gaussian wider than the
    # step 0.1; the kink of a Laplace density of scale b costs step^2 / (12 b^2) per dimension.
    own = q.posterior if isinstance(q, PriorRows) else q
    scale = own if isinstance(own, Mixture) else getattr(own, "base_dist", own)
    if name == "linear":  # no narrower in any direction than the root of the least eigenvalue
        scale = torch.linalg.eigvalsh(own.covariance_matrix).min().sqrt().item()
    else:
        scale = scale.scale.min().item()
    assert scale > 0.15
    error = 2 * 0.1**2 / (12 * scale**2) if vae.family == "laplace" else 1e-9
    if isinstance(q, PriorRows):  # the slopes of Pyro's splines are off by 1e-3 where they end
        error = 0.1 * 1e-3 * 0.4
    assert (density.sum(0) - 1).abs().max() < error
    statistics = (
        lambda z: z[..., 0],
        lambda z: z[..., 1].square(),
        lambda z: z[..., 0] * z[..., 1],
        lambda z: z[..., 0].square() * z[..., 1].square(),
    )
    z = q.sample((20_000,))
    for statistic in statistics:
        drawn, expected = statistic(z), (statistic(points) * density).sum(0)
        se = drawn.std(0) / math.sqrt(len(z))
        size_of_it = 1 + (statistic(points).abs() * density).sum(0)
        assert ((drawn.mean(0) - expected).abs() < 5 * se + error * size_of_it).all()


# ---- missing modalities --------------------------------------------------------------------------


@every_case
def test_mask_of_true_is_no_mask(name, size):
    vae = case(name, size)
    x = batch(vae)
    full = {key: torch.ones(6, dtype=torch.bool) for key in x}
    z = latents(vae.posterior(x))
    close(vae.posterior(x, full).log_prob(z), vae.posterior(x).log_prob(z))
    close(log_joint(vae, x, full, z[0]), log_joint(vae, x, None, z[0]))
    for elbo in (vae.objective, Trace_ELBO):
        masked, whole = (seeded_loss(vae, elbo(), x, observed) for observed in (full, None))
        close(masked, whole)
        for mine, other in zip(gradients(vae, masked).values(), gradients(vae, whole).values()):
            if mine is not None or other is not None:
                close(mine, other)


@every_subset
def test_masked_row_is_a_row_without_the_modality(name, size, subset):
    vae = case(name, size)
    x = batch(vae)
    observed = masks(vae)
    rows = slice(2, 4)
    for key, mask in observed.items():
        mask[rows] = key in subset
    z = latents(vae.posterior(x, observed))
    part = {key: value[rows] for key, value in only(x, subset).items()}
    close(vae.posterior(x, observed).log_prob(z)[:, rows], vae.posterior(part).log_prob(z[:, rows]))
    close(log_joint(vae, x, observed, z[0])[rows], log_joint(vae, part, None, z[0, rows]))
    alone, mask = vae.unimodal(x, observed)
    assert torch.equal(mask, torch.stack(list(observed.values())))
    for row, key in enumerate(x):
        given = {**known(vae, x), **({key: x[key]} if key in subset else {})}
        expected = vae.posterior(given, num_rows=6)
        close(alone.log_prob(z[0])[row, rows], expected.log_prob(z[0])[rows])


@every_case
def test_leading_dimensions_of_a_mask_are_separate_subsets(name, size):
    vae = case(name, size)
    x, observed = batch(vae), masks(vae, 6, 4, empty=True)
    q = vae.posterior(x, observed)
    z = q.sample()
    with pyro.plate("outer", 4, dim=-2):
        joint = log_joint(vae, x, observed, z)
    for index in range(4):
        one = {key: mask[index] for key, mask in observed.items()}
        close(q.log_prob(z)[index], vae.posterior(x, one).log_prob(z[index]))
        close(joint[index], log_joint(vae, x, one, z[index]))


@every_case
@pytest.mark.parametrize("filler", [float("nan"), 1e30, float("inf")])
def test_values_under_a_false_mask_change_no_bit(name, size, filler):
    vae = case(name, size)
    x, observed = batch(vae), masks(vae, empty=True)
    z = vae.posterior(x, observed).sample()
    found = []
    for fill in (False, True):
        if fill:
            x = {key: value.clone() for key, value in x.items()}
            for key, value in x.items():
                value[~observed[key]] = filler if value.is_floating_point() else -(10**6)
        values = [vae.posterior(x, observed).log_prob(z), log_joint(vae, x, observed, z)]
        pyro.set_rng_seed(4)
        values += vae.generate(x, observed, num_samples=2).values()
        for elbo in (vae.objective(), Trace_ELBO()):
            loss = seeded_loss(vae, elbo, x, observed)
            found_here = gradients(vae, loss)
            values += [loss, *(grad for grad in found_here.values() if grad is not None)]
        found.append(values)
    assert len(found[0]) == len(found[1])
    assert all(map(torch.equal, *found))


@every_case
def test_rows_without_any_modality_have_the_prior(name, size):
    vae = case(name, size)
    x, observed = batch(vae), masks(vae, empty=True)
    z = vae.prior(known(vae, x)).expand([6]).sample((3,))
    prior = vae.prior(known(vae, x)).log_prob(z)
    close(vae.posterior(x, observed).log_prob(z)[:, -1], prior[:, -1])
    nothing = {key: torch.zeros(6, dtype=torch.bool) for key in scored(vae)}
    for q in (vae.posterior(x, nothing), vae.posterior(known(vae, x), num_rows=6)):
        close(q.log_prob(z), prior)
    close(log_joint(vae, x, nothing, z[0]), prior[0])
    assert not torch.equal(vae.posterior(x).log_prob(z), prior)  # which rows with some do not have


@pytest.mark.parametrize(("name", "size"), [each for each in CASES if each[1] > 1])
def test_modality_that_no_row_has_is_an_absent_one(name, size):
    vae = case(name, size)
    x, observed = batch(vae), masks(vae)
    for key in scored(vae):
        none = {**observed, key: torch.zeros(6, dtype=torch.bool)}
        others = {other: mask for other, mask in observed.items() if other != key}
        for elbo in (vae.objective, Trace_ELBO):
            masked = seeded_loss(vae, elbo(), x, none)
            absent = seeded_loss(vae, elbo(), only(x, others), others)
            close(masked, absent)
            for mine, other in zip(
                gradients(vae, masked).values(), gradients(vae, absent).values()
            ):
                if mine is not None:  # zero where the absent modality's networks did not run
                    close(mine, torch.zeros_like(mine) if other is None else other)


def hand_made(loc):
    return pyro.distributions.Normal(loc, 1.0).to_event(1)


@pytest.mark.parametrize("options", [{"likelihood": hand_made}, {"entrywise_missing": True}])
def test_likelihoods_of_no_rows(options):
    mlp = {"kind": "mlp", "hidden": [6]}
    vae = MVAE([Modality("own", (3,), encoder=mlp, decoder=mlp, **options), *modalities(1)], 2)
    x = batch(vae)
    z = vae.posterior(x).sample()
    found = log_joint(vae, x, {"own": torch.zeros(6, dtype=torch.bool)}, z)
    close(found, log_joint(vae, {"vector": x["vector"]}, None, z))


def permuted(vae, order):
    """The same model with its modalities in another order."""
    parts = list(vae.modalities.values())
    other = type(vae)([parts[i] for i in order], vae.latent_dim, **vae.options)
    state = vae.state_dict()
    if hasattr(vae, "joint"):  # a joint network reads the features in order
        new = {}
        for key, value in state.items():
            if key.startswith("joint_encoders."):
                _, index, rest = key.split(".", 2)
                key = f"joint_encoders.{order.index(int(index))}.{rest}"
            new[key] = value
        width = state["joint.0.weight"].shape[1] // len(order)
        parts = state["joint.0.weight"].split(width, 1)
        new["joint.0.weight"] = torch.cat([parts[i] for i in order], 1)
        state = new
    other.load_state_dict(state)
    return other


@every_case
def test_order_of_modalities_is_irrelevant(name, size, monkeypatch):
    vae = case(name, size)
    other = permuted(vae, list(range(size))[::-1])
    x, observed = batch(vae), masks(vae, empty=True)
    z = latents(vae.posterior(x, observed))
    parts = vae.split(z)  # Nexus has a latent for each modality, in their order
    theirs = torch.cat([parts[site] for site in other.latent_sites if site in parts], -1)
    close(other.posterior(x, observed).log_prob(theirs), vae.posterior(x, observed).log_prob(z))
    close(log_joint(other, x, observed, theirs[0]), log_joint(vae, x, observed, z[0]))
    # Draws at the same quantile, so that losses compare; without what is random else.
    for family in (torch.distributions.Normal, torch.distributions.Laplace):
        monkeypatch.setattr(
            family,
            "rsample",
            lambda self, shape=(): (self.loc + 0.3 * self.scale).expand(
                self._extended_shape(shape)
            ),
        )
    options = WITHOUT_CHANCE.get(type(vae), {})
    losses = [
        each.objective(**options).differentiable_loss(each.model, each.guide, x, observed)
        for each in (vae, other)
    ]
    close(*losses)


# ---- training ------------------------------------------------------------------------------------


@every_case
def test_every_parameter_has_a_gradient(name, size):
    vae = case(name, size)
    # Incomplete rows too: JMVAE's experts answer for them.
    loss = seeded_loss(vae, reaching(vae), batch(vae), masks(vae))
    for key, grad in gradients(vae, loss).items():
        assert grad is not None and grad.isfinite().all() and grad.abs().sum() > 0, key


@every_case
def test_a_step_leaves_nothing_behind(name, size):
    vae = case(name, size)
    x, observed = batch(vae), masks(vae)

    def tensors_after(elbo, steps):
        for _ in range(steps):
            elbo.loss_and_grads(vae.model, vae.guide, x, observed)
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    gc.freeze()  # what other tests left is not looked through again and again
    try:
        for elbo in (vae.objective(), Trace_ELBO()):
            pyro.set_rng_seed(0)
            assert tensors_after(elbo, 3) == tensors_after(elbo, 4)
    finally:
        gc.unfreeze()


def outside_the_pair(key):
    """Whether only the model's own objective has a use for a parameter."""
    return key.startswith("auxiliary_raw.")


def assert_trains(vae, x, observed, elbo, others=()):
    before = copy.deepcopy(vae.state_dict())
    kept = [copy.deepcopy(other.state_dict()) for other in others]
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.01}), elbo)
    svi.step(x, observed)
    pair = isinstance(elbo, Trace_ELBO | TraceMeanField_ELBO)
    for key, value in vae.named_parameters():
        same = pair and outside_the_pair(key)
        assert torch.equal(value, before[key]) == same, f"{key} does not train"
    for other, state in zip(others, kept):
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


@every_case
def test_copies_and_neighbours_train_on_their_own(name, size, tmp_path):
    vae = case(name, size)
    # An odd number: the gradient of a Laplace prior's location is a sum of signs.
    x, observed = batch(vae, 7), masks(vae, 7)
    vae.save_pretrained(tmp_path)
    group = [vae, copy.deepcopy(vae), type(vae).from_pretrained(tmp_path), case(name, size)]
    elbos = [Trace_ELBO, lambda: reaching(vae)]
    if name in GAUSSIAN + PRIVATE:
        elbos.append(TraceMeanField_ELBO)
    for elbo in elbos:
        for one in group:
            assert_trains(one, x, observed, elbo(), [other for other in group if other is not one])
    assert_trains(copy.deepcopy(vae), x, observed, reaching(vae), group)  # after training


@every_case
def test_double_and_reloaded_weights_train(name, size):
    torch.set_default_dtype(torch.float32)
    vae = case(name, size)
    x, observed = batch(vae, 7), masks(vae, 7)
    vae.double()
    assert all(value.dtype == torch.float64 for value in vae.parameters())
    vae.load_state_dict(case(name, size).state_dict())
    assert_trains(vae, x, observed, reaching(vae))


@every_case
def test_losses_have_the_precision_of_the_model(name, size):
    vae = case(name, size).to(torch.float32)  # beside a default of float64
    x, observed = batch(vae), masks(vae, empty=True)
    for elbo in (vae.objective(), Trace_ELBO()):
        assert seeded_loss(vae, elbo, x, observed).dtype == torch.float32
    assert vae.posterior(x, observed).sample().dtype == torch.float32


@every_case
def test_frozen_parameters_stay(name, size):
    vae = case(name, size)
    before = copy.deepcopy(vae.state_dict())
    vae.generative.requires_grad_(False)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.01}), reaching(vae))
    svi.step(batch(vae), masks(vae))
    for key, value in vae.named_parameters():
        assert torch.equal(value, before[key]) == key.startswith("generative."), key


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("validation", [True, False])
def test_mean_field_elbo_of_a_mixture_says_what_to_use(name, validation):
    vae = case(name, 2)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.01}), TraceMeanField_ELBO())
    message = r"^guide site 'z': expected a reparameterised .* use vae\.objective\(\) .* Trace_ELBO"
    with pyro.validation_enabled(validation), pytest.raises(ValueError, match=message):
        svi.step(batch(vae))


def one_sided(vae, rows):
    """Rows that the biases of the decoders can learn within some steps."""
    values = {
        "vector": 2 + 0.1 * torch.randn(rows, 3),
        "image": torch.ones(rows, 1, 8, 8),
        "type": torch.eye(4)[:1].repeat(rows, 1),
        "digit": torch.ones(rows, dtype=torch.long),
    }
    return only(values, vae.modalities)


@every_case
def test_plain_svi_lowers_the_loss(name, size):
    vae = case(name, size)
    x = one_sided(vae, 64)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.02}), Trace_ELBO())
    losses = []
    for steps in (0, 30):
        for _ in range(steps):
            svi.step(x)
        losses.append(torch.tensor([svi.evaluate_loss(x) for _ in range(20)]))
    before, after = losses
    se = ((before.var() + after.var()) / 20).sqrt()
    assert before.mean() - after.mean() > 5 * se


# ---- saving --------------------------------------------------------------------------------------


@every_case
def test_saved_models_give_the_same_numbers(name, size, tmp_path):
    vae = case(name, size)
    vae.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = MODELS[vae.name].from_pretrained(tmp_path)
    assert again.config() == vae.config()
    x, observed = batch(vae), masks(vae, empty=True)
    z = vae.posterior(x, observed).sample()
    assert torch.equal(
        again.posterior(x, observed).log_prob(z), vae.posterior(x, observed).log_prob(z)
    )
    assert torch.equal(log_joint(again, x, observed, z), log_joint(vae, x, observed, z))
    losses = [seeded_loss(each, each.objective(), x, observed) for each in (vae, again)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_precision_comes_back(dtype, tmp_path):
    vae = case("mmvae", 2).to(dtype)
    vae.save_pretrained(tmp_path)
    again = MMVAE.from_pretrained(tmp_path)
    assert {value.dtype for value in again.state_dict().values()} == {dtype}
    assert again.generate({}, num_rows=2)["vector"].dtype == dtype


def test_saving_again_replaces(tmp_path):
    case("mvae", 4).save_pretrained(tmp_path)
    vae = case("vae", 1)
    vae.save_pretrained(str(tmp_path))
    assert VAE.from_pretrained(str(tmp_path)).config() == vae.config()


@pytest.mark.parametrize("name", MODELS)
def test_custom_networks_are_asked_for(name, tmp_path):
    own = Modality("own", (3,), encoder=nn.Linear(3, 5), decoder=lambda dim: nn.Linear(dim, 3))
    parts = [own] if name == "vae" else [own, modalities()[2 if name != "linear" else 0]]
    vae = MODELS[name](parts, latent_dim=2)
    vae.save_pretrained(tmp_path)
    message = r"^modality 'own': expected its encoder by name.*pass modalities=\["
    with pytest.raises(ValueError, match=message):
        MODELS[name].from_pretrained(tmp_path)
    again = MODELS[name].from_pretrained(tmp_path, modalities=parts)
    x = batch(vae)
    z = vae.posterior(x).sample()
    assert torch.equal(again.posterior(x).log_prob(z), vae.posterior(x).log_prob(z))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"likelihood": Normal(1.0)}, r"'a' was saved with likelihood \{.*0.1\}, found \{.*1.0\}"),
        ({"likelihood": "laplace"}, "'a' was saved with likelihood .*normal.*, found .*laplace"),
        ({"event_shape": (3,)}, r"'a' was saved with event_shape \[2\], found \[3\]"),
        ({"entrywise_missing": True}, "'a' was saved with entrywise_missing False, found True"),
        ({"name": "c"}, "expected the modalities a, b in this order, found c, b"),
        ({"decoder": {"kind": "mlp", "hidden": [3]}}, "'a' was saved with decoder"),
        ({}, None),
    ],
)
def test_other_modalities_are_not_those_of_a_checkpoint(change, message, tmp_path):
    """A likelihood has no weights that could not fit, and would silently be another."""
    saved = {"name": "a", "event_shape": (2,), "likelihood": Normal(0.1)}
    own = {"encoder": nn.Linear(2, 5)}
    vae = MVAE([Modality(**saved, **own), Modality("b", (2,))], latent_dim=2)
    vae.save_pretrained(tmp_path)
    parts = [Modality(**{**saved, **own, **change}), Modality("b", (2,))]
    if message is None:
        assert MVAE.from_pretrained(tmp_path, modalities=parts).config() == vae.config()
        return
    with pytest.raises(ValueError, match=message):
        MVAE.from_pretrained(tmp_path, modalities=parts)


def test_other_weights_do_not_fit_a_checkpoint(tmp_path):
    case("mvae", 2).save_pretrained(tmp_path / "one")
    case("mvae", 4).save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other/model.safetensors", tmp_path / "one/model.safetensors")
    message = (
        r"its weights do not fit its config.json \(Error.*.*state_dict for MVAE: \S+.*\); "
        "save the model again, or pass the modalities it was built with"
    )
    with pytest.raises(ValueError, match=message):
        MVAE.from_pretrained(tmp_path / "one")


def test_checkpoint_of_another_model(tmp_path):
    case("mvae", 2).save_pretrained(tmp_path)
    message = r"expected a 'jmvae' model, found 'mvae'; load it with mmzoo.models.MODELS\['mvae'\]"
    with pytest.raises(ValueError, match=message):
        JMVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a tensor", None, "half"])
def test_corrupt_weights(content, tmp_path):
    case("mvae", 2).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if content is None:
        file.unlink()
    else:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    message = r"^checkpoint .*: expected weights in model\.safetensors, found none .*save the model"
    with pytest.raises(ValueError, match=message):
        MVAE.from_pretrained(tmp_path)


def test_weights_without_any_tensor(tmp_path):
    from safetensors.torch import save_file

    case("mvae", 2).save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"^checkpoint .*: its weights do not fit its config\.json"
    ):
        MVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "", "[1, 2]", '"text"', "3", "null"])
def test_folder_without_a_config(content, tmp_path):
    case("mvae", 2).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    message = "^checkpoint .*config.json.*save_pretrained"
    with pytest.raises(ValueError, match=message):
        MVAE.from_pretrained(tmp_path)


def test_config_that_is_no_text(tmp_path):
    case("mvae", 2).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(bytes(range(128, 256)))
    message = "^checkpoint .*expected a folder with config.json.*decode.*save_pretrained"
    with pytest.raises(ValueError, match=message):
        MVAE.from_pretrained(tmp_path)


def test_config_of_another_format(tmp_path):
    case("mvae", 2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format": 99}))
    message = (
        "^checkpoint .*: expected a config.json of format 1, found 99; load it with the version"
    )
    with pytest.raises(ValueError, match=message):
        MVAE.from_pretrained(tmp_path)


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(
        ValueError, match="expected a folder with config.json and model.safetensors"
    ):
        MVAE.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("key", ["name", "likelihood", "event_shape"])
def test_config_with_a_broken_modality(key, tmp_path):
    case("mvae", 2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["modalities"][0][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^checkpoint .*: expected a config.json .*'{key}'"):
        MVAE.from_pretrained(tmp_path)


def test_config_that_lacks_a_part(tmp_path):
    case("mvae", 2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["modalities"], config["latent_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json lacks latent_dim, modalities; it was not"):
        MVAE.from_pretrained(tmp_path)


def test_config_with_nameless_modalities(tmp_path):
    vae = case("mvae", 2)
    vae.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(vae.config() | {"modalities": [{"event_shape": [3]}]}))
    for parts in (None, list(vae.modalities.values())):
        with pytest.raises(ValueError, match=r"expected a config\.json with the options of MVAE"):
            MVAE.from_pretrained(tmp_path, modalities=parts)


def test_config_with_foreign_options(tmp_path):
    case("mvae", 2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["options"]["from_the_future"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^checkpoint .*from_the_future"):
        MVAE.from_pretrained(tmp_path)


# ---- cost: what is run, and on which rows --------------------------------------------------------


def counting(vae):
    """Numbers of rows of each call of every encoder and decoder, by name."""
    calls = {}
    private = {key: f"{key}_" for key in vae.modalities if f"{key}_" in vae.private_experts}
    parts = {
        "encoder": [vae.experts[f"{name}_"] for name in scored(vae) if len(vae.experts)],
        "decoder": [vae.generative.decoders[f"{name}_"] for name in scored(vae)],
        "joint": getattr(vae, "joint_encoders", ()),
    }
    for key, module in private.items():
        rows = calls["private", key] = []
        vae.private_experts[module].register_forward_hook(
            lambda module, args, out, rows=rows: rows.append(len(args[0]))
        )
    for kind, modules in parts.items():
        for key, module in zip(scored(vae), modules):  # LinearVAE has no encoders
            rows = calls[kind, key] = []
            module.register_forward_hook(
                lambda module, args, out, rows=rows: rows.append(len(args[0]))
            )
    return calls


# A VampPrior encodes its pseudo-rows wherever p(z) is asked for: tests/test_priors.py.
every_counted = pytest.mark.parametrize(
    ("name", "size"), [each for each in CASES if not each[0].endswith("-vamp")]
)


def rows_of_powerset(key, size, observed, scores):
    """Rows of one modality that some subset scores, counted once for each subset."""
    total = 0
    for subset in names_of(size):
        if scores == "observed" or key in subset:
            rows = torch.stack([observed[each] for each in subset]).all(0)
            total += int((rows & observed[key]).sum())
    return total


@every_counted
@pytest.mark.parametrize("scores", ["given", "observed"])
def test_networks_run_once_and_only_where_they_are_needed(name, size, scores):
    vae = case(name, size)
    x, observed = batch(vae), masks(vae, empty=True)
    calls = counting(vae)
    SubsetELBO("powerset", scored=scores).loss(vae.model, vae.guide, x, observed)
    complete = int(torch.stack(list(observed.values())).all(0).sum())
    for key, mask in only(observed, scored(vae)).items():
        assert calls.get(("encoder", key), [int(mask.sum())]) == [int(mask.sum())]
        assert calls.get(("private", key), [int(mask.sum())]) == [int(mask.sum())]
        assert calls["decoder", key] == [rows_of_powerset(key, size, observed, scores)]
        assert calls.get(("joint", key), [complete]) == [complete]


@every_counted
def test_objectives_run_each_network_once(name, size):
    vae = case(name, size)
    x, observed = batch(vae), masks(vae)
    few = {"num_samples": 4}
    options = {**WITHOUT_CHANCE, MMVAE: few, MMVAEPlus: few, MEME: few, CMVAE: few, MFM: {}}.get(
        type(vae), {}
    )
    most = int(torch.stack(list(observed.values())).sum(0).max())  # components of MMVAE
    q = vae.posterior(x, observed)
    flows = int(q.present.sum(-1).max()) if isinstance(q, FlowMixture) else 1
    calls = counting(vae)
    vae.objective(**options).loss(vae.model, vae.guide, x, observed)
    most = int(torch.stack(list(observed.values())).sum(0).max())  # components of MMVAE
    several = torch.stack(list(observed.values())).sum(0) > 1
    for key, mask in only(observed, scored(vae)).items():
        rows = int(mask.sum())
        assert calls.get(("encoder", key), [rows]) == [rows]
        assert calls.get(("private", key), [rows]) == [rows]
        together = torch.stack([mask & other for other in observed.values()])
        expected = {
            MVAE: 2 * rows,  # all and single
            CRMVAE: 2 * rows,
            JointVAE: int(torch.stack(list(observed.values())).all(0).sum()),
            SMVAE: rows_of_powerset(key, size, observed, "given"),
            MaskedPI: 2**size * rows,  # each is in the subset or in the rest
            CoDEVAE: rows_of_powerset(key, size, observed, "observed"),
            HoelderVAE: most * (most + 1) // 2 * rows,
            MMJSD: sum(int((observed[key] & other).sum()) for other in observed.values()),
            MMVAE: 4 * most * rows,
            MoPoE: rows_of_powerset(key, size, observed, "observed"),
            MMVAEPlus: 4 * int(together.sum()),  # the draws of each expert that the row has
            CMVAE: 4 * int(together.sum()),
            DMVAE: rows + int(together.sum()),  # given all, and given each that the row has
            MWBVAE: rows_of_powerset(key, size, observed, "observed"),
            JNF: flows * rows,
            # At its own draws, and at those of the other where a row has both.
            MEME: 4 * (rows + int(torch.stack(list(observed.values())).all(0).sum())),
            MHVAE: rows_of_powerset(key, size, observed, "observed"),
            MFM: rows + 2 * int((mask & several).sum()),  # from a part, and from the rest
        }
        if isinstance(vae, TELBO):  # its unimodal terms have decoders that are constants
            assert calls["decoder", key] == [rows, rows]
            continue
        assert calls["decoder", key] == [expected.get(type(vae), rows)]


@every_counted
def test_importance_weighted_bound_decodes_scored_rows_only(name, size):
    vae = case(name, size)
    x, observed = batch(vae), masks(vae)
    calls = counting(vae)
    q = vae.posterior(x, observed)
    most = int(q.present.sum(-1).max()) if isinstance(q, Mixture) else 1
    for rows in calls.values():
        rows.clear()
    ImportanceWeightedELBO(3).loss(vae.model, vae.guide, x, observed)
    for key, mask in only(observed, scored(vae)).items():
        assert calls.get(("encoder", key), [int(mask.sum())]) == [int(mask.sum())]
        assert calls.get(("private", key), [int(mask.sum())]) == [int(mask.sum())]
        assert calls["decoder", key] == [3 * most * int(mask.sum())]


@every_case
def test_scored_rows_have_the_values_and_gradients_of_the_full_plate(name, size):
    vae = case(name, size)
    x, observed = batch(vae), masks(vae, empty=True)
    z = vae.prior(known(vae, x)).expand([6]).sample().requires_grad_()
    found = log_joint(vae, x, observed, z)
    full, w = vae.prior(known(vae, x)).log_prob(z), codes(vae, z)
    for key, p in vae.decode(z, w, x=known(vae, x)).items():
        full = full + torch.where(observed[key], p.log_prob(x[key]), 0.0)
    close(found, full)
    inputs = [z, *vae.generative.parameters()]
    weight = torch.arange(1.0, 7.0)
    results = (torch.autograd.grad((weight * each).sum(), inputs) for each in (found, full))
    for mine, other in zip(*results):
        close(mine, other)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "linear"])  # which refuses
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_single_missing_entries_are_left_out(name, shape):
    mlp = {"kind": "mlp", "hidden": [6]}
    holes = Modality("holes", shape, "laplace", entrywise_missing=True, encoder=mlp, decoder=mlp)
    parts = [holes] if name == "vae" else [holes, modalities()[2]]
    vae = MODELS[name](parts, latent_dim=2)
    x, observed = batch(vae), masks(vae)
    missing = torch.rand(6, *shape) < 0.4
    missing[0] = True
    x["holes"][missing] = torch.nan
    z = vae.posterior(x, observed).sample()
    w = codes(vae, z)
    decoded = vae.decode(z, w, x=known(vae, x))
    terms = torch.distributions.Laplace(decoded["holes"].mean, 1.0).log_prob(
        torch.where(missing, 0.0, x["holes"])
    )
    expected = torch.where(missing, 0.0, terms).reshape(6, -1).sum(-1)
    prior = vae.prior(known(vae, x)).log_prob(z)
    expected = prior + torch.where(observed["holes"], expected, 0.0)
    if "type" in decoded:
        label = decoded["type"].log_prob(x["type"])
        expected = expected + torch.where(observed["type"], label, 0.0)
    close(log_joint(vae, x, observed, z), expected)
    loss = seeded_loss(vae, vae.objective(), x, observed)
    grads = gradients(vae, loss)
    assert all(grad is None or grad.isfinite().all() for grad in grads.values())
    filled = {**x, "holes": torch.where(missing, 0.0, x["holes"])}  # what the encoders see
    assert torch.equal(
        vae.posterior(filled, observed).log_prob(z), vae.posterior(x, observed).log_prob(z)
    )


# ---- sites that are sampled ----------------------------------------------------------------------


@every_case
def test_none_is_sampled_given_the_latent(name, size):
    vae = case(name, size)
    start = least(vae, 5)
    x = {**dict.fromkeys(vae.modalities), **start}
    trace = poutine.trace(vae.model).get_trace(x, num_rows=5)
    assert set(trace.stochastic_nodes) == {"data", *vae.latent_sites, *scored(vae)}
    shared = [site for site in vae.latent_sites if site[2:] not in vae.private_names]
    z = torch.cat([trace.nodes[site]["value"] for site in shared], -1)
    w = {key: trace.nodes[f"w_{key}"]["value"] for key in vae.private_names}
    for key, p in vae.decode(z, w, x=start).items():
        value = trace.nodes[key]["value"]
        close(trace.nodes[key]["fn"].log_prob(value), p.log_prob(value))
        vae.modalities[key].check(value)  # drawn inside its support


@pytest.mark.parametrize(("name", "size"), [each for each in CASES if each[1] > 1])
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_imputes_a_modality(name, size, parallel):
    vae = case(name, size)
    full = batch(vae)
    x = {"image": None, "vector": full["vector"]}
    for guide in (None, vae.guide):
        predictive = Predictive(
            vae.model, guide=guide, num_samples=4, parallel=parallel, return_sites=("z", "image")
        )
        draws = predictive(x)
        assert draws["z"].shape == (4, 6, 2)
        assert draws["image"].shape == (4, 6, 1, 8, 8)
        vae.modalities["image"].check(draws["image"])  # zeros and ones of a Bernoulli
        assert draws["image"].unique().numel() > 1


@every_case
def test_predictive_samples_the_prior(name, size):
    vae = case(name, size)
    x = {**dict.fromkeys(vae.modalities), **least(vae, 5)}
    draws = Predictive(vae.model, num_samples=3)(x, num_rows=5)
    for key in scored(vae):
        assert draws[key].shape == (3, 5, *vae.modalities[key].event_shape)


# ---- mixtures: score function against strata -----------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_score_function_and_stratified_gradients_agree(name):
    parts = [Modality("a", (2,)), Modality("b", (1,))]
    rows = 20_000
    vae = ZOO[name](parts, 1)
    x = {"a": torch.tensor([[0.5, -1.0]]).expand(rows, 2), "b": torch.ones(rows, 1)}
    # Every row has experts of its own, hence a gradient of its own: the rows are replicates.
    loc = torch.tensor([[-0.5], [0.8]]).repeat(rows, 1, 1).requires_grad_()
    scale = torch.tensor([[0.6], [0.9]]).repeat(rows, 1, 1).requires_grad_()
    private = {
        key: tuple(torch.full((rows, size), v).requires_grad_() for v in (0.2, 0.7))
        for key, size in vae.private_dims.items()
        if size
    }
    vae._encode = lambda batch: Experts(loc, scale, private)
    inputs = [loc, scale, *(part for pair in private.values() for part in pair)]
    estimates = []
    for elbo in (Trace_ELBO(), ImportanceWeightedELBO(1, bound="within", gradient="plain")):
        loss = elbo.differentiable_loss(vae.model, vae.guide, x)
        grads = torch.autograd.grad(loss, inputs)
        estimates.append(torch.cat([grad.flatten(1) for grad in grads], -1))  # (rows, P)
    mean = [each.mean(0) for each in estimates]
    se = [each.std(0) / math.sqrt(rows) for each in estimates]
    assert (mean[1].abs() > 10 * se[1]).any()  # there is a gradient to agree on
    assert ((mean[0] - mean[1]).abs() < 5 * (se[0].square() + se[1].square()).sqrt()).all()


# ---- exact worlds --------------------------------------------------------------------------------


def world_of(name):
    sizes = {"a": 3} if name == "vae" else {"a": 3, "b": 2, "c": 2}
    return LinearGaussianWorld.random(sizes, latent_dim=2, seed=1)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_elbo_is_that_of_the_world(name):
    world = world_of(name)
    vae = MODELS[name](world.modalities(), latent_dim=2)
    x = world.sample(4, seed=2)
    rows = masks(vae, 4)
    elbo = SubsetELBO("all", elbo=TraceMeanField_ELBO())
    exact = world.elbo(vae.posterior(x, rows), x, rows)
    replicates = 200
    for row in range(4):
        many = {key: value[row : row + 1].expand(replicates, -1) for key, value in x.items()}
        observed = {key: mask[row].expand(replicates) for key, mask in rows.items()}
        losses = torch.tensor([elbo.loss(vae.model, vae.guide, many, observed) for _ in range(20)])
        bounds = -losses / replicates
        se = bounds.std() / math.sqrt(len(bounds))
        assert (bounds.mean() - exact[row]).abs() < 5 * se


@pytest.mark.parametrize("name", GAUSSIAN)
def test_posterior_is_below_the_evidence_by_its_divergence(name):
    world = world_of(name)
    vae = MODELS[name](world.modalities(), latent_dim=2)
    x = world.sample(4, seed=2)
    rows = masks(vae, 4)
    q = vae.posterior(x, rows)
    evidence = world.log_prob(x, rows, of=list(x))
    close(world.elbo(q, x, rows) + world.kl(q, x, rows), evidence)


def test_exact_experts_make_every_draw_exact():
    world = LinearGaussianWorld.random({"a": 3, "b": 2, "c": 1}, 2, seed=3, diagonal=True)
    vae = MVAE(world.modalities(encoder="exact"), latent_dim=2)
    x = world.sample(5, seed=4)
    subsets = [("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]
    for subset in subsets:
        part = only(x, subset)
        q = vae.posterior(part)
        for z in q.sample((20,)):
            log_w = log_joint(vae, part, None, z) - q.log_prob(z)
            assert (log_w - world.log_prob(x, of=subset)).abs().max() < 1e-10


def test_exact_experts_make_every_draw_exact_row_by_row():
    world = LinearGaussianWorld.random({"a": 3, "b": 2, "c": 1}, 2, seed=3, diagonal=True)
    vae = MVAE(world.modalities(encoder="exact"), latent_dim=2)
    x = world.sample(8, seed=4)
    bits = torch.arange(8)
    observed = {key: (bits >> place) % 2 == 1 for place, key in enumerate(x)}  # every pattern
    exact = world.log_prob(x, observed, of=list(x)).nan_to_num(0.0)  # nothing has probability 1
    for key, mask in observed.items():
        x[key][~mask] = torch.nan
    q = vae.posterior(x, observed)
    for z in q.sample((20,)):
        log_w = log_joint(vae, x, observed, z) - q.log_prob(z)
        assert (log_w - exact).abs().max() < 1e-10
