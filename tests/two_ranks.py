"""What the tests run on two ranks: steps, forwards and whole runs. Argument: a folder with one of each script,
SCRIPT/settings.json, which takes the results. In-process, `gradient` is the same with one rank.

The ranks are forks, told what torchrun tells its workers, and torch is loaded once; torchrun is in two_nodes.py."""
import json
import multiprocessing.connection
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from conftest import draw_nothing, real_curves  # which puts the scripts on the path
import evaluate
import rl_demo
import train
import two_ranks_rl
from data import Order, read_comparisons
from model import Comparison, RewardModel, hidden_states, pack, recompute_activations
from train import Config, distribute, gather, load_step, take_step
from transformers import HfArgumentParser


class KeepGradient:
    """In the place of an optimiser: its step keeps the gradient."""

    def __init__(self, model):
        self.model, self.param_groups = model, [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def step(self):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.copy_(p.grad)  # the gathered weights of a model whose weights are its gradients
        self.gradient = train.gathered({name: p for name, p in self.model.named_parameters() if p.requires_grad})

    def zero_grad(self, set_to_none):
        pass


def gradient(backbone, folder, pack_tokens=240, shard="none", lora=0, paradigm="naive", batch_size=64):
    """The gradient of the first step of what is trained, by name, the sums of `take_step`, and (pairs, packs, images,
    texts) of each rank. In fp64, where rounding hides no mistake: in fp32 the sums of one step, taken in another order,
    differ by 2e-6."""
    cfg = Config(lr=1.0, batch_size=batch_size, pack_tokens=pack_tokens, max_pixels=112 * 112, clip=1e9)
    torch.manual_seed(0)
    raw = RewardModel.from_backbone(backbone, paradigm=paradigm).train()
    if lora:
        train.add_lora(raw, lora, vision=True)
        for name, p in raw.named_parameters():
            p.data = p.data.normal_(std=1e-2) if name.endswith("lora_b") else p.data
    raw.double()
    rows = read_comparisons(folder)
    share = load_step(0, Order([rows.pairs], [1.0], batch_size, 0), [rows], raw.processor, cfg)
    if shard != "none":
        recompute_activations(raw.backbone)  # the two together, as for the 7B
    model = distribute(raw, torch.device("cpu"), shard, None)
    counts = gather([share.pairs, len(share.packs), sum(len(p.image_grid_thw) for p in share.packs), share.texts])
    filler = pack([Comparison("?", ["a", "b"], [(0, 1)])], raw.processor)
    keep = KeepGradient(raw)
    sums, _ = take_step(model, keep, share.packs, filler, int(counts[:, 1].max()), int(counts[:, 0].sum()),
                        int(counts[:, 3].sum()), cfg)
    return keep.gradient, gather(sums).sum(dim=0), counts


def rewards_in_bf16(backbone, shard: str, lora=0):
    """Rewards (and with `lora` the gradient's norm) as a GPU computes them, products in bf16 and the rest in fp32,
    after an update of the norms' weights, of the biases and of the embedding that bf16 could not hold."""
    torch.manual_seed(0)
    model = RewardModel.from_backbone(backbone, dtype=torch.bfloat16 if lora else torch.float32).train()
    if lora:
        train.add_lora(model, lora, vision=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                p.normal_(std=1e-2)
            if "norm" in name or "embed" in name or "bias" in name:
                p.mul_(1 + 1e-3)
    packed = pack([Comparison("What?", ["red", "blue", "green and white"])], model.processor)
    model.forward = lambda batch: model.head(hidden_states(model.backbone, batch)[batch.last_token])
    if shard != "none":
        model = distribute(model, torch.device("cpu"), "all", torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        rewards = model(packed)
    rewards.sum().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained]) if lora else torch.zeros(())
    return rewards.detach().float(), float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def stop_after(steps: int):
    """A learning_rate that sends SIGTERM in the step after so many, on this rank."""
    def rate(step, *rest):
        if step == steps:
            signal.raise_signal(signal.SIGTERM)
        return original(step, *rest)

    original = train.learning_rate
    return rate


def gradient_in_paradigm(writer, folder, paradigm, shard="none"):
    """Of a few pairs: where a judge reads each pair twice, they are packs enough for every rank to have several."""
    return gradient(writer, folder, 400, shard, paradigm=paradigm, batch_size=16)


def read_flags(script, words):
    """The words of a command line, which is noted in what a run leaves."""
    sys.argv = [f"{script.__name__}.py", *words]
    (cfg,) = HfArgumentParser(script.Config).parse_args_into_dataclasses()
    return cfg.resolved() if hasattr(cfg, "resolved") else cfg


def of_evaluate(here, words):
    evaluate.main(read_flags(evaluate, words))


def of_rl_demo(here, words):
    two_ranks_rl.stop_and_resume(read_flags(rl_demo, words))


def full_disk(here, rank):
    """What is said and left where the second rank cannot write its part of the second checkpoint; and whether a folder
    is shared, and one that only looks so."""
    folders = [here / "shared", here / f"own-{rank}"]
    folders[1].mkdir()
    (folders[1] / train.LOCK).write_text("of a run that was killed")
    shared = [train.claim_folder(folder, False, False) for folder in folders]
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([(f"of rank {rank}", p)], fused=True)
    train.save_checkpoint(folders[0], optimizer, {"step": 1}, in_parts=True)
    real = train.HuggingFaceStorageWriter.write_data
    if rank == 1:
        train.HuggingFaceStorageWriter.write_data = lambda *_: (_ for _ in ()).throw(OSError("No space left on device"))
    try:
        train.save_checkpoint(folders[0], optimizer, {"step": 2}, in_parts=True)
    except OSError as error:
        said = str(error)
    train.HuggingFaceStorageWriter.write_data = real
    dist.barrier()
    return (said, [file.name for file in folders[0].glob("*checkpoint*")]), shared


def of_train(here, told):
    rank, drawn = dist.get_rank(), told["drawn"]
    results = {"steps": [gradient(told["backbone"], drawn, shard=shard) for shard in ("none", "all")],
               "lora": [gradient(told["backbone"], drawn, shard=shard, lora=4) for shard in ("none", "node")],
               "paradigms": {name: [gradient_in_paradigm(writer, drawn, name, shard) for shard in ("none", "all")]
                             for name, writer in told["writers"].items()},
               "bf16": [rewards_in_bf16(told["backbone"], shard) for shard in ("none", "all")],
               "bf16 lora": [rewards_in_bf16(told["backbone"], shard, lora=4) for shard in ("none", "all")]}
    results["full disk"] = full_disk(here, rank)
    cfg = Config(**told["config"])
    # Told to stop on the second rank alone, and resumed
    two = replace(cfg, out=str(here / "two"))
    if rank == 1:
        original, train.learning_rate = train.learning_rate, stop_after(2)
    status = [train.main(two)]
    if rank == 1:
        train.learning_rate = original
    status.append(train.main(replace(two, resume=True)))
    # The same sharded; each rank has a disk of its own
    sharded = replace(cfg, out=str(here / f"sharded-{rank}"), shard="all", eval_every=3)
    if rank == 1:
        train.learning_rate = stop_after(2)
    status.append(train.main(sharded))
    # The same on a disk that both see, left unfinished: each rank writes its part
    status.append(train.main(replace(sharded, out=str(here / "parts"), save_every=1)))
    if rank == 1:
        train.learning_rate = original
    status.append(train.main(replace(sharded, resume=True)))
    held = read_comparisons(drawn)
    model = RewardModel.from_pretrained(here / "two")
    results |= {"status": status, "rewards": [score.rewards for score in train.score_over_ranks(model, held, 128)]}
    if rank == 0:
        torch.save(results, here / "results.pt")


def on_rank(rank, port, root):
    told = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in told.items()}
    train.start_processes()
    for name, run in {"evaluate": of_evaluate, "rl_demo": of_rl_demo, "train": of_train}.items():
        if (settings := root / name / "settings.json").exists():
            with real_curves(draw_nothing):
                run(root / name, json.loads(settings.read_text()))
    dist.barrier()
    if rank == 1:
        os._exit(0)  # as if it were killed: no word to the other
    sys.argv[1:] = []
    try:
        train.command_line(lambda _: train.gather([0.0]), Config, "train.py")
    except SystemExit as end:
        os._exit(0 if end.code == 1 else 1)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ranks = [processes.Process(target=on_rank, args=(rank, port, Path(sys.argv[1]))) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    while running := [rank for rank in ranks if rank.is_alive()]:
        multiprocessing.connection.wait([rank.sentinel for rank in running])
        if any(rank.exitcode for rank in ranks):  # as torchrun does: the others would wait for it
            for rank in ranks:
                rank.kill()
    sys.exit(any(rank.exitcode for rank in ranks))
