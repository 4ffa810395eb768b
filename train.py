"""Trains a reward model on preference pairs: BaseReward (arXiv 2509.16127), sections 3 and 4.

Read: to the ruled line, 166 minutes, after the first halves of model.py and data.py.

    torchrun train.py                                  a tiny model on drawn pictures: two CPU
                                                       cores, three minutes
    torchrun train.py --data FOLDER --out runs/mine    the same on your rows (format: data.py)
    torchrun --nproc_per_node 8 train.py --backbone Qwen/Qwen2.5-VL-7B-Instruct --shard \\
        --gradient_checkpointing --data FOLDER OTHER:2.0 --out runs/7b
                                                       a 7B on eight GPUs; each epoch shows
                                                       OTHER twice
    torchrun train.py --backbone Qwen/Qwen2.5-VL-3B-Instruct --lora 16 --gradient_checkpointing \\
        --data FOLDER                                  a 3B on one GPU of 24 GB
    torchrun train.py --resume                         continues a run that was stopped

It writes into --out: the reward model (RewardModel.from_pretrained loads it), metrics.jsonl with a
line per step, curve.png, summary.json with the held-out accuracy, and checkpoint-STEP/ while the
run is unfinished.

Several processes. torchrun starts this script once per GPU and gives each process a *rank*, 0 to
*world_size* - 1. Every rank holds the model and reads its own rows of a step. Before the optimizer
moves, the ranks average their gradients, so all of them take the same step. `python train.py` is a
world of one. A step is the same for any number of ranks: (seed, step) determine its pairs, and its
loss is the sum over all of them divided by their number.

Where the paper gives no value (optimizer, schedule, epochs, weight decay, maximum length,
resolution, whether the vision tower is trained) we take AdamW with betas (0.9, 0.99), 5% warm-up
then cosine decay to zero, one epoch, no weight decay, 16,384 tokens per comparison, 1,280 tokens
per image as in transformers, and train all weights. The learning rate (3e-6) and the batch size
(128 pairs) are the paper's.
"""
import argparse
import atexit
import contextlib
import json
import logging
import math
import os
import random
import re
import shlex
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Literal

import filelock
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.checkpoint import (CheckpointException, HuggingFaceStorageReader,
                                          HuggingFaceStorageWriter)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from data import BadRow, Order, as_bad_row, read_comparisons, shuffle_images, synthetic
from model import (CRITIQUE_PROMPT, Comparison, Encoded, Pack, RewardModel, RewardOutput, Score,
                   ScoringRequest, atomic_write, bin_pack, enable_gradient_checkpointing,
                   judge_prompt, pair_margins, pairwise_loss, printable, remove, tiny_backbone,
                   vision_modules)

# 1  Configuration -----------------------------------------------------------------------
# --backbone names of models that are made here, and their model types; the last two read no images
TINY = {"tiny": "qwen2_5_vl", "tiny-qwen2-vl": "qwen2_vl", "tiny-qwen3-vl": "qwen3_vl",
        "tiny-qwen3-5": "qwen3_5", "tiny-internvl": "internvl", "tiny-qwen2": "qwen2",
        "tiny-qwen3": "qwen3"}
LOG2 = math.log(2)  # the loss of a model that gives all responses the same reward
LORA_ALPHA = 32  # the scale of LoRA's updates: see LowRank


@dataclass(frozen=True)
class Config:
    backbone: str = HfArg(
        default="tiny", help="tiny, tiny-qwen3-vl, tiny-internvl (made here), a folder or a hub id")
    data: list[str] = HfArg(
        default_factory=list, help="data folders, with a weight if wanted: a b:2.0; none: drawn")
    eval_data: list[str] = HfArg(
        default_factory=list, help="folders; none: held_out.jsonl of --data, or rows of it")
    eval_size: int = HfArg(
        default=800, help="held-out rows: drawn, of held_out.jsonl, or at most 1/10 of --data")
    out: str = HfArg(default="runs/default", help="run folder; the reward model is saved in it")
    overwrite: bool = HfArg(default=False, help="delete the run that --out holds, start again")
    resume: bool = HfArg(default=False, help="continue from the last checkpoint in --out")
    seed: int = HfArg(default=0, help="of the head, the data's order, drawn pictures, tiny models")
    train_size: int = HfArg(default=14000, help="drawn comparisons, where --data is not given")
    batch_size: int | None = HfArg(default=None, help="pairs per step; 128 (paper), 32 for tiny")
    lr: float | None = HfArg(default=None, help="peak learning rate; 3e-6 (paper), 6e-4 for tiny")
    epochs: float = HfArg(default=1.0, help="passes over the data (paper: not given)")
    max_steps: int | None = HfArg(default=None, help="in place of --epochs; 0: save it untrained")
    warmup: float = HfArg(default=0.05, help="share of the steps in which the rate rises")
    weight_decay: float = HfArg(default=0.0, help="of AdamW (paper: not given)")
    clip: float = HfArg(default=1.0, help="maximum norm of the gradient (paper: not given)")
    paradigm: Literal["naive", "critic", "direct", "think"] = HfArg(
        default="naive", help="a head; a head after a critique; a judge; a judge that thinks")
    critique_coef: float = HfArg(default=1.0, help="weight of the LM loss (MM-RLHF: 1)")
    critique_tokens: int | None = HfArg(default=None, help="of a generated text; 512, 40 for tiny")
    head_layers: int = HfArg(default=2, help="linear layers of the head (Table 2: 2 is best)")
    head_activation: Literal["silu", "tanh", "relu", "none"] = HfArg(
        default="silu", help="between the head's layers (Table 2)")
    zero_coef: float = HfArg(default=0.0, help="lambda of Algorithm 1 (section 4.3: it hurts)")
    length_norm: bool = HfArg(default=False, help="of Algorithm 1 (section 4.3: it hurts)")
    freeze_vision: bool = HfArg(default=False, help="do not train the vision tower and merger")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, a third slower")
    lora: int = HfArg(default=0, help="rank of updates that are trained, not the weights; 0: all")
    shard: str = HfArg(
        default="none", help="weights and optimizer over all ranks (FSDP2), or over each node's",
        metadata={"nargs": "?", "const": "all", "choices": ["none", "all", "node"]})
    max_pixels: int | None = HfArg(
        default=None, help="of an image, 28 x 28 per token; 1003520, 12544 for tiny")
    pack_tokens: int | None = HfArg(
        default=None, help="of a pack; longer comparisons are dropped; 16384, 1024 for tiny")
    on_bad_row: Literal["stop", "skip"] = HfArg(
        default="stop", help="stop at a row that cannot be used, or skip and count it")
    eval_every: int = HfArg(default=200, help="steps between evaluations of 100 rows; 0: only last")
    save_every: int = HfArg(default=500, help="steps between checkpoints; 0: when it ends or stops")

    def resolved(self) -> "Config":
        """With the defaults that depend on the backbone. ValueError names a flag out of range."""
        if self.backbone in TINY:
            defaults = dict(lr=6e-4, batch_size=32, max_pixels=112 * 112, pack_tokens=1024,
                            critique_tokens=40)
        else:
            defaults = dict(lr=3e-6, batch_size=128, max_pixels=1280 * 28 * 28, pack_tokens=16384,
                            critique_tokens=512)
        if self.lora:
            defaults["lr"] *= 10  # see LowRank
        for name in defaults:
            if getattr(self, name) is not None:
                defaults[name] = getattr(self, name)
        cfg = replace(self, **defaults)

        check_numbers(
            cfg, above_zero=("lr", "batch_size", "max_pixels", "pack_tokens", "critique_tokens",
                             "epochs", "clip", "train_size", "head_layers"),
            not_negative=("warmup", "weight_decay", "critique_coef", "max_steps", "eval_size",
                          "eval_every", "save_every", "lora"))
        if cfg.length_norm and cfg.paradigm != "naive":
            raise ValueError(f"--length_norm is for --paradigm naive, not for {cfg.paradigm}")
        if cfg.warmup > 1 or cfg.epochs > 1000 or cfg.train_size > 1e6:
            raise ValueError(f"--warmup {cfg.warmup:g} is a share, at most 1; --epochs "
                             f"{cfg.epochs:g}: at most 1000; --train_size {cfg.train_size}: at "
                             f"most a million, which are held in memory")
        return cfg


RESUMABLE_CHANGES = (  # flags that a resumed run may change
    "out", "overwrite", "resume", "eval_data", "eval_every", "save_every", "gradient_checkpointing",
    "shard", "on_bad_row")


def check_numbers(cfg, above_zero=(), not_negative=()) -> None:
    """ValueError names the flag of a number that is beyond 1e12, nan, or of the wrong sign.

    None passes."""
    for name, value in vars(cfg).items():
        if not isinstance(value, (int, float)):
            continue
        if not abs(value) <= 1e12:  # true of nan
            raise ValueError(f"--{name} {str(value)[:20]}: want a number of at most 1e12")
        if name in above_zero and value <= 0:
            raise ValueError(f"--{name} {value} must be above zero")
        if name in not_negative and value < 0:
            raise ValueError(f"--{name} {value} must be at least zero")


# 2  Processes ---------------------------------------------------------------------------
def start_processes() -> torch.device:
    """Joins the process group that torchrun describes in the environment, or makes a group of one.

    On GPUs if this machine has one for each of its processes. Objects are exchanged over gloo,
    gradients over NCCL."""
    num_gpus = torch.cuda.device_count()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    backend = "gloo"
    if num_gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        device = torch.device("cuda", local_rank)
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank)

    if not dist.is_initialized():
        world_of_one = {}
        if "WORLD_SIZE" not in os.environ:
            world_of_one = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        timeout = timedelta(hours=2)  # all ranks wait for a checkpoint, 93 GB for a 7B
        dist.init_process_group(backend, timeout=timeout, **world_of_one)
        print_rank0(f"world size {dist.get_world_size()}, device {device.type} "
                    f"({num_gpus} GPUs visible)")
    return device


def end_processes() -> None:
    if dist.is_initialized():
        wait_for_all_ranks()  # a rank that leaves early breaks the last message of another
        dist.destroy_process_group()


def print_rank0(text: str, file=None) -> None:
    """Prints on rank 0, above a progress bar if there is one. file: None is standard output."""
    if dist.get_rank() == 0:
        tqdm.write(text, file=file)


def print_error(script: str, message: str) -> None:
    """Prints one line on standard error, with the rank if it is not 0."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    name = f"{script}, rank {rank}" if rank else script
    message = " ".join(message.split())
    tqdm.write(f"{name}: {message}", file=sys.stderr)


def all_gather_objects(item) -> list:
    """The objects of all ranks, in their order, on every rank.

    Trap: a single process must send no message. The first long one starts threads of gloo's own,
    and all arithmetic after it took 1.9 times as long on two cores."""
    if dist.get_world_size() == 1:
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def all_gather(values: list[float]) -> torch.Tensor:
    """The numbers of all ranks, on every rank: (world_size, len(values)) float64 on the CPU."""
    return torch.tensor(all_gather_objects(values), dtype=torch.float64)


def max_over_ranks(value: int) -> int:
    return max(all_gather_objects(value))


def broadcast_from_rank0(item):
    """The object of rank 0, on every rank."""
    return all_gather_objects(item)[0]


def wait_for_all_ranks() -> None:
    all_gather_objects(None)


@dataclass
class StopSignal:
    number: int = 0  # of the signal that arrived; 0: none

    @property
    def exit_status(self) -> int:
        return 128 + self.number if self.number else 0  # as in shells


@contextlib.contextmanager
def stop_signals():
    """Yields a StopSignal, in which SIGTERM, SIGHUP (a lost terminal) and Ctrl-C are recorded.

    Inside the block they do not end the process, so that a step can be finished and saved. A second
    Ctrl-C does, at once; a second SIGTERM does not, since launchers send it twice."""
    stop_signal = StopSignal()
    earlier_handlers = {}

    def record(number, _frame):
        stop_signal.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup SIGHUP stays ignored
            earlier_handlers[number] = signal.signal(number, record)
    try:
        yield stop_signal
    finally:
        for number, handler in earlier_handlers.items():
            signal.signal(number, handler)


def prefetch(function, items, on_gpu: bool):
    """Yields function(item) for every item. On a GPU, a thread computes the next result meanwhile.

    On a CPU it does not: the thread would take the cores from the arithmetic."""
    if not on_gpu:
        for item in items:
            yield function(item)
        return

    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        pending = None
        for item in items:
            ready = pending
            pending = thread.submit(function, item)
            if ready is not None:
                yield ready.result()
        if pending is not None:
            yield pending.result()


def map_rows(function, rows, on_gpu: bool):
    """Yields function(row) for every row, in order. On a GPU, several threads compute the results.

    Threads, and not processes as in a DataLoader. Decoding, resizing and cutting run outside of
    Python's lock, nothing is pickled, and no process is forked beside CUDA or can die unnoticed: an
    error in a thread is raised here. Measured on two shared cores (tests/benchmark_data.py), two
    threads read 1.4 times as many images a second as one, two processes 1.2 times."""
    if not on_gpu:
        for row in rows:
            yield function(row)
        return

    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this rank
    num_threads = min(max(cores, 1), 8)  # 8 read some 200 images of a megapixel a second
    with ThreadPoolExecutor(num_threads, "reader", torch.set_num_threads, (1,)) as threads:
        yield from threads.map(function, rows)


# 3  The run folder ----------------------------------------------------------------------
LOCK = ".run.lock"  # in a run folder during a run, and after one that was killed
# what a folder may hold that is used without --overwrite: of a run that ended before a checkpoint
REPLACEABLE = {"metrics.jsonl": {"metrics.jsonl", "tiny_backbone"},  # train.py
               "start.json": {"policy"}}  # rl_demo.py


def prepare_run_folder(out: Path, overwrite: bool, resume: bool, made_by="metrics.jsonl") -> None:
    """Makes the folder of a run, and locks it while this process lives.

    A run does not overwrite another one by accident, deletes only what a run made, and shares its
    folder with no other process. made_by: a file that only runs of this script make. ValueError if
    the folder cannot be used, or if not all ranks see the same disk there."""
    if dist.get_rank() == 0:
        if overwrite and resume:
            raise ValueError("--overwrite and --resume contradict each other")
        try:
            out.mkdir(parents=True, exist_ok=True)
            check_contents(out, overwrite or resume, made_by)
            lock_folder(out)
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written ({error.strerror}); choose another "
                             f"folder") from None
        if overwrite:
            for file in out.iterdir():
                if file.name != LOCK:  # it stays: a deletion that is killed can be repeated
                    remove(file)
    check_shared_disk(out)


def check_contents(out: Path, may_hold_run: bool, made_by: str) -> None:
    names = {file.name for file in out.iterdir() if not file.match(".*.partial")}  # killed writes
    is_run = LOCK in names or made_by in names or len(checkpoints(out)) > 0
    if names <= REPLACEABLE[made_by] | {LOCK} or (is_run and may_hold_run):
        return
    if is_run:
        raise ValueError(f"{out} is not empty; choose another --out, or --resume an unfinished "
                         f"run, or --overwrite it")
    raise ValueError(f"{out} is not empty; choose another --out: no run made what it holds")


def lock_folder(out: Path) -> None:
    file = (out / LOCK).resolve()
    lock = filelock.FileLock(file, is_singleton=True)  # this process may lock it again
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(f"another process is writing into {out}; wait for it or choose another "
                         f"--out") from None

    def remove_lock() -> None:
        if lock.is_locked:  # a reference to it, so that it is held until then
            remove(file)

    atexit.register(remove_lock)


def check_shared_disk(out: Path) -> None:
    """ValueError if a rank does not see a file that rank 0 makes in the folder."""
    name = f".{os.urandom(8).hex()}.partial"
    if dist.get_rank() == 0:
        (out / name).touch()
    file = out / broadcast_from_rank0(name)
    is_seen = all_gather_objects(file.exists())
    if dist.get_rank() == 0:
        remove(file)
    if not all(is_seen):
        raise ValueError(f"{out} is not on a disk that all ranks share: rank "
                         f"{is_seen.index(False)} does not see what rank 0 writes; choose "
                         f"another --out")


# 4  Data and model ----------------------------------------------------------------------
@dataclass
class Data:
    """What is trained on. A set is a data.Comparisons, or a list of drawn Comparison."""
    sets: list
    weights: list[float]  # how often an epoch shows each set
    held_out: list  # sets to evaluate on

    def pair_counts(self) -> list:
        """For each set, the number of pairs of each of its rows."""
        counts = []
        for rows in self.sets:
            if isinstance(rows, list):
                counts.append([len(comparison.pairs) for comparison in rows])
            else:
                counts.append(rows.pair_counts)
        return counts


def open_data(cfg: Config) -> Data:
    """The folders of --data and --eval_data; without --data drawn pictures."""
    held_out = [read_comparisons(folder) for folder in cfg.eval_data]
    if cfg.data:
        return open_folders(cfg.data, held_out, cfg.eval_size)
    if not held_out:
        held_out = [synthetic(cfg.eval_size, held_out=True)]
    return Data([synthetic(cfg.train_size, cfg.seed)], [1.0], held_out)


def open_folders(folders: list[str], held_out: list, eval_size: int) -> Data:
    """Each folder is "FOLDER" or "FOLDER:WEIGHT".

    If held_out is empty, each gives its part of eval_size rows: of its held_out.jsonl (whole
    prompts, from data.py --hold_out), or else single rows, which are then not trained on."""
    data = Data([], [], held_out)
    for folder in folders:
        path, weight = split_weight(folder)
        data.sets.append(read_comparisons(path))
        data.weights.append(weight)
    if held_out:
        return data

    num_rows = sum(len(rows) for rows in data.sets)
    for set_index, rows in enumerate(data.sets):
        num_held_out = math.ceil(eval_size * len(rows) / num_rows)
        if (rows.folder / "held_out.jsonl").is_file():
            prompts = read_comparisons(rows.folder / "held_out.jsonl")
            data.held_out.append(prompts.select(evenly_spaced(num_held_out, len(prompts))))
        else:
            chosen = evenly_spaced(min(num_held_out, len(rows) // 10), len(rows))
            data.held_out.append(rows.select(chosen))
            data.sets[set_index] = rows.select(sorted(set(range(len(rows))) - set(chosen)))
    return data


def split_weight(text: str) -> tuple[str, float]:
    """The folder and the weight of --data FOLDER:WEIGHT.

    >>> split_weight("data/mmpr:0.67")
    ('data/mmpr', 0.67)
    """
    folder, colon, weight = text.rpartition(":")
    is_weight = re.fullmatch(r"-?\d{1,3}(\.\d+)?", weight)
    if not colon or not is_weight or os.path.exists(text):  # or a folder with such a name
        return text, 1.0
    if float(weight) <= 0:
        raise ValueError(f"--data {text}: the weight must be above zero")
    return folder, float(weight)


def evenly_spaced(n: int, total: int) -> list[int]:
    """At most n of the indices below total, at even distances.

    >>> evenly_spaced(3, 10)
    [0, 3, 6]"""
    n = min(n, total)
    return [i * total // n for i in range(n)]


def make_model(cfg: Config, sets: list, device: torch.device) -> RewardModel:
    """A reward model on a pretrained backbone, or on a tiny one. It is on the CPU: see wrap_model.

    With --shard only rank 0 loads the weights."""
    path = cfg.backbone
    if cfg.max_steps != 0:
        check_critiques(sets, cfg.paradigm)
    if path in TINY:
        path = Path(cfg.out) / "tiny_backbone"
        if dist.get_rank() == 0:
            texts = vocabulary_texts(sets, cfg.paradigm)
            tiny_backbone(path, texts, cfg.seed, TINY[cfg.backbone],
                          vocabulary_head=cfg.paradigm != "naive")
        wait_for_all_ranks()

    torch.manual_seed(cfg.seed)  # all ranks make the same head
    is_bf16 = cfg.lora > 0 and device.type == "cuda"  # frozen weights do not need fp32
    is_empty = cfg.shard != "none" and dist.get_rank() > 0
    with torch.device("meta" if is_empty else "cpu"):
        model = RewardModel.from_backbone(
            path, cfg.head_layers, cfg.head_activation, cfg.max_pixels,
            torch.bfloat16 if is_bf16 else torch.float32, cfg.paradigm, cfg.critique_tokens)
        if cfg.lora:
            add_lora(model, cfg.lora)  # --lora: appendix

    if cfg.freeze_vision:
        for module in vision_modules(model.backbone):
            module.requires_grad_(False)
    if cfg.gradient_checkpointing:
        enable_gradient_checkpointing(model.backbone)
    if cfg.shard != "none" and cfg.paradigm != "naive":
        # FSDP needs equally many forwards on all ranks, and generation has one for each token
        model.critiques_from = "given"
    return model


def vocabulary_texts(sets: list, paradigm: str = "naive") -> list[str]:
    """The texts from which the vocabulary of a tiny backbone is made."""
    texts = []
    for rows in sets:
        for comparison in first_rows(rows):
            responses = " ".join(comparison.responses)
            texts.append(f"{comparison.prompt} {responses}")
            if paradigm != "naive":  # pretrained tokenizers have these words too
                winner, loser = comparison.pairs[0]
                judged = judge_prompt(comparison, winner, loser, think=True)
                texts.append(f"{judged.prompt} {judged.responses[0]} {CRITIQUE_PROMPT}")
    return texts


def first_rows(rows):
    """The first 2,000 rows without those that cannot be read: training will report them."""
    for i in range(min(2000, len(rows))):
        with contextlib.suppress(BadRow):
            yield rows[i]


def check_critiques(sets: list, paradigm: str) -> None:
    """ValueError if a model is to learn to write critiques and the data have none."""
    if paradigm not in ("critic", "think"):
        return
    for rows in sets:
        for comparison in first_rows(rows):
            if "".join(comparison.critiques).strip():
                return
    raise ValueError(f"--paradigm {paradigm} learns to write critiques, and the first rows of "
                     f"--data have none")


def wrap_model(model: RewardModel, device: torch.device, shard="none", product_dtype=None):
    """The model on its device, wrapped so that backward passes average the ranks' gradients.

    product_dtype: see shard_model; None: that of autocast."""
    if product_dtype is None and device.type == "cuda":
        product_dtype = torch.bfloat16
    if shard != "none":
        return shard_model(model, device, shard, product_dtype)  # --shard: appendix
    # DDP warns of InternVL's class token (1, 1, D), where the stride of a dimension of 1 differs
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)


# 5  Load a batch ------------------------------------------------------------------------
@dataclass
class Batch:
    """What a rank reads for a step."""
    step: int
    packs: list[Pack] = field(default_factory=list)
    pairs: int = 0
    lm_texts: int = 0  # critiques or thoughts to learn
    tokens: int = 0
    bad_rows: int = 0
    too_long: int = 0
    exit_status: int = 0  # 1: a row cannot be used, the run has to end


def load_batch(step: int, order: Order, sets: list, model: RewardModel, cfg: Config) -> Batch:
    """Reads, encodes and packs this rank's rows of a step.

    All ranks compute the same assignment of rows to ranks, so they need not communicate."""
    def read(row_id: tuple[int, int]) -> list[Encoded] | BadRow:
        set_index, row_index = row_id
        rng = random.Random(f"{cfg.seed} {set_index} {row_index}")  # a judge's order of responses
        try:
            return model.encode_for_training(sets[set_index][row_index], rng)
        except ValueError as error:
            return as_bad_row(error, sets[set_index], row_index)

    batch = Batch(step)
    encoded: list[Encoded] = []
    rows_of_rank = assign_rows_to_ranks(order.rows_of_step(step), sets)[dist.get_rank()]
    for encoded_row in map_rows(read, rows_of_rank, model.device.type == "cuda"):
        if isinstance(encoded_row, BadRow):
            batch.bad_rows += 1
            if cfg.on_bad_row == "stop" and batch.exit_status == 0:
                print_error("train.py", str(encoded_row))
                batch.exit_status = 1
            continue

        # Dropped, not truncated: what is cut off may be the reason for the preference
        if max(item.num_tokens for item in encoded_row) > cfg.pack_tokens:
            batch.too_long += 1
            continue
        encoded += encoded_row

    token_counts = [item.num_tokens for item in encoded]
    batch.tokens = sum(token_counts)
    for members in bin_pack(token_counts, cfg.pack_tokens):
        pack = model.make_pack([encoded[i] for i in members])
        batch.packs.append(pack)
        batch.pairs += len(pack.pairs)
        batch.lm_texts += pack.num_lm_targets
    return batch


def assign_rows_to_ranks(row_ids: list[tuple[int, int]], sets: list) -> list[list]:
    """The rows (set, row) of each rank: the longest first, each to the rank with the fewest bytes.

    All ranks wait for the slowest. Length is that of a row's line in its file, which is known
    before it is read (an image counts as its name). Drawn rows have none: rank r of w gets every
    w-th."""
    sized_rows = []
    for set_index, row_index in row_ids:
        rows = sets[set_index]
        size = 1 if isinstance(rows, list) else int(rows.line_sizes[row_index])
        sized_rows.append((size, (set_index, row_index)))
    sized_rows.sort(key=lambda sized_row: -sized_row[0])  # rows of equal size keep their order

    rows_of_rank = [[] for _ in range(dist.get_world_size())]
    bytes_of_rank = [0] * dist.get_world_size()
    for size, row_id in sized_rows:
        rank = bytes_of_rank.index(min(bytes_of_rank))
        rows_of_rank[rank].append(row_id)
        bytes_of_rank[rank] += size
    return rows_of_rank


# 6  A step ------------------------------------------------------------------------------
@dataclass
class StepPlan:
    """What a step needs, on one rank or, once the ranks have agreed, on all of them."""
    exit_status: int  # not 0: stop before this step
    micro_steps: int  # the largest number of packs on a rank
    counts: dict[str, int]  # summed over ranks: columns of metrics.jsonl


def agree_on_step(batch: Batch, stop_signal: StopSignal) -> StepPlan:
    counts = {"pairs": batch.pairs, "lm_texts": batch.lm_texts, "tokens": batch.tokens,
              "bad_rows": batch.bad_rows, "too_long": batch.too_long}
    exit_status = batch.exit_status or stop_signal.exit_status
    rank_plans = all_gather_objects(StepPlan(exit_status, len(batch.packs), counts))

    plan = StepPlan(0, 0, dict.fromkeys(counts, 0))
    for rank_plan in rank_plans:
        plan.exit_status = max(plan.exit_status, rank_plan.exit_status)
        plan.micro_steps = max(plan.micro_steps, rank_plan.micro_steps)
        for name in counts:
            plan.counts[name] += rank_plan.counts[name]
    num_packs = sum(rank_plan.micro_steps for rank_plan in rank_plans)
    plan.counts["dummy_packs"] = plan.micro_steps * len(rank_plans) - num_packs
    return plan


def make_dummy_pack(model: RewardModel) -> Pack:
    """What a rank computes, with weight 0, while others have packs left: see train_step."""
    comparison = Comparison("?", ["a", "b"], [(0, 1)])
    return model.make_pack(model.encode_for_training(comparison, random.Random(0)))


def train_step(model, optimizer, batch: Batch, plan: StepPlan, dummy_pack: Pack, cfg: Config):
    """One step of the optimizer. Returns its columns of metrics.jsonl, means over all ranks.

    A micro-step is the forward and backward pass of one pack; gradients add up. A pack's loss is
    divided by the pairs of the whole step, of all ranks and micro-steps, so that every pair has the
    same weight. Trap: a mean of means gives pairs in small packs more. The ranks' gradients are
    averaged, hence `world_size`, and that needs all ranks: all make equally many micro-steps, those
    with fewer packs on dummy_pack with weight 0. The gradient's norm is the same on all ranks: if
    it is not finite, all skip the step."""
    trained = optimizer.param_groups[0]["params"]  # FSDP replaces those of model.parameters()
    device = trained[0].device
    num_pairs = max(plan.counts["pairs"], 1)
    num_lm_texts = max(plan.counts["lm_texts"], 1)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # see sums_of_pack

    for micro_step in range(plan.micro_steps):
        is_real = micro_step < len(batch.packs)
        pack = batch.packs[micro_step] if is_real else dummy_pack
        pack = pack.to(device)
        with exchange_gradients(model, is_last=micro_step == plan.micro_steps - 1):
            output = model(pack)
            losses = pairwise_loss(output.rewards, pack.pairs, cfg.zero_coef, cfg.length_norm,
                                   pack.response_length, reduction="none")  # (B,)
            loss = losses.sum() / num_pairs
            if output.lm_loss is not None:
                loss = loss + cfg.critique_coef * output.lm_loss / num_lm_texts
            weight = dist.get_world_size() if is_real else 0
            (loss * weight).backward()
        if is_real:
            sums += sums_of_pack(losses, output, pack)

    grad_norm = torch.nn.utils.clip_grad_norm_(trained, cfg.clip)
    if isinstance(grad_norm, DTensor):  # sharded: each rank has a part of it
        grad_norm = grad_norm.full_tensor()
    grad_norm = float(grad_norm)
    if math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    loss, correct, margin, lm_loss = all_gather(sums.tolist()).sum(dim=0).tolist()
    has_pairs = plan.counts["pairs"] > 0
    has_lm_texts = plan.counts["lm_texts"] > 0
    return {
        "loss": loss / num_pairs if has_pairs else None,
        "accuracy": correct / num_pairs if has_pairs else None,
        "margin": margin / num_pairs if has_pairs else None,
        "grad_norm": grad_norm,
        "lr": optimizer.param_groups[0]["lr"],
        "lm_loss": lm_loss / num_lm_texts if has_lm_texts else None}


def exchange_gradients(model, is_last: bool):
    """A context for a micro-step: DDP exchanges gradients in the last of a step, FSDP in all."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return contextlib.nullcontext()


@torch.no_grad()
def sums_of_pack(losses: torch.Tensor, output: RewardOutput, pack: Pack) -> torch.Tensor:
    """(4,) float64: the pack's sums of losses, of correct pairs and of margins, and its LM loss."""
    chosen, rejected = output.rewards.double()[pack.pairs].T  # (B,) each
    margins = chosen - rejected
    lm_loss = margins.new_zeros(()) if output.lm_loss is None else output.lm_loss
    return torch.stack([losses.double().sum(), (margins > 0).sum(), margins.sum(), lm_loss])


def learning_rate(step: int, steps: int, cfg: Config) -> float:
    """Linear warm-up, then half a cosine, which reaches 0 one step after the last.

    >>> [round(learning_rate(s, 10, Config(lr=1.0, warmup=0.2)), 2) for s in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]"""
    warmup_steps = math.ceil(cfg.warmup * steps)
    if step < warmup_steps:
        return cfg.lr * (step + 1) / warmup_steps
    decay_steps = max(steps - warmup_steps, 1)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps))


# 7  Evaluation on held-out rows ---------------------------------------------------------
@torch.no_grad()
def score_rows(model, rows, pack_tokens=None, on_bad_row="stop", progress="") -> list:
    """The Score of each row, in order and on every rank.

    A row that cannot be used raises its BadRow, or with on_bad_row="skip" has it in place of a
    Score. progress: label of a progress bar, "" for none. Each rank takes 64 rows a round, so that
    memory does not grow with their number."""
    rank = dist.get_rank()
    rows_per_round = 64 * dist.get_world_size()
    on_gpu = model.device.type == "cuda"

    def read_row(i: int) -> ScoringRequest | BadRow:
        try:
            return model.encode_for_scoring(rows[i])
        except ValueError as error:
            return as_bad_row(error, rows, i)

    def read_round(round_start: int) -> dict:
        start = round_start + 64 * rank
        indices = range(start, min(start + 64, len(rows)))
        return dict(zip(indices, map_rows(read_row, indices, on_gpu)))

    scores = {}
    rounds = tqdm(range(0, len(rows), rows_per_round), progress, unit_scale=rows_per_round,
                  disable=not progress or rank > 0, leave=False, ncols=80)
    for requests in prefetch(read_round, rounds, on_gpu):
        good_requests = {}
        for i, request in requests.items():
            if isinstance(request, BadRow) and on_bad_row == "stop":
                raise request
            if isinstance(request, BadRow):
                scores[i] = request
            else:
                good_requests[i] = request
        new_scores = model.score_encoded(list(good_requests.values()), pack_tokens, max_over_ranks)
        scores |= dict(zip(good_requests, new_scores))

    for scores_of_rank in all_gather_objects(scores):
        scores |= scores_of_rank
    return [scores[i] for i in range(len(rows))]


def accuracy(comparisons, scores) -> float:
    """Share of margins above 0: a tie is wrong. nan if there is none.

    A comparison that has no Score does not count.
    >>> accuracy([Comparison("?", ["a", "b", "c"], [(0, 1), (1, 2)])], [Score([2.0, 1.0, 1.0])])
    0.5"""
    correct = []
    for comparison, score in zip(comparisons, scores):
        if isinstance(score, Score):
            for margins in pair_margins(comparison.pairs, score):  # one, or a judge's two
                correct += [margin > 0 for margin in margins]
    return fmean(correct) if correct else math.nan


def accuracy_by_category(comparisons, scores) -> dict[str, tuple[float, int]]:
    """{category: (accuracy, number of pairs)}, sorted; "all" where a comparison names none."""
    members = {}  # {category: [(comparison, score), ...]}
    for comparison, score in zip(comparisons, scores):
        if isinstance(score, Score):
            members.setdefault(comparison.category or "all", []).append((comparison, score))

    figures = {}
    for category in sorted(members):
        category_comparisons, category_scores = zip(*members[category])
        num_pairs = sum(len(comparison.pairs) for comparison in category_comparisons)
        figures[category] = (accuracy(category_comparisons, category_scores), num_pairs)
    return figures


def read_eval_set(held_out: list, model: RewardModel, on_gpu: bool,
                  cfg: Config) -> list[Comparison]:
    """The held-out rows of all sets.

    Each is read and encoded once, by one of the ranks: one that cannot be used is reported now and
    not after days of training."""
    if cfg.shard != "none" and cfg.paradigm == "think":
        return []  # it is scored by what it generates, which it cannot: see make_model
    locations = []
    for rows in held_out:
        for i in range(len(rows)):
            locations.append((rows, i))

    def check(index: int) -> BadRow | None:
        rows, i = locations[index]
        try:
            model.encode_for_scoring(rows[i])
        except ValueError as error:
            return as_bad_row(error, rows, i)
        return None

    bad_indices = set()
    indices = range(dist.get_rank(), len(locations), dist.get_world_size())
    for index, bad_row in zip(indices, map_rows(check, indices, on_gpu)):
        if bad_row is not None and cfg.on_bad_row == "stop":
            raise bad_row
        if bad_row is not None:
            bad_indices.add(index)

    for bad_indices_of_rank in all_gather_objects(bad_indices):
        bad_indices |= bad_indices_of_rank
    eval_set = []
    for index, (rows, i) in enumerate(locations):
        if index not in bad_indices:
            eval_set.append(rows[i])
    return eval_set


def evaluate_subset(model: RewardModel, eval_set: list[Comparison], cfg: Config) -> float:
    """Accuracy on at most a hundred held-out comparisons, during training.

    An image that is no longer there does not end the run."""
    subset = [eval_set[i] for i in evenly_spaced(100, len(eval_set))]
    scores = score_rows(model.eval(), subset, cfg.pack_tokens, on_bad_row="skip")
    model.train()
    return accuracy(subset, scores)


# 8  Checkpoints -------------------------------------------------------------------------
# torch warns where one process saves alone, and logs tracebacks of errors that we report
warnings.filterwarnings("ignore", "torch.distributed is disabled")
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)


def save_checkpoint(folder: Path, optimizer, state: dict) -> None:
    """Writes what is trained, and nothing else, into folder/checkpoint-STEP; keeps the last two.

    Each rank writes its part, as safetensors. Any number of ranks can read them. A kill at any
    moment leaves the earlier ones, or this one too. ValueError if a weight is not finite: a
    checkpoint that exists can be resumed."""
    path = folder / f"checkpoint-{state['step']}"
    if broadcast_from_rank0(path.exists()):  # resumed from, or written a moment ago
        return
    tensors = training_state(optimizer)
    if not all(all_gather_objects(is_finite(tensors))):
        raise ValueError(f"weights are not finite after step {state['step']} and not saved; "
                         f"start again with a lower --lr")

    is_rank0 = dist.get_rank() == 0
    is_alone = dist.get_world_size() == 1
    with atomic_write(path) if is_rank0 else contextlib.nullcontext() as temporary:
        temporary = broadcast_from_rank0(temporary)
        writer = HuggingFaceStorageWriter(temporary, save_distributed=True)
        try:
            dist.checkpoint.save(tensors, storage_writer=writer, no_dist=is_alone)
        except CheckpointException as error:
            raise OSError(str(error)[-80:])  # atomic_write says where
        if is_rank0:
            text = json.dumps(state | {"bytes": file_sizes(temporary)})
            (temporary / "state.json").write_text(text, encoding="utf-8")

    if is_rank0:
        interrupted = list(folder.glob(".checkpoint-*.partial"))
        for old in checkpoints(folder)[:-2] + interrupted:
            remove(old)
    wait_for_all_ranks()  # if one ended now, torchrun would end those that still write


def load_checkpoint(folder: Path, optimizer, settings: dict, resumable_changes) -> dict:
    """Loads the last checkpoint into the weights and the optimizer; returns its step and seconds.

    {} if there is none. ValueError if it cannot be read, or is of a run with other settings."""
    if broadcast_from_rank0((folder / "summary.json").exists()):
        if dist.get_rank() == 0:
            remove_checkpoints(folder)  # of a run that was killed at its very end
        raise ValueError(f"{folder} holds a finished run: nothing to resume. Choose another --out, "
                         f"or --overwrite")
    paths = broadcast_from_rank0(checkpoints(folder))
    if not paths:
        print_rank0(f"no checkpoint in {folder}: starting at the first step")
        return {}

    path = paths[-1]
    saved = read_state(path / "state.json", settings, resumable_changes)
    if saved.get("bytes") != file_sizes(path):
        raise ValueError(f"{path} is damaged; remove it, and --resume continues from the one "
                         f"before it")
    reader = HuggingFaceStorageReader(path)
    is_alone = dist.get_world_size() == 1
    try:
        dist.checkpoint.load(training_state(optimizer), storage_reader=reader, no_dist=is_alone)
    except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
        message = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit this model: {message[-150:]}") from None
    print_rank0(f"resuming from step {saved['step']}")
    return {"step": saved["step"], "seconds": saved["seconds"]}


def training_state(optimizer) -> dict[str, torch.Tensor]:
    """This rank's part of all that is trained, by name: weights, and AdamW's state of each.

    No copies: loading a checkpoint writes into them. State that is missing is created."""
    (group,) = optimizer.param_groups
    tensors = {}
    for name, parameter in zip(group["param_names"], group["params"]):
        if not optimizer.state.get(parameter):
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter)}
        tensors[name] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name} {key}"] = value
    return tensors


def is_finite(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether all numbers are finite, in this rank's part of the tensors."""
    for tensor in tensors.values():
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if not tensor.isfinite().all():
            return False
    return True


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    paths = {}
    for path in folder.glob("checkpoint-*/"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit():
            paths[int(step)] = path
    return [paths[step] for step in sorted(paths)]


def remove_checkpoints(folder: Path) -> None:
    for path in checkpoints(folder):
        remove(path)


def file_sizes(folder: Path) -> dict[str, int]:
    """{name: bytes} of a checkpoint's parts: torch would not notice that one is missing."""
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}


def read_state(file: Path, settings: dict, resumable_changes=()) -> dict:
    """What a run has written about itself: {"step", "seconds", "config", ...}.

    ValueError if the file cannot be read, or if a setting is another one and not resumable."""
    try:
        saved = json.loads(file.read_bytes())
        saved["step"] = int(saved["step"])
        saved["seconds"] = float(saved["seconds"])
        saved["config"] = dict(saved["config"])
    except Exception as error:  # damaged, or not ours
        remedy = "start again with --overwrite"
        if file.name == "state.json":
            remedy = f"remove {file.parent}"
        raise ValueError(f"{file} cannot be read ({str(error)[:100]}); {remedy}") from None

    changes = []
    for name, value in saved["config"].items():
        if name in settings and name not in resumable_changes and settings[name] != value:
            changes.append(f"{name} was {value!r}, is {settings[name]!r}")
    if changes:
        message = "; ".join(changes)[:200]
        raise ValueError(f"{file} is of another run: {message}. Give the same flags, or another "
                         f"--out")
    return saved


# 9  Log and report ----------------------------------------------------------------------
SHOWN = ("loss", "accuracy", "margin", "lr")  # the columns in the progress bar


def print_settings(cfg, lines: list[str]) -> None:
    """Prints what a run is: these lines, and the flags that differ from their defaults.

    Flags without a fixed default (None) belong in the lines."""
    words = []
    for name, default in vars(type(cfg)()).items():
        value = getattr(cfg, name)
        if default is not None and value != default:
            words.append(f"--{name}")
            words += value if isinstance(value, list) else [str(value)]
    flags = shlex.join(words) if words else "the defaults"
    print_rank0("\n".join(lines))
    print_rank0(f"flags     {flags}")


def print_start(cfg: Config, model: RewardModel, data: Data, eval_set: list, steps: int) -> None:
    num_parameters = 0
    num_trained = 0
    for parameter in model.parameters():
        num_parameters += parameter.numel()
        if parameter.requires_grad:
            num_trained += parameter.numel()
    num_rows = 0
    num_pairs = 0
    for counts in data.pair_counts():
        num_rows += len(counts)
        num_pairs += sum(counts)
    print_settings(cfg, [
        f"backbone  {cfg.backbone}: {num_parameters:,} parameters, {num_trained:,} trained",
        f"data      {num_rows:,} comparisons, {num_pairs:,} pairs; {len(eval_set):,} held out",
        f"training  {steps:,} steps of {cfg.batch_size} pairs, peak learning rate {cfg.lr:g}, "
        f"seed {cfg.seed}",
        f"limits    {cfg.pack_tokens:,} tokens per pack, {cfg.max_pixels:,} pixels per image",
    ])
    print_rank0(f"Where chosen and rejected get equal rewards, the loss is log 2 = {LOG2:.3f}.")


def write_text(file, text: str) -> None:
    with atomic_write(file) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))


@contextlib.contextmanager
def open_log(folder: Path, step: int, steps: int, shown):
    """Yields write(row): a line of metrics.jsonl, and the progress bar. Only rank 0 writes.

    Lines after `step`, whose steps will be repeated, and one that a kill cut short are removed.
    shown: the columns in the progress bar; four fit in 80 characters."""
    is_rank0 = dist.get_rank() == 0
    path = folder / "metrics.jsonl"
    if is_rank0:
        lines = []
        for row in read_log(path):
            if row["step"] <= step:
                lines.append(json.dumps(row) + "\n")
        write_text(path, "".join(lines))
        file = open(path, "a", encoding="utf-8", buffering=1)
    else:
        file = open(os.devnull, "w")
    bar = tqdm(total=steps, initial=step, disable=not is_rank0, ncols=80,
               bar_format="{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}")

    def write(row: dict) -> None:
        file.write(json.dumps(row) + "\n")
        numbers = []
        for name in shown:
            if row[name] is not None:
                numbers.append(f"{name} {row[name]:.3g}")
        bar.set_postfix_str(" ".join(numbers), refresh=False)
        bar.update()

    with file, bar:
        yield write


def read_log(file: Path) -> list[dict]:
    rows = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):
                rows.append(json.loads(line))
    return rows


def smoothed(log: list[dict], column: str) -> list[tuple[int, float]]:
    """A curve of some fifty points: (last step, mean) over equally many steps each.

    Steps that have no value are left out."""
    log = [row for row in log if row.get(column) is not None]
    width = max(len(log) // 50, 1)
    points = []
    for start in range(0, len(log), width):
        rows = log[start:start + width]
        points.append((rows[-1]["step"], fmean(row[column] for row in rows)))
    return points


def report(out: Path, model, eval_set: list[Comparison], start_time: float, cfg: Config) -> int:
    """Evaluates and saves the model, writes summary and curve, prints the result.

    Returns the exit status. The last checkpoint stays until all is done."""
    log = broadcast_from_rank0(read_log(out / "metrics.jsonl"))
    summary = summarize_training(log, cfg) | evaluate_held_out(model, eval_set, cfg) | {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "world_size": dist.get_world_size(),
        "seconds": round(time.time() - start_time, 1)}

    weights = full_state_dict(model.state_dict())
    if dist.get_rank() == 0:
        if cfg.lora:
            weights = merge_lora(weights)
        model.save_pretrained(out, weights)
        draw_training_curves(out / "curve.png", log, title=str(out))
        text = json.dumps(summary | {"config": asdict(cfg)}, indent=1)
        write_text(out / "summary.json", text + "\n")
        remove_checkpoints(out)

    print_summary(summary, out, cfg)
    is_plain_loss = not cfg.zero_coef and not cfg.length_norm  # comparable with log 2
    if len(log) < 50 or summary["final_loss"] is None or not is_plain_loss:
        return 0
    if summary["final_loss"] < 0.98 * LOG2:
        return 0
    print_rank0("train.py: the loss ended hardly below log 2: nothing was learnt. Look at the data "
                "(python data.py show DIR): are chosen and rejected swapped? Then at --lr",
                sys.stderr)
    return 1


def summarize_training(log: list[dict], cfg: Config) -> dict:
    """The part of summary.json on the training. ValueError if no pair could be used."""
    losses = []
    lm_losses = []
    pairs_seen = 0
    bad_gradients = 0
    too_long = f"longer than {cfg.pack_tokens} tokens"
    dropped = {"bad row": 0, too_long: 0}
    for row in log:
        if row["pairs"] and math.isfinite(row["loss"]):
            losses.append(row["loss"])
        if row["lm_texts"]:
            lm_losses.append(row["lm_loss"])
        pairs_seen += row["pairs"]
        dropped["bad row"] += row["bad_rows"]
        dropped[too_long] += row["too_long"]
        if not math.isfinite(row["grad_norm"]):
            bad_gradients += 1

    if log and not pairs_seen and not lm_losses:
        raise ValueError(f"not one pair could be used, all were dropped: {dropped}")
    return {
        "final_loss": fmean(losses[-50:]) if losses else None,
        "final_lm_loss": fmean(lm_losses[-50:]) if lm_losses else None,
        "steps": len(log),
        "pairs_seen": pairs_seen,
        "dropped": dropped,
        "bad_gradients": bad_gradients}


def evaluate_held_out(model: RewardModel, eval_set: list[Comparison], cfg: Config) -> dict:
    """The part of summary.json on the held-out comparisons, also with their images shuffled.

    ValueError if a reward is not finite."""
    rows = eval_set
    if not rows and cfg.paradigm != "think":
        rows = [Comparison("?", ["a", "b"])]  # its rewards, too, must be finite
    scores = score_rows(model.eval(), rows, cfg.pack_tokens, cfg.on_bad_row, "held out")
    for score in scores:
        if isinstance(score, Score) and not math.isfinite(sum(score.rewards)):
            raise ValueError("the rewards are not finite, so no model is saved; start again with "
                             "a lower --lr")

    shuffled = shuffle_images(eval_set, cfg.seed)
    shuffled_scores = score_rows(model, shuffled, cfg.pack_tokens, cfg.on_bad_row,
                                 "images shuffled")
    summary = {
        "accuracy_by_category": {},
        "n_by_category": {},
        "accuracy": None,
        "accuracy_images_shuffled": None,
        "n": 0,
        "n_comparisons": len(eval_set),
        "critiques": None if cfg.paradigm == "naive" else model.critiques_from}
    for category, (value, num_pairs) in accuracy_by_category(eval_set, scores).items():
        summary["accuracy_by_category"][category] = round(value, 4)
        summary["n_by_category"][category] = num_pairs
        summary["n"] += num_pairs
    if summary["n"]:
        summary["accuracy"] = round(accuracy(eval_set, scores), 4)
    if shuffled:
        summary["accuracy_images_shuffled"] = round(accuracy(shuffled, shuffled_scores), 4)
    return summary


def full_state_dict(tensors: dict) -> dict:
    """The whole tensors on rank 0's CPU; {} on the other ranks."""
    whole_tensors = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):  # sharded: all ranks send their parts
            tensor = tensor.full_tensor()
        if dist.get_rank() == 0:
            whole_tensors[name] = tensor.detach().cpu()
    return whole_tensors


def merge_lora(weights: dict) -> dict:
    """The weights of an ordinary model, W + alpha / r * B A in place of W, A and B.

    In fp32: small updates would be rounded away in bf16."""
    merged = {}
    for name, weight in weights.items():
        if not name.endswith((".lora_a", ".lora_b")):
            merged[name] = weight.float()
    for name, lora_a in weights.items():
        if name.endswith(".lora_a"):
            layer = name.removesuffix("lora_a")
            update = LORA_ALPHA / len(lora_a) * weights[f"{layer}lora_b"] @ lora_a
            merged[f"{layer}weight"] = merged[f"{layer}weight"] + update
    return merged


def draw_training_curves(file: Path, log: list[dict], title: str) -> None:
    losses = {"training pairs": smoothed(log, "loss")}
    lm_losses = smoothed(log, "lm_loss")
    if lm_losses:
        losses["critiques"] = lm_losses
    accuracies = {
        "training pairs": smoothed(log, "accuracy"),
        "held out": smoothed(log, "eval_accuracy")}
    margins = {"training pairs": smoothed(log, "margin")}
    draw_curves(file, title, [  # appendix C
        ("loss", losses, {"log 2": LOG2}, None),
        ("accuracy", accuracies, {"chance": 0.5}, 1),
        ("margin", margins, {}, None)])


def print_summary(summary: dict, out: Path, cfg: Config) -> None:
    """Prints a table by category, what else the run had, and the next commands."""
    lines = [""]
    if summary["accuracy"] is not None:
        lines.append(f"{'held out':<24}{'accuracy':>10}{'pairs':>10}")
        for name, value in summary["accuracy_by_category"].items():
            num_pairs = summary["n_by_category"][name]
            lines.append(f"{printable(name):<24}{value:>10.3f}{num_pairs:>10,}")
        lines.append(f"{'all':<24}{summary['accuracy']:>10.3f}{summary['n']:>10,}")
    is_drawn = not cfg.data and not cfg.eval_data
    if summary["accuracy_images_shuffled"] is not None:
        value = summary["accuracy_images_shuffled"]
        expected = "0.5 if the model uses the images" if is_drawn else "what the texts alone tell"
        lines.append(f"{'images shuffled':<24}{value:>10.3f}          ({expected})")

    lines.append("")
    if summary["final_lm_loss"] is not None:
        lines.append(f"LM loss of critiques: {summary['final_lm_loss']:.3f}; critiques in scoring: "
                     f"{summary['critiques']}")
    for reason, count in summary["dropped"].items():
        if count:
            lines.append(f"rows dropped: {count:,}, {reason}")
    if summary["bad_gradients"]:
        lines.append(f"steps skipped: {summary['bad_gradients']:,}, gradient not finite")
    lines.append(f"{summary['steps']:,} steps, {summary['pairs_seen']:,} pairs, "
                 f"{summary['seconds']:,.0f} seconds")

    folder = shlex.quote(str(out))
    lines.append(f"The reward model, metrics.jsonl, curve.png and summary.json are in {folder}. "
                 f"Next:")
    if is_drawn:
        lines.append(f"  python evaluate.py --model {folder}")
        lines.append(f"  python rl_demo.py --reward_model {folder}")
    else:
        lines.append(f"  python evaluate.py --model {folder} --data FOLDER")
    print_rank0("\n".join(lines))


# 10  The run ----------------------------------------------------------------------------
def make_optimizer(model: RewardModel, cfg: Config) -> torch.optim.AdamW:
    trained = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained.append((name, parameter))
    return torch.optim.AdamW(trained, cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay,
                             fused=True)


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def stop_early(out: Path, optimizer, state: dict, exit_status: int) -> int:
    if state["step"] > 0:
        save_checkpoint(out, optimizer, state)
        print_rank0(f"train.py: {state['step']} steps are saved in {out}; --resume continues",
                    sys.stderr)
    return exit_status


def main(cfg: Config) -> int:
    """Trains, evaluates and saves a reward model. Returns the exit status."""
    start_time = time.time()
    out = Path(cfg.out)
    device = start_processes()
    prepare_run_folder(out, cfg.overwrite, cfg.resume)
    torch.manual_seed(cfg.seed)

    data = open_data(cfg)
    order = Order(data.pair_counts(), data.weights, cfg.batch_size, cfg.seed)
    steps = order.num_steps(cfg.epochs) if cfg.max_steps is None else cfg.max_steps

    # raw_model computes rewards; model is the same one, wrapped to average the ranks' gradients
    raw_model = make_model(cfg, data.sets, device).train()
    eval_set = read_eval_set(data.held_out, raw_model, device.type == "cuda", cfg)
    model = wrap_model(raw_model, device, cfg.shard)
    optimizer = make_optimizer(raw_model, cfg)
    dummy_pack = make_dummy_pack(raw_model)

    settings = asdict(cfg) | {"rows of each set": [len(rows) for rows in data.sets]}
    state = {"step": 0, "seconds": 0.0, "config": settings}
    if cfg.resume:
        state |= load_checkpoint(out, optimizer, settings, RESUMABLE_CHANGES)
        start_time -= state["seconds"]
    print_start(cfg, raw_model, data, eval_set, steps)

    load = partial(load_batch, order=order, sets=data.sets, model=raw_model, cfg=cfg)
    bad_gradients = 0  # in a row
    step_start = time.time()
    with stop_signals() as stop_signal, open_log(out, state["step"], steps, SHOWN) as write_row:
        for batch in prefetch(load, range(state["step"], steps), device.type == "cuda"):
            plan = agree_on_step(batch, stop_signal)
            if plan.exit_status:
                return stop_early(out, optimizer, state, plan.exit_status)

            optimizer.param_groups[0]["lr"] = learning_rate(batch.step, steps, cfg)
            metrics = train_step(model, optimizer, batch, plan, dummy_pack, cfg)
            state["step"] = batch.step + 1

            row = {"step": state["step"]} | metrics | plan.counts
            row["seconds"] = time.time() - step_start
            row["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
            if eval_set and is_due(state["step"], cfg.eval_every) and state["step"] < steps:
                row["eval_accuracy"] = evaluate_subset(raw_model, eval_set, cfg)
            write_row(row)

            state["seconds"] = time.time() - start_time
            bad_gradients = 0 if math.isfinite(row["grad_norm"]) else bad_gradients + 1
            if bad_gradients == 10:
                print_rank0("train.py: ten steps in a row had a gradient that is not finite; take "
                            "a lower --lr", sys.stderr)
                return stop_early(out, optimizer, state, exit_status=1)
            if is_due(state["step"], cfg.save_every) or state["step"] == steps:
                save_checkpoint(out, optimizer, state)
            step_start = time.time()

        exit_status = max_over_ranks(stop_signal.exit_status)  # a signal during the last step
        if exit_status:
            return stop_early(out, optimizer, state, exit_status)
    return report(out, raw_model, eval_set, start_time, cfg)


# ======================================================================================
# First reading ends here. Below: what flags, other families and other paradigms add.
# ======================================================================================


# A  Sharding (--shard) ------------------------------------------------------------------
def shard_model(model: RewardModel, device: torch.device, shard: str, product_dtype):
    """FSDP2: each rank keeps a part of the weights, gradients and optimizer state, all in fp32.

    A layer's weights are gathered when they are needed. shard="all": parts of 1/world_size.
    shard="node": parts of 1/(ranks of a node). Every node then has the whole, gathers within
    itself, and averages gradients with the other nodes once per layer.

    product_dtype: in which the weights of matrix products are gathered; bf16 where autocast would
    cast them anyway. Trap: FSDP casts all weights of a layer, also those of norms, which autocast
    leaves alone: an update too small for bf16 would be saved and have no effect. So what is no
    product is gathered apart and in fp32, as are embedding and head.

    Rank 0 alone has the weights, on its CPU. The layers are sharded while they are on the meta
    device, then filled one tensor at a time: no GPU ever holds more than its parts and a tensor."""
    world_size = dist.get_world_size()
    ranks_of_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    mesh_shape = (world_size,)
    mesh_names = ("ranks",)
    if shard == "node":
        mesh_shape = (world_size // ranks_of_node, ranks_of_node)
        mesh_names = ("nodes", "ranks")
    mesh = dist.init_device_mesh(device.type, mesh_shape, mesh_dim_names=mesh_names)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    products = MixedPrecisionPolicy(product_dtype, reduce_dtype=torch.float32,
                                    cast_forward_inputs=False)

    weights = named_tensors(model) if dist.get_rank() == 0 else {}
    move_to_meta(model)
    for layer in transformer_layers(model):
        shard_layer(layer, mesh, exact, products)
    fully_shard(model, mesh=mesh, mp_policy=exact)
    model.to_empty(device=device)
    load_into_shards(named_tensors(model), weights)
    return model


def named_tensors(model: RewardModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers: those of RoPE are not in a state_dict."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def move_to_meta(model: RewardModel) -> None:
    """Trap: `to` gives an embedding and a vocabulary head that share a weight one each."""
    lm_head = getattr(model, "lm_head", None)  # a naive model has none
    embedding = model.backbone.get_input_embeddings()
    is_tied = lm_head is not None and lm_head.weight is embedding.weight
    model.to("meta")
    if is_tied:
        lm_head.weight = embedding.weight


def transformer_layers(model: RewardModel) -> list[torch.nn.Module]:
    """The layers of the decoder and of the vision tower."""
    decoder = getattr(model.backbone, "language_model", model.backbone)
    layers = list(decoder.layers)
    for vision_module in vision_modules(model.backbone):
        for module in vision_module.modules():
            if isinstance(module, torch.nn.ModuleList):
                layers += module
    return layers


def shard_layer(layer: torch.nn.Module, mesh, exact, products) -> None:
    """Shards a layer: its linear layers by the policy `products`, all else by `exact`."""
    linear_layers = []
    owners = []  # of weights that are no products, the inner ones first
    for module in reversed(list(layer.modules())):
        if isinstance(module, torch.nn.Linear):
            linear_layers.append(module)
        elif module._parameters and not isinstance(module, torch.nn.Conv1d):
            # Trap: a recurrent layer of Qwen3.5 reads the weight of its Conv1d without calling it,
            # so it has to be gathered with the recurrent layer
            owners.append(module)

    if any(list(owner.children()) for owner in owners):
        # InternVL's vision layers have scales of their own, Qwen3.5's recurrent ones decays: their
        # linear layers are a group apart. Nothing is added to the outputs in place, of which FSDP
        # warns
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .FSDPLinear.*view tensor")
        fully_shard(linear_layers, mesh=mesh, mp_policy=products)
    for owner in owners:
        fully_shard(owner, mesh=mesh, mp_policy=exact)
    if layer not in owners:
        fully_shard(layer, mesh=mesh, mp_policy=products)


@torch.no_grad()
def load_into_shards(tensors: dict, whole_tensors: dict) -> None:
    """Copies rank 0's whole tensors, by name, into the tensors or shards of all ranks.

    whole_tensors: {} on the other ranks. One at a time, since the GPU holds it whole meanwhile."""
    for name, tensor in tensors.items():
        if whole_tensors:
            whole_tensor = whole_tensors[name].to(tensor.device)
        else:
            whole_tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if isinstance(tensor, DTensor):
            shards = distribute_tensor(whole_tensor, tensor.device_mesh, tensor.placements)
            tensor.copy_(shards)
        else:
            tensor.copy_(whole_tensor)
            dist.broadcast(tensor, src=0)


# B  LoRA (--lora) -----------------------------------------------------------------------
class LowRank(torch.nn.Linear):
    """A frozen linear layer that learns an update of low rank (LoRA, arXiv 2106.09685):

        y = W x + b + alpha / r * B A x

    W (out, in) and b (out,) are frozen; A (r, in) starts random and B (out, r) at zero, so that the
    first step's model is the base model. A and B are r * (in + out) numbers where W has in * out.
    Of the 16 bytes of a trained weight (itself, gradient, two moments, all fp32) W needs two, in
    bf16 on a GPU. The division by r lets one learning rate suit all ranks. alpha = 32 is our
    choice. Updates of all linear layers and not of attention's alone are QLoRA's finding (arXiv
    2305.14314, section 4); ten times the learning rate of full training is that of LoRA Without
    Regret (Schulman et al., 2025)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = torch.nn.functional.linear(x, self.lora_a)  # (..., r)
        update = torch.nn.functional.linear(low, self.lora_b)  # (..., out)
        return super().forward(x) + LORA_ALPHA / len(self.lora_a) * update


def add_lora(model: RewardModel, rank: int) -> None:
    """Freezes the backbone and gives each linear layer of its decoder an update, in fp32.

    The layers change their class in place, so names and dtypes stay as they are."""
    model.requires_grad_(False)
    if model.head is not None:
        model.head.requires_grad_(True)

    decoder = getattr(model.backbone, "language_model", model.backbone)
    for layer in list(decoder.modules()):
        if isinstance(layer, torch.nn.Linear):
            layer.__class__ = LowRank
            bound = layer.in_features ** -0.5  # A x is then about as large as x
            lora_a = layer.weight.new_empty(rank, layer.in_features, dtype=torch.float32)
            lora_b = layer.weight.new_zeros(layer.out_features, rank, dtype=torch.float32)
            layer.lora_a = torch.nn.Parameter(lora_a.uniform_(-bound, bound))
            layer.lora_b = torch.nn.Parameter(lora_b)


# C  Curves (curve.png) ------------------------------------------------------------------
SCALE = 2  # everything is drawn twice as large and then scaled down, which smooths the lines
PANEL_WIDTH = 440 * SCALE  # pixels, as below
PANEL_HEIGHT = 340 * SCALE
CURVE_COLOURS = ("#1f77b4", "#d1690e", "#2ca02c", "#d62728", "#9467bd")


def draw_curves(file, title: str, panels: list) -> None:
    """Draws panels side by side into a PNG.

    A panel is (heading, {name: [(x, y), ...]}, {name: y of a dashed line}, end of the y axis or
    None). The y axis begins at zero, or below it if a curve does."""
    title_height = 25 * SCALE
    image = Image.new("RGB", (PANEL_WIDTH * len(panels), PANEL_HEIGHT + title_height), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(11 * SCALE)
    title = title.encode("utf-8", "replace").decode()  # a path may hold bytes that are not text
    draw.text((image.width / 2, title_height * 0.7), title, "black", anchor="mm")
    for index, (heading, curves, dashed, y_max) in enumerate(panels):
        draw_panel(draw, index * PANEL_WIDTH, title_height, heading, curves, dashed, y_max)

    image = image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS)
    with atomic_write(file) as temporary:
        image.save(temporary, format="png")


def draw_panel(draw, panel_left, panel_top, heading, curves: dict, dashed: dict, y_max) -> None:
    left = panel_left + 50 * SCALE
    right = panel_left + PANEL_WIDTH - 15 * SCALE
    top = panel_top + 50 * SCALE
    bottom = panel_top + PANEL_HEIGHT - 30 * SCALE
    finite_curves = {}
    x_values = [1]
    y_values = [0] + list(dashed.values())
    for name, points in curves.items():
        finite_curves[name] = []
        for x, y in points:
            if math.isfinite(y):
                finite_curves[name].append((x, y))
                x_values.append(x)
                y_values.append(y)
    x_max = max(x_values)
    y_min = min(y_values)
    y_max = y_max or max(1.1 * max(y_values), y_min + 1e-6)

    def pixel(x: float, y: float) -> tuple[float, float]:
        return (left + x / x_max * (right - left),
                bottom - (y - y_min) / (y_max - y_min) * (bottom - top))

    for value in ticks(0, x_max):
        x, _ = pixel(value, 0)
        draw.line([(x, bottom), (x, bottom + 4 * SCALE)], "black", SCALE)
        draw.text((x, bottom + 8 * SCALE), f"{value:g}", "black", anchor="mt")
    for value in ticks(y_min, y_max):
        _, y = pixel(0, value)
        draw.line([(left, y), (right, y)], "#e8e8e8", SCALE)
        draw.text((left - 8 * SCALE, y), f"{value:g}", "black", anchor="rm")
    for name, value in dashed.items():
        _, y = pixel(0, value)
        for x in range(left, right, 7 * SCALE):
            draw.line([(x, y), (x + 4 * SCALE, y)], "grey", SCALE)
        draw.text((right - 4 * SCALE, y - 5 * SCALE), name, "grey", anchor="rs")
    draw.rectangle([left, top, right, bottom], outline="black", width=SCALE)

    draw.text(((left + right) / 2, panel_top + 22 * SCALE), heading, "black", anchor="mm")
    name_left = left
    for colour, (name, points) in zip(cycle(CURVE_COLOURS), finite_curves.items()):
        if not points:
            continue
        draw.line([pixel(x, y) for x, y in points], colour, 2 * SCALE, joint="curve")
        draw.text((name_left, top - 8 * SCALE), name, colour, anchor="ls")
        name_left += draw.textlength(name) + 16 * SCALE


def ticks(low: float, high: float) -> list[float]:
    """At most six round values from low to high.

    >>> ticks(0, 940)
    [0, 200, 400, 600, 800]"""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    for factor in (2, 2.5, 2):  # 1, 2, 5, 10
        if (high - low) / step > 5:
            step *= factor
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


# D  The command line --------------------------------------------------------------------
def command_line(main, Config, script: str) -> None:
    """Parses flags into a Config, calls main, and exits with its status.

    An error that a user can mend is printed in one line, and so is the loss of another rank. Any
    other is a defect of this code and keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for terminals that lack a character
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process: see stop_signals

    exit_status = 1
    try:
        parser = HfArgumentParser(Config, prog=script, exit_on_error=False)
        (cfg,) = parser.parse_args_into_dataclasses()
        if hasattr(cfg, "resolved"):
            cfg = cfg.resolved()
        main_status = main(cfg) or 0
        end_processes()
        exit_status = main_status
    except (ValueError, OSError, argparse.ArgumentError) as error:
        print_error(script, str(error))
    except RuntimeError as error:
        is_network = re.search("gloo|NCCL|onnection (closed|reset)", str(error))
        if not isinstance(error, dist.DistError) and not is_network:
            raise
        print_error(script, f"another rank ended (its message is above), or the network failed: "
                            f"{str(error)[:200]}")
    sys.exit(exit_status)


if __name__ == "__main__":
    command_line(main, Config, "train.py")
