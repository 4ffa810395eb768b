"""Scores reward models as the papers do, and shows where they fail (BaseReward, arXiv 2509.16127, section 5).

Read: to the double line, 10 minutes: what each benchmark counts, what to look at beside accuracy; then `figures`.

    python evaluate.py --model runs/default                       800 drawn comparisons, new to the model: 20 seconds
    python evaluate.py --model DIR --data bench/vl-rewardbench bench/rm-bench     benchmarks, as data.py makes them
    python evaluate.py --model DIR --data FOLDER                  your own comparisons: accuracy by category
    python evaluate.py --model A B --ensemble accuracy --validation FOLDER --data ...      two as one (section 4.7)
    torchrun --nproc_per_node 8 evaluate.py ...                   the same result, whatever the number of ranks

OUT/<folder's name> (OUT: --out, or evaluation/ in the first model's folder) gets predictions.jsonl (every reward;
`metrics` makes the figures of its rows), summary.json, table.md and report.html (the worst mistakes, with pictures);
OUT itself, if there are several folders, table.md and summary.json with the paper's averages. Not in the paper:
intervals, controls, the official grouping of VL-RewardBench. Which printed rows compare: see NOTES.
"""
import base64
import contextlib
import io
import json
import math
import shlex
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jinja2
import safetensors
import torch
import transformers
from torch import distributed as dist
from transformers.hf_argparser import HfArg

from data import (BENCHMARKS, BadRow, place, read_comparisons, remove_images, shuffle_images, synthetic, use_row,
                  write_comparisons)
from model import RewardModel, Score, margins_of, one_line, open_frames, printable, to_messages
from train import check_numbers, command_line, say, score_over_ranks, start_processes, write_text

ALL = "accuracy"  # the group of every pair
KEYS = {"rewards": "images as they are", "removed": "images removed", "shuffled": "images shuffled"}

def margins(rows):
    """(row, winner, loser, margin) of every pair of prediction rows. Right is margin > 0; officially a tie is wrong.
    A judge was asked twice, with the winner as answer 1 and as answer 2: each of its verdicts counts by itself."""
    for row in rows:
        score = Score(row["rewards"], row.get("verdicts", []))
        for (winner, loser), said in zip(row["pairs"], margins_of(row["pairs"], score)):
            for margin in said:
                yield row, winner, loser, margin

def pair_events(rows, benchmark: str = ""):
    """Events (group, prompt, hit): every pair in each group that it counts in. Figures are made of shares of hits."""
    for row, winner, loser, margin in margins(rows):
        group, wider = row["category"] or "no category", [ALL]
        if group == ALL:
            group = "accuracy (a category)"
        if benchmark == "vl-rewardbench":  # the paper's script has the case of two names wrong: they fall to general
            wider.append(f"{'general' if row['id'].startswith(('RLAIF', 'RLHF')) else group}, paper")
        if benchmark == "multimodal-rewardbench" and group.startswith("safety/"):
            wider = ["safety", ALL]
        if benchmark == "rm-bench":  # responses 0 1 2 are chosen, 3 4 5 rejected: concise, plain, markdown
            group = group, "easy" if winner > loser - 3 else "hard" if winner < loser - 3 else "normal"
        for name in (group, *wider):
            yield name, row["prompt"], margin > 0

def whole_ids(rows):
    """Events of MM-RLHF-RewardBench's Acc+: one for each id, a hit when all its pairs are right, in both orders."""
    by_id = defaultdict(list)
    for row, _, _, margin in margins(rows):
        by_id[row["id"]].append((row, margin > 0))
    for pairs in by_id.values():
        for name in (pairs[0][0]["category"] + "+", "Acc+"):
            yield name, pairs[0][0]["prompt"], all(hit for _, hit in pairs)

# A benchmark is a function: {figure: value} from {group: share of hits}. Two more stand below the line.
def vl_rewardbench(share) -> dict:
    """Overall counts every pair alike, macro every group; and both as the paper groups.

    >>> vl_rewardbench(defaultdict(float, {"general": 1, "hallucination": 0.5, "reasoning": 0, ALL: 0.8}))["macro"]
    0.5"""
    groups = {name: share[name] for name in ("general", "hallucination", "reasoning")}
    paper = {f"{name}, paper": share[f"{name}, paper"] for name in groups}
    groups |= {"overall": share[ALL], "macro": sum(groups.values()) / 3}
    return groups | paper | {"macro, paper": sum(paper.values()) / 3}

def mm_rlhf_rewardbench(share) -> dict:
    """Acc is the share of pairs, Acc+ that of ids with all their pairs right.

    >>> row = {"id": "a", "category": "mcq", "prompt": 0, "pairs": [(0, 1), (0, 2)], "rewards": [2.0, 1.0, 3.0]}
    >>> list(whole_ids([row]))  # one of its two pairs is right: 1 of 2 for Acc, 0 of 1 for Acc+
    [('mcq+', 0, False), ('Acc+', 0, False)]"""
    names = ("mcq", "long", "short", "safety", "video")
    whole = {f"{name}+": share[f"{name}+"] for name in names}
    return {name: share[name] for name in names} | {"Acc": share[ALL], "Acc+": share["Acc+"]} | whole

def rm_bench(share) -> dict:
    """A matrix of 3 chosen by 3 rejected styles: easy below the diagonal, where the better one is fancier, hard above.

    >>> levels = {"easy": 1, "normal": 0.5, "hard": 0}
    >>> rm_bench({(d, level): levels[level] for d in DOMAINS for level in levels})["overall"]
    0.5"""
    levels = ("easy", "normal", "hard")
    domains = {d: sum(share[d, level] for level in levels) / 3 for d in DOMAINS}
    by_level = {level: sum(share[d, level] for d in DOMAINS) / 4 for level in levels}
    return domains | by_level | {"overall": sum(domains.values()) / 4}

def controls(rows):
    """Events beside accuracy: does the model look at the images, does it count words, is it as right as it is sure?"""
    for row, winner, loser, margin in margins(rows):
        for key in KEYS if row.keys() >= set(KEYS) else ():  # accuracy alike in all three: it never looked
            yield KEYS[key], row["prompt"], row[key][winner] > row[key][loser]
        size, other = row["characters"][winner], row["characters"][loser]
        if abs(size - other) <= 0.1 * max(size, other):  # where length cannot help
            yield "length-matched pairs", row["prompt"], margin > 0
        if size != other:
            yield "the label prefers the longer", row["prompt"], size > other
            yield "the model prefers the longer", row["prompt"], margin * (size - other) > 0
        if abs(margin) not in (0, 1):  # not of a judge that thinks: 1 or 0 is no probability
            sure = min(int(10 / (1 + math.exp(-abs(margin)))), 9) / 10  # the probability it gives what it prefers
            yield f"right where sigmoid(margin) is {sure:.1f} to {sure + 0.1:.1f}", row["prompt"], margin > 0
    for row in rows:  # of judges; verdicts of exactly 0 could not be read
        for first, second in row.get("verdicts", []):
            yield "judge: better answer shown first", row["prompt"], first > 0
            yield "judge: better answer shown second", row["prompt"], second > 0
            yield "judge: both orders agree", row["prompt"], first * second > 0
            yield "judge: no verdict", row["prompt"], 0 in (first, second)

# ======================================================================================================================
# First reading ends here. Below: what a real run needs.
# ======================================================================================================================
SEVEN = ("correctness", "preference", "knowledge", "math", "coding", "safety", "VQA")
DOMAINS = ("chat", "math", "code", "safety")
# RewardBench's weights (allenai/reward-bench: constants.py). math-prm has 447 rows and weighs as much as all code.
SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
                  "hep-rust": 164},
    "Prior Sets": {"anthropic_helpful": 1, "anthropic_hhh": 1, "shp": 1, "summarize": 1}}

def multimodal_rewardbench(share) -> dict:
    """Overall is the average over all rows; what some papers print as overall is the mean of the seven columns.

    >>> shares = dict.fromkeys(["safety/bias", "safety/toxicity", ALL, *SEVEN], 1)
    >>> multimodal_rewardbench(shares | {"coding": 0.3})["mean of 7"]
    0.9"""
    seven = {name: share[name] for name in SEVEN}
    parts = {"bias": share["safety/bias"], "toxicity": share["safety/toxicity"]}
    return {"overall": share[ALL]} | seven | {"mean of 7": sum(seven.values()) / 7} | parts

def rewardbench(share) -> dict:
    """Sections by the weights of their subsets; the score is their mean. Prior sets count half as much as a section.

    >>> right = {subset: 1 for weights in SECTIONS.values() for subset in weights}
    >>> rewardbench(right | {"math-prm": 0})["Reasoning"]
    0.5"""
    sections = {}
    for name, weights in SECTIONS.items():
        sections[name] = sum(w * share[subset] for subset, w in weights.items()) / sum(weights.values())
    *four, prior = sections.values()
    return sections | {"score": sum(four) / 4, "score with prior sets": (2 * sum(four) + prior) / 9}

# name: (its figures, the one that sums it up)
METRICS = {"vl-rewardbench": (vl_rewardbench, "overall"), "multimodal-rewardbench": (multimodal_rewardbench, "overall"),
           "mm-rlhf-rewardbench": (mm_rlhf_rewardbench, "Acc"), "rewardbench": (rewardbench, "score"),
           "rm-bench": (rm_bench, "overall"), "comparisons": (dict, ALL)}
AVERAGES = {"text": [("rewardbench", "score"), ("rm-bench", "overall")],  # Table 6
            "multimodal": [("vl-rewardbench", "overall"), ("mm-rlhf-rewardbench", "Acc"),
                           ("mm-rlhf-rewardbench", "Acc+"), ("multimodal-rewardbench", "overall")]}

def averages(found: dict) -> dict:
    """The paper's averages of {(benchmark, figure): value}; one of which a part was not run is left out. Its Table 4
    prints VL-RewardBench's macro as overall; what Table 6 does is not said."""
    return {name: sum(found[part] for part in parts) / len(parts)
            for name, parts in AVERAGES.items() if found.keys() >= set(parts)}

# Published rows, as printed in Tables 8 to 10 -------------------------------------------------------------------------
PUBLISHED = {"vl-rewardbench": """
GPT-4o (2024-08-06) [a]             | 49.10 67.60 70.50 65.80 62.40
Claude-3.7-Sonnet [c]               | 68.08 70.70 60.81 66.31 66.53
IXC-2.5-Reward 7B [a]               | 84.70 62.50 62.90 65.80 70.00
MM-RLHF-Reward 7B [b]               | - - - 50.15 - 45.04 50.45 57.55 51.01
R1-Reward 7B [b]                    | - - - 71.92 - 63.84 85.71 64.78 71.44
BaseReward (Qwen2-VL) 7B [b d e]    | - - - 78.53 - 62.12 84.82 82.64 76.53
BaseReward (Qwen2.5-VL) 7B [b d]    | - - - 82.16 - 68.55 92.19 81.82 80.85
BaseReward (ensemble) 7B+7B [b d e] | - - - 84.41 - 71.67 91.74 85.33 82.91""", "multimodal-rewardbench": """
GPT-4o [a]                      | 70.8 62.6 69.0 72.0 67.6 62.1 74.8 87.2
Claude 3.7 Sonnet [a]           | 71.9 58.4 60.7 78.1 76.3 71.3 72.0 86.8
MM-RLHF-Reward 7B [a]           | 67.1 61.7 67.5 54.3 58.4 57.9 92.9 76.8
IXC-2.5-Reward 7B [a]           | 66.6 60.7 64.2 56.8 63.0 50.5 89.9 81.1
R1-Reward 7B                    | 82.2 77.5 74.0 74.9 83.1 79.6 99.6 86.5
BaseReward (Qwen2-VL) 7B [b]    | 68.7 68.2 56.3 64.9 73.1 48.6 72.4 83.5
BaseReward (Qwen2.5-VL) 7B      | 72.8 65.7 65.0 70.6 82.7 50.3 81.5 85.0
BaseReward (ensemble) 7B+7B [b] | 73.6 68.5 68.0 70.3 82.8 51.2 81.3 85.6""", "mm-rlhf-rewardbench": """
GPT-4o (2024-08-06)            | 64.28 78.37 44.11 56.25 40.00 58.23 26.01
Claude-3.7-Sonnet              | 66.67 91.89 91.18 87.50 76.00 82.35 65.22
IXC-2.5-Reward 7B              | 52.38 91.89 67.65 62.50 88.00 71.18 50.00
MM-RLHF-Reward 7B              | 83.00 97.00 74.00 69.00 88.00 82.00 63.00
R1-Reward 7B                   | 80.95 89.19 82.35 75.00 72.00 80.59 54.35
BaseReward (Qwen2-VL) 7B       | 80.95 100.00 88.24 90.62 96.00 90.59 78.26
BaseReward (Qwen2.5-VL) 7B [a] | 95.74 97.38 94.13 81.25 88.00 91.76 80.43
BaseReward (ensemble) 7B+7B    | 88.10 100.00 97.06 87.50 92.00 92.94 80.43"""}

# What keeps them from being on one footing: arithmetic over the public ids, done again by tests/test_evaluate.py
NOTES = {"vl-rewardbench": [
    "What stands in one column compares, but for [c], [d] and [e]: there overall alone.",
    "[a] grouped as the official script does: 183 general, 749 hallucination, 318 reasoning.   [b] grouped as that of "
    "R1-Reward, which looks for rlhf and rlaif where the ids have RLHF and RLAIF: 484, 448, 318.   [c] fits neither.",
    "[d] printed with two columns exchanged: 318 rows stand under general, 484 under reasoning.   [e] scored on 1,225 "
    "of the 1,250 rows, as 25 ids occur twice."], "multimodal-rewardbench": [
    "[a] overall is the mean of the seven columns: compare with `mean of 7`. Without a mark it is the average over all "
    "4,711 rows.   [b] overall fits neither: from the columns, the average over 4,711 rows is 68.6 and 73.8."],
    "mm-rlhf-rewardbench": [
    "[a] mcq, long, short are no fractions of 42, 37, 34 pairs; 40/42 = 95.24, 36/37 = 97.30, 32/34 = 94.12 give the "
    "printed Acc."]}

PARADIGM_NOTES = {
    "critic": "Scored after the critic's {critiques} critiques. What it loses between --critiques given and own is the "
              "known weakness of its paradigm: it learnt to read critiques that are better than those it writes.",
    **dict.fromkeys(("direct", "think"), "A judge: every pair was asked in both orders, each verdict counts by itself, "
                    "and n counts verdicts; a thought without one is wrong. Figures about images compare each "
                    "response's preferences, summed over its pairs and orders.")}

# Figures with their intervals -----------------------------------------------------------------------------------------
def figures(events, metric=dict) -> dict:
    """{figure: {"value", "low", "high" in percent, "n"}} of events (group, prompt, hit). A figure of which a group was
    not run is left out; n counts the events of the groups without which it has no value.

    Low and high hold the middle 95% of what `metric` makes of prompts drawn anew, 1,000 times. Prompts are drawn, not
    pairs: the pairs of one prompt tend to be right or wrong together.

    >>> figures([("math", 7, True), ("math", 7, False), ("code", 8, True)])["math"]
    {'value': 50.0, 'low': 50.0, 'high': 50.0, 'n': 2}"""
    groups, prompts, cells = {}, {}, []
    for group, prompt, hit in events:
        cells.append((prompts.setdefault(prompt, len(prompts)), groups.setdefault(group, len(groups)), hit))
    prompt, group, hit = torch.tensor(cells, dtype=torch.float64).T
    sums = torch.zeros(len(prompts), len(groups), 2, dtype=torch.float64)  # hits and events of each prompt, by group
    sums.index_put_((prompt.long(), group.long()), torch.stack([hit, torch.ones_like(hit)], dim=1), accumulate=True)

    def statistic(sums):  # (N, groups, 2) -> {figure: (N,)}
        hits, events = sums.unbind(dim=2)
        share = defaultdict(lambda: torch.full_like(hits[:, 0], math.nan), zip(groups, (hits / events).T))
        return {name: 100 * value for name, value in metric(share).items()}

    generator, drawn = torch.Generator().manual_seed(0), []
    draws = 1_000 if len(prompts) >= 200 else 10_000  # 1,000 draws of 46 prompts would leave 0.9 points of noise
    for _ in range(20):  # to bound the memory
        chosen = torch.randint(len(prompts), (draws // 20, len(prompts)), generator=generator)
        times = torch.zeros(chosen.shape, dtype=torch.float64)  # how often each prompt was drawn
        times.scatter_add_(1, chosen, torch.ones_like(times))
        drawn.append(times @ sums.flatten(1))
    total, each = sums.sum(dim=0), range(len(groups))
    without = total.repeat(len(groups), 1, 1)
    without[each, each] = 0  # one group after another is not run: 0 of 0
    lost, drawn = statistic(without), statistic(torch.cat(drawn).unflatten(1, total.shape))
    found, middle = {}, torch.tensor([0.025, 0.975], dtype=torch.float64)
    for name, value in statistic(total[None]).items():
        if not value.isnan():
            (low, high), n = drawn[name].nanquantile(middle).tolist(), total[lost[name].isnan(), 1].sum()
            found[name] = {"value": value.item(), "low": low, "high": high, "n": int(n)}
    return found

def metrics(benchmark: str, rows: list) -> dict:
    """The figures of prediction rows; where they are no benchmark's, of the 13 largest categories."""
    events = list(pair_events(rows, benchmark))
    if benchmark == "mm-rlhf-rewardbench":
        events += whole_ids(rows)
    if benchmark == "comparisons":  # a table with more columns is no table
        shown = dict(Counter(group for group, _, _ in events).most_common(14))  # the largest is the group of all
        events = sorted(event for event in events if event[0] in shown)
    return figures(events, METRICS[benchmark][0])

# One model, or several as one (section 4.7) ---------------------------------------------------------------------------
def weigh(rule: str, members: list[str], held: list[dict]) -> dict[str, float]:
    """{model: weight} for one kind of prompt, by those pairs of the held-out rows that all its members scored.

    average     every member alike; the paper's best, and it needs no held-out pairs
    accuracy    a member's share of pairs with margin > 0, normalised
    confidence  a member's mean margin, normalised; one that is wrong on average gets 0"""
    if len(members) < 2 or rule == "average":
        return {m: 1 / len(members) for m in members}
    scored = [row for row in held if row.get("rewards", {}).keys() >= set(members)]
    each = [[margin for *_, margin in margins(row | {"rewards": row["rewards"][m]} for row in scored)] for m in members]
    each = torch.tensor(each)  # (M, B)
    raw = (each > 0).float().mean(dim=1) if rule == "accuracy" else each.mean(dim=1).clamp(min=0)
    if not raw.sum() > 0:
        raise ValueError("--validation weighs no member: none is better than chance, or all have no pair that each can "
                         "read (a text-only one wants rows without images)")
    return dict(zip(members, (raw / raw.sum()).tolist()))

def combine(found: list[dict], takes: dict, rule: str, held: list[dict]) -> dict:
    """The members' rewards, weighed, become the rows'. Returns the weights."""
    good = [row for row in found if "error" not in row]
    weights = {kind: weigh(rule, takes[kind], held) for kind in {row["images"] > 0 for row in good}}
    for row in good:
        weight, members = weights[row["images"] > 0], row["rewards"]
        for key in KEYS:
            weighed = [[weight[m] * reward for reward in rewards] for m, rewards in row.pop(key).items()]
            if weighed:
                row[key] = [sum(parts) for parts in zip(*weighed)]
        if len(members) > 1:
            row["members"] = members
    return {("with" if kind else "without") + " images": weight for kind, weight in weights.items()}

# Rewards --------------------------------------------------------------------------------------------------------------
def open_folder(path: str, on_bad_row: str) -> tuple:
    """(name, benchmark, rows, found) of a data folder, or of the drawn set. found: the lines of predictions.jsonl, to
    which rewards are to be added, or {"row", "error"} where a row cannot be used."""
    rows = read_comparisons(path) if path else synthetic(DRAWN, held_out=True)
    found, prompts, sources = [], {}, set()
    for i in range(len(rows)):
        c = use_row(rows, i, lambda c: c, on_bad_row)
        if isinstance(c, BadRow):
            found.append({"row": i + 1, "error": str(c)})
            continue
        sources.add(c.source)
        found.append({"row": i + 1, "id": c.id, "category": c.category, "images": len(c.images),
                      "prompt": prompts.setdefault(repr((c.prompt, c.images)), len(prompts)),  # rows may share one
                      "pairs": [list(pair) for pair in c.pairs], "characters": [len(text) for text in c.responses],
                      "rewards": {}, "removed": {}, "shuffled": {}})  # each {model: K rewards}, until `combine`
    benchmark = next((name for name in BENCHMARKS if sources == {name}), "comparisons")
    return Path(path or "drawn").resolve().name.removesuffix(".jsonl"), benchmark, rows, found

def score_folder(model: RewardModel, directory: str, takes: dict, folder: tuple, cfg: "Config", probe: bool) -> None:
    """Adds one model's rewards to every row that it takes part in, and those without images and with another's."""
    name, _, rows, found = folder
    tokens, bar = cfg.pack_tokens or None, f"{Path(directory).name} on {name}"
    at = [i for i, row in enumerate(found) if "error" not in row and directory in takes[row["images"] > 0]]
    taken = [rows[i] for i in at] if isinstance(rows, list) else rows.only(at)
    if model.critiques_from == "given" and at and not any(rows[i].critiques for i in at[:1000]):
        raise ValueError(f"--critiques given: {name} has no critiques to read")
    for i, said in zip(at, score_over_ranks(model, taken, tokens, "skip", bar)):  # see main
        if isinstance(said, BadRow):
            found[i] = {"row": i + 1, "error": str(said)}
        elif not all(map(math.isfinite, said.rewards)):
            raise ValueError(f"{place(rows, i)}: {directory} gives {str(said.rewards):.80} as rewards: a broken model?")
        else:
            found[i]["rewards"][directory] = said.rewards
            if len(cfg.model) == 1 and said.verdicts:  # in an ensemble its preferences are rewards like any other
                found[i]["verdicts"] = said.verdicts
            if said.texts and (len(cfg.model) == 1 or not said.verdicts):  # critiques; thoughts of a judge alone
                found[i].setdefault("critiques", {})[directory] = said.texts
    visual = [i for i in at if probe and found[i].get("images")]
    seen = [rows[i] for i in visual]
    probes = {"removed": [remove_images(c) for c in seen], "shuffled": shuffle_images(seen)} if seen else {}
    for key, changed in probes.items():
        for i, said in zip(visual, score_over_ranks(model, changed, tokens, "skip", f"{bar}, {KEYS[key]}")):
            if isinstance(said, Score):  # without its image a prompt may be empty, and was skipped
                found[i][key][directory] = said.rewards

def can_see(directory: str) -> bool:
    """Whether a reward model takes images. ValueError, before hours of scoring, if its files are not whole."""
    try:
        json.loads(Path(directory, "reward_config.json").read_bytes())
        for file in Path(directory).glob("*.safetensors"):
            safetensors.safe_open(file, "pt")
        return "vision_config" in json.loads(Path(directory, "config.json").read_bytes())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{directory} is not a saved reward model: {error}") from None

def score(cfg: "Config", device: torch.device):
    """Yields (where its results go, facts, predictions, rows) of each folder, as soon as the last model is done."""
    started, models, paradigms = time.time(), cfg.model, []
    sees = {m: can_see(m) for m in models}
    if cfg.route and all(sees.values()):
        raise ValueError("--route sends prompts without images to a text-only model, and every --model can see")
    takes = {True: [m for m in models if sees[m]] or models,  # if none sees, `encode` says so
             False: [m for m in models if not (cfg.route and sees[m])]}
    folders = [open_folder(path, cfg.on_bad_row) for path in cfg.data or [""]]
    if len({name for name, *_ in folders}) < len(folders):
        raise ValueError(f"--data {' '.join(cfg.data):.150}: two folders of one name; so would their results be")
    weighs = cfg.ensemble != "average" and len(models) > 1
    if weighs and not cfg.validation:
        raise ValueError(f"--ensemble {cfg.ensemble} weighs by held-out pairs: give --validation FOLDER")
    held = open_folder(cfg.validation, "stop") if weighs else ("", "", [], [])
    dtype = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(cfg.dtype, cfg.dtype)
    out = Path(cfg.out or Path(models[0], "evaluation" if len(models) == 1 else "evaluation-ensemble"))
    for directory in models:  # one after another: each is loaded once, only one is in memory
        model = RewardModel.from_pretrained(directory, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
        paradigms.append(model.processor.paradigm)
        if cfg.write_critiques and paradigms != ["critic"]:
            raise ValueError(f"--write_critiques: {directory} is no critic and writes none")
        model.critiques_from, model.critique_tokens = cfg.critiques, cfg.critique_tokens or model.critique_tokens
        model.to(device)
        if weighs:
            score_folder(model, directory, takes, held, cfg, probe=False)
        for folder in folders:
            score_folder(model, directory, takes, folder, cfg, cfg.probe)
            if directory == models[-1]:
                name, benchmark, rows, found = folder
                weights = combine(found, takes, cfg.ensemble, held[-1])
                yield out / name, {"benchmark": benchmark, "model": cfg.model, "ensemble": cfg.ensemble,
                                   "weights": weights, "paradigms": paradigms, "critiques": cfg.critiques,
                                   "dtype": dtype, "seconds": round(time.time() - started, 1),
                                   **receipt(device)}, found, rows
        del model

# What it leaves behind ------------------------------------------------------------------------------------------------
def receipt(device: torch.device) -> dict:
    world = dist.get_world_size()
    kind = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    commit = subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent, capture_output=True)
    start = f"torchrun --nproc_per_node {world}" if world > 1 else "python"
    return {"command": f"{start} {Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
            "commit": commit.stdout.decode().strip() or "unknown", "date": time.strftime("%Y-%m-%d"), "ranks": world,
            "hardware": f"{world} x {kind}", "torch": torch.__version__, "transformers": transformers.__version__}

def summarise(benchmark: str, rows: list[dict]) -> dict:
    """Everything the tables show, from the prediction rows alone."""
    good, lost = ([row for row in rows if ("error" in row) == bad] for bad in (False, True))
    if not good:
        raise ValueError(f"not one of {len(rows)} rows could be scored; the first: {lost[0]['error'] if lost else ''}")
    prior = sum(row["category"] in SECTIONS["Prior Sets"] for row in good) if benchmark == "rewardbench" else 0
    return {"rows": len(good), "expected": BENCHMARKS.get(benchmark, len(rows) - prior) + prior,
            "missing": f"the first: {lost[0]['error']}" if lost else "the folder has no more",
            "prompts": len({row["prompt"] for row in good}), "pairs": sum(len(row["pairs"]) for row in good),
            "verdicts": sum(1 for _ in margins(good)), "ties": sum(margin == 0 for _, _, _, margin in margins(good)),
            "figures": metrics(benchmark, good),
            "beyond": dict(sorted(figures(controls(good)).items()))}

def tables(summary: dict, benchmark: str, name: str) -> tuple[list, list]:
    """The published rows and this model's three lines by rising main figure; what is beyond accuracy."""
    found, (metric, main_figure) = summary["figures"], METRICS[benchmark]
    names = list(metric(defaultdict(float)) | found)
    forms = "{value:.2f}", "{low:.1f} to {high:.1f}", "{n:,}"
    ours = [[row, *(form.format(**found[figure]) if figure in found else "" for figure in names)]
            for row, form in zip((name, "95% interval", "n"), forms)]
    blocks = [(found[main_figure]["value"] if main_figure in found else -1.0, ours)]
    for line in PUBLISHED.get(benchmark, "").splitlines()[1:]:
        row, values = line.split("|")[0].strip(), [value.strip("-") for value in line.split("|")[1].split()]
        blocks.append((float(values[names.index(main_figure)]), [[row, *values, *[""] * (len(names) - len(values))]]))
    first = sum((block for _, block in sorted(blocks)), [["model", *names]])
    rest = [[measure, *(form.format(**f) for form in forms)] for measure, f in summary["beyond"].items()]
    return first, [["measure", "value", "95% interval", "n"], *rest]

def markdown(table: list[list[str]]) -> str:
    """Aligned, so that it reads as well in a terminal; what would break the table or the terminal is made harmless."""
    table = [[one_line(text[:80]).replace("\\", "\\\\").replace("|", "\\|") for text in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in table]
    rule = "|" + "|".join("-" * (w + 1) + (":" if c else "-") for c, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])

PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""
<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>
:root { color-scheme: light dark; --line: 1px solid #8886 } [hidden] { display: none !important }
body { font: 15px/1.5 system-ui, sans-serif; margin: auto; padding: 1rem; max-width: 1200px; overflow-wrap: anywhere }
table { border-collapse: collapse; display: block; overflow-x: auto; white-space: nowrap; font-size: .87em }
td { padding: .3em .6em; border-bottom: var(--line); text-align: right } td:first-child { text-align: left }
tr:first-child, .bold { font-weight: bold; background: #8882 } .soft { opacity: .75; font-size: .87em }
select { font: inherit; padding: .2em } svg { max-width: 100%; height: auto }
article { display: flex; flex-wrap: wrap; align-items: start; gap: 1em; padding: 1em; margin: 1em 0 }
article { border: var(--line) } article img { width: 15em } article div { flex: 1 1 20em; min-width: 0 }
.answers { display: grid; gap: 1em; grid-template-columns: repeat(auto-fit, minmax(min(26em, 100%), 1fr)) }
.answers > div { border-top: 3px solid #8886 } .answers > .chosen { border-color: #2b9a5f }
.answers > .rejected { border-color: #dc4448 } .text { white-space: pre-wrap; max-height: 20em; overflow-y: auto }
h1 { font-size: 1.4em } </style><h1>{{ title }}</h1>
{% for section in sections %}
{% if section.heading %}<h2>{{ section.heading }}</h2>{% endif %}
{% for line in section.text %}<p class="soft">{{ line }}</p>{% endfor %}
<table>{% for row in section.table %}<tr{% if row[0] == section.bold %} class="bold"{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{{ section.html }}
{% set groups = section.cards | groupby("category", case_sensitive=true) %}
{% if groups | length > 1 %}<select aria-label="category" onchange="for (const card of
document.querySelectorAll('article')) card.hidden = value && card.dataset.category != value">
{% for name, cards in [("", section.cards)] + groups %}
<option value="{{ name }}">{{ name or "all" }} {{ cards | length }}</option>
{% endfor %}</select>{% endif %}
{% for card in section.cards %}<article data-category="{{ card.category }}">
{% for uri in card.pictures %}<img alt="" src="{{ uri }}">{% endfor %}
<div><b>{{ card.facts | join(" · ") }}</b><div class="text">{{ card.text }}</div><div class="answers">
{% for answer in card.answers %}<div class="{{ answer.name }}"><div class="soft">{{ answer.facts | join(" · ") }}</div>
<div class="text">{{ answer.text }}</div></div>{% endfor %}</div></div></article>{% endfor %}
{% endfor %}</html>
""")

def page(title: str, sections: list[dict]) -> str:
    """An HTML page that needs no network and runs nothing of what it shows: all but Markup is escaped.

    A section's keys, each optional, in the order they are shown: heading; text, paragraphs; table, rows of strings;
    bold, the first cell of a row to stress; html, Markup; cards, with a filter of them: {category, pictures
    (data URIs), facts, text, answers: [{name (chosen is green, rejected red), facts, text}]}."""
    return PAGE.render(title=title, sections=sections).encode("utf-8", "replace").decode()

def thumbnails(source) -> list[str]:
    """The picture as a JPEG of at most 448 pixels in a data URI; of a video four frames; of a vanished one none."""
    out = []
    with contextlib.suppress(ValueError):
        for image in open_frames(source, 4):
            image.thumbnail((448, 448))
            image.save(file := io.BytesIO(), "JPEG", quality=82)
            out.append(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")
    return out

def mistakes(found: list[dict], rows, worst: int) -> tuple[list[dict], int]:
    """Cards of the pairs with the most negative margin, and how many pairs are wrong."""
    good = [row for row in found if "error" not in row]
    wrong = [(margin, row["row"], winner, loser) for row, winner, loser, margin in margins(good) if margin <= 0]
    cards = []
    for margin, number, winner, loser in sorted(wrong)[:worst]:
        row, c = found[number - 1], rows[number - 1]
        messages = [f"{m['role']}: {m['content']}" for m in to_messages(c.prompt, c.images)]
        p, answers = row["pairs"].index([winner, loser]), []
        for order, (name, k) in enumerate((("chosen", winner), ("rejected", loser))):
            said = [f"judge, shown this first: {texts[2 * p + order]}" if "verdicts" in row else f"critique: {texts[k]}"
                    for texts in row.get("critiques", {}).values()]
            answers.append({"name": name, "facts": [name, f"reward {row['rewards'][k]:.3f}"],
                            "text": "\n\n".join([c.responses[k], *said])})
        cards.append({"category": row["category"] or "no category", "text": "\n\n".join(messages), "answers": answers,
                      "facts": [f"margin {margin:.3f}", row["category"], row["id"], f"row {number}"],
                      "pictures": [uri for image in c.images for uri in thumbnails(image)]})
    return cards, len(wrong)

def leave(out: Path, facts: dict, found: list[dict], rows, cfg: "Config") -> tuple[dict, str]:
    """summary.json, table.md and report.html of one folder; returns its figures and the text of its tables."""
    benchmark, name = facts["benchmark"], " + ".join(Path(model).name for model in facts["model"])
    summary, notes = summarise(benchmark, found), list(NOTES.get(benchmark, []))
    if len(facts["model"]) == 1:  # in an ensemble a judge's preferences are rewards like any other's
        notes += [note.format(**facts) for kind, note in PARADIGM_NOTES.items() if kind in facts["paradigms"]]
    table, rest = tables(summary, benchmark, name)
    complete, judge = summary["rows"] == summary["expected"], summary["verdicts"] != summary["pairs"]
    count = "{rows:,} rows" if complete else "{rows:,} OF {expected:,} ROWS ({missing:.200})"
    count += ", {prompts:,} prompts, {pairs:,} pairs" + ", {verdicts:,} verdicts" * judge + ", {ties:,} ties"
    first = printable(f"{out.name} ({benchmark}): {count.format(**summary)}")
    receipt = "{command} · commit {commit} · {date} · {hardware} · {dtype} · {seconds} s".format(**facts)
    text = printable("\n\n".join([first, markdown(table), *notes, markdown(rest), receipt]))
    write_text(out / "summary.json", json.dumps(facts | summary, indent=1) + "\n")
    write_text(out / "table.md", text + "\n")
    cards, wrong = mistakes(found, rows, cfg.worst)
    shown = f"{len(cards)} of the {wrong:,} wrong of {summary['verdicts']:,}; margin: chosen less rejected"
    write_text(out / "report.html", page(f"{name} on {first}", [
        {"text": [*notes, receipt], "table": table, "bold": name},
        {"heading": "Does it look, does it count words, is it as often right as it says", "table": rest},
        {"heading": "The worst mistakes first", "text": [shown], "cards": cards}]))
    return summary["figures"], text

# The command line -----------------------------------------------------------------------------------------------------
DRAWN = 800  # as train.py holds out unless it is told otherwise (--eval_size)

@dataclass(frozen=True)
class Config:
    model: list[str] = HfArg(default_factory=list, help="saved reward models (--out of train.py); several: an ensemble")
    data: list[str] = HfArg(default_factory=list, help="data folders, benchmarks among them; none: drawn comparisons")
    out: str = HfArg(default="", help="folder for the results; none: evaluation/ in the (first) model's folder")
    ensemble: Literal["average", "accuracy", "confidence"] = HfArg(default="average", help="how members are weighed")
    validation: str = HfArg(default="", help="folder to weigh the members by (the paper takes 1,000 pairs)")
    route: bool = HfArg(default=False, help="prompts without images go to the text-only members alone")
    probe: bool = HfArg(default=True, help="score twice more, with images removed and shuffled")
    worst: int = HfArg(default=100, help="mistakes shown in report.html")
    on_bad_row: Literal["stop", "skip"] = HfArg(default="stop", help="skip: and say how many rows are missing")
    pack_tokens: int = HfArg(default=0, help="tokens in a pack; 0: 16,384 on a GPU, 1,024 on a CPU")
    critiques: Literal["own", "given"] = HfArg(default="own", help="that a critic reads: it writes them, or the data's")
    critique_tokens: int = HfArg(default=0, help="longest critique or thought; 0: as it was trained")
    write_critiques: str = HfArg(default="", help="folder to write: --data with the critic's own critiques (CLoud)")
    dtype: Literal["auto", "bf16", "fp32"] = HfArg(default="auto", help="of weights; auto: bf16 on a GPU, else fp32")

def main(cfg: Config) -> None:
    check_numbers(cfg, not_negative=("worst", "pack_tokens", "critique_tokens"))
    cfg = replace(cfg, model=[*{Path(m).resolve(): m for m in cfg.model}.values()])  # each once
    if not cfg.model:
        raise ValueError("--model DIR is missing: a saved reward model, such as runs/default after train.py")
    if cfg.write_critiques and (len(cfg.model) != 1 or len(cfg.data) != 1 or cfg.critiques == "given"
                                or Path(cfg.write_critiques).exists()):
        raise ValueError("--write_critiques takes one critic (--model), one folder (--data), and a folder that is new")
    device, texts, folders, values, lost, failed = start_processes(), [], {}, {}, [], []
    for out, facts, found, rows in score(cfg, device):
        if dist.get_rank() == 0:
            write_text(out / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in [facts, *found]))
            lost += [row["error"] for row in found if "error" in row]
            if cfg.write_critiques and not (lost and cfg.on_bad_row == "stop"):
                # for a critic's head to train on: in use it reads its own (CLoud, 2408.11791)
                good = (row for row in found if "error" not in row)
                write_comparisons(cfg.write_critiques, (
                    replace(rows[row["row"] - 1], critiques=row["critiques"][cfg.model[0]]) for row in good))
            try:
                folders[out.name], text = leave(out, facts, found, rows, cfg)
            except ValueError as error:  # not one row of this folder can be scored; those of others may
                failed.append(str(error))
                continue
            say(f"{text}\n\nwrote it into {out}\n")
            texts.append(text)
            values |= {(facts["benchmark"], name): f["value"] for name, f in folders[out.name].items()}
    if len(texts) > 1:
        if means := averages(values):
            table = [[name, f"{value:.1f}"] for name, value in means.items()]
            texts.append(markdown([["average as in the paper's Table 6", "value"], *table]))
            say(texts[-1])
        write_text(out.parent / "table.md", "\n\n".join(texts) + "\n")
        write_text(out.parent / "summary.json", json.dumps({"averages": means, "folders": folders}, indent=1) + "\n")
    if failed:
        raise ValueError(failed[0])
    if lost and cfg.on_bad_row == "stop":  # a picture that is broken is found when it is its turn
        raise ValueError(f"{lost[0]}; the other rows are scored, and the tables say how many are missing")

if __name__ == "__main__":
    command_line(main, Config, "evaluate.py")
