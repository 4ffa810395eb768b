"""Rows, folders, the order of the data and the drawn pictures, in the order of data.py."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import data
from conftest import ROOT
from data import BadRow, Comparisons, Order, parse_row, read_comparisons, synthetic, write_comparisons
from model import Comparison

GOOD = {"prompt": "Name a fruit.", "responses": ["Apple", "Table"], "pairs": [[0, 1]]}


def folder_of(path: Path, *rows) -> Path:
    """A data folder; a row is an object, or a text that goes into the file as it is."""
    (path / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (56, 56), "red").save(path / "images" / "7.png")
    (path / "comparisons.jsonl").write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ----------------------------------------------------------------------------------------------- rows


def test_the_three_rows_of_the_docstring_are_read_as_they_stand(tmp_path):
    lines = data.__doc__[data.__doc__.index('    {"prompt"'):data.__doc__.index("`pairs` holds")]
    rows = read_comparisons(folder_of(tmp_path, *("{" + " ".join(part.split()) for part in lines.split("    {") if part.strip())))
    assert [c.responses for c in rows] == [["A bus.", "Two buses."], ["Apple", "Table"], ["A bus.", "Two buses."]]
    assert [c.pairs for c in rows] == [[(0, 1)]] * 3
    assert [c.images for c in rows] == [[str(tmp_path / "images/7.png")], [], [str(tmp_path / "images/7.png")]]


def test_trls_conversations_are_read_with_the_prompt_apart_or_at_their_head():
    ask, say = [{"role": "user", "content": "Hi"}], lambda text: [{"role": "assistant", "content": text}]
    apart = parse_row({"prompt": ask, "chosen": say("Hello"), "rejected": say("Go")}, Path("."))
    head = parse_row({"chosen": ask + say("Hello"), "rejected": ask + say("Go")}, Path("."))
    assert apart.prompt == head.prompt == ask and apart.responses == head.responses == ["Hello", "Go"]
    with pytest.raises(ValueError, match="part before their last message"):
        parse_row({"chosen": ask + say("Hello"), "rejected": say("Ho") + say("Go")}, Path("."))
    more = ask + say("Hello") + [{"role": "user", "content": "And now?"}]  # no turn of a longer conversation is lost, however it is begun
    for prompt in (None, "Hi", ask, "And now?", more):
        assert parse_row({"prompt": prompt, "chosen": more + say("Bye"), "rejected": more + say("Go")}, Path(".")).prompt == more
    system = [{"role": "system", "content": "Be kind."}]
    assert parse_row({"prompt": system, "chosen": more + say("Bye"), "rejected": more + say("Go")}, Path(".")).prompt == system + more
    with pytest.raises(ValueError, match="both responses must share the images"):
        parse_row({"prompt": ask, "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": say("Go")}, Path("."))


BAD_ROWS = [  # (what stands in the file, what the error must say)
    ('{"prompt": "x", "responses": ["a", "b"', "malformed JSON"),
    ("[1, 2]", "found list"),
    ({"prompt": "x"}, "the keys ['responses', 'pairs'] are missing; found ['prompt']"),
    ({"prompt": "x", "chosen": "a"}, "['rejected'] are missing"),
    (GOOD | {"prompt": ""}, "prompt must be"),
    (GOOD | {"responses": ["a"]}, "1 response; a comparison needs at least 2"),
    (GOOD | {"responses": ["a", 3]}, "list of texts"),
    (GOOD | {"responses": ["a", " "]}, "response 1 is empty"),
    (GOOD | {"pairs": []}, "no pairs"),
    (GOOD | {"pairs": [[0, 2]]}, "pair [0, 2] is out of range"),
    (GOOD | {"pairs": [[0, True]]}, "two whole numbers"),
    (GOOD | {"pairs": [[0, 1], [1, 0]]}, "contradict each other"),
    (GOOD | {"responses": ["a", "b", "c"], "pairs": [[0, 1], [1, 2], [2, 0]]}, "contradict each other"),
    (GOOD | {"responses": ["same", "same"]}, "identical responses"),
    (GOOD | {"images": ["/etc/passwd"]}, "outside the data folder"),
    (GOOD | {"images": ["images/../../7.png"]}, "outside the data folder"),
    (GOOD | {"prompt": "<image>what?"}, "1 <image> marks but there are 0 images"),
    (GOOD | {"prompt": "<image><image>what?", "images": ["images/7.png"]}, "2 <image> marks but there are 1 images"),
]


@pytest.mark.parametrize("row, words", BAD_ROWS, ids=[words for _, words in BAD_ROWS])
def test_a_bad_row_is_one_line_with_file_line_number_and_cause(tmp_path, row, words):
    rows = read_comparisons(folder_of(tmp_path, GOOD, "", row, GOOD))  # the blank line counts as a line, not as a row
    assert rows[0].responses == rows[2].responses == ["Apple", "Table"]
    with pytest.raises(BadRow) as error:
        rows[1]
    assert str(error.value).startswith(f"{tmp_path}/comparisons.jsonl:3: ") and words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_file_and_a_missing_folder_say_so(tmp_path):
    with pytest.raises(BadRow, match="holds no row"):
        read_comparisons(folder_of(tmp_path))
    with pytest.raises(BadRow, match="does not exist"):
        read_comparisons(tmp_path / "nowhere")
    os.rename(tmp_path / "comparisons.jsonl", tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(BadRow, match="holds 2 .jsonl files"):
        read_comparisons(tmp_path)


# ----------------------------------------------------------------------------------------------- folders


def test_the_number_of_pairs_is_known_without_parsing_a_row(tmp_path):
    """Also where a text speaks of "pairs", or the key stands anywhere and is spaced in any way."""
    three = {"pairs": [[0, 1], [0, 2], [1, 2]], "prompt": 'a text with "pairs": [[1, 2]]', "responses": ["a", "b", "c"],
             "critiques": ["[", "", ""]}
    rows = read_comparisons(folder_of(tmp_path, GOOD, three, json.dumps(three, separators=(" , ", " : ")),
                                      {"prompt": "x", "chosen": "a", "rejected": "b"}))
    assert list(rows.pairs) == [len(c.pairs) for c in rows] == [1, 3, 3, 1]


def test_a_part_of_a_file_keeps_its_line_numbers(tmp_path):
    part = Comparisons(folder_of(tmp_path, GOOD, GOOD, "{", GOOD) / "comparisons.jsonl").only([1, 2])
    assert len(part) == 2 and part[0].responses == ["Apple", "Table"]
    with pytest.raises(BadRow, match="comparisons.jsonl:3: malformed"):
        part[1]


# ----------------------------------------------------------------------------------------------- order


def test_an_epoch_visits_every_row_once_whatever_the_number_of_ranks():
    order = Order([[1, 6, 3] * 20, [1] * 50], [1.0, 1.0], batch_size=16, seed=3)
    for world_size in (1, 2, 3):
        seen = [row for step in range(order.steps(1)) for rank in range(world_size) for row in order.step(step)[rank::world_size]]
        assert sorted(seen) == [(0, i) for i in range(60)] + [(1, i) for i in range(50)]


def test_a_step_is_a_pure_function_of_seed_and_step_and_holds_about_batch_size_pairs():
    sets = [[1, 6, 3] * 20]
    order, again = (Order(sets, [1.0], 16, seed=3) for _ in range(2))
    late = again.step(17)  # asked for first, as after a resume
    assert [order.step(s) for s in range(18)][17] == late
    assert order.step(0) != Order(sets, [1.0], 16, seed=4).step(0)
    pairs = [sum(sets[0][i] for _, i in order.step(s)) for s in range(order.steps(1) - 1)]
    assert all(16 - 6 < n < 16 + 6 for n in pairs) and sum(sets[0]) == 200


def test_a_weight_is_the_number_of_visits_in_an_epoch():
    order = Order([[1] * 10, [1] * 10], [2.0, 0.5], batch_size=5, seed=0)
    seen = [row for s in range(order.steps(1)) for row in order.step(s)]
    assert all(seen.count((0, i)) == 2 for i in range(10)) and sum(owner == 1 for owner, _ in seen) == 5
    second = {i for s in range(order.steps(1), order.steps(2)) for owner, i in order.step(s) if owner == 1}
    assert second != {i for owner, i in seen if owner == 1}  # another half


# ----------------------------------------------------------------------------------------------- synthetic


def test_drawn_comparisons_are_valid_and_the_same_for_the_same_seed():
    comparisons = synthetic(200, seed=5)
    assert {c.category for c in comparisons} == {*data.VISUAL, "text"} and {len(c.responses) for c in comparisons} == {2, 3, 4}
    for c, again in zip(comparisons, synthetic(200, seed=5)):
        data.check_pairs(c.responses, c.pairs)
        assert c.responses == again.responses and [i.tobytes() for i in c.images] == [i.tobytes() for i in again.images]
        winners = {w for w, _ in c.pairs} - {l for _, l in c.pairs}
        assert [c.responses[w] for w in winners] == [c.answer]


def test_without_the_picture_the_right_response_cannot_be_told():
    """The best that texts alone allow, learnt from 3,000 comparisons: how often each response to a prompt wins. It must be at chance."""
    wins, seen = {}, {}
    for c in synthetic(3000, seed=1):
        for w, l in c.pairs:
            for response, won in ((c.responses[w], 1), (c.responses[l], 0)):
                key = (c.prompt, response)
                wins[key], seen[key] = wins.get(key, 0) + won, seen.get(key, 0) + 1
    right = total = 0
    for c in synthetic(3000, seed=2):
        for w, l in c.pairs if c.images else ():
            chosen, rejected = (wins.get((c.prompt, c.responses[i]), 0) / seen.get((c.prompt, c.responses[i]), 1) for i in (w, l))
            right, total = right + (chosen > rejected) + 0.5 * (chosen == rejected), total + 1
    assert abs(right / total - 0.5) < 0.03


def test_held_out_comparisons_were_not_seen_in_training():
    def contents(comparisons):
        return {(c.prompt, *(i.tobytes() for i in c.images)) for c in comparisons}

    assert len(held := contents(synthetic(800, held_out=True))) == 800
    assert not held & contents(synthetic(3000, seed=0)) and not held & contents(synthetic(1000, seed=7))


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = data.StopSignal()
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_two_processes_do_not_write_one_folder(tmp_path):
    with data.new_folder(tmp_path / "out") as partial:
        (partial / "comparisons.jsonl").write_text("ours")
        with pytest.raises(BadRow, match="another process is writing"), data.new_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "comparisons.jsonl").read_text() == "ours" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_written_folder_reads_back_the_same(tmp_path):
    comparisons = [*synthetic(20), Comparison("Why?", ["Because.", "No."], [(0, 1)], critiques=["It answers.", "It does not."])]
    rows = read_comparisons(write_comparisons(tmp_path / "drawn", comparisons, bar=False))
    for c, again in zip(comparisons, rows):
        assert all(getattr(c, name) == getattr(again, name) for name in vars(c) if name != "images")
        assert [i.tobytes() for i in c.images] == [Image.open(i).tobytes() for i in again.images]
    with pytest.raises(BadRow, match="exists already"):
        write_comparisons(tmp_path / "drawn", comparisons, bar=False)


def test_show_prints_rows_and_a_wrong_name_is_one_line(tmp_path, capsys):
    data.main(["synthetic", "--out", str(tmp_path / "drawn"), "--n", "5"])
    data.main(["show", str(tmp_path / "drawn"), "--n", "2"])
    said = capsys.readouterr().out
    assert "5 comparisons" in said and "beats" in said and said.count("--- row") == 2
    for arguments, words in [(["nonsense"], "unknown data set 'nonsense'"), (["show", str(tmp_path / "nowhere")], "does not exist"),
                             (["synthetic"], "--out is missing"), (["shp", "--out", "x"], "--source is missing")]:
        with pytest.raises(BadRow, match=words):
            data.main(arguments)
    failed = subprocess.run([sys.executable, ROOT / "data.py", "nonsense"], capture_output=True, text=True)
    assert failed.returncode != 0 and failed.stderr.startswith("data.py: ") and failed.stderr.count("\n") == 1
