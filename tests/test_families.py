"""The families of backbones: what a picture becomes equals what transformers' own processor makes of it, and whatever
is done with one family is done with each. That a pack equals separate sequences is in test_model.py, for all of them.
"""
import copy
import json
import random
import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_video

import evaluate
import model as m
import rl_demo
import train
from conftest import small_backbone
from data import synthetic, write_comparisons
from model import Comparison, Policy, RewardModel, encode, generate, pack, pack_texts, pairwise_loss
from stock import stock_rewards
from test_model import COMPARISONS, moving, picture

NEW = ["qwen3_vl", "internvl"]
READ = [*NEW, "qwen3_5"]  # a naive reward model: its recurrent layers read rows, and write nothing here

# ----------------------------------------------------------------------------------------------- as published

# config.json of the checkpoints, with widths of 128 at most, and with two layers; but with three of text, the fewest
# that the deepstack of Qwen3-VL fits into, and with all of a vision tower of which some are named by number
TEXT = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=3, rms_norm_eps=1e-6, initializer_range=0.02,
            hidden_act="silu", attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645, use_cache=True)
QWEN_IDS = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
QWEN2_TEXT = TEXT | dict(vocab_size=152064, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=32768,
                         sliding_window=32768, use_sliding_window=False, max_window_layers=28, rope_theta=1000000.0,
                         rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]})
PUBLISHED = {
    "qwen2_vl": QWEN_IDS | dict(  # Qwen/Qwen2-VL-7B-Instruct
        text_config=QWEN2_TEXT,
        vision_config=dict(depth=2, embed_dim=32, hidden_size=128, num_heads=2, mlp_ratio=4, in_channels=3,
                           patch_size=14, spatial_merge_size=2, temporal_patch_size=2)),
    "qwen2_5_vl": QWEN_IDS | dict(  # Qwen/Qwen2.5-VL-7B-Instruct
        text_config=QWEN2_TEXT | {"max_position_embeddings": 128000},
        vision_config=dict(depth=32, hidden_size=32, intermediate_size=32, out_hidden_size=128, num_heads=2,
                           in_channels=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
                           tokens_per_second=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31])),
    "qwen3_vl": QWEN_IDS | dict(  # Qwen/Qwen3-VL-4B-Instruct
        tie_word_embeddings=True,
        text_config=TEXT | dict(
            vocab_size=151936, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
            max_position_embeddings=262144, attention_bias=False, rope_theta=5000000,
            rope_scaling={"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}),
        vision_config=dict(depth=24, hidden_size=32, intermediate_size=32, out_hidden_size=128, num_heads=2,
                           in_channels=3, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
                           num_position_embeddings=2304,
                           deepstack_visual_indexes=[5, 11, 17], hidden_act="gelu_pytorch_tanh")),
    "qwen3_5": QWEN_IDS | dict(  # Qwen/Qwen3.5-9B, with the vocabulary of Qwen3-VL and four layers of text
        text_config=TEXT | dict(
            vocab_size=151936, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=256,
            linear_num_key_heads=1, linear_num_value_heads=2,
            rope_parameters={"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default",
                             "rope_theta": 10000000, "partial_rotary_factor": 0.25}),
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=32, out_hidden_size=128, num_heads=2,
                           in_channels=3, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
                           num_position_embeddings=2304, hidden_act="gelu_pytorch_tanh")),
    "internvl": dict(  # OpenGVLab/InternVL3-1B-hf
        image_token_id=151667, image_seq_length=256, downsample_ratio=0.5, vision_feature_layer=-1,
        vision_feature_select_strategy="default", projector_hidden_act="gelu",
        text_config=TEXT | dict(model_type="qwen2", vocab_size=151674, num_attention_heads=2, num_key_value_heads=1,
                                max_position_embeddings=32768, sliding_window=32768, use_sliding_window=False,
                                max_window_layers=21, rope_theta=1000000.0),
        vision_config=dict(num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=2,
                           attention_bias=True, image_size=[448, 448], patch_size=[14, 14], layer_scale_init_value=0.1,
                           norm_type="layer_norm", use_qk_norm=False, use_mean_pooling=True, use_mask_token=False,
                           use_absolute_position_embeddings=True, initializer_range=1e-10)),
}
PIXELS = {"qwen2_vl": dict(patch_size=14, size={"shortest_edge": 3136, "longest_edge": 12845056}),
          "qwen3_vl": dict(patch_size=16, size={"shortest_edge": 65536, "longest_edge": 16777216},
                           image_mean=[0.5] * 3, image_std=[0.5] * 3),
          "internvl": dict(size={"height": 448, "width": 448}, crop_to_patches=False, min_patches=1, max_patches=12,
                           image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])}
PIXELS["qwen2_5_vl"], PIXELS["qwen3_5"] = PIXELS["qwen2_vl"], PIXELS["qwen3_vl"]
ADDED = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
         "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
         "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
         "<|file_sep|>").split()
MORE = {"qwen3_vl": ["<tool_response>", "</tool_response>", "<think>", "</think>"],
        "internvl": "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split()}
MORE["qwen3_5"] = MORE["qwen3_vl"]


def chat_template(model_type: str) -> str:
    """What the published template does with messages of typed parts; only Qwen2 puts a system message in by itself."""
    system = ("{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
              "{% endif %}")
    image, video = (f"<|vision_start|><|{name}_pad|><|vision_end|>" for name in ("image", "video"))
    if model_type == "internvl":
        image, video = "<IMG_CONTEXT>{{ '\\n' }}", "<video>{{ '\\n' }}"
    system = system if model_type.startswith("qwen2") else ""
    return ("{% for m in messages %}" + system + "<|im_start|>{{ m.role }}\n"
            "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
            "{% if part.type == 'image' %}" + image + "{% elif part.type == 'video' %}" + video +
            "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders like the published checkpoints, by model type: their configuration and their token ids, random narrow
    weights."""
    root, folders = tmp_path_factory.mktemp("published"), {}
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}

    def folder(model_type):
        if model_type in folders:
            return folders[model_type]
        added = ADDED + MORE.get(model_type, [])  # behind 151,643 words, of which only the letters are there
        bpe = Tokenizer(models.BPE(letters | {token: 151643 + i for i, token in enumerate(added)}, []))
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
        extra = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
                     video_token="<video>") if model_type == "internvl" else {}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                            chat_template=chat_template(model_type), extra_special_tokens=extra,
                                            padding_side="left")
        torch.manual_seed(0)
        path = folders[model_type] = root / model_type
        config = AutoConfig.for_model(model_type, **PUBLISHED[model_type])
        AutoModelForImageTextToText.from_config(config).bfloat16().save_pretrained(path)
        tokenizer.save_pretrained(path)
        stock_processor_class(model_type)(**PIXELS[model_type]).save_pretrained(path)
        return path

    yield folder
    shutil.rmtree(root)  # 80 MB each and more: mostly the vocabulary


def stock_processor_class(model_type):
    return GotOcr2ImageProcessorPil if model_type == "internvl" else Qwen2VLImageProcessorPil


PROCESSORS = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor,
              "qwen3_5": Qwen3VLProcessor, "internvl": InternVLProcessor}


def stock_processor(model_type, tokenizer, image_processor):
    """transformers' own, without its part for videos: that one needs torchvision."""
    stock = object.__new__(PROCESSORS[model_type])
    stock.check_argument_for_proper_class = lambda *_: None
    stock.__init__(image_processor, tokenizer, SimpleNamespace(merge_size=2, temporal_patch_size=2),
                   chat_template=tokenizer.chat_template)
    return stock


@pytest.fixture(scope="module")
def processors(published):
    """By model type: our processor and transformers' of such a folder, which share a tokenizer."""
    pairs = {}

    def both(model_type):
        if model_type not in pairs:
            folder = published(model_type)
            ours = m.load_processor(folder, AutoConfig.from_pretrained(folder))
            stock_images = stock_processor_class(model_type).from_pretrained(folder)
            pairs[model_type] = ours, stock_processor(model_type, ours.tokenizer, stock_images)
        return pairs[model_type]

    return both


def network_input(pixels, image_processor):
    """What the vision tower takes of the bytes in a pack: patches (P, 3 * 2 * side * side), or tiles as they are."""
    pixels = m.normalize_pixels(pixels, image_processor)
    is_tile = pixels.shape[-1] == pixels.shape[-2]
    return pixels if is_tile else pixels.expand(-1, -1, 2, -1).flatten(1)


def noise(size, seed=0):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


@pytest.mark.parametrize("model_type", m.FAMILIES)
def test_tokens_and_pixels_are_those_of_the_published_processor(processors, model_type):
    """Of an image as it is, small, wide and odd, and of two; and of a chat of several turns."""
    ours, stock = processors(model_type)
    for sizes in ([(640, 480)], [(75, 131)], [(1500, 300)], [(448, 448), (97, 40)]):
        parts = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": "What <b>is</b> it?\nSay."}]
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": parts}]
        images = [Image.effect_noise(size, 50).convert("RGB") for size in sizes]
        item = encode(Comparison(chat, ["a"], images=images), ours)
        text = stock.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        expected = stock(images=images, text=[text], return_tensors="pt")
        assert item.prompt_ids == expected["input_ids"][0].tolist()
        assert item.pixel_values.dtype == torch.uint8
        assert torch.equal(network_input(item.pixel_values, ours.image_processor), expected["pixel_values"])
        num_image_tokens = item.prompt_ids.count(PUBLISHED[model_type]["image_token_id"])
        assert num_image_tokens == item.image_grid_thw.prod(dim=1).sum() // 4


@pytest.mark.parametrize("model_type", m.FAMILIES)
def test_bytes_of_every_colour_and_size_become_the_very_numbers_of_the_published_processor(processors, model_type):
    """To the last digit: enlarged, shrunk, thin as a line, of odd sides, and in colour."""
    ours, stock = processors(model_type)
    options = {"crop_to_patches": True} if model_type == "internvl" else {}
    sizes = [(28, 28), (1, 1), (3, 200), (199, 1), (57, 83), (449, 447), (900, 301), (1152, 864), (30, 2000)]
    for seed, size in enumerate(sizes):
        image = noise(size, seed)
        pixels, grids, _ = ours.family.preprocess_image(image, ours.image_processor)
        expected = stock.image_processor(images=[image], return_tensors="pt", **options)
        assert torch.equal(network_input(pixels, ours.image_processor), expected["pixel_values"]), size
        if model_type != "internvl":
            assert [list(grid) for grid in grids] == expected["image_grid_thw"].tolist()


@pytest.mark.parametrize("model_type", m.FAMILIES)
@pytest.mark.parametrize("frames", [1, 4, 5])
def test_the_pixels_of_a_video_are_those_of_its_frames_in_the_published_processor(processors, model_type, frames):
    """A Qwen's patch is made of two frames, and an odd last frame stands twice; an InternVL's frame is a tile. A frame
    has an eighth of the pixels of an image."""
    ours, stock = processors(model_type)
    image_processor = copy.copy(ours.image_processor)
    if model_type != "internvl":
        image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 400_000}
    video = [noise((300, 401), seed) for seed in range(frames)]
    pixels, grids, _ = ours.family.preprocess_image(video, image_processor)
    if model_type == "internvl":
        expected = stock.image_processor(images=video, crop_to_patches=False, return_tensors="pt")["pixel_values"]
        assert [list(grid) for grid in grids] == [[1, 32, 32]] * frames
    else:
        budget = {"shortest_edge": 56 * 56, "longest_edge": 50_000}
        even = video + video[-1:] * (frames % 2)
        patches = stock.image_processor(images=even, size=budget, return_tensors="pt")
        rows, columns = patches["image_grid_thw"][0, 1:].tolist()
        side = ours.image_processor.patch_size
        patches = patches["pixel_values"].view(len(even) // 2, 2, rows * columns, 3, 2, side * side)
        expected = torch.stack([patches[:, 0, :, :, 0], patches[:, 1, :, :, 1]], dim=3).view(-1, 3 * 2 * side * side)
        runs = len(grids)
        assert [sum(grid[0] for grid in grids), *grids[0][1:]] == [len(even) // 2, rows, columns]
        assert runs == (len(even) // 2 if model_type in ("qwen3_vl", "qwen3_5") else 1)
    assert pixels.dtype == torch.uint8 and torch.equal(network_input(pixels, ours.image_processor), expected)


@pytest.mark.parametrize("model_type", m.FAMILIES)
def test_a_still_image_beside_a_video_has_the_features_that_it_has_alone(backbones, model_type):
    """In their pack it gets a second frame, the same as the first; a pack of stills carries one frame of each."""
    model = RewardModel.from_backbone(backbones(model_type)).eval()
    still, video = (encode(COMPARISONS[name], model.processor) for name in ("one image", "a video"))
    assert model.processor.family.image_tokens == ("<IMG_CONTEXT>",) or still.pixel_values.shape[2] == 1
    alone, together = pack([still]), pack([still, video])
    features, *deepstack = m.embed(model.backbone, model.processor, alone)
    beside, *_ = m.embed(model.backbone, model.processor, together)
    assert (beside[:len(features)] - features).abs().max() < 1e-5


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_the_tokens_of_a_video_are_those_of_the_published_processor(processors, frames):
    """Two frames a second. Of a Qwen3-VL each pair of frames is a picture after its time, of an InternVL each frame a
    tile after its number."""
    for model_type in READ:
        ours, stock = processors(model_type)
        _, grids, text = ours.family.preprocess_image(moving(frames, (300, 200)), ours.image_processor)
        if model_type != "internvl":
            metadata = SimpleNamespace(fps=2.0, frames_indices=list(range(frames)))
            grid = torch.tensor([[len(grids), *grids[0][1:]]])
            expected = stock.replace_video_token({"video_grid_thw": grid, "video_metadata": [metadata]}, 0)
        else:
            expected = (stock.replace_video_token({"pixel_values_videos": [torch.zeros(frames, 1)]}, 0)
                        + "\n")  # its template's
        assert text == expected


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("frames, size", [
    (24, (60, 60)), (5, (320, 240)), (2, (40, 40)), (4, (33, 90)), (32, (150, 80))])
def test_a_video_of_small_frames_costs_what_the_published_settings_say(processors, model_type, frames, size):
    """At least 4,096 pixels for all frames together, and not 65,536 for each as for an image."""
    ours, _ = processors(model_type)
    even = frames + frames % 2
    height, width = smart_resize_video(even, size[1], size[0], factor=32, min_pixels=4096, max_pixels=25165824)
    _, grids, _ = ours.family.preprocess_image(moving(frames, size), ours.image_processor)
    assert grids == [(1, height // 16, width // 16)] * (even // 2)


def test_a_line_break_after_an_internvl_picture_is_not_doubled(backbones):
    """Its template sets one after every picture, and most data sets have one there."""
    processor = RewardModel.from_backbone(backbones("internvl")).processor
    ids = [encode(Comparison(f"<image>{breaks}What?", ["a"], images=[picture()]), processor).prompt_ids
           for breaks in ("", "\n", "\n\n")]
    assert ids[0] == ids[1] and len(ids[2]) == len(ids[0]) + 1


def test_a_text_that_writes_an_image_token_of_internvl_has_no_image(backbones):
    processor = RewardModel.from_backbone(backbones("internvl")).processor
    item = encode(Comparison("<img><IMG_CONTEXT></img>", ["<IMG_CONTEXT>"]), processor)
    image_ids = {processor.token_id(token) for token in ("<img>", "</img>", "<IMG_CONTEXT>")}
    assert not image_ids & {*item.prompt_ids, *item.response_ids[0]}


@pytest.mark.parametrize("model_type", m.FAMILIES)
def test_the_published_configuration_trains_two_steps(published, model_type):
    """Every parameter gets a gradient, the loss falls, and the rewards are those of separate sequences."""
    torch.manual_seed(0)
    model = RewardModel.from_backbone(published(model_type), max_pixels=1280 * 28 * 28).train()
    video = Comparison("<video>What moves?", ["nothing", "it"], [(1, 0)], [moving(2, (84, 84))])
    items = [encode(c, model.processor) for c in (COMPARISONS["text, K = 4"], COMPARISONS["one image"], video)]
    assert (model(pack(items)).rewards - stock_rewards(model, items)).abs().max() < 1e-5
    optimizer, losses, packed = torch.optim.SGD(model.parameters(), 1e-3), [], pack(items)
    for _ in range(2):
        losses.append(pairwise_loss(model(packed).rewards, packed.pairs))
        losses[-1].backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        losses.append(pairwise_loss(model(packed).rewards, packed.pairs))
    assert losses[2] < losses[0] and torch.stack(losses).isfinite().all()


# ----------------------------------------------------------------------------------------------- positions and pictures


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_5"])
def test_positions_of_qwen3_are_those_of_transformers_also_for_videos(backbones, model_type):
    """There a video is a row of pictures, so that nothing of it differs as it does for Qwen2.5-VL."""
    model = RewardModel.from_backbone(backbones(model_type))
    config = model.backbone.config
    two = Comparison("<video> and <video>", ["a"], images=[moving(5), moving(2, (84, 112))])
    for comparison in (*COMPARISONS.values(), two):
        item = encode(comparison, model.processor)
        ids, are_videos = torch.tensor([item.prompt_ids]), [m.is_video(image) for image in comparison.images]
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        runs = [(len(m.select_frames(image)) + 1) // 2 if m.is_video(image) else 1 for image in comparison.images]
        grids = item.image_grid_thw.split(runs)
        images = [grid for grid, video in zip(grids, are_videos) if not video]
        videos = [torch.tensor([[len(grid), *grid[0, 1:]]]) for grid, video in zip(grids, are_videos) if video]
        grids = [torch.cat(grids) if grids else None for grids in (images, videos)]
        expected, _ = model.backbone.get_rope_index(ids, types, *grids)
        assert torch.equal(item.prompt_positions, expected[:, 0])


def test_a_picture_of_internvl_is_so_many_words_to_its_positions(backbones):
    item = encode(COMPARISONS["image and video"], RewardModel.from_backbone(backbones("internvl")).processor)
    assert torch.equal(item.prompt_positions, torch.arange(len(item.prompt_ids)).expand(3, -1))


def test_the_features_of_a_qwen3_vl_video_are_the_same_in_one_run_or_in_many(backbones):
    model = RewardModel.from_backbone(backbones("qwen3_vl"))
    pixels = torch.randint(256, (3 * 16, 3, 2, 16 * 16), dtype=torch.uint8)
    many, one = (m.encode_qwen_images(model.backbone, pixels, torch.tensor(grids), model.processor.image_processor)
                 for grids in ([[1, 4, 4]] * 3, [[3, 4, 4]]))
    assert len(many) == 3 and all((a - b).abs().max() < 1e-5 for a, b in zip(many, one))


def test_max_pixels_is_the_most_tiles_of_an_internvl_image(backbones):
    """A tile of the tiny one has 112 x 112 pixels; where there are several, one more shows the whole."""
    for max_pixels, tiles in ((1, 1), (112 * 112, 1), (2 * 112 * 112, 3), (3 * 112 * 112, 4)):
        model = RewardModel.from_backbone(backbones("internvl"), max_pixels=max_pixels)
        assert len(encode(COMPARISONS["one image"], model.processor).pixel_values) == 1  # no larger than a tile
        item = encode(Comparison("?", ["a"], images=[picture(size=(600, 200))]), model.processor)
        assert item.image_grid_thw.tolist() == [[tiles, 8, 8]] and len(item.pixel_values) == tiles


def test_an_image_processor_of_another_family_is_refused(backbones, tmp_path):
    for model_type, other in (("qwen3_vl", "qwen2_5_vl"), ("internvl", "qwen2_5_vl"), ("qwen2_5_vl", "qwen3_vl")):
        shutil.copytree(backbones(model_type), tmp_path / model_type)
        shutil.copy(backbones(other) / "preprocessor_config.json", tmp_path / model_type)
        with pytest.raises(ValueError, match="image processor cannot be used.*(patches|tiles)") as error:
            RewardModel.from_backbone(tmp_path / model_type)
        assert "\n" not in str(error.value)
    shutil.copytree(backbones("internvl"), tmp_path / "words")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(backbones() / name, tmp_path / "words")
    with pytest.raises(ValueError, match="<IMG_CONTEXT> is not the backbone's"):
        RewardModel.from_backbone(tmp_path / "words")


# ----------------------------------------------------------------------------------------------- the whole way


@pytest.mark.parametrize("model_type", READ)
def test_a_pack_with_and_without_images_reaches_every_parameter(backbones, model_type):
    """Else DistributedDataParallel waits for ever: for the tower of a text-only rank, or for a deepstack nobody
    adds."""
    torch.manual_seed(0)
    model = RewardModel.from_backbone(backbones(model_type)).train()
    for name in ("text, K = 2", "one image"):
        model.zero_grad()
        packed = pack([COMPARISONS[name]], model.processor)
        pairwise_loss(model(packed).rewards, packed.pairs).backward()
        assert all(p.grad is not None for p in model.parameters())
        reached = [module for module in m.vision_modules(model.backbone)
                   if sum(p.grad.abs().sum() for p in module.parameters())]
        assert bool(reached) == (name == "one image")


@pytest.mark.parametrize("model_type", READ)
def test_a_saved_model_of_each_family_gives_the_same_rewards(backbones, tmp_path, model_type):
    """Images go into it in tiles as before, though the published file of InternVL says that they do not."""
    torch.manual_seed(0)
    model = RewardModel.from_backbone(backbones(model_type), max_pixels=4 * 112 * 112).eval()
    model.save_pretrained(tmp_path)
    large = Comparison("?", ["a", "b"], images=[Image.effect_noise((400, 300), 50)])
    rows = [large, *COMPARISONS.values()]
    assert RewardModel.from_pretrained(tmp_path).score_many(rows) == model.score_many(rows)


@pytest.mark.parametrize("names", [{"^language_model": "language_model.model"}, {"^": "model."}])
def test_both_layouts_of_internvl_on_the_hub_load(backbones, tmp_path, names):
    """Those of before transformers 4.52 and of today; the vocabulary head is left out where there is one."""
    ours = RewardModel.from_backbone(backbones("internvl")).backbone.state_dict()
    shutil.copytree(backbones("internvl"), tmp_path / "hub")
    ((old, new),) = names.items()
    hub = {re.sub(old, new, name): weight.contiguous() for name, weight in ours.items()}
    hub["lm_head.weight" if new == "model." else "language_model.lm_head.weight"] = torch.zeros(512, 64)
    save_file(hub, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    loaded = m.load_backbone(tmp_path / "hub")[0].state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in ours.items())


@pytest.mark.parametrize("model_type", NEW)
def test_what_each_family_writes_has_the_probability_that_a_pack_gives_it(tmp_path, model_type):
    """The deepstack of a Qwen3-VL goes in where the prompt is read, at padded places, and never again."""
    policy = Policy.from_pretrained(small_backbone(tmp_path, model_type=model_type, vocabulary_head=True)).eval()
    items = [encode(comparison, policy.processor).with_responses([]) for comparison in COMPARISONS.values()]
    groups = generate(policy, items, max_new_tokens=4, group_size=2, seeds=list(range(len(items))))
    for item, group in zip(items, groups):
        packed = pack_texts([item.with_responses([rollout.token_ids for rollout in group])])
        logprobs = torch.tensor([logprob for rollout in group for logprob in rollout.logprobs])
        assert (policy(packed) - logprobs).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", NEW)
def test_each_family_trains_frozen_and_sharded_and_is_a_policy(model_type, tmp_path):
    """`train.py --backbone tiny-...`, alone and sharded, with a vision tower that does not move; then rl_demo.py on
    it."""
    name = next(name for name, type_of_name in train.TINY.items() if type_of_name == model_type)
    data, held_out = (str(write_comparisons(tmp_path / f"drawn{n}", synthetic(n, seed=5), progress=False))
                      for n in (12, 3))
    weights = []
    for shard in ("none", "all"):
        out = tmp_path / f"run{shard}"
        cfg = train.Config(backbone=name, data=[data], eval_data=[held_out], out=str(out), batch_size=8, max_steps=2,
                           eval_every=0, freeze_vision=True, shard=shard, gradient_checkpointing=shard == "all")
        assert train.main(cfg.resolved()) == 0
        weights.append(RewardModel.from_pretrained(out).state_dict())
    start = RewardModel.from_backbone(tmp_path / "runnone" / "tiny_backbone").state_dict()
    plain, sharded = weights
    vision = ("backbone.visual", "backbone.vision_tower", "backbone.multi_modal_projector")
    assert any(key.startswith(vision) for key in plain)
    for key in plain:
        frozen = key.startswith(vision)
        assert key.startswith("head") or frozen == torch.equal(plain[key], start[key]), key
        assert (plain[key] - sharded[key]).abs().max() < 1e-4 or key == "head.2.bias", key  # which no loss pulls at
    cfg = rl_demo.Config(reward_model=[str(tmp_path / "runnone")], reward=["hybrid"], sft_steps=2, max_steps=1,
                         batch_size=2, eval_size=4, group_size=2, max_new_tokens=3, out=str(tmp_path / "rl"))
    assert rl_demo.main(cfg.resolved()) == 0
    assert json.loads((tmp_path / "rl" / "summary.json").read_text())["n"] == 4


def test_a_sharded_tower_of_internvl_computes_with_the_very_scales_of_an_unsharded_one(backbones):
    """They lie in its layers themselves and are no products: gathered in bf16, a small update of them would not be
    felt."""
    train.start_processes()
    features = []
    for shard in (False, True):
        model = RewardModel.from_backbone(backbones("internvl"))
        for name, parameter in model.named_parameters():
            if "lambda" in name:
                parameter.data.fill_(1.003)  # 1.0 in bf16
        processor, backbone = model.processor, model.backbone
        pixels = encode(COMPARISONS["one image"], processor).pixel_values
        model.forward = partial(image_features, backbone, processor)
        model = train.wrap_model(model, torch.device("cpu"), "all", torch.bfloat16) if shard else model
        with torch.autocast("cpu", torch.bfloat16):
            features.append(model(pixels).detach())
    assert torch.equal(*features)


def image_features(backbone, processor, pixels):
    return processor.family.encode_images(backbone, pixels, None, processor.image_processor)[0]


def test_members_of_an_ensemble_each_encode_for_themselves(backbones, tmp_path):
    """Four families and a text-only model vote, as in Table 7; each gives the rewards that it gives alone."""
    rows, members = synthetic(12, seed=3), {}
    data = str(write_comparisons(tmp_path / "drawn", rows, progress=False))
    for model_type in ("qwen2_5_vl", *READ, "qwen3"):
        torch.manual_seed(0)
        members[model_type] = RewardModel.from_backbone(backbones(model_type)).eval()
        members[model_type].save_pretrained(tmp_path / model_type)
    evaluate.main(evaluate.Config(model=[str(tmp_path / model_type) for model_type in members], data=[data],
                                  out=str(tmp_path / "out"), ensemble="accuracy", validation=data, route=True))
    lines = (tmp_path / "out" / "drawn" / "predictions.jsonl").read_text().splitlines()[1:]
    for row, line in zip(rows, map(json.loads, lines)):
        for model_type, member in members.items():
            by_member = line.get("members", {str(tmp_path / "qwen3"): line["rewards"]})  # texts go to one alone
            rewards = by_member.get(str(tmp_path / model_type))
            assert (rewards is None) == (bool(row.images) == (model_type == "qwen3"))
            assert rewards is None or rewards == pytest.approx(
                member.score(row.prompt, row.responses, row.images), abs=1e-5)


def test_a_policy_and_a_reward_model_of_two_families_are_refused(tmp_path):
    """What is written goes to the reward model as tokens and patches, and those are of one family."""
    rows = [Comparison("<image>What?", ["a"], images=[picture()], answer="a")] * 4
    data = str(write_comparisons(tmp_path / "rows", rows, progress=False))
    RewardModel.from_backbone(small_backbone(tmp_path / "b")).save_pretrained(tmp_path / "rm")
    policy = small_backbone(tmp_path / "policy", model_type="qwen3_vl", vocabulary_head=True)
    with pytest.raises(ValueError, match="other images or none"):
        rl_demo.main(rl_demo.Config(policy=str(policy), reward_model=[str(tmp_path / "rm")], data=data,
                                    out=str(tmp_path / "rl")).resolved())


@pytest.mark.parametrize("model_type, settings, paradigm, reason", [
    ("qwen3_5", {}, "critic", "recurrent or sliding-window layers"),
    ("gemma3", {}, "naive", "pictures of gemma3 cannot be read"),
    ("mistral", {"sliding_window": 4096}, "think", "recurrent or sliding-window layers"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "direct",
     "recurrent or sliding-window layers"),
    ("llava", {}, "naive", "pictures of llava cannot be read")])
def test_a_backbone_that_cannot_do_it_is_refused_before_its_weights_are_read(tmp_path, model_type, settings, paradigm,
                                                                             reason):
    """There are none here: who has waited for 27 GB is not told afterwards."""
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{reason}") as error:
        RewardModel.from_backbone(tmp_path, paradigm=paradigm)
    assert "\n" not in str(error.value)
