"""Rows, folders, the order of the steps and the drawn pictures, in the order of data.py."""
import argparse
import io
import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

import data
from conftest import ROOT
from data import (BadRow, Comparisons, Order, as_bad_row, parse_row, read_comparisons, row_location, synthetic,
                  write_comparisons)
from model import Comparison, encode, open_frames

GOOD = {"prompt": "Name a fruit.", "responses": ["Apple", "Table"], "pairs": [[0, 1]]}
QUESTION = [{"role": "user", "content": "Hi"}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def write_folder(path: Path, *rows) -> Path:
    """A data folder; a row is an object, or a text that goes into the file as it is."""
    (path / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (56, 56), "red").save(path / "images" / "7.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (path / "comparisons.jsonl").write_text("".join(line + "\n" for line in lines))
    return path


# Rows -----------------------------------------------------------------------------------------------------------------


def test_the_three_rows_of_the_docstring_are_read_as_they_stand(tmp_path):
    text = data.__doc__[data.__doc__.index('    {"prompt"'):data.__doc__.index("`pairs` holds")]
    rows = [" ".join(row.split()) for row in text.split('    {"prompt"') if row.strip()]
    comparisons = list(read_comparisons(write_folder(tmp_path, *('{"prompt"' + row for row in rows))))
    image = str(tmp_path / "images/7.png")
    buses = ["A bus.", "Two buses."]
    assert [c.responses for c in comparisons] == [buses, ["Apple", "Table"], buses]
    assert [c.pairs for c in comparisons] == [[(0, 1)]] * 3
    assert [c.images for c in comparisons] == [[image], [], [image]]


def test_trls_conversations_are_read_with_the_prompt_apart_or_at_their_head():
    """No turn of a longer conversation is lost, however it is begun."""
    apart = parse_row({"prompt": QUESTION, "chosen": assistant("Hello"), "rejected": assistant("Go")}, Path("."))
    head = parse_row({"chosen": QUESTION + assistant("Hello"), "rejected": QUESTION + assistant("Go")}, Path("."))
    assert apart.prompt == head.prompt == QUESTION and apart.responses == head.responses == ["Hello", "Go"]
    history = QUESTION + assistant("Hello") + [{"role": "user", "content": "And now?"}]
    for prompt in (None, "Hi", QUESTION, "And now?", history):
        row = {"prompt": prompt, "chosen": history + assistant("Bye"), "rejected": history + assistant("Go")}
        assert parse_row(row, Path(".")).prompt == history
    system = [{"role": "system", "content": "Be kind."}]
    row = {"prompt": system, "chosen": history + assistant("Bye"), "rejected": history + assistant("Go")}
    assert parse_row(row, Path(".")).prompt == system + history


def test_a_rl_prompt_needs_no_responses_but_what_it_has_is_checked():
    prompt = {"prompt": "1 + 1?", "answer": 2}
    assert parse_row(prompt, Path("."), needs_responses=False).answer == "2"
    with pytest.raises(ValueError, match="are missing"):
        parse_row(prompt, Path("."))
    with pytest.raises(ValueError, match="out of range"):
        parse_row(prompt | {"responses": ["2", "3"], "pairs": [[0, 7]]}, Path("."), needs_responses=False)


BAD_ROWS = [  # (the row in the file, a part of the error's message)
    ('{"prompt": "x", "responses": ["a", "b"', "malformed JSON"),
    ("[" * 5000 + "]" * 5000, "malformed JSON"),
    ("[1, 2]", "found list"),
    ({"prompt": "x"}, "the keys ['responses', 'pairs'] are missing; found ['prompt']"),
    ({"prompt": "x", "chosen": "a"},
     "must both be texts or both be lists of messages; found str and NoneType in ['chosen', 'prompt']"),
    (GOOD | {"prompt": ""}, "the keys ['prompt'] are missing; found ['pairs', 'responses']"),
    (GOOD | {"prompt": " "}, "the prompt is empty"),
    (GOOD | {"prompt": 5}, "the prompt is a int"),
    (GOOD | {"prompt": [{"role": "<|image_pad|>", "content": "x"}]}, "no role among"),
    (GOOD | {"prompt": [{"role": "user"}]}, "the content of the user's message is a NoneType"),
    (GOOD | {"prompt": [{"role": "user", "content": [{"type": "audio"}]}]},
     "a part of a message cannot be used: {'type': 'audio'}"),
    (GOOD | {"prompt": "half \ud83d of a pair"}, "the content of the user's message holds"),
    (GOOD | {"prompt": assistant("I end it.")}, "must end with a message of the user"),
    (GOOD | {"responses": ["a"]}, "pair [0, 1] is out of range: want two whole numbers below 1"),
    (GOOD | {"responses": "ab"}, "must be a list of texts"),
    (GOOD | {"responses": ["a", 3]}, "response 1 is a int"),
    (GOOD | {"responses": ["a", " "]}, "response 1 is empty"),
    (GOOD | {"responses": ["a", "half \ud83d of a pair"]}, "response 1 holds"),
    (GOOD | {"pairs": []}, "the keys ['pairs'] are missing; found ['prompt', 'responses']; pairs like [[0, 1]] say"),
    (GOOD | {"pairs": "none"}, "pairs must be a list like [[0, 1]]"),
    (GOOD | {"pairs": [[0, 2]]}, "pair [0, 2] is out of range"),
    (GOOD | {"pairs": [[0, True]]}, "two whole numbers"),
    (GOOD | {"pairs": [[0, 1], [1, 0]]}, "contradict each other"),
    (GOOD | {"pairs": [[0, 1]] * 500}, "pair [0, 1] is listed twice"),
    (GOOD | {"responses": ["a", "b", "c"], "pairs": [[0, 1], [1, 2], [2, 0]]}, "contradict each other"),
    (GOOD | {"responses": ["same", "same"]}, "identical responses"),
    (GOOD | {"images": ["/etc/passwd"]}, "outside the data folder"),
    (GOOD | {"images": ["images/../../7.png"]}, "outside the data folder"),
    (GOOD | {"images": [7]}, "the path of an image is a int"),
    (GOOD | {"prompt": "<image>what?"}, "1 <image> marks but there are 0 images"),
    (GOOD | {"prompt": "<image><image>what?", "images": ["images/7.png"]}, "2 <image> marks but there are 1 images"),
    (GOOD | {"video": "images"}, "the key `video` is not read: put the path of the folder of frames into `images`"),
    (GOOD | {"id": {"a": 1}}, "id is a dict"),
    (GOOD | {"critiques": ["only one"]}, "critiques must be a list of 2 texts"),
    ({"chosen": QUESTION + assistant("a") + QUESTION, "rejected": QUESTION + assistant("b") + QUESTION},
     "must be a message of the assistant"),
    ({"chosen": QUESTION + assistant("a"), "rejected": assistant("Ho") + assistant("b")},
     "part before their last message"),
    ({"prompt": "x", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": assistant("b")},
     "both responses must share the images"),
    ({"chosen": QUESTION + [{"role": "assistant"}], "rejected": QUESTION + assistant("b")},
     "the content of the assistant's message is a NoneType"),
]


@pytest.mark.parametrize("row, message", BAD_ROWS, ids=[f"{i} {message}" for i, (_, message) in enumerate(BAD_ROWS)])
def test_a_bad_row_is_one_short_line_with_file_line_number_and_cause(tmp_path, row, message):
    """Found when the row is read, not when training meets it; the blank line counts as a line, not as a row."""
    rows = read_comparisons(write_folder(tmp_path, GOOD, "", row, GOOD))
    assert rows[0].responses == rows[2].responses == ["Apple", "Table"]
    with pytest.raises(BadRow) as error:
        rows[1]
    assert str(error.value).startswith(f"{tmp_path}/comparisons.jsonl:3: ") and message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_the_text_of_a_row_makes_no_message_long_and_sends_no_command_to_the_terminal(tmp_path):
    """A key of half a million characters, and one that would colour the terminal."""
    rows = read_comparisons(write_folder(tmp_path, {"k" * 500_000: 1}, {"\x1b[31mred": 1, "chosen": "a"}))
    for i, shown in ((0, "kkk"), (1, "x1b[31mred")):
        with pytest.raises(BadRow) as error:
            rows[i]
        assert len(str(error.value)) <= 300 and "\x1b" not in str(error.value) and shown in str(error.value)


def test_a_row_of_a_benchmark_may_tie_or_be_empty():
    """They are part of the published figure: ties, which count as wrong. In training nothing is learned from them."""
    row = GOOD | {"responses": ["same", "same", ""], "pairs": [[0, 1], [0, 2]]}
    assert parse_row(row | {"source": "vl-rewardbench"}, Path(".")).pairs == [(0, 1), (0, 2)]
    with pytest.raises(ValueError, match="response 2 is empty"):
        parse_row(row, Path("."))


def read_and_encode(rows, i, processor):
    """The three steps of every caller: read, encode, and what happens to a bad row."""
    try:
        return encode(rows[i], processor)
    except ValueError as error:
        raise as_bad_row(error, rows, i) from None


def test_a_row_that_cannot_be_read_or_encoded_names_its_location(tmp_path, tiny):
    rows = read_comparisons(write_folder(tmp_path, GOOD, GOOD | {"images": ["images/gone.png"]}, "{"))
    processor = tiny.processor
    assert read_and_encode(rows, 0, processor).response_ids == encode(rows[0], processor).response_ids
    with pytest.raises(BadRow, match="comparisons.jsonl:2: image .*gone.png does not exist"):
        read_and_encode(rows, 1, processor)
    with pytest.raises(BadRow, match="^[^ ]*comparisons.jsonl:3: malformed JSON"):  # the location once
        read_and_encode(rows, 2, processor)
    drawn = [Comparison("?", ["a", "b"], images=["gone.png"], source="synthetic")]
    with pytest.raises(BadRow, match="^synthetic comparison 1: "):
        read_and_encode(drawn, 0, processor)
    assert row_location(rows, 2) == f"{tmp_path}/comparisons.jsonl:3"
    assert row_location(drawn, 0) == "synthetic comparison 1"


def test_an_empty_file_and_a_missing_folder_say_so(tmp_path):
    with pytest.raises(BadRow, match="holds no row"):
        read_comparisons(write_folder(tmp_path))
    with pytest.raises(BadRow, match="does not exist"):
        read_comparisons(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(BadRow, match="does not exist"):
        read_comparisons(tmp_path / "pipe.jsonl")


# Folders --------------------------------------------------------------------------------------------------------------


def test_the_number_of_pairs_is_counted_without_parsing_a_row(tmp_path):
    """Also where a text contains "pairs": [[1, 2]], and wherever the key stands, with any spaces."""
    three = {"pairs": [[0, 1], [0, 2], [1, 2]], "prompt": 'a text with "pairs": [[1, 2]]',
             "responses": ["a", "b", "c"], "critiques": ["[", "", ""]}
    rows = read_comparisons(write_folder(tmp_path, GOOD, three, json.dumps(three, separators=(" , ", " : ")),
                                      {"prompt": "x", "chosen": "a", "rejected": "b"}))
    assert list(rows.pair_counts) == [len(c.pairs) for c in rows] == [1, 3, 3, 1]
    lines = rows.file.read_bytes().splitlines(keepends=True)
    assert list(rows.line_sizes) == [len(line) for line in lines]


def test_selected_rows_keep_their_line_numbers(tmp_path):
    rows = Comparisons(write_folder(tmp_path, GOOD, GOOD, "{", GOOD) / "comparisons.jsonl")
    selected = rows.select([1, 2])
    assert len(selected) == len(selected.pair_counts) == len(selected.line_sizes) == 2 and len(rows) == 4
    assert selected[0].responses == ["Apple", "Table"] and selected.location(0).endswith(":2")
    with pytest.raises(BadRow, match="comparisons.jsonl:3: malformed"):
        selected[1]


def test_two_processes_do_not_write_one_folder(tmp_path):
    with data.new_folder(tmp_path / "out") as partial:
        (partial / "comparisons.jsonl").write_text("ours")
        with pytest.raises(BadRow, match="another process is writing"), data.new_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "comparisons.jsonl").read_text() == "ours"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_lock_ends_with_the_process_that_held_it(tmp_path):
    """Also if it was killed: the file that it leaves locks nothing."""
    def hold(ready):
        with data.new_folder(tmp_path / "out"):
            ready.set()
            multiprocessing.Event().wait(60)

    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=hold, args=(ready,))
    child.start()
    assert ready.wait(30)
    with pytest.raises(BadRow, match="another process"), data.new_folder(tmp_path / "out"):
        pass
    child.kill()
    child.join()
    assert (tmp_path / "out.lock").exists()
    with data.new_folder(tmp_path / "out"):
        pass
    assert not (tmp_path / "out.lock").exists()


def test_a_written_folder_reads_back_the_same(tmp_path):
    written = [*synthetic(20),
               Comparison("Why?", ["Because.", "No."], [(0, 1)], critiques=["It answers.", "It does not."])]
    rows = read_comparisons(write_comparisons(tmp_path / "drawn", written, progress=False))
    for c, read in zip(written, rows, strict=True):
        assert all(getattr(c, name) == getattr(read, name) for name in vars(c) if name not in ("images", "pairs"))
        assert list(c.pairs) == read.pairs
        assert [image.tobytes() for image in c.images] == [Image.open(image).tobytes() for image in read.images]
    with pytest.raises(BadRow, match="exists already"):
        write_comparisons(tmp_path / "drawn", written, progress=False)


def test_a_written_video_is_a_folder_of_its_frames(tmp_path):
    frames = [Image.new("RGB", (56, 56), (9 * i, 0, 0)) for i in range(12)]
    video = Comparison("What moves?", ["Nothing.", "It."], [(1, 0)], [frames])
    (read,) = read_comparisons(write_comparisons(tmp_path / "v", [video], progress=False))
    assert [frame.tobytes() for frame in open_frames(read.images[0])] == [frame.tobytes() for frame in frames]


# Order ----------------------------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_row_once_whatever_the_number_of_ranks():
    order = Order([[1, 6, 3] * 20, [1] * 50], [1.0, 1.0], batch_size=16, seed=3)
    steps = [order.rows_of_step(step) for step in range(order.num_steps(1))]
    for world_size in (1, 2, 3):
        rows = [row for step in steps for rank in range(world_size) for row in step[rank::world_size]]
        assert sorted(rows) == [(0, i) for i in range(60)] + [(1, i) for i in range(50)]


def test_a_step_is_a_pure_function_of_seed_and_step():
    order, resumed = (Order([[1, 6, 3] * 20], [1.0], 16, seed=3) for _ in range(2))
    late = resumed.rows_of_step(17)  # the first that is drawn, as after a resume
    assert [order.rows_of_step(step) for step in range(18)][17] == late
    assert order.rows_of_step(0) != Order([[1, 6, 3] * 20], [1.0], 16, seed=4).rows_of_step(0)


def test_the_steps_of_an_epoch_have_equal_numbers_of_pairs_as_far_as_whole_rows_allow():
    """200 pairs in steps of 16: ceil(200 / 16) = 13 steps of 15.4, up to the pairs of one row (6)."""
    pair_counts = [1, 6, 3] * 20
    order = Order([pair_counts], [1.0], 16, seed=3)
    pairs_of_steps = [sum(pair_counts[i] for _, i in order.rows_of_step(step)) for step in range(order.num_steps(1))]
    assert len(pairs_of_steps) == 13 and sum(pairs_of_steps) == 200
    assert all(200 / 13 - 6 < n < 200 / 13 + 6 for n in pairs_of_steps)


def test_no_step_is_empty_even_where_one_row_has_more_pairs_than_a_step():
    order = Order([[6] * 5 + [1] * 5], [1.0], batch_size=2, seed=0)
    steps = [order.rows_of_step(step) for step in range(order.num_steps(2))]
    assert order.num_steps(1) == 10 and [len(step) for step in steps] == [1] * 20
    assert len(Order([[1] * 3], [1.0], batch_size=100, seed=0).rows_of_step(0)) == 3
    with pytest.raises(ValueError, match="no row is left"):
        Order([[1] * 3], [0.1], batch_size=1, seed=0)


def test_a_weight_is_the_number_of_visits_in_an_epoch():
    order = Order([[1] * 10, [1] * 10], [2.0, 0.5], batch_size=5, seed=0)
    epochs = [range(order.num_steps(1)), range(order.num_steps(1), order.num_steps(2))]
    first, second = ([row for step in steps for row in order.rows_of_step(step)] for steps in epochs)
    assert all(first.count((0, i)) == 2 for i in range(10))
    halves = [{i for set_index, i in rows if set_index == 1} for rows in (first, second)]
    assert len(first) == 25 and len(halves[0]) == len(halves[1]) == 5 and halves[0] != halves[1]


# The drawn set --------------------------------------------------------------------------------------------------------


def test_drawn_comparisons_are_valid_and_the_same_for_the_same_seed():
    comparisons = synthetic(200, seed=5)
    assert {c.category for c in comparisons} == {*data.VISUAL, "text"}
    assert {len(c.responses) for c in comparisons} == {2, 3, 4}
    for c, repeated in zip(comparisons, synthetic(200, seed=5)):
        data.check_responses(c.responses, is_benchmark=False)
        assert c.pairs
        data.check_pairs(c.responses, c.pairs, is_benchmark=False)
        assert c.responses == repeated.responses
        assert [image.tobytes() for image in c.images] == [image.tobytes() for image in repeated.images]
        best = {winner for winner, _ in c.pairs} - {loser for _, loser in c.pairs}
        assert [c.responses[winner] for winner in best] == [c.answer]


def test_without_the_picture_the_right_response_cannot_be_told(monkeypatch):
    """The best that texts alone allow, learned from 3,000 comparisons: how often each response to a prompt wins. It
    must be at chance."""
    monkeypatch.setattr(data, "draw_picture", lambda *_: None)  # the pictures do not matter here
    wins, pairs = {}, {}  # of each (prompt, response)
    for c in synthetic(3000, seed=1):
        for winner, loser in c.pairs:
            for index in (winner, loser):
                key = (c.prompt, c.responses[index])
                wins[key] = wins.get(key, 0) + (index == winner)
                pairs[key] = pairs.get(key, 0) + 1
    right = total = 0
    for c in synthetic(3000, seed=2):
        for pair in c.pairs if c.images else ():
            keys = [(c.prompt, c.responses[index]) for index in pair]
            chosen, rejected = (wins.get(key, 0) / pairs.get(key, 1) for key in keys)
            right, total = right + (chosen > rejected) + 0.5 * (chosen == rejected), total + 1
    assert abs(right / total - 0.5) < 0.03


def test_held_out_comparisons_were_not_seen_in_training():
    def contents(comparisons):
        return {(c.prompt, *(i.tobytes() for i in c.images)) for c in comparisons}

    held_out = contents(synthetic(800, held_out=True))
    assert len(held_out) > 790  # a text may occur twice
    assert not held_out & contents(synthetic(2000, seed=0)) and not held_out & contents(synthetic(1000, seed=7))


def test_a_question_without_its_images_is_otherwise_the_same(tiny):
    bus = Image.new("RGB", (56, 56))
    c = data.remove_images(Comparison("<image>\nWhat is shown?", ["A bus.", "A cup."], images=[bus]))
    assert c.prompt == [{"role": "user", "content": "What is shown?"}] and not c.images
    assert len(encode(c, tiny.processor).image_grid_thw) == 0


def test_shuffled_prompts_never_keep_a_picture_not_even_from_a_twin():
    comparisons = [Comparison("Q", ["a", "b"], [(0, 1)], [name]) for name in "aaabbcd"]
    for seed in range(20):
        shuffled = data.shuffle_images([Comparison("text", ["a", "b"], [(0, 1)]), *comparisons], seed)
        assert len(shuffled) == 7
        assert all(before.images != after.images for before, after in zip(comparisons, shuffled))
        assert sorted(c.images for c in shuffled) == sorted(c.images for c in comparisons)


# The command line -----------------------------------------------------------------------------------------------------


def test_show_prints_rows_and_checks_them_as_training_would(tmp_path, capsys):
    data.main(["synthetic", "--out", str(tmp_path / "drawn"), "--n", "5"])
    data.main(["show", str(tmp_path / "drawn"), "--n", "2"])
    printed = capsys.readouterr().out
    assert "5 comparisons" in printed and "beats" in printed and printed.count("--- row") == 2
    bad = [(GOOD | {"pairs": [[0, 9]]}, "out of range"), (GOOD | {"images": ["images/gone.png"]}, "does not exist"),
           ({"prompt": "x", "responses": ["a", "b"]}, "neither pairs nor an answer")]
    for i, (row, message) in enumerate(bad):
        with pytest.raises(BadRow, match=f"comparisons.jsonl:1: .*{message}"):
            data.main(["show", str(write_folder(tmp_path / str(i), row))])
    trl = {"prompt": "Which?", "chosen": "this", "rejected": "that"}
    data.main(["show", str(write_folder(tmp_path / "prompts", {"prompt": "1 + 1?", "answer": "\x1b[31m2"}, trl, GOOD))])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "3 comparisons, 2 pairs" in printed  # a prompt for RL has none


@pytest.mark.parametrize("arguments, message", [
    (["nonsense"], "unknown data set 'nonsense'"), (["show", "nowhere"], "does not exist"),
    (["synthetic"], "--out is missing"), (["shp", "--out", "x"], "--source is missing"),
    (["synthetic", "--out", "x", "--n", "-1"], "--n -1: want at least 0"),
    (["pairs", "--source", "a", "--out", "x", "--workers", "-2"], "--workers -2: want at least 0"),
    (["pairs", "--source", "a", "--out", "x", "--max_tokens", "0"], "--max_tokens 0: want at least 1"),
    *[(["pairs", "--source", "a", "--out", "x", "--hold_out", share], "--hold_out .*want at least 0 and less than 1")
      for share in ("-1", "1", "nan", "1e400")],
    (["rm-bench", "--source", "a", "--out", "x", "--hold_out", "0.1"], "the rows of rm-bench are all kept"),
    (["pairs", "--source", "a", "--out", "x", "--speed", "9"], "--speed"),
    (["pairs", "--source", "a", "--out", "x", "--n", "many"], "invalid int value: 'many'"),
    (["rm-bench", "--source", "a", "--out", "x", "--on_bad_row", "weep"], "invalid choice: 'weep'")])
def test_a_wrong_command_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, argparse.ArgumentError), match=message):
        data.main(arguments)
    assert not os.listdir(tmp_path)


def run_script(*arguments):
    """`python data.py ARGUMENTS` in this process, which has torch loaded already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "data.py"), run_name="__main__")


def test_the_script_ends_with_one_line():
    with pytest.raises(SystemExit) as end:  # Python prints its text and ends with status 1
        run_script("nonsense")
    assert end.value.code.startswith("data.py: unknown data set") and "\n" not in end.value.code


def test_rows_are_shown_in_a_terminal_that_is_limited_to_ascii(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    run_script("show", write_folder(tmp_path, GOOD | {"prompt": "Ein Käse?", "responses": ["Gewiß", "日本"]}))
    out.seek(0)
    assert "\\u65e5" in out.read()
