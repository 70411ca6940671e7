"""Training checkpoints: whole or not there, compared before loaded, and a killed run ends as one that was not killed."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from squareq_fx.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, trees
from squareq_fx.errors import SquareQError

STEPS, EVERY = 12, 3
FILES = ("adapters.safetensors", "state.safetensors", "state.json")


class Sampler:
    """Batches of a shuffled range; its position is the run's position in the data."""

    def __init__(self, count: int = 40, seed: int = 0) -> None:
        self.count, self.generator = count, torch.Generator().manual_seed(seed)
        self.left: list[int] = []

    def draw(self, batch: int) -> list[int]:
        if len(self.left) < batch:
            self.left += torch.randperm(self.count, generator=self.generator).tolist()
        drawn, self.left = self.left[:batch], self.left[batch:]
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "left": self.left, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["count"] != self.count:
            raise SquareQError(f"the data had {state['count']} samples and has {self.count}")
        self.left = state["left"]
        self.generator.set_state(state["generator"])


class Adapted(nn.Module):
    """A frozen layer with a low-rank branch, and dropout that draws from torch's random numbers."""

    def __init__(self, width: int = 6, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(nn.functional.dropout(self.down(x), 0.2))


class Run:
    """Everything a trainer has, made anew the same way each time."""

    def __init__(self, *, rank: int = 2, count: int = 40, average: str = "diffusers") -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.data = torch.randn(40, 6)
        self.module = Adapted(rank=rank)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        groups = [{"params": trained[:1], "lr": 0.02}, {"params": trained[1:], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.5 ** (step / STEPS))
        self.ema: Any = EMAModel(trained, decay=0.9)
        if average == "torch":
            self.ema = AveragedModel(self.module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.sampler = Sampler(count)

    def parts(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "ema": self.ema,
            "extra": {"sampler": self.sampler},
        }

    def step(self) -> None:
        x = self.data[self.sampler.draw(7)] + random.random() + np.random.rand()
        loss = (self.module(x) - x.roll(1, 1)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        if isinstance(self.ema, EMAModel):
            self.ema.step(p for p in self.module.parameters() if p.requires_grad)
        else:
            self.ema.update_parameters(self.module)

    def everything(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """All of the state, also of the next random numbers."""
        parts = {name: part.state_dict() for name, part in self.parts().items() if name != "extra"}
        drawn = [random.random(), float(np.random.rand()), torch.rand(3), self.sampler.draw(5)]
        return trees.split([parts, drawn])


def same(a: tuple[Any, dict[str, torch.Tensor]], b: tuple[Any, dict[str, torch.Tensor]]) -> bool:
    """Bit for bit: the bytes of the tensors and the text of the rest."""
    return safetensors.torch.save(a[1]) == safetensors.torch.save(b[1]) and json.dumps(a[0]) == json.dumps(b[0])


def train(directory: Path, run: Run | None = None) -> Run:
    """To the end, from where the directory's newest checkpoint is."""
    run = run or Run()
    begin = load_checkpoint(directory, **run.parts()) if latest_checkpoint(directory) else 0
    for step in range(begin, STEPS):
        run.step()
        if (step + 1) % EVERY == 0:
            save_checkpoint(directory, step=step + 1, keep=2, **run.parts())
    return run


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------------- killed


def _child(directory: str, kill_before: int, started: Any) -> None:
    """Train; send SIGKILL to itself before the file operation of that number, if there are so many."""
    torch.set_num_threads(1)
    run = Run()
    run.step()  # the first step costs more than all others: threads, kernels
    count, fsync = 0, os.fsync

    def count_one() -> None:
        nonlocal count
        count += 1
        if count == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        removes = event in ("os.remove", "os.rmdir")
        if removes or (event in ("open", "os.mkdir", "os.rename") and "checkpoint" in str(arguments[0])):
            count_one()

    def counting_fsync(fd: int) -> None:
        count_one()
        fsync(fd)

    sys.addaudithook(hook)
    os.fsync = counting_fsync  # type: ignore[assignment]
    started.set()
    train(Path(directory), Run())
    print(f"{count} file operations")


@pytest.fixture(scope="module")
def forks() -> Iterator[Any]:
    """A server that has imported everything once and forks for each run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # the server takes its path from the environment
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        yield context


def killed(forks: Any, directory: Path, *, before: int = 0, after: float = math.inf) -> bool:
    """Train in a process that is killed before a file operation or after some seconds; False if it came to its end."""
    started = forks.Event()
    child = forks.Process(target=_child, args=(str(directory), before, started))
    child.start()
    assert started.wait(60)
    child.join(None if after == math.inf else after)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return bool(child.exitcode)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], tuple[Any, dict[str, torch.Tensor]]]:
    """The files and the state of a run nobody killed."""
    directory = tmp_path_factory.mktemp("truth")
    state = train(directory).everything()
    assert sorted(os.listdir(directory)) == ["checkpoint-12", "checkpoint-9"]
    return contents(directory / "checkpoint-12"), state


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_random_moments(forks: Any, truth: Any, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    begin = time.perf_counter()
    train(tmp_path / "whole")
    whole = time.perf_counter() - begin
    kills = sum(killed(forks, tmp_path / "run", after=rng.uniform(0, whole / 2)) for _ in range(6))
    state = train(tmp_path / "run").everything()
    print(f"{kills} kills")
    assert kills
    assert contents(tmp_path / "run/checkpoint-12") == contents(tmp_path / "whole/checkpoint-12") == truth[0]
    assert same(state, truth[1])


def test_killed_before_each_file_operation(forks: Any, truth: Any, tmp_path: Path) -> None:
    """Of making a checkpoint and of removing an old one; what is left is whole, and the resumed run ends the same."""
    step_after: list[int] = []
    for number in range(1, 400):
        directory = tmp_path / str(number)
        if not killed(forks, directory, before=number):
            break
        latest = latest_checkpoint(directory)
        step_after.append(int(latest.name.partition("-")[2]) if latest else 0)
        assert same(train(directory).everything(), truth[1])
        assert contents(directory / "checkpoint-12") == truth[0]
    assert step_after == sorted(step_after)
    assert set(step_after) == {0, 3, 6, 9, 12}
    assert len(step_after) > 60


def test_a_run_and_its_resumption_in_one_process(truth: Any, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    first = Run()
    for _ in range(7):
        first.step()
    path = save_checkpoint(directory, step=7, **first.parts())
    assert path == directory / "checkpoint-7" and sorted(os.listdir(path)) == sorted(FILES)
    second = Run()
    assert load_checkpoint(path, **second.parts()) == 7
    for _ in range(7, STEPS):
        second.step()
    assert same(second.everything(), truth[1])


@pytest.mark.parametrize("average", ["diffusers", "torch"])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, average: str) -> None:
    run, other = Run(average=average), Run(average=average)
    for _ in range(3):
        run.step()
    save_checkpoint(tmp_path, step=3, **run.parts())
    base = run.module.base.weight.clone()
    assert load_checkpoint(tmp_path, **other.parts()) == 3
    assert torch.equal(other.module.base.weight, base)
    torch.manual_seed(5)  # `everything` draws; both are to draw the same
    saved = run.everything()
    load_checkpoint(tmp_path, **other.parts())
    torch.manual_seed(5)
    # python's and numpy's numbers are those of the moment of saving: one draw each
    loaded = other.everything()
    assert safetensors.torch.save(loaded[1]) == safetensors.torch.save(saved[1])


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam, torch.optim.Adagrad, torch.optim.LBFGS])
def test_any_optimizer(tmp_path: Path, make: Any) -> None:
    def new() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 3)
        return layer, make(layer.parameters(), lr=0.01, **({"momentum": 0.9} if make is torch.optim.SGD else {}))

    def steps(layer: nn.Linear, optimizer: torch.optim.Optimizer, count: int) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = layer(torch.eye(3)).square().sum()
            loss.backward()
            return loss

        for _ in range(count):
            optimizer.step(closure)  # type: ignore[arg-type]

    straight, killed_run, resumed = new(), new(), new()
    steps(*straight, 6)
    steps(*killed_run, 3)
    save_checkpoint(tmp_path, step=3, module=killed_run[0], optimizer=killed_run[1])
    load_checkpoint(tmp_path, module=resumed[0], optimizer=resumed[1])
    steps(*resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight[0].parameters(), resumed[0].parameters()))


# ------------------------------------------------------------------------------------------------------- refused


def test_every_mismatch_is_reported_and_nothing_is_changed(tmp_path: Path) -> None:
    run = Run()
    run.step()
    save_checkpoint(tmp_path, step=1, **run.parts())
    other = Run(rank=3)
    other.module.register_parameter("more", nn.Parameter(torch.zeros(2, dtype=torch.float16)))
    other.optimizer.add_param_group({"params": [other.module.more]})
    parts = other.parts() | {"scheduler": None, "extra": {"loader": Sampler()}}
    before = trees.split([part.state_dict() for part in (other.module, other.optimizer, other.ema)])
    drawn = torch.get_rng_state()
    with pytest.raises(SquareQError) as caught:
        load_checkpoint(tmp_path, **parts)
    message = str(caught.value)
    for line in (
        "parameter down.weight is float32[2, 6] in the checkpoint and float32[3, 6] here",
        "parameter up.weight is float32[6, 2] in the checkpoint and float32[6, 3] here",
        "parameter more is not in the checkpoint",
        "the optimizer has 2 parameter groups in the checkpoint and 3 here",
        "scheduler is LambdaLR in the checkpoint and absent here",
        "extra 'sampler' is Sampler in the checkpoint and absent here",
        "extra 'loader' is absent in the checkpoint and Sampler here",
        "ema shadow_params.0 is float32[2, 6] in the checkpoint and float32[3, 6] here",
    ):
        assert line in message
    assert same(trees.split([part.state_dict() for part in (other.module, other.optimizer, other.ema)]), before)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_an_extra_that_refuses_comes_before_any_change(tmp_path: Path) -> None:
    run = Run()
    run.step()
    save_checkpoint(tmp_path, step=1, **run.parts())
    other = Run(count=39)
    before = trees.split([part.state_dict() for part in (other.module, other.optimizer, other.ema)])
    with pytest.raises(SquareQError, match="the data had 40 samples and has 39"):
        load_checkpoint(tmp_path, **other.parts())
    assert same(trees.split([part.state_dict() for part in (other.module, other.optimizer, other.ema)]), before)


def test_another_order_of_parameters_and_another_dtype(tmp_path: Path) -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2).double()
    save_checkpoint(tmp_path, step=1, module=a, optimizer=torch.optim.Adam(a.parameters()))
    with pytest.raises(SquareQError, match="float32\\[2, 2\\] in the checkpoint and float64\\[2, 2\\] here"):
        load_checkpoint(tmp_path, module=b, optimizer=torch.optim.Adam(b.parameters()))
    with pytest.raises(SquareQError, match="parameter group 0: 2 parameters in the checkpoint, 2 here; their order differs"):
        load_checkpoint(tmp_path, module=a, optimizer=torch.optim.Adam([a.bias, a.weight]))
    with pytest.raises(SquareQError, match="optimizer is Adam in the checkpoint and SGD here"):
        load_checkpoint(tmp_path, module=a, optimizer=torch.optim.SGD(a.parameters()))


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(SquareQError, match="not trainable ones of the module.*number 2 of group 0"):
        stranger = nn.Parameter(torch.zeros(1))
        save_checkpoint(tmp_path, step=1, module=layer, optimizer=torch.optim.SGD([*layer.parameters(), stranger]))

    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"file": {"handle": object()}}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    optimizer = torch.optim.SGD(layer.parameters())
    with pytest.raises(SquareQError, match="/extra/odd/file/handle is a object"):
        save_checkpoint(tmp_path, step=1, module=layer, optimizer=optimizer, extra={"odd": Odd()})
    with pytest.raises(SquareQError, match="step=-1"):
        save_checkpoint(tmp_path, step=-1, module=layer, optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(SquareQError, match="cannot write the checkpoint of step 1"):
        save_checkpoint(tmp_path / "file", step=1, module=layer, optimizer=optimizer)


# -------------------------------------------------------------------------------------------------- the directory


def _save(directory: Path, *steps: int, keep: int = 3) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    for step in steps:
        save_checkpoint(directory, step=step, module=layer, optimizer=torch.optim.SGD(layer.parameters()), keep=keep)


def _load(directory: Path) -> int:
    layer = nn.Linear(2, 2)
    return load_checkpoint(directory, module=layer, optimizer=torch.optim.SGD(layer.parameters()))


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    _save(tmp_path, 0, 8, 9, 10, 100, keep=3)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-100", "checkpoint-9"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert _load(tmp_path) == 100 and _load(tmp_path / "checkpoint-9") == 9


def test_nothing_there(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-7").touch()
    (tmp_path / "checkpoint-best").mkdir()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(SquareQError, match="holds no whole checkpoint"):
        _load(tmp_path)


def test_a_later_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    for step in (4, 5):
        with pytest.raises(SquareQError, match=f"checkpoint-5 is not older than step {step}"):
            _save(tmp_path, step)
    assert os.listdir(tmp_path) == ["checkpoint-5"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["removed", "shortened", "emptied"])
def test_a_torn_checkpoint_is_passed_over_and_replaced(tmp_path: Path, name: str, how: str) -> None:
    _save(tmp_path, 1, 2, 3)
    torn = tmp_path / "checkpoint-3" / name
    content = torn.read_bytes()
    torn.unlink()
    if how != "removed":
        torn.write_bytes(content[: len(content) // 2] if how == "shortened" else b"")
    with pytest.warns(UserWarning, match="checkpoint-3 is not whole and is passed over"):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    with pytest.warns(UserWarning, match="passed over"):
        assert _load(tmp_path) == 2
    _save(tmp_path, 3)
    assert _load(tmp_path) == 3
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize("name", FILES[:2])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    _save(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SquareQError, match=f"{name} is damaged, by its checksum"):
        _load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"version": 1, "files": {}}', '{"version": 2}', "\x00"])
def test_a_state_that_is_none(tmp_path: Path, text: str) -> None:
    _save(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "state.json").write_text(text)
    with pytest.raises(SquareQError, match="cannot read checkpoint|is of version 2"):
        _load(tmp_path / "checkpoint-1")


def test_a_state_without_its_parts(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / "state.json"
    whole = json.loads(path.read_text())
    for key in ("state", "groups", "classes"):
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        with pytest.raises(SquareQError, match="is not what this package wrote"):
            _load(tmp_path)


def test_what_a_dead_run_left_is_cleared(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    for name in (".checkpoint-2.partial", ".checkpoint-0.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").touch()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    _save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2"]


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickled")

    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    run = Run()
    run.step()
    path = save_checkpoint(tmp_path, step=1, **run.parts())
    load_checkpoint(path, **run.parts())
    assert set(safetensors.torch.load_file(path / "adapters.safetensors")) == {"down.weight", "up.weight"}


# ---------------------------------------------------------------------------------------------------- nested states

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=4)
_TENSORS = st.sampled_from(["float32", "bfloat16", "int64", "uint8", "bool"]).map(
    lambda name: torch.arange(6).reshape(2, 3).t().to(getattr(torch, name))
)
_KEYS = st.text(max_size=3) | st.integers(0, 3) | st.sampled_from(["$tensor", "$tuple", "$items", "a/b"])


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, max_size=3)
    return lists | lists.map(tuple) | st.dictionaries(_KEYS, inner, max_size=3)


_TREES = st.recursive(_LEAVES | _TENSORS, _containers, max_leaves=8)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b or (a != a and b != b)


@given(_TREES)
def test_a_tree_comes_back(tree: Any) -> None:
    text, tensors = trees.split(tree)
    read = safetensors.torch.load(safetensors.torch.save(tensors))
    assert _equal(trees.join(json.loads(json.dumps(text)), read), tree)


@given(_TREES)
def test_placing_changes_no_value(tree: Any) -> None:
    assert _equal(trees.placed_as(tree, tree), tree)
    assert _equal(trees.placed_as(tree, None), tree)


# -------------------------------------------------------------------------------------------------------------- GPU


@pytest.fixture
def on_cuda(tmp_path: Path) -> Iterator[tuple[Path, Run]]:
    run = Run()
    run.module.cuda()
    run.ema.to("cuda")
    yield tmp_path, run


@pytest.mark.gpu
def test_random_numbers_and_average_of_a_gpu(on_cuda: tuple[Path, Run]) -> None:
    directory, run = on_cuda
    save_checkpoint(directory, step=1, **run.parts())
    drawn = torch.rand(5, device="cuda")
    load_checkpoint(directory, **run.parts())
    assert torch.equal(torch.rand(5, device="cuda"), drawn)
    assert all(p.is_cuda for p in run.ema.shadow_params)
    other = Run()
    with pytest.raises(SquareQError, match="were on 1 CUDA devices, each with its random state, and are on 0 here"):
        load_checkpoint(directory, **other.parts())
