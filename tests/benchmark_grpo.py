"""What a step of rl_demo.py on Qwen2.5-VL-3B, paid by a 7B, will take of a GPU's memory and time.

    python tests/benchmark_grpo.py                                              on two CPU cores: about a minute
    python tests/benchmark_grpo.py --prompt_tokens 500 --response_tokens 200    shorter prompts and answers
    python tests/benchmark_grpo.py --tflops 120 --bandwidth 2.0                 another GPU

Nothing is downloaded: a published shape with random weights costs what the trained one costs. Three kinds of number:

    counted    parameters, by building transformers' own classes without storage
    measured   here, with the functions of model.py:
               - the time of one token of `generate` at the 3B's depth of 36 layers and a width of 64, where next to
                 nothing is computed: the time of Python and of starting the kernels. The fastest GPU waits for it too,
                 and for autocast's casts besides
               - operations of forward and backward in a slice of the 3B, one layer of its full width, against the rule
                 of 2 for each weight and token forward and 4 more backward
               - bytes of activations that the slice keeps for the backward pass. In fp32: on a GPU, in bf16, most of
                 them are half as large
    assumed    what a GPU gives, --tflops and --bandwidth. The defaults are an H100: 40% of its 989 TFLOP/s in bf16, and
               its 3.35 TB/s

Every rollout is taken to be --response_tokens long; a policy that stops earlier is faster. Nothing of this replaces a
run with `--max_steps 3`, whose metrics.jsonl has the seconds of each step.
"""
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.hf_argparser import HfArg, HfArgumentParser

sys.path.insert(0, str(Path(__file__).parent.parent))

import benchmark  # noqa: E402
import model  # noqa: E402
from model import (  # noqa: E402
    Policy, enable_gradient_checkpointing, generate, load_processor, pack_texts, tiny_backbone)

model.suppressed_tokens = lambda policy: torch.tensor([policy.processor.end_id])  # so that no rollout ends early


@dataclass(frozen=True)
class Config:
    gpus: int = HfArg(default=8, help="ranks")
    batch_size: int = HfArg(default=256, help="prompts per step over all ranks, as in rl_demo.py")
    group_size: int = HfArg(default=8, help="rollouts of a prompt")
    rollout_rows: int = HfArg(default=128, help="rollouts that are written at a time, as in rl_demo.py")
    pack_tokens: int = HfArg(default=8192, help="tokens in a pack, as in rl_demo.py")
    prompt_tokens: int = HfArg(default=1024, help="tokens of a prompt, the image's among them")
    image_tokens: int = HfArg(default=256, help="of the prompt's tokens")
    response_tokens: int = HfArg(default=512, help="tokens of each rollout")
    prompts: int = HfArg(default=11031, help="prompts of the whole run (ThinkLite)")
    tflops: float = HfArg(default=400.0, help="what the GPU gives in large products, in 10^12 a second (assumed)")
    bandwidth: float = HfArg(default=3.35, help="of the GPU's memory, in 10^12 bytes a second (assumed)")
    repetitions: int = HfArg(default=5, help="of what is timed; the median counts")


def make_policy(text: dict, vision: dict) -> Policy:
    """The 3B with some sizes changed and random weights."""
    config = benchmark.published_shape("3b")
    for part, sizes in ((config.text_config, text | {"vocab_size": 512}), (config.vision_config, vision)):
        for name, value in sizes.items():
            setattr(part, name, value)
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        tiny_backbone(folder, ["a b c"])
        processor = load_processor(folder, AutoConfig.from_pretrained(folder))
    config.image_token_id, config.video_token_id = processor.image_token_ids
    torch.manual_seed(0)
    config._attn_implementation = "branches"
    return Policy(Qwen2_5_VLForConditionalGeneration(config).eval(), processor)


def seconds_per_token(group_size: int, repetitions: int) -> list[float]:
    """Of `generate` with a group of rollouts: the difference of two lengths, so that reading the prompt drops out."""
    policy = make_policy(dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
                              rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}),
                         dict(depth=1, hidden_size=64, num_heads=2, intermediate_size=64, out_hidden_size=64))
    short = benchmark.Config(prompt_tokens=16, image_tokens=0, comparisons=1)
    prompt = benchmark.make_comparisons(short, policy.backbone.config)[0].with_responses([])

    def timed(tokens):
        start_time = time.perf_counter()
        generate(policy, [prompt], tokens, group_size, seeds=[0])
        return time.perf_counter() - start_time

    timed(2)
    return [(timed(40) - timed(8)) / 32 for _ in range(repetitions)]


def operations(text: int, words: int, vision: int, merger: int, item: dict, times: int, times_words: int) -> float:
    """`times` 2 operations for each weight and what it meets: tokens, written tokens, patches, image tokens (a
    fourth of the patches)."""
    met = text * item["tokens"] + vision * item["patches"] + merger * item["patches"] / 4
    return 2 * (times * met + times_words * words * item["written"])


def measure_slice(layers: int, checkpointing: bool) -> dict:
    """Of some layers of the 3B and one group of four: bytes kept for the backward pass, and operations counted by
    PyTorch / by the rule."""
    policy = make_policy(dict(num_hidden_layers=layers), dict(depth=1, fullatt_block_indexes=[0])).train()
    if checkpointing:
        enable_gradient_checkpointing(policy.backbone)
    cfg = benchmark.Config(prompt_tokens=128, image_tokens=64, response_tokens=32, k=4, comparisons=1)
    group = benchmark.make_comparisons(cfg, policy.backbone.config)[0]
    weights, kept = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is counted for two
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = policy(pack_texts([group])).sum()
        total.backward()
    count = count_parameters(policy.backbone) | {"words": policy.lm_head.weight.numel()}
    size = {"tokens": group.num_tokens, "patches": len(group.pixel_values),
            "written": sum(len(ids) for ids in group.response_ids)}
    by_rule = operations(**count, item=size, times=4 if checkpointing else 3, times_words=4)
    return {"bytes": sum(t.untyped_storage().nbytes() for t in kept.values()), "tokens": group.num_tokens,
            "counted": counter.get_total_flops() / by_rule}


def count_parameters(backbone) -> dict[str, int]:
    merger = sum(p.numel() for p in backbone.visual.merger.parameters())
    words = backbone.language_model.embed_tokens.weight.numel()
    text = sum(p.numel() for p in backbone.language_model.parameters()) - words
    vision = sum(p.numel() for p in backbone.visual.parameters()) - merger
    return {"text": text, "words": words, "merger": merger, "vision": vision}


def main(cfg: Config) -> None:
    # 1  Counted
    count = {}
    for name in benchmark.SIZES:
        with torch.device("meta"):
            count[name] = count_parameters(Qwen2_5_VLModel(benchmark.published_shape(name)))
    policy, reward_model = (sum(parts.values()) for parts in count.values())

    # 2  Measured
    waits = seconds_per_token(cfg.group_size, cfg.repetitions)
    slices = {(layers, again): measure_slice(layers, again) for layers in (1, 2) for again in (False, True)}
    kept = {}  # bytes of a token and layer, without checkpointing and with it
    for again in (False, True):
        kept[again] = (slices[2, again]["bytes"] - slices[1, again]["bytes"]) / slices[1, again]["tokens"]

    # 3  Time of a step on one GPU, in seconds
    sizes, rate = benchmark.SIZES["3b"], cfg.tflops * 1e12
    groups, at_once = math.ceil(cfg.batch_size / cfg.gpus), max(cfg.rollout_rows // cfg.group_size, 1)
    rows = min(at_once, groups) * cfg.group_size
    written = cfg.group_size * cfg.response_tokens
    prompt = {"tokens": cfg.prompt_tokens, "patches": 4 * cfg.image_tokens, "written": 0}
    group = {"tokens": cfg.prompt_tokens + written, "patches": 4 * cfg.image_tokens, "written": written}
    # attention: 4 operations for each pair of tokens, layer and unit of width; a response sees its prompt and itself
    met = cfg.prompt_tokens**2 / 2 + written * (cfg.prompt_tokens + cfg.response_tokens / 2)
    attention = {}
    for name, size in benchmark.SIZES.items():
        attention[name] = 4 * met * size["num_hidden_layers"] * size["hidden_size"]

    def through(name, times, times_words):
        products = operations(**count[name], item=group, times=times, times_words=times_words)
        return groups * (products + times * attention[name]) / rate

    weights = count["3b"]["text"] + count["3b"]["words"]
    cache = 2 * 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * 128  # bytes of a token's keys, values
    # a written token reads the bf16 weights once, and the cache three times: transformers copies it as it grows
    traffic = 2 * weights + 3 * cache * rows * (cfg.prompt_tokens + cfg.response_tokens / 2)
    busy, wait = traffic / (cfg.bandwidth * 1e12) + 2 * rows * weights / rate, statistics.median(waits)
    seconds = {
        "writing the rollouts": math.ceil(groups / at_once) * cfg.response_tokens * max(wait, busy)
        + groups * operations(**count["3b"], item=prompt, times=1, times_words=0) / rate,
        "rewards, one 7B": through("7b", 1, 0),
        "log-probabilities of the reference": through("3b", 1, 1),
        "forward and backward, with checkpointing": through("3b", 4, 4)}
    steps = math.ceil(cfg.prompts / cfg.batch_size)

    # 4  Memory of one GPU, in bytes
    always = {"policy, fp32": 4 * policy, "its gradients, fp32": 4 * policy,
              "its bf16 copy, which autocast keeps": 2 * policy,
              "AdamW's moments, this rank's share": 8 * policy / cfg.gpus,
              "reference, bf16": 2 * policy, "reward model, bf16": 2 * reward_model, "CUDA and NCCL (assumed)": 2e9}
    writing = {"keys and values, at most": rows * (cfg.prompt_tokens + cfg.response_tokens) * cache}
    of_a_token = sizes["num_hidden_layers"] * kept[True] + kept[False]
    learning = {"activations of a pack": max(cfg.pack_tokens, group["tokens"]) * of_a_token,
                "logits, their softmax and gradient": 3 * 4 * 1024 * sizes["vocab_size"]}
    together = {f"together, while {name}": sum(always.values()) + sum(part.values())
                for name, part in (("writing", writing), ("learning", learning))}

    # 5  Printed
    by_rule = {f"{n} layers{', checkpointing' * again}": round(slices[n, again]["counted"], 3) for n, again in slices}
    print(json.dumps({"settings": vars(cfg), "parameters": {"3b": policy, "7b": reward_model},
                      "seconds_per_token": [round(w, 4) for w in waits], "gpu_busy_per_token": round(busy, 4),
                      "bytes_per_token_and_layer": {"checkpointed": kept[True], "else": kept[False]},
                      "operations_counted_by_rule": by_rule}))
    print(f"\n| a step, {cfg.batch_size} prompts on {cfg.gpus} GPUs | seconds |\n|---|---|")
    for name, value in (seconds | {"together": sum(seconds.values())}).items():
        print(f"| {name} | {value:.0f} |")
    print(f"\n{cfg.prompts:,} prompts are {steps} steps: {steps * sum(seconds.values()) / 3600:.1f} hours, without the "
          f"evaluations. A written token waits {1000 * wait:.0f} ms for Python ({1000 * min(waits):.0f} to "
          f"{1000 * max(waits):.0f}), {1000 * busy:.0f} ms for the GPU.\n\n| memory of a GPU | GB |\n|---|---|")
    for name, value in (always | writing | learning | together).items():
        print(f"| {name} | {value / 1e9:.1f} |")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Config, prog="benchmark_grpo.py").parse_args_into_dataclasses()[0])
    except ValueError as error:
        sys.exit(f"benchmark_grpo.py: {error}")
