"""Stochastic variational inference in a plain script, with nothing of the library's training loop.

Model, guide and objective of the zoo are ordinary Pyro: a model function, a guide function and an
ELBO. So ``pyro.infer.SVI`` trains them with any Pyro optimiser, here ``ClippedAdam``, and the loop
is yours. ``vae.objective()`` is the objective that the model was published with, for MVAE the sum
of the bounds on log p(image, label), log p(image) and log p(label); ``Trace_ELBO()`` is Pyro's own,
here the bound on log p(image, label) alone, or on what a row has of it.

What to expect: the published objective teaches the guide every subset. Plain ``Trace_ELBO`` teaches
it {image, label} only, wherever rows are complete; its guide given the image alone or the label
alone was never trained. The table shows it: log p(image, label) is as good or better, while the
estimates of log p(image) and log p(label) have uneven weights (``k`` is the share of rows with a
Pareto k above 0.7, whose estimates are not to be relied on).

Run ``python svi_script.py``; ``--quick`` for a run of seconds.
"""

import argparse

import pyro
from pyro.infer import ELBO, SVI, Trace_ELBO

from mmzoo.data import MultimodalDataset, digits
from mmzoo.evaluation import likelihood_table
from mmzoo.models import MVAE


def train_by_svi(
    vae: MVAE, train: MultimodalDataset, objective: ELBO, *, epochs: int, batch_size: int
) -> None:
    """The loop: batches are dicts of tensors, and so are the masks of what is observed."""
    optim = pyro.optim.ClippedAdam({"lr": 1e-3, "clip_norm": 10.0})
    svi = SVI(vae.model, vae.guide, optim, objective)
    vae.train()
    for epoch in range(epochs):
        total = 0.0
        for x, observed in train.batches(batch_size, shuffle=True, seed=epoch):
            total += svi.step(x, observed)
        if epoch % max(1, epochs // 5) == 0 or epoch == epochs - 1:
            print(f"  epoch {epoch:3}: objective {-total / len(train):8.2f} nats per row")
    vae.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--num-samples", type=int, default=500, help="draws of each test row")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    train, test = digits()
    if args.quick:
        args.epochs, args.num_samples = 2, 50
        train, test = train.subset(range(256)), test.subset(range(32))

    pyro.clear_param_store()
    models = {}
    for title in ("published objective", "Trace_ELBO"):
        pyro.set_rng_seed(0)
        vae = MVAE(train.modalities, latent_dim=args.latent_dim)
        objective = Trace_ELBO() if title == "Trace_ELBO" else vae.objective()
        print(f"MVAE, {title}")
        train_by_svi(vae, train, objective, epochs=args.epochs, batch_size=args.batch_size)
        models[title] = vae

    x, observed = test.tensors()
    table = likelihood_table(models, x, observed, num_samples=args.num_samples)
    print(f"\nTest rows: {len(test)}; nats per row ± standard error, [share of rows with k > 0.7]")
    print(f"{'':24}" + "".join(f"{title:>26}" for title in models))
    for quantity in table["quantity"].values:
        print(f"{quantity:24}", end="")
        for title in models:
            cell = table.sel(model=title, quantity=quantity)
            mean, error, share = (
                float(cell[kind]) for kind in ("mean", "standard_error", "pareto_k")
            )
            print(f"{f'{mean:.2f} ± {error:.2f} [{share:.0%}]':>26}", end="")
        print()


if __name__ == "__main__":
    main()
