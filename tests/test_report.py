"""The HTML report: complete, self-contained, escaped, and never half written."""

import base64
import html
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from mmzoo.evaluation.report import write_report

QUANTITIES = ["log p(image, label)", "log p(image)", "log p(label | image)"]


def small_table() -> xr.Dataset:
    dims = ("model", "quantity")
    mean = np.array([[-20.125, -18.0, -0.5], [-19.0, np.nan, -0.25]])
    return xr.Dataset(
        {
            "mean": (dims, mean),
            "standard_error": (dims, np.full((2, 3), 0.25)),
            "mcse": (dims, np.full((2, 3), 0.01)),
            "pareto_k": (dims, np.array([[0.0, 0.34, 0.02], [0.05, np.nan, 0.0]])),
            "num_rows": (dims, np.full((2, 3), 360)),
        },
        coords={"model": ["MVAE", "A<b>&"], "quantity": QUANTITIES},
    )


def small_history() -> xr.Dataset:
    return xr.Dataset({"loss": ("epoch", [3.0, 2.0, 1.0])}, coords={"epoch": [0, 1, 2]})


def small_figure() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    return figure


class Page(HTMLParser):
    """Tags that stay open, cells of the table, and what the pictures are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str]] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


@pytest.fixture
def page(tmp_path: Path) -> str:
    write_report(
        tmp_path / "run" / "report.html",
        title="A <script>alert(1)</script> & more",
        table=small_table(),
        histories={"MVAE": small_history()},
        figures={'Samples "of" <x>': small_figure()},
        config={"seed": 3, "data": "a<b", "fit": {"epochs": 7, "clip": True}},
        command="mmzoo compare --data digits && echo '<done>'",
        lead="Two & three.",
    )
    assert os.listdir(tmp_path / "run") == ["report.html"]
    return (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_it_is_well_formed_and_self_contained(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert not parsed.tags & {"script", "link", "iframe"}
    assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import', page)
    assert len(parsed.images) == 3  # likelihoods, training, samples
    for image in parsed.images:
        assert image["alt"]
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        assert data.startswith(b"\x89PNG")
        sides = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
        assert (int(image["width"]), int(image["height"])) == sides


def test_what_scrolls_sideways_says_so(page: str) -> None:
    style = page[page.index("<style>") : page.index("</style>")]
    assert re.search(r"\.scroll { background:[^}]*var\(--shade\)[^}]* scroll; }", style)
    hint = re.search(r"@media screen and \(max-width: (\d+)rem\) {[^@]*Scroll the picture", style)
    narrowest = re.search(r"figure img { min-width: (\d+)rem; }", style)
    assert hint and narrowest and int(hint[1]) == int(narrowest[1]) + 3  # the margins of the page
    assert page.count('class="scroll" tabindex="0"') == page.count("<table>")


def test_every_number_stands_in_its_cell(page: str) -> None:
    cells = [cell.replace("\u00a0", " ").replace("\u2212", "-") for cell in Page(page).cells]
    assert cells == [
        *["model", *QUANTITIES],
        *["MVAE", "-20.12 ± 0.25", "-18.00 ± 0.25 †", "-0.50 ± 0.25"],
        *["A<b>&", "-19.00 ± 0.25", "–", "-0.25 ± 0.25"],
    ]
    text = html.unescape(page).replace("\u00a0", " ")
    assert "Share of such rows: MVAE, log p(image): 34 %." in text
    assert "at most 0.01); 360 rows" in text
    assert "How well the model predicts label once it has seen image." in text
    assert "How well the model describes image and label together" in text


def test_many_shares_are_folded_away(tmp_path: Path) -> None:
    names = [f"m{i}" for i in range(20)]
    dims, shape = ("model", "quantity"), (20, 1)
    values = {"mean": -1.0, "standard_error": 0.1, "mcse": 0.0, "pareto_k": 0.5, "num_rows": 9.0}
    table = xr.Dataset(
        {key: (dims, np.full(shape, value)) for key, value in values.items()},
        coords={"model": names, "quantity": ["log p(a)"]},
    )
    write_report(tmp_path / "report.html", title="x", table=table)
    text = (tmp_path / "report.html").read_text()
    folded = text[text.index("<details><summary>Share of such rows") :]
    assert all(f"{name}, log p(a): 50" in folded for name in names)


def test_all_text_is_escaped(page: str) -> None:
    assert "<script>" not in page
    assert "A &lt;script&gt;alert(1)&lt;/script&gt; &amp; more</h1>" in page
    assert 'alt="Samples &quot;of&quot; &lt;x&gt;"' in page
    assert "mmzoo compare --data digits &amp;&amp; echo &#x27;&lt;done&gt;&#x27;" in page
    config = html.unescape(re.search(r"<pre>(seed.*?)</pre>", page, re.DOTALL)[1])
    assert config == 'seed = 3\ndata = "a<b"\n\n[fit]\nepochs = 7\nclip = true'


def test_reasons_of_absent_numbers_are_told(tmp_path: Path) -> None:
    table = small_table()
    reasons = np.full((2, 3), "", dtype=object)
    reasons[1, 1] = "it has no p(image)"
    table["note"] = (("model", "quantity"), reasons)
    write_report(tmp_path / "r.html", title="t", table=table)
    assert '<td title="it has no p(image)">–</td>' in (tmp_path / "r.html").read_text()


def test_files_are_embedded_and_the_same_input_gives_the_same_page(tmp_path: Path) -> None:
    small_figure().savefig(tmp_path / "a.png")
    for name in ("one.html", "two.html"):
        write_report(tmp_path / name, title="t", figures={"file": tmp_path / "a.png"})
    one = (tmp_path / "one.html").read_bytes()
    assert base64.b64encode((tmp_path / "a.png").read_bytes()) in one
    assert one == (tmp_path / "two.html").read_bytes()


def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(path, title="old")
    before = path.read_bytes()

    def break_off(*_: str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("mmzoo.evaluation.report.os.replace", break_off)
    with pytest.raises(OSError, match="no space left"):
        write_report(path, title="new")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.html"]


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="figure 'curves': expected a PNG file, found .*text.png"):
        write_report(tmp_path / "r.html", title="t", figures={"curves": tmp_path / "text.png"})
    message = "figure 'curves': expected a PNG file, found none at .*gone.png"
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "r.html", title="t", figures={"curves": tmp_path / "gone.png"})
    twice = small_table().assign_coords(model=["MVAE", "MVAE"])
    with pytest.raises(ValueError, match="write_report: .* each model once, found 'MVAE' twice"):
        write_report(tmp_path / "r.html", title="t", table=twice)
    with pytest.raises(ValueError, match="table: expected the variables mean and standard_error"):
        write_report(tmp_path / "r.html", title="t", table=xr.Dataset())
    assert not (tmp_path / "r.html").exists()
