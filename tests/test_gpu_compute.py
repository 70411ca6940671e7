"""Compute modes and backends on a card: every way of running a backbone gives what W8A16, operation by operation, gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_gpu_training import cosine, inputs, loss_of, model_and_slab

import squareq_fx
from squareq_fx import Lora

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

WAYS = (
    ("flux", "w8a8", "eager"),
    ("flux", "w8a8", "inductor"),
    ("flux", "auto", "eager"),
    ("flux", "w8a16", "cudagraph"),
    ("flux", "w8a8", "eager+cudagraph"),
    ("sdxl", "w8a8", "inductor"),
    ("sdxl", "w8a16", "cudagraph"),
)
SIZES = ((2, 24, 32, 32), (1, 32, 28, 48))


def compiled(family: str, **options: Any) -> squareq_fx.CompiledModule:
    model, slab = model_and_slab(family)
    return squareq_fx.compile(model, slab, progress=False, cache=False, **options)


@pytest.mark.parametrize(("family", "compute", "backend"), WAYS)
def test_every_way_of_running_agrees(family: str, compute: str, backend: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("SQUAREQ_CACHE_DIR", str(tmp_path))
    plain, other = compiled(family), compiled(family, compute=compute, backend=backend)
    with torch.no_grad():
        for sizes in (*SIZES, *SIZES, *SIZES):  # a graph is recorded the second time and replayed from the third on
            call = inputs(family, *sizes)
            assert cosine(other(**call).sample, plain(**call).sample) >= 0.999
    assert len({c.function for c in other.lowering.compilations}) == len(other.lowering.compilations), "a size was compiled for"
    if compute == "auto":
        assert "ms" in squareq_fx.explain(other)
    plain.shutdown()
    other.shutdown()


@pytest.mark.parametrize("backend", ["inductor", "cudagraph", "eager+cudagraph"])
def test_gradients_agree(backend: Any) -> None:
    lora = Lora(rank=4, alpha=4, targets="attention")
    modules = [compiled("flux", lora=lora), compiled("flux", lora=lora, backend=backend)]
    for module in modules:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in sorted(module.adapter_parameters().items()):
                p.copy_(torch.randn(p.shape, generator=generator) * (0.05 if "lora_B" in name else p.shape[1] ** -0.5))
    for sizes in ((2, 8, 12, 32), (1, 12, 10, 48)) * 2:
        found = []
        for module in modules:
            loss_of(module(**inputs("flux", *sizes)).sample).backward()
            found.append({name: p.grad.clone() for name, p in module.adapter_parameters().items()})
            module.zero_grad(set_to_none=True)
        assert all(cosine(found[1][name], gradient) >= 0.999 for name, gradient in found[0].items())
    for module in modules:
        module.shutdown()
