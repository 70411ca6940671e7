"""The training benchmark on toys: its arms, its report and its picture, so that a run on a card has no surprises."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import training_bench  # noqa: E402
import training_report  # noqa: E402
import training_trace  # noqa: E402

sys.path.remove(str(BENCHMARKS))  # its kernels.py would be taken for the package of that name

STEPS, ROUNDS = 4, 3
Entry = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run of the command on the toy writes."""
    out = tmp_path_factory.mktemp("training")
    sizes = ("--steps", str(STEPS), "--repeats", str(ROUNDS), "--alone", "2")
    command = [sys.executable, str(BENCHMARKS / "training.py"), "--tiny", "--models", "flux", "--out", str(out), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def entries(folder: Path, event: str) -> list[Entry]:
    lines = (folder / "training-flux.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def test_every_part_ran(folder: Path) -> None:
    parts = entries(folder, "part")
    assert [p["part"] for p in parts] == [name for name, _ in (*training_bench.PREPARATION, *training_bench.MEASUREMENT)]
    assert all(p["error"] == "" and p["seconds"] >= 0 for p in parts)


def test_the_numbers_hang_together(folder: Path) -> None:
    steps = entries(folder, "step")
    for step in steps:
        assert math.isclose(step["step_ms"], step["forward_ms"] + step["backward_ms"])
        assert min(step["forward_ms"], step["backward_ms"], step["optimizer_ms"]) > 0
        assert step["run"] != "interleaved" or (step["moved_gib"] > 0) == (step["arm"] == "streamed")
    by_run = {run: [s for s in steps if s["run"] == run] for run in ("training", "interleaved", "alone")}
    assert [s["index"] for s in by_run["training"]] == list(range(STEPS))
    assert by_run["training"][-1]["loss"] < by_run["training"][0]["loss"]
    assert sorted((s["index"], s["arm"]) for s in by_run["interleaved"]) == [
        (i, arm) for i in range(ROUNDS) for arm in ("peer", "resident", "streamed")
    ]
    medians = training_report.medians(steps, "interleaved")
    for arm, median in medians.items():
        times = [s["step_ms"] for s in by_run["interleaved"] if s["arm"] == arm]
        assert median["step_ms"] == statistics.median(times) and min(times) <= median["low"] <= median["high"] <= max(times)


def test_the_toys_gradients_are_the_peers(folder: Path) -> None:
    found = {tuple(e["pair"]): e for e in entries(folder, "gradients")}
    assert found["streamed", "resident"]["equal"]
    for pair in (("streamed", "peer"), ("streamed", "peer in float32"), ("peer", "peer in float32")):
        assert found[pair]["missing"] == found[pair]["zero"] == []
        assert found[pair]["least"] > 1 - 1e-5
    streamed, resident = entries(folder, "base")
    assert streamed["unchanged"] and streamed["steps"] == STEPS
    assert resident["unchanged"] and resident["steps"] == 2 + 1 + ROUNDS


def test_the_report_has_the_medians_and_names_the_picture(folder: Path) -> None:
    text = (folder / "training.md").read_text()
    for arm, median in training_report.medians(entries(folder, "step"), "interleaved").items():
        assert re.search(rf"^\| {arm} \| {median['step_ms']:.1f} \(", text, re.MULTILINE)
    assert re.findall(r"^- (?!step).*: (yes|NO)$", text, re.MULTILINE) == ["yes"] * 3  # a toy's times promise nothing
    assert re.search(r"Command: `python benchmarks/training.py --tiny .*`, \d{4}-\d\d-\d\d", text)
    assert (folder / "training-trace.png").stat().st_size > 10_000


def test_the_trace_has_both_lanes(folder: Path) -> None:
    (trace,) = entries(folder, "trace")
    assert 0 < trace["forward_ms"] < trace["step_ms"]
    assert trace["compute_ms"] > 0 and trace["copy_ms"] > 0
    assert trace["copy_under_compute_ms"] <= min(trace["copy_ms"], trace["compute_ms"])
    assert math.isclose(trace["idle_ms"], trace["step_ms"] - trace["compute_ms"])


def test_a_step_has_a_floor(folder: Path) -> None:
    (found,) = entries(folder, "ceilings")
    assert min(found["operations"], found["product_rate"], found["copy_rate"]) > 0
    assert re.search(r"No step can take less than its arithmetic, .* TFLOP", (folder / "training.md").read_text())


def test_a_part_that_fails_or_hangs_does_not_end_the_run(tmp_path: Path) -> None:
    log = training_bench.Log(tmp_path / "training-flux.jsonl", "flux")
    with training_bench.Part(log, "fails", 10):
        raise ValueError("no such weight")
    with training_bench.Part(log, "hangs", 0.05):
        time.sleep(10)
    with training_bench.Part(log, "works", 10):
        pass
    fails, hangs, works = entries(tmp_path, "part")
    assert "ValueError: no such weight" in fails["error"] and "took more than" in hangs["error"] and works["error"] == ""
    with pytest.raises(KeyboardInterrupt), training_bench.Part(log, "interrupted", 10):
        raise KeyboardInterrupt


def _event(cat: str, name: str, ts: float, dur: float, **args: Any) -> Entry:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def test_a_trace_of_a_card_is_read_and_drawn(tmp_path: Path) -> None:
    events = [
        _event("kernel", "void spin_kernel(long)", 1000, 1),
        _event("kernel", "nvjet_sm90_tst", 1100, 400),
        _event("kernel", "nvjet_sm90_tst", 1501, 499),  # a launch's gap later: drawn as one
        _event("kernel", "void spin_kernel(long)", 2000, 1),
        _event("kernel", "flash_bwd", 3000, 1000),
        _event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1500, 1000, bytes=1 << 20),
        _event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 3500, 10, bytes=4),  # a scalar
    ]
    trace = training_trace._from_card(events)
    assert [(s.kind, s.start, s.end) for s in trace.compute if s.kind != "other kernels"] == [
        ("matrix product", 0.1, 1.0),
        ("attention", 2.0, 3.0),
    ]
    figures = trace.figures()
    assert (figures["step_ms"], figures["forward_ms"]) == (3.0, 1.0)
    assert figures["copy_ms"] == 1.0 and math.isclose(figures["copy_under_compute_ms"], 0.501)
    training_trace.draw(trace, "a step", tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 5_000
    with pytest.raises(RuntimeError, match="0 of the 2 marks"):
        training_trace._from_card(events[1:3])


def _step(run: str, arm: str, index: int, ms: float, peak: float) -> Entry:
    times = dict.fromkeys(("forward_ms", "backward_ms", "optimizer_ms", "moved_gib", "copy_ms", "stall_ms", "stalls"), 0.0)
    memory = {"peak_gib": peak, "reserved_gib": peak}
    return {"event": "step", "run": run, "arm": arm, "index": index, "step_ms": ms, "loss": 1.0, **times, **memory}


def test_a_broken_promise_is_said_aloud() -> None:
    slow = (("streamed", 120.0), ("resident", 100.0))
    found = [_step("interleaved", arm, i, ms + i, 1.0) for i in range(3) for arm, ms in slow]
    found += [_step("training", "streamed", i, 1.0, peak) for i, peak in enumerate((6.0, 4.0, 4.2))]
    found.append({"event": "base", "arm": "streamed", "steps": 3, "unchanged": False})
    cosines = {"least": 0.9991, "median": 1.0, "missing": [], "zero": ["a"]}
    found.append({"event": "gradients", "pair": ["streamed", "peer"], **cosines})
    lines = training_report.headline(found, "flux")
    assert len(lines) == 5 and all(line.endswith(": NO") for line in lines)
    good = [_step("interleaved", arm, 0, ms, 1.0) for arm, ms in (("streamed", 110.0), ("resident", 100.0))]
    assert training_report.headline(good, "flux") == [
        "- step, streamed over resident, median of pairs: 1.1 (at most 1.15): yes"
    ]
