"""The operations of the IR, registered with `torch.library` under the namespace `squareq`.

| operation | meaning |
|---|---|
| `int8_linear(x, qweight, scale, zero_point, bias)` | `x @ dequantise(qweight).T + bias` (`kernels.reference`) |
| `int8_linear_dx(dy, qweight, scale, zero_point, in_features)` | `dy @ dequantise(qweight)`, the gradient of `x` |
| `cotangent(output, index)` | the gradient of the loss by an output; before it is the forward, after it the backward |
| `load(block, *, visit, nbytes, offset, device)` | the block's weights as one flat byte buffer, ready to be used |
| `evict(weights, block, visit)` | the buffer is not used any more; its bytes may be overwritten |
| `keep(weights, block, visit)` | an `evict` after which the next step may load the same bytes without a copy |
| `prefetch(block, *, visit, nbytes, offset)` | start the copy that a later `load` of the same block and visit will wait for |
| `offload(x)` | a copy of an activation in pinned host memory, on its way while the device goes on |
| `fetch(host, device)` | the way back, started ahead of its use |
| `arrived(x)` | what `fetch` gave, ready to be read |
| `unpack(weights, offset, size, dtype)` | a view into the flat buffer, one weight of the block |
| `argument(x, module, name)` | while tracing only: `x` is what the module calls `name`; `capture` turns it into a record |

`load`, `evict` and `prefetch` act on the runtime that is active in the current context (`activate`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch.fx.node import has_side_effect

from squareq_fx.errors import RuntimeStateError

__all__ = [
    "RuntimeProtocol",
    "activate",
    "argument",
    "arrived",
    "cotangent",
    "evict",
    "fetch",
    "int8_linear",
    "int8_linear_dx",
    "keep",
    "load",
    "offload",
    "prefetch",
    "unpack",
]


class RuntimeProtocol(Protocol):
    """What the operations that move memory need of a runtime."""

    def load(self, block: str, visit: int, nbytes: int, offset: int | None) -> torch.Tensor: ...
    def evict(self, weights: torch.Tensor, block: str, visit: int) -> None: ...
    def keep(self, weights: torch.Tensor, block: str, visit: int) -> None: ...
    def prefetch(self, block: str, visit: int, nbytes: int, offset: int | None) -> None: ...
    def offload(self, x: torch.Tensor) -> torch.Tensor: ...
    def fetch(self, host: torch.Tensor) -> torch.Tensor: ...
    def arrived(self, x: torch.Tensor) -> None: ...


_ACTIVE: ContextVar[RuntimeProtocol | None] = ContextVar("squareq_fx_runtime", default=None)


@contextlib.contextmanager
def activate(runtime: RuntimeProtocol) -> Iterator[None]:
    """Make `runtime` the one that `load`, `evict` and `prefetch` act on, in this context."""
    token = _ACTIVE.set(runtime)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _runtime(what: str, block: str) -> RuntimeProtocol:
    runtime = _ACTIVE.get()
    if runtime is None:
        raise RuntimeStateError(
            f"{what}({block!r}) ran without weights: no runtime is active. Run the module that "
            "squareq_fx.compile returned, or wrap the call in squareq_fx.ops.activate(runtime)."
        )
    return runtime


_LIBRARY = torch.library.Library("squareq", "DEF")
_LIBRARY.define(
    "int8_linear(Tensor x, Tensor qweight, Tensor scale, Tensor zero_point, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "int8_linear_dx(Tensor dy, Tensor qweight, Tensor scale, Tensor zero_point, int in_features) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define("cotangent(Tensor output, int index) -> Tensor")
_LIBRARY.define("keep(Tensor weights, str block, int visit) -> ()")
_LIBRARY.define("load(str block, *, int visit, int nbytes, int? offset=None, Device device) -> Tensor")
_LIBRARY.define("evict(Tensor weights, str block, int visit) -> ()")
_LIBRARY.define("prefetch(str block, *, int visit, int nbytes, int? offset=None) -> ()")
_LIBRARY.define("argument(Tensor x, str module, str name) -> ()")
_LIBRARY.define("offload(Tensor x) -> Tensor")
_LIBRARY.define("fetch(Tensor host, Device device) -> Tensor")
_LIBRARY.define("arrived(Tensor(a) x) -> Tensor(a)")
_LIBRARY.define("unpack(Tensor(a) weights, int offset, int[] size, ScalarType dtype) -> Tensor(a)")


def _int8_linear_kernel(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    from squareq_fx.kernels.dispatch import int8_linear as run

    return run(x, qweight, scale, zero_point, bias)


def _int8_linear_autograd(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    tensors = (x, scale, zero_point, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeStateError(
            "squareq.int8_linear would cut a gradient: an input requires grad and this operation has no backward of its own. "
            "Compile with lora=squareq_fx.Lora(...) to train, call the module under torch.no_grad(), or detach its inputs."
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.squareq.int8_linear.default(x, qweight, scale, zero_point, bias)


def _int8_linear_dx_kernel(
    dy: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, in_features: int
) -> torch.Tensor:
    from squareq_fx.kernels.dispatch import int8_linear_dx as run

    return run(dy, qweight, scale, zero_point, in_features)


def _cotangent_kernel(output: torch.Tensor, index: int) -> torch.Tensor:
    raise RuntimeStateError(
        "this graph waits for the gradient of a loss; run the module that squareq_fx.compile returned, or "
        "squareq_fx.value_and_grad(module, loss_fn)"
    )


def _keep_kernel(weights: torch.Tensor, block: str, visit: int) -> None:
    _runtime("keep", block).keep(weights, block, visit)


def _load_kernel(
    block: str, *, visit: int, nbytes: int, offset: int | None = None, device: torch.device
) -> torch.Tensor:
    return _runtime("load", block).load(block, visit, nbytes, offset)


def _evict_kernel(weights: torch.Tensor, block: str, visit: int) -> None:
    _runtime("evict", block).evict(weights, block, visit)


def _prefetch_kernel(block: str, *, visit: int, nbytes: int, offset: int | None = None) -> None:
    _runtime("prefetch", block).prefetch(block, visit, nbytes, offset)


# Without a runtime these are plain copies: they mean the same, and wait.


def _offload_kernel(x: torch.Tensor) -> torch.Tensor:
    runtime = _ACTIVE.get()
    return _copied_like(x, torch.device("cpu")) if runtime is None else runtime.offload(x)


def _fetch_kernel(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    runtime = _ACTIVE.get()
    return _copied_like(host, device) if runtime is None else runtime.fetch(host)


def _arrived_kernel(x: torch.Tensor) -> torch.Tensor:
    runtime = _ACTIVE.get()
    if runtime is not None:
        runtime.arrived(x)
    return x.view(x.shape)


def _copied_like(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def _unpack_kernel(weights: torch.Tensor, offset: int, size: list[int], dtype: torch.dtype) -> torch.Tensor:
    nbytes = dtype.itemsize
    for extent in size:
        nbytes *= extent
    start = offset if nbytes else 0  # an empty tensor lies last, at an offset its dtype may not be able to
    return weights.narrow(0, start, nbytes).view(dtype).view(size)


def _argument_kernel(x: torch.Tensor, module: str, name: str) -> None:
    return None


_LIBRARY.impl("argument", _argument_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("int8_linear", _int8_linear_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("int8_linear", _int8_linear_autograd, "Autograd")
_LIBRARY.impl("int8_linear_dx", _int8_linear_dx_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("cotangent", _cotangent_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("keep", _keep_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("load", _load_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("evict", _evict_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("prefetch", _prefetch_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("offload", _offload_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("fetch", _fetch_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("arrived", _arrived_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("unpack", _unpack_kernel, "CompositeImplicitAutograd")


@torch.library.register_fake("squareq::int8_linear", lib=_LIBRARY)
def _int8_linear_fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    torch._check(x.dim() >= 1 and qweight.dim() == 2, lambda: "int8_linear: x [..., in], qweight [out, in_padded]")
    torch._check(
        x.dtype in (torch.float32, torch.bfloat16, torch.float16),
        lambda: f"int8_linear: x is {x.dtype}, not float32, bfloat16 or float16",
    )
    torch._check(qweight.dtype == torch.int8, lambda: f"int8_linear: qweight is {qweight.dtype}, not int8")
    torch._check(x.shape[-1] <= qweight.shape[1], lambda: "int8_linear: x is wider than qweight")
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


@torch.library.register_fake("squareq::int8_linear_dx", lib=_LIBRARY)
def _int8_linear_dx_fake(
    dy: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, in_features: int
) -> torch.Tensor:
    torch._check(dy.dim() >= 1 and qweight.dim() == 2, lambda: "int8_linear_dx: dy [..., out], qweight [out, in_padded]")
    torch._check(qweight.dtype == torch.int8, lambda: f"int8_linear_dx: qweight is {qweight.dtype}, not int8")
    torch._check(in_features <= qweight.shape[1], lambda: "int8_linear_dx: in_features is wider than qweight")
    return dy.new_empty((*dy.shape[:-1], in_features))


@torch.library.register_fake("squareq::cotangent", lib=_LIBRARY)
def _cotangent_fake(output: torch.Tensor, index: int) -> torch.Tensor:
    return torch.empty_like(output, memory_format=torch.contiguous_format)


@torch.library.register_fake("squareq::keep", lib=_LIBRARY)
def _keep_fake(weights: torch.Tensor, block: str, visit: int) -> None:
    return None


@torch.library.register_fake("squareq::load", lib=_LIBRARY)
def _load_fake(
    block: str, *, visit: int, nbytes: int, offset: int | None = None, device: torch.device
) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


@torch.library.register_fake("squareq::evict", lib=_LIBRARY)
def _evict_fake(weights: torch.Tensor, block: str, visit: int) -> None:
    return None


@torch.library.register_fake("squareq::prefetch", lib=_LIBRARY)
def _prefetch_fake(block: str, *, visit: int, nbytes: int, offset: int | None = None) -> None:
    return None


@torch.library.register_fake("squareq::offload", lib=_LIBRARY)
def _offload_fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")


@torch.library.register_fake("squareq::fetch", lib=_LIBRARY)
def _fetch_fake(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)


@torch.library.register_fake("squareq::arrived", lib=_LIBRARY)
def _arrived_fake(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape)


@torch.library.register_fake("squareq::argument", lib=_LIBRARY)
def _argument_fake(x: torch.Tensor, module: str, name: str) -> None:
    return None


argument = torch.ops.squareq.argument.default
int8_linear = torch.ops.squareq.int8_linear.default
int8_linear_dx = torch.ops.squareq.int8_linear_dx.default
cotangent = torch.ops.squareq.cotangent.default
keep = torch.ops.squareq.keep.default
load = torch.ops.squareq.load.default
evict = torch.ops.squareq.evict.default
prefetch = torch.ops.squareq.prefetch.default
offload = torch.ops.squareq.offload.default
fetch = torch.ops.squareq.fetch.default
arrived = torch.ops.squareq.arrived.default
unpack = torch.ops.squareq.unpack.default

# Dead-code elimination would delete nodes that nothing uses, and two loads would look like one.
for _op in (load, evict, keep, prefetch, cotangent, argument):
    has_side_effect(_op)
