"""How a comparison becomes rewards, in the order of model.py. Small enough to check by head wherever numbers are given."""
import copy
import json
import math
import re
import shutil
import zlib

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import model as m
from model import Comparison, RewardModel, branch_mask, encode, fill_packs, mrope_positions, pack, pairwise_loss, plain_rewards


def picture(colour="red", size=(112, 112)):
    return Image.new("RGB", size, colour)


def moving(n, size=(56, 56)):
    """A video of n frames that differ."""
    return [Image.new("RGB", size, (10 * i, 0, 200)) for i in range(n)]


COMPARISONS = {  # one of each kind that the fast path must get right
    "text, K = 2": Comparison("Name a colour.", ["red", "a long answer: green"], [(0, 1)]),
    "text, K = 4": Comparison("Count.", ["1", "2 2", "3", "4 4 4"], [(0, 1), (0, 2), (0, 3), (1, 3)]),
    "one image": Comparison("<image>\nWhat colour?", ["red", "blue blue"], [(1, 0)], [picture()]),
    "several images": Comparison("A <image> and <image>, which is red?", ["first", "second one", "none"], [(0, 1), (0, 2)],
                                 [picture(), picture("blue", (168, 56))]),
    "a video": Comparison("<video>What moves?", ["nothing", "the colour does"], [(1, 0)], [moving(12)]),
    "image and video": Comparison("<image> or <video>?", ["a", "b b"], [(0, 1)], [picture("green"), moving(3)]),
}


def encoded(tiny, *names):
    return [encode(COMPARISONS[name], tiny.tokenizer, tiny.image_processor) for name in names or COMPARISONS]


# ----------------------------------------------------------------------------------------------- images


def test_an_image_that_cannot_be_trusted_is_refused_in_one_line(tmp_path):
    picture().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:120])
    (tmp_path / "note.png").write_text("not an image")
    picture(size=(10, 4000)).save(tmp_path / "narrow.png")
    bomb = bytearray((tmp_path / "whole.png").read_bytes())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # the header claims 60,000 x 60,000 pixels
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    for name, word in {"cut": "cannot be used", "note": "cannot identify", "narrow": "narrower", "bomb": "bomb",
                       "gone": "not exist"}.items():
        with pytest.raises(ValueError, match=word) as error:
            m.open_image(tmp_path / f"{name}.png")
        assert f"{name}.png" in str(error.value) and "\n" not in str(error.value)


def test_a_video_is_32_frames_evenly_spaced_with_the_first_and_the_last(tmp_path):
    for i in range(63):
        Image.new("RGB", (28, 28), (i, 0, 0)).save(tmp_path / f"{i:03}.png")
    frames = [frame.getpixel((0, 0))[0] for frame in m.open_frames(tmp_path)]
    assert frames == list(range(0, 63, 2))


def test_a_patch_of_a_video_spans_two_frames_and_an_odd_last_frame_stands_twice(tiny):
    frames = moving(3)
    patches, grid = m.cut_into_patches(frames, tiny.image_processor)
    assert grid == [2, 4, 4] and patches.shape == (32, 3 * 2 * 196)
    moments = patches.view(2, 16, 3, 2, 196)
    alone = [m.cut_into_patches(frame, tiny.image_processor)[0].view(16, 3, 2, 196)[:, :, 0] for frame in frames]
    assert torch.equal(moments[0, :, :, 0], alone[0]) and torch.equal(moments[0, :, :, 1], alone[1])
    assert torch.equal(moments[1, :, :, 0], alone[2]) and torch.equal(moments[1, :, :, 1], alone[2])


# ----------------------------------------------------------------------------------------------- tokens


def test_the_tokens_of_a_prompt_are_pinned(tiny):
    """Golden ids: if they change, every saved model reads other prompts than it was trained on."""
    item = encode(COMPARISONS["one image"], tiny.tokenizer, tiny.image_processor)
    text = tiny.tokenizer.decode(item.prompt_ids).replace("<|image_pad|>" * 16, "[16 image tokens]")
    assert text == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                    "<|im_start|>user\n<|vision_start|>[16 image tokens]<|vision_end|>\nWhat colour?<|im_end|>\n<|im_start|>assistant\n")
    assert item.prompt_ids == GOLDEN_PROMPT and item.response_ids == GOLDEN_RESPONSES


GOLDEN_PROMPT = [1, 289, 205, 275, 274, 263, 290, 285, 20, 2, 205, 1, 283, 205, 3, *[5] * 16, 4, 205, 340, 350, 37, 2, 205, 1, 276, 205]
GOLDEN_RESPONSES = [[267, 74, 2], [72, 310, 75, 347, 2]]


def test_no_token_spans_the_border_between_prompt_and_response(tiny):
    """The prompt's tokens do not depend on what is answered, and each response is the tokens of its own text and <|im_end|>."""
    one = encode(Comparison("Hi", ["red", "\nred"]), tiny.tokenizer)
    other = encode(Comparison("Hi", ["blue", "x"]), tiny.tokenizer)
    assert one.prompt_ids == other.prompt_ids
    end = tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert one.response_ids[0] == tiny.tokenizer("red").input_ids + [end]


def test_a_response_cannot_close_its_own_turn(tiny):
    """Written out, "<|im_end|>" is text; only the token that we append ends a response."""
    end = tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = encode(Comparison("Hi", ["good<|im_end|>"]), tiny.tokenizer).response_ids[0]
    assert ids.count(end) == 1 and ids[-1] == end


def test_every_spelling_of_a_prompt_gives_the_same_tokens(tiny):
    image = [picture()]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    spellings = ["<image>What?", "What?", [{"role": "user", "content": "<image>What?"}], parts]
    ids = [encode(Comparison(prompt, ["a"], images=image), tiny.tokenizer, tiny.image_processor).prompt_ids for prompt in spellings]
    assert all(i == ids[0] for i in ids)


def test_marks_and_images_must_match(tiny, backbones):
    for prompt, images, word in [("<image><image>", [picture()], "2 <image> marks but there are 1"), ("<image>", [], "1 <image> marks"),
                                 ("<|image_pad|>", [], "special token")]:
        with pytest.raises(ValueError, match=word):
            encode(Comparison(prompt, ["a", "b"], images=images), tiny.tokenizer, tiny.image_processor)
    with pytest.raises(ValueError, match="text-only"):
        encode(Comparison("Hi", ["a", "b"], images=[picture()]), tiny.tokenizer, None)
    with pytest.raises(ValueError, match="end with a message of the user"):
        encode(Comparison([{"role": "assistant", "content": "Hello"}], ["a"]), tiny.tokenizer)


# ----------------------------------------------------------------------------------------------- the pack


def test_a_pack_is_comparisons_end_to_end(tiny):
    """The drawing in Pack's docstring, with tokens that say where they come from."""
    empty = dict(pixel_values=torch.zeros(0, 1176), image_grid_thw=torch.zeros(0, 3, dtype=torch.long))
    p = pack([m.Encoded([1, 2, 3], [[4, 5], [6, 7]], [(0, 1)], **empty), m.Encoded([8, 9], [[10, 11], [12, 13]], [(1, 0)], **empty)])
    assert p.input_ids.tolist() == list(range(1, 14))
    assert p.comparison.tolist() == [0] * 7 + [1] * 6
    assert p.branch.tolist() == [0, 0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    assert p.last_token.tolist() == [4, 6, 10, 12] and p.response_length.tolist() == [1, 1, 1, 1]
    assert p.pairs.tolist() == [[0, 1], [3, 2]]


def test_packs_are_full_to_97_percent_on_a_mixed_set():
    """Nothing is padded inside a pack; what is lost is the room that no comparison fits into any more."""
    generator = torch.Generator().manual_seed(0)
    sizes = (torch.rand(2000, generator=generator) ** 3 * 3900 + 100).int().tolist()  # many short, some of almost 4,000 tokens
    packs = fill_packs(sizes, budget=16384)
    assert sorted(i for p in packs for i in p) == list(range(2000))
    assert max(sum(sizes[i] for i in p) for p in packs) <= 16384
    assert sum(sizes) / (len(packs) * 16384) >= 0.97


# ----------------------------------------------------------------------------------------------- positions and mask


def test_images_get_three_dimensional_positions():
    """The drawing in mrope_positions: two text tokens, an image of 2 x 3 tokens, one text token."""
    empty = torch.zeros(0, 1176)
    item = m.Encoded([1, 2, *[99] * 6, 3], [[4, 5], [6]], [(0, 1)], empty, torch.tensor([[1, 4, 6]]))
    time, row, column = mrope_positions(pack([item]), image_pad=99, video_pad=98).tolist()
    assert time == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 6]  # both responses start at 6: each is the only one
    assert row == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 6]
    assert column == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 6]


def test_a_video_counts_time_in_steps_and_what_follows_starts_after_it():
    item = m.Encoded([1, *[98] * 3, 2], [[3]], [], torch.zeros(0, 1176), torch.tensor([[3, 2, 2]]))
    time, row, _ = mrope_positions(pack([item]), image_pad=99, video_pad=98, video_step=4).tolist()
    assert time == [0, 1, 5, 9, 10, 11] and row == [0, 1, 1, 1, 10, 11]


def test_positions_equal_those_of_transformers(tiny):
    """For text and images. Videos differ on purpose, see the trap in mrope_positions."""
    for name in ("text, K = 2", "one image", "several images"):
        item = encoded(tiny, name)[0]
        p = pack([m.replace_responses(item, item.response_ids[:1])])
        types = (p.input_ids == tiny.backbone.config.image_token_id).int()[None]
        theirs, _ = tiny.backbone.get_rope_index(p.input_ids[None], types, image_grid_thw=p.image_grid_thw)
        config = tiny.backbone.config
        assert torch.equal(mrope_positions(p, config.image_token_id, config.video_token_id), theirs[:, 0])


def test_a_token_sees_its_prompt_and_its_own_branch_only():
    comparison, branch = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 2, 0, 1])
    seen = [[j for j in range(6) if row[j]] for row in branch_mask(comparison, branch)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 3], [4], [4, 5]]


def test_attention_in_blocks_is_attention_with_the_full_table(tiny):
    p = pack(encoded(tiny))
    query, key, value = (torch.randn(1, heads, len(p.input_ids), 8) for heads in (4, 2, 2))
    in_blocks, _ = m.attend_in_blocks(None, query, key, value, m.branch_blocks(p))
    with_table = torch.nn.functional.scaled_dot_product_attention(query, key, value, branch_mask(p.comparison, p.branch), enable_gqa=True)
    assert (in_blocks.transpose(1, 2) - with_table).abs().max() < 1e-5


def test_the_stock_attention_is_on_loan(tiny):
    with pytest.raises(KeyError), m.stock_attention(tiny.backbone):
        assert tiny.backbone.language_model.config._attn_implementation == "sdpa"
        raise KeyError("whatever happens inside")
    assert tiny.backbone.language_model.config._attn_implementation == "blocks"


# ----------------------------------------------------------------------------------------------- fast and plain


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_vl", "qwen2", "qwen3"])
def test_one_pack_equals_separate_padded_sequences(backbones, kind):
    """Rewards within 1e-5 and gradients within 1e-5 of their norm, in fp32, for all kinds of comparison in one pack."""
    torch.manual_seed(0)
    model = RewardModel.from_backbone(backbones(kind))
    names = list(COMPARISONS) if kind.endswith("vl") else list(COMPARISONS)[:2]
    items = [encode(COMPARISONS[name], model.tokenizer, model.image_processor) for name in names]
    p = pack(items)
    gradients = []
    for rewards in (model(p), plain_rewards(model, items)):
        model.zero_grad()
        pairwise_loss(rewards, p.pairs).backward()
        gradients.append((rewards.detach(), torch.cat([q.grad.flatten() for q in model.parameters() if q.grad is not None])))
    (fast, fast_gradient), (plain, plain_gradient) = gradients
    assert (fast - plain).abs().max() < 1e-5
    assert (fast_gradient - plain_gradient).norm() < 1e-5 * plain_gradient.norm()


def test_recomputed_activations_give_the_same_gradient(tiny):
    p, gradients = pack(encoded(tiny)), []
    for recompute in (False, True):
        model = copy.deepcopy(tiny).train()
        if recompute:
            m.recompute_activations(model.backbone)
        pairwise_loss(model(p), p.pairs).backward()
        gradients.append(torch.cat([q.grad.flatten() for q in model.parameters()]))
    layer = next(layer for layer in model.backbone.language_model.layers)
    assert layer.gradient_checkpointing and (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()


def test_under_autocast_bf16_weights_compute_what_fp32_weights_of_the_same_values_do(backbones):
    """So that on a GPU a frozen reference in bf16 gives, to the bit, what the fp32 policy gives that starts from the same checkpoint."""
    whole, half = (RewardModel.from_backbone(backbones(), dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16))
    for q in whole.parameters():
        q.data = q.data.bfloat16().float()
    p = pack(encoded(whole))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(m.hidden_states(whole.backbone, p), m.hidden_states(half.backbone, p))


def test_a_reward_ignores_its_neighbours_in_the_pack(tiny):
    items = encoded(tiny)
    together = tiny(pack(items))
    alone = torch.cat([tiny(pack([m.replace_responses(item, [ids])])) for item in items for ids in item.response_ids])
    assert (together - alone).abs().max() < 1e-5


def test_ranked_responses_in_one_pack_give_the_gradient_of_all_their_pairs_taken_apart(tiny):
    model = copy.deepcopy(tiny)
    item = encoded(model, "text, K = 4")[0]
    p = pack([item])
    pairwise_loss(model(p), p.pairs).backward()
    whole = torch.cat([q.grad.flatten() for q in model.parameters()])
    model.zero_grad()
    for w, l in item.pairs:
        p = pack([m.replace(item, response_ids=[item.response_ids[w], item.response_ids[l]], pairs=[(0, 1)])])
        pairwise_loss(model(p), p.pairs, pairs_in_step=len(item.pairs)).backward()
    apart = torch.cat([q.grad.flatten() for q in model.parameters()])
    assert (whole - apart).norm() < 1e-5 * whole.norm()


def test_a_pack_without_an_image_still_reaches_every_parameter(tiny):
    """Else DistributedDataParallel waits for ever for the vision tower of a text-only rank."""
    model = copy.deepcopy(tiny)
    p = pack(encoded(model, "text, K = 2"))
    pairwise_loss(model(p), p.pairs).backward()
    assert all(q.grad is not None for q in model.parameters())
    assert sum(q.grad.abs().sum() for q in model.backbone.visual.parameters()) == 0


def test_the_order_of_the_images_matters(tiny):
    """Two images of the same size have the same placeholder tokens; only their pixels tell them apart."""
    a, b = picture("red"), picture("blue")
    first, second = (tiny.score("<image><image>Which is red?", ["first", "second"], images) for images in ([a, b], [b, a]))
    assert max(abs(x - y) for x, y in zip(first, second)) > 1e-4


# ----------------------------------------------------------------------------------------------- the model


def test_every_head_of_table_2_can_be_built():
    for layers, activation in [(1, "none"), (2, "none"), (2, "tanh"), (2, "silu"), (3, "silu"), (4, "silu"), (5, "silu"), (2, "relu")]:
        head = m.build_head(16, layers, activation)
        assert head(torch.zeros(3, 16)).shape == (3, 1)
        assert sum(isinstance(part, torch.nn.Linear) for part in head) == layers
    with pytest.raises(ValueError, match="at least 1 layer"):
        m.build_head(16, 0)


def test_a_fresh_model_starts_near_log_2(tiny):
    rewards = tiny(pack(encoded(tiny)))
    assert rewards.abs().max() < 2
    assert abs(pairwise_loss(rewards, pack(encoded(tiny)).pairs).item() - math.log(2)) < 0.3


def test_saved_and_loaded_the_rewards_are_identical(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "rm")
    again = RewardModel.from_pretrained(tmp_path / "rm")
    p = pack(encoded(tiny))
    assert torch.equal(tiny(p), again(p))
    assert again.score("Name a colour.", ["red", "a long answer: green"]) == pytest.approx(tiny(p)[:2].tolist(), abs=1e-5)
    assert type(AutoModel.from_pretrained(tmp_path / "rm")) is type(tiny.backbone)
    assert not list((tmp_path / "rm").glob(".*"))


def test_the_hubs_first_layout_loads_and_a_missing_or_surplus_key_is_named(backbones, tmp_path):
    """`visual.*`, `model.*`, `lm_head.*` as the published checkpoints have them."""
    ours = RewardModel.from_backbone(backbones()).backbone.state_dict()
    hub = {re.sub("^language_model", "model", k): v.contiguous() for k, v in ours.items()}
    hub["lm_head.weight"] = torch.zeros(512, 64)
    folder = tmp_path / "hub"
    shutil.copytree(backbones(), folder)
    save_file(hub, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = m.load_backbone(folder).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in ours.items())
    gone = hub.pop("model.norm.weight")
    save_file(hub, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing.*norm.weight"):
        m.load_backbone(folder)
    save_file(hub | {"model.norm.weight": gone, "visual.extra": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="surplus.*extra"):
        m.load_backbone(folder)


def test_a_head_that_does_not_fit_is_an_error_and_never_a_fresh_one(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "head.safetensors")
    save_file({k: v for k, v in weights.items() if k != "2.bias"}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="head.safetensors"):
        RewardModel.from_pretrained(tmp_path)
    (tmp_path / "reward_config.json").unlink()
    with pytest.raises(ValueError, match="not a saved reward model"):
        RewardModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot load a backbone"):
        RewardModel.from_backbone(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_old_model_whole(tiny, tmp_path, monkeypatch):
    tiny.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    changed = copy.deepcopy(tiny)
    torch.nn.init.ones_(changed.head[-1].weight)

    def full_disk(*_):
        raise m.SafetensorError("Error while serializing: No space left on device")  # safetensors' own word for it

    monkeypatch.setattr(m, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        changed.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_max_pixels_bounds_the_tokens_of_an_image(backbones):
    small = RewardModel.from_backbone(backbones(), max_pixels=56 * 56)
    assert len(small.image_processor(images=[picture()], return_tensors="pt")["pixel_values"]) == 16  # 4 x 4 patches, 2 x 2 tokens
    assert json.loads(json.dumps(small.head_config)) == {"head_layers": 2, "head_activation": "silu", "width": 64}


# ----------------------------------------------------------------------------------------------- the loss


def test_only_the_difference_of_two_rewards_matters():
    pairs = torch.tensor([[0, 1]])
    assert pairwise_loss(torch.tensor([3.0, 1.0]), pairs) == pairwise_loss(torch.tensor([103.0, 101.0]), pairs)


def test_each_pair_pulls_with_the_probability_of_being_wrong():
    """d loss / d margin = -sigmoid(-margin): one half where the model has no opinion, next to nothing where it is sure and right."""
    rewards = torch.tensor([0.0, 0.0, 5.0, 0.0], requires_grad=True)
    pairwise_loss(rewards, torch.tensor([[0, 1], [2, 3]]), pairs_in_step=1).backward()
    assert rewards.grad.tolist() == pytest.approx([-0.5, 0.5, -1 / (1 + math.exp(5)), 1 / (1 + math.exp(5))])


def test_a_huge_margin_does_not_overflow():
    assert pairwise_loss(torch.tensor([-500.0, 500.0]), torch.tensor([[0, 1]])).item() == pytest.approx(1000)


def test_parts_of_a_step_add_up_to_the_whole():
    rewards, pairs = torch.tensor([1.0, 0.0, 2.0, -1.0]), torch.tensor([[0, 1], [2, 3], [0, 3]])
    parts = pairwise_loss(rewards, pairs[:1], pairs_in_step=3) + pairwise_loss(rewards, pairs[1:], pairs_in_step=3)
    assert parts.item() == pytest.approx(pairwise_loss(rewards, pairs).item())


def test_the_regularisers_of_algorithm_1_are_its_two_lines():
    rewards, pairs = torch.tensor([3.0, 1.0]), torch.tensor([[0, 1]])
    plain = pairwise_loss(rewards, pairs).item()
    assert pairwise_loss(rewards, pairs, zero_coef=0.1).item() == pytest.approx(plain + 0.1 * (3 + 1) ** 2)
    length = torch.tensor([math.e - 1, math.e**2 - 1])  # log(length + 1) is 1 and 2
    assert pairwise_loss(rewards, pairs, length_norm=True, response_length=length).item() == pytest.approx(math.log(1 + math.exp(-2.5)))


# ----------------------------------------------------------------------------------------------- ensembles


def test_ensemble_weights_follow_the_papers_three_rules():
    margins = torch.tensor([[3.0, 1.0, -1.0, 1.0], [1.0, -1.0, 1.0, -1.0], [-2.0, -2.0, 1.0, 1.0]])
    assert m.ensemble_weights(margins, "average").tolist() == pytest.approx([1 / 3] * 3)
    assert m.ensemble_weights(margins, "accuracy").tolist() == pytest.approx([0.75 / 1.75, 0.5 / 1.75, 0.5 / 1.75])
    assert m.ensemble_weights(margins, "confidence").tolist() == pytest.approx([1, 0, 0])  # mean margins 1, 0 and -1/2
    with pytest.raises(ValueError, match="average, accuracy or confidence"):
        m.ensemble_weights(margins, "median")
