"""The whole demonstration: without the network, in time, into one file."""

from __future__ import annotations

import io
import re
import socket
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_demo_report import Links

from squareq_fx.demo.environment import describe_environment, processor_name
from squareq_fx.demo.run import run_demo
from squareq_fx.demo.stages import Stages

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, float, list[str]]]:
    """Path of the report, seconds, and what was opened in the browser."""

    def refuse(*_: object) -> None:
        raise AssertionError("the demo went to the network")

    opened: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(webbrowser, "open", opened.append)
        began = time.perf_counter()
        path = run_demo(tmp_path_factory.mktemp("demo") / "made", open_browser=True)
        yield path, time.perf_counter() - began, opened


def test_demo_writes_one_file_in_time(demo: tuple[Path, float, list[str]]) -> None:
    path, seconds, opened = demo
    assert path.name == "report.html" and [f.name for f in path.parent.iterdir()] == ["report.html"]
    assert opened == [path.as_uri()]
    assert seconds < 90


def test_report_is_self_contained_and_complete(demo: tuple[Path, float, list[str]]) -> None:
    page = demo[0].read_text(encoding="utf-8")
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
    ):
        assert part in page, part
    plain = re.sub(r"<[^>]*>", "", page)
    assert plain.count("squareq.load(") >= 6 and plain.count("squareq.evict(") >= 6
    assert page.count("<svg") == 6  # digits, memory, top level, block, fidelity, stages


def test_int8_model_agrees_with_the_float_one(demo: tuple[Path, float, list[str]]) -> None:
    page = demo[0].read_text(encoding="utf-8")
    row = re.search(r"<td>one call of the model</td><td[^>]*>([\d.]+)</td>", page)
    assert row is not None and float(row[1]) >= 0.999


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
    assert rows["torch"] == torch.__version__ and rows["device of the run"] == "the processor"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Abacus 3\n")
    assert processor_name(tmp_path / "cpuinfo") == "Abacus 3"
    assert processor_name(tmp_path / "missing")
