"""The loop: the same step whatever the packs, micro-steps and ranks; resume; signals; bad input."""
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

import train
from conftest import ROOT, TWO_RANKS, command, real_curves, small_backbone
from data import BadRow, Comparison, Order, read_comparisons, synthetic, write_comparisons
from model import RewardModel, Score, pack
from train import Config, learning_rate, main, open_data, score_over_ranks, start_processes
from two_ranks import gradient, gradient_in_paradigm, stop_after


def draw(folder):
    """24 drawn comparisons, laid so that of the first step's rows the first of two ranks gets those with an image, the
    second those without: lines of equal length are dealt out in turn. Every sixth is in held.jsonl as well."""
    visual, text = ([c for c in synthetic(200) if bool(c.images) == kind][:12] for kind in (True, False))
    rows = [None] * 24
    for place, (_, row) in enumerate(Order([[1] * 24], [1.0], batch_size=64, seed=0).step(0)):
        rows[row] = (text if place % 2 else visual)[place // 2]
    write_comparisons(folder, rows, bar=False)
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
    return str(write_comparisons(tmp_path / "coin", rows, bar=False))


# One step -------------------------------------------------------------------------------------------------------------

def test_a_step_does_not_depend_on_how_its_pairs_fall_into_packs(backbones, drawn):
    start_processes()
    whole, whole_sums, _ = gradient(backbones(), drawn, pack_tokens=4096)
    parts, parts_sums, counts = gradient(backbones(), drawn, pack_tokens=128)
    assert counts[0, 1] > 5 and relative(parts, whole) < 1e-6
    assert parts_sums.tolist() == pytest.approx(whole_sums.tolist(), rel=1e-5)


def four_steps(backbone, data, out):
    """Of two ranks or nodes, each step is dear."""
    return replace(small_run(backbone, data, out), max_steps=4)


def make_two_ranks(folder, backbones):
    # the first's embedding and head are one weight
    kinds = {"critic": "internvl", "direct": "qwen2_5_vl", "think": "qwen3_vl"}
    writers = {p: str(small_backbone(folder / p, kind=k, vocabulary_head=True)) for p, k in kinds.items()}
    told = {"backbone": str(backbones()), "writers": writers, "drawn": str(draw(folder / "drawn"))}
    return told | {"config": asdict(four_steps(backbones(), folder / "drawn", folder / "one"))}


TWO_RANKS["train"] = make_two_ranks


@pytest.fixture(scope="module")
def of_two(two_ranks, backbones):
    """The folder, what two_ranks.py found, and what it said; beside it in the folder, the run of one process."""
    root, run = two_ranks
    here = root / "train"
    assert run.returncode == 0, run.stderr[-3000:]
    assert main(four_steps(backbones(), here / "drawn", here / "one")) == 0
    return here, torch.load(here / "results.pt", weights_only=True), run.stdout, run.stderr


def test_two_ranks_take_the_step_of_one(of_two, backbones, drawn):
    """With DDP and sharded (with recomputed activations), all weights and LoRA's updates, and with one rank whose packs
    hold no image beside one that holds all of them."""
    start_processes()
    for kind, lora in (("steps", 0), ("lora", 4)):
        one, one_sums, _ = gradient(backbones(), drawn, lora=lora)
        for two, two_sums, counts in of_two[1][kind]:
            assert counts[:, 2].tolist() == [12, 0]
            assert counts[1, 1] > counts[0, 1] > 1  # several micro-steps, and not equally many
            assert set(two) == set(one) and relative(two, one) < 1e-6
            assert two_sums.tolist() == pytest.approx(one_sums.tolist(), rel=1e-5)


def test_two_ranks_take_the_step_of_one_in_every_paradigm(of_two, drawn):
    start_processes()
    for paradigm, by_two in of_two[1]["paradigms"].items():
        one, one_sums, _ = gradient_in_paradigm(of_two[0] / paradigm, drawn, paradigm)
        assert len(one) > 50
        for two, two_sums, counts in by_two:
            assert counts[:, 1].min() > 1 and len(counts) == 2  # several micro-steps on each rank
            assert set(two) == set(one) and relative(two, one) < 1e-6
            assert two_sums.tolist() == pytest.approx(one_sums.tolist(), rel=1e-5)


def test_a_sharded_model_computes_with_the_very_weights_of_an_unsharded_one(of_two):
    """Autocast rounds the weights of products to bf16 and nothing else: so must what FSDP gathers, or small updates of
    norms would be saved and never felt."""
    for kind in ("bf16", "bf16 lora"):  # frozen in bf16, what is trained in fp32
        (plain, norm), (sharded, sharded_norm) = of_two[1][kind]
        assert torch.equal(plain, sharded) and sharded_norm == pytest.approx(norm, rel=1e-2)


def test_two_ranks_end_where_one_ends(of_two):
    """Also sharded, stopped by a signal to one rank, and resumed where only the first rank has the checkpoint. Four
    steps of AdamW at 1e-3: gradients differ by rounding (1e-7), but Adam divides each by its own size, so that a weight
    whose gradient is as small as the rounding may move by up to the rate either way: hence 1e-3 for the weights."""
    here, results, said, _ = of_two
    assert results["status"] == [128 + signal.SIGTERM, 0, 128 + signal.SIGTERM, 128 + signal.SIGTERM, 0]
    assert said.startswith("world size 2, device cpu") and "not on a disk that all ranks share" in said
    for folder in ("two", "sharded-0"):
        assert relative(weights(here / folder), weights(here / "one")) < 1e-3
        losses = [[row["loss"] for row in log_of(here / name)] for name in (folder, "one")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        # The sharded run examines itself after step 3: a forward without gradients must not hide the head from the norm
        norms = [[row["grad_norm"] for row in log_of(here / name)] for name in (folder, "one")]
        assert norms[0] == pytest.approx(norms[1], rel=1e-2)
        summaries = [summary_of(here / name) for name in (folder, "one")]
        assert summaries[0]["pairs_seen"] == summaries[1]["pairs_seen"] and summaries[0]["n"] == summaries[1]["n"]
    assert not (here / "sharded-1" / "config.json").exists()


def test_a_checkpoint_in_parts_is_read_by_another_number_of_ranks_and_holds_no_pickle(of_two):
    """Written by two ranks, the last two kept; gone on from by one, sharded, and by one that is not."""
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
    """Also where a lock of a killed run had stayed on a disk that is not shared: its word is not the first rank's."""
    (error, left), shared = of_two[1]["full disk"]
    assert error.startswith("cannot write") and "No space left" in error and left == ["checkpoint-1"]
    assert shared == [True, False]


@command
def two_nodes_of_train(folder, backbones):
    cfg = four_steps(backbones(), draw(folder / "drawn"), "run")
    words = flags(replace(cfg, shard="node", resume=True, save_every=1))
    return ["tests/two_nodes.py", folder, *words]


def test_two_nodes_take_the_steps_of_one_and_go_on_by_themselves_after_a_worker_is_killed(two_nodes_of_train,
                                                                                          backbones):
    """Each with a disk of its own, sharded within the node; the first rank alone writes, and resumes for all."""
    here, run = two_nodes_of_train
    assert run.returncode == 0, run.stderr
    assert main(four_steps(backbones(), here / "drawn", here / "one")) == 0
    assert "going on from step" in (here / "node-0" / "said").read_text() and not (here / "node-1" / "run").exists()
    assert relative(weights(here / "node-0" / "run"), weights(here / "one")) < 1e-3
    losses = [[row["loss"] for row in log_of(folder)] for folder in (here / "node-0" / "run", here / "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_rewards_do_not_depend_on_who_computes_them(of_two, drawn):
    here, results, *_ = of_two
    alone = RewardModel.from_pretrained(here / "two").score_many([*read_comparisons(drawn)])
    assert [len(values) for values in results["rewards"]] == [len(values) for values in alone]
    assert sum(results["rewards"], []) == pytest.approx(sum(alone, []), abs=1e-5)


class Questions(TorchDispatchMode):
    """Counts where a script asks a tensor for a number: on a GPU each of them waits for all that was begun before."""
    scripts = {str(ROOT / name) for name in ("model.py", "train.py")}

    def __init__(self, monkeypatch):
        super().__init__()
        self.asked = Counter()
        for name in ("tolist", "cpu"):  # these ask below the dispatcher
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def note(self):
        frames = (frame for frame, _ in traceback.walk_stack(None) if "/torch/" not in frame.f_code.co_filename)
        place = next(f for f in frames if f.f_code.co_filename != __file__).f_code
        if place.co_filename in self.scripts:
            self.asked[place.co_name] += 1

    def counted(self, method):
        return lambda *arguments: self.note() or method(*arguments)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten._local_scalar_dense.default:  # .item(), int(), float(), bool()
            self.note()
        return function(*arguments, **(keywords or {}))


def test_a_step_asks_the_device_for_no_number_until_its_end(tiny, drawn, monkeypatch):
    """Neither the forward nor a micro-step, so that the device is never without work; but the vision tower's windows
    are asked for, once a pack."""
    start_processes()
    model, rows = copy.deepcopy(tiny).train(), read_comparisons(drawn)
    packs = [pack([rows[i]], model.processor) for i in range(3)]
    assert any(len(p.image_grid_thw) for p in packs)
    optimizer, asked = torch.optim.SGD(model.parameters(), lr=0.0), []
    for some in (packs[:1], packs):
        with Questions(monkeypatch) as questions:
            train.take_step(model, optimizer, some, packs[0], len(some), 3, 0, Config())
        asked.append(dict(questions.asked))
    for n, found in zip((1, 3), asked):  # the lengths of the windows, once for the tower's two kinds of layers
        assert found.pop("attend_by_length") <= 2 * n
    assert asked[0] == asked[1] and asked[0].keys() == {"take_step"} and asked[0]["take_step"] < 5
def test_rows_are_dealt_out_by_their_length(tmp_path, monkeypatch):
    """Each once, whatever the number of ranks, and to the rank that has least."""
    rows = [Comparison("?", ["a" * n, "b"], [(0, 1)]) for n in (1, 900, 1, 1, 500, 500, 1, 1)]
    sets = [read_comparisons(write_comparisons(tmp_path / "rows", rows, bar=False)), synthetic(4)]
    names = [(0, i) for i in range(8)] + [(1, i) for i in range(4)]
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
    hands = train.deal(names, sets)
    assert sorted(sum(hands, [])) == names
    sizes = [sum(int(sets[0].table[i, 1]) for s, i in hand if s == 0) for hand in hands]
    assert abs(sizes[0] - sizes[1]) < 200 < 900 < min(sizes)
    assert train.deal(names[8:], sets) == [[(1, 0), (1, 2)], [(1, 1), (1, 3)]]


def test_micro_steps_of_the_filler_are_counted_and_change_nothing(cfg, monkeypatch):
    assert main(replace(cfg, max_steps=2)) == 0
    alone, real = log_of(cfg.out), train.gather

    def beside_one_with_a_pack_more(values):
        return torch.tensor([values, [0] * 5 + [values[5] + 1, 0]]) if len(values) == 7 else real(values)

    monkeypatch.setattr(train, "gather", beside_one_with_a_pack_more)
    assert main(replace(cfg, max_steps=2, overwrite=True)) == 0
    assert [row["fillers"] for row in alone] == [0, 0] and [row["fillers"] for row in log_of(cfg.out)] == [1, 1]
    assert [row["loss"] for row in alone] == [row["loss"] for row in log_of(cfg.out)]


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
    assert capsys.readouterr().out == "world size 1, device cpu (1 GPUs in sight)\n"


# The run --------------------------------------------------------------------------------------------------------------

def test_a_run_leaves_a_reward_model_its_log_and_a_summary(cfg, monkeypatch, capsys):
    """And asks for no step beyond the last."""
    asked, real = [], Order.step
    monkeypatch.setattr(Order, "step", lambda self, step: asked.append(step) or real(self, step))
    with real_curves():
        assert main(cfg) == 0
    out, said = cfg.out, capsys.readouterr().out
    assert asked == [0, 1, 2, 3, 4, 5] and [row["step"] for row in log_of(out)] == [1, 2, 3, 4, 5, 6]
    summary = summary_of(out)
    assert {"accuracy", "accuracy_by_category", "accuracy_images_shuffled", "n", "seconds"} <= set(summary)
    assert summary["pairs_seen"] == sum(row["pairs"] for row in log_of(out)) > 0
    assert "what the texts alone tell" in said and "one half" not in said
    assert f"--model {out} --data FOLDER" in said
    assert len(RewardModel.from_pretrained(out).score("What?", ["a", "b", "c"])) == 3
    assert not [name for name in os.listdir(out) if "checkpoint" in name]
    assert find_spec("matplotlib") is None or "mean margin" in open(f"{out}/curve.svg").read()
    os.mkdir(f"{out}/checkpoint-6")  # as of a run that was killed at its very end
    for change, words in [({}, "not empty"), ({"resume": True}, "finished run"),
                          ({"resume": True, "overwrite": True}, "contradict")]:
        with pytest.raises(ValueError, match=words):
            main(replace(cfg, **change))
    assert not os.path.exists(f"{out}/checkpoint-6")
    assert main(replace(cfg, overwrite=True, max_steps=0)) == 0  # the untrained model
    assert summary_of(out)["pairs_seen"] == 0 and RewardModel.from_pretrained(out)


def test_a_process_that_is_alone_sends_itself_no_message():
    """The thread that copies one would leave less of two cores to all that follows: see gather_objects."""
    start_processes()
    item = object()
    assert train.gather_objects(item)[0] is item and train.gather([1, 2]).tolist() == [[1, 2]]


def test_sharding_over_a_single_process_changes_nothing(cfg, tmp_path):
    alone = replace(cfg, max_steps=2, eval_data=[], eval_size=0)
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
    assert "3 steps are saved" in (said := capsys.readouterr().err) and "--resume" in said
    with pytest.raises(ValueError, match="not empty"):
        main(part)
    with pytest.raises(ValueError, match="batch_size was 8, is 16"):
        main(replace(part, resume=True, batch_size=16))
    assert main(replace(part, resume=True)) == 0
    whole, resumed = weights(cfg.out), weights(part.out)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    losses = [[(row["step"], row["loss"]) for row in log_of(c.out)] for c in (cfg, part)]
    assert losses[0] == losses[1]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="what a process maps is told by Linux alone")
def test_a_resumed_run_does_not_keep_the_checkpoint_that_it_replaces(cfg, monkeypatch):
    """A file that is mapped keeps its place on the disk after it is replaced: 93 GB for the 7B."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", stop_after(2))
        assert main(cfg) == 128 + signal.SIGTERM
    mapped, real, maps = [], train.take_step, Path("/proc/self/maps")
    monkeypatch.setattr(train, "take_step", lambda *a: mapped.append("checkpoint-" in maps.read_text()) or real(*a))
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


def test_the_loss_of_a_rank_is_one_line_and_the_last_word_of_the_others(of_two):
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


def test_signals_are_noted_in_the_loop_and_end_the_process_at_once_outside_of_it():
    """And a SIGHUP that nohup has the process ignore stays ignored."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]  # a shell's `&` ignores SIGINT
    with train.stop_signals() as told:
        assert told.number == 0
        signal.raise_signal(signal.SIGTERM)
        assert told.number == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        assert told.number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one ends it
    assert [signal.getsignal(number) for number in numbers] == [signal.default_int_handler] * 3
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with train.stop_signals() as told:
        signal.raise_signal(signal.SIGHUP)
        assert told.number == 0
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("shard", ["none", "all"])
def test_a_full_disk_leaves_the_checkpoint_before_and_a_damaged_one_is_one_line(cfg, monkeypatch, capfd, shard):
    """And nothing else that lies there is taken for a checkpoint."""
    real_save, cfg = train.save_file, replace(cfg, shard=shard, save_every=2)

    def full_the_second_time(*rest):
        if os.path.exists(f"{cfg.out}/checkpoint-2"):
            raise OSError("No space left on device")
        real_save(*rest)

    monkeypatch.setattr(train, "save_file", full_the_second_time)
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
        file.with_name("state.json").write_text(json.dumps(state | {"bytes": train.bytes_of(file.parent)}))

    for write, words in ((other_model, "does not fit this model"), (lambda: os.truncate(file, 1000), "is damaged"),
                         (lambda: shutil.copy(file, f"{file}.safetensors"), "is damaged"),
                         (lambda: [f.unlink() for f in file.parent.glob("*.safetensors")], "is damaged")):
        write()
        capfd.readouterr()
        with pytest.raises(ValueError, match=f"checkpoint-2 {words}") as error:
            main(replace(cfg, resume=True))
        assert len(str(error.value)) < 400 and "Traceback" not in "".join(capfd.readouterr())


def test_a_checkpoint_is_written_once(tmp_path, monkeypatch):
    """A run that was resumed and stopped before its next step has nothing to add: of other ranks' parts there would
    otherwise be two kinds in one folder."""
    start_processes()
    p = torch.nn.Parameter(torch.ones(2))
    optimizer, state = torch.optim.AdamW([("p", p)], fused=True), {"step": 1, "seconds": 0.0, "config": {}}
    train.save_checkpoint(tmp_path, optimizer, state, in_parts=False)
    p.data += 1
    monkeypatch.setattr(train, "save_file", None)
    train.save_checkpoint(tmp_path, optimizer, state, in_parts=False)
    assert train.load_checkpoint(tmp_path, optimizer, {}, (), in_parts=False) == {"step": 1, "seconds": 0.0}
    assert p.tolist() == [1, 1]


def test_a_failure_after_the_last_step_loses_no_step(cfg, monkeypatch):
    """The disk fills up while the model is saved: resuming goes straight to the end, also with --save_every 0."""
    never = replace(cfg, save_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
        with pytest.raises(OSError, match="No space"):
            main(never)
    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", None)
        assert main(replace(never, resume=True)) == 0
    assert summary_of(cfg.out)["steps"] == 6


def test_a_gradient_that_is_not_finite_skips_the_step_and_ten_in_a_row_end_the_run(cfg, monkeypatch, capsys):
    def poisoned(steps):
        def loss(*arguments, **named):
            made.append(1)
            return real(*arguments, **named) * (math.nan if len(made) - 1 in steps else 1.0)
        return loss

    real, made, one_pack = train.pairwise_loss, [], replace(cfg, pack_tokens=4096)
    monkeypatch.setattr(train, "pairwise_loss", poisoned({1, 3}))
    assert main(one_pack) == 0
    assert summary_of(cfg.out)["bad_gradients"] == 2
    assert all(torch.isfinite(w).all() for w in weights(cfg.out).values())
    made.clear()
    monkeypatch.setattr(train, "pairwise_loss", poisoned(set(range(100))))
    assert main(replace(one_pack, overwrite=True, max_steps=50)) == 1
    said = capsys.readouterr().err
    assert len(made) == 10 and "ten steps in a row" in said and "10 steps are saved" in said


def test_a_model_whose_weights_or_rewards_are_not_finite_is_no_result(cfg, monkeypatch):
    """Neither announced nor saved; and a checkpoint that one can go on from is not replaced by one that one cannot."""
    with pytest.raises(ValueError, match="rewards are not finite"):
        main(replace(cfg, lr=1e12, max_steps=3))
    real, taken = train.take_step, []

    def spoils_the_fourth(model, *rest):
        taken.append(real(model, *rest))
        if len(taken) == 4:
            next(model.parameters()).data.fill_(math.inf)
        return taken[-1]

    monkeypatch.setattr(train, "take_step", spoils_the_fourth)
    with pytest.raises(ValueError, match="weights are not finite after step 4"):
        main(replace(cfg, overwrite=True, save_every=2))
    assert last_step_of(cfg.out) == 2 and not os.path.exists(f"{cfg.out}/head.safetensors")


def test_eight_pairs_are_memorised(cfg, tmp_path):
    rows = [Comparison(f"Number {i}?", ["yes", "no"] if i % 3 else ["no", "yes"], [(0, 1)]) for i in range(8)]
    folder = str(write_comparisons(tmp_path / "eight", rows, bar=False))
    assert main(replace(cfg, data=[folder], eval_data=[folder], max_steps=25, lr=3e-3)) == 0
    assert summary_of(cfg.out)["accuracy"] == 1.0


def test_a_run_that_never_leaves_log_2_says_so_and_exits_non_zero(cfg, tmp_path, capsys):
    rows = [Comparison("Which?", ["yes", "no"], [(i, 1 - i)]) for i in range(2)]
    folder = str(write_comparisons(tmp_path / "coin", rows, bar=False))
    assert main(replace(cfg, data=[folder], eval_data=[folder], batch_size=2, max_steps=50)) == 1
    assert "ended at log 2 or above" in capsys.readouterr().err
    assert summary_of(cfg.out)["accuracy"] == 0.5


# LoRA -----------------------------------------------------------------------------------------------------------------

def test_updates_begin_as_the_base_model_and_merge_into_an_ordinary_one(backbones, drawn, tmp_path):
    """From weights in bf16, as on a GPU, too: they are saved in fp32, or small updates would be rounded away."""
    rows = [*read_comparisons(drawn)]
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = RewardModel.from_backbone(backbones(), dtype=dtype).float().eval()
        base = sum(model.score_many(rows), [])
        train.add_lora(model, 4, vision=True)
        assert sum(model.score_many(rows), []) == base
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_b"):
                    p.normal_(std=1e-2)
        updated = sum(model.score_many(rows), [])
        assert max(abs(a - b) for a, b in zip(updated, base)) > 0.01
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.to(dtype)
        model.save_pretrained(tmp_path / "merged", train.merged(model.state_dict()))
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
    for folder, steps in (("whole", [None]), ("parts", [1, None])):  # sharded: checkpoints in parts
        for stop in steps:
            with monkeypatch.context() as patch:
                if stop:
                    patch.setattr(train, "learning_rate", stop_after(stop))
                main(replace(low, out=str(tmp_path / folder), shard="all", resume=True))
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    eyes = replace(low, overwrite=True, lora_vision=True, max_steps=1)
    assert main(eyes) == 0
    assert any("visual" in name and not torch.equal(w, base[name])
               for name, w in weights(low.out).items() if name in base)
    assert main(replace(low, overwrite=True, freeze_vision=True, max_steps=0)) == 0
    assert all(torch.equal(weights(low.out)[name], base[name]) for name in base)


# The run folder -------------------------------------------------------------------------------------------------------

def test_only_what_a_run_made_is_deleted_also_after_a_kill_in_the_midst(tmp_path):
    start_processes()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    for overwrite, resume in ((True, False), (False, True), (False, False)):
        with pytest.raises(ValueError, match="no run made what it holds"):
            train.claim_folder(theirs, overwrite, resume)
    assert [file.name for file in theirs.iterdir()] == ["thesis.tex"]
    ours = tmp_path / "ours"
    train.claim_folder(ours, False, False)
    for name in (".metrics.jsonl.partial", "metrics.jsonl"):  # a run killed in its first write, or before a checkpoint
        (ours / name).write_text("{")
        train.claim_folder(ours, False, False)
    (ours / "metrics.jsonl").unlink()
    (ours / "config.json").write_text("{}")  # --overwrite killed in the midst of its deletion
    with pytest.raises(ValueError, match="--overwrite"):
        train.claim_folder(ours, False, False)
    train.claim_folder(ours, True, False)
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


def test_a_run_does_not_go_on_with_other_rows_than_it_began_with(cfg, tmp_path, monkeypatch):
    first = replace(cfg, data=[coin(tmp_path, 12)], eval_data=[])
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", stop_after(0))
        assert main(first) == 128 + signal.SIGTERM
    with pytest.raises(ValueError, match=r"rows of each set was \[11\], is \[12\]"):
        main(replace(first, resume=True, eval_data=first.data))


def test_the_curve_begins_at_zero_and_survives_any_name(tmp_path):
    """And a value that is not finite, a panel without any, and values below zero."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "curve.svg"
    losses = [(step, 0.7 / step) for step in range(1, 942)] + [(950, math.nan)]
    with real_curves():
        picture = train.draw_curves(file, "runs/a<b>&$c$", [
            ("loss & co", {"<train>": losses}, {"log 2": 0.69}, None), ("accuracy", {"none": []}, {}, 1),
            ("near", {"one": [(1, 7000.0), (2, 9000.0)]}, {}, None),
            ("below", {"one": [(1, -30.0), (2, 50.0)]}, {}, None)])
    assert picture == file.read_text()
    texts = {text.text for text in ElementTree.parse(file).getroot().iter("{http://www.w3.org/2000/svg}text")}
    assert {"runs/a<b>&$c$", "loss & co", "<train>", "log 2", "0.0", "1.0", "0", "8000", "\u221220"} <= texts


def test_a_run_without_matplotlib_ends_well_and_says_what_draws_the_curve(cfg, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with real_curves():
        assert main(replace(cfg, max_steps=1)) == 0
    assert "no curve.svg: pip install matplotlib draws it\n" in capsys.readouterr().out
    assert not os.path.exists(f"{cfg.out}/curve.svg") and summary_of(cfg.out)["steps"] == 1


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
    """It is met in the loop: the steps before it are saved, and after mending the row the run goes on."""
    folder = coin(tmp_path, 24)
    good = [json.loads(line) for line in open(f"{folder}/comparisons.jsonl")]
    last = Order([[1] * 24], [1.0], 8, 0).step(2)[0][1]  # a row of the third step
    rows = [json.dumps(row) for row in good]
    rows[last] = "{"
    open(f"{folder}/comparisons.jsonl", "w").write("\n".join(rows) + "\n")
    bad = replace(cfg, data=[folder], epochs=1, max_steps=None)
    assert main(bad) == 1
    said = capsys.readouterr().err
    assert f"train.py: {folder}/comparisons.jsonl:{last + 1}: " in said and "2 steps are saved" in said
    assert main(replace(bad, on_bad_row="skip", overwrite=True)) == 0
    summary = summary_of(cfg.out)
    assert summary["dropped"] == {"bad row": 1, "longer than 512 tokens": 0} and summary["pairs_seen"] == 23


def test_a_held_out_row_that_cannot_be_used_is_named_before_the_first_step(cfg, tmp_path):
    rows = [Comparison("Which?", ["yes", "no"], [(0, 1)])] * 3
    held = write_comparisons(tmp_path / "held", [*rows, next(c for c in synthetic(9) if c.images)], bar=False)
    for image in held.glob("images/*.png"):
        image.write_bytes(b"no picture")
    broken = replace(cfg, eval_data=[str(held)], max_steps=1)
    with pytest.raises(ValueError, match="comparisons.jsonl:4: "):
        main(broken)
    assert not os.path.exists(f"{cfg.out}/metrics.jsonl")
    assert main(replace(broken, on_bad_row="skip")) == 0 and summary_of(cfg.out)["n_comparisons"] == 3


def test_a_row_that_cannot_be_scored_gives_its_reason_if_told_to_skip_it(tiny, tmp_path):
    start_processes()
    rows = [Comparison("<image>?", ["a", "b"], [(0, 1)], images=["nowhere.png"]), Comparison("?", ["a", "b", "c"])]
    with pytest.raises(ValueError, match="nowhere.png"):
        score_over_ranks(tiny, rows)
    rewards = score_over_ranks(tiny, rows, on_bad_row="skip")
    assert isinstance(rewards[0], BadRow) and "nowhere.png" in str(rewards[0])
    assert rewards[1].rewards == pytest.approx(tiny.score("?", ["a", "b", "c"]), abs=1e-5)


def test_rows_held_out_by_whole_prompts_are_preferred_to_rows_of_the_training_file(tmp_path):
    """data.py --hold_out writes held_out.jsonl; without it single rows are taken out, whose prompt may stay in training
    with others. And --eval_data is used also where drawn pictures are trained on."""
    rows = [Comparison("Which?", [f"yes {i}", "no"], [(0, 1)]) for i in range(20)]
    folder = write_comparisons(tmp_path / "plain", rows, bar=False)
    (training,), _, (held,) = open_data(Config(data=[str(folder)], eval_size=5))
    assert len(training) == 18 and [held[i].responses[0] for i in range(2)] == ["yes 0", "yes 10"]
    apart = "".join(f'{{"prompt": "Apart?", "chosen": "{i}", "rejected": "none"}}\n' for i in range(8))
    (folder / "held_out.jsonl").write_text(apart)
    (training,), _, (held,) = open_data(Config(data=[str(folder)], eval_size=5))
    assert len(training) == 20 and [held[i].responses[0] for i in range(5)] == ["0", "1", "3", "4", "6"]
    (training,), _, (held,) = open_data(Config(train_size=3, eval_data=[str(folder)]))
    assert len(training) == 3 and len(held) == 20


def test_an_over_long_comparison_is_dropped_and_counted_never_cut(cfg, tmp_path):
    rows = [Comparison("Short?", ["yes", "no"], [(0, 1)])] * 7 + [Comparison("Long?", ["word " * 600, "no"], [(0, 1)])]
    folder = str(write_comparisons(tmp_path / "long", rows, bar=False))
    assert main(replace(cfg, data=[folder], eval_data=[folder], max_steps=1)) == 0
    summary = summary_of(cfg.out)
    assert summary["dropped"] == {"bad row": 0, "longer than 512 tokens": 1} and summary["pairs_seen"] == 7
    only_long = str(write_comparisons(tmp_path / "only", rows[7:] * 3, bar=False))
    with pytest.raises(ValueError, match="not one pair could be used"):
        main(replace(cfg, data=[only_long], max_steps=1, overwrite=True))
    assert not os.path.exists(f"{cfg.out}/head.safetensors")


@pytest.mark.parametrize("change, words", [
    ({"lr": 0.0}, "--lr 0.0 must be above zero"), ({"clip": math.nan}, "--clip nan"), ({"lr": math.inf}, "--lr inf"),
    ({"lora": -1}, "--lora -1"), ({"lora_vision": True}, "needs --lora"),
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
