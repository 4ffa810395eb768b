"""Scores a reward model as the papers do, and shows where it fails (BaseReward, arXiv 2509.16127, section 5).

    python evaluate.py --model runs/default                           drawn pictures the model has never seen
    python evaluate.py --model DIR --benchmark vl-rewardbench --data MMInstruction/VL-RewardBench      (a hub id, a folder or a file)
    python evaluate.py --model DIR --benchmark multimodal-rewardbench --data FOLDER      all_data.json and images/
    python evaluate.py --model DIR --benchmark mm-rlhf-rewardbench --data FOLDER         mm_reward_bench.jsonl, images/ and video/
    python evaluate.py --model DIR --benchmark rewardbench --data allenai/reward-bench [allenai/pref-test-sets]
    python evaluate.py --model DIR --benchmark rm-bench --data FOLDER                    total_dataset.json
    python evaluate.py --model DIR --data FOLDER                                         your own comparisons (format: data.py)
    python evaluate.py --model DIR OTHER --ensemble accuracy --validation FOLDER ...     several models as one (section 4.7)
    python evaluate.py --rescore DIR/evaluation/NAME/predictions.jsonl                   every table again, without a model
    torchrun --nproc_per_node 8 evaluate.py ...                       the same result, whatever the number of ranks

It leaves in --out: predictions.jsonl (every reward), summary.json, table.md (to paste), report.html (the worst mistakes, with pictures).
A run that was stopped goes on where it was when the same command is given again.

    1  rewards                  comparisons -> rewards, shared out over the ranks
    2  rows                     a published row -> a Comparison with its id and category
    3  benchmarks               files, folders, hub ids -> comparisons, and rows that share a prompt -> one comparison
    4  metrics                  what the official scripts count
    5  published rows           as printed, and what keeps them from being on one footing
    6  intervals · 7  beyond accuracy · 8  ensembles · 9  what it leaves behind · 10  curves

A pair is right when margin > 0: a tie is wrong, as in the official scripts. Rows that share prompt and images are scored as one
comparison, but counted row by row, and repeated ids stay apart.

Where the published rows are not on one footing (arithmetic over the public ids, recomputed in tests/test_evaluate.py):
- VL-RewardBench: the official script groups 1,250 ids as 183 general, 749 hallucination, 318 reasoning. R1-Reward's looks for lower-case
  "rlhf" and "rlaif" where the ids are upper-case: 484, 448, 318, here `--grouping paper`. BaseReward's columns general and reasoning are
  exchanged, and two of its rows were scored on 1,225 ids, since 25 occur twice. Overall does not depend on the grouping, macro does.
- Multimodal RewardBench: BaseReward's Qwen2.5-VL row has the average over 4,711 rows, the older rows the mean of seven columns.
- MM-RLHF-RewardBench: three cells of BaseReward's Qwen2.5-VL row are no possible fraction of their 42, 37 and 34 pairs.
"""
import base64
import hashlib
import html
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import string
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from data import BadRow, World, from_json, inside, need, read_comparisons, read_rows, setup, synthetic, text_of, write_text
from model import (MARK, Comparison, RewardModel, encode, ensemble_weights, fill_packs, is_video, open_frames, open_image, pack,
                   to_messages)

# ---------------------------------------------------------------------------------------------------------------------------------
# 1  Rewards

DRAWN = 800  # comparisons of the embedded default, the very ones that train.py holds out (a test compares)
CHUNK = 64  # comparisons that are encoded together, go to one rank, and are kept together when a run is interrupted


@torch.no_grad()
def score_all(model: RewardModel, comparisons, world: World, pack_tokens: int = 16384, bar: str = "", on_bad_row: str = "stop",
              journal: Path | None = None, where=()) -> list:
    """Rewards of every response of every comparison, in their order and on every rank: one list of K floats for each.

    The work is cut into chunks, and a chunk's packs depend on nothing else: in bf16 the last digits of a reward feel the pack it is in,
    and this way neither the number of ranks nor an interruption changes them. A comparison that cannot be encoded stops the run
    (BadRow, with its place in `where`), or with on_bad_row "skip" gets None. One longer than `pack_tokens` is a pack of its own. The
    chunks that are done are kept in `journal` (one file a rank), and a later call starts from them.
    """
    chunks = [range(at, min(at + CHUNK, len(comparisons))) for at in range(0, len(comparisons), CHUNK)]
    done, bad_row_seen = {}, journal.with_name(f"{journal.name}-bad") if journal else None
    if journal and world.rank == 0:
        bad_row_seen.unlink(missing_ok=True)
    for file in journal.parent.glob(f"{journal.name}.*") if journal else ():
        for line in file.read_text().splitlines():
            try:
                c, values = json.loads(line)
                done[c] = values
            except ValueError:  # what a killed run left half written
                pass
    done = world.gather_objects(done)[0]  # one rank's view, so that all share out the same rest
    mine, rewards, problem = [c for c in range(len(chunks)) if c not in done][world.rank::world.world_size], {}, ""

    def encode_row(i):
        try:
            return encode(comparisons[i], model.tokenizer, model.image_processor)
        except Exception as error:  # whatever it is, it is this row's
            return BadRow(f"{where[i] if where else f'comparison {i + 1}'}: {error}")

    with ThreadPoolExecutor() as threads, tqdm(total=sum(len(chunks[c]) for c in mine), desc=bar, disable=not bar or world.rank > 0,
                                               leave=False) as progress:
        ahead = [threads.map(encode_row, chunks[c]) for c in mine[:1]]  # the next chunk is encoded while this one is scored
        for number, c in enumerate(mine):
            if journal and bad_row_seen.exists():  # by another rank, which waits
                break
            encoded = list(ahead.pop())
            ahead += [threads.map(encode_row, chunks[after]) for after in mine[number + 1:number + 2]]
            if on_bad_row == "stop" and (bad := [e for e in encoded if isinstance(e, BadRow)]):
                problem = str(bad[0])
                if journal:
                    bad_row_seen.touch()
                break
            rewards[c], good = [None] * len(encoded), [i for i, e in enumerate(encoded) if not isinstance(e, BadRow)]
            for members in fill_packs([encoded[i].tokens for i in good], pack_tokens):
                values = model(pack([encoded[good[m]] for m in members]).to(model.device)).tolist()
                for m in members:
                    k = len(encoded[good[m]].response_ids)
                    rewards[c][good[m]], values = values[:k], values[k:]
            if journal:
                with open(f"{journal}.{world.rank}", "a") as file:
                    file.write("\n" + json.dumps([c, rewards[c]]))  # the break comes first, to end a line left half written
            progress.update(len(encoded))
    gathered = world.gather_objects((rewards, problem))  # every rank comes here, also the one that met a bad row
    if problems := [p for _, p in gathered if p]:
        raise BadRow(problems[0])
    for part, _ in gathered:
        done |= part
    return [values for c in range(len(chunks)) for values in done[c]]


def accuracy(comparisons, rewards, by_category: bool = False):
    """Share of pairs with margin > 0; a tie counts as wrong. With by_category a dict of (accuracy, number of pairs), sorted by name."""
    right = {}
    for comparison, values in zip(comparisons, rewards):
        if values is not None:
            right.setdefault(comparison.category or "all", []).extend(values[w] > values[l] for w, l in comparison.pairs)
    if by_category:
        return {name: (sum(hits) / len(hits), len(hits)) for name, hits in sorted(right.items())}
    hits = [hit for part in right.values() for hit in part]
    return sum(hits) / max(len(hits), 1)


def shuffle_images(comparisons, seed: int = 0) -> list:
    """The comparisons that have images, with the images of another: on them a model that looks falls to chance.

    Images move only between prompts with the same number of images, and no prompt gets its own back, or the same picture from another
    prompt, as long as half of them have another.
    """
    visual = [c for c in comparisons if c.images]
    groups = {}
    for i, c in enumerate(visual):
        groups.setdefault(len(c.images), []).append(i)
    out = list(visual)
    for members in groups.values():
        by_picture = {}
        for i in random.Random(seed).sample(members, len(members)):
            by_picture.setdefault(pictures_of(visual[i]), []).append(i)
        order = [i for same in by_picture.values() for i in same]
        step = max(map(len, by_picture.values()))  # equal pictures lie side by side, so that a step as long as the longest run leaves it
        for here, there in zip(order, order[step:] + order[:step]):
            out[here] = replace(visual[here], images=visual[there].images)
    return out


def pictures_of(comparison: Comparison) -> tuple:
    """What tells one prompt's images from another's: files by name, bytes by content, decoded pictures by identity."""
    return tuple(image if isinstance(image, (str, bytes)) else id(image) for image in comparison.images)


def remove_images(comparison: Comparison) -> Comparison:
    messages = to_messages(comparison.prompt, list(comparison.images))
    return replace(comparison, images=[], prompt=[m | {"content": MARK.sub("", m["content"]).lstrip("\n")} for m in messages])


# ---------------------------------------------------------------------------------------------------------------------------------
# 2  Rows: a published row -> a Comparison with its id and category. A ValueError says what is wrong with the row.
#
# Each function takes the row, the folder it lies in, and the part of the benchmark: the name of its file or of its split.


def row_of(prompt, responses, pairs, id, category, image=None, folder: Path | None = None) -> Comparison:
    """`image`: what parquet holds (bytes), or the path of an image or of a folder of frames, which must be there. It goes in front."""
    if not all(isinstance(text, str) for text in responses):
        raise ValueError("a response is not a text")
    image = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
    if folder and not image:
        raise ValueError("the image is empty")
    if isinstance(image, bytes):
        images = [image]  # decoded for each use, so that no decoded picture stays in memory
    else:
        places = [inside(place, image) for place in (folder, folder / "images", folder.parent, folder.parent / "images")] if image else []
        images = [place for place in places if os.path.exists(place)][:1]
        if image and not images:
            raise ValueError(f"{image} is neither in {folder} nor in its images/; fetch the benchmark's images to there")
    if isinstance(prompt, str) and len(MARK.findall(prompt)) != len(images):  # a mark that stands for no image is only text
        prompt = MARK.sub("", prompt)
    elif isinstance(prompt, list):
        prompt = [turn | {"content": MARK.sub("", turn["content"])} if isinstance(turn["content"], str) else turn for turn in prompt]
    return Comparison(prompt, list(responses), pairs, images, id=str(id), category=category)


def vl_group(id: str, grouping: str) -> str:
    prefix = re.split("[_-]", id)[0]
    if prefix in ("mathverse", "mmmu"):
        return "reasoning"
    return "hallucination" if prefix == "hallucination" or grouping == "official" and prefix in ("RLAIF", "RLHF") else "general"


def vl_row(row, folder, part) -> Comparison:
    if "prompt" in row:  # R1-Reward's flat copy
        id, query, chosen, rejected, image = need(row, "id", "prompt", "chosen", "rejected", "image")
        if re.match("(mcq|long|short|safety)/", str(image)):
            raise ValueError(f"image {image} belongs to mm-rlhf-rewardbench")
        responses, ranking = [chosen, rejected], [0, 1]
    else:
        id, query, responses, ranking, image = need(row, "id", "query", "response", "human_ranking", "image")
    if len(responses) != 2 or sorted(ranking) != [0, 1]:
        raise ValueError(f"{len(responses)} responses and human_ranking {ranking}; want two responses, ranked [0, 1] or [1, 0]")
    best = list(ranking).index(0)  # human_ranking holds the rank of each response, 0 the better
    return row_of(query, responses, [(best, 1 - best)], id, vl_group(str(id), "official"), image, folder)


MMRB_CATEGORIES = {"open_generation/correctness_task": "correctness", "open_generation/preference_task": "preference",
                   "knowledge": "knowledge", "vqa": "VQA", "reasoning": "", "safety": ""}
SEVEN = ("correctness", "preference", "knowledge", "math", "coding", "safety", "VQA")


def mmrb_row(row, folder, part) -> Comparison:
    id, text, image, first, second, better, category = need(row, "ID", "Text", "Image", "Output1", "Output2", "Better", "Category")
    if better not in ("Output1", "Output2") or category not in MMRB_CATEGORIES:
        raise ValueError(f"Better {better!r}, Category {category!r}; want Output1 or Output2, and one of {', '.join(MMRB_CATEGORIES)}")
    by_id = {"reasoning": "math" if id.lower().startswith("math") else "coding",
             "safety": "safety/bias" if id.lower().startswith("pairs") else "safety/toxicity"}
    category = by_id.get(category) or MMRB_CATEGORIES[category]
    return row_of(text, [first, second], [(0, 1) if better == "Output1" else (1, 0)], id, category, image, folder)


MM_RLHF_CATEGORIES = ("mcq", "long", "short", "safety", "video")


def mm_rlhf_row(row, folder, part) -> Comparison:
    id, prompt, chosen, rejected, path = need(row, "id", "prompt", "chosen", "rejected", "video|image")
    found = [c for c in MM_RLHF_CATEGORIES if c in str(path.get("path") if isinstance(path, dict) else path)]  # as the official script
    if not found:
        raise ValueError(f"{path!r:.60} names none of {', '.join(MM_RLHF_CATEGORIES)}. Is this the file of another benchmark?")
    return row_of(prompt, [chosen, rejected], [(0, 1)], id, found[0], path, folder)


# Each subset's weight (allenai/reward-bench: constants.py). math-prm has 447 rows and weighs as much as all code together.
SECTIONS = {"Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40},
            "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
                          "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
            "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154, "xstest-should-respond": 250,
                       "donotanswer": 136},
            "Reasoning": {"math-prm": 984} | {f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
            "Prior Sets": dict.fromkeys(("anthropic_helpful", "anthropic_hhh", "shp", "summarize"), 1)}
SUBSETS = {subset for subsets in SECTIONS.values() for subset in subsets}


def rewardbench_row(row, folder, part) -> Comparison:
    prompt, chosen, rejected = need(row, "prompt", "chosen", "rejected")
    subset = row.get("subset") or part  # the prior sets are one file or one split each
    if subset not in SUBSETS:
        raise ValueError(f"subset {subset!r} is none of RewardBench's. Is this the file of another benchmark?")
    responses = [text_of(answer[-1]) if isinstance(answer, list) and answer else answer for answer in (chosen, rejected)]
    return row_of(prompt, responses, [(0, 1)], row.get("id", ""), subset)


DOMAINS, LEVELS = ("chat", "math", "code", "safety"), ("easy", "normal", "hard")


def rm_bench_row(row, folder, part) -> Comparison:
    id, prompt, chosen, rejected = need(row, "id", "prompt", "chosen", "rejected")
    domain = str(row.get("domain") or part.removesuffix("_filtered")).split("-")[0]  # safety-refuse and safety-response are one
    if domain not in DOMAINS or not (isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) == len(rejected) == 3):
        raise ValueError(f"domain {domain!r}; want one of {', '.join(DOMAINS)}, with lists of three chosen and three rejected responses")
    return row_of(prompt, [*chosen, *rejected], [(i, 3 + j) for i in range(3) for j in range(3)], id, domain)


BENCHMARKS = {  # name: (row -> comparison, files of a local folder and splits on the hub: see data.read_rows, where to get it)
    "vl-rewardbench": (vl_row, "data.jsonl test-*.parquet *", "test|train", "MMInstruction/VL-RewardBench"),
    "multimodal-rewardbench": (mmrb_row, "all_data.json test-*.parquet *", "test|train",
                               "the data/ folder of facebookresearch/multimodal_rewardbench"),
    "mm-rlhf-rewardbench": (mm_rlhf_row, "mm_reward_bench.jsonl train-*.parquet *", "train|test",
                            "a copy of yifanzhang114/MM-RLHF-RewardBench"),
    "rewardbench": (rewardbench_row, "filtered.json filtered-*.parquet anthropic_h[eh]*,shp*,summarize* *",
                    "filtered|anthropic_helpful anthropic_hhh shp summarize", "allenai/reward-bench"),
    "rm-bench": (rm_bench_row, "total_dataset.json train-*.parquet *", "train|test", "the data/ folder of THU-KEG/RM-Bench")}


# ---------------------------------------------------------------------------------------------------------------------------------
# 3  Benchmarks


def fields(row) -> dict:
    """The fields of a row, or of its JSON, that are not null: to a benchmark a null is a missing field, and `need` names it."""
    row = from_json(row)
    if not isinstance(row, dict):
        raise ValueError(f"found {type(row).__name__}, want a JSON object")
    return {name: value for name, value in row.items() if value is not None}


def read_benchmark(name: str, sources, on_bad_row: str) -> list:
    """Every row as (where it stands, Comparison); with on_bad_row "skip" a bad one as (where, the ValueError that says what is wrong)."""
    if name == "comparisons" and not sources:
        return [(f"drawn comparison {i + 1}", c) for i, c in enumerate(synthetic(DRAWN, held_out=True))]
    if name == "comparisons":
        makers = ((f"{file.file} row {i + 1}", lambda: file[i]) for file in map(read_comparisons, sources) for i in range(len(file)))
    elif not sources:
        raise BadRow(f"--data is missing: where {name} lies. Take {BENCHMARKS[name][3]}")
    else:
        to_comparison, patterns, splits, _ = BENCHMARKS[name]
        # the part that shp-00000-of-00001.parquet holds is shp
        makers = ((f"{file} row {number}", lambda: to_comparison(fields(row), file.parent, file.stem.split("-0")[0]))
                  for source in sources for file, number, row in read_rows(source, patterns, splits, streaming=False))
    rows = []
    for where, make in makers:  # called at once: a later `make` stands for a later row, and so would this one
        try:
            rows.append((where, make()))
        except (ValueError, TypeError, AttributeError) as error:
            error = error if isinstance(error, BadRow) else BadRow(f"{where}: {error}")
            if on_bad_row == "stop":
                raise error from None
            rows.append((where, error))
    if not rows:
        raise BadRow(f"{' '.join(sources)} holds no row")
    if not any(isinstance(comparison, Comparison) for _, comparison in rows):
        raise BadRow(f"not one of {len(rows)} rows can be used; the first: {rows[0][1]}")
    return rows


SHARED = 16  # responses that go with one prompt at most: with thousands it would not fit a pack


def share_prompts(rows) -> tuple[list, list, list]:
    """Comparisons in which a prompt with its images occurs once for all its rows; where each stands; and of each row
    (its comparison, the places of its responses in it, a number that rows of one prompt share), None for a bad row."""
    prompts, wheres, places, known, numbers = [], [], [], {}, {}
    for where, row in rows:
        if not isinstance(row, Comparison):
            places.append(None)
            continue
        key = (json.dumps(row.prompt), pictures_of(row))
        at = known.get(key)
        if at is None or len({*prompts[at].responses, *row.responses}) > max(SHARED, len(row.responses)):
            at = known[key] = len(prompts)
            prompts.append(replace(row, responses=[], pairs=[]))
            wheres.append(where)
        responses = prompts[at].responses  # a text that occurs twice is scored once
        responses += [r for r in dict.fromkeys(row.responses) if r not in responses]
        places.append((at, [responses.index(r) for r in row.responses], numbers.setdefault(key, len(numbers))))
    return prompts, wheres, places


# ---------------------------------------------------------------------------------------------------------------------------------
# 4  Metrics of prediction rows {"id", "category", "prompt", "pairs", "rewards"}; `prompt` is a number that rows of one prompt share


def tally(rows, groups=lambda row, p: (row["category"] or "all",)) -> dict:
    """{group: {prompt: [pairs right, pairs]}}; groups(row, p) names the groups in which the row's p-th pair counts. A tie is wrong."""
    out = {}
    for row in rows:
        for p, (w, l) in enumerate(row["pairs"]):
            for group in groups(row, p):
                cell = out.setdefault(group, {}).setdefault(row["prompt"], [0, 0])
                cell[0] += row["rewards"][w] > row["rewards"][l]
                cell[1] += 1
    return out


def metrics(benchmark: str, rows, grouping: str = "official") -> tuple[dict, dict]:
    """A tally, and {figure: {group: weight}} in the order of the published columns: the weighted mean of its groups' shares."""
    if benchmark == "vl-rewardbench":
        names = ("general", "hallucination", "reasoning")
        return (tally(rows, lambda row, p: (vl_group(row["id"], grouping), "all")),
                {name: {name: 1} for name in names} | {"overall": {"all": 1}, "macro": dict.fromkeys(names, 1)})
    if benchmark == "multimodal-rewardbench":
        return (tally(rows, lambda row, p: {row["category"], row["category"].split("/")[0], "all"}),
                {"overall": {"all": 1}} | {name: {name: 1} for name in SEVEN} |
                {"mean of 7": dict.fromkeys(SEVEN, 1), "bias": {"safety/bias": 1}, "toxicity": {"safety/toxicity": 1}})
    if benchmark == "mm-rlhf-rewardbench":
        by_id = {}
        for row in rows:
            by_id.setdefault(row["id"], []).append(row)
        right = [all(row["rewards"][w] > row["rewards"][l] for row in of_id for w, l in row["pairs"]) for of_id in by_id.values()]
        whole = [of_id[0] | {"pairs": [[0, 1]], "rewards": [r, 0]} for r, of_id in zip(right, by_id.values())]  # Acc+: all pairs of an id
        return (tally(rows, lambda row, p: (row["category"], "Acc")) | tally(whole, lambda row, p: (row["category"] + "+", "Acc+")),
                {name: {name: 1} for name in (*MM_RLHF_CATEGORIES, "Acc", "Acc+", *(name + "+" for name in MM_RLHF_CATEGORIES))})
    if benchmark == "rewardbench":
        shares = {name: {subset: w / sum(subsets.values()) for subset, w in subsets.items()} for name, subsets in SECTIONS.items()}
        double = {subset: 2 * w for name, subsets in shares.items() if name != "Prior Sets" for subset, w in subsets.items()}
        return tally(rows), shares | {"score": double, "score with prior sets": double | shares["Prior Sets"]}
    if benchmark == "rm-bench":  # pair 3 i + j: chosen style i meets rejected style j, of concise, plain, markdown
        level = ["normal", "hard", "hard", "easy", "normal", "hard", "easy", "easy", "normal"]  # hard: the wrong one is the fancier
        return (tally(rows, lambda row, p: ((row["category"], level[p]),)),
                {d: {(d, l): 1 for l in LEVELS} for d in DOMAINS} | {l: {(d, l): 1 for d in DOMAINS} for l in LEVELS} |
                {"overall": {(d, l): 1 for d in DOMAINS for l in LEVELS}})
    cells = tally(rows, lambda row, p: (row["category"] or "no category", "accuracy"))
    largest = sorted(cells, key=lambda name: -sum(n for _, n in cells[name].values()))[:13]  # a table with more columns is no table
    return cells, {name: {name: 1} for name in (*sorted({*largest} - {"accuracy"}), "accuracy")}


# ---------------------------------------------------------------------------------------------------------------------------------
# 5  Published rows (Tables 8 to 10 of the paper, as printed) and what keeps them from being on one footing

PUBLISHED = {"vl-rewardbench": """
GPT-4o (2024-08-06) [a]             | 49.10 67.60 70.50 65.80 62.40
Claude-3.7-Sonnet [c]               | 68.08 70.70 60.81 66.31 66.53
IXC-2.5-Reward 7B [a]               | 84.70 62.50 62.90 65.80 70.00
MM-RLHF-Reward 7B [b]               | 45.04 50.45 57.55 50.15 51.01
R1-Reward 7B [b]                    | 63.84 85.71 64.78 71.92 71.44
BaseReward (Qwen2-VL) 7B [b d e]    | 62.12 84.82 82.64 78.53 76.53
BaseReward (Qwen2.5-VL) 7B [b d]    | 68.55 92.19 81.82 82.16 80.85
BaseReward (ensemble) 7B+7B [b d e] | 71.67 91.74 85.33 84.41 82.91""", "multimodal-rewardbench": """
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

NOTES = {"vl-rewardbench": [
    "[a] grouped as the official script does: 183 general, 749 hallucination, 318 reasoning.",
    "[b] grouped as R1-Reward's script does: 484, 448, 318 (--grouping paper).   [c] fits neither grouping.",
    "[d] printed with two columns exchanged: 318 rows stand under general, 484 under reasoning.   [e] scored on 1,225 of the rows."],
    "multimodal-rewardbench": [
    "[a] overall is the mean of the seven columns: compare with `mean of 7`. Without a mark it is the average over all rows.",
    "[b] overall fits neither: from the columns, the average over 4,711 rows is 68.6 and 73.8."],
    "mm-rlhf-rewardbench": [
    "[a] mcq, long, short are no fractions of 42, 37, 34 pairs; 40/42 = 95.24, 36/37 = 97.30, 32/34 = 94.12 give the printed Acc."]}


def footing(benchmark: str, grouping: str) -> list[str]:
    """Which published rows this model's may be laid beside."""
    if benchmark != "vl-rewardbench":
        return NOTES.get(benchmark, [])
    like, unlike, other = {"official": ("[a]", "[b] and [c]", "paper"),
                           "paper": ("[b] (mind [d] and [e])", "[a] and [c]", "official")}[grouping]
    return [f"Grouping: {grouping}. This model's row compares in every column with rows {like}, in overall alone with {unlike}; "
            f"--grouping {other} for the others."] + NOTES[benchmark]


# ---------------------------------------------------------------------------------------------------------------------------------
# 6  Figures with their intervals


def bootstrap(sums: torch.Tensor, statistic, draws: int = 1000) -> list[list[float]]:
    """[value, low, high] of every number that `statistic` makes of the column sums, with the middle 95% over prompts drawn anew.

    sums (prompts, columns). Prompts are drawn, not pairs: the pairs of one prompt tend to be right or wrong together.
    """
    generator, drawn, block = torch.Generator().manual_seed(0), [], 50  # in blocks: 1,000 small products would cost more
    for _ in range(draws // block):
        prompts = torch.randint(len(sums), (block, len(sums)), generator=generator)
        counts = torch.zeros(block, len(sums)).double().scatter_add_(1, prompts, torch.ones(prompts.shape).double())
        drawn.append(statistic(counts @ sums))  # (block, columns) -> (block, numbers)
    bounds = torch.nanquantile(torch.cat(drawn), torch.tensor([0.025, 0.975]).double(), dim=0)  # nan: a group was not drawn at all
    return torch.cat([statistic(sums.sum(dim=0)[None]), bounds]).T.tolist()


def figures(cells: dict, wanted: dict) -> dict:
    """{figure: {"value", "low", "high" in percent, "n"}}; a figure is left out when one of its groups was not run."""
    wanted = {name: weights for name, weights in wanted.items() if weights.keys() <= cells.keys()}
    column = {group: c for c, group in enumerate(cells)}
    line = {prompt: i for i, prompt in enumerate(sorted({prompt for cell in cells.values() for prompt in cell}))}
    sums, weight = torch.zeros(len(line), 2, len(cells)).double(), torch.zeros(len(wanted), len(cells)).double()
    for group, cell in cells.items():
        for prompt, counts in cell.items():
            sums[line[prompt], :, column[group]] = torch.tensor(counts).double()
    for f, weights in enumerate(wanted.values()):
        for group, w in weights.items():
            weight[f, column[group]] = w / sum(weights.values())

    def statistic(total):
        share = total[:, :len(cells)] / total[:, len(cells):]
        return torch.where(weight > 0, 100 * weight * share[:, None], 0).sum(dim=2)

    found = bootstrap(sums.flatten(1), statistic) if wanted else []
    return {name: {"value": value, "low": low, "high": high, "n": sum(n for group in weights for _, n in cells[group].values())}
            for (name, weights), (value, low, high) in zip(wanted.items(), found)}


# ---------------------------------------------------------------------------------------------------------------------------------
# 7  Beyond accuracy: does it look, does it count words, is it as often right as it says


def looking(rows) -> dict:
    """Accuracy on rows with images: as they are, without them, with those of another prompt. Alike in all three: it never looked."""
    names = {"images as they are": "rewards", "images removed": "removed", "images shuffled": "shuffled"}
    cells = tally([row | {"rewards": row[key], "category": name} for row in rows if row.get("shuffled") for name, key in names.items()])
    return figures(cells, {name: {name: 1} for name in cells})


def length_bias(rows) -> dict:
    """Accuracy where length cannot help, the share of pairs whose longer response people and the model chose, and a correlation.

    Lengths are in characters; matched are those within 10%. The correlation is within rows: of reward and log(1 + length), each less
    its mean over the row's responses, since only differences within a row mean something.
    """
    def groups(row, p):
        w, l = (row["length"][i] for i in row["pairs"][p])
        return ("length-matched pairs",) if abs(w - l) <= 0.1 * max(w, l) else ()

    def prefers_longer(who):  # as if length were the preference, or the reward
        parts = [row | {"category": f"{who} chose the longer",
                        "pairs": [p for p in row["pairs"] if len({row["length"][i] for i in p}) == 2]} for row in rows]
        return [row | {"rewards": row["length"]} if who == "people" else
                row | {"pairs": [sorted(p, key=lambda i: -row["length"][i]) for p in row["pairs"]]} for row in parts]

    cells = tally(rows, groups) | tally(prefers_longer("people") + prefers_longer("the model"))
    sums = {}
    for row in rows:
        r, l = torch.tensor(row["rewards"]).double(), torch.tensor(row["length"]).double().log1p()
        r, l = r - r.mean(), l - l.mean()
        sums[row["prompt"]] = sums.get(row["prompt"], 0) + torch.stack([r @ l, r @ r, l @ l])
    ((value, low, high),) = bootstrap(torch.stack(list(sums.values())), lambda s: s[:, :1] / (s[:, 1:2] * s[:, 2:]).sqrt())
    found = figures(cells, {name: {name: 1} for name in cells})
    if value == value:  # not 0/0: some row has responses of different lengths and rewards
        found["correlation of reward and length"] = {"value": value, "low": low, "high": high,
                                                     "n": sum(len(row["rewards"]) for row in rows)}
    return found


def calibration(rows, bins: int = 5) -> dict:
    """How often the response with the higher reward is the chosen one, by the probability sigmoid(|margin|) that the model gives it."""
    def groups(row, p):
        w, l = (row["rewards"][i] for i in row["pairs"][p])
        b = min(int((1 / (1 + math.exp(-abs(w - l))) - 0.5) * 2 * bins), bins - 1)
        return (f"right where sigmoid(margin) is {0.5 + b / bins / 2:.1f} to {0.5 + (b + 1) / bins / 2:.1f}",)

    cells = tally(rows, groups)
    return figures(cells, {name: {name: 1} for name in sorted(cells)})


# ---------------------------------------------------------------------------------------------------------------------------------
# 8  One model, or several as one (section 4.7)


def can_see(directory: str) -> bool:
    for name in ("reward_config.json", "config.json"):
        if not (Path(directory) / name).is_file():
            raise BadRow(f"--model {directory} is not a saved reward model: it has no {name}. Give the --out folder of train.py")
    return "vision_config" in json.loads((Path(directory) / "config.json").read_text())


def participants(sees: list[bool], has_images: bool, route: bool) -> list[int]:
    """Members that score a prompt: with images those that see; without, all, or with `route` the text-only ones alone (section 4.5)."""
    return [m for m, s in enumerate(sees) if (s if has_images else not (route and s))]


def weigh(rule: str, members: list[int], held: list[dict], validation: list) -> dict:
    """{member: weight} for one kind of prompt, from the validation pairs all its members can read. held: {member: rewards} of each row."""
    common = [(rewards, c.pairs) for rewards, c in zip(held, validation) if all(rewards.get(m) for m in members)]
    margins = [[rewards[m][w] - rewards[m][l] for rewards, pairs in common for w, l in pairs] for m in members]
    if len(members) < 2 or rule == "average":
        rule, margins = "average", [[0.0]] * len(members)
    elif not margins[0]:
        raise BadRow("--validation holds no pair that all members can read and score")
    return dict(zip(members, ensemble_weights(torch.tensor(margins), rule).tolist())) if members else {}


def ranks(k: int, pairs) -> list[int]:
    """Each response's rank, 1 the best: one more than the lowest-placed of those that beat it."""
    out = [1] * k
    for _ in range(k):
        for winner, loser in pairs:
            out[loser] = max(out[loser], out[winner] + 1)
    return out


def fingerprint(directory: str, comparisons: list, *settings) -> str:
    """The journal of an interrupted run is good only for the same weights, rows, images, code and settings, so they are its name."""
    def stamp(file):
        return f"{file} {os.stat(file).st_size} {os.stat(file).st_mtime_ns}" if os.path.exists(file) else f"{file} is not there"

    code = [Path(__file__).with_name(name) for name in ("model.py", "data.py", "evaluate.py")]
    digest = hashlib.sha256(repr((settings, torch.__version__, transformers.__version__)).encode())
    for file in (*code, *sorted(file for file in Path(directory).glob("*.*") if file.is_file())):
        digest.update(stamp(file).encode())
    for c in comparisons:
        digest.update(json.dumps([c.prompt, c.responses]).encode())
        for image in c.images:
            digest.update(image if isinstance(image, bytes) else stamp(image).encode() if isinstance(image, (str, Path)) else b"drawn")
    return digest.hexdigest()[:16]


def score(cfg: "Config", world: World, out: Path) -> tuple[list[dict], list, dict]:
    """(prediction rows, the benchmark's rows, the members' weights on prompts without and with images)."""
    rows = read_benchmark(cfg.benchmark, cfg.data, cfg.on_bad_row)
    prompts, wheres, shared = share_prompts(rows)
    sees = [can_see(directory) for directory in cfg.model]
    if cfg.route and all(sees):
        raise BadRow("--route sends prompts without images to a text-only model, and every --model can see; add a text-only one")
    visual = [i for i, c in enumerate(prompts) if c.images]
    pack_tokens = cfg.pack_tokens or (16384 if world.device.type == "cuda" else 1024)
    if visual and not any(sees) and cfg.on_bad_row == "stop":
        raise BadRow(f"{wheres[visual[0]]}: the prompt has an image and every --model is text-only; add one that sees, "
                     "or skip such rows with --on_bad_row skip")
    validation = []
    if len(cfg.model) > 1 and cfg.ensemble != "average":
        if not cfg.validation:
            raise BadRow(f"--ensemble {cfg.ensemble} weighs the members by how they do on held-out pairs: give --validation FOLDER")
        validation = read_benchmark("comparisons", [cfg.validation], "stop")
    on = {has_images: participants(sees, has_images, cfg.route) for has_images in sorted({bool(c.images) for c in prompts})}
    for members in on.values():
        readable = [c for _, c in validation if {*members} <= {*participants(sees, bool(c.images), False)}]
        if len(members) > 1 and cfg.ensemble != "average" and not any(c.pairs for c in readable):
            raise BadRow("--validation holds no pair that all members can read: add rows without images, to weigh the text-only model by")

    # everything a member may have to score, as (where it stands, comparison, members that score it)
    work = {("rewards", i): (wheres[i], c, on[bool(c.images)]) for i, c in enumerate(prompts)}
    if cfg.probe:
        work |= {("removed", i): (wheres[i], remove_images(prompts[i]), on[True]) for i in visual}
        work |= {("shuffled", i): (wheres[i], c, on[True]) for i, c in zip(visual, shuffle_images(prompts))}
    work |= {("held", i): (where, c, participants(sees, bool(c.images), False)) for i, (where, c) in enumerate(validation)}
    scored = {key: {} for key in work}  # {member: K rewards}
    (out / ".partial").mkdir(parents=True, exist_ok=True)
    for m, directory in enumerate(cfg.model):  # one after another, so that only one is in memory
        keys = [key for key, (_, _, members) in work.items() if m in members]
        places, part = [work[key][0] for key in keys], [work[key][1] for key in keys]
        model = RewardModel.from_pretrained(directory).to(world.device)
        journal = out / ".partial" / fingerprint(directory, part, pack_tokens, cfg.on_bad_row, CHUNK, world.device.type)
        for key, values in zip(keys, score_all(model, part, world, pack_tokens, Path(directory).name, cfg.on_bad_row, journal, places)):
            if values and not all(map(math.isfinite, values)):
                raise BadRow(f"{work[key][0]}: {directory} gives the rewards {values}; a model that broke in training?")
            scored[key][m] = values
        del model
    held = [scored["held", i] for i in range(len(validation))]
    weights = {has_images: weigh(cfg.ensemble, members, held, [c for _, c in validation]) for has_images, members in on.items()}

    predictions = []
    for number, ((where, c), place) in enumerate(zip(rows, shared), start=1):
        if place is None or not scored["rewards", place[0]] or None in scored["rewards", place[0]].values():
            problem = c if place is None else f"{where}: no member can read the prompt, or its image cannot be used"
            predictions.append({"row": number, "error": str(problem)})
            continue
        at, mine, prompt = place
        row = {"row": number, "id": c.id, "category": c.category, "prompt": prompt, "images": len(c.images),
               "pairs": [list(pair) for pair in c.pairs], "rank": ranks(len(c.responses), c.pairs), "length": [len(r) for r in c.responses]}
        for name in ("rewards", "removed", "shuffled"):
            members = scored.get((name, at), {})
            if members and None not in members.values():  # a shuffled picture may be another row's broken one
                row[name] = [sum(weights[bool(c.images)][m] * values[i] for m, values in members.items()) for i in mine]
        if len(cfg.model) > 1:
            row["members"] = {cfg.model[m]: [values[i] for i in mine] for m, values in scored["rewards", at].items()}
        predictions.append(row)
    named = {has_images: {cfg.model[m]: w for m, w in of.items()} for has_images, of in weights.items()}
    return predictions, rows, {"without images": named.get(False, {}), "with images": named.get(True, {})}


# ---------------------------------------------------------------------------------------------------------------------------------
# 9  What it leaves behind


def receipt(cfg: "Config", world: World, seconds: float) -> dict:
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    gpu = world.device.type == "cuda"
    start = f"torchrun --nproc_per_node {world.world_size}" if world.world_size > 1 else "python"
    return {"benchmark": cfg.benchmark, "model": cfg.model, "ensemble": cfg.ensemble,
            "command": f"{start} evaluate.py {shlex.join(sys.argv[1:])}", "commit": commit or "unknown",
            "date": time.strftime("%Y-%m-%d"), "ranks": world.world_size, "seconds": round(seconds, 1),
            "hardware": f"{world.world_size} x {torch.cuda.get_device_name()}" if gpu else f"{os.cpu_count()} CPU cores",
            "torch": torch.__version__, "transformers": transformers.__version__}


def summarise(benchmark: str, predictions: list[dict], grouping: str) -> dict:
    """Everything the tables show, from the prediction rows alone."""
    rows, lost = ([row for row in predictions if ("error" in row) == bad] for bad in (False, True))
    return {"rows": len(predictions), "missing": len(lost), "first_missing": lost[0]["error"] if lost else "", "grouping": grouping,
            "prompts": len({row["prompt"] for row in rows}), "pairs": sum(len(row["pairs"]) for row in rows),
            "ties": sum(row["rewards"][w] == row["rewards"][l] for row in rows for w, l in row["pairs"]),
            "figures": figures(*metrics(benchmark, rows, grouping)), "beyond": looking(rows) | length_bias(rows) | calibration(rows)}


def tables(summary: dict, benchmark: str, name: str) -> tuple[str, list[list[str]], list[list[str]]]:
    """The first line; the published rows and this model by rising main figure; the rest. This model's row is three: value, interval, n."""
    n, missing = summary["rows"], summary["missing"]
    lost = f"{missing} OF {n} ROWS ARE MISSING ({summary['first_missing']}); the others: " if missing else ""
    first = (f"{benchmark}: {lost}{n - missing:,} rows, {summary['prompts']:,} prompts, {summary['pairs']:,} pairs, "
             f"{summary['ties']:,} ties")
    found, (_, wanted) = summary["figures"], metrics(benchmark, [])
    names = list(wanted if benchmark != "comparisons" else found)
    main = next(name for name in ("overall", "Acc", "score", "accuracy") if name in names)
    ours = [[name, *(f"{found[f]['value']:.2f}" if f in found else "" for f in names)],
            ["95% interval", *(f"{found[f]['low']:.1f} to {found[f]['high']:.1f}" if f in found else "" for f in names)],
            ["n", *(f"{found[f]['n']:,}" if f in found else "" for f in names)]]
    printed = [line.split("|") for line in PUBLISHED.get(benchmark, "").split("\n")[1:]]
    blocks = [(float(values.split()[names.index(main)]), [[row.strip(), *values.split()]]) for row, values in printed]
    blocks = sorted(blocks + [(found[main]["value"] if main in found else -1.0, ours)], key=lambda block: block[0])
    main_table = [["model", *names]] + [row + [""] * (len(names) + 1 - len(row)) for _, block in blocks for row in block]
    rest = [["measure", "value", "95% interval", "n"]]
    for measure, f in summary["beyond"].items():
        digits = 2 if "correlation" in measure else 1
        rest.append([measure, f"{f['value']:.{digits}f}", f"{f['low']:.{digits}f} to {f['high']:.{digits}f}", f"{f['n']:,}"])
    return first, main_table, rest


def markdown(table: list[list[str]]) -> str:
    """Aligned, so that it reads as well in a terminal."""
    widths = [max(len(row[c]) for row in table) for c in range(len(table[0]))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in table]
    rule = "|" + "|".join("-" * (w + 1) + (":" if c else "-") for c, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


PAGE = string.Template("""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #18794e; --bad: #c62a2f; --link: #2563eb }
@media (prefers-color-scheme: dark) { :root { --good: #4cc38a; --bad: #ff6369 } }
* { box-sizing: border-box } body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.2rem; max-width: 1200px }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
.soft { opacity: .75; font-size: .87rem; overflow-wrap: anywhere }
.warn { color: var(--bad); font-weight: 600 } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem }
td, th { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left } tr.ours td { background: var(--soft) }
tr.value td { font-weight: 700; border-bottom: 0 }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin: .6rem 0 1rem } button { font: inherit; font-size: .87rem; padding: .2rem .7rem;
border: 1px solid var(--line); border-radius: 1rem; background: none; color: inherit; cursor: pointer }
button[aria-pressed=true] { background: var(--link); border-color: var(--link); color: #fff }
article { border: 1px solid var(--line); border-radius: .6rem; padding: .9rem; margin-bottom: .9rem; display: grid; gap: .8rem;
grid-template-columns: 15rem minmax(0, 1fr) } article.blind { grid-template-columns: minmax(0, 1fr) } article[hidden] { display: none }
article img { max-width: 100%; border-radius: .3rem; display: block; margin-bottom: .3rem }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: .7rem; margin-top: .8rem }
.answers > div { border-top: 3px solid; padding-top: .4rem; min-width: 0 }
.answers .chosen { border-color: var(--good) } .answers .rejected { border-color: var(--bad) }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20rem; overflow-y: auto }
.about { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .87rem; margin-bottom: .3rem } .about b { color: var(--bad) }
@media (max-width: 700px) { body { padding: .8rem } article, .answers { grid-template-columns: minmax(0, 1fr) }
article img { max-height: 16rem } td:first-child { white-space: normal; min-width: 7rem } }
</style><h1>$title</h1><p class="$warn">$first</p><div class="scroll">$main</div>$notes
<h2>Does it look, does it count words, is it as often right as it says</h2><div class="scroll">$rest</div>
<h2>The worst mistakes first</h2><p class="soft">$shown</p><nav>$filters</nav>$cards<p class="soft">$receipt</p><script>
const show = name => { document.querySelectorAll("article").forEach(a => a.hidden = name && a.dataset.category != name);
  document.querySelectorAll("nav button").forEach(b => b.setAttribute("aria-pressed", b.dataset.category == name)) };
document.querySelectorAll("nav button").forEach(b => b.onclick = () => { location.hash = encodeURIComponent(b.dataset.category) });
(onhashchange = () => show(decodeURIComponent(location.hash.slice(1))))();
</script></html>
""")


def thumbnails(source) -> str:
    """The picture itself inside <img>, as a JPEG of at most 448 pixels; of a video four frames."""
    out = []
    for image in open_frames(source, 4) if is_video(source) else [open_image(source)]:
        image.thumbnail((448, 448))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=82)
        out.append(f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">')
    return "".join(out)


def html_table(table: list[list[str]], ours: str = "") -> str:
    at = [row[0] for row in table].index(ours) if ours else len(table)  # the first of three lines
    kinds = {at: "ours value", at + 1: "ours", at + 2: "ours"}
    return "<table>" + "".join(f'<tr class="{kinds.get(i, "")}">' + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
                               for i, row in enumerate(table) for tag in ["td" if i else "th"]) + "</table>"


def report(summary: dict, facts: dict, predictions: list[dict], rows: list, worst: int, name: str) -> str:
    """One page that needs no network: the tables, then the pairs with the most negative margin."""
    wrong = sorted((p["rewards"][w] - p["rewards"][l], i, w, l) for i, p in enumerate(predictions) if "error" not in p
                   for w, l in p["pairs"] if p["rewards"][w] <= p["rewards"][l])
    cards, counts, say = [], {}, html.escape
    for margin, i, w, l in wrong[:worst]:
        p, c = predictions[i], rows[i][1]
        category = say(p["category"] or "all")
        counts[category] = counts.get(category, 0) + 1
        messages, pictures = to_messages(c.prompt, list(c.images)), "".join(map(thumbnails, c.images))
        text = "\n\n".join((f"{m['role']}: " if len(messages) > 1 else "") + MARK.sub("", m["content"]).strip() for m in messages)
        answers = "".join(f'<div class="{kind}"><div class="about"><span>{kind}</span><span>reward {p["rewards"][k]:.3f}</span></div>'
                          f'<div class="text">{say(c.responses[k])}</div></div>' for kind, k in (("chosen", w), ("rejected", l)))
        about = f"<b>margin {margin:.3f}</b><span>{category}</span><span>{say(p['id'])}</span><span>row {p['row']}</span>"
        cards.append(f'<article class="{"" if pictures else "blind"}" data-category="{category}">'
                     f'{f"<div>{pictures}</div>" if pictures else ""}<div><div class="about">{about}</div>'
                     f'<div class="text">{say(text)}</div><div class="answers">{answers}</div></div></article>')
    buttons = [("", "all", len(cards)), *((c, c, n) for c, n in sorted(counts.items()))]
    first, main, rest = tables(summary, facts["benchmark"], name)
    return PAGE.substitute(
        title=say(f"{name} on {facts['benchmark']}"), first=say(first), warn="warn" if summary["missing"] else "",
        notes="".join(f'<p class="soft">{say(note)}</p>' for note in footing(facts["benchmark"], summary["grouping"])),
        main=html_table(main, name), rest=html_table(rest), cards="".join(cards), receipt=say(receipt_line(facts)),
        shown=f"{len(cards)} of the {len(wrong):,} wrong among {summary['pairs']:,} pairs. margin = reward(chosen) - reward(rejected)",
        filters="".join(f'<button data-category="{value}">{label} {n}</button>' for value, label, n in buttons))


def receipt_line(facts: dict) -> str:
    return f"{facts['command']} · commit {facts['commit']} · {facts['date']} · {facts['hardware']} · {facts['seconds']:.0f} s"


# ---------------------------------------------------------------------------------------------------------------------------------
# 10  Curves


def draw_curves(file, title: str, panels: list) -> None:
    """An SVG picture with one panel per entry of `panels`: (heading, {name: [(x, y), ...]}, {name: y of a dashed line})."""
    colours, width, height, gap = ("#1f5fbf", "#d2691e", "#2e8b57", "#8b3a8b", "#555555", "#b22222"), 380, 220, 60
    size = (len(panels) * (width + gap) + gap, height + 110)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" viewBox="0 0 {size[0]} {size[1]}" '
           f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
           f'<text x="{gap}" y="24" font-size="15" font-weight="bold">{title}</text>']
    for number, (heading, series, lines) in enumerate(panels):
        left, top = gap + number * (width + gap), 60
        points = [p for line in series.values() for p in line if p[1] == p[1] and abs(p[1]) < 1e30]
        xs, ys = [p[0] for p in points] or [0, 1], [p[1] for p in points] + list(lines.values()) or [0, 1]
        x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
        x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

        def place(x, y):
            return left + (x - x0) / (x1 - x0) * width, top + height - (y - y0) / (y1 - y0) * height

        out.append(f'<text x="{left}" y="{top - 10}">{heading}</text>'
                   f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#ccc"/>')
        for value, y in ((y1, top + 4), (y0, top + height)):
            out.append(f'<text x="{left - 6}" y="{y}" text-anchor="end" fill="#555">{value:.3g}</text>')
        for value, x, anchor in ((x0, left, "start"), (x1, left + width, "end")):
            out.append(f'<text x="{x}" y="{top + height + 16}" text-anchor="{anchor}" fill="#555">{value:g}</text>')
        for name, y in lines.items():
            (ax, ay), (bx, _) = place(x0, y), place(x1, y)
            out.append(f'<line x1="{ax:.1f}" y1="{ay:.1f}" x2="{bx:.1f}" y2="{ay:.1f}" stroke="#999" stroke-dasharray="4 3"/>'
                       f'<text x="{bx:.1f}" y="{ay - 4:.1f}" text-anchor="end" fill="#777">{name}</text>')
        for c, (name, line) in enumerate(series.items()):
            path = " ".join("{:.1f},{:.1f}".format(*place(*p)) for p in line if p in points)
            colour = colours[c % len(colours)]
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                       f'<text x="{left + 120 * (c % 3)}" y="{top + height + 32 + 14 * (c // 3)}" fill="{colour}">{name}</text>')
    write_text(Path(file), "\n".join(out) + "\n</svg>\n")


# ---------------------------------------------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class Config:
    model: list[str] = HfArg(default_factory=list, help="saved reward models (the --out of train.py); several are an ensemble")
    benchmark: str = HfArg(default="comparisons", help=f"comparisons, {', '.join(BENCHMARKS)}")
    data: list[str] = HfArg(default_factory=list, help="file, folder or hub id; comparisons: folders, or none for drawn pictures")
    out: str = HfArg(default="", help="folder for the results; none: evaluation/BENCHMARK in the (first) model's folder")
    grouping: str = HfArg(default="official", help="vl-rewardbench: official, or paper as BaseReward's and R1-Reward's rows are grouped")
    ensemble: str = HfArg(default="average", help="average, or by accuracy or confidence on --validation")
    validation: str = HfArg(default="", help="folder of held-out comparisons to weigh the members by (the paper takes 1,000 pairs)")
    route: bool = HfArg(default=False, help="prompts without images go to the text-only members alone")
    probe: bool = HfArg(default=True, help="score twice more, with images removed and shuffled")
    rescore: str = HfArg(default="", help="a predictions.jsonl: every table from it, without a model; with --data also report.html")
    worst: int = HfArg(default=100, help="mistakes shown in report.html")
    on_bad_row: str = HfArg(default="stop", help="stop, or skip and say how many rows are missing")
    pack_tokens: int = HfArg(default=0, help="tokens in a pack; 0: 16,384 on a GPU, 1,024 on a CPU, which gains nothing from long rows")


def read_predictions(file: Path) -> tuple[dict, list[dict]]:
    try:
        facts, *predictions = [json.loads(line) for line in file.read_text().splitlines()]
        return facts | {"benchmark": facts["benchmark"], "model": facts["model"]}, [row | {"row": row["row"]} for row in predictions]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRow(f"--rescore {file} is not the predictions.jsonl of an earlier run: {type(error).__name__} {error}") from None


def main(cfg: Config) -> None:
    allowed = {"benchmark": ("comparisons", *BENCHMARKS), "grouping": ("official", "paper"), "on_bad_row": ("stop", "skip"),
               "ensemble": ("average", "accuracy", "confidence")}
    for name, values in allowed.items():
        if getattr(cfg, name) not in values:
            raise BadRow(f"--{name} {getattr(cfg, name)!r}: want one of {', '.join(values)}")
    if not cfg.model and not cfg.rescore:
        raise BadRow("--model DIR is missing: a saved reward model, such as runs/default after train.py")

    # 1  predictions: read, or made
    world, started, rows = setup(), time.time(), []
    if cfg.rescore:
        facts, predictions = read_predictions(Path(cfg.rescore))
        out = Path(cfg.out or Path(cfg.rescore).parent)
        rows = read_benchmark(facts["benchmark"], cfg.data, cfg.on_bad_row) if cfg.data else []
        if rows and (len(rows) != len(predictions) or any("id" in p and isinstance(c, Comparison) and p["id"] != c.id
                                                          for p, (_, c) in zip(predictions, rows))):
            raise BadRow(f"--data holds {len(rows)} rows, {cfg.rescore} {len(predictions)}, or others: not the same benchmark")
    else:
        out = Path(cfg.out or Path(cfg.model[0]) / "evaluation" / (cfg.benchmark + "-ensemble" * (len(cfg.model) > 1)))
        predictions, rows, weights = score(cfg, world, out)
        facts = receipt(cfg, world, time.time() - started) | {"weights": weights}
        if world.rank == 0:  # first of all, so that nothing below can lose them
            write_text(out / "predictions.jsonl", "\n".join(json.dumps(row) for row in [facts, *predictions]) + "\n")
            shutil.rmtree(out / ".partial", ignore_errors=True)
    world.close()
    if all("error" in row for row in predictions):
        raise BadRow(f"not one of {len(predictions)} rows could be scored; the first: {predictions[0]['error']}")
    if world.rank > 0:
        return

    # 2  tables
    name, benchmark = " + ".join(Path(model).name for model in facts["model"]), facts["benchmark"]
    summary = summarise(benchmark, predictions, cfg.grouping)
    first, main_table, rest = tables(summary, benchmark, name)
    text = "\n\n".join([first, markdown(main_table), *footing(benchmark, cfg.grouping), markdown(rest), receipt_line(facts)])

    # 3  files
    files = {"summary.json": json.dumps(facts | summary, indent=1), "table.md": text}
    if rows:
        files["report.html"] = report(summary, facts, predictions, rows, cfg.worst, name)
    out.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_text(out / file, content + "\n")
    print(f"{text}\n\nwrote {', '.join(sorted([*files, *['predictions.jsonl'] * (not cfg.rescore)]))} into {out}")
    if not rows and (out / "report.html").exists():
        print("report.html there is an earlier one: --rescore makes it anew with --data")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Config, prog="evaluate.py").parse_args_into_dataclasses()[0])
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: stopped; the same command goes on from here")
