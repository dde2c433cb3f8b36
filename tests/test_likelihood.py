"""Likelihood estimates against worlds whose likelihoods are known, to the error they state."""

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor, nn

from mmzoo import Modality, MultimodalVAE
from mmzoo.combine import product_of_experts
from mmzoo.data import MultimodalDataset
from mmzoo.distributions import Mixture
from mmzoo.evaluation.amortization import amortization_gap
from mmzoo.evaluation.annealed import annealed_log_likelihood
from mmzoo.evaluation.datatree import to_datatree
from mmzoo.evaluation.likelihood import (
    all_quantities,
    likelihood_curve,
    likelihood_table,
    log_likelihood,
    quantity_name,
)
from mmzoo.evaluation.pair import row_masks
from mmzoo.exact import DiscreteWorld, LinearGaussianWorld, _LinearDecoder, quadrature_log_prob
from mmzoo.inference import SubsetELBO, Wasserstein
from mmzoo.joint import JointNetworkVAE
from mmzoo.likelihoods import Categorical, Normal
from mmzoo.models import MMVAE, MODELS, MVAE, MWVAE

EXACT = 1e-10
SIZES = {"a": 3, "b": 2, "c": 2}
NAMES = list(SIZES)
N, D = 16, 2
SHARE = 0.8  # a of MHVAE's upper level
# Standard errors that an estimate may be off: beyond 5 once in two million.
ERRORS = 5.0
RELIABLE = 0.7
ESTIMATES = ("log_prob", "mcse", "ess", "pareto_k")
# The joint VAE defines no likelihood but the joint one, CVAE none without its condition, MFM none,
# and MEME takes two modalities: tests of their own have their exact worlds.
ALL = [name for name in MODELS if name not in ("jointvae", "cvae", "meme", "mfm")]
MANY = [name for name in ALL if name not in ("vae", "linear")]
# z of Nexus is above a code for each modality: the discrete worlds below have no such level.
ONE_LEVEL = [name for name in MANY if name != "nexus"]
# Their experts stand for likelihood factors, those of the others for posteriors.
FACTORS = ("mvae", "jmvae", "telbo", "jnf", "dmvae", "smvae", "mpi", "mhvae")
# Exact experts make their posteriors exact for every subset.
PRODUCTS = ("mvae", "jmvae", "telbo", "smvae", "mpi")
# Their private codes explain a part of the world's noise; test_private.py has worlds of their own.
PRIVATE = ("dmvae", "mmvaeplus", "fmwvae", "cmvae")
NOISE = 0.2  # this share of its variance
SETS = ("smvae", "mpi")  # read features of the modalities
# Products are narrower than their experts, which must be wide if the product is to cover the prior.
WIDTHS = {**dict.fromkeys(FACTORS, 3.0), **dict.fromkeys(("mvtcae", "crmvae"), 2.0)}
# The posterior is exact for every subset, whatever the experts are: no estimate has an error.
EXACT_MODELS = ("linear",)

X = dict[str, Tensor]


def pairs(names: list[str]) -> list[tuple[list[str], list[str]]]:
    """Every pair of disjoint subsets (of, given), of not empty."""
    found = []
    for roles in itertools.product(("of", "given", ""), repeat=len(names)):
        of, given = ([n for n, r in zip(names, roles) if r == role] for role in ("of", "given"))
        found += [(of, given)] if of else []
    return found


class Constant(nn.Module):
    """An encoder that gives the same location and scale whatever it sees."""

    def __init__(self, loc: float, scale: float, latent_dim: int = 1) -> None:
        super().__init__()
        self.loc, self.scale, self.latent_dim = loc, scale, latent_dim

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        loc = torch.full((len(value), self.latent_dim), self.loc)
        return loc, torch.full_like(loc, self.scale)


class WorldEncoder(nn.Module):
    """Moments of the exact p(z | x_m), or the factor that gives them when multiplied by p(z)."""

    def __init__(self, w: LinearGaussianWorld, name: str, factor: bool, width: float) -> None:
        super().__init__()
        self.world, self.name, self.factor, self.width = w, name, factor, width

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.world.posterior({self.name: value})
        loc, variance = posterior.mean, posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1)
        if self.factor:
            variance = variance / (1 - variance)
            loc = loc * (1 + variance)
        return loc, self.width * variance.sqrt()


class SplitEncoder(nn.Module):
    """Beside what the encoder says of z, the moments of p(w_m | x_m), `w_m` a part of the noise."""

    def __init__(self, w: LinearGaussianWorld, name: str, encoder: WorldEncoder) -> None:
        super().__init__()
        self.encoder, weight, variance = encoder, w.weights[name], w.scales[name] ** 2
        gain = (NOISE * variance).sqrt() * (weight @ weight.T + variance.diag()).inverse()
        self.bias, self.gain = w.biases[name], gain
        self.scale = (1 - gain.diagonal() * (NOISE * variance).sqrt()).sqrt()

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.encoder(value)
        code = (value - self.bias) @ self.gain
        # Seven entries of codes in all: as wide as z they would waste most draws.
        width = self.encoder.width**0.25 * self.scale.expand_as(code)
        return torch.cat([loc, code], -1), torch.cat([scale, width], -1)


class OnShared(nn.Module):
    """A decoder that a private code does not move."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.decoder(latent[..., :1])


class CodeEncoder(nn.Module):
    """Moments of p(z_m | x_m) for Nexus, whose codes are N(0, 2) if they are N(z, 1)."""

    def __init__(self, w: LinearGaussianWorld, name: str, width: float) -> None:
        super().__init__()
        weights = {n: math.sqrt(2) * weight for n, weight in w.weights.items()}
        world = LinearGaussianWorld(weights, w.biases, w.scales)
        self.encoder = WorldEncoder(world, name, False, width)

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.encoder(value)
        return math.sqrt(2) * loc, math.sqrt(2) * scale


class Node(nn.Module):
    """q(z | h) for Nexus, h the mean of the codes: close to what is known of z, and wider."""

    def forward(self, mean: Tensor) -> Tensor:
        return pair(0.6 * mean, torch.full_like(mean, 0.9))


class JointProduct(nn.Module):
    """In place of a joint network: the product of p(z) and of the factors it is given."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def forward(self, features: Tensor) -> Tensor:
        loc, scale = features.unflatten(-1, (-1, 2, self.latent_dim)).unbind(-2)
        loc, scale = product_of_experts(loc, scale)
        return pair(loc, scale)


class Below(nn.Module):
    """p(z_1 | z_2) = N(a z_2, 1 - a^2) for MHVAE: then z_1 is N(0, I), as in the worlds."""

    def forward(self, above: Tensor) -> Tensor:
        return pair(SHARE * above, torch.full_like(above, math.sqrt(1 - SHARE**2)))


class Above(nn.Module):
    """From N(z_1; loc, scale^2) as a factor to the factor of z_2, with z_1 integrated out."""

    def forward(self, seen: Tensor) -> Tensor:
        loc, log_scale = seen.chunk(2, -1)
        return pair(loc / SHARE, (log_scale.mul(2).exp() + 1 - SHARE**2).sqrt() / SHARE)


def pair(loc: Tensor, scale: Tensor) -> Tensor:
    """What a network must give for this location and scale, the models' floor included."""
    return torch.cat([loc, (scale - 1e-4).expm1().log()], -1)


class SetProduct(nn.Module):
    """In place of a network that reads a set: the product of p(z) and of the set's factors."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        loc, scale = tokens.unflatten(-1, (2, -1)).unbind(-2)
        scale = torch.where(mask.unsqueeze(-1), scale, 1.0)
        loc, scale = product_of_experts(loc, scale, mask)
        return torch.cat([loc, (scale - 1e-4).expm1().log()], -1)  # the model's floor


def world(**options) -> LinearGaussianWorld:
    return LinearGaussianWorld.random(SIZES, D, seed=3, **options)


def build(name: str, modalities: list[Modality], latent_dim: int, **options) -> MultimodalVAE:
    """A model with the prior N(0, I)."""
    if name == "mmvae":
        options = {"family": "normal", "learned_prior": False, **options}
    if name in PRIVATE:
        options = {"private_dim": 1, "separate_encoders": True, **options}
    if name in SETS:
        options = {"hidden": 2 * latent_dim, **({"heads": 1} if name == "smvae" else {}), **options}
    vae = MODELS[name](modalities, latent_dim=latent_dim, **options)
    if name == "cmvae":
        vae.generative.cluster_loc.data.zero_()  # clusters of their own: test_cmvae.py
    if isinstance(vae, JointNetworkVAE):
        vae.joint = JointProduct(latent_dim)
    if name in SETS:
        vae.pool = SetProduct()
        for expert in vae.experts.values():
            expert.head = nn.Identity()
    if name == "jnf":
        for flow in vae.flows.values():
            for layer in flow.layers:  # the identity, so that its experts are what they are given
                nn.init.zeros_(layer.nn.layers[-1].weight)
                nn.init.zeros_(layer.nn.layers[-1].bias)
    if name == "mhvae":
        vae.generative.top_down[0] = Below()
        for key in vae.modalities:
            vae.bottom_up[f"{key}_0"] = Above()
            nn.init.zeros_(vae.corrections[f"{key}_0"][-1].weight)
            nn.init.zeros_(vae.corrections[f"{key}_0"][-1].bias)
    if name == "nexus":
        vae.node = Node()
        for key in vae.experts:
            vae.messages[key] = vae.generative.codes[key] = nn.Identity()
    return vae


def model(name: str, w: LinearGaussianWorld, width: float = 1.0) -> MultimodalVAE:
    """A model whose generative part is the world; its experts are `width` times too wide."""
    modalities, options = [], {}
    for m in w.modalities():
        encoder: nn.Module = WorldEncoder(w, m.name, name in FACTORS, width)
        if name == "nexus":
            encoder = CodeEncoder(w, m.name, width)
        modalities.append(replace(m, encoder=encoder))
        if name in PRIVATE:
            modalities[-1] = split(w, m.name, encoder)
            options = {"private_dim": SIZES, "separate_encoders": False}
    return build(name, modalities[:1] if name == "vae" else modalities, w.latent_dim, **options)


def split(w: LinearGaussianWorld, name: str, encoder: WorldEncoder) -> Modality:
    """The same law of x_m, a part of whose noise is the code's."""
    weight, variance = w.weights[name], w.scales[name][0] ** 2
    code = (NOISE * variance).sqrt() * torch.eye(len(weight))
    return Modality(
        name,
        (len(weight),),
        Normal(scale=((1 - NOISE) * variance).sqrt().item()),
        encoder=SplitEncoder(w, name, encoder),
        decoder=_LinearDecoder(torch.cat([weight, code], -1), w.biases[name]),
    )


def oracle(name: str, w: LinearGaussianWorld) -> LinearGaussianWorld:
    """The world of that model; for Nexus x_m = W_m (z + e_m) + ..., of latents z, e_1, e_2, ..."""
    if name != "nexus":
        return w
    weights = {}
    for index, (m, weight) in enumerate(w.weights.items()):
        parts = [torch.zeros_like(weight)] * (len(w.weights) + 1)
        parts[0] = parts[index + 1] = weight
        weights[m] = torch.cat(parts, -1)
    return LinearGaussianWorld(weights, w.biases, w.scales)


def zero_variance() -> tuple[LinearGaussianWorld, MultimodalVAE]:
    """A pair whose posteriors are exact for every subset: each draw alone gives log p(x)."""
    w = world(diagonal=True)
    return w, MVAE(w.modalities(encoder="exact"), latent_dim=D)


def holes(x: X) -> tuple[X, X]:
    """Random masks, the first row complete and none empty, with NaN where a mask is False."""
    names, rows = list(x), len(next(iter(x.values())))
    mask = torch.rand(rows, len(names), generator=torch.Generator().manual_seed(1)) < 0.5
    mask[torch.arange(rows), torch.arange(rows) % len(names)] = True
    mask[0] = True
    observed = dict(zip(names, mask.unbind(-1)))
    return {n: torch.where(observed[n].unsqueeze(-1), x[n], torch.nan) for n in names}, observed


def only(vae: MultimodalVAE, values: X) -> X:
    return {name: value for name, value in values.items() if name in vae.modalities}


def assert_agrees(found: xr.Dataset, expected: Tensor, share: float = 0.7) -> None:
    """Within the stated errors where the estimate calls itself reliable, as most rows must."""
    missing = np.isnan(expected.numpy())
    np.testing.assert_array_equal(np.isnan(found.log_prob), missing)
    assert found.rows_without == missing.sum()
    kept = ~missing & (found.pareto_k.values < RELIABLE)
    assert kept.sum() >= share * (~missing).sum()
    error = (found.log_prob.values - expected.numpy())[kept]
    np.testing.assert_array_less(np.abs(error), ERRORS * found.mcse.values[kept] + EXACT)


def assert_exact(found: xr.Dataset, expected: Tensor) -> None:
    np.testing.assert_allclose(found.log_prob, expected.numpy(), rtol=0, atol=EXACT)


# Exact worlds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1.0, 1.7])
@pytest.mark.parametrize("name", ALL)
def test_every_pair_of_subsets_agrees_with_the_exact_world(name: str, width: float):
    w = world()
    vae = model(name, w, width)
    x, observed = (only(vae, part) for part in holes(w.sample(N, seed=4)))
    if name == "vae":  # where it sees nothing there is nothing to estimate
        x, observed = {"a": x["a"][observed["a"]]}, {}
    for of, given in pairs(list(vae.modalities)):
        found = log_likelihood(vae, x, observed, of=of, given=given)
        # Mean-field experts of their exact width are too narrow for the products of some rows.
        exact = oracle(name, w).log_prob(x, observed, of=of, given=given)
        assert_agrees(found, exact, 0.9 if width > 1 else 0.5)
        assert found.quantity == quantity_name(of, given)


@pytest.mark.parametrize("name", [name for name in ALL if name not in EXACT_MODELS])
def test_estimates_tighten_as_one_over_the_root_of_the_draws(name: str):
    rows, few, many = 250, 50, 2000
    w = world()
    vae = model(name, w, width=1.5)
    of, given = ["a"], [] if name == "vae" else ["b", "c"]
    # The same row again and again: its errors are independent draws from one distribution.
    x = only(vae, {n: value.expand(rows, -1) for n, value in w.sample(1, seed=5).items()})
    exact = oracle(name, w).log_prob(x, of=of, given=given).numpy()
    found = {k: log_likelihood(vae, x, of=of, given=given, num_samples=k) for k in (few, many)}
    error = {k: np.abs(each.log_prob.values - exact) for k, each in found.items()}
    square = {k: each.mcse.values**2 for k, each in found.items()}

    # Relative standard deviation of a half-normal: sqrt(pi / 2 - 1); the ratio has two means.
    bound = ERRORS * math.sqrt(2 * (math.pi / 2 - 1) / rows)
    ratio = error[few].mean() / error[many].mean() / math.sqrt(many / few)
    assert abs(math.log(ratio)) < bound

    # The delta method's next term is of relative order mcse^2, with a factor of a few.
    scaled = {k: square[k] * k for k in found}
    spread = math.hypot(*(each.std() / math.sqrt(rows) for each in scaled.values()))
    next_term = 5 * square[few].mean() * scaled[few].mean()
    assert abs(scaled[few].mean() - scaled[many].mean()) < ERRORS * spread + next_term

    z = error[many] / found[many].mcse.values
    assert abs((z**2).mean() - 1) < ERRORS * math.sqrt(2 / rows)


@pytest.mark.parametrize("num_samples", [1, 7, 100])
@pytest.mark.parametrize("name", [*PRODUCTS, *EXACT_MODELS])
def test_exact_posteriors_give_the_likelihood_with_each_draw(name: str, num_samples: int):
    w = world(diagonal=True)
    vae = model(name, w)
    x, observed = holes(w.sample(N, seed=4))
    for of, given in pairs(NAMES):
        found = log_likelihood(vae, x, observed, of=of, given=given, num_samples=num_samples)
        exact = w.log_prob(x, observed, of=of, given=given)
        assert_exact(found, exact)
        kept = ~exact.isnan().numpy()
        if num_samples > 1:  # a single draw says nothing about its error
            np.testing.assert_array_less(found.mcse.values[kept], EXACT)
        if num_samples >= 100:  # the smallest tail that can be fitted has five draws
            assert (found.pareto_k.values[kept] == -np.inf).all()
            np.testing.assert_allclose(found.ess.values[kept], num_samples, rtol=EXACT)


@pytest.mark.parametrize("name", [n for n in ALL if n not in (*PRODUCTS, *PRIVATE, "nexus")])
def test_one_exact_expert_gives_the_likelihood_with_each_draw(name: str):
    w = world(diagonal=True)
    vae = model(name, w)
    x, observed = (only(vae, part) for part in holes(w.sample(N, seed=4)))
    if name == "vae":
        x, observed = {"a": x["a"][observed["a"]]}, {}
    for m in vae.modalities:
        found = log_likelihood(vae, x, observed, of=m, num_samples=7)
        assert_exact(found, w.log_prob(x, observed, of=[m]))


def test_flows_that_bend_leave_the_likelihood_as_it_is():
    w = world()
    x, vae = w.sample(N, seed=4), model("jnf", w, width=1.7)
    straight = vae.posterior({"a": x["a"]}).log_prob(torch.zeros(N, D))
    for flow in vae.flows.values():
        for layer in flow.layers:
            nn.init.normal_(layer.nn.layers[-1].weight, std=0.1)
    bent = vae.posterior({"a": x["a"]}).log_prob(torch.zeros(N, D))
    assert ((bent - straight).abs() > 0.01).any()
    for of in (["a"], ["a", "b"]):
        assert_agrees(log_likelihood(vae, x, of=of), w.log_prob(x, of=of))


class Steps(nn.Module):
    """Decoder of a DiscreteWorld: the class is the bin of z whose prior probability is pi_c."""

    def __init__(self, w: DiscreteWorld, name: str) -> None:
        super().__init__()
        edges = dist.Normal(0.0, 1.0).icdf(w.prior.cumsum(0)[:-1])
        table = w.tables[name]
        logits = table.log() if name in w.one_hot else table.logit()
        self.register_buffer("edges", edges)
        self.register_buffer("logits", logits)

    def forward(self, z: Tensor) -> Tensor:
        return self.logits[torch.bucketize(z[..., 0].contiguous(), self.edges)]


def discrete(name: str, encoder: Constant | None = None) -> tuple[DiscreteWorld, MultimodalVAE]:
    """A world of three classes, and a model whose only latent decides the class."""
    w = DiscreteWorld.random(3, categorical={"a": 4}, bernoulli={"b": 3, "c": 2}, seed=3)
    encoder = encoder or Constant(0.1, WIDTHS.get(name, 1.2))
    modalities = [
        Modality(
            n,
            (size,),
            "one_hot_categorical" if n in w.one_hot else "bernoulli",
            encoder=encoder,
            decoder=Steps(w, n),
        )
        for n, size in w.event_sizes.items()
    ]
    return w, build(name, modalities, 1)


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_discrete_modalities_agree_with_enumeration(name: str):
    w, vae = discrete(name)
    x, observed = holes(w.sample(N, seed=6))
    for of, given in pairs(NAMES):
        found = log_likelihood(vae, x, observed, of=of, given=given)
        assert_agrees(found, w.log_prob(x, observed, of=of, given=given))


def test_discrete_modalities_of_nexus_agree_with_enumeration():
    """A code decides the class: given z each class has the probability of its bin of N(z, 1)."""
    w, vae = discrete("nexus", Constant(0.1, 1.6))
    edges = dist.Normal(0.0, 1.0).icdf(w.prior.cumsum(0)[:-1])
    x, observed = holes(w.sample(N, seed=6))

    def log_given(m: str, z: Tensor) -> Tensor:  # (Q, N)
        below = dist.Normal(z, 1.0).cdf(edges)  # (Q, C - 1)
        below = torch.cat([torch.zeros_like(z), below, torch.ones_like(z)], -1)
        value, table = torch.where(observed[m].unsqueeze(-1), x[m], 0.0), w.tables[m]
        each = value @ table.log().mT
        if m not in w.one_hot:
            each = each + (1 - value) @ (1 - table).log().mT  # (N, C)
        found = (below.diff(dim=-1).log().unsqueeze(1) + each).logsumexp(-1)
        return torch.where(observed[m], found, 0.0)

    def exact(names: list[str], points: int = 60) -> Tensor:
        return quadrature_log_prob(lambda z: sum(log_given(m, z) for m in names), 1, points)

    torch.testing.assert_close(exact(NAMES), exact(NAMES, 90), rtol=0, atol=1e-7)
    for of, given in pairs(NAMES):
        expected = exact([*of, *given]) - (exact(given) if given else 0.0)
        some = torch.stack([observed[m] for m in of]).any(0)
        # Its guide does not know how closely a code follows z: half of the draws are the prior's.
        found = log_likelihood(vae, x, observed, of=of, given=given, prior_share=0.5)
        assert_agrees(found, torch.where(some, expected, torch.nan), share=1.0)


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_table_of_discrete_modalities_obeys_the_laws_of_probability(name: str):
    _, vae = discrete(name)
    x = discrete(name)[0].sample(200, seed=6)
    quantities = [(["a", "b"], []), (["a"], []), (["b"], []), (["a"], ["b"]), (["b"], ["a"])]
    table = likelihood_table({"it": vae}, x, quantities=quantities).sel(model="it")

    def below(less: str, more: str) -> None:
        low, high = table.sel(quantity=less), table.sel(quantity=more)
        error = math.hypot(low.mcse, high.mcse)
        assert low["mean"] < high["mean"] - ERRORS * error, (less, more)

    for one, other in (("a", "b"), ("b", "a")):
        below("log p(a, b)", f"log p({one})")  # p(y | x) < 1
        below("log p(a, b)", f"log p({one} | {other})")  # p(y) < 1
        assert table.sel(quantity=f"log p({one} | {other})")["mean"] < 0


# Defensive proposals --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_draws_from_the_prior_mend_a_guide_that_is_too_narrow(name: str):
    w, vae = discrete(name, Constant(0.1, 0.1))
    x, observed = holes(w.sample(N, seed=6))
    for of, given in pairs(NAMES):
        exact = w.log_prob(x, observed, of=of, given=given)
        kept = ~exact.isnan().numpy()
        within = {}
        for share in (0.0, 0.2):
            found = log_likelihood(vae, x, observed, of=of, given=given, prior_share=share)
            error = np.abs(found.log_prob.values - exact.numpy())
            within[share] = (error < ERRORS * found.mcse.values + EXACT)[kept]
        assert within[0.2].all()  # weights have a bound now: every row must agree
        # The control: alone, the guide does not find the other classes.
        assert given or not within[0.0].all()


@pytest.mark.parametrize("name", ["mvae", "mopoe"])
def test_draws_from_the_prior_state_their_error(name: str):
    rows, share = 400, 0.4
    w = world()
    vae = model(name, w, width=0.7)
    x = {n: value.expand(rows, -1) for n, value in w.sample(1, seed=5).items()}
    found = log_likelihood(vae, x, of=["a", "b"], num_samples=500, prior_share=share)
    z = (found.log_prob.values - w.log_prob(x, of=["a", "b"]).numpy()) / found.mcse.values
    assert abs((z**2).mean() - 1) < ERRORS * math.sqrt(2 / rows)


def test_draws_from_the_prior_may_come_in_chunks():
    w = world()
    vae = model("mopoe", w)
    x, observed = holes(w.sample(N, seed=4))
    options = {"of": "a", "given": "b", "num_samples": 60, "prior_share": 0.5}
    whole = log_likelihood(vae, x, observed, chunk_size=10**6, **options)
    parts = log_likelihood(vae, x, observed, chunk_size=7 * N, **options)
    error = np.hypot(whole.mcse, parts.mcse)
    kept = ~np.isnan(whole.log_prob.values)
    np.testing.assert_array_less(np.abs(whole.log_prob - parts.log_prob)[kept], 5 * error[kept])
    assert whole.prior_share == 0.5


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_rejects_a_share_that_leaves_the_guide_nothing(share: float):
    w, vae = zero_variance()
    with pytest.raises(ValueError, match="prior_share < 1, found"):
        log_likelihood(vae, w.sample(N, seed=4), of="a", prior_share=share)


def test_draws_from_the_prior_work_beside_a_guide_of_the_users_own():
    w = world()
    vae = model("mvae", w)

    def narrow(x, observed=None, **kwargs):
        q = vae.posterior(x, observed)
        loc, scale = q.base_dist.loc, q.base_dist.scale
        with pyro.plate("data", loc.shape[-2], dim=-1):
            pyro.factor("penalty", loc.sum(-1), has_rsample=True)  # no part of its density
            pyro.sample("z", dist.Normal(loc, 0.3 * scale).to_event(1))

    x = w.sample(N, seed=4)
    sampling = {"of": NAMES, "num_samples": 4000, "guide": narrow}
    assert_agrees(log_likelihood(vae, x, prior_share=0.5, **sampling), w.log_prob(x, of=NAMES), 0.5)
    assert (log_likelihood(vae, x, **sampling).pareto_k > RELIABLE).mean() > 0.5


def smooth(encoder: nn.Module) -> list[Modality]:
    """A label and a binary vector of four entries, by affine functions of one latent."""
    rng = torch.Generator().manual_seed(7)

    def decoder(size: int) -> nn.Linear:
        layer = nn.Linear(1, size)
        for part in layer.parameters():
            part.data = 2 * torch.randn(part.shape, generator=rng)
        return layer

    return [
        Modality("label", (), Categorical(3), encoder=encoder, decoder=OnShared(decoder(3))),
        Modality("bits", (4,), "bernoulli", encoder=encoder, decoder=OnShared(decoder(4))),
    ]


def smooth_batch() -> X:
    """Every label with every vector of bits: (48,) and (48, 4)."""
    label, *bits = torch.cartesian_prod(torch.arange(3.0), *[torch.arange(2.0)] * 4).unbind(-1)
    return {"label": label.long(), "bits": torch.stack(bits, -1)}


def log_joint_of(vae: MultimodalVAE, x: X, names: list[str], z: Tensor) -> Tensor:
    """Values log p(x_names | z) of rows and latents (Q, 1), by the model's own decoders: (Q, N)."""
    p = vae.decode(z.unsqueeze(1))  # batch (Q, 1)
    return sum(p[name].log_prob(x[name]) for name in names)


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_label_and_bits_agree_with_quadrature(name: str):
    vae = build(name, smooth(Constant(0.1, WIDTHS.get(name, 1.2))), 1)
    x = smooth_batch()

    @torch.no_grad()
    def exact(names: list[str]) -> Tensor:
        coarse, fine = (
            quadrature_log_prob(lambda z: log_joint_of(vae, x, names, z), 1, num_points=points)
            for points in (150, 200)
        )
        torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-7)
        return fine

    for of, given in pairs(["label", "bits"]):
        expected = exact([*of, *given]) - (exact(given) if given else 0.0)
        assert_agrees(log_likelihood(vae, x, of=of, given=given), expected)
    # 48 rows are all values there are: their probabilities, and those of the labels, sum to one.
    joint = log_likelihood(vae, x, of=["label", "bits"])
    p = joint.log_prob.to_numpy()
    error = np.linalg.norm(np.exp(p) * joint.mcse)
    assert abs(np.exp(p).sum() - 1) < ERRORS * error


@pytest.mark.parametrize("cls", [MMVAE, MWVAE])
def test_laplace_posteriors_and_a_learned_prior_agree_with_a_grid(cls: type[MultimodalVAE]):
    vae = cls(smooth(Constant(0.1, 1.3)), latent_dim=1, family="laplace", learned_prior=True)
    vae.generative.prior_loc.data.fill_(0.4)
    x, step = smooth_batch(), 2e-3
    # Symmetric about the kink of the prior, where the rule would lose its order.
    z = 0.4 + step * torch.arange(-15_000, 15_001.0).unsqueeze(-1)  # (Q, 1)
    prior = dist.Laplace(0.4, 1.0).log_prob(z) + math.log(step)
    with torch.no_grad():
        for of, given in pairs(["label", "bits"]):
            value = {
                names: (prior + log_joint_of(vae, x, list(names), z)).logsumexp(0)
                for names in ((*of, *given), tuple(given))
                if names
            }
            expected = value[(*of, *given)] - (value[tuple(given)] if given else 0.0)
            assert_agrees(log_likelihood(vae, x, of=of, given=given), expected)


# The proposal ---------------------------------------------------------------------------------


def test_default_proposal_sees_exactly_what_is_scored():
    w, vae = zero_variance()
    x, observed = holes(w.sample(N, seed=4))
    seen: list[dict[str, int]] = []

    def guide(x: X, observed: X) -> Tensor:
        rows = len(next(iter(x.values())))
        everyone = torch.ones(rows, dtype=torch.bool)
        seen.append({n: int(observed.get(n, everyone).sum()) for n in x})
        return vae.guide(x, observed)

    log_likelihood(vae, x, observed, of=["a"], given=["c"], num_samples=10, guide=guide)
    rows = {name: int(mask.sum()) for name, mask in observed.items()}
    assert seen == [{"a": rows["a"], "c": rows["c"]}, {"c": rows["c"]}]


@pytest.mark.parametrize("name", MANY)
def test_proposal_may_be_named(name: str):
    w = world()
    vae = model(name, w, width=1.5)
    x, observed = holes(w.sample(N, seed=4))
    default = log_likelihood(vae, x, observed, of=["a"], given=["b"])
    named = log_likelihood(vae, x, observed, of=["a"], given=["b"], proposal=["b", "a"])
    xr.testing.assert_equal(default, named)
    assert (default.proposal, named.proposal) == ("a, b", "b, a")


@pytest.mark.parametrize("name", MANY)
def test_proposal_that_sees_less_is_allowed(name: str):
    w = world()
    vae = model(name, w, width=1.7)
    x, observed = holes(w.sample(N, seed=4))
    expected = oracle(name, w).log_prob(x, observed, of=["a", "b"])
    for proposal in ("a", ["b"], []):  # none of them: draws from the prior
        found = log_likelihood(
            vae, x, observed, of=["a", "b"], proposal=proposal, num_samples=20_000
        )
        assert_agrees(found, expected, share=0.9)
    assert found.proposal == ""


@pytest.mark.parametrize("name", MANY)
def test_proposal_that_sees_more_is_warned_about(name: str):
    w = world()
    vae = model(name, w, width=2.0)
    x = w.sample(N, seed=4)
    with pytest.warns(UserWarning, match="proposal sees b, c, which is not scored.*mind pareto_k"):
        found = log_likelihood(vae, x, of=["a"], proposal=NAMES, num_samples=20_000)
    assert_agrees(found, oracle(name, w).log_prob(x, of=["a"]), share=0.5)


# A guide of the user's ------------------------------------------------------------------------


def rows_of(x: X) -> int:
    return len(next(iter(x.values())))


def posterior_guide(w: LinearGaussianWorld):
    """The exact posterior, with the correlations that no posterior of the zoo has."""

    def guide(x: X, observed: X | None = None) -> Tensor:
        with pyro.plate("data", rows_of(x), dim=-1):
            return pyro.sample("z", w.posterior(x, observed))

    return guide


def mixture_guide(w: LinearGaussianWorld):
    def guide(x: X, observed: X | None = None) -> Tensor:
        loc = w.posterior(x, observed).mean
        loc = torch.stack([loc - 1.0, loc + 0.2], -2)  # (N, 2, D)
        log_weights = torch.tensor([0.3, 0.7]).log().expand(loc.shape[:-1])
        with pyro.plate("data", rows_of(x), dim=-1):
            return pyro.sample("z", Mixture(log_weights, loc, torch.full_like(loc, 1.2)))

    return guide


@pytest.mark.parametrize("name", ["mvae", "mmvae"])
def test_exact_guide_of_ones_own_gives_the_likelihood_with_each_draw(name: str):
    w = world()
    vae = build(name, w.modalities(), D)
    x, observed = holes(w.sample(N, seed=4))
    for of, given in pairs(NAMES):
        found = log_likelihood(
            vae, x, observed, of=of, given=given, guide=posterior_guide(w), num_samples=3
        )
        assert_exact(found, w.log_prob(x, observed, of=of, given=given))


def test_mixture_of_ones_own_agrees_with_the_exact_world():
    w = world()
    vae = MVAE(w.modalities(), latent_dim=D)
    x, observed = holes(w.sample(N, seed=4))
    for of, given in pairs(NAMES):
        found = log_likelihood(vae, x, observed, of=of, given=given, guide=mixture_guide(w))
        assert_agrees(found, w.log_prob(x, observed, of=of, given=given))


def shared_latent(x: X, observed: X | None = None) -> None:
    pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))


def outside_the_plate(x: X, observed: X | None = None) -> None:
    pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", rows_of(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))


def extra_latent(x: X, observed: X | None = None) -> None:
    with pyro.plate("data", rows_of(x), dim=-1):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))


def other_name(x: X, observed: X | None = None) -> None:
    with pyro.plate("data", rows_of(x), dim=-1):
        pyro.sample("code", dist.Normal(torch.zeros(D), 1.0).to_event(1))


def no_site(x: X, observed: X | None = None) -> None:
    pass


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (shared_latent, "'z': expected one draw for each of 16 rows, found 1; put every sample"),
        (outside_the_plate, "'w': expected one draw for each of 16 rows, found 1"),
        (extra_latent, "guide site 'w': expected a latent of the model, found none of that name"),
        (other_name, "model site 'z': expected a value from the guide, .* it samples code"),
        (no_site, "guide: expected at least one sample site, found none"),
    ],
)
def test_guide_without_a_weight_for_each_row_is_refused(guide, message: str, masked: bool):
    w, vae = zero_variance()
    x, observed = holes(w.sample(N, seed=4))
    if not masked:
        x, observed = w.sample(N, seed=4), None
    with pytest.raises(ValueError, match=message):
        log_likelihood(vae, x, observed, of=NAMES, num_samples=5, guide=guide)


# What must not enter --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in MANY if n != "jnf"])  # flows have no W2
def test_weights_of_training_do_not_leak(name: str):
    w = world()
    vae = model(name, w, width=1.5)
    x, observed = holes(w.sample(N, seed=4))

    def value() -> xr.Dataset:
        return log_likelihood(vae, x, observed, of=["a", "b"], given=["c"], num_samples=50)

    before = value()
    objective = SubsetELBO(
        "singles", beta=5.0, modality_weights={"a": 50.0}, alignment=Wasserstein(10.0)
    )
    plain = SubsetELBO("singles").loss(vae.model, vae.guide, x, observed)
    assert objective.loss(vae.model, vae.guide, x, observed) != plain
    xr.testing.assert_identical(before, value())
    with poutine.scale(scale=3.0):
        xr.testing.assert_identical(before, value())


def test_scale_around_a_guide_does_not_leak():
    w = world()
    vae = MVAE(w.modalities(), latent_dim=D)
    x, observed = holes(w.sample(N, seed=4))
    scaled = poutine.scale(posterior_guide(w), scale=7.0)
    found = log_likelihood(vae, x, observed, of=["a", "b"], guide=scaled, num_samples=3)
    assert_exact(found, w.log_prob(x, observed, of=["a", "b"]))


@pytest.mark.parametrize("chunk_size", [1, 5, 64, 300, 10**6])
@pytest.mark.parametrize("name", ["mvae", "mopoe"])
def test_chunks_bound_what_is_decoded_and_keep_the_value(name: str, chunk_size: int):
    w = world()
    vae = model(name, w, width=1.7)
    x, observed = holes(w.sample(4, seed=4))
    decoded = {n: [0] for n in NAMES}

    def note(n: str):
        return lambda module, args, out: decoded[n].append(len(args[0]))

    for n in NAMES:
        vae.generative.decoders[f"{n}_"].register_forward_hook(note(n))
    k = 100
    found = log_likelihood(vae, x, observed, of=NAMES, num_samples=k, chunk_size=chunk_size)
    assert_agrees(found, w.log_prob(x, observed, of=NAMES), share=0.5)
    for n in NAMES:
        assert max(decoded[n]) <= chunk_size
        assert sum(decoded[n]) == k * int(observed[n].sum())  # only rows that have it


def test_chunks_do_not_change_an_exact_value():
    w, vae = zero_variance()
    x, observed = holes(w.sample(100, seed=4))  # more rows than a block has
    for chunk_size in (3, 70, None):
        found = log_likelihood(vae, x, observed, of=NAMES, num_samples=8, chunk_size=chunk_size)
        assert_exact(found, w.log_prob(x, observed, of=NAMES))


def test_rows_do_not_depend_on_their_neighbours():
    w, vae = zero_variance()
    x, observed = holes(w.sample(100, seed=4))
    options = {"of": ["a", "b"], "given": ["c"], "num_samples": 4}
    whole = log_likelihood(vae, x, observed, **options)
    order = torch.randperm(100)
    for rows in (order, order[:7], order[:1]):
        part = log_likelihood(
            vae,
            {n: v[rows] for n, v in x.items()},
            {n: v[rows] for n, v in observed.items()},
            **options,
        )
        expected = whole.log_prob.values[rows.numpy()]
        np.testing.assert_allclose(part.log_prob, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", MANY)
def test_rows_with_noise_do_not_depend_on_their_neighbours(name: str):
    w = world()
    vae = model(name, w, width=1.7)
    x, observed = holes(w.sample(N, seed=4))
    whole = log_likelihood(vae, x, observed, of=NAMES)
    for row in range(4):
        some = slice(row, row + 1)
        alone = log_likelihood(
            vae,
            {n: v[some] for n, v in x.items()},
            {n: v[some] for n, v in observed.items()},
            of=NAMES,
        )
        error = math.hypot(alone.mcse[0], whole.mcse[row])
        assert abs(float(alone.log_prob[0] - whole.log_prob[row])) < ERRORS * error + EXACT


# Rows and errors ------------------------------------------------------------------------------


def test_rows_that_lack_what_is_scored_are_nan_and_counted():
    w, vae = zero_variance()
    x, observed = holes(w.sample(N, seed=4))
    found = log_likelihood(vae, x, observed, of=["a"], given=["b"], num_samples=10)
    without = ~observed["a"].numpy()
    assert 0 < without.sum() < N
    assert found.rows_without == without.sum()
    for kind in ("log_prob", "mcse", "ess"):
        np.testing.assert_array_equal(np.isnan(found[kind]), without)
    absent = log_likelihood(
        vae,
        {"b": x["b"], "c": w.sample(N, seed=4)["c"]},
        {"b": observed["b"]},
        of=["a"],
        num_samples=10,
    )
    assert absent.rows_without == N
    assert np.isnan(absent.log_prob).all()


def test_rows_that_lack_what_is_given_are_plain_marginals():
    w, vae = zero_variance()
    x, observed = holes(w.sample(N, seed=4))
    options = {"num_samples": 100}
    found = log_likelihood(vae, x, observed, of=["a"], given=["b"], **options)
    plain = log_likelihood(vae, x, observed, of=["a"], **options)
    rows = (observed["a"] & ~observed["b"]).numpy()
    assert rows.any()
    for kind in ESTIMATES:
        np.testing.assert_allclose(found[kind][rows], plain[kind][rows], rtol=0, atol=EXACT)
    known = (observed["a"] & observed["b"]).numpy()
    assert (np.abs(found.log_prob - plain.log_prob)[known] > EXACT).all()


def test_row_with_nothing_observed_is_refused():
    w, vae = zero_variance()
    x, observed = holes(w.sample(N, seed=4))
    for mask in observed.values():
        mask[5] = False
    with pytest.raises(ValueError, match="something observed in every row, found nothing in row 5"):
        log_likelihood(vae, x, observed, of=["a"])
    with pytest.raises(ValueError, match="something observed in every row, found nothing in row 5"):
        likelihood_table({"it": vae}, x, observed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "q"}, "log_likelihood of: unknown modality 'q'; this model has a, b, c"),
        ({"of": "a", "given": ["q"]}, "log_likelihood given: unknown modality 'q'"),
        ({"of": "a", "proposal": ["q"]}, "log_likelihood proposal: unknown modality 'q'"),
        ({"of": []}, r"disjoint sets and a non-empty 'of', found of=\[\]"),
        ({"of": ["a", "b"], "given": "b"}, "disjoint sets .* found of=.*, given="),
        ({"of": "a", "num_samples": 0}, "num_samples, a whole number >= 1, found 0"),
        ({"of": "a", "num_samples": 10.5}, "num_samples, a whole number >= 1, found 10.5"),
    ],
)
def test_questions_without_an_answer_are_refused(options: dict, message: str):
    w, vae = zero_variance()
    with pytest.raises(ValueError, match=message):
        log_likelihood(vae, w.sample(4, seed=4), **options)


@pytest.mark.parametrize("draws", [2, 5, 6])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_mixture_with_hardly_a_draw_for_each_component(draws: int, share: float):
    """Below two for each of three components it is drawn from as a whole, just as unbiased."""
    w, copies = world(), 3000
    x = {name: value.repeat(copies, 1) for name, value in w.sample(1, seed=4).items()}
    options = {"of": NAMES, "num_samples": draws, "prior_share": share}
    found = log_likelihood(model("mmvae", w, width=1.5), x, **options)
    ratio = np.exp(found.log_prob.values - w.log_prob(x, of=NAMES).numpy())
    assert abs(ratio.mean() - 1) < ERRORS * ratio.std(ddof=1) / math.sqrt(copies)
    # The squared errors, in units of p(x), are those that the estimates claim on average.
    squares = (found.mcse.values * ratio) ** 2 - (ratio - 1) ** 2
    if not share:  # whose strata may have a single draw
        assert abs(squares.mean()) < ERRORS * squares.std(ddof=1) / math.sqrt(copies)


def test_target_is_met_from_fewer_draws_than_components():
    w = world()
    x = w.sample(N, seed=4)
    options = {"num_samples": 4, "target_mcse": 0.05, "max_samples": 4 << 10}
    found = log_likelihood(model("mmvae", w, width=1.5), x, of=NAMES, **options)
    exact = w.log_prob(x, of=NAMES).numpy()
    assert (found.mcse.values <= 0.05).all()
    # An estimated error of a few draws may stop too early: these rows had hundreds.
    assert (found.num_samples.values > 100).all()
    assert (abs(found.log_prob.values - exact) < ERRORS * found.mcse.values).all()


def test_rows_have_one_dimension():
    w, vae = zero_variance()
    x = {name: value[None] for name, value in w.sample(4, seed=4).items()}
    with pytest.raises(
        ValueError, match=r"x\['a'\]: expected one dimension of rows, found \(1, 4\)"
    ):
        log_likelihood(vae, x, of="a")
    with pytest.raises(ValueError, match=r"x\['a'\]: expected one dimension of rows"):
        row_masks(vae, x)


def test_table_says_what_it_takes():
    w, vae = zero_variance()
    x = w.sample(4, seed=4)
    with pytest.raises(TypeError, match=r"expected \{title: vae\}, found .*; give every model a"):
        likelihood_table(vae, x)
    with pytest.raises(TypeError, match="expected x as a dict of tensors, found MultimodalDataset"):
        likelihood_table({"it": vae}, MultimodalDataset(x))
    with pytest.raises(TypeError, match="expected observed as a dict of tensors, found list"):
        likelihood_table({"it": vae}, x, [True])
    with pytest.raises(ValueError, match="likelihood_table: unknown modality 'imgae'"):
        likelihood_table({"it": vae}, x, quantities=[("imgae", ())])


@pytest.mark.parametrize("asked", ["a", ("a",), ("a", "b", "c")])
def test_table_wants_pairs(asked: Any):
    w, vae = zero_variance()
    with pytest.raises(ValueError, match=r"quantities: expected pairs \(of, given\), found"):
        likelihood_table({"it": vae}, w.sample(4, seed=4), quantities=[asked])


def test_terms_of_a_training_objective_are_refused():
    """A factor in a model of one's own would shift every likelihood; one in its guide cannot."""

    class Regularised(MVAE):
        def model(self, x: Any = None, observed: Any = None, **options: Any) -> Any:
            found = super().model(x, observed, **options)
            pyro.factor("penalty", torch.tensor(-3.0))
            return found

    w = world()
    vae = Regularised(w.modalities(), latent_dim=w.latent_dim)
    with pytest.raises(ValueError, match="model site 'penalty': .* found a pyro.factor, which"):
        log_likelihood(vae, w.sample(4, seed=4), of="a")
    with pytest.raises(ValueError, match="model site 'penalty'"):
        annealed_log_likelihood(vae, w.sample(4, seed=4), of="a", start="prior", num_steps=2)


@pytest.mark.parametrize("where", ["likelihood", "annealed", "gap", "export"])
def test_point_mass_has_no_likelihood(where: str):
    w = world()
    vae, x = model("mvae", w), w.sample(4, seed=4)

    def guide(x: Any, observed: Any = None, **options: Any) -> None:
        with pyro.plate("data", 4, dim=-1):
            pyro.sample("z", dist.Delta(torch.ones(4, w.latent_dim)).to_event(1))

    calls = {
        "likelihood": lambda: log_likelihood(vae, x, of="a", guide=guide),
        "annealed": lambda: annealed_log_likelihood(vae, x, of="a", guide=guide),
        "gap": lambda: amortization_gap(vae, x, guide=guide),
        "export": lambda: to_datatree(vae, x, guide=guide),
    }
    with pytest.raises(ValueError, match="guide site 'z': expected a density, found a point mass"):
        calls[where]()


# Draws until an error is small enough -----------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("name", ["mvae", "mmvae", "mhvae"])
def test_draws_grow_until_the_error_is_met(name: str, share: float):
    w, first, most, target = world(), 100, 3000, 0.05
    vae = model(name, w, width=1.5)
    x, observed = holes(w.sample(N, seed=4))
    options = {"num_samples": first, "prior_share": share}
    for of, given in ((["a"], []), (["a"], ["b", "c"])):
        exact = w.log_prob(x, observed, of=of, given=given)
        found = log_likelihood(
            vae, x, observed, of=of, given=given, target_mcse=target, max_samples=most, **options
        )
        assert_agrees(found, exact, 0.9)
        kept = ~np.isnan(found.log_prob.values)
        counts = found["num_samples"].values
        assert set(np.log2(counts[kept] / first)) <= {0, 1, 2, 3, 4}  # never above the most
        assert not counts[~kept].any()
        above = kept & (found.mcse.values > target)
        assert found.rows_above_target == above.sum()
        assert (counts[above] == 1600).all() and found.mcse.values[above].size < N
        plain = log_likelihood(vae, x, observed, of=of, given=given, **options)
        # Rows differ in what they need; those that need more are those that had a larger error.
        few = kept & (counts == first)
        assert few.sum() < kept.sum()
        if not given:
            assert (plain.mcse.values[few] <= target).all()
        assert "num_samples" not in plain


def test_target_that_is_met_at_once_changes_nothing():
    w = world()
    vae = model("mmvae", w, width=1.5)
    x, observed = holes(w.sample(N, seed=4))
    options = {"of": ["a"], "given": ["b"], "num_samples": 100}
    plain = log_likelihood(vae, x, observed, **options)
    met = log_likelihood(vae, x, observed, **options, target_mcse=100.0)
    for kind in ESTIMATES:
        np.testing.assert_array_equal(plain[kind], met[kind])
    bounded = log_likelihood(vae, x, observed, **options, target_mcse=1e-9, max_samples=199)
    for kind in ESTIMATES:  # no room for twice as many
        np.testing.assert_array_equal(plain[kind], bounded[kind])
    assert bounded.rows_above_target == bounded.log_prob.notnull().sum()


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("name", ["mvae", "mmvae"])
def test_pooled_draws_are_worth_as_many_at_once(name: str, share: float):
    # The same row again and again: pooled estimates and those of one run have one distribution.
    rows, first, most = 300, 40, 640  # of both, a quarter comes from the prior
    w = world()
    vae = model(name, w, width=1.5)
    x = {n: value.expand(rows, -1) for n, value in w.sample(1, seed=5).items()}
    options = {"of": ["a", "b"], "prior_share": share}
    grown = log_likelihood(vae, x, num_samples=first, target_mcse=1e-9, max_samples=most, **options)
    whole = log_likelihood(vae, x, num_samples=most, **options)
    assert (grown["num_samples"] == most).all() and grown.rows_above_target == rows
    exact = w.log_prob(x, of=["a", "b"]).numpy()
    z = (grown.log_prob.values - exact) / grown.mcse.values
    assert abs((z**2).mean() - 1) < ERRORS * math.sqrt(2 / rows)
    for kind in ("log_prob", "mcse", "ess", "pareto_k"):
        means = [each[kind].values.mean() for each in (grown, whole)]
        errors = [each[kind].values.std() / math.sqrt(rows) for each in (grown, whole)]
        assert abs(means[0] - means[1]) < ERRORS * math.hypot(*errors), kind


def test_bias_of_stopping_is_a_fraction_of_the_target():
    # Rows whose error lies right at the target: the estimate decides who stops.
    rows = 4000
    w = world()
    vae = model("mvae", w, width=1.5)
    x = {n: value.expand(rows, -1) for n, value in w.sample(1, seed=5).items()}
    exact = w.log_prob(x, of=NAMES).numpy()
    options = {"of": NAMES, "num_samples": 50}
    spread = float(np.median(log_likelihood(vae, x, **options).mcse))
    for target in (spread, 0.9 * spread):
        found = log_likelihood(vae, x, **options, target_mcse=target)
        stopped = (found["num_samples"] == 50).mean()
        assert 0.1 < stopped < 0.9
        ratio = np.exp(found.log_prob.values - exact)  # unbiased with any fixed number
        error = ratio.std() / math.sqrt(rows)
        assert ERRORS * error < 0.5 * target
        assert abs(ratio.mean() - 1) < 0.2 * target + ERRORS * error
        # Of those that stop at once alone it is far beyond what is stated here.
        kept = ratio[found["num_samples"].values == 50]
        assert kept.mean() - 1 > 0.2 * target + ERRORS * error


def test_table_draws_until_the_error_is_met():
    w = world()
    x, observed = holes(w.sample(N, seed=4))
    models = {name: model(name, w, width=1.5) for name in ("mvae", "mmvae")}
    options = {"num_samples": 100, "target_mcse": 0.08, "max_samples": 800}
    table = likelihood_table(models, x, observed, **options)
    assert table.attrs["target_mcse"] == 0.08 and table.attrs["max_samples"] == 800
    above = (table.row_mcse > 0.08).sum("row")
    xr.testing.assert_equal(table.rows_above_target, above)
    counts = table.row_num_samples.where(table.log_prob.notnull())
    assert set(np.unique(counts.values[~np.isnan(counts.values)])) <= {100, 200, 400, 800}
    assert (counts > 100).any() and (counts == 100).any()
    before = likelihood_table(models, x, observed, num_samples=100)
    assert (table.row_mcse.max() < before.row_mcse.max()) and "row_num_samples" not in before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_mcse": 0.0}, "expected target_mcse > 0, found 0.0; it is a standard error"),
        ({"target_mcse": math.nan}, "expected target_mcse > 0, found nan"),
        ({"max_samples": 500}, "expected target_mcse with max_samples=500, found none; set"),
        (
            {"target_mcse": 0.1, "max_samples": 5},
            "expected max_samples of at least num_samples=10, found 5; rows start",
        ),
    ],
)
def test_bad_targets_are_refused(options: dict, message: str):
    w, vae = zero_variance()
    with pytest.raises(ValueError, match=message):
        log_likelihood(vae, w.sample(4, seed=4), of="a", num_samples=10, **options)
    with pytest.raises(ValueError, match=message):
        likelihood_table({"it": vae}, w.sample(4, seed=4), num_samples=10, **options)


# Curves over the number of draws ----------------------------------------------------------------


def test_curve_is_made_of_runs_of_their_own():
    w = world()
    vae = model("mmvae", w, width=1.5)
    x, observed = holes(w.sample(N, seed=4))
    told: list[tuple[int, int]] = []
    options = {"of": ["a"], "given": ["b"], "prior_share": 0.25}
    curve = likelihood_curve(
        vae,
        x,
        observed,
        **options,
        num_samples=(10, 100, 1000),
        seed=3,
        on_chunk=lambda *each: told.append(each),
    )
    assert curve.sizes == {"num_samples": 3, "row": N} and curve.attrs["seed"] == 3
    for i, number in enumerate((10, 100, 1000)):
        alone = log_likelihood(vae, x, observed, **options, num_samples=number, seed=3 + 2 * i)
        for kind in ESTIMATES:
            np.testing.assert_array_equal(curve[kind].sel(num_samples=number), alone[kind])
    assert told == sorted(told) and told[-1][0] == told[-1][1]
    exact = w.log_prob(x, observed, of=["a"], given=["b"]).numpy()
    z = (curve.log_prob.sel(num_samples=1000) - exact) / curve.mcse.sel(num_samples=1000)
    assert abs(z).max() < ERRORS
    error = np.sqrt((curve.mcse**2).mean("row"))
    assert (error.diff("num_samples") < 0).all()


@pytest.mark.parametrize("numbers", [(), (10, 10), (100, 10)])
def test_curve_needs_numbers_that_grow(numbers: tuple[int, ...]):
    w, vae = zero_variance()
    with pytest.raises(ValueError, match="likelihood_curve: expected num_samples that grow, such"):
        likelihood_curve(vae, w.sample(4, seed=4), of="a", num_samples=numbers)


# Many worlds ------------------------------------------------------------------------------------

WORLDS, WORLD_ROWS, WORLD_DRAWS = 200, 6, 200
# Model, width of its experts, and how it is asked.
ESTIMATORS = {
    "plain": ("mvae", 1.4, {}),
    "stratified mixture": ("mmvae", 1.4, {}),
    "defensive": ("mvae", 0.85, {"prior_share": 0.3}),
    "until an error is met": ("mvae", 1.4, {"target_mcse": 0.06, "max_samples": 1600}),
    "defensive mixture until an error is met": (
        "mmvae",
        1.2,
        {"prior_share": 0.2, "target_mcse": 0.08, "max_samples": 1600},
    ),
}


def errors_of_worlds(name: str, width: float, options: dict) -> np.ndarray:
    """Errors in their own standard errors over worlds, dimensions, subsets and patterns."""
    rng, found = random.Random(7), []
    for seed in range(WORLDS):
        sizes = {n: rng.randint(1, 4) for n in NAMES[: rng.choice((2, 3))]}
        w = LinearGaussianWorld.random(sizes, rng.randint(1, 3), seed=seed)
        vae = model(name, w, width)
        x, observed = holes(w.sample(WORLD_ROWS, seed=seed))
        of, given = rng.choice(pairs(list(sizes)))
        each = log_likelihood(
            vae, x, observed, of=of, given=given, num_samples=WORLD_DRAWS, seed=seed, **options
        )
        exact = w.log_prob(x, observed, of=of, given=given).numpy()
        kept = ~np.isnan(exact) & (each.pareto_k.values < RELIABLE)
        found.append((each.log_prob.values - exact)[kept] / each.mcse.values[kept])
    return np.concatenate(found)


def assert_calibrated(z: np.ndarray) -> None:
    """Standard normal errors: none beyond five, and mean, spread and shares as they must be."""
    assert np.abs(z).max() < ERRORS
    # The logarithm falls short by half its variance, a twentieth of an error here; and errors that
    # are themselves estimated, from 200 skewed weights, are a little off.
    assert abs(z.mean()) < ERRORS / math.sqrt(len(z)) + 0.05
    assert abs((z**2).mean() - 1) < ERRORS * math.sqrt(2 / len(z)) + 0.08
    for bound, share in ((1.0, 0.6827), (2.0, 0.9545)):
        margin = ERRORS * math.sqrt(share * (1 - share) / len(z)) + 0.02
        assert abs((np.abs(z) < bound).mean() - share) < margin


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_errors_over_many_worlds_are_what_they_say(kind: str):
    z = errors_of_worlds(*ESTIMATORS[kind])
    assert len(z) > 0.6 * WORLDS * WORLD_ROWS
    assert_calibrated(z)
    for broken in (1.3 * z, 0.7 * z, z + 0.3, np.append(z, 6.0)):
        with pytest.raises(AssertionError):
            assert_calibrated(broken)


# Seeds and side effects -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mvae", "mmvae"])
def test_seed_decides_the_draws_and_disturbs_nobody(name: str):
    w = world()
    vae = model(name, w, width=1.5)
    x, observed = holes(w.sample(N, seed=4))
    options = {"of": ["a"], "given": ["b"], "num_samples": 20}
    state = torch.get_rng_state(), pyro.util.get_rng_state()["numpy"][1].copy(), random.getstate()
    first = log_likelihood(vae, x, observed, **options, seed=3)
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1] == pyro.util.get_rng_state()["numpy"][1]).all()
    assert state[2] == random.getstate()
    torch.rand(5)
    xr.testing.assert_identical(first, log_likelihood(vae, x, observed, **options, seed=3))
    other = log_likelihood(vae, x, observed, **options, seed=5)
    kept = ~np.isnan(first.log_prob)
    assert (first.log_prob != other.log_prob)[kept].all()


@pytest.mark.parametrize("name", MANY)
def test_conditional_is_as_good_as_the_worse_of_its_parts(name: str):
    w = world()
    vae = model(name, w, width=1.5)
    x = w.sample(N, seed=4)
    options = {"num_samples": 200}
    found = log_likelihood(vae, x, of=["a", "c"], given=["b"], **options)
    joint = log_likelihood(vae, x, of=NAMES, **options)
    known = log_likelihood(vae, x, of=["b"], **options, seed=1)
    parts = {
        "log_prob": joint.log_prob - known.log_prob,
        "mcse": np.hypot(joint.mcse, known.mcse),
        "ess": np.minimum(joint.ess, known.ess),
        "pareto_k": np.maximum(joint.pareto_k, known.pareto_k),
    }
    # Both parts are the worse one somewhere, but for a pool, which one expert always fits better.
    assert (joint.ess < known.ess).any()
    # Three codes are always harder to draw than one; widened posteriors of a single modality have
    # bounded weights where they were exact.
    if name not in (*PRIVATE, "hoelder", "mhvae", "nexus"):
        assert (joint.pareto_k < known.pareto_k).any()
    for kind, expected in parts.items():
        np.testing.assert_allclose(found[kind], expected, rtol=EXACT, atol=EXACT, err_msg=kind)


def test_joint_and_marginal_of_a_conditional_have_draws_of_their_own():
    # Were draws shared, the stated error would be that of independent ones by mistake.
    rows = 400
    w = world()
    vae = model("mvae", w, width=1.7)
    x = {n: value.expand(rows, -1) for n, value in w.sample(1, seed=5).items()}
    options = {"num_samples": 100}
    joint = log_likelihood(vae, x, of=["a", "b"], **options).log_prob.values
    conditional = log_likelihood(vae, x, of=["a"], given=["b"], **options)
    marginal = joint - conditional.log_prob.values  # the joint's seed is the same
    correlation = np.corrcoef(joint, marginal)[0, 1]
    assert abs(correlation) < ERRORS / math.sqrt(rows)
    assert abs(math.log((conditional.mcse**2).mean() / np.var(conditional.log_prob))) < (
        ERRORS * math.sqrt(2 / rows)
    )


def test_evaluation_leaves_the_model_as_it_was():
    w = world()
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    modalities = w.modalities()
    modalities[0] = Modality(
        "a", (3,), modalities[0].likelihood, encoder=layers, decoder=modalities[0].decoder
    )
    vae = MVAE(modalities, latent_dim=D)
    vae.train()
    frozen = vae.experts["a_"].encoder[1].eval()
    modes = [module.training for module in vae.modules()]
    weights = {key: value.clone() for key, value in vae.state_dict().items()}
    x = w.sample(N, seed=4)
    first = log_likelihood(vae, x, of=["a"], num_samples=20)
    assert [module.training for module in vae.modules()] == modes
    assert not frozen.training and vae.training
    for key, value in vae.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert not list(pyro.get_param_store())
    assert all(p.grad is None for p in vae.parameters())
    # Dropout is off: what was in training mode gives what a model in evaluation mode gives.
    xr.testing.assert_identical(first, log_likelihood(vae.eval(), x, of=["a"], num_samples=20))


def test_model_is_restored_after_an_error():
    w, vae = zero_variance()
    vae.train()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="expected at least one sample site"):
        log_likelihood(vae, w.sample(4, seed=4), of=["a"], guide=no_site)
    assert vae.training
    assert torch.equal(state, torch.get_rng_state())


def test_progress_is_told():
    w, vae = zero_variance()
    x, told = w.sample(100, seed=4), []
    log_likelihood(vae, x, of="a", num_samples=2, on_chunk=lambda *each: told.append(each))
    assert told == sorted(told) and told[-1] == (100, 100)
    told.clear()
    likelihood_table({"M": vae}, x, num_samples=2, on_chunk=lambda *each: told.append(each))
    assert ("M log p(a, b, c)", 100, 100) in told
    assert {title for title, *_ in told} <= {
        f"M {quantity_name(of, given)}" for of, given in pairs(NAMES)
    }


# Quantities that a model does not define --------------------------------------------------------


class WithoutLabels(MVAE):
    """A model that has no p(b), as those that are given b always."""

    def unsupported(self, of, given=()):
        return None if "b" in given else "it is always given b"


def test_quantity_that_is_not_defined_is_refused():
    w, _ = zero_variance()
    vae = WithoutLabels(w.modalities(encoder="exact"), latent_dim=D)
    x = w.sample(N, seed=4)
    with pytest.raises(ValueError, match=r"log p\(b\) is not defined; it is always given b"):
        log_likelihood(vae, x, of="b")
    assert log_likelihood(vae, x, of="a", given="b", num_samples=10).log_prob.notnull().all()


def test_quantity_that_is_not_defined_is_an_empty_cell_with_the_reason():
    w, _ = zero_variance()
    vae = WithoutLabels(w.modalities(encoder="exact"), latent_dim=D)
    quantities = [("a", ()), ("a", "b")]
    found = likelihood_table({"it": vae}, w.sample(N, seed=4), quantities=quantities)
    assert np.isnan(found["mean"].values).tolist() == [[True, False]]
    assert found["note"].values.tolist() == [["it is always given b", ""]]


# The table ------------------------------------------------------------------------------------


def test_table_of_an_exact_model_is_the_mean_over_rows():
    w, vae = zero_variance()
    x, observed = holes(w.sample(N, seed=4))
    table = likelihood_table({"MVAE": vae}, x, observed, num_samples=100).sel(model="MVAE")
    expected = [(NAMES, [])] + [([n], []) for n in NAMES]
    expected += [([n], [m for m in NAMES if m != n]) for n in NAMES]
    assert table["quantity"].values.tolist() == [quantity_name(*each) for each in expected]
    for of, given in expected:
        rows = w.log_prob(x, observed, of=of, given=given)
        rows = rows[~rows.isnan()]
        found = table.sel(quantity=quantity_name(of, given))
        assert found.num_rows == len(rows)
        np.testing.assert_allclose(found["mean"], rows.mean(), rtol=0, atol=EXACT)
        error = rows.std() / math.sqrt(len(rows))
        np.testing.assert_allclose(found.standard_error, error, rtol=0, atol=EXACT)
        assert found.mcse < EXACT and found.pareto_k == 0 and found.note == ""


@pytest.mark.parametrize("name", MANY)
def test_table_sums_up_what_log_likelihood_says(name: str):
    w = world()
    vae = model(name, w, width=1.5)
    x, observed = holes(w.sample(N, seed=4))
    # The first marginal that the table needs has its seed, the others have seeds of their own.
    quantities = [("a", "b"), (["a", "b"], ()), ("c", ["a", "b"])]
    table = likelihood_table({"it": vae}, x, observed, quantities=quantities).sel(model="it")
    for of, given in quantities:
        found = table.sel(quantity=quantity_name([*of], [*given]))
        rows = log_likelihood(vae, x, observed, of=of, given=given).dropna(
            "row", subset=["log_prob"]
        )
        count = rows.sizes["row"]
        mcse = np.sqrt((rows.mcse**2).sum()) / count
        assert found.num_rows == count
        assert abs(found["mean"] - rows.log_prob.mean()) < ERRORS * math.hypot(mcse, found.mcse)
    rows = log_likelihood(vae, x, observed, of=["a", "b"]).dropna("row", subset=["log_prob"])
    found, count = table.sel(quantity="log p(a, b)"), rows.sizes["row"]
    np.testing.assert_allclose(found["mean"], rows.log_prob.mean(), rtol=EXACT)
    error = rows.log_prob.std(ddof=1) / math.sqrt(count)
    np.testing.assert_allclose(found.standard_error, error, rtol=EXACT)
    np.testing.assert_allclose(found.mcse, np.sqrt((rows.mcse**2).sum()) / count, rtol=EXACT)
    np.testing.assert_allclose(found.pareto_k, (rows.pareto_k > RELIABLE).mean(), rtol=EXACT)
    kept = found.dropna("row", subset=["log_prob"])
    for kind in ("log_prob", "mcse", "pareto_k"):  # the values of the rows, to the bit
        own = kind if kind == "log_prob" else f"row_{kind}"
        np.testing.assert_array_equal(kept[own], rows[kind])
    np.testing.assert_array_equal(kept["row"], rows["row"])


@pytest.mark.parametrize("name", ["mvae", "jmvae"])
def test_marginals_of_the_table_have_draws_of_their_own(name: str):
    rows = 400
    w = world()
    x = {n: value.expand(rows, -1) for n, value in w.sample(1, seed=5).items()}
    quantities = [(["a"], ["b", "c"])]
    table = likelihood_table({"it": model(name, w, width=1.5)}, x, quantities=quantities)
    # All rows being the same, they differ by the Monte Carlo error and by nothing else.
    ratio = float((table.standard_error / table.mcse).squeeze())
    assert abs(2 * math.log(ratio)) < ERRORS * math.sqrt(2 / rows)


@pytest.mark.parametrize("name", MANY)
def test_chain_rule_holds_in_the_table(name: str):
    w = world()
    vae = model(name, w, width=1.5)
    quantities = [([*of], [*given]) for of, given in pairs(NAMES)]
    table = likelihood_table(
        {"it": vae}, w.sample(N, seed=4), quantities=quantities, num_samples=20
    )
    mean = table["mean"].sel(model="it")
    for of, given in quantities:
        if given:
            both = quantity_name([n for n in NAMES if n in (*of, *given)])
            parts = mean.sel(quantity=quantity_name(of, given)) + mean.sel(
                quantity=quantity_name(given)
            )
            np.testing.assert_allclose(parts, mean.sel(quantity=both), rtol=0, atol=EXACT)


def test_models_that_lack_a_modality_have_a_note():
    w, vae = zero_variance()
    x, observed = holes(w.sample(N, seed=4))
    alone = model("vae", world(diagonal=True))
    for models in ({"VAE": alone, "MVAE": vae}, {"MVAE": vae, "VAE": alone}):
        table = likelihood_table(models, x, observed, num_samples=100)
        assert table.sizes == {"model": 2, "quantity": 7, "row": N}
        # The two have the same decoder; rows without a are left out of both.
        own = table.sel(quantity="log p(a)")
        np.testing.assert_allclose(*own["mean"].values, rtol=0, atol=EXACT)
        assert (own.num_rows == int(observed["a"].sum())).all() and (own.note == "").all()
        rest = table.drop_sel(quantity="log p(a)").sel(model="VAE")
        kinds = ("mean", "standard_error", "mcse", "pareto_k", "num_rows", "log_prob", "row_mcse")
        for kind in kinds:
            assert np.isnan(rest[kind]).all(), kind
        assert rest.note.sel(quantity="log p(b | a, c)") == "VAE has no modality b, c"
        assert not np.isnan(table["mean"].sel(model="MVAE")).any()


def test_table_of_rows_that_nobody_has_is_empty():
    w, vae = zero_variance()
    x = w.sample(N, seed=4)
    table = likelihood_table({"it": vae}, {"a": x["a"], "c": x["c"]}, num_samples=10)
    found = table.sel(model="it", quantity="log p(b)")
    assert found.num_rows == 0
    assert np.isnan(found["mean"]) and np.isnan(found.standard_error)
    single = likelihood_table({"it": vae}, {n: v[:1] for n, v in x.items()}, num_samples=10)
    assert np.isnan(single.standard_error).all() and (single.num_rows == 1).all()


def test_table_refuses_what_no_model_knows():
    w, vae = zero_variance()
    x = w.sample(4, seed=4)
    with pytest.raises(
        ValueError, match="likelihood_table x: unknown modality 'q'; this model has"
    ):
        likelihood_table({"it": vae}, {**x, "q": x["a"]})
    masks = {"q": torch.ones(4, dtype=torch.bool)}
    with pytest.raises(ValueError, match="likelihood_table observed: unknown modality 'q'"):
        likelihood_table({"it": vae}, x, masks)
    with pytest.raises(ValueError, match="expected at least one model, found none; pass"):
        likelihood_table({}, x)


def test_quantity_names_are_written_as_in_the_papers():
    assert quantity_name(["image", "label"]) == "log p(image, label)"
    assert quantity_name(["image"], ["label", "text"]) == "log p(image | label, text)"


def test_all_quantities_are_all_subsets_and_all_pairs():
    assert all_quantities(["a"]) == [(("a",), ())]
    for names in (["a", "b"], NAMES, ["c", "a", "d", "b"]):
        found = all_quantities(names)
        expected = {(tuple(of), tuple(given)) for of, given in pairs(names)}
        assert set(found) == expected and len(found) == len(expected)
        assert len(found) == 3 ** len(names) - 2 ** len(names)
        joint = all_quantities(names, conditionals=False)
        assert joint == [each for each in found if not each[1]]
    w, vae = zero_variance()
    x = w.sample(4, seed=4)
    table = likelihood_table({"it": vae}, x, quantities=all_quantities(NAMES), num_samples=10)
    for of, given in all_quantities(NAMES):
        rows = table.log_prob.sel(model="it", quantity=quantity_name(of, given))
        exact = w.log_prob(x, of=of, given=given).numpy()
        np.testing.assert_allclose(rows, exact, rtol=0, atol=EXACT)


def test_all_quantities_have_a_limit():
    names = [f"m{i}" for i in range(8)]
    with pytest.raises(ValueError, match="at most 1000 quantities, found 6305 of 8 modalities"):
        all_quantities(names)
    assert len(all_quantities(names, conditionals=False)) == 255
    for wrong in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="expected names of modalities, each once, found"):
            all_quantities(wrong)


def test_probabilities_above_one_are_marked() -> None:
    """A guide that misses the mass of p(a) leaves log p(a) too low, and log p(b | a) above zero."""
    torch.manual_seed(0)
    modalities = [Modality("a", (4,)), Modality("b", (2,), "one_hot_categorical")]
    vae = MVAE(modalities, latent_dim=8)
    with torch.no_grad():
        for weight in vae.generative.parameters():
            weight.mul_(6.0)  # a sharp model, whose untrained guide is no good
    x = {"a": 3 * torch.randn(200, 4), "b": torch.eye(2)[torch.arange(200) % 2]}
    table = likelihood_table({"MVAE": vae}, x, num_samples=3, seed=1)
    found = table.sel(model="MVAE")
    above = found["mean"] > 0
    discrete = np.array([name.startswith("log p(b") for name in table["quantity"].values])
    np.testing.assert_array_equal(found["impossible"].values, above.values & discrete)
    assert not found["impossible"].sel(quantity="log p(b)")
