"""A Pyro model and guide of your own, evaluated as the zoo is, with no class of ours in between.

The model below is none of the zoo's. Every picture has a contrast of its own, one number c beside
the eight of z, and is drawn entry by entry from a Student-t, which forgives a pen that slipped:

    z ~ N(0, I),   c ~ N(0, 1),
    label ~ Categorical(logits(z)),   image ~ StudentT(5, softplus(1 + c) mean(z), sigma)

The guide is one network that reads whatever is there, zeros for what is not, and which of the two
that is. Both are plain functions ``(x, observed)``, trained in a plain loop of ``pyro.infer.SVI``
that hides a random part of each row from the guide and scores all of it. Then

    pair = PyroPair(model, guide, [image, label], networks=[...])

goes through likelihoods with their errors, the table beside a model of the zoo, the calibration of
the guide under each observed subset, the export to ArviZ, figures and the report. The pair's masks
are ours: the model never looks at ``observed``.

Student-t and Bernoulli are densities of different kinds, so MVAE gets the same Student-t here: log
p(image) is then in the same units. Seen after 60 epochs: the own pair is some five nats behind in
log p(image, label), and MVAE behind in what a label can make, since 42 % of its pictures from the
label alone show that label, of the own pair's all of them. Neither guide is calibrated, and Pareto
k above 0.7 in nine of ten rows says that neither likelihood is to be taken at its word: pixels of
this precision leave posteriors that no network of this size hits.

Run ``python own_pair.py``; ``--quick`` for a run of seconds. The report is ``own_pair.html``.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from mmzoo import Modality
from mmzoo.data import MultimodalDataset, digits
from mmzoo.evaluation import (
    PyroPair,
    check_model,
    default_classifiers,
    likelihood_table,
    plot_reconstructions,
    save_datatree,
    to_datatree,
    write_report,
)
from mmzoo.inference import fit
from mmzoo.likelihoods import StudentT
from mmzoo.models import MVAE

DIM, SIGMA = 8, 0.15

picture = nn.Sequential(nn.Linear(DIM, 128), nn.ReLU(), nn.Linear(128, 64))
classes = nn.Sequential(nn.Linear(DIM, 64), nn.ReLU(), nn.Linear(64, 10))
reader = nn.Sequential(nn.Linear(64 + 10 + 2, 128), nn.ReLU(), nn.Linear(128, 2 * (DIM + 1)))

Rows = dict[str, Tensor]


def model(x: Rows, observed: Rows) -> None:
    """The generative story; every modality depends on the latents alone."""
    pyro.module("picture", picture)
    pyro.module("classes", classes)
    with pyro.plate("data", len(x["image"]), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([DIM]).to_event(1))  # (*, N) | (D,)
        contrast = pyro.sample("contrast", dist.Normal(0.0, 1.0))  # (*, N)
        mean = F.softplus(1 + contrast)[..., None, None, None] * picture(z).unflatten(-1, (1, 8, 8))
        pyro.sample("image", dist.StudentT(5.0, mean, SIGMA).to_event(3), obs=x["image"])
        pyro.sample("label", dist.OneHotCategorical(logits=classes(z)), obs=x["label"])


def guide(x: Rows, observed: Rows) -> None:
    """``q(z, contrast | x_S)``, S what ``observed`` shows of each row."""
    pyro.module("reader", reader)
    flags = [observed[name].unsqueeze(-1).float() for name in ("image", "label")]
    values = [x["image"].flatten(-3) * flags[0], x["label"] * flags[1]]
    loc, raw = reader(torch.cat([*values, *flags], -1)).chunk(2, -1)
    scale = F.softplus(raw) + 1e-3
    with pyro.plate("data", len(x["image"]), dim=-1):
        pyro.sample("z", dist.Normal(loc[..., :DIM], scale[..., :DIM]).to_event(1))
        pyro.sample("contrast", dist.Normal(loc[..., DIM], scale[..., DIM]))


def train_own(pair: PyroPair, rows: MultimodalDataset, epochs: int) -> None:
    """Plain SVI; the guide sees the image, the label or both, the model is scored on both."""

    def blinkered(x: Rows) -> None:
        hidden = torch.randint(3, (len(x["image"]),))  # 0: image, 1: label, 2: nothing
        pair.guide(x, {"image": hidden != 0, "label": hidden != 1})

    svi = SVI(pair.model, blinkered, pyro.optim.Adam({"lr": 2e-3}), Trace_ELBO())
    for epoch in range(epochs):
        for x, _ in rows.batches(64, shuffle=True, seed=epoch):
            svi.step(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples of a row")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    train, test = digits()
    if args.quick:
        args.epochs, args.num_samples = 1, 20
        train, test = train.subset(range(128)), test.subset(range(32))
    image = Modality("image", (1, 8, 8), StudentT(scale=SIGMA))
    label = Modality("label", (10,), "one_hot_categorical")
    pair = PyroPair(
        model, guide, [image, label], title="own pair", networks=[picture, classes, reader]
    )
    pyro.set_rng_seed(0)
    train_own(pair, train, args.epochs)

    vae = MVAE([image, label], latent_dim=DIM + 1)
    fit(vae, train, epochs=args.epochs, batch_size=64, learning_rate=2e-3, progress=False)

    x, observed = test.tensors()
    models = {pair.title: pair, vae.title: vae}
    table = likelihood_table(models, x, observed, num_samples=args.num_samples, prior_share=0.2)
    print(table[["mean", "standard_error", "pareto_k"]].to_dataframe().round(2).to_string())

    judges = default_classifiers(train, epochs=1 if args.quick else None)
    rows = 20 if args.quick else 360
    checks = {
        title: check_model(each, test, train=train, classifiers=judges, num_rows=rows)
        for title, each in models.items()
    }
    for title, found in checks.items():
        passes = found["calibration"].to_dataset()["passes"].to_series()
        image_from_label = found["coherence"]["coherence"].sel(subset="label", target="image")
        print(
            f"{title}: calibrated given", ", ".join(passes.index[passes]) or "no subset", end="; "
        )
        print(f"pictures show the label in {float(image_from_label):.0%} of {rows} rows")

    few = {name: value[:64] for name, value in x.items()}
    tree = to_datatree(pair, few, num_draws=50, num_samples=args.num_samples)
    save_datatree(tree, "own_pair.nc")
    print(f"own_pair.nc: groups {', '.join(tree.children)}")

    pictures = {
        f"{title}. Test rows, and what is made of each observed subset": plot_reconstructions(
            each, few, num_rows=12
        ).figure
        for title, each in models.items()
    }
    write_report(
        "own_pair.html",
        title="A pair of one's own beside MVAE",
        table=table,
        checks=checks,
        figures=pictures,
    )


if __name__ == "__main__":
    main()
