"""The comparison with other packages on toys: whatever of them is installed, it runs and writes its tables and plots."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
peers_arms = importlib.import_module("peers_arms")
peers_report = importlib.import_module("peers_report")
peers_schedule = importlib.import_module("peers_schedule")
sys.path.remove(str(BENCHMARKS))  # its kernels.py would be taken for the package of that name

Entry = dict[str, Any]
JOBS = """
import os, time

def work(line, tasks, options):
    for task in tasks:
        line.task(task)
        with line.attempt(arm=task):
            if task == "absent":
                import no_such_package
            if task == "crashes":
                os._exit(7)
            if task == "raises":
                raise ValueError("no such weight")
            if task == "hangs":
                time.sleep(60)
            line.say(arm=task, begin=time.time())
            with line.alone():
                begin = time.time()
                if task == "hangs alone":
                    time.sleep(60)
                while time.time() < begin + 0.3:
                    pass
                line.say(arm=task, span=(begin, time.time()))
"""


def run(out: Path, *arguments: str) -> tuple[list[Entry], str]:
    command = [sys.executable, str(BENCHMARKS / "peers.py"), "--tiny", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = [json.loads(line) for line in (out / "peers.jsonl").read_text().splitlines()]
    return entries, (out / "peers.md").read_text()


def make_jobs_importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the spawned processes, whose path is this one's."""
    (folder / "jobs_of_a_test.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(folder))


def test_layers(tmp_path: Path) -> None:
    arms = ("bf16", "ours-w8a16", "ours-w8a8", "quanto")
    entries, text = run(tmp_path, "--only", "layers", "--arms", *arms)
    measured = {(e["arm"], tuple(e["shape"])): e for e in entries if "ms" in e}
    for arm, bound in (("bf16", 0.003), ("ours-w8a16", 0.02), ("ours-w8a8", 0.03)):
        for shape in ((40, 96, 64), (2, 64, 64)):
            found = measured[arm, shape]
            assert found["l2"] < bound and min(found["ms"], found["baseline_ms"], found["ratio"]) > 0
    assert re.search(r"^\| 40x96x64 \|", text, re.MULTILINE)
    assert (tmp_path / "peers-layers.png").stat().st_size > 5_000
    if importlib.util.find_spec("optimum") is None:
        assert "- layers, quanto: not installed (optimum-quanto)" in text


@pytest.mark.slow
def test_models_and_steps(tmp_path: Path) -> None:
    chosen = ("--models", "flux", "--arms", "bf16", "ours-w8a16", "--repeats", "2")
    entries, text = run(tmp_path, "--only", "models", "train", *chosen)
    assert not [e for e in entries if e.get("error")], text
    for part in ("models", "train"):
        assert {e["arm"] for e in entries if e.get("part") == part and "ms" in e} == {"bf16", "ours-w8a16"}
        assert (tmp_path / f"peers-{part}.png").stat().st_size > 5_000
    compared = {(e["part"], e["arm"]): e for e in entries if e.get("event") == "compared"}
    assert compared["models", "bf16"]["cosine"] > 1 - 1e-9 > compared["models", "ours-w8a16"]["cosine"] > 0.999
    gradients = compared["train", "ours-w8a16"]
    assert gradients["good"] and gradients["missing"] == gradients["zero"] == 0 and gradients["median"] > 0.99


def test_one_measures_at_a_time_and_failures_stay_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_jobs_importable(tmp_path, monkeypatch)
    tasks = (("a", "crashes", "b"), ("raises", "c"), ("absent",), ("hangs", "d"), ("hangs alone",))
    jobs = [peers_schedule.Job("layers", "jobs_of_a_test.work", t, {}, prepare=8, measure=4) for t in tasks]
    rows: list[Entry] = []
    peers_schedule.run_jobs(jobs, rows.append, 90, 3)
    spans = sorted(row["span"] for row in rows if "span" in row)
    assert len(spans) == 4 and all(earlier[1] <= later[0] for earlier, later in pairwise(spans))
    told = {
        row["arm"]: row.get("error", f"not installed: {row.get('missing')}")
        for row in rows
        if row.keys() & {"error", "missing"}
    }
    assert told == {
        "crashes": "the process ended with 7",
        "raises": "ValueError: no such weight",
        "absent": "not installed: no_such_package",
        "hangs": "took more than 8 s",
        "hangs alone": "took more than 4 s",
    }


def test_what_is_left_when_the_time_is_up_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_jobs_importable(tmp_path, monkeypatch)
    jobs = [peers_schedule.Job("train", "jobs_of_a_test.work", (arm,), {}) for arm in ("hangs", "never begun")]
    rows: list[Entry] = []
    start = time.monotonic()
    peers_schedule.run_jobs(jobs, rows.append, 1.0, 1)
    assert time.monotonic() - start < 20
    assert [(row["arm"], row["error"]) for row in rows] == [
        (arm, "not measured: the time was up") for arm in ("hangs", "never begun")
    ]


def test_the_arms_are_those_of_the_table() -> None:
    assert all(peers_arms.is_ours(arm) or arm.partition("+")[0] in peers_arms.PEERS for arm in peers_arms.DEFAULT)
    with pytest.raises(KeyError):
        peers_arms.peer_of("nobody")
    with pytest.raises(ValueError, match="suffix"):
        peers_arms.compiled("bf16+fast", None, tiny=True)


@pytest.mark.parametrize(
    ("zero", "said"), [(3, "loses gradients (0 missing, 3 zero)"), (0, "its gradients point elsewhere")], ids=["lost", "wrong"]
)
def test_an_arm_without_bf16s_gradients_has_no_time(zero: int, said: str) -> None:
    entries: list[Entry] = [{"event": "run", "command": "", "date": "", "python": "", "arms": ["bf16", "bad"]}]
    for arm, good in (("bf16", True), ("bad", False)):
        step = {"ms": 123.4, "low": 1.0, "high": 2.0, "forward_ms": 1.0, "peak_gib": None}
        entries.append({"part": "train", "model": "flux", "arm": arm, **step})
        seen = {"missing": 0, "zero": zero * (not good), "least": 0.0, "median": 0.1, "good": good}
        entries.append({"event": "compared", "part": "train", "model": "flux", "arm": arm, **seen})
    text = peers_report.report(entries, {})
    assert text.count("123.4") == 1
    assert f"| bad | {said} | - | - | 0.0000 / 0.1000 | - |" in text
