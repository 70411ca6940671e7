"""The original's promises ("gates"), and which test asserts each.

A line names the tests of one behaviour; `test_every_pointer_of_the_table_exists` checks that they are there, and that
every test below is in the table. Gates 4, 7, 9 (training) and most of 15 are not part of what is compiled here.

0   exactly two files: test_slab_v2.py::test_exactly_two_files
0   key names and types, byte totals exact: test_slab_v2.py::test_manifest_is_the_originals_text
0   key names and types of every tensor: test_slab_v2.py::test_tensors_are_the_originals_bit_for_bit
0   layer count, ABI 999, unknown bits: test_slab_open.py::test_tampered_manifests
0   tensor agreement: test_slab_open.py::test_wrong_dtypes_and_shapes
0   a wrong signature raises, the right one passes: test_slab_open.py::test_signature
0   byte totals exact: test_slab_open.py::test_truncated_and_overlong test_slab_open.py::test_overlong
1   every slab layer becomes one int8 call: test_gates.py::test_gate1_slab_layers_and_int8_nodes_are_a_bijection
1   and at full size: test_full_size.py::test_every_slab_layer_is_one_int8_node
1   nothing else does: test_gates.py::test_gate1_nothing_else_becomes_int8
1   embeddings and norms untouched: test_gates.py::test_gate1_embeddings_and_norms_are_untouched
1   running without weights raises: test_gates.py::test_gate1_running_without_weights_raises
1   rewriting twice changes nothing: test_gates.py::test_gate1_rewriting_twice_changes_nothing
1   names and hierarchy: test_gates.py::test_gate1_names_and_hierarchy_can_be_read_off
2   tensors filled and counted, dtypes, shapes, device: test_gates.py::test_gate2_every_tensor_arrives_bit_for_bit
2   reload idempotent: test_gates.py::test_gate2_every_tensor_arrives_bit_for_bit
2   padded width: test_gates.py::test_gate2_padded_width
2   bias present iff declared, within 1e-6: test_gates.py::test_gate2_bias_iff_declared
2   row error and relative RMSE: test_slab_open.py::test_gate_2_row_error_rmse_and_bias
2   row error at most half a scale: test_kernels_reference.py::test_every_weight_comes_back_within_half_a_step
2   opening again: test_slab_open.py::test_loading_again_gives_the_same
3   no float copy outlives its node: test_gates.py::test_gate3_no_float_copy_of_a_quantised_weight
3   a copy that is kept would be seen: test_gates.py::test_gate3_the_watch_sees_a_copy_that_is_kept
3   nor inside the kernel: test_kernels_linear.py::test_gate3_no_float_temporary_of_the_weights_size_on_the_cpu
3   nothing is saved for a backward: test_gates.py::test_gate3_nothing_is_saved_for_a_backward
3   int8 is one byte an element: test_gates.py::test_gate3_int8_is_one_byte_an_element
3   a cast does not change that: test_gates.py::test_gate3_no_float_copy_of_a_quantised_weight
5   batches 1 to 256: test_kernels_linear.py::test_gate5_batches_equal_dequantise_then_matmul
5   tiny weights, 100-fold inputs: test_kernels_linear.py::test_gate5_tiny_weights_and_hundredfold_inputs
5   bias adds exactly: test_kernels_linear.py::test_gate5_bias_adds_exactly
5   output in the compute dtype: test_kernels_linear.py::test_odd_shapes_dtypes_zero_points_padding_and_strides
5   five runs bitwise equal: test_kernels_linear.py::test_gate5_five_runs_return_the_same_bits
5   the same of a module, at batches 1 to 256: test_gates.py::test_gate5_end_to_end
5   in = 100 padded to 128: test_gates.py::test_gate5_end_to_end
6   block entries in execution order: test_gates.py::test_gate6_segments_are_in_execution_order
6   in the file too: test_slab_order.py::test_the_file_is_in_execution_order
6   frozen after build: test_gates.py::test_gate6_records_are_frozen
6   a block larger than the arena: test_gates.py::test_gate6_a_block_larger_than_the_arena_is_refused_up_front
6   parameter specs: test_gates.py::test_gate6_specs_can_be_read
8   each backing its own path: test_runtime_steps.py::test_each_backing_takes_its_own_path
8   the same numbers: test_emit.py::test_every_way_to_hold_the_weights_gives_the_same_bits
8   at every stage: test_emit.py::test_every_stage_and_backing_of_the_toy
10  each missing tensor reported, all at once: test_slab_open.py::test_every_missing_tensor_is_reported
10  faults of both files at once: test_slab_open.py::test_faults_of_both_files_are_listed_together
10  corrupted data: test_slab_open.py::test_a_flipped_bit_is_found_on_first_use_and_by_verify
10  corrupted data when it is streamed: test_gates.py::test_gate10_damaged_weights_are_never_computed_with
10  tampered shapes, ABI, bits: test_slab_open.py::test_tampered_manifests
10  NaN, Inf and zero scales: test_slab_open.py::test_bad_scales_and_zero_points
10  wrong signature: test_emit.py::test_a_slab_of_another_model
10  other weights: test_emit.py::test_a_slab_of_other_weights
10  a clean slab gives none: test_slab_open.py::test_a_clean_slab_opens_by_any_of_its_names
10  weights are never filled in: test_emit.py::test_weights_that_are_nowhere
11  one vocabulary: test_architecture.py::test_every_public_name_says_what_it_does_and_what_it_raises
11  no dead code: test_architecture.py::test_a_file_is_small_finished_and_explicit
12  many blocks equal the resident model: test_gates.py::test_gate12_many_blocks_equal_the_resident_model
12  with evicted bytes overwritten: test_emit.py::test_gate12_poisoned_arena_gives_the_same_bits
13  50 steps keep every value, no leak, 60 s: test_gates.py::test_gate13_fifty_steps_with_evicted_bytes_overwritten
13  the same of the runtime alone: test_runtime_steps.py::test_fifty_steps_keep_every_value_and_leak_nothing
14  casts of module and parent: test_emit.py::test_gate14_casts_change_nothing_and_warn
14  casts that change nothing: test_emit.py::test_gate14_a_cast_to_what_it_is_says_nothing
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import gc
import math
import re
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compiled, emitted
from laws import apply, bits, l2, text
from models import Attend, Gate, Mlp, Norm, Residual, Seq, Spec, Staged, dequantized, make_slab, scratch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

import squareq_fx
from squareq_fx import CompiledModule, PassError, RuntimeStateError, SlabError, ops
from squareq_fx.emit import emit
from squareq_fx.ir import functions, info, program
from squareq_fx.kernels.dispatch import int8_linear, int8_linear_parts
from squareq_fx.passes import Quantize
from squareq_fx.runtime import Runtime
from squareq_fx.tracing.skeleton import skeleton

_BLOCK = Seq((Residual(Seq((Norm(), Attend()))), Residual(Mlp(53)), Residual(Gate())))
_SPEC = Spec(_BLOCK, repeat=8, width=100, labels=True, visits=2)


@functools.cache
def _toy() -> tuple[Staged, CompiledModule]:
    """Eight blocks, each visited twice, 100 wide; compiled from the slab alone, so no float weight is around."""
    model, call = _SPEC.build(), _SPEC.inputs()
    slab = make_slab(model, call)
    module = squareq_fx.compile(skeleton(model)[0], slab, progress=False)
    return Staged(model, slab, {s.name: s.graph for s in module.history}, dequantized(model, slab)), module


def _emitted(stage: str = "schedule", **options: Any) -> CompiledModule:
    staged, _ = _toy()
    return emit(staged.graphs[stage], skeleton(staged.model)[0], staged.slab, **options)


def _graph(family: str, stage: str) -> fx.GraphModule:
    if family == "toy":
        return _toy()[0].graphs[stage]
    return next(s.graph for s in compiled(family).module.history if s.name == stage)


def _slab(family: str) -> squareq_fx.Slab:
    return _toy()[0].slab if family == "toy" else compiled(family).slab


_MODELS = ("toy", "flux", "sdxl")


# ------------------------------------------------------------------------------------------------ the table


def test_every_pointer_of_the_table_exists() -> None:
    assert __doc__ is not None
    pointers = re.findall(r"(test_\w+\.py)::(test_\w+)", __doc__)
    folder = Path(__file__).parent
    missing = [f"{file}::{name}" for file, name in pointers if name not in _tests(folder / file)]
    assert not missing
    mine = {name for file, name in pointers if file == Path(__file__).name}
    assert _tests(Path(__file__)) - mine == {test_every_pointer_of_the_table_exists.__name__}
    gates = {int(number) for number in re.findall(r"^(\d+) ", __doc__, re.MULTILINE)}
    assert gates == {0, 1, 2, 3, 5, 6, 8, 10, 11, 12, 13, 14}


@functools.cache
def _tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


# -------------------------------------------------------------------------------------------------- gate 1


@pytest.mark.parametrize("family", _MODELS)
def test_gate1_slab_layers_and_int8_nodes_are_a_bijection(family: str) -> None:
    slab, nodes = _slab(family), [n for n in _graph(family, "quantize").graph.nodes if n.target is ops.int8_linear]
    visits = 2 if family == "toy" else 1
    called = Counter(info(n).layer for n in nodes)
    assert set(called) == set(slab.layers)
    assert all(called[name] == (visits if name.startswith("blocks.") else 1) for name in called)
    for node in nodes:
        layer = slab.layers[str(info(node).layer)]
        keys = (layer.qweight_key, layer.scale_key, layer.zero_point_key, layer.bias_key)
        assert [None if a is None else info(a).key for a in node.args[1:]] == list(keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", _MODELS)
def test_gate1_nothing_else_becomes_int8(family: str) -> None:
    """The difference the pass makes is linear for int8_linear, and nothing more."""

    def operations(stage: str) -> Counter[str]:
        return Counter(str(n.target) for n in _graph(family, stage).graph.nodes if n.op == "call_function")

    before, after = operations("canonicalize"), operations("quantize")
    count = sum((before - after).values())
    assert before - after == Counter({"aten.linear.default": count})
    assert after - before == Counter({"squareq.int8_linear.default": count})
    assert not after["aten.linear.default"]


@pytest.mark.parametrize("family", _MODELS)
def test_gate1_embeddings_and_norms_are_untouched(family: str) -> None:
    def readers(stage: str) -> dict[str, tuple[str, ...]]:
        quantised = {f"{name}.{leaf}" for name in _slab(family).layers for leaf in ("weight", "bias")}
        weights = [n for n in _graph(family, stage).graph.nodes if n.op == "placeholder" and info(n).kind == "weight"]
        kept = [n for n in weights if info(n).layer is None and info(n).key not in quantised]
        return {f"{info(n).key} {n.meta['val'].dtype}": tuple(str(u.target) for u in n.users) for n in kept}

    before, after = readers("canonicalize"), readers("quantize")
    assert before == after
    found = {target.removeprefix("aten.").partition(".")[0] for users in after.values() for target in users}
    expected = {"toy": {"embedding", "layer_norm"}, "flux": {"rms_norm"}, "sdxl": {"layer_norm", "group_norm"}}
    assert expected[family] <= found, found


@pytest.mark.parametrize("family", ["toy", "flux"])
def test_gate1_running_without_weights_raises(family: str) -> None:
    module = _toy()[1] if family == "toy" else emitted(family)
    inputs = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    real = [torch.zeros([2 if isinstance(s, torch.SymInt) else s for s in val.shape], dtype=val.dtype) for val in inputs]
    with pytest.raises(RuntimeStateError, match=r"ran without weights: no runtime is active"):
        module.__dict__["_run_graph"](*real)


@pytest.mark.parametrize("family", ["toy", "sdxl"])
def test_gate1_rewriting_twice_changes_nothing(family: str) -> None:
    graph, transform = _graph(family, "quantize"), Quantize(_slab(family))
    assert text(transform(graph)) == text(graph)
    if family == "toy":
        apply(transform, graph, _toy()[0])


@pytest.mark.parametrize("family", _MODELS)
def test_gate1_names_and_hierarchy_can_be_read_off(family: str) -> None:
    final = _graph(family, "schedule")
    blocks = set(program(final).block_paths)
    loaded = [str(n.args[0]) for n in final.graph.nodes if n.target is ops.load]
    assert blocks <= set(loaded)
    for node in (n for n in final.graph.nodes if n.op == "call_module"):
        packed = program(final).segments[str(info(node).key)]
        if info(node).key in blocks:
            assert all(p.key.startswith(f"{info(node).key}.") for p in packed)
    layers = {p.key.rpartition(".")[0] for packed in program(final).segments.values() for p in packed}
    layers |= {str(info(n).layer) for n in final.graph.nodes if info(n).layer}
    assert set(_slab(family).layers) <= layers


# -------------------------------------------------------------------------------------------------- gate 2


@pytest.mark.parametrize("backing", ["host", "disk", "resident"])
@pytest.mark.parametrize("family", _MODELS)
def test_gate2_every_tensor_arrives_bit_for_bit(family: str, backing: str) -> None:
    slab = _slab(family)
    module = _emitted(backing=backing) if family == "toy" else emitted(family, "schedule", backing)  # type: ignore[arg-type]
    runtime, segments = module.runtime, program(module).segments
    assert runtime is not None
    filled = set()
    for _ in range(2):
        for name, packed in segments.items():
            nbytes = packed[-1].offset + packed[-1].nbytes
            with runtime.step():
                weights = runtime.load(name, 0, nbytes, None)
                assert weights.device == module.device
                for p in packed:
                    stored = slab.tensor(p.key)
                    found = ops.unpack(weights, p.offset, list(stored.shape), p.dtype)
                    assert found.dtype == stored.dtype and bits(found) == bits(stored), p.key
                    filled.add(p.key)
                runtime.evict(weights, name, 0)
    rest = {str(info(n).key) for n in _graph(family, "schedule").graph.nodes if n.op == "placeholder"}
    assert {key for layer in slab.layers.values() for key in layer.keys} <= filled | rest
    assert len(filled) == sum(len(packed) for packed in segments.values())


def test_gate2_padded_width() -> None:
    for layer in _toy()[0].slab.layers.values():
        out, width = layer.orig_shape
        assert tuple(layer.packed_shape) == (out, -(-width // 64) * 64)
        qweight = _toy()[0].slab.tensor(layer.qweight_key)
        assert tuple(qweight.shape) == tuple(layer.packed_shape) and qweight.dtype == torch.int8
        assert not qweight[:, width:].any()


def test_gate2_bias_iff_declared() -> None:
    staged, _ = _toy()
    nodes = [n for n in staged.graphs["quantize"].graph.nodes if n.target is ops.int8_linear]
    declared = 0
    for node in nodes:
        name = str(info(node).layer)
        own = staged.model.get_submodule(name).bias
        assert (node.args[4] is None) == (own is None) == (staged.slab.layers[name].bias_key is None)
        if own is not None:
            assert float((staged.slab.tensor(f"{name}.bias") - own).abs().max()) <= 1e-6  # type: ignore[operator, arg-type]
            declared += 1
    assert 0 < declared < len(nodes)


# -------------------------------------------------------------------------------------------------- gate 3

_KERNELS = {ops.int8_linear: int8_linear, ops.int8_linear_parts: int8_linear_parts}


class _Watch(TorchDispatchMode):
    """Follows float tensors of a quantised weight's shape that are made inside an int8 node, and what outlives it.

    Attributes:
        nodes: how many layers were computed.
    """

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.nodes = shapes, 0
        self.inside: list[weakref.ref[torch.Tensor]] = []
        self.outlived: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KERNELS:
            self.nodes += args[5] if func is ops.int8_linear_parts else 1
            with self:
                result = _KERNELS[func](*args, **(kwargs or {}))
            self._look()
            return result
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, tuple | list) else (result,):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and tuple(leaf.shape) in self.shapes:
                self.inside.append(weakref.ref(leaf))
        return result

    def _look(self) -> None:
        self.outlived += [tuple(t.shape) for ref in self.inside if (t := ref()) is not None]
        self.inside.clear()


def _shapes(slab: squareq_fx.Slab) -> set[tuple[int, ...]]:
    sizes = [(*layer.orig_shape,) for layer in slab.layers.values()]
    sizes += [(*layer.packed_shape,) for layer in slab.layers.values()]
    sizes += [(parts * out, width) for parts in (2, 3) for out, width in sizes]  # layers computed as one
    embedding = tuple(_toy()[0].model.get_parameter("classes.weight").shape)  # rightly float, and as large as the head
    return {s for size in sizes for s in (size, size[::-1])} - {embedding, embedding[::-1]}


def _float_weights(shapes: set[tuple[int, ...]]) -> list[torch.Tensor]:
    """Real float tensors of these shapes that anything in the process holds."""
    gc.collect()
    return [
        t
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and t.is_floating_point()
        and tuple(t.shape) in shapes
    ]


@pytest.mark.parametrize("stage", ["quantize", "schedule"])
def test_gate3_no_float_copy_of_a_quantised_weight(stage: str) -> None:
    slab, call = _toy()[0].slab, _SPEC.inputs()
    shapes = _shapes(slab)
    before = _float_weights(shapes)  # the float model that the slab was built from, and other tests' things
    module = _emitted(stage)
    for cast in (False, True):
        if cast:
            with pytest.warns(UserWarning, match="keeps computing"):
                module.to(torch.float16)
        watch = _Watch(shapes)
        with watch:
            output = module(**call)
        watch._look()
        assert watch.nodes == sum(2 if name.startswith("blocks.") else 1 for name in slab.layers)
        assert not watch.outlived
        alive = _float_weights(shapes)
        assert {id(t) for t in alive} == {id(t) for t in before}
        state = [*module.parameters(), *module.buffers()]
        assert not [t.shape for t in state if t.is_floating_point() and tuple(t.shape) in shapes]
        assert not output.requires_grad
    module.shutdown()


def test_gate3_the_watch_sees_a_copy_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []

    def leaks(x: torch.Tensor, qweight: torch.Tensor, *rest: Any) -> torch.Tensor:
        kept.append(qweight.float() * 1)
        return int8_linear(x, qweight, *rest)

    monkeypatch.setitem(_KERNELS, ops.int8_linear, leaks)
    watch = _Watch(_shapes(_toy()[0].slab))
    with watch:
        _toy()[1](**_SPEC.inputs())
    assert len(watch.outlived) >= len(_toy()[0].slab.layers)


def test_gate3_nothing_is_saved_for_a_backward() -> None:
    _, module = _toy()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(**_SPEC.inputs())
    assert not saved


@pytest.mark.parametrize("family", _MODELS)
def test_gate3_int8_is_one_byte_an_element(family: str) -> None:
    slab = _slab(family)
    segments = program(_graph(family, "schedule")).segments
    packed = {p.key: p for pieces in segments.values() for p in pieces}
    module = _emitted("quantize") if family == "toy" else emitted(family, "quantize")
    state = module.state_dict()
    for layer in slab.layers.values():
        elements = math.prod(layer.packed_shape)
        held = state.get(layer.qweight_key, state.get(f"weights.{layer.qweight_key}"))
        assert held is not None and held.dtype == torch.int8 and held.element_size() == 1
        assert held.untyped_storage().nbytes() >= elements == held.numel()
        if layer.qweight_key in packed:
            assert packed[layer.qweight_key].nbytes == elements
            assert packed[layer.qweight_key].dtype == torch.int8


# -------------------------------------------------------------------------------------------------- gate 5


def test_gate5_end_to_end() -> None:
    staged, module = _toy()
    assert (staged.slab.layers["head"].orig_shape[1], staged.slab.layers["head"].packed_shape[1]) == (100, 128)
    for batch in (1, 7, 64, 256):
        call = _SPEC.inputs(batch, 2, 3)
        found = module(**call)
        assert found.isfinite().all() and found.dtype == torch.float32
        with torch.no_grad():
            assert l2(found, staged.dequantized(**call)) < 1e-5
        for _ in range(4):
            assert torch.equal(module(**call), found)


# -------------------------------------------------------------------------------------------------- gate 6


@pytest.mark.parametrize("family", _MODELS)
def test_gate6_segments_are_in_execution_order(family: str) -> None:
    final = _graph(family, "schedule")
    loaded = [str(n.args[0]) for n in final.graph.nodes if n.target is ops.load]
    assert list(program(final).segments) == list(dict.fromkeys(loaded))
    if family == "toy":
        assert [name for name in loaded if name.startswith("blocks.")] == [f"blocks.{i}" for i in range(8)] * 2
    else:
        blocks = program(final).block_paths
        recorded = [segment.name for segment in _slab(family).segments if segment.name in blocks]
        assert [name for name in loaded if name in blocks] == recorded, "forward hooks saw another order"
        assert sorted(recorded) == sorted(blocks)


def test_gate6_records_are_frozen() -> None:
    final = _graph("toy", "schedule")
    record = program(final)
    first = next(iter(record.segments.values()))
    assert isinstance(first, tuple)
    for frozen, name in ((record, "segments"), (first[0], "nbytes"), (record.history[0], "graph")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, None)


def test_gate6_a_block_larger_than_the_arena_is_refused_up_front() -> None:
    staged, _ = _toy()
    largest = max(((p[-1].offset + p[-1].nbytes, name) for name, p in program(staged.graphs["schedule"]).segments.items()))
    graph = staged.graphs["capture"]
    for budget, slots in ((largest[0] - 1, 1), (2 * largest[0] - 1, 2)):
        passes = squareq_fx.default_passes(staged.slab, slots=slots, distance=slots - 1, budget=budget)
        with pytest.raises(PassError, match=rf"{largest[0]:,} bytes\), the budget is {budget:,}\. Raise the budget"):
            squareq_fx.run(graph, passes)
    aligned = -(-largest[0] // 256) * 256
    fits = squareq_fx.run(graph, squareq_fx.default_passes(staged.slab, slots=1, distance=0, budget=aligned))
    assert program(fits).arena_bytes == aligned


@pytest.mark.parametrize("family", _MODELS)
def test_gate6_specs_can_be_read(family: str) -> None:
    slab = _slab(family)
    for name, packed in program(_graph(family, "schedule")).segments.items():
        end = 0
        for p in packed:
            entry = slab.tensors[p.key]
            assert (p.dtype, p.nbytes, p.offset) == (entry.dtype, entry.nbytes, end), (name, p)
            end += p.nbytes
    functions_of = functions(_graph(family, "schedule"))
    assert all(any(n.target is ops.unpack for n in child.graph.nodes) for child in functions_of.values())


# ------------------------------------------------------------------------------------------------- gate 10


@pytest.mark.parametrize("backing", ["host", "disk", "resident"])
def test_gate10_damaged_weights_are_never_computed_with(backing: str) -> None:
    spec = Spec(Residual(Mlp(53)), repeat=3)
    model, call = spec.build(), spec.inputs()
    slab = squareq_fx.build_slab(model, scratch("damaged"), example_inputs=call, progress=False)
    key = next(layer.qweight_key for name, layer in slab.layers.items() if name.startswith("blocks.2"))
    entry, file = slab.tensors[key], slab.path.with_suffix(".safetensors")
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little") + entry.offset
    slab.close()
    raw = bytearray(file.read_bytes())
    raw[start + entry.nbytes // 2] ^= 0x40
    file.write_bytes(raw)
    module = squareq_fx.compile(skeleton(model)[0], file, backing=backing, progress=False)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(SlabError, match="corrupt: copy or build it again") as raised:
            module(**call)
        assert len(raised.value.problems) == 1 and key in raised.value.problems[0]
    module.shutdown()


# --------------------------------------------------------------------------------------------- gates 12, 13


@pytest.mark.parametrize(("slots", "distance"), [(1, 0), (2, 1), (5, 4)])
def test_gate12_many_blocks_equal_the_resident_model(slots: int, distance: int) -> None:
    staged, _ = _toy()
    passes = squareq_fx.default_passes(staged.slab, slots=slots, distance=distance)
    graph = squareq_fx.run(staged.graphs["capture"], passes)
    module, resident = emit(graph, skeleton(staged.model)[0], staged.slab), _emitted("quantize")
    for seed in range(3):
        call = _SPEC.inputs(2, 6 + seed, 4, seed=seed)
        assert torch.equal(module(**call), resident(**call))
    step = module.last_step
    assert step is not None and step.loads == step.evictions >= 16
    assert step.peak_bytes_in_use <= step.arena_bytes == program(graph).arena_bytes
    module.shutdown()


def _resident_set() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backing", ["host", "disk"])
def test_gate13_fifty_steps_with_evicted_bytes_overwritten(backing: str) -> None:
    module = _emitted(backing=backing)
    original = module.runtime
    assert original is not None
    module.runtime = Runtime(original.store, arena_bytes=original.arena_bytes, poison=True)
    call = _SPEC.inputs(4, 9, 5)
    weights = bits(_toy()[0].slab.data)
    expected = _emitted("quantize")(**call)
    peaks, memory = [], []
    for _ in range(50):
        assert torch.equal(module(**call), expected)
        step = module.last_step
        assert step is not None
        peaks.append(step.peak_bytes_in_use + step.resident_bytes + step.host_bytes)
        if sys.platform == "linux":
            memory.append(_resident_set())
    assert max(peaks) <= 1.2 * peaks[0]
    assert not memory or max(memory) <= 1.2 * memory[0]
    assert bits(_toy()[0].slab.data) == weights
    module.shutdown()
