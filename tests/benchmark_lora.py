"""Two steps of `train.py --lora 16` at the real shape of Qwen2.5-VL-3B on a CPU, random weights in bf16: peak memory
beside the count.

    python tests/benchmark_lora.py                       five to ten minutes on one core, 10 GB
    python tests/benchmark_lora.py --shape 7b            about 19 GB, not run

The weights lie in bf16, as on a GPU; each product casts its own to fp32 first, since few CPUs multiply in bf16.
What it counts: frozen weights 2 bytes each; trained ones 16 (itself, gradient, AdamW's two moments, fp32); the input
of each layer in fp32, which --gradient_checkpointing keeps for the backward pass. What a layer needs while it is
computed is not in the count. Two steps of 128 tokens took 98 and 133 s, 10.0 GB where 8.1 were counted (commit
c69d86f, a busy machine, once).

`--lora 16 --gradient_checkpointing` by counting, packs of 16,384 tokens, not run on a GPU:

    GB                                                               3B     7B
    frozen weights, 3.75 and 7.75 billion, 2 bytes each             7.5   15.5
    updates and head, 34.1 and 53.2 million, 16 bytes each          0.5    0.9
    layer inputs                                                    4.8    6.6
    one layer's MLP, recomputed                                     2.9    5.0
    sum                                                            15.8   27.9
    a card of                                                      24     48
"""
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg, HfArgumentParser

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import benchmark  # noqa: E402
import train  # noqa: E402
from model import enable_gradient_checkpointing, pack, use_window_attention  # noqa: E402


@dataclass(frozen=True)
class Config:
    shape: str = HfArg(default="3b", help="3b or 7b: Qwen2.5-VL's; tiny")
    lora: int = HfArg(default=16, help="rank of the updates")
    prompt_tokens: int = HfArg(default=96, help="tokens of the prompt, 64 of them an image's")
    response_tokens: int = HfArg(default=16, help="tokens of each of two responses")
    steps: int = HfArg(default=2, help="steps to take")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "linux" else 1e9)  # GB


def linear_in_fp32(layer, x):
    bias = None if layer.bias is None else layer.bias.float()
    return torch.nn.functional.linear(x.float(), layer.weight.float(), bias)


def main(cfg: Config) -> None:
    device, before = train.start_processes(), peak()
    sizes = benchmark.Config(shape=cfg.shape, prompt_tokens=cfg.prompt_tokens, image_tokens=64,
                             response_tokens=cfg.response_tokens, comparisons=1)
    started = time.time()
    model = benchmark.make_model(sizes, device).train()
    print(f"made in {time.time() - started:.0f} s, {peak():.1f} GB", flush=True)
    use_window_attention(model)
    train.add_lora(model, cfg.lora)
    enable_gradient_checkpointing(model.backbone)
    batch = pack(benchmark.make_comparisons(sizes, model.backbone.config))

    torch.nn.Linear.forward = linear_in_fp32
    model.backbone.get_input_embeddings().register_forward_hook(lambda _layer, _ids, rows: rows.float())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-5, betas=(0.9, 0.99), fused=True)
    low, all_weights = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
    text = model.backbone.config.text_config
    inputs = len(batch.input_ids) * text.hidden_size * text.num_hidden_layers * 4
    parts = [2 * (all_weights - low) / 1e9, 16 * low / 1e9, inputs / 1e9]
    for step in range(cfg.steps):
        started = time.time()
        plan = train.StepPlan(exit_status=0, micro_steps=1, counts={"pairs": 1, "lm_texts": 0})
        metrics = train.train_step(model, optimizer, train.Batch(step, [batch]), plan, batch, train.Config())
        print(f"step {step + 1}: loss {metrics['loss']:.4f}, gradient {metrics['grad_norm']:.3f}, "
              f"{time.time() - started:.0f} s, "
              f"{peak():.1f} GB", flush=True)
    print(f"{cfg.shape}, rank {cfg.lora}: {(all_weights - low) / 1e9:.2f} billion weights frozen, "
          f"{low / 1e6:.1f} million trained, {len(batch.input_ids)} tokens. "
          f"By counting {' + '.join(f'{part:.2f}' for part in parts)} = {sum(parts):.2f} GB; "
          f"peak resident {peak():.2f} GB, of which Python and torch {before:.2f}")


if __name__ == "__main__":
    main(HfArgumentParser(Config).parse_args_into_dataclasses()[0])
