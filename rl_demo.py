"""GRPO with the reward model, and what it does to the true accuracy of a policy: BaseReward (arXiv 2509.16127), section 5.4.

    python rl_demo.py                                  a tiny policy under all four rewards, from one start: 2 minutes, and 75 s each
    python rl_demo.py --reward hybrid --out runs/rl-h  one of them
    python rl_demo.py --combine runs/rl-0 runs/rl-1    one table, mean and spread, of runs with several seeds
    torchrun --nproc_per_node 8 rl_demo.py --policy Qwen/Qwen2.5-VL-3B-Instruct --reward_model DIR --data FOLDER --reward hybrid \\
             --gradient_checkpointing                  the real thing; rows need a `prompt`, and an `answer` to be checked against

A policy writes answers (rollouts), the reward model pays for them, and the policy moves towards the better paid ones. One step of GRPO
(arXiv 2402.03300); the same numbers stand at the functions below. pi is the policy, ref its frozen start, eps and beta are flags.

    1  prompts      batch_size prompts x, fixed by (seed, step) alone; rank r of w takes every w-th
    2  rollouts     y_1 ... y_G drawn from pi(. | x) at temperature 1, each until <|im_end|> or max_new_tokens
    3  rewards      with r_i = r(x, y_i) from the reward model, or the mean of several:
                      rule      R_i = 1 if y_i matches the answer, else 0
                      model     R_i = r_i
                      hybrid    R_i = 1 if y_i matches the answer, else sigmoid(r_i)
                      pairwise  R_i = sum over j of (sigmoid(r_i - r_j) - 1/2), the verdicts of all pairs of the group
                    A rollout that was cut off before its <|im_end|> never matches and gets the lowest reward of its group: the reward
                    model reads at <|im_end|>, and would otherwise pay for an end that the policy did not write.
    4  advantages   A_i = (R_i - mean(R)) / (std(R) + 1e-6); all zero where the rewards of a group agree
    5  logprobs     l_t = log pi(y_t | x, y_<t) for every token of every rollout; l_old at the first pass, l_ref under ref
    6  loss         rho_t = exp(l_t - l_old_t)       k3_t = exp(l_ref_t - l_t) - (l_ref_t - l_t) - 1, an estimate of KL(pi | ref), never < 0
                    loss = -1/N sum_t [ min(rho_t A, clip(rho_t, 1 - eps, 1 + eps_high) A) - beta k3_t ],  N: tokens in the loss, all ranks
    7  update       clip the gradient, AdamW; then 5 to 7 again if passes > 1, with l_old as it was

At the first pass rho = 1, and the first term's gradient is that of REINFORCE, A times the gradient of l; the second pulls back to ref. A
group is one pack (model.py): in each of the passes through policy, reference and reward models its prompt with the images is encoded once
for all G rollouts. A rank lays its groups into packs, one micro-step each, whose gradients add up.

What it writes: OUT/policy (the tiny start, made here), OUT/start.json; for each reward OUT/REWARD/metrics.jsonl (a line a step),
result.json, policy/ (the trained one, as transformers saves it) and checkpoint.pt while unfinished; then table.md, summary.json,
curves.svg, rollouts.txt, and index.html, which shows all of these and needs no other file.

Read the curves side by side: a reward that rises while the true accuracy does not is being hacked.

Where this differs from the paper, or where the paper is silent. It does not give the learning rate, clipping, KL weight or length: we take
1e-6, 0.2, 0.04 and 512 for a real policy. Its pairwise baseline asks a generative judge; here the scalar model gives the verdicts. From
Dr. GRPO (2503.20783) comes --no_std; from DAPO (2503.14476) the loss per token, --clip_eps_high, --drop_equal (dropped groups are not
replaced by fresh ones) and --mask_truncated. Left out: LoRA, sharding of the policy's weights (only AdamW's moments are shared out over
the ranks), several mini-batches a pass, temperatures other than 1, tools and turns.
"""
import copy
import html
import json
import math
import os
import random
import re
import shutil
import statistics
import string
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, HfArgumentParser,
                          LogitsProcessor, LogitsProcessorList)
from transformers.hf_argparser import HfArg

from data import BadRow, Order, StopSignal, World, claim_folder, read_comparisons, setup, synthetic, write_state, write_text
from evaluate import draw_curves, html_table, markdown, thumbnails
from model import (END, IMAGE_PAD, VIDEO_PAD, Comparison, Encoded, Pack, RewardModel, encode, fill_packs, hidden_states, load_processors,
                   pack, padded_rows, quiet, recompute_activations, replace_responses, set_attention, stock_attention)

REWARDS = ("rule", "model", "hybrid", "pairwise")
DEFAULT_REWARD_MODEL = "runs/default"  # where train.py leaves it
LEFTOVER = ("policy", ".policy.partial", "start.json.partial")  # of a run that ended before its first examination


@dataclass(frozen=True)
class Config:
    policy: str = HfArg(default="tiny", help="'tiny' (made on the spot), a folder, or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct (paper)")
    reward_model: list[str] = HfArg(default_factory=lambda: [DEFAULT_REWARD_MODEL],
                                    help="folders from train.py; several are an ensemble, which pays their mean")
    reward: list[str] = HfArg(default_factory=lambda: list(REWARDS), help="rule, model, hybrid, pairwise: one or several, run in turn")
    data: str = HfArg(default="", help="folder of prompts with answers (format: data.py); none: drawn pictures")
    out: str = HfArg(default="runs/rl", help="run folder: policies, logs, table, curves and page")
    overwrite: bool = HfArg(default=False, help="delete what --out holds and start anew")
    resume: bool = HfArg(default=False, help="go on from the checkpoints in --out")
    combine: list[str] = HfArg(default_factory=list, help="run folders whose results to print as one table, instead of a run")
    seed: int = HfArg(default=0, help="of the tiny policy, of the order of the prompts, and of the rollouts")
    group_size: int = HfArg(default=8, help="G, rollouts per prompt (paper: 8)")
    batch_size: int | None = HfArg(default=None, help="prompts per step over all ranks; 256 (paper), 16 for tiny")
    epochs: float = HfArg(default=1.0, help="passes over the prompts of --data (paper: 1)")
    max_steps: int | None = HfArg(default=None, help="stop after so many steps; none with --data, 100 for tiny")
    passes: int = HfArg(default=1, help="updates from the same rollouts (paper: not given)")
    lr: float | None = HfArg(default=None, help="learning rate, constant; 1e-6 (paper: not given), 3e-4 for tiny")
    clip: float = HfArg(default=1.0, help="largest gradient norm (paper: not given)")
    clip_eps: float = HfArg(default=0.2, help="eps of the clipped ratio (PPO: 0.2)")
    clip_eps_high: float | None = HfArg(default=None, help="eps_high, if other than eps (DAPO: 0.28)")
    kl_coef: float = HfArg(default=0.04, help="beta, weight of the KL term (GRPO: 0.04; DAPO and Dr. GRPO: 0)")
    no_std: bool = HfArg(default=False, help="do not divide advantages by the standard deviation (Dr. GRPO)")
    drop_equal: bool = HfArg(default=False, help="leave out groups whose rewards all agree, KL term included (DAPO)")
    mask_truncated: bool = HfArg(default=False, help="keep cut-off rollouts out of the loss, though not out of the group's mean (DAPO)")
    max_new_tokens: int | None = HfArg(default=None, help="longest rollout; 512 (paper: not given), 10 for tiny")
    max_pixels: int | None = HfArg(default=None, help="most pixels of an image, 28 x 28 for a token; 1003520, for tiny the policy's own")
    pack_tokens: int | None = HfArg(default=None, help="tokens in a pack; a longer group is a pack of its own; 8192, 1024 for tiny")
    rollout_rows: int = HfArg(default=128, help="rollouts that are written at a time; more need more memory for keys and values")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations in the backward pass: less memory, a third more time")
    eval_size: int = HfArg(default=240, help="prompts kept for evaluation, at most a tenth of --data; each gets G rollouts")
    save_every: int | None = HfArg(default=None, help="steps between checkpoints; 5, for tiny 100; 0: only when stopped")
    sft_steps: int = HfArg(default=400, help="fine-tuning steps of the tiny policy before RL, 16 prompts each")

    def resolved(self) -> "Config":
        """With the defaults that depend on the policy filled in, and nonsense refused."""
        own = (dict(batch_size=16, lr=3e-4, max_new_tokens=10, pack_tokens=1024, save_every=100, max_steps=100 if not self.data else None)
               if self.policy == "tiny" else
               dict(batch_size=256, lr=1e-6, max_new_tokens=512, pack_tokens=8192, save_every=5, max_pixels=1280 * 28 * 28))
        own["clip_eps_high"] = self.clip_eps
        cfg = replace(self, **{key: value for key, value in own.items() if getattr(self, key) is None})
        if wrong := [name for name in cfg.reward if name not in REWARDS]:
            raise ValueError(f"--reward {wrong[0]!r}: want one or several of {', '.join(REWARDS)}")
        if cfg.group_size < 2:
            raise ValueError(f"--group_size {cfg.group_size}: a rollout is judged against the others of its group, so at least 2")
        for name in ("batch_size", "lr", "epochs", "passes", "clip", "max_new_tokens", "pack_tokens", "rollout_rows", "eval_size"):
            if getattr(cfg, name) <= 0:
                raise ValueError(f"--{name} {getattr(cfg, name)} must be above zero")
        if not cfg.data and cfg.policy != "tiny":
            raise ValueError(f"--policy {cfg.policy} needs --data FOLDER, prompts of your own; the drawn ones are for the tiny policy")
        return cfg


# ---------------------------------------------------------------------------------------------------------------------------------
# The policy


class Policy(nn.Module):
    """A language model with eyes and a vocabulary. Its forward gives the log-probabilities of a pack's responses."""

    def __init__(self, lm, tokenizer, image_processor):
        super().__init__()
        set_attention(lm.model, "blocks")
        self.lm, self.tokenizer, self.image_processor = lm, tokenizer, image_processor
        # An image token in a rollout would stand for a picture that is not there. Both the sampling and the log-probabilities leave it out.
        self.never = tokenizer.convert_tokens_to_ids([IMAGE_PAD, VIDEO_PAD]) if hasattr(lm.model, "visual") else []
        self.end = tokenizer.convert_tokens_to_ids(END)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, pack: Pack) -> torch.Tensor:
        """5  Log-probabilities of all response tokens of the pack, in fp32 and in their order.

        Token t is predicted by the token before it, and the first token of every response by the last one of the prompt. Only these
        rows meet the vocabulary, 1,024 at a time and again in the backward pass: 150,000 logits for each of 8 x 512 tokens are 2.5 GB.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = hidden_states(self.lm.model, pack)  # (T, D)
            place, before, _ = response_tokens(pack)
            parts = [checkpoint(self.logprobs, hidden[b], pack.input_ids[p], use_reentrant=False)
                     for b, p in zip(before.split(1024), place.split(1024))]
        return torch.cat(parts)

    def logprobs(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        logits = self.lm.lm_head(hidden).float()  # (tokens, V)
        logits[:, self.never] = -torch.inf
        return logits.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]


def response_tokens(pack: Pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every response token of a pack: its index, the index of the token that predicts it, and which of the R responses it is of.

    >>> one = Encoded([5, 6], [[7, 8], [9]], [], torch.zeros(0, 1176), torch.zeros(0, 3, dtype=torch.long))
    >>> [x.tolist() for x in response_tokens(pack([one]))]            # the row is 5 6 | 7 8 | 9
    [[2, 3, 4], [1, 2, 1], [0, 0, 1]]
    """
    place, prompt = (pack.branch > 0).nonzero()[:, 0], (pack.branch == 0).nonzero()[:, 0]
    first = pack.branch[place] != pack.branch[place - 1]
    prompt_end = torch.zeros(int(pack.comparison.max()) + 1, dtype=torch.long, device=place.device)
    prompt_end = prompt_end.scatter_reduce(0, pack.comparison[prompt], prompt, "amax")
    return place, torch.where(first, prompt_end[pack.comparison[place]], place - 1), first.long().cumsum(0) - 1


def load_policy(path, max_pixels=None, dtype=torch.float32) -> Policy:
    """A Qwen2.5-VL, Qwen2-VL or text-only Qwen checkpoint with its vocabulary head. ValueError, one line, if it has none."""
    with quiet():
        try:
            config = AutoConfig.from_pretrained(path)
            kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
            lm, info = kind.from_pretrained(path, config=config, dtype=dtype, attn_implementation="sdpa", use_safetensors=True,
                                            output_loading_info=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"cannot load a policy from {path}: {' '.join(str(error).split())[:400]}") from None
    named = (config.architectures or [""])[0]
    if "lm_head.weight" in info["missing_keys"] or not named.endswith(("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")):
        raise ValueError(f"{path} is a {named or 'model'} without a vocabulary head and cannot write; give --policy an instruction-tuned "
                         f"checkpoint such as Qwen/Qwen2.5-VL-3B-Instruct, not a reward model")
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"{path} does not fit {named}: missing {sorted(info['missing_keys'])[:5]}, "
                         f"surplus {sorted(info['unexpected_keys'])[:5]}")
    return Policy(lm.eval(), *load_processors(path, lm.model, max_pixels))


def save_policy(policy: Policy, folder: Path) -> None:
    """As transformers saves it, with tokenizer and image processor; the folder appears when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet():
        for part in (policy.lm, policy.tokenizer, policy.image_processor):
            if part is not None:
                part.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def make_policy(cfg: Config, folder: Path, reward_model: RewardModel) -> None:
    """The start of the laptop run: the backbone of the tiny reward model with a fresh vocabulary head, fine-tuned.

    The backbone stands in for a pretrained one. For three quarters of the steps the policy learns the right answers; in the last
    quarter the answers are of mixed quality: for every prompt three times the right one and two wrong ones. So it knows, mostly, what
    is in the picture, and says it about half the time: RL is to make of it a policy that always does.
    """
    if sum(p.numel() for p in reward_model.parameters()) > 20e6:
        raise ValueError(f"the reward model {cfg.reward_model[0]} is not a tiny one; name a policy of its family with --policy")
    torch.manual_seed(cfg.seed)
    kind = AutoModelForImageTextToText if hasattr(reward_model.backbone, "visual") else AutoModelForCausalLM
    lm = kind.from_config(copy.deepcopy(reward_model.backbone.config), attn_implementation="sdpa")
    lm.model.load_state_dict(reward_model.backbone.state_dict())
    policy = Policy(lm.float(), reward_model.tokenizer, reward_model.image_processor).to(reward_model.device).train()
    rng, n = random.Random(cfg.seed), 16
    rows = synthetic(cfg.sft_steps * n, seed=2_000_000 + cfg.seed)  # pictures of their own: neither RL nor the examination shows them again
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(cfg.sft_steps), desc="fine-tuning the tiny policy"):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20, (cfg.sft_steps - step) / (0.3 * cfg.sft_steps))
        shown = []
        for c in rows[step * n:(step + 1) * n]:
            wrong = [r for r in c.responses if r != c.answer]
            mixed = [c.answer] * 3 + rng.choices(wrong, k=2) if 4 * step >= 3 * cfg.sft_steps else [c.answer]
            shown.append(replace(c, pairs=[], responses=mixed))
        loss = -policy(pack(shown, policy.tokenizer, policy.image_processor).to(policy.device)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_policy(policy.eval(), folder)


# ---------------------------------------------------------------------------------------------------------------------------------
# 2  Rollouts


@dataclass
class Group:
    """One prompt and its G rollouts: what was written, what it is worth, and what is learnt from it."""
    comparison: Comparison  # the prompt with its images and answer
    prompt: Encoded
    rollouts: list[list[int]]  # token ids, <|im_end|> included; one without it was cut off
    texts: list[str]
    truncated: torch.Tensor  # (G,) bool
    matches: torch.Tensor  # (G,) bool
    model_rewards: torch.Tensor  # (G,) r_i; zeros if `rule` runs without a reward model
    rewards: torch.Tensor | None = None  # (G,) R_i
    advantages: torch.Tensor | None = None  # (G,) A_i


class Dice(LogitsProcessor):
    """Turns the choice of the largest logit into a draw from the softmax: argmax(logits + Gumbel noise) has exactly its probabilities.

    Each prompt has a generator of its own, so its rollouts depend on its seed and not on the rank, the batch or the other prompts (but for
    rounding, which in bf16 can tip a draw now and then).
    """

    def __init__(self, seeds: list[int], group_size: int, never: list[int], device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.group_size, self.never = group_size, never

    def __call__(self, input_ids, logits):
        logits = logits.float()
        noise = torch.stack([torch.empty(self.group_size, logits.shape[1], device=logits.device).exponential_(generator=g)
                             for g in self.generators])
        logits[:, self.never] = -torch.inf
        return logits - noise.view_as(logits).clamp(min=1e-30).log()  # -log of an exponential variable is a Gumbel variable


@torch.no_grad()
def generate(policy: Policy, prompts: list[Encoded], seeds: list[int], group_size: int, max_new_tokens: int) -> list[list[list[int]]]:
    """2  Token ids of G rollouts for every prompt, by transformers' own `generate`: the slowest part of a real run.

    The seam for a faster engine: whatever takes prompts and gives token ids can stand here, if it samples at temperature 1 without top-k,
    top-p or penalties, and has the weights of this step. The loss never takes an engine's log-probabilities, always `Policy.forward`'s.

    Prompts are padded on the left and read once, all but their last token; the keys and values are then repeated G times, and
    transformers goes on from that token. Trap: under autocast the stream between the layers is fp32 and so are the keys and values that
    are kept, twice the memory; embeddings in bf16 make all of it bf16.
    """
    lm, inputs = policy.lm, padded_rows(prompts, policy.lm.model, on_the_left=True)
    ids, mask, positions = (inputs.pop(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if hasattr(lm.model, "visual"):  # by how much the next position is not the count of tokens
        lm.model.rope_deltas = (positions.amax(dim=(0, 2)) + 1 - mask.sum(dim=1))[:, None].repeat_interleave(group_size, dim=0)
    on_gpu = policy.device.type == "cuda"
    half = lm.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.to(torch.bfloat16) if on_gpu else out)
    with stock_attention(lm.model), half, torch.autocast(policy.device.type, torch.bfloat16, enabled=on_gpu):
        cache = lm.model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[..., :-1], use_cache=True,
                         **inputs).past_key_values
        cache.batch_repeat_interleave(group_size)
        # A configuration of our own: the checkpoint's may hold a repetition penalty, which the log-probabilities would know nothing of
        written = lm.generate(
            input_ids=ids.repeat_interleave(group_size, dim=0), attention_mask=mask.repeat_interleave(group_size, dim=0),
            past_key_values=cache,
            logits_processor=LogitsProcessorList([Dice(seeds, group_size, policy.never, policy.device)]),
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, repetition_penalty=1.0,
                                               eos_token_id=policy.end,
                                               pad_token_id=policy.tokenizer.pad_token_id))[:, ids.shape[1]:].tolist()
    rollouts = [row[:row.index(policy.end) + 1] if policy.end in row else row for row in written]
    return [rollouts[i:i + group_size] for i in range(0, len(rollouts), group_size)]


def roll_out(policy: Policy, reward_models: list[RewardModel], named: list[tuple], prompts: list[Encoded], cfg: Config,
             step) -> list[Group]:
    """2 and 3  Groups of named prompts [(row, comparison), ...]: rollouts, matches with the answer, and the reward model's rewards."""
    groups, at_once = [], max(cfg.rollout_rows // cfg.group_size, 1)
    for at in range(0, len(named), at_once):
        part = slice(at, at + at_once)
        seeds = [random.Random(f"{cfg.seed} {step} {row}").getrandbits(62) for row, _ in named[part]]
        written = generate(policy, prompts[part], seeds, cfg.group_size, cfg.max_new_tokens)
        for (_, comparison), prompt, rollouts in zip(named[part], prompts[part], written):
            texts = [policy.tokenizer.decode([i for i in ids if i != policy.end]) for ids in rollouts]
            truncated = torch.tensor([ids[-1] != policy.end for ids in rollouts])
            matches = torch.tensor([answer_matches(text, comparison.answer) for text in texts]) & ~truncated
            groups.append(Group(comparison, prompt, rollouts, texts, truncated, matches, torch.zeros(len(rollouts))))
    if not reward_models:
        return groups
    # Each distinct rollout is scored once. Not only to save time: the same words in two branches get rewards that differ in the last digit,
    # and in a group that agrees on everything the division by the standard deviation would make advantages of +-1 from that digit.
    distinct = [list(dict.fromkeys(map(tuple, g.rollouts))) for g in groups]
    ended = [replace_responses(g.prompt, [[*ids] if ids[-1] == policy.end else [*ids, policy.end] for ids in d])
             for g, d in zip(groups, distinct)]
    for members in fill_packs([e.tokens for e in ended], cfg.pack_tokens):
        with torch.no_grad():
            batch = pack([ended[m] for m in members]).to(policy.device)
            rewards = torch.stack([model(batch) for model in reward_models]).mean(dim=0).cpu()  # section 4.7: the plain mean is best
        for m, part in zip(members, rewards.split([len(distinct[m]) for m in members])):
            groups[m].model_rewards = part[[distinct[m].index(tuple(ids)) for ids in groups[m].rollouts]]
    return groups


# ---------------------------------------------------------------------------------------------------------------------------------
# 3, 4 and 6  Rewards, advantages, loss

UNITS = {word: words.split()[0] for words in (  # every spelling -> the first
    "cm centimeter centimeters centimetre centimetres", "mm", "m meter meters metre metres", "km kilometers kilometres", "g grams",
    "kg kilograms", "s seconds", "min minutes", "h hours", "% percent", "° degree degrees", "$ dollars", "€ euros")
    for word in words.split()}
BOXED = re.compile(r"<answer>(.*?)</answer>|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", re.DOTALL)
PREAMBLE = re.compile(r"^\W*(?:the )?(?:(?:final|correct|right) )?(?:answer|option|choice)(?: is)?\b[\s:]*", re.IGNORECASE)
LETTER = re.compile(r"^[^\w-]*([A-Za-z])(?:\W*$|[).:](?:\s|$))")  # "A", "(a)", "B.", "C) red"; not "a red circle"
WORD = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)(?:[/:]\d+)*|(?:(?<!\w)-)?[^\W\d_]+(?:'[^\W\d_]+)?|"  # numbers; words, a variable's minus
                  r"[%°$€<>≤≥≠=^√±×÷]|(?<=\w)[+*/](?=\w)|(?<=\w )\+(?= \w)")  # signs; a * elsewhere is emphasis
SPELT = {"\u2212": "-",  # the typographic minus
         "<=": "≤", ">=": "≥", "\\leq": "≤", "\\geq": "≥", "\\sqrt": "√", "^\\circ": "°", "\\%": "%"}


def normalise(text: str) -> tuple[list[str], set[str], str]:
    """3  What counts in an answer: (words, numbers and signs, the unit of a lone number, the letter of an option).

    Only what stands in <answer> tags or \\boxed{} is read, if they are there. Case, spaces, emphasis and punctuation do not count, 1,000
    is 1000, 2.50 is 2.5 and \\frac{1}{2} is 1/2; a number's sign, point and colon do, and so do the signs of mathematics.

    >>> normalise("The answer is: **Red**,  circle!")
    (['red', 'circle'], set(), '')
    >>> normalise("(B) 2.50 cm")
    (['2.5'], {'cm'}, 'b')
    """
    if found := BOXED.findall(text):
        text = found[-1][0] or found[-1][1]
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^\g<0>", text)  # NFKC would make 102 of ten to the second
    text = unicodedata.normalize("NFKC", text)
    for spelling, sign in SPELT.items():
        text = text.replace(spelling, sign)
    text = PREAMBLE.sub("", re.sub(r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text).strip())
    letter = LETTER.match(text)
    if letter and (rest := text[letter.end():].strip(" \n.*")):
        text = rest  # what follows the letter is the option's text
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).lower()
    words = [re.sub(r"^(-?)\.", r"\g<1>0.", w) for w in WORD.findall(text)]
    words = [re.sub(r"\.?0+$", "", w) if re.fullmatch(r"-?\d+\.\d+", w) else w for w in words]
    rest = [w for w in words if w not in UNITS]
    if len(rest) == 1 and rest[0][-1].isdigit():  # a unit is a unit only beside a lone number: "m" may also be an answer
        return rest, {UNITS[w] for w in words if w in UNITS}, letter[1].lower() if letter else ""
    return words, set(), letter[1].lower() if letter else ""


def answer_matches(response: str, answer: str) -> bool:
    """3  Whether a response is the answer, after `normalise`. Of two units both must agree, one alone is no matter.

    >>> answer_matches("b) 5 cm", "B"), answer_matches("5 centimetres", "5"), answer_matches("5 cm", "5 km"), answer_matches("a bee", "B")
    (True, True, False, False)
    """
    (words, unit, letter), (right, right_unit, right_letter) = normalise(response), normalise(answer)
    if letter and right_letter:
        return letter == right_letter
    return bool(right) and words == right and (unit == right_unit or not unit or not right_unit)


def reward(kind: str, matches: torch.Tensor, r: torch.Tensor, truncated: torch.Tensor) -> torch.Tensor:
    """3  Rewards R (G,) of a group, from matches (G,), the reward model's r (G,), and truncated (G,): a cut-off one gets the lowest R.

    >>> yes, no, r = torch.tensor([True, False]), torch.tensor([False, False]), torch.tensor([0.0, 0.0])
    >>> reward("hybrid", yes, r, no).tolist(), reward("pairwise", yes, r, no).tolist()
    ([1.0, 0.5], [0.0, 0.0])
    """
    if kind == "rule":
        rewards = matches.float()
    elif kind == "model":
        rewards = r.clone()
    elif kind == "hybrid":  # sigmoid < 1: a wrong rollout is never paid more than a right one
        rewards = torch.where(matches, torch.ones_like(r), torch.sigmoid(r))
    else:  # a generative judge's seam: any (G, G) table of preferences, 1 where row i beats column j, can take the place of the sigmoid
        rewards = (torch.sigmoid(r[:, None] - r[None, :]) - 0.5).sum(dim=1)
    rewards[truncated] = rewards.min()
    return rewards


def group_advantages(rewards: torch.Tensor, no_std: bool = False) -> torch.Tensor:
    """4  A = (R - mean R) / (std R + 1e-6), over the G rollouts of one prompt; std with 1/G, not 1/(G - 1).

    Agreement is tested and not left to the subtraction: a mean that is off by one rounding would be blown up by the division.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0])).round(decimals=4).tolist()           # mean 1/2, std 1/2
    [1.0, -1.0, -1.0, 1.0]
    """
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred if no_std else centred / (rewards.std(correction=0) + 1e-6)


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """6  k3 of every token: exp(d) - d - 1 with d = l_ref - l. Its mean under pi is KL(pi | ref), and no single value is negative."""
    d = ref_logprobs - logprobs
    return torch.exp(d) - d - 1


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantage, tokens_in_step, clip_eps=0.2, clip_eps_high=0.2,
              kl_coef=0.0) -> torch.Tensor:
    """6  The clipped objective of PPO with a KL term, summed over tokens and divided by the tokens of the step. All inputs (tokens,).

    The smaller of the two products stops the pull on a token as soon as it has moved by eps in the direction that A wants; a token that
    moved the wrong way is pulled back in full.

    >>> a, b = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()        # the token has become twice as likely: rho = 2
    >>> grpo_loss(a, b, a, torch.tensor([1.0]), 1).item(), grpo_loss(a, b, a, torch.tensor([-1.0]), 1).item()
    (-1.2000000476837158, 2.0)
    """
    ratio = torch.exp(logprobs - old_logprobs)
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_eps, 1 + clip_eps_high) * advantage)
    return -(objective - kl_coef * kl_estimate(logprobs, ref_logprobs)).sum() / tokens_in_step


@dataclass
class Batch:
    """Some groups as a pack, with what the loss needs of every rollout token."""
    pack: Pack
    advantage: torch.Tensor  # (tokens,) the advantage of the rollout that a token is of
    keep: torch.Tensor  # (tokens,) False where --mask_truncated leaves a cut-off rollout out


def make_batches(groups: list[Group], cfg: Config) -> list[Batch]:
    rows, out = [replace_responses(g.prompt, g.rollouts) for g in groups], []
    for members in fill_packs([row.tokens for row in rows], cfg.pack_tokens):
        p = pack([rows[m] for m in members])
        of = response_tokens(p)[2]
        truncated = torch.cat([groups[m].truncated for m in members])
        out.append(Batch(p, torch.cat([groups[m].advantages for m in members])[of], ~truncated[of] | (not cfg.mask_truncated)))
    return out


def take_step(model, reference: Policy, optimizer, batches: list[Batch], filler: Batch, cfg: Config, world: World, micro_steps: int,
              tokens: int):
    """5 to 7  `passes` updates from one set of rollouts. Returns this rank's sums of [loss, k3, clipped tokens] in the last pass, and the
    gradient norm of each.

    All ranks make the same number of micro-steps, one pack each; a rank that has fewer packs runs `filler` at weight 0, since the ranks
    exchange gradients together. DDP averages over the ranks while every loss is already divided by the tokens of all: hence the factor
    world_size. Gradients are exchanged at every micro-step, where they add up in DDP's own buffers: to wait for the last one, as train.py
    does, would need a second copy of them, 15 GB for the 3B. One that is not finite skips its update, on all ranks alike.
    """
    old, ref, norms, trained = {}, {}, [], [p for p in model.parameters() if p.requires_grad]
    for _ in range(cfg.passes):
        sums = torch.zeros(3, dtype=torch.float64)
        for micro in range(micro_steps):
            batch, weight = (batches[micro], 1.0) if micro < len(batches) else (filler, 0.0)
            packed, advantage, keep = batch.pack.to(world.device), batch.advantage.to(world.device), batch.keep.to(world.device)
            logprobs = model(packed)  # through the wrapper
            if micro not in old:
                with torch.no_grad():
                    old[micro], ref[micro] = logprobs.detach(), reference(packed)
            loss = grpo_loss(logprobs[keep], old[micro][keep], ref[micro][keep], advantage[keep], tokens, cfg.clip_eps,
                             cfg.clip_eps_high, cfg.kl_coef)
            (loss * (weight * world.world_size)).backward()
            if weight:
                ratio = torch.exp(logprobs.detach() - old[micro])
                far = ((ratio > 1 + cfg.clip_eps_high) & (advantage > 0)) | ((ratio < 1 - cfg.clip_eps) & (advantage < 0))
                sums += torch.stack([loss.detach() * tokens, kl_estimate(logprobs.detach(), ref[micro])[keep].sum(),
                                     far[keep].sum()]).double().cpu()
        norms.append(float(nn.utils.clip_grad_norm_(trained, cfg.clip)))
        if math.isfinite(norms[-1]):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sums.tolist(), norms


# ---------------------------------------------------------------------------------------------------------------------------------
# Prompts, checkpoints, and the run folder


def open_prompts(cfg: Config) -> tuple[list, list[int], list[int]]:
    """(rows, which of them to learn from, which to evaluate on). Drawn pictures: one exam for all seeds, none of it among the prompts."""
    if not cfg.data:
        rows = synthetic(cfg.max_steps * cfg.batch_size, seed=3_000_000 + cfg.seed) + synthetic(cfg.eval_size, held_out=True)
        n = len(rows) - cfg.eval_size
        return rows, list(range(n)), list(range(n, len(rows)))
    rows = read_comparisons(cfg.data, needs_responses=False)
    if "rule" in cfg.reward:
        without = [i for i in range(len(rows)) if not rows[i].answer]
        if without:
            raise rows.bad_row(without[0], f"no `answer`, as in {len(without)} of the {len(rows)} rows; --reward rule needs one in each "
                                           f"(model and pairwise need none, hybrid pays sigmoid(reward) where there is none)")
    n = min(cfg.eval_size, max(len(rows) // 10, 1))
    held = {i * len(rows) // n for i in range(n)}
    return rows, [i for i in range(len(rows)) if i not in held] or [0], sorted(held)


def read_prompts(indices: list[int], rows, policy: Policy, world: World, threads) -> tuple[list[tuple], list[Encoded]]:
    """This rank's prompts as [(row, comparison), ...], and as tokens and patches. A row that cannot be used is a BadRow on all ranks,
    whichever of them met it."""

    def read(i):
        try:
            comparison = rows[i]
            return comparison, encode(replace(comparison, responses=[], pairs=[]), policy.tokenizer, policy.image_processor)
        except ValueError as error:
            return str(rows.bad_row(i, error) if hasattr(rows, "bad_row") and not isinstance(error, BadRow) else error)

    found = list(threads.map(read, indices))
    if problems := [p for p in world.gather_objects(next((f for f in found if isinstance(f, str)), "")) if p]:
        raise BadRow(problems[0])
    return [(i, comparison) for i, (comparison, _) in zip(indices, found)], [encoded for _, encoded in found]


def load_reward_models(cfg: Config, world: World, say) -> list[RewardModel]:
    """The members of the ensemble, frozen, in bf16 on a GPU. The default one is made by train.py if the tiny policy needs it."""
    by_default = cfg.reward_model == [DEFAULT_REWARD_MODEL]
    if by_default and cfg.policy != "tiny" and cfg.reward == ["rule"]:
        return []  # r(x, y) is then reported as 0
    if by_default and cfg.policy == "tiny" and not (Path(DEFAULT_REWARD_MODEL) / "reward_config.json").exists():
        command, code = [sys.executable, str(Path(__file__).with_name("train.py")), "--out", DEFAULT_REWARD_MODEL], 0
        say(f"there is no reward model in {DEFAULT_REWARD_MODEL} yet: making one first, with {' '.join(command[1:])}")
        if world.rank == 0:  # a world of its own, whatever torchrun told this process
            code = subprocess.run(command, env={k: v for k, v in os.environ.items()
                                                if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}).returncode
        if any(world.gather_objects(code)):
            raise ValueError(f"train.py could not make a reward model in {DEFAULT_REWARD_MODEL}; see its message above")
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    return [RewardModel.from_pretrained(path, dtype).to(world.device).requires_grad_(False) for path in cfg.reward_model]


def check_families(policy: Policy, cfg: Config, reward_models: list[RewardModel]) -> None:
    """The reward models read the policy's tokens and patches as they are, so both must mean the same by them."""
    for path, model in zip(cfg.reward_model, reward_models):
        if not policy.tokenizer.get_vocab().items() <= model.tokenizer.get_vocab().items():
            raise ValueError(f"the reward model {path} has another tokenizer family than the policy {cfg.policy}: the same token "
                             f"has another number; take a policy and a reward model that come from the same backbone family")
        if policy.image_processor is not None and model.image_processor is None:
            raise ValueError(f"the reward model {path} is text-only and the policy {cfg.policy} sees: it would read image tokens as words")


def make_optimizer(parameters: list, cfg: Config, world: World):
    """AdamW; with several ranks each keeps the moments of its share only (ZeRO-1): for the 3B that is 4 GB a GPU in place of 30."""
    if world.world_size == 1:
        return torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.0, fused=world.device.type == "cuda")
    from torch.distributed.optim import ZeroRedundancyOptimizer
    # Not fused: ZeRO loads AdamW's step counts onto the CPU, which the fused kernel then refuses (pytorch issue 124133)
    return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW, lr=cfg.lr, weight_decay=0.0)


def save_checkpoint(file: Path, policy: Policy, optimizer, world: World, state: dict) -> None:
    if world.world_size > 1:
        optimizer.consolidate_state_dict(to=0)
    failure = write_state(file, state | {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}) if world.rank == 0 else ""
    if failure := next(filter(None, world.gather_objects(failure)), ""):
        raise OSError(failure)


def load_checkpoint(file: Path, policy: Policy, optimizer, cfg: Config, world: World) -> dict:
    """Puts weights and optimiser back and returns the rest. ValueError if it was made under settings that shape the training otherwise."""
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    check_settings(file, state["config"], cfg)
    policy.load_state_dict(state["policy"])
    optimizer.load_state_dict(state["optimizer"])
    if world.world_size > 1:
        optimizer.state.clear()  # ZeRO's wrapper keeps a copy of the moments that nobody reads: 4 GB for the 3B
    return {key: value for key, value in state.items() if key not in ("policy", "optimizer")}


def check_settings(file: Path, old: dict, cfg: Config) -> None:
    free, now = {"out", "overwrite", "resume", "combine", "reward", "rollout_rows", "gradient_checkpointing", "save_every"}, asdict(cfg)
    if changed := [f"{key} was {value!r}, is {now.get(key)!r}" for key, value in old.items() if key not in free and now.get(key) != value]:
        raise ValueError(f"{file} belongs to another run: {'; '.join(changed)}. Use the same flags, or another --out")


# ---------------------------------------------------------------------------------------------------------------------------------
# Evaluation and report


@torch.no_grad()
def examine(policy: Policy, reference: Policy, reward_models, named: list[tuple], prompts: list[Encoded], cfg: Config,
            world: World) -> list[dict]:
    """One record for every held-out prompt, on every rank: its G rollouts with match and reward, their length and KL(pi | ref) per token.

    The rollouts are drawn at temperature 1, as in training: what the policy does on average, not what it would do at its best.
    The same dice are thrown at every examination, so two policies differ by what they learnt and not by luck.
    """
    records, groups = [], roll_out(policy, reward_models, named, prompts, cfg, "held out")
    rows = [replace_responses(g.prompt, g.rollouts) for g in groups]
    for members in fill_packs([row.tokens for row in rows], cfg.pack_tokens):
        p = pack([rows[m] for m in members]).to(policy.device)
        of_group = response_tokens(p)[2] // cfg.group_size
        kl = torch.zeros(len(members), device=policy.device).scatter_add(0, of_group, kl_estimate(policy(p), reference(p))).tolist()
        for m, kl_sum in zip(members, kl):
            g, c = groups[m], groups[m].comparison
            records.append({"row": named[m][0], "category": c.category or "all", "answer": c.answer, "prompt": c.prompt, "kl_sum": kl_sum,
                            "tokens": sum(map(len, g.rollouts)), "texts": g.texts, "matches": g.matches.tolist(),
                            "truncated": g.truncated.tolist(), "model_rewards": [round(x, 4) for x in g.model_rewards.tolist()]})
    return sorted((r for part in world.gather_objects(records) for r in part), key=lambda r: r["row"])


def rewards_of(record: dict, kind: str) -> torch.Tensor:
    return reward(kind, *(torch.tensor(record[key]) for key in ("matches", "model_rewards", "truncated")))


def figures(records: list[dict], kind: str | None = None) -> dict:
    """The table's numbers: accuracy by category and in all, with its standard error over prompts (None if no prompt has an answer to be
    right about); reward, r(x, y), length and share cut off per rollout; KL per token."""
    by_category, rollouts = {}, sum(len(r["texts"]) for r in records)
    for r in records:
        if r["answer"]:
            by_category.setdefault(r["category"], []).append(statistics.fmean(r["matches"]))
    share = [value for values in by_category.values() for value in values]
    return {"accuracy": statistics.fmean(share) if share else None,
            "standard_error": statistics.pstdev(share) / math.sqrt(len(share)) if share else None,
            "accuracy_by_category": {name: statistics.fmean(values) for name, values in sorted(by_category.items())},
            "reward": statistics.fmean(rewards_of(r, kind).mean().item() for r in records) if kind else None,
            "model_reward": statistics.fmean(x for r in records for x in r["model_rewards"]),
            "kl": sum(r["kl_sum"] for r in records) / sum(r["tokens"] for r in records),
            "length": sum(r["tokens"] for r in records) / rollouts,
            "truncated": sum(map(sum, (r["truncated"] for r in records))) / rollouts}


def accuracy_of(records: list[dict]) -> str:
    f = figures(records)
    known = "no answers to check" if f["accuracy"] is None else f"true accuracy {f['accuracy']:.3f} +- {f['standard_error']:.3f}"
    return f"{known} on {len(records)} held-out prompts"


def table(rows: dict[str, dict], spread: dict[str, float]) -> list[list[str]]:
    """In the manner of Table 11: the start and each reward in a line, true accuracy in percent."""
    categories = list(rows["start"]["accuracy_by_category"])
    lines = [["policy", "accuracy", *categories, "reward", "r(x, y)", "KL", "length", "cut off"]]
    for name, f in rows.items():
        paid = "" if f["reward"] is None else f"{f['reward_at_start']:.2f} -> {f['reward']:.2f}"
        accuracy = "" if f["accuracy"] is None else f"{100 * f['accuracy']:.1f} +- {100 * spread[name]:.1f}"
        lines.append([name, accuracy, *(f"{100 * f['accuracy_by_category'][c]:.1f}" for c in categories),
                      paid, f"{f['model_reward']:.2f}", f"{f['kl']:.3f}", f"{f['length']:.1f}", f"{100 * f['truncated']:.1f}%"])
    return lines


def combine(folders: list[str]) -> str:
    """Means over finished runs as one table, the standard deviation of the accuracy over runs behind +-, and the gain over each run's
    own start."""
    if missing := [folder for folder in folders if not (Path(folder) / "summary.json").is_file()]:
        raise ValueError(f"{missing[0]} holds no summary.json; want the --out of finished runs")
    runs = [json.loads((Path(folder) / "summary.json").read_text())["policies"] for folder in folders]

    def mean(values):
        if isinstance(values[0], dict):
            return {key: mean([v[key] for v in values]) for key in values[0]}
        return None if values[0] is None else statistics.fmean(values)

    names = [name for name in runs[0] if all(name in run for run in runs)]
    if any(run["start"]["accuracy"] is None for run in runs):
        raise ValueError("runs without answers have no accuracy to compare")
    spread = {name: statistics.stdev([run[name]["accuracy"] for run in runs]) if len(runs) > 1 else 0.0 for name in names}
    lines = [markdown(table({name: mean([run[name] for run in runs]) for name in names}, spread)), ""]
    for name in names[1:]:
        gains = [100 * (run[name]["accuracy"] - run["start"]["accuracy"]) for run in runs]
        lines.append(f"{name}: {statistics.fmean(gains):+.1f} points over the start on average ({', '.join(f'{g:+.1f}' for g in gains)})")
    return "\n".join(lines)


def before_and_after(before: dict, after: dict[str, dict], cfg: Config) -> str:
    """Rollouts, rewards and advantages of one prompt at the start and after each reward, as text."""
    prompt = before["prompt"] if isinstance(before["prompt"], str) else json.dumps(before["prompt"])
    lines = [f"=== {prompt}   (answer: {before['answer']})"]
    for kind, record in after.items():
        for name, r in ((f"{kind}, before", before), (f"{kind}, after", record)):
            paid = rewards_of(r, kind)
            advantages = group_advantages(paid, cfg.no_std)
            lines.append(f"--- {name}")
            for i, said in enumerate(r["texts"]):
                lines.append(f"r {r['model_rewards'][i]:6.2f}   R {paid[i]:6.2f}   A {advantages[i]:6.2f}  "
                             f"{'+' if r['matches'][i] else ' '} {' '.join(said.split())}{' [cut off]' * r['truncated'][i]}")
    return "\n".join(lines)


PAGE = string.Template("""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>GRPO with the reward model</title>
<style>body{font:15px sans-serif; margin:2em} svg{max-width:100%; height:auto} .table{overflow-x:auto} table{border-collapse:collapse}
td,th{padding:2px 10px; border-bottom:1px solid #ddd; text-align:right; white-space:nowrap} td:first-child,th:first-child{text-align:left}
pre{font-size:12px; background:#f6f6f6; padding:1em; columns:36em; white-space:pre-wrap; overflow-wrap:anywhere}
img{max-width:224px}</style>
<h1>GRPO with the reward model</h1><p>True accuracy in percent on $n held-out prompts, $group_size rollouts
each at temperature 1, +- one standard error over prompts; reward: what is paid, at the start and at the end; r(x, y): the reward model's;
KL to the start, per token; length in tokens.</p>
<div class="table">$table</div><p>A reward that rises while the true accuracy does not is being hacked.</p>$curves
<h2>Some prompts, before and after</h2><p>$legend.</p>$prompts<h2>Settings</h2><pre>$settings</pre></html>
""")
LEGEND = "+ marks a match with the answer; r is the reward model's reward, R the reward that is paid, A the advantage"


def write_report(out: Path, cfg: Config) -> str:
    """table.md, summary.json, curves.svg, rollouts.txt and index.html from what the parts of the run left in `out`; returns the table."""
    start = json.loads((out / "start.json").read_text())
    results = {kind: json.loads((out / kind / "result.json").read_text()) for kind in REWARDS if (out / kind / "result.json").exists()}
    rows = {"start": figures(start["records"])}
    for kind, result in results.items():
        rows[kind] = figures(result["records"], kind) | {"reward_at_start": figures(start["records"], kind)["reward"]}
    lines = table(rows, {name: f["standard_error"] for name, f in rows.items()})
    summary = {"policies": rows, "n": len(start["records"]), "rollouts_per_prompt": cfg.group_size, "config": asdict(cfg),
               "seconds": {"start": start["seconds"]} | {kind: result["seconds"] for kind, result in results.items()}}

    logs = {kind: [json.loads(line) for line in open(out / kind / "metrics.jsonl")] for kind in results}

    def smooth(log, key):  # means over 1/25 of the run
        width = max(len(log) // 25, 1)
        parts = [[row for row in log[i:i + width] if row[key] is not None] for i in range(0, len(log), width)]
        return [(part[-1]["step"], statistics.fmean(row[key] for row in part)) for part in parts if part]

    panels = {"reward": "reward that is paid", "model_reward": "r(x, y), the reward model's", "accuracy": "true accuracy of the rollouts",
              "kl": "KL to the start, per token"}
    dashed = {"accuracy": {"start": rows["start"]["accuracy"]}} if rows["start"]["accuracy"] is not None else {}
    draw_curves(out / "curves.svg", f"GRPO, seed {cfg.seed}", [
        (heading, {kind: smooth(log, key) for kind, log in logs.items()}, dashed.get(key, {})) for key, heading in panels.items()])

    before = {r["row"]: r for r in start["records"]}
    after = {row: {kind: next(r for r in result["records"] if r["row"] == row) for kind, result in results.items()}
             for row, _ in start["shown"]}
    texts = [before_and_after(before[row], after[row], cfg) for row, _ in start["shown"]]
    prompts = "".join(f"{picture}<pre>{html.escape(text)}</pre>" for (_, picture), text in zip(start["shown"], texts))
    write_text(out / "index.html", PAGE.substitute(
        n=len(before), group_size=cfg.group_size, table=html_table(lines), curves=(out / "curves.svg").read_text(), legend=LEGEND,
        prompts=prompts, settings=html.escape(json.dumps(asdict(cfg), indent=1))))
    write_text(out / "rollouts.txt", "\n\n".join([LEGEND, *texts]) + "\n")
    write_text(out / "table.md", markdown(lines) + "\n")
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return markdown(lines)


# ---------------------------------------------------------------------------------------------------------------------------------


def grpo(kind: str, start, reference: Policy, reward_models, rows, train: list[int], exam: tuple, cfg: Config, world: World,
         stop: StopSignal, threads, say) -> int:
    """GRPO under one reward, from the start to result.json. Returns 0, or the exit status if told to stop or if it cannot go on."""
    folder, begun, first = Path(cfg.out) / kind, time.time(), world.rank == 0
    folder.mkdir(exist_ok=True)
    policy = load_policy(start, cfg.max_pixels).to(world.device)
    if cfg.gradient_checkpointing:
        recompute_activations(policy.lm)
    model = policy
    if world.world_size > 1:
        model = DistributedDataParallel(policy, device_ids=[world.local_rank] if world.device.type == "cuda" else None,
                                        broadcast_buffers=False,
                                        gradient_as_bucket_view=True)
    optimizer = make_optimizer(list(policy.parameters()), cfg, world)
    state = {"step": 0, "seconds": 0.0, "bad_gradients": 0, "bad_in_a_row": 0, "log": []}
    if cfg.resume and (folder / "checkpoint.pt").exists():
        state |= load_checkpoint(folder / "checkpoint.pt", policy, optimizer, cfg, world) | {"bad_in_a_row": 0}
        say(f"{kind}: going on from step {state['step']}")
    state["config"] = asdict(cfg)
    order = Order([[1] * len(train)], [1.0], cfg.batch_size, cfg.seed)
    steps = min(cfg.max_steps or sys.maxsize, order.steps(cfg.epochs)) if cfg.data else cfg.max_steps
    filler = Batch(pack([Comparison("?", ["a"])], policy.tokenizer), torch.zeros(2), torch.ones(2, dtype=torch.bool))
    bar, reason, code = tqdm(total=steps, initial=state["step"], disable=not first, dynamic_ncols=True, desc=f"GRPO, {kind}"), "", 0
    while state["step"] < steps:
        if (number := int(world.gather([stop.number]).max())) or state["bad_in_a_row"] >= 10:
            reason, code = ("told to stop", 128 + number) if number else (
                "ten updates in a row had a gradient that is not finite; look at metrics.jsonl, then start anew with a lower --lr", 1)
            break
        step, started = state["step"], time.time()

        # 1  Prompts
        try:
            mine = [train[i] for _, i in order.step(step)][world.rank::world.world_size]
            named, prompts = read_prompts(mine, rows, policy, world, threads)
        except BadRow as error:  # on all ranks alike; the steps so far are not lost
            reason, code = str(error), 1
            break

        # 2  Rollouts   3  Rewards
        groups = roll_out(policy.eval(), reward_models, named, prompts, cfg, step)
        for g in groups:
            g.rewards = reward(kind, g.matches, g.model_rewards, g.truncated)
            # 4  Advantages
            g.advantages = group_advantages(g.rewards, cfg.no_std)

        # 5  Logprobs   6  Loss   7  Update
        batches = make_batches([g for g in groups if not (cfg.drop_equal and not g.advantages.any())], cfg)
        own_tokens = sum(int(b.keep.sum()) for b in batches)
        shared = world.gather([own_tokens, len(batches)])  # what all ranks must agree on
        tokens, micro_steps = int(shared[:, 0].sum()), int(shared[:, 1].max())
        sums, norms = [0.0] * 3, []
        if tokens:
            sums, norms = take_step(model.train(), reference, optimizer, batches, filler, cfg, world, micro_steps, tokens)
        bad = sum(not math.isfinite(norm) for norm in norms)
        state |= {"step": step + 1, "bad_gradients": state["bad_gradients"] + bad,
                  "bad_in_a_row": (state["bad_in_a_row"] + bad) if bad else 0}

        # Log and save: (sum on this rank, number of what is summed there), which become means over all ranks
        rollouts, known = sum(len(g.rollouts) for g in groups), [g for g in groups if g.comparison.answer]
        own = {"reward": (sum(g.rewards.sum().item() for g in groups), rollouts),
               "model_reward": (sum(g.model_rewards.sum().item() for g in groups), rollouts),
               "accuracy": (sum(g.matches.sum().item() for g in known), sum(len(g.rollouts) for g in known)),
               "length": (sum(len(ids) for g in groups for ids in g.rollouts), rollouts),
               "truncated": (sum(g.truncated.sum().item() for g in groups), rollouts),
               "equal_groups": (sum(not g.advantages.any() for g in groups), len(groups)),
               "loss": (sums[0], own_tokens), "kl": (sums[1], own_tokens), "clipped": (sums[2], own_tokens)}
        total = dict(zip(own, world.gather([x for pair in own.values() for x in pair]).sum(dim=0).view(-1, 2).tolist()))
        row = {"step": step + 1} | {name: value / max(n, 1) for name, (value, n) in total.items()} | {
            "grad_norm": max(norms, default=0.0), "tokens": tokens, "seconds": round(time.time() - started, 3)}
        if not total["accuracy"][1]:  # no prompt of the step has an answer
            row["accuracy"] = None
        state["log"] = [*state["log"], row]
        if first:
            write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in state["log"]))
        bar.set_postfix_str(f"reward {row['reward']:.3f} kl {row['kl']:.3f} length {row['length']:.1f} "
                            f"equal {row['equal_groups']:.2f} norm {row['grad_norm']:.2f}"
                            + ("" if row["accuracy"] is None else f" accuracy {row['accuracy']:.3f}"))
        bar.update()
        if cfg.save_every and ((step + 1) % cfg.save_every == 0 or step + 1 == steps):
            save_checkpoint(folder / "checkpoint.pt", policy, optimizer, world, state | {"seconds": state["seconds"] + time.time() - begun})
    bar.close()
    state["seconds"] += time.time() - begun
    if reason:
        if state["step"]:
            save_checkpoint(folder / "checkpoint.pt", policy, optimizer, world, state)
        if first:
            saved = f"\n{state['step']} steps under {kind} are saved in {folder}; to go on: the same command with --resume"
            print(f"rl_demo.py: {reason}{saved if state['step'] else ''}", file=sys.stderr)
        return code
    if first:
        save_policy(policy, folder / "policy")
    world.barrier()
    records = examine(policy.eval(), reference, reward_models, *exam, cfg, world)
    if first:
        write_text(folder / "result.json", json.dumps({"records": records, "seconds": round(state["seconds"], 1),
                                                       "bad_gradients": state["bad_gradients"]}) + "\n")
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    world.barrier()
    say(f"{kind}: {accuracy_of(records)} after {steps} steps in {state['seconds']:.0f} s")
    return 0


def main(cfg: Config, world: World) -> int:
    # A  Folder, signals
    out, first, began = Path(cfg.out), world.rank == 0, time.time()
    say = (lambda *text: tqdm.write(" ".join(map(str, text)))) if first else (lambda *text: None)
    stop, threads = StopSignal(), ThreadPoolExecutor()
    rows, train, held = open_prompts(cfg)
    problem = claim_folder(out, cfg.overwrite, cfg.resume, "start.json", LEFTOVER) if first else ""
    if problem := next(filter(None, world.gather_objects(problem)), ""):
        raise ValueError(problem)
    if examined := (out / "start.json").exists():
        check_settings(out / "start.json", json.loads((out / "start.json").read_text())["config"], cfg)
    say(json.dumps(asdict(cfg)))

    # B  Reward models
    reward_models = load_reward_models(cfg, world, say)

    # C  The start and the reference, which never moves
    start = cfg.policy
    if start == "tiny":
        start = out / "policy"
        if first and not examined:
            make_policy(cfg, start, reward_models[0])
        world.barrier()
    reference = load_policy(start, cfg.max_pixels, torch.bfloat16 if world.device.type == "cuda"
                            else torch.float32).to(world.device).requires_grad_(False)
    check_families(reference, cfg, reward_models)

    # D  The examination before
    exam = read_prompts(held[world.rank::world.world_size], rows, reference, world, threads)
    if not examined:
        records = examine(reference, reference, reward_models, *exam, cfg, world)
        if first:
            kinds = {r["category"]: r["row"] for r in reversed(records) if rows[r["row"]].images} | {r["row"]: r["row"] for r in records}
            shown = [(i, "".join(map(thumbnails, rows[i].images))) for i in list(dict.fromkeys(kinds.values()))[:5]]
            write_text(out / "start.json", json.dumps({"config": asdict(cfg), "records": records, "shown": shown,
                                                       "seconds": round(time.time() - began, 1)}) + "\n")
        say(f"start: {accuracy_of(records)}, {cfg.group_size} rollouts each")
    world.barrier()

    # E  GRPO under each reward in turn, each from the same start
    for kind in cfg.reward:
        if (out / kind / "result.json").exists():
            say(f"{kind}: done before")
        elif code := grpo(kind, start, reference, reward_models, rows, train, exam, cfg, world, stop, threads, say):
            return code

    # F  Report
    if first:
        print(f"\n{write_report(out, cfg)}\n\n"
              f"table.md, summary.json, curves.svg, rollouts.txt and index.html (open it in a browser) are in {out}")
    return 0


if __name__ == "__main__":
    world = None
    try:
        (config,) = HfArgumentParser(Config).parse_args_into_dataclasses()
        config = config.resolved()
        if config.combine:
            print(combine(config.combine))
            sys.exit(0)
        world = setup()
        status = main(config, world)
        world.close()
    except (ValueError, OSError) as error:
        print(f"rl_demo.py{f', rank {world.rank}' if world and world.rank else ''}: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)
