"""stored: a graph is read as what it was written from, and bytes that nothing wrote are refused, never run."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Iterator
from typing import Any

import laws
import pytest
import sympy
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import EXAMPLES, SIZES, Spec, Staged, few, specs, staged, training
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import CeilDiv, FloorDiv, Max, Min, Mod, PythonMod

import squareq_fx
from squareq_fx.errors import SquareQError
from squareq_fx.ir import Info, Level, Packed, fake_mode, program
from squareq_fx.stored import DamagedError, StoredStage, UnstorableError, read_program, write_program
from squareq_fx.stored.expressions import Symbols, decode_expression, encode_expression
from squareq_fx.stored.programs import _opened, _sealed
from squareq_fx.stored.values import ValueReader, ValueWriter, decode_tree, encode_tree
from squareq_fx.verify import check


def assert_read_as_written(models: Staged, names: list[str]) -> None:
    gm = models.graphs[names[-1]]
    last, before = write_program(gm, models.model)
    found = read_program(last, models.model, lambda: before)
    assert laws.text(found) == laws.text(gm) and squareq_fx.show(found) == squareq_fx.show(gm)
    check(found)
    assert [s.name for s in program(found).history] == names
    for stage, original in zip(program(found).history, program(gm).history):
        assert (stage.seconds, stage.summary) == (original.seconds, original.summary)
        assert laws.text(stage.graph) == laws.text(original.graph)
        assert stage.graph is stage.graph
        assert [s.name for s in program(stage.graph).history] == [s.name for s in program(original.graph).history]
        check(stage.graph)
    assert program(found).history[-1].graph is not None
    record, other = program(found), program(gm)
    assert record.call.signature == other.call.signature and record.call.output_spec == other.call.output_spec
    replaced = fake_mode(gm).shape_env.replace
    assert [str(g) for g in record.guards] == [str(replaced(g)) for g in other.guards]
    for key, value in other.constants.items():
        assert torch.equal(record.constants[key], value)


@few
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
def test_a_graph_is_read_as_it_was_written(spec: Spec) -> None:
    models = staged(spec)
    assert_read_as_written(models, list(models.graphs))


@pytest.mark.parametrize("save", ["recompute", "offload"])
def test_a_graph_with_a_backward_too(save: Any) -> None:
    models = training(EXAMPLES[1], save)
    assert_read_as_written(models, list(models.graphs))


def test_it_computes_the_same() -> None:
    models = staged(EXAMPLES[1])
    gm = models.graphs["schedule"]
    found = read_program(write_program(gm, models.model)[0], models.model, lambda: b"")
    for sizes in SIZES:
        call = EXAMPLES[1].inputs(*sizes)
        assert laws.same(laws.evaluate(found, models, call), laws.evaluate(gm, models, call))


def test_passes_go_on_from_a_graph_that_was_read() -> None:
    models = staged(EXAMPLES[0])
    graph = models.graphs["quantize"]
    last, before = write_program(graph, models.model)
    found = read_program(last, models.model, lambda: before)
    passes = squareq_fx.default_passes(models.slab)[2:]
    result = squareq_fx.run(found, passes)
    assert [s.name for s in program(result).history] == list(models.graphs)
    assert laws.text(result) == laws.text(models.graphs["schedule"])


def test_earlier_stages_that_are_gone_say_so() -> None:
    models = staged(EXAMPLES[3])
    last, before = write_program(models.graphs["schedule"], models.model)

    def gone() -> bytes:
        raise FileNotFoundError("no such file")

    for earlier in (gone, lambda: before[:-9], lambda: b""):
        found = read_program(last, models.model, earlier)
        first = program(found).history[0]
        assert isinstance(first, StoredStage) and "capture" in repr(first)
        with pytest.raises(SquareQError, match="the graph after capture lay in a cache(.|\n)*cache=False"):
            _ = first.graph
        check(program(found).history[-1].graph)


# --------------------------------------------------------------------------------------------------------- expressions

SYMBOLS = [sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s7", "s39")]
_SIZES = st.recursive(
    st.sampled_from(SYMBOLS) | st.integers(-3, 64).map(sympy.Integer),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(lambda a, n: FloorDiv(a, n), inner, st.integers(2, 8)),
        st.builds(lambda a, n: CeilDiv(a, n), inner, st.integers(2, 8)),
        st.builds(lambda a, n: PythonMod(a, n), inner, st.integers(2, 8)),
        st.builds(lambda a, n: Mod(a * a, n), inner, st.integers(2, 8)),
        st.builds(Max, inner, inner),
        st.builds(Min, inner, inner),
    ),
    max_leaves=6,
)


@given(_SIZES)
@settings(max_examples=200)
def test_expressions_are_read_as_they_were_written(size: Any) -> None:
    conditions = [sympy.Eq(size, 3), sympy.Not(sympy.Le(size, 7)), sympy.Ne(size, SYMBOLS[0])]
    for expr in (sympy.sympify(size), *map(sympy.sympify, conditions)):
        try:
            written = encode_expression(expr)
        except UnstorableError:
            continue  # of a form that making it anew would simplify
        assert decode_expression(json.loads(json.dumps(written)), {s.name: s for s in SYMBOLS}.__getitem__) == expr


def test_sizes_of_the_run_are_not_written() -> None:
    with pytest.raises(UnstorableError, match="u0 is only known at run time"):
        encode_expression(sympy.Symbol("u0", integer=True) + 1)
    with pytest.raises(UnstorableError, match="sin"):
        encode_expression(sympy.sin(SYMBOLS[0]))


@pytest.mark.parametrize("written", [None, [], ["Add"], ["eval", "s0"], ["__class__", 1], {"a": 1}, 1.5, ["Symbol", "s0"]])
def test_what_is_no_expression_is_refused(written: Any) -> None:
    with pytest.raises(DamagedError):
        found = decode_expression(written, {s.name: s for s in SYMBOLS}.__getitem__)
        if not isinstance(found, sympy.Basic) or found == 0:  # an empty sum is a number
            raise DamagedError("nothing")


def test_symbols_keep_their_names_hints_and_ranges() -> None:
    env = Symbols([["s5", 8, 2, ["infinity", 1], True], ["s0", 3, 1, 64, True]], [["Eq", ["torch.Mod", "s5", 4], 0]])
    size = env.size(["Mul", 2, "s5"])
    assert str(size) == "2*s5" and size.node.hint == 16 and env.size(7) == 7
    (s5,) = size.node.expr.free_symbols
    assert env.env.var_to_range[s5].lower == 2
    assert statically_known_true(env.size("s5") % 4 == 0), "a condition simplifies what comes later"
    assert not statically_known_true(env.size("s0") % 4 == 0)
    with pytest.raises(DamagedError, match="described nowhere"):
        env.size("s9")
    with pytest.raises(DamagedError, match="no name of a size"):
        Symbols([["__import__('os')", 8, 2, 9, True]], [])
    with pytest.raises(DamagedError, match="does not hold"):
        Symbols([["s5", 8, 2, ["infinity", 1], True]], [["Eq", "s5", 3]])


# -------------------------------------------------------------------------------------------------------------- values

_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=4),
    st.complex_numbers(allow_nan=False, allow_infinity=False),
    st.sampled_from([torch.float32, torch.bfloat16, torch.strided, torch.channels_last, torch.device("cuda:1")]),
    st.sampled_from([Level.STREAMED, Info(kind="weight", key="a.b"), Packed("w", 0, 4, torch.int8), slice(1, None, 2)]),
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def _values() -> tuple[ValueWriter, ValueReader]:
    mode = fake_mode(staged(EXAMPLES[3]).graphs["capture"])
    return ValueWriter(mode), ValueReader(Symbols([], []))


@given(_VALUES)
@settings(max_examples=150)
def test_values_are_read_as_they_were_written(value: Any) -> None:
    writer, reader = _values()
    written = json.loads(json.dumps(writer.write(value), allow_nan=False))
    found = reader.read(written, [])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "value", [object(), torch.zeros(2), open, lambda: 0, {1, 2}, torch.Generator()], ids=lambda v: type(v).__name__
)
def test_what_cannot_be_written_is_named(value: Any) -> None:
    with pytest.raises(UnstorableError, match="written"):
        _values()[0].write([value])


@pytest.mark.parametrize(
    "written",
    [
        ["record", "os:system", {}],
        ["record", "squareq_fx.ir:fx", {}],
        ["record", "squareq_fx.ir:Info", {"kind": "node"}],
        ["record", "squareq_fx.ir:_source", {}],
        ["record", "squareq_fx.nowhere:Info", {}],
        ["enum", "enum:Enum", 1],
        ["torch", "load"],
        ["type", 0],
        ["node", 0],
        ["import", "os"],
        {"a": 1},
        [],
    ],
    ids=str,
)
def test_values_that_nothing_writes_are_refused(written: Any) -> None:
    with pytest.raises(DamagedError):
        _values()[1].read(written, [])


def test_the_structure_of_outputs() -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    writer, reader = _values()
    for value in (0, (1, [2, {"a": 3}]), UNet2DConditionOutput(sample=torch.zeros(1)), {"x": None, "y": (1,)}):
        tree = pytree.tree_structure(value)
        found = decode_tree(json.loads(json.dumps(encode_tree(tree, writer))), reader)
        assert found == tree
        assert type(pytree.tree_unflatten([torch.ones(1)] * tree.num_leaves, found)) is type(value) or tree.is_leaf()
    with pytest.raises(DamagedError, match="knows no os:system"):
        decode_tree(["os:system", None, None], reader)


# --------------------------------------------------------------------------------------------------------------- damage


@given(st.data())
@settings(max_examples=60)
def test_any_changed_byte_is_seen(data: st.DataObject) -> None:
    models = staged(EXAMPLES[3])
    written, _ = write_program(models.graphs["schedule"], models.model)
    at = data.draw(st.integers(0, len(written) - 1))
    change = data.draw(st.integers(1, 255))
    cut = data.draw(st.booleans())
    damaged = written[:at] if cut else written[:at] + bytes([written[at] ^ change]) + written[at + 1 :]
    with pytest.raises(DamagedError):
        read_program(damaged, models.model, lambda: b"")


_JUNK = [None, 0, -1, 10**9, "x", "__import__('os')", "a b", [], ["node", 5], ["record", "os:system", {}], {}, {"a": []}]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*path, key))


@given(st.data())
@settings(max_examples=150)
def test_documents_that_nothing_wrote_are_refused_or_plain_graphs(data: st.DataObject) -> None:
    """Sealed with a checksum that fits: what is read is a graph or an error of ours, and nothing is run."""
    models = staged(EXAMPLES[3])
    document, tensors = _opened(write_program(models.graphs["schedule"], models.model)[0])
    document = copy.deepcopy(document)
    *path, last = data.draw(st.sampled_from([p for p in _places(document) if p]))
    owner: Any = document
    for key in path:
        owner = owner[key]
    owner[last] = data.draw(st.sampled_from(_JUNK))
    try:
        read_program(_sealed(document, tensors), models.model, lambda: b"")
    except SquareQError:
        return


def _inserted(op: str, target: Any) -> Any:
    node = [op, "a", target, ["tuple"], ["dict"], None, None, -1, -1]
    return lambda document: document["graph"]["graph"]["nodes"].insert(0, node)


def test_names_cannot_carry_code() -> None:
    models = staged(EXAMPLES[3])
    document, tensors = _opened(write_program(models.graphs["schedule"], models.model)[0])
    for change in (
        lambda d: d["graph"]["graph"]["nodes"][0].__setitem__(1, "x): import os; (y"),
        lambda d: d["graph"]["graph"]["nodes"][0].__setitem__(2, "x=print(1)"),
        lambda d: d["graph"]["graph"].__setitem__("name", "class"),
        _inserted("call_function", ["function", "os", "system"]),
        _inserted("call_function", ["function", "torch", "load"]),
        _inserted("call_function", ["function", "operator", "attrgetter"]),
        _inserted("call_function", ["operation", "loaded_libraries", "add", "default"]),
        _inserted("call_module", "forward"),
        _inserted("get_attr", "forward"),
    ):
        changed = copy.deepcopy(document)
        change(changed)
        with pytest.raises(DamagedError):
            read_program(_sealed(changed, tensors), models.model, lambda: b"")


def test_the_file_is_json_and_tensors() -> None:
    models = staged(EXAMPLES[0])
    written, _ = write_program(models.graphs["schedule"], models.model)
    head, _, body = written.partition(b"\n")
    assert head.startswith(b"squareq_fx graph 1 ")
    size = int.from_bytes(body[:8], "little")
    assert json.loads(zlib.decompress(body[8 : 8 + size]))["history"][0][0] == "capture"
