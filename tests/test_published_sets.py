"""Each published set, from a few invented rows in its published layout to a step of training; and what curation does to them.

The rows lie in tests/fixtures/NAME; images that a parquet file holds as bytes stand there in base64, as JSON has no bytes. In every
set at least one row is bad.
"""
import base64
import copy
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import data
import model

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
RL = ("vstar", "arxivqa", "thinklite")
CHAT = [[{"role": "user", "content": "List 3 pets, no letter e."}],
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! What now?"},
         {"role": "user", "content": "Count to 2."}]]
MESSAGE_LISTS = ([(CHAT[0], ["Dog, cat, fish", "Rabbit, eel"], [(0, 1)], 0), (CHAT[1], ["1, 2", "2, 1"], [(0, 1)], 0)],
                 {"chosen and rejected part before their last message, so there is no common prompt": 1})


def user(text):
    return [{"role": "user", "content": text}]


# name: ([(prompt, responses, pairs, number of images)], {reason: rows dropped})
WANTED = {
    "r1-reward": ([("What colour is the bus?", ["Red.", "Blue.\n\n# Indeed"], [(0, 1)], 1), ("How many?", ["Three.", "Two."], [(0, 1)], 1)],
                  {"unparsable verdict": 1}),
    "mm-rlhf": ([("How many cats?", ["Two cats.", "Two.", "Three."], [(0, 1), (0, 2), (1, 2)], 1),
                 ("What happens?", ["A box moves.", "Nothing.", "A box."], [(0, 1), (0, 2)], 1)],
                {"ranking against its scores": 1, "tie or unrated": 1}),
    "rlaif-v": ([("Describe the dog.", ["A brown dog on grass.", "Two dogs on sand."], [(0, 1)], 1),
                 ("Is it late?", ["It is noon.", "It is night."], [(0, 1)], 1)], {"broken image": 1}),
    "mmpr": ([("<image>\nFind x. End with 'Final Answer: ..'",
               ["So x is 3. Final Answer: 3", "So x is 4. Final Answer: 4"], [(0, 1)], 1)] * 2
             + [("What is 2 + 2?", ["Final Answer: 4", "Final Answer: 5"], [(0, 1)], 0)] * 2  # repeat_time 2, and then 0.5
             + [(f"First <image> then <image>: which is larger, question {i}?", ["The first.", "The second."], [(0, 1)], 2)
                for i in (0, 2, 3, 4)],
             {"missing image": 2}),
    "mmif": ([(user("<image>\nDescribe in exactly 2 sentences."), ["A lake. It is calm.", "A calm lake lies here."], [(0, 1)], 1),
              (user("<image>\nAnswer in capitals."), ["A LAKE.", "A lake."], [(0, 1)], 1)], {"pair [N, N] has two identical responses": 1}),
    "omnialign": ([("Why is this bridge famous?", ["It spans the widest river of the land.", "It is a bridge."], [(0, 1)], 1),
                   ("What is announced?", ["A concert on Friday.", "A poster."], [(0, 1)], 1)], {"response N is empty": 1}),
    "ultrafeedback-all": ([("Plan a picnic.", ["Bring bread, fruit and water.", "Bring bread.", "Bring fruit.", "No."],
                            [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)], 0),
                           ("Add 1 and 2.", ["3", "5"], [(0, 1)], 0)], {"tie or unrated": 2}),
    "ultrafeedback-hard": ([("Plan a picnic.", ["Bring bread, fruit and water.", "No."], [(0, 1)], 0),
                            ("Add 1 and 2.", ["3", "5"], [(0, 1)], 0)], {"tie or unrated": 2}),
    "shp": ([("Why is my bread flat?", ["Old yeast.", "No idea"], [(0, 1)], 0), ("How hot?", ["220 degrees.", "Hot."], [(0, 1)], 0)],
            {"label against its scores": 1}),
    "tulu3-if": MESSAGE_LISTS, "olmo2": MESSAGE_LISTS, "skywork": MESSAGE_LISTS, "wildchat-uf": MESSAGE_LISTS,
    "swe-arena": ([(user("Make a clock page."), ["<html>clock</html>", "<p>no</p>"], [(0, 1)], 0),
                   ("Sort a list.", ["print(sorted(a))", "a.sort"], [(0, 1)], 0)], {"tie or no vote": 2}),
    "vlfeedback": ([("What is shown?", ["A red box on a ground.", "A box.", "Box."], [(0, 1), (0, 2)], 1),
                    ("Which colour?", ["Grey.", "Green."], [(0, 1)], 1)], {"tie or unrated": 1}),
    "rlhf-v": ([("What is shown?", ["a bus", "two buses"], [(0, 1)], 1), ("Where?", ["on a road", "in a lake"], [(0, 1)], 1)],
               {"no field rejected": 1}),
    "llava-critic": ([("What is this?", ["A seven [7].", "A cross."], [(0, 1)], 1), ("How old?", ["About 90 years.", "Old."], [(0, 1)], 1)],
                     {"tie or no verdict": 1, "another judge's format": 1}),
    "pairs": ([("<image>\nWhat is shown?", ["A box.", "Two boxes.", "A car."], [(0, 1), (0, 2)], 1),
               ("Name a fruit.", ["Apple", "Table"], [(0, 1)], 0),
               ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
                ["A box.", "A cat."], [(0, 1)], 1)],
              {"missing image": 1}),
    "vstar": ([("What colour is the cup?", [], [], 1), ("What is small?", [], [], 1)], {"missing image": 1}),
    "arxivqa": ([("Which line rises?\nA) red\nB) blue\nC) none\nAnswer with the letter.", [], [], 1),
                 ("Which line falls?\nA) red\nB) blue\nAnswer with the letter.", [], [], 1)], {"unparsable label": 1}),
    "thinklite": ([("<image>Find the angle.", [], [], 1), ("<image>Find the area.", [], [], 1)], {"no answer": 1}),
}
# the fields without which a row means nothing; a dot leads into a field, a | gives the row to take: mm-rlhf has two layouts
REQUIRED = {
    "r1-reward": "message answer image", "mm-rlhf": "question models_output final_ranking image,video",
    "rlaif-v": "question chosen rejected image",
    "mmpr": "question chosen rejected", "mmif": "conversations chosen chosen.value rejected rejected.value images",
    "omnialign": "prompt chosen rejected image",
    "ultrafeedback-all": "instruction completions", "ultrafeedback-hard": "instruction completions",
    "shp": "history human_ref_A human_ref_B labels score_A score_B", "tulu3-if": "chosen rejected", "olmo2": "chosen rejected",
    "skywork": "chosen rejected", "wildchat-uf": "chosen rejected",
    "swe-arena": "feedback feedback.vote_type states states.model_A states.model_B states.model_A.messages instruction",
    "vlfeedback": "prompt completions completions.response completions.annotations image", "rlhf-v": "text image",
    "llava-critic": "conversations image", "pairs": "prompt responses pairs", "vstar": "image question answer",
    "arxivqa": "question options label image", "thinklite": "problem answer image",
}


def convert(name, source, out, **flags):
    return data.convert(name, data.Config(source=str(source), out=str(out), **{"workers": 1} | flags))


def comparisons(folder, needs_responses=True):
    rows = data.read_comparisons(folder, needs_responses)
    return [rows[i] for i in range(len(rows))]


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pair_row(prompt, chosen="Yes, it is a red box on the table.", rejected="No, there is nothing on the table.", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def test_a_contradicted_row_goes_with_all_its_copies(tmp_path):
    """MMPR shows the first part twice; the second part says the opposite of its first row."""
    write_lines(tmp_path / "in" / "a.jsonl", [{"question": "Box?", "chosen": "Yes.", "rejected": "No."},
                                              {"question": "Cup?", "chosen": "Yes.", "rejected": "No."}])
    write_lines(tmp_path / "in" / "b.jsonl", [{"question": "Box?", "chosen": "No.", "rejected": "Yes."}])
    parts = {name: {"root": "pictures", "annotation": f"{name}.jsonl", "repeat_time": times} for name, times in (("a", 2), ("b", 1))}
    (tmp_path / "in" / "meta.json").write_text(json.dumps(parts))
    report = convert("mmpr", tmp_path / "in", tmp_path / "out")
    assert [c.prompt for c in comparisons(tmp_path / "out")] == ["Cup?", "Cup?"]
    assert report["rows_in"] == 5 and report["comparisons"] == 2 and report["dropped"] == {"contradicted by another row": 3}


def test_scores_are_compared_where_both_are_known():
    """MM-RLHF's entries may be null: here one aspect knows both responses, and it agrees with the ranking."""
    row = {"question": "Q", "models_output": ["a", "b"], "final_ranking": [1, 2], "image": "x.png", "faithfulness": [None, 3],
           "helpfulness": [3, 1]}
    assert data.mm_rlhf(row)["responses"] == ["a", "b"]
    with pytest.raises(ValueError, match="ranking against its scores"):
        data.mm_rlhf(row | {"helpfulness": [1, 3]})


@pytest.mark.parametrize("broken", [b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\0\0\0\x10\x07\x10\x11\x11\x88\x88\xfe",
                                    b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b""])
def test_a_broken_image_is_a_dropped_row_whatever_pillow_calls_it(broken, tmp_path):
    rows = [pair_row("What is shown?", images=[broken]), pair_row("Name a fruit.", "Apple.", "Table.")]
    made = [data.own_pairs(row) for row in rows]
    job = data.Job("pairs", tmp_path, 1000, "", ({}, {}))
    with pytest.raises(ValueError, match="broken image"):
        data.curate(made[0], job, tmp_path, "here:1")
    assert data.curate(made[1], job, tmp_path, "here:2")[0]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Every set, converted once from its fixture: {name: (folder, report)}."""
    out = tmp_path_factory.mktemp("sets")
    return {name: (out / name, convert(name, FIXTURES / name, out / name)) for name in data.SETS}


@pytest.mark.parametrize("name", WANTED)
def test_a_published_set_becomes_exactly_these_comparisons(converted, name):
    folder, report = converted[name]
    wanted, dropped = WANTED[name]
    found = comparisons(folder, needs_responses=name not in RL)
    assert [(c.prompt, c.responses, c.pairs, len(c.images)) for c in found] == wanted
    assert report["dropped"] == dropped
    assert report["rows_in"] == report["comparisons"] + sum(dropped.values()), "every row is in the folder or in the report"
    assert all(c.source == name and c.id for c in found)
    assert json.loads((folder / "report.json").read_text()) == report


def test_every_set_has_a_fixture_and_a_list_of_required_fields():
    assert set(data.SETS) == set(WANTED) == set(REQUIRED)


@pytest.mark.parametrize("name", WANTED)
def test_a_training_step_runs_on_every_set(converted, tiny, name):
    """RL prompts get two responses, as a policy would write them."""
    found = comparisons(converted[name][0], needs_responses=name not in RL)
    if name in RL:
        assert all(c.answer for c in found)
        found = [model.Comparison(c.prompt, [c.answer, "nothing"], [(0, 1)], c.images) for c in found]
    pack = model.pack(found, tiny.tokenizer, tiny.image_processor)
    model.pairwise_loss(tiny(pack), pack.pairs).backward()
    assert tiny.head[0].weight.grad.abs().sum() > 0
    tiny.zero_grad()


@pytest.mark.parametrize("name", WANTED)
def test_a_missing_field_is_named_beside_the_fields_that_are_there(name):
    """Where a card is wrong or a release has changed, the message must be enough to mend the function."""
    file = next(p for p in sorted((FIXTURES / name).rglob("*.json*"))
                if p.name not in ("meta.json", "dpo_pairs.jsonl") and "sft" not in p.parts)
    _, _, row = next(data.json_rows(file))
    row = data.from_json(row)
    data.parse_row(data.SETS[name][0](row) | {"images": []}, Path("."), False) if "image" not in str(row) else data.SETS[name][0](row)
    for fields in REQUIRED[name].split():
        broken = copy.deepcopy(row)
        for field in fields.split(","):
            *path, last = field.split(".")
            inner = broken
            for step in path:
                inner = inner[step]
            del inner[last]
        there = sorted(inner)[0] if inner else ""
        with pytest.raises(ValueError) as caught:
            data.parse_row(data.SETS[name][0](broken), Path("."))
        assert all(field.split(".")[-1] in str(caught.value) for field in fields.split(",")) and there in str(caught.value), caught.value


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


@pytest.mark.parametrize("name", ["r1-reward", "rlaif-v", "rlhf-v", "vlfeedback", "llava-critic", "ultrafeedback-all", "tulu3-if",
                                  "swe-arena", "thinklite"])
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
    rl = name not in RL
    wanted = [key(c) for c in comparisons(converted[name][0], rl)]
    if name == "vlfeedback":
        wanted = wanted[:1]
    assert [key(c) for c in comparisons(tmp_path / "out", rl)] == wanted


def test_without_the_package_datasets_parquet_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(data.BadRow, match="pip install datasets"):
        convert("rlaif-v", "openbmb/RLAIF-V-Dataset", tmp_path / "out")


def test_a_json_list_is_read_in_pieces_wherever_they_part(tmp_path):
    """More than one piece of 1 MB, with texts that hold brackets and quotes; and a download that broke off is not taken for the end."""
    rows = [{"prompt": f'[{i}] "]}}, {{' + "é" * 700} for i in range(2000)]
    (tmp_path / "a.json").write_text("\n [ " + " ,\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + " ]\n", encoding="utf-8")
    assert [row for _, _, row in data.json_rows(tmp_path / "a.json")] == rows
    (tmp_path / "b.json").write_text((tmp_path / "a.json").read_text()[:-1000])
    with pytest.raises(data.BadRow, match="after row 1998.*download complete"):
        list(data.json_rows(tmp_path / "b.json"))


def test_duplicates_go_once_and_contradictions_altogether(tmp_path):
    """Whitespace and capitals of the prompt, and the order of the responses, make no difference."""
    rows = [pair_row("Is it red?"), pair_row("is it  RED?"), pair_row("Is it blue?"),
            pair_row("Is it blue?", chosen=pair_row("")["rejected"], rejected=pair_row("")["chosen"]),
            pair_row("Is it blue?"), pair_row("Is it green?")]
    report = convert("pairs", write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert [c.prompt for c in comparisons(tmp_path / "out")] == ["Is it red?", "Is it green?"]
    assert report["dropped"] == {"contradicted by another row": 3, "duplicate of an earlier row": 1}


def test_bad_images_are_dropped_under_their_reasons(tmp_path):
    """Nothing outside the source folder is read, and no image is stored that does not decode."""
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    Image.new("RGB", (2010, 10)).save(tmp_path / "thin.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:50])
    (tmp_path / "text.png").write_text("no image")
    names = ("good.png", "thin.png", "cut.png", "text.png", "gone.png", "../secret.png", str(tmp_path / "good.png"))
    report = convert("pairs", write_lines(tmp_path / "a.jsonl", [pair_row("What?", images=[name]) for name in names]), tmp_path / "out")
    assert report["dropped"] == {"missing image": 3, "broken image": 2, "absurd aspect ratio": 1} and report["comparisons"] == 1
    assert len([p for p in (tmp_path / "out" / "images").rglob("*") if p.is_file()]) == 1


def test_an_image_is_stored_once_whatever_form_it_comes_in(tmp_path):
    png = FIXTURES / "pairs" / "photos" / "1.png"
    coded = base64.b64encode(png.read_bytes()).decode()
    (tmp_path / "1.png").write_bytes(png.read_bytes())
    forms = ["1.png", coded, "data:image/png;base64," + coded, {"bytes": coded, "path": "x.png"}, {"bytes": None, "path": "1.png"}]
    lines = [pair_row(f"What {i}?", images=[form]) for i, form in enumerate(forms)]
    convert("pairs", write_lines(tmp_path / "a.jsonl", lines), tmp_path / "out")
    found = comparisons(tmp_path / "out")
    assert len(found) == 5 and len({c.images[0] for c in found}) == 1 and Path(found[0].images[0]).read_bytes() == png.read_bytes()


def test_over_long_comparisons_are_dropped_by_a_limit_that_counts_or_estimates_tokens(tmp_path, tiny):
    file = write_lines(tmp_path / "a.jsonl", [pair_row("Short?", "yes it is", "no"), pair_row("Long?", "a" * 400, "no")])
    report = convert("pairs", file, tmp_path / "out", max_tokens=60)
    assert report["dropped"] == {"over-long": 1} and "estimated" in report["tokens_are"]
    tiny.tokenizer.save_pretrained(tmp_path / "tokenizer")
    counted = convert("pairs", file, tmp_path / "counted", tokenizer=str(tmp_path / "tokenizer"))
    assert counted["response_tokens"]["most"] == len(tiny.tokenizer("a" * 400).input_ids)


def noisy(seed, size=(160, 120)):
    """A picture with something in it: 8 x 6 squares of grey, enlarged."""
    rng = random.Random(seed)
    return Image.frombytes("L", (8, 6), bytes(rng.randrange(256) for _ in range(48))).resize(size, Image.Resampling.BICUBIC).convert("RGB")


def test_rows_that_a_benchmark_knows_are_removed_and_listed(tmp_path):
    """The same picture counts after a smaller size and another encoding, but only with the same prompt; the same two responses count in
    either order, but only with the same prompt if they are as short as "Yes" and "No"."""
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
    assert [row["row"]["id"] for row in removed] == ["same picture, same prompt", "same responses", "short responses, same prompt"]
    assert [row["benchmark"].rpartition(":")[2] for row in removed] == ["1", "1", "2"] and report["dropped"] == {"known to a benchmark": 3}


def test_held_out_rows_share_no_prompt_with_the_rest(tmp_path):
    """SHP has many pairs to a post: rows held out one by one would leave their prompts in training."""
    rows = [pair_row(f"Post {i % 20}?", f"answer {i} of some length", f"another answer {i}") for i in range(100)]
    report = convert("pairs", write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out", hold_out=12)
    kept, held_out = (comparisons(tmp_path / "out" / file) for file in ("comparisons.jsonl", "held_out.jsonl"))
    assert len(held_out) == report["held_out"] == 15 and len(kept) == report["comparisons"] == 85  # five pairs to a post
    assert not {c.prompt for c in kept} & {c.prompt for c in held_out}
    assert len(data.read_comparisons(tmp_path / "out")) == 85


def test_a_benchmark_in_memory_can_be_written_as_a_folder_to_decontaminate_with(tmp_path):
    """Images and frame folders of evaluate.py's readers lie in memory or in files."""
    rows = [model.Comparison("What is on the table?", ["A box of matches.", "A hat with a feather."], [(0, 1)], [noisy(1)]),
            model.Comparison("What happens?", ["A box moves.", "Nothing at all happens."], [(0, 1)],
                             [str(FIXTURES / "mm-rlhf" / "video" / "clip9")])]
    data.write_comparisons(tmp_path / "bench", rows, bar=False)
    by_pair, by_prompt = data.read_benchmarks([tmp_path / "bench"])
    assert len(by_pair) == len(by_prompt) == 2 and len(os.listdir(comparisons(tmp_path / "bench")[1].images[0])) == 3


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
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "report.json"}


def test_the_folder_is_the_same_whatever_the_number_of_workers(tmp_path):
    rows = [pair_row(f"What {i}?", images=[base64.b64encode(picture(i % 7)).decode()]) if i % 10 else {"broken": i} for i in range(200)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    one, two = convert("pairs", file, tmp_path / "one"), convert("pairs", file, tmp_path / "two", workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two") and one == two and one["comparisons"] == 180


def test_workers_may_start_afresh_instead_of_as_copies(tmp_path, monkeypatch):
    """How processes start on macOS. A few rows only: a fresh process imports everything again."""
    file = write_lines(tmp_path / "a.jsonl", [pair_row(f"What {i}?") for i in range(9)])
    one = convert("pairs", file, tmp_path / "one")
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("spawn"))
    assert convert("pairs", file, tmp_path / "two", workers=2) == one and tree(tmp_path / "one") == tree(tmp_path / "two")


def picture(seed):
    stream = io.BytesIO()
    noisy(seed).save(stream, "PNG")
    return stream.getvalue()


def test_a_killed_conversion_leaves_nothing_that_looks_finished_and_the_next_one_is_whole(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [pair_row(f"What {i}?") for i in range(20000)])
    child = multiprocessing.get_context("fork").Process(target=convert, args=("pairs", file, tmp_path / "out"))
    child.start()
    draft = tmp_path / "out.partial" / "draft"
    deadline = time.time() + 30
    while not (draft.is_file() and draft.stat().st_size) and time.time() < deadline:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert draft.is_file() and not (tmp_path / "out").exists()
    assert convert("pairs", file, tmp_path / "out")["comparisons"] == 20000
    assert sorted(os.listdir(tmp_path / "out")) == ["comparisons.jsonl", "images", "report.json"] and not draft.parent.exists()
    with pytest.raises(data.BadRow, match="exists already"):
        convert("pairs", file, tmp_path / "out")


@pytest.mark.parametrize("name, content, message", [
    ("rlaif-v", '{"q": 1, "image": "x"}\n', "not one of the first 1 rows is a usable row of rlaif-v; 1 times: a.jsonl:1: "
                                            "no field question: found ['image', 'q']"),
    ("shp", "[]", "holds no row"), ("shp", "no json\n", "a.jsonl:1: malformed JSON: Expecting value"),
    ("mmif", '[{"conversations": 1', "download complete"),
    ("r1-reward", '{"message": "[]", "answer": ["1"], "image": "x"}\n', "unexpected layout: IndexError")])
def test_an_unexpected_layout_is_one_line(tmp_path, name, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(data.BadRow) as caught:
        convert(name, tmp_path / "a.jsonl", tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value) and sorted(os.listdir(tmp_path)) == ["a.jsonl"]


def test_a_conversion_that_drops_every_row_says_why_and_writes_nothing(tmp_path):
    rows = [pair_row("Which?", "this one", "that one"), pair_row("Which?", "that one", "this one")]
    with pytest.raises(data.BadRow, match="nothing is left of 2 rows: .'contradicted by another row': 2"):
        convert("pairs", write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out")
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


def test_the_command_line_prints_the_report_and_fails_in_one_line(tmp_path, capsys):
    data.main(["shp", "--source", str(FIXTURES / "shp"), "--out", str(tmp_path / "out"), "--workers", "1"])
    printed = capsys.readouterr().out
    assert "\ncomparisons: 2\n" in printed and "dropped, label against its scores: 1" in printed
    command = [sys.executable, "data.py", "shp", "--source", str(FIXTURES / "nothing"), "--out", str(tmp_path / "other")]
    bad = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert bad.returncode == 1 and bad.stderr.count(b"\n") == 1 and b"nothing does not exist" in bad.stderr
