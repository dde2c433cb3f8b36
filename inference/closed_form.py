"""What the objectives share that add up reconstructions and closed-form divergences.

Each visits a few posteriors ``q(z | x_S)`` of a row, takes one reparameterised draw from each for
``E log p(x_m | z)``, and has the divergences between Gaussians in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from mmzoo.batch import Batch, modality_names
from mmzoo.inference.objective import (
    Objective,
    Schedule,
    at_step,
    merged_terms,
    own_networks,
    trace_terms,
)
from mmzoo.vae import Experts, MultimodalVAE

__all__ = ["ClosedFormObjective", "Expected", "Visit"]

Terms = dict[str, tuple[Tensor, Tensor]]


class Expected(NamedTuple):
    """What one draw from each posterior says.

    Attributes:
        log_p: ``lambda_m log p(x_m | z)``, zero where it is not scored, ``(S, N, M)``.
        loc: Means of the posteriors, ``(S, N, D)``.
        scale: Their standard deviations.
    """

    log_p: Tensor
    loc: Tensor
    scale: Tensor


@dataclass
class Visit:
    """A pair on a batch, whose encoders have run.

    Attributes:
        vae: The model.
        pair: Its ``model`` and ``guide``.
        batch: The checked rows.
        experts: What the encoders say of them.
        present: Who observes what, ``(N, M)``.
        beta: Weight of the divergences at this step.
        weights: lambda of each modality, ``(M,)``.
        terms: Collected on the way, see :attr:`Objective.terms`.
    """

    vae: MultimodalVAE
    pair: tuple[Callable[..., Any], Callable[..., Any]]
    batch: Batch
    experts: Experts
    present: Tensor
    beta: float
    weights: Tensor
    terms: list[Terms] = field(default_factory=list)

    def expected(self, given: Tensor, scored: Tensor) -> Expected:
        """Runs the pair on ``q(z | x_S)`` for S given and the likelihoods of what is scored.

        For mixtures over subsets each subset has its own component. Where nothing is given, z has
        the prior, and nothing counts.

        Args:
            given: Masks ``(S, N, M)`` of what the guide sees.
            scored: Masks ``(S, N, M)`` of what is scored.
        """
        names, (model, guide) = tuple(self.vae.modalities), self.pair
        some = given.any(-1)
        guide = partial(guide, experts=self.experts, component=True)
        with pyro.plate("subsets", len(given), dim=-2), poutine.mask(mask=some):
            q = poutine.trace(guide).get_trace(self.batch.seen_through(given, names))
            rows = self.batch.seen_through(scored & some.unsqueeze(-1), names)
            p = poutine.trace(poutine.replay(model, q)).get_trace(rows)
        p, q = (prune_subsample_sites(trace) for trace in (p, q))
        for trace in (p, q):
            trace.compute_log_prob()
        self.terms.append(trace_terms(p, q))
        nothing = self.weights.new_zeros(some.shape)
        found = (p.nodes[n]["log_prob"] if n in p.nodes else nothing for n in names)
        log_p = torch.stack([each.expand(some.shape) for each in found], -1)
        base = q.nodes["z"]["fn"].base_dist
        return Expected(self.weights * log_p, base.loc, base.scale)

    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of ``p(z)``, ``(D,)`` each."""
        base = self.vae.prior().base_dist
        return base.loc, base.scale

    def note(self, name: str, rows: Tensor) -> None:
        """Records the sum over rows of a further term, ``(N,)``."""
        count = self.present.any(-1).sum()
        self.terms.append({name: (rows.detach().sum(), count)})


class ClosedFormObjective(Objective):
    """A subclass says in :meth:`rows` what is maximised for each row.

    Args:
        beta: Weight of the divergences, a number or a function of the step (``LinearWarmup``).
        modality_weights: lambda by name, numbers or functions of the step; the others are one.
    """

    def __init__(
        self,
        *,
        beta: Schedule = 1.0,
        modality_weights: Mapping[str, Schedule] | None = None,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.modality_weights = dict(modality_weights or {})
        self.step = 0

    def rows(self, visit: Visit) -> Tensor:
        """The objective of each row, ``(N,)``."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it maximises")

    def differentiable_loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Minus the objective of a batch, summed over rows; counts as a step of the schedules."""
        visit = self._visit(model, guide, x, observed)
        rows = self.rows(visit)
        self.terms = merged_terms(visit.terms)
        self.step += torch.is_grad_enabled()
        return -rows.sum()

    def _visit(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Mapping[str, Tensor | None],
        observed: Mapping[str, Tensor] | None,
    ) -> Visit:
        where = type(self).__name__
        vae = own_networks(where, model, guide, MultimodalVAE)
        if vae.family != "normal":
            raise ValueError(
                f"{where}: expected Gaussian posteriors (family 'normal'), found {vae.family!r}; "
                "the closed forms hold for no others"
            )
        modality_names(vae.modalities, self.modality_weights, f"{where} modality_weights")
        expected = f"{where}: expected"
        weights = [
            at_step(
                self.modality_weights.get(name, 1.0),
                self.step,
                f"{expected} modality_weights[{name!r}]",
            )
            for name in vae.modalities
        ]
        batch = vae.check(x, observed)
        experts = vae._encode(batch)
        beta = at_step(self.beta, self.step, f"{expected} beta")
        lambdas = experts.loc.new_tensor(weights)
        return Visit(vae, (model, guide), batch, experts, vae._full_mask(batch), beta, lambdas)
