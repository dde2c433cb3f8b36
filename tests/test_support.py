"""Values outside the support of a likelihood of the user's own are found where they enter."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from mmzoo import Modality
from mmzoo.batch import check_batch
from mmzoo.data import MultimodalDataset
from mmzoo.evaluation.likelihood import likelihood_table, log_likelihood
from mmzoo.evaluation.pair import PyroPair
from mmzoo.inference import fit
from mmzoo.inference.support import check_support
from mmzoo.models import MODELS, MVAE

QUIET = {"epochs": 1, "progress": False}


def poisson(log_rate: Tensor) -> dist.Distribution:
    return dist.Poisson(log_rate.exp())


def parts(likelihood=poisson, **options) -> list[Modality]:
    return [Modality("a", (2,)), Modality("k", (3,), likelihood, encoder="mlp", **options)]


def rows(wrong: float | None = None) -> dict[str, Tensor]:
    x = {"a": torch.randn(20, 2), "k": torch.poisson(torch.ones(20, 3))}
    if wrong is not None:
        x["k"][13, 1] = wrong
    return x


@pytest.mark.parametrize("wrong", [-3.0, -0.5, 2.5])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("vae", "linear")])
def test_every_model_finds_a_value_outside(name, wrong):
    options = {"condition": "a"} if name == "cvae" else {}
    pair = MODELS[name](parts(), latent_dim=2, **options)
    for x, observed in ((rows(), {}), (rows(wrong), {"k": torch.arange(20) != 13})):
        check_support(pair, check_batch(pair.modalities, x, observed))
    message = "modality 'k': .* in the support .* in 1 of these rows, the first is row 113; mask"
    with pytest.raises(ValueError, match=message):
        check_support(pair, check_batch(pair.modalities, rows(wrong)), first=100)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_support(pair, check_batch(pair.modalities, x, {"k": torch.arange(20) != 13}))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("filler", [float("nan"), 1e30, -0.5])
def test_what_stands_under_a_mask_is_not_looked_at(filler):
    vae, x, seen = MVAE(parts(), latent_dim=2), rows(), {"k": torch.arange(20) % 3 != 0}
    found = []
    for value in (0.0, filler):
        x["k"][~seen["k"]] = value
        found.append(log_likelihood(vae, x, seen, of=["a", "k"], num_samples=10).log_prob.values)
    assert (found[0] == found[1]).all()


def test_fit_and_likelihoods_look():
    vae, x = MVAE(parts(), latent_dim=2), rows(-0.5)
    for look in (
        lambda: fit(vae, MultimodalDataset(x), **QUIET),
        lambda: fit(vae, MultimodalDataset(rows()), validation=MultimodalDataset(x), **QUIET),
        lambda: log_likelihood(vae, x, of="a", num_samples=10),
        lambda: likelihood_table({"it": vae}, x, num_samples=10),
    ):
        with pytest.raises(ValueError, match="the first is row 13; mask such rows"):
            look()
    assert fit(vae, MultimodalDataset(rows()), **QUIET).stopped == "epochs"


def test_pair_of_ones_own():
    def model(x, observed):
        with pyro.plate("data", len(x["k"]), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("k", dist.Poisson(z.exp()), obs=x["k"])

    def guide(x, observed):
        with pyro.plate("data", len(x["k"]), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    pair = PyroPair(model, guide, [Modality("k", (), poisson)])
    log_likelihood(pair, {"k": torch.ones(4)}, of="k", num_samples=10)
    with pytest.raises(ValueError, match="modality 'k': .* the first is row 2"):
        log_likelihood(pair, {"k": torch.tensor([1.0, 2.0, 0.5])}, of="k", num_samples=10)


@pytest.mark.parametrize(
    ("likelihood", "good", "bad"),
    [
        (lambda out: dist.LogNormal(out, 1.0), 0.5, -0.5),
        (lambda out: dist.Gamma(out.exp(), 1.0).to_event(1), 0.5, -0.5),
        (lambda out: dist.Dirichlet(out.exp()), 1 / 3, 0.5),
        # Its ends are parameters: what is outside for one latent may be inside for another.
        (lambda out: dist.Uniform(out - 9.0, out + 9.0), 100.0, None),
        (lambda out: dist.Normal(out, 1.0), 100.0, None),
    ],
)
def test_supports_of_every_kind(likelihood, good, bad):
    vae = MVAE(parts(likelihood), latent_dim=2)
    x = rows() | {"k": torch.full((20, 3), good)}
    check_support(vae, check_batch(vae.modalities, x))
    if bad is not None:
        x["k"][13] = bad
        with pytest.raises(ValueError, match="the first is row 13"):
            check_support(vae, check_batch(vae.modalities, x))
