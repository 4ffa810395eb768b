"""The loop: the same step whatever the packs, micro-steps and ranks; resume; signals; bad input. In the order of train.py."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from conftest import ROOT
from data import Comparison, Order, World, synthetic, write_comparisons
from model import RewardModel
from train import Config, learning_rate, main
from two_ranks import gradient

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """24 drawn comparisons, laid so that of the first step's rows the first of two ranks gets those with an image, the second those
    without."""
    visual, text = ([c for c in synthetic(200) if bool(c.images) == kind][:12] for kind in (True, False))
    rows = [None] * 24
    for place, (_, row) in enumerate(Order([[1] * 24], [1.0], batch_size=64, seed=0).step(0)):
        rows[row] = (text if place % 2 else visual)[place // 2]
    return write_comparisons(tmp_path_factory.mktemp("train") / "drawn", rows, bar=False)


@pytest.fixture
def cfg(backbones, drawn, tmp_path):
    """A run of six short steps on the tiny backbone of the tests, through the same flags as the 7B."""
    return Config(backbone=str(backbones()), data=[str(drawn)], eval_data=[str(drawn)], out=str(tmp_path / "run"), lr=1e-3, batch_size=8,
                  max_steps=6, max_pixels=112 * 112, pack_tokens=512, eval_every=0).resolved()


def torchrun(n, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=ROOT, env=environment)


def flags(cfg):
    """The config as a command line."""
    out = []
    for name, value in vars(cfg).items():
        if value not in (None, []):
            out += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return out


def weights(folder):
    return load_file(f"{folder}/model.safetensors") | load_file(f"{folder}/head.safetensors")


def relative(a, b):
    """Norm of the difference over all tensors, relative to the norm of b."""
    difference = sum(((a[k] - b[k]).double() ** 2).sum() for k in b)
    return math.sqrt(difference / sum((b[k].double() ** 2).sum() for k in b))


# ----------------------------------------------------------------------------------------------- one step


def test_a_step_does_not_depend_on_how_its_pairs_fall_into_packs(backbones, drawn):
    whole, whole_sums, _ = gradient(ALONE, backbones(), drawn, pack_tokens=4096)
    parts, parts_sums, shared = gradient(ALONE, backbones(), drawn, pack_tokens=128)
    assert shared[0, 1] > 5 and relative(parts, whole) < 1e-6
    assert parts_sums.tolist() == pytest.approx(whole_sums.tolist(), rel=1e-5)


def test_two_ranks_take_the_step_of_one(backbones, drawn, tmp_path):
    """With DDP and sharded (with recomputed activations), and with one rank whose packs hold no image beside one that holds all of them."""
    run = torchrun(2, "tests/two_ranks.py", backbones(), drawn, tmp_path / "two.pt")
    assert run.returncode == 0, run.stderr[-2000:]
    one, one_sums, _ = gradient(ALONE, backbones(), drawn)
    for two, two_sums, shared in torch.load(tmp_path / "two.pt", weights_only=True):
        assert shared[:, 2].tolist() == [12, 0] and shared[1, 1] > shared[0, 1] > 1  # several micro-steps, and not equally many
        assert relative(two, one) < 1e-6
        assert two_sums.tolist() == pytest.approx(one_sums.tolist(), rel=1e-5)


def test_the_learning_rate_rises_and_falls():
    cfg = Config(lr=3e-6, warmup=0.1)
    rates = [learning_rate(s, 100, cfg) for s in range(100)]
    assert rates[0] == pytest.approx(3e-7) and max(rates) == 3e-6 == rates[9] and 0 < rates[-1] < 1e-8
    assert rates[9:] == sorted(rates[9:], reverse=True)


# ----------------------------------------------------------------------------------------------- the run


def test_a_run_leaves_a_reward_model_its_log_and_a_summary(cfg):
    assert main(cfg, ALONE) == 0
    out = cfg.out
    rows = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    summary = json.load(open(f"{out}/summary.json"))
    assert {"accuracy", "accuracy_by_category", "accuracy_images_shuffled", "n", "seconds", "pairs_seen", "parameters"} <= set(summary)
    assert summary["pairs_seen"] == sum(row["pairs"] for row in rows) and "<svg" in open(f"{out}/curve.svg").read()
    assert len(RewardModel.from_pretrained(out).score("What?", ["a", "b", "c"])) == 3
    assert not os.path.exists(f"{out}/checkpoint.pt")
    for change, words in [({}, "not empty"), ({"resume": True}, "finished run"), ({"resume": True, "overwrite": True}, "contradict")]:
        with pytest.raises(ValueError, match=words):
            main(replace(cfg, **change), ALONE)
    assert main(replace(cfg, overwrite=True, max_steps=1), ALONE) == 0


@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_end_where_one_ends(cfg, tmp_path, shard):
    """Six steps of AdamW at 1e-3. Gradients differ by rounding (1e-7), but Adam divides each by its own size, so that a weight whose
    gradient is as small as the rounding may move by up to the learning rate either way: hence 1e-3 relative for the weights."""
    assert main(cfg, ALONE) == 0
    two = replace(cfg, out=str(tmp_path / "two"), shard=shard, eval_every=3)
    run = torchrun(2, "train.py", *flags(two))
    assert run.returncode == 0, run.stderr[-2000:]
    assert relative(weights(two.out), weights(cfg.out)) < 1e-3
    one_loss, two_loss = ([json.loads(line)["loss"] for line in open(f"{c.out}/metrics.jsonl")] for c in (cfg, two))
    assert two_loss == pytest.approx(one_loss, rel=1e-3)
    summaries = [json.load(open(f"{c.out}/summary.json")) for c in (cfg, two)]
    assert summaries[0]["pairs_seen"] == summaries[1]["pairs_seen"] and summaries[0]["n"] == summaries[1]["n"]


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(cfg, tmp_path, monkeypatch, capsys):
    """SIGTERM in the third step: the step is finished, a checkpoint written, and the rest of the run is as if nothing had happened."""
    assert main(cfg, ALONE) == 0
    part = replace(cfg, out=str(tmp_path / "part"))

    def told_to_stop_in_step_three(step, steps, cfg):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return learning_rate(step, steps, cfg)

    monkeypatch.setattr(train, "learning_rate", told_to_stop_in_step_three)
    assert main(part, ALONE) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert "3 steps are saved" in (said := capsys.readouterr().err) and "--resume" in said
    with pytest.raises(ValueError, match="not empty"):
        main(part, ALONE)
    with pytest.raises(ValueError, match="batch_size was 8, is 16"):
        main(replace(part, resume=True, batch_size=16), ALONE)
    assert main(replace(part, resume=True), ALONE) == 0
    whole, resumed = weights(cfg.out), weights(part.out)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    losses = [[(row["step"], row["loss"]) for row in map(json.loads, open(f"{c.out}/metrics.jsonl"))] for c in (cfg, part)]
    assert losses[0] == losses[1]


def test_after_kill_9_the_run_folder_holds_a_complete_checkpoint(cfg):
    command = [sys.executable, "train.py", *flags(replace(cfg, max_steps=2000, save_every=1))]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    saved = f"{cfg.out}/checkpoint.pt"
    while run.poll() is None and not os.path.exists(saved):
        time.sleep(0.05)
    time.sleep(0.3)  # into one of the writes that now follow each other
    run.kill()
    run.wait()
    state = torch.load(saved, weights_only=True)
    assert state["step"] >= 1 and state["config"]["max_steps"] == 2000
    assert main(replace(cfg, resume=True, max_steps=2000, save_every=1), ToldToStop()) == 128 + signal.SIGTERM
    assert torch.load(saved, weights_only=True)["step"] > state["step"]


class ToldToStop(World):
    """A world of one to which SIGTERM comes a few steps into the run."""

    def __init__(self):
        super().__init__(0, 0, 1, torch.device("cpu"))
        object.__setattr__(self, "calls", [])

    def gather(self, values):
        self.calls.append(values)
        if len(self.calls) == 8:
            signal.raise_signal(signal.SIGTERM)
        return super().gather(values)


def test_a_full_disk_stops_the_run_in_one_line_and_leaves_the_checkpoint_before(cfg, monkeypatch):
    real_save = torch.save

    def full_the_second_time(state, file):
        if state["step"] >= 4:
            raise OSError("No space left on device")
        real_save(state, file)

    monkeypatch.setattr(train.torch, "save", full_the_second_time)
    with pytest.raises(OSError, match="is the disk full"):
        main(replace(cfg, save_every=2), ALONE)
    assert torch.load(f"{cfg.out}/checkpoint.pt", weights_only=True)["step"] == 2
    assert not os.path.exists(f"{cfg.out}/checkpoint.pt.partial")


def test_a_gradient_that_is_not_finite_skips_the_step_and_ten_in_a_row_end_the_run(cfg, monkeypatch, capsys):
    def poisoned(steps):
        def take_step(model, *rest):
            sums = real(model, *rest)
            if len(taken) in steps:
                next(model.parameters()).grad.fill_(float("nan"))
            taken.append(1)
            return sums
        return take_step

    real, taken = train.take_step, []
    monkeypatch.setattr(train, "take_step", poisoned({1, 3}))
    assert main(cfg, ALONE) == 0
    assert json.load(open(f"{cfg.out}/summary.json"))["bad_gradients"] == 2
    assert all(torch.isfinite(w).all() for w in weights(cfg.out).values())
    taken.clear()
    monkeypatch.setattr(train, "take_step", poisoned(set(range(100))))
    assert main(replace(cfg, overwrite=True, max_steps=50), ALONE) == 1
    assert len(taken) == 10 and "ten steps in a row" in capsys.readouterr().err


def test_eight_pairs_are_memorised(cfg, tmp_path):
    """And a run that cannot learn, at a learning rate of nothing, says that it never left log 2 and exits non-zero."""
    rows = [Comparison(f"Number {i}?", ["yes", "no"] if i % 3 else ["no", "yes"], [(0, 1)]) for i in range(8)]
    folder = write_comparisons(tmp_path / "eight", rows, bar=False)
    eight = replace(cfg, data=[str(folder)], eval_data=[str(folder)], max_steps=60, lr=3e-3)
    assert main(eight, ALONE) == 0
    assert json.load(open(f"{cfg.out}/summary.json"))["accuracy"] == 1.0


def test_a_run_that_never_leaves_log_2_says_so_and_exits_non_zero(cfg, tmp_path, capsys):
    rows = [Comparison("Which?", ["yes", "no"], [(i % 2, 1 - i % 2)]) for i in range(8)]  # half say yes, half say no: nothing to learn
    folder = write_comparisons(tmp_path / "coin", rows, bar=False)
    assert main(replace(cfg, data=[str(folder)], eval_data=[str(folder)], max_steps=60), ALONE) == 1
    assert "ended at log 2 or above" in capsys.readouterr().err
    assert json.load(open(f"{cfg.out}/summary.json"))["accuracy"] == 0.5


# ----------------------------------------------------------------------------------------------- data as users bring it


def test_a_folder_of_trl_rows_with_image_files_trains_end_to_end(tmp_path, capsys):
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    rows = []
    for i, colour in enumerate(["red", "blue", "green", "white"] * 5):
        Image.new("RGB", (64 + i, 56), colour).save(tmp_path / "mine" / "photos" / f"{i}.jpg")
        ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Colour?"}]}]
        rows.append({"prompt": ask, "images": [f"photos/{i}.jpg"],
                     "chosen": [{"role": "assistant", "content": colour}], "rejected": [{"role": "assistant", "content": "pink"}]})
    (tmp_path / "mine" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = Config(data=[str(tmp_path / "mine")], out=str(tmp_path / "run"), max_steps=3).resolved()
    assert main(mine, ALONE) == 0 and "python evaluate.py --model" in capsys.readouterr().out
    assert json.load(open(tmp_path / "run" / "summary.json"))["n"] == 2  # a tenth of the rows, held out


def test_bad_rows_stop_the_run_in_one_line_or_are_skipped_and_counted(cfg, drawn, tmp_path, capsys):
    good = [json.loads(line) for line in open(drawn / "comparisons.jsonl")]
    rows = [row | {"images": [str(i) + ".png"]} if row.get("images") and i < 3 else row for i, row in enumerate(good)]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "images").symlink_to(drawn / "images")
    (tmp_path / "bad" / "comparisons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    bad = replace(cfg, data=[str(tmp_path / "bad")], epochs=1, max_steps=None)
    assert main(bad, ALONE) == 1
    said = capsys.readouterr().err
    assert f"\ntrain.py: {tmp_path}/bad/comparisons.jsonl:" in said and ("does not exist" in said or "malformed" in said)
    assert main(replace(bad, on_bad_row="skip", overwrite=True), ALONE) == 0
    summary = json.load(open(f"{cfg.out}/summary.json"))
    assert summary["dropped"]["bad row"] == 1 + sum(row != was for row, was in zip(rows, good)) > 1
    assert summary["pairs_seen"] == sum(len(row["pairs"]) for row, was in zip(rows, good) if row == was)


def test_a_held_out_row_that_cannot_be_used_does_not_lose_the_steps_before_it(cfg, tmp_path, capsys):
    rows = [Comparison("Which?", ["yes", "no"], [(0, 1)])] * 3
    held = write_comparisons(tmp_path / "held", [*rows, synthetic(1, seed=4)[0]], bar=False)
    for image in held.glob("images/*.png"):
        image.unlink()
    assert main(replace(cfg, eval_data=[str(held)], eval_every=2), ALONE) == 1
    said = capsys.readouterr().err
    assert "does not exist" in said and "2 steps are saved" in said
    few = write_comparisons(tmp_path / "few", rows, bar=False)
    assert main(replace(cfg, data=[str(few)], eval_data=[], overwrite=True, max_steps=1), ALONE) == 0
    assert json.load(open(f"{cfg.out}/summary.json"))["accuracy"] is None


def test_rows_held_out_by_whole_prompts_are_preferred_to_rows_of_the_training_file(drawn, tmp_path):
    """data.py --hold_out writes held_out.jsonl; without it single rows are taken out, whose prompt may stay in training with others."""
    rows = [Comparison("Which?", [f"yes {i}", "no"], [(0, 1)]) for i in range(20)]
    folder = write_comparisons(tmp_path / "plain", rows, bar=False)
    sets, held, _ = train.open_data(Config(data=[str(folder)], eval_size=5))
    assert len(sets[0]) == 18 and [c.responses[0] for c in held] == ["yes 0", "yes 10"]
    (folder / "held_out.jsonl").write_text("".join(f'{{"prompt": "Apart?", "chosen": "{i}", "rejected": "none"}}\n' for i in range(8)))
    sets, held, _ = train.open_data(Config(data=[str(folder)], eval_size=5))
    assert len(sets[0]) == 20 and [c.responses[0] for c in held] == ["0", "1", "3", "4", "6"]


def test_a_failure_after_the_last_step_loses_no_step(cfg, monkeypatch):
    """The disk fills up while the model is saved: the last checkpoint is that of the last step, and resuming goes straight to the end."""
    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError, match="cannot save the reward model: No space"):
            main(cfg, ALONE)
    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", None)
        assert main(replace(cfg, resume=True), ALONE) == 0
    assert json.load(open(f"{cfg.out}/summary.json"))["steps"] == 6


def test_a_run_does_not_go_on_with_other_rows_than_it_began_with(cfg, tmp_path, monkeypatch):
    rows = [Comparison("Which?", [f"yes {i}", "no"], [(0, 1)]) for i in range(12)]
    first = replace(cfg, data=[str(write_comparisons(tmp_path / "data", rows, bar=False))], eval_data=[])
    monkeypatch.setattr(RewardModel, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("stop here")))
    with pytest.raises(OSError):
        main(first, ALONE)
    with pytest.raises(ValueError, match=r"trained on \[11\] rows, now there are \[12\]"):
        main(replace(first, resume=True, eval_data=first.data), ALONE)


def test_a_run_of_which_no_pair_can_be_used_ends_in_one_line(cfg, tmp_path):
    folder = write_comparisons(tmp_path / "long", [Comparison("Long?", ["word " * 600, "no"], [(0, 1)])] * 3, bar=False)
    with pytest.raises(ValueError, match="not one pair could be used"):
        main(replace(cfg, data=[str(folder)], max_steps=1), ALONE)
    assert not os.path.exists(f"{cfg.out}/head.safetensors")


def test_an_over_long_comparison_is_dropped_and_counted_never_cut(cfg, tmp_path):
    rows = [Comparison("Short?", ["yes", "no"], [(0, 1)])] * 7 + [Comparison("Long?", ["word " * 600, "no"], [(0, 1)])]
    folder = write_comparisons(tmp_path / "long", rows, bar=False)
    assert main(replace(cfg, data=[str(folder)], eval_data=[str(folder)], max_steps=1), ALONE) == 0
    summary = json.load(open(f"{cfg.out}/summary.json"))
    assert summary["dropped"] == {"bad row": 0, "longer than 512 tokens": 1} and summary["pairs_seen"] == 7


@pytest.mark.parametrize("change, words", [
    ({"lr": 0.0}, "--lr 0.0 must be above zero"), ({"on_bad_row": "ignore"}, "want stop or skip"),
    ({"data": ["nowhere"]}, "does not exist"), ({"backbone": "nowhere/at-all"}, "cannot load a backbone"),
    ({"head_activation": "gelu"}, "one of silu, tanh, relu, none"), ({"data": ["x:heavy"]}, "not a weight")])
def test_a_wrong_flag_is_one_clear_line(cfg, change, words):
    with pytest.raises(ValueError) as error:
        main(replace(cfg, **change).resolved(), ALONE)
    assert words in str(error.value) and "\n" not in str(error.value)
