"""Each published set and benchmark, from a few invented rows in its published layout to a training step; and the
conversion's decisions about them.

The rows are in tests/fixtures/NAME, those of the benchmarks in tests/fixtures/benchmarks; images that a parquet file
holds as bytes are in base64 there, since JSON has no bytes. In every set at least one row is bad.
"""
import base64
import copy
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import data
import model
from conftest import ROOT

FIXTURES = ROOT / "tests" / "fixtures"
BENCHMARKS = FIXTURES / "benchmarks"
SETS = [name for name in data.SETS if (FIXTURES / name).is_dir()]  # a set of your own needs no fixture
RL = ("vstar", "arxivqa", "thinklite")
CHAT = [[{"role": "user", "content": "List 3 pets, no letter e."}],
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! What now?"},
         {"role": "user", "content": "Count to 2."}]]
MESSAGE_LISTS = ([(CHAT[0], ["Dog, cat, fish", "Rabbit, eel"], [(0, 1)], 0), (CHAT[1], ["1, 2", "2, 1"], [(0, 1)], 0)],
                 {"chosen and rejected part before their last message, so there is no common prompt": 1})


def user(text):
    return [{"role": "user", "content": text}]


# name: ([(prompt, responses, pairs, number of images)], {reason: rows dropped})
EXPECTED = {
    "r1-reward": ([("What colour is the bus?", ["Red.", "Blue.\n\n# Indeed"], [(0, 1)], 1),
                   ("How many?", ["Three.", "Two."], [(0, 1)], 1),
                   ("What does it cost?", ["**H. $9.75**", "Cheap, as in C#"], [(0, 1)], 1)],
                  {"tie or no verdict": 1}),
    "mm-rlhf": ([("How many cats?", ["Two cats.", "Two.", "Three."], [(0, 1), (0, 2), (1, 2)], 1),
                 ("What happens?", ["A box moves.", "Nothing.", "A box."], [(0, 1), (0, 2)], 1)],
                {"ranking against its scores": 1, "tie or unrated": 1}),
    "rlaif-v": ([("Describe the dog.", ["A brown dog on grass.", "Two dogs on sand."], [(0, 1)], 1),
                 ("Is it late?", ["It is noon.", "It is night."], [(0, 1)], 1)], {"broken image": 1}),
    "mmpr": ([("<image>\nFind x. End with 'Final Answer: ..'",
               ["So x is 3. Final Answer: 3", "So x is 4. Final Answer: 4"], [(0, 1)], 1),
              ("What is 2 + 2?", ["Final Answer: 4", "Final Answer: 5"], [(0, 1)], 0)]
             + [(f"First <image> then <image>: which is larger, question {i}?", ["The first.", "The second."],
                 [(0, 1)], 2) for i in range(6)],
             {"missing image": 1}),
    "mmif": ([(user("<image>\nDescribe in exactly 2 sentences."), ["A lake. It is calm.", "A calm lake lies here."],
               [(0, 1)], 1),
              (user("<image>\nAnswer in capitals."), ["A LAKE.", "A lake."], [(0, 1)], 1)],
             {"pair [N, N] has two identical responses": 1}),
    "omnialign": ([("Why is this bridge famous?", ["It spans the widest river of the land.", "It is a bridge."],
                    [(0, 1)], 1),
                   ("What is announced?", ["A concert on Friday.", "A poster."], [(0, 1)], 1)],
                  {"response N is empty": 1}),
    "ultrafeedback-all": ([("Plan a picnic.", ["Bring bread, fruit and water.", "Bring bread.", "Bring fruit.", "No."],
                            [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)], 0),
                           ("Add 1 and 2.", ["3", "5"], [(0, 1)], 0)], {"tie or unrated": 2}),
    "ultrafeedback-hard": ([("Plan a picnic.", ["Bring bread, fruit and water.", "No."], [(0, 1)], 0),
                            ("Add 1 and 2.", ["3", "5"], [(0, 1)], 0)], {"tie or unrated": 2}),
    "shp": ([("Why is my bread flat?", ["Old yeast.", "No idea"], [(0, 1)], 0),
             ("How hot?", ["220 degrees.", "Hot."], [(0, 1)], 0)],
            {"label against its scores": 1}),
    "tulu3-if": MESSAGE_LISTS, "olmo2": MESSAGE_LISTS, "skywork": MESSAGE_LISTS, "wildchat-uf": MESSAGE_LISTS,
    "swe-arena": ([(user("Make a clock page."), ["<html>clock</html>", "<p>no</p>"], [(0, 1)], 0),
                   ("Sort a list.", ["print(sorted(a))", "a.sort"], [(0, 1)], 0)], {"tie or no vote": 2}),
    "vlfeedback": ([("What is shown?", ["A red box on a ground.", "A box.", "Box."], [(0, 1), (0, 2)], 1),
                    ("Which colour?", ["Grey.", "Green."], [(0, 1)], 1)], {"tie or unrated": 1}),
    "rlhf-v": ([("What is shown?", ["a bus", "two buses"], [(0, 1)], 1),
                ("Where?", ["on a road", "in a lake"], [(0, 1)], 1)],
               {"no field rejected": 1}),
    "llava-critic": ([("What is this?", ["A seven [7].", "A cross."], [(0, 1)], 1),
                      ("How old?", ["About 90 years.", "Old."], [(0, 1)], 1)],
                     {"tie or no verdict": 1, "another judge's format": 1}),
    "pairs": ([("<image>\nWhat is shown?", ["A box.", "Two boxes.", "A car."], [(0, 1), (0, 2)], 1),
               ("Name a fruit.", ["Apple", "Table"], [(0, 1)], 0),
               ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
                ["A box.", "A cat."], [(0, 1)], 1)],
              {"an image outside the data folder": 1}),
    "vstar": ([("What colour is the cup?", [], [], 1), ("What is small?", [], [], 1)], {"missing image": 1}),
    "arxivqa": ([("Which line rises?\nA) red\nB) blue\nC) none\nAnswer with the letter.", [], [], 1),
                 ("Which line falls?\nA) red\nB) blue\nAnswer with the letter.", [], [], 1)], {"unparsable label": 1}),
    "thinklite": ([("<image>Find the angle.", [], [], 1), ("<image>Find the area.", [], [], 1)], {"no answer": 1}),
}
# the fields without which a row means nothing; a dot leads into a field, of "a,b" one is needed
REQUIRED = {
    "r1-reward": "message answer image", "mm-rlhf": "question models_output final_ranking image,video",
    "rlaif-v": "question chosen rejected image",
    "mmpr": "question chosen rejected", "mmif": "conversations chosen chosen.value rejected rejected.value images",
    "omnialign": "prompt chosen rejected image",
    "ultrafeedback-all": "instruction completions", "ultrafeedback-hard": "instruction completions",
    "shp": "history human_ref_A human_ref_B labels score_A score_B", "tulu3-if": "chosen rejected",
    "olmo2": "chosen rejected",
    "skywork": "chosen rejected", "wildchat-uf": "chosen rejected",
    "swe-arena": "feedback feedback.vote_type states states.model_A states.model_B states.model_A.messages instruction",
    "vlfeedback": "prompt completions completions.response completions.annotations image", "rlhf-v": "text image",
    "llava-critic": "conversations image", "pairs": "prompt responses pairs", "vstar": "image question answer",
    "arxivqa": "question options label image", "thinklite": "problem answer image",
}


def convert(name, source, out, **flags):
    sources = source if isinstance(source, list) else [source]
    return data.convert(name, data.Config(source=list(map(str, sources)), out=str(out), **flags))


def comparisons(folder, needs_responses=True):
    rows = data.read_comparisons(folder, needs_responses)
    return [rows[i] for i in range(len(rows))]


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pair_row(prompt, chosen="Yes, it is a red box on the table.", rejected="No, there is nothing on it.", **keys):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | keys


def test_mmpr_is_read_as_its_archives_unpack_and_each_row_once(tmp_path):
    """annotations.zip unpacks to annotations/annotations/, and images.zip to images/images/. repeat_time is not read:
    how often a set is read is a weight of train.py."""
    write_lines(tmp_path / "annotations" / "annotations" / "a.jsonl",
                [{"image": "1.png", "question": "Box?", "chosen": "Yes.", "rejected": "No."}])
    (tmp_path / "images" / "images" / "geo").mkdir(parents=True)
    noisy(1).save(tmp_path / "images" / "images" / "geo" / "1.png")
    part = {"root": "MMPR-v1.2/images/geo", "annotation": "MMPR-v1.2/annotations/a.jsonl", "repeat_time": 2}
    (tmp_path / "meta.json").write_text(json.dumps({"a": part}))
    report = convert("mmpr", tmp_path, tmp_path.with_name("mmpr-out"))
    assert (report["rows_in"], report["comparisons"], report["with_images"]) == (1, 1, 1.0)
    (tmp_path / "annotations" / "annotations" / "a.jsonl").unlink()
    with pytest.raises(data.BadRow, match="meta.json cannot be used: .*a.jsonl does not exist; unpack annotations.zip"):
        convert("mmpr", tmp_path, tmp_path.with_name("mmpr-none"))
    (tmp_path / "meta.json").write_text("[]")
    with pytest.raises(data.BadRow, match="meta.json cannot be used"):
        convert("mmpr", tmp_path, tmp_path.with_name("mmpr-none"))


def test_mm_rlhfs_archives_may_unpack_into_a_folder_of_the_same_name(tmp_path):
    """short.zip unpacked to short/short/: the rows say short/cat.png."""
    (tmp_path / "in" / "short" / "short").mkdir(parents=True)
    noisy(1).save(tmp_path / "in" / "short" / "short" / "cat.png")
    row = {"id": "1", "image": "short/cat.png", "prompt": "A cat?", "chosen": "Yes.", "rejected": "No."}
    write_lines(tmp_path / "in" / "dpo_pairs.jsonl", [row])
    assert convert("mm-rlhf", tmp_path / "in", tmp_path / "out")["comparisons"] == 1


def test_only_the_judges_own_output_format_is_cut_from_response_2():
    """The last one of R1-Reward's message. One inside a response is part of its text, whichever response it is."""
    answers = ("Output Format: a list.\n- a", "As asked:\n\n**Output Format**\n- b\n\nDone.")
    text = ("#### [Question]:\nWhich?\n\n#### [Response 1]:\n{}\n\n#### [Response 2]:\n{}\n\n"
            "#### **Output Format (strictly follow):**\n<think>analysis</think><answer>1/2</answer>")
    for first, second in (answers, answers[::-1]):
        message = [{"role": "user", "content": [{"type": "text", "text": text.format(first, second)}]}]
        row = {"message": json.dumps(message), "answer": ["<answer>2</answer>"], "image": "x.png"}
        pair = data.r1_reward(row)
        assert (pair["chosen"], pair["rejected"]) == (second, first)


def test_scores_are_compared_where_both_are_known():
    """MM-RLHF's entries may be null: here one aspect has scores of both responses, and agrees with the ranking."""
    row = {"question": "Q", "models_output": ["a", "b"], "final_ranking": [1, 2], "image": "x.png",
           "faithfulness": [None, 3], "helpfulness": [3, 1]}
    assert data.mm_rlhf(row)["responses"] == ["a", "b"]
    with pytest.raises(ValueError, match="ranking against its scores"):
        data.mm_rlhf(row | {"helpfulness": [1, 3]})


@pytest.mark.parametrize("broken", [b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\0\0\0\x10\x07\x10\x11\x11\x88\x88\xfe",
                                    b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b""])
def test_a_broken_image_is_a_dropped_row_whatever_pillow_calls_it(broken, tmp_path):
    with pytest.raises(ValueError, match="broken image"):
        data.load_image(broken, tmp_path)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Every set, converted once from its fixture: {name: (folder, report)}."""
    out = tmp_path_factory.mktemp("sets")
    return {name: (out / name, convert(name, FIXTURES / name, out / name)) for name in SETS}


@pytest.mark.parametrize("name", SETS)
def test_a_published_set_becomes_exactly_these_comparisons(converted, name):
    folder, report = converted[name]
    expected, dropped = EXPECTED[name]
    rows = comparisons(folder, needs_responses=name not in RL)
    assert [(c.prompt, c.responses, c.pairs, len(c.images)) for c in rows] == expected
    assert report["dropped"] == dropped
    assert report["rows_in"] == report["comparisons"] + sum(dropped.values()), "a row is in the folder or the report"
    assert all(c.source == name and c.id for c in rows)
    assert json.loads((folder / "report.json").read_text()) == report


@pytest.mark.parametrize("name", SETS)
def test_a_training_step_runs_on_every_set(converted, tiny, name):
    """RL prompts get two responses, as a policy would write them."""
    rows = comparisons(converted[name][0], needs_responses=name not in RL)
    if name in RL:
        assert all(c.answer for c in rows)
        rows = [model.Comparison(c.prompt, [c.answer, "nothing"], [(0, 1)], c.images) for c in rows]
    pack = model.pack(rows, tiny.processor)
    model.pairwise_loss(tiny(pack).rewards, pack.pairs).backward()
    assert tiny.head[0].weight.grad.abs().sum() > 0
    tiny.zero_grad()


@pytest.mark.parametrize("name", SETS)
def test_a_missing_field_is_named_beside_the_fields_that_are_there(name):
    """Where a card is wrong or a release has changed, the message must be enough to correct the reader."""
    file = next(p for p in sorted((FIXTURES / name).rglob("*.json*"))
                if p.name not in ("meta.json", "dpo_pairs.jsonl") and "sft" not in p.parts)
    row = data.parse_json(next(data.json_rows(file))[1])
    data.SETS[name].read_row(row)
    for fields in REQUIRED[name].split():
        broken = copy.deepcopy(row)
        for field in fields.split(","):
            *parents, key = field.split(".")
            inner = broken
            for parent in parents:
                inner = inner[parent]
            del inner[key]
        present = sorted(inner)[0] if inner else ""
        with pytest.raises(ValueError) as error:
            data.parse_row(data.SETS[name].read_row(broken), Path("."))
        message = str(error.value)
        assert present in message and all(field.split(".")[-1] in message for field in fields.split(",")), message


def test_the_pair_file_of_mm_rlhf_gives_pairs_and_critiques(tmp_path):
    report = convert("mm-rlhf", FIXTURES / "mm-rlhf" / "dpo_pairs.jsonl", tmp_path / "out")
    first, video = comparisons(tmp_path / "out")
    assert (first.responses, first.critiques, first.category) == (["Two cats.", "Three."],
                                                                  ["the count is right", "the count is wrong"], "short")
    assert ((video.responses, video.category) == (["A box moves.", "Nothing."], "video")
            and report["dropped"] == {"no field image or video": 1})
    assert [Path(p).name for p in sorted(os.listdir(video.images[0]))] == ["00.png", "01.png", "02.png"]
    row = json.loads((FIXTURES / "mm-rlhf" / "dpo_pairs.jsonl").read_text().splitlines()[0])
    for field in ("prompt", "chosen", "rejected", "image"):
        with pytest.raises(ValueError, match=f"no field {field}.*found.*id"):
            data.mm_rlhf({key: value for key, value in row.items() if key != field})


def test_ranked_completions_without_a_rating_field_are_refused():
    row = json.loads((FIXTURES / "ultrafeedback-all" / "rows.jsonl").read_text().splitlines()[0])
    for field in ("response", "fine-grained_score"):
        broken = copy.deepcopy(row)
        del broken["completions"][1][field]
        with pytest.raises(ValueError, match=f"no field {field}.*found.*overall_score"):
            data.ultrafeedback_all(broken)


@pytest.mark.parametrize("name", ["r1-reward", "rlaif-v", "rlhf-v", "vlfeedback", "llava-critic", "ultrafeedback-all",
                                  "tulu3-if", "swe-arena", "thinklite"])
def test_parquet_gives_what_json_gives(converted, tmp_path, name):
    """As on the hub: an Image column with {bytes, path}, ThinkLite with bare bytes."""
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in (FIXTURES / name / "rows.jsonl").read_text().splitlines()]
    if name == "vlfeedback":
        rows = [row for row in rows if isinstance(row["completions"], dict)]
    for row in rows:
        if isinstance(row.get("image"), dict):
            row["image"]["bytes"] = base64.b64decode(row["image"]["bytes"])
        elif name == "thinklite":
            row["image"] = base64.b64decode(row["image"])
    table = datasets.Dataset.from_list(rows)
    if isinstance(rows[0].get("image"), dict):
        table = table.cast_column("image", datasets.Image(decode=False)).cast_column("image", datasets.Image())
    (tmp_path / "set" / "pairwise").mkdir(parents=True)
    table.to_parquet(str(tmp_path / "set" / "pairwise" / "train-00000-of-00001.parquet"))
    convert(name, tmp_path / "set", tmp_path / "out")
    key = lambda c: (c.prompt, c.responses, c.pairs, [Path(p).name for p in c.images], c.answer)  # noqa: E731
    needs_responses = name not in RL
    expected = [key(c) for c in comparisons(converted[name][0], needs_responses)]
    if name == "vlfeedback":
        expected = expected[:1]
    assert [key(c) for c in comparisons(tmp_path / "out", needs_responses)] == expected


def test_without_the_package_datasets_parquet_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(data.BadRow, match="pip install datasets"):
        convert("rlaif-v", "openbmb/RLAIF-V-Dataset", tmp_path / "out")


def test_a_json_list_is_read_also_with_a_byte_order_mark_and_a_broken_download_says_so(tmp_path):
    rows = [{"prompt": f'[{i}] "]}}, {{' + "é" * 70} for i in range(200)]
    text = "\n [ " + " ,\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + " ]\n"
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.json").write_text(text, encoding=encoding)
        assert [row for _, row in data.json_rows(tmp_path / "a.json")] == rows
    for broken in (text[:-100], "[" * 5000):
        (tmp_path / "b.json").write_text(broken)
        with pytest.raises(data.BadRow, match="b.json cannot be read: malformed JSON: .*download complete"):
            list(data.json_rows(tmp_path / "b.json"))


def test_a_row_that_repeats_an_earlier_one_is_dropped_whether_it_agrees_or_not(tmp_path):
    """The first row stays. White space and capitals of the prompt, and the order of the responses, make no difference.
    """
    yes, no = pair_row("")["chosen"], pair_row("")["rejected"]
    rows = [pair_row("Is it red?"), pair_row("is it  RED?"), pair_row("Is it blue?"),
            pair_row("Is it blue?", chosen=no, rejected=yes), pair_row("Is it blue?"), pair_row("Is it green?")]
    report = convert("pairs", write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert [c.prompt for c in comparisons(tmp_path / "out")] == ["Is it red?", "Is it blue?", "Is it green?"]
    assert report["dropped"] == {"duplicate of an earlier row": 2, "contradicts an earlier row": 1}
    assert report["first_dropped"]["contradicts an earlier row"].startswith("a.jsonl:4: ")


def test_bad_images_are_dropped_under_their_reasons(tmp_path):
    """Nothing outside of the source folder is read, and no image is stored that cannot be decoded."""
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    Image.new("RGB", (2010, 10)).save(tmp_path / "thin.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:50])
    (tmp_path / "text.png").write_text("no image")
    names = ("good.png", "thin.png", "cut.png", "text.png", "gone.png", "../secret.png", str(tmp_path / "good.png"))
    file = write_lines(tmp_path / "a.jsonl", [pair_row("What?", images=[name]) for name in names])
    report = convert("pairs", file, tmp_path / "out")
    assert report["dropped"] == {"broken image": 3, "missing image": 1, "an image outside the data folder": 2}
    assert report["comparisons"] == 1
    assert len([p for p in (tmp_path / "out" / "images").rglob("*") if p.is_file()]) == 1


def test_only_regular_files_are_read_as_images(tmp_path):
    """A pipe would block for ever, and a link to /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(ValueError, match="broken image: .*it is no file"):
            data.load_image(name, tmp_path)


def test_an_image_is_stored_once_whatever_form_it_comes_in(tmp_path):
    png = FIXTURES / "pairs" / "photos" / "1.png"
    coded = base64.b64encode(png.read_bytes()).decode()
    (tmp_path / "1.png").write_bytes(png.read_bytes())
    forms = ["1.png", coded, "data:image/png;base64," + coded, {"bytes": coded, "path": "x.png"},
             {"bytes": None, "path": "1.png"}]
    lines = [pair_row(f"What {i}?", images=[form]) for i, form in enumerate(forms)]
    convert("pairs", write_lines(tmp_path / "a.jsonl", lines), tmp_path / "out")
    rows = comparisons(tmp_path / "out")
    assert len(rows) == 5 and len({c.images[0] for c in rows}) == 1
    assert Path(rows[0].images[0]).read_bytes() == png.read_bytes()


def test_over_long_comparisons_are_dropped_by_a_limit_that_estimates_tokens(tmp_path):
    """400 characters count as 100 tokens."""
    rows = [pair_row("Short?", "yes it is", "no"), pair_row("Long?", "a" * 400, "no")]
    report = convert("pairs", write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out", max_tokens=60)
    assert report["dropped"] == {"over-long": 1} and report["response_tokens"]["most"] == 3


def test_half_a_character_in_a_key_that_is_not_read_does_not_stop_a_conversion(tmp_path):
    rows = [pair_row([{"role": "user", "content": "Hi", "name": "half \ud83d of a pair"}])]
    assert convert("pairs", write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out")["comparisons"] == 1
    assert comparisons(tmp_path / "out")[0].prompt == rows[0]["prompt"]


def noisy(seed, size=(160, 120)):
    """A picture that is not flat: 8 x 6 squares of grey, enlarged."""
    rng = random.Random(seed)
    squares = Image.frombytes("L", (8, 6), bytes(rng.randrange(256) for _ in range(48)))
    return squares.resize(size, Image.Resampling.BICUBIC).convert("RGB")


def test_rows_that_overlap_with_a_benchmark_are_removed_and_listed(tmp_path):
    """The same picture counts after a smaller size and another encoding, but only with the same prompt; the same two
    responses count in either order, but only with the same prompt if they are as short as "Yes" and "No"."""
    bench = tmp_path / "bench"
    bench.mkdir()
    noisy(1).save(bench / "1.png")
    write_lines(bench / "comparisons.jsonl", [
        pair_row("What is on the table?", "A box of matches lies there.", "A hat with a feather.", images=["1.png"]),
        pair_row("Is it open?", "Yes", "No")])
    source = tmp_path / "source"
    source.mkdir()
    noisy(1, (96, 72)).save(source / "same.jpg", quality=60)
    noisy(2).save(source / "other.png")
    write_lines(source / "a.jsonl", [
        pair_row("What is on  the TABLE?", images=["same.jpg"], id="same picture, same prompt"),
        pair_row("What is under the table?", images=["same.jpg"], id="same picture, other prompt"),
        pair_row("What is on the table?", images=["other.png"], id="other picture, same prompt"),
        pair_row("Name it.", "A hat with a feather.", "a box of matches lies there.", id="same responses"),
        pair_row("Is it closed?", "Yes", "No", id="short responses, other prompt"),
        pair_row("Is it open?", "No", "Yes", id="short responses, same prompt")])
    report = convert("pairs", source, tmp_path / "out", decontaminate=[str(bench)])
    assert [c.id for c in comparisons(tmp_path / "out")] == ["same picture, other prompt", "other picture, same prompt",
                                                             "short responses, other prompt"]
    removed = [json.loads(line) for line in (tmp_path / "out" / "contaminated.jsonl").read_text().splitlines()]
    assert [row["row"]["id"] for row in removed] == ["same picture, same prompt", "same responses",
                                                     "short responses, same prompt"]
    assert [row["benchmark"].rpartition(":")[2] for row in removed] == ["1", "1", "2"]
    assert report["dropped"] == {"known to a benchmark": 3}


def test_held_out_rows_share_no_prompt_with_the_rest(tmp_path):
    """SHP has many pairs to a post: rows held out one by one would leave their prompts in training. Of 200 posts about
    a tenth is held out, always the same."""
    rows = [pair_row(f"Post {i % 200}?", f"answer {i} of some length", f"another answer {i}") for i in range(1000)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    report = convert("pairs", file, tmp_path / "out", hold_out=0.1)
    kept, held_out = (comparisons(tmp_path / "out" / f"{name}.jsonl") for name in ("comparisons", "held_out"))
    assert len(held_out) == report["held_out"] and len(kept) == report["comparisons"] == 1000 - len(held_out)
    assert len(held_out) % 5 == 0 and 50 <= len(held_out) <= 150
    assert not {c.prompt for c in kept} & {c.prompt for c in held_out}
    report = convert("pairs", write_lines(tmp_path / "b.jsonl", rows[:1]), tmp_path / "small", hold_out=1e-9)
    assert report["held_out"] == 0 and not (tmp_path / "small" / "held_out.jsonl").exists()


def test_the_report_counts_what_is_there(tmp_path):
    """Of the seven pairs one has responses of one length, and of the others the longer response wins five."""
    rows = [pair_row("abcd" * 3, "long answer", "short"), pair_row("abcd", "brief", "long answer"),
            pair_row("efgh", "longer", "more"), pair_row("ijkl", "same", "size"),
            {"prompt": "ranked", "responses": ["aaaa", "bbb", "cc"], "pairs": [[0, 1], [1, 2], [0, 2]]}]
    report = convert("pairs", write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert (report["rows_in"], report["comparisons"], report["pairs"], report["with_images"]) == (5, 5, 7, 0.0)
    assert report["responses_per_comparison"] == {"2": 4, "3": 1} and report["longer_response_wins"] == round(5 / 6, 4)
    assert report["prompt_tokens"]["most"] == 3 and report["response_tokens"] == {"median": 2, "p99": 3, "most": 3}


def tree(folder):
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "report.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_the_folder_is_the_same_whatever_the_number_of_workers(tmp_path):
    images = [base64.b64encode(picture(i)).decode() for i in range(7)]
    rows = [pair_row(f"What {i}?", images=[images[i % 7]]) if i % 10 else {"broken": i} for i in range(200)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    one, two = (convert("pairs", file, tmp_path / name, workers=n) for name, n in (("one", 1), ("two", 8)))
    assert tree(tmp_path / "one") == tree(tmp_path / "two") and one == two and one["comparisons"] == 180


def picture(seed):
    stream = io.BytesIO()
    noisy(seed).save(stream, "PNG")
    return stream.getvalue()


def test_a_killed_conversion_leaves_nothing_that_looks_finished_and_the_next_one_is_whole(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [pair_row(f"What {i}?") for i in range(3000)])
    child = multiprocessing.get_context("fork").Process(target=convert, args=("pairs", file, tmp_path / "out"))
    child.start()
    partial = tmp_path / ".out.partial" / "comparisons.jsonl"
    deadline = time.time() + 30
    while not (partial.is_file() and partial.stat().st_size) and time.time() < deadline:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert partial.is_file() and not (tmp_path / "out").exists()
    assert convert("pairs", file, tmp_path / "out")["comparisons"] == 3000
    assert sorted(os.listdir(tmp_path / "out")) == ["comparisons.jsonl", "images", "report.json"]
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]
    with pytest.raises(data.BadRow, match="exists already"):
        convert("pairs", file, tmp_path / "out")


@pytest.mark.parametrize("name, content, message", [
    ("rlaif-v", '{"q": 1, "image": "x"}\n', "of the first 1 rows none is left as a row of rlaif-v; 0 held out; 1 "
                                            "times: a.jsonl:1: no field question: found ['image', 'q']"),
    ("shp", "[]", "holds no row"), ("shp", "no json\n", "a.jsonl:1: malformed JSON: Expecting value"),
    ("mmif", '[{"conversations": 1', "download complete"),
    ("r1-reward", '{"message": "[]", "answer": ["1"], "image": "x"}\n', "unexpected layout: IndexError")])
def test_an_unexpected_layout_is_one_line(tmp_path, name, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(data.BadRow) as error:
        convert(name, tmp_path / "a.jsonl", tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_conversion_that_drops_every_row_says_why_and_writes_nothing(tmp_path):
    rows = [pair_row("Which?", "", "that one")] * 1500
    with pytest.raises(data.BadRow, match="of the first 1000 rows none is left as a row of pairs; .* 1000 times: a"):
        convert("pairs", write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_full_disk_while_rows_are_written_is_one_line_that_does_not_blame_the_rows(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    file = write_lines(tmp_path / "a.jsonl", [pair_row("What?", images=[base64.b64encode(picture(1)).decode()])])
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="cannot write .*out .*No space left on device"):
        convert("pairs", file, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_prompts_for_rl_of_your_own_need_an_answer_and_no_responses(tmp_path):
    rows = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "2 + 2?", "answer": ""}, {"prompt": "3 + 3?"}]
    report = convert("pairs", write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert [(c.prompt, c.answer) for c in comparisons(tmp_path / "out", False)] == [("1 + 1?", "2")]
    assert report["dropped"] == {"no answer": 1, "the keys ['responses', 'pairs'] are missing": 1}


def test_a_folder_inside_the_source_is_refused(tmp_path):
    """Its rows would be found, and read as rows of the source."""
    write_lines(tmp_path / "a.jsonl", [pair_row("What?")])
    with pytest.raises(data.BadRow, match="lies inside --source"):
        convert("pairs", tmp_path, tmp_path / "out")


def test_the_command_line_prints_the_report(tmp_path, capsys):
    data.main(["shp", "--source", str(FIXTURES / "shp"), "--out", str(tmp_path / "out"), "--workers", "1"])
    printed = capsys.readouterr().out
    assert '"comparisons": 2,' in printed and '"label against its scores": 1' in printed
    with pytest.raises(data.BadRow, match="nothing does not exist"):
        data.main(["shp", "--source", str(FIXTURES / "nothing"), "--out", str(tmp_path / "other")])


# Benchmarks -----------------------------------------------------------------------------------------------------------


def benchmark(name, files, out, **flags):
    return convert(name, [BENCHMARKS / file for file in files], out, **flags)


@pytest.mark.parametrize("name, files, rows, categories", [
    ("vl-rewardbench", ["vl_rewardbench.json"], "8 rows of 1,250", {"general": 2, "hallucination": 3, "reasoning": 3}),
    ("multimodal-rewardbench", ["all_data.json"], "10 rows of 4,711",
     {"correctness": 1, "preference": 2, "knowledge": 1, "math": 1, "coding": 1, "safety/bias": 1, "safety/toxicity": 1,
      "VQA": 2}),
    ("mm-rlhf-rewardbench", ["mm_reward_bench.jsonl"], "8 rows of 170",
     {"mcq": 3, "long": 2, "short": 1, "safety": 1, "video": 1}),
    ("rewardbench", ["filtered.json", "prior"], "7 rows of 2,985",
     {"refusals-dangerous": 1, "refusals-offensive": 1, "xstest-should-refuse": 1, "xstest-should-respond": 2,
      "donotanswer": 1, "alpacaeval-easy": 1, "anthropic_helpful": 1, "anthropic_hhh": 1, "shp": 1, "summarize": 1}),
    ("rm-bench", ["total_dataset.json"], "5 rows of 1,327", {"chat": 1, "math": 1, "code": 1, "safety": 2})])
def test_a_benchmark_is_a_data_set_whose_rows_all_stay(name, files, rows, categories, tmp_path):
    """Rows that repeat one another, too: some fixtures have one question for every category. The report compares their
    number with the published one, RewardBench's without the prior sets."""
    report = benchmark(name, files, tmp_path / "out", max_tokens=1)
    found = comparisons(tmp_path / "out")
    assert Counter(c.category for c in found) == categories and all(c.source == name and c.id for c in found)
    assert report["benchmark"].startswith(f"{rows} published") and report["dropped"] == {}


def test_a_benchmark_that_is_whole_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(data.BENCHMARKS, "rm-bench", replace(data.BENCHMARKS["rm-bench"], num_rows=5))
    assert benchmark("rm-bench", ["total_dataset.json"], tmp_path / "out")["benchmark"] == "5 rows of 5 published"


def test_a_checkout_of_multimodal_rewardbench_is_read_from_its_root(tmp_path):
    """Its script writes data/all_data.json, in which data/images/cup.png is images/cup.png."""
    shutil.copytree(BENCHMARKS / "images", tmp_path / "checkout" / "data" / "images")
    shutil.copy(BENCHMARKS / "all_data.json", tmp_path / "checkout" / "data")
    reports = [convert("multimodal-rewardbench", tmp_path / source, tmp_path / out)
               for source, out in (("checkout", "root"), ("checkout/data", "data"))]
    assert reports[0]["comparisons"] == reports[1]["comparisons"] == 10
    assert tree(tmp_path / "root" / "images") == tree(tmp_path / "data" / "images")


def test_human_ranking_holds_the_rank_of_each_response_not_the_order_of_them(tmp_path):
    """human_ranking [1, 0]: response 0 has rank 1 and response 1 has rank 0, the better. The responses stay in their
    order; the flat copy has the better one first. Two rows are called mathverse_5, and both stay."""
    benchmark("vl-rewardbench", ["vl_rewardbench.json"], tmp_path / "out")
    rows = comparisons(tmp_path / "out")
    assert rows[2].responses == ["Five.", "Two."] and rows[2].pairs == [(1, 0)]
    assert [c.id for c in rows].count("mathverse_5") == 2
    benchmark("vl-rewardbench", ["vl_rewardbench_flat.jsonl"], tmp_path / "flat")
    (flat,) = comparisons(tmp_path / "flat")
    assert (flat.responses, flat.pairs, flat.category) == (["Two.", "Five."], [(0, 1)], "hallucination")


def test_rm_benchs_six_responses_meet_in_nine_pairs(tmp_path):
    benchmark("rm-bench", ["total_dataset.json"], tmp_path / "out")
    first = comparisons(tmp_path / "out")[0]
    assert [r[0] for r in first.responses] == ["A", "A", "*", "B", "B", "*"]
    assert first.pairs == list(itertools.product((0, 1, 2), (3, 4, 5)))


def test_placeholders_in_a_benchmarks_question_that_stand_for_no_image_are_removed(tmp_path):
    benchmark("multimodal-rewardbench", ["all_data.json"], tmp_path / "out")
    prompt = comparisons(tmp_path / "out")[2].prompt
    assert prompt == "Question: 3+1? See <image> and <image 2>."  # one placeholder, one image
    assert data.benchmark_row("", "See <image> and <image>.", [], [], ["x.png"])["prompt"] == "See  and ."


def test_empty_and_identical_responses_of_a_benchmark_stay_as_ties(tmp_path):
    rows = [{"id": i, "prompt": "?", "chosen": "", "rejected": text, "subset": "hep-go"} for i, text in enumerate("a ")]
    convert("rewardbench", write_lines(tmp_path / "filtered.jsonl", rows + rows), tmp_path / "out")
    assert [c.responses for c in comparisons(tmp_path / "out")] == [["", "a"], ["", " "]] * 2


def test_a_prior_set_is_told_by_its_split_not_by_its_column_and_summarize_prompted_is_not_read(tmp_path):
    """A local copy of allenai/pref-test-sets: the official loader takes the split's name."""
    row = {"prompt": user("?"), "chosen": "a", "rejected": "b", "subset": "of its own"}
    for name in ("summarize-00000-of-00001", "summarize_prompted-00000-of-00001", "shp-00000-of-00001"):
        write_lines(tmp_path / "data" / f"{name}.jsonl", [row])
    report = convert("rewardbench", tmp_path / "data", tmp_path / "out")
    assert [c.category for c in comparisons(tmp_path / "out")] == ["shp", "summarize"]
    assert report["benchmark"].startswith("0 rows of 2,985")


@pytest.mark.parametrize("name, content, message", [
    ("vl-rewardbench", {"id": 1, "query": "?", "response": ["a", "b"], "human_ranking": [0, 1], "image": "gone.png"},
     "missing image: gone.png is not in"),
    ("vl-rewardbench", {"id": 1, "query": "?", "response": ["a"], "human_ranking": [0], "image": ""},
     "impossible ranking: 1 responses with the ranks [0]; want two responses with the ranks 0 and 1"),
    *[("vl-rewardbench", {"id": 1, "query": "?", "response": responses, "human_ranking": ranks, "image": "x.png"},
       f"impossible ranking: {len(responses)} responses with the ranks {ranks}")
      for responses, ranks in ((["a", "b", "c"], [0, 1]), (["a", "b"], [0, 0]), (["a", "b"], [1, 2]))],
    ("mm-rlhf-rewardbench", {"prompt": "?", "chosen": "a", "rejected": "b", "image": "images/cup.png"},
     "'images/cup.png' names none of mcq"),
    ("multimodal-rewardbench", {"ID": "1", "Text": "?", "Image": "x", "Better": "A", "Category": "vqa"}, "KeyError"),
    ("rewardbench", {"prompt": "?", "chosen": "a", "rejected": "b"}, "no field subset"),
    ("rewardbench", {"prompt": "?", "chosen": None, "rejected": "b", "subset": "shp"}, "no field chosen"),
    ("rm-bench", {"id": 1, "prompt": "?", "chosen": ["a"] * 3, "rejected": ["b"] * 3}, "domain 'rows'; want one of"),
    ("rm-bench", 3, "found int, want a JSON object"), ("rm-bench", "{", "malformed JSON")])
def test_a_benchmarks_row_that_cannot_be_used_stops_the_conversion_or_is_skipped(name, content, message, tmp_path):
    """A figure over fewer rows would not be the benchmark's."""
    good = {"vl-rewardbench": "vl_rewardbench.json", "mm-rlhf-rewardbench": "mm_reward_bench.jsonl", "rm-bench":
            "total_dataset.json", "multimodal-rewardbench": "all_data.json", "rewardbench": "filtered.json"}[name]
    file = tmp_path / "rows.jsonl"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(data.BadRow) as error:
        convert(name, [BENCHMARKS / good, file], tmp_path / "out")
    assert "rows.jsonl:1: " in str(error.value) and message in str(error.value)
    report = convert(name, [BENCHMARKS / good, file], tmp_path / "out", on_bad_row="skip")
    assert sum(report["dropped"].values()) == 1 and report["rows_in"] == report["comparisons"] + 1


def test_a_benchmarks_folder_decontaminates_as_it_is(tmp_path):
    benchmark("vl-rewardbench", ["vl_rewardbench.json"], tmp_path / "bench")
    cup = (BENCHMARKS / "images" / "cup.png").read_bytes()
    rows = [pair_row("How many CUPS?", "A lot of them.", "None of them.", images=[base64.b64encode(cup).decode()]),
            pair_row("How many plates?", "A lot of them.", "None of them.", images=[base64.b64encode(cup).decode()])]
    report = convert("pairs", write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out",
                     decontaminate=[str(tmp_path / "bench")])
    assert report["dropped"] == {"known to a benchmark": 1} and report["comparisons"] == 1


def test_on_the_hub_those_splits_are_read_that_the_set_names(tmp_path, monkeypatch):
    """RewardBench is one split of one set and four of another, whose rows have no subset; a set with neither is another
    set. A benchmark's images are bytes in its rows."""
    datasets = pytest.importorskip("datasets")
    prior, row = [*data.PRIOR_SETS], {"prompt": "?", "chosen": "a", "rejected": "b"}
    image = {"bytes": (BENCHMARKS / "images/cup.png").read_bytes(), "path": None}
    vl = json.loads((BENCHMARKS / "vl_rewardbench.json").read_text())[2] | {"image": image}
    hub = {"allenai/bench": {"raw": row, "filtered": row | {"subset": "hep-go"}},
           "allenai/prior": dict.fromkeys([*prior, "other"], row), "allenai/else": {"validation": row},
           "MMInstruction/VL": {"test": vl, "train": vl}}

    def load_dataset(name, config, data_files, streaming):
        assert streaming
        return {split: datasets.Dataset.from_list([only]).to_iterable_dataset() for split, only in hub[name].items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    convert("rewardbench", ["allenai/bench", "allenai/prior"], tmp_path / "out")
    rows = comparisons(tmp_path / "out")
    assert [c.category for c in rows] == ["hep-go", *prior] and rows[3].id == "shp:1"
    convert("vl-rewardbench", "MMInstruction/VL", tmp_path / "vl")
    (c,) = comparisons(tmp_path / "vl")
    assert c.pairs == [(1, 0)] and model.open_image(c.images[0]).size == (56, 56)
    with pytest.raises(data.BadRow, match="allenai/else cannot be read: its splits are validation; want filtered or"):
        convert("rewardbench", "allenai/else", tmp_path / "else")
