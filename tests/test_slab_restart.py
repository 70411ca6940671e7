"""A build killed at any moment leaves the old slab or none, goes on where it was, and ends with the same
bytes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from slab_models import TinyNet
from torch import nn

import squareq_fx.slab.build as build_module
from squareq_fx.errors import SlabError
from squareq_fx.slab import build_slab, open_slab
from squareq_fx.slab.journal import Journal

SUFFIXES = (".safetensors", ".manifest.json")


class Stack(nn.Module):
    """Enough layers that a build takes a while, small enough that it takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)) for _ in range(16))
        self.norm = nn.LayerNorm(512)


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_slab_restart import Stack
from squareq_fx.slab import build_slab
print("ready", flush=True)
build_slab({source!r}, {target!r}, model_class=Stack, progress=False)
print("done", flush=True)
"""


def contents(stem: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{stem}{suffix}").read_bytes() for suffix in SUFFIXES}


def files_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("source") / "w.safetensors"
    save_file(Stack().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def truth(source: Path) -> dict[str, bytes]:
    stem = source.parent / "truth"
    build_slab(source, stem, model_class=Stack, progress=False)
    return contents(stem)


def killed_build(source: Path, target: Path, after: float) -> bool:
    """Start a build and kill it `after` seconds into the work; True if it was killed before it was done."""
    code = CHILD.format(tests=str(Path(__file__).parent), source=str(source), target=str(target))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd="/")
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    return "done" not in child.communicate()[0]


def test_killed_at_random_moments(source: Path, truth: dict[str, bytes], tmp_path: Path) -> None:
    """Each kill restarts the same target until a build survives; in between there is never half a slab."""
    rng, old = random.Random(0), tmp_path / "slab"
    torch.manual_seed(1)
    build_slab(Stack(), old, progress=False)
    before = contents(old)
    killed = 0
    for _ in range(4):
        killed += killed_build(source, old, rng.uniform(0.0, 0.5))
        now = contents(old)
        assert now in (before, truth)
        open_slab(old).verify()
    assert killed
    build_slab(source, old, model_class=Stack, progress=False)
    assert contents(old) == truth
    assert files_of(tmp_path) == ["slab.manifest.json", "slab.safetensors"]


class Killed(BaseException):
    """Stands for SIGKILL in a place that can be chosen: nothing in the package may catch it."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Stop after this many items; counts the items that are really worked on, by one worker so that it is
    exact.
    """
    state = [10**9, 0]
    real = build_module._work

    def work(*args: object) -> object:
        if state[1] >= state[0]:
            raise Killed
        state[1] += 1
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(build_module, "_work", work)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield state
    torch.set_num_threads(threads)


def test_it_goes_on_where_it_was(source: Path, truth: dict[str, bytes], stop_after: list[int], tmp_path: Path) -> None:
    target = tmp_path / "s"
    for stop in (5, 6, 0, 13):
        stop_after[:] = [stop, 0]
        with pytest.raises(Killed):
            build_slab(source, target, model_class=Stack, progress=False)
        with pytest.raises(SlabError, match="no slab"):
            open_slab(target)
    stop_after[:] = [10**9, 0]
    build_slab(source, target, model_class=Stack, progress=False)
    assert stop_after[1] == 34 - 24  # 32 layers and two tensors of the norm, 24 of them done before
    assert contents(target) == truth


def test_a_module_goes_on_too_but_not_with_other_weights(stop_after: list[int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyNet()
    build_slab(model, tmp_path / "truth", progress=False)
    total = stop_after[1]
    stop_after[:] = [6, 0]
    with pytest.raises(Killed):
        build_slab(model, tmp_path / "s", progress=False)
    stop_after[:] = [10**9, 0]
    build_slab(model, tmp_path / "s", progress=False)
    assert stop_after[1] == total - 6
    assert contents(tmp_path / "s") == contents(tmp_path / "truth")
    stop_after[:] = [6, 0]
    with pytest.raises(Killed):
        build_slab(model, tmp_path / "t", progress=False)
    with torch.no_grad():
        model.blocks[0].proj.weight[0, 0] += 1
    stop_after[:] = [10**9, 0]
    build_slab(model, tmp_path / "t", progress=False)
    assert stop_after[1] == total
    build_slab(model, tmp_path / "truth", progress=False)
    assert contents(tmp_path / "t") == contents(tmp_path / "truth")


@pytest.mark.parametrize("change", ["options", "source", "data", "journal", "torn", "garbage", "size", "no data"])
def test_what_is_left_behind_is_not_believed(change: str, source: Path, stop_after: list[int], tmp_path: Path) -> None:
    own = tmp_path / "w.safetensors"
    own.write_bytes(source.read_bytes())
    stop_after[:] = [10, 0]
    with pytest.raises(Killed):
        build_slab(own, tmp_path / "s", model_class=Stack, progress=False)
    data, journal = tmp_path / "s.safetensors.partial", tmp_path / "s.journal.partial"
    options: dict[str, object] = {}
    redone = 34
    if change == "options":
        options["pack_k"] = 128
    elif change == "source":
        raw = bytearray(source.read_bytes())
        raw[-40] ^= 1
        own.write_bytes(raw)
    elif change == "data":
        raw = bytearray(data.read_bytes())
        raw[200_000] ^= 1
        data.write_bytes(raw)
        redone = 25
    elif change == "journal":
        journal.unlink()
    elif change == "torn":
        journal.write_bytes(journal.read_bytes()[:-7])
        redone = 25
    elif change == "garbage":
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join([*lines[:3], b'{"item": 3, "checksums": 1, "fidelity": 2}\n', b"\xff\n"]))
        redone = 32
    elif change == "size":
        os.truncate(data, 100)
    elif change == "no data":
        data.unlink()
    stop_after[:] = [10**9, 0]
    build_slab(own, tmp_path / "s", model_class=Stack, progress=False, **options)  # type: ignore[arg-type]
    assert stop_after[1] == redone
    build_slab(own, tmp_path / "truth", model_class=Stack, progress=False, **options)  # type: ignore[arg-type]
    assert contents(tmp_path / "s") == contents(tmp_path / "truth")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("same_manifest", [True, False])
def test_killed_while_the_files_are_put_in_place(
    step: int, same_manifest: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stop at each step of the commit: the old slab, the new one, or a refusal; never something else."""
    torch.manual_seed(0)
    old, new = TinyNet(), TinyNet()
    build_slab(new, tmp_path / "truth", progress=False)
    after = contents(tmp_path / "truth")
    exclude = () if same_manifest else ("head",)
    build_slab(old, tmp_path / "s", exclude=exclude, progress=False)
    before = contents(tmp_path / "s")
    calls = 0

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls > step:
                raise Killed
            return real(*args)

        monkeypatch.setattr(os, name, call)

    with monkeypatch.context():
        for name in ("fsync", "replace"):
            counted(name)
        if step < 5:
            with pytest.raises(Killed):
                build_slab(new, tmp_path / "s", progress=False)
        else:
            build_slab(new, tmp_path / "s", progress=False)
    monkeypatch.undo()
    now = contents(tmp_path / "s")
    if now in (before, after):
        open_slab(tmp_path / "s").verify()
    else:
        assert step == 3
        with pytest.raises(SlabError, match="different builds"):
            open_slab(tmp_path / "s")
    build_slab(new, tmp_path / "s", progress=False)
    assert contents(tmp_path / "s") == after
    assert not list(tmp_path.glob("*.partial"))


def test_two_builds_of_one_slab_do_not_meet(source: Path, tmp_path: Path) -> None:
    errors = []
    held = Journal(tmp_path / "s.journal.partial", "somebody else")
    with held, pytest.raises(SlabError, match="another build is writing"):
        build_slab(source, tmp_path / "s", model_class=Stack, progress=False)

    def build() -> None:
        try:
            build_slab(source, tmp_path / "s", model_class=Stack, progress=False)
        except SlabError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(errors) <= 2 and all("another build" in error for error in errors)
    assert not nn.Linear(2, 2).weight.is_meta
    open_slab(tmp_path / "s").verify()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_does_not_matter(
    threads: int, source: Path, truth: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    real, left = build_module._work, [9]

    def work(*args: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*args)  # type: ignore[arg-type]

    torch.set_num_threads(threads)
    try:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(build_module, "_work", work)
            build_slab(source, tmp_path / "s", model_class=Stack, progress=False)
        build_slab(source, tmp_path / "s", model_class=Stack, progress=False)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "s") == truth


def test_a_full_disk_keeps_what_is_done(
    source: Path, truth: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, written = os.pwrite, 0

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 4_000_000:
            raise OSError(28, "No space left on device")
        return real(fd, data[:100_000], offset)  # short writes are legal

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(SlabError, match="No space left"):
        build_slab(source, tmp_path / "s", model_class=Stack, progress=False)
    monkeypatch.undo()
    assert len((tmp_path / "s.journal.partial").read_bytes().splitlines()) > 5
    build_slab(source, tmp_path / "s", model_class=Stack, progress=False)
    assert contents(tmp_path / "s") == truth


def test_the_journal_is_readable(source: Path, stop_after: list[int], tmp_path: Path) -> None:
    stop_after[:] = [2, 0]
    with pytest.raises(Killed):
        build_slab(source, tmp_path / "s", model_class=Stack, progress=False)
    first, *rest = (tmp_path / "s.journal.partial").read_text().splitlines()
    assert len(json.loads(first)["fingerprint"]) == 64
    assert [json.loads(line)["item"] for line in rest] == [
        "QuantizeItem layers.0.0",
        "QuantizeItem layers.0.1",
    ]
