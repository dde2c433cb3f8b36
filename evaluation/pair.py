"""What evaluation looks at: a model of the zoo, or any Pyro model and guide of your own.

Nothing here needs a subclass. A pair of your own follows the convention of Pyro's tutorials,

    def model(x, observed):
        with pyro.plate("data", len(x["image"]), dim=-1):
            z = pyro.sample("z", dist.Normal(0, 1).expand([8]).to_event(1))
            pyro.sample("image", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x["image"])
            pyro.sample("label", dist.OneHotCategorical(logits=classifier(z)), obs=x["label"])

    def guide(x, observed):
        with pyro.plate("data", len(x["image"]), dim=-1):
            pyro.sample("z", ...)  # q(z | what observed says that each row has)

    pair = PyroPair(model, guide, [image, label], networks=[encoder, decoder, classifier])

and goes wherever a model of the zoo goes: :func:`mmzoo.evaluation.log_likelihood`, tables, checks,
the ArviZ export, the report.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from mmzoo.batch import Batch, check_batch, modality_names
from mmzoo.distributions import mean_or_probs
from mmzoo.inference.draws import check_observed, draw, latent_values
from mmzoo.modality import Modality
from mmzoo.seeding import seeded
from mmzoo.vae import MultimodalVAE

__all__ = [
    "Pair",
    "PyroPair",
    "check_continuous",
    "check_row_dimension",
    "device_of",
    "draw_latents",
    "dtype_of",
    "named_subsets",
    "quiet",
    "row_masks",
    "subset_name",
]

Rows = Mapping[str, Tensor | None]
Program = Callable[..., Any]


class PyroPair(nn.Module):
    """A Pyro model and guide of your own, for everything in ``mmzoo.evaluation``.

    Both are called as ``program(x, observed)``: ``x`` maps every modality to values
    ``(N, *event_shape)`` (a filler inside the support stands where a row has none) and ``observed``
    maps every modality to a bool mask ``(N,)``. Both open ``pyro.plate("data", N, dim=-1)`` with
    every sample site inside it, and no other plate: draws take the dimension left of it. Parts of a
    row, such as moments in time, belong to the event (``.to_event``).

    The model has one site for each modality, of that name, with ``obs=x[name]``. It need not look
    at ``observed``: missing rows are masked from outside, and what is to be generated is set free.
    Given the latents the modalities must be independent of each other, as in every model of the
    zoo: only then is a missing one marginalised by leaving its site out. The guide samples the
    latents of the model and sees of ``x`` what ``observed`` shows. Networks must take leading
    dimensions, since draws come as ``(K, N, D)``.

    Args:
        model: The generative story.
        guide: The approximate posterior.
        modalities: What is measured; their networks are not used.
        title: How tables name the pair.
        networks: The modules inside, for evaluation mode and device.
        subsets: Subsets of the modalities that the guide answers for; default: all of them. What
            would need another is left out of tables, with the reason.

    Raises:
        ValueError: For an unknown modality, a model without one site for each modality, with an
            observed site beside them or with a plate beside that over rows, or one in which a site
            depends on the value of a modality.
    """

    #: As for models of the zoo: what every row must have.
    always_given: tuple[str, ...] = ()

    def __init__(
        self,
        model: Program,
        guide: Program,
        modalities: Sequence[Modality],
        *,
        title: str = "own pair",
        networks: nn.Module | Iterable[nn.Module] = (),
        subsets: Iterable[Collection[str]] | None = None,
    ) -> None:
        super().__init__()
        self.modalities = {each.name: each for each in modalities}
        if not self.modalities or len(self.modalities) < len(modalities):
            raise ValueError(
                f"PyroPair {title!r}: expected modalities with names of their own, found "
                f"{[each.name for each in modalities]}"
            )
        self.title = title
        self._model, self._guide = model, guide
        networks = [networks] if isinstance(networks, nn.Module) else list(networks)
        self.networks = nn.ModuleList(networks)
        self.subsets = subsets
        if subsets is not None:
            where = f"PyroPair {title!r} subsets"
            named = (modality_names(self.modalities, subset, where) for subset in subsets)
            self.subsets = {frozenset(subset) for subset in named}
        self.latent_sites = self._find_sites()
        self._check_independence()

    def model(
        self,
        x: Rows | Batch | None = None,
        observed: Mapping[str, Tensor] | None = None,
        *,
        num_rows: int | None = None,
    ) -> Any:
        """The model with missing rows masked; a modality that is None in ``x`` is sampled."""
        batch = self.check(x, observed, num_rows=num_rows)
        values, masks = self._fill(batch)
        free = {name for name, value in batch.x.items() if value is None}
        with _Observe(masks, free):
            return self._model(values, masks)

    def guide(
        self,
        x: Rows | Batch | None = None,
        observed: Mapping[str, Tensor] | None = None,
        *,
        num_rows: int | None = None,
    ) -> Any:
        """The guide; where the whole batch observes nothing, the prior."""
        batch = self.check(x, observed, num_rows=num_rows)
        values, masks = self._fill(batch)
        if any(bool(mask.any()) for mask in masks.values()):
            return self._guide(values, masks)
        with poutine.block(hide=list(self.modalities)):
            return self._model(values, masks)

    def generate(
        self,
        x: Rows | Batch | None = None,
        observed: Mapping[str, Tensor] | None = None,
        *,
        num_samples: int | None = None,
        num_rows: int | None = None,
        mean: bool = False,
    ) -> dict[str, Tensor]:
        """As :meth:`mmzoo.MultimodalVAE.generate`."""
        batch = self.check(x, observed, num_rows=num_rows)
        values, masks = self._fill(batch)
        seen = torch.stack(list(masks.values())).any(0)
        with torch.no_grad(), self.unregistered():
            latents = _draw(self, batch, values, masks, seen, num_samples or 1, None)
            model = poutine.trace(poutine.condition(self.model, data=latents))
            with pyro.plate("draws", num_samples or 1, dim=-2):
                trace = model.get_trace(dict.fromkeys(self.modalities), num_rows=batch.shape[-1])
        found = {}
        for name in self.modalities:
            node = trace.nodes[name]
            value = mean_or_probs(node["fn"]) if mean else node["value"]
            value = value.expand(num_samples or 1, batch.shape[-1], *value.shape[2:])
            found[name] = value if num_samples else value[0]
        return found

    def check(
        self,
        x: Rows | Batch | None,
        observed: Mapping[str, Tensor] | None = None,
        *,
        num_rows: int | None = None,
    ) -> Batch:
        """The batch, checked against the modalities; see :func:`mmzoo.batch.check_batch`."""
        if isinstance(x, Batch):
            return x
        return check_batch(self.modalities, x, observed, num_rows=num_rows, dtype=dtype_of(self))

    def unsupported(self, of: Collection[str], given: Collection[str] = ()) -> str | None:
        """Why the guide cannot propose for ``log p(x_of | x_given)``; None if it can."""
        if self.subsets is None:
            return None
        for subset in ({*of, *given}, {*given}):
            if subset and subset not in self.subsets:
                names = ", ".join(name for name in self.modalities if name in subset)
                return f"the guide of {self.title} does not answer for {names} alone"
        return None

    @contextmanager
    def unregistered(self) -> Iterator[None]:
        """Within it, Pyro's parameter store may be used and is left as it was."""
        store = pyro.get_param_store()
        with store.scope(store.get_state()):
            yield

    def _fill(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of every modality, fillers in the gaps, and masks ``(*, N)``."""
        rows, device, dtype = batch.shape[-1], batch.device or device_of(self), dtype_of(self)
        values, masks = {}, {}
        for name, modality in self.modalities.items():
            shape = modality.event_shape
            filler = modality.likelihood.filler(shape, dtype, device)
            value, mask = batch.x.get(name), batch.observed.get(name)
            if value is None:
                values[name] = filler.expand(rows, *shape)
                masks[name] = torch.zeros(rows, dtype=torch.bool, device=device)
                continue
            masks[name] = torch.ones(rows, dtype=torch.bool, device=device)
            values[name] = value
            if mask is not None:
                masks[name] = mask.expand(*mask.shape[:-1], rows)
                seen = masks[name].reshape(*masks[name].shape, *(1 for _ in shape))
                values[name] = torch.where(seen, value, filler.to(value.dtype))
        return values, masks

    def _find_sites(self) -> tuple[str, ...]:
        """Names of the latents, from a run on two rows of filler."""
        rows = 2
        with quiet(self, seed=0):
            trace = poutine.trace(self.model).get_trace({}, num_rows=rows)
        sites = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
        for name in self.modalities:
            if name not in sites or not sites[name]["is_observed"]:
                raise ValueError(
                    f"PyroPair {self.title!r}: expected an observed model site {name!r}, found "
                    f"sites {', '.join(sites)}; write pyro.sample({name!r}, …, obs=x[{name!r}])"
                )
        for name, node in sites.items():
            if _is_plate(node):
                continue
            check_observed(name, node, self.modalities)
            if node["fn"].batch_shape != (rows,):
                raise ValueError(
                    f"PyroPair {self.title!r} model site {name!r}: expected batch shape (N,), the "
                    f"plate over rows alone, found {tuple(node['fn'].batch_shape)} for N = {rows}; "
                    "put every site inside it, and make what else there is part of the event"
                )
        latents = {
            name: node["fn"]
            for name, node in sites.items()
            if not (node["is_observed"] or _is_plate(node))
        }
        self.discrete_sites = tuple(k for k, fn in latents.items() if fn.support.is_discrete)
        return tuple(latents)

    def _check_independence(self) -> None:
        """Refuses a model in which a modality is the parent of another site.

        Scores the same latents twice, with two sets of values of one modality after the other.
        """
        rows = 4
        with quiet(self, seed=0):
            free = poutine.trace(self.model).get_trace(
                dict.fromkeys(self.modalities), num_rows=rows
            )
            latents = {name: free.nodes[name]["value"] for name in self.latent_sites}
            drawn = {name: free.nodes[name]["value"] for name in self.modalities}
            model = poutine.trace(poutine.condition(self.model, data=latents))
            for name, value in drawn.items():
                others = {other: each for other, each in drawn.items() if other != name}
                before, after = (
                    model.get_trace(others | {name: each}) for each in (value, value.flip(0))
                )
                for trace in (before, after):
                    trace.compute_log_prob()
                for site in (*self.latent_sites, *others):
                    old, new = (each.nodes[site]["log_prob"] for each in (before, after))
                    if not torch.allclose(old, new, rtol=1e-3, atol=1e-4, equal_nan=True):
                        raise ValueError(
                            f"PyroPair {self.title!r}: expected modalities that depend on the "
                            f"latents alone, found that site {site!r} depends on {name!r}; a row "
                            f"without {name!r} could not be scored by leaving its site out"
                        )


Pair = MultimodalVAE | PyroPair


class _Observe(poutine.messenger.Messenger):
    """Masks the sites of the modalities from outside, and sets free those that are generated."""

    def __init__(self, masks: Mapping[str, Tensor], free: Collection[str]) -> None:
        super().__init__()
        self.masks, self.free = masks, free

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name not in self.masks:
            return
        if name in self.free:
            msg["is_observed"], msg["value"] = False, None
            return
        mask, before = self.masks[name], msg["mask"]
        msg["mask"] = mask if before is None else mask & before


def check_continuous(pair: Pair, where: str) -> None:
    """Refuses latents without a gradient, which no model of the zoo has.

    Raises:
        ValueError: For a pair with a discrete latent.
    """
    if found := getattr(pair, "discrete_sites", ()):
        raise ValueError(
            f"{where}: expected continuous latents, which have a gradient, found discrete "
            f"{', '.join(found)}; sum them out in the model, or use log_likelihood"
        )


@contextmanager
def quiet(pair: Pair, seed: int | None = None, *, grad: bool = False) -> Iterator[None]:
    """Evaluation mode without traces in the caller's world.

    No parameter store, no validation of what was checked before, no gradients unless asked for; the
    training mode of each module and the random generators are left as they were.

    Args:
        pair: The pair.
        seed: Of the draws inside; None: the caller's generators go on.
        grad: Whether gradients are kept.
    """
    modes = [(module, module.training) for module in pair.modules()]
    before = torch.is_grad_enabled()
    pair.eval()
    try:
        with torch.set_grad_enabled(grad and before), pair.unregistered():
            with pyro.validation_enabled(False):
                if seed is None:
                    yield
                else:
                    with seeded(seed):
                        yield
    finally:
        for module, training in modes:  # one by one: a frozen part stays in evaluation mode
            module.training = training


def device_of(pair: Pair) -> torch.device:
    """Where the pair lives; the CPU for a pair without parameters or buffers."""
    return next((each.device for each in _tensors(pair)), torch.device("cpu"))


def dtype_of(pair: Pair) -> torch.dtype:
    """The pair's floating type; torch's default for a pair without parameters or buffers."""
    found = (each.dtype for each in _tensors(pair) if each.is_floating_point())
    return next(found, torch.get_default_dtype())


def subset_name(names: Iterable[str]) -> str:
    """How a subset is written.

    Example:
        >>> subset_name(["image", "label"])
        'image+label'
    """
    return "+".join(names)


def named_subsets(
    pair: Pair, given: str | Iterable[str | Iterable[str]], where: str
) -> list[tuple[str, ...]]:
    """Subsets as one writes them, each a name or several, in the order of the modalities.

    Raises:
        ValueError: For an unknown name, or a subset without any.
    """
    found = []
    for each in [given] if isinstance(given, str) else given:
        chosen = set(modality_names(pair.modalities, each, where))
        if not chosen:
            raise ValueError(
                f"{where}: expected some of {', '.join(pair.modalities)} in every subset, found "
                "an empty subset; name at least one"
            )
        found.append(tuple(name for name in pair.modalities if name in chosen))
    return list(dict.fromkeys(found))


def check_row_dimension(pair: Pair, batch: Batch) -> None:
    """Refuses what the models take for training, but no row has: dimensions left of the rows.

    Raises:
        ValueError: For values or masks with one.
    """
    masks = {name: mask for name, mask in batch.observed.items() if mask is not None}
    shapes = {f"observed[{name!r}]": mask.shape for name, mask in masks.items()}
    for name, value in batch.x.items():
        if value is not None:
            event_dims = len(pair.modalities[name].event_shape)
            shapes[f"x[{name!r}]"] = value.shape[: value.dim() - event_dims]
    for what, shape in shapes.items():
        if len(shape) != 1:
            raise ValueError(
                f"{what}: expected one dimension of rows, found {tuple(shape)}; flatten them into "
                "one"
            )


def row_masks(
    pair: Pair, x: Mapping[str, Tensor], observed: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """The checked values, a mask ``(N,)`` for *every* modality of the pair, and N."""
    batch = pair.check(x, observed)
    check_row_dimension(pair, batch)
    rows = batch.shape[-1]
    blank = torch.ones(rows, dtype=torch.bool, device=batch.device)
    masks = {}
    for name in pair.modalities:
        mask = batch.observed.get(name)
        masks[name] = blank & batch.has(name) if mask is None else mask.expand(rows)
    return {name: value for name, value in batch.x.items() if value is not None}, masks, rows


def draw_latents(
    pair: Pair,
    x: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    given: Iterable[str] | None = None,
    num_draws: int = 100,
    guide: Program | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draws from ``q(z | x_given)``, each row with what it has of the given modalities.

    Args:
        pair: The pair.
        x: Name to values ``(N, *event_shape)``.
        observed: Name to bool mask ``(N,)``.
        given: What the guide may see; default: all modalities.
        num_draws: Draws of each row.
        guide: A guide over the same sites in place of the pair's own.
        batch_size: Rows at a time.
        seed: Of the draws.

    Returns:
        Site name to ``(num_draws, N, D)``; rows that have nothing of ``given`` hold the prior.

    Raises:
        ValueError: For an unknown name or a bad batch.
    """
    chosen = list(pair.modalities) if given is None else list(given)
    modality_names(pair.modalities, chosen, "draw_latents given")
    if num_draws < 1 or batch_size < 1:
        raise ValueError(
            f"draw_latents: expected num_draws and batch_size of at least 1, found {num_draws} and "
            f"{batch_size}"
        )
    values, masks, rows = row_masks(pair, x, observed)
    device = device_of(pair)
    parts: dict[str, list[Tensor]] = {name: [] for name in pair.latent_sites}
    with quiet(pair, seed):
        for start in range(0, rows, batch_size):
            part = slice(start, start + batch_size)
            here = {name: value[part].to(device) for name, value in values.items()}
            shown = {name: (masks[name][part] & (name in chosen)).to(device) for name in values}
            seen = torch.stack(list(shown.values())).any(0)
            batch = pair.check(here, shown)
            found = _draw(pair, batch, here, shown, seen, num_draws, guide)
            for name, value in found.items():
                parts[name].append(value.reshape(*value.shape[:2], -1))
    return {name: torch.cat(each, 1) for name, each in parts.items()}


def _draw(
    pair: Pair,
    batch: Batch,
    values: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    seen: Tensor,
    num_draws: int,
    guide: Program | None,
) -> dict[str, Tensor]:
    """Draws ``(K, N, *event)`` of every site: the guide's where a row has something."""
    rows = batch.shape[-1]
    guide = guide or pair.guide
    if isinstance(pair, MultimodalVAE) and guide == pair.guide:  # takes empty rows itself
        return latent_values(draw(guide, values, masks, num_draws, stratified=False))
    found: dict[str, Tensor] = {}
    for index, kept in ((seen, masks), (~seen, None)):
        if not index.any():
            continue
        some = int(index.sum())
        given = {n: values[n][index] for n in (pair.always_given if kept is None else kept)}
        program = pair.model if kept is None else guide
        shown = None if kept is None else {name: mask[index] for name, mask in kept.items()}
        extra: dict[str, Any] = {"num_rows": some} if kept is None else {}
        drawn = draw(program, given, shown, num_draws, stratified=False, **extra)
        for name, value in latent_values(drawn).items():
            if name not in found:
                found[name] = value.new_empty(num_draws, rows, *value.shape[2:])
            found[name][:, index] = value
    return found


def _tensors(pair: Pair) -> Iterator[Tensor]:
    return chain(pair.parameters(), pair.buffers())


def _is_plate(site: dict[str, Any]) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"
