"""Every Triton kernel compiles for cards that need not be there, Hopper and Ampere, to the instructions it was written for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from kernel_cases import INTERPRETED  # noqa: E402

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from squareq_fx.kernels import dequantize_rows, int8_gemv, int8_linear, int8_linear_few, int8_matmul, quantize_rows, tiles  # noqa: E402
from squareq_fx.kernels.tiles import FusedTile, MatmulTile, Tail  # noqa: E402

NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HOPPER, AMPERE = 90, 80
SHARED = {HOPPER: 227 * 1024, AMPERE: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that one program may have."""
POINTERS = {
    "q_ptr": "*i8",
    "sx_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "zero_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "s_ptr": "*fp32",
    "counter_ptr": "*i32",
}
NOT_SPECIALISED = {"M", "split", "whole", "tail", "group"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, object],
    warps: int,
    stages: int = 3,
    target: int = HOPPER,
    make: Any = ASTSource,
) -> Any:
    """What Triton makes of a kernel whose sizes are multiples of 16, as models' are."""
    names = kernel.arg_names
    given = {**POINTERS, **types}
    signature = {name: "constexpr" if name in constants else given.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in NOT_SPECIALISED and signature[name] != "constexpr" and not signature[name].startswith("tensordesc")
    }
    source = make(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    assert made.metadata.shared <= SHARED[target]
    return made


def fused(dtype: str, tile: FusedTile, target: int, even: bool = True, bias: bool = True) -> Any:
    types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "partial_ptr": "*fp32"}
    constants = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "EVEN_K": even, "WIDEN": False}
    if not bias:
        constants["bias_ptr"] = None
    if tile.pieces > 1:
        constants["PIECES"] = tile.pieces
        return compiled(int8_linear_few._int8_linear_few, types, constants, tile.warps, tile.stages, target)
    constants["SPLITS"] = tile.split > 1
    if tile.split == 1:
        constants |= {"partial_ptr": None, "counter_ptr": None}
    return compiled(int8_linear._int8_linear, types, constants, tile.warps, tile.stages, target)


def product(
    dtype: str,
    tile: MatmulTile,
    target: int,
    descriptors: bool,
    even: bool = True,
    activation: str = "none",
    addend: bool = False,
    aligned: bool = True,
    bias: bool = True,
) -> Any:
    types = {"a": "*i8", "b": "*i8", "x_ptr": "*i8", "y_ptr": f"*{dtype}", "addend_ptr": f"*{dtype}", "partial_ptr": "*i32"}
    if descriptors:
        types |= {"a": f"tensordesc<i8[{tile.m}, {tile.k}]>", "b": f"tensordesc<i8[{tile.n}, {tile.k}]>"}
        types["half"] = f"tensordesc<i8[{tile.m // 2}, {tile.k}]>"
    constants = {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "DESCRIPTORS": descriptors,
        "EVEN_K": even,
        "ALIGNED": aligned,
        "ACTIVATION": activation,
        "TAIL": tile.tail.name,
    }
    if not descriptors or tile.tail != Tail.ROWS:
        constants["half"] = None
    if not addend:
        constants["addend_ptr"] = None
    if not bias:
        constants["bias_ptr"] = None
    if tile.tail != Tail.DEPTH:
        constants |= {"partial_ptr": None, "counter_ptr": None}
    return compiled(int8_matmul._int8_matmul, types, constants, tile.warps, tile.stages, target)


each_target = pytest.mark.parametrize(("dtype", "target"), [("bf16", HOPPER), ("fp32", HOPPER), ("fp16", AMPERE)])


@each_target
def test_the_fused_product(dtype: str, target: int) -> None:
    device = torch.device("cpu")  # where every tile counts as fitting
    whole = tiles.candidates("int8_linear", 64, 3072, 3072, NAMES[dtype], device)[0]
    few = tiles.candidates("int8_linear", 16, 3072, 3072, NAMES[dtype], device)
    split = next(t for t in few if isinstance(t, FusedTile) and t.split > 1)
    assert isinstance(whole, FusedTile)
    text = fused(dtype, whole, target).asm["ptx"]
    assert ("wgmma.mma_async" in text) == (target == HOPPER and dtype != "fp32")
    assert ("mma.sync" in text) == (target == AMPERE)
    assert "atom" not in text and "atom" in fused(dtype, split, target, even=False).asm["ptx"]
    fewest = tiles.candidates("int8_linear", 8, 3072, 3072, NAMES[dtype], device)
    assert dtype == "fp32" or all(tile[0] == 8 for tile in fewest)
    for tile in fewest:  # half a tile of x is not too little for the matrix units
        assert dtype == "fp32" or (isinstance(tile, FusedTile) and "mma" in fused(dtype, tile, target).asm["ptx"])


@pytest.mark.parametrize("target", [HOPPER, AMPERE])
@pytest.mark.parametrize("even", [True, False])
def test_the_fused_product_of_few_rows_keeps_its_warps_apart(target: int, even: bool) -> None:
    """Each warp has a piece of the depth: matrix units, loads under way, and no memory in which programs meet."""
    found = tiles.candidates("int8_linear", 8, 3072, 3072, torch.bfloat16, torch.device("cpu"))
    several = [tile for tile in found if isinstance(tile, FusedTile) and tile.pieces > 1]
    assert len(several) == 2
    for tile in several:
        made = fused("bf16", tile, target, even)
        text, layouts = made.asm["ptx"], made.asm["ttgir"]
        assert f"warpsPerCTA = [{tile.pieces}, 1, 1], instrShape = [1, 16, 8]" in layouts
        assert "mma.sync" in text and "wgmma" not in text and "atom" not in text
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", text)
        assert copies and set(copies) == {"0x10"}, "sixteen bytes at a time"


def test_the_int8_product_for_hopper() -> None:
    tile = MatmulTile(128, 128, 128, 4, 3, 2, Tail.DEPTH)
    made = product("bf16", tile, HOPPER, descriptors=True)
    text = made.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in text and "cp.async.bulk.tensor" in text and "atom" in text
    assert 2 * made.metadata.shared <= SHARED[HOPPER], "two programs a multiprocessor"
    halves = product("bf16", tile._replace(tail=Tail.ROWS), HOPPER, descriptors=True)
    assert 2 * halves.metadata.shared <= SHARED[HOPPER] and "atom" not in halves.asm["ptx"]
    assert halves.asm["ptx"].count("wgmma.mma_async") > product("bf16", tile._replace(tail=Tail.WHOLE), HOPPER, True).asm[
        "ptx"
    ].count("wgmma.mma_async")
    pointers = product("fp32", tile._replace(m=64, tail=Tail.WHOLE), HOPPER, descriptors=False, even=False).asm["ptx"]
    assert "wgmma.mma_async" in pointers and "cp.async.bulk.tensor" not in pointers and "atom" not in pointers


@pytest.mark.parametrize("tail", (Tail.WHOLE, Tail.ROWS))
@pytest.mark.parametrize("rows", (128, 256))
@pytest.mark.parametrize(
    ("dtype", "activation", "addend", "aligned", "bias"),
    [("bf16", "none", False, True, False), ("fp16", "gelu_tanh", True, True, True), ("fp32", "none", False, False, True)],
)
def test_the_int8_product_with_warps_that_fetch(
    tail: Tail, rows: int, dtype: str, activation: str, addend: bool, aligned: bool, bias: bool
) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from squareq_fx.kernels import int8_matmul_hopper

    tile = next(t for t in tiles._MATMUL_HOPPER if t.m == rows and t.tail == tail)
    kernel = int8_matmul_hopper._int8_matmul

    def described(rows: int) -> str:
        block = [rows, tile.k]
        return f"tensordesc<i8{block},{gl.NVMMASharedLayout.get_default_for(block, gl.int8)!r}>"

    types = {"a": described(tile.m), "b": described(tile.n), "half": described(tile.m // 2)}
    types |= {"y_ptr": f"*{dtype}", "addend_ptr": f"*{dtype}"}
    constants: dict[str, object] = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "STAGES": tile.stages}
    constants |= {"ALIGNED": aligned, "ACTIVATION": activation, "TAIL": tail.name}
    constants |= {} if tail == Tail.ROWS else {"half": None}
    constants |= {} if addend else {"addend_ptr": None}
    constants |= {} if bias else {"bias_ptr": None}
    made = compiled(kernel, types, constants, tile.warps, make=GluonASTSource)
    text = made.asm["ptx"]
    large, small = (text.count(f"wgmma.mma_async.sync.aligned.m64n{n}k32.s32.s8.s8") for n in (128, 64))
    halves = 8 if tail == Tail.ROWS else 0
    assert (large, small) == ((16 + halves, 0) if rows == 256 else (8, halves)), "two groups, four steps of 32 of the depth"
    assert text.count("cp.async.bulk.tensor") == (4 if tail == Tail.ROWS else 2) and "setmaxnreg" in text
    assert made.metadata.num_warps == 12


@pytest.mark.parametrize("target", [HOPPER, AMPERE])
def test_the_int8_product_of_few_rows(target: int) -> None:
    for tile in tiles._MATMUL_SMALL[:5]:
        made = product("bf16", tile, target, descriptors=target == HOPPER)
        assert "mma.sync" in made.asm["ptx"] and "wgmma" not in made.asm["ptx"], "wgmma takes 64 rows"


def test_the_int8_product_for_ampere() -> None:
    text = product("fp16", MatmulTile(64, 128, 128, 4, 3, 2, Tail.DEPTH), AMPERE, descriptors=False).asm["ptx"]
    assert re.search(r"mma\.sync\.aligned\.m16n8k32\.row\.col\.(satfinite\.)?s32\.s8\.s8\.s32", text) and "atom" in text


@pytest.mark.parametrize("target", [HOPPER, AMPERE])
def test_layers_without_bias(target: int) -> None:
    """A compiler may refuse what it is given for the bias then, which the interpreter does not."""
    few = tiles.candidates("int8_linear", 8, 3072, 3072, torch.bfloat16, torch.device("cpu"))
    for kind in (lambda t: t.pieces > 1, lambda t: t.split > 1, lambda t: t.pieces == t.split == 1):
        tile = next(t for t in few if isinstance(t, FusedTile) and kind(t))
        assert "mma" in fused("bf16", tile, target, bias=False).asm["ptx"]
    for tail in (Tail.WHOLE, Tail.DEPTH):
        made = product("bf16", MatmulTile(64, 64, 128, 4, 3, 2, tail), target, descriptors=target == HOPPER, bias=False)
        assert "mma" in made.asm["ptx"]
    for x_rows, (block_n, block_k, warps, stages) in int8_gemv._TILES.items():
        constants = {"ROWS": x_rows, "BLOCK_N": block_n, "BLOCK_K": block_k, "EVEN_K": True, "STAGES": stages, "bias_ptr": None}
        compiled(int8_gemv._int8_gemv, {"x_ptr": "*bf16", "y_ptr": "*bf16"}, constants, warps, target=target)


@pytest.mark.parametrize(
    ("target", "instruction"), [(86, "mma.sync"), (89, "mma.sync"), (100, "tcgen05.mma"), (120, "mma.sync")]
)
def test_the_products_for_cards_that_people_own(target: int, instruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GeForce RTX 30, 40 and 50, whose programs have less shared memory than those of data centres, and a B200."""
    monkeypatch.setattr(tiles, "processors", lambda device: 84)
    monkeypatch.setattr(tiles, "_shared_memory", lambda device: SHARED[target])
    monkeypatch.setattr(tiles, "_has_hopper_kernel", lambda device: False)
    card, guess = torch.device("cuda", 0), tiles._guess.__wrapped__
    for rows in (2, 16, 128):
        tile = guess("int8_linear", rows, 3072, 3072, torch.bfloat16, card)
        assert isinstance(tile, FusedTile) and "mma" in fused("bf16", tile, target).asm["ptx"]
    for rows in (16, 154, 4096):
        tile = guess("int8_matmul", rows, 1280, 3072, torch.bfloat16, card)
        assert isinstance(tile, MatmulTile)
        text = product("bf16", tile, target, descriptors=target >= HOPPER).asm["ptx"]
        assert (instruction if tile.m >= 128 else "mma") in text


@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh", "silu"))
def test_every_epilogue(activation: str) -> None:
    tile = MatmulTile(64, 64, 128, 4, 3, 0, Tail.WHOLE)
    made = product("bf16", tile, HOPPER, descriptors=True, activation=activation, addend=True, aligned=False)
    assert "wgmma.mma_async" in made.asm["ptx"]


@each_target
def test_the_kernels_bound_by_memory(dtype: str, target: int) -> None:
    types = dict.fromkeys(("x_ptr", "y_ptr", "w_ptr", "b_ptr"), f"*{dtype}")
    rows, columns, warps = dequantize_rows.TILES[NAMES[dtype]]
    block: dict[str, object] = {"BLOCK_N": rows, "BLOCK_K": columns}
    for constants in (block, {**block, "bias_ptr": None, "b_ptr": None}):
        flat = compiled(dequantize_rows._dequantize_rows, types, constants, warps, target=target)
        assert "st.global.v4" in flat.asm["ptx"]
    for x_rows, (block_n, block_k, warps, stages) in int8_gemv._TILES.items():
        constants = {"ROWS": x_rows, "BLOCK_N": block_n, "BLOCK_K": block_k, "EVEN_K": True, "STAGES": stages}
        compiled(int8_gemv._int8_gemv, types, constants, warps, target=target)
    types = {"x_ptr": f"*{dtype}"}
    types |= {"beside_ptr": f"*{dtype}"}
    for columns, first in ((640, None), (3072, None), (15360, None), (15360, 3072)):
        tile = quantize_rows.tile_for(columns, first)
        assert tile is not None and tile.columns * tile.blocks == columns
        constants = {"SMALLEST": 1e-30, "BLOCK_M": tile.rows, "BLOCK_K": tile.columns, "BLOCKS": tile.blocks, "EXCESS": 1}
        constants["FIRST"] = tile.blocks if first is None else first // tile.columns
        kernel = compiled(quantize_rows._quantize_rows, types, constants, tile.warps, target=target)
        assert re.search(r"ld\.global\S*evict_first\S*\.v4", kernel.asm["ptx"]) and "cvt.rzi" not in kernel.asm["ptx"]
    constants = {"SMALLEST": 1e-30, "BLOCK_K": 4096, "EXCESS": 0}
    compiled(quantize_rows._quantize_wide_rows, types, constants, 8, target=target)
