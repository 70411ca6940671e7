"""The report page: made from plain data, one file, nothing from elsewhere."""

from __future__ import annotations

import dataclasses
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squareq_fx.demo.figures import LayerFidelity
from squareq_fx.demo.finetune import Curve, Recipe
from squareq_fx.demo.report import (
    PassRow,
    Report,
    Similarity,
    highlight,
    render,
    write_report,
)
from squareq_fx.demo.results import BaseCheck, FineTuning, SizeRow, StyleRow
from squareq_fx.demo.timeline import Residency, Timeline

SVG = '<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9"><title>drawn</title></svg>'
TIMELINE = Timeline(
    in_use=((1.0, 4096), (2.0, 8192), (4.0, 4096), (7.0, 0)),
    stays=(
        Residency("blocks.0", 0, 1.0, 1.0, 4.0, 0, 4096),
        Residency("blocks.1", 0, 2.0, 4.5, 7.0, 4096, 4096),
    ),
    arena_bytes=8192,
    step_ms=8.0,
)


TRAINING_STEP = Timeline(
    in_use=((1.0, 4096), (4.0, 4096), (9.0, 0)),
    stays=(Residency("transformer_blocks.0", 0, 1.0, 1.0, 9.0, 0, 4096),),
    arena_bytes=4096,
    step_ms=10.0,
    starts=(0.0, 5.0),
)


def make_tuning() -> FineTuning:
    samples = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return FineTuning(
        recipe=Recipe(steps=3, batch=17, lr=0.0125),
        source="<someone's> digits",
        targets=samples,
        before=samples.flip(0),
        after=samples.flip(1),
        peft_after=samples.flip(2),
        curve=Curve((1.2, 1.1, 0.9), ((0, 1.2345), (3, 0.6789)), 0.111),
        peft_curve=Curve((1.2, 1.1, 0.8), ((0, 1.2222), (3, 0.5678)), 0.222),
        upright_loss=0.3,
        layers=24,
        parameters=73728,
        rows=[StyleRow("adapter off", -2.25, 0.975, 0.25), StyleRow("adapter on", 22.75, 0.625, 0.9875)],
        base=BaseCheck("ab" * 32, "ab" * 32, 1280, 0, 0.0),
        sizes=[SizeRow("all streamed weights", 54321, "streamed"), SizeRow("adapter file", 2222, "written")],
        timeline=TRAINING_STEP,
        adapter=Path("adapter.safetensors"),
    )


def make_report() -> Report:
    samples = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Report(
        float_samples=samples,
        int8_samples=samples.flip(0),
        recognised=(0.99, 0.98),
        similarities=[Similarity.of("one model call", samples + 0.01, samples)],
        layers=[
            LayerFidelity("blocks.0.q", "blocks.0", 0.9999, 0.01),
            LayerFidelity("out", "", 0.9998, 0.02),
        ],
        top_level_svg=SVG,
        block_name="block<0>",
        block_svg=SVG,
        top_level_code="def forward(self, x):\n    return x < 1",
        code="def block(x):\n    return x\n\ndef forward(self, x):\n    return x < 1",
        calls=4,
        functions=3,
        timeline=TIMELINE,
        tuning=make_tuning(),
        sizes=[SizeRow("slab", 12345, "on disk")],
        passes=[PassRow("capture", 10, 2, 30, "traced", 0.5)],
        stages=[("build", 1.5), ("compile", 20.0)],
        environment=[("torch", "2.13")],
    )


class Links(HTMLParser):
    """Collects what a browser would fetch, and checks that elements close in order."""

    VOID = frozenset({"meta", "br", "img", "link", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_page_is_well_formed_and_fetches_nothing() -> None:
    page = render(make_report())
    links = Links()
    links.feed(page)
    assert not links.open
    outside = [t for t in links.targets if not t.startswith(("#", "data:"))]
    assert not outside
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "<script" not in page and "<!DOCTYPE svg" not in page and "<?xml" not in page


def test_page_shows_every_part_and_escapes_text() -> None:
    page = render(make_report())
    for part in ("block&lt;0&gt;", "blocks.0.q", "99.0%", "98.0%", "12,345", "12.1 KiB", "capture", "20.0 s"):
        assert part in page, part
    assert page.count("<title>drawn</title>") == 2
    assert page == render(make_report())


def test_classifier_is_optional() -> None:
    page = render(dataclasses.replace(make_report(), recognised=None))
    assert "Install scikit-learn" in page and "recognises" not in page


def table_after(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading, as text."""
    table = page[page.index("<table", page.index(heading)) :]
    rows = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")], re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[" ".join(html.unescape(re.sub(r"<[^>]*>", "", cell)).split()) for cell in row] for row in cells]


def test_page_has_the_fine_tuning_s_figures_in_their_places() -> None:
    page = render(make_report())
    _, *styles = table_after(page, "How italic")
    assert styles == [["adapter off", "-2.2°", "97.5%", "25.0%"], ["adapter on", "22.8°", "62.5%", "98.8%"]]
    _, *losses = table_after(page, "<h3>Loss on italic digits")
    assert losses == [
        ["adapter on streamed INT8", "1.2345", "0.6789", "111 ms"],
        ["PEFT on the float model", "1.2222", "0.5678", "222 ms"],
    ]
    before, after, drawn, reloaded = [row[1] for row in table_after(page, "<h3>The base after training")]
    assert after == f"{before} unchanged" and before.startswith("abab")
    assert drawn == "0 of 1,280 pixel values differ" and reloaded == "every output is the same, bit for bit"
    assert table_after(page, "Memory of one training step")[1] == ["all streamed weights", "54,321", "53.0 KiB", "streamed"]
    for part in ("Adapter off", "Adapter on", "PEFT, float model", "Held-out digits, italic"):
        assert part in page, part
    assert "&lt;someone&#39;s&gt;" in page and "0.0125" in page
    assert "pip install" not in page


def test_page_says_what_is_not_installed() -> None:
    rows = [StyleRow("adapter off", -2.25, None, None)]
    alone = dataclasses.replace(make_tuning(), rows=rows, peft_after=None, peft_curve=None)
    page = render(dataclasses.replace(make_report(), tuning=alone))
    links = Links()
    links.feed(page)
    assert not links.open
    assert table_after(page, "How italic") == [["digits", "slant to the right"], ["adapter off", "-2.2°"]]
    assert "PEFT is not installed" in page and "Install scikit-learn to train on real digits" in page
    assert "PEFT, float model" not in page and "INT8 minus PEFT" not in page and "PEFT on the float model<" not in page
    assert "adapter on streamed INT8" in page


def test_page_tells_when_training_changed_the_base() -> None:
    broken = BaseCheck("ab" * 32, "cd" * 32, 1280, 7, 0.125)
    assert not broken.is_unchanged and not dataclasses.replace(broken, slab_after="ab" * 32).is_unchanged
    page = render(dataclasses.replace(make_report(), tuning=dataclasses.replace(make_tuning(), base=broken)))
    for part in ("CHANGED", "7 of 1,280 pixel values differ", "outputs differ by up to 0.125"):
        assert part in page, part


def test_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_report(make_report(), tmp_path / "deep" / "report.html")
    before = path.read_text(encoding="utf-8")
    with pytest.raises(ValueError):
        write_report(dataclasses.replace(make_report(), top_level_svg="not a drawing"), path)
    assert path.read_text(encoding="utf-8") == before
    assert [f.name for f in path.parent.iterdir()] == ["report.html"]


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.just("\n"), max_size=80))
def test_highlighting_changes_no_character(code: str) -> None:
    plain = html.unescape(re.sub(r"<[^>]*>", "", highlight(code)))
    trimmed = "\n".join(line.rstrip() for line in code.split("\n"))
    assert plain.strip("\n").rstrip() == trimmed.strip("\n").rstrip()


def test_similarity_of_known_vectors() -> None:
    same = Similarity.of("x", torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]))
    assert (same.cosine, same.relative_l2, same.largest) == (pytest.approx(1.0), 0.0, 0.0)
    off = Similarity.of("x", torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    assert off.relative_l2 == pytest.approx(0.1) and off.largest == pytest.approx(0.5)
    with pytest.raises(ValueError, match="shapes differ"):
        Similarity.of("x", torch.ones(2), torch.ones(2, 1))
