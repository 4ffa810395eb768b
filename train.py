"""Trains a multimodal reward model on preference pairs: BaseReward (arXiv 2509.16127), sections 3 and 4, in one plain PyTorch loop.

    torchrun train.py                                                   a tiny model on drawn pictures: two CPU cores, under five minutes
    torchrun train.py --data FOLDER --out runs/mine                     the same tiny model on your own rows (format: data.py)
    torchrun --nproc_per_node 8 train.py --backbone Qwen/Qwen2.5-VL-7B-Instruct --shard --gradient_checkpointing \\
             --data FOLDER OTHER:2.0 --out runs/7b                      the real thing
    torchrun train.py --resume                                          goes on where a stopped run left off

`python train.py` is the same with one process. What it writes into --out:

    reward model      config.json, model*.safetensors, head.safetensors, reward_config.json, tokenizer ...: RewardModel.from_pretrained(out)
    metrics.jsonl     one line a step; curve.svg is its picture
    summary.json      accuracy on held-out comparisons, by category, and with the images shuffled: a model that looks falls, on drawn
                      pictures to one half, on yours to what the texts alone tell
    checkpoint.pt     weights, optimiser and step of an unfinished run

One step, whatever the number of ranks: its pairs are fixed by (seed, step) alone; the loss is the sum over all of them on all ranks
divided by their number, however they fall into packs, micro-steps and ranks.

Where this differs from the paper, or where the paper is silent. Optimiser, schedule, epochs, weight decay, maximum length, resolution and
whether the vision tower is trained are not given there. We take AdamW (0.9, 0.95), 5% warm-up then cosine to zero, one epoch, no decay,
16,384 tokens a comparison, 1280 tokens an image as transformers has it, and train everything. Rate and batch (3e-6, 128 pairs) are
the paper's.
"""
import contextlib
import itertools
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from data import BadRow, Order, StopSignal, World, claim_folder, read_comparisons, setup, synthetic, write_state, write_text
from evaluate import accuracy, draw_curves, score_all, shuffle_images
from model import Comparison, RewardModel, encode, fill_packs, pack, pairwise_loss, recompute_activations, tiny_backbone

LOG2 = math.log(2)  # the loss of a model that knows nothing
LEFTOVER = ("metrics.jsonl", "tiny_backbone", "checkpoint.pt.partial")  # of a run that ended before its first checkpoint


@dataclass(frozen=True)
class Config:
    backbone: str = HfArg(default="tiny", help="'tiny' (made on the spot), a folder, or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct")
    data: list[str] = HfArg(default_factory=list, help="data folders, with a weight if wanted: a b:2.0; none: drawn pictures (data.py)")
    eval_data: list[str] = HfArg(default_factory=list, help="folders for the final accuracy; none: --data's held_out.jsonl, or rows of it")
    eval_size: int = HfArg(default=800, help="comparisons for the final accuracy: drawn, from held_out.jsonl, or a tenth of --data at most")
    out: str = HfArg(default="runs/default", help="run folder; the final reward model lies in it")
    overwrite: bool = HfArg(default=False, help="delete what --out holds and start anew")
    resume: bool = HfArg(default=False, help="go on from the checkpoint in --out")
    seed: int = HfArg(default=0, help="of the head, of the order of the data, and of the tiny backbone and its pictures")
    train_size: int = HfArg(default=14000, help="number of drawn comparisons, where --data is not given")
    batch_size: int | None = HfArg(default=None, help="pairs per optimiser step over all ranks; 128 (paper), 32 for tiny")
    lr: float | None = HfArg(default=None, help="peak learning rate; 3e-6 (paper, section 4.1), 6e-4 for tiny")
    epochs: float = HfArg(default=1.0, help="passes over the data (paper: not given)")
    max_steps: int | None = HfArg(default=None, help="stop after so many steps; the schedule ends there too")
    warmup: float = HfArg(default=0.05, help="share of the steps in which the learning rate rises from 0 (paper: not given)")
    weight_decay: float = HfArg(default=0.0, help="AdamW's decoupled decay (paper: not given)")
    clip: float = HfArg(default=1.0, help="largest gradient norm (paper: not given)")
    head_layers: int = HfArg(default=2, help="linear layers of the reward head (Table 2: 2 is best)")
    head_activation: str = HfArg(default="silu", help="between them: silu, tanh, relu or none (Table 2: silu is best)")
    zero_coef: float = HfArg(default=0.0, help="lambda of Algorithm 1's zero-coefficient term (section 4.3: it hurts)")
    length_norm: bool = HfArg(default=False, help="Algorithm 1's division of rewards by log(length + 1) (section 4.3: it hurts)")
    freeze_vision: bool = HfArg(default=False, help="do not train the vision tower and its merger (paper: not given)")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations in the backward pass: less memory, a third more time")
    shard: bool = HfArg(default=False, help="split weights, gradients and optimiser over the ranks (FSDP2); the 7B needs it on 80 GB GPUs")
    max_pixels: int | None = HfArg(default=None, help="most pixels of an image, 28 x 28 a token; 1003520 (transformers'), 12544 for tiny")
    pack_tokens: int | None = HfArg(default=None, help="tokens in a pack; a longer comparison is dropped, never cut; 16384, 1024 for tiny")
    on_bad_row: str = HfArg(default="stop", help="stop at a row that cannot be used, or skip it and count it")
    eval_every: int = HfArg(default=200, help="steps between accuracies on 100 held-out comparisons; 0: only at the end")
    save_every: int = HfArg(default=500, help="steps between checkpoints; 0: only when stopped")

    def resolved(self) -> "Config":
        """With the defaults that depend on the backbone filled in, and nonsense refused."""
        own = (dict(lr=6e-4, batch_size=32, max_pixels=112 * 112, pack_tokens=1024) if self.backbone == "tiny" else
               dict(lr=3e-6, batch_size=128, max_pixels=1280 * 28 * 28, pack_tokens=16384))
        cfg = replace(self, **{key: value for key, value in own.items() if getattr(self, key) is None})
        for name in ("batch_size", "lr", "epochs", "clip", "max_pixels", "pack_tokens"):
            if getattr(cfg, name) <= 0:
                raise ValueError(f"--{name} {getattr(cfg, name)} must be above zero")
        if cfg.on_bad_row not in ("stop", "skip"):
            raise ValueError(f"--on_bad_row {cfg.on_bad_row!r}: want stop or skip")
        return cfg


# ---------------------------------------------------------------------------------------------------------------------------------
# Data


def open_data(cfg: Config) -> tuple[list, list, list[float]]:
    """(training sets, held-out comparisons, weight of each set). The embedded default is one set drawn with --seed."""
    if not cfg.data:
        return [synthetic(cfg.train_size, cfg.seed)], synthetic(cfg.eval_size, held_out=True), [1.0]
    sets, weights = [], []
    for item in cfg.data:
        folder, colon, weight = item.rpartition(":")
        if not colon or os.path.exists(item):
            folder, weight = item, "1"
        try:
            weights.append(float(weight))
        except ValueError:
            raise ValueError(f"--data {item}: {weight!r} is not a weight; want FOLDER or FOLDER:2.0") from None
        if not 0 < weights[-1] < 1000:
            raise ValueError(f"--data {item}: the weight must be above zero")
        sets.append(read_comparisons(folder))
    held = [read_comparisons(folder) for folder in cfg.eval_data]
    if not held:
        total = sum(len(rows) for rows in sets)
        for s, rows in enumerate(sets):  # each set gives its share, spread evenly over its rows
            n, apart = math.ceil(cfg.eval_size * len(rows) / total), rows.folder / "held_out.jsonl"
            if apart.is_file():  # whole prompts, from data.py --hold_out: none of them is in training with other responses
                rest = read_comparisons(apart)
                held.append(rest.only(spread(n, len(rest))))
            else:
                chosen = set(spread(min(n, len(rows) // 10), len(rows)))
                held.append(rows.only(sorted(chosen)))
                sets[s] = rows.only([i for i in range(len(rows)) if i not in chosen])
    return sets, [c for rows in held for c in usable(rows, cfg.on_bad_row)], weights


def spread(n: int, rows: int) -> list[int]:
    """At most n of so many rows, at even distances."""
    n = min(n, rows)
    return [i * rows // n for i in range(n)]


def usable(rows, on_bad_row: str):
    """The rows that can be read; the first that cannot be stops the run, unless told to skip it."""
    for i in range(len(rows)):
        try:
            yield rows[i]
        except BadRow:
            if on_bad_row == "stop":
                raise


# ---------------------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(out: Path, model, optimizer, world: World, state: dict) -> None:
    """Writes out/checkpoint.pt under a temporary name and moves it into place: a kill at any moment leaves the previous one or this one.

    Gathering is done by all ranks, writing by the first; a failed write is an OSError on all of them.
    """
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = state | {"model": get_model_state_dict(model, options=full),
                     "optimizer": get_optimizer_state_dict(model, optimizer, options=full)}
    failure = write_state(out / "checkpoint.pt", state) if world.rank == 0 else ""
    if failure := next(filter(None, world.gather_objects(failure)), ""):
        raise OSError(failure)


def load_checkpoint(file: Path, model, optimizer, cfg: Config) -> dict:
    """Puts weights and optimiser back and returns the rest. ValueError if it was made under settings that shape the training otherwise."""
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    free = {"out", "overwrite", "resume", "eval_data", "eval_every", "save_every", "gradient_checkpointing", "shard", "on_bad_row"}
    now = asdict(cfg)
    old = {key: value for key, value in state["config"].items() if key not in free}
    if changed := [f"{key} was {value!r}, is {now.get(key)!r}" for key, value in old.items() if now.get(key) != value]:
        raise ValueError(f"{file} belongs to another run: {'; '.join(changed)}. Use the same flags, or another --out")
    try:
        full = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, state["model"], options=full)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=full)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{file} does not fit this model: {' '.join(str(error).split())[:200]}") from None
    return {key: value for key, value in state.items() if key not in ("model", "optimizer")}


# ---------------------------------------------------------------------------------------------------------------------------------
# The loop's parts


def learning_rate(step: int, steps: int, cfg: Config) -> float:
    """Rises in a straight line over the warm-up, then falls as half a cosine towards zero, which the step after the last would have.

    >>> [round(learning_rate(s, 10, Config(lr=1.0, warmup=0.2)), 2) for s in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    rise = math.ceil(cfg.warmup * steps)
    if step < rise:
        return cfg.lr * (step + 1) / rise
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def load_step(step: int, order: Order, sets: list, model: RewardModel, cfg: Config, world: World, threads) -> dict:
    """This rank's share of a step, read and encoded on threads: its packs, how many pairs and tokens they hold, what was dropped by
    reason, and the first bad row's message."""

    def encode_row(name):
        rows, i = sets[name[0]], name[1]
        try:
            return encode(rows[i], model.tokenizer, model.image_processor)
        except BadRow as error:
            return error
        except ValueError as error:
            return rows.bad_row(i, error) if hasattr(rows, "bad_row") else BadRow(str(error))

    encoded = list(threads.map(encode_row, order.step(step)[world.rank::world.world_size]))
    bad = [e for e in encoded if isinstance(e, BadRow)]
    good = [e for e in encoded if not isinstance(e, BadRow) and e.tokens <= cfg.pack_tokens]
    long = len(encoded) - len(bad) - len(good)
    packs = [pack([good[i] for i in members]) for members in fill_packs([e.tokens for e in good], cfg.pack_tokens)]
    return {"packs": packs, "pairs": sum(len(e.pairs) for e in good), "tokens": sum(e.tokens for e in good),
            "dropped": {"bad row": len(bad), f"longer than {cfg.pack_tokens} tokens": long}, "bad": str(bad[0]) if bad else ""}


def take_step(model, packs: list, filler, cfg: Config, world: World, micro_steps: int, pairs_in_step: int) -> list[float]:
    """Forward and backward over this rank's packs. Returns the sums of [loss of equation (1), right pairs, margins] over its pairs.

    All ranks make the same number of micro-steps: one that has fewer packs runs `filler` at weight 0, since a sharded model needs
    every rank in every forward. DDP exchanges gradients at the last micro-step only; FSDP at each, or every rank would keep whole ones,
    31 GB for the 7B. Both average over the ranks, while each rank's loss is already divided by the pairs of all: hence the factor
    world_size.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for micro in range(micro_steps):
        batch, weight = (packs[micro], 1.0) if micro < len(packs) else (filler, 0.0)
        batch = batch.to(world.device)
        last = micro == micro_steps - 1
        wait = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
        with wait:  # the forward goes through the wrapper, inside the same context as its backward
            rewards = model(batch)
            loss = pairwise_loss(rewards, batch.pairs, cfg.zero_coef, cfg.length_norm, batch.response_length, pairs_in_step)
            (loss * (weight * world.world_size)).backward()
        if weight:
            margins = rewards.detach()[batch.pairs[:, 0]] - rewards.detach()[batch.pairs[:, 1]]
            plain = pairwise_loss(rewards.detach(), batch.pairs, pairs_in_step=1)
            sums += torch.stack([plain, (margins > 0).sum(), margins.sum()]).double().cpu()
    return sums.tolist()


def shard_model(model: RewardModel, world: World) -> None:
    """FSDP2: every rank keeps 1/world_size of each layer's weights, gradients and moments and gathers a layer when it is needed."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    for p in model.head.parameters():  # drawn by each rank for itself; the backbone was read by all from the same file
        dist.broadcast(p.data, 0)
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    # Inputs are left as they are: autocast casts where a product is computed, and what flows between the layers stays fp32, as unsharded
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if world.device.type == "cuda" else None, reduce_dtype=torch.float32,
                                cast_forward_inputs=False)
    backbone = model.backbone
    decoder = getattr(backbone, "language_model", backbone)
    for layer in [*decoder.layers, *(backbone.visual.blocks if hasattr(backbone, "visual") else ())]:
        fully_shard(layer, mesh=mesh, mp_policy=half)
    fully_shard(model.head, mesh=mesh)  # fp32, as everywhere
    fully_shard(model, mesh=mesh, mp_policy=half)


# ---------------------------------------------------------------------------------------------------------------------------------


def main(cfg: Config, world: World) -> int:
    # 1  Process and seed
    out, begun, first = Path(cfg.out), time.time(), world.rank == 0
    say = (lambda *text: tqdm.write(" ".join(map(str, text)))) if first else (lambda *text: None)
    stop = StopSignal()
    problem = claim_folder(out, cfg.overwrite, cfg.resume, "metrics.jsonl", LEFTOVER) if first else ""
    if first and cfg.resume and (out / "summary.json").exists():
        problem = problem or f"{out} holds a finished run: nothing to resume. Start another with a new --out, or with --overwrite"
    if problem := next(filter(None, world.gather_objects(problem)), ""):
        raise ValueError(problem)
    torch.manual_seed(cfg.seed)

    # 2  Data
    sets, held, weights = open_data(cfg)
    order = Order([s.pairs if hasattr(s, "pairs") else [len(c.pairs) for c in s] for s in sets], weights, cfg.batch_size, cfg.seed)
    steps = order.steps(cfg.epochs) if cfg.max_steps is None else cfg.max_steps
    if not held:
        say("fewer than ten rows, so none is held out and there will be no accuracy; give --eval_data FOLDER")

    # 3  Model
    path = cfg.backbone
    if path == "tiny":
        path = out / "tiny_backbone"
        if first:
            sample = [f"{c.prompt} {' '.join(c.responses)}" for s in sets for c in itertools.islice(usable(s, cfg.on_bad_row), 2000)]
            tiny_backbone(path, sample, cfg.seed)
        world.barrier()
    raw_model = RewardModel.from_backbone(path, cfg.head_layers, cfg.head_activation, cfg.max_pixels).to(world.device).train()
    if cfg.freeze_vision and hasattr(raw_model.backbone, "visual"):
        raw_model.backbone.visual.requires_grad_(False)
    if cfg.gradient_checkpointing:
        recompute_activations(raw_model.backbone)
    parameters = sum(p.numel() for p in raw_model.parameters())
    model, judges = raw_model, world
    if cfg.shard and world.world_size > 1:
        shard_model(raw_model, world)
        judges = replace(world, rank=0, world_size=1)  # every rank scores everything: a sharded forward needs all of them each time
    elif world.world_size > 1:
        model = DistributedDataParallel(raw_model, device_ids=[world.local_rank] if world.device.type == "cuda" else None)

    # 4  Optimiser and resume
    trained = [p for p in raw_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=world.device.type == "cuda")
    state = {"step": 0, "pairs_seen": 0, "seconds": 0.0, "dropped": {}, "bad_gradients": 0, "bad_in_a_row": 0, "recent_loss": []}
    if cfg.resume and (out / "checkpoint.pt").exists():
        state |= load_checkpoint(out / "checkpoint.pt", model, optimizer, cfg) | {"bad_in_a_row": 0}
        if state.get("rows") != (rows := [len(s) for s in sets]):
            raise ValueError(f"{out}/checkpoint.pt was trained on {state.get('rows')} rows, now there are {rows}: the order of the data "
                             f"would be another. Give the same --data and --eval_data, or another --out")
        say(f"going on from step {state['step']}")
    elif cfg.resume:
        say(f"{out} holds no checkpoint yet: starting from the beginning")
    state |= {"config": asdict(cfg), "rows": [len(s) for s in sets]}
    metrics = keep_metrics(out / "metrics.jsonl", state["step"]) if first else None
    say(f"{json.dumps(asdict(cfg))}\n{parameters:,} parameters · {sum(map(len, sets)):,} comparisons to train on, {len(held)} held out · "
        f"{steps} steps of about {cfg.batch_size} pairs over {world.world_size} rank{'s' * (world.world_size > 1)} · lr {cfg.lr:g} · "
        f"log 2 is {LOG2:.3f}")

    # 5  The loop
    threads, ahead = ThreadPoolExecutor(), ThreadPoolExecutor(1)  # `ahead` reads the next step while this one computes
    arguments = (order, sets, raw_model, cfg, world, threads)
    filler = pack([Comparison("?", ["a", "b"], [(0, 1)])], raw_model.tokenizer)
    bar = tqdm(total=steps, initial=state["step"], disable=not first, dynamic_ncols=True, mininterval=0.5, desc="train")
    pending, reason, code = ahead.submit(load_step, state["step"], *arguments), "", 0
    try:
        while state["step"] < steps:
            step, started = state["step"], time.time()
            batch = pending.result()
            pending = ahead.submit(load_step, step + 1, *arguments)
            # What every rank must agree on: pairs, micro-steps, whether somebody was told to stop or met a bad row.
            bad = bool(batch["bad"]) and cfg.on_bad_row == "stop"
            shared = world.gather([batch["pairs"], len(batch["packs"]), stop.number, bad])
            pairs_in_step, micro_steps = int(shared[:, 0].sum()), int(shared[:, 1].max())
            if shared[:, 3].any():
                reason, code = next(filter(None, world.gather_objects(batch["bad"]))), 1
            elif shared[:, 2].any():
                reason, code = "told to stop", 128 + int(shared[:, 2].max())
            if reason:
                break
            dropped = world.gather(list(batch["dropped"].values())).sum(dim=0).tolist()
            state["dropped"] = {key: state["dropped"].get(key, 0) + int(n) for key, n in zip(batch["dropped"], dropped)}

            # learning rate -> micro-steps -> clip -> step
            lr = learning_rate(step, steps, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums = take_step(model, batch["packs"], filler, cfg, world, micro_steps, pairs_in_step) if pairs_in_step else [0.0] * 3
            norm = torch.nn.utils.clip_grad_norm_(trained, cfg.clip)
            norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of the exchanged gradient: the same on all ranks
            if math.isfinite(norm):
                if pairs_in_step:
                    optimizer.step()
                state["bad_in_a_row"] = 0
            else:
                state["bad_gradients"] += 1
                state["bad_in_a_row"] += 1
            optimizer.zero_grad(set_to_none=True)
            state |= {"step": step + 1, "pairs_seen": state["pairs_seen"] + pairs_in_step}

            # log -> evaluate -> checkpoint
            sums = world.gather([*sums, batch["tokens"]]).sum(dim=0).tolist()
            n, seconds = max(pairs_in_step, 1), time.time() - started
            row = {"step": step + 1, "loss": sums[0] / n, "accuracy": sums[1] / n, "margin": sums[2] / n, "grad_norm": norm,
                   "lr": lr, "pairs": pairs_in_step, "tokens": int(sums[3]), "seconds": round(seconds, 3),
                   "dropped": sum(state["dropped"].values())}
            if pairs_in_step and math.isfinite(row["loss"]):
                state["recent_loss"] = (state["recent_loss"] + [row["loss"]])[-50:]
            if held and cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < steps:
                some = [held[i] for i in spread(100, len(held))]
                try:
                    rewards = score_all(raw_model.eval(), some, judges, cfg.pack_tokens, on_bad_row=cfg.on_bad_row)
                except BadRow as error:  # known to all ranks alike; the steps so far are not lost
                    reason, code = str(error), 1
                    break
                row["eval_accuracy"] = accuracy(some, rewards)
                raw_model.train()
                say(f"step {step + 1}: accuracy {row['eval_accuracy']:.3f} on {len(some)} held-out comparisons")
            if first:
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                bar.set_postfix_str(f"loss {row['loss']:.3f} (log 2 {LOG2:.3f}) acc {row['accuracy']:.2f} margin {row['margin']:.2f} "
                                    f"norm {norm:.1f} lr {lr:.1e} {n / seconds:.0f} pairs/s {row['tokens'] / seconds:.0f} tok/s "
                                    f"{memory(world):.1f} GB", refresh=False)
                bar.update()
            if state["bad_in_a_row"] >= 10:
                reason, code = ("ten steps in a row had a gradient that is not finite; look at metrics.jsonl for where the loss rose, "
                                "then start anew with a lower --lr or a longer --warmup"), 1
                break
            if cfg.save_every and ((step + 1) % cfg.save_every == 0 or step + 1 == steps):
                save_checkpoint(out, model, optimizer, world, state | {"seconds": state["seconds"] + time.time() - begun})
        if reason:
            bar.close()
            if state["step"]:
                save_checkpoint(out, model, optimizer, world, state | {"seconds": state["seconds"] + time.time() - begun})
            if first:
                how = f"\n{state['step']} steps are saved in {out}; to go on: the same command with --resume" if state["step"] else ""
                print(f"train.py: {reason}{how}", file=sys.stderr)
            return code
    finally:
        ahead.shutdown(wait=False, cancel_futures=True), threads.shutdown(wait=False, cancel_futures=True)
        bar.close()

    # 6  Final report
    state["seconds"] += time.time() - begun
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state["pairs_seen"]:
        raise ValueError(f"not one pair could be used, all were dropped: {state['dropped']}")
    failure = ""
    if first:
        try:
            raw_model.save_pretrained(out, full)
        except OSError as error:
            failure = f"cannot save the reward model: {error}; the last checkpoint is intact, --resume goes on from it"
    if failure := next(filter(None, world.gather_objects(failure)), ""):
        raise OSError(failure)
    raw_model.eval()
    rewards = score_all(raw_model, held, judges, cfg.pack_tokens, "held-out" if first else "", cfg.on_bad_row)
    shuffled = shuffle_images(held, cfg.seed)
    blind = score_all(raw_model, shuffled, judges, cfg.pack_tokens, "images shuffled" if first else "", cfg.on_bad_row)
    blind = accuracy(shuffled, blind) if shuffled else None
    by_category = accuracy(held, rewards, by_category=True)
    summary = {"accuracy": accuracy(held, rewards) if held else None,
               "accuracy_by_category": {name: value for name, (value, _) in by_category.items()},
               "accuracy_images_shuffled": blind, "n": sum(n for _, n in by_category.values()),
               "n_by_category": {name: n for name, (_, n) in by_category.items()}, "n_comparisons": len(held),
               "final_loss": sum(state["recent_loss"]) / max(len(state["recent_loss"]), 1), "seconds": round(state["seconds"], 1),
               "steps": state["step"], "pairs_seen": state["pairs_seen"], "parameters": parameters, "dropped": state["dropped"],
               "bad_gradients": state["bad_gradients"], "world_size": world.world_size, "config": asdict(cfg)}
    if not first:
        return 0
    metrics.close()
    write_curve(out)
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    (out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"\nheld-out accuracy {summary['accuracy'] if held else math.nan:.3f} on {summary['n']} pairs of {len(held)} comparisons, "
          f"after {summary['pairs_seen']} pairs in {summary['seconds']:.0f} s")
    for name, (value, n) in by_category.items():
        print(f"  {name:<12} {value:.3f}  n {n}")
    if blind is not None:
        print(f"  with the images shuffled among the prompts: {blind:.3f} (drawn pictures: a model that looks falls to one half)")
    if any(state["dropped"].values()) or state["bad_gradients"]:
        print(f"  dropped comparisons {state['dropped']}, steps skipped for a gradient that is not finite {state['bad_gradients']}")
    print(f"the reward model, summary.json and curve.svg are in {out}. Next:\n  python evaluate.py --model {out}\n"
          f"  python rl_demo.py --reward_model {out}")
    if len(state["recent_loss"]) == 50 and summary["final_loss"] > 0.98 * LOG2:
        print(f"the loss ended at log 2 or above (last 50 steps: {summary['final_loss']:.3f}): nothing was learnt. Look at the data "
              f"with `python data.py show FOLDER` (are winner and loser swapped?), then at --lr", file=sys.stderr)
        return 1
    return 0


def keep_metrics(file: Path, step: int):
    """The log opened for appending, without rows of steps after the checkpoint, which will be taken again."""
    rows = file.read_text().splitlines() if file.exists() else []
    write_text(file, "".join(row + "\n" for row in rows if row.endswith("}") and json.loads(row)["step"] <= step))
    return open(file, "a")


def write_curve(out: Path) -> None:
    """The learning curve of metrics.jsonl as out/curve.svg; training figures are means over 1/50 of the run."""
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    width = max(len(rows) // 50, 1)

    def smooth(key):
        parts = [rows[i:i + width] for i in range(0, len(rows), width)]
        return [(part[-1]["step"], sum(r[key] for r in part) / len(part)) for part in parts]

    held = [(r["step"], r["eval_accuracy"]) for r in rows if "eval_accuracy" in r]
    draw_curves(out / "curve.svg", str(out), [("loss", {"training loss": smooth("loss")}, {"log 2": LOG2}),
                                              ("accuracy", {"training pairs": smooth("accuracy"), "held out": held}, {"chance": 0.5}),
                                              ("margin", {"mean margin": smooth("margin")}, {"0": 0.0})])


def memory(world: World) -> float:
    """GB in use at the peak: on the GPU, or of this process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


if __name__ == "__main__":
    world = None
    try:
        (config,) = HfArgumentParser(Config).parse_args_into_dataclasses()
        config = config.resolved()
        world = setup()
        status = main(config, world)
        world.close()
    except (ValueError, OSError) as error:
        print(f"train.py{f', rank {world.rank}' if world and world.rank else ''}: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)
