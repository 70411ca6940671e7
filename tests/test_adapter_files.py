"""Adapters survive each format; what cannot be applied as it is meant is refused, all of it at once."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lora_cases import assert_same, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from squareq_fx.adapters import Adapter, LayerAdapter, read_adapter, write_adapter
from squareq_fx.errors import AdapterError, SquareQError

FORMATS = ("diffusers", "peft", "kohya")
LAYERS = {"blocks.0.attn.to_q": (4, 6), "blocks.0.attn.to_k": (4, 6), "blocks.1.attn.to_q": (4, 6), "proj_out": (5, 4)}
Q, K = list(LAYERS)[:2]

# Words that mean something in one format or another, as parts of layers' paths.
WORDS = ("unet", "transformer", "text_encoder", "to_q", "to_k_lora", "proj_out", "0", "10", "a_b", "a", "b", "lora_A", "alpha")
PATHS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(".".join)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def adapters(draw: st.DrawFn) -> tuple[dict[str, tuple[int, int]], Adapter, torch.dtype]:
    names = draw(st.lists(PATHS, min_size=1, max_size=6, unique=True))
    sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))
    layers = {name: draw(sizes) for name in names}
    adapted = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    ranks = [draw(st.integers(1, 4)) for _ in adapted]
    alphas = [draw(st.floats(2**-10, 2**10, width=32)) for _ in adapted]
    dtype = draw(DTYPES)
    return layers, make(layers, adapted, lambda i: ranks[i], lambda i: alphas[i], dtype), dtype


@pytest.mark.parametrize("component", ["transformer", "unet", None])
@pytest.mark.parametrize("format", ["diffusers", "peft"])
@given(case=adapters())
def test_round_trip(format: Any, component: Any, case: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    layers, adapter, dtype = case
    path = write_adapter(adapter, tmp_path_factory.mktemp("round"), format, component, dtype)
    assert_same(read_adapter(path, layers), adapter)
    assert_same(read_adapter(path if path.is_dir() else path.parent, layers), adapter)


@given(case=adapters())
def test_round_trip_kohya(case: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    layers, adapter, dtype = case
    assume(len({name.replace(".", "_") for name in layers}) == len(layers))
    file = write_adapter(adapter, tmp_path_factory.mktemp("round") / "x.safetensors", "kohya", dtype=dtype, layers=layers)
    assert_same(read_adapter(file, layers), adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_the_dtype_of_a_file(format: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    write_adapter(make(LAYERS), tmp_path, format, dtype=dtype, layers=LAYERS)
    (file,) = tmp_path.glob("*.safetensors")
    dtypes = {key.rsplit(".", 1)[1]: tensor.dtype for key, tensor in load_file(file).items()}
    assert dtypes.pop("weight") == dtype
    assert dtypes == ({"alpha": torch.float32} if format == "kohya" else {})


def test_layers_come_in_the_models_order(tmp_path: Path) -> None:
    path = write_adapter(make(LAYERS, reversed(LAYERS)), tmp_path)
    assert list(read_adapter(path, LAYERS).layers) == list(LAYERS)


def test_a_state_dict_is_copied() -> None:
    tensors = pair(Q)
    got = read_adapter(tensors, LAYERS)
    tensors[f"{Q}.lora_A.weight"].zero_()
    assert got.layers[Q].down.all() and got.layers[Q].alpha == 2.0  # no alpha: the rank


def test_a_state_dict_with_a_config() -> None:
    got = read_adapter(pair(Q), LAYERS, config={"r": 2, "lora_alpha": 3, "use_rslora": True})
    assert got.layers[Q].scaling == pytest.approx(3 / 2**0.5)


def test_alphas_as_tensors_in_a_diffusers_file() -> None:
    got = read_adapter({**prefixed("transformer."), f"transformer.{Q}.alpha": torch.tensor(0.5)}, LAYERS)
    assert got.layers[Q].alpha == 0.5


def test_text_encoders_of_a_diffusers_file_are_reported() -> None:
    tensors = {**prefixed("unet."), **pair("text_encoder_2.text_model.layers.0.q_proj")}
    with pytest.warns(UserWarning, match="2 tensors belong to text encoders .text_encoder_2.text_model"):
        assert list(read_adapter(tensors, LAYERS).layers) == [Q]


# What is refused.


def pair(name: str, rank: int = 2, size: tuple[int, int] = (4, 6)) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(rank, size[1]), f"{name}.lora_B.weight": torch.ones(size[0], rank)}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return pair(f"{prefix}{Q}")


def spoilt(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{Q}.lora_{part}.weight": changes.get(part, tensor) for part, tensor in zip("AB", pair(Q).values())}


NAN = torch.full((2, 6), float("nan"))
BAD_TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "unknown layer": (pair("blocks.0.attn.to_w"), "to_w: the model has no such Linear layer; near names: blocks.0.attn.to_"),
    "shape": (pair(Q, size=(4, 7)), f"{Q}: A [2, 7] and B [4, 2] do not fit the layer's weight [4, 6]"),
    "A without B": ({f"{Q}.lora_A.weight": torch.ones(2, 6)}, f"{Q}: has A but no B"),
    "alpha alone": ({**pair(K), f"{Q}.alpha": torch.ones(())}, f"{Q}: has alpha but no A and no B"),
    "ranks": (spoilt(A=torch.ones(3, 6)), f"{Q}: A [3, 6] and B [4, 2] have different ranks"),
    "rank zero": (pair(Q, rank=0), f"{Q}: has the shapes [0, 6] and [4, 0]"),
    "convolution": (
        {"conv.lora_down.weight": torch.ones(2, 6, 3, 3), "conv.lora_up.weight": torch.ones(4, 2, 1, 1)},
        "conv: adapts a convolution ([2, 6, 3, 3] and [4, 2, 1, 1]); only Linear layers are supported",
    ),
    "vector": (spoilt(A=torch.ones(6)), f"{Q}: has the shapes [6] and [4, 2]"),
    "NaN": (spoilt(A=NAN), f"{Q}: A has NaN or infinite values"),
    "infinite": (spoilt(B=torch.full((4, 2), float("inf"))), f"{Q}: B has NaN or infinite values"),
    "integers": (spoilt(A=torch.ones(2, 6, dtype=torch.int8)), f"{Q}: A is int8, not a floating point type"),
    "alpha zero": ({**pair(Q), f"{Q}.alpha": torch.zeros(())}, f"{Q}: alpha must be one positive number, not 0.0"),
    "alphas": ({**pair(Q), f"{Q}.alpha": torch.ones(2)}, f"{Q}: alpha must be one positive number, not [1.0, 1.0]"),
    "alpha NaN": ({**pair(Q), f"{Q}.alpha": NAN[0, 0]}, f"{Q}: alpha has NaN or infinite values"),
    "twice": ({**pair(Q), f"{Q}.lora_down.weight": torch.ones(2, 6)}, f"{Q}: has A twice"),
    "DoRA": ({**pair(Q), f"{Q}.lora_magnitude_vector.weight": torch.ones(4)}, f"{Q}: is DoRA (a magnitude vector); only LoRA"),
    "DoRA, Kohya": ({**pair("lora_unet_proj_out", size=(5, 4)), "lora_unet_x.dora_scale": NAN}, "lora_unet_x: is DoRA"),
    "LoHa": ({f"lora_unet_x.hada_w1_{part}": torch.ones(2, 2) for part in "ab"}, "lora_unet_x: is LoHa"),
    "LoKr": ({f"{Q}.lokr_w{i}": torch.ones(2, 2) for i in (1, 2)}, f"{Q}: is LoKr"),
    "Tucker": ({**pair(Q), "x.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "x: is a convolution in Tucker form"),
    "embedding": ({"x.lora_embedding_A": torch.ones(2, 2)}, "x: is an adapter of an embedding"),
    "bias": ({**pair(Q), f"{Q}.lora_B.bias": torch.ones(4)}, f"{Q}: is a bias in the adapter's branch"),
    "difference": ({**pair(Q), f"{K}.diff_b": torch.ones(4)}, f"{K}: is a full difference of the weight"),
    "other weights": ({**pair(Q), f"{K}.weight": torch.ones(4, 6)}, f"{K}.weight: not a weight of a LoRA"),
    "no adapter": ({"a.weight": torch.ones(1), "b": torch.ones(1)}, "has no LoRA weights (<layer>.lora_A.weight or "),
    "nothing": ({}, "has no LoRA weights (<layer>.lora_A.weight or .lora_down.weight); its keys are none"),
    "PEFT without config": (prefixed("base_model.model."), "in an adapter_config.json, which is not beside it"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_what_is_wrong_with_tensors_is_said(case: str, tmp_path: Path) -> None:
    tensors, message = BAD_TENSORS[case]
    with pytest.raises(AdapterError) as of_state_dict:
        read_adapter(tensors, LAYERS)
    assert message in str(of_state_dict.value)
    assert len(of_state_dict.value.problems) <= 1
    save_file(tensors, tmp_path / "some.safetensors")
    with pytest.raises(AdapterError) as of_file:
        read_adapter(tmp_path, LAYERS)
    assert message in str(of_file.value) and str(tmp_path / "some.safetensors") in str(of_file.value)


def test_all_problems_are_in_one_error() -> None:
    tensors = {
        **pair("blocks.9.attn.to_q"),
        **pair(K, size=(7, 6)),
        f"{Q}.lora_B.weight": torch.ones(4, 2),
        "proj_out.lora_A.weight": torch.full((2, 4), float("nan")),
        "proj_out.lora_B.weight": torch.ones(5, 2),
        "x.lokr_w1": torch.ones(1),
        "x.lokr_w2": torch.ones(1),
    }
    with pytest.raises(AdapterError) as caught:
        read_adapter(tensors, LAYERS)
    assert isinstance(caught.value, SquareQError)
    assert [text.split(":")[0] for text in caught.value.problems] == ["x", Q, "proj_out", "blocks.9.attn.to_q", K]
    assert all(text in str(caught.value) for text in caught.value.problems)


def test_many_unknown_layers_are_all_named() -> None:
    layers = {f"blocks.{i}.to_q": (4, 6) for i in range(800)}
    tensors = {key: tensor for i in range(400) for key, tensor in pair(f"other.{i}.to_q").items()}
    with pytest.raises(AdapterError) as caught:
        read_adapter(tensors, layers)
    assert len(caught.value.problems) == 400


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "the configuration has use_dora=True, which is not supported"),
    "other variant": ({"use_bdlora": {"nblocks": 2}}, "has use_bdlora={'nblocks': 2}"),
    "modules to save": ({"modules_to_save": ["proj_out"]}, "has modules_to_save=['proj_out']"),
    "parameters": ({"target_parameters": ["w"]}, "has target_parameters=['w']"),
    "bias of B": ({"lora_bias": True}, "has lora_bias=True"),
    "bias": ({"bias": "lora_only"}, "has bias='lora_only': biases of the model were trained too"),
    "type": ({"peft_type": "LOHA"}, "has peft_type='LOHA'; only LORA is supported"),
    "base": ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights='pissa_niter_4', which changes the base weights"),
    "rank": ({"r": 3}, f"{Q}: A and B have rank 2, the configuration says 3"),
    "rank of one": ({"rank_pattern": {"to_q": 8}}, f"{Q}: A and B have rank 2, the configuration says 8"),
    "default rank": ({"r": None}, f"{Q}: A and B have rank 2, the configuration says None"),
    "alpha": ({"lora_alpha": 0}, f"{Q}: alpha must be a positive number, the configuration says 0"),
    "alpha of one": ({"alpha_pattern": {"to_q": "x"}}, f"{Q}: alpha must be a positive number, the configuration says 'x'"),
    "pattern": ({"rank_pattern": {"(": 8}}, "the configuration's rank_pattern has '(', not a regular expression"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_what_is_wrong_with_a_configuration_is_said(case: str, tmp_path: Path) -> None:
    changes, message = BAD_CONFIGS[case]
    config = {**CONFIG, **changes}
    save_file(prefixed("base_model.model."), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    in_metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    save_file(prefixed("unet."), tmp_path / "unet.safetensors", in_metadata)
    for read in (
        lambda: read_adapter(tmp_path, LAYERS),
        lambda: read_adapter(tmp_path / "unet.safetensors", LAYERS),
        lambda: read_adapter(pair(Q), LAYERS, config=config),
    ):
        with pytest.raises(AdapterError) as caught:
            read()
        assert message in str(caught.value)
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", None])
def test_initialisations_that_leave_the_base_alone(start: Any) -> None:
    assert read_adapter(pair(Q), LAYERS, config={**CONFIG, "init_lora_weights": start}).layers[Q].alpha == 4.0


def test_patterns_match_as_in_peft() -> None:
    """A suffix or a whole expression from a dot on, and the first counts."""
    config = {**CONFIG, "alpha_pattern": {"to": 9, "attn.to_q": 5, "to_[qk]": 6, "proj_out": 7}}
    tensors = {**pair(Q), **pair(K), **pair("proj_out", size=(5, 4))}
    got = read_adapter(tensors, LAYERS, config=config)
    assert [part.alpha for part in got.layers.values()] == [5, 6, 7]


def _directory(*names: str) -> Callable[[Path], Path]:
    def make_it(folder: Path) -> Path:
        for name in names:
            (save_file(pair(Q), folder / name) if name.endswith(".safetensors") else (folder / name).write_text("{}"))
        return folder

    return make_it


def _file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make_it(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make_it


def _peft(text: str) -> Callable[[Path], Path]:
    def make_it(folder: Path) -> Path:
        _directory("adapter_model.safetensors")(folder)
        (folder / "adapter_config.json").write_text(text)
        return folder

    return make_it


def _metadata(text: str) -> Callable[[Path], Path]:
    def make_it(folder: Path) -> Path:
        save_file(pair(Q), folder / "x.safetensors", {"lora_adapter_metadata": text})
        return folder

    return make_it


BAD_PATHS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "user/repo", "no such file; adapters are read from this machine's disk"),
    "empty": (_directory(), "has no pytorch_lora_weights.safetensors, no adapter_model.safetensors and no other"),
    "pickle": (_directory("adapter_model.bin"), "adapter_model.bin would have to be unpickled, convert it to safetensors"),
    "two formats": (
        _directory("pytorch_lora_weights.safetensors", "adapter_model.safetensors"),
        "holds pytorch_lora_weights.safetensors, adapter_model.safetensors; name the file that is meant",
    ),
    "two files": (_directory("a.safetensors", "b.safetensors"), "holds a.safetensors, b.safetensors; name the file"),
    "not safetensors": (_file("x.safetensors", b"\x80\x02}q\x00."), "not a safetensors file that can be read"),
    "cut off": (_file("x.safetensors", b"\xff\x00\x00\x00\x00\x00\x00\x00{"), "not a safetensors file that can be read"),
    "config": (_peft("{"), "adapter_config.json: not JSON that can be read"),
    "config of a list": (_peft("[]"), "adapter_config.json: is a list, not the object of a LoraConfig"),
    "metadata": (_metadata("{"), "the metadata entry lora_adapter_metadata is not JSON"),
    "metadata of a list": (_metadata("[1]"), "the metadata entry lora_adapter_metadata is a list, not the object"),
}


@pytest.mark.parametrize("case", BAD_PATHS)
def test_what_is_wrong_with_a_path_is_said(case: str, tmp_path: Path) -> None:
    build, message = BAD_PATHS[case]
    path = build(tmp_path)
    with pytest.raises(AdapterError) as caught:
        read_adapter(path, LAYERS)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_config_for_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="a configuration goes with a state dict; a file has its own"):
        read_adapter(tmp_path, LAYERS, config=CONFIG)
    with pytest.raises(AdapterError, match="a Kohya file has its alphas itself"):
        read_adapter(pair("lora_unet_proj_out", size=(5, 4)), LAYERS, config=CONFIG)
    with pytest.raises(AdapterError, match="has an alpha of its own and one in the configuration"):
        read_adapter({**pair(Q), f"{Q}.alpha": torch.ones(())}, LAYERS, config=CONFIG)


# Writing.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "lycoris"}, "format must be one of diffusers, peft, kohya, not 'lycoris'"),
        ({"component": "vae"}, "component must be 'transformer' or 'unet'"),
        ({"component": None, "format": "kohya"}, "component must be 'transformer' or 'unet'"),
        ({"dtype": torch.int8}, "dtype must be one of torch.float32, torch.float16, torch.bfloat16, not torch.int8"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        write_adapter(make(LAYERS), tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_values_that_do_not_fit_are_not_written(format: Any, tmp_path: Path) -> None:
    layers = make(LAYERS).layers
    big = {**layers, Q: LayerAdapter(layers[Q].down * 1e6, layers[Q].up, 1.0)}
    with pytest.raises(AdapterError, match="torch.float16 cannot hold") as caught:
        write_adapter(Adapter(big), tmp_path, format, dtype=torch.float16, layers=LAYERS)
    assert len(caught.value.problems) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AdapterError, match="the adapter has no layers"):
        write_adapter(Adapter({}), tmp_path, format, layers=LAYERS)


@pytest.mark.parametrize("format", FORMATS)
def test_paths(format: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(AdapterError, match="file: is a file; give a directory"):
        write_adapter(make(LAYERS), tmp_path / "file", format, layers=LAYERS)
    made = write_adapter(make(LAYERS), tmp_path / "new" / "er", format, layers=LAYERS)
    assert made == tmp_path / "new" / "er" / ("" if format == "peft" else "pytorch_lora_weights.safetensors")
    if format != "peft":
        (tmp_path / "dir.safetensors").mkdir()
        with pytest.raises(AdapterError, match="dir.safetensors: is a directory; give a file"):
            write_adapter(make(LAYERS), tmp_path / "dir.safetensors", format, layers=LAYERS)
        file = tmp_path / "name.safetensors"
        assert write_adapter(make(LAYERS), str(file), format, layers=LAYERS) == file


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_write_leaves_what_was_there(
    format: Any, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make(LAYERS)
    write_adapter(adapter, tmp_path, format, layers=LAYERS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, failing, fail)
        write_adapter(make(LAYERS, alpha=lambda i: 9.0), tmp_path, format, layers=LAYERS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_same(read_adapter(tmp_path, LAYERS), adapter)


def test_a_file_is_as_readable_as_others(tmp_path: Path) -> None:
    file = write_adapter(make(LAYERS), tmp_path)
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    """q and k may have one A, as in a fused file; safetensors alone refuses that."""
    down, up = torch.randn(6, 2).T, torch.randn(4, 2)
    adapter = Adapter({name: LayerAdapter(down, up, 2.0) for name in (Q, K)})
    for format in FORMATS:
        assert_same(read_adapter(write_adapter(adapter, tmp_path / format, format, layers=LAYERS), LAYERS), adapter)


def test_files_are_reproducible(tmp_path: Path) -> None:
    for format in FORMATS:
        contents = []
        for folder in ("a", "b"):
            write_adapter(make(LAYERS), tmp_path / format / folder, format, layers=LAYERS)
            contents.append({path.name: path.read_bytes() for path in (tmp_path / format / folder).iterdir()})
        assert contents[0] == contents[1]


def test_parameters_of_a_module_are_written(tmp_path: Path) -> None:
    parts = make(LAYERS).layers
    live = {n: LayerAdapter(torch.nn.Parameter(p.down), torch.nn.Parameter(p.up), p.alpha) for n, p in parts.items()}
    for format in FORMATS:
        path = write_adapter(Adapter(live), tmp_path / format, format, layers=LAYERS)
        assert_same(read_adapter(path, LAYERS), Adapter(parts))


def test_neither_diffusers_nor_peft_is_needed_for_their_files(tmp_path: Path) -> None:
    code = f"""
import sys, torch
from squareq_fx.adapters import Adapter, LayerAdapter, read_adapter, write_adapter
layers = {{"a.b": (3, 2)}}
adapter = Adapter({{"a.b": LayerAdapter(torch.ones(1, 2), torch.ones(3, 1), 1.0)}})
for format in {FORMATS!r}:
    read_adapter(write_adapter(adapter, {str(tmp_path)!r} + "/" + format, format, layers=layers), layers)
print(sorted({{"diffusers", "peft", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_file_says_its_framework(tmp_path: Path) -> None:
    for format in FORMATS:
        write_adapter(make(LAYERS), tmp_path / format, format, layers=LAYERS)
        (file,) = (tmp_path / format).glob("*.safetensors")
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
