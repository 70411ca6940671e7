"""The operations of the IR, registered with `torch.library` under the namespace `squareq`.

| operation | meaning |
|---|---|
| `int8_linear(x, qweight, scale, zero_point, bias, compute)` | `x @ dequantise(qweight).T + bias` (`kernels.reference`) |
| `int8_linear_dx(dy, qweight, scale, zero_point, in_features, compute)` | `dy @ dequantise(qweight)`, the gradient of `x` |
| `int8_linear_parts(x, qweight, scale, zero_point, bias, parts)` | several layers of one input, their rows side by side |
| `quantize_rows(x, beside)` | int8 activations, of x and, to its right, of `beside`; step and sum of each row |
| `int8_matmul(xq, sx, qweight, ..., activation, addend, parts)` | the product of both int8 operands, with its epilogue |
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
import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Protocol

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
    "int8_linear_parts",
    "int8_matmul",
    "keep",
    "kernel",
    "load",
    "offload",
    "prefetch",
    "quantize_rows",
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
_ROWS = "Tensor qweight, Tensor scale, Tensor zero_point"
for _schema in (
    f'int8_linear(Tensor x, {_ROWS}, Tensor? bias=None, str compute="w8a16") -> Tensor',
    f'int8_linear_dx(Tensor dy, {_ROWS}, int in_features, str compute="w8a16") -> Tensor',
    f"int8_linear_parts(Tensor x, {_ROWS}, Tensor? bias, int parts) -> Tensor",
    "quantize_rows(Tensor x, Tensor? beside=None) -> (Tensor xq, Tensor sx)",
    f"int8_matmul(Tensor xq, Tensor sx, {_ROWS}, Tensor? bias, ScalarType dtype, "
    'str activation="none", Tensor? addend=None, int parts=1) -> Tensor',
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
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


def kernel(name: str) -> Callable[..., Any]:
    """What calls the function of that name in `kernels.dispatch`, which is imported at the first call."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(_dispatch(), name)(*args, **kwargs)

    run.__name__ = name
    return run


@functools.cache
def _dispatch() -> ModuleType:
    return importlib.import_module("squareq_fx.kernels.dispatch")


def _without_gradient(name: str) -> Callable[..., Any]:
    """What autograd sees of an operation: an error where it would cut a gradient."""
    operation = getattr(torch.ops.squareq, name).default

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeStateError(
                f"squareq.{name} would cut a gradient: an input requires grad and this operation has no backward of its own. "
                "Compile with lora=squareq_fx.Lora(...) to train, call the module under torch.no_grad(), or detach its inputs."
            )
        with torch._C._AutoDispatchBelowAutograd():
            return operation(*args, **kwargs)

    return run


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
for _name in ("int8_linear", "int8_linear_dx", "int8_linear_parts", "quantize_rows", "int8_matmul"):
    _LIBRARY.impl(_name, kernel(_name), "CompositeExplicitAutograd")
for _name in ("int8_linear", "int8_linear_parts", "quantize_rows", "int8_matmul"):
    _LIBRARY.impl(_name, _without_gradient(_name), "Autograd")
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
    compute: str = "w8a16",
) -> torch.Tensor:
    _check_fake("int8_linear", x, qweight, compute)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


@torch.library.register_fake("squareq::int8_linear_parts", lib=_LIBRARY)
def _int8_linear_parts_fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    parts: int,
) -> torch.Tensor:
    _check_fake("int8_linear_parts", x, qweight, "w8a16")
    torch._check(qweight.shape[0] % parts == 0, lambda: f"int8_linear_parts: {qweight.shape[0]} rows are not {parts} layers")
    return x.new_empty((parts, *x.shape[:-1], qweight.shape[0] // parts))


def _check_fake(name: str, x: torch.Tensor, qweight: torch.Tensor, compute: str) -> None:
    torch._check(x.dim() >= 1 and qweight.dim() == 2, lambda: f"{name}: x [..., in], qweight [out, in_padded]")
    torch._check(
        x.dtype in (torch.float32, torch.bfloat16, torch.float16),
        lambda: f"{name}: x is {x.dtype}, not float32, bfloat16 or float16",
    )
    torch._check(qweight.dtype == torch.int8, lambda: f"{name}: qweight is {qweight.dtype}, not int8")
    torch._check(x.shape[-1] <= qweight.shape[1], lambda: f"{name}: x is wider than qweight")
    _check_name(name, "compute", compute, "COMPUTES")


def _check_name(operation: str, argument: str, value: str, names: str) -> None:
    """A string argument is one of those that `kernels.arguments` lists, which is imported when an operation is first used."""
    from squareq_fx.kernels import arguments

    known = getattr(arguments, names)
    torch._check(value in known, lambda: f"{operation}: {argument} is {value!r}, not one of {known}")


@torch.library.register_fake("squareq::int8_linear_dx", lib=_LIBRARY)
def _int8_linear_dx_fake(
    dy: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    in_features: int,
    compute: str = "w8a16",
) -> torch.Tensor:
    torch._check(dy.dim() >= 1 and qweight.dim() == 2, lambda: "int8_linear_dx: dy [..., out], qweight [out, in_padded]")
    torch._check(qweight.dtype == torch.int8, lambda: f"int8_linear_dx: qweight is {qweight.dtype}, not int8")
    torch._check(in_features <= qweight.shape[1], lambda: "int8_linear_dx: in_features is wider than qweight")
    _check_name("int8_linear_dx", "compute", compute, "COMPUTES")
    return dy.new_empty((*dy.shape[:-1], in_features))


@torch.library.register_fake("squareq::quantize_rows", lib=_LIBRARY)
def _quantize_rows_fake(x: torch.Tensor, beside: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    torch._check(x.dim() >= 1 and x.is_floating_point(), lambda: f"quantize_rows: x [..., K] floats, got {x.dtype}")
    columns = x.shape[-1]
    if beside is not None:
        alike = beside.dtype == x.dtype and beside.dim() == x.dim()
        torch._check(alike, lambda: f"quantize_rows: beside is {beside.dtype} with {beside.dim()} dimensions, x is not")
        columns = columns + beside.shape[-1]
    return x.new_empty((*x.shape[:-1], columns), dtype=torch.int8), x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)


@torch.library.register_fake("squareq::int8_matmul", lib=_LIBRARY)
def _int8_matmul_fake(
    xq: torch.Tensor,
    sx: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
    addend: torch.Tensor | None = None,
    parts: int = 1,
) -> torch.Tensor:
    torch._check(xq.dtype == torch.int8, lambda: f"int8_matmul: xq is {xq.dtype}, not int8")
    torch._check(qweight.dtype == torch.int8, lambda: f"int8_matmul: qweight is {qweight.dtype}, not int8")
    torch._check(xq.shape[-1] <= qweight.shape[1], lambda: "int8_matmul: xq is wider than qweight")
    _check_name("int8_matmul", "activation", activation, "ACTIVATIONS")
    torch._check(qweight.shape[0] % parts == 0, lambda: f"int8_matmul: {qweight.shape[0]} rows are not {parts} layers")
    torch._check(addend is None or parts == 1, lambda: "int8_matmul: an addend goes with one part only")
    shape = (*xq.shape[:-1], qweight.shape[0] // parts)
    return xq.new_empty(shape if parts == 1 else (parts, *shape), dtype=dtype)


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
int8_linear_parts = torch.ops.squareq.int8_linear_parts.default
quantize_rows = torch.ops.squareq.quantize_rows.default
int8_matmul = torch.ops.squareq.int8_matmul.default
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
