"""GRPO with the reward model, and what it does to the true accuracy of a policy: BaseReward (arXiv 2509.16127), 5.4.

Read: to the double line, 15 minutes; `grpo_step` is the algorithm.

    python train.py && python rl_demo.py             a tiny policy, then four rewards: a minute for each
    torchrun --nproc_per_node 8 rl_demo.py --policy Qwen/Qwen2.5-VL-3B-Instruct --reward_model DIR --data FOLDER \\
             --reward hybrid --gradient_checkpointing            the real thing: rows with a `prompt` and an `answer`

A policy, a language model, writes answers (rollouts), the reward model pays for them, and the policy moves towards the
better paid. One step of GRPO (arXiv 2402.03300), numbered as in the code below; pi is the policy, ref its frozen start,
beta kl_coef:

    1  prompts      batch_size prompts x, fixed by (seed, step) alone; rank r of w takes every w-th
    2  rollouts     y_1 ... y_G drawn from pi(. | x) at temperature 1, each until <|im_end|> or max_new_tokens
    3  rewards      with r_i = r(x, y_i) from the reward model, or the mean of several:
                      rule      R_i = 1 if y_i matches the answer, else 0
                      model     R_i = r_i
                      hybrid    R_i = 1 if y_i matches the answer, else sigmoid(r_i)
                      pairwise  R_i = sum over j of (sigmoid(r_i - r_j) - 1/2), the verdicts of all pairs of the group,
                                or with --judge those of a generative reward model, asked in both orders
                    A rollout cut off before its <|im_end|> never matches and gets the lowest reward of its group: the
                    reward model reads at <|im_end|>, and would otherwise pay for an end that the policy did not write.
    4  advantages   A_i = (R_i - mean(R)) / (std(R) + 1e-6); all zero where the rewards of a group agree
    5  logprobs     l_t = log pi(y_t | x, y_<t) of every rollout token; l_old at the first pass, l_ref under ref
    6  loss         rho_t = exp(l_t - l_old_t)
                    k3_t = exp(l_ref_t - l_t) - (l_ref_t - l_t) - 1, an estimate of KL(pi | ref), never < 0
                    loss = -1/N sum_it [min(rho_t A_i, clip(rho_t, 1 - eps, 1 + eps_high) A_i) - beta k3_t], N tokens
    7  update       clip the gradient, AdamW; then 5 to 7 again if passes > 1, with l_old as it was
At the first pass rho = 1: the first term's gradient is A_i times that of l_t (REINFORCE); k3 pulls pi back to ref.

Writes into OUT: policy/ (the tiny start), start.json; for each reward REWARD/metrics.jsonl, result.json, policy/ (and
checkpoint-STEP/ while unfinished); table.md, summary.json, curves.svg (by matplotlib), index.html.
Differs from the paper, which gives no rate, clipping, KL weight or length (we: 1e-6, 0.2, 0.04, 512). --no_std is Dr.
GRPO's (2503.20783); the loss per token, --clip_eps_high, --drop_equal and --mask_truncated are DAPO's (2503.14476),
--clamp_ratio and --drop_outliers are StableReinforce's (2505.02835). No LoRA, sharded weights or tools.
"""
import json
import math
import random
import re
import shutil
import signal
import sys
import time
import unicodedata
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, pstdev
from types import SimpleNamespace

import torch
import torch.distributed as dist
from markupsafe import Markup
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data import BadRow, Order, read_comparisons, synthetic, use_row
from evaluate import markdown, page, receipt, thumbnails
from model import (Policy, RewardModel, class_that_writes, encode, fill_packs, generate, pack, quicken_vision,
                   recompute_activations)
from train import (check_numbers, claim_folder, command_line, complain, curve, draw_curves, from_first, gather,
                   gather_objects, load_checkpoint, open_log, read_log, read_state, remove_checkpoints,
                   save_checkpoint, say, spread, start_processes, stop_signals, write_text)

# 3  Rewards R (G,) of a group, the G rollouts of one prompt; what else it has, `roll_out` says
def rule(group):
    return group.matches.float()

def model(group):
    return group.model_rewards.clone()

def hybrid(group):  # in fp32 sigmoid(20) is 1.0, the pay of a right answer
    return torch.where(group.matches, 1.0, torch.sigmoid(group.model_rewards).clamp(max=0.999))

def pairwise(group):
    if group.judged is not None:  # the paper's own: a generative judge's preferences for i over each j, summed
        return group.judged.clone()
    r = group.model_rewards
    return (torch.sigmoid(r[:, None] - r[None, :]) - 0.5).sum(dim=1)

REWARDS = {"rule": rule,
           "model": model, "hybrid": hybrid, "pairwise": pairwise}  # the names that --reward takes

def pay(kind: str, group) -> torch.Tensor:
    rewards = REWARDS[kind](group)
    rewards[group.truncated] = rewards.min()
    return rewards

def group_advantages(rewards: torch.Tensor, no_std: bool = False) -> torch.Tensor:
    """4  (R - mean R) / (std R + 1e-6) over the G rollouts of one prompt; std with 1/G, not 1/(G - 1).
    Agreement is tested and not left to the subtraction: a mean off by one rounding would be blown up by the division.
    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0])).round(decimals=4).tolist()           # mean 1/2, std 1/2
    [1.0, -1.0, -1.0, 1.0]"""
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred if no_std else centred / (rewards.std(correction=0) + 1e-6)

def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """6  k3 of every token. Its mean under pi is KL(pi | ref), and no single value is negative."""
    d = ref_logprobs - logprobs
    return torch.exp(d) - d - 1

def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantage, tokens, clip_eps=0.2, clip_eps_high=0.2, kl_coef=0.0,
              clamp_ratio=False):
    """6  PPO's clipped objective, with a KL term if kl_coef, over the tokens of the step. Tensors are (tokens,).
    The smaller of the two products stops the pull on a token as soon as it has moved by eps in the direction that A
    wants; a token that moved the wrong way is pulled back in full.
    >>> new, old = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()          # twice as likely now: rho = 2
    >>> [grpo_loss(new, old, new, torch.tensor([advantage]), 1).item() for advantage in (1.0, -1.0)]
    [-1.2000000476837158, 2.0]"""
    log_ratio = logprobs - old_logprobs
    ratio = torch.exp(log_ratio.clamp(math.log(1e-3), math.log(1e3)) if clamp_ratio else log_ratio)  # StableReinforce
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_eps, 1 + clip_eps_high) * advantage)
    return -(objective - kl_coef * kl_estimate(logprobs, ref_logprobs)).sum() / tokens

def grpo_step(kind: str, step: int, prompts: list, policy: Policy, optimizer, run) -> dict:
    """Steps 2 to 7 for this rank's prompts; returns the line of metrics."""
    cfg, groups = run.cfg, roll_out(policy.eval(), prompts, step, run)      # 2  Rollouts, and the r_i of 3
    for group in groups:
        group.rewards = pay(kind, group)                                    # 3  Rewards
        group.advantages = group_advantages(group.rewards, cfg.no_std)      # 4  Advantages
    if cfg.drop_outliers:
        drop_outliers(groups)
    batches, tokens = make_batches(groups, run)  # micro-steps, each token with its rollout's A; tokens of all ranks
    norms = []
    policy.train()
    for number in range(cfg.passes if tokens else 0):
        for batch in batches:
            packed = batch.pack.to(run.device)
            logprobs = policy(packed)[batch.keep]                           # 5  Logprobs
            if number == 0:
                batch.old, batch.ref = logprobs.detach(), run.reference(packed)[batch.keep]  # frozen: keeps no graph
            loss = grpo_loss(logprobs, batch.old, batch.ref, batch.advantage, tokens,
                             cfg.clip_eps, cfg.clip_eps_high, cfg.kl_coef, cfg.clamp_ratio)  # 6  Loss
            loss.backward()
            batch.loss, batch.logprobs = loss.detach(), logprobs.detach()  # the last pass is logged
        for p in policy.parameters():  # the ranks' gradients are added up: the loss was divided by all their tokens
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.clip)))
        if math.isfinite(norms[-1]):  # the same on all ranks
            optimizer.step()                                                # 7  Update
            tell_others(policy)  # each rank has updated its share of the parameters
        policy.zero_grad()
    return metrics(groups, batches, tokens, norms, cfg)

# ======================================================================================================================
# First reading ends here. Below: what a real run needs.
# ======================================================================================================================
@dataclass(frozen=True)
class Config:
    policy: str = HfArg(default="tiny", help="'tiny' (made here), a folder, or an id: Qwen/Qwen2.5-VL-3B-Instruct")
    reward_model: list[str] = HfArg(default_factory=lambda: ["runs/default"], help="of train.py; the mean of several")
    reward: list[str] = HfArg(default_factory=lambda: [*REWARDS], metadata={"choices": [*REWARDS]}, help="run in turn")
    judge: str = HfArg(default="", help="generative reward model whose verdicts `pairwise` takes, both orders")
    data: str = HfArg(default="", help="folder of prompts with answers (format: data.py); none: drawn pictures")
    out: str = HfArg(default="runs/rl", help="run folder, on a disk of all ranks: policies, table, page")
    overwrite: bool = HfArg(default=False, help="delete the run that --out holds and start anew")
    resume: bool = HfArg(default=False, help="go on from the checkpoints in --out")
    seed: int = HfArg(default=0, help="of the tiny policy, of the order of the prompts, and of the rollouts")
    group_size: int = HfArg(default=8, help="G, rollouts per prompt (paper: 8)")
    batch_size: int | None = HfArg(default=None, help="prompts per step over all ranks; 256 (paper), 16 for tiny")
    epochs: float = HfArg(default=1.0, help="passes over the prompts of --data (paper: 1)")
    max_steps: int | None = HfArg(default=None, help="stop after so many steps; 100 for drawn pictures, else all")
    passes: int = HfArg(default=1, help="updates from the same rollouts (paper: not given)")
    lr: float | None = HfArg(default=None, help="learning rate, constant; 1e-6 (paper: not given), 3e-4 for tiny")
    clip: float = HfArg(default=1.0, help="largest gradient norm (paper: not given)")
    clip_eps: float = HfArg(default=0.2, help="eps of the clipped ratio (PPO: 0.2)")
    clip_eps_high: float | None = HfArg(default=None, help="eps_high, if other than eps (DAPO: 0.28)")
    kl_coef: float = HfArg(default=0.04, help="beta, weight of the KL term (GRPO: 0.04; DAPO and Dr. GRPO: 0)")
    no_std: bool = HfArg(default=False, help="do not divide advantages by the standard deviation (Dr. GRPO)")
    drop_equal: bool = HfArg(default=False, help="leave out groups whose rewards agree, with no others instead (DAPO)")
    clamp_ratio: bool = HfArg(default=False, help="l - l_old into [ln 1e-3, ln 1e3] before exp (StableReinforce)")
    drop_outliers: bool = HfArg(default=False, help="A over all groups normalised, 0 beyond 3 std (StableReinforce)")
    mask_truncated: bool = HfArg(default=False, help="cut-off rollouts count in their group, not in the loss (DAPO)")
    max_new_tokens: int | None = HfArg(default=None, help="longest rollout; 512 (paper: not given), 10 for tiny")
    max_pixels: int | None = HfArg(default=None, help="of an image, 28 x 28 a token; 1003520, for tiny its own")
    pack_tokens: int | None = HfArg(default=None, help="tokens in a pack, or one longer group; 8192, 1024 for tiny")
    rollout_rows: int = HfArg(default=128, help="rollouts written at a time; keys and values need memory")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory for activations, a third more time")
    eval_size: int = HfArg(default=240, help="prompts of the examination; at most a tenth of --data")
    save_every: int | None = HfArg(default=None, help="steps between checkpoints; 5, 100 for tiny; 0: the last only")
    sft_steps: int = HfArg(default=400, help="fine-tuning steps of the tiny policy before RL, 16 prompts each")

    def resolved(self) -> "Config":  # with the defaults that depend on the policy filled in, and nonsense refused
        own = dict(batch_size=256, lr=1e-6, max_new_tokens=512, pack_tokens=8192, save_every=5, max_pixels=1280 * 784)
        if self.policy == "tiny":
            own = dict(batch_size=16, lr=3e-4, max_new_tokens=10, pack_tokens=1024, save_every=100)
        own |= {"clip_eps_high": self.clip_eps, "max_steps": None if self.data else 100}
        cfg = replace(self, **{name: value for name, value in own.items() if getattr(self, name) is None})
        check_numbers(cfg, ("batch_size", "epochs", "max_steps", "passes", "lr", "clip", "max_new_tokens", "max_pixels",
                            "pack_tokens", "rollout_rows", "eval_size"),
                      ("clip_eps", "clip_eps_high", "kl_coef", "save_every", "sft_steps"))
        if cfg.group_size < 2:
            raise ValueError(f"--group_size {cfg.group_size}: a rollout is compared with its group; 2 or more")
        if not cfg.data and cfg.policy != "tiny":
            raise ValueError(f"--policy {cfg.policy} needs --data FOLDER; the drawn prompts are for the tiny policy")
        return cfg

# 1  Prompts -----------------------------------------------------------------------------------------------------------
def open_prompts(cfg: Config) -> tuple:
    """(rows to learn from, rows to examine on). Drawn: one exam for all seeds, none of it among the prompts."""
    if not cfg.data:
        n = cfg.max_steps * cfg.batch_size
        return synthetic(n, seed=3_000_000 + cfg.seed), synthetic(cfg.eval_size, held_out=True)
    rows = read_comparisons(cfg.data, needs_responses=False)
    for i in range(len(rows)) if "rule" in cfg.reward else ():
        if not rows[i].answer:
            raise BadRow(f"{rows.place(i)}: no `answer`; rule needs one in each row, hybrid, model and pairwise do not")
    held = spread(min(cfg.eval_size, max(len(rows) // 10, 1)), len(rows))
    return rows.only(sorted(set(range(len(rows))) - set(held)) or [0]), rows.only(held)

def own_prompts(run, step: int) -> tuple[list, int]:
    """This rank's prompts of a step, and 1 if a row of any rank cannot be used, which is said; else 0."""
    prompts = None
    try:
        prompts = read_prompts(run.rows, [i for _, i in run.order.step(step)], run.reference.processor)
    except BadRow as error:
        complain("rl_demo.py", str(error))
    return prompts, int(gather([prompts is None]).max())

def read_prompts(rows, chosen, processor) -> list[tuple]:
    """This rank's of the chosen rows: (row, the comparison with images and answer, encoded)."""
    mine, encoded = chosen[dist.get_rank()::dist.get_world_size()], partial(encode, processor=processor)
    return [(i, rows[i], use_row(rows, i, encoded).with_responses([])) for i in mine]

# 2 and 3  Rollouts and what they are worth ----------------------------------------------------------------------------
def roll_out(policy: Policy, prompts: list[tuple], step, run) -> list[SimpleNamespace]:
    """A group for every prompt: what was written and what it is worth to the reward models. The dice of a prompt depend
    on seed, step and row alone, whatever rank rolls them."""
    cfg, end, groups, at_once = run.cfg, policy.end, [], max(run.cfg.rollout_rows // run.cfg.group_size, 1)
    for at in range(0, len(prompts), at_once):
        part = prompts[at:at + at_once]
        seeds = [random.Random(f"{cfg.seed} {step} {row}").getrandbits(62) for row, _, _ in part]
        written = generate(policy, [prompt for _, _, prompt in part], cfg.max_new_tokens, cfg.group_size, seeds)
        for (row, comparison, prompt), rollouts, sampled in zip(part, *written):
            g = SimpleNamespace(row=row, comparison=comparison, prompt=prompt)
            g.rollouts, g.sampled = rollouts, sampled  # G lists of token ids, and of their log-probabilities as drawn
            bare = [[i for i in ids if i != end] for ids in rollouts]
            g.lengths = [len(ids) for ids in bare]  # G of them, without the end
            g.ended = prompt.with_responses([[*ids, end] for ids in bare])
            g.texts = [policy.processor.tokenizer.decode(ids) for ids in bare]
            g.truncated = torch.tensor([ids[-1] != end for ids in rollouts])  # (G,) bool
            g.matches = torch.tensor([answer_matches(text, comparison.answer) for text in g.texts]) & ~g.truncated
            groups.append(g)
    # Trap: equal words in two branches get rewards that differ in the last digit, and in a group that agrees on all
    # else the division by the standard deviation makes advantages of it (up to 0.5). So equal ones get the first's.
    texts = [replace(g.comparison, responses=g.texts, pairs=(), critiques=()) for g in groups]  # what a judge reads
    scored = [m.score_many([g.ended for g in groups] if m.head is not None else texts, cfg.pack_tokens)
              for m in (*run.reward_models, *run.judges)]
    for g, *rewards in zip(groups, *scored):
        first = [g.rollouts.index(ids) for ids in g.rollouts]
        g.judged = torch.tensor(rewards.pop())[first] if run.judges else None  # (G,)
        g.model_rewards = torch.tensor(rewards or [[0.0] * len(first)]).mean(dim=0)[first]  # (G,) r_i
    return groups

# The answer rule ------------------------------------------------------------------------------------------------------
MATH_VERIFY = find_spec("math_verify") is not None  # installed: it decides about formulas
TAGGED = re.compile(r"<answer>(.*?)</answer>|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", re.DOTALL)
PREAMBLE = re.compile(r"^\W*(?:the )?(?:(?:final|correct) )?(?:answer|option|choice)(?: is)?\b[\s:]*")
OPTION = re.compile(r"(?:[^\w-]*([a-z])(?:\W*$|[).:]\s))?(.*)", re.DOTALL)  # "(a)", "b.", "c) red"; not "a red circle"
WORD = re.compile(r"-?\d+(?:[.:/]\d+)*|(?:(?<!\w)-)?[^\W\d_]+|[%°<>≤≥≠=^√±×÷]|(?<=\w)[+*/](?=\w)")
UNITS = set("mm cm m km g kg s min h % ° percent degrees dollars euros inches feet".split())
SPELT = {"([⁰¹²³⁴-⁹⁻]+)": r"^\1", r"(?<=\d),(?=\d{3}(?!\d))": "",  # 10² is not 102, 1,000 is 1000
         r"(?<![\d.])\.(?=\d)": "0.", r"(\.\d*?)0+(?!\d)": r"\1"}  # .5 is 0.5; 2.50 is 2.5

@lru_cache(maxsize=10_000)  # rollouts repeat each other, and math-verify takes a millisecond
def answer_matches(response: str, answer: str) -> bool:
    """3  Whether a response is the answer: the same option, the same words, or (math-verify) an equal formula. Only the
    last <answer> or \\boxed{} is read, if there is one. Case, spaces, emphasis and punctuation do not count.
    >>> answer_matches("b) 5 cm", "B"), answer_matches("The answer is **5 cm**.", "5"), answer_matches("-5", "5")
    (True, True, False)"""
    texts = ["".join((TAGGED.findall(text) or [(text,)])[-1]).strip() for text in (response, answer)]
    (letter, words), (right_letter, right) = map(letter_and_words, texts)
    if letter and right_letter:
        return letter == right_letter
    if len(words) != len(right):  # of two units both must agree, one alone is no matter
        words, right = (own[:-1] if own[1:] and own[-1] in UNITS else own for own in (words, right))
    if right and words == right:
        return True
    # Trap: math-verify multiplies the letters of a word, adds up numbers side by side, and divides 3 by 45 in 3:45
    plain = [re.sub(r"\\[a-zA-Z]+", "+", text) for text in texts]
    if not MATH_VERIFY or any(len(text) > 100 or re.search(r"[^\W\d_]{2,}|\d\s+\w|:", text) for text in plain):
        return False
    import logging
    from math_verify import parse, verify
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    response, answer = (parse(f"${text.strip('$. ')}$") for text in texts)
    return verify(answer, response)  # at most 5 s, by a signal

def letter_and_words(text: str) -> tuple[str, list[str]]:
    """The letter of an option; words, numbers and signs: ("b", ["2.5", "cm"]) of "(B) 2.50 cm"."""
    for pattern, plain in SPELT.items():
        text = re.sub(pattern, plain, text)
    text = PREAMBLE.sub("", unicodedata.normalize("NFKC", text).replace("\u2212", "-").lower())
    letter, rest = OPTION.match(text).groups(default="")
    return letter, WORD.findall(rest or text)  # what follows the letter is the option's text

def drop_outliers(groups: list) -> None:
    """StableReinforce (arXiv 2505.02835): advantages are normalised once more over the rollouts of all ranks; those
    beyond three standard deviations become 0."""
    every = torch.cat(sum(gather_objects([g.advantages for g in groups]), []))
    for g in groups:
        z = (g.advantages - every.mean()) / (every.std(correction=0) + 1e-6)
        if g.advantages.any():
            g.advantages = torch.where(z.abs() <= 3, z, 0.0)

# 5 to 7  Packs and metrics --------------------------------------------------------------------------------------------
def packs_of(groups: list, cfg: Config):  # yields (some groups, their rollouts as one pack)
    rows = [group.prompt.with_responses(group.rollouts) for group in groups]
    for members in fill_packs([row.tokens for row in rows], cfg.pack_tokens):
        yield [groups[i] for i in members], pack([rows[i] for i in members])

def make_batches(groups: list, run) -> tuple[list, int]:
    """(batches, tokens in the loss on all ranks). A batch is a pack of groups and, of its rollout tokens (S,): `keep`,
    whether one is in the loss; of those kept the rollout's `advantage`, and `sampled`, its log-probability then."""
    batches = []
    for members, packed in packs_of([g for g in groups if g.advantages.any() or not run.cfg.drop_equal], run.cfg):
        of = torch.arange(len(packed.last_token)).repeat_interleave(packed.response_length + 1)  # (S,) its rollout
        keep = ~torch.cat([g.truncated for g in members])[of] | (not run.cfg.mask_truncated)
        advantage = torch.cat([g.advantages for g in members])[of][keep].to(run.device)
        sampled = torch.tensor([x for g in members for values in g.sampled for x in values])[keep].to(run.device)
        batches.append(SimpleNamespace(pack=packed, keep=keep.to(run.device), advantage=advantage, sampled=sampled))
    return batches, int(gather([sum(len(batch.advantage) for batch in batches)]).sum())

def metrics(groups: list, batches: list, tokens: int, norms: list[float], cfg: Config) -> dict:
    """Means over the rollouts, groups or tokens of all ranks; None where there is none to take a mean of. off_policy is
    |l_old - the log-probability as drawn|: more than rounding on a GPU, where `generate` has a stream of bf16; rho,
    being 1 at first, hides it."""
    values = {"reward": [g.rewards for g in groups], "model_reward": [g.model_rewards for g in groups],
              "accuracy": [g.matches for g in groups if g.comparison.answer],
              "length": [torch.tensor(g.lengths) for g in groups], "truncated": [g.truncated for g in groups],
              "equal_groups": [~g.advantages.any()[None] for g in groups], "kl": [], "clipped": [], "off_policy": []}
    for batch in batches if tokens else ():
        ratio = torch.exp(batch.logprobs - batch.old)
        clipped = ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps_high) * batch.advantage < ratio * batch.advantage
        values["kl"].append(kl_estimate(batch.logprobs, batch.ref))
        values["clipped"].append(clipped)
        values["off_policy"].append((batch.old - batch.sampled).abs())
    sums = [(float(sum(part.double().sum() for part in parts)), sum(map(len, parts))) for parts in values.values()]
    sums = gather(sums).sum(dim=0).tolist()
    means = {name: total / n if n else None for name, (total, n) in zip(values, sums)}
    loss = float(gather([float(sum(batch.loss for batch in batches))]).sum()) if tokens else None
    return {"loss": loss} | means | {"tokens": tokens, "grad_norm": max(norms, default=0.0),
                                     "bad_gradients": sum(not math.isfinite(norm) for norm in norms)}

# The run --------------------------------------------------------------------------------------------------------------
FREE = ("out", "overwrite", "resume", "reward", "rollout_rows", "gradient_checkpointing", "save_every")

def grpo(kind: str, start, run) -> int:
    """GRPO under one reward from the policy `start`, into OUT/REWARD: 0, or the exit status of a run to be resumed, a
    shell's 128 + signal or 1. A signal waits for the end of a step; outside the loop it ends the process at once.
    AdamW's moments are shared out (ZeRO-1): each rank updates every w-th parameter and tells the others, which for the
    3B on eight makes 1 to 6 GB a GPU in place of 30."""
    cfg, folder, began = run.cfg, Path(run.cfg.out) / kind, time.time()
    step, bad_in_a_row, status, settings = 0, 0, 0, asdict(run.cfg)
    policy = Policy.from_pretrained(start, cfg.max_pixels).to(run.device)  # fp32
    if cfg.gradient_checkpointing:
        recompute_activations(policy.lm.model)
    own = [*policy.named_parameters()][dist.get_rank()::dist.get_world_size()]
    optimizer = torch.optim.AdamW(own, lr=cfg.lr, weight_decay=0.0, fused=True)
    if done := load_checkpoint(folder, optimizer, settings, FREE, run.in_parts) if cfg.resume else {}:
        tell_others(policy)
        step, began = done["step"], began - done["seconds"]
    say(f"{kind}: {run.steps} steps")
    with stop_signals() as told, open_log(folder, step, run.steps) as write_row:
        while step < run.steps and not status:
            started = time.time()
            prompts, status = own_prompts(run, step)                        # 1  Prompts
            if not status:
                line = grpo_step(kind, step, prompts, policy, optimizer, run)
                step += 1
                write_row({"step": step} | line | {"seconds": round(time.time() - started, 3)})
                bad_in_a_row = bad_in_a_row + line["bad_gradients"] if line["bad_gradients"] else 0
                number = int(gather([told.number]).max())
                status = 128 + number if number else int(bad_in_a_row >= 10)
            if status or step == run.steps or cfg.save_every and step % cfg.save_every == 0:
                state = {"config": settings, "step": step, "seconds": time.time() - began}
                save_checkpoint(folder, optimizer, state, run.in_parts)
    if told.number and not status:
        signal.raise_signal(told.number)  # it came in the last step, of which all is saved: now it ends the process
    if status:
        why = "ten updates in a row had a gradient that is not finite; take a lower --lr. " * (bad_in_a_row >= 10)
        say(f"rl_demo.py: {why}{step} steps under {kind} are saved in {folder}; go on with --resume", sys.stderr)
        return status
    exam = examine(policy.eval(), run) | {"seconds": round(time.time() - began, 1)}
    if dist.get_rank() == 0:  # who finds result.json finds all; only then the checkpoints go, in main
        policy.save_pretrained(folder / "policy")
        judge = Path(start) / "reward_config.json"
        if judge.exists() and json.loads(judge.read_bytes()).get("paradigm") in ("direct", "think"):
            shutil.copy(judge, folder / "policy")  # it was a judge, and still is
        write_text(folder / "result.json", json.dumps(exam) + "\n")
    say(f"{kind}: true accuracy {percent(figures(exam))} percent after {step} steps, {exam['seconds']:.0f} s")
    return 0

def tell_others(policy: Policy) -> None:
    """Every parameter's new value, from the rank that updated it: see grpo."""
    for i, p in enumerate(policy.parameters()):
        dist.broadcast(p.data, src=i % dist.get_world_size())

def make_policy(cfg: Config, folder: Path, reward_model: RewardModel, rows=None) -> None:
    """The start of the laptop run: the tiny reward model's backbone with a fresh vocabulary head. For three quarters of
    the steps it learns the right answers, then for every prompt three times the right one and two wrong ones. So it
    mostly knows what is in the picture, and says it about half the time: RL is to make it say so always."""
    backbone, steps, dice = reward_model.backbone, cfg.sft_steps, random.Random(cfg.seed)
    if sum(p.numel() for p in backbone.parameters()) > 20e6:
        raise ValueError(f"the reward model {cfg.reward_model[0]} is not a tiny one; name a --policy of its family")
    torch.manual_seed(cfg.seed)
    config = type(backbone.config).from_dict(backbone.config.to_dict())
    lm = class_that_writes(config).from_config(config, attn_implementation="branches", trust_remote_code=False)
    lm.model.load_state_dict(backbone.state_dict())
    quicken_vision(lm)
    policy = Policy(lm.float(), replace(reward_model.processor, paradigm="naive")).to(reward_model.device).train()
    rows = rows or synthetic(steps * 16, seed=2_000_000 + cfg.seed)  # pictures of their own, never shown again
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(steps), desc="fine-tuning the tiny policy"):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 20, (steps - step) / (0.3 * steps))
        shown = []
        for c in rows[step * 16:(step + 1) * 16]:
            responses, wrong = [c.answer], [response for response in c.responses if response != c.answer]
            if step >= 0.75 * steps:
                responses = 3 * responses + dice.choices(wrong, k=2)
            shown.append(replace(c, pairs=[], responses=responses))
        (-policy(pack(shown, policy.processor).to(policy.device)).mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    policy.eval().save_pretrained(folder)

# Examination and report -----------------------------------------------------------------------------------------------
@torch.no_grad()
def examine(policy: Policy, run) -> dict:
    """G rollouts of every held-out prompt with what they are worth, and KL(pi | ref) per token; on every rank. At
    temperature 1, as in training: what the policy does on average, not at its best. The same dice are thrown at every
    examination: policies differ by what they learnt and not by luck. ValueError if a figure is not finite."""
    groups, kl = roll_out(policy, run.exam, "held out", run), []
    for packed in (packed.to(run.device) for _, packed in packs_of(groups, run.cfg)):
        kl += kl_estimate(policy(packed), run.reference(packed)).tolist()
    records = [{"row": g.row, "category": g.comparison.category or "all", "answer": g.comparison.answer,
                "prompt": str(g.comparison.prompt), "texts": g.texts, "matches": g.matches.tolist(),
                "length": g.lengths, "truncated": g.truncated.tolist(), "model_reward": g.model_rewards.tolist(),
                "paid": {kind: pay(kind, g).tolist() for kind in REWARDS}} for g in groups]
    records = sorted((r for part in gather_objects(records) for r in part), key=lambda r: r["row"])
    total, tokens = gather([sum(kl), len(kl)]).sum(dim=0).tolist()
    if not math.isfinite(total + sum(sum(r["model_reward"]) for r in records)):
        raise ValueError("what the examination gives is not finite: look at the reward model, or take a lower --lr")
    return {"records": records, "kl": total / tokens}

def figures(exam: dict) -> dict:
    """The table's numbers: means over the rollouts; accuracy over the prompts that have an answer to be right about."""
    records = exam["records"]
    answered = [(r["category"], fmean(r["matches"])) for r in records if r["answer"]]
    right, categories = [share for _, share in answered], sorted({name for name, _ in answered})
    return {"accuracy": fmean(right) if right else None,
            "standard_error": pstdev(right) / math.sqrt(len(right)) if right else None,
            "accuracy_by_category": {c: fmean(share for name, share in answered if name == c) for c in categories},
            "paid": {kind: fmean(x for r in records for x in r["paid"][kind]) for kind in REWARDS}, "kl": exam["kl"],
            **{name: fmean(x for r in records for x in r[name]) for name in ("model_reward", "length", "truncated")}}

def percent(f: dict) -> str:  # accuracy +- its standard error over prompts
    return "unknown" if f["accuracy"] is None else f"{100 * f['accuracy']:.1f} +- {100 * f['standard_error']:.1f}"

def table(policies: dict[str, dict]) -> list[list[str]]:
    """In the manner of Table 11, a policy in a line; its gain over the start stands last."""
    start = policies["start"]
    first = ["policy", "accuracy", *start["accuracy_by_category"]]
    lines = [[*first, "reward", "r(x, y)", "KL", "length", "cut off", "gain"]]
    for name, f in policies.items():
        paid = gain = ""
        if name != "start":
            paid = f"{start['paid'][name]:.2f} -> {f['paid'][name]:.2f}"
            gain = "" if f["accuracy"] is None else f"{100 * (f['accuracy'] - start['accuracy']):+.1f}"
        parts = [f"{100 * share:.1f}" for share in f["accuracy_by_category"].values()]
        lines.append([name, percent(f), *parts, paid, f"{f['model_reward']:.2f}", f"{f['kl']:.3f}",
                      f"{f['length']:.1f}", f"{100 * f['truncated']:.1f}%", gain])
    return lines

def cards_of(exams: dict[str, dict], rows) -> list[dict]:  # for a prompt of each category: all policies' rollouts
    cards, first = [], {r["category"]: i for i, r in reversed(list(enumerate(exams["start"]["records"])))}
    for i in list(first.values())[:6]:
        answers = []
        for name, r in ((name, exam["records"][i]) for name, exam in exams.items()):
            known = zip(r["matches"], r["model_reward"], r["texts"], r["truncated"])
            lines = [f"{' +'[match]} {reward:6.2f}   {' '.join(text.split())}{' [cut off]' * cut_off}"
                     for match, reward, text, cut_off in known]
            answers.append({"facts": [name], "text": "\n".join(lines)})
        pictures = [uri for image in rows[r["row"]].images for uri in thumbnails(image)]
        cards.append({"category": r["category"], "pictures": pictures, "text": r["prompt"], "answers": answers,
                      "facts": [f"answer: {r['answer']}"]})
    return cards

def write_report(out: Path, rows, cfg: Config, device) -> str:
    """table.md, summary.json, curves.svg and index.html, from what the run left; returns the table."""
    files = {"start": out / "start.json"} | {kind: out / kind / "result.json" for kind in REWARDS}
    exams = {name: json.loads(file.read_bytes()) for name, file in files.items() if file.exists()}
    policies, n = {name: figures(exam) for name, exam in exams.items()}, len(rows)
    lines, checked = table(policies), "answers checked by the small rule" + " and math-verify" * MATH_VERIFY
    summary = {"policies": policies, "n": n, "checked": checked, "config": asdict(cfg), "receipt": receipt(device),
               "seconds": {name: exam["seconds"] for name, exam in exams.items()}}
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text(out / "table.md", markdown(lines) + "\n")
    logs = {kind: read_log(out / kind / "metrics.jsonl") for kind in exams if kind != "start"}
    known, panels = policies["start"]["accuracy"], []
    for name, heading in (("reward", "reward that is paid"), ("accuracy", "accuracy of the rollouts"),
                          ("model_reward", "r(x, y), the reward model's"), ("kl", "KL to the start")):
        dashed = {"start": known} if name == "accuracy" and known is not None else {}
        panels.append((heading, {kind: curve(log, name) for kind, log in logs.items()}, dashed, None))
    picture = draw_curves(out / "curves.svg", f"GRPO, seed {cfg.seed}", panels)
    write_text(out / "index.html", page("GRPO with the reward model", [
        {"text": [f"True accuracy in percent on {n} held-out prompts, {cfg.group_size} rollouts each at temperature 1, "
                  f"+- a standard error over prompts; {checked}. Reward: what is paid, at start and end; KL: to the "
                  f"start, per token. Where rewards rise and accuracy does not, they are hacked."], "table": lines},
        {"html": Markup(picture[picture.find("<svg"):])},  # HTML knows no XML declaration
        {"heading": "Some prompts, before and after", "cards": cards_of(exams, rows),
         "text": ["+ marks a match with the answer; the number is the reward model's reward r(x, y)"]}]))
    return f"{markdown(lines)}\n({checked})"

def main(cfg: Config) -> int:
    # A  Processes, prompts, folder
    device, out, began = start_processes(), Path(cfg.out), time.time()
    rows, held = open_prompts(cfg)
    in_parts = claim_folder(out, cfg.overwrite, cfg.resume, "start.json")
    if dist.get_world_size() > 1 and not in_parts:
        raise ValueError("each rank saves the moments it keeps: --out must lie on a disk that all share")
    begun = from_first((out / "start.json").exists())
    if begun:
        read_state(out / "start.json", asdict(cfg), FREE)
    say(json.dumps(asdict(cfg)))
    # B  Reward models, in bf16 on a GPU; the start, which as reference never moves
    start, paths, dtype = cfg.policy, cfg.reward_model, torch.bfloat16 if device.type == "cuda" else torch.float32
    if cfg.reward_model == ["runs/default"]:  # not named: the tiny one is of no use to a policy with other tokens
        if start != "tiny" and set(cfg.reward) <= {"rule"} | ({"pairwise"} if cfg.judge else set()):
            paths = []
        elif not Path("runs/default/reward_config.json").exists():
            raise ValueError("there is no reward model in runs/default; `python train.py --out runs/default` makes one")
    reward_models = [RewardModel.from_pretrained(path, dtype).to(device) for path in paths]
    asks = cfg.judge and "pairwise" in cfg.reward
    judges = [RewardModel.from_pretrained(cfg.judge, dtype).to(device)] if asks else []
    if judges and judges[0].head is not None:
        raise ValueError(f"--judge {cfg.judge} is no generative reward model; train.py --paradigm generative makes one")
    if start == "tiny":
        start = out / "policy"
        if not begun and dist.get_rank() == 0:
            make_policy(cfg, start, reward_models[0])
        from_first("made")  # the others wait for it
    reference = Policy.from_pretrained(start, cfg.max_pixels, dtype).to(device).requires_grad_(False)
    ours = reference.processor
    for path, theirs in zip(paths, [reward_model.processor for reward_model in reward_models]):
        other = ours.image_processor is not None and ours.family is not theirs.family
        if other or not ours.tokenizer.get_vocab().items() <= theirs.tokenizer.get_vocab().items():
            raise ValueError(f"reward model {path} reads other tokens than policy {cfg.policy}, other images or none")
    # C  What the steps share, and the examination before
    order = Order([[1] * len(rows)], [1.0], cfg.batch_size, cfg.seed)
    steps, exam = min(cfg.max_steps or math.inf, order.steps(cfg.epochs)), read_prompts(held, range(len(held)), ours)
    run = SimpleNamespace(cfg=cfg, device=device, rows=rows, order=order, steps=steps, exam=exam, reference=reference,
                          reward_models=reward_models, judges=judges, in_parts=in_parts)
    if not begun:
        found = examine(reference, run) | {"config": asdict(cfg), "step": 0, "seconds": round(time.time() - began, 1)}
        say(f"start: true accuracy {percent(figures(found))} percent on {len(found['records'])} held-out prompts")
        if dist.get_rank() == 0:
            write_text(out / "start.json", json.dumps(found) + "\n")
    # D  GRPO under each reward in turn, each from the same start; then the report
    for kind in cfg.reward:
        if from_first((out / kind / "result.json").exists()):
            say(f"{kind}: done before")
        elif status := grpo(kind, start, run):
            return status
        if dist.get_rank() == 0:
            remove_checkpoints(out / kind)
    if dist.get_rank() == 0:
        print(f"\n{write_report(out, held, cfg, device)}\n\nopen {out / 'index.html'} in a browser")
    return 0

if __name__ == "__main__":
    command_line(main, Config, "rl_demo.py")
