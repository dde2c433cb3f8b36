"""A pair of a user's own goes where a model of the zoo goes, with the same numbers."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from own import Programs, own_pair, widened
from torch import Tensor

from mmzoo import Modality
from mmzoo.evaluation.likelihood import likelihood_table, log_likelihood
from mmzoo.evaluation.pair import PyroPair, draw_latents, quiet, row_masks
from mmzoo.exact import LinearGaussianWorld
from mmzoo.likelihoods import Categorical
from mmzoo.models import MVAE

SIZES = {"a": 3, "b": 2}


@pytest.fixture
def world() -> LinearGaussianWorld:
    return LinearGaussianWorld.random(SIZES, latent_dim=2, seed=3)


def rows(world: LinearGaussianWorld) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    x = world.sample(6, seed=1)
    observed = {
        "a": torch.tensor([True, True, True, False, False, True]),
        "b": torch.tensor([True, False, True, True, True, True]),
    }
    x["a"][~observed["a"]] = torch.nan
    return x, observed


QUANTITIES = [(["a"], []), (["b"], []), (["a", "b"], []), (["a"], ["b"]), (["b"], ["a"])]


@pytest.mark.parametrize(("of", "given"), QUANTITIES)
def test_exact_posterior_gives_the_exact_likelihood(
    world: LinearGaussianWorld, of: list[str], given: list[str]
) -> None:
    """With the posterior as its guide, a single draw has no error, whatever a row lacks."""
    x, observed = rows(world)
    found = log_likelihood(own_pair(world), x, observed, of=of, given=given, num_samples=2)
    exact = world.log_prob(x, observed, of=of, given=given)
    torch.testing.assert_close(torch.as_tensor(found.log_prob.values), exact, equal_nan=True)


@pytest.mark.parametrize("prior_share", [0.0, 0.25])
def test_wide_guide_is_right_within_its_error(
    world: LinearGaussianWorld, prior_share: float
) -> None:
    x, observed = rows(world)
    pair = own_pair(world, widened(1.3))
    found = log_likelihood(
        pair, x, observed, of=["a", "b"], num_samples=4000, prior_share=prior_share
    )
    exact = world.log_prob(x, observed, of=["a", "b"]).numpy()
    assert (abs(found.log_prob.values - exact) < 5 * found.mcse.values).all()
    assert (found.mcse.values > 0).all()


def test_table_takes_models_and_pairs(world: LinearGaussianWorld) -> None:
    x = world.sample(5, seed=2)
    models = {"own": own_pair(world), "MVAE": MVAE(world.modalities(), latent_dim=2)}
    table = likelihood_table(models, x, num_samples=20)
    exact = world.log_prob(x, of=["a", "b"]).mean()
    found = table["mean"].sel(model="own", quantity="log p(a, b)")
    torch.testing.assert_close(torch.as_tensor(float(found)), exact)
    assert not table["mean"].isnull().any()


def test_latents_are_those_of_the_posterior_row_by_row(world: LinearGaussianWorld) -> None:
    x, observed = rows(world)
    num = 4000
    z = draw_latents(own_pair(world), x, observed, given=["a"], num_draws=num)["z"]
    only_a = {"a": observed["a"], "b": torch.zeros(6, dtype=torch.bool)}
    exact = world.posterior(x, only_a)  # the prior where a row has no a
    error = exact.variance.sqrt() / num**0.5
    assert ((z.mean(0) - exact.mean).abs() < 5 * error).all()
    ratio = z.var(0) / exact.variance
    assert ((ratio - 1).abs() < 5 * (2 / num) ** 0.5).all()


def test_generates_what_the_world_generates(world: LinearGaussianWorld) -> None:
    x, observed = rows(world)
    pair, num = own_pair(world), 4000
    with quiet(pair, seed=0):
        drawn = pair.generate(x, {"a": observed["a"], "b": ~observed["b"]}, num_samples=num)
        again = pair.generate({}, num_rows=3)
        mean = pair.generate({"a": x["a"][:2]}, num_samples=num, mean=True)
    assert {name: v.shape for name, v in drawn.items()} == {"a": (num, 6, 3), "b": (num, 6, 2)}
    assert {name: v.shape for name, v in again.items()} == {"a": (3, 3), "b": (3, 2)}
    exact = world.posterior({"a": x["a"][:2]}).mean @ world.weights["b"].mT + world.biases["b"]
    spread = mean["b"].std(0) / num**0.5
    assert ((mean["b"].mean(0) - exact).abs() < 5 * spread).all()


def test_guide_for_some_subsets_says_so(world: LinearGaussianWorld) -> None:
    pair = own_pair(world, subsets=[["a", "b"], ["a"]], title="joint only")
    x = world.sample(4, seed=0)
    table = likelihood_table({"own": pair}, x, num_samples=5)
    answered = table["mean"].sel(model="own").notnull()
    assert {str(q) for q in table.quantity.values[answered]} == {
        "log p(a, b)",
        "log p(a)",
        "log p(b | a)",
    }
    reason = str(table["note"].sel(model="own", quantity="log p(b)").values)
    assert reason == "the guide of joint only does not answer for b alone"
    with pytest.raises(ValueError, match="does not answer for b alone"):
        log_likelihood(pair, x, of="b")


def test_draws_repeat_and_leave_nothing_behind(world: LinearGaussianWorld) -> None:
    x, observed = rows(world)
    network = torch.nn.Linear(2, 2).double()
    programs = Programs(world)

    def model(x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        pyro.module("decoder", network)
        pyro.param("offset", torch.zeros(()))
        programs.model(x, observed)

    modalities = programs.modalities()
    pyro.param("offset", torch.ones(()))
    pair = PyroPair(model, programs.guide, modalities, networks=network)
    before = torch.get_rng_state()
    first = draw_latents(pair, x, observed, num_draws=3, seed=4)["z"]
    assert torch.equal(first, draw_latents(pair, x, observed, num_draws=3, seed=4)["z"])
    assert torch.equal(before, torch.get_rng_state())
    assert list(pyro.get_param_store().keys()) == ["offset"]
    assert pyro.param("offset").item() == 1.0
    assert network.training


def test_masks_name_every_modality(world: LinearGaussianWorld) -> None:
    x, observed = rows(world)
    values, masks, num_rows = row_masks(own_pair(world), {"a": x["a"]}, {"a": observed["a"]})
    assert num_rows == 6
    assert list(values) == ["a"]
    assert torch.equal(masks["a"], observed["a"])
    assert not masks["b"].any()


def test_model_without_a_site_of_the_modality_is_refused(world: LinearGaussianWorld) -> None:
    programs = Programs(world)
    named = [Modality(name, (size,)) for name, size in {**SIZES, "c": 2}.items()]
    with pytest.raises(ValueError, match="expected an observed model site 'c', found sites data"):
        PyroPair(programs.model, programs.guide, named)


def test_unknown_names_are_refused(world: LinearGaussianWorld) -> None:
    with pytest.raises(ValueError, match=r"subsets: unknown modality 'c'; this model has a, b"):
        own_pair(world, subsets=[["c"]])
    with pytest.raises(ValueError, match=r"draw_latents given: unknown modality 'c'"):
        draw_latents(own_pair(world), world.sample(2, seed=0), given=["c"])
    with pytest.raises(ValueError, match="modalities with names of their own"):
        PyroPair(lambda: None, lambda: None, [])
    with pytest.raises(ValueError, match="num_draws and batch_size of at least 1, found 0"):
        draw_latents(own_pair(world), world.sample(2, seed=0), num_draws=0)


@pytest.mark.parametrize("child", ["z", "b"])
def test_modality_that_is_a_parent_is_refused(world: LinearGaussianWorld, child: str) -> None:
    """Leaving its site out would not marginalise it: the filler would decide."""
    programs = Programs(world)

    def model(x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["a"]), dim=-1):
            shift = x["a"].mean(-1, keepdim=True)
            z = pyro.sample("z", dist.Normal(shift * (child == "z"), 1.0).expand_by([]).to_event(1))
            pyro.sample("a", dist.Normal(z.expand(*z.shape[:-1], 3), 1.0).to_event(1), obs=x["a"])
            loc = (z + shift * (child == "b")).expand(*z.shape[:-1], 2)
            pyro.sample("b", dist.Normal(loc, 1.0).to_event(1), obs=x["b"])

    modalities = programs.modalities()
    with pytest.raises(ValueError, match=f"found that site '{child}' depends on 'a'"):
        PyroPair(model, programs.guide, modalities)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "factor",
            "model site 'extra': expected no observed site beside a, b, found a pyro.factor",
        ),
        ("observed", "model site 'extra': .* found another measurement, which would be counted"),
        ("plate", r"model site 'extra': expected batch shape \(N,\), .* found \(3, 2\) for N = 2"),
        ("outside", r"model site 'extra': expected batch shape \(N,\), .* found \(\) for N = 2"),
    ],
)
def test_site_that_no_likelihood_can_hold_is_refused(
    world: LinearGaussianWorld, kind: str, message: str
) -> None:
    programs = Programs(world)

    def model(x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        programs.model(x, observed)
        if kind == "outside":
            pyro.sample("extra", dist.Normal(0.0, 1.0))
            return
        with pyro.plate("more", len(x["a"]), dim=-1):
            if kind == "factor":
                pyro.factor("extra", torch.tensor(-3.0))
            elif kind == "observed":
                pyro.sample("extra", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))
            else:
                with pyro.plate("parts", 3, dim=-2):
                    pyro.sample("extra", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=message):
        PyroPair(model, programs.guide, programs.modalities())


def test_deterministic_site_and_factor_in_the_guide_change_nothing(
    world: LinearGaussianWorld,
) -> None:
    programs, x = Programs(world), world.sample(5, seed=1)

    def model(x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        programs.model(x, observed)
        with pyro.plate("more", len(x["a"]), dim=-1):
            pyro.deterministic("twice", torch.tensor(2.0))

    def guide(x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        programs.guide(x, observed)
        with pyro.plate("more", len(x["a"]), dim=-1):
            pyro.factor("alignment", torch.tensor(7.0), has_rsample=True)

    pair = PyroPair(model, guide, programs.modalities())
    found = log_likelihood(pair, x, of="a", given="b", num_samples=2)
    exact = world.log_prob(x, of=["a"], given=["b"])
    torch.testing.assert_close(torch.as_tensor(found.log_prob.values), exact)


def test_mean_of_an_integer_label_is_its_probabilities() -> None:
    def model(x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(x["label"]), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("label", dist.Categorical(logits=torch.stack([z, -z], -1)), obs=x["label"])

    pair = PyroPair(model, lambda x, observed: None, [Modality("label", (), Categorical(2))])
    found = pair.generate({}, num_rows=3, num_samples=4, mean=True)["label"]
    assert found.shape == (4, 3, 2)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 3))
