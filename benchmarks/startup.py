"""From the start of a Python process to the first output of a compiled model: with empty caches, and with what that left.

    python benchmarks/startup.py --model flux                      # Flux.1-dev at 1024x1024; --model sdxl
    python benchmarks/startup.py --model flux --slab slabs/flux --backend cudagraph
    python benchmarks/startup.py --tiny --out /tmp/tiny            # a toy on the CPU: the script itself in a minute or two

Needs one CUDA card; without --slab also the bf16 model's size on it, and the slab's on disk. A slab with random weights is
built first, by a process whose time does not count. Then three processes run one after the other, each as a user's would: it
imports, opens the slab, makes the model without weights, compiles, and brings the first output to the host. They share one
temporary folder of caches (this package's, Inductor's, Triton's), which the first, "cold", finds empty. Writes startup.json and
startup.md; exits with 1 if a process failed, with its error on standard error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from importlib.util import cache_from_source, find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).resolve().parent)
sys.path.insert(0, HERE)
schedule = importlib.import_module("peers_schedule")
sys.path[:] = [entry for entry in sys.path if not entry or str(Path(entry).resolve()) != HERE]

Row = dict[str, Any]
RUNS = ("cold", "warm 1", "warm 2")
STAGES = {
    "libraries": "torch, diffusers imported",
    "imports": "squareq_fx, benchmark imported",
    "model": "slab opened, model on meta",
    "compile": "compile",
    "first_output": "first call",
}
TARGET = 10.0  # seconds to the first output from a warm cache
CLASSES = {"flux": "FluxTransformer2DModel", "sdxl": "UNet2DConditionModel"}
SLAB_SUFFIXES = (".safetensors", ".manifest.json")
_FIGURES = ("first output after", "kernels tuned in", "second call", "Inductor programs", "of them from a cache")
_COLUMNS = ("run", *STAGES.values(), *_FIGURES)
_PASSED = ("model", "compute", "backend", "size", "batch")


def measure(options: argparse.Namespace) -> None:
    """A process of its own: everything up to the first output, then a second call; prints the row as JSON."""
    timeline: Row = {}

    def done(stage: str) -> None:
        timeline[stage] = time.time() - options.started
        print(f"  {STAGES[stage]}: done after {timeline[stage]:.2f} s", file=sys.stderr, flush=True)

    import diffusers
    import torch

    getattr(diffusers, CLASSES[options.model])  # diffusers imports a class, and PEFT, when it is first asked for it
    done("libraries")
    import squareq_fx

    subject = _subject(options)
    done("imports")
    slab, model = squareq_fx.open_slab(options.slab), subject.on_meta()
    done("model")
    tuned = _Tuned.listening()
    how: Row = {name: getattr(options, name) for name in ("compute", "backend", "tune")}
    how |= {"backing": "resident", "progress": False}
    module = squareq_fx.compile(model, slab, device=subject.device, **how)
    done("compile")
    with torch.no_grad():
        call = subject.call()
        output = module(**call, return_dict=False)[0].cpu()
        done("first_output")
        start = time.perf_counter()
        module(**call, return_dict=False)[0].cpu()
        second = time.perf_counter() - start
    if not output.isfinite().all():
        raise SystemExit("the first output is not finite")
    from torch._dynamo.utils import counters  # late, as everything else that is only for the report

    device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch thread(s)"
    if not options.tiny:
        card = torch.cuda.get_device_properties(0)
        device = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    packages = ("torch", "diffusers") if options.tiny else ("torch", "triton", "diffusers")
    versions = {"Python": platform.python_version()} | {name: version(name) for name in packages}
    row: Row = {"timeline": timeline, "tuning": tuned.seconds, "second_call": second}
    compilations = module.lowering.compilations
    found = sum(c.kept for c in compilations) + counters["inductor"]["fxgraph_cache_hit"]  # in ours, in Inductor's
    row |= {"compilations": len(compilations), "from_cache": found}
    module.shutdown()
    row["peft"] = "peft" in sys.modules
    print(json.dumps({**row, "device": device, "versions": {**versions, "squareq_fx": squareq_fx.__version__}}), flush=True)


class _Tuned(logging.Handler):
    """Adds up what `tune` says that it took; it is a part of the compile stage."""

    seconds = 0.0

    @classmethod
    def listening(cls) -> _Tuned:
        handler, logger = cls(), logging.getLogger("squareq_fx.auto.tuning")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        return handler

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("tiles of") and isinstance(record.args, tuple):
            self.seconds += float(record.args[-1])  # type: ignore[arg-type]


def _child(options: argparse.Namespace) -> int:
    """What a process of its own does: a slab with random weights, or a measurement."""
    if not options.tiny and not importlib.import_module("torch").cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; --tiny runs without")
    if options.child == "measure":
        measure(options)
    else:
        importlib.import_module("squareq_fx").build_slab(_subject(options).random(), options.slab, progress=False)
    return 0


def _subject(options: argparse.Namespace) -> Any:
    return schedule.bring("training_models").Subject(options.model, options.tiny, options.size, options.batch)


def report(setting: Row, rows: Sequence[Row]) -> str:
    """The page in Markdown."""
    full = f"full size, {setting['size']}x{setting['size']} pixels, random weights"
    size = "a toy, whose times say nothing about a card" if setting["tiny"] else full
    slab = "was there before; the first run may read it from the disk" if setting["slab_given"] else "was built right before"
    lines = [
        "# From the start of the process to the first output",
        "",
        f"Command: `{setting['command']}`, {setting['date']}.",
        f"Hardware: {rows[0]['device']}. Versions: {', '.join(f'{k} {v}' for k, v in rows[0]['versions'].items())}.",
        f"{setting['model']}, {size}, batch {setting['batch']}; {setting['compute']}, {setting['backend']}, weights resident.",
        "",
        "Seconds; each run is a process of its own. `cold` finds every cache empty (this package's, Inductor's, Triton's), the",
        "others find what it left. The first call makes its inputs too, and ends with the output on the host; the column after",
        f"it counts from the start of the process. The slab {slab}. {_imports(rows)}",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
    ]
    for row in rows:
        times = list(row["timeline"].values())
        cells = [row["run"], *(f"{b - a:.2f}" for a, b in pairwise([0.0, *times])), f"{times[-1]:.2f}"]
        tuned = f"{row['tuning']:.2f}" if row["tuning"] else "-"
        cells += [tuned, f"{row['second_call']:.3f}", str(row["compilations"]), str(row["from_cache"])]
        lines.append(f"| {' | '.join(cells)} |")
    warm = [f"{row['run']} {_verdict(row['timeline']['first_output'])}" for row in rows if row["run"] != RUNS[0]]
    target = f"Target: first output from a warm cache within {TARGET:g} s: {'; '.join(warm) or 'not measured'}."
    ours = ", ".join(f"{row['timeline']['first_output'] - row['timeline']['libraries']:.2f}" for row in rows)
    return "\n".join([*lines, "", target, f"Without the imports of torch and diffusers: {ours} s."]) + "\n"


def _has_bytecode(package: str) -> bool:
    """Whether a process that imports it now finds it compiled; asked from outside, since the process may write it."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None and Path(cache_from_source(spec.origin)).exists()


def _imports(rows: Sequence[Row]) -> str:
    """What else the time of the imports depends on."""
    cached = ", ".join(row["run"] for row in rows if row["bytecode"]) or "no run"
    peft = "imports PEFT too, which is here" if rows[0]["peft"] else "would import PEFT too, which is not installed here"
    return f"Python had torch's bytecode cached in: {cached}; diffusers {peft}."


def _verdict(seconds: float) -> str:
    return f"{'met' if seconds <= TARGET else 'missed'} by {abs(TARGET - seconds):.2f} s"


def _run(kind: str, options: argparse.Namespace, slab: Path, end: float, environment: dict[str, str]) -> str:
    """The last line that a child printed. Its standard error is ours."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", kind, "--slab", str(slab)]
    for name in _PASSED:
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--tiny"] * options.tiny + ["--tune"] * options.tune + ["--started", repr(time.time())]
    left = max(0.1, end - time.monotonic())
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=left)
    if done.returncode:
        raise SystemExit(f"{done.stdout}the process ended with exit status {done.returncode}; its error is above")
    return done.stdout.splitlines()[-1] if done.stdout else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(CLASSES), default="flux")
    parser.add_argument("--compute", choices=("w8a16", "w8a8", "auto"), default="w8a8")
    parser.add_argument("--backend", choices=("inductor", "cudagraph", "eager", "eager+cudagraph"), default="inductor")
    parser.add_argument("--slab", type=Path, help="a slab of this model, without extension; default: one is built")
    parser.add_argument("--tune", action="store_true", help="compile(tune=True): the cold run measures the kernels' tiles")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side; a toy's are its own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU")
    parser.add_argument("--child", choices=("build", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return _child(options)
    absent = [f"{options.slab}{suffix}" for suffix in SLAB_SUFFIXES if not Path(f"{options.slab}{suffix}").is_file()]
    if options.slab and absent:
        parser.error(f"--slab: there is no {' and no '.join(absent)}; give the path without extension")
    setting: Row = {name: getattr(options, name) for name in _PASSED} | {"tiny": options.tiny, "slab_given": bool(options.slab)}
    chosen = [f"--{name} {setting[name]}" for name in _PASSED[1:] if setting[name] != parser.get_default(name)]
    command = ["python benchmarks/startup.py", f"--model {options.model}", *chosen]
    command += ["--tune"] * options.tune + ["--tiny"] * setting["tiny"] + ["--slab SLAB"] * setting["slab_given"]
    setting |= {"command": " ".join(command), "date": date.today().isoformat()}
    options.out.mkdir(parents=True, exist_ok=True)
    end, rows = time.monotonic() + options.limit, []
    with tempfile.TemporaryDirectory(prefix="startup_", ignore_cleanup_errors=True) as temporary:
        slab = Path(temporary) / "slab"
        caches = {"SQUAREQ_CACHE_DIR": "squareq_fx", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        environment = {name: value for name, value in os.environ.items() if name != "SQUAREQ_CACHE"}
        environment |= {name: str(Path(temporary) / folder) for name, folder in caches.items()}
        doing = "building the slab"
        try:
            if options.slab is None:
                print(f"{options.model}: {doing}", file=sys.stderr, flush=True)
                _run("build", options, slab, end, environment)
            for suffix in SLAB_SUFFIXES if options.slab else ():  # here, because compute="auto" writes its decisions beside it
                Path(f"{slab}{suffix}").symlink_to(Path(f"{options.slab}{suffix}").resolve())
            for doing in RUNS:
                print(f"{options.model}: {doing}", file=sys.stderr, flush=True)
                before = {"run": doing, "bytecode": _has_bytecode("torch")}
                rows.append({**before, **json.loads(_run("measure", options, slab, end, environment))})
                (options.out / "startup.json").write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")
                (options.out / "startup.md").write_text(report(setting, rows))
        except (subprocess.TimeoutExpired, SystemExit) as error:
            why = error if isinstance(error, SystemExit) else f"the limit of {options.limit:g} s was reached"
            print(f"{doing}: {why}", file=sys.stderr)
            return 1
    print(report(setting, rows), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
