"""An exact world written as a pair of a user's own: a plain Pyro model and guide."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from mmzoo import Modality
from mmzoo.evaluation.pair import PyroPair
from mmzoo.exact import LinearGaussianWorld
from mmzoo.likelihoods import Normal

Change = Callable[[torch.distributions.MultivariateNormal], torch.distributions.Distribution]


class Programs:
    """The linear-Gaussian world, with its exact posterior, or a change of it, as the guide."""

    def __init__(self, world: LinearGaussianWorld, change: Change | None = None) -> None:
        self.world = world
        self.change = change or (lambda q: q)

    def model(self, x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        first = next(iter(self.world.event_sizes))
        with pyro.plate("data", len(x[first]), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.world.latent_dim]).to_event(1))
            for name in self.world.event_sizes:
                loc = z @ self.world.weights[name].mT + self.world.biases[name]
                fn = dist.Normal(loc, self.world.scales[name]).to_event(1)
                pyro.sample(name, fn, obs=x[name])

    def guide(self, x: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        with pyro.plate("data", len(next(iter(x.values()))), dim=-1):
            pyro.sample("z", self.change(self.world.posterior(x, observed)))

    def modalities(self) -> list[Modality]:
        sizes = self.world.event_sizes.items()
        return [Modality(name, (size,), Normal(scale=1.0)) for name, size in sizes]


def own_pair(world: LinearGaussianWorld, change: Change | None = None, **options: Any) -> PyroPair:
    """The world as a pair.

    Args:
        world: The world.
        change: From its exact posterior to the guide's distribution; default: as it is.
        options: Of the pair.
    """
    programs = Programs(world, change)
    return PyroPair(programs.model, programs.guide, programs.modalities(), **options)


def widened(scale: float) -> Change:
    """The posterior with its scale multiplied."""
    return lambda q: dist.MultivariateNormal(q.loc, scale_tril=q.scale_tril * scale)


def blind(q: torch.distributions.MultivariateNormal) -> torch.distributions.Distribution:
    """The same point, whatever was seen."""
    return dist.Normal(torch.ones_like(q.loc), 1e-20).to_event(1)
