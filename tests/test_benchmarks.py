"""The benchmarks and the recipe still run, each in its smallest form: without its command a figure is no figure."""
import importlib
import json
import re
import runpy
import signal
import sys
from concurrent.futures import Executor, Future

import pytest
import torch

import benchmark
import benchmark_data
import benchmark_lora
import benchmark_memory
import model
import recipe
from conftest import ROOT, small_backbone


class InTurn(Executor):
    """In the place of a pool of threads: a process takes signals in its first one alone."""

    def __init__(self, _):
        pass

    def submit(self, work, *rest):
        future = Future()
        future.set_result(work(*rest))
        return future


SMALL = dict(width=64, layers=2, prompt_tokens=24, image_tokens=4, response_tokens=8, comparisons=1, repetitions=1)


@pytest.mark.parametrize("mode", ["score", "train"])
def test_the_pack_is_timed_against_the_stock_way_after_both_gave_the_same(mode, capsys):
    benchmark.main(benchmark.Config(mode=mode, **SMALL))
    result = json.loads(capsys.readouterr().out.splitlines()[0])
    assert result["ratio"] > 0 and result["limit"] > 1 and max(result["difference"].values()) < 1e-4


def test_memory_is_measured_until_a_model_is_distributed_and_after_a_step(capsys):
    benchmark_memory.main(benchmark_memory.Config(shard="all", width=64))
    assert re.search(r"rank 0: \d+\.\d\d until distributed, \d+\.\d\d with a step", capsys.readouterr().out)


def test_two_steps_with_low_rank_updates_are_measured_beside_the_count(monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Linear, "forward", torch.nn.Linear.forward)  # restored at the end
    benchmark_lora.main(benchmark_lora.Config(shape="tiny", lora=2))
    output = capsys.readouterr().out
    assert output.count("gradient") == 2 and "By counting" in output


def test_a_step_of_grpo_is_estimated_from_measured_parts(monkeypatch, capsys):
    monkeypatch.setattr(model, "suppressed_tokens", model.suppressed_tokens)  # which the import replaces
    benchmark_grpo = importlib.import_module("benchmark_grpo")
    monkeypatch.setattr(benchmark_grpo, "measure_slice", lambda layers, again: {
        "bytes": 1000 * layers, "tokens": 10, "counted": 1.0})  # a minute for a layer of the 3B's width
    benchmark_grpo.main(benchmark_grpo.Config(repetitions=1))
    assert "| together, while learning |" in capsys.readouterr().out


def test_rows_are_converted_opened_read_and_encoded(tmp_path, monkeypatch, capsys):
    words = ["--folder", str(tmp_path / "images"), "--images", "2", "--reads", "3"]
    monkeypatch.setattr(sys, "argv", ["benchmark_data.py", *words])
    threads = torch.get_num_threads()
    benchmark_data.main()
    torch.set_num_threads(threads)
    output = capsys.readouterr().out
    assert "opened 2 rows" in output and "encoded 2 images" in output
    assert not (tmp_path / "images").exists()


def test_a_table_of_the_recipe_is_made_once_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    """A judge's row, whose orders and tokens are counted too. The scripts run in this process, which has torch."""
    scripts_run = []
    handler_before = signal.getsignal(signal.SIGINT)

    def script(here, name, *words):
        scripts_run.append(name)
        if "--stand_in" in words:
            return small_backbone(here / "stand_in", vocabulary_head=True)
        monkeypatch.setattr(sys, "argv", [name, *(str(word) for part in words for word in str(part).split())])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        assert end.value.code == 0

    monkeypatch.setattr(recipe, "script", script)
    monkeypatch.setattr(recipe, "NUM_HELD_OUT", 4)
    flags = ["--rows", "6", "--rl_steps", "1", "--only", "untrained", "--jobs", "1", "--out", str(tmp_path)]
    for expected in (["tests/recipe.py", "train.py", "evaluate.py"], []):
        monkeypatch.setattr(sys, "argv", ["recipe.py", *flags])
        monkeypatch.setattr(recipe, "ThreadPoolExecutor", InTurn)
        recipe.main()
        assert scripts_run == expected
        assert "| judge, direct, untrained | 58.7 64.4 53.1 |" in capsys.readouterr().out
        scripts_run.clear()
    signal.signal(signal.SIGINT, handler_before)  # see command_line
