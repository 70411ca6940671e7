"""From the log of `peers.py` to its tables and its plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw", "report"]

Entry = dict[str, Any]
Shape = tuple[int, int, int]
_SLOWEST = 1 / 16  # ratio to cuBLAS at the lower edge of the plot
_TIMING = (
    "Each cell: time in us, how many times as fast as cuBLAS in bf16, relative L2 error against float64. Times are device "
    "times, medians over replays of CUDA graphs (`loop`: of calls in a row, where an arm cannot be captured), beside the "
    "bf16 layer in the same process, the two in turn, over sets of buffers that pass four times the L2 cache. They include "
    "the bias and whatever an arm does to the activations. The floors are the card's measured ceilings: the larger of the "
    "arithmetic at the rate of an 8192 x 8192 x 8192 product and the bytes of x, weight and y at the rate of a 1 GiB copy."
)


def report(entries: Sequence[Entry], shapes: Mapping[str, Sequence[Shape]]) -> str:
    """The whole page in Markdown."""
    run = next(e for e in entries if e.get("event") == "run")
    entries = sorted(entries, key=lambda e: run["arms"].index(e["arm"]) if e.get("arm") in run["arms"] else -1)
    versions = {e["arm"]: e["version"] for e in entries if e.get("event") == "arm"}
    card = next((e for e in entries if e.get("event") == "ceilings"), None)
    lines = ["# Ours beside other INT8 packages", "", f"Command: `{run['command']}`, {run['date']}.", ""]
    lines += [f"Python {run['python']}; {', '.join(f'{arm} {version}' for arm, version in versions.items())}."]
    if card:
        lines += [f"{card['card']}; copy {_tera(card['copy_bytes_per_s'])} TB/s, bf16 {_tera(card['bf16_per_s'])} TFLOP/s, "]
        lines[-1] += f"int8 {_tera(card['int8_per_s'])} TOP/s."
    if any(e.get("part") == "layers" for e in entries):
        lines += ["", "## layers", "", _TIMING, *_layers(entries, shapes, card)]
    for part, table in (("models", _models), ("train", _train)):
        for model in dict.fromkeys(e["model"] for e in entries if e.get("part") == part and "model" in e):
            own = [e for e in entries if e.get("part") == part and e.get("model", model) == model]
            lines += ["", f"## {part}: {model}", "", *table(own)]
    notes = list(dict.fromkeys(_note(e) for e in entries if e.get("missing") or e.get("error")))
    if notes:
        lines += ["", "## Notes", "", *notes]
    return "\n".join(lines) + "\n"


def _note(entry: Entry) -> str:
    where = [entry["part"], entry.get("model"), entry.get("arm"), _size(entry["shape"]) if "shape" in entry else None]
    what = f"not installed ({entry['missing']})" if entry.get("missing") and not entry.get("event") else entry.get("error")
    return f"- {', '.join(str(word) for word in where if word)}: {what or 'gradients are missing'}"


def _layers(entries: Sequence[Entry], shapes: Mapping[str, Sequence[Shape]], card: Entry | None) -> list[str]:
    found = {(e["arm"], tuple(e["shape"])): e for e in entries if e.get("part") == "layers" and "ms" in e}
    failed = {(e["arm"], tuple(e["shape"])) for e in entries if e.get("part") == "layers" and e.get("error") and "shape" in e}
    arms = _arms(e for e in entries if e.get("part") == "layers" and e.get("arm") != "ceilings")
    absent = _by_arm([e for e in entries if e.get("part") == "layers"])[2]
    lines = []
    for family, sizes in shapes.items():
        rows = []
        for shape in sizes:
            beside = [e for (_, size), e in found.items() if size == shape]
            middle = statistics.median(e["baseline_ms"] for e in beside) * 1e3 if beside else 0.0
            first = f"{middle:.1f}, {beside[0]['baseline_l2']:.1e}" if beside else "-"
            cells = [_cell(found.get((arm, shape)), (arm, shape) in failed) for arm in arms]
            rows.append([_size(shape), *_floors(shape, card), first, *cells])
        means = []
        for arm in arms:
            ratios = [found[arm, shape]["ratio"] for shape in sizes if (arm, shape) in found]
            whole = len(ratios) == len(sizes)
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0
            means.append((f"{mean:.2f}x" + ("" if whole else f" of {len(ratios)}")) if ratios else absent.get(arm, "-"))
        rows.append(["geometric mean", "", "", "", *means])
        header = ["MxNxK", "floor bf16", "floor int8", "cuBLAS bf16", *arms]
        lines += ["", f"### {family}", "", *_table(header, rows)]
    return lines


def _cell(entry: Entry | None, failed: bool) -> str:
    if entry is None:
        return "fails" if failed else "-"
    how = " loop" if entry["how"] == "loop" else ""
    return f"{entry['ms'] * 1e3:.1f}, {entry['ratio']:.2f}x, {entry['l2']:.1e}{how}"


def _floors(shape: Shape, card: Entry | None) -> list[str]:
    if card is None:
        return ["-", "-"]
    m, n, k = shape
    times = []
    for rate, width in ((card["bf16_per_s"], 2), (card["int8_per_s"], 1)):
        moved = 2 * m * k + width * n * k + 2 * m * n
        times.append(max(2 * m * n * k / rate, moved / card["copy_bytes_per_s"]))
    return [f"{seconds * 1e6:.1f}" for seconds in times]


def _models(entries: Sequence[Entry]) -> list[str]:
    timed, compared, missing = _by_arm(entries)
    base = timed.get("bf16", {}).get("ms")
    rows = []
    for arm in _arms(entries):
        if arm in timed:
            e = timed[arm]
            cosine = f"{compared[arm]['cosine']:.5f}" if arm in compared else "-"
            rows.append([arm, _span(e), _times(base, e["ms"]), cosine, _gib(e["peak_gib"]), f"{e['prepare_s']:.0f}"])
        else:
            rows.append([arm, missing.get(arm, "-"), "-", "-", "-", "-"])
    header = ("arm", "forward ms (10 to 90 %)", "times as fast as bf16 eager", "cosine to bf16", "peak GiB")
    return _table((*header, "prepared in s"), rows)


def _train(entries: Sequence[Entry]) -> list[str]:
    timed, compared, missing = _by_arm(entries)
    base = timed.get("bf16", {}).get("ms")
    rows = []
    for arm in _arms(entries):
        seen = compared.get(arm)
        cosines = f"{seen['least']:.4f} / {seen['median']:.4f}" if seen else "-"
        if arm not in timed:
            rows.append([arm, missing.get(arm, "-"), "-", "-", cosines, "-"])
        elif seen is None:
            rows.append([arm, "not checked: bf16 was not measured", "-", "-", "-", "-"])
        elif not seen["good"]:
            why = f"loses gradients ({seen['missing']} missing, {seen['zero']} zero)"
            why = why if seen["missing"] or seen["zero"] else "its gradients point elsewhere"
            rows.append([arm, why, "-", "-", cosines, "-"])
        else:
            e = timed[arm]
            rows.append([arm, _span(e), f"{e['forward_ms']:.1f}", _times(base, e["ms"]), cosines, _gib(e["peak_gib"])])
    header = ("arm", "step ms (10 to 90 %)", "of it forward", "times as fast as bf16 eager", "cosine to bf16, least / median")
    return _table((*header, "peak GiB"), rows)


def _by_arm(entries: Sequence[Entry]) -> tuple[dict[str, Entry], dict[str, Entry], dict[str, str]]:
    timed = {e["arm"]: e for e in entries if "arm" in e and "ms" in e}
    compared = {e["arm"]: e for e in entries if e.get("event") == "compared"}
    failed = {e["arm"]: e["error"] for e in entries if e.get("error")}
    missing = {arm: "not measured" if error.startswith("not measured") else "fails" for arm, error in failed.items()}
    return timed, compared, missing | {e["arm"]: "not installed" for e in entries if isinstance(e.get("missing"), str)}


def draw(entries: Sequence[Entry], folder: Path) -> None:
    """peers-PART.png for every part that has a time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = [e for e in entries if e.get("part") == "layers" and "ms" in e]
    if layers:
        shapes = list(dict.fromkeys(tuple(e["shape"]) for e in sorted(layers, key=lambda e: -math.prod(e["shape"]))))
        figure, axes = pyplot.subplots(figsize=(max(7.0, 1.5 + 0.55 * len(shapes)), 5.2))
        for index, arm in enumerate(_arms(layers)):
            own = {tuple(e["shape"]): e["ratio"] for e in layers if e["arm"] == arm}
            known = [i for i, shape in enumerate(shapes) if shape in own]
            axes.plot(
                known,
                [max(own[shapes[i]], 1.05 * _SLOWEST) for i in known],  # what is slower yet lies at the lower edge
                marker="os^vD<>P"[index % 8],
                linestyle="-" if arm.startswith("ours") else ":",
                linewidth=2.0 if arm.startswith("ours") else 0.8,
                color=f"C{index}" if index < 10 else "0.4",
                label=arm,
            )
        axes.axhline(1.0, color="0.3", linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.set_ylim(bottom=max(_SLOWEST, 0.8 * min(e["ratio"] for e in layers)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{round(1 / value)}")
        axes.set_xticks(range(len(shapes)), [_size(shape) for shape in shapes], rotation=60, ha="right", fontsize=8)
        axes.set_ylabel("times as fast as cuBLAS bf16")
        axes.grid(axis="y", linewidth=0.4)
        axes.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        _save(figure, folder / "peers-layers.png", pyplot)
    for part, unit in (("models", "ms a forward"), ("train", "ms a step")):
        good = {(e["model"], e["arm"]) for e in entries if e.get("event") == "compared" and e.get("good", True)}
        timed = [e for e in entries if e.get("part") == part and "ms" in e]
        timed = [e for e in timed if part == "models" or (e["model"], e["arm"]) in good]
        models = list(dict.fromkeys(e["model"] for e in timed))
        if not models:
            continue
        figure, all_axes = pyplot.subplots(1, len(models), figsize=(6.0 * len(models), 4.2), squeeze=False)
        for axes, model in zip(all_axes[0], models, strict=True):
            own = sorted((e["ms"], e["arm"]) for e in timed if e["model"] == model)
            colours = ["C0" if arm.startswith("ours") else "0.35" if arm.startswith("bf16") else "0.7" for _, arm in own]
            bars = axes.barh([arm for _, arm in own], [ms for ms, _ in own], color=colours)
            axes.margins(x=0.12)
            axes.bar_label(bars, fmt="%.0f" if own[-1][0] > 100 else "%.1f", padding=3, fontsize=8)
            axes.invert_yaxis()
            axes.set_title(model)
            axes.set_xlabel(unit)
        _save(figure, folder / f"peers-{part}.png", pyplot)


def _save(figure: Any, path: Path, pyplot: Any) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _arms(entries: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(e["arm"] for e in entries if "arm" in e))


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _span(entry: Entry) -> str:
    return f"{entry['ms']:.1f} ({entry['low']:.1f} to {entry['high']:.1f})"


def _times(base: float | None, ms: float) -> str:
    return f"{base / ms:.2f}" if base else "-"


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _tera(value: float) -> str:
    return f"{value / 1e12:.3g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
