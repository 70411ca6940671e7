"""SDXL and Flux.1-dev, full architecture with random weights, streamed from pinned memory beside bf16 eager.

    python benchmarks/streaming.py --out benchmarks/results/streaming.md            # both models, 1024x1024, batch 1
    python benchmarks/streaming.py --models sdxl --fraction 0.1                      # under a cap of device memory

Needs one CUDA card that holds the bf16 model (24 GB for Flux) for the comparison, and the slab's size in memory and on disk.
For each model, in one process: bf16 eager, INT8 resident, INT8 streamed. The streamed output must equal the resident one bit
for bit, and no streamed step may hold more weights on the device than the arena.
"""

from __future__ import annotations

import argparse
import functools
import gc
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

import squareq_fx
from squareq_fx.emit import emit
from squareq_fx.ir import functions
from squareq_fx.runtime.store import Backing
from squareq_fx.tracing.skeleton import skeleton as make_skeleton

GIB = 2**30
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass
class Row:
    """One line of the table. Times in ms, memory in GiB."""

    model: str
    arm: str
    step_ms: float
    peak: float
    moved: float
    weights: float


def build(name: str) -> torch.nn.Module:
    """The full architecture in bf16 on the card, with random weights of a trained model's size."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device("meta"):
        model = UNet2DConditionModel(**SDXL) if name == "sdxl" else FluxTransformer2DModel(guidance_embeds=True)
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.7 * parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(0.0 if key.endswith("bias") else 1.0)
    return model


def inputs(name: str, batch: int, size: int) -> dict[str, Any]:
    """One denoising step's arguments at `size` x `size` pixels."""
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    latent = size // 8
    if name == "sdxl":
        return {
            "sample": torch.randn(batch, 4, latent, latent, **kind),
            "timestep": torch.tensor(500, device="cuda"),
            "encoder_hidden_states": torch.randn(batch, 77, 2048, **kind),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(batch, 1280, **kind),
                "time_ids": torch.tensor([[size, size, 0, 0, size, size]] * batch, **kind),
            },
        }
    tokens = (latent // 2) ** 2
    ids = torch.zeros(latent // 2, latent // 2, 3, device="cuda")
    ids[..., 1] += torch.arange(latent // 2, device="cuda")[:, None]
    ids[..., 2] += torch.arange(latent // 2, device="cuda")[None]
    return {
        "hidden_states": torch.randn(batch, tokens, 64, **kind),
        "encoder_hidden_states": torch.randn(batch, 512, 4096, **kind),
        "pooled_projections": torch.randn(batch, 768, **kind),
        "timestep": torch.full((batch,), 0.5, device="cuda"),
        "guidance": torch.full((batch,), 3.5, device="cuda"),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(512, 3, device="cuda"),
    }


def measure(step: Callable[[], torch.Tensor], repeats: int) -> tuple[float, float, torch.Tensor]:
    """Median step time in ms, peak device memory in GiB, and the output."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        output = step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() / GIB, output.clone()


def first_output(module: torch.nn.Module, call: dict[str, Any]) -> torch.Tensor:
    return module(**call, return_dict=False)[0]


def busy_ms(step: Callable[[], Any]) -> float:
    """Time the card's kernels run for in one step; the rest of the step it waits for the host."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if "Memcpy" not in e.name and "Memset" not in e.name]
    return sum(e.self_device_time_total for e in kernels) / 1e3


def run_model(name: str, options: argparse.Namespace, say: Callable[[str], None]) -> list[Row]:
    rows: list[Row] = []
    model = build(name)
    call = inputs(name, options.batch, options.size)

    if options.fraction is None:
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
        ms, peak, reference = measure(functools.partial(first_output, model, call), options.repeats)
        rows.append(Row(name, "bf16 eager, resident", ms, peak, 0.0, weights))
        say(f"{rows[-1]}")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        start = time.perf_counter()
        slab = squareq_fx.build_slab(model, Path(scratch) / name, progress=False)
        say(f"{name}: slab built in {time.perf_counter() - start:.1f} s, {slab.path.stat().st_size / 1e9:.2f} GB")
        skeleton, _ = make_skeleton(model)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        outputs = {}
        start = time.perf_counter()
        captured = squareq_fx.capture(skeleton, slab=slab, device="cuda")
        say(f"{name}: captured in {time.perf_counter() - start:.1f} s")
        arms: list[tuple[str, dict[str, Any], Backing]] = [
            ("int8 resident", {}, "resident"),
            ("int8 streamed, 2 slots", {}, "host"),
            ("int8 streamed, 3 slots", {"slots": 3, "distance": 2}, "host"),
            ("int8 streamed from disk, 3 slots", {"slots": 3, "distance": 2}, "disk"),
        ]
        if options.fraction is not None:
            arms = arms[1:]
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(options.fraction)
            say(f"{name}: device memory capped at {options.fraction * total / GIB:.2f} GiB")
        for arm, how, backing in arms:
            start = time.perf_counter()
            graph = squareq_fx.run(captured, squareq_fx.default_passes(slab, **how))
            gm = emit(graph, skeleton, slab, backing=backing)
            say(f"{name}: {arm}: passes and emit took {time.perf_counter() - start:.1f} s, {len(functions(gm))} functions")
            with torch.no_grad():
                ms, peak, outputs[arm] = measure(functools.partial(first_output, gm, call), options.repeats)
            report = gm.last_step
            assert report is not None
            on_device = max(report.resident_bytes, report.peak_bytes_in_use)
            assert report.resident_bytes or report.peak_bytes_in_use <= report.arena_bytes
            rows.append(Row(name, arm, ms, peak, report.bytes_to_device / GIB, on_device / GIB))
            say(f"{rows[-1]}")
            say(f"{name}: {arm}: {report}; {report.timing}")
            say(f"{name}: {arm}: device busy {busy_ms(functools.partial(first_output, gm, call)):.1f} ms of the step")
            gm.shutdown()
            del gm
            gc.collect()
            torch.cuda.empty_cache()
        first, *others = outputs.values()
        equal = all(torch.equal(first, other) for other in others)
        say(f"{name}: streamed equals resident bit for bit: {equal}; finite: {bool(first.isfinite().all())}")
        if options.fraction is None:
            cosine = torch.cosine_similarity(first.flatten().double(), reference.flatten().double(), 0)
            say(f"{name}: cosine of int8 with bf16 eager: {cosine.item():.6f}")
        slab.close()
        if not equal:
            raise SystemExit(f"{name}: the streamed output differs from the resident one")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sdxl", "flux"], choices=["sdxl", "flux"])
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--fraction", type=float, help="cap of device memory, as a fraction of the card's")
    parser.add_argument("--scratch", help="where the slab is written; default: the temporary folder")
    parser.add_argument("--out", type=Path, help="also write the log and the table there")
    options = parser.parse_args()
    lines = [
        f"date {date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"squareq_fx {squareq_fx.__version__}",
        f"size {options.size}, batch {options.batch}, median of {options.repeats} steps after 3",
    ]

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text("\n".join(lines) + "\n")

    columns = ("model", "arm", "step ms", "peak GiB", "moved GiB a step", "weights on the device GiB")
    table = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in options.models:
        with torch.no_grad():
            rows = run_model(name, options, say)
        table += [
            f"| {r.model} | {r.arm} | {r.step_ms:.1f} | {r.peak:.2f} | {r.moved:.2f} | {r.weights:.2f} |" for r in rows
        ]
    say("\n".join(table))


if __name__ == "__main__":
    main()
