"""The loop: the same step whatever the packs, micro-steps and ranks; resume; signals; bad input."""
import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

import evaluate
import train
from conftest import ROOT, TWO_RANKS, command, small_backbone
from data import BadRow, Comparison, Order, read_comparisons, synthetic, write_comparisons
from model import Policy, RewardModel, Score, encode, pack
from train import Batch, Config, StepPlan, learning_rate, main, open_data, score_rows, start_processes
from two_ranks import gradient, gradient_in_paradigm, stop_after


def draw(folder):
    """24 drawn comparisons, in such an order that of the first step's rows the first of two ranks gets those with an
    image, the second those without: lines of equal length are assigned in turn. Every sixth is in held.jsonl too."""
    drawn = synthetic(200)
    visual = [comparison for comparison in drawn if comparison.images]
    text = [comparison for comparison in drawn if not comparison.images]
    rows = [None] * 24
    for position, (_, row) in enumerate(Order([[1] * 24], [1.0], batch_size=64, seed=0).rows_of_step(0)):
        rows[row] = (text if position % 2 else visual)[position // 2]
    write_comparisons(folder, rows, progress=False)
    lines = (folder / "comparisons.jsonl").read_text().splitlines()
    lines = [f"{line[:-1]:700}}}\n" for line in lines]
    (folder / "comparisons.jsonl").write_text("".join(lines))
    (folder / "held.jsonl").write_text("".join(lines[::6]))
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("train") / "drawn")


@pytest.fixture
def cfg(backbones, drawn, tmp_path):
    """A run of six short steps on the tiny backbone of the tests, through the same flags as the 7B."""
    return small_run(backbones(), drawn, tmp_path / "run")


def small_run(backbone, data, out):
    return Config(backbone=str(backbone), data=[str(data)], eval_data=[f"{data}/held.jsonl"], out=str(out), lr=1e-3,
                  batch_size=8, max_steps=6, max_pixels=112 * 112, pack_tokens=512, eval_every=0).resolved()


def flags(cfg):
    """The config as a command line."""
    out = []
    for name, value in vars(cfg).items():
        if value not in (None, []):
            out += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return out


def weights(folder):
    return load_file(f"{folder}/model.safetensors") | load_file(f"{folder}/head.safetensors")


def log_of(folder):
    return [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]


def summary_of(folder):
    return json.load(open(f"{folder}/summary.json"))


def saved_in(folder):
    """The weights of a run's last checkpoint, and what AdamW keeps of them."""
    return load_file(*train.checkpoints(Path(folder))[-1].glob("*.safetensors"))


def last_step_of(folder):
    """Of its last checkpoint."""
    return json.loads((train.checkpoints(Path(folder))[-1] / "state.json").read_text())["step"]


def relative(a, b):
    """Norm of the difference over all tensors, relative to the norm of b."""
    difference = sum(((a[k] - b[k]).double() ** 2).sum() for k in b)
    return math.sqrt(difference / sum((b[k].double() ** 2).sum() for k in b))


def coin(tmp_path, n=8):
    """Half say yes, half say no: nothing to learn."""
    rows = [Comparison(f"Which {i}?", ["yes", "no"], [(i % 2, 1 - i % 2)]) for i in range(n)]
    return str(write_comparisons(tmp_path / "coin", rows, progress=False))


# One step -------------------------------------------------------------------------------------------------------------

def test_a_step_does_not_depend_on_how_its_pairs_fall_into_packs(backbones, drawn):
    start_processes()
    whole, whole_metrics, _ = gradient(backbones(), drawn, pack_tokens=4096)
    parts, parts_metrics, counts = gradient(backbones(), drawn, pack_tokens=128)
    assert counts[0, 1] > 5 and relative(parts, whole) < 1e-6
    assert parts_metrics == pytest.approx(whole_metrics, rel=1e-5)


def test_the_loss_that_is_logged_is_the_loss_that_is_optimised(backbones, drawn):
    """With both options of Algorithm 1: with weights moved a little along the gradient, it falls by the gradient's
    squared norm times that little."""
    start_processes()
    torch.manual_seed(0)
    model = RewardModel.from_backbone(backbones()).double()
    cfg = Config(zero_coef=0.1, length_norm=True, clip=1e9, pack_tokens=4096)
    packs = [pack([read_comparisons(drawn)[i] for i in range(4)], model.processor)]
    batch = Batch(0, packs, pairs=len(packs[0].pairs))
    plan = train.agree_on_step(batch, train.StopSignal())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    first, second = (train.train_step(model, optimizer, batch, plan, packs[0], cfg) for _ in range(2))
    assert first["loss"] - second["loss"] == pytest.approx(1e-5 * first["grad_norm"] ** 2, rel=0.05)


def four_steps(backbone, data, out):
    """Each step of two ranks or nodes takes long."""
    return replace(small_run(backbone, data, out), max_steps=4)


def make_two_ranks(folder, backbones):
    # the first's embedding and head are one weight
    types = {"critic": "internvl", "direct": "qwen2_5_vl", "think": "qwen3_vl"}
    checkpoints = {name: str(small_backbone(folder / name, model_type=model_type, vocabulary_head=True))
                   for name, model_type in types.items()}
    settings = {"backbone": str(backbones()), "checkpoints": checkpoints, "drawn": str(draw(folder / "drawn"))}
    return settings | {"config": asdict(four_steps(backbones(), folder / "drawn", folder / "one"))}


TWO_RANKS["train"] = make_two_ranks


@pytest.fixture(scope="module")
def of_two(two_ranks, backbones):
    """The folder of two_ranks.py, its results and output; the run of one process is added to the folder."""
    root, run = two_ranks
    here = root / "train"
    assert run.returncode == 0, run.stderr[-3000:]
    assert main(four_steps(backbones(), here / "drawn", here / "one")) == 0
    return here, torch.load(here / "results.pt", weights_only=True), run.stdout, run.stderr


def test_two_ranks_take_the_step_of_one(of_two, backbones, drawn):
    """With DDP and sharded (with recomputed activations), all weights and LoRA's updates, and with one rank whose packs
    hold no image beside one that holds all of them."""
    start_processes()
    for name, lora in (("steps", 0), ("lora", 4)):
        one, one_metrics, _ = gradient(backbones(), drawn, lora=lora)
        for two, two_metrics, counts in of_two[1][name]:
            assert counts[:, 2].tolist() == [12, 0]
            assert counts[1, 1] > counts[0, 1] > 1  # several micro-steps, and not equally many
            assert set(two) == set(one) and relative(two, one) < 1e-6
            assert two_metrics == pytest.approx(one_metrics, rel=1e-5)


def test_two_ranks_take_the_step_of_one_in_every_paradigm(of_two, drawn):
    start_processes()
    for paradigm, by_two in of_two[1]["paradigms"].items():
        one, one_metrics, _ = gradient_in_paradigm(of_two[0] / paradigm, drawn, paradigm)
        assert len(one) > 50
        for two, two_metrics, counts in by_two:
            assert counts[:, 1].min() > 1 and len(counts) == 2  # several micro-steps on each rank
            assert set(two) == set(one) and relative(two, one) < 1e-6
            assert two_metrics == pytest.approx(one_metrics, rel=1e-5)


def test_a_sharded_model_computes_with_the_very_weights_of_an_unsharded_one(of_two):
    """Autocast rounds the weights of products to bf16 and nothing else: so must what FSDP gathers, or small updates of
    norms would be saved and have no effect."""
    for name in ("bf16", "bf16 lora"):  # frozen in bf16, what is trained in fp32
        (plain, norm), (sharded, sharded_norm) = of_two[1][name]
        assert torch.equal(plain, sharded) and sharded_norm == pytest.approx(norm, rel=1e-2)


def test_two_ranks_end_where_one_ends(of_two):
    """Also sharded, stopped by a signal to one rank, and resumed. Four steps of AdamW at 1e-3: gradients differ by
    rounding (1e-7), but Adam divides each by its own size, so that a weight whose gradient is as small as the rounding
    may move by up to the rate either way: hence 1e-3 for the weights."""
    here, results, output, _ = of_two
    assert results["status"] == [128 + signal.SIGTERM, 0, 128 + signal.SIGTERM, 128 + signal.SIGTERM, 0]
    assert output.startswith("world size 2, device cpu")
    for folder in ("two", "sharded"):
        assert relative(weights(here / folder), weights(here / "one")) < 1e-3
        losses = [[row["loss"] for row in log_of(here / name)] for name in (folder, "one")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        # The sharded run evaluates after step 3: a forward without gradients must not hide the head from the norm
        norms = [[row["grad_norm"] for row in log_of(here / name)] for name in (folder, "one")]
        assert norms[0] == pytest.approx(norms[1], rel=1e-2)
        summaries = [summary_of(here / name) for name in (folder, "one")]
        assert summaries[0]["pairs_seen"] == summaries[1]["pairs_seen"] and summaries[0]["n"] == summaries[1]["n"]


def test_a_checkpoint_is_read_by_another_number_of_ranks_and_holds_no_pickle(of_two):
    """Written by two ranks, the last two kept; resumed by one process, sharded and not."""
    here = of_two[0]
    parts = Config(**json.loads((here / "settings.json").read_text())["config"])
    parts = replace(parts, out=str(here / "parts"), resume=True)
    assert sorted(file.name for file in (here / "parts").glob("checkpoint*")) == ["checkpoint-2", "checkpoint-3"]
    files = sorted((here / "parts" / "checkpoint-3").iterdir())
    assert [file.suffix for file in files] == [".safetensors", ".safetensors", ".json"]
    assert 0.8 < files[0].stat().st_size / files[1].stat().st_size < 1.25
    for name, shard in (("again", "all"), ("plainly", "none")):
        shutil.copytree(here / "parts", here / name)
        assert main(replace(parts, out=str(here / name), shard=shard)) == 0
        assert relative(weights(here / name), weights(here / "one")) < 1e-3
        losses = [[row["loss"] for row in log_of(here / folder)] for folder in (name, "one")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 4
        assert not [*(here / name).glob("checkpoint*")]


def test_a_disk_that_is_full_for_one_rank_ends_them_all_and_leaves_the_checkpoint_before(of_two):
    error, left = of_two[1]["full disk"]
    assert error.startswith("cannot write") and "No space left" in error and left == ["checkpoint-1"]


def test_a_run_folder_that_not_all_ranks_see_ends_the_run_in_one_line(of_two):
    """Also where the lock of a killed run lies on the other disk: it is not what rank 0 wrote."""
    error, left = of_two[1]["disk of each rank"]
    assert "own-0 is not on a disk that all ranks share: rank 1 does not see" in error and "\n" not in error
    assert left == [".run.lock"]


@command
def two_nodes_of_train(folder, backbones):
    cfg = four_steps(backbones(), draw(folder / "drawn"), folder / "run")
    words = flags(replace(cfg, shard="node", resume=True, save_every=1))
    return ["tests/two_nodes.py", folder, *words]


def test_two_nodes_take_the_steps_of_one_and_resume_by_themselves_after_a_worker_is_killed(two_nodes_of_train,
                                                                                          backbones):
    """Sharded within the node, with the run folder on a disk that both share."""
    here, run = two_nodes_of_train
    assert run.returncode == 0, run.stderr
    assert main(four_steps(backbones(), here / "drawn", here / "one")) == 0
    assert "resuming from step" in "".join((here / f"node-{i}.log").read_text() for i in range(2))
    assert relative(weights(here / "run"), weights(here / "one")) < 1e-3
    losses = [[row["loss"] for row in log_of(folder)] for folder in (here / "run", here / "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_rewards_do_not_depend_on_which_rank_computes_them(of_two, drawn):
    here, results, *_ = of_two
    alone = RewardModel.from_pretrained(here / "two").score_many([*read_comparisons(drawn)])
    assert [len(values) for values in results["rewards"]] == [len(values) for values in alone]
    assert sum(results["rewards"], []) == pytest.approx(sum(alone, []), abs=1e-5)


class HostWaits(TorchDispatchMode):
    """Counts where a script reads a tensor's number: on a GPU each of them waits for all work before it."""
    scripts = {str(ROOT / name) for name in ("model.py", "train.py")}

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = Counter()
        for name in ("tolist", "cpu"):  # these read below the dispatcher
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def note(self):
        frames = (frame for frame, _ in traceback.walk_stack(None) if "/torch/" not in frame.f_code.co_filename)
        code = next(frame for frame in frames if frame.f_code.co_filename != __file__).f_code
        if code.co_filename in self.scripts:
            self.counts[code.co_name] += 1

    def counted(self, method):
        return lambda *arguments: self.note() or method(*arguments)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten._local_scalar_dense.default:  # .item(), int(), float(), bool()
            self.note()
        return function(*arguments, **(keywords or {}))


def test_our_code_reads_no_number_from_the_device_until_a_step_ends(tiny, drawn, monkeypatch):
    """Neither in the forward nor between micro-steps; but the vision tower's windows are read, once a pack.

    A pack does wait elsewhere, whatever its size: transformers' vision tower reads its grids and windows (seven times
    with Qwen2.5-VL), and each tensor of the pack is copied to the device from memory that is not pinned (twelve, and
    one for each short comparison). Milliseconds of a micro-step of seconds."""
    start_processes()
    model, rows = copy.deepcopy(tiny).train(), read_comparisons(drawn)
    packs = [pack([rows[i]], model.processor) for i in range(3)]
    assert any(len(p.image_grid_thw) for p in packs)
    optimizer, counts = torch.optim.SGD(model.parameters(), lr=0.0), []
    for step_packs in (packs[:1], packs):
        plan = StepPlan(0, len(step_packs), {"pairs": 3, "lm_texts": 0})
        with HostWaits(monkeypatch) as waits:
            train.train_step(model, optimizer, Batch(0, step_packs), plan, packs[0], Config())
        counts.append(dict(waits.counts))
    for n, count in zip((1, 3), counts):  # the lengths of the windows, once for the tower's two kinds of layers
        assert count.pop("from_boundaries") <= 2 * n
    assert counts[0] == counts[1] and counts[0].keys() == {"train_step"} and counts[0]["train_step"] < 5


def test_rows_are_assigned_by_their_length(tmp_path, monkeypatch):
    """Each once, whatever the number of ranks, and to the rank with the fewest bytes."""
    rows = [Comparison("?", ["a" * n, "b"], [(0, 1)]) for n in (1, 900, 1, 1, 500, 500, 1, 1)]
    sets = [read_comparisons(write_comparisons(tmp_path / "rows", rows, progress=False)), synthetic(4)]
    row_ids = [(0, i) for i in range(8)] + [(1, i) for i in range(4)]
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
    rows_of_rank = train.assign_rows_to_ranks(row_ids, sets)
    assert sorted(sum(rows_of_rank, [])) == row_ids
    sizes = [sum(int(sets[0].line_sizes[i]) for s, i in rank_rows if s == 0) for rank_rows in rows_of_rank]
    assert abs(sizes[0] - sizes[1]) < 200 < 900 < min(sizes)
    assert train.assign_rows_to_ranks(row_ids[8:], sets) == [[(1, 0), (1, 2)], [(1, 1), (1, 3)]]


def test_micro_steps_on_the_dummy_pack_are_counted_and_change_nothing(cfg, monkeypatch):
    assert main(replace(cfg, max_steps=2)) == 0
    alone, real = log_of(cfg.out), train.all_gather_objects

    def beside_a_rank_with_one_pack_more(item):
        if not isinstance(item, StepPlan):
            return real(item)
        return [item, StepPlan(0, item.micro_steps + 1, dict.fromkeys(item.counts, 0))]

    monkeypatch.setattr(train, "all_gather_objects", beside_a_rank_with_one_pack_more)
    assert main(replace(cfg, max_steps=2, overwrite=True)) == 0
    assert [row["dummy_packs"] for row in alone] == [0, 0]
    assert [row["dummy_packs"] for row in log_of(cfg.out)] == [1, 1]
    assert [row["loss"] for row in alone] == [row["loss"] for row in log_of(cfg.out)]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_prefetch_makes_every_item_in_order_and_raises_what_making_raises(on_gpu):
    """On a GPU the next item is made while this one is used; on a CPU nothing runs beside the arithmetic."""
    started = []

    def make(i):
        started.append(i)
        return 10 // (3 - i)

    items = train.prefetch(make, range(5), on_gpu)
    assert next(items) == 3
    time.sleep(0.05)
    assert started == ([0, 1] if on_gpu else [0])
    assert [next(items), next(items)] == [5, 10]
    with pytest.raises(ZeroDivisionError):
        next(items)


@pytest.mark.parametrize("resume", [False, True])
def test_several_readers_change_no_number_of_a_run(cfg, tmp_path, monkeypatch, resume):
    """As on a GPU: a batch is read by several threads while the one before it is trained on. Packs, their order,
    losses, weights and scores are those of one reader, bit for bit, also when the run is stopped and resumed."""
    assert main(cfg) == 0
    readers, names = replace(cfg, out=str(tmp_path / "readers")), set()
    map_rows, prefetch, encode_one = train.map_rows, train.prefetch, RewardModel.encode_for_training

    def late_and_out_of_order(model, comparison, rng):
        names.add(threading.current_thread().name)
        time.sleep(random.random() / 50)
        return encode_one(model, comparison, rng)

    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(RewardModel, "encode_for_training", late_and_out_of_order)
    monkeypatch.setattr(train, "map_rows", lambda function, rows, on_gpu: map_rows(function, rows, True))
    monkeypatch.setattr(train, "prefetch", lambda function, items, on_gpu: prefetch(function, items, True))
    if resume:
        with monkeypatch.context() as patch:
            patch.setattr(train, "learning_rate", stop_after(2))
            assert main(readers) == 128 + signal.SIGTERM
    assert main(replace(readers, resume=resume)) == 0
    assert {name for name in names if name.startswith("reader")} == {f"reader_{i}" for i in range(3)}
    plain, by_readers = ([row | {"seconds": 0} for row in log_of(folder)] for folder in (cfg.out, readers.out))
    assert plain == by_readers
    assert all(torch.equal(weight, weights(readers.out)[name]) for name, weight in weights(cfg.out).items())
    assert summary_of(cfg.out)["accuracy_by_category"] == summary_of(readers.out)["accuracy_by_category"]


def test_a_reader_that_fails_ends_the_run_in_one_line(cfg, monkeypatch, capsys):
    """Where reading fails and not a row, as with a disk that is gone; neither a hang nor a run without that row."""
    map_rows, prefetch, encode_one = train.map_rows, train.prefetch, RewardModel.encode_for_training
    rows_read = []

    def disk_is_gone(*arguments):
        rows_read.append(1)
        if len(rows_read) == 20:
            raise OSError("the disk is gone")
        return encode_one(*arguments)

    monkeypatch.setattr(RewardModel, "encode_for_training", disk_is_gone)
    monkeypatch.setattr(train, "map_rows", lambda function, rows, on_gpu: map_rows(function, rows, True))
    monkeypatch.setattr(train, "prefetch", lambda function, items, on_gpu: prefetch(function, items, True))
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(cfg)])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        train.command_line(main, Config, "train.py")
    signal.signal(signal.SIGINT, before)
    assert end.value.code == 1 and capsys.readouterr().err.strip().endswith("train.py: the disk is gone")


def test_the_learning_rate_rises_and_falls():
    cfg = Config(lr=3e-6, warmup=0.1)
    rates = [learning_rate(s, 100, cfg) for s in range(100)]
    assert rates[0] == pytest.approx(3e-7) and max(rates) == 3e-6 == rates[9] and 0 < rates[-1] < 1e-8
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_no_category_collides_with_the_total():
    """A category may be called "accuracy": 1 of 2 right is one half, and not two thirds."""
    rows = [Comparison("?", ["a", "b"], [(0, 1)], category=name) for name in ("accuracy", "all")]
    rewards = [Score([1.0, 0.0]), Score([0.0, 0.0])]  # a tie is wrong
    assert train.accuracy(rows, rewards) == 0.5
    assert train.accuracy_by_category(rows, rewards) == {"accuracy": (1.0, 1), "all": (0.0, 1)}
    assert train.accuracy(rows, [None, Score([1.0, 0.0])]) == 1.0 and math.isnan(train.accuracy([], []))


def test_a_job_with_more_processes_than_gpus_runs_on_the_cpu_and_its_first_line_says_so(monkeypatch, capsys):
    train.end_processes()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert start_processes() == torch.device("cpu")
    assert capsys.readouterr().out == "world size 1, device cpu (1 GPUs visible)\n"


# The run --------------------------------------------------------------------------------------------------------------

def test_a_run_leaves_a_reward_model_its_log_and_a_summary(cfg, monkeypatch, capsys):
    """And reads no step beyond the last."""
    steps, real = [], Order.rows_of_step
    monkeypatch.setattr(Order, "rows_of_step", lambda self, step: steps.append(step) or real(self, step))
    assert main(cfg) == 0
    out, output = cfg.out, capsys.readouterr().out
    assert steps == [0, 1, 2, 3, 4, 5] and [row["step"] for row in log_of(out)] == [1, 2, 3, 4, 5, 6]
    summary = summary_of(out)
    assert {"accuracy", "accuracy_by_category", "accuracy_images_shuffled", "n", "seconds"} <= set(summary)
    assert summary["pairs_seen"] == sum(row["pairs"] for row in log_of(out)) > 0
    assert "what the texts alone tell" in output and "0.5 if the model" not in output
    assert f"--model {out} --data FOLDER" in output
    assert len(RewardModel.from_pretrained(out).score("What?", ["a", "b", "c"])) == 3
    assert not [name for name in os.listdir(out) if "checkpoint" in name]
    with Image.open(f"{out}/curve.png") as curve:
        assert curve.width > 2 * curve.height > 0
    os.mkdir(f"{out}/checkpoint-6")  # as of a run that was killed at its very end
    for change, words in [({}, "not empty"), ({"resume": True}, "finished run"),
                          ({"resume": True, "overwrite": True}, "contradict")]:
        with pytest.raises(ValueError, match=words):
            main(replace(cfg, **change))
    assert not os.path.exists(f"{out}/checkpoint-6")
    assert main(replace(cfg, overwrite=True, max_steps=0)) == 0  # the untrained model
    assert summary_of(out)["pairs_seen"] == 0 and RewardModel.from_pretrained(out)


def test_the_start_prints_what_the_run_is_in_a_few_lines(cfg, capsys):
    """And the flags that differ from the defaults, as they stand on a command line."""
    assert main(replace(cfg, max_steps=1, out=f"{cfg.out} of a b", eval_size=7)) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines[:next(i for i, line in enumerate(lines) if line.startswith("Where"))]
    assert len(start) <= 7 and "24 comparisons" in "".join(start) and "4 held out" in "".join(start)
    assert f"--out '{cfg.out} of a b'" in start[-1] and "--eval_size 7" in start[-1] and "--seed" not in start[-1]
    assert max(map(len, start[2:-1])) <= 80  # the backbone's path may be longer


def test_the_progress_bar_fits_80_columns_and_shows_four_numbers(tmp_path, capsys):
    start_processes()
    row = {name: -1.234567e-05 for name in train.SHOWN} | {"step": 1, "grad_norm": 2.0}
    with train.open_log(tmp_path, 0, 21875, train.SHOWN) as write:
        for step in range(3):
            write(row | {"step": step})
            time.sleep(0.11)  # the bar is drawn ten times a second
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80 and "loss -1.23e-05 accuracy -1.23e-05 margin -1.23e-05 lr -" in lines[-1]
    assert len(train.read_log(tmp_path / "metrics.jsonl")) == 3


def test_a_single_process_sends_itself_no_message():
    """The thread that copies one would leave less of two cores to all that follows: see all_gather_objects."""
    start_processes()
    item = object()
    assert train.all_gather_objects(item)[0] is item and train.all_gather([1, 2]).tolist() == [[1, 2]]


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_5"])
def test_sharding_over_a_single_process_changes_nothing(cfg, backbones, tmp_path, model_type):
    """Qwen3.5: its recurrent layers have weights of their own beside linear layers, and read one without calling it."""
    alone = replace(cfg, backbone=str(backbones(model_type)), max_steps=2, eval_data=[], eval_size=0)
    assert main(alone) == 0
    sharded = replace(alone, out=str(tmp_path / "sharded"), shard="all")
    assert main(sharded) == 0
    assert relative(weights(sharded.out), weights(alone.out)) < 5e-5  # rounding, enlarged by Adam as in two ranks
    assert summary_of(alone.out)["accuracy"] is None  # nothing was held out


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(cfg, tmp_path, monkeypatch, capsys):
    """SIGTERM in the third step: the step is finished, a checkpoint written, and the rest of the run is as if nothing
    had happened."""
    assert main(cfg) == 0
    part = replace(cfg, out=str(tmp_path / "part"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", stop_after(2))
        assert main(part) == 128 + signal.SIGTERM
    errors = capsys.readouterr().err
    assert "3 steps are saved" in errors and "--resume" in errors
    with pytest.raises(ValueError, match="not empty"):
        main(part)
    with pytest.raises(ValueError, match="batch_size was 8, is 16"):
        main(replace(part, resume=True, batch_size=16))
    assert main(replace(part, resume=True)) == 0
    whole, resumed = weights(cfg.out), weights(part.out)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    losses = [[(row["step"], row["loss"]) for row in log_of(c.out)] for c in (cfg, part)]
    assert losses[0] == losses[1]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux lists what a process maps")
def test_a_resumed_run_does_not_keep_the_checkpoint_that_it_replaces(cfg, monkeypatch):
    """A file that is mapped keeps its place on the disk after it is replaced: 93 GB for the 7B."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", stop_after(2))
        assert main(cfg) == 128 + signal.SIGTERM
    mapped, real, maps = [], train.train_step, Path("/proc/self/maps")
    monkeypatch.setattr(train, "train_step", lambda *a: mapped.append("checkpoint-" in maps.read_text()) or real(*a))
    assert main(replace(cfg, resume=True)) == 0 and mapped == [False] * 3


def test_after_kill_9_the_run_folder_holds_a_complete_checkpoint(cfg, monkeypatch):
    long = replace(cfg, max_steps=2000, save_every=1)
    run = subprocess.Popen([sys.executable, "train.py", *flags(long)], cwd=ROOT, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while run.poll() is None and not train.checkpoints(Path(cfg.out)):
        time.sleep(0.05)
    with pytest.raises(ValueError, match="(?i)another|process"):  # while it runs
        main(replace(long, resume=True))
    time.sleep(0.3)  # into one of the writes that now follow each other
    run.kill()
    run.wait()
    step = last_step_of(cfg.out)
    monkeypatch.setattr(train, "learning_rate", stop_after(step + 1))
    assert main(replace(long, resume=True)) == 128 + signal.SIGTERM
    assert last_step_of(cfg.out) == step + 2


def test_the_loss_of_a_rank_is_one_line_and_the_last_one_of_the_others(of_two):
    """In place of a traceback from inside the network."""
    last = of_two[3].rstrip().splitlines()[-1]
    assert last.startswith("train.py: another rank ended (its message is above)") and "Traceback" not in of_two[3]


def test_a_rank_that_is_lost_at_the_very_end_is_no_success(monkeypatch, capsys):
    def lost():
        raise RuntimeError("gloo: Connection closed by peer")

    monkeypatch.setattr(train, "end_processes", lost)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        train.command_line(lambda cfg: 0, Config, "train.py")
    signal.signal(signal.SIGINT, before)
    assert end.value.code == 1 and "another rank ended" in capsys.readouterr().err


def test_signals_are_recorded_in_the_loop_and_end_the_process_at_once_outside_of_it():
    """And a SIGHUP that nohup has the process ignore stays ignored."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]  # a shell's `&` ignores SIGINT
    with train.stop_signals() as stop_signal:
        assert stop_signal.number == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop_signal.number == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        assert stop_signal.number == signal.SIGINT and stop_signal.exit_status == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one ends it
    assert [signal.getsignal(number) for number in numbers] == [signal.default_int_handler] * 3
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with train.stop_signals() as stop_signal:
        signal.raise_signal(signal.SIGHUP)
        assert stop_signal.number == 0
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("shard", ["none", "all"])
def test_a_full_disk_leaves_the_checkpoint_before_and_a_damaged_one_is_one_line(cfg, monkeypatch, capfd, shard):
    """And nothing else in the folder is taken for a checkpoint."""
    real_write, cfg = train.HuggingFaceStorageWriter.write_data, replace(cfg, shard=shard, save_every=2)

    def full_the_second_time(*arguments):
        if os.path.exists(f"{cfg.out}/checkpoint-2"):
            raise OSError("No space left on device")
        return real_write(*arguments)

    monkeypatch.setattr(train.HuggingFaceStorageWriter, "write_data", full_the_second_time)
    with pytest.raises(OSError, match="No space.* is the disk full"):
        main(cfg)
    assert [name for name in os.listdir(cfg.out) if "checkpoint" in name] == ["checkpoint-2"]
    for name in ("checkpoint-old", "checkpoint-7.bak", "checkpoint-best-4", ".checkpoint-9.partial"):
        Path(cfg.out, name).mkdir()
    Path(cfg.out, "checkpoint-8").touch()
    (file,) = Path(cfg.out, "checkpoint-2").glob("*.safetensors")
    other = {name: torch.zeros(3) if name == "head.0.weight" else w for name, w in load_file(file).items()}
    state = json.loads(file.with_name("state.json").read_text())

    def other_model():
        save_file(other, file)
        file.with_name("state.json").write_text(json.dumps(state | {"bytes": train.file_sizes(file.parent)}))

    for write, words in ((other_model, "does not fit this model"), (lambda: os.truncate(file, 1000), "is damaged"),
                         (lambda: shutil.copy(file, f"{file}.safetensors"), "is damaged"),
                         (lambda: [f.unlink() for f in file.parent.glob("*.safetensors")], "is damaged")):
        write()
        capfd.readouterr()
        with pytest.raises(ValueError, match=f"checkpoint-2 {words}") as error:
            main(replace(cfg, resume=True))
        assert len(str(error.value)) < 400 and "Traceback" not in "".join(capfd.readouterr())


def test_a_checkpoint_is_written_once(tmp_path, monkeypatch):
    """A run that was resumed and stopped before its next step has nothing to add: otherwise the folder would hold the
    parts of two numbers of ranks."""
    start_processes()
    p = torch.nn.Parameter(torch.ones(2))
    optimizer, state = torch.optim.AdamW([("p", p)], fused=True), {"step": 1, "seconds": 0.0, "config": {}}
    train.save_checkpoint(tmp_path, optimizer, state)
    p.data += 1
    monkeypatch.setattr(train, "HuggingFaceStorageWriter", None)
    train.save_checkpoint(tmp_path, optimizer, state)
    assert train.load_checkpoint(tmp_path, optimizer, {}, ()) == {"step": 1, "seconds": 0.0}
    assert p.tolist() == [1, 1]


def test_a_failure_after_the_last_step_loses_no_step(cfg, monkeypatch):
    """The disk fills up while the model is saved: a resumed run goes straight to the end, also with --save_every 0."""
    never = replace(cfg, save_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
        with pytest.raises(OSError, match="No space"):
            main(never)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", None)
        assert main(replace(never, resume=True)) == 0
    assert summary_of(cfg.out)["steps"] == 6


def test_a_gradient_that_is_not_finite_skips_the_step_and_ten_in_a_row_end_the_run(cfg, monkeypatch, capsys):
    def poisoned(steps):
        def loss(*arguments, **named):
            calls.append(1)
            return real(*arguments, **named) * (math.nan if len(calls) - 1 in steps else 1.0)
        return loss

    real, calls, one_pack = train.pairwise_loss, [], replace(cfg, pack_tokens=4096)
    monkeypatch.setattr(train, "pairwise_loss", poisoned({1, 3}))
    assert main(one_pack) == 0
    assert summary_of(cfg.out)["bad_gradients"] == 2
    assert all(torch.isfinite(w).all() for w in weights(cfg.out).values())
    assert "steps skipped: 2, gradient not finite" in capsys.readouterr().out
    calls.clear()
    monkeypatch.setattr(train, "pairwise_loss", poisoned(set(range(100))))
    assert main(replace(one_pack, overwrite=True, max_steps=50)) == 1
    errors = capsys.readouterr().err
    assert len(calls) == 10 and "ten steps in a row" in errors and "10 steps are saved" in errors


def test_a_model_whose_weights_or_rewards_are_not_finite_is_no_result(cfg, monkeypatch):
    """Neither reported nor saved; and a good checkpoint is not replaced by one that cannot be resumed."""
    with pytest.raises(ValueError, match="rewards are not finite"):
        main(replace(cfg, lr=1e12, max_steps=3))
    real, steps = train.train_step, []

    def spoils_the_fourth(model, *arguments):
        steps.append(real(model, *arguments))
        if len(steps) == 4:
            next(model.parameters()).data.fill_(math.inf)
        return steps[-1]

    monkeypatch.setattr(train, "train_step", spoils_the_fourth)
    with pytest.raises(ValueError, match="weights are not finite after step 4"):
        main(replace(cfg, overwrite=True, save_every=2))
    assert last_step_of(cfg.out) == 2 and not os.path.exists(f"{cfg.out}/head.safetensors")


def test_eight_pairs_are_memorised(cfg, tmp_path):
    rows = [Comparison(f"Number {i}?", ["yes", "no"] if i % 3 else ["no", "yes"], [(0, 1)]) for i in range(8)]
    folder = str(write_comparisons(tmp_path / "eight", rows, progress=False))
    assert main(replace(cfg, data=[folder], eval_data=[folder], max_steps=25, lr=3e-3)) == 0
    assert summary_of(cfg.out)["accuracy"] == 1.0


def test_a_run_whose_loss_stays_at_log_2_says_so_and_exits_non_zero(cfg, tmp_path, capsys):
    rows = [Comparison("Which?", ["yes", "no"], [(i, 1 - i)]) for i in range(2)]
    folder = str(write_comparisons(tmp_path / "coin", rows, progress=False))
    assert main(replace(cfg, data=[folder], eval_data=[folder], batch_size=2, max_steps=50)) == 1
    assert "ended hardly below log 2" in capsys.readouterr().err
    assert summary_of(cfg.out)["accuracy"] == 0.5


# LoRA -----------------------------------------------------------------------------------------------------------------

def test_updates_begin_as_the_base_model_and_merge_into_an_ordinary_one(backbones, drawn, tmp_path):
    """From weights in bf16, as on a GPU, too: they are saved in fp32, or small updates would be rounded away."""
    rows = [*read_comparisons(drawn)]
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = RewardModel.from_backbone(backbones(), dtype=dtype).float().eval()
        base = sum(model.score_many(rows), [])
        train.add_lora(model, 4)
        assert sum(model.score_many(rows), []) == base
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_b"):
                    p.normal_(std=1e-2)
        updated = sum(model.score_many(rows), [])
        assert max(abs(a - b) for a, b in zip(updated, base)) > 0.01
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.to(dtype)
        model.save_pretrained(tmp_path / "merged", train.merge_lora(model.state_dict()))
        alike = RewardModel.from_pretrained(tmp_path / "merged")
        assert sum(alike.score_many(rows), []) == pytest.approx(updated, abs=1e-5)
        assert next(AutoModel.from_pretrained(tmp_path / "merged").parameters()).dtype == torch.float32


def test_a_run_with_lora_trains_updates_and_head_alone_and_resumes_bit_for_bit(cfg, backbones, tmp_path, monkeypatch):
    low = replace(cfg, lora=4, gradient_checkpointing=True, max_steps=3, eval_data=[], eval_size=0)
    assert main(low) == 0
    part = replace(low, out=str(tmp_path / "part"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", stop_after(1))
        assert main(part) == 128 + signal.SIGTERM
    names = {name.split()[0] for name in saved_in(part.out)}
    assert names == {n for n in names if n.startswith("head.") or n.endswith((".lora_a", ".lora_b"))}
    assert len(names) == 4 + 2 * 7 * 2 and not [n for n in names if "visual" in n]
    assert main(replace(part, resume=True)) == 0
    whole, resumed, base = weights(low.out), weights(part.out), load_file(backbones() / "model.safetensors")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    learnt = {name for name in base if not torch.equal(whole[name], base[name])}
    assert set(base) < set(whole) and len(learnt) == 7 * 2 and all("_proj.weight" in name for name in learnt)
    for folder, steps in (("whole", [None]), ("parts", [1, None])):
        for stop in steps:
            with monkeypatch.context() as patch:
                if stop:
                    patch.setattr(train, "learning_rate", stop_after(stop))
                main(replace(low, out=str(tmp_path / folder), shard="all", resume=True))
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert main(replace(low, overwrite=True, freeze_vision=True, max_steps=0)) == 0
    assert all(torch.equal(weights(low.out)[name], base[name]) for name in base)


# Sliding windows ------------------------------------------------------------------------------------------------------

def sliding_backbone(folder):
    """A text-only Qwen2 whose first layer sees eight tokens back."""
    small_backbone(folder, model_type="qwen2")
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0,
               "layer_types": ["sliding_attention", "full_attention"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_backbone_with_sliding_windows_trains_scores_and_is_one_of_an_ensemble(cfg, tmp_path):
    """Its rewards are those of transformers' own forward over each sequence alone, whose rows are longer than the
    window; and with a policy of it the answer is one line."""
    rows = [Comparison(f"Which number is it, of {i} and of those before it?", ["The first one, I think.", "yes", "no"],
                       [(0, 1), (0, 2)]) for i in range(9)]
    folder = str(write_comparisons(tmp_path / "texts", rows, progress=False))
    backbone = sliding_backbone(tmp_path / "sliding")
    run = replace(cfg, backbone=str(backbone), data=[folder], eval_data=[folder], max_steps=2)
    assert main(run) == 0
    before = load_file(backbone / "model.safetensors")
    assert all(not torch.equal(weights(run.out)[name], before[name]) for name in before if "proj.weight" in name)

    model = RewardModel.from_pretrained(run.out)
    scores = model.score_many(rows)
    stock = AutoModel.from_pretrained(run.out, attn_implementation="sdpa").eval()
    full = AutoModel.from_pretrained(run.out, attn_implementation="sdpa", layer_types=["full_attention"] * 2).eval()
    assert stock.config.layer_types[0] == "sliding_attention"
    of_full = []
    for row, values in zip(rows, scores):
        encoded = encode(row, model.processor)
        for ids, value in zip(encoded.response_ids, values):
            sequence = torch.tensor([encoded.prompt_ids + ids])
            assert sequence.shape[1] > 16
            with torch.no_grad():
                alone, without_window = (model.head(m(sequence).last_hidden_state[0, -1]) for m in (stock, full))
            assert value == pytest.approx(alone.item(), abs=1e-5)
            of_full.append(abs(value - without_window.item()))
    assert max(of_full) > 1e-3  # the window matters

    blind = RewardModel.from_backbone(small_backbone(tmp_path / "qwen3", model_type="qwen3"))
    blind.save_pretrained(tmp_path / "other")
    members = [run.out, str(tmp_path / "other")]
    evaluate.main(evaluate.Config(model=members, data=[folder], out=str(tmp_path / "scored"), ensemble="average"))
    lines = (tmp_path / "scored" / "texts" / "predictions.jsonl").read_text().splitlines()[1:]
    for line, values in zip(map(json.loads, lines), scores, strict=True):
        assert line["members"][run.out] == pytest.approx(values, abs=1e-5)
    with pytest.raises(ValueError, match="sliding-window layers .* no policy") as error:
        Policy.from_pretrained(sliding_backbone(tmp_path / "policy"))
    assert "\n" not in str(error.value)


# The run folder -------------------------------------------------------------------------------------------------------

def test_only_what_a_run_made_is_deleted_also_after_a_kill_in_the_midst(tmp_path):
    start_processes()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    for overwrite, resume in ((True, False), (False, True), (False, False)):
        with pytest.raises(ValueError, match="no run made what it holds"):
            train.prepare_run_folder(theirs, overwrite, resume)
    assert [file.name for file in theirs.iterdir()] == ["thesis.tex"]
    ours = tmp_path / "ours"
    train.prepare_run_folder(ours, False, False)
    for name in (".metrics.jsonl.partial", "metrics.jsonl"):  # a run killed in its first write, or before a checkpoint
        (ours / name).write_text("{")
        train.prepare_run_folder(ours, False, False)
    (ours / "metrics.jsonl").unlink()
    (ours / "config.json").write_text("{}")  # --overwrite killed in the midst of its deletion
    with pytest.raises(ValueError, match="--overwrite"):
        train.prepare_run_folder(ours, False, False)
    train.prepare_run_folder(ours, True, False)
    assert [file.name for file in ours.iterdir()] == [".run.lock"]


@pytest.mark.parametrize("content", [
    b"", b"no JSON", b"{}", b"[1, 2]", b'{"step": "one", "config": {}, "seconds": 0}', b'{"step": 1, "config": 5}',
    b'{"step": 1, "seconds": 0, "config": {}, "bytes": {"whole.safetensors": 7}}'])
def test_a_broken_checkpoint_is_one_line(cfg, content):
    folder = Path(cfg.out, "checkpoint-1")
    folder.mkdir(parents=True)
    Path(cfg.out, "metrics.jsonl").touch()
    (folder / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read.*; remove|is damaged; remove") as error:
        main(replace(cfg, resume=True))
    assert len(str(error.value)) < 400


def test_a_run_is_not_resumed_with_other_rows(cfg, tmp_path, monkeypatch):
    first = replace(cfg, data=[coin(tmp_path, 12)], eval_data=[])
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", stop_after(0))
        assert main(first) == 128 + signal.SIGTERM
    with pytest.raises(ValueError, match=r"rows of each set was \[11\], is \[12\]"):
        main(replace(first, resume=True, eval_data=first.data))


def test_the_curve_is_a_picture_whose_axis_begins_at_zero(tmp_path):
    """Of any title, also bytes that are no text; with a value that is not finite, a panel without any, values below
    zero."""
    losses = [(step, 0.7 / step) for step in range(1, 942)] + [(950, math.nan)]
    train.draw_curves(tmp_path / "curve.png", "runs/a<b>&$c$ \udc80", [
        ("loss & co", {"<train>": losses}, {"log 2": 0.69}, None), ("accuracy", {"none": []}, {}, 1),
        ("near", {"one": [(1, 7000.0), (2, 9000.0)]}, {}, None),
        ("below", {"one": [(1, -30.0), (2, 50.0)]}, {}, None)])
    picture = Image.open(tmp_path / "curve.png").convert("RGB")
    assert picture.size == (4 * 440, 365)
    left, right = (sum(picture.getpixel((x, y))[2] > picture.getpixel((x, y))[0] + 20 for x in columns
                       for y in range(80, 336)) for columns in (range(51, 60), range(300, 309)))
    assert left > 200 and 0 < right < 60  # the first loss is at the top, the last ones are at the bottom
    assert train.ticks(0, 940) == [0, 200, 400, 600, 800] and train.ticks(-30, 52.5) == [-20, 0, 20, 40]
    assert train.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


# Data as users bring it -----------------------------------------------------------------------------------------------

def test_a_folder_of_trl_rows_with_image_files_trains_end_to_end(tmp_path):
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    rows = []
    for i, colour in enumerate(["red", "blue", "green", "white"] * 5):
        Image.new("RGB", (64 + i, 56), colour).save(tmp_path / "mine" / "photos" / f"{i}.jpg")
        ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Colour?"}]}]
        rows.append({"prompt": ask, "images": [f"photos/{i}.jpg"],
                     "chosen": [{"role": "assistant", "content": colour}],
                     "rejected": [{"role": "assistant", "content": "pink"}]})
    (tmp_path / "mine" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = Config(data=[str(tmp_path / "mine" / "rows.jsonl")], out=str(tmp_path / "run"), max_steps=3).resolved()
    assert main(mine) == 0
    assert summary_of(mine.out)["n"] == 2  # a tenth of the rows, held out


def test_a_bad_row_stops_the_run_in_one_line_and_loses_nothing_or_is_skipped_and_counted(cfg, tmp_path, capsys):
    """It is met in the loop: the steps before it are saved, and once the row is repaired the run can be resumed."""
    folder = coin(tmp_path, 24)
    good = [json.loads(line) for line in open(f"{folder}/comparisons.jsonl")]
    last = Order([[1] * 24], [1.0], 8, 0).rows_of_step(2)[0][1]  # a row of the third step
    rows = [json.dumps(row) for row in good]
    rows[last] = "{"
    open(f"{folder}/comparisons.jsonl", "w").write("\n".join(rows) + "\n")
    bad = replace(cfg, data=[folder], epochs=1, max_steps=None)
    assert main(bad) == 1
    errors = capsys.readouterr().err
    assert f"train.py: {folder}/comparisons.jsonl:{last + 1}: " in errors and "2 steps are saved" in errors
    assert main(replace(bad, on_bad_row="skip", overwrite=True)) == 0
    assert "rows dropped: 1, bad row" in capsys.readouterr().out
    summary = summary_of(cfg.out)
    assert summary["dropped"] == {"bad row": 1, "longer than 512 tokens": 0} and summary["pairs_seen"] == 23


def test_a_held_out_row_that_cannot_be_used_is_named_before_the_first_step(cfg, tmp_path):
    rows = [Comparison("Which?", ["yes", "no"], [(0, 1)])] * 3
    held = write_comparisons(tmp_path / "held", [*rows, next(c for c in synthetic(9) if c.images)], progress=False)
    for image in held.glob("images/*.png"):
        image.write_bytes(b"no picture")
    broken = replace(cfg, eval_data=[str(held)], max_steps=1)
    with pytest.raises(ValueError, match="comparisons.jsonl:4: "):
        main(broken)
    assert not os.path.exists(f"{cfg.out}/metrics.jsonl")
    assert main(replace(broken, on_bad_row="skip")) == 0 and summary_of(cfg.out)["n_comparisons"] == 3


def test_a_row_that_cannot_be_scored_gives_its_reason_where_bad_rows_are_skipped(tiny, tmp_path):
    start_processes()
    rows = [Comparison("<image>?", ["a", "b"], [(0, 1)], images=["nowhere.png"]), Comparison("?", ["a", "b", "c"])]
    with pytest.raises(ValueError, match="nowhere.png"):
        score_rows(tiny, rows)
    rewards = score_rows(tiny, rows, on_bad_row="skip")
    assert isinstance(rewards[0], BadRow) and "nowhere.png" in str(rewards[0])
    assert rewards[1].rewards == pytest.approx(tiny.score("?", ["a", "b", "c"]), abs=1e-5)


def opened(**settings):
    data = open_data(Config(**settings))
    return data.sets, data.held_out


def test_rows_held_out_by_whole_prompts_are_preferred_to_rows_of_the_training_file(tmp_path):
    """data.py --hold_out writes held_out.jsonl; without it single rows are taken out, whose prompt may stay in training
    with others. And --eval_data is used also where drawn pictures are trained on."""
    rows = [Comparison("Which?", [f"yes {i}", "no"], [(0, 1)]) for i in range(20)]
    folder = write_comparisons(tmp_path / "plain", rows, progress=False)
    (training,), (held,) = opened(data=[str(folder)], eval_size=5)
    assert len(training) == 18 and [held[i].responses[0] for i in range(2)] == ["yes 0", "yes 10"]
    apart = "".join(f'{{"prompt": "Apart?", "chosen": "{i}", "rejected": "none"}}\n' for i in range(8))
    (folder / "held_out.jsonl").write_text(apart)
    (training,), (held,) = opened(data=[str(folder)], eval_size=5)
    assert len(training) == 20 and [held[i].responses[0] for i in range(5)] == ["0", "1", "3", "4", "6"]
    (training,), (held,) = opened(train_size=3, eval_data=[str(folder)])
    assert len(training) == 3 and len(held) == 20


def test_an_over_long_comparison_is_dropped_and_counted_never_cut(cfg, tmp_path):
    rows = [Comparison("Short?", ["yes", "no"], [(0, 1)])] * 7 + [Comparison("Long?", ["word " * 600, "no"], [(0, 1)])]
    folder = str(write_comparisons(tmp_path / "long", rows, progress=False))
    assert main(replace(cfg, data=[folder], eval_data=[folder], max_steps=1)) == 0
    summary = summary_of(cfg.out)
    assert summary["dropped"] == {"bad row": 0, "longer than 512 tokens": 1} and summary["pairs_seen"] == 7
    only_long = str(write_comparisons(tmp_path / "only", rows[7:] * 3, progress=False))
    with pytest.raises(ValueError, match="not one pair could be used"):
        main(replace(cfg, data=[only_long], max_steps=1, overwrite=True))
    assert not os.path.exists(f"{cfg.out}/head.safetensors")


@pytest.mark.parametrize("change, words", [
    ({"lr": 0.0}, "--lr 0.0 must be above zero"), ({"clip": math.nan}, "--clip nan"), ({"lr": math.inf}, "--lr inf"),
    ({"lora": -1}, "--lora -1"), ({"length_norm": True, "paradigm": "critic"}, "--length_norm is for"),
    ({"warmup": 1.5}, "--warmup 1.5 is a share"),
    ({"lr": 1e30}, "--lr 1e[+]30"), ({"epochs": math.inf}, "--epochs inf"), ({"epochs": 1e9}, "--epochs 1e[+]09"),
    ({"train_size": 10**7}, "--train_size 10000000: at most"),
    ({"warmup": math.inf}, "--warmup inf"), ({"warmup": -1.0}, "--warmup -1.0"), ({"batch_size": 10**400}, "--batch"),
    ({"data": ["nowhere"]}, "does not exist"), ({"eval_data": ["nowhere"]}, "does not exist"),
    ({"backbone": "nowhere/at-all"}, "cannot load"), ({"data": ["x:heavy"]}, "x:heavy does not exist"),
    ({"data": ["x:nan"]}, "x:nan does not exist"), ({"data": ["nowhere:2.0"]}, "nowhere does not exist")])
def test_a_wrong_flag_is_one_clear_line(cfg, change, words):
    with pytest.raises(ValueError, match=words) as error:
        main(replace(cfg, **change).resolved())
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
