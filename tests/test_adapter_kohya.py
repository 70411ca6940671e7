"""Kohya's files: names of three languages, fused layers, and diffusers' own loaders as the judge of both directions."""

from __future__ import annotations

import functools
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from backbones import backbone
from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import assert_same, assert_same_effect, delta, fresh, linear_layers, make, output, with_weights_added
from models import seeded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from squareq_fx.adapters import Adapter, LayerAdapter, read_adapter, write_adapter
from squareq_fx.adapters.kohya_names import Names, bfl_names, is_flux_shaped
from squareq_fx.errors import AdapterError

Layers = dict[str, tuple[int, int]]


@functools.cache
def full_size(model: str) -> nn.Module:
    """Without weights. One double and one single block are enough of Flux: diffusers' converter knows its real widths only."""
    with torch.device("meta"):
        if model == "flux":
            return diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        return diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def pair(name: str, rank: int, size: tuple[int, int], alpha: float | None = 1.0) -> dict[str, torch.Tensor]:
    tensors = {f"{name}.lora_down.weight": torch.randn(rank, size[1]), f"{name}.lora_up.weight": torch.randn(size[0], rank)}
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


def as_diffusers_reads(state_dict: dict[str, torch.Tensor]) -> dict[str, LayerAdapter]:
    """What Flux's pipeline takes of what its `lora_state_dict` gives; the alphas are in the weights by then."""
    prefix, suffix = "transformer.", ".lora_A.weight"
    downs = {key: down for key, down in state_dict.items() if key.startswith(prefix) and key.endswith(suffix)}
    return {
        key.removeprefix(prefix).removesuffix(suffix): LayerAdapter(down, state_dict[key.replace("_A.", "_B.")], down.shape[0])
        for key, down in downs.items()
    }


# The original UNet's names.


def ldm_name(layer: str, layers_per_block: int) -> str:
    """Of a layer of diffusers' UNet, written from the two architectures, not from diffusers' converter."""
    per_block = layers_per_block + 1
    rules = [
        (r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", lambda m: f"input_blocks.{1 + int(m[1]) * per_block + int(m[3])}"),
        (r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", lambda m: f"output_blocks.{int(m[1]) * per_block + int(m[3])}"),
    ]
    for pattern, block in rules:
        match = re.match(pattern, layer)
        if match:
            part = "0" if match[2] == "resnets" else "1"
            return f"{block(match)}.{part}{layer[match.end() :].replace('time_emb_proj', 'emb_layers.1')}".replace(".", "_")
    for old, new in [
        ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.0.time_emb_proj", "middle_block.0.emb_layers.1"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ]:
        if layer.startswith(old):
            return (new + layer[len(old) :]).replace(".", "_")
    raise AssertionError(layer)


@pytest.mark.parametrize(("layers_of", "layers_per_block"), [("tiny", 1), ("full", 2)])
def test_every_linear_of_sdxl_by_its_original_name(layers_of: str, layers_per_block: int) -> None:
    layers = linear_layers(backbone("sdxl") if layers_of == "tiny" else full_size("sdxl"))
    names = Names(layers)
    for layer in layers:
        slots = names.slots(ldm_name(layer, layers_per_block))
        assert [slot.layer for slot in slots] == [layer]
    assert sum("attn" in layer for layer in layers) == (560 if layers_of == "full" else 64)


def test_the_published_names_of_sdxl() -> None:
    names = Names(linear_layers(full_size("sdxl")))
    for name, layer in {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "middle_block_1_transformer_blocks_9_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
        "output_blocks_5_1_transformer_blocks_1_attn2_to_out_0": "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0",
        "output_blocks_2_1_transformer_blocks_3_ff_net_2": "up_blocks.0.attentions.2.transformer_blocks.3.ff.net.2",
    }.items():
        assert [slot.layer for slot in names.slots(name)] == [layer]
        assert [slot.layer for slot in names.slots(layer.replace(".", "_"))] == [layer]


def test_a_file_with_original_names_is_what_diffusers_reads_in_it(tmp_path: Path) -> None:
    layers = linear_layers(backbone("sdxl"))
    named = {layer: ldm_name(layer, 1) for layer in layers if "attentions" in layer}
    tensors: dict[str, torch.Tensor] = {}
    with seeded(5):
        for i, (layer, name) in enumerate(named.items()):
            tensors |= pair(f"lora_unet_{name}", 2 + i % 3, layers[layer], 1.0 + i % 2)
    save_file(tensors, tmp_path / "ldm.safetensors")
    got = read_adapter(tmp_path / "ldm.safetensors", layers)
    config = SimpleNamespace(layers_per_block=1)
    state_dict, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(tensors), unet_config=config)
    model = fresh("sdxl")
    model.load_lora_adapter(state_dict, prefix="unet")  # type: ignore[operator]
    for layer, name in named.items():
        module = model.get_submodule(layer)
        assert got.layers[layer].down.equal(module.lora_A["default_0"].weight), layer  # type: ignore[union-attr, index]
        assert got.layers[layer].up.equal(module.lora_B["default_0"].weight)  # type: ignore[union-attr, index]
        assert got.layers[layer].alpha == float(tensors[f"lora_unet_{name}.alpha"])
    assert len(got.layers) == len(named)


# What we write for a UNet.


@pytest.mark.parametrize("alphas", [(2.0,), (2.0, 2.0, 0.7)])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_diffusers_loads_a_unet(family: str, alphas: tuple[float, ...], tmp_path: Path) -> None:
    layers = linear_layers(backbone(family))
    adapter = make(layers, rank=lambda i: (2, 4, 3)[i % 3], alpha=lambda i: alphas[i % len(alphas)])
    path = write_adapter(adapter, tmp_path, "kohya", "unet")
    state_dict, network_alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(tmp_path, unet_config=backbone(family).config)
    model = fresh(family)
    model.load_lora_adapter(state_dict, network_alphas=network_alphas, prefix="unet")  # type: ignore[operator]
    expected = with_weights_added(family, adapter)
    torch.testing.assert_close(output(model, family), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    got = read_adapter(path, layers)
    if len(alphas) == 1:
        assert_same(got, adapter)
    assert {part.alpha for part in got.layers.values()} == {2.0}
    assert_same_effect(got.layers, adapter.layers)


def test_diffusers_loses_alphas_that_differ() -> None:
    """Why a UNet's are made equal. When this fails, diffusers has mended it and `_unet_pairs` can keep them."""
    tensors = {}
    for name, size in linear_layers(backbone("sdxl")).items():
        if name.endswith(("attn1.to_q", "attn1.to_k")):
            tensors |= pair(f"lora_unet_{name.replace('.', '_')}", 2, size, 1.0 if name.endswith("to_k") else 8.0)
    state_dict, network_alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(tensors)
    model = fresh("sdxl")
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match any targeted module"):
        model.load_lora_adapter(state_dict, network_alphas=network_alphas, prefix="unet")  # type: ignore[operator]
    assert len({m.scaling["default_0"] for m in model.modules() if hasattr(m, "lora_A")}) == 1


# Black Forest Labs' names.


def bfl_file(layers: Layers, inner: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """Every layer of the first double and the first single block, as sd-scripts names them; made without our table."""
    tensors: dict[str, torch.Tensor] = {}
    with seeded(9):
        for stream in ("img", "txt"):
            block = f"lora_unet_double_blocks_0_{stream}"
            tensors |= pair(f"{block}_attn_qkv", rank, (3 * inner, inner), 2.0)
            tensors |= pair(f"{block}_attn_proj", rank, (inner, inner), 1.0)
            tensors |= pair(f"{block}_mlp_0", rank, (4 * inner, inner), 8.0)
            tensors |= pair(f"{block}_mlp_2", rank, (inner, 4 * inner), None)
            tensors |= pair(f"{block}_mod_lin", rank, (6 * inner, inner), 3.0)
        tensors |= pair("lora_unet_single_blocks_0_linear1", rank, (7 * inner, inner), 5.0)
        tensors |= pair("lora_unet_single_blocks_0_linear2", rank, (inner, 5 * inner), 2.0)
        tensors |= pair("lora_unet_single_blocks_0_modulation_lin", rank, (3 * inner, inner), 2.0)
    return {key: tensor / 8 if tensor.dim() else tensor for key, tensor in tensors.items()}


def test_a_file_with_fused_names_is_what_diffusers_reads_in_it(tmp_path: Path) -> None:
    layers = linear_layers(full_size("flux"))
    tensors = bfl_file(layers, 3072)
    save_file(tensors, tmp_path / "flux.safetensors")
    got = read_adapter(tmp_path / "flux.safetensors", layers)
    assert len(got.layers) == 20
    assert got.layers["transformer_blocks.0.attn.to_k"].alpha == 2.0
    assert got.layers["transformer_blocks.0.ff.net.2"].alpha == 4.0  # no alpha: the rank
    qkv = tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    assert got.layers["transformer_blocks.0.attn.to_v"].up.equal(qkv[6144:])
    state_dict, _ = FluxLoraLoaderMixin.lora_state_dict(dict(tensors), return_alphas=True)
    assert_same_effect(got.layers, as_diffusers_reads(state_dict))


def test_fused_layers_of_any_width() -> None:
    """The tiny model's fused layer of a single block has 224 rows; diffusers' converter insists on 21504."""
    layers = linear_layers(backbone("flux"))
    tensors = bfl_file(layers, 32)
    got = read_adapter(tensors, layers)
    name = "lora_unet_single_blocks_0_linear1"
    fused = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    single = "single_transformer_blocks.0"
    parts = [got.layers[f"{single}.{name}"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    torch.testing.assert_close(torch.cat([delta(part) for part in parts]).float(), 5 / 4 * fused, rtol=1e-5, atol=1e-6)


def test_the_last_modulation_changes_places() -> None:
    """Shift and scale: the original has them in the one order, diffusers in the other."""
    layers = linear_layers(backbone("flux"))
    tensors = pair("lora_unet_final_layer_adaLN_modulation_1", 2, layers["norm_out.linear"])
    (part,) = read_adapter(tensors, layers).layers.values()
    shift, scale = tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"].chunk(2)
    assert part.up.equal(torch.cat([scale, shift]))


def test_a_block_diagonal_layer_keeps_its_rank() -> None:
    """As sd-scripts trains with split_qkv: each of q, k, v has a third of the rank."""
    layers = linear_layers(backbone("flux"))
    ups = [torch.randn(32, 4) for _ in range(3)]
    name = "lora_unet_double_blocks_1_txt_attn_qkv"
    tensors = {f"{name}.lora_down.weight": torch.randn(12, 32), f"{name}.lora_up.weight": torch.block_diag(*ups)}
    got = read_adapter({**tensors, f"{name}.alpha": torch.tensor(6.0)}, layers)
    for i, layer in enumerate(("add_q_proj", "add_k_proj", "add_v_proj")):
        part = got.layers[f"transformer_blocks.1.attn.{layer}"]
        assert part.up.equal(ups[i]) and part.down.equal(tensors[f"{name}.lora_down.weight"][4 * i : 4 * i + 4])
        assert part.alpha == 2.0


def flux_blocks(layers: Layers) -> list[str]:
    return [name for name in layers if "transformer_blocks." in name]


@pytest.mark.parametrize("ranks", [(4,), (2, 4, 3)])
def test_diffusers_loads_a_flux(ranks: tuple[int, ...], tmp_path: Path) -> None:
    """At Flux's real width, into a model without weights."""
    layers = linear_layers(full_size("flux"))
    adapter = make(layers, flux_blocks(layers), rank=lambda i: ranks[i % len(ranks)])
    write_adapter(adapter, tmp_path, "kohya", layers=layers)
    state_dict = FluxLoraLoaderMixin.lora_state_dict(tmp_path)
    found = as_diffusers_reads(state_dict)
    assert_same_effect(found, adapter.layers)
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    model.load_lora_adapter(state_dict, prefix="transformer", low_cpu_mem_usage=True)
    loaded = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert loaded == set(adapter.layers)
    if len(ranks) == 1:  # then diffusers undoes the fusing
        assert state_dict["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].shape[0] == 4


def test_diffusers_loads_a_small_flux(tmp_path: Path) -> None:
    """Where the widths do not matter to its converter, down to the output."""
    layers = linear_layers(backbone("flux"))
    names = [name for name in flux_blocks(layers) if not re.search(r"single.*(to_[qkv]|proj_mlp)$", name)]
    adapter = make(layers, names, rank=lambda i: 2 + i % 2)
    write_adapter(adapter, tmp_path, "kohya", layers=layers)
    model = fresh("flux")
    model.load_lora_adapter(FluxLoraLoaderMixin.lora_state_dict(tmp_path), prefix="transformer")  # type: ignore[operator]
    expected = with_weights_added("flux", adapter)
    torch.testing.assert_close(output(model, "flux"), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


PARTS = {"vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "unet"}


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_pipeline_loads_it(family: str, format: Any, tmp_path: Path) -> None:
    """`load_lora_weights` of the pipelines themselves, as far as a pipeline without text encoders goes."""
    layers, component = linear_layers(backbone(family)), {"sdxl": "unet", "flux": "transformer"}[family]
    names = [name for name in layers if "attentions" in name or name.startswith("transformer_blocks")]
    adapter = make(layers, names, alpha=lambda i: 1.0 + i % 2)
    write_adapter(adapter, tmp_path, format, component, layers=layers)  # type: ignore[arg-type]
    kind = {"sdxl": diffusers.StableDiffusionXLPipeline, "flux": diffusers.FluxPipeline}[family]
    nothing = {name: None for name in inspect.signature(kind.__init__).parameters if name in PARTS}
    pipeline = kind(**{**nothing, component: fresh(family)})
    pipeline.load_lora_weights(tmp_path)
    assert pipeline.get_list_adapters() == {component: ["default_0"]}
    expected = with_weights_added(family, adapter)
    torch.testing.assert_close(output(getattr(pipeline, component), family), expected, rtol=1e-4, atol=1e-5)


@st.composite
def flux_adapters(draw: st.DrawFn) -> Adapter:
    """Any of the block's layers, any ranks; one scaling, which a fused layer keeps exactly."""
    layers = linear_layers(backbone("flux"))
    names = draw(st.lists(st.sampled_from(flux_blocks(layers)), min_size=1, max_size=12, unique=True))
    ranks = draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=len(names), max_size=len(names)))
    return make(layers, names, rank=lambda i: ranks[i], alpha=lambda i: ranks[i] / 2)


@given(flux_adapters())
def test_a_flux_comes_back(tmp_path: Path, adapter: Adapter) -> None:
    layers = linear_layers(backbone("flux"))
    file = write_adapter(adapter, tmp_path / "flux.safetensors", "kohya", layers=layers)
    assert_same(read_adapter(file, layers), adapter)
    stripped = read_adapter(load_file(file), layers)  # another program has dropped the metadata
    assert_same_effect({name: stripped.layers[name] for name in adapter.layers}, adapter.layers)
    assert all(not part.up.any() for name, part in stripped.layers.items() if name not in adapter.layers)


def test_a_fresh_flux_comes_back(tmp_path: Path) -> None:
    """B is zero everywhere, so only the metadata says whose rows are whose."""
    layers = linear_layers(backbone("flux"))
    made = make(layers, flux_blocks(layers), rank=lambda i: 2 + i % 3).layers
    adapter = Adapter({name: LayerAdapter(nn.Parameter(p.down), nn.Parameter(p.up * 0), p.rank) for name, p in made.items()})
    assert_same(read_adapter(write_adapter(adapter, tmp_path, "kohya", layers=layers), layers), adapter)


def test_scalings_that_differ_in_a_fused_layer(tmp_path: Path) -> None:
    layers = linear_layers(backbone("flux"))
    adapter = make(layers, flux_blocks(layers), rank=lambda i: 1 + i % 3, alpha=lambda i: 0.3 + i)
    file = write_adapter(adapter, tmp_path, "kohya", layers=layers)
    assert_same_effect(read_adapter(file, layers).layers, adapter.layers)
    names = {key.split(".")[0] for key in load_file(file)}
    assert {name.removeprefix("lora_unet_") for name in names} <= set(bfl_names())


def test_layers_outside_of_the_blocks_come_with_a_warning(tmp_path: Path) -> None:
    layers = linear_layers(backbone("flux"))
    adapter = make(layers)
    with pytest.warns(UserWarning, match="diffusers does not load .*x_embedder.* from a Kohya file"):
        file = write_adapter(adapter, tmp_path, "kohya", layers=layers)
    assert {"lora_unet_img_in.alpha", "lora_unet_final_layer_adaLN_modulation_1.alpha"} <= set(load_file(file))
    assert_same_effect(read_adapter(file, layers).layers, adapter.layers)
    accepted = {key: tensor for key, tensor in load_file(file).items() if "linear1" not in key}  # whose width it insists on
    loaded = as_diffusers_reads(FluxLoraLoaderMixin.lora_state_dict(accepted))
    assert set(loaded) == {name for name in flux_blocks(layers) if not re.search(r"single.*(to_[qkv]|proj_mlp)$", name)}


# Other models, and what cannot be told apart.


@pytest.mark.parametrize("family", ["flux", "chroma", "flux2", "sd3", "sdxl"])
def test_which_models_have_black_forest_labs_names(family: str) -> None:
    assert is_flux_shaped(linear_layers(backbone(family))) is (family in ("flux", "chroma"))


@pytest.mark.parametrize("family", ["sd3", "flux2", "wan", "pixart", "dit"])
def test_other_transformers_keep_diffusers_names(family: str, tmp_path: Path) -> None:
    layers = linear_layers(backbone(family))
    adapter = make(layers, alpha=lambda i: 0.5 + i)
    file = write_adapter(adapter, tmp_path, "kohya", layers=layers)
    assert_same(read_adapter(file, layers), adapter)
    tensors = {key.replace("lora_unet_", "lora_transformer_"): tensor for key, tensor in load_file(file).items()}
    assert_same(read_adapter(tensors, layers), adapter)  # as OneTrainer spells the prefix


def test_a_transformer_needs_its_layers(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="pass layers="):
        write_adapter(make({"a": (3, 2)}), tmp_path, "kohya")
    with pytest.raises(AdapterError, match="layers that are not in layers=\n  - a"):
        write_adapter(make({"a": (3, 2)}), tmp_path, "kohya", layers={"b": (3, 2)})


def test_names_that_cannot_be_told_apart(tmp_path: Path) -> None:
    layers = {"a.b_c": (3, 2), "a_b.c": (3, 2), "d.e": (3, 2)}
    for component in ("unet", "transformer"):
        with pytest.raises(AdapterError, match="one name for several layers") as caught:
            write_adapter(make(layers), tmp_path, "kohya", component, layers=layers)  # type: ignore[arg-type]
        assert caught.value.problems == ("a.b_c and a_b.c",)
    other = make(layers, ["d.e"])
    assert_same(read_adapter(write_adapter(other, tmp_path, "kohya", layers=layers), layers), other)
    with pytest.raises(AdapterError, match="a_b_c: may be a.b_c or a_b.c"):
        read_adapter(pair("lora_unet_a_b_c", 1, (3, 2)), layers)


def test_a_layer_under_two_names_is_refused() -> None:
    layers = linear_layers(backbone("sdxl"))
    layer = "mid_block.attentions.0.proj_in"
    both = [pair(f"lora_unet_{name}", 2, layers[layer]) for name in ("middle_block_1_proj_in", layer.replace(".", "_"))]
    with pytest.raises(AdapterError, match=f"is the layer {layer}, which the file has under another name too"):
        read_adapter({**both[0], **both[1]}, layers)


def test_a_fused_layer_of_another_width_is_refused() -> None:
    layers = linear_layers(backbone("flux"))
    with pytest.raises(AdapterError, match=re.escape("B [95, 2] do not fit the layer's weight [96, 32]")):
        read_adapter(pair("lora_unet_double_blocks_0_img_attn_qkv", 2, (95, 32)), layers)


NOWHERE = ("input_blocks_9_9_x", "middle_block_7_x", "output_blocks_99_1_proj_in", "double_blocks_19_img_mlp_0")


@pytest.mark.parametrize("name", NOWHERE)
def test_names_of_no_layer(name: str) -> None:
    for family in ("sdxl", "flux", "dit"):
        with pytest.raises(AdapterError, match=f"{name}: the model has no such Linear layer"):
            read_adapter(pair(f"lora_unet_{name}", 2, (32, 32)), linear_layers(backbone(family)))


def test_text_encoders_are_reported() -> None:
    layers = {"a.b": (3, 2)}
    tensors = pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 2, (8, 8))
    with pytest.warns(UserWarning, match="3 tensors belong to text encoders .lora_te1_text_model"):
        assert list(read_adapter({**tensors, **pair("lora_unet_a_b", 2, (3, 2))}, layers).layers) == ["a.b"]
    with pytest.warns(UserWarning), pytest.raises(AdapterError, match="has no LoRA weights"):
        read_adapter(tensors, layers)


@pytest.mark.parametrize("text", ["[]", "{", '{"x": 3}'])
def test_metadata_of_ours_that_was_spoilt(text: str, tmp_path: Path) -> None:
    save_file(pair("lora_unet_a_b", 2, (3, 2)), tmp_path / "x.safetensors", {"squareq_fx.fused_ranks": text})
    with pytest.raises(AdapterError, match="has no lists of ranks by name"):
        read_adapter(tmp_path, {"a.b": (3, 2)})


@pytest.mark.parametrize("ranks", [[1, 2, 3], [2, 2, 2], [6], [-1, 4, 3]])
def test_metadata_of_ours_that_does_not_fit_is_not_believed(ranks: list[int], tmp_path: Path) -> None:
    layers = linear_layers(backbone("flux"))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = pair(name, 6, (96, 32))
    save_file(tensors, tmp_path / "x.safetensors", {"squareq_fx.fused_ranks": json.dumps({name: ranks})})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert "squareq_fx.fused_ranks" in file.metadata()
    assert_same(read_adapter(tmp_path, layers), read_adapter(tensors, layers))
