"""From the log of `training.py`, one dict a line, to the tables of its report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["headline", "medians", "report"]

Entry = dict[str, Any]
_TIMES = ("step_ms", "forward_ms", "backward_ms", "optimizer_ms", "moved_gib", "copy_ms", "stall_ms", "stalls")
_TIMED = ("arm", "step ms (10 to 90 %)", "forward", "backward", "AdamW", "of peer", "GiB moved", "copies", "stalled", "stalls")
_ALONE = ("run", "arm", "steps", "step ms", "peak GiB, step 2", "last", "forecast", "reserved GiB, last", "loss, first", "last")
_GRADIENTS = ("pair", "tensors", "missing", "zero", "least cosine", "median", "loss")
PEAK_LIMITS = {"flux": 5.0, "sdxl": 4.0}  # GiB, streamed
STEP_LIMIT = 1.15  # streamed over resident
PEAK_GROWTH = 1.02  # last step over the second
LEAST_COSINE = 0.999


def report(entries: Sequence[Entry]) -> str:
    """The whole page in Markdown."""
    environment = next(e for e in entries if e["event"] == "environment")
    models = list(dict.fromkeys(e["model"] for e in entries if "model" in e))
    lines = [
        "# A LoRA step: bf16 with PEFT, INT8 resident, INT8 streamed",
        "",
        f"Command: `{environment['command']}`, {environment['date']}.",
        f"Hardware: {environment['hardware']}. Versions: {environment['versions']}.",
        environment["subject"],
        "",
        "A step is forward, loss and backward; AdamW is timed apart. Peaks are torch's largest `max_memory_allocated` and",
        "`max_memory_reserved` of a step, less what was held before the arm was made. The peer is the model with the slab's",
        "dequantised weights, resident, in eager mode, with PEFT's LoRA and gradient checkpointing; its attention may be",
        "flash, memory-efficient or plain, and its adapters have the model's dtype, as `add_adapter` makes them. Ours have",
        "float32 masters. The forecast is what `squareq_fx.forecast` said before the first step, AdamW's states added.",
    ]
    for model in models:
        lines += ["", *_model([e for e in entries if e.get("model") == model], model)]
    return "\n".join(lines) + "\n"


def medians(entries: Iterable[Entry], run: str) -> dict[str, dict[str, float]]:
    """By arm: the medians of a run's steps, with the count and the 10th and 90th percentile of the step."""
    arms: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry["event"] == "step" and entry["run"] == run:
            arms.setdefault(entry["arm"], []).append(entry)
    result = {}
    for arm, steps in arms.items():
        times = sorted(step["step_ms"] for step in steps)
        result[arm] = {key: statistics.median(step[key] for step in steps) for key in _TIMES} | {
            "count": len(steps),
            "low": times[len(times) // 10],
            "high": times[len(times) - 1 - len(times) // 10],
        }
    return result


def paired_ratio(entries: Iterable[Entry], numerator: str, denominator: str) -> float | None:
    """The median over the rounds of one arm's step over another's."""
    rounds: dict[int, dict[str, float]] = {}
    for entry in entries:
        if entry["event"] == "step" and entry["run"] == "interleaved":
            rounds.setdefault(entry["index"], {})[entry["arm"]] = entry["step_ms"]
    ratios = [r[numerator] / r[denominator] for r in rounds.values() if numerator in r and denominator in r]
    return statistics.median(ratios) if ratios else None


def headline(entries: Sequence[Entry], model: str) -> list[str]:
    """One line for each thing that was promised, with what was measured."""
    lines = []

    def promise(what: str, value: float, limit: float, good: bool, bound: str = "at most") -> None:
        lines.append(f"- {what}: {value:.6g} ({bound} {limit}): {_verdict(good)}")

    ratio = paired_ratio(entries, "streamed", "resident")
    if ratio is not None:
        promise("step, streamed over resident, median of pairs", ratio, STEP_LIMIT, ratio <= STEP_LIMIT)
    run = [e for e in entries if e["event"] == "step" and e["run"] == "training"]
    peaks = [e["peak_gib"] for e in run if e["peak_gib"] is not None]
    if len(peaks) > 1:
        limit = PEAK_LIMITS[model]
        promise(f"largest peak of {len(run)} streamed steps, GiB", max(peaks), limit, max(peaks) <= limit)
        growth = peaks[-1] / peaks[1]
        promise(f"peak of step {len(peaks)} over that of step 2", growth, PEAK_GROWTH, growth <= PEAK_GROWTH)
    for e in entries:
        if e["event"] == "base":
            lines.append(f"- base bytes unchanged after {e['steps']} steps, {e['arm']}: {_verdict(e['unchanged'])}")
        if e["event"] == "gradients" and e["pair"] == ["streamed", "peer"]:
            good = e["least"] >= LEAST_COSINE and not e["missing"] and not e["zero"]
            promise("least cosine of a gradient with the peer's", e["least"], LEAST_COSINE, good, "at least")
    return lines


def _verdict(good: bool) -> str:
    return "yes" if good else "NO"


def _model(entries: Sequence[Entry], model: str) -> list[str]:
    lines = [f"## {model}", "", *headline(entries, model), ""]
    timed = medians(entries, "interleaved")
    if timed:
        rounds = min(int(t["count"]) for t in timed.values())
        rows = [_timed_row(arm, t, timed.get("peer")) for arm, t in timed.items()]
        lines += [f"Medians of {rounds} rounds; in each, every arm takes one step.", "", *_table(_TIMED, rows), ""]
    alone = {key: steps for key, steps in _runs(entries).items() if key[0] not in ("interleaved", "warm-up")}
    if alone:
        rows = [_memory_row(run, arm, steps) for (run, arm), steps in alone.items()]
        lines += ["Runs of one arm alone, in this order:", "", *_table(_ALONE, rows), ""]
    compared = [e for e in entries if e["event"] == "gradients"]
    if compared:
        rows = [_gradient_row(e) for e in compared]
        lines += ["Gradients of every adapter tensor, the same random A and B everywhere:", "", *_table(_GRADIENTS, rows), ""]
    lines += [_sentence(e) for e in entries if e["event"] in ("trace", "note")]
    lines += [_floor(e, timed.get("streamed", {}).get("moved_gib", 0.0)) for e in entries if e["event"] == "ceilings"]
    losses = [f"{e['loss']:.5f}" for e in entries if e["event"] == "step" and e["run"] == "training"]
    if losses:
        lines += ["", f"Loss of each of the {len(losses)} steps: {' '.join(losses)}"]
    parts = [e for e in entries if e["event"] == "part"]
    told = [f"{e['part']} {e['seconds']:.1f} s{' FAILED' if e['error'] else ''}" for e in parts]
    lines += ["", f"Parts, in order: {', '.join(told)}"]
    for entry in parts:
        if entry["error"]:
            lines += ["", f"`{entry['part']}` failed:", "", "```text", entry["error"].rstrip(), "```"]
    return lines


def _sentence(entry: Entry) -> str:
    if entry["event"] == "note":
        return str(entry["text"])
    step, forward, busy, copies, under = (
        f"{entry[key]:.1f}" for key in ("step_ms", "forward_ms", "compute_ms", "copy_ms", "copy_under_compute_ms")
    )
    return (
        f"One streamed step under the profiler ({entry['picture']}): {step} ms, the forward {forward}; compute busy {busy}, "
        f"copies {copies}, of which {under} under compute."
    )


def _floor(entry: Entry, moved_gib: float) -> str:
    arithmetic = entry["operations"] / entry["product_rate"]
    copies = moved_gib * 2**30 / entry["copy_rate"]
    work, rate, bus = entry["operations"] / 1e12, entry["product_rate"] / 1e12, entry["copy_rate"] / 1e9
    return (
        f"No step can take less than its arithmetic, {work:.3g} TFLOP (recomputation included) at the {rate:.3g} TFLOP/s of a "
        f"large product: {arithmetic * 1e3:.1f} ms; a streamed one, nor than its copies at the {bus:.3g} GB/s of a large copy: "
        f"{copies * 1e3:.1f} ms."
    )


def _runs(entries: Iterable[Entry]) -> dict[tuple[str, str], list[Entry]]:
    runs: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry["event"] == "step":
            runs.setdefault((entry["run"], entry["arm"]), []).append(entry)
    return runs


def _timed_row(arm: str, t: dict[str, float], peer: dict[str, float] | None) -> list[str]:
    of_peer = f"{t['step_ms'] / peer['step_ms']:.2f}" if peer else "-"
    return [
        arm,
        f"{t['step_ms']:.1f} ({t['low']:.1f} to {t['high']:.1f})",
        *(f"{t[key]:.1f}" for key in ("forward_ms", "backward_ms", "optimizer_ms")),
        of_peer,
        f"{t['moved_gib']:.2f}",
        f"{t['copy_ms']:.1f}",
        f"{t['stall_ms']:.1f}",
        f"{t['stalls']:.0f}",
    ]


def _memory_row(run: str, arm: str, steps: Sequence[Entry]) -> list[str]:
    second, last = steps[min(1, len(steps) - 1)], steps[-1]
    return [
        run,
        arm,
        str(len(steps)),
        f"{statistics.median(step['step_ms'] for step in steps[1:] or steps):.1f}",
        _gib(second["peak_gib"]),
        _gib(last["peak_gib"]),
        _gib(last.get("forecast_gib")),
        _gib(last["reserved_gib"]),
        f"{steps[0]['loss']:.5f}",
        f"{last['loss']:.5f}",
    ]


def _gradient_row(entry: Entry) -> list[str]:
    return [
        " with ".join(entry["pair"]) + (" (equal bit for bit)" if entry["equal"] else ""),
        str(entry["compared"]),
        str(len(entry["missing"])),
        str(len(entry["zero"])),
        f"{entry['least']:.6f}",
        f"{entry['median']:.6f}",
        " / ".join(f"{loss:.5f}" for loss in entry["losses"]),
    ]


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
