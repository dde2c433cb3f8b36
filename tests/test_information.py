"""What modalities say about each other, and what a proposal does, against the exact world."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from own import own_pair, widened
from torch import Tensor, nn

from mmzoo import Modality
from mmzoo.evaluation.information import information_table, synergy_table, two_proposal_table
from mmzoo.evaluation.likelihood import likelihood_table, log_likelihood
from mmzoo.evaluation.tables import NOT_ASKED, paired_differences, to_markdown, to_pandas
from mmzoo.exact import LinearGaussianWorld
from mmzoo.models import MVAE

EXACT = 1e-10
# Standard errors that an estimate may be off: beyond 5 once in two million.
ERRORS = 5.0
SIZES = {"a": 3, "b": 2, "c": 2}
NAMES = list(SIZES)
N = 12


class Wider(nn.Module):
    """An expert whose scale is too large: estimates have an error, and bounded weights."""

    def __init__(self, encoder: nn.Module, width: float) -> None:
        super().__init__()
        self.encoder, self.width = encoder, width

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.encoder(value)
        return loc, self.width * scale


def exact_model(names=NAMES, width=1.0):
    """A world, and a model of these of its modalities, exact for every subset if `width` is 1."""
    world = LinearGaussianWorld.random(SIZES, 2, seed=3, diagonal=True)
    modalities = [m for m in world.modalities(encoder="exact") if m.name in names]
    if width != 1:
        modalities = [replace(m, encoder=Wider(m.encoder, width)) for m in modalities]
    return world, MVAE(modalities, latent_dim=2)


def rows_of(world):
    """Rows with gaps, none of them empty, and NaN in the gaps."""
    x = world.sample(N, seed=4)
    mask = torch.rand(N, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[torch.arange(N), torch.arange(N) % 3] = True
    observed = dict(zip(NAMES, mask.unbind(-1)))
    return {n: torch.where(observed[n].unsqueeze(-1), x[n], torch.nan) for n in x}, observed


# Information ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1.0, 1.4])
def test_information_is_that_of_the_exact_world(width):
    world, vae = exact_model(width=width)
    x, observed = rows_of(world)
    table = information_table({"it": vae}, x, observed, num_samples=400).sel(model="it")
    assert table.sizes["quantity"] == 6 + 3
    for cell in (table.isel(quantity=i) for i in range(9)):
        m, n = str(cell.modality.values), str(cell.given.values)
        given = [n] if n in NAMES else [other for other in NAMES if other != m]
        assert cell["quantity"] == f"i({m}; {n})"
        some = torch.stack([observed[name] for name in given]).any(0) & observed[m]
        exact = world.log_prob(x, observed, of=[m], given=given)
        exact = (exact - world.log_prob(x, observed, of=[m])).where(some, torch.nan).numpy()
        np.testing.assert_array_equal(np.isnan(cell.log_prob), np.isnan(exact))
        error = np.abs(cell.log_prob.values - exact)[some.numpy()]
        np.testing.assert_array_less(error, ERRORS * cell.row_mcse.values[some.numpy()] + EXACT)
        values = cell.log_prob.values[some.numpy()]
        np.testing.assert_allclose(cell["mean"], values.mean(), rtol=EXACT)
        paired = values.std(ddof=1) / math.sqrt(len(values))
        np.testing.assert_allclose(cell.standard_error, paired, rtol=EXACT)
        assert cell.num_rows == int(some.sum())
        assert (cell.mcse > 1e-3) == (width > 1)


def test_information_is_symmetric():
    world, vae = exact_model(width=1.4)
    table = information_table({"it": vae}, *rows_of(world), num_samples=50).sel(model="it")
    for m, n in (("a", "b"), ("a", "c"), ("b", "c")):
        one, other = (table.sel(quantity=f"i({i}; {j})") for i, j in ((m, n), (n, m)))
        np.testing.assert_array_equal(one.log_prob, other.log_prob)
        assert one["mean"] == other["mean"]


def test_mean_information_is_the_mutual_information():
    world, vae = exact_model(["a", "b"])
    x = world.sample(4000, seed=1)
    table = information_table({"it": vae}, {n: x[n] for n in "ab"}, num_samples=2)
    weight = torch.cat([world.weights[n] for n in "ab"])
    noise = torch.cat([world.scales[n] for n in "ab"]) ** 2
    covariance = weight @ weight.T + noise.diag()
    exact = 0.5 * (covariance[:3, :3].logdet() + covariance[3:, 3:].logdet() - covariance.logdet())
    found = table.sel(model="it", quantity="i(a; b)")
    assert abs(float(found["mean"]) - exact) < ERRORS * float(found.standard_error)
    assert exact > 4 * ERRORS * float(found.standard_error)  # which is far from nothing
    # Errors of the two likelihoods would hide what their paired difference shows.
    both = likelihood_table(
        {"it": vae},
        {n: x[n] for n in "ab"},
        quantities=[("a", "b"), ("a", ())],
        num_samples=2,
    )
    assert np.hypot(*both.standard_error.values[0]) > 1.2 * float(found.standard_error)


def test_modalities_that_share_nothing_have_no_information():
    world = LinearGaussianWorld.random({"a": 2, "b": 2}, 2, seed=0, diagonal=True)
    world.weights["a"][:, 1] = 0
    world.weights["b"][:, 0] = 0
    vae = MVAE(world.modalities(encoder="exact"), latent_dim=2)
    table = information_table({"it": vae}, world.sample(20, seed=0), num_samples=2)
    np.testing.assert_allclose(table.log_prob, 0, atol=EXACT)


def test_model_without_a_modality_has_a_note():
    world, vae = exact_model()
    _, small = exact_model(["a", "b"])
    table = information_table({"all": vae, "small": small}, world.sample(5, seed=0), num_samples=2)
    own = table.sel(quantity=["i(a; b)", "i(b; a)"])
    np.testing.assert_allclose(own["mean"][0], own["mean"][1], atol=EXACT)
    assert "small has no modality c" in str(
        table.note.sel(model="small", quantity="i(a; c)").values
    )
    assert np.isnan(table["mean"].sel(model="small", quantity="i(a; all others)"))
    assert (table.note.sel(model="all") == "").all()


def test_information_of_models_is_compared_row_by_row():
    world, vae = exact_model()
    table = information_table({"x": vae, "y": vae}, world.sample(5, seed=0), num_samples=2)
    found = paired_differences(table, reference="x")
    np.testing.assert_allclose(found.difference, 0, atol=EXACT)
    assert "i(a; all others)" in to_markdown(table)


def test_information_needs_two_modalities():
    world, vae = exact_model(["a"])
    with pytest.raises(ValueError, match="expected at least two modalities, found a"):
        information_table({"it": vae}, {"a": world.sample(3, seed=0)["a"]})
    with pytest.raises(ValueError, match="information_table: expected at least one model, found"):
        information_table({}, world.sample(3, seed=0))


# Proposals --------------------------------------------------------------------------------------


def test_synergy_table_estimates_one_number_three_times():
    world, vae = exact_model(width=1.4)
    x, observed = rows_of(world)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = synergy_table({"it": vae}, x, observed, num_samples=4000).sel(model="it")
    assert table["proposal"].values.tolist() == ["all", "others", "own"]
    for m in NAMES:
        exact = world.log_prob(x, observed, of=[m]).numpy()
        for proposal in ("all", "others", "own"):
            cell = table.sel(quantity=f"log p({m})", proposal=proposal)
            kept = ~np.isnan(exact) & (cell.row_pareto_k.values < 0.7)
            assert kept.sum() >= 0.5 * (~np.isnan(exact)).sum()
            error = np.abs(cell.log_prob.values - exact)[kept]
            np.testing.assert_array_less(error, ERRORS * cell.row_mcse.values[kept] + EXACT)
    # What differs is how good the proposals are.
    mcse = table.mcse.mean("quantity")
    assert mcse.sel(proposal="own") < mcse.sel(proposal="others")


def test_synergy_table_repeats_log_likelihood():
    world, vae = exact_model(width=1.4)
    x = world.sample(N, seed=4)
    table = synergy_table({"it": vae}, x, num_samples=30, seed=5)
    with pytest.warns(UserWarning, match="the proposal sees b, c, which is not scored"):
        first = log_likelihood(vae, x, of="a", proposal=NAMES, num_samples=30, seed=5)
    cell = table.sel(model="it", quantity="log p(a)", proposal="all")
    np.testing.assert_array_equal(cell.log_prob, first.log_prob)
    np.testing.assert_array_equal(cell.row_pareto_k, first.pareto_k)


def test_two_proposals_side_by_side():
    world, vae = exact_model(["a", "b"], width=1.4)
    x, observed = rows_of(world)
    x, observed = ({n: each[n] for n in "ab"} for each in (x, observed))
    some = observed["a"] | observed["b"]
    x, observed = ({n: v[some] for n, v in each.items()} for each in (x, observed))
    table = two_proposal_table({"it": vae}, x, observed, num_samples=2000).sel(model="it")
    assert table["quantity"].values.tolist() == [
        "log p(a, b)",
        "log p(a)",
        "log p(a | b)",
        "log p(b)",
    ]
    assert table["proposal"].values.tolist() == ["q(z | a, b)", "q(z | a)", "p(z)"]
    exact = {
        "log p(a, b)": world.log_prob(x, observed, of=["a", "b"]),
        "log p(a)": world.log_prob(x, observed, of=["a"]),
        "log p(a | b)": world.log_prob(x, observed, of=["a"], given=["b"]),
        "log p(b)": world.log_prob(x, observed, of=["b"]),
    }
    for quantity, values in exact.items():
        for proposal in table["proposal"].values:
            cell = table.sel(quantity=quantity, proposal=proposal)
            if (quantity == "log p(b)") != (proposal == "p(z)"):
                assert np.isnan(cell["mean"]) and cell.note == NOT_ASKED
                continue
            np.testing.assert_array_equal(np.isnan(cell.log_prob), values.isnan().numpy())
            kept = ~values.isnan().numpy() & (cell.row_pareto_k.values < 0.7)
            assert kept.sum() >= 0.5 * (~values.isnan()).sum()
            error = np.abs(cell.log_prob.values - values.numpy())[kept]
            np.testing.assert_array_less(error, ERRORS * cell.row_mcse.values[kept] + EXACT)
    # The chain rule holds within a proposal, where a row has both.
    both = (observed["a"] & observed["b"]).numpy()
    for proposal in ("q(z | a, b)", "q(z | a)"):
        chain = table.log_prob.sel(quantity="log p(a | b)", proposal=proposal)
        chain = chain + table.log_prob.sel(quantity="log p(b)", proposal="p(z)")
        joint = table.log_prob.sel(quantity="log p(a, b)", proposal=proposal)
        np.testing.assert_allclose(chain[both], joint[both], rtol=0, atol=EXACT)


def test_two_proposals_of_chosen_sides_and_models():
    world, vae = exact_model()
    _, small = exact_model(["a", "b"])
    x = world.sample(5, seed=0)
    table = two_proposal_table({"all": vae, "small": small}, x, of="c", num_samples=5)
    assert table["proposal"].values.tolist() == ["q(z | a, b, c)", "q(z | c)", "p(z)"]
    first = table.sel(quantity="log p(c | a, b)", proposal="q(z | c)")
    assert first.note.values.tolist() == ["", "small has no modality c"]
    other = two_proposal_table({"all": vae}, x, given="c", num_samples=5)
    assert other["quantity"].values[0] == "log p(a, b, c)"
    frame = to_pandas(other)
    assert len(frame) == 7 and set(frame["note"]) == {""}
    assert to_markdown(other).splitlines()[0].count(" by ") == 7


def test_progress_names_quantity_and_proposal():
    world, vae = exact_model()
    told = []
    two_proposal_table(
        {"M": vae}, world.sample(5, seed=0), num_samples=2, on_chunk=lambda *a: told.append(a)
    )
    assert told[0] == ("M log p(a, b, c) by a, b, c", 5, 5)
    assert ("M log p(c) by the prior", 5, 5) in told and len(told) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "q"}, "two_proposal_table of: unknown modality 'q'; this model has a, b, c"),
        ({"of": NAMES}, r"expected two disjoint non-empty sets of modalities, found of=\['a'"),
        ({"of": ["a", "b"], "given": ["b"]}, "expected two disjoint non-empty sets"),
    ],
)
def test_sides_that_do_not_go_together_are_refused(options, message):
    world, vae = exact_model()
    with pytest.raises(ValueError, match=message):
        two_proposal_table({"it": vae}, world.sample(3, seed=0), **options)


def test_pair_of_ones_own_answers_with_every_proposal():
    world = LinearGaussianWorld.random({"a": 3, "b": 2}, latent_dim=2, seed=3)
    pair, x = own_pair(world, widened(1.3)), world.sample(6, seed=1)
    proposals = two_proposal_table({"own": pair}, x, num_samples=2000)
    information = information_table({"own": pair}, x, num_samples=2000)
    joint, a, b = (world.log_prob(x, of=of) for of in (["a", "b"], ["a"], ["b"]))
    exact = {"log p(a, b)": joint, "log p(a)": a, "log p(a | b)": joint - b, "log p(b)": b}
    for table, values in ((proposals, exact), (information, {"i(a; b)": joint - a - b})):
        for quantity, expected in values.items():
            cell = table.sel(model="own", quantity=quantity)
            error = abs(cell.log_prob - xr.DataArray(expected.numpy(), dims="row"))
            kept = (cell.row_pareto_k < 0.7) & cell.log_prob.notnull()
            assert kept.sum() >= 4
            assert bool((error < ERRORS * cell.row_mcse).where(kept, True).all())
    assert np.isnan(proposals["mean"].values).sum() == 12 - 7


def test_quantity_that_is_not_defined_is_an_empty_cell_with_the_reason():
    class WithoutB(MVAE):
        def unsupported(self, of, given=()):
            return "it is always given b" if set(of) == {"b"} else None

    world, _ = exact_model()
    vae = WithoutB(world.modalities(encoder="exact"), latent_dim=2)
    table = synergy_table({"it": vae}, world.sample(3, seed=0), num_samples=2).sel(model="it")
    assert (table.note.sel(quantity="log p(b)") == "it is always given b").all()
    assert (table.note.sel(quantity="log p(a)") == "").all()
    assert isinstance(vae.modalities["a"], Modality)
