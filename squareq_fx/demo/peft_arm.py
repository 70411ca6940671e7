"""The same adapter in PEFT on the float model, to compare with."""

from __future__ import annotations

import importlib.util

import torch

from squareq_fx.adapters import Adapter

__all__ = ["inject", "peft_available"]


def peft_available() -> bool:
    """Whether PEFT is installed; it is optional."""
    return importlib.util.find_spec("peft") is not None


def inject(model: torch.nn.Module, adapter: Adapter, name: str = "default") -> dict[str, torch.nn.Parameter]:
    """Gives a float model PEFT's LoRA layers, in place, with the values of an adapter of ours.

    The digits model has no `add_adapter` of diffusers' mixin, so PEFT injects them itself.

    Args:
        adapter: all of its layers have one rank and one alpha.

    Returns:
        The model's trainable parameters, by name: A and B of every layer. All others are frozen.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: ranks or alphas differ, or PEFT has other layers than the adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model

    sizes = {(layer.rank, layer.alpha) for layer in adapter.layers.values()}
    if len(sizes) != 1:
        raise ValueError(f"the layers have several ranks and alphas, {sorted(sizes)}; give them one of each")
    ((rank, alpha),) = sizes
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(adapter.layers))  # type: ignore[arg-type]  # any number
    with torch.random.fork_rng(devices=[]):  # PEFT's own random start is not used
        inject_adapter_in_model(config, model, adapter_name=name)
    model.eval()
    trainable = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    values = {}
    for path, layer in adapter.layers.items():
        values[f"{path}.lora_A.{name}.weight"] = layer.down
        values[f"{path}.lora_B.{name}.weight"] = layer.up
    if trainable.keys() != values.keys():
        raise ValueError(f"PEFT trains other parameters: {sorted(trainable.keys() ^ values.keys())}")
    with torch.no_grad():
        for key, parameter in trainable.items():
            parameter.copy_(values[key])
    return trainable
