"""The whole demonstration: without the network, in time, into a page and an adapter."""

from __future__ import annotations

import io
import re
import socket
import time
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_demo_report import Links, table_after

from squareq_fx.demo.environment import describe_environment, processor_name
from squareq_fx.demo.finetune import Recipe
from squareq_fx.demo.judge import judge_available
from squareq_fx.demo.report import Report, write_report
from squareq_fx.demo.run import run_demo
from squareq_fx.demo.stages import Stages

pytestmark = pytest.mark.slow


FEW = Recipe(steps=20, batch=32)


@dataclass(frozen=True)
class Demo:
    """Path of the page, what it was made from, the time it took, and what was opened in the browser."""

    path: Path
    report: Report
    seconds: float
    opened: list[str]

    @property
    def page(self) -> str:
        return self.path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    def refuse(*_: object) -> None:
        raise AssertionError("the demo went to the network")

    opened: list[str] = []
    reports: list[Report] = []

    def keep(report: Report, path: Path) -> Path:
        reports.append(report)
        return write_report(report, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(webbrowser, "open", opened.append)
        patch.setattr("squareq_fx.demo.run.write_report", keep)
        began = time.perf_counter()
        path = run_demo(tmp_path_factory.mktemp("demo") / "made", open_browser=True, recipe=FEW)
        yield Demo(path, reports[0], time.perf_counter() - began, opened)


def test_demo_writes_a_page_and_an_adapter(demo: Demo) -> None:
    files = sorted(str(f.relative_to(demo.path.parent)) for f in demo.path.parent.rglob("*") if f.is_file())
    assert files == ["digits_italic_lora/pytorch_lora_weights.safetensors", "report.html"]
    assert demo.opened == [demo.path.as_uri()]


def test_the_whole_recipe_takes_less_than_two_minutes(demo: Demo) -> None:
    """This run, and the steps it left out at the price of its own."""
    full, tuning = Recipe(), demo.report.tuning
    curves = [curve for curve in (tuning.curve, tuning.peft_curve) if curve is not None]
    a_step = sum(curve.step_seconds for curve in curves)
    left_out = full.steps * full.batch / FEW.batch - FEW.steps
    assert demo.seconds + left_out * a_step < 120


def test_report_is_self_contained_and_complete(demo: Demo) -> None:
    page = demo.page
    links = Links()
    links.feed(page)
    assert not links.open and not [t for t in links.targets if not t.startswith(("#", "data:"))]
    for part in (
        "INT8, streamed",
        "Weight bytes held in the arena",
        "transformer_blocks.3.ff.net.2",
        "Relative L2 error of each INT8 weight",
        "peak in the arena",
        "schedule",
        "draw digits in INT8, streamed",
        "Adapter off",
        "Adapter on",
        "fine-tune, INT8 streamed",
    ):
        assert part in page, part
    plain = re.sub(r"<[^>]*>", "", page)
    assert plain.count("squareq.load(") >= 6 and plain.count("squareq.evict(") >= 6
    # digits, memory, style, losses, training step, top level, block, fidelity, stages
    assert page.count("<svg") == 9


def test_int8_model_agrees_with_the_float_one(demo: Demo) -> None:
    row = re.search(r"<td>one call of the model</td><td[^>]*>([\d.]+)</td>", demo.page)
    assert row is not None and float(row[1]) >= 0.999


def test_page_says_what_the_fine_tuning_gave(demo: Demo) -> None:
    tuning = demo.report.tuning
    _, *losses = table_after(demo.page, "<h3>Loss on italic digits")
    curves = [curve for curve in (tuning.curve, tuning.peft_curve) if curve is not None]
    assert [row[1:3] for row in losses] == [[f"{c.start:.4f}", f"{c.end:.4f}"] for c in curves]
    assert tuning.curve.end < 0.7 * tuning.curve.start
    styles = {row[0]: row[1:] for row in table_after(demo.page, "How italic")}
    assert float(styles["adapter on"][0].rstrip("°")) > 10 + float(styles["adapter off"][0].rstrip("°"))
    if judge_available():
        upright, ital = (float(cell.rstrip("%")) for cell in styles["adapter off"][1:])
        assert upright >= 90 > ital
    base = [row[1] for row in table_after(demo.page, "<h3>The base after training")]
    assert base[1].endswith("unchanged") and base[2].startswith("0 of 5,120") and "bit for bit" in base[3]
    assert torch.equal(tuning.before, demo.report.int8_samples)
    assert "CHANGED" not in demo.page


def test_the_readme_s_command_installs_all_the_demo_can_use() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    root = Path(__file__).resolve().parents[1]
    (extra,) = re.findall(r"pip install -e '\.\[(\w+)\]' && squareq-fx demo", (root / "README.md").read_text(encoding="utf-8"))
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {re.split(r"\W", name)[0] for name in extras[extra]} >= {"peft", "scikit"}


def test_torch_keeps_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no model")

    monkeypatch.setattr("squareq_fx.demo.run.load_digits_model", fail)
    before = torch.get_num_threads()
    with pytest.raises(OSError, match="no model"):
        run_demo(tmp_path / "report.html")
    assert torch.get_num_threads() == before and not list(tmp_path.iterdir())


def test_stages_are_timed_in_order_and_a_failed_one_is_not_counted() -> None:
    stages = Stages(Console(file=io.StringIO()))
    with pytest.raises(KeyError), stages:
        with stages.stage("one", total=2) as done:
            done(1)
            done(2)
        with stages.stage("two"):
            raise KeyError
    ((name, seconds),) = stages.seconds
    assert name == "one" and 0 <= seconds < 5


def test_environment_names_what_ran(tmp_path: Path) -> None:
    rows = dict(describe_environment(torch.device("cpu")))
    assert rows["torch"] == torch.__version__ and rows["peft"] and rows["device of the run"] == "the processor"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Abacus 3\n")
    assert processor_name(tmp_path / "cpuinfo") == "Abacus 3"
    assert processor_name(tmp_path / "missing")
