"""How much memory each rank needs until a model is distributed and has taken a step: peak resident memory beyond what
it had before.

    torchrun --nproc_per_node 2 tests/benchmark_memory.py --shard all      the weights go from the first rank's host
                                                                           to the parts
    torchrun --nproc_per_node 2 tests/benchmark_memory.py --shard none     a whole copy on every rank

A tiny Qwen2.5-VL widened to about 500 MB of fp32 weights, on CPUs: what a GPU would hold and what its host would hold
add up here. A step adds the gradients and AdamW's two moments: three times a rank's share of the weights. Commit
c69d86f, a busy machine, once, weights of 0.53 GB: --shard all 0.79 and 0.31 GB until the model is distributed, 1.32
and 1.24 with a step; --shard none 1.05 and 2.15 on both ranks.
"""
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.hf_argparser import HfArgumentParser

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from data import synthetic  # noqa: E402
from model import pack, pairwise_loss  # noqa: E402
from train import (Config, distribute, end_processes, from_first, gather_objects, make_model, say,  # noqa: E402
                   start_processes)

WIDTH = 1216


def peak() -> float:
    """GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "linux" else 1e9)


def main(cfg: Config) -> None:
    device, rows = start_processes(), synthetic(4)
    first = dist.get_rank() == 0
    with tempfile.TemporaryDirectory() as folder:
        path = from_first(folder)
        if first:
            # In a process of its own: its memory must not count as this one's
            code = f"from model import tiny_backbone; tiny_backbone({path!r}, ['a b c'], width={WIDTH})"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
        from_first(None)
        before = peak()
        model = make_model(Config(backbone=path, shard=cfg.shard).resolved(), rows, device).train()
        size = sum(p.numel() for p in model.parameters()) * 4 / 1e9
        wrapped = distribute(model, device, cfg.shard, None)
        loaded = peak()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
        batch = pack(rows, model.processor)
        pairwise_loss(wrapped(batch), batch.pairs).backward()
        optimizer.step()
        everyone = gather_objects((loaded - before, peak() - before))
        say(f"--shard {cfg.shard}: weights {size:.2f} GB; beyond {before:.2f} GB of Python and torch, at most (GB)")
        for rank, (of_loading, in_all) in enumerate(everyone):
            say(f"  rank {rank}: {of_loading:.2f} until distributed, {in_all:.2f} with a step of AdamW")
        end_processes()


if __name__ == "__main__":
    main(HfArgumentParser(Config).parse_args_into_dataclasses()[0])
