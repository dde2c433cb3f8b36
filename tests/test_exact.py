"""Exact worlds, against block-matrix conditioning, Bayes' rule on grids, and brute force."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mmzoo.combine import product_of_experts
from mmzoo.exact import DiscreteWorld, LinearGaussianWorld, quadrature_log_prob

EXACT = 1e-10
SIZES = {"a": 4, "b": 3, "c": 2}
NAMES = list(SIZES)
N, D = 12, 2
SUBSETS = [list(c) for k in (1, 2, 3) for c in itertools.combinations(NAMES, k)]


def close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def world(**options) -> LinearGaussianWorld:
    return LinearGaussianWorld.random(SIZES, D, seed=3, **options)


def discrete() -> DiscreteWorld:
    return DiscreteWorld.random(3, categorical={"a": 4}, bernoulli={"b": 3, "c": 2}, seed=3)


def holes(x: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random masks with one complete and one empty row, and NaN where a mask is False."""
    observed = {name: torch.rand(len(value)) > 0.4 for name, value in x.items()}
    for mask in observed.values():
        mask[0], mask[1] = True, False
    filled = {m: torch.where(observed[m].unsqueeze(-1), x[m], torch.nan) for m in x}
    return filled, observed


def joint_gaussian(w: LinearGaussianWorld, names: list[str]) -> tuple[Tensor, Tensor]:
    """Mean and covariance of (z, x_names), stacked."""
    weight = torch.cat([torch.eye(w.latent_dim), *[w.weights[m] for m in names]])
    noise = [torch.zeros(w.latent_dim), *[w.scales[m].square() for m in names]]
    mean = torch.cat([torch.zeros(w.latent_dim), *[w.biases[m] for m in names]])
    return mean, weight @ weight.mT + torch.cat(noise).diag()


def conditional(mean: Tensor, cov: Tensor, size: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """First `size` coordinates given the others, by the Schur complement."""
    gain = cov[:size, size:] @ torch.linalg.inv(cov[size:, size:])
    return mean[:size] + gain @ (value - mean[size:]), cov[:size, :size] - gain @ cov[size:, :size]


def schur_log_prob(
    w: LinearGaussianWorld, x: dict[str, Tensor], of: list[str], given: list[str]
) -> Tensor:
    """Log-density of x_of given x_given in one row."""
    mean, cov = joint_gaussian(w, [*of, *given])
    mean, cov = mean[w.latent_dim :], cov[w.latent_dim :, w.latent_dim :]
    value = torch.cat([x[m] for m in of])
    if given:
        mean, cov = conditional(mean, cov, len(value), torch.cat([x[m] for m in given]))
    return torch.distributions.MultivariateNormal(mean, cov).log_prob(value)


@pytest.mark.parametrize(
    ("of", "given"),
    [(of, given) for of in SUBSETS for given in [[], *SUBSETS] if not set(of) & set(given)],
)
def test_log_prob_matches_schur_complements_for_every_pattern(of: list[str], given: list[str]):
    w = world()
    x, observed = holes(w.sample(N, seed=4))
    found = w.log_prob(x, observed, of=of, given=given)
    for n in range(N):
        row = {m: x[m][n] for m in NAMES if observed[m][n]}
        of_n, given_n = [m for m in of if m in row], [m for m in given if m in row]
        expected = schur_log_prob(w, row, of_n, given_n) if of_n else torch.tensor(math.nan)
        close(found[n], expected)


@pytest.mark.parametrize("make", [world, discrete])
def test_chain_rule(make):
    w = make()
    x = w.sample(N, seed=5)
    joint = w.log_prob(x, of=NAMES)
    parts = w.log_prob(x, of=["c"]) + w.log_prob(x, of=["a"], given=["b", "c"])
    close(joint, parts + w.log_prob(x, of=["b"], given=["c"]))


@pytest.mark.parametrize("make", [world, discrete])
def test_absent_names_are_missing_rows(make):
    w = make()
    x = w.sample(N, seed=5)
    observed = {"b": torch.zeros(N, dtype=torch.bool)}
    close(
        w.log_prob({"a": x["a"]}, of=["a", "b"], given=["c"]),
        w.log_prob(x, observed, of=["a", "b"]),
    )


def test_log_prob_keeps_its_digits_when_the_noise_is_small():
    # cov has condition number 1e12, so the block-matrix reference loses twelve digits; the
    # evidence of one noisy copy of z per entry is a product of two-by-two Gaussians by hand.
    sigma = 1e-6
    w = LinearGaussianWorld({"a": torch.ones(2, 1)}, {"a": torch.zeros(2)}, {"a": sigma})
    x = torch.tensor([[0.3, 0.3 + 2e-6]])
    total, difference = x.sum(-1) / math.sqrt(2), (x[:, 1] - x[:, 0]) / math.sqrt(2)
    expected = dist.Normal(0.0, math.sqrt(2 + sigma**2)).log_prob(total)
    expected = expected + dist.Normal(0.0, sigma).log_prob(difference)
    # The difference of the two entries, 2e-6, is itself known to 1e-10 only.
    close(w.log_prob({"a": x}, of=["a"]), expected, 10 * EXACT)


def test_posterior_matches_schur_complements_for_every_pattern():
    w = world()
    x, observed = holes(w.sample(N, seed=6))
    posterior = w.posterior(x, observed)
    assert (posterior.batch_shape, posterior.event_shape) == ((N,), (D,))
    for n in range(N):
        names = [m for m in NAMES if observed[m][n]]
        mean, cov = joint_gaussian(w, names)
        value = torch.cat([torch.zeros(0), *[x[m][n] for m in names]])
        mean, cov = conditional(mean, cov, D, value)
        close(posterior.mean[n], mean)
        close(posterior.covariance_matrix[n], cov)


def test_posterior_is_bayes_rule_on_a_grid():
    w = LinearGaussianWorld.random(SIZES, 1, seed=7)
    x = w.sample(3, seed=8)
    z = torch.linspace(-12, 12, 20001).unsqueeze(-1)  # the trapezoidal rule is exact
    joint = dist.Normal(0.0, 1.0).log_prob(z)
    for m in NAMES:
        loc = z.unsqueeze(1) @ w.weights[m].mT + w.biases[m]  # (Q, 1, d)
        joint = joint + dist.Normal(loc, w.scales[m]).log_prob(x[m]).sum(-1)  # (Q, N)
    evidence = (joint.logsumexp(0) + math.log(24 / 20000)).squeeze()
    close(w.log_prob(x, of=NAMES), evidence)
    close(w.posterior(x).log_prob(z.unsqueeze(1)), joint - evidence, 10 * EXACT)


@pytest.mark.parametrize("names", SUBSETS)
def test_product_of_exact_experts_is_the_posterior(names: list[str]):
    w = world(diagonal=True)
    x = {m: v for m, v in w.sample(N, seed=9).items() if m in names}
    loc, scale = (torch.stack(t, -2) for t in zip(*[w.expert(m, x[m]) for m in x], strict=True))
    loc, scale = product_of_experts(loc, scale)
    posterior = w.posterior(x)
    close(loc, posterior.mean)
    close(scale.square().diag_embed(), posterior.covariance_matrix)
    z = torch.randn(5, N, D)
    log_w = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - dist.Normal(loc, scale).log_prob(z).sum(-1)
    for m in x:
        mean = z @ w.weights[m].mT + w.biases[m]
        log_w = log_w + dist.Normal(mean, w.scales[m]).log_prob(x[m]).sum(-1)
    close(log_w, w.log_prob(x, of=names).expand(5, N))


def test_directions_without_information_leave_the_prior():
    w = LinearGaussianWorld.random({"a": 1}, 3, seed=0, diagonal=True)
    used = w.weights["a"].squeeze(0) != 0
    assert used.sum() == 1
    x = w.sample(N, seed=1)
    loc, scale = w.expert("a", x["a"])
    assert loc[:, ~used].eq(0).all()
    assert scale[:, ~used].eq(1e12).all()
    loc, scale = product_of_experts(loc.unsqueeze(-2), scale.unsqueeze(-2))
    close(loc, w.posterior(x).mean)
    close(scale, w.posterior(x).stddev)


def guides(lead: tuple[int, ...] = ()) -> dict[str, object]:
    loc, scale = torch.randn(*lead, N, D), torch.rand(*lead, N, D) + 0.1
    root = torch.randn(*lead, N, D, D)
    covariance = root @ root.mT + 0.1 * torch.eye(D)
    return {
        "pair": (loc, scale),
        "independent": dist.Normal(loc, scale).to_event(1),
        "multivariate": dist.MultivariateNormal(loc, covariance),
    }


@pytest.mark.parametrize("lead", [(), (4,)])
@pytest.mark.parametrize("kind", guides())
def test_log_prob_is_elbo_plus_kl(kind: str, lead: tuple[int, ...]):
    w = world()
    x, observed = holes(w.sample(N, seed=10))
    q = guides(lead)[kind]
    expected = w.log_prob(x, observed, of=NAMES).nan_to_num(0.0).expand(*lead, N)
    close(w.elbo(q, x, observed) + w.kl(q, x, observed), expected)
    close(w.kl(w.posterior(x, observed), x, observed), torch.zeros(N))


@pytest.mark.parametrize("kind", guides())
def test_elbo_matches_quadrature(kind: str):
    w = world()
    x = w.sample(N, seed=11)
    q = guides()[kind]
    q_z = dist.Normal(*q).to_event(1) if kind == "pair" else q
    points, weights = hermite_grid(8)  # exact for quadratics
    root = q_z.covariance_matrix if kind == "multivariate" else q_z.variance.diag_embed()
    z = q_z.mean + (torch.linalg.cholesky(root) @ points[:, None, :, None]).squeeze(-1)  # (Q, N, D)
    mean = {m: z @ w.weights[m].mT + w.biases[m] for m in NAMES}
    terms = {m: dist.Normal(mean[m], w.scales[m]).log_prob(x[m]).sum(-1) for m in NAMES}
    expected = {m: (weights[:, None] * term).sum(0) for m, term in terms.items()}
    minus_kl = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - q_z.log_prob(z)
    minus_kl = (weights[:, None] * minus_kl).sum(0)
    close(w.elbo(q, x), sum(expected.values()) + minus_kl)
    close(w.elbo(q, x, scored=["b"]), expected["b"] + minus_kl)
    close(w.elbo(q, x, scored=[]), minus_kl)
    if kind == "pair":
        close(w.expected_log_likelihood("a", *q, x["a"]), expected["a"])


def hermite_grid(num_points: int) -> tuple[Tensor, Tensor]:
    """Nodes `(Q, 2)` and weights `(Q,)` of N(0, I), by the eigenvalues of the Jacobi matrix."""
    off = torch.arange(1.0, num_points).sqrt().diag(1)
    points, vectors = torch.linalg.eigh(off + off.mT)
    weights = vectors[0].square()
    grid = torch.cartesian_prod(points, points)
    return grid, torch.cartesian_prod(weights, weights).prod(-1)


@pytest.mark.parametrize("diagonal", [False, True])
def test_samples_have_the_moments_of_the_world(diagonal: bool):
    w = world(diagonal=diagonal)
    num_rows = 100_000
    x = torch.cat([*w.sample(num_rows, seed=12).values()], -1)
    mean, cov = (t[D:] if t.dim() == 1 else t[D:, D:] for t in joint_gaussian(w, NAMES))
    variance = cov.diagonal()
    error = (x.mean(0) - mean) / (variance / num_rows).sqrt()
    assert error.abs().max() < 5
    spread = (variance.outer(variance) + cov.square()) / num_rows
    assert ((x.mT.cov() - cov) / spread.sqrt()).abs().max() < 5


@pytest.mark.parametrize("make", [world, discrete])
def test_seeds_repeat_and_differ(make):
    first, again, other = (make().sample(N, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[m], again[m]) for m in NAMES)
    assert not all(torch.equal(first[m], other[m]) for m in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modalities_carry_the_world(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    w = world(diagonal=True)
    x, z = w.sample(N, seed=13), torch.randn(N, D)
    tolerance = 100 * torch.finfo(dtype).eps
    for modality in w.modalities("exact"):
        m = modality.name
        decoder, likelihood = modality.make_decoder(D), modality.make_likelihood()
        assert not [*decoder.parameters(), *modality.make_encoder().parameters()]
        found = likelihood(decoder(z), modality.event_shape).log_prob(x[m].to(dtype))
        mean = z.double() @ w.weights[m].mT + w.biases[m]
        expected = dist.Normal(mean, w.scales[m]).log_prob(x[m]).sum(-1)
        torch.testing.assert_close(found, expected.to(dtype), rtol=tolerance, atol=tolerance)
        pairs = zip(modality.make_encoder()(x[m].to(dtype)), w.expert(m, x[m]), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b.to(dtype), rtol=tolerance, atol=tolerance)


def test_modalities_without_exact_encoders_have_default_networks():
    encoder = world().modalities()[0].make_encoder()
    assert sum(p.numel() for p in encoder.parameters()) > 0


def all_values(w: DiscreteWorld, name: str) -> Tensor:
    size = w.event_sizes[name]
    if name in w.one_hot:
        return torch.eye(size)
    return torch.tensor([*itertools.product([0.0, 1.0], repeat=size)])


def brute_force(w: DiscreteWorld, row: dict[str, Tensor]) -> Tensor:
    """p(c, x) for each class, one factor at a time."""
    joint = [p.item() for p in w.prior]
    for name, value in row.items():
        for c, d in itertools.product(range(len(joint)), range(len(value))):
            p = w.tables[name][c, d].item()
            if name in w.one_hot:
                joint[c] *= p if value[d] else 1
            else:
                joint[c] *= p if value[d] else 1 - p
    return torch.tensor(joint)


@pytest.mark.parametrize(("of", "given"), [(["a"], ["b"]), (["b", "c"], ["a"]), (NAMES, [])])
def test_discrete_world_matches_brute_force(of: list[str], given: list[str]):
    w = discrete()
    x, observed = holes(w.sample(N, seed=14))
    found, posterior = w.log_prob(x, observed, of=of, given=given), w.posterior(x, observed)
    for n in range(N):
        row = {m: x[m][n] for m in NAMES if observed[m][n]}
        known = brute_force(w, {m: v for m, v in row.items() if m in given}).sum()
        both = brute_force(w, {m: v for m, v in row.items() if m in [*of, *given]}).sum()
        some = any(m in row for m in of)
        close(found[n], (both / known).log() if some else torch.tensor(math.nan))
        joint = brute_force(w, row)
        close(posterior.probs[n], joint / joint.sum())


def test_discrete_probabilities_sum_to_one():
    w = discrete()
    values = [all_values(w, m) for m in NAMES]
    index = torch.cartesian_prod(*[torch.arange(len(v)) for v in values])
    x = {m: v[i] for m, v, i in zip(NAMES, values, index.unbind(-1), strict=True)}
    close(w.log_prob(x, of=NAMES).logsumexp(0), torch.tensor(0.0))


def test_discrete_samples_have_the_frequencies_of_the_world():
    w = discrete()
    num_rows = 100_000
    x = w.sample(num_rows, seed=15)
    for m in NAMES:
        mean = w.prior @ w.tables[m]
        error = (x[m].mean(0) - mean) / (mean * (1 - mean) / num_rows).sqrt()
        assert error.abs().max() < 5
    pairs = (x["a"].unsqueeze(-1) * x["b"].unsqueeze(-2)).mean(0)
    expected = torch.einsum("c,ci,cj->ij", w.prior, w.tables["a"], w.tables["b"])
    error = (pairs - expected) / (expected * (1 - expected) / num_rows).sqrt()
    assert error.abs().max() < 5


def test_impossible_values_have_probability_zero():
    w = DiscreteWorld(torch.ones(1), {"a": torch.tensor([[1.0, 0.0]])}, {"b": torch.ones(1, 2)})
    x = {"a": torch.eye(2), "b": torch.ones(2, 2)}
    assert w.log_prob(x, of=["a", "b"]).tolist() == [0.0, -math.inf]


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_quadrature_of_a_linear_gaussian_world(latent_dim: int):
    # Two entries: a posterior that is not much narrower than the spacing of the nodes.
    w = LinearGaussianWorld.random({"c": 2}, latent_dim, seed=16)
    x = w.sample(N, seed=17)

    def log_likelihood(z: Tensor) -> Tensor:
        mean = z.unsqueeze(1) @ w.weights["c"].mT + w.biases["c"]
        return dist.Normal(mean, w.scales["c"]).log_prob(x["c"]).sum(-1)

    exact = w.log_prob(x, of=["c"])
    errors = [
        (quadrature_log_prob(log_likelihood, latent_dim, k) - exact).abs().max().item()
        for k in (8, 16, 32, 64, 128)
    ]
    assert all(
        finer < coarser / 2 or finer < EXACT for coarser, finer in itertools.pairwise(errors)
    )
    assert errors[-1] < EXACT


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_quadrature_of_a_discrete_modality_is_a_distribution_and_converges(latent_dim: int):
    weight, values = (
        torch.randn(3, latent_dim),
        torch.tensor([*itertools.product([0.0, 1.0], repeat=3)]),
    )

    def log_likelihood(z: Tensor) -> Tensor:
        return dist.Bernoulli(logits=(z @ weight.mT).unsqueeze(1)).log_prob(values).sum(-1)

    log_prob = quadrature_log_prob(log_likelihood, latent_dim)
    close(log_prob.logsumexp(0), torch.tensor(0.0))
    close(log_prob, quadrature_log_prob(log_likelihood, latent_dim, 128), 1e3 * EXACT)
    # With symmetric logits every single bit is a fair coin.
    fair = torch.where(values[:, 0] == 1, log_prob, -torch.inf).logsumexp(0)
    close(fair, torch.tensor(0.5).log())


def parts(**changes) -> dict[str, dict[str, object]]:
    given = {
        "weights": {"a": torch.ones(3, 2)},
        "biases": {"a": torch.zeros(3)},
        "scales": {"a": 1.0},
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {}}, r"expected the same names, at least one, found \[\], \['a'\]"),
        ({"biases": {"a": torch.zeros(2)}}, r"'a': expected a weight of shape \(3, 2\) and a bias"),
        ({"scales": {"a": -1.0}}, r"'a': expected positive scales, found \[-1.0"),
    ],
)
def test_bad_linear_worlds(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        LinearGaussianWorld(**parts(**changes))


HALF = torch.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((HALF[0],), r"at least one modality and no name in both, found \[\] and \[\]"),
        ((HALF[0], {"a": HALF}, {"a": HALF}), r"no name in both, found \['a'\] and \['a'\]"),
        (
            (HALF[0] / 2, {"a": HALF}),
            r"prior: expected probabilities of shape \(2,\) that sum to 1",
        ),
        ((HALF[0], {"a": HALF * 3}), r"modality 'a': .* that sum to 1 over the last dimension"),
        ((HALF[0], None, {"b": HALF - 1}), r"modality 'b': .* between 0 and 1"),
        ((HALF[0], None, {"b": HALF[:1]}), r"modality 'b': .* shape \(2, 2\) .* of shape \(1, 2\)"),
    ],
)
def test_bad_discrete_worlds(arguments: tuple[object, ...], message: str):
    with pytest.raises(ValueError, match=message):
        DiscreteWorld(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of": ["d"]}, r"of: unknown modality 'd'; this world has a, b, c"),
        ({"given": ["d"]}, r"given: unknown modality 'd'"),
        ({"of": []}, r"found of=\[\], given=\[\]; name at least one modality in of"),
        ({"given": ["a"]}, r"expected names of which none is in both, found of=\['a'\]"),
        ({"x": {"d": torch.zeros(N, 1)}}, r"x: unknown modality 'd'"),
        ({"x": {}}, r"x: expected at least one modality, found none"),
        ({"x": {"a": torch.zeros(N, 5)}}, r"'a': expected shape \(12, 4\), found \(12, 5\)"),
        ({"observed": {"d": torch.ones(N).bool()}}, r"observed: unknown modality 'd'"),
        ({"observed": {"a": torch.ones(N)}}, r"'a': expected a bool mask .*, found torch.float32"),
        ({"observed": {"a": torch.ones(2).bool()}}, r"shape \(12,\), found .* of shape \(2,\)"),
    ],
)
def test_bad_input(changes: dict[str, object], message: str):
    arguments = {"x": {"a": torch.zeros(N, 4)}, "of": ["a"]} | changes
    with pytest.raises(ValueError, match=message):
        world().log_prob(**arguments)


def test_bad_names_and_guides():
    w = world()
    x = w.sample(N, seed=0)
    pair = (torch.zeros(N, D), torch.ones(N, D))
    with pytest.raises(ValueError, match="scored: unknown modality 'd'"):
        w.elbo(pair, x, scored=["d"])
    with pytest.raises(ValueError, match="expert: unknown modality 'd'"):
        w.expert("d", x["a"])
    with pytest.raises(ValueError, match="expected_log_likelihood: unknown modality 'd'"):
        w.expected_log_likelihood("d", *pair, x["a"])
    with pytest.raises(TypeError, match=r"q: expected a pair \(loc, scale\).* found .*Laplace"):
        w.elbo(dist.Laplace(*pair), x)


def test_experts_need_a_diagonal_world():
    with pytest.raises(ValueError, match=r"'a': expected W' diag\(scale\^-2\) W to be diagonal"):
        world().expert("a", torch.zeros(N, 4))


def test_modalities_need_a_known_encoder_and_one_scale():
    with pytest.raises(ValueError, match="encoder: expected 'exact' or None, found 'mlp'"):
        world().modalities("mlp")
    uneven = LinearGaussianWorld(**parts(scales={"a": torch.tensor([1.0, 2.0, 3.0])}))
    with pytest.raises(ValueError, match=r"'a': expected one scale for all entries, found \[1.0"):
        uneven.modalities()


@pytest.mark.parametrize(("name", "expected"), [("a", "one-hot vectors"), ("b", "zeros and ones")])
def test_values_outside_the_support(name: str, expected: str):
    x = discrete().sample(N, seed=0)
    with pytest.raises(ValueError, match=f"'{name}': expected {expected}, found"):
        discrete().log_prob(x | {name: x[name] + 0.5}, of=[name])


def test_two_hot_vectors_are_outside_the_support():
    x = one_hot(torch.arange(4), 4) + one_hot(torch.arange(4).roll(1), 4)
    with pytest.raises(ValueError, match="'a': expected one-hot vectors"):
        discrete().log_prob({"a": x}, of=["a"])


def test_quadrature_is_for_one_or_two_dimensions():
    with pytest.raises(ValueError, match="latent_dim: expected 1 or 2, found 3"):
        quadrature_log_prob(lambda z: z, 3)
