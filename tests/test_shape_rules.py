"""The shape rules of tracing give what torch's own decompositions give."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import EXAMPLES, Spec, few, specs
from torch._dispatch.python import enable_python_dispatcher

import squareq_fx
from squareq_fx.ir import program
from squareq_fx.specs import spec
from squareq_fx.tracing import export as tracing
from squareq_fx.tracing.shape_rules import shape_rules

SIZE = st.integers(0, 5)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def meta(shape: list[int], dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if transposed else tensor


def both(function: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """The result's type, or the error's, by torch and by the rules."""
    found = []
    for rules in (contextlib.nullcontext(), shape_rules()):
        with torch.no_grad(), enable_python_dispatcher(), rules:
            try:
                found.append(spec(function(*args, **kwargs)))
            except RuntimeError as error:
                found.append(type(error).__name__)
    return found[0], found[1]


@given(st.lists(SIZE, min_size=1, max_size=4), SIZE, SIZE, DTYPES, DTYPES, st.booleans(), st.booleans())
def test_linear(
    shape: list[int], out: int, wide: int, dtype: torch.dtype, other: torch.dtype, bias: bool, transposed: bool
) -> None:
    x = meta(shape, dtype, transposed)
    for width, kind in ((shape[-1], dtype), (wide, dtype), (shape[-1], other)):
        weight = torch.empty(out, width, dtype=kind, device="meta")
        expected, found = both(F.linear, x, weight, torch.empty(out, dtype=kind, device="meta") if bias else None)
        assert found == expected


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
    DTYPES,
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_attention(
    batch: list[int], sizes: list[int], dtype: torch.dtype, transposed: bool, causal: bool, masked: bool
) -> None:
    queries, keys, width, values = sizes
    q = meta([*batch, queries, width], dtype, transposed)
    k = meta([*batch, keys, width], dtype, transposed)
    v = meta([*batch, keys, values], dtype, transposed)
    mask = meta([queries, keys], dtype, False) if masked and not causal else None
    expected, found = both(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, is_causal=causal)
    assert found == expected
    wrong = meta([*batch, keys + 1, values], dtype, False)
    expected, found = both(F.scaled_dot_product_attention, q, k, wrong)
    assert found == expected


def described(spec_of_model: Spec) -> tuple[list[str], list[str]]:
    """A captured graph as text without the numbers in its nodes' names, and its guards."""
    graph = squareq_fx.capture(spec_of_model.build(), spec_of_model.inputs())
    place = {node: f"%{i}" for i, node in enumerate(graph.graph.nodes)}
    lines = []
    for node in graph.graph.nodes:
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), place.__getitem__)
        lines.append(f"{node.op} {node.target} {arguments} {spec(node.meta.get('val'))}")
    return lines, sorted(map(str, program(graph).guards))


@few
@given(specs())
def test_the_captured_graph_is_the_same(spec_of_model: Spec) -> None:
    with_rules = described(spec_of_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "shape_rules", contextlib.nullcontext)
        assert described(spec_of_model) == with_rules


def test_nothing_stays_registered() -> None:
    described(EXAMPLES[0])
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    for op in (torch.ops.aten.linear.default, torch.ops.aten.scaled_dot_product_attention.default):
        assert key not in op.py_kernels
    with enable_python_dispatcher():
        assert F.linear(torch.ones(2, 3), torch.ones(4, 3)).tolist() == [[3.0] * 4] * 2
