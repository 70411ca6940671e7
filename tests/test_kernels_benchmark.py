"""benchmarks/kernels.py on toys: it runs, writes its tables, and fails for wrong results only."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETED

from squareq_fx.kernels import dispatch, tiles
from squareq_fx.kernels.tiles import FusedTile

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def bring(name: str) -> Any:
    """A module of the benchmarks' folder, which is not left on the path: its kernels.py has the name of a package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


layers = bring("kernels_layers")

if not INTERPRETED:

    def test_toys(tmp_path: Path) -> None:
        out = tmp_path / "results" / "kernels.md"
        command = [sys.executable, str(BENCHMARKS / "kernels.py"), "--tiny", "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        text = out.read_text()
        assert text.strip() == done.stdout.strip() and "All accurate and repeatable" in text
        for part in ("torch " + torch.__version__, "`python benchmarks/kernels.py --tiny", "## Correct: 25 of 25"):
            assert part in text, part
        titles = ("Rows to bf16; torch copies", "W8A16 of many rows", "W8A16 of few rows", "W8A8: quantise rows", "Rows of two")
        for title in titles:
            assert f"## {title}" in text, title
        goals = text.partition("## Targets")[2].partition("##")[0]
        assert goals.count("| met |") + goals.count("| MISSED |") == 6

    def run_in_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        specification = importlib.util.spec_from_file_location("benchmark_of_kernels", BENCHMARKS / "kernels.py")
        assert specification is not None and specification.loader is not None
        script = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, "benchmark_of_kernels", script)
        specification.loader.exec_module(script)
        return script.main(["--tiny"]), capsys.readouterr().out

    @pytest.mark.parametrize("compute", ("w8a16", "w8a8"))
    def test_wrong_results_fail(compute: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        name = "int8_linear" if compute == "w8a16" else "int8_matmul"
        right = getattr(dispatch, name)
        monkeypatch.setattr(dispatch, name, lambda *args, **kwargs: right(*args, **kwargs) * 1.02)
        status, text = run_in_here(monkeypatch, capsys)
        assert status == 1 and "RESULTS ARE WRONG" in text and f"x64x96, {compute}" in text.rpartition("WRONG")[2]

    def test_results_that_change_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        right, calls = dispatch.int8_matmul, iter(range(10**6))
        change = lambda *args, **kwargs: right(*args, **kwargs) + (1e-3 if next(calls) % 5 == 4 else 0.0)  # noqa: E731
        monkeypatch.setattr(dispatch, "int8_matmul", change)
        status, text = run_in_here(monkeypatch, capsys)
        assert status == 1 and "| DIFFER |" in text

    def test_rows_quantised_otherwise_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        right = dispatch.quantize_rows

        def other(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            q, sx = right(x)
            q[0, 0] = 1 - q[0, 0]
            return q, sx

        monkeypatch.setattr(dispatch, "quantize_rows", other)
        status, text = run_in_here(monkeypatch, capsys)
        assert status == 1 and "ROWS DIFFER" in text

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_without_a_card_it_says_so() -> None:
        done = subprocess.run([sys.executable, str(BENCHMARKS / "kernels.py")], capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and "needs a CUDA device; --tiny runs toys on the CPU" in done.stderr

    def test_processes_compile_and_say_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton")
        tuner = bring("kernels_tiles")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # there a layer runs on the CPU, and a Triton kernel does not
        toy = layers.Layer(3, 40, 96)
        good, bad = tuner.Job("layer", toy), tuner.Job("int8_linear", toy, FusedTile(16, 32, 64, 4, 1, 1))
        sys.path.insert(0, str(BENCHMARKS))  # where the processes look, as they do when the script runs
        try:
            failed = tuner.compile_all([good, bad], workers=1)
        finally:
            sys.path.remove(str(BENCHMARKS))
        assert list(failed) == [bad] and "ValueError: the Triton kernels run on CUDA devices" in failed[bad]


def test_the_targets_are_the_issue_s() -> None:
    assert {layer.target for layer in layers.MANY_ROWS} == {0.93} and all(layer.m >= 4096 for layer in layers.MANY_ROWS)
    assert {layer.target for layer in layers.FEW_ROWS} == {1.5} and {layer.m for layer in layers.FEW_ROWS} == {1, 2, 4, 8, 16}
    wanted = {(layer.m, layer.n, layer.k): layer.target for layer in layers.W8A8}
    assert wanted[4608, 12288, 3072] == wanted[4608, 3072, 15360] == wanted[16384, 3072, 3072] == 1.5
    assert wanted[4608, 3072, 3072] == 1.35 and all(target == 1.0 for (_, n, k), target in wanted.items() if 3072 not in (n, k))
    assert all(layer.n % layer.parts == 0 for layer in layers.W8A8)


if INTERPRETED:
    TOY = layers.Layer(3, 40, 96)

    def test_a_program_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
        tuner = bring("kernels_tiles")
        jobs = tuner.jobs_for([TOY, layers.Layer(5, 40, 96)], [TOY, layers.Layer(5, 40, 96)], [(8, 256, 4)], [])
        fused = [job.tile for job in jobs if job.kernel == "int8_linear"]
        assert len({(*tile[:5], tile.split > 1) for tile in fused}) == len(fused) >= 2
        products = [job.tile[:5] for job in jobs if job.kernel == "int8_matmul"]
        assert sorted(products) == [(16, 32, 256, 2, 4), (16, 32, 512, 4, 3), (16, 64, 256, 4, 4)]
        assert [job.kernel for job in jobs].count("dequantise") == 1

    def test_the_fastest_tile_is_chosen_and_failed_ones_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
        tuner = bring("kernels_tiles")
        monkeypatch.setattr(tiles, "CHOSEN", {})
        few = (FusedTile(16, 32, 64, 4, 1, 1), FusedTile(16, 16, 64, 4, 1, 1), FusedTile(16, 32, 32, 4, 1, 1))
        monkeypatch.setattr(tiles, "candidates", lambda *shape: few)
        seen: list[object] = []

        def timed(arms: dict[Any, list[Any]], **options: object) -> dict[Any, float]:
            for tile, calls in arms.items():
                assert calls[0]().shape == (8, 40)
                seen.append(tile)
            return {tile: float(len(arms) - i) for i, tile in enumerate(arms)}

        monkeypatch.setattr(tuner, "medians", timed)
        found = tuner.tune("int8_linear", [TOY, layers.Layer(5, 40, 96)], [tuner.Job("int8_linear", TOY, few[2])])
        assert seen == list(few[:2]) and len(found) == 1
        assert dict(tiles.CHOSEN) == {tiles.key("int8_linear", 3, 40, 96, torch.bfloat16): few[1]}
        assert list(found[0].ms) == [few[1], few[0]]
