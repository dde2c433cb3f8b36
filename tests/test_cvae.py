"""CVAE: exact conditional likelihoods, and nothing without the condition."""

import itertools

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from zoo import batch, case, masks, modalities

from mmzoo import Modality
from mmzoo.evaluation import likelihood_table, log_likelihood, to_datatree
from mmzoo.exact import LinearGaussianWorld
from mmzoo.inference import SubsetELBO
from mmzoo.models import CVAE

D, N = 2, 16
EXACT = 1e-10
SIZES = {"a": 3, "b": 2, "c": 4}
FLOOR = 1e-4  # of a scale that a network gives


class Prior(nn.Module):
    """p(z | c) of a world."""

    def __init__(self, world: LinearGaussianWorld) -> None:
        super().__init__()
        self.world = world

    def forward(self, code: Tensor) -> Tensor:
        q = self.world.posterior({"c": code})
        scale = q.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
        return torch.cat([q.mean, (scale - FLOOR).expm1().log()], -1)


class Factor(nn.Module):
    """The exact expert of a modality of which ``shift @ c`` is taken off."""

    def __init__(self, world: LinearGaussianWorld, name: str, shift: Tensor, width: float) -> None:
        super().__init__()
        self.world, self.name, self.shift, self.width = world, name, shift, width

    def forward(self, value: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.world.expert(self.name, value - code @ self.shift.mT)
        return loc, self.width * scale


class Affine(nn.Module):
    """``W z + b + shift @ c``."""

    def __init__(self, decoder: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.decoder, self.shift = decoder, shift

    def forward(self, inputs: Tensor) -> Tensor:
        z, code = inputs.split([D, inputs.shape[-1] - D], -1)
        return self.decoder(z) + code @ self.shift.mT


def conditional(learned: bool, width: float = 1.0):
    """A world, the model that is its p(a, b | c), and the likelihoods of that.

    With a learned prior, c speaks through p(z | c); else it shifts the other modalities.
    """
    world = LinearGaussianWorld.random(SIZES, D, seed=3, diagonal=True)
    vae = CVAE(world.modalities(), D, conditional_prior=learned, hidden=4)
    shifts = {n: torch.zeros(SIZES[n], SIZES["c"]) for n in ("a", "b")}
    if not learned:
        shifts = {n: torch.randn(SIZES[n], SIZES["c"]) for n in ("a", "b")}
    for m in world.modalities()[:2]:
        vae.experts[f"{m.name}_"] = Factor(world, m.name, shifts[m.name], width)
        vae.generative.decoders[f"{m.name}_"] = Affine(m.decoder, shifts[m.name])
    if learned:
        vae.generative.conditional_prior = Prior(world)

    def exact(x, observed, of, given):
        moved = {n: x[n] - x["c"] @ shift.mT for n, shift in shifts.items()}
        if learned:
            return world.log_prob({**x, **moved}, observed, of=of, given=given)
        known = [n for n in given if n != "c"]
        return world.log_prob(moved, only(observed, moved), of=of, given=known)

    return world, vae, exact


def only(values, names):
    return {name: values[name] for name in names if name in values}


def holes(x):
    mask = torch.rand(N, 2) < 0.6
    mask[:, 0] |= ~mask[:, 1]
    return dict(zip(("a", "b"), mask.unbind(-1)))


def questions():
    for roles in itertools.product(("of", "given", ""), repeat=3):
        of, given = ([n for n, r in zip(SIZES, roles) if r == role] for role in ("of", "given"))
        if of:
            yield of, given


@pytest.mark.parametrize("learned", [False, True])
def test_every_likelihood_that_is_defined_is_exact_with_each_draw(learned):
    world, vae, exact = conditional(learned)
    x = world.sample(N, seed=4)
    observed = holes(x)
    answered = 0
    for of, given in questions():
        if "c" not in given:
            with pytest.raises(ValueError, match=r"not defined; CVAE is conditional on c, which"):
                log_likelihood(vae, x, observed, of=of, given=given)
            continue
        found = log_likelihood(vae, x, observed, of=of, given=given, num_samples=3)
        expected = exact(x, observed, of, given)
        np.testing.assert_allclose(found.log_prob, expected.numpy(), rtol=0, atol=EXACT)
        answered += 1
    assert answered == 5


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_likelihoods_agree_where_the_experts_are_too_wide(learned, share):
    world, vae, exact = conditional(learned, width=1.6)
    x = world.sample(N, seed=4)
    for of, given in ((["a"], ["c"]), (["a", "b"], ["c"]), (["a"], ["b", "c"])):
        found = log_likelihood(vae, x, of=of, given=given, prior_share=share)
        error = np.abs(found.log_prob.values - exact(x, {}, of, given).numpy())
        assert (found.pareto_k < 0.7).mean() >= 0.5
        kept = found.pareto_k.values < 0.7
        assert (error < 5 * found.mcse.values + EXACT)[kept].all()
        assert (found.mcse > 1e-4).all()


@pytest.mark.parametrize("learned", [False, True])
def test_objective_of_the_exact_model_is_the_conditional_likelihood(learned):
    world, vae, exact = conditional(learned)
    x = world.sample(N, seed=4)
    observed = holes(x)
    loss = SubsetELBO("all", elbo=Trace_ELBO()).loss(vae.model, vae.guide, x, observed)
    evidence = exact(x, observed, ["a", "b"], ["c"]).sum().item()
    assert abs(loss + evidence) < 1e-9


def test_generated_values_follow_the_condition():
    _, vae, _ = conditional(False)
    codes = torch.eye(4)
    draws = vae.generate({"c": codes}, num_samples=4000, mean=True)
    shift = vae.generative.decoders["a_"].shift
    moved = draws["a"].mean(0) - draws["a"].mean(0)[:1]  # (4, 3)
    error = 5 * draws["a"].std(0) * (2 / 4000) ** 0.5
    expected = (codes - codes[:1]) @ shift.mT
    assert ((moved - expected).abs() <= error).all() and (expected.abs() > error).any()
    assert torch.equal(draws["c"], codes.expand(4000, 4, 4))


def test_table_leaves_cells_empty_with_the_reason():
    world, vae, exact = conditional(True)
    x = world.sample(N, seed=4)
    quantities = [(["a", "c"], ()), ("c", "a"), ("a", "c")]
    table = likelihood_table({"it": vae}, x, quantities=quantities, num_samples=3)
    note = "CVAE is conditional on c, which must be given and is not scored"
    assert table.note.values.tolist() == [[note, note, ""]]
    assert np.isnan(table["mean"].values).tolist() == [[True, True, False]]
    expected = exact(x, {}, ["a"], ["c"]).mean()
    np.testing.assert_allclose(table["mean"].values[0, 2], expected, atol=EXACT)


def test_tree_holds_what_a_conditional_model_answers():
    world, vae, exact = conditional(True)
    x = world.sample(N, seed=4)
    tree = to_datatree(vae, x, num_draws=2, num_samples=3)
    assert tree["posterior"].coords["subset"].values.tolist() == ["a+b+c", "c", "a+c", "b+c"]
    assert set(tree["posterior_predictive"].data_vars) == {"a", "b"}
    assert set(tree["log_likelihood"].data_vars) == {"a", "b", "joint"}
    assert "prior" not in tree.children
    expected = exact(x, {}, ["a", "b"], ["c"]).numpy()
    np.testing.assert_allclose(tree["constant_data"]["log_prob"], expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("learned", [False, True])
def test_labels_are_one_hot_for_every_network(learned):
    vae = CVAE(modalities(4), 2, hidden=6, conditional_prior=learned)
    assert vae.condition == "digit"  # the last one
    x = {"digit": torch.tensor([0, 2, 1])}
    z = torch.zeros(3, 2)
    expected = torch.cat([z, torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])], -1)
    assert torch.equal(vae._decoder_input(z, vae.check(x)), expected)
    draws = vae.generate(x)
    assert torch.equal(draws["digit"], x["digit"])
    changed = {**draws, "digit": torch.tensor([1, 1, 1])}
    moved = (vae.posterior(changed).mean - vae.posterior(draws).mean).abs().amax(-1)
    assert (moved > 1e-6).tolist() == [True, True, False]
    assert vae.prior(x).batch_shape == ((3,) if learned else ())


def test_other_modalities_may_be_missing_but_not_the_condition():
    vae = case("cvae", 4)
    x, observed = batch(vae), masks(vae)
    vae.posterior({"vector": x["vector"]})
    message = "modality 'vector': expected values in every row, since CVAE is conditional on it"
    rest = {name: value for name, value in x.items() if name != "vector"}
    for use in (vae.posterior, vae.model, vae.guide, vae.generate):
        with pytest.raises(ValueError, match=f"{message}, found them in no row"):
            use(rest)
    with pytest.raises(ValueError, match=f"{message}, found them in no row"):
        vae.generate({}, num_rows=3)
    observed["vector"] = torch.arange(6) > 0
    with pytest.raises(ValueError, match=f"{message}, found them in some rows only; give them, or"):
        vae.posterior(x, observed)


def test_condition_is_given_in_every_subset():
    vae = case("cvae", 4)
    x = batch(vae)
    lone = SubsetELBO([("image",)], elbo=Trace_ELBO())
    both = SubsetELBO([("image", "vector")], elbo=Trace_ELBO())
    found = []
    for objective in (lone, both):
        torch.manual_seed(3)
        found.append(objective.loss(vae.model, vae.guide, x))
    assert found[0] == found[1]


def test_unknown_condition_is_refused():
    with pytest.raises(ValueError, match="CVAE condition: unknown modality 'q'; this model has a"):
        CVAE([Modality("a", (2,)), Modality("b", (2,))], 2, condition="q")
