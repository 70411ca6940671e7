"""The table of measured times, the shapes of a graph, and the choice of tiles; the kernels themselves are timed on a GPU."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import backbone, calls
from hypothesis import given
from hypothesis import strategies as st
from models import EXAMPLES, make_slab, staged

import squareq_fx
from squareq_fx.auto.deciding import tune_kernels
from squareq_fx.auto.timings import _VERSION, Shape, Table, Timing, machine, microseconds, table_path
from squareq_fx.auto.tuning import layer_times, tune, unique_shapes, use_known_tiles
from squareq_fx.binding import Binding
from squareq_fx.kernels import tiles
from squareq_fx.kernels.tiles import row_bucket
from squareq_fx.passes import Quantize

CPU = torch.device("cpu")
SHAPE = Shape("int8_matmul", "bfloat16", 4608, 3072, 3072)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SQUAREQ_CACHE_DIR", str(tmp_path / "cache"))
    before = dict(tiles.CHOSEN)
    tiles.CHOSEN.clear()
    yield
    tiles.CHOSEN.clear()
    tiles.CHOSEN.update(before)


# ------------------------------------------------------------------------------------------------------ the table


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 16), st.integers(1, 1 << 16))
def test_a_key_is_a_shape_and_a_bucket_is_its_own(rows: int, width: int, inner: int) -> None:
    shape = Shape("int8_matmul", "bfloat16", rows, width, inner)
    again = Shape.of_key(shape.key)
    assert again.key == shape.key and again.rows == row_bucket(rows)
    assert rows <= again.rows <= max(16, rows * 9 / 8)


def test_it_is_kept_and_merged(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.json"
    first, second = Table(path), Table(path)
    first.put(SHAPE, Timing(12.5, (128, 128, 128, 4, 3, 2, 0)))
    other = Shape("layer.w8a8", "float32", 5, 6, 7)
    second.put(other, Timing(3.25))
    first.save()
    second.save()  # did not know of the first's
    found = Table(path)
    assert len(found) == 2
    assert found.get(SHAPE) == Timing(12.5, (128, 128, 128, 4, 3, 2, 0)) and found.get(other) == Timing(3.25)
    assert second.get(SHAPE) == found.get(SHAPE)
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
    assert found.get(Shape("int8_matmul", "bfloat16", 4600, 3072, 3072)) is not None, "of the same bucket"
    assert found.get(Shape("int8_matmul", "bfloat16", 4609, 3072, 3072)) is None
    assert found.get(Shape("int8_matmul", "float16", 4608, 3072, 3072)) is None


def _writer(path: str, number: int) -> None:
    for i in range(8):
        table = Table(path)
        table.put(Shape("k", "float32", 16, number + 1, i + 1), Timing(1.0 + i))
        table.save()


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_writer, args=(str(path), n)) for n in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert all(writer.exitcode == 0 for writer in writers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 8 <= len(Table(path)) <= 16, "an entry may get lost, the file not"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"squareq_tuning": 0, "entries": {}}',
        f'{{"squareq_tuning": {_VERSION + 1}, "entries": {{}}}}',
        f'{{"squareq_tuning": {_VERSION}, "entries": {{"k float32 16x1x1": {{"microseconds": -1, "tile": null}}}}}}',
        f'{{"squareq_tuning": {_VERSION}, "entries": {{"k float32 16x1x1": {{"microseconds": 1, "tile": ["a"]}}}}}}',
        f'{{"squareq_tuning": {_VERSION}, "entries": {{"k float32": {{"microseconds": 1, "tile": null}}}}}}',
        f'{{"squareq_tuning": {_VERSION}, "entries": {{"k float32 16x1x1": 3}}}}',
    ],
)
def test_a_damaged_file_is_warned_of_and_replaced(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="table.json cannot be read .*measuring again"):
        table = Table(path)
    assert len(table) == 0
    table.put(SHAPE, Timing(1.0))
    table.save()
    assert len(Table(path)) == 1


def test_times_of_older_kernels_are_forgotten_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    entry = {"k float32 16x1x1": {"microseconds": 1, "tile": None}}
    path.write_text(json.dumps({"squareq_tuning": _VERSION - 1, "entries": entry}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = Table(path)
        assert len(table) == 0
        table.put(SHAPE, Timing(1.0))
        table.save()
        assert len(Table(path)) == 1


def test_bytes_that_are_no_text_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="cannot be read"):
        Table(path)
    (tmp_path / "file").write_text("")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        table = Table(tmp_path / "file" / "table.json")
    table.put(SHAPE, Timing(1.0))
    with pytest.warns(UserWarning, match="cannot be kept in .*set SQUAREQ_CACHE_DIR"):
        table.save()
    assert table.get(SHAPE) == Timing(1.0)


def test_one_file_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert torch.__version__ in machine("cpu") and f"{torch.get_num_threads()} threads" in machine("cpu")
    assert table_path("cpu").parent == tmp_path / "cache" / "tuning"
    assert "/" not in table_path("cpu").name and " " not in table_path("cpu").name
    monkeypatch.delenv("SQUAREQ_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert table_path("cpu").parent == tmp_path / ".cache" / "squareq_fx" / "tuning"


# ----------------------------------------------------------------------------------------------------- the shapes


def test_shapes_of_a_graph_in_either_mode() -> None:
    models = staged(EXAMPLES[0])
    plain = unique_shapes(models.graphs["quantize"])
    assert len(set(plain)) == len(plain) and {s.kernel for s in plain} == {"int8_linear"}
    assert Shape("int8_linear", "float32", 2 * 5, 12, 7) in plain, "embed: batch 2, 5 tokens"
    assert set(unique_shapes(models.graphs["stream"])) == set(plain), "the same, by functions"
    passes = squareq_fx.default_passes(models.slab, compute="w8a8")
    coarse = squareq_fx.run(models.graphs["capture"], passes, until="activations")
    stages = {stage.name: stage.graph for stage in squareq_fx.ir.program(coarse).history}
    decided, split = (set(unique_shapes(stages[name])) for name in ("quantize", "activations"))
    assert decided == split and {s.kernel for s in split} == {"quantize_rows", "int8_matmul"}
    products = {(s.rows, s.width, s.inner) for s in split if s.kernel == "int8_matmul"}
    assert products == {(s.rows, s.width, s.inner) for s in plain}
    assert all(s.width == 0 for s in split if s.kernel == "quantize_rows")


def test_shapes_at_the_sizes_of_a_call() -> None:
    model = backbone("flux")
    slab = make_slab(model)
    graph = Quantize(slab)(squareq_fx.capture(model, slab=slab))
    binding = Binding(graph, "flux")
    tensors, _ = binding.tensors((), calls("flux", 3, 4, 6, 11))
    shapes = unique_shapes(graph, lambda val: binding.concrete(val, tensors))
    assert {Shape("int8_linear", "float32", 3 * 24, 32, 8), Shape("int8_linear", "float32", 3 * 11, 32, 24)} <= set(shapes)
    assert unique_shapes(graph) != shapes


# ------------------------------------------------------------------------------------------------------- measuring


def test_times_of_layers_are_measured_once() -> None:
    layers = [(torch.float32, 20, 24, 40), (torch.bfloat16, 3, 8, 16), (torch.float32, 20, 24, 40)]
    table = Table.of(CPU)
    found = layer_times(layers, CPU, table, progress=False)
    assert set(found) == set(layers) and all(a > 0 and b > 0 for a, b in found.values())
    entries = json.loads(table.path.read_text())["entries"]
    kept = ("float32 20x24x40", "bfloat16 8x8x16")
    assert set(entries) == {f"layer.{mode} {sizes}" for mode in ("w8a16", "w8a8") for sizes in kept}
    again = layer_times(layers, CPU, Table.of(CPU), progress=False)
    assert again == found, "the very numbers of the file"


def test_an_interrupted_measurement_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from squareq_fx.auto import tuning

    calls_made = []

    def measured(call: Any, device: torch.device) -> float:
        calls_made.append(call)
        if len(calls_made) == 4:
            raise KeyboardInterrupt
        return 7.0

    monkeypatch.setattr(tuning, "microseconds", measured)
    with pytest.raises(KeyboardInterrupt):
        layer_times([(torch.float32, 16, n, 8) for n in (8, 16, 24)], CPU, Table.of(CPU), progress=False)
    assert len(Table.of(CPU)) == 3


def test_the_time_of_a_call() -> None:
    import time

    assert 1900 < microseconds(lambda: time.sleep(0.002), CPU) < 50_000


@pytest.fixture
def some_tiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Candidates without asking a card."""
    found = [tiles.MatmulTile(m, 128, 128, 4, 3, 2, tiles.Tail.WHOLE) for m in (32, 64, 128)]
    monkeypatch.setattr(tiles, "candidates", lambda kernel, *_: tuple(found) if kernel == "int8_matmul" else ())
    return found  # type: ignore[return-value]


def test_the_fastest_tile_is_chosen_and_kept(some_tiles: list[Any]) -> None:
    asked = []

    def measure(shape: Shape, tile: Any, device: torch.device) -> float:
        asked.append((shape, tile))
        return {32: float("inf"), 64: 10.0, 128: 20.0}[tile.m]

    shapes = [SHAPE, Shape("int8_matmul", "bfloat16", 4500, 3072, 3072), Shape("quantize_rows", "bfloat16", 4608, 0, 3072)]
    table = Table.of(CPU)
    assert tune(shapes, CPU, table, measure=measure, progress=False) == 1
    assert [tile for _, tile in asked] == some_tiles and {shape.rows for shape, _ in asked} == {4608}
    key = tiles.key("int8_matmul", 4608, 3072, 3072, torch.bfloat16)
    assert dict(tiles.CHOSEN) == {key: some_tiles[1]}
    assert tiles.tile_for("int8_matmul", 4501, 3072, 3072, torch.bfloat16, CPU) == some_tiles[1]
    tiles.CHOSEN.clear()
    assert tune(shapes, CPU, Table.of(CPU), measure=measure, progress=False) == 0 and len(asked) == 3
    assert dict(tiles.CHOSEN) == {key: some_tiles[1]}
    tiles.CHOSEN.clear()
    assert use_known_tiles(Table.of(CPU), CPU) == 1 and dict(tiles.CHOSEN) == {key: some_tiles[1]}


def test_a_tile_that_is_no_candidate_any_more_is_measured_again(some_tiles: list[Any]) -> None:
    table = Table.of(CPU)
    table.put(SHAPE, Timing(1.0, (7, 7, 7, 7, 7, 7, 7)))
    assert use_known_tiles(table, CPU) == 0 and not tiles.CHOSEN
    assert tune([SHAPE], CPU, table, measure=lambda *_: 5.0, progress=False) == 1
    assert table.get(SHAPE) == Timing(5.0, tuple(some_tiles[0]))


def test_where_no_tile_runs_none_is_chosen(some_tiles: list[Any]) -> None:
    assert tune([SHAPE], CPU, Table.of(CPU), measure=lambda *_: float("inf"), progress=False) == 0
    assert not tiles.CHOSEN and len(Table.of(CPU)) == 0


def test_a_tile_that_computes_something_else_is_left_out(some_tiles: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As happened under one compiler, on one card: it would be the fastest here."""
    from squareq_fx.auto import tuning

    class Fake:
        def __call__(self, tile: Any) -> Any:
            return tile

        def is_right(self, y: Any) -> bool:
            return y.m != 64

    monkeypatch.setattr(tuning, "trial", lambda *a: Fake())
    monkeypatch.setattr(tuning, "microseconds", lambda call, device: {32: 9.0, 64: 1.0, 128: 8.0}[call().m])
    with pytest.warns(UserWarning, match=r"int8_matmul computes wrong sums with tile \(64, 128, .* left out"):
        assert tune([SHAPE], CPU, Table.of(CPU), measure=tuning._tile_microseconds, progress=False) == 1
    assert list(tiles.CHOSEN.values()) == [some_tiles[2]]


def test_on_the_cpu_there_is_nothing_to_tune() -> None:
    models = staged(EXAMPLES[0])
    assert tune(unique_shapes(models.graphs["quantize"]), CPU, Table.of(CPU), progress=False) == 0
    tune_kernels(models.graphs["schedule"], models.model, models.slab, measure=True)
    assert not tiles.CHOSEN and not table_path(CPU).exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_tiles_and_layers_are_measured() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    table = Table.of(device)
    shapes = [Shape("int8_matmul", "bfloat16", 512, 512, 512), Shape("int8_linear", "bfloat16", 16, 512, 512)]
    assert tune(shapes, device, table, progress=False) == 2
    for shape in shapes:
        timing = Table.of(device).get(shape)
        assert timing is not None and timing.tile is not None and 1 < timing.microseconds < 1000
    found = layer_times([(torch.bfloat16, 512, 512, 512)], device, table, progress=False)
    assert all(0.001 < ms < 1 for times in found.values() for ms in times)
