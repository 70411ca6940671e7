"""diffusers and PEFT load what we write, with the same output; what they write we read bit for bit."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from backbones import backbone
from lora_cases import assert_same, fresh, linear_layers, make, output, randomise, with_weights_added
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from squareq_fx.adapters import Adapter, LayerAdapter, read_adapter, write_adapter
from squareq_fx.errors import AdapterError

COMPONENTS = {"sdxl": "unet", "sd15": "unet", "flux": "transformer", "sd3": "transformer"}
FAMILIES = tuple(COMPONENTS)


def _attention(family: str) -> list[str]:
    """Every attention layer, and, where PEFT could take suffixes for them, layers of the top of the model."""
    names = [name for name in linear_layers(backbone(family)) if ".attn" in name]
    return [*names, *{"flux": ["proj_out", "norm_out.linear"], "sdxl": ["add_embedding.linear_1"]}.get(family, [])]


def _varied(family: str) -> Adapter:
    ranks, alphas = (2, 4, 4, 3), (1.0, 4.0, 0.3)
    return make(linear_layers(backbone(family)), _attention(family), lambda i: ranks[i % 4], lambda i: alphas[i % 3])


def _even(family: str) -> Adapter:
    return make(linear_layers(backbone(family)), _attention(family))


def _close(got: torch.Tensor, family: str, adapter: Adapter) -> None:
    expected = with_weights_added(family, adapter)
    assert not torch.allclose(expected, output(backbone(family), family), atol=1e-2)  # it matters that it is loaded
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def _alphas(model: nn.Module) -> dict[str, float]:
    """Scaling by layer as PEFT computed it."""
    scaled = ((name, m) for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    return {name: next(iter(layer.scaling.values())) for name, layer in scaled}


@pytest.mark.parametrize("adapter_of", [_even, _varied])
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_what_we_write(family: str, adapter_of: Callable[[str], Adapter], tmp_path: Path) -> None:
    adapter = adapter_of(family)
    file = write_adapter(adapter, tmp_path, component=COMPONENTS[family])  # type: ignore[arg-type]
    assert file == tmp_path / "pytorch_lora_weights.safetensors"
    model = fresh(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # PEFT's, when the file's keys and its config disagree
        model.load_lora_adapter(tmp_path, prefix=COMPONENTS[family], use_safetensors=True)  # type: ignore[operator]
    assert _alphas(model) == {name: part.scaling for name, part in adapter.layers.items()}
    _close(output(model, family), family, adapter)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_diffusers_loads_what_we_write_without_a_component(family: str, tmp_path: Path) -> None:
    adapter = _varied(family)
    write_adapter(adapter, tmp_path, component=None)
    model = fresh(family)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)  # type: ignore[operator]
    _close(output(model, family), family, adapter)


@pytest.mark.parametrize("adapter_of", [_even, _varied])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_we_write(family: str, adapter_of: Callable[[str], Adapter], tmp_path: Path) -> None:
    adapter = adapter_of(family)
    assert write_adapter(adapter, tmp_path / "new", "peft") == tmp_path / "new"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # among others PEFT's of missing keys
        model = peft.PeftModel.from_pretrained(fresh(family), tmp_path / "new")
    assert set(_alphas(model.base_model.model)) == set(adapter.layers)
    _close(output(model, family), family, adapter)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_what_we_write_goes_into_a_model_that_peft_has_prepared(family: str, tmp_path: Path) -> None:
    adapter = _even(family)
    write_adapter(adapter, tmp_path, "peft")
    config = peft.LoraConfig.from_pretrained(tmp_path)
    model = peft.inject_adapter_in_model(config, fresh(family))
    outcome = peft.set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
    assert outcome.unexpected_keys == [] and not [key for key in outcome.missing_keys if "lora" in key]
    _close(output(model, family), family, adapter)


def _config(family: str, **options: Any) -> peft.LoraConfig:
    first, *_, last = [name for name in linear_layers(backbone(family)) if name.endswith("to_q")]
    return peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        **{"rank_pattern": {"to_k": 2, f"^{first}": 3}, "alpha_pattern": {last: 1.5, "to_out.0": 5}, **options},
    )


def _expected(model: nn.Module) -> Adapter:
    """A, B and scaling as they are in the modules that PEFT has injected."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            (key,) = module.scaling
            down, up = module.lora_A[key].weight.detach(), module.lora_B[key].weight.detach()
            layers[name] = LayerAdapter(down, up, module.scaling[key] * down.shape[0])
    return Adapter(layers)


def _equal(got: Adapter, expected: Adapter) -> None:
    assert set(got.layers) == set(expected.layers)
    for name, part in expected.layers.items():
        assert got.layers[name].down.equal(part.down) and got.layers[name].up.equal(part.up), name
        assert got.layers[name].alpha == pytest.approx(part.alpha, rel=1e-12), name


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {}, "alpha_pattern": {}}])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_we_read_what_peft_saves(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = peft.get_peft_model(fresh(family), _config(family, **options))  # type: ignore[arg-type]
    randomise(model)
    model.save_pretrained(tmp_path)
    expected = _expected(model.base_model.model)
    layers = linear_layers(backbone(family))
    _equal(read_adapter(tmp_path, layers), expected)
    _equal(read_adapter(tmp_path / "adapter_model.safetensors", layers), expected)
    state_dict = get_peft_model_state_dict(model)
    _equal(read_adapter(state_dict, layers, config=model.peft_config["default"].to_dict()), expected)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_we_read_what_a_diffusers_model_saves(family: str, tmp_path: Path) -> None:
    model = fresh(family)
    model.add_adapter(_config(family))  # type: ignore[operator]
    randomise(model)
    model.save_lora_adapter(tmp_path)  # type: ignore[operator]
    _equal(read_adapter(tmp_path, linear_layers(backbone(family))), _expected(model))


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_we_read_what_a_diffusers_pipeline_saves(family: str, with_config: bool, tmp_path: Path) -> None:
    """With the metadata exactly; without it diffusers itself says alpha = rank, and that is what it then loads."""
    model = fresh(family)
    model.add_adapter(_config(family))  # type: ignore[operator]
    randomise(model)
    pipeline = {"sdxl": diffusers.StableDiffusionXLPipeline, "flux": diffusers.FluxPipeline}[family]
    component = COMPONENTS[family]
    config = {f"{component}_lora_adapter_metadata": model.peft_config["default"].to_dict()} if with_config else {}  # type: ignore[union-attr]
    pipeline.save_lora_weights(tmp_path, **{f"{component}_lora_layers": get_peft_model_state_dict(model)}, **config)
    got = read_adapter(tmp_path, linear_layers(backbone(family)))
    if with_config:
        _equal(got, _expected(model))
    reloaded = fresh(family)
    reloaded.load_lora_adapter(tmp_path, prefix=component, use_safetensors=True)  # type: ignore[operator]
    _equal(got, _expected(reloaded))


def _older(key: str, style: str) -> str:
    """diffusers' spellings before 0.21 (attention processors), before PEFT, and of text encoders."""
    layer, part = key.removesuffix(".weight").rsplit(".lora_", 1)
    direction = {"A": "down", "B": "up"}[part]
    if style == "processor" and "attn" in layer:
        parent, name = layer.removesuffix(".0").rsplit(".", 1)
        return f"{parent}.processor.{name}_lora.{direction}.weight"
    return f"{layer}.{'lora_linear_layer' if style == 'linear' else 'lora'}.{direction}.weight"


@pytest.mark.parametrize("prefix", ["unet.", ""])
@pytest.mark.parametrize("style", ["processor", "dots", "linear"])
def test_older_spellings(style: str, prefix: str, tmp_path: Path) -> None:
    layers = linear_layers(backbone("sdxl"))
    names = [name for name in layers if name.endswith(("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"))]
    adapter = make(layers, names, alpha=lambda i: 4.0)
    file = write_adapter(adapter, tmp_path / "now.safetensors", component=None)
    older = {f"{prefix}{_older(key, style)}": tensor for key, tensor in load_file(file).items()}
    save_file(older, tmp_path / "then.safetensors")
    assert_same(read_adapter(tmp_path / "then.safetensors", layers), adapter)
    if style != "linear":  # which diffusers knows for text encoders only
        model = fresh("sdxl")
        model.load_lora_adapter(older, prefix=prefix.removesuffix(".") or None)  # type: ignore[operator]
        _equal(_expected(model), adapter)


def test_the_same_layer_in_two_spellings_is_refused() -> None:
    layers = {"attn.to_q": (3, 3)}
    pair = {"attn.to_q.lora_A.weight": torch.ones(2, 3), "attn.to_q.lora_B.weight": torch.ones(3, 2)}
    with pytest.raises(AdapterError, match="under another spelling too"):
        read_adapter({**pair, "attn.processor.to_q_lora.down.weight": torch.ones(2, 3)}, layers)


def test_the_metadata_is_a_lora_config(tmp_path: Path) -> None:
    """Only fields PEFT has had for years: `LoraConfig(**metadata)` of an older one must not stumble."""
    write_adapter(_varied("flux"), tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    config = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    assert set(config) <= set(inspect.signature(peft.LoraConfig).parameters)
    assert len(config) == 10 and config["r"] == 4
