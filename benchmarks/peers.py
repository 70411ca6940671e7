"""Ours beside other INT8 packages on one CUDA card: single layers, whole models, LoRA steps.

    python benchmarks/peers.py --only layers                       # 20 layer shapes of Flux, SDXL and SD3; about 4 minutes
    python benchmarks/peers.py --only models --models flux         # Flux.1-dev at 1024x1024; --models sdxl: batch 2
    python benchmarks/peers.py --only train --models sdxl --arms bf16 ours-w8a16 quanto
    python benchmarks/peers.py --tiny --out /tmp/tiny              # toys on the CPU: the script itself in seconds

Arms: bf16, bf16+compile, ours-w8a16, ours-w8a8, ours-auto, torchao-w8a16, torchao-w8a8, quanto, bitsandbytes, sdnq,
comfy-kitchen; each takes the suffix +compile or +max, ours, which go through Inductor, +eager, +cudagraph, +eager+cudagraph or
+streamed. A package that is not installed is a note in the table. Every arm runs in a process of its own (ours of one model in
one), and while one measures the others are stopped. Writes peers.jsonl line by line, and from what is there at the end peers.md
and peers-PART.png. Random weights; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).resolve().parent)
sys.path.insert(0, HERE)
schedule = importlib.import_module("peers_schedule")
report = importlib.import_module("peers_report")
sys.path[:] = [entry for entry in sys.path if not entry or str(Path(entry).resolve()) != HERE]

PARTS = ("layers", "models", "train")
SLOW_SHARDS = 5  # processes over which a package that compiles long for each shape is spread
MODEL_GIB = {"flux": 27.0, "sdxl": 9.0}  # the bf16 model, what it becomes, activations
CARD_GIB = 130.0


def jobs_of(part: str, options: argparse.Namespace, scratch: str) -> list[Any]:
    """The processes of one part."""
    if part == "layers":
        return _layer_jobs(options)
    arms_of = schedule.bring("peers_arms")
    jobs = []
    for model in options.models:
        common = {
            "tiny": options.tiny,
            "model": model,
            "size": options.size,
            "batch": options.batch or (2 if model == "sdxl" and part == "models" else 1),
            "rank": options.rank,
            "repeats": options.repeats,
            "scratch": scratch,
            "slabs": str(options.slabs.resolve()) if options.slabs else None,
        }
        plain = [arm for arm in options.arms if arm.partition("+")[0] == "bf16"]
        ours = [arm for arm in options.arms if arms_of.is_ours(arm)]
        alone = [[arm] for arm in options.arms if arm not in plain and arm not in ours]
        for arms in (plain, ours, *alone):
            if arms:
                jobs.append(
                    schedule.Job(
                        part=part,
                        work=f"peers_models.{part}",
                        tasks=tuple(arms),
                        options=common,
                        weight=1.0 if options.tiny else MODEL_GIB[model],
                        prepare=480.0 if arms is ours else 240.0,  # the backward's functions, each compiled
                        measure=180.0 if arms is ours else 60.0,
                        environment={"TORCHINDUCTOR_COMPILE_THREADS": str(max(4, (os.cpu_count() or 4) // 2))},
                    )
                )
    return jobs


def _layer_jobs(options: argparse.Namespace) -> list[Any]:
    layers = schedule.bring("peers_layers")
    arms = schedule.bring("peers_arms")
    shapes = [shape for family in (layers.TINY if options.tiny else layers.SHAPES).values() for shape in family]
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    jobs = [schedule.Job("layers", "peers_layers.measure_ceilings", ("ceilings",), {"tiny": options.tiny}, 0.0)]
    for arm in options.arms:
        if arms.is_ours(arm) and arm not in ("ours-w8a16", "ours-w8a8"):
            continue  # ways to run a model
        shards = 1
        if not options.tiny:
            shards = 2 if arms.is_ours(arm) else SLOW_SHARDS if arms.peer_of(arm).slow else 3 if "+" in arm else 1
        for shard in range(shards):
            jobs.append(
                schedule.Job(
                    part="layers",
                    work="peers_layers.measure",
                    tasks=(arm,),
                    options={"tiny": options.tiny, "shapes": shapes[shard::shards]},
                    prepare=150.0,
                    measure=45.0,
                    environment=environment,
                )
            )
    return jobs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--arms", nargs="+", help="default: all, those of torchao compiled")
    parser.add_argument("--models", nargs="+", choices=("flux", "sdxl"), default=["flux", "sdxl"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side, of models and train")
    parser.add_argument("--batch", type=int, help="default: 1; SDXL's forwards 2")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--repeats", type=int, default=12, help="forwards or steps that are timed")
    parser.add_argument("--processes", type=int, default=24, help="layers: at most so many at a time")
    parser.add_argument("--slabs", type=Path, help="folder to keep the slabs in, and to take them from")
    parser.add_argument("--tiny", action="store_true", help="toys on the CPU")
    options = parser.parse_args(arguments)
    arms = schedule.bring("peers_arms")
    options.arms = options.arms or list(arms.DEFAULT)
    for arm in options.arms:
        if not arms.is_ours(arm) and arm.partition("+")[0] not in arms.PEERS:
            parser.error(f"no arm {arm!r}; there are {', '.join((*arms.OURS, *arms.PEERS))}")
    end = time.monotonic() + options.limit
    options.out.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    with (options.out / "peers.jsonl").open("w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as scratch:

        def log(row: dict[str, Any]) -> None:
            entries.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if k != "trace" and v is not None}
            print(", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)

        log({"event": "run", "arms": options.arms, **_environment(options, arguments)})
        whole = [part for part in options.only if part != "layers"]  # these prepare for long, so they do it together
        for parts in (["layers"] if "layers" in options.only else [], whole):
            started = time.monotonic()
            capacity = options.processes if parts == ["layers"] else CARD_GIB
            jobs = [job for part in parts for job in jobs_of(part, options, scratch)]
            schedule.run_jobs(jobs, log, end - started, 2.0 if options.tiny else capacity)
            for part in parts if parts == whole else []:
                for row in schedule.bring("peers_models").compared(part, scratch):
                    log(row)
            if parts:
                log({"event": "parts", "parts": parts, "seconds": time.monotonic() - started})
    families = schedule.bring("peers_layers")
    shapes = families.TINY if options.tiny else families.SHAPES
    (options.out / "peers.md").write_text(report.report(entries, shapes), encoding="utf-8")
    report.draw(entries, options.out)
    print((options.out / "peers.md").read_text(encoding="utf-8"), flush=True)
    return 0


def _environment(options: argparse.Namespace, arguments: Sequence[str] | None) -> dict[str, Any]:
    given = [a for a in (sys.argv[1:] if arguments is None else arguments) if a not in ("--out", str(options.out))]
    return {
        "command": f"python benchmarks/peers.py {' '.join(given)}".strip(),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
