"""Build a slab from a checkpoint of about 5 GB: peak memory and time, against quantising the loaded model in
memory.

    python benchmarks/slab_build.py --output benchmarks/results/slab_build.md

A synthetic diffusers directory (Flux's widths, fewer blocks, random bf16, sharded with an index) is made in a
temporary directory and deleted afterwards. Each measurement is a process of its own, and the two arms take
turns:

  build      build_slab(directory): read, quantise, measure fidelity, checksum, write, fsync, rename
  in memory  every Linear weight is loaded first; timed is only quantize_weight on each, nothing is written

Extra memory is the peak resident set during the build minus the resident set right before it, imports done.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

SHARD_BYTES = 1 << 30
CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "in_channels": 64,
    "guidance_embeds": True,
    "num_layers": 3,
    "num_single_layers": 10,
}


def make_checkpoint(directory: Path) -> int:
    """Write the directory; returns the bytes of all tensors."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import save_file

    with init_empty_weights(include_buffers=False):
        shapes = {n: t.shape for n, t in FluxTransformer2DModel.from_config(CONFIG).state_dict().items()}
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, shape in shapes.items():
        nbytes = 2 * shape.numel()
        if size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            n: torch.empty(shapes[n], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for n in names
        }
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return total


def memory(field: str) -> int:
    """Bytes of one line of /proc/self/status, such as VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def arm_build(checkpoint: Path, target: Path) -> dict[str, float]:
    import diffusers.models.transformers.transformer_flux  # noqa: F401  imports are not the build's memory

    from squareq_fx.slab import build_slab

    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    build_slab(checkpoint, target, progress=False).close()
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "extra": memory("VmHWM") - before,
        "slab": (target.parent / "slab.safetensors").stat().st_size,
    }


def arm_memory(checkpoint: Path, target: Path) -> dict[str, float]:
    from safetensors.torch import load_file
    from torch import Tensor

    from squareq_fx.kernels.reference import quantize_weight
    from squareq_fx.slab import open_slab

    with open_slab(target) as slab:
        wanted = {f"{name}.weight" for name in slab.layers}
    weights: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        weights |= {name: tensor.clone() for name, tensor in load_file(file).items() if name in wanted}
    start, cpu = time.perf_counter(), time.process_time()
    quantised = [quantize_weight(weight) for weight in weights.values()]
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "layers": len(quantised),
    }


def run_arm(arm: str, checkpoint: Path, target: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--arm", arm, str(checkpoint), str(target)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def hardware() -> str:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB memory"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, help="where to work (default: the system's temporary directory)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the report to this file too")
    parser.add_argument("--date", default=date.today().isoformat())
    parser.add_argument("--arm", nargs=3, metavar=("NAME", "CHECKPOINT", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        arm = {"build": arm_build, "memory": arm_memory}[options.arm[0]]
        print(json.dumps(arm(Path(options.arm[1]), Path(options.arm[2]))))
        return
    work = Path(tempfile.mkdtemp(prefix="slab_build_", dir=options.directory))
    try:
        checkpoint, target = work / "checkpoint", work / "slab"
        checkpoint.mkdir()
        nbytes = make_checkpoint(checkpoint)
        os.sync()  # its write-back must not share the disk with the first run
        pairs = [
            (run_arm("build", checkpoint, target), run_arm("memory", checkpoint, target))
            for _ in range(options.repeats)
        ]
    finally:
        shutil.rmtree(work)
    text = report(nbytes, pairs, options.date)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")


def report(nbytes: int, pairs: list[tuple[dict[str, Any], dict[str, Any]]], day: str) -> str:
    import torch

    from squareq_fx import __version__

    def median(arm: int, what: str) -> float:
        return statistics.median(pair[arm][what] for pair in pairs)

    extra = max(b["extra"] for b, _ in pairs) / 2**20
    rows = [
        f"| {i} | {b['seconds']:.1f} / {b['cpu']:.1f} s | {b['extra'] / 2**20:.0f} MiB "
        f"| {m['seconds']:.1f} / {m['cpu']:.1f} s |"
        for i, (b, m) in enumerate(pairs, 1)
    ]
    return "\n".join(
        [
            "# Building a slab from a checkpoint, streamed",
            "",
            f"Command: `python benchmarks/slab_build.py --output benchmarks/results/slab_build.md`, {day}.",
            f"Hardware: {hardware()}; {torch.get_num_threads()} torch thread(s); load average of the machine "
            f"while measuring {os.getloadavg()[1]:.1f}.",
            f"Versions: Python {platform.python_version()}, torch {torch.__version__}, "
            f"squareq_fx {__version__}.",
            f"Checkpoint: {nbytes / 1e9:.2f} GB bf16, sharded; slab: {pairs[0][0]['slab'] / 1e9:.2f} GB.",
            "",
            "| run | build, fsync included: wall / cpu | extra memory | quantising in memory: wall / cpu |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Median wall time {median(0, 'seconds'):.1f} s against {median(1, 'seconds'):.1f} s: "
            f"{median(1, 'seconds') / median(0, 'seconds'):.2f} times the speed of",
            "quantising the loaded model, which neither reads nor writes nor measures anything.",
            f"Extra memory at most {extra:.0f} MiB (allowed: 1024 MiB).",
        ]
    )


if __name__ == "__main__":
    main()
