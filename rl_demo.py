"""GRPO with the reward model, and what it does to the true accuracy of a policy.

BaseReward (arXiv 2509.16127), section 5.4.

Read: to the ruled line, 114 minutes; `grpo_step` is the algorithm.

    python train.py && python rl_demo.py     a tiny policy, then four rewards: a minute for each
    torchrun --nproc_per_node 8 rl_demo.py --policy Qwen/Qwen2.5-VL-3B-Instruct \\
        --reward_model DIR --data FOLDER --reward hybrid --gradient_checkpointing
                                             a real policy: rows with a `prompt` and an `answer`

A policy is a language model that writes answers to prompts (rollouts). The reward model scores
them, and the policy is updated so that answers with a high reward become more likely. One step of
GRPO (arXiv 2402.03300), where pi is the policy, ref a frozen copy of it from the start, and beta
is --kl_coef:

    1  prompts      batch_size prompts x, chosen by (seed, step) alone; rank r of w takes every w-th
    2  rollouts     y_1 ... y_G sampled from pi(. | x) at temperature 1, each until <|im_end|> or
                    max_new_tokens; r_i = r(x, y_i) of the reward model (of several the mean)
    3  rewards      R_i is
                      rule      1 if y_i matches the answer, else 0
                      model     r_i
                      hybrid    1 if y_i matches the answer, else sigmoid(r_i)
                      pairwise  sum over j of (sigmoid(r_i - r_j) - 1/2)
    4  advantages   A_i = (R_i - mean(R)) / (std(R) + 1e-6), and 0 if all R_i of the group are equal
    5  logprobs     l_t = log pi(y_t | x, y_<t) of every rollout token; l_old_t is l_t in the first
                    pass, l_ref_t is the same under ref
    6  loss         rho_t = exp(l_t - l_old_t)
                    k3_t = exp(l_ref_t - l_t) - (l_ref_t - l_t) - 1, an estimate of KL(pi | ref)
                    loss = -1/N sum_t [min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A) - beta k3_t]
                    over the N rollout tokens of all ranks; A is the A_i of the token's rollout
    7  update       clip the gradient norm, AdamW; with --passes 2 or more, 5 to 7 again, same l_old

Sections 1 to 7 of this file have these numbers. `run_grpo` calls 1, `grpo_step` calls 2 to 7.
In the first pass rho = 1, and the first term has the gradient of A l_t (REINFORCE).

A truncated rollout (no <|im_end|> within max_new_tokens) never matches and gets the lowest reward
of its group. The reward model reads at <|im_end|>, which the policy did not write here.

Writes into OUT:
    start.json, table.md, summary.json, curves.png, index.html
    policy/                                       the tiny policy before RL
    REWARD/metrics.jsonl, result.json, policy/    for each reward
    REWARD/checkpoint-STEP/                       until the reward is finished

Differences. The paper gives no learning rate, clip range, KL weight or response length; ours are
1e-6, 0.2, 0.04 and 512. Its pairwise reward asks a generative reward model, as --judge does here.
GRPO averages the loss over the tokens of each rollout first; the mean over all tokens of a step is
DAPO's (arXiv 2503.14476). Weights are not sharded here, and there is no LoRA.
"""
import base64
import json
import math
import random
import re
import shutil
import sys
import time
import unicodedata
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, pstdev

import torch
import torch.distributed as dist
from markupsafe import Markup
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data import BadRow, Order, as_bad_row, read_comparisons, synthetic
from evaluate import html_page, markdown_table, receipt, thumbnails
from model import (
    Comparison, Encoded, Policy, RewardModel, Rollout, ScoringRequest, TextPack, bin_pack,
    causal_lm_class, enable_gradient_checkpointing, encode, generate, pack_texts,
    use_window_attention)
from train import (
    all_gather, all_gather_objects, broadcast_from_rank0, check_numbers, command_line, draw_curves,
    evenly_spaced, load_checkpoint, map_rows, open_log, prepare_run_folder, print_error,
    print_rank0, print_settings, read_log, read_state, remove_checkpoints, save_checkpoint,
    smoothed, start_processes, stop_signals, wait_for_all_ranks, write_text)


# 0  Settings, and what all steps share ------------------------------------------------
DEFAULTS = {"batch_size": 256, "lr": 1e-6, "max_new_tokens": 512, "pack_tokens": 8192,
            "save_every": 5, "max_pixels": 1280 * 28 * 28}
TINY_DEFAULTS = {"batch_size": 16, "lr": 3e-4, "max_new_tokens": 10, "pack_tokens": 1024,
                 "save_every": 100}
RESUMABLE_CHANGES = ("out", "overwrite", "resume", "reward", "rollout_rows",
                     "gradient_checkpointing", "save_every")  # settings that --resume may change
SHOWN = ("reward", "accuracy", "kl", "length")  # beside the progress bar
MAX_BAD_UPDATES = 10  # in a row with a gradient that is not finite: the run ends


@dataclass(frozen=True)
class Config:
    policy: str = HfArg(
        default="tiny", help="tiny (made here), a folder, or an id: Qwen/Qwen2.5-VL-3B-Instruct")
    reward_model: list[str] = HfArg(
        default_factory=lambda: ["runs/default"], help="saved by train.py; the mean of several")
    reward: list[str] = HfArg(
        default_factory=lambda: [*REWARDS], help="rule, model, hybrid, pairwise: a run for each")
    judge: str = HfArg(default="", help="generative reward model: its verdicts are `pairwise`")
    data: str = HfArg(
        default="", help="folder of prompts with answers (format: data.py); none: drawn pictures")
    out: str = HfArg(default="runs/rl", help="run folder, on a disk that all ranks share")
    overwrite: bool = HfArg(default=False, help="delete the run in --out and start again")
    resume: bool = HfArg(default=False, help="go on from the checkpoints in --out")
    seed: int = HfArg(default=0, help="of the tiny policy, the order of prompts, and the rollouts")
    group_size: int = HfArg(default=8, help="G, rollouts per prompt (paper: 8)")
    batch_size: int | None = HfArg(
        default=None, help="prompts per step over all ranks; 256 (paper), 16 for tiny")
    epochs: float = HfArg(default=1.0, help="passes over the prompts of --data (paper: 1)")
    max_steps: int | None = HfArg(
        default=None, help="stop after so many steps; 100 for drawn pictures, else no limit")
    passes: int = HfArg(default=1, help="updates from the same rollouts (paper: not given)")
    lr: float | None = HfArg(
        default=None, help="learning rate, constant; 1e-6 (paper: not given), 3e-4 for tiny")
    clip: float = HfArg(default=1.0, help="largest gradient norm (paper: not given)")
    clip_eps: float = HfArg(default=0.2, help="eps of the clipped ratio (PPO: 0.2)")
    kl_coef: float = HfArg(default=0.04, help="beta, weight of the KL term (GRPO: 0.04)")
    max_new_tokens: int | None = HfArg(
        default=None, help="longest rollout; 512 (paper: not given), 10 for tiny")
    max_pixels: int | None = HfArg(
        default=None, help="of an image, 28 x 28 a token; 1003520, for tiny as it was made")
    pack_tokens: int | None = HfArg(
        default=None, help="tokens in a pack, if no group is longer; 8192, 1024 for tiny")
    rollout_rows: int = HfArg(
        default=128, help="rollouts generated at a time; their keys and values are in memory")
    gradient_checkpointing: bool = HfArg(
        default=False, help="compute activations twice: less memory, a third slower")
    eval_size: int = HfArg(default=240, help="held-out prompts; at most a tenth of --data")
    save_every: int | None = HfArg(
        default=None, help="steps between checkpoints; 5, 100 for tiny; 0: only at the end")
    sft_steps: int = HfArg(
        default=400, help="fine-tuning steps of the tiny policy before RL, 16 prompts each")

    def resolved(self) -> "Config":
        """Fills in the defaults that depend on the policy. ValueError: a bad value."""
        defaults = dict(TINY_DEFAULTS if self.policy == "tiny" else DEFAULTS)
        if not self.data:
            defaults["max_steps"] = 100
        missing = {}
        for name, default in defaults.items():
            if getattr(self, name) is None:
                missing[name] = default
        cfg = replace(self, **missing)

        check_numbers(
            cfg,
            above_zero=("batch_size", "epochs", "max_steps", "passes", "lr", "clip",
                        "max_new_tokens", "max_pixels", "pack_tokens", "rollout_rows", "eval_size"),
            not_negative=("clip_eps", "kl_coef", "save_every", "sft_steps"))
        for reward_name in cfg.reward:
            if reward_name not in REWARDS:
                raise ValueError(f"--reward {reward_name}: choose from {', '.join(REWARDS)}")
        if cfg.group_size < 2:
            raise ValueError(f"--group_size {cfg.group_size}: a rollout is compared with its "
                             f"group; want 2 or more")
        if not cfg.data and cfg.policy != "tiny":
            raise ValueError(f"--policy {cfg.policy} needs --data FOLDER; the drawn prompts are "
                             f"for the tiny policy")
        return cfg


@dataclass
class Prompt:
    row_index: int  # in the rows it was read from
    comparison: Comparison  # with images and answer
    encoded: Encoded  # tokens and pixels, without responses


@dataclass
class Run:
    """What all steps share."""
    cfg: Config
    device: torch.device
    rows: list  # comparisons to train on
    order: Order  # which rows in which step
    num_steps: int
    eval_prompts: list[Prompt]  # held-out prompts of this rank
    start: str | Path  # folder or id of the policy before RL
    reference: Policy  # the same, frozen
    reward_models: list[RewardModel]
    judge: RewardModel | None  # with --judge


# 1  Prompts ---------------------------------------------------------------------------
def open_prompts(cfg: Config) -> tuple:
    """(rows to train on, held-out rows). The drawn held-out rows are the same for every seed, and
    none of them is among the drawn training rows."""
    if not cfg.data:
        num_prompts = cfg.max_steps * cfg.batch_size
        rows = synthetic(num_prompts, seed=3_000_000 + cfg.seed)
        return rows, synthetic(cfg.eval_size, held_out=True)

    rows = read_comparisons(cfg.data, needs_responses=False)
    if "rule" in cfg.reward:
        for i in range(len(rows)):
            if not rows[i].answer:
                raise BadRow(f"{rows.location(i)}: no `answer`; rule needs one in every row, "
                             f"hybrid, model and pairwise do not")

    eval_size = min(cfg.eval_size, max(len(rows) // 10, 1))
    held_out = evenly_spaced(eval_size, len(rows))
    training = sorted(set(range(len(rows))) - set(held_out))
    if not training:  # a single row is both
        training = [0]
    return rows.select(training), rows.select(held_out)


def read_prompts(rows, row_indices, processor, on_gpu: bool) -> list[Prompt]:
    """The prompts of this rank. BadRow: a row that cannot be read or encoded, with its location."""
    def read(i: int) -> Prompt:
        try:
            comparison = rows[i]
            encoded = encode(comparison, processor)
        except ValueError as error:
            raise as_bad_row(error, rows, i) from None
        return Prompt(i, comparison, encoded.with_responses([]))

    rows_of_rank = row_indices[dist.get_rank()::dist.get_world_size()]
    return list(map_rows(read, rows_of_rank, on_gpu))


def read_prompts_of_step(run: Run, step: int) -> list[Prompt] | None:
    """The prompts of this rank in a step; on all ranks None if one of them found a bad row."""
    row_indices = [row_index for _, row_index in run.order.rows_of_step(step)]
    prompts = None
    try:
        prompts = read_prompts(run.rows, row_indices, run.reference.processor,
                               on_gpu=run.device.type == "cuda")
    except BadRow as error:
        print_error("rl_demo.py", str(error))
    any_bad_row = all_gather([prompts is None]).any()
    return None if any_bad_row else prompts


# 2  Rollouts, and the answer rule -----------------------------------------------------
@dataclass
class Group:
    """The G rollouts of one prompt, and what is computed from them."""
    prompt: Prompt
    rollouts: list[Rollout]  # G: token ids, and their log-probabilities when they were sampled
    texts: list[str]  # G, without <|im_end|>
    lengths: list[int]  # G, in tokens without <|im_end|>
    truncated: torch.Tensor  # (G,) bool: no <|im_end|> within max_new_tokens
    matches: torch.Tensor  # (G,) bool: complete, and the answer
    model_rewards: torch.Tensor  # (G,) r_i
    judge_rewards: torch.Tensor | None = None  # (G,) with --judge
    rewards: torch.Tensor | None = None  # (G,) R_i
    advantages: torch.Tensor | None = None  # (G,) A_i


# The answer rule: the last <answer> or \boxed{}, then option letter, numbers and words
MATH_VERIFY = find_spec("math_verify") is not None
TAGGED = re.compile(r"<answer>(.*?)</answer>|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", re.DOTALL)
PREAMBLE = re.compile(
    r"^\W*(?:the )?(?:(?:final|correct) )?(?:answer|option|choice)(?: is)?\b[\s:]*")
OPTION = re.compile(r"[^\w-]*([a-z])(?:\W*$|[).:]\s)")  # "(a)", "b.", "c) red"; not "a red circle"
WORD = re.compile(  # a number, time or fraction; a word; a sign
    r"-?\.?\d+(?:[.:/]\d+)*|(?:(?<!\w)-)?[^\W\d_]+|[%°<>≤≥≠=^√±×÷]|(?<=\w)[+*/](?=\w)")
NUMBER = re.compile(r"-?\d*\.?\d+")


def last_tagged(text: str) -> str:
    answer = text
    for match in TAGGED.finditer(text):
        answer = match[1] or match[2] or ""
    return answer


def letter_and_words(text: str) -> tuple[str, list]:
    """("b", [2.5, "cm"]) of "(B) 2.50 cm"; the letter is "" if no option is named."""
    text = unicodedata.normalize("NFC", text).replace("\u2212", "-").lower()  # U+2212: minus sign
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 1,000 is 1000
    text = PREAMBLE.sub("", text)
    option = OPTION.match(text)
    if option:
        text = text[option.end():] or text  # the text of the option follows its letter
    words = []
    for word in WORD.findall(text):
        words.append(float(word) if NUMBER.fullmatch(word) else word)
    return option[1] if option else "", words


@lru_cache(maxsize=10_000)  # rollouts repeat each other
def answer_matches(response: str, answer: str) -> bool:
    """Whether a response is the answer: same option letter, or same numbers and words in order.
    Case, spaces, emphasis and punctuation do not count; signs do.

    >>> answer_matches("The answer is **b) 2.50 cm**.", "B"), answer_matches("-5", "5")
    (True, False)"""
    response = last_tagged(response)
    answer = last_tagged(answer)
    letter, words = letter_and_words(response)
    answer_letter, answer_words = letter_and_words(answer)
    if letter and answer_letter:
        return letter == answer_letter
    if answer_words and words == answer_words:
        return True
    return MATH_VERIFY and equal_formulas(response, answer)  # pip install math-verify: appendix C


def make_group(prompt: Prompt, rollouts: list[Rollout], processor) -> Group:
    """Decodes the rollouts and compares their texts with the answer."""
    texts = []
    lengths = []
    truncated = []
    matches = []
    for rollout in rollouts:
        is_truncated = rollout.token_ids[-1] != processor.end_id
        token_ids = rollout.token_ids if is_truncated else rollout.token_ids[:-1]
        text = processor.tokenizer.decode(token_ids)
        texts.append(text)
        lengths.append(len(token_ids))
        truncated.append(is_truncated)
        matches.append(not is_truncated and answer_matches(text, prompt.comparison.answer))

    return Group(
        prompt, rollouts, texts, lengths, torch.tensor(truncated), torch.tensor(matches),
        model_rewards=torch.zeros(len(rollouts)))


def score_groups(groups: list[Group], run: Run) -> None:
    """Sets model_rewards: r_i, the mean over the reward models."""
    end_id = run.reference.processor.end_id
    requests = []
    for group in groups:
        response_ids = []
        for rollout, is_truncated in zip(group.rollouts, group.truncated):
            end = [end_id] if is_truncated else []  # the reward is read at <|im_end|>
            response_ids.append(rollout.token_ids + end)
        encoded = group.prompt.encoded.with_responses(response_ids)
        requests.append(ScoringRequest(group.prompt.comparison, [encoded]))

    for reward_model in run.reward_models:
        scores = reward_model.score_encoded(requests, run.cfg.pack_tokens)
        for group, score in zip(groups, scores):
            group.model_rewards += torch.tensor(score.rewards) / len(run.reward_models)


def generate_rollouts(policy: Policy, prompts: list[Prompt], stage: int | str,
                      run: Run) -> list[Group]:
    """Samples G rollouts for every prompt and scores them.

    stage: the step, or "held out". A prompt's random seed is made from (seed, stage, row) alone, so
    its rollouts depend neither on the other prompts nor on the number of ranks."""
    cfg = run.cfg
    prompts_at_once = max(cfg.rollout_rows // cfg.group_size, 1)

    groups = []
    for start in range(0, len(prompts), prompts_at_once):
        chunk = prompts[start:start + prompts_at_once]
        encoded = [prompt.encoded for prompt in chunk]
        seeds = []
        for prompt in chunk:
            rng = random.Random(f"{cfg.seed} {stage} {prompt.row_index}")
            seeds.append(rng.getrandbits(62))
        rollouts = generate(policy, encoded, cfg.max_new_tokens, cfg.group_size, seeds)
        for prompt, rollouts_of_prompt in zip(chunk, rollouts):
            groups.append(make_group(prompt, rollouts_of_prompt, policy.processor))

    score_groups(groups, run)
    if run.judge is not None:  # --judge: appendix A
        score_by_judge(groups, run)
    return groups


# 3  Rewards ---------------------------------------------------------------------------
def rule(group: Group) -> torch.Tensor:
    return group.matches.float()


def model_reward(group: Group) -> torch.Tensor:
    return group.model_rewards


def hybrid(group: Group) -> torch.Tensor:
    # in fp32 sigmoid(20) is 1.0: without the clamp a wrong answer would get as much as a right one
    rewards = torch.sigmoid(group.model_rewards).clamp(max=0.999)
    return torch.where(group.matches, 1.0, rewards)


def pairwise(group: Group) -> torch.Tensor:
    if group.judge_rewards is not None:  # --judge
        return group.judge_rewards
    rewards = group.model_rewards
    differences = rewards[:, None] - rewards[None, :]  # (G, G)
    return (torch.sigmoid(differences) - 0.5).sum(dim=1)


REWARDS = {"rule": rule,
           "model": model_reward,
           "hybrid": hybrid,
           "pairwise": pairwise}


def compute_rewards(reward_name: str, group: Group) -> torch.Tensor:
    """R (G,) of a group; a truncated rollout gets the lowest of them."""
    rewards = REWARDS[reward_name](group)
    return torch.where(group.truncated, rewards.min(), rewards)


# 4  Advantages ------------------------------------------------------------------------
def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(R - mean R) / (std R + 1e-6) over the G rollouts of one prompt; std divides by G, not G - 1.

    Trap: the mean of equal rewards can be off by a rounding error, which the division by a std near
    0 would blow up. So equal rewards are tested for.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0])).round(decimals=4).tolist()
    [1.0, -1.0, -1.0, 1.0]"""
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred / (rewards.std(correction=0) + 1e-6)


# 5 and 6  Log-probabilities (Policy.forward in model.py) and loss ---------------------
def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k3 of every token: its mean under pi is KL(pi | ref), and it is never negative."""
    difference = ref_logprobs - logprobs
    return torch.exp(difference) - difference - 1


def clip_ratio(ratio: torch.Tensor, clip_eps: float) -> torch.Tensor:
    return ratio.clamp(1 - clip_eps, 1 + clip_eps)


def grpo_loss(
        logprobs: torch.Tensor, old_logprobs: torch.Tensor, ref_logprobs: torch.Tensor,
        advantages: torch.Tensor, num_tokens: int, clip_eps=0.2, kl_coef=0.0) -> torch.Tensor:
    """PPO's clipped objective with a KL term: the sum over these tokens, divided by num_tokens.

    The four tensors are (S,), one value for each rollout token. num_tokens counts those of the
    whole step, so that the losses of packs and ranks add up. The smaller of the two products has
    gradient 0 once a token has moved by eps in the direction that A wants. A token that moved the
    wrong way keeps its full gradient.

    >>> old = torch.tensor([0.5]).log()
    >>> new = torch.tensor([0.25]).log()                                 # half as likely: rho = 1/2
    >>> [grpo_loss(new, old, new, torch.tensor([A]), 1).item() for A in (1.0, -1.0)]
    [-0.5, 0.800000011920929]"""
    ratio = torch.exp(logprobs - old_logprobs)
    objective = torch.minimum(ratio * advantages, clip_ratio(ratio, clip_eps) * advantages)
    kl = kl_estimate(logprobs, ref_logprobs)
    return -(objective - kl_coef * kl).sum() / num_tokens


# 7  The step --------------------------------------------------------------------------
@dataclass
class RolloutBatch:
    """Some groups in one pack, and for each of their S rollout tokens what the loss needs."""
    pack: TextPack
    advantages: torch.Tensor  # (S,) of the token's rollout
    sampled_logprobs: torch.Tensor  # (S,) as `generate` computed them
    logprobs: torch.Tensor | None = None  # (S,) in the latest pass
    old_logprobs: torch.Tensor | None = None  # (S,) in the first pass
    ref_logprobs: torch.Tensor | None = None  # (S,)
    loss: torch.Tensor | None = None  # in the latest pass


def pack_rollouts(groups: list[Group], pack_tokens: int) -> list[tuple[list[Group], TextPack]]:
    """[(groups, their rollouts in one pack), ...]"""
    encoded = []
    for group in groups:
        response_ids = [rollout.token_ids for rollout in group.rollouts]
        encoded.append(group.prompt.encoded.with_responses(response_ids))
    token_counts = [item.num_tokens for item in encoded]

    packs = []
    for members in bin_pack(token_counts, pack_tokens):
        groups_of_pack = [groups[i] for i in members]
        pack = pack_texts([encoded[i] for i in members])
        packs.append((groups_of_pack, pack))
    return packs


def make_batches(groups: list[Group], run: Run) -> list[RolloutBatch]:
    batches = []
    for groups_of_pack, pack in pack_rollouts(groups, run.cfg.pack_tokens):
        advantages = []
        logprobs = []
        for group in groups_of_pack:
            for rollout, advantage in zip(group.rollouts, group.advantages):
                advantages.append(advantage.expand(len(rollout.token_ids)))
                logprobs += rollout.logprobs
        batches.append(RolloutBatch(
            pack, torch.cat(advantages).to(run.device), torch.tensor(logprobs).to(run.device)))
    return batches


def sum_and_clip_gradients(policy: Policy, max_norm: float) -> float:
    """Adds up the gradients of all ranks and clips them; returns the norm before clipping.

    DistributedDataParallel would exchange gradients in every backward pass, and wait for ranks with
    fewer packs. And it averages: here the losses were divided by the tokens of all ranks, so their
    gradients add up."""
    for parameter in policy.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    return float(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm))


def make_optimizer(policy: Policy, lr: float) -> torch.optim.Optimizer:
    """AdamW for this rank's share of the parameters, every w-th (ZeRO-1): each rank updates its
    share and sends it to the others. So the 3B needs 1 to 6 GB for AdamW's moments on each of
    eight GPUs, in place of 30."""
    parameters = list(policy.named_parameters())
    parameters_of_rank = parameters[dist.get_rank()::dist.get_world_size()]
    return torch.optim.AdamW(parameters_of_rank, lr=lr, weight_decay=0.0, fused=True)


def broadcast_parameters(policy: Policy) -> None:
    """Sends every parameter from the rank that updates it."""
    for i, parameter in enumerate(policy.parameters()):
        dist.broadcast(parameter.data, src=i % dist.get_world_size())


def step_metrics(groups: list[Group], batches: list[RolloutBatch], num_tokens: int,
                 grad_norms: list[float], cfg: Config) -> dict:
    """Means over the rollouts, groups or tokens of all ranks; None if there is nothing to average.

    equal_groups    share of groups in which all rewards are equal
    kl              k3
    clipped         share of tokens whose ratio is clipped: their gradient is that of the KL term
    off_policy      |l_old - l as sampled|: rounding on a CPU; more on a GPU, where `generate`
                    computes in bf16. rho, which is 1 in the first pass, does not show it
    grad_norm       before clipping, the largest of the passes
    bad_gradients   passes without an update, because the gradient was not finite"""
    values = {"reward": [], "model_reward": [], "accuracy": [], "length": [], "truncated": [],
              "equal_groups": [], "kl": [], "clipped": [], "off_policy": []}
    for group in groups:
        values["reward"].append(group.rewards)
        values["model_reward"].append(group.model_rewards)
        if group.prompt.comparison.answer:
            values["accuracy"].append(group.matches)
        values["length"].append(torch.tensor(group.lengths))
        values["truncated"].append(group.truncated)
        values["equal_groups"].append(~group.advantages.any(dim=0, keepdim=True))
    for batch in batches:
        ratio = torch.exp(batch.logprobs - batch.old_logprobs)
        clipped = clip_ratio(ratio, cfg.clip_eps) * batch.advantages < ratio * batch.advantages
        values["kl"].append(kl_estimate(batch.logprobs, batch.ref_logprobs))
        values["clipped"].append(clipped)
        values["off_policy"].append((batch.old_logprobs - batch.sampled_logprobs).abs())

    sums = []
    for tensors in values.values():
        total = sum(tensor.double().sum() for tensor in tensors)
        count = sum(len(tensor) for tensor in tensors)
        sums.append((float(total), count))
    sums = all_gather(sums).sum(dim=0).tolist()

    loss = sum(batch.loss for batch in batches)
    metrics = {"loss": float(all_gather([float(loss)]).sum())}
    for name, (total, count) in zip(values, sums):
        metrics[name] = total / count if count else None
    metrics["tokens"] = num_tokens
    metrics["grad_norm"] = max(grad_norms)
    metrics["bad_gradients"] = sum(not math.isfinite(norm) for norm in grad_norms)
    return metrics


def grpo_step(reward_name: str, step: int, prompts: list[Prompt], policy: Policy, optimizer,
              run: Run) -> dict:
    """Steps 2 to 7 for the prompts of this rank; returns the row of metrics.jsonl."""
    cfg = run.cfg
    policy.eval()
    groups = generate_rollouts(policy, prompts, step, run)              # 2  Rollouts, and r_i

    for group in groups:
        group.rewards = compute_rewards(reward_name, group)             # 3  Rewards
        group.advantages = group_advantages(group.rewards)              # 4  Advantages

    batches = make_batches(groups, run)
    tokens_here = sum(len(batch.advantages) for batch in batches)
    num_tokens = int(all_gather([tokens_here]).sum())

    policy.train()
    grad_norms = []
    for pass_index in range(cfg.passes):
        for batch in batches:
            pack = batch.pack.to(run.device)
            logprobs = policy(pack)                                     # 5  Log-probabilities
            batch.logprobs = logprobs.detach()
            if pass_index == 0:
                batch.old_logprobs = batch.logprobs
                batch.ref_logprobs = run.reference(pack)
            loss = grpo_loss(                                           # 6  Loss
                logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages, num_tokens,
                cfg.clip_eps, cfg.kl_coef)
            loss.backward()
            batch.loss = loss.detach()

        grad_norm = sum_and_clip_gradients(policy, cfg.clip)
        grad_norms.append(grad_norm)
        if math.isfinite(grad_norm):  # the same number on all ranks
            optimizer.step()                                            # 7  Update
            broadcast_parameters(policy)
        policy.zero_grad()

    return step_metrics(groups, batches, num_tokens, grad_norms, cfg)


# 8  Evaluation on the held-out prompts ------------------------------------------------
def evaluation_record(group: Group) -> dict:
    comparison = group.prompt.comparison
    rewards = {name: compute_rewards(name, group).tolist() for name in REWARDS}
    return {
        "row": group.prompt.row_index,
        "category": comparison.category or "all",
        "answer": comparison.answer,
        "prompt": str(comparison.prompt),
        "texts": group.texts,
        "matches": group.matches.tolist(),
        "length": group.lengths,
        "truncated": group.truncated.tolist(),
        "model_reward": group.model_rewards.tolist(),
        "paid": rewards}  # under each of REWARDS


@torch.no_grad()
def evaluate_policy(policy: Policy, run: Run) -> dict:
    """{"records": one for each held-out prompt, "kl": KL(pi | ref) per token}, on every rank.

    G rollouts for each prompt at temperature 1, as in training: what the policy does on average.
    The random numbers are the same in every evaluation. ValueError: a number is not finite."""
    groups = generate_rollouts(policy, run.eval_prompts, "held out", run)

    kl_of_tokens = []
    for _, pack in pack_rollouts(groups, run.cfg.pack_tokens):
        pack = pack.to(run.device)
        kl_of_tokens += kl_estimate(policy(pack), run.reference(pack)).tolist()
    kl_sum, num_tokens = all_gather([sum(kl_of_tokens), len(kl_of_tokens)]).sum(dim=0).tolist()

    records = []
    for records_of_rank in all_gather_objects([evaluation_record(group) for group in groups]):
        records += records_of_rank
    records.sort(key=lambda record: record["row"])

    total = kl_sum + sum(sum(record["model_reward"]) for record in records)
    if not math.isfinite(total):
        raise ValueError("rewards or KL are not finite in the evaluation; look at the reward "
                         "model, or take a lower --lr")
    return {"records": records, "kl": kl_sum / num_tokens}


def policy_figures(evaluation: dict) -> dict:
    """The numbers of the table: means over the rollouts, and the accuracy over the prompts that
    have an answer, with its standard error (None without such a prompt)."""
    accuracies = []
    accuracies_of_category = {}
    for record in evaluation["records"]:
        if record["answer"]:
            accuracy = fmean(record["matches"])
            accuracies.append(accuracy)
            accuracies_of_category.setdefault(record["category"], []).append(accuracy)

    figures = {"accuracy": None, "standard_error": None, "accuracy_by_category": {}}
    if accuracies:
        figures["accuracy"] = fmean(accuracies)
        figures["standard_error"] = pstdev(accuracies) / math.sqrt(len(accuracies))
    for category in sorted(accuracies_of_category):
        figures["accuracy_by_category"][category] = fmean(accuracies_of_category[category])

    rewards = {name: [] for name in REWARDS}
    values = {"model_reward": [], "length": [], "truncated": []}
    for record in evaluation["records"]:
        for name in rewards:
            rewards[name] += record["paid"][name]
        for name in values:
            values[name] += record[name]
    figures["paid"] = {name: fmean(rewards[name]) for name in rewards}
    figures["kl"] = evaluation["kl"]
    for name in values:
        figures[name] = fmean(values[name])
    return figures


def accuracy_text(figures: dict) -> str:
    """In percent, with the standard error over prompts: "88.8 +- 1.5"."""
    if figures["accuracy"] is None:
        return "unknown"
    return f"{100 * figures['accuracy']:.1f} +- {100 * figures['standard_error']:.1f}"


# 9  The run: the tiny start policy, and GRPO under one reward -------------------------
def make_policy(cfg: Config, folder: Path, reward_model: RewardModel, rows=None) -> None:
    """Writes the policy of the default run: the tiny reward model's backbone with a vocabulary
    head of random weights, fine-tuned. In the first three quarters of the steps its targets are
    right answers, then for every prompt three right and two wrong ones. It then recognises what is
    in a picture and answers correctly about half of the time; RL is to raise that share.

    rows: comparisons with an answer, 16 for each step; default: drawn ones of this run alone."""
    backbone = reward_model.backbone
    num_parameters = sum(parameter.numel() for parameter in backbone.parameters())
    if num_parameters > 20e6:
        raise ValueError(f"the reward model {cfg.reward_model[0]} is not a tiny one; name a "
                         f"--policy of its family")

    torch.manual_seed(cfg.seed)
    config = type(backbone.config).from_dict(backbone.config.to_dict())  # a copy: it is changed
    causal_lm = causal_lm_class(config).from_config(
        config, attn_implementation="branches", trust_remote_code=False)
    causal_lm.model.load_state_dict(backbone.state_dict())
    use_window_attention(causal_lm)
    policy = Policy(causal_lm.float(), reward_model.processor).to(reward_model.device).train()

    if rows is None:
        rows = synthetic(cfg.sft_steps * 16, seed=2_000_000 + cfg.seed)
    rng = random.Random(cfg.seed)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(cfg.sft_steps), desc="fine-tuning the tiny policy"):
        warmup = (step + 1) / 20
        decay = (cfg.sft_steps - step) / (0.3 * cfg.sft_steps)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, warmup, decay)

        encoded = []
        for comparison in rows[step * 16:(step + 1) * 16]:
            targets = [comparison.answer]
            if step >= 0.75 * cfg.sft_steps:
                wrong = [text for text in comparison.responses if text != comparison.answer]
                targets = 3 * targets + rng.choices(wrong, k=2)
            comparison = replace(comparison, responses=targets, pairs=())
            encoded.append(encode(comparison, policy.processor))

        loss = -policy(pack_texts(encoded).to(policy.device)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    policy.eval().save_pretrained(folder)


def exit_status(signal_number: int, bad_updates: int) -> int:
    """Why the run should stop, the same on all ranks: 128 + signal, 1 for bad gradients, or 0."""
    signal_number = int(all_gather([signal_number]).max())
    if signal_number:
        return 128 + signal_number
    return 1 if bad_updates >= MAX_BAD_UPDATES else 0


def save_result(policy: Policy, evaluation: dict, folder: Path, run: Run) -> None:
    """Writes the policy, and last result.json: where it exists the reward is finished."""
    policy.save_pretrained(folder / "policy")
    config_file = Path(run.start) / "reward_config.json"
    if config_file.exists():  # the policy is a reward model: a judge is still one after RL
        config = json.loads(config_file.read_bytes())
        if config.get("paradigm") in ("direct", "think"):
            shutil.copy(config_file, folder / "policy")
    write_text(folder / "result.json", json.dumps(evaluation) + "\n")


def run_grpo(reward_name: str, run: Run) -> int:
    """GRPO under one reward, from the start policy. Writes OUT/REWARD. Returns 0, or the exit
    status of an interrupted run: 128 + signal as in shells, or 1."""
    cfg = run.cfg
    folder = Path(cfg.out) / reward_name
    start_time = time.time()
    policy = Policy.from_pretrained(run.start, cfg.max_pixels).to(run.device)  # fp32
    if cfg.gradient_checkpointing:
        enable_gradient_checkpointing(policy.backbone)
    optimizer = make_optimizer(policy, cfg.lr)
    step = 0
    if cfg.resume:
        saved = load_checkpoint(folder, optimizer, asdict(cfg), RESUMABLE_CHANGES)
        if saved:
            broadcast_parameters(policy)
            step = saved["step"]
            start_time -= saved["seconds"]

    print_rank0(f"{reward_name}: {run.num_steps} steps")
    status = 0
    bad_updates = 0  # in a row
    with stop_signals() as stop_signal, open_log(folder, step, run.num_steps, SHOWN) as write_row:
        while step < run.num_steps and status == 0:
            step_start_time = time.time()
            prompts = read_prompts_of_step(run, step)                   # 1  Prompts
            if prompts is None:
                status = 1
            else:
                metrics = grpo_step(reward_name, step, prompts, policy, optimizer, run)
                step += 1
                metrics["seconds"] = round(time.time() - step_start_time, 3)
                write_row({"step": step} | metrics)
                bad_updates += metrics["bad_gradients"]
                if metrics["bad_gradients"] == 0:
                    bad_updates = 0
                status = exit_status(stop_signal.number, bad_updates)

            is_save_step = cfg.save_every > 0 and step % cfg.save_every == 0
            if status or is_save_step or step == run.num_steps:
                state = {"config": asdict(cfg), "step": step, "seconds": time.time() - start_time}
                save_checkpoint(folder, optimizer, state)

    if status == 0:  # a signal may have come during the last step's save
        status = exit_status(stop_signal.number, bad_updates)
    if status:
        if bad_updates >= MAX_BAD_UPDATES:
            print_rank0("rl_demo.py: the gradient was not finite in ten updates in a row; "
                        "take a lower --lr", sys.stderr)
        print_rank0(f"rl_demo.py: {step} steps under {reward_name} are saved in {folder}; "
                    f"go on with --resume", sys.stderr)
        return status

    evaluation = evaluate_policy(policy.eval(), run)
    evaluation["seconds"] = round(time.time() - start_time, 1)
    if dist.get_rank() == 0:
        save_result(policy, evaluation, folder, run)
    accuracy = accuracy_text(policy_figures(evaluation))
    print_rank0(f"{reward_name}: true accuracy {accuracy} percent after {step} steps, "
                f"{evaluation['seconds']:.0f} s")
    return 0


# 10  Main -----------------------------------------------------------------------------
def load_reward_models(cfg: Config, device: torch.device, dtype: torch.dtype) -> tuple:
    """(reward models, judge or None)"""
    paths = cfg.reward_model
    if paths == ["runs/default"]:  # the flag's default
        rewards_of_model = set(cfg.reward) - {"rule"}
        if cfg.judge:
            rewards_of_model -= {"pairwise"}
        if cfg.policy != "tiny" and not rewards_of_model:
            paths = []  # the tiny reward model does not read the tokens of a real policy
        elif not Path("runs/default/reward_config.json").exists():
            raise ValueError("there is no reward model in runs/default; "
                             "`python train.py --out runs/default` makes one")
    reward_models = [RewardModel.from_pretrained(path, dtype).to(device) for path in paths]
    for path, reward_model in zip(paths, reward_models):
        if reward_model.head is None:
            raise ValueError(f"--reward_model {path} is a judge; give it as --judge, with --reward "
                             f"pairwise")

    judge = None
    if cfg.judge and "pairwise" in cfg.reward:
        judge = RewardModel.from_pretrained(cfg.judge, dtype).to(device)
        if judge.head is not None:
            raise ValueError(f"--judge {cfg.judge} is not a generative reward model; "
                             f"train.py --paradigm direct makes one")
    return reward_models, judge


def load_reference(start: str | Path, max_pixels: int | None, dtype: torch.dtype) -> Policy:
    """The start policy, frozen.

    Trap: an InternVL's vision tower adds its position embeddings, in the dtype of the weights, to
    the patches. With fp32 weights, as the policy has, it then computes in fp32 under autocast too,
    with bf16 weights in bf16: KL would not be 0 at the start. So this reference is in fp32."""
    reference = Policy.from_pretrained(start, max_pixels, dtype)
    if reference.backbone.config.model_type == "internvl":
        reference = Policy.from_pretrained(start, max_pixels, torch.float32)
    return reference.requires_grad_(False)


def check_tokens(cfg: Config, reference: Policy, reward_models: list[RewardModel]) -> None:
    """ValueError: a reward model that cannot read the policy's tokens or images."""
    processor = reference.processor
    vocabulary = processor.tokenizer.get_vocab()
    for path, reward_model in zip(cfg.reward_model, reward_models):
        reads_tokens = vocabulary.items() <= reward_model.processor.tokenizer.get_vocab().items()
        same_images = (processor.family is reward_model.processor.family
                       and processor.video_step == reward_model.processor.video_step)
        text_only = processor.image_processor is None
        if not reads_tokens or not (same_images or text_only):
            raise ValueError(f"reward model {path} reads other tokens than policy {cfg.policy}, "
                             f"other images or none")


def evaluate_start(run: Run, start_time: float) -> None:
    """Evaluates the start policy. Writes start.json; where it exists the run can be resumed."""
    evaluation = evaluate_policy(run.reference, run)
    evaluation["config"] = asdict(run.cfg)
    evaluation["step"] = 0
    evaluation["seconds"] = round(time.time() - start_time, 1)
    accuracy = accuracy_text(policy_figures(evaluation))
    print_rank0(f"start: true accuracy {accuracy} percent on {len(evaluation['records'])} "
                f"held-out prompts")
    if dist.get_rank() == 0:
        write_text(Path(run.cfg.out) / "start.json", json.dumps(evaluation) + "\n")


def main(cfg: Config) -> int:
    # Processes, prompts, run folder
    start_time = time.time()
    device = start_processes()
    out = Path(cfg.out)
    rows, eval_rows = open_prompts(cfg)
    prepare_run_folder(out, cfg.overwrite, cfg.resume, made_by="start.json")
    is_evaluated = broadcast_from_rank0((out / "start.json").exists())
    if is_evaluated:
        read_state(out / "start.json", asdict(cfg), RESUMABLE_CHANGES)

    # Frozen models, in bf16 on a GPU: reward models, and the start policy as reference
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    reward_models, judge = load_reward_models(cfg, device, dtype)
    start = cfg.policy
    if start == "tiny":
        start = out / "policy"
        if not is_evaluated and dist.get_rank() == 0:
            make_policy(cfg, start, reward_models[0])
        wait_for_all_ranks()
    reference = load_reference(start, cfg.max_pixels, dtype).to(device)
    check_tokens(cfg, reference, reward_models)

    # What the steps share, and the evaluation of the start policy
    order = Order([[1] * len(rows)], [1.0], cfg.batch_size, cfg.seed)
    num_steps = order.num_steps(cfg.epochs)
    if cfg.max_steps is not None:
        num_steps = min(num_steps, cfg.max_steps)
    eval_prompts = read_prompts(eval_rows, range(len(eval_rows)), reference.processor,
                                on_gpu=device.type == "cuda")
    run = Run(cfg, device, rows, order, num_steps, eval_prompts, start, reference, reward_models,
              judge)
    reward_model_names = ", ".join(cfg.reward_model) if reward_models else "none"
    print_settings(cfg, [
        f"policy    {cfg.policy}; reward model {reward_model_names}",
        f"prompts   {len(rows):,}; {len(eval_rows):,} held out",
        f"training  {num_steps:,} steps of {cfg.batch_size} prompts, {cfg.group_size} rollouts of "
        f"each, learning rate {cfg.lr:g}, seed {cfg.seed}",
        f"limits    {cfg.max_new_tokens:,} tokens per rollout, {cfg.pack_tokens:,} per pack",
        f"rewards   {', '.join(cfg.reward)}"])
    if not is_evaluated:
        evaluate_start(run, start_time)

    # GRPO under each reward, always from the same start; then the report
    for reward_name in cfg.reward:
        if broadcast_from_rank0((out / reward_name / "result.json").exists()):
            print_rank0(f"{reward_name}: finished before")
        else:
            status = run_grpo(reward_name, run)
            if status:
                return status
        if dist.get_rank() == 0:
            remove_checkpoints(out / reward_name)
    if dist.get_rank() == 0:
        table = write_report(out, eval_rows, cfg, device)  # appendix B
        print(f"\n{table}\n\nopen {out / 'index.html'} in a browser")
    return 0


# ======================================================================================
# First reading ends here. Below: what flags, other families and other paradigms add.
# ======================================================================================


# A  A judge as reward (--judge) -------------------------------------------------------
def score_by_judge(groups: list[Group], run: Run) -> None:
    """Sets judge_rewards: for each rollout the judge's preferences over all others, asked in both
    orders, added up. This is the paper's pairwise reward."""
    def ask(group: Group) -> ScoringRequest:
        comparison = replace(group.prompt.comparison, responses=group.texts, pairs=(), critiques=())
        return run.judge.encode_for_scoring(comparison)

    requests = list(map_rows(ask, groups, on_gpu=run.judge.device.type == "cuda"))
    scores = run.judge.score_encoded(requests, run.cfg.pack_tokens)
    for group, score in zip(groups, scores):
        group.judge_rewards = torch.tensor(score.rewards)


# B  Table, curves, page ---------------------------------------------------------------
def policy_table(policies: dict[str, dict]) -> list[list[str]]:
    """As the paper's Table 11: a policy in each row, with its gain over the start last."""
    start = policies["start"]
    table = [["policy", "accuracy", *start["accuracy_by_category"],
              "reward", "r(x, y)", "KL", "length", "cut off", "gain"]]
    for name, figures in policies.items():
        row = [name, accuracy_text(figures)]
        for accuracy in figures["accuracy_by_category"].values():
            row.append(f"{100 * accuracy:.1f}")
        rewards = ""
        gain = ""
        if name != "start":
            rewards = f"{start['paid'][name]:.2f} -> {figures['paid'][name]:.2f}"
            if figures["accuracy"] is not None:
                gain = f"{100 * (figures['accuracy'] - start['accuracy']):+.1f}"
        row += [rewards, f"{figures['model_reward']:.2f}", f"{figures['kl']:.3f}",
                f"{figures['length']:.1f}", f"{100 * figures['truncated']:.1f}%", gain]
        table.append(row)
    return table


def draw_run(file: Path, logs: dict[str, list], start_accuracy: float | None, seed: int) -> None:
    """Four panels over the steps, a curve in each for every reward."""
    headings = {"reward": "reward", "accuracy": "accuracy of the rollouts",
                "model_reward": "r(x, y) of the reward model", "kl": "KL to the start"}
    panels = []
    for column, heading in headings.items():
        curves = {name: smoothed(log, column) for name, log in logs.items()}
        dashed = {}
        if column == "accuracy" and start_accuracy is not None:
            dashed["start"] = start_accuracy
        panels.append((heading, curves, dashed, None))
    draw_curves(file, f"GRPO, seed {seed}", panels)


def example_cards(evaluations: dict[str, dict], eval_rows) -> list[dict]:
    """The first prompt of each category, six at most, with the rollouts of all policies."""
    first_of_category = {}
    for i, record in enumerate(evaluations["start"]["records"]):
        first_of_category.setdefault(record["category"], i)

    cards = []
    for category, i in list(first_of_category.items())[:6]:
        answers = []
        for name, evaluation in evaluations.items():
            record = evaluation["records"][i]
            lines = []
            for rollout_index, text in enumerate(record["texts"]):
                mark = "+" if record["matches"][rollout_index] else " "
                reward = record["model_reward"][rollout_index]
                end = " [cut off]" if record["truncated"][rollout_index] else ""
                lines.append(f"{mark} {reward:6.2f}   {' '.join(text.split())}{end}")
            answers.append({"facts": [name], "text": "\n".join(lines)})
        pictures = []
        for image in eval_rows[record["row"]].images:
            pictures += thumbnails(image)
        cards.append({
            "category": category, "pictures": pictures, "text": record["prompt"],
            "facts": [f"answer: {record['answer']}"], "answers": answers})
    return cards


def write_report(out: Path, eval_rows, cfg: Config, device: torch.device) -> str:
    """Writes table.md, summary.json, curves.png and index.html; returns the table."""
    evaluations = {"start": json.loads((out / "start.json").read_bytes())}
    logs = {}
    for reward_name in REWARDS:
        result_file = out / reward_name / "result.json"
        if result_file.exists():
            evaluations[reward_name] = json.loads(result_file.read_bytes())
            logs[reward_name] = read_log(out / reward_name / "metrics.jsonl")
    policies = {name: policy_figures(evaluation) for name, evaluation in evaluations.items()}
    checked = "answers checked by the small rule"
    if MATH_VERIFY:
        checked += " and math-verify"

    summary = {
        "policies": policies,
        "n": len(eval_rows),
        "checked": checked,
        "config": asdict(cfg),
        "receipt": receipt(device),
        "seconds": {name: evaluation["seconds"] for name, evaluation in evaluations.items()}}
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    table = policy_table(policies)
    write_text(out / "table.md", markdown_table(table) + "\n")
    draw_run(out / "curves.png", logs, policies["start"]["accuracy"], cfg.seed)
    picture = base64.b64encode((out / "curves.png").read_bytes()).decode()

    explanation = (
        f"True accuracy in percent on {len(eval_rows)} held-out prompts, {cfg.group_size} "
        f"rollouts each at temperature 1, +- one standard error over prompts; {checked}. Reward: "
        f"at the start and at the end. KL: to the start, per token. A reward that rises while the "
        f"accuracy does not is being hacked.")
    page = html_page("GRPO with the reward model", [
        {"text": [explanation], "table": table},
        {"html": Markup(f'<img alt="curves" src="data:image/png;base64,{picture}">')},
        {"heading": "Some prompts, before and after",
         "text": ["+ marks a match with the answer; the number is the reward model's r(x, y)"],
         "cards": example_cards(evaluations, eval_rows)}])
    write_text(out / "index.html", page)
    return f"{markdown_table(table)}\n({checked})"


# C  Formulas, compared by math-verify -------------------------------------------------
def equal_formulas(response: str, answer: str) -> bool:
    """Takes a millisecond; a signal ends it after 5 seconds at most.

    Trap: math-verify multiplies the letters of a word, adds up numbers that stand side by side, and
    divides 3 by 45 in 3:45. So texts with words, such numbers or a colon are not compared."""
    import logging
    from math_verify import parse, verify
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    formulas = []
    for text in (response, answer):
        without_commands = re.sub(r"\\[a-zA-Z]+", "+", text)
        if len(without_commands) > 100 or re.search(r"[^\W\d_]{2,}|\d\s+\w|:", without_commands):
            return False
        formulas.append(parse(f"${text.strip('$. ')}$"))
    return verify(formulas[1], formulas[0])


if __name__ == "__main__":
    command_line(main, Config, "rl_demo.py")
