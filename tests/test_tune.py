"""The tuner: what it tries, what it keeps, and who reads it. No GPU: times, and some kernels, are made up."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import fastgpt.triton_kernels
from fastgpt import GPT, GPTConfig, cli, use_backend
from fastgpt.config import UserError
from fastgpt.ops import clip_grad_norm_
from fastgpt.optim import AdamW, gradients
from fastgpt.triton_kernels import launch, tune
from fastgpt.triton_kernels.launch import (
    INTERPRETER,
    Asked,
    StoredBlocksError,
    blocks_for,
    cache_file,
    forced_blocks,
    read_blocks,
    recording,
    row_blocks,
    tuned_blocks,
    write_blocks,
)

DEFAULT = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4}
TRUTH = torch.tensor([1.0, -2.0, 3.0])
TINY = tune.Workload(2, 8, 2, 16, 20, dropout=0.2, bias=True, gelu="tanh", dtype=torch.float32)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is not there, with a cache of its own: what ``blocks_for`` looks at of a tensor on it."""

    def forget():
        launch._arch.cache_clear()
        tuned_blocks.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Imaginary (80 GB)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    forget()
    yield SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), path=cache_file("NVIDIA Imaginary (80 GB)"))
    forget()


class Fake:
    """A kernel that runs nothing: its results and its times are functions of the options it is launched with."""

    def __init__(self, ms, results=lambda blocks: TRUTH, kernel="fake", default=DEFAULT):
        self.ms, self.results, self.kernel, self.default = ms, results, kernel, default

    def job(self):
        return tune.Job(self.kernel, "any", Asked(self.default, ()), lambda device: self.launch)

    def launch(self):
        x = SimpleNamespace(is_cuda=False, device=torch.device("cpu"))
        self.launched = blocks_for(self.kernel, x, "any", lambda generation: self.default)
        return self.results(self.launched)

    def time(self):
        self.launch()
        return self.ms(self.launched)


def run_tune(path, *fakes):
    """Tune the fakes, and return what was said."""
    said = []
    tune.tune([fake.job() for fake in fakes], torch.device("cpu"), path, said.append, lambda call: call.__self__.time())
    return said


def faster(ms=0.5, **options):
    """Times: 1 ms, but ``ms`` with these options."""
    return lambda blocks: ms if {**blocks, **options} == blocks else 1.0


def test_the_fastest_candidate_is_stored_alone_and_at_once_in_use(gpu):
    assert blocks_for("fake", gpu, "any", lambda generation: DEFAULT)["BLOCK_M"] == 64
    times = {(64, 64): 0.8, (128, 32): 0.5, (32, 64): 0.7}
    fake = Fake(lambda blocks: times.get((blocks["BLOCK_M"], blocks["BLOCK_N"]), 1.0) + blocks["num_warps"] / 100)
    said = run_tune(gpu.path, fake)
    best = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 4}
    assert read_blocks(gpu.path) == {"fake": {"any": best}}
    assert said == ["fake, any: 1.04 ms, 48.1% less with BLOCK_M=128, BLOCK_N=32, num_warps=4"]
    assert blocks_for("fake", gpu, "any", lambda generation: DEFAULT) == {**best, "enable_fp_fusion": True}


@pytest.mark.parametrize("wrong", [TRUTH * 1.001, TRUTH * torch.nan, torch.zeros(3), TRUTH + torch.tensor([0, 0, 1])])
def test_a_wrong_result_is_never_chosen(tmp_path, wrong):
    times = {32: 0.1, 128: 0.5}
    fake = Fake(
        lambda blocks: times.get(blocks["BLOCK_M"], 1.0), lambda blocks: wrong if blocks["BLOCK_M"] == 32 else TRUTH
    )
    said = run_tune(tmp_path / "table.json", fake)
    assert read_blocks(tmp_path / "table.json")["fake"]["any"]["BLOCK_M"] == 128
    dropped = [line for line in said if "a wrong result with BLOCK_M=32" in line]
    assert len(dropped) == len([blocks for blocks in tune.candidates(fake.job()) if blocks["BLOCK_M"] == 32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_result_that_is_rounded_otherwise_is_right(tmp_path, dtype):
    truth = TRUTH.to(dtype)
    other = truth + truth * torch.finfo(dtype).eps
    assert not torch.equal(other, truth)
    fake = Fake(faster(BLOCK_M=32), lambda blocks: [other if blocks["BLOCK_M"] == 32 else truth, TRUTH[:0]])
    run_tune(tmp_path / "table.json", fake)
    assert read_blocks(tmp_path / "table.json")["fake"]["any"]["BLOCK_M"] == 32


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OutOfResources(300_000, 232_448, "shared memory"), "out of shared memory"),
        (CompilationError("x = 1", SimpleNamespace(), "a side must be 16"), "a side must be 16"),
        (RuntimeError("PassManager::run failed"), "the compiler failed"),
    ],
)
def test_a_candidate_that_does_not_run_is_skipped_with_its_reason(tmp_path, error, reason):
    def results(blocks):
        if blocks["BLOCK_M"] == 128:
            raise error
        return TRUTH

    times = {128: 0.1, 32: 0.5}
    fake = Fake(lambda blocks: times.get(blocks["BLOCK_M"], 1.0), results)
    (line,) = run_tune(tmp_path / "table.json", fake)
    tried = tune.candidates(fake.job())
    count = len([blocks for blocks in tried if blocks["BLOCK_M"] == 128])
    assert f"({count} of {len(tried)} candidates did not run: {reason}: {count})" in line
    assert read_blocks(tmp_path / "table.json")["fake"]["any"]["BLOCK_M"] == 32


def test_an_error_that_is_not_the_compilers_is_seen(tmp_path):
    def results(blocks):
        if blocks["BLOCK_M"] == 128:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return TRUTH

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_tune(tmp_path / "table.json", Fake(faster(), results))


def test_a_default_that_does_not_run_leaves_its_kernel_alone(tmp_path):
    def results(blocks):
        raise OutOfResources(2, 1, "shared memory")

    path = tmp_path / "table.json"
    write_blocks(path, {"fake": {"any": DEFAULT}})
    said = run_tune(path, Fake(faster(), results), Fake(faster(BLOCK_M=32), kernel="other"))
    assert said[0] == "fake, any: left alone, for its default does not run: out of shared memory"
    assert read_blocks(path)["fake"] == {"any": DEFAULT}
    assert read_blocks(path)["other"]["any"]["BLOCK_M"] == 32


@pytest.mark.parametrize(("ms", "stored"), [(0.985, False), (0.975, True)])
def test_a_gain_of_less_than_two_percent_is_not_stored(tmp_path, ms, stored):
    (line,) = run_tune(tmp_path / "table.json", Fake(faster(ms, BLOCK_M=32, BLOCK_N=32, num_warps=4)))
    assert bool(read_blocks(tmp_path / "table.json")) == stored
    assert ("the default stays" in line) != stored


def test_a_lucky_time_is_not_stored(tmp_path):
    """The first time of the candidate is that of an idle GPU; measured again, in turns, it is no faster."""
    turns = []

    def ms(blocks):
        turns.append(blocks["BLOCK_M"])
        return 0.5 if blocks["BLOCK_M"] == 32 and turns.count(32) == 1 else 1.0

    run_tune(tmp_path / "table.json", Fake(ms, default={"BLOCK_M": 64, "num_warps": 4}))
    assert read_blocks(tmp_path / "table.json") == {}
    assert turns[-2 * tune.ROUNDS :] == [64, 32] * tune.ROUNDS


def test_an_interrupted_run_keeps_the_kernels_it_has_done(tmp_path):
    def interrupt(blocks):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tune(tmp_path / "table.json", Fake(faster(BLOCK_M=32), kernel="first"), Fake(interrupt, kernel="second"))
    assert read_blocks(tmp_path / "table.json").keys() == {"first"}
    assert launch._forced == {}
    assert launch._recording is None


def test_what_is_stored_is_merged_into_what_the_file_held(tmp_path):
    path = tmp_path / "table.json"
    kept = {"BLOCK_M": 8, "BLOCK_N": 8, "num_warps": 1}
    write_blocks(
        path,
        {
            "another": {"any": kept},
            "fake": {"N=64": kept, "any": kept, "of an older fastgpt": {"BLOCK": 8, "num_warps": 1}},
            "no longer faster": {"any": kept},
        },
    )
    run_tune(path, Fake(faster(BLOCK_M=32)), Fake(faster(), kernel="no longer faster"))
    table = read_blocks(path)
    assert table.keys() == {"another", "fake"}
    assert table["another"] == {"any": kept}
    assert table["fake"].keys() == {"N=64", "any"}
    assert table["fake"]["N=64"] == kept
    assert table["fake"]["any"]["BLOCK_M"] == 32


def test_what_another_process_stored_meanwhile_stays(tmp_path):
    path = tmp_path / "table.json"

    def ms(blocks):
        write_blocks(path, {"another": {"any": DEFAULT}})
        return faster(BLOCK_M=32)(blocks)

    run_tune(path, Fake(ms))
    assert read_blocks(path).keys() == {"another", "fake"}


def test_what_was_stored_before_plays_no_part_in_the_measuring(gpu):
    """Not even where a kernel that the same call launches could not take it."""
    write_blocks(gpu.path, {"fake": {"any": {**DEFAULT, "BLOCK_M": 128}}, "another": {"any": {"BLOCK": 8}}})
    seen = []

    def results(blocks):
        seen.append(blocks["BLOCK_M"])
        blocks_for("another", gpu, "any", lambda generation: {"BLOCK_M": generation})
        return TRUTH

    fake = Fake(faster(BLOCK_M=32), results)
    tune.tune([fake.job()], gpu.device, gpu.path, lambda line: None, lambda call: fake.time())
    assert seen[0] == 64
    assert read_blocks(gpu.path)["fake"]["any"]["BLOCK_M"] == 32


def test_a_damaged_table_begins_anew(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("{")
    said = run_tune(path, Fake(faster(BLOCK_M=32)))
    assert said[0] == f"{path} was damaged and begins anew"
    assert len(said) == 2
    assert read_blocks(path).keys() == {"fake"}


def test_a_place_that_cannot_be_written_is_known_before_anything_is_measured(tmp_path):
    def never(blocks):
        raise AssertionError("measured")

    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run_tune(tmp_path / "file" / "table.json", Fake(never))


# ---------------------------------------------------------------------------------------------------------------------
# The lookup and the file
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_forced_goes_before_what_is_stored_and_that_before_the_default(gpu):
    def m(shape_class="any"):
        return blocks_for("fake", gpu, shape_class, lambda generation: {**DEFAULT, "BLOCK_M": generation})["BLOCK_M"]

    assert m() == 90
    write_blocks(gpu.path, {"fake": {"any": DEFAULT}})
    assert m() == 90  # it is read once
    tuned_blocks.cache_clear()
    assert m() == 64
    assert m("N=128") == 90
    with forced_blocks("fake", {"BLOCK_M": 16}):
        assert m() == 16
        with recording(80) as asked:
            assert m() == 16
    assert asked == {("fake", "any"): Asked({**DEFAULT, "BLOCK_M": 80}, ())}
    with recording(80):
        assert m() == 80
    assert m() == 64


def test_tensors_on_a_cpu_read_no_table(gpu):
    write_blocks(gpu.path, {"fake": {"any": DEFAULT}})
    with recording(90):
        pass
    x = SimpleNamespace(is_cuda=False, device=torch.device("cpu"))
    blocks = blocks_for("fake", x, "any", lambda generation: {"BLOCK_M": 1})
    assert blocks == {"BLOCK_M": 1, "enable_fp_fusion": True}


def test_stored_options_that_a_kernel_does_not_take_are_one_sentence(gpu):
    write_blocks(gpu.path, {"fake": {"any": {"BLOCK": 64, "num_warps": 4}}})
    with pytest.raises(RuntimeError) as error:
        blocks_for("fake", gpu, "any", lambda generation: DEFAULT)
    assert str(gpu.path) in str(error.value)
    assert "holds BLOCK=64, num_warps=4 for fake, which takes options like BLOCK_M=64, BLOCK_N=32" in str(error.value)
    assert "remove it, or run `fastgpt tune` again" in str(error.value)
    assert isinstance(error.value, UserError)  # which the command line prints as one line


def test_a_stored_width_that_is_not_the_rows_is_refused(gpu):
    """It would leave out columns, without a word."""
    rows = SimpleNamespace(**vars(gpu), shape=(4, 1000), element_size=lambda: 2)
    blocks = {"BLOCK_M": 2, "BLOCK_N": 1024, "num_warps": 8}
    write_blocks(gpu.path, {"fake": {"N=1024 2 bytes": blocks}})
    assert row_blocks("fake", rows, longest=8192)["BLOCK_M"] == 2
    write_blocks(gpu.path, {"fake": {"N=1024 2 bytes": {**blocks, "BLOCK_N": 512}}})
    tuned_blocks.cache_clear()
    with pytest.raises(StoredBlocksError, match="BLOCK_N=512"):
        row_blocks("fake", rows, longest=8192)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"[1]", b'{"a": 1}', b'{"a": {"b": 1}}', b'{"a": {"b": {"BLOCK_M": "64"}}}', b"\xff",
     b'{"a": {"b": {"BLOCK_M": 0}}}', b'{"a": {"b": {"BLOCK_M": 64.0}}}', b'{"a": {"b": {"BLOCK_M": 64'],
)  # fmt: skip
def test_a_file_that_holds_no_table_is_one_sentence(gpu, content):
    gpu.path.parent.mkdir()
    gpu.path.write_bytes(content)
    with pytest.raises(StoredBlocksError, match=r"is not a table that `fastgpt tune` wrote .*: remove it, or run") as e:
        blocks_for("fake", gpu, "any", lambda generation: DEFAULT)
    assert str(gpu.path) in str(e.value)
    assert "\n" not in str(e.value)


def test_the_file_lies_in_the_users_cache_by_gpu_and_triton(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = cache_file("NVIDIA Imaginary (80 GB)")
    assert path.parent == tmp_path / "xdg" / "fastgpt"
    assert re.fullmatch(r"blocks_NVIDIA-Imaginary-80-GB_triton-\d+\.\d+\.\d+.*\.json", path.name)
    assert cache_file("NVIDIA Another") != path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_file("NVIDIA Another").parent == tmp_path / "home" / ".cache" / "fastgpt"


def test_writing_leaves_the_old_table_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    write_blocks(path, {"fake": {"any": DEFAULT}})
    before = path.read_bytes()

    def interrupt(old, new):
        assert json.loads(Path(old).read_bytes())  # whole, before it takes the other's place
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_blocks(path, {"fake": {"any": {**DEFAULT, "BLOCK_M": 1}}})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------------
# The kernels that there are
# ---------------------------------------------------------------------------------------------------------------------


def kernels_of_the_launch_code():
    found = set()
    for path in Path(fastgpt.triton_kernels.__file__).parent.glob("*.py"):
        found |= set(re.findall(r'\b_?(?:row_|tile_)?blocks(?:_for)?\(\s*"(\w+)"', path.read_text()))
    return found


def test_there_is_a_job_for_every_kernel():
    kernels = kernels_of_the_launch_code()
    assert {"attention_bwd_dq", "attention_bwd_delta", "cross_entropy_fwd", "softmax_bwd", "dropout"} <= kernels
    assert {job.kernel for job in tune.jobs(TINY, 90)} == kernels


def test_a_dry_run_launches_nothing_and_leaves_no_trace(monkeypatch):
    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", None)
    monkeypatch.setattr("triton.runtime.interpreter.InterpretedFunction.run", None)
    assert tune.jobs(TINY, 90)
    assert launch._recording is None
    with pytest.raises(TypeError):  # outside, kernels are launched again
        tune.column_sum(torch.zeros(1, 2, 4, device=DEVICE), torch.float32)


@pytest.mark.parametrize("generation", [INTERPRETER, 80, 86, 90, 100])
def test_candidates_keep_what_the_kernels_ask_for(generation):
    for dtype, dropout, n_head, n_embd in itertools.product(
        (torch.bfloat16, torch.float32), (0.0, 0.2), (1, 4), (8, 96, 1024)
    ):
        workload = tune.Workload(1, 64, n_head, n_embd, 50304, dropout, True, "tanh", dtype)
        if n_embd // n_head > 256:
            continue
        for job in tune.jobs(workload, generation):
            tried = tune.candidates(job)
            default = job.asked.default
            assert 4 <= len(tried) <= 60, job
            assert default not in tried
            assert len({tuple(blocks.items()) for blocks in tried}) == len(tried)
            for blocks in tried:
                assert blocks.keys() == default.keys()
                assert 1 <= blocks["num_warps"] <= 32
                assert 1 <= blocks.get("num_stages", 1) <= 4
                assert all(blocks[name] == default[name] for name in job.asked.fixed)
                for name in blocks:
                    if name.startswith("BLOCK"):
                        assert blocks[name] in (default[name] // 2, default[name], default[name] * 2)
                        assert blocks[name] & (blocks[name] - 1) == 0
                        assert blocks[name] >= 1
                assert blocks.get("BLOCK_N", 4) % 4 == 0
                if job.kernel.startswith("attention"):
                    assert min(blocks["BLOCK_M"], blocks.get("BLOCK_N", 16)) >= 16


@pytest.mark.parametrize(
    ("kernel", "default", "tried"),
    [
        ("fake", {"BLOCK": 256, "num_warps": 1}, {"BLOCK": {128, 256, 512}, "num_warps": {1, 2}}),
        ("fake", {"BLOCK": 256, "num_warps": 32}, {"BLOCK": {128, 256, 512}, "num_warps": {16, 32}}),
        ("fake", {"BLOCK_M": 1, "BLOCK_N": 4, "num_warps": 4}, {"BLOCK_M": {1, 2}, "BLOCK_N": {4, 8}}),
        ("fake", {"BLOCK_M": 2, "BLOCK_N": 8, "num_warps": 4}, {"BLOCK_M": {1, 2, 4}, "BLOCK_N": {4, 8, 16}}),
        ("attention_fwd", {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4}, {"BLOCK_M": {16, 32}}),
        ("fake", {"BLOCK": 256, "num_warps": 4, "num_stages": 1}, {"num_stages": {1, 2}}),
        ("fake", {"BLOCK": 256, "num_warps": 4, "num_stages": 4}, {"num_stages": {3, 4}}),
        ("fake", {"HELD": 256, "BLOCK": 256, "num_warps": 4}, {"HELD": {256}}),
    ],
)
def test_candidates_stay_within_bounds(kernel, default, tried):
    found = tune.candidates(tune.Job(kernel, "any", Asked(default, ()), lambda device: lambda: None))
    for name, values in tried.items():
        assert {blocks[name] for blocks in found} == values


def test_a_warp_gets_at_most_twice_its_share():
    default = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4}
    tried = tune.candidates(tune.Job("attention_fwd", "any", Asked(default, ()), lambda device: lambda: None))
    shapes = {tuple(blocks.values()) for blocks in tried}
    assert {(128, 128, 8), (128, 128, 4), (64, 64, 4), (64, 128, 4)} <= shapes
    assert not {(256, 128, 4), (256, 32, 2), (64, 32, 8)} & shapes


def test_a_call_has_as_much_to_do_when_it_is_repeated():
    def call(kernel):
        (job,) = [job for job in tune.jobs(TINY, 90) if job.kernel == kernel]
        return job.make(DEVICE)

    scale = call("scale_gradient")
    first = scale().clone()
    assert first.any()
    assert torch.equal(scale(), -first)
    norm, *grads = call("clip_grad_norm")()
    assert norm > 0
    assert len(grads) > 1
    assert not any(grad.any() for grad in grads)  # and the norm of 0 is scaled again, by 0
    adamw = call("adamw")
    first = [x.clone() for x in adamw()]
    assert not any(torch.equal(x, y) for x, y in zip(adamw(), first, strict=True))


def test_inputs_do_not_grow_with_the_batch_beyond_reason():
    workload = dataclasses.replace(TINY, batch_size=10**6, block_size=1024, n_embd=1600, vocab_size=50304)
    assert tune._tokens(workload, 1600) * 1600 <= tune.MOST_ELEMENTS
    assert tune._heads(workload) * 1024**2 <= tune.MOST_ELEMENTS
    assert tune._tokens(TINY, 16) == 16


def test_column_sum_is_timed_alone():
    (job,) = [job for job in tune.jobs(TINY, 90) if job.kernel == "column_sum"]
    with recording(launch.generation(DEVICE)) as asked:
        job.make(DEVICE)()
    assert asked.keys() == {("column_sum", "any")}


def test_the_workloads_options_are_those_of_the_calls():
    def results(kernel, **options):
        workload = dataclasses.replace(TINY, **options)
        (job,) = [job for job in tune.jobs(workload, 90) if job.kernel == kernel]
        return job.make(DEVICE)()

    assert results("gelu_bwd", bias=True)[1].shape == (64,)
    assert results("gelu_bwd", bias=False)[1].shape == (0,)
    assert not torch.equal(results("gelu_fwd", gelu="tanh"), results("gelu_fwd", gelu="none"))
    for kernel in ("attention_fwd", "add_layer_norm_fwd"):
        assert not torch.allclose(results(kernel, dropout=0.2)[0], results(kernel, dropout=0.0)[0])


def test_a_row_kernel_keeps_the_width_of_its_rows():
    fixed = {job.kernel for job in tune.jobs(TINY, 90) if "BLOCK_N" in job.asked.fixed}
    assert {"softmax_fwd", "softmax_bwd", "layer_norm_fwd", "layer_norm_bwd", "add_layer_norm_fwd"} <= fixed
    assert not {"gelu_fwd", "column_sum", "attention_fwd"} & fixed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["fused", "unfused"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_training_step_asks_for_nothing_that_is_not_tuned(dtype, attention, dropout):
    """Launching nothing: what is computed is what memory held, but the launches are all there."""
    config = GPTConfig(
        block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=32, dropout=dropout, attention=attention
    )
    with recording(90) as asked, tune._launching_nothing(), use_backend("triton"):
        model = GPT(config).to(DEVICE)
        tokens = torch.randint(50, (2, 8), device=DEVICE)
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(tokens, tokens)[1]
        loss.backward()
        clip_grad_norm_(gradients(model), 1.0)
        AdamW(model.parameters()).step()
    workload = tune.Workload(2, 8, 2, 32, 50, dropout, config.bias, config.gelu, dtype)
    jobs = {(job.kernel, job.shape_class): job.asked for job in tune.jobs(workload, 90)}
    assert len(asked) >= 12
    assert asked.keys() - jobs.keys() == set()
    assert all(asked[key] == jobs[key] for key in asked)


@pytest.mark.parametrize(
    "kernel",
    ["column_sum", "layer_norm_bwd", "add_layer_norm_bwd", "gelu_bwd", "scale_gradient", "adamw", "clip_grad_norm"],
)
def test_real_candidates_are_found_right(kernel):
    """Also where the call works in place: the inputs of each candidate are the same, fresh ones."""
    generation = launch.generation(DEVICE)
    (job,) = [job for job in tune.jobs(TINY, generation) if job.kernel == kernel]
    tried = []

    def timer(call):
        call()
        tried.append(launch._forced[kernel])
        return float(len(tried))

    said = []
    with recording(generation):
        result = tune.search(job, DEVICE, said.append, timer)
    assert tried == [job.asked.default, *tune.candidates(job)]
    assert said == []
    assert result.blocks is None
    assert not result.skipped


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capfd):
    """`fastgpt tune` in this process: (exit code, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["fastgpt", "tune", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capfd.readouterr())

    return run


def test_a_dry_run_lists_every_kernel_without_a_gpu(command):
    code, out, _ = command("--dry-run", "--device=cpu", "--preset=gpt2", "--batch-size=16", "--n-head=6")
    assert code == 0
    rows = dict(re.findall(r"^\W+(\w+) +│ (.*?) +│ +\d+ +│$", out, re.MULTILINE))
    assert rows.keys() == kernels_of_the_launch_code()
    assert rows["attention_fwd"] == "D=128 2 bytes"
    assert rows["layer_norm_fwd"] == "N=1024 4 bytes"
    assert "compute capability 9.0" in out


def test_a_dry_run_takes_a_toml_file_and_single_kernels(command, tmp_path):
    (tmp_path / "small.toml").write_text('preset = "gpt2"\nlr = 1e-3\n[model]\nn_embd = 96\nn_head = 3\n')
    code, out, _ = command(
        f"--config={tmp_path}/small.toml", "--dry-run", "--device=cpu", "--dtype=fp32", "--only=softmax_fwd",
        "--only=attention_fwd", "--n-head=1",
    )  # fmt: skip
    assert code == 0
    rows = re.findall(r"^\W+(\w+) +│ (.*?) +│ +\d+ +│$", out, re.MULTILINE)
    assert rows == [("attention_fwd", "D=128 4 bytes"), ("softmax_fwd", "N=1024 4 bytes")]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--device=cpu"], "there is no GPU to measure on (device cpu); --dry-run lists what would be measured"),
        (["--preset=bigram"], "tune takes the shape of a GPT, which the preset 'bigram' is not"),
        (["--preset=gpt5"], "'gpt5' is not one of"),
        (["--n-head=7"], "n_embd must be a multiple of n_head"),
        (["--dry-run", "--device=cpu", "--only=softmax"], "--only: there is no kernel 'softmax'; the kernels are "),
    ],
)
def test_a_users_error_is_one_line(command, args, sentence):
    code, out, err = command(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fastgpt: ")
    assert sentence in err


def test_the_interpreter_is_not_measured(command, monkeypatch, gpu):
    monkeypatch.setattr(cli, "pick_device", lambda name: gpu.device)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, _, err = command()
    assert code == 2
    assert err == "fastgpt: Triton's kernels cannot be measured: TRITON_INTERPRET is set\n"


def test_the_command_tunes_the_gpu_and_names_the_file(command, monkeypatch, gpu):
    monkeypatch.setattr(cli, "pick_device", lambda name: gpu.device)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    given = []

    def stand_in(todo, device, path, say):
        given.append(([job.kernel for job in todo], device, path))
        say("a line")

    monkeypatch.setattr(tune, "tune", stand_in)
    code, out, _ = command("--only=adamw")
    assert code == 0
    assert given == [(["adamw"], gpu.device, gpu.path)]
    assert out == f"a line\nstored in {gpu.path}\n"
