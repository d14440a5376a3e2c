"""Memory that runs out: one line, with what would fit."""

from functools import partial

import pytest
import torch
from test_resume import UPDATES, command

from diffrl import memory
from diffrl.benchmarks.soak import numbers
from diffrl.cli import main
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.errors import DiffRLError
from diffrl.restore import settings_of


@pytest.fixture
def words(tiny_path, empty_cache):
    return partial(command, tiny_path)


class TestOutOfMemory:
    CPU = RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 B"
    )

    @pytest.fixture(params=[CPU, torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=type)
    def only_two(self, request, monkeypatch):
        """Return a function after which the machine holds two pictures at a time and no more."""
        reset = DenoisingVectorEnv.reset

        def limited(env, **kwargs):
            if env.num_envs > 2:
                raise request.param
            return reset(env, **kwargs)

        return lambda: monkeypatch.setattr(DenoisingVectorEnv, "reset", limited)

    def line(self, capsys, command):
        capsys.readouterr()
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    def test_training_says_what_would_fit_and_goes_on_so(self, words, tmp_path, only_two, capsys):
        only_two()
        line = self.line(capsys, words("reward_backprop", tmp_path, "eval_batch=2"))
        assert "algo.micro_batch_size=4: out of memory." in line
        command = line.partition("diffrl train ")[2].split()
        assert command == ["--resume", str(tmp_path / "run"), "algo.micro_batch_size=2"]
        assert main(["train", *command]) == 0
        assert settings_of(tmp_path / "run").algo.micro_batch_size == 2
        assert numbers(tmp_path / "run")[-1]["update"] == UPDATES

    def test_training_in_groups_says_that_one_of_them_is_the_least(self, words, tmp_path, only_two, capsys):
        only_two()
        line = self.line(capsys, words("ddpo", tmp_path, "eval_batch=2", "algo.group_size=4"))
        assert "algo.micro_batch_size=4: out of memory." in line
        assert "A group of 4 pictures at a time is the least" in line

    def test_drawing_the_data_set_and_evaluating_say_what_would_fit(
        self, words, tmp_path, only_two, capsys
    ):
        small = ["algo.micro_batch_size=2", "eval_batch=4", "eval_pictures=4", "algo.updates=1"]
        assert main(words("reward_backprop", tmp_path / "large", *small)) == 0
        only_two()
        line = self.line(capsys, words("reward_backprop", tmp_path, *small))
        assert "eval_batch=4: out of memory." in line
        assert line.endswith(f"diffrl train --resume {tmp_path / 'run'} eval_batch=2")
        line = self.line(capsys, words("reward_backprop", tmp_path, *small, "seed=1", "name=other"))
        assert "eval_batch=4: out of memory." in line
        assert line.endswith("Take fewer at a time: eval_batch=2")

    def test_eval_and_sample_say_what_would_fit(self, words, tmp_path, only_two, capsys):
        small = ["algo.micro_batch_size=2", "eval_batch=4", "eval_pictures=4", "algo.updates=1"]
        assert main(words("reward_backprop", tmp_path, *small)) == 0
        only_two()
        run = str(tmp_path / "run")
        line = self.line(capsys, ["eval", run, "-n", "4"])
        assert line.endswith("Take fewer at a time: eval_batch=2")
        line = self.line(capsys, ["sample", run, "--prompt", "cat", "-n", "4"])
        assert line.endswith("Take fewer at a time: -n=2")
        assert main(["sample", run, "--prompt", "cat", "-n=2"]) == 0


def test_the_next_smaller_micro_batch_divides_the_batch(tmp_path):
    for value, of, less in ((6, 6, 3), (9, 9, 3), (5, 5, 1), (4, 12, 2), (7, 0, 3)):
        with pytest.raises(DiffRLError, match=f"name={less}$"), memory.told("name", value, tmp_path, of=of):
            raise MemoryError


def test_the_next_smaller_micro_batch_holds_whole_groups(tmp_path):
    for value, of, group, less in ((16, 48, 4, 8), (12, 24, 4, 4), (12, 24, 6, 6)):
        with (
            pytest.raises(DiffRLError, match=f"name={less}$"),
            memory.told("name", value, tmp_path, of=of, group=group),
        ):
            raise MemoryError
    with (
        pytest.raises(DiffRLError, match=r"A group of 8 pictures at a time is the least\. What else"),
        memory.told("name", 8, tmp_path, of=64, group=8),
    ):
        raise MemoryError


def test_with_one_picture_at_a_time_it_says_what_else_there_is(tmp_path):
    with pytest.raises(DiffRLError, match=r"env.precision=bf16"), memory.told("name", 1, tmp_path):
        raise MemoryError


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried",
    ],
)
def test_what_cuda_and_its_libraries_say_of_memory_is_understood(text, tmp_path):
    """PyTorch has a class of its own for its caching allocator's error alone."""
    with pytest.raises(DiffRLError) as told, memory.told("name", 4, tmp_path):
        raise RuntimeError(text)
    fix = f"Go on with fewer at a time: diffrl train --resume {tmp_path} name=2"
    assert str(told.value) == f"name=4: out of memory. {text.splitlines()[0]}. {fix}"


def test_another_error_is_left_alone(tmp_path):
    with pytest.raises(RuntimeError, match="shapes differ"), memory.told("name", 4, tmp_path):
        raise RuntimeError("shapes differ")
