r"""What modalities say about each other, and what a proposal does to an estimate.

The information that ``x_n`` gives about ``x_m`` is, row by row,

    i(m; n) = log p(x_m | x_n) - log p(x_m) = log p(x_m, x_n) - log p(x_m) - log p(x_n)

in nats: what a model that has seen one modality gains when it predicts the other. It is symmetric,
and its mean over rows from the model itself is the mutual information of the two.

A *synergy table*, log p(x_m) under proposals that see both modalities, the other one, or x_m alone,
is often read in the same way. It is not that: log p(x_m) is one number, and the three columns are
three estimates of it. Where they differ they tell how well each proposal covers the posterior
p(z | x_m), never how much a modality helps. :func:`information_table` answers that question.

Estimating Mutual Information by pointwise terms (Church and Hanks, 1990),
https://aclanthology.org/J90-1003/
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from mmzoo.batch import modality_names
from mmzoo.evaluation.likelihood import likelihood_table, log_likelihood, quantity_name
from mmzoo.evaluation.pair import Pair
from mmzoo.evaluation.tables import NOT_ASKED, ROW_VARIABLES, table_of_rows

__all__ = ["information_table", "synergy_table", "two_proposal_table"]

OTHERS = "all others"

Tell = Callable[[str, int, int], None] | None
Rows = dict[str, np.ndarray]


def information_table(
    models: Mapping[str, Pair],
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    num_samples: int = 1000,
    prior_share: float = 0.0,
    target_mcse: float | None = None,
    max_samples: int | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    on_chunk: Tell = None,
) -> xr.Dataset:
    """How much every modality tells about every other one, and all others together.

    Args:
        models: Title to model.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``; a row counts where it has both sides. Of "all others"
            it uses those that it has.
        num_samples: As in :func:`mmzoo.evaluation.likelihood_table`, and so are the others.
        prior_share: Share of the draws that comes from the prior.
        target_mcse: Standard error of every marginal, of which an information has three.
        max_samples: No marginal of a row gets more draws.
        chunk_size: Draws that are decoded at a time.
        seed: Of the draws.
        on_chunk: Called with the marginal's title, the rows done and the rows in all.

    Returns:
        A table as of :func:`mmzoo.evaluation.likelihood_table` over ``model`` and ``quantity``,
        named ``i(image; label)``, with the coordinates ``modality`` (what is predicted) and
        ``given``: ``mean`` in nats, its ``standard_error`` over rows (paired: of the rows'
        differences) and so on. ``i(m; n)`` and ``i(n; m)`` are the same numbers.

    Raises:
        ValueError: For no models, fewer than two modalities, or a bad batch.
    """
    names = _known_names(models, "information_table")
    if len(names) < 2:
        raise ValueError(
            f"information_table: expected at least two modalities, found {', '.join(names)}"
        )
    pairs = [(m, [n]) for m in names for n in names if n != m]
    if len(names) > 2:
        pairs += [(m, [n for n in names if n != m]) for m in names]
    sets = {_ordered(names, part): None for m, given in pairs for part in ([m], given, [m, *given])}
    marginals = likelihood_table(
        models,
        x,
        observed,
        quantities=[(each, ()) for each in sets],
        num_samples=num_samples,
        prior_share=prior_share,
        target_mcse=target_mcse,
        max_samples=max_samples,
        chunk_size=chunk_size,
        seed=seed,
        on_chunk=on_chunk,
    )
    shape = (len(models), len(pairs), marginals.sizes["row"])
    rows = {kind: np.full(shape, np.nan) for kind in ROW_VARIABLES}
    note = np.full(shape[:2], "", dtype=object)
    for j, (m, given) in enumerate(pairs):
        parts = [quantity_name(_ordered(names, p)) for p in ([m, *given], [m], given)]
        for i in range(len(models)):
            cells = [marginals.isel(model=i).sel(quantity=part) for part in parts]
            note[i, j] = next((str(c["note"].values) for c in cells if c["note"] != ""), "")
            for kind, values in _information(cells).items():
                rows[kind][i, j] = values
    labels = [(m, given[0] if len(given) == 1 else OTHERS) for m, given in pairs]
    coords = {"model": list(models), "quantity": [f"i({m}; {given})" for m, given in labels]}
    table = table_of_rows(rows, coords, note=note, attrs=marginals.attrs)
    return table.assign_coords(
        modality=("quantity", [m for m, _ in labels]), given=("quantity", [g for _, g in labels])
    )


def _information(cells: Sequence[xr.Dataset]) -> Rows:
    """Of the rows, from the joint likelihood and the two that it is compared with."""
    log_prob, mcse, k = (
        np.stack([cell[name].values for cell in cells]) for name in ROW_VARIABLES.values()
    )
    # The two are added first: the sum does not depend on which of them comes first.
    return {
        "log_prob": log_prob[0] - (log_prob[1] + log_prob[2]),
        "mcse": np.sqrt(np.square(mcse).sum(0)),
        "pareto_k": np.fmax.reduce(k),
    }


def synergy_table(
    models: Mapping[str, Pair],
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    seed: int = 0,
    on_chunk: Tell = None,
) -> xr.Dataset:
    """``log p(x_m)`` with proposals that see everything, the other modalities, or ``x_m`` alone.

    The three are estimates of *one* number. Their differences measure the proposals, not how
    modalities help each other: a proposal that sees more than is scored is too narrow for
    ``p(z | x_m)``, has heavy-tailed weights and falls short; one that sees the others alone looks
    in the wrong place. Only ``own`` is an estimate to rely on; for what modalities give each
    other use :func:`information_table`. Every row has what it observes of each proposal, and one
    that observes nothing of the others gets the prior as a proposal.

    Args:
        models: Title to model.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        num_samples: K, draws of each row and estimate.
        chunk_size: Draws that are decoded at a time.
        seed: Of the draws; every cell has draws of its own.
        on_chunk: Called with the cell's title, the rows done and the rows in all.

    Returns:
        A table over ``model``, ``quantity`` and ``proposal`` (``all``, ``others``, ``own``).
    """
    names = _known_names(models, "synergy_table")
    asked = {}
    for m in names:
        others = [n for n in names if n != m]
        for title, sees in (("all", names), ("others", others), ("own", [m])):
            asked[quantity_name([m]), title] = ([m], (), sees)
    return _proposal_table(models, x, observed, asked, num_samples, chunk_size, seed, on_chunk)


def two_proposal_table(
    models: Mapping[str, Pair],
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    of: str | Sequence[str] | None = None,
    given: str | Sequence[str] | None = None,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    seed: int = 0,
    on_chunk: Tell = None,
) -> xr.Dataset:
    """Likelihoods with two proposals side by side, as in table 1 of the set-attention paper.

    With x for `of` and y for `given`: log p(x, y), log p(x) and log p(x | y) are estimated with
    q(z | x, y) and with q(z | x); log p(y), which the third subtracts, by sampling the prior. A
    proposal that sees more or less than is scored is what the layout compares: mind ``pareto_k``,
    and use :func:`mmzoo.evaluation.likelihood_table` for the estimates to rely on.

    Generaling Multimodal Variational Methods to Sets (2022), table 1, K = 1000,
    https://openreview.net/forum?id=_uR2KmSfU8g

    Args:
        models: Title to model.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        of: The names of x; default: all but the last modality.
        given: The names of y; default: those that are not in `of`.
        num_samples: K, draws of each row and estimate.
        chunk_size: Draws that are decoded at a time.
        seed: Of the draws; every estimate has draws of its own.
        on_chunk: Called with the cell's title, the rows done and the rows in all.

    Returns:
        A table over ``model``, ``quantity`` and ``proposal``, which is named ``q(z | x, y)``,
        ``q(z | x)`` and ``p(z)`` with the modalities' names; what is not asked for is NaN.

    Raises:
        ValueError: For no models, unknown names, or x and y that are empty or overlap.
    """
    names = _known_names(models, "two_proposal_table")
    if of is None:
        known = [] if given is None else modality_names(dict.fromkeys(names), given, "given")
        of = [n for n in names if n not in known] if known else names[:-1]
    of = modality_names(dict.fromkeys(names), of, "two_proposal_table of")
    rest = [n for n in names if n not in of] if given is None else given
    given = modality_names(dict.fromkeys(names), rest, "two_proposal_table given")
    if not of or not given or set(of) & set(given):
        raise ValueError(
            "two_proposal_table: expected two disjoint non-empty sets of modalities, found "
            f"of={list(of)}, given={list(given)}"
        )
    both = list(_ordered(names, (*of, *given)))
    asked: dict[tuple[str, str], tuple[list[str], Sequence[str], Sequence[str]]] = {}
    for sees in (both, list(of)):
        title = f"q(z | {', '.join(sees)})"
        asked[quantity_name(both), title] = (both, (), sees)
        asked[quantity_name(of), title] = (list(of), (), sees)
        asked[quantity_name(of, given), title] = (list(of), given, sees)
    asked[quantity_name(given), "p(z)"] = (list(given), (), ())
    return _proposal_table(models, x, observed, asked, num_samples, chunk_size, seed, on_chunk)


def _proposal_table(
    models: Mapping[str, Pair],
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None,
    asked: Mapping[tuple[str, str], tuple[list[str], Sequence[str], Sequence[str]]],
    num_samples: int,
    chunk_size: int | None,
    seed: int,
    on_chunk: Tell,
) -> xr.Dataset:
    """Each ``(quantity, proposal)`` by importance sampling; ``log p(given)`` from the prior."""
    quantities = list(dict.fromkeys(quantity for quantity, _ in asked))
    proposals = list(dict.fromkeys(proposal for _, proposal in asked))
    shape = (len(models), len(quantities), len(proposals))
    num_rows = max((len(value) for value in x.values()), default=0)
    rows = {kind: np.full((*shape, num_rows), np.nan) for kind in ROW_VARIABLES}
    note = np.full(shape, NOT_ASKED, dtype=object)
    for i, (title, vae) in enumerate(models.items()):
        known: dict[tuple[tuple[str, ...], tuple[str, ...]], Rows] = {}

        def estimate(
            names: Sequence[str],
            sees: Sequence[str],
            known: dict[Any, Rows] = known,
            vae: Pair = vae,
            title: str = title,
        ) -> Rows:
            key = (tuple(names), tuple(sees))
            if key not in known:
                tell = None
                if on_chunk is not None:
                    what = f"{title} {quantity_name(names)} by {', '.join(sees) or 'the prior'}"
                    tell = _titled(on_chunk, what)
                known[key] = _estimate(
                    vae, x, observed, names, sees, num_samples, chunk_size, seed + len(known), tell
                )
            return known[key]

        for (quantity, proposal), (of, given, sees) in asked.items():
            cell = (i, quantities.index(quantity), proposals.index(proposal))
            note[cell] = _obstacle(title, vae, [*of, *given], sees)
            if note[cell]:
                continue
            found = estimate((*of, *given) if given else of, sees)
            if given:
                found = _conditional(found, estimate(given, ()), estimate(of, sees))
            for kind in rows:
                rows[kind][cell] = found[kind]
    coords = {"model": list(models), "quantity": quantities, "proposal": proposals}
    attrs = {"num_samples": num_samples, "seed": seed, "units": "nats per row"}
    return table_of_rows(rows, coords, note=note, attrs=attrs)


def _conditional(joint: Rows, known: Rows, scored: Rows) -> Rows:
    """Joint minus known, where a row has what is scored; one that knows nothing has a marginal."""
    nothing = np.isnan(known["log_prob"])
    absent = np.isnan(scored["log_prob"])
    found = {
        "log_prob": joint["log_prob"] - np.where(nothing, 0.0, known["log_prob"]),
        "mcse": np.hypot(joint["mcse"], np.where(nothing, 0.0, known["mcse"])),
        "pareto_k": np.fmax(joint["pareto_k"], known["pareto_k"]),
    }
    return {kind: np.where(absent, np.nan, values) for kind, values in found.items()}


def _estimate(
    vae: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None,
    names: Sequence[str],
    sees: Sequence[str],
    num_samples: int,
    chunk_size: int | None,
    seed: int,
    tell: Callable[[int, int], None] | None,
) -> Rows:
    here = {name: value for name, value in x.items() if name in vae.modalities}
    masks = {name: mask for name, mask in (observed or {}).items() if name in vae.modalities}
    with _comparing_proposals():
        found = log_likelihood(
            vae,
            here,
            masks,
            of=list(names),
            proposal=list(sees),
            num_samples=num_samples,
            chunk_size=chunk_size,
            seed=seed,
            on_chunk=tell,
        )
    return {kind: found[kind].values for kind in ROW_VARIABLES}


@contextmanager
def _comparing_proposals() -> Iterator[None]:
    """No warning of a proposal that sees more than is scored: it is what these tables show."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "log_likelihood: the proposal sees", UserWarning)
        yield


def _titled(tell: Callable[[str, int, int], None], title: str) -> Callable[[int, int], None]:
    return lambda done, total: tell(title, done, total)


def _obstacle(title: str, vae: Pair, names: Sequence[str], sees: Sequence[str]) -> str:
    """Why a model cannot answer; "" if it can."""
    absent = [name for name in dict.fromkeys((*names, *sees)) if name not in vae.modalities]
    if absent:
        return f"{title} has no modality {', '.join(absent)}"
    for part in (names, sees):
        if part and (reason := vae.unsupported(list(part))):
            return reason
    return ""


def _known_names(models: Mapping[str, Pair], where: str) -> list[str]:
    if not models:
        raise ValueError(f"{where}: expected at least one model, found none; pass {{title: vae}}")
    return list(dict.fromkeys(name for vae in models.values() for name in vae.modalities))


def _ordered(names: Sequence[str], part: Iterable[str]) -> tuple[str, ...]:
    kept = set(part)
    return tuple(name for name in names if name in kept)
