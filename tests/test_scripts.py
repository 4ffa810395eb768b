"""What holds for every script: help, flags, doctests, shape; and for the README: its commands and recipes work."""
import doctest
import importlib
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
import transformers
from PIL import Image
from transformers import HfArgumentParser

import model
from conftest import ROOT
from data import synthetic, write_comparisons
from train import Config, end_processes, main

SCRIPTS = ["model", "data", "train", "evaluate", "rl_demo"]  # in the order of reading, which is that of the imports
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS}


@pytest.fixture
def run_script(monkeypatch):
    """`python SCRIPT WORDS` in this process, which has torch loaded already; returns what it ends with."""
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
    said = capsys.readouterr().out
    assert all(f"--{field.name}" in said for field in fields(importlib.import_module(name).Config))


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
    status = run_script(name, *["rlaif-v"] * (name == "data"), "--speed", "1")
    said = capsys.readouterr().err
    if isinstance(status, str):  # which Python prints at its end
        said, status = status + "\n", 1
    assert status == 1 and said.count("\n") == 1 and said.startswith(f"{name}.py: ") and "--speed" in said


def test_no_script_loads_what_it_must_not():
    for name, source in SOURCES.items():
        assert not re.search(r"trust_remote_code\s*=\s*True|torch\.load|pickle\.load", source), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_only_from_those_to_be_read_before_it_and_has_two_halves(name):
    earlier = SCRIPTS[:SCRIPTS.index(name)]
    imported = re.findall(r"^(?:from|import) (\w+)", SOURCES[name], re.M)
    assert {module for module in imported if module in SCRIPTS} <= set(earlier)
    assert SOURCES[name].count("# First reading ends here. Below: what a real run needs.") == 1
    assert "Read: " in SOURCES[name].split('"""')[1] and "minutes" in SOURCES[name].split('"""')[1]


def test_the_readme_has_the_scripts_in_the_order_of_reading_with_functions_and_minutes_as_they_are():
    rows = re.findall(r"^\| `(\w+)\.py` \| (\d+) \| (.*) \|$", README, re.M)
    assert [name for name, *_ in rows] == SCRIPTS
    for name, minutes, functions in rows:
        assert f"{minutes} minutes" in SOURCES[name].split('"""')[1], name
        first_half = SOURCES[name].split("# First reading ends here.")[0]
        for function in re.findall(r"`([\w.]+)`", functions):
            assert re.search(rf"^ *(def|class) {function.split('.')[-1]}\b", first_half, re.M), f"{name}.py: {function}"


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
    found = list(commands())
    assert {script for script, _ in found} == {f"{name}.py" for name in SCRIPTS if name != "model"}
    for script, words in found:
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
    shown = re.search(r"```text\n(  i  token.*?)\n```", README, re.S)[1]
    assert shown == table()
    drawn = (ROOT / ".github" / "pack.svg").read_text(encoding="utf-8")
    assert drawn == picture()


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
    folder = write_comparisons(tmp_path / "drawn", synthetic(8), bar=False)
    assert '"responses"' in (folder / "comparisons.jsonl").read_text()


# ----------------------------------------------------------------------------------------------- forks

RECIPES = re.findall(r"```diff\n(.*?)```", README, re.S)
TRY = {  # what a fork does with the recipe, after it is applied to a copy of the project
    "model.py": """
from train import Config, main, end_processes
from model import READS, RewardModel
assert READS == "mean"
main(Config(train_size=60, eval_size=8, max_steps=2, eval_every=0, out="run").resolved()); end_processes()
print(RewardModel.from_pretrained("run").score("Which?", ["red", "a longer one"]))
""",
    "data.py": """
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
""",
    "rl_demo.py": """
import rl_demo
assert "brief" in rl_demo.REWARDS
from rl_demo import Config
Config(reward=["brief"]).resolved()
"""}


def test_the_readme_has_a_recipe_for_a_head_a_data_set_and_a_reward():
    assert [script_of(recipe) for recipe in RECIPES] == list(TRY)


def script_of(recipe):
    return re.search(r"^\+\+\+ (\S+)", recipe, re.M)[1]


def fork(recipe, home):
    """A copy of the project with the recipe applied as it stands in the README."""
    script = script_of(recipe)
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", home)
    source = SOURCES[script.removesuffix(".py")]
    for hunk in re.split(r"^@@.*\n", recipe, flags=re.M)[1:]:  # applied by its text: line numbers would go stale
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        assert source.count(before) == 1, f"the README's recipe no longer fits {script}: {before}"
        source = source.replace(before, "".join(line[1:] for line in lines if line[0] in " +"))
    (home / script).write_text(source, encoding="utf-8")


@pytest.mark.parametrize("recipe", RECIPES, ids=script_of)
def test_a_fork_by_the_recipe_works_with_at_most_20_changed_lines(recipe, tmp_path, monkeypatch):
    """In this process, which has torch loaded already; its copies of the scripts are loaded in the place of ours. None
    of the project's tests has to change for it."""
    changed = [line for line in recipe.splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
    assert len(changed) <= 20
    fork(recipe, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in SCRIPTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        exec(TRY[script_of(recipe)], {})
        assert sys.modules[script_of(recipe)[:-3]].__file__ == str(tmp_path / script_of(recipe))
    finally:
        end_processes()
        for name in SCRIPTS:
            sys.modules.pop(name, None)
        transformers.AttentionInterface.register("branches", model.attend)  # as model.py does when it is loaded
        transformers.AttentionInterface.register("flash_by_length", model.attend_by_length)
