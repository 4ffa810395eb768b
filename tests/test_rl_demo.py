"""GRPO, in the order of rl_demo.py: what is paid, what is learnt from it, and that neither ranks nor interruptions
change it. What a policy is and how it writes: test_model.py."""
import copy
import json
import math
import re
import shutil
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TWO_RANKS, real_curves, small_backbone
from safetensors.torch import load_file
from transformers import HfArgumentParser

import rl_demo as rl
from data import synthetic, write_comparisons
from model import Policy, RewardModel, encode, pack
from train import start_processes
from two_ranks_rl import stop_after_two_steps


def teach_policy(folder):
    """A tiny policy that has seen a few answers: enough to end most of its own, so that rollouts differ in length and
    few are cut off."""
    small_backbone(folder, seed=3, vocabulary_head=True)
    policy = Policy.from_pretrained(folder)
    optimizer, rows = torch.optim.AdamW(policy.parameters(), lr=3e-3), synthetic(48, seed=6)
    for step in range(12):
        shown = [replace(c, pairs=[]) for c in rows[step * 4:step * 4 + 4]]
        (-policy(pack(shown, policy.processor)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.save_pretrained(folder)
    return folder


def save_reward_model(folder, backbone):
    """A reward model with random weights and the policy's tokenizer."""
    torch.manual_seed(0)
    RewardModel.from_backbone(backbone).save_pretrained(folder)
    return folder


def draw_prompts(folder):
    return write_comparisons(folder, synthetic(20, seed=5), bar=False)


def small_run(policy, reward_model, prompts):
    """A run of four steps of three prompts each, paid by a reward model that knows nothing: quick, and every rollout
    counts."""
    return dict(policy=str(policy), reward_model=[str(reward_model)], data=str(prompts), reward=["model"], group_size=4,
                batch_size=3, max_steps=4, passes=2, max_new_tokens=4, lr=1e-3, eval_size=2, pack_tokens=300)


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    return teach_policy(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.fixture(scope="module")
def policy(policy_folder):
    start_processes()
    return Policy.from_pretrained(policy_folder)


@pytest.fixture(scope="module")
def reward_folder(backbones, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), backbones())


@pytest.fixture(scope="module")
def prompts_folder(tmp_path_factory):
    return draw_prompts(tmp_path_factory.mktemp("prompts") / "drawn")


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


def prompts_of(policy, comparisons):
    """[(row, comparison, encoded), ...], as rl_demo.py hands prompts on."""
    return [(i, c, encode(c, policy.processor).with_responses([])) for i, c in enumerate(comparisons)]


def group_of(prompt, rollouts, end, advantages, sampled=None):
    """A group as roll_out leaves it, with what make_batches needs."""
    row, comparison, encoded = prompt
    truncated = torch.tensor([ids[-1] != end for ids in rollouts])
    sampled = sampled or [[0.0] * len(ids) for ids in rollouts]
    return SimpleNamespace(
        row=row, comparison=comparison, prompt=encoded, rollouts=rollouts, sampled=sampled, truncated=truncated,
        lengths=[len(ids) for ids in rollouts], matches=truncated & False,
        model_rewards=torch.zeros(len(rollouts)), advantages=torch.tensor(advantages))


def shared(policy, cfg, reward_models=()):
    reference = copy.deepcopy(policy).requires_grad_(False)
    return SimpleNamespace(cfg=cfg, device=torch.device("cpu"), reference=reference, reward_models=reward_models,
                           judges=[])


# ----------------------------------------------------------------------------------------- rewards

def paid(kind, r, matches=None, truncated=None):
    no = torch.zeros(len(r), dtype=torch.bool)
    known = [no if x is None else torch.tensor(x) for x in (matches, truncated)]
    return rl.pay(kind, SimpleNamespace(judged=None, model_rewards=torch.tensor(r), matches=known[0],
                                        truncated=known[1]))


def test_hybrid_never_pays_a_wrong_answer_like_a_right_one():
    """In fp32 sigmoid(20) is 1.0 already: a reward model that is sure of a wrong answer would undo the rule."""
    for r in (20.0, 50.0, 1e30):
        assert paid("hybrid", [-50.0, r, 0.0], [True, False, False])[0] == 1 > paid("hybrid", [-50.0, r, 0.0])[1] > 0.99
    assert paid("hybrid", [0.0, 5.0])[0] == 0.5  # and where nothing matches, the reward model ranks


def test_pairwise_rewards_sum_to_zero_and_keep_the_order():
    r = [2.0, -1.0, 0.5]
    rewards = paid("pairwise", r)
    torch.testing.assert_close(rewards.sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert rewards.argsort().tolist() == torch.tensor(r).argsort().tolist()
    one = 1 / (1 + math.exp(-3)) - 0.5 + 1 / (1 + math.exp(-1.5)) - 0.5  # the first against the second and the third
    torch.testing.assert_close(rewards[0], torch.tensor(one))


@pytest.mark.parametrize("kind", rl.REWARDS)
def test_a_rollout_that_was_cut_off_is_paid_the_least_of_its_group(kind):
    """Otherwise a policy that never stops would be paid for an end that it did not write."""
    rewards = paid(kind, [1.0, 0.0, 5.0], [True, False, False], [False, False, True])
    assert rewards[2] == rewards.min() and rewards[0] > rewards[2]


def test_an_unknown_reward_is_an_error_and_pays_nothing(capsys):
    with pytest.raises(KeyError):
        paid("best", [1.0, 2.0])
    with pytest.raises(SystemExit):
        HfArgumentParser(rl.Config).parse_args_into_dataclasses(["--reward", "best"])
    assert "choose from" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- the answer rule
SAME = [("Red", "red"), ("  red \n", "red"), ("red.", "red"), ('"Red"!', "red"), ("**red**", "red"), ("red", "Red."),
        ("The answer is: red", "red"), ("red  circle, left", "red circle left"), ("1,000", "1000"), ("2.50", "2.5"),
        (".5", "0.5"), ("3.0", "3"), ("\u22123", "-3"), ("3:45", "3:45"), ("1/2", "1/2"), ("5 cm", "5"), ("50%", "50"),
        ("$5", "5 dollars"), ("12 °", "12"), ("(A)", "A"), ("a", "A"), ("B.", "b"), ("C) a red circle", "C"),
        ("Option D", "D"), ("The correct answer is (b).", "B"), ("Answer: C", "C"), ("A. red", "red"), ("- red", "red"),
        ("I think \\boxed{7}", "7"), ("<think>4?</think><answer>5</answer>", "5"), ("(B) 3 cm", "B"), ("10²", "10^2"),
        ("caf\u00e9", "CAFE\u0301")]
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
    """Case, spaces, punctuation, emphasis, a unit, an option's letter. Signs and order count, math-verify or not."""
    if with_math_verify:
        pytest.importorskip("math_verify")
    monkeypatch.setattr(rl, "MATH_VERIFY", with_math_verify)
    answer_matches = rl.answer_matches.__wrapped__  # its memory knows nothing of what was installed
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
    batch = pack([p.with_responses([[270, 271], [policy.end]]) for _, _, p in prompts_of(policy, visual_and_text())])
    assert not rl.kl_estimate(policy(batch), copy.deepcopy(policy)(batch)).any()


def test_the_clip_stops_a_token_that_has_moved_far_enough_and_only_in_that_direction():
    moves = ((1.5, 1.0, False), (1.25, 1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.5, -1.0, True))
    for moved, advantage, pulls in moves:
        now, old = torch.tensor([math.log(0.1 * moved)], requires_grad=True), torch.tensor([math.log(0.1)])
        rl.grpo_loss(now, old, now.detach(), torch.tensor([advantage]), 1, 0.2, 0.28).backward()
        assert bool(now.grad.any()) == pulls, (moved, advantage)


def test_the_first_gradient_is_that_of_reinforce_one_rollout_at_a_time(policy):
    """Sum over rollouts of A times the gradient of log pi, divided by the number of tokens."""
    policy, groups = copy.deepcopy(policy), []
    for prompt in prompts_of(policy, visual_and_text()):
        rollouts = [[270, 271, policy.end], [265, policy.end], [300, 301, 302]]
        groups.append(group_of(prompt, rollouts, policy.end, [1.0, -0.25, -0.75]))
    tokens = sum(len(ids) for g in groups for ids in g.rollouts)
    for g in groups:
        for ids, advantage in zip(g.rollouts, g.advantages):
            (-advantage * policy(pack([g.prompt.with_responses([ids])])).sum() / tokens).backward()
    naive = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    batches, counted = rl.make_batches(groups, shared(policy, rl.Config(pack_tokens=100)))
    assert counted == tokens and len(batches) > 1
    for batch in batches:
        logprobs = policy(batch.pack)
        rl.grpo_loss(logprobs, logprobs.detach(), logprobs.detach(), batch.advantage, tokens).backward()
    scale = float(max(g.abs().max() for g in naive.values()))
    for name, p in policy.named_parameters():
        torch.testing.assert_close(p.grad, naive[name], atol=1e-5 * scale, rtol=1e-4, msg=lambda m: f"{name}: {m}")


def test_a_second_pass_keeps_the_first_ones_probabilities_as_the_old_ones(policy, monkeypatch):
    """grpo_step with two passes against the same written out: rho is measured from where the rollouts were drawn, at
    every pass; and what is logged beside the loss is what it says."""
    rollouts = [[270, policy.end], [271, 272]]
    prompt = prompts_of(policy, visual_and_text()[:1])[0]
    cfg = rl.Config(policy="p", data="d", passes=2, lr=0.5, kl_coef=0.1, clip=1e9, no_std=True).resolved()
    ours, naive, of = copy.deepcopy(policy), copy.deepcopy(policy), shared(policy, cfg)
    drawn_with = policy(pack([prompt[2].with_responses(rollouts)])).detach()
    as_drawn = [(drawn_with[:2] + 0.5).tolist(), drawn_with[2:].tolist()]
    group = group_of(prompt, rollouts, policy.end, [1.0, -1.0], as_drawn)
    monkeypatch.setattr(rl, "roll_out", lambda *_: [group])
    monkeypatch.setitem(rl.REWARDS, "model", lambda group: torch.tensor([2.0, 0.0]))
    line = rl.grpo_step("model", 0, [], ours, torch.optim.SGD(ours.parameters(), lr=0.5), of)

    optimizer, steps, advantage = torch.optim.SGD(naive.parameters(), lr=0.5), [], torch.tensor([1.0, 1.0, -1.0, -1.0])
    for _ in range(2):
        optimizer.zero_grad()
        logprobs = naive(pack([prompt[2].with_responses(rollouts)]))
        loss = rl.grpo_loss(logprobs, drawn_with, drawn_with, advantage, 4, kl_coef=0.1)
        loss.backward()
        optimizer.step()
        steps.append(logprobs.detach())
    assert (steps[1] - steps[0]).abs().max() > 0.1  # the first pass moved the policy, so it matters which is the old
    for a, b in zip(ours.parameters(), naive.parameters()):
        torch.testing.assert_close(a, b)
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert line["reward"] == 1.0 and line["tokens"] == 4
    assert line["kl"] == pytest.approx(float(rl.kl_estimate(steps[1], drawn_with).mean()), rel=1e-5)
    assert line["off_policy"] == pytest.approx(0.25, abs=1e-4)  # two of four tokens were drawn half a nat away


def test_cut_off_rollouts_leave_the_loss_only_when_asked_to(policy):
    prompt = prompts_of(policy, visual_and_text()[:1])[0]
    group = group_of(prompt, [[270, policy.end], [271, 272]], policy.end, [1.0, -1.0])
    for mask, kept, advantage in ((False, [True] * 4, [1, 1, -1, -1]), (True, [True, True, False, False], [1, 1])):
        (batch,), tokens = rl.make_batches([group], shared(policy, rl.Config(mask_truncated=mask, pack_tokens=1000)))
        assert batch.keep.tolist() == kept and batch.advantage.tolist() == advantage and tokens == sum(kept)


# ----------------------------------------------------------------------------------------- rollouts and their pay

def test_rollouts_depend_on_seed_step_and_row_and_not_on_their_neighbours(policy):
    """So neither the number of ranks nor the rows that are written at a time change a run."""
    prompts, of = prompts_of(policy, visual_and_text()), SimpleNamespace(reward_models=[], judges=[])
    of.cfg = rl.Config(group_size=3, max_new_tokens=5, rollout_rows=6)
    together = [g.rollouts for g in rl.roll_out(policy, prompts, 0, of)]
    assert [rl.roll_out(policy, [prompt], 0, of)[0].rollouts for prompt in prompts] == together
    assert rl.roll_out(policy, prompts[:1], 1, of)[0].rollouts != together[0]
    assert len({tuple(ids) for ids in together[0]}) > 1  # and the rollouts of a prompt differ from one another


def rolled(policy, monkeypatch, written, comparisons, models, pack_tokens):
    """Groups whose rollouts are given, scored."""
    monkeypatch.setattr(rl, "generate", lambda *_: (written, [[[0.0] * len(ids) for ids in own] for own in written]))
    return rl.roll_out(policy, prompts_of(policy, comparisons), 0,
                       SimpleNamespace(cfg=rl.Config(pack_tokens=pack_tokens), reward_models=models, judges=[]))


def test_equal_rollouts_are_paid_equally_to_the_last_bit(policy, tiny, monkeypatch):
    """In fp32 the same words in two branches differ by a rounding, which the division by the standard deviation would
    blow up to an advantage."""
    ids = [265, 270, policy.end]
    written = [[ids] * 7 + [[265, 271]]] + [[ids] * 8] * 2
    groups = rolled(policy, monkeypatch, written, visual_and_text(), [tiny], 300)
    assert groups[0].truncated.tolist() == [False] * 7 + [True] and len(groups[0].model_rewards.unique()) == 2
    assert groups[0].lengths == [2] * 8  # without the end
    for kind in ("model", "hybrid", "pairwise"):
        assert not any(rl.group_advantages(rl.pay(kind, g)).any() for g in groups[1:])


def test_every_rollout_gets_the_reward_of_its_own_words(policy, tiny, monkeypatch):
    """Across packs, with repeated rollouts, and with one that was cut off, whose reward is read at an <|im_end|> put
    behind it; an ensemble pays the mean of its members."""
    end, comparisons = policy.end, visual_and_text()
    other = copy.deepcopy(tiny)
    torch.nn.init.normal_(other.head[-1].weight)
    written = [[[265, end], [270, 271, end], [265, end], [300, 301]], [[end], [271, end], [270, end], [end]],
               [[271, end], [271, end], [271, end], [265, end]]]
    alone = []
    for model in (tiny, other):
        groups = rolled(policy, monkeypatch, written, comparisons, [model], 70)
        for group, rollouts in zip(groups, written):
            ended = [ids if ids[-1] == end else [*ids, end] for ids in rollouts]
            one_by_one = [model(pack([group.prompt.with_responses([ids])]))[0].item() for ids in ended]
            torch.testing.assert_close(group.model_rewards, torch.tensor(one_by_one), atol=1e-5, rtol=0)
        alone.append(torch.stack([g.model_rewards for g in groups]))
    both = torch.stack([g.model_rewards for g in rolled(policy, monkeypatch, written, comparisons, [tiny, other], 70)])
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)


# ----------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory):
    with real_curves():
        return run(flags, tmp_path_factory.mktemp("runs") / "whole")


def weights_of(out):
    return load_file(Path(out) / "model" / "policy" / "model.safetensors")


def log_of(out, kind="model"):
    return [json.loads(line) for line in (Path(out) / kind / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_table_curves_and_a_page_that_needs_no_other_file(whole_run):
    out = Path(whole_run.out)
    summary, html = json.loads((out / "summary.json").read_text()), (out / "index.html").read_text()
    policies = summary["policies"]
    assert set(policies) == {"start", "model"} and policies["start"]["kl"] == 0 < policies["model"]["kl"]
    assert ("<svg" in html) == (out / "curves.svg").exists() == (find_spec("matplotlib") is not None)
    assert "data:image/jpeg" in html
    assert "small rule" in summary["checked"] and summary["checked"] in html
    assert not re.search(r'(?:src|href)="(?!data:|#)', html) and "Some prompts, before and after" in html
    rows = log_of(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and row["kl"] >= 0 and 0 <= row["off_policy"] < 1e-4 for row in rows)
    assert Policy.from_pretrained(out / "model" / "policy").end == 2
    assert not list(out.rglob("*.partial")) and not list(out.rglob("checkpoint*"))
    header, _, start, model = (out / "table.md").read_text().splitlines()
    gain = f"{100 * (policies['model']['accuracy'] - policies['start']['accuracy']):+.1f}"
    assert header.startswith("| policy") and start.startswith("| start ") and model.endswith(f" {gain} |")


def test_a_report_without_matplotlib_has_all_but_the_picture(whole_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole_run.out, tmp_path / "run")
    (tmp_path / "run" / "curves.svg").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    _, held = rl.open_prompts(whole_run)
    with real_curves():
        rl.write_report(tmp_path / "run", held, whole_run, torch.device("cpu"))
    assert capsys.readouterr().out == "no curves.svg: pip install matplotlib draws it\n"
    html = (tmp_path / "run" / "index.html").read_text()
    assert "<svg" not in html and "Some prompts, before and after" in html and "data:image/jpeg" in html


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
    with pytest.raises(ValueError, match="another run's: lr was 0.001, is 0.01"):
        rl.main(replace(cfg, lr=0.01, resume=True))
    assert rl.main(replace(cfg, resume=True)) == 0
    assert [row["step"] for row in log_of(cfg.out)] == [1, 2, 3, 4]
    ours, theirs = weights_of(cfg.out), weights_of(whole_run.out)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def make_two_ranks(folder, backbones):
    made = small_run(teach_policy(folder / "policy"), save_reward_model(folder / "reward", backbones()),
                     draw_prompts(folder / "drawn"))
    words = []
    for name, value in (made | {"out": folder / "two"}).items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


TWO_RANKS["rl_demo"] = make_two_ranks


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what a process maps is told by Linux alone")
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
    with pytest.raises(ValueError, match="start.json is another run's: eval_size was 6, is 7"):
        rl.main(replace(cfg, resume=True, eval_size=7))


def test_prompts_without_answers_are_paid_but_not_called_wrong(flags, tmp_path):
    write_comparisons(tmp_path / "asked", [replace(c, answer="") for c in synthetic(20, seed=5)], bar=False)
    run(flags, tmp_path / "run", data=str(tmp_path / "asked"), max_steps=1)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["policies"]["model"]["accuracy"] is None
    assert log_of(tmp_path / "run")[0]["accuracy"] is None


def test_groups_that_agree_are_dropped_when_asked_to(flags, tmp_path):
    """A policy that is never right under `rule`: every reward is 0 and every group agrees."""
    for drop in (False, True):
        run(flags, tmp_path / str(drop), reward=["rule"], max_steps=1, drop_equal=drop)
        (row,) = log_of(tmp_path / str(drop), "rule")
        assert row["equal_groups"] == 1 and bool(row["tokens"]) != drop


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
    second = train[rl.Order([[1] * 18], [1.0], 3, 0).step(1)[0][1]]
    lines[second] = "{"
    (tmp_path / "bad" / "comparisons.jsonl").write_text("".join(line + "\n" for line in lines))
    assert rl.main(cfg) == 1
    said = capsys.readouterr().err
    assert f"comparisons.jsonl:{second + 1}: malformed JSON" in said and "1 steps under model are saved" in said


def test_a_full_disk_loses_nothing_and_a_signal_waits_only_inside_the_loop(flags, tmp_path, monkeypatch):
    """The policy cannot be written: the checkpoint of the last step stays, and --resume ends the run. Outside the loop
    a signal has its usual effect, at once."""
    handlers, step, examine = [], rl.grpo_step, rl.examine
    monkeypatch.setattr(rl, "grpo_step", lambda *a: handlers.append(signal.getsignal(signal.SIGTERM)) or step(*a))
    monkeypatch.setattr(rl, "examine", lambda *a: handlers.append(signal.getsignal(signal.SIGTERM)) or examine(*a))

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
                "model_reward": [1.0, 3.0], "paid": {kind: list(map(float, matches)) for kind in rl.REWARDS}}

    f = rl.figures({"kl": 0.3, "records": [record("x", [True, True], [False, False], [2, 2]),
                                           record("y", [True, False], [False, False], [3, 3]),
                                           record("", [False, False], [False, True], [5, 5])]})
    assert f["accuracy"] == 0.75 and f["accuracy_by_category"] == {"a": 0.75}
    assert f["standard_error"] == 0.25 / math.sqrt(2) and f["length"] == 20 / 6 and f["truncated"] == 1 / 6
    assert f["model_reward"] == 2.0 and f["paid"]["rule"] == 0.5 and f["kl"] == 0.3  # paid: of 1, 1/2 and 0


# ----------------------------------------------------------------------------------------- bad input

def test_numbers_that_make_no_sense_are_refused_before_anything_is_loaded():
    """A weight of NaN would pass every comparison with zero and end in a model of NaN."""
    for name, value in (("kl_coef", math.nan), ("clip_eps", -1.0), ("clip", math.nan), ("lr", math.inf), ("lr", -1.0),
                        ("max_steps", 0), ("epochs", math.inf), ("group_size", 1), ("save_every", -1),
                        ("clip_eps_high", -0.1)):
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
             ({"reward_model": [str(tmp_path / "spoilt")]}, "what the examination gives is not finite")]
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

    folder = small_backbone(tmp_path / "text", kind="qwen2", vocabulary_head=True)
    questions = [[{"role": "user", "content": f"Name a colour, number {i}."}] for i in range(4)]
    options = trl.GRPOConfig(output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=2,
                             max_completion_length=4, max_steps=1, beta=0.0, report_to=[], use_cpu=True, bf16=False,
                             save_strategy="no", logging_steps=1)
    trainer = trl.GRPOTrainer(model=str(folder), reward_funcs=reward, args=options,
                              train_dataset=Dataset.from_list([{"prompt": question} for question in questions]),
                              processing_class=AutoTokenizer.from_pretrained(folder))
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["rewards/base_reward/mean"])
