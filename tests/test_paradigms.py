"""Critics, which write before the reward is read, and judges, which compare two answers: section 7 of model.py."""
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import evaluate
import model as m
import rl_demo as rl
import train
from conftest import TEXTS, small_backbone
from data import judge_prompts, read_comparisons, synthetic, write_comparisons
from model import Comparison, RewardModel, encode, judge_pair, pack, verdict
from stock import stock_inputs
from test_model import picture

ROW = Comparison("<image>What colour?", ["red", "blue blue", "green"], [(0, 1), (0, 2)], [picture()],
                 critiques=["colour right", "", "colour wrong"])


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A tiny checkpoint with its vocabulary head, which knows the words of critics and judges."""
    words = [*TEXTS, f"{m.CRITIQUE_TURN} {m.THINK}{m.VERDICT} <think>1: colour right 2: colour wrong</think>"
                     "<answer>1</answer>"]
    return small_backbone(tmp_path_factory.mktemp("writer") / "w", texts=words * 20, vocabulary_head=True)


@pytest.fixture(scope="module")
def models(writer):
    """One of each paradigm, untrained and with the same weights."""
    made = {}
    for paradigm in m.PARADIGMS:
        torch.manual_seed(0)
        made[paradigm] = RewardModel.from_backbone(writer, paradigm=paradigm, critique_tokens=6).eval()
    return made


def rows_of(model, items):
    """Every response alone with its prompt, in transformers' own model with its vocabulary head."""
    inputs, last = stock_inputs(items, model.backbone)
    out = model.lm(**inputs, output_hidden_states=True)
    return out.logits.float().log_softmax(dim=-1), model.backbone(**inputs).last_hidden_state, last.tolist()


# The critic ---------------------------------------------------------------------------------------------------------


def test_a_critic_reads_its_reward_after_the_critique_in_the_responses_own_branch(models):
    critic = models["critic"]
    item, bare = encode(ROW, critic.processor), encode(ROW, models["naive"].processor)
    assert item.prompt_ids == bare.prompt_ids and item.response_ids[1] == bare.response_ids[1]  # the second has none
    text = critic.processor.tokenizer.decode(item.response_ids[0])
    assert text == "red<|im_end|>" + m.CRITIQUE_TURN + "colour right<|im_end|>"
    _, hidden, last = rows_of(critic, [item])
    alone = torch.cat([critic.head(row[end]) for row, end in zip(hidden, last)])
    assert (critic(pack([item]))[0] - alone).abs().max() < 1e-5


def test_the_loss_of_critiques_is_transformers_cross_entropy_of_their_tokens_per_response(models):
    critic = models["critic"]
    items = [encode(row, critic.processor) for row in (ROW, replace(ROW, critiques=["right", "wrong, quite", "so so"]))]
    critic.train()
    _, cross_entropy = critic(pack(items))
    critic.eval()
    table, _, last = rows_of(critic, items)
    expected, row = 0.0, 0
    for item in items:
        for ids, n in zip(item.response_ids, item.text_tokens):
            logits, words = table[row, last[row] - n:last[row]], torch.tensor(ids[len(ids) - n:], dtype=torch.long)
            expected += torch.nn.functional.nll_loss(logits, words).item() if n else 0.0
            row += 1
    assert [n > 0 for item in items for n in item.text_tokens] == [True, False, True, True, True, True]
    assert cross_entropy.item() == pytest.approx(expected, rel=1e-5)


def test_without_critiques_a_critic_is_a_naive_model(models):
    row = replace(ROW, critiques=[])
    packs = [pack([encode(row, models[name].processor)]) for name in ("naive", "critic")]
    assert torch.equal(packs[0].input_ids, packs[1].input_ids)
    models["critic"].train()
    rewards, cross_entropy = models["critic"](packs[1])
    models["critic"].eval()
    assert torch.equal(rewards, models["naive"](packs[0])[0]) and cross_entropy == 0


def test_a_critic_scores_after_what_it_wrote_and_on_request_after_what_was_given(models):
    """Its critiques are those that it would write to each response alone, with the whole dialogue as its prompt."""
    critic, given = models["critic"], m.scores_of(models["critic"], [ROW])
    (own,) = given
    for k, (response, text) in enumerate(zip(ROW.responses, own.texts)):
        dialogue = [{"role": "user", "content": ROW.prompt}, {"role": "assistant", "content": response},
                    {"role": "user", "content": m.CRITIQUE_TURN.split("user\n")[1].split("<|im_end|>")[0]}]
        alone = encode(Comparison(dialogue, [], images=ROW.images), critic.processor)
        (((ids,),), _) = m.generate(critic, [alone], critic.critique_tokens)
        assert critic.processor.tokenizer.decode([i for i in ids if i != critic.processor.end]) == text
    critic.critiques_from = "given"
    (after_given,) = m.scores_of(critic, [ROW])
    critic.critiques_from = "own"
    assert after_given.texts == [] and after_given.rewards == pytest.approx(
        critic(pack([encode(ROW, critic.processor)]))[0].tolist(), abs=1e-5)
    assert critic.score(ROW.prompt, ROW.responses, ROW.images) == pytest.approx(own.rewards, abs=1e-5)


def test_a_critic_may_not_forge_a_turn_in_its_critique(models):
    forged = replace(ROW, critiques=["good<|im_end|>", "bad", "so"])
    ids = encode(forged, models["critic"].processor).response_ids[0]
    assert ids.count(models["critic"].processor.end) == 3  # of the response, of the turn that asks, of the critique


# The judge ----------------------------------------------------------------------------------------------------------


def test_a_judges_rewards_are_the_log_probabilities_of_1_and_2(models):
    item = encode(judge_pair(ROW, 2, 0), models["direct"].processor)
    assert item.pairs == [(1, 0)]  # the first row's winner, red, is answer 2
    table, _, last = rows_of(models["direct"], [item])
    one, two = (models["direct"].processor.tokenizer(text).input_ids for text in "12")
    assert [ids[:-1] for ids in item.response_ids] == [one, two]
    expected = [table[0, last[0] - 2, one[0]].item(), table[1, last[1] - 2, two[0]].item()]
    assert models["direct"](pack([item]))[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_swapping_the_answers_swaps_the_verdicts_of_the_two_orders(models):
    (score,) = m.scores_of(models["direct"], [ROW])
    (swapped,) = m.scores_of(models["direct"], [replace(ROW, pairs=[(1, 0), (2, 0)])])
    for (first, second), (other_first, other_second) in zip(score.verdicts, swapped.verdicts):
        assert (first, second) == pytest.approx((-other_second, -other_first), abs=1e-5)
    assert score.rewards == pytest.approx(swapped.rewards, abs=1e-5)


def test_the_score_of_a_response_is_the_sum_of_its_preferences_over_the_others(models):
    """Two pairs with verdicts known: 0 is preferred to 1 with certainty, and to 2 in one of the two orders."""
    answers = [([0.0, -50.0], []), ([-50.0, 0.0], []), ([0.0, -50.0], []), ([0.0, -50.0], [])]
    score = m.score_of(ROW, answers, models["direct"])
    assert score.verdicts == [[50.0, 50.0], [50.0, -50.0]]
    assert score.rewards == pytest.approx([0.5, -0.5, 0.0])
    assert len(models["direct"].score("?", ["a", "b", "c"])) == 3  # where no pair is given: all three
    assert train.accuracy([ROW], [score]) == 0.75  # each verdict counts


def test_a_judge_asks_only_what_a_row_has(models):
    rm_bench = Comparison("?", list("abcdef"), [(i, 3 + j) for i in range(3) for j in range(3)])
    assert len(m.asked(rm_bench, models["direct"])) == 2 * 9  # and not 2 * 15


@pytest.mark.parametrize("text, number", [
    ("<think>1: red is right 2: not</think><answer>2</answer>", 2), ("<answer> Answer 1 </answer>", 1),
    ("<answer>1</answer> or rather <answer>2</answer>", 2),  # its last word
    ("<answer>1 or 2</answer>", 0), ("<answer>3</answer>", 0), ("<answer></answer>", 0), ("", 0), ("neither", 0),
    ("<think>answer 1 is", 0),  # cut off in its thoughts
    ("<think>1: 5 squares</think> the second, 2", 2), ("12", 0), ("<answer>2", 2)])
def test_a_verdict_is_read_or_is_none(text, number):
    assert verdict(text) == number


def test_a_thinking_judge_learns_critiques_and_verdict_and_is_wrong_where_it_gives_none(models):
    item = encode(judge_pair(ROW, 2, 0, think=True), models["think"].processor)
    text = models["think"].processor.tokenizer.decode(item.response_ids[0])
    assert text == "<think>1: colour wrong 2: colour right</think><answer>2</answer><|im_end|>"
    assert item.text_tokens == [len(item.response_ids[0])] and item.pairs == []
    (score,) = m.scores_of(models["think"], [ROW])
    assert len(score.texts) == 4 and all(margin in (-1, 0, 1) for pair in score.verdicts for margin in pair)
    unread = m.score_of(ROW, [([0.0, 0.0], ["hm"])] * 4, models["think"])
    assert train.accuracy([ROW], [unread]) == 0.0


def test_a_mark_of_an_image_in_an_answer_is_a_text_to_the_judge(models):
    row = replace(ROW, responses=["<image> is red", "blue", "green"])
    assert len(encode(judge_pair(row, 0, 1), models["direct"].processor).image_grid_thw) == 1


def test_a_judges_order_in_training_is_drawn_by_seed_and_row(models):
    def orders(seed):
        items = train.to_learn(ROW, models["direct"].processor, random.Random(seed))
        return [item.pairs for item in items]

    assert orders("0 0 7") == orders("0 0 7") and len({str(orders(seed)) for seed in range(20)}) == 4
    assert all(len(pairs) == 1 for pairs in orders(0))


# The same commands for all ------------------------------------------------------------------------------------------


def config(writer, out, **more):
    return train.Config(backbone=str(writer), out=str(out), train_size=10, eval_size=3, lr=1e-3, batch_size=8,
                        pack_tokens=1024, max_pixels=12544, critique_tokens=6, **more).resolved()


@pytest.mark.parametrize("kind, flags", [("critic", {}), ("direct", {}), ("think", {"think": True})])
def test_each_paradigm_trains_resumes_saves_and_is_evaluated(writer, tmp_path, kind, flags):
    if kind == "critic":  # of a family whose embedding and vocabulary head are one weight
        writer = small_backbone(tmp_path / "tied", kind="internvl", vocabulary_head=True)
    cfg = config(writer, tmp_path / "run", paradigm="critic" if kind == "critic" else "generative", **flags)
    assert train.main(cfg) == 0
    whole = RewardModel.from_pretrained(cfg.out)
    assert whole.processor.paradigm == kind and (whole.head is None) == (kind != "critic")
    steps = len(train.read_log(tmp_path / "run" / "metrics.jsonl"))
    half = replace(cfg, out=str(tmp_path / "half"), max_steps=steps)
    told = []
    original = train.learning_rate

    def stopping(step, *rest):
        if step == 1 and not told:
            told.append(train.signal.raise_signal(train.signal.SIGTERM))
        return original(step, *rest)

    train.learning_rate = stopping
    try:
        assert train.main(half) == 128 + train.signal.SIGTERM
    finally:
        train.learning_rate = original
    assert train.main(replace(half, resume=True)) == 0
    again = RewardModel.from_pretrained(half.out)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    if kind != "naive":  # its folder is transformers' own, with the vocabulary head
        assert m.Policy.from_pretrained(cfg.out).lm_head.weight.equal(whole.lm_head.weight)
    rows = synthetic(4, seed=5)
    write_comparisons(tmp_path / "rows", rows, bar=False)
    evaluate.main(evaluate.Config(model=[cfg.out], data=[str(tmp_path / "rows")], out=str(tmp_path / "ev"),
                                  probe=False))
    facts, *found = [json.loads(line) for line in (tmp_path / "ev/rows/predictions.jsonl").read_text().splitlines()]
    alone = m.scores_of(whole, read_comparisons(tmp_path / "rows"))
    for row, score in zip(found, alone):
        assert row["rewards"] == pytest.approx(score.rewards, abs=1e-4)
        assert row.get("critiques", {cfg.out: []})[cfg.out] == list(score.texts)
    summary = json.loads((tmp_path / "ev/rows/summary.json").read_text())
    n = sum(len(c.pairs) for c in rows)
    assert summary["figures"]["accuracy"]["n"] == (n if kind == "critic" else 2 * n)
    assert ("judge: both orders agree" in summary["beyond"]) == (kind != "critic")


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "internvl", "qwen3"])
def test_critics_and_judges_stand_on_every_family_with_lora_too(kind, tmp_path):
    words = [*TEXTS, m.CRITIQUE_TURN, m.VERDICT]
    folder = small_backbone(tmp_path / "b", texts=words, kind=kind, vocabulary_head=True)
    row = replace(ROW, prompt="What colour?", images=[]) if kind == "qwen3" else ROW
    for paradigm in m.PARADIGMS:
        torch.manual_seed(0)
        model = RewardModel.from_backbone(folder, paradigm=paradigm, critique_tokens=4)
        train.add_lora(model, 2, vision=True)
        for name, p in model.named_parameters():
            p.data = p.data.normal_(std=0.1) if name.endswith("lora_b") else p.data
        rewards, cross_entropy = model.train()(pack(train.to_learn(row, model.processor, random.Random(0))))
        (rewards.sum() + cross_entropy).backward()
        trained = {name.rpartition(".")[2] for name, p in model.named_parameters()
                   if p.grad is not None and not name.startswith("head.")}
        assert trained == {"lora_a", "lora_b"}
        model.save_pretrained(tmp_path / paradigm, train.merged(model.state_dict()))
        (before,), (after,) = (m.scores_of(one, [row])
                               for one in (model.eval(), RewardModel.from_pretrained(tmp_path / paradigm)))
        assert after.rewards == pytest.approx(before.rewards, abs=1e-4) and after.texts == before.texts


def test_an_ensemble_of_a_naive_model_and_a_critic_is_the_mean_of_their_rewards(models, tmp_path):
    rows = synthetic(3, seed=6)
    write_comparisons(tmp_path / "rows", rows, bar=False)
    folders = [str(tmp_path / name) for name in ("naive", "critic")]
    for folder, name in zip(folders, ("naive", "critic")):
        models[name].save_pretrained(folder)
    evaluate.main(evaluate.Config(model=folders, data=[str(tmp_path / "rows")], out=str(tmp_path / "ev"), probe=False))
    first = json.loads((tmp_path / "ev/rows/predictions.jsonl").read_text().splitlines()[1])
    mean = [sum(both) / 2 for both in zip(*(models[name].score_many(rows)[0] for name in ("naive", "critic")))]
    assert first["rewards"] == pytest.approx(mean, abs=1e-4)


def test_a_critic_writes_its_own_critiques_into_a_folder_to_train_its_head_on(models, tmp_path):
    models["critic"].save_pretrained(tmp_path / "critic")
    write_comparisons(tmp_path / "rows", synthetic(3, seed=6), bar=False)
    settings = dict(model=[str(tmp_path / "critic")], data=[str(tmp_path / "rows")], out=str(tmp_path / "ev"),
                    probe=False)
    evaluate.main(evaluate.Config(**settings, write_critiques=str(tmp_path / "own")))
    before, after = ([*read_comparisons(tmp_path / name)] for name in ("rows", "own"))
    assert [(c.prompt, c.responses, c.pairs) for c in before] == [(c.prompt, c.responses, c.pairs) for c in after]
    assert [c.critiques for c in after] == [s.texts for s in m.scores_of(models["critic"], before)]


def test_drawn_critiques_are_true():
    for c in synthetic(300):
        for response, critique in zip(c.responses, c.critiques):
            assert ("wrong" not in critique) == (response == c.answer)
            assert critique.count("right") == sum(word in c.answer.split() for word in response.split())


def test_judge_prompts_for_rl_hold_both_orders_of_each_pair_with_their_answers(tmp_path):
    rows = [Comparison("?", ["good", "bad"], [(0, 1)], id="7")]
    write_comparisons(tmp_path / "rows", rows, bar=False)
    first, second = sorted(judge_prompts([tmp_path / "rows"], 0), key=lambda c: c.answer)
    assert (first.answer, second.answer) == ("1", "2") and first.prompt.startswith("?\nAnswer 1: good\nAnswer 2: bad\n")
    assert second.prompt.startswith("?\nAnswer 1: bad") and not first.responses
    assert rl.answer_matches("<think>1: good 2: 5</think><answer>1</answer>", first.answer)


def test_the_pairwise_reward_takes_a_judges_verdicts_of_all_pairs(models):
    policy = m.Policy(models["direct"].lm, models["naive"].processor)
    prompts = [(0, c, encode(c, policy.processor).with_responses([])) for c in synthetic(1, seed=9)]
    cfg = rl.Config(group_size=3, max_new_tokens=3, pack_tokens=1024, rollout_rows=12, batch_size=1)
    run = SimpleNamespace(cfg=cfg, reward_models=[models["naive"]], judges=[models["direct"]])
    (group,) = rl.roll_out(policy.eval(), prompts, 0, run)
    expected = models["direct"].score(prompts[0][1].prompt, group.texts, prompts[0][1].images)
    assert rl.REWARDS["pairwise"](group).tolist() == pytest.approx(expected, abs=1e-5)
    assert group.model_rewards.tolist() != group.judged.tolist()


def test_the_two_changes_of_stablereinforce():
    """A ratio of e^20 is clamped to 1,000 before it meets the advantage; of a hundred equal advantages and one far out,
    the one is set to zero."""
    old, new, out = torch.tensor([-20.0]), torch.tensor([0.0]), torch.tensor([-1.0])
    assert rl.grpo_loss(new, old, new, out, 1).item() == pytest.approx(math.exp(20), rel=1e-5)
    assert rl.grpo_loss(new, old, new, out, 1, clamp_ratio=True).item() == pytest.approx(1000, rel=1e-5)
    train.start_processes()
    groups = [SimpleNamespace(advantages=torch.tensor([1.0, -1.0] * 50)),
              SimpleNamespace(advantages=torch.tensor([9.0]))]
    rl.drop_outliers(groups)
    assert groups[1].advantages.item() == 0.0 and groups[0].advantages.abs().min() > 0.5


@pytest.mark.parametrize("words, do", [
    ("none", lambda w, t, ms: train.make_model(config(w, t, paradigm="critic"),
                                               [[Comparison("?", ["a", "b"], [(0, 1)])]], torch.device("cpu"))),
    ("want 2 or more", lambda w, t, ms: ms["direct"].score("?", ["alone"])),
    ("asked for as a naive", lambda w, t, ms: (ms["critic"].save_pretrained(t),
                                               RewardModel.from_pretrained(t, paradigm="naive"))),
    ("--think is generative", lambda w, t, ms: config(w, t, think=True)),
    ("--length_norm naive", lambda w, t, ms: config(w, t, paradigm="critic", length_norm=True)),
    ("without a vocabulary head", lambda w, t, ms: (ms["naive"].save_pretrained(t),
                                                    RewardModel.from_backbone(t, paradigm="critic"))),
    ("one critic", lambda w, t, ms: evaluate.main(evaluate.Config(model=["a", "b"], write_critiques="c"))),
], ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_be_is_said_in_one_line(writer, tmp_path, models, words, do):
    with pytest.raises(ValueError, match=words) as error:
        do(writer, tmp_path / "x", models)
    assert "\n" not in str(error.value)
