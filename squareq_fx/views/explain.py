"""How each int8 layer of a graph computes, and why, as a table to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import fx

from squareq_fx import ops
from squareq_fx.attention_op import attention_summary
from squareq_fx.compute import Decision, role_of
from squareq_fx.ir import Level, functions, info, program
from squareq_fx.specs import short_spec

__all__ = ["compute_summary", "decision_rows", "explain"]

_HEAD = ("layers", "x", "out x in", "rows", "compute", "error", "w8a16 ms", "w8a8 ms", "why")


def explain(gm: fx.GraphModule, *, by_layer: bool = False) -> str:
    """The layers of a graph or compiled module: how many compute how, and for each role what was measured and decided.

    A role is one place in the blocks of one kind (`blocks.*.attn.to_q`); roles are split where their layers differ. Errors are
    the largest of the role, times the sum of its layers. Where nothing was decided, these columns are empty.

    Args:
        by_layer: a line for each layer instead.

    Raises:
        PassError: the graph was not made by `squareq_fx.capture`.
    """
    record = program(gm)
    flat = next((s.graph for s in reversed(record.history) if s.name == "quantize"), gm)
    if program(flat).level < Level.QUANTIZED:
        return "no layer is int8 yet: the graph was not quantised"
    layers: dict[str, Decision] = {}
    shapes: dict[str, str] = {}
    for node in flat.graph.nodes:
        if node.target is ops.int8_linear:
            name = str(info(node).layer)
            mode = node.args[5] if len(node.args) > 5 else "w8a16"
            known = record.decisions.layers.get(name) if record.decisions is not None else None
            layers[name] = known if known is not None and known.mode == mode else Decision(mode, "")  # type: ignore[arg-type]
            out, x = node.meta["val"].shape[-1], node.args[0].meta["val"]  # type: ignore[union-attr]
            shapes[name] = f"{out} x {x.shape[-1]}, {short_spec(x).partition('[')[0]}"
    count = Counter(decision.mode for decision in layers.values())
    lines = [f"{len(layers)} int8 layers: " + ", ".join(f"{count[mode]} {mode}" for mode in sorted(count))]
    lines += record.decisions.notes if record.decisions is not None else ()
    attention = attention_summary(record.history[-1].graph if record.history else gm)
    lines += [f"attention: {attention}"] if attention else []
    return "\n".join([*lines, *_table(decision_rows(layers, shapes, () if by_layer else record.block_paths, by_layer))])


def compute_summary(gm: fx.GraphModule) -> str:
    """How many calls of layers compute how, those of a function counted once for each call; empty if all are w8a16."""
    children = functions(gm)
    calls = Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_module")
    count: Counter[str] = Counter()
    for times, graph in [(1, gm), *((calls[name], child) for name, child in children.items())]:
        for node in graph.graph.nodes:
            given = dict(enumerate(node.args)) | node.kwargs
            if node.target is ops.int8_linear:
                count[str(given.get(5, given.get("compute", "w8a16")))] += times
            elif node.target is ops.int8_linear_parts:
                count["w8a16"] += times * int(given.get(5, given.get("parts", 1)))  # type: ignore[arg-type]
            elif node.target is ops.int8_matmul:
                count["w8a8"] += times * int(given.get(9, given.get("parts", 1)))  # type: ignore[arg-type]
    return ", ".join(f"{n} x {mode}" for mode, n in sorted(count.items())) if count["w8a8"] else ""


def decision_rows(
    layers: dict[str, Decision], shapes: dict[str, str], blocks: Iterable[str], by_layer: bool = False
) -> list[tuple[str, ...]]:
    """Head and rows of the table: one row for layers of one role, shape, mode and kind of reason.

    Args:
        shapes: by layer, what to print as its size.
        blocks: module paths of the streaming blocks.
    """
    blocks = tuple(blocks)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, decision in layers.items():
        role = name if by_layer else role_of(name, blocks)
        groups.setdefault((role, shapes.get(name, ""), decision.mode, decision.reason), []).append(name)
    rows: list[tuple[str, ...]] = [_HEAD]
    for (role, shape, mode, reason), names in groups.items():
        of = [layers[name] for name in names]
        errors = [d.error for d in of if d.error is not None]
        tokens = {d.rows for d in of if d.rows is not None}
        times = [[t for d in of if (t := getattr(d, f"ms_{mode}")) is not None] for mode in ("w8a16", "w8a8")]
        rows.append(
            (
                role,
                str(len(names)),
                shape,
                str(max(tokens)) if tokens else "",
                mode,
                f"{max(errors):.4f}" if errors else "",
                *(f"{sum(ms):.3f}" if ms else "" for ms in times),
                reason,
            )
        )
    return rows


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = (0, 2, 4, 8)
    return [
        "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
