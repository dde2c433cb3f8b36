"""Where is importance sampling enough? One model of each posterior family, K from 100 to 50,000.

The same log p(image) of the same test rows, twice:

    importance sampling   log (1/K) sum_k p(x, z_k) / q(z_k | x),   z_k ~ q, the model's own guide
    annealing             chains that walk from q, or from the prior, to p(z | x), each weighted

Both are unbiased for p(x), and their logarithm is below log p(x) on average. Importance sampling
fails where q is narrower than p(z | x) or beside it: hardly any draw then finds the mass, the
estimate is too low, its error bar is too short, and it creeps up with K. That is what Pareto k
above 0.7 warns of. Annealing corrects q step by step, at the price of a decoder's gradient for each
step of each chain. Its own reach is measured, on rows that the model draws itself, by the *gap*
between its estimate from below and the one from above that reversed chains give (bidirectional
Monte Carlo): as far as the gap, not the error bar, the annealed value may be too low.

``python likelihood_study.py`` trains a product (MVAE), a mixture (MMVAE), a mixture of products
(MoPoE), a joint network (JMVAE) and a barycentre (MWVAE) on the digits, in a minute or two, prints
the table and saves the figure; ``--models`` names others, ``--quick`` is a run of seconds. Trained
models are taken from folders that ``mmzoo train`` or ``mmzoo compare`` wrote:

    mmzoo compare --data mnist --models mvae,mmvae,mopoe,jmvae,mwvae --out runs/mnist
    python likelihood_study.py --run runs/mnist --rows 40 --steps 300 --gap-rows 12

Seen on binarised MNIST with 784-512-512-64 and 20 epochs, 40 test images, 300 temperatures from the
guide, 16 chains of each row: for every family importance sampling climbs with K, in steps of
several of its own error bars, and its 50,000 draws (-86.27, -87.96, -86.88, -85.86, -104.67 for the
product, the mixture, the mixture of products, the joint network, the barycentre) are still below
the annealed value (-85.84, -87.23, -86.22, -85.69, -104.02), which takes about as long. Pareto k,
above 0.7 in 55 to 100 % of the rows, warns rightly at every K. For product, joint network and
barycentre the gap is zero within 0.2 nats: these values are log p. For the mixtures it is not (3.5
+- 1.7 and 0.5 +- 0.3): there the annealed value, too, is only the better bound. Chains that set out
from the prior (``--start prior``) need many more temperatures where codes fill little of it: with
300 of them the mixture of products was nine nats below its importance sampling. The gap is that of
rows that the model draws, so it can be smaller than what real rows miss. Both values are from
below, and the larger one is the better one.

Annealed Importance Sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
Measuring the Reliability of MCMC Inference with Bidirectional Monte Carlo (Grosse et al., 2016),
https://arxiv.org/abs/1606.02275
Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from torch import Tensor

from mmzoo import MultimodalVAE
from mmzoo.config import RunConfig
from mmzoo.evaluation.annealed import annealed_log_likelihood, bidirectional
from mmzoo.evaluation.likelihood import log_likelihood
from mmzoo.evaluation.runs import Run, load_data, read_run, train_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

RELIABLE = 0.7
INK, LINE, BAND = "#333333", "#C77F00", "#FBE7C6"
MODELS = "mvae,mmvae,mopoe,jmvae,mwvae"
FAMILIES = {
    "mvae": "product",
    "mmvae": "mixture",
    "mopoe": "mixture of products",
    "jmvae": "joint network",
    "mwvae": "barycentre",
}


def study(vae: MultimodalVAE, x: dict[str, Tensor], args: argparse.Namespace) -> xr.Dataset:
    """Means over rows by importance sampling at every K, by annealing, and the gap of the latter.

    Over ``draws``: ``mean``, ``mcse`` (of the mean), ``unreliable`` (share of rows). Without a
    dimension: ``annealed``, ``annealed_mcse``, ``gap``, ``gap_error`` and seconds per row.
    """
    plain = [
        log_likelihood(vae, x, of=args.of, num_samples=num, seed=args.seed + num)
        for num in args.draws
    ]
    walk = {
        "start": args.start,
        "num_chains": args.chains,
        "num_steps": args.steps,
        "leapfrog_steps": args.leapfrog,
        "seed": args.seed,
    }
    before = time.perf_counter()
    annealed = annealed_log_likelihood(vae, x, of=args.of, **walk)
    seconds = (time.perf_counter() - before) / len(annealed.row)
    bounds = bidirectional(vae, of=args.of, num_rows=args.gap_rows, **walk).sel(bound="gap")
    return xr.Dataset(
        {
            "mean": ("draws", [float(each.log_prob.mean()) for each in plain]),
            "mcse": ("draws", [mcse_of_mean(each) for each in plain]),
            "unreliable": ("draws", [float((each.pareto_k > RELIABLE).mean()) for each in plain]),
            "annealed": float(annealed.log_prob.mean()),
            "annealed_mcse": mcse_of_mean(annealed),
            "gap": float(bounds["mean"]),
            "gap_error": float(bounds.standard_error),
            "seconds": seconds,
        },
        coords={"draws": args.draws},
    )


def mcse_of_mean(rows: xr.Dataset) -> float:
    """Monte Carlo error of a mean over rows, whose draws are independent."""
    return float(np.sqrt(np.square(rows.mcse).sum()) / len(rows.row))


def draw_figure(results: dict[str, xr.Dataset], args: argparse.Namespace) -> "Figure":
    """A panel for each model: importance sampling against K, annealing as a band."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(len(results), 3)
    lines = math.ceil(len(results) / columns)
    figure = Figure(figsize=(3.3 * columns + 0.6, 2.7 * lines + 0.8), layout="constrained", dpi=150)
    grid = figure.subplots(lines, columns, squeeze=False)
    colors = ScalarMappable(Normalize(0, 100), "coolwarm")
    for ax, (title, result) in zip(grid.flat, results.items(), strict=False):
        draw_panel(ax, title, result, colors)
    for ax in grid.flat[len(results) :]:
        ax.axis("off")
    for ax in grid[:, 0]:
        ax.set_ylabel(f"log p({args.of}), nats per row")
    for ax in grid.flat[max(0, len(results) - columns) : len(results)]:
        ax.set_xlabel("draws K of each row")
    bar = figure.colorbar(colors, ax=grid, shrink=0.7, pad=0.02)
    bar.set_label(f"% of rows with Pareto k > {RELIABLE}")
    handles = [
        Line2D([], [], marker="o", color="#888888", markerfacecolor="white", markeredgecolor=INK),
        Line2D([], [], color=LINE),
        Patch(color=BAND, lw=0),
    ]
    names = [
        "importance sampling",
        f"annealed from the {args.start}",
        "2 standard errors, and its gap above",
    ]
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
    )
    figure.suptitle(f"Mean log p({args.of}) of {args.rows} test rows of {args.data}", fontsize=11)
    return figure


def draw_panel(ax: "Axes", title: str, result: xr.Dataset, colors: "ScalarMappable") -> None:
    """One model."""
    center, error = float(result.annealed), 2 * float(result.annealed_mcse)
    top = center + error + max(float(result.gap), 0.0)
    draws, mean, spread = result.draws.values, result["mean"].values, 2 * result.mcse.values
    ax.axhspan(center - error, top, color=BAND, lw=0)
    ax.axhline(center, color=LINE, lw=1.2)
    ax.plot(draws, mean, color="#888888", lw=1, zorder=1)
    ax.errorbar(draws, mean, spread, fmt="none", ecolor=INK, lw=1, zorder=2)
    share = 100 * result.unreliable.values
    ax.scatter(draws, mean, c=colors.to_rgba(share), s=38, edgecolor=INK, lw=0.6, zorder=3)
    for num, low, percent in zip(draws, mean - spread, share, strict=True):
        text = f"{percent:.0f} %"
        place = {"textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 7.5}
        ax.annotate(text, (num, low), (0, -5), color=INK, **place)
    ax.set_xscale("log")
    ax.set_xlim(draws[0] / 2, draws[-1] * 2)
    ax.set_xticks(draws, [f"{num:,}" for num in draws])
    ax.minorticks_off()
    low, high = min((mean - spread).min(), center - error), max((mean + spread).max(), top)
    ax.set_ylim(low - 0.2 * (high - low), high + 0.06 * (high - low))
    ax.set_title(title, fontsize=10)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def print_row(title: str, result: xr.Dataset) -> None:
    """One model."""
    cells = [
        f"{mean:9.2f} ±{mcse:5.2f} ({share:4.0%})"
        for mean, mcse, share in zip(
            result["mean"].values, result.mcse.values, result.unreliable.values, strict=True
        )
    ]
    annealed, mcse, gap, error = (
        float(result[name]) for name in ("annealed", "annealed_mcse", "gap", "gap_error")
    )
    cells.append(f"{annealed:10.2f} ±{mcse:5.2f}{gap:9.2f} ±{error:5.2f}")
    print(f"{title:30}{''.join(cells)}{float(result.seconds):8.2f}", flush=True)


def models_of(args: argparse.Namespace) -> list[Run]:
    """The models of the run folders, or freshly trained ones."""
    if args.run:
        return [run for folder in args.run for run in read_run(folder)]
    config = RunConfig.make(
        args.data,
        models=tuple(args.models.split(",")),
        root=args.root,
        epochs=args.epochs,
        limit=64 if args.quick else None,
        seed=args.seed,
    )
    data = load_data(config)
    with tempfile.TemporaryDirectory() as folder:
        return [
            train_run(config, name, Path(folder, name), data=data, progress=False)
            for name in config.models
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="what models are trained on")
    parser.add_argument("--root", help="folder with the data, for those that are not embedded")
    parser.add_argument("--run", nargs="*", type=Path, help="folders of trained models instead")
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--of", default="image", help="the modality that is scored")
    parser.add_argument("--rows", type=int, default=30, help="test rows")
    parser.add_argument("--draws", type=int, nargs="*", default=[100, 1000, 10000, 50000])
    parser.add_argument("--start", default="posterior", choices=["posterior", "prior"])
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="temperatures")
    parser.add_argument("--leapfrog", type=int, default=5, help="gradients for each of them")
    parser.add_argument("--gap-rows", type=int, default=20, help="rows of the model's own")
    parser.add_argument("--out", type=Path, default=Path("likelihood_study.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.draws, args.chains, args.steps, args.gap_rows = 4, [50, 200], 4, 4, 4
        args.epochs = 1

    runs = models_of(args)
    config = runs[0].config.replace(root=args.root)
    args.data = config.data
    _, test = load_data(config)
    args.rows = min(args.rows, len(test))
    x, _ = test.subset(range(args.rows)).tensors()
    columns = "".join(f"{f'K = {num}':>24}" for num in args.draws)
    print(f"log p({args.of}) of {args.rows} test rows, nats; ± Monte Carlo error of the mean;")
    print(f"in brackets the share of rows with Pareto k > {RELIABLE}\n")
    print(f"{'':30}{columns}{'annealed':>17}{'its gap':>16}{'s/row':>8}")
    results = {}
    for run in runs:
        name = run.config.models[0]
        family = FAMILIES.get(name)
        title = f"{run.vae.title} ({family})" if family else run.vae.title
        if args.of not in run.vae.modalities:
            raise SystemExit(f"{run.vae.title}: has no modality {args.of}")
        results[title] = study(run.vae, {args.of: x[args.of]}, args)
        print_row(title, results[title])
        draw_figure(results, args).savefig(args.out)  # whoever interrupts keeps what is done
    print(f"\n{args.out}")


if __name__ == "__main__":
    main()
