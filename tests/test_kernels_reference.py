"""kernels/reference.py: bit for bit SquareQ V2, and what every kernel refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, Case, assert_accurate, cases
from safetensors.torch import load_file

from squareq_fx.kernels import cpu, dispatch, reference

DATA = Path(__file__).parent / "data"


def test_quantises_the_original_weights_bit_for_bit() -> None:
    weights = load_file(DATA / "upstream_v2_tiny_weights.safetensors")
    slab = load_file(DATA / "upstream_v2_tiny.safetensors")
    layers = [key.removesuffix(".qweight") for key in slab if key.endswith(".qweight")]
    assert len(layers) == 10
    for layer in layers:
        got = reference.quantize_weight(weights[f"{layer}.weight"])
        for name, tensor in zip(("qweight", "scale", "zero_point"), got, strict=True):
            expected = slab[f"{layer}.{name}"]
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), (layer, name)


@given(st.integers(1, 40), st.integers(0, 90), st.integers(-1, 70), st.integers(0, 99))
def test_quantising_slices_of_rows_gives_slices(rows: int, width: int, pack_k: int, seed: int) -> None:
    weight = torch.randn((rows, width), generator=torch.Generator().manual_seed(seed))
    whole = reference.quantize_weight(weight, pack_k)
    assert whole[0].shape == (rows, reference.packed_width(width, pack_k))
    assert not whole[0][:, width:].any()
    for start in range(0, rows, 7):
        part = reference.quantize_weight(weight[start : start + 7], pack_k)
        assert all(torch.equal(p, w[start : start + 7]) for p, w in zip(part, whole, strict=True))


@given(
    st.integers(1, 30), st.integers(1, 90), st.sampled_from(DTYPES), st.floats(1e-6, 1e3), st.integers(0, 99)
)
def test_every_weight_comes_back_within_half_a_step(
    rows: int, width: int, dtype: torch.dtype, size: float, seed: int
) -> None:
    weight = (torch.randn((rows, width), generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    qweight, scale, zero_point = reference.quantize_weight(weight)
    assert qweight.abs().max() <= 127 and not zero_point.any() and (scale > 0).all()
    back = reference.dequantize(qweight, scale, zero_point, width)
    assert ((back - weight.float()).abs() <= scale.unsqueeze(1) * 0.5001).all()


def test_16_bit_weights_quantise_as_their_exact_float32_values() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        weight = torch.randn(9, 33).to(dtype)
        for got, expected in zip(
            reference.quantize_weight(weight), reference.quantize_weight(weight.float()), strict=True
        ):
            assert torch.equal(got, expected)


def test_halves_round_to_even_and_zero_rows_keep_the_smallest_scale() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6])
    qweight, scale, _ = reference.quantize_weight(weight, pack_k=1)
    assert qweight.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert scale.tolist() == [1.0, pytest.approx(1e-8)]


def test_dequantise_honours_zero_points_and_drops_padding() -> None:
    qweight = torch.tensor([[1, 2, 0], [-3, 4, 0]], dtype=torch.int8)
    scale, zero_point = torch.tensor([0.5, 2.0]), torch.tensor([1.0, -0.5])
    weight = reference.dequantize(qweight, scale, zero_point, 2, torch.bfloat16)
    assert weight.dtype == torch.bfloat16 and weight.tolist() == [[0.0, 0.5], [-5.0, 9.0]]


@given(cases())
def test_the_reference_obeys_its_own_rule(case: Case) -> None:
    inputs = case.build("cpu")
    assert_accurate(reference.int8_linear(*inputs), inputs)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (torch.zeros(2, 2, dtype=torch.float64), TypeError, "weight must be float32"),
        (torch.zeros(2, 2, dtype=torch.int8), TypeError, "weight must be float32"),
        (torch.zeros(4), ValueError, r"weight must be \[out, in\]"),
        (torch.tensor([[1.0, float("nan")]]), ValueError, "NaN or Inf"),
        (torch.tensor([[1.0, float("-inf")]]), ValueError, "NaN or Inf"),
    ],
)
def test_weights_that_cannot_be_quantised(weight: torch.Tensor, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        reference.quantize_weight(weight)


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
WRONG: list[tuple[str, Change, type, str]] = [
    ("x double", lambda a: {"x": a["x"].double()}, TypeError, "x must be float16"),
    ("x scalar", lambda a: {"x": a["x"][0, 0]}, ValueError, "x must be"),
    ("x too wide", lambda a: {"x": torch.zeros(2, 65)}, ValueError, "x has 65 input features"),
    ("x elsewhere", lambda a: {"x": a["x"].to("meta")}, ValueError, "x is on meta but qweight is on cpu"),
    ("qweight float", lambda a: {"qweight": a["qweight"].float()}, TypeError, "qweight must be int8"),
    ("qweight 1-D", lambda a: {"qweight": a["qweight"][0]}, ValueError, "qweight must be"),
    ("qweight 0-D", lambda a: {"qweight": a["qweight"][0, 0]}, ValueError, "qweight must be"),
    ("scale half", lambda a: {"scale": a["scale"].half()}, TypeError, "scale must be float32"),
    ("scale short", lambda a: {"scale": a["scale"][1:]}, ValueError, "scale must have shape"),
    ("scale column", lambda a: {"scale": a["scale"][:, None]}, ValueError, "scale must have shape"),
    (
        "zero_point int",
        lambda a: {"zero_point": a["zero_point"].int()},
        TypeError,
        "zero_point must be float32",
    ),
    ("zero_point long", lambda a: {"zero_point": torch.zeros(6)}, ValueError, "zero_point must have shape"),
    ("bias half", lambda a: {"bias": a["bias"].half()}, TypeError, "bias must be float32"),
    ("bias scalar", lambda a: {"bias": a["bias"][0]}, ValueError, "bias must have shape"),
    ("bias elsewhere", lambda a: {"bias": a["bias"].to("meta")}, ValueError, "bias is on meta"),
]


@pytest.mark.parametrize("linear", [reference.int8_linear, cpu.int8_linear, dispatch.int8_linear])
@pytest.mark.parametrize(("change", "error", "words"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_arguments_are_named(linear: Callable, change: Change, error: type, words: str) -> None:
    names = ("x", "qweight", "scale", "zero_point", "bias")
    arguments = dict(zip(names, Case((3,), 40, 5, torch.float32).build("cpu"), strict=True))
    linear(**arguments)
    with pytest.raises(error, match=words):
        linear(**{**arguments, **change(arguments)})


@pytest.mark.parametrize(
    ("in_features", "dtype", "error", "words"),
    [
        (65, torch.float32, ValueError, "in_features must lie between 0 and qweight's width 64"),
        (-1, torch.float32, ValueError, "in_features must lie"),
        (40, torch.float64, TypeError, "dtype must be float16"),
    ],
)
def test_wrong_dequantise_arguments(in_features: int, dtype: torch.dtype, error: type, words: str) -> None:
    _, qweight, scale, zero_point, _ = Case((3,), 40, 5, torch.float32).build("cpu")
    with pytest.raises(error, match=words):
        reference.dequantize(qweight, scale, zero_point, in_features, dtype)
