"""The start-up benchmark on a toy: a cold and two warm processes, their report, and what it says when something is wrong."""

from __future__ import annotations

import compileall
import importlib
import json
import logging
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from squareq_fx.auto.timings import Shape, Table
from squareq_fx.auto.tuning import tune
from squareq_fx.kernels import tiles

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
startup = importlib.import_module("startup")
sys.path[:] = [
    entry for entry in sys.path if entry != str(BENCHMARKS)
]  # its kernels.py would be taken for the package of that name


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "startup.py"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, subprocess.CompletedProcess[str]]:
    """startup.json and startup.md of one run of the command on the toy, and the process."""
    folder = tmp_path_factory.mktemp("startup")
    out, slab = folder / "new", folder / "flux.toy"  # the slab is made here, where everything for that is imported already
    startup.main(["--tiny", "--child", "build", "--slab", str(slab)])
    # Without Inductor, whose C++ takes half a minute: that another process finds its programs is for test_inductor.py.
    process = run("--tiny", "--backend", "eager", "--slab", str(slab), "--out", str(out), SQUAREQ_CACHE="0")
    assert process.returncode == 0, process.stdout + process.stderr
    assert len(list(folder.iterdir())) == 3, "nothing is written beside the slab"
    return json.loads((out / "startup.json").read_text()), (out / "startup.md").read_text(), process


def test_each_stage_of_each_run_is_later_than_the_one_before(done: Any) -> None:
    rows = done[0]["rows"]
    assert [row["run"] for row in rows] == ["cold", "warm 1", "warm 2"]
    for row in rows:
        assert list(row["timeline"]) == ["libraries", "imports", "model", "compile", "first_output"]
        assert all(earlier < later for earlier, later in pairwise([0.0, *row["timeline"].values()]))
        assert 0 < row["second_call"] < row["timeline"]["first_output"]


def test_a_warm_process_finds_the_graph(done: Any) -> None:
    cold, *warm = done[0]["rows"]
    for row in warm:
        assert row["compilations"] == row["from_cache"] == cold["compilations"] == 0
        assert seconds(row) < 0.7 * seconds(cold)


def seconds(row: dict[str, Any]) -> float:
    """Of the compile stage."""
    return float(row["timeline"]["compile"] - row["timeline"]["model"])


def test_the_report_has_a_line_for_each_run(done: Any) -> None:
    entries, page, process = done
    assert page in process.stdout
    assert "Command: `python benchmarks/startup.py --model flux --backend eager --tiny --slab SLAB`" in page
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    assert table[0][0] == "run"
    assert {len(line) for line in table} == {len(table[0])}
    assert [line[0] for line in table[2:]] == ["cold", "warm 1", "warm 2"]
    for line, row in zip(table[2:], entries["rows"], strict=True):
        assert line[6] == f"{row['timeline']['first_output']:.2f}"
        assert sum(map(float, line[1:6])) == pytest.approx(float(line[6]), abs=0.03)
    assert "torch " in page and "diffusers " in page and "squareq_fx " in page
    assert "diffusers imports PEFT too" in page, "the tests' environment has it"


def test_progress_is_told_as_it_goes(done: Any) -> None:
    told = done[2].stderr
    places = [told.index(f"flux: {what}") for what in ("cold", "warm 1", "warm 2")]
    assert places == sorted(places)
    assert told.count("  first call: done after ") == 3


def row(name: str, first_output: float) -> dict[str, Any]:
    timeline = {"libraries": 1.5, "imports": 2.0, "model": 2.5, "compile": first_output - 1, "first_output": first_output}
    counts = {"tuning": 7.25, "second_call": 0.13, "compilations": 6, "from_cache": 6}
    counts |= {"bytecode": name != "cold", "peft": False}
    return {"run": name, "timeline": timeline, **counts, "device": "a card", "versions": {"Python": "3.11", "torch": "2.11"}}


def test_the_target_is_for_warm_runs() -> None:
    setting: dict[str, Any] = dict.fromkeys(("command", "date", "model", "compute", "backend", "size", "batch"), "-")
    setting |= {"tiny": False, "slab_given": True}
    page = startup.report(setting, [row("cold", 90.0), row("warm 1", 12.5), row("warm 2", 9.25)])
    assert "within 10 s: warm 1 missed by 2.50 s; warm 2 met by 0.75 s." in page
    assert "Without the imports of torch and diffusers: 88.50, 11.00, 7.75 s." in page
    assert "the first run may read it from the disk" in page
    assert "bytecode cached in: warm 1, warm 2; diffusers would import PEFT too, which is not installed here." in page
    assert "bytecode cached in: no run; " in startup.report(setting, [row("cold", 9.0)])
    assert "| warm 2 | 1.50 | 0.50 | 0.50 | 5.75 | 1.00 | 9.25 | 7.25 | 0.130 | 6 | 6 |" in page
    assert "within 10 s: not measured." in startup.report(setting, [row("cold", 9.0)])


def test_bytecode_is_looked_for_where_this_python_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_package_of_this_test").mkdir()
    (tmp_path / "a_package_of_this_test" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "elsewhere"))
    assert not startup._has_bytecode("a_package_of_this_test") and not startup._has_bytecode("no_such_package_of_this_test")
    compileall.compile_dir(tmp_path / "a_package_of_this_test", quiet=1)
    assert startup._has_bytecode("a_package_of_this_test")


def test_the_seconds_of_tuning_are_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CHOSEN", {})
    logger = logging.getLogger("squareq_fx.auto.tuning")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.WARNING)
    heard = startup._Tuned.listening()

    def measure(shape: Shape, tile: Any, device: torch.device) -> float:
        time.sleep(0.02)
        return 1.0

    for name, width in (("one", 64), ("two", 128)):
        before, shape = heard.seconds, Shape("int8_matmul", "bfloat16", 8, width, 64)
        assert tune([shape], torch.device("cpu"), Table(tmp_path / name), measure=measure, progress=False) == 1
        assert 0.02 <= heard.seconds - before < 5


def test_a_slab_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "half.safetensors").touch()
    for name, absent in (("none", "none.safetensors"), ("half", "half.manifest.json"), ("half.safetensors", "extension")):
        with pytest.raises(SystemExit) as caught:
            startup.main(["--tiny", "--slab", str(tmp_path / name), "--out", str(tmp_path / "out")])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert "--slab: there is no " in error and absent in error
    assert not (tmp_path / "out").exists()


def test_a_child_that_fails_fails_the_command(tmp_path: Path) -> None:
    process = run("--tiny", "--backend", "cudagraph", "--out", str(tmp_path))
    assert process.returncode == 1
    told = process.stderr
    order = ("flux: building the slab", "flux: cold", "slab opened", "SquareQError")
    assert [told.index(text) for text in order] == sorted(told.index(text) for text in order)
    assert told.splitlines()[-1] == "cold: the process ended with exit status 1; its error is above"
    assert not list(tmp_path.iterdir())


def test_the_limit_ends_a_child(tmp_path: Path) -> None:
    process = run("--tiny", "--out", str(tmp_path), "--limit", "0.2")
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == "building the slab: the limit of 0.2 s was reached"
