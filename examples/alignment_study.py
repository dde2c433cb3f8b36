"""Does alignment do what it is for? What a model generates, and how far its posteriors are apart.

A model is given some modalities of test rows and generates *all* of them from one latent:

    z ~ q(z | x_S),    image ~ p(image | z),    label ~ p(label | z)

If the latent spaces of the modalities are aligned, the picture shows the class that the label
names, whatever S was, and both are the class that was given. A classifier that was trained on real
pictures reads the generated ones; its accuracy on real test pictures is printed, for no agreement
can be expected above it. The squared Wasserstein distance between the posteriors of the single
modalities is the one of the training history, at the first and at the last epoch.

``python alignment_study.py`` trains MW-VAE with and without alignment on the digits and compares
the two; ``--quick`` for a run of seconds. With folders that `mmzoo train` wrote it compares those:

    mmzoo train mwvae --data mnist --option alignment_weight=10 --out runs/aligned
    mmzoo train mwvae --data mnist --option alignment_weight=0 --out runs/alone
    python alignment_study.py runs/aligned runs/alone

Variational Auto-Encoder for Multimodal Representation Learning (Azam), section 3.4.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import torch
from torch import nn

from mmzoo.config import RunConfig
from mmzoo.data import MultimodalDataset
from mmzoo.evaluation.runs import Run, load_data, read_run, train_run
from mmzoo.seeding import seeded

ROWS = 500


def classifier(train: MultimodalDataset, seed: int, epochs: int) -> nn.Module:
    """A perceptron from pictures to classes, trained on real rows."""
    image, label = (train.batch([0])[0][name] for name in ("image", "label"))
    with seeded(seed):
        net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(image.numel(), 512),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(256, label.numel()),
        )
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for epoch in range(epochs):
            for x, _ in train.batches(128, shuffle=True, seed=seed + epoch):
                loss = nn.functional.cross_entropy(net(x["image"]), x["label"].argmax(-1))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return net.eval()


@torch.no_grad()
def agreement(
    run: Run, test: MultimodalDataset, judge: nn.Module, given: tuple[str, ...], seed: int
) -> tuple[float, float, float]:
    """Shares of rows: picture and label agree; the picture is right; the label is right."""
    counts = torch.zeros(3)
    with seeded(seed):
        for x, _ in test.batches(ROWS):
            z = run.vae.posterior({name: x[name] for name in given}).sample()
            picture = judge(run.vae.likelihood("image", z).mean).argmax(-1)
            label = run.vae.likelihood("label", z).sample().argmax(-1)
            truth = x["label"].argmax(-1)
            counts += torch.stack(
                [(picture == label).sum(), (picture == truth).sum(), (label == truth).sum()]
            )
    return tuple((counts / len(test)).tolist())


def train_both(quick: bool) -> list[Run]:
    """MW-VAE on the digits, aligned and alone."""
    runs = []
    for title, weight in (("aligned", 10.0), ("alone", 0.0)):
        options = {"alignment_weight": weight, "modality_weights": {"label": 5.0}}
        config = RunConfig.make(
            "digits",
            models=("mwvae",),
            options={"mwvae": options},
            epochs=1 if quick else None,
            limit=50 if quick else None,
        )
        with tempfile.TemporaryDirectory() as folder:
            runs.append(train_run(config, "mwvae", Path(folder, title), progress=False))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of mmzoo train")
    parser.add_argument("--test-rows", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=10, help="of the classifier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()

    if args.quick:
        args.epochs, args.test_rows = 1, 20
    runs = [run for folder in args.runs for run in read_run(folder)] or train_both(args.quick)
    train, test = load_data(runs[0].config)
    test = test.subset(range(min(args.test_rows, len(test))))
    judge = classifier(train, args.seed, args.epochs)
    x, _ = test.tensors()
    right = (judge(x["image"]).argmax(-1) == x["label"].argmax(-1)).float().mean()
    print(f"classifier: {right:.1%} of {len(test)} real test pictures")
    for run in runs:
        distance = run.history["wasserstein"].values.reshape(-1)
        first, last = distance[0], distance[-1]
        print(f"\n{run.folder.name}: W2^2 {first:.2f} in the first epoch, {last:.2f} in the last")
        print(f"  {'given':14}{'agree':>8}{'picture':>10}{'label':>8}")
        names = ("image", "label")
        for size in (1, 2):
            for given in itertools.combinations(names, size):
                shares = agreement(run, test, judge, given, args.seed)
                print("  {:14}{:8.1%}{:10.1%}{:8.1%}".format(", ".join(given), *shares))


if __name__ == "__main__":
    main()
