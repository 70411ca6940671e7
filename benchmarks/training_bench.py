"""The parts of `training.py`, one method each, and the log they write."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils import _pytree as pytree
from training_arms import GIB, Arm, Step, add_peft, compare, held, random_values, resident_unchanged
from training_ceilings import copy_rate, operations, product_rate
from training_models import Subject
from training_trace import draw, record

import squareq_fx
from squareq_fx.auto.deciding import usual_sizes
from squareq_fx.emit import emit
from squareq_fx.lora import Lora
from squareq_fx.lowering.backends import compiles
from squareq_fx.slab.checksums import checksum

__all__ = ["MEASUREMENT", "PREPARATION", "Bench", "Log", "Part"]

CAP_BYTES = int(0.95 * 8e9)  # what torch's allocator may hold; the rest of an 8 GB card is the context's
PREPARATION: tuple[tuple[str, float], ...] = (("slab", 160), ("passes", 160), ("programs", 300))
MEASUREMENT: tuple[tuple[str, float], ...] = (
    ("capped", 60),
    ("training", 120),
    ("trace", 60),
    ("resident", 60),
    ("peer", 60),
    ("ceilings", 30),
    ("gradients", 60),
    ("interleaved", 120),
    ("float32", 60),
)


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
            text = "".join(traceback.format_exception(kind, error, trace, limit=-12))[-6000:]
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
        passes = squareq_fx.default_passes(slab, lora=self.lora, compute=self.options.compute)
        self.made["graph"] = squareq_fx.run(captured, passes)

    def programs(self) -> None:
        """Compiled here, so that later arms find them in Inductor's cache."""
        if compiles(self.options.backend):
            self._module("host").shutdown()
            held(self.subject.device)

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
        self.log.write("base", arm=arm.name, steps=arm.steps, unchanged=base == self._base(arm))

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

    def ceilings(self) -> None:
        device, size, nbytes = self.subject.device, 8192, GIB
        if self.subject.tiny:
            size, nbytes = 128, GIB >> 10
        found = {"product_rate": product_rate(device, self.subject.dtype, size), "copy_rate": copy_rate(device, nbytes)}
        self.log.write("ceilings", operations=operations(self._need("peer")), **found)

    def gradients(self) -> None:
        values = random_values(self._need("streamed").adapters)
        losses = {name: self._gradients(name, arm, values) for name, arm in self.arms.items()}
        for other in ("resident", "peer"):
            if other in losses:
                self._compare("streamed", other, losses)

    def interleaved(self) -> None:
        for arm in self.arms.values():  # each has waited while the others ran
            self._beside_others("warm-up", 0, arm)
        names = list(self.arms)
        after = 50 if "float32" in self.options.parts else 0  # time for what comes after
        end = min(self.deadline - after, time.perf_counter() + 100)
        for index in range(self.options.repeats):
            start = time.perf_counter()
            for name in names:
                self._beside_others("interleaved", index, self.arms[name])
            names.append(names.pop(0))
            if index >= 2 and 2 * time.perf_counter() - start > end:
                break
        resident = self._need("resident")
        unchanged = resident_unchanged(resident.module)
        self.log.write("base", arm="resident", steps=resident.steps, unchanged=unchanged)

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
        before = held(self.subject.device)
        return Arm(name, self._module(backing), self.call, self.target, before)

    def _module(self, backing: Any) -> squareq_fx.CompiledModule:
        graph, model, slab = self._need("graph"), self.subject.on_meta(), self._need("slab")
        sizes = usual_sizes(graph, model, slab) if compiles(self.options.backend) else None
        return emit(graph, model, slab, backing=backing, backend=self.options.backend, value_of=sizes)

    def _beside_others(self, run: str, index: int, arm: Arm) -> None:
        """A step while other arms hold memory too, which its peak would count."""
        self.log.step(run, index, dataclasses.replace(arm.step(), peak_gib=None, reserved_gib=None))

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
