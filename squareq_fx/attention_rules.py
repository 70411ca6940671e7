"""Which kernel of attention takes which types; read off types alone, so that it holds for every size.

Sources: torch's own conditions, `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` and `sdp_utils_cpp.cpp`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

__all__ = ["BACKENDS", "Backend", "refusal"]

Backend = Literal["cudnn", "flash", "efficient", "math"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_HALVES = (torch.float16, torch.bfloat16)


def refusal(
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    *,
    device: str,
    capability: tuple[int, int] = (0, 0),
) -> str | None:
    """Why a backend does not take a call of these types; None if it does, whatever the sizes that are symbols turn out to be.

    Args:
        query, key, value, attn_mask: real or fake tensors, of which only types are read.
        device: "cuda" or "cpu", where it will run.
        capability: of the CUDA device.
    """
    if backend == "math":
        return None
    if device not in ("cuda", "cpu") or (device == "cpu" and backend != "flash"):
        return f"it does not run on {device}"
    if {query.dim(), key.dim(), value.dim()} != {4}:
        return "query, key and value must have 4 dimensions: [batch, heads, tokens, head size]"
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value are of different types"
    size, last = query.shape[3], value.shape[3]
    if not (isinstance(size, int) and isinstance(last, int) and key.shape[3] == size):
        return "the head size must be a number, and the same for query and key"
    if any(t.stride(3) != 1 for t in (query, key, value)) or (attn_mask is not None and attn_mask.stride(-1) not in (0, 1)):
        return "the last dimension must lie together in memory"
    if not (_equal(query.shape[0], key.shape[0]) and _equal(query.shape[0], value.shape[0])):
        return "query, key and value have different batches"
    if not _equal(key.shape[2], value.shape[2]):
        return "keys and values have different lengths"
    if not _heads_match(query, key, value, enable_gqa):
        return "the heads of the query are no multiple of those of key and value (enable_gqa), or not the same number"
    rules = {"flash": _flash_cpu if device == "cpu" else _flash, "cudnn": _cudnn, "efficient": _efficient}
    if backend not in rules:
        return f"there is no such backend; there are {', '.join(BACKENDS)}"
    return rules[backend](query, key, value, attn_mask, is_causal, capability)


def _flash_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, is_causal: bool, capability: tuple[int, int]
) -> str | None:
    if not query.is_floating_point():
        return f"it does not compute in {query.dtype}"
    if query.shape[3] != value.shape[3]:
        return "the head sizes of query and value differ"
    if mask is not None and not _is_plain_mask(mask, query, key):
        return "the mask must be [tokens, keys], with batch and heads or not"
    return None


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, is_causal: bool, capability: tuple[int, int]
) -> str | None:
    if capability < (8, 0):
        return "it needs compute capability 8.0"
    if query.dtype not in _HALVES:
        return f"it computes in 16 bits, not in {query.dtype}"
    if mask is not None:
        return "it takes no mask"
    if query.shape[3] != value.shape[3] or query.shape[3] > 256:
        return "the head sizes of query and value must be equal and at most 256"
    if is_causal and not _equal(query.shape[2], key.shape[2]):
        return "it is causal with as many keys as queries only"
    return None


def _cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, is_causal: bool, capability: tuple[int, int]
) -> str | None:
    reason = _flash(query, key, value, mask, is_causal, capability)
    if reason is None and (query.shape[3] > 128 or query.shape[3] % 8):
        reason = f"the head size must be a multiple of 8 and at most 128, not {query.shape[3]}"
    return reason


def _efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, is_causal: bool, capability: tuple[int, int]
) -> str | None:
    if query.dtype not in (torch.float32, *_HALVES) or (query.dtype == torch.bfloat16 and capability < (8, 0)):
        return f"it does not compute in {query.dtype} here"
    step = 16 // query.element_size()
    if query.shape[3] % step or value.shape[3] % step or not query.shape[3] or not value.shape[3]:
        return f"the head sizes must be multiples of {step}"
    if mask is not None and (mask.dim() > 4 or is_causal):
        return "the mask must have at most 4 dimensions, and exclude is_causal"
    return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy, which importing us must not

    return bool(statically_known_true(one == other))


def _heads_match(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> bool:
    q, k, v = (t.shape[1] for t in (query, key, value))
    if not enable_gqa:
        return _equal(q, k) and _equal(q, v)
    return all(isinstance(n, int) for n in (q, k, v)) and k == v and k > 0 and q % k == 0


def _is_plain_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    wanted = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    fits = [_equal(size, 1) or _equal(size, want) for size, want in zip(reversed(mask.shape), reversed(wanted))]
    return mask.dim() in (2, 4) and all(fits)
