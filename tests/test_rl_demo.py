"""GRPO, in the order of rl_demo.py: what is paid, what is learnt from it, and that neither ranks nor interruptions change it."""
import copy
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXTS
from safetensors.torch import load_file
from transformers import GenerationConfig

import rl_demo as rl
from data import World, synthetic, write_comparisons
from model import RewardModel, encode, pack, plain_rewards, replace_responses, stock_attention, tiny_backbone
from two_ranks_rl import AfterTwoSteps

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    """A tiny policy that has seen a few answers: enough to end most of its own, so that rollouts differ in length and few are cut off."""
    folder = tiny_backbone(tmp_path_factory.mktemp("policy") / "tiny", TEXTS, seed=3, width=64, vocabulary_head=True)
    policy = rl.load_policy(folder)
    optimizer, rows = torch.optim.AdamW(policy.parameters(), lr=3e-3), synthetic(48, seed=6)
    for step in range(12):
        shown = [replace(c, pairs=[]) for c in rows[step * 4:step * 4 + 4]]
        (-policy(pack(shown, policy.tokenizer, policy.image_processor)).mean()).backward()
        optimizer.step(), optimizer.zero_grad()
    rl.save_policy(policy, folder)
    return folder


@pytest.fixture(scope="module")
def policy(policy_folder):
    return rl.load_policy(policy_folder)


@pytest.fixture(scope="module")
def judge(tiny, tmp_path_factory):
    """The folder of a reward model with random weights and the policy's tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts_folder(tmp_path_factory):
    return write_comparisons(tmp_path_factory.mktemp("prompts") / "drawn", synthetic(20, seed=5), bar=False)


@pytest.fixture(scope="module")
def flags(policy_folder, judge, prompts_folder):
    """A run of four steps of three prompts each, whose rewards come from a judge that knows nothing: quick, and every rollout counts."""
    return dict(policy=str(policy_folder), reward_model=[str(judge)], data=str(prompts_folder), reward=["model"], group_size=4,
                batch_size=3, max_steps=4, max_new_tokens=4, lr=1e-3, eval_size=2, pack_tokens=300, passes=2)


def visual_and_text():
    """Three prompts, two with an image and one without."""
    drawn = synthetic(40, seed=8)
    return [c for c in drawn if c.images][:2] + [c for c in drawn if not c.images][:1]


def prompts_of(policy, comparisons):
    return [encode(replace(c, responses=[], pairs=[]), policy.tokenizer, policy.image_processor) for c in comparisons]


def separate_logprobs(policy, prompt, ids):
    """The naive way: one sequence, through the whole model of transformers, with its own idea of the image's positions."""
    config, row = policy.lm.config, torch.tensor([prompt.prompt_ids + ids])
    inputs = {}
    if len(prompt.pixel_values):
        inputs = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw,
                  "mm_token_type_ids": (row == config.image_token_id).int()}
    policy.lm.model.rope_deltas = None
    with stock_attention(policy.lm.model):
        logits = policy.lm(input_ids=row, attention_mask=torch.ones_like(row), **inputs).logits[0, len(prompt.prompt_ids) - 1:-1].float()
    logits[:, policy.never] = -torch.inf
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


# ---------------------------------------------------------------------------------------------------------------------------------
# 2  Rollouts


def test_log_probabilities_from_the_shared_pack_equal_those_of_separate_sequences(policy):
    for prompt in prompts_of(policy, visual_and_text()):
        rollouts = [[270, 271, policy.end], [policy.end], [265, 300, 301, 302]]  # the last one was cut off
        together = policy(pack([replace_responses(prompt, rollouts)]))
        apart = torch.cat([separate_logprobs(policy, prompt, ids) for ids in rollouts])
        torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_vl", "qwen3"])
def test_generation_sees_the_same_positions_as_the_pack(kind, tmp_path, monkeypatch):
    """transformers gives an image one-dimensional positions without a word if it is not told; prompts of several lengths, one without
    an image."""
    policy = rl.load_policy(tiny_backbone(tmp_path / kind, TEXTS, kind=kind, width=64, vocabulary_head=True))
    drawn = [c for c in visual_and_text() if kind != "qwen3" or not c.images]
    prompts, seen = prompts_of(policy, [*drawn, replace(drawn[-1], prompt="Name a colour.")]), {}
    generate = policy.lm.generate

    def listen(generation_config, **inputs):
        config = GenerationConfig(**generation_config.to_diff_dict() | {"output_logits": True, "return_dict_in_generate": True})
        out = generate(generation_config=config, **inputs)
        seen["logits"] = torch.stack(out.logits, dim=1)  # (rollouts, tokens, V)
        return out.sequences

    monkeypatch.setattr(policy.lm, "generate", listen)
    written = rl.generate(policy, prompts, [1, 2, 3, 4][:len(prompts)], group_size=4, max_new_tokens=5)
    assert len({len(p.prompt_ids) for p in prompts}) > 1
    logits = iter(seen["logits"].float())
    for prompt, rollouts in zip(prompts, written):
        for ids in rollouts:
            table = next(logits)[:len(ids)].clone()
            table[:, policy.never] = -torch.inf
            from_generation = table.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            torch.testing.assert_close(policy(pack([replace_responses(prompt, [ids])])), from_generation, atol=5e-5, rtol=1e-4)


def test_rollouts_depend_on_their_seed_and_not_on_their_neighbours(policy):
    prompts = prompts_of(policy, visual_and_text())
    together = rl.generate(policy, prompts, [1, 2, 3], group_size=3, max_new_tokens=5)
    assert [rl.generate(policy, [p], [seed], 3, 5)[0] for p, seed in zip(prompts, (1, 2, 3))] == together
    assert rl.generate(policy, prompts[:1], [9], 3, 5)[0] != together[0]
    assert len({tuple(ids) for ids in together[0]}) > 1  # and the rollouts of a prompt differ from one another


def test_the_dice_draw_from_the_softmax_and_never_an_image_token():
    share = torch.tensor([0.6, 0.3, 0.1, 0.0])
    dice = rl.Dice([0], 20000, [3], "cpu")
    drawn = dice(None, torch.tensor([0.6, 0.3, 0.1, 50.0]).log().repeat(20000, 1)).argmax(dim=1)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20000, share, atol=0.015, rtol=0)  # four standard errors


# ---------------------------------------------------------------------------------------------------------------------------------
# 3  Rewards

SAME = [("Red", "red"), ("  red \n", "red"), ("red.", "red"), ('"Red"!', "red"), ("**red**", "red"), ("The answer is: red", "red"),
        ("red  circle, left", "red circle left"), ("1,000", "1000"), ("2.50", "2.5"), (".5", "0.5"), ("3.0", "3"), ("\u22123", "-3"),
        ("3:45", "3:45"), ("1/2", "1/2"), ("5 cm", "5"), ("5cm", "5 centimeters"), ("50%", "50 percent"), ("$5", "5 dollars"),
        ("12 °", "12"), ("(A)", "A"), ("a", "A"), ("B.", "b"), ("C) a red circle", "C"), ("Option D", "D"),
        ("The correct answer is (b).", "B"), ("Answer: C", "C"), ("A. red", "red"), ("I think \\boxed{7}", "7"),
        ("<think>4?</think><answer>5</answer>", "5"), ("(B) 3 cm", "B"), ("caf\u00e9", "CAFE\u0301"),
        ("10²", "10^2"), ("\\boxed{\\frac{1}{2}}", "1/2"), ("x >= 3", "x ≥ 3"), ("30^\\circ", "30°"), ("- red", "red")]
DIFFERENT = [("blue", "red"), ("red circle", "red"), ("circle red", "red circle"), ("10", "1"), ("-3", "3"), ("3.5", "35"),
             ("1/2", "12"), ("1,5", "15"), ("5 cm", "5 km"), ("B", "A"), ("A red circle", "A"), ("A or B", "A"), ("", "red"),
             ("red", ""), ("...", ""), ("5", "five"), ("3:45", "345"), ("m", "s"), ("<answer></answer>", "red"),
             ("x > 3", "x < 3"), ("√2", "2"), ("≤5", "5"), ("±5", "5"), ("2+3", "2*3"), ("10²", "102"), ("-x", "x")]


@pytest.mark.parametrize("response, answer", SAME)
def test_the_rule_forgives_case_spaces_punctuation_units_and_option_letters(response, answer):
    assert rl.answer_matches(response, answer)


@pytest.mark.parametrize("response, answer", DIFFERENT)
def test_the_rule_forgives_nothing_else(response, answer):
    assert not rl.answer_matches(response, answer)


def test_hybrid_never_pays_a_wrong_answer_more_than_a_right_one():
    r, none = torch.tensor([-50.0, 50.0, 1000.0, 0.0]), torch.zeros(4, dtype=torch.bool)
    paid = rl.reward("hybrid", torch.tensor([True, False, False, False]), r, none)
    assert paid[0] == 1 and (paid[1:] <= paid[0]).all() and (paid[1:] >= 0).all()
    assert paid[3] == 0.5  # and where nothing matches, the reward model ranks


def test_pairwise_rewards_sum_to_zero_and_keep_the_order():
    r = torch.tensor([2.0, -1.0, 0.5])
    paid = rl.reward("pairwise", torch.zeros(3, dtype=torch.bool), r, torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(paid.sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert paid.argsort().tolist() == r.argsort().tolist()
    one = 1 / (1 + math.exp(-3)) - 0.5 + 1 / (1 + math.exp(-1.5)) - 0.5  # the first against the second and the third
    torch.testing.assert_close(paid[0], torch.tensor(one))


@pytest.mark.parametrize("kind", rl.REWARDS)
def test_a_rollout_that_was_cut_off_is_paid_the_least_of_its_group(kind):
    """Otherwise a policy that never stops would be paid for an end that it did not write."""
    paid = rl.reward(kind, torch.tensor([True, False, False]), torch.tensor([1.0, 0.0, 5.0]), torch.tensor([False, False, True]))
    assert paid[2] == paid.min() and paid[0] > paid[2]


# ---------------------------------------------------------------------------------------------------------------------------------
# 4  Advantages, 6  loss


def test_advantages_have_mean_zero_and_vanish_when_all_rewards_agree():
    torch.manual_seed(0)
    for no_std in (False, True):
        advantages = rl.group_advantages(torch.randn(8) * 7 + 100, no_std)
        assert abs(advantages.mean()) < 1e-4
        for same in (0.1, 1.0, -3.3e4):  # 8 times 0.1 does not have the mean 0.1 in fp32
            assert not rl.group_advantages(torch.full((8,), same), no_std).any()
    assert rl.group_advantages(torch.tensor([1.0, 0.0])).abs().max() == pytest.approx(1, abs=1e-4)
    assert rl.group_advantages(torch.tensor([1.0, 0.0]), no_std=True).tolist() == [0.5, -0.5]


def test_the_kl_estimate_is_zero_at_the_start_and_never_negative(policy):
    torch.manual_seed(0)
    ours, theirs = torch.randn(1000) * 3, torch.randn(1000) * 3
    assert (rl.kl_estimate(ours, theirs) >= 0).all() and not rl.kl_estimate(ours, ours).any()
    batch = pack([replace_responses(p, [[270, 271], [policy.end]]) for p in prompts_of(policy, visual_and_text())])
    assert not rl.kl_estimate(policy(batch), copy.deepcopy(policy)(batch)).any()


def test_the_clip_stops_a_token_that_has_moved_far_enough_and_only_in_that_direction():
    for moved, advantage, pulls in ((1.5, 1.0, False), (1.25, 1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.5, -1.0, True)):
        logprobs = torch.tensor([math.log(0.1 * moved)], requires_grad=True)
        rl.grpo_loss(logprobs, torch.tensor([math.log(0.1)]), logprobs.detach(), torch.tensor([advantage]), 1, 0.2, 0.28).backward()
        assert bool(logprobs.grad.any()) == pulls, (moved, advantage)


def test_the_first_gradient_is_that_of_reinforce_on_separate_sequences(policy, judge):
    """Sum over rollouts of A times the gradient of log pi, over the number of tokens: the naive way, one sequence at a time."""
    policy = copy.deepcopy(policy)
    torch.manual_seed(0)
    groups = []
    for comparison, prompt in zip(visual_and_text(), prompts_of(policy, visual_and_text())):
        rollouts = [[270, 271, policy.end], [265, policy.end], [300, 301, 302]]
        advantages = rl.group_advantages(torch.randn(3))
        groups.append(rl.Group(comparison, prompt, rollouts, [""] * 3, torch.tensor([False, False, True]), None, None, None, advantages))
    tokens = sum(len(ids) for g in groups for ids in g.rollouts)
    (-sum(a * separate_logprobs(policy, g.prompt, ids).sum()
          for g in groups for ids, a in zip(g.rollouts, g.advantages)) / tokens).backward()
    naive = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    cfg = rl.Config(pack_tokens=200, kl_coef=0.0)
    for batch in rl.make_batches(groups, cfg):
        logprobs = policy(batch.pack)
        rl.grpo_loss(logprobs, logprobs.detach(), logprobs.detach(), batch.advantage, tokens).backward()
    scale = max(g.abs().max() for g in naive.values())
    for name, p in policy.named_parameters():
        torch.testing.assert_close(p.grad, naive[name], atol=1e-5 * float(scale), rtol=1e-4, msg=lambda m: f"{name}: {m}")


def test_a_second_pass_keeps_the_first_ones_probabilities_as_the_old_ones(policy):
    """take_step with two passes against the same written out: rho is measured from where the rollouts were drawn, at every pass."""
    prompt = prompts_of(policy, visual_and_text()[:1])[0]
    group = rl.Group(None, prompt, [[270, policy.end], [271, 272]], ["", ""], torch.tensor([False, True]), None, None, None,
                     torch.tensor([1.0, -1.0]))
    cfg, reference = rl.Config(policy="p", data="d", passes=2, lr=0.5, kl_coef=0.1, clip=1e9).resolved(), copy.deepcopy(policy)
    (batch,) = rl.make_batches([group], cfg)
    ours, naive = copy.deepcopy(policy), copy.deepcopy(policy)
    rl.take_step(ours, reference, torch.optim.SGD(ours.parameters(), lr=0.5), [batch], None, cfg, ALONE, 1, 4)
    optimizer, drawn_with, steps = torch.optim.SGD(naive.parameters(), lr=0.5), policy(batch.pack).detach(), []
    for _ in range(2):
        optimizer.zero_grad()
        logprobs = naive(batch.pack)
        rl.grpo_loss(logprobs, drawn_with, drawn_with, batch.advantage, 4, kl_coef=0.1).backward()
        optimizer.step()
        steps.append(logprobs.detach())
    assert (steps[1] - steps[0]).abs().max() > 0.1  # the first pass moved the policy, so it matters which one is the old
    for ours, naive in zip(ours.parameters(), naive.parameters()):
        torch.testing.assert_close(ours, naive)


def test_cut_off_rollouts_leave_the_loss_only_when_asked_to(policy):
    prompt = prompts_of(policy, visual_and_text()[:1])[0]
    group = rl.Group(None, prompt, [[270, policy.end], [271, 272]], ["", ""], torch.tensor([False, True]), None, None, None,
                     torch.tensor([1.0, -1.0]))
    for mask, kept in ((False, [True] * 4), (True, [True, True, False, False])):
        (batch,) = rl.make_batches([group], rl.Config(mask_truncated=mask, pack_tokens=1000))
        assert batch.keep.tolist() == kept and batch.advantage.tolist() == [1, 1, -1, -1]


# ---------------------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory):
    cfg = rl.Config(**flags, out=str(tmp_path_factory.mktemp("runs") / "whole")).resolved()
    assert rl.main(cfg, ALONE) == 0
    return cfg


def weights_of(out):
    return load_file(Path(out) / "model" / "policy" / "model.safetensors")


def test_a_run_leaves_a_table_curves_and_a_page_that_needs_no_other_file(whole_run):
    out = Path(whole_run.out)
    summary, page = json.loads((out / "summary.json").read_text()), (out / "index.html").read_text()
    assert set(summary["policies"]) == {"start", "model"} and summary["policies"]["start"]["kl"] == 0 < summary["policies"]["model"]["kl"]
    assert "| start " in (out / "table.md").read_text() and "<svg" in page and "data:image/jpeg" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page) and " A " in (out / "rollouts.txt").read_text()
    rows = [json.loads(line) for line in open(out / "model" / "metrics.jsonl")]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(math.isfinite(row["loss"]) and row["kl"] >= 0 for row in rows)
    assert rl.load_policy(out / "model" / "policy").end == 2 and not list(out.rglob("*.partial")) and not list(out.rglob("checkpoint.pt"))
    assert rl.combine([str(out), str(out)]).splitlines()[0].startswith("| policy |")


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(whole_run, flags, tmp_path, monkeypatch, capsys):
    cfg = rl.Config(**flags, out=str(tmp_path / "run")).resolved()
    with monkeypatch.context() as patch:
        patch.setattr(rl, "StopSignal", AfterTwoSteps)
        assert rl.main(cfg, ALONE) == 128 + 15
    assert "2 steps under model are saved" in capsys.readouterr().err and not (tmp_path / "run" / "summary.json").exists()
    with pytest.raises(ValueError, match="add --resume"):
        rl.main(cfg, ALONE)
    with pytest.raises(ValueError, match="belongs to another run: lr was 0.001, is 0.01"):
        rl.main(replace(cfg, lr=0.01, resume=True), ALONE)
    assert rl.main(replace(cfg, resume=True), ALONE) == 0
    ours, theirs = weights_of(cfg.out), weights_of(whole_run.out)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_stopped_and_resumed_take_the_steps_of_one(whole_run, flags, tmp_path):
    """Three prompts a step on two ranks: one has two, the other one. Sums come in another order, so the last digits of fp32 differ, and
    AdamW turns a gradient near zero into a step of up to lr: hence 2% of the distance travelled, measured over all weights together."""
    words = [word for name, value in (flags | {"out": tmp_path / "two"}).items()
             for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(ROOT / "tests" / "two_ranks_rl.py"), *words],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0 and "2 steps under model are saved" in done.stderr, done.stderr[-2000:]
    one, two = ([json.loads(line) for line in open(Path(out) / "model" / "metrics.jsonl")] for out in (whole_run.out, tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert ({key: a[key] for key in a if key != "seconds"}
                == pytest.approx({key: b[key] for key in b if key != "seconds"}, rel=2e-3, abs=1e-4))
    start, ours, theirs = load_file(Path(flags["policy"]) / "model.safetensors"), weights_of(tmp_path / "two"), weights_of(whole_run.out)
    apart = sum((ours[name] - theirs[name]).pow(2).sum() for name in start).sqrt()
    travelled = sum((theirs[name] - start[name]).pow(2).sum() for name in start).sqrt()
    assert travelled > 0.1 and apart < 0.02 * travelled


def test_the_main_command_in_a_shortened_form(judge, tmp_path):
    """A tiny policy made on the spot, drawn pictures, one step; then its report."""
    cfg = rl.Config(reward_model=[str(judge)], reward=["hybrid"], sft_steps=4, max_steps=1, batch_size=2, eval_size=6, group_size=2,
                    max_new_tokens=3, out=str(tmp_path / "run")).resolved()
    assert rl.main(cfg, ALONE) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["n"] == 6 and (tmp_path / "run" / "policy").is_dir()
    with pytest.raises(ValueError, match="start.json belongs to another run: eval_size was 6, is 7"):
        rl.main(replace(cfg, resume=True, eval_size=7), ALONE)


def test_prompts_without_answers_are_paid_but_not_called_wrong(flags, prompts_folder, tmp_path):
    lines = [json.loads(line) for line in open(prompts_folder / "comparisons.jsonl")]
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "images").symlink_to(prompts_folder / "images")
    (tmp_path / "asked" / "comparisons.jsonl").write_text(
        "".join(json.dumps({key: row[key] for key in ("prompt", "images") if key in row}) + "\n" for row in lines))
    cfg = rl.Config(**flags | {"data": str(tmp_path / "asked"), "max_steps": 1}, out=str(tmp_path / "run")).resolved()
    assert rl.main(cfg, ALONE) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["policies"]["model"]["accuracy"] is None
    assert json.loads(open(tmp_path / "run" / "model" / "metrics.jsonl").readline())["accuracy"] is None


def test_groups_that_agree_are_dropped_when_asked_to(flags, tmp_path):
    """A policy that is never right under `rule`: every reward is 0 and every group agrees."""
    for drop in (False, True):
        cfg = rl.Config(**flags | {"reward": ["rule"], "max_steps": 1}, drop_equal=drop, out=str(tmp_path / str(drop))).resolved()
        assert rl.main(cfg, ALONE) == 0
        row = json.loads(open(tmp_path / str(drop) / "rule" / "metrics.jsonl").readline())
        assert row["equal_groups"] == 1 and bool(row["tokens"]) != drop


def test_gradients_that_are_not_finite_are_skipped_and_ten_end_the_run_but_not_its_resumption(flags, tmp_path, monkeypatch, capsys):
    cfg = rl.Config(**flags | {"max_steps": 6}, out=str(tmp_path / "run")).resolved()
    with monkeypatch.context() as patch:
        patch.setattr(rl, "grpo_loss", lambda logprobs, *_: logprobs.sum() * torch.nan)
        assert rl.main(cfg, ALONE) == 1
    assert "ten updates in a row" in capsys.readouterr().err
    state = torch.load(tmp_path / "run" / "model" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 5 and state["bad_gradients"] == 10  # two passes a step
    assert all(torch.equal(state["policy"][name], weight) for name, weight in rl.load_policy(flags["policy"]).state_dict().items())
    assert rl.main(replace(cfg, resume=True), ALONE) == 0 and len(open(tmp_path / "run" / "model" / "metrics.jsonl").readlines()) == 6


def test_a_row_that_cannot_be_used_does_not_lose_the_steps_before_it(flags, prompts_folder, tmp_path, capsys):
    lines = (prompts_folder / "comparisons.jsonl").read_text().splitlines()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "images").symlink_to(prompts_folder / "images")
    cfg = rl.Config(**flags | {"data": str(tmp_path / "bad")}, out=str(tmp_path / "run")).resolved()
    held = {0, 10}
    train = [i for i in range(20) if i not in held]
    second = train[rl.Order([[1] * 18], [1.0], 3, 0).step(1)[0][1]]
    (tmp_path / "bad" / "comparisons.jsonl").write_text("".join((line if i != second else "{") + "\n" for i, line in enumerate(lines)))
    assert rl.main(cfg, ALONE) == 1
    said = capsys.readouterr().err
    assert f"comparisons.jsonl:{second + 1}: malformed JSON" in said and "1 steps under model are saved" in said


def test_the_tables_figures_by_head():
    """Two prompts with an answer, of two rollouts each, and one without."""
    def record(answer, matches, truncated, tokens, kl_sum):
        return {"category": "a", "answer": answer, "texts": ["", ""], "matches": matches, "truncated": truncated,
                "model_rewards": [1.0, 3.0], "tokens": tokens, "kl_sum": kl_sum}

    f = rl.figures([record("x", [True, True], [False, False], 4, 1.0), record("y", [True, False], [False, False], 6, 2.0),
                    record("", [False, False], [False, True], 10, 3.0)], "rule")
    assert f["accuracy"] == 0.75 and f["accuracy_by_category"] == {"a": 0.75} and f["standard_error"] == 0.25 / math.sqrt(2)
    assert f["kl"] == 6 / 20 and f["length"] == 20 / 6 and f["truncated"] == 1 / 6 and f["model_reward"] == 2.0
    assert f["reward"] == 0.5  # of 1, 1/2 and 0


def test_equal_rollouts_are_paid_equally_to_the_last_bit(policy, tiny, monkeypatch):
    """In fp32 the same words in two branches differ by a rounding, which the division by the standard deviation would blow up to +-1."""
    ids, named = [265, 270, policy.end], [(i, c) for i, c in enumerate(visual_and_text())]
    monkeypatch.setattr(rl, "generate", lambda _, prompts, *__: [[ids] * 7 + [[265, 271]]] + [[ids] * 8] * (len(prompts) - 1))
    groups = rl.roll_out(policy, [tiny], named, prompts_of(policy, visual_and_text()), rl.Config(pack_tokens=300), 0)
    assert groups[0].truncated.tolist() == [False] * 7 + [True] and len(groups[0].model_rewards.unique()) == 2
    for kind in ("model", "hybrid", "pairwise"):
        assert not any(rl.group_advantages(rl.reward(kind, g.matches, g.model_rewards, g.truncated)).any() for g in groups[1:])


def test_every_rollout_gets_the_reward_of_its_own_words(policy, tiny, monkeypatch):
    """Across packs, with repeated rollouts, and with one that was cut off, whose reward is read at an <|im_end|> put behind it."""
    end, comparisons = policy.end, visual_and_text()
    written = [[[265, end], [270, 271, end], [265, end], [300, 301]], [[end], [271, end], [270, end], [end]],
               [[271, end], [271, end], [271, end], [265, end]]]
    monkeypatch.setattr(rl, "generate", lambda _, prompts, *__: written)
    groups = rl.roll_out(policy, [tiny], list(enumerate(comparisons)), prompts_of(policy, comparisons), rl.Config(pack_tokens=70), 0)
    for group, rollouts in zip(groups, written):
        with torch.no_grad():
            alone = plain_rewards(tiny, [replace_responses(group.prompt, [ids if ids[-1] == end else [*ids, end] for ids in rollouts])])
        torch.testing.assert_close(group.model_rewards, alone, atol=1e-5, rtol=0)


def test_an_ensemble_pays_the_mean_of_its_members(policy, tiny):
    other = copy.deepcopy(tiny)
    torch.nn.init.normal_(other.head[-1].weight)
    comparison = visual_and_text()[0]
    named, prompts, cfg = [(0, comparison)], prompts_of(policy, [comparison]), rl.Config(group_size=3, max_new_tokens=4, pack_tokens=300)
    one, two, both = (rl.roll_out(policy, models, named, prompts, cfg, 0)[0] for models in ([tiny], [other], [tiny, other]))
    torch.testing.assert_close(both.model_rewards, (one.model_rewards + two.model_rewards) / 2)


# ---------------------------------------------------------------------------------------------------------------------------------
# Bad input


def test_bad_input_gets_one_line_that_says_what_to_do(flags, judge, backbones, tmp_path):
    other = tiny_backbone(tmp_path / "other", ["entirely different words make other tokens"] * 50, seed=1, width=64, vocabulary_head=True)
    RewardModel.from_backbone(backbones("qwen2")).save_pretrained(tmp_path / "blind")
    rows = [{"prompt": "Name a colour.", "answer": "red"}, {"prompt": "Name a fruit."}]
    for name, lines in (("unanswered", rows), ("empty", []),
                        ("no_image", [{"prompt": "<image>What?", "images": ["none.png"], "answer": "a"}] * 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparisons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    cases = [({"policy": str(other)}, "another tokenizer family"), ({"policy": str(judge)}, "without a vocabulary head"),
             ({"policy": str(backbones())}, "without a vocabulary head"), ({"policy": "/nowhere"}, "cannot load a policy"),
             ({"reward": ["rule"], "data": str(tmp_path / "unanswered")}, r"comparisons.jsonl:2: no `answer`"),
             ({"data": str(tmp_path / "empty")}, "holds no row"),
             ({"data": str(tmp_path / "no_image")}, "none.png does not exist"), ({"reward": ["best"]}, "want one or several of rule"),
             ({"group_size": 1}, "at least 2"), ({"reward_model": [str(tmp_path)]}, "not a saved reward model"),
             ({"reward_model": [str(tmp_path / "blind")]}, "text-only and the policy"), ({"data": ""}, "needs --data")]
    for number, (change, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message) as error:
            rl.main(rl.Config(**flags | change, out=str(tmp_path / f"run{number}")).resolved(), ALONE)
        assert "\n" not in str(error.value)
    done = subprocess.run([sys.executable, str(ROOT / "rl_demo.py"), "--data", str(tmp_path / "empty"), "--out", str(tmp_path / "run")],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("rl_demo.py: ") and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------------------
# Other people's trainers


def test_score_is_a_reward_function_of_trl(policy_folder, tiny, tmp_path):
    """The README's own lines: GRPOTrainer runs with them; and rows with images, as TRL hands them on, get the reward of `score`."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer
    (lines,) = re.findall(r"^def base_reward.*?^    return rewards$", (ROOT / "README.md").read_text(), re.M | re.S)
    exec(lines, names := {"judge": tiny})
    paid = names["base_reward"]
    c = visual_and_text()[0]
    messages = trl.data_utils.prepare_multimodal_messages([{"role": "user", "content": c.prompt.replace("<image>", "")}], images=c.images)
    answers = [[{"role": "assistant", "content": text}] for text in c.responses]
    rewards = paid(prompts=[messages] * len(answers), completions=answers, completion_ids=None, images=[c.images] * len(answers),
                   trainer_state=None)
    assert rewards == pytest.approx(tiny.score(c.prompt, c.responses, c.images), abs=1e-5)

    folder = tiny_backbone(tmp_path / "text", TEXTS, kind="qwen2", width=64, vocabulary_head=True)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Name a colour, number {i}."}]} for i in range(4)])
    options = trl.GRPOConfig(output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=2,
                             max_completion_length=4, max_steps=1, beta=0.0, report_to=[], use_cpu=True, bf16=False,
                             save_strategy="no", logging_steps=1)
    trainer = trl.GRPOTrainer(model=str(folder), reward_funcs=paid, args=options, train_dataset=rows,
                              processing_class=AutoTokenizer.from_pretrained(folder))
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["rewards/base_reward/mean"])
