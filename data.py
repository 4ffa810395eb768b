"""Where comparisons come from, and which of them this process sees at this step (BaseReward, arXiv 2509.16127, section 4.4).

    python data.py show FOLDER                                                            a few rows, decoded
    python data.py synthetic --out FOLDER --n 1000                                        the embedded default as a folder
    python data.py rlaif-v --source openbmb/RLAIF-V-Dataset --out data/rlaif-v            a published set from the hub, as a stream
    python data.py mmpr --source MMPR-v1.2 --out data/mmpr --decontaminate bench/vlrb     from a local copy, less what a benchmark knows
    python data.py pairs --source mine.jsonl --out data/mine --n 100                      the first 100 rows of your own

    1  processes     who am I, how many are we
    2  rows          one JSON object a line -> a Comparison, or one clear line about what is wrong with it
    3  folders       millions of rows behind an index of offsets
    4  order         which rows a step sees: a pure function of (seed, step)
    5  synthetic     the embedded default, drawn with Pillow
    6  published     one short function per set: a row as it was published -> a comparison
    7  sources       JSON, JSON Lines, parquet, hub ids: one row at a time
    8  images        wherever they come from, decoded once, stored once under the hash of their content
    9  curation      what is wrong with a row, and does a benchmark know it
    10 conversion    a source -> a folder with comparisons.jsonl, images/ and report.json, in a stream and on all cores

A data set is a folder with `comparisons.jsonl` and its images. Three rows that are read as they are, the last two in TRL's layout:

    {"prompt": "<image>\\nWhat is shown?", "images": ["images/7.png"], "responses": ["A bus.", "Two buses."], "pairs": [[0, 1]]}
    {"prompt": "Name a fruit.", "chosen": "Apple", "rejected": "Table"}
    {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}], "images": ["images/7.png"],
     "chosen": [{"role": "assistant", "content": "A bus."}], "rejected": [{"role": "assistant", "content": "Two buses."}]}

`pairs` holds (winner, loser) indices into `responses`. Optional keys: id, source, category, answer (a checkable answer, for RL) and
critiques (one text per response). Paths are relative to the file and may not climb out of its folder; an entry of `images` that is a
folder of frames is a video. A prompt without an <image> mark has its images in front.

Conversion. The folder appears under its name when it is complete. A run that was killed leaves FOLDER.partial (and an empty
FOLDER.lock), which the next start throws away. Every row ends up in the folder, or in the report under the reason it was dropped for.
Beside comparisons.jsonl there may be held_out.jsonl (--hold_out: validation rows, whole prompts, so that none is on both sides) and
contaminated.jsonl (--decontaminate: what was removed, and for which row of which benchmark).

Over-long is measured in estimated tokens, one for 4 bytes of UTF-8, or with --tokenizer Qwen/Qwen2.5-VL-7B-Instruct in counted ones.
Images are in neither: what they cost depends on --max_pixels of train.py.

Where this differs from the paper: it says nothing of curation, and it counts pairs where ranked sets here keep their ranking.
"""
import base64
import contextlib
import copy
import fcntl
import functools
import graphlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

from model import FORMATS, MARK, Comparison, frames_of, is_video, open_frames, open_image, to_messages

# ---------------------------------------------------------------------------------------------------------------------------------
# 1  Processes


@dataclass(frozen=True)
class World:
    """Who am I, how many are we: torchrun's own words. `python script.py` without torchrun is a world of one."""
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    def gather(self, values: list[float]) -> torch.Tensor:
        """(world_size, len(values)) float64: every rank's numbers, known to all, so that decisions rest on what all ranks share."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size == 1:
            return mine[None].cpu()
        all_values = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(all_values, mine)
        return torch.stack(all_values).cpu()

    def gather_objects(self, item) -> list:
        """Every rank's object, in the order of the ranks, on every rank."""
        items = [item] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world_size > 1:
            dist.barrier()  # a rank that leaves early breaks the last message of another
            dist.destroy_process_group()


def setup() -> World:
    """Joins the process group that torchrun announces in the environment: NCCL if there is a GPU for every process, else gloo on CPUs."""
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", local_rank) if enough else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        # Two hours: all ranks wait while the first writes a checkpoint, 93 GB for the 7B, and for the slowest to have scored its share
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return World(rank, local_rank, world_size, device)


class StopSignal:
    """Remembers SIGTERM, SIGHUP (a lost terminal) or Ctrl-C until the step is done; a second Ctrl-C ends at once. A second SIGTERM does
    not: launchers signal a process directly and again through torchrun."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and is to be obeyed
                signal.signal(number, self.note)

    def note(self, number, _frame):
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


def claim_folder(out: Path, overwrite: bool, resume: bool, ours: str, leftover: tuple = ()) -> str:
    """Makes a run folder ready, or says in one line why it will not: no run is overwritten by accident.

    ours: a file that every run leaves; leftover: names that a run leaves behind which ended before there was anything to keep.
    """
    if overwrite and resume:
        return "--overwrite and --resume contradict each other"
    if out.exists() and not out.is_dir():
        return f"--out {out} is a file; want a folder"
    if overwrite and (out / ours).exists():
        shutil.rmtree(out)
    if not resume and out.is_dir() and {file.name for file in out.iterdir()} - set(leftover):
        return f"{out} is not empty; add --resume to go on with an unfinished run, --overwrite to replace a run, or choose another --out"
    out.mkdir(parents=True, exist_ok=True)
    return ""


def write_text(file: Path, text: str) -> None:
    """Under a temporary name, then moved into place: a kill at any moment leaves the old file or the new one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    os.replace(partial, file)


def write_state(file: Path, state: dict) -> str:
    """The same for a training state. Returns "" or, in one line, why it could not be written."""
    partial = file.with_name(file.name + ".partial")
    try:
        with open(partial, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        return f"cannot write {file} ({' '.join(str(error).split())[:120]}); is the disk full? One that was there before is intact"
    return ""


# ---------------------------------------------------------------------------------------------------------------------------------
# 2  Rows


class BadRow(ValueError):
    """A row that cannot be used: one line with the file, the line number, what was found and what to do."""


def from_json(row):
    """A row decoded, if it is JSON still (bytes or text). ValueError says where it breaks off."""
    try:
        return json.loads(row) if isinstance(row, (bytes, str)) else row
    except ValueError as error:  # not JSON, or not even UTF-8
        what = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"malformed JSON: {what}; want one JSON object a line") from None


def parse_row(row: dict, folder: Path, needs_responses: bool = True) -> Comparison:
    """A native row or one of TRL's preference rows as a Comparison. ValueError says what is wrong with it.

    >>> parse_row({"prompt": "Name a fruit.", "chosen": "Apple", "rejected": "Table"}, Path(".")).responses
    ['Apple', 'Table']
    """
    if not isinstance(row, dict):
        raise ValueError(f"found {type(row).__name__}, want a JSON object with the keys prompt, responses, pairs")
    prompt = row.get("prompt")
    if "chosen" in row or "rejected" in row:
        prompt, responses = from_trl(row)
        pairs = [(0, 1)]
    else:
        needed = ["prompt"] + ["responses", "pairs"] * needs_responses
        if missing := [key for key in needed if key not in row]:
            raise ValueError(f"the keys {missing} are missing; found {sorted(row)}. TRL's keys prompt, chosen, rejected will do as well")
        responses, pairs = row.get("responses") or [], row.get("pairs") or []
    if not isinstance(prompt, (str, list)) or not prompt:
        raise ValueError("the prompt must be a text or a list of chat messages, and not empty")
    if needs_responses:
        check_pairs(responses, pairs)
    images = row.get("images", row.get("image")) or []
    images = [inside(folder, path) for path in (images if isinstance(images, list) else [images])]
    to_messages(prompt, images)  # the marks must fit the images
    optional = {key: row[key] for key in ("critiques",) if row.get(key)} | {
        key: str(row[key]) for key in ("id", "source", "category", "answer") if row.get(key) is not None}
    return Comparison(prompt, responses, [tuple(pair) for pair in pairs], images, **optional)


def from_trl(row: dict) -> tuple[object, list[str]]:
    """Prompt and the two responses of a TRL row: texts or messages, with the prompt apart or at the head of both conversations."""
    if missing := [key for key in ("chosen", "rejected") if not row.get(key)]:
        raise ValueError(f"the keys {missing} are missing or empty; found {sorted(row)}")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, [chosen, rejected]
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise ValueError("chosen and rejected must both be texts or both be lists of messages")
    head = chosen[:-1]
    if rejected[:-1] != head:
        raise ValueError("chosen and rejected part before their last message, so there is no common prompt; want one reply in each")
    if head and prompt:  # a prompt that the conversations begin with, or hold, is said already
        said = [(message.get("role"), message.get("content")) for message in head]
        apart = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        head = head if (apart[-1].get("role"), apart[-1].get("content")) in said else apart + head
    return head or prompt, [text_of(chosen[-1]), text_of(rejected[-1])]


def text_of(message: dict) -> str:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise ValueError("a response holds an image; both responses must share the images of the prompt")
        content = "".join(part.get("text") or "" for part in content)
    if not isinstance(content, str):
        raise ValueError(f"a message without content: {str(message)[:80]}")
    return content


def check_pairs(responses, pairs) -> None:
    """K >= 2 texts, and a set of (winner, loser) pairs among them that some ranking satisfies."""
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise ValueError("responses must be a list of texts")
    if len(responses) < 2:
        raise ValueError(f"{len(responses)} response; a comparison needs at least 2")
    if empty := [i for i, r in enumerate(responses) if not r.strip()]:
        raise ValueError(f"response {empty[0]} is empty")
    if not isinstance(pairs, list) or not pairs:
        raise ValueError("no pairs; want a list like [[0, 1]]: response 0 was preferred to response 1")
    beaten_by = {i: set() for i in range(len(responses))}
    for pair in pairs:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(i) is int for i in pair)):
            raise ValueError(f"pair {pair!r} is not two whole numbers [winner, loser]")
        winner, loser = pair
        if not (0 <= winner < len(responses) and 0 <= loser < len(responses)):
            raise ValueError(f"pair {list(pair)} is out of range: there are responses 0 to {len(responses) - 1}")
        if responses[winner] == responses[loser]:
            raise ValueError(f"pair {list(pair)} has two identical responses: {responses[winner][:40]!r}")
        beaten_by[loser].add(winner)
    try:
        graphlib.TopologicalSorter(beaten_by).prepare()
    except graphlib.CycleError as error:
        raise ValueError(f"the pairs contradict each other: the responses {error.args[1]} beat each other in a circle") from None


def inside(folder: Path, path) -> str:
    """folder/path, if path stays in the folder by its own wording. A symbolic link that you placed there is followed."""
    if not isinstance(path, str) or not path:
        raise ValueError(f"image {path!r} is not a path relative to the file")
    if os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == "..":
        raise ValueError(f"image {path} lies outside the data folder; put it inside and give its relative path")
    return str(folder / path)


# ---------------------------------------------------------------------------------------------------------------------------------
# 3  Folders

PAIRS = re.compile(rb'"pairs"\s*:\s*(\[[\s\d,\[\]]*\])')  # only as a key: inside a text the quotes would be escaped


class Comparisons:
    """A file of rows that is read when a row is needed. What stays in memory is 18 bytes a row: where it lies, and its number of pairs."""

    def __init__(self, file: Path, needs_responses: bool = True):
        self.file, self.folder, self.needs_responses = file, file.parent, needs_responses
        self.starts, self.lengths, self.lines, self.pairs = array("Q"), array("I"), array("I"), array("H")
        at = 0
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    found = PAIRS.search(line)
                    self.starts.append(at), self.lengths.append(len(line)), self.lines.append(number)
                    self.pairs.append(min(max(found[1].count(b"[") - 1, 1), 65535) if found else 1)
                at += len(line)
        if not self.starts:
            raise BadRow(f"{file} holds no row; want one JSON object a line")
        self.descriptor = os.open(file, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Comparison:
        line = os.pread(self.descriptor, self.lengths[i], self.starts[i])  # pread: safe from several threads
        try:
            return parse_row(from_json(line), self.folder, self.needs_responses)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise self.bad_row(i, error) from None

    def bad_row(self, i: int, what) -> BadRow:
        """`what` is wrong with row i, as an error that says where."""
        return BadRow(f"{self.file}:{self.lines[i]}: {what}")

    def only(self, rows: list[int]) -> "Comparisons":
        """The same file with these rows alone."""
        part = copy.copy(self)
        for name in ("starts", "lengths", "lines", "pairs"):
            values = getattr(self, name)
            setattr(part, name, array(values.typecode, (values[i] for i in rows)))
        return part


def read_comparisons(path, needs_responses: bool = True) -> Comparisons:
    """Opens a folder with `comparisons.jsonl` (or with a single .jsonl file of another name), or such a file itself."""
    path = Path(path)
    if path.is_dir():
        files = [path / "comparisons.jsonl"] if (path / "comparisons.jsonl").is_file() else sorted(path.glob("*.jsonl"))
        if len(files) != 1:
            raise BadRow(f"{path} holds {len(files)} .jsonl files and no comparisons.jsonl; name the file itself")
        path = files[0]
    if not path.is_file():
        raise BadRow(f"{path} does not exist; want a folder with comparisons.jsonl and its images")
    return Comparisons(path, needs_responses)


# ---------------------------------------------------------------------------------------------------------------------------------
# 4  Order


class Order:
    """Which rows of which set a step sees: a pure function of (seed, step), so that a resumed run repeats and skips nothing.

    An epoch is a fresh permutation of all rows, cut where the pairs so far pass a multiple of `batch_size`: every row is in exactly one
    step, whatever the number of ranks, and a step has batch_size pairs give or take one row's. A weight of 2 shows a set twice
    an epoch, a weight of 0.5 a random half of it.

    sets: for each set, the number of pairs of its rows. A row is named (set, row).

    >>> order = Order([[1, 1, 1]], [1.0], batch_size=2, seed=0)
    >>> sorted(order.step(0) + order.step(1)), order.steps(epochs=1)
    ([(0, 0), (0, 1), (0, 2)], 2)
    """

    def __init__(self, sets, weights, batch_size: int, seed: int):
        self.pairs = [torch.tensor(pairs, dtype=torch.int32) for pairs in sets]
        self.weights, self.batch_size, self.seed = weights, batch_size, seed
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)
        self.lengths = []  # steps of the epochs so far

    def _epoch(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(set of each row, row, and where each step starts) for one epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        owner, row = [], []
        for s, (pairs, weight) in enumerate(zip(self.pairs, self.weights)):
            whole, part = int(weight), weight - int(weight)
            rows = torch.arange(len(pairs)).repeat(whole)
            rows = torch.cat([rows, torch.randperm(len(pairs), generator=generator)[:round(part * len(pairs))]])
            owner.append(torch.full_like(rows, s))
            row.append(rows)
        owner, row = torch.cat(owner), torch.cat(row)
        shuffle = torch.randperm(len(row), generator=generator)
        owner, row = owner[shuffle], row[shuffle]
        counts = torch.zeros(len(row), dtype=torch.int64)
        for s, pairs in enumerate(self.pairs):
            counts[owner == s] = pairs[row[owner == s]].long()
        step_of_row = (counts.cumsum(0) - counts) // self.batch_size  # by the pairs before it
        starts = torch.cat([torch.tensor([True]), step_of_row[1:] != step_of_row[:-1]]).nonzero()[:, 0]
        return owner, row, torch.cat([starts, torch.tensor([len(row)])])

    def step(self, step: int) -> list[tuple[int, int]]:
        """The (set, row) names of all ranks' rows together; rank r takes every world_size-th of them from the r-th on."""
        epoch = 0
        while step >= self.length(epoch):
            step, epoch = step - self.length(epoch), epoch + 1
        owner, row, starts = self.epoch(epoch)
        part = slice(starts[step], starts[step + 1])
        return list(zip(owner[part].tolist(), row[part].tolist()))

    def length(self, epoch: int) -> int:
        """Number of steps in one epoch; asked for in the order of the epochs."""
        if epoch == len(self.lengths):
            self.lengths.append(len(self.epoch(epoch)[2]) - 1)
        return self.lengths[epoch]

    def steps(self, epochs: float) -> int:
        """Number of steps in so many epochs, at least one."""
        whole = sum(map(self.length, range(int(epochs))))
        part = epochs - int(epochs)
        return max(whole + (round(part * self.length(int(epochs))) if part else 0), 1)


# ---------------------------------------------------------------------------------------------------------------------------------
# 5  Synthetic

COLOURS = {"red": (235, 60, 60), "green": (60, 200, 60), "blue": (60, 90, 245), "yellow": (240, 220, 60), "white": (245, 245, 245),
           "pink": (250, 120, 190)}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"left": (23, 42), "right": (61, 42), "top": (42, 23), "bottom": (42, 61)}  # centres (x, y) in an image of 84 x 84 pixels
VISUAL = ("colour", "shape", "count", "position", "describe")  # categories that cannot be answered without the image


def draw(shapes: list[tuple[str, str, int, int, int]], rng: random.Random):
    """A picture of shapes (kind, colour, centre x, centre y, radius), each a little off in colour, on a dark ground.

    Every colour is brighter than the ground, so that "something is there" is one direction in pixel space and quickly learnt.
    """
    image = Image.new("RGB", (84, 84), tuple(rng.randint(35, 55) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for kind, colour, x, y, r in shapes:
        fill = tuple(min(max(c + rng.randint(-15, 15), 0), 255) for c in COLOURS[colour])
        if kind == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill)
        elif kind == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill)
        elif kind == "triangle":
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
        else:
            pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
            pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill)
    return image


def synthetic_comparison(seed: int, i: int, held_out: bool = False) -> Comparison:
    """The i-th comparison of a seed: a question on a drawn picture or on a text, and 2 to 4 responses graded from right to wrong.

    Whether right or wrong, every response is drawn from the same distribution, so nothing but the picture tells them apart: a model
    that does not look is at chance on the visual questions. The boxes of texts have even numbers; odd ones are held out.
    """
    rng = random.Random(f"{'held out ' * held_out}{seed} {i}")
    category = rng.choice((*VISUAL, "text"))
    colour, shape, place = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(PLACES))
    k = rng.randint(2, 4)

    def others(values, right):
        return rng.sample([v for v in values if v != right], k - 1)

    if category == "text":
        number = rng.randrange(1000, 10000, 2) + held_out
        prompt, images = f"Box {number} is {colour}. What colour is box {number}?", []
        responses = [colour, *others(COLOURS, colour)]
    elif category == "count":
        right = rng.randint(1, 4)
        spots = rng.sample([(21, 21), (63, 21), (21, 63), (63, 63)], right)
        images = [draw([(shape, colour, sx + rng.randint(-4, 4), sy + rng.randint(-4, 4), rng.randint(12, 16)) for sx, sy in spots], rng)]
        prompt, responses = "How many shapes are there?", [str(right), *others("1234", str(right))]
    else:
        centre, radius = ((42, 42), rng.randint(24, 30)) if category in ("colour", "shape") else (PLACES[place], rng.randint(15, 19))
        images = [draw([(shape, colour, *(c + rng.randint(-4, 4) for c in centre), radius)], rng)]
        if category == "colour":
            prompt, responses = f"What colour is the {shape}?", [colour, *others(COLOURS, colour)]
        elif category == "shape":
            prompt, responses = f"Which shape is {colour}?", [shape, *others(SHAPES, shape)]
        elif category == "position":
            prompt, responses = f"Where is the {shape}?", [place, *others(PLACES, place)]
        else:  # both right, one of the two right, none right
            other_colour = rng.choice([c for c in COLOURS if c != colour])
            other_place = rng.choice([p for p in PLACES if p != place])
            responses = [f"{colour} {place}", f"{other_colour} {other_place}", f"{colour} {other_place}", f"{other_colour} {place}"]
            responses = [responses[0], *rng.sample(responses[1:], k - 1)]
            prompt = "Name colour and place."
    # how many of its words are right; equals tie, so three wrong answers make no pair among themselves
    right = [sum(word in responses[0].split() for word in response.split()) for response in responses]
    pairs = [(w, l) for w in range(k) for l in range(k) if right[w] > right[l]]
    at = rng.sample(range(k), k)  # response j moves to place at[j], so that the winner is not always first
    shuffled = [responses[at.index(j)] for j in range(k)]
    return Comparison(("<image>" * len(images)) + prompt, shuffled, sorted((at[w], at[l]) for w, l in pairs), images, id=f"{seed}-{i}",
                      source="synthetic", category=category, answer=responses[0])


def synthetic(n: int, seed: int = 0, held_out: bool = False) -> list[Comparison]:
    """n comparisons of coloured shapes: questions of colour, shape, count, position, two at once, and some without an image.

    Those with `held_out` are for examinations: whatever the two seeds, no picture and no text of them occurs among the others.
    """
    return [synthetic_comparison(seed, i, held_out) for i in range(n)]


@contextlib.contextmanager
def new_folder(folder):
    """Yields FOLDER.partial to write into, which becomes FOLDER if the block ends well: what is there under its name is complete."""
    folder = Path(folder)
    if folder.exists():
        raise BadRow(f"{folder} exists already; remove it or choose another --out")
    partial = folder.with_name(folder.name + ".partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:  # held as long as this process lives
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadRow(f"another process is writing {folder}; wait for it or choose another --out") from None
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        (partial / "images").mkdir(parents=True)
        try:
            yield partial
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.unlink(lock.name)


def write_comparisons(folder, comparisons, bar: bool = True) -> Path:
    """Writes comparisons, their images in memory or in files, as a data folder. It appears under its name only when it is complete."""
    with new_folder(folder) as partial, open(partial / "comparisons.jsonl", "w") as file:
        for i, c in enumerate(tqdm(comparisons, disable=not bar, desc=Path(folder).name)):
            paths = [f"images/{i}-{j}" if is_video(image) else f"images/{i}-{j}.png" for j, image in enumerate(c.images)]
            for path, image in zip(paths, c.images):
                frames = ({path: image} if not is_video(image)
                          else {f"{path}/{f:02}.png": frame for f, frame in enumerate(open_frames(image))})
                for place, frame in frames.items():
                    (partial / place).parent.mkdir(exist_ok=True)
                    open_image(frame).save(partial / place)
            row = {"prompt": c.prompt, "images": paths, "responses": c.responses, "pairs": c.pairs, "id": c.id, "source": c.source,
                   "category": c.category, "answer": c.answer, "critiques": c.critiques}
            file.write(json.dumps({key: value for key, value in row.items() if value}) + "\n")
    return Path(folder)


# ---------------------------------------------------------------------------------------------------------------------------------
# 6  The published sets
#
# A function takes a row as published and returns {"prompt", "responses", "pairs", "images"}, or {"prompt", "images", "answer"} for RL.
# A ValueError drops the row; what stands before its first colon is the reason it is counted under. A set of your own takes a function
# and a line in SETS.


def need(row: dict, *names: str) -> list:
    """The named fields; "a|b" is one field with two spellings, of which the first that is not empty counts. Absent fields are an error.

    >>> need({"question": "Why?", "image": None, "video": "clip9"}, "question", "image|video")
    ['Why?', 'clip9']
    """
    values = []
    for name in names:
        found = [row[key] for key in name.split("|") if key in row] if isinstance(row, dict) else []
        if not found:
            raise ValueError(f"no field {name.replace('|', ' or ')}: found {sorted(row) if isinstance(row, dict) else str(row)[:80]}; "
                             "is this the file of another set?")
        values.append(next((value for value in found if value not in (None, "", [])), found[0]))
    return values


def pair(prompt, chosen, rejected, images=()) -> dict:
    """images: one, or a list of them, here and below."""
    return {"prompt": prompt, "responses": [chosen, rejected], "pairs": [(0, 1)],
            "images": images if isinstance(images, (list, tuple)) else [images]}


def ranked(prompt, responses, scores, images=()) -> dict:
    """K responses, best first, and every pair whose scores differ. Responses that are unrated, empty, or said before are left out.

    >>> ranked("Why?", ["a", "b", "c", "d"], [1, 5, None, 5])["pairs"]         # of b, d, a: b and d tie
    [(0, 2), (1, 2)]
    """
    rated = {}
    for response, score in zip(responses, scores, strict=True):
        if score is not None and response and response.strip():
            rated.setdefault(response, score)
    order = sorted(rated, key=rated.get, reverse=True)
    pairs = [(w, l) for w, l in itertools.combinations(range(len(order)), 2) if rated[order[w]] > rated[order[l]]]
    if not pairs:
        raise ValueError(f"tie or unrated: the scores are {scores}")
    return pair(prompt, "", "", images) | {"responses": order, "pairs": pairs}


def chat(turns: list) -> list[dict]:
    """ShareGPT's {from, value} turns as messages."""
    turns = [need(turn, "from", "value") for turn in turns]
    return [{"role": {"human": "user", "gpt": "assistant"}.get(speaker, speaker), "content": text} for speaker, text in turns]


JUDGE = re.compile(r"\[Question\]:\s*(.*?)[\s#*]*\[Response 1\]:\s*(.*?)[\s#*]*\[Response 2\]:\s*(.*?)\s*"
                   r"(?:\n[\s#*\[]*Output Format.*)?\Z", re.S)


def r1_reward(row: dict) -> dict:
    """yifanzhang114/R1-Reward-RL, 17,261 pairs, licence not stated. The image is base64; the responses must be cut out of a judge's prompt.

    Trap: these are the pairs GPT-4o found hard, not the 200k of the paper, which nobody published as one file (README).
    """
    message, answer, image = need(row, "message", "answer", "image")
    text = "".join(part["text"] for part in from_json(message)[0]["content"] if part.get("type") == "text")
    verdict, found = re.search(r"<answer>\s*([12])\s*</answer>", str(answer)), JUDGE.search(text)
    if not found or text.count("[Response 1]:") != 1 or text.count("[Response 2]:") != 1:
        raise ValueError(f"no [Question]:, [Response 1]:, [Response 2]: once each in the message: {text[-80:]!r}")
    if not verdict:
        raise ValueError(f"unparsable verdict: {answer}")
    question, *responses = found.groups()
    chosen = int(verdict[1]) - 1
    return pair(MARK.sub("", question).strip(), responses[chosen], responses[1 - chosen], image)


def mm_rlhf(row: dict) -> dict:
    """yifanzhang114/MM-RLHF, MIT: data.jsonl (16,342 ranked prompts) or dpo_pairs.jsonl (62,545 pairs); unpack its five archives beside it.

    Trap: whether rank 1 is best is written nowhere. It is taken so, and a row whose own scores say the opposite is dropped and counted.
    """
    if "chosen" in row or "rejected" in row:
        prompt, chosen, rejected, picture = need(row, "prompt", "chosen", "rejected", "image|video")
        critiques = [row.get("chosen_reason"), row.get("rejected_reason")]
        return pair(prompt, chosen, rejected, picture) | {"critiques": critiques if all(critiques) else [], "category": folder_of(picture)}
    prompt, responses, ranks, picture = need(row, "question", "models_output", "final_ranking", "image|video")
    aspects = [row[name] for name in ("faithfulness", "helpfulness", "ethical") if row.get(name)]
    ranked_ones = [i for i, rank in enumerate(ranks) if rank is not None]
    if sum((ranks[i] - ranks[j]) * (scores[i] - scores[j]) for scores in aspects for i, j in itertools.combinations(ranked_ones, 2)
           if scores[i] is not None and scores[j] is not None) > 0:
        raise ValueError(f"ranking against its scores: ranks {ranks}, scores {aspects}; if most rows say so, the last rank is the best one")
    return ranked(prompt, responses, [None if r is None else -r for r in ranks], picture) | {"category": folder_of(picture)}


def folder_of(picture) -> str:
    """MM-RLHF's subset: short, long, mcq, safety or video. Also under an extra top folder, which some of its archives have."""
    return next((part for part in str(picture).split("/") if part in ("short", "long", "mcq", "safety", "video")), "")


def rlaif_v(row: dict) -> dict:
    """openbmb/RLAIF-V-Dataset, 83,132 pairs, CC BY-NC 4.0. Trap: VL-RewardBench is drawn from it too; decontaminate."""
    return pair(*need(row, "question", "chosen", "rejected", "image"))


def mmpr(row: dict) -> dict:
    """OpenGVLab/MMPR-v1.2, about 3M pairs of which the paper uses 2M, MIT. Source: meta.json, whose repeat_time is obeyed.

    Trap: a rejected response may be the chosen one, cut in half and continued without the image. Rows without an image are text-only.
    """
    return pair(*need(row, "question", "chosen", "rejected"), row.get("image") or row.get("video") or [])


def mmif(row: dict) -> dict:
    """ChrisDing1105/MMIF-23k, the DPO part, Apache-2.0.

    Trap: files for fine-tuning lie beside it, and v1 (the paper's 22k) differs from v2.
    """
    turns, chosen, rejected, images = need(row, "conversations", "chosen", "rejected", "images|image")
    return pair(chat(turns), *need(chosen, "value"), *need(rejected, "value"), images)


def omnialign(row: dict) -> dict:
    """PhoenixZ/OmniAlign-V-DPO, 133k pairs, licence not stated. Trap: rejected responses come from a weaker model and are shorter."""
    prompt, chosen, rejected, image = need(row, "prompt", "chosen", "rejected", "image")
    return pair(MARK.sub("", prompt).strip(), chosen, rejected, image)


def ultrafeedback_all(row: dict) -> dict:
    """openbmb/UltraFeedback, 63,967 prompts with 4 responses, MIT: every untied pair by the mean of the aspects' ratings.

    Trap: `overall_score` held thousands of wrong tens until December 2023; `fine-grained_score` did not. The paper names neither.
    """
    prompt, completions = need(row, "instruction", "completions")
    rated = [need(completion, "response", "fine-grained_score") for completion in completions]
    return ranked(prompt, [response for response, _ in rated], [score for _, score in rated])


def ultrafeedback_hard(row: dict) -> dict:
    """UltraFeedback's widest-gap pair of every prompt: best against worst (Table 4's "Ultra-Hard", 63k)."""
    made = ultrafeedback_all(row)
    return pair(made["prompt"], made["responses"][0], made["responses"][-1])


def shp(row: dict) -> dict:
    """stanfordnlp/SHP, 348,718 pairs of Reddit comments in `train`, Reddit's terms.

    Trap: labels 1 means A; one public loader has it reversed.
    """
    prompt, a, b, label, score_a, score_b = need(row, "history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B")
    if label not in (0, 1) or (score_a - score_b) * (1 if label else -1) < 0:
        raise ValueError(f"label against its scores: labels {label}, score_A {score_a}, score_B {score_b}")
    return pair(prompt, a, b) if label == 1 else pair(prompt, b, a)


def message_lists(row: dict) -> dict:
    """chosen and rejected as whole conversations. The prompt is what they share, whatever a `prompt` column says; any number of turns.

    tulu3-if       allenai/tulu-3-IF-augmented-on-policy-70b, 65.6k, ODC-BY, parts not for commercial use
    olmo2          allenai/olmo-2-0425-1b-preference-mix, about 378k, ODC-BY, parts not for commercial use; has no `prompt` column
    wildchat-uf    allenai/tulu-3-wildchat-ultrafeedback, ODC-BY. Trap: there is no `train` split; all are read but wildchat_unused (56,034)
    skywork        Skywork/Skywork-Reward-Preference-80K-v0.2, about 77k, licence not stated
    """
    chosen, rejected = need(row, "chosen", "rejected")
    prompt, responses = from_trl({"chosen": chosen, "rejected": rejected} | ({} if len(chosen) > 1 else {"prompt": row.get("prompt")}))
    return pair(prompt, *responses)


def swe_arena(row: dict) -> dict:
    """bigcode/swe-arena-preference-5k (now bigcodearena-preference-5k), 5.1k votes, bigcode-openrail-m; votes for neither side are ties.

    Trap: each side has a conversation of its own. Where they part before the last reply, the prompt is the bare `instruction`.
    """
    feedback, states, instruction = need(row, "feedback", "states", "instruction")
    (vote,), sides = need(feedback, "vote_type"), [need(state, "messages")[0] for state in need(states, "model_A", "model_B")]
    if vote not in ("vote_left", "vote_right", "vote_model_A", "vote_model_B"):
        raise ValueError(f"tie or no vote: vote_type is {vote!r}")
    sides = [[{"role": "user" if role.lower() == "user" else "assistant", "content": text} for role, text in side] for side in sides]
    if any(not side or side[-1]["role"] == "user" for side in sides):
        raise ValueError("no reply: a side ends with its user")
    chosen, rejected = sides if vote in ("vote_left", "vote_model_A") else sides[::-1]
    prompt = chosen[:-1] if chosen[:-1] == rejected[:-1] else instruction
    return pair(prompt, text_of(chosen[-1]), text_of(rejected[-1]))


def vlfeedback(row: dict) -> dict:
    """MMInstruction/VLFeedback, 80,258 prompts with 4 responses, CC BY 4.0: every untied pair by the mean rating of three aspects.

    Trap: `completions` is a list of dicts or a dict of lists, by the release; a response with one rating that is no number is left out.
    """
    prompt, completions, image = need(row, "prompt", "completions", "image|img_path")
    if isinstance(completions, list):
        completions = dict(zip(("response", "annotations"), zip(*[need(c, "response", "annotations") for c in completions])))
    responses, annotations = need(completions, "response", "annotations")
    scores = []
    for aspects in annotations:
        ratings = [need(aspect, "Rating")[0] for aspect in aspects.values()]
        try:
            scores.append(sum(map(float, ratings)) / len(ratings))
        except (TypeError, ValueError, ZeroDivisionError):
            scores.append(None)
    return ranked(prompt, responses, scores, image)


def rlhf_v(row: dict) -> dict:
    """openbmb/RLHF-V-Dataset, 5,733 pairs, CC BY-NC 4.0. Trap: question and responses are JSON inside the string `text`."""
    text, image = need(row, "text", "image")
    return pair(*need(from_json(text), "question", "chosen", "rejected"), image)


CRITIC = re.compile(r"Question: \[(.*?)\]\s*\n\s*(?:Response 1|Response A|The first response): \[(.*?)\]\s*\n\s*"
                    r"(?:Response 2|Response B|The second response): \[(.*)\]", re.S)


def llava_critic(row: dict) -> dict:
    """lmms-lab/llava-critic-113k, config `pairwise`, 40,154 judgements of GPT-4o, Apache-2.0. Responses and verdict are inside the texts.

    Trap: the set mixes several judges' formats; only "Question: [..] .. The better response: [..]" is read, the rest is counted as dropped.
    """
    turns, image = need(row, "conversations", "image")
    asked, said = (turn["content"] for turn in chat(turns)[:2])
    found, verdict = CRITIC.search(asked), re.search(r"better response: \[(first|second|1|2|A|B)\]", said)
    if not found:
        raise ValueError(f"another judge's format: {asked[:80]!r}")
    if not verdict:
        raise ValueError(f"tie or no verdict: {said[-80:]!r}")
    question, first, second = found.groups()
    return pair(question, *((first, second) if verdict[1] in ("first", "1", "A") else (second, first)), image)


def own_pairs(row: dict) -> dict:
    """Rows of your own, native or TRL's (the three layouts at the top of data.py), to be curated like a published set."""
    images = row.get("images", row.get("image")) or []
    if "chosen" not in row and "rejected" not in row:
        return row | {"images": images if isinstance(images, (list, tuple)) else [images]}
    prompt, (chosen, rejected) = from_trl(row)
    return pair(prompt, chosen, rejected, images) | {
        key: row[key] for key in ("id", "source", "category", "answer", "critiques") if key in row}


def vstar(row: dict) -> dict:
    """craigwu/seal_vqa_data, RL prompts on small details (V*). Trap: its images (COCO, GQA) must be fetched from their own homes."""
    turns, (image,) = [turn["content"] for turn in chat(row.get("conversations") or [])[:2]], need(row, "image")
    question, answer = turns if len(turns) == 2 else need(row, "question", "answer")
    return {"prompt": MARK.sub("", question).strip(), "images": [image], "answer": answer}


def arxivqa(row: dict) -> dict:
    """MMInstruction/ArxivQA, about 100k RL prompts on figures, CC BY-SA 4.0.

    Trap: some labels are no letter, and some options lack theirs.
    """
    question, options, label, image = need(row, "question", "options", "label", "image")
    if not re.match(r"[A-D]\b", str(label).strip()) or not isinstance(options, list):
        raise ValueError(f"unparsable label: {label!r}")
    lines = [o if re.match(r"[A-D][).:]", o) else f"{'ABCDEFGH'[i]}) {o}" for i, o in enumerate(options)]
    return {"prompt": "\n".join([question, *lines, "Answer with the letter."]), "images": [image], "answer": str(label).strip()[0]}


def thinklite(row: dict) -> dict:
    """russwang/ThinkLite-VL-hard-11k, 11,031 RL prompts on mathematics and science, licence not checked. The image is raw bytes."""
    problem, answer, image = need(row, "problem", "answer", "image")
    return {"prompt": problem, "images": [image], "answer": answer}


ANY = "train*.parquet *.parquet *.jsonl *.json"
SETS = {  # name: (row -> comparison, files of a local folder and splits on the hub: see read_rows)
    "r1-reward": (r1_reward, ANY, "train"),
    "mm-rlhf": (mm_rlhf, "data.jsonl *.parquet dpo_pairs.jsonl", "train"),
    "rlaif-v": (rlaif_v, ANY, "train"),
    "mmpr": (mmpr, "*.jsonl", "train"),
    "mmif": (mmif, "dpo/*.json *dpo*.json", "train"),
    "omnialign": (omnialign, "*.jsonl", "train"),
    "ultrafeedback-all": (ultrafeedback_all, ANY, "train"),
    "ultrafeedback-hard": (ultrafeedback_hard, ANY, "train"),
    "shp": (shp, "train.json train.jsonl *.parquet", "train"),
    "tulu3-if": (message_lists, ANY, "train"),
    "olmo2": (message_lists, ANY, "train"),
    "wildchat-uf": (message_lists, "wildchat_[ir]*",
                    "wildchat_if wildchat_reused_on_policy_8b wildchat_if_on_policy_70b wildchat_reused_on_policy_70b"),
    "swe-arena": (swe_arena, ANY, "train"),
    "vlfeedback": (vlfeedback, "*.parquet vlfeedback*.jsonl *.jsonl", "train"),
    "rlhf-v": (rlhf_v, ANY, "train"),
    "llava-critic": (llava_critic, "pairwise/*.parquet pairwise*.parquet *.jsonl *.json", "pairwise:train"),
    "skywork": (message_lists, ANY, "train"),
    "pairs": (own_pairs, "comparisons.jsonl *.jsonl *.parquet *.json", "train"),
    "vstar": (vstar, "*_data.json *.json", "train"),
    "arxivqa": (arxivqa, "*.jsonl *.parquet", "train"),
    "thinklite": (thinklite, ANY, "train"),
}


# ---------------------------------------------------------------------------------------------------------------------------------
# 7  Sources

SUFFIXES = (".json", ".jsonl", ".parquet")


def json_rows(file: Path):
    """(file, number, row) of a file of JSON Lines, rows still as bytes, or of one JSON list, which is read in pieces and never whole
    in memory."""
    with open(file, "rb") as lines:
        is_list = lines.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")  # a byte order mark may stand first
        lines.seek(0)
        if not is_list:
            yield from ((file, number, line) for number, line in enumerate(lines, 1) if line.strip())
            return
        # bytes that are no UTF-8 become escapes that JSON does not know: an error that names the place
        text, decode, number = io.TextIOWrapper(lines, "utf-8-sig", "backslashreplace"), json.JSONDecoder().raw_decode, 0
        buffer, at = text.read(1 << 20), 0
        at = buffer.index("[") + 1
        while True:
            at = re.compile(r"[\s,]*").match(buffer, at).end()
            if buffer.startswith("]", at):
                return
            try:
                row, at = decode(buffer, at)
            except json.JSONDecodeError as error:  # the row goes on in the next piece, or the file ends too early
                more = text.read(1 << 20)
                if not more or len(buffer) - at > 1 << 26:  # no row has 64 million characters
                    raise BadRow(f"{file}: malformed JSON after row {number} ({error.msg}); is the download complete?") from None
                buffer, at = buffer[at:] + more, 0
                continue
            number += 1
            yield file, number, row


def dataset_rows(source: str, splits: str, streaming: bool):
    """(file, number, row) of a parquet file, or of a set's splits on the hub, where the file is owner/name/split. Images stay undecoded."""
    try:
        import datasets
    except ImportError:
        raise BadRow(f"{source}: parquet files and hub ids are read with the package `datasets`; pip install datasets") from None
    datasets.disable_progress_bars()
    path, files = ("parquet", source) if source.endswith(".parquet") else (source, None)
    config, _, splits = splits.rpartition(":")
    try:
        found = datasets.load_dataset(path, config or None, data_files=files, streaming=streaming)
        wanted = next((names for names in map(str.split, splits.split("|")) if found.keys() >= set(names)), None)
        if not wanted:
            raise ValueError(f"its splits are {', '.join(found)}; want {splits.replace('|', ', or ')}")
        for split in wanted:
            file = Path(source) if files else Path(source, split)
            rows = found[split] if streaming else found[split].to_iterable_dataset()
            yield from ((file, number, row) for number, row in enumerate(rows.decode(False), 1))
    except Exception as error:  # no such set, no network, a damaged file: a dozen kinds, and of each the user needs what it says
        raise BadRow(f"{source} cannot be read: {' '.join(str(error).split())[:300]}") from None


def read_rows(source: str, patterns: str, splits: str, streaming: bool = True):
    """(file, number, row) of a file, of a folder, or of a set on the hub. A row of JSON Lines is bytes still, any other an object.

    patterns: a folder's files are those of the first that finds any; "a*,b*" is one pattern. splits, on the hub: of "config:a b", both
    are read; of "a b|c", the first alternative whose splits are all there. Streaming fetches rows from the hub one by one; without it,
    the set is downloaded once and kept for later runs.
    """
    path = Path(source)
    if not path.exists() and path.suffix not in SUFFIXES and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        yield from dataset_rows(source, splits, streaming)
        return
    files = [path] if path.is_file() else []
    for pattern in patterns.split():
        files = files or sorted(file for part in pattern.split(",") for file in path.rglob(part)
                                if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise BadRow(f"{source} holds no {', '.join(SUFFIXES)} file: looked for {patterns.replace(' ', ', then ')}" if path.is_dir() else
                     f"{source} does not exist; want a file, a folder, or a hub id like openbmb/RLAIF-V-Dataset")
    for file in files:
        yield from dataset_rows(str(file), "train", streaming=True) if file.suffix == ".parquet" else json_rows(file)


def mmpr_files(meta: Path) -> list[tuple[Path, Path, float]]:
    """(annotation file, image folder, repeat factor) of each part of MMPR.

    Its paths begin with MMPR-v1.2/, whatever your folder is called.
    """
    parts = []
    for name, part in json.loads(meta.read_text()).items():
        root, annotation, repeat = need(part, "root", "annotation", "repeat_time")
        root, annotation = (Path(inside(meta.parent, re.sub("^MMPR[^/]*/", "", path))) for path in (root, annotation))
        if not annotation.is_file():
            raise BadRow(f"{meta}: part {name} names {annotation}, which does not exist; unpack annotations.zip")
        parts.append((annotation, root, repeat))
    return parts


def read_source(name: str, source: str):
    """(place, row or its JSON, folder its images are relative to, copies) of every row of a published set."""
    path, (_, patterns, splits) = Path(source), SETS[name]
    home = path.parent if path.is_file() else path
    label = functools.cache(lambda file: os.path.relpath(file, home))
    parts = [(source, home, 1)]
    if name == "mmpr" and (found := [path] if path.name == "meta.json" else sorted(path.rglob("meta.json"))):
        parts = mmpr_files(found[0])
    for part, folder, repeat in parts:
        for file, number, row in read_rows(str(part), patterns, splits):
            if repeat >= 1 or digest(file.name, number) / 2**64 + 0.5 < repeat:  # a random part, the same each time
                yield f"{label(file)}:{number}", row, folder, max(int(repeat), 1)


# ---------------------------------------------------------------------------------------------------------------------------------
# 8  Images

Image.init()  # without it Pillow knows only some of the formats by name
BASE64 = ("data:image/", "/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")  # how a JPEG, PNG, WebP and GIF begin in base64


def image_bytes(source, folder: Path) -> bytes:
    """The encoded image behind bytes, base64 text, {bytes, path} (an Image column of `datasets`) or a path inside the folder."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes):
        return source
    if isinstance(source, str) and source.startswith(BASE64):
        return base64.b64decode(source.partition(",")[2] if source.startswith("data:") else source)
    try:
        return Path(inside(folder, source)).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"missing image: {error}") from None


def load_image(source, folder: Path) -> tuple[str, dict, Image.Image]:
    """(path to name it by, {file: encoded bytes}, its first frame) of an image, or of a video: a folder of frames, of which those are
    taken that the model will look at, in the order of their names. All are decoded: nothing is stored that cannot be read."""
    frames, suffix = [source], ""
    if video := isinstance(source, str) and len(source) < 1000 and os.path.isdir(folder / source):
        try:
            frames = [os.path.relpath(frame, folder) for frame in frames_of(folder / source)]
        except ValueError as error:
            raise ValueError(f"missing image: {error}") from None
    encoded, decoded = [image_bytes(frame, folder) for frame in frames], []
    for data in encoded:
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            suffix = {"JPEG": ".jpg"}.get(image.format, f".{image.format.lower()}")
            decoded.append(open_image(image))
        except Exception as error:  # see open_image
            why = str(error).rpartition("cannot be used: ")[2]
            raise ValueError(f"{'absurd aspect ratio' if 'narrower' in why else 'broken image'}: {why.partition('<')[0]}") from None
    if len({image.size for image in decoded}) > 1:
        raise ValueError(f"broken video: the frames of {source} have different sizes")
    name = hashlib.blake2b(b"".join(hashlib.blake2b(data).digest() for data in encoded), digest_size=16).hexdigest()
    name = f"images/{name[:2]}/{name}"  # 256 sub-folders: no folder holds a million files
    files = {f"{name}/{i:02}{suffix}": data for i, data in enumerate(encoded)} if video else {f"{name}{suffix}": encoded[0]}
    return name if video else f"{name}{suffix}", files, decoded[0]


def thumbprint(image: Image.Image) -> int:
    """64 bits that survive re-encoding and resizing: in a grey thumbnail of 9 x 8, whether a pixel's right neighbour is brighter by more
    than 2 of 255 (a margin, since in flat areas only the noise of a JPEG differs)."""
    grey = image.convert("L").resize((9, 8)).tobytes()
    return sum((grey[9 * y + x + 1] > grey[9 * y + x] + 2) << (8 * y + x) for y in range(8) for x in range(8))


# ---------------------------------------------------------------------------------------------------------------------------------
# 9  Curation

CLOSE = 4  # differing bits of 64 at which two images count as one; two unrelated images differ in some 20
SHORT = 32  # characters: "Yes" and "No" do not tell where they come from, so below this the prompt must agree too


def digest(*parts) -> int:
    """64 bits of hash, signed. Among 2.8M rows two different ones agree with a probability of 2e-7."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "little", signed=True)


def plain(text: str) -> str:
    return " ".join(MARK.sub(" ", text).lower().split())


def text_of_prompt(prompt, images) -> str:
    return "\n".join(message["content"] for message in to_messages(prompt, images))


def pair_digests(prompt: str, responses, pairs) -> set[int]:
    """One number for the two responses of each pair, in no order."""
    texts = [tuple(sorted((plain(responses[w]), plain(responses[l])))) for w, l in pairs]
    return {digest(*two, prompt if sum(map(len, two)) < SHORT else "") for two in texts}


def read_benchmarks(folders) -> tuple[dict, dict]:
    """Where each pair of responses stands, {digest: place}, and the images of each prompt, {digest: [(thumbprint, place), ...]}."""
    by_pair, by_prompt = {}, {}
    for folder in folders:
        rows = read_comparisons(folder, needs_responses=False)
        for i in range(len(rows)):
            row, place = rows[i], f"{rows.file}:{rows.lines[i]}"
            prompt = plain(text_of_prompt(row.prompt, row.images))
            by_pair |= dict.fromkeys(pair_digests(prompt, row.responses, row.pairs), place)
            for image in row.images:
                first = open_frames(image)[0] if is_video(image) else open_image(image)
                by_prompt.setdefault(digest(prompt), []).append((thumbprint(first), place))
    return by_pair, by_prompt


# One row of numbers about each comparison: 88 bytes, all that a conversion keeps of it in memory.
FIELDS = ("same",  # hash of prompt, images and responses: equal for duplicates, whichever way they were judged
          "verdict",  # hash of the winners and losers by text: differs between contradictory duplicates
          "prompt",  # hash of prompt and images: what --hold_out keeps together
          "pairs", "responses", "images", "prompt_tokens", "response_tokens",  # of the longest response
          "longer_wins", "shorter_wins",  # pairs by characters
          "copies")  # how often it is written, MMPR's repeat factor


def curate(made: dict, job: "Job", folder: Path, place: str) -> tuple[bytes, list[int], str]:
    """(line to write, its numbers, place in a benchmark or "") of one comparison. ValueError with the reason if it is to be dropped."""
    sources, responses, pairs = made.get("images") or [], made.get("responses") or [], made.get("pairs") or []
    needs_responses = "answer" not in made or bool(responses)
    if not needs_responses and not str(made["answer"] or "").strip():
        raise ValueError("no answer: it is empty")
    row = made | {"source": made.get("source") or job.name, "id": made.get("id") or place}
    # What train.py will say of it, before images are opened
    parse_row(row | {"images": ["a name"] * len(sources)}, job.out, needs_responses)
    text = text_of_prompt(made["prompt"], sources)
    prompt = plain(text)
    if not prompt and not sources:
        raise ValueError("the prompt is empty")
    prompt_tokens, response_tokens = job.tokens(text), max(map(job.tokens, responses), default=0)
    if prompt_tokens + response_tokens > job.max_tokens:
        raise ValueError(f"over-long: {prompt_tokens} tokens of prompt, {response_tokens} of the longest response; "
                         f"--max_tokens {job.max_tokens}")
    by_pair, by_prompt = job.benchmarks
    known = next((by_pair[key] for key in sorted(pair_digests(prompt, responses, pairs)) if key in by_pair), "") if by_pair else ""
    loaded = [load_image(source, folder) for source in sources]
    for mark, benchmark in by_prompt.get(digest(prompt), []):
        if any((thumbprint(image) ^ mark).bit_count() <= CLOSE for _, _, image in loaded):
            known = known or benchmark
    paths = [path for path, _, _ in loaded]
    line = {"prompt": row["prompt"], "images": paths, "responses": responses, "pairs": pairs} | {
        key: row[key] for key in ("id", "source", "category", "answer", "critiques") if row.get(key)}
    if not known:
        for path, data in itertools.chain.from_iterable(files.items() for _, files, _ in loaded):
            if not (job.out / path).exists():  # the name is the content: two processes that write the same file write the same bytes
                (job.out / path).parent.mkdir(parents=True, exist_ok=True)
                (job.out / path).write_bytes(data)
    texts = sorted((responses[w], responses[l]) for w, l in pairs)
    numbers = [digest(prompt, paths, sorted(responses)), digest(texts, made.get("answer")), digest(prompt, paths),
               len(pairs), len(responses), len(paths), prompt_tokens, response_tokens,
               sum(len(w) > len(l) for w, l in texts), sum(len(w) < len(l) for w, l in texts)]
    return json.dumps(line, ensure_ascii=False).encode() + b"\n", numbers, known


def judge(numbers: torch.Tensor, hold_out: int) -> torch.Tensor:
    """What becomes of every row (rows, FIELDS): 0 kept, 1 held out, 2 a duplicate of an earlier row, 3 contradicted by another row.

    Duplicates agree in prompt, images and responses. The first is kept if all agree in the verdict too; if any does not, all go: nobody
    knows which is right. (Their images stay in images/.) Held out are whole prompts, those with the smallest hash, until there are
    `hold_out` rows.
    """
    same, verdict, prompt = numbers[:, 0].contiguous(), numbers[:, 1], numbers[:, 2].contiguous()
    _, group, count = torch.unique(same, return_inverse=True, return_counts=True)
    order = torch.argsort(group, stable=True)
    first = torch.zeros(len(same), dtype=torch.bool)
    first[order[count.cumsum(0) - count]] = True  # `order` lists the groups one after the other, each in the order of its rows
    fate = torch.where(first, 0, 2)
    odd = verdict != verdict[order[count.cumsum(0) - count]][group]  # another verdict than the first of its kind
    fate[torch.isin(group, group[odd])] = 3
    kept = (fate == 0).nonzero()[:, 0]
    if hold_out and len(kept):
        _, group, count = torch.unique(prompt[kept], return_inverse=True, return_counts=True)  # sorted by hash
        fate[kept[(count.cumsum(0) - count < hold_out)[group]]] = 1
    return fate


# ---------------------------------------------------------------------------------------------------------------------------------
# 10  Conversion


@dataclass(frozen=True)
class Job:
    """What a worker process needs to know."""
    name: str
    out: Path
    max_tokens: int
    tokenizer: str
    benchmarks: tuple

    def tokens(self, text: str) -> int:
        return len(TOKENIZER(text, add_special_tokens=False).input_ids) if self.tokenizer else (len(text.encode()) + 3) // 4


def start_worker(job: Job) -> None:
    global JOB, TOKENIZER
    JOB, TOKENIZER = job, AutoTokenizer.from_pretrained(job.tokenizer) if job.tokenizer else None
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the workers
        # a worker whose parent was killed would wait for ever
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def convert_rows(items: list) -> list:
    """For each item of `read_source`: (line, numbers, place in a benchmark, copies), or (None, reason, details, copies)."""
    results = []
    for place, row, folder, copies in items:
        try:
            row = from_json(row)
            made = SETS[JOB.name][0](row)
            ids = {"id": str(row["id"])} if row.get("id") not in (None, "") else {}
            results.append((*curate(ids | made, JOB, folder, place), copies))
        except OSError:  # of writing, a full disk for one: an image that cannot be read is a ValueError
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else f"unexpected layout: {type(error).__name__}: {error}"
            results.append((None, re.sub(r"\d+", "N", re.split("[:;]", reason, maxsplit=1)[0]), f"{place}: {reason}"[:300], copies))
    return results


def in_order(items, workers: int, job: Job, batch: int = 32):
    """Results of `convert_rows`, in the order of the items whatever the number of workers, with a bounded number of items under way."""
    batches = iter(lambda: list(itertools.islice(items, batch)), [])
    if workers == 1:
        start_worker(job)
        yield from itertools.chain.from_iterable(map(convert_rows, batches))
        return
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(job,)) as pool:
        under_way = deque()
        try:
            for part in batches:
                under_way.append(pool.submit(convert_rows, part))
                if len(under_way) > 2 * workers:
                    yield from under_way.popleft().result()
            while under_way:
                yield from under_way.popleft().result()
        except BrokenProcessPool:
            raise BadRow("a worker process was killed, most likely for want of memory; take fewer --workers") from None


def convert(name: str, cfg: "Config") -> dict:
    """Converts a published set as the command line asks, and returns the report. BadRow, one line, if nothing can be made of the source."""
    dropped, examples, rows_in, contaminated, numbers = Counter(), {}, 0, 0, array("q")
    workers = cfg.workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    if Path(cfg.source).is_dir() and Path(cfg.out).resolve().is_relative_to(Path(cfg.source).resolve()):
        raise BadRow(f"--out {cfg.out} lies inside --source {cfg.source} and would be read as part of it; choose another folder")
    if cfg.tokenizer:
        try:
            AutoTokenizer.from_pretrained(cfg.tokenizer)
        except (OSError, ValueError) as error:
            raise BadRow(f"--tokenizer {cfg.tokenizer} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    with new_folder(cfg.out) as out:
        job = Job(name, out, cfg.max_tokens, cfg.tokenizer, read_benchmarks(cfg.decontaminate))
        items = itertools.islice(read_source(name, cfg.source), cfg.n or None)
        with open(out / "draft", "wb") as draft, open(out / "contaminated.jsonl", "w", encoding="utf-8") as removed:
            for line, values, more, copies in tqdm(in_order(items, workers, job), desc=name, unit=" rows", leave=False):
                rows_in += copies
                if line is None:
                    dropped[values] += copies
                    examples.setdefault(values, more)
                elif more:
                    contaminated += copies
                    removed.write(json.dumps({"benchmark": more, "row": json.loads(line)}, ensure_ascii=False) + "\n")
                else:
                    numbers.extend([*values, copies])
                    draft.write(line)
                if not numbers and not contaminated and rows_in >= 1000:
                    break
        if contaminated:
            dropped["known to a benchmark"] = contaminated
        if not numbers:
            reason, count = dropped.most_common(1)[0] if dropped else ("", 0)
            raise BadRow(f"{cfg.source} holds no row" if not rows_in else f"{cfg.source}: not one of the first {rows_in} rows is a usable "
                         f"row of {name}; {count} times: {examples.get(reason, reason)}")
        table = torch.frombuffer(numbers, dtype=torch.int64).view(-1, len(FIELDS))  # shares the memory of `numbers`
        fate, copies = judge(table, cfg.hold_out), table[:, -1]
        with (open(out / "draft", "rb") as draft, open(out / "comparisons.jsonl", "wb") as kept,
              open(out / "held_out.jsonl", "wb") as held_out):
            for line, f, n in zip(draft, fate.tolist(), copies.tolist(), strict=True):
                if f < 2:
                    (kept, held_out)[f].write(line * n)
        for file, asked in (("draft", False), ("held_out.jsonl", cfg.hold_out), ("contaminated.jsonl", cfg.decontaminate)):
            if not asked:
                (out / file).unlink()
        dropped += Counter({"duplicate of an earlier row": int(copies[fate == 2].sum()),
                            "contradicted by another row": int(copies[fate == 3].sum())})
        kept = table[fate == 0]
        report = {"set": name, "source": cfg.source, "rows_in": rows_in, **summary(kept.repeat_interleave(kept[:, -1], dim=0)),
                  "held_out": int(copies[fate == 1].sum()),
                  "dropped": dict(dropped.most_common()), "first_dropped": examples,
                  "tokens_are": f"counted with {cfg.tokenizer}" if cfg.tokenizer else "estimated: 4 bytes of UTF-8 are one"}
        if not report["comparisons"]:
            raise BadRow(f"{cfg.source}: nothing is left of {rows_in} rows: {report['dropped']}, held out {report['held_out']}")
        (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def summary(table: torch.Tensor) -> dict:
    """The figures of a report from the numbers (rows, FIELDS) of the comparisons that were kept."""
    column = dict(zip(FIELDS, table.T))
    k, count = torch.unique(column["responses"], return_counts=True)

    def spread(tokens):
        tokens = tokens.sort().values
        return {name: int(tokens[round(q * (len(tokens) - 1))])
                for name, q in (("median", 0.5), ("p99", 0.99), ("most", 1.0)) if len(tokens)}

    longer, shorter = int(column["longer_wins"].sum()), int(column["shorter_wins"].sum())
    return {"comparisons": len(table), "pairs": int(column["pairs"].sum()),
            "with_images": round(int((column["images"] > 0).sum()) / max(len(table), 1), 4),
            "responses_per_comparison": dict(zip(map(str, k.tolist()), count.tolist())),
            "prompt_tokens": spread(column["prompt_tokens"]), "response_tokens": spread(column["response_tokens"]),
            "longer_response_wins": round(longer / max(longer + shorter, 1), 4)}  # of the pairs with two lengths


# ---------------------------------------------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class Config:
    source: str = HfArg(default="", help="the published set: a file, a folder, or a hub id")
    out: str = HfArg(default="", help="folder to write")
    n: int = HfArg(default=0, help="read the first n rows, 0 for all; synthetic: draw n, 0 for 1000; show: print n, 0 for 10")
    seed: int = HfArg(default=0, help="synthetic: which comparisons")
    workers: int = HfArg(default=0, help="processes; 0 takes all cores. The result is the same whatever their number")
    max_tokens: int = HfArg(default=8192, help="drop comparisons whose prompt and longest response have more tokens (images not counted)")
    tokenizer: str = HfArg(default="", help="count tokens with this tokenizer (folder or hub id); without one they are estimated")
    decontaminate: list[str] = HfArg(default_factory=list,
                                     help="benchmark folders (comparisons.jsonl and images): rows they know are removed")
    hold_out: int = HfArg(default=0, help="set at least so many comparisons apart in held_out.jsonl, whole prompts")


def show(path, n: int) -> None:
    rows = read_comparisons(path, needs_responses=False)
    print(f"{rows.file}: {len(rows)} comparisons, {sum(rows.pairs)} pairs")
    for i in range(min(n, len(rows))):
        c = rows[i]
        print(f"\n--- row {i + 1} {c.category} {c.id}\n{c.prompt if isinstance(c.prompt, str) else json.dumps(c.prompt)}")
        for image in c.images:
            print(f"  image   {image}")
        for j, response in enumerate(c.responses):
            beats = [loser for winner, loser in c.pairs if winner == j]
            print(f"  {j}{' beats ' + ', '.join(map(str, beats)) if beats else ''}: {response[:300]}")


def main(argv: list[str]) -> None:
    names = ("show", "synthetic", *SETS)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nNAME is one of {', '.join(names)}")
        HfArgumentParser(Config, prog="data.py NAME").parse_args(["--help"])
    name, rest = argv[0], argv[1:]
    if name not in names:
        raise BadRow(f"unknown data set {name!r}; want one of {', '.join(names)}")
    folder = rest.pop(0) if name == "show" and rest and not rest[0].startswith("-") else ""
    (cfg,) = HfArgumentParser(Config, prog=f"data.py {name}").parse_args_into_dataclasses(rest)
    if name == "show":
        return show(folder, cfg.n or 10)
    if missing := [flag for flag in ("source", "out") if not getattr(cfg, flag) and (flag, name) != ("source", "synthetic")]:
        raise BadRow(f"--{missing[0]} is missing; python data.py {name} --source PATH_OR_HUB_ID --out FOLDER")
    if name == "synthetic":
        print(f"wrote {write_comparisons(cfg.out, synthetic(cfg.n or 1000, cfg.seed))}")
        return
    for key, value in convert(name, cfg).items():
        for part, count in (value.items() if isinstance(value, dict) else [("", value)]):
            print(f"{key.replace('_', ' ')}{part and ', ' + part}: {count}")
    print(f"wrote {cfg.out}; look at it with: python data.py show {cfg.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped; nothing was written")
