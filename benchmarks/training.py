"""A LoRA step of Flux.1-dev and SDXL: bf16 with PEFT, INT8 resident, INT8 streamed, INT8 streamed on an 8 GB card.

    python benchmarks/training.py                       # both models at 1024x1024, batch 1, rank 16; about 8 minutes
    python benchmarks/training.py --models flux --slabs /tmp/slabs    # one model; keeps its slab for the next run
    python benchmarks/training.py --models flux --compute w8a8 --backend cudagraph
    python benchmarks/training.py --models flux --compute w8a8 --backend cudagraph --parts training resident peer interleaved
    python benchmarks/training.py --tiny --out /tmp/tiny              # toys on the CPU: the script itself in seconds

Needs one CUDA card of 80 GB or more, 20 GB on disk and 30 GB of memory. Random weights. The models prepare at the same time
(slab, capture, passes, programs of Inductor) and are then measured one after the other, each in its own process, part by part:

  capped       streamed in a process that may hold no more than an 8 GB card has
  training     50 streamed steps with AdamW, alone: peaks, losses, and whether a byte of the base changed
  trace        one streamed step under the profiler, as a picture
  resident     every block on the card, alone
  peer         the dequantised model in bf16, eager, with PEFT's LoRA and gradient checkpointing, alone
  ceilings     the card's matrix rate, the bus's rate and the operations of a step: what no version can be faster than
  gradients    every adapter's gradient, streamed against resident and peer, from the same random A and B
  interleaved  steps of all arms in turn
  float32      the peer in float32: how far from it are ours, and how far is the peer in bf16

A part that fails or takes too long is reported and the next ones still run. Writes training.md, training-trace.png and
training-MODEL.jsonl, in which every step is a line; exits with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import squareq_fx

# This folder is on the path while its modules are imported and not later: PEFT imports transformers, which would take the
# `kernels.py` in it for the package of that name. A spawned process finds the path as it was left.
_HERE = str(Path(__file__).resolve().parent)
sys.path.insert(0, _HERE)

from training_arms import GIB  # noqa: E402
from training_bench import MEASUREMENT, PREPARATION, Bench, Log, Part  # noqa: E402
from training_models import MODELS, Subject  # noqa: E402
from training_report import report  # noqa: E402

sys.path[:] = [entry for entry in sys.path if not entry or str(Path(entry).resolve()) != _HERE]

PREPARATION_SECONDS = 330


def measure(name: str, options: argparse.Namespace, scratch: Path, parent: Connection) -> None:
    """One model in one process: prepares, says so, waits for its turn (in seconds), measures."""
    log = Log(options.out / f"training-{name}.jsonl", name)
    log.write("environment", **environment(options))
    bench = Bench(Subject(name, options.tiny, options.size, options.batch), log, options, scratch)

    def run(parts: Iterable[tuple[str, float]]) -> None:
        for part, seconds in parts:
            if bench.deadline <= time.perf_counter():
                log.write("note", text=f"`{part}` was not run: the limit of the whole run was reached.")
                continue
            with Part(log, part, min(seconds, bench.deadline - time.perf_counter())):
                part_of_bench: Callable[[], None] = getattr(bench, part)
                part_of_bench()
            gc.collect()

    run(PREPARATION)
    parent.send("prepared")
    bench.deadline = time.perf_counter() + parent.recv()
    run((part, seconds) for part, seconds in MEASUREMENT if part in options.parts)
    for arm in bench.arms.values():
        if isinstance(arm.module, squareq_fx.CompiledModule):
            arm.module.shutdown()


def environment(options: argparse.Namespace) -> dict[str, str]:
    """What the report says about this run."""
    packages = ("diffusers", "peft") if options.tiny else ("triton", "diffusers", "peft")
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}", *(f"{p} {version(p)}" for p in packages)]
    hardware = platform.processor() or platform.machine()
    if not options.tiny:
        card = torch.cuda.get_device_properties(0)
        hardware = f"{card.name}, {card.total_memory / GIB:.0f} GiB"
    given = [option for option in sys.argv[1:] if option not in (str(options.out), str(options.slabs), "--out", "--slabs")]
    size = "toys" if options.tiny else f"full size, {options.size}x{options.size} pixels"
    return {
        "command": f"python benchmarks/training.py {' '.join(given)}".strip(),
        "date": date.today().isoformat(),
        "hardware": hardware,
        "versions": ", ".join([*versions, f"squareq_fx {squareq_fx.__version__}"]),
        "subject": f"Random weights, {size}, batch {options.batch}, LoRA of rank {options.rank} on every attention layer; "
        f"ours in {options.compute}, backend {options.backend}.",
    }


def write_report(options: argparse.Namespace) -> list[dict[str, Any]]:
    """training.md from the logs as they are now; returns their entries."""
    entries: list[dict[str, Any]] = []
    for name in options.models:
        path = options.out / f"training-{name}.jsonl"
        written = path.read_text() if path.exists() else ""
        whole = written[: written.rfind("\n") + 1]  # a process that was killed may have left half a line
        entries += [json.loads(line) for line in whole.splitlines()]
    if entries:
        partial = options.out / "training.md.partial"
        partial.write_text(report(entries), encoding="utf-8")
        partial.replace(options.out / "training.md")
    return entries


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    parser.add_argument("--slabs", type=Path, help="folder in which slabs are kept, and found by the next run")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50, help="of the training run")
    parser.add_argument("--alone", type=int, default=6, help="steps of the other runs of one arm")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of the interleaved run, fewer if the time is up")
    parser.add_argument("--compute", choices=("w8a16", "w8a8"), default="w8a16", help="of our arms")
    backends = ("eager", "inductor", "cudagraph", "eager+cudagraph")
    parser.add_argument("--backend", choices=backends, default="eager", help="of our arms")
    parts = [part for part, _ in MEASUREMENT]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts, help="only these; some need others")
    parser.add_argument("--limit", type=float, default=530, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="toys on the CPU")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; --tiny runs without")
    for name in options.models:
        (options.out / f"training-{name}.jsonl").unlink(missing_ok=True)
    end = time.perf_counter() + options.limit
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="training_") as temporary:
        workers = []
        for name in options.models:
            here, there = context.Pipe()
            arguments_of = (name, options, options.slabs or Path(temporary), there)
            process = context.Process(target=measure, args=arguments_of, daemon=True)
            process.start()
            there.close()
            workers.append((name, process, here))
        waiting = time.perf_counter() + min(PREPARATION_SECONDS, options.limit)
        alive = [here.poll(max(0.0, waiting - time.perf_counter())) for _, _, here in workers]
        for position, (name, process, here) in enumerate(workers):
            # Flux comes first and takes longer than SDXL: not all of the time that is left is its own.
            turn = (end - time.perf_counter()) * (0.6 if position + 1 < len(workers) else 1.0)
            if alive[position] and process.is_alive():
                here.send(turn - 5)
                process.join(turn)
            if process.is_alive():
                process.kill()
                process.join()
            if process.exitcode:
                print(f"{name}: the process ended with {process.exitcode}; what it measured is kept", flush=True)
            write_report(options)
    entries = write_report(options)
    print((options.out / "training.md").read_text() if entries else "nothing was measured", flush=True)
    failed = [e for e in entries if e["event"] == "part" and e["error"]]
    return 1 if failed or any(process.exitcode for _, process, _ in workers) else 0


if __name__ == "__main__":
    raise SystemExit(main())
