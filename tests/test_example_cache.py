"""cache_latents.py: what it writes is what the pipeline computes, and a second run makes only what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from example_pipelines import SCALE, cache_latents, save_pictures, save_pipeline
from lora_trainer.buckets import crop_to
from lora_trainer.cache import Takes, find_entries, open_cache, read_entry
from lora_trainer.families import FAMILIES, family_of
from lora_trainer.pictures import find_pictures, from_latents, load_pixels, to_latents
from PIL import Image
from typer.testing import CliRunner

from squareq_fx.errors import SquareQError

SIZES = [(40, 40), (64, 30), (30, 64), (32, 32), (35, 16)]
OPTIONS = ["--resolution", "32", "--bucket-step", "8", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def pipeline_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(request.param, tmp_path_factory.mktemp(request.param) / "pipeline")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures") / "images", SIZES)


@pytest.fixture(scope="module")
def cache(pipeline_dir: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache"
    assert "7 files made, 0 were there, 0 removed; 1 pictures are smaller" in run(pipeline_dir, pictures, path)
    return path


def run(pipeline: Path, images: Path, cache: Path, *more: str, fails: bool = False) -> str:
    arguments = [str(pipeline), str(images), str(cache), *OPTIONS, "--prompt", "a red cat", *more]
    result = CliRunner().invoke(cache_latents.app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == int(fails), result.output
    return " ".join(result.output.split())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------------- what it writes


def test_the_cache_is_what_the_trainer_takes(pipeline_dir: Path, cache: Path) -> None:
    family = family_of(pipeline_dir)
    found = open_cache(cache, family.takes(family.config(pipeline_dir)))
    assert [entry.bucket for entry in found.samples] == [(32, 32), (40, 24), (24, 40), (32, 32), (40, 24)]
    assert [entry.caption for entry in found.prompts] == ["", "a red cat"]
    assert found.samples[1].caption == "a blue dog on the sea"


def test_embeddings_are_the_pipelines_own(pipeline_dir: Path, cache: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(pipeline_dir)
    tensors = safetensors.torch.load_file(cache / "picture1.png.safetensors")
    if pipeline_dir.parent.name.startswith("sdxl"):
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt("a blue dog on the sea")
        empty = safetensors.torch.load_file(cache / "prompts" / "000.safetensors")
        torch.testing.assert_close(empty["prompt_embeds"], negative[0])  # zeros, as this pipeline's config wants it
        torch.testing.assert_close(empty["pooled_prompt_embeds"], negative_pooled[0])
        crop = crop_to((64, 30), (40, 24))
        size_ids = pipeline._get_add_time_ids((30, 64), (crop.top, crop.left), (24, 40), torch.float32, 20)
        assert torch.equal(tensors["time_ids"], size_ids[0]) and crop.left > 0
    else:
        embeds, pooled, _ = pipeline.encode_prompt("a blue dog on the sea", None, max_sequence_length=10)
        assert "time_ids" not in tensors
    torch.testing.assert_close(tensors["prompt_embeds"], embeds[0])
    torch.testing.assert_close(tensors["pooled_prompt_embeds"], pooled[0])


def test_latents_are_those_that_the_pipeline_decodes(pipeline_dir: Path, cache: Path, pictures: Path) -> None:
    """Through the pipeline's own image processor and normalisation, at a picture that needs no resizing."""
    pipeline = DiffusionPipeline.from_pretrained(pipeline_dir)
    tensors = safetensors.torch.load_file(cache / "picture3.png.safetensors")
    pixels = pipeline.image_processor.preprocess(Image.open(pictures / "picture3.png"))
    config = pipeline.vae.config
    with torch.no_grad():
        mode = pipeline.vae.encode(pixels).latent_dist.mode()
    expected = (mode - (config.shift_factor or 0)) * config.scaling_factor
    assert tensors["latents"].dtype == torch.float32
    torch.testing.assert_close(tensors["latents"], expected[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        decoded = pipeline.vae.decode(expected / config.scaling_factor + (config.shift_factor or 0)).sample
    by_pipeline = pipeline.image_processor.postprocess(decoded)[0]
    assert np.array_equal(np.asarray(next(from_latents(pipeline.vae, expected))), np.asarray(by_pipeline))


def test_latents_with_mean_and_deviation_of_each_channel(pipeline_dir: Path) -> None:
    vae = DiffusionPipeline.from_pretrained(pipeline_dir).vae
    channels = vae.config.latent_channels
    deviations = [float(i + 2) for i in range(channels)]
    vae.register_to_config(latents_mean=[0.5] * channels, latents_std=deviations, scaling_factor=0.5)
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    expected = (mode - 0.5) / torch.tensor(deviations).view(1, -1, 1, 1) * 0.5
    torch.testing.assert_close(to_latents(vae, pixels), expected)
    assert next(from_latents(vae, expected)).size == (8, 8)


# ------------------------------------------------------------------------------------------------------ a second run


def test_a_second_run_makes_nothing_and_loads_nothing(
    pipeline_dir: Path, pictures: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_latents, "_make", None)
    before = contents(cache)
    assert "0 files made, 7 were there, 0 removed" in run(pipeline_dir, pictures, cache)
    assert contents(cache) == before


def test_a_run_that_dies_is_started_again(
    pipeline_dir: Path, pictures: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    write, left = cache_latents.write_entry, 3

    def dying(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        write(*arguments)

    monkeypatch.setattr(cache_latents, "write_entry", dying)
    with pytest.raises(Killed):
        run(pipeline_dir, pictures, tmp_path / "cache")
    monkeypatch.undo()
    (tmp_path / "cache" / ".picture9.safetensors.partial").write_bytes(b"torn")
    assert "4 files made, 3 were there, 0 removed" in run(pipeline_dir, pictures, tmp_path / "cache")
    (tmp_path / "cache" / ".picture9.safetensors.partial").unlink()
    assert {n: read_tensors(b) for n, b in contents(tmp_path / "cache").items()} == {
        n: read_tensors(b) for n, b in contents(cache).items()
    }


def read_tensors(content: bytes) -> dict[str, bytes]:
    """The order of the metadata in a safetensors header is not fixed."""
    return {name: tensor.numpy().tobytes() for name, tensor in safetensors.torch.load(content).items()}


def test_what_changed_is_made_again_and_what_is_gone_is_removed(
    pipeline_dir: Path, pictures: Path, cache: Path, tmp_path: Path
) -> None:
    images, copied = tmp_path / "images", tmp_path / "cache"
    shutil.copytree(pictures, images)
    shutil.copytree(cache, copied)
    (images / "picture0.txt").write_text("a house on the sea")
    Image.open(images / "picture1.png").rotate(180).save(images / "picture1.png")
    (images / "picture2.png").unlink()
    (images / "more").mkdir()
    shutil.copy(pictures / "picture3.png", images / "more")
    shutil.copy(pictures / "picture3.txt", images / "more")
    before = contents(copied)
    assert "3 files made, 4 were there, 1 removed" in run(pipeline_dir, images, copied)
    after = contents(copied)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert changed == {f"{n}.safetensors" for n in ("picture0.png", "picture1.png", "picture2.png", "more/picture3.png")}
    assert read_tensors(after["more/picture3.png.safetensors"]) == read_tensors(after["picture3.png.safetensors"])
    assert "5 files made, 2 were there" in run(pipeline_dir, images, copied, "--resolution", "16")  # not the prompts


def test_another_pipeline_makes_everything_again(pipeline_dir: Path, pictures: Path, cache: Path, tmp_path: Path) -> None:
    copied = tmp_path / "cache"
    shutil.copytree(cache, copied)
    other = save_pipeline("flux" if family_of(pipeline_dir).name == "sdxl" else "sdxl", tmp_path / "pipeline")
    assert "7 files made, 0 were there" in run(other, pictures, copied)
    assert {read_entry(path).family for path in find_entries(copied)} == {family_of(other).name}


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_pictures_are_all_reported(pipeline_dir: Path, pictures: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(pictures, images)
    (images / "picture0.txt").unlink()
    (images / "picture1.png").write_bytes(b"no picture")
    (images / "picture2.txt").unlink()
    message = run(pipeline_dir, images, tmp_path / "cache", fails=True)
    assert "picture0.png has no caption: write picture0.txt beside it" in message
    assert "picture1.png is not a readable picture" in message and "picture2.png has no caption" in message
    assert not (tmp_path / "cache").exists()
    (images / "picture1.png").unlink()
    assert "6 files made" in run(pipeline_dir, images, tmp_path / "cache", "--default-caption", "a dog")
    assert read_entry(tmp_path / "cache" / "picture0.png.safetensors").caption == "a dog"


def test_a_picture_cut_short(pictures: Path, tmp_path: Path) -> None:
    Image.open(pictures / "picture0.png").save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[:-100])
    (picture,) = find_pictures(tmp_path, "a cat")
    with pytest.raises(SquareQError, match="a.jpg is damaged"):
        load_pixels(picture, crop_to(picture.size, (8, 8)), (8, 8))


def test_nothing_to_do(pipeline_dir: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in run(pipeline_dir, tmp_path / "empty", tmp_path / "cache", fails=True)
    assert "is no pipeline directory" in run(tmp_path, pictures, tmp_path / "cache", fails=True)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "holds a StableDiffusionPipeline; this trainer knows" in run(tmp_path, pictures, tmp_path / "cache", fails=True)
    assert "must be a multiple of the bucket step" in run(
        pipeline_dir, pictures, tmp_path / "cache", "--resolution", "33", fails=True
    )


def test_files_of_others_are_not_removed(pipeline_dir: Path, pictures: Path, tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    message = run(pipeline_dir, pictures, tmp_path, fails=True)
    assert "lora.safetensors was not written by cache_latents.py" in message
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_values_that_are_not_finite(
    pipeline_dir: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_latents, "to_latents", lambda vae, pixels: torch.full((1, 4, 16, 16), torch.nan))
    assert "picture0.png.safetensors: latents has NaN or Inf" in run(pipeline_dir, pictures, tmp_path / "cache", fails=True)


# ------------------------------------------------------------------------------------------------------------ pictures


def test_a_photograph_on_its_side_and_a_transparent_one(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 15:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    Image.new("RGBA", (16, 16), (200, 0, 0, 0)).save(tmp_path / "b.png")
    first, second = find_pictures(tmp_path, "a cat")
    assert (first.size, second.size) == ((20, 30), (16, 16))
    tensor = load_pixels(first, crop_to(first.size, (16, 24)), (16, 24))
    assert tensor.shape == (1, 3, 24, 16)
    assert tensor[..., 0, :].max() < -0.9 and tensor[..., -1, :].min() > 0.9
    assert torch.equal(load_pixels(second, crop_to(second.size, (16, 16)), (16, 16)), torch.ones(1, 3, 16, 16))


# -------------------------------------------------------------------------------------------- the check of the trainer


def broken_cache(tmp_path: Path, **change: Any) -> Path:
    """One sample, good but for the changes."""
    tensors = {
        "latents": torch.zeros(2, 16, 16),
        "prompt_embeds": torch.zeros(10, 24),
        "pooled_prompt_embeds": torch.zeros(20),
    }
    bucket = change.pop("bucket", (32, 32))
    family, name = change.pop("family", "flux"), change.pop("name", "a")
    tensors = {key: value for key, value in {**tensors, **change}.items() if value is not None}
    metadata = cache_latents.entry_metadata(family=family, caption="", source="", bucket=bucket)
    cache_latents.write_entry(tmp_path / f"{name}.safetensors", tensors, metadata)
    return tmp_path


TAKES = Takes("flux", {"latents": (2, None, None), "prompt_embeds": (None, 24), "pooled_prompt_embeds": (20,)}, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(4, 16, 16)}, r"latents is \[4, 16, 16\], the model takes \[2, 'any', 'any'\]"),
        ({"prompt_embeds": torch.zeros(10, 25)}, r"prompt_embeds is \[10, 25\]"),
        ({"prompt_embeds": torch.zeros(1, 10, 24)}, r"prompt_embeds is \[1, 10, 24\]"),
        ({"pooled_prompt_embeds": None}, "pooled_prompt_embeds is missing"),
        ({"bucket": (32, 16)}, "latents of 16x16 do not belong to the bucket 32x16"),
        ({"latents": torch.zeros(2, 15, 15), "bucket": (30, 30)}, "latents of 15x15: the model takes multiples of 2"),
        ({"family": "sdxl"}, "the model is flux, the cache has 1 of sdxl; make one cache for each family"),
        ({"bucket": None}, "there are prompts, but no picture"),
    ],
)
def test_a_cache_the_model_does_not_take(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SquareQError, match=message):
        open_cache(broken_cache(tmp_path, **change), TAKES)


def test_all_faults_of_a_cache_are_reported(tmp_path: Path) -> None:
    broken_cache(tmp_path, name="a", family="sdxl")
    broken_cache(tmp_path, name="b", latents=torch.zeros(4, 16, 16))
    broken_cache(tmp_path, name="c")
    (tmp_path / "d.safetensors").write_bytes(b"torn")
    with pytest.raises(SquareQError) as caught:
        open_cache(tmp_path, TAKES)
    message = str(caught.value)
    assert "the cache has 2 of flux, 1 of sdxl" in message
    assert "b.safetensors: latents is" in message and "d.safetensors cannot be read" in message
    assert "c.safetensors" not in message


def test_samples_that_cannot_be_in_one_run(tmp_path: Path) -> None:
    broken_cache(tmp_path, name="a")
    broken_cache(tmp_path, name="b", latents=torch.zeros(2, 8, 8), prompt_embeds=torch.zeros(7, 24))
    with pytest.raises(SquareQError, match="different VAEs: of 1/2, 1/4(?s:.)*embeddings of 7, 10 tokens"):
        open_cache(tmp_path, TAKES)


def test_no_cache(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(SquareQError, match="holds no cached samples; run `cache_latents.py PIPELINE IMAGES"):
            open_cache(path, TAKES)
    assert SCALE == 2 and set(FAMILIES) == {"sdxl", "flux"}
