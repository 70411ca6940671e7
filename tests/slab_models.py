"""Small models and file surgery for the slab's tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from squareq_fx.kernels.reference import dequantize
from squareq_fx.slab import Slab

DATA = Path(__file__).parent / "data"
UPSTREAM = DATA / "upstream_v2_tiny"
UPSTREAM_WEIGHTS = DATA / "upstream_v2_tiny_weights.safetensors"


class TinyBlock(nn.Module):
    def __init__(self, proj_bias: bool, out_bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.proj = nn.Linear(48, 48, bias=proj_bias)
        self.ff = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48, bias=out_bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ff(self.proj(self.norm(x)))


class TinyNet(nn.Module):
    """The model the original's slab was built from, read off its weights' names and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TinyBlock(True, False), TinyBlock(False, True), TinyBlock(True, False)])
        self.head = nn.Linear(48, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Mixed(nn.Module):
    """Everything at once: convolution, embedding, tied weights, a shared module, a parameter on a non-leaf,
    buffers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 20))
        self.embed = nn.Embedding(11, 20)
        self.conv = nn.Conv1d(20, 20, 3, padding=1)
        self.shared = nn.Linear(20, 20)
        self.blocks = nn.ModuleList([MixedBlock(self.shared) for _ in range(2)])
        self.out = nn.Linear(20, 11, bias=False)
        self.out.weight = self.embed.weight
        self.unused = nn.Linear(20, 5)
        self.register_buffer("steps", torch.arange(20.0), persistent=False)
        self.register_buffer("count", torch.tensor(7))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.table[0] + self.steps
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class MixedBlock(nn.Module):
    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.scale_shift = nn.Parameter(torch.randn(20))
        self.norm = nn.LayerNorm(20)
        self.inner = nn.Linear(20, 33)
        self.back = nn.Linear(33, 20, bias=False)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shared(self.back(self.inner(self.norm(x))) * self.scale_shift)


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under every name."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def restored(slab: Slab, name: str) -> torch.Tensor:
    """What a slab says the tensor `name` of the model is, dequantised if it must be."""
    name = slab.aliases.get(name, name)
    if name in slab.passthrough:
        return slab.tensor(name)
    layer, _, leaf = name.rpartition(".")
    entry = slab.layers[layer]
    if leaf == "bias":
        assert entry.bias_key is not None
        return slab.tensor(entry.bias_key)
    parts = (slab.tensor(key) for key in (entry.qweight_key, entry.scale_key, entry.zero_point_key))
    return dequantize(*parts, entry.orig_shape[1])


def copy_slab(stem: Path, target: Path) -> Path:
    for suffix in (".safetensors", ".manifest.json"):
        shutil.copy(f"{stem}{suffix}", f"{target}{suffix}")
    return target


def edit_header(stem: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the parsed header of a data file in place and write it with a fitting length."""
    path = Path(f"{stem}.safetensors")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def edit_manifest(stem: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = Path(f"{stem}.manifest.json")
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest, indent=2))


def edit_tensor(stem: Path, key: str, edit: Callable[[torch.Tensor], None]) -> None:
    """Change the values of a float32 tensor in place."""
    path = Path(f"{stem}.safetensors")
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8:start])[key]["data_offsets"]
    values = torch.frombuffer(raw[start + begin : start + end], dtype=torch.float32).clone()
    edit(values)
    raw[start + begin : start + end] = values.numpy().tobytes()
    path.write_bytes(raw)
