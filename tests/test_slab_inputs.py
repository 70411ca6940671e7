"""Input signatures survive JSON; anything that cannot is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squareq_fx.errors import SlabError
from squareq_fx.slab import describe_inputs, restore_inputs, split_inputs

TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype, device="meta"),
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)
LITERALS = st.none() | st.booleans() | st.integers(-99, 99) | st.text("ab", max_size=3) | st.floats(-1, 1)
VALUES = st.recursive(
    TENSORS | LITERALS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["tensor", "tuple", "dict", "x", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@given(st.lists(VALUES, max_size=3).map(tuple), st.dictionaries(st.sampled_from(["x", "tensor"]), VALUES))
def test_round_trip_through_json(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    text = json.dumps(describe_inputs(args, kwargs), allow_nan=False)
    back_args, back_kwargs = restore_inputs(json.loads(text))
    assert same(args, back_args) and same(kwargs, back_kwargs)


def test_the_form_of_a_tensor() -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert describe_inputs((x,), {"flag": True}) == {
        "args": [{"tensor": {"shape": [2, 3], "dtype": "bfloat16"}}],
        "kwargs": {"flag": True},
    }
    (restored,), _ = restore_inputs(describe_inputs((x,), {}), device="cpu")
    assert restored.device.type == "cpu" and not restored.any()


def test_split_inputs() -> None:
    x = torch.zeros(1)
    assert split_inputs({"x": 1}) == ((), {"x": 1})
    assert split_inputs((x, 2)) == ((x, 2), {})
    assert split_inputs([x]) == ((x,), {})
    assert split_inputs(((x,), {"y": 2})) == ((x,), {"y": 2})
    with pytest.raises(SlabError, match="must be a dict"):
        split_inputs(x)


@pytest.mark.parametrize(
    "value",
    [object(), {1: 2}, float("nan"), float("inf"), torch.float32, {"a": [object()]}, torch.eye(2).to_sparse],
)
def test_what_cannot_be_recorded(value: object) -> None:
    with pytest.raises(SlabError, match="example input here"):
        describe_inputs((), {"here": value})


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"args": []},
        {"args": {}, "kwargs": {}},
        {"args": [{}], "kwargs": {}},
        {"args": [{"tensor": 1}], "kwargs": {}},
        {"args": [{"tensor": {"shape": [1], "dtype": "qint8"}}], "kwargs": {}},
        {"args": [{"tensor": {"shape": [1], "dtype": "nn"}}], "kwargs": {}},
        {"args": [{"tensor": {"shape": [True], "dtype": "float32"}}], "kwargs": {}},
        {"args": [{"tensor": {"shape": [-1], "dtype": "float32"}}], "kwargs": {}},
        {"args": [{"tensor": {"shape": [2**40, 2**40], "dtype": "float32"}}], "kwargs": {}},
        {"args": [{"tensor": {"shape": [1] * 100, "dtype": "float32"}}], "kwargs": {}},
        {"args": [{"tuple": {}}], "kwargs": {}},
        {"args": [{"list": []}], "kwargs": {}},
        {"args": [deep(40)], "kwargs": {}},
    ],
)
def test_descriptions_that_are_none(value: Any) -> None:
    with pytest.raises(SlabError):
        restore_inputs(value)


def test_too_deep_to_describe() -> None:
    with pytest.raises(SlabError, match="deep"):
        describe_inputs((deep(40),), {})
