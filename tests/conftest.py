"""What the tests share: the scripts on the path, and one tiny reward model with random weights."""
import os
import sys
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
