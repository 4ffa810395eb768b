"""What the tests share: the scripts on the path, one tiny reward model with random weights, and commands that run
beside the tests."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from model import RewardModel, tiny_backbone  # noqa: E402

# what the tiny tokenizer is trained on: fixed, so that token ids can be pinned
TEXTS = ["What colour is the circle? red green blue", "How many shapes are there? 1 2 3 4", "Where is it? left right top bottom"] * 20


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small gain nothing from a second one, and lose much where other programs want the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """Folders of tiny checkpoints by kind, made when first asked for."""
    root, made = tmp_path_factory.mktemp("backbones"), {}

    def folder(kind="qwen2_5_vl"):
        if kind not in made:
            made[kind] = tiny_backbone(root / kind, TEXTS, kind=kind, width=64)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def tiny(backbones):
    """A tiny Qwen2.5-VL reward model; tests that change it work on a copy."""
    torch.manual_seed(0)
    return RewardModel.from_backbone(backbones()).eval()


COMMANDS = {}  # {name of a fixture: function(folder, backbones) that makes what its command needs and gives its words}


def command(make):
    """Turns such a function into a fixture: the folder, and the process when it has ended.

    A test takes one core, so all commands that the chosen tests ask for begin before the first test, two at a time.
    What is made for them is made before, too: the random numbers of torch are shared by all threads."""
    COMMANDS[make.__name__] = make

    @pytest.fixture(scope="session", name=make.__name__)
    def ended(begun):
        if isinstance(begun[make.__name__], Exception):
            raise begun[make.__name__]
        return begun[make.__name__].result()

    return ended


def pytest_collection_modifyitems(items):
    """Those that wait for a command come last: until then the others are run beside it."""
    items.sort(key=lambda item: not COMMANDS.keys().isdisjoint(item.fixturenames))


@pytest.fixture(scope="session", autouse=True)
def begun(request, one_thread, tmp_path_factory, backbones):
    """{name: future of (folder, process)}, or the error of making what the command needs."""
    def run(folder, words):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        words = ["nice", "-n", "10", *words]  # one core for the tests, and for these what is left
        return folder, subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)

    found = dict.fromkeys(name for item in request.session.items for name in item.fixturenames if name in COMMANDS)
    with ThreadPoolExecutor(2) as pool:
        for name in found:
            folder = tmp_path_factory.mktemp(name)
            try:
                found[name] = pool.submit(run, folder, COMMANDS[name](folder, backbones))
            except Exception as error:  # of the tests that ask for it, not of all
                found[name] = error
        yield found
        pool.shutdown(cancel_futures=True)  # where the tests were stopped


TWO_RANKS = {}  # {name of a script: function(folder, backbones) that makes what two_ranks.py needs, gives its settings}


@command
def two_ranks(folder, backbones):
    """All that needs two processes, in one torchrun, which loads torch once for each: folder/SCRIPT is what it leaves
    of each script. What the tests compare with it is done by one process."""
    for script, make in TWO_RANKS.items():
        (folder / script).mkdir()
        (folder / script / "settings.json").write_text(json.dumps(make(folder / script, backbones)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*torchrun, "tests/two_ranks.py", folder]
