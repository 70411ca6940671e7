"""A LoRA step of Flux.1-dev and SDXL: bf16 with PEFT, INT8 resident, INT8 streamed, INT8 streamed on an 8 GB card.

    python benchmarks/training.py                       # both models at 1024x1024, batch 1, rank 16; about 8 minutes
    python benchmarks/training.py --models flux --slabs /tmp/slabs    # one model; keeps its slab for the next run
    python benchmarks/training.py --tiny --out /tmp/tiny              # toys on the CPU: the script itself in seconds

Needs one CUDA card of 80 GB or more, 20 GB on disk and 30 GB of memory. Random weights. The models prepare at the same time
(slab, capture, passes) and are then measured one after the other, each in its own process, part by part:

  capped       streamed in a process that may hold no more than an 8 GB card has
  training     50 streamed steps with AdamW, alone: peaks, losses, and whether a byte of the base changed
  trace        one streamed step under the profiler, as a picture
  resident     every block on the card, alone
  peer         the dequantised model in bf16, eager, with PEFT's LoRA and gradient checkpointing, alone
  gradients    every adapter's gradient, streamed against resident and peer, from the same random A and B
  interleaved  steps of all arms in turn
  float32      the peer in float32: how far from it are ours, and how far is the peer in bf16

A part that fails or takes too long is reported and the next ones still run. Writes training.md, training-trace.png and
training-MODEL.jsonl, in which every step is a line; exits with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils import _pytree as pytree
from training_arms import GIB, Arm, Step, add_peft, compare, held, random_values
from training_models import MODELS, Subject
from training_report import report
from training_trace import draw, record

import squareq_fx
from squareq_fx.emit import emit
from squareq_fx.lora import Lora
from squareq_fx.slab import Slab
from squareq_fx.slab.checksums import checksum

CAP_BYTES = int(0.95 * 8e9)  # what torch's allocator may hold; the rest of an 8 GB card is the context's
PREPARATION_SECONDS = 330


class Log:
    """The file of one model: a JSON object a line, on disk before the next thing happens."""

    def __init__(self, path: Path, model: str) -> None:
        self.model = model
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps({"model": self.model, "event": event, **values}) + "\n")
        self._file.flush()
        told = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items() if v not in (None, [], "")}
        shown = ", ".join(f"{key} {value}" for key, value in told.items())
        print(f"{self.model}: {event}: {shown}", flush=True)

    def step(self, run: str, index: int, step: Step) -> None:
        self.write("step", run=run, index=index, **dataclasses.asdict(step))


class Part:
    """`with Part(...):` times what is inside, interrupts it after some seconds, and reports what it raises instead of ending
    the run; what the part held on the device is let go.
    """

    def __init__(self, log: Log, name: str, seconds: float) -> None:
        self._log, self._name, self._seconds = log, name, seconds

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        signal.signal(signal.SIGALRM, self._interrupt)
        signal.setitimer(signal.ITIMER_REAL, max(0.01, self._seconds))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        signal.setitimer(signal.ITIMER_REAL, 0)
        text = ""
        if error is not None:
            text = "".join(traceback.format_exception(kind, error, trace, limit=-12))
            traceback.clear_frames(trace)
        self._log.write("part", part=self._name, seconds=time.perf_counter() - self._start, error=text)
        return isinstance(error, Exception)

    def _interrupt(self, number: int, frame: object) -> None:
        raise TimeoutError(f"part {self._name} took more than {self._seconds:.0f} s")


class Bench:
    """The parts of one model. Each method is a part; later ones use what earlier ones made."""

    def __init__(self, subject: Subject, log: Log, options: argparse.Namespace, scratch: Path) -> None:
        self.subject, self.log, self.options, self.scratch = subject, log, options, scratch
        self.lora = Lora(rank=options.rank, alpha=options.rank, targets="attention")
        self.call = subject.call()
        self.target = subject.target(self.call)
        self.arms: dict[str, Arm] = {}
        self.gradients_of: dict[str, dict[str, torch.Tensor]] = {}
        self.made: dict[str, Any] = {}
        self.deadline = float("inf")

    # ------------------------------------------------------------------------------------------ preparation

    def slab(self) -> None:
        """The INT8 weights on disk; the float model they come from is gone afterwards."""
        path = self.scratch / self.subject.name
        if path.with_suffix(".safetensors").exists():
            self.made["slab"] = squareq_fx.open_slab(path)
        else:
            self.made["slab"] = squareq_fx.build_slab(self.subject.random(), path, progress=False)
        held(self.subject.device)

    def passes(self) -> None:
        """Capture and passes, once for all of our arms."""
        slab = self._need("slab")
        captured = squareq_fx.capture(self.subject.on_meta(), slab=slab, device=self.subject.device)
        self.made["graph"] = squareq_fx.run(captured, squareq_fx.default_passes(slab, lora=self.lora))

    # ------------------------------------------------------------------------------------------ measurement

    def capped(self) -> None:
        if self.subject.tiny:
            self.log.write("note", text="Without CUDA there is no cap of device memory to train under.")
            return
        total = torch.cuda.get_device_properties(0).total_memory
        held(self.subject.device)
        torch.cuda.set_per_process_memory_fraction(CAP_BYTES / total)
        try:
            self._refuse_more_than_the_cap()
            arm = self._ours("streamed, capped", "host")
            for index in range(self.options.alone):
                self.log.step("capped", index, arm.step())
            assert isinstance(arm.module, squareq_fx.CompiledModule)
            arm.module.shutdown()
            allowed = f"{CAP_BYTES / GIB:.2f} GiB (0.95 x 8e9 bytes)"
            self.log.write("note", text=f"Capped: torch may hold {allowed}; an allocation beyond that was refused.")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def training(self) -> None:
        arm = self.arms["streamed"] = self._ours("streamed", "host")
        base = self._base(arm)
        for index in range(self.options.steps):
            self.log.step("training", index, arm.step())
        self.log.write("base", arm=arm.name, steps=self.options.steps, unchanged=base == self._base(arm), tensors=len(base))

    def trace(self) -> None:
        arm = self._need("streamed")
        arm.step()
        trace = record(arm)
        picture = self.options.out / "training-trace.png"
        if self.subject.name != self.options.models[0]:
            picture = picture.with_name(f"training-trace-{self.subject.name}.png")
        draw(trace, f"{self.subject.name}, one streamed LoRA step", picture)
        self.log.write("trace", picture=picture.name, **trace.figures())

    def resident(self) -> None:
        arm = self.arms["resident"] = self._ours("resident", "resident")
        for index in range(self.options.alone):
            self.log.step("alone", index, arm.step())

    def peer(self) -> None:
        slab = self._need("slab")
        before = held(self.subject.device)
        model = add_peft(self.subject.dequantised(slab), list(self.lora.layers(slab.layers)), self.options.rank)
        arm = self.arms["peer"] = Arm("peer", model, self.call, self.target, before, is_peer=True)
        for index in range(self.options.alone):
            self.log.step("alone", index, arm.step())

    def gradients(self) -> None:
        values = random_values(self._need("streamed").adapters)
        losses = {name: self._gradients(name, arm, values) for name, arm in self.arms.items()}
        for other in ("resident", "peer"):
            if other in losses:
                self._compare("streamed", other, losses)

    def interleaved(self) -> None:
        for arm in self.arms.values():  # each has waited while the others ran
            self.log.step("warm-up", 0, arm.step())
        names = list(self.arms)
        for index in range(self.options.repeats):
            start = time.perf_counter()
            for name in names:
                self.log.step("interleaved", index, self.arms[name].step())
            names.append(names.pop(0))
            if time.perf_counter() + 2 * (time.perf_counter() - start) > self.deadline:
                break

    def float32(self) -> None:
        peer = self.arms.pop("peer")
        values = random_values(peer.adapters)
        call = pytree.tree_map(lambda t: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, self.call)
        torch.backends.cudnn.allow_tf32 = False
        reference = Arm("peer in float32", peer.module.float(), call, self.target, peer.before, is_peer=True)
        losses = {"peer in float32": self._gradients("peer in float32", reference, values)}
        for name in ("streamed", "peer"):
            if name in self.gradients_of:
                self._compare(name, "peer in float32", losses)

    # ----------------------------------------------------------------------------------------------- helpers

    def _need(self, name: str) -> Any:
        found = self.arms.get(name, self.made.get(name))
        if found is None:
            raise RuntimeError(f"{name} is not there: the part that makes it failed")
        return found

    def _ours(self, name: str, backing: Any) -> Arm:
        slab: Slab = self._need("slab")
        before = held(self.subject.device)
        module = emit(self._need("graph"), self.subject.on_meta(), slab, backing=backing)
        return Arm(name, module, self.call, self.target, before)

    def _base(self, arm: Arm) -> dict[str, str]:
        """Checksums of everything that must not change: the slab's bytes, and all tensors but the adapters."""
        state = dict(arm.module.state_dict())
        frozen = {name: checksum(t.detach().cpu().contiguous()) for name, t in state.items() if name not in arm.adapters}
        return frozen | {"the slab": checksum(self._need("slab").data)}

    def _gradients(self, name: str, arm: Arm, values: dict[str, torch.Tensor]) -> float:
        loss, self.gradients_of[name] = arm.gradients(values)
        return loss

    def _compare(self, ours: str, theirs: str, losses: dict[str, float]) -> None:
        found = compare(self.gradients_of[ours], self.gradients_of[theirs])
        self.log.write("gradients", pair=[ours, theirs], losses=[losses[n] for n in (ours, theirs) if n in losses], **found)


    def _refuse_more_than_the_cap(self) -> None:
        """Raises RuntimeError if the cap lets through what it should not."""
        try:
            torch.empty(CAP_BYTES + GIB, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            return
        raise RuntimeError(f"the cap of {CAP_BYTES} bytes did not refuse an allocation that is larger")


PREPARATION: tuple[tuple[str, float], ...] = (("slab", 160), ("passes", 160))
MEASUREMENT: tuple[tuple[str, float], ...] = (
    ("capped", 60),
    ("training", 120),
    ("trace", 60),
    ("resident", 60),
    ("peer", 60),
    ("gradients", 60),
    ("interleaved", 120),
    ("float32", 60),
)


def measure(name: str, options: argparse.Namespace, scratch: Path, parent: Connection) -> None:
    """One model in one process: prepares, says so, waits for its turn (in seconds), measures."""
    log = Log(options.out / f"training-{name}.jsonl", name)
    log.write("environment", **environment(options))
    bench = Bench(Subject(name, options.tiny, options.size, options.batch), log, options, scratch)

    def run(parts: Iterable[tuple[str, float]]) -> None:
        for part, seconds in parts:
            with Part(log, part, min(seconds, bench.deadline - time.perf_counter())):
                part_of_bench: Callable[[], None] = getattr(bench, part)
                part_of_bench()
            gc.collect()

    run(PREPARATION)
    parent.send("prepared")
    bench.deadline = time.perf_counter() + parent.recv()
    run(MEASUREMENT)
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
    size = "toys" if options.tiny else f"full size, {options.size}x{options.size} pixels"
    return {
        "command": f"python benchmarks/training.py {' '.join(sys.argv[1:])}".strip(),
        "date": date.today().isoformat(),
        "hardware": hardware,
        "versions": ", ".join([*versions, f"squareq_fx {squareq_fx.__version__}"]),
        "subject": f"Random weights, {size}, batch {options.batch}, LoRA of rank {options.rank} on every attention layer.",
    }


def write_report(options: argparse.Namespace) -> list[dict[str, Any]]:
    """training.md from the logs as they are now; returns their entries."""
    entries: list[dict[str, Any]] = []
    for name in options.models:
        path = options.out / f"training-{name}.jsonl"
        entries += [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
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
            process = context.Process(target=measure, args=(name, options, options.slabs or Path(temporary), there))
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
