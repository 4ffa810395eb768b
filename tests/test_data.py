"""Rows, folders, the order of the steps and the drawn pictures, in the order of data.py."""
import argparse
import io
import functools
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
from data import BadRow, Comparisons, Order, parse_row, read_comparisons, synthetic, use_row, write_comparisons
from model import Comparison, encode, open_frames

GOOD = {"prompt": "Name a fruit.", "responses": ["Apple", "Table"], "pairs": [[0, 1]]}
ASK = [{"role": "user", "content": "Hi"}]


def say(text):
    return [{"role": "assistant", "content": text}]


def folder_of(path: Path, *rows) -> Path:
    """A data folder; a row is an object, or a text that goes into the file as it is."""
    (path / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (56, 56), "red").save(path / "images" / "7.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (path / "comparisons.jsonl").write_text("".join(line + "\n" for line in lines))
    return path


# Rows -----------------------------------------------------------------------------------------------------------------


def test_the_three_rows_of_the_docstring_are_read_as_they_stand(tmp_path):
    lines = data.__doc__[data.__doc__.index('    {"prompt"'):data.__doc__.index("`pairs` holds")]
    rows = [" ".join(part.split()) for part in lines.split('    {"prompt"') if part.strip()]
    found = read_comparisons(folder_of(tmp_path, *('{"prompt"' + row for row in rows)))
    assert [c.responses for c in found] == [["A bus.", "Two buses."], ["Apple", "Table"], ["A bus.", "Two buses."]]
    assert [c.pairs for c in found] == [[(0, 1)]] * 3
    assert [c.images for c in found] == [[str(tmp_path / "images/7.png")], [], [str(tmp_path / "images/7.png")]]


def test_trls_conversations_are_read_with_the_prompt_apart_or_at_their_head():
    """No turn of a longer conversation is lost, however it is begun."""
    apart = parse_row({"prompt": ASK, "chosen": say("Hello"), "rejected": say("Go")}, Path("."))
    head = parse_row({"chosen": ASK + say("Hello"), "rejected": ASK + say("Go")}, Path("."))
    assert apart.prompt == head.prompt == ASK and apart.responses == head.responses == ["Hello", "Go"]
    more = ASK + say("Hello") + [{"role": "user", "content": "And now?"}]
    for prompt in (None, "Hi", ASK, "And now?", more):
        row = {"prompt": prompt, "chosen": more + say("Bye"), "rejected": more + say("Go")}
        assert parse_row(row, Path(".")).prompt == more
    system = [{"role": "system", "content": "Be kind."}]
    row = {"prompt": system, "chosen": more + say("Bye"), "rejected": more + say("Go")}
    assert parse_row(row, Path(".")).prompt == system + more


def test_a_rl_prompt_needs_no_responses_but_what_it_has_is_checked():
    prompt = {"prompt": "1 + 1?", "answer": 2}
    assert parse_row(prompt, Path("."), needs_responses=False).answer == "2"
    with pytest.raises(ValueError, match="are missing"):
        parse_row(prompt, Path("."))
    with pytest.raises(ValueError, match="out of range"):
        parse_row(prompt | {"responses": ["2", "3"], "pairs": [[0, 7]]}, Path("."), needs_responses=False)


BAD_ROWS = [  # (what stands in the file, what the error must say)
    ('{"prompt": "x", "responses": ["a", "b"', "malformed JSON"),
    ("[" * 5000 + "]" * 5000, "malformed JSON"),
    ("[1, 2]", "found list"),
    ({"prompt": "x"}, "the keys ['responses', 'pairs'] are missing; found ['prompt']"),
    ({"prompt": "x", "chosen": "a"},
     "must both be texts or both be lists of messages; found str and NoneType in ['chosen', 'prompt']"),
    (GOOD | {"prompt": ""}, "the prompt is empty"),
    (GOOD | {"prompt": 5}, "the prompt is a int"),
    (GOOD | {"prompt": [{"role": "<|image_pad|>", "content": "x"}]}, "no role among"),
    (GOOD | {"prompt": [{"role": "user"}]}, "the content of the user's message is a NoneType"),
    (GOOD | {"prompt": [{"role": "user", "content": [{"type": "audio"}]}]},
     "a part of a message cannot be used: {'type': 'audio'}"),
    (GOOD | {"prompt": "half \ud83d of a pair"}, "the content of the user's message holds"),
    (GOOD | {"prompt": say("I end it.")}, "must end with a message of the user"),
    (GOOD | {"responses": ["a"]}, "pair [0, 1] is out of range: want two whole numbers below 1"),
    (GOOD | {"responses": "ab"}, "must be a list of texts"),
    (GOOD | {"responses": ["a", 3]}, "response 1 is a int"),
    (GOOD | {"responses": ["a", " "]}, "response 1 is empty"),
    (GOOD | {"responses": ["a", "half \ud83d of a pair"]}, "response 1 holds"),
    (GOOD | {"pairs": []}, "no pairs"),
    (GOOD | {"pairs": [[0, 2]]}, "pair [0, 2] is out of range"),
    (GOOD | {"pairs": [[0, True]]}, "two whole numbers"),
    (GOOD | {"pairs": [[0, 1], [1, 0]]}, "contradict each other"),
    (GOOD | {"pairs": [[0, 1]] * 500}, "pair [0, 1] stands there twice"),
    (GOOD | {"responses": ["a", "b", "c"], "pairs": [[0, 1], [1, 2], [2, 0]]}, "contradict each other"),
    (GOOD | {"responses": ["same", "same"]}, "identical responses"),
    (GOOD | {"images": ["/etc/passwd"]}, "outside the data folder"),
    (GOOD | {"images": ["images/../../7.png"]}, "outside the data folder"),
    (GOOD | {"images": [7]}, "the path of an image is a int"),
    (GOOD | {"prompt": "<image>what?"}, "1 <image> marks but there are 0 images"),
    (GOOD | {"prompt": "<image><image>what?", "images": ["images/7.png"]}, "2 <image> marks but there are 1 images"),
    (GOOD | {"video": "images"}, "a key `video` is not read"),
    (GOOD | {"id": {"a": 1}}, "id is a dict"),
    (GOOD | {"critiques": ["only one"]}, "critiques must be a list of 2 texts"),
    ({"chosen": ASK + say("a") + ASK, "rejected": ASK + say("b") + ASK}, "must be a message of the assistant"),
    ({"chosen": ASK + say("a"), "rejected": say("Ho") + say("b")}, "part before their last message"),
    ({"prompt": "x", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": say("b")},
     "both responses must share the images"),
    ({"chosen": ASK + [{"role": "assistant"}], "rejected": ASK + say("b")}, "response 0 is a NoneType"),
]


@pytest.mark.parametrize("row, words", BAD_ROWS, ids=[f"{i} {words}" for i, (_, words) in enumerate(BAD_ROWS)])
def test_a_bad_row_is_one_short_line_with_file_line_number_and_cause(tmp_path, row, words):
    """Found when the row is read, not when training meets it; the blank line counts as a line, not as a row."""
    rows = read_comparisons(folder_of(tmp_path, GOOD, "", row, GOOD))
    assert rows[0].responses == rows[2].responses == ["Apple", "Table"]
    with pytest.raises(BadRow) as error:
        rows[1]
    assert str(error.value).startswith(f"{tmp_path}/comparisons.jsonl:3: ") and words in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_what_a_row_says_never_makes_a_message_long_or_a_terminal_obey(tmp_path):
    """A key of half a million characters, and one that would colour the terminal."""
    rows = read_comparisons(folder_of(tmp_path, {"k" * 500_000: 1}, {"\x1b[31mred": 1, "chosen": "a"}))
    for i, shown in ((0, "kkk"), (1, "x1b[31mred")):
        with pytest.raises(BadRow) as error:
            rows[i]
        assert len(str(error.value)) <= 300 and "\x1b" not in str(error.value) and shown in str(error.value)


def test_a_row_of_a_benchmark_may_tie_or_be_empty():
    """They are part of the published figure, as ties, which are wrong. In training they teach nothing."""
    row = GOOD | {"responses": ["same", "same", ""], "pairs": [[0, 1], [0, 2]]}
    assert parse_row(row | {"source": "vl-rewardbench"}, Path(".")).pairs == [(0, 1), (0, 2)]
    with pytest.raises(ValueError, match="response 2 is empty"):
        parse_row(row, Path("."))


def test_a_row_that_cannot_be_encoded_names_its_place(tmp_path, tiny):
    rows = read_comparisons(folder_of(tmp_path, GOOD, GOOD | {"images": ["images/gone.png"]}))
    encoded = functools.partial(encode, processor=tiny.processor)
    assert use_row(rows, 0, encoded).response_ids == encoded(rows[0]).response_ids
    with pytest.raises(BadRow, match="comparisons.jsonl:2: image .*gone.png does not exist"):
        use_row(rows, 1, encoded)
    with pytest.raises(BadRow, match="^synthetic comparison 1: "):
        use_row([Comparison("?", ["a", "b"], images=["gone.png"], source="synthetic")], 0, encoded)


def test_an_empty_file_and_a_missing_folder_say_so(tmp_path):
    with pytest.raises(BadRow, match="holds no row"):
        read_comparisons(folder_of(tmp_path))
    with pytest.raises(BadRow, match="does not exist"):
        read_comparisons(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(BadRow, match="does not exist"):
        read_comparisons(tmp_path / "pipe.jsonl")


# Folders --------------------------------------------------------------------------------------------------------------


def test_the_number_of_pairs_is_known_without_parsing_a_row(tmp_path):
    """Also where a text speaks of "pairs", or the key stands anywhere and is spaced in any way."""
    three = {"pairs": [[0, 1], [0, 2], [1, 2]], "prompt": 'a text with "pairs": [[1, 2]]',
             "responses": ["a", "b", "c"], "critiques": ["[", "", ""]}
    rows = read_comparisons(folder_of(tmp_path, GOOD, three, json.dumps(three, separators=(" , ", " : ")),
                                      {"prompt": "x", "chosen": "a", "rejected": "b"}))
    assert list(rows.pairs) == [len(c.pairs) for c in rows] == [1, 3, 3, 1]


def test_a_part_of_a_file_keeps_its_line_numbers(tmp_path):
    part = Comparisons(folder_of(tmp_path, GOOD, GOOD, "{", GOOD) / "comparisons.jsonl").only([1, 2])
    assert len(part) == 2 and part[0].responses == ["Apple", "Table"] and part.place(0).endswith(":2")
    with pytest.raises(BadRow, match="comparisons.jsonl:3: malformed"):
        part[1]


def test_two_processes_do_not_write_one_folder(tmp_path):
    with data.new_folder(tmp_path / "out") as partial:
        (partial / "comparisons.jsonl").write_text("ours")
        with pytest.raises(BadRow, match="another process is writing"), data.new_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "comparisons.jsonl").read_text() == "ours"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_lock_ends_with_the_process_that_held_it(tmp_path):
    """However it was ended: the file that it leaves keeps nobody out."""
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
    rows = read_comparisons(write_comparisons(tmp_path / "drawn", written, bar=False))
    for c, again in zip(written, rows, strict=True):
        assert all(getattr(c, name) == getattr(again, name) for name in vars(c) if name not in ("images", "pairs"))
        assert list(c.pairs) == again.pairs
        assert [i.tobytes() for i in c.images] == [Image.open(i).tobytes() for i in again.images]
    with pytest.raises(BadRow, match="exists already"):
        write_comparisons(tmp_path / "drawn", written, bar=False)


def test_a_written_video_is_a_folder_of_its_frames(tmp_path):
    frames = [Image.new("RGB", (56, 56), (9 * i, 0, 0)) for i in range(12)]
    video = Comparison("What moves?", ["Nothing.", "It."], [(1, 0)], [frames])
    (again,) = read_comparisons(write_comparisons(tmp_path / "v", [video], bar=False))
    assert [frame.tobytes() for frame in open_frames(again.images[0])] == [frame.tobytes() for frame in frames]


# Order ----------------------------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_row_once_whatever_the_number_of_ranks():
    order = Order([[1, 6, 3] * 20, [1] * 50], [1.0, 1.0], batch_size=16, seed=3)
    steps = [order.step(step) for step in range(order.steps(1))]
    for world_size in (1, 2, 3):
        seen = [row for step in steps for rank in range(world_size) for row in step[rank::world_size]]
        assert sorted(seen) == [(0, i) for i in range(60)] + [(1, i) for i in range(50)]


def test_a_step_is_a_pure_function_of_seed_and_step():
    order, again = (Order([[1, 6, 3] * 20], [1.0], 16, seed=3) for _ in range(2))
    late = again.step(17)  # asked for first, as after a resume
    assert [order.step(s) for s in range(18)][17] == late
    assert order.step(0) != Order([[1, 6, 3] * 20], [1.0], 16, seed=4).step(0)


def test_the_steps_of_an_epoch_have_equally_many_pairs_and_at_most_batch_size():
    """200 pairs in steps of at most 16: 13 steps of 15.4, give or take the pairs of one row (6)."""
    pairs = [1, 6, 3] * 20
    order = Order([pairs], [1.0], 16, seed=3)
    of_steps = [sum(pairs[i] for _, i in order.step(s)) for s in range(order.steps(1))]
    assert len(of_steps) == 13 and sum(of_steps) == 200 and all(200 / 13 - 6 < n < 200 / 13 + 6 for n in of_steps)


def test_no_step_is_empty_even_where_one_row_has_more_pairs_than_a_step():
    order = Order([[6] * 5 + [1] * 5], [1.0], batch_size=2, seed=0)
    steps = [order.step(s) for s in range(order.steps(2))]
    assert order.steps(1) == 10 and [len(step) for step in steps] == [1] * 20
    assert len(Order([[1] * 3], [1.0], batch_size=100, seed=0).step(0)) == 3
    with pytest.raises(ValueError, match="no row is left"):
        Order([[1] * 3], [0.1], batch_size=1, seed=0)


def test_a_weight_is_the_number_of_visits_in_an_epoch():
    order = Order([[1] * 10, [1] * 10], [2.0, 0.5], batch_size=5, seed=0)
    seen = [row for s in range(order.steps(1)) for row in order.step(s)]
    assert all(seen.count((0, i)) == 2 for i in range(10)) and sum(number == 1 for number, _ in seen) == 5
    second = {i for s in range(order.steps(1), order.steps(2)) for number, i in order.step(s) if number == 1}
    assert len(second) == 5 and second != {i for number, i in seen if number == 1}  # another half


# The drawn set --------------------------------------------------------------------------------------------------------


def test_drawn_comparisons_are_valid_and_the_same_for_the_same_seed():
    comparisons = synthetic(200, seed=5)
    assert {c.category for c in comparisons} == {*data.VISUAL, "text"}
    assert {len(c.responses) for c in comparisons} == {2, 3, 4}
    for c, again in zip(comparisons, synthetic(200, seed=5)):
        data.check_responses(c.responses, c.pairs, needs_pairs=True, is_benchmark=False)
        assert c.responses == again.responses and [i.tobytes() for i in c.images] == [i.tobytes() for i in again.images]
        best = {w for w, _ in c.pairs} - {l for _, l in c.pairs}
        assert [c.responses[w] for w in best] == [c.answer]


def test_without_the_picture_the_right_response_cannot_be_told(monkeypatch):
    """The best that texts alone allow, learnt from 3,000 comparisons: how often each response to a prompt wins. It must
    be at chance."""
    monkeypatch.setattr(data, "draw", lambda *_: None)  # the pictures do not matter here
    wins, seen = {}, {}
    for c in synthetic(3000, seed=1):
        for w, l in c.pairs:
            for response, won in ((c.responses[w], 1), (c.responses[l], 0)):
                key = (c.prompt, response)
                wins[key], seen[key] = wins.get(key, 0) + won, seen.get(key, 0) + 1
    right = total = 0
    for c in synthetic(3000, seed=2):
        for w, l in c.pairs if c.images else ():
            a, b = (wins.get((c.prompt, c.responses[i]), 0) / seen.get((c.prompt, c.responses[i]), 1) for i in (w, l))
            right, total = right + (a > b) + 0.5 * (a == b), total + 1
    assert abs(right / total - 0.5) < 0.03


def test_held_out_comparisons_were_not_seen_in_training():
    def contents(comparisons):
        return {(c.prompt, *(i.tobytes() for i in c.images)) for c in comparisons}

    assert len(held := contents(synthetic(800, held_out=True))) > 790  # a text may occur twice
    assert not held & contents(synthetic(2000, seed=0)) and not held & contents(synthetic(1000, seed=7))


def test_images_removed_leaves_the_question_alone(tiny):
    bus = Image.new("RGB", (56, 56))
    c = data.remove_images(Comparison("<image>\nWhat is shown?", ["A bus.", "A cup."], images=[bus]))
    assert c.prompt == [{"role": "user", "content": "What is shown?"}] and not c.images
    assert len(encode(c, tiny.processor).image_grid_thw) == 0


def test_shuffled_prompts_never_keep_a_picture_not_even_from_a_twin():
    comparisons = [Comparison("Q", ["a", "b"], [(0, 1)], [name]) for name in "aaabbcd"]
    for seed in range(20):
        shuffled = data.shuffle_images([Comparison("text", ["a", "b"], [(0, 1)]), *comparisons], seed)
        assert len(shuffled) == 7 and all(c.images != now.images for c, now in zip(comparisons, shuffled))
        assert sorted(c.images for c in shuffled) == sorted(c.images for c in comparisons)


# The command line -----------------------------------------------------------------------------------------------------


def test_show_prints_rows_and_checks_them_as_training_would(tmp_path, capsys):
    data.main(["synthetic", "--out", str(tmp_path / "drawn"), "--n", "5"])
    data.main(["show", str(tmp_path / "drawn"), "--n", "2"])
    said = capsys.readouterr().out
    assert "5 comparisons" in said and "beats" in said and said.count("--- row") == 2
    bad = [(GOOD | {"pairs": [[0, 9]]}, "out of range"), (GOOD | {"images": ["images/gone.png"]}, "does not exist"),
           ({"prompt": "x", "responses": ["a", "b"]}, "neither pairs nor an answer")]
    for i, (row, words) in enumerate(bad):
        with pytest.raises(BadRow, match=f"comparisons.jsonl:1: .*{words}"):
            data.main(["show", str(folder_of(tmp_path / str(i), row))])
    trl = {"prompt": "Which?", "chosen": "this", "rejected": "that"}
    data.main(["show", str(folder_of(tmp_path / "prompts", {"prompt": "1 + 1?", "answer": "\x1b[31m2"}, trl, GOOD))])
    said = capsys.readouterr().out
    assert "\x1b" not in said and "3 comparisons, 2 pairs" in said  # a prompt for RL has none


@pytest.mark.parametrize("arguments, words", [
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
def test_a_wrong_command_is_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, argparse.ArgumentError), match=words):
        data.main(arguments)
    assert not os.listdir(tmp_path)


def run_script(*words):
    """`python data.py WORDS` in this process, which has torch loaded already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["data.py", *map(str, words)])
        runpy.run_path(str(ROOT / "data.py"), run_name="__main__")


def test_the_script_ends_with_one_line():
    with pytest.raises(SystemExit) as end:  # Python prints its text and ends with status 1
        run_script("nonsense")
    assert end.value.code.startswith("data.py: unknown data set") and "\n" not in end.value.code


def test_rows_are_shown_to_a_terminal_that_knows_ascii_only(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    run_script("show", folder_of(tmp_path, GOOD | {"prompt": "Ein Käse?", "responses": ["Gewiß", "日本"]}))
    out.seek(0)
    assert "\\u65e5" in out.read()
