"""Which .safetensors files of a directory written by `save_pretrained` make up the checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from squareq_fx.errors import SlabError
from squareq_fx.slab import strict_json

__all__ = ["find_checkpoint", "read_json"]

_BASES = ("diffusion_pytorch_model", "model")
_LONGEST_JSON = 100_000_000


def find_checkpoint(directory: Path) -> list[Path]:
    """The files that hold the weights, in name order.

    Taken is, for diffusers' and then transformers' file name: the whole file, the sharded one with its index,
    shards without an index, and only then a variant ("fp16") in any of these forms.

    Raises:
        SlabError: none, several variants to choose from, or a missing shard; says what lies there instead.
    """
    present = sorted(path.name for path in directory.iterdir() if path.is_file())
    for base in _BASES:
        variants = {v for name in present if (v := _variant(base, name)) is not None}
        if "" in variants:
            return _files(directory, base, "", present)
        if len(variants) > 1:
            raise SlabError(
                f"{directory} holds several variants of the weights ({', '.join(sorted(variants))}); "
                f"pass one file, or a directory with one of them"
            )
        if variants:
            return _files(directory, base, variants.pop(), present)
    raise SlabError(f"no safetensors weights in {directory}; " + _advice(directory, present))


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        SlabError: cannot be read, too large, or not an object.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_LONGEST_JSON + 1)
    except OSError as error:
        raise SlabError(f"cannot read {path}: {error.strerror}") from error
    document = strict_json.loads(raw, str(path)) if len(raw) <= _LONGEST_JSON else None
    if not isinstance(document, dict):
        raise SlabError(f"{path} must hold one JSON object")
    return document


def _variant(base: str, name: str) -> str | None:
    """The variant a file name belongs to, "" for none; None if it is not one of `base`'s files."""
    shard = r"-\d{5}-of-\d{5}"
    for pattern in (
        rf"{base}(?:\.(?P<v>[^.]+?))?(?:{shard})?\.safetensors",
        rf"{base}{shard}\.(?P<v>[^.]+)\.safetensors",
        rf"{base}\.safetensors\.index(?:\.(?P<v>[^.]+))?\.json",
    ):
        found = re.fullmatch(pattern, name)
        if found:
            return found["v"] or ""
    return None


def _files(directory: Path, base: str, variant: str, present: list[str]) -> list[Path]:
    dotted = f".{variant}" if variant else ""
    if f"{base}{dotted}.safetensors" in present:
        return [directory / f"{base}{dotted}.safetensors"]
    index = f"{base}.safetensors.index{dotted}.json"
    if index in present:
        return _indexed(directory, index, present)
    shards = [n for n in present if n.endswith(".safetensors") and _variant(base, n) == variant]
    counts = {re.findall(r"-of-(\d{5})", name)[0] for name in shards}
    numbers = [re.findall(r"-(\d{5})-of-", name)[0] for name in shards]
    if len(counts) != 1 or numbers != [f"{i:05d}" for i in range(1, int(min(counts)) + 1)]:
        raise SlabError(f"shards are missing in {directory}: there are only {', '.join(shards)}")
    return [directory / name for name in shards]


def _indexed(directory: Path, index: str, present: list[str]) -> list[Path]:
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise SlabError(f"{directory / index} has no weight_map from tensor to file")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if name not in present]
    if missing or not names:
        raise SlabError(f"{directory / index} names files that are not there", [ascii(name) for name in missing])
    return [directory / name for name in names]


def _advice(directory: Path, present: list[str]) -> str:
    if "model_index.json" in present:
        inner = sorted(p.name for p in directory.iterdir() if p.is_dir() and (p / "config.json").is_file())
        return f"it is a whole pipeline, give one of its parts: {', '.join(inner) or 'none found'}"
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in present):
        return "it holds pickled weights; load the model and save it again with save_pretrained"
    loose = [name for name in present if name.endswith(".safetensors")]
    if loose:
        return f"pass one of its files with model_class: {', '.join(loose[:5])}"
    return f"it holds {', '.join(present[:8]) or 'nothing'}"
