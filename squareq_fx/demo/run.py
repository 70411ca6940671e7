"""`squareq-fx demo`: the whole way, from the shipped model to a report, in one call."""

from __future__ import annotations

import tempfile
import time
import webbrowser
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import squareq_fx
from squareq_fx.demo.adapting import fine_tune
from squareq_fx.demo.environment import describe_environment
from squareq_fx.demo.figures import LayerFidelity
from squareq_fx.demo.finetune import Recipe
from squareq_fx.demo.judge import agreement, judge_available
from squareq_fx.demo.model import MODEL_DIR, load_digits_model
from squareq_fx.demo.report import PassRow, Report, Similarity, write_report
from squareq_fx.demo.results import SizeRow
from squareq_fx.demo.sampling import CLASSES, SIZE, STEPS, TIMESTEPS, grid_labels, sample_digits
from squareq_fx.demo.stages import Stages
from squareq_fx.demo.timeline import arena_spans, timeline_of
from squareq_fx.emit import CompiledModule
from squareq_fx.ir import functions
from squareq_fx.runtime import StepReport
from squareq_fx.slab import Slab
from squareq_fx.views.units import format_bytes

__all__ = ["run_demo"]

_COLUMNS = 8
_SEED = 0
_MEASURED_STEPS = 5
_ADAPTER = "digits_italic_lora"


def run_demo(
    output: Path, *, open_browser: bool = False, recipe: Recipe | None = None, compute: str = "w8a16"
) -> Path:
    """Draws the same digits in float and in INT8, streamed, teaches the latter a style, and writes a report.

    Args:
        output: the HTML file to write, or a directory (made if need be) for a `report.html`. The adapter goes into a
            directory `digits_italic_lora` beside it.
        open_browser: show it afterwards.
        recipe: how to fine-tune; default: `Recipe()`.
        compute: "w8a16", "w8a8" or "auto", how the streamed model computes when it draws.

    Returns:
        The absolute path of the report.

    Raises:
        OSError: the report cannot be written.
        SquareQError: `compute` is none of these.
    """
    console = Console()
    path = (output if output.suffix == ".html" else output / "report.html").resolve()
    with (
        tempfile.TemporaryDirectory(prefix="squareq_fx_demo_") as scratch,
        Stages(console) as stages,
        _one_thread(),
    ):
        report = _run(Path(scratch), path.parent / _ADAPTER, recipe or Recipe(), stages, compute)
        write_report(report, path)
    console.print(_summary(report))
    console.print(f"adapter: {report.tuning.adapter}", soft_wrap=True, highlight=False)
    if open_browser:
        webbrowser.open(path.as_uri())
    return path


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small are no work for two threads, which wait for each other when a core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(scratch: Path, adapter: Path, recipe: Recipe, stages: Stages, compute: str) -> Report:
    with stages.stage("load the model"):
        model = load_digits_model()
    with stages.stage("build the slab"):
        slab = squareq_fx.build_slab(model, scratch / "digits_int8", progress=False)
    with slab:
        return _compile_and_compare(model, slab, adapter, recipe, stages, compute)


def _compile_and_compare(
    model: torch.nn.Module, slab: Slab, adapter: Path, recipe: Recipe, stages: Stages, compute: str
) -> Report:
    with stages.stage("compile"):
        gm, capture_seconds = _compile(model, slab, compute)
    with stages.stage("draw digits in float", STEPS) as on_step:
        float_samples = sample_digits(model, columns=_COLUMNS, seed=_SEED, on_step=on_step)
    with stages.stage("draw digits in INT8, streamed", STEPS) as on_step:
        int8_samples = sample_digits(gm, columns=_COLUMNS, seed=_SEED, on_step=on_step)
    with stages.stage("compare and measure"):
        recognised = None
        if judge_available():
            labels = grid_labels(_COLUMNS)
            recognised = (agreement(float_samples, labels), agreement(int8_samples, labels))
        call, step = _measure_call(model, gm)
        timeline = timeline_of(step, arena_spans(gm.graph))
    with stages.stage("draw the graphs"):
        calls = Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_module")
        ((name, _),) = calls.most_common(1)
        top_level_svg, block_svg = squareq_fx.draw(gm), squareq_fx.draw(functions(gm)[name])
        code = squareq_fx.show(gm)
    gm.shutdown()
    tuning = fine_tune(model, slab, int8_samples, adapter, stages, columns=_COLUMNS, seed=_SEED, recipe=recipe)
    return Report(
        float_samples=float_samples,
        int8_samples=int8_samples,
        recognised=recognised,
        similarities=[call, Similarity.of("the drawn digits", int8_samples, float_samples)],
        layers=_fidelity(slab),
        top_level_svg=top_level_svg,
        block_name=name,
        block_svg=block_svg,
        top_level_code=code[code.rindex("def forward(") :],
        code=code,
        calls=calls.total(),
        functions=len(calls),
        timeline=timeline,
        tuning=tuning,
        sizes=_sizes(model, slab, step),
        passes=_passes(gm, capture_seconds),
        stages=tuple(stages.seconds),
        environment=describe_environment(gm.device),
    )


def _compile(model: torch.nn.Module, slab: Slab, compute: str) -> tuple[CompiledModule, float]:
    """The streamed module, and the seconds until its first stage, the captured graph, was there."""
    began, seen = time.perf_counter(), []
    gm = squareq_fx.compile(
        model, slab, compute=compute, progress=False, observe=lambda _: seen.append(time.perf_counter() - began)
    )
    return gm, seen[0]


@torch.no_grad()
def _measure_call(model: torch.nn.Module, gm: CompiledModule) -> tuple[Similarity, StepReport]:
    """Both models on the same half-noisy pictures, and the fastest of a few steps of the streamed one."""
    x = torch.randn(2 * CLASSES, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(_SEED))
    timestep = torch.full((len(x),), TIMESTEPS // 2)

    def call(denoiser: torch.nn.Module) -> torch.Tensor:
        return denoiser(x, timestep=timestep, class_labels=grid_labels(2), return_dict=False)[0]

    steps = []
    for _ in range(_MEASURED_STEPS):
        ours = call(gm)
        assert gm.last_step is not None  # it streams
        steps.append(gm.last_step)
    fastest = min(steps, key=lambda step: step.timing.step_ms)
    return Similarity.of("one call of the model", ours, call(model)), fastest


def _fidelity(slab: Slab) -> list[LayerFidelity]:
    def block_of(layer: str) -> str:
        return next((path for path in slab.block_paths if layer.startswith(f"{path}.")), "")

    return [LayerFidelity(name, block_of(name), *figures) for name, figures in slab.fidelity.items()]


def _sizes(model: torch.nn.Module, slab: Slab, step: StepReport) -> list[SizeRow]:
    shipped = sum(file.stat().st_size for file in MODEL_DIR.glob("*.safetensors"))
    in_memory = sum(tensor.nbytes for tensor in model.parameters())
    moved = f"by {step.loads} loads, {step.prefetch_hits} of them prefetched"
    return [
        SizeRow("float model, as shipped", shipped, "float16, one file"),
        SizeRow("float model, in memory", in_memory, "float32"),
        SizeRow("slab", slab.path.stat().st_size, "INT8 weights, scales, all other tensors, checksums"),
        SizeRow("arena", step.arena_bytes, "the only place of streamed weights on the device"),
        SizeRow("peak in the arena", step.peak_bytes_in_use, "most bytes held at a time during one step"),
        SizeRow("moved in one step", step.bytes_to_device, moved),
    ]


def _passes(gm: CompiledModule, capture_seconds: float) -> list[PassRow]:
    rows = []
    for index, stage in enumerate(gm.history):
        top, *inner = (len(m.graph.nodes) for m in (stage.graph, *functions(stage.graph).values()))
        seconds = stage.seconds if index else capture_seconds
        # What came first: it says more about a pass than what went.
        changes = ", ".join(sorted(stage.summary.split(", "), key=lambda change: change.startswith("-")))
        rows.append(PassRow(stage.name, top, len(inner), top + sum(inner), changes, seconds))
    return rows


def _summary(report: Report) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    call, timeline = report.similarities[0], report.timeline
    table.add_row("INT8 layers", str(len(report.layers)))
    table.add_row("cosine to float, one call", f"{call.cosine:.6f}")
    held, arena = format_bytes(timeline.peak_bytes), format_bytes(timeline.arena_bytes)
    table.add_row("peak in the arena", f"{held} of {arena}")
    if report.recognised:
        in_float, in_int8 = report.recognised
        table.add_row("digits recognised", f"{in_int8:.1%} in INT8, {in_float:.1%} in float")
    tuning = report.tuning
    table.add_row("loss on italic digits", _fall(tuning.curve.start, tuning.curve.end))
    if tuning.peft_curve is not None:
        table.add_row("the same, PEFT on float", _fall(tuning.peft_curve.start, tuning.peft_curve.end))
    table.add_row("base model after training", "unchanged" if tuning.base.is_unchanged else "CHANGED")
    table.add_row("time", f"{sum(seconds for _, seconds in report.stages):.0f} s")
    return table


def _fall(start: float, end: float) -> str:
    return f"{start:.3f} to {end:.3f}"
