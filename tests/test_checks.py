"""All checks of a model together, and the report's sections about them."""

from collections.abc import Iterator
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

from mmzoo.data import MultimodalDataset, digits
from mmzoo.evaluation.checks import check_model, default_classifiers
from mmzoo.evaluation.datatree import load_datatree, save_datatree
from mmzoo.evaluation.pair import PyroPair
from mmzoo.evaluation.report_checks import check_sections
from mmzoo.models import CVAE, MFM, MVAE

ANSWERED_BY_ALL = {"coherence", "probe", "clustering", "reconstruction"}
GROUPS = {
    *ANSWERED_BY_ALL,
    "calibration",
    "contraction",
    "active_units",
    "kl",
    "shares",
    "agreement",
    "curve",
    "joint_coherence",
    "retrieval",
}


@pytest.fixture(scope="module")
def data() -> Iterator[tuple[MultimodalDataset, MultimodalDataset]]:
    train, test = digits()
    yield train.subset(range(120)), test.subset(range(40))


@pytest.fixture(scope="module")
def trees(data: tuple[MultimodalDataset, MultimodalDataset]) -> dict[str, xr.DataTree]:
    train, test = data
    classifiers = default_classifiers(train, epochs=3)
    found = {}
    for cls in (MVAE, CVAE, MFM):
        torch.manual_seed(0)
        vae = cls(train.modalities or (), latent_dim=2)
        found[vae.title] = check_model(
            vae, test, train=train, classifiers=classifiers, num_rows=30, num_samples=(10, 20)
        )
    return found


def answered(tree: xr.DataTree) -> set[str]:
    return {name for name, node in tree.children.items() if "note" not in node.attrs}


def test_every_question_has_an_answer_or_a_reason(trees: dict[str, xr.DataTree]) -> None:
    assert all(set(tree.children) == GROUPS for tree in trees.values())
    assert answered(trees["MVAE"]) == GROUPS
    assert answered(trees["CVAE"]) == GROUPS - {"agreement", "joint_coherence", "retrieval"}
    assert answered(trees["MFM"]) >= ANSWERED_BY_ALL
    assert "calibration" not in answered(trees["MFM"])
    assert "deterministic" in trees["MFM"]["calibration"].attrs["note"]


def test_the_tree_is_kept_whole(trees: dict[str, xr.DataTree], tmp_path: Path) -> None:
    for tree in trees.values():
        save_datatree(tree, tmp_path / "checks.nc")
        again = load_datatree(tmp_path / "checks.nc")
        assert set(again.children) == GROUPS
        assert answered(again) == answered(tree)
        xr.testing.assert_allclose(again["coherence"].to_dataset(), tree["coherence"].to_dataset())


def test_it_repeats_to_the_bit(data: tuple[MultimodalDataset, MultimodalDataset]) -> None:
    train, test = data
    vae = MVAE(train.modalities or (), latent_dim=2)
    state = torch.get_rng_state()
    one, other = (
        check_model(
            vae,
            test,
            train=train,
            classifiers=default_classifiers(train, epochs=2),
            num_rows=20,
            num_samples=(10,),
        )
        for _ in range(2)
    )
    assert torch.equal(state, torch.get_rng_state())
    for name in GROUPS:
        xr.testing.assert_identical(one[name].to_dataset(), other[name].to_dataset())


def test_without_training_rows_there_are_no_probes(
    data: tuple[MultimodalDataset, MultimodalDataset],
) -> None:
    _, test = data
    told = []
    vae = MVAE(test.modalities or (), latent_dim=2)
    tree = check_model(
        vae, test, num_rows=10, num_samples=(10,), on_check=lambda *each: told.append(each)
    )
    assert "pass train=" in tree["probe"].attrs["note"]
    assert told[0] == ("calibration", 0, len(GROUPS))
    assert told[-1] == ("", len(GROUPS), len(GROUPS))


def test_the_report_tells_what_was_found_and_what_not(trees: dict[str, xr.DataTree]) -> None:
    page = "\n".join(check_sections(trees))
    for heading in ("posteriors be believed", "latents hold", "samples drawn", "used for"):
        assert page.count(f"{heading}") == 1
    held = trees["MVAE"]["coherence"].to_dataset().sel(subset="label", target="image")
    assert f"{100 * float(held['coherence']):.1f} ±" in page
    assert "image from label" in page and "samples agree" in page
    assert "MFM: simulation_based_calibration" in page  # the reason, in the folded list
    assert page.count("<details>") == page.count("</details>") > 3
    assert check_sections({}) == []


def test_a_single_row_is_refused(data: tuple[MultimodalDataset, MultimodalDataset]) -> None:
    vae = MVAE(data[0].modalities or (), latent_dim=2)
    with pytest.raises(ValueError, match="check_model num_rows: expected at least 2, found 1"):
        check_model(vae, data[1], num_rows=1)


def test_a_pair_of_ones_own_has_the_same_answers(
    data: tuple[MultimodalDataset, MultimodalDataset],
) -> None:
    """Two sites, one of them a single number for each row."""
    train, test = data
    torch.manual_seed(0)
    picture, classes = torch.nn.Linear(3, 64), torch.nn.Linear(3, 10)
    reader = torch.nn.Linear(76, 8)

    def model(x: dict[str, torch.Tensor], observed: dict[str, torch.Tensor]) -> None:
        with pyro.plate("data", len(x["image"]), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            contrast = pyro.sample("contrast", dist.Normal(0.0, 1.0))
            logits = contrast.exp()[..., None, None, None] * picture(z).unflatten(-1, (1, 8, 8))
            pyro.sample("image", dist.Bernoulli(logits=logits).to_event(3), obs=x["image"])
            pyro.sample("label", dist.OneHotCategorical(logits=classes(z)), obs=x["label"])

    def guide(x: dict[str, torch.Tensor], observed: dict[str, torch.Tensor]) -> None:
        flags = [observed[name].unsqueeze(-1).to(x["label"].dtype) for name in ("image", "label")]
        seen = [x["image"].flatten(-3) * flags[0], x["label"] * flags[1], *flags]
        loc, raw = reader(torch.cat(seen, -1)).chunk(2, -1)
        scale = raw.exp()
        with pyro.plate("data", len(x["image"]), dim=-1):
            pyro.sample("z", dist.Normal(loc[..., :3], scale[..., :3]).to_event(1))
            pyro.sample("contrast", dist.Normal(loc[..., 3], scale[..., 3]))

    pair = PyroPair(model, guide, list(train.modalities or ()), networks=[picture, classes, reader])
    tree = check_model(
        pair,
        test,
        train=train,
        classifiers=default_classifiers(train, epochs=1),
        num_rows=20,
        num_samples=(10,),
    )
    assert answered(tree) == GROUPS
    latents = [f"z[{d}]" for d in range(3)] + ["contrast"]
    assert list(tree["calibration"]["latent"].values) == latents
