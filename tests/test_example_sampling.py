"""The trainer calls the model as the pipeline does, and draws the pictures that the pipeline draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from example_pipelines import cache_latents, save_pipeline
from lora_trainer.cache import Cache, find_entries, read_entry
from lora_trainer.families import family_of
from lora_trainer.pictures import from_latents
from lora_trainer.sampling import draw
from models import seeded

from squareq_fx.errors import SquareQError

SIZE = (40, 24)


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def pipeline_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(request.param, tmp_path_factory.mktemp(request.param) / "pipeline")


@pytest.fixture(scope="module")
def pipeline(pipeline_dir: Path) -> Any:
    whole = DiffusionPipeline.from_pretrained(pipeline_dir)
    whole.set_progress_bar_config(disable=True)
    return whole


@pytest.fixture(scope="module")
def prompts(pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The cached embeddings of the empty prompt and of two others."""
    folder, family = tmp_path_factory.mktemp("prompts"), family_of(pipeline_dir)
    tasks = [cache_latents._prompt_task(i, text, folder, "") for i, text in enumerate(["", "a red cat", "a dog"])]
    cache_latents._make(tasks, family, family.load_encoders(pipeline_dir, torch.float32), torch.device("cpu"))
    return Cache(family.name, (), tuple(read_entry(path) for path in find_entries(folder)))


def backbone(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


def test_pictures_are_those_of_the_whole_pipeline(pipeline_dir: Path, pipeline: Any, prompts: Cache) -> None:
    family = family_of(pipeline_dir)
    drawn_before = torch.get_rng_state()
    options: dict[str, Any] = {"size": SIZE, "steps": 3, "guidance": None, "seed": 5, "prediction": "flow"}
    if family.name == "sdxl":
        options["prediction"] = "epsilon"
    drawn = draw(backbone(pipeline), family, pipeline_dir, prompts, **options)
    assert torch.equal(torch.get_rng_state(), drawn_before)
    assert len(drawn) == 2
    for picture, prompt in zip(drawn, ["a red cat", "a dog"]):
        expected = pipeline(
            prompt,
            width=SIZE[0],
            height=SIZE[1],
            num_inference_steps=3,
            guidance_scale=5.0 if family.name == "sdxl" else 3.5,
            generator=torch.Generator().manual_seed(5),
            **({} if family.name == "sdxl" else {"max_sequence_length": 10}),
        ).images[0]
        assert picture.size == expected.size == SIZE
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
    assert not np.array_equal(np.asarray(drawn[0]), np.asarray(drawn[1]))


@pytest.mark.parametrize("pipeline_dir", ["sdxl"], indirect=True)
def test_a_model_trained_for_v_is_sampled_for_v(pipeline_dir: Path, pipeline: Any, prompts: Cache) -> None:
    options: dict[str, Any] = {"size": SIZE, "steps": 2, "guidance": 1.0, "seed": 5}
    a, b = (
        np.asarray(draw(pipeline.unet, family_of(pipeline_dir), pipeline_dir, prompts, prediction=prediction, **options)[0])
        for prediction in ("epsilon", "v_prediction")
    )
    assert not np.array_equal(a, b)


def test_the_model_is_called_as_the_pipeline_calls_it(pipeline_dir: Path, pipeline: Any) -> None:
    """The call of a step of the pipeline is recorded; the trainer's call at its latents and time gives the same answer."""
    family, model = family_of(pipeline_dir), backbone(pipeline)
    recorded: list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: recorded.append((args, kwargs, output[0])), with_kwargs=True
    )
    try:
        with seeded(0):
            pipeline("a red cat", width=SIZE[0], height=SIZE[1], num_inference_steps=2, guidance_scale=1.0)
    finally:
        handle.remove()
    args, kwargs, answer = recorded[1]
    rows, columns = SIZE[1] // 2, SIZE[0] // 2
    if family.name == "sdxl":
        latents, timestep = args[0], args[1]
        added = kwargs["added_cond_kwargs"]
        batch = {"pooled_prompt_embeds": added["text_embeds"], "time_ids": added["time_ids"]}
        sizes = family.conditions((SIZE[1], SIZE[0]), (0, 0), (SIZE[1], SIZE[0]))
        assert torch.equal(sizes["time_ids"], added["time_ids"][0])
    else:
        latents = pipeline._unpack_latents(kwargs["hidden_states"], rows, columns, 1)
        answer = pipeline._unpack_latents(answer, rows, columns, 1)
        timestep = 1000 * kwargs["timestep"][0]
        batch = {"pooled_prompt_embeds": kwargs["pooled_projections"]}
    assert latents.shape == (1, latents.shape[1], rows, columns)
    batch["prompt_embeds"] = kwargs["encoder_hidden_states"]
    with torch.no_grad():
        predicted = family.predict(model, latents, timestep.float().expand(1), batch, guidance=1.0)
    torch.testing.assert_close(predicted, answer, rtol=1e-5, atol=1e-5)


def test_the_skeleton_is_the_model_without_weights(pipeline_dir: Path, pipeline: Any) -> None:
    skeleton = family_of(pipeline_dir).skeleton(pipeline_dir, torch.bfloat16)
    real = backbone(pipeline)
    assert type(skeleton) is type(real) and not skeleton.training
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert {(p.device.type, p.dtype, p.requires_grad) for p in skeleton.parameters()} == {("meta", torch.bfloat16, False)}


def test_a_pipeline_without_its_model(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(SquareQError, match=r"transformer/config.json is missing"):
        family_of(tmp_path).config(tmp_path)


def test_pixels_out_of_range_are_cut(pipeline: Any) -> None:
    latents = 100 * torch.randn(1, pipeline.vae.config.latent_channels, 4, 4)
    values = np.asarray(next(from_latents(pipeline.vae, latents)))
    assert values.dtype == np.uint8 and values.shape == (8, 8, 3)
