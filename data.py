"""Data: comparisons from files, from a drawing program and from published sets, and the order in
which training reads them (BaseReward, arXiv 2509.16127, section 4.4).

Read: to the ruled line, 171 minutes: a row and its checks, files, the order of the steps, the drawn
set, one published set and its conversion. Below it: other sets, benchmarks, sources, conversations,
other projects' rows.

    python data.py synthetic --out data/drawn --n 1000
    python data.py rlaif-v --source openbmb/RLAIF-V-Dataset --out data/rlaif-v
    python data.py vl-rewardbench --source MMInstruction/VL-RewardBench --out bench/vl-rewardbench
    python data.py mmpr --source MMPR-v1.2 --out data/mmpr \\
        --decontaminate bench/vl-rewardbench --hold_out 0.01
    python data.py pairs --source mine.jsonl --out data/mine --n 100
    python data.py judge --source data/mine --out data/judge
    python data.py show data/mine

In this order: the drawn set as a folder (4 s), a published set streamed from the hub, a benchmark,
a set without a benchmark's rows and with 1% of its prompts held out, the first 100 rows of your
own, their pairs as prompts for a judge (RL), and a few rows printed as training would read them.

Every data set is a folder with `comparisons.jsonl` (one JSON object a line), `images/` and
`report.json` (the counts of the conversion). Three rows, the last two in TRL's layout:

    {"prompt": "<image>\\nWhat is shown?", "images": ["images/7.png"],
     "responses": ["A bus.", "Two buses."], "pairs": [[0, 1]]}
    {"prompt": "Name a fruit.", "chosen": "Apple", "rejected": "Table"}
    {"prompt": [{"role": "user", "content": [{"type": "image"},
                                             {"type": "text", "text": "What is shown?"}]}],
     "images": ["images/7.png"], "chosen": [{"role": "assistant", "content": "A bus."}],
     "rejected": [{"role": "assistant", "content": "Two buses."}]}

`pairs` holds (winner, loser) indices into `responses`. Paths are relative to the file and may not
leave its folder. An entry of `images` that is a folder of frames is a video. If the prompt has no
`<image>` placeholder, its images come first. `python data.py --help` lists all keys. Rows of
Anthropic's hh-rlhf, LLaMA-Factory and ms-swift are read as they are.
"""
import argparse
import base64
import contextlib
import copy
import graphlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import sys
import textwrap
from array import array
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterator, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from model import (PLACEHOLDER, Comparison, atomic_write, check_text, is_video, judge_prompt,
                   normalize_message, one_line, open_frames, open_image, printable, select_frames,
                   to_messages)

# 1  A row: its keys, its layouts, its checks ------------------------------------------

# All keys of a row that are read. `python data.py --help` prints this table and the next two
ROW_KEYS = {
    "prompt": "a text with <image> placeholders, or chat messages",
    "system": "a text: the system message before the prompt",
    "history": "earlier turns, a list of [question, answer]",
    "images": "paths inside the folder, or base64; a folder of frames is a video",
    "responses": "a list of texts",
    "pairs": "(winner, loser) indices into responses",
    "chosen": "the preferred response: a text, or a conversation that ends with it",
    "rejected": "the other one; both in place of responses and pairs (TRL's layout)",
    "answer": "a checkable answer, for RL",
    "critiques": "a list with one text for each response",
    "id": "a text or a number, as the next two",
    "source": "the data set that the row is from",
    "category": "accuracy is reported by category",
}
SPELLINGS = {
    "prompt": ("question", "query"),
    "system": ("system_prompt",),
    "images": ("image", "image_path", "image_paths", "image_url", "img"),
}
# These hold a part of the comparison and are not read: an error, with what to do. All other keys
# are ignored; `show` and report.json name them
UNREAD_CONTENT = {
    "write it into `prompt`": (
        "instruction", "input", "context", "options", "choices", "objects", "messages",
        "conversation", "conversations"),
    "describe the tools in `system`": ("tools", "functions"),
    "put the path of the folder of frames into `images`": ("video", "videos", "frames"),
    "audio is not supported; remove the row": ("audio", "audios"),
    "pictures in responses are not supported yet; remove the row": (
        "chosen_images", "rejected_images", "rejected_videos", "rejected_audios"),
    "a response is a text in `chosen`, `rejected` or `responses`": (
        "rejected_response", "rejected_messages"),
}
TRL_KEYS = ("chosen", "rejected")
OPTIONAL_KEYS = ("id", "source", "category", "answer")  # texts or numbers

# How a data URI and the base64 of a JPEG, a PNG, a WebP and a GIF begin
BASE64 = ("data:", "/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")

BENCHMARKS = {}  # name -> Benchmark, filled in appendix B


def describe_keys() -> str:
    """The keys of a row, for `python data.py --help`."""
    lines = ['Keys of a row that are read (null, NaN, "", [] and {} count as absent):']
    for key, meaning in ROW_KEYS.items():
        lines.append(f"  {key:<11}{meaning}")
    lines.append("Other spellings:")
    for key, spellings in SPELLINGS.items():
        lines.append(f"  {key:<11}{', '.join(spellings)}")
    lines.append("Keys that hold a part of the comparison and are not read, each an error:")
    for remedy, keys in UNREAD_CONTENT.items():
        lines.append(textwrap.fill(f"{', '.join(keys)}: {remedy}", 79, initial_indent="  ",
                                   subsequent_indent="    ", break_on_hyphens=False))
    lines.append("Other keys are ignored; `show` and report.json name them.")
    return "\n".join(lines)


def is_filled(value) -> bool:
    """Whether a key has a value. In a table of several data sets every row has every key.

    >>> [is_filled(value) for value in (None, math.nan, "", [], 0)]
    [False, False, False, False, True]
    """
    if isinstance(value, float) and math.isnan(value):  # the null of pandas
        return False
    return value is not None and value not in ("", [], (), {})


def filled_keys(row: dict) -> dict:
    """The keys of a row that have a value. Beside a chosen response an empty rejected one ("" or
    []) stays, and the other way round: it is an error, and not an absent key."""
    filled = {}
    for key, value in row.items():
        if is_filled(value):
            filled[key] = value
    if any(key in filled for key in TRL_KEYS):
        for key in TRL_KEYS:
            if row.get(key) is not None:
                filled[key] = row[key]
    return filled


def rename_spellings(row: dict) -> dict:
    """The row with the keys of ROW_KEYS. ValueError if two spellings have different values."""
    renamed = dict(row)
    for key, spellings in SPELLINGS.items():
        for spelling in (key, *spellings):
            if spelling not in renamed:
                continue
            value = renamed.pop(spelling)
            if key == "images":
                value = list(value) if isinstance(value, (list, tuple)) else [value]
            if renamed.setdefault(key, value) != value:
                raise ValueError(f"`{key}` and `{spelling}` differ, and only one is read: keep one "
                                 "of the two keys")
    return renamed


def is_published(row: dict) -> bool:
    """Whether `convert` or `data.py judge` wrote the row: its layout and texts are not examined
    again. Rows of `data.py pairs` are your own and are."""
    source = str(row.get("source"))
    return source in (*SETS, "judge") and source != "pairs"


@dataclass
class RowFields:
    """The fields of a row, the same for all layouts, not yet checked."""
    row: dict  # its keys that have a value
    layout: str  # "native", "TRL", or another project's name
    prompt: str | list
    responses: list
    pairs: list
    images: list

    def unread_keys(self) -> list[str]:
        return [key for key in self.row if key not in ROW_KEYS]


def parse_fields(row) -> RowFields:
    """The fields of a row in any layout. ValueError if it has no prompt or a key is not read."""
    if not isinstance(row, dict):
        raise ValueError(f"found {type(row).__name__}, want a JSON object with the keys prompt, "
                         "responses, pairs")
    row = rename_spellings(filled_keys(row))
    row, layout = to_texts(row)  # conversations, other projects' layouts: appendices F and G
    if "prompt" not in row:
        raise ValueError(f"the keys ['prompt'] are missing; found {sorted(row)}")

    responses = row.get("responses", [])
    pairs = row.get("pairs", [])
    if "chosen" in row:  # and "rejected": to_texts refuses one without the other
        if pairs:
            raise ValueError("`pairs` beside `chosen` and `rejected`: want one of the two layouts")
        responses = [row["chosen"], row["rejected"]]
        pairs = [(0, 1)]
    return RowFields(row, layout, row["prompt"], responses, pairs, row.get("images", []))


def image_source(image):
    """The bytes of an image given as base64 or as {"bytes", "path"}, else its path.

    ValueError if it is base64 that cannot be decoded, or on the web.
    """
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image.get("url")
    if isinstance(image, bytes):
        return image
    check_text(image, "the path of an image")
    if image.startswith(BASE64):
        try:
            return base64.b64decode(image.rpartition(",")[2])
        except ValueError as error:
            raise ValueError(f"broken image: base64 that cannot be decoded: {error}") from None
    if re.match("https?://|s3://|gs://", image):
        raise ValueError(f"an image on the web: {image[:150]}; fetch it into the folder and give "
                         "its relative path")
    return image


def resolve_inside(folder: Path, path: str) -> str:
    """folder/path. ValueError if the path as written leaves the folder; links are followed."""
    leaves_folder = os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == ".."
    if not path or leaves_folder or path.startswith("file:"):
        raise ValueError(f"an image outside the data folder: {path[:150]!r}; put it inside and "
                         "give its relative path")
    return str(folder / path)


def resolve_image(image, folder: Path):
    """The path of an image in the folder, or its bytes."""
    source = image_source(image)
    if isinstance(source, bytes):
        return source
    return resolve_inside(folder, source)


def check_responses(responses, is_benchmark: bool) -> None:
    """ValueError unless the responses are a list of texts that are not empty.

    Empty and identical responses of a benchmark stay: they are part of its figure, as ties, and a
    tie counts as wrong.
    """
    if not isinstance(responses, list):
        raise ValueError("responses must be a list of texts")
    for i, response in enumerate(responses):
        check_text(response, f"response {i}")
        if not response.strip() and not is_benchmark:
            raise ValueError(f"response {i} is empty")


def are_two_indices(pair, num_responses: int) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return False
    return all(type(index) is int and 0 <= index < num_responses for index in pair)  # no bool


def check_pairs(responses: list[str], pairs, is_benchmark: bool) -> None:
    """ValueError unless the pairs are (winner, loser) indices that some ranking satisfies."""
    if not isinstance(pairs, list):
        raise ValueError("pairs must be a list like [[0, 1]]: response 0 was preferred to "
                         "response 1")

    winners_over = {i: set() for i in range(len(responses))}  # loser -> its winners
    for pair in pairs:
        if not are_two_indices(pair, len(responses)):
            raise ValueError(f"pair {str(pair)[:80]} is out of range: want two whole numbers below "
                             f"{len(responses)}")
        winner, loser = pair
        if responses[winner] == responses[loser] and not is_benchmark:
            raise ValueError(f"pair {list(pair)} has two identical responses: "
                             f"{responses[winner][:40]!r}")
        if winner in winners_over[loser]:
            raise ValueError(f"pair {list(pair)} is listed twice; a weight is given with "
                             "--data FOLDER:2.0")
        winners_over[loser].add(winner)

    try:
        graphlib.TopologicalSorter(winners_over).prepare()
    except graphlib.CycleError as error:
        raise ValueError(f"the pairs contradict each other: {error.args[1]} beat each other in a "
                         "circle") from None


def parse_optional_keys(row: dict, num_responses: int) -> dict:
    """The optional keys that a row has, as texts. A blank text is none."""
    values = {}
    for key in OPTIONAL_KEYS:
        value = row.get(key, "")
        if isinstance(value, (int, float)):
            value = str(value)
        check_text(value, key)
        if value.strip():
            values[key] = value

    if "critiques" in row:
        critiques = row["critiques"]
        if not isinstance(critiques, list) or len(critiques) != num_responses:
            raise ValueError(f"critiques must be a list of {num_responses} texts, one for each "
                             "response")
        for critique in critiques:
            check_text(critique, "a critique")
        values["critiques"] = critiques
    return values


def make_comparison(fields: RowFields, images: list, needs_responses: bool) -> Comparison:
    """The fields, checked, as a Comparison. images: those of the fields, resolved."""
    missing = [name for name in ("responses", "pairs") if not getattr(fields, name)]
    if needs_responses and missing:
        raise ValueError(f"the keys {missing} are missing; found {sorted(fields.row)}; pairs like "
                         "[[0, 1]] say that response 0 was preferred to 1; prompt, chosen and "
                         "rejected will do too")

    messages = to_messages(fields.prompt, images)  # checks roles, texts and placeholders
    if not any(message["content"].strip() for message in messages):
        raise ValueError("the prompt is empty")

    is_benchmark = str(fields.row.get("source")) in BENCHMARKS
    check_responses(fields.responses, is_benchmark)
    check_pairs(fields.responses, fields.pairs, is_benchmark)
    pairs = [tuple(pair) for pair in fields.pairs]
    optional = parse_optional_keys(fields.row, len(fields.responses))
    return Comparison(fields.prompt, fields.responses, pairs, images, **optional)


def parse_row(row, folder: Path, needs_responses: bool = True) -> Comparison:
    """A row in any layout as a Comparison whose images lie in `folder`.

    All checks are made here, except that images are not opened. ValueError: what was found, and
    what to do. With needs_responses=False a row may have an `answer` in place of responses and
    pairs: a prompt for RL.

    >>> row = {"prompt": "Name a fruit.", "chosen": "Apple", "rejected": "Table"}
    >>> parse_row(row, Path(".")).responses
    ['Apple', 'Table']
    """
    fields = parse_fields(row)
    images = [resolve_image(image, folder) for image in fields.images]
    return make_comparison(fields, images, needs_responses)


# 2  Files of comparisons --------------------------------------------------------------

# For lines that are not parsed. Inside a JSON text a quote is \", so that these match keys alone
PAIRS = re.compile(rb'"pairs"\s*:\s*(\[[\s\d,\[\]]*\])')
ONE_PAIR = re.compile(rb'"(?:chosen|rejected_response|rejected_messages)"\s*:'
                      rb'(?!\s*(?:null|NaN|""|\[\s*\]))')


class BadRow(ValueError):
    """A row, file or folder that cannot be used: one line with location, cause and remedy."""

    def __init__(self, message):
        super().__init__(one_line(message))


def parse_json(row):
    """A row decoded, if it is JSON (bytes or text); any other object is returned as it is."""
    if not isinstance(row, (bytes, str)):
        return row
    try:
        return json.loads(row)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
        raise ValueError(f"malformed JSON: {error}; want one JSON object a line") from None


def read_start(file: Path) -> bytes:
    """The first bytes of a file, without a byte order mark and white space. BadRow if they are no
    UTF-8."""
    with open(file, "rb") as stream:
        start = stream.read(64)
    if b"\0" in start or start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadRow(f"{file} is no UTF-8 text: unpack it if it is compressed; if it is UTF-16: "
                     f"iconv -f UTF-16 -t UTF-8 {shlex.quote(str(file))} > NEW.jsonl")
    return start.lstrip(b"\xef\xbb\xbf \t\r\n")


def count_pairs(line: bytes) -> int:
    """Number of pairs in a line of JSON, without parsing it; 0 for a prompt for RL."""
    match = PAIRS.search(line)
    num_pairs = match[1].count(b"[") - 1 if match else 0
    if num_pairs > 0:
        return num_pairs
    if ONE_PAIR.search(line):
        return 1
    return 0


class Comparisons:
    """The rows of a file, or of a folder's comparisons.jsonl.

    `rows[i]` reads and checks a Comparison; BadRow with file and line if it cannot be used. Rows
    are read when needed: an index of 32 bytes a row is all that stays in memory.

    pair_counts: (rows,) number of pairs of each row
    line_sizes:  (rows,) bytes of each line
    """

    def __init__(self, path, needs_responses: bool = True):
        self.file = Path(path)
        if self.file.is_dir():
            self.file = self.file / "comparisons.jsonl"
        if not self.file.is_file():
            raise BadRow(f"{self.file} does not exist; want a folder with comparisons.jsonl, or "
                         "such a file")
        if read_start(self.file).startswith(b"["):
            raise BadRow(f"{self.file} is one JSON array, want one JSON object a line; python "
                         f"data.py pairs --source {shlex.quote(str(self.file))} --out FOLDER reads "
                         "arrays")
        self.folder = self.file.parent
        self.needs_responses = needs_responses

        index = array("q")  # four numbers a row
        start = 0
        with open(self.file, "rb") as stream:
            for line_number, line in enumerate(stream, start=1):
                if line.strip():
                    num_pairs = count_pairs(line)
                    if needs_responses:
                        num_pairs = max(num_pairs, 1)
                    index.extend((start, len(line), line_number, num_pairs))
                start += len(line)
        if not index:
            raise BadRow(f"{self.file} holds no row; want one JSON object a line")
        self.index = np.frombuffer(index, dtype=np.int64).reshape(-1, 4)  # (rows, 4)
        self.descriptor = os.open(self.file, os.O_RDONLY)

    @property
    def line_sizes(self) -> np.ndarray:
        return self.index[:, 1]

    @property
    def pair_counts(self) -> np.ndarray:
        return self.index[:, 3]

    def __len__(self) -> int:
        return len(self.index)

    def line(self, i: int) -> bytes:
        start, size, _, _ = self.index[i].tolist()
        return os.pread(self.descriptor, size, start)  # safe in several threads, as seek is not

    def __getitem__(self, i: int) -> Comparison:
        try:
            return parse_row(parse_json(self.line(i)), self.folder, self.needs_responses)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{self.location(i)}: {error}") from None

    def location(self, i: int) -> str:
        """FILE:LINE of a row."""
        return f"{self.file}:{self.index[i, 2]}"

    def select(self, indices) -> "Comparisons":
        """The same file with these rows only."""
        selected = copy.copy(self)
        selected.index = self.index[list(indices)]
        return selected


read_comparisons = Comparisons


def row_location(rows, i: int) -> str:
    """Where row i is from; rows: Comparisons, or a list of comparisons."""
    if isinstance(rows, Comparisons):
        return rows.location(i)
    return f"{rows[i].source} comparison {i + 1}".strip()


def as_bad_row(error: ValueError, rows, i: int) -> BadRow:
    """An error of reading or encoding row i as a BadRow, with the row's location.

    The third of three steps, which callers write out: read the row, encode it, decide what to do
    with one that cannot be used.
    """
    if isinstance(error, BadRow):  # from reading: it has the location
        return error
    return BadRow(f"{row_location(rows, i)}: {error}")


# 3  The order of the steps ------------------------------------------------------------


@dataclass
class Epoch:
    """The rows of one epoch in their order, cut into steps."""
    number: int
    rows: torch.Tensor  # (num_rows, 2): set and row
    starts: torch.Tensor  # (steps_per_epoch + 1,): step i has rows starts[i] to starts[i + 1]


class Order:
    """Which rows a step reads: a function of (seed, step) alone, whatever the number of ranks.

    So a resumed run repeats no row and skips none. An epoch is a random permutation of all rows,
    cut into ceil(pairs / batch_size) steps with equal numbers of pairs, as far as whole rows allow.
    A set of weight 2 is read twice in an epoch; of a set of weight 0.5 a random half is read.

    pair_counts_of_sets: for each set, the number of pairs of each of its rows. Rows are returned as
    (index of the set, index of the row).

    >>> order = Order([[1, 1, 1]], weights=[1.0], batch_size=2, seed=0)
    >>> sorted(order.rows_of_step(0) + order.rows_of_step(1))
    [(0, 0), (0, 1), (0, 2)]
    """

    def __init__(self, pair_counts_of_sets, weights, batch_size: int, seed: int):
        self.pair_counts = []
        self.weights = list(weights)
        self.seed = seed
        self.num_rows = 0
        num_pairs = 0
        for counts, weight in zip(pair_counts_of_sets, self.weights):
            counts = torch.as_tensor(counts, dtype=torch.int32)
            self.pair_counts.append(counts)
            self.num_rows += round(weight * len(counts))
            num_pairs += weight * int(counts.sum())
        if not self.num_rows:
            raise ValueError(f"with weights of {self.weights} no row is left to train on")
        self.steps_per_epoch = min(math.ceil(num_pairs / batch_size), self.num_rows)
        self.epoch = None

    def draw_epoch(self, number: int) -> Epoch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        rows_of_sets = []
        counts_of_sets = []
        for set_index, (counts, weight) in enumerate(zip(self.pair_counts, self.weights)):
            permutations = []  # one for each time that the set is read, the last perhaps in part
            for _ in range(math.ceil(weight)):
                permutations.append(torch.randperm(len(counts), generator=generator))
            rows = torch.cat(permutations)[:round(weight * len(counts))]
            rows_of_sets.append(torch.stack([torch.full_like(rows, set_index), rows], dim=1))
            counts_of_sets.append(counts[rows])

        shuffle = torch.randperm(self.num_rows, generator=generator)
        rows = torch.cat(rows_of_sets)[shuffle]
        counts = torch.cat(counts_of_sets)[shuffle]
        return Epoch(number, rows, self.cut_into_steps(counts))

    def cut_into_steps(self, counts: torch.Tensor) -> torch.Tensor:
        """The first row of each step, and the end of the last. counts: (num_rows,) pairs.

        With counts 1 5 1 1 in four steps of two pairs, steps 1, 2 and 3 would all begin at row 2,
        behind the long row. The loop moves them to rows 1, 2 and 3."""
        num_steps = self.steps_per_epoch
        pairs_before_row = counts.cumsum(0) - counts
        pairs_before_step = torch.arange(num_steps) * int(counts.sum()) // num_steps
        starts = torch.searchsorted(pairs_before_row, pairs_before_step).tolist()
        for step in range(num_steps):  # at least one row each, also where a row fills two steps
            if step > 0:
                starts[step] = max(starts[step], starts[step - 1] + 1)
            starts[step] = min(starts[step], self.num_rows - (num_steps - step))
        return torch.tensor(starts + [self.num_rows])

    def rows_of_step(self, step: int) -> list[tuple[int, int]]:
        """The rows of a step, those of all ranks together."""
        number, step = divmod(step, self.steps_per_epoch)
        epoch = self.epoch
        if epoch is None or epoch.number != number:
            epoch = self.draw_epoch(number)
            self.epoch = epoch
        start, end = epoch.starts[step:step + 2]
        return [tuple(row) for row in epoch.rows[start:end].tolist()]

    def num_steps(self, epochs: float) -> int:
        """Number of steps in so many epochs, at least one."""
        return max(round(epochs * self.steps_per_epoch), 1)


# 4  The drawn set ---------------------------------------------------------------------

VISUAL = ("colour", "shape", "count", "position", "describe")  # categories that need the image
ASPECTS = {"colour": ["colour"], "shape": ["shape"], "count": ["count"], "position": ["place"],
           "describe": ["colour", "place"], "text": ["colour"]}  # what each word of a response says
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"left": (23, 42), "right": (61, 42), "top": (42, 23), "bottom": (42, 61)}  # centre x, y
CORNERS = [(21, 21), (63, 21), (21, 63), (63, 63)]
# All brighter than the background: "something is there" is then one direction in pixel space, which
# is learned in few steps
COLOURS = {"red": (235, 60, 60), "green": (60, 200, 60), "blue": (60, 90, 245),
           "yellow": (240, 220, 60), "white": (245, 245, 245), "pink": (250, 120, 190)}


@dataclass
class Scene:
    """What the picture of a drawn comparison shows, or its text says."""
    category: str
    colour: str
    other_colour: str
    place: str
    other_place: str
    shape: str
    count: int
    box: int  # the number of a box in a text; even, odd if held out


def ask_about(scene: Scene) -> tuple:
    """(question, its answer, all responses to choose from) for the category of a scene."""
    if scene.category == "colour":
        return f"What colour is the {scene.shape}?", scene.colour, COLOURS
    if scene.category == "shape":
        return f"Which shape is {scene.colour}?", scene.shape, SHAPES
    if scene.category == "count":
        return "How many shapes are there?", str(scene.count), ("1", "2", "3", "4")
    if scene.category == "position":
        return f"Where is the {scene.shape}?", scene.place, PLACES
    if scene.category == "describe":
        choices = []
        for colour in (scene.colour, scene.other_colour):
            for place in (scene.place, scene.other_place):
                choices.append(f"{colour} {place}")
        return "Name colour and place.", f"{scene.colour} {scene.place}", choices
    question = f"Box {scene.box} is {scene.colour}. What colour is box {scene.box}?"
    return question, scene.colour, COLOURS


def count_right_words(response: str, answer: str) -> int:
    """The grade of a response: how many of its words are in the answer."""
    return len([word for word in response.split() if word in answer.split()])


def critique_of(response: str, category: str, answer: str) -> str:
    """What is right and what is wrong in a response, such as "colour right, place wrong"."""
    remarks = []
    for aspect, word in zip(ASPECTS[category], response.split()):
        verdict = "right" if word in answer.split() else "wrong"
        remarks.append(f"{aspect} {verdict}")
    return ", ".join(remarks)


def draw_shape(canvas, shape: str, x: int, y: int, radius: int, colour: tuple) -> None:
    left, right = x - radius, x + radius
    top, bottom = y - radius, y + radius
    if shape == "circle":
        canvas.ellipse((left, top, right, bottom), colour)
    elif shape == "square":
        canvas.rectangle((left, top, right, bottom), colour)
    elif shape == "triangle":
        canvas.polygon([(x, top), (left, bottom), (right, bottom)], colour)
    else:
        third = radius // 3
        canvas.rectangle((left, y - third, right, y + third), colour)
        canvas.rectangle((x - third, top, x + third, bottom), colour)


def draw_picture(scene: Scene, rng: random.Random) -> Image.Image:
    """84 x 84 pixels on a dark background: one large shape in the middle (colour, shape), several
    in corners (count), or a smaller one at its place."""
    centres = [PLACES[scene.place]]
    radii = (15, 19)
    if scene.category in ("colour", "shape"):
        centres = [(42, 42)]
        radii = (24, 30)
    if scene.category == "count":
        centres = rng.sample(CORNERS, scene.count)
        radii = (12, 16)

    background = tuple(rng.randint(35, 55) for _ in range(3))
    image = Image.new("RGB", (84, 84), background)
    canvas = ImageDraw.Draw(image)
    for x, y in centres:  # with a random offset of place, size and colour
        x += rng.randint(-4, 4)
        y += rng.randint(-4, 4)
        radius = rng.randint(*radii)
        channels = []
        for channel in COLOURS[scene.colour]:
            channel += rng.randint(-15, 15)
            channels.append(min(max(channel, 0), 255))
        draw_shape(canvas, scene.shape, x, y, radius, tuple(channels))
    return image


def synthetic_comparison(seed: int, i: int, held_out: bool) -> Comparison:
    """Comparison i of a seed: 2 to 4 responses, graded from right to wrong.

    Right and wrong responses have one distribution: without the picture, or the text about the
    box, a model is at chance.
    """
    prefix = "held out " if held_out else ""
    rng = random.Random(f"{prefix}{seed} {i}")
    category = rng.choice((*VISUAL, "text"))
    num_responses = rng.randint(2, 4)
    colour, other_colour = rng.sample(list(COLOURS), 2)
    place, other_place = rng.sample(list(PLACES), 2)
    shape = rng.choice(SHAPES)
    count = rng.randint(1, 4)
    box = rng.randrange(1000, 10000, 2)
    if held_out:
        box += 1
    scene = Scene(category, colour, other_colour, place, other_place, shape, count, box)

    prompt, answer, choices = ask_about(scene)
    images = []
    if category in VISUAL:
        images = [draw_picture(scene, rng)]
        prompt = "<image>" + prompt

    wrong = [choice for choice in choices if choice != answer]
    responses = [answer] + rng.sample(wrong, num_responses - 1)
    rng.shuffle(responses)
    grades = [count_right_words(response, answer) for response in responses]
    pairs = []  # responses of one grade tie and make none, as three wrong colours
    for winner, loser in itertools.permutations(range(num_responses), 2):
        if grades[winner] > grades[loser]:
            pairs.append((winner, loser))
    critiques = [critique_of(response, category, answer) for response in responses]
    return Comparison(prompt, responses, pairs, images, id=f"{seed}-{i}", source="synthetic",
                      category=category, answer=answer, critiques=critiques)


def synthetic(n: int, seed: int = 0, held_out: bool = False) -> list[Comparison]:
    """n comparisons on drawn pictures of coloured shapes, and some on a text about a numbered box.

    Those that are held out, for evaluation, share no box number with the others, whatever the
    seeds, and practically no picture.
    """
    return [synthetic_comparison(seed, i, held_out) for i in range(n)]


def remove_images(comparison: Comparison) -> Comparison:
    """The same question without its images: a control of what the text alone gives."""
    prompt = []
    for message in to_messages(comparison.prompt, comparison.images):
        text = PLACEHOLDER.sub("", message["content"]).lstrip("\n")
        prompt.append(message | {"content": text})
    return replace(comparison, images=[], prompt=prompt)


def shuffle_images(comparisons, seed: int = 0) -> list[Comparison]:
    """The comparisons that have images, with the images of another: a model that uses its images
    falls to chance on them.

    Images are exchanged between prompts with equal numbers of images. No prompt gets its own, or
    the same picture from another prompt, unless more than half of them have that picture.
    """
    visual = [comparison for comparison in comparisons if comparison.images]
    groups = {}  # number of images -> {images: indices of the comparisons that have them}
    for i in random.Random(seed).sample(range(len(visual)), len(visual)):
        images = visual[i].images
        key = repr(images)  # files differ by name, decoded pictures by their address in memory
        groups.setdefault(len(images), {}).setdefault(key, []).append(i)

    shuffled = list(visual)
    for indices_by_images in groups.values():
        order = []  # comparisons with the same images are neighbours
        longest_run = 0
        for indices in indices_by_images.values():
            order += indices
            longest_run = max(longest_run, len(indices))
        shifted = order[longest_run:] + order[:longest_run]
        for i, other in zip(order, shifted):
            shuffled[i] = replace(visual[i], images=visual[other].images)
    return shuffled


@contextlib.contextmanager
def new_folder(folder):
    """Yields a folder to write into, which gets its name when the block ends without an error.

    Meanwhile no other process can write it. A killed process leaves FOLDER.lock, which does no
    harm.
    """
    lock_file = Path(f"{Path(folder)}.lock")
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BadRow(f"another process is writing {folder}; wait for it or choose another "
                     "--out") from None
    try:
        if Path(folder).exists():
            raise BadRow(f"{folder} exists already; remove it or choose another --out")
        with atomic_write(folder) as partial:
            (partial / "images").mkdir(parents=True)
            yield partial
    finally:
        lock_file.unlink(missing_ok=True)
        lock.release()


def to_row(comparison: Comparison) -> dict:
    """A comparison as the row of a file; keys without a value are left out."""
    return {key: value for key, value in vars(comparison).items() if value}


def to_json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def save_image(image, path: Path) -> None:
    """Saves an image as a PNG file, or a video as a folder of PNG files."""
    if not is_video(image):
        open_image(image).save(path)
        return
    path.mkdir()
    for i, frame in enumerate(open_frames(image)):
        frame.save(path / f"{i}.png")


def write_comparisons(folder, comparisons, progress: bool = True) -> Path:
    """Writes comparisons as a data folder; their images may be in memory or in files."""
    folder = Path(folder)
    with new_folder(folder) as out, open(out / "comparisons.jsonl", "w", encoding="utf-8") as file:
        bar = tqdm(comparisons, disable=not progress, desc=folder.name)
        for row_index, comparison in enumerate(bar):
            paths = []
            for image_index, image in enumerate(comparison.images):
                path = f"images/{row_index}-{image_index}"
                if not is_video(image):
                    path += ".png"
                save_image(image, out / path)
                paths.append(path)
            file.write(to_json_line(to_row(replace(comparison, images=paths))))
    return folder


# 5  A published set, and its conversion -----------------------------------------------
# A reader is a function from a row as it was published to a row as in the docstring at the top, or
# for RL to {"prompt", "images", "answer"}. A set of your own needs such a function and a line in
# SETS. A ValueError drops the row. Rows dropped for one reason are counted together: the reason is
# the error's text up to the first colon or semicolon, with N for each number.


def required_fields(row: dict, *names: str) -> list:
    """The values of the named fields. ValueError if one is absent.

    "a|b" is a field with two spellings: the first that is not empty.

    >>> required_fields({"id": 7, "image": "", "video": "clip9"}, "id", "image|video")
    [7, 'clip9']
    """
    values = []
    for name in names:
        present = [row[key] for key in name.split("|") if key in row]
        if not present:
            raise ValueError(f"no field {name.replace('|', ' or ')}: found {sorted(row)}; is this "
                             "another set's file?")
        filled = [value for value in present if value]
        values.append(filled[0] if filled else present[0])
    return values


def pair(prompt, chosen, rejected, images=()) -> dict:
    """The row of a preference pair.

    chosen, rejected: texts, or conversations with a common beginning. images: one or a list.
    """
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "images": images}


def rlaif_v(row: dict) -> dict:
    """openbmb/RLAIF-V-Dataset, 83,132 pairs, CC BY-NC 4.0.

    Trap: VL-RewardBench is drawn from it too; decontaminate.
    """
    question, chosen, rejected, image = required_fields(row, "question", "chosen", "rejected",
                                                        "image")
    return pair(question, chosen, rejected, image)


@dataclass(frozen=True)
class PublishedSet:
    """How a row of a set is read, and where its rows are."""
    read_row: Callable  # published row -> row; a benchmark's also has `part`, its file or split
    files: str = "train*.parquet *.parquet *.jsonl *.json"  # first pattern with files; "a*,b*" both
    splits: str = "train"  # on the hub: those that exist; "config:a b" names a configuration


# Appendix A adds the other sets, appendix B the benchmarks
SETS = {
    "rlaif-v": PublishedSet(rlaif_v),
}

SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"GI": ".gif", b"BM": ".bmp",
            b"II": ".tif", b"MM": ".tif"}  # by the first two bytes of a file


@dataclass
class SourceRow:
    """A row as it was published."""
    location: str  # FILE:NUMBER or SPLIT:NUMBER
    content: object  # JSON (bytes or text) or an object
    part: str  # name of its file or split
    folder: Path  # where its images are


@dataclass
class LoadedImage:
    """An image of a published row, or a folder of frames, read and decoded."""
    path: str  # its name in the data folder
    files: dict[str, bytes]  # path -> content; several for a video
    first_frame: Image.Image


def find_image(folder: Path, path: str) -> Path | None:
    """folder/path, or where the archive has put it: short/1.png may lie in short/, images/ or (in a
    checkout) data/. None if it is not there, ValueError if the path leaves the folder."""
    resolve_inside(folder, path)
    for parent in ("", path.split("/")[0], "images", "data"):
        if os.path.exists(folder / parent / path):
            return folder / parent / path
    return None


def load_image(source, folder: Path) -> LoadedImage:
    """Reads an image, or a folder of frames, of which those that the model reads are taken.

    source: bytes, base64, {bytes, path} (an Image of `datasets`), or a path in the folder. All are
    decoded: what is no regular file or no readable image is a ValueError, and is not stored.
    """
    source = image_source(source)
    if not isinstance(source, bytes):
        file = find_image(folder, source)
        if file is None:
            raise ValueError(f"missing image: {source} is not in {folder}")
        source = file

    try:
        frames = open_frames(source)
        if len({frame.size for frame in frames}) > 1:
            raise ValueError(f"the frames of {source} have different sizes")
        contents = []
        for frame in select_frames(source):
            contents.append(frame if isinstance(frame, bytes) else Path(frame).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"broken image: {error}") from None

    digest = hashlib.blake2b(b"".join(contents), digest_size=16).hexdigest()
    path = f"images/{digest[:2]}/{digest}"  # 256 sub-folders: no folder holds a million files
    suffixes = [SUFFIXES.get(content[:2], "") for content in contents]
    if not is_video(source):
        path += suffixes[0]
        return LoadedImage(path, {path: contents[0]}, frames[0])
    files = {}
    for i, content in enumerate(contents):
        files[f"{path}/{i:02}{suffixes[i]}"] = content
    return LoadedImage(path, files, frames[0])


def store_files(files: dict[str, bytes], out: Path) -> None:
    """Writes files that are named by their content: two threads that write one write the same."""
    for path, content in files.items():
        if not (out / path).exists():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_bytes(content)


@dataclass
class CuratedRow:
    """A row of a published set after its checks; its images are stored."""
    fields: RowFields
    comparison: Comparison
    prompt: str  # the text of the prompt
    prompt_tokens: int  # estimated
    response_tokens: int  # of the longest response
    contaminated_by: str  # location of a benchmark's row, or ""


def prompt_text(comparison: Comparison) -> str:
    """The text of all messages of the prompt."""
    messages = to_messages(comparison.prompt, comparison.images)
    return "\n".join([message["content"] for message in messages])


def estimate_tokens(text: str) -> int:
    """Estimated number of tokens: one for 4 bytes."""
    return (len(text.encode()) + 3) // 4


def read_published_row(source_row: SourceRow, name: str) -> dict:
    """The row in this file's layout or in TRL's; images are not yet loaded."""
    published = parse_json(source_row.content)
    if not isinstance(published, dict):
        raise ValueError(f"found {type(published).__name__}, want a JSON object")
    published = {key: value for key, value in published.items() if value is not None}  # parquet
    if name in BENCHMARKS:
        published["part"] = source_row.part
    try:
        row = SETS[name].read_row(published)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"unexpected layout: {type(error).__name__}: {error}") from None
    for key, value in (("id", published.get("id")), ("id", source_row.location), ("source", name)):
        if not is_filled(row.get(key)):
            row[key] = value
    return row


def curate(source_row: SourceRow, name: str, cfg: "Config", out: Path,
           benchmark_rows: "BenchmarkRows") -> CuratedRow:
    """Checks a row and stores its images in `out`. ValueError if the row cannot be used."""
    row = read_published_row(source_row, name)
    fields = parse_fields(row)
    needs_responses = bool(fields.pairs) or "answer" not in row
    if not needs_responses and not str(row["answer"]).strip():
        raise ValueError("no answer: it is empty")
    comparison = make_comparison(fields, fields.images, needs_responses)

    prompt = prompt_text(comparison)
    prompt_tokens = estimate_tokens(prompt)
    response_tokens = max(map(estimate_tokens, comparison.responses), default=0)
    if prompt_tokens + response_tokens > cfg.max_tokens and name not in BENCHMARKS:
        raise ValueError(f"over-long: {prompt_tokens} tokens of prompt, {response_tokens} of "
                         f"response; --max_tokens {cfg.max_tokens}")

    loaded = [load_image(image, source_row.folder) for image in fields.images]
    first_frames = [image.first_frame for image in loaded]
    contaminated_by = benchmark_rows.find(comparison, first_frames)
    if not contaminated_by:
        for image in loaded:
            store_files(image.files, out)
    comparison = replace(comparison, images=[image.path for image in loaded])
    return CuratedRow(fields, comparison, prompt, prompt_tokens, response_tokens, contaminated_by)


def map_in_order(function, items: Iterator, workers: int) -> Iterator[tuple[object, Future]]:
    """Yields (item, future of function(item)) in order, with few items in memory.

    Closing it waits for all threads: none may write into a folder that is being removed.
    """
    with ThreadPoolExecutor(workers) as threads:
        while batch := list(itertools.islice(items, 32 * workers)):
            futures = [threads.submit(function, item) for item in batch]
            yield from zip(batch, futures)


def curate_rows(name: str, cfg: "Config", out: Path,
                benchmark_rows: "BenchmarkRows") -> Iterator[tuple[SourceRow, Future]]:
    """Yields each source row with the future of its CuratedRow. Threads, since images are decoded
    and hashed outside of Python's lock."""
    def curate_row(source_row: SourceRow) -> CuratedRow:
        return curate(source_row, name, cfg, out, benchmark_rows)

    sources = [read_source(name, source) for source in cfg.source]  # --source: appendix C
    source_rows = itertools.chain.from_iterable(sources)
    if cfg.n:
        source_rows = itertools.islice(source_rows, cfg.n)
    return map_in_order(curate_row, source_rows, cfg.num_workers())


def hash64(*values) -> int:
    """64 bits of hash. Of 2.8M rows two different ones have one hash with a probability of 2e-7."""
    digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def normalise(text: str) -> str:
    """A text without placeholders, in lower case, words separated by one space."""
    return " ".join(PLACEHOLDER.sub(" ", text).lower().split())


@dataclass
class RowHashes:
    """Hashes by which a row is compared with earlier ones."""
    prompt: int  # of the normalised prompt and the images
    row: int  # of the prompt, the images and the responses, these in any order
    verdict: int  # of the pairs and the answer, below 256: Python keeps one copy of such integers,
    # and only 1 contradiction in 256 is taken for a duplicate


def hash_row(curated: CuratedRow) -> RowHashes:
    comparison = curated.comparison
    texts_of_pairs = []
    for winner, loser in comparison.pairs:
        texts_of_pairs.append((comparison.responses[winner], comparison.responses[loser]))
    prompt = hash64(normalise(curated.prompt), comparison.images)  # images are named by content
    row = hash64(prompt, sorted(comparison.responses))
    verdict = hash64(sorted(texts_of_pairs), comparison.answer) % 256
    return RowHashes(prompt, row, verdict)


def check_is_new(hashes: RowHashes, verdicts: dict[int, int]) -> None:
    """ValueError if an earlier row has the same prompt, images and responses."""
    if hashes.row not in verdicts:
        return
    if verdicts[hashes.row] == hashes.verdict:
        raise ValueError("duplicate of an earlier row")
    raise ValueError("contradicts an earlier row")


def quantiles(token_counts: np.ndarray) -> dict[str, int]:
    median, p99, most = np.quantile(token_counts, (0.5, 0.99, 1), method="higher").tolist()
    return {"median": median, "p99": p99, "most": most}


# Words that look like a token of a chat template, or like another project's mark for an image
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|</?img>|"
                           "<ImageHere>|<IMG_CONTEXT>")


@dataclass
class Statistics:
    """The counts of a conversion. Pairs, images and tokens are those of the rows that are kept."""
    name: str  # of the set
    rows_in: int = 0
    comparisons: int = 0
    held_out: int = 0
    pairs: int = 0
    with_images: int = 0
    longer_chosen: int = 0  # pairs whose chosen response has more characters
    shorter_chosen: int = 0
    extra_rows: int = 0  # of a benchmark: beyond its published number of rows
    # three numbers a row: tokens of the prompt, tokens of the longest response, responses
    sizes: array = field(default_factory=lambda: array("i"))
    layouts: Counter = field(default_factory=Counter)  # name -> rows
    unread_keys: Counter = field(default_factory=Counter)  # key -> rows that have it
    special_tokens: Counter = field(default_factory=Counter)  # token -> rows with it in a text
    dropped: Counter = field(default_factory=Counter)  # reason -> rows
    first_dropped: dict[str, str] = field(default_factory=dict)  # reason -> first error

    def add(self, curated: CuratedRow) -> None:
        """Counts a row that is kept."""
        comparison = curated.comparison
        self.comparisons += 1
        self.pairs += len(comparison.pairs)
        if comparison.images:
            self.with_images += 1
        for winner, loser in comparison.pairs:
            difference = len(comparison.responses[winner]) - len(comparison.responses[loser])
            if difference > 0:
                self.longer_chosen += 1
            elif difference < 0:
                self.shorter_chosen += 1
        benchmark = BENCHMARKS.get(self.name)
        if benchmark and comparison.category in benchmark.extra_categories:
            self.extra_rows += 1
        self.sizes.extend((curated.prompt_tokens, curated.response_tokens,
                           len(comparison.responses)))
        self.layouts[curated.fields.layout] += 1
        self.unread_keys.update(curated.fields.unread_keys())
        texts = "\n".join([curated.prompt, *comparison.responses])
        self.special_tokens.update(set(SPECIAL_TOKEN.findall(texts)))

    def drop(self, location: str, error: Exception) -> None:
        """Counts a row that is dropped."""
        cause = re.split("[:;]", one_line(error), maxsplit=1)[0]
        reason = re.sub(r"\d+", "N", cause)[:100]
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, one_line(f"{location}: {error}"))

    def is_another_set(self) -> bool:
        """Called while no row was kept: whether the source holds rows of another set. It does if
        1,000 rows were dropped, and none for a reason that only rows of this set can have."""
        for reason in self.dropped:
            if re.match("missing image|broken image|known to a benchmark", reason):
                return False
        return self.rows_in >= 1000

    def report(self, sources: list[str]) -> dict:
        """The content of report.json. BadRow if no row was kept."""
        if not self.comparisons:
            times = 0
            first_error = "holds no row"
            if self.dropped:
                [(reason, times)] = self.dropped.most_common(1)
                first_error = self.first_dropped[reason]
            raise BadRow(f"{' '.join(sources)}: of the first {self.rows_in} rows none is left as a "
                         f"row of {self.name}; {self.held_out} held out; {times} times: "
                         f"{first_error}")

        unequal_pairs = self.longer_chosen + self.shorter_chosen
        sizes = np.reshape(self.sizes, (self.comparisons, 3))
        response_counts = sorted(Counter(sizes[:, 2].tolist()).items())
        report = {
            "set": self.name,
            "source": sources,
            "rows_in": self.rows_in,
            "comparisons": self.comparisons,
            "pairs": self.pairs,
            "with_images": round(self.with_images / self.comparisons, 4),
            "prompt_tokens": quantiles(sizes[:, 0]),
            "response_tokens": quantiles(sizes[:, 1]),
            "responses_per_comparison": {str(k): times for k, times in response_counts},
            "longer_response_wins": round(self.longer_chosen / max(unequal_pairs, 1), 4),
            "held_out": self.held_out,
            "layouts": dict(self.layouts.most_common()),
            "unread_keys": dict(self.unread_keys.most_common(100)),
            "special_tokens": dict(self.special_tokens.most_common(100)),
            "dropped": dict(self.dropped.most_common()),
            "first_dropped": self.first_dropped,
        }
        if self.name in BENCHMARKS:
            report["benchmark"] = self.completeness()
        return report

    def completeness(self) -> str:
        """A benchmark's rows beside their published number."""
        num_rows = self.comparisons - self.extra_rows
        published = BENCHMARKS[self.name].num_rows
        text = f"{num_rows:,} rows of {published:,} published"
        if num_rows != published:
            text += "; what these give is not the benchmark's figure"
        return text


class OutputFiles:
    """The .jsonl files of a data folder, each created for its first line."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = {}

    def write(self, name: str, row: dict) -> None:
        if name not in self.files:
            # half of a surrogate pair cannot be UTF-8; it is written as JSON escapes it, \ud83d
            self.files[name] = open(self.folder / f"{name}.jsonl", "w", encoding="utf-8",
                                    errors="backslashreplace")
        self.files[name].write(to_json_line(row))

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def write_rows(curated_rows: Iterator[tuple[SourceRow, Future]], files: OutputFiles, name: str,
               cfg: "Config") -> Statistics:
    """Decides about one row after another, in the order of the source, and writes it to a file.

    A row that repeats an earlier one in prompt (but for case and spaces), images and responses is
    dropped: as a duplicate, or as a contradiction if its verdict differs. Prompts are held out
    whole, those with the lowest hashes. A benchmark's rows are all kept, or the conversion stops.
    """
    is_benchmark = name in BENCHMARKS
    statistics = Statistics(name)
    verdicts = {}  # hash of a row -> hash of its verdict; with `sizes` 125 bytes a row
    for source_row, future in tqdm(curated_rows, name, unit=" rows", leave=False):
        statistics.rows_in += 1
        try:
            curated = future.result()
            row = to_row(curated.comparison)
            if curated.contaminated_by:
                files.write("contaminated", {"benchmark": curated.contaminated_by, "row": row})
                raise ValueError(f"known to a benchmark: {curated.contaminated_by}")
            hashes = hash_row(curated)
            if not is_benchmark:
                check_is_new(hashes, verdicts)
            is_held_out = hashes.prompt < cfg.hold_out * 2**64
            files.write("held_out" if is_held_out else "comparisons", row)
        except (ValueError, RecursionError) as error:
            if is_benchmark and cfg.on_bad_row == "stop":
                raise BadRow(f"{source_row.location}: {error}; --on_bad_row skip would leave it "
                             "out and count it") from None
            statistics.drop(source_row.location, error)
            if not verdicts and statistics.is_another_set():
                break
            continue

        verdicts[hashes.row] = hashes.verdict
        if is_held_out:
            statistics.held_out += 1
        else:
            statistics.add(curated)
    return statistics


def convert(name: str, cfg: "Config") -> dict:
    """Converts a published set into a data folder and returns its report, in one pass.

    Every row is in the folder, or is counted in report.json under the reason it was dropped for,
    with the first example: a field is missing, responses are empty, identical or tie, the verdict
    contradicts the row's own scores, an image is missing or broken, the row is over-long,
    overlaps with a benchmark, or repeats an earlier row. Beside comparisons.jsonl there are
    held_out.jsonl (--hold_out) and contaminated.jsonl (--decontaminate).

    The folder appears when it is complete. A killed conversion leaves .FOLDER.partial and
    FOLDER.lock, which the next one removes.
    """
    for source in cfg.source:
        folder = Path(source).resolve()
        if folder.is_dir() and Path(cfg.out).resolve().is_relative_to(folder):
            raise BadRow(f"--out {cfg.out} lies inside --source {source} and would be read as part "
                         "of it")

    benchmark_rows = BenchmarkRows(cfg.decontaminate)  # --decontaminate: appendix D
    with new_folder(cfg.out) as out:
        curated_rows = curate_rows(name, cfg, out, benchmark_rows)
        files = OutputFiles(out)
        with contextlib.closing(files), contextlib.closing(curated_rows):
            statistics = write_rows(curated_rows, files, name, cfg)
        report = statistics.report(cfg.source)
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        (out / "report.json").write_text(text, encoding="utf-8")
    return report


# 6  The command line ------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    source: list[str] = HfArg(
        default_factory=list, help="files, folders or hub ids of the published set")
    out: str = HfArg(default="", help="folder to write")
    n: int = HfArg(
        default=0, help="read the first n rows, 0 for all; synthetic: draw n, 0 for 1000; show: n, "
                        "0 for 10")
    seed: int = HfArg(default=0, help="synthetic: which comparisons")
    workers: int = HfArg(
        default=0, help="threads, 0 for one a core; the result is the same whatever their number")
    max_tokens: int = HfArg(
        default=8192, help="most tokens of prompt and longest response, 4 bytes each, without "
                           "images")
    decontaminate: list[str] = HfArg(
        default_factory=list, help="folders of benchmarks: rows that overlap with them are removed")
    hold_out: float = HfArg(
        default=0.0, help="share of the prompts to set apart in held_out.jsonl, such as 0.01")
    on_bad_row: Literal["stop", "skip"] = HfArg(
        default="stop", help="a benchmark's row that cannot be used: stop, or skip it; in other "
                             "sets such rows are always skipped and counted")

    def num_workers(self) -> int:
        if self.workers:
            return self.workers
        if hasattr(os, "sched_getaffinity"):  # not on macOS
            return len(os.sched_getaffinity(0))
        return os.cpu_count()

    def check(self, name: str) -> None:
        """BadRow if a flag is missing or out of range."""
        usage = f"python data.py {name} --out FOLDER"
        required = ["out"]
        if name == "show":
            required = []
        elif name != "synthetic":
            source = "FOLDER" if name == "judge" else "PATH_OR_HUB_ID"
            usage = f"python data.py {name} --source {source} --out FOLDER"
            required = ["source", "out"]
        for flag in required:
            if not getattr(self, flag):
                raise BadRow(f"--{flag} is missing; {usage}")

        limits = {"n": (0, 1e12), "workers": (0, 1000), "max_tokens": (1, 1e12), "hold_out": (0, 1)}
        for flag, (least, end) in limits.items():
            value = getattr(self, flag)
            if not least <= value < end:
                raise BadRow(f"--{flag} {value}: want at least {least} and less than {end:g}")
        if name in BENCHMARKS and (self.hold_out or self.decontaminate):
            raise BadRow(f"the rows of {name} are all kept: --hold_out and --decontaminate are for "
                         "training sets")


def describe(comparison: Comparison) -> str:
    """A comparison to be read by a person."""
    if not comparison.pairs and not comparison.answer:
        raise ValueError("neither pairs nor an answer: nothing to learn from")
    lines = [f"{comparison.category} {comparison.id}"]
    for message in to_messages(comparison.prompt, comparison.images):
        lines.append(f"{message['role']}: {message['content']}")
    for image in comparison.images:
        frames = open_frames(image)
        width, height = frames[0].size
        name = f"{len(image):,} bytes" if isinstance(image, bytes) else image
        lines.append(f"  image   {name}, {width} x {height}, frames: {len(frames)}")
    for index, response in enumerate(comparison.responses):
        losers = [str(loser) for winner, loser in comparison.pairs if winner == index]
        beats = f" beats {', '.join(losers)}" if losers else ""
        lines.append(f"  {index}{beats}: {response[:300]}")
    return "\n".join(lines)


def format_counts(counter: Counter) -> str:
    return ", ".join([f"{name} ({count})" for name, count in counter.most_common(20)])


def show(path: str, n: int) -> None:
    """Prints the first n rows, read and checked as training would, and the keys not read."""
    rows = read_comparisons(path, needs_responses=False)
    print(f"{rows.file}: {len(rows)} comparisons, {sum(rows.pair_counts)} pairs")
    layouts = Counter()
    unread_keys = Counter()
    for i in range(min(n, len(rows))):
        try:
            text = describe(rows[i])
        except ValueError as error:
            raise as_bad_row(error, rows, i) from None
        print(printable(f"\n--- row {i + 1} {text}"))
        fields = parse_fields(parse_json(rows.line(i)))
        layouts[fields.layout] += 1
        unread_keys.update(fields.unread_keys())

    print(f"\nlayout (rows): {format_counts(layouts)}")
    if unread_keys:
        print(printable(f"keys that are not read (rows): {format_counts(unread_keys)}"))


def main(argv: list[str]) -> None:
    names = ["show", "synthetic", "judge", *SETS]
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n{describe_keys()}\n")
        print(textwrap.fill(f"NAME is one of {', '.join(names)}", 79, break_on_hyphens=False))
        HfArgumentParser(Config, prog="data.py NAME").parse_args(["--help"])

    name = argv[0]
    flags = argv[1:]
    if name not in names:
        raise BadRow(f"unknown data set {name!r}; want one of {', '.join(names)}")
    folder = ""
    if name == "show":
        if not flags or flags[0].startswith("-"):
            raise BadRow("the folder is missing: python data.py show FOLDER")
        folder = flags.pop(0)
    parser = HfArgumentParser(Config, exit_on_error=False)
    (cfg,) = parser.parse_args_into_dataclasses(flags)
    cfg.check(name)

    if name == "show":
        show(folder, cfg.n or 10)
        return
    if name == "synthetic":
        write_comparisons(cfg.out, synthetic(cfg.n or 1000, cfg.seed))
    elif name == "judge":
        write_comparisons(cfg.out, judge_prompts(cfg.source, cfg.n))  # judge: appendix E
    else:
        report = convert(name, cfg)
        print(printable(json.dumps(report, indent=1, ensure_ascii=False)))
    print(f"wrote {cfg.out}; look at it with: python data.py show {shlex.quote(cfg.out)}")


# ======================================================================================
# First reading ends here. Below: what flags, other families and other paradigms add.
# ======================================================================================

# A  Other published sets --------------------------------------------------------------


def ranked(prompt, responses, scores, images=()) -> dict:
    """The row of K responses, best first, with a pair for every two whose scores differ.

    Responses without a score (None or NaN), empty ones, and repetitions are left out.

    >>> ranked("Why?", ["a", "b", "c", "d"], [1, 5, None, 5])["pairs"]  # of b, d, a; b and d tie
    [(0, 2), (1, 2)]
    """
    if len(responses) != len(scores):
        raise ValueError(f"{len(responses)} responses but {len(scores)} scores")
    score_of = {}
    for response, score in zip(responses, scores):
        if is_filled(score) and response and response.strip():
            score_of.setdefault(response, score)
    order = sorted(score_of, key=score_of.get, reverse=True)

    pairs = []
    for winner, loser in itertools.combinations(range(len(order)), 2):
        if score_of[order[winner]] > score_of[order[loser]]:
            pairs.append((winner, loser))
    if not pairs:
        raise ValueError(f"tie or unrated: the scores are {scores}")
    return {"prompt": prompt, "responses": order, "pairs": pairs, "images": images}


def own_rows(row: dict) -> dict:
    """Rows of your own, as in the docstring at the top."""
    return row


def mmpr(row: dict) -> dict:
    """OpenGVLab/MMPR-v1.2, about 3M pairs (paper: 2M), MIT.

    Source: the folder of meta.json, unpacked. Its repeat_time is not read: give train.py a weight.
    Rows without an image are text-only.
    Trap: a rejected response may be the chosen one, cut in half and continued without the image.
    """
    question, chosen, rejected = required_fields(row, "question", "chosen", "rejected")
    return pair(question, chosen, rejected, row.get("image") or row.get("video") or [])


def check_ranking(row: dict, ranks: list) -> None:
    """ValueError if low ranks go with low scores. Scores are compared within each aspect."""
    aspects = []
    for name in ("faithfulness", "helpfulness", "ethical"):
        if row.get(name):
            aspects.append(row[name])

    disagreement = 0
    for scores in aspects:
        rated = []
        for rank, score in zip(ranks, scores):
            if is_filled(rank) and is_filled(score):
                rated.append((rank, score))
        for (rank, score), (other_rank, other_score) in itertools.combinations(rated, 2):
            disagreement += (rank - other_rank) * (score - other_score)
    if disagreement > 0:
        raise ValueError(f"ranking against its scores: {ranks}, {aspects}; if most say so, the "
                         "last is the best")


def mm_rlhf(row: dict) -> dict:
    """yifanzhang114/MM-RLHF, MIT: data.jsonl (16,342 ranked prompts) or dpo_pairs.jsonl (62,545
    pairs). Unpack its five archives beside it, with or without a folder of their own.

    Trap: whether rank 1 is best is written nowhere. It is taken to be; a row whose scores say the
    opposite is dropped.
    """
    if "chosen" in row or "rejected" in row:
        prompt, chosen, rejected, picture = required_fields(row, "prompt", "chosen", "rejected",
                                                            "image|video")
        result = pair(prompt, chosen, rejected, picture)
        reasons = [row.get("chosen_reason"), row.get("rejected_reason")]
        if all(reasons):
            result["critiques"] = reasons
    else:
        prompt, responses, ranks, picture = required_fields(
            row, "question", "models_output", "final_ranking", "image|video")
        check_ranking(row, ranks)
        scores = [None if rank is None else -rank for rank in ranks]
        result = ranked(prompt, responses, scores, picture)

    subset = re.search("(?:^|/)(short|long|mcq|safety|video)/", str(picture))
    result["category"] = subset[1] if subset else ""
    return result


def pair_of_judgement(judge_prompt: str, judge_output: str, prompt_format: re.Pattern,
                      verdict_format: str, image) -> dict:
    """The pair that a judge compared.

    prompt_format finds the question and two responses in its prompt, verdict_format the better
    response in its output.
    """
    match = prompt_format.search(judge_prompt)
    verdict = re.search(verdict_format, judge_output)
    if not match:
        raise ValueError(f"another judge's format: {judge_prompt[-80:]!r}")
    if not verdict:
        raise ValueError(f"tie or no verdict: {judge_output[-80:]!r}")

    question, first, second = match.groups()
    question = PLACEHOLDER.sub("", question).strip()
    if verdict[1] in ("1", "A", "first"):
        return pair(question, first, second, image)
    return pair(question, second, first, image)


R1_FORMAT = re.compile(
    r"\[Question\]:\s*(.*?)\s*"
    r"^[ \t]*#*[ \t]*\[Response 1\]:\s*(.*?)\s*"
    r"^[ \t]*#*[ \t]*\[Response 2\]:\s*(.*?)\s*"
    r"(?:^[ \t#*\[]*Output Format(?!.*^[ \t#*\[]*Output Format).*)?\Z", re.S | re.M)
CRITIC_FORMAT = re.compile(
    r"Question: \[(.*?)\]\s*\n\s*"
    r"(?:Response 1|Response A|The first response): \[(.*?)\]\s*\n\s*"
    r"(?:Response 2|Response B|The second response): \[(.*)\]", re.S)


def r1_reward(row: dict) -> dict:
    """yifanzhang114/R1-Reward-RL, 17,261 pairs, licence not stated. The responses are cut out of a
    judge's prompt.

    Trap: these are the pairs GPT-4o found hard. The paper's "R1-Reward 200k" is no file: it is all
    of MM-RLHF (105,740 pairs, more than are public) and 100k drawn from RLAIF-V and VLFeedback
    (public: --data data/mm-rlhf data/rlaif-v:0.49 data/vlfeedback:0.11) and, 15% of these, from
    POVID and WildVision-Battle (no reader here).
    Trap: cut only white space and the lines of the headings. A closing ** that is lost from
    response 1 would tell which response it is.
    """
    message, answer, image = required_fields(row, "message", "answer", "image")
    text = ""
    for part in parse_json(message)[0]["content"]:
        if part.get("type") == "text":
            text += part["text"]
    if text.count("[Response 1]:") != 1 or text.count("[Response 2]:") != 1:
        raise ValueError("no [Response 1]:, [Response 2]: once each in the message: "
                         f"{text[-80:]!r}")
    return pair_of_judgement(text, str(answer), R1_FORMAT, r"<answer>\s*([12])\s*</answer>", image)


def sharegpt_messages(turns: list) -> list[dict]:
    """ShareGPT's {from, value} turns as messages."""
    roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
    messages = []
    for turn in turns:
        speaker, text = required_fields(turn, "from", "value")
        messages.append({"role": roles.get(speaker, speaker), "content": text})
    return messages


def llava_critic(row: dict) -> dict:
    """lmms-lab/llava-critic-113k, config `pairwise`, 40,154 judgements of GPT-4o, Apache-2.0.

    Trap: it mixes several judges' formats. "Question: [..] .. The better response: [..]" is read,
    rows in other formats are dropped.
    """
    turns, image = required_fields(row, "conversations", "image")
    judge_prompt, judge_output = [message["content"] for message in sharegpt_messages(turns)[:2]]
    return pair_of_judgement(judge_prompt, judge_output, CRITIC_FORMAT,
                             r"better response: \[(first|second|1|2|A|B)\]", image)


def mmif(row: dict) -> dict:
    """ChrisDing1105/MMIF-23k, the DPO part, Apache-2.0. Trap: v1 (the paper's 22k) is not v2."""
    turns, chosen, rejected, images = required_fields(row, "conversations", "chosen", "rejected",
                                                      "images|image")
    messages = sharegpt_messages(turns)
    (chosen_text,) = required_fields(chosen, "value")
    (rejected_text,) = required_fields(rejected, "value")
    return pair(messages, chosen_text, rejected_text, images)


def omnialign(row: dict) -> dict:
    """PhoenixZ/OmniAlign-V-DPO, 133k pairs, licence not stated.

    Trap: rejected responses are a weaker model's, and shorter.
    """
    prompt, chosen, rejected, image = required_fields(row, "prompt", "chosen", "rejected", "image")
    return pair(PLACEHOLDER.sub("", prompt).strip(), chosen, rejected, image)


def ultrafeedback_all(row: dict) -> dict:
    """openbmb/UltraFeedback, 63,967 prompts with 4 responses, MIT: pairs that do not tie, by the
    mean of the aspects' ratings.

    Trap: `overall_score` held thousands of wrong tens until December 2023; the field read here did
    not. The paper does not say which it took.
    """
    prompt, completions = required_fields(row, "instruction", "completions")
    responses = []
    scores = []
    for completion in completions:
        response, score = required_fields(completion, "response", "fine-grained_score")
        responses.append(response)
        scores.append(score)
    return ranked(prompt, responses, scores)


def ultrafeedback_hard(row: dict) -> dict:
    """The paper's "Ultra-Hard" (Table 4), 63k pairs: best against worst response of a prompt."""
    ranking = ultrafeedback_all(row)
    return pair(ranking["prompt"], ranking["responses"][0], ranking["responses"][-1])


def shp(row: dict) -> dict:
    """stanfordnlp/SHP, 348,718 pairs of Reddit comments in `train`, Reddit's terms.

    Trap: labels 1 means that A was preferred; one public loader has it reversed.
    """
    prompt, response_a, response_b, label = required_fields(
        row, "history", "human_ref_A", "human_ref_B", "labels")
    score_a, score_b = required_fields(row, "score_A", "score_B")
    lead_of_a = score_a - score_b
    contradicts = lead_of_a < 0 if label == 1 else lead_of_a > 0
    if label not in (0, 1) or contradicts:
        raise ValueError(f"label against its scores: labels {label}, score_A {score_a}, score_B "
                         f"{score_b}")
    if label == 1:
        return pair(prompt, response_a, response_b)
    return pair(prompt, response_b, response_a)


def message_lists(row: dict) -> dict:
    """chosen and rejected as whole conversations. The prompt is what they share, whatever a
    `prompt` column says.

    tulu3-if      allenai/tulu-3-IF-augmented-on-policy-70b, 65.6k, ODC-BY, parts non-commercial
    olmo2         allenai/olmo-2-0425-1b-preference-mix, about 378k, ODC-BY, parts non-commercial
    wildchat-uf   allenai/tulu-3-wildchat-ultrafeedback, ODC-BY. Trap: it has no split `train`; all
                  splits are read but wildchat_unused (56,034)
    skywork       Skywork/Skywork-Reward-Preference-80K-v0.2, about 77k, licence not stated
    """
    chosen, rejected = required_fields(row, "chosen", "rejected")
    prompt = None
    if len(chosen) == 1:
        prompt = row.get("prompt")
    return pair(prompt, chosen, rejected)


def swe_arena(row: dict) -> dict:
    """bigcode/swe-arena-preference-5k (now bigcodearena-preference-5k), 4.7k votes,
    bigcode-openrail-m.

    Trap: each side has a conversation of its own. If they differ before the last message, the
    prompt is `instruction`.
    """
    feedback, states, instruction = required_fields(row, "feedback", "states", "instruction")
    (vote,) = required_fields(feedback, "vote_type")
    if vote not in ("vote_left", "vote_right", "vote_model_A", "vote_model_B"):
        raise ValueError(f"tie or no vote: vote_type is {vote!r}")

    conversations = []
    for state in required_fields(states, "model_A", "model_B"):
        (turns,) = required_fields(state, "messages")
        messages = []
        for speaker, text in turns:
            role = "user" if speaker.lower() == "user" else "assistant"
            messages.append({"role": role, "content": text})
        conversations.append(messages)

    chosen, rejected = conversations
    if vote in ("vote_right", "vote_model_B"):
        rejected, chosen = conversations
    if chosen[:-1] == rejected[:-1]:
        return pair(None, chosen, rejected)
    return pair(instruction, chosen[-1:], rejected[-1:])


def mean_rating(aspects: dict) -> float | None:
    """The mean over the aspects of a response; None if one of them has no number."""
    ratings = []
    for aspect in aspects.values():
        (rating,) = required_fields(aspect, "Rating")
        if not re.fullmatch(r"\d+(\.\d+)?", str(rating)):
            return None
        ratings.append(float(rating))
    if not ratings:
        return None
    return sum(ratings) / len(ratings)


def vlfeedback(row: dict) -> dict:
    """MMInstruction/VLFeedback, 80,258 prompts with 4 responses, CC BY 4.0: pairs that do not tie,
    by the mean of the ratings.

    Trap: `completions` is a list of dicts or a dict of lists, depending on the release; a rating
    may be no number.
    """
    prompt, completions, image = required_fields(row, "prompt", "completions", "image|img_path")
    if isinstance(completions, list):
        responses = []
        annotations = []
        for completion in completions:
            response, aspects = required_fields(completion, "response", "annotations")
            responses.append(response)
            annotations.append(aspects)
    else:
        responses, annotations = required_fields(completions, "response", "annotations")
    scores = [mean_rating(aspects) for aspects in annotations]
    return ranked(prompt, responses, scores, image)


def rlhf_v(row: dict) -> dict:
    """openbmb/RLHF-V-Dataset, 5,733 pairs, CC BY-NC 4.0.

    Trap: question and responses are JSON inside `text`.
    """
    text, image = required_fields(row, "text", "image")
    question, chosen, rejected = required_fields(parse_json(text), "question", "chosen", "rejected")
    return pair(question, chosen, rejected, image)


def vstar(row: dict) -> dict:
    """craigwu/seal_vqa_data, 191k RL prompts on small details (V*): its four files whose rows have
    boxes.

    Trap: the images (COCO, GQA) must be downloaded from their own sites. A line "Additional visual
    information to focus on: <object>; .." stands for crops that only V*'s own model reads, and is
    removed.
    """
    (image,) = required_fields(row, "image")
    if "question" in row or "conversations" not in row:
        question, answer = required_fields(row, "question", "answer")
    else:
        messages = sharegpt_messages(row["conversations"])[:2]
        question, answer = [message["content"] for message in messages]
    question = PLACEHOLDER.sub("", question).strip()
    question = re.sub(r"Additional visual information to focus on:[^\n]*", "", question).strip()
    return {"prompt": question, "images": [image], "answer": answer}


def arxivqa(row: dict) -> dict:
    """MMInstruction/ArxivQA, about 100k RL prompts on figures, CC BY-SA 4.0.

    Trap: labels that name no option; options without letters.
    """
    question, options, label, image = required_fields(row, "question", "options", "label", "image")
    label = str(label).strip()
    if not re.match(r"[A-D]\b", label) or not isinstance(options, list):
        raise ValueError(f"unparsable label: {row['label']!r}")
    lines = [question]
    for letter, option in zip("ABCDEFGH", options):
        has_letter = re.match(r"[A-D][).:]", option)
        lines.append(option if has_letter else f"{letter}) {option}")
    lines.append("Answer with the letter.")
    return {"prompt": "\n".join(lines), "images": [image], "answer": label[0]}


def thinklite(row: dict) -> dict:
    """russwang/ThinkLite-VL-hard-11k, 11,031 RL prompts on mathematics and science, licence not
    checked."""
    problem, answer, image = required_fields(row, "problem", "answer", "image")
    return {"prompt": problem, "images": [image], "answer": answer}


SETS |= {
    "r1-reward": PublishedSet(r1_reward),
    "rlhf-v": PublishedSet(rlhf_v),
    "mm-rlhf": PublishedSet(mm_rlhf, "data.jsonl *.parquet dpo_pairs.jsonl"),
    "mmpr": PublishedSet(mmpr),
    "omnialign": PublishedSet(omnialign),
    "swe-arena": PublishedSet(swe_arena),
    "mmif": PublishedSet(mmif, "dpo/*.json *dpo*.json"),  # files for fine-tuning lie beside it
    "ultrafeedback-all": PublishedSet(ultrafeedback_all),
    "ultrafeedback-hard": PublishedSet(ultrafeedback_hard),
    "shp": PublishedSet(shp, "train.json train.jsonl train*.parquet *.parquet"),
    "tulu3-if": PublishedSet(message_lists),
    "olmo2": PublishedSet(message_lists),
    "skywork": PublishedSet(message_lists),
    "wildchat-uf": PublishedSet(
        message_lists, "wildchat_[ir]*", "wildchat_if wildchat_reused_on_policy_8b "
        "wildchat_if_on_policy_70b wildchat_reused_on_policy_70b"),
    "vlfeedback": PublishedSet(vlfeedback, "*.parquet vlfeedback*.jsonl *.jsonl"),
    "llava-critic": PublishedSet(
        llava_critic, "pairwise/*.parquet pairwise*.parquet *.jsonl *.json", "pairwise:train"),
    "pairs": PublishedSet(own_rows, "comparisons.jsonl *.jsonl *.parquet *.json"),
    "vstar": PublishedSet(
        vstar, "GQA_data.json,llava_focus_data.json,spatial_relation_data.json,"
        "vaw_attribute_data.json"),
    "arxivqa": PublishedSet(arxivqa),
    "thinklite": PublishedSet(thinklite),
}

# B  Benchmarks ------------------------------------------------------------------------
# A benchmark is one record in BENCHMARKS: how its rows are read, which groups a pair counts in, and
# which figures are made of the accuracy in each group. Responses stay in their published order.

ALL_PAIRS = "accuracy"  # the group that every pair counts in


def category_group(row: dict, winner: int, loser: int) -> list[str]:
    """The groups of a pair: its category alone."""
    return [row["category"]]


@dataclass(frozen=True, kw_only=True)
class Benchmark(PublishedSet):
    """A published set with a metric.

    groups_of_pair(row, winner, loser): the groups that a pair counts in besides "accuracy". row is
        a line of evaluate.py's predictions.jsonl; winner and loser are indices of its responses
    metric(accuracy_of): {figure: value} from {group: accuracy, 0 to 1}, in the order of the table
    published: (model, [value of each figure or None]), texts as printed in Tables 8 to 10
    notes: which of the published rows are comparable, and why not; computed from the public ids
    """
    num_rows: int  # as published
    metric: Callable
    main_figure: str
    groups_of_pair: Callable = category_group
    extra_categories: tuple = ()  # read with the benchmark, but not among num_rows
    whole_ids: bool = False  # Acc+: a second outcome for each id, right if all its pairs are
    published: list = field(default_factory=list)
    notes: list = field(default_factory=list)


def benchmark_row(category: str, prompt, responses, pairs, images=()) -> dict:
    """A benchmark's row. Placeholders that stand for no image ("see <image> and <image 2>") are
    text of the question, and are removed."""
    if isinstance(prompt, str):
        placeholders = len(PLACEHOLDER.findall(prompt))
        if placeholders not in (0, len(images)):
            prompt = PLACEHOLDER.sub("", prompt)
    elif isinstance(prompt, list) and not images:
        messages = []
        for message in prompt:
            messages.append(message | {"content": PLACEHOLDER.sub("", message["content"])})
        prompt = messages
    return {"category": category, "prompt": prompt, "responses": responses, "pairs": pairs,
            "images": images}


def published_rows(table: str) -> list[tuple[str, list]]:
    """(model, values) of each line "model | value value ..."; values are texts, "-" is None."""
    rows = []
    for line in table.strip().splitlines():
        model, cells = line.split("|")
        values = [None if cell == "-" else cell for cell in cells.split()]
        rows.append((model.strip(), values))
    return rows


def mean(values) -> float:
    return sum(values) / len(values)


def read_vl_rewardbench(row: dict) -> dict:
    """MMInstruction/VL-RewardBench, 1,250 rows, MIT, or R1-Reward's flat copy; the groups are those
    of the official script.

    Trap: human_ranking holds the rank of each response. 25 ids occur twice. In 1,245 rows the
    better response is the first.
    """
    row_id, query, image = required_fields(row, "id", "query|prompt", "image")
    if "prompt" in row:
        responses = required_fields(row, "chosen", "rejected")
        ranks = [0, 1]
    else:
        responses, ranks = required_fields(row, "response", "human_ranking")
    if len(responses) != 2 or sorted(ranks) != [0, 1]:
        raise ValueError(f"impossible ranking: {len(responses)} responses with the ranks {ranks}; "
                         "want two responses with the ranks 0 and 1")
    groups = {"hallucination": "hallucination", "RLAIF": "hallucination", "RLHF": "hallucination",
              "mathverse": "reasoning", "mmmu": "reasoning"}
    group = groups.get(re.split("[_-]", str(row_id))[0], "general")
    return benchmark_row(group, query, responses, [(ranks.index(0), ranks.index(1))], [image])


def vl_rewardbench_groups(row: dict, winner: int, loser: int) -> list[str]:
    """The official group, and the one of R1-Reward's script, which the paper used: it looks for
    rlaif and rlhf where the ids have RLAIF and RLHF, so that these count as general."""
    paper_group = row["category"]
    if row["id"].startswith(("RLAIF", "RLHF")):
        paper_group = "general"
    return [row["category"], f"{paper_group}, paper"]


def vl_rewardbench_figures(accuracy_of) -> dict:
    """Overall weighs every pair alike, macro every group. With the paper's groups: macro.

    >>> accuracy_of = {"general": 1, "hallucination": 0.5, "reasoning": 0, ALL_PAIRS: 0.8}
    >>> accuracy_of |= {"general, paper": 1, "hallucination, paper": 1, "reasoning, paper": 1}
    >>> vl_rewardbench_figures(accuracy_of)["macro"]
    0.5
    """
    groups = ("general", "hallucination", "reasoning")
    figures = {name: accuracy_of[name] for name in groups}
    macro = mean(figures.values())
    figures["overall"] = accuracy_of[ALL_PAIRS]
    figures["macro"] = macro
    paper_groups = [f"{name}, paper" for name in groups]
    for name in paper_groups:
        figures[name] = accuracy_of[name]
    figures["macro, paper"] = mean([figures[name] for name in paper_groups])
    return figures


# general, hallucination, reasoning, overall, macro; then the paper's three groups and their macro
VL_REWARDBENCH_PUBLISHED = """
GPT-4o (2024-08-06) [a]             | 49.10 67.60 70.50 65.80 62.40
Claude-3.7-Sonnet [c]               | 68.08 70.70 60.81 66.31 66.53
IXC-2.5-Reward 7B [a]               | 84.70 62.50 62.90 65.80 70.00
MM-RLHF-Reward 7B [b]               | - - - 50.15 - 45.04 50.45 57.55 51.01
R1-Reward 7B [b]                    | - - - 71.92 - 63.84 85.71 64.78 71.44
BaseReward (Qwen2-VL) 7B [b d e]    | - - - 78.53 - 62.12 84.82 82.64 76.53
BaseReward (Qwen2.5-VL) 7B [b d]    | - - - 82.16 - 68.55 92.19 81.82 80.85
BaseReward (ensemble) 7B+7B [b d e] | - - - 84.41 - 71.67 91.74 85.33 82.91
"""
VL_REWARDBENCH_NOTES = [
    "Values in one column are comparable, but of rows with [c], [d] or [e] only overall is.",
    "[a] grouped as the official script does: 183 general, 749 hallucination, 318 reasoning.   "
    "[b] grouped as R1-Reward's script does, which looks for rlhf and rlaif where the ids have "
    "RLHF and RLAIF: 484, 448, 318.   [c] fits neither.",
    "[d] printed with two columns exchanged: 318 rows stand under general, 484 under reasoning.   "
    "[e] scored on 1,225 of the 1,250 rows, as 25 ids occur twice.",
]


SEVEN = ("correctness", "preference", "knowledge", "math", "coding", "safety", "VQA")


def read_multimodal_rewardbench(row: dict) -> dict:
    """facebookresearch/multimodal_rewardbench, 4,711 rows, CC BY-NC 4.0: a checkout after its
    download script has run."""
    row_id, text, image, better, published_category = required_fields(
        row, "ID", "Text", "Image", "Better", "Category")
    categories = {
        "open_generation/correctness_task": "correctness",
        "open_generation/preference_task": "preference",
        "knowledge": "knowledge",
        "reasoning": "math" if row_id.lower().startswith("math") else "coding",
        "safety": "safety/bias" if row_id.lower().startswith("pairs") else "safety/toxicity",
        "vqa": "VQA",
    }
    category = categories[published_category]
    pairs = {"Output1": [(0, 1)], "Output2": [(1, 0)]}[better]
    responses = required_fields(row, "Output1", "Output2")
    return benchmark_row(category, text, responses, pairs, [image]) | {"id": row_id}


def multimodal_rewardbench_groups(row: dict, winner: int, loser: int) -> list[str]:
    """Bias and toxicity count as safety too."""
    if row["category"].startswith("safety/"):
        return [row["category"], "safety"]
    return [row["category"]]


def multimodal_rewardbench_figures(accuracy_of) -> dict:
    """Overall is the accuracy over all rows. What some papers print as overall is the mean of the
    seven columns.

    >>> accuracy_of = dict.fromkeys(["safety/bias", "safety/toxicity", ALL_PAIRS, *SEVEN], 1)
    >>> multimodal_rewardbench_figures(accuracy_of | {"coding": 0.3})["mean of 7"]
    0.9
    """
    seven = {name: accuracy_of[name] for name in SEVEN}
    figures = {"overall": accuracy_of[ALL_PAIRS]} | seven
    figures["mean of 7"] = mean(seven.values())
    figures["bias"] = accuracy_of["safety/bias"]
    figures["toxicity"] = accuracy_of["safety/toxicity"]
    return figures


# overall, then the seven
MULTIMODAL_REWARDBENCH_PUBLISHED = """
GPT-4o [a]                      | 70.8 62.6 69.0 72.0 67.6 62.1 74.8 87.2
Claude 3.7 Sonnet [a]           | 71.9 58.4 60.7 78.1 76.3 71.3 72.0 86.8
MM-RLHF-Reward 7B [a]           | 67.1 61.7 67.5 54.3 58.4 57.9 92.9 76.8
IXC-2.5-Reward 7B [a]           | 66.6 60.7 64.2 56.8 63.0 50.5 89.9 81.1
R1-Reward 7B                    | 82.2 77.5 74.0 74.9 83.1 79.6 99.6 86.5
BaseReward (Qwen2-VL) 7B [b]    | 68.7 68.2 56.3 64.9 73.1 48.6 72.4 83.5
BaseReward (Qwen2.5-VL) 7B      | 72.8 65.7 65.0 70.6 82.7 50.3 81.5 85.0
BaseReward (ensemble) 7B+7B [b] | 73.6 68.5 68.0 70.3 82.8 51.2 81.3 85.6
"""
MULTIMODAL_REWARDBENCH_NOTES = [
    "[a] overall is the mean of the seven columns: compare with `mean of 7`. Without a mark it is "
    "the average over all 4,711 rows.   [b] overall fits neither: from the columns, the average "
    "over 4,711 rows is 68.6 and 73.8.",
]


def read_mm_rlhf_rewardbench(row: dict) -> dict:
    """yifanzhang114/MM-RLHF-RewardBench, 170 pairs of 46 ids, licence not stated: its jsonl,
    images/ and video/. The category is part of the image's path, as in the official script."""
    prompt, chosen, rejected, picture = required_fields(row, "prompt", "chosen", "rejected",
                                                        "video|image")
    path = str(picture["path"] if isinstance(picture, dict) else picture)
    for category in ("mcq", "long", "short", "safety", "video"):
        if category in path:
            return benchmark_row(category, prompt, [chosen, rejected], [(0, 1)], [picture])
    raise ValueError(f"image {path[:60]!r} names none of mcq, long, short, safety, video; another "
                     "benchmark's?")


def mm_rlhf_rewardbench_figures(accuracy_of) -> dict:
    """Acc is the share of right pairs, Acc+ the share of ids whose pairs are all right."""
    categories = ("mcq", "long", "short", "safety", "video")
    figures = {name: accuracy_of[name] for name in categories}
    figures["Acc"] = accuracy_of[ALL_PAIRS]
    figures["Acc+"] = accuracy_of["Acc+"]
    for name in categories:
        figures[f"{name}+"] = accuracy_of[f"{name}+"]
    return figures


# mcq, long, short, safety, video, Acc, Acc+
MM_RLHF_REWARDBENCH_PUBLISHED = """
GPT-4o (2024-08-06)            | 64.28 78.37 44.11 56.25 40.00 58.23 26.01
Claude-3.7-Sonnet              | 66.67 91.89 91.18 87.50 76.00 82.35 65.22
IXC-2.5-Reward 7B              | 52.38 91.89 67.65 62.50 88.00 71.18 50.00
MM-RLHF-Reward 7B              | 83.00 97.00 74.00 69.00 88.00 82.00 63.00
R1-Reward 7B                   | 80.95 89.19 82.35 75.00 72.00 80.59 54.35
BaseReward (Qwen2-VL) 7B       | 80.95 100.00 88.24 90.62 96.00 90.59 78.26
BaseReward (Qwen2.5-VL) 7B [a] | 95.74 97.38 94.13 81.25 88.00 91.76 80.43
BaseReward (ensemble) 7B+7B    | 88.10 100.00 97.06 87.50 92.00 92.94 80.43
"""
MM_RLHF_REWARDBENCH_NOTES = [
    "[a] mcq, long, short are no fractions of 42, 37, 34 pairs; 40/42 = 95.24, 36/37 = 97.30, "
    "32/34 = 94.12 give the printed Acc.",
]

PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")  # a split each
# RewardBench's weights (allenai/reward-bench: constants.py). math-prm has 447 rows and weighs as
# much as all code.
SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
             "mt-bench-easy": 28, "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                  "hep-python": 164, "hep-rust": 164},
    "Prior Sets": dict.fromkeys(PRIOR_SETS, 1),
}


def read_rewardbench(row: dict) -> dict:
    """allenai/reward-bench, split `filtered`, 2,985 rows, ODC-BY; and the prior sets, which are
    splits of allenai/pref-test-sets, if --source names it too.

    Trap: rows of the prior sets may have a `subset` of their own; as in the official loader the
    split counts.
    """
    prompt, chosen, rejected = required_fields(row, "prompt", "chosen", "rejected")
    subset = row["part"]
    if subset not in PRIOR_SETS:
        (subset,) = required_fields(row, "subset")
    responses = []
    for response in (chosen, rejected):
        responses.append(response if isinstance(response, str) else response_text(response[-1]))
    return benchmark_row(subset, prompt, responses, [(0, 1)])


def rewardbench_figures(accuracy_of) -> dict:
    """Sections by the weights of their subsets. The score is the mean of four sections; with the
    prior sets, these weigh half as much as a section.

    >>> accuracy_of = {subset: 1 for weights in SECTIONS.values() for subset in weights}
    >>> rewardbench_figures(accuracy_of | {"math-prm": 0})["Reasoning"]
    0.5
    """
    figures = {}
    for section, weights in SECTIONS.items():
        total = sum(weight * accuracy_of[subset] for subset, weight in weights.items())
        figures[section] = total / sum(weights.values())
    *sections, prior = figures.values()
    figures["score"] = mean(sections)
    figures["score with prior sets"] = (2 * sum(sections) + prior) / 9
    return figures


DOMAINS = ("chat", "math", "code", "safety")
LEVELS = ("easy", "normal", "hard")


def read_rm_bench(row: dict) -> dict:
    """THU-KEG/RM-Bench, 1,327 prompts, licence not checked.

    K = 6: three chosen responses (concise, plain, markdown), then three rejected ones.
    """
    prompt, chosen, rejected = required_fields(row, "prompt", "chosen", "rejected")
    domain = str(row.get("domain") or row["part"].removesuffix("_filtered"))
    domain = domain.split("-")[0]  # safety-refuse: safety
    if domain not in DOMAINS or not len(chosen) == len(rejected) == 3:
        raise ValueError(f"domain {domain!r}; want one of chat, math, code, safety, and three "
                         "chosen, three rejected")
    pairs = list(itertools.product((0, 1, 2), (3, 4, 5)))
    return benchmark_row(domain, prompt, [*chosen, *rejected], pairs)


def rm_bench_groups(row: dict, winner: int, loser: int) -> list[str]:
    """Domain and level. Easy: the chosen response has more style than the rejected one; hard: less.

    >>> rm_bench_groups({"category": "math"}, winner=0, loser=5)  # concise against markdown
    ['math hard']
    """
    level = "normal"
    if winner > loser - 3:
        level = "easy"
    elif winner < loser - 3:
        level = "hard"
    return [f"{row['category']} {level}"]


def rm_bench_figures(accuracy_of) -> dict:
    """A domain is the mean of its levels, a level the mean over the domains.

    >>> accuracy = {"easy": 1, "normal": 0.5, "hard": 0}
    >>> rm_bench_figures({f"{d} {level}": accuracy[level] for d in DOMAINS for level in LEVELS})
    {'chat': 0.5, 'math': 0.5, 'code': 0.5, 'safety': 0.5, 'easy': 1.0, 'normal': 0.5, \
'hard': 0.0, 'overall': 0.5}
    """
    figures = {}
    for domain in DOMAINS:
        figures[domain] = mean([accuracy_of[f"{domain} {level}"] for level in LEVELS])
    overall = mean(figures.values())
    for level in LEVELS:
        figures[level] = mean([accuracy_of[f"{domain} {level}"] for domain in DOMAINS])
    figures["overall"] = overall
    return figures


BENCHMARKS |= {
    "vl-rewardbench": Benchmark(
        read_row=read_vl_rewardbench,
        files="data.jsonl test-*.parquet *",
        splits="test",
        num_rows=1250,
        groups_of_pair=vl_rewardbench_groups,
        metric=vl_rewardbench_figures,
        main_figure="overall",
        published=published_rows(VL_REWARDBENCH_PUBLISHED),
        notes=VL_REWARDBENCH_NOTES),
    "multimodal-rewardbench": Benchmark(
        read_row=read_multimodal_rewardbench,
        files="all_data.json test-*.parquet *",
        splits="test",
        num_rows=4711,
        groups_of_pair=multimodal_rewardbench_groups,
        metric=multimodal_rewardbench_figures,
        main_figure="overall",
        published=published_rows(MULTIMODAL_REWARDBENCH_PUBLISHED),
        notes=MULTIMODAL_REWARDBENCH_NOTES),
    "mm-rlhf-rewardbench": Benchmark(
        read_row=read_mm_rlhf_rewardbench,
        files="mm_reward_bench.jsonl train-*.parquet *",
        num_rows=170,
        whole_ids=True,
        metric=mm_rlhf_rewardbench_figures,
        main_figure="Acc",
        published=published_rows(MM_RLHF_REWARDBENCH_PUBLISHED),
        notes=MM_RLHF_REWARDBENCH_NOTES),
    "rewardbench": Benchmark(
        read_row=read_rewardbench,
        files="filtered.json filtered-*.parquet "
              "anthropic_helpful[.-]*,anthropic_hhh[.-]*,shp[.-]*,summarize[.-]* *",
        splits=" ".join(["filtered", *PRIOR_SETS]),
        num_rows=2985,
        extra_categories=PRIOR_SETS,
        metric=rewardbench_figures,
        main_figure="score"),
    "rm-bench": Benchmark(
        read_row=read_rm_bench,
        files="total_dataset.json train-*.parquet *",
        num_rows=1327,
        groups_of_pair=rm_bench_groups,
        metric=rm_bench_figures,
        main_figure="overall"),
}
SETS |= BENCHMARKS

# The averages of the paper's Table 6: (benchmark, figure) of each part. Its Table 4 prints
# VL-RewardBench's macro as overall; which of the two Table 6 has is not said.
PAPER_AVERAGES = {
    "text": [("rewardbench", "score"), ("rm-bench", "overall")],
    "multimodal": [("vl-rewardbench", "overall"), ("mm-rlhf-rewardbench", "Acc"),
                   ("mm-rlhf-rewardbench", "Acc+"), ("multimodal-rewardbench", "overall")],
}

# C  Sources: JSON and parquet files, the hub, MMPR's parts ----------------------------

SOURCE_SUFFIXES = (".json", ".jsonl", ".parquet")


def json_rows(file: Path) -> Iterator[tuple[int, object]]:
    """(number, row) of a JSON Lines file, rows as bytes, or of one JSON list, which is read whole.
    """
    try:
        is_list = read_start(file).startswith(b"[")
        with open(file, "rb") as stream:
            if is_list:
                yield from enumerate(parse_json(stream.read()), start=1)
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except BadRow:
        raise
    except (OSError, ValueError) as error:
        raise BadRow(f"{file} cannot be read: {error}; is the download complete?") from None


def dataset_rows(source: str, splits: str) -> Iterator[tuple[str, int, dict]]:
    """(split, number, row) of a parquet file, or of a set's splits on the hub, streamed. Images
    are not decoded. splits: as in PublishedSet."""
    path = source
    files = None
    if source.endswith(".parquet"):
        path = "parquet"
        files = source
    configuration, _, split_names = splits.rpartition(":")
    try:
        import datasets
        datasets.disable_progress_bars()
        dataset = datasets.load_dataset(path, configuration or None, data_files=files,
                                        streaming=True)
        present = [split for split in split_names.split() if split in dataset]
        if not present:
            raise ValueError(f"its splits are {', '.join(dataset)}; want "
                             f"{split_names.replace(' ', ' or ')}")
        for split in present:
            for number, row in enumerate(dataset[split].decode(False), start=1):
                yield split, number, row
    except ImportError:
        raise BadRow(f"{source}: parquet files and hub ids need one more package: pip install "
                     "datasets") from None
    except Exception as error:  # of datasets: no such set, no network, a damaged file: many types
        raise BadRow(f"{source} cannot be read: {error}") from None


def source_files(path: Path, patterns: str) -> list[Path]:
    """The file itself, or the files of a folder by the first pattern that finds any."""
    if path.is_file():
        return [path]
    for pattern in patterns.split():
        files = []
        for glob in pattern.split(","):
            for file in path.rglob(glob):
                if file.suffix in SOURCE_SUFFIXES and file.is_file():
                    files.append(file)
        if files:
            return sorted(files)
    raise BadRow(f"{path} does not exist, or holds no {', '.join(SOURCE_SUFFIXES)} file like "
                 f"{patterns}; want a file, a folder, or a hub id like openbmb/RLAIF-V-Dataset")


def mmpr_parts(meta: Path) -> Iterator[tuple[Path, Path]]:
    """(annotation file, image folder) of each part of MMPR; meta.json has them as MMPR-v1.2/..."""
    home = meta.parent
    try:
        for part in parse_json(meta.read_bytes()).values():
            annotation, images = required_fields(part, "annotation", "root")
            annotation = re.sub("^MMPR[^/]*/", "", annotation)
            images = re.sub("^MMPR[^/]*/", "", images)
            file = find_image(home, annotation)
            if file is None:
                raise ValueError(f"{annotation} does not exist; unpack annotations.zip")
            yield file, find_image(home, images) or home
    except (ValueError, TypeError, AttributeError) as error:
        raise BadRow(f"{meta} cannot be used: {error}") from None


def read_source(name: str, source: str) -> Iterator[SourceRow]:
    """All rows of a published set. source: a file, a folder or a hub id."""
    path = Path(source)
    published_set = SETS[name]
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and path.suffix not in SOURCE_SUFFIXES
    if is_hub_id and not path.exists():
        for split, number, row in dataset_rows(source, published_set.splits):
            yield SourceRow(f"{split}:{number}", row, part=split, folder=path)
        return

    home = path.parent if path.is_file() else path
    meta = next(home.rglob("meta.json"), None) if name == "mmpr" else None
    if meta:
        parts = mmpr_parts(meta)
    else:
        parts = [(file, home) for file in source_files(path, published_set.files)]
    for file, folder in parts:
        part = file.stem.split("-0")[0]  # shp, also of shp-00000-of-00001.parquet
        location = file.relative_to(home)
        if file.suffix == ".parquet":
            for _, number, row in dataset_rows(str(file), "train"):
                yield SourceRow(f"{location}:{number}", row, part, folder)
        else:
            for number, row in json_rows(file):
                yield SourceRow(f"{location}:{number}", row, part, folder)


# D  Decontamination: which rows overlap with a benchmark ------------------------------

MAX_HASH_DISTANCE = 4  # bits of 64; the hashes of two unrelated images differ in about 20
MIN_RESPONSE_CHARACTERS = 32  # two responses below it ("Yes", "No") count only with their prompt


def dhash(image: Image.Image) -> int:
    """Difference hash, 64 bits, that survives encoding and resizing: in a grey thumbnail of 9 x 8,
    whether a pixel's right neighbour is brighter by more than 2 of 255. (In flat areas only the
    noise of a JPEG differs, hence the margin.)"""
    grey = image.convert("L").resize((9, 8)).tobytes()
    bits = 0
    for y in range(8):
        for x in range(8):
            if grey[9 * y + x + 1] > grey[9 * y + x] + 2:
                bits |= 1 << (8 * y + x)
    return bits


def fingerprints(comparison: Comparison, images: list) -> Iterator[tuple[int, object]]:
    """What identifies a row: (hash of two responses in any order, None) for each pair, and (hash of
    the prompt, image) for each of its images, decoded."""
    prompt = normalise(prompt_text(comparison))
    for winner, loser in comparison.pairs:
        chosen = normalise(comparison.responses[winner])
        rejected = normalise(comparison.responses[loser])
        is_short = len(chosen) + len(rejected) < MIN_RESPONSE_CHARACTERS
        yield hash64(*sorted((chosen, rejected)), prompt if is_short else ""), None
    for image in images:
        yield hash64(prompt), image


class BenchmarkRows:
    """The rows of benchmarks by their fingerprints, from data folders."""

    def __init__(self, folders: list[str]):
        self.locations = {}  # hash -> [(dhash of the image or None, location of the row)]
        for folder in folders:
            rows = read_comparisons(folder, needs_responses=False)
            for i, comparison in enumerate(rows):
                images = [open_frames(image)[0] for image in comparison.images]
                for key, image in fingerprints(comparison, images):
                    image_hash = dhash(image) if image else None
                    self.locations.setdefault(key, []).append((image_hash, rows.location(i)))

    def find(self, comparison: Comparison, images: list) -> str:
        """The location of a row with the same two responses, or with the same prompt and picture;
        "" if there is none."""
        if not self.locations:
            return ""
        for key, image in fingerprints(comparison, images):
            for image_hash, location in self.locations.get(key, []):
                if image is None:
                    return location
                if (dhash(image) ^ image_hash).bit_count() <= MAX_HASH_DISTANCE:
                    return location
        return ""


# E  Prompts for a judge ---------------------------------------------------------------


def judge_prompts(folders: list[str], n: int) -> Iterator[Comparison]:
    """Prompts for a judge that thinks: each pair of the rows (the first n, 0 for all) in both
    orders, one after the other in random order. Their `answer` says which response is better, 1 or
    2. R1-Reward (arXiv 2505.02835) learns from such prompts by RL.

    Trap: rl_demo.py may evaluate on one of the two prompts of a pair and train on the other;
    measure a judge by evaluate.py.
    """
    for folder in folders:
        rows = read_comparisons(folder)
        for i in range(min(n or len(rows), len(rows))):
            comparison = rows[i]
            for winner, loser in comparison.pairs:
                orders = [(winner, loser), (loser, winner)]
                rng = random.Random(f"{i} {(winner, loser)}")
                for first, second in rng.sample(orders, 2):
                    prompt = judge_prompt(comparison, first, second, think=True)
                    answer = "1" if first == winner else "2"
                    row_id = f"{comparison.id or i + 1}-{first}-{second}"
                    yield replace(prompt, responses=[], answer=answer, source="judge", id=row_id)


# F  Conversations, as TRL has them ----------------------------------------------------
# A prompt, system, history, and the beginning of chosen and rejected: together they are the turns
# before the response. Turns are compared by role and text, since the rows of one table differ in
# null keys, line breaks, and in how they hold a picture.


@dataclass
class Turn:
    """A message before the response."""
    message: dict  # as it was found, but for pictures inside of typed parts
    role: str
    text: str  # with a placeholder for each picture
    pictures: list  # those that its typed parts held

    def words(self) -> str:
        return PLACEHOLDER.sub("", self.text).strip()

    def equals(self, other: "Turn") -> bool:
        """Whether both say the same, whichever of them has the pictures."""
        if self.pictures and other.pictures and self.pictures != other.pictures:
            return False
        return self.role == other.role and self.words() == other.words()


def picture_of(part: dict):
    """The picture inside a typed part: a path, base64, {"url": ...}; None if it has none."""
    if part["type"] in ("image", "image_url", "video"):
        for key in ("image", "image_url", "video", "path", "url", "base64"):
            if is_filled(part.get(key)):
                return part[key]
    return None


def read_turn(message) -> Turn:
    normalized = normalize_message(message)  # checks its role, its keys and its content
    content = message["content"]
    if isinstance(content, str):
        return Turn(message, normalized["role"], content, pictures=[])

    pictures = []
    parts = []
    for part in content:
        picture = picture_of(part)
        if picture is not None:
            pictures.append(picture)
            part = {"type": "image"}
        parts.append(part)
    return Turn(message | {"content": parts}, normalized["role"], normalized["content"], pictures)


def read_turns(messages) -> list[Turn]:
    """A text, a list of messages, or None, as turns."""
    if messages is None:
        return []
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"the prompt is a {type(messages).__name__}, want a text or a list of "
                         "messages")
    return [read_turn(message) for message in messages]


def read_history(history) -> list[Turn]:
    """The turns of [[question, answer], ...], or of a list of messages."""
    if not isinstance(history, list):
        raise ValueError(f"history is a {type(history).__name__}, want [[question, answer], ...]")
    messages = []
    for exchange in history:
        if isinstance(exchange, dict):
            messages.append(exchange)
        elif isinstance(exchange, (list, tuple)) and len(exchange) == 2:
            messages.append({"role": "user", "content": exchange[0]})
            messages.append({"role": "assistant", "content": exchange[1]})
        else:
            raise ValueError(f"history holds {str(exchange)[:80]}, want [question, answer]")
    return read_turns(messages)


def merge_turns(turns: list[Turn], others: list[Turn]) -> list[Turn] | None:
    """Two versions of the same turns as one, with the pictures of both; None if they differ."""
    if len(turns) != len(others):
        return None
    merged = []
    for turn, other in zip(turns, others):
        if not turn.equals(other):
            return None
        num_placeholders = len(PLACEHOLDER.findall(turn.text))
        if turn.pictures or num_placeholders > len(PLACEHOLDER.findall(other.text)):
            merged.append(turn)
        else:
            merged.append(other)
    return merged


def join_turns(first: list[Turn], second: list[Turn], name: str) -> list[Turn]:
    """The turns of `first`, then those of `second`; turns that stand in both are taken once.

    They may be the end of the second, or overlap with its beginning, or come before it. ValueError
    if none of these: name says what `first` is.
    """
    if not first or not second:
        return first or second

    if len(first) <= len(second):
        merged = merge_turns(first, second[-len(first):])
        if merged is not None:
            return second[:-len(first)] + merged
    for overlap in range(min(len(first), len(second)), 0, -1):
        merged = merge_turns(first[-overlap:], second[:overlap])
        if merged is not None:
            return first[:-overlap] + merged + second[overlap:]

    border = (first[-1].role, second[0].role)
    if border not in (("system", "user"), ("user", "assistant"), ("assistant", "user")):
        raise ValueError(f"{name} is neither the beginning nor the end of the messages beside it: "
                         f"{first[-1].words()[:60]!r} and {second[0].words()[:60]!r}")
    return first + second


def response_text(message) -> str:
    """The text of a response that is a message."""
    if not isinstance(message, dict) or message.get("role") != "assistant":
        raise ValueError(f"a response must be a message of the assistant: {str(message)[:80]}")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise ValueError("a response holds an image; both responses must share the images "
                                 "of the prompt")
    return normalize_message(message)["content"]


def parse_trl_responses(row: dict) -> tuple[list[Turn], list[str]]:
    """(turns before the responses, [chosen, rejected]) of a row in TRL's layout."""
    chosen = row.get("chosen")
    rejected = row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" not in row:
            raise ValueError("chosen and rejected are texts without a prompt; want the question as "
                             "`prompt`, and what answers it as chosen and rejected")
        return [], [chosen, rejected]

    for conversation in (chosen, rejected):
        if not conversation or not isinstance(conversation, list):
            raise ValueError("chosen and rejected must both be texts or both be lists of messages; "
                             f"found {type(chosen).__name__} and {type(rejected).__name__} in "
                             f"{sorted(row)}")
    responses = [response_text(chosen[-1]), response_text(rejected[-1])]

    turns = merge_turns(read_turns(chosen[:-1]), read_turns(rejected[:-1]))
    if turns is None:
        raise ValueError("chosen and rejected part before their last message, so there is no "
                         "common prompt")
    return turns, responses


def read_conversations(row: dict) -> dict:
    """A row with messages, `system` or `history` as one with chosen and rejected as texts, and all
    earlier turns in `prompt`. Pictures inside its messages go into `images`."""
    conversation = []
    if any(key in row for key in TRL_KEYS):
        conversation, (chosen, rejected) = parse_trl_responses(row)
        row = row | {"chosen": chosen, "rejected": rejected}
    stands_alone = not conversation and "system" not in row and "history" not in row
    if stands_alone and ("prompt" not in row or isinstance(row["prompt"], str)):
        return row

    turns = join_turns(read_turns(row.get("prompt")), conversation, "the prompt")
    if "history" in row:
        num_system = 1 if turns and turns[0].role == "system" else 0
        later_turns = join_turns(read_history(row["history"]), turns[num_system:], "history")
        turns = turns[:num_system] + later_turns
    if "system" in row:
        system = read_turns([{"role": "system", "content": row["system"]}])
        turns = join_turns(system, turns, "system")

    messages = []
    pictures = []
    for turn in turns:
        messages.append(turn.message)
        pictures += turn.pictures
    images = row.get("images", pictures)
    if pictures and images != pictures:
        raise ValueError("pictures inside the messages and other ones in `images`: put all of them "
                         "into `images`")
    return row | {"prompt": messages, "images": images}


# G  Layouts of other projects ---------------------------------------------------------
# A function takes the keys of a row that have a value. It returns the row in TRL's layout, keys
# that it does not know unchanged, or None if the row is in another layout.


def without_keys(row: dict, *keys: str) -> dict:
    return {key: value for key, value in row.items() if key not in keys}


def chat_messages(turns) -> list:
    """Messages as they are; ShareGPT's {from, value} turns as messages."""
    if not isinstance(turns, list):
        turns = [turns]
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a conversation holds a {type(turn).__name__}, want messages")
    if all("role" in turn for turn in turns):
        return turns
    return sharegpt_messages(turns)


def read_llama_factory_sharegpt(row: dict) -> dict | None:
    """{"conversations": turns, "chosen": turn, "rejected": turn}; `messages` will do too."""
    if not isinstance(row.get("chosen"), dict) or not isinstance(row.get("rejected"), dict):
        return None
    conversation = []
    for key in ("conversations", "messages"):
        conversation += chat_messages(row.get(key, []))
    chosen = conversation + chat_messages(row["chosen"])
    rejected = conversation + chat_messages(row["rejected"])
    row = without_keys(row, "conversations", "messages")
    return row | {"chosen": chosen, "rejected": rejected}


def read_llama_factory_alpaca(row: dict) -> dict | None:
    """{"instruction": text, "input": text or none, "chosen": text, "rejected": text}."""
    if "instruction" not in row or "prompt" in row or not isinstance(row.get("chosen"), str):
        return None
    texts = []
    for key in ("instruction", "input"):
        if key in row:
            check_text(row[key], key)
            texts.append(row[key])
    return without_keys(row, "instruction", "input") | {"prompt": "\n".join(texts)}


def hh_messages(text: str) -> list[dict]:
    """The turns of a dialogue.

    >>> hh_messages("\\n\\nHuman: Hi!\\n\\nAssistant: Hello.")[1]
    {'role': 'assistant', 'content': 'Hello.'}
    """
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *pieces = re.split(r"(?:^\s*|\n\n)(Human|Assistant):", text)
    messages = []
    for speaker, content in zip(pieces[::2], pieces[1::2]):
        messages.append({"role": roles[speaker], "content": content.strip()})
    return messages


def read_hh_rlhf(row: dict) -> dict | None:
    """Anthropic/hh-rlhf, 160,800 pairs, MIT: chosen and rejected are dialogues in one text each,
    "Human: ... Assistant: ...". In some copies their common beginning is in `prompt`."""
    chosen = row.get("chosen")
    rejected = row.get("rejected")
    prompt = row.get("prompt", "")
    for text in (chosen, rejected, prompt):
        if not isinstance(text, str):
            return None
    if prompt and not prompt.rstrip().endswith("\n\nAssistant:"):
        return None
    dialogues = []
    for text in (chosen, rejected):
        if not text.startswith(prompt):
            text = prompt + text
        if not re.match(r"\s*Human:", text) or "\n\nAssistant:" not in text:
            return None
        dialogues.append(hh_messages(text))
    return without_keys(row, "prompt") | {"chosen": dialogues[0], "rejected": dialogues[1]}


def read_ms_swift(row: dict) -> dict | None:
    """{"messages": a conversation whose end is chosen} with {"rejected_messages": a conversation}
    or {"rejected_response": a text, several texts, or messages}, which take the place of all after
    the user's last message. Older rows have query and `response` in place of messages."""
    if "rejected_messages" not in row and "rejected_response" not in row:
        return None
    if "chosen" in row or "rejected" in row:
        raise ValueError("`rejected_response` or `rejected_messages` beside `chosen` or "
                         "`rejected`: want one of the two layouts")
    messages = row.get("messages")
    if messages is None:
        query, response = required_fields(row, "prompt", "response")
        messages = [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    messages = chat_messages(messages)
    others = without_keys(row, "messages", "response", "rejected_messages", "rejected_response")
    if "rejected_messages" in row:
        return others | {"chosen": messages, "rejected": chat_messages(row["rejected_messages"])}

    rejected = row["rejected_response"]
    if isinstance(rejected, str):
        rejected = [{"role": "assistant", "content": rejected}]
    if isinstance(rejected, list) and all(isinstance(text, str) for text in rejected):
        if "messages" in row and "prompt" in row:
            raise ValueError("`prompt` beside `messages`: want one of them")
        pairs = [(0, index) for index in range(1, len(rejected) + 1)]
        responses = [response_text(messages[-1]), *rejected]
        return others | {"prompt": messages[:-1], "responses": responses, "pairs": pairs}
    rejected = chat_messages(rejected)
    num_before = 0  # messages up to the user's last
    for number, message in enumerate(messages, start=1):
        if message.get("role") == "user":
            num_before = number
    return others | {"chosen": messages, "rejected": messages[:num_before] + rejected}


LAYOUTS = {
    "LLaMA-Factory sharegpt": read_llama_factory_sharegpt,
    "LLaMA-Factory alpaca": read_llama_factory_alpaca,
    "hh-rlhf": read_hh_rlhf,
    "ms-swift": read_ms_swift,
}


# Where a chat template was applied, a message begins or a response ends with one of these
TURN_START = re.compile(r"<\|(?:im_start|start_header_id|begin_of_text|user|system)\|>|<s>|<bos>|"
                        r"\[INST\]|<start_of_turn>")
TURN_END = re.compile(r"(?:<\|(?:im_end|eot_id|end|end_of_text|endoftext)\|>|</s>|<eos>|"
                      r"<end_of_turn>)$")
# How other projects mark an image in a text
IMAGE_MARK = re.compile(r"<ImageHere>|<IMG_CONTEXT>|<\|image(?:_pad)?\|>|<img>[^<>]*</img>")


def check_no_template(row: dict) -> None:
    """ValueError if a chat template was applied to the texts already: it would be read as words."""
    advice = "want plain texts: the backbone's own chat template is applied to them"
    for turn in read_turns(row.get("prompt")):
        token = TURN_START.match(turn.words())
        if token:
            raise ValueError("a chat template in the prompt: a message begins with "
                             f"{token[0]!r}; {advice}")
        mark = IMAGE_MARK.search(turn.text)
        if mark and ("images" in row or mark[0].startswith("<img>")):
            raise ValueError(f"another project's mark for an image: {mark[0][:60]!r}; want <image> "
                             "in its place, and the path in `images`")

    responses = row.get("responses", [row.get("chosen"), row.get("rejected")])
    if not isinstance(responses, list):
        return
    for response in responses:
        token = TURN_END.search(str(response).strip())
        if token:
            raise ValueError(f"a chat template in a response: it ends with {token[0]!r}; {advice}")


def is_column(values) -> bool:
    """Whether these are the values of a key in many rows: of a prompt or a conversation, a list of
    texts or of lists, or what pandas writes, {"0": ..., "1": ...}."""
    if isinstance(values, dict):
        return "0" in values
    return isinstance(values, list) and len(values) > 0 and isinstance(values[0], (str, list))


def check_not_columns(row: dict) -> None:
    for key in ("prompt", "instruction", "chosen", "messages", "conversations"):
        values = row.get(key)
        if is_column(values):
            raise ValueError(f"JSON by columns: `{key}` holds {len(values)} rows; want one JSON "
                             'object a line: pandas to_json(file, orient="records", lines=True)')


def check_keys(row: dict) -> None:
    """ValueError if a key holds a part of the comparison and is not read. It may repeat one that is
    read."""
    for remedy, keys in UNREAD_CONTENT.items():
        for key in keys:
            if key not in row:
                continue
            if not any(row.get(name) == row[key] for name in ROW_KEYS):
                raise ValueError(f"the key `{key}` is not read: {remedy}")


def to_texts(row: dict) -> tuple[dict, str]:
    """(the row with its responses as texts and all earlier turns in `prompt`, name of its layout).
    """
    check_not_columns(row)
    layout = "TRL" if any(key in row for key in TRL_KEYS) else "native"
    if "pairs" not in row and not is_published(row):
        for name, read_layout in LAYOUTS.items():
            converted = read_layout(row)
            if converted is not None:
                row = converted
                layout = name
                break
    check_keys(row)
    row = read_conversations(row)
    if not is_published(row):
        check_no_template(row)
    return row, layout


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that are limited to ASCII
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, argparse.ArgumentError) as error:
        sys.exit(f"data.py: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped; nothing was written")
