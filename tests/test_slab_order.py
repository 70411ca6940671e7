"""The layout of a segment, and segments in execution order (gate 6)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from backbones import backbone, calls
from diffusers import FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from slab_models import Mixed, TinyNet
from torch import nn

import squareq_fx
from squareq_fx.blocks import block_paths
from squareq_fx.emit import emit
from squareq_fx.families import family_inputs
from squareq_fx.kernels.reference import packed_width
from squareq_fx.slab import build_slab, open_slab, segment_layout
from squareq_fx.slab.layout import is_aligned_layout
from squareq_fx.slab.order import group_segments, record_execution

NAMES = st.text("ab.", min_size=1, max_size=4)


@given(st.dictionaries(NAMES, st.integers(0, 5000)))
def test_layout_is_a_gapless_permutation_with_every_tensor_aligned(sizes: dict[str, int]) -> None:
    layout = segment_layout(sizes.items())
    assert sorted(name for name, _ in layout) == sorted(sizes)
    end = 0
    for name, offset in layout:
        assert offset == end
        align = min(256, sizes[name] & -sizes[name])
        assert not align or offset % align == 0
        end += sizes[name]
    assert layout == segment_layout(reversed(list(sizes.items())))


def test_layout_by_hand() -> None:
    sizes = {"b.qweight": 512, "a.scale": 28, "a.qweight": 448, "z": 0, "c": 7, "a.bias": 28}
    assert segment_layout(sizes.items()) == [
        ("b.qweight", 0),
        ("a.qweight", 512),
        ("a.bias", 960),
        ("a.scale", 988),
        ("c", 1016),
        ("z", 1023),
    ]


def test_what_one_product_could_read_lies_side_by_side() -> None:
    layers = ["n.add_k_proj", "n.add_q_proj", "n.add_v_proj", "n.to_k", "n.to_out.0", "n.to_q", "n.to_v", "n.to_add_out", "ff"]
    kinds = {"qweight": 1024, "scale": 64, "zero_point": 64, "bias": 64}
    sizes = {f"b.{layer}.{kind}": nbytes for layer in layers for kind, nbytes in kinds.items()}
    sizes |= {"b.n.norm_q.bias": 64, "b.n.norm_q.weight": 64, "b.table": 64}
    order = [name for name, _ in segment_layout(sizes.items())]
    beside = ["n.add_q_proj", "n.add_k_proj", "n.add_v_proj", "n.to_q", "n.to_k", "n.to_v", "n.to_add_out", "n.to_out.0"]
    for kind in ("qweight", "scale", "zero_point"):
        assert [name for name in order if name.endswith(kind)] == [f"b.{layer}.{kind}" for layer in ["ff", *beside]]
    assert [n for n in order if n.endswith(".bias")] == [f"b.{n}.bias" for n in ["ff", "n.norm_q", *beside]]


def test_layers_of_one_height_lie_side_by_side() -> None:
    """A gated feed-forward: linear_1 and linear_3 read one input, linear_2 has as many bytes and another height."""
    heights = {"ff.linear_1": 64, "ff.linear_2": 16, "ff.linear_3": 64}
    sizes = {f"{layer}.qweight": 64 * 16 for layer in heights} | {f"{layer}.scale": 4 * h for layer, h in heights.items()}
    order = [name for name, _ in segment_layout(sizes.items()) if name.endswith("qweight")]
    assert order == ["ff.linear_2.qweight", "ff.linear_1.qweight", "ff.linear_3.qweight"]


ATTENTIONS = {
    "FluxTransformer2DModel": [["to_q", "to_k", "to_v"], ["add_q_proj", "add_k_proj", "add_v_proj"]],
    "ChromaTransformer2DModel": [["to_q", "to_k", "to_v"], ["add_q_proj", "add_k_proj", "add_v_proj"]],
    "SD3Transformer2DModel": [["to_q", "to_k", "to_v"], ["add_q_proj", "add_k_proj", "add_v_proj"]],
    "WanTransformer3DModel": [["to_q", "to_k", "to_v"]],
    "UNet2DConditionModel": [["to_q", "to_k", "to_v"], ["to_k", "to_v"]],
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}


@pytest.mark.parametrize("family", ATTENTIONS)
def test_q_k_and_v_of_real_models_lie_side_by_side(family: str) -> None:
    with init_empty_weights(include_buffers=False):
        model = getattr(diffusers, family)(**(SDXL if family.startswith("UNet") else {}))
    found = 0
    for block in block_paths(model):
        layers = {f"{block}.{n}": m for n, m in model.get_submodule(block).named_modules() if isinstance(m, nn.Linear)}
        sizes: dict[str, int] = {}
        for name, layer in layers.items():
            sizes[f"{name}.qweight"] = layer.out_features * packed_width(layer.in_features, 64)
            kinds = ("scale", "zero_point", "bias") if layer.bias is not None else ("scale", "zero_point")
            sizes |= {f"{name}.{kind}": 4 * layer.out_features for kind in kinds}
        place = dict(segment_layout(sizes.items()))
        for parent in sorted({name.rpartition(".")[0] for name in layers}):
            for group in ATTENTIONS[family]:
                members = [f"{parent}.{name}" for name in group]
                shapes = {layers[m].weight.shape for m in members if m in layers}
                if not all(m in layers for m in members) or len(shapes) > 1:
                    continue
                found += 1
                for kind in ("qweight", "scale", "zero_point", "bias"):
                    keys = [f"{m}.{kind}" for m in members if f"{m}.{kind}" in sizes]
                    assert [place[b] for b in keys[1:]] == [place[a] + sizes[a] for a in keys[:-1]], keys
    assert found >= len(block_paths(model))


def test_a_slab_of_the_earlier_order_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs were laid out by alignment, then by name. Their blocks are put together tensor by tensor."""

    def earlier(entries: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        placed, end = [], 0
        for name, nbytes in sorted(entries, key=lambda e: (-min(e[1] & -e[1], 256), e[0])):
            placed.append((name, end))
            end += nbytes
        return placed

    model, call = backbone("flux"), calls("flux", 2)
    new = build_slab(model, tmp_path / "new", progress=False)
    with monkeypatch.context() as patched:
        patched.setattr("squareq_fx.slab.plan.segment_layout", earlier)
        build_slab(model, tmp_path / "old", progress=False)
    old = open_slab(tmp_path / "old")
    assert list(old.tensors) != list(new.tensors) and old.tensors.keys() == new.tensors.keys()
    old.verify()
    gm = squareq_fx.capture(model, call)
    graph = squareq_fx.run(gm, squareq_fx.default_passes(new))
    expected = emit(graph, model, new)(**call).sample
    for backing in ("host", "disk", "resident"):
        module = emit(graph, model, old, backing=backing)
        assert torch.equal(module(**call).sample, expected)
        block = module.runtime.store.segment("transformer_blocks.0")
        assert block.data_offset is None and len(block.pieces) > 1
        module.shutdown()


def test_a_gap_in_a_segment_is_refused(tmp_path: Path) -> None:
    assert is_aligned_layout([(0, 512), (512, 448), (960, 28)])
    assert not is_aligned_layout([(0, 512), (513, 448)])
    assert not is_aligned_layout([(0, 28), (28, 512)])


def test_blocks_of_one_structure_have_one_layout(tmp_path: Path) -> None:
    slab = build_slab(Mixed(), tmp_path / "s", progress=False)
    first, second = ([key.split(".", 2)[2] for key in s.tensors] for s in slab.segments if "blocks" in s.name)
    assert first == second


PATHS = ["", "a", "a.x", "b.0", "b.0.x", "b.0.y", "b.1", "b.1.x", "c"]


@given(
    st.lists(st.sampled_from(PATHS), unique=True).map(lambda o: sorted(o, key=PATHS.index)),
    st.none() | st.lists(st.sampled_from(PATHS), max_size=20),
)
def test_segments_partition_the_owners(owners: list[str], visits: list[str] | None) -> None:
    segments = group_segments(owners, visits, ["b.0", "b.1"])
    assert sorted(owner for _, members in segments for owner in members) == sorted(owners)
    assert all(members for _, members in segments)
    assert len({name for name, _ in segments}) == len(segments)
    for name, members in segments:
        in_block = {m for m in members if m.startswith(("b.0", "b.1"))}
        assert in_block == (set(members) if name in ("b.0", "b.1") else set())


def test_segments_by_hand() -> None:
    owners = ["late", "stem", "b.0", "b.0.lin", "b.0.attn.out", "b.1.lin", "mid", "tail", "never"]
    visits = ["", "stem", "b.0", "b.0.lin", "b.0.attn", "stem", "mid", "b.1.lin", "b.0", "late", "tail"]
    assert group_segments(owners, visits, ["b.0", "b.1"]) == [
        ("glue.stem", ["stem"]),
        ("b.0", ["b.0", "b.0.lin", "b.0.attn.out"]),
        ("glue.mid", ["mid"]),
        ("b.1", ["b.1.lin"]),
        ("glue.late", ["late", "tail"]),
        ("glue.never", ["never"]),
    ]


def test_a_block_called_glue_something_keeps_its_name() -> None:
    assert group_segments(["a", "glue.a"], None, ["glue.a"]) == [("glue.a'", ["a"]), ("glue.a", ["glue.a"])]


class Reversed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(3))
        self.stem = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor, *, swap: bool = True) -> torch.Tensor:
        x = self.stem(x) * self.gain
        for layer in reversed(self.layers):
            x = layer(x)
        return self.tail(self.stem(x))


@pytest.mark.parametrize(
    "inputs", [{"x": torch.zeros(2, 8)}, (torch.zeros(2, 8),), ((torch.zeros(2, 8),), {"swap": False})]
)
def test_the_file_is_in_execution_order(inputs: Any, tmp_path: Path) -> None:
    model = Reversed()
    slab = build_slab(model, tmp_path / "s", example_inputs=inputs, progress=False)
    assert [s.name for s in slab.segments] == ["glue", "layers.2", "layers.1", "layers.0", "glue.tail"]
    assert slab.segments[0].tensors[0] == "stem.qweight" and "gain" in slab.segments[0].tensors
    assert [slab.segments[i].offset for i in range(1, 5)] == [s.offset + s.nbytes for s in slab.segments[:4]]
    assert [key for s in slab.segments for key in s.tensors] == list(slab.tensors)
    assert slab.block_paths == ("layers.0", "layers.1", "layers.2")


def test_without_inputs_registration_order(tmp_path: Path) -> None:
    slab = build_slab(Reversed(), tmp_path / "s", progress=False)
    assert [s.name for s in slab.segments] == ["glue", "layers.0", "layers.1", "layers.2", "glue.stem"]


def test_a_block_pattern(tmp_path: Path) -> None:
    inputs = (torch.zeros(2, 8),)
    slab = build_slab(Reversed(), tmp_path / "s", block_pattern="tail", example_inputs=inputs, progress=False)
    assert [s.name for s in slab.segments] == ["glue", "tail"]


def test_every_module_is_in_its_block(tmp_path: Path) -> None:
    slab = build_slab(TinyNet(), tmp_path / "s", progress=False)
    for segment in slab.segments:
        inside = {key.startswith(segment.name + ".") for key in segment.tensors}
        assert inside == {segment.name.startswith("blocks.")}


def test_recording_leaves_no_trace() -> None:
    class Caches(nn.Linear):
        cache: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache = super().forward(x)
            return self.cache

    model = nn.Sequential(Caches(3, 3), nn.BatchNorm1d(3))
    assert record_execution(model, (torch.empty(2, 3, device="meta"),), {}) == ["", "0", "1"]
    assert model[0].cache is None and int(model[1].num_batches_tracked) == 0
    assert not model[0].weight.is_meta and not model[0]._forward_pre_hooks


def test_the_whole_of_flux_is_in_execution_order() -> None:
    with init_empty_weights(include_buffers=False):
        model = FluxTransformer2DModel(guidance_embeds=True)
    inputs = family_inputs(model)
    assert inputs is not None
    visits = record_execution(model, inputs.args, inputs.kwargs)
    owners = [path for path, m in model.named_modules() if m._parameters]
    names = [name for name, _ in group_segments(owners, visits, block_paths(model))]
    blocks = [f"transformer_blocks.{i}" for i in range(19)]
    blocks += [f"single_transformer_blocks.{i}" for i in range(38)]
    assert names == ["glue.x_embedder", *blocks, "glue.norm_out.linear"]
