"""Densities against closed forms, normalisation by sums and quadrature, supports, and messages."""

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from pyro.distributions.testing.gof import auto_goodness_of_fit
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from mmzoo import Modality
from mmzoo.inference import SubsetELBO
from mmzoo.likelihoods import (
    LIKELIHOODS,
    SCALE_FLOOR,
    Bernoulli,
    CallableLikelihood,
    Categorical,
    ContinuousBernoulli,
    Laplace,
    Likelihood,
    Normal,
    OneHotCategorical,
    StudentT,
    as_likelihood,
    likelihood_from_config,
)
from mmzoo.models import MVAE, VAE

# Round-off of a handful of float64 operations on numbers of size one to a hundred.
ROUND_OFF = {"rtol": 1e-12, "atol": 1e-13}
# The p-value of a correct sampler is uniform: below this once in a thousand seeds.
GOF_FAILURE_RATE = 1e-3
LOGITS = [-30.0, -3.0, -0.1, -1e-3, -1e-9, 0.0, 1e-9, 1e-3, 0.0999, 0.1, 0.1001, 3.0, 30.0]

# name -> (likelihood, event shape): every class, every treatment of the scale
CASES: dict[str, tuple[Likelihood, tuple[int, ...]]] = {
    "bernoulli": (Bernoulli(), (2, 3)),
    "continuous_bernoulli": (ContinuousBernoulli(), (2, 3)),
    "categorical": (Categorical(4), ()),
    "categorical_sequence": (Categorical(4), (3,)),
    "one_hot": (OneHotCategorical(), (4,)),
    "one_hot_sequence": (OneHotCategorical(), (3, 4)),
    "normal": (Normal(0.5), (2, 3)),
    "normal_scalar": (Normal("predicted"), ()),
    "normal_learned": (Normal("learned"), (2, 3)),
    "normal_predicted": (Normal("predicted"), (2, 3)),
    "laplace": (Laplace(), (3,)),
    "laplace_predicted": (Laplace("predicted"), (3,)),
    "student_t": (StudentT(3), (3,)),
    "student_t_learned": (StudentT("learned", scale="learned"), (3,)),
    "student_t_predicted": (StudentT(scale="predicted"), (3,)),
    "callable": (CallableLikelihood(lambda output: dist.Poisson(output.exp())), (3,)),
}
FITTING = [name for name in CASES if name != "callable"]


def case(name: str) -> tuple[Likelihood, tuple[int, ...]]:
    likelihood, event_shape = CASES[name]
    return likelihood.build(event_shape), event_shape


def raw_output(likelihood: Likelihood, event_shape: tuple[int, ...], *lead: int) -> tuple:
    shapes = likelihood.param_shapes(event_shape).values()
    return tuple(torch.randn((*lead, *shape)) for shape in shapes)


def integral(log_prob, low: float, high: float) -> float:
    """Integral of a density by Gauss-Legendre quadrature, exact to round-off for entire ones."""
    nodes, weights = np.polynomial.legendre.leggauss(80)
    points = torch.as_tensor((high - low) / 2 * nodes + (high + low) / 2)
    return ((high - low) / 2 * torch.as_tensor(weights) * log_prob(points).exp()).sum().item()


# ---- densities ----------------------------------------------------------------------------------


def test_bernoulli_matches_closed_form_far_into_the_tails():
    logits = torch.tensor([-800.0, -50.0, -41.0, -39.0, -1.0, 0.0, 2.0, 39.0, 41.0, 800.0])
    one = Bernoulli()(logits, (10,)).base_dist.log_prob(torch.ones(10))
    zero = Bernoulli()(logits, (10,)).base_dist.log_prob(torch.zeros(10))
    torch.testing.assert_close(one, -torch.logaddexp(torch.zeros(10), -logits), **ROUND_OFF)
    torch.testing.assert_close(zero, -torch.logaddexp(torch.zeros(10), logits), **ROUND_OFF)
    torch.testing.assert_close(torch.logaddexp(one, zero), torch.zeros(10), **ROUND_OFF)


def test_bernoulli_equals_pyro_with_gradient_and_broadcasting():
    logits = torch.randn(7, 5, 2, 3, requires_grad=True)
    value = torch.bernoulli(torch.full((5, 2, 3), 0.4))
    ours = Bernoulli()(logits, (2, 3)).log_prob(value)
    pyros = dist.Bernoulli(logits=logits).to_event(2).log_prob(value.expand(7, 5, 2, 3))
    torch.testing.assert_close(ours, pyros, **ROUND_OFF)
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    torch.testing.assert_close(gradient, value - logits.sigmoid(), **ROUND_OFF)


def test_bernoulli_scores_integer_values():
    logits, value = torch.randn(5, 3), torch.tensor([0, 1, 1])
    p = Bernoulli()(logits, (3,))
    torch.testing.assert_close(p.log_prob(value), p.log_prob(value.double()), **ROUND_OFF)


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_is_normalised_with_the_right_mean_and_cdf(logit):
    p = ContinuousBernoulli()(torch.tensor(logit), ())
    assert integral(p.log_prob, 0, 1) == pytest.approx(1, rel=1e-12)
    mean = integral(lambda x: p.log_prob(x) + x.log(), 0, 1)
    assert p.mean.item() == pytest.approx(mean, rel=1e-10)
    points = torch.tensor([0.01, 0.3, 0.5, 0.77, 0.99])
    cdf = torch.tensor([integral(p.log_prob, 0, x.item()) for x in points])
    torch.testing.assert_close(p.cdf(points), cdf, **ROUND_OFF)


@pytest.mark.parametrize("logit", [logit for logit in LOGITS if abs(logit) < 10])
def test_continuous_bernoulli_quantile_inverts_cdf(logit):
    p = ContinuousBernoulli()(torch.tensor(logit), ())
    points = torch.tensor([0.01, 0.3, 0.5, 0.77, 0.99])
    # a density as small as e^-3 / 3 amplifies the round-off of the cdf
    torch.testing.assert_close(p.icdf(p.cdf(points)), points, rtol=1e-11, atol=0)
    assert p.icdf(torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_score_is_value_minus_mean(logit):
    logits = torch.full((3,), logit, requires_grad=True)
    value = torch.tensor([0.0, 0.4, 1.0])
    p = ContinuousBernoulli()(logits, (3,))
    (score,) = torch.autograd.grad(p.log_prob(value), logits)
    torch.testing.assert_close(score, value - p.mean.detach(), rtol=1e-10, atol=1e-12)


def test_continuous_bernoulli_equals_torch_where_torch_is_stable():
    logits = torch.tensor([-9.0, -2.0, -0.5, 0.5, 2.0, 9.0])
    value = torch.rand(4, 6)
    ours = ContinuousBernoulli()(logits, (6,)).base_dist
    torchs = torch.distributions.ContinuousBernoulli(logits=logits)
    # torch forms 1 - 2p, which loses three digits at p = 0.9999
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(ours.log_prob(value), torchs.log_prob(value), **close)
    torch.testing.assert_close(ours.mean, torchs.mean, **close)
    torch.testing.assert_close(ours.entropy(), torchs.entropy(), **close)


def test_continuous_bernoulli_in_single_precision():
    logits = torch.tensor(LOGITS)
    value = torch.rand(len(LOGITS))
    exact = ContinuousBernoulli()(logits, (len(LOGITS),)).base_dist.log_prob(value)
    single = ContinuousBernoulli()(logits.float(), (len(LOGITS),)).base_dist
    # a few units in the last place of numbers up to thirty
    torch.testing.assert_close(single.log_prob(value.float()), exact.float(), rtol=1e-5, atol=1e-6)


def test_one_hot_equals_torch_and_sums_to_one():
    logits = torch.randn(5, 4)
    p = OneHotCategorical()(logits, (4,))
    log_probs = torch.stack([p.log_prob(row) for row in torch.eye(4)])  # (4, 5)
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).T, **ROUND_OFF)
    torch.testing.assert_close(log_probs.logsumexp(0), torch.zeros(5), **ROUND_OFF)
    reference = torch.distributions.OneHotCategorical(logits=logits)
    value = reference.sample()
    torch.testing.assert_close(p.log_prob(value), reference.log_prob(value), **ROUND_OFF)


def test_categorical_equals_one_hot_and_sums_over_positions():
    logits = torch.randn(5, 3, 4)
    labels = torch.randint(4, (5, 3))
    log_prob = Categorical(4)(logits, (3,)).log_prob(labels)
    hot = OneHotCategorical()(logits, (3, 4)).log_prob(one_hot(labels, 4).double())
    torch.testing.assert_close(log_prob, hot, **ROUND_OFF)
    single = torch.stack(
        [Categorical(4)(logits[:, 0], ()).log_prob(torch.tensor(c)) for c in range(4)]
    )
    torch.testing.assert_close(single.logsumexp(0), torch.zeros(5), **ROUND_OFF)


def scipy_density(name: str, loc, scale):
    if name == "student_t":
        return scipy.stats.t(3, loc, scale)
    return {"normal": scipy.stats.norm, "laplace": scipy.stats.laplace}[name](loc, scale)


def with_scale(name: str, scale) -> Likelihood:
    options = {"df": 3} if name == "student_t" else {}
    return LIKELIHOODS[name](scale=scale, **options)


@pytest.mark.parametrize("name", ["normal", "laplace", "student_t"])
def test_fixed_learned_and_predicted_scales_equal_scipy(name):
    loc, raw, value = torch.randn(3, 5, 2).unbind(0)
    fixed = with_scale(name, 0.7)
    log_prob = scipy_density(name, loc, 0.7).logpdf(value).sum(-1)
    torch.testing.assert_close(fixed(loc, (2,)).log_prob(value), torch.as_tensor(log_prob))
    learned = with_scale(name, "learned").build((2,))
    with torch.no_grad():
        learned.log_scale.copy_(torch.tensor([0.3, -0.8]))
    log_prob = scipy_density(name, loc, np.exp([0.3, -0.8])).logpdf(value).sum(-1)
    torch.testing.assert_close(learned(loc, (2,)).log_prob(value), torch.as_tensor(log_prob))
    predicted = with_scale(name, "predicted")((loc, raw), (2,))
    log_prob = scipy_density(name, loc, softplus(raw) + SCALE_FLOOR).logpdf(value).sum(-1)
    torch.testing.assert_close(predicted.log_prob(value), torch.as_tensor(log_prob))


@pytest.mark.parametrize("name", ["normal", "laplace", "student_t"])
def test_real_densities_integrate_to_one(name):
    p = with_scale(name, 0.7)(torch.tensor(0.4), ())
    total, error = scipy.integrate.quad(
        lambda x: p.log_prob(torch.tensor(x)).exp().item(), -np.inf, np.inf, limit=200
    )
    assert abs(total - 1) <= max(error, 1e-12)


def test_student_t_learned_degrees_of_freedom():
    likelihood = StudentT("learned").build((2,))
    value = torch.randn(5, 2)
    initial = scipy.stats.t(5).logpdf(value).sum(-1)
    torch.testing.assert_close(
        likelihood(torch.zeros(5, 2), (2,)).log_prob(value), torch.as_tensor(initial)
    )
    with torch.no_grad():
        likelihood.log_df_minus_one.copy_(torch.tensor([0.0, 1.0]))
    changed = scipy.stats.t([2, 1 + math.e]).logpdf(value).sum(-1)
    torch.testing.assert_close(
        likelihood(torch.zeros(5, 2), (2,)).log_prob(value), torch.as_tensor(changed)
    )


@pytest.mark.parametrize(
    ("likelihood", "raw"),
    [
        (ContinuousBernoulli(), 0.0),
        (ContinuousBernoulli(), 4.0),
        (ContinuousBernoulli(), -0.3),
        (StudentT(4, scale=0.5), 1.0),
        (Laplace(0.3), 1.0),
    ],
)
def test_samples_follow_the_density(likelihood, raw):
    p = likelihood(torch.tensor(raw), ())
    samples = p.sample((10000,))
    assert auto_goodness_of_fit(samples, p.log_prob(samples).exp()) > GOF_FAILURE_RATE


@pytest.mark.parametrize("likelihood", [Categorical(4), OneHotCategorical()])
def test_labels_follow_the_density(likelihood):
    logits = torch.tensor([0.3, -1.0, 0.0, 1.2])
    event_shape = () if isinstance(likelihood, Categorical) else (4,)
    samples = likelihood(logits, event_shape).sample((10000,))
    labels = samples if event_shape == () else samples.argmax(-1)
    expected = logits.softmax(-1) * 10000
    p_value = scipy.stats.chisquare(labels.bincount(minlength=4), expected).pvalue
    assert p_value > GOF_FAILURE_RATE


def test_binary_samples_follow_the_density():
    p = Bernoulli()(torch.tensor(0.7), ())
    ones = int(p.sample((10000,)).sum())
    probability = p.log_prob(torch.tensor(1.0)).exp().item()
    assert scipy.stats.binomtest(ones, 10000, probability).pvalue > GOF_FAILURE_RATE


# ---- shapes, output formats ---------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (0,), (3, 0)])
def test_batch_is_what_leads_and_rows_are_independent(name, lead):
    likelihood, event_shape = case(name)
    output = raw_output(likelihood, event_shape, *lead)
    p = likelihood(output if len(output) > 1 else output[0], event_shape)
    assert (p.batch_shape, p.event_shape) == (lead, event_shape)
    filler = likelihood.filler(event_shape)
    log_prob = p.log_prob(filler.expand((*lead, *event_shape)))
    assert log_prob.shape == lead
    rows = [part.flatten(0, len(lead) - 1) if lead else part[None] for part in output]
    for row, value in enumerate(log_prob.reshape(-1)):
        alone = likelihood(tuple(part[row] for part in rows), event_shape)
        torch.testing.assert_close(alone.log_prob(filler), value, **ROUND_OFF)


@pytest.mark.parametrize("name", CASES)
def test_mask_and_expand_keep_the_density(name):
    likelihood, event_shape = case(name)
    p = likelihood(raw_output(likelihood, event_shape, 4), event_shape)
    value = likelihood.filler(event_shape).expand(4, *event_shape)
    log_prob = p.log_prob(value)
    mask = torch.tensor([True, False, True, False])
    torch.testing.assert_close(p.mask(mask).log_prob(value), log_prob * mask, **ROUND_OFF)
    expanded = p.expand((3, 4))
    assert expanded.batch_shape == (3, 4)
    torch.testing.assert_close(expanded.log_prob(value), log_prob.expand(3, 4), **ROUND_OFF)
    torch.testing.assert_close(p.to_event(1).log_prob(value), log_prob.sum(), **ROUND_OFF)


@pytest.mark.parametrize("name", ["bernoulli", "one_hot_categorical", "continuous_bernoulli"])
def test_expand_keeps_the_class_of_the_density(name):
    p = LIKELIHOODS[name]()(torch.randn(2, 4), (4,))
    base, expanded = (getattr(q, "base_dist", q) for q in (p, p.expand((3, 2))))
    assert type(expanded) is type(base)


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)])
def test_tuple_list_and_split_tensor_are_the_same(event_shape):
    likelihood = Normal("predicted")
    loc, scale = torch.randn(2, 5, *event_shape).unbind(0)
    joined = torch.cat([loc, scale], -1) if event_shape else torch.stack([loc, scale], -1)
    for output in [(loc, scale), [loc, scale], joined]:
        p = likelihood(output, event_shape)
        base = p.base_dist if event_shape else p
        torch.testing.assert_close(base.loc, loc, rtol=0, atol=0)
        torch.testing.assert_close(base.scale, softplus(scale) + SCALE_FLOOR, **ROUND_OFF)


@pytest.mark.parametrize(
    ("likelihood", "event_shape", "output", "message"),
    [
        (Bernoulli(), (2, 3), torch.zeros(5, 6), r"logits \(\*, 2, 3\), found \(5, 6\)"),
        (Normal("predicted"), (3,), torch.zeros(5, 3), r"loc \(\*, 3\), scale \(\*, 3\), found"),
        (Normal("predicted"), (3,), (torch.zeros(5, 3),), r"found \[\(5, 3\)\]"),
        (Normal(), (3,), (torch.zeros(5, 3),) * 2, r"loc \(\*, 3\), found \[\(5, 3\), \(5, 3\)\]"),
        (Categorical(4), (), torch.zeros(5, 3), r"logits \(\*, 4\), found \(5, 3\)"),
        (Normal("predicted"), (), torch.tensor(1.0), r"found \(\)"),
    ],
)
def test_wrong_output_says_expected_and_found(likelihood, event_shape, output, message):
    with pytest.raises(ValueError, match=message):
        likelihood(output, event_shape)


def test_parameters_that_do_not_share_leading_shapes_are_not_split():
    likelihood = CallableLikelihood(dist.Normal, {"loc": (2, 3), "scale": (3,)})
    with pytest.raises(ValueError, match=r"loc \(\*, 2, 3\), scale \(\*, 3\), found \(5, 2, 6\)"):
        likelihood(torch.zeros(5, 2, 6), (2, 3))


def test_where_begins_the_message():
    with pytest.raises(ValueError, match="^modality 'image': expected a decoder"):
        Bernoulli()(torch.zeros(5, 6), (3,), where="modality 'image'")


# ---- learned parameters -------------------------------------------------------------------------


def test_build_copies_and_never_changes_what_was_given():
    given = StudentT("learned", scale="learned")
    first, second = given.build((3,)), given.build((3,))
    assert list(given.parameters()) == []
    assert {name: tuple(p.shape) for name, p in first.named_parameters()} == {
        "log_scale": (3,),
        "log_df_minus_one": (3,),
    }
    with torch.no_grad():
        first.log_scale.fill_(1.0)
    torch.testing.assert_close(second.log_scale, torch.nn.Parameter(torch.zeros(3)))
    assert given.build(()).log_scale.shape == ()


def test_learned_parameters_get_the_gradient_of_the_density():
    likelihood = Normal("learned").build((3,))
    value = torch.randn(5, 3)
    likelihood(torch.zeros(5, 3), (3,)).log_prob(value).sum().backward()
    # d/d log_scale of log N(x; 0, scale) at scale 1 is x^2 - 1
    torch.testing.assert_close(likelihood.log_scale.grad, (value**2 - 1).sum(0), **ROUND_OFF)


def test_learned_scale_before_build_is_an_error():
    with pytest.raises(ValueError, match=r"do not exist yet; use likelihood.build\(event_shape\)"):
        Normal("learned")(torch.zeros(5, 3), (3,))


# ---- support ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filler_lies_in_the_support(name, dtype):
    likelihood, event_shape = case(name)
    filler = likelihood.filler(event_shape, dtype, "cpu")
    assert filler.shape == event_shape
    assert filler.dtype == (torch.int64 if isinstance(likelihood, Categorical) else dtype)
    p = likelihood(raw_output(likelihood, event_shape, 2), event_shape)
    assert p.support.check(filler).all()
    likelihood.check(filler.expand(2, *event_shape), "modality 'm'")


@pytest.mark.parametrize("name", FITTING)
def test_samples_pass_their_own_check(name):
    likelihood, event_shape = case(name)
    samples = likelihood(raw_output(likelihood, event_shape, 50), event_shape).sample()
    likelihood.check(samples, "modality 'm'")
    assert likelihood.cast(samples, torch.float32).dtype == (
        torch.int64 if isinstance(likelihood, Categorical) else torch.float32
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("likelihood", "value", "message"),
    [
        (Bernoulli(), [0.0, 0.5], "found values from 0 to 0.5; binarise .*`binarize=`"),
        (Bernoulli(), [0.0, 0.5], "likelihood 'continuous_bernoulli'"),
        (Bernoulli(), [0.0, NAN], "found NaN; mask the row"),
        (ContinuousBernoulli(), [0, 255], r"expected values in \[0, 1\].*from 0 to 255; rescale"),
        (ContinuousBernoulli(), [0.0, NAN], "found NaN"),
        (Categorical(3), [0, 3], r"labels 0 .. 2 \(num_classes=3\), found labels from 0 to 3"),
        (Categorical(3), [-1, 1], "found labels from -1 to 1"),
        (OneHotCategorical(), [0.5, 0.5], "one-hot vectors of 0 and 1, found values from 0.5"),
        (OneHotCategorical(), [1.0, 1.0], "sum to 1, found sums from 2 to 2"),
        (OneHotCategorical(), [0, 0], "sum to 1, found sums from 0 to 0"),
        (OneHotCategorical(), [1.0, NAN], "found NaN"),
        (Normal(), [0.0, NAN], r"found NaN.*entrywise_missing=True"),
        (Normal(), [0.0, float("inf")], "expected finite values"),
        (CallableLikelihood(dist.Poisson), [0.0, NAN], "found NaN"),
    ],
)
def test_values_outside_the_support(likelihood, value, message):
    with pytest.raises(ValueError, match=f"^modality 'm': .*{message}"):
        likelihood.check(torch.tensor([value]), "modality 'm'")


@pytest.mark.parametrize(
    ("likelihood", "value", "message"),
    [
        (Categorical(3), torch.zeros(2), r"expected integer labels.*torch.float32; use .long\(\)"),
        (Normal(), torch.zeros(2, 3, dtype=torch.complex64), "real values, found torch.complex64"),
        (Categorical(3), torch.zeros(2, dtype=torch.complex64), "expected integer labels"),
    ],
)
def test_wrong_dtypes(likelihood, value, message):
    with pytest.raises(TypeError, match=f"^modality 'm': .*{message}"):
        likelihood.check(value, "modality 'm'")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_binary_and_one_hot_values_of_any_dtype_pass(dtype):
    value = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    Bernoulli().check(value, "modality 'm'")
    OneHotCategorical().check(value, "modality 'm'")
    torch.testing.assert_close(
        OneHotCategorical().cast(value, torch.float64), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    )


def test_labels_of_narrow_integer_types_are_compared_as_int64():
    Categorical(300).check(torch.tensor([0, 255], dtype=torch.uint8), "modality 'm'")
    assert (
        Categorical(300).cast(torch.tensor([255], dtype=torch.uint8), torch.float32).item() == 255
    )


def test_factorises():
    factorising = {name for name, kind in LIKELIHOODS.items() if kind.factorises}
    assert factorising == set(LIKELIHOODS) - {"categorical", "one_hot_categorical"}


# ---- names and configurations -------------------------------------------------------------------


@pytest.mark.parametrize("name", FITTING)
def test_config_survives_json(name):
    likelihood, event_shape = CASES[name]
    config = json.loads(json.dumps(likelihood.config()))
    again = likelihood_from_config(config)
    assert (type(again), again.config()) == (type(likelihood), likelihood.config())
    assert again.param_shapes(event_shape) == likelihood.param_shapes(event_shape)


@pytest.mark.parametrize("name", sorted(set(LIKELIHOODS) - {"categorical"}))
def test_names_objects_and_classes(name):
    kind = LIKELIHOODS[name]
    assert type(as_likelihood(name)) is kind
    assert type(as_likelihood(kind)) is kind
    given = kind()
    assert as_likelihood(given) is given


def test_callable_becomes_a_likelihood():
    likelihood = as_likelihood(lambda output: dist.Poisson(output.exp()))
    raw = torch.randn(5, 3)
    p = likelihood(raw, (3,))
    counts = torch.randint(0, 9, (5, 3)).double()
    expected = torch.as_tensor(scipy.stats.poisson(raw.exp()).logpmf(counts).sum(-1))
    torch.testing.assert_close(p.log_prob(counts), expected)
    assert likelihood.param_shapes((3,)) == {"output": (3,)}


def test_callable_with_named_parameters():
    def mixture(loc: Tensor, logits: Tensor) -> dist.MixtureSameFamily:
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(loc, 1.0))

    for params in (
        {"loc": (3, 2), "logits": (3, 2)},
        lambda shape: dict.fromkeys(("loc", "logits"), (*shape, 2)),
    ):
        likelihood = CallableLikelihood(mixture, params, filler=0.5)
        loc, logits = torch.randn(2, 5, 3, 2).unbind(0)
        value = torch.randn(5, 3)
        normal = dist.Normal(loc, 1.0).log_prob(value[..., None])
        expected = (logits.log_softmax(-1) + normal).logsumexp(-1).sum(-1)
        torch.testing.assert_close(likelihood((loc, logits), (3,)).log_prob(value), expected)
        torch.testing.assert_close(likelihood.filler((3,)), torch.full((3,), 0.5))


def test_callable_errors():
    with pytest.raises(TypeError, match="pyro.distributions, found Normal; return"):
        as_likelihood(lambda loc: torch.distributions.Normal(loc, 1.0))(torch.zeros(5, 3), (3,))
    with pytest.raises(ValueError, match=r"event shape \(3,\), found batch shape \(5,\) and event"):
        as_likelihood(lambda loc: dist.Normal(loc[:, 0], 1.0))(torch.zeros(5, 3), (3,))
    with pytest.raises(ValueError, match=r"found batch shape \(\) and event shape \(5, 3\)"):
        as_likelihood(lambda loc: dist.Normal(loc, 1.0).to_event(2))(torch.zeros(5, 3), (3,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_likelihood("gauss"), "unknown likelihood 'gauss'; known: 'bernoulli', "),
        (lambda: as_likelihood("categorical"), r"use likelihood=Categorical\(num_classes=10\)"),
        (lambda: as_likelihood(Categorical), r"use likelihood=Categorical\(num_classes=10\)"),
        (lambda: likelihood_from_config({"name": "normal", "sd": 1}), r"no such options \['sd'\]"),
        (lambda: likelihood_from_config({}), "unknown likelihood None"),
        (
            lambda: likelihood_from_config(CASES["callable"][0].config(), "modality 'm'"),
            "^modality 'm': .* found a custom callable, which is not stored",
        ),
        (lambda: Categorical(1), "expected num_classes of 2 or more, found 1"),
        (lambda: Categorical("10"), "expected num_classes of 2 or more, found '10'"),
        (lambda: Normal(0.0), "Normal: scale: expected a positive number or 'learned' or 'predic"),
        (lambda: Laplace("fixed"), "Laplace: scale: .*found 'fixed'"),
        (lambda: Normal(float("nan")), "found nan"),
        (
            lambda: StudentT(True),
            "StudentT: df: expected a positive number or 'learned', found True",
        ),
        (lambda: StudentT("predicted"), "StudentT: df: .*found 'predicted'"),
        (lambda: OneHotCategorical().param_shapes(()), r"expected event shape \(num_classes,\)"),
    ],
)
def test_bad_specifications(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_likelihood():
    with pytest.raises(
        TypeError, match="^modality 'm': expected a name, a Likelihood or a callable"
    ):
        as_likelihood(3, "modality 'm'")


# Decoders in a model ----------------------------------------------------------------------------


class Mean(nn.Module):
    """Features of rows of any shape."""

    def forward(self, value: Tensor) -> Tensor:
        return value.reshape(len(value), -1).mean(-1, keepdim=True)


def squares(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 9), nn.Unflatten(-1, (3, 3)))


@pytest.mark.parametrize(
    ("event_shape", "likelihood", "decoder", "message"),
    [
        ((), "normal", lambda dim: nn.Linear(dim, 1), r"\(6,\) .*found \(6, 1\); .* gave \(6, 1\)"),
        ((3,), "normal", squares, r"\(6,\) .*found \(6, 3\); .*\(6, 3, 3\), let it give \(6, 3\)"),
        (
            (3,),
            lambda out: dist.Normal(out.mean(0), 1.0),
            lambda dim: nn.Linear(dim, 3),
            r"\(6,\) .*found \(\); .*and the likelihood one density for each row",
        ),
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_more_than_a_density_for_each_row_is_refused(
    event_shape, likelihood, decoder, message, enabled
):
    """It would broadcast: a sum over pairs of rows, without a word."""
    vae = VAE([Modality("y", event_shape, likelihood, encoder=Mean(), decoder=decoder)], 2)
    x = {"y": torch.randn(6, *event_shape)}
    message = f"^modality 'y': expected a density of batch shape {message}"
    with pyro.validation_enabled(enabled), pytest.raises(ValueError, match=message):
        Trace_ELBO().loss(vae.model, vae.guide, x)


@pytest.mark.parametrize("enabled", [True, False])
def test_nobody_has_a_modality_of_a_density_of_ones_own(enabled):
    """Torch's densities and checks of several dimensions fail for zero rows."""

    def joint(loc: Tensor) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(loc, scale_tril=loc.exp().diag_embed())

    vae = MVAE([Modality("a", (3,)), Modality("own", (4,), joint)], 2)
    x = {"a": torch.randn(6, 3), "own": torch.randn(6, 4)}
    losses = []
    with pyro.validation_enabled(enabled):
        for values in (x, {"a": x["a"]}):
            observed = {"own": torch.zeros(6, dtype=torch.bool)} if "own" in values else None
            pyro.set_rng_seed(1)
            losses.append(SubsetELBO("all").loss(vae.model, vae.guide, values, observed))
    assert losses[0] == losses[1]


def test_one_number_for_each_row():
    decoder = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    vae = VAE([Modality("y", (), "normal", encoder=Mean(), decoder=decoder)], 2)
    assert vae.likelihood("y", torch.zeros(4, 6, 2)).batch_shape == (4, 6)


def test_numbers_of_numpy_and_torch_are_numbers():
    labels = np.array([0, 2, 1])
    assert Categorical(labels.max() + 1).num_classes == 3
    assert Categorical(torch.tensor(3)).config() == Categorical(3).config()
    spread = np.array([1.0, 2.0, 3.0], dtype=np.float32).std()
    for scale in (spread, torch.tensor(float(spread)), float(spread)):
        assert Normal(scale).config() == {"name": "normal", "scale": float(spread)}
    assert type(StudentT(df=np.float32(4.0)).config()["df"]) is float
    with pytest.raises(ValueError, match="expected a positive number or 'learned' or 'predicted'"):
        Normal(torch.ones(2))
