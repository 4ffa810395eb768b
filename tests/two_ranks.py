"""What the tests run on two ranks: steps, forwards and whole runs. Argument: a folder with SCRIPT/settings.json for
each script, where the results are written. In the tests' own process `gradient` computes the same with one rank.

The ranks are forks with the environment that torchrun sets, so that torch is loaded once; two_nodes.py runs torchrun.
"""
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

from conftest import ROOT  # noqa: F401  (puts the scripts on the path)
import evaluate
import rl_demo
import train
import two_ranks_rl
from data import Order, read_comparisons
from model import Comparison, RewardModel, enable_gradient_checkpointing, hidden_states, pack
from train import Config, StopSignal, agree_on_step, all_gather, load_batch, make_dummy_pack, train_step, wrap_model
from transformers import HfArgumentParser


class KeepGradient:
    """An optimizer whose step keeps the gradient."""

    def __init__(self, model):
        self.model = model
        self.param_groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1.0}]

    def step(self):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.copy_(p.grad)  # the gathered weights of a model whose weights are its gradients
        self.gradient = train.full_state_dict({name: p for name, p in self.model.named_parameters() if p.requires_grad})

    def zero_grad(self, set_to_none):
        pass


def gradient(backbone, folder, pack_tokens=240, shard="none", lora=0, paradigm="naive", batch_size=64):
    """Of the first step: the gradient of what is trained, by name; the metrics of `train_step`; and (pairs, packs,
    images, texts) of each rank. In fp64, where rounding hides no mistake: in fp32 the sums of one step, taken in
    another order, differ by 2e-6."""
    cfg = Config(lr=1.0, batch_size=batch_size, pack_tokens=pack_tokens, max_pixels=112 * 112, clip=1e9)
    torch.manual_seed(0)
    raw_model = RewardModel.from_backbone(backbone, paradigm=paradigm).train()
    if lora:
        train.add_lora(raw_model, lora)
        for name, p in raw_model.named_parameters():
            p.data = p.data.normal_(std=1e-2) if name.endswith("lora_b") else p.data
    raw_model.double()
    rows = read_comparisons(folder)
    batch = load_batch(0, Order([rows.pair_counts], [1.0], batch_size, 0), [rows], raw_model, cfg)
    if shard != "none":
        enable_gradient_checkpointing(raw_model.backbone)  # the two together, as for the 7B
    model = wrap_model(raw_model, torch.device("cpu"), shard)
    num_images = sum(len(pack.image_grid_thw) for pack in batch.packs)
    counts = all_gather([batch.pairs, len(batch.packs), num_images, batch.lm_texts])
    plan, optimizer = agree_on_step(batch, StopSignal()), KeepGradient(raw_model)
    metrics = train_step(model, optimizer, batch, plan, make_dummy_pack(raw_model), cfg)
    return optimizer.gradient, {name: value for name, value in metrics.items() if value is not None}, counts


def rewards_in_bf16(backbone, shard: str, lora=0):
    """Rewards (and with `lora` the gradient's norm) as a GPU computes them, products in bf16 and the rest in fp32,
    after an update of the norms' weights, of the biases and of the embedding that bf16 could not hold."""
    torch.manual_seed(0)
    model = RewardModel.from_backbone(backbone, dtype=torch.bfloat16 if lora else torch.float32).train()
    if lora:
        train.add_lora(model, lora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                p.normal_(std=1e-2)
            if "norm" in name or "embed" in name or "bias" in name:
                p.mul_(1 + 1e-3)
    packed = pack([Comparison("What?", ["red", "blue", "green and white"])], model.processor)
    model.forward = lambda pack: model.read_rewards(hidden_states(model.backbone, model.processor, pack), pack)
    if shard != "none":
        model = wrap_model(model, torch.device("cpu"), "all", torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        rewards = model(packed)
    rewards.sum().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained]) if lora else torch.zeros(())
    return rewards.detach().float(), float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def stop_after(steps: int):
    """A learning_rate that sends SIGTERM in the step after so many, on this rank."""
    def rate(step, *arguments):
        if step == steps:
            signal.raise_signal(signal.SIGTERM)
        return original(step, *arguments)

    original = train.learning_rate
    return rate


def gradient_in_paradigm(checkpoint, folder, paradigm, shard="none"):
    """Of a few pairs: a judge reads each of them as a prompt, which makes several packs for every rank."""
    return gradient(checkpoint, folder, 400, shard, paradigm=paradigm, batch_size=16)


def read_flags(script, words):
    """The Config of a command line, which also is sys.argv, as a run records it."""
    sys.argv = [f"{script.__name__}.py", *words]
    (cfg,) = HfArgumentParser(script.Config).parse_args_into_dataclasses()
    return cfg.resolved() if hasattr(cfg, "resolved") else cfg


def of_evaluate(here, words):
    evaluate.main(read_flags(evaluate, words))


def of_rl_demo(here, words):
    two_ranks_rl.stop_and_resume(read_flags(rl_demo, words))


def full_disk(here, rank):
    """The error, and what is left, where the second rank cannot write its part of the second checkpoint."""
    train.prepare_run_folder(here / "full", False, False)
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([(f"of rank {rank}", p)], fused=True)
    train.save_checkpoint(here / "full", optimizer, {"step": 1})
    real = train.HuggingFaceStorageWriter.write_data
    if rank == 1:
        train.HuggingFaceStorageWriter.write_data = lambda *_: (_ for _ in ()).throw(OSError("No space left on device"))
    try:
        train.save_checkpoint(here / "full", optimizer, {"step": 2})
    except OSError as error:
        message = str(error)
    train.HuggingFaceStorageWriter.write_data = real
    dist.barrier()
    return message, [file.name for file in (here / "full").glob("*checkpoint*")]


def disk_of_each_rank(here, rank):
    """The error, and what is left, where each rank has a run folder of its own: they might lie on two machines."""
    folder = here / f"own-{rank}"
    folder.mkdir()
    (folder / train.LOCK).touch()  # of a run that was killed
    try:
        train.prepare_run_folder(folder, False, False)
    except ValueError as error:
        return str(error), [file.name for file in folder.iterdir()]


def of_train(here, settings):
    rank, drawn, backbone = dist.get_rank(), settings["drawn"], settings["backbone"]
    results = {"steps": [gradient(backbone, drawn, shard=shard) for shard in ("none", "all")],
               "lora": [gradient(backbone, drawn, shard=shard, lora=4) for shard in ("none", "node")],
               "paradigms": {name: [gradient_in_paradigm(checkpoint, drawn, name, shard) for shard in ("none", "all")]
                             for name, checkpoint in settings["checkpoints"].items()},
               "bf16": [rewards_in_bf16(backbone, shard) for shard in ("none", "all")],
               "bf16 lora": [rewards_in_bf16(backbone, shard, lora=4) for shard in ("none", "all")],
               "full disk": full_disk(here, rank), "disk of each rank": disk_of_each_rank(here, rank)}
    cfg = Config(**settings["config"])
    # A stop signal to the second rank alone, then resumed
    two = replace(cfg, out=str(here / "two"))
    if rank == 1:
        original, train.learning_rate = train.learning_rate, stop_after(2)
    status = [train.main(two)]
    if rank == 1:
        train.learning_rate = original
    status.append(train.main(replace(two, resume=True)))
    # The same sharded; and with a checkpoint after every step, left unfinished
    sharded = replace(cfg, out=str(here / "sharded"), shard="all", eval_every=3)
    if rank == 1:
        train.learning_rate = stop_after(2)
    status.append(train.main(sharded))
    status.append(train.main(replace(sharded, out=str(here / "parts"), save_every=1)))
    if rank == 1:
        train.learning_rate = original
    status.append(train.main(replace(sharded, resume=True)))
    model = RewardModel.from_pretrained(here / "two")
    scores = train.score_rows(model, read_comparisons(drawn), 128)
    results |= {"status": status, "rewards": [score.rewards for score in scores]}
    if rank == 0:
        torch.save(results, here / "results.pt")


def on_rank(rank, port, root):
    variables = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in variables.items()}
    train.start_processes()
    for name, run in {"evaluate": of_evaluate, "rl_demo": of_rl_demo, "train": of_train}.items():
        if (settings := root / name / "settings.json").exists():
            run(root / name, json.loads(settings.read_text()))
    dist.barrier()
    if rank == 1:
        os._exit(0)  # as if it were killed, without a message to the other
    sys.argv[1:] = []
    try:
        train.command_line(lambda _: all_gather([0.0]), Config, "train.py")
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
