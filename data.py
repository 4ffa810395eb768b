"""Where comparisons come from, and which of them this process sees at this step (BaseReward, arXiv 2509.16127, section 4.4).

    python data.py synthetic --out FOLDER --n 1000                 the embedded default as a folder, to copy the format from
    python data.py rlaif-v --source PATH_OR_HUB_ID --out FOLDER    a published set, curated: see sets.py
    python data.py show FOLDER                                     a few rows, decoded

    1  processes     who am I, how many are we
    2  rows          one JSON object a line -> a Comparison, or one clear line about what is wrong with it
    3  folders       millions of rows behind an index of offsets
    4  order         which rows a step sees: a pure function of (seed, step)
    5  synthetic     the embedded default, drawn with Pillow

A data set is a folder with `comparisons.jsonl` and its images. Three rows that are read as they are, the last two in TRL's layout:

    {"prompt": "<image>\\nWhat is shown?", "images": ["images/7.png"], "responses": ["A bus.", "Two buses."], "pairs": [[0, 1]]}
    {"prompt": "Name a fruit.", "chosen": "Apple", "rejected": "Table"}
    {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}], "images": ["images/7.png"],
     "chosen": [{"role": "assistant", "content": "A bus."}], "rejected": [{"role": "assistant", "content": "Two buses."}]}

`pairs` holds (winner, loser) indices into `responses`. Optional keys: id, source, category, answer (a checkable answer, for RL) and
critiques (one text per response). Paths are relative to the file and may not climb out of its folder; an entry of `images` that is a
folder of frames is a video. A prompt without an <image> mark has its images in front.
"""
import array
import contextlib
import copy
import functools
import graphlib
import json
import os
import random
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import ImageDraw
from PIL.Image import new as new_image
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from model import Comparison, is_video, open_frames, open_image, to_messages

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
    """Joins the process group that torchrun announces in the environment: NCCL where there is a GPU for every process, else gloo."""
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, local_rank, world_size, device)


class StopSignal:
    """Remembers SIGTERM or Ctrl-C until the step is done; a second one ends at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, _frame):
        self.number = number
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
        return f"cannot write {file} ({' '.join(str(error).split())[:120]}); is the disk full? The one before is intact"
    return ""


# ---------------------------------------------------------------------------------------------------------------------------------
# 2  Rows


class BadRow(ValueError):
    """A row that cannot be used: one line with the file, the line number, what was found and what to do."""


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
    if not prompt:
        prompt = chosen[:-1]
        if rejected[:-1] != prompt:
            raise ValueError("chosen and rejected part before their last message, so there is no common prompt; give it as `prompt`")
    elif isinstance(prompt, list) and len(chosen) > 1 and chosen[:len(prompt)] != prompt:
        prompt = prompt + chosen[:-1] if chosen[:-1] == rejected[:-1] else prompt
    return prompt, [text_of(chosen[-1]), text_of(rejected[-1])]


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
        self.starts, self.lengths, self.lines, self.pairs = array.array("Q"), array.array("I"), array.array("I"), array.array("H")
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
            return parse_row(json.loads(line), self.folder, self.needs_responses)
        except json.JSONDecodeError as error:
            raise self.bad_row(i, f"malformed JSON ({error.msg} at character {error.pos}); mend or delete the line") from None
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
            setattr(part, name, array.array(values.typecode, (values[i] for i in rows)))
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
        while step >= (n := len(self.epoch(epoch)[2]) - 1):
            step, epoch = step - n, epoch + 1
        owner, row, starts = self.epoch(epoch)
        part = slice(starts[step], starts[step + 1])
        return list(zip(owner[part].tolist(), row[part].tolist()))

    def steps(self, epochs: float) -> int:
        """Number of steps in so many epochs, at least one."""
        whole = sum(len(self.epoch(e)[2]) - 1 for e in range(int(epochs)))
        part = epochs - int(epochs)
        return max(whole + (round(part * (len(self.epoch(int(epochs))[2]) - 1)) if part else 0), 1)


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
    image = new_image("RGB", (84, 84), tuple(rng.randint(35, 55) for _ in range(3)))
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


def synthetic_comparison(seed: int, i: int) -> Comparison:
    """The i-th comparison of a seed: a question on a drawn picture or on a text, and 2 to 4 responses graded from right to wrong.

    Whether right or wrong, every response is drawn from the same distribution, so nothing but the picture tells them apart: a model
    that does not look is at chance on the visual questions.
    """
    rng = random.Random(f"{seed} {i}")
    category = rng.choice((*VISUAL, "text"))
    colour, shape, place = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(PLACES))
    k = rng.randint(2, 4)

    def others(values, right):
        return rng.sample([v for v in values if v != right], k - 1)

    if category == "text":
        number = rng.randint(1000, 9999)
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


def synthetic(n: int, seed: int = 0) -> list[Comparison]:
    """n comparisons of coloured shapes: questions of colour, shape, count, position, two at once, and some without an image."""
    return [synthetic_comparison(seed, i) for i in range(n)]


def held_out(train, n: int = 800, seed: int = 1_000_000) -> list[Comparison]:
    """Comparisons of another seed than training's, less those whose text a training comparison without an image has too."""
    seen = {c.prompt for c in train if not c.images}
    return [c for c in synthetic(n, seed) if c.prompt not in seen]


@contextlib.contextmanager
def new_folder(folder):
    """Yields FOLDER.partial to write into, which becomes FOLDER if the block ends well: what is there under its name is complete."""
    folder = Path(folder)
    if folder.exists():
        raise BadRow(f"{folder} exists already; remove it or choose another --out")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    (partial / "images").mkdir(parents=True)
    try:
        yield partial
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_comparisons(folder, comparisons, bar: bool = True) -> Path:
    """Writes comparisons, their images in memory or in files, as a data folder. It appears under its name only when it is complete."""
    with new_folder(folder) as partial, open(partial / "comparisons.jsonl", "w") as file:
        for i, c in enumerate(tqdm(comparisons, disable=not bar, desc=Path(folder).name)):
            paths = [f"images/{i}-{j}" if is_video(image) else f"images/{i}-{j}.png" for j, image in enumerate(c.images)]
            for path, image in zip(paths, c.images):
                frames = {path: image} if not is_video(image) else {f"{path}/{f:02}.png": frame for f, frame in enumerate(open_frames(image))}
                for place, frame in frames.items():
                    (partial / place).parent.mkdir(exist_ok=True)
                    open_image(frame).save(partial / place)
            row = {"prompt": c.prompt, "images": paths, "responses": c.responses, "pairs": c.pairs, "id": c.id, "source": c.source,
                   "category": c.category, "answer": c.answer}
            file.write(json.dumps({key: value for key, value in row.items() if value}) + "\n")
    return Path(folder)


# ---------------------------------------------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class Config:
    out: str = HfArg(default="", help="folder to write")
    n: int = HfArg(default=0, help="synthetic: number of comparisons, else 1000; show: number of rows printed, else 10")
    seed: int = HfArg(default=0, help="synthetic: which comparisons")


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
    import sets  # stands on this file, so it is imported only here, where the published sets are commands of this one

    names = ("show", "synthetic", *sets.SETS)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nNAME is one of {', '.join(names)}")
        HfArgumentParser(Config, prog="data.py NAME").parse_args(["--help"])
    name, rest = argv[0], argv[1:]
    if name in sets.SETS:
        return sets.main(argv)
    if name not in names:
        raise BadRow(f"unknown data set {name!r}; want one of {', '.join(names)}")
    folder = rest.pop(0) if name == "show" and rest and not rest[0].startswith("-") else ""
    (cfg,) = HfArgumentParser(Config, prog=f"data.py {name}").parse_args_into_dataclasses(rest)
    if name == "show":
        show(folder, cfg.n or 10)
    elif not cfg.out:
        raise BadRow("--out FOLDER is missing: where to write the comparisons")
    else:
        print(f"wrote {write_comparisons(cfg.out, synthetic(cfg.n or 1000, cfg.seed))}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped; nothing was written")
