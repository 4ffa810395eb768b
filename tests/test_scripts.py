"""What holds for every script: help, flags, doctests, shape; and for the README: its commands and recipes work."""
import ast
import doctest
import importlib
import io
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import tokenize
from dataclasses import fields

import pytest
import transformers
from PIL import Image
from transformers import HfArgumentParser

import model
from conftest import ROOT
from data import synthetic, write_comparisons
from train import Config, end_processes, main

SCRIPTS = ["model", "data", "train", "evaluate", "rl_demo"]  # in the order of reading and of the imports
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS}
RULE = "# " + "=" * 86
RULED_LINE = f"{RULE}\n# First reading ends here. Below: what flags, other families and other paradigms add.\n{RULE}\n"
ABOVE = {name: source.partition(RULED_LINE)[0] for name, source in SOURCES.items()}


@pytest.fixture
def run_script(monkeypatch):
    """`python SCRIPT WORDS` in this process, which has torch loaded already; returns its exit status."""
    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        return end.value.code

    before = signal.getsignal(signal.SIGINT)
    yield run
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_every_script_prints_its_help(name, run_script, capsys):
    """model.py is read, not run."""
    assert run_script(name, "--help") == 0
    output = capsys.readouterr().out
    assert all(f"--{field.name}" in output for field in fields(importlib.import_module(name).Config))


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_every_flag_is_read_and_explained(name):
    """A field that nothing reads is a promise that nothing keeps."""
    for field in fields(importlib.import_module(name).Config):
        read = re.search(rf"\b(cfg|self|config)\.{field.name}\b", SOURCES[name])
        assert read, f"{name}.py never reads --{field.name}"
        assert len(field.metadata["help"]) > 10, f"{name}.py does not explain --{field.name}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_examples_in_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_an_unknown_flag_is_one_line(name, run_script, capsys):
    command = ["rlaif-v"] if name == "data" else []
    status = run_script(name, *command, "--speed", "1")
    message = capsys.readouterr().err
    if isinstance(status, str):  # Python prints it when it ends
        message, status = status + "\n", 1
    assert status == 1 and message.count("\n") == 1 and message.startswith(f"{name}.py: ") and "--speed" in message


def test_no_script_loads_what_it_must_not():
    for name, source in SOURCES.items():
        assert not re.search(r"trust_remote_code\s*=\s*True|torch\.load|pickle\.load", source), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_only_from_those_to_be_read_before_it_and_has_one_ruled_line(name):
    earlier = SCRIPTS[:SCRIPTS.index(name)]
    imported = re.findall(r"^(?:from|import) (\w+)", SOURCES[name], re.M)
    assert {module for module in imported if module in SCRIPTS} <= set(earlier)
    assert SOURCES[name].count(RULED_LINE) == 1
    assert SOURCES[name].count("First reading ends here") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_lines_have_at_most_100_columns(name):
    long_lines = [number for number, line in enumerate(SOURCES[name].splitlines(), start=1) if len(line) > 100]
    assert not long_lines


# Names that are defined below the line and used above it: where a flag, a backbone or a row leads there ...
APPENDIX = {
    "model": {
        "FAMILIES": "--backbone of another family",
        "PARADIGMS": "--paradigm",
        "TINY_MODELS": "--backbone tiny-...",
        "run_rows": "--backbone with recurrent or sliding-window layers",
        "is_video": "a video in the data",
        "preprocess_qwen_video": "a video in the data",
    },
    "data": {
        "BenchmarkRows": "--decontaminate",
        "judge_prompts": "python data.py judge",
        "read_source": "--source",
        "to_texts": "a row in the layout of another project",
    },
    "train": {
        "add_lora": "--lora",
        "shard_model": "--shard",
    },
    "evaluate": {
        "score_with_ensemble": "--model with several folders",
        "set_up_critic_or_judge": "--critiques",
        "judge_figures": "--model of a judge",
        "serve": "--serve",
    },
    "rl_demo": {
        "equal_formulas": "math-verify is installed",
        "score_by_judge": "--judge",
    },
}
# ... and what every run calls, but what changes no number: pictures and pages, refusals of what cannot be used, speed
ALWAYS = {
    "model": {"load_config", "check_processor", "explain_image_error", "usual_mode", "use_window_attention"},
    "data": set(),
    "train": {"draw_curves"},
    "evaluate": {"write_html_report"},
    "rl_demo": {"write_report"},
}


def defined(nodes):
    """The names that statements of a module bind: functions, classes, constants."""
    names = set()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                names |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def used(source):
    """The names in a text of Python, also in quoted annotations."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            for part in ast.walk(annotation) if annotation else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    names |= set(re.findall(r"\w+", part.value))
    return names


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_stands_above_the_line_is_read_without_what_stands_below_except_where_a_flag_leads_there(name):
    body, last = ast.parse(SOURCES[name]).body, ABOVE[name].count("\n")
    below = defined(node for node in body if node.lineno > last) - defined(node for node in body if node.lineno <= last)
    assert below & used(ABOVE[name]) == set(APPENDIX[name]) | ALWAYS[name]


def test_few_names_lead_below_the_line():
    assert sum(len(names) for names in APPENDIX.values()) <= 18


# ----------------------------------------------------------------------------------------------- reading

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def reading_minutes(source):
    """Words of docstrings and comments at 200 a minute, and ten seconds for each line of code: one that is not blank,
    no comment, no docstring, no import."""
    num_words, not_code, code = 0, set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            not_code |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            num_words += len(re.findall(r"\S*\w\S*", ast.get_docstring(node)))
            not_code |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            num_words += len(re.findall(r"\S*\w\S*", token.string))
        elif token.type not in LAYOUT:
            code |= set(range(token.start[0], token.end[0] + 1))
    return num_words / 200 + len(code - not_code) / 6


def definition(name, qualified_name):
    """The text of a function, class or method above the line, its indentation removed."""
    nodes = ast.parse(ABOVE[name]).body
    for part in qualified_name.split("."):
        (node,) = [node for node in nodes if getattr(node, "name", None) == part]
        nodes = node.body if isinstance(node, ast.ClassDef) else []
    return textwrap.dedent(ast.get_source_segment(ABOVE[name], node, padded=True))


def reading_path():
    """The rows of the README's table: (script, minutes above the line, core functions, their minutes)."""
    rows = re.findall(r"^\| `(\w+)\.py` \| (\d+) \| (.*) \| (\d+) \|$", README, re.M)
    return [(name, int(minutes), re.findall(r"`([\w.]+)`", functions), int(core_minutes))
            for name, minutes, functions, core_minutes in rows]


def test_reading_times_are_counted():
    assert reading_minutes("import re\n") == 0
    prose = " ".join(["word"] * 99)
    assert reading_minutes(f'"""{prose}"""\nx = (1,\n     2)  # one\n') == 0.5 + 2 / 6


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_minutes_to_read_a_script_are_those_of_its_docstring_and_of_the_readme(name):
    (claimed,) = re.findall(r"Read: to the ruled line, (\d+) minutes", ast.get_docstring(ast.parse(SOURCES[name])))
    (in_readme,) = [minutes for script, minutes, *_ in reading_path() if script == name]
    counted = reading_minutes(ABOVE[name])
    assert int(claimed) == pytest.approx(counted, rel=0.1)
    assert in_readme == pytest.approx(counted, rel=0.1)


def test_the_readme_has_the_scripts_in_the_order_of_reading_with_functions_minutes_and_their_sum():
    assert [name for name, *_ in reading_path()] == SCRIPTS
    for name, _, functions, core_minutes in reading_path():
        counted = sum(reading_minutes(definition(name, function)) for function in functions)
        assert core_minutes == pytest.approx(counted, rel=0.1, abs=1), name
    sums = re.search(r"To the lines: (\d+) minutes; the functions named here: (\d+) ", " ".join(README.split()))
    assert int(sums[1]) == sum(minutes for _, minutes, *_ in reading_path())
    assert int(sums[2]) == sum(core_minutes for *_, core_minutes in reading_path())


def test_the_readme_is_short_and_a_terminal_shows_its_lines_whole():
    assert len(README.encode()) <= 14 * 1024 and README.count("\n") <= 180
    assert max(len(line) for line in README.splitlines()) <= 120


def test_the_readme_says_where_the_scripts_do_not_run():
    """os.pread and SIGHUP are unknown to Windows; transformers 5.23 and pillow 13 want Python 3.11."""
    assert "os.pread" in SOURCES["data"] and "signal.SIGHUP" in SOURCES["train"]
    assert re.search(r"Linux or macOS \(not Windows\), Python 3\.11 or newer", README)


def commands():
    """Every command line of the README that runs one of the scripts, its continuation lines joined."""
    for line in re.sub(r"\\\n\s*", " ", README).splitlines():
        for part in line.split("&&"):
            if match := re.search(r"\b(?:torchrun|python)\b[^#;]*? ((?:data|train|evaluate|rl_demo)\.py)\b"
                                  r"([^#;`]*)", part):
                yield match[1], shlex.split(match[2].replace("$s", "0"))


def test_the_commands_of_the_readme_have_flags_that_exist():
    assert {script for script, _ in commands()} == {f"{name}.py" for name in SCRIPTS if name != "model"}
    for script, words in commands():
        if words == ["--help"]:
            continue
        config = importlib.import_module(script[:-3]).Config
        if script == "data.py" and words and not words[0].startswith("-"):
            words = words[2:] if words[0] == "show" else words[1:]
        HfArgumentParser(config).parse_args_into_dataclasses(words)  # SystemExit or ValueError: no such flag


def test_the_main_command_of_the_readme_runs_in_a_shortened_form(tmp_path):
    """The embedded default, with fewer pictures and steps."""
    assert re.search(r"&& torchrun train.py$", README, re.M)
    short = Config(train_size=80, eval_size=12, max_steps=2, eval_every=0, out=str(tmp_path / "run")).resolved()
    try:
        assert main(short) == 0
    finally:
        end_processes()


def test_the_worked_example_of_the_readme_is_what_its_command_prints():
    from worked_example import picture, table
    in_readme = re.search(r"```text\n(  i  token.*?)\n```", README, re.S)[1]
    assert in_readme == table()
    assert (ROOT / ".github" / "pack.svg").read_text(encoding="utf-8") == picture()


def test_the_pictures_of_the_readme_exist():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_the_tree_holds_what_the_project_promises_and_nothing_else():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {file.split("/")[0] for file in files if not file.startswith(".")}
    assert top <= {f"{name}.py" for name in SCRIPTS} | {"tests", "requirements.txt", "README.md"}


def test_the_rows_that_the_readme_shows_are_read_and_written(tmp_path):
    rows = [line.strip() for line in README.splitlines() if line.startswith('    {"prompt"')]
    Image.new("RGB", (56, 56)).save(tmp_path / "7.png")
    (tmp_path / "images").mkdir()
    shutil.move(tmp_path / "7.png", tmp_path / "images" / "7.png")
    (tmp_path / "comparisons.jsonl").write_text("\n".join(rows))
    from data import read_comparisons
    read = read_comparisons(tmp_path)
    assert len(rows) == 3 and [len(read[i].responses) for i in range(3)] == [2, 2, 3]
    folder = write_comparisons(tmp_path / "drawn", synthetic(8), progress=False)
    assert '"responses"' in (folder / "comparisons.jsonl").read_text()


# ----------------------------------------------------------------------------------------------- forks

HUNKS = re.findall(r"^@@ (\w+\.py)(:.*)?\n((?:[ +-].*\n)+)", README, re.M)  # (script, title, lines)
RECIPES = []  # lists of hunks: one with a title begins a recipe
for hunk in HUNKS:
    if hunk[1]:
        RECIPES.append([])
    RECIPES[-1].append(hunk)
TRY = [  # (script that a recipe changes, what a fork does with it)
    ("model.py", """
from train import Config, main, end_processes
from model import POOLING, RewardModel
assert POOLING == "mean"
main(Config(train_size=60, eval_size=8, max_steps=2, eval_every=0, out="run").resolved())
end_processes()
print(RewardModel.from_pretrained("run").score("Which?", ["red", "a longer one"]))
"""),
    ("data.py", """
import json, pathlib, data
from PIL import Image
pathlib.Path("src").mkdir()
Image.new("RGB", (56, 56)).save("src/7.png")
row = {"question": "What is it?", "photo": "7.png",
       "answers": [{"text": "a bus", "stars": 5}, {"text": "a cat", "stars": 1}]}
pathlib.Path("src/rows.jsonl").write_text(json.dumps(row))
data.main(["stars", "--source", "src/rows.jsonl", "--out", "made"])
c = data.read_comparisons("made")[0]
assert (c.responses, c.pairs, len(c.images)) == (["a bus", "a cat"], [(0, 1)], 1), c
"""),
    ("rl_demo.py", """
import rl_demo, torch
from types import SimpleNamespace
group = SimpleNamespace(matches=torch.tensor([True, False]), model_rewards=torch.zeros(2), lengths=[10, 20],
                        truncated=torch.tensor([False, False]))
assert torch.allclose(rl_demo.compute_rewards("brief", group), torch.tensor([0.99, 0.48]))
rl_demo.Config(reward=["brief"]).resolved()
"""),
    ("rl_demo.py", """
import rl_demo, torch
advantages = rl_demo.group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]))
assert torch.allclose(advantages, torch.tensor([0.75, -0.25, -0.25, -0.25])), advantages  # not divided by the std
ratio = torch.tensor([0.5, 1.25, 1.5])
new, old = ratio.log(), torch.zeros(3)
loss = rl_demo.grpo_loss(new, old, new, torch.ones(3), 3, clip_eps=0.2)
assert torch.isclose(loss, torch.tensor(-(0.5 + 1.25 + 1.28) / 3)), loss  # 1.28 and not 1.2 is the upper bound
"""),
]


def test_the_readme_has_recipes_for_a_head_a_data_set_a_reward_and_another_grpo():
    assert [{script for script, *_ in recipe} for recipe in RECIPES] == [{script} for script, _ in TRY]


def fork(recipe, home):
    """A copy of the project with the recipe applied as it stands in the README."""
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", home)
    for script, _, text in recipe:  # applied by its text: line numbers would go stale
        source = (home / script).read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        assert source.count(before) == 1, f"the README's recipe no longer fits {script}: {before}"
        source = source.replace(before, "".join(line[1:] for line in lines if line[0] in " +"))
        (home / script).write_text(source, encoding="utf-8")


@pytest.mark.parametrize("number", range(len(TRY)), ids=["head", "data set", "reward", "grpo"])
def test_a_fork_by_the_recipe_works_with_at_most_20_changed_lines(number, tmp_path, monkeypatch):
    """In this process, which has torch loaded already; its copies of the scripts are loaded in the place of ours. None
    of the project's tests has to change for it."""
    recipe, (script, code) = RECIPES[number], TRY[number]
    assert sum(len(re.findall(r"^[+-]", text, re.M)) for *_, text in recipe) <= 20
    fork(recipe, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in SCRIPTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        exec(code, {})
        assert sys.modules[script.removesuffix(".py")].__file__ == str(tmp_path / script)
    finally:
        end_processes()
        for name in SCRIPTS:
            sys.modules.pop(name, None)
        transformers.AttentionInterface.register("branches", model.branch_attention)  # as model.py does when loaded
        transformers.AttentionInterface.register("flash_by_window", model.window_attention)
