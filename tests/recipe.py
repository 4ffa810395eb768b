"""The paper's tables in miniature, on the drawn world and with the scripts' own flags: who wins, and at what cost.

    python tests/recipe.py --table 1 --seeds 0 1 2            about 40 minutes on two cores; goes on where it was stopped
    python tests/recipe.py --table 2                          the head; further: algorithm1, 4, 6, 7

Every cell is a run of train.py (rl_demo.py, data.py) and of evaluate.py on the same drawn comparisons, new to the model.
A finished cell lies in OUT/TABLE/SEED/CELL.json and is not made again. A drawn world and 1.7M parameters prove that the
path works, and nothing about the world: the paper's figures stand beside ours so that the order can be compared.

All paradigms of Table 1 start, as in the paper, from one model that can answer: here a tiny one fine-tuned on right
answers as rl_demo.py makes its policy. They see the same comparisons, once.
"""
import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import evaluate
import rl_demo
import train
from model import RewardModel, asked, tiny_backbone

TINY = "--max_pixels 12544 --pack_tokens 1024 --batch_size 32 --lr {lr} --critique_tokens 40 --eval_every 0 --save_every 0"
HELD = 300  # comparisons that every model is measured on


def script(here: Path, name: str, *words) -> None:
    """Runs a script as a user would; its output goes to log.txt."""
    command = [sys.executable, ROOT / name, *(str(word) for part in words for word in str(part).split())]
    with open(here / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(map(str, command))}\n")
        log.flush()
        if subprocess.run(command, stdout=log, stderr=log, cwd=ROOT).returncode:
            raise SystemExit(f"{name} {' '.join(map(str, words))} failed; its words are at the end of {here / 'log.txt'}")


def stand_in(here: Path, seed: int, options) -> Path:
    """In place of a pretrained model: a tiny one that can say what is in a picture."""
    folder = here / "stand_in"
    if not folder.exists():
        rows, began = data.synthetic(2000, seed), time.time()
        random = here / "random"
        if not random.exists():
            tiny_backbone(random, train.texts_of(rows, "think"), seed)
        cfg = rl_demo.Config(seed=seed, sft_steps=options.stand_in_steps)
        rl_demo.make_policy(cfg, folder, RewardModel.from_backbone(random, max_pixels=12544))
        (here / "stand_in.json").write_text(json.dumps({"seconds": time.time() - began}))
    return folder


def training(here: Path, name: str, seed: int, options, *flags) -> list:
    """The command that trains a cell's model into HERE/NAME."""
    return ["train.py", "--backbone", here / "stand_in", "--out", here / name, "--seed", seed, "--train_size",
            options.rows, TINY.format(lr=options.lr), "--eval_size 60", *flags]


def table_1(here: Path, seed: int, options) -> list[tuple]:
    """(row, the paper's overall and MMRB and VLRB averages, commands, model, flags of evaluate.py)"""
    run = lambda name, *flags: training(here, name, seed, options, *flags)
    rl = here / "thinking-rl"
    prompts = ["data.py", "synthetic", "--out", here / "drawn", "--n", options.rl_steps * 8, "--seed", 5_000_000 + seed]
    judge = ["data.py", "judge", "--source", here / "drawn", "--out", here / "judge-prompts"]
    reinforce = ["rl_demo.py", "--policy", here / "thinking", "--reward rule --data", here / "judge-prompts", "--out", rl,
                 "--batch_size 16 --lr 2e-4 --max_new_tokens 40 --pack_tokens 1024 --max_pixels 12544 --eval_size 16",
                 "--save_every 0 --max_steps", options.rl_steps, "--seed", seed]
    return [
        ("naive", "70.0 64.5 75.6", [run("naive")], "naive", ""),
        ("critic, own critiques", "60.4 63.9 62.8", [run("critic", "--paradigm critic")], "critic", ""),
        ("critic, given critiques", "", [], "critic", "--critiques given"),
        ("judge, direct, untrained", "58.7 64.4 53.1", [run("untrained", "--paradigm generative --max_steps 0")],
         "untrained", ""),
        ("judge, direct", "71.2 69.3 73.1", [run("direct", "--paradigm generative")], "direct", ""),
        ("judge, thinking", "68.3 72.5 64.1", [run("thinking", "--paradigm generative --think")], "thinking", ""),
        ("judge, thinking, RL", "76.8 82.2 71.4", [prompts, judge, reinforce], "thinking-rl/rule/policy", ""),
    ]


def cell(here: Path, row: tuple, options) -> dict:
    """Trains and measures one row: accuracy in percent, by category, and what it cost."""
    name, _, commands, models, flags = row
    began = time.time()
    for command in commands:
        script(here, *command)
    trained = time.time() - began
    held, out = here.parent / "held", here / "results" / name.replace(" ", "_")
    models = [here / model for model in models.split()]
    script(here, "evaluate.py", "--model", *models, "--data", held, "--out", out, "--no_probe", flags)
    found = json.loads((out / "held" / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "held" / "predictions.jsonl").read_text().splitlines()[1:]]
    read = written = 0
    for path in models:
        model = RewardModel.from_pretrained(path)
        model.critiques = "given" if "given" in flags else "own"
        read += sum(item.tokens for c in data.read_comparisons(held) for item in asked(c, model))
        texts = [text for r in rows for text in r.get("critiques", {}).get(str(path), [])]
        written += sum(len(model.processor.tokenizer(text).input_ids) + 1 for text in texts)
    beyond = {key.removeprefix("judge: "): f["value"] for key, f in found["beyond"].items() if key.startswith("judge")}
    return {"accuracy": found["figures"]["accuracy"]["value"], "trained": trained, "scored": found["seconds"] * 1000 / HELD,
            "read": read * 1000 / HELD, "written": written * 1000 / HELD, "beyond": beyond,
            "by_category": {key: f["value"] for key, f in found["figures"].items() if key != "accuracy"}}


TABLES = {"1": table_1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=list(TABLES), default="1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=4000, help="comparisons each model is trained on")
    parser.add_argument("--stand_in_steps", type=int, default=1500, help="of fine-tuning, 16 answers each")
    parser.add_argument("--rl_steps", type=int, default=60, help="of GRPO, 16 prompts each")
    parser.add_argument("--lr", default="6e-4")
    parser.add_argument("--out", default="runs/recipe")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    options = parser.parse_args()
    out = Path(options.out).resolve() / f"table{options.table}"
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "held").exists():
        data.write_comparisons(out / "held", data.synthetic(HELD, held_out=True), bar=False)
    rows = TABLES[options.table](out, 0, options)
    found = {}
    work = list(itertools.product(options.seeds, range(len(rows))))
    for seed, i in tqdm(work, "cells"):
        here = out / str(seed)
        here.mkdir(exist_ok=True)
        row = TABLES[options.table](here, seed, options)[i]
        file = here / f"{row[0].replace(' ', '_')}.json"
        if options.only not in row[0]:
            continue
        if not file.exists():
            if options.table == "1":
                stand_in(here, seed, options)
            file.write_text(json.dumps(cell(here, row, options)))
        found.setdefault(row[0], []).append(json.loads(file.read_text()))
    print(evaluate.markdown(lines(rows, found)))


def lines(rows: list, found: dict) -> list[list[str]]:
    categories = sorted({name for cells in found.values() for c in cells for name in c["by_category"]})
    table = [["row", "paper", "accuracy", *categories, "orders agree", "training s", "s per 1,000", "read", "written"]]
    for name, paper, *_ in rows:
        cells = found.get(name, [])
        if not cells:
            continue
        mean = lambda get: fmean(get(c) for c in cells)
        spread = f" +- {stdev(c['accuracy'] for c in cells):.1f}" if len(cells) > 1 else ""
        agree = f"{mean(lambda c: c['beyond']['both orders agree']):.1f}" if cells[0]["beyond"] else ""
        table.append([name, paper, f"{mean(lambda c: c['accuracy']):.1f}{spread}",
                      *(f"{mean(lambda c: c['by_category'].get(k, 0)):.0f}" for k in categories), agree,
                      *(f"{mean(lambda c: c[k]):,.0f}" for k in ("trained", "scored", "read", "written"))])
    return table


if __name__ == "__main__":
    main()
