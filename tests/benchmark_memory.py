"""How much memory each rank needs until a model is distributed and has taken a step: peak resident memory beyond what
it had before.

    torchrun --nproc_per_node 2 tests/benchmark_memory.py --shard all      the weights go from the first rank's host
                                                                           to the parts
    torchrun --nproc_per_node 2 tests/benchmark_memory.py --shard none     a whole copy on every rank

A tiny Qwen2.5-VL widened to about 500 MB of fp32 weights, on CPUs: what a GPU would hold and what its host would hold
add up here. A step adds the gradients and AdamW's two moments: three times a rank's share of the weights. Commit
37c7ae8, a busy machine, once, weights of 0.53 GB:

    GB on each rank    until the model is distributed    with a step
    --shard all         0.83 and 0.31                     1.26 and 1.29
    --shard none        1.05 and 1.05                     2.15 and 2.15

By counting, not run on a GPU. The 7B, 7.75 billion weights in fp32 with gradients and two moments, on each of eight
GPUs with --shard and --gradient_checkpointing:

    training state: an eighth of 124 GB                     15.5 GB
    layer inputs of the decoder, 16,384 tokens in fp32       6.6 GB
    of the vision tower, 61,440 patches in bf16              5.0 GB, where a pack is full of images
    the embedding and its gradient, gathered and fp32        4.4 GB
    the layer that is computed                               5 to 8 GB
    in all                                                  about 38 GB: a GPU of 80 GB has room

    host memory of the first rank, which loads the weights  31 GB
    a checkpoint, written by all ranks                      93 GB, at least twice in host memory meanwhile; two are kept

Without --shard, autocast keeps a bf16 copy of every weight until the pack's backward pass ends, 2 bytes each. So the
3B with all its weights needs 60 + 7.5 (that copy) + 4.8 + 5 + 5 = 82 GB on one GPU: not one of 80 GB, one of 141. The
7B, 124 + 15.5 + 11.6 GB, fits on neither. With --lora 16 a frozen vision tower keeps no layer inputs: 15.8 GB for the
3B. GRPO of a 3B with a 7B as reward model on eight GPUs, each: weights 15, gradients 15, an eighth of the moments 3.8,
reference 7.5, reward model 15.5, autocast's copy 7.5, keys and values of 128 rows of 1,500 tokens 7 to 8: 72 GB.

Several nodes (tests/two_nodes.py runs the first line with two launchers on one machine). On each node the same command;
when a worker is lost, torchrun starts it anew and all ranks resume from the last checkpoint:

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d \\
        --rdzv_endpoint HOST:29500 --max_restarts 3 train.py --backbone Qwen/Qwen2.5-VL-7B-Instruct --shard node \\
        --gradient_checkpointing --data FOLDER --out SHARED/7b --resume

Under SLURM, not run: the same in a file job.sh, HOST replaced by $(scontrol show hostnames $SLURM_JOB_NODELIST | head
-1), and `--rdzv_id $SLURM_JOB_ID` added; then

    sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --wrap 'srun bash job.sh'

A launcher gives its workers 30 seconds after SIGTERM; --shutdown_timeout 1800 leaves time for a checkpoint.
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
from train import all_gather_objects, broadcast_from_rank0, print_rank0, wrap_model  # noqa: E402


@dataclass(frozen=True)
class Config:
    shard: str = HfArg(default="none", help="none, all or node, as in train.py")
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
        path = broadcast_from_rank0(folder)
        if first:
            maker = get_context("fork").Process(target=make_backbone, args=(path, cfg.width))
            maker.start()
            maker.join()
        broadcast_from_rank0(None)
        before = peak()
        model = train.make_model(train.Config(backbone=path, shard=cfg.shard).resolved(), rows, device).train()
        size = sum(p.numel() for p in model.parameters()) * 4 / 1e9
        wrapped = wrap_model(model, device, cfg.shard)
        loaded = peak()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
        batch = pack(rows, model.processor)
        pairwise_loss(wrapped(batch).rewards, batch.pairs).backward()
        optimizer.step()
        everyone = all_gather_objects((loaded - before, peak() - before))
        print_rank0(f"--shard {cfg.shard}: weights {size:.2f} GB; beyond {before:.2f} GB of Python and torch, "
                    f"at most (GB)")
        for rank, (of_loading, in_all) in enumerate(everyone):
            print_rank0(f"  rank {rank}: {of_loading:.2f} until distributed, {in_all:.2f} with a step of AdamW")


if __name__ == "__main__":
    main(HfArgumentParser(Config).parse_args_into_dataclasses()[0])
    train.end_processes()
