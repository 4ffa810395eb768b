"""How much memory each rank needs until a model is distributed and has taken a step: peak resident memory beyond what
it had before.

    torchrun --nproc_per_node 2 tests/benchmark_memory.py --shard all      the weights go from the first rank's host
                                                                           to the parts
    torchrun --nproc_per_node 2 tests/benchmark_memory.py --shard none     a whole copy on every rank

A tiny Qwen2.5-VL widened to about 500 MB of fp32 weights, on CPUs: what a GPU would hold and what its host would hold
add up here. A step adds the gradients and AdamW's two moments: three times a rank's share of the weights. Commit
37c7ae8, a busy machine, once, weights of 0.53 GB: --shard all 0.83 and 0.31 GB until the model is distributed, 1.26
and 1.29 with a step; --shard none 1.05 and 2.15 on both ranks.
"""
import os
import resource
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.hf_argparser import HfArg, HfArgumentParser

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from data import synthetic  # noqa: E402
from model import pack, pairwise_loss, tiny_backbone  # noqa: E402
import train  # noqa: E402
from train import distribute, from_first, gather_objects, say  # noqa: E402


@dataclass(frozen=True)
class Config:
    shard: str = HfArg(default="none", help="none, all or node, as of train.py")
    width: int = HfArg(default=1216, help="of the tiny Qwen2.5-VL")


def peak() -> float:
    """GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "linux" else 1e9)


def make_backbone(path: str, width: int) -> None:
    """In a process of its own, as its memory must not count; and which has none of its parent's threads."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tiny_backbone(path, ["a b c"], width=width)


def main(cfg: Config) -> None:
    device, rows = train.start_processes(), synthetic(4)
    first = dist.get_rank() == 0
    with tempfile.TemporaryDirectory() as folder:
        path = from_first(folder)
        if first:
            maker = get_context("fork").Process(target=make_backbone, args=(path, cfg.width))
            maker.start()
            maker.join()
        from_first(None)
        before = peak()
        model = train.make_model(train.Config(backbone=path, shard=cfg.shard).resolved(), rows, device).train()
        size = sum(p.numel() for p in model.parameters()) * 4 / 1e9
        wrapped = distribute(model, device, cfg.shard, None)
        loaded = peak()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
        batch = pack(rows, model.processor)
        pairwise_loss(wrapped(batch)[0], batch.pairs).backward()
        optimizer.step()
        everyone = gather_objects((loaded - before, peak() - before))
        say(f"--shard {cfg.shard}: weights {size:.2f} GB; beyond {before:.2f} GB of Python and torch, at most (GB)")
        for rank, (of_loading, in_all) in enumerate(everyone):
            say(f"  rank {rank}: {of_loading:.2f} until distributed, {in_all:.2f} with a step of AdamW")


if __name__ == "__main__":
    main(HfArgumentParser(Config).parse_args_into_dataclasses()[0])
    train.end_processes()
