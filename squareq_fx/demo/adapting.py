"""Teaches the streamed INT8 model a style by a LoRA adapter, beside PEFT on the float model."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path

import torch

import squareq_fx
from squareq_fx import CompiledModule
from squareq_fx.demo.finetune import Batch, Curve, Recipe, evaluate, flow_matching_loss, predict, train
from squareq_fx.demo.judge import agreement, fit_judge, judge_available
from squareq_fx.demo.lesson import Lesson, make_lesson
from squareq_fx.demo.model import load_digits_model
from squareq_fx.demo.peft_arm import inject, peft_available
from squareq_fx.demo.results import BaseCheck, FineTuning, SizeRow, StyleRow
from squareq_fx.demo.sampling import STEPS, sample_digits
from squareq_fx.demo.stages import Advance, Stages
from squareq_fx.demo.style import slant
from squareq_fx.demo.timeline import Timeline, arena_spans, timeline_of
from squareq_fx.runtime import StepReport
from squareq_fx.slab import Slab

__all__ = ["fine_tune"]


def fine_tune(
    model: torch.nn.Module,
    slab: Slab,
    drawn: torch.Tensor,
    folder: Path,
    stages: Stages,
    *,
    columns: int,
    seed: int,
    recipe: Recipe,
) -> FineTuning:
    """Compiles with an adapter, trains it, saves it, and draws with the one read from its file.

    Args:
        model: the float model; it is not changed.
        drawn: samples of a compiled module without adapters, of so many columns and from noise of this seed.
        folder: where the adapter goes, in diffusers' format.
    """
    digest = _sha256(slab.path)
    with stages.stage("make digits italic"):
        lesson = make_lesson(model, recipe, held_out=columns)
    with ExitStack() as stack:
        with stages.stage("compile with an adapter"):
            gm = _compile(model, slab, recipe)
            stack.callback(gm.shutdown)
            start = gm.get_adapter()
        with stages.stage("fine-tune, INT8 streamed", recipe.steps) as advance:
            curve = _train(gm, list(gm.adapter_parameters().values()), lesson, recipe, advance)
            steps = _training_step(gm, lesson.batches[-1])
        with stages.stage("draw, adapter off", STEPS) as advance:
            gm.disable_lora()
            before = sample_digits(gm, columns=columns, seed=seed, on_step=advance)
            gm.enable_lora()
        file, reloaded = _through_file(gm, folder, lesson.held_out)
        with stages.stage("draw, adapter from its file", STEPS) as advance:
            after = sample_digits(gm, columns=columns, seed=seed, on_step=advance)
        timeline = _timeline(gm, steps)
    peft_after, peft_curve = None, None
    if peft_available():
        with stages.stage("fine-tune, PEFT on float", recipe.steps) as advance:
            peft_model = load_digits_model()
            peft_curve = _train(peft_model, list(inject(peft_model, start).values()), lesson, recipe, advance)
        with stages.stage("draw, PEFT on float", STEPS) as advance:
            peft_after = sample_digits(peft_model, columns=columns, seed=seed, on_step=advance)
    with stages.stage("judge the style"):
        return FineTuning(
            recipe=recipe,
            source=lesson.source,
            targets=lesson.styled.held_out.images,
            before=before,
            after=after,
            peft_after=peft_after,
            curve=curve,
            peft_curve=peft_curve,
            upright_loss=evaluate(model, lesson.upright_held_out),
            layers=len(start.layers),
            parameters=sum(layer.down.numel() + layer.up.numel() for layer in start.layers.values()),
            rows=_judge(lesson, before, after, peft_after),
            base=BaseCheck(digest, _sha256(slab.path), drawn.numel(), int((before != drawn).sum()), reloaded),
            sizes=_sizes(steps, timeline, file),
            timeline=timeline,
            adapter=file,
        )


def _compile(model: torch.nn.Module, slab: Slab, recipe: Recipe) -> CompiledModule:
    """The random half of the adapter comes from torch's own generator, which is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        lora = squareq_fx.Lora(rank=recipe.rank, targets=recipe.targets)
        return squareq_fx.compile(model, slab, lora=lora, progress=False)


def _train(
    denoiser: torch.nn.Module,
    parameters: list[torch.nn.Parameter],
    lesson: Lesson,
    recipe: Recipe,
    advance: Advance,
) -> Curve:
    def show(done: int, loss: float) -> None:
        advance(done, f"loss {loss:.3f}")

    return train(denoiser, parameters, lesson.batches, lesson.held_out, recipe, show)


def _training_step(gm: CompiledModule, batch: Batch) -> list[StepReport]:
    """Forward and backward once more, to look at: nothing is updated."""
    assert gm.runtime is not None  # it streams
    flow_matching_loss(gm, batch).backward()
    for parameter in gm.adapter_parameters().values():
        parameter.grad = None
    return list(gm.runtime.history)[-2:]


def _timeline(gm: CompiledModule, steps: list[StepReport]) -> Timeline:
    assert gm.training_step is not None  # it was compiled with an adapter
    halves = gm.training_step.halves
    return timeline_of(steps, arena_spans(halves.forward.graph, halves.backward.graph))


def _through_file(gm: CompiledModule, folder: Path, batch: Batch) -> tuple[Path, float]:
    """Writes the adapter and puts in its place what the file holds; the path, and the largest difference of a call."""
    with torch.no_grad():
        trained = predict(gm, batch)
        file = gm.save_lora_adapter(folder, "default", format="diffusers")
        gm.delete_adapters("default")
        gm.load_lora_adapter(folder, "default")
        return file, (predict(gm, batch) - trained).abs().max().item()


def _judge(lesson: Lesson, before: torch.Tensor, after: torch.Tensor, peft_after: torch.Tensor | None) -> list[StyleRow]:
    """Each set of digits against judges that were shown upright digits only, and italic ones only."""
    sets = {"adapter off": before, "adapter on": after}
    if peft_after is not None:
        sets["PEFT on the float model"] = peft_after
    sets["held-out digits, upright"] = lesson.plain.held_out.images
    sets["held-out digits, made italic"] = lesson.styled.held_out.images
    judges = [fit_judge(part.training) for part in (lesson.plain, lesson.styled)] if judge_available() else []
    labels = lesson.plain.held_out.labels
    rows = []
    for what, images in sets.items():
        upright, ital = [agreement(images, labels, judge) for judge in judges] or (None, None)
        rows.append(StyleRow(what, slant(images), upright, ital))
    return rows


def _sizes(steps: list[StepReport], timeline: Timeline, file: Path) -> list[SizeRow]:
    forward, backward = steps
    blocks = {stay.name: stay.nbytes for stay in timeline.stays}
    loads, hits = (forward.loads + backward.loads, forward.prefetch_hits + backward.prefetch_hits)
    return [
        SizeRow("all streamed weights", sum(blocks.values()), "INT8 with scales, and what else a block has"),
        SizeRow("arena", timeline.arena_bytes, "the only place of streamed weights, in both directions"),
        SizeRow("moved, forward", forward.bytes_to_device, f"{forward.loads} loads"),
        SizeRow("moved, backward", backward.bytes_to_device, f"{backward.loads} loads; {hits} of all {loads} found ready"),
        SizeRow("adapter file", file.stat().st_size, "float32, in diffusers' format"),
    ]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
