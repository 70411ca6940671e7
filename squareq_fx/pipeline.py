"""Passes are run one after the other, and nothing a pass returns is believed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

from torch import fx

from squareq_fx.errors import PassError, SquareQError, VerificationError
from squareq_fx.ir import Level, Program, Stage, functions, info, program, set_info, update_program
from squareq_fx.verify import check, fingerprint

__all__ = ["Pass", "pass_name", "run"]

Pass = Callable[[fx.GraphModule], fx.GraphModule]
"""Any callable from graph to graph. Optional attributes: `name`; `requires_level`, the least `Level` it works on;
`changes_inputs = True`, if weight inputs come or go; `ensures(before, after)`, which raises if the promise is broken."""


@runtime_checkable
class _Ensures(Protocol):
    def ensures(self, before: fx.GraphModule, after: fx.GraphModule) -> None: ...


def pass_name(transform: Pass) -> str:
    """What a pass is called in the history and by `until=`."""
    return str(getattr(transform, "name", None) or getattr(transform, "__name__", None) or type(transform).__name__)


def run(
    gm: fx.GraphModule,
    passes: Iterable[Pass],
    *,
    until: str | None = None,
    observe: Callable[[Stage], None] | None = None,
) -> fx.GraphModule:
    """Apply `passes` in order, with the same checks after each.

    requires -> pass -> input untouched -> rules of the IR (`verify.check`) -> inputs the same -> ensures -> history.

    Args:
        gm: what `capture` or an earlier `run` returned; it is not changed.
        until: stop after the pass of this name.
        observe: called with each new stage; printing and progress go here.

    Raises:
        PassError: a pass refuses the graph, does not keep its promise, or `until` names no pass.
        VerificationError: a pass returned a broken graph; the message names the pass, the node and the model's source.
    """
    passes = tuple(passes)
    names = [pass_name(p) for p in passes]
    if until is not None and until not in names and until != "capture":
        raise PassError(f"until={until!r} names no pass; the passes are capture, {', '.join(names)}")
    if not program(gm).history:
        check(gm)
        gm = _record(gm, gm, "capture", program(gm).capture_seconds, observe)
    if until == "capture":
        return gm
    for transform, name in zip(passes, names):
        start = time.perf_counter()
        result = _apply(gm, transform, name)
        gm = _record(result, gm, name, time.perf_counter() - start, observe)
        if name == until:
            break
    return gm


def _apply(gm: fx.GraphModule, transform: Pass, name: str) -> fx.GraphModule:
    level = program(gm).level
    required = getattr(transform, "requires_level", Level.CAPTURED)
    if level < required:
        raise PassError(f"pass {name} needs a graph that is {required.name.lower()}, this one is {level.name.lower()}")
    before = fingerprint(gm)
    try:
        result = transform(gm)
    except SquareQError as error:
        raise _named(error, name) from error
    if not isinstance(result, fx.GraphModule):
        raise PassError(f"pass {name} returned {type(result).__name__}, not a GraphModule; return the changed copy")
    if result is gm:
        raise PassError(f"pass {name} returned its own input; work on squareq_fx.ir.clone(gm) and return that")
    if fingerprint(gm) != before:
        raise PassError(f"pass {name} changed its input; work on squareq_fx.ir.clone(gm) and return that")
    if "squareq" not in result.meta:
        raise PassError(f"pass {name} lost the program record; start from squareq_fx.ir.clone(gm)")
    _stamp(result, gm, name)
    try:
        check(result)
        _check_inputs(gm, result, bool(getattr(transform, "changes_inputs", False)))
        if isinstance(transform, _Ensures):
            transform.ensures(gm, result)
    except SquareQError as error:
        raise _named(error, name) from error
    return result


def _named(error: SquareQError, name: str) -> SquareQError:
    kind = type(error) if type(error) in (PassError, VerificationError) else PassError
    return kind(f"pass {name}: {error}")


def _stamp(result: fx.GraphModule, before: fx.GraphModule, name: str) -> None:
    """Nodes a pass made without saying so carry its name, and the source of what they read."""
    known = {n.name for g in (before, *functions(before).values()) for n in g.graph.nodes}
    for graph in (result, *functions(result).values()):
        for node in graph.graph.nodes:
            if node.name in known or info(node).made_by is not None or node.op == "output":
                continue
            set_info(node, made_by=name)
            source = next((a for a in node.all_input_nodes if a.meta.get("stack_trace")), None)
            if source is not None and not node.meta.get("stack_trace"):
                node.meta["stack_trace"] = source.meta["stack_trace"]
                node.meta["nn_module_stack"] = source.meta.get("nn_module_stack")


def _check_inputs(before: fx.GraphModule, after: fx.GraphModule, weights_may_change: bool) -> None:
    def inputs(gm: fx.GraphModule, kind: str) -> list[str]:
        return [str(info(n).key) for n in gm.graph.nodes if n.op == "placeholder" and info(n).kind == kind]

    if inputs(before, "input") != inputs(after, "input"):
        raise VerificationError(f"the call's inputs were {inputs(before, 'input')} and are now {inputs(after, 'input')}")
    unknown = [n for n in after.graph.nodes if n.op == "placeholder" and info(n).kind not in ("input", "weight", "adapter")]
    if unknown:
        raise VerificationError(f"input {unknown[0].name} has no record; add weights with squareq_fx.edit.add_weight")
    for kind in ("weight", "adapter"):
        if not weights_may_change and inputs(before, kind) != inputs(after, kind):
            changed = sorted(set(inputs(before, kind)) ^ set(inputs(after, kind)))
            raise VerificationError(f"{kind} inputs came or went ({', '.join(changed[:3])}); declare changes_inputs = True")


def _record(
    gm: fx.GraphModule, before: fx.GraphModule, name: str, seconds: float, observe: Callable[[Stage], None] | None
) -> fx.GraphModule:
    record: Program = program(before)
    stage = Stage(name, gm, seconds, _summary(before, gm))
    if observe is not None:
        observe(stage)
    return update_program(gm, history=(*record.history, stage))


def _summary(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """How the operations changed: `-504 aten.linear.default, +504 squareq.int8_linear.default`."""
    old, new = _operations(before), _operations(after)
    if before is after:
        return f"{sum(new.values())} operations"
    parts = [f"-{n} {name}" for name, n in sorted((old - new).items())] + [
        f"+{n} {name}" for name, n in sorted((new - old).items())
    ]
    return ", ".join(parts) or "no operation changed"


def _operations(gm: fx.GraphModule) -> Counter[str]:
    count = Counter(_operation(n) for n in gm.graph.nodes if n.op.startswith("call"))
    for child in functions(gm).values():
        count.update(_operations(child))
    return count


def _operation(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"call {node.target}"
    target = node.target
    return str(target) if not isinstance(target, type(len)) else f"{target.__module__.strip('_')}.{target.__name__}"
