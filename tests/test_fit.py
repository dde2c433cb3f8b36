"""The training loop: what it repeats, records, keeps and refuses, and how close it gets."""

import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from mmzoo import Modality, MultimodalDataset
from mmzoo.exact import LinearGaussianWorld
from mmzoo.inference import ImportanceWeightedELBO, LinearWarmup, SubsetELBO, Wasserstein, fit
from mmzoo.inference.alignment import alignment_terms
from mmzoo.models import MODELS, VAE

# Sums of a few thousand numbers of order ten, each rounded to float64.
ROUND_OFF = 1e5 * torch.finfo(torch.float64).eps
SMALL = {"kind": "mlp", "hidden": [6]}
QUIET = {"progress": False, "accelerator": "cpu"}
MULTIMODAL = [name for name, model in MODELS.items() if model.max_modalities != 1]


def close(found: Tensor, expected: Tensor, tolerance: float = ROUND_OFF) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected), rtol=tolerance, atol=tolerance
    )


def modalities(name: str = "mvae") -> list[Modality]:
    noise = "normal" if name == "linear" else "one_hot_categorical"
    return [
        Modality("a", (4,), encoder=SMALL, decoder=SMALL),
        Modality("b", (3,), noise, encoder=SMALL, decoder=SMALL),
    ][: MODELS[name].max_modalities]


def model(name: str = "mvae", seed: int = 1):
    pyro.set_rng_seed(seed)
    return MODELS[name](modalities(name), latent_dim=2)


def rows(num: int = 64, seed: int = 0, *, missing: bool = False) -> MultimodalDataset:
    rng = np.random.default_rng(seed)
    label = rng.integers(3, size=num)
    x = {"a": rng.normal(size=(num, 4)) + label[:, None], "b": np.eye(3)[label]}
    return MultimodalDataset(x, observed={"b": np.arange(num) % 2 == 0} if missing else None)


def weights(vae: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in vae.state_dict().values()]


def equal(these: list[Tensor], those: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


# Seeds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_repeats_to_the_bit(name):
    def run(seed: int):
        own = MODELS[name](modalities(name), latent_dim=2)
        own.load_state_dict(start)
        data = rows()
        if name == "vae":
            data = MultimodalDataset({"a": data.tensors()[0]["a"]})
        result = fit(own, data, validation=data, epochs=2, batch_size=16, seed=seed, **QUIET)
        return weights(own), result.history.drop_vars("seconds")

    start = MODELS[name](modalities(name), latent_dim=2).state_dict()
    first, again, other = run(3), run(3), run(4)
    assert equal(first[0], again[0])
    assert first[1].identical(again[1])
    assert not equal(first[0], other[0])
    assert (first[1].loss != other[1].loss).all()


def test_what_came_before_does_not_matter_but_the_seed_does():
    """A run seeds the global generators of torch, numpy and Python; a seed fixes what it leaves."""

    def after(before: int, seed: int):
        pyro.set_rng_seed(before)
        vae = model()
        pyro.set_rng_seed(before)
        fit(vae, rows(), epochs=1, seed=seed, **QUIET)
        return torch.rand(1).item(), float(np.random.rand()), random.random()  # noqa: NPY002

    assert after(5, 0) == after(6, 0)
    assert all(a != b for a, b in zip(after(5, 0), after(5, 1), strict=True))


def test_watching_changes_no_weight():
    """Validation and the log draw from generators of their own."""
    watched, alone = model(), model()
    fit(watched, rows(), validation=rows(seed=2), epochs=3, on_epoch=lambda *_: None, **QUIET)
    fit(alone, rows(), epochs=3, **QUIET)
    assert equal(weights(watched), weights(alone))


def test_it_leaves_the_models_in_eval_mode_and_validation_as_it_was():
    for enabled in (True, False):
        pyro.enable_validation(enabled)
        vae = model()
        fit(vae, rows(), epochs=1, **QUIET)
        assert pyro.distributions.util.is_validation_enabled() == enabled
        assert not vae.training
    pyro.enable_validation(True)


def test_pyro_s_validation_survives_an_error():
    class Broken(Trace_ELBO):
        def differentiable_loss(self, *args):
            if torch.is_grad_enabled():
                raise RuntimeError("broken objective")
            return super().differentiable_loss(*args)

    with pytest.raises(RuntimeError, match="broken objective"):
        fit(model(), rows(), objective=Broken(), **QUIET)
    assert pyro.distributions.util.is_validation_enabled()


# History ----------------------------------------------------------------------------------------


def test_history_is_labelled():
    result = fit(model("mwvae"), rows(), validation=rows(seed=2), epochs=3, **QUIET)
    history = result.history
    dims = {
        "loss": ("epoch",),
        "validation_loss": ("epoch",),
        "gradient_norm": ("epoch",),
        "learning_rate": ("epoch",),
        "seconds": ("epoch",),
        "wasserstein": ("epoch",),
        "log_likelihood": ("epoch", "modality"),
        "kl": ("epoch", "latent"),
        "alignment": ("epoch", "term"),
    }
    assert {name: history[name].dims for name in history} == dims
    assert history.epoch.values.tolist() == [0, 1, 2]
    assert history.modality.values.tolist() == ["a", "b"]
    assert history.latent.values.tolist() == ["z"]
    assert history.term.values.tolist() == ["wasserstein"]
    assert (history.learning_rate == 1e-3).all()
    assert (history.seconds > 0).all()
    assert result.stopped == "epochs"
    assert result.best_epoch == 2


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("batch_size", [16, 24])  # 64 = 24 + 24 + 16: unequal batches as well
@pytest.mark.parametrize(
    "make", [lambda: SubsetELBO("all"), lambda: Trace_ELBO(), lambda: Trace_ELBO(num_particles=3)]
)
def test_terms_add_up_to_the_loss(make, batch_size, missing):
    data = rows(missing=missing)
    history = fit(model(), data, objective=make(), epochs=2, batch_size=batch_size, **QUIET).history
    share = {"a": 1.0, "b": 0.5 if missing else 1.0}  # log-likelihoods are per row that has one
    bound = sum(share[m] * history.log_likelihood.sel(modality=m) for m in share)
    close((bound - history.kl.sel(latent="z")).values, -history.loss.values)


def test_terms_of_several_subsets_are_means_over_their_rows():
    history = fit(
        model(), rows(), objective=SubsetELBO(("all", "singles")), epochs=1, **QUIET
    ).history.isel(epoch=0)
    # Each modality is scored twice in a row, and there are three posteriors.
    bound = 2 * history.log_likelihood.sum() - 3 * history.kl.sum()
    close(float(bound), -float(history.loss))


def test_alignment_and_distance_are_recorded():
    vae, data = model("mwvae"), rows(missing=True)
    objective = vae.objective(alignment_weight=3.0, elbo=Trace_ELBO())
    history = fit(vae, data, objective=objective, learning_rate=0.0, epochs=1, **QUIET).history
    expected = alignment_terms(vae, *data.tensors(), Wasserstein()).mean().item()
    assert expected > 0
    close(history.wasserstein.item(), expected)
    close(history.alignment.sel(term="wasserstein").item(), expected)  # unweighted
    history = history.isel(epoch=0)
    bound = sum(f * history.log_likelihood.sel(modality=m) for m, f in (("a", 1.0), ("b", 0.5)))
    kl = 1.5 * history.kl.sel(latent="z")  # a mean over posteriors, 96 in 64 rows
    close(history.loss.item(), float(kl - bound) + 3.0 * expected)


def test_the_distance_is_logged_where_nothing_optimises_it():
    vae = model()
    history = fit(vae, rows(), epochs=1, learning_rate=0.0, **QUIET).history
    expected = alignment_terms(vae, *rows().tensors(), Wasserstein()).mean().item()
    close(history.wasserstein.item(), expected)
    assert "alignment" not in history


def test_validation_is_the_bound_of_the_validation_rows():
    """With the closed-form KL of an objective without likelihoods nothing is random."""
    vae, data = model(), rows(40, seed=2, missing=True)
    objective = SubsetELBO(
        modality_weights={"a": 0.0, "b": 0.0}, beta=0.5, elbo=TraceMeanField_ELBO()
    )
    result = fit(vae, rows(), validation=data, objective=objective, epochs=2, **QUIET)
    expected = objective.loss(vae.model, vae.guide, *data.tensors()) / 40
    close(result.history.validation_loss[-1].item(), expected)
    assert result.history.validation_loss[0] != result.history.validation_loss[1]


@pytest.mark.parametrize("name", ["mvae", "telbo", "smvae", "mmvm"])
def test_validation_has_the_weights_that_the_schedules_end_with(name):
    """The last of 4 epochs of 4 steps ends with step 15; a last cycle must not begin anew."""
    asked, vae = [], model(name)

    def cycle(step: int) -> float:
        if not vae.training:
            asked.append(step)
        return (step % 4 + 1) / 4

    fit(
        vae,
        rows(),
        validation=rows(seed=2),
        objective=vae.objective(beta=cycle),
        epochs=4,
        batch_size=16,
        **QUIET,
    )
    assert len(asked) >= 4
    assert set(asked) == {15}


def test_a_warm_up_does_not_choose_the_kept_weights():
    """Without likelihoods, by a beta that grows, every epoch looks worse than the one before."""
    zero, data = {"a": 0.0, "b": 0.0}, rows(40, seed=2)
    vae, losses = model(), []
    warm = SubsetELBO(beta=LinearWarmup(16, 0.1), modality_weights=zero, elbo=TraceMeanField_ELBO())
    final = SubsetELBO(modality_weights=zero, elbo=TraceMeanField_ELBO())

    def true_loss(epoch, means) -> None:
        losses.append(final.loss(vae.model, vae.guide, *data.tensors()) / 40)

    result = fit(
        vae,
        rows(),
        validation=data,
        objective=warm,
        epochs=5,
        batch_size=16,
        patience=1,
        on_epoch=true_loss,
        **QUIET,
    )
    assert warm.step == 20  # training counts, watching does not
    assert result.best_epoch == int(np.argmin(losses)) == 4
    close(result.history.validation_loss.values, losses)


def test_on_epoch_is_told_the_figures():
    told = []
    result = fit(
        model(),
        rows(),
        epochs=3,
        on_epoch=lambda epoch, means: told.append((epoch, means)),
        **QUIET,
    )
    assert [epoch for epoch, _ in told] == [0, 1, 2]
    for epoch, means in told:
        row = result.history.isel(epoch=epoch)
        assert means["loss"] == row.loss
        assert means["a"] == row.log_likelihood.sel(modality="a")
        assert means["z"] == row.kl.sel(latent="z")


def test_an_optimizer_and_a_scheduler_of_the_users():
    made, steps = [], []

    def optimizer(parameters, lr):
        made.append(torch.optim.SGD(parameters, lr=lr))
        return made[0]

    def scheduler(optim):
        def factor(step: int) -> float:
            steps.append(step)
            return 0.5**step

        return torch.optim.lr_scheduler.LambdaLR(optim, factor)

    history = fit(
        model(),
        rows(),
        epochs=2,
        batch_size=32,
        learning_rate=1e-4,
        optimizer=optimizer,
        scheduler=scheduler,
        **QUIET,
    ).history
    assert len(made) == 1
    assert max(steps) == 4  # one for each of two steps in two epochs
    close(history.learning_rate.values, [1e-4 / 4, 1e-4 / 16])


def test_clipping_bounds_the_step():
    """With plain gradient descent a step is as long as the learning rate times the bound."""
    options = {
        "epochs": 1,
        "batch_size": 64,
        "learning_rate": 1e-2,
        "optimizer": torch.optim.SGD,
    }

    def step(clip: float | None) -> tuple[float, float]:
        vae = model()
        before = [p.detach().clone() for p in vae.parameters()]
        history = fit(vae, rows(), gradient_clip=clip, **options, **QUIET).history
        moved = [
            (p.detach() - b).square().sum() for p, b in zip(vae.parameters(), before, strict=True)
        ]
        return math.sqrt(sum(moved)), history.gradient_norm.item()

    free, norm = step(None)
    close(free, 1e-2 * norm)
    clipped, found = step(norm / 5)
    assert found == norm  # what is recorded is the norm before it is clipped
    # torch adds 1e-6 to the norm that it divides by.
    close(clipped, 1e-2 * norm / 5, 2e-6 / norm)
    assert step(norm * 5)[0] == free


class LogVariance(nn.Module):
    """What many write: a mean, and the logarithm of a variance in place of a scale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 4)

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(value).chunk(2, -1)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("name", ["vae", "mvae", "mmvae", "mwvae", "jmvae"])
def test_scales_that_are_none_are_refused_before_training(name, enabled):
    vae = MODELS[name](
        [
            Modality("a", (4,), encoder=LogVariance(4)),
            Modality("b", (3,), "one_hot_categorical"),
        ][: MODELS[name].max_modalities],
        latent_dim=2,
    )
    data = MultimodalDataset({key: rows().tensors()[0][key] for key in vae.modalities})
    message = r"^modality 'a': expected positive scales from its encoder, found -\d.*softplus"
    with pyro.validation_enabled(enabled), pytest.raises(ValueError, match=message):
        fit(vae, data, epochs=1, **QUIET)


# Stopping ---------------------------------------------------------------------------------------


def test_early_stopping_restores_the_best_weights():
    """Few rows, many epochs: the bound of other rows gets worse while that of these improves."""
    seen, vae = [], VAE(modalities()[:1], latent_dim=2)
    return_state = lambda epoch, means: seen.append(weights(vae))  # noqa: E731
    rng = np.random.default_rng(0)
    train, other = (MultimodalDataset({"a": rng.normal(size=(n, 4))}) for n in (8, 200))
    result = fit(
        vae,
        train,
        validation=other,
        epochs=400,
        learning_rate=1e-2,
        patience=5,
        on_epoch=return_state,
        **QUIET,
    )
    losses = result.history.validation_loss.values
    assert result.stopped == "early stopping"
    assert len(losses) < 400
    assert result.best_epoch == losses.argmin()
    assert len(losses) == result.best_epoch + 5 + 1
    assert equal(weights(vae), seen[result.best_epoch])
    assert not equal(weights(vae), seen[-1])


def test_patience_keeps_the_best_weights_to_the_end():
    seen, vae = [], model()
    result = fit(
        vae,
        rows(16),
        validation=rows(64, seed=5),
        epochs=4,
        learning_rate=0.3,
        patience=100,
        on_epoch=lambda *_: seen.append(weights(vae)),
        **QUIET,
    )
    best = int(result.history.validation_loss.values.argmin())
    assert result.stopped == "epochs"
    assert result.best_epoch == best
    assert equal(weights(vae), seen[best])


class Failing(SubsetELBO):
    """An objective that is not a number from its n-th step on."""

    def __init__(self, good: int) -> None:
        super().__init__(elbo=TraceMeanField_ELBO())
        self.left = good

    def differentiable_loss(self, *args):
        loss = super().differentiable_loss(*args)
        if torch.is_grad_enabled():
            self.left -= 1
        return loss if self.left >= 0 else loss * math.nan


@pytest.mark.parametrize("good_epochs", [0, 2])
def test_a_diverging_run_keeps_its_last_good_weights(good_epochs):
    seen, vae = [], model()
    seen.append(weights(vae))
    with pytest.warns(
        UserWarning, match=f"MVAE is not finite in epoch {good_epochs}; the model has"
    ):
        result = fit(
            vae,
            rows(),
            objective=Failing(4 * good_epochs + 2),
            epochs=5,
            batch_size=16,
            on_epoch=lambda *_: seen.append(weights(vae)),
            **QUIET,
        )
    assert result.stopped == "diverged"
    assert result.best_epoch == good_epochs - 1
    for name in ("loss", "gradient_norm", "learning_rate", "seconds"):
        assert result.history[name].shape == (good_epochs,)
    assert len(seen) == good_epochs + 1
    assert equal(weights(vae), seen[-1])


def test_a_gradient_that_is_not_finite_is_no_step():
    vae = model()
    before = weights(vae)

    class Explosive(SubsetELBO):
        def differentiable_loss(self, *args):
            zero = sum(p.square().sum() for p in vae.parameters()) * 0.0
            return super().differentiable_loss(*args) + zero.sqrt()  # finite; its slope is not

    with pytest.warns(UserWarning, match="not finite in epoch 0"):
        result = fit(vae, rows(), objective=Explosive(), epochs=1, **QUIET)
    assert result.stopped == "diverged"
    assert equal(weights(vae), before)


# Guides and objectives of users ----------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def guide(self, x, observed=None):
        return amortised(self, x)


def amortised(network: nn.Module, x) -> None:
    loc, raw = network.linear(x["a"]).chunk(2, -1)
    with pyro.plate("data", len(loc), dim=-1):
        pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))


@pytest.mark.parametrize(
    "objective", [Trace_ELBO, TraceMeanField_ELBO, lambda: ImportanceWeightedELBO(3)]
)
@pytest.mark.parametrize("style", ["pyro.module", "method", "module", "pyro.param"])
def test_a_users_guide_trains(style, objective):
    vae, network = model(), Network()

    def by_module(x, observed=None):
        pyro.module("network", network)
        amortised(network, x)

    def by_param(x, observed=None):
        loc = pyro.param("loc", torch.zeros(2))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x["a"]), dim=-1):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    class Guide(Network):
        def forward(self, x, observed=None):
            amortised(self, x)

    if style == "module":
        network = Guide()
    guide = {
        "pyro.module": by_module,
        "pyro.param": by_param,
        "method": network.guide,
        "module": network,
    }[style]
    before = {"guide": weights(network), "own": weights(vae.experts)}
    generative = weights(vae.generative)
    history = fit(
        vae,
        rows(),
        guide=guide,
        objective=objective(),
        epochs=15,
        batch_size=16,
        learning_rate=1e-2,
        **QUIET,
    ).history
    assert history.loss[-1] < history.loss[0] - 0.5
    assert not equal(weights(vae.generative), generative)
    assert equal(weights(vae.experts), before["own"])  # another's guide: these are not asked
    if style == "pyro.param":
        store = pyro.get_param_store()
        assert (store["loc"] != 0).any()
        assert (store["scale"] != 1).any()
        assert (store["scale"] > 0).all()
    else:
        moved = [not torch.equal(a, b) for a, b in zip(weights(network), before["guide"])]
        assert all(moved)


@pytest.mark.parametrize("name", ["mvae", "mopoe", "mwvae", "jmvae"])
def test_a_users_guide_need_not_know_plates(name):
    network, shapes = Network(), set()

    def guide(x, observed):
        shapes.update(mask.shape for mask in observed.values())
        values = torch.where(observed["a"].unsqueeze(-1), x["a"], 0.0)
        pyro.module("network", network)
        amortised(network, {"a": values})

    fit(model(name), rows(missing=True), guide=guide, epochs=1, batch_size=64, **QUIET)
    assert shapes == {(8,), (64,)}  # the look at the first rows, and the epoch


def test_the_weights_of_a_users_guide_are_restored_too():
    vae, network = model(), Network()
    before = weights(network)
    with pytest.warns(UserWarning, match="not finite in epoch 0"):
        fit(vae, rows(), guide=network.guide, objective=Failing(2), batch_size=16, **QUIET)
    assert equal(weights(network), before)


def test_frozen_parameters_stay():
    vae = model()
    vae.generative.requires_grad_(False)
    before, experts = weights(vae.generative), weights(vae.experts)
    fit(vae, rows(), epochs=1, **QUIET)
    assert equal(weights(vae.generative), before)
    assert not equal(weights(vae.experts), experts)


# Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mvae", "mmvae", "jmvae", "jnf", "nexus", "cvae", "dmvae"])
def test_mixed_precision_is_for_encoders_and_decoders_alone(name):
    """In a density, 8 bits are a grid of whole nats; in values of 1000.5, one of units."""
    torch.set_default_dtype(torch.float32)
    vae, seen, networks = model(name), [], []
    data, _ = rows().tensors()
    x = {"a": data["a"].float() + 1000.5, "b": data["b"].float()}

    class Watched(Trace_ELBO):
        def _get_trace(self, *args):
            traces = super()._get_trace(*args)
            assert not torch.is_autocast_enabled("cpu")
            for site in (each.nodes[key] for each in traces for key in each.nodes):
                if site["type"] == "sample" and "log_prob" in site and site["name"] != "data":
                    seen.extend([site["value"].dtype, site["log_prob"].dtype])
            # The observed rows, whatever their order, are those that were given.
            values = traces[0].nodes["a"]["value"]
            assert torch.isin(values, x["a"]).all()
            return traces

    def watch(module, inputs, output):
        if torch.is_grad_enabled():
            networks.append(torch.is_autocast_enabled("cpu"))

    for network in (vae.experts["a_"].encoder, vae.generative.decoders["a_"]):
        network.register_forward_hook(watch)
    options = {"objective": Watched(), "epochs": 1, "precision": "bf16-mixed"}
    fit(vae, MultimodalDataset(x), **options, **QUIET)
    assert set(seen) == {torch.float32}
    assert networks
    assert all(networks)


@pytest.mark.parametrize("name", ["mvae", "jmvae"])
def test_densities_under_an_autocast_of_the_users_are_no_coarser(name):
    torch.set_default_dtype(torch.float32)
    vae, (x, _) = model(name), rows().tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vae.posterior(x).base_dist.scale.dtype == torch.float32
        assert all(p.mean.dtype == torch.float32 for p in vae.decode(torch.zeros(3, 2)).values())
        assert vae.objective().loss(vae.model, vae.guide, x) > 0  # and one-hot labels add up


# Data ----------------------------------------------------------------------------------------


# The modality that is missing here is CVAE's condition.
@pytest.mark.parametrize("name", [name for name in MULTIMODAL if name != "cvae"])
def test_every_model_learns_from_incomplete_rows(name):
    vae = model(name)
    objective = vae.objective()
    x, observed = rows(missing=True).tensors()

    def loss() -> float:
        pyro.set_rng_seed(7)
        return np.mean([objective.loss(vae.model, vae.guide, x, observed) for _ in range(20)]) / 64

    before = loss()
    history = fit(
        vae, rows(missing=True), epochs=10, batch_size=16, learning_rate=1e-2, **QUIET
    ).history
    assert history.sizes["epoch"] == 10
    after = loss()
    assert after < before - 0.5
    assert bool(np.isfinite(history.loss).all())


def test_what_is_missing_changes_no_weight():
    outcomes = []
    for filler in (0.0, np.nan):
        x, observed = rows(missing=True).tensors()
        b = torch.where(observed["b"].unsqueeze(-1), x["b"], filler)
        vae = model()
        fit(vae, MultimodalDataset({**x, "b": b}, observed), epochs=2, batch_size=16, **QUIET)
        outcomes.append(weights(vae))
    assert equal(*outcomes)


def test_memory_mapped_rows_are_the_same_rows(tmp_path):
    x, _ = rows().tensors()
    mapped = {}
    for name, value in x.items():
        np.save(tmp_path / f"{name}.npy", value.numpy())
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    on_disk = MultimodalDataset(mapped)
    assert on_disk.memory_mapped == ("a", "b")
    outcomes = []
    for data in (on_disk, rows()):
        vae = model()
        fit(vae, data, epochs=2, batch_size=16, **QUIET)
        outcomes.append(weights(vae))
    assert equal(*outcomes)


def test_rows_are_resampled_at_each_epoch():
    asked = []

    def sampler(index: Tensor, epoch: int, seed: int) -> dict[str, Tensor]:
        asked.append((epoch, seed))
        return {"a": torch.randn(len(index), 4, generator=torch.Generator().manual_seed(epoch))}

    x, _ = rows().tensors()
    fit(model(), MultimodalDataset(x, sampler=sampler), epochs=3, seed=5, **QUIET)
    assert asked == [(0, 5), (1, 5), (2, 5)]


# How close it gets ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae", "mvae"])
def test_it_reaches_the_exact_bound_of_a_linear_world(name):
    """Affine encoders can express the exact posteriors of a diagonal world.

    Every ELBO is log p(x) minus KL(q || p(z | x)), which is averaged here over unseen rows. From a
    random start at least nine tenths of that gap are closed, in the posteriors of all subsets.
    """
    sizes = {"a": 3, "b": 4} if name == "mvae" else {"a": 3}
    world = LinearGaussianWorld.random(sizes, 2, seed=0, diagonal=True)
    vae = MODELS[name](
        [
            Modality(
                m.name,
                m.event_shape,
                m.likelihood,
                encoder=Affine(m.event_shape[0]),
                decoder=m.decoder,
            )
            for m in world.modalities()
        ],
        latent_dim=2,
    )
    unseen = world.sample(500, seed=2)
    subsets = [("a",), ("b",), ("a", "b")] if name == "mvae" else [("a",)]

    def gaps() -> Tensor:
        found = []
        for names in subsets:
            x = {m: unseen[m] for m in names}
            with torch.no_grad():
                q = vae.posterior(x)
            bound = world.elbo(q, x, scored=names)
            assert (bound < world.log_prob(x, of=names) + 1e-9).all()
            found.append(world.kl(q, x).mean())
        return torch.stack(found)

    before = gaps()
    data = MultimodalDataset(world.sample(1024, seed=1))
    fit(vae, data, epochs=25, batch_size=64, learning_rate=2e-2, **QUIET)
    assert (gaps() < 0.1 * before).all()


class Affine(nn.Module):
    """An affine location and a free scale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 2)
        self.raw = nn.Parameter(torch.zeros(2))

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.linear(value)
        return loc, nn.functional.softplus(self.raw).expand_as(loc)


# Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "fit: expected epochs, batch_size >= 1, found 0, 128"),
        ({"batch_size": 0}, "fit: expected epochs, batch_size >= 1, found 50, 0"),
        ({"learning_rate": math.nan}, "fit: expected a finite learning_rate >= 0, found nan"),
        (
            {"patience": 3},
            "fit: expected validation rows for patience, found none; pass validation",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fit(model(), rows(), **options, **QUIET)


@pytest.mark.parametrize("where", ["train", "validation"])
def test_a_dict_is_no_data_set(where):
    x, _ = rows().tensors()
    data = {"train": rows(), "validation": rows(), where: x}
    with pytest.raises(TypeError, match=f"fit {where}: expected a MultimodalDataset, found dict"):
        fit(model(), data["train"], validation=data["validation"], **QUIET)


@pytest.mark.parametrize("where", ["train", "validation"])
def test_rows_with_nothing_observed_are_refused(where):
    x, _ = rows().tensors()
    seen = torch.ones(64, dtype=torch.bool)
    seen[[5, 9, 20]] = False
    empty = MultimodalDataset(x, {"a": seen, "b": seen})
    data = {"train": rows(), "validation": rows(), where: empty}
    message = (
        f"{where}: expected something observed in every row, found nothing in row 5 and 2 others"
    )
    with pytest.raises(ValueError, match=message):
        fit(model(), data["train"], validation=data["validation"], **QUIET)


def test_values_are_looked_at_before_training():
    x, _ = rows().tensors()
    x["a"][40, 2] = torch.nan
    with pytest.raises(ValueError, match="modality 'a': .*NaN"):
        fit(model(), MultimodalDataset(x), **QUIET)
    with pytest.raises(ValueError, match="unknown modality 'c'; this model has a, b"):
        fit(model(), MultimodalDataset({"c": x["a"]}), **QUIET)


def test_an_objective_without_anything_to_train_is_refused():
    vae = model()
    vae.requires_grad_(False)
    with pytest.raises(ValueError, match="fit: expected something to train, found no parameter"):
        fit(vae, rows(), **QUIET)


def test_data_that_hold_the_condition_alone_are_refused():
    vae = model("cvae")
    data = MultimodalDataset({"b": rows().tensors()[0]["b"]})
    message = "^fit: expected a loss that depends on .*data that CVAE scores, not only b"
    with pytest.raises(ValueError, match=message):
        fit(vae, data, epochs=1, **QUIET)
