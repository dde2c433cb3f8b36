"""FMW-VAE: its objective in closed form, and style that is carried over."""

import math

import pytest
import torch
from private import PrivateWorld
from sklearn.linear_model import LogisticRegression

from mmzoo import combine
from mmzoo.data import digits
from mmzoo.inference import fit
from mmzoo.models import FMWVAE

SIZES = {"a": 5, "b": 4, "c": 4}
NAMES = list(SIZES)
ERRORS = 5.0


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def holes(x):
    rows = len(next(iter(x.values())))
    bits = 1 + torch.arange(rows) % 7
    return x, {name: (bits >> place) % 2 == 1 for place, name in enumerate(x)}


@pytest.mark.parametrize("weight", [0.0, 4.0])
def test_objective_is_its_closed_form(weight):
    world = PrivateWorld(SIZES)
    vae = FMWVAE(world.parts(), 2, private_dim=2)
    x, observed = holes(world.sample(7, seed=2))
    with torch.no_grad():
        loc, scale = vae.encode(x, observed)
        exact = -weight * combine.pairwise_squared_wasserstein(
            loc, scale, torch.stack(list(observed.values()), -1)
        )
        for m, name in enumerate(NAMES):
            seen = {n: mask & (n == name) for n, mask in observed.items()}
            latent = world.latent(vae, (loc[:, m], scale[:, m]), x, seen)
            bound = world.elbo(latent, x, seen, scored=[name])
            exact = exact + torch.where(observed[name], bound, 0.0)
    exact = exact.sum()
    elbo = vae.objective(alignment_weight=weight)
    times = 100
    many = {n: v.repeat(times, 1) for n, v in x.items()}
    masks = {n: v.repeat(times) for n, v in observed.items()}
    found = torch.tensor([-elbo.loss(vae.model, vae.guide, many, masks) for _ in range(30)]) / times
    se = found.std() / math.sqrt(30)
    assert (found.mean() - exact).abs() < ERRORS * se


def test_alignment_leaves_private_codes_alone():
    vae = FMWVAE(PrivateWorld(SIZES).parts(), 2, private_dim=2)
    x = PrivateWorld(SIZES).sample(5, seed=1)
    (term,) = vae.objective(alignment_weight=1.0).alignment
    distance = term.terms(vae, x).sum()
    (grad,) = torch.autograd.grad(distance, vae.experts["a_"].head.weight)
    common, private = grad.view(2, 4, -1).split(2, 1)  # loc and scale of (z, w)
    assert torch.equal(private, torch.zeros_like(private))
    assert common.abs().sum() > 0


def styled():
    world = PrivateWorld(SIZES, diagonal=True)
    vae = FMWVAE(world.parts("posteriors"), 2, private_dim={"a": 2, "b": 2, "c": 2})
    x = world.sample(12, seed=1)
    return world, vae, x, torch.arange(12) % 3


def test_class_codes_are_means_over_the_rows_that_have_the_modality():
    world, vae, x, classes = styled()
    observed = {"a": torch.arange(12) != 4}
    x["a"][4] = torch.nan
    codes = vae.class_codes({n: x[n] for n in ("a", "b")}, classes, observed)
    assert set(codes) == {"a", "b"}
    for name, found in codes.items():
        exact = world.posterior({name: x[name].nan_to_num()}).mean[:, world.columns(name)[2:]]
        for c in range(3):
            rows = classes == c
            rows = rows & observed[name] if name in observed else rows
            close(found[c], exact[rows].mean(0))


def test_transfer_keeps_the_content_and_takes_the_style():
    world, vae, train, classes = styled()
    codes = vae.class_codes(train, classes)
    x = world.sample(4, seed=9)
    found = vae.transfer(x, {"a": codes["a"][1]})
    each = vae.transfer(x, {"a": codes["a"][torch.tensor([2, 0, 1, 1])]})
    z = vae.posterior(x).mean
    for name in NAMES:
        own = vae.private(x)[name].mean
        w = codes["a"][1].expand(4, 2) if name == "a" else own
        close(
            found[name].mean, torch.cat([z, w], -1) @ world.own.weights[name].T + world.biases[name]
        )
    assert torch.equal(each["a"].mean[2:], found["a"].mean[2:])
    assert not torch.equal(each["a"].mean[:2], found["a"].mean[:2])
    # Content from the label alone, style from the training rows: the row's own a is not needed.
    blind = vae.transfer({"b": x["b"]}, {"a": codes["a"][1]})["a"].mean
    z = vae.posterior({"b": x["b"]}).mean
    close(
        blind,
        torch.cat([z, codes["a"][1].expand(4, 2)], -1) @ world.own.weights["a"].T
        + world.biases["a"],
    )


def test_classes_that_do_not_fit_are_refused():
    _, vae, x, classes = styled()
    with pytest.raises(ValueError, match=r"^class_codes: expected classes of shape \(12,\), found"):
        vae.class_codes(x, classes[:3])
    with pytest.raises(ValueError, match=r"rows with 'a' in every class, found none in class 2; n"):
        vae.class_codes(x, torch.where(classes == 2, 3, classes))
    with pytest.raises(ValueError, match=r"'a': expected private codes of size 2, found shape"):
        vae.transfer(x, {"a": torch.zeros(3)})


def test_style_code_changes_the_handwriting_and_not_the_digit():
    """Real digits in the hand of another row, read by a classifier of real digits.

    Without the alignment the private code takes the class along. The picture of a row in its own
    hand shows its class in nine of ten cases, and no digit in another hand is the same picture.
    """
    train, test = digits()
    x, _ = test.tensors()
    truth = x["label"].argmax(-1)
    judge = LogisticRegression(max_iter=2000)
    known, _ = train.tensors()
    judge.fit(known["image"].flatten(1).numpy(), known["label"].argmax(-1).numpy())
    donor = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))
    foreign = truth[donor] != truth

    def shares(alignment_weight: float) -> tuple[float, float, float]:
        """How many show the row's class, how many the donor's, and how far the pixels move."""
        torch.manual_seed(0)
        vae = FMWVAE(train.modalities, latent_dim=8, private_dim={"image": 4})
        objective = vae.objective(
            alignment_weight=alignment_weight, modality_weights={"label": 5.0}
        )
        fit(vae, train, objective=objective, epochs=25, learning_rate=5e-3, progress=False)
        with torch.no_grad():
            w = vae.private(x)["image"].mean
            own, other = (vae.transfer(x, {"image": each})["image"].mean for each in (w, w[donor]))
        shown = torch.as_tensor(judge.predict(other.flatten(1).numpy()))[foreign]
        moved = (own - other)[foreign].square().mean().sqrt().item()
        right, taken = shown == truth[foreign], shown == truth[donor][foreign]
        return right.double().mean().item(), taken.double().mean().item(), moved

    kept, taken, moved = shares(2.0)
    lost, _, _ = shares(0.0)
    error = 5 * (0.25 / int(foreign.sum())) ** 0.5  # of a share, at most
    assert kept > 0.5 + error
    assert taken < 0.3 - error
    assert kept - lost > 0.2 + error
    assert moved > 0.05  # of the range of a pixel
