"""Critics, which write before the reward is read, and judges, which compare two responses: appendix C of model.py."""
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import evaluate
import model as m
import rl_demo
import train
from conftest import TEXTS, small_backbone
from data import judge_prompts, read_comparisons, synthetic, write_comparisons
from model import Comparison, RewardModel, encode, judge_prompt, pack, parse_verdict
from stock import stock_inputs
from test_model import picture

ROW = Comparison("<image>What colour?", ["red", "blue blue", "green"], [(0, 1), (0, 2)], [picture()],
                 critiques=["colour right", "", "colour wrong"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint with its vocabulary head, whose tokenizer knows the words of critics and judges."""
    words = [*TEXTS, f"{m.CRITIQUE_PROMPT} {m.THINK}{m.VERDICT} <think>1: colour right 2: colour wrong</think>"
                     "<answer>1</answer>"]
    return small_backbone(tmp_path_factory.mktemp("checkpoint") / "c", texts=words * 20, vocabulary_head=True)


@pytest.fixture(scope="module")
def models(checkpoint):
    """One of each paradigm, untrained and with the same weights."""
    models = {}
    for paradigm in m.PARADIGMS:
        torch.manual_seed(0)
        models[paradigm] = RewardModel.from_backbone(checkpoint, paradigm=paradigm, critique_tokens=6).eval()
    return models


def training_items(model, row, seed=0):
    return model.encode_for_training(row, random.Random(seed))


def scores_of(model, rows):
    return model.score_encoded([model.encode_for_scoring(row) for row in rows])


def separate_rows(model, items):
    """Every response alone with its prompt, in transformers' own model with its vocabulary head: log-probabilities,
    hidden states, and the index of each row's last token."""
    inputs, last = stock_inputs(items, model.backbone, model.processor.image_processor)
    (causal_lm,) = model.causal_lm
    logits = causal_lm(**inputs).logits
    return logits.float().log_softmax(dim=-1), model.backbone(**inputs).last_hidden_state, last.tolist()


# The critic ---------------------------------------------------------------------------------------------------------


def test_a_critic_reads_its_reward_after_the_critique_in_the_responses_own_branch(models):
    critic = models["critic"]
    (item,), (plain,) = training_items(critic, ROW), training_items(models["naive"], ROW)
    assert item.prompt_ids == plain.prompt_ids
    assert item.response_ids[1] == plain.response_ids[1]  # the second has no critique
    text = critic.processor.tokenizer.decode(item.response_ids[0])
    assert text == "red<|im_end|>" + m.CRITIQUE_PROMPT + "colour right<|im_end|>"
    _, hidden, last = separate_rows(critic, [item])
    alone = torch.cat([critic.head(states[end]) for states, end in zip(hidden, last)])
    assert (critic(critic.make_pack([item])).rewards - alone).abs().max() < 1e-5


def test_the_loss_of_critiques_is_transformers_cross_entropy_of_their_tokens_per_response(models):
    critic = models["critic"]
    rows = [ROW, replace(ROW, critiques=["right", "wrong, quite", "so so"])]
    items = [item for row in rows for item in training_items(critic, row)]
    packed = critic.make_pack(items)
    lm_loss = critic.train()(packed).lm_loss
    critic.eval()
    logprobs, _, last = separate_rows(critic, items)
    expected, row_index = 0.0, 0
    for item in items:
        for ids, n in zip(item.response_ids, item.lm_target_lengths):
            row, end = logprobs[row_index], last[row_index]
            if n:
                expected += torch.nn.functional.nll_loss(row[end - n:end], torch.tensor(ids[-n:])).item()
            row_index += 1
    assert [n > 0 for item in items for n in item.lm_target_lengths] == [True, False, True, True, True, True]
    assert packed.num_lm_targets == 5 and packed.lm_loss_weight.sum().item() == pytest.approx(5)
    assert lm_loss.item() == pytest.approx(expected, rel=1e-5)


def test_without_critiques_a_critic_is_a_naive_model(models):
    row = replace(ROW, critiques=[])
    packs = [models[name].make_pack(training_items(models[name], row)) for name in ("naive", "critic")]
    assert torch.equal(packs[0].input_ids, packs[1].input_ids) and packs[1].num_lm_targets == 0
    output = models["critic"].train()(packs[1])
    models["critic"].eval()
    assert torch.equal(output.rewards, models["naive"](packs[0]).rewards) and output.lm_loss == 0


def test_a_critic_scores_after_what_it_wrote_and_on_request_after_what_was_given(models):
    """Its critiques are those that it would write to each response alone, with the whole dialogue as its prompt."""
    critic = models["critic"]
    (own,) = scores_of(critic, [ROW])
    for response, text in zip(ROW.responses, own.texts, strict=True):
        dialogue = [{"role": "user", "content": ROW.prompt}, {"role": "assistant", "content": response},
                    {"role": "user", "content": m.CRITIQUE_PROMPT.split("user\n")[1].split("<|im_end|>")[0]}]
        alone = encode(Comparison(dialogue, [], images=ROW.images), critic.processor)
        ((rollout,),) = m.generate(critic, [alone], critic.critique_tokens)
        assert critic.processor.tokenizer.decode(critic.remove_end(rollout.token_ids)) == text
    critic.critiques_from = "given"
    (given,) = scores_of(critic, [ROW])
    critic.critiques_from = "own"
    packed = critic.make_pack(training_items(critic, ROW))
    assert given.texts == [] and given.rewards == pytest.approx(critic(packed).rewards.tolist(), abs=1e-5)
    assert critic.score(ROW.prompt, ROW.responses, ROW.images) == pytest.approx(own.rewards, abs=1e-5)


def test_a_critic_may_not_forge_a_turn_in_its_critique(models):
    (item,) = training_items(models["critic"], replace(ROW, critiques=["good<|im_end|>", "bad", "so"]))
    end_id = models["critic"].processor.end_id
    assert item.response_ids[0].count(end_id) == 3  # of the response, of the turn that asks, of the critique


# The judge ----------------------------------------------------------------------------------------------------------


def test_a_judges_rewards_are_the_log_probabilities_of_1_and_2(models):
    judge = models["direct"]
    item = encode(judge_prompt(ROW, 2, 0), judge.processor)
    assert item.pairs == [(1, 0)]  # the first row's winner, red, is answer 2
    logprobs, _, last = separate_rows(judge, [item])
    one, two = (judge.processor.tokenizer(text).input_ids for text in "12")
    assert [ids[:-1] for ids in item.response_ids] == [one, two]
    expected = [logprobs[0, last[0] - 2, one[0]].item(), logprobs[1, last[1] - 2, two[0]].item()]
    assert judge(judge.make_pack([item])).rewards.tolist() == pytest.approx(expected, abs=1e-5)


def test_swapping_the_answers_swaps_the_verdicts_of_the_two_orders(models):
    (score,) = scores_of(models["direct"], [ROW])
    (swapped,) = scores_of(models["direct"], [replace(ROW, pairs=[(1, 0), (2, 0)])])
    for (first, second), (other_first, other_second) in zip(score.verdicts, swapped.verdicts):
        assert (first, second) == pytest.approx((-other_second, -other_first), abs=1e-5)
    assert score.rewards == pytest.approx(swapped.rewards, abs=1e-5)


def test_the_score_of_a_response_is_the_sum_of_its_preferences_over_the_others(models):
    """Two pairs with verdicts known: 0 is preferred to 1 with certainty, and to 2 in one of the two orders."""
    rewards = [[0.0, -50.0], [-50.0, 0.0], [0.0, -50.0], [0.0, -50.0]]
    score = m.judge_score(ROW, rewards, [])
    assert score.verdicts == [[50.0, 50.0], [50.0, -50.0]]
    assert score.rewards == pytest.approx([0.5, -0.5, 0.0])
    assert len(models["direct"].score("?", ["a", "b", "c"])) == 3  # where no pair is given: all three
    assert train.accuracy([ROW], [score]) == 0.75  # each verdict counts


def test_a_judge_asks_only_what_a_row_has(models):
    rm_bench = Comparison("?", list("abcdef"), [(i, 3 + j) for i in range(3) for j in range(3)])
    assert len(models["direct"].encode_for_scoring(rm_bench).encoded) == 2 * 9  # and not 2 * 15


@pytest.mark.parametrize("paradigm", ["direct", "think"])
def test_a_judge_reads_each_picture_once_and_holds_it_once_for_all_its_questions(models, monkeypatch, paradigm):
    """Eight responses make 56 questions: 1.3 GB of patches, if each held its own."""
    opened, real = [], m.open_image
    monkeypatch.setattr(m, "open_image", lambda *source: opened.append(source) or real(*source))
    row = replace(ROW, prompt="<image><image>What?", images=[picture(), picture("blue", (56, 112))], pairs=[])
    items = models[paradigm].encode_for_scoring(row).encoded
    assert len(items) == 2 * 3 and len(opened) == 2
    assert len({item.pixel_values.data_ptr() for item in items}) == 1
    assert len(training_items(models[paradigm], replace(row, pairs=[(0, 1), (0, 2)]))) == 2 and len(opened) == 4
    alone = encode(judge_prompt(row, 0, 1, paradigm == "think"), models[paradigm].processor)
    assert torch.equal(items[0].pixel_values, alone.pixel_values) and items[0].prompt_ids == alone.prompt_ids


@pytest.mark.parametrize("text, number", [
    ("<think>1: red is right 2: not</think><answer>2</answer>", 2), ("<answer> Answer 1 </answer>", 1),
    ("<answer>1</answer> or rather <answer>2</answer>", 2),  # its last word
    ("<answer>1 or 2</answer>", 0), ("<answer>3</answer>", 0), ("<answer></answer>", 0), ("", 0), ("neither", 0),
    ("<think>answer 1 is", 0),  # cut off in its thoughts
    ("<think>1: 5 squares</think> the second, 2", 2), ("12", 0), ("<answer>2", 2), ("<answer>1, 1</answer>", 1)])
def test_a_verdict_is_read_or_is_none(text, number):
    assert parse_verdict(text) == number


def test_a_thinking_judge_learns_critiques_and_verdict_and_is_wrong_where_it_gives_none(models):
    judge = models["think"]
    (item,) = judge.encode_orders(ROW, [(2, 0)])
    text = judge.processor.tokenizer.decode(item.response_ids[0])
    assert text == "<think>1: colour wrong 2: colour right</think><answer>2</answer><|im_end|>"
    assert item.lm_target_lengths == [len(item.response_ids[0])] and item.pairs == []
    (score,) = scores_of(judge, [ROW])
    assert len(score.texts) == 4 and all(margin in (-1, 0, 1) for pair in score.verdicts for margin in pair)
    without_verdict = m.judge_score(ROW, [m.verdict_rewards("hm")] * 4, ["hm"] * 4)
    assert train.accuracy([ROW], [without_verdict]) == 0.0


def test_the_loss_of_thoughts_is_the_mean_cross_entropy_of_their_tokens(models):
    judge = models["think"]
    items = training_items(judge, ROW)
    packed = judge.make_pack(items)
    logprobs, _, last = separate_rows(judge, items)
    expected = 0.0
    for row, item, end in zip(logprobs, items, last):
        (ids,) = item.response_ids
        expected += torch.nn.functional.nll_loss(row[end - len(ids):end], torch.tensor(ids)).item()
    assert packed.num_lm_targets == 2 and judge(packed).lm_loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_mark_of_an_image_in_an_answer_is_a_text_to_the_judge(models):
    row = replace(ROW, responses=["<image> is red", "blue", "green"])
    assert len(encode(judge_prompt(row, 0, 1), models["direct"].processor).image_grid_thw) == 1


def test_a_judges_order_in_training_is_drawn_by_seed_and_row(models):
    def orders(seed):
        return [item.pairs for item in training_items(models["direct"], ROW, seed)]

    assert orders("0 0 7") == orders("0 0 7") and len({str(orders(seed)) for seed in range(20)}) == 4
    assert all(len(pairs) == 1 for pairs in orders(0))


# Ties ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paradigm", m.PARADIGMS)
def test_identical_responses_to_one_prompt_get_one_reward(models, paradigm):
    """Branches of one pack round differently, and a tie would have a winner: of 200 identical pairs 86 were right.
    Also where a critic writes to each of them, and where a judge sees each beside others."""
    model, texts = models[paradigm], ["red", "a long answer: blue", "red", "green", "a long answer: blue", "red"]
    rows = [replace(ROW, prompt=f"<image>{words}", responses=texts, pairs=[], critiques=[])
            for words in ("What colour?", "Which colour is it, please?", "?")]
    scores = scores_of(model, rows)
    for score in scores:
        first, second, _, third, *_ = score.rewards
        assert score.rewards == [first, second, first, third, second, first]
        if paradigm == "critic":
            assert score.texts[0] == score.texts[2] == score.texts[5] and score.texts[1] == score.texts[4]
    assert model.score_many(rows) == [score.rewards for score in scores]


def test_a_pair_of_identical_responses_has_the_margin_zero(models):
    tie = replace(ROW, responses=["a long answer: blue", "green", "a long answer: blue"], pairs=[(0, 2)], critiques=[])
    train.start_processes()
    scores = train.score_rows(models["naive"], [tie] * 20)
    assert [m.pair_margins(tie.pairs, score) for score in scores] == [[[0.0]]] * 20


# The same commands for all ------------------------------------------------------------------------------------------


def train_config(checkpoint, out, **settings):
    return train.Config(backbone=str(checkpoint), out=str(out), train_size=10, eval_size=3, lr=1e-3, batch_size=8,
                        pack_tokens=1024, max_pixels=12544, critique_tokens=6, **settings).resolved()


@pytest.mark.parametrize("paradigm", ["critic", "direct", "think"])
def test_each_paradigm_trains_resumes_saves_and_is_evaluated(checkpoint, tmp_path, paradigm):
    if paradigm == "critic":  # of a family whose embedding and vocabulary head are one weight
        checkpoint = small_backbone(tmp_path / "tied", model_type="internvl", vocabulary_head=True)
    cfg = train_config(checkpoint, tmp_path / "run", paradigm=paradigm)
    assert train.main(cfg) == 0
    whole = RewardModel.from_pretrained(cfg.out)
    assert whole.paradigm == paradigm and (whole.head is None) == (paradigm != "critic")
    steps = len(train.read_log(tmp_path / "run" / "metrics.jsonl"))
    half = replace(cfg, out=str(tmp_path / "half"), max_steps=steps)
    signals = []
    original = train.learning_rate

    def stopping(step, *arguments):
        if step == 1 and not signals:
            signals.append(train.signal.raise_signal(train.signal.SIGTERM))
        return original(step, *arguments)

    train.learning_rate = stopping
    try:
        assert train.main(half) == 128 + train.signal.SIGTERM
    finally:
        train.learning_rate = original
    assert train.main(replace(half, resume=True)) == 0
    again = RewardModel.from_pretrained(half.out)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    # its folder is transformers' own, with the vocabulary head
    assert m.Policy.from_pretrained(cfg.out).lm_head.weight.equal(whole.lm_head.weight)
    rows = synthetic(4, seed=5)
    write_comparisons(tmp_path / "rows", rows, progress=False)
    evaluate.main(evaluate.Config(model=[cfg.out], data=[str(tmp_path / "rows")], out=str(tmp_path / "ev"),
                                  control_passes=False))
    lines = (tmp_path / "ev/rows/predictions.jsonl").read_text().splitlines()
    _, *predictions = [json.loads(line) for line in lines]
    alone = scores_of(whole, read_comparisons(tmp_path / "rows"))
    for prediction, score in zip(predictions, alone, strict=True):
        assert prediction["rewards"] == pytest.approx(score.rewards, abs=1e-4)
        assert prediction.get("critiques", {cfg.out: []})[cfg.out] == list(score.texts)
    summary = json.loads((tmp_path / "ev/rows/summary.json").read_text())
    num_pairs = sum(len(row.pairs) for row in rows)
    assert summary["figures"]["accuracy"]["n"] == (num_pairs if paradigm == "critic" else 2 * num_pairs)
    assert ("judge: both orders agree" in summary["beyond"]) == (paradigm != "critic")


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "internvl", "qwen3"])
def test_critics_and_judges_stand_on_every_family_with_lora_too(model_type, tmp_path):
    words = [*TEXTS, m.CRITIQUE_PROMPT, m.VERDICT]
    folder = small_backbone(tmp_path / "b", texts=words, model_type=model_type, vocabulary_head=True)
    row = replace(ROW, prompt="What colour?", images=[]) if model_type == "qwen3" else ROW
    for paradigm in m.PARADIGMS:
        torch.manual_seed(0)
        model = RewardModel.from_backbone(folder, paradigm=paradigm, critique_tokens=4)
        train.add_lora(model, 2)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.data = parameter.data.normal_(std=0.1)
        output = model.train()(model.make_pack(training_items(model, row)))
        loss = output.rewards.sum()
        if output.lm_loss is not None:
            loss = loss + output.lm_loss
        loss.backward()
        trained = {name.rpartition(".")[2] for name, parameter in model.named_parameters()
                   if parameter.grad is not None and not name.startswith("head.")}
        assert trained == {"lora_a", "lora_b"}
        model.save_pretrained(tmp_path / paradigm, train.merge_lora(model.state_dict()))
        (before,), (after,) = (scores_of(scorer, [row])
                               for scorer in (model.eval(), RewardModel.from_pretrained(tmp_path / paradigm)))
        assert after.rewards == pytest.approx(before.rewards, abs=1e-4) and after.texts == before.texts


def test_a_saved_config_names_the_type_of_the_weights_that_were_saved(checkpoint, tmp_path):
    """With LoRA on a GPU the model's own weights are bf16, and the merged ones fp32."""
    for paradigm in ("naive", "critic"):
        model = RewardModel.from_backbone(checkpoint, dtype=torch.bfloat16, paradigm=paradigm)
        model.save_pretrained(tmp_path, {name: weight.float() for name, weight in model.state_dict().items()})
        assert m.AutoConfig.from_pretrained(tmp_path).dtype == torch.float32


def test_an_ensemble_of_a_naive_model_and_a_critic_is_the_mean_of_their_rewards(models, tmp_path):
    rows = synthetic(3, seed=6)
    write_comparisons(tmp_path / "rows", rows, progress=False)
    folders = [str(tmp_path / name) for name in ("naive", "critic")]
    for folder, name in zip(folders, ("naive", "critic")):
        models[name].save_pretrained(folder)
    evaluate.main(evaluate.Config(model=folders, data=[str(tmp_path / "rows")], out=str(tmp_path / "ev"),
                                  control_passes=False))
    first = json.loads((tmp_path / "ev/rows/predictions.jsonl").read_text().splitlines()[1])
    rewards_of_models = [models[name].score_many(rows)[0] for name in ("naive", "critic")]
    mean = [sum(rewards) / 2 for rewards in zip(*rewards_of_models)]
    assert first["rewards"] == pytest.approx(mean, abs=1e-4)


def test_drawn_critiques_are_true():
    for comparison in synthetic(300):
        for response, critique in zip(comparison.responses, comparison.critiques, strict=True):
            assert ("wrong" not in critique) == (response == comparison.answer)
            assert critique.count("right") == sum(word in comparison.answer.split() for word in response.split())


def test_judge_prompts_for_rl_hold_both_orders_of_each_pair_with_their_answers(tmp_path):
    rows = [Comparison("?", ["good", "bad"], [(0, 1)], id="7")]
    write_comparisons(tmp_path / "rows", rows, progress=False)
    first, second = sorted(judge_prompts([tmp_path / "rows"], 0), key=lambda comparison: comparison.answer)
    assert (first.answer, second.answer) == ("1", "2") and first.prompt.startswith("?\nAnswer 1: good\nAnswer 2: bad\n")
    assert second.prompt.startswith("?\nAnswer 1: bad") and not first.responses
    assert rl_demo.answer_matches("<think>1: good 2: 5</think><answer>1</answer>", first.answer)


def test_the_pairwise_reward_takes_a_judges_verdicts_of_all_pairs(models):
    policy = m.Policy(models["direct"].causal_lm[0], models["naive"].processor)
    prompts = [rl_demo.Prompt(0, row, encode(row, policy.processor).with_responses([])) for row in synthetic(1, seed=9)]
    cfg = rl_demo.Config(group_size=3, max_new_tokens=3, pack_tokens=1024, rollout_rows=12, batch_size=1)
    run = SimpleNamespace(cfg=cfg, reference=policy, reward_models=[models["naive"]], judge=models["direct"],
                          device=torch.device("cpu"))
    (group,) = rl_demo.generate_rollouts(policy.eval(), prompts, 0, run)
    expected = models["direct"].score(prompts[0].comparison.prompt, group.texts, prompts[0].comparison.images)
    assert rl_demo.REWARDS["pairwise"](group).tolist() == pytest.approx(expected, abs=1e-5)
    assert group.model_rewards.tolist() != group.judge_rewards.tolist()


@pytest.mark.parametrize("words, do", [
    ("have none", lambda checkpoint, folder, models: train.check_critiques(
        [[Comparison("?", ["a", "b"], [(0, 1)])]], "critic")),
    ("want 2 or more", lambda checkpoint, folder, models: models["direct"].score("?", ["alone"])),
    ("asked for as a naive", lambda checkpoint, folder, models: (
        models["critic"].save_pretrained(folder), RewardModel.from_pretrained(folder, paradigm="naive"))),
    ("--length_norm .* naive", lambda checkpoint, folder, models: train_config(
        checkpoint, folder, paradigm="critic", length_norm=True)),
    ("without a vocabulary head", lambda checkpoint, folder, models: (
        models["naive"].save_pretrained(folder), RewardModel.from_backbone(folder, paradigm="critic"))),
    ("scored by what it writes", lambda checkpoint, folder, models: (
        setattr(models["think"], "critiques_from", "given"), scores_of(models["think"], [ROW]))),
], ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_be_is_said_in_one_line(checkpoint, tmp_path, models, words, do):
    with pytest.raises(ValueError, match=words) as error:
        do(checkpoint, tmp_path / "x", models)
    models["think"].critiques_from = "own"
    assert "\n" not in str(error.value)
