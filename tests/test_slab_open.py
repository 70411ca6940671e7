"""Opening: every fault is found and all of them are listed; a clean slab has none (gates 0, 2, 10)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from slab_models import (
    UPSTREAM,
    Mixed,
    TinyNet,
    copy_slab,
    edit_header,
    edit_manifest,
    edit_tensor,
    restored,
)

from squareq_fx.errors import SlabError
from squareq_fx.slab import Slab, build_slab, open_slab


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    stem = tmp_path_factory.mktemp("built") / "mixed"
    build_slab(Mixed(), stem, example_inputs=(torch.zeros(1, 4, dtype=torch.int64),), progress=False)
    return stem


@pytest.fixture(params=["ours", "the original's"])
def stem(request: pytest.FixtureRequest, built: Path, tmp_path: Path) -> Path:
    return copy_slab(built if request.param == "ours" else UPSTREAM, tmp_path / "s")


def problems_of(stem: Path, **options: Any) -> str:
    with pytest.raises(SlabError) as caught:
        open_slab(stem, **options)
    assert str(caught.value).startswith((f"slab {stem}", "no slab at"))
    return str(caught.value)


def test_a_clean_slab_opens_by_any_of_its_names(stem: Path) -> None:
    for name in (stem, str(stem), f"{stem}.safetensors", Path(f"{stem}.manifest.json")):
        open_slab(name).verify()


def test_loading_again_gives_the_same(stem: Path) -> None:
    with open_slab(stem) as a, open_slab(stem) as b:
        for key, entry in a.tensors.items():
            x, y = a.tensor(key), b.tensor(key)
            assert torch.equal(x, y) and torch.equal(x, a.tensor(key))
            assert (x.dtype, tuple(x.shape), x.nbytes) == (entry.dtype, entry.shape, entry.nbytes)
            assert x.device.type == "cpu"


# Signature, ABI, bits, and the rest of the manifest
# -----------------------------------------------------------


def test_signature(stem: Path) -> None:
    good = open_slab(stem).signature
    open_slab(stem, expected_signature=good)
    assert "signature" in problems_of(stem, expected_signature="0" * 16)


def set_layer(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["layers"][0].__setitem__(key, value)


def set_head(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (set_head("kernel_abi_version", 999), "kernel_abi_version 999 is newer"),
        (set_head("kernel_abi_version", 0), "kernel_abi_version must be"),
        (set_head("kernel_abi_version", True), "kernel_abi_version must be"),
        (set_head("kernel_abi_version", 1.0), "kernel_abi_version must be"),
        (set_head("min_runtime_version", "0.2"), "min_runtime_version 0.2 is newer"),
        (set_head("min_runtime_version", "new"), "min_runtime_version must be"),
        (set_head("quant_version", "squareq_bp8_v3"), "quant_version is"),
        (set_head("model_signature", "XYZ"), "model_signature must be"),
        (set_head("architecture_id", None), "architecture_id must be"),
        (set_head("layer_count", 3), "layer_count is 3"),
        (set_head("layer_count", "10"), "layer_count"),
        (set_head("total_qweight_bytes", -1), "total_qweight_bytes"),
        (set_head("total_qweight_bytes", 1e400), "is not valid JSON"),
        (set_head("layers", {}), "layers must be a list"),
        (set_head("layers", [None]), "layers[0] must be an object"),
        (set_head("more", 1), "unknown key 'more'"),
        (lambda m: m.pop("quant_version"), "key quant_version is missing"),
        (lambda m: m["layers"].append(m["layers"][0]), "is listed twice"),
        (lambda m: m["layers"].reverse(), "not sorted"),
        (lambda m: m["layers"][0].pop("quant_bits"), "key quant_bits is missing"),
        (set_layer("quant_bits", 4), "kernels for 8 only"),
        (set_layer("quant_scheme", "per_tensor"), "quant_scheme is 'per_tensor'"),
        (set_layer("quant_axis", 1), "quant_axis is 1"),
        (set_layer("quant_axis", False), "quant_axis is False"),
        (set_layer("dtype_qweight", "int4"), "dtype_qweight is 'int4'"),
        (set_layer("dtype_scale", "float16"), "dtype_scale is 'float16'"),
        (set_layer("qweight_key", "elsewhere"), "qweight_key is 'elsewhere'"),
        (set_layer("canonical_name", 7), "canonical_name must be a string"),
        (set_layer("orig_shape", [96]), "orig_shape must be two sizes"),
        (set_layer("orig_shape", [-1, 3]), "orig_shape must be two sizes"),
        (set_layer("orig_shape", [True, 3]), "orig_shape must be two sizes"),
        (set_layer("orig_shape", [97, 48]), "packed_shape is"),
        (set_layer("packed_shape", [96, 65]), "packed_shape is [96, 65]"),
        (set_layer("pad_k", 2.0), "pad_k must be an integer"),
        (set_layer("block_id", 3), "block_id is 3"),
        (set_layer("more", 3), "unknown key 'more'"),
    ],
)
def test_tampered_manifests(edit: Callable[[dict[str, Any]], None], expected: str, stem: Path) -> None:
    edit_manifest(stem, edit)
    assert expected in problems_of(stem)


def test_faults_of_both_files_are_listed_together(tmp_path: Path) -> None:
    stem = copy_slab(UPSTREAM, tmp_path / "s")
    edit_manifest(stem, set_head("kernel_abi_version", 999))
    edit_manifest(stem, set_layer("quant_bits", 4))
    edit_tensor(stem, "head.scale", lambda s: s.fill_(0.0))
    edit_tensor(stem, "blocks.1.proj.scale", lambda s: s[3:4].fill_(float("nan")))
    edit_tensor(stem, "blocks.2.proj.bias", lambda s: s[3:4].fill_(float("inf")))
    with pytest.raises(SlabError) as caught:
        open_slab(stem, expected_signature="f" * 16)
    assert len(caught.value.problems) == 6
    for expected in (
        "999",
        "8 only",
        "7 zero",
        "'blocks.1.proj.scale' holds 1 NaN",
        "proj.bias' holds 0 NaN and 1 Inf",
        "ffff",
    ):
        assert expected in str(caught.value)


# The tensor file
# ---------------------------------------------------------------------------------------------


def test_every_missing_tensor_is_reported(tmp_path: Path) -> None:
    stem = copy_slab(UPSTREAM, tmp_path / "s")
    keys = ["head.qweight", "blocks.0.proj.bias", "blocks.1.ff.0.scale", "blocks.2.ff.2.zero_point"]

    def rename(header: dict[str, Any]) -> None:
        for key in keys:
            header[key + "x"] = header.pop(key)

    edit_header(stem, rename)
    text = problems_of(stem)
    assert all(f"tensor '{key}'" in text for key in keys) and text.count("is missing") == 4


@pytest.mark.parametrize(
    ("key", "dtype", "shape"),
    [
        ("head.qweight", "U8", [7, 64]),
        ("head.qweight", "I8", [64, 7]),
        ("head.qweight", "I8", [448]),
        ("head.scale", "I32", [7]),
        ("head.scale", "F32", [7, 1]),
        ("head.bias", "F32", [1, 7]),
        ("head.zero_point", "F16", [14]),
    ],
)
def test_wrong_dtypes_and_shapes(key: str, dtype: str, shape: list[int], tmp_path: Path) -> None:
    stem = copy_slab(UPSTREAM, tmp_path / "s")
    edit_header(stem, lambda header: header[key].update(dtype=dtype, shape=shape))
    assert f"tensor '{key}' is torch." in problems_of(stem)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["head.scale", "head.zero_point"])
def test_bad_scales_and_zero_points(key: str, value: float, tmp_path: Path) -> None:
    stem = copy_slab(UPSTREAM, tmp_path / "s")
    edit_tensor(stem, key, lambda values: values[2:3].fill_(value))
    if key == "head.zero_point" and value in (0.0, -1.0):
        open_slab(stem)
    else:
        assert f"'{key}' holds" in problems_of(stem)


@pytest.mark.parametrize("size", [0, 4, 8, 500, -1])
def test_truncated_and_overlong(size: int, stem: Path) -> None:
    path = f"{stem}.safetensors"
    os.truncate(path, size if size >= 0 else os.path.getsize(path) - 1)
    assert problems_of(stem)


def test_overlong(stem: Path) -> None:
    with open(f"{stem}.safetensors", "ab") as file:
        file.write(b"\0")
    assert "truncated or overlong" in problems_of(stem)


@pytest.mark.parametrize("suffix", [".safetensors", ".manifest.json"])
def test_absent_and_unreadable(suffix: str, stem: Path) -> None:
    path = Path(f"{stem}{suffix}")
    path.unlink()
    assert f"{path} does not exist" in problems_of(stem)
    path.mkdir()
    assert f"{path} does not exist" in problems_of(stem)


# What only our slabs can notice
# --------------------------------------------------------------------------------


def test_a_mixed_pair_is_refused(built: Path, tmp_path: Path) -> None:
    stem = copy_slab(built, tmp_path / "s")
    build_slab(Mixed(), tmp_path / "other", exclude=["shared"], progress=False)
    os.replace(tmp_path / "other.safetensors", f"{stem}.safetensors")
    assert "different builds" in problems_of(stem)


def test_a_manifest_reformatted_is_not_the_manifest(built: Path, tmp_path: Path) -> None:
    stem = copy_slab(built, tmp_path / "s")
    path = Path(f"{stem}.manifest.json")
    path.write_text(path.read_text() + "\n")
    assert "different builds" in problems_of(stem)


def test_the_header_is_sealed(built: Path, tmp_path: Path) -> None:
    stem = copy_slab(built, tmp_path / "s")

    def swap(header: dict[str, Any]) -> None:
        a, b = header["blocks.0.back.qweight"], header["blocks.1.back.qweight"]
        a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]

    edit_header(stem, swap)
    text = problems_of(stem)
    assert "header's checksum" in text and "file order" in text


def flip(path: str, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_found_on_first_use_and_by_verify(built: Path, tmp_path: Path) -> None:
    stem = copy_slab(built, tmp_path / "s")
    with open_slab(stem) as slab:
        start = os.path.getsize(slab.path) - slab.data.numel()
        entries = [
            slab.tensors[key] for key in ("blocks.0.inner.qweight", "conv.weight", "blocks.0.norm.bias")
        ]
    for entry in entries:
        flip(f"{stem}.safetensors", start + entry.offset + entry.nbytes // 2)
    slab = open_slab(stem)
    with pytest.raises(SlabError, match="checksum") as caught:
        slab.tensor("blocks.0.back.qweight")  # another tensor of the same segment
    assert len(caught.value.problems) == 2
    with pytest.raises(SlabError, match=r"conv\.weight"):
        slab.tensor("conv.weight")
    assert slab.tensor("conv.weight", verify=False).shape == (20, 20, 3)
    slab.verify_segment(["blocks.1.back.qweight"])
    with pytest.raises(SlabError) as caught:
        slab.verify()
    assert len(caught.value.problems) == 3


def test_a_plausible_scale_is_no_less_wrong(built: Path, tmp_path: Path) -> None:
    stem = copy_slab(built, tmp_path / "s")
    edit_tensor(stem, "shared.scale", lambda s: s.mul_(1.5))
    assert "'shared.scale' does not match its checksum" in problems_of(stem)


# The opened slab
# ---------------------------------------------------------------------------------------------


def test_views_share_the_mapping_and_stay_private(built: Path, tmp_path: Path) -> None:
    stem = copy_slab(built, tmp_path / "s")
    slab = open_slab(stem)
    q = slab.tensor("shared.qweight")
    entry = slab.tensors["shared.qweight"]
    assert q.data_ptr() == slab.data.data_ptr() + entry.offset
    assert slab.data.data_ptr() % 4096 == 0
    before = Path(slab.path).read_bytes()
    q.fill_(1)
    assert slab.data[entry.offset] == 1
    assert Path(slab.path).read_bytes() == before
    assert not torch.equal(open_slab(stem).tensor("shared.qweight"), q)


def test_a_misaligned_tensor_is_copied(tmp_path: Path) -> None:
    model = torch.nn.ModuleList(torch.nn.ParameterList() for _ in range(2))
    model[0].register_buffer("odd", torch.ones(3, dtype=torch.bool))
    model[1].register_buffer("x", torch.arange(4.0))
    model[1].register_buffer("none", torch.zeros(0))
    slab = build_slab(model, tmp_path / "s", block_pattern=r"\d", progress=False)
    assert slab.tensors["1.x"].offset == 3
    assert slab.tensor("1.x").tolist() == [0.0, 1.0, 2.0, 3.0]
    assert slab.tensor("1.none").shape == (0,)


def test_unknown_keys_say_what_to_ask_for(built: Path) -> None:
    slab = open_slab(built)
    for key, hint in (
        ("nothing", "no tensor 'nothing'"),
        ("shared.weight", "ask for shared.qweight"),
        ("out.weight", "stored as 'embed.weight'"),
    ):
        with pytest.raises(SlabError, match=hint):
            slab.tensor(key)


def test_closing(built: Path) -> None:
    slab = open_slab(built)
    view = slab.tensor("embed.weight")
    expected = view.clone()
    slab.close()
    slab.close()
    assert torch.equal(view, expected)
    for use in (lambda: slab.data, lambda: slab.tensor("embed.weight"), slab.verify):
        with pytest.raises(SlabError, match="closed"):
            use()
    with open_slab(built) as again:
        assert repr(again).startswith("Slab(")


def test_entries_are_frozen(built: Path) -> None:
    slab = open_slab(built)
    mappings: list[Any] = [slab.tensors, slab.layers, slab.passthrough, slab.aliases, slab.fidelity]
    for mapping in mappings:
        with pytest.raises(TypeError):
            mapping["x"] = None
    for record in (slab.manifest, slab.segments[0], next(iter(slab.tensors.values()))):
        with pytest.raises(AttributeError):
            record.name = "x"  # type: ignore[union-attr,misc]


def test_gate_2_row_error_rmse_and_bias(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = TinyNet()
    slab: Slab = build_slab(model, tmp_path / "s", progress=False)
    for name, layer in slab.layers.items():
        linear = model.get_submodule(name)
        weight, back = linear.weight.detach(), restored(slab, f"{name}.weight")  # type: ignore[operator]
        assert bool(((weight - back).abs() <= slab.tensor(layer.scale_key)[:, None] * 0.5001).all())
        assert float((weight - back).norm() / weight.norm()) < 0.05
        assert (layer.bias_key is None) == (linear.bias is None)
        if layer.bias_key is not None:
            assert torch.equal(slab.tensor(layer.bias_key), linear.bias.detach())  # type: ignore[operator]


def test_segments_change_their_sha_with_their_data(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = TinyNet()
    first = build_slab(model, tmp_path / "a", progress=False)
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    second = build_slab(model, tmp_path / "b", progress=False)
    assert [a.sha == b.sha for a, b in zip(first.segments, second.segments)] == [True, True, True, False]
