"""How a comparison becomes rewards: the heart of BaseReward (arXiv 2509.16127, sections 3 and 4), to be read from top to bottom.

    pixels -> vision tower --+                        +-> response 1 ... <|im_end|> -> head -> r_1
                             +-> prompt tokens -------+-> response 2 ... <|im_end|> -> head -> r_2
                                                      +-> response K ... <|im_end|> -> head -> r_K

A reward model reads a prompt x with its images and a response y, and gives one number r(x, y): higher is better. It learns from pairs
of responses of which people (or a stronger model) preferred one. Here the unit of work is the *comparison*: one prompt and the K
responses to it. The prompt and its images go through the network once, and every response branches off from them.

    1  the comparison          what is compared
    2  images                  opened with care, cut into patches
    3  tokens                  chat template, image tokens, responses: one function for training, evaluation and RL
    4  the pack                several comparisons end to end in one row of tokens, no padding
    5  positions and mask      M-RoPE, and who may look at whom: why branches do not see each other
    6  the reward model        backbone + two-layer SiLU head; load, save, score
    7  the loss                equation (1), and the two regularisers of Algorithm 1
    8  ensembles               several reward models as one (section 4.7)
    9  the plain version       one padded row per response: what the fast path is tested against
    10 the tiny backbone       a Qwen2.5-VL small enough to train while you read this

Letters for sizes: B pairs, K responses of a prompt, R responses in a pack, T tokens, D width of the backbone, N images, P patches,
M models.

Where this differs from the paper. It names neither the token at which the reward is read nor the head's hidden width: we read at the
response's last token, `<|im_end|>`, and use the width of the backbone. Sharing the prompt between responses changes speed, not rewards.
"""
import contextlib
import io
import json
import math
import os
import re
import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

# ---------------------------------------------------------------------------------------------------------------------------------
# 1  The comparison


@dataclass(frozen=True)
class Comparison:
    """One prompt with its images, K responses to it, and which of them were preferred to which.

    >>> c = Comparison("<image>\\nWhat is shown?", ["A bus.", "Two buses."], pairs=[(0, 1)], images=["images/7.png"])
    >>> c.responses[c.pairs[0][0]]                              # the chosen response of the first pair
    'A bus.'
    """
    prompt: str | list  # text with `<image>` marks, or chat messages whose content is such a text or a list of typed parts
    responses: list[str]  # K of them
    pairs: list[tuple[int, int]] = ()  # (winner, loser) indices into `responses`; an ordinary preference pair is [(0, 1)]
    images: list = ()  # one per mark: an image file, its bytes, a PIL image; or a video: a folder of frames or a list of PIL images
    id: str = ""
    source: str = ""  # the data set it comes from
    category: str = ""  # what accuracy is reported by
    answer: str = ""  # a checkable answer, for RL
    critiques: list = ()  # one text per response, where a data set has them


# ---------------------------------------------------------------------------------------------------------------------------------
# 2  Images

MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own warning line: beyond it lies the decompression bomb, a file of kilobytes with 10^9 pixels
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # pixels only: Pillow would hand an EPS to Ghostscript, which runs programs
MAX_ASPECT_RATIO = 200  # beyond it Qwen's image processor refuses
MAX_FRAMES = 32  # of a video, evenly spaced (as MM-RLHF-RewardBench is scored)
FRAME_SHARE = 8  # a frame of a video gets 1/8 of the pixels of an image; with two frames to a token, 32 frames cost what two images do


def open_image(source) -> Image.Image:
    """The RGB image in a file, in a file's bytes, or decoded already; upright. ValueError, one line, if it cannot be trusted."""
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        image = file if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS)
        width, height = image.size  # known from the header: nothing is decoded yet
        if width * height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{width} x {height} pixels is more than {MAX_IMAGE_PIXELS}: a decompression bomb? Shrink the image")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(f"{width} x {height} is narrower than 1:{MAX_ASPECT_RATIO}; crop the image")
        return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"image {source} does not exist; fetch it or remove the row") from None
    except Exception as error:  # a broken file: Pillow has a dozen kinds, SyntaxError, EOFError and struct.error among them
        name = f"of {len(source)} bytes" if isinstance(source, bytes) else source
        raise ValueError(f"image {name} cannot be used: {error}") from None


def frames_of(source, most: int = MAX_FRAMES) -> list:
    """At most so many frames of a video, evenly spaced, first and last kept. A folder's files are taken in the order of their names."""
    frames = source if isinstance(source, (list, tuple)) else sorted(p for p in Path(source).iterdir() if not p.name.startswith("."))
    if not frames:
        raise ValueError(f"video {source} holds no frame")
    n = min(len(frames), most)
    return [frames[round(i * (len(frames) - 1) / max(n - 1, 1))] for i in range(n)]


def open_frames(source, most: int = MAX_FRAMES) -> list[Image.Image]:
    return [open_image(frame) for frame in frames_of(source, most)]


def is_video(source) -> bool:
    return isinstance(source, (list, tuple)) or (isinstance(source, (str, os.PathLike)) and os.path.isdir(source))


def cut_into_patches(source, image_processor) -> tuple[torch.Tensor, list[int]]:
    """Patches (P, channels*2*14*14) of an image or a video, and its grid (t, h, w) with P = t*h*w.

    The processor writes an image twice into each patch, since the vision tower takes two moments at a time. For a video the second
    half of the patch comes from the next frame instead, so that a patch spans two frames; an odd last frame is repeated.
    """
    if not is_video(source):
        out = image_processor(images=[open_image(source)], return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"][0].tolist()
    frames = open_frames(source)
    if len({frame.size for frame in frames}) > 1:
        raise ValueError(f"video {source}: its frames have different sizes {sorted({frame.size for frame in frames})[:3]}")
    least = image_processor.size["shortest_edge"]
    budget = {"shortest_edge": least, "longest_edge": max(least, image_processor.size["longest_edge"] // FRAME_SHARE)}
    out = image_processor(images=frames + frames[-1:] * (len(frames) % 2), size=budget, return_tensors="pt")
    _, h, w = out["image_grid_thw"][0].tolist()
    moments = out["pixel_values"].view(-1, 2, h * w, 3, 2, 14 * 14)  # (t, frame of the two, patch, channel, moment, pixels)
    patches = torch.stack([moments[:, 0, :, :, 0], moments[:, 1, :, :, 1]], dim=3)  # (t, patch, channel, moment, pixels)
    return patches.reshape(-1, 3 * 2 * 14 * 14), [patches.shape[0], h, w]


# ---------------------------------------------------------------------------------------------------------------------------------
# 3  Tokens

MARK = re.compile("<image>|<video>")  # each takes the next entry of `images`; the entry decides which of the two it is
IMAGE_PAD, VIDEO_PAD, END = "<|image_pad|>", "<|video_pad|>", "<|im_end|>"
TOKENIZING = threading.Lock()  # a tokenizer keeps split_special_tokens as a state: without this, threads would split each other's prompts


def to_messages(prompt, images=()) -> list[dict]:
    """Chat messages with plain text contents in which every image is a mark. Images without any mark come first.

    >>> to_messages("What is shown?", images=["7.png"])
    [{'role': 'user', 'content': '<image>What is shown?'}]
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    for message in messages:
        if not isinstance(message.get("content"), str):  # a list of typed parts
            parts = message.get("content") or []
            message["content"] = "".join(p.get("text") or "" if p.get("type") == "text" else "<image>" for p in parts)
    if not messages or messages[-1].get("role") != "user":
        raise ValueError("the prompt must end with a message of the user; what the assistant says last belongs into `responses`")
    marks = sum(len(MARK.findall(m["content"])) for m in messages)
    if marks == 0 and images:
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = "<image>" * len(images) + first["content"]
    elif marks != len(images):
        raise ValueError(f"the prompt has {marks} <image> marks but there are {len(images)} images; one mark for each image")
    return messages


@dataclass
class Encoded:
    """One comparison as tokens and patches: what `pack` lays end to end."""
    prompt_ids: list[int]  # image tokens already expanded: one for every 2 x 2 patches
    response_ids: list[list[int]]  # K lists, each ending with <|im_end|>
    pairs: list[tuple[int, int]]
    pixel_values: torch.Tensor  # (P, channels*2*14*14)
    image_grid_thw: torch.Tensor  # (N, 3)

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)


def encode(comparison: Comparison, tokenizer, image_processor=None) -> Encoded:
    """Tokens of the prompt once, and of each response on its own, so that no token spans the border between them.

    The only place where a prompt is turned into tokens: training, evaluation and RL all come through here. ValueError with one line if
    images and marks do not match, if an image cannot be used, or if there are images and no image processor (a text-only backbone).
    """
    images = list(comparison.images)
    messages = to_messages(comparison.prompt, images)
    if images and image_processor is None:
        raise ValueError(f"the prompt has {len(images)} images but the backbone is text-only; use a Qwen2.5-VL or Qwen2-VL backbone")
    for text in [m["content"] for m in messages] + list(comparison.responses):
        if IMAGE_PAD in text or VIDEO_PAD in text:
            raise ValueError(f"a text holds the special token {IMAGE_PAD} or {VIDEO_PAD}; write <image> in the prompt instead")
    kinds = iter([VIDEO_PAD if is_video(image) else IMAGE_PAD for image in images])
    for message in messages:  # contents are strings by now, so templates of text-only and of vision models treat them alike
        message["content"] = MARK.sub(lambda mark: f"<|vision_start|>{next(kinds)}<|vision_end|>", message["content"])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # ends with "<|im_start|>assistant\n"
    cut = [cut_into_patches(image, image_processor) for image in images]
    counts = iter([math.prod(grid) // image_processor.merge_size**2 for _, grid in cut])
    pads = {tokenizer.convert_tokens_to_ids(IMAGE_PAD), tokenizer.convert_tokens_to_ids(VIDEO_PAD)}
    end = tokenizer.convert_tokens_to_ids(END)
    with TOKENIZING:
        text_ids = tokenizer(text, add_special_tokens=False).input_ids
        # split_special_tokens: a response that *writes* "<|im_end|>" is read as those characters and cannot close its own turn early
        response_ids = [tokenizer(r, add_special_tokens=False, split_special_tokens=True).input_ids + [end] for r in comparison.responses]
    prompt_ids = []
    for token in text_ids:
        prompt_ids += [token] * next(counts) if token in pads else [token]
    return Encoded(prompt_ids, response_ids, [tuple(p) for p in comparison.pairs],
                   torch.cat([patches for patches, _ in cut]) if cut else torch.zeros(0, 3 * 2 * 14 * 14),
                   torch.tensor([grid for _, grid in cut], dtype=torch.long).view(-1, 3))


# ---------------------------------------------------------------------------------------------------------------------------------
# 4  The pack


@dataclass
class Pack:
    """One row of T tokens that holds several comparisons end to end: prompt, response 1, response 2 ..., next prompt, ...

    For two comparisons with prompts of 3 and 2 tokens and two responses each of 2 tokens:

        comparison  0 0 0 0 0 0 0  1 1 1 1 1 1
        branch      0 0 0 1 1 2 2  0 0 1 1 2 2        0 is the prompt, k the k-th response
        last_token          4   6        10  12       where the head reads each response's reward
        pairs       [[0, 1], [2, 3]]                  winner and loser among the R = 4 responses of the pack
    """
    input_ids: torch.Tensor  # (T,)
    comparison: torch.Tensor  # (T,) which comparison a token belongs to
    branch: torch.Tensor  # (T,) 0 for the prompt, k for the k-th response
    last_token: torch.Tensor  # (R,) index of each response's final token: nothing is inferred from padding
    response_length: torch.Tensor  # (R,) tokens of each response, <|im_end|> not counted
    pairs: torch.Tensor  # (B, 2) indices into the R responses
    pixel_values: torch.Tensor  # (P, channels*2*14*14)
    image_grid_thw: torch.Tensor  # (N, 3)

    def to(self, device) -> "Pack":
        return Pack(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


def pack(comparisons, tokenizer=None, image_processor=None) -> Pack:
    """Comparisons (encoded, or as they are with a tokenizer and an image processor) end to end in one row, nothing between them."""
    ids, comparison, branch, last_token, length, pairs, pixels, grids = [], [], [], [], [], [], [], []
    for c, item in enumerate(comparisons):
        item = item if isinstance(item, Encoded) else encode(item, tokenizer, image_processor)
        pairs += [(len(last_token) + winner, len(last_token) + loser) for winner, loser in item.pairs]
        for b, part in enumerate([item.prompt_ids, *item.response_ids]):
            ids += part
            comparison += [c] * len(part)
            branch += [b] * len(part)
            if b > 0:
                last_token.append(len(ids) - 1)
                length.append(len(part) - 1)
        pixels.append(item.pixel_values)
        grids.append(item.image_grid_thw)
    return Pack(torch.tensor(ids), torch.tensor(comparison), torch.tensor(branch), torch.tensor(last_token), torch.tensor(length),
                torch.tensor(pairs, dtype=torch.long).view(-1, 2), torch.cat(pixels), torch.cat(grids))


def fill_packs(sizes: list[int], budget: int) -> list[list[int]]:
    """Indices of the items that share a pack of at most `budget` tokens: the longest first, each into the fullest that has room.

    >>> fill_packs([6, 3, 5, 4], budget=10)
    [[0, 3], [2, 1]]
    """
    packs, room = [], []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [p for p in range(len(packs)) if room[p] >= sizes[i]]
        if fitting:
            p = min(fitting, key=lambda p: room[p])
            packs[p].append(i)
            room[p] -= sizes[i]
        else:
            packs.append([i])
            room.append(budget - sizes[i])
    return packs


# ---------------------------------------------------------------------------------------------------------------------------------
# 5  Positions and mask


def mrope_positions(pack: Pack, image_pad: int, video_pad: int, merge_size: int = 2, video_step: int = 4) -> torch.Tensor:
    """M-RoPE positions (3, T): time, row and column of every token (Qwen2-VL, arXiv 2409.12191, section 2.1).

    A text token has the same number three times and the next text token one more. The tokens of an image stand in a grid: all at one
    time, each at its row and column. What follows goes on at the largest number so far + 1, not at the count of tokens. A picture of
    2 x 3 tokens after two text tokens (numbers 0 and 1), and one text token after it:

        time    0 1  2 2 2 2 2 2  5
        row     0 1  2 2 2 3 3 3  5
        column  0 1  2 3 4 2 3 4  5

    In a video the k-th moment is `video_step * k` later. Every branch restarts where the prompt ended: to the network each response is
    the only one. Trap: current transformers goes on after a *video* at start + max(rows, columns), which overlaps the video's own
    times when it is long; Qwen was trained with largest + 1, and so do we.
    """
    time, row, column = [], [], []
    ids, comparison, branch = pack.input_ids.tolist(), pack.comparison.tolist(), pack.branch.tolist()
    grids = iter(pack.image_grid_thw.tolist())
    after_prompt = start = 0
    while (i := len(time)) < len(ids):
        if i == 0 or comparison[i] != comparison[i - 1]:
            start = 0
        elif branch[i] != branch[i - 1]:
            after_prompt = start if branch[i] == 1 else after_prompt
            start = after_prompt
        if ids[i] not in (image_pad, video_pad):
            time.append(start), row.append(start), column.append(start)
            start += 1
            continue
        t, h, w = next(grids)
        h, w, step = h // merge_size, w // merge_size, video_step if ids[i] == video_pad else 1
        for moment in range(t):
            for y in range(h):
                time += [start + moment * step] * w
                row += [start + y] * w
                column += range(start, start + w)
        start += max((t - 1) * step, h - 1, w - 1) + 1
    return torch.tensor([time, row, column], device=pack.input_ids.device)


def positions_of(pack: Pack, config) -> torch.Tensor:
    """M-RoPE positions (3, T) as a backbone's configuration has them. Qwen2.5-VL counts time in absolute units (tokens_per_second);
    without a frame rate we take one second per two frames, Qwen's own sampling. Qwen2-VL has no such setting and counts moments."""
    return mrope_positions(pack, config.image_token_id, config.video_token_id, config.vision_config.spatial_merge_size,
                           video_step=getattr(config.vision_config, "tokens_per_second", 1))


def branch_mask(comparison: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """(T, T) True where token i may look at token j: same comparison, j not after i, and j in the prompt or in i's own branch.

    >>> branch_mask(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2])).int().tolist()   # one prompt token, two responses of one token
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    place = torch.arange(len(branch), device=branch.device)
    same = comparison[:, None] == comparison[None, :]
    return same & (place[None, :] <= place[:, None]) & ((branch[None, :] == 0) | (branch[None, :] == branch[:, None]))


def branch_blocks(pack: Pack) -> list[tuple[int, int, int, torch.Tensor]]:
    """The same mask without its empty parts: for each comparison where it starts, where its prompt ends, where it ends, and the rows of
    its own branch_mask that belong to its responses. Of a pack of ten comparisons the full table would be nine tenths False."""
    prompts = torch.bincount(pack.comparison[pack.branch == 0]).tolist()
    blocks, start = [], 0
    for size, prompt in zip(torch.bincount(pack.comparison).tolist(), prompts):
        part = slice(start, start + size)
        blocks.append((start, start + prompt, start + size, branch_mask(pack.comparison[part], pack.branch[part])[prompt:]))
        start += size
    return blocks


def attend_in_blocks(module, query, key, value, blocks, scaling=None, **_):
    """Attention of a pack, for transformers' AttentionInterface (which hands over more than is needed here). query (1, heads, T, width of
    a head); key and value have fewer heads. A prompt is plainly causal, a response looks at its prompt and at itself."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    out = []
    for start, middle, end, mask in blocks:
        prompt, responses, whole = slice(start, middle), slice(middle, end), slice(start, end)
        out.append(F.scaled_dot_product_attention(query[:, :, prompt], key[:, :, prompt], value[:, :, prompt], is_causal=True,
                                                  scale=scaling))
        out.append(F.scaled_dot_product_attention(query[:, :, responses], key[:, :, whole], value[:, :, whole], attn_mask=mask,
                                                  scale=scaling))
    return torch.cat(out, dim=2).transpose(1, 2), None  # (1, T, heads, width of a head), no attention weights


AttentionInterface.register("blocks", attend_in_blocks)


def set_attention(backbone, name: str) -> None:
    """"blocks" for packs, "sdpa" for the padded rows that everything else means by a batch. The vision tower always has "sdpa"."""
    backbone.set_attn_implementation({"text_config": name, "vision_config": "sdpa"} if hasattr(backbone, "visual") else name)


@contextlib.contextmanager
def stock_attention(backbone):
    """For padded rows and for `generate`; afterwards the backbone takes packs again."""
    set_attention(backbone, "sdpa")
    try:
        yield
    finally:
        set_attention(backbone, "blocks")


# ---------------------------------------------------------------------------------------------------------------------------------
# 6  The reward model


def hidden_states(backbone, pack: Pack) -> torch.Tensor:
    """Final hidden states (T, D) of a pack. `backbone` is a Qwen2.5-VL, a Qwen2-VL or a text decoder of transformers, without its
    vocabulary head; the policy of rl_demo.py comes through here too.

    The seam for a faster attention: what is put into `mask` below reaches the attention function untouched. On CUDA a FlexAttention
    BlockMask made from the lines of `branch_mask` can stand in its place, with a function registered beside `attend_in_blocks`.
    """
    decoder = getattr(backbone, "language_model", backbone)
    embeds = decoder.get_input_embeddings()(pack.input_ids)  # (T, D)
    if torch.is_autocast_enabled(embeds.device.type):
        embeds = embeds.float()  # what flows between the layers is fp32, also where the weights are bf16: all models compute alike
    mask = {"full_attention": branch_blocks(pack)}
    if not hasattr(backbone, "visual"):  # a text decoder knows one kind of position
        positions = mrope_positions(pack, -1, -1)[:1]  # (1, T)
    else:
        config = backbone.config
        is_vision = (pack.input_ids == config.image_token_id) | (pack.input_ids == config.video_token_id)  # (T,)
        if len(pack.image_grid_thw):
            vision = backbone.visual(pack.pixel_values, grid_thw=pack.image_grid_thw).pooler_output  # (tokens of all images, D)
            embeds = embeds.masked_scatter(is_vision[:, None], vision.to(embeds.dtype))
        elif torch.is_grad_enabled():
            # A rank whose pack holds no image still runs the vision tower, on one blank image and at weight 0: DistributedDataParallel
            # waits for a gradient of every parameter, and a sharded tower for every rank to come and gather it.
            blank = torch.zeros(4, 3 * 2 * 14 * 14, device=embeds.device)
            vision = backbone.visual(blank, grid_thw=torch.tensor([[1, 2, 2]], device=embeds.device)).pooler_output
            embeds = embeds + 0.0 * vision.sum().to(embeds.dtype)
        positions = positions_of(pack, config)[:, None]  # (3, 1, T)
    out = decoder(inputs_embeds=embeds[None], position_ids=positions, attention_mask=mask, use_cache=False)
    return out.last_hidden_state[0]


def recompute_activations(backbone) -> None:
    """Gradient checkpointing: the backward pass computes each layer's activations again. transformers 5.23 renamed the method, and drops
    the old name in version 6."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(backbone, next(name for name in names if hasattr(backbone, name)))({"use_reentrant": False})


ACTIVATIONS = {"silu": nn.SiLU, "tanh": nn.Tanh, "relu": nn.ReLU, "none": nn.Identity}


def build_head(width: int, layers: int = 2, activation: str = "silu") -> nn.Sequential:
    """`layers` linear layers with an activation between them, one number out (Table 2: two layers and SiLU are best).

    Rewards start small, around 0.3 apart, and the loss near log 2, the loss of knowing nothing. Trap: ten times smaller still and the
    backbone gets no gradient to speak of; a model without pretraining then stays at log 2.
    """
    if layers < 1 or activation not in ACTIVATIONS:
        raise ValueError(f"head of {layers} layers with {activation!r}: want at least 1 layer, and one of {', '.join(ACTIVATIONS)}")
    parts = [part for _ in range(layers - 1) for part in (nn.Linear(width, width), ACTIVATIONS[activation]())]
    last = nn.Linear(width, 1)
    nn.init.normal_(last.weight, std=1 / math.sqrt(width))
    nn.init.zeros_(last.bias)
    return nn.Sequential(*parts, last)


class RewardModel(nn.Module):
    """A backbone without its vocabulary, and a small head that turns the last token of a response into its reward."""

    def __init__(self, backbone, head, tokenizer, image_processor, head_config: dict):
        super().__init__()
        self.backbone, self.head, self.head_config = backbone, head, head_config
        self.tokenizer, self.image_processor = tokenizer, image_processor  # image_processor is None for a text-only backbone

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, pack: Pack) -> torch.Tensor:
        """Rewards (R,) in fp32, one for every response of the pack. On CUDA the backbone computes in bf16; its weights stay as loaded."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = hidden_states(self.backbone, pack)  # (T, D)
        with torch.autocast(self.device.type, enabled=False):  # differences of rewards are small: the head and the loss stay in fp32
            return self.head(hidden[pack.last_token].to(self.head[-1].weight.dtype))[:, 0].clone()  # FSDP warns of views

    @torch.no_grad()
    def score(self, prompt, responses, images=()) -> list[float]:
        """Rewards of K responses to one prompt, higher is better; only their differences mean something."""
        comparison = Comparison(prompt, list(responses), images=list(images))
        return self(pack([comparison], self.tokenizer, self.image_processor).to(self.device)).tolist()

    @classmethod
    def from_backbone(cls, path_or_id, head_layers=2, head_activation="silu", max_pixels=None, dtype=torch.float32) -> "RewardModel":
        """A plain Qwen2.5-VL, Qwen2-VL or text-only Qwen2 / Qwen3 checkpoint (folder or hub id) with a fresh head.

        The weights are loaded in fp32 whatever the checkpoint holds: at a rate of 3e-6 a bf16 weight would round every update away.
        """
        backbone = load_backbone(path_or_id, dtype)
        width = getattr(backbone.config, "text_config", backbone.config).hidden_size
        head_config = {"head_layers": head_layers, "head_activation": head_activation, "width": width}
        tokenizer, image_processor = load_processors(path_or_id, backbone, max_pixels)
        return cls(backbone, build_head(width, head_layers, head_activation), tokenizer, image_processor, head_config)

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32) -> "RewardModel":
        """A model saved by `save_pretrained`. Every weight of the head must be there: a fresh one in its place would score noise."""
        directory = Path(directory)
        if not (directory / "reward_config.json").is_file():
            raise ValueError(f"{directory} is not a saved reward model (no reward_config.json); a plain backbone loads with from_backbone")
        head_config = json.loads((directory / "reward_config.json").read_text())
        backbone = load_backbone(directory, dtype)
        head = build_head(head_config["width"], head_config["head_layers"], head_config["head_activation"])
        weights = load_file(directory / "head.safetensors")
        want, have = {k: tuple(v.shape) for k, v in head.state_dict().items()}, {k: tuple(v.shape) for k, v in weights.items()}
        if want != have:
            raise ValueError(f"{directory}/head.safetensors holds {have}, but reward_config.json asks for {want}")
        head.load_state_dict(weights)
        return cls(backbone, head, *load_processors(directory, backbone), head_config).eval()

    def save_pretrained(self, directory, state_dict: dict | None = None) -> None:
        """Backbone, tokenizer and image processor as transformers saves them, the head beside them, `reward_config.json` last.

        Everything is written into a hidden folder first and then moved into place, so an interrupted or failed save leaves no half of
        a model. `state_dict`: the gathered weights of this model when its own are sharded over ranks.
        """
        directory = Path(directory)
        temporary = directory / ".saving"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            state = state_dict or self.state_dict()
            head = {k.removeprefix("head."): v.detach().float().cpu().contiguous() for k, v in state.items() if k.startswith("head.")}
            shapes = [tuple(head[f"{i}.weight"].shape) for i, part in enumerate(self.head) if isinstance(part, nn.Linear)]
            width = self.head_config["width"]
            assert shapes == [(width, width)] * (len(shapes) - 1) + [(1, width)], f"the head was not gathered: {shapes}"
            with quiet():
                self.backbone.save_pretrained(temporary, state_dict={k.removeprefix("backbone."): v for k, v in state.items()
                                                                     if k.startswith("backbone.")})
            save_file(head, temporary / "head.safetensors")
            self.tokenizer.save_pretrained(temporary)
            if self.image_processor is not None:
                self.image_processor.save_pretrained(temporary)
            (temporary / "reward_config.json").write_text(json.dumps(self.head_config, indent=1) + "\n")
            (directory / "reward_config.json").unlink(missing_ok=True)
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == "reward_config.json"):
                os.replace(file, directory / file.name)
        except SafetensorError as error:  # its word for a full disk
            raise OSError(error) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class quiet:
    """Silences transformers' bars and its load report; what it would report is checked here and raised."""

    def __enter__(self):
        self.verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_):
        transformers_logging.set_verbosity(self.verbosity)
        transformers_logging.enable_progress_bar()


def load_backbone(path_or_id, dtype=torch.float32):
    """The model of transformers without its vocabulary head, from safetensors. ValueError names keys that are missing or surplus.

    Both layouts load: the hub's first one (`visual.*`, `model.*`, `lm_head.*`) and that of current transformers.
    """
    with quiet():
        try:
            config = AutoConfig.from_pretrained(path_or_id)
            backbone, info = AutoModel.from_pretrained(path_or_id, config=config, dtype=dtype, attn_implementation="sdpa",
                                                       use_safetensors=True, output_loading_info=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"cannot load a backbone from {path_or_id}: {' '.join(str(error).split())[:400]}") from None
    surplus = [key for key in info["unexpected_keys"] if key != "lm_head.weight"]  # a reward model has no use for the vocabulary
    missing = list(info["missing_keys"])
    if surplus or missing:
        raise ValueError(f"{path_or_id} does not fit {type(backbone).__name__}: "
                         f"missing {sorted(missing)[:5]}, surplus {sorted(surplus)[:5]}")
    layers = set(getattr(getattr(config, "text_config", config), "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        raise ValueError(f"{path_or_id} has layers of kind {sorted(layers)}; the branch mask is defined for full attention only")
    set_attention(backbone, "blocks")
    return backbone.eval()


def load_processors(path_or_id, backbone, max_pixels=None):
    """Tokenizer, and the image processor if the backbone has eyes (the PIL one: no torchvision), with `max_pixels` per image if given."""
    tokenizer = AutoTokenizer.from_pretrained(path_or_id)
    if not tokenizer.chat_template or tokenizer.convert_tokens_to_ids(END) in (None, tokenizer.unk_token_id):
        raise ValueError(f"{path_or_id}: the tokenizer lacks a chat template or the token {END}; take an instruction-tuned Qwen")
    if not hasattr(backbone, "visual"):
        return tokenizer, None
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(path_or_id)
    if max_pixels:
        image_processor.size = {"shortest_edge": min(image_processor.size["shortest_edge"], max_pixels), "longest_edge": max_pixels}
    return tokenizer, image_processor


# ---------------------------------------------------------------------------------------------------------------------------------
# 7  The loss


def pairwise_loss(rewards, pairs, zero_coef=0.0, length_norm=False, response_length=None, pairs_in_step=None) -> torch.Tensor:
    """Equation (1): the mean over pairs of -log sigmoid(r(x, chosen) - r(x, rejected)), in fp32.

    rewards (R,); pairs (B, 2) indices of chosen and rejected. Only differences within a pair matter, so a constant added to all rewards
    changes nothing. The gradient on a pair is the probability of being wrong, sigmoid(-margin): settled pairs stop pulling.

    Algorithm 1 adds two options, which hurt in the paper's ablation (section 4.3) and are off:
    length_norm    r <- r / log(length + 1), with response_length (R,) in tokens, before anything else
    zero_coef      + lambda * mean((r_chosen + r_rejected)^2), which fixes the free constant

    pairs_in_step: divide by this instead of by B where these are some of a step's pairs (micro-steps, ranks): parts add up to the whole.

    >>> round(pairwise_loss(torch.tensor([1.0, 1.0]), torch.tensor([[0, 1]])).item(), 4)          # no opinion: log 2
    0.6931
    """
    rewards = rewards.float()
    if length_norm:
        rewards = rewards / torch.log(response_length.float() + 1)
    chosen, rejected = rewards[pairs[:, 0]], rewards[pairs[:, 1]]
    loss = -F.logsigmoid(chosen - rejected).sum()
    if zero_coef:
        loss = loss + zero_coef * ((chosen + rejected) ** 2).sum()
    return loss / (pairs_in_step or max(len(pairs), 1))


# ---------------------------------------------------------------------------------------------------------------------------------
# 8  Ensembles


def ensemble_weights(margins: torch.Tensor, rule: str) -> torch.Tensor:
    """Weights (M,) that sum to 1, from the margins (M, B) of each member on the same held-out pairs (section 4.7).

    average     every member alike; the paper's best, and it needs no held-out pairs
    accuracy    a member's share of pairs with margin > 0, normalised
    confidence  a member's mean margin, normalised; one that is wrong on average gets 0

    >>> ensemble_weights(torch.tensor([[2.0, 1.0], [1.0, -1.0]]), "accuracy").tolist()         # accuracies 1 and 1/2
    [0.6666666865348816, 0.3333333432674408]
    """
    if rule == "average":
        raw = torch.ones(len(margins))
    elif rule == "accuracy":
        raw = (margins > 0).float().mean(dim=1)
    elif rule == "confidence":
        raw = margins.mean(dim=1).clamp(min=0)
    else:
        raise ValueError(f"ensemble rule {rule!r}: want average, accuracy or confidence")
    if raw.sum() == 0:
        raise ValueError(f"no member is better than chance by the rule {rule!r}: nothing to weigh by")
    return raw / raw.sum()


# ---------------------------------------------------------------------------------------------------------------------------------
# 9  The plain version


def plain_rewards(model: RewardModel, comparisons: list[Encoded]) -> torch.Tensor:
    """Rewards (R,) the stock way: one row [prompt, response] per response, padded on the right, images encoded again for each row.

    What `RewardModel.forward` must equal, and what tests/benchmark.py measures it against. Each row is a comparison with K = 1; the
    mask is the ordinary causal one, and transformers puts the images in place.
    """
    rows = [replace_responses(c, [ids]) for c in comparisons for ids in c.response_ids]
    inputs = padded_rows(rows, model.backbone)
    with stock_attention(model.backbone), torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.backbone(**inputs, use_cache=False).last_hidden_state  # (R, width, D)
    last = inputs["attention_mask"].sum(dim=1) - 1
    return model.head(hidden[torch.arange(len(rows), device=last.device), last].to(model.head[-1].weight.dtype))[:, 0]


def padded_rows(rows: list[Encoded], backbone, on_the_left: bool = False) -> dict[str, torch.Tensor]:
    """What transformers' models take: one padded row for each item, with its prompt and at most one response.

    Trap: transformers works out 3-D positions only when it is also given `mm_token_type_ids`, and falls back to 1-D ones without a
    word; so they are given here, from `mrope_positions`. It takes images and videos apart, where a pack keeps them in order.
    """
    packs = [pack([row]).to(next(backbone.parameters()).device) for row in rows]
    width = max(len(p.input_ids) for p in packs)

    def pad(values):  # (..., tokens of the row) -> (..., width)
        missing = width - values.shape[-1]
        return F.pad(values, (missing, 0) if on_the_left else (0, missing))

    inputs = {"input_ids": torch.stack([pad(p.input_ids) for p in packs]),
              "attention_mask": torch.stack([pad(torch.ones_like(p.input_ids)) for p in packs])}
    if not hasattr(backbone, "visual"):
        return inputs | {"position_ids": torch.stack([pad(mrope_positions(p, -1, -1)[0]) for p in packs])}  # (rows, width)
    config = backbone.config
    for kind, token, suffix in (("image", config.image_token_id, ""), ("video", config.video_token_id, "_videos")):
        grids, pixels = split_by_kind(packs, token, config)
        if grids:
            inputs |= {f"{kind}_grid_thw": torch.stack(grids), f"pixel_values{suffix}": torch.cat(pixels)}
    return inputs | {"position_ids": torch.stack([pad(positions_of(p, config)) for p in packs], dim=1)}  # (3, rows, width)


def replace_responses(comparison: Encoded, response_ids: list[list[int]]) -> Encoded:
    return replace(comparison, response_ids=response_ids, pairs=[])


def split_by_kind(packs: list[Pack], token: int, config) -> tuple[list, list]:
    """Grids and patches of the images, or of the videos, of some packs."""
    grids, pixels = [], []
    for p in packs:
        runs = p.input_ids[(p.input_ids == config.image_token_id) | (p.input_ids == config.video_token_id)]
        sizes = p.image_grid_thw.prod(dim=1)
        place = 0
        for grid, patches in zip(p.image_grid_thw, p.pixel_values.split(sizes.tolist())):
            if runs[place] == token:
                grids.append(grid), pixels.append(patches)
            place += len(patches) // config.vision_config.spatial_merge_size**2
    return grids, pixels


# ---------------------------------------------------------------------------------------------------------------------------------
# 10 The tiny backbone

CHAT_TEMPLATE = (  # the shape of Qwen's template, for messages whose contents are text
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_backbone(directory, texts, seed=0, kind="qwen2_5_vl", vocab_size=512, width=128, vocabulary_head=False) -> Path:
    """Writes a checkpoint with random weights and a byte-level BPE trained on `texts`, in the hub's layout, and returns its folder.

    kind: "qwen2_5_vl", "qwen2_vl", or the text-only "qwen2" and "qwen3". The same classes as the 7B, four layers deep, 1.7M
    parameters: whatever loads this folder loads Qwen/Qwen2.5-VL-7B-Instruct. Trap: the initial weights must not be small. With
    transformers' default of 0.02, far below 1/sqrt(width), such a model sits at log 2 for hundreds of steps. Nor may rope_theta be
    large: with the usual 10,000 the columns of an image of three by three tokens differ by an angle of 0.006, and left is right.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", IMAGE_PAD, VIDEO_PAD]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    chat = ["system\nYou are a helpful assistant.", "\n", "user\n", "assistant\n"] * 100  # the template's own words become whole tokens
    bpe.train_from_iterator([*chat, *texts], trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=special[0], chat_template=CHAT_TEMPLATE,
                                        additional_special_tokens=special[1:2] + special[3:])
    ids = {"eos_token_id": special.index(END), "bos_token_id": 0, "pad_token_id": 0}
    text = dict(vocab_size=vocab_size, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=8192, initializer_range=0.08, **ids,
                rope_parameters={"rope_type": "default", "rope_theta": 20.0, "mrope_section": [width // 32, width // 32 * 3 // 2,
                                                                                                 width // 32 * 3 // 2]})
    vision = dict(depth=2, num_heads=4, initializer_range=0.05)
    marks = dict(image_token_id=special.index(IMAGE_PAD), video_token_id=special.index(VIDEO_PAD),
                 vision_start_token_id=special.index("<|vision_start|>"), vision_end_token_id=special.index("<|vision_end|>"))
    torch.manual_seed(seed)
    if kind == "qwen2_5_vl":
        vision |= dict(hidden_size=width, intermediate_size=2 * width, out_hidden_size=width, fullatt_block_indexes=[1],
                       tokens_per_second=2)
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks))
    elif kind == "qwen2_vl":
        vision |= dict(embed_dim=width, hidden_size=width, mlp_ratio=2)
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **marks))
    else:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
        model = (Qwen2ForCausalLM(Qwen2Config(**text)) if kind == "qwen2" else
                 Qwen3ForCausalLM(Qwen3Config(**text, head_dim=width // 4)))
    directory = Path(directory)
    with quiet():
        (model if vocabulary_head else getattr(model, "model", model)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if kind.endswith("vl"):
        # at most 112 pixels square, 4 x 4 image tokens: enough to see coloured shapes, and quick on a CPU
        Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}).save_pretrained(directory)
    return directory
