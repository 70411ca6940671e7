"""Attention with its kernel named in the graph: `squareq.attention(query, key, value, ..., backend=...)`.

`aten.scaled_dot_product_attention` chooses a kernel each time it runs, by rules that change with torch. Here it is chosen once,
by `passes.attention`, printed, and kept. Sources: torch's own conditions,
https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html and
`aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`.

| backend | where | takes | its result lies in memory |
|---|---|---|---|
| cudnn | CUDA, 8.0 and on | 16 bit, head size a multiple of 8, at most 128, no mask | as the query does |
| flash | CUDA, 8.0 and on; the CPU | CUDA: 16 bit, head size at most 256, no mask | as the query does |
| efficient | CUDA | head size a multiple of 16 bytes | [batch, tokens, heads, head size] |
| math | everywhere | everything, with a matrix of tokens times tokens | contiguous |

What all fused kernels refuse at run time has one definition for all backends: a call with no query or no key, and for cudnn one
with a single key, is computed by `math`, whose matrix is as small as that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from squareq_fx.attention_rules import BACKENDS
from squareq_fx.errors import RuntimeStateError
from squareq_fx.ir import functions

__all__ = ["attention", "attention_summary", "explicit_attention", "run_attention"]

aten = torch.ops.aten
_MOST_SAMPLES = 65535
"""Of a batch, for cuDNN; torch gives larger ones to flash."""


# --------------------------------------------------------------------------------------------------------- what is computed


def explicit_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str,
) -> torch.Tensor:
    """The same by aten operations alone, for tensors that the backend takes (`refusal`) and at least two keys.

    It has the operation's signature, so it is its decomposition too. The result lies in memory as the kernel leaves it.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        blank = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = blank.masked_fill(attn_mask.logical_not(), float("-inf"))
    if backend == "math":
        how: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return aten._scaled_dot_product_attention_math.default(query, key, value, attn_mask, 0.0, is_causal, None, **how)[0]
    if backend == "cudnn":
        arguments = (query, key, value, attn_mask, False, 0.0, is_causal, False)
        return aten._scaled_dot_product_cudnn_attention.default(*arguments, scale=scale)[0]
    if backend == "efficient":
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        bias = _aligned_bias(attn_mask, query, key)
        efficient = aten._scaled_dot_product_efficient_attention.default
        return efficient(query, key, value, bias, False, 0.0, is_causal, scale=scale)[0]
    if query.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu.default
        return flash(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    size = query.shape[3]
    if size % 8:
        scale = size**-0.5 if scale is None else scale
        query, key, value = (torch.nn.functional.pad(t, (0, 8 - size % 8)) for t in (query, key, value))
    found = aten._scaled_dot_product_flash_attention.default(query, key, value, 0.0, is_causal, False, scale=scale)
    return found[0][..., :size] if size % 8 else found[0]


def _aligned_bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """An additive mask as the efficient kernel wants it: every row at a multiple of 16 bytes, broadcast to all heads."""
    if mask is None:
        return None
    keys = key.shape[2]
    mask = mask.to(query.dtype).expand(*mask.shape[:-1], keys)
    rows = torch.nn.functional.pad(mask, (0, 8 - keys % 8))[..., :keys]
    return rows.expand(query.shape[0], query.shape[1], query.shape[2], keys)


def run_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str,
) -> torch.Tensor:
    """What `squareq.attention` computes, past torch's dispatcher and without gradients.

    Args:
        query: [batch, heads, tokens, head size]; `math` takes any number of dimensions before the last two.
        key, value: the same, with the same or (`enable_gqa`) fewer heads, and another number of tokens.
        attn_mask: added to the scores, or True where a key is seen; broadcast to [batch, heads, tokens, keys].
        is_causal: token i sees the keys up to i.
        scale: of the scores; default: one by the square root of the head size.

    Returns:
        [batch, heads, tokens, head size of the values], in the query's type; in memory as the table of the module says.

    Raises:
        RuntimeStateError: the kernel refused what `refusal` has no objection to.
    """
    keys, tokens = key.shape[-2], query.shape[-2]
    actual = backend
    if keys == 0 or tokens == 0 or (backend == "cudnn" and keys == 1):
        actual = "math"
    elif backend == "cudnn" and query.shape[0] > _MOST_SAMPLES:
        actual = "flash"
    if actual == "efficient":
        query, key, value = (t.clone() if t.storage_offset() * t.element_size() % 16 else t for t in (query, key, value))
    try:
        found = explicit_attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, backend=actual)
    except (RuntimeError, TypeError) as error:
        raise RuntimeStateError(
            f"attention by {actual!r} of query {list(query.shape)}, key {list(key.shape)}, {query.dtype}, on {query.device} "
            f"failed: {str(error).strip().splitlines()[0]}. Compile with the pass Attention(backend='math'), or another."
        ) from error
    return found if backend == actual and found.stride() == query.stride() else _laid_out(found, query, backend)


def _laid_out(found: torch.Tensor, query: torch.Tensor, backend: str) -> torch.Tensor:
    """`found` as the operation's type states it; a copy only where a kernel left it otherwise."""
    stated = _empty(query, found.shape, backend, torch.device("meta")).stride()
    if all(have == want or size == 1 for have, want, size in zip(found.stride(), stated, found.shape)):
        return found
    return torch.empty_strided(found.shape, stated, dtype=found.dtype, device=found.device).copy_(found)


def _empty(query: torch.Tensor, shape: Any, backend: str, device: torch.device) -> torch.Tensor:
    if backend in ("cudnn", "flash"):
        return torch.empty_like(query, device=device)
    if backend == "efficient":
        batch, heads, tokens, size = shape
        return torch.empty((batch, tokens, heads, size), dtype=query.dtype, device=device).transpose(1, 2)
    return torch.empty(tuple(shape), dtype=query.dtype, device=device)


# ------------------------------------------------------------------------------------------------------------ the operation

_LIBRARY = torch.library.Library("squareq", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, bool is_causal=False, float? scale=None, "
    "bool enable_gqa=False, *, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _attention_autograd(*arguments: Any, **options: Any) -> torch.Tensor:
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in arguments):
        raise RuntimeStateError(
            "squareq.attention would cut a gradient: an input requires grad and this operation has no backward of its own. Put "
            "the pass Attention after Differentiate, call the module under torch.no_grad(), or detach its inputs."
        )
    with torch._C._AutoDispatchBelowAutograd():
        return attention(*arguments, **options)


_LIBRARY.impl("attention", run_attention, "CompositeExplicitAutograd")
_LIBRARY.impl("attention", _attention_autograd, "Autograd")


@torch.library.register_fake("squareq::attention", lib=_LIBRARY)
def _attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str,
) -> torch.Tensor:
    torch._check(backend in BACKENDS, lambda: f"attention: there is no backend {backend!r}; there are {', '.join(BACKENDS)}")
    alike = query.dim() == key.dim() == value.dim() >= 2
    torch._check(alike, lambda: "attention: query, key and value differ in their number of dimensions")
    torch._check(backend == "math" or query.dim() == 4, lambda: f"attention: {backend} takes 4 dimensions, not {query.dim()}")
    as_query = backend in ("cudnn", "flash")
    torch._check(not as_query or value.shape[-1] == query.shape[-1], lambda: f"attention: {backend} takes one head size only")
    return _empty(query, (*query.shape[:-1], value.shape[-1]), backend, query.device)


attention = torch.ops.squareq.attention.default


# --------------------------------------------------------------------------------------------------------- what a graph uses


def attention_summary(gm: fx.GraphModule) -> str:
    """Which kernels a graph computes attention with, and how often a run calls each: `57 x cudnn, backward 57 x flash`.

    Empty if the graph has no attention.
    """
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    for node in _called(gm):
        name = str(node.target)
        if node.target is attention:
            forward[str(node.kwargs["backend"])] += 1
        elif node.target is aten.scaled_dot_product_attention.default:
            forward["chosen at run time"] += 1
        elif name.startswith("aten._scaled_dot_product_"):
            kernel = next((k for k in ("cudnn", "flash", "efficient", "math") if k in name), name)
            (backward if "_backward" in name else forward)[kernel] += 1
    parts = [", ".join(f"{n} x {kernel}" for kernel, n in sorted(count.items())) for count in (forward, backward)]
    return parts[0] + (f"{', ' if parts[0] else ''}backward {parts[1]}" if parts[1] else "")


def _called(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Every operation in the order it runs; those of a function once for each call."""
    children = functions(gm)
    for node in gm.graph.nodes:
        if node.op == "call_module" and str(node.target) in children:
            yield from _called(children[str(node.target)])
        elif node.op == "call_function":
            yield node
