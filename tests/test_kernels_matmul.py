"""int8_matmul, the product of both int8 operands: on the CPU, on CUDA (marker gpu), and interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, INTERPRETED
from matmul_cases import INTERPRETED_TILES, MatmulCase, assert_accurate, matmul_cases, matmul_implementations, tiles_to_try

from squareq_fx.kernels import cpu, dispatch, reference
from squareq_fx.kernels.arguments import ACTIVATIONS
from squareq_fx.kernels.tiles import MatmulTile, Tail

Matmul = Callable[..., torch.Tensor]
each_implementation = pytest.mark.parametrize(("device", "matmul"), matmul_implementations())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LARGEST = 33 if INTERPRETED else 70
WIDE = MatmulCase((20,), 200, 70) if INTERPRETED else MatmulCase((40,), 300, 100)
"""Several tiles of every size, split ones among them, and a ragged last one each way."""


def on_the_cpu(arguments: tuple) -> tuple:
    return tuple(value.cpu() if isinstance(value, torch.Tensor) else value for value in arguments)


@each_implementation
@given(case=matmul_cases(LARGEST))
def test_shapes_dtypes_epilogues_parts_zero_points_padding_and_strides(device: str, matmul: Matmul, case: MatmulCase) -> None:
    arguments = case.build(device)
    assert_accurate(matmul(*arguments), arguments)


@each_implementation
@given(case=matmul_cases(LARGEST))
def test_without_an_epilogue_it_is_the_reference_bit_for_bit(device: str, matmul: Matmul, case: MatmulCase) -> None:
    """Sums of integers, which float32 holds here, one product and one rounding: nothing may differ."""
    arguments = case.bare().build(device)
    assert torch.equal(matmul(*arguments).cpu(), reference.int8_matmul(*on_the_cpu(arguments)))


@each_implementation
@pytest.mark.parametrize("zero_points", (False, True))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_dtype
def test_every_epilogue_over_several_tiles(
    device: str, matmul: Matmul, dtype: torch.dtype, activation: str, zero_points: bool
) -> None:
    case = replace(WIDE, dtype=dtype, activation=activation, addend=True, zero_points=zero_points)
    arguments = case.build(device)
    assert_accurate(matmul(*arguments), arguments)


@each_implementation
@pytest.mark.parametrize("outer", (32, 33))
@pytest.mark.parametrize("parts", (1, 2, 3))
def test_parts_are_layers_on_their_own(device: str, matmul: Matmul, parts: int, outer: int) -> None:
    """Bit for bit: in which tile a column lies changes nothing."""
    xq, sx, *layer, bias, dtype, activation, _, _ = MatmulCase(
        (2, 9), 100, outer, torch.bfloat16, parts, "silu", zero_points=True
    ).build(device)
    whole = matmul(xq, sx, *layer, bias, dtype, activation, None, parts)
    for i, part in enumerate(whole if parts > 1 else [whole]):
        rows = slice(i * outer, (i + 1) * outer)
        own = matmul(xq, sx, *(tensor[rows] for tensor in layer), bias[rows], dtype, activation, None, 1)
        assert torch.equal(part, own)


@each_implementation
@pytest.mark.parametrize("inner", (1, 64, 1000))
def test_with_scales_of_one_it_is_the_product_of_integers(device: str, matmul: Matmul, inner: int) -> None:
    """Every sum below 2^24 is a float32; the largest here are 1000 * 127 * 127."""
    generator = torch.Generator().manual_seed(inner)
    x, q = (torch.randint(-127, 128, (n, inner), generator=generator, dtype=torch.int8) for n in (17, 40))
    x[0], x[1], q[0], q[1] = 127, -127, 127, -127
    one = torch.ones(40, 2)
    y = matmul(*(t.to(device) for t in (x, one[:17], q, one[:, 0], 0 * one[:, 0])), None, torch.float32, "none", None, 1)
    assert torch.equal(y.cpu(), (x.long() @ q.long().t()).float())


@each_implementation
def test_sums_that_float32_does_not_hold_are_rounded_once(device: str, matmul: Matmul) -> None:
    """Added up in float32, these would lose their last bits one by one."""
    inner = 2300
    x = torch.full((3, inner), 127, dtype=torch.int8)
    q = torch.full((5, inner), 127, dtype=torch.int8) - torch.arange(5, dtype=torch.int8)[:, None]
    x[:, ::7] = 126
    one = torch.ones(5, 2)
    y = matmul(*(t.to(device) for t in (x, one[:3], q, one[:, 0], 0 * one[:, 0])), None, torch.float32, "none", None, 1)
    exact = x.long() @ q.long().t()
    assert exact.max() > 2**24 and torch.equal(y.cpu(), exact.float())


@each_implementation
@each_dtype
def test_five_runs_return_the_same_bits(device: str, matmul: Matmul, dtype: torch.dtype) -> None:
    arguments = replace(WIDE, dtype=dtype, activation="gelu", addend=True, zero_points=True).build(device)
    first = matmul(*arguments)
    assert first.isfinite().all()
    assert all(torch.equal(matmul(*arguments), first) for _ in range(4))


@each_implementation
@pytest.mark.parametrize("layout", ("transposed", "sliced", "strided"))
def test_strides_do_not_change_the_result(device: str, matmul: Matmul, layout: str) -> None:
    case = MatmulCase((2, 3, 4), 48, 9, torch.float16, activation="gelu_tanh", addend=True, zero_points=True)
    views, copies = replace(case, layout=layout).build(device), case.build(device)
    assert torch.equal(views[0], copies[0]) and not views[0].is_contiguous() and not views[8].is_contiguous()
    assert torch.equal(matmul(*views), matmul(*copies))


@each_implementation
def test_every_argument_may_be_a_view(device: str, matmul: Matmul) -> None:
    x, sx, q, scale, zero, bias, *rest = MatmulCase((6,), 32, 12, zero_points=True, pack_k=16).build(device)
    views = (x[::2], sx[::2], q[::2], scale[::2], zero[::2], bias[::2])
    assert torch.equal(matmul(*views, *rest), matmul(*(view.contiguous() for view in views), *rest))
    columns = q.t().contiguous().t()
    assert torch.equal(matmul(x, sx, columns, scale, zero, bias, *rest), matmul(x, sx, q, scale, zero, bias, *rest))
    same_rows, same = x[:1].expand(6, 32), sx[:1].expand(6, 2)
    y = matmul(same_rows, same, q, scale, zero, bias, *rest)
    assert torch.equal(y, matmul(same_rows.contiguous(), same.contiguous(), q, scale, zero, bias, *rest))
    apart = sx.repeat_interleave(2, dim=-1)[:, ::2]
    assert torch.equal(matmul(x, apart, q, scale, zero, bias, *rest), matmul(x, sx, q, scale, zero, bias, *rest))
    one_row = x[:1].as_strided((1, 32), (0, 1))  # the stride of a single row may be anything
    assert torch.equal(matmul(one_row, sx[:1], q, scale, zero, bias, *rest), y[:1])


@each_implementation
@pytest.mark.parametrize("parts", (1, 3))
@pytest.mark.parametrize("rows", ((0,), (2, 0), (0, 3)))
def test_an_empty_batch_gives_an_empty_result(device: str, matmul: Matmul, rows: tuple[int, ...], parts: int) -> None:
    arguments = MatmulCase(rows, 20, 6, torch.bfloat16, parts).build(device)
    assert_accurate(matmul(*arguments), arguments)


@each_implementation
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_degenerate_widths(device: str, matmul: Matmul, activation: str) -> None:
    arguments = MatmulCase((3,), 0, 6, activation=activation, addend=True).build(device)
    expected = reference.activate(arguments[5].cpu().expand(3, 6), activation) + arguments[8].cpu()
    torch.testing.assert_close(matmul(*arguments).cpu(), expected, rtol=1e-6, atol=1e-6)
    assert matmul(*MatmulCase((3,), 8, 0, activation=activation).build(device)).shape == (3, 0)
    assert matmul(*MatmulCase((), 8, 5, activation=activation).build(device)).shape == (5,)


@each_implementation
def test_a_step_that_is_not_finite_stays_in_its_row(device: str, matmul: Matmul) -> None:
    arguments = MatmulCase((20,), 100, 40, activation="gelu").build(device)
    arguments[1][3, 0] = float("nan")
    bad = matmul(*arguments).isnan()
    assert bad[3].all() and not bad[:3].any() and not bad[4:].any()


if INTERPRETED:

    @given(case=matmul_cases(LARGEST), tile=st.sampled_from(INTERPRETED_TILES))
    def test_no_tile_changes_a_bit(case: MatmulCase, tile: MatmulTile) -> None:
        from squareq_fx.kernels.int8_matmul import int8_matmul

        arguments = case.build("cpu")
        assert torch.equal(int8_matmul(*arguments, tile=tile), int8_matmul(*arguments))

    @pytest.mark.parametrize("zero_points", (False, True))
    def test_tiles_at_the_end_are_split_and_their_counters_return_to_zero(zero_points: bool) -> None:
        from squareq_fx.kernels import counters, int8_matmul

        arguments = MatmulCase((20,), 260, 70, zero_points=zero_points).build("cpu")
        tile = int8_matmul._INTERPRETER_TILE
        assert int8_matmul._schedule(20, 70, 260, tile, torch.device("cpu")) == (4, 2, 2, 4, Tail.DEPTH)
        assert torch.equal(int8_matmul.int8_matmul(*arguments), cpu.int8_matmul(*arguments))
        assert not counters.counters(torch.device("cpu")).any()

    @pytest.mark.parametrize("zero_points", (False, True))
    @pytest.mark.parametrize(("rows", "whole", "tail"), ((96, 16, 2), (86, 16, 2), (70, 16, 2), (32, 4, 2), (20, 4, 2)))
    def test_tiles_at_the_end_are_cut_into_halves(rows: int, whole: int, tail: int, zero_points: bool) -> None:
        """The second half full, ragged, or past the last row."""
        from squareq_fx.kernels import int8_matmul

        tile = MatmulTile(32, 16, 32, 4, 1, 1, Tail.ROWS)
        arguments = MatmulCase((rows,), 70, 90, zero_points=zero_points).build("cpu")
        assert int8_matmul._schedule(rows, 90, 70, tile, torch.device("cpu")) == (whole, tail, 2, 4, Tail.ROWS)
        assert torch.equal(int8_matmul.int8_matmul(*arguments, tile=tile), cpu.int8_matmul(*arguments))

    @pytest.mark.parametrize("tail", Tail)
    @pytest.mark.parametrize("group", (1, 2, 3, 100, -1, -2, -4, -100))
    def test_every_order_of_the_tiles_takes_each_once(group: int, tail: Tail) -> None:
        """Seven blocks of rows and six of columns: bands that fit, that leave a rest, and one band of all."""
        from squareq_fx.kernels import int8_matmul

        arguments = MatmulCase((100,), 70, 90, zero_points=True).build("cpu")
        tile = MatmulTile(16, 16, 32, 4, 1, 1, tail, group)
        assert torch.equal(int8_matmul.int8_matmul(*arguments, tile=tile), cpu.int8_matmul(*arguments))

    def test_a_tile_for_hopper_is_another_where_its_kernel_does_not_run() -> None:
        from squareq_fx.kernels import int8_matmul

        arguments = MatmulCase((5,), 70, 90, zero_points=True).build("cpu")
        tile = MatmulTile(256, 128, 128, 4, 4, 1, Tail.ROWS, fetching=True)
        assert torch.equal(int8_matmul.int8_matmul(*arguments, tile=tile), cpu.int8_matmul(*arguments))

    def test_without_counters_no_tile_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
        from squareq_fx.kernels import int8_matmul

        arguments = MatmulCase((20,), 260, 70).build("cpu")
        split = int8_matmul.int8_matmul(*arguments)
        monkeypatch.setattr(int8_matmul, "counters", lambda device: None)
        assert torch.equal(int8_matmul.int8_matmul(*arguments), split)


def _wrong() -> list[object]:
    def case(name: str, change: Callable[[dict], dict], error: type[Exception], words: str) -> object:
        return pytest.param(change, error, words, id=name)

    return [
        case("xq float", lambda a: {"xq": a["xq"].float()}, TypeError, "xq must be int8, got torch.float32; quantize_rows"),
        case("sx half", lambda a: {"sx": a["sx"].half()}, TypeError, "sx must be float32"),
        case("sx short", lambda a: {"sx": a["sx"][1:]}, ValueError, "sx must have step and sum of each row of xq"),
        case("sx steps", lambda a: {"sx": a["sx"][:, 0]}, ValueError, "sx must have step and sum of each row"),
        case("xq scalar", lambda a: {"xq": a["xq"][0, 0]}, ValueError, "sx must have step and sum"),
        case("xq wide", lambda a: {"xq": torch.zeros(3, 65, dtype=torch.int8)}, ValueError, "xq has 65 columns"),
        case("qweight float", lambda a: {"qweight": a["qweight"].float()}, TypeError, "qweight must be int8"),
        case("qweight 1-D", lambda a: {"qweight": a["qweight"][0]}, ValueError, "qweight must be"),
        case("qweight 0-D", lambda a: {"qweight": a["qweight"][0, 0]}, ValueError, "qweight must be"),
        case("scale short", lambda a: {"scale": a["scale"][1:]}, ValueError, "scale must have shape"),
        case("zero_point int", lambda a: {"zero_point": a["zero_point"].int()}, TypeError, "zero_point must be float32"),
        case("bias half", lambda a: {"bias": a["bias"].half()}, TypeError, "bias must be float32"),
        case("bias short", lambda a: {"bias": a["bias"][1:]}, ValueError, "bias must have shape"),
        case("dtype", lambda a: {"dtype": torch.float64}, TypeError, "dtype must be float16, bfloat16 or float32"),
        case("activation", lambda a: {"activation": "relu"}, ValueError, "activation must be one of none, gelu.* got 'relu'"),
        case("parts", lambda a: {"parts": 4}, ValueError, r"qweight \(6, 64\) cannot be 4 layers"),
        case("no parts", lambda a: {"parts": 0}, ValueError, "cannot be 0 layers"),
        case("addend shape", lambda a: {"addend": torch.zeros(3, 5)}, ValueError, r"addend must be \(3, 6\)"),
        case("addend dtype", lambda a: {"addend": torch.zeros(3, 6).half()}, ValueError, "addend must be .* torch.float32"),
        case("addend and parts", lambda a: {"addend": torch.zeros(3, 6), "parts": 2}, ValueError, "addend must be .* one part"),
        case("xq elsewhere", lambda a: {"xq": a["xq"].to("meta")}, ValueError, "xq is on meta but sx is on cpu"),
        case("addend elsewhere", lambda a: {"addend": torch.zeros(3, 6, device="meta")}, ValueError, "addend is on meta"),
        case("bias elsewhere", lambda a: {"bias": a["bias"].to("meta")}, ValueError, "bias is on meta"),
    ]


NAMES = ("xq", "sx", "qweight", "scale", "zero_point", "bias", "dtype", "activation", "addend", "parts")


@pytest.mark.parametrize("matmul", [reference.int8_matmul, cpu.int8_matmul, dispatch.int8_matmul])
@pytest.mark.parametrize(("change", "error", "words"), _wrong())
def test_wrong_arguments_are_named(matmul: Matmul, change: Callable[[dict], dict], error: type[Exception], words: str) -> None:
    arguments = dict(zip(NAMES, MatmulCase((3,), 40, 6).build("cpu"), strict=True))
    with pytest.raises(error, match=words):
        matmul(**{**arguments, **change(arguments)})


if not INTERPRETED:

    @given(case=matmul_cases())
    def test_the_reference_obeys_the_rule(case: MatmulCase) -> None:
        arguments = case.build("cpu")
        assert_accurate(reference.int8_matmul(*arguments), arguments)

    def test_processors_whose_int8_product_overflows_get_an_exact_one() -> None:
        """oneDNN without VNNI adds pairs of products in 16 bits; what torch's product does there must not come through."""
        code = (
            "import torch\nfrom squareq_fx.kernels import cpu\n"
            "x, q = torch.full((9, 2100), 127, dtype=torch.int8), torch.full((7, 2100), -127, dtype=torch.int8)\n"
            "x[::2] = -127\n"
            "one = torch.ones(9)\n"
            "y = cpu.int8_matmul(x, torch.ones(9, 2), q, one[:7], 0 * one[:7], None, torch.float32)\n"
            "assert torch.equal(y, (x.long() @ q.long().t()).float()), y\n"
        )
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("inner", (1, 1024, 1025, 3000))
    def test_the_other_exact_product(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu, "_int_mm_is_exact", lambda: False)
        a, b = torch.full((3, inner), -128, dtype=torch.int8), torch.full((2, inner), -128, dtype=torch.int8)
        b[1, ::2] = 127
        assert torch.equal(cpu._int_product(a, b).long(), a.long() @ b.long().t())


@pytest.mark.gpu
@pytest.mark.parametrize("zero_points", (False, True))
@pytest.mark.parametrize("shape", [(300, 520, 2048), (2304, 2304, 2048), (4000, 3072, 4104), (20, 3072, 3072)])
def test_every_tile_gives_the_same_exact_bits_at_a_model_s_size(shape: tuple[int, int, int], zero_points: bool) -> None:
    """Races show only at sizes that fill the card: whole tiles, split ones, and both in one launch."""
    from squareq_fx.kernels.int8_matmul import int8_matmul

    rows, width, inner = shape
    generator = torch.Generator("cuda").manual_seed(0)
    x, q = (torch.randint(-127, 128, (n, inner), generator=generator, device="cuda", dtype=torch.int8) for n in (rows, width))
    step, scale = (torch.rand(n, generator=generator, device="cuda") + 0.5 for n in (rows, width))
    sx = torch.stack((step, x.sum(1).float()), 1)
    zero = torch.zeros_like(scale)
    if zero_points:
        zero[width // 2 :: 5] = 3.0
    y = ((x.double() @ q.double().t()).float() - sx[:, 1:] * zero) * (sx[:, :1] * scale)
    for tile in tiles_to_try(rows, width, inner, torch.float32, x.device):
        for _ in range(3):
            assert torch.equal(int8_matmul(x, sx, q, scale, zero, None, torch.float32, tile=tile), y), tile
    unaligned = torch.empty(rows, inner + 3, dtype=torch.int8, device="cuda")[:, 3:].copy_(x)
    expected = int8_matmul(x, sx, q, scale, zero, None, torch.bfloat16)
    assert torch.equal(int8_matmul(unaligned, sx, q, scale, zero, None, torch.bfloat16), expected), "pointers and descriptors"


@pytest.mark.gpu
def test_a_graph_may_be_replayed_beside_launches_on_another_stream() -> None:
    """Split tiles count in memory that launches of one stream share; every launch must leave it zero."""
    from squareq_fx.kernels import int8_matmul

    tile = MatmulTile(128, 128, 128, 4, 3, 2, Tail.DEPTH)
    arguments = MatmulCase((300,), 4096, 520, torch.bfloat16, bias=False).build("cuda")
    assert int8_matmul._schedule(300, 520, 4096, tile, arguments[0].device)[2] > 1

    def run() -> torch.Tensor:
        return int8_matmul.int8_matmul(*arguments, tile=tile)

    expected = run()
    assert torch.equal(expected.cpu(), cpu.int8_matmul(*on_the_cpu(arguments)))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(20):
        graph.replay()
        with torch.cuda.stream(stream):
            beside = run()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected) and torch.equal(beside, expected)
