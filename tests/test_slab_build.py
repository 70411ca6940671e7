"""Building from every kind of source: what is stored, what is refused, and what the result restores."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from slab_models import Mixed, TinyNet, named, restored
from torch import nn

from squareq_fx.errors import CaptureError, SlabError
from squareq_fx.slab import Slab, build_slab, model_signature, open_slab
from squareq_fx.slab.sources import Checkpoint

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 4,
}
FLUX = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "in_channels": 4,
    "axes_dims_rope": (2, 2, 4),
}


def assert_restores(slab: Slab, model: nn.Module) -> None:
    """Every tensor of the model is in the slab, quantised within half a scale or else bit for bit."""
    quantised = {f"{name}.weight": layer.scale_key for name, layer in slab.layers.items()}
    for name, tensor in named(model).items():
        back = restored(slab, name)
        stored = slab.aliases.get(name, name)
        if stored in quantised and stored not in slab.passthrough:
            scale = slab.tensor(quantised[stored])
            assert bool(((back - tensor.float()).abs() <= scale[:, None] * 0.5001).all()), name
        elif stored in slab.passthrough:
            assert back.dtype == tensor.dtype and torch.equal(back, tensor), name
        else:
            assert torch.equal(back, tensor.float()), name


def assert_same_files(a: Path, b: Path) -> None:
    for suffix in (".safetensors", ".manifest.json"):
        assert Path(f"{a}{suffix}").read_bytes() == Path(f"{b}{suffix}").read_bytes()


def test_a_module_with_everything(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed()
    before = {name: tensor.clone() for name, tensor in named(model).items()}
    ids = torch.zeros(2, 5, dtype=torch.int64)
    slab = build_slab(model, tmp_path / "s", example_inputs=(ids,), progress=False)
    assert_restores(slab, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in named(model).items())
    assert set(slab.layers) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {
        name: slab.aliases[name] for name in ("blocks.0.shared.weight", "blocks.1.shared.bias", "out.weight")
    } == {
        "blocks.0.shared.weight": "shared.weight",
        "blocks.1.shared.bias": "shared.bias",
        "out.weight": "embed.weight",
    }
    assert {"table", "embed.weight", "conv.weight", "steps", "count", "blocks.0.scale_shift"} <= set(
        slab.passthrough
    )
    assert not {k for k in slab.tensors if k.startswith("blocks.0.shared")}
    slab.verify()


def test_passthrough_false_leaves_the_rest_out(tmp_path: Path) -> None:
    slab = build_slab(Mixed(), tmp_path / "s", passthrough=False, progress=False)
    assert slab.passthrough == {}
    assert {key.rpartition(".")[2] for key in slab.tensors} == {"qweight", "scale", "zero_point", "bias"}
    assert "out.weight" not in slab.aliases and slab.aliases["blocks.1.shared.weight"] == "shared.weight"


def test_a_tied_pair_of_linears_is_two_layers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    slab = build_slab(model, tmp_path / "s", progress=False)
    assert torch.equal(slab.tensor("0.qweight"), slab.tensor("1.qweight"))
    assert slab.aliases == {"1.weight": "0.weight"}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(9, 5), nn.LayerNorm(5))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    slab = build_slab(model, tmp_path / "s", progress=False)
    assert_restores_any(slab, model)
    assert slab.tensor("1.weight").dtype == dtype


def assert_restores_any(slab: Slab, model: nn.Sequential) -> None:
    weight, scale = model[0].weight.detach().float(), slab.tensor("0.scale")
    assert bool(((restored(slab, "0.weight") - weight).abs() <= scale[:, None] * 0.5001).all())
    assert torch.equal(slab.tensor("0.bias"), model[0].bias.detach().float())
    assert torch.equal(slab.tensor("1.weight").view(torch.uint8), model[1].weight.detach().view(torch.uint8))


def test_weights_that_are_not_contiguous(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Conv2d(8, 8, 3))
    model[0].weight = nn.Parameter(torch.randn(40, 30).t())
    model[1].to(memory_format=torch.channels_last)
    assert_restores(build_slab(model, tmp_path / "s", progress=False), model)


# Directories -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(**DIT).eval()


def test_a_diffusers_directory_is_the_module(dit: DiTTransformer2DModel, tmp_path: Path) -> None:
    dit.save_pretrained(tmp_path / "model")
    slab = build_slab(tmp_path / "model", tmp_path / "from_files", progress=False)
    assert_restores(slab, dit)
    build_slab(dit, tmp_path / "from_module", progress=False)
    assert_same_files(tmp_path / "from_files", tmp_path / "from_module")
    assert slab.manifest.architecture_id == "DiTTransformer2DModel"
    assert slab.signature == model_signature(dit)
    assert slab.input_signature["kwargs"]["hidden_states"]["tensor"]["shape"] == [2, 3, 8, 8]
    assert slab.block_paths == ("transformer_blocks.0", "transformer_blocks.1")
    assert "pos_embed.pos_embed" in slab.passthrough


@pytest.mark.parametrize("form", ["sharded", "no index", "variant", "sharded variant", "with other variant"])
def test_the_forms_of_a_checkpoint(form: str, dit: DiTTransformer2DModel, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shard = {"max_shard_size": "20KB"} if "shard" in form or "index" in form else {}
    dit.save_pretrained(directory, variant="fp16" if "variant" in form else None, **shard)
    if form == "no index":
        (directory / "diffusion_pytorch_model.safetensors.index.json").unlink()
    if form == "with other variant":
        dit.save_pretrained(directory)
    if shard:
        assert len(list(directory.glob("*-of-*.safetensors"))) > 1
    build_slab(directory, tmp_path / "a", progress=False)
    build_slab(dit, tmp_path / "b", progress=False)
    assert_same_files(tmp_path / "a", tmp_path / "b")


def test_a_bf16_directory_records_bf16_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**FLUX).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    slab = build_slab(tmp_path / "model", tmp_path / "s", progress=False)
    assert slab.input_signature["kwargs"]["hidden_states"]["tensor"]["dtype"] == "bfloat16"
    assert [s.name for s in slab.segments] == [
        "glue.x_embedder",
        "transformer_blocks.0",
        "transformer_blocks.1",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
        "glue.norm_out.linear",
    ]
    assert_restores(slab, model)


def test_a_transformers_directory_with_tied_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=31, n_positions=12)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    ids = torch.zeros(1, 4, dtype=torch.int64)
    slab = build_slab(tmp_path / "model", tmp_path / "s", example_inputs={"input_ids": ids}, progress=False)
    assert list(slab.layers) == ["lm_head"]
    assert slab.aliases["lm_head.weight"] == "transformer.wte.weight"
    assert_restores(slab, model)


def test_one_file_with_a_class_or_a_function(dit: DiTTransformer2DModel, tmp_path: Path) -> None:
    dit.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    build_slab(file, tmp_path / "a", model_class=DiTTransformer2DModel, progress=False)
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    build_slab(alone, tmp_path / "b", model_class=lambda: DiTTransformer2DModel(**DIT), progress=False)
    assert_same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(SlabError, match="model_class"):
        build_slab(alone, tmp_path / "c", progress=False)
    with pytest.raises(SlabError, match=r"config\.json"):
        build_slab(alone, tmp_path / "c", model_class=DiTTransformer2DModel, progress=False)


def test_sources_that_are_none(dit: DiTTransformer2DModel, tmp_path: Path) -> None:
    def refused(source: Any, match: str, **options: Any) -> None:
        with pytest.raises(SlabError, match=match):
            build_slab(source, tmp_path / "out", progress=False, **options)

    refused(tmp_path / "nothing", "does not exist")
    refused(tmp_path, "no safetensors weights")
    refused(nn.Linear(2, 2), "module already", model_class=nn.Identity)
    pipeline = tmp_path / "pipeline"
    dit.save_pretrained(pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    refused(pipeline, "whole pipeline.*transformer")
    model = shutil.copytree(pipeline / "transformer", tmp_path / "model")
    for config, match in (
        ('{"_class_name": "NoSuchModel"}', "no model 'NoSuchModel'"),
        ('{"_class_name": "DiTTransformer2DModel", "num_layers": "many"}', "cannot be made"),
        ("{}", "names neither"),
        ("[]", "one JSON object"),
        ("{", "not valid JSON"),
    ):
        (model / "config.json").write_text(config)
        refused(model, match)
    (model / "config.json").unlink()
    refused(model, "no config.json")
    refused(model, "must make an nn.Module", model_class=lambda: 3)
    weights = model / "diffusion_pytorch_model.safetensors"
    weights.rename(model / "diffusion_pytorch_model-00001-of-00002.safetensors")
    refused(model, "shards are missing")
    shutil.copy(model / "diffusion_pytorch_model-00001-of-00002.safetensors", model / "model.a.safetensors")
    (model / "diffusion_pytorch_model-00001-of-00002.safetensors").rename(model / "model.b.safetensors")
    refused(model, "several variants of the weights .a, b.")
    for file in model.glob("*.safetensors"):
        file.unlink()
    (model / "diffusion_pytorch_model.bin").touch()
    refused(model, "pickled weights")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    refused(model, "names files that are not there")


def test_everything_wrong_with_a_checkpoint_is_listed_at_once(tmp_path: Path) -> None:
    state = TinyNet().state_dict()
    state["blocks.0.proj.weight"] = state["blocks.0.proj.weight"][:, :3].contiguous()
    state["blocks.1.proj.weight"] = state["blocks.1.proj.weight"].to(torch.int32)
    state["blocks.1.norm.bias"] = torch.zeros(48, dtype=torch.int64)
    state["extra"] = torch.zeros(2)
    del state["head.bias"], state["blocks.2.norm.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(SlabError) as caught:
        build_slab(tmp_path / "w.safetensors", tmp_path / "s", model_class=TinyNet, progress=False)
    text = "\n".join(caught.value.problems)
    for expected in (
        "blocks.0.proj.weight: has shape [48, 3], the model needs [48, 48]",
        "blocks.1.proj.weight: dtype torch.int32 cannot be quantised",
        "blocks.1.norm.bias: is stored as torch.int64, the model needs torch.float32",
        "extra: unexpected",
        "head.bias: missing",
        "blocks.2.norm.weight: missing",
    ):
        assert expected in text
    assert len(caught.value.problems) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_tied_tensors_that_differ_in_the_checkpoint(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in Mixed().state_dict().items()}
    save_file(state, tmp_path / "same.safetensors")
    build_slab(tmp_path / "same.safetensors", tmp_path / "s", model_class=Mixed, progress=False)
    state["out.weight"][3, 3] += 1
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(SlabError, match=r"out.weight: is tied to embed.weight, but"):
        build_slab(tmp_path / "w.safetensors", tmp_path / "s", model_class=Mixed, progress=False)


def test_broken_files_of_a_checkpoint(dit: DiTTransformer2DModel, tmp_path: Path) -> None:
    dit.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    first, second, third, *_ = sorted((tmp_path / "model").glob("*-of-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"\xff" * 50)
    shutil.copy(third, tmp_path / "model" / "copy.safetensors")
    index = tmp_path / "model" / "diffusion_pytorch_model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["again"] = "copy.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(SlabError) as caught:
        build_slab(tmp_path / "model", tmp_path / "s", progress=False)
    text = str(caught.value)
    assert "truncated or overlong" in text and second.name in text and "is in two files" in text


# Values that are refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.1.ff.2.weight", "head.bias", "blocks.2.norm.weight"])
def test_nan_and_inf_are_refused_by_name(name: str, value: float, tmp_path: Path) -> None:
    state = TinyNet().state_dict()
    state[name].view(-1)[-1] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(SlabError, match=rf"{name}: .*NaN or Inf"):
        build_slab(tmp_path / "w.safetensors", tmp_path / "s", model_class=TinyNet, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_mask_may_be_infinite_but_not_nan(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    assert_restores(build_slab(model, tmp_path / "s", progress=False), model)
    model.mask[0, 0] = float("nan")
    with pytest.raises(SlabError, match="mask: holds NaN"):
        build_slab(model, tmp_path / "s", progress=False)


def test_modules_that_cannot_be_stored(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.LazyLinear(3),
        nn.Linear(4, 4, device="meta"),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    )
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(SlabError) as caught:
        build_slab(model, tmp_path / "s", progress=False)
    text = str(caught.value)
    for expected in (
        "0.weight: not initialised",
        "1.weight: has no values",
        "2: its weight is computed",
        "sparse",
    ):
        assert expected in text


def test_names_that_would_clash(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_buffer("scale", torch.ones(4))
    with pytest.raises(SlabError, match=r"0\.scale: two tensors"):
        build_slab(model, tmp_path / "s", progress=False)


def test_a_block_pattern_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="matches no module"):
        build_slab(TinyNet(), tmp_path / "s", block_pattern="nothing", progress=False)


# Inputs and files ------------------------------------------------------------------------------------------


def test_example_inputs_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(SlabError, match=r"do not fit TinyNet\.forward"):
        build_slab(TinyNet(), tmp_path / "s", example_inputs={"y": torch.zeros(2, 48)}, progress=False)


def test_a_forward_that_cannot_run_on_meta_only_warns(tmp_path: Path) -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.late(self.early(x)) if float(x.sum()) > 0 else x

    with pytest.warns(UserWarning, match="registration order is used"):
        slab = build_slab(Peeks(), tmp_path / "s", example_inputs=(torch.ones(1, 4),), progress=False)
    assert slab.input_signature["args"] == [{"tensor": {"shape": [1, 4], "dtype": "float32"}}]
    assert [s.name for s in slab.segments] == ["glue.late"]


def test_building_twice_gives_the_same_bytes_and_leaves_the_opened_slab_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyNet()
    first = build_slab(model, tmp_path / "s", progress=False)
    bytes_before = Path(first.path).read_bytes()
    build_slab(model, tmp_path / "s", progress=False)
    assert Path(first.path).read_bytes() == bytes_before
    with torch.no_grad():
        model.head.weight *= 2
    second = build_slab(model, tmp_path / "s", progress=False)
    first.verify()
    second.verify()
    assert torch.equal(second.tensor("head.scale"), first.tensor("head.scale") * 2)


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SlabError, match="cannot build slab"):
        build_slab(TinyNet(), tmp_path / "file" / "s", progress=False)


def test_the_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(TinyNet().state_dict(), file)
    before = file.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(file)
    for target in (file, tmp_path / "w", tmp_path / "link"):
        with pytest.raises(SlabError, match="checkpoint itself"):
            build_slab(file, target, model_class=TinyNet, progress=False)
    assert file.read_bytes() == before


def test_directories_are_made(tmp_path: Path) -> None:
    build_slab(TinyNet(), tmp_path / "a" / "b" / "flux.1-dev", progress=False)
    assert open_slab(tmp_path / "a" / "b" / "flux.1-dev").path.name == "flux.1-dev.safetensors"


def test_a_checkpoint_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "w.safetensors")
    checkpoint = Checkpoint([tmp_path / "w.safetensors"])
    os.truncate(tmp_path / "w.safetensors", 500)
    with pytest.raises(SlabError, match="truncated while it was read"):
        checkpoint.read("a", 0, 1000)
    checkpoint.close()


def test_building_changes_no_global_state(tmp_path: Path) -> None:
    model = TinyNet()
    state, hooks = torch.get_rng_state(), [len(m._forward_pre_hooks) for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_slab(model, tmp_path / "s", example_inputs=(torch.ones(1, 48),), progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    assert model.training and load_file(f"{tmp_path}/s.safetensors")
