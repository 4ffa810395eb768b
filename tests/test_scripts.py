"""What holds for every script: help, flags, doctests; and for the README: its commands and its line counts are true."""
import doctest
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from transformers import HfArgumentParser

from conftest import ROOT
from data import World, synthetic, write_comparisons
from train import Config, main

SCRIPTS = [name for name in ("model", "data", "evaluate", "train", "rl_demo") if (ROOT / f"{name}.py").exists()]
README = (ROOT / "README.md").read_text()


def test_every_script_prints_its_help():
    """model.py is read, not run."""
    runs = [(name, subprocess.Popen([sys.executable, f"{name}.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE, text=True))
            for name in SCRIPTS if name != "model"]
    for name, run in runs:
        said, _ = run.communicate()
        assert run.returncode == 0 and all(f"--{field.name}" in said for field in fields(importlib.import_module(name).Config)), name


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "model"])
def test_every_flag_is_read_and_explained(name):
    """A field that nothing reads is a promise that nothing keeps."""
    source = (ROOT / f"{name}.py").read_text()
    for field in fields(importlib.import_module(name).Config):
        assert re.search(rf"\b(cfg|self|config)\.{field.name}\b", source), f"{name}.py never reads --{field.name}"
        assert len(field.metadata["help"]) > 10, f"{name}.py does not explain --{field.name}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_examples_in_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_an_unknown_flag_is_one_line():
    run = subprocess.run([sys.executable, "train.py", "--learning_rate", "1"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and run.stderr.count("\n") == 1 and "--learning_rate" in run.stderr


def test_no_script_loads_what_it_must_not():
    for name in SCRIPTS:
        source = (ROOT / f"{name}.py").read_text()
        assert not re.search(r"trust_remote_code\s*=\s*True|weights_only\s*=\s*False|pickle\.load", source)
        assert source.count("torch.load(") == source.count("weights_only=True")


def commands():
    """Every command line of the README that runs one of the scripts, its continuation lines joined."""
    for line in re.sub(r"\\\n\s*", " ", README).splitlines():
        if match := re.search(r"\b(?:torchrun|python)\b[^#;&]*? ((?:data|train|evaluate|rl_demo)\.py)\b([^#;&`]*)", line):
            words = shlex.split(match[2].replace("...", "").replace("$s", "0"))
            yield match[1], [word for word in words if word not in ("|", "after")]


def test_the_commands_of_the_readme_have_flags_that_exist():
    found = list(commands())
    assert {script for script, _ in found} == {f"{name}.py" for name in SCRIPTS if name != "model"}
    for script, words in found:
        config = importlib.import_module(script[:-3]).Config
        if script == "data.py" and words and not words[0].startswith("-"):
            words = words[2:] if words[0] == "show" else words[1:]
        HfArgumentParser(config).parse_args_into_dataclasses(words)  # ValueError or SystemExit on a flag that does not exist


def test_the_main_command_of_the_readme_runs_in_a_shortened_form(tmp_path):
    """The embedded default, with fewer pictures and steps."""
    import torch
    assert re.search(r"&& torchrun train.py$", README, re.M)
    short = Config(train_size=80, eval_size=12, max_steps=2, eval_every=0, out=str(tmp_path / "run")).resolved()
    assert main(short, World(0, 0, 1, torch.device("cpu"))) == 0


def test_the_line_counts_of_the_readme_are_true():
    counts = dict(re.findall(r"`(\w+\.py)`[^|\n]*\| (\d+) \|", README))
    assert counts == {f"{name}.py": str(len((ROOT / f"{name}.py").read_text().splitlines())) for name in SCRIPTS}


def test_the_tree_holds_what_the_project_promises_and_nothing_else():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {file.split("/")[0] for file in files if not file.startswith(".")}
    assert top <= {f"{name}.py" for name in SCRIPTS} | {"tests", "requirements.txt", "README.md"}


def test_a_written_example_folder_is_what_the_readme_shows(tmp_path):
    """The keys of the format section are those that data.py writes."""
    folder = write_comparisons(tmp_path / "drawn", synthetic(8), bar=False)
    assert {key for key in ("prompt", "images", "responses", "pairs") if f'"{key}"' in README} == {"prompt", "images", "responses", "pairs"}
    assert '"responses"' in (folder / "comparisons.jsonl").read_text()
