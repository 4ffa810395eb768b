"""Pairs a second of the pack (each prompt once) against separate rows (model.run_rows: one padded row per response,
the image still encoded once) and the stock way (one padded row per response, the image encoded for each), in one run.

    python tests/benchmark.py --mode score                                 two CPU cores, the tiny shape
    python tests/benchmark.py --mode train --k 4                           forward and backward; stock: 6 pairs x 2 rows
    python tests/benchmark.py --mode train --shape 7b --image_tokens 1024 --prompt_tokens 2048 --comparisons 8
                                                                           bf16, on CUDA
    python tests/benchmark.py --mode train --width 512 --layers 8          a tiny shape of another size

All ways get the same comparisons and must give the same rewards (train: also the same gradients) before anything is
timed; then they take turns, and medians are compared. One prompt has `--prompt_tokens` tokens, of which
`--image_tokens` are one image's, and K responses. The stock way takes K rows for K responses when it scores, and two
rows for each of the K (K - 1) / 2 pairs when it trains, as trainers of preference pairs do. Weights and tokens are
random: speed does not depend on them.

Beside the ratio stands its limit: the ratio of the operations of the two ways, counted from the shapes: 2 a weight and
token, in the decoder and in the vision tower, and 4 a width for every key that a query attends to. Padding, mask
tables and small calls are not counted, so the ratio can exceed the limit.

Measured, two shared CPU cores, `OMP_NUM_THREADS=1 python tests/benchmark.py --width 512 --repetitions 3 ...`, torch
2.13, transformers 5.23, fp32, commit 448e160, medians of 3 turns; prompts of 1,024 tokens, responses of 256:

    flags                             ratio  limit
    --mode train                       1.78   1.75
    --mode train --k 4 --comparisons 1 8.25   8.39
    --mode score                       1.84   1.75
    --mode score --k 4                 2.80   2.80
    --mode score --k 8                 4.06   3.99

Separate rows (width 128, one thread, medians of 5 turns, a load of 3): the pack is 1.3 times as fast as they are with
--mode score and 1.6 times with --mode train --k 4 --comparisons 1, where it is 6.6 times as fast as the stock way.

At width 128 (commit 9bee5b8, one thread) train K = 2, 4 gave 1.73 of 1.68 and 7.25 of 7.67, score K = 2, 8 1.65 of
1.68 and 3.82 of 3.45: small products leave more to everything else.

The default run on two cores (commit 4920caa): a step takes some 0.16 s (940 steps, three seeds), a quarter of it
reading (60 steps); of the rest half of the CPU time is matrix products (torch's profiler, one thread, 12 steps).
`python evaluate.py --model runs/seed-0`, 800 comparisons in three passes: 15 and 19 s (commits f10f069 and ec5a860,
once each).

The paper's run by arithmetic, not run. A pair of 1,600 tokens (800 of an image, two responses of 250) is 77 TFLOP:
decoder 6 x 6.53e9 x 1,600 = 62.7, vision 12.7, attention 1.3. 64 GPUs at 40% of 989 TFLOP/s, with 400 Gb/s each between
nodes and 450 GB/s (NVLink) within one; 128 pairs a step:

    per step                                    seconds      hours for 21,875 steps
    arithmetic                                   0.39         2.4
    --shard: gather 15.5 GB twice, reduce 31     1.24         7.5
    --shard node: within a node, across          0.12, 0.14   2.4 to 3.9

Two pairs a GPU are a fifth of a pack, and all wait for the longest of 64: a batch of 128 suits 16 GPUs better.
"""
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLModel
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import model as model_module  # noqa: E402
from model import (POOLING, QWEN2_5, Encoded, Processor, RewardModel, bin_pack, build_head,  # noqa: E402
                   mrope_positions, pack, pairwise_loss, tiny_backbone)
from stock import stock_rewards  # noqa: E402


@dataclass(frozen=True)
class Config:
    mode: str = HfArg(default="score", help="score: forward only; train: forward and backward")
    shape: str = HfArg(default="tiny", help="tiny, or 3b, 7b: Qwen2.5-VL's with random weights, bf16")
    width: int = HfArg(default=128, help="of the tiny shape's text model, a multiple of 32")
    layers: int = HfArg(default=4, help="of the tiny shape's text model")
    prompt_tokens: int = HfArg(default=1024, help="tokens of a prompt, the image's among them")
    image_tokens: int = HfArg(default=256, help="of the prompt's tokens, a square number; each is 4 patches of "
                                                "14 x 14 pixels; 0: no image")
    response_tokens: int = HfArg(default=256, help="tokens of each response")
    k: int = HfArg(default=2, help="responses to a prompt")
    comparisons: int = HfArg(default=2, help="prompts in a repetition")
    pack_tokens: int = HfArg(default=0, help="tokens in a pack; 0: 16,384 on a GPU, 1,024 on a CPU, as evaluate.py "
                                             "has it")
    repetitions: int = HfArg(default=5, help="timed turns of each way, after one that is not timed")


SIZES = {"3b": dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                    num_attention_heads=16, num_key_value_heads=2),
         "7b": dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                    num_attention_heads=28, num_key_value_heads=4)}


def published_shape(name: str) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-3B-Instruct's or -7B-Instruct's sizes."""
    text = SIZES[name] | dict(max_position_embeddings=128000,
                              rope_parameters={"rope_type": "default", "rope_theta": 1e6,
                                               "mrope_section": [16, 24, 24]})
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=text["hidden_size"],
                  window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=151655, video_token_id=151656,
                            vision_start_token_id=151652, vision_end_token_id=151653, tie_word_embeddings=name == "3b")


def make_model(cfg: Config, device) -> RewardModel:
    """Random weights of the asked-for shape."""
    torch.manual_seed(0)
    if cfg.shape in SIZES:
        config, dtype = published_shape(cfg.shape), torch.bfloat16
    else:
        with tempfile.TemporaryDirectory() as folder:
            config, dtype = AutoConfig.from_pretrained(tiny_backbone(folder, ["a b c"], width=cfg.width)), torch.float32
        text = config.text_config
        text.num_hidden_layers, text.layer_types = cfg.layers, ["full_attention"] * cfg.layers
    torch.set_default_dtype(dtype)
    with torch.device(device):
        backbone = Qwen2_5_VLModel._from_config(config, attn_implementation="branches")
    torch.set_default_dtype(torch.float32)
    width = config.text_config.hidden_size
    head_config = {"head_layers": 2, "head_activation": "silu", "width": width, "reads": POOLING}
    return RewardModel(backbone, build_head(width).to(device), make_processor(None, config), head_config)


def make_processor(tokenizer, config, suppressed=()) -> Processor:
    """The processor of a Qwen2.5-VL. suppressed: further tokens that a policy may not write."""
    image_token_ids = (config.image_token_id, config.video_token_id, *suppressed)
    return Processor(tokenizer, Qwen2VLImageProcessorPil(), QWEN2_5, image_token_ids)


def make_comparisons(cfg: Config, config) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    side = round(cfg.image_tokens**0.5)
    if side * side != cfg.image_tokens or cfg.image_tokens >= cfg.prompt_tokens:
        raise ValueError(f"--image_tokens {cfg.image_tokens}: want a square number below --prompt_tokens "
                         f"{cfg.prompt_tokens}")

    def words(n):
        return torch.randint(300, 500, (n,), generator=generator).tolist()

    # patches: the vision tower merges 2 x 2 of them into a token
    grid = torch.tensor([[1, 2 * side, 2 * side]] if side else [], dtype=torch.long).view(-1, 3)
    items = []
    for _ in range(cfg.comparisons):
        ids = words(8) + [config.image_token_id] * cfg.image_tokens + words(cfg.prompt_tokens - cfg.image_tokens - 8)
        positions = mrope_positions(ids, grid.tolist(), config.image_token_id, config.video_token_id)
        patches = torch.randint(0, 256, (4 * cfg.image_tokens, 3, 1, 14 * 14), generator=generator, dtype=torch.uint8)
        responses = [words(cfg.response_tokens) for _ in range(cfg.k)]
        items.append(Encoded(ids, responses, list(combinations(range(cfg.k), 2)), patches, grid, positions))
    return items


def operations(cfg: Config, model: RewardModel, ours: bool) -> float:
    """Multiply-adds x 2 of one forward over one comparison."""
    text = model.backbone.config.text_config
    weights = sum(p.numel() for n, p in model.backbone.language_model.named_parameters() if "embed" not in n)
    vision = sum(p.numel() for p in model.backbone.visual.parameters())
    p, r, k, images = cfg.prompt_tokens, cfg.response_tokens, cfg.k, cfg.image_tokens > 0
    rows = 1 if ours else k if cfg.mode == "score" else k * (k - 1)
    tokens = p + k * r if ours else rows * (p + r)
    keys = p * p / 2 + k * (r * p + r * r / 2) if ours else rows * (p + r) ** 2 / 2  # to which all queries attend
    attention = 4 * text.hidden_size * text.num_hidden_layers * keys
    return 2 * weights * tokens + attention + images * rows * 2 * vision * 4 * cfg.image_tokens


def matrix_rate(device, dtype) -> float:
    """Multiply-adds x 2 a second of one large square product: what the machine gives at best."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def timed(work, device) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(cfg: Config) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(cfg, device)
    comparisons, training = make_comparisons(cfg, model.backbone.config), cfg.mode == "train"
    n_pairs = sum(len(c.pairs) for c in comparisons)
    stock_items = [[replace(c, response_ids=[c.response_ids[w], c.response_ids[l]], pairs=[(0, 1)]) for w, l in c.pairs]
                   if training else [c] for c in comparisons]
    members = bin_pack([c.num_tokens for c in comparisons], cfg.pack_tokens or (16384 if device == "cuda" else 1024))
    packs = [pack([comparisons[i] for i in indices]).to(device) for indices in members]
    in_order = [stock_items[i] for indices in members for i in indices]
    stock_pairs = [pack(items).pairs.to(device) for items in in_order]

    def ours():
        for packed in packs:
            yield model(packed).rewards, packed.pairs

    def rows():  # as a backbone whose layers cannot branch is run
        has_full_attention = model_module.has_full_attention
        model_module.has_full_attention = lambda config: False
        try:
            yield from ours()
        finally:
            model_module.has_full_attention = has_full_attention

    def stock():
        for items, pairs in zip(in_order, stock_pairs):
            yield stock_rewards(model, items), pairs

    def step(way):
        """Rewards (pairs, 2) of all comparisons; when training their gradient too."""
        model.zero_grad(set_to_none=True)
        out = []
        with torch.set_grad_enabled(training):
            for rewards, pairs in way():
                if training:
                    losses = pairwise_loss(rewards, pairs, reduction="none")
                    (losses.sum() / n_pairs).backward()
                out.append(rewards.detach()[pairs])
        return torch.cat(out)

    def gradient():
        return torch.cat([p.grad.float().flatten() for name, p in model.named_parameters()
                          if p.grad is not None and "embed_tokens" not in name])

    # the same rewards and gradients, or no timing
    limit = 1e-4 if device == "cpu" else 0.05  # fp32; bf16
    ways = {"ours": ours, "rows": rows, "stock": stock}
    rewards, differences = step(ours), {}
    grad = gradient() if training else None
    for name in ("rows", "stock"):
        again = step(ways[name])
        differences[f"rewards of {name}"] = ((rewards - again).abs().max() / again.abs().max().clamp(min=1e-3)).item()
        if training:
            differences[f"gradients of {name}"] = ((gradient() - grad).norm() / grad.norm()).item()
    del grad
    if max(differences.values()) > limit:
        raise ValueError(f"the ways differ by {differences} relative, more than {limit}: nothing to compare")

    times, peak = {name: [] for name in ways}, {}
    for _ in range(cfg.repetitions):
        for name, way in ways.items():  # in turns, so that a slow minute of the machine hits all
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times[name].append(timed(lambda: step(way), device))
            peak[name] = (torch.cuda.max_memory_allocated() / 2**30 if device == "cuda"
                          else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}

    tokens = sum(c.num_tokens for c in comparisons)
    stock_tokens = sum(len(c.prompt_ids) + len(ids) for items in stock_items for c in items for ids in c.response_ids)
    result = {"mode": cfg.mode, "shape": cfg.shape, "k": cfg.k,
              "pairs_per_s": {name: round(n_pairs / s, 2) for name, s in median.items()},
              "ratio": round(median["stock"] / median["ours"], 2),
              "ratio_of_rows": round(median["rows"] / median["ours"], 2),
              "limit": round(operations(cfg, model, ours=False) / operations(cfg, model, ours=True), 2),
              "seconds": {name: [round(s, 3) for s in ss] for name, ss in times.items()},
              "tokens": {"ours": tokens, "stock": stock_tokens},
              "difference": {name: float(f"{d:.1e}") for name, d in differences.items()},
              "device": (torch.cuda.get_device_name() if device == "cuda"
                         else f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")}
    if device == "cuda":
        # 2 operations for each weight and token forward, 4 more backward; attention's own products are not counted,
        # nor embeddings
        vision = sum(p.numel() for p in model.backbone.visual.parameters())
        text = sum(p.numel() for name, p in model.backbone.language_model.named_parameters() if "embed" not in name)
        work = (6 if training else 2) * (text * tokens + vision * sum(len(packed.pixel_values) for packed in packs))
        rate = matrix_rate(device, torch.bfloat16)
        result |= {"matrix_tflops": round(rate / 1e12), "share_of_matrix_rate": round(work / median["ours"] / rate, 3),
                   "peak_gib": {name: round(gib, 1) for name, gib in peak.items()}, "parameters": vision + text}
    print(json.dumps(result))
    print(f"\n{cfg.mode}, K = {cfg.k}, {cfg.prompt_tokens} + {cfg.response_tokens} tokens: "
          f"{result['pairs_per_s']['ours']} pairs/s "
          f"against {result['pairs_per_s']['rows']} of separate rows: {result['ratio_of_rows']} times; and "
          f"against the stock way's {result['pairs_per_s']['stock']}: {result['ratio']} times "
          f"(counted operations allow {result['limit']}), of {tokens} against {stock_tokens} tokens")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Config, prog="benchmark.py").parse_args_into_dataclasses()[0])
    except ValueError as error:
        sys.exit(f"benchmark.py: {error}")
