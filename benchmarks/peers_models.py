"""Parts "models" and "train" of `peers.py`: a forward of a whole model, a LoRA step on it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from filelock import FileLock
from peers_arms import add_lora, compiled, is_ours, linear_rows, ours, peer_of, raise_limits
from peers_schedule import Line, Row
from peers_timing import quick_tuning, retune, settle, synchronize
from streaming import first_output
from torch import nn
from training_arms import GIB, Arm, compare, held, random_values
from training_models import Subject

import squareq_fx
from squareq_fx.auto.deciding import decisions_for
from squareq_fx.compute import ERROR_BUDGET
from squareq_fx.lora import Lora

__all__ = ["compared", "models", "train"]

LEAST_MEDIAN_COSINE = 0.9  # of an arm's gradients with those of bf16; int8 weights alone give more than 0.99


def models(line: Line, tasks: Sequence[str], options: Mapping[str, Any]) -> None:
    """The forward of every arm, without gradients; its output goes to a file of `options["scratch"]`."""
    for arm, subject in _begin(line, tasks, options):
        call = subject.call()
        with line.attempt(arm=arm, model=subject.name), torch.no_grad():
            start = time.perf_counter()
            module = _ours(line, arm, subject, options) if is_ours(arm) else _peer(arm, subject, call)
            for _ in range(2):
                output = first_output(module, call)
            synchronize()
            prepared = time.perf_counter() - start
            with line.alone():
                settle()
                retune()
                times, peak = _times(lambda module=module, call=call: first_output(module, call), options["repeats"])
            torch.save(output.float().cpu(), _file(options, "models", subject.name, arm))
            line.say(arm=arm, model=subject.name, **_summary(times), peak_gib=peak, prepare_s=prepared)
            _shut_down(module)
        module = output = None


def train(line: Line, tasks: Sequence[str], options: Mapping[str, Any]) -> None:
    """LoRA steps of every arm; the gradients at the same random A and B go to a file of `options["scratch"]`."""
    for name, subject in _begin(line, tasks, options):
        call = subject.call()
        with line.attempt(arm=name, model=subject.name):
            lora = Lora(rank=options["rank"], alpha=options["rank"], targets="attention")
            start = time.perf_counter()
            before = held(subject.device)
            module = _ours(line, name, subject, options, lora=lora) if is_ours(name) else _peer(name, subject, call, lora)
            arm = Arm(name, module, call, subject.target(call), before, is_peer=not is_ours(name))
            loss, gradients = arm.gradients(random_values(arm.adapters))
            torch.save((sorted(arm.adapters), gradients), _file(options, "train", subject.name, name))
            arm.step()
            synchronize()
            prepared = time.perf_counter() - start
            with line.alone():
                settle()
                retune()
                arm.step()
                steps = [arm.step() for _ in range(options["repeats"])]
            row: Row = {"loss": loss, "peak_gib": steps[-1].peak_gib, "prepare_s": prepared}
            row["forward_ms"] = statistics.median(step.forward_ms for step in steps)
            row["optimizer_ms"] = statistics.median(step.optimizer_ms for step in steps)
            line.say(arm=name, model=subject.name, **_summary([step.step_ms for step in steps]), **row)
            _shut_down(module)
        module = arm = None


def compared(part: str, scratch: str) -> list[Row]:
    """Rows that say how near each arm's output or gradients are to those of bf16, from the files the arms wrote."""
    rows = []
    for file in sorted(Path(scratch).glob(f"{part}-*.pt")):
        _, model, name = file.stem.split("~")
        reference = file.with_name(f"{part}-~{model}~bf16.pt")
        if not reference.exists():
            continue
        found, wanted = torch.load(file), torch.load(reference)
        row: Row = {"event": "compared", "part": part, "model": model, "arm": name}
        if part == "models":
            row["cosine"] = float(torch.cosine_similarity(found.double().flatten(), wanted.double().flatten(), 0))
        else:
            row |= _gradients(*found, wanted[1])
        rows.append(row)
    return rows


def _gradients(adapters: Sequence[str], ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> Row:
    missing = [name for name in adapters if name not in ours] + [name for name in theirs if name not in adapters]
    if not ours.keys() & theirs.keys():
        return {"missing": len(missing), "zero": 0, "least": 0.0, "median": 0.0, "good": False}
    found = compare(ours, theirs)
    good = not missing and not found["zero"] and found["median"] >= LEAST_MEDIAN_COSINE
    cosines = {"least": found["least"], "median": found["median"]}
    return {"missing": len(missing), "zero": len(found["zero"]), **cosines, "good": good}


def _begin(line: Line, tasks: Sequence[str], options: Mapping[str, Any]) -> Iterable[tuple[str, Subject]]:
    quick_tuning()
    raise_limits()
    diffusers_logging.set_verbosity_error()
    subject = Subject(options["model"], options["tiny"], options["size"], options["batch"])
    for arm in tasks:
        line.task(arm)
        gc.collect()
        held(subject.device)
        with line.attempt(arm=arm, model=subject.name):
            version = squareq_fx.__version__ if is_ours(arm) else peer_of(arm).version()
            line.say(event="arm", arm=arm, model=subject.name, version=version)
            yield arm, subject


def _peer(arm: str, subject: Subject, call: Mapping[str, Any], lora: Lora | None = None) -> Any:
    model: Any = subject.random()
    with torch.no_grad():
        rows = linear_rows(model, lambda: model(**call))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sizes = {name: (linears[name].in_features, linears[name].out_features) for name in rows}
    del linears
    peer_of(arm).quantise(model, rows, lora is not None)
    if lora is not None:
        torch.manual_seed(3)
        like = torch.empty(0, device=subject.device, dtype=subject.dtype)
        add_lora(model, {name: sizes[name] for name in lora.layers(rows)}, lora.rank, like)
        model.enable_gradient_checkpointing()
        model.train()
    held(subject.device)
    return compiled(arm, model, subject.tiny)


def _ours(line: Line, arm: str, subject: Subject, options: Mapping[str, Any], **how: Any) -> squareq_fx.CompiledModule:
    slab = _slab(subject, Path(options["slabs"] or options["scratch"]))
    held(subject.device)
    kind: dict[str, Any] = {"progress": False, **ours(arm)}
    if subject.tiny:
        kind["backend"] = "eager"
    model = subject.on_meta()
    if kind["compute"] == "auto":  # what it decides by is timed with the card to itself, and found beside the slab by `compile`
        captured = squareq_fx.capture(model, slab=slab, device=subject.device)
        with line.alone():
            settle()
            start = time.perf_counter()
            decisions_for(captured, model, slab, error_budget=ERROR_BUDGET, progress=False)
            line.say(event="decided", arm=arm, model=subject.name, seconds=time.perf_counter() - start)
    return squareq_fx.compile(model, slab, device=subject.device, **kind, **how)


def _slab(subject: Subject, folder: Path) -> squareq_fx.Slab:
    """The model's, built by the first process that asks; others wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"slab-{subject.name}"
    with FileLock(f"{path}.lock"):
        if path.with_suffix(".safetensors").exists():
            return squareq_fx.open_slab(path)
        return squareq_fx.build_slab(subject.random(), path, progress=False)


def _shut_down(module: Any) -> None:
    if isinstance(module, squareq_fx.CompiledModule):
        module.shutdown()


def _times(step: Callable[[], object], repeats: int) -> tuple[list[float], float | None]:
    """Milliseconds of each step after one more to warm up, and the peak of device memory in GiB."""
    step()
    times: list[float] = []
    if not torch.cuda.is_available():
        for _ in range(repeats):
            begin = time.perf_counter()
            step()
            times.append((time.perf_counter() - begin) * 1e3)
        return times, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times, torch.cuda.max_memory_allocated() / GIB


def _summary(times: Sequence[float]) -> Row:
    ranked = sorted(times)
    return {
        "ms": statistics.median(ranked),
        "low": ranked[len(ranked) // 10],
        "high": ranked[len(ranked) - 1 - len(ranked) // 10],
        "count": len(ranked),
    }


def _file(options: Mapping[str, Any], part: str, model: str, name: str) -> Path:
    return Path(options["scratch"]) / f"{part}-~{model}~{name}.pt"
