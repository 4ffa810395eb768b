"""GRPO, in the order of rl_demo.py: rewards, advantages, loss, runs; and that neither the number of ranks nor an
interruption changes them. The policy and its sampling: test_model.py."""
import base64
import copy
import json
import math
import os
import random
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TWO_RANKS, small_backbone
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

import rl_demo as rl
from data import synthetic, write_comparisons
from model import Policy, RewardModel, Rollout, encode, hidden_states, pack, pack_texts
from train import start_processes
from two_ranks_rl import stop_after_two_steps


def fine_tune_policy(folder):
    """A tiny policy that was fine-tuned on a few answers: it ends most of its rollouts, so that they differ in length
    and few are truncated."""
    small_backbone(folder, seed=3, vocabulary_head=True)
    policy = Policy.from_pretrained(folder)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    comparisons = synthetic(48, seed=6)
    for step in range(12):
        batch = [encode(c, policy.processor) for c in comparisons[step * 4:step * 4 + 4]]
        (-policy(pack_texts(batch)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.save_pretrained(folder)
    return folder


def save_reward_model(folder, backbone):
    """A reward model with random weights and the policy's tokenizer."""
    torch.manual_seed(0)
    RewardModel.from_backbone(backbone).save_pretrained(folder)
    return folder


def write_prompts(folder):
    return write_comparisons(folder, synthetic(20, seed=5), progress=False)


def small_run(policy, reward_model, prompts):
    """Settings of a run of four steps of three prompts each with a reward model of random weights: quick, and every
    rollout counts."""
    return dict(policy=str(policy), reward_model=[str(reward_model)], data=str(prompts), reward=["model"], group_size=4,
                batch_size=3, max_steps=4, passes=2, max_new_tokens=4, lr=1e-3, eval_size=2, pack_tokens=300)


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    return fine_tune_policy(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.fixture(scope="module")
def policy(policy_folder):
    start_processes()
    return Policy.from_pretrained(policy_folder)


@pytest.fixture(scope="module")
def reward_folder(backbones, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), backbones())


@pytest.fixture(scope="module")
def prompts_folder(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "drawn")


@pytest.fixture(scope="module")
def flags(policy_folder, reward_folder, prompts_folder):
    return small_run(policy_folder, reward_folder, prompts_folder)


def run(flags, out, **changes) -> rl.Config:
    """A whole run in this process; its settings."""
    cfg = rl.Config(**flags | changes, out=str(out)).resolved()
    assert rl.main(cfg) == 0
    return cfg


def visual_and_text():
    """Three prompts, two with an image and one without."""
    drawn = synthetic(40, seed=8)
    return [c for c in drawn if c.images][:2] + [c for c in drawn if not c.images][:1]


def make_prompts(policy, comparisons):
    prompts = []
    for i, comparison in enumerate(comparisons):
        prompts.append(rl.Prompt(i, comparison, encode(comparison, policy.processor).with_responses([])))
    return prompts


def make_rollouts(token_ids, logprobs=None):
    logprobs = logprobs or [[0.0] * len(ids) for ids in token_ids]
    return [Rollout(*pair) for pair in zip(token_ids, logprobs)]


def make_group(prompt, token_ids, end_id, advantages, logprobs=None):
    """A group with what make_batches needs."""
    truncated = torch.tensor([ids[-1] != end_id for ids in token_ids])
    return rl.Group(
        prompt, make_rollouts(token_ids, logprobs), [""] * len(token_ids), [len(ids) for ids in token_ids], truncated,
        matches=truncated & False, model_rewards=torch.zeros(len(token_ids)), advantages=torch.tensor(advantages))


def make_run(policy, cfg, reward_models=()):
    """A Run with what generate_rollouts and grpo_step need of it."""
    reference = copy.deepcopy(policy).requires_grad_(False)
    return SimpleNamespace(cfg=cfg, device=torch.device("cpu"), reference=reference, reward_models=reward_models,
                           judge=None)


# ----------------------------------------------------------------------------------------- rewards

def rewards_of(reward_name, model_rewards, matches=None, truncated=None):
    """R of a group whose rollouts have these r_i."""
    none = [False] * len(model_rewards)
    return rl.compute_rewards(reward_name, SimpleNamespace(
        judge_rewards=None, model_rewards=torch.tensor(model_rewards), matches=torch.tensor(matches or none),
        truncated=torch.tensor(truncated or none)))


def test_hybrid_never_gives_a_wrong_answer_the_reward_of_a_right_one():
    """In fp32 sigmoid(20) is 1.0 already: a reward model that is sure of a wrong answer would override the rule."""
    for r in (20.0, 50.0, 1e30):
        right, wrong, _ = rewards_of("hybrid", [-50.0, r, 0.0], [True, False, False])
        assert right == 1 > wrong > 0.99
    assert rewards_of("hybrid", [0.0, 5.0])[0] == 0.5  # and where nothing matches, the reward model ranks


def test_pairwise_rewards_sum_to_zero_and_keep_the_order():
    r = [2.0, -1.0, 0.5]
    rewards = rewards_of("pairwise", r)
    torch.testing.assert_close(rewards.sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert rewards.argsort().tolist() == torch.tensor(r).argsort().tolist()
    first = 1 / (1 + math.exp(-3)) - 0.5 + 1 / (1 + math.exp(-1.5)) - 0.5  # against the second and the third
    torch.testing.assert_close(rewards[0], torch.tensor(first))


@pytest.mark.parametrize("reward_name", rl.REWARDS)
def test_a_truncated_rollout_gets_the_lowest_reward_of_its_group(reward_name):
    """Otherwise a policy that never stops would be rewarded for an <|im_end|> that it did not write."""
    rewards = rewards_of(reward_name, [1.0, 0.0, 5.0], [True, False, False], [False, False, True])
    assert rewards[2] == rewards.min() and rewards[0] > rewards[2]


def test_an_unknown_reward_is_an_error():
    with pytest.raises(KeyError):
        rewards_of("best", [1.0, 2.0])
    with pytest.raises(ValueError, match="--reward best: choose from rule, model, hybrid, pairwise"):
        rl.Config(reward=["rule", "best"]).resolved()


# ----------------------------------------------------------------------------------------- the answer rule
SAME = [("Red", "red"), ("  red \n", "red"), ("red.", "red"), ('"Red"!', "red"), ("**red**", "red"), ("red", "Red."),
        ("The answer is: red", "red"), ("red  circle, left", "red circle left"), ("1,000", "1000"), ("2.50", "2.5"),
        (".5", "0.5"), ("3.0", "3"), ("\u22123", "-3"), ("3:45", "3:45"), ("1/2", "1/2"), ("(A)", "A"), ("a", "A"),
        ("B.", "b"), ("C) a red circle", "C"), ("Option D", "D"), ("The correct answer is (b).", "B"),
        ("Answer: C", "C"), ("A. red", "red"), ("- red", "red"), ("I think \\boxed{7}", "7"),
        ("<think>4?</think><answer>5</answer>", "5"), ("(B) 3 cm", "B"), ("caf\u00e9", "CAFE\u0301"),
        ("5 cm", "5.0 cm."), ("red left\x1a", "red left"), ("3", "3.0."), ("<answer>4</answer> or <answer>5</answer>", "5")]
DIFFERENT = [("blue", "red"), ("red circle", "red"), ("circle red", "red circle"), ("10", "1"), ("-3", "3"),
             ("-5", "5"), ("3.5", "35"), ("1/2", "12"), ("1,5", "15"), ("5 cm", "5 km"), ("5 m", "5 s"), ("B", "A"),
             ("A or B", "A"), ("A red circle", "A"), ("", "red"), ("red", ""), ("...", ""), ("5", "five"),
             ("3:45", "345"), ("m", "s"), ("<answer></answer>", "red"), ("x > 3", "x < 3"), ("√2", "2"), ("≤5", "5"),
             ("±5", "5"), ("2+3", "2*3"), ("10²", "102"), ("-x", "x"), ("2x", "2"), ("3:45", "1:15"), ("5 6", "11"),
             ("left top", "top left")]
FORMULAS = [("\\boxed{\\frac{1}{2}}", "1/2"), ("x >= 3", "x ≥ 3"), ("30^\\circ", "30°"), ("x^2+2x+1", "(x+1)^2"),
            ("\\sqrt{8}", "2\\sqrt{2}"), ("$x = 5$", "5"), ("\\dfrac{3}{6}", "0.5")]


@pytest.mark.parametrize("with_math_verify", [False, True])
def test_the_rule_forgives_form_and_nothing_else(with_math_verify, monkeypatch):
    """Case, spaces, punctuation, emphasis, an option's letter. Signs and order count, math-verify or not."""
    if with_math_verify:
        pytest.importorskip("math_verify")
    monkeypatch.setattr(rl, "MATH_VERIFY", with_math_verify)
    answer_matches = rl.answer_matches.__wrapped__  # not the cache, which would answer for both cases
    for response, answer in SAME:
        assert answer_matches(response, answer), (response, answer)
    for response, answer in DIFFERENT:
        assert not answer_matches(response, answer), (response, answer)
    for response, answer in FORMULAS:
        assert answer_matches(response, answer) == with_math_verify, (response, answer)


def test_a_formula_that_never_ends_is_only_wrong():
    """A policy may write anything; the answer check must come back, also where no signal can interrupt it."""
    assert not rl.answer_matches("9" * 500 + "^9", "3") and not rl.answer_matches("\\frac{" * 20, "3")


# ----------------------------------------------------------------------------------------- advantages and loss

def test_advantages_have_mean_zero_and_vanish_when_all_rewards_agree():
    torch.manual_seed(0)
    assert abs(rl.group_advantages(torch.randn(8) * 7 + 100).mean()) < 1e-4
    for reward in (0.1, 1.0, -3.3e4):  # 8 times 0.1 does not have the mean 0.1 in fp32
        assert not rl.group_advantages(torch.full((8,), reward)).any()
    assert rl.group_advantages(torch.tensor([1.0, 0.0])).abs().max() == pytest.approx(1, abs=1e-4)


def test_the_kl_estimate_is_zero_at_the_start_and_never_negative(policy):
    torch.manual_seed(0)
    ours, theirs = torch.randn(1000) * 3, torch.randn(1000) * 3
    assert (rl.kl_estimate(ours, theirs) >= 0).all() and not rl.kl_estimate(ours, ours).any()
    token_ids = [[270, 271], [policy.processor.end_id]]
    prompts = make_prompts(policy, visual_and_text())
    batch = pack_texts([prompt.encoded.with_responses(token_ids) for prompt in prompts])
    assert not rl.kl_estimate(policy(batch), copy.deepcopy(policy)(batch)).any()


@pytest.mark.parametrize("model_type, dtype", [("internvl", torch.float32), ("qwen2_5_vl", torch.bfloat16)])
def test_on_a_gpu_the_reference_computes_what_the_policy_does_at_the_start(model_type, dtype, tmp_path):
    """To the bit, so that KL is 0: under autocast an InternVL's vision tower computes in the dtype of its weights."""
    folder = small_backbone(tmp_path / model_type, model_type=model_type, vocabulary_head=True)
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight.bfloat16() for name, weight in weights.items()}  # as checkpoints on the hub are
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    policy = Policy.from_pretrained(folder).eval()
    reference = rl.load_reference(folder, None, torch.bfloat16).eval()
    assert {weight.dtype for weight in reference.parameters()} == {dtype}
    assert not any(weight.requires_grad for weight in reference.parameters())
    packed = pack_texts([encode(comparison, policy.processor) for comparison in visual_and_text()])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = [hidden_states(model.backbone, model.processor, packed) for model in (policy, reference)]
    assert torch.equal(*hidden)


def test_the_clip_stops_a_token_that_has_moved_far_enough_and_only_in_that_direction():
    moves = ((1.25, 1.0, False), (1.15, 1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (0.85, -1.0, True),
             (1.5, -1.0, True))
    for moved, advantage, has_gradient in moves:
        now, old = torch.tensor([math.log(0.1 * moved)], requires_grad=True), torch.tensor([math.log(0.1)])
        rl.grpo_loss(now, old, now.detach(), torch.tensor([advantage]), 1, clip_eps=0.2).backward()
        assert bool(now.grad.any()) == has_gradient, (moved, advantage)


def test_the_first_gradient_is_that_of_reinforce_one_rollout_at_a_time(policy):
    """Sum over rollouts of A times the gradient of log pi, divided by the number of tokens."""
    policy, groups = copy.deepcopy(policy), []
    end_id = policy.processor.end_id
    for prompt in make_prompts(policy, visual_and_text()):
        token_ids = [[270, 271, end_id], [265, end_id], [300, 301, 302]]
        groups.append(make_group(prompt, token_ids, end_id, [1.0, -0.25, -0.75]))
    num_tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    for group in groups:
        for rollout, advantage in zip(group.rollouts, group.advantages):
            alone = pack_texts([group.prompt.encoded.with_responses([rollout.token_ids])])
            (-advantage * policy(alone).sum() / num_tokens).backward()
    naive = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    batches = rl.make_batches(groups, make_run(policy, rl.Config(pack_tokens=100)))
    assert sum(len(batch.advantages) for batch in batches) == num_tokens and len(batches) > 1
    for batch in batches:
        logprobs = policy(batch.pack)
        rl.grpo_loss(logprobs, logprobs.detach(), logprobs.detach(), batch.advantages, num_tokens).backward()
    scale = float(max(gradient.abs().max() for gradient in naive.values()))
    for name, p in policy.named_parameters():
        torch.testing.assert_close(p.grad, naive[name], atol=1e-5 * scale, rtol=1e-4, msg=lambda m: f"{name}: {m}")


def test_a_second_pass_keeps_the_first_ones_probabilities_as_the_old_ones(policy, monkeypatch):
    """grpo_step with two passes against the same written out: rho is measured from where the rollouts were sampled, at
    every pass; and what is logged beside the loss is what it says."""
    end_id = policy.processor.end_id
    token_ids = [[270, end_id], [271, 272]]
    prompt = make_prompts(policy, visual_and_text()[:1])[0]
    cfg = rl.Config(policy="p", data="d", passes=2, lr=0.5, kl_coef=0.1, clip=1e9).resolved()
    ours, naive, run = copy.deepcopy(policy), copy.deepcopy(policy), make_run(policy, cfg)
    pack_of_group = pack_texts([prompt.encoded.with_responses(token_ids)])
    old = policy(pack_of_group).detach()
    group = make_group(prompt, token_ids, end_id, [0.0, 0.0], [(old[:2] + 0.5).tolist(), old[2:].tolist()])
    monkeypatch.setattr(rl, "generate_rollouts", lambda *_: [group])
    monkeypatch.setitem(rl.REWARDS, "model", lambda group: torch.tensor([2.0, 0.0]))
    row = rl.grpo_step("model", 0, [], ours, torch.optim.SGD(ours.parameters(), lr=0.5), run)

    optimizer, logprobs_of_pass = torch.optim.SGD(naive.parameters(), lr=0.5), []
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0]) / (1 + 1e-6)
    for _ in range(2):
        optimizer.zero_grad()
        logprobs = naive(pack_of_group)
        loss = rl.grpo_loss(logprobs, old, old, advantages, 4, kl_coef=0.1)
        loss.backward()
        optimizer.step()
        logprobs_of_pass.append(logprobs.detach())
    assert (logprobs_of_pass[1] - logprobs_of_pass[0]).abs().max() > 0.1  # so it matters which of them is the old one
    for a, b in zip(ours.parameters(), naive.parameters()):
        torch.testing.assert_close(a, b)
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert row["reward"] == 1.0 and row["tokens"] == 4
    assert row["kl"] == pytest.approx(float(rl.kl_estimate(logprobs_of_pass[1], old).mean()), rel=1e-5)
    assert row["off_policy"] == pytest.approx(0.25, abs=1e-4)  # two of four tokens were sampled half a nat away


def test_every_token_has_the_advantage_of_its_rollout(policy):
    """The tokens of a truncated rollout too."""
    end_id = policy.processor.end_id
    prompt = make_prompts(policy, visual_and_text()[:1])[0]
    group = make_group(prompt, [[270, end_id], [271, 272, 273]], end_id, [1.0, -1.0], [[0.1, 0.2], [0.3, 0.4, 0.5]])
    (batch,) = rl.make_batches([group], make_run(policy, rl.Config(pack_tokens=1000)))
    assert batch.advantages.tolist() == [1, 1, -1, -1, -1]
    torch.testing.assert_close(batch.sampled_logprobs, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))


# ----------------------------------------------------------------------------------------- rollouts and their scores

def test_rollouts_depend_on_seed_step_and_row_and_not_on_their_neighbours(policy):
    """So neither the number of ranks nor the number of prompts that are sampled at a time changes a run."""
    def token_ids(prompts, step):
        groups = rl.generate_rollouts(policy, prompts, step, run)
        return [[rollout.token_ids for rollout in group.rollouts] for group in groups]

    prompts = make_prompts(policy, visual_and_text())
    run = make_run(policy, rl.Config(group_size=3, max_new_tokens=5, rollout_rows=6))
    together = token_ids(prompts, 0)
    assert [token_ids([prompt], 0)[0] for prompt in prompts] == together
    assert token_ids(prompts[:1], 1)[0] != together[0]
    assert len({tuple(ids) for ids in together[0]}) > 1  # and the rollouts of a prompt differ from one another


def score_given_rollouts(policy, monkeypatch, token_ids, comparisons, reward_models, pack_tokens):
    """Groups whose rollouts are given, scored."""
    rollouts = [make_rollouts(ids_of_prompt) for ids_of_prompt in token_ids]
    monkeypatch.setattr(rl, "generate", lambda *_: rollouts)
    run = make_run(policy, rl.Config(pack_tokens=pack_tokens), reward_models)
    return rl.generate_rollouts(policy, make_prompts(policy, comparisons), 0, run)


def test_equal_rollouts_get_equal_rewards_to_the_last_bit(policy, tiny, monkeypatch):
    """In fp32 the same tokens in two branches differ by a rounding error, which the division by the standard deviation
    would turn into an advantage. So the reward model gives them the first one's reward."""
    ids = [265, 270, policy.processor.end_id]
    token_ids = [[ids] * 7 + [[265, 271]]] + [[ids] * 8] * 2
    groups = score_given_rollouts(policy, monkeypatch, token_ids, visual_and_text(), [tiny], 300)
    assert groups[0].truncated.tolist() == [False] * 7 + [True] and len(groups[0].model_rewards.unique()) == 2
    assert groups[0].lengths == [2] * 8  # without the end
    for reward_name in ("model", "hybrid", "pairwise"):
        for group in groups[1:]:
            assert not rl.group_advantages(rl.compute_rewards(reward_name, group)).any()


def test_every_rollout_gets_the_reward_of_its_own_tokens(policy, tiny, monkeypatch):
    """Across packs, with repeated rollouts, and with a truncated one, whose reward is read at an <|im_end|> that is
    appended; of several reward models the mean."""
    end, comparisons = policy.processor.end_id, visual_and_text()
    other = copy.deepcopy(tiny)
    torch.nn.init.normal_(other.head[-1].weight)
    token_ids = [[[265, end], [270, 271, end], [265, end], [300, 301]], [[end], [271, end], [270, end], [end]],
                 [[271, end], [271, end], [271, end], [265, end]]]

    def rewards_by(*reward_models):
        groups = score_given_rollouts(policy, monkeypatch, token_ids, comparisons, reward_models, 70)
        return groups, torch.stack([group.model_rewards for group in groups])

    rewards_of_model = []
    for reward_model in (tiny, other):
        groups, rewards = rewards_by(reward_model)
        rewards_of_model.append(rewards)
        for group, ids_of_group in zip(groups, token_ids):
            complete = [ids if ids[-1] == end else [*ids, end] for ids in ids_of_group]
            one_by_one = [reward_model(pack([group.prompt.encoded.with_responses([ids])])).rewards.item()
                          for ids in complete]
            torch.testing.assert_close(group.model_rewards, torch.tensor(one_by_one), atol=1e-5, rtol=0)
    torch.testing.assert_close(rewards_by(tiny, other)[1], (rewards_of_model[0] + rewards_of_model[1]) / 2)


# ----------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory):
    return run(flags, tmp_path_factory.mktemp("runs") / "whole")


def weights_of(out):
    return load_file(Path(out) / "model" / "policy" / "model.safetensors")


def log_of(out, reward_name="model"):
    return [json.loads(line) for line in (Path(out) / reward_name / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_table_curves_and_a_page_that_needs_no_other_file(whole_run):
    out = Path(whole_run.out)
    summary, html = json.loads((out / "summary.json").read_text()), (out / "index.html").read_text()
    policies = summary["policies"]
    assert set(policies) == {"start", "model"} and policies["start"]["kl"] == 0 < policies["model"]["kl"]
    assert base64.b64encode((out / "curves.png").read_bytes()).decode() in html
    assert "data:image/jpeg" in html
    assert "small rule" in summary["checked"] and summary["checked"] in html
    assert not re.search(r'(?:src|href)="(?!data:|#)', html) and "Some prompts, before and after" in html
    rows = log_of(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and row["kl"] >= 0 and 0 <= row["off_policy"] < 1e-4 for row in rows)
    assert Policy.from_pretrained(out / "model" / "policy").processor.end_id == 2
    assert not list(out.rglob("*.partial")) and not list(out.rglob("checkpoint*"))
    header, _, start, model = (out / "table.md").read_text().splitlines()
    gain = f"{100 * (policies['model']['accuracy'] - policies['start']['accuracy']):+.1f}"
    assert header.startswith("| policy") and start.startswith("| start ") and model.endswith(f" {gain} |")


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(whole_run, flags, tmp_path, monkeypatch,
                                                                             capsys):
    """And a log line that was written after the checkpoint is not there twice."""
    cfg, log = rl.Config(**flags, out=str(tmp_path / "run")).resolved(), tmp_path / "run" / "model" / "metrics.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(rl, "stop_signals", stop_after_two_steps)
        assert rl.main(cfg) == 128 + 15
    assert "2 steps under model are saved" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()
    log.write_text(log.read_text() + json.dumps(log_of(cfg.out)[-1] | {"step": 3}) + "\n")
    with pytest.raises(ValueError, match="--resume"):
        rl.main(cfg)
    with pytest.raises(ValueError, match="of another run: lr was 0.001, is 0.01"):
        rl.main(replace(cfg, lr=0.01, resume=True))
    assert rl.main(replace(cfg, resume=True)) == 0
    assert [row["step"] for row in log_of(cfg.out)] == [1, 2, 3, 4]
    ours, theirs = weights_of(cfg.out), weights_of(whole_run.out)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def make_two_ranks(folder, backbones):
    settings = small_run(fine_tune_policy(folder / "policy"), save_reward_model(folder / "reward", backbones()),
                         write_prompts(folder / "drawn"))
    arguments = []
    for name, value in (settings | {"out": folder / "two"}).items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


TWO_RANKS["rl_demo"] = make_two_ranks


def test_several_readers_change_no_number_of_a_run(whole_run, flags, tmp_path, monkeypatch):
    """As on a GPU, where the prompts of a step are read by several threads."""
    map_rows, names = rl.map_rows, set()

    def late_and_out_of_order(*arguments):
        names.add(threading.current_thread().name)
        time.sleep(random.random() / 50)
        return encode(*arguments)

    monkeypatch.setattr(rl, "encode", late_and_out_of_order)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(rl, "map_rows", lambda function, rows, on_gpu: map_rows(function, rows, True))
    cfg = run(flags, tmp_path / "run")
    assert names == {"reader_0", "reader_1"}
    plain, by_readers = ([row | {"seconds": 0} for row in log_of(out)] for out in (whole_run.out, cfg.out))
    assert plain == by_readers
    prompts = rl.read_prompts(synthetic(12), range(12), Policy.from_pretrained(cfg.policy).processor, on_gpu=False)
    assert [prompt.row_index for prompt in prompts] == list(range(12))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists the files that a process maps")
def test_a_resumed_run_does_not_keep_the_checkpoint_that_it_replaces(flags, tmp_path, monkeypatch):
    """A file that is mapped keeps its place on the disk after it is replaced."""
    cfg = rl.Config(**flags, out=str(tmp_path / "run")).resolved()
    with monkeypatch.context() as patch:
        patch.setattr(rl, "stop_signals", stop_after_two_steps)
        assert rl.main(cfg) == 128 + 15
    mapped, real, maps = [], rl.grpo_step, Path("/proc/self/maps")
    monkeypatch.setattr(rl, "grpo_step", lambda *a: mapped.append("checkpoint-" in maps.read_text()) or real(*a))
    assert rl.main(replace(cfg, resume=True)) == 0 and mapped == [False] * 2


def test_two_ranks_stopped_and_resumed_take_the_steps_of_one(whole_run, two_ranks):
    """Three prompts a step on two ranks: one has two, the other one. Sums come in another order, so the last digits of
    fp32 differ, and AdamW turns a gradient near zero into a step of up to lr: hence 2% of the distance travelled,
    measured over all weights together."""
    root, done = two_ranks
    folder = root / "rl_demo"
    assert done.returncode == 0 and "2 steps under model are saved" in done.stderr, done.stderr[-2000:]
    for a, b in zip(log_of(whole_run.out), log_of(folder / "two"), strict=True):
        assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, rel=2e-3, abs=1e-4)
    start, ours = load_file(Path(whole_run.policy) / "model.safetensors"), weights_of(folder / "two")
    theirs = weights_of(whole_run.out)
    apart = sum((ours[name] - theirs[name]).pow(2).sum() for name in start).sqrt()
    travelled = sum((theirs[name] - start[name]).pow(2).sum() for name in start).sqrt()
    assert travelled > 0.1 and apart < 0.02 * travelled


def test_the_main_command_in_a_shortened_form(reward_folder, tmp_path):
    """A tiny policy made on the spot, drawn pictures, one step; then its report."""
    short = dict(reward_model=[str(reward_folder)], reward=["hybrid"], sft_steps=4, max_steps=1, batch_size=2,
                 eval_size=6, group_size=2, max_new_tokens=3)
    cfg = run(short, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["n"] == 6
    assert (tmp_path / "run" / "policy").is_dir()
    with pytest.raises(ValueError, match="start.json is of another run: eval_size was 6, is 7"):
        rl.main(replace(cfg, resume=True, eval_size=7))


def test_prompts_without_answers_get_rewards_but_do_not_count_as_wrong(flags, tmp_path):
    unanswered = [replace(c, answer="") for c in synthetic(20, seed=5)]
    write_comparisons(tmp_path / "unanswered", unanswered, progress=False)
    run(flags, tmp_path / "run", data=str(tmp_path / "unanswered"), max_steps=1)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["policies"]["model"]["accuracy"] is None
    assert log_of(tmp_path / "run")[0]["accuracy"] is None


def test_groups_with_equal_rewards_are_in_the_loss_by_their_kl_term(flags, tmp_path):
    """A policy that is never right under `rule`: all rewards of every group are 0."""
    run(flags, tmp_path / "run", reward=["rule"], max_steps=1)
    (row,) = log_of(tmp_path / "run", "rule")
    assert row["equal_groups"] == 1 and row["tokens"] > 0


def test_gradients_that_are_not_finite_are_skipped_and_ten_end_the_run(flags, tmp_path, monkeypatch, capsys):
    """But not its resumption: what is saved are the weights before them."""
    cfg = rl.Config(**flags | {"max_steps": 6}, out=str(tmp_path / "run")).resolved()
    with monkeypatch.context() as patch:
        patch.setattr(rl, "grpo_loss", lambda logprobs, *_: logprobs.sum() * torch.nan)
        assert rl.main(cfg) == 1
    assert "ten updates in a row" in capsys.readouterr().err
    saved = load_file(*(tmp_path / "run" / "model" / "checkpoint-5").glob("*.safetensors"))  # two passes a step
    start = dict(Policy.from_pretrained(flags["policy"]).named_parameters())
    assert all(torch.equal(saved[name], weight) for name, weight in start.items())
    assert rl.main(replace(cfg, resume=True)) == 0 and len(log_of(cfg.out)) == 6


def test_a_row_that_cannot_be_used_does_not_lose_the_steps_before_it(flags, prompts_folder, tmp_path, capsys):
    lines = (prompts_folder / "comparisons.jsonl").read_text().splitlines()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "images").symlink_to(prompts_folder / "images")
    cfg = rl.Config(**flags | {"data": str(tmp_path / "bad")}, out=str(tmp_path / "run")).resolved()
    train = [i for i in range(20) if i not in {0, 10}]  # those two are held out
    second = train[rl.Order([[1] * 18], [1.0], 3, 0).rows_of_step(1)[0][1]]
    lines[second] = "{"
    (tmp_path / "bad" / "comparisons.jsonl").write_text("".join(line + "\n" for line in lines))
    assert rl.main(cfg) == 1
    printed = capsys.readouterr().err
    assert f"comparisons.jsonl:{second + 1}: malformed JSON" in printed and "1 steps under model are saved" in printed


def test_a_full_disk_loses_nothing_and_a_signal_waits_only_inside_the_loop(flags, tmp_path, monkeypatch):
    """The policy cannot be written: the checkpoint of the last step stays, and --resume ends the run. Outside the loop
    a signal has its usual effect, at once."""
    handlers, step, evaluate = [], rl.grpo_step, rl.evaluate_policy
    monkeypatch.setattr(rl, "grpo_step", lambda *a: handlers.append(signal.getsignal(signal.SIGTERM)) or step(*a))
    monkeypatch.setattr(rl, "evaluate_policy",
                        lambda *a: handlers.append(signal.getsignal(signal.SIGTERM)) or evaluate(*a))

    def full(*_):
        raise OSError("cannot write policy (no space left)")

    cfg = rl.Config(**flags | {"max_steps": 1, "save_every": 0}, out=str(tmp_path / "run")).resolved()
    with monkeypatch.context() as patch:
        patch.setattr(rl.Policy, "save_pretrained", full)
        with pytest.raises(OSError, match="no space left"):
            rl.main(cfg)
    before, inside, after = handlers
    assert before == after == signal.SIG_DFL != inside
    assert not (tmp_path / "run" / "model" / "result.json").exists()
    assert rl.main(replace(cfg, resume=True)) == 0 and (tmp_path / "run" / "model" / "policy").is_dir()
    assert len(log_of(cfg.out)) == 1


def test_the_tables_figures_by_head():
    """Two prompts with an answer, of two rollouts each, and one without."""
    def record(answer, matches, truncated, length):
        return {"category": "a", "answer": answer, "matches": matches, "truncated": truncated, "length": length,
                "model_reward": [1.0, 3.0], "paid": {name: list(map(float, matches)) for name in rl.REWARDS}}

    f = rl.policy_figures({"kl": 0.3, "records": [
        record("x", [True, True], [False, False], [2, 2]),
        record("y", [True, False], [False, False], [3, 3]),
        record("", [False, False], [False, True], [5, 5])]})
    assert f["accuracy"] == 0.75 and f["accuracy_by_category"] == {"a": 0.75}
    assert f["standard_error"] == 0.25 / math.sqrt(2) and f["length"] == 20 / 6 and f["truncated"] == 1 / 6
    assert f["model_reward"] == 2.0 and f["paid"]["rule"] == 0.5 and f["kl"] == 0.3  # paid: of 1, 1/2 and 0


# ----------------------------------------------------------------------------------------- bad input

def test_numbers_that_make_no_sense_are_refused_before_anything_is_loaded():
    """A weight of NaN would pass every comparison with zero and end in a model of NaN."""
    for name, value in (("kl_coef", math.nan), ("clip_eps", -1.0), ("clip", math.nan), ("lr", math.inf), ("lr", -1.0),
                        ("max_steps", 0), ("epochs", math.inf), ("group_size", 1), ("save_every", -1)):
        with pytest.raises(ValueError, match=name) as error:
            rl.Config(**{name: value}).resolved()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="needs --data"):
        rl.Config(policy="somewhere").resolved()


def test_bad_input_gets_one_line_that_says_what_to_do(whole_run, flags, reward_folder, backbones, tiny, tmp_path,
                                                      monkeypatch):
    other = small_backbone(tmp_path / "other", texts=["entirely different words make other tokens"] * 50, seed=1,
                           vocabulary_head=True)
    RewardModel.from_backbone(backbones("qwen2")).save_pretrained(tmp_path / "blind")
    spoilt = copy.deepcopy(tiny)
    torch.nn.init.constant_(spoilt.head[-1].bias, torch.nan)
    spoilt.save_pretrained(tmp_path / "spoilt")
    rows = [{"prompt": "Name a colour.", "answer": "red"}, {"prompt": "Name a fruit."}]
    for name, lines in (("unanswered", rows), ("empty", []),
                        ("no_image", [{"prompt": "<image>What?", "images": ["none.png"], "answer": "a"}] * 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparisons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    monkeypatch.chdir(tmp_path)
    cases = [({"policy": str(other)}, "reads other tokens than policy"),
             ({"policy": str(reward_folder)}, "vocabulary head"),
             ({"policy": "/nowhere"}, "cannot load"), ({"data": str(tmp_path / "empty")}, "holds no row"),
             ({"reward": ["rule"], "data": str(tmp_path / "unanswered")}, r"comparisons.jsonl:2: no `answer`"),
             ({"data": str(tmp_path / "no_image")}, "none.png does not exist"),
             ({"reward_model": [str(tmp_path)]}, "not a saved reward model"),
             ({"reward_model": ["runs/default"]}, "`python train.py --out runs/default` makes one"),
             ({"reward_model": [str(tmp_path / "blind")]}, "other images or none"),
             ({"reward_model": [str(tmp_path / "spoilt")]}, "not finite in the evaluation")]
    for number, (change, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message) as error:
            rl.main(rl.Config(**flags | change, out=str(tmp_path / f"run{number}")).resolved())
        assert "\n" not in str(error.value)
    for damaged in (b"junk", b""):
        shutil.copytree(whole_run.out, tmp_path / "damaged", dirs_exist_ok=True)
        (tmp_path / "damaged" / "model" / "result.json").unlink()
        (tmp_path / "damaged" / "model" / "checkpoint-2").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "model" / "checkpoint-2" / "state.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="state.json cannot be read .*; remove"):
            rl.main(replace(whole_run, resume=True, out=str(tmp_path / "damaged")))


# ----------------------------------------------------------------------------------------- other people's trainers

def test_score_is_a_reward_function_of_trl(policy_folder, tiny, tmp_path):
    """The README's own lines: GRPOTrainer runs with them; and rows with images, as TRL hands them on, get the reward of
    `score`."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer
    (lines,) = re.findall(r"^def base_reward.*?^    return rewards$", (ROOT / "README.md").read_text(), re.M | re.S)
    exec(lines, names := {"reward_model": tiny})
    reward = names["base_reward"]
    c = visual_and_text()[0]
    asked = [{"role": "user", "content": c.prompt.replace("<image>", "")}]
    messages = trl.data_utils.prepare_multimodal_messages(asked, images=c.images)
    answers = [[{"role": "assistant", "content": text}] for text in c.responses]
    rewards = reward(prompts=[messages] * len(answers), completions=answers, completion_ids=None,
                     images=[c.images] * len(answers), trainer_state=None)
    assert rewards == pytest.approx(tiny.score(c.prompt, c.responses, c.images), abs=1e-5)

    folder = small_backbone(tmp_path / "text", model_type="qwen2", vocabulary_head=True)
    questions = [[{"role": "user", "content": f"Name a colour, number {i}."}] for i in range(4)]
    options = trl.GRPOConfig(output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=2,
                             max_completion_length=4, max_steps=1, beta=0.0, report_to=[], use_cpu=True, bf16=False,
                             save_strategy="no", logging_steps=1)
    trainer = trl.GRPOTrainer(model=str(folder), reward_funcs=reward, args=options,
                              train_dataset=Dataset.from_list([{"prompt": question} for question in questions]),
                              processing_class=AutoTokenizer.from_pretrained(folder))
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["rewards/base_reward/mean"])
