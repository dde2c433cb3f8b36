r"""A reference for the guide: NUTS on the latents of one row, from the same pair.

The model of a pair is a probabilistic program; with the values of a row it is a posterior

    p(z | x_S)  prop. to  p(z) prod_{m in S} p(x_m | z)

from which Hamiltonian Monte Carlo draws without any guide, to an error that it states. It is slow,
thousands of gradients for a single row, and serial: a few rows show how far a guide is off.

The No-U-Turn Sampler (Hoffman & Gelman, 2014), https://arxiv.org/abs/1111.4246
Rank-Normalization, Folding, and Localization: An Improved R-hat (Vehtari et al., 2021),
https://arxiv.org/abs/1903.08008
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mmzoo.evaluation.pair import Pair, check_continuous, device_of, quiet, row_masks
from mmzoo.evaluation.posterior import sliced_wasserstein
from mmzoo.evaluation.scored import Shown, find_subsets, flatten, latent_names

__all__ = ["compare_with_reference", "nuts_posterior"]

# How many of its own errors a difference must exceed what is tolerated by, to count.
_ERRORS = 3.0
# Fewer draws in a chain have no autocorrelation to speak of.
_MIN_DRAWS = 8

Array = np.ndarray


def nuts_posterior(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    row: int,
    given: str | Sequence[str] | None = None,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 2,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> xr.DataTree:
    """Draws of a row's latents by NUTS, laid out for ArviZ.

    Args:
        pair: A model of the zoo or a pair of your own.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        row: Index of the row.
        given: The modalities that are conditioned on, of which the row uses what it has; default:
            all. A row that has none of them has the prior.
        num_samples: Draws of each chain.
        warmup_steps: Steps before them, in which step size and mass matrix adapt.
        num_chains: Chains, one after another, each started from a draw of the guide.
        target_accept: Acceptance that the step size aims at.
        max_tree_depth: Trajectories have at most 2 to this power steps.
        seed: Of the chains.
        on_progress: Called with the steps done and the steps in all.

    Returns:
        Groups ``posterior``: ``z`` with dimensions (chain, draw, latent), other latent sites with
        (chain, draw, <site>_dim); ``sample_stats``: ``diverging`` (chain, draw); ``diagnostics``
        over ``latent``: ``mean`` and ``sd``, their Monte Carlo standard errors ``mcse_mean`` and
        ``mcse_sd``, ``ess_bulk``, ``ess_tail`` and ``r_hat`` (a single chain is split in halves).
        The attributes name the row and what it was given.

    Raises:
        ValueError: For a row that is not there, unknown names, sizes that are too small, or a
            discrete latent.

    Example:
        >>> from mmzoo.exact import LinearGaussianWorld
        >>> from mmzoo.models import LinearVAE
        >>> world = LinearGaussianWorld.random({"a": 3, "b": 2}, latent_dim=2, seed=0)
        >>> vae, x = LinearVAE(world.modalities(), 2).double(), world.sample(4, seed=1)
        >>> tree = nuts_posterior(vae, x, row=2, num_samples=20, warmup_steps=20)
        >>> dict(tree["posterior"]["z"].sizes)
        {'chain': 2, 'draw': 20, 'latent': 2}
    """
    where = "nuts_posterior"
    if num_samples < _MIN_DRAWS or warmup_steps < 1 or num_chains < 1:
        raise ValueError(
            f"{where}: expected num_samples >= {_MIN_DRAWS}, warmup_steps >= 1 and num_chains >= "
            f"1, found {num_samples}, {warmup_steps} and {num_chains}"
        )
    check_continuous(pair, where)
    names = list(pair.modalities) if given is None else given
    title, subset = next(iter(find_subsets(pair, [names], where).items()))
    values = _row(pair, x, observed, subset, row, where)
    total = num_chains * (num_samples + warmup_steps)
    chains: list[dict[str, Array]] = []
    diverging = np.zeros((num_chains, num_samples), dtype=bool)
    options = {"target_accept_prob": target_accept, "max_tree_depth": max_tree_depth}
    for chain in range(num_chains):
        before = chain * (num_samples + warmup_steps)
        progress = _telling(on_progress, before, total)
        with quiet(pair, seed + chain), torch.enable_grad():
            found, bad = _chain(pair, values, num_samples, warmup_steps, options, progress)
        chains.append(found)
        diverging[chain, bad] = True
    arrays = {site: np.stack([each[site] for each in chains]) for site in chains[0]}
    attrs = {
        "title": pair.title,
        "row": row,
        "given": list(subset),
        "subset": title,
        "num_samples": num_samples,
        "warmup_steps": warmup_steps,
        "seed": seed,
        "inference_library": "pyro",
        "units": "units of the latent",
    }
    return _label(arrays, diverging, attrs)


def _row(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None,
    subset: Sequence[str],
    row: int,
    where: str,
) -> dict[str, Tensor]:
    """What a row has of a subset, ``(1, *event_shape)`` each."""
    values, masks, num_rows = row_masks(pair, x, observed)
    if not 0 <= row < num_rows:
        raise ValueError(f"{where}: expected a row from 0 to {num_rows - 1}, found {row}")
    device = device_of(pair)
    return {
        name: values[name][row : row + 1].to(device)
        for name in subset
        if name in values and bool(masks[name][row])
    }


def _shown(pair: Pair, values: Mapping[str, Tensor], guide: Any = None) -> Shown:
    """The row for a guide; one without values has the prior."""
    full = torch.ones(1, dtype=torch.bool, device=device_of(pair))
    if values:
        return Shown(pair, values, dict.fromkeys(values, full), guide)
    name, modality = next(iter(pair.modalities.items()))
    return Shown(pair, {name: torch.zeros(1, *modality.event_shape).to(full.device)}, {}, guide)


def _telling(
    on_progress: Callable[[int, int], None] | None, before: int, total: int
) -> Callable[..., None] | None:
    if on_progress is None:
        return None
    steps = iter(range(before + 1, total + 1))
    return lambda kernel, params, stage, i: on_progress(next(steps, total), total)


def _chain(
    pair: Pair,
    values: Mapping[str, Tensor],
    num_samples: int,
    warmup_steps: int,
    options: dict[str, Any],
    hook: Callable[..., None] | None,
) -> tuple[dict[str, Array], list[int]]:
    """Draws of one chain by site, ``(draw, size)``, and the indices of those that diverged."""
    from pyro.infer import MCMC, NUTS
    from pyro.infer.autoguide.initialization import init_to_value

    with torch.no_grad():
        start = {name: value[0] for name, value in _shown(pair, values).draw(1).items()}
    extra = {} if values else {"num_rows": 1}

    def model() -> Any:
        return pair.model(dict(values), None, **extra)

    kernel = NUTS(model, init_strategy=init_to_value(values=start), **options)
    mcmc = MCMC(
        kernel,
        num_samples=num_samples,
        warmup_steps=warmup_steps,
        num_chains=1,
        disable_progbar=True,
        hook_fn=hook,
    )
    mcmc.run()
    drawn = mcmc.get_samples()
    found = {
        site: drawn[site].detach().reshape(num_samples, -1).double().cpu().numpy()
        for site in pair.latent_sites
    }
    return found, list(mcmc.diagnostics()["divergences"]["chain 0"])


def _label(arrays: dict[str, Array], diverging: Array, attrs: dict[str, Any]) -> xr.DataTree:
    latents = latent_names({site: torch.as_tensor(each) for site, each in arrays.items()})
    stacked = np.concatenate(list(arrays.values()), -1)  # (chain, draw, T)
    coords = {"chain": np.arange(stacked.shape[0]), "draw": np.arange(stacked.shape[1])}
    dims = {site: "latent" if site == "z" else f"{site}_dim" for site in arrays}
    posterior = xr.Dataset(
        {site: (("chain", "draw", dims[site]), each) for site, each in arrays.items()},
        coords={**coords, **{dims[s]: np.arange(e.shape[-1]) for s, e in arrays.items()}},
        attrs=attrs,
    )
    stats = xr.Dataset({"diverging": (("chain", "draw"), diverging)}, coords=coords, attrs=attrs)
    diagnostics = xr.Dataset(
        {name: ("latent", value) for name, value in _diagnose(stacked).items()},
        coords={"latent": latents},
        attrs=attrs,
    )
    groups = {"posterior": posterior, "sample_stats": stats, "diagnostics": diagnostics}
    tree = xr.DataTree.from_dict(groups)
    tree.attrs |= attrs
    return tree


def _diagnose(draws: Array) -> dict[str, Array]:
    """Moments, their errors and what says whether to believe them, ``(T,)`` each."""
    arviz = _arviz()
    chains = draws
    if len(draws) == 1:
        half = draws.shape[1] // 2
        chains = np.stack([draws[0, :half], draws[0, half : 2 * half]])

    def each(function: Callable[..., Any], **options: Any) -> Array:
        # One series (chain, draw) at a time, which all versions of ArviZ take alike.
        with np.errstate(divide="ignore", invalid="ignore"):  # a chain that never moved
            return np.array([float(function(c, **options)) for c in np.moveaxis(chains, -1, 0)])

    flat = draws.reshape(-1, draws.shape[-1])
    return {
        "mean": flat.mean(0),
        "sd": flat.std(0, ddof=1),
        "mcse_mean": each(arviz.mcse, method="mean"),
        "mcse_sd": each(arviz.mcse, method="sd"),
        "ess_bulk": each(arviz.ess, method="bulk"),
        "ess_tail": each(arviz.ess, method="tail", prob=(0.05, 0.95)),
        "r_hat": each(arviz.rhat),
    }


def _arviz() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 announces its successor
        import arviz
    return arviz


def compare_with_reference(
    pair: Pair,
    reference: xr.DataTree,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    guide: Callable[..., Any] | None = None,
    num_draws: int = 4000,
    tolerance: float = 0.1,
    seed: int = 0,
) -> xr.Dataset:
    """The guide of a pair against NUTS, latent by latent.

    Args:
        pair: The pair that the reference is of.
        reference: Result of :func:`nuts_posterior`, which names the row and what it was given.
        x: The same rows as there.
        observed: The same masks.
        guide: A Pyro guide over the same sites, in place of the pair's own.
        num_draws: Draws of the guide.
        tolerance: Share of a posterior standard deviation that a mean or a standard deviation may
            be off.
        seed: Of the guide's draws.

    Returns:
        Over ``latent``, in standard deviations of the reference: ``mean_difference`` (guide minus
        reference) with ``mean_difference_error``, ``sd_ratio`` (guide over reference) with
        ``sd_ratio_error``, ``wasserstein`` (the 1-Wasserstein distance of the draws) with
        ``wasserstein_floor`` (that of as many draws of the guide from each other) and ``off``:
        whether mean or standard deviation differ by more than the tolerance and three errors. Of
        all latents together ``sliced_wasserstein``, the 2-Wasserstein distance along a line,
        averaged over lines.

    Raises:
        ValueError: For a reference of another pair or of rows that are not there.
    """
    where = "compare_with_reference"
    if num_draws < 2:
        raise ValueError(f"{where}: expected num_draws >= 2, found {num_draws}; 4000, say")
    sites = tuple(reference["posterior"].data_vars)
    if set(sites) != set(pair.latent_sites):
        raise ValueError(
            f"{where}: expected a reference with the sites {', '.join(pair.latent_sites)}, found "
            f"{', '.join(map(str, sites))}; draw it by nuts_posterior from the same pair"
        )
    values = _row(pair, x, observed, reference.attrs["given"], reference.attrs["row"], where)
    with quiet(pair, seed):
        drawn = _shown(pair, values, guide).draw(num_draws)
        z = flatten({site: drawn[site] for site in pair.latent_sites})[:, 0].double().cpu()
        found, joint = _differences(z, reference, pair.latent_sites)
    off = np.abs(found["mean_difference"]) > tolerance + _ERRORS * found["mean_difference_error"]
    off |= np.abs(found["sd_ratio"] - 1) > tolerance + _ERRORS * found["sd_ratio_error"]
    return xr.Dataset(
        {
            **{name: ("latent", value) for name, value in found.items()},
            "off": ("latent", off),
            "sliced_wasserstein": joint,
        },
        coords={"latent": reference["diagnostics"]["latent"].values},
        attrs={
            **reference.attrs,
            "num_draws": num_draws,
            "tolerance": tolerance,
            "seed": seed,
            "units": "standard deviations of the reference",
        },
    )


def _differences(
    z: Tensor, reference: xr.DataTree, sites: Sequence[str]
) -> tuple[dict[str, Array], float]:
    """Latent by latent, ``(T,)`` each, and of all together; ``z`` is ``(K, T)``."""
    from scipy.stats import wasserstein_distance

    diagnostics = {name: each.values for name, each in reference["diagnostics"].data_vars.items()}
    sd, mean = diagnostics["sd"], diagnostics["mean"]
    posterior = reference["posterior"].to_dataset()
    exact = np.concatenate(
        [posterior[s].values.reshape(-1, posterior[s].shape[-1]) for s in sites], -1
    )  # (draws, T)
    guide, exact = (z.numpy() - mean) / sd, (exact - mean) / sd
    num, spread = len(guide), guide.std(0, ddof=1)
    fourth = ((guide - guide.mean(0)) ** 4).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Of a standard deviation from K draws, by the delta method.
        own = np.sqrt(np.maximum(fourth - spread**4, 0) / (4 * spread**2 * num))
    ess = np.clip(diagnostics["ess_bulk"], 1, num // 2).astype(int)
    pairs = range(guide.shape[-1])
    found = {
        "mean_difference": guide.mean(0),
        "mean_difference_error": np.hypot(diagnostics["mcse_mean"] / sd, spread / np.sqrt(num)),
        "sd_ratio": spread,
        "sd_ratio_error": np.hypot(spread * diagnostics["mcse_sd"] / sd, np.nan_to_num(own)),
        "wasserstein": np.array([wasserstein_distance(guide[:, d], exact[:, d]) for d in pairs]),
        "wasserstein_floor": np.array(
            [wasserstein_distance(guide[: ess[d], d], guide[ess[d] :, d]) for d in pairs]
        ),
    }
    size = min(num, len(exact))
    step = len(exact) // size
    parts = torch.as_tensor(guide[:size]), torch.as_tensor(exact[: size * step : step])
    squared = sliced_wasserstein(*(part.unsqueeze(1) for part in parts))
    return found, float(squared[0] / guide.shape[-1]) ** 0.5
