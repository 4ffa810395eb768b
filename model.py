"""How a comparison becomes rewards: the heart of BaseReward (arXiv 2509.16127, sections 3 and 4).

    pixels -> vision tower --+                        +-> response 1 ... <|im_end|> -> head -> r_1
                             +-> prompt tokens -------+-> response 2 ... <|im_end|> -> head -> r_2
                                                      +-> response K ... <|im_end|> -> head -> r_K

A reward model reads a prompt x with its images and a response y, and gives one number r(x, y): higher is better. It
learns from pairs of responses of which people, or a stronger model, preferred one. The unit of work is the
*comparison*: one prompt and the K responses to it. The prompt with its images goes through the network once, and every
response branches off from it. Rewards and gradients are those of separate sequences; it is only faster.

Read: down to the double line, 25 minutes; `python tests/worked_example.py` prints one comparison with all its numbers.
Letters for sizes: B pairs, K responses of a prompt, R responses in a pack, S response tokens in a pack, T tokens,
D width of the backbone, N images, P patches, V words of the vocabulary, G rollouts of a prompt.

Where this differs from the paper. It names neither the token at which the reward is read nor the head's hidden width:
we read at the response's last token, `<|im_end|>`, and use the width of the backbone.
"""
import contextlib
import io
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoTokenizer, PreTrainedTokenizerFast)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

# 1  The comparison ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Comparison:
    """One prompt with its images, K responses to it, and which of them were preferred to which.

    >>> c = Comparison("<image>\\nWhat is shown?", ["A bus.", "Two buses."], pairs=[(0, 1)], images=["images/7.png"])
    >>> c.responses[c.pairs[0][0]]
    'A bus.'"""
    prompt: str | list  # text with `<image>` marks, or chat messages: contents are such texts or lists of typed parts
    responses: list[str]  # K of them
    pairs: list[tuple[int, int]] = ()  # (winner, loser), indices into `responses`; a preference pair is [(0, 1)]
    images: list = ()  # one for each mark: a file, its bytes or a PIL image; a folder or list of frames is a video
    id: str = ""
    source: str = ""  # the data set it comes from
    category: str = ""  # what accuracy is reported by
    answer: str = ""  # a checkable answer, for RL
    critiques: list = ()  # one text for each response, where a data set has them; "" for one that has none

# 2  Tokens ------------------------------------------------------------------------------------------------------------
MARK = re.compile("<image>|<video>")  # each takes the next entry of `images`; the entry decides which of the two it is
IMAGE_PAD, VIDEO_PAD, END = "<|image_pad|>", "<|video_pad|>", "<|im_end|>"
SPECIAL = re.compile(r"<(?=\|\w+\|>|/?img>|IMG_CONTEXT>)")  # first character of a special token somebody wrote out

@dataclass
class Encoded:
    """One comparison as tokens and patches: what `pack` lays end to end."""
    prompt_ids: list[int]  # an image is one token for every 2 x 2 patches
    response_ids: list[list[int]]  # K lists, each ending with <|im_end|>
    pairs: list[tuple[int, int]]
    pixel_values: torch.Tensor  # (P, channels * 2 frames * 14 * 14), without a picture (0,); or as its Family has it
    image_grid_thw: torch.Tensor  # (N, 3) moments, rows and columns of patches
    prompt_positions: torch.Tensor  # (3, tokens of the prompt)
    text_tokens: list[int] = ()  # K numbers: tokens of the text to learn at the end of each branch (section 7)

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)

    def with_responses(self, response_ids: list[list[int]]) -> "Encoded":
        return replace(self, response_ids=response_ids, pairs=[], text_tokens=())

def encode(comparison: Comparison, processor: "Processor") -> Encoded:
    """The tokens of the prompt once, and of each response on its own, so that no token spans the border between them.

    processor: the tokenizer, the image processor, and how this family of backbones takes pictures. A text that writes
    "<|im_end|>" is read as these characters with a space after the first: it cannot end its turn or forge another's.
    ValueError, one line: marks and images do not match, an image cannot be used, or the backbone cannot see."""
    tokenizer, images = processor.tokenizer, list(comparison.images)
    if images and processor.image_processor is None:
        raise ValueError(f"the prompt has {len(images)} images but the backbone is text-only")
    messages, family = to_messages(comparison.prompt, images), processor.family
    read = [family.read(image, processor.image_processor) for image in images]  # (patches, grids, tokens) of each
    grids, tokens = [grid for _, its_grids, _ in read for grid in its_grids], iter([its for *_, its in read])
    for message in messages:
        text = SPECIAL.sub("< ", message["content"])
        message["content"] = family.mark.sub(lambda _: next(tokens), text)
    if isinstance(comparison.responses, str):
        raise ValueError("the responses are one text, want a list of texts")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    texts = [text, *map(own_words, comparison.responses)]  # in one call: each costs as much as a hundred words
    prompt_ids, *response_ids = tokenizer(texts, add_special_tokens=False).input_ids
    response_ids = [[*ids, processor.end] for ids in response_ids]
    positions = mrope_positions(prompt_ids, grids, processor.id_of(IMAGE_PAD), processor.id_of(VIDEO_PAD),
                                processor.video_step)
    patches = torch.cat([torch.zeros(0), *(patches for patches, *_ in read)])  # an empty one fits any
    item = Encoded(prompt_ids, response_ids, [tuple(pair) for pair in comparison.pairs], patches,
                   torch.tensor(grids, dtype=torch.long).view(-1, 3), positions)
    return with_texts_to_learn(item, comparison, processor)  # critics and thinking judges: see with_critiques, below

def read_qwen2(source, image_processor) -> tuple[torch.Tensor, list, str]:
    """A picture or video for Qwen2.5-VL: its patches, its grid, and the tokens that take the place of its mark."""
    patches, grid = cut_into_patches(source, image_processor)
    pad = VIDEO_PAD if is_video(source) else IMAGE_PAD
    return patches, [grid], f"<|vision_start|>{pad * (math.prod(grid) // 4)}<|vision_end|>"

def mrope_positions(ids: list[int], grids: list, image_pad: int, video_pad: int, video_step: int = 1) -> torch.Tensor:
    """M-RoPE positions (3, tokens): time, row and column of every token of a prompt (arXiv 2409.12191, section 2.1).

    A text token has the same number three times, and the next text token one more. The tokens of an image stand in a
    grid: all at one time, each at its row and column. What follows goes on at the largest number so far + 1, not at the
    count of tokens. A picture of 2 x 3 tokens after two text tokens, and one text token after it:

        time    0 1  2 2 2 2 2 2  5
        row     0 1  2 2 2 3 3 3  5
        column  0 1  2 3 4 2 3 4  5

    In a video two frames are a moment; the next is `video_step` later. Trap: transformers from 5.3 on goes on after a
    *video* at start + max(rows, columns), which overlaps the times of a long one; Qwen was trained with largest + 1."""
    parts, grids, at, start = [], iter(grids), 0, 0
    while at < len(ids):
        if ids[at] in (image_pad, video_pad):
            moments, rows, columns = next(grids)
            time = torch.arange(moments) * (video_step if ids[at] == video_pad else 1)
            part = torch.cartesian_prod(time, torch.arange(rows // 2), torch.arange(columns // 2)).T  # of 2 x 2 patches
        else:
            words = next((i for i in range(at, len(ids)) if ids[i] in (image_pad, video_pad)), len(ids)) - at
            part = torch.arange(words).expand(3, words)
        parts.append(start + part)
        at += part.shape[1]
        start += int(part.max()) + 1
    return torch.cat(parts, dim=1)

# 3  The pack ----------------------------------------------------------------------------------------------------------
@dataclass
class Pack:
    """One row of T tokens that holds several comparisons end to end: prompt, response 1, response 2 ..., next prompt.

    For two comparisons with prompts of 3 and 2 tokens and two responses each of 2 tokens:

        comparison     0 0 0 0 0 0 0  1 1 1 1 1 1
        branch         0 0 0 1 1 2 2  0 0 1 1 2 2    0 is the prompt, k the k-th response
        positions      0 1 2 3 4 3 4  0 1 2 3 2 3    a branch restarts where the prompt ended: to the network each
                                                     response is the only one
        last_token             4   6      10  12     where the head reads each response's reward
        pairs          [[0, 1], [2, 3]]              winner and loser among the R = 4 responses of the pack"""
    input_ids: torch.Tensor  # (T,)
    comparison: torch.Tensor  # (T,) which comparison a token belongs to
    branch: torch.Tensor  # (T,)
    positions: torch.Tensor  # (3, T)
    last_token: torch.Tensor  # (R,) index of each response's final token: nothing is inferred from padding
    response_length: torch.Tensor  # (R,) tokens of each branch, its last <|im_end|> not counted
    response_tokens: torch.Tensor  # (S,) index of every response token; this and the next two: for vocabulary heads
    predicted_by: torch.Tensor  # (S,) index of the token that predicts it; for a first one the end of the prompt
    text_weight: torch.Tensor  # (S,) 1/n for each of the n tokens of a text to learn (section 7), else 0
    pairs: torch.Tensor  # (B, 2) indices into the R responses
    pixel_values: torch.Tensor  # (P, channels*2*14*14)
    image_grid_thw: torch.Tensor  # (N, 3)
    blocks: list[tuple]  # for each comparison: ([number of tokens of prompt, response 1 ...], branch_mask; long: None)

    def to(self, device) -> "Pack":
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        blocks = [(lengths, table if table is None else table.to(device)) for lengths, table in self.blocks]
        return replace(self, **moved, blocks=blocks)

def pack(comparisons: list, processor: "Processor | None" = None) -> Pack:
    """Comparisons, encoded already or as they are with a processor, end to end in one row, nothing between them."""
    encoded = [item if isinstance(item, Encoded) else encode(item, processor) for item in comparisons]
    ids, comparison, branch, positions, blocks = [], [], [], [], []
    last_token, length, response_tokens, predicted_by, text_weight, pairs = [], [], [], [], [], []
    for c, item in enumerate(encoded):
        pairs += [(len(last_token) + winner, len(last_token) + loser) for winner, loser in item.pairs]
        start, prompt_end = len(ids), len(ids) + len(item.prompt_ids)
        ids += item.prompt_ids
        branch += [0] * len(item.prompt_ids)
        positions.append(item.prompt_positions)
        after_prompt = int(item.prompt_positions.max()) + 1
        to_learn = item.text_tokens or [0] * len(item.response_ids)
        for b, (response, n) in enumerate(zip(item.response_ids, to_learn), start=1):
            at = len(ids)
            ids += response
            branch += [b] * len(response)
            positions.append(torch.arange(after_prompt, after_prompt + len(response)).expand(3, -1))
            response_tokens += range(at, len(ids))
            predicted_by += [prompt_end - 1, *range(at, len(ids) - 1)]
            last_token.append(len(ids) - 1)
            length.append(len(response) - 1)
            text_weight += [0.0] * (len(response) - n) + [1 / max(n, 1)] * n
        comparison += [c] * (len(ids) - start)
        table = branch_mask(torch.tensor(branch[start:])) if len(ids) - start <= SMALL else None  # see `attend`
        blocks.append(([len(item.prompt_ids), *map(len, item.response_ids)], table))
    integers = partial(torch.tensor, dtype=torch.long)  # an empty list too
    return Pack(*map(integers, (ids, comparison, branch)), torch.cat(positions, dim=1),
                *map(integers, (last_token, length, response_tokens, predicted_by)), torch.tensor(text_weight),
                integers(pairs).view(-1, 2), torch.cat([item.pixel_values for item in encoded]),
                torch.cat([item.image_grid_thw for item in encoded]), blocks)

def branch_mask(branch: torch.Tensor) -> torch.Tensor:
    """(n, n) for the n tokens of one comparison: True where token i may look at token j.

    j must not come after i, and must be in the prompt (branch 0) or in i's own branch. So branches do not see each
    other, and comparisons do not either, as each has attention of its own.

    >>> branch_mask(torch.tensor([0, 1, 2])).int().tolist()              # one prompt token, two responses of one token
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]"""
    place = torch.arange(len(branch), device=branch.device)
    earlier = place[None, :] <= place[:, None]
    return earlier & ((branch[None, :] == 0) | (branch[None, :] == branch[:, None]))

# 4  Hidden states -----------------------------------------------------------------------------------------------------
def embed(backbone, pack: Pack) -> tuple[torch.Tensor, dict]:
    """Token embeddings (T, D), with what the vision tower made of the pictures in the places of their tokens; and
    options for `decode`: what a Qwen3-VL adds in these places after its first layers."""
    ids, config, family = pack.input_ids, backbone.config, family_of(backbone.config)
    embeddings = backbone.get_input_embeddings()(ids)  # (T, D)
    if torch.is_autocast_enabled(embeddings.device.type):
        embeddings = embeddings.float()  # what flows between the layers is fp32, also where the weights are bf16
    if not family.pads:  # it reads text alone
        return embeddings, {}
    pixels, grids = pack.pixel_values, pack.image_grid_thw
    if not len(grids):  # a blank image that stands nowhere, so that the vision tower runs on every rank: DDP waits for
        # a gradient of every parameter, if it is 0, and a sharded tower for every rank to come and gather it
        pixels, grids = embeddings.new_zeros(family.blank), ids.new_tensor([[1, 2, 2]])
    of_image = (ids == config.image_token_id) | (ids == getattr(config, "video_token_id", -1))  # (T,)
    features, *deep = family.see(backbone, pixels, grids)  # (image tokens, D) each
    options = {"visual_pos_masks": of_image[None], "deepstack_visual_embeds": deep} if deep else {}
    return embeddings.masked_scatter(of_image[:, None], features.to(embeddings.dtype)), options

def hidden_states(backbone, pack: Pack) -> torch.Tensor:
    """Final hidden states (T, D) of a pack. In the place of transformers' attention stands `attend`, below: each
    comparison for itself, a short one under its branch_mask, a long one branch by branch, which gives the same."""
    no_mask = torch.zeros(1, 1, 1, 1, device=pack.input_ids.device)  # 4-D, so that transformers adds none of its own
    row, more = embed(backbone, pack)  # (T, D)
    out = decode(backbone, row[None], pack.positions[:, None], no_mask, blocks=pack.blocks, use_cache=False, **more)
    return out.last_hidden_state[0]

# 5  The reward --------------------------------------------------------------------------------------------------------
READS = "last_token"  # stands in reward_config.json: a model that reads another token cannot be loaded by mistake
ACTIVATIONS = {"silu": nn.SiLU, "tanh": nn.Tanh, "relu": nn.ReLU, "none": nn.Identity}

def read_by_head(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """What the head reads, (R, D): the hidden state of each response's last token, <|im_end|>, which has seen the
    prompt, the images and the whole response. To read something else, change this function and READS."""
    return hidden[pack.last_token]

def build_head(width: int, layers: int = 2, activation: str = "silu") -> nn.Sequential:
    """`layers` linear layers with an activation between them, one number out (Table 2: two layers and SiLU are best).

    Rewards start around 0.3 apart, and the loss near log 2, the loss of knowing nothing. Trap: with a tenth of this std
    the backbone gets no gradient to speak of; a model without pretraining then stays at log 2."""
    if layers < 1 or activation not in ACTIVATIONS:
        raise ValueError(f"head of {layers} layers with {activation!r}: want 1 or more, and one of {list(ACTIVATIONS)}")
    parts = []
    for _ in range(layers - 1):
        parts += [nn.Linear(width, width), ACTIVATIONS[activation]()]
    last = nn.Linear(width, 1)
    nn.init.normal_(last.weight, std=1 / math.sqrt(width))
    nn.init.zeros_(last.bias)
    return nn.Sequential(*parts, last)

class RewardModel(nn.Module):
    """A backbone without its vocabulary head, and a small head that turns the end of a response into its reward: the
    paper's naive paradigm (it writes nothing), its pick. A critic has the vocabulary head too, a generative one has it
    alone (section 7). Below the line: score_many, from_backbone, from_pretrained, save_pretrained."""

    def __init__(self, lm, head: nn.Sequential | None, processor: "Processor", config: dict):
        super().__init__()
        self.lm, self.head = lm, head  # transformers' model, with its vocabulary head or without; the reward head
        self.config = config  # of reward_config.json: paradigm (naive, critic, direct, think), head, what it reads
        self.processor = replace(processor, paradigm=config.get("paradigm", "naive"))
        self.critiques_from, self.critique_tokens = "own", config.get("critique_tokens", 512)  # or "given": answers_to

    lm_head = property(lambda self: getattr(self.lm, "lm_head", None))
    backbone = property(lambda self: self.lm if self.lm_head is None else self.lm.model)
    device = property(lambda self: next(self.parameters()).device)

    def forward(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards (R,), and a scalar: the cross entropy of critiques or thoughts, for each a mean over its tokens, all
        added up; in fp32. On CUDA the backbone computes in bf16; its weights stay as they were loaded."""
        cross_entropy = torch.zeros((), device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = hidden_states(self.backbone, pack)  # (T, D)
            if self.head is None or (self.lm_head is not None and self.training):  # a judge, or a critic that learns
                keep = slice(None) if self.head is None else pack.text_weight > 0
                logprobs = response_logprobs(self.lm_head, hidden, pack, keep)
                cross_entropy = -(pack.text_weight[keep] * logprobs).sum()
        if self.head is None:
            return sum_over_responses(logprobs, pack), cross_entropy
        with torch.autocast(self.device.type, enabled=False):  # differences of rewards are small: the head stays fp32
            read = read_by_head(hidden, pack).to(self.head[-1].weight.dtype)  # (R, D)
            return self.head(read)[:, 0].clone(), cross_entropy  # a view would make FSDP warn

    def score(self, prompt, responses, images=()) -> list[float]:
        """Rewards of K responses to one prompt, higher is better; only their differences mean something."""
        return self.score_many([Comparison(prompt, responses, images=list(images))])[0]

# 6  The loss ----------------------------------------------------------------------------------------------------------
def pairwise_loss(rewards, pairs, zero_coef=0.0, length_norm=False, response_length=None, pairs_in_step=None):
    """Equation (1): the mean over pairs of -log sigmoid(r(x, chosen) - r(x, rejected)), in fp32.

    rewards (R,); pairs (B, 2) indices of chosen and rejected. Only differences within a pair matter: a constant added
    to all rewards changes nothing. A pair pulls by the probability of being wrong, sigmoid(-margin): settled ones stop.

    Algorithm 1 adds two options, which hurt in the paper's ablation (section 4.3) and are off:
    length_norm    r <- r / log(length + 1), with response_length (R,) in tokens, before anything else
    zero_coef      + lambda * mean((r_chosen + r_rejected)^2), which fixes the free constant

    pairs_in_step: divide by this in place of B, so that parts of a step (micro-steps, ranks) add up to the whole.

    >>> round(pairwise_loss(torch.tensor([1.0, 1.0]), torch.tensor([[0, 1]])).item(), 4)          # no opinion: log 2
    0.6931"""
    rewards = rewards.float()
    if length_norm:
        rewards = rewards / torch.log(response_length.clamp(min=1).float() + 1)
    chosen, rejected = rewards[pairs[:, 0]], rewards[pairs[:, 1]]
    loss = -F.logsigmoid(chosen - rejected).sum()
    if zero_coef:
        loss = loss + zero_coef * ((chosen + rejected) ** 2).sum()
    return loss / (pairs_in_step or max(len(pairs), 1))

# 7  The other two paradigms (Table 1) ---------------------------------------------------------------------------------
CRITIQUE_TURN = ("\n<|im_start|>user\nWhat is right and what is wrong in this answer?<|im_end|>\n"
                 "<|im_start|>assistant\n")
VERDICT, THINK = "Which answer is better, 1 or 2?", "Say what is right and wrong in each answer. "

def with_critiques(item: Encoded, critiques: list, processor: "Processor") -> Encoded:
    """A critic reads a response, is asked for a critique, writes it, and gives its reward *after it*. All of this is
    the response's branch, so the prompt is still read once for K responses and their critiques:

        prompt | response <|im_end|> [turn of the user that asks] critique <|im_end|> -> head -> r

    It learns both at once: equation (1) plus a weight times the mean cross entropy of the critiques' tokens. In
    training the critiques are the given ones; in scoring it reads after its own. A response without one is read at its
    own end. critiques: K lists of token ids; an empty one is none."""
    ask = processor.tokenizer(CRITIQUE_TURN, add_special_tokens=False).input_ids
    both = list(zip(item.response_ids, critiques, strict=True))
    return replace(item, response_ids=[[*ids, *ask, *c, processor.end] if c else ids for ids, c in both],
                   text_tokens=[len(c) + 1 if c else 0 for _, c in both])

def judge_pair(comparison: Comparison, first: int, second: int, think: bool = False) -> Comparison:
    """A generative reward model has no head. It is asked which of two answers is better, and "1" and "2" are the two
    responses: their log-probabilities (without <|im_end|>) are the rewards. Again a comparison, a pack, the same loss.
    What it says depends on the order of the answers, so both orders are asked in scoring.

    With `think` there is one response, <think>1: critique 2: critique</think><answer>1</answer>: it learns to write
    that, and scoring reads the <answer> that it wrote."""
    messages = to_messages(comparison.prompt, comparison.images)
    turns = [f"{m['role']}: {m['content']}" if messages[1:] else m["content"] for m in messages]
    answers = [re.sub("<(?=(image|video)>)", "< ", comparison.responses[k]) for k in (first, second)]  # no marks
    prompt = "\n".join([*turns, f"Answer 1: {answers[0]}", f"Answer 2: {answers[1]}", THINK * think + VERDICT])
    pairs = [(0, 1)] * ((first, second) in comparison.pairs) + [(1, 0)] * ((second, first) in comparison.pairs)
    responses = ["1", "2"]
    if think:
        critiques = comparison.critiques or [""] * len(comparison.responses)
        verdict = "".join("12"[winner] for winner, _ in pairs)
        responses = [f"<think>1: {critiques[first]} 2: {critiques[second]}</think><answer>{verdict}</answer>"]
        pairs = []
    return replace(comparison, prompt=prompt, responses=responses, pairs=pairs, critiques=())

# ======================================================================================================================
# First reading ends here. Below: what a real run needs.
# ======================================================================================================================
PARADIGMS = ("naive", "critic", "direct", "think")  # Table 1; the last two are generative

# Families -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Family:
    """What a kind of backbone does in its own way. Without anything of it: a backbone that reads text alone."""
    pads: tuple[str, ...] = ()  # the tokens that stand for parts of a picture; first that of an image
    open: Callable | None = None  # (folder or id, vision config, max_pixels) -> image processor, without torchvision
    read: Callable | None = None  # (picture or video, image processor) -> pixels, grids, what takes the mark's place
    see: Callable | None = None  # (backbone, pixels, grids (N, 3)) -> [features (image tokens, D), for layer 1, 2 ...]
    blank: tuple[int, ...] = ()  # shape of the pixels of one image token
    mark: re.Pattern = MARK

def family_of(config) -> Family:
    return FAMILIES.get(config.model_type, Family())

def vision_parts(backbone) -> list[nn.Module]:
    """What --freeze_vision freezes: the vision tower and what leads from it to the decoder."""
    names = ("visual", "vision_tower", "multi_modal_projector")
    return [getattr(backbone, name) for name in names if hasattr(backbone, name)]

def open_qwen(path_or_id, vision, max_pixels: int | None):
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(path_or_id)
    if (image_processor.merge_size, image_processor.patch_size) != (2, vision.patch_size):
        raise ValueError(f"its patches are not the {vision.patch_size} pixels of the backbone, 2 x 2 to a token")
    if max_pixels:
        least = min(image_processor.size["shortest_edge"], max_pixels)
        image_processor.size = {"shortest_edge": least, "longest_edge": max_pixels}
    return image_processor

def see_qwen(backbone, pixels, grids) -> list[torch.Tensor]:
    out = backbone.visual(pixels, grid_thw=grids)
    return [out.pooler_output, *getattr(out, "deepstack_features", ())]

def read_qwen3(source, image_processor):
    """A video of Qwen3-VL is a row of pictures, each of two frames and after a text with its time. So its positions
    are those of pictures. Without a frame rate we take a second for two frames, as for Qwen2.5-VL. Trap: transformers
    5.23 leaves another <|vision_start|> and <|vision_end|> around the whole; 4.57, the release with Qwen, does not."""
    if not is_video(source):
        return read_qwen2(source, image_processor)
    patches, (t, h, w) = cut_into_patches(source, image_processor)
    frames = len(frames_of(source))
    times = [(2 * k + min(2 * k + 1, frames - 1)) / 4 for k in range(t)]  # seconds, in the middle of the two frames
    tokens = f"<|vision_start|>{VIDEO_PAD * (h * w // 4)}<|vision_end|>"
    return patches, [[1, h, w]] * t, "".join(f"<{time:.1f} seconds>{tokens}" for time in times)

def open_internvl(path_or_id, vision, max_pixels: int | None):
    """max_pixels: of all tiles of an image together; one more shows the whole where there are several."""
    image_processor = GotOcr2ImageProcessorPil.from_pretrained(path_or_id)
    size = image_processor.size["height"], image_processor.size["width"]
    if (*size, 14, 14) != (*vision.image_size, *vision.patch_size):
        raise ValueError(f"its tiles are of {size} pixels, the backbone's of {vision.image_size}, in patches of 14")
    if max_pixels:
        image_processor.max_patches = max(max_pixels // math.prod(size), 1)
    return image_processor

def read_internvl(source, image_processor):
    """Tiles (n, 3, 448, 448), and a grid for each run of tokens: all tiles of an image, or a frame of a video, which is
    one tile. The tokens are none of Qwen's, so `mrope_positions` counts them as text, which is what InternVL does."""
    tiled = not is_video(source)  # trap: the published file says that nothing is, which its processor overrules
    out = image_processor(images=open_frames(source), crop_to_patches=tiled, return_tensors="pt")
    side, runs = out["pixel_values"].shape[-1] // 14, out["num_patches"].tolist()  # patches of a side, tiles of a run
    marks = [f"<img>{'<IMG_CONTEXT>' * (n * side * side // 4)}</img>" for n in runs]
    if not tiled:
        marks = [f"Frame{i}: {mark}" for i, mark in enumerate(marks, start=1)]
    return out["pixel_values"], [[n, side, side] for n in runs], "\n".join(marks) + "\n"

def see_internvl(backbone, pixels, grids) -> list[torch.Tensor]:
    return [backbone.get_image_features(pixels).pooler_output.flatten(0, 1)]

QWEN2 = Family((IMAGE_PAD, VIDEO_PAD), open_qwen, read_qwen2, see_qwen, (4, 3 * 2 * 14 * 14))
FAMILIES = {"qwen2_vl": QWEN2, "qwen2_5_vl": QWEN2,  # by config.model_type
            "qwen3_vl": Family((IMAGE_PAD, VIDEO_PAD), open_qwen, read_qwen3, see_qwen, (4, 3 * 2 * 16 * 16)),
            "internvl": Family(("<IMG_CONTEXT>",), open_internvl, read_internvl, see_internvl, (1, 3, 28, 28),
                               re.compile("(?:<image>|<video>)\n?"))}

def with_texts_to_learn(item: Encoded, comparison: Comparison, processor: "Processor") -> Encoded:
    if processor.paradigm == "think":  # the whole response
        return replace(item, text_tokens=[len(ids) for ids in item.response_ids])
    if processor.paradigm == "critic" and comparison.critiques:
        texts = [own_words(text) for text in comparison.critiques]
        found = processor.tokenizer(texts, add_special_tokens=False).input_ids
        return with_critiques(item, [ids if text.strip() else [] for ids, text in zip(found, texts)], processor)
    return item

# Prompts and texts ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Processor:
    """What turns a comparison into tokens and patches. It belongs to a backbone and lies beside it in its folder."""
    tokenizer: PreTrainedTokenizerFast
    image_processor: Qwen2VLImageProcessorPil | GotOcr2ImageProcessorPil | None  # None: the backbone is text-only
    video_step: int = 1  # by how much the time of a video's next moment is later, see mrope_positions
    family: Family = Family()
    paradigm: str = "naive"  # one of PARADIGMS: what is asked about a response, see section 7

    def id_of(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    @property
    def never(self) -> list[int]:
        """The tokens of pictures: one that is written would stand for a picture that is not there."""
        return [self.id_of(pad) for pad in self.family.pads]

    @property
    def end(self) -> int:
        """The id of <|im_end|>, with which every response ends."""
        return self.id_of(END)

ROLES = ("system", "user", "assistant", "tool")

def printable(text: str) -> str:
    """With control characters written out: a text from elsewhere may hold commands to the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)

def one_line(text) -> str:
    """A text on one line of 300 characters at most, cut in the middle: place and remedy stand at its ends."""
    text = printable(" ".join(str(text).split()))
    return text if len(text) <= 300 else f"{text[:215]} ... {text[-80:]}"

def check_text(text, what: str) -> None:
    """ValueError if `text` is no text, or holds half of a surrogate pair, which no tokenizer takes."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is a {type(text).__name__}, want a text")
    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{what} holds {half[0]!r} at character {half.start()}, half of a character cut apart")

def to_messages(prompt, images=()) -> list[dict]:
    """Chat messages with plain text contents in which every image is a mark. Images without any mark come first.

    The one place that decides whether a prompt can be used; ValueError says in one line why not.

    >>> to_messages("What is shown?", images=["7.png"])
    [{'role': 'user', 'content': '<image>What is shown?'}]"""
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(prompt, (list, tuple)):
        raise ValueError(f"the prompt is a {type(prompt).__name__}, want a text or a list of messages")
    messages = []
    for message in prompt:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"a message of the prompt has no role among {', '.join(ROLES)}: {str(message)[:80]}")
        content = message.get("content")
        if isinstance(content, (list, tuple)):  # typed parts
            content = "".join(text_of_part(part) for part in content)
        check_text(content, f"the content of the {message['role']}'s message")
        messages.append({"role": message["role"], "content": content})
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("the prompt must end with a message of the user; what the assistant says is the response")
    marks = sum(len(MARK.findall(message["content"])) for message in messages)
    if marks == 0 and images:
        first = next((message for message in messages if message["role"] == "user"), messages[-1])
        first["content"] = "<image>" * len(images) + first["content"]
    elif marks != len(images):
        raise ValueError(f"the prompt has {marks} <image> marks but there are {len(images)} images; one mark for each")
    return messages

def own_words(text) -> str:
    """A response or critique as text in which nothing is a special token."""
    check_text(text, "a response")
    return SPECIAL.sub("< ", text)

def text_of_part(part) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image", "image_url", "video"):
        return "<image>"
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"a part of a message cannot be used: {str(part)[:80]}; want a text, an image or a video")
    return part["text"]

# Images and videos ----------------------------------------------------------------------------------------------------
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # pixels only: for an EPS Pillow would start Ghostscript
MAX_IMAGE_PIXELS = 89_478_485  # Pillow's warning line; beyond lies the bomb, a file of kilobytes with 10^9 pixels
MAX_IMAGE_BYTES = 1 << 29  # no picture of so many pixels has a larger file
MAX_ASPECT_RATIO = 200  # beyond it Qwen's image processor refuses
MAX_FRAMES = 32  # of a video, evenly spaced (as MM-RLHF-RewardBench is scored)
FRAME_SHARE = 8  # a frame has 1/8 of an image's pixels: with two frames to a token, 32 frames cost what two images do

def open_image(source, most: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The RGB image in a file, in a file's bytes, or decoded already; upright. ValueError if it cannot be trusted."""
    name = f"of {len(source)} bytes" if isinstance(source, bytes) else one_line(source)
    try:
        if isinstance(source, (str, os.PathLike)):
            status = os.stat(source)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_IMAGE_BYTES:  # a pipe or a device never ends
                raise ValueError(f"it is no file, or one of more than {MAX_IMAGE_BYTES} bytes")
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        image = file if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS)
        width, height = image.size  # known from the header: nothing is decoded yet
        if width * height > most or max(width, height) > MAX_ASPECT_RATIO * min(width, height) or not width * height:
            raise ValueError(f"{width} x {height} pixels are none, more than {most} (a decompression bomb?), or "
                             f"narrower than 1:{MAX_ASPECT_RATIO}; shrink or crop it")
        return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"image {name} does not exist; fetch it or remove the row") from None
    except Exception as error:  # a broken file: Pillow has a dozen kinds, SyntaxError and struct.error among them
        raise ValueError(f"image {name} cannot be used: {one_line(error)}") from None

def frames_of(source, most: int = MAX_FRAMES) -> list:
    """At most so many frames of a video, evenly spaced, first and last kept: of a list, or of a folder's files, where
    frame_2 comes before frame_10. A picture is its own only frame."""
    if not is_video(source):
        return [source]
    frames = source if isinstance(source, (list, tuple)) else [f for f in Path(source).iterdir() if f.name[0] != "."]
    if frames is not source:
        frames.sort(key=lambda f: [(word, int(digits or 0)) for word, digits in re.findall(r"(\D*)(\d*)", f.name)])
    if not frames:
        raise ValueError(f"video {one_line(source)} holds no frame")
    n = min(len(frames), most)
    return [frames[round(i * (len(frames) - 1) / max(n - 1, 1))] for i in range(n)]

def open_frames(source, most: int = MAX_FRAMES) -> list[Image.Image]:
    pixels = MAX_IMAGE_PIXELS // FRAME_SHARE if is_video(source) else MAX_IMAGE_PIXELS
    return [open_image(frame, pixels) for frame in frames_of(source, most)]

def is_video(source) -> bool:
    return isinstance(source, (list, tuple)) or (isinstance(source, (str, os.PathLike)) and os.path.isdir(source))

def cut_into_patches(source, image_processor) -> tuple[torch.Tensor, list[int]]:
    """Patches (P, channels*2*side*side) of an image or a video for a Qwen, and its grid (t, h, w) with P = t*h*w.

    The processor writes an image twice into each patch, since the vision tower takes two moments at a time. For a video
    the second half of a patch comes from the next frame in its place; an odd last frame is repeated."""
    if not is_video(source):
        out = image_processor(images=[open_image(source)], return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"][0].tolist()
    least, frames, sizes, patches = image_processor.size["shortest_edge"], frames_of(source), set(), []
    budget = {"shortest_edge": least, "longest_edge": max(least, image_processor.size["longest_edge"] // FRAME_SHARE)}
    for at in range(0, len(frames), 2):  # two at a time: 32 decoded at full size take up to a gigabyte
        two = open_frames(frames[at:at + 2])
        sizes |= {frame.size for frame in two}
        if len(sizes) > 1:
            raise ValueError(f"video {one_line(source)}: its frames have different sizes")
        out = image_processor(images=[two[0], two[-1]], size=budget, return_tensors="pt")
        _, h, w = out["image_grid_thw"][0].tolist()
        both = out["pixel_values"].view(2, h * w, 3, 2, -1)  # (frame, patch, channel, moment, pixels)
        patches.append(torch.stack([both[0, :, :, 0], both[1, :, :, 1]], dim=2))  # (patch, channel, moment, pixels)
    return torch.cat(patches).flatten(1), [len(patches), h, w]

# Attention ------------------------------------------------------------------------------------------------------------
SMALL = 256  # tokens of a comparison up to which one call with a table is quicker than a call for each branch

def attend(module, query, key, value, attention_mask=None, blocks=None, scaling=None, **options):
    """Attention of a pack, for transformers' AttentionInterface: query (1, heads, T, width of a head), fewer keys.

    Each comparison for itself; of the table of a pack of ten, nine tenths would be empty. A small comparison takes one
    call with its branch_mask. In a large one the prompt and its first response are a plain causal row, and every other
    response is the end of a causal row that begins with the prompt: no work that a table throws away.
    Without blocks (the vision tower, `generate`) this is transformers' own "sdpa"."""
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    product = partial(F.scaled_dot_product_attention, scale=scaling)
    query, key = query.to(value.dtype), key.to(value.dtype)  # fp32 after RoPE; causal_lower_right escapes autocast
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    sizes, out = [sum(lengths) for lengths, _ in blocks], []
    # `split` and not slices: the backward pass of a slice fills a tensor of the whole pack, for each of them
    for (lengths, table), q, k, v in zip(blocks, *(x.split(sizes, dim=2) for x in (query, key, value))):
        if table is not None:
            out.append(product(q, k, v, attn_mask=table))
            continue
        prompt, first, *rest = [*lengths, 0][:max(len(lengths), 2)]
        q, k, v = (x.split([prompt + first, *rest], dim=2) for x in (q, k, v))
        out.append(product(q[0], k[0], v[0], is_causal=True))
        for i, length in enumerate(rest, start=1):
            keys, values = (torch.cat([x[0][:, :, :prompt], x[i]], dim=2) for x in (k, v))
            out.append(product(q[i], keys, values, attn_mask=causal_lower_right(length, prompt + length)))
    return torch.cat(out, dim=2).transpose(1, 2), None  # (1, T, heads, width of a head), no attention weights

def decode(backbone, embeddings: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, **options):
    """The decoder's output for embeddings (rows, tokens, D) at positions (3, rows, tokens).

    `backbone` is one of FAMILIES or a text decoder of transformers, without its vocabulary head; text decoders, and so
    InternVL's, know one kind of position. Positions are always given: left alone, transformers takes 1-D ones silently.
    """
    decoder = getattr(backbone, "language_model", backbone)
    positions = positions if hasattr(backbone, "visual") else positions[0]
    return decoder(inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, **options)

def attend_by_length(module, query, key, value, attention_mask=None, scaling=None, cu_seq_lens_q=None, **options):
    """Attention of the vision tower of Qwen2-VL and Qwen2.5-VL: query, key, value (1, heads, P, width of a head), where
    patches see those of their window (or of their moment) alone. cu_seq_lens_q (windows + 1,): where each begins.

    Windows of equal length share one call: a picture of 1036 x 1036 has 100 windows, of four lengths at most. The same
    tensor comes to all layers of a kind, so the lengths are fetched from the GPU once and stay with it."""
    if not hasattr(cu_seq_lens_q, "groups"):
        lengths, members = cu_seq_lens_q.diff().tolist(), {}
        for window, length in zip(torch.arange(sum(lengths)).split(lengths), lengths):
            members.setdefault(length, []).append(window)
        order = torch.cat([torch.cat(windows) for windows in members.values()])
        cu_seq_lens_q.groups = [(len(windows), length) for length, windows in members.items()]
        cu_seq_lens_q.order, cu_seq_lens_q.back = order.to(query.device), order.argsort().to(query.device)
    groups, out = cu_seq_lens_q.groups, []
    sorted_parts = (x[0].index_select(1, cu_seq_lens_q.order).split([n * length for n, length in groups], dim=1)
                    for x in (query.to(value.dtype), key.to(value.dtype), value))
    for (n, length), *parts in zip(groups, *sorted_parts):  # each (heads, n * length, width of a head)
        q, k, v = (x.unflatten(1, (n, length)).transpose(0, 1) for x in parts)  # (n, heads, length, width of a head)
        out.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(out).index_select(0, cu_seq_lens_q.back)[None], None  # (1, P, heads, width of a head)

class PatchProduct(nn.Conv3d):
    """A convolution whose kernel is as large as its stride is a matrix product: 34.9 -> 8.0 ms (800 patches, width 128,
    forward and backward, a CPU, commit c69d86f). Its weight keeps name and shape."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)

def quicken_vision(model) -> None:
    """Fewer and larger calls in the vision tower, the same numbers. Only a function with "flash" in its name is given
    all windows at once; and only after the model is made may its name be said: before, transformers would look for the
    package. What is saved knows nothing of it."""
    tower = next((part for part in model.modules() if type(part).__name__ in TOWERS), None)
    if tower is not None:
        tower.config._attn_implementation, tower.patch_embed.proj.__class__ = "flash_by_length", PatchProduct

TOWERS = ("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel")
AttentionInterface.register("flash_by_length", attend_by_length)

# Trap: without a mask function of the same name transformers makes no mask for padded rows, and says nothing of it
AttentionInterface.register("branches", attend)
AttentionMaskInterface.register("branches", sdpa_mask)

def recompute_activations(model) -> None:
    """Gradient checkpointing: the backward pass computes each layer's activations again. transformers 5.23 renamed the
    method, and drops the old name in version 6."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(model, next(name for name in names if hasattr(model, name)))({"use_reentrant": False})

# Many at once ---------------------------------------------------------------------------------------------------------
def fill_packs(sizes: list[int], budget: int) -> list[list[int]]:
    """Indices of the items that share a pack of at most `budget` tokens: the longest first, each into the fullest that
    has room. One that is longer than the budget is a pack of its own.

    >>> fill_packs([6, 3, 5, 4], budget=10)
    [[0, 3], [2, 1]]"""
    packs, room = [], []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [p for p in range(len(packs)) if room[p] >= sizes[i]]
        p = min(fitting, key=lambda p: room[p], default=len(packs))
        if not fitting:
            packs.append([])
            room.append(budget)
        packs[p].append(i)
        room[p] -= sizes[i]
    return packs

@dataclass
class Score:
    """What a model says of a comparison with K responses and B pairs."""
    rewards: list[float]  # K of them; a judge's: the sum of each response's preferences over others, less 1/2 each
    verdicts: list = ()  # a judge's margins of every pair, (B, 2): its winner was answer 1, was answer 2; others: none
    texts: list[str] = ()  # what it wrote: K critiques, or 2 B thoughts

def margins_of(pairs, score: Score) -> list[list[float]]:
    """What was said of each pair (winner, loser): one margin, or a judge's two. Above 0 is right."""
    return list(score.verdicts) or [[score.rewards[winner] - score.rewards[loser]] for winner, loser in pairs]

def judged_pairs(comparison: Comparison) -> list:
    """Those that are given, in their order; where none is, all."""
    return list(comparison.pairs) or list(combinations(range(len(comparison.responses)), 2))

def asked(comparison: Comparison, model: RewardModel) -> list[Encoded]:
    """What is read to score a comparison: itself, or by a judge each of its pairs in both orders."""
    if model.head is not None:
        own = model.critiques_from == "own"  # it will write them
        return [encode(replace(comparison, critiques=()) if own else comparison, model.processor)]
    if len(comparison.responses) < 2:
        raise ValueError(f"a judge compares responses and was given {len(comparison.responses)}; want 2 or more")
    orders = [order for i, j in judged_pairs(comparison) for order in ((i, j), (j, i))]
    think = model.processor.paradigm == "think"
    return [encode(judge_pair(comparison, *order, think), model.processor) for order in orders]

def score_of(comparison: Comparison, answers: list, model: RewardModel) -> Score:
    """From `answers_to` what was asked."""
    if model.head is not None:
        return Score(answers[0][0], texts=answers[0][1])
    score = Score([0.0] * len(comparison.responses), [], [text for _, texts in answers for text in texts])
    for (i, j), (first, _), (second, _) in zip(judged_pairs(comparison), answers[::2], answers[1::2]):
        score.verdicts.append([first[0] - first[1], second[1] - second[0]])
        for margin in score.verdicts[-1]:
            preference = math.tanh(margin / 2) / 2  # sigmoid(margin) - 1/2: to be in many pairs is no merit
            score.rewards[i] += preference / 2
            score.rewards[j] -= preference / 2
    return score

@torch.no_grad()
def answers_to(items: list[Encoded], model: RewardModel, pack_tokens: int | None = None, of_all=int) -> list[tuple]:
    """(rewards of its branches, texts that were written) of every item. A pack has 16,384 tokens on a GPU; a CPU gains
    nothing from more than 1,024. of_all: from the number of packs here to how many forwards are made, of a filler where
    packs are fewer: equally many on all ranks, so that a sharded model can gather its layers."""
    processor, texts = model.processor, [[]] * len(items)
    if processor.paradigm == "think" and model.critiques_from == "given":
        raise ValueError("a judge that thinks is scored by what it writes; --critiques given is for critics")
    pack_tokens = pack_tokens or (16384 if model.device.type == "cuda" else 1024)
    if model.critiques_from == "own" and processor.paradigm in ("critic", "think"):
        written = write(items, model, 8 * pack_tokens)
        texts = [[processor.tokenizer.decode(ids) for ids in group] for group in written]
        if processor.paradigm == "think":
            said = [verdict(text) for (text,) in texts]
            return [([float(one == 1), float(one == 2)], group) for one, group in zip(said, texts)]
        items = [with_critiques(item, group, processor) for item, group in zip(items, written)]
    found, packs = [[]] * len(items), fill_packs([item.tokens for item in items], pack_tokens)
    for members in packs + [[]] * (of_all(len(packs)) - len(packs)):
        batch = pack([items[m] for m in members] or [Comparison("?", ["a"])], processor)
        values = iter(model(batch.to(model.device))[0].tolist())
        for m in members:
            found[m] = [next(values) for _ in items[m].response_ids]
    return list(zip(found, texts))

def write(items: list[Encoded], model: RewardModel, tokens: int) -> list[list[list[int]]]:
    """A critic's critique of every response of every item, a judge's thoughts: the likeliest tokens, without the end.
    tokens: in memory at a time."""
    ask, found = model.processor.tokenizer(CRITIQUE_TURN, add_special_tokens=False).input_ids, {}
    prompts = [item.with_responses([[*ids, *ask] for ids in item.response_ids if model.head is not None])
               for item in items]
    wide = [len(prompt.prompt_ids) + max(map(len, prompt.response_ids), default=0) + model.critique_tokens
            for prompt in prompts]  # tokens of each of its rows
    waiting = sorted(range(len(items)), key=lambda m: -wide[m])  # rows are padded to the widest: like ones together
    while waiting:
        rows = max(len(prompts[m].response_ids) or 1 for m in waiting)  # of a prompt, at most
        at_once = max(tokens // (rows * wide[waiting[0]]), 1)
        members, waiting = waiting[:at_once], waiting[at_once:]
        rollouts, _ = generate(model, [prompts[m] for m in members], model.critique_tokens)
        for m, group in zip(members, rollouts):
            found[m] = [[i for i in ids if i != model.processor.end] for ids in group]
    return [found[m] for m in range(len(items))]

def verdict(text: str) -> int:
    """1 or 2, as the last <answer> of a judge says, or without one the last number after its thoughts; else 0.

    >>> verdict("<think>1: red 2: not</think><answer>2</answer>"), verdict("<answer>1 or 2</answer>"), verdict("So 1.")
    (2, 0, 1)"""
    tags, after = re.findall("(?s)<answer>(.*?)</answer>", text), text.rpartition("</think>")[2]
    if tags or "<think>" not in after:  # thoughts without an end end in no verdict
        numbers = set(re.findall(r"\d+", tags[-1]) if tags else re.findall(r"\d+", after)[-1:])
        return int(numbers.pop()) if numbers in ({"1"}, {"2"}) else 0
    return 0

def scores_of(model: RewardModel, comparisons, pack_tokens: int | None = None) -> list[Score]:
    """64 comparisons are packed at a time: memory does not grow with their number."""
    comparisons, scores = list(comparisons), []
    for at in range(0, len(comparisons), 64):
        part = comparisons[at:at + 64]
        items = [[c] if isinstance(c, Encoded) else asked(c, model) for c in part]
        answers = iter(answers_to([item for group in items for item in group], model, pack_tokens))
        scores += [score_of(c, [next(answers) for _ in group], model) for c, group in zip(part, items)]
    return scores

def score_many(model: RewardModel, comparisons, pack_tokens: int | None = None) -> list[list[float]]:
    """K rewards for each comparison, of which all but a judge takes encoded ones too."""
    return [score.rewards for score in scores_of(model, comparisons, pack_tokens)]

def one_ahead(make, items, on_gpu: bool):
    """make(item) for every item. On a GPU the next one is made in a thread while this one is used; on a CPU plainly,
    since threads would only take the cores from the arithmetic."""
    if not on_gpu:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        pending = None
        for item in items:
            ready, pending = pending, thread.submit(make, item)
            if ready is not None:
                yield ready.result()
        if pending is not None:
            yield pending.result()

# The vocabulary head --------------------------------------------------------------------------------------------------
def response_logprobs(lm_head, hidden: torch.Tensor, pack: Pack, keep=slice(None), never=()) -> torch.Tensor:
    """Log-probabilities in fp32 of the response tokens of a pack, each given what stands before it: (S,), or of `keep`.
    lm_head: the vocabulary head. Only the rows that predict meet it, 1,024 at a time and again in the backward pass:
    the logits of 8 responses of 512 tokens over 150,000 words would be 2.5 GB."""
    ids, hidden = pack.input_ids[pack.response_tokens[keep]], hidden[pack.predicted_by[keep]]  # (S,), (S, D)
    parts = [checkpoint(lambda h, i: log_softmax(lm_head, h, never).gather(1, i[:, None])[:, 0], *part,
                        use_reentrant=False) for part in zip(hidden.split(1024), ids.split(1024))]
    return torch.cat(parts)

def sum_over_responses(logprobs: torch.Tensor, pack: Pack) -> torch.Tensor:
    """(S,) -> (R,): the log-probability of each response, its <|im_end|> left out."""
    of = torch.arange(len(pack.last_token), device=logprobs.device).repeat_interleave(pack.response_length + 1)
    said = logprobs * (pack.response_tokens != pack.last_token[of])
    return said.new_zeros(len(pack.last_token)).index_add(0, of, said)

def log_softmax(lm_head, hidden: torch.Tensor, never=()) -> torch.Tensor:
    """(tokens, V) in fp32; the words `never` have probability 0."""
    logits = lm_head(hidden).float()
    logits[:, list(never)] = -torch.inf
    return logits.log_softmax(dim=-1)

class Policy(nn.Module):
    """A backbone with its vocabulary head, which can write: transformers' model `lm`."""

    def __init__(self, lm, processor: Processor):
        super().__init__()
        self.lm, self.processor, self.end = lm, processor, processor.end

    lm_head, backbone, device = RewardModel.lm_head, RewardModel.backbone, RewardModel.device

    def forward(self, pack: Pack) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = hidden_states(self.backbone, pack)  # (T, D)
            return response_logprobs(self.lm_head, hidden, pack, never=self.processor.never)  # (S,)

    @classmethod
    def from_pretrained(cls, path_or_id, max_pixels=None, dtype=torch.float32) -> "Policy":
        lm = load(path_or_id, dtype, vocabulary_head=True)
        return cls(lm, load_processor(path_or_id, lm.config, max_pixels))

    def save_pretrained(self, folder) -> None:
        with replacing(folder) as partial:
            self.lm.save_pretrained(partial)
            save_processor(self.processor, partial)

@torch.no_grad()
def generate(policy, prompts: list[Encoded], max_new_tokens: int, group_size: int = 1, seeds=None):
    """G rollouts for every prompt: (token ids, their log-probabilities), each a list of lists of lists. Where a prompt
    has response_ids these are what its rollouts begin with, one each, in place of G that begin with nothing.

    A rollout ends with <|im_end|>, or is cut off at max_new_tokens. With seeds, one for each prompt, tokens are drawn
    at temperature 1, without top-k, top-p or penalties; without, the likeliest is taken. A prompt's rollouts depend on
    its seed and not on its neighbours (but for rounding, which in bf16 can tip a draw). Prompts are padded on the left
    and read once; their keys and values are then repeated. Trap: under autocast the stream between the layers is fp32
    and so are the keys and values that are kept, twice the memory; embeddings in bf16 make all of it bf16, and the
    log-probabilities differ a little from Policy.forward's, which are learnt from. policy: a Policy, or a RewardModel
    with a vocabulary head.
    The seam for a faster engine: whatever takes prompts and gives token ids of this step's weights can stand here."""
    device, backbone, sizes = policy.device, policy.backbone, [len(prompt.prompt_ids) for prompt in prompts]
    on_gpu, end, never = device.type == "cuda", policy.processor.end, policy.processor.never
    starts = [prompt.response_ids or [[]] * group_size for prompt in prompts]

    def on_the_left(parts):  # (tokens, ...) each -> (rows, width, ...)
        return pad_sequence(parts, batch_first=True, padding_side="left")

    with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        prefix = pack([prompt.with_responses([]) for prompt in prompts]).to(device)
        embeddings, more = embed(backbone, prefix)  # (T, D)
        embeddings = on_the_left((embeddings.bfloat16() if on_gpu else embeddings).split(sizes))
        positions = on_the_left(prefix.positions.T.split(sizes)).permute(2, 0, 1)  # (3, prompts, width)
        mask = on_the_left(torch.ones_like(prefix.input_ids).split(sizes))
        if more:
            more["visual_pos_masks"] = on_the_left(more["visual_pos_masks"][0].split(sizes))  # (prompts, width)
        out = decode(backbone, embeddings, positions, mask, use_cache=True, **more)
        cache, of = out.past_key_values, torch.tensor([p for p, rows in enumerate(starts) for _ in rows], device=device)
        cache.batch_select_indices(of)  # of (rows,): the prompt of each rollout
        hidden, position, mask = out.last_hidden_state[of, -1], positions.amax(dim=(0, 2))[of], mask[of]

        def read_on(ids, own):  # tokens (rows, n), and which of them are no padding -> the last one's hidden states
            nonlocal position, mask
            at, mask = position[:, None] + own.cumsum(dim=1), torch.cat([mask, own], dim=1)  # (rows, n)
            position = at[:, -1]
            inputs = backbone.get_input_embeddings()(ids).to(embeddings.dtype)  # (rows, n, D)
            out = decode(backbone, inputs, at.expand(3, -1, -1), mask, past_key_values=cache, use_cache=True)
            return out.last_hidden_state[:, -1]

        begun = [torch.tensor(ids, dtype=torch.long, device=device) for rows in starts for ids in rows]
        if any(map(len, begun)):
            hidden = read_on(on_the_left(begun), on_the_left([torch.ones_like(ids) for ids in begun]))
        dice = [torch.Generator(device).manual_seed(seed) for seed in seeds or ()]
        written, logprobs, ended = [], [], torch.zeros(len(hidden), dtype=torch.bool, device=device)
        while not ended.all() and len(written) < max_new_tokens:
            if written:
                hidden = read_on(written[-1][:, None], torch.ones_like(written[-1][:, None]))
            choice = table = log_softmax(policy.lm_head, hidden, never)  # (rows, V)
            if dice:  # argmax(logits + Gumbel noise) is a draw from the softmax; -log of an exponential is Gumbel
                noise = [table.new_empty(group_size, table.shape[1]).exponential_(generator=die) for die in dice]
                choice = table - torch.cat(noise).clamp(min=1e-30).log()
            token = choice.argmax(dim=1)
            written.append(token)
            logprobs.append(table.gather(1, token[:, None])[:, 0])
            ended |= token == end
    rollouts, values = [[] for _ in prompts], [[] for _ in prompts]
    for p, ids, row in zip(of.tolist(), torch.stack(written, dim=1).tolist(), torch.stack(logprobs, dim=1).tolist()):
        length = ids.index(end) + 1 if end in ids else len(ids)
        rollouts[p].append(ids[:length])
        values[p].append(row[:length])
    return rollouts, values

# Load and save --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path, last: str = ""):
    """Yields a temporary path to write a file or a folder to; it is moved to `path` if the block ends well.

    For one writer at a time. A kill at any moment leaves the old file or the new one. Into a folder that exists the new
    files are moved one by one, the one named `last` at the end and its old version removed at the start: who finds it
    finds the others whole. Old weights that are not replaced go: one file or several, transformers would take either.
    What is written is as readable as the umask allows. OSError, one line, if it cannot be written: a full disk is a
    RuntimeError to torch and an error of its own to safetensors."""
    path = Path(path).absolute()
    partial = path / ".new.partial" if path.is_dir() else path.with_name(f".{path.name}.partial")  # on the same disk
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        yield partial
        os.umask(umask := os.umask(0))  # asking for the umask is setting it
        for file in [partial, *partial.glob("*")]:  # not the million images of a data folder
            if file.is_file():
                os.chmod(file, 0o666 & ~umask)
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        if not path.is_dir():
            os.replace(partial, path)
            return
        for old in [path / last] * bool(last) + sorted(path.glob("model*.safetensors*")):
            if old.name == last or not (partial / old.name).exists():
                old.unlink(missing_ok=True)
        for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == last):
            if entry.is_dir():
                remove(path / entry.name)
            os.replace(entry, path / entry.name)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"cannot write {path} ({one_line(error)}); is the disk full?") from error
    finally:
        remove(partial)

def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

transformers_logging.set_verbosity_error()  # what its load report would say is checked in `load` and raised
transformers_logging.disable_progress_bar()

def load(path_or_id, dtype=torch.float32, vocabulary_head: bool = False):
    """The model of transformers from safetensors, without its vocabulary head or with it. ValueError names what is
    missing or surplus. Both layouts load: the hub's first one (`visual.*`, `model.*`) and that of today."""
    try:
        config = AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
        check_layers(config)
        kind = class_that_writes(config) if vocabulary_head else AutoModel
        if torch.get_default_device().type == "meta":  # shapes alone: the numbers come from another rank
            model = kind.from_config(config, dtype=dtype, attn_implementation="branches")
            info = {"missing_keys": [], "unexpected_keys": []}
        else:
            model, info = kind.from_pretrained(
                path_or_id, config=config, dtype=dtype, attn_implementation="branches", use_safetensors=True,
                output_loading_info=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged or foreign checkpoint makes transformers raise
        raise ValueError(f"cannot load a model from {path_or_id}: {one_line(error)}") from None
    named, missing = (config.architectures or ["model"])[0], sorted(info["missing_keys"])
    writes = named.endswith(("ForConditionalGeneration", "ForCausalLM", "LMHeadModel"))
    if vocabulary_head and ("lm_head.weight" in missing or not writes):
        raise ValueError(f"{path_or_id} is a {named} without a vocabulary head and cannot write; take an instruction-"
                         f"tuned checkpoint such as Qwen/Qwen2.5-VL-3B-Instruct, not a reward model")
    surplus = sorted(key for key in info["unexpected_keys"] if vocabulary_head or not key.endswith("lm_head.weight"))
    if surplus or missing:
        raise ValueError(f"{path_or_id} does not fit {named}: missing {missing[:5]}, surplus {surplus[:5]}")
    quicken_vision(model)
    return model.eval()

def class_that_writes(config):
    """transformers' class for such a backbone with its vocabulary head."""
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM

def check_layers(config) -> None:
    """ValueError if the branches of a pack could not be kept apart, or if nobody here knows how its pictures go in."""
    text = config.get_text_config()
    window = ["sliding_attention"] if getattr(text, "sliding_window", None) else ["full_attention"]
    others = sorted(set(getattr(text, "layer_types", None) or window) - {"full_attention"})
    if others:  # a recurrent layer carries one response into the next; a window is counted in places of the row
        raise ValueError(f"{config.model_type} has layers of {', '.join(others)}, branches need full attention in all")
    if hasattr(config, "vision_config") and config.model_type not in FAMILIES:
        raise ValueError(f"the pictures of {config.model_type} cannot be read; those of {', '.join(FAMILIES)} can")

def load_processor(path_or_id, config, max_pixels: int | None = None) -> Processor:
    """Tokenizer, and the image processor if the backbone has eyes (the PIL one: no torchvision). config: of the model.
    max_pixels: of an image. video_step: two frames are a second, Qwen's own way without a frame rate, which Qwen2.5-VL
    counts in units of 1 / tokens_per_second. Qwen2-VL has no such setting and counts moments."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False)
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        if tokenizer.convert_tokens_to_ids(END) in (None, tokenizer.unk_token_id):
            raise ValueError(f"it lacks the token {END}")
        if not (family := family_of(config)).pads:
            return Processor(tokenizer, None)
        if tokenizer.convert_tokens_to_ids(family.pads[0]) != config.image_token_id:
            raise ValueError(f"the token {family.pads[0]} is not the backbone's, {config.image_token_id}")
        image_processor = family.open(path_or_id, config.vision_config, max_pixels)
    except Exception as error:  # as in load
        raise ValueError(f"{path_or_id}: its tokenizer or image processor cannot be used, take those of an instruction-"
                         f"tuned checkpoint of its family: {one_line(error)}") from None
    return Processor(tokenizer, image_processor, getattr(config.vision_config, "tokens_per_second", 1), family)

def from_backbone(path_or_id, head_layers=2, head_activation="silu", max_pixels=None, dtype=torch.float32,
                  paradigm="naive", critique_tokens=512):
    """A plain backbone (folder or hub id) with a fresh head, as a RewardModel. The weights are loaded in fp32 whatever
    the checkpoint holds: at a rate of 3e-6 a bf16 weight would round every update away. paradigm: of `Processor`."""
    lm = load(path_or_id, dtype, vocabulary_head=paradigm != "naive")
    width = lm.config.get_text_config().hidden_size
    config = {"paradigm": paradigm} | ({} if paradigm == "naive" else {"critique_tokens": critique_tokens})
    if paradigm in ("naive", "critic"):
        config |= {"head_layers": head_layers, "head_activation": head_activation, "width": width, "reads": READS}
    return RewardModel(lm, make_head(config), load_processor(path_or_id, lm.config, max_pixels), config)

def make_head(config: dict) -> nn.Sequential | None:
    """The reward head of a reward_config.json; a generative model has none."""
    if config.get("paradigm", "naive") not in PARADIGMS:
        raise ValueError(f"its paradigm is {config['paradigm']!r}, want one of {', '.join(PARADIGMS)}")
    if config.get("paradigm") in ("direct", "think"):
        return None
    return build_head(config["width"], config["head_layers"], config["head_activation"])

def from_pretrained(directory, dtype=torch.float32, paradigm: str | None = None) -> RewardModel:
    """A model saved by save_pretrained. Every weight of the head must be there: a fresh one would score noise.
    paradigm: ValueError if it is of another one."""
    directory = Path(directory)
    file = directory / "reward_config.json"
    if not file.is_file():
        raise ValueError(f"{directory} is not a saved reward model (no reward_config.json); "
                         f"a plain backbone loads with RewardModel.from_backbone")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        head, kind = make_head(config), config.get("paradigm", "naive")
        if head is not None:
            if (reads := config.get("reads", "last_token")) != READS:
                raise ValueError(f"it reads {reads!r} and this code {READS!r}")
            head.load_state_dict(load_file(directory / "head.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{directory}: reward_config.json and head.safetensors do not make the head of this code, its "
                         f"rewards would be noise: {type(error).__name__} {one_line(error)}") from None
    if kind != (paradigm or kind):
        raise ValueError(f"{directory} is a {kind} reward model and was asked for as a {paradigm} one")
    lm = load(directory, dtype, vocabulary_head=kind != "naive")
    return RewardModel(lm, head, load_processor(directory, lm.config), config).eval()

def save_pretrained(model: RewardModel, directory, state_dict: dict | None = None) -> None:
    """Backbone, tokenizer and image processor as transformers saves them; beside them head and reward_config.json.
    `state_dict`: the gathered weights of the model when its own are sharded over ranks."""
    state = state_dict or model.state_dict()
    lm, head = ({name.removeprefix(part): w for name, w in state.items() if name.startswith(part)}
                for part in ("lm.", "head."))
    if model.head is not None and any(head[name].shape != w.shape for name, w in model.head.state_dict().items()):
        raise ValueError("the head's weights were not gathered from the ranks")
    with replacing(directory, last="reward_config.json") as partial:
        model.lm.save_pretrained(partial, state_dict=lm)
        model.lm.config.dtype = next(iter(lm.values())).dtype  # not that of frozen weights without updates
        model.lm.config.save_pretrained(partial)
        if head:
            head = {name: w.detach().float().cpu().contiguous() for name, w in head.items()}
            save_file(head, partial / "head.safetensors")
        save_processor(model.processor, partial)
        (partial / "reward_config.json").write_text(json.dumps(model.config, indent=1) + "\n", encoding="utf-8")

RewardModel.from_backbone, RewardModel.from_pretrained = staticmethod(from_backbone), staticmethod(from_pretrained)
RewardModel.score_many, RewardModel.save_pretrained = score_many, save_pretrained

def save_processor(processor: Processor, folder: Path) -> None:
    processor.tokenizer.save_pretrained(folder)
    if processor.image_processor is not None:
        processor.image_processor.save_pretrained(folder)

# The tiny backbone ----------------------------------------------------------------------------------------------------
CHAT_TEMPLATE = (  # the shape of Qwen's template, for messages whose contents are text
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

def tiny_backbone(directory, texts, seed=0, kind="qwen2_5_vl", width=128, layers=4, vocabulary_head=False):
    """Writes a checkpoint with random weights and a byte-level BPE trained on `texts`, in the hub's layout.

    kind: one of FAMILIES, or the text-only "qwen2" and "qwen3". The same classes as the 7B, 1.7M parameters: whatever
    loads this folder loads Qwen/Qwen2.5-VL-7B-Instruct. Trap: the initial weights must not be small. With transformers'
    default of 0.02, far below 1/sqrt(width), such a model sits at log 2 for many steps. Nor may rope_theta be large:
    with the usual 10,000 the columns of an image of three by three tokens differ by an angle of 0.006, and left is
    right."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", IMAGE_PAD, VIDEO_PAD]
    special += ["<img>", "</img>", "<IMG_CONTEXT>"] * (kind == "internvl")
    chat = ["system\nYou are a helpful assistant.", "\n", "user\n", "assistant\n"] * 100  # become whole tokens
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([*chat, *texts], 512, min_frequency=0, show_progress=False, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()), eos_token=END, pad_token=special[0],
        additional_special_tokens=special[1:2] + special[3:], chat_template=CHAT_TEMPLATE)

    sees = kind in FAMILIES
    rope = {"rope_theta": 20.0, "mrope_section": [width // 32, width // 32 * 3 // 2, width // 32 * 3 // 2]}
    text = dict(vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, max_position_embeddings=8192,
                initializer_range=0.08, bos_token_id=0, pad_token_id=0, eos_token_id=special.index(END),
                rope_parameters={"rope_type": "default"} | (rope if sees else {"rope_theta": 10000.0}))
    # at most 112 pixels square, 4 x 4 image tokens: enough to see coloured shapes, and quick on a CPU
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    if sees:
        vision = dict(depth=2, num_heads=4, initializer_range=0.05, hidden_size=width, intermediate_size=2 * width,
                      out_hidden_size=width)
        vision |= {"qwen2_vl": dict(embed_dim=width, mlp_ratio=2),
                   "qwen2_5_vl": dict(fullatt_block_indexes=[1], tokens_per_second=2),
                   "qwen3_vl": dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
                   "internvl": dict(num_hidden_layers=2, num_attention_heads=4, image_size=112)}[kind]
        names = {"image_token_id": FAMILIES[kind].pads[0], "video_token_id": VIDEO_PAD,
                 "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
        text = dict(text_config=text, vision_config=vision, **{key: special.index(t) for key, t in names.items()})
    if kind == "qwen3_vl":
        text["text_config"]["rope_parameters"]["mrope_interleaved"] = True
        images.patch_size = 16
    if kind == "internvl":
        text["text_config"] |= {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
        images = GotOcr2ImageProcessorPil(size={"height": 112, "width": 112})
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **text)
    model = class_that_writes(config).from_config(config)
    with replacing(directory) as partial:
        (model if vocabulary_head else model.model).save_pretrained(partial)
        save_processor(Processor(tokenizer, images if sees else None), partial)
    return Path(directory)
