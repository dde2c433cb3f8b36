r"""Worlds whose likelihoods are known exactly: the oracle for models, objectives, estimators.

| world | latent | modalities | by |
|---|---|---|---|
| `LinearGaussianWorld` | $z \sim N(0, I)$ | $x_m = W_m z + b_m + \sigma_m \epsilon$ | algebra |
| `DiscreteWorld` | $c \sim \pi$ | categorical or Bernoulli given c | enumeration |
| any, by `quadrature_log_prob` | $z \sim N(0, I)$, at most 2-d | any | Gauss-Hermite quadrature |

A world takes the same `x` and `observed` as a model: `x` maps names to tensors `(*, d_m)`, and an
absent name is missing for every row; `observed` maps names to bool tensors `(*,)`. Values under a
False mask are never looked at. Everything is float64, on the CPU.

Example:
    >>> world = LinearGaussianWorld.random({"image": 5, "label": 3}, latent_dim=2, seed=0)
    >>> x = world.sample(4, seed=1)
    >>> joint = world.log_prob(x, of=["image", "label"])
    >>> parts = world.log_prob(x, of=["image"], given=["label"]) + world.log_prob(x, of=["label"])
    >>> bool((joint - parts).abs().max() < 1e-10)
    True
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from mmzoo.likelihoods import Normal
from mmzoo.modality import Modality

__all__ = ["DiscreteWorld", "LinearGaussianWorld", "quadrature_log_prob"]

# Stands for the infinite scale of a direction that an expert says nothing about: its precision,
# 1e-24, is lost beside the prior's 1, and its square is finite in float32.
UNINFORMED_SCALE = 1e12

Masks = Mapping[str, Tensor]
Gaussian = tuple[Tensor, Tensor] | torch.distributions.Distribution


class _World(ABC):
    """What all worlds share: the check of their input, and conditioning by the chain rule."""

    event_sizes: dict[str, int]

    @abstractmethod
    def _log_evidence(self, x: Mapping[str, Tensor], observed: Masks) -> Tensor:
        """Exact log-density of the observed modalities of each row; all names are present."""

    def log_prob(
        self,
        x: Mapping[str, Tensor],
        observed: Masks | None = None,
        *,
        of: Sequence[str],
        given: Sequence[str] = (),
    ) -> Tensor:
        """Exact log p(x_of | x_given), of those modalities that a row has.

        Args:
            x: Values of the modalities, `(*, d_m)`.
            observed: Which rows have them, `(*,)`.
            of: Names of the modalities that are scored.
            given: Names of the modalities that are conditioned on.

        Returns:
            Log-density `(*,)`; NaN in a row that has none of `of`.
        """
        self._check_names("of", of)
        self._check_names("given", given)
        if not of or set(of) & set(given):
            raise ValueError(
                f"of, given: expected names of which none is in both, found of={list(of)}, "
                f"given={list(given)}; name at least one modality in of"
            )
        x, observed = self._complete(x, observed)
        known = _only(observed, given)
        scored = self._log_evidence(x, _only(observed, [*of, *given])) - self._log_evidence(
            x, known
        )
        has_some = torch.stack([observed[name] for name in of]).any(0)
        return torch.where(has_some, scored, torch.nan)

    def _check_names(self, where: str, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.event_sizes:
                known = ", ".join(self.event_sizes)
                raise ValueError(f"{where}: unknown modality {name!r}; this world has {known}")

    def _complete(
        self, x: Mapping[str, Tensor], observed: Masks | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Give every modality a float64 value `(*, d_m)`, zero if missing, and a mask `(*,)`."""
        observed = observed or {}
        self._check_names("x", list(x))
        self._check_names("observed", list(observed))
        if not x:
            raise ValueError(
                "x: expected at least one modality, found none; pass one under a False mask"
            )
        batch = next(iter(x.values())).shape[:-1]
        values, masks = {}, {}
        for name, size in self.event_sizes.items():
            masks[name] = _mask(name, observed.get(name), batch, present=name in x)
            value = x.get(name, torch.zeros(size)).to(torch.float64)
            if name in x and value.shape != (*batch, size):
                raise ValueError(
                    f"modality {name!r}: expected shape {(*batch, size)}, found "
                    f"{tuple(value.shape)}; every modality needs the same rows"
                )
            values[name] = torch.where(masks[name].unsqueeze(-1), value, 0.0)
        return values, masks


def _mask(name: str, mask: Tensor | None, batch: torch.Size, *, present: bool) -> Tensor:
    if mask is None or not present:
        return torch.full(batch, present)
    if mask.dtype != torch.bool or mask.shape != batch:
        raise ValueError(
            f"modality {name!r}: expected a bool mask of shape {tuple(batch)}, found {mask.dtype} "
            f"of shape {tuple(mask.shape)}; pass one bool for each row"
        )
    return mask


def _only(observed: Masks, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: mask & (name in names) for name, mask in observed.items()}


class LinearGaussianWorld(_World):
    r"""Linear-Gaussian views of one latent, $x_m = W_m z + b_m + \sigma_m \epsilon_m$.

    With $P = I + \sum_m W_m^T \Sigma_m^{-1} W_m$ over the modalities that a row has, the posterior
    is $N(P^{-1} \sum_m W_m^T \Sigma_m^{-1} (x_m - b_m), P^{-1})$. The evidence is read off at its
    mean, $\log p(x) = \log p(x, z) - \log p(z | x)$, a sum of squares that does not cancel.
    Pattern recognition and machine learning, section 2.3.3 (Bishop, 2006).

    Args:
        weights: $W_m$ of each modality, `(d_m, D)`.
        biases: $b_m$ of each modality, `(d_m,)`.
        scales: $\sigma_m$ of each modality, a number or `(d_m,)`.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        scales: Mapping[str, float | Tensor],
    ) -> None:
        if not weights or not weights.keys() == biases.keys() == scales.keys():
            raise ValueError(
                "weights, biases, scales: expected the same names, at least one, found "
                f"{list(weights)}, {list(biases)}, {list(scales)}"
            )
        self.weights = {name: w.to(torch.float64) for name, w in weights.items()}
        self.latent_dim = next(iter(weights.values())).shape[-1]
        self.event_sizes = {name: len(w) for name, w in self.weights.items()}
        self.biases, self.scales = {}, {}
        for name, size in self.event_sizes.items():
            self.biases[name] = biases[name].to(torch.float64)
            self.scales[name] = torch.as_tensor(scales[name], dtype=torch.float64).expand(size)
            self._check(name)

    def _check(self, name: str) -> None:
        size, found = self.event_sizes[name], (self.weights[name].shape, self.biases[name].shape)
        if found != ((size, self.latent_dim), (size,)):
            raise ValueError(
                f"modality {name!r}: expected a weight of shape {(size, self.latent_dim)} and a "
                f"bias of shape {(size,)}, found {tuple(map(tuple, found))}"
            )
        if not (self.scales[name] > 0).all():
            raise ValueError(
                f"modality {name!r}: expected positive scales, found {self.scales[name].tolist()}"
            )

    @classmethod
    def random(
        cls,
        event_sizes: Mapping[str, int],
        latent_dim: int,
        *,
        seed: int,
        diagonal: bool = False,
    ) -> Self:
        r"""Draw a world; noise scales are one number per modality, between 0.5 and 1.

        Args:
            event_sizes: Size $d_m$ of each modality.
            latent_dim: Size D of the latent.
            seed: Seed of the draw.
            diagonal: Whether every $W_m^T W_m$ is diagonal, so that the product of the `expert` of
                each modality is the exact posterior; where $d_m < D$, only $d_m$ of the columns of
                $W_m$, drawn at random, are not zero.
        """
        rng = torch.Generator().manual_seed(seed)
        weights, biases, scales = {}, {}, {}
        for name, size in event_sizes.items():
            weight = _randn(rng, size, latent_dim)
            weights[name] = _orthogonal_columns(weight, rng) if diagonal else weight
            biases[name] = _randn(rng, size)
            scales[name] = 0.5 + 0.5 * torch.rand((), generator=rng, dtype=torch.float64)
        return cls(weights, biases, scales)

    def sample(self, num_rows: int, seed: int) -> dict[str, Tensor]:
        """Draw complete rows, `{name: (num_rows, d_m)}`."""
        rng = torch.Generator().manual_seed(seed)
        z = _randn(rng, num_rows, self.latent_dim)
        return {
            name: self._mean(name, z) + self.scales[name] * _randn(rng, num_rows, size)
            for name, size in self.event_sizes.items()
        }

    def posterior(
        self, x: Mapping[str, Tensor], observed: Masks | None = None
    ) -> dist.MultivariateNormal:
        """Exact p(z | x), batch `(*,)`, event `(D,)`; the prior in a row without modalities."""
        return self._posterior(*self._complete(x, observed))

    def expert(self, name: str, x_m: Tensor) -> tuple[Tensor, Tensor]:
        r"""Likelihood factor $p(x_m | z)$ as a Gaussian in z, for diagonal worlds.

        The product of these experts and of the prior is the exact posterior, for every subset. A
        direction of z that x_m says nothing about has mean 0 and the finite scale 1e12.

        Args:
            name: The modality m.
            x_m: Its values, `(*, d_m)`.

        Returns:
            Mean and standard deviation, `(*, D)`.
        """
        self._check_names("expert", [name])
        weight, scale = self._expert_map(name)
        loc = (x_m.to(torch.float64) - self.biases[name]) @ weight.mT
        return loc, scale.expand_as(loc)

    def expected_log_likelihood(self, name: str, loc: Tensor, scale: Tensor, x_m: Tensor) -> Tensor:
        r"""Exact $E_{z \sim N(loc, scale^2)} \log p(x_m | z)$, `(*,)`.

        Args:
            name: The modality m.
            loc: Means of the latent, `(*, D)`.
            scale: Standard deviations of the latent, `(*, D)`.
            x_m: Values of the modality, `(*, d_m)`.
        """
        self._check_names("expected_log_likelihood", [name])
        return self._expected(name, *_moments((loc, scale)), x_m.to(torch.float64))

    def elbo(
        self,
        q: Gaussian,
        x: Mapping[str, Tensor],
        observed: Masks | None = None,
        *,
        scored: Sequence[str] | None = None,
    ) -> Tensor:
        r"""Exact $E_q \log p(x | z) - KL(q \| p(z))$ of a Gaussian guide, `(*,)`.

        Args:
            q: A pair (loc, scale) of `(*, D)`, an independent Normal or a MultivariateNormal.
            x: Values of the modalities, `(*, d_m)`.
            observed: Which rows have them, `(*,)`.
            scored: Names of the modalities in the first term; by default all of them.
        """
        x, observed = self._complete(x, observed)
        self._check_names("scored", scored or ())
        names = self.event_sizes if scored is None else scored
        mean, covariance = _moments(q)
        q_z = dist.MultivariateNormal(mean, covariance)
        terms = [observed[m] * self._expected(m, mean, covariance, x[m]) for m in names]
        return sum(terms, -kl_divergence(q_z, self._prior()))

    def kl(self, q: Gaussian, x: Mapping[str, Tensor], observed: Masks | None = None) -> Tensor:
        r"""Exact $KL(q \| p(z | x)) = \log p(x) - ELBO$, `(*,)`; arguments as in `elbo`."""
        return kl_divergence(dist.MultivariateNormal(*_moments(q)), self.posterior(x, observed))

    def modalities(self, encoder: str | None = None) -> list[Modality]:
        """Modalities for models whose generative part is this world, frozen, in the default dtype.

        Args:
            encoder: `"exact"` for frozen encoders that return the pair (loc, scale) of `expert`
                (diagonal worlds); None for the default networks.
        """
        if encoder not in (None, "exact"):
            raise ValueError(f"encoder: expected 'exact' or None, found {encoder!r}")
        return [self._modality(name, encoder) for name in self.event_sizes]

    def _modality(self, name: str, encoder: str | None) -> Modality:
        scale = self.scales[name]
        if (scale != scale[0]).any():
            raise ValueError(
                f"modality {name!r}: expected one scale for all entries, found {scale.tolist()}; "
                "a likelihood with a fixed scale has one number"
            )
        likelihood = Normal(scale=scale[0].item())
        network = None
        if encoder == "exact":
            weight, expert_scale = self._expert_map(name)
            network = _ExactEncoder(weight, self.biases[name], expert_scale)
        return Modality(
            name,
            event_shape=(self.event_sizes[name],),
            likelihood=likelihood,
            encoder=network,
            decoder=_LinearDecoder(self.weights[name], self.biases[name]),
        )

    def _prior(self) -> dist.MultivariateNormal:
        eye = torch.eye(self.latent_dim, dtype=torch.float64)
        return dist.MultivariateNormal(torch.zeros_like(eye[0]), scale_tril=eye)

    def _mean(self, name: str, z: Tensor) -> Tensor:
        return z @ self.weights[name].mT + self.biases[name]

    def _gram(self, name: str) -> Tensor:
        scaled = self.weights[name] / self.scales[name].unsqueeze(-1)
        return scaled.mT @ scaled  # (D, D)

    def _posterior(self, x: Mapping[str, Tensor], observed: Masks) -> dist.MultivariateNormal:
        precision = torch.eye(self.latent_dim, dtype=torch.float64)
        shift = torch.zeros(self.latent_dim, dtype=torch.float64)
        for name, mask in observed.items():
            residual = (x[name] - self.biases[name]) / self.scales[name].square()
            shift = shift + mask.unsqueeze(-1) * (residual @ self.weights[name])  # (*, D)
            precision = precision + mask[..., None, None] * self._gram(name)  # (*, D, D)
        loc = torch.cholesky_solve(shift.unsqueeze(-1), torch.linalg.cholesky(precision))
        return dist.MultivariateNormal(loc.squeeze(-1), precision_matrix=precision)

    def _log_evidence(self, x: Mapping[str, Tensor], observed: Masks) -> Tensor:
        posterior = self._posterior(x, observed)
        z = posterior.mean
        total = self._prior().log_prob(z) - posterior.log_prob(z)
        for name, mask in observed.items():
            total = total + mask * self._log_likelihood(name, z, x[name])
        return total

    def _log_likelihood(self, name: str, z: Tensor, x_m: Tensor) -> Tensor:
        return dist.Normal(self._mean(name, z), self.scales[name]).to_event(1).log_prob(x_m)

    def _expected(self, name: str, mean: Tensor, covariance: Tensor, x_m: Tensor) -> Tensor:
        spread = (self._gram(name) * covariance).sum((-2, -1))
        return self._log_likelihood(name, mean, x_m) - 0.5 * spread

    def _expert_map(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight `(D, d_m)` and scale `(D,)`: the expert's mean is weight @ (x_m - b_m)."""
        gram = self._gram(name)
        tau = gram.diagonal()
        if (gram - tau.diag_embed()).abs().max() > 1e-10 * tau.max():
            raise ValueError(
                f"modality {name!r}: expected W' diag(scale^-2) W to be diagonal, found "
                f"{gram.tolist()}; draw the world by LinearGaussianWorld.random(..., diagonal=True)"
            )
        informed = tau > UNINFORMED_SCALE**-2
        variance = 1 / torch.where(informed, tau, torch.inf)
        weight = variance.unsqueeze(-1) * (self.weights[name].mT / self.scales[name].square())
        return weight, torch.where(informed, variance.sqrt(), UNINFORMED_SCALE)


class DiscreteWorld(_World):
    r"""Views of one class, $c \sim \pi$, each categorical or a vector of Bernoullis given c.

    Everything is by enumeration: $p(x) = \sum_c \pi_c \prod_m p(x_m | c)$.

    Args:
        prior: Probabilities of the classes, `(C,)`.
        categorical: Probabilities of one-hot modalities, `(C, d_m)`, rows that sum to 1.
        bernoulli: Probabilities of binary modalities, `(C, d_m)`.
    """

    def __init__(
        self,
        prior: Tensor,
        categorical: Mapping[str, Tensor] | None = None,
        bernoulli: Mapping[str, Tensor] | None = None,
    ) -> None:
        categorical, bernoulli = dict(categorical or {}), dict(bernoulli or {})
        if not categorical | bernoulli or categorical.keys() & bernoulli.keys():
            raise ValueError(
                "categorical, bernoulli: expected at least one modality and no name in both, "
                f"found {list(categorical)} and {list(bernoulli)}"
            )
        self.prior = prior.to(torch.float64)
        self.one_hot = set(categorical)
        self.tables = {n: t.to(torch.float64) for n, t in (categorical | bernoulli).items()}
        self.event_sizes = {name: table.shape[-1] for name, table in self.tables.items()}
        _check_probabilities("prior", self.prior, (len(prior),), normalised=True)
        for name, table in self.tables.items():
            shape = (len(prior), self.event_sizes[name])
            where = f"modality {name!r}"
            _check_probabilities(where, table, shape, normalised=name in categorical)

    @classmethod
    def random(
        cls,
        num_classes: int,
        categorical: Mapping[str, int] | None = None,
        bernoulli: Mapping[str, int] | None = None,
        *,
        seed: int,
    ) -> Self:
        """Draw a world with all probabilities inside (0, 1).

        Args:
            num_classes: The number of classes C.
            categorical: Size of each one-hot modality.
            bernoulli: Size of each binary modality.
            seed: Seed of the draw.
        """
        rng = torch.Generator().manual_seed(seed)
        prior = _randn(rng, num_classes).softmax(-1)
        one_hot = {n: _randn(rng, num_classes, d) for n, d in (categorical or {}).items()}
        binary = {n: _randn(rng, num_classes, d) for n, d in (bernoulli or {}).items()}
        return cls(
            prior,
            {name: logits.softmax(-1) for name, logits in one_hot.items()},
            {name: logits.sigmoid() for name, logits in binary.items()},
        )

    def sample(self, num_rows: int, seed: int) -> dict[str, Tensor]:
        """Draw complete rows, `{name: (num_rows, d_m)}`, of zeros and ones."""
        rng = torch.Generator().manual_seed(seed)
        c = torch.multinomial(self.prior, num_rows, replacement=True, generator=rng)
        return {name: self._draw(name, c, rng) for name in self.tables}

    def posterior(self, x: Mapping[str, Tensor], observed: Masks | None = None) -> dist.Categorical:
        """Exact p(c | x), batch `(*,)`; the prior in a row without modalities."""
        return dist.Categorical(logits=self._log_joint(*self._complete(x, observed)))

    def _draw(self, name: str, c: Tensor, rng: torch.Generator) -> Tensor:
        probs = self.tables[name][c]  # (N, d_m)
        if name not in self.one_hot:
            return torch.bernoulli(probs, generator=rng)
        index = torch.multinomial(probs, 1, generator=rng).squeeze(-1)
        return nn.functional.one_hot(index, probs.shape[-1]).to(torch.float64)

    def _log_joint(self, x: Mapping[str, Tensor], observed: Masks) -> Tensor:
        total = self.prior.log()
        for name, mask in observed.items():
            value = x[name].unsqueeze(-2)  # (*, 1, d_m)
            self._check_support(name, x[name][mask])
            term = torch.xlogy(value, self.tables[name])  # (*, C, d_m)
            if name not in self.one_hot:
                term = term + torch.xlogy(1 - value, 1 - self.tables[name])
            total = total + torch.where(mask.unsqueeze(-1), term.sum(-1), 0.0)
        return total  # (*, C)

    def _log_evidence(self, x: Mapping[str, Tensor], observed: Masks) -> Tensor:
        return self._log_joint(x, observed).logsumexp(-1)

    def _check_support(self, name: str, value: Tensor) -> None:
        one_hot = name in self.one_hot
        binary = ((value == 0) | (value == 1)).all()
        if not binary or (one_hot and not (value.sum(-1) == 1).all()):
            expected = "one-hot vectors" if one_hot else "zeros and ones"
            raise ValueError(f"modality {name!r}: expected {expected}, found {value.tolist()[:3]}")


def quadrature_log_prob(
    log_likelihood: Callable[[Tensor], Tensor], latent_dim: int, num_points: int = 64
) -> Tensor:
    r"""$\log \int N(z; 0, I) \, p(x | z) \, dz$ by Gauss-Hermite quadrature.

    For any decoder on a latent of one or two dimensions; double `num_points` to see that the
    answer has converged. Handbook of mathematical functions, 25.4.46 (Abramowitz & Stegun, 1964).

    Args:
        log_likelihood: Maps nodes z `(Q, D)` to log p(x | z) of each row, `(Q, N)`.
        latent_dim: The latent dimension D, 1 or 2.
        num_points: Nodes per dimension: Q = num_points^D.

    Returns:
        Log-density of each row, `(N,)`.

    Example:
        >>> x = torch.tensor([0.0, 3.0])
        >>> log_prob = quadrature_log_prob(lambda z: dist.Normal(z, 1.0).log_prob(x), 1)
        >>> torch.allclose(log_prob, dist.Normal(0.0, 2**0.5).log_prob(x).double())
        True
    """
    if latent_dim not in (1, 2):
        raise ValueError(
            f"latent_dim: expected 1 or 2, found {latent_dim}; use a LinearGaussianWorld"
        )
    points, weights = np.polynomial.hermite_e.hermegauss(num_points)
    axis = torch.from_numpy(points)
    log_w = torch.from_numpy(weights / weights.sum()).log()
    z = torch.cartesian_prod(*[axis] * latent_dim).reshape(-1, latent_dim)  # (Q, D)
    log_w = torch.cartesian_prod(*[log_w] * latent_dim).reshape(-1, latent_dim).sum(-1)
    return (log_w.unsqueeze(-1) + log_likelihood(z)).logsumexp(0)


class _LinearDecoder(nn.Module):
    """Frozen mean of a modality, W z + b."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(torch.get_default_dtype()))
        self.register_buffer("bias", bias.to(torch.get_default_dtype()))

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.linear(z, self.weight, self.bias)


class _ExactEncoder(nn.Module):
    """Frozen expert of a modality, the pair (loc, scale)."""

    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.affine = _LinearDecoder(weight, -(weight @ bias))
        self.register_buffer("scale", scale.to(torch.get_default_dtype()))

    def forward(self, x_m: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.affine(x_m)
        return loc, self.scale.expand_as(loc)


def _randn(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def _orthogonal_columns(weight: Tensor, rng: torch.Generator) -> Tensor:
    """Orthogonal columns of random length; at most as many as rows, others zero: `(d, D)`."""
    size, latent_dim = weight.shape
    kept = torch.randperm(latent_dim, generator=rng)[:size]
    columns = torch.linalg.qr(weight[:, kept]).Q
    lengths = 0.5 + torch.rand(len(kept), generator=rng, dtype=torch.float64)
    return torch.zeros_like(weight).index_copy(-1, kept, columns * lengths)


def _moments(q: Gaussian) -> tuple[Tensor, Tensor]:
    """Mean `(*, D)` and covariance `(*, D, D)`."""
    if isinstance(q, torch.distributions.MultivariateNormal):
        return q.mean.to(torch.float64), q.covariance_matrix.to(torch.float64)
    base = q.base_dist if isinstance(q, torch.distributions.Independent) else q
    if isinstance(base, torch.distributions.Normal):
        q = (base.loc, base.scale)
    if not isinstance(q, tuple):
        raise TypeError(
            f"q: expected a pair (loc, scale), an independent Normal or a MultivariateNormal, "
            f"found {type(q).__name__}"
        )
    loc, scale = q
    return loc.to(torch.float64), scale.to(torch.float64).square().diag_embed()


def _check_probabilities(
    where: str, table: Tensor, shape: tuple[int, ...], *, normalised: bool
) -> None:
    inside = table.shape == shape and ((table >= 0) & (table <= 1)).all()
    if not inside or (normalised and ((table.sum(-1) - 1).abs() > 1e-6).any()):
        expected = "that sum to 1 over the last dimension" if normalised else "between 0 and 1"
        raise ValueError(
            f"{where}: expected probabilities of shape {shape} {expected}, found "
            f"{table.tolist()} of shape {tuple(table.shape)}"
        )
