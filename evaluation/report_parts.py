"""Pieces of the report's page: sections, tables, pictures."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure_html", "folded", "note_html", "section", "table_html"]

_PNG = b"\x89PNG\r\n\x1a\n"


def section(title: str, body: str) -> str:
    """A part of the page under a heading."""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{body}\n</section>"


def figure_html(caption: str, figure: Figure | str | os.PathLike[str] | None) -> str:
    """A picture, embedded, with its caption."""
    assert figure is not None  # an axis of no figure
    data = _png(caption, figure)
    width = int.from_bytes(data[16:20], "big")
    height = int.from_bytes(data[20:24], "big")
    text = html.escape(caption)
    source = base64.b64encode(data).decode("ascii")
    return (
        f'<figure>\n<div class="picture" style="--width: {width * 2 // 3}px">'
        f'<img alt="{text}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{source}"></div>\n'
        f"<figcaption>{text}</figcaption>\n</figure>\n"
    )


def _png(caption: str, figure: Figure | str | os.PathLike[str]) -> bytes:
    if isinstance(figure, str | os.PathLike):
        if not Path(figure).is_file():
            raise ValueError(
                f"figure {caption!r}: expected a PNG file, found none at {str(figure)!r}; "
                "save it with figure.savefig('name.png')"
            )
        data = Path(figure).read_bytes()
        if not data.startswith(_PNG):
            raise ValueError(
                f"figure {caption!r}: expected a PNG file, found {str(figure)!r}; "
                "save it with figure.savefig('name.png')"
            )
        return data
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def table_html(label: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways on a narrow page; the first cell of a row is its heading.

    Args:
        label: What a screen reader calls it.
        head: Titles of the columns.
        rows: Their cells, as text.
    """
    columns = "".join(f'<th scope="col">{html.escape(each)}</th>' for each in head)
    lines = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(each)}</td>" for each in rest)
        + "</tr>\n"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(label)}">\n'
        f"<table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table>\n</div>\n"
    )


def note_html(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{html.escape(text)}</p>\n'


def folded(summary: str, body: str) -> str:
    """What opens on a click; print shows its heading alone."""
    return f"<details><summary>{html.escape(summary)}</summary>\n{body}</details>\n"
