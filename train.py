"""Trains a multimodal reward model on preference pairs: BaseReward (arXiv 2509.16127), sections 3 and 4.

Read: `main` and on to the double line, 12 minutes, after Comparison, pack, pairwise_loss (model.py), Order (data.py).

    torchrun train.py                                           a tiny model on drawn pictures: two CPU cores, 3 minutes
    torchrun train.py --data FOLDER --out runs/mine             the same tiny model on your own rows (format: data.py)
    torchrun --nproc_per_node 8 train.py --backbone Qwen/Qwen2.5-VL-7B-Instruct --shard --gradient_checkpointing \\
             --data FOLDER OTHER:2.0 --out runs/7b              the real thing; OTHER is seen twice
    torchrun train.py --backbone Qwen/Qwen2.5-VL-3B-Instruct --lora 16 --gradient_checkpointing --data FOLDER  (24 GB)
    torchrun train.py --resume                                  goes on where a stopped run left off

Into --out go the reward model (RewardModel.from_pretrained loads it), metrics.jsonl, a line a step, its picture
curve.svg (by matplotlib), summary.json with the held-out accuracy, of an unfinished run checkpoint-STEP/.

Several processes. torchrun starts this script once for each GPU and tells each its *rank*: 0, 1 ... *world_size* - 1.
Every rank holds the model and takes its share of a step's rows; before the optimiser moves, the ranks exchange their
gradients, so that all take the same step and stay equal. `python train.py` is a world of one. A step is the same in
every world: (seed, step) name its pairs, and its loss is the sum over them on all ranks divided by their number.

Where the paper is silent: optimiser, schedule, epochs, weight decay, maximum length, resolution, and whether the vision
tower is trained. We take AdamW (0.9, 0.99), 5% warm-up then cosine to zero, one epoch, no decay, 16,384 tokens a
comparison, 1,280 tokens an image as transformers has it, and train everything. Rate and batch are the paper's.
"""
import argparse
import atexit
import contextlib
import io
import json
import logging
import math
import os
import random
import re
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Literal

import filelock
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg
from data import BadRow, Order, read_comparisons, shuffle_images, synthetic, use_row
from model import (CRITIQUE_TURN, Comparison, Pack, RewardModel, Score, answers_to, asked, encode, fill_packs,
                   judge_pair, margins_of, one_ahead, pack, pairwise_loss, recompute_activations, remove, replacing,
                   score_of, tiny_backbone, vision_parts)

def main(cfg: "Config") -> int:
    # 1  Processes and seed
    begun, out, device = time.time(), Path(cfg.out), start_processes()
    in_parts = claim_folder(out, cfg.overwrite, cfg.resume)  # whether each rank writes its part of a checkpoint
    torch.manual_seed(cfg.seed)

    # 2  Data: the sets to train on, how much of each, and what is held out
    sets, weights, held = open_data(cfg)
    pair_counts = [rows.pairs for rows in sets] if cfg.data else [[len(comparison.pairs) for comparison in sets[0]]]
    order = Order(pair_counts, weights, cfg.batch_size, cfg.seed)
    steps = order.steps(cfg.epochs) if cfg.max_steps is None else cfg.max_steps

    # 3  Model: raw_model computes rewards, model is the same with an exchange of gradients around it
    raw_model = make_model(cfg, sets, device).train()
    held = check_held_out(held, raw_model, cfg.on_bad_row)
    model = distribute(raw_model, device, cfg.shard, torch.bfloat16 if device.type == "cuda" else None)

    # 4  Optimiser and resume
    trained = [(name, p) for name, p in raw_model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)
    n_rows = [len(rows) for rows in sets]
    state = {"step": 0, "seconds": 0.0, "config": asdict(cfg) | {"rows of each set": n_rows}}
    state |= load_checkpoint(out, optimizer, state["config"], FREE, in_parts) if cfg.resume else {}
    begun -= state["seconds"]
    say(f"{json.dumps(asdict(cfg))}\n{sum(n_rows):,} comparisons, {len(held)} held out, {steps} steps; "
        f"log 2 = {LOG2:.3f} is the loss of knowing nothing")

    # 5  The loop: learning rate -> micro-steps -> clip -> step -> log -> evaluate -> checkpoint
    filler = pack([Comparison("?", ["a", "b"], [(0, 1)])], raw_model.processor)
    load = partial(load_step, order=order, sets=sets, processor=raw_model.processor, cfg=cfg)
    status, bad_in_a_row, started = 0, 0, time.time()
    with stop_signals() as told, open_log(out, state["step"], steps) as write_row:
        for share in one_ahead(load, range(state["step"], steps), device.type == "cuda"):
            # What all ranks must agree upon: what to divide by, how many micro-steps to make, whether to go on
            stop = share.status or (128 + told.number if told.number else 0)  # 128 + signal, as in shells
            counts = gather([share.pairs, share.texts, share.tokens, share.bad_rows, share.too_long,
                             len(share.packs), stop]).long()
            pairs, texts, tokens, bad_rows, too_long, packs = counts[:, :6].sum(dim=0).tolist()
            micro_steps, status = counts[:, 5:].amax(dim=0).tolist()  # the largest: packs again, and reason to stop
            if status:
                break
            optimizer.param_groups[0]["lr"] = lr = learning_rate(share.step, steps, cfg)
            sums, norm = take_step(model, optimizer, share.packs, filler, micro_steps, pairs, texts, cfg)
            step = state["step"] = share.step + 1
            *sums, text_loss = gather(sums).sum(dim=0).tolist()
            loss, right, margin = (value / pairs if pairs else None for value in sums)
            row = {"step": step, "loss": loss, "accuracy": right, "margin": margin, "grad_norm": norm, "lr": lr,
                   "text_loss": text_loss / texts if texts else None, "pairs": pairs, "texts": texts, "tokens": tokens,
                   "bad_rows": bad_rows, "too_long": too_long, "fillers": micro_steps * len(counts) - packs,
                   "seconds": time.time() - started, "gpu_gb": torch.cuda.max_memory_allocated() / 1e9}
            if held and cfg.eval_every and step % cfg.eval_every == 0 and step < steps:
                row["eval_accuracy"] = examine(raw_model, held, cfg)
            write_row(row)
            bad_in_a_row = 0 if math.isfinite(norm) else bad_in_a_row + 1
            if bad_in_a_row == 10:
                say("train.py: ten steps in a row had a gradient that is not finite; take a lower --lr", sys.stderr)
                status = 1
                break
            state["seconds"] = time.time() - begun
            if step == steps or cfg.save_every and step % cfg.save_every == 0:
                save_checkpoint(out, optimizer, state, in_parts)
            started = time.time()
        if status and state["step"]:
            save_checkpoint(out, optimizer, state, in_parts)
            say(f"train.py: {state['step']} steps are saved in {out}; --resume goes on from there", sys.stderr)
    if told.number and not status:
        signal.raise_signal(told.number)  # it came in the last step, of which all is saved: now it ends the process

    # 6  Final report
    return status or report(out, raw_model, held, begun, cfg)

def load_step(step: int, order: Order, sets: list, processor, cfg: "Config") -> SimpleNamespace:
    """This rank's share of a step, read and packed. Every rank deals out the rows that (seed, step) names in the same
    way: none is taken twice, none is left out, and no rank need ask another."""
    good, bad_rows, too_long, status = [], 0, 0, 0
    for s, i in deal(order.step(step), sets)[dist.get_rank()]:
        dice = random.Random(f"{cfg.seed} {s} {i}")  # a judge's orders, by (seed, row)
        items = use_row(sets[s], i, partial(to_learn, processor=processor, dice=dice), "skip")
        if isinstance(items, BadRow):
            bad_rows += 1
            if cfg.on_bad_row == "stop" and not status:
                complain("train.py", str(items))
                status = 1
        elif max(item.tokens for item in items) > cfg.pack_tokens:  # dropped, never cut: what was preferred may be what
            too_long += 1                                           # would be cut off
        else:
            good += items
    packs = fill_packs([item.tokens for item in good], cfg.pack_tokens)
    return SimpleNamespace(step=step, packs=[pack([good[m] for m in members]) for members in packs], status=status,
                           pairs=sum(len(item.pairs) for item in good), tokens=sum(item.tokens for item in good),
                           texts=sum(n > 0 for item in good for n in item.text_tokens), bad_rows=bad_rows,
                           too_long=too_long)

def to_learn(comparison: Comparison, processor, dice: random.Random) -> list:
    """What is learnt of a comparison: itself; by a judge, each of its pairs in a random order."""
    if processor.paradigm in ("naive", "critic"):
        return [encode(comparison, processor)]
    orders = [pair if dice.random() < 0.5 else pair[::-1] for pair in comparison.pairs]
    return [encode(judge_pair(comparison, *order, processor.paradigm == "think"), processor) for order in orders]

def take_step(model, optimizer, packs: list[Pack], filler: Pack, micro_steps: int, pairs: int, texts: int, cfg):
    """One step of the optimiser, which learns from so many pairs and texts on all ranks. Returns sums over this rank's,
    [loss of equation (1), right pairs, margins, cross entropies of texts], and the norm of the gradient.

    A micro-step is one pack forward and backward; gradients add up. A pack's loss is divided by the pairs of the whole
    step, of all ranks and micro-steps, so that a pair weighs the same wherever it lies. Trap: a mean of means weighs
    pairs in small packs more. The exchange takes the ranks' average, hence `world_size`, and waits for all of them, so
    all make equally many micro-steps: a rank with fewer packs runs `filler`, at weight 0. The norm is that of the
    exchanged gradient, the same on all ranks: if it is not finite, all skip the step."""
    world_size, trained = dist.get_world_size(), optimizer.param_groups[0]["params"]  # FSDP swaps model.parameters()
    sums = torch.zeros(4, dtype=torch.float64, device=trained[0].device)
    for micro_step in range(micro_steps):
        own = micro_step < len(packs)
        batch = (packs[micro_step] if own else filler).to(sums.device)
        wait = isinstance(model, DistributedDataParallel) and micro_step < micro_steps - 1
        with model.no_sync() if wait else contextlib.nullcontext():  # DDP exchanges gradients once, at the end
            rewards, cross_entropy = model(batch)  # (R,), and () of critiques or thoughts, 0 without
            loss = pairwise_loss(rewards, batch.pairs, cfg.zero_coef, cfg.length_norm, batch.response_length,
                                 pairs_in_step=pairs)
            loss = loss + cfg.critique_coef * cross_entropy / max(texts, 1)
            (loss * world_size * own).backward()
        if own:
            chosen, rejected = rewards.detach().double()[batch.pairs].T  # (B,) and (B,)
            margin = chosen - rejected
            losses = torch.nn.functional.softplus(-margin)
            sums += torch.stack([losses.sum(), (margin > 0).sum(), margin.sum(), cross_entropy.detach()])
    norm = torch.nn.utils.clip_grad_norm_(trained, cfg.clip)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)  # sharded: each rank has a part of it
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums.tolist(), norm

def learning_rate(step: int, steps: int, cfg: "Config") -> float:
    """Rises in a straight line over the warm-up, then falls as half a cosine; the step after the last would have 0.

    >>> [round(learning_rate(s, 10, Config(lr=1.0, warmup=0.2)), 2) for s in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]"""
    rise = math.ceil(cfg.warmup * steps)
    if step < rise:
        return cfg.lr * (step + 1) / rise
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))

# ======================================================================================================================
# First reading ends here. Below: what a real run needs.
# ======================================================================================================================
@dataclass(frozen=True)
class Config:
    backbone: str = HfArg(default="tiny", help="tiny, tiny-qwen3-vl, tiny-internvl (made here), a folder or a hub id")
    data: list[str] = HfArg(default_factory=list, help="data folders, with a weight if wanted: a b:2.0; none: drawn")
    eval_data: list[str] = HfArg(default_factory=list, help="folders; none: held_out.jsonl of --data, or rows of it")
    eval_size: int = HfArg(default=800, help="held-out comparisons: drawn, of held_out.jsonl, or a tenth of --data")
    out: str = HfArg(default="runs/default", help="run folder; the final reward model lies in it")
    overwrite: bool = HfArg(default=False, help="delete the run that --out holds and start anew")
    resume: bool = HfArg(default=False, help="go on from the checkpoint in --out")
    seed: int = HfArg(default=0, help="of the head, the data's order, the tiny backbone and its pictures")
    train_size: int = HfArg(default=14000, help="number of drawn comparisons, where --data is not given")
    batch_size: int | None = HfArg(default=None, help="pairs per step over all ranks; 128 (paper), 32 for tiny")
    lr: float | None = HfArg(default=None, help="peak learning rate; 3e-6 (paper, section 4.1), 6e-4 for tiny")
    epochs: float = HfArg(default=1.0, help="passes over the data (paper: not given)")
    max_steps: int | None = HfArg(default=None, help="end after so many steps; 0: save the model untrained")
    warmup: float = HfArg(default=0.05, help="share of the steps in which the rate rises from 0 (paper: not given)")
    weight_decay: float = HfArg(default=0.0, help="AdamW's decoupled decay (paper: not given)")
    clip: float = HfArg(default=1.0, help="largest gradient norm (paper: not given)")
    paradigm: Literal["naive", "critic", "generative"] = HfArg(default="naive", help="see model.py, 7 (Table 1)")
    think: bool = HfArg(default=False, help="generative: with a chain of thought before the verdict, learnt by heart")
    critique_coef: float = HfArg(default=1.0, help="weight of the cross entropy of critiques or thoughts (MM-RLHF: 1)")
    critique_tokens: int | None = HfArg(default=None, help="of a critique or thought it writes; 512, 40 for tiny")
    head_layers: int = HfArg(default=2, help="linear layers of the reward head (Table 2: 2 is best)")
    head_activation: Literal["silu", "tanh", "relu", "none"] = HfArg(default="silu", help="between them (Table 2)")
    zero_coef: float = HfArg(default=0.0, help="lambda of Algorithm 1's zero coefficient (section 4.3: it hurts)")
    length_norm: bool = HfArg(default=False, help="Algorithm 1's division by log(length + 1) (section 4.3: it hurts)")
    freeze_vision: bool = HfArg(default=False, help="do not train vision tower and merger (paper: not given)")
    gradient_checkpointing: bool = HfArg(default=False, help="compute activations twice: less memory, a third slower")
    lora: int = HfArg(default=0, help="train updates of this rank, not the weights: one card; 0: train all (paper)")
    lora_vision: bool = HfArg(default=False, help="updates for the vision tower too, which --lora alone freezes")
    shard: str = HfArg(default="none", metadata={"nargs": "?", "const": "all", "choices": ["none", "all", "node"]},
                       help="split weights and optimiser over all ranks (FSDP2; the 7B needs it), or over a node's")
    max_pixels: int | None = HfArg(default=None, help="of an image, 28 x 28 a token; 1003520, 12544 for tiny")
    pack_tokens: int | None = HfArg(default=None, help="of a pack; longer comparisons drop; 16384, 1024 for tiny")
    on_bad_row: Literal["stop", "skip"] = HfArg(default="stop", help="stop at a row that cannot be used, or count it")
    eval_every: int = HfArg(default=200, help="steps between accuracies on 100 held-out comparisons; 0: at the end")
    save_every: int = HfArg(default=500, help="steps between checkpoints; 0: one at the end, or when stopped")

    @property
    def kind(self) -> str:  # one of model.PARADIGMS
        return "think" if self.think else self.paradigm.replace("generative", "direct")

    def resolved(self) -> "Config":  # with the defaults that depend on the backbone filled in, and nonsense refused
        own = dict(lr=3e-6, batch_size=128, max_pixels=1280 * 28 * 28, pack_tokens=16384, critique_tokens=512)
        if self.backbone in TINY:
            own = dict(lr=6e-4, batch_size=32, max_pixels=112 * 112, pack_tokens=1024, critique_tokens=40)
        own["lr"] *= 10 if self.lora else 1  # see LowRank
        cfg = replace(self, **{name: value for name, value in own.items() if getattr(self, name) is None})
        check_numbers(cfg, above_zero=[*own, "epochs", "clip", "train_size", "head_layers"],
                      not_negative=["warmup", "weight_decay", "critique_coef", "max_steps", "eval_size", "eval_every",
                                    "save_every", "lora"])
        if cfg.think and cfg.paradigm != "generative" or cfg.length_norm and cfg.paradigm != "naive":
            raise ValueError(f"--paradigm {cfg.paradigm}: --think is generative, and --length_norm naive (Algorithm 1)")
        if cfg.lora_vision and (cfg.freeze_vision or not cfg.lora):
            raise ValueError("--lora_vision needs --lora, and a vision tower that is not frozen by --freeze_vision")
        if cfg.warmup > 1 or cfg.epochs > 1000 or cfg.train_size > 1e6:
            raise ValueError(f"--warmup {cfg.warmup:g} is a share, at most 1; --epochs {cfg.epochs:g}: at most 1000; "
                             f"--train_size {cfg.train_size}: at most a million, which lie in memory")
        return cfg

TINY = {"tiny": "qwen2_5_vl", "tiny-qwen2-vl": "qwen2_vl", "tiny-qwen3-vl": "qwen3_vl", "tiny-internvl": "internvl",
        "tiny-qwen2": "qwen2", "tiny-qwen3": "qwen3"}  # made on the spot; the last two read no images
FREE = ("out", "overwrite", "resume", "eval_data", "eval_every", "save_every", "gradient_checkpointing", "shard",
        "on_bad_row")  # what a resumed run may change
LOG2 = math.log(2)  # the loss of a model that knows nothing
LOCK = ".run.lock"  # in a run folder while a run is under way, and after one that was killed

# Processes -----------------------------------------------------------------------------------------------------------
def start_processes() -> torch.device:
    """Joins the processes that torchrun announces in the environment, or makes a group of one. On GPUs if this machine
    has one for each of its processes. Numbers that ranks tell each other go over gloo, and gradients over NCCL."""
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_gpu:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        patience = timedelta(hours=2)  # all ranks wait while a checkpoint is written, 93 GB for the 7B
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=patience, **alone)
        say(f"world size {dist.get_world_size()}, device {'cuda' if on_gpu else 'cpu'} ({gpus} GPUs in sight)")
    return torch.device("cuda", local) if on_gpu else torch.device("cpu")

def end_processes() -> None:
    if dist.is_initialized():
        gather_objects(None)  # a rank that leaves early breaks the last message of another
        dist.destroy_process_group()

def say(text: str, stream=None) -> None:
    """Prints on the first rank, above a progress bar if there is one."""
    if dist.get_rank() == 0:
        tqdm.write(text, file=stream)

def gather_objects(item) -> list:
    """Every rank's object, on every rank. Trap: gloo's thread copies a message of a megabyte with OpenMP threads of its
    own; libgomp then counts more threads than cores and lets all sleep at every barrier: on two cores the arithmetic of
    a process that is alone took 1.9 times as long from then on. So it sends none. Of several each has one thread."""
    if dist.get_world_size() == 1:
        return [item]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, item)
    return everyone

def gather(values: list[float]) -> torch.Tensor:
    """(world_size, len(values)) float64 on the CPU: every rank's numbers, on every rank."""
    return torch.tensor(gather_objects(values), dtype=torch.float64)

def from_first(item):
    """The first rank's object, on every rank. All wait for all."""
    return gather_objects(item)[0]

def distribute(model: RewardModel, device: torch.device, shard: str, product_dtype: torch.dtype | None):
    """A model on its device whose backward pass leaves the ranks' average gradient: DDP, or with `shard` FSDP2, where
    each rank keeps a part of every layer's weights, gradients and moments, all fp32, and gathers a layer when it is
    needed. "all": 1/world_size of it. "node": as large a part as a node has ranks; every node then holds the whole, and
    gathers without a word to the others, which it meets once a layer, to average the gradients of its parts.

    product_dtype: in which weights of matrix products are gathered, bf16 where autocast would cast them anyway. Trap:
    FSDP casts all weights of a layer, also those of norms, which autocast leaves alone: an update too small for bf16
    would be saved and never felt. So what is no product is gathered apart and in fp32, as are embedding and head.

    Of a sharded model the first rank alone has the numbers, on its host. The layers are cut up while they hold none,
    and then filled, a tensor at a time: no GPU ever holds more than its parts and one tensor, and no other host more.
    """
    if shard == "none":
        return DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
    world_size, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    sizes = {"nodes": world_size // local, "ranks": local} if shard == "node" else {"ranks": world_size}
    mesh = dist.init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    products = MixedPrecisionPolicy(product_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def tensors():  # weights and buffers: those of RoPE are in no state dict
        return dict(model.named_parameters()) | dict(model.named_buffers())

    weights = tensors() if dist.get_rank() == 0 else {}
    # Trap: `to` gives an embedding and a vocabulary head that share a weight one each
    tied = model.lm_head is not None and model.lm_head.weight is model.backbone.get_input_embeddings().weight
    model.to("meta")
    if tied:
        model.lm_head.weight = model.backbone.get_input_embeddings().weight
    layers = list(getattr(model.backbone, "language_model", model.backbone).layers)
    for part in vision_parts(model.backbone):
        layers += [layer for stack in part.modules() if isinstance(stack, torch.nn.ModuleList) for layer in stack]
    for layer in layers:
        linear = [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]
        for part in [part for part in layer.modules() if part._parameters and part not in (layer, *linear)]:
            fully_shard(part, mesh=mesh, mp_policy=exact)
        if layer._parameters:  # the scales of InternVL's vision tower, which are no products; it adds nothing in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .FSDPLinear.*view tensor")
            fully_shard(linear, mesh=mesh, mp_policy=products)
        fully_shard(layer, mesh=mesh, mp_policy=exact if layer._parameters else products)
    fully_shard(model, mesh=mesh, mp_policy=exact).to_empty(device=device)
    fill(tensors(), weights)
    return model

@torch.no_grad()
def fill(tensors: dict, whole: dict) -> None:
    """Puts the first rank's `whole` tensors, by name, into every rank's, or into its parts of them, one at a time."""
    for name, tensor in tensors.items():
        empty = partial(torch.empty, tensor.shape, dtype=tensor.dtype, device=tensor.device)
        one = whole[name].to(tensor.device) if whole else empty()
        if isinstance(tensor, DTensor):
            tensor.copy_(distribute_tensor(one, tensor.device_mesh, tensor.placements))
        else:
            dist.broadcast(tensor.copy_(one), src=0)

def gathered(tensors: dict) -> dict:
    """The whole of every tensor, on the first rank's host; on the others nothing."""
    whole = ((name, t.full_tensor() if isinstance(t, DTensor) else t) for name, t in tensors.items())
    return {name: tensor.detach().cpu() for name, tensor in whole if dist.get_rank() == 0}

@contextlib.contextmanager
def stop_signals():
    """Inside the block SIGTERM, SIGHUP (a lost terminal) and Ctrl-C are noted in .number, so that a step is finished
    and saved. A second Ctrl-C ends the process at once; a second SIGTERM does not, since launchers send it twice."""
    told, before = SimpleNamespace(number=0), {}

    def note(number, _frame):
        told.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and is to be obeyed
            before[number] = signal.signal(number, note)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

# Settings, data and model --------------------------------------------------------------------------------------------
def check_numbers(cfg, above_zero=(), not_negative=()) -> None:
    """ValueError that names the flag of a number that is not finite, beyond 1e12, or of the wrong sign. None passes."""
    for name, value in vars(cfg).items():
        if isinstance(value, (int, float)):
            if not abs(value) <= 1e12:
                raise ValueError(f"--{name} {str(value)[:20]}: want a number of at most 1e12")
            if name in above_zero and value <= 0 or name in not_negative and value < 0:
                raise ValueError(f"--{name} {value} must be {'above zero' if name in above_zero else 'at least zero'}")

def open_data(cfg: Config) -> tuple[list, list[float], list]:
    """(training sets, the weight of each, held-out sets). Drawn pictures where --data names none."""
    named = [re.fullmatch(r"(?s)(.*?)(?::(\d{1,3}(?:\.\d+)?))?", item).groups("1") for item in cfg.data]
    sets, weights = [read_comparisons(folder) for folder, _ in named], [float(weight) for _, weight in named]
    if 0.0 in weights:
        raise ValueError(f"--data {cfg.data[weights.index(0.0)]}: the weight must be above zero")
    held, total = [read_comparisons(folder) for folder in cfg.eval_data], sum(map(len, sets))
    if not sets:
        return [synthetic(cfg.train_size, cfg.seed)], [1.0], held or [synthetic(cfg.eval_size, held_out=True)]
    for s, rows in enumerate(sets if not cfg.eval_data else ()):  # each set gives its share, spread over its rows
        n, apart = math.ceil(cfg.eval_size * len(rows) / total), rows.folder / "held_out.jsonl"
        if apart.is_file():  # whole prompts, from data.py --hold_out: none is in training with other responses
            rest = read_comparisons(apart)
            held.append(rest.only(spread(n, len(rest))))
        else:
            chosen = spread(min(n, len(rows) // 10), len(rows))
            held.append(rows.only(chosen))
            sets[s] = rows.only(sorted(set(range(len(rows))) - set(chosen)))
    return sets, weights, held

def spread(n: int, rows: int) -> list[int]:
    """At most n of so many rows, at even distances."""
    n = min(n, rows)
    return [i * rows // n for i in range(n)]

def deal(names: list[tuple[int, int]], sets: list) -> list[list[tuple[int, int]]]:
    """The rows of a step for each rank: the longest first, each to the rank that has least, since all ranks wait for
    the slowest. Long is a row of many bytes in its file, all that is known before it is read (an image counts as its
    name); where that is nothing (drawn pictures), rank r of w gets every w-th."""
    hands, loads = [[] for _ in range(dist.get_world_size())], [0] * dist.get_world_size()
    sizes = [int(sets[s].table[i, 1]) if hasattr(sets[s], "table") else 1 for s, i in names]
    for size, name in sorted(zip(sizes, names), key=lambda both: -both[0]):
        rank = loads.index(min(loads))
        hands[rank].append(name)
        loads[rank] += size
    return hands

def check_held_out(held: list, model: RewardModel, on_bad_row: str) -> list[Comparison]:
    """The held-out rows of all sets, each read and encoded once, shared out over the ranks: one that cannot be used is
    named with file and line now, and not after days of training."""
    silent = model.processor.paradigm == "think" and model.critiques_from == "given"  # sharded: see make_model
    places = [(rows, i) for rows in held for i in range(len(rows)) if not silent]
    mine = range(dist.get_rank(), len(places), dist.get_world_size())
    use = partial(asked, model=model)
    bad = [k for k in mine if isinstance(use_row(*places[k], use, on_bad_row), BadRow)]
    bad = set().union(*gather_objects(bad))
    return [rows[i] for k, (rows, i) in enumerate(places) if k not in bad]

def make_model(cfg: Config, sets: list, device: torch.device) -> RewardModel:
    """A reward model on a pretrained backbone, or on a tiny one whose vocabulary is made from the data's texts. It is
    still on the host; if it is to be sharded, with its numbers on the first rank's alone: see distribute."""
    path = cfg.backbone
    if cfg.kind in ("critic", "think") and cfg.max_steps != 0:
        if not any("".join(c.critiques).strip() for rows in sets for c in first_rows(rows)):
            named = "--think" if cfg.think else "--paradigm critic"
            raise ValueError(f"{named} learns to write critiques, and the first rows of --data have none")
    if path in TINY:
        path = Path(cfg.out) / "tiny_backbone"
        if dist.get_rank() == 0:
            texts = [text for rows in sets for text in texts_of(rows, cfg.kind)]
            tiny_backbone(path, texts, cfg.seed, TINY[cfg.backbone], vocabulary_head=cfg.kind != "naive")
        from_first(None)  # the others wait for it
    torch.manual_seed(cfg.seed)  # every rank draws the same head
    frozen = torch.bfloat16 if cfg.lora and device.type == "cuda" else torch.float32
    with torch.device("meta" if cfg.shard != "none" and dist.get_rank() else "cpu"):
        model = RewardModel.from_backbone(path, cfg.head_layers, cfg.head_activation, cfg.max_pixels, frozen, cfg.kind,
                                          cfg.critique_tokens)
        if cfg.lora:
            add_lora(model, cfg.lora, cfg.lora_vision)
    if cfg.shard != "none":  # writing takes as many forwards as there are words, and ranks need not write equally many
        model.critiques_from = "given"
    for part in vision_parts(model.backbone) if cfg.freeze_vision else ():
        part.requires_grad_(False)
    if cfg.gradient_checkpointing:
        recompute_activations(model.backbone)
    return model

class LowRank(torch.nn.Linear):
    """A linear layer that stays as it is and learns an update of low rank beside it (LoRA, arXiv 2106.09685):

        y = W x + b + alpha / r * B A x         W (out, in) and b (out,) frozen, A (r, in) random, B (out, r) zero

    so that the first step's model is the base model. A and B are r * (in + out) numbers where W has in * out: of the
    16 bytes that a trained weight needs (itself, gradient, two moments, all fp32) W keeps two, in bf16 on a GPU. The
    division by r lets one learning rate do for all ranks. alpha 32 is ours; that all linear layers are to have updates,
    and not attention's alone, is QLoRA's finding (arXiv 2305.14314, section 4), and a rate ten times that of full
    training LoRA Without Regret's (Schulman et al., 2025)."""
    ALPHA = 32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = torch.nn.functional.linear(torch.nn.functional.linear(x, self.lora_a), self.lora_b)
        return super().forward(x) + self.ALPHA / len(self.lora_a) * update

def add_lora(model: RewardModel, rank: int, vision: bool) -> None:
    """Freezes the backbone, and gives the linear layers of its decoder, with `vision` of its tower too, updates in
    fp32. The layers change their class in their place: names, dtypes and whatever holds them stay as they are."""
    for part in filter(None, (model.backbone, model.lm_head)):
        part.requires_grad_(False)
    parts = [getattr(model.backbone, "language_model", model.backbone)]
    for part in parts + vision_parts(model.backbone) * vision:
        for layer in [layer for layer in part.modules() if isinstance(layer, torch.nn.Linear)]:
            a = layer.weight.new_empty(rank, layer.in_features, dtype=torch.float32)
            b = layer.weight.new_zeros(layer.out_features, rank, dtype=torch.float32)
            layer.__class__, bound = LowRank, layer.in_features ** -0.5  # y = A x then is about as large as x
            layer.lora_a, layer.lora_b = torch.nn.Parameter(a.uniform_(-bound, bound)), torch.nn.Parameter(b)

def merged(state: dict) -> dict:
    """The weights of a model by name with every update added to its weight, W + alpha / r * B A, in fp32 (in bf16 small
    updates would be rounded away): those of an ordinary model."""
    out = {name: w.float() for name, w in state.items() if not name.endswith((".lora_a", ".lora_b"))}
    for name, a in state.items():
        if name.endswith(".lora_a"):
            layer = name.removesuffix("lora_a")
            out[f"{layer}weight"] = out[f"{layer}weight"] + LowRank.ALPHA / len(a) * state[f"{layer}lora_b"] @ a
    return out

def first_rows(rows):
    """Of the first 2,000 those that can be read. What is wrong with another is said when it is trained on."""
    for i in range(min(2000, len(rows))):
        with contextlib.suppress(BadRow):
            yield rows[i]

def texts_of(rows, kind: str):
    """What a tiny backbone's vocabulary is made from."""
    for c in first_rows(rows):
        yield f"{c.prompt} {' '.join(c.responses)}"
        if kind != "naive":  # a pretrained model knows these words too
            seen = judge_pair(c, *c.pairs[0], think=True)
            yield f"{seen.prompt} {seen.responses[0]} {CRITIQUE_TURN}"

# The run folder ------------------------------------------------------------------------------------------------------
def claim_folder(out: Path, overwrite: bool, resume: bool, made_by: str = "metrics.jsonl") -> bool:
    """Makes a run's folder ready, and locks it while this process lives: no run is overwritten by accident, nothing is
    deleted that a run did not make, and no two runs write into one folder. The first rank acts, the others wait.
    made_by: a file that only a run of this script leaves. Returns whether several ranks can write into it together."""
    word = os.urandom(8).hex()  # in the lock: another's may have stayed on another disk
    if dist.get_rank() == 0:
        if overwrite and resume:
            raise ValueError("--overwrite and --resume contradict each other")
        out.mkdir(parents=True, exist_ok=True)
        names = {file.name for file in out.iterdir() if not file.match(".*.partial")}  # not of a write that was killed
        ours = LOCK in names or made_by in names
        early = {"policy"} if made_by == "start.json" else {"metrics.jsonl", "tiny_backbone"}  # nothing to keep yet
        if names - early - {LOCK} and not (ours and (resume or overwrite)):
            mend = ", or --resume an unfinished run, or --overwrite it" if ours else ": no run made what it holds"
            raise ValueError(f"{out} is not empty; choose another --out{mend}")
        lock = filelock.FileLock((out / LOCK).resolve(), is_singleton=True)  # this process may claim it again
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise ValueError(f"another process is writing into {out}; wait for it or choose another --out") from None
        atexit.register(lambda: Path(lock.lock_file).unlink(missing_ok=True))  # which also keeps hold of it until then
        Path(lock.lock_file).write_text(word)
        for file in out.iterdir() if overwrite else ():
            if file.name != LOCK:  # it stays: a deletion that was killed can be taken up again
                remove(file)
    word = from_first(word)
    shared = all(gather_objects((out / LOCK).exists() and (out / LOCK).read_text() == word))
    if not shared:
        say(f"{out} is not on a disk that all ranks share: what is written lies with the first rank")
    return shared and dist.get_world_size() > 1

def write_text(file, text: str) -> None:
    with replacing(file) as part:
        part.write_bytes(text.encode("utf-8", "replace"))

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a first rank that reads for all
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)  # of tracebacks we make a line

def checkpoints(out: Path) -> list[Path]:
    """The oldest first."""
    found = {int(folder.name[11:]): folder for folder in out.glob("checkpoint-*/") if folder.name[11:].isdigit()}
    return [folder for _, folder in sorted(found.items())]

def save_checkpoint(out: Path, optimizer, state: dict, in_parts: bool) -> None:
    """Writes what is trained and nothing else, as safetensors and JSON, into out/checkpoint-STEP, and keeps the last
    two; a kill at any moment leaves those before, or this one too. in_parts: each rank writes its own, and any number
    of ranks can read it; else the first gathers and writes all, also where the others do not see its disk.
    ValueError if a weight is not finite: what lies on the disk can be gone on from."""
    if from_first((out / f"checkpoint-{state['step']}").exists()):  # gone on from, or written a moment ago
        return
    first, tensors = dist.get_rank() == 0, tensors_of(optimizer)
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    if not gather([all(bool(part.isfinite().all()) for part in parts)]).all():
        raise ValueError(f"weights are not finite after step {state['step']} and not saved; start anew, lower --lr")
    whole = {} if in_parts else gathered(tensors)
    with replacing(out / f"checkpoint-{state['step']}") if first else contextlib.nullcontext() as folder:
        folder = from_first(folder)
        try:
            if in_parts:
                writer = HuggingFaceStorageWriter(folder, save_distributed=True)
                dist.checkpoint.save(tensors, storage_writer=writer)
        except CheckpointException as error:
            raise OSError(str(error)[-80:])  # `replacing` says where
        if first:
            folder.mkdir(exist_ok=True)
            if not in_parts:
                save_file(whole, folder / "whole.safetensors")
            (folder / "state.json").write_text(json.dumps(state | {"bytes": bytes_of(folder)}))
    for old in [*checkpoints(out)[:-2], *out.glob(".checkpoint-*.partial")] if first else ():  # of a killed write
        remove(old)
    from_first(None)  # no rank ends before: torchrun would then end the writer

def remove_checkpoints(out: Path) -> None:
    for old in checkpoints(out):
        remove(old)

def bytes_of(folder: Path) -> dict[str, int]:
    """Of a file that is missing, or is one too many, the reader would say nothing: it takes what it finds."""
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}

def tensors_of(optimizer) -> dict[str, torch.Tensor]:
    """This rank's parts of all that is trained, by name: weights, and what AdamW keeps of each, made if not there yet.
    Not copies: what is read into them is used. (Not the model's parameters: FSDP swaps those.)"""
    (group,), out = optimizer.param_groups, {}
    for name, p in zip(group["param_names"], group["params"]):
        if not optimizer.state.get(p):
            optimizer.state[p] = {"step": torch.zeros((), device=p.device)}
            optimizer.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        out |= {name: p.detach()} | {f"{name} {key}": value for key, value in optimizer.state[p].items()}
    return out

def load_checkpoint(out: Path, optimizer, settings: dict, free, in_parts: bool) -> dict:
    """Puts the last checkpoint back, and returns its step and seconds; {} if there is none. The first rank looks and
    tells the others, which need not see its disk. ValueError if it cannot be read, or is another run's."""
    first, found = dist.get_rank() == 0, from_first([*checkpoints(out), *out.glob("summary.json")][-1:])
    if not found:
        say(f"no checkpoint in {out}: from the beginning")
        return {}
    if found[0].name == "summary.json":
        if first:
            remove_checkpoints(out)  # of a run that was killed at its very end
        raise ValueError(f"{out} holds a finished run: nothing to resume. Choose another --out, or --overwrite")
    saved = read_state(found[0] / "state.json", settings, free) if first else {}
    if first and saved.get("bytes") != bytes_of(found[0]):
        raise ValueError(f"{found[0]} is damaged; remove it, and --resume goes on from what was before it")
    saved = from_first(saved)
    tensors = tensors_of(optimizer)
    own = in_parts or dist.get_world_size() == 1  # each rank reads what it needs; or the first reads all and tells
    whole = tensors if own else {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items() if first}
    try:
        if whole:
            reader = HuggingFaceStorageReader(found[0])
            dist.checkpoint.load(whole, storage_reader=reader, no_dist=not in_parts)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{found[0]} does not fit this model: {' '.join(str(error).split())[-150:]}") from None
    if not own:
        fill(tensors, whole)
    say(f"going on from step {saved['step']}")
    return {name: saved[name] for name in ("step", "seconds")}

def read_state(file: Path, settings: dict, free=()) -> dict:
    """What a run says of itself in a JSON file. ValueError if it cannot be read, or if a setting has changed since that
    is not `free`: those do not shape a run."""
    try:
        saved = json.loads(file.read_bytes())
        saved |= {"step": int(saved["step"]), "seconds": float(saved["seconds"]), "config": dict(saved["config"])}
    except Exception as error:  # damaged, or foreign
        mend = f"remove {file.parent}" if file.name == "state.json" else "start anew with --overwrite"
        raise ValueError(f"{file} cannot be read ({str(error)[:100]}); {mend}") from None
    old = saved["config"]
    changed = [f"{name} was {old[name]!r}, is {settings[name]!r}" for name in old
               if name in settings and name not in free and settings[name] != old[name]]
    if changed:
        raise ValueError(f"{file} is another run's: {'; '.join(changed)[:200]}. Give the same flags, or another --out")
    return saved

# Scoring -------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def score_over_ranks(model: RewardModel, rows, pack_tokens=None, on_bad_row="stop", bar="") -> list:
    """The Score of each row, in order and on every rank; of one that cannot be used its BadRow, if told to skip it.
    Each rank takes 64 rows a round."""
    rank, at_once, found = dist.get_rank(), 64 * dist.get_world_size(), {}

    def read(start: int) -> dict:  # {i: (the comparison, what is read to score it) or BadRow}
        mine = range(start + 64 * rank, min(start + 64 * (rank + 1), len(rows)))
        return {i: use_row(rows, i, lambda c: (c, asked(c, model)), on_bad_row) for i in mine}

    rounds = tqdm(range(0, len(rows), at_once), bar, unit_scale=at_once, disable=not bar or rank > 0, leave=False)
    for items in one_ahead(read, rounds, model.device.type == "cuda"):
        good = {i: item for i, item in items.items() if not isinstance(item, BadRow)}
        questions = [question for _, group in good.values() for question in group]
        answers = iter(answers_to(questions, model, pack_tokens, of_all=lambda n: int(gather([n]).max())))
        found |= items | {i: score_of(c, [next(answers) for _ in group], model) for i, (c, group) in good.items()}
    everyone = {i: score for part in gather_objects(found) for i, score in part.items()}
    return [everyone[i] for i in range(len(rows))]

def accuracy(comparisons, scores) -> float:
    """Share of margins above 0: a tie is wrong. A comparison that has no Score does not count.

    >>> accuracy([Comparison("?", ["a", "b", "c"], [(0, 1), (1, 2)])], [Score([2.0, 1.0, 1.0])])
    0.5"""
    known = [(c, score) for c, score in zip(comparisons, scores) if isinstance(score, Score)]
    right = [margin > 0 for c, score in known for margins in margins_of(c.pairs, score) for margin in margins]
    return sum(right) / len(right) if right else math.nan

def accuracy_by_category(comparisons, scores) -> dict[str, tuple[float, int]]:
    """{category: (accuracy, number of pairs)}, sorted; "all" where a comparison names none."""
    parts = {}
    for comparison, score in zip(comparisons, scores):
        if isinstance(score, Score):
            parts.setdefault(comparison.category or "all", []).append((comparison, score))
    return {name: (accuracy(*zip(*part)), sum(len(c.pairs) for c, _ in part)) for name, part in sorted(parts.items())}

def examine(model: RewardModel, held: list[Comparison], cfg: Config) -> float:
    """Accuracy on a hundred held-out comparisons in the midst of training; a picture gone missing does not end it."""
    some = [held[i] for i in spread(100, len(held))]
    scores = score_over_ranks(model.eval(), some, cfg.pack_tokens, "skip")
    model.train()
    return accuracy(some, scores)

# Log and report ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def open_log(folder: Path, step: int, steps: int):
    """Yields write(row): a line of metrics.jsonl, and the progress bar, on the first rank. Lines of steps after `step`,
    which will be made again, and one that a kill cut short are dropped."""
    first, path = dist.get_rank() == 0, folder / "metrics.jsonl"
    if first:
        write_text(path, "".join(json.dumps(row) + "\n" for row in read_log(path) if row["step"] <= step))
    with (open(path if first else os.devnull, "a", encoding="utf-8", buffering=1) as file,
          tqdm(total=steps, initial=step, disable=not first, dynamic_ncols=True) as bar):
        def write(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            numbers = [f"{name} {value:.3g}" for name, value in row.items() if name != "step" and value is not None]
            bar.set_postfix_str(" ".join(numbers), refresh=False)
            bar.update()

        yield write

def read_log(file: Path) -> list[dict]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]

def report(out: Path, model: RewardModel, held: list[Comparison], begun: float, cfg: Config) -> int:
    """Scores the held-out comparisons, saves model, summary and curve, and prints what came out. The last checkpoint
    stays until all is done. ValueError if nothing was trained on, or if a reward is not finite: that is no result."""
    log = from_first(read_log(out / "metrics.jsonl"))
    pairs = sum(row["pairs"] for row in log)
    losses = [row["loss"] for row in log if row["pairs"] and math.isfinite(row["loss"])][-50:]
    texts = [row["text_loss"] for row in log if row["texts"]][-50:]
    dropped = {"bad row": sum(row["bad_rows"] for row in log),
               f"longer than {cfg.pack_tokens} tokens": sum(row["too_long"] for row in log)}
    if log and not pairs and not texts:
        raise ValueError(f"not one pair could be used, all were dropped: {dropped}")
    shuffled = shuffle_images(held, cfg.seed)
    some = held or [Comparison("?", ["a", "b"])] * (cfg.kind != "think")  # sharded, it can write nothing: make_model
    scores = score_over_ranks(model.eval(), some, cfg.pack_tokens, cfg.on_bad_row, "held out")
    if not all(math.isfinite(sum(score.rewards)) for score in scores if isinstance(score, Score)):
        raise ValueError("the rewards are not finite, so no model is saved; start anew with a lower --lr")
    blind = score_over_ranks(model, shuffled, cfg.pack_tokens, cfg.on_bad_row, "images shuffled")
    parts, drawn = accuracy_by_category(held, scores), not cfg.data and not cfg.eval_data
    summary = {
        "accuracy_by_category": {name: round(value, 4) for name, (value, _) in parts.items()},
        "n_by_category": {name: n for name, (_, n) in parts.items()},
        "accuracy": round(accuracy(held, scores), 4) if parts else None,
        "accuracy_images_shuffled": round(accuracy(shuffled, blind), 4) if shuffled else None,
        "n": sum(n for _, n in parts.values()), "n_comparisons": len(held), "critiques": model.critiques_from,
        "final_loss": fmean(losses) if losses else None, "final_text_loss": fmean(texts) if texts else None,
        "steps": len(log), "pairs_seen": pairs, "dropped": dropped,
        "bad_gradients": sum(not math.isfinite(row["grad_norm"]) for row in log),
        "parameters": sum(p.numel() for p in model.parameters()), "world_size": dist.get_world_size(),
        "seconds": round(time.time() - begun, 1)}
    weights = gathered(model.state_dict())
    if dist.get_rank() == 0:
        model.save_pretrained(out, merged(weights))
        loss = {"training loss": curve(log, "loss")} | ({"of texts": curve(log, "text_loss")} if texts else {})
        right = {"training pairs": curve(log, "accuracy"), "held out": curve(log, "eval_accuracy")}
        draw_curves(out / "curve.svg", str(out), [
            ("loss", loss, {"log 2": LOG2}, None), ("accuracy", right, {"chance": 0.5}, 1),
            ("margin", {"mean margin": curve(log, "margin")}, {}, None)])
        write_text(out / "summary.json", json.dumps(summary | {"config": asdict(cfg)}, indent=1) + "\n")
        remove_checkpoints(out)
    say("\n".join(f"  {name:<26}{value}" for name, value in summary.items()))
    if shuffled:
        say(f"with the images shuffled: {'one half for a model that looks' if drawn else 'what the texts alone tell'}")
    say(f"the reward model and summary.json are in {out}. Next:\n  python evaluate.py --model {out}"
        + (f"\n  python rl_demo.py --reward_model {out}" if drawn else " --data FOLDER"))
    if len(losses) < 50 or summary["final_loss"] < 0.98 * LOG2:
        return 0
    say("train.py: the loss ended at log 2 or above, nothing was learnt. Look at the data (python data.py show DIR): "
        "are chosen and rejected swapped? Then at --lr", sys.stderr)
    return 1

def curve(log: list[dict], name: str) -> list[tuple[int, float]]:
    """(last step, mean) of every fiftieth of the steps in which a figure was known."""
    log = [row for row in log if row.get(name) is not None]
    width = max(len(log) // 50, 1)
    parts = [log[i:i + width] for i in range(0, len(log), width)]
    return [(part[-1]["step"], fmean(row[name] for row in part)) for part in parts]

def draw_curves(file: Path, title: str, panels: list) -> str:
    """Writes and returns an SVG picture, or says how to get one. A panel: (heading, {name: [(x, y), ...]}, {name: y of
    a dashed line}, where the y axis ends or None); it begins at zero, unless a curve goes below."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        say(f"no {file.name}: pip install matplotlib draws it")
        return ""
    with matplotlib.rc_context({"svg.fonttype": "none", "text.parse_math": False}):  # a $ in a name is a $
        figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
        figure.suptitle(title)
        for axes, (heading, curves, dashed, top) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            axes.set_title(heading)
            for name, points in curves.items():
                axes.plot([x for x, _ in points], [y for _, y in points], label=name)
            for name, y in dashed.items():
                axes.axhline(y, color="grey", linestyle="--", label=name)
            axes.set_xlim(left=0)
            axes.set_ylim(min(axes.dataLim.y0, 0), top)
            axes.legend()
        with warnings.catch_warnings(action="ignore"):  # a font lacks a character that the reader's has
            figure.savefig(picture := io.StringIO(), format="svg")
    write_text(file, picture.getvalue())
    return picture.getvalue()

# The command line ----------------------------------------------------------------------------------------------------
def command_line(main, Config, script: str) -> None:
    """Flags -> Config -> main -> exit status. What a user can mend is said in one line, and so is the loss of a rank;
    any other error is a mistake of ours, and keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for terminals that do not know a character
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process at once; see stop_signals
    status = 1
    try:
        (cfg,) = HfArgumentParser(Config, prog=script, exit_on_error=False).parse_args_into_dataclasses()
        ended = main(cfg.resolved() if hasattr(cfg, "resolved") else cfg) or 0
        end_processes()
        status = ended
    except (ValueError, OSError, argparse.ArgumentError) as error:
        complain(script, str(error))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|NCCL|onnection (closed|reset)", str(error)):
            raise
        complain(script, f"another rank ended (its message is above), or the network failed: {str(error)[:200]}")
    sys.exit(status)

def complain(script: str, message: str) -> None:
    """One line on standard error, with the rank if it is not the first."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    tqdm.write(f"{script}{f', rank {rank}' if rank else ''}: {' '.join(message.split())}", file=sys.stderr)

if __name__ == "__main__":
    command_line(main, Config, "train.py")
