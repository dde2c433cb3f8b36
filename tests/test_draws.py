"""Draws of guides and their densities, against the distributions they come from."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from mmzoo.distributions import Mixture
from mmzoo.exact import LinearGaussianWorld
from mmzoo.inference.draws import (
    Draws,
    detach_parameters,
    draw,
    latent_values,
    log_joint,
    log_proposal,
)
from mmzoo.models import MMVAE, MVAE, MoPoE

# A few hundred operations on numbers of order ten, each rounded to float64.
ROUND_OFF = 1e-12
SIZES = {"a": 3, "b": 2, "c": 2}
N, D, K = 5, 2, 7
ERRORS = 5.0

X = dict[str, Tensor]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


def world() -> LinearGaussianWorld:
    return LinearGaussianWorld.random(SIZES, D, seed=3, diagonal=True)


def vae(cls: type):
    options = {"family": "normal", "learned_prior": False} if cls is MMVAE else {}
    return cls(world().modalities(encoder="exact"), latent_dim=D, **options)


def batch() -> tuple[X, X]:
    """Rows that have one, two and all modalities; NaN where they have none."""
    observed = {
        "a": torch.tensor([True, True, False, True, False]),
        "b": torch.tensor([True, False, True, True, True]),
        "c": torch.tensor([True, False, False, False, True]),
    }
    x = world().sample(N, seed=1)
    return {n: torch.where(observed[n].unsqueeze(-1), x[n], torch.nan) for n in x}, observed


def by_hand(x: X, observed: X, z: Tensor) -> Tensor:
    """Values log p(x_O, z) for latents (K, N, D), one modality at a time: (K, N)."""
    w = world()
    total = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    for name, mask in observed.items():
        loc = z @ w.weights[name].mT + w.biases[name]
        value = torch.where(mask.unsqueeze(-1), x[name], 0.0)
        total = total + mask * dist.Normal(loc, w.scales[name]).log_prob(value).sum(-1)
    return total


@pytest.mark.parametrize("cls", [MVAE, MMVAE, MoPoE])
def test_weights_are_those_of_the_pair_written_by_hand(cls: type):
    pair, (x, observed) = vae(cls), batch()
    draws = draw(pair.guide, x, observed, K)
    z = latent_values(draws)["z"]
    assert list(latent_values(draws)) == ["z"]
    assert z.shape == (K, N, D)
    assert len(z.flatten(0, 1).unique(dim=0)) == K * N
    log_p, trace = log_joint(pair.model, x, observed, draws, K)
    close(log_p, by_hand(x, observed, z))
    assert set(SIZES) < set(trace.nodes)
    q = pair.posterior(x, observed)
    close(log_proposal(draws, N), q.log_prob(z))
    assert (draws.mixture is None) == (not isinstance(q, Mixture))


@pytest.mark.parametrize("cls", [MVAE, MoPoE])
def test_values_may_take_the_place_of_the_draws(cls: type):
    pair, (x, observed) = vae(cls), batch()
    draws = draw(pair.guide, x, observed, K)
    z = torch.randn(K, N, D)
    log_p, _ = log_joint(pair.model, x, observed, draws, K, values={"z": z})
    close(log_p, by_hand(x, observed, z))
    found = log_proposal(draws, N, values={"z": z})
    close(found, pair.posterior(x, observed).log_prob(z))


def test_plain_draws_count_alike_in_chunks_and_at_once():
    pair, (x, observed) = vae(MVAE), batch()
    for options in ({}, {"start": 3, "total": 20}):
        draws = draw(pair.guide, x, observed, K, **options)
        assert draws.component is None and draws.mixture is None
        expected = torch.full((K, 1), -math.log(options.get("total", K)))
        close(draws.log_coef, expected)


# Mixtures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [MMVAE, MoPoE])
def test_stratified_draws_come_from_each_component_in_turn(cls: type):
    pair, (x, observed) = vae(cls), batch()
    total = 10
    draws = draw(pair.guide, x, observed, total)
    q = pair.posterior(x, observed)
    for n in range(N):
        present = q.present[n].nonzero().squeeze(-1)
        turns = [int(present[k % len(present)]) for k in range(total)]
        assert draws.component[:, n].tolist() == turns
        weight = [math.exp(q.log_weights[n, c]) / turns.count(c) for c in turns]
        close(draws.log_coef[:, n].exp(), torch.tensor(weight))
    close(draws.log_coef.exp().sum(0), torch.ones(N))


@pytest.mark.parametrize("cls", [MMVAE, MoPoE])
@pytest.mark.parametrize("sizes", [[4, 4, 2], [1] * 10, [10]])
def test_chunks_of_stratified_draws_make_up_the_whole(cls: type, sizes: list[int]):
    pair, (x, observed) = vae(cls), batch()
    whole = draw(pair.guide, x, observed, 10)
    start, chunks = 0, []
    for size in sizes:
        chunks.append(draw(pair.guide, x, observed, size, start=start, total=10))
        start += size
    assert torch.equal(torch.cat([c.component for c in chunks]), whole.component)
    close(torch.cat([c.log_coef for c in chunks]), whole.log_coef)


@pytest.mark.parametrize("cls", [MMVAE, MoPoE])
def test_stratified_draws_have_the_mean_of_the_mixture_and_less_noise(cls: type):
    pair, (x, observed) = vae(cls), batch()
    num = 7000
    q = pair.posterior(x, observed)
    draws = draw(pair.guide, x, observed, num)
    z, coef = latent_values(draws)["z"], draws.log_coef.exp().unsqueeze(-1)
    # Within components only the components' own variances count.
    count = torch.stack([(draws.component == c).sum(0) for c in range(q.log_weights.shape[-1])], -1)
    share = q.log_weights.exp().square() / count.clamp(min=1)  # (N, C)
    error = (share.unsqueeze(-1) * q.scale.square()).sum(-2).sqrt()
    found = (coef * z).sum(0)
    assert ((found - q.mean).abs() < ERRORS * error).all()
    mixed = q.present.sum(-1) > 1
    assert (error[mixed] < (q.variance[mixed] / num).sqrt()).all()


def test_draws_of_a_component_have_its_moments():
    pair, (x, observed) = vae(MMVAE), batch()
    num = 6000
    draws, q = draw(pair.guide, x, observed, num), pair.posterior(x, observed)
    z = latent_values(draws)["z"]
    for n in range(N):
        for c in q.present[n].nonzero().squeeze(-1).tolist():
            own = z[draws.component[:, n] == c, n]
            noise = (own - q.loc[n, c]) / q.scale[n, c]
            assert (noise.mean(0).abs() < ERRORS / math.sqrt(len(own))).all()
            assert ((noise.var(0) - 1).abs() < ERRORS * math.sqrt(2 / len(own))).all()


def test_a_single_draw_is_enough_for_a_single_component():
    pair, x = vae(MMVAE), world().sample(N, seed=1)
    draws = draw(pair.guide, {"a": x["a"]}, None, 1)
    assert draws.component.tolist() == [[0] * N]
    close(draws.log_coef, torch.zeros(1, N))


def test_fewer_draws_than_components_are_refused():
    pair, (x, observed) = vae(MMVAE), batch()
    message = "each of its 3 components, found num_samples=2; raise num_samples"
    with pytest.raises(ValueError, match=message):
        draw(pair.guide, x, observed, 2)
    with pytest.raises(ValueError, match=message):
        draw(pair.guide, x, observed, 1, total=2)
    assert draw(pair.guide, x, observed, 1, total=3).component.shape == (1, N)


# Gradients ------------------------------------------------------------------------------------


def learned_guide(loc: Tensor, scale: Tensor, mixture: bool):
    """A guide whose parameters are given: (N, D), or (N, 2, D) for a mixture."""

    def guide(x: X, observed: X | None = None, num_rows: int | None = None) -> None:
        q = dist.Normal(loc, scale).to_event(1)
        with pyro.plate("data", N, dim=-1):
            pyro.sample("z", Mixture(torch.zeros(loc.shape[:-1]), loc, scale) if mixture else q)

    return guide


@pytest.mark.parametrize("mixture", [False, True])
def test_stopped_densities_keep_the_path_and_drop_the_parameters(mixture: bool):
    shape = (N, 2, D) if mixture else (N, D)
    loc = torch.randn(shape, requires_grad=True)
    scale = (torch.rand(shape) + 0.5).requires_grad_()
    draws = draw(learned_guide(loc, scale, mixture), {}, None, K)
    z = latent_values(draws)["z"]
    plain, stopped = log_proposal(draws, N), log_proposal(draws, N, stopped=True)
    close(plain, stopped)

    def slopes(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value.sum(), inputs, retain_graph=True)

    held = z.detach().requires_grad_()
    (along_plain,) = slopes(log_proposal(draws, N, values={"z": held}), held)
    (along_stopped,) = slopes(log_proposal(draws, N, stopped=True, values={"z": held}), held)
    close(along_plain, along_stopped)
    fixed = log_proposal(draws, N, stopped=True, values={"z": z.detach()})
    assert not fixed.requires_grad
    # What is stopped depends on the parameters through z alone: the chain rule through the draw.
    expected = torch.autograd.grad(z, (loc, scale), grad_outputs=along_stopped, retain_graph=True)
    for mine, theirs in zip(slopes(stopped, loc, scale), expected):
        close(mine, theirs)


def test_detached_distributions_are_the_same_constants():
    loc, scale = torch.randn(N, 2, D, requires_grad=True), torch.ones(N, 2, D, requires_grad=True)
    z = torch.randn(N, D)
    mixture = Mixture(torch.zeros(N, 2), loc, scale, family=dist.Laplace)
    normal = dist.Normal(loc[:, 0], scale[:, 0]).to_event(1)
    for fn in (mixture, normal):
        stopped = detach_parameters(fn)
        assert type(stopped) is type(fn)
        close(stopped.log_prob(z), fn.log_prob(z))
        assert fn.log_prob(z).requires_grad and not stopped.log_prob(z).requires_grad
    assert detach_parameters(mixture).family is dist.Laplace


# Effects around the pair ----------------------------------------------------------------------


@pytest.mark.parametrize("cls", [MVAE, MMVAE])
def test_scales_do_not_enter_and_masks_do(cls: type):
    pair, (x, observed) = vae(cls), batch()
    draws = draw(poutine.scale(pair.guide, scale=3.0), x, observed, K)
    z = latent_values(draws)["z"]
    close(log_proposal(draws, N), pair.posterior(x, observed).log_prob(z))
    log_p, _ = log_joint(poutine.scale(pair.model, scale=3.0), x, observed, draws, K)
    close(log_p, by_hand(x, observed, z))
    mask = torch.tensor([True, False, True, True, False])
    masked, _ = log_joint(poutine.mask(pair.model, mask=mask), x, observed, draws, K)
    close(masked, torch.where(mask, log_p, 0.0))


def private_pair():
    """A pair with a second latent for each row, (N,) | (3,)."""

    def model(x: X, observed: X | None = None) -> None:
        with pyro.plate("data", N, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
            loc = z.sum(-1, keepdim=True) + w
            pyro.sample("a", dist.Normal(loc, 1.0).to_event(1), obs=x["a"])

    def guide(x: X, observed: X | None = None) -> None:
        with pyro.plate("data", N, dim=-1):
            pyro.sample("w", dist.Normal(x["a"], 1.0).to_event(1))
            pyro.sample("z", dist.Normal(torch.ones(D), 0.5).to_event(1))

    return model, guide


def test_latents_of_several_sites_are_summed():
    model, guide = private_pair()
    x = {"a": torch.randn(N, 3)}
    draws = draw(guide, x, None, K)
    found = latent_values(draws)
    z, w = found["z"], found["w"]
    assert (z.shape, w.shape) == ((K, N, D), (K, N, 3))
    log_q = dist.Normal(1.0, 0.5).log_prob(z).sum(-1) + dist.Normal(x["a"], 1.0).log_prob(w).sum(-1)
    close(log_proposal(draws, N), log_q)
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(0.0, 2.0).log_prob(w).sum(-1)
    log_p = log_p + dist.Normal(z.sum(-1, keepdim=True) + w, 1.0).log_prob(x["a"]).sum(-1)
    close(log_joint(model, x, None, draws, K)[0], log_p)


# Errors ---------------------------------------------------------------------------------------


def guide_with(*names: str, mixture: bool = False, plate: bool = True):
    def sample(name: str) -> None:
        normal = dist.Normal(torch.zeros(D), 1.0).to_event(1)
        two = Mixture(torch.zeros(2), torch.zeros(2, D), torch.ones(2, D))
        pyro.sample(name, two if mixture else normal)

    def guide(x: X, observed: X | None = None, num_rows: int | None = None) -> None:
        if not plate:
            sample(names[0])
        with pyro.plate("data", N, dim=-1):
            for name in names[0 if plate else 1 :]:
                sample(name)

    return guide


def test_guide_without_a_site_is_refused():
    x, observed = batch()
    with pytest.raises(ValueError, match="guide: expected at least one sample site, found none"):
        draw(guide_with(), x, observed, K)


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("names", [("w", "z"), ("z", "w"), ("z",)])
def test_site_outside_the_plate_over_rows_is_refused(names: tuple[str, ...], mixture: bool):
    x, observed = batch()
    message = f"guide site '{names[0]}': expected one draw for each of 5 rows, found 1; put every"
    guide = guide_with(*names[:1], *(() if mixture else names[1:]), plate=False, mixture=mixture)
    with pytest.raises(ValueError, match=message):
        draw(guide, x, observed, K)
    with pytest.raises(ValueError, match=message):
        draw(guide, {}, None, K, num_rows=N)


def test_second_mixture_is_refused():
    x, observed = batch()
    with pytest.raises(ValueError, match="guide site 'w': expected at most one mixture site"):
        draw(guide_with("z", "w", mixture=True), x, observed, K)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("w",), "model site 'z': expected a value from the guide, found none; .* it samples w"),
        (("z", "w"), "guide site 'w': expected a latent of the model, found none of that name"),
        (("z", "a"), "guide site 'a': expected a latent of the model"),  # an observed name
    ],
)
def test_guide_over_other_latents_than_the_model_is_refused(names: tuple[str, ...], message: str):
    pair, (x, observed) = vae(MVAE), batch()
    draws = draw(guide_with(*names), x, observed, K)
    with pytest.raises(ValueError, match=message):
        log_joint(pair.model, x, observed, draws, K)


def test_model_site_outside_the_plate_over_rows_is_refused():
    def model(x: X, observed: X | None = None) -> None:
        pyro.sample("shared", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))
        with pyro.plate("data", N, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))

    x, observed = batch()
    draws = draw(guide_with("z"), x, observed, K)
    message = (
        r"site 'shared': expected one log probability for each of 5 rows, found shape \(7, 1\)"
    )
    with pytest.raises(ValueError, match=message):
        log_joint(model, x, observed, draws, K)


def test_draws_of_fewer_rows_are_no_weights():
    x, observed = batch()
    draws = draw(guide_with("z"), x, observed, K)
    assert isinstance(draws, Draws)
    message = r"site 'z': expected one log probability for each of 6 rows, found shape \(7, 5\)"
    with pytest.raises(ValueError, match=message):
        log_proposal(draws, N + 1)
