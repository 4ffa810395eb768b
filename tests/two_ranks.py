"""What test_train.py runs under torchrun: one step's gradient, with DDP and sharded. Arguments: backbone, data, file."""
import sys

import torch

from conftest import ROOT  # noqa: F401  (puts the scripts on the path)
from data import Order, read_comparisons, setup
from model import Comparison, RewardModel, pack, recompute_activations
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from train import Config, ThreadPoolExecutor, load_step, shard_model, take_step


def gradient(world, backbone, folder, pack_tokens=120, shard=False):
    """The gradient of the first step, by name, and what `take_step` returned. In fp64, where rounding hides no mistake: in fp32 the sums
    of one step, taken in another order, differ by 2e-6 of the gradient's norm."""
    cfg = Config(lr=1.0, batch_size=64, pack_tokens=pack_tokens, max_pixels=112 * 112, shard=shard)
    torch.manual_seed(0)
    raw = RewardModel.from_backbone(backbone).double().train()
    rows = read_comparisons(folder)
    with ThreadPoolExecutor() as threads:
        batch = load_step(0, Order([rows.pairs], [1.0], 64, 0), [rows], raw, cfg, world, threads)
    if shard:
        recompute_activations(raw.backbone)  # the two together, as the README has them for the 7B
        shard_model(raw, world)
    model = DistributedDataParallel(raw) if world.world_size > 1 and not shard else raw
    images = sum(len(p.image_grid_thw) for p in batch["packs"])
    shared = world.gather([batch["pairs"], len(batch["packs"]), images])
    filler = pack([Comparison("?", ["a", "b"], [(0, 1)])], raw.tokenizer)
    sums = take_step(model, batch["packs"], filler, cfg, world, int(shared[:, 1].max()), int(shared[:, 0].sum()))
    if shard:  # the gathered weights of a model whose weights are its gradients
        for p in raw.parameters():
            p.data.copy_(p.grad)
        gradients = get_model_state_dict(raw, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        gradients = {name: p.grad for name, p in raw.named_parameters()}
    return gradients, world.gather(sums).sum(dim=0), shared


if __name__ == "__main__":
    world = setup()
    results = [gradient(world, sys.argv[1], sys.argv[2], shard=shard) for shard in (False, True)]
    if world.rank == 0:
        torch.save(results, sys.argv[3])
    world.close()
