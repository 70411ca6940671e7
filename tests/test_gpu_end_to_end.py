"""Compiled modules on a card: all families stream, in every dtype, with the bits of the resident module."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from backbones import FAMILIES, backbone, calls
from models import dequantized, make_slab
from torch.utils import _pytree as pytree

import squareq_fx
from squareq_fx.emit import emit
from squareq_fx.ir import program

pytestmark = pytest.mark.gpu
# Two roundings of a value the size of the output: what a 16-bit model and its compiled twin may differ by, in relative L2.
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def on_card(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The call's tensors on the card; latents and embeddings in the model's dtype, times and positions as they are."""
    keep = ("timestep", "guidance", "img_ids", "txt_ids")

    def move(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        kept = any(name in pytree.keystr(path) for name in keep) or not leaf.is_floating_point()
        return leaf.to("cuda") if kept else leaf.to("cuda", dtype)

    return pytree.tree_map_with_path(move, inputs)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_streamed_equals_resident_and_the_dequantised_model(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default: float32 convolutions of 10 bits
    model = copy.deepcopy(backbone(family)).to("cuda", dtype)
    slab = make_slab(model)
    reference = dequantized(model, slab).to("cuda")
    captured = squareq_fx.capture(model, slab=slab)
    two, three = (
        squareq_fx.run(captured, squareq_fx.default_passes(slab, slots=slots, distance=slots - 1)) for slots in (2, 3)
    )
    quantized = next(stage.graph for stage in program(two).history if stage.name == "quantize")
    modules = {
        "resident": emit(two, model, slab, backing="resident"),
        "host": emit(two, model, slab),
        "disk": emit(three, model, slab, backing="disk"),
        "quantize": emit(quantized, model, slab),
    }
    for batch, height, width in ((1, 3, 5), (2, 4, 4), (1, 5, 6)):
        inputs = on_card(calls(family, batch, height, width), dtype)
        with torch.no_grad():
            expected = reference(**inputs, return_dict=False)[0]
            outputs = {name: gm(**inputs, return_dict=False)[0] for name, gm in modules.items()}
        different = [name for name, output in outputs.items() if not torch.equal(outputs["resident"], output)]
        assert not different, f"batch {batch}, {height} x {width}"
        assert relative(outputs["host"], expected) <= LIMITS[dtype]
    for name in ("host", "disk"):
        report = modules[name].last_step
        assert report is not None and 0 < report.peak_bytes_in_use <= report.arena_bytes
        assert report.prefetch_misses <= 1 and report.loads == report.evictions
        modules[name].shutdown()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_runs_on_the_card(family: str) -> None:
    model = copy.deepcopy(backbone(family)).to("cuda", torch.bfloat16)
    slab = make_slab(model)
    gm = squareq_fx.compile(model, slab)
    # Chroma's forward makes a list of the batch's length, PixArt's a position table of the sample's size: both are static.
    batch, height, width = {"chroma": (1, 3, 5), "pixart": (2, 8, 8)}.get(family, (2, 3, 5))
    inputs = on_card(calls(family, batch, height, width), torch.bfloat16)
    with torch.no_grad():
        got, want = gm(**inputs, return_dict=False)[0], model(**inputs, return_dict=False)[0]
    assert torch.cosine_similarity(got.flatten().double(), want.flatten().double(), 0) > 0.999


def test_fifty_steps_keep_their_bits_and_their_memory() -> None:
    model = copy.deepcopy(backbone("flux")).to("cuda", torch.bfloat16)
    gm = squareq_fx.compile(model, make_slab(model))
    inputs = on_card(calls("flux", 2), torch.bfloat16)
    with torch.no_grad():
        first = gm(**inputs, return_dict=False)[0]
        torch.cuda.synchronize()
        peaks = []
        for _ in range(50):
            torch.cuda.reset_peak_memory_stats()
            assert torch.equal(gm(**inputs, return_dict=False)[0], first)
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated())
    assert max(peaks) <= 1.02 * peaks[1]


def test_the_card_holds_the_arena_and_nothing_else_of_the_weights() -> None:
    model = copy.deepcopy(backbone("flux"))
    slab = make_slab(model)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    gm = squareq_fx.compile(model, slab, device="cuda")
    inputs = on_card(calls("flux", 1), torch.float32)
    with torch.no_grad():
        gm(**inputs)
    torch.cuda.synchronize()
    del inputs
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # 32 MiB that stay with the process after its first product
    assert gm.last_step is not None
    assert torch.cuda.memory_allocated() - before <= gm.last_step.arena_bytes + 2**20
    gm.shutdown()
