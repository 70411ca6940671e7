"""Any model, any options: what comes out of a slab is what went in, and the file is the same from memory or
from disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from slab_models import named, restored
from torch import nn

from squareq_fx.kernels.reference import quantize_weight
from squareq_fx.slab import build_slab, model_signature

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZE = st.integers(1, 70)


@dataclass(frozen=True)
class Spec:
    """One module of a random model; `back` points to an earlier one for "share" and "tie"."""

    kind: str
    a: int
    b: int
    bias: bool
    dtype: torch.dtype
    back: int

    def make(self, earlier: list[nn.Module]) -> nn.Module:
        if self.kind in ("share", "tie") and earlier:
            other = earlier[self.back % len(earlier)]
            if self.kind == "share":
                return other
            weight = getattr(other, "weight", None)
            if weight is not None and weight.dim() == 2:
                out, width = weight.shape
                fresh = nn.Linear(width, out, bias=self.bias) if self.a % 2 else nn.Embedding(out, width)
                fresh.to(weight.dtype)
                fresh.weight = weight
                return fresh
        module: nn.Module
        if self.kind == "norm":
            module = nn.BatchNorm1d(self.a)
        elif self.kind == "conv":
            module = nn.Conv1d(self.a, self.b, 1 + self.back % 3, bias=self.bias)
        elif self.kind == "embed":
            module = nn.Embedding(self.a, self.b)
        elif self.kind == "loose":
            module = nn.ParameterDict({"p": nn.Parameter(torch.randn(self.a))})
            module.register_buffer("own", torch.arange(self.b), persistent=self.bias)
            module.register_buffer("flags", torch.rand(self.b) > 0.5)
        elif self.kind == "pair":
            module = nn.Sequential(nn.Linear(self.a, self.b, bias=self.bias), nn.Linear(self.b, self.a))
        else:
            module = nn.Linear(self.a, self.b, bias=self.bias)
        return module.to(self.dtype)


SPECS = st.lists(
    st.builds(
        Spec,
        st.sampled_from(
            ["linear", "linear", "pair", "pair", "norm", "conv", "embed", "loose", "share", "tie"]
        ),
        SIZE,
        SIZE,
        st.booleans(),
        st.sampled_from(DTYPES),
        st.integers(0, 9),
    ),
    max_size=6,
)


def make_model(specs: list[Spec]) -> nn.ModuleList:
    torch.manual_seed(len(specs))
    made: list[nn.Module] = []
    for spec in specs:
        made.append(spec.make(made))
    return nn.ModuleList(made)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roundtrip")


@given(SPECS, st.sampled_from([0, 1, 7, 64]), st.booleans())
def test_round_trip(place: Path, specs: list[Spec], pack_k: int, passthrough: bool) -> None:
    model = make_model(specs)
    slab = build_slab(model, place / "s", pack_k=pack_k, passthrough=passthrough, progress=False)
    slab.verify()
    assert slab.signature == model_signature(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert list(slab.layers) == sorted(linears)
    for name, linear in linears.items():
        keys = slab.layers[name].keys
        expected = quantize_weight(linear.weight.detach(), pack_k)
        for key, tensor in zip(keys, expected):
            assert torch.equal(slab.tensor(key), tensor), key
        assert len(keys) == (3 if linear.bias is None else 4)
        if linear.bias is not None:
            assert torch.equal(slab.tensor(keys[3]), linear.bias.detach().float())
    if not passthrough:
        assert not slab.passthrough
    quantised = {f"{name}.{leaf}" for name in linears for leaf in ("weight", "bias")}
    for name, tensor in named(model).items():
        stored = slab.aliases.get(name, name)
        if stored in slab.passthrough:
            assert slab.tensor(stored).dtype == tensor.dtype and torch.equal(slab.tensor(stored), tensor)
        elif stored in quantised:
            scale = (
                tensor.new_tensor(0.0) if tensor.dim() == 1 else slab.tensor(f"{stored[:-7]}.scale")[:, None]
            )
            assert bool(((restored(slab, name) - tensor.float()).abs() <= scale * 0.5001).all())
        else:
            assert not passthrough


@given(SPECS)
def test_a_v2_reader_sees_the_same(place: Path, specs: list[Spec]) -> None:
    slab = build_slab(make_model(specs), place / "s", progress=False)
    manifest = json.loads(Path(f"{place}/s.manifest.json").read_text())
    assert manifest["layer_count"] == len(manifest["layers"]) == len(slab.layers)
    assert manifest["total_qweight_bytes"] == sum(
        e.nbytes for key, e in slab.tensors.items() if key.endswith(".qweight")
    )
    with safe_open(str(slab.path), "pt") as file:
        assert set(file.keys()) == set(slab.tensors)
        for key in file.keys():  # noqa: SIM118  not a mapping
            theirs = file.get_tensor(key)
            assert theirs.dtype == slab.tensors[key].dtype and torch.equal(theirs, slab.tensor(key))


@given(SPECS)
def test_segments_cover_the_file_in_order(place: Path, specs: list[Spec]) -> None:
    slab = build_slab(make_model(specs), place / "s", progress=False)
    end = 0
    for segment in slab.segments:
        assert segment.offset == end
        end += segment.nbytes
        assert slab.verify_segment(segment.tensors) is None
    assert end == slab.data.numel()
    assert [key for segment in slab.segments for key in segment.tensors] == list(slab.tensors)


@given(SPECS)
def test_from_disk_as_from_memory(place: Path, specs: list[Spec]) -> None:
    model = make_model(specs)
    file = place / "w.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}, file)
    build_slab(model, place / "memory", progress=False)

    def skeleton() -> Any:
        return make_model(specs)

    build_slab(file, place / "disk", model_class=skeleton, progress=False)
    for suffix in (".safetensors", ".manifest.json"):
        assert Path(f"{place}/memory{suffix}").read_bytes() == Path(f"{place}/disk{suffix}").read_bytes()
