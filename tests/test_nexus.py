"""Nexus: two levels that learn apart, messages that are dropped, codes that follow from z."""

import itertools
import math

import pyro
import pytest
import torch
from pyro import poutine

from mmzoo import Modality
from mmzoo.inference import NexusELBO
from mmzoo.inference.nexus import drop_messages
from mmzoo.models import MVAE, Nexus

SMALL = {"kind": "mlp", "hidden": [5]}
EXACT = 1e-10
NAMES = ("a", "b", "c")


def nexus() -> Nexus:
    parts = [Modality(n, (d,), encoder=SMALL, decoder=SMALL) for n, d in zip(NAMES, (3, 2, 2))]
    return Nexus(parts, latent_dim=2, hidden=5)


def rows():
    x = {n: torch.randn(6, d) for n, d in zip(NAMES, (3, 2, 2))}
    observed = {"b": torch.arange(6) != 2, "c": torch.arange(6) > 3}
    return x, observed


def gradients(vae, elbo, x, observed):
    vae.zero_grad()
    pyro.set_rng_seed(3)
    elbo.differentiable_loss(vae.model, vae.guide, x, observed).backward()
    return {key: value.grad for key, value in vae.named_parameters()}


UPPER = ("generative.codes.", "messages.", "node.")
NOTHING = dict.fromkeys(NAMES, 0.0)


@pytest.mark.parametrize("as_published", [False, True])
def test_no_gradient_passes_between_the_levels(as_published):
    vae = nexus()
    x, observed = rows()
    options = {"as_published": as_published, "dropout": 0.5}
    both = gradients(vae, vae.objective(**options), x, observed)
    only = {
        "lower": vae.objective(beta=0.0, code_weights=NOTHING, **options),
        "upper": vae.objective(modality_weights=NOTHING, modality_betas=NOTHING, **options),
    }
    for level, elbo in only.items():
        found = gradients(vae, elbo, x, observed)
        for key, grad in found.items():
            if key.startswith(UPPER) == (level == "upper"):
                torch.testing.assert_close(grad, both[key])
                assert grad.abs().sum() > 0
            else:
                assert grad is None or (grad == 0).all()


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_messages_are_dropped_with_the_stated_probabilities(rate):
    num = 40_000
    for has in itertools.product((False, True), repeat=3):
        kept = drop_messages(torch.tensor(has).expand(num, 3), rate)
        count = sum(has)
        total = 0.0
        for part in itertools.product((False, True), repeat=3):
            if any(p and not h for p, h in zip(part, has)):
                assert not (kept == torch.tensor(part)).all(-1).any()  # nothing is added
                continue
            size = sum(part)
            exact = 0.0
            if count >= 2 and 0 < size < count:
                exact = rate / (count - 1) / math.comb(count, size)
            elif size == count:
                exact = 1.0 if count < 2 else 1 - rate
            total += exact
            found = (kept == torch.tensor(part)).all(-1).double().mean().item()
            assert abs(found - exact) <= 5 * math.sqrt(exact * (1 - exact) / num)
        assert math.isclose(total, 1.0)


def test_objective_is_what_it_says(monkeypatch):
    """By hand, row by row, with means for draws and each weight once."""
    vae = nexus().eval()
    x, observed = rows()
    monkeypatch.setattr(
        torch.distributions.Normal,
        "rsample",
        lambda self, shape=(): self.loc.expand(self._extended_shape(shape)),
    )
    lam, betas, gamma = {"a": 2.0}, {"b": 3.0}, {"a": 5.0, "c": 7.0}
    elbo = vae.objective(
        beta=1.5, modality_weights=lam, modality_betas=betas, code_weights=gamma, dropout=1.0
    )
    found = -elbo.loss(vae.model, vae.guide, x, observed)
    kl, unit = torch.distributions.kl_divergence, vae.prior().first
    expected = 0.0
    with torch.no_grad():
        for row in range(6):
            here = {n: v[row : row + 1] for n, v in x.items() if n not in observed}
            here |= {n: x[n][row : row + 1] for n, mask in observed.items() if mask[row]}
            codes = {}
            for n, value in here.items():
                loc, scale = vae.experts[f"{n}_"](value)
                codes[n] = loc
                q = pyro.distributions.Normal(loc, scale).to_event(1)
                p = super(Nexus, vae).likelihood(n, loc)
                expected += lam.get(n, 1.0) * p.log_prob(value)
                expected -= betas.get(n, 1.0) * kl(q, unit.expand((1,)))
            message = sum(vae.messages[f"{n}_"](code) for n, code in codes.items()) / len(codes)
            loc, raw = vae.node(message).chunk(2, -1)
            scale = torch.nn.functional.softplus(raw) + 1e-4
            above = pyro.distributions.Normal(loc, scale).to_event(1)
            expected -= 1.5 * kl(above, unit.expand((1,)))
            for n, code in codes.items():
                again = vae.generative.codes[f"{n}_"](loc)
                log_p = torch.distributions.Normal(again, 1.0).log_prob(code).sum(-1)
                expected += gamma.get(n, 1.0) * log_p
    assert math.isclose(found, float(expected), rel_tol=EXACT)
    counts = {name: int(count) for name, (_, count) in elbo.terms.items()}
    assert counts == {"a": 6, "b": 5, "c": 2, "z": 6, "z_a": 6, "z_b": 5, "z_c": 2}


def test_messages_are_dropped_in_training_only():
    vae = nexus()
    x, observed = rows()

    def value(dropout):
        pyro.set_rng_seed(1)
        return NexusELBO(dropout=dropout).loss(vae.model, vae.guide, x, observed)

    assert value(1.0) != value(0.0)
    vae.eval()
    pyro.set_rng_seed(1)
    assert value(1.0) == value(0.0)


def test_code_of_a_missing_modality_weighs_nothing():
    """It comes from p(z_m | z), hence the weight p / q of a draw does not depend on it."""
    vae = nexus()
    x = {"a": torch.randn(6, 3), "c": torch.randn(6, 2)}
    q = vae.posterior(x)
    z = q.sample()
    found = []
    for shift in (0.0, 1.0, -30.0):
        moved = z.clone()
        moved[:, 4:6] += shift  # z, z_a, z_b, z_c
        trace = poutine.trace(poutine.condition(vae.model, vae.split(moved))).get_trace(x)
        trace.compute_log_prob()
        log_p = sum(trace.nodes[n]["log_prob"] for n in (*vae.latent_sites, "a", "c"))
        found.append(log_p - q.log_prob(moved))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    moved = z.clone()
    moved[:, 2:4] += 1.0  # that of a modality that is there does
    assert (q.log_prob(moved) != q.log_prob(z)).all()


def test_message_is_the_mean_over_what_a_row_has():
    vae = nexus()
    codes = torch.randn(6, 3, 2)
    mask = torch.tensor([[True, False, True]] * 5 + [[False, False, False]])
    q = vae.nexus(codes, mask).base_dist
    mean = (vae.messages["a_"](codes[:, 0]) + vae.messages["c_"](codes[:, 2])) / 2
    torch.testing.assert_close(q.loc[:5], vae.node(mean).chunk(2, -1)[0][:5])
    assert (q.loc[5] == 0).all() and (q.scale[5] == 1).all()


def test_other_models_and_options_are_refused():
    vae = nexus()
    other = MVAE([Modality("a", (3,)), Modality("b", (2,))], latent_dim=2)
    x, observed = rows()
    with pytest.raises(ValueError, match="NexusELBO: expected a model with a nexus, found"):
        NexusELBO().loss(other.model, other.guide, {"a": x["a"]})
    with pytest.raises(ValueError, match="NexusELBO: expected 0 <= dropout <= 1, found 2"):
        NexusELBO(dropout=2.0)
    with pytest.raises(ValueError, match="NexusELBO code_weights: unknown modality 'd'"):
        NexusELBO(code_weights={"d": 1.0}).loss(vae.model, vae.guide, x, observed)
