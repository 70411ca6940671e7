"""The arms of `peers.py`: what each package does to the Linear layers of a model.

Every package is imported where it is used, in the process of its arm, and called as its documentation says. An arm's name may
end with "+compile" (torch.compile; a diffusers model by `compile_repeated_blocks`) or "+max" (the same with mode
"max-autotune-no-cudagraphs"), one of ours, which Inductor compiles, with "+eager", "+cudagraph", "+eager+cudagraph", or
"+streamed": recorded too, the weights in host memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

__all__ = [
    "DEFAULT",
    "OURS",
    "PEERS",
    "Peer",
    "add_lora",
    "compiled",
    "is_ours",
    "linear_rows",
    "ours",
    "peer_of",
    "raise_limits",
]

_INT_MM_ROWS = 16  # torch._int_mm, which torchao's dynamic arm calls, takes more rows than this
OURS = {"ours-w8a16": "w8a16", "ours-w8a8": "w8a8", "ours-auto": "auto"}
"""Our arms and their `compute`. One layer alone has no "auto": `compile` chooses between the two for each layer."""
_HOW = {
    "": ("inductor", "resident"),
    "eager": ("eager", "resident"),
    "eager+cudagraph": ("eager+cudagraph", "resident"),
    "cudagraph": ("cudagraph", "resident"),
    "streamed": ("cudagraph", "host"),
}
"""Suffix of our arms: `backend` and `backing`."""


@dataclass(frozen=True)
class Peer:
    """A package's INT8 Linear layers.

    Args:
        package: its distribution; None for torch itself.
        quantise: (model, rows by name of each Linear, whether it will be trained); replaces those layers in place.
        slow: whether it compiles much for every shape, so that single layers are spread over several processes.
    """

    package: str | None
    quantise: Callable[[nn.Module, Mapping[str, int], bool], None]
    slow: bool = False

    def version(self) -> str:
        """As installed; raises ModuleNotFoundError if it is not."""
        if self.package is None:
            return torch.__version__
        try:
            return version(self.package)
        except PackageNotFoundError:
            raise ModuleNotFoundError(f"no package {self.package}", name=self.package) from None


def _as_it_is(model: nn.Module, rows: Mapping[str, int], training: bool) -> None:
    pass


def _torchao_weight_only(model: nn.Module, rows: Mapping[str, int], training: bool) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in rows)


def _torchao_dynamic(model: nn.Module, rows: Mapping[str, int], training: bool) -> None:
    """Layers of a model with too few rows for it are weight-only; a layer alone is not replaced silently."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    dynamic = {name for name, count in rows.items() if count > _INT_MM_ROWS or len(rows) == 1}
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: name in dynamic)
    if dynamic != set(rows):
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in rows and name not in dynamic)


def _quanto(model: nn.Module, rows: Mapping[str, int], training: bool) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8, include=list(rows))
    freeze(model)


def _bitsandbytes(model: nn.Module, rows: Mapping[str, int], training: bool) -> None:
    """LLM.int8 without its outlier columns (threshold 0), the fastest it offers. It computes in float16 inside.

    Its CUDA code reads an input that is not contiguous as if it were (0.50.2; attention's `proj_in` in SDXL gets such), so it
    is given contiguous ones.
    """
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of its cast to float16 at every call

    def convert(linear: nn.Linear) -> nn.Module:
        has_bias = linear.bias is not None
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=has_bias, has_fp16_weights=False, threshold=0.0, device="meta"
        )
        # What moving the layer from the CPU to the card does: quantise the float16 weight by rows.
        q, scale, _ = bnb.functional.int8_vectorwise_quant(linear.weight.data.to(torch.float16))
        layer.weight = bnb.nn.Int8Params(q, requires_grad=False, has_fp16_weights=False, CB=q, SCB=scale)
        layer.bias = linear.bias
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]))
        return layer

    _replace(model, rows, convert)


def _sdnq(model: nn.Module, rows: Mapping[str, int], training: bool) -> None:
    """Weights by row and quantised matrix products, as its documentation recommends for int8."""
    if not torch.cuda.is_available():
        os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # no compiler for a toy
    sizes = {"minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0}
    if training:
        from sdnq.training import sdnq_training_post_load_quant

        sdnq_training_post_load_quant(
            model, weights_dtype="int8", group_size=-1, use_quantized_matmul=True, add_skip_keys=False, **sizes
        )
    else:
        from sdnq import sdnq_post_load_quant

        sdnq_post_load_quant(model, weights_dtype="int8", use_quantized_matmul=True, add_skip_keys=False, **sizes)


def _comfy_kitchen(model: nn.Module, rows: Mapping[str, int], training: bool) -> None:
    """A scale for each row of the weight, no rotation."""
    import comfy_kitchen

    backend = comfy_kitchen.list_backends()["cuda"]
    if torch.cuda.is_available() and not backend["available"]:  # it would fall back to slower code and say nothing
        raise RuntimeError(f"comfy-kitchen's CUDA code is not there: {backend['unavailable_reason']}")
    _replace(model, rows, lambda linear: _ComfyLinear(linear, comfy_kitchen))


class _ComfyLinear(nn.Module):
    def __init__(self, linear: nn.Linear, package: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self._package = linear.in_features, linear.out_features, package
        q, scale = package.quantize_int8_rowwise(linear.weight.data)
        self.register_buffer("qweight", q)
        self.register_buffer("scale", scale.float().reshape(-1).contiguous())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._package.int8_linear(x, self.qweight, self.scale, self.bias, x.dtype)


PEERS: dict[str, Peer] = {
    "bf16": Peer(None, _as_it_is),
    "torchao-w8a16": Peer("torchao", _torchao_weight_only),
    "torchao-w8a8": Peer("torchao", _torchao_dynamic, slow=True),
    "quanto": Peer("optimum-quanto", _quanto),
    "bitsandbytes": Peer("bitsandbytes", _bitsandbytes),
    "sdnq": Peer("sdnq", _sdnq, slow=True),
    "comfy-kitchen": Peer("comfy-kitchen", _comfy_kitchen),
}
DEFAULT = (
    "bf16",
    "bf16+compile",
    *OURS,
    "ours-auto+cudagraph",
    "ours-auto+streamed",
    "torchao-w8a16+compile",
    "torchao-w8a8+compile",
    "quanto",
    "bitsandbytes",
    "sdnq",
    "comfy-kitchen",
)


def is_ours(arm: str) -> bool:
    """Whether it is one of `OURS`, with or without a suffix."""
    name, _, how = arm.partition("+")
    return name in OURS and how in _HOW


def ours(arm: str) -> dict[str, str]:
    """Of one of our arms: `compute`, `backend` and `backing` of a whole model."""
    name, _, how = arm.partition("+")
    backend, backing = _HOW[how]
    return {"compute": OURS[name], "backend": backend, "backing": backing}


def peer_of(arm: str) -> Peer:
    """Raises KeyError if there is none of this name."""
    return PEERS[arm.partition("+")[0]]


def compiled(arm: str, model: Any, tiny: bool) -> Any:
    """The model as the arm's suffix wants it; a toy goes through Dynamo alone, without Inductor."""
    how = arm.partition("+")[2]
    if not how:
        return model
    if how not in ("compile", "max"):
        raise ValueError(f"{arm}: the suffix is +compile or +max")
    options: dict[str, Any] = {"dynamic": False}
    if tiny:
        options["backend"] = "eager"
    elif how == "max":
        options["mode"] = "max-autotune-no-cudagraphs"
    if hasattr(model, "compile_repeated_blocks"):
        model.compile_repeated_blocks(**options)
        return model
    return torch.compile(model, **options)


def raise_limits() -> None:
    """Dynamo may compile one function for as many shapes as there are."""
    for name in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 4096)


@torch.no_grad()
def linear_rows(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """The rows of x that each Linear is called with, by its name, in the order of the first calls."""
    rows: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def note(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                rows[name] = max(rows.get(name, 0), inputs[0].shape[:-1].numel())

            hooks.append(module.register_forward_pre_hook(note))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return rows


class _LoraLinear(nn.Module):
    """base(x) + up(down(x)); its parameters have PEFT's names."""

    def __init__(self, base: nn.Module, sizes: tuple[int, int], rank: int, like: torch.Tensor) -> None:
        super().__init__()
        kind: Any = {"bias": False, "device": like.device, "dtype": like.dtype}
        self.base = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(sizes[0], rank, **kind)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, sizes[1], **kind)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B["default"](self.lora_A["default"](x))


def add_lora(model: nn.Module, sizes: Mapping[str, tuple[int, int]], rank: int, like: torch.Tensor) -> None:
    """An adapter of scale 1 on each of these layers (name to in and out features), whatever they became; all else is frozen."""
    model.requires_grad_(False)
    for name, size in sizes.items():
        _set(model, name, _LoraLinear(model.get_submodule(name), size, rank, like))


def _replace(model: nn.Module, names: Iterable[str], convert: Callable[[nn.Linear], nn.Module]) -> None:
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        _set(model, name, convert(linear))


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
