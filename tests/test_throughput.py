"""A cost must be that of the work it names."""

import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_saving import make

from diffrl.benchmarks import cost, throughput
from diffrl.benchmarks.throughput import ROWS, Cell
from diffrl.rollout import rollout


class TestCost:
    def measure(self, row, tiny_path, rounds=1):
        return cost.measure(row, throughput.settings(Cell(row, 2, 2), [f"env.model={tiny_path}"]), rounds)

    def test_a_matrix_product_and_its_backward_pass_are_counted_by_hand(self):
        a, b = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
        assert cost.count_flops(lambda: (a @ b).sum().backward()) == 2 * (2 * 3 * 4 * 5)

    def test_attention_is_counted(self):
        """Two products of 6 x 6 x 8 for each of 2 heads of 1 sample, and five in the backward pass."""
        q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
        attend = torch.nn.functional.scaled_dot_product_attention
        assert cost.count_flops(lambda: attend(q, k, v)) == 2 * 2 * (2 * 6 * 6 * 8)
        assert cost.count_flops(lambda: attend(q, k, v).sum().backward()) == 7 * 2 * (2 * 6 * 6 * 8)

    def test_counting_frees_what_checkpointing_frees(self, tiny):
        """The module tracker of PyTorch's counter keeps what is recomputed: memory would grow with T."""
        policy, env = make(tiny)
        seen = []
        for module in policy.unet.modules():
            module.register_forward_pre_hook(
                lambda _, inputs: seen.extend(weakref.ref(x) for x in inputs if isinstance(x, torch.Tensor))
            )
        alive = []

        def update():
            trajectory = rollout(env, policy, torch.Generator().manual_seed(0), grad_steps=4, seed=7)
            trajectory.reward.sum().backward()
            alive.extend(tensor for tensor in seen if tensor() is not None)

        cost.count_flops(update)
        assert len(seen) > 4 * 2  # four steps, forward and again
        assert not alive

    def test_nothing_runs_compiled_while_flops_are_counted(self, tiny):
        policy, env = make(tiny)
        compiled = []
        policy.unet.compile(backend=lambda graph, _: compiled.append(1) or graph.forward)

        def draw():
            rollout(env, policy, torch.Generator().manual_seed(0), seed=7)

        counted = cost.count_flops(draw)
        assert counted > 0
        assert not compiled
        draw()
        assert compiled

    def test_a_gpu_is_held_against_its_peak_in_bf16_whatever_the_row_s_precision(self):
        gpu, cpu = torch.device("cuda:1"), torch.device("cpu")
        assert [cost.peak_dtype(gpu, name) for name in ("fp32", "bf16")] == [torch.bfloat16] * 2
        assert cost.peak_dtype(cpu, "fp32") == torch.float32

    def test_calls_and_flops_are_those_of_the_work(self, tiny_path, monkeypatch):
        """T=2 and both halves of guidance: 4 calls a picture, and as many again of the reference."""
        monkeypatch.setattr(cost, "matmul_flops", lambda device, dtype: 1e9)
        sampling = self.measure("sampling", tiny_path)
        assert sampling["network_calls"] == 4
        assert "kept_steps" not in sampling
        full = self.measure("ctrl, full", tiny_path, rounds=2)
        assert (full["network_calls"], full["kept_steps"], len(full["seconds"])) == (8, 2, 1)
        assert 0 < full["held_gb"] <= full["peak_gb"]
        plain = self.measure("plain ctrl, full", tiny_path)
        assert plain["network_calls"] == 8
        # the same work, but for the decoder, whose activations ours computes twice
        assert 1.0 < full["flops"] / plain["flops"] < 1.5


class TestTable:
    def record(self, row, micro_batch=2, seconds=1.0, **more):
        known = {"row": row, "steps": 3, "micro_batch": micro_batch, "seconds": [seconds], "peak_gb": 6.0}
        known |= {"held_gb": 2.0, "network_calls": 6.0, "flops": 1e9, "matmul_flops": 8e9}
        rate = micro_batch / seconds
        return known | {"pictures_per_second": rate, "flops_per_second": rate * 1e9} | more

    def test_ratios_and_shares_by_hand(self):
        """2 pictures in 1 s against 2 in 4 s; 2 GFLOP/s of the 10 that one of the two measured."""
        plain = self.record("plain ctrl, full", seconds=4.0, peak_gb=8.0, matmul_flops=10e9)
        other = self.record("plain ctrl, full", micro_batch=1)
        mine = throughput.compared([self.record("ctrl, full"), plain, other])[0]
        assert mine["faster than plain ctrl, full"] == 4.0
        assert mine["memory of plain ctrl, full"] == 0.75
        assert mine["share_of_peak"] == 0.2

    def test_ctrl_s_default_is_held_against_the_published_update_as_a_plain_loop(self, capsys):
        """4 pictures a second against 1 in bf16 and .5 in fp32; named as another update than its own."""
        names = ("plain ctrl, truncated", "plain ctrl, truncated, tf32")
        plain = [self.record(name, seconds=s) for name, s in zip(names, (2.0, 4.0), strict=True)]
        same = self.record("ctrl, truncated")
        records = throughput.compared([self.record("ctrl", seconds=0.5), same, *plain])
        assert [records[0][f"faster than {name}"] for name in names] == [4.0, 8.0]
        throughput.show(records, {})
        said = " ".join(capsys.readouterr().out.split())
        other = "by another update, our default against the published one"
        assert f"ctrl: 4.00 x the pictures a second of {names[0]!r}, 1.00 x its memory, {other}" in said
        assert f"ctrl: 8.00 x the pictures a second of {names[1]!r}, 1.00 x its memory, {other}" in said
        assert said.count(other) == 2  # not of the row that takes the same one

    def test_algo_words_reach_the_rows_of_the_chosen_algorithm_alone(self):
        words = ["algo=ddpo", "algo.inner_epochs=3", "env.eta=0.5"]
        assert "algo.inner_epochs=3" in throughput.settings(Cell("ddpo", 3, 2), words)
        for row in ROWS.keys() - {"ddpo"}:
            chosen = throughput.settings(Cell(row, 3, 2), words)
            assert "algo.inner_epochs=3" not in chosen
            assert "env.eta=0.5" in chosen
        plain = throughput.settings(Cell("plain ctrl, truncated", 3, 2), ["algo.gamma=7"])
        assert "algo.gamma=7" in plain
        assert "algo.truncation.high=3" in plain

    def test_the_plain_tf32_row_stays_so(self):
        chosen = throughput.settings(Cell("plain ctrl, truncated, tf32", 3, 2), ["env.precision=bf16"])
        assert "env.precision=tf32" in chosen
        assert "env.precision=bf16" not in chosen


class TestCommand:
    def stub(self, monkeypatch, answer):
        """Answer for each measurement's process; return what was asked of them."""
        asked = []

        def answered(command, **_):
            row, words, rounds = json.loads(command[-1])
            asked.append((row, dict(word.lstrip("+").split("=", 1) for word in words), rounds))
            return answer(*asked[-1])

        monkeypatch.setattr(throughput.subprocess, "run", answered)
        monkeypatch.setattr(throughput, "provenance", lambda: {"commit": "abc"})
        return asked

    def test_what_does_not_fit_is_a_row_and_nothing_larger_is_tried(self, monkeypatch, capsys):
        def answer(row, words, rounds):
            record = {"seconds": [2.0], "peak_gb": 1.0, "held_gb": 0.5, "network_calls": 4.0}
            record |= {"flops": 1e9, "matmul_flops": 1e9}
            if words["algo.micro_batch_size"] == "2":
                return SimpleNamespace(returncode=-9, stdout="", stderr="")
            return SimpleNamespace(returncode=0, stdout=json.dumps(record), stderr="")

        asked = self.stub(monkeypatch, answer)
        small = [
            "--steps",
            "3",
            "--micro-batch",
            "1",
            "--rows",
            "ctrl, full",
            "--micro-batches",
            "1",
            "2",
            "4",
        ]
        assert throughput.main([*small, "--all-steps", "3", "--json", "--rounds", "3"]) == 0
        out = capsys.readouterr().out
        records = [json.loads(line) for line in out.splitlines()]
        assert [record["micro_batch"] for record in records] == [1, 2, 4]
        assert [record.get("out_of_memory", False) for record in records] == [False, True, True]
        assert records[0]["pictures_per_second"] == 0.5
        assert {record["commit"] for record in records} == {"abc"}
        sizes = [(words["algo.micro_batch_size"], rounds) for _, words, rounds in asked]
        assert sizes == [("1", 1), ("1", 3), ("2", 1)]  # on a CPU memory first, then time
        throughput.main([*small, "--all-steps", "3"])
        assert "out of memory" in capsys.readouterr().out

    def test_a_row_that_fails_says_why_and_the_others_go_on(self, monkeypatch, capsys, tmp_path):
        failure = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nOSError: gone\n")
        self.stub(monkeypatch, lambda *_: failure)
        out = tmp_path / "throughput.json"
        assert throughput.main(["--quick", "--no-scaling", "--out", str(out)]) == 1
        rows = json.loads(out.read_text())["rows"]
        assert len(rows) == len(ROWS) - 1  # without the fp32 one: all of them are fp32
        assert {row["failed"] for row in rows} == {"OSError: gone"}
        assert "OSError: gone" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--rows", "ctrl, ful"], "Did you mean 'ctrl, full'?"),
            (["algo=none"], "algo=none: no such algo"),
            (["env.num_steps=3"], "the benchmark sets env.num_steps itself"),
            (["env.num_step=3", "--no-scaling"], "env.num_step: no such setting"),
            (["env=gaussian_mixture"], "Use env=emoji or env=sd15"),
        ],
    )
    def test_a_mistake_is_one_line(self, monkeypatch, capsys, arguments, said):
        asked = self.stub(monkeypatch, None)
        assert throughput.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("throughput: ")
        assert said in error
        assert error.count("\n") == 1
        assert not asked

    def test_a_measurement_out_of_memory_says_so_itself(self, monkeypatch, capsys):
        def allocate(*_):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

        monkeypatch.setattr(cost, "measure", allocate)
        monkeypatch.setattr("sys.argv", ["cost", json.dumps(["ctrl", [], 1])])
        cost.main()
        assert json.loads(capsys.readouterr().out) == {"out_of_memory": True}
