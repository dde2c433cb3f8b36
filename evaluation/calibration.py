r"""Is q(z | x_S) calibrated? Simulation-based calibration, coverage, and their test.

Rows are drawn from the model itself, and the guide is asked for what it was not told:

    z*, x ~ p(z, x),    z_1 ... z_K ~ q(z | x_S),    rank = #{k: z_k < z*}

If the guide is the posterior of every row, each rank is uniform on 0 ... K: of each latent, and of
any function of z and x_S, of which three are looked at: log p(z, x_S), log p(x_S | z) and
log q(z | x_S). A guide that is too narrow has a rank histogram like a U, one that is shifted a
slope. All subsets S are looked at, since a guide may be right for one and wrong for another.

The test is of the whole empirical distribution of the N ranks. With C_i the number of ranks below
i, which is Binomial(N, i / (K + 1)), and its two-sided tail probability,

    t_i = 2 min{P(C <= C_i), P(C >= C_i)},    statistic = min_i t_i,

whose distribution is known exactly: the chance that a path of binomial counts stays inside a band,
by a recursion over i. The same recursion gives simultaneous bands for a figure.

Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018),
https://arxiv.org/abs/1804.06788
Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit Evaluation and
Multiple Sample Comparison (Säilynoja, Bürkner & Vehtari, 2022), https://arxiv.org/abs/2103.10522
Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test Quantities Shapes
Sensitivity (Modrák et al., 2023), https://arxiv.org/abs/2211.02383
Fast calculation of boundary crossing probabilities for Poisson processes (Moscovich & Nadler,
2017), https://arxiv.org/abs/1503.04363
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy import stats
from torch import Tensor

from mmzoo.evaluation.pair import Pair, device_of, quiet
from mmzoo.evaluation.scored import (
    Densities,
    Shown,
    blocks,
    find_subsets,
    flatten,
    latent_names,
    simulate,
)

__all__ = ["calibration_ecdf", "coverage", "simulation_based_calibration", "uniformity_p_value"]

_STATISTICS = ("log_joint", "log_likelihood", "log_guide")
# Equal tail probabilities are equal although their last digits are not.
_SLACK = 1 + 1e-9

Array = np.ndarray


def simulation_based_calibration(
    pair: Pair,
    *,
    given: Iterable[str | Sequence[str]] | None = None,
    x: Mapping[str, Tensor] | None = None,
    observed: Mapping[str, Tensor] | None = None,
    num_rows: int = 1000,
    num_draws: int = 99,
    guide: Callable[..., Any] | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Ranks of simulated latents among draws of the guide, for every subset, and their test.

    Args:
        pair: A model of the zoo or a pair of your own.
        given: Subsets that the guide is shown; default: every non-empty one, or each modality alone
            and all together if there are more than three.
        x: Values of what is always given, ``(num_rows, *event_shape)``, for a conditional model.
        observed: Name to bool mask ``(num_rows,)``: what a row has of each subset, to check a
            pattern of missing modalities; default: everything. A row with nothing has the prior.
        num_rows: N, simulated rows.
        num_draws: K, draws of each row and subset.
        guide: A Pyro guide over the same sites, in place of the pair's own.
        alpha: How often a calibrated guide may fail, for each subset.
        seed: Of the simulation.
        on_progress: Called with the rows done and the rows in all.

    Returns:
        ``rank`` (subset, row, latent) and ``statistic_rank`` (subset, row, statistic), from 0 to K;
        ``p_value`` (subset, latent) and ``statistic_p_value`` (subset, statistic) of each alone;
        ``subset_p_value`` (subset), corrected for the number of them by Bonferroni, and ``passes``
        (subset): whether that is at least ``alpha``.

    Raises:
        ValueError: For an unknown subset, one that the pair does not answer for, sizes below one,
            or a conditional model without its condition.

    Example:
        >>> from mmzoo.exact import LinearGaussianWorld
        >>> from mmzoo.models import LinearVAE
        >>> world = LinearGaussianWorld.random({"a": 3, "b": 2}, latent_dim=2, seed=0)
        >>> result = simulation_based_calibration(LinearVAE(world.modalities(), 2), num_rows=200)
        >>> result["passes"].values.tolist()  # the posterior of this model is exact
        [True, True, True]
    """
    if num_rows < 1 or num_draws < 1 or not 0 < alpha < 1:
        raise ValueError(
            "simulation_based_calibration: expected num_rows and num_draws of at least 1 and alpha "
            f"in (0, 1), found {num_rows}, {num_draws} and {alpha}"
        )
    where = "simulation_based_calibration"
    subsets = find_subsets(pair, given, where)
    always = _always(pair, x, num_rows)
    masks = _masks(pair, observed, num_rows)
    device = device_of(pair)
    ranks: list[list[Array]] = [[] for _ in subsets]
    names: list[str] = []
    with quiet(pair, seed):
        for rows in blocks(num_rows, num_draws, device):
            latents, values = simulate(
                pair, rows.stop - rows.start, {n: v[rows].to(device) for n, v in always.items()}
            )
            star = {name: value.unsqueeze(0) for name, value in latents.items()}
            names = latent_names(star)
            for subset, found in zip(subsets.values(), ranks, strict=True):
                shown = {name: masks[name][rows].to(device) for name in subset}
                found.append(_ranks(Shown(pair, values, shown, guide), star, num_draws))
            if on_progress:
                on_progress(rows.stop, num_rows)
    result = np.stack([np.concatenate(each) for each in ranks])  # (subset, N, T + statistics)
    return _label(pair, result, list(subsets), names, num_draws, alpha, seed)


def _always(pair: Pair, x: Mapping[str, Tensor] | None, num_rows: int) -> dict[str, Tensor]:
    found = {name: value for name, value in (x or {}).items() if name in pair.always_given}
    for name in pair.always_given:
        if name not in found or len(found[name]) != num_rows:
            rows = len(found[name]) if name in found else "none"
            raise ValueError(
                f"simulation_based_calibration: expected {num_rows} rows of {name!r} in x, which "
                f"{pair.title} is conditional on, found {rows}; pass x={{{name!r}: values}}"
            )
    return found


def _masks(pair: Pair, observed: Mapping[str, Tensor] | None, num_rows: int) -> dict[str, Tensor]:
    for name, mask in (observed or {}).items():
        if name not in pair.modalities or mask.dtype != torch.bool or mask.shape != (num_rows,):
            raise ValueError(
                f"observed[{name!r}]: expected a bool mask of shape ({num_rows},) for one of "
                f"{', '.join(pair.modalities)}, found {mask.dtype} of shape {tuple(mask.shape)}; "
                "one entry for each simulated row"
            )
    full = torch.ones(num_rows, dtype=torch.bool)
    return {**dict.fromkeys(pair.modalities, full), **(observed or {})}


def _ranks(shown: Shown, star: Mapping[str, Tensor], num_draws: int) -> Array:
    """Ranks of the latents and of the statistics, ``(N, T + 3)``."""
    values = shown.draw(num_draws)
    ordered = {name: values[name] for name in star}
    drawn = torch.cat([flatten(ordered), _statistics(shown.densities(values))], -1)
    true = torch.cat([flatten(star), _statistics(shown.densities(star))], -1)
    below, ties = (drawn < true).sum(0), (drawn == true).sum(0)
    # Ties, as of a likelihood of nothing, are broken at random, which keeps ranks uniform.
    below = below + (torch.rand(ties.shape, device=ties.device) * (ties + 1)).floor().long()
    return below.cpu().numpy()


def _statistics(densities: Densities) -> Tensor:
    log_q, log_prior, log_joint = densities
    return torch.stack([log_joint, log_joint - log_prior, log_q], -1)  # (K, N, 3)


def _label(
    pair: Pair,
    ranks: Array,
    subsets: list[str],
    latents: list[str],
    num_draws: int,
    alpha: float,
    seed: int,
) -> xr.Dataset:
    columns = ranks.swapaxes(0, 1).reshape(ranks.shape[1], -1)  # (N, subset * T)
    p_values = uniformity_p_value(columns, num_draws).reshape(len(subsets), -1)
    corrected = np.minimum(1.0, p_values.min(-1) * p_values.shape[-1])
    split = len(latents)
    return xr.Dataset(
        {
            "rank": (("subset", "row", "latent"), ranks[..., :split]),
            "statistic_rank": (("subset", "row", "statistic"), ranks[..., split:]),
            "p_value": (("subset", "latent"), p_values[:, :split]),
            "statistic_p_value": (("subset", "statistic"), p_values[:, split:]),
            "subset_p_value": ("subset", corrected),
            "passes": ("subset", corrected >= alpha),
        },
        coords={
            "subset": subsets,
            "row": np.arange(ranks.shape[1]),
            "latent": latents,
            "statistic": list(_STATISTICS),
        },
        attrs={
            "title": pair.title,
            "num_draws": num_draws,
            "alpha": alpha,
            "seed": seed,
            "units": "rank, from 0 to num_draws",
        },
    )


def calibration_ecdf(calibration: xr.Dataset, *, level: float = 0.95) -> xr.Dataset:
    """What a figure of calibration draws: ECDF minus uniform, and a simultaneous band.

    Args:
        calibration: Result of :func:`simulation_based_calibration`.
        level: How often the whole curve of a calibrated guide stays inside the band, for each
            curve.

    Returns:
        Over ``point``, the share i / (K + 1) of the ranks: ``difference`` (subset, latent, point),
        ``statistic_difference`` (subset, statistic, point), ``lower`` and ``upper`` (point).
    """
    _check_levels("calibration_ecdf", [level])
    num_draws, num_rows = calibration.attrs["num_draws"], calibration.sizes["row"]
    points = np.arange(1, num_draws + 1) / (num_draws + 1)
    lower, upper = _simultaneous_band(num_rows, num_draws, level)
    found = {}
    for name, ranks, dim in (
        ("difference", calibration["rank"], "latent"),
        ("statistic_difference", calibration["statistic_rank"], "statistic"),
    ):
        values = ranks.transpose("subset", dim, "row").values
        counts = np.stack([_counts(each.T, num_draws) for each in values])
        found[name] = (("subset", dim, "point"), counts / num_rows - points)
    return xr.Dataset(
        {
            **found,
            "lower": ("point", lower / num_rows - points),
            "upper": ("point", upper / num_rows - points),
        },
        coords={
            "point": points,
            **{name: calibration[name] for name in ("subset", "latent", "statistic")},
        },
        attrs={**calibration.attrs, "level": level, "units": "difference of probabilities"},
    )


def coverage(
    calibration: xr.Dataset, *, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95)
) -> xr.Dataset:
    """How often posterior regions hold the truth, from the same ranks.

    A rank r of K draws stands for the interval [r, r + 1] / (K + 1), so that a calibrated guide has
    the level itself in expectation, whatever K.

    Args:
        calibration: Result of :func:`simulation_based_calibration`.
        levels: Nominal levels, in (0, 1).

    Returns:
        ``coverage`` and ``standard_error`` (subset, latent, level) of central intervals, and
        ``highest_density`` and ``highest_density_error`` (subset, level) of the regions where
        q(z | x_S) is highest, for all latents together. The errors are binomial, with two successes
        and two failures added so that a coverage of one has an error, too.
    """
    _check_levels("coverage", levels)
    num_draws, wanted = calibration.attrs["num_draws"], np.asarray(levels, dtype=float)
    ranks = calibration["rank"].transpose("subset", "latent", "row").values[..., None]
    central = _inside(ranks, num_draws, (1 - wanted) / 2, (1 + wanted) / 2)
    log_q = calibration["statistic_rank"].sel(statistic="log_guide")
    ranks = log_q.transpose("subset", "row").values[..., None]
    highest = _inside(ranks, num_draws, 1 - wanted, np.ones_like(wanted))
    dims, joint = ("subset", "latent", "level"), ("subset", "level")
    return xr.Dataset(
        {
            "coverage": (dims, central.mean(-2)),
            "standard_error": (dims, _binomial_error(central)),
            "highest_density": (joint, highest.mean(-2)),
            "highest_density_error": (joint, _binomial_error(highest)),
        },
        coords={
            "subset": calibration["subset"],
            "latent": calibration["latent"],
            "level": wanted,
        },
        attrs={**calibration.attrs, "units": "probability"},
    )


def _inside(ranks: Array, num_draws: int, lower: Array, upper: Array) -> Array:
    """The share of [r, r + 1] / (K + 1) that lies between two bounds, ``(..., N, level)``."""
    lower, upper = lower * (num_draws + 1), upper * (num_draws + 1)
    return np.clip(np.minimum(ranks + 1, upper) - np.maximum(ranks, lower), 0.0, None)


def _binomial_error(inside: Array) -> Array:
    num_rows = inside.shape[-2]
    share = (inside.sum(-2) + 2) / (num_rows + 4)
    return np.sqrt(share * (1 - share) / num_rows)


def _check_levels(where: str, levels: Iterable[float]) -> None:
    for level in levels:
        if not 0 < level < 1:
            raise ValueError(f"{where}: expected levels in (0, 1), found {level}; 0.95, say")


def uniformity_p_value(ranks: Array, num_draws: int) -> Array:
    """Exact p-value of the hypothesis that ranks are uniform on 0 ... K.

    Args:
        ranks: Integers, ``(N, T)``, each column a sample of its own.
        num_draws: K.

    Returns:
        The p-values, ``(T,)``: the chance of a count as far out as the farthest one found.

    Example:
        >>> uniformity_p_value(np.arange(100)[:, None] % 20, 19) > 0.99
        array([ True])
    """
    num_rows = len(ranks)
    counts = _counts(ranks, num_draws)  # (T, K)
    tails = _tails(num_rows, num_draws)
    smallest = np.take_along_axis(tails, counts, 0).min(-1)  # (T,)
    known = {s: _exceedance(tails, s) for s in np.unique(smallest).tolist()}
    return np.array([known[s] for s in smallest.tolist()])


def _counts(ranks: Array, num_draws: int) -> Array:
    """Number of ranks below 1 ... K in each column, ``(T, K)``."""
    points = np.arange(1, num_draws + 1)
    return np.stack([np.searchsorted(np.sort(column), points) for column in ranks.T])


def _tails(num_rows: int, num_draws: int) -> Array:
    """Two-sided tail probability of every count at every point, ``(N + 1, K)``."""
    counts = np.arange(num_rows + 1)[:, None]
    share = np.arange(1, num_draws + 1) / (num_draws + 1)
    below = stats.binom.cdf(counts, num_rows, share)
    above = stats.binom.sf(counts - 1, num_rows, share)
    return 2 * np.minimum(below, above)


def _exceedance(tails: Array, smallest: float) -> float:
    """The chance that the smallest tail probability is at most this."""
    band = _band(tails, smallest)
    return 1.0 if band is None else float(np.clip(1 - _stays(*band, len(tails) - 1), 0.0, 1.0))


def _band(tails: Array, smallest: float) -> tuple[Array, Array] | None:
    """Least and greatest counts with larger tail probabilities; None if a point has none."""
    kept = tails > smallest * _SLACK
    if not kept.any(0).all():
        return None
    return kept.argmax(0), len(tails) - 1 - kept[::-1].argmax(0)


def _simultaneous_band(num_rows: int, num_draws: int, level: float) -> tuple[Array, Array]:
    """The narrowest band that the counts stay inside of with at least this probability."""
    tails = _tails(num_rows, num_draws)
    widest, narrowest = np.log(1e-300), 0.0
    for _ in range(60):
        middle = (widest + narrowest) / 2
        if 1 - _exceedance(tails, np.exp(middle)) >= level:
            widest = middle
        else:
            narrowest = middle
    band = _band(tails, np.exp(widest))
    assert band is not None  # the band of a tail probability of 1e-300 holds everything
    return band


def _stays(lower: Array, upper: Array, num_rows: int) -> float:
    """The chance that lower_i <= C_i <= upper_i for all i, of N uniform ranks.

    Increments of the counts are multinomial: independent Poissons, given that they add up to N.
    """
    rate = num_rows / (len(lower) + 1)
    reach = min(num_rows, int(rate + 12 * np.sqrt(rate) + 40))
    step = stats.poisson.pmf(np.arange(reach + 1), rate)
    start, mass = 0, np.ones(1)
    for low, high in zip(lower.tolist(), upper.tolist(), strict=True):
        moved = np.convolve(mass, step)  # counts start ... start + len - 1
        low = max(low, start)
        mass, start = moved[low - start : high - start + 1], low
    left = num_rows - start - np.arange(len(mass))
    total = mass @ stats.poisson.pmf(left, rate)
    return float(total / stats.poisson.pmf(num_rows, num_rows))
