"""Modalities of your own: your networks, your likelihoods, your arrays with holes in them.

The data are the breast cancer measurements embedded in scikit-learn: of the cell nuclei in 569
images, the mean over the nuclei of ten properties, the worst value of each, and the diagnosis.
Three modalities, each described in another way:

- ``mean``: ten numbers, the library's Gaussian with a learned scale for each entry, and networks
  of our own. An encoder is any module from (R, 10) to features (R, H); a decoder is any module from
  the latent (R, D) to what the likelihood asks for, made by a function of D.
- ``worst``: ten numbers with outliers, so Student's t. Its likelihood is a plain callable from the
  decoder's tensors to a Pyro distribution; ``params`` names them with their shapes.
- ``diagnosis``: an integer label, and default networks.

Every fifth ``worst`` was never measured and is a row of NaN, which ``nan_rows_to_masks`` turns into
a mask (``from_numpy(..., nan_missing=True)`` would too). Half of the diagnoses are unknown; an
integer cannot be NaN, so a mask says it. Whatever stands under a mask is never looked at.

Saving writes weights and plain data, never code: networks and callables of your own are not in the
file, and ``from_pretrained`` asks for the modalities that hold them.

Run ``python custom_modality.py``; ``--quick`` for a run of seconds.
"""

import argparse
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mmzoo import Modality
from mmzoo.data import from_numpy, missing_completely_at_random, nan_rows_to_masks
from mmzoo.evaluation import likelihood_table
from mmzoo.inference import fit
from mmzoo.likelihoods import CallableLikelihood, Categorical, Normal
from mmzoo.models import MoPoE


class ResidualEncoder(nn.Module):
    """An encoder of our own: one layer, and a residual block."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, width)
        self.block = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(R, width)``."""
        y = self.first(x)
        return y + self.block(y)


class TwoHeads(nn.Module):
    """A decoder that gives two tensors, in the order of the likelihood's ``params``."""

    def __init__(self, latent_dim: int, width: int, out_features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(latent_dim, width), nn.SiLU())
        self.loc = nn.Linear(width, out_features)
        self.scale = nn.Linear(width, out_features)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Location and raw scale, ``(R, out_features)`` each."""
        y = self.body(z)
        return self.loc(y), self.scale(y)


def heavy_tailed(loc: Tensor, scale: Tensor) -> dist.StudentT:
    """Student's t; event dimensions are declared by the library."""
    return dist.StudentT(4.0, loc, softplus(scale) + 1e-3)


def make_modalities() -> list[Modality]:
    """The same three descriptions for training and for loading."""
    return [
        Modality(
            "mean",
            (10,),
            Normal(scale="learned"),
            encoder=ResidualEncoder(10, 64),
            decoder=lambda latent_dim: nn.Sequential(
                nn.Linear(latent_dim, 64), nn.SiLU(), nn.Linear(64, 10)
            ),
        ),
        Modality(
            "worst",
            (10,),
            CallableLikelihood(heavy_tailed, lambda shape: {"loc": shape, "scale": shape}),
            encoder=ResidualEncoder(10, 64),
            decoder=lambda latent_dim: TwoHeads(latent_dim, 64, 10),
        ),
        Modality("diagnosis", (), Categorical(num_classes=2)),
    ]


def read_measurements() -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """Arrays with holes, and the mask of the diagnoses."""
    from sklearn.datasets import load_breast_cancer

    source = load_breast_cancer()
    # Areas and concavities are positive and skewed: logarithms, in units of their spread.
    values = np.log(source.data + 0.01)
    values = (values - values.mean(0)) / values.std(0)
    masks = missing_completely_at_random(
        len(values), {"worst": 0.2, "diagnosis": 0.5}, seed=0, names=["mean", "worst", "diagnosis"]
    )
    worst = values[:, 20:].copy()
    worst[~masks["worst"].numpy()] = np.nan
    x = {"mean": values[:, :10], "worst": worst, "diagnosis": source.target}
    return x, {"diagnosis": masks["diagnosis"]}


def accuracy(
    vae: MoPoE, x: dict[str, Tensor], observed: dict[str, Tensor], given: list[str]
) -> str:
    """Share of known diagnoses that are the likeliest, given some modalities."""
    seen = {name: observed[name] for name in given if name in observed}
    rows = torch.stack([observed["diagnosis"], *seen.values()]).all(0)
    known = {name: x[name][rows] for name in given}
    # mean=True gives p(class | z) for each draw of z: its average is p(class | given).
    probability = vae.generate(known, num_samples=200, mean=True)["diagnosis"].mean(0)
    right = probability.argmax(-1) == x["diagnosis"][rows]
    return f"{float(right.double().mean()):.1%} of {int(rows.sum())} rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--latent-dim", type=int, default=6)
    parser.add_argument("--num-samples", type=int, default=1000, help="draws of each test row")
    parser.add_argument("--out", type=Path, default=Path("custom_modality"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.num_samples = 2, 50

    x, observed = read_measurements()
    observed = {**observed, **nan_rows_to_masks(x)}
    data = from_numpy(x, observed, modalities=make_modalities())
    train, test = data.split([0.7, 0.3], seed=0)
    torch.manual_seed(0)
    vae = MoPoE(make_modalities(), latent_dim=args.latent_dim)
    fit(vae, train, objective=vae.objective(beta=1.0), epochs=args.epochs, progress=False)

    rows, masks = test.tensors()
    quantities = [
        (["mean", "worst", "diagnosis"], []),
        (["worst"], ["mean"]),
        (["diagnosis"], ["mean"]),
        (["diagnosis"], ["mean", "worst"]),
    ]
    options = {"quantities": quantities, "num_samples": args.num_samples}
    table = likelihood_table({"MoPoE": vae}, rows, masks, **options)
    print("Nats per test row that has the modality, ± standard error:")
    for cell in table["quantity"].values:
        here = table.sel(model="MoPoE", quantity=cell)
        print(
            f"  {cell:32}{float(here['mean']):8.2f} ± {float(here['standard_error']):.2f}"
            f"  ({int(here['num_rows'])} rows, k > 0.7 in {float(here['pareto_k']):.0%})"
        )
    for given in (["mean"], ["worst"], ["mean", "worst"]):
        right = accuracy(vae, rows, masks, given)
        print(f"diagnosis given {' and '.join(given)}: right in {right}")

    vae.save_pretrained(args.out)
    try:
        MoPoE.from_pretrained(args.out)
    except ValueError as error:
        print(f"\nWithout the modalities: {error}")
    again = MoPoE.from_pretrained(args.out, modalities=make_modalities())
    same = likelihood_table({"MoPoE": again.eval()}, rows, masks, **options)
    print(f"With them, the same numbers: {bool((same['mean'] == table['mean']).all())}")


if __name__ == "__main__":
    main()
