"""What can one do with a multimodal VAE? Six measures of its use, on digits and their labels.

A likelihood says how well a model knows its data; these say what its latents and samples are good
for. Each takes any pair (a model of the zoo, or a ``PyroPair`` of your own) and any subset of the
modalities, and gives a standard error over rows:

- **coherence**: is what is generated of the class of what was observed? A classifier judges. The
  table's last rows are its own accuracy on real images, above which no model can be seen to get;
- **joint coherence**: do image and label, both drawn from the prior, agree?
- a **linear probe** reads the digit off the latents, and **clusters** of latents are compared with
  the digits. Given the label both are as good as perfect; given the image they say what it showed;
- **reconstruction**: squared error and structural similarity (SSIM). Across modalities the image
  can only be the average image of a digit, so look at the drop;
- the **Fréchet distance** between features of generated and of real images, the features being
  those of the classifier, before its last layer. It is too large by about a constant over the
  number of rows: ``extrapolated`` estimates the limit of infinite samples;
- **retrieval**: an image looks for its label among all rows. All rows of one digit have the same
  label, so the best possible median rank is about half the number of rows of a digit;
- a **sweep** repeats any of them with ever more entries missing, here labels at training.

Run ``python task_measures.py``; ``--quick`` for a run of seconds.
"""

import argparse

import torch
import xarray as xr

from mmzoo import MultimodalVAE
from mmzoo.data import MultimodalDataset, digits
from mmzoo.evaluation.classifiers import train_classifier
from mmzoo.evaluation.coherence import coherence, joint_coherence
from mmzoo.evaluation.generation import frechet_distance, reconstruction
from mmzoo.evaluation.probes import clustering, linear_probe
from mmzoo.evaluation.retrieval import retrieval
from mmzoo.evaluation.sweeps import missingness_sweep
from mmzoo.inference import fit
from mmzoo.models import MVAE
from mmzoo.seeding import seeded


def trained(train: MultimodalDataset, seed: int, epochs: int) -> MultimodalVAE:
    """The model of the MVAE paper."""
    with seeded(seed):
        vae = MVAE(train.modalities, latent_dim=8)
    fit(vae, train, epochs=epochs, batch_size=64, seed=seed, progress=False)
    return vae


def show(title: str, table: xr.Dataset, value: str, error: str) -> None:
    """A table of a value with its standard error, subsets downwards."""
    print(f"\n{title}")
    for name in table["subset"].values:
        row = table.sel(subset=name)
        pairs = zip(row[value].values.ravel(), row[error].values.ravel(), strict=True)
        print(f"  {name:12s}", "  ".join(f"{mean:6.3f} ± {spread:.3f}" for mean, spread in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows nothing")
    args = parser.parse_args()
    epochs, rows, samples = (1, 40, 20) if args.quick else (30, None, 1000)

    train, test = digits(seed=0)
    if rows is not None:
        train, test = train.subset(range(4 * rows)), test.subset(range(rows))
    judge = train_classifier(train, "image", test=test, epochs=epochs)
    vae = trained(train, 0, epochs)

    found = coherence(vae, test, {"image": judge}, num_draws=10)
    targets = ", ".join(found["target"].values)
    show(f"Coherence of {targets} given", found, "coherence", "standard_error")
    real = found[["classifier_accuracy", "classifier_standard_error"]]
    for name in real["target"].values:
        accuracy, error = real.sel(target=name).to_array().values
        print(f"  real {name:7s} {accuracy:6.3f} ± {error:.3f}")
    joint = joint_coherence(vae, {"image": judge}, num_samples=samples)
    print(f"  joint        {joint.joint_coherence:6.3f} ± {joint.standard_error:.3f}")

    found = linear_probe(vae, train, test, "digit")
    show("Linear probe: accuracy given", found, "accuracy", "standard_error")
    found = clustering(vae, test, "digit")
    show("Clusters and digits: adjusted Rand index given", found, "ari", "ari_standard_error")

    found = reconstruction(vae, test)
    show("SSIM of the image given", found.sel(target="image"), "ssim", "ssim_standard_error")

    with torch.no_grad(), seeded(0):
        images = vae.generate(num_rows=samples)["image"]
    features = torch.nn.Sequential(*list(judge.network)[:-1])
    found = frechet_distance(test.tensors()[0]["image"], images, features, num_sizes=10)
    print(f"\nFréchet distance {found.distance:.2f}, extrapolated {found.extrapolated:.2f}")

    for method in ("cosine", "likelihood"):
        found = retrieval(vae, test, query="image", target="label", k=[1, 10], method=method)
        cell = found.squeeze()
        print(
            f"\nLabel of an image by {method}: median rank {cell.median_rank:.1f} "
            f"± {cell.median_rank_standard_error:.1f} (by chance {cell.median_rank_chance:.1f}), "
            f"recall at 10 {cell.recall.sel(k=10):.3f} ± {cell.standard_error.sel(k=10):.3f} "
            f"(by chance {cell.chance.sel(k=10):.3f})"
        )

    def label_coherence(pair: MultimodalVAE, rows: MultimodalDataset) -> float:
        cells = coherence(pair, rows, {}, labels="digit", given=["image"], num_draws=10)
        return float(cells["coherence"].sel(subset="image", target="label").item())

    found = missingness_sweep(
        label_coherence,
        lambda rows, seed: trained(rows, seed, max(1, epochs // 3)),
        train,
        [0.0, 0.9] if args.quick else [0.0, 0.5, 0.9],
        at="train",
        test=test,
        names=["label"],
        seeds=[0] if args.quick else [0, 1],
    )
    print("\nLabel given image, by the share of labels missing in training (seeds across)")
    print(found["value"].to_pandas().round(3).to_string())


if __name__ == "__main__":
    main()
