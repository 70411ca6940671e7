"""SDXL's UNet and Flux.1-dev at full size: the whole way from `meta` model to emitted module, without the gigabytes.

The slab has the exact layout of the real one but is a sparse file, so that everything but the numbers is as it would be.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from full_size import flux_dev, sdxl_unet, sparse_slab
from torch import fx, nn

import squareq_fx
from squareq_fx import CompiledModule, Lora, Slab, ops
from squareq_fx.ir import adapter_inputs, functions, info, program
from squareq_fx.passes import Adapt

pytestmark = pytest.mark.slow

MAX_SECONDS = 40.0


@dataclass(frozen=True)
class Bounds:
    """What the issue asks of one model."""

    layers: int
    unique_functions: int
    top_level_nodes: int
    attention: dict[str, int]
    """Leaf names of the attention layers, and how many there are of each."""
    call: Callable[[int], dict[str, object]]
    """What it is called with at so many pixels a side, on `meta`."""
    widest: Callable[[int], int]
    """Bytes of one activation of the blocks that have most."""


_SDXL = dict.fromkeys(("to_q", "to_k", "to_v", "to_out.0"), 140)
_FLUX = dict.fromkeys(("to_q", "to_k", "to_v"), 57)
_FLUX |= dict.fromkeys(("to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), 19)


def _of_sdxl(side: int) -> dict[str, object]:
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    added = {"text_embeds": torch.empty(1, 1280, **kind), "time_ids": torch.empty(1, 6, **kind)}
    sample, text = torch.empty(1, 4, side // 8, side // 8, **kind), torch.empty(1, 77, 2048, **kind)
    return {"sample": sample, "timestep": 500, "encoder_hidden_states": text, "added_cond_kwargs": added}


def _of_flux(side: int) -> dict[str, object]:
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    tokens = (side // 16) ** 2
    return {
        "hidden_states": torch.empty(1, tokens, 64, **kind),
        "encoder_hidden_states": torch.empty(1, 512, 4096, **kind),
        "pooled_projections": torch.empty(1, 768, **kind),
        "timestep": torch.empty(1, device="meta"),
        "guidance": torch.empty(1, device="meta"),
        "img_ids": torch.empty(tokens, 3, device="meta"),
        "txt_ids": torch.empty(512, 3, device="meta"),
    }


BOUNDS = {
    "sdxl": Bounds(743, 20, 150, _SDXL, _of_sdxl, lambda side: (side // 16) ** 2 * 640 * 2),
    "flux": Bounds(504, 8, 200, _FLUX, _of_flux, lambda side: ((side // 16) ** 2 + 512) * 3072 * 2),
}
MODELS = {"sdxl": sdxl_unet, "flux": flux_dev}


@dataclass(frozen=True)
class Compiled:
    """A compiled full-size model; `cpu` and `wall` are the seconds that `squareq_fx.compile` took."""

    bounds: Bounds
    model: nn.Module
    slab: Slab
    module: CompiledModule
    cpu: float
    wall: float

    def after(self, name: str) -> fx.GraphModule:
        """The graph as the pass `name` left it."""
        return next(stage.graph for stage in self.module.history if stage.name == name)


@pytest.fixture(scope="module", params=MODELS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    name = request.param
    model = MODELS[name]()
    with sparse_slab(model, Path(tmp_path_factory.mktemp(name)) / "int8") as slab:
        module, cpu, wall = _compile(model, slab)
        yield Compiled(BOUNDS[name], model, slab, module, cpu, wall)
        module.shutdown()


def _compile(model: nn.Module, slab: Slab) -> tuple[CompiledModule, float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    module = squareq_fx.compile(model, slab)
    return module, time.process_time() - cpu, time.perf_counter() - wall


def test_every_slab_layer_is_one_int8_node(compiled: Compiled) -> None:
    flat = compiled.after("quantize")
    layers = [info(node).layer for node in flat.graph.nodes if node.target is ops.int8_linear]
    assert len(compiled.slab.layers) == compiled.bounds.layers
    assert sorted(map(str, layers)) == sorted(compiled.slab.layers)


def test_no_float_linear_reads_a_weight_of_the_slab(compiled: Compiled) -> None:
    for name in ("quantize", "outline", "stream", "schedule"):
        graph = compiled.after(name)
        for part in (graph, *functions(graph).values()):
            for node in part.graph.nodes:
                if node.target is torch.ops.aten.linear.default:
                    key = str(info(node.args[1]).key)
                    assert key.removesuffix(".weight") not in compiled.slab.layers


def test_few_unique_functions_and_a_top_level_that_fits_a_screen(compiled: Compiled) -> None:
    """Counted after `outline`, before loads and evicts come in. The inputs that are weights do not count: there are two to five
    for each layer until `stream` folds them into one buffer a block; the model's own inputs, sizes, calls and the output do.
    """
    outlined = compiled.after("outline")
    calls = [node for node in outlined.graph.nodes if node.op == "call_module"]
    nodes = [node for node in outlined.graph.nodes if info(node).kind != "weight"]
    print(f"{len(functions(outlined))} functions, {len(calls)} calls, {len(nodes)} top-level nodes")
    assert len(functions(outlined)) <= compiled.bounds.unique_functions
    assert len(nodes) <= compiled.bounds.top_level_nodes
    assert len(calls) > len(compiled.slab.block_paths)  # the blocks, and what runs before, between and after them


def test_attention_is_every_layer_of_the_attention_modules(compiled: Compiled) -> None:
    """SDXL: 70 blocks, attn1 and attn2, four layers each, so 560."""
    adapted = Adapt(Lora(targets="attention"))(compiled.after("quantize"))
    layers = [key.removesuffix(".lora_A.weight") for key in adapter_inputs(adapted) if key.endswith(".lora_A.weight")]
    assert len(layers) == len(set(layers)) == sum(compiled.bounds.attention.values())
    assert Counter(re.split(r"\.attn[12]?\.", layer)[1] for layer in layers) == compiled.bounds.attention


def test_every_streamed_segment_is_one_range_of_the_slab_file(compiled: Compiled) -> None:
    segments = compiled.module.runtime.store.segments
    assert set(segments) == set(program(compiled.module).segments)
    assert set(compiled.slab.block_paths) <= set(segments)
    scattered = [name for name, segment in segments.items() if segment.data_offset is None]
    assert scattered == []


def test_every_weight_of_the_slab_is_streamed_once(compiled: Compiled) -> None:
    """No byte but the file's alignment and tensors the forward never reads is missing from the segments, and none is twice."""
    record = program(compiled.module)
    keys = [packed.key for segment in record.segments.values() for packed in segment]
    assert len(keys) == len(set(keys))
    needed = {key for layer in compiled.slab.layers.values() for key in layer.keys}
    assert needed <= set(keys)
    loads = [node for node in compiled.module.graph.nodes if node.target is ops.load]
    evicts = [node for node in compiled.module.graph.nodes if node.target is ops.evict]
    assert len(loads) == len(evicts) == len(record.segments)


@pytest.mark.parametrize("side", (1024, 512))
def test_memory_is_forecast_in_seconds(compiled: Compiled, side: int) -> None:
    start = time.perf_counter()
    found = squareq_fx.forecast(compiled.module, compiled.bounds.call(side))
    print(f"{side}x{side} in {time.perf_counter() - start:.1f} s: {found}")
    assert time.perf_counter() - start < 15.0
    assert compiled.module.runtime is not None and found.arena == compiled.module.runtime.arena_bytes
    assert 8 * compiled.bounds.widest(side) < found.activations < 32 * compiled.bounds.widest(side)
    assert "transformer_blocks_" in found.at[0] and f"B at {found.at[0]} ({found.at[1]}): arena " in str(found)


def test_compiles_in_forty_seconds(compiled: Compiled) -> None:
    """CPU time of the process: other tests run beside this one. A first value above is measured again, because the time
    of one core depends on what its sibling does.
    """
    print(f"compile: {compiled.wall:.1f} s, of CPU time {compiled.cpu:.1f} s")
    cpu = compiled.cpu
    if cpu > MAX_SECONDS:
        module, cpu, wall = _compile(compiled.model, compiled.slab)
        module.shutdown()
        print(f"again: {wall:.1f} s, of CPU time {cpu:.1f} s")
    assert cpu <= MAX_SECONDS
