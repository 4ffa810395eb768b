"""The families of backbones: what a picture becomes equals what transformers' own processor makes of it, and whatever
is done with one family is done with each. That a pack equals separate sequences is in test_model.py, for all of them.
"""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

import evaluate
import model as m
import rl_demo
import train
from conftest import small_backbone
from data import synthetic, write_comparisons
from model import Comparison, Policy, RewardModel, encode, generate, pack, pairwise_loss
from stock import stock_rewards
from test_model import COMPARISONS, moving, picture

NEW = ["qwen3_vl", "internvl"]

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
PIXELS["qwen2_5_vl"] = PIXELS["qwen2_vl"]
ADDED = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
         "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
         "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
         "<|file_sep|>").split()
MORE = {"qwen3_vl": ["<tool_response>", "</tool_response>", "<think>", "</think>"],
        "internvl": "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split()}


def chat_template(kind: str) -> str:
    """What the published template does with messages of typed parts; only Qwen2 puts a system message in by itself."""
    system = ("{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
              "{% endif %}")
    image, video = (f"<|vision_start|><|{name}_pad|><|vision_end|>" for name in ("image", "video"))
    if kind == "internvl":
        image, video = "<IMG_CONTEXT>{{ '\\n' }}", "<video>{{ '\\n' }}"
    return ("{% for m in messages %}" + system * kind.startswith("qwen2") + "<|im_start|>{{ m.role }}\n"
            "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
            "{% if part.type == 'image' %}" + image + "{% elif part.type == 'video' %}" + video +
            "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders like the published checkpoints, by kind: their configuration and their token ids, random narrow
    weights."""
    root, made = tmp_path_factory.mktemp("published"), {}
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}

    def folder(kind):
        if kind in made:
            return made[kind]
        added = ADDED + MORE.get(kind, [])  # behind 151,643 words, of which only the letters are there
        bpe = Tokenizer(models.BPE(letters | {token: 151643 + i for i, token in enumerate(added)}, []))
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
        extra = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
                     video_token="<video>") if kind == "internvl" else {}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                            chat_template=chat_template(kind), extra_special_tokens=extra,
                                            padding_side="left")
        torch.manual_seed(0)
        made[kind] = root / kind
        config = AutoConfig.for_model(kind, **PUBLISHED[kind])
        AutoModelForImageTextToText.from_config(config).bfloat16().save_pretrained(made[kind])
        tokenizer.save_pretrained(made[kind])
        pil = GotOcr2ImageProcessorPil if kind == "internvl" else Qwen2VLImageProcessorPil
        pil(**PIXELS[kind]).save_pretrained(made[kind])
        return made[kind]

    yield folder
    shutil.rmtree(root)  # 80 MB each and more: mostly the vocabulary


PROCESSORS = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor,
              "internvl": InternVLProcessor}


def their_processor(kind, tokenizer, image_processor):
    """transformers' own, without its part for videos: that one needs torchvision."""
    theirs = object.__new__(PROCESSORS[kind])
    theirs.check_argument_for_proper_class = lambda *_: None
    theirs.__init__(image_processor, tokenizer, SimpleNamespace(merge_size=2, temporal_patch_size=2),
                    chat_template=tokenizer.chat_template)
    return theirs


@pytest.fixture(scope="module")
def processors(published):
    """By kind: our processor and theirs of such a folder, which share a tokenizer."""
    made = {}

    def both(kind):
        if kind not in made:
            folder, family = published(kind), m.FAMILIES[kind]
            pixels = family.open(folder, AutoConfig.from_pretrained(folder).vision_config, None)
            tokenizer = m.AutoTokenizer.from_pretrained(folder)
            theirs = their_processor(kind, tokenizer, type(pixels).from_pretrained(folder))
            made[kind] = m.Processor(tokenizer, pixels, family=family), theirs
        return made[kind]

    return both


@pytest.mark.parametrize("kind", m.FAMILIES)
def test_tokens_and_pixels_are_those_of_the_published_processor(processors, kind):
    """Of an image as it is, small, wide and odd, and of two; and of a chat of several turns."""
    ours, theirs = processors(kind)
    for sizes in ([(640, 480)], [(75, 131)], [(1500, 300)], [(448, 448), (97, 40)]):
        parts = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": "What <b>is</b> it?\nSay."}]
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": parts}]
        images = [Image.effect_noise(size, 50).convert("RGB") for size in sizes]
        mine = encode(Comparison(chat, ["a"], images=images), ours)
        text = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        want = theirs(images=images, text=[text], return_tensors="pt")
        assert mine.prompt_ids == want["input_ids"][0].tolist()
        assert torch.equal(mine.pixel_values, want["pixel_values"])
        assert mine.prompt_ids.count(PUBLISHED[kind]["image_token_id"]) == mine.image_grid_thw.prod(dim=1).sum() // 4


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_the_tokens_of_a_video_are_those_of_the_published_processor(processors, frames):
    """Two frames a second. Of a Qwen3-VL each pair of frames is a picture after its time, of an InternVL each frame a
    tile after its number."""
    for kind in NEW:
        ours, theirs = processors(kind)
        _, grids, mark = m.FAMILIES[kind].read(moving(frames, (300, 200)), ours.image_processor)
        if kind == "qwen3_vl":
            told = SimpleNamespace(fps=2.0, frames_indices=list(range(frames)))
            grid = torch.tensor([[len(grids), *grids[0][1:]]])
            want = theirs.replace_video_token({"video_grid_thw": grid, "video_metadata": [told]}, 0)
        else:
            want = (theirs.replace_video_token({"pixel_values_videos": [torch.zeros(frames, 1)]}, 0)
                    + "\n")  # its template's
        assert mark == want


def test_a_line_break_after_an_internvl_picture_is_not_doubled(backbones):
    """Its template sets one after every picture, and most data sets have one there."""
    processor = RewardModel.from_backbone(backbones("internvl")).processor
    ids = [encode(Comparison(f"<image>{breaks}What?", ["a"], images=[picture()]), processor).prompt_ids
           for breaks in ("", "\n", "\n\n")]
    assert ids[0] == ids[1] and len(ids[2]) == len(ids[0]) + 1


def test_a_text_that_writes_an_image_token_of_internvl_has_no_image(backbones):
    processor = RewardModel.from_backbone(backbones("internvl")).processor
    item = encode(Comparison("<img><IMG_CONTEXT></img>", ["<IMG_CONTEXT>"]), processor)
    made = {processor.id_of(token) for token in ("<img>", "</img>", "<IMG_CONTEXT>")}
    assert not made & {*item.prompt_ids, *item.response_ids[0]}


@pytest.mark.parametrize("kind", m.FAMILIES)
def test_the_published_configuration_trains_two_steps(published, kind):
    """Every parameter gets a gradient, the loss falls, and the rewards are those of separate sequences."""
    torch.manual_seed(0)
    model = RewardModel.from_backbone(published(kind), max_pixels=1280 * 28 * 28).train()
    video = Comparison("<video>What moves?", ["nothing", "it"], [(1, 0)], [moving(2, (84, 84))])
    items = [encode(c, model.processor) for c in (COMPARISONS["text, K = 4"], COMPARISONS["one image"], video)]
    assert (model(pack(items))[0] - stock_rewards(model, items)).abs().max() < 1e-5
    optimizer, losses, packed = torch.optim.SGD(model.parameters(), 1e-3), [], pack(items)
    for _ in range(2):
        losses.append(pairwise_loss(model(packed)[0], packed.pairs))
        losses[-1].backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        losses.append(pairwise_loss(model(packed)[0], packed.pairs))
    assert losses[2] < losses[0] and torch.stack(losses).isfinite().all()


# ----------------------------------------------------------------------------------------------- positions and pictures


def test_positions_of_qwen3_vl_are_those_of_transformers_also_for_videos(backbones):
    """There a video is a row of pictures, so that nothing of it differs as it does for Qwen2.5-VL."""
    model = RewardModel.from_backbone(backbones("qwen3_vl"))
    config = model.backbone.config
    two = Comparison("<video> and <video>", ["a"], images=[moving(5), moving(2, (84, 112))])
    for c in (*COMPARISONS.values(), two):
        item = encode(c, model.processor)
        ids, of_video = torch.tensor([item.prompt_ids]), [m.is_video(image) for image in c.images]
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        runs = [(len(m.frames_of(image)) + 1) // 2 if m.is_video(image) else 1 for image in c.images]
        grids = item.image_grid_thw.split(runs)
        images = [grid for grid, video in zip(grids, of_video) if not video]
        videos = [torch.tensor([[len(grid), *grid[0, 1:]]]) for grid, video in zip(grids, of_video) if video]
        theirs, _ = model.backbone.get_rope_index(ids, types, *(torch.cat(g) if g else None for g in (images, videos)))
        assert torch.equal(item.prompt_positions, theirs[:, 0])


def test_a_picture_of_internvl_is_so_many_words_to_its_positions(backbones):
    item = encode(COMPARISONS["image and video"], RewardModel.from_backbone(backbones("internvl")).processor)
    assert torch.equal(item.prompt_positions, torch.arange(len(item.prompt_ids)).expand(3, -1))


def test_the_features_of_a_qwen3_vl_video_are_the_same_in_one_run_or_in_many(backbones):
    backbone, pixels = RewardModel.from_backbone(backbones("qwen3_vl")).backbone, torch.randn(3 * 16, 1536)
    many, one = (m.see_qwen(backbone, pixels, torch.tensor(grids)) for grids in ([[1, 4, 4]] * 3, [[3, 4, 4]]))
    assert len(many) == 3 and all((a - b).abs().max() < 1e-5 for a, b in zip(many, one))


def test_max_pixels_is_the_most_tiles_of_an_internvl_image(backbones):
    """A tile of the tiny one has 112 x 112 pixels; where there are several, one more shows the whole."""
    for most, tiles in ((1, 1), (112 * 112, 1), (2 * 112 * 112, 3), (3 * 112 * 112, 4)):
        model = RewardModel.from_backbone(backbones("internvl"), max_pixels=most)
        assert len(encode(COMPARISONS["one image"], model.processor).pixel_values) == 1  # no larger than a tile
        item = encode(Comparison("?", ["a"], images=[picture(size=(600, 200))]), model.processor)
        assert item.image_grid_thw.tolist() == [[tiles, 8, 8]] and len(item.pixel_values) == tiles


def test_an_image_processor_of_another_family_is_refused(backbones, tmp_path):
    for kind, other in (("qwen3_vl", "qwen2_5_vl"), ("internvl", "qwen2_5_vl"), ("qwen2_5_vl", "qwen3_vl")):
        shutil.copytree(backbones(kind), tmp_path / kind)
        shutil.copy(backbones(other) / "preprocessor_config.json", tmp_path / kind)
        with pytest.raises(ValueError, match="image processor cannot be used.*(patches|tiles)") as error:
            RewardModel.from_backbone(tmp_path / kind)
        assert "\n" not in str(error.value)
    shutil.copytree(backbones("internvl"), tmp_path / "words")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(backbones() / name, tmp_path / "words")
    with pytest.raises(ValueError, match="<IMG_CONTEXT> is not the backbone's"):
        RewardModel.from_backbone(tmp_path / "words")


# ----------------------------------------------------------------------------------------------- the whole way


@pytest.mark.parametrize("kind", NEW)
def test_a_pack_with_and_without_images_reaches_every_parameter(backbones, kind):
    """Else DistributedDataParallel waits for ever: for the tower of a text-only rank, or for a deepstack nobody
    adds."""
    torch.manual_seed(0)
    model = RewardModel.from_backbone(backbones(kind)).train()
    for name in ("text, K = 2", "one image"):
        model.zero_grad()
        packed = pack([COMPARISONS[name]], model.processor)
        pairwise_loss(model(packed)[0], packed.pairs).backward()
        assert all(p.grad is not None for p in model.parameters())
        reached = [part for part in m.vision_parts(model.backbone)
                   if sum(p.grad.abs().sum() for p in part.parameters())]
        assert bool(reached) == (name == "one image")


@pytest.mark.parametrize("kind", NEW)
def test_a_saved_model_of_each_family_gives_the_same_rewards(backbones, tmp_path, kind):
    """Images go into it in tiles as before, though the published file of InternVL says that they do not."""
    torch.manual_seed(0)
    model = RewardModel.from_backbone(backbones(kind), max_pixels=4 * 112 * 112).eval()
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
    hub = {m.re.sub(old, new, name): weight.contiguous() for name, weight in ours.items()}
    hub["lm_head.weight" if new == "model." else "language_model.lm_head.weight"] = torch.zeros(512, 64)
    m.save_file(hub, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    loaded = m.load(tmp_path / "hub").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in ours.items())


@pytest.mark.parametrize("kind", NEW)
def test_what_each_family_writes_has_the_probability_that_a_pack_gives_it(tmp_path, kind):
    """The deepstack of a Qwen3-VL goes in where the prompt is read, at padded places, and never again."""
    policy = Policy.from_pretrained(small_backbone(tmp_path, kind=kind, vocabulary_head=True)).eval()
    items = [encode(c, policy.processor).with_responses([]) for c in COMPARISONS.values()]
    rollouts, logprobs = generate(policy, items, max_new_tokens=4, group_size=2, seeds=list(range(len(items))))
    for item, ids, values in zip(items, rollouts, logprobs):
        assert (policy(pack([item.with_responses(ids)])) - torch.tensor(sum(values, []))).abs().max() < 1e-5


@pytest.mark.parametrize("kind", NEW)
def test_each_family_trains_frozen_and_sharded_and_is_a_policy(kind, tmp_path):
    """`train.py --backbone tiny-...`, alone and sharded, with a vision tower that does not move; then rl_demo.py on
    it."""
    name = next(name for name, made in train.TINY.items() if made == kind)
    data, held = (str(write_comparisons(tmp_path / f"drawn{n}", synthetic(n, seed=5), bar=False)) for n in (12, 3))
    weights = []
    for shard in ("none", "all"):
        out = tmp_path / f"run{shard}"
        cfg = train.Config(backbone=name, data=[data], eval_data=[held], out=str(out), batch_size=8, max_steps=2,
                           eval_every=0, freeze_vision=True, shard=shard, gradient_checkpointing=shard == "all")
        assert train.main(cfg.resolved()) == 0
        weights.append(RewardModel.from_pretrained(out).state_dict())
    start = RewardModel.from_backbone(tmp_path / "runnone" / "tiny_backbone").state_dict()
    plain, sharded = weights
    for key in plain:
        frozen = key.startswith(("lm.visual", "lm.vision_tower", "lm.multi_modal_projector"))
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
    found = []
    for shard in (False, True):
        model = RewardModel.from_backbone(backbones("internvl"))
        for name, p in model.named_parameters():
            if "lambda" in name:
                p.data.fill_(1.003)  # 1.0 in bf16
        pixels = encode(COMPARISONS["one image"], model.processor).pixel_values
        model.forward = lambda pixels, of=model.backbone: m.see_internvl(of, pixels, None)[0]
        model = train.distribute(model, torch.device("cpu"), "all", torch.bfloat16) if shard else model
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(pixels).detach())
    assert torch.equal(*found)


def test_members_of_an_ensemble_each_encode_for_themselves(backbones, tmp_path):
    """Three families and a text-only model vote, as in Table 7; each gives the rewards that it gives alone."""
    rows, members = synthetic(12, seed=3), {}
    data = str(write_comparisons(tmp_path / "drawn", rows, bar=False))
    for kind in ("qwen2_5_vl", *NEW, "qwen3"):
        torch.manual_seed(0)
        members[kind] = RewardModel.from_backbone(backbones(kind)).eval()
        members[kind].save_pretrained(tmp_path / kind)
    evaluate.main(evaluate.Config(model=[str(tmp_path / kind) for kind in members], data=[data],
                                  out=str(tmp_path / "out"), ensemble="accuracy", validation=data, route=True))
    lines = (tmp_path / "out" / "drawn" / "predictions.jsonl").read_text().splitlines()[1:]
    for row, line in zip(rows, map(json.loads, lines)):
        for kind, member in members.items():
            by_member = line.get("members", {str(tmp_path / "qwen3"): line["rewards"]})  # texts go to one alone
            rewards = by_member.get(str(tmp_path / kind))
            assert (rewards is None) == (bool(row.images) == (kind == "qwen3"))
            assert rewards is None or rewards == pytest.approx(
                member.score(row.prompt, row.responses, row.images), abs=1e-5)


def test_a_policy_and_a_reward_model_of_two_families_are_refused(tmp_path):
    """What is written goes to the reward model as tokens and patches, and those are of one family."""
    rows = [Comparison("<image>What?", ["a"], images=[picture()], answer="a")] * 4
    data = str(write_comparisons(tmp_path / "rows", rows, bar=False))
    RewardModel.from_backbone(small_backbone(tmp_path / "b")).save_pretrained(tmp_path / "rm")
    policy = small_backbone(tmp_path / "policy", kind="qwen3_vl", vocabulary_head=True)
    with pytest.raises(ValueError, match="other images or none"):
        rl_demo.main(rl_demo.Config(policy=str(policy), reward_model=[str(tmp_path / "rm")], data=data,
                                    out=str(tmp_path / "rl")).resolved())


@pytest.mark.parametrize("kind, more, why", [
    ("qwen3_5", {}, "linear_attention"), ("gemma3", {}, "sliding_attention"),
    ("mistral", {"sliding_window": 4096}, "sliding_attention"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_attention"),
    ("llava", {}, "pictures of llava cannot be read")])
def test_a_backbone_that_cannot_take_branches_is_refused_before_its_weights_are_read(tmp_path, kind, more, why):
    """There are none here: who has waited for 27 GB is not told afterwards."""
    AutoConfig.for_model(kind, **more).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{why}") as error:
        RewardModel.from_backbone(tmp_path)
    assert "\n" not in str(error.value)
