"""A graph as a picture: one row an operation in execution order, the arena's slots on the left, data flow on the right."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

import torch
from torch import fx

from squareq_fx import ops
from squareq_fx.ir import functions, info
from squareq_fx.specs import short_spec

__all__ = ["draw"]

_ROW, _PAD, _LANE, _BOX = 22, 46, 112, 400
_PALETTE = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b", "#ff9da6", "#79706e")
_PLAIN, _INT8, _INPUT = "#d5d8dc", "#4c78a8", "#eaf2f8"


@dataclass
class _Stay:
    """One segment in the arena: rows from the start of its copy over its load to its eviction."""

    block: str
    nbytes: int
    slot: int
    start: int
    load: int
    end: int


def draw(gm: fx.GraphModule) -> str:
    """The graph as SVG text.

    A call is coloured by the function it calls, so that blocks of one structure look alike. In the lanes on the left each bar
    is a segment's stay in its arena slot: light while its copy runs ahead, dark from load to evict. Curves on the right
    join a value to its uses; a use in the next row is not drawn.
    """
    hidden = {ops.load, ops.evict, ops.prefetch, ops.unpack, torch.ops.aten.sym_size.int}
    rows: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        weight = node.op == "placeholder" and info(node).kind == "weight"
        if not weight and node.target not in hidden and not _is_item(node) and node.op != "get_attr":
            rows[node] = len(rows)
    stays = _stays(gm, rows)
    lanes = 1 + max((s.slot for s in stays), default=-1)
    left = 12 + lanes * _LANE
    width, height = left + _BOX + 330, _PAD + len(rows) * _ROW + 12
    body = [*_legend(gm, lanes), *(_bar(s) for s in stays), *_edges(rows, left + _BOX)]
    colours = {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(functions(gm))}
    body += [_box(node, row, left, colours) for node, row in rows.items()]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        + "".join(body)
        + "</svg>"
    )


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _stays(gm: fx.GraphModule, rows: dict[fx.Node, int]) -> list[_Stay]:
    stays: dict[tuple[str, int], _Stay] = {}
    slots: dict[int, int] = {}
    row = 0
    for node in gm.graph.nodes:
        if node in rows:
            row = rows[node] + 1
        elif node.target in (ops.prefetch, ops.load):
            key = (str(node.args[0]), int(node.kwargs["visit"]))  # type: ignore[arg-type]
            offset = int(node.kwargs.get("offset") or 0)  # type: ignore[arg-type]
            slot = slots.setdefault(offset, len(slots))
            stay = stays.setdefault(key, _Stay(key[0], int(node.kwargs["nbytes"]), slot, row, row, row))  # type: ignore[arg-type]
            if node.target is ops.load:
                stay.load = row
        elif node.target is ops.evict:
            stays[str(node.args[1]), int(node.args[2])].end = row  # type: ignore[arg-type]
    return list(stays.values())


def _legend(gm: fx.GraphModule, lanes: int) -> list[str]:
    calls = sum(n.op == "call_module" for n in gm.graph.nodes)
    title = f"{calls} calls of {len(functions(gm))} functions" if calls else f"{len(gm.graph.nodes)} nodes"
    parts = [_text(12, 16, title, weight=600)]
    parts += [_text(12 + lane * _LANE, 36, f"slot {lane}", fill="#666") for lane in range(lanes)]
    return parts


def _bar(stay: _Stay) -> str:
    x = 12 + stay.slot * _LANE
    top, load, end = (_PAD + r * _ROW for r in (stay.start, stay.load, stay.end))
    label = stay.block if len(stay.block) <= 13 else "…" + stay.block[-12:]
    tip = f"<title>{html.escape(stay.block)}: {stay.nbytes:,} bytes</title>"
    early = f'<rect x="{x}" y="{top + 1}" width="{_LANE - 10}" height="{max(load - top - 1, 0)}" fill="#aed6f1"/>'
    used = f'<rect x="{x}" y="{load + 1}" width="{_LANE - 10}" height="{max(end - load - 2, 2)}" rx="2" fill="#2e86c1"/>'
    return f"<g>{tip}{early}{used}{_text(x + 4, load + 15, label, fill='white')}</g>"


def _box(node: fx.Node, row: int, left: int, colours: dict[str, str]) -> str:
    y = _PAD + row * _ROW
    fill, ink = _PLAIN, "#222"
    what = "" if node.op == "output" else _operation(node)
    if node.op == "call_module":
        fill, ink = colours[str(node.target)], "white"
    elif node.target is ops.int8_linear:
        fill, ink = _INT8, "white"
    elif node.op == "placeholder":
        fill = _INPUT
    named = node.op == "call_module" or info(node).layer is not None
    label = f"{node.name}  ·  {what}" if named and what != node.name else what
    label = node.name if node.op in ("placeholder", "output") else label
    val = node.meta.get("val")
    kind = short_spec(val) if isinstance(val, torch.Tensor | torch.SymInt) else ""
    tip = f"<title>{html.escape(node.name)}: {html.escape(what)} {html.escape(short_spec(node.meta.get('val')))}</title>"
    return (
        f'<g>{tip}<rect x="{left}" y="{y + 2}" width="{_BOX}" height="{_ROW - 4}" rx="4" fill="{fill}"/>'
        + _text(left + 8, y + 15, label[:62], fill=ink)
        + (_text(left + _BOX - 8, y + 15, kind, fill=ink, anchor="end") if len(label) + len(kind) < 64 else "")
        + "</g>"
    )


def _operation(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    if node.op == "placeholder":
        return "input"
    packet = getattr(node.target, "_opname", None)
    return str(packet or getattr(node.target, "__name__", node.target))


def _edges(rows: dict[fx.Node, int], x: int) -> list[str]:
    found: set[tuple[int, int]] = set()
    for node, row in rows.items():
        for source in _sources(node, rows):
            if row - rows[source] > 1:
                found.add((rows[source], row))
    curves = []
    for start, end in sorted(found, key=lambda e: e[0] - e[1]):
        top, bottom = (_PAD + r * _ROW + _ROW / 2 for r in (start, end))
        reach = x + min(24 + 38 * math.log2(end - start), 300)
        curves.append(
            f'<path d="M{x},{top} C{reach:.0f},{top} {reach:.0f},{bottom} {x},{bottom}" fill="none" stroke="#95a5a6" '
            'stroke-opacity="0.55"/>'
        )
    return curves


def _sources(node: fx.Node, rows: dict[fx.Node, int]) -> list[fx.Node]:
    """Drawn nodes whose value this one reads, through items of tuples."""
    found: list[fx.Node] = []
    for argument in node.all_input_nodes:
        while _is_item(argument):
            argument = argument.all_input_nodes[0]
        if argument in rows:
            found.append(argument)
    return found


def _text(x: float, y: float, text: str, fill: str = "#222", weight: int = 400, anchor: str = "start") -> str:
    style = f'fill="{fill}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" {style}>{html.escape(text)}</text>'
