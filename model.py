"""How a comparison becomes rewards: the heart of BaseReward (arXiv 2509.16127, sections 3 and 4).

    pixels -> vision tower --+                        +-> response 1 ... <|im_end|> -> head -> r_1
                             +-> prompt tokens -------+-> response 2 ... <|im_end|> -> head -> r_2
                                                      +-> response K ... <|im_end|> -> head -> r_K

A reward model reads a prompt x with its images and a response y, and returns one number r(x, y):
higher is better. It is trained on pairs of responses of which people, or a stronger model,
preferred one. The unit of work is the *comparison*: one prompt and the K responses to it. The
prompt and its images go through the network once, and every response branches off from it.
Rewards and gradients equal those of separate sequences up to rounding; branching saves work.

Read: to the ruled line, 197 minutes. Sections 1 to 8 are the model and its loss; 9 to 11 (files,
generation, the tiny backbone) can wait. `python tests/worked_example.py` prints one comparison with
all its numbers.

Dimensions: B pairs, K responses of a prompt, R responses in a pack, T tokens, D width of the
backbone, N images, P patches.

Where this differs from the paper. The paper names neither the token at which the reward is read
nor the width of the head: we read the response's last token, `<|im_end|>`, and use the width of
the backbone.
"""
import contextlib
import copy
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM,
                          AutoModelForImageTextToText, AutoTokenizer, DynamicCache,
                          PreTrainedTokenizerFast)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (Qwen2VLImageProcessorPil,
                                                                        smart_resize)
from transformers.utils import ModelOutput, find_adapter_config_file
from transformers.utils import logging as transformers_logging

transformers_logging.set_verbosity_error()  # `load_transformer` checks the load report itself
transformers_logging.disable_progress_bar()

# cuDNN compiles a plan for every new shape of an attention call and keeps it for ever. In packs no
# shape ever repeats. Remove this line once cuDNN attention takes variable lengths without new plans
torch.backends.cuda.enable_cudnn_sdp(False)

# 1  The comparison --------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One prompt with its images, K responses to it, and which of them were preferred.

    >>> comparison = Comparison("Name a fruit.", ["Table", "Apple"], pairs=[(1, 0)])
    >>> winner, loser = comparison.pairs[0]
    >>> comparison.responses[winner]
    'Apple'
    """
    prompt: str | list  # text with `<image>` placeholders, or chat messages
    responses: list[str]  # K of them
    pairs: list[tuple[int, int]] = ()  # (winner, loser): indices into `responses`
    images: list = ()  # one for each placeholder: a file, its bytes or a PIL image; or a video
    id: str = ""
    source: str = ""  # the data set it comes from
    category: str = ""  # accuracy is reported by category
    answer: str = ""  # a checkable answer, for RL
    critiques: list[str] = ()  # one for each response, where a data set has them; "" is none

    def __post_init__(self):
        """`images` may also be None or a single image."""
        if not isinstance(self.responses, (list, tuple)):
            raise ValueError(f"the responses are a {type(self.responses).__name__}, want a list of "
                             "texts")
        if self.images is None:
            object.__setattr__(self, "images", [])  # a frozen dataclass refuses self.images = []
        elif not isinstance(self.images, (list, tuple)):
            object.__setattr__(self, "images", [self.images])


# 2  The prompt as chat messages ---------------------------------------------------------

PLACEHOLDER = re.compile("<image>|<video>")  # each one stands for the next entry of `images`
ROLES = ("system", "user", "assistant", "tool")
UNREAD_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning",
               "thinking", "images", "audio")


def to_messages(prompt, images=()) -> list[dict]:
    """Chat messages whose contents are texts in which every image is a placeholder.

    prompt: a text, or a list of messages; a message's content is a text or a list of typed parts.
    Images without any placeholder are put first. This is the one place that decides whether a
    prompt is valid. ValueError says in one line why it is not.

    >>> to_messages("What is shown?", images=["7.png"])
    [{'role': 'user', 'content': '<image>What is shown?'}]
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, (list, tuple)):
        name = type(prompt).__name__
        raise ValueError(f"the prompt is a {name}, want a text or a list of messages")

    messages = []
    for message in prompt:
        messages.append(normalize_message(message))

    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("the prompt must end with a message of the user; what the assistant says "
                         "is the response")
    place_images(messages, len(images))
    return messages


def normalize_message(message) -> dict:
    """{"role", "content"} with the content as one text."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f"a message of the prompt has no role among {', '.join(ROLES)}: "
                         f"{str(message)[:80]}")
    for key in UNREAD_KEYS:  # what a message says beside its content would be lost without a word
        if message.get(key):
            raise ValueError(f"the {message['role']}'s message holds {key}, which is not read: "
                             f"{str(message[key])[:80]}; write it into the content or remove it")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = "".join([message_text(typed_part) for typed_part in content])
    check_text(content, f"the content of the {message['role']}'s message")
    return {"role": message["role"], "content": content}


def message_text(typed_part) -> str:
    """The text of {"type": "text", "text": ...}; a placeholder for an image or a video."""
    part_type = typed_part.get("type") if isinstance(typed_part, dict) else None
    if part_type in ("image", "image_url", "video"):
        return "<image>"
    if part_type != "text" or not isinstance(typed_part.get("text"), str):
        raise ValueError(f"a part of a message cannot be used: {str(typed_part)[:80]}; want a "
                         "text, an image or a video")
    return typed_part["text"]


def place_images(messages: list[dict], num_images: int) -> None:
    """Puts images without any placeholder into the first user message; checks their number."""
    num_placeholders = 0
    for message in messages:
        num_placeholders += len(PLACEHOLDER.findall(message["content"]))

    if num_placeholders == 0 and num_images > 0:
        user_messages = [message for message in messages if message["role"] == "user"]
        first = user_messages[0] if user_messages else messages[-1]
        first["content"] = "<image>" * num_images + first["content"]
    elif num_placeholders != num_images:
        raise ValueError(f"the prompt has {num_placeholders} <image> marks but there are "
                         f"{num_images} images; one mark for each")


def check_text(text, what: str) -> None:
    """ValueError if `text` is no text, or holds half of a surrogate pair: no tokenizer takes it."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is a {type(text).__name__}, want a text")
    surrogate = re.search("[\ud800-\udfff]", text)
    if surrogate:
        raise ValueError(f"{what} holds {surrogate[0]!r} at character {surrogate.start()}, half of "
                         "a character cut apart")


# 3  Images as patches -------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # for an EPS Pillow starts Ghostscript
MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own warning; beyond it a small file may be a bomb
MAX_IMAGE_BYTES = 1 << 29  # no image of so many pixels has a larger file
MAX_ASPECT_RATIO = 200  # beyond it Qwen's image processor refuses


def open_image(source, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """An upright RGB image on a white ground. ValueError, one line, if the source cannot be used.

    source: a path, the bytes of a file, or an image that Pillow has decoded already."""
    name = f"of {len(source)} bytes" if isinstance(source, bytes) else one_line(source)
    try:
        image = open_lazily(source)
        check_size(image, max_pixels)
        image = usual_mode(image)  # 16 bits: appendix B
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow has a dozen kinds, SyntaxError and struct.error among them
        raise ValueError(f"image {name} {explain_image_error(source, error)}") from None


def open_lazily(source) -> Image.Image:
    """The image with its header read and no pixel decoded."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source), formats=FORMATS)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"it is a {type(source).__name__}, want a path, the bytes of a file or a "
                         "PIL image")
    status = os.stat(source)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device would never end
        raise ValueError("it is no file, but a folder, a pipe or a device")
    if status.st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"its file of {status.st_size} bytes is larger than {MAX_IMAGE_BYTES}")
    return Image.open(source, formats=FORMATS)


def check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height == 0:
        raise ValueError(f"{width} x {height} pixels are none")
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than {max_pixels} (a decompression "
                         "bomb?); shrink it")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels are narrower than 1:{MAX_ASPECT_RATIO}; crop "
                         "it")


def to_rgb(image: Image.Image) -> Image.Image:
    """Three channels; what is transparent lies on white, as in transformers.

    Trap: `convert("RGB")` alone shows the colour of clear pixels, which in most files is black."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def patchify(image: Image.Image, image_processor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Cuts an image into square patches: uint8 (P, 3, 1, side * side), and (rows, columns).

    The image is resized so that its height and width are multiples of two patches and its number of
    pixels lies between the processor's bounds. The network later merges 2 x 2 patches into one
    token, so the four patches of a token stand next to each other. The third dimension is the
    frame: a still image has one, although the network reads it twice. Patches travel as bytes, a
    quarter of the size of the floats that `normalize_pixels` makes of them on the device."""
    side = image_processor.patch_size
    height, width = smart_resize(image.height, image.width, factor=2 * side,
                                 min_pixels=image_processor.size["shortest_edge"],
                                 max_pixels=image_processor.size["longest_edge"])
    image = image.resize((width, height), image_processor.resample)
    rows, columns = height // side, width // side

    pixels = torch.from_numpy(np.array(image))  # (height, width, 3) uint8
    # (row of tokens, row in the token, y, column of tokens, column in the token, x, channel)
    pixels = pixels.view(rows // 2, 2, side, columns // 2, 2, side, 3)
    pixels = pixels.permute(0, 3, 1, 4, 6, 2, 5)  # one token after another, channel, y, x
    return pixels.reshape(rows * columns, 3, 1, side * side), (rows, columns)


def normalize_pixels(pixels: torch.Tensor, image_processor) -> torch.Tensor:
    """(n, 3, ...) bytes -> fp32, (x / 255 - mean) / std of each of the three colour channels."""
    scaled = pixels.float() / 255
    channels = []
    for channel in range(3):
        mean = image_processor.image_mean[channel]
        std = image_processor.image_std[channel]
        channels.append((scaled[:, channel] - mean) / std)
    return torch.stack(channels, dim=1)


class ImageInput(NamedTuple):
    """What an image or a video becomes."""
    pixels: torch.Tensor  # uint8, as the family's vision tower takes them
    grids: list[tuple[int, int, int]]  # (time steps, rows, columns) of patches, for each run of
    # tokens. A time step of a video is two frames; a still image is one time step
    text: str  # takes the place of its placeholder; one image token for every 2 x 2 patches


def preprocess_qwen(source, image_processor) -> ImageInput:
    """An image (or a video: appendix B) for Qwen2-VL and Qwen2.5-VL."""
    if is_video(source):
        return preprocess_qwen_video(source, image_processor)
    pixels, (rows, columns) = patchify(open_image(source), image_processor)
    num_tokens = rows * columns // 4
    text = f"<|vision_start|>{IMAGE_TOKEN * num_tokens}<|vision_end|>"
    return ImageInput(pixels, [(1, rows, columns)], text)


def encode_qwen_images(backbone, pixels, grids, image_processor) -> list[torch.Tensor]:
    """Runs the vision tower: [features (image tokens, D)]; of a Qwen3-VL also the deepstack
    features, lists of the same shape, which are added after its first decoder layers.

    The tower takes two frames at a time; a still image is shown to it twice."""
    pixels = normalize_pixels(pixels, image_processor)  # (P, 3, 1 or 2, side * side)
    pixels = pixels.expand(-1, -1, 2, -1).flatten(1)  # (P, 3 * 2 * side * side)
    output = backbone.visual(pixels, grid_thw=grids)
    return [output.pooler_output, *getattr(output, "deepstack_features", ())]


def make_qwen_image_processor(path_or_id, vision_config, max_pixels: int | None):
    """The image processor of a checkpoint, in its Pillow version, which needs no torchvision."""
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(path_or_id)
    if (image_processor.merge_size, image_processor.patch_size) != (2, vision_config.patch_size):
        raise ValueError(f"its patches are not the {vision_config.patch_size} pixels of the "
                         "backbone, 2 x 2 to a token")
    size = dict(image_processor.size)  # the oldest files have other names in it
    smallest = size.get("shortest_edge") or size.get("min_pixels")
    largest = max_pixels or size.get("longest_edge") or size.get("max_pixels")
    if not smallest or not largest:
        raise ValueError(f"its size {size} does not bound the pixels of an image")
    image_processor.size = {"shortest_edge": min(smallest, largest), "longest_edge": largest}
    return image_processor


@dataclass(frozen=True)
class Family:
    """What a family of backbones does in its own way. Without any of it: a text-only backbone."""
    image_tokens: tuple[str, ...] = ()  # placeholder tokens; [0] is that of a still image
    make_image_processor: Callable | None = None  # (path_or_id, vision config, max_pixels)
    preprocess_image: Callable | None = None  # (source, image processor) -> ImageInput
    encode_images: Callable | None = None  # (backbone, pixels, grids, image processor) -> features
    dummy_pixels: tuple[int, ...] = ()  # shape of the pixels of one image token
    placeholder: re.Pattern = PLACEHOLDER  # where the text of an image goes


IMAGE_TOKEN, VIDEO_TOKEN, END_OF_TURN = "<|image_pad|>", "<|video_pad|>", "<|im_end|>"
QWEN2_5 = Family(image_tokens=(IMAGE_TOKEN, VIDEO_TOKEN),
                 make_image_processor=make_qwen_image_processor,
                 preprocess_image=preprocess_qwen,
                 encode_images=encode_qwen_images,
                 dummy_pixels=(4, 3, 1, 14 * 14))


# 4  Tokens ------------------------------------------------------------------------------

# the "<" of <|any name|>, <img>, </img> and <IMG_CONTEXT>
SPECIAL_TOKEN_START = re.compile(r"<(?=\|\w+\|>|/?img>|IMG_CONTEXT>)")


@dataclass(frozen=True)
class Processor:
    """What turns a comparison into tokens and patches; it lies beside a backbone in its folder."""
    tokenizer: PreTrainedTokenizerFast
    image_processor: object = None  # None: the backbone is text-only
    family: Family = Family()
    # `embed` puts image features in the places of these tokens; a policy may never write one
    image_token_ids: tuple[int, ...] = ()
    video_step: int = 1  # M-RoPE time between two time steps of a video

    def token_id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    @property
    def end_id(self) -> int:
        """The id of <|im_end|>, with which every response ends."""
        return self.token_id(END_OF_TURN)


@dataclass
class Encoded:
    """One comparison as tokens and patches."""
    prompt_ids: list[int]
    response_ids: list[list[int]]  # K lists, each ending with <|im_end|>
    pairs: list[tuple[int, int]]
    pixel_values: torch.Tensor  # uint8 (P, 3, frames, side * side); without an image (0,)
    image_grid_thw: torch.Tensor  # (N, 3) time steps, rows and columns of patches
    prompt_positions: torch.Tensor  # (3, tokens of the prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)

    def with_responses(self, response_ids: list[list[int]]) -> "Encoded":
        """The same prompt with other responses, of which no pair is known."""
        return Encoded(self.prompt_ids, response_ids, [], self.pixel_values, self.image_grid_thw,
                       self.prompt_positions)


def encode(comparison: Comparison, processor: Processor, image_inputs=None) -> Encoded:
    """Tokenizes the prompt once and each response by itself: no token spans their border.

    image_inputs: what `preprocess_images` made of the images, if that is known already.
    ValueError, one line: placeholders and images do not match, an image cannot be used, or the
    backbone is text-only."""
    messages = to_messages(comparison.prompt, comparison.images)
    if image_inputs is None:
        image_inputs = preprocess_images(comparison.images, processor)

    texts_of_images = [image.text for image in image_inputs]
    for message in messages:
        text = escape_special_tokens(message["content"])
        message["content"] = fill_placeholders(text, processor.family.placeholder, texts_of_images)

    texts = [render_prompt(messages, processor.tokenizer)]
    for response in comparison.responses:
        check_text(response, "a response")
        texts.append(escape_special_tokens(response))
    # one call for all texts: a call costs as much as a hundred words
    prompt_ids, *response_ids = processor.tokenizer(texts, add_special_tokens=False).input_ids

    grids = []
    for image in image_inputs:
        grids += image.grids
    positions = mrope_positions(prompt_ids, grids, processor.token_id(IMAGE_TOKEN),
                                processor.token_id(VIDEO_TOKEN), processor.video_step)
    return Encoded(
        prompt_ids=prompt_ids,
        response_ids=[[*ids, processor.end_id] for ids in response_ids],
        pairs=[tuple(pair) for pair in comparison.pairs],
        pixel_values=join_pixels([image.pixels for image in image_inputs]),
        image_grid_thw=torch.tensor(grids, dtype=torch.long).view(-1, 3),
        prompt_positions=positions)


def render_prompt(messages: list[dict], tokenizer) -> str:
    """The prompt as one text, which ends where the assistant's turn begins.

    Trap: the templates of thinking models begin it with an open <think>, and every response would
    be a thought. It is closed here, as such a model does when it answers without thinking."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of unknown origin
        raise ValueError(f"the chat template refuses the prompt: {one_line(error)}") from None
    if text.rstrip().endswith("<think>"):
        text = text.rstrip() + "\n\n</think>\n\n"
    return text


def preprocess_images(images, processor: Processor) -> list[ImageInput]:
    """Reads and cuts the images of a prompt."""
    if len(images) > 0 and processor.image_processor is None:
        raise ValueError(f"the prompt has {len(images)} images but the backbone is text-only")
    image_inputs = []
    for source in images:
        image_inputs.append(processor.family.preprocess_image(source, processor.image_processor))
    return image_inputs


def escape_special_tokens(text: str) -> str:
    """A text in which nothing is a special token: "<|im_end|>" becomes "< |im_end|>", and so can
    neither end its turn nor begin another one."""
    return SPECIAL_TOKEN_START.sub("< ", text)


def fill_placeholders(text: str, placeholder: re.Pattern, texts_of_images: list[str]) -> str:
    """Puts each image's tokens in the place of its placeholder; takes them off the list."""
    first, *others = placeholder.split(text)
    filled = first
    for text_after in others:
        filled += texts_of_images.pop(0) + text_after
    return filled


def join_pixels(pixels_of_images: list[torch.Tensor]) -> torch.Tensor:
    """Concatenates the pixels of several images. Beside a video, still images get two frames."""
    pixels_of_images = [pixels for pixels in pixels_of_images if len(pixels) > 0]
    if not pixels_of_images:
        return torch.zeros(0, dtype=torch.uint8)
    num_frames = max(pixels.shape[2] for pixels in pixels_of_images)
    return torch.cat([pixels.expand(-1, -1, num_frames, -1) for pixels in pixels_of_images])


def mrope_positions(ids: list[int], grids: list, image_token_id: int, video_token_id: int,
                    video_step: int = 1) -> torch.Tensor:
    """M-RoPE positions (3, tokens): time, row and column of every token of a prompt
    (arXiv 2409.12191, section 2.1).

    A text token has the same number three times, and the next text token one more. The tokens of an
    image stand in a grid: all at one time, each at its row and column. The text after it goes on
    at the largest number so far + 1, not at the count of tokens. Two text tokens, an image of 2 x 3
    tokens, one text token:

        time    0 1  2 2 2 2 2 2  5
        row     0 1  2 2 2 3 3 3  5
        column  0 1  2 3 4 2 3 4  5

    A video has one such grid for every two frames, each `video_step` later than the one before.
    Trap: transformers from 5.3 on continues after a *video* at start + max(rows, columns), which
    overlaps the times of a long one; Qwen was trained with the largest + 1."""
    pieces = []
    next_grid = 0
    next_position = 0
    index = 0
    while index < len(ids):
        if ids[index] in (image_token_id, video_token_id):  # InternVL's token counts as text
            time_steps, rows, columns = grids[next_grid]
            next_grid += 1
            step = video_step if ids[index] == video_token_id else 1
            piece = torch.cartesian_prod(torch.arange(time_steps) * step,
                                         torch.arange(rows // 2),  # 2 x 2 patches are a token
                                         torch.arange(columns // 2)).T
        else:
            end = index
            while end < len(ids) and ids[end] not in (image_token_id, video_token_id):
                end += 1
            piece = torch.arange(end - index).expand(3, -1)
        pieces.append(next_position + piece)
        next_position += int(piece.max()) + 1
        index += piece.shape[1]
    return torch.cat(pieces, dim=1)


# 5  The pack ----------------------------------------------------------------------------

MAX_MASKED_TOKENS = 256  # a shorter comparison takes one attention call with a mask, which is then
# faster; a longer one takes a call for each branch


class Block(NamedTuple):
    """The tokens of one comparison in a pack, for its attention."""
    lengths: list[int]  # number of tokens of the prompt, response 1, response 2 ...
    mask: torch.Tensor | None  # branch_mask; None for a comparison of more than MAX_MASKED_TOKENS


@dataclass(kw_only=True)
class Pack:
    """One row of T tokens that holds several comparisons end to end: prompt, response 1,
    response 2 ..., next prompt. There is no padding.

    For two comparisons with prompts of 3 and 2 tokens and two responses each of 2 tokens:

        comparison     0 0 0 0 0 0 0  1 1 1 1 1 1
        branch         0 0 0 1 1 2 2  0 0 1 1 2 2    0 is the prompt, k the k-th response
        positions      0 1 2 3 4 3 4  0 1 2 3 2 3    every branch restarts where the prompt ended:
                                                     to the network each response is the only one
        last_token             4   6      10  12     where the head reads each response's reward
        pairs          [[0, 1], [2, 3]]              (winner, loser) among the R = 4 responses"""
    input_ids: torch.Tensor  # (T,)
    comparison: torch.Tensor  # (T,) which comparison a token belongs to
    branch: torch.Tensor  # (T,)
    positions: torch.Tensor  # (3, T)
    last_token: torch.Tensor  # (R,) index of each response's final token
    response_length: torch.Tensor  # (R,) tokens of each response, its final <|im_end|> not counted
    pairs: torch.Tensor  # (B, 2) indices into the R responses
    pixel_values: torch.Tensor  # uint8 (P, 3, frames, side * side)
    image_grid_thw: torch.Tensor  # (N, 3)
    blocks: list[Block]  # one for each comparison
    num_lm_targets: int = 0  # texts to learn: only in packs of critics and thinking judges

    def to(self, device) -> "Pack":
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device)
        blocks = []
        for lengths, mask in self.blocks:
            blocks.append(Block(lengths, None if mask is None else mask.to(device)))
        return replace(self, **moved, blocks=blocks)


def pack(comparisons: list, processor: Processor | None = None) -> Pack:
    """Lays comparisons end to end: Encoded ones, or others with a processor to encode them."""
    packs = []
    first_token = 0
    first_response = 0
    for index, item in enumerate(comparisons):
        if isinstance(item, Comparison):
            item = encode(item, processor)
        single = pack_one(item)
        single.comparison += index
        single.last_token += first_token
        single.pairs += first_response
        first_token += len(single.input_ids)
        first_response += len(single.last_token)
        packs.append(single)

    return Pack(
        input_ids=torch.cat([single.input_ids for single in packs]),
        comparison=torch.cat([single.comparison for single in packs]),
        branch=torch.cat([single.branch for single in packs]),
        positions=torch.cat([single.positions for single in packs], dim=1),
        last_token=torch.cat([single.last_token for single in packs]),
        response_length=torch.cat([single.response_length for single in packs]),
        pairs=torch.cat([single.pairs for single in packs]),
        pixel_values=join_pixels([single.pixel_values for single in packs]),
        image_grid_thw=torch.cat([single.image_grid_thw for single in packs]),
        blocks=[single.blocks[0] for single in packs])


def pack_one(item: Encoded) -> Pack:
    """The pack of a single comparison."""
    input_ids = list(item.prompt_ids)
    positions = [item.prompt_positions]
    lengths = [len(item.prompt_ids)]
    restart = int(item.prompt_positions.max()) + 1
    for ids in item.response_ids:
        input_ids += ids
        positions.append(torch.arange(restart, restart + len(ids)).expand(3, -1))
        lengths.append(len(ids))

    branch_lengths = torch.tensor(lengths)  # (1 + K,)
    branch = torch.arange(len(lengths)).repeat_interleave(branch_lengths)  # (T,)
    end_of_branch = branch_lengths.cumsum(dim=0)
    mask = branch_mask(branch) if len(input_ids) <= MAX_MASKED_TOKENS else None
    return Pack(
        input_ids=torch.tensor(input_ids),
        comparison=torch.zeros_like(branch),
        branch=branch,
        positions=torch.cat(positions, dim=1),
        last_token=end_of_branch[1:] - 1,
        response_length=branch_lengths[1:] - 1,
        pairs=torch.tensor(item.pairs, dtype=torch.long).view(-1, 2),
        pixel_values=item.pixel_values,
        image_grid_thw=item.image_grid_thw,
        blocks=[Block(lengths, mask)])


def branch_mask(branch: torch.Tensor) -> torch.Tensor:
    """(n, n) for the n tokens of one comparison: True where token i may attend to token j.

    j must not come after i, and must be in the prompt (branch 0) or in i's own branch.

    >>> branch_mask(torch.tensor([0, 1, 2])).int().tolist()  # a prompt token, two responses of one
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    index = torch.arange(len(branch), device=branch.device)
    not_later = index[None, :] <= index[:, None]
    in_prompt = branch[None, :] == 0
    same_branch = branch[None, :] == branch[:, None]
    return not_later & (in_prompt | same_branch)


def bin_pack(token_counts: list[int], budget: int) -> list[list[int]]:
    """Indices of the items that share a pack of at most `budget` tokens: longest first, each into
    the fullest pack that has room. An item longer than the budget is a pack of its own.

    >>> bin_pack([6, 3, 5, 4], budget=10)
    [[0, 3], [2, 1]]
    """
    packs = []
    room = []  # tokens left in each pack
    longest_first = sorted(range(len(token_counts)), key=lambda index: -token_counts[index])
    for index in longest_first:
        fullest = None
        for candidate in range(len(packs)):
            fits = room[candidate] >= token_counts[index]
            if fits and (fullest is None or room[candidate] < room[fullest]):
                fullest = candidate
        if fullest is None:
            packs.append([])
            room.append(budget)
            fullest = len(packs) - 1
        packs[fullest].append(index)
        room[fullest] -= token_counts[index]
    return packs


# 6  Hidden states -----------------------------------------------------------------------


def embed(backbone, processor: Processor, pack: Pack) -> tuple[torch.Tensor, dict]:
    """Token embeddings (T, D) with the vision tower's features in the places of the image tokens,
    and options for `run_decoder`: the deepstack features of a Qwen3-VL."""
    family = processor.family
    embeddings = backbone.get_input_embeddings()(pack.input_ids)  # (T, D)
    if torch.is_autocast_enabled(embeddings.device.type):
        # the residual stream is fp32, also where the weights are bf16
        embeddings = embeddings.float()
    if not family.image_tokens:
        return embeddings, {}

    pixels, grids = pack.pixel_values, pack.image_grid_thw
    if len(grids) == 0:
        # The vision tower runs on every rank, here on a dummy image whose features are used
        # nowhere: DDP waits for a gradient of every parameter, even a zero one, and a sharded tower
        # waits for every rank to gather its weights.
        pixels = torch.zeros(family.dummy_pixels, dtype=torch.uint8, device=pack.input_ids.device)
        grids = pack.input_ids.new_tensor([[1, 2, 2]])
    features, *deepstack = family.encode_images(backbone, pixels, grids, processor.image_processor)

    is_image = torch.zeros_like(pack.input_ids, dtype=torch.bool)  # (T,)
    for token_id in processor.image_token_ids:
        is_image |= pack.input_ids == token_id
    # of a dummy image nothing is copied: its gradient is 0
    embeddings = embeddings.masked_scatter(is_image[:, None], features.to(embeddings.dtype))
    if not deepstack:
        return embeddings, {}
    return embeddings, {"visual_pos_masks": is_image[None], "deepstack_visual_embeds": deepstack}


def run_decoder(backbone, embeddings: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor,
                **options):
    """The decoder's output for embeddings (rows, tokens, D) at positions (3, rows, tokens).

    Positions are always given: without them transformers counts 1-D ones, silently. The decoders of
    text-only backbones and of InternVL know one dimension."""
    decoder = getattr(backbone, "language_model", backbone)
    if not hasattr(backbone, "visual"):
        positions = positions[0]
    return decoder(inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, **options)


def hidden_states(backbone, processor: Processor, pack: Pack) -> torch.Tensor:
    """Final hidden states (T, D) of a pack."""
    embeddings, options = embed(backbone, processor, pack)  # (T, D)
    if has_full_attention(backbone.config):
        return run_branches(backbone, embeddings, options, pack)
    return run_rows(backbone, embeddings, options, pack)  # --backbone tiny-qwen3-5: appendix A


def has_full_attention(config) -> bool:
    """Whether all layers of the decoder have full attention, as branches need. A recurrent layer
    would carry one response into the next, and a sliding window counts places of the pack."""
    text_config = config.get_text_config()
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is None:
        return getattr(text_config, "sliding_window", None) is None
    return all(layer_type == "full_attention" for layer_type in layer_types)


def run_branches(backbone, embeddings: torch.Tensor, options: dict, pack: Pack) -> torch.Tensor:
    """The whole pack as one row. `branch_attention` takes the place of transformers' own attention;
    `blocks` reaches it through the layers as an unknown keyword."""
    # transformers builds no mask where it gets a 4-D one, and branch_attention ignores this one
    no_mask = torch.zeros(1, 1, 1, 1, device=embeddings.device)
    output = run_decoder(backbone, embeddings[None], pack.positions[:, None], no_mask,
                         blocks=pack.blocks, use_cache=False, **options)
    return output.last_hidden_state[0]


def branch_attention(module, query, key, value, attention_mask=None, blocks=None, scaling=None,
                     **options):
    """Attention of a pack: query (1, heads, T, head width); key and value may have fewer heads.

    Each comparison attends to itself alone, so nothing is computed between comparisons. Without
    blocks (the vision tower, `generate`) this is transformers' own "sdpa"."""
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      **options)
    query = query.to(value.dtype)  # after RoPE fp32; autocast does not cast for causal_lower_right
    key = key.to(value.dtype)
    queries_per_key = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(queries_per_key, dim=1)
    value = value.repeat_interleave(queries_per_key, dim=1)

    # `split` and not slices: the backward pass of a slice fills a tensor of the whole pack
    block_lengths = [sum(lengths) for lengths, _ in blocks]
    queries = query.split(block_lengths, dim=2)
    keys = key.split(block_lengths, dim=2)
    values = value.split(block_lengths, dim=2)
    outputs = []
    for block, q, k, v in zip(blocks, queries, keys, values):
        if block.mask is not None:
            outputs.append(F.scaled_dot_product_attention(q, k, v, block.mask, scale=scaling))
        else:
            outputs += attend_by_branch(block.lengths, q, k, v, scaling)
    output = torch.cat(outputs, dim=2).transpose(1, 2)  # (1, T, heads, head width)
    return output, None  # no attention weights


def attend_by_branch(lengths: list[int], query, key, value, scaling) -> list[torch.Tensor]:
    """Attention of one long comparison without work that a mask would throw away.

    The prompt and its first response are an ordinary causal row. Every other response is the end of
    a causal row that begins with the prompt."""
    prompt_length = lengths[0]
    first_length = lengths[1] if len(lengths) > 1 else 0
    piece_lengths = [prompt_length + first_length, *lengths[2:]]
    queries = query.split(piece_lengths, dim=2)
    keys = key.split(piece_lengths, dim=2)
    values = value.split(piece_lengths, dim=2)

    outputs = [F.scaled_dot_product_attention(queries[0], keys[0], values[0], is_causal=True,
                                              scale=scaling)]
    prompt_key = keys[0][:, :, :prompt_length]
    prompt_value = values[0][:, :, :prompt_length]
    for q, k, v in zip(queries[1:], keys[1:], values[1:]):
        k = torch.cat([prompt_key, k], dim=2)
        v = torch.cat([prompt_value, v], dim=2)
        mask = causal_lower_right(q.shape[2], k.shape[2])
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scaling))
    return outputs


# Trap: without a mask function of this name transformers makes no mask for padded rows, silently
AttentionInterface.register("branches", branch_attention)
AttentionMaskInterface.register("branches", sdpa_mask)


# 7  The reward model --------------------------------------------------------------------

POOLING = "last_token"  # in reward_config.json: a model with another pooling is refused
ACTIVATIONS = {"silu": nn.SiLU, "tanh": nn.Tanh, "relu": nn.ReLU, "none": nn.Identity}


def pool_responses(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """What the head reads, (R, D): the hidden state of each response's last token, <|im_end|>. It
    has seen the prompt, the images and the whole response. To read something else, change this
    function and POOLING."""
    return hidden[pack.last_token]


def build_head(width: int, layers: int = 2, activation: str = "silu") -> nn.Sequential:
    """`layers` linear layers with an activation between them and one output (Table 2: two layers
    and SiLU are best).

    Rewards start around 0.3 apart, so the loss starts near log 2, that of a coin. Trap: with a
    tenth of this std hardly any gradient reaches the backbone. A backbone without pretraining then
    stays at log 2."""
    if layers < 1 or activation not in ACTIVATIONS:
        raise ValueError(f"head of {layers} layers with {activation!r}: want 1 or more, and one of "
                         f"{list(ACTIVATIONS)}")
    modules = []
    for _ in range(layers - 1):
        modules.append(nn.Linear(width, width))
        modules.append(ACTIVATIONS[activation]())
    last = nn.Linear(width, 1)
    nn.init.normal_(last.weight, std=1 / math.sqrt(width))
    nn.init.zeros_(last.bias)
    return nn.Sequential(*modules, last)


@dataclass
class RewardOutput(ModelOutput):
    """What a forward pass returns (a ModelOutput, since FSDP finds the tensors in it)."""
    rewards: torch.Tensor = None  # (R,) fp32
    lm_loss: torch.Tensor | None = None  # () of critics and thinking judges: cross entropy of their
    # texts, for each a mean over its tokens, summed over the texts


@dataclass
class ScoringRequest:
    """A comparison to score, encoded."""
    comparison: Comparison
    encoded: list[Encoded]  # one; of a judge two for each pair


@dataclass
class Score:
    """The scores of a comparison with K responses and B pairs."""
    rewards: list[float]  # K of them
    verdicts: list = ()  # judges: for each pair the margins in both orders, (B, 2)
    texts: list[str] = ()  # critics: K critiques; thinking judges: 2 B texts


class RewardModel(nn.Module):
    """A backbone without its vocabulary head, and a small head that maps the end of a response to
    its reward: the paper's naive paradigm, its choice. Appendix C has the other paradigms of
    Table 1, Critic and Judge, which override the methods marked below."""
    reward_head = True  # a Judge has none
    vocabulary_head = False  # a Critic and a Judge have one

    def __init__(self, transformer, head: nn.Sequential | None, processor: Processor, config: dict):
        super().__init__()
        self.backbone = transformer
        self.head = head
        self.processor = processor
        self.config = config  # what reward_config.json holds

    @property
    def paradigm(self) -> str:
        return self.config.get("paradigm", "naive")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, pack: Pack) -> RewardOutput:
        """On CUDA the backbone computes in bf16; weights stay as they were loaded."""
        with autocast(self.device):
            hidden = hidden_states(self.backbone, self.processor, pack)  # (T, D)
        return RewardOutput(rewards=self.read_rewards(hidden, pack))

    def read_rewards(self, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        """(T, D) -> (R,) in fp32: differences between rewards are small."""
        with torch.autocast(self.device.type, enabled=False):
            pooled = pool_responses(hidden, pack)  # (R, D)
            pooled = pooled.to(self.head[-1].weight.dtype)
            rewards = self.head(pooled)  # (R, 1)
            return rewards[:, 0].clone()  # FSDP warns of a view

    # Scoring: encode, pack, forward

    def score(self, prompt, responses, images=()) -> list[float]:
        """Rewards of K responses to one prompt. Only their differences have a meaning.

        prompt: a text or chat messages. images: a list, a single one, or None."""
        return self.score_many([(prompt, responses, images)])[0]

    def score_many(self, comparisons, pack_tokens: int | None = None) -> list[list[float]]:
        """K rewards for each comparison, which may also be a tuple (prompt, responses) or (prompt,
        responses, images). 64 are encoded at a time: memory does not grow with their number.
        pack_tokens: see compute_rewards."""
        comparisons = to_comparisons(comparisons)
        rewards = []
        for start in range(0, len(comparisons), 64):
            requests = []
            for comparison in comparisons[start:start + 64]:
                requests.append(self.encode_for_scoring(comparison))
            for score in self.score_encoded(requests, pack_tokens):
                rewards.append(score.rewards)
        return rewards

    @torch.no_grad()
    def compute_rewards(self, encoded: list[Encoded], pack_tokens: int | None = None,
                        max_over_ranks: Callable | None = None) -> list[list[float]]:
        """The rewards of each item's responses; identical responses get the first one's.

        Trap: in two branches of a pack they get rewards that differ in the last digit, and what
        should be a tie has a winner.

        pack_tokens: the budget of a pack; see default_pack_tokens.
        max_over_ranks: function that returns the maximum of a number over the ranks. A sharded
        model gathers its layers from all ranks, so all must make equally many forwards; a rank with
        fewer packs runs a dummy."""
        if pack_tokens is None:
            pack_tokens = default_pack_tokens(self.device)
        packs = bin_pack([item.num_tokens for item in encoded], pack_tokens)
        num_forwards = len(packs)
        if max_over_ranks is not None:  # before the first forward: no rank waits in two places
            num_forwards = max_over_ranks(len(packs))

        rewards = [[] for _ in encoded]
        for members in packs:
            batch = self.make_pack([encoded[member] for member in members])
            values = self(batch.to(self.device)).rewards.tolist()
            for member in members:
                response_ids = encoded[member].response_ids
                rewards[member] = [values[index] for index in first_equal(response_ids)]
                values = values[len(response_ids):]

        for _ in range(num_forwards - len(packs)):
            dummy = encode(Comparison("?", ["a"]), self.processor)
            self(self.make_pack([dummy]).to(self.device))
        return rewards

    # What a critic or a judge does in its own way (appendix C)

    def encode_for_training(self, comparison: Comparison, rng: random.Random) -> list[Encoded]:
        """rng: draws the order in which a judge is shown two responses."""
        return [encode(comparison, self.processor)]

    def encode_for_scoring(self, comparison: Comparison) -> ScoringRequest:
        return ScoringRequest(comparison, [encode(comparison, self.processor)])

    def make_pack(self, encoded: list[Encoded]) -> Pack:
        return pack(encoded)

    def score_encoded(self, requests: list[ScoringRequest], pack_tokens: int | None = None,
                      max_over_ranks: Callable | None = None) -> list[Score]:
        encoded = [request.encoded[0] for request in requests]
        rewards = self.compute_rewards(encoded, pack_tokens, max_over_ranks)
        return [Score(rewards_of_comparison) for rewards_of_comparison in rewards]

    def save_backbone(self, folder: Path, state_dict: dict) -> None:
        """state_dict: the weights of this model by name."""
        save_transformer(self.backbone, folder, select_prefix(state_dict, "backbone."))

    # Load and save

    @staticmethod
    def from_backbone(path_or_id, head_layers=2, head_activation="silu", max_pixels=None,
                      dtype=torch.float32, paradigm="naive", critique_tokens=512) -> "RewardModel":
        """A plain backbone (a folder or a hub id) with a fresh head.

        Weights are loaded in fp32 whatever the checkpoint holds: at a learning rate of 3e-6 a bf16
        weight would round every update away."""
        model_class = PARADIGMS[paradigm]
        transformer, processor = load_backbone(path_or_id, dtype, model_class.vocabulary_head,
                                               max_pixels)
        config = {"paradigm": paradigm}
        if model_class.vocabulary_head:
            config["critique_tokens"] = critique_tokens
        if model_class.reward_head:
            config["head_layers"] = head_layers
            config["head_activation"] = head_activation
            config["width"] = transformer.config.get_text_config().hidden_size
            config["reads"] = POOLING
        head = make_head(config) if model_class.reward_head else None
        return model_class(transformer, head, processor, config)

    @staticmethod
    def from_pretrained(directory, dtype=torch.float32, paradigm: str | None = None):
        """A model saved by save_pretrained. ValueError if a weight of the head is missing (a fresh
        one would score noise), or if the model is of another paradigm than the one asked for."""
        directory = Path(directory)
        config_file = directory / "reward_config.json"
        if not config_file.is_file():
            missing = "no reward_config.json" if directory.is_dir() else "no such folder"
            raise ValueError(f"{directory} is not a saved reward model ({missing}); a plain "
                             "backbone loads with RewardModel.from_backbone")
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            saved_paradigm = config.get("paradigm", "naive")
            if saved_paradigm not in PARADIGMS:
                raise ValueError(f"its paradigm is {saved_paradigm!r}, want one of "
                                 f"{', '.join(PARADIGMS)}")
            model_class = PARADIGMS[saved_paradigm]
            head = None
            if model_class.reward_head:
                check_pooling(config)
                head = make_head(config)
                head.load_state_dict(load_file(directory / "head.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
                SafetensorError) as error:
            raise ValueError(
                f"{directory}: reward_config.json and head.safetensors do not make the head of "
                f"this code, its rewards would be noise: {type(error).__name__} {one_line(error)}"
            ) from None
        if paradigm is not None and paradigm != saved_paradigm:
            raise ValueError(f"{directory} is a {saved_paradigm} reward model and was asked for as "
                             f"a {paradigm} one")
        transformer, processor = load_backbone(directory, dtype, model_class.vocabulary_head)
        return model_class(transformer, head, processor, config).eval()

    def save_pretrained(self, directory, state_dict: dict | None = None) -> None:
        """Backbone, tokenizer and image processor as transformers saves them; beside them the head
        and reward_config.json. state_dict: all weights of the model, where its own are sharded."""
        if state_dict is None:
            state_dict = self.state_dict()
        head = select_prefix(state_dict, "head.")
        if self.head is not None:
            for name, weight in self.head.state_dict().items():
                if head[name].shape != weight.shape:
                    raise ValueError("the head's weights were not gathered from the ranks")

        with atomic_write(directory, last="reward_config.json") as folder:
            self.save_backbone(folder, state_dict)
            if head:
                for name, weight in head.items():
                    head[name] = weight.detach().float().cpu().contiguous()
                save_file(head, folder / "head.safetensors")
            save_processor(self.processor, folder)
            config = json.dumps(self.config, indent=1) + "\n"
            (folder / "reward_config.json").write_text(config, encoding="utf-8")


def to_comparisons(items) -> list[Comparison]:
    """What `score_many` takes, as comparisons."""
    comparisons = []
    for item in items:
        if isinstance(item, tuple) and len(item) in (2, 3):
            prompt, responses, *images = item
            item = Comparison(prompt, responses, images=images[0] if images else ())
        if not isinstance(item, Comparison):
            raise ValueError(f"found a {type(item).__name__}, want a Comparison, or a tuple "
                             "(prompt, responses) or (prompt, responses, images)")
        comparisons.append(item)
    return comparisons


def first_equal(responses: list) -> list[int]:
    """For each response the index of the first one that equals it.

    >>> first_equal(["red", "blue", "red"])
    [0, 1, 0]
    """
    return [responses.index(response) for response in responses]


def default_pack_tokens(device: torch.device) -> int:
    """A CPU gains nothing from larger packs."""
    return 16384 if device.type == "cuda" else 1024


def autocast(device: torch.device):
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def make_head(config: dict) -> nn.Sequential:
    """The head that a reward_config.json describes."""
    return build_head(config["width"], config["head_layers"], config["head_activation"])


def check_pooling(config: dict) -> None:
    pooling = config.get("reads", "last_token")
    if pooling != POOLING:
        raise ValueError(f"it reads {pooling!r} and this code {POOLING!r}")


def select_prefix(state_dict: dict, prefix: str) -> dict:
    """The weights whose names begin with the prefix, by the rest of their names."""
    selected = {}
    for name, weight in state_dict.items():
        if name.startswith(prefix):
            selected[name.removeprefix(prefix)] = weight
    return selected


def pair_margins(pairs, score: Score) -> list[list[float]]:
    """For each pair [reward(winner) - reward(loser)]; of a judge two margins, one for each order in
    which it was shown the responses. A pair is correct if its margin is above 0."""
    if score.verdicts:
        return list(score.verdicts)
    margins = []
    for winner, loser in pairs:
        margins.append([score.rewards[winner] - score.rewards[loser]])
    return margins


# 8  The loss ----------------------------------------------------------------------------


def pairwise_loss(rewards, pairs, zero_coef=0.0, length_norm=False, response_length=None,
                  reduction="mean") -> torch.Tensor:
    """Equation (1): -log sigmoid(r(x, chosen) - r(x, rejected)), in fp32, averaged over the pairs.

    rewards (R,); pairs (B, 2): indices of chosen and rejected. Only differences within a pair
    count: a constant added to all rewards changes nothing. The gradient of a pair is
    sigmoid(-margin), the probability of being wrong, so pairs that are learnt stop pulling.

    Algorithm 1 adds two options. They hurt in the paper's ablation (section 4.3) and are off:
    length_norm    r <- r / log(length + 1), with response_length (R,) in tokens, before all else
    zero_coef      + lambda * (r_chosen + r_rejected)^2, which fixes the free constant

    reduction: as in PyTorch, "mean" over pairs, "sum", or "none" for the losses (B,) themselves.

    >>> loss = pairwise_loss(torch.tensor([1.0, 1.0]), torch.tensor([[0, 1]]))
    >>> round(loss.item(), 4)  # equal rewards: log 2
    0.6931
    """
    rewards = rewards.float()
    if length_norm:
        rewards = rewards / torch.log(response_length.clamp(min=1).float() + 1)
    chosen = rewards[pairs[:, 0]]
    rejected = rewards[pairs[:, 1]]
    losses = -F.logsigmoid(chosen - rejected)  # (B,)
    if zero_coef:
        losses = losses + zero_coef * (chosen + rejected) ** 2

    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / max(len(pairs), 1)  # 0, not NaN, where there is no pair


# 9  Load and save -----------------------------------------------------------------------


def load_backbone(path_or_id, dtype=torch.float32, vocabulary_head=False, max_pixels=None):
    """(transformer, processor) of a checkpoint, the weights last: what cannot be used is refused
    before many gigabytes are read."""
    config = load_config(path_or_id, vocabulary_head)  # appendix E
    processor = load_processor(path_or_id, config, max_pixels)
    transformer = load_transformer(path_or_id, config, dtype, vocabulary_head)
    return transformer, processor


def load_processor(path_or_id, config, max_pixels: int | None = None) -> Processor:
    """Tokenizer and, for a backbone with a vision tower, image processor. config: of the backbone.
    max_pixels: of an image."""
    family = FAMILIES.get(config.model_type, Family())
    image_processor = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False)
        if family.image_tokens:
            image_processor = family.make_image_processor(path_or_id, config.vision_config,
                                                          max_pixels)
        check_processor(tokenizer, image_processor, config, family)  # appendix E
    except Exception as error:  # a damaged checkpoint makes transformers raise almost anything
        raise ValueError(f"{path_or_id}: its tokenizer or image processor cannot be used, take "
                         "those of an instruction-tuned checkpoint of its family: "
                         f"{one_line(error)}") from None
    if not family.image_tokens:
        return Processor(tokenizer)

    image_token_ids = [config.image_token_id]
    if getattr(config, "video_token_id", None) is not None:
        image_token_ids.append(config.video_token_id)
    # Without a frame rate two frames are a second. Qwen2.5-VL counts time in units of
    # 1 / tokens_per_second; Qwen2-VL has no such setting and counts pairs of frames
    video_step = getattr(config.vision_config, "tokens_per_second", 1)
    return Processor(tokenizer, image_processor, family, tuple(image_token_ids), video_step)


def load_transformer(path_or_id, config, dtype=torch.float32, vocabulary_head: bool = False):
    """Transformers' model from safetensors, without its vocabulary head or with it. ValueError
    names the weights that are missing, surplus or of another shape. Both layouts load: the hub's
    first one (`visual.*`, `model.*`) and the one of today."""
    model_class = causal_lm_class(config) if vocabulary_head else AutoModel
    try:
        if torch.get_default_device().type == "meta":
            # --shard: this rank makes the shapes, the weights come from the first rank
            model = model_class.from_config(config, dtype=dtype, attn_implementation="branches")
            report = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        else:
            model, report = model_class.from_pretrained(
                path_or_id, config=config, dtype=dtype, attn_implementation="branches",
                use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
                trust_remote_code=False)
    except Exception as error:  # as in load_processor
        raise ValueError(f"cannot load a model from {path_or_id}: {one_line(error)}") from None

    check_load_report(path_or_id, config, report, vocabulary_head)
    use_window_attention(model)  # of the vision tower, not of the decoder: appendix D
    return model.eval()


def check_load_report(path_or_id, config, report: dict, vocabulary_head: bool) -> None:
    """Every weight of the model must be in the checkpoint with its shape, and every weight of the
    checkpoint in the model; a vocabulary head that is not asked for may be left."""
    architecture = (config.architectures or ["model"])[0]
    missing = sorted(report["missing_keys"])
    surplus = []
    for name in sorted(report["unexpected_keys"]):
        if vocabulary_head or not name.endswith("lm_head.weight"):
            surplus.append(name)

    generates = architecture.endswith(("ForConditionalGeneration", "ForCausalLM", "LMHeadModel"))
    if vocabulary_head and (not generates or "lm_head.weight" in missing):
        raise ValueError(f"{path_or_id} is a {architecture} without a vocabulary head and cannot "
                         "write; take an instruction-tuned checkpoint such as "
                         "Qwen/Qwen2.5-VL-3B-Instruct, not a reward model")
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(f"{path_or_id} does not fit its config.json: {name} has the shape "
                         f"{tuple(found)}, want {tuple(wanted)}")
    if surplus or missing:
        raise ValueError(f"{path_or_id} does not fit {architecture}: missing {missing[:5]}, "
                         f"surplus {surplus[:5]}")


def causal_lm_class(config):
    """Transformers' class for such a backbone with its vocabulary head."""
    has_vision = hasattr(config, "vision_config")
    return AutoModelForImageTextToText if has_vision else AutoModelForCausalLM


def save_transformer(model, folder: Path, weights: dict) -> None:
    """Saves these weights as transformers does. config.json gets their dtype, not that of the
    model's own: with LoRA the frozen ones are bf16 and the merged ones fp32."""
    model.save_pretrained(folder, state_dict=weights)
    model.config.dtype = next(iter(weights.values())).dtype
    model.config.save_pretrained(folder)


def save_processor(processor: Processor, folder: Path) -> None:
    processor.tokenizer.save_pretrained(folder)
    if processor.image_processor is not None:
        processor.image_processor.save_pretrained(folder)


@contextlib.contextmanager
def atomic_write(path, last: str = ""):
    """Yields a temporary path to write a file or a folder to; it moves to `path` if the block ends
    well. A kill at any moment leaves the old file or the new one. For one writer at a time.

    Into a folder that exists the new files move one by one. `last` names the file that says that
    the folder is complete: its old version is removed first, and its new one is moved last, so that
    a folder with it is whole.
    OSError, one line, if writing fails: torch says RuntimeError of a full disk, and safetensors has
    an error of its own."""
    path = Path(path).absolute()
    if path.is_dir():
        temporary = path / ".new.partial"
    else:
        temporary = path.with_name(f".{path.name}.partial")  # on the same disk
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        yield temporary
        flush_to_disk(temporary)
        if path.is_dir():
            move_into(temporary, path, last)
        else:
            os.replace(temporary, path)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"cannot write {path} ({one_line(error)}); is the disk full?") from error
    finally:
        remove(temporary)


def flush_to_disk(path: Path) -> None:
    """A file, or the files directly in a folder (not the million images below a data folder); each
    becomes as readable as the umask allows."""
    umask = os.umask(0)  # the only way to read the umask is to set it
    os.umask(umask)
    for file in [path, *path.glob("*")]:
        if file.is_file():
            os.chmod(file, 0o666 & ~umask)
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())


def move_into(source: Path, folder: Path, last: str) -> None:
    """Moves the entries of `source` into a folder that exists."""
    if last:
        (folder / last).unlink(missing_ok=True)
    for old_weights in sorted(folder.glob("model*.safetensors*")):
        # one file or several: transformers would take either
        if not (source / old_weights.name).exists():
            old_weights.unlink()
    entries = sorted(source.iterdir(), key=lambda entry: entry.name == last)
    for entry in entries:
        if entry.is_dir():
            remove(folder / entry.name)
        os.replace(entry, folder / entry.name)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def printable(text: str) -> str:
    """Control characters written out: a text of unknown origin may hold commands to the
    terminal."""
    characters = []
    for character in text:
        if not character.isprintable() and character != "\n":
            character = repr(character)[1:-1]
        characters.append(character)
    return "".join(characters)


def one_line(text) -> str:
    """At most 300 characters on one line, cut in the middle: an error names the place at its start
    and the remedy at its end."""
    text = printable(" ".join(str(text).split()))
    if len(text) > 300:
        text = f"{text[:215]} ... {text[-80:]}"
    return text


# 10  Writing: the vocabulary head and generation ----------------------------------------


@dataclass(kw_only=True)
class TextPack(Pack):
    """A pack for a model with a vocabulary head. It has S response tokens."""
    response_tokens: torch.Tensor  # (S,) index of every response token
    predicted_by: torch.Tensor  # (S,) index of the token before it in its branch; before the first
    # token of a response stands the last one of the prompt
    lm_loss_weight: torch.Tensor | None = None  # (S,) critics and judges: see pack_with_targets


def pack_texts(encoded: list[Encoded]) -> TextPack:
    """A pack, and which token of it predicts which."""
    response_tokens = []
    predicted_by = []
    start = 0  # of the prompt, then of each branch
    for item in encoded:
        start += len(item.prompt_ids)
        last_of_prompt = start - 1
        for ids in item.response_ids:
            end = start + len(ids)
            response_tokens += range(start, end)
            predicted_by.append(last_of_prompt)
            predicted_by += range(start, end - 1)
            start = end
    return TextPack(**vars(pack(encoded)),  # all fields of the Pack, and two more
                    response_tokens=torch.tensor(response_tokens, dtype=torch.long),
                    predicted_by=torch.tensor(predicted_by, dtype=torch.long))


def response_logprobs(lm_head, hidden: torch.Tensor, pack: TextPack, keep=None,
                      suppressed=None) -> torch.Tensor:
    """Log-probabilities (S,) in fp32 of the response tokens, each given all tokens before it.

    hidden: (T, D). keep: bool (S,), the tokens that are wanted; default all. suppressed: see
    log_softmax. Only hidden states that predict a token go through the vocabulary head, 1,024 at a
    time, and again in the backward pass: the logits of 8 responses of 512 tokens over a vocabulary
    of 150,000 would be 2.5 GB."""
    targets = pack.response_tokens
    predicted_by = pack.predicted_by
    if keep is not None:
        targets = targets[keep]
        predicted_by = predicted_by[keep]
    token_ids = pack.input_ids[targets]  # (S,)
    predictors = hidden[predicted_by]  # (S, D)

    logprobs = []
    for hidden_chunk, ids_chunk in zip(predictors.split(1024), token_ids.split(1024)):
        logprobs.append(checkpoint(token_logprobs, lm_head, hidden_chunk, ids_chunk, suppressed,
                                   use_reentrant=False))
    return torch.cat(logprobs)


def token_logprobs(lm_head, hidden, token_ids, suppressed=None) -> torch.Tensor:
    """(n, D) and (n,) -> (n,): the log-probability of each token."""
    logprobs = log_softmax(lm_head, hidden, suppressed)  # (n, V)
    return logprobs.gather(1, token_ids[:, None])[:, 0]


def log_softmax(lm_head, hidden, suppressed=None) -> torch.Tensor:
    """(n, D) -> log-probabilities (n, V) in fp32.

    suppressed: ids of tokens that get probability 0, as a tensor on the device. A list would be
    copied to the device for every token that is written."""
    logits = lm_head(hidden).float()
    if suppressed is not None:
        logits.index_fill_(1, suppressed, -torch.inf)
    return logits.log_softmax(dim=-1)


def suppressed_tokens(policy) -> torch.Tensor:
    """Image tokens: one that is written would stand for an image that is not there."""
    return torch.tensor(policy.processor.image_token_ids, dtype=torch.long, device=policy.device)


class Policy(nn.Module):
    """A backbone with its vocabulary head: it writes responses, and is trained by RL."""

    def __init__(self, causal_lm, processor: Processor):
        super().__init__()
        self.backbone = causal_lm.model
        self.lm_head = causal_lm.lm_head
        self.processor = processor
        self.causal_lm = (causal_lm,)  # for saving; in a tuple it is no submodule, and so every
        # weight has one name

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, pack: TextPack) -> torch.Tensor:
        """Log-probabilities (S,) of the response tokens."""
        suppressed = suppressed_tokens(self)
        with autocast(self.device):
            hidden = hidden_states(self.backbone, self.processor, pack)  # (T, D)
            return response_logprobs(self.lm_head, hidden, pack, suppressed=suppressed)

    @staticmethod
    def from_pretrained(path_or_id, max_pixels=None, dtype=torch.float32) -> "Policy":
        causal_lm, processor = load_backbone(path_or_id, dtype, vocabulary_head=True,
                                             max_pixels=max_pixels)
        return Policy(causal_lm, processor)

    def save_pretrained(self, folder) -> None:
        with atomic_write(folder) as partial:
            self.causal_lm[0].save_pretrained(partial)
            save_processor(self.processor, partial)


@dataclass
class Rollout:
    """A response that a policy wrote."""
    token_ids: list[int]  # ends with <|im_end|>, unless it was cut off at max_new_tokens
    logprobs: list[float]  # of each token, when it was sampled


@dataclass
class DecodingState:
    """What a decoder keeps of the tokens it has read, for rows that continue one by one."""
    cache: DynamicCache  # their keys and values
    mask: torch.Tensor  # (rows, tokens) 1, or 0 where a row is padded
    position: torch.Tensor  # (rows,) of the last token
    hidden: torch.Tensor  # (rows, D) final hidden state of the last token, which predicts the next

    def select_rows(self, index: torch.Tensor) -> None:
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        self.position = self.position[index]
        self.hidden = self.hidden[index]


@torch.no_grad()
def generate(policy, prompts: list[Encoded], max_new_tokens: int, group_size: int = 1,
             seeds: list[int] | None = None) -> list[list[Rollout]]:
    """Samples `group_size` rollouts of every prompt: list (prompts) of list (rollouts).

    A rollout ends with <|im_end|>, or is cut off at max_new_tokens. With seeds, one for each
    prompt, tokens are sampled at temperature 1, without top-k, top-p or penalties; without seeds,
    decoding is greedy. The rollouts of a prompt depend on its seed and not on the other prompts,
    except for rounding, which in bf16 can change a token. Prompts go through the network once, and
    their keys and values are repeated for each rollout. A prompt that has response_ids gets one
    rollout for each of them, which continues it.

    policy: a Policy, or a RewardModel with a vocabulary head.
    A faster inference engine can replace this function if it samples from the current weights."""
    prompt_of_row = []
    starts = []  # the tokens that each rollout begins with
    for index, prompt in enumerate(prompts):
        starts_of_prompt = prompt.response_ids or [[]] * group_size
        starts += starts_of_prompt
        prompt_of_row += [index] * len(starts_of_prompt)

    with autocast(policy.device):
        state = read_prompts(policy, prompts)
        state.select_rows(torch.tensor(prompt_of_row, device=policy.device))
        if any(starts):
            starts = [torch.tensor(ids, dtype=torch.long, device=policy.device) for ids in starts]
            is_token = [torch.ones_like(ids) for ids in starts]
            read_tokens(policy, state, pad_left(starts), pad_left(is_token))
        token_ids, logprobs = sample_tokens(policy, state, max_new_tokens, group_size, seeds)

    rollouts = [[] for _ in prompts]
    end_id = policy.processor.end_id
    for row, index in enumerate(prompt_of_row):
        length = max_new_tokens
        if end_id in token_ids[row]:
            length = token_ids[row].index(end_id) + 1
        rollouts[index].append(Rollout(token_ids[row][:length], logprobs[row][:length]))
    return rollouts


def read_prompts(policy, prompts: list[Encoded]) -> DecodingState:
    """Runs the prompts through the network, padded on the left to one length."""
    packed = pack([prompt.with_responses([]) for prompt in prompts]).to(policy.device)
    embeddings, options = embed(policy.backbone, policy.processor, packed)  # (T, D)

    lengths = [len(prompt.prompt_ids) for prompt in prompts]
    embeddings = pad_left(embeddings.split(lengths))  # (prompts, longest, D)
    positions = pad_left(packed.positions.T.split(lengths))  # (prompts, longest, 3)
    positions = positions.permute(2, 0, 1)  # (3, prompts, longest)
    mask = pad_left(torch.ones_like(packed.input_ids).split(lengths))  # (prompts, longest)
    if options:  # Qwen3-VL: where its deepstack features are added
        is_image = options["visual_pos_masks"][0]
        options["visual_pos_masks"] = pad_left(is_image.split(lengths))

    cache = DynamicCache(config=policy.backbone.config.get_text_config())
    hidden = run_cached(policy, embeddings, positions, mask, cache, **options)
    return DecodingState(cache, mask, position=positions.amax(dim=(0, 2)), hidden=hidden)


def read_tokens(policy, state: DecodingState, token_ids, is_token) -> None:
    """Continues every row with tokens (rows, n). is_token (rows, n): 0 where they are padding."""
    state.mask = torch.cat([state.mask, is_token], dim=1)
    positions = state.position[:, None] + is_token.cumsum(dim=1)  # (rows, n)
    state.position = positions[:, -1]
    embeddings = policy.backbone.get_input_embeddings()(token_ids)  # (rows, n, D)
    state.hidden = run_cached(policy, embeddings, positions.expand(3, -1, -1), state.mask,
                              state.cache)


def run_cached(policy, embeddings, positions, mask, cache, **options) -> torch.Tensor:
    """Runs the decoder on (rows, n) tokens and adds their keys and values to the cache; returns the
    final hidden states (rows, D) of the last tokens.

    Trap: under autocast the residual stream is fp32, and so are the keys and values in the cache,
    twice the memory. With embeddings in bf16 all of it is bf16. The log-probabilities then differ
    slightly from those of Policy.forward, which are the ones that are trained."""
    if policy.device.type == "cuda":
        embeddings = embeddings.bfloat16()
    decoder = getattr(policy.backbone, "language_model", policy.backbone)
    if "cache" in inspect.signature(decoder.forward).parameters:
        options["cache"] = cache
    else:  # its name until transformers 5.23
        options["past_key_values"] = cache
    output = run_decoder(policy.backbone, embeddings, positions, mask, use_cache=True, **options)
    return output.last_hidden_state[:, -1]


def sample_tokens(policy, state: DecodingState, max_new_tokens: int, group_size: int, seeds):
    """The next tokens of every row and their log-probabilities, two lists (rows) of lists."""
    device = policy.device
    suppressed = suppressed_tokens(policy)
    generators = []
    if seeds is not None:
        for seed in seeds:
            generators.append(torch.Generator(device).manual_seed(seed))

    steps_between_checks = 16 if device.type == "cuda" else 1  # a check waits for the GPU
    ended = torch.zeros(len(state.hidden), dtype=torch.bool, device=device)
    token_ids = []
    logprobs = []
    for step in range(max_new_tokens):
        if step > 0:
            last_token = token_ids[-1][:, None]  # (rows, 1)
            read_tokens(policy, state, last_token, torch.ones_like(last_token))
        all_logprobs = log_softmax(policy.lm_head, state.hidden, suppressed)  # (rows, V)

        keys = all_logprobs
        if generators:  # the argmax of log-probabilities + Gumbel noise is a sample of the softmax
            keys = all_logprobs + gumbel_noise(generators, group_size, all_logprobs)
        token_id = keys.argmax(dim=1)  # (rows,)
        token_ids.append(token_id)
        logprobs.append(all_logprobs.gather(1, token_id[:, None])[:, 0])

        ended |= token_id == policy.processor.end_id
        if (step + 1) % steps_between_checks == 0 and ended.all():
            break
    return torch.stack(token_ids, dim=1).tolist(), torch.stack(logprobs, dim=1).tolist()


def gumbel_noise(generators, group_size: int, logprobs: torch.Tensor) -> torch.Tensor:
    """Noise like `logprobs` (rows, V), where each generator draws that of its prompt's rows."""
    noise = []
    for generator in generators:
        noise.append(logprobs.new_empty(group_size, logprobs.shape[1]))
        noise[-1].exponential_(generator=generator)
    return -torch.cat(noise).clamp(min=1e-30).log()  # -log of an exponential variable is Gumbel


def pad_left(rows) -> torch.Tensor:
    """Tensors (tokens, ...) -> (rows, longest, ...)"""
    return pad_sequence(rows, batch_first=True, padding_side="left")


# 11  The tiny backbone ------------------------------------------------------------------

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", END_OF_TURN, "<|vision_start|>",
                  "<|vision_end|>", IMAGE_TOKEN, VIDEO_TOKEN]
CHAT_TEMPLATE = (  # the form of Qwen's template, for messages whose contents are texts
    "{% if messages[0].role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@dataclass
class TinyModel:
    """Of what tiny_backbone makes a checkpoint."""
    config: dict  # for transformers' configuration class
    image_processor: object
    special_tokens: list[str]


def tiny_backbone(directory, texts, seed=0, model_type="qwen2_5_vl", width=128, layers=4,
                  vocabulary_head=False) -> Path:
    """Writes a checkpoint with random weights and a byte-level BPE tokenizer trained on `texts`.

    It has the layout of the hub and the classes of the 7B, with 1.7M parameters: code that loads
    this folder loads Qwen/Qwen2.5-VL-7B-Instruct. model_type: one of FAMILIES, or the text-only
    "qwen2" and "qwen3"."""
    if model_type == "qwen2_5_vl":
        tiny = tiny_qwen2_5_vl(width, layers)
    else:
        tiny = TINY_MODELS[model_type](width, layers)  # --backbone tiny-...: appendix A
    tokenizer = train_tokenizer(texts, tiny.special_tokens)

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **tiny.config)
    model = causal_lm_class(config).from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):  # Qwen3.5's recurrent layers: with transformers' 1 they forget
            nn.init.constant_(parameter, -4.0)  # all but the last few tokens
    if not vocabulary_head:
        model = model.model
    with atomic_write(directory) as partial:
        model.save_pretrained(partial)
        save_processor(Processor(tokenizer, tiny.image_processor), partial)
    return Path(directory)


def tiny_qwen2_5_vl(width: int, layers: int) -> TinyModel:
    """Trap: initial weights must not be small. With transformers' default of 0.02, far below
    1 / sqrt(width), the loss stays at log 2 for many steps. rope_theta must not be large either:
    with the usual 10,000 the columns of an image of 3 x 3 tokens differ by an angle of 0.006, and
    the model cannot tell left from right."""
    rotations = width // 32  # RoPE: a quarter of the pairs of a head for time, 3/8 each for row and
    # column
    text_config = {
        "vocab_size": 512,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "max_position_embeddings": 8192,
        "initializer_range": 0.08,
        "bos_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
        "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
        "eos_token_id": SPECIAL_TOKENS.index(END_OF_TURN),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 20.0,
            "mrope_section": [rotations, rotations * 3 // 2, rotations * 3 // 2]}}
    vision_config = {
        "depth": 2,
        "num_heads": 4,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "out_hidden_size": width,
        "initializer_range": 0.05,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2}
    config = {
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_id": SPECIAL_TOKENS.index(IMAGE_TOKEN),
        "video_token_id": SPECIAL_TOKENS.index(VIDEO_TOKEN),
        "vision_start_token_id": SPECIAL_TOKENS.index("<|vision_start|>"),
        "vision_end_token_id": SPECIAL_TOKENS.index("<|vision_end|>")}
    # at most 112 pixels square, 4 x 4 image tokens: enough for coloured shapes, and fast on a CPU
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    return TinyModel(config, Qwen2VLImageProcessorPil(size=size), SPECIAL_TOKENS)


def train_tokenizer(texts, special_tokens: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    template_texts = ["system\nYou are a helpful assistant.", "\n", "user\n", "assistant\n"]
    template_texts = template_texts * 100  # so often that each becomes a token
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(template_texts + list(texts), vocab_size=512, min_frequency=0,
                            show_progress=False, special_tokens=special_tokens)
    others = [token for token in special_tokens if token not in ("<|endoftext|>", END_OF_TURN)]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()),
                                   pad_token="<|endoftext|>", eos_token=END_OF_TURN,
                                   additional_special_tokens=others, chat_template=CHAT_TEMPLATE)


# ======================================================================================
# First reading ends here. Below: what flags, other families and other paradigms add.
# ======================================================================================

# A  Other families: Qwen2-VL, Qwen3-VL, InternVL ----------------------------------------


def preprocess_qwen3(source, image_processor) -> ImageInput:
    """An image; or a video as a sequence of images, one for every two frames, each after a text
    with its time in seconds. The positions of a video are therefore those of images.

    Without a frame rate two frames are a second, as for Qwen2.5-VL. Trap: transformers 5.23 leaves
    another <|vision_start|> and <|vision_end|> around the whole; 4.57, released with Qwen3-VL, does
    not."""
    if not is_video(source):
        return preprocess_qwen(source, image_processor)
    num_frames = len(select_frames(source))
    pixels, (num_patches, rows, columns) = patchify_video(source, image_processor,
                                                          MIN_VIDEO_PIXELS // num_frames)

    text = ""
    for index in range(num_patches):
        first = 2 * index
        second = min(first + 1, num_frames - 1)
        seconds = (first + second) / 4  # the middle of the two frames
        image_tokens = VIDEO_TOKEN * (rows * columns // 4)
        text += f"<{seconds:.1f} seconds><|vision_start|>{image_tokens}<|vision_end|>"
    return ImageInput(pixels, [(1, rows, columns)] * num_patches, text)


def make_internvl_image_processor(path_or_id, vision_config, max_pixels: int | None):
    """max_pixels: of all tiles of an image together, without its thumbnail."""
    image_processor = GotOcr2ImageProcessorPil.from_pretrained(path_or_id)
    size = (image_processor.size["height"], image_processor.size["width"])
    if size != tuple(vision_config.image_size) or tuple(vision_config.patch_size) != (14, 14):
        raise ValueError(f"its tiles are of {size} pixels, the backbone's of "
                         f"{vision_config.image_size}, in patches of 14")
    if max_pixels:
        image_processor.max_patches = max(max_pixels // math.prod(size), 1)
    return image_processor


def preprocess_internvl(source, image_processor) -> ImageInput:
    """Tiles, uint8 (tiles, 3, 448, 448): of an image 1 to 12, and a thumbnail where there are
    several; of a video one for each frame.

    A grid counts the patches of one run of tokens. `mrope_positions` does not know this family's
    image token, and so gives it the positions of text, as InternVL does."""
    crop_to_patches = not is_video(source)  # trap: the published file says False for images too
    tiled = image_processor(images=open_frames(source), crop_to_patches=crop_to_patches,
                            do_rescale=False, do_normalize=False, return_tensors="pt")
    pixels = tiled["pixel_values"].to(torch.uint8)
    side = pixels.shape[-1] // 14  # in patches

    grids = []
    lines = []
    for frame, num_tiles in enumerate(tiled["num_patches"].tolist(), start=1):
        grids.append((num_tiles, side, side))
        image_tokens = "<IMG_CONTEXT>" * (num_tiles * side * side // 4)
        name = f"Frame{frame}: " if is_video(source) else ""
        lines.append(f"{name}<img>{image_tokens}</img>\n")
    return ImageInput(pixels, grids, "".join(lines))


def encode_internvl_images(backbone, pixels, grids, image_processor) -> list[torch.Tensor]:
    pixels = normalize_pixels(pixels, image_processor)  # (tiles, 3, 448, 448)
    features = backbone.get_image_features(pixels).pooler_output  # (tiles, 256, D)
    return [features.flatten(0, 1)]


QWEN3 = Family(image_tokens=(IMAGE_TOKEN, VIDEO_TOKEN),
               make_image_processor=make_qwen_image_processor,
               preprocess_image=preprocess_qwen3,
               encode_images=encode_qwen_images,
               dummy_pixels=(4, 3, 1, 16 * 16))
INTERNVL = Family(image_tokens=("<IMG_CONTEXT>",),
                  make_image_processor=make_internvl_image_processor,
                  preprocess_image=preprocess_internvl,
                  encode_images=encode_internvl_images,
                  dummy_pixels=(1, 3, 28, 28),
                  placeholder=re.compile("(?:<image>|<video>)\n?"))  # its own line break follows
FAMILIES = {  # by config.model_type
    "qwen2_vl": QWEN2_5,
    "qwen2_5_vl": QWEN2_5,
    "qwen3_vl": QWEN3,
    "qwen3_5": QWEN3,
    "internvl": INTERNVL}


def run_rows(backbone, embeddings: torch.Tensor, options: dict, pack: Pack) -> torch.Tensor:
    """The plain version, for backbones that cannot branch: every response in a row of its own,
    behind its prompt and padded on the right. The images are still encoded once."""
    rows = []  # for each row, the indices of its tokens in the pack
    start = 0
    for lengths, _ in pack.blocks:
        end_of_prompt = start + lengths[0]
        prompt = torch.arange(start, end_of_prompt)
        start = end_of_prompt
        for length in lengths[1:] or [0]:  # a prompt without responses is a row too
            rows.append(torch.cat([prompt, torch.arange(start, start + length)]))
            start += length
    index = pad_sequence(rows, batch_first=True)  # (rows, longest)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    source = torch.empty(start, dtype=torch.long)  # (T,) where in the rows a token of the pack is
    for number in reversed(range(len(rows))):  # a prompt is in several rows: the first one counts
        source[rows[number]] = number * index.shape[1] + torch.arange(len(rows[number]))

    device = embeddings.device
    index, mask, source = index.to(device), mask.to(device), source.to(device)
    if options:  # Qwen3-VL: every row has its own copy of the deepstack features
        is_image = options["visual_pos_masks"][0]  # (T,)
        in_row = is_image[index] & mask.bool()
        number_of_feature = (is_image.cumsum(dim=0) - 1)[index][in_row]
        features = [layer[number_of_feature] for layer in options["deepstack_visual_embeds"]]
        options = {"visual_pos_masks": in_row, "deepstack_visual_embeds": features}
    output = run_decoder(backbone, embeddings[index], pack.positions[:, index], mask,
                         use_cache=False, **options)
    return output.last_hidden_state.flatten(0, 1)[source]  # (T, D)


def tiny_qwen2_vl(width: int, layers: int) -> TinyModel:
    tiny = tiny_qwen2_5_vl(width, layers)
    vision_config = tiny.config["vision_config"]
    del vision_config["fullatt_block_indexes"], vision_config["tokens_per_second"]
    vision_config["embed_dim"] = width
    vision_config["mlp_ratio"] = 2
    return tiny


def tiny_qwen3_vl(width: int, layers: int) -> TinyModel:
    tiny = tiny_qwen2_5_vl(width, layers)
    vision_config = tiny.config["vision_config"]
    del vision_config["fullatt_block_indexes"], vision_config["tokens_per_second"]
    vision_config["num_position_embeddings"] = 64
    vision_config["deepstack_visual_indexes"] = [0, 1]
    tiny.config["text_config"]["rope_parameters"]["mrope_interleaved"] = True
    tiny.image_processor.patch_size = 16
    return tiny


def tiny_qwen3_5(width: int, layers: int) -> TinyModel:
    """Three of four layers are recurrent in the 9B; here all but the last."""
    tiny = tiny_qwen3_vl(width, layers)
    del tiny.config["vision_config"]["deepstack_visual_indexes"]
    text_config = tiny.config["text_config"]
    text_config["layer_types"] = ["linear_attention"] * (layers - 1) + ["full_attention"]
    text_config["linear_num_key_heads"] = 2
    text_config["linear_num_value_heads"] = 4
    text_config["linear_key_head_dim"] = width // 4
    text_config["linear_value_head_dim"] = width // 4
    text_config["rope_parameters"]["partial_rotary_factor"] = 1.0
    return tiny


def tiny_internvl(width: int, layers: int) -> TinyModel:
    tiny = tiny_qwen2_5_vl(width, layers)
    text_config = tiny.config["text_config"]
    text_config["model_type"] = "qwen2"
    text_config["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
    vision_config = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "initializer_range": 0.05,
        "image_size": 112}

    special_tokens = SPECIAL_TOKENS + ["<img>", "</img>", "<IMG_CONTEXT>"]
    config = {
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_id": special_tokens.index("<IMG_CONTEXT>")}
    image_processor = GotOcr2ImageProcessorPil(size={"height": 112, "width": 112})
    return TinyModel(config, image_processor, special_tokens)


def tiny_text_only(width: int, layers: int) -> TinyModel:
    text_config = tiny_qwen2_5_vl(width, layers).config["text_config"]
    text_config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    return TinyModel(text_config, None, SPECIAL_TOKENS)


TINY_MODELS = {
    "qwen2_vl": tiny_qwen2_vl,
    "qwen3_vl": tiny_qwen3_vl,
    "qwen3_5": tiny_qwen3_5,
    "internvl": tiny_internvl,
    "qwen2": tiny_text_only,
    "qwen3": tiny_text_only}

# B  Unusual images, and videos ----------------------------------------------------------

SIGNATURES = (  # how a file begins that is no image of FORMATS, and what it is
    (rb"....ftypavi", "an AVIF image"),
    (rb"....ftyp(hei|hev|mif|msf)", "a HEIC image"),
    (rb"....jP  |\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (rb"....JXL |\xff\x0a", "a JPEG XL image"),
    (rb"....(ftyp|moov|mdat)|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|\x00\x00\x01[\xb0-\xbf]",
     "a video; cut it into frames, numbered image files in a folder, and give the folder"),
    (rb".{0,400}<svg", "an SVG drawing"),
    (rb"%PDF", "a PDF document"),
    (rb".{128}DICM", "a DICOM image"),
    (rb"\s*(<!DOCTYPE html|<!doctype html|<html)", "a web page; fetch the image again"),
    (rb"version https://git-lfs", "a git-lfs pointer; run `git lfs pull` where it lies"),
    (rb"$", "an empty file; fetch it again"))


def explain_image_error(source, error: Exception) -> str:
    """Why an image cannot be opened, and what to do."""
    if isinstance(source, Image.Image):
        return f"cannot be used: {one_line(error)}"
    if isinstance(error, UnidentifiedImageError):
        return f"cannot be used: it is {describe_file(source)}"
    if isinstance(error, OSError) and not isinstance(source, bytes):
        uri = re.search("(?:^|/)(data:|file:/|https?:/)", str(source))
        if uri is not None:
            return (f"cannot be used: {uri[1]} begins no path; want the path of a file, or its "
                    "bytes (of a data URI: decoded)")
    if isinstance(error, FileNotFoundError):
        return "does not exist; fetch it or remove the row"
    return f"cannot be used: {one_line(error)}"


def describe_file(source) -> str:
    """What a file that Pillow does not read is, by its first bytes."""
    if isinstance(source, bytes):
        start = source[:512]
    else:
        with open(source, "rb") as file:
            start = file.read(512)
    formats = ", ".join(FORMATS)
    for pattern, description in SIGNATURES:
        if re.match(pattern, start, re.DOTALL):
            return f"{description} (images may be {formats})"
    return f"no {formats}, or damaged"


def usual_mode(image: Image.Image) -> Image.Image:
    """The image in a mode of which Pillow's conversion to RGB is right: 16 bits become 8.

    Trap: Pillow clips 16 bits at 255, and most of such an image becomes white. Here 65,535 is
    white, so that the 12 bits of a sensor stay dark: scale those yourself."""
    if image.mode == "La":
        return image.convert("LA")
    if image.mode in ("I", "F"):
        numbers = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {numbers}, of which nobody knows what is white; scale it "
                         "to 8 bits")
    if not image.mode.startswith("I;16"):
        return image

    tags = getattr(image, "tag_v2", {})  # of a TIFF file: 258 its bits, 262 is 0 if 0 is white
    if tags.get(258, (16,)) != (16,) or tags.get(262) == 0:
        raise ValueError("it is a TIFF of 12 bits or one in which 0 is white; save it as PNG")
    image = ImageOps.exif_transpose(image)  # what follows has lost the orientation
    values = np.array(image).astype(np.uint32)
    gray = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        alpha = np.where(values == clear, 0, 255)
        gray.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return gray


MAX_FRAMES = 32  # evenly spaced (as MM-RLHF-RewardBench is scored)
FRAME_SHARE = 8  # a frame has an eighth of the pixels of an image: with two frames to a token, 32
# frames cost as much as two images. (Qwen3-VL's published file gives all frames of a video 25M
# pixels together, as much as one and a half images.)
MIN_VIDEO_PIXELS = 4096  # of all frames together, by that file


def is_video(source) -> bool:
    """A list of frames, or a folder of them."""
    if isinstance(source, (list, tuple)):
        return True
    return isinstance(source, (str, os.PathLike)) and os.path.isdir(source)


def select_frames(source, max_frames: int = MAX_FRAMES) -> list:
    """The frames of a video, not yet opened: at most max_frames, evenly spaced, with the first and
    the last. Files of a folder are sorted by the numbers in their names: frame_2 comes before
    frame_10. A still image is its own only frame."""
    if not is_video(source):
        return [source]
    if isinstance(source, (list, tuple)):
        frames = list(source)
    else:
        frames = [file for file in Path(source).iterdir() if not file.name.startswith(".")]
        frames.sort(key=natural_order)
    if not frames:
        raise ValueError(f"video {one_line(source)} holds no frame")

    num_frames = min(len(frames), max_frames)
    selected = []
    for index in range(num_frames):
        selected.append(frames[round(index * (len(frames) - 1) / max(num_frames - 1, 1))])
    return selected


def natural_order(file: Path) -> list:
    """A sorting key that compares runs of digits as numbers."""
    key = []
    for text, digits in re.findall(r"(\D*)(\d*)", file.name):
        key.append((text, int(digits or 0)))
    return key


def open_frames(source, max_frames: int = MAX_FRAMES) -> list[Image.Image]:
    max_pixels = MAX_IMAGE_PIXELS
    if is_video(source):
        max_pixels = MAX_IMAGE_PIXELS // FRAME_SHARE
    return [open_image(frame, max_pixels) for frame in select_frames(source, max_frames)]


def patchify_video(source, image_processor,
                   min_pixels: int) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Cuts a video into patches of two frames: uint8 (P, 3, 2, side * side), and (temporal patches,
    rows, columns). The second frame of a patch is the next one; an odd last frame is repeated.
    min_pixels: of a frame; a smaller one is enlarged."""
    max_pixels = max(image_processor.size["longest_edge"] // FRAME_SHARE,
                     image_processor.size["shortest_edge"])
    frame_processor = copy.copy(image_processor)
    frame_processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}

    frames = select_frames(source)
    frame_sizes = set()
    temporal_patches = []
    for start in range(0, len(frames), 2):  # two at a time: 32 decoded frames take up to a gigabyte
        pixels_of_frames = []
        for frame in open_frames(frames[start:start + 2]):
            frame_sizes.add(frame.size)
            pixels, (rows, columns) = patchify(frame, frame_processor)
            pixels_of_frames.append(pixels)  # (rows * columns, 3, 1, side * side)
        if len(frame_sizes) > 1:
            raise ValueError(f"video {one_line(source)}: its frames have different sizes")
        first, second = pixels_of_frames[0], pixels_of_frames[-1]
        temporal_patches.append(torch.cat([first, second], dim=2))
    return torch.cat(temporal_patches), (len(temporal_patches), rows, columns)


def preprocess_qwen_video(source, image_processor) -> ImageInput:
    """A video for Qwen2-VL and Qwen2.5-VL."""
    pixels, grid = patchify_video(source, image_processor, image_processor.size["shortest_edge"])
    num_tokens = math.prod(grid) // 4
    text = f"<|vision_start|>{VIDEO_TOKEN * num_tokens}<|vision_end|>"
    return ImageInput(pixels, [grid], text)


# C  Critics and judges: the other paradigms of Table 1 ----------------------------------

CRITIQUE_PROMPT = ("\n<|im_start|>user\nWhat is right and what is wrong in this answer?<|im_end|>\n"
                   "<|im_start|>assistant\n")
THINK = "Say what is right and wrong in each answer. "
VERDICT = "Which answer is better, 1 or 2?"


@dataclass
class EncodedWithTargets(Encoded):
    """An encoded comparison with target texts for the vocabulary head."""
    lm_target_lengths: list[int] = ()  # K: number of tokens of the target at the end of a response


def pack_with_targets(encoded: list[Encoded]) -> TextPack:
    """A TextPack with the weight of each response token in the cross entropy: 1 / n for the n
    tokens of a target text, so that every text counts the same, and 0 for all other tokens."""
    weights = []
    num_lm_targets = 0
    for item in encoded:
        target_lengths = [0] * len(item.response_ids)
        if isinstance(item, EncodedWithTargets):
            target_lengths = item.lm_target_lengths
        for ids, target_length in zip(item.response_ids, target_lengths):
            weights += [0.0] * (len(ids) - target_length)
            if target_length > 0:
                weights += [1 / target_length] * target_length
                num_lm_targets += 1
    packed = pack_texts(encoded)
    packed.lm_loss_weight = torch.tensor(weights)
    packed.num_lm_targets = num_lm_targets
    return packed


class RewardModelThatWrites(RewardModel):
    """What critics and judges have in common: a vocabulary head."""
    vocabulary_head = True

    def __init__(self, causal_lm, head: nn.Sequential | None, processor: Processor, config: dict):
        super().__init__(causal_lm.model, head, processor, config)
        self.lm_head = causal_lm.lm_head
        self.causal_lm = (causal_lm,)  # for saving; in a tuple it is no submodule
        self.critiques_from = "own"  # or "given": a critic scores with the critiques of the data
        self.critique_tokens = config.get("critique_tokens", 512)  # longest text it writes

    def make_pack(self, encoded: list[Encoded]) -> TextPack:
        return pack_with_targets(encoded)

    def save_backbone(self, folder: Path, state_dict: dict) -> None:
        weights = {}
        for name, weight in state_dict.items():
            if name.startswith("backbone."):
                weights["model." + name.removeprefix("backbone.")] = weight
            elif name.startswith("lm_head."):
                weights[name] = weight
        save_transformer(self.causal_lm[0], folder, weights)

    def write_texts(self, prompts: list[Encoded], pack_tokens: int | None) -> list[list[list[int]]]:
        """Greedily decoded texts as token ids, without <|im_end|>: one for each prompt, or one for
        each of its response_ids. At most 8 * pack_tokens tokens are decoded at a time."""
        if pack_tokens is None:
            pack_tokens = default_pack_tokens(self.device)
        row_tokens = []  # for each prompt the length of its rows
        for prompt in prompts:
            longest = max([len(ids) for ids in prompt.response_ids], default=0)
            row_tokens.append(len(prompt.prompt_ids) + longest + self.critique_tokens)

        texts = [None] * len(prompts)
        # rows are padded to the longest, so prompts of similar length are decoded together
        waiting = sorted(range(len(prompts)), key=lambda index: -row_tokens[index])
        while waiting:
            max_rows = max([len(prompts[index].response_ids) for index in waiting])
            tokens_of_prompt = max(max_rows, 1) * row_tokens[waiting[0]]
            num_prompts = max(8 * pack_tokens // tokens_of_prompt, 1)
            chosen = waiting[:num_prompts]
            waiting = waiting[num_prompts:]

            groups = generate(self, [prompts[index] for index in chosen], self.critique_tokens)
            for index, group in zip(chosen, groups):
                texts[index] = [self.remove_end(rollout.token_ids) for rollout in group]
        return texts

    def remove_end(self, token_ids: list[int]) -> list[int]:
        return [token_id for token_id in token_ids if token_id != self.processor.end_id]

    def decode_texts(self, texts: list[list[int]]) -> list[str]:
        return [self.processor.tokenizer.decode(token_ids) for token_ids in texts]


class Critic(RewardModelThatWrites):
    """A critic writes a critique of each response, and its head reads the reward *after* it. The
    critique belongs to the response's branch, so that the prompt is still read once:

        prompt | response <|im_end|> CRITIQUE_PROMPT critique <|im_end|> -> head -> r

    Its loss is equation (1), plus a coefficient times the mean cross entropy of the critiques. It
    is trained on the critiques of the data, and scores after its own. A response without a critique
    is read at its own end."""

    def forward(self, pack: TextPack) -> RewardOutput:
        lm_loss = None
        with autocast(self.device):
            hidden = hidden_states(self.backbone, self.processor, pack)  # (T, D)
            if self.training:
                keep = pack.lm_loss_weight > 0
                logprobs = response_logprobs(self.lm_head, hidden, pack, keep)
                lm_loss = -(pack.lm_loss_weight[keep] * logprobs).sum()
        return RewardOutput(rewards=self.read_rewards(hidden, pack), lm_loss=lm_loss)

    def encode_for_training(self, comparison: Comparison, rng: random.Random) -> list[Encoded]:
        return [self.encode_given_critiques(comparison)]

    def encode_for_scoring(self, comparison: Comparison) -> ScoringRequest:
        if self.critiques_from == "own":
            encoded = encode(comparison, self.processor)
        else:
            encoded = self.encode_given_critiques(comparison)
        return ScoringRequest(comparison, [encoded])

    def encode_given_critiques(self, comparison: Comparison) -> Encoded:
        encoded = encode(comparison, self.processor)
        if not comparison.critiques:
            return encoded
        texts = []
        for critique in comparison.critiques:
            check_text(critique, "a critique")
            if not critique.strip():
                critique = ""
            texts.append(escape_special_tokens(critique))
        critiques = self.processor.tokenizer(texts, add_special_tokens=False).input_ids
        return with_critiques(encoded, critiques, self.processor)

    def score_encoded(self, requests: list[ScoringRequest], pack_tokens: int | None = None,
                      max_over_ranks: Callable | None = None) -> list[Score]:
        encoded = [request.encoded[0] for request in requests]
        critiques = [[]] * len(encoded)
        if self.critiques_from == "own":
            critiques = self.generate_critiques(encoded, pack_tokens)
            for index, item in enumerate(encoded):
                encoded[index] = with_critiques(item, critiques[index], self.processor)
        rewards = self.compute_rewards(encoded, pack_tokens, max_over_ranks)

        scores = []
        for index in range(len(requests)):
            scores.append(Score(rewards[index], texts=self.decode_texts(critiques[index])))
        return scores

    def generate_critiques(self, encoded: list[Encoded], pack_tokens: int | None = None):
        """Token ids of its critique of every response of every item."""
        critique_prompt = tokenize_critique_prompt(self.processor)
        prompts = []
        for item in encoded:
            starts = [[*ids, *critique_prompt] for ids in item.response_ids]
            prompts.append(item.with_responses(starts))
        critiques = []
        for item, texts in zip(encoded, self.write_texts(prompts, pack_tokens)):
            critiques.append([texts[index] for index in first_equal(item.response_ids)])
        return critiques


def tokenize_critique_prompt(processor: Processor) -> list[int]:
    return processor.tokenizer(CRITIQUE_PROMPT, add_special_tokens=False).input_ids


def with_critiques(item: Encoded, critiques: list[list[int]], processor: Processor):
    """Appends CRITIQUE_PROMPT and a critique (token ids; an empty one is none) to each response."""
    critique_prompt = tokenize_critique_prompt(processor)
    response_ids = []
    lm_target_lengths = []
    for ids, critique in zip(item.response_ids, critiques, strict=True):
        target = []
        if critique:
            target = [*critique, processor.end_id]
            ids = [*ids, *critique_prompt, *target]
        response_ids.append(ids)
        lm_target_lengths.append(len(target))
    fields = vars(item) | {"response_ids": response_ids}
    return EncodedWithTargets(**fields, lm_target_lengths=lm_target_lengths)


class Judge(RewardModelThatWrites):
    """A generative reward model: it has no reward head, and is asked which of two responses is
    better.

    "direct": the verdicts "1" and "2" are the two responses to that question, and their
    log-probabilities, without <|im_end|>, are the rewards. So this too is a comparison, with
    equation (1) as its loss.
    "think": the only response is <think>1: critique 2: critique</think><answer>1</answer>. The
    judge is trained to write it; in scoring, the <answer> that it writes is its verdict.

    A verdict depends on the order of the two responses. The order is random in training; in scoring
    a judge is asked in both orders."""
    reward_head = False

    @property
    def thinks(self) -> bool:
        return self.paradigm == "think"

    def forward(self, pack: TextPack) -> RewardOutput:
        with autocast(self.device):
            hidden = hidden_states(self.backbone, self.processor, pack)  # (T, D)
            logprobs = response_logprobs(self.lm_head, hidden, pack)  # (S,)
        lm_loss = -(pack.lm_loss_weight * logprobs).sum()  # 0 for "direct"
        return RewardOutput(rewards=sum_over_responses(logprobs, pack), lm_loss=lm_loss)

    def encode_for_training(self, comparison: Comparison, rng: random.Random) -> list[Encoded]:
        """Each of its pairs, in an order drawn by rng."""
        orders = []
        for winner, loser in comparison.pairs:
            orders.append((winner, loser) if rng.random() < 0.5 else (loser, winner))
        return self.encode_orders(comparison, orders)

    def encode_for_scoring(self, comparison: Comparison) -> ScoringRequest:
        num_responses = len(comparison.responses)
        if num_responses < 2:
            raise ValueError(f"a judge compares responses and was given {num_responses}; want 2 or "
                             "more")
        orders = []
        for first, second in pairs_to_judge(comparison):
            orders += [(first, second), (second, first)]
        return ScoringRequest(comparison, self.encode_orders(comparison, orders))

    def encode_orders(self, comparison: Comparison, orders: list[tuple]) -> list[Encoded]:
        """One item for each (first, second). All share one copy of the pixels: 8 responses make 56
        orders."""
        image_inputs = preprocess_images(comparison.images, self.processor)
        encoded = []
        for first, second in orders:
            prompt = judge_prompt(comparison, first, second, self.thinks)
            item = encode(prompt, self.processor, image_inputs)
            if self.thinks:
                lengths = [len(ids) for ids in item.response_ids]
                item = EncodedWithTargets(**vars(item), lm_target_lengths=lengths)
            encoded.append(item)
            item.pixel_values = encoded[0].pixel_values
        return encoded

    def score_encoded(self, requests: list[ScoringRequest], pack_tokens: int | None = None,
                      max_over_ranks: Callable | None = None) -> list[Score]:
        if self.thinks and self.critiques_from == "given":
            raise ValueError("a judge that thinks is scored by what it writes; --critiques given "
                             "is for critics")
        encoded = []
        for request in requests:
            encoded += request.encoded
        if self.thinks:
            texts = self.generate_thoughts(encoded, pack_tokens)
            rewards = [verdict_rewards(text) for text in texts]
        else:
            texts = []
            rewards = self.compute_rewards(encoded, pack_tokens, max_over_ranks)

        scores = []
        start = 0
        for request in requests:
            end = start + len(request.encoded)
            scores.append(judge_score(request.comparison, rewards[start:end], texts[start:end]))
            start = end
        return scores

    def generate_thoughts(self, encoded: list[Encoded], pack_tokens: int | None) -> list[str]:
        prompts = [item.with_responses([]) for item in encoded]
        thoughts = []
        for texts_of_prompt in self.write_texts(prompts, pack_tokens):
            thoughts += self.decode_texts(texts_of_prompt)
        return thoughts


PARADIGMS = {"naive": RewardModel, "critic": Critic, "direct": Judge, "think": Judge}


def pairs_to_judge(comparison: Comparison) -> list[tuple[int, int]]:
    """The given pairs; without any, all."""
    if comparison.pairs:
        return list(comparison.pairs)
    return list(combinations(range(len(comparison.responses)), 2))


def judge_prompt(comparison: Comparison, first: int, second: int, think=False) -> Comparison:
    """The question to a judge as a comparison: two responses, given by their indices, are part of
    its prompt, and its own responses are the verdicts."""
    messages = to_messages(comparison.prompt, comparison.images)
    lines = []
    for message in messages:
        if len(messages) > 1:
            lines.append(f"{message['role']}: {message['content']}")
        else:
            lines.append(message["content"])
    for number, index in ((1, first), (2, second)):
        # "<image>" in a response is no placeholder
        response = re.sub("<(?=(image|video)>)", "< ", comparison.responses[index])
        lines.append(f"Answer {number}: {response}")
    lines.append(THINK + VERDICT if think else VERDICT)

    pairs = []
    if (first, second) in comparison.pairs:
        pairs.append((0, 1))
    if (second, first) in comparison.pairs:
        pairs.append((1, 0))
    responses = ["1", "2"]
    if think:
        responses = [thinking_response(comparison, first, second, pairs)]
        pairs = []
    return replace(comparison, prompt="\n".join(lines), responses=responses, pairs=pairs,
                   critiques=())


def thinking_response(comparison: Comparison, first: int, second: int, pairs: list) -> str:
    """The target text of a thinking judge."""
    critiques = comparison.critiques or [""] * len(comparison.responses)
    verdict = "".join(["12"[winner] for winner, _ in pairs])
    return (f"<think>1: {critiques[first]} 2: {critiques[second]}</think>"
            f"<answer>{verdict}</answer>")


def verdict_rewards(text: str) -> list[float]:
    """The rewards of two responses by the verdict in a text."""
    verdict = parse_verdict(text)
    return [float(verdict == 1), float(verdict == 2)]


def parse_verdict(text: str) -> int:
    """1 or 2: the last <answer> in the text, or without one the last number after the thoughts.
    0 if it is neither.

    >>> parse_verdict("<think>1: red 2: not</think><answer>2</answer>")
    2
    >>> parse_verdict("<answer>1 or 2</answer>")
    0
    >>> parse_verdict("So 1.")
    1
    """
    answers = re.findall("(?s)<answer>(.*?)</answer>", text)
    after_thoughts = text.rpartition("</think>")[2]
    if answers:
        numbers = re.findall(r"\d+", answers[-1])
    elif "<think>" not in after_thoughts:
        numbers = re.findall(r"\d+", after_thoughts)[-1:]
    else:  # it was cut off in its thoughts
        numbers = []
    if len(set(numbers)) == 1 and numbers[0] in ("1", "2"):
        return int(numbers[0])
    return 0


def judge_score(comparison: Comparison, rewards: list, texts: list[str]) -> Score:
    """rewards: of "1" and "2", for every pair in two orders.

    The reward of a response is the sum of its preferences over others, each averaged over the two
    orders. 1/2 is subtracted from a preference, so that it does not help to be in many pairs.
    Identical responses get the first one's reward."""
    score = Score([0.0] * len(comparison.responses), verdicts=[], texts=texts)
    for index, (winner, loser) in enumerate(pairs_to_judge(comparison)):
        in_order = rewards[2 * index]  # the winner is answer 1
        swapped = rewards[2 * index + 1]  # the winner is answer 2
        margins = [in_order[0] - in_order[1], swapped[1] - swapped[0]]
        score.verdicts.append(margins)
        for margin in margins:
            preference = math.tanh(margin / 2) / 2  # sigmoid(margin) - 1/2
            score.rewards[winner] += preference / 2
            score.rewards[loser] -= preference / 2
    score.rewards = [score.rewards[index] for index in first_equal(comparison.responses)]
    return score


def sum_over_responses(logprobs: torch.Tensor, pack: TextPack) -> torch.Tensor:
    """(S,) -> (R,): the log-probability of each response, without its <|im_end|>."""
    num_responses = len(pack.last_token)
    response_index = torch.arange(num_responses, device=logprobs.device)
    response_of_token = response_index.repeat_interleave(pack.response_length + 1)  # (S,)
    is_end = pack.response_tokens == pack.last_token[response_of_token]
    logprobs = logprobs.masked_fill(is_end, 0.0)
    return logprobs.new_zeros(num_responses).index_add(0, response_of_token, logprobs)


# D  The vision tower, and memory --------------------------------------------------------

def vision_modules(backbone) -> list[nn.Module]:
    """What --freeze_vision freezes: the vision tower and what leads from it to the decoder."""
    modules = []
    for name in ("visual", "vision_tower", "multi_modal_projector"):
        if hasattr(backbone, name):
            modules.append(getattr(backbone, name))
    return modules


WINDOW_TOWERS = ("Qwen2VisionTransformerPretrainedModel",
                 "Qwen2_5_VisionTransformerPretrainedModel")


def use_window_attention(model) -> None:
    """Fewer and larger attention calls in the vision tower of Qwen2-VL and Qwen2.5-VL, with the
    same results.

    Trap: transformers passes all windows in one call only to a function with "flash" in its name;
    but a model that is created with such a name requires the flash-attention package. So the name
    is set afterwards. It is not saved with the model."""
    for module in model.modules():
        if type(module).__name__ in WINDOW_TOWERS:
            module.config._attn_implementation = "flash_by_window"
            module.patch_embed.proj.__class__ = PatchEmbedLinear


class PatchEmbedLinear(nn.Conv3d):
    """A convolution whose kernel is as large as its stride is a matrix product: 34.9 -> 8.0 ms (800
    patches, width 128, forward and backward, a CPU, commit c69d86f). Its weight keeps its name and
    shape."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


@dataclass
class WindowGroups:
    """The windows of an image, grouped by their number of patches."""
    sizes: list[tuple[int, int]]  # of each group: number of windows, patches of each window
    order: torch.Tensor  # (P,) the patches sorted by group
    inverse: torch.Tensor  # (P,) back to the order of the image

    @staticmethod
    def from_boundaries(boundaries: torch.Tensor, device) -> "WindowGroups":
        """boundaries (windows + 1,): the index at which each window begins, and the end."""
        lengths = boundaries.diff().tolist()
        windows_of_length = {}
        for window in torch.arange(sum(lengths)).split(lengths):
            windows_of_length.setdefault(len(window), []).append(window)

        sizes = []
        order = []
        for length, windows in windows_of_length.items():
            sizes.append((len(windows), length))
            order += windows
        order = torch.cat(order)
        return WindowGroups(sizes, order.to(device), order.argsort().to(device))


def window_attention(module, query, key, value, attention_mask=None, scaling=None,
                     cu_seq_lens_q=None, **options):
    """Attention in which a patch attends to the patches of its window (or of its frame) alone.

    query, key, value: (1, heads, P, head width). cu_seq_lens_q (windows + 1,): where windows begin.
    Windows of equal length share one call: an image of 1036 x 1036 has 100 windows, of at most four
    lengths."""
    if not hasattr(cu_seq_lens_q, "groups"):
        # all layers of a kind get the same tensor; as an attribute of it the groups are computed
        # once, and the host waits for the GPU once
        cu_seq_lens_q.groups = WindowGroups.from_boundaries(cu_seq_lens_q, query.device)
    groups = cu_seq_lens_q.groups
    group_lengths = [num_windows * length for num_windows, length in groups.sizes]

    sorted_inputs = []
    for tensor in (query.to(value.dtype), key.to(value.dtype), value):
        in_order = tensor[0].index_select(1, groups.order)  # (heads, P, head width)
        sorted_inputs.append(in_order.split(group_lengths, dim=1))

    outputs = []
    for size, *inputs in zip(groups.sizes, *sorted_inputs):
        windows = []
        for tensor in inputs:  # -> (windows, heads, length, head width)
            windows.append(tensor.unflatten(1, size).transpose(0, 1))
        output = F.scaled_dot_product_attention(*windows, scale=scaling)
        output = output.transpose(1, 2)  # (windows, length, heads, head width)
        outputs.append(output.flatten(0, 1))
    output = torch.cat(outputs).index_select(0, groups.inverse)  # (P, heads, head width)
    return output[None], None  # no attention weights


AttentionInterface.register("flash_by_window", window_attention)


def enable_gradient_checkpointing(model) -> None:
    """The backward pass computes the activations of each layer again: less memory, more time.

    transformers 5.23 renamed the method; the old name goes in version 6."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


# E  Checks of a checkpoint: what is refused before its weights are read -----------------

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_config(path_or_id, vocabulary_head: bool = False):
    """The configuration of a checkpoint, a folder or a hub id."""
    try:
        check_files(path_or_id)
        config = AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
        check_config(config, vocabulary_head)
    except Exception as error:  # as in load_processor
        reason = one_line(error)
        if isinstance(error, OSError) and not Path(path_or_id).exists():
            reason = f"there is no such folder here, and as an id of the hub: {reason}"
        raise ValueError(f"cannot load a model from {path_or_id}: {reason}") from None
    return config


def check_files(path_or_id) -> None:
    """ValueError if there is no such folder, or if not all of its weights can be read from it.

    An id of the hub has one slash, and before it no name of a folder that exists here."""
    path = Path(path_or_id)
    if not path.exists():
        is_path = isinstance(path_or_id, os.PathLike) or not HUB_ID.fullmatch(path_or_id)
        if is_path or path.parent.exists():
            raise ValueError("there is no such folder (and a path is not looked for on the hub)")
    elif not path.is_dir():
        raise ValueError("it is a file; give the folder of the checkpoint")

    if find_adapter_config_file(str(path_or_id)) is not None:
        raise ValueError("it holds an adapter (adapter_config.json), which would not be read; "
                         "merge it into its backbone (peft: merge_and_unload) and give the result")
    if not path.is_dir():
        return  # an id of the hub
    for file in path.iterdir():
        if file.is_file() and file.stat().st_size < 1000:
            if file.read_bytes().startswith(b"version https://git-lfs"):
                raise ValueError(f"{file.name} is a git-lfs pointer; run `git lfs pull` there")
    if not (path / "config.json").is_file():
        names = sorted([file.name for file in path.iterdir()])
        raise ValueError(f"it has no config.json and so is no checkpoint; it holds {names[:5]}")
    if list(path.glob("pytorch_model*.bin")) and not list(path.glob("*.safetensors")):
        raise ValueError("its weights are in pytorch_model.bin, which is not read; save them as "
                         "safetensors (AutoModel.from_pretrained and save_pretrained)")


def check_config(config, vocabulary_head: bool) -> None:
    """ValueError if the weights are quantized, if no Family says how images go into this backbone,
    or if it shall write and its cache cannot be repeated for the responses of a prompt."""
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = dict(quantization).get("quant_method", "no method given")
        raise ValueError(f"its weights are quantized ({method}) and cannot be trained; take the "
                         "checkpoint that was quantized")
    if hasattr(config, "vision_config") and config.model_type not in FAMILIES:
        raise ValueError(f"the pictures of {config.model_type} cannot be read; those of "
                         f"{', '.join(FAMILIES)} can")
    if vocabulary_head and not has_full_attention(config):
        raise ValueError(f"{config.model_type} has recurrent or sliding-window layers and can be a "
                         "naive reward model, but no policy, critic or judge: those write, and "
                         "its cache cannot be repeated")


def check_processor(tokenizer, image_processor, config, family: Family) -> None:
    """ValueError if tokenizer, chat template or image processor are not those of this backbone."""
    if tokenizer.convert_tokens_to_ids(END_OF_TURN) in (None, tokenizer.unk_token_id):
        raise ValueError(f"it lacks the token {END_OF_TURN}")
    if family.image_tokens:
        image_token = family.image_tokens[0]
        if tokenizer.convert_tokens_to_ids(image_token) != config.image_token_id:
            raise ValueError(f"the token {image_token} is not the backbone's, "
                             f"{config.image_token_id}")
    largest_id = max(tokenizer.get_vocab().values())
    num_embeddings = config.get_text_config().vocab_size
    if largest_id >= num_embeddings:
        raise ValueError(f"its tokens go up to id {largest_id} and the backbone has "
                         f"{num_embeddings} embeddings")
    check_chat_template(tokenizer)

    wanted = {"do_resize": True, "do_rescale": True, "do_normalize": True,
              "rescale_factor": 1 / 255, "temporal_patch_size": 2}
    for name, value in wanted.items():
        found = getattr(image_processor, name, value)
        if found != value:
            raise ValueError(f"its {name} is {found}, want {value}")


def check_chat_template(tokenizer) -> None:
    """ValueError unless each turn comes out whole, and a prompt ends as an answer begins.

    Trap: a template for typed parts renders a text as nothing, and all prompts are alike."""
    system = {"role": "system", "content": "Be brief, please."}
    turns = [{"role": "user", "content": "What is 7 + 5?"},
             {"role": "assistant", "content": "It is 12."},
             {"role": "user", "content": "And 3 + 8?"}]
    text = render_prompt(turns, tokenizer)
    try:
        text_with_system = render_prompt([system, *turns], tokenizer)
    except ValueError:  # it refuses system turns: an error of the rows that have one
        text_with_system = system["content"] + text
    for message in [*turns, system]:
        if message["content"] not in text_with_system:
            raise ValueError(f"its chat template leaves out what the {message['role']} says")

    first, second, third = [message["content"] for message in turns]
    empty_thought = r"<think>\s*</think>\s*"
    start_of_answer = re.sub(empty_thought, "", text.partition(first)[2].partition(second)[0])
    end_of_prompt = re.sub(empty_thought, "", text.partition(third)[2])
    if end_of_prompt != start_of_answer:
        raise ValueError(f"its chat template ends a prompt with {end_of_prompt!r} but begins an "
                         f"answer with {start_of_answer!r}")
