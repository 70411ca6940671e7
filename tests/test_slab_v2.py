"""The V2 format, bit for bit, in both directions (gate 0)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from slab_models import UPSTREAM, UPSTREAM_WEIGHTS, TinyNet, copy_slab, edit_tensor
from torch import nn

from squareq_fx.errors import SlabError
from squareq_fx.kernels.reference import dequantize
from squareq_fx.slab import build_slab, model_signature, open_slab


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stem = tmp_path_factory.mktemp("slab") / "tiny"
    build_slab(UPSTREAM_WEIGHTS, stem, model_class=TinyNet, architecture_id="tiny_net", progress=False)
    return stem


def test_tensors_are_the_originals_bit_for_bit(tiny: Path) -> None:
    ours, theirs = load_file(f"{tiny}.safetensors"), load_file(f"{UPSTREAM}.safetensors")
    assert {k for k in ours if not k.startswith("blocks.") or ".norm." not in k} == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


def test_manifest_is_the_originals_text(tiny: Path) -> None:
    assert Path(f"{tiny}.manifest.json").read_bytes() == Path(f"{UPSTREAM}.manifest.json").read_bytes()
    assert open_slab(tiny).signature == "4292d775a492f155"


def test_exactly_two_files(tiny: Path) -> None:
    assert sorted(p.name for p in tiny.parent.iterdir()) == ["tiny.manifest.json", "tiny.safetensors"]


def test_from_the_loaded_module_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    model = TinyNet()
    model.load_state_dict(load_file(UPSTREAM_WEIGHTS))
    build_slab(model, tmp_path / "m.safetensors", architecture_id="tiny_net", progress=False)
    for suffix in (".safetensors", ".manifest.json"):
        assert (tmp_path / f"m{suffix}").read_bytes() == Path(f"{tiny}{suffix}").read_bytes()


def test_a_v2_reader_that_goes_by_names_finds_everything(tiny: Path) -> None:
    manifest = json.loads(Path(f"{tiny}.manifest.json").read_text())
    with safe_open(f"{tiny}.safetensors", "pt") as file:
        for layer in manifest["layers"]:
            out, packed = layer["packed_shape"]
            q = file.get_tensor(layer["qweight_key"])
            assert (q.dtype, list(q.shape)) == (torch.int8, [out, packed])
            assert not q[:, layer["orig_shape"][1] :].any()
            for key in ("scale_key", "zero_point_key", "bias_key"):
                if layer[key] is not None:
                    tensor = file.get_tensor(layer[key])
                    assert (tensor.dtype, list(tensor.shape)) == (torch.float32, [out])


def test_the_header_is_aligned_and_the_data_without_holes(tiny: Path) -> None:
    raw = Path(f"{tiny}.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 4096 == 0
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    spans = [entry["data_offsets"] for entry in header.values()]
    assert spans[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert spans[-1][1] == len(raw) - 8 - length


def test_opens_the_originals_slab() -> None:
    with open_slab(f"{UPSTREAM}.manifest.json", expected_signature="4292d775a492f155") as slab:
        assert (len(slab.layers), slab.segments, slab.fidelity, slab.passthrough) == (10, (), {}, {})
        assert slab.input_signature is None and slab.block_paths == () and slab.aliases == {}
        weights = load_file(UPSTREAM_WEIGHTS)
        for name, layer in slab.layers.items():
            scale = slab.tensor(layer.scale_key)
            parts = slab.tensor(layer.qweight_key), scale, slab.tensor(layer.zero_point_key)
            error = (dequantize(*parts, layer.orig_shape[1]) - weights[f"{name}.weight"]).abs()
            assert bool((error <= scale[:, None] * 0.5001).all())
        slab.verify()


def test_another_zero_point_is_taken(tmp_path: Path) -> None:
    stem = copy_slab(UPSTREAM, tmp_path / "s")
    edit_tensor(stem, "head.zero_point", lambda z: z.fill_(3.0))
    assert open_slab(stem).tensor("head.zero_point").tolist() == [3.0] * 7


def test_signature() -> None:
    model = nn.ModuleDict({"linear_a": nn.Linear(100, 32), "linear_b": nn.Linear(32, 48, bias=False)})
    assert model_signature(model) == "c572ee461a66155c"
    assert model_signature(nn.LayerNorm(3)) == "e3b0c44298fc1c14"


@pytest.mark.parametrize("pack_k", [-1, 0, 1, 2, 64, 100])
def test_pack_k(pack_k: int, tmp_path: Path) -> None:
    slab = build_slab(nn.Sequential(nn.Linear(100, 3)), tmp_path / "s", pack_k=pack_k, progress=False)
    width = {64: 128}.get(pack_k, 100)
    assert slab.layers["0"].packed_shape == (3, width)
    assert slab.layers["0"].pad_k == pack_k
    assert slab.manifest.total_qweight_bytes == 3 * width
    assert not slab.tensor("0.qweight")[:, 100:].any()


@pytest.mark.parametrize("pack_k", [True, 2.0, "64", 1 << 40])
def test_pack_k_that_is_none(pack_k: object, tmp_path: Path) -> None:
    with pytest.raises(SlabError, match="pack_k"):
        build_slab(nn.Linear(4, 4), tmp_path / "s", pack_k=pack_k, progress=False)  # type: ignore[arg-type]


def test_include_prefixes_and_exclude(tmp_path: Path) -> None:
    model = TinyNet()

    def names(**options: object) -> list[str]:
        return list(build_slab(model, tmp_path / "s", progress=False, **options).layers)  # type: ignore[arg-type]

    assert names(include_prefixes=["blocks.1.", "head"]) == [
        "blocks.1.ff.0",
        "blocks.1.ff.2",
        "blocks.1.proj",
        "head",
    ]
    assert names(include_prefixes="head") == ["head"]
    assert names(exclude=["blocks.*"]) == ["head"]
    assert names(exclude=["*.ff.?", "head"]) == ["blocks.0.proj", "blocks.1.proj", "blocks.2.proj"]
    with pytest.raises(SlabError, match=r"include_prefixes.*'nothing'") as caught:
        names(include_prefixes=["nothing", "head"], exclude=["haed"])
    assert len(caught.value.problems) == 2 and "head" in caught.value.problems[1]


def test_an_excluded_layer_is_passed_through_and_the_signature_stays(tmp_path: Path) -> None:
    model = TinyNet()
    slab = build_slab(model, tmp_path / "s", exclude=["head"], progress=False)
    assert torch.equal(slab.tensor("head.weight"), model.head.weight)
    assert torch.equal(slab.tensor("head.bias"), model.head.bias)
    assert slab.signature == model_signature(model)


def test_tiny_and_huge_weights(tmp_path: Path) -> None:
    model = nn.Linear(70, 6)
    with torch.no_grad():
        model.weight[0] = 0.0
        model.weight[1] *= 1e-30
        model.weight[2] *= 1e30
        model.weight[3] *= 1e-7
    slab = build_slab(model, tmp_path / "s", progress=False)
    scale = slab.tensor(".scale")
    assert scale[0] == scale[1] == 1e-8 and torch.isfinite(scale).all()
    restored = dequantize(slab.tensor(".qweight"), scale, slab.tensor(".zero_point"), 70)
    assert bool(((restored - model.weight).abs() <= scale[:, None] * 0.5001).all())
    cosine, relative = slab.fidelity[""]
    expected = torch.nn.functional.cosine_similarity(
        restored.double().flatten(), model.weight.double().flatten(), 0
    )
    assert cosine == pytest.approx(float(expected.detach()), abs=1e-8)
    error = (restored - model.weight).double().norm() / model.weight.double().norm()
    assert relative == pytest.approx(float(error), rel=1e-4)


def test_fidelity_is_that_of_the_dequantised_weight(tiny: Path) -> None:
    weights = load_file(UPSTREAM_WEIGHTS)
    with open_slab(tiny) as slab:
        for name, (cosine, relative) in slab.fidelity.items():
            layer, w = slab.layers[name], weights[f"{name}.weight"].double()
            parts = (slab.tensor(k) for k in layer.keys[:3])
            back = dequantize(*parts, layer.orig_shape[1]).double()
            assert cosine == pytest.approx(float((w * back).sum() / w.norm() / back.norm()), abs=1e-8)
            assert relative == pytest.approx(float((w - back).norm() / w.norm()), rel=1e-5)
            assert relative < 0.05


def test_a_layer_without_elements(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(0, 3), "b": nn.Linear(3, 0), "c": nn.LayerNorm(3)})
    slab = build_slab(model, tmp_path / "s", progress=False)
    assert slab.layers["a"].packed_shape == (3, 0) and slab.layers["b"].packed_shape == (0, 64)
    assert slab.tensor("b.scale").shape == (0,)
    slab.verify()
    with safe_open(str(slab.path), "pt") as file:
        assert file.get_tensor("b.qweight").shape == (0, 64)


def test_a_model_without_linear_layers(tmp_path: Path) -> None:
    slab = build_slab(nn.Conv2d(3, 4, 1), tmp_path / "s", progress=False)
    assert slab.signature == "e3b0c44298fc1c14" and slab.manifest.layer_count == 0
    assert set(slab.passthrough) == {"weight", "bias"}


def test_a_model_without_anything(tmp_path: Path) -> None:
    slab = build_slab(nn.Identity(), tmp_path / "s", progress=False)
    assert slab.data.numel() == 0 and slab.tensors == {} and slab.segments == ()
    slab.verify()


def test_the_original_could_have_written_other_metadata(tmp_path: Path) -> None:
    stem = copy_slab(UPSTREAM, tmp_path / "s")
    save_file(load_file(f"{UPSTREAM}.safetensors"), f"{stem}.safetensors", metadata={"format": "pt"})
    assert len(open_slab(stem).layers) == 10
