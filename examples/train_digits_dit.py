"""Trains the demo model, a small DiT that draws scikit-learn's 8x8 digits, on the CPU.

    pip install -e '.[examples]' && python examples/train_digits_dit.py --output out/digits

It takes some twelve minutes on two cores that have nothing else to do. The objective is flow matching (arXiv
2210.02747) with labels dropped for classifier-free guidance (arXiv 2207.12598); what is saved is the moving
average of the weights, as float16, by `save_pretrained`. At the end the script draws a grid, saves it as a
picture and lets a classifier trained on the real digits say whether it sees what was asked for.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from matplotlib import image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from sklearn.datasets import load_digits
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from squareq_fx.demo.judge import agreement
from squareq_fx.demo.model import load_digits_model
from squareq_fx.demo.sampling import CLASSES, NULL_CLASS, SIZE, TIMESTEPS, grid_labels, sample_digits, to_grid

LABEL_DROP = 0.1
EMA_DECAY = 0.999


def build_model() -> DiTTransformer2DModel:
    """Four identical blocks of width 128: 1.4 million parameters, 2.9 MB as float16."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    for block in model.transformer_blocks:
        # Every block owns a label embedder that would drop labels on its own; the loss below drops a sample's
        # label for all of them together, or the model would never see a sample without a class.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
        # adaLN-Zero (arXiv 2212.09748): each block starts as the identity.
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.zeros_(model.proj_out_2.bias)
    return model


def flow_matching_loss(
    model: DiTTransformer2DModel, pictures: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Mean square error of the predicted velocity, noise - picture, at a random time of each sample.

    Args:
        pictures: `[batch, 1, 8, 8]` float32 in [-1, 1].
        labels: `[batch]` int64, 0 to 9.
    """
    timestep = torch.randint(1, TIMESTEPS + 1, (len(pictures),))
    t = (timestep / TIMESTEPS).view(-1, 1, 1, 1)
    noise = torch.randn_like(pictures)
    labels = torch.where(torch.rand(len(labels)) < LABEL_DROP, NULL_CLASS, labels)
    noisy = (1 - t) * pictures + t * noise
    velocity = model(noisy, timestep=timestep, class_labels=labels, return_dict=False)[0]
    return torch.nn.functional.mse_loss(velocity, noise - pictures)


def train(model: DiTTransformer2DModel, *, steps: int, batch: int, lr: float) -> DiTTransformer2DModel:
    """Trains `model` in place and returns the moving average of its weights."""
    digits = load_digits()
    pictures = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(digits.target)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.05)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    shown = torch.zeros(())
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        for step in range(steps):
            picked = torch.randint(len(pictures), (batch,))
            loss = flow_matching_loss(model, pictures[picked], labels[picked])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            ema.update_parameters(model)
            shown = loss.detach() if step == 0 else torch.lerp(shown, loss.detach(), 0.02)
            progress.update(task, advance=1, loss=shown.item())
    return ema.module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/digits"), help="where config and weights go")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console()

    torch.manual_seed(options.seed)
    started = time.perf_counter()
    model = train(build_model(), steps=options.steps, batch=options.batch, lr=options.lr)
    console.print(f"trained for {options.steps} steps in {time.perf_counter() - started:.0f} s")

    model.half().save_pretrained(options.output)
    size = sum(f.stat().st_size for f in options.output.iterdir() if f.suffix in {".json", ".safetensors"})
    console.print(f"saved {options.output}: {size / 1e6:.2f} MB")

    samples = sample_digits(load_digits_model(options.output), columns=20, seed=options.seed)
    picture = options.output / "samples.png"
    image.imsave(picture, to_grid(samples).numpy(), cmap="gray", vmin=0, vmax=1)
    share = agreement(samples, grid_labels(20))
    console.print(f"{share:.1%} of {len(samples)} samples are recognised as the digit asked for: {picture}")
    if share < 0.9:
        raise SystemExit("the digits are not good enough: train for longer")


if __name__ == "__main__":
    main()
