"""Latents of a multimodal VAE in ArviZ.

``to_datatree`` draws the latents of every row given each subset of the modalities and labels them
in the ArviZ schema, so that ArviZ's summaries and plots apply: ``posterior`` has the dimensions
chain, draw, subset, row, latent. The tree is an ``xarray.DataTree``, which ArviZ 1.x takes as it
is and ArviZ 0.23 (the last one for Python 3.11) through ``arviz.from_datatree``. Draws are
independent, so they stand in one chain, and R-hat says nothing about them.

What to look at:

- the summary: mean and spread of the latents of one digit, given image and label;
- ``latents_pair.png``: do two latents of one digit correlate under the posterior? A product of
  diagonal Gaussians cannot say so; a mixture could;
- ``latents_forest.png``: the same latents given image and label, the image alone, the label alone.
  An image says where in its class a digit lies, a label only which class: its intervals are wider.

The tree is saved as NetCDF, which any later session reads with ``load_datatree`` or xarray.

Run ``python latents_in_arviz.py``; ``--quick`` for a run of seconds.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import torch
import xarray as xr

from mmzoo.data import digits
from mmzoo.evaluation import save_datatree, to_datatree
from mmzoo.inference import fit
from mmzoo.models import MVAE

OLD_ARVIZ = version("arviz").startswith("0.")


def for_arviz(tree: xr.DataTree):
    """What the installed ArviZ works on: the tree, or the InferenceData of ArviZ 0.23."""
    return az.from_datatree(tree) if OLD_ARVIZ else tree


def pair_plot(tree: xr.DataTree, coords: dict, title: str, path: Path) -> None:
    """Draws of a few latents against each other."""
    if OLD_ARVIZ:
        axes = az.plot_pair(
            for_arviz(tree), var_names=["z"], coords=coords, figsize=(7, 7), textsize=11
        )
        figure = axes.ravel()[0].figure
    else:
        matrix = az.plot_pair(
            tree, var_names=["z"], coords=coords, figure_kwargs={"figsize": (7, 7)}
        )
        figure = matrix.viz["figure"].item()
    save(figure, title, path)


def forest_plot(tree: xr.DataTree, coords: dict, title: str, path: Path) -> None:
    """Intervals of a few latents, one block for each subset that is given."""
    z = tree["posterior"]["z"].sel(coords)
    # One variable for each subset: blocks of the forest carry its name.
    parts = {name: z.sel(subset=name, drop=True) for name in z["subset"].values}
    blocks = xr.DataTree.from_dict({"posterior": xr.Dataset(parts)})
    if OLD_ARVIZ:
        axes = az.plot_forest(for_arviz(blocks), combined=True, figsize=(7, 6), textsize=11)
        axes[0].set_title("")
        axes[0].set_xlabel("latent value: median, half and 94 % of the draws")
        axes[0].spines["top"].set_visible(False)
        figure = axes[0].figure
    else:
        matrix = az.plot_forest(blocks, combined=True, figure_kwargs={"figsize": (7, 6)})
        figure = matrix.viz["figure"].item()
    save(figure, title, path)


def save(figure, title: str, path: Path) -> None:
    """Adds a title above whatever ArviZ drew, and writes the picture."""
    figure.suptitle(title, y=0.95, fontsize=12)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--latent-dim", type=int, default=6)
    parser.add_argument("--num-draws", type=int, default=500)
    parser.add_argument("--rows", type=int, default=5, help="test rows whose latents are drawn")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    train, test = digits()
    if args.quick:
        args.epochs, args.num_draws = 1, 50
        train = train.subset(range(256))

    torch.manual_seed(0)
    vae = MVAE(train.modalities, latent_dim=args.latent_dim)
    fit(vae, train, epochs=args.epochs, batch_size=64, progress=False)
    test = test.subset(range(args.rows))
    x, observed = test.tensors()
    tree = to_datatree(vae, x, observed, labels=test.labels, num_draws=args.num_draws)
    args.out.mkdir(parents=True, exist_ok=True)
    save_datatree(tree, args.out / "latents.nc")
    print(tree["posterior"].to_dataset())

    row, digit = 0, test.labels["digit"][0]
    # The latents that this model uses most: an unused one has mean 0 in every row.
    z = tree["posterior"]["z"].sel(subset="image+label")
    used = z.mean(["chain", "draw"]).std("row").argsort().values[::-1][:4]
    latents = {"row": row, "latent": sorted(used.tolist())}

    posterior = for_arviz(xr.DataTree.from_dict({"posterior": z.sel(latents).to_dataset(name="z")}))
    print(f"\nA digit {digit}, z given image and label:")
    print(az.summary(posterior, kind="stats"))
    pair_plot(
        tree,
        {"subset": "image+label", **latents},
        f"Draws of z given image and label, a digit {digit}",
        args.out / "latents_pair.png",
    )
    forest_plot(
        tree,
        latents,
        f"The same digit {digit}: z given each subset",
        args.out / "latents_forest.png",
    )


if __name__ == "__main__":
    main()
