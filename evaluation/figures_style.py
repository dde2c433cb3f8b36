"""House style of all pictures of a run.

Every function that plots draws into the `ax` or `figure` that it is given, or into a new one, and
returns it. New figures are free of pyplot's global state: save one with `figure.savefig(path)`.
Colours are told apart by readers with a colour vision deficiency (Okabe & Ito, 2008,
https://jfly.uni-koeln.de/color/), and no colour is the only sign of anything.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Style"]

_BLUE, _VERMILION, _GREY, _INK = "#0072B2", "#D55E00", "#6E6E6E", "#222222"

Style = dict[str, Any]


@contextmanager
def _style() -> Iterator[None]:
    import seaborn as sns
    from matplotlib import rc_context

    small: Style = {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.labelsize": 8.5,
        "legend.fontsize": 8.5,
    }
    small |= {"xtick.labelsize": 8, "ytick.labelsize": 8, "legend.frameon": False}
    small |= {"text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _GREY}
    with rc_context(sns.axes_style("ticks") | sns.plotting_context("paper") | small):
        yield


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _despine(ax: Axes) -> None:
    import seaborn as sns

    sns.despine(ax=ax)


def _palette(number: int) -> list[Any]:
    import seaborn as sns

    return list(sns.color_palette("colorblind" if number <= 10 else "husl", number))


def _darker(color: Any) -> tuple[float, ...]:
    return tuple(0.7 * channel for channel in color)
