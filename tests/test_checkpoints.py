"""What people bring as a backbone, and what must come out: each table has a line for what somebody did to a checkpoint.

Nearly all of it is seen before the weights are read: 15 GB may lie on the other side of a network."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import model as m
import train
from conftest import small_backbone
from model import Comparison, Policy, RewardModel, encode

# ----------------------------------------------------------------------------------------------- where it lies


@pytest.fixture
def no_hub(monkeypatch):
    """Whoever asks the hub gives away what the folder is called, and waits for an answer about something else."""
    def asked(*_, **__):
        pytest.fail("the hub was asked")

    monkeypatch.setattr(m, "find_adapter_config_file", asked)
    monkeypatch.setattr(m.AutoConfig, "from_pretrained", asked)


PATHS = ["./qwen", "../qwen", "/no/such/qwen", "~/qwen", "models/qwen/7b", "models/", "qwen", "runs/qwne",
         Path("models/qwen"), "models\\qwen"]


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("load", [RewardModel.from_backbone, Policy.from_pretrained])
def test_a_path_that_leads_nowhere_is_never_asked_for_on_the_hub(tmp_path, monkeypatch, no_hub, path, load):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()  # so that "runs/qwne" is a path, although it has the form of an id
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value) == (f"cannot load a model from {path}: there is no such folder "
                                "(and a path is not looked for on the hub)")


def test_what_has_the_form_of_an_id_is_said_to_be_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot load a model from qwne/7b: there is no such folder here, "
                                         "and as an id of the hub: We couldn't connect") as error:
        RewardModel.from_backbone("qwne/7b")
    assert "\n" not in str(error.value)


def test_a_reward_model_that_is_not_there_is_not_said_to_lack_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"not a saved reward model \(no such folder\)"):
        RewardModel.from_pretrained(tmp_path / "nowhere")


# ----------------------------------------------------------------------------------------------- what is in it


def edit(file, **values):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def adapter_alone(folder):
    for file in folder.iterdir():
        file.unlink()
    edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="Qwen/Qwen2.5-VL-3B-Instruct")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def adapter_beside(folder):
    edit(folder / "adapter_config.json", peft_type="LORA")


def quantized(**settings):
    return lambda folder: edit(folder / "config.json", quantization_config=settings)


def pointer(name):
    """As git leaves it where git-lfs is not installed."""
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16060617592\n"
    return lambda folder: (folder / name).write_text(text)


def cache_of_the_hub(folder):
    """Its folder for the repository, and not the one with the files."""
    for file in folder.iterdir():
        file.unlink()
    for name in ("blobs", "refs", "snapshots"):
        (folder / name).mkdir()


def more_tokens_than_embeddings(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocab_size = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    tokenizer.add_tokens([f"<extra_{n}>" for n in range(vocab_size)])
    tokenizer.save_pretrained(folder)


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TYPED_PARTS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
               "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + ANSWER)
LAST_TURN_ONLY = "{% set m = messages[-1] %}" + TURN + ANSWER
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}" + ANSWER
NO_START_OF_ANSWER = "{% for m in messages %}" + TURN + "{% endfor %}"
OTHER_THOUGHT = "{% for m in messages %}" + TURN + "{% endfor %}" + ANSWER.replace("assistant\n", "assistant\n◁think▷")
REFUSES_ALL = "{{ raise_exception('roles must alternate') }}"


def image_processor(**settings):
    return lambda folder: edit(folder / "preprocessor_config.json", **settings)


REFUSED = {
    "an adapter alone": (adapter_alone, "holds an adapter .adapter_config.json.*merge it into its backbone"),
    "an adapter beside whole weights": (adapter_beside, "holds an adapter .*merge it"),
    "weights of AWQ": (quantized(quant_method="awq", bits=4), r"quantized \(awq\) .*take the checkpoint that was"),
    "weights of GPTQ": (quantized(quant_method="gptq", bits=4), r"quantized \(gptq\)"),
    "weights of bitsandbytes": (quantized(quant_method="bitsandbytes"), r"quantized \(bitsandbytes\)"),
    "weights in fp8": (quantized(quant_method="fp8", weight_block_size=[128, 128]), r"quantized \(fp8\)"),
    "weights of an unknown method": (quantized(load_in_4bit=True), r"quantized \(no method given\)"),
    "a pointer as weights": (pointer("model.safetensors"), "model.safetensors is a git-lfs pointer; run `git"),
    "a pointer as tokenizer": (pointer("tokenizer.json"), "tokenizer.json is a git-lfs pointer; run `git lfs pull`"),
    "pickled weights": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
                        "in pytorch_model.bin, which is not read; save them as safetensors"),
    "the folder above a checkpoint": (cache_of_the_hub, r"no config.json .*it holds \['blobs', 'refs', 'snapshots'\]"),
    "a tokenizer larger than the embedding": (more_tokens_than_embeddings, "up to id [0-9]+ and the backbone has 512"),
    "a template for typed parts": (template(TYPED_PARTS), "leaves out what the user says"),
    "a template of the last turn": (template(LAST_TURN_ONLY), "leaves out what the user says"),
    "a template without system turns": (template(NO_SYSTEM), "leaves out what the system says"),
    "a template that opens no answer": (template(NO_START_OF_ANSWER), "ends a prompt with '<.im_end.>.n' but begins"),
    "a template with another thought": (template(OTHER_THOUGHT), "ends a prompt with '.*◁think▷' but begins an answer"),
    "a template that refuses all": (template(REFUSES_ALL), "chat template refuses the prompt: roles must alternate"),
    "images that are not normalized": (image_processor(do_normalize=False), "its do_normalize is False, want True"),
    "images in other units": (image_processor(rescale_factor=1.0), "its rescale_factor is 1.0"),
    "images that are not resized": (image_processor(do_resize=False), "its do_resize is False"),
    "images of one size": (image_processor(size={"height": 448, "width": 448}), "does not bound the pixels"),
}


@pytest.fixture
def folder(backbones, tmp_path):
    shutil.copytree(backbones(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line_before_the_weights_are_read(folder, monkeypatch, name):
    change, words = REFUSED[name]
    change(folder)
    monkeypatch.setattr(m, "load_transformer", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=words) as error:
        RewardModel.from_backbone(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_file_is_no_folder(folder):
    with pytest.raises(ValueError, match="model.safetensors: it is a file; give the folder of the checkpoint"):
        RewardModel.from_backbone(folder / "model.safetensors")


@pytest.mark.parametrize("load", [RewardModel.from_pretrained, Policy.from_pretrained])
def test_a_saved_model_is_looked_at_in_the_same_way(folder, tiny, load):
    tiny.save_pretrained(folder)
    adapter_beside(folder)
    with pytest.raises(ValueError, match="holds an adapter"):
        load(folder)


def test_weights_that_do_not_fit_the_config_are_named_with_both_shapes(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 100
    edit(folder / "config.json", **config)
    with pytest.raises(ValueError, match=r"does not fit its config.json: language_model.layers.0.mlp.down_proj.weight "
                                         r"has the shape \(64, 192\), want \(64, 100\)"):
        RewardModel.from_backbone(folder)


def test_an_embedding_smaller_than_its_config_says_is_named(folder):
    """Such a checkpoint has its tokenizer fit the config, and a text would reach behind the weights."""
    weights = load_file(folder / "model.safetensors")
    name = "language_model.embed_tokens.weight"
    weights[name] = weights[name][:300].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"embed_tokens.weight has the shape \(300, 64\), want \(512, 64\)"):
        RewardModel.from_backbone(folder)


# ----------------------------------------------------------------------------------------------- what is used as meant

THINKING = ("{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n"
            "{% endif %}{% endif %}")


EMPTY_THOUGHT = "{% for m in messages %}" + TURN + "{% endfor %}" + ANSWER.replace("\n", "\n<think>\n\n</think>\n\n")
THOUGHTS_OF_BEFORE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>"
                      "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + ANSWER)


@pytest.mark.parametrize("text", [EMPTY_THOUGHT, THOUGHTS_OF_BEFORE])
def test_a_template_with_empty_thoughts_is_used_as_it_is(folder, text):
    template(text)(folder)
    processor = RewardModel.from_backbone(folder).processor
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "?"}]
    expected = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert processor.tokenizer.decode(encode(Comparison(messages, ["a"]), processor).prompt_ids) == expected


def test_a_thought_that_a_template_opens_is_closed(folder):
    """As the template does it itself with enable_thinking=False: a response is an answer, and no thought."""
    template(THINKING)(folder)
    processor = RewardModel.from_backbone(folder).processor
    messages = [{"role": "user", "content": "What colour?"}]
    expected = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                                       enable_thinking=False)
    item = encode(Comparison("What colour?", ["red"]), processor)
    assert processor.tokenizer.decode(item.prompt_ids) == expected and expected.endswith("<think>\n\n</think>\n\n")


REFUSES_SYSTEM = ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
                  "{% for m in messages %}" + TURN + "{% endfor %}" + ANSWER)


def test_a_template_that_refuses_system_turns_costs_the_rows_that_have_one(folder):
    template(REFUSES_SYSTEM)(folder)
    model = RewardModel.from_backbone(folder).eval()
    question = {"role": "user", "content": "What colour?"}
    good = Comparison([question], ["red", "blue"], [(0, 1)])
    bad = Comparison([{"role": "system", "content": "Be brief."}, question], ["red", "blue"], [(0, 1)])
    with pytest.raises(ValueError, match="the chat template refuses the prompt: System role not supported") as error:
        encode(bad, model.processor)
    assert "\n" not in str(error.value)
    train.start_processes()
    first, second = train.score_rows(model, [bad, good], on_bad_row="skip")
    assert "System role not supported" in str(first) and len(second.rewards) == 2


OLD_SIZES = {
    "inside the size": {"size": {"min_pixels": 3136, "max_pixels": 6272}},
    "beside the size": {"size": {}, "min_pixels": 3136, "max_pixels": 6272},
    "in both places": {"size": {"min_pixels": 9, "max_pixels": 9}, "min_pixels": 3136, "max_pixels": 6272},
    "under the names of today": {"size": {"shortest_edge": 3136, "longest_edge": 6272}},
}


@pytest.mark.parametrize("name", OLD_SIZES)
def test_the_bounds_of_an_image_are_found_where_older_versions_wrote_them(folder, name):
    edit(folder / "preprocessor_config.json", **OLD_SIZES[name])
    model, meant = RewardModel.from_backbone(folder), (3136, 6272)
    size = model.processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == meant
    picture = m.Image.effect_noise((200, 100), 50)
    (rows, columns), = [grid[1:] for grid in encode(Comparison("?", ["a"], images=picture), model.processor)
                        .image_grid_thw.tolist()]
    assert meant[0] <= rows * columns * 14 * 14 <= meant[1]


# ----------------------------------------------------------------------------------------------- tokens of pictures


@pytest.mark.parametrize("model_type", m.FAMILIES)
def test_the_tokens_that_images_take_the_places_of_are_those_that_no_policy_writes(backbones, model_type):
    """One source for both: `embed` fills every one of them and no other."""
    model = RewardModel.from_backbone(backbones(model_type)).eval()
    image_ids = set(model.processor.image_token_ids)
    assert {model.processor.token_id(token) for token in model.processor.family.image_tokens} == image_ids
    item = encode(Comparison("?", ["a"], images=[m.Image.new("RGB", (112, 112), "red")]), model.processor)
    packed = m.pack([item])
    embeddings, _ = m.embed(model.backbone, model.processor, packed)
    plain = model.backbone.get_input_embeddings()(packed.input_ids)
    filled = (embeddings != plain).any(dim=1)
    assert set(packed.input_ids[filled].tolist()) <= image_ids
    assert filled.tolist() == [token in image_ids for token in packed.input_ids.tolist()]


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_policy_never_writes_a_picture_however_much_it_wants_to(tmp_path, model_type):
    policy = Policy.from_pretrained(small_backbone(tmp_path, model_type=model_type, vocabulary_head=True)).eval()
    image_ids = list(policy.processor.image_token_ids)
    policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach().clone())  # else that of the embedding
    prompt = encode(Comparison("?", []), policy.processor)
    hidden = m.hidden_states(policy.backbone, policy.processor, m.pack([prompt]))[-1].detach()
    with torch.no_grad():
        policy.lm_head.weight[image_ids] = 100 * hidden / hidden.norm()
        assert policy.lm_head(hidden).argmax().item() in image_ids
    ((greedy,),) = m.generate(policy, [prompt], max_new_tokens=4)
    ((first, second),) = m.generate(policy, [prompt], max_new_tokens=4, group_size=2, seeds=[0])
    for rollout in (greedy, first, second):
        assert not set(rollout.token_ids) & set(image_ids)
        assert policy(m.pack_texts([prompt.with_responses([rollout.token_ids])])).isfinite().all()
