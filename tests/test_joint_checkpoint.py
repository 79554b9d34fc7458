"""A checkpoint of a sharded model, in a process group of this process alone: all of the machinery runs, in a second."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from fastgpt import GPT, GPTConfig, checkpoint
from fastgpt.checkpoint import (
    CheckpointWriter,
    Making,
    RunState,
    bare_model,
    checkpoint_names,
    draw_weights,
    find_checkpoint,
    load_model,
    load_training,
    load_weights,
    write_config,
)
from fastgpt.config import TrainConfig, TrainingError
from fastgpt.distributed import World, is_sharded
from fastgpt.files import sync
from fastgpt.optim import build_optimizer
from fastgpt.tokenizer import CharTokenizer

CONFIG = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8)


@pytest.fixture
def run(tmp_path):
    write_config(tmp_path, CONFIG, TrainConfig(), CharTokenizer("abcde"), {"fastgpt": "0"})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield tmp_path
    dist.destroy_process_group()


def sharded() -> GPT:
    model = bare_model(CONFIG, "meta")
    World().shard(model, torch.device("cpu"))
    return model.to_empty(device="cpu")


def stepped():
    model = sharded()
    draw_weights(model)
    optimizer = build_optimizer(model, TrainConfig())
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))[1].backward()
    optimizer.step()
    return model, optimizer


def save(run: Path, model, optimizer, step: int = 1) -> None:
    with CheckpointWriter(run, keep=1) as writer:
        writer.save(RunState(step=step), model, optimizer, best=True)


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor() if is_sharded(model) else p for name, p in model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_a_sharded_model_is_drawn_as_a_whole_one_is(run):
    model = sharded()
    torch.manual_seed(3)
    draw_weights(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.manual_seed(3)
    assert_equal(parameters(model), parameters(GPT(CONFIG)))


def test_it_is_read_whole_and_sharded_and_by_pytorch(run):
    model, optimizer = stepped()
    wanted = parameters(model)
    save(run, model, optimizer)
    assert_equal(parameters(load_model(run)[0]), wanted)
    again = sharded()
    load_weights(find_checkpoint(run), again)
    assert_equal(parameters(again), wanted)
    loaded = build_optimizer(again, TrainConfig())
    load_training(find_checkpoint(run), again, loaded)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][moment].to_local(), loaded.state[q][moment].to_local())
            assert loaded.state[q][moment].placements == p.placements
    found = {name: torch.empty_like(p) for name, p in wanted.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(find_checkpoint(run))))
    assert_equal(found, wanted)


def test_training_may_change_what_is_being_written(run, monkeypatch):
    model, optimizer = stepped()
    wanted = {name: p.clone() for name, p in parameters(model).items()}
    real = Making.check

    def check(making):
        real(making)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()

    monkeypatch.setattr(Making, "check", check)
    save(run, model, optimizer)
    assert_equal(parameters(load_model(run)[0]), wanted)


def test_a_checkpoint_that_nobody_could_go_on_from_is_not_written(run):
    model, optimizer = stepped()
    save(run, model, optimizer)
    optimizer.state[model.transformer.wpe.weight]["exp_avg"].to_local()[0, 0] = float("nan")
    with pytest.raises(
        TrainingError, match=r"wpe.weight became NaN or infinite by step 2, .*; step-00000001 stands in"
    ):
        save(run, model, optimizer, step=2)
    assert checkpoint_names(run) == ["step-00000001"]


@pytest.mark.parametrize("last_call", [2, 5])  # while a part is written, and in the main process's finish
def test_a_disk_without_room_leaves_the_checkpoint_before(run, monkeypatch, last_call):
    model, optimizer = stepped()
    save(run, model, optimizer)
    left = iter(range(last_call - 1))

    def full(path):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(checkpoint, "sync", full)
    sentence = r"the checkpoint of step 2 could not be written \(.*No space left.*\), .*; step-00000001 stands in"
    with pytest.raises(TrainingError, match=sentence):
        save(run, model, optimizer, step=2)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_checkpoint_that_stands_is_left_alone(run):
    model, optimizer = stepped()
    save(run, model, optimizer)
    content = (find_checkpoint(run) / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    save(run, model, optimizer)
    assert (find_checkpoint(run) / "model.safetensors").read_bytes() == content
