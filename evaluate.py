"""Scores reward models on benchmarks and on your own comparisons (BaseReward, arXiv 2509.16127,
section 5).

Read: to the ruled line, 95 minutes.

    python evaluate.py --model runs/default             800 drawn comparisons, held out: 20 seconds
    python evaluate.py --model DIR --data bench/vl-rewardbench bench/rm-bench    from data.py
    python evaluate.py --model DIR --data FOLDER        your own comparisons: accuracy by category
    python evaluate.py --model A B --ensemble accuracy --validation FOLDER --data FOLDER
                                                        an ensemble of two models (section 4.7)
    torchrun --nproc_per_node 8 evaluate.py ...         the same result for any number of ranks
    python evaluate.py --model DIR --serve 8000         rewards over HTTP, until Ctrl-C: appendix D

For each data folder, --out/NAME (default: evaluation/NAME in the model's folder) receives

    predictions.jsonl   the settings, then one line a row with its rewards: all figures follow
    summary.json        settings, numbers of rows, figures
    table.md            the tables that are printed
    report.html         the tables and the worst mistakes, with pictures

With several data folders, --out itself receives their table.md, and a summary.json with the
paper's averages. Not in the paper: intervals, controls, and the official grouping of
VL-RewardBench. Which published results are comparable: see `notes` of each benchmark in data.py.
"""
import base64
import contextlib
import io
import json
import math
import queue
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple

import jinja2
import safetensors
import torch
import transformers
from torch import distributed as dist
from transformers.hf_argparser import HfArg

from data import (ALL_PAIRS, BENCHMARKS, PAPER_AVERAGES, BadRow, Benchmark, Comparisons,
                  read_comparisons, remove_images, row_location, shuffle_images, synthetic)
from model import (Comparison, RewardModel, Score, check_text, message_text, one_line, open_frames,
                   pair_margins, printable, to_messages)
from train import (check_numbers, command_line, print_error, print_rank0, score_rows,
                   start_processes, stop_signals, write_text)

# 1  Configuration ---------------------------------------------------------------------
NUM_DRAWN = 800  # drawn comparisons without --data; as many as train.py holds out (--eval_size)


@dataclass(frozen=True)
class Config:
    model: list[str] = HfArg(
        default_factory=list, help="saved reward models (--out of train.py); several: an ensemble")
    data: list[str] = HfArg(
        default_factory=list, help="data folders, benchmarks among them; none: drawn comparisons")
    out: str = HfArg(
        default="", help="folder for the results; none: in the (first) model's folder")
    ensemble: Literal["average", "accuracy", "confidence"] = HfArg(
        default="average", help="how the members of an ensemble are weighted")
    validation: str = HfArg(
        default="", help="folder whose pairs give these weights (the paper takes 1,000 pairs)")
    route: bool = HfArg(
        default=False, help="prompts without images are scored by the text-only members alone")
    control_passes: bool = HfArg(
        default=True, help="score twice more, with images removed and with images shuffled")
    worst: int = HfArg(default=100, help="number of mistakes shown in report.html")
    on_bad_row: Literal["stop", "skip"] = HfArg(
        default="stop", help="skip: leave out rows that cannot be used; tables say how many")
    pack_tokens: int = HfArg(
        default=0, help="tokens in a pack; 0: 16,384 on a GPU, 1,024 on a CPU")
    critiques: Literal["own", "given"] = HfArg(
        default="own", help="critiques that a critic reads: those it writes, or those of the data")
    critique_tokens: int = HfArg(
        default=0, help="maximum length of a critique or thought; 0: as in training")
    dtype: Literal["auto", "bf16", "fp32"] = HfArg(
        default="auto", help="of the weights; auto: bf16 on a GPU, fp32 on a CPU")
    serve: int | None = HfArg(
        default=None, help="answer requests over HTTP at this port (0: any free one)")
    host: str = HfArg(
        default="127.0.0.1", help="address of --serve; by default only this machine reaches it")


def check_settings(cfg: Config) -> Config:
    """The settings with each model once. ValueError if settings or models cannot be used."""
    check_numbers(cfg, not_negative=("worst", "pack_tokens", "critique_tokens"))
    models = {}
    for directory in cfg.model:
        models[Path(directory).resolve()] = directory
    if not models:
        raise ValueError("--model DIR is missing: a saved reward model, such as runs/default "
                         "after train.py")
    if cfg.route and len(models) == 1:
        raise ValueError("--route sends prompts without images to a text-only model: name it and "
                         "another one after --model")

    for directory in models.values():
        check_saved_model(directory)
    return replace(cfg, model=list(models.values()))


def check_saved_model(directory: str) -> None:
    """ValueError, before hours of scoring, if files of a reward model are missing or incomplete."""
    if not list(Path(directory).glob("model*.safetensors")):
        raise ValueError(f"{directory} is not a saved reward model: it has no model.safetensors; "
                         "give the --out folder of a finished train.py")
    for file in sorted(Path(directory).glob("*.safetensors")):
        try:
            safetensors.safe_open(file, "pt")  # compares its header with the size of the file
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{directory} is not a saved reward model: {file.name}: {error}; copy "
                             "it again") from None
    for name in ("reward_config.json", "config.json"):
        try:
            json.loads(Path(directory, name).read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{directory} is not a saved reward model: {name}: {error}; copy it "
                             "again") from None


def check_writable(out: Path) -> None:
    """ValueError, before hours of scoring, if no file can be written into the folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into {out} ({error.strerror}); choose another "
                         "--out") from None


def dtype_name(cfg: Config, device: torch.device) -> str:
    if cfg.dtype != "auto":
        return cfg.dtype
    return "bf16" if device.type == "cuda" else "fp32"


# 2  Open a data folder ----------------------------------------------------------------
@dataclass
class Folder:
    """A data folder that is being scored."""
    name: str
    benchmark_name: str  # a key of data.BENCHMARKS, or "comparisons"
    rows: Comparisons | list  # rows[i] reads a Comparison
    predictions: list[dict]  # the lines of predictions.jsonl; of a bad row {"row", "error"}
    paradigms: list[str] = field(default_factory=list)  # of each model
    weights: dict = field(default_factory=dict)  # {"with images", "without images": {model: 1.0}}
    notes: list[str] = field(default_factory=list)  # printed below the table

    @property
    def benchmark(self) -> Benchmark | None:
        return BENCHMARKS.get(self.benchmark_name)


def open_folder(path: str, on_bad_row: str) -> Folder:
    """Reads each row of a data folder once, but not its images. An empty path: the drawn set."""
    rows = read_comparisons(path) if path else synthetic(NUM_DRAWN, held_out=True)
    predictions = []
    sources = set()
    prompt_numbers = {}  # rows with the same prompt and images share a number: see `figures`
    for row_index in range(len(rows)):
        try:
            comparison = rows[row_index]
        except BadRow as error:
            if on_bad_row == "stop":
                raise
            predictions.append({"row": row_index + 1, "error": str(error)})
            continue
        sources.add(comparison.source)
        prompt = repr((comparison.prompt, comparison.images))
        prompt_number = prompt_numbers.setdefault(prompt, len(prompt_numbers))
        predictions.append({
            "row": row_index + 1,
            "id": comparison.id,
            "category": comparison.category,
            "images": len(comparison.images),
            "prompt": prompt_number,
            "pairs": [list(pair) for pair in comparison.pairs],
            "characters": [len(response) for response in comparison.responses]})

    benchmark_name = "comparisons"
    if len(sources) == 1 and sources <= BENCHMARKS.keys():
        benchmark_name = sources.pop()
    name = Path(path or "drawn").resolve().name.removesuffix(".jsonl")
    return Folder(name, benchmark_name, rows, predictions)


def open_folders(cfg: Config) -> list[Folder]:
    """The folders of --data, or the drawn set."""
    folders = {}
    for path in cfg.data or [""]:
        folder = open_folder(path, cfg.on_bad_row)
        if folder.name in folders:
            raise ValueError(f"--data {' '.join(cfg.data):.150}: two folders of one name; so would "
                             "their results be")
        folders[folder.name] = folder
    return list(folders.values())


def without_errors(predictions: list[dict]) -> list[dict]:
    """The predictions of all rows but the bad ones."""
    return [prediction for prediction in predictions if "error" not in prediction]


def image_group(prediction: dict) -> str:
    return "with images" if prediction["images"] else "without images"


# 3  Score a folder with one model -----------------------------------------------------
# The keys of a prediction that hold K rewards, and their names in the tables. A model whose
# accuracy is alike in all three does not use the images.
IMAGE_CONDITIONS = {"rewards": "images as they are", "removed": "images removed",
                    "shuffled": "images shuffled"}


def load_model(directory: str, folders: list[Folder], cfg: Config, device) -> RewardModel:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name(cfg, device)]
    model = RewardModel.from_pretrained(directory, dtype=dtype)
    if model.paradigm != "naive":
        set_up_critic_or_judge(model, folders, cfg)  # --critiques: appendix B
    return model.to(device)


def score_folder(model, directory: str, folder: Folder, row_indices: list[int], cfg) -> dict:
    """{image condition: {row index: Score}} of these rows.

    A row that cannot be scored becomes an error in the folder's predictions, whatever
    --on_bad_row: `main` reports it when the results of the other rows are written."""
    progress = f"{Path(directory).name} on {folder.name}"
    if isinstance(folder.rows, Comparisons):
        rows = folder.rows.select(row_indices)
    else:
        rows = [folder.rows[row_index] for row_index in row_indices]

    scores = {}
    results = score_rows(model, rows, cfg.pack_tokens or None, "skip", progress)
    for row_index, score in zip(row_indices, results):
        if isinstance(score, BadRow):
            folder.predictions[row_index] = {"row": row_index + 1, "error": str(score)}
            continue
        if not all(map(math.isfinite, score.rewards)):
            raise ValueError(f"{row_location(folder.rows, row_index)}: {directory} gives "
                             f"{str(score.rewards):.80} as rewards: a broken model?")
        scores[row_index] = score

    if not cfg.control_passes:
        return {"rewards": scores}
    return {"rewards": scores} | score_changed_images(model, folder, scores, cfg, progress)


def score_changed_images(model, folder: Folder, row_indices, cfg, progress: str) -> dict:
    """As score_folder, of the rows with images: without them, and with those of other rows."""
    visual_indices = []
    comparisons = []
    removed = []
    for row_index in row_indices:
        if folder.predictions[row_index]["images"]:
            comparison = folder.rows[row_index]
            visual_indices.append(row_index)
            comparisons.append(comparison)
            removed.append(remove_images(comparison))

    passes = {}
    changed_rows = {"removed": removed, "shuffled": shuffle_images(comparisons)}
    for condition, rows in changed_rows.items():
        title = f"{progress}, {IMAGE_CONDITIONS[condition]}"
        results = score_rows(model, rows, cfg.pack_tokens or None, "skip", title)
        passes[condition] = {}
        for row_index, score in zip(visual_indices, results):
            if isinstance(score, Score):  # a prompt may be empty without its image: a BadRow
                passes[condition][row_index] = score
    return passes


def score_with_one_model(folders: list[Folder], cfg: Config, device: torch.device):
    """Yields each folder as soon as its predictions have their rewards."""
    (directory,) = cfg.model
    model = load_model(directory, folders, cfg, device)
    for folder in folders:
        folder.paradigms = [model.paradigm]
        row_indices = []
        for prediction in without_errors(folder.predictions):
            row_indices.append(prediction["row"] - 1)
            folder.weights[image_group(prediction)] = {directory: 1.0}

        passes = score_folder(model, directory, folder, row_indices, cfg)
        for condition, scores in passes.items():
            for row_index, score in scores.items():
                folder.predictions[row_index][condition] = score.rewards

        for row_index, score in passes["rewards"].items():
            if score.verdicts:  # of a judge
                folder.predictions[row_index]["verdicts"] = score.verdicts
            if score.texts:  # a critic's critiques, or a judge's thoughts
                folder.predictions[row_index]["critiques"] = {directory: score.texts}
        yield folder


# 4  Outcomes --------------------------------------------------------------------------
class Outcome(NamedTuple):
    """Whether one decision of the model was correct. Figures are computed from the accuracies of
    groups of outcomes."""
    group: str
    prompt: int  # its number: the intervals are over prompts
    correct: bool


class ScoredPair(NamedTuple):
    """A pair of responses and its margin, reward(winner) - reward(loser)."""
    prediction: dict
    winner: int
    loser: int
    margin: float


def scored_pairs(predictions: list[dict]):
    """All pairs. A pair is right if its margin is above 0; a tie is wrong, as in the official
    scripts of the benchmarks.

    A judge is asked twice, with the winner as answer 1 and as answer 2: each of its two verdicts
    gives a ScoredPair."""
    for prediction in predictions:
        score = Score(prediction["rewards"], prediction.get("verdicts", []))
        margins_of_pairs = pair_margins(prediction["pairs"], score)
        for (winner, loser), margins in zip(prediction["pairs"], margins_of_pairs):
            for margin in margins:
                yield ScoredPair(prediction, winner, loser, margin)


def pair_outcomes(predictions: list[dict], benchmark: Benchmark | None = None):
    """Each pair gives one outcome for the group of all pairs, which is called "accuracy", and one
    for its category or for each group of the benchmark that it belongs to."""
    for pair in scored_pairs(predictions):
        if benchmark is None:
            groups = [category_name(pair.prediction)]
        else:
            groups = benchmark.groups_of_pair(pair.prediction, pair.winner, pair.loser)
        for group in (ALL_PAIRS, *groups):
            yield Outcome(group, pair.prediction["prompt"], pair.margin > 0)


def category_name(prediction: dict) -> str:
    category = prediction["category"] or "no category"
    if category == ALL_PAIRS:  # it would be mixed up with all pairs
        return "accuracy (a category)"
    return category


def id_outcomes(predictions: list[dict]):
    """One outcome for each id, correct if all its pairs are right: Acc+ of MM-RLHF-RewardBench.

    >>> row = {"id": "a", "category": "mcq", "prompt": 0, "rewards": [2.0, 1.0, 3.0]}
    >>> row["pairs"] = [(0, 1), (0, 2)]  # the first is right, the second wrong
    >>> [tuple(outcome) for outcome in id_outcomes([row])]
    [('mcq+', 0, False), ('Acc+', 0, False)]"""
    pairs_of_id = defaultdict(list)
    for pair in scored_pairs(predictions):
        pairs_of_id[pair.prediction["id"]].append(pair)
    for pairs in pairs_of_id.values():
        first = pairs[0].prediction
        all_right = all(pair.margin > 0 for pair in pairs)
        yield Outcome(f"{first['category']}+", first["prompt"], all_right)
        yield Outcome("Acc+", first["prompt"], all_right)


def control_outcomes(predictions: list[dict]):
    """What accuracy does not show: whether the model uses the images, whether it prefers long
    responses, and whether it is right as often as its margins say (calibration)."""
    for pair in scored_pairs(predictions):
        prediction = pair.prediction
        prompt = prediction["prompt"]

        if prediction.keys() >= IMAGE_CONDITIONS.keys():
            for condition, group in IMAGE_CONDITIONS.items():
                rewards = prediction[condition]
                yield Outcome(group, prompt, rewards[pair.winner] > rewards[pair.loser])

        winner_length = prediction["characters"][pair.winner]
        loser_length = prediction["characters"][pair.loser]
        difference = winner_length - loser_length
        if abs(difference) <= 0.1 * max(winner_length, loser_length):
            yield Outcome("length-matched pairs", prompt, pair.margin > 0)
        if difference != 0:
            yield Outcome("the label prefers the longer", prompt, difference > 0)
            yield Outcome("the model prefers the longer", prompt, pair.margin * difference > 0)

        if abs(pair.margin) not in (0, 1):  # a thinking judge's 1 is a verdict, not a logit
            probability = 1 / (1 + math.exp(-abs(pair.margin)))  # of what the model prefers
            tenth = min(int(10 * probability), 9)
            interval = f"{tenth / 10:.1f} to {tenth / 10 + 0.1:.1f}"
            yield Outcome(f"right where sigmoid(margin) is {interval}", prompt, pair.margin > 0)

    for prediction in predictions:  # verdicts of a judge; 0: none could be read
        for first, second in prediction.get("verdicts", []):
            prompt = prediction["prompt"]
            yield Outcome("judge: better answer shown first", prompt, first > 0)
            yield Outcome("judge: better answer shown second", prompt, second > 0)
            yield Outcome("judge: both orders agree", prompt, first * second > 0)
            yield Outcome("judge: no verdict", prompt, first == 0 or second == 0)


# 5  Figures with bootstrap intervals --------------------------------------------------
def group_accuracies(accuracy_of: dict) -> dict:
    """The metric of data that are no benchmark: a figure for each group."""
    return dict(accuracy_of)


def figures(outcomes, metric=group_accuracies) -> dict:
    """{figure: {"value", "low", "high", "n"}} of outcomes; values in percent.

    metric: {group: accuracy} -> {figure: value}. low and high: the middle 95% of its values over
    bootstrap samples of the prompts. Trap: not of the pairs, since pairs of one prompt tend to be
    right or wrong together. n: number of outcomes in the groups that the figure depends on; if one
    of these has no outcomes, the figure is left out.

    >>> outcomes = [Outcome("math", 7, True), Outcome("math", 7, False), Outcome("code", 8, True)]
    >>> figures(outcomes)["math"]
    {'value': 50.0, 'low': 50.0, 'high': 50.0, 'n': 2}"""
    groups, counts = count_outcomes(outcomes)  # (prompts, groups, 2)
    total = counts.sum(dim=0)  # (groups, 2)
    values = apply_metric(metric, groups, total[None])  # each (1,)
    samples = apply_metric(metric, groups, bootstrap(counts))  # each (samples,)
    # One group after another is emptied: a figure that becomes NaN depends on that group
    without_group = apply_metric(metric, groups, leave_one_out(total))  # each (groups,)

    figure_of_name = {}
    middle = torch.tensor([0.025, 0.975], dtype=torch.float64)
    for name, value in values.items():
        if value.isnan():
            continue
        low, high = samples[name].nanquantile(middle).tolist()
        depends_on = without_group[name].isnan()  # (groups,)
        num_outcomes = int(total[depends_on, 1].sum())
        figure_of_name[name] = {"value": value.item(), "low": low, "high": high,
                                "n": num_outcomes}
    return figure_of_name


def count_outcomes(outcomes) -> tuple[list, torch.Tensor]:
    """The names of the groups, and (prompts, groups, 2): numbers of correct and of all outcomes."""
    prompt_numbers = {}
    group_numbers = {}
    cells = []
    for outcome in outcomes:
        prompt_number = prompt_numbers.setdefault(outcome.prompt, len(prompt_numbers))
        group_number = group_numbers.setdefault(outcome.group, len(group_numbers))
        cells.append((prompt_number, group_number, outcome.correct))

    prompt, group, correct = torch.tensor(cells, dtype=torch.float64).T
    correct_and_all = torch.stack([correct, torch.ones_like(correct)], dim=1)
    counts = torch.zeros(len(prompt_numbers), len(group_numbers), 2, dtype=torch.float64)
    counts.index_put_((prompt.long(), group.long()), correct_and_all, accumulate=True)
    return list(group_numbers), counts


def bootstrap(counts: torch.Tensor) -> torch.Tensor:
    """(prompts, groups, 2) -> (samples, groups, 2): the sums over samples of as many prompts,
    drawn with replacement."""
    num_prompts = len(counts)
    num_samples = 1_000
    if num_prompts < 200:  # of 46 prompts, 1,000 samples would leave 0.9 points of noise
        num_samples = 10_000

    generator = torch.Generator().manual_seed(0)
    sums = []
    for _ in range(20):  # in 20 parts, to bound the memory
        drawn = torch.randint(num_prompts, (num_samples // 20, num_prompts), generator=generator)
        times_drawn = torch.zeros(drawn.shape, dtype=torch.float64)
        times_drawn.scatter_add_(1, drawn, torch.ones_like(times_drawn))
        sums.append(times_drawn @ counts.flatten(1))
    return torch.cat(sums).unflatten(1, counts.shape[1:])


def leave_one_out(total: torch.Tensor) -> torch.Tensor:
    """(groups, 2) -> (groups, groups, 2): the i-th has no outcomes in group i."""
    group = torch.arange(len(total))
    without_group = total.repeat(len(total), 1, 1)
    without_group[group, group] = 0
    return without_group


def apply_metric(metric, groups: list, counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """{figure: (N,) in percent} of counts (N, groups, 2). NaN: a group has no outcomes."""
    correct, total = counts.unbind(dim=2)
    accuracies = (correct / total).T  # (groups, N)
    no_outcomes = torch.full_like(correct[:, 0], math.nan)
    accuracy_of = defaultdict(lambda: no_outcomes, zip(groups, accuracies))
    values = metric(accuracy_of)
    return {name: 100 * value for name, value in values.items()}


def accuracy_figures(predictions: list[dict], benchmark: Benchmark | None) -> dict:
    """The figures of a benchmark; of other data, the accuracies of all pairs and by category."""
    outcomes = list(pair_outcomes(predictions, benchmark))
    if benchmark is None:
        return figures(largest_groups(outcomes, 14))
    if benchmark.whole_ids:
        outcomes += id_outcomes(predictions)
    return figures(outcomes, benchmark.metric)


def largest_groups(outcomes: list[Outcome], most: int) -> list[Outcome]:
    """The outcomes of the largest groups, sorted: a thousand categories make no table."""
    num_outcomes = Counter(outcome.group for outcome in outcomes)
    largest = dict(num_outcomes.most_common(most))
    return sorted(outcome for outcome in outcomes if outcome.group in largest)


# 6  The tables of a folder ------------------------------------------------------------
def summarize(folder: Folder) -> dict:
    """All numbers in the tables. They follow from the predictions alone."""
    good = without_errors(folder.predictions)
    errors = [row["error"] for row in folder.predictions if "error" in row]
    missing = f"the first: {errors[0]}" if errors else "the folder has no more"
    if not good:
        raise ValueError(f"not one of {len(errors)} rows could be scored; {missing}")

    benchmark = folder.benchmark
    expected = len(folder.predictions)
    if benchmark is not None:
        expected = benchmark.num_rows
    num_pairs = 0
    prompts = set()
    for prediction in good:
        num_pairs += len(prediction["pairs"])
        prompts.add(prediction["prompt"])
        if benchmark is not None and prediction["category"] in benchmark.extra_categories:
            expected += 1

    margins = [pair.margin for pair in scored_pairs(good)]
    controls = figures(control_outcomes(good))
    if folder.paradigms == ["direct"]:
        controls |= judge_figures(good)  # --paradigm direct: appendix B
    return {
        "rows": len(good),
        "expected": expected,
        "missing": missing,
        "prompts": len(prompts),
        "pairs": num_pairs,
        "verdicts": len(margins),
        "ties": margins.count(0),
        "figures": accuracy_figures(good, benchmark),
        "beyond": dict(sorted(controls.items()))}


def heading(folder: Folder, summary: dict) -> str:
    """The first line of a report: what was scored, and whether rows are missing."""
    rows = f"{summary['rows']:,} rows"
    if summary["rows"] != summary["expected"]:
        rows = (f"{summary['rows']:,} OF {summary['expected']:,} ROWS "
                f"({summary['missing']:.200})")
    counts = [rows, f"{summary['prompts']:,} prompts", f"{summary['pairs']:,} pairs"]
    if summary["verdicts"] != summary["pairs"]:
        counts.append(f"{summary['verdicts']:,} verdicts")
    counts.append(f"{summary['ties']:,} ties")
    return printable(f"{folder.name} ({folder.benchmark_name}): {', '.join(counts)}")


def figure_cells(figure: dict | None) -> list[str]:
    """Value, interval and n; empty for a figure that was not measured."""
    if figure is None:
        return ["", "", ""]
    interval = f"{figure['low']:.1f} to {figure['high']:.1f}"
    return [f"{figure['value']:.2f}", interval, f"{figure['n']:,}"]


def figure_table(title: str, names, figure_of_name: dict) -> list[list[str]]:
    """A table with a row for each figure."""
    table = [[title, "value", "95% interval", "n"]]
    for name in names:
        table.append([name, *figure_cells(figure_of_name.get(name))])
    return table


def result_table(summary: dict, benchmark: Benchmark | None, model_name: str) -> list[list[str]]:
    """The figures of a folder. Where the paper prints results of other models, a row for each of
    them, and the model's three rows among these, by rising main figure."""
    figure_of_name = summary["figures"]
    if benchmark is None:
        return figure_table(model_name, figure_of_name, figure_of_name)
    names = list(benchmark.metric(defaultdict(float)))
    if not benchmark.published:
        return figure_table(model_name, names, figure_of_name)

    model_rows = [[model_name], ["95% interval"], ["n"]]
    for name in names:
        cells = figure_cells(figure_of_name.get(name))
        for row, cell in zip(model_rows, cells):
            row.append(cell)
    main_figure = figure_of_name.get(benchmark.main_figure, {"value": -1.0})
    blocks = [(main_figure["value"], model_rows)]

    main_column = names.index(benchmark.main_figure)
    for published_name, values in benchmark.published:
        row = [published_name] + [""] * len(names)
        for column, value in enumerate(values, start=1):
            row[column] = value or ""
        blocks.append((float(values[main_column]), [row]))
    blocks.sort(key=lambda block: block[0])

    table = [["model", *names]]
    for _, rows in blocks:
        table.extend(rows)
    return table


def markdown_table(table: list[list[str]]) -> str:
    """Aligned, so that it reads well in a terminal too."""
    rows = []
    for row in table:
        rows.append([markdown_cell(text) for text in row])
    widths = [0] * len(rows[0])
    for row in rows:
        for column, text in enumerate(row):
            widths[column] = max(widths[column], len(text))

    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for text, width in zip(row[1:], widths[1:]):
            cells.append(text.rjust(width))
        lines.append(f"| {' | '.join(cells)} |")
    rule = "|" + "-" * (widths[0] + 2)
    for width in widths[1:]:
        rule += "|" + "-" * (width + 1) + ":"  # the colon aligns a column to the right
    return "\n".join([lines[0], f"{rule}|", *lines[1:]])


def markdown_cell(text: str) -> str:
    """Without line breaks, control characters and bars, which would break the table."""
    return one_line(text[:80]).replace("\\", "\\\\").replace("|", "\\|")


# 7  Results ---------------------------------------------------------------------------
@dataclass
class Report:
    """What table.md and report.html show of a folder."""
    model_name: str
    heading: str
    table: list[list[str]]
    notes: list[str]
    controls: list[list[str]]
    receipt: str


def receipt(device: torch.device) -> dict:
    """What made a result: command, commit, date, hardware and versions."""
    world_size = dist.get_world_size()
    launcher = "python"
    if world_size > 1:
        launcher = f"torchrun --nproc_per_node {world_size}"
    hardware = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    git = subprocess.run("git describe --always --dirty", shell=True,  # git may not be installed
                         cwd=Path(__file__).parent, capture_output=True)
    return {
        "command": f"{launcher} {Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
        "commit": git.stdout.decode().strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "ranks": world_size,
        "hardware": f"{world_size} x {hardware}",
        "torch": torch.__version__,
        "transformers": transformers.__version__}


def run_facts(folder: Folder, cfg: Config, device: torch.device, start_time: float) -> dict:
    """The first line of predictions.jsonl, also a part of summary.json."""
    settings = {
        "benchmark": folder.benchmark_name,
        "model": cfg.model,
        "ensemble": cfg.ensemble,
        "weights": folder.weights,
        "paradigms": folder.paradigms,
        "critiques": cfg.critiques,
        "dtype": dtype_name(cfg, device),
        "seconds": round(time.time() - start_time, 1)}
    return settings | receipt(device)


RECEIPT = "{command}\ncommit {commit} · {date} · {hardware} · {dtype} · {seconds} s"


def write_results(out: Path, folder: Folder, facts: dict, worst: int) -> tuple[dict, str]:
    """Writes the four files of a folder; returns its figures and the text of table.md.

    ValueError if not one row could be scored; the predictions, with the errors, are written."""
    lines = [json.dumps(line) + "\n" for line in (facts, *folder.predictions)]
    write_text(out / "predictions.jsonl", "".join(lines))
    summary = summarize(folder)
    write_text(out / "summary.json", json.dumps(facts | summary, indent=1) + "\n")

    model_name = " + ".join(Path(directory).name for directory in facts["model"])
    benchmark_notes = folder.benchmark.notes if folder.benchmark else []
    report = Report(
        model_name=model_name,
        heading=heading(folder, summary),
        table=result_table(summary, folder.benchmark, model_name),
        notes=benchmark_notes + folder.notes,
        controls=figure_table("measure", summary["beyond"], summary["beyond"]),
        receipt=RECEIPT.format(**facts))
    parts = [report.heading, markdown_table(report.table), *report.notes,
             markdown_table(report.controls), report.receipt]
    text = printable("\n\n".join(parts))
    write_text(out / "table.md", text + "\n")
    write_html_report(out / "report.html", report, folder, worst)  # --worst: appendix C
    return summary["figures"], text


def paper_averages(values: dict) -> dict[str, float]:
    """The paper's averages of {(benchmark, figure): value}: those whose parts were all run."""
    averages = {}
    for name, parts in PAPER_AVERAGES.items():
        if values.keys() >= set(parts):
            averages[name] = sum(values[part] for part in parts) / len(parts)
    return averages


def write_overview(out: Path, folders: list[Folder], figures_of_folder: dict, texts) -> None:
    """table.md and summary.json of several folders, with the paper's averages."""
    values = {}
    for folder in folders:
        for name, figure in figures_of_folder.get(folder.name, {}).items():
            values[folder.benchmark_name, name] = figure["value"]

    averages = paper_averages(values)
    if averages:
        table = [["average as in the paper's Table 6", "value"]]
        for name, value in averages.items():
            table.append([name, f"{value:.1f}"])
        texts = [*texts, markdown_table(table)]
        print_rank0(texts[-1])
    write_text(out / "table.md", "\n\n".join(texts) + "\n")
    overview = {"averages": averages, "folders": figures_of_folder}
    write_text(out / "summary.json", json.dumps(overview, indent=1) + "\n")


# 8  The program -----------------------------------------------------------------------
def print_start(cfg: Config, folders: list[Folder], device: torch.device) -> None:
    print_rank0(f"model   {' + '.join(cfg.model)}, {dtype_name(cfg, device)}")
    for folder in folders:
        print_rank0(f"data    {folder.name}, {len(folder.predictions):,} comparisons")
    print_rank0("")


def main(cfg: Config) -> int:
    cfg = check_settings(cfg)
    device = start_processes()
    if cfg.serve is not None:
        return serve(cfg, device)  # --serve: appendix D

    start_time = time.time()
    folders = open_folders(cfg)
    print_start(cfg, folders, device)

    default_name = "evaluation" if len(cfg.model) == 1 else "evaluation-ensemble"
    out = Path(cfg.out or Path(cfg.model[0], default_name))
    if dist.get_rank() == 0:
        check_writable(out)
    if len(cfg.model) == 1:
        scored_folders = score_with_one_model(folders, cfg, device)
    else:
        scored_folders = score_with_ensemble(folders, cfg, device)  # --model A B: appendix A

    figures_of_folder = {}
    texts = []
    errors = []
    for folder in scored_folders:
        if dist.get_rank() > 0:
            continue
        facts = run_facts(folder, cfg, device, start_time)
        try:
            folder_figures, text = write_results(out / folder.name, folder, facts, cfg.worst)
        except ValueError as error:  # no row of this folder could be scored; go on with the others
            errors.append(str(error))
            continue
        print_rank0(f"{text}\n\nThese tables, the predictions and report.html are in "
                    f"{out / folder.name}\n")
        figures_of_folder[folder.name] = folder_figures
        texts.append(text)
    if len(texts) > 1:
        write_overview(out, folders, figures_of_folder, texts)

    if cfg.on_bad_row == "stop":  # a broken picture is found when it is read, maybe after hours
        for folder in folders:
            for prediction in folder.predictions:
                if "error" in prediction:
                    errors.append(f"{prediction['error']}; the other rows are scored, and the "
                                  "tables say how many are missing")
    if errors and dist.get_rank() == 0:
        raise ValueError(errors[0])
    return 0


# ======================================================================================
# First reading ends here. Below: what flags, other families and other paradigms add.
# ======================================================================================
# A  Ensembles and routing (section 4.7) -----------------------------------------------
def has_vision(directory: str) -> bool:
    """Whether the backbone of a saved reward model takes images."""
    return "vision_config" in json.loads(Path(directory, "config.json").read_bytes())


def members_for(cfg: Config) -> dict[str, list[str]]:
    """{"with images" or "without images": the models that score such prompts}."""
    with_vision = [directory for directory in cfg.model if has_vision(directory)]
    text_only = [directory for directory in cfg.model if not has_vision(directory)]
    if cfg.route and not text_only:
        raise ValueError("--route sends prompts without images to a text-only model, and every "
                         "--model takes images")
    return {
        "with images": with_vision or cfg.model,  # without any, `encode` raises the error
        "without images": text_only if cfg.route else cfg.model}


def score_with_ensemble(folders: list[Folder], cfg: Config, device: torch.device):
    """Yields each folder as soon as the last member has scored it, with the weighted rewards."""
    members = members_for(cfg)
    validation = open_validation(cfg)
    scores_of_folder = defaultdict(dict)  # {folder's name: {member: what score_folder returns}}
    paradigms = []
    for directory in cfg.model:  # each is loaded once, and only one is in memory
        model = load_model(directory, folders, cfg, device)
        paradigms.append(model.paradigm)
        if validation is not None:
            add_validation_rewards(model, directory, validation, members, cfg)

        for folder in folders:
            row_indices = rows_of_member(directory, folder, members)
            passes = score_folder(model, directory, folder, row_indices, cfg)
            scores_of_folder[folder.name][directory] = passes
            if directory == cfg.model[-1]:
                folder.paradigms = paradigms
                set_weights(folder, members, validation, cfg)
                combine_rewards(folder, scores_of_folder.pop(folder.name))
                yield folder
        del model


def rows_of_member(directory: str, folder: Folder, members: dict) -> list[int]:
    """Indices of the rows that a member scores."""
    row_indices = []
    for prediction in without_errors(folder.predictions):
        if directory in members[image_group(prediction)]:
            row_indices.append(prediction["row"] - 1)
    return row_indices


def open_validation(cfg: Config) -> Folder | None:
    """The folder of --validation, if the weights follow from it."""
    if cfg.ensemble == "average":
        return None
    if not cfg.validation:
        raise ValueError(f"--ensemble {cfg.ensemble} takes its weights from held-out pairs: give "
                         "--validation FOLDER")
    return open_folder(cfg.validation, "stop")


def add_validation_rewards(model, directory: str, validation: Folder, members, cfg) -> None:
    """Scores the validation rows, where prediction["rewards"] is {member: K rewards}."""
    row_indices = rows_of_member(directory, validation, members)
    cfg = replace(cfg, control_passes=False)
    passes = score_folder(model, directory, validation, row_indices, cfg)
    for row_index, score in passes["rewards"].items():
        rewards_of_member = validation.predictions[row_index].setdefault("rewards", {})
        rewards_of_member[directory] = score.rewards


def set_weights(folder: Folder, members: dict, validation: Folder | None, cfg: Config) -> None:
    """The weights for prompts with images and for those without, as far as the folder has them."""
    validation_predictions = validation.predictions if validation else []
    groups = {image_group(prediction) for prediction in without_errors(folder.predictions)}
    for group in groups:
        folder.weights[group] = ensemble_weights(cfg.ensemble, members[group],
                                                 validation_predictions)


def ensemble_weights(rule: str, members: list[str], validation_predictions) -> dict[str, float]:
    """{member: weight}, from the pairs of those validation rows that all members could score.

    average     equal weights; the paper's best rule, and it needs no validation rows
    accuracy    proportional to a member's accuracy, the fraction of pairs with margin > 0
    confidence  proportional to a member's mean margin; 0 where that is negative"""
    if len(members) < 2 or rule == "average":
        return {member: 1 / len(members) for member in members}

    margins_of_member = {member: [] for member in members}
    for prediction in validation_predictions:
        rewards_of_member = prediction.get("rewards", {})
        if not rewards_of_member.keys() >= set(members):
            continue
        for member, margins in margins_of_member.items():
            rewards = rewards_of_member[member]
            for winner, loser in prediction["pairs"]:
                margins.append(rewards[winner] - rewards[loser])

    margins = torch.tensor(list(margins_of_member.values()))  # (members, B)
    if rule == "accuracy":
        strengths = (margins > 0).float().mean(dim=1)
    else:
        strengths = margins.mean(dim=1).clamp(min=0)
    if not strengths.sum() > 0:  # NaN without pairs
        raise ValueError("--validation gives no member a weight: none is better than chance, or "
                         "there is no pair that each can read (a text-only one wants rows without "
                         "images)")
    weights = (strengths / strengths.sum()).tolist()
    return dict(zip(members, weights))


def combine_rewards(folder: Folder, scores_of_member: dict) -> None:
    """Puts the weighted sums of the members' rewards into the predictions, and the members' own
    rewards beside them."""
    for prediction in without_errors(folder.predictions):
        row_index = prediction["row"] - 1
        weights = folder.weights[image_group(prediction)]
        for condition in IMAGE_CONDITIONS:
            rewards_of_member = {}
            for member, passes in scores_of_member.items():
                if row_index in passes.get(condition, {}):
                    rewards_of_member[member] = passes[condition][row_index].rewards
            if rewards_of_member:
                prediction[condition] = weighted_sum(rewards_of_member, weights)
            if condition == "rewards" and len(rewards_of_member) > 1:
                prediction["members"] = rewards_of_member

        for member, passes in scores_of_member.items():
            score = passes["rewards"].get(row_index)
            if score is not None and score.texts and not score.verdicts:  # a critic's critiques
                prediction.setdefault("critiques", {})[member] = score.texts


def weighted_sum(rewards_of_member: dict, weights: dict[str, float]) -> list[float]:
    """K sums of {member: K rewards}."""
    sums = []
    for rewards_of_response in zip(*rewards_of_member.values()):
        total = 0.0
        for member, reward in zip(rewards_of_member, rewards_of_response):
            total += weights[member] * reward
        sums.append(total)
    return sums


# B  Critics and judges ----------------------------------------------------------------
JUDGE_NOTE = (
    "A judge: every pair was asked in both orders, each verdict counts by itself, and n counts "
    "verdicts; a thought without a verdict is wrong. Figures about images compare each response's "
    "preferences, summed over its pairs and orders.")
PARADIGM_NOTES = {
    "critic": "Scored after the critic's {critiques} critiques. What it loses between --critiques "
              "given and own is the known weakness of its paradigm: it learned to read critiques "
              "that are better than those it writes.",
    "direct": JUDGE_NOTE,
    "think": JUDGE_NOTE}


def set_up_critic_or_judge(model: RewardModel, folders: list[Folder], cfg: Config) -> None:
    """Whose critiques a critic reads, and how long the texts are that the model writes. Adds a note
    to the tables, but not to those of an ensemble, where a judge's preferences are rewards."""
    model.critiques_from = cfg.critiques
    if cfg.critique_tokens:
        model.critique_tokens = cfg.critique_tokens
    for folder in folders:
        if cfg.critiques == "given" and not has_critiques(folder):
            raise ValueError(f"--critiques given: {folder.name} has no critiques to read")
        if len(cfg.model) == 1:
            note = PARADIGM_NOTES[model.paradigm]
            folder.notes.append(note.format(critiques=cfg.critiques))


def has_critiques(folder: Folder) -> bool:
    """Whether one of the first 1,000 rows that can be read has critiques."""
    for prediction in without_errors(folder.predictions)[:1000]:
        if folder.rows[prediction["row"] - 1].critiques:
            return True
    return False


def pair_probability(verdicts: list[float]) -> float:
    """The probability of a direct judge that the better response of a pair is the better one: the
    mean of both orders. verdicts: the margin in each order, a logit.

    >>> three_to_one = math.log(3)  # sigmoid(log 3) = 3/4
    >>> round(pair_probability([three_to_one, 0.0]), 6)  # the mean of 3/4 and 1/2
    0.625
    """
    total = 0.0
    for margin in verdicts:
        total += (1 + math.tanh(margin / 2)) / 2  # sigmoid(margin), without overflow
    return total / len(verdicts)


def judge_figures(predictions: list[dict]) -> dict:
    """How large a direct judge's probability of the better response is, how often it is above 1/2,
    and its expected calibration error, as `figures` has them.

    ECE = sum over bins m of |B_m| / n |accuracy(B_m) - confidence(B_m)|, with ten bins of equal
    width (Guo et al. 2017, arXiv 1706.04599, equation 3). The confidence in a pair is the
    probability of the response that the judge prefers; 1/2 counts as wrong. Trap: with few pairs it
    is above 0 for a calibrated judge too, and its bootstrap interval lies too high.

    Of four pairs with a confidence of 3/4, three are right:

    >>> right, wrong = [math.log(3)] * 2, [-math.log(3)] * 2
    >>> calibrated = judge_figures([{"prompt": 0, "verdicts": [right, right, right, wrong]}])
    >>> round(calibrated["judge: expected calibration error"]["value"], 6)
    0.0
    """
    outcomes = []
    gaps = []  # correct - confidence; the group is the bin
    for prediction in predictions:
        prompt = prediction["prompt"]
        for verdicts in prediction["verdicts"]:
            probability = pair_probability(verdicts)
            confidence = max(probability, 1 - probability)
            correct = probability > 0.5
            outcomes.append(Outcome("judge: mean probability above 1/2", prompt, correct))
            outcomes.append(Outcome("judge: mean probability", prompt, probability))
            gaps.append(Outcome(min(int(10 * confidence), 9), prompt, correct - confidence))

    _, counts = count_outcomes(gaps)  # (prompts, bins, 2)
    middle = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = calibration_error(bootstrap(counts)).quantile(middle).tolist()
    figure_of_name = figures(outcomes)
    figure_of_name["judge: expected calibration error"] = {
        "value": calibration_error(counts.sum(dim=0)).item(),
        "low": low, "high": high, "n": len(gaps)}
    return figure_of_name


def calibration_error(counts: torch.Tensor) -> torch.Tensor:
    """(..., bins, 2): sums of correct - confidence, and numbers of pairs -> (...) in percent."""
    gaps, num_pairs = counts.unbind(dim=-1)  # (..., bins)
    return 100 * gaps.abs().sum(dim=-1) / num_pairs.sum(dim=-1)


# C  The HTML page ---------------------------------------------------------------------
PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""
<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>
:root { color-scheme: light dark; --line: 1px solid #8886 }
[hidden] { display: none !important }
body { font: 15px/1.5 system-ui, sans-serif; margin: auto; padding: 1rem; max-width: 1200px;
       overflow-wrap: anywhere }
h1 { font-size: 1.4em }
img, svg { max-width: 100%; height: auto }
table { border-collapse: collapse; display: block; overflow-x: auto; white-space: nowrap;
        font-size: .87em }
td { padding: .3em .6em; border-bottom: var(--line); text-align: right }
td:first-child { text-align: left }
tr:first-child, .bold { font-weight: bold; background: #8882 }
.soft { opacity: .75; font-size: .87em }
select { font: inherit; padding: .2em }
article { display: flex; flex-wrap: wrap; align-items: start; gap: 1em; padding: 1em;
          margin: 1em 0; border: var(--line) }
article img { width: 15em }
article div { flex: 1 1 20em; min-width: 0 }
.answers { display: grid; gap: 1em;
           grid-template-columns: repeat(auto-fit, minmax(min(26em, 100%), 1fr)) }
.answers > div { border-top: 3px solid #8886 }
.answers > .chosen { border-color: #2b9a5f }
.answers > .rejected { border-color: #dc4448 }
.text { white-space: pre-wrap; max-height: 20em; overflow-y: auto }
</style><h1>{{ title }}</h1>
{% for section in sections %}
{% if section.heading %}<h2>{{ section.heading }}</h2>{% endif %}
{% for line in section.text %}<p class="soft">{{ line }}</p>{% endfor %}
<table>{% for row in section.table %}<tr{% if row[0] == section.bold %} class="bold"{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{{ section.html }}
{% set groups = section.cards | groupby("category", case_sensitive=true) %}
{% if groups | length > 1 %}
<select aria-label="category" onchange="for (const card of document.querySelectorAll('article'))
card.hidden = value && card.dataset.category != value">
{% for name, cards in [("", section.cards)] + groups %}
<option value="{{ name }}">{{ name or "all" }} {{ cards | length }}</option>
{% endfor %}</select>{% endif %}
{% for card in section.cards %}<article data-category="{{ card.category }}">
{% for uri in card.pictures %}<img alt="" src="{{ uri }}">{% endfor %}
<div><b>{{ card.facts | join(" · ") }}</b><div class="text">{{ card.text }}</div>
<div class="answers">
{% for answer in card.answers %}<div class="{{ answer.name }}">
<div class="soft">{{ answer.facts | join(" · ") }}</div>
<div class="text">{{ answer.text }}</div></div>{% endfor %}</div></div></article>{% endfor %}
{% endfor %}</html>
""")


def html_page(title: str, sections: list[dict]) -> str:
    """An HTML page that loads nothing from the network and runs nothing of what it shows: all but
    Markup is escaped.

    Keys of a section, each optional, in the order in which they are shown: heading; text, a list
    of paragraphs; table, rows of strings; bold, the first cell of a row to stress; html, Markup;
    cards, with a filter by category: {category, pictures (data URIs), facts, text, answers:
    [{name (chosen is green, rejected red), facts, text}]}."""
    page = PAGE.render(title=title, sections=sections)
    return page.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written


def thumbnails(source) -> list[str]:
    """Data URIs of JPEGs of at most 448 pixels: one of a picture, four of a video's frames, none
    if the file has vanished."""
    uris = []
    with contextlib.suppress(ValueError):
        for image in open_frames(source, 4):
            image.thumbnail((448, 448))
            file = io.BytesIO()
            image.save(file, "JPEG", quality=82)
            encoded = base64.b64encode(file.getvalue()).decode()
            uris.append(f"data:image/jpeg;base64,{encoded}")
    return uris


def write_html_report(file: Path, report: Report, folder: Folder, worst: int) -> None:
    """The tables, and cards of the pairs with the most negative margins."""
    pairs = list(scored_pairs(without_errors(folder.predictions)))
    mistakes = []
    for pair in pairs:
        if pair.margin <= 0:
            mistakes.append((pair.margin, pair.prediction["row"], pair.winner, pair.loser))
    mistakes.sort()
    cards = [mistake_card(folder, *mistake) for mistake in mistakes[:worst]]
    count = (f"{len(cards)} of the {len(mistakes):,} wrong of {len(pairs):,}; "
             "margin: chosen minus rejected")
    sections = [
        {"text": [*report.notes, report.receipt], "table": report.table,
         "bold": report.model_name},
        {"heading": "Does it use the images, does it prefer length, is it calibrated",
         "table": report.controls},
        {"heading": "The worst mistakes first", "text": [count], "cards": cards}]
    write_text(file, html_page(f"{report.model_name} on {report.heading}", sections))


def mistake_card(folder: Folder, margin: float, row: int, winner: int, loser: int) -> dict:
    """A card of html_page that shows a pair."""
    prediction = folder.predictions[row - 1]
    comparison = folder.rows[row - 1]
    pictures = []
    for image in comparison.images:
        pictures += thumbnails(image)
    messages = []
    for message in to_messages(comparison.prompt, comparison.images):
        messages.append(f"{message['role']}: {message['content']}")

    answers = []
    for name, response in (("chosen", winner), ("rejected", loser)):
        texts = [comparison.responses[response]]
        texts += written_texts(prediction, winner, loser, response)
        reward = f"reward {prediction['rewards'][response]:.3f}"
        answers.append({"name": name, "facts": [name, reward], "text": "\n\n".join(texts)})
    category = prediction["category"]
    facts = [f"margin {margin:.3f}", category, prediction["id"], f"row {row}"]
    if folder.paradigms == ["direct"]:
        pair_index = prediction["pairs"].index([winner, loser])
        probability = pair_probability(prediction["verdicts"][pair_index])
        facts.insert(1, f"probability {probability:.3f}")
    return {
        "category": category or "no category",
        "pictures": pictures,
        "facts": facts,
        "text": "\n\n".join(messages),
        "answers": answers}


def written_texts(prediction: dict, winner: int, loser: int, response: int) -> list[str]:
    """What critics wrote about a response of this pair; what a judge thought of the pair when that
    response was shown first."""
    texts = []
    for critiques in prediction.get("critiques", {}).values():
        if "verdicts" not in prediction:
            texts.append(f"critique: {critiques[response]}")
            continue
        thought = 2 * prediction["pairs"].index([winner, loser])  # two a pair
        if response == loser:
            thought += 1
        texts.append(f"judge, shown this first: {critiques[thought]}")
    return texts


# D  A reward over HTTP ----------------------------------------------------------------
# POST /score       {"prompt", "responses", "images"}, or a list of such
#                   -> {"rewards": K numbers}, or a list of such
# POST /get_reward  {"query", "prompts", "labels"}: what OpenRLHF's --reward.remote_url sends; also
#                   "images", a list for each query
#                   -> {"rewards": a number for each query}
# POST /classify    {"input": a text or texts, "use_activation": false}: what verl sends to vLLM;
#                   or {"messages"}, a chat whose last message is the response
#                   -> {"data": [{"index", "label", "probs": [reward], "num_classes"}]}
# Errors            -> {"error": one line}: 400 a wrong request, 404 another path, 413 too large,
#                   500 the model failed (the reason is on standard error)
#
# Images are base64 or data URIs, also in typed parts of messages. Trap: `open_image` takes a text
# for a path of this machine, so `decode_image` turns every one of them into bytes.
#
# Each client has a thread, which reads its request, puts the comparisons into a queue and waits.
# The main thread alone uses the model: it takes all comparisons that wait and scores them together.
# Tokenizing and resizing are done there too: PyTorch in many threads would compete for the cores.
MAX_BODY_BYTES = 64 << 20
MAX_CHARACTERS = 1_000_000  # in the texts of a request
MAX_TOKENS = 1 << 17  # of a comparison, all its responses together: it is one pack
MAX_ITEMS = 1024  # responses and images of a request; for a judge pairs in both orders
LARGE_BODY_BYTES = 1 << 20
MAX_LARGE_BODIES = 8  # in memory at a time; parsed, a body takes up to 30 times its bytes
MAX_COMPARISONS = 64  # encoded at a time, as in `score_many`
CLIENT_TIMEOUT = 60  # seconds in which a client has to send or receive something


class TooLarge(ValueError):
    """The request is answered with status 413."""


class ModelError(RuntimeError):
    """The request was right and the model failed: status 500."""


@dataclass
class Job:
    """A comparison that waits to be scored."""
    comparison: Comparison
    rewards: Future = field(default_factory=Future)  # K rewards, or the error


def serve(cfg: Config, device: torch.device) -> int:
    """Answers requests until Ctrl-C or SIGTERM. Returns the exit status, 128 + the signal."""
    if dist.get_world_size() > 1:
        raise ValueError("--serve runs in one process: start it with python, not with torchrun; "
                         "for more GPUs, one at each port")
    if cfg.data or len(cfg.model) > 1:
        raise ValueError("--serve scores what clients send, with one model: give one --model and "
                         "no --data")
    if cfg.critiques == "given":
        raise ValueError("--critiques given: clients send no critiques; want --critiques own")
    if not 0 <= cfg.serve < 1 << 16:
        raise ValueError(f"--serve {cfg.serve}: want a port from 0 to 65535")
    try:
        server = RewardServer((cfg.host, cfg.serve), RequestHandler)
    except OSError as error:
        raise ValueError(f"--serve {cfg.serve} --host {cfg.host}: {error}; take another port or "
                         "address") from None

    with server, stop_signals() as stop_signal:
        model = load_model(cfg.model[0], [], cfg, device)
        server.is_judge = model.head is None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = server.server_address[:2]
        print(f"{cfg.model[0]} answers at http://{host}:{port}: POST {', '.join(ENDPOINTS)}; "
              "Ctrl-C ends it", flush=True)
        while not stop_signal.number:
            score_jobs(model, server.take_jobs(), cfg.pack_tokens or None)

        server.shutdown()  # no further connections
        while server.open_requests:
            score_jobs(model, server.take_jobs(), cfg.pack_tokens or None)
    return stop_signal.exit_status


def score_jobs(model: RewardModel, jobs: list[Job], pack_tokens: int | None) -> None:
    """Scores comparisons together. Each gets its rewards or its own error: ValueError if it cannot
    be encoded. Where they fail together, each is scored alone, so that one that does not fit into
    the memory fails alone."""
    encoded_jobs = []
    requests = []
    for job in jobs:
        try:
            request = model.encode_for_scoring(job.comparison)
            check_length(model, request)
        except ValueError as error:
            job.rewards.set_exception(error)
            continue
        except Exception as error:
            job.rewards.set_exception(ModelError(describe_error(error)))
            continue
        encoded_jobs.append(job)
        requests.append(request)
    if not requests:
        return

    try:
        scores = model.score_encoded(requests, pack_tokens)
    except Exception as error:  # whatever it is, the server goes on
        if len(encoded_jobs) == 1:
            encoded_jobs[0].rewards.set_exception(ModelError(describe_error(error)))
        else:
            for job in encoded_jobs:
                score_jobs(model, [job], pack_tokens)
        return

    for job, score in zip(encoded_jobs, scores):
        if all(map(math.isfinite, score.rewards)):
            job.rewards.set_result(score.rewards)
        else:
            job.rewards.set_exception(ModelError(f"its rewards are {str(score.rewards):.80}"))


def check_length(model: RewardModel, request) -> None:
    """ValueError if a sequence is longer than the backbone's positions reach."""
    most = model.backbone.config.get_text_config().max_position_embeddings
    for encoded in request.encoded:
        lengths = [len(ids) for ids in encoded.response_ids]
        num_tokens = len(encoded.prompt_ids) + max(lengths)
        if num_tokens > most:
            raise ValueError(f"prompt and response have {num_tokens:,} tokens, and the model reads "
                             f"at most {most:,}")
    total = sum(encoded.num_tokens for encoded in request.encoded)
    if total > MAX_TOKENS:
        raise TooLarge(f"a comparison of {total:,} tokens: at most {MAX_TOKENS:,} are read")


def describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


class RewardServer(ThreadingHTTPServer):
    request_queue_size = 128  # clients that connect at once; with 5 others wait for a second

    def __init__(self, address, handler_class):
        super().__init__(address, handler_class)
        self.jobs = queue.SimpleQueue()
        self.large_bodies = threading.BoundedSemaphore(MAX_LARGE_BODIES)
        self.is_judge = False  # it reads every pair of responses twice
        self.open_requests = set()  # handlers that have read a request and not answered it yet

    def score(self, comparisons: list[Comparison]) -> list[list[float]]:
        """Waits, in a client's thread, for the rewards. Raises the first comparison's error."""
        check_request_size(comparisons, self.is_judge)
        jobs = [Job(comparison) for comparison in comparisons]
        for job in jobs:
            self.jobs.put(job)
        return [job.rewards.result() for job in jobs]

    def take_jobs(self) -> list[Job]:
        """All that wait, at most MAX_COMPARISONS. Waits for the first a fifth of a second."""
        jobs = []
        try:
            jobs.append(self.jobs.get(timeout=0.2))
            while len(jobs) < MAX_COMPARISONS:
                jobs.append(self.jobs.get_nowait())
        except queue.Empty:
            pass
        return jobs

    def handle_error(self, request, client_address) -> None:
        """Called in an `except` block; socketserver's own prints a traceback."""
        error = sys.exception()
        if not isinstance(error, OSError):  # an OSError: the client has gone
            print_error("evaluate.py", f"a client's request: {describe_error(error)}")


class RequestHandler(BaseHTTPRequestHandler):
    """Answers one request, in a thread of its own. HTTP/1.0: a connection ends with its answer."""
    timeout = CLIENT_TIMEOUT
    unread_bytes = MAX_BODY_BYTES  # of the body; its length is not known yet

    def do_POST(self) -> None:
        try:
            self.unread_bytes = content_length(self.headers)
            if self.path not in ENDPOINTS:
                self.refuse(404, f"no {self.path:.80}: POST {', '.join(ENDPOINTS)}")
                return
            is_large = self.unread_bytes > LARGE_BODY_BYTES
            with self.server.large_bodies if is_large else contextlib.nullcontext():
                body = self.read_body()
                self.server.open_requests.add(self)
                answer = ENDPOINTS[self.path]
                self.send_json(200, answer(body, self.server))
        except TooLarge as error:
            self.refuse(413, str(error))
        except (ValueError, RecursionError) as error:  # RecursionError: of nested JSON
            self.refuse(400, one_line(error))
        except OSError:
            pass  # the client has gone
        except Exception as error:
            print_error("evaluate.py", f"a request failed: {describe_error(error)}")
            self.refuse(500, "the model failed; the reason is on the server's standard error")
        finally:
            self.server.open_requests.discard(self)

    def do_GET(self) -> None:
        self.send_json(404, {"error": f"nothing to GET: POST {', '.join(ENDPOINTS)}"})

    def read_body(self):
        """The JSON of the body. ConnectionError if the client hangs up before its end."""
        num_bytes = self.unread_bytes
        if num_bytes > MAX_BODY_BYTES:
            raise TooLarge(f"a body of {num_bytes:,} bytes: at most {MAX_BODY_BYTES:,} are read")
        data = self.rfile.read(num_bytes)
        if len(data) < num_bytes:
            raise ConnectionError("the client has gone")
        self.unread_bytes = 0
        return json.loads(data)

    def refuse(self, status: int, message: str) -> None:
        """Sends an error. Trap: closing a socket with unread bytes resets the connection, and a
        client that is still sending does not get the answer. So they are read, up to a bound."""
        self.send_json(status, {"error": message})
        self.connection.settimeout(5)
        num_bytes = min(self.unread_bytes, 2 * MAX_BODY_BYTES)
        while num_bytes > 0:
            data = self.rfile.read1(min(num_bytes, 1 << 16))
            if not data:
                break
            num_bytes -= len(data)

    def send_json(self, status: int, reply) -> None:
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        """No line for each request."""


def content_length(headers) -> int:
    length = headers.get("Content-Length", "")
    if not length.isdecimal():
        raise ValueError("no Content-Length: want a body of JSON and the number of its bytes")
    return int(length)


def check_request_size(comparisons: list[Comparison], is_judge: bool) -> None:
    """TooLarge if a request would keep the others waiting for minutes."""
    num_items = 0
    num_characters = 0
    for comparison in comparisons:
        num_responses = len(comparison.responses)
        num_items += num_responses + len(comparison.images)
        if is_judge:
            num_items += num_responses * (num_responses - 1)
        for message in comparison.prompt:
            num_characters += len(message["content"])
        for response in comparison.responses:
            num_characters += len(response)
    if num_items > MAX_ITEMS:
        raise TooLarge(f"{num_items:,} responses and images in a request, at most {MAX_ITEMS:,}")
    if num_characters > MAX_CHARACTERS:
        raise TooLarge(f"texts of {num_characters:,} characters in a request, at most "
                       f"{MAX_CHARACTERS:,}")


def answer_score(body, server: RewardServer):
    """POST /score: our own, the only one that reads a prompt once for K responses."""
    items = body if isinstance(body, list) else [body]
    comparisons = []
    for item in items:
        prompt, responses, images = read_fields(item, "prompt", "responses", optional="images")
        unknown = sorted(item.keys() - {"prompt", "responses", "images"})
        if unknown:
            raise ValueError(f"unknown keys {str(unknown):.80}; want prompt, responses, images")
        comparisons.append(read_comparison(prompt, responses, images))

    replies = [{"rewards": rewards} for rewards in server.score(comparisons)]
    return replies if isinstance(body, list) else replies[0]


def answer_get_reward(body, server: RewardServer) -> dict:
    """POST /get_reward: OpenRLHF. With several servers it sends one of them the sample and the
    others empty lists. The labels are not read."""
    queries, prompts, images = read_fields(body, "query", "prompts", optional="images")
    if images is None and isinstance(queries, list):
        images = [None] * len(queries)
    for values in (queries, prompts, images):
        if not isinstance(values, list) or len(values) != len(queries):
            raise ValueError("query, prompts and images: want lists of one length")

    comparisons = []
    for query, prompt, images_of_query in zip(queries, prompts, images):
        messages, response = split_query(query, prompt)
        comparisons.append(read_comparison(messages, [response], images_of_query))
    return {"rewards": [rewards[0] for rewards in server.score(comparisons)]}


def answer_classify(body, server: RewardServer) -> dict:
    """POST /classify: vLLM's, as verl calls it; the reward is data[-1].probs[-1].

    Trap: vLLM puts a sigmoid over the reward unless `use_activation` is false. Here there never is
    one, and true is refused."""
    texts, messages, activation, name = read_fields(
        body, optional=("input", "messages", "use_activation", "model"))
    if activation:
        raise ValueError("use_activation: a reward is not bounded, want false")

    comparisons = []
    if messages is not None:
        chats = [messages]
    else:
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list):
            raise ValueError("want input, a text or a list of texts, or messages")
        chats = [parse_chat(text) for text in texts]
    for chat in chats:
        prompt, response = split_chat(chat)
        comparisons.append(read_comparison(prompt, [response]))

    results = []
    for index, rewards in enumerate(server.score(comparisons)):
        results.append({"index": index, "label": None, "probs": rewards, "num_classes": 1})
    return {"object": "list", "model": name, "data": results}


ENDPOINTS = {"/score": answer_score, "/get_reward": answer_get_reward,
             "/classify": answer_classify}


def read_fields(body, *required: str, optional=()) -> list:
    """The values of a JSON object's fields; None for an optional one that is absent."""
    optional = [optional] if isinstance(optional, str) else optional
    if not isinstance(body, dict):
        raise ValueError(f"found a {type(body).__name__}, want an object with "
                         f"{', '.join([*required, *optional])}")
    for name in required:
        if name not in body:
            raise ValueError(f"no {name}: found {str(sorted(body)):.80}")
    return [body.get(name) for name in (*required, *optional)]


def read_comparison(prompt, responses, images=None) -> Comparison:
    """A comparison whose images are bytes. They stand in `images`, or in the prompt's messages."""
    if not isinstance(responses, list) or not responses:
        raise ValueError("responses: want a list of one text or more")
    for response in responses:
        check_text(response, "a response")
    if not isinstance(images or [], list):
        raise ValueError("images: want a list of images in base64 or data URIs")

    sources = list(images or [])
    sources_in_messages = image_sources(prompt)
    if sources and sources_in_messages:
        raise ValueError("images both in the messages and in `images`: want one of them")
    decoded = [decode_image(source) for source in sources or sources_in_messages]
    return Comparison(to_messages(prompt, decoded), responses, images=decoded)


def image_sources(messages) -> list:
    """What the typed parts of messages hold as images. None of it is opened here."""
    sources = []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for typed_part in content if isinstance(content, list) else []:
            if not isinstance(typed_part, dict):
                continue
            for key in ("image", "image_url", "video", "url", "path"):
                source = typed_part.get(key)
                if isinstance(source, dict):  # {"image_url": {"url": "data:..."}}
                    source = source.get("url")
                if source is not None:
                    sources.append(source)
    return sources


def decode_image(source) -> bytes:
    """The file in a base64 text or a data URI. ValueError for all else: paths, addresses, lists.

    >>> decode_image("data:image/png;base64,iVBO")
    b'\\x89PN'
    """
    if not isinstance(source, str):
        raise ValueError(f"an image is a {type(source).__name__}, want base64 or a data URI")
    text = source
    if source.startswith("data:"):
        text = source.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise ValueError(f"an image is neither base64 nor a data URI: {source[:40]!r}; paths and "
                         "addresses are not read") from None


# Texts to which a chat template was applied. The model's own `encode` applies one to messages and
# escapes special tokens in them, so the template is undone: the reward is that of `score`, and a
# response cannot end its turn. This works for ChatML, the template of Qwen and InternVL. A text
# without special tokens is a prompt without a template.
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
IMAGE_TOKENS = re.compile(r"<\|vision_start\|>(?:<\|(?:image|video)_pad\|>)+<\|vision_end\|>"
                          r"|<img>(?:<IMG_CONTEXT>)+</img>")


def split_query(query, prompt) -> tuple[list | str, str]:
    r"""The messages and the response of OpenRLHF's texts.

    query: prompt and response, decoded with special tokens. A prompt that was too long is cut at
    its start; then the response is the query's last turn.

    >>> prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    >>> split_query(prompt + "Hello<|im_end|>", prompt)
    ([{'role': 'user', 'content': 'Hi'}], 'Hello')
    """
    check_text(query, "a query")
    check_text(prompt, "a prompt")
    query = IMAGE_TOKENS.sub("<image>", query)
    prompt = IMAGE_TOKENS.sub("<image>", prompt)
    if not query.startswith(prompt):
        return split_chat(parse_chat(query))

    response = remove_end(query.removeprefix(prompt))
    if TURN_START not in prompt:
        special_token = re.search(r"<\|\w+\|>", prompt)
        if special_token:
            raise ValueError(f"the prompt holds {special_token[0]} and is no ChatML: POST /score "
                             "takes messages")
        return prompt, response
    messages = parse_chat(prompt)
    if messages[-1]["role"] == "assistant":  # where the response begins
        messages.pop()
    return messages, response


def parse_chat(text) -> list[dict]:
    """The messages of a text in ChatML. Trap: a text that holds "<|im_start|>" looks like a turn;
    who does not trust the responses sends messages."""
    check_text(text, "input")
    text = IMAGE_TOKENS.sub("<image>", text)
    messages = []
    for turn in text.split(TURN_START)[1:]:
        role, _, content = turn.partition("\n")
        content = remove_end(content.partition(TURN_END)[0])
        messages.append({"role": role, "content": content})
    return messages


def split_chat(messages) -> tuple[list, str]:
    """The prompt and the response of a chat whose last message is the response."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise ValueError("the last message is not the assistant's: want a chat (as a text in "
                         "ChatML) that ends with the response")
    if image_sources([last]):
        raise ValueError("the response holds an image, which is not read here")
    content = last.get("content")
    if isinstance(content, list):
        content = "".join([message_text(typed_part) for typed_part in content])
    check_text(content, "the response")
    return messages[:-1], content


def remove_end(response: str) -> str:
    """Without the end of the turn, padding, and the empty thought of Qwen3's template."""
    # no regular expression: with a repeated group it takes minutes for a megabyte of such tokens
    text = response.rstrip()
    while text.endswith(("<|im_end|>", "<|endoftext|>")):
        text = text[:text.rindex("<|")].rstrip()
        response = text
    return re.sub(r"^<think>\s*</think>\s*", "", response)


if __name__ == "__main__":
    command_line(main, Config, "evaluate.py")
