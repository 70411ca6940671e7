"""The shipped weights: a class-conditional DiT for 8x8 digits, trained by `examples/train_digits_dit.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

__all__ = ["MODEL_DIR", "load_digits_model"]

MODEL_DIR = Path(__file__).resolve().parent


def load_digits_model(directory: Path | str = MODEL_DIR, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The digits model, a `DiTTransformer2DModel` in evaluation mode, read without the network.

    Args:
        directory: what `save_pretrained` wrote; the shipped one by default.
        dtype: of the parameters. They are stored as float16, so float32 holds the same values.

    Raises:
        OSError: no config or weights in `directory`.
    """
    model = DiTTransformer2DModel.from_pretrained(str(directory), torch_dtype=dtype, local_files_only=True)
    return model.eval()
