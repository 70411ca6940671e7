"""The laws a pass must obey, written once and asserted of every pass.

pure, well typed, closed, idempotent (`apply`), meaning (`evaluate`), print = exec (`printed`), residency (`Replay`, which
trusts nothing of `squareq_fx.verify` or `squareq_fx.liveness`), inlining (`normal_form`), permutation (`order`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from models import Staged
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from squareq_fx import ops
from squareq_fx.calls import flatten_call
from squareq_fx.ir import functions, info, program
from squareq_fx.pipeline import Pass
from squareq_fx.specs import spec
from squareq_fx.verify import check, fingerprint
from squareq_fx.weights import WeightValues

__all__ = [
    "Replay",
    "apply",
    "eager",
    "evaluate",
    "frozen",
    "l2",
    "normal_form",
    "order",
    "printed",
    "same",
    "text",
]

_POISON = 0xAB


# ------------------------------------------------------------------------- pure, well typed, closed, idempotent


def apply(transform: Pass, gm: fx.GraphModule, staged: Staged) -> fx.GraphModule:
    """The pass's result, after it was held against every law that needs no numbers."""
    before, written = fingerprint(gm), text(gm)
    tensors = frozen(staged.model, staged.slab.data)
    result = transform(gm)
    assert result is not gm
    assert fingerprint(gm) == before and text(gm) == written, "the pass changed its input"
    assert frozen(staged.model, staged.slab.data) == tensors, "the pass changed weights"
    check(result)
    _assert_closed(transform, gm, result)
    if hasattr(transform, "ensures"):
        transform.ensures(gm, result)
    again = transform(result)
    assert text(again) == text(result), "a second application changes something"
    return result


def _assert_closed(transform: Pass, before: fx.GraphModule, after: fx.GraphModule) -> None:
    def keys(gm: fx.GraphModule, kind: str) -> list[str | None]:
        return [info(n).key for n in gm.graph.nodes if n.op == "placeholder" and info(n).kind == kind]

    assert keys(before, "input") == keys(after, "input")
    assert len(set(keys(after, "weight"))) == len(keys(after, "weight"))
    assert len(set(keys(after, "adapter"))) == len(keys(after, "adapter"))
    if not getattr(transform, "changes_inputs", False):
        assert keys(before, "weight") == keys(after, "weight")
        assert keys(before, "adapter") == keys(after, "adapter")
    assert program(after).call is program(before).call
    loads = {n for n in after.graph.nodes if n.target is ops.load}
    evicted = [n.args[0] for n in after.graph.nodes if n.target is ops.evict]
    assert len(evicted) == len(loads) and set(evicted) == loads, "an orphan load"
    for gm in (after, *functions(after).values()):
        for node in gm.graph.nodes:
            if node.op == "placeholder" and info(node).kind in ("weight", "adapter") and gm is after:
                assert node.users, f"{info(node).kind} {node.name} is read by nothing"


def text(gm: fx.GraphModule) -> str:
    """Everything a graph says: nodes, types, records, functions, segments. Equal text, equal graph."""
    record = program(gm) if "squareq" in gm.meta else None
    lines = []
    if record:
        lines = [f"{record.level!r} {record.arena_bytes} {record.segments} {record.lora} {record.gradients}", *record.notes]
    lines += [f"{n.op} {n.name} {n.target} {n.args} {n.kwargs} {spec(n.meta.get('val'))} {info(n)}" for n in gm.graph.nodes]
    for name, child in sorted(functions(gm).items()):
        lines += [f"function {name}", text(child)]
    return "\n".join(lines)


def frozen(*holders: Any) -> list[tuple[Any, ...]]:
    """The state of modules and tensors: identity, type, and every bit."""
    found: list[tuple[Any, ...]] = []
    for holder in holders:
        named = holder.state_dict(keep_vars=True).items() if isinstance(holder, nn.Module) else [("", holder)]
        found += [(name, id(t), t.dtype, tuple(t.shape), t._version, bits(t)) for name, t in named]
    return found


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return bytes(flat.numpy()) if flat.numel() < 1 << 20 else flat.numpy().tobytes()


# ---------------------------------------------------------------------------------------------------- meaning


def evaluate(gm: fx.GraphModule, staged: Staged, call: Mapping[str, Any], **options: Any) -> list[torch.Tensor]:
    """The graph's outputs for the model's keyword arguments, at any stage, by `Replay`."""
    return Replay(gm, staged, **options).run(call)


def eager(model: nn.Module, call: Mapping[str, Any] | tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors in the model's own output, without gradients: with them some CPU kernels round differently."""
    with torch.no_grad():
        outputs = model(**call) if isinstance(call, Mapping) else model(*call)
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def same(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Equal bit for bit, in types and sizes too; what is no tensor is a size."""

    def exact(value: Any) -> Any:
        return (value.dtype, value.shape, bits(value)) if isinstance(value, torch.Tensor) else value

    return list(map(exact, found)) == list(map(exact, expected))


def l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance, in float64."""
    distance = (found.double() - expected.double()).norm()
    return float(distance / expected.double().norm().clamp(min=1e-30))


# -------------------------------------------------------------------------------------------------- residency


@dataclass(eq=False)
class _Claim:
    """Bytes of the device that belong to one visit of a segment, from its prefetch or load to its evict."""

    key: tuple[str, int]
    memory: torch.Tensor
    start: int
    live: bool = True
    loaded: bool = False

    def overlaps(self, tensor: torch.Tensor) -> bool:
        """Do any bytes that `tensor` can reach lie in the claim?"""
        if tensor.device.type != "cpu" or not tensor.numel() or not self.memory.numel():
            return False
        first = tensor.data_ptr()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        last = first + (reach + 1) * tensor.element_size()
        start = self.memory.data_ptr()
        return first < start + self.memory.numel() and start < last


@dataclass
class Replay:
    """Runs a graph node by node on real tensors and keeps its own books of whose bytes are whose.

    Nothing is believed: a value belongs to every claim whose bytes its memory touches when it is made, and may be
    read only while all of these live. Evicted bytes are overwritten.

    Args:
        given: values of the inputs that are neither the call's nor weights: adapters by key, what crosses into a half by name.
        cotangents: the loss's gradient by each of the model's outputs, for a graph with a backward.
        observe: called with each `call_function` node, its arguments and its result.
    """

    gm: fx.GraphModule
    staged: Staged
    given: Mapping[str, Any] = field(default_factory=dict)
    cotangents: Sequence[torch.Tensor] = ()
    observe: Callable[[fx.Node, Any, Any], None] | None = None
    peak: int = 0
    _claims: list[_Claim] = field(default_factory=list)
    _owners: dict[fx.Node, list[_Claim]] = field(default_factory=dict)

    def run(self, call: Mapping[str, Any]) -> list[torch.Tensor]:
        record = program(self.gm)
        values = WeightValues(self.staged.model, self.staged.slab, record.constants)
        self._bytes = {name: _flat(values, packed) for name, packed in record.segments.items()}
        self._arena = torch.full((record.arena_bytes,), _POISON, dtype=torch.uint8)
        arguments = _arguments(self.gm, values, call, self.given)
        with torch.no_grad():
            results = self._graph(self.gm, arguments, [[] for _ in arguments])
            results = [t.clone() if isinstance(t, torch.Tensor) else t for t in results]
        for claim in self._claims:
            assert claim.loaded, f"{claim.key} was prefetched and never loaded"
            assert not claim.live, f"{claim.key} was never evicted"
        return results

    def _graph(self, gm: fx.GraphModule, arguments: list[Any], owners: list[list[_Claim]]) -> Any:
        env: dict[fx.Node, Any] = {}
        remaining = iter(zip(arguments, owners))
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                env[node], self._owners[node] = next(remaining)
                continue
            for argument in node.all_input_nodes:
                for claim in self._owners[argument]:
                    assert claim.live, f"{node.format_node()} reads {argument}, which lay in {claim.key}, after its evict"
            if node.op == "output":
                return pytree.tree_map(lambda n: env[n], node.args[0]) if isinstance(node.args[0], tuple) else env[node.args[0]]
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = self._node(gm, node, args, kwargs)
            self._owners[node] = self._owned(env[node])
        raise AssertionError("a graph without output")

    def _node(self, gm: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            return self._graph(functions(gm)[str(node.target)], list(args), [self._owners_of(a) for a in node.args])
        assert node.op == "call_function", node.format_node()
        if node.target is ops.prefetch:
            self._claim((args[0], kwargs["visit"]), kwargs["nbytes"], kwargs["offset"])
            return None
        if node.target is ops.load:
            return self._load((args[0], kwargs["visit"]), kwargs["nbytes"], kwargs["offset"])
        if node.target in (ops.evict, ops.keep):
            self._evict(args[0], (args[1], args[2]))
            return None
        if node.target is ops.cotangent:
            output, index = args
            assert self.cotangents[index].shape == output.shape and self.cotangents[index].dtype == output.dtype
            return self.cotangents[index].clone()
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        if self.observe is not None:
            self.observe(node, args, result)
        return result

    def _owners_of(self, argument: Any) -> list[_Claim]:
        return self._owners[argument] if isinstance(argument, fx.Node) else []

    def _owned(self, value: Any) -> list[_Claim]:
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        return [c for c in self._claims if c.live and any(c.overlaps(t) for t in tensors)]

    def _claim(self, key: tuple[str, int], nbytes: int, offset: int | None) -> _Claim:
        assert key not in [c.key for c in self._claims], f"{key} is brought in twice"
        content = self._bytes[key[0]]
        assert content.numel() == nbytes
        if offset is None:
            memory = torch.empty(nbytes, dtype=torch.uint8)
        else:
            assert offset >= 0 and offset + nbytes <= self._arena.numel(), f"{key} lies outside the arena"
            memory = self._arena[offset : offset + nbytes]
        for other in self._claims:
            assert not (other.live and other.overlaps(memory)), f"{key} is brought in over {other.key}"
        memory.copy_(content)
        claim = _Claim(key, memory, offset or 0)
        self._claims.append(claim)
        in_use = sum(c.memory.numel() for c in self._claims if c.live)
        self.peak = max(self.peak, in_use)
        assert offset is None or in_use <= self._arena.numel(), "more bytes in use than the arena has"
        return claim

    def _load(self, key: tuple[str, int], nbytes: int, offset: int | None) -> torch.Tensor:
        claim = next((c for c in self._claims if c.key == key), None)
        if claim is None:
            claim = self._claim(key, nbytes, offset)
        else:
            assert claim.start == (offset or 0) and claim.memory.numel() == nbytes, f"{key} was prefetched to another place"
        assert not claim.loaded, f"{key} is loaded twice"
        claim.loaded = True
        return claim.memory

    def _evict(self, weights: torch.Tensor, key: tuple[str, int]) -> None:
        (claim,) = (c for c in self._claims if c.key == key)
        assert claim.loaded and claim.live, f"{key} is evicted, but not there"
        assert weights.data_ptr() == claim.memory.data_ptr() and weights.numel() == claim.memory.numel()
        claim.memory.fill_(_POISON)
        claim.live = False


def _flat(values: WeightValues, packed: Any) -> torch.Tensor:
    """A segment's bytes put together tensor by tensor."""
    flat = torch.full((sum(p.nbytes for p in packed),), _POISON, dtype=torch.uint8)
    covered = torch.zeros(flat.numel(), dtype=torch.bool)
    for p in packed:
        value = values.tensor(p.key, p.dtype).contiguous().reshape(-1).view(torch.uint8)
        assert value.numel() == p.nbytes and not covered[p.offset : p.offset + p.nbytes].any()
        flat[p.offset : p.offset + p.nbytes] = value
        covered[p.offset : p.offset + p.nbytes] = True
    assert covered.all(), "a segment has bytes that belong to no tensor"
    return flat


def _arguments(gm: fx.GraphModule, values: WeightValues, call: Mapping[str, Any], given: Mapping[str, Any]) -> list[Any]:
    """What each input of the graph is called with, in their order."""
    inputs = flatten_call(call)
    found: list[Any] = []
    for node in (n for n in gm.graph.nodes if n.op == "placeholder"):
        record, val = info(node), node.meta["val"]
        key = str(record.key)
        if record.kind == "weight":
            found.append(values.tensor(key, val.dtype))
        elif record.kind == "adapter" or record.made_by == "halves":
            found.append(given[key])
        else:
            found.append(inputs[key].to(val.dtype))
    return found


# ------------------------------------------------------------------------------------------------ print = exec


class _FreshBuffers:
    """The least a runtime can be: every load a fresh copy, every evict overwrites it."""

    def __init__(self, content: Mapping[str, torch.Tensor]) -> None:
        self._content = content

    def load(self, block: str, visit: int, nbytes: int, offset: int | None) -> torch.Tensor:
        return self._content[block].clone()

    def evict(self, weights: torch.Tensor, block: str, visit: int) -> None:
        weights.fill_(_POISON)

    keep = evict

    def offload(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    fetch = offload

    def arrived(self, x: torch.Tensor) -> None:
        assert x.numel() >= 0

    def prefetch(self, block: str, visit: int, nbytes: int, offset: int | None) -> None:
        assert block in self._content


def printed(
    gm: fx.GraphModule, staged: Staged, call: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> list[torch.Tensor]:
    """The graph's outputs from the text it prints as: its code and that of its functions, compiled anew."""
    record = program(gm)
    values = WeightValues(staged.model, staged.slab, record.constants)
    arguments = _arguments(gm, values, call, given or {})
    content = {name: _flat(values, packed) for name, packed in record.segments.items()}
    with ops.activate(_FreshBuffers(content)), torch.no_grad():
        return list(_recompiled(gm)(*arguments))


def _recompiled(gm: fx.GraphModule) -> Callable[..., Any]:
    code = gm.graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<printed {type(gm).__name__}>", "exec"), namespace)
    children = SimpleNamespace(**{name: _recompiled(child) for name, child in functions(gm).items()})
    return lambda *arguments: namespace["forward"](children, *arguments)


# ---------------------------------------------------------------------------------------- outline and schedule


def normal_form(gm: fx.GraphModule) -> list[str]:
    """A flat graph as text in which integer sizes are expressions, not nodes: `outline` derives them anew."""
    called: dict[fx.Node, str] = {}
    lines: list[str] = []
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if node.op == "placeholder":
            called[node] = f"<{info(node).kind} {info(node).key}>"
            lines.append(f"{called[node]} {spec(val)}")
        elif isinstance(val, torch.SymInt | int):
            called[node] = f"<size {spec(val)}>"
        else:
            arguments = map_arg((node.args, node.kwargs), lambda n: _Word(called[n]))
            called[node] = f"%{len(lines)}"
            lines.append(f"{called[node]} = {node.op} {node.target} {arguments} {spec(val)}")
    return lines


class _Word(str):
    def __repr__(self) -> str:
        return str(self)


def order(gm: fx.GraphModule) -> list[str]:
    """The graph's nodes in order without prefetches and places in the arena: what `schedule` may not change."""
    lines = []
    for node in gm.graph.nodes:
        if node.target is not ops.prefetch:
            kwargs = {k: v for k, v in node.kwargs.items() if k != "offset"}
            lines.append(f"{node.op} {node.name} {node.target} {node.args} {kwargs} {spec(node.meta.get('val'))}")
    return lines
