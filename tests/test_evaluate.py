"""What a benchmark figure means: every metric on rows made by hand, with the number worked out on paper in the test."""
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import evaluate
import train
from conftest import ROOT
from data import BadRow, World, read_comparisons, synthetic, write_comparisons
from evaluate import (PUBLISHED, SECTIONS, Config, bootstrap, calibration, figures, footing, length_bias, main, metrics,
                      participants, ranks, read_benchmark, remove_images, score_all, share_prompts, summarise, tables, weigh)
from model import Comparison, RewardModel, encode

FIXTURES = Path(__file__).parent / "fixtures" / "benchmarks"


def predictions(benchmark, files, margins):
    """Prediction rows of a fixture in which every pair of row i has the margin margins[i]: winners get it, losers 0."""
    rows = read_benchmark(benchmark, [str(FIXTURES / file) for file in files], "stop")
    _, _, places = share_prompts(rows)
    out = []
    for (_, c), (_, _, prompt), margin in zip(rows, places, margins, strict=True):
        winners = {w for w, _ in c.pairs}
        out.append({"id": c.id, "category": c.category, "prompt": prompt, "pairs": c.pairs, "length": [len(r) for r in c.responses],
                    "rewards": [float(margin) if i in winners else 0.0 for i in range(len(c.responses))]})
    return out


def values(benchmark, rows, grouping="official"):
    return {name: round(f["value"], 2) for name, f in figures(*metrics(benchmark, rows, grouping)).items()}


def test_vl_rewardbench_is_grouped_by_the_id_and_a_tie_is_wrong():
    """Rows: wildvision, RLAIF, RLHF, hallucination, mathverse, mathverse, mmmu, svit; right: all but the tie on RLHF and the second
    mathverse.

    Official: general = wildvision, svit = 2/2; hallucination = RLAIF, RLHF, hallucination = 2/3; reasoning 2/3. Overall 6/8.
    Paper: RLAIF and RLHF count as general = 3/4; hallucination = 1/1; reasoning 2/3.
    """
    rows = predictions("vl-rewardbench", ["vl_rewardbench.json"], [1, 1, 0, 1, 1, -1, 1, 1])
    assert values("vl-rewardbench", rows) == {"general": 100, "hallucination": 66.67, "reasoning": 66.67, "overall": 75, "macro": 77.78}
    assert values("vl-rewardbench", rows, "paper") == {"general": 75, "hallucination": 100, "reasoning": 66.67, "overall": 75,
                                                       "macro": 80.56}
    assert summarise("vl-rewardbench", rows, "official")["ties"] == 1


def test_repeated_ids_are_kept_apart_and_a_shared_prompt_is_scored_once():
    """Two rows are called mathverse_5, and both count: 3 reasoning rows. Of the 8 rows, 5 ask the same question of the same picture."""
    rows = predictions("vl-rewardbench", ["vl_rewardbench.json"], [1] * 8)
    assert [row["id"] for row in rows].count("mathverse_5") == 2
    assert figures(*metrics("vl-rewardbench", rows))["reasoning"]["n"] == 3
    prompts, _, places = share_prompts(read_benchmark("vl-rewardbench", [str(FIXTURES / "vl_rewardbench.json")], "stop"))
    assert len(prompts) == 4 and [place[0] for place in places] == [0, 0, 0, 0, 1, 2, 3, 0]
    assert prompts[0].responses == ["Two.", "Five."]  # scored once for five rows


def test_human_ranking_holds_the_rank_of_each_response_not_the_order_of_them():
    """human_ranking [1, 0]: response 0 has rank 1 and response 1 has rank 0, the better. The flat copy has the better one first."""
    rows = [c for _, c in read_benchmark("vl-rewardbench", [str(FIXTURES / "vl_rewardbench.json")], "stop")]
    assert rows[2].responses == ["Five.", "Two."] and rows[2].pairs == [(1, 0)]
    ((_, flat),) = read_benchmark("vl-rewardbench", [str(FIXTURES / "vl_rewardbench_flat.jsonl")], "stop")
    assert flat.responses == ["Two.", "Five."] and flat.pairs == [(0, 1)] and flat.category == "hallucination"


def test_multimodal_rewardbench_splits_reasoning_and_safety_by_id_and_is_averaged_over_rows():
    """10 rows: correctness 1/1, preference 1/2, knowledge 1/1, math 1/1, coding 0/1, bias 1/1, toxicity 0/1, VQA 2/2: overall 7/10.

    Safety is both together, 1/2, so the mean of seven columns is (100 + 50 + 100 + 100 + 0 + 50 + 100) / 7 = 71.43.
    """
    rows = predictions("multimodal-rewardbench", ["all_data.json"], [1, 1, -1, 1, 1, -1, 1, -1, 1, 1])
    assert values("multimodal-rewardbench", rows) == {
        "overall": 70, "correctness": 100, "preference": 50, "knowledge": 100, "math": 100, "coding": 0, "safety": 50, "VQA": 100,
        "mean of 7": 71.43, "bias": 100, "toxicity": 0}


def test_mm_rlhf_rewardbench_acc_plus_wants_every_pair_of_an_id_right():
    """Ids m1 (3 pairs), l1 (2), s1, f1, v1. Wrong: one pair of m1, and f1. Acc 6/8 = 75, Acc+ l1, s1, v1 of 5 ids = 60."""
    rows = predictions("mm-rlhf-rewardbench", ["mm_reward_bench.jsonl"], [1, -1, 1, 1, 1, 1, 0, 1])
    assert values("mm-rlhf-rewardbench", rows) == {
        "mcq": 66.67, "long": 100, "short": 100, "safety": 0, "video": 100, "Acc": 75, "Acc+": 60, "mcq+": 0, "long+": 100, "short+": 100,
        "safety+": 0, "video+": 100}
    assert figures(*metrics("mm-rlhf-rewardbench", rows))["Acc+"]["n"] == 5
    prompts, _, _ = share_prompts(read_benchmark("mm-rlhf-rewardbench", [str(FIXTURES / "mm_reward_bench.jsonl")], "stop"))
    assert [len(c.responses) for c in prompts] == [3, 3, 2, 2, 2]  # m1: three pairs of A, B, C
    assert os.path.isdir(prompts[-1].images[0])  # a video is its folder of frames


def test_rewardbench_weighs_subsets_and_leaves_out_a_section_that_was_not_run_whole():
    """Safety: 100, 100, 154, 250, 136 (sum 740). Wrong: refusals-offensive and one of two xstest-should-respond rows.

    (100 + 0 + 154 + 250 / 2 + 136) / 740 = 69.59. Chat has one subset of five here, so it has no figure, and there is no score.
    """
    rows = predictions("rewardbench", ["filtered.json"], [1, -1, 1, 1, 1, 1, -1])
    assert values("rewardbench", rows) == {"Safety": 69.59}


def test_rewardbench_score_with_and_without_prior_sets():
    """All subsets right but: hep-cpp and math-prm wrong, and the prior set shp. Reasoning = 5 * 164 / 1968 = 41.67.

    Score (100 + 100 + 100 + 41.67) / 4 = 85.42. Prior sets 3/4. With them (2 * (100 + 100 + 100 + 41.67) + 75) / 9 = 84.26.
    """
    rows = predictions("rewardbench", ["prior"], [1] * 4)
    rows += [rows[0] | {"category": subset, "prompt": 10 + i} for i, subset in
             enumerate(s for name, subsets in SECTIONS.items() if name != "Prior Sets" for s in subsets)]
    for row in rows:
        if row["category"] in ("hep-cpp", "math-prm", "shp"):
            row["rewards"] = [0.0, 1.0]
    found = values("rewardbench", rows)
    assert (found["Reasoning"], found["Prior Sets"], found["score"], found["score with prior sets"]) == (41.67, 75, 85.42, 84.26)


def test_rm_bench_reads_hard_normal_and_easy_off_the_matrix():
    """Chosen rewards 1, 2, 3 (concise, plain, markdown), rejected 0, 1.5, 2.5: chosen i beats rejected j in the cells

        1 > 0, 1 < 1.5, 1 < 2.5;   2 > 0, 2 > 1.5, 2 < 2.5;   3 > 0, 3 > 1.5, 3 > 2.5

    hard (above the diagonal) 0/3, normal 3/3, easy 3/3, so that row's domain scores 66.67. The two safety rows are one domain.
    """
    rows = predictions("rm-bench", ["total_dataset.json"], [1] * 5)
    for row in rows:
        row["rewards"] = [1.0, 2.0, 3.0, 0.0, 1.5, 2.5]
    rows[4]["rewards"] = [-1.0] * 3 + [0.0] * 3  # safety-response: nothing right, so safety is half of 66.67
    assert values("rm-bench", rows) == {"chat": 66.67, "math": 66.67, "code": 66.67, "safety": 33.33,
                                        "easy": 87.5, "normal": 87.5, "hard": 0, "overall": 58.33}
    prompts, _, _ = share_prompts(read_benchmark("rm-bench", [str(FIXTURES / "total_dataset.json")], "stop"))
    assert [len(c.responses) for c in prompts] == [6]  # the fixture's five rows ask the same question


@pytest.mark.parametrize("cells, weights, printed", [
    ({"general": (309, 484), "hallucination": (384, 448), "reasoning": (206, 318)}, None, 71.92),  # R1-Reward, VL-RewardBench overall
    ({"a": (182, 293), "b": (380, 448), "c": (400, 484)}, None, 78.53),  # BaseReward (Qwen2-VL): 1,225 rows
    ({"a": (218, 318), "b": (413, 448), "c": (396, 484)}, None, 82.16),  # BaseReward (Qwen2.5-VL): 1,250 rows
    ({"a": (210, 293), "b": (411, 448), "c": (413, 484)}, None, 84.41),  # BaseReward (ensemble)
    ({"a": (182, 293), "b": (380, 448), "c": (400, 484)}, {"a": 1, "b": 1, "c": 1}, 76.53),  # and its macro
    ({"a": (218, 318), "b": (413, 448), "c": (396, 484)}, {"a": 1, "b": 1, "c": 1}, 80.85),
    ({"mcq": (40, 42), "long": (36, 37), "short": (32, 34), "safety": (26, 32), "video": (22, 25)}, None, 91.76),  # MM-RLHF Acc, 156/170
    ({"whole ids": (37, 46)}, None, 80.43), ({"whole ids": (36, 46)}, None, 78.26)])  # Acc+
def test_published_averages_follow_from_the_counts_of_their_categories(cells, weights, printed):
    """Every group holds one prompt with all its pairs; the overall figure is the group of everything."""
    groups = {name: {0: list(counts)} for name, counts in cells.items()}
    groups["all"] = {0: [sum(right for right, _ in cells.values()), sum(n for _, n in cells.values())]}
    assert round(figures(groups, {"figure": weights or {"all": 1}})["figure"]["value"], 2) == printed


def test_published_overall_of_multimodal_rewardbench_is_micro_for_some_rows_and_the_mean_of_seven_for_others():
    """Counts of the public rows: 623, 654, 630, 514, 582, 508, 1,200 = 4,711. NOTES says which row is which."""
    n = torch.tensor([623, 654, 630, 514, 582, 508, 1200]).double()
    assert n.sum() == 4711
    for line in PUBLISHED["multimodal-rewardbench"].strip().split("\n"):
        overall, *columns = [float(v) for v in line.split("|")[1].split()]
        columns = torch.tensor(columns).double()
        micro, mean = (columns @ n / n.sum()).item(), columns.mean().item()
        if "[a]" in line:
            assert abs(overall - mean) < 0.11 < abs(overall - micro), line
        elif "[b]" in line:
            assert abs(overall - mean) > 0.11 and round(micro, 1) in (68.6, 73.8), line
        else:
            assert abs(overall - micro) < 0.06, line


def test_three_printed_cells_of_mm_rlhf_are_no_fraction_of_their_pairs():
    for printed, n, meant in ((95.74, 42, 40), (97.38, 37, 36), (94.13, 34, 32)):
        assert all(abs(100 * k / n - printed) > 0.006 for k in range(n + 1))
        assert abs(100 * meant / n - printed) < 0.6


def test_the_interval_is_over_prompts_not_over_pairs():
    """100 prompts, half right. With one pair each the standard error is 5 points: 40 to 60. Six pairs that stand and fall together must
    not make it narrower, and what is always right has no width."""
    one, six = ({"all": {p: [n * (p % 2), n] for p in range(100)}} for n in (1, 6))
    a, b = (figures(cells, {"f": {"all": 1}})["f"] for cells in (one, six))
    assert (a["low"], a["high"]) == (b["low"], b["high"]) and abs(a["low"] - 40) < 2 and abs(a["high"] - 60) < 2
    assert (a["n"], b["n"]) == (100, 600)
    ((value, low, high),) = bootstrap(torch.ones(5, 1).double(), lambda s: s)
    assert value == low == high == 5


def test_length_bias_tells_words_from_worth():
    """Rewards equal to the logarithm of length: correlation 1, and the longer response always wins. People chose it in 1 of 2 pairs.

    Of the three pairs one is length-matched (10 and 10 characters), and its rewards tie: 0 right of 1. What a prompt adds to all its
    rewards (here 100 times its number) says nothing.
    """
    rows = [{"category": "", "prompt": i, "pairs": [[0, 1]], "length": length,
             "rewards": (torch.tensor(length).double().log1p() + 100 * i).tolist()}
            for i, length in enumerate(([10, 20], [30, 5], [10, 10]))]
    found = {name: round(f["value"], 6) for name, f in length_bias(rows).items()}
    assert found == {"length-matched pairs": 0, "people chose the longer": 50, "the model chose the longer": 100,
                     "correlation of reward and length": 1}


def test_calibration_compares_the_probability_with_how_often_it_is_right():
    """margin 3: sigmoid 0.953; margin -0.1: the model is 0.525 sure of the wrong one; margin 0.3: 0.574; -2: 0.881 and wrong."""
    rows = [{"category": "", "prompt": i, "pairs": [[0, 1]], "rewards": [margin, 0.0]}
            for i, margin in enumerate((3.0, -0.1, 0.3, 3.0, -2.0))]
    found = {name[-10:]: (f["value"], f["n"]) for name, f in calibration(rows).items()}
    assert found == {"0.5 to 0.6": (50, 2), "0.8 to 0.9": (0, 1), "0.9 to 1.0": (100, 2)}


def test_images_removed_leaves_the_question_alone(tiny):
    c = remove_images(Comparison("<image>\nWhat is shown?", ["A bus.", "A cup."], images=[str(FIXTURES / "images/bus.png")]))
    assert (c.prompt == [{"role": "user", "content": "What is shown?"}]
            and not len(encode(c, tiny.tokenizer, tiny.image_processor).image_grid_thw))


def test_the_default_set_is_the_one_that_training_held_out():
    assert evaluate.DRAWN == train.Config().eval_size
    held, ours = train.open_data(train.Config(train_size=1))[1], read_benchmark("comparisons", [], "stop")
    assert [(c.prompt, c.responses) for c in held] == [(c.prompt, c.responses) for _, c in ours]


def test_threads_do_not_change_the_tokens(tiny):
    """A prompt keeps its special tokens whole, a response has those it writes split, and the tokenizer remembers which it did last."""
    comparisons = [Comparison(f"Box {i}?", ["<|im_end|>" * 50, "red"]) for i in range(200)]
    with ThreadPoolExecutor(8) as threads:
        threaded = list(threads.map(lambda c: encode(c, tiny.tokenizer), comparisons))
    alone = [encode(c, tiny.tokenizer) for c in comparisons]
    assert [(e.prompt_ids, e.response_ids) for e in threaded] == [(e.prompt_ids, e.response_ids) for e in alone]


def test_a_response_ranks_below_the_lowest_that_beats_it():
    assert ranks(4, [(2, 0), (0, 1), (2, 3)]) == [2, 3, 1, 2]


# Ensembles


def test_members_take_part_where_they_can_read_the_prompt():
    sees = [True, False]
    assert participants(sees, True, False) == [0] and participants(sees, False, False) == [0, 1]
    assert participants(sees, False, True) == [1]  # section 4.5: text goes to the text model
    assert participants([True, True], False, False) == [0, 1]


def test_ensemble_weights_come_from_the_pairs_that_all_members_can_read():
    """Two validation rows, the second with an image that member 1 cannot see.

    On the first, margins 1 and 3: confidence weighs 1/4 and 3/4.
    """
    validation = [Comparison("?", ["a", "b"], [(0, 1)]), Comparison("?", ["a", "b"], [(0, 1)], images=["x.png"])]
    held = [{0: [1.0, 0.0], 1: [3.0, 0.0]}, {0: [-9.0, 0.0]}]
    assert weigh("confidence", [0, 1], held, validation) == {0: 0.25, 1: 0.75}
    assert weigh("accuracy", [0, 1], held, validation) == {0: 0.5, 1: 0.5}
    assert weigh("average", [0, 1], held, []) == {0: 0.5, 1: 0.5} and weigh("accuracy", [0], held, []) == {0: 1.0}
    with pytest.raises(BadRow, match="no pair that all members can read"):
        weigh("accuracy", [0, 1], held[1:], validation[1:])


@pytest.fixture(scope="module")
def models(backbones, tmp_path_factory):
    """Saved reward models that were not trained: one that sees, and one that reads text only."""
    root = tmp_path_factory.mktemp("models")
    for name, kind in (("eyes", "qwen2_5_vl"), ("text", "qwen3")):
        torch.manual_seed(len(name))
        RewardModel.from_backbone(backbones(kind)).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_comparisons(tmp_path_factory.mktemp("data") / "drawn", synthetic(100, seed=3), bar=False)


def run(**settings):
    main(Config(**settings))
    out = Path(settings["out"])
    facts, *rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), rows


@pytest.fixture(scope="module")
def scored(models, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored")
    return (out, *run(model=[str(models / "eyes")], data=[str(folder)], out=str(out), worst=30))


def test_a_run_leaves_every_reward_with_id_category_and_rank_and_a_receipt(scored, folder, models):
    out, summary, rows = scored
    assert sorted(file.name for file in out.iterdir()) == ["predictions.jsonl", "report.html", "summary.json", "table.md"]
    model, comparisons = RewardModel.from_pretrained(models / "eyes"), synthetic(100, seed=3)
    for row, c in list(zip(rows, comparisons, strict=True))[:10]:
        assert (row["id"], row["category"], [tuple(p) for p in row["pairs"]]) == (c.id, c.category, c.pairs)
        assert (max(row["rank"]) > 1
                and torch.allclose(torch.tensor(row["rewards"]), torch.tensor(model.score(c.prompt, c.responses, c.images)), atol=1e-5))
        assert ("removed" in row) == ("shuffled" in row) == bool(c.images)
    assert {"command", "commit", "date", "hardware", "pairs", "torch"} <= summary.keys()
    text = (out / "table.md").read_text()
    assert text.startswith("comparisons: 100 rows") and "95% interval" in text and "images shuffled" in text


def test_rescoring_does_not_lay_rewards_beside_other_rows(scored, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    lines = (folder / "comparisons.jsonl").read_text().splitlines()
    (tmp_path / "other" / "comparisons.jsonl").write_text("\n".join(lines[::-1]))
    with pytest.raises(BadRow, match="not the same benchmark"):
        main(Config(rescore=str(scored[0] / "predictions.jsonl"), data=[str(tmp_path / "other")], out=str(tmp_path / "out")))


def test_a_journal_is_good_for_the_same_weights_images_and_settings_only(models, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data"), shutil.copytree(models / "eyes", tmp_path / "model")
    rows = read_comparisons(tmp_path / "data")
    comparisons = [rows[i] for i in range(10)]
    seen = {evaluate.fingerprint(tmp_path / "model", comparisons, 1024)}
    assert evaluate.fingerprint(tmp_path / "model", comparisons, 1024) in seen
    seen.add(evaluate.fingerprint(tmp_path / "model", comparisons, 2048))
    seen.add(evaluate.fingerprint(tmp_path / "model", comparisons[::-1], 1024))
    os.utime(next(image for c in comparisons for image in c.images), (0, 0))
    seen.add(evaluate.fingerprint(tmp_path / "model", comparisons, 1024))
    os.utime(tmp_path / "model" / "head.safetensors", (0, 0))
    assert len(seen | {evaluate.fingerprint(tmp_path / "model", comparisons, 1024)}) == 5


def test_rows_share_a_prompt_when_text_and_picture_agree_also_as_bytes():
    bus, cup = (Path(FIXTURES / "images" / name).read_bytes() for name in ("bus.png", "cup.png"))
    rows = [Comparison("What?", ["a", "b"], [(0, 1)], [bytes(image)]) for image in (bus, bus + b"", cup)]
    prompts, _, shared = evaluate.share_prompts([("here", row) for row in rows])
    assert len(prompts) == 2 and [place[0] for place in shared] == [0, 0, 1]


def test_shuffled_prompts_never_keep_a_picture_not_even_from_a_twin():
    comparisons = [Comparison("Q", ["a", "b"], [(0, 1)], [name]) for name in "aaabbcd"]
    for seed in range(20):
        assert all(c.images != now.images for c, now in zip(comparisons, evaluate.shuffle_images(comparisons, seed)))


def test_rescoring_gives_every_table_again_without_a_model(scored, tmp_path):
    out, summary, _ = scored
    main(Config(rescore=str(out / "predictions.jsonl"), out=str(tmp_path)))
    again = json.loads((tmp_path / "summary.json").read_text())
    assert again == summary and (tmp_path / "table.md").read_text() == (out / "table.md").read_text()


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_predictions(models, folder, tmp_path, monkeypatch):
    """Stopped after its second chunk and with a line of the journal torn, the second run scores only what is left."""
    forward, packs, settings = RewardModel.forward, [], dict(model=[str(models / "eyes")], data=[str(folder)], out=str(tmp_path),
                                                             probe=False)

    def counted(model, pack):
        packs.append(pack)
        if len(packs) == stop:
            raise KeyboardInterrupt
        return forward(model, pack)

    monkeypatch.setattr(RewardModel, "forward", counted)
    stop = None
    _, without_stop = run(**settings | {"out": str(tmp_path / "whole")})
    whole, stop = len(packs), 2 * len(packs) // 3 + 1
    packs.clear()
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    (journal,) = (tmp_path / ".partial").iterdir()
    journal.write_text(journal.read_text() + '\n[1, [[0.1, 0.2], [0')
    packs.clear()
    stop = None
    _, again = run(**settings)
    assert 0 < len(packs) < whole and not (tmp_path / ".partial").exists()
    assert again == without_stop


def test_the_journal_survives_a_line_cut_short(tiny, tmp_path, monkeypatch):
    """A killed run leaves half a line. What is written after it must be readable: the second call has nothing left to score."""
    monkeypatch.setattr(evaluate, "CHUNK", 2)
    comparisons = [Comparison(f"Box {i}?", ["red", "blue"], [(0, 1)]) for i in range(5)]
    alone = World(0, 0, 1, torch.device("cpu"))
    (tmp_path / "journal.0").write_text("\n[0, [[0.1")
    first = score_all(tiny, comparisons, alone, journal=tmp_path / "journal")
    monkeypatch.setattr(RewardModel, "forward", None)
    assert score_all(tiny, comparisons, alone, journal=tmp_path / "journal") == first


def test_two_ranks_give_the_predictions_of_one(scored, models, folder, tmp_path):
    """Real torchrun over gloo. A chunk's packs do not depend on who scores them, so what is left is the rounding of threaded sums."""
    out, summary, rows = scored
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541",
                           "evaluate.py", "--model", str(models / "eyes"), "--data", str(folder), "--out", str(tmp_path),
                           "--no_probe"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    facts, *again = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert facts["ranks"] == 2 and facts["command"].startswith("torchrun --nproc_per_node 2 evaluate.py --model")
    for a, b in zip(rows, again, strict=True):
        assert b.pop("rewards") == pytest.approx(a["rewards"], abs=1e-5)
        assert b == {key: a[key] for key in b}


def test_a_text_only_member_votes_where_there_is_no_image_and_route_leaves_it_alone_there(models, folder, tmp_path):
    both, settings = [str(models / "eyes"), str(models / "text")], dict(data=[str(folder)], probe=False)
    _, rows = run(model=both, out=str(tmp_path / "a"), **settings)
    _, routed = run(model=both, out=str(tmp_path / "b"), route=True, **settings)
    assert {row["images"] for row in rows} == {0, 1}
    for row, other in zip(rows, routed):
        votes = list(row["members"].values())
        assert len(votes) == (1 if row["images"] else 2)
        assert row["rewards"] == pytest.approx([sum(v) / len(votes) for v in zip(*votes)], abs=1e-5)
        assert other["rewards"] == pytest.approx(votes[-1], abs=1e-5)  # with an image the first alone, without one the text model alone
    summary, _ = run(model=both, out=str(tmp_path / "c"), ensemble="accuracy", validation=str(folder), **settings)
    assert summary["weights"]["with images"] == {both[0]: 1.0} and sum(summary["weights"]["without images"].values()) == pytest.approx(1)


def test_rows_that_share_a_prompt_get_the_rewards_they_get_alone(models, tmp_path):
    """RM-Bench: six responses in one comparison. MM-RLHF: three pairs of three responses to one picture, and a video."""
    model = RewardModel.from_pretrained(models / "eyes")
    for benchmark, file in (("rm-bench", "total_dataset.json"), ("mm-rlhf-rewardbench", "mm_reward_bench.jsonl")):
        _, rows = run(model=[str(models / "eyes")], benchmark=benchmark, data=[str(FIXTURES / file)], out=str(tmp_path / benchmark),
                      probe=False)
        for row, (_, c) in zip(rows, read_benchmark(benchmark, [str(FIXTURES / file)], "stop"), strict=True):
            assert row["rewards"] == pytest.approx(model.score(c.prompt, c.responses, c.images), abs=1e-5)


# What it shows


def test_this_model_stands_between_the_published_rows_and_says_which_compare():
    rows = predictions("vl-rewardbench", ["vl_rewardbench.json"], [1, 1, 0, 1, 1, -1, 1, 1])  # overall 75
    for row in rows:
        row["length"] = [4, 5]
    first, table, _ = tables(summarise("vl-rewardbench", rows, "official"), "vl-rewardbench", "mine")
    names = [row[0] for row in table]
    at = names.index("mine")
    assert "71.92" in table[at - 1] and "78.53" in table[at + 3] and names[at + 1:at + 3] == ["95% interval", "n"]
    assert table[at + 2][1:] == ["2", "3", "3", "8", "8"]
    assert first == "vl-rewardbench: 8 rows, 4 prompts, 8 pairs, 1 ties"
    assert "every column with rows [a], in overall alone with [b] and [c]" in footing("vl-rewardbench", "official")[0]
    assert "every column with rows [b]" in footing("vl-rewardbench", "paper")[0]


def test_missing_rows_are_in_the_first_line_of_the_table(models, folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    lines = (data / "comparisons.jsonl").read_text().splitlines()
    broken = json.loads(next(line for line in lines if "images" in line))["images"][0]
    (data / broken).write_bytes((data / broken).read_bytes()[:60])
    lines[-1] = '{"prompt": "?"}'
    (data / "comparisons.jsonl").write_text("\n".join(lines[-20:] + [line for line in lines if broken in line]))
    settings = dict(model=[str(models / "eyes")], data=[str(data)], out=str(tmp_path / "out"))
    with pytest.raises(BadRow, match=r"comparisons.jsonl:20: the keys \['responses', 'pairs'\] are missing"):
        run(**settings)
    summary, rows = run(**settings | {"on_bad_row": "skip"})
    assert summary["missing"] == 2 and [row["row"] for row in rows if "error" in row] == [20, 21] and "row 21: " in rows[20]["error"]
    assert sum("removed" in row and "shuffled" not in row for row in rows) == 1  # the row that was to have got the broken picture
    assert (tmp_path / "out" / "table.md").read_text().startswith("comparisons: 2 OF 21 ROWS ARE MISSING (")
    (data / "comparisons.jsonl").write_text("\n".join(line for line in lines if broken in line))
    with pytest.raises(BadRow, match=r"comparisons.jsonl row 1: image .* cannot be used"):
        run(**settings)


def test_the_report_needs_no_network_and_runs_nothing_of_what_a_model_wrote(models, tmp_path):
    trap = Comparison("Which <b>tag</b>?", ["<script>document.title='run'</script>", "<img src=x onerror=alert(1)>"], [(0, 1), ],
                      category="a&b")
    data = write_comparisons(tmp_path / "data", [trap, replace(trap, pairs=[(1, 0)])], bar=False)
    run(model=[str(models / "eyes")], data=[str(data)], out=str(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>document" not in page and "<img src=x" not in page and "a&amp;b" in page and page.count("<article") == 1
    assert not re.findall(r'(?:src|href)="(?!data:)|url\(|@import', page)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_the_report_works_in_a_browser_narrow_and_wide(scored, tmp_path):
    """In a frame of 360 and of 1200 pixels: nothing sticks out, and a filter leaves only its category."""
    out, summary, _ = scored
    page = (out / "report.html").read_text()
    assert page.count("<img") > 0
    probe = tmp_path / "probe.html"
    probe.write_text("""<body></body><script>
const page = %s, out = [];
const look = width => new Promise(done => { const f = document.createElement("iframe"); f.width = width; f.height = 900; f.srcdoc = page;
  f.onload = () => { const d = f.contentDocument, shown = () => [...d.querySelectorAll("article")].filter(a => a.offsetHeight);
    const all = shown().length, wide = d.documentElement.scrollWidth, \
columns = getComputedStyle(d.querySelector(".answers")).gridTemplateColumns;
    const broken = [...d.images].filter(i => !i.naturalWidth).length, button = d.querySelectorAll("nav button")[1];
    f.contentWindow.show(button.dataset.category);
    out.push({width, wide, all, broken, columns: columns.split(" ").length, filtered: shown().length,
              other: shown().filter(a => a.dataset.category != button.dataset.category).length}); done() };
  document.body.append(f) });
(async () => { await look(360); await look(1200); document.body.textContent = JSON.stringify(out) })();
</script>""" % json.dumps(page.replace("const show", "show")).replace("</", "<\\/"))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                           "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
                           "--virtual-time-budget=10000", "--dump-dom", f"file://{probe}"], capture_output=True, text=True, timeout=120)
    narrow, wide = json.loads(re.search(r"<body>(.*?)</body>", done.stdout, re.S)[1])
    for view in (narrow, wide):
        assert view["wide"] <= view["width"] and view["broken"] == 0 and view["all"] == 30
        assert 0 < view["filtered"] < 30 and view["other"] == 0
    assert (narrow["columns"], wide["columns"]) == (1, 2)


# Bad input


@pytest.mark.parametrize("settings, words", [
    (dict(), "--model DIR is missing"),
    (dict(model=["nowhere"]), "--model nowhere is not a saved reward model"),
    (dict(model=["EYES"], benchmark="vlrewardbench"), "--benchmark 'vlrewardbench': want one of comparisons, vl-rewardbench"),
    (dict(model=["EYES"], benchmark="rm-bench"), "--data is missing: where rm-bench lies. Take the data/ folder of THU-KEG/RM-Bench"),
    (dict(model=["EYES"], benchmark="rm-bench", data=["./no.json"]), "./no.json does not exist"),
    (dict(model=["EYES"], benchmark="vl-rewardbench", data=["total_dataset.json"]),
     "total_dataset.json row 1: no field image: found ['chosen', 'domain', 'id', 'prompt', 'rejected']; is this the file of another set?"),
    (dict(model=["EYES"], benchmark="vl-rewardbench", data=["mm_reward_bench.jsonl"]),
     "row 1: image mcq/1.png belongs to mm-rlhf-rewardbench"),
    (dict(model=["EYES"], benchmark="mm-rlhf-rewardbench", data=["vl_rewardbench_flat.jsonl"]),
     "row 1: 'images/cup.png' names none of mcq"),
    (dict(model=["EYES"], benchmark="rewardbench", data=["total_dataset.json"]), "row 1: subset 'total_dataset' is none of RewardBench's"),
    (dict(model=["EYES"], benchmark="rm-bench", data=["filtered.json"]), "row 1: domain 'filtered'; want one of chat, math, code, safety"),
    (dict(model=["EYES"], benchmark="multimodal-rewardbench", data=["images/bus.png"]), "bus.png row 1: malformed JSON: "),
    (dict(model=["TEXT"], benchmark="vl-rewardbench", data=["vl_rewardbench.json"]),
     "row 1: the prompt has an image and every --model is text-only"),
    (dict(model=["EYES"], route=True), "--route sends prompts without images to a text-only model"),
    (dict(model=["EYES", "TEXT"], ensemble="accuracy"), "give --validation FOLDER"),
    (dict(model=["EYES"], ensemble="vote"), "--ensemble 'vote': want one of average"),
    (dict(rescore="total_dataset.json"), "is not the predictions.jsonl of an earlier run")])
def test_bad_input_is_one_line_that_says_what_to_do(settings, words, models, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "DRAWN", 3)
    named = {"EYES": str(models / "eyes"), "TEXT": str(models / "text")}
    settings = {key: ([named.get(v, str(FIXTURES / v) if (FIXTURES / v).exists() else v) for v in value]
                      if isinstance(value, list) else value)
                for key, value in settings.items()}
    if "rescore" in settings:
        settings["rescore"] = str(FIXTURES / settings["rescore"])
    with pytest.raises(ValueError) as error:
        main(Config(out=str(tmp_path), **settings))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_image_names_its_row(models, tmp_path):
    row = json.loads((FIXTURES / "vl_rewardbench.json").read_text())[0] | {"image": "images/gone.png"}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    with pytest.raises(BadRow, match=r"data.json row 1: images/gone.png is neither in"):
        run(model=[str(models / "eyes")], benchmark="vl-rewardbench", data=[str(tmp_path)], out=str(tmp_path))


def test_a_parquet_file_is_read_with_its_images_or_says_what_to_install(tmp_path, monkeypatch):
    row = json.loads((FIXTURES / "vl_rewardbench.json").read_text())[2]
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = datasets.Dataset.from_list([row | {"image": {"bytes": (FIXTURES / "images/cup.png").read_bytes(), "path": None}}])
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    ((where, c),) = read_benchmark("vl-rewardbench", [str(tmp_path)], "stop")
    assert c.pairs == [(1, 0)] and evaluate.open_image(c.images[0]).size == (56, 56) and where.endswith(".parquet row 1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadRow, match="test-00000-of-00001.parquet: .*; pip install datasets"):
        read_benchmark("vl-rewardbench", [str(tmp_path)], "stop")


def test_on_the_hub_those_splits_are_read_that_the_benchmark_names(monkeypatch):
    """RewardBench is one split of one set and four of another, whose rows say no subset; a set with neither is another set."""
    datasets = pytest.importorskip("datasets")
    prior, row = ["anthropic_helpful", "anthropic_hhh", "shp", "summarize"], {"prompt": "?", "chosen": "a", "rejected": "b"}
    hub = {"allenai/bench": {"raw": {}, "filtered": row | {"subset": "hep-go"}}, "allenai/prior": dict.fromkeys([*prior, "other"], row),
           "allenai/else": {"validation": row}}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, data_files, streaming: datasets.DatasetDict(
        {split: datasets.Dataset.from_list([only]) for split, only in hub[name].items()}))
    found = read_benchmark("rewardbench", ["allenai/bench", "allenai/prior"], "stop")
    assert [c.category for _, c in found] == ["hep-go", *prior] and found[3][0] == "allenai/prior/shp row 1"
    with pytest.raises(BadRow, match="allenai/else cannot be read: its splits are validation; want filtered, or anthropic_helpful"):
        read_benchmark("rewardbench", ["allenai/else"], "stop")


def test_a_broken_line_and_a_field_that_is_null_are_named_by_file_and_line(tmp_path):
    good = {"id": 1, "prompt": "?", "chosen": "a", "rejected": "b", "subset": "shp"}
    lines = [json.dumps(good), "", '{"id": 2', json.dumps(good | {"chosen": None}), "[3]"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (_, c), *bad = read_benchmark("rewardbench", [str(tmp_path)], "skip")
    assert c.responses == ["a", "b"] and all(isinstance(error, BadRow) and str(error).startswith(where) for where, error in bad)
    assert [re.sub(".*rows.jsonl row ", "", str(error))[:21] for _, error in bad] == [
        "3: malformed JSON: Ex", "4: no field chosen: f", "5: found list, want a"]
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(BadRow, match="holds no row"):
        read_benchmark("rewardbench", [str(tmp_path)], "stop")


def test_the_command_ends_with_one_line_and_a_code(tmp_path):
    done = subprocess.run([sys.executable, "evaluate.py", "--model", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("evaluate.py: --model") and not done.stdout
