"""Part "layers" of `peers.py`: one Linear layer, an arm beside cuBLAS in bf16, at the sizes of Flux, SDXL and SD3."""

from __future__ import annotations

import functools
import platform
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peers_arms import compiled, is_ours, ours, peer_of, raise_limits
from peers_schedule import Line
from peers_timing import Pair, ceilings, paired, quick_tuning, retune, rotating, set_count, settle
from torch import nn

__all__ = ["SHAPES", "TINY", "measure", "measure_ceilings"]

Shape = tuple[int, int, int]
SHAPES: dict[str, tuple[Shape, ...]] = {  # M, N, K
    "Flux, 1024x1024, batch 1": (
        (4608, 3072, 3072),
        (4608, 12288, 3072),
        (4608, 3072, 15360),
        (4096, 3072, 12288),
        (512, 12288, 3072),
        (16384, 3072, 3072),
        (1, 18432, 3072),
        (16, 3072, 3072),
    ),
    "SDXL, 1024x1024, batch 2": (
        (8192, 640, 640),
        (8192, 5120, 640),
        (8192, 640, 2560),
        (2048, 1280, 1280),
        (2048, 10240, 1280),
        (2048, 1280, 5120),
        (154, 1280, 2048),
        (2, 1280, 1280),
    ),
    "SD3.5 large, 1024x1024, batch 1": (
        (4250, 2432, 2432),
        (4250, 9728, 2432),
        (4250, 2432, 9728),
        (1, 14592, 2432),
    ),
}
TINY: dict[str, tuple[Shape, ...]] = {"toy": ((40, 96, 64), (2, 64, 64))}
Layer = Callable[[torch.Tensor], torch.Tensor]


def measure_ceilings(line: Line, tasks: Sequence[str], options: Mapping[str, Any]) -> None:
    """What the card is and can do, as a row of its own."""
    line.task(tasks[0])
    card = platform.processor() or platform.machine()
    if not options["tiny"]:
        properties = torch.cuda.get_device_properties(0)
        card = f"{properties.name}, {properties.multi_processor_count} SMs, CUDA {torch.version.cuda}"
    with line.alone():
        settle()
        line.say(event="ceilings", card=card, **ceilings(options["tiny"]))


def measure(line: Line, tasks: Sequence[str], options: Mapping[str, Any]) -> None:
    """Every arm at every shape of `options["shapes"]`, a row each."""
    quick_tuning()
    raise_limits()
    for arm in tasks:
        line.task(arm)
        with line.attempt(arm=arm):
            _measure_arm(line, arm, options)


@torch.no_grad()
def _measure_arm(line: Line, arm: str, options: Mapping[str, Any]) -> None:
    shapes, tiny = [tuple(shape) for shape in options["shapes"]], options["tiny"]
    line.say(event="arm", arm=arm, version=_version(arm))
    errors: dict[Shape, tuple[float, float]] = {}
    for shape in shapes:  # imports and compiles, while other processes do so too
        with line.attempt(arm=arm, shape=shape):
            x, weight, bias = _tensors(shape, 0, tiny)
            y = _layer(arm, weight, bias, shape, tiny)(x)
            exact = F.linear(x.double(), weight.double(), bias.double())
            errors[shape] = _error(y, exact), _error(F.linear(x, weight, bias), exact)
            del x, weight, bias, y, exact
        _release(tiny)
    with line.alone():
        settle()
        retune()
        for shape, (error, baseline_error) in errors.items():
            with line.attempt(arm=arm, shape=shape):
                pair = _pair(arm, shape, tiny)
                line.say(arm=arm, shape=shape, l2=error, baseline_l2=baseline_error, **vars(pair))
            _release(tiny)


def _pair(arm: str, shape: Shape, tiny: bool) -> Pair:
    m, n, k = shape
    sets = [_tensors(shape, i, tiny) for i in range(set_count(n * k + 2 * m * (n + k)))]
    layers = [_layer(arm, weight, bias, shape, tiny) for _, weight, bias in sets]
    plain = [functools.partial(F.linear, weight=weight, bias=bias) for _, weight, bias in sets]
    inputs = [x for x, _, _ in sets]
    return paired(rotating(plain, inputs), rotating(layers, inputs))


def _tensors(shape: Shape, seed: int, tiny: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K], weight [N, K], bias [N] in bf16, the same for every arm."""
    m, n, k = shape
    device = "cpu" if tiny else "cuda"
    generator = torch.Generator(device).manual_seed(seed)
    kind: Any = {"device": device, "generator": generator}
    x, weight, bias = torch.randn(m, k, **kind), torch.randn(n, k, **kind) * k**-0.5, torch.randn(n, **kind)
    return x.bfloat16(), weight.bfloat16(), bias.bfloat16()


def _layer(arm: str, weight: torch.Tensor, bias: torch.Tensor, shape: Shape, tiny: bool) -> Layer:
    if is_ours(arm):
        return _ours(ours(arm)["compute"], weight, bias)
    n, k = weight.shape
    linear = nn.Linear(k, n, device="meta")
    linear.weight, linear.bias = (nn.Parameter(tensor.clone(), requires_grad=False) for tensor in (weight, bias))
    model = nn.Sequential(OrderedDict(linear=linear)).eval()
    peer_of(arm).quantise(model, {"linear": shape[0]}, False)
    layer: Layer = compiled(arm, model, tiny)
    return layer


def _ours(compute: str, weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    from squareq_fx.kernels import dispatch, reference

    q, scale, zero = reference.quantize_weight(weight.float())
    bias = bias.float()
    return lambda x: dispatch.int8_linear(x, q, scale, zero, bias, compute=compute)


def _version(arm: str) -> str:
    if not is_ours(arm):
        return peer_of(arm).version()
    import squareq_fx

    return squareq_fx.__version__


def _error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def _release(tiny: bool) -> None:
    if not tiny:
        torch.cuda.empty_cache()
