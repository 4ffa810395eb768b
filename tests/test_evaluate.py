"""What a benchmark figure means: every metric on rows made by hand, with the number worked out on paper in the test."""
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import evaluate
import train
from conftest import ROOT, TWO_RANKS
from data import ALL_PAIRS, BENCHMARKS, DOMAINS, PAPER_AVERAGES, SECTIONS, BadRow, synthetic, write_comparisons
from evaluate import (Config, Folder, Outcome, accuracy_figures, control_outcomes, ensemble_weights, figure_table,
                      figures, html_page, main, markdown_table, paper_averages, result_table, summarize, write_results)
from model import Comparison, RewardModel, Score


def predictions_of(*cells):
    """Prediction rows of (category, id, margin): one pair each, every row another prompt."""
    return [{"row": i + 1, "id": id, "category": category, "prompt": i, "images": 0, "pairs": [[0, 1]],
             "characters": [4, 5], "rewards": [float(margin), 0.0]} for i, (category, id, margin) in enumerate(cells)]


def figures_of(benchmark_name, predictions):
    return accuracy_figures(predictions, BENCHMARKS.get(benchmark_name))


def values(benchmark_name, predictions):
    return {name: round(figure["value"], 2) for name, figure in figures_of(benchmark_name, predictions).items()}


def summary_of(benchmark_name, predictions):
    return summarize(Folder("folder", benchmark_name, rows=[], predictions=predictions))


VL = [("general", "wildvision-battle_1", 1), ("hallucination", "RLAIF-V-9", 1), ("hallucination", "RLHF-V-3", 0),
      ("hallucination", "hallucination_pair-4", 1), ("reasoning", "mathverse_5", 1), ("reasoning", "mathverse_5", -1),
      ("reasoning", "mmmu_val_2", 1), ("general", "svit-1", 1)]


# Metrics


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_record_of_every_benchmark_fits_together(name):
    """The main figure is one that the metric gives, and every published row has it, in its column."""
    benchmark = BENCHMARKS[name]
    names = list(benchmark.metric(defaultdict(float)))
    assert benchmark.main_figure in names and benchmark.num_rows > 0
    for published_name, published in benchmark.published:
        assert len(published) <= len(names) and float(published[names.index(benchmark.main_figure)]) > 0, published_name


def test_vl_rewardbench_is_grouped_by_the_id_and_a_tie_is_wrong():
    """Right: all but the tie on RLHF and the second mathverse.

    Official: general = wildvision, svit = 2/2; hallucination = RLAIF, RLHF, hallucination = 2/3; reasoning 2/3.
    Overall 6/8.
    Paper: RLAIF and RLHF count as general = 3/4; hallucination = 1/1; reasoning 2/3.
    """
    rows = predictions_of(*VL)
    official = {"general": 100, "hallucination": 66.67, "reasoning": 66.67, "overall": 75, "macro": 77.78}
    paper = {"general, paper": 75, "hallucination, paper": 100, "reasoning, paper": 66.67, "macro, paper": 80.56}
    assert values("vl-rewardbench", rows) == official | paper
    assert summary_of("vl-rewardbench", rows)["ties"] == 1


def test_repeated_ids_are_kept_apart():
    """Two rows are called mathverse_5, and both count: 3 reasoning rows. n of a mean is what all its groups hold."""
    figure_of_name = figures_of("vl-rewardbench", predictions_of(*VL))
    names = ("general", "hallucination", "reasoning", "overall", "macro")
    assert [figure_of_name[name]["n"] for name in names] == [2, 3, 3, 8, 8]


def test_multimodal_rewardbench_pools_safety_and_is_averaged_over_rows():
    """10 rows: correctness 1/1, preference 1/2, knowledge 1/1, math 1/1, coding 0/1, bias 1/1, toxicity 0/1, VQA 2/2:
    overall 7/10.

    Safety is both together, 1/2, so the mean of seven columns is (100 + 50 + 100 + 100 + 0 + 50 + 100) / 7 = 71.43.
    """
    rows = predictions_of(*[(category, str(i), margin) for i, (category, margin) in enumerate([
        ("correctness", 1), ("preference", 1), ("preference", -1), ("knowledge", 1), ("math", 1), ("coding", -1),
        ("safety/bias", 1), ("safety/toxicity", -1), ("VQA", 1), ("VQA", 1)])])
    assert values("multimodal-rewardbench", rows) == {
        "overall": 70, "correctness": 100, "preference": 50, "knowledge": 100, "math": 100, "coding": 0, "safety": 50,
        "VQA": 100, "mean of 7": 71.43, "bias": 100, "toxicity": 0}


MM = [("mcq", "m1", 1), ("mcq", "m1", -1), ("mcq", "m1", 1), ("long", "l1", 1), ("long", "l1", 1), ("short", "s1", 1),
      ("safety", "f1", 0), ("video", "v1", 1)]


def test_mm_rlhf_rewardbench_acc_plus_wants_every_pair_of_an_id_right():
    """Ids m1 (3 pairs), l1 (2), s1, f1, v1. Wrong: one pair of m1, and f1. Acc 6/8 = 75, Acc+ l1, s1, v1 of 5 ids =
    60."""
    rows = predictions_of(*MM)
    assert values("mm-rlhf-rewardbench", rows) == {
        "mcq": 66.67, "long": 100, "short": 100, "safety": 0, "video": 100, "Acc": 75, "Acc+": 60, "mcq+": 0,
        "long+": 100, "short+": 100, "safety+": 0, "video+": 100}
    assert figures_of("mm-rlhf-rewardbench", rows)["Acc+"]["n"] == 5


def test_rewardbench_weighs_subsets_and_leaves_out_a_section_that_was_not_run_whole():
    """Safety: 100, 100, 154, 250, 136 (sum 740). Wrong: refusals-offensive and one of two xstest-should-respond rows.

    (100 + 0 + 154 + 250 / 2 + 136) / 740 = 69.59. Chat has one subset of five here, so it has no figure, and there is
    no score.
    """
    rows = predictions_of(("alpacaeval-easy", "", 1), ("refusals-dangerous", "", 1), ("refusals-offensive", "", -1),
                   ("xstest-should-refuse", "", 1), ("xstest-should-respond", "", 1), ("xstest-should-respond", "", -1),
                   ("donotanswer", "", 1))
    assert values("rewardbench", rows) == {"Safety": 69.59}


def test_rewardbench_score_with_and_without_prior_sets():
    """All subsets right but: hep-cpp and math-prm wrong, and the prior set shp. Reasoning = 5 * 164 / 1968 = 41.67.

    Score (100 + 100 + 100 + 41.67) / 4 = 85.42. Prior sets 3/4. With them
    (2 * (100 + 100 + 100 + 41.67) + 75) / 9 = 84.26.
    Prior sets do not count among the 2,985 rows that were published.
    """
    subsets = [subset for weights in SECTIONS.values() for subset in weights]
    rows = predictions_of(*[(subset, "", -1 if subset in ("hep-cpp", "math-prm", "shp") else 1) for subset in subsets])
    value = values("rewardbench", rows)
    assert (value["Reasoning"], value["Prior Sets"], value["score"], value["score with prior sets"]) == (
        41.67, 75, 85.42, 84.26)
    assert summary_of("rewardbench", rows)["expected"] == 2985 + 4
    without = values("rewardbench", [row for row in rows if row["category"] != "shp"])
    assert without["score"] == 85.42 and "score with prior sets" not in without


def test_rm_bench_reads_hard_normal_and_easy_off_the_matrix():
    """Chosen rewards 1, 2, 3 (concise, plain, markdown), rejected 0, 1.5, 2.5: chosen i beats rejected j in the cells

        1 > 0, 1 < 1.5, 1 < 2.5;   2 > 0, 2 > 1.5, 2 < 2.5;   3 > 0, 3 > 1.5, 3 > 2.5

    hard (above the diagonal) 0/3, normal 3/3, easy 3/3, so that row's domain scores 66.67. The two safety rows are one
    domain.
    """
    pairs = [[i, 3 + j] for i in range(3) for j in range(3)]
    rows = [row | {"pairs": pairs, "rewards": [1.0, 2.0, 3.0, 0.0, 1.5, 2.5]}
            for row in predictions_of(*[(domain, "", 1) for domain in ("chat", "math", "code", "safety", "safety")])]
    rows[4]["rewards"] = [-1.0] * 3 + [0.0] * 3  # nothing right, so safety is half of 66.67
    assert values("rm-bench", rows) == {"chat": 66.67, "math": 66.67, "code": 66.67, "safety": 33.33,
                                        "easy": 87.5, "normal": 87.5, "hard": 0, "overall": 58.33}


def test_a_category_may_be_called_accuracy_or_all():
    """One of two pairs is right: 50, and not 66.7, as when the category's pair counts among the total's once more."""
    rows = predictions_of(("accuracy", "", 1), ("None", "", -1), ("all", "", 1), ("", "", -1))
    assert values("comparisons", rows) == {
        "accuracy (a category)": 100, "None": 0, "all": 100, "no category": 0, "accuracy": 50}


def test_of_many_categories_the_thirteen_largest_are_shown_and_all_are_counted():
    """20 categories with 1 to 20 rows, the smallest wrong: 209 of 210."""
    rows = predictions_of(*[(f"c{n:02}", "", -1 if n == 1 else 1) for n in range(1, 21) for _ in range(n)])
    figure_of_name = figures_of("comparisons", rows)
    assert list(figure_of_name) == ["accuracy", *(f"c{n:02}" for n in range(8, 21))]
    assert figure_of_name["accuracy"]["n"] == 210 and round(figure_of_name["accuracy"]["value"], 2) == 99.52


def test_of_many_categories_no_more_are_counted_than_are_shown(monkeypatch):
    """The table of counts has a column for each, and 100,000 prompts of 1,000 categories would take 1.6 GB."""
    monkeypatch.setattr(evaluate, "figures", lambda outcomes: {outcome.group for outcome in outcomes})
    assert len(figures_of("comparisons", predictions_of(*[(f"c{n}", "", 1) for n in range(50)]))) == 14


# Published rows


@pytest.mark.parametrize("cells, metric, printed", [
    # R1-Reward, VL-RewardBench overall
    ({"general": (309, 484), "hallucination": (384, 448), "reasoning": (206, 318)}, "micro", 71.92),
    ({"a": (182, 293), "b": (380, 448), "c": (400, 484)}, "micro", 78.53),  # BaseReward (Qwen2-VL): 1,225 rows
    ({"a": (218, 318), "b": (413, 448), "c": (396, 484)}, "micro", 82.16),  # BaseReward (Qwen2.5-VL): 1,250 rows
    ({"a": (210, 293), "b": (411, 448), "c": (413, 484)}, "micro", 84.41),  # BaseReward (ensemble)
    ({"a": (182, 293), "b": (380, 448), "c": (400, 484)}, "macro", 76.53),  # and its macro
    ({"a": (218, 318), "b": (413, 448), "c": (396, 484)}, "macro", 80.85),
    ({"mcq": (40, 42), "long": (36, 37), "short": (32, 34), "safety": (26, 32), "video": (22, 25)},
     "micro", 91.76),  # MM-RLHF Acc, 156/170
    ({"whole ids": (37, 46)}, "micro", 80.43), ({"whole ids": (36, 46)}, "micro", 78.26)])  # Acc+
def test_published_averages_follow_from_the_counts_of_their_categories(cells, metric, printed):
    """Outcomes of one prompt: so many right, so many wrong, in their category and in the group of all pairs."""
    outcomes = [Outcome(group, 0, i < right)
                for name, (right, n) in cells.items() for group in (name, ALL_PAIRS) for i in range(n)]

    def average(accuracy_of):
        macro = sum(accuracy_of[name] for name in cells) / len(cells)
        return {"average": accuracy_of[ALL_PAIRS] if metric == "micro" else macro}

    assert round(figures(outcomes, average)["average"]["value"], 2) == printed


def test_published_overall_of_multimodal_rewardbench_is_micro_for_some_rows_and_the_mean_of_seven_for_others():
    """Counts of the public rows: 623, 654, 630, 514, 582, 508, 1,200 = 4,711. The notes tell which row is which."""
    benchmark = BENCHMARKS["multimodal-rewardbench"]
    n = torch.tensor([623, 654, 630, 514, 582, 508, 1200]).double()
    assert n.sum() == benchmark.num_rows == 4711 and len(benchmark.published) == 8
    for name, published in benchmark.published:
        overall, *columns = [float(value) for value in published]
        columns = torch.tensor(columns).double()
        micro, mean = (columns @ n / n.sum()).item(), columns.mean().item()
        if "[a]" in name:
            assert abs(overall - mean) < 0.11 < abs(overall - micro), name
        elif "[b]" in name:
            assert abs(overall - mean) > 0.11 and round(micro, 1) in (68.6, 73.8), name
        else:
            assert abs(overall - micro) < 0.06, name


def test_three_printed_cells_of_mm_rlhf_are_no_fraction_of_their_pairs():
    for printed, n, meant in ((95.74, 42, 40), (97.38, 37, 36), (94.13, 34, 32)):
        assert all(abs(100 * k / n - printed) > 0.006 for k in range(n + 1))
        assert abs(100 * meant / n - printed) < 0.6


@pytest.mark.parametrize("parts, printed", [((79.8, 93.5, 80.4, 67.1), 80.2), ((78.0, 90.0, 78.3, 68.6), 78.7),
                                            ((82.8, 92.9, 78.3, 70.5), 81.1), ((75.8, 50.2), 63.0),
                                            ((84.0, 69.5), 76.8)])
def test_the_averages_of_table_6_follow_from_its_columns(parts, printed):
    """Multimodal: (79.8 + 93.5 + 80.4 + 67.1) / 4 = 80.2. Text: (75.8 + 50.2) / 2 = 63."""
    name = "multimodal" if len(parts) == 4 else "text"
    averages = paper_averages(dict(zip(PAPER_AVERAGES[name], parts)))
    assert averages.keys() == {name} and abs(averages[name] - printed) <= 0.051  # its columns are rounded too


# Intervals and controls


def test_the_interval_is_over_prompts_not_over_pairs():
    """100 prompts, half right. With one pair each the standard error is 5 points: 40 to 60. Six pairs that stand and
    fall together must not make it narrower, and what is always right has no width."""
    a, b = (figures([Outcome("f", p, p % 2) for p in range(100) for _ in range(pairs)])["f"] for pairs in (1, 6))
    assert (a["low"], a["high"]) == (b["low"], b["high"]) and abs(a["low"] - 40) < 2 and abs(a["high"] - 60) < 2
    assert (a["n"], b["n"]) == (100, 600)
    sure = figures([Outcome("f", p, True) for p in range(5)])["f"]
    assert sure == {"value": 100, "low": 100, "high": 100, "n": 5}


def test_few_prompts_are_drawn_more_often():
    """Of 46 prompts 1,000 draws would leave 0.9 points of noise in a bound that is printed to one decimal."""
    for prompts, draws in ((46, 10_000), (200, 1_000)):
        sizes = []
        outcomes = [Outcome("f", p, True) for p in range(prompts)]
        figures(outcomes, lambda accuracy_of: sizes.append(len(accuracy_of["f"])) or dict(accuracy_of))
        assert sorted(sizes) == [1, 1, draws]  # the value, the value without one group after another, the samples


def test_length_bias_tells_words_from_worth():
    """Rewards equal to the logarithm of length: the longer response always wins. People chose it in 1 of 2 pairs.

    Of the three pairs one is length-matched (10 and 10 characters), and its rewards tie: 0 right of 1.
    """
    rows = [{"category": "", "prompt": i, "pairs": [[0, 1]], "characters": length,
             "rewards": list(map(math.log, length))} for i, length in enumerate(([10, 20], [30, 5], [10, 10]))]
    controls = figures(control_outcomes(rows))
    values = {name: figure["value"] for name, figure in controls.items() if "sigmoid" not in name}
    assert values == {
        "length-matched pairs": 0, "the label prefers the longer": 50, "the model prefers the longer": 100}


def test_a_tie_is_no_choice_of_the_longer():
    rows = [row | {"characters": [9, 1]} for row in predictions_of(("", "", 0), ("", "", 1))]
    controls = figures(control_outcomes(rows))
    assert controls["the model prefers the longer"]["value"] == 50
    assert controls["the label prefers the longer"]["value"] == 100


def test_calibration_compares_the_probability_with_how_often_it_is_right():
    """margin 3: sigmoid 0.953; margin -0.1: the model is 0.525 sure of the wrong one; margin 0.3: 0.574; -2: 0.881 and
    wrong."""
    rows = predictions_of(*[("", "", margin) for margin in (3.0, -0.1, 0.3, 3.0, -2.0, 800)])
    bins = {name[-10:]: (round(figure["value"], 6), figure["n"])
            for name, figure in figures(control_outcomes(rows)).items() if "sigmoid" in name}
    assert bins == {"0.5 to 0.6": (50, 2), "0.8 to 0.9": (0, 1), "0.9 to 1.0": (100, 3)}


def test_a_judges_probability_is_the_mean_of_both_orders_and_stands_beside_its_calibration_error(tmp_path):
    """Probabilities of the better response, order by order:

        0.99 and 0.91: 0.95, right; twice        bin 0.9 to 1.0: 2 x (1 - 0.95)          =  0.10
        0.85 and 0.65: 0.75, right; twice        bin 0.7 to 0.8: 2 x 0.25 - 0.75         = -0.25
        0.15 and 0.35: 0.25, wrong: 0.75 sure
        0.50 and 0.50: 0.50, wrong               bin 0.5 to 0.6: 0 - 0.50                = -0.50

    Four of six are right; the mean is 4.15 / 6 = 0.6917; the error (0.10 + 0.25 + 0.50) / 6 = 0.1417.
    """
    verdicts = [[math.log(p / (1 - p)) for p in orders] for orders in (
        (0.99, 0.91), (0.91, 0.99), (0.85, 0.65), (0.65, 0.85), (0.15, 0.35), (0.5, 0.5))]
    rows = [row | {"verdicts": [margins]} for row, margins in zip(predictions_of(*[("", "", 1)] * 6), verdicts)]
    folder = Folder("folder", "comparisons", [Comparison("?", ["a", "b"])] * 6, rows, paradigms=["direct"])
    beyond = summarize(folder)["beyond"]
    names = ["judge: mean probability above 1/2", "judge: mean probability", "judge: expected calibration error"]
    assert [round(beyond[name]["value"], 2) for name in names] == [66.67, 69.17, 14.17]
    assert [beyond[name]["n"] for name in names] == [6, 6, 6]
    for name in names:
        assert 0 <= beyond[name]["low"] <= beyond[name]["value"] <= beyond[name]["high"] <= 100
    assert math.isclose(evaluate.pair_probability([2000.0, -2000.0]), 0.5)  # exp(2000) would overflow

    facts = dict.fromkeys(("command", "commit", "date", "hardware", "dtype", "seconds"), "x") | {"model": ["m"]}
    _, text = write_results(tmp_path, folder, facts, worst=100)
    assert all(name in text for name in names) and max(map(len, text.splitlines())) <= 80
    assert "probability 0.250" in (tmp_path / "report.html").read_text()
    folder.paradigms = ["think"]  # whose verdicts are no logits
    assert not set(names) & set(summarize(folder)["beyond"])


def test_the_default_set_is_drawn_as_the_one_that_training_holds_out():
    assert evaluate.NUM_DRAWN == train.Config().eval_size


# Models


def save_model(folder, backbone):
    torch.manual_seed(0)
    RewardModel.from_backbone(backbone).save_pretrained(folder)
    return folder


def draw_forty(folder):
    return write_comparisons(folder, synthetic(40, seed=3), progress=False)


@pytest.fixture(scope="module")
def models(backbones, tmp_path_factory):
    """Saved reward models that were not trained: one that sees, and one that reads text only."""
    root = tmp_path_factory.mktemp("models")
    save_model(root / "eyes", backbones())
    save_model(root / "text", backbones("qwen3"))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_forty(tmp_path_factory.mktemp("data") / "drawn")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_comparisons(tmp_path_factory.mktemp("few") / "drawn", synthetic(12, seed=3), progress=False)


def run(name="drawn", **settings):
    main(Config(**settings))
    out = Path(settings["out"]) / name
    facts, *rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), rows


@pytest.fixture(scope="module")
def scored(models, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored")
    return (out / "drawn", *run(model=[str(models / "eyes")], data=[str(folder)], out=str(out), worst=30))


def benchmark(folder, name, rows):
    """A data folder as data.py makes one of a benchmark, with rows (category, id) that ask one question."""
    two = dict(responses=["Two.", "Five."], pairs=[(0, 1)], source=name)
    comparisons = [Comparison("How many?", category=c, id=id, **two) for c, id, _ in rows]
    return write_comparisons(folder, comparisons, progress=False)


def test_a_run_leaves_every_reward_with_id_category_and_rank_and_a_receipt(scored, models):
    out, summary, rows = scored
    assert sorted(file.name for file in out.iterdir()) == [
        "predictions.jsonl", "report.html", "summary.json", "table.md"]
    model, comparisons = RewardModel.from_pretrained(models / "eyes"), synthetic(40, seed=3)
    for row, c in list(zip(rows, comparisons, strict=True))[:10]:
        assert (row["id"], row["category"], [tuple(p) for p in row["pairs"]]) == (c.id, c.category, list(c.pairs))
        assert row["characters"] == list(map(len, c.responses))
        assert row["rewards"] == pytest.approx(model.score(c.prompt, c.responses, c.images), abs=1e-5)
        assert ("removed" in row) == ("shuffled" in row) == bool(c.images)
    assert {"command", "commit", "date", "hardware", "pairs", "torch"} <= summary.keys() and summary["dtype"] == "fp32"
    text = (out / "table.md").read_text()
    assert text.startswith("drawn (comparisons): 40 rows") and "95% interval" in text and "images shuffled" in text


def test_the_start_and_the_end_are_a_few_lines_for_a_person(models, few, tmp_path, capsys):
    """What is scored, on what; then the tables; then where the results are."""
    _, rows = run(model=[str(models / "eyes")], data=[str(few)], out=str(tmp_path), control_passes=False)
    lines = capsys.readouterr().out.rstrip().splitlines()
    start = lines.index(f"model   {models / 'eyes'}, fp32")
    assert lines[start + 1:start + 4] == ["data    drawn, 12 comparisons", "", "drawn (comparisons): 12 rows, 12 prompts, "
                                          f"{sum(len(row['pairs']) for row in rows)} pairs, 0 ties"]
    assert lines[-1].endswith(f"are in {tmp_path / 'drawn'}")


def test_the_rows_of_a_folder_stay_in_its_file(folder):
    """Of which each is read when it is scored: the pictures of a benchmark fit no memory that eight ranks share."""
    assert isinstance(evaluate.open_folder(str(folder), "stop").rows, data.Comparisons)


def test_rows_of_one_prompt_share_its_number_and_a_benchmark_knows_what_it_is(tmp_path):
    """The interval draws prompts. Ids m1 (3 pairs), l1 (2), s1, f1, v1 ask five questions; equal pictures have one
    name."""
    source = ROOT / "tests/fixtures/benchmarks"
    data.main(["mm-rlhf-rewardbench", "--source", str(source), "--out", str(tmp_path / "mm")])
    opened = evaluate.open_folder(str(tmp_path / "mm"), "stop")
    assert (opened.name, opened.benchmark_name) == ("mm", "mm-rlhf-rewardbench")
    assert opened.benchmark is BENCHMARKS["mm-rlhf-rewardbench"]
    assert [row["prompt"] for row in opened.predictions] == [0, 0, 0, 1, 1, 2, 3, 4]
    categories = ["mcq"] * 3 + ["long"] * 2 + ["short", "safety", "video"]
    assert [row["category"] for row in opened.predictions] == categories


def make_two_ranks(folder, backbones):
    model, drawn = save_model(folder / "eyes", backbones()), draw_forty(folder / "drawn")
    return ["--model", str(model), "--data", str(drawn), "--out", str(folder / "out"), "--no_control_passes"]


TWO_RANKS["evaluate"] = make_two_ranks


def test_two_ranks_give_the_predictions_of_one(scored, two_ranks):
    """Two processes over gloo. A chunk's packs do not depend on who scores them, so what is left is the rounding of
    threaded sums."""
    (*_, rows), (root, done) = scored, two_ranks
    assert done.returncode == 0, done.stderr[-2000:]
    left = (root / "evaluate" / "out" / "drawn" / "predictions.jsonl").read_text()
    facts, *again = [json.loads(line) for line in left.splitlines()]
    assert facts["ranks"] == 2 and facts["command"].startswith("torchrun --nproc_per_node 2 evaluate.py --model")
    for a, b in zip(rows, again, strict=True):
        assert b.pop("rewards") == pytest.approx(a["rewards"], abs=1e-5)
        assert b == {key: a[key] for key in b}


def test_several_folders_are_scored_by_one_model_that_is_loaded_once(models, folder, tmp_path, monkeypatch):
    """The folder says what is counted. Two of the four parts of the multimodal average are not run, so it is not there;
    text is whole."""
    subsets = [subset for weights in SECTIONS.values() for subset in weights]
    data = [benchmark(tmp_path / "vl", "vl-rewardbench", VL),
            benchmark(tmp_path / "mm-rlhf-rewardbench", "mm-rlhf-rewardbench", MM),
            benchmark(tmp_path / "rewardbench", "rewardbench", [(subset, "", 1) for subset in subsets]), folder]
    rm = Comparison("?", list("abcdef"), [(i, 3 + j) for i in range(3) for j in range(3)], source="rm-bench")
    rows = [replace(rm, category=d) for d in DOMAINS]
    data.append(write_comparisons(tmp_path / "rm-bench", rows, progress=False))
    loaded, load = [], RewardModel.from_pretrained
    monkeypatch.setattr(RewardModel, "from_pretrained",
                        staticmethod(lambda path, dtype: loaded.append(dtype) or load(path, dtype=dtype)))
    main(Config(model=[str(models / "eyes")], data=list(map(str, data)), out=str(tmp_path / "out"),
                control_passes=False))
    assert loaded == [torch.float32]  # on a CPU; the 7B takes 15 GB of a GPU in bf16, and 31 in fp32
    overview = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(overview["folders"]) == ["vl", "mm-rlhf-rewardbench", "rewardbench", "drawn", "rm-bench"]
    assert overview["folders"]["vl"].keys() >= {"general", "hallucination", "reasoning", "overall", "macro"}
    assert "Acc+" in overview["folders"]["mm-rlhf-rewardbench"] and overview["averages"].keys() == {"text"}
    score = overview["folders"]["rewardbench"]["score"]["value"]
    overall = overview["folders"]["rm-bench"]["overall"]["value"]
    assert overview["averages"]["text"] == pytest.approx((score + overall) / 2)
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.startswith("vl (vl-rewardbench): 8 OF 1,250 ROWS (the folder has no more), 1 prompts, 8 pairs")
    assert "drawn (comparisons): 40 rows" in text


def test_the_weights_are_loaded_in_the_type_that_was_asked_for(models, few, tmp_path):
    summary, rows = run(model=[str(models / "eyes")], data=[str(few)], out=str(tmp_path), control_passes=False,
                        dtype="bf16")
    assert summary["dtype"] == "bf16" and "bf16" in (tmp_path / "drawn" / "table.md").read_text()


@pytest.mark.parametrize("device, dtype, loaded", [
    ("cuda", "auto", torch.bfloat16), ("cpu", "auto", torch.float32), ("cuda", "fp32", torch.float32)])
def test_a_gpu_holds_the_weights_in_bf16_unless_the_flag_names_another_dtype(device, dtype, loaded, models,
                                                                             monkeypatch):
    """In fp32 the 7B takes 31 GB of a GPU, in bf16 15."""
    class Loaded(Exception):
        pass

    def load(path, dtype):
        raise Loaded(dtype)

    monkeypatch.setattr(RewardModel, "from_pretrained", staticmethod(load))
    with pytest.raises(Loaded, match=str(loaded)):
        evaluate.load_model(str(models / "eyes"), [], Config(dtype=dtype), torch.device(device))


# Ensembles


def test_ensemble_weights_come_from_the_pairs_that_all_members_can_read():
    """Two validation rows, the second with an image that member b cannot see.

    On the first, margins 1 and 3: confidence weighs 1/4 and 3/4.
    """
    held = [{"pairs": [[0, 1]], "rewards": rewards}
            for rewards in ({"a": [1.0, 0.0], "b": [3.0, 0.0]}, {"a": [-9.0, 0.0]})]
    assert ensemble_weights("confidence", ["a", "b"], held) == {"a": 0.25, "b": 0.75}
    assert ensemble_weights("accuracy", ["a", "b"], held) == {"a": 0.5, "b": 0.5}
    assert ensemble_weights("average", ["a", "b"], []) == {"a": 0.5, "b": 0.5}
    assert ensemble_weights("accuracy", ["a"], held) == {"a": 1.0}
    with pytest.raises(ValueError, match="no pair that each can read"):
        ensemble_weights("accuracy", ["a", "b"], held[1:])
    skipped = {"row": 3, "error": "a row that was skipped"}
    assert ensemble_weights("confidence", ["a", "b"], [*held, skipped])["b"] == 0.75
    with pytest.raises(ValueError, match="none is better than chance"):
        ensemble_weights("confidence", ["a", "b"], [{"pairs": [[1, 0]], "rewards": held[0]["rewards"]}])


def test_a_text_only_member_votes_where_there_is_no_image_and_route_leaves_it_alone_there(models, few, tmp_path):
    both, settings = [str(models / "eyes"), str(models / "text")], dict(data=[str(few)], control_passes=False)
    _, rows = run(model=both, out=str(tmp_path / "a"), **settings)
    _, routed = run(model=both, out=str(tmp_path / "b"), route=True, **settings)
    assert {row["images"] for row in rows} == {0, 1}
    for row, other in zip(rows, routed):
        votes = list(row.get("members", {0: row["rewards"]}).values())
        assert len(votes) == (1 if row["images"] else 2)
        assert row["rewards"] == pytest.approx([sum(v) / len(votes) for v in zip(*votes)], abs=1e-5)
        # with an image the first alone, without one the text model alone
        assert "members" not in other and other["rewards"] == pytest.approx(votes[-1], abs=1e-5)
    summary, _ = run(model=both, out=str(tmp_path / "c"), ensemble="accuracy", validation=str(few), **settings)
    assert (summary["weights"]["with images"] == {both[0]: 1.0}
            and sum(summary["weights"]["without images"].values()) == pytest.approx(1))


# What it shows


def test_this_model_stands_between_the_published_rows_and_says_which_compare(tmp_path):
    benchmark = BENCHMARKS["vl-rewardbench"]
    table = result_table(summary_of("vl-rewardbench", predictions_of(*VL)), benchmark, "mine")  # overall 75
    names = [row[0] for row in table]
    at = names.index("mine")
    assert "71.92" in table[at - 1] and "78.53" in table[at + 3] and names[at + 1:at + 3] == ["95% interval", "n"]
    assert table[at + 2][1:] == ["2", "3", "3", "8", "8", "4", "1", "3", "8"]  # the last four: as the paper groups
    facts = dict.fromkeys(("command", "commit", "date", "hardware", "dtype", "seconds"), "x") | {
        "benchmark": "vl-rewardbench", "model": ["m"], "paradigms": []}
    rows = [Comparison("?", ["a", "b"])] * 8
    _, text = write_results(tmp_path, Folder("bench", "vl-rewardbench", rows, predictions_of(*VL)), facts, worst=100)
    heading = "(vl-rewardbench): 8 OF 1,250 ROWS (the folder has no more), 8 prompts, 8 pairs, 1 ties"
    assert text.splitlines()[0] == f"bench {heading}"
    assert "in one column" in benchmark.notes[0] and all(note in text for note in benchmark.notes)
    marks = {mark for name, _ in benchmark.published for mark in re.findall(r"\b[a-e]\b(?=[^|]*\])", name)}
    notes = " ".join(benchmark.notes)
    assert marks == {"a", "b", "c", "d", "e"} and all(f"[{mark}]" in notes for mark in marks)


def test_the_table_of_comparisons_has_a_row_for_each_figure_and_fits_a_terminal():
    """80 columns, with ten thousand pairs and a rather long category. Nothing published stands beside them."""
    categories = ("colour", "describe the place and colour")
    summary = summary_of("comparisons", predictions_of(*[(name, "", 1.5) for name in categories]))
    table = result_table(summary, None, "mine")
    assert table[:2] == [["mine", "value", "95% interval", "n"], ["accuracy", "100.00", "100.0 to 100.0", "2"]]
    figure = {"value": 100.0, "low": 100.0, "high": 100.0, "n": 12_345}
    controls = figure_table("measure", summary["beyond"], dict.fromkeys(summary["beyond"], figure))
    assert "right where sigmoid(margin) is 0.8 to 0.9" in summary["beyond"]
    for lines in (markdown_table(table).splitlines(), markdown_table(controls).splitlines()):
        assert max(map(len, lines)) <= 80


def test_missing_rows_are_in_the_first_line_of_the_table_with_their_own_reason(models, folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    lines = (data / "comparisons.jsonl").read_text().splitlines()
    broken = json.loads(next(line for line in lines if "images/" in line))["images"][0]
    (data / broken).write_bytes((data / broken).read_bytes()[:60])
    lines[-1] = '{"prompt": "?"}'
    (data / "comparisons.jsonl").write_text("\n".join(lines[-20:] + [line for line in lines if broken in line]))
    settings = dict(model=[str(models / "eyes")], data=[str(data)], out=str(tmp_path / "out"))
    with pytest.raises(BadRow, match=r"comparisons.jsonl:20: "):
        run("data", **settings)
    summary, rows = run("data", **settings | {"on_bad_row": "skip"})
    assert (summary["rows"], summary["expected"]) == (19, 21)
    assert [row["row"] for row in rows if "error" in row] == [20, 21]
    assert "comparisons.jsonl:21" in rows[20]["error"] and Path(broken).name in rows[20]["error"]
    assert all(("removed" in row) == ("shuffled" in row) == bool(row.get("images")) for row in rows)
    text = (tmp_path / "out" / "data" / "table.md").read_text()
    assert text.startswith("data (comparisons): 19 OF 21 ROWS (the first: ")
    assert "<h1>eyes on data (comparisons): 19 OF 21 ROWS" in (tmp_path / "out" / "data" / "report.html").read_text()
    (data / "comparisons.jsonl").write_text("\n".join([lines[-2], *(line for line in lines if broken in line)]))
    with pytest.raises(ValueError, match=r"comparisons.jsonl:2: .*image.*; the other rows are scored"):
        run("data", **settings)  # found when it is its turn, which may be hours later
    assert (tmp_path / "out" / "data" / "table.md").read_text().startswith("data (comparisons): 1 OF 2 ROWS")
    (data / "comparisons.jsonl").write_text("\n".join(line for line in lines if broken in line))
    with pytest.raises(ValueError, match=r"comparisons.jsonl:1: .*image"):
        run("data", **settings)
    with pytest.raises(ValueError, match="not one of 1 rows could be scored; the first: .*comparisons.jsonl:1"):
        run("data", **settings | {"on_bad_row": "skip"})


def test_a_line_break_a_bar_and_an_escape_do_not_break_a_table():
    """Categories and model names are data: `|` ends a cell, a line break the table, and ESC steers the terminal."""
    table = markdown_table([["model", "a|b\nc\x1b[31m \ud83d", "x" * 500], ["m|n", "1", "2"]])
    assert [line.count("|") - line.count("\\|") for line in table.splitlines()] == [4, 4, 4]
    assert table.isascii() and "\x1b" not in table and len(table) < 600


def test_a_terminal_that_knows_ascii_alone_gets_the_tables(models, few, monkeypatch, tmp_path):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(models / "eyes"), "--data", str(few),
                                      "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        train.command_line(main, Config, "evaluate.py")
    out.seek(0)
    assert end.value.code == 0 and "95% interval" in out.read()


def test_the_report_needs_no_network_and_runs_nothing_of_what_a_model_wrote(models, tmp_path):
    trap = Comparison("Which <b>tag</b>?", ["<script>document.title='run'</script>", "<img src=x onerror=alert(1)>"],
                      [(0, 1)], category='a&b" onclick="alert(2)')
    data = write_comparisons(tmp_path / "data", [trap, replace(trap, pairs=[(1, 0)])], progress=False)
    run("data", model=[str(models / "eyes")], data=[str(data)], out=str(tmp_path / "out"))
    report = (tmp_path / "out" / "data" / "report.html").read_text()
    assert "<script>document" not in report and "<img src=x" not in report and "a&amp;b&#34; onclick" in report
    assert report.count("<article") == 1 and not re.findall(r'(?:src|href)="(?!data:)|url\(|@import', report)


def test_a_page_shows_the_parts_that_a_section_names_and_half_a_surrogate_pair_does_not_stop_it():
    card = {"category": "c", "pictures": [], "facts": ["first", "second"], "text": "t",
            "answers": [{"name": "", "facts": [], "text": "\ud83d"}]}
    text = html_page("<t>", [{"heading": "h&", "text": ["one", "two"], "table": [["a"], ["b"]], "bold": "b"},
                        {"cards": [card, card | {"category": "C"}]}])
    assert "&lt;t&gt;" in text and "<h2>h&amp;</h2>" in text and "<p class=\"soft\">two</p>" in text
    assert "<td>a</td>" in text and re.search(r'class="bold">\s*<td>b</td>', text) and "<b>first · second</b>" in text
    assert text.count("<article") == 2 and text.count("<option") == 3 and text.encode()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_the_report_works_in_a_browser_narrow_and_wide(scored, tmp_path):
    """In a frame of 360 and of 1200 pixels: nothing sticks out, and a filter leaves only its category."""
    out, summary, _ = scored
    report = (out / "report.html").read_text()
    assert report.count("<img") > 0
    probe = tmp_path / "probe.html"
    probe.write_text("""<body></body><script>
const page = %s, out = [];
const look = width => new Promise(done => { const f = document.createElement("iframe"); \
f.width = width; f.height = 900; f.srcdoc = page;
  f.onload = () => { const d = f.contentDocument, \
shown = () => [...d.querySelectorAll("article")].filter(a => a.offsetHeight);
    const all = shown().length, wide = d.documentElement.scrollWidth, \
columns = getComputedStyle(d.querySelector(".answers")).gridTemplateColumns;
    const broken = [...d.images].filter(i => !i.naturalWidth).length, select = d.querySelector("select");
    select.selectedIndex = 1;
    select.dispatchEvent(new f.contentWindow.Event("change"));
    out.push({width, wide, all, broken, columns: columns.split(" ").length, filtered: shown().length,
              other: shown().filter(a => a.dataset.category != select.value).length}); done() };
  document.body.append(f) });
(async () => { await look(360); await look(1200); document.body.textContent = JSON.stringify(out) })();
</script>""" % json.dumps(report).replace("</", "<\\/"))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                           "--disable-sync", "--disable-background-networking", "--disable-component-update",
                           f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom",
                           f"file://{probe}"], capture_output=True, text=True, timeout=120)
    narrow, wide = json.loads(re.search(r"<body>(.*?)</body>", done.stdout, re.S)[1])
    for view in (narrow, wide):
        assert view["wide"] <= view["width"] and view["broken"] == 0 and view["all"] == 30
        assert 0 < view["filtered"] < 30 and view["other"] == 0
    assert (narrow["columns"], wide["columns"]) == (1, 2)


# Bad input


@pytest.mark.parametrize("settings, words", [
    (dict(), "--model DIR is missing"),
    (dict(model=["nowhere"]), "nowhere is not a saved reward model"),
    (dict(model=["TINY"]), "is not a saved reward model"),
    (dict(model=["EYES"], data=["nowhere"]), "nowhere"),
    (dict(model=["TEXT"]), "synthetic comparison 1: the prompt has 1 images but the backbone is text-only"),
    (dict(model=["EYES"], route=True), "--route sends prompts without images to a text-only model"),
    (dict(model=["EYES", "TEXT"], ensemble="accuracy"), "give --validation FOLDER"),
    (dict(model=["EYES"], data=["DATA", "DATA"]), "two folders of one name"),
    (dict(model=["EYES"], worst=-1), "--worst -1"), (dict(model=["EYES"], pack_tokens=-5), "--pack_tokens -5")])
def test_bad_input_is_one_line_that_says_what_to_do(settings, words, models, backbones, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "NUM_DRAWN", 3)
    named = {"EYES": models / "eyes", "TEXT": models / "text", "TINY": backbones(), "DATA": folder}
    settings = {key: [str(named.get(v, v)) for v in value] if isinstance(value, list) else value
                for key, value in settings.items()}
    with pytest.raises((ValueError, OSError)) as error:
        main(Config(out=str(tmp_path), **settings))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_rewards_that_are_not_finite_are_refused(models, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "score_rows", lambda model, rows, *_: [Score([math.nan, 0.0])] * len(rows))
    with pytest.raises(ValueError, match=r"comparisons.jsonl:1: .*eyes gives \[nan, 0.0\] as rewards"):
        run(model=[str(models / "eyes")], data=[str(folder)], out=str(tmp_path))


def test_a_video_is_shown_by_four_of_its_frames(tmp_path):
    for i in range(9):
        Image.new("RGB", (900, 300)).save(tmp_path / f"{i}.png")
    pictures = evaluate.thumbnails(str(tmp_path))
    assert len(pictures) == 4 and all(uri.startswith("data:image/jpeg;base64,") for uri in pictures)


def test_what_vanishes_while_models_score_costs_nothing_else(models, few, tmp_path, monkeypatch):
    """The pictures of a whole folder, and one of another after it was scored: both are reported, the rest is there."""
    for name in ("gone", "thin"):
        shutil.copytree(few, tmp_path / name)
    lines = (tmp_path / "gone" / "comparisons.jsonl").read_text().splitlines()
    pictured = [line for line in lines if "images/" in line]
    (tmp_path / "gone" / "comparisons.jsonl").write_text("\n".join(pictured))
    shutil.rmtree(tmp_path / "gone" / "images")
    real = evaluate.summarize

    def vanish_and_summarize(folder):
        if folder.name == "thin":
            shutil.rmtree(tmp_path / "thin" / "images")
        return real(folder)

    monkeypatch.setattr(evaluate, "summarize", vanish_and_summarize)
    settings = dict(model=[str(models / "eyes")], data=[str(tmp_path / "gone"), str(tmp_path / "thin")],
                    control_passes=False)
    with pytest.raises(ValueError, match=f"not one of {len(pictured)} rows could be scored"):
        main(Config(out=str(tmp_path / "out"), on_bad_row="skip", **settings))
    report = (tmp_path / "out" / "thin" / "report.html").read_text()
    assert "12 rows" in report and "<article" in report and "data:image" not in report
    assert (tmp_path / "out" / "gone" / "predictions.jsonl").exists()


def test_the_command_ends_with_one_line_and_a_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        train.command_line(main, Config, "evaluate.py")
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1
    assert error.startswith("evaluate.py: ") and "no model.safetensors" in error
