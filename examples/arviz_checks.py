"""Checks of multimodal VAEs with ArviZ: resampling, predictions, calibration, comparison.

``latents_in_arviz.py`` looks at latents; this one asks whether to believe them. Two models learn
from images of digits and their labels, and on digits they have not seen:

- **summary**: draws of the guide beside draws that are resampled with importance weights. Where
  the two differ, the guide is not the posterior; where Pareto k exceeds 0.7, the resampled draws
  are not, either;
- ``checks_predictive.png``: a posterior predictive check, the ink of a digit predicted from its
  *label*. A check against the very image that was given would look at the data twice;
- ``checks_pit.png``: is the prediction of single pixels from the label calibrated? ArviZ 0.23
  draws the band in which the curve of a calibrated one stays with probability 0.95, ArviZ 1.x
  writes a p-value beside it;
- ``checks_compare.png``: the models compared on rows. ArviZ's ``compare`` is given log p(x) of each
  row, estimated by importance sampling. Its own leave-one-out, printed beside it, takes the latents
  of the very row as if they were parameters: too high, with a Pareto k that says so.

It runs on ArviZ 0.23 (Python 3.11) and ArviZ 1.x alike: ``python arviz_checks.py``; ``--quick`` for
a run of seconds.
"""

import argparse
import warnings
from importlib.metadata import version
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from scipy.stats import uniform

from mmzoo.data import digits
from mmzoo.evaluation import log_likelihood, to_datatree
from mmzoo.evaluation.arviz_checks import compare_models, conditional_loo, pit
from mmzoo.inference import fit
from mmzoo.models import JMVAE, MVAE

OLD_ARVIZ = version("arviz").startswith("0.")
MODELS = {"MVAE": MVAE, "JMVAE": JMVAE}


def for_arviz(groups: dict[str, xr.Dataset]):
    """What the installed ArviZ works on: a tree, or the InferenceData of ArviZ 0.23."""
    tree = xr.DataTree.from_dict(groups)
    return az.from_datatree(tree) if OLD_ARVIZ else tree


def summary(raw: xr.DataTree, resampled: xr.DataTree, row: int) -> None:
    """Latents of a row: of the guide, and resampled."""
    pick = {"subset": "image+label", "row": row}
    parts = {
        name: tree["posterior"]["z"].sel(pick, drop=True)
        for name, tree in (("guide", raw), ("resampled", resampled))
    }
    print(az.summary(for_arviz({"posterior": xr.Dataset(parts)}), kind="stats"))
    k = float(resampled["constant_data"]["posterior_pareto_k"].sel(pick))
    print(f"Pareto k of the weights: {k:.2f}")


def predictive_plot(tree: xr.DataTree, path: Path) -> None:
    """Ink of every digit, predicted from its label, against the data."""
    pixels = ["image_dim_0", "image_dim_1", "image_dim_2"]
    predicted = tree["subset_predictive"]["image"].sel(subset="label", drop=True).sum(pixels)
    ink = tree["observed_data"]["image"].sum(pixels)
    data = for_arviz(
        {
            "posterior_predictive": predicted.to_dataset(name="ink"),
            "observed_data": ink.to_dataset(name="ink"),
        }
    )
    if OLD_ARVIZ:
        ax = az.plot_ppc(
            data, kind="cumulative", num_pp_samples=50, figsize=(6, 4), textsize=11, random_seed=0
        )
        ax.set_xlabel("pixels of ink")
        figure = ax.figure
    else:
        options = {"figure_kwargs": {"figsize": (6, 4)}}
        figure = az.plot_ppc_dist(data, kind="ecdf", **options).viz["figure"].item()
    save(figure, "Ink of a digit, predicted from its label", path)


def pit_plot(values: xr.DataArray, path: Path) -> None:
    """ECDF of the transform of a few pixels minus uniform, with simultaneous bands."""
    if OLD_ARVIZ:
        figure, axes = plt.subplots(1, values.sizes["entry"], figsize=(9, 3), sharey=True)
        for ax, column in zip(axes, values.transpose("entry", "row"), strict=True):
            az.plot_ecdf(
                column.values,
                cdf=uniform.cdf,
                eval_points=np.linspace(0, 1, 100),
                difference=True,
                confidence_bands="simulated",
                rvs=uniform(0, 1).rvs,
                random_state=np.random.RandomState(0),  # an integer would repeat one sample
                ci_prob=0.95,
                ax=ax,
            )
            ax.set_title(f"pixel {int(column['entry'])}")
    else:
        tree = xr.DataTree.from_dict({"prior_sbc": values.to_dataset(name="pixel")})
        options = {"figure_kwargs": {"figsize": (9, 3)}}
        plot = az.plot_ecdf_pit(tree, sample_dims="row", envelope_prob=0.95, **options)
        figure = plot.viz["figure"].item()
    save(figure, "Pixels predicted from the label: ECDF of the transform − uniform", path)


def compare_plot(table, path: Path) -> None:
    """ArviZ's picture of the comparison."""
    if OLD_ARVIZ:
        ax = az.plot_compare(table, plot_ic_diff=True, figsize=(6, 2.5), textsize=11, title=False)
        figure = ax.figure
    else:
        options = {"visuals": {"title": False}, "figure_kwargs": {"figsize": (6, 2.5)}}
        plot = az.plot_compare(table, **options)
        figure = plot.viz["figure"].item()
    save(figure, "log p(image, label), nats over all rows", path)


def save(figure, title: str, path: Path) -> None:
    """Adds a title above whatever ArviZ drew, and writes the picture."""
    above = 1 + 0.1 / figure.get_figheight()
    figure.suptitle(title, y=above, va="bottom", fontsize=12)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--latent-dim", type=int, default=6)
    parser.add_argument("--num-draws", type=int, default=300)
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples")
    parser.add_argument("--rows", type=int, default=300, help="test rows")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    train, test = digits()
    if args.quick:
        args.epochs, args.num_draws, args.num_samples, args.rows = 1, 60, 100, 40
        train = train.subset(range(256))
    x, observed = test.subset(range(args.rows)).tensors()
    args.out.mkdir(parents=True, exist_ok=True)

    models = {}
    for title, model in MODELS.items():
        torch.manual_seed(0)
        models[title] = model(train.modalities, latent_dim=args.latent_dim)
        fit(models[title], train, epochs=args.epochs, batch_size=64, progress=False)

    vae, options = models["JMVAE"], {"num_draws": args.num_draws, "num_samples": 0}
    raw = to_datatree(vae, x, observed, given=["label"], subset_predictive=True, **options)
    resampled = to_datatree(vae, x, observed, given=[], resampled=True, **options)
    print("A digit, z given image and label, from the guide and resampled:")
    summary(raw, resampled, row=0)

    predictive_plot(raw, args.out / "checks_predictive.png")
    transform = pit(vae, x, observed, target="image", given="label", num_draws=args.num_draws)
    middle = [20, 28, 36]  # pixels on the vertical axis of a digit
    pixels = transform["pit"].assign_coords(entry=range(64)).sel(entry=middle)
    pit_plot(pixels, args.out / "checks_pit.png")

    both = {"of": ["image", "label"], "num_samples": args.num_samples}
    results = {title: log_likelihood(vae, x, observed, **both) for title, vae in models.items()}
    table = compare_models(results)
    print(f"\nLog-likelihood of {args.rows} rows:\n{table.round(2).to_string()}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is what is shown here
        wrong = conditional_loo(resampled)
    k = wrong["pareto_k"]
    print(
        f"For comparison, ArviZ's own leave-one-out of JMVAE: {float(wrong['elpd'].sum()):.0f} in "
        f"place of {float(results['JMVAE']['log_prob'].sum()):.0f}, with Pareto k above 0.7 in "
        f"{100 * float((k > 0.7).mean()):.0f} % of the rows"
    )
    compare_plot(table, args.out / "checks_compare.png")


if __name__ == "__main__":
    main()
