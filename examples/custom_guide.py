"""A guide of your own: full-covariance posteriors over the latents of a zoo model.

The models of the zoo approximate the posterior of z by Gaussians with a diagonal covariance, alone
or in mixtures. The exact posterior correlates the dimensions of z. Here the model of MVAE keeps
its place, and a guide of our own takes that of its product of experts:

    q(z | x_S) prop. to N(z; 0, I) prod_{m in S} exp(h_m' z - z' L_m L_m' z / 2)

so that precisions add up, I + sum_m L_m L_m', and so do the shifts h_m. A network for each modality
gives h_m (D,) and L_m (D, R). A modality that a row lacks adds zero: the guide is exact about
missing data, for every set S of observed modalities, by construction.

Any Pyro guide over the sites of the model will do (here one site, "z", inside the plate "data"). It
is called as ``guide(x, observed)``. ``fit(..., guide=guide, objective=Trace_ELBO())`` trains it
together with the model, ``log_likelihood(..., guide=guide)`` has it propose. The estimates are
consistent for each model whatever the guide. For one fixed model, a better guide has the larger
effective sample size (ess) and the smaller Pareto k; but here each guide trains a model of its own,
so that these figures compare pairs, not guides. Our networks are not those of the built-in guide
either: what the covariances do is the difference between our two guides with the same networks,
one of which keeps diagonals alone.

The last fit adds an alignment term. An ELBO *subtracts* what a guide holds, so a ``pyro.factor``
of the guide with the squared Wasserstein distance between q(z | image) and q(z | label) pulls the
two together. It acts on the training only: likelihoods never see the factor of a guide.

Run ``python custom_guide.py``; ``--quick`` for a run of seconds.
"""

import argparse
import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from mmzoo import MultimodalVAE
from mmzoo.data import MultimodalDataset, digits, missing_completely_at_random
from mmzoo.evaluation import log_likelihood
from mmzoo.inference import Alignment, Wasserstein, fit
from mmzoo.models import MVAE


class FullCovarianceGuide(nn.Module):
    """Products of full-covariance experts.

    ``fit`` finds the parameters of a guide that is a module. In a script around Pyro's ``SVI`` the
    first line of ``forward`` would be ``pyro.module("guide", self)``.

    Args:
        vae: The model whose sites these are.
        rank: Columns R of each L_m.
        hidden: Width of the networks.
        diagonal: Whether to keep the diagonal of each L_m L_m' alone: the control.
        alignment: A term that ties the experts together, or None.
    """

    def __init__(
        self,
        vae: MultimodalVAE,
        *,
        rank: int,
        hidden: int = 256,
        diagonal: bool = False,
        alignment: Alignment | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim, self.rank = vae.latent_dim, rank
        self.diagonal, self.alignment = diagonal, alignment
        self.networks = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Flatten(),
                    nn.Linear(math.prod(modality.event_shape), hidden),
                    nn.SiLU(),
                    nn.Linear(hidden, hidden),
                    nn.SiLU(),
                    nn.Linear(hidden, self.latent_dim * (1 + rank)),
                )
                for name, modality in vae.modalities.items()
            }
        )

    def forward(self, x: dict[str, Tensor], observed: dict[str, Tensor] | None = None) -> Tensor:
        """Samples z ``(N, D)`` given whatever each row has."""
        shift, precision, mask = self.experts(x, observed or {})
        with pyro.plate("data", len(mask), dim=-1):
            if self.alignment is not None:
                distance = self.alignment.factor(*moments(shift, precision), mask)  # (N,)
                pyro.factor("alignment", distance, has_rsample=True)
            loc, tril = gaussian(shift.sum(-2), precision.sum(-3))
            # (N,) | (D,)
            return pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    def experts(
        self, x: dict[str, Tensor], observed: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shifts ``(N, M, D)``, precisions ``(N, M, D, D)`` and masks ``(N, M)``."""
        shifts, precisions, masks = [], [], []
        for name, value in x.items():
            mask = observed.get(name)
            mask = value.new_ones(len(value), dtype=torch.bool) if mask is None else mask
            # Missing values may be NaN, and 0 * NaN is NaN: replace them before the network.
            filled = torch.where(mask.view(-1, *(1,) * (value.dim() - 1)), value, 0.0)
            out = self.networks[name](filled).unflatten(-1, (self.latent_dim, -1))
            h, factor = out[..., 0], out[..., 1:] / self.rank**0.5
            shifts.append(torch.where(mask[:, None], h, 0.0))
            precision = factor @ factor.mT
            if self.diagonal:
                precision = precision.diagonal(dim1=-2, dim2=-1).diag_embed()
            precisions.append(torch.where(mask[:, None, None], precision, 0.0))
            masks.append(mask)
        return torch.stack(shifts, -2), torch.stack(precisions, -3), torch.stack(masks, -1)


def gaussian(shift: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(*, D)`` and Cholesky factor ``(*, D, D)`` of N(0, I) times an expert."""
    eye = torch.eye(shift.shape[-1], dtype=shift.dtype, device=shift.device)
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(eye + precision))
    loc = (covariance @ shift.unsqueeze(-1)).squeeze(-1)
    return loc, torch.linalg.cholesky(covariance)


def moments(shift: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations ``(N, M, D)`` of q(z | x_m), each with the prior."""
    loc, tril = gaussian(shift, precision)
    return loc, tril.square().sum(-1).sqrt()


def evaluate(
    vae: MultimodalVAE, test: MultimodalDataset, guide: nn.Module | None, num_samples: int
) -> None:
    """Prints log p in nats per row with its standard error, and how well the guide proposes."""
    x, observed = test.tensors()
    for of, given in ((["image", "label"], []), (["image"], []), (["label"], ["image"])):
        rows = log_likelihood(
            vae, x, observed, of=of, given=given, num_samples=num_samples, guide=guide
        )
        mean, spread = float(rows.log_prob.mean()), float(rows.log_prob.std(ddof=1))
        print(
            f"  {rows.attrs['quantity']:20} {mean:8.2f} ± {spread / len(rows.row) ** 0.5:.2f}"
            f"   median ess {float(rows.ess.median()):6.1f} of {num_samples}"
            f"   k > 0.7 in {float((rows.pareto_k > 0.7).mean()):.0%} of rows"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="columns of each factor L_m")
    parser.add_argument("--weight", type=float, default=0.3, help="of the alignment term")
    parser.add_argument("--num-samples", type=int, default=500, help="draws of each test row")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.num_samples = 1, 50

    train, test = digits()
    modalities = train.modalities
    # A third of the labels and a third of the images are missing, never both.
    train = train.with_observed(
        missing_completely_at_random(train, {"image": 1 / 3, "label": 1 / 3}, seed=0)
    )
    if args.quick:
        train, test = train.subset(range(256)), test.subset(range(32))

    settings = {
        "MVAE with its own guide": None,
        "MVAE with diagonal experts of ours": {"diagonal": True},
        "MVAE with full-covariance experts": {},
        "… and alignment in the guide": {"alignment": Wasserstein(args.weight)},
    }
    for title, options in settings.items():
        torch.manual_seed(0)
        vae = MVAE(modalities, latent_dim=args.latent_dim)
        guide = None
        if options is not None:
            guide = FullCovarianceGuide(vae, rank=args.rank, **options)
        # The same objective for all: the plain ELBO of whatever a row has.
        history = fit(
            vae, train, guide=guide, objective=Trace_ELBO(), epochs=args.epochs, progress=False
        ).history
        print(f"{title}: training bound {-float(history.loss[-1]):.2f} nats per row")
        evaluate(vae, test, guide, args.num_samples)


if __name__ == "__main__":
    main()
