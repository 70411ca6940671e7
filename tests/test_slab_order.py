"""The layout of a segment, and segments in execution order (gate 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from slab_models import Mixed, TinyNet
from torch import nn

from squareq_fx.blocks import block_paths
from squareq_fx.families import family_inputs
from squareq_fx.slab import build_slab, segment_layout
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
