"""Rows as people really bring them: what somebody brought, and what must come out.

A table has a sentence, a row, and either the comparison that was meant or a part of the one line that refuses it. The
sources are public reports and files; the rows are made anew. `read` is what training, evaluation, RL, `show` and
`convert` do with a row.
"""
import base64
import copy
import io
import json
import math
import random
from pathlib import Path

import pytest
from PIL import Image

import data
from data import BadRow, parse_row, ranked, read_comparisons
from model import open_image, to_messages

PNG = io.BytesIO()
Image.new("RGB", (56, 56), "red").save(PNG, "PNG")
PNG = PNG.getvalue()
CODED = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{CODED}"

Q, A, B = "What is shown?", "A bus.", "Two buses."  # the question, the chosen and the rejected response
PAIR = {"prompt": Q, "chosen": A, "rejected": B}
NATIVE = {"prompt": Q, "responses": [A, B], "pairs": [[0, 1]]}


def system(text="Be brief."):
    return {"role": "system", "content": text}


def user(content=Q, **keys):
    return {"role": "user", "content": content, **keys}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def picture(**value):
    return {"type": "image", **value}


def text(words=Q):
    return {"type": "text", "text": words}


def human(words=Q):
    return {"from": "human", "value": words}


def gpt(words):
    return {"from": "gpt", "value": words}


def read(row, needs_responses=True):
    """([(role, text)], responses, pairs, images) of a row; images as relative paths, or as bytes."""
    comparison = parse_row(copy.deepcopy(row), Path("home"), needs_responses)
    messages = [(m["role"], m["content"]) for m in to_messages(comparison.prompt, comparison.images)]
    images = [image if isinstance(image, bytes) else image.removeprefix("home/") for image in comparison.images]
    return messages, comparison.responses, comparison.pairs, images


def asked(*turns, images=(), responses=(A, B), pairs=((0, 1),)):
    """What `read` gives where the turns before the response are these; a text is one of the user's."""
    turns = [("user", turn) if isinstance(turn, str) else turn for turn in turns]
    return turns, list(responses), list(pairs), list(images)


BE_BRIEF = ("system", "Be brief.")
SHOWN = asked("<image>" + Q, images=["p.png"])


def sentences(table):
    return [pytest.param(*values, id=sentence) for sentence, *values in table]


def refused(row, needs_responses=True):
    with pytest.raises(ValueError) as error:
        read(row, needs_responses)
    assert "\n" not in data.one_line(error.value)
    return str(error.value)


# Null, empty and absent -----------------------------------------------------------------------------------------------

EMPTY = [None, "", [], {}, math.nan]
# The keys that a table of several data sets gives to every row
OTHER_KEYS = ("images", "image", "system", "history", "answer", "critiques", "video", "tools", "context", "messages",
              "conversations", "rejected_response", "instruction", "id", "category")


@pytest.mark.parametrize("empty", EMPTY, ids=["null", "empty text", "empty list", "empty object", "NaN"])
@pytest.mark.parametrize("row, expected", sentences([
    ("a text pair", PAIR, asked(Q)),
    ("responses and pairs, chosen and rejected empty", NATIVE | dict.fromkeys(["chosen", "rejected"]), asked(Q)),
    ("a pair, responses and pairs empty", PAIR | dict.fromkeys(["responses", "pairs"]), asked(Q)),
    ("a picture in image, images empty", PAIR | {"image": "p.png"} | dict.fromkeys(["images"]), SHOWN),
    ("a picture in images, image empty", PAIR | {"images": ["p.png"]} | dict.fromkeys(["image"]), SHOWN),
    ("conversations, prompt empty", {"prompt": None, "chosen": [user(), assistant(A)],
                                     "rejected": [user(), assistant(B)]}, asked(Q)),
]))
def test_an_empty_key_is_an_absent_key(row, expected, empty):
    row = dict.fromkeys(OTHER_KEYS, empty) | {key: empty if value is None else value for key, value in row.items()}
    assert read(row) == expected


def test_an_empty_column_hides_no_prompt_for_rl_and_no_number():
    row = dict.fromkeys([*OTHER_KEYS, "chosen", "rejected", "responses", "pairs"])
    assert read(row | {"prompt": Q, "answer": 0}, False) == (([("user", Q)], [], [], []))
    comparison = parse_row(row | {"prompt": Q, "answer": 0, "id": 0}, Path("."), needs_responses=False)
    assert (comparison.answer, comparison.id) == ("0", "0")


@pytest.mark.parametrize("row, message", sentences([
    ("an empty response", PAIR | {"rejected": ""}, "response 1 is empty"),
    ("a null response", PAIR | {"rejected": None}, "must both be texts or both be lists of messages; found str and"),
    ("no pairs", NATIVE | {"pairs": None}, "the keys ['pairs'] are missing; found ['prompt', 'responses']"),
    ("nothing", {"prompt": None}, "the keys ['prompt'] are missing; found []"),
    ("pairs in both layouts", NATIVE | PAIR, "`pairs` beside `chosen` and `rejected`"),
    ("a picture that is null", PAIR | {"images": [None]}, "the path of an image is a NoneType"),
]))
def test_what_is_missing_is_named(row, message):
    assert message in refused(row)


def test_the_pairs_of_a_line_are_counted_although_other_keys_are_null():
    null = dict.fromkeys(["chosen", "rejected", "pairs", "rejected_response"])
    rows = [null | {"prompt": Q, "answer": 2}, null | NATIVE, null | PAIR, null | {"pairs": []} | PAIR,
            null | {"messages": [user(), assistant(A)], "rejected_response": B}]
    assert [data.count_pairs(json.dumps(row).encode()) for row in rows] == [0, 1, 1, 1, 1]


# Keys that are read, and keys that must not be passed over ------------------------------------------------------------


@pytest.mark.parametrize("row, expected", sentences([
    *[(f"the picture in {key}", PAIR | {key: "p.png"}, SHOWN)
      for key in ("image", "image_path", "image_paths", "image_url", "img", "images")],
    ("a list of one picture in img", PAIR | {"img": ["p.png"]}, SHOWN),
    ("the same picture in two keys", PAIR | {"image": "p.png", "images": ["p.png"]}, SHOWN),
    ("the question in question", {"question": Q, "chosen": A, "rejected": B}, asked(Q)),
    ("the question in query", {"query": Q, "chosen": A, "rejected": B}, asked(Q)),
    ("system beside a text", PAIR | {"system": "Be brief."}, asked(BE_BRIEF, Q)),
    ("system_prompt beside responses", NATIVE | {"system_prompt": "Be brief."}, asked(BE_BRIEF, Q)),
    ("system that the messages have too", PAIR | {"prompt": [system(), user()], "system": "Be brief.\n"},
     asked(BE_BRIEF, Q)),
    ("history beside a text", PAIR | {"history": [["Hi", "Hello."]]}, asked("Hi", ("assistant", "Hello."), Q)),
    ("history as messages", PAIR | {"history": [user("Hi"), assistant("Hello.")]},
     asked("Hi", ("assistant", "Hello."), Q)),
    ("history goes between system and question", PAIR | {"history": [["Hi", "Hello."]], "system": "Be brief."},
     asked(BE_BRIEF, "Hi", ("assistant", "Hello."), Q)),
    ("history with the system turn in the prompt", PAIR | {"history": [["Hi", "Hello."]], "prompt": [system(), user()]},
     asked(BE_BRIEF, "Hi", ("assistant", "Hello."), Q)),
    ("the same question asked again", PAIR | {"history": [[Q, "A car."]]}, asked(Q, ("assistant", "A car."), Q)),
    ("messages that repeat chosen, as in ultrafeedback_binarized",
     {"prompt": Q, "messages": [user(), assistant(A)], "chosen": [user(), assistant(A)],
      "rejected": [user(), assistant(B)], "score_chosen": 8.5}, asked(Q)),
    ("rejected_images that repeat images", PAIR | {"images": ["p.png"], "rejected_images": ["p.png"]}, SHOWN),
    ("a margin and labels of one's own", PAIR | {"margin": 2.5, "annotator": "x", "label": [1, 0]}, asked(Q)),
]))
def test_a_key_whose_meaning_is_plain_is_read(row, expected):
    assert read(row) == expected


@pytest.mark.parametrize("row, message", sentences([
    *[(f"{key} is a part of the prompt", PAIR | {key: "The sky is blue."},
       f"the key `{key}` is not read: write it into `prompt`")
      for key in ("context", "input", "instruction", "options", "choices", "objects")],
    ("another conversation", PAIR | {"messages": [user("Hi")]}, "the key `messages` is not read"),
    ("conversations beside texts", PAIR | {"conversations": [human("Hi")]}, "the key `conversations` is not read"),
    ("tools", PAIR | {"tools": [{"name": "search"}]}, "the key `tools` is not read: describe the tools in `system`"),
    *[(key, PAIR | {key: ["a.mp4"]}, f"the key `{key}` is not read: put the path of the folder of frames into `images`")
      for key in ("video", "videos", "frames")],
    *[(key, PAIR | {key: ["a.wav"]}, f"the key `{key}` is not read: audio is not supported")
      for key in ("audio", "audios")],
    ("other pictures for the rejected response", PAIR | {"images": ["p.png"], "rejected_images": ["q.png"]},
     "the key `rejected_images` is not read: pictures in responses are not supported yet"),
    ("two different pictures in two keys", PAIR | {"image": "p.png", "images": ["q.png"]},
     "`images` and `image` differ"),
    ("two different questions", PAIR | {"question": "Why?"}, "`prompt` and `question` differ"),
    ("two different system texts", PAIR | {"system": "Be kind.", "prompt": [system(), user()]},
     "system is neither the beginning nor the end"),
    ("history as a text", PAIR | {"history": "Hi"}, "history is a str, want [[question, answer], ...]"),
    ("history of single texts", PAIR | {"history": ["Hi", "Hello."]}, "history holds Hi, want [question, answer]"),
    ("a call in a response", {"prompt": Q, "chosen": [assistant(None, tool_calls=[{"name": "f"}])],
                              "rejected": [assistant(B)]},
     "the assistant's message holds tool_calls, which is not read"),
    ("a call in the prompt", PAIR | {"prompt": [user(), assistant("", tool_calls=[{"name": "f"}]), user()]},
     "the assistant's message holds tool_calls"),
    ("a thought beside the response", {"prompt": Q, "chosen": [assistant(A, reasoning_content="Hm.")],
                                       "rejected": [assistant(B)]},
     "the assistant's message holds reasoning_content, which is not read"),
    ("a picture beside the content", PAIR | {"prompt": [user(images=["p.png"])]},
     "the user's message holds images, which is not read"),
    ("only messages", {"messages": [user()], "answer": "2"}, "the key `messages` is not read"),
]))
def test_a_key_that_holds_content_and_is_not_read_is_named_with_what_to_do(row, message):
    assert message in refused(row)


def test_the_help_lists_every_key_from_the_tables_that_the_reader_uses(capsys):
    with pytest.raises(SystemExit):
        data.main(["--help"])
    printed = capsys.readouterr().out
    keys = [*data.ROW_KEYS]
    for table in (data.SPELLINGS, data.UNREAD_CONTENT):
        keys += [key for row in table.values() for key in row]
    assert len(keys) == len(set(keys)) and all(f" {key}" in printed for key in keys)
    assert max(len(line) for line in data.describe_keys().splitlines()) <= 80


# A prompt beside whole conversations: one pair in many ways -----------------------------------------------------------

NULLS = {"tool_calls": None, "name": None}
PROMPTS = [  # (how the prompt is written, the prompt, whether it has a system turn)
    ("no prompt", None, False),
    ("a text", Q, False),
    ("a text with a line break", Q + "\n", False),
    ("a text with a placeholder", "<image>\n" + Q, False),
    ("messages", [user()], False),
    ("messages with null keys and an id", [user(id="1", **NULLS)], False),
    ("typed parts", [user([picture(), text()])], False),
    ("typed parts with null keys", [user([picture(text=None), text() | {"image": None}])], False),
    ("typed parts with the picture", [user([picture(image="p.png"), text()])], False),
    ("a system turn and messages", [system(), user()], True),
    ("a system turn and typed parts", [system(), user([picture(), text(Q + "\n")])], True),
]
CONVERSATIONS = [  # (what stands before the response in chosen and in rejected, ..., whether with a system turn)
    ("the responses alone", [], [], False),
    ("the question", [user()], [user()], False),
    ("the question with a line break", [user(Q + "\n")], [user(Q + "\n")], False),
    ("the question, null keys in chosen, an id in rejected", [user(**NULLS)], [user(id="2")], False),
    ("a text in chosen, typed parts in rejected", [user("<image>" + Q)], [user([picture(), text()])], False),
    ("the picture inside both", [user([picture(image="p.png"), text()])], [user([picture(image="p.png"), text()])],
     False),
    ("a system turn and the question", [system(), user()], [system(), user(Q + " ")], True),
]


WAYS = [(f"{how}; {where}", prompt, in_prompt, chosen, rejected, in_conversation)
        for how, prompt, in_prompt in PROMPTS for where, chosen, rejected, in_conversation in CONVERSATIONS
        if prompt or chosen]  # else there is no question


@pytest.mark.parametrize("prompt, in_prompt, chosen, rejected, in_conversation", sentences(WAYS))
def test_one_pair_is_one_pair_however_it_is_written(prompt, in_prompt, chosen, rejected, in_conversation):
    """76 ways: the question is asked once, with its picture, and no system turn is lost."""
    row = {"prompt": prompt, "chosen": chosen + [assistant(A)], "rejected": rejected + [assistant(B)],
           "images": ["p.png"]}
    messages, *others = read(row)
    words = [(role, content.replace("\n", "").strip()) for role, content in messages]
    assert words == [BE_BRIEF] * (in_prompt or in_conversation) + [("user", "<image>" + Q)]
    assert others == [[A, B], [(0, 1)], ["p.png"]]


TALK = [user("Hi"), assistant("Hello."), user("And now?")]
TURNS = ("Hi", ("assistant", "Hello."), "And now?")


@pytest.mark.parametrize("prompt, head, expected", sentences([
    ("the first question", "Hi", TALK, TURNS),
    ("the last question", "And now?", TALK, TURNS),
    ("all turns", TALK, TALK, TURNS),
    ("the first two turns", TALK[:2], TALK, TURNS),
    ("a system turn alone", [system()], TALK, (BE_BRIEF, *TURNS)),
    ("a system turn and the first question", [system(), user("Hi")], TALK, (BE_BRIEF, *TURNS)),
    ("a system turn and all turns", [system(), *TALK], TALK, (BE_BRIEF, *TURNS)),
    ("all turns, of which the conversations have the last", [system(), *TALK], TALK[2:], (BE_BRIEF, *TURNS)),
    ("a system turn that the conversations begin with", [system()], [system(), *TALK], (BE_BRIEF, *TURNS)),
    ("a question that the conversations answer and go on from", "Hi", TALK[1:], TURNS),
    ("an answered question that the conversations go on from", TALK[:2], TALK[2:], TURNS),
    ("a question that was asked twice", [*TALK[:2], user("Hi")], [*TALK[:2], user("Hi"), *TALK[1:]],
     ("Hi", ("assistant", "Hello."), "Hi", ("assistant", "Hello."), "And now?")),
    ("the picture at the last question", [user("<image>And now?")], TALK,
     ("Hi", ("assistant", "Hello."), "<image>And now?")),
]))
def test_a_prompt_is_the_beginning_or_the_end_of_the_conversations(prompt, head, expected):
    images = ["p.png"] if "<image>" in str(expected) else []
    row = {"prompt": prompt, "chosen": head + [assistant(A)], "rejected": head + [assistant(B)], "images": images}
    assert read(row) == asked(*expected, images=images)


@pytest.mark.parametrize("prompt, chosen, rejected, message", sentences([
    ("another question", "Why?", TALK, TALK,
     "the prompt is neither the beginning nor the end of the messages beside it: 'Why?' and 'Hi'"),
    ("the question in the middle", "Well?", [*TALK[:2], user("Well?"), *TALK[1:]],
     [*TALK[:2], user("Well?"), *TALK[1:]], "the prompt is neither the beginning nor the end"),
    ("another system turn", [system("Be kind."), user()], [system(), user()], [system(), user()], "is neither"),
    ("two different heads", None, TALK, [user("Ho"), *TALK[1:]], "part before their last message"),
    ("two different pictures", None, [user([picture(image="p.png"), text()])], [user([picture(image="q.png"), text()])],
     "part before their last message"),
    ("a picture in the prompt and another in the conversations", [user([picture(image="q.png"), text()])],
     [user([picture(image="p.png"), text()])], [user([picture(image="p.png"), text()])], "is neither"),
]))
def test_a_prompt_that_fits_nowhere_is_refused(prompt, chosen, rejected, message):
    row = {"prompt": prompt, "chosen": chosen + [assistant(A)], "rejected": rejected + [assistant(B)]}
    assert message in refused(row)


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part, expected", sentences([
    ("image", picture(image="p.png"), "p.png"),
    ("path", picture(path="p.png"), "p.png"),
    ("url that is a path", picture(url="p.png"), "p.png"),
    ("image_url as OpenAI has it", {"type": "image_url", "image_url": {"url": "p.png"}}, "p.png"),
    ("image_url as a text", {"type": "image_url", "image_url": "p.png"}, "p.png"),
    ("a data URI", {"type": "image_url", "image_url": {"url": URI}}, PNG),
    ("base64", picture(base64=CODED), PNG),
    ("bytes and path as in datasets", picture(image={"bytes": None, "path": "p.png"}), "p.png"),
    ("other keys null", picture(image=None, path="p.png", text=None, image_url=None), "p.png"),
    ("a folder of frames", {"type": "video", "video": "clip"}, "clip"),
]))
def test_a_picture_inside_a_typed_part_is_read(part, expected):
    content = [part, text()]
    shown = asked("<image>" + Q, images=[expected])
    assert read(PAIR | {"prompt": [user(content)]}) == shown
    assert read(NATIVE | {"prompt": [user(content)]}) == shown
    assert read({"chosen": [user(content), assistant(A)], "rejected": [user(content), assistant(B)]}) == shown
    comparison = parse_row(PAIR | {"prompt": [user(content)]}, Path("."))
    assert comparison.prompt[0]["content"][0] == {"type": "image"}  # the picture stands in `images` alone


@pytest.mark.parametrize("image, expected", sentences([
    ("a path", "p.png", "p.png"), ("a data URI", URI, PNG), ("base64", CODED, PNG), ("bytes and path", {"bytes": CODED},
                                                                                     PNG),
    ("an object with a url", {"url": "p.png"}, "p.png")]))
def test_a_picture_in_images_may_be_base64(image, expected):
    assert read(PAIR | {"images": [image]}) == asked("<image>" + Q, images=[expected])


def test_several_pictures_keep_their_places():
    content = [text("Left "), picture(image="p.png"), text(" or right "), picture(image="q.png"), text("?")]
    both = asked("Left <image> or right <image>?", images=["p.png", "q.png"])
    assert read(PAIR | {"prompt": [user(content)]}) == both
    assert read(PAIR | {"prompt": [user(content)], "images": ["p.png", "q.png"]}) == both


@pytest.mark.parametrize("row, message", sentences([
    ("on the web", PAIR | {"images": ["https://example.org/p.png"]},
     "an image on the web: https://example.org/p.png; fetch it into the folder"),
    ("on the web, in a typed part", PAIR | {"prompt": [user([picture(url="http://example.org/p.png")])]},
     "an image on the web: http://example.org/p.png"),
    ("an absolute path", PAIR | {"prompt": [user([picture(path="/p.png")])]},
     "an image outside the data folder: '/p.png'"),
    ("file://", PAIR | {"images": ["file:///p.png"]}, "an image outside the data folder: 'file:///p.png'"),
    ("base64 cut short", PAIR | {"images": [URI[:-5]]}, "broken image: base64 that cannot be decoded"),
    ("one place too many", PAIR | {"prompt": [user([picture(image="p.png"), picture(), text()])]},
     "2 <image> marks but there are 1 images"),
    ("other ones in images", PAIR | {"prompt": [user([picture(image="p.png"), text()])], "images": ["q.png"]},
     "pictures inside the messages and other ones in `images`"),
    ("in a response", {"prompt": Q, "chosen": [assistant([picture(image="p.png")])], "rejected": [assistant(B)]},
     "a response holds an image"),
]))
def test_a_picture_that_cannot_be_read_is_one_line(row, message):
    assert message in refused(row)


def test_a_picture_in_memory_is_trained_on_and_shown(tmp_path, capsys, tiny):
    """base64 in a training folder: bytes in Comparison.images, which every reader of images takes."""
    from model import encode
    (tmp_path / "comparisons.jsonl").write_text(json.dumps(PAIR | {"images": [URI]}) + "\n")
    comparison = read_comparisons(tmp_path)[0]
    assert open_image(comparison.images[0]).size == (56, 56)
    assert len(encode(comparison, tiny.processor).image_grid_thw) == 1
    data.main(["show", str(tmp_path)])
    assert f"image   {len(PNG)} bytes, 56 x 56" in capsys.readouterr().out


# Layouts of other projects --------------------------------------------------------------------------------------------

HH = "\n\nHuman: What is shown?\n\nAssistant: {}"
HH_TALK = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is shown?\n\nAssistant: {}"
ANSWERED = ("Hi", ("assistant", "Hello."), Q)
CHOSEN = [user(), assistant(A)]
OTHER_LAYOUTS = [  # (sentence, row, layout, what is read)
    ("TRL, explicit prompt", PAIR, "TRL", asked(Q)),
    ("TRL, implicit prompt", {"chosen": CHOSEN, "rejected": [user(), assistant(B)]}, "TRL", asked(Q)),
    ("this file's own", NATIVE, "native", asked(Q)),
    ("LLaMA-Factory's sharegpt", {"conversations": [human()], "chosen": gpt(A), "rejected": gpt(B)},
     "LLaMA-Factory sharegpt", asked(Q)),
    ("sharegpt with pictures, system and earlier turns",
     {"conversations": [human("<image>Hi"), gpt("Hello."), human()], "chosen": gpt(A), "rejected": gpt(B),
      "system": "Be brief.", "images": ["p.png"], "tools": ""}, "LLaMA-Factory sharegpt",
     asked(BE_BRIEF, "<image>Hi", ("assistant", "Hello."), Q, images=["p.png"])),
    ("sharegpt with the system turn inside", {"conversations": [{"from": "system", "value": "Be brief."}, human()],
                                              "chosen": gpt(A), "rejected": gpt(B)}, "LLaMA-Factory sharegpt",
     asked(BE_BRIEF, Q)),
    ("sharegpt with what a tool returned", {"conversations": [human(), gpt("I look."), {"from": "observation",
     "value": "A bus stop."}], "chosen": gpt(A), "rejected": gpt(B)}, "LLaMA-Factory sharegpt",
     asked(Q, ("assistant", "I look."), ("tool", "A bus stop."))),
    ("sharegpt in OpenAI's words", {"messages": [user()], "chosen": assistant(A), "rejected": assistant(B)},
     "LLaMA-Factory sharegpt", asked(Q)),
    ("chosen and rejected as one message each", {"prompt": Q, "chosen": assistant(A), "rejected": assistant(B)},
     "LLaMA-Factory sharegpt", asked(Q)),
    ("LLaMA-Factory's alpaca", {"instruction": Q, "input": "", "chosen": A, "rejected": B}, "LLaMA-Factory alpaca",
     asked(Q)),
    ("alpaca with input, system and history",
     {"instruction": "Translate.", "input": "Hola", "chosen": A, "rejected": B, "system": "Be brief.",
      "history": [["Hi", "Hello."]]}, "LLaMA-Factory alpaca",
     asked(BE_BRIEF, "Hi", ("assistant", "Hello."), "Translate.\nHola")),
    ("alpaca with a picture", {"instruction": Q, "chosen": A, "rejected": B, "images": ["p.png"]},
     "LLaMA-Factory alpaca", SHOWN),
    ("Anthropic's hh-rlhf", {"chosen": HH.format(A), "rejected": HH.format(B)}, "hh-rlhf", asked(Q)),
    ("hh-rlhf with earlier turns", {"chosen": HH_TALK.format(A), "rejected": HH_TALK.format(B)}, "hh-rlhf",
     asked(*ANSWERED)),
    ("a copy of hh-rlhf with its prompt apart",
     {"prompt": HH_TALK.format("").rstrip(), "chosen": " " + A, "rejected": " " + B}, "hh-rlhf", asked(*ANSWERED)),
    ("a copy of hh-rlhf with its prompt apart and repeated",
     {"prompt": HH.format(""), "chosen": HH.format(A), "rejected": HH.format(B)}, "hh-rlhf", asked(Q)),
    ("texts that hold a dialogue", {"prompt": "Human: Go on.", "chosen": "So:\n\nAssistant: Yes.",
                                    "rejected": "So:\n\nAssistant: No."}, "TRL",
     asked("Human: Go on.", responses=["So:\n\nAssistant: Yes.", "So:\n\nAssistant: No."])),
    ("ms-swift with a text", {"messages": CHOSEN, "rejected_response": B}, "ms-swift", asked(Q)),
    ("ms-swift with several texts", {"messages": CHOSEN, "rejected_response": [B, "A car."]}, "ms-swift",
     asked(Q, responses=[A, B, "A car."], pairs=[(0, 1), (0, 2)])),
    ("ms-swift with messages", {"messages": [system(), *TALK, assistant(A)], "rejected_response": [assistant(B)]},
     "ms-swift", asked(BE_BRIEF, *TURNS)),
    ("ms-swift with two conversations", {"messages": CHOSEN, "rejected_messages": [user(), assistant(B)]}, "ms-swift",
     asked(Q)),
    ("ms-swift with pictures, given twice",
     {"messages": [user("<image>" + Q), assistant(A)], "images": ["p.png"], "margin": 1.5,
      "rejected_messages": [user("<image>" + Q), assistant(B)], "rejected_images": ["p.png"]}, "ms-swift", SHOWN),
    ("ms-swift 2", {"query": Q, "response": A, "rejected_response": B, "history": [["Hi", "Hello."]],
                    "system": "Be brief."}, "ms-swift", asked(BE_BRIEF, *ANSWERED)),
]


@pytest.mark.parametrize("row, layout, expected", sentences(OTHER_LAYOUTS))
def test_a_layout_is_recognised_by_its_keys(row, layout, expected):
    assert read(row) == expected and data.parse_fields(row).layout == layout


@pytest.mark.parametrize("row, message", sentences([
    ("texts without a prompt", {"chosen": "The sky is blue.", "rejected": "The sky is green."},
     "chosen and rejected are texts without a prompt; want the question as `prompt`"),
    ("hh-rlhf that ends with the human", {"chosen": HH.format(A) + "\n\nHuman: Thanks!", "rejected": HH.format(B)},
     "a response must be a message of the assistant"),
    ("hh-rlhf whose dialogues part early", {"chosen": HH_TALK.format(A), "rejected": HH.format(B)},
     "part before their last message"),
    ("hh-rlhf with an empty response", {"chosen": HH.format(A), "rejected": HH.format("")}, "response 1 is empty"),
    ("sharegpt with tools", {"conversations": [human()], "chosen": gpt(A), "rejected": gpt(B), "tools": "[{}]"},
     "the key `tools` is not read"),
    ("sharegpt with a call", {"conversations": [human(), {"from": "function_call", "value": "{}"}], "chosen": gpt(A),
                              "rejected": gpt(B)}, "no role among"),
    ("sharegpt without its values", {"conversations": [{"from": "human"}], "chosen": gpt(A), "rejected": gpt(B)},
     "no field value"),
    ("sharegpt of texts", {"conversations": {"a": 1}, "chosen": gpt(A), "rejected": gpt(B)}, "no field from"),
    ("ms-swift with other pictures", {"messages": CHOSEN, "rejected_response": B, "images": ["p.png"],
                                      "rejected_images": ["q.png"]},
     "the key `rejected_images` is not read: pictures in responses are not supported yet"),
    ("ms-swift with the same response", {"messages": CHOSEN, "rejected_response": A}, "two identical responses"),
    ("ms-swift with two questions", {"messages": CHOSEN, "rejected_messages": [user("Why?"), assistant(B)]},
     "part before their last message"),
    ("ms-swift with several texts and another prompt",
     {"messages": CHOSEN, "rejected_response": [B, "A car."], "prompt": "Why?"}, "`prompt` beside `messages`"),
    ("ms-swift with a number", {"messages": CHOSEN, "rejected_response": 5}, "a conversation holds a int"),
    ("ms-swift with objects", {"messages": CHOSEN, "rejected_response": B, "objects": {"ref": ["bus"]}},
     "the key `objects` is not read"),
    ("alpaca beside a prompt", {"instruction": Q, "prompt": "Why?", "chosen": A, "rejected": B},
     "the key `instruction` is not read"),
    ("JSON by columns", {"prompt": [Q, Q], "chosen": [A, A], "rejected": [B, B]},
     "JSON by columns: `prompt` holds 2 rows; want one JSON object a line"),
    ("pandas' JSON by columns", {"prompt": {"0": Q}, "chosen": {"0": A}, "rejected": {"0": B}},
     "JSON by columns: `prompt` holds 1 rows"),
    ("conversations by columns", {"chosen": [CHOSEN, CHOSEN], "rejected": [CHOSEN, CHOSEN]},
     "JSON by columns: `chosen` holds 2 rows"),
]))
def test_a_row_in_no_layout_is_refused_in_words(row, message):
    assert message in refused(row)


def test_each_layout_is_shown_and_converted_as_it_was_meant(tmp_path, capsys):
    """As a user would: show, then pairs. Both name the layout and the keys that are not read."""
    for number, (sentence, row, layout, (_, responses, pairs, images)) in enumerate(OTHER_LAYOUTS):
        source = tmp_path / str(number)
        source.mkdir()
        (source / "p.png").write_bytes(PNG)
        (source / "comparisons.jsonl").write_text(json.dumps(row | {"annotator": 7}) + "\n")
        data.main(["show", str(source)])
        printed = capsys.readouterr().out
        assert f"layout (rows): {layout} (1)" in printed and "annotator (1)" in printed
        assert printed.count("p.png, 56 x 56") == len(images)
        assert all(response in printed for response in responses)

        out = tmp_path / f"{number} out"
        data.main(["pairs", "--source", str(source), "--out", str(out)])
        printed = capsys.readouterr().out
        report = json.loads((out / "report.json").read_text())
        assert report["layouts"] == {layout: 1} and report["unread_keys"]["annotator"] == 1
        assert f"python data.py show '{out}'" in printed  # the name has a space
        comparison = read_comparisons(out)[0]
        before = parse_row(row, source)
        assert to_messages(comparison.prompt, comparison.images) == to_messages(before.prompt, before.images), sentence
        assert (comparison.responses, comparison.pairs, len(comparison.images)) == (responses, pairs, len(images))


# Chat templates and marks that are already in the texts ---------------------------------------------------------------


@pytest.mark.parametrize("row, message", sentences([
    ("ChatML in the prompt", PAIR | {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"},
     "a chat template in the prompt: a message begins with '<|im_start|>'"),
    ("ChatML in a second turn", PAIR | {"prompt": [user("Hi"), assistant("Hello."), user("<|im_start|>user\nHi")]},
     "a message begins with '<|im_start|>'"),
    ("ChatML after a picture", PAIR | {"prompt": "<image><|im_start|>user\nHi", "images": ["p.png"]}, "begins with"),
    ("Llama 2", PAIR | {"prompt": "[INST] Hi [/INST]"}, "begins with '[INST]'"),
    ("Llama 2 with its first token", PAIR | {"prompt": "<s>[INST] Hi [/INST]"}, "begins with '<s>'"),
    ("Llama 3", PAIR | {"prompt": "<|begin_of_text|><|start_header_id|>user"}, "begins with '<|begin_of_text|>'"),
    ("Gemma", NATIVE | {"prompt": "<start_of_turn>user\nHi"}, "begins with '<start_of_turn>'"),
    *[(f"a response that ends with {token}", PAIR | {"rejected": B + token}, f"it ends with '{token.strip()}'")
      for token in ("<|im_end|>", "</s>", "<|eot_id|>", "<|endoftext|>\n", "<end_of_turn>\n")],
    ("a response of responses", NATIVE | {"responses": [A + "</s>", B]}, "a chat template in a response"),
    ("a message as response", {"prompt": Q, "chosen": [assistant(A + "<|im_end|>")], "rejected": [assistant(B)]},
     "a chat template in a response"),
    *[(f"{mark} for a picture", PAIR | {"prompt": f"{mark}\nWhat?", "images": ["p.png"]},
       "another project's mark for an image")
      for mark in ("<ImageHere>", "<IMG_CONTEXT>", "<|vision_start|><|image_pad|><|vision_end|>")],
    ("Qwen-VL's path in the text", PAIR | {"prompt": "Picture 1: <img>p.png</img>\nWhat?"},
     "another project's mark for an image: '<img>p.png</img>'; want <image> in its place"),
]))
def test_a_chat_template_in_the_texts_is_refused(row, message):
    assert message in refused(row)


def test_special_tokens_elsewhere_are_words_that_the_report_counts(tmp_path):
    rows = [PAIR | {"prompt": "What does <|im_start|> mean?"}, PAIR | {"prompt": "Why <IMG_CONTEXT>?"},
            NATIVE | {"responses": ["Write </s>, not <s>. And then <|im_start|>.", "No </s>."]}, PAIR]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = data.convert("pairs", data.Config(source=[str(tmp_path / "a.jsonl")], out=str(tmp_path / "out")))
    assert report["comparisons"] == 4
    assert report["special_tokens"] == {"<|im_start|>": 2, "<IMG_CONTEXT>": 1, "</s>": 1, "<s>": 1}


def test_the_texts_of_a_published_set_stay_as_they_are():
    """Its rows, and the folders made of it, are used as published, whatever tokens they hold."""
    row = {"prompt": "[INST] Hi", "chosen": A + "</s>", "rejected": HH.format(B)}
    assert read(row | {"source": "skywork"}) == asked("[INST] Hi", responses=[A + "</s>", HH.format(B)])
    assert read(row | {"source": "rewardbench"})[1] == [A + "</s>", HH.format(B)]
    dialogues = {"prompt": HH.format("").rstrip(), "chosen": HH.format(A), "rejected": HH.format(B)}
    assert read(dialogues | {"source": "shp"})[1] == [HH.format(A), HH.format(B)]
    assert "a chat template" in refused(row | {"source": "pairs"})


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, message", sentences([
    ("a JSON array", json.dumps([PAIR], indent=1).encode(), "comparisons.jsonl is one JSON array, want one JSON object "
     "a line; python data.py pairs --source '{file}' --out FOLDER reads arrays"),
    ("UTF-16", (json.dumps(PAIR) + "\n").encode("utf-16"), "is no UTF-8 text: .*iconv -f UTF-16 -t UTF-8 '{file}'"),
    ("UTF-16 without its mark", (json.dumps(PAIR) + "\n").encode("utf-16-le"), "is no UTF-8 text"),
    ("a compressed file", b"\x1f\x8b\x08\0\0\0\0\0\0\x03abc", "is no UTF-8 text: unpack it if it is compressed"),
]))
def test_a_file_that_is_no_json_lines_is_refused_when_it_is_opened(tmp_path, content, message):
    folder = tmp_path / "my rows"
    folder.mkdir()
    file = folder / "comparisons.jsonl"
    file.write_bytes(content)
    with pytest.raises(BadRow, match=message.replace("{file}", str(file))):
        read_comparisons(folder)
    if b"\0" in content:
        with pytest.raises(BadRow, match="is no UTF-8 text"):
            data.convert("pairs", data.Config(source=[str(file)], out=str(tmp_path / "out")))
    else:
        assert data.convert("pairs", data.Config(source=[str(file)], out=str(tmp_path / "out")))["comparisons"] == 1


def test_a_blank_answer_is_no_answer(tmp_path):
    """rl_demo.py --reward rule asks for `answer`, and so does `show`."""
    row = {"prompt": "1 + 1?", "answer": " \n"}
    assert parse_row(row, Path("."), needs_responses=False).answer == ""
    (tmp_path / "comparisons.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadRow, match="comparisons.jsonl:1: neither pairs nor an answer"):
        data.main(["show", str(tmp_path)])
    with pytest.raises(BadRow, match="no answer: it is empty"):
        data.convert("pairs", data.Config(source=[str(tmp_path)], out=str(tmp_path.with_name("blank"))))


def test_an_id_of_zero_is_an_id(tmp_path):
    rows = [PAIR | {"id": 0}, PAIR | {"prompt": "Why?", "id": ""}, PAIR | {"prompt": "How?", "id": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data.convert("pairs", data.Config(source=[str(tmp_path / "a.jsonl")], out=str(tmp_path / "out")))
    assert [comparison.id for comparison in read_comparisons(tmp_path / "out")] == ["0", "a.jsonl:2", "a.jsonl:3"]


# Scores ---------------------------------------------------------------------------------------------------------------


def test_a_score_that_is_nan_is_no_score():
    """A B C D with NaN 2 4 3: A is unrated, as with None, wherever it stands."""
    for unrated in (None, math.nan):
        for place in range(4):
            responses, scores = ["B", "C", "D"], [2, 4, 3]
            responses.insert(place, "A")
            scores.insert(place, unrated)
            row = ranked("Why?", responses, scores)
            assert (row["responses"], row["pairs"]) == (["C", "D", "B"], [(0, 1), (0, 2), (1, 2)])
    with pytest.raises(ValueError, match="tie or unrated"):
        ranked("Why?", ["a", "b"], [1, math.nan])
    with pytest.raises(ValueError, match="3 responses but 2 scores"):
        ranked("Why?", ["a", "b", "c"], [1, 2])


def test_a_ranking_with_nan_is_compared_with_its_scores_where_both_are_known():
    row = {"question": Q, "models_output": ["a", "b", "c"], "final_ranking": [1, math.nan, 2], "image": "p.png",
           "helpfulness": [3, math.nan, 1]}
    assert data.mm_rlhf(row)["responses"] == ["a", "c"]
    with pytest.raises(ValueError, match="ranking against its scores"):
        data.mm_rlhf(row | {"helpfulness": [1, 9, 3], "faithfulness": [math.nan] * 3})


# Whatever stands in a row ---------------------------------------------------------------------------------------------


def test_a_row_is_read_or_refused_whatever_stands_in_it():
    """20,000 rows with their values exchanged for others: a ValueError, which callers turn into one line, or a
    comparison; never another error."""
    rng = random.Random(0)
    rows = [row for _, row, *_ in OTHER_LAYOUTS] + [PAIR | {"history": [["Hi", "Ho"]], "system": "x", "id": 1}]
    values = [None, "", [], {}, 0, 1.5, True, math.nan, "text", ["a", "b"], [[0, 1]], {"a": 1}, {"0": "a"}, [None],
              [1], user(), [user()], [gpt(A)], gpt(A), [picture()], [[]], "\n\nHuman: a\n\nAssistant: b", b"bytes",
              ("a",)]
    keys = sorted({key for row in rows for key in row} | {"image", "responses", "answer", "critiques", "video"})
    outcomes = set()
    for _ in range(20_000):
        row = copy.deepcopy(rng.choice(rows))
        for _ in range(rng.randint(1, 3)):
            row[rng.choice(keys)] = rng.choice(values)
        try:
            parse_row(row, Path("."), needs_responses=rng.random() < 0.5)
            outcomes.add("read")
        except ValueError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
