"""Where comparisons come from, and which of them a step sees (BaseReward, arXiv 2509.16127, section 4.4).

Read: to the double line, 10 minutes: a row, the order of the steps, the default run's drawn set, one published set.

    python data.py synthetic --out data/drawn --n 1000                            the drawn set as a folder (4 s)
    python data.py rlaif-v --source openbmb/RLAIF-V-Dataset --out data/rlaif-v    a published set, streamed from the hub
    python data.py vl-rewardbench --source MMInstruction/VL-RewardBench --out bench/vl-rewardbench           a benchmark
    python data.py mmpr --source MMPR-v1.2 --out data/mmpr --decontaminate bench/vl-rewardbench --hold_out 0.01
    python data.py pairs --source mine.jsonl --out data/mine --n 100              the first 100 rows of your own
    python data.py judge --source data/mine --out data/judge           its pairs as prompts for a judge (RL)
    python data.py show data/mine                                                 read a few of them as training would

Everything is a data set: a folder with `comparisons.jsonl` (one JSON object a line), `images/` and `report.json`. Three
rows as they are read, the last two in TRL's layout:

    {"prompt": "<image>\\nWhat is shown?", "images": ["images/7.png"],
     "responses": ["A bus.", "Two buses."], "pairs": [[0, 1]]}
    {"prompt": "Name a fruit.", "chosen": "Apple", "rejected": "Table"}
    {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}],
     "images": ["images/7.png"], "chosen": [{"role": "assistant", "content": "A bus."}],
     "rejected": [{"role": "assistant", "content": "Two buses."}]}

`pairs` holds (winner, loser) indices into `responses`. Optional keys: id, source, category, answer (a checkable answer,
for RL) and critiques (one text per response). Paths are relative to the file and may not leave its folder; an entry of
`images` that is a folder of frames is a video. A prompt without an <image> mark has its images in front.
"""
import argparse
import base64
import contextlib
import copy
import functools
import graphlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from model import (MARK, Comparison, check_text, frames_of, is_video, judge_pair, one_line, open_frames, open_image,
                   printable, replacing, text_of_part, to_messages)

# A row ---------------------------------------------------------------------------------------------------------------
def parse_row(row, folder: Path, needs_responses: bool = True) -> Comparison:
    """A row, native or TRL's, as a Comparison. What passes can be trained on; ValueError says what is wrong.

    With needs_responses=False an `answer` may stand in place of responses and pairs: a prompt for RL.
    >>> parse_row({"prompt": "Name a fruit.", "chosen": "Apple", "rejected": "Table"}, Path(".")).responses
    ['Apple', 'Table']"""
    prompt, responses, pairs, images = fields_of(row, needs_responses)
    images = [inside(folder, image) for image in images]
    messages = to_messages(prompt, images)  # checks roles and texts, and that the marks fit the images
    if not any(message["content"].strip() for message in messages):
        raise ValueError("the prompt is empty")
    check_responses(responses, pairs, needs_responses, is_benchmark=str(row.get("source")) in BENCHMARKS)
    return Comparison(prompt, responses, [tuple(pair) for pair in pairs], images, **optional_keys(row, responses))

# The order of the steps ----------------------------------------------------------------------------------------------
class Order:
    """Which rows of which set a step sees: a pure function of (seed, step), so a resumed run repeats and skips nothing.

    An epoch is a fresh permutation of all rows, cut into steps of equally many pairs, give or take one row's: about
    `batch_size`, rather less. Every row is in exactly one step, whatever the number of ranks. A weight of 2 shows a set
    twice an epoch, 0.5 a random half of it. pairs_of_sets: for each set, the number of pairs of its rows.
    >>> order = Order([[1, 1, 1]], [1.0], batch_size=2, seed=0)
    >>> sorted(order.step(0) + order.step(1)), order.steps(epochs=1)                    # a row is named (set, row)
    ([(0, 0), (0, 1), (0, 2)], 2)"""

    def __init__(self, pairs_of_sets, weights, batch_size: int, seed: int):
        self.sets = [(torch.as_tensor(pairs, dtype=torch.int32), w) for pairs, w in zip(pairs_of_sets, weights)]
        self.seed = seed
        self.n_rows = sum(round(weight * len(pairs)) for pairs, weight in self.sets)
        if not self.n_rows:
            raise ValueError(f"with weights of {list(weights)} no row is left to train on")
        n_pairs = sum(weight * int(pairs.sum()) for pairs, weight in self.sets)
        self.steps_in_epoch = min(math.ceil(n_pairs / batch_size), self.n_rows)
        self.epoch = functools.lru_cache(maxsize=1)(self.draw_epoch)

    def draw_epoch(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The names (n_rows, 2) of an epoch in their order, and where in them each step starts."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        names, counts = [], []
        for number, (pairs, weight) in enumerate(self.sets):
            n = len(pairs)
            rows = torch.cat([torch.randperm(n, generator=generator) for _ in range(math.ceil(weight))])
            rows = rows[:round(weight * n)]
            names.append(torch.stack([torch.full_like(rows, number), rows], dim=1))
            counts.append(pairs[rows])
        shuffle = torch.randperm(self.n_rows, generator=generator)
        names, counts = torch.cat(names)[shuffle], torch.cat(counts)[shuffle]
        steps = torch.arange(self.steps_in_epoch)  # one starts at the first row that has its share of pairs before it
        starts = torch.searchsorted(counts.cumsum(0) - counts, steps * int(counts.sum()) // len(steps))
        starts = (starts - steps).cummax(0).values + steps  # and each has a row, even where one row would fill several
        return names, torch.minimum(starts, self.n_rows - len(steps) + steps)

    def step(self, step: int) -> list[tuple[int, int]]:
        """The names of the rows of all ranks together."""
        epoch, step = divmod(step, self.steps_in_epoch)
        names, starts = self.epoch(epoch)
        end = starts[step + 1] if step + 1 < len(starts) else None
        return [tuple(name) for name in names[starts[step]:end].tolist()]

    def steps(self, epochs: float) -> int:
        """Number of steps in so many epochs, at least one."""
        return max(round(epochs * self.steps_in_epoch), 1)

# The drawn set -------------------------------------------------------------------------------------------------------
VISUAL = ("colour", "shape", "count", "position", "describe")  # categories that cannot be answered without the image

def synthetic(n: int, seed: int = 0, held_out: bool = False) -> list[Comparison]:
    """n comparisons of coloured shapes on drawn pictures, and some on a text about a numbered box. Those `held_out`,
    for examinations, never share a box with the others, whatever the two seeds, and almost never a picture."""
    return [synthetic_comparison(seed, i, held_out) for i in range(n)]

def synthetic_comparison(seed: int, i: int, held_out: bool) -> Comparison:
    """The i-th comparison of a seed: 2 to 4 responses, graded from right to wrong.

    Whether right or wrong, every response is drawn from the same distribution: only the picture, or the text, tells
    them apart, and a model that does not look is at chance. Boxes in texts have even numbers, odd ones if held out."""
    rng = random.Random(f"{'held out ' * held_out}{seed} {i}")
    category, k = rng.choice((*VISUAL, "text")), rng.randint(2, 4)
    colour, other_colour = rng.sample(list(COLOURS), 2)
    place, other_place = rng.sample(list(PLACES), 2)
    shape, number, box = rng.choice(SHAPES), rng.randint(1, 4), rng.randrange(1000, 10000, 2) + held_out
    both = [f"{c} {p}" for c in (colour, other_colour) for p in (place, other_place)]
    prompt, right, choices = {
        "colour": (f"What colour is the {shape}?", colour, COLOURS),
        "shape": (f"Which shape is {colour}?", shape, SHAPES),
        "count": ("How many shapes are there?", str(number), "1234"),
        "position": (f"Where is the {shape}?", place, PLACES),
        "describe": ("Name colour and place.", f"{colour} {place}", both),
        "text": (f"Box {box} is {colour}. What colour is box {box}?", colour, COLOURS)}[category]
    images = [draw(category, shape, colour, place, number, rng)] if category in VISUAL else []
    responses = [right, *rng.sample([choice for choice in choices if choice != right], k - 1)]
    rng.shuffle(responses)
    # A grade is the number of right words. Equals tie: three wrong colours make no pair among themselves
    grades = [sum(word in right.split() for word in response.split()) for response in responses]
    pairs = [(w, l) for w, l in itertools.permutations(range(k), 2) if grades[w] > grades[l]]
    named = {"describe": ("colour", "place"), "position": ("place",), "text": ("colour",)}.get(category, (category,))
    critiques = [", ".join(f"{name} {'right' if word in right.split() else 'wrong'}" for name, word in
                           zip(named, response.split())) for response in responses]  # for critics and judges
    return Comparison("<image>" * len(images) + prompt, responses, pairs, images, id=f"{seed}-{i}", source="synthetic",
                      category=category, answer=right, critiques=critiques)

# A published set -----------------------------------------------------------------------------------------------------
# A function takes a row as it was published and returns one as at the top; for RL {"prompt", "images", "answer"}.
# A ValueError drops the row, and is counted under what stands before its first colon.
# A set of your own takes such a function, and a line in SETS. For K ranked responses there is `ranked`, below.

def rlaif_v(row: dict) -> dict:
    """openbmb/RLAIF-V-Dataset, 83,132 pairs, CC BY-NC 4.0. Trap: VL-RewardBench is drawn from it too; decontaminate."""
    return pair(*need(row, "question", "chosen", "rejected", "image"))

def need(row: dict, *names: str) -> list:
    """The named fields; "a|b" is one field with two spellings, the first that is not empty. An absent one is an error.

    >>> need({"question": "Why?", "image": "", "video": "clip9"}, "question", "image|video")
    ['Why?', 'clip9']"""
    values = []
    for name in names:
        found = [row[key] for key in name.split("|") if key in row]
        if not found:
            raise ValueError(f"no field {name.replace('|', ' or ')}: found {sorted(row)}; is this another set's file?")
        values.append(next(filter(None, found), found[0]))
    return values

def pair(prompt, chosen, rejected, images=()) -> dict:
    """chosen, rejected: texts, or conversations with a common beginning. images: one, or a list of them, also below."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "images": images}

# ======================================================================================================================
# First reading ends here. Below: what a real run needs.
# ======================================================================================================================
# Folders -------------------------------------------------------------------------------------------------------------
PAIRS = re.compile(rb'"pairs"\s*:\s*(\[[\s\d,\[\]]*\])')  # only as a key: inside a text the quotes would be escaped

class BadRow(ValueError):
    """A row, a file or a folder that cannot be used: one line with the place, what was found, and what to do."""

    def __init__(self, message):
        super().__init__(one_line(message))

class Comparisons:
    """The rows of a file, or of a folder's comparisons.jsonl: rows[i] reads a Comparison, or raises BadRow with file
    and line. In memory are 32 bytes a row. pairs (rows,): the number of pairs of each, which Order needs."""

    def __init__(self, path, needs_responses: bool = True):
        self.file = Path(path, "comparisons.jsonl") if Path(path).is_dir() else Path(path)
        self.folder, self.needs_responses = self.file.parent, needs_responses
        if not self.file.is_file():
            raise BadRow(f"{self.file} does not exist; want a folder with comparisons.jsonl, or such a file")
        table, start = array("q"), 0
        with open(self.file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    found = PAIRS.search(line)  # TRL's rows have no such key, and one pair; prompts for RL have none
                    pairs = found[1].count(b"[") - 1 if found else b'"chosen"' in line
                    table.extend((start, len(line), number, max(pairs, needs_responses)))
                start += len(line)
        if not table:
            raise BadRow(f"{self.file} holds no row; want one JSON object a line")
        self.table = np.frombuffer(table, dtype=np.int64).reshape(-1, 4)  # (rows, 4): byte, bytes, line, pairs
        self.pairs = self.table[:, 3]
        self.descriptor = os.open(self.file, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Comparison:
        start, size, _, _ = self.table[i].tolist()
        try:
            row = from_json(os.pread(self.descriptor, size, start))  # pread: safe from several threads
            return parse_row(row, self.folder, self.needs_responses)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{self.place(i)}: {error}") from None

    def place(self, i: int) -> str:
        return f"{self.file}:{self.table[i, 2]}"

    def only(self, rows) -> "Comparisons":
        """The same file with these rows alone."""
        part = copy.copy(self)
        part.table, part.pairs = self.table[list(rows)], self.pairs[list(rows)]
        return part

read_comparisons = Comparisons

def place(rows, i: int) -> str:
    return rows.place(i) if isinstance(rows, Comparisons) else f"{rows[i].source} comparison {i + 1}".strip()

def use_row(rows, i: int, use, on_bad_row="stop"):
    """use(comparison i), as `encode` does. If it cannot be read, or that is a ValueError: BadRow with its place,
    raised, or returned if it is to be skipped."""
    try:
        return use(rows[i])
    except ValueError as error:
        bad = error if isinstance(error, BadRow) else BadRow(f"{place(rows, i)}: {error}")
    if on_bad_row == "stop":
        raise bad
    return bad

@contextlib.contextmanager
def new_folder(folder):
    """Yields a folder to write into, which appears under its name if the block ends well. Meanwhile no other process
    can write it. After a kill FOLDER.lock stays there: harmless."""
    file = Path(f"{Path(folder)}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(file, blocking=False))
        except Timeout:
            raise BadRow(f"another process is writing {folder}; wait for it or choose another --out") from None
        stack.callback(file.unlink, missing_ok=True)
        if Path(folder).exists():
            raise BadRow(f"{folder} exists already; remove it or choose another --out")
        partial = stack.enter_context(replacing(folder))
        (partial / "images").mkdir(parents=True)
        yield partial

def write_comparisons(folder, comparisons, bar: bool = True) -> Path:
    """Writes comparisons, whose images are in memory or in files, as a data folder."""
    with new_folder(folder) as partial, open(partial / "comparisons.jsonl", "w", encoding="utf-8") as file:
        for i, comparison in enumerate(tqdm(comparisons, disable=not bar, desc=Path(folder).name)):
            paths = [f"images/{i}-{j}{'' if is_video(x) else '.png'}" for j, x in enumerate(comparison.images)]
            for path, image in zip(paths, comparison.images):
                if is_video(image):
                    (partial / path).mkdir()
                    for f, frame in enumerate(open_frames(image)):
                        frame.save(partial / path / f"{f}.png")
                else:
                    open_image(image).save(partial / path)
            file.write(line_of(replace(comparison, images=paths)))
    return Path(folder)

def line_of(comparison: Comparison) -> str:
    """A comparison as a row, keys without a value left out."""
    return json.dumps({key: value for key, value in vars(comparison).items() if value}, ensure_ascii=False) + "\n"

# What is wrong with a row --------------------------------------------------------------------------------------------
def from_json(row):
    """A row decoded, if it is JSON still (bytes or text)."""
    try:
        return json.loads(row) if isinstance(row, (bytes, str)) else row
    except (ValueError, RecursionError) as error:  # not JSON, not even UTF-8, or nested thousands deep
        raise ValueError(f"malformed JSON: {error}; want one JSON object a line") from None

def fields_of(row, needs_responses: bool) -> tuple:
    """(prompt, responses, pairs, images) of a row in either layout."""
    if not isinstance(row, dict):
        raise ValueError(f"found {type(row).__name__}, want a JSON object with the keys prompt, responses, pairs")
    if row.get("video") or row.get("videos"):
        raise ValueError("a key `video` is not read; put the path of the folder of frames into `images`")
    images = row.get("images", row.get("image")) or []
    images = list(images) if isinstance(images, (list, tuple)) else [images]  # one may stand alone
    if "chosen" in row or "rejected" in row:
        return *from_trl(row), [(0, 1)], images
    wanted = ("prompt", "responses", "pairs") if needs_responses else ("prompt",)
    if missing := [key for key in wanted if key not in row]:
        raise ValueError(f"the keys {missing} are missing; found {sorted(row)}; prompt, chosen, rejected will do too")
    return row["prompt"], row.get("responses") or [], row.get("pairs") or [], images

def from_trl(row: dict) -> tuple[object, list[str]]:
    """Prompt and responses of a TRL row: texts or messages, with the prompt apart or at the head of both."""
    prompt, both = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    if all(isinstance(said, str) for said in both):
        return prompt, both
    if not all(said and isinstance(said, list) for said in both):
        raise ValueError("chosen and rejected must both be texts or both be lists of messages; found "
                         f"{' and '.join(type(said).__name__ for said in both)} in {sorted(row)}")
    (*head, chosen), (*other_head, rejected) = both
    responses = [text_of(chosen), text_of(rejected)]
    if head != other_head:
        raise ValueError("chosen and rejected part before their last message, so there is no common prompt")
    if head and prompt:
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        head = head if prompt[-1] in head else prompt + head  # what the conversations hold is said already
    return head or prompt, responses

def text_of(message) -> str:
    """The text of a response that is a message; check_responses sees whether it is one."""
    if not isinstance(message, dict) or message.get("role") != "assistant":
        raise ValueError(f"a response must be a message of the assistant: {str(message)[:80]}")
    content = message.get("content")
    if not isinstance(content, list):
        return content
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
        raise ValueError("a response holds an image; both responses must share the images of the prompt")
    return "".join(map(text_of_part, content))

def inside(folder: Path, path) -> str:
    """folder/path, if path stays in the folder by its own wording. A link that you placed there is followed."""
    check_text(path, "the path of an image")
    if not path or os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == "..":
        raise ValueError(f"an image outside the data folder: {path[:150]!r}; put it inside and give its relative path")
    return str(folder / path)

def optional_keys(row: dict, responses) -> dict:
    """Those that a row has of id, source, category, answer and critiques."""
    found = {}
    for key in ("id", "source", "category", "answer"):
        if (value := row.get(key)) is not None:
            found[key] = str(value) if isinstance(value, (int, float)) else value
            check_text(found[key], key)
    if critiques := row.get("critiques"):
        if not isinstance(critiques, list) or len(critiques) != len(responses):
            raise ValueError(f"critiques must be a list of {len(responses)} texts, one for each response")
        for critique in critiques:
            check_text(critique, "a critique")
        found["critiques"] = critiques
    return found

def check_responses(responses, pairs, needs_pairs: bool, is_benchmark: bool) -> None:
    """K >= 2 texts, and a set of (winner, loser) pairs among them that some ranking satisfies.

    A benchmark's empty and identical responses stay: they are part of its figure, as ties, which are wrong."""
    if not isinstance(responses, list):
        raise ValueError("responses must be a list of texts")
    for i, response in enumerate(responses):
        check_text(response, f"response {i}")
        if not response.strip() and not is_benchmark:
            raise ValueError(f"response {i} is empty")
    if not isinstance(pairs, list) or needs_pairs and not pairs:
        raise ValueError("no pairs; want a list like [[0, 1]]: response 0 was preferred to response 1")
    beaten_by = {i: set() for i in range(len(responses))}
    for pair in pairs:
        winner, loser = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (None, None)
        if any(type(i) is not int or i not in beaten_by for i in (winner, loser)):
            raise ValueError(f"pair {str(pair)[:80]} is out of range: want two whole numbers below {len(responses)}")
        if responses[winner] == responses[loser] and not is_benchmark:
            raise ValueError(f"pair {[*pair]} has two identical responses: {responses[winner][:40]!r}")
        if winner in beaten_by[loser]:
            raise ValueError(f"pair {[*pair]} stands there twice; a weight is given with --data FOLDER:2.0")
        beaten_by[loser].add(winner)
    try:
        graphlib.TopologicalSorter(beaten_by).prepare()
    except graphlib.CycleError as error:
        raise ValueError(f"the pairs contradict each other: {error.args[1]} beat each other in a circle") from None

# Images that are drawn, removed or exchanged -------------------------------------------------------------------------
# Every colour is brighter than the ground: "something is there" is then one direction in pixel space, quickly learnt
COLOURS = {"red": (235, 60, 60), "green": (60, 200, 60), "blue": (60, 90, 245), "yellow": (240, 220, 60),
           "white": (245, 245, 245), "pink": (250, 120, 190)}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"left": (23, 42), "right": (61, 42), "top": (42, 23), "bottom": (42, 61)}  # centres (x, y) in pixels

def draw(category: str, shape: str, colour: str, place: str, number: int, rng: random.Random) -> Image.Image:
    """84 x 84 pixels: a large shape in the middle, a smaller one at a place, or several in corners; dark ground."""
    centres, radii = [PLACES[place]], (15, 19)
    if category in ("colour", "shape"):
        centres, radii = [(42, 42)], (24, 30)
    if category == "count":
        centres, radii = rng.sample([(21, 21), (63, 21), (21, 63), (63, 63)], number), (12, 16)
    image = Image.new("RGB", (84, 84), tuple(rng.randint(35, 55) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for x, y in centres:  # each a little off in place, size and colour
        x, y, r = x + rng.randint(-4, 4), y + rng.randint(-4, 4), rng.randint(*radii)
        fill = tuple(min(max(channel + rng.randint(-15, 15), 0), 255) for channel in COLOURS[colour])
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill)
        elif shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill)
        elif shape == "triangle":
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
        else:
            pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
            pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill)
    return image

def remove_images(comparison: Comparison) -> Comparison:
    """The same question without its images: what can be told without looking."""
    messages = to_messages(comparison.prompt, comparison.images)
    prompt = [message | {"content": MARK.sub("", message["content"]).lstrip("\n")} for message in messages]
    return replace(comparison, images=[], prompt=prompt)

def shuffle_images(comparisons, seed: int = 0) -> list[Comparison]:
    """The comparisons that have images, with the images of another: on them a model that looks falls to chance.

    Images move only between prompts with the same number of images, and no prompt gets its own back, or the same
    picture from another prompt, as long as half of them have another."""
    visual = [comparison for comparison in comparisons if comparison.images]
    groups, shuffled = {}, list(visual)  # {number of images: {images: the comparisons that have them}}
    for i in random.Random(seed).sample(range(len(visual)), len(visual)):
        images = visual[i].images  # in `repr` files are told apart by name, decoded pictures by their place in memory
        groups.setdefault(len(images), {}).setdefault(repr(images), []).append(i)
    for alike in groups.values():
        order = list(itertools.chain(*alike.values()))
        step = max(map(len, alike.values()))  # equal pictures are neighbours: a step as long as their longest run
        for here, there in zip(order, order[step:] + order[:step]):
            shuffled[here] = replace(visual[here], images=visual[there].images)
    return shuffled

# The other published sets --------------------------------------------------------------------------------------------
def ranked(prompt, responses, scores, images=()) -> dict:
    """K responses, best first, and every pair whose scores differ. Those unrated, empty, or said before are left out.

    >>> ranked("Why?", ["a", "b", "c", "d"], [1, 5, None, 5])["pairs"]         # of b, d, a: b and d tie
    [(0, 2), (1, 2)]"""
    rated = {}
    for response, score in zip(responses, scores, strict=True):
        if score is not None and response and response.strip():
            rated.setdefault(response, score)
    order = sorted(rated, key=rated.get, reverse=True)
    pairs = [(w, l) for w, l in itertools.combinations(range(len(order)), 2) if rated[order[w]] > rated[order[l]]]
    if not pairs:
        raise ValueError(f"tie or unrated: the scores are {scores}")
    return {"prompt": prompt, "responses": order, "pairs": pairs, "images": images}

def mmpr(row: dict) -> dict:
    """OpenGVLab/MMPR-v1.2, about 3M pairs (paper: 2M), MIT. Source: the folder of meta.json, unpacked. Its repeat_time
    is not obeyed: give train.py a weight. Rows without an image are text-only.
    Trap: a rejected response may be the chosen one, cut in half and continued without the image."""
    return pair(*need(row, "question", "chosen", "rejected"), row.get("image") or row.get("video") or [])

def mm_rlhf(row: dict) -> dict:
    """yifanzhang114/MM-RLHF, MIT: data.jsonl (16,342 ranked prompts) or dpo_pairs.jsonl (62,545 pairs); unpack its five
    archives beside it, with or without a folder of their own.
    Trap: whether rank 1 is best is written nowhere. It is taken so; a row whose scores say the opposite is dropped."""
    if "chosen" in row or "rejected" in row:
        prompt, chosen, rejected, picture = need(row, "prompt", "chosen", "rejected", "image|video")
        reasons = [row.get("chosen_reason"), row.get("rejected_reason")]
        made = pair(prompt, chosen, rejected, picture) | {"critiques": reasons if all(reasons) else []}
    else:
        prompt, responses, ranks, picture = need(row, "question", "models_output", "final_ranking", "image|video")
        aspects = [row[name] for name in ("faithfulness", "helpfulness", "ethical") if row.get(name)]
        against = 0  # > 0: low ranks go with low scores, each aspect for itself
        for scores in aspects:
            known = [(rank, score) for rank, score in zip(ranks, scores) if None not in (rank, score)]
            against += sum((a[0] - b[0]) * (a[1] - b[1]) for a, b in itertools.combinations(known, 2))
        if against > 0:
            raise ValueError(f"ranking against its scores: {ranks}, {aspects}; if most say so, the last is the best")
        made = ranked(prompt, responses, [None if rank is None else -rank for rank in ranks], picture)
    subset = re.search("(?:^|/)(short|long|mcq|safety|video)/", str(picture))
    return made | {"category": subset[1] if subset else ""}

def from_judge(asked: str, said: str, form: re.Pattern, verdict: str, image) -> dict:
    """The pair in what a judge was asked (`form`: question, two responses) and said (`verdict`: the better)."""
    found, better = form.search(asked), re.search(verdict, said)
    if not found:
        raise ValueError(f"another judge's format: {asked[-80:]!r}")
    if not better:
        raise ValueError(f"tie or no verdict: {said[-80:]!r}")
    question, *responses = found.groups()
    ordered = responses if better[1] in ("1", "A", "first") else responses[::-1]
    return pair(MARK.sub("", question).strip(), *ordered, image)

R1_FORM = re.compile(r"\[Question\]:\s*(.*?)\s*^[ \t]*#*[ \t]*\[Response 1\]:\s*(.*?)\s*^[ \t]*#*[ \t]*\[Response 2\]:"
                     r"\s*(.*?)\s*(?:^[ \t#*\[]*Output Format(?!.*^[ \t#*\[]*Output Format).*)?\Z", re.S | re.M)
CRITIC_FORM = re.compile(r"Question: \[(.*?)\]\s*\n\s*(?:Response 1|Response A|The first response): \[(.*?)\]\s*\n\s*"
                         r"(?:Response 2|Response B|The second response): \[(.*)\]", re.S)

def r1_reward(row: dict) -> dict:
    """yifanzhang114/R1-Reward-RL, 17,261 pairs, licence not stated. The responses are cut out of a judge's prompt.
    Trap: these are the pairs GPT-4o found hard. The paper's "R1-Reward 200k" is no file: it is all of MM-RLHF (105,740
    pairs, more than are public) and 100k drawn from RLAIF-V and VLFeedback (public: --data data/mm-rlhf
    data/rlaif-v:0.49 data/vlfeedback:0.11) and, 15% of these, from POVID and WildVision-Battle (not read here).
    Trap: cut white space and the headings' lines only: a closing ** lost by response 1 would tell its place."""
    message, answer, image = need(row, "message", "answer", "image")
    text = "".join(part["text"] for part in from_json(message)[0]["content"] if part.get("type") == "text")
    if text.count("[Response 1]:") != 1 or text.count("[Response 2]:") != 1:
        raise ValueError(f"no [Response 1]:, [Response 2]: once each in the message: {text[-80:]!r}")
    return from_judge(text, str(answer), R1_FORM, r"<answer>\s*([12])\s*</answer>", image)

def llava_critic(row: dict) -> dict:
    """lmms-lab/llava-critic-113k, config `pairwise`, 40,154 judgements of GPT-4o, Apache-2.0.
    Trap: it mixes several judges' formats. "Question: [..] .. The better response: [..]" is read, the rest dropped."""
    turns, image = need(row, "conversations", "image")
    asked, said = (turn["content"] for turn in chat(turns)[:2])
    return from_judge(asked, said, CRITIC_FORM, r"better response: \[(first|second|1|2|A|B)\]", image)

def mmif(row: dict) -> dict:
    """ChrisDing1105/MMIF-23k, the DPO part, Apache-2.0. Trap: v1 (the paper's 22k) differs from v2."""
    turns, chosen, rejected, images = need(row, "conversations", "chosen", "rejected", "images|image")
    return pair(chat(turns), *need(chosen, "value"), *need(rejected, "value"), images)

def chat(turns: list) -> list[dict]:
    """ShareGPT's {from, value} turns as messages."""
    roles, found = {"human": "user", "gpt": "assistant"}, [need(turn, "from", "value") for turn in turns]
    return [{"role": roles.get(speaker, speaker), "content": text} for speaker, text in found]

def omnialign(row: dict) -> dict:
    """PhoenixZ/OmniAlign-V-DPO, 133k pairs, licence not stated. Trap: rejected ones, of a weaker model, are shorter."""
    prompt, chosen, rejected, image = need(row, "prompt", "chosen", "rejected", "image")
    return pair(MARK.sub("", prompt).strip(), chosen, rejected, image)

def ultrafeedback_all(row: dict) -> dict:
    """openbmb/UltraFeedback, 63,967 prompts with 4 responses, MIT: untied pairs by the mean of the aspects' ratings.
    Trap: `overall_score` held thousands of wrong tens until December 2023; this did not. The paper names neither."""
    prompt, completions = need(row, "instruction", "completions")
    rated = [need(completion, "response", "fine-grained_score") for completion in completions]
    return ranked(prompt, [response for response, _ in rated], [score for _, score in rated])

def ultrafeedback_hard(row: dict) -> dict:
    """The paper's "Ultra-Hard" (Table 4), 63k pairs: of every prompt its best response against its worst."""
    made = ultrafeedback_all(row)
    return pair(made["prompt"], made["responses"][0], made["responses"][-1])

def shp(row: dict) -> dict:
    """stanfordnlp/SHP, 348,718 pairs of Reddit comments in `train`, Reddit's terms.
    Trap: labels 1 means A; one public loader has it reversed."""
    prompt, a, b, label = need(row, "history", "human_ref_A", "human_ref_B", "labels")
    score_a, score_b = need(row, "score_A", "score_B")
    if label not in (0, 1) or (score_a - score_b) * (1 if label else -1) < 0:
        raise ValueError(f"label against its scores: labels {label}, score_A {score_a}, score_B {score_b}")
    return pair(prompt, a, b) if label == 1 else pair(prompt, b, a)

def message_lists(row: dict) -> dict:
    """chosen and rejected as whole conversations. The prompt is what they share, whatever a `prompt` column says.
    tulu3-if      allenai/tulu-3-IF-augmented-on-policy-70b, 65.6k, ODC-BY, parts not for commercial use
    olmo2         allenai/olmo-2-0425-1b-preference-mix, about 378k, ODC-BY, parts not for commercial use
    wildchat-uf   allenai/tulu-3-wildchat-ultrafeedback, ODC-BY. Trap: no `train`; all but wildchat_unused (56,034)
    skywork       Skywork/Skywork-Reward-Preference-80K-v0.2, about 77k, licence not stated"""
    chosen, rejected = need(row, "chosen", "rejected")
    return pair(row.get("prompt") if len(chosen) == 1 else None, chosen, rejected)

def swe_arena(row: dict) -> dict:
    """bigcode/swe-arena-preference-5k (now bigcodearena-preference-5k), 4.7k votes, bigcode-openrail-m.
    Trap: each side has a conversation of its own. Where they part early, the prompt is `instruction`."""
    feedback, states, instruction = need(row, "feedback", "states", "instruction")
    (vote,), sides = need(feedback, "vote_type"), []
    if vote not in ("vote_left", "vote_right", "vote_model_A", "vote_model_B"):
        raise ValueError(f"tie or no vote: vote_type is {vote!r}")
    for state in need(states, "model_A", "model_B"):
        (turns,) = need(state, "messages")
        sides.append([{"role": "user" if role.lower() == "user" else "assistant", "content": text}
                      for role, text in turns])
    chosen, rejected = sides if vote in ("vote_left", "vote_model_A") else sides[::-1]
    if chosen[:-1] == rejected[:-1]:
        return pair(None, chosen, rejected)
    return pair(instruction, chosen[-1:], rejected[-1:])

def vlfeedback(row: dict) -> dict:
    """MMInstruction/VLFeedback, 80,258 prompts with 4 responses, CC BY 4.0: untied pairs by the mean of the ratings.
    Trap: `completions` is a list of dicts or a dict of lists, by the release; ratings may be no numbers."""
    prompt, completions, image = need(row, "prompt", "completions", "image|img_path")
    if isinstance(completions, list):
        responses, annotations = zip(*[need(completion, "response", "annotations") for completion in completions])
    else:
        responses, annotations = need(completions, "response", "annotations")
    scores = []
    for aspects in annotations:
        ratings = [str(*need(aspect, "Rating")) for aspect in aspects.values()]
        known = ratings and all(re.fullmatch(r"\d+(\.\d+)?", rating) for rating in ratings)
        scores.append(sum(map(float, ratings)) / len(ratings) if known else None)
    return ranked(prompt, responses, scores, image)

def rlhf_v(row: dict) -> dict:
    """openbmb/RLHF-V-Dataset, 5,733 pairs, CC BY-NC 4.0. Trap: question and responses are JSON inside `text`."""
    text, image = need(row, "text", "image")
    return pair(*need(from_json(text), "question", "chosen", "rejected"), image)

def vstar(row: dict) -> dict:
    """craigwu/seal_vqa_data, 191k RL prompts on small details (V*): its four files whose rows carry boxes.
    Trap: images (COCO, GQA) must be fetched from their own homes. A line "Additional visual information to focus on:
    <object>; .." stands for crops that only V*'s own model looks at, and is taken out."""
    if "question" in row or "conversations" not in row:
        question, answer, image = need(row, "question", "answer", "image")
    else:
        (question, answer), (image,) = [turn["content"] for turn in chat(row["conversations"])[:2]], need(row, "image")
    question = re.sub(r"Additional visual information to focus on:[^\n]*", "", MARK.sub("", question).strip()).strip()
    return {"prompt": question, "images": [image], "answer": answer}

def arxivqa(row: dict) -> dict:
    """MMInstruction/ArxivQA, about 100k RL prompts on figures, CC BY-SA 4.0. Trap: labels, options without letters."""
    question, options, label, image = need(row, "question", "options", "label", "image")
    if not re.match(r"[A-D]\b", str(label).strip()) or not isinstance(options, list):
        raise ValueError(f"unparsable label: {label!r}")
    lines = [o if re.match(r"[A-D][).:]", o) else f"{letter}) {o}" for letter, o in zip("ABCDEFGH", options)]
    prompt = "\n".join([question, *lines, "Answer with the letter."])
    return {"prompt": prompt, "images": [image], "answer": str(label).strip()[0]}

def thinklite(row: dict) -> dict:
    """russwang/ThinkLite-VL-hard-11k, 11,031 RL prompts on mathematics and science, licence not checked."""
    problem, answer, image = need(row, "problem", "answer", "image")
    return {"prompt": problem, "images": [image], "answer": answer}

# The benchmarks: responses stay in the order in which they were published --------------------------------------------
def judged(category: str, prompt, responses, pairs, images=()) -> dict:
    """A benchmark's row. Marks that stand for no image ("see <image> and <image 2>") are only text, and are cut."""
    marks = len(MARK.findall(prompt)) if isinstance(prompt, str) else 0
    prompt = MARK.sub("", prompt) if marks not in (0, len(images)) else prompt
    if isinstance(prompt, list) and not images:
        prompt = [m | {"content": MARK.sub("", m["content"])} for m in prompt]
    return {"category": category, "prompt": prompt, "responses": responses, "pairs": pairs, "images": images}

def vl_rewardbench(row: dict) -> dict:
    """MMInstruction/VL-RewardBench, 1,250 rows, MIT, or R1-Reward's flat copy; the official script's groups.
    Trap: human_ranking holds the rank of each response. 25 ids occur twice. 1,245 rows have the better one first."""
    id, query, image = need(row, "id", "query|prompt", "image")
    if "prompt" in row:
        responses, ranks = need(row, "chosen", "rejected"), [0, 1]
    else:
        responses, ranks = need(row, "response", "human_ranking")
    groups = {"hallucination": "hallucination", "RLAIF": "hallucination", "RLHF": "hallucination",
              "mathverse": "reasoning", "mmmu": "reasoning"}
    group = groups.get(re.split("[_-]", str(id))[0], "general")
    return judged(group, query, responses, [(ranks.index(0), ranks.index(1))], [image])

def multimodal_rewardbench(row: dict) -> dict:
    """facebookresearch/multimodal_rewardbench, 4,711 rows, CC BY-NC 4.0: a checkout after its download script."""
    id, text, image, better, kind = need(row, "ID", "Text", "Image", "Better", "Category")
    kinds = {"open_generation/correctness_task": "correctness", "open_generation/preference_task": "preference",
             "knowledge": "knowledge", "vqa": "VQA",
             "reasoning": "math" if id.lower().startswith("math") else "coding",
             "safety": "safety/bias" if id.lower().startswith("pairs") else "safety/toxicity"}
    pairs = {"Output1": [(0, 1)], "Output2": [(1, 0)]}[better]
    return judged(kinds[kind], text, need(row, "Output1", "Output2"), pairs, [image]) | {"id": id}

def mm_rlhf_rewardbench(row: dict) -> dict:
    """yifanzhang114/MM-RLHF-RewardBench, 170 pairs of 46 ids, licence not stated: its jsonl, images/ and video/."""
    prompt, chosen, rejected, picture = need(row, "prompt", "chosen", "rejected", "video|image")
    path = str(picture["path"] if isinstance(picture, dict) else picture)
    found = [kind for kind in ("mcq", "long", "short", "safety", "video") if kind in path]  # as the official script
    if not found:
        raise ValueError(f"image {path[:60]!r} names none of mcq, long, short, safety, video; another benchmark's?")
    return judged(found[0], prompt, [chosen, rejected], [(0, 1)], [picture])

PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")  # of allenai/pref-test-sets, a split each

def rewardbench(row: dict) -> dict:
    """allenai/reward-bench, split `filtered`, 2,985 rows, ODC-BY; and allenai/pref-test-sets, if --source names it too.
    Trap: rows of the prior sets may have a `subset` of their own; as in the official loader the split counts."""
    prompt, chosen, rejected = need(row, "prompt", "chosen", "rejected")
    subset = row["part"] if row["part"] in PRIOR_SETS else need(row, "subset")[0]
    responses = [answer if isinstance(answer, str) else text_of(answer[-1]) for answer in (chosen, rejected)]
    return judged(subset, prompt, responses, [(0, 1)])

def rm_bench(row: dict) -> dict:
    """THU-KEG/RM-Bench, 1,327 prompts, licence not checked. K = 6: concise, plain, markdown, right and then wrong."""
    prompt, chosen, rejected = need(row, "prompt", "chosen", "rejected")
    domain = str(row.get("domain") or row["part"].removesuffix("_filtered")).split("-")[0]  # safety-refuse: safety
    if domain not in ("chat", "math", "code", "safety") or not len(chosen) == len(rejected) == 3:
        raise ValueError(f"domain {domain!r}; want one of chat, math, code, safety, and three chosen, three rejected")
    return judged(domain, prompt, [*chosen, *rejected], [(i, 3 + j) for i in range(3) for j in range(3)])

class Published(NamedTuple):
    """A line of SETS: how a row is read, and where the rows of a set are."""
    read: Callable  # row -> comparison; a benchmark's row also has the field `part`, the name of its file or split
    files: str = "train*.parquet *.parquet *.jsonl *.json"  # by the first pattern that finds any; "a*,b*" is one
    splits: str = "train"  # on the hub: those that are there; "config:a b" names a configuration first

SETS = {
    "r1-reward": Published(r1_reward), "rlaif-v": Published(rlaif_v), "rlhf-v": Published(rlhf_v),
    "mm-rlhf": Published(mm_rlhf, "data.jsonl *.parquet dpo_pairs.jsonl"),
    "mmpr": Published(mmpr), "omnialign": Published(omnialign), "swe-arena": Published(swe_arena),
    "mmif": Published(mmif, "dpo/*.json *dpo*.json"),  # files for fine-tuning lie beside it
    "ultrafeedback-all": Published(ultrafeedback_all), "ultrafeedback-hard": Published(ultrafeedback_hard),
    "shp": Published(shp, "train.json train.jsonl train*.parquet *.parquet"),
    "tulu3-if": Published(message_lists), "olmo2": Published(message_lists), "skywork": Published(message_lists),
    "wildchat-uf": Published(message_lists, "wildchat_[ir]*", "wildchat_if wildchat_reused_on_policy_8b "
                             "wildchat_if_on_policy_70b wildchat_reused_on_policy_70b"),
    "vlfeedback": Published(vlfeedback, "*.parquet vlfeedback*.jsonl *.jsonl"),
    "llava-critic": Published(llava_critic, "pairwise/*.parquet pairwise*.parquet *.jsonl *.json", "pairwise:train"),
    "pairs": Published(dict, "comparisons.jsonl *.jsonl *.parquet *.json"),  # rows of your own, as at the top
    "vstar": Published(vstar, "GQA_data.json,llava_focus_data.json,spatial_relation_data.json,vaw_attribute_data.json"),
    "arxivqa": Published(arxivqa), "thinklite": Published(thinklite),
    "vl-rewardbench": Published(vl_rewardbench, "data.jsonl test-*.parquet *", "test"),
    "multimodal-rewardbench": Published(multimodal_rewardbench, "all_data.json test-*.parquet *", "test"),
    "mm-rlhf-rewardbench": Published(mm_rlhf_rewardbench, "mm_reward_bench.jsonl train-*.parquet *"),
    "rewardbench": Published(rewardbench, "filtered.json filtered-*.parquet anthropic_helpful[.-]*,anthropic_hhh[.-]*,"
                             "shp[.-]*,summarize[.-]* *", "filtered " + " ".join(PRIOR_SETS)),
    "rm-bench": Published(rm_bench, "total_dataset.json train-*.parquet *")}
BENCHMARKS = {"vl-rewardbench": 1250, "multimodal-rewardbench": 4711, "mm-rlhf-rewardbench": 170, "rewardbench": 2985,
              "rm-bench": 1327}  # published number of rows; of RewardBench without the prior sets

# Sources -------------------------------------------------------------------------------------------------------------
SUFFIXES = (".json", ".jsonl", ".parquet")

def json_rows(file: Path):
    """(number, row) of JSON Lines, rows still as bytes, or of one JSON list, which is read whole."""
    try:
        with open(file, "rb") as lines:
            is_list = lines.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")  # behind a byte order mark
            lines.seek(0)
            rows = from_json(lines.read()) if is_list else lines
            yield from ((number, row) for number, row in enumerate(rows, 1) if is_list or row.strip())
    except (OSError, ValueError) as error:
        raise BadRow(f"{file} cannot be read: {error}; is the download complete?") from None

def dataset_rows(source: str, splits: str):
    """(split, number, row) of a parquet file, or of a set's splits on the hub, as a stream. Images stay undecoded."""
    path, files = ("parquet", source) if source.endswith(".parquet") else (source, None)
    config, _, splits = splits.rpartition(":")
    try:
        import datasets
        datasets.disable_progress_bars()
        found = datasets.load_dataset(path, config or None, data_files=files, streaming=True)
        if not found.keys() & set(splits.split()):
            raise ValueError(f"its splits are {', '.join(found)}; want {splits.replace(' ', ' or ')}")
        for split in filter(found.keys().__contains__, splits.split()):
            yield from ((split, number, row) for number, row in enumerate(found[split].decode(False), 1))
    except ImportError:
        raise BadRow(f"{source}: parquet files and hub ids need one more package: pip install datasets") from None
    except Exception as error:  # of datasets: no such set, no network, a damaged file: a dozen kinds
        raise BadRow(f"{source} cannot be read: {error}") from None

def files_of(path: Path, patterns: str) -> list[Path]:
    """The file itself, or the files of a folder by the first pattern that finds any."""
    files = [path] if path.is_file() else []
    for pattern in patterns.split():
        found = sorted(itertools.chain(*map(path.rglob, pattern.split(","))))
        files = files or [file for file in found if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        raise BadRow(f"{path} does not exist, or holds no {', '.join(SUFFIXES)} file like {patterns}; want a file, a "
                     "folder, or a hub id like openbmb/RLAIF-V-Dataset")
    return files

def find(folder: Path, path) -> Path | None:
    """folder/path, or where its archive has put it: short/, images/ or (of a checkout) data/ before short/1.png."""
    inside(folder, path)  # or ValueError
    places = [folder / parent / path for parent in ("", path.split("/")[0], "images", "data")]
    return next(filter(os.path.exists, places), None)

def mmpr_parts(meta: Path):
    """(annotation file, image folder) of each part of MMPR, whose paths begin with MMPR-v1.2/."""
    try:
        for part in from_json(meta.read_bytes()).values():
            annotation, images = (re.sub("^MMPR[^/]*/", "", path) for path in need(part, "annotation", "root"))
            if not (file := find(meta.parent, annotation)):
                raise ValueError(f"{annotation} does not exist; unpack annotations.zip")
            yield file, find(meta.parent, images) or meta.parent
    except (ValueError, TypeError, AttributeError) as error:
        raise BadRow(f"{meta} cannot be used: {error}") from None

def read_source(name: str, source: str):
    """(place, row, name of its file or split, folder of its images) of every row of a published set."""
    path, published = Path(source), SETS[name]
    if not path.exists() and path.suffix not in SUFFIXES and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        for split, number, row in dataset_rows(source, published.splits):
            yield f"{split}:{number}", row, split, path
        return
    home = path.parent if path.is_file() else path
    meta = next(home.rglob("meta.json"), None) if name == "mmpr" else None
    for file, folder in mmpr_parts(meta) if meta else [(file, home) for file in files_of(path, published.files)]:
        part = file.stem.split("-0")[0]  # shp, also of shp-00000-of-00001.parquet
        is_parquet = file.suffix == ".parquet"
        for *_, number, row in dataset_rows(str(file), "train") if is_parquet else json_rows(file):
            yield f"{file.relative_to(home)}:{number}", row, part, folder

# Images --------------------------------------------------------------------------------------------------------------
BASE64 = ("data:image/", "/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")  # how a JPEG, PNG, WebP and GIF begin in base64
ENDINGS = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"GI": ".gif", b"BM": ".bmp", b"II": ".tif",
           b"MM": ".tif"}  # by how the file begins

def load_image(source, folder: Path) -> tuple[str, dict[str, bytes], Image.Image]:
    """(path to name it by, {file: bytes}, first frame) of an image or a folder of frames, of which those are taken that
    the model will look at. source: bytes, base64, {bytes, path} (an Image of `datasets`), or a path in the folder.
    All are decoded: nothing is stored that cannot be read, is no regular file, or no picture."""
    source = (source.get("bytes") or source.get("path")) if isinstance(source, dict) else source
    if isinstance(source, str) and source.startswith(BASE64):
        source = base64.b64decode(source.partition(",")[2] if source.startswith("data:") else source)
    if not isinstance(source, bytes) and not (source := find(folder, path := source)):
        raise ValueError(f"missing image: {path} is not in {folder}")
    try:
        frames, decoded = frames_of(source), open_frames(source)
        if len({image.size for image in decoded}) > 1:
            raise ValueError(f"the frames of {source} have different sizes")
        encoded = [frame if isinstance(frame, bytes) else Path(frame).read_bytes() for frame in frames]
    except (OSError, ValueError) as error:
        raise ValueError(f"broken image: {error}") from None
    name = hashlib.blake2b(b"".join(encoded), digest_size=16).hexdigest()
    name = f"images/{name[:2]}/{name}"  # 256 sub-folders: no folder holds a million files
    endings = [ENDINGS.get(data[:2], "") for data in encoded]
    if is_video(source):
        return name, {f"{name}/{i:02}{endings[i]}": data for i, data in enumerate(encoded)}, decoded[0]
    return name + endings[0], {name + endings[0]: encoded[0]}, decoded[0]

def thumbprint(image: Image.Image) -> int:
    """64 bits that survive re-encoding and resizing: in a grey thumbnail of 9 x 8, whether a pixel's right neighbour is
    brighter by more than 2 of 255 (a margin, since in flat areas only the noise of a JPEG differs)."""
    grey = image.convert("L").resize((9, 8)).tobytes()
    return sum((grey[9 * y + x + 1] > grey[9 * y + x] + 2) << (8 * y + x) for y in range(8) for x in range(8))

# Does a benchmark know a row -----------------------------------------------------------------------------------------
CLOSE = 4  # differing bits of 64 at which two images count as one; two unrelated images differ in some 20
SHORT = 32  # characters: "Yes" and "No" do not tell where they come from, so below this the prompt must agree too

def digest(*parts) -> int:
    """64 bits of hash. Among 2.8M rows two different ones agree with a probability of 2e-7."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "little")

def plain(text: str) -> str:
    return " ".join(MARK.sub(" ", text).lower().split())

def text_of_prompt(c: Comparison) -> str:
    return "\n".join(message["content"] for message in to_messages(c.prompt, c.images))

def traces(c: Comparison, images):
    """What tells where a row is from: (hash of two responses in any order, None), and (hash of the prompt, image)."""
    prompt = plain(text_of_prompt(c))
    for winner, loser in c.pairs:
        two = sorted((plain(c.responses[winner]), plain(c.responses[loser])))
        yield digest(*two, prompt if sum(map(len, two)) < SHORT else ""), None
    yield from ((digest(prompt), image) for image in images)

def read_benchmarks(folders) -> dict[int, list]:
    """What `known_to` looks up: {hash: [(thumbprint of the image or None, place)]}."""
    known = {}
    for folder in folders:
        rows = read_comparisons(folder, needs_responses=False)
        for i, c in enumerate(rows):
            images = [open_frames(image)[0] for image in c.images]
            for key, image in traces(c, images):
                known.setdefault(key, []).append((image and thumbprint(image), rows.place(i)))
    return known

def known_to(benchmarks: dict[int, list], c: Comparison, images) -> str:
    """The place of a benchmark's row with the same two responses, or with the same prompt and picture; or ""."""
    for key, image in traces(c, images) if benchmarks else ():
        for mark, place in benchmarks.get(key, ()):
            if image is None or (thumbprint(image) ^ mark).bit_count() <= CLOSE:
                return place
    return ""

# Conversion ----------------------------------------------------------------------------------------------------------
# One pass; a row takes 125 bytes of memory (of 200,000). The folder appears when it is complete; a killed run leaves
# .FOLDER.partial and FOLDER.lock, which the next start clears away. Every row is in the folder, or is counted in
# report.json under the reason it was dropped for, with the first example: a field is missing, responses are empty,
# identical or tie, the verdict contradicts the row's own scores, an image is missing or broken, the row is over-long,
# known to a benchmark, or repeats an earlier one in prompt (but for case and spaces), image bytes and responses: the
# first stays, a later one is a duplicate, or a contradiction if its verdict differs. A benchmark's rows all stay, or
# the conversion stops. Beside comparisons.jsonl: held_out.jsonl (--hold_out), contaminated.jsonl (--decontaminate).

def curate(item, name: str, cfg: "Config", out: Path, benchmarks) -> tuple:
    """Checks a row (an item of read_source) and stores its images under `out`. ValueError if it is of no use.

    Returns the comparison, its prompt's text, tokens of prompt and longest response, and where a benchmark has it."""
    place, row, part, folder = item
    row, is_benchmark = from_json(row), name in BENCHMARKS
    if not isinstance(row, dict):
        raise ValueError(f"found {type(row).__name__}, want a JSON object")
    try:
        row = {key: value for key, value in row.items() if value is not None}  # in parquet what is absent is null
        made = SETS[name].read(row | {"part": part} if is_benchmark else row)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"unexpected layout: {type(error).__name__}: {error}") from None
    is_prompt = "answer" in made and not {"pairs", "chosen", "rejected"} & made.keys()
    if is_prompt and not str(made["answer"]).strip():
        raise ValueError("no answer: it is empty")
    *_, images = fields_of(made, needs_responses=not is_prompt)
    made = {"id": row.get("id") or place, "source": name} | made | {"images": ["to come"] * len(images)}
    c = parse_row(made, Path(), needs_responses=not is_prompt)
    prompt = text_of_prompt(c)
    length, *lengths = [(len(text.encode()) + 3) // 4 for text in (prompt, *c.responses)]  # a token is some 4 bytes
    longest = max(lengths, default=0)
    if length + longest > cfg.max_tokens and not is_benchmark:
        raise ValueError(f"over-long: {length} tokens of prompt, {longest} of response; --max_tokens {cfg.max_tokens}")
    loaded = [load_image(image, folder) for image in images]
    known = known_to(benchmarks, c, [first for _, _, first in loaded])
    for _, files, _ in loaded if not known else []:
        for path, data in files.items():
            if not (out / path).exists():  # the name is the content: two threads that write it write the same
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                (out / path).write_bytes(data)
    return replace(c, images=[path for path, _, _ in loaded]), prompt, length, longest, known

def in_order(function, items, workers: int):
    """(item, future of function(item)) of every item, in their order, with few of them in memory."""
    with ThreadPoolExecutor(workers) as threads:  # waits for all: none may write into a folder that is being removed
        while batch := list(itertools.islice(items, 32 * workers)):
            yield from [(item, threads.submit(function, item)) for item in batch]

def convert(name: str, cfg: "Config") -> dict:
    """Converts a published set and returns the report. Rows are read in threads, since images may be to decode; what
    becomes of each is decided here, in order. Held out are whole prompts: those with the lowest hashes."""
    for source in map(Path, cfg.source):
        if source.is_dir() and Path(cfg.out).resolve().is_relative_to(source.resolve()):
            raise BadRow(f"--out {cfg.out} lies inside --source {source} and would be read as part of it")
    benchmarks, is_benchmark = read_benchmarks(cfg.decontaminate), name in BENCHMARKS
    counts, dropped, first_dropped, verdicts = Counter(), Counter(), {}, {}  # verdicts: {hash of a row: its verdict}
    sizes = array("i")  # of each row that stays: tokens of the prompt and of the longest response, number of responses
    with new_folder(cfg.out) as out, contextlib.ExitStack() as stack:
        @functools.cache
        def file(kind: str):  # opened for its first row; half a character is written as in JSON: \ud83d
            return stack.enter_context(open(out / f"{kind}.jsonl", "w", encoding="utf-8", errors="backslashreplace"))

        items = itertools.chain.from_iterable(read_source(name, source) for source in cfg.source)
        work = functools.partial(curate, name=name, cfg=cfg, out=out, benchmarks=benchmarks)
        workers = cfg.workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        rows = stack.enter_context(contextlib.closing(in_order(work, itertools.islice(items, cfg.n or None), workers)))
        for (place, *_), done in tqdm(rows, name, unit=" rows", leave=False):
            counts["rows_in"] += 1
            try:
                c, prompt, length, longest, known = done.result()
                line = line_of(c)
                if known:
                    file("contaminated").write(f'{{"benchmark": {json.dumps(known)}, "row": {line.rstrip()}}}\n')
                    raise ValueError(f"known to a benchmark: {known}")
                texts = sorted((c.responses[w], c.responses[l]) for w, l in c.pairs)
                prompt, verdict = digest(plain(prompt), c.images), digest(texts, c.answer) % 256  # < 257: no memory
                same = digest(prompt, sorted(c.responses))
                if same in verdicts and not is_benchmark:
                    agrees = verdicts[same] == verdict
                    raise ValueError("duplicate of an earlier row" if agrees else "contradicts an earlier row")
            except (ValueError, RecursionError) as error:
                if is_benchmark and cfg.on_bad_row == "stop":
                    raise BadRow(f"{place}: {error}; --on_bad_row skip would leave it out and count it") from None
                reason = re.sub(r"\d+", "N", re.split("[:;]", one_line(error), maxsplit=1)[0])[:100]
                dropped[reason] += 1
                first_dropped.setdefault(reason, one_line(f"{place}: {error}"))
                known = any(re.match("missing image|broken image|known to a benchmark", reason) for reason in dropped)
                if counts["rows_in"] >= 1000 and not verdicts and not known:
                    break  # this is another set
                continue
            verdicts[same] = verdict
            kind = "held_out" if prompt < cfg.hold_out * 2**64 else "comparisons"
            file(kind).write(line)
            counts[kind] += 1
            if kind == "comparisons":
                longer, shorter = sum(len(w) > len(l) for w, l in texts), sum(len(w) < len(l) for w, l in texts)
                counts.update(pairs=len(c.pairs), longer=longer, shorter=shorter, with_images=bool(c.images),
                              prior_sets=is_benchmark and c.category in PRIOR_SETS)
                sizes.extend((length, longest, len(c.responses)))
        stack.close()
        n = counts["comparisons"]
        if not n:
            source, (reason, times) = " ".join(cfg.source), (dropped.most_common(1) or [("no row", 0)])[0]
            raise BadRow(f"{source}: of the first {counts['rows_in']} rows none is left as a row of {name}; "
                         f"{counts['held_out']} held out; {times} times: {first_dropped.get(reason, 'holds no row')}")
        sizes = np.reshape(sizes, (n, 3))
        spreads = np.quantile(sizes[:, :2], (0.5, 0.99, 1), axis=0, method="higher").T.tolist()
        prompt_tokens, response_tokens = (dict(zip(("median", "p99", "most"), spread)) for spread in spreads)
        report = {
            "set": name, "source": cfg.source, "rows_in": counts["rows_in"], "comparisons": n, "pairs": counts["pairs"],
            "with_images": round(counts["with_images"] / n, 4),
            "prompt_tokens": prompt_tokens, "response_tokens": response_tokens,  # estimated: 4 bytes are one
            "responses_per_comparison": {str(k): times for k, times in sorted(Counter(sizes[:, 2].tolist()).items())},
            "longer_response_wins": round(counts["longer"] / max(counts["longer"] + counts["shorter"], 1), 4),
            "held_out": counts["held_out"], "dropped": dict(dropped.most_common()), "first_dropped": first_dropped}
        if is_benchmark:
            rows, published = n - counts["prior_sets"], BENCHMARKS[name]
            short = "; what these give is not the benchmark's figure" * (rows != published)
            report["benchmark"] = f"{rows:,} rows of {published:,} published{short}"
        (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report

# The command line ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    source: list[str] = HfArg(default_factory=list, help="files, folders or hub ids of the published set")
    out: str = HfArg(default="", help="folder to write")
    n: int = HfArg(default=0, help="read the first n rows, 0 for all; synthetic: draw n, 0 for 1000; show: n, 0 for 10")
    seed: int = HfArg(default=0, help="synthetic: which comparisons")
    workers: int = HfArg(default=0, help="threads, 0 for one a core; the result is the same whatever their number")
    max_tokens: int = HfArg(default=8192, help="most tokens of prompt and longest response, 4 bytes each; no images")
    decontaminate: list[str] = HfArg(default_factory=list, help="benchmarks' folders: rows they know are removed")
    hold_out: float = HfArg(default=0.0, help="share of the prompts to set apart in held_out.jsonl, such as 0.01")
    on_bad_row: Literal["stop", "skip"] = HfArg(default="stop", help="a benchmark's row that cannot be used: stop, or "
                                                "skip it; in other sets such rows are always skipped and counted")

def judge_prompts(folders, n: int):
    """Each pair of the rows (the first n, 0 for all) in both orders, by chance which is first: prompts of a judge that
    thinks, and as `answer` which is better, 1 or 2; what R1-Reward (arXiv 2505.02835) learns from by RL. Trap: of two
    such neighbours rl_demo.py may examine on one and learn from the other; measure a judge by evaluate.py."""
    for rows in map(read_comparisons, folders):
        for i in range(min(n or len(rows), len(rows))):
            c = rows[i]
            for pair in c.pairs:
                for order in random.Random(f"{i} {pair}").sample((pair, pair[::-1]), 2):
                    prompt = judge_pair(c, *order, think=True)
                    yield replace(prompt, responses=[], answer="12"[order.index(pair[0])], source="judge",
                                  id=f"{c.id or i + 1}-{order[0]}-{order[1]}")

def show(path: str, n: int) -> None:
    """Prints rows, read and checked as training would."""
    rows = read_comparisons(path, needs_responses=False)
    print(f"{rows.file}: {len(rows)} comparisons, {sum(rows.pairs)} pairs")
    for i in range(min(n, len(rows))):
        print(printable(f"\n--- row {i + 1} {use_row(rows, i, described)}"))

def described(c: Comparison) -> str:
    if not c.pairs and not c.answer:
        raise ValueError("neither pairs nor an answer: nothing to learn from")
    lines = [f"{c.category} {c.id}", text_of_prompt(c)]
    for image in c.images:
        frames = open_frames(image)
        lines.append(f"  image   {image}, {frames[0].width} x {frames[0].height}, frames: {len(frames)}")
    for j, response in enumerate(c.responses):
        beats = ", ".join(str(loser) for winner, loser in c.pairs if winner == j)
        lines.append(f"  {j}{beats and ' beats ' + beats}: {response[:300]}")
    return "\n".join(lines)

def main(argv: list[str]) -> None:
    names = ("show", "synthetic", "judge", *SETS)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nNAME is one of {', '.join(names)}")
        HfArgumentParser(Config, prog="data.py NAME").parse_args(["--help"])
    name, *rest = argv
    if name not in names:
        raise BadRow(f"unknown data set {name!r}; want one of {', '.join(names)}")
    folder = rest.pop(0) if name == "show" and rest and not rest[0].startswith("-") else ""
    (cfg,) = HfArgumentParser(Config, exit_on_error=False).parse_args_into_dataclasses(rest)
    for flag in {"show": (), "synthetic": ("out",)}.get(name, ("source", "out")):
        if not getattr(cfg, flag):
            source = "" if name == "synthetic" else f" --source {'FOLDER' if name == 'judge' else 'PATH_OR_HUB_ID'}"
            raise BadRow(f"--{flag} is missing; python data.py {name}{source} --out FOLDER")
    for flag, least, end in (("n", 0, 1e12), ("workers", 0, 1000), ("max_tokens", 1, 1e12), ("hold_out", 0, 1)):
        if not least <= getattr(cfg, flag) < end:
            raise BadRow(f"--{flag} {getattr(cfg, flag)}: want at least {least} and less than {end:g}")
    if name in BENCHMARKS and (cfg.hold_out or cfg.decontaminate):
        raise BadRow(f"the rows of {name} are all kept: --hold_out and --decontaminate are for training sets")
    if name == "show":
        return show(folder, cfg.n or 10)
    if name in SETS:
        print(printable(json.dumps(convert(name, cfg), indent=1, ensure_ascii=False)))
    else:
        drawn = name == "synthetic"
        write_comparisons(cfg.out, synthetic(cfg.n or 1000, cfg.seed) if drawn else judge_prompts(cfg.source, cfg.n))
    print(f"wrote {cfg.out}; look at it with: python data.py show {cfg.out}")

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only is no reason to stop
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, argparse.ArgumentError) as error:
        sys.exit(f"data.py: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped; nothing was written")
