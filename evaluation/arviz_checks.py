r"""Checks that ArviZ has a name for: comparison of models on rows, leave-one-out, calibration.

**Comparison.** The parameters of a model are fixed by training, the latents are each row's own. A
row that is left out takes its latent with it, so what is left to predict it is the prior:

    elpd_i = log p(x_i) = log \int p(x_i | z) p(z) dz

the marginal likelihood of the row, which :func:`mmzoo.evaluation.log_likelihood` estimates, and no
effective parameters. :func:`compare_models` hands these to ArviZ's `compare`: ranks, differences
with paired standard errors, stacking weights. (It is the *integrated* leave-one-out of models with
latent variables.)

**What ArviZ's own `loo` computes** from log p(x_i | z), z drawn given the very x_i, is an estimate
of the same number by the harmonic mean,

    1 / p(x_i) = E_{p(z | x_i)} [ 1 / p(x_i | z) ],

weights that undo all that x_i said about z: their tails are heavy as soon as it said much, Pareto k
is far above 0.7, and the estimate is far too high. :func:`conditional_loo` offers it with a
warning; `waic`, in ArviZ 0.23 only, fails for the same reason and has no k to tell.

**Calibration.** :func:`pit` gives the probability integral transform of a modality, predicted from
others: uniform over rows if the model is right. ArviZ draws it with `plot_ecdf` (0.23) or
`plot_ecdf_pit` (1.x), mmzoo with `plot_pit`.

`Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC (Vehtari et al.,
2017)`, https://arxiv.org/abs/1507.04544
`Bayesian comparison of latent variable models: conditional versus marginal likelihoods (Merkle et
al., 2019)`, https://doi.org/10.1007/s11336-019-09679-0
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mmzoo.batch import modality_names
from mmzoo.evaluation.pair import Pair, device_of, quiet, row_masks, subset_name
from mmzoo.evaluation.row_draws import draw_rows, predict_rows
from mmzoo.evaluation.tables import UNRELIABLE

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare_models", "conditional_loo", "elpd_data", "pit"]


# Comparison -------------------------------------------------------------------------------------


def compare_models(
    results: Mapping[str, xr.Dataset], *, method: str = "stacking", **options: Any
) -> pd.DataFrame:
    """Ranks models on the same rows by ArviZ's `compare`, from marginal likelihoods.

    Args:
        results: Title to the result of :func:`mmzoo.evaluation.log_likelihood`, or to any dataset
            with `log_prob` over `row`, of the same quantity on the same rows. Rows in which any
            model has no value are left out of all.
        method: Of the model weights: "stacking", "BB-pseudo-BMA" or "pseudo-BMA".
        options: Passed on to `arviz.compare`, such as `reference` of ArviZ 1.x.

    Returns:
        ArviZ's table, best model first, one line for each title, unrounded. Both generations have
        `rank`, `elpd_diff`, `dse`, `se` and `weight`; sums over rows, in nats. In ArviZ 0.23 the
        estimate is `elpd_loo` and differences to the best are positive; in 1.x it is `elpd` and
        they are negative. `warning` (0.23) or `diag_elpd` (1.x) marks a Pareto k above 0.7.

    Raises:
        ValueError: For fewer than two models, or rows or quantities that differ.
    """
    values = _paired(results)
    kept = np.isfinite(np.stack(list(values.values()))).all(0)
    if not kept.any():
        raise ValueError(
            "compare_models: expected rows with a finite log_prob in every model, found none; "
            "compare a quantity that all of them answer"
        )
    az = _arviz()
    data = {name: elpd_data(result.isel(row=kept)) for name, result in results.items()}
    if method.lower() == "stacking":
        # ArviZ takes exp of every row, which underflows in hundreds of nats. What all models have
        # in common in a row changes neither the weights nor any difference.
        common = np.stack([each[kept] for each in values.values()]).max(0)
        for elpd in data.values():
            _shift(elpd, common)
    if not _is_old(az):
        options = {"round_to": "none", **options}
    with warnings.catch_warnings():
        # How ArviZ 0.23 calls pandas is nothing that a reader of the table can change.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return az.compare(data, method=method, **options)


def elpd_data(result: xr.Dataset) -> Any:
    """The `ELPDData` of the installed ArviZ, from log p(x) of each row.

    Args:
        result: `log_prob` and, if known, `pareto_k` over `row`.
    """
    values, rows = result["log_prob"], result.sizes["row"]
    if "pareto_k" in result:
        k = result["pareto_k"]
    else:
        k = xr.full_like(values, -np.inf)
    common: dict[str, Any] = {
        "se": float(np.sqrt(rows * np.var(values.values))),
        "n_samples": int(result.attrs.get("num_samples", 1)),
        "n_data_points": rows,
        "warning": bool((k > UNRELIABLE).any()),
        "pareto_k": k.rename("pareto_shape"),
        "scale": "log",
        "good_k": UNRELIABLE,
    }
    total = float(values.sum())
    az = _arviz()
    if _is_old(az):
        from arviz.stats.stats_utils import ELPDData

        # The first entry of the index names the estimator.
        first = {"elpd_loo": total, "se": common.pop("se"), "p_loo": 0.0}
        entries = first | common | {"loo_i": values.rename("loo_i")}
        return ELPDData(data=list(entries.values()), index=list(entries))
    utils = importlib.import_module("arviz_stats.utils")
    if hasattr(utils, "ELPDDataLOO"):
        kind, own = utils.ELPDDataLOO, {}
    else:
        kind, own = utils.ELPDData, {"kind": "loo"}
    return kind(elpd=total, p=0.0, elpd_i=values.copy(), **common, **own)


def conditional_loo(tree: xr.DataTree, of: str = "joint") -> xr.Dataset:
    """ArviZ's own PSIS leave-one-out of `log_likelihood`, given the latents of the very row.

    It is the harmonic-mean estimate of log p(x), see the top of this module: right only in rows
    whose Pareto k is small, which are those that say little about their latents.

    Args:
        tree: Result of :func:`mmzoo.evaluation.to_datatree`, best with `resampled=True`: the
            identity is one of the exact posterior, not of the guide.
        of: A variable of `log_likelihood`: a modality, or "joint".

    Returns:
        `elpd` and `pareto_k` over `row`, NaN where a row lacks what is scored.

    Raises:
        ValueError: For an unknown variable.

    Warns:
        UserWarning: If Pareto k exceeds 0.7 in any row.
    """
    import arviz_base

    scores = tree["log_likelihood"].to_dataset()
    if of not in scores:
        raise ValueError(
            f"of: expected one of {', '.join(map(str, scores.data_vars))}, found {of!r}"
        )
    values = scores[of]
    kept = np.isfinite(values.transpose("chain", "draw", "row").values).all((0, 1))
    elpd, k = np.full(len(kept), np.nan), np.full(len(kept), np.nan)
    if kept.any():
        array = values.transpose("chain", "draw", "row").isel(row=kept).values
        dims = {of: ["row"]}
        data = arviz_base.from_dict({"log_likelihood": {of: array}}, dims=dims)
        az = _arviz()
        data = az.from_datatree(data) if _is_old(az) else data
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said below, with what to do
            found = az.loo(data, pointwise=True, var_name=of, reff=1.0)
        points = found.loo_i if _is_old(az) else found.elpd_i
        elpd[kept], k[kept] = np.asarray(points), np.asarray(found.pareto_k)
    share = float((k[kept] > UNRELIABLE).mean()) if kept.any() else 0.0
    if share:
        warnings.warn(
            f"conditional_loo: Pareto k exceeds {UNRELIABLE} in {100 * share:.0f} % of the rows, "
            "which are not to be relied on; compare models by compare_models instead",
            stacklevel=2,
        )
    return xr.Dataset(
        {"elpd": ("row", elpd), "pareto_k": ("row", k)},
        coords={"row": scores["row"].values},
        attrs={"of": of, "units": "nats", "estimator": "PSIS-LOO of log p(x | z)"},
    )


def _paired(results: Mapping[str, xr.Dataset]) -> dict[str, np.ndarray]:
    """`log_prob` of every model, after a look at whether they may be compared."""
    if len(results) < 2:
        raise ValueError(
            f"compare_models: expected at least two models, found {len(results)}; "
            "pass {title: log_likelihood(…)}"
        )
    values = {}
    for title, result in results.items():
        if "log_prob" not in result or result["log_prob"].dims != ("row",):
            raise ValueError(
                f"compare_models: expected log_prob over row for {title!r}, found "
                f"{ {str(k): v.dims for k, v in result.items()} }; pass results of log_likelihood"
            )
        values[title] = result["log_prob"].values
    for what, found in (
        ("rows", {str(len(each)) for each in values.values()}),
        ("quantities", {str(each.attrs.get("quantity")) for each in results.values()}),
    ):
        if len(found) > 1:
            raise ValueError(
                f"compare_models: expected the same {what} of every model, found "
                f"{', '.join(sorted(found))}; estimate one quantity on the same rows"
            )
    return values


def _shift(elpd: Any, by: np.ndarray) -> None:
    name = "loo_i" if _is_old(_arviz()) else "elpd_i"
    setattr(elpd, name, getattr(elpd, name) - by)


def _arviz() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 announces its successor
        return importlib.import_module("arviz")


def _is_old(az: ModuleType) -> bool:
    """Whether this is ArviZ 0.23, which works on InferenceData."""
    return hasattr(az, "from_datatree")


# Calibration ------------------------------------------------------------------------------------


def pit(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    target: str,
    given: Sequence[str] | str | None = None,
    num_draws: int = 200,
    resampled: bool = False,
    num_proposals: int = 2000,
    guide: Callable[..., Any] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    r"""Probability integral transform of a modality, predicted from others.

    With K predictions of each entry, drawn from p(x_target | x_given), and U uniform,

        u = ( #{predictions < x} + U (1 + #{predictions = x}) ) / (K + 1)

    is exactly uniform on (0, 1) over rows if the predictions have the distribution of x, whether
    that is continuous or discrete. U-shaped: predictions too narrow; bell-shaped: too wide;
    sloping: shifted. Entries of one row depend on each other, rows do not.

    `Predictive model assessment for count data (Czado et al., 2009)`,
    https://doi.org/10.1111/j.1541-0420.2009.01191.x

    Args:
        pair: The pair.
        x: Name to values `(N, *event_shape)`.
        observed: Name to bool mask `(N,)`.
        target: The modality that is predicted.
        given: What it is predicted from, never itself: default, all others. A row is given what it
            has of them; if it has nothing, its predictions are those of the prior.
        num_draws: K.
        resampled: Whether the latents are resampled with importance weights, which tests the model
            rather than its guide.
        num_proposals: Draws of the guide from which they are resampled.
        guide: A guide over the same sites in place of the pair's own.
        batch_size: Rows that are drawn at a time.
        seed: Seed of the draws; the global random state is left as it was.
        on_progress: Called with the rows done and the rows in all.

    Returns:
        `pit` over `row` and `entry`; a class is one entry, by its index. NaN where a row or an
        entry is missing.

    Raises:
        ValueError: For an unknown name, a target that is given, or a bad batch.
    """
    names = _given(pair, target, given)
    values, masks, rows = row_masks(pair, x, observed)
    if target not in values:
        raise ValueError(
            f"pit: expected values of the target {target!r}, found {', '.join(values)}; pass them "
            "in x"
        )
    if num_draws < 1 or batch_size < 1:
        raise ValueError(
            f"pit: expected num_draws and batch_size of at least 1, found {num_draws} and "
            f"{batch_size}"
        )
    proposals = num_proposals if resampled else 0
    device, parts = device_of(pair), []
    with quiet(pair, seed):
        for start in range(0, rows, batch_size):
            part = slice(start, start + batch_size)
            here = {name: value[part].to(device) for name, value in values.items()}
            shown = {name: (masks[name][part] & (name in names)).to(device) for name in values}
            draws = draw_rows(pair, here, shown, num_draws, guide=guide, num_proposals=proposals)
            predicted = predict_rows(pair, here, draws.latents, draws.lp.shape[-1])[target]
            truth, mask = here[target], masks[target][part]
            parts.append(_ranks(pair, target, truth, predicted, mask.to(device)).cpu().numpy())
            if on_progress:
                on_progress(min(start + batch_size, rows), rows)
    return xr.Dataset(
        {"pit": (("row", "entry"), np.concatenate(parts))},
        attrs={
            "target": target,
            "given": subset_name(names),
            "num_draws": num_draws,
            "num_proposals": proposals,
            "seed": seed,
            "units": "probability",
        },
    )


def _given(pair: Pair, target: str, given: Sequence[str] | str | None) -> tuple[str, ...]:
    modality_names(pair.modalities, [target], "pit target")
    if given is None:
        given = [name for name in pair.modalities if name != target]
    given = modality_names(pair.modalities, given, "pit given")
    if target in given:
        raise ValueError(
            f"pit: expected a target that is not given, found {target!r} in both; a prediction "
            "that has seen what it predicts is not uniform even if the model is right"
        )
    absent = [name for name in pair.always_given if name not in given]
    if absent:
        raise ValueError(
            f"pit: expected given to hold {', '.join(pair.always_given)}, on which "
            f"{pair.title} is conditional, found {', '.join(given) or 'nothing'}; add it"
        )
    return tuple(given)


def _ranks(pair: Pair, name: str, truth: Tensor, predicted: Tensor, mask: Tensor) -> Tensor:
    """Randomised ranks, `(N, entries)`."""
    if pair.modalities[name].likelihood.name == "one_hot_categorical":
        truth = truth.nan_to_num(-1.0) if truth.is_floating_point() else truth
        truth, predicted = truth.argmax(-1), predicted.argmax(-1)
    num, rows = predicted.shape[:2]
    truth, predicted = truth.reshape(rows, -1), predicted.reshape(num, rows, -1)
    below, same = (predicted < truth).sum(0), (predicted == truth).sum(0)
    noise = torch.rand(below.shape, dtype=torch.float64, device=below.device)
    ranks = (below + noise * (1 + same)) / (num + 1)
    present = mask[:, None] & ~truth.isnan()
    return ranks.where(present, torch.nan)
