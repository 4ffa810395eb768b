"""The paper's tables in miniature, on the drawn world and with the scripts' own flags: who wins, and at what cost.

    python tests/recipe.py --table 1 --seeds 0 1 2            two cores: 19 minutes, and three stand-ins to make first
    python tests/recipe.py --table 2                          the head; further: algorithm1, 4, 6, 7

Every cell is a run of train.py (rl_demo.py, data.py) and of evaluate.py on the same drawn comparisons, new to the
model. A finished cell lies in OUT/TABLE/SEED/CELL.json and is not made again, so a run that was stopped continues. A
drawn world and 1.7M parameters prove that the path works, and nothing about the world: the paper's figures stand beside
ours so that the order can be compared.

All paradigms of Table 1 start, as in the paper, from one model that can answer: here a stand-in, a tiny one fine-tuned
on right answers as rl_demo.py makes its policy. They see the same comparisons, once.

Measured. Accuracy in percent on 676 held-out pairs, mean +- standard deviation of three seeds, 3,000 drawn comparisons
for each model (Table 6: 14,000, Table 7: 6,000, both from random weights), commits 78f9422 (Table 2, seed 0 of
Algorithm 1), a235b13 (Table 6) and 9659938, two shared cores. Most of the differences are smaller than the spread.

    Algorithm 1   neither 86.1 +- 7.1, lambda 0.001 91.0 +- 4.0, 0.01 87.5 +- 7.0, 0.1 81.7 +- 4.7, length norm 92.1
                  +- 3.8. In the paper both hurt; here only the largest lambda does.
    Table 2       one layer 90.2 +- 4.6, two without activation 94.6 +- 1.5, tanh 88.8 +- 7.0, SiLU 86.1 +- 7.1, three
                  to five layers with SiLU 93.2 +- 4.0, 89.6 +- 8.6, 88.9 +- 6.1. In the paper two with SiLU are best;
                  here seeds differ by more than heads.
    Table 4       trained on pictures alone 86.4 +- 2.5 (texts 61), on texts alone 60.7 +- 6.2 (texts 100), on half of
                  each 84.4 +- 5.8 (texts 100); a text-only model on texts: texts 100. As in the paper a text-only model
                  is enough for texts; here texts do not help with pictures.
    Table 6       at widths 64 and 128: Qwen2-VL 96.7 +- 1.0, 95.7 +- 0.1; Qwen2.5-VL 94.9 +- 0.7, 97.9 +- 0.2; Qwen3-VL
                  97.0 +- 0.9, 98.5 +- 0.7; InternVL3 97.6 +- 1.9, 99.6 +- 0.1. At 128 the later Qwen is better, as in
                  the paper; InternVL, behind in the paper, leads: an image has 16 tokens where Qwen has 9.
    Table 7       Qwen2.5-VL 86.4 +- 2.2, InternVL 91.8 +- 2.0, both by average 93.2 +- 1.1, by accuracy or confidence
                  93.3 +- 1.1, with texts scored by a text-only third 93.2. Two beat one, as in the paper; between the
                  rules there is no difference (in the paper the average is best).

Table 1 on 6,000 comparisons (12,900 pairs), commit fbaeeb7 (RL: c1b9089), 54 minutes on two busy cores; the paper's
columns are overall, Multimodal RewardBench, VL-RewardBench; *orders*: share of pairs that a judge, asked in both
orders, answers alike; seconds of training and for scoring 1,000 comparisons:

                                paper            accuracy       orders  training  scoring
    naive                       70.0 64.5 75.6   98.7 +- 0.4                 95        9
    critic, own critiques       60.4 63.9 62.8   89.0 +- 3.5                183       33
    critic, given critiques                     100.0 +- 0.0           the same       16
    judge, direct, untrained    58.7 64.4 53.1   50.5 +- 0.6     4.5          0       43
    judge, direct               71.2 69.3 73.1   87.5 +- 6.2    77.9        214       34
    judge, thinking             68.3 72.5 64.1   67.9 +- 9.1    48.1        333       84
    judge, thinking, RL         76.8 82.2 71.4   65.2 +- 9.4    40.9      + 214       50

As in the paper naive is ahead of the critic, and fine-tuning helps a judge much; thinking and RL do not help here. As
far as we can tell: comparing two answers inside a prompt is harder for 1.7M parameters than scoring one, a thought
errs before the verdict does, and 60 steps of GRPO are too few: at a rate of 5e-5 they move nothing beyond the spread
(67.9 -> 65.2), at 2e-4 they teach a preference for one position rather than for the picture (60.9). Tokens for 1,000
comparisons, read + written: naive and the critic's first reading 45,518, own critiques + 16,347, given ones 123,931 in
all; judges 269,371 (each pair in both orders), thinking 296,411 + 100,360. At the default 3,000 comparisons the cells
take 19 minutes (commit 434d2e9, alone, without the stand-ins) and only naive learns: 86.1, critic 57.4 and 100.0,
judges 50.5, 67.1, 50.5, 50.8. Beside other work on two cores: Algorithm 1 23 minutes for two seeds, Tables 4 and 7 14
and 19, Table 6 46 for three.

The tiny backbones of every family, `OMP_NUM_THREADS=1 torchrun train.py --backbone NAME`, seed 0, 1,779 held-out pairs,
commit 6a36024, two shared cores. Speeds are of one process that takes turns (18 steps each), so their ratios compare;
of the text-only ones, pairs by seconds of the whole run (`--on_bad_row skip`, 4,583 pairs on texts, of which 239 are
held out, commit 448e160):

                     parameters  accuracy  images shuffled  pairs a second
    tiny              1,680,257     0.980            0.488            62.5
    tiny-qwen2-vl     1,614,849     0.963            0.514            62.7
    tiny-qwen3-vl     2,327,169     0.988            0.512            47.8
    tiny-internvl     1,302,529     0.994            0.522            58.4
    tiny-qwen3          870,017     1.000                              113
    tiny-qwen2          870,785     1.000                               95

The paper's own mixture of data, as far as its text tells (2M of MMPR's 3M pairs; RLAIF-V once by itself and 0.49 times
in the R1-Reward mix; 44k of VLFeedback's pairs), not run:

    torchrun --nproc_per_node 8 train.py --backbone Qwen/Qwen2.5-VL-7B-Instruct --shard --gradient_checkpointing \\
        --out runs/paper --on_bad_row skip --data data/mmpr:0.67 data/rlaif-v:1.49 data/mm-rlhf data/vlfeedback:0.11 \\
        data/olmo2 data/tulu3-if data/ultrafeedback-hard data/wildchat-uf data/swe-arena
"""
import argparse
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import evaluate
import rl_demo
import train
from model import FAMILIES, RewardModel, tiny_backbone

TINY = ("--max_pixels 12544 --pack_tokens 1024 --batch_size 32 --lr {lr} --critique_tokens 40 --eval_every 0 "
        "--save_every 0")
NUM_HELD_OUT = 300  # comparisons that every model is measured on


def script(here: Path, name: str, *words) -> None:
    """Runs a script as a user would, on one thread; its output goes to log.txt."""
    command = [sys.executable, ROOT / name, *(str(word) for part in words for word in str(part).split())]
    with open(here / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(map(str, command))}\n")
        log.flush()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        status = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env=environment).returncode
        if status and not (name == "train.py" and status == 1 and "nothing was learnt" in log_end(here)):
            raise SystemExit(f"{name} {' '.join(map(str, words))} failed; "
                             f"its output is at the end of {here / 'log.txt'}")


def log_end(here: Path) -> str:
    """A model that learnt nothing is a result too."""
    return (here / "log.txt").read_text(encoding="utf-8")[-2000:]


def make_stand_in(folder: Path, seed: int, steps: int) -> None:
    """In place of a pretrained model: a tiny one that was fine-tuned to say what is in a picture, and, of the responses
    to half of the questions, which one is right."""
    random = folder.parent / "random"
    if not random.exists():
        tiny_backbone(random, train.vocabulary_texts([data.synthetic(2000, seed)], "think"), seed)
    rows = []
    for i, comparison in enumerate(data.synthetic(steps * 16, 2_000_000 + seed)):
        if i % 2 == 1:
            choices = ", ".join(comparison.responses)
            comparison = replace(comparison, prompt=f"{comparison.prompt} One of: {choices}.")
        rows.append(comparison)
    model = RewardModel.from_backbone(random, max_pixels=12544)
    rl_demo.make_policy(rl_demo.Config(seed=seed, sft_steps=steps), folder, model, rows)


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
    reinforce = ["rl_demo.py", "--policy", here / "thinking", "--reward rule --reward_model", here / "naive",
                 "--data", here / "judge-prompts", "--out", rl,
                 "--batch_size 16 --lr 5e-5 --max_new_tokens 40 --pack_tokens 1024 --max_pixels 12544 --eval_size 16",
                 "--save_every 0 --max_steps", options.rl_steps, "--seed", seed]
    return [
        ("naive", "70.0 64.5 75.6", [run("naive")], "naive", ""),
        ("critic, own critiques", "60.4 63.9 62.8", [run("critic", "--paradigm critic")], "critic", ""),
        ("critic, given critiques", "", [], "critic", "--critiques given"),
        ("judge, direct, untrained", "58.7 64.4 53.1", [run("untrained", "--paradigm direct --max_steps 0")],
         "untrained", ""),
        ("judge, direct", "71.2 69.3 73.1", [run("direct", "--paradigm direct")], "direct", ""),
        ("judge, thinking", "68.3 72.5 64.1", [run("thinking", "--paradigm think")], "thinking", ""),
        ("judge, thinking, RL", "76.8 82.2 71.4", [prompts, judge, reinforce], "thinking-rl/rule/policy", ""),
    ]


def table_2(here: Path, seed: int, options) -> list[tuple]:
    """The head's layers and activation; the paper's VL-RewardBench overall and MM-RLHF-RewardBench Acc+."""
    heads = [(1, "none", "71.2 71.1"), (2, "none", "71.7 71.7"), (2, "tanh", "74.8 76.1"), (2, "silu", "76.5 80.4"),
             (3, "silu", "71.4 76.1"), (4, "silu", "69.1 73.9"), (5, "silu", "73.5 73.9")]
    return [(f"{n} {a}", paper,
             [training(here, f"head-{n}-{a}", seed, options, f"--head_layers {n} --head_activation {a}")],
             f"head-{n}-{a}", "") for n, a, paper in heads]


def algorithm_1(here: Path, seed: int, options) -> list[tuple]:
    flags = {"neither": "", "lambda 0.001": "--zero_coef 0.001", "lambda 0.01": "--zero_coef 0.01",
             "lambda 0.1": "--zero_coef 0.1", "length norm": "--length_norm"}
    return [(name, "", [training(here, name.replace(" ", "-"), seed, options, flag)], name.replace(" ", "-"), "")
            for name, flag in flags.items()]


def table_4(here: Path, seed: int, options) -> list[tuple]:
    """What rows with and without images teach, as many of each (section 4.5 too). The text-only model starts from
    random weights and is measured on the texts alone; the others start from the stand-in."""
    if not (here / "text").exists():
        rows = data.synthetic(8 * options.rows, seed)
        parts = [[c for c in rows if bool(c.images) == sees][:options.rows] for sees in (True, False)]
        halves = [c for both in zip(*parts) for c in both][:options.rows]
        for name, part in (("images", parts[0]), ("both", halves), ("text", parts[1])):
            data.write_comparisons(here / name, part, progress=False)
        tiny_backbone(here / "blind", train.vocabulary_texts([rows[:2000]]), seed, model_type="qwen3")
    run = lambda name, backbone="stand_in": [
        "train.py", "--backbone", here / backbone, "--out", here / f"on-{name}-{backbone}", "--seed", seed,
        "--data", here / name, TINY.format(lr=options.lr), "--eval_size 60"]
    return [("images alone", "", [run("images")], "on-images-stand_in", ""),
            ("text alone", "", [run("text")], "on-text-stand_in", ""),
            ("both, half of each", "", [run("both")], "on-both-stand_in", ""),
            ("text alone, text-only model", "", [run("text", "blind")], "on-text-blind", "--on_bad_row skip")]


def table_6(here: Path, seed: int, options) -> list[tuple]:
    """Every family of backbones at two widths, from random weights on the default's 14,000 comparisons. The paper's
    multimodal and text averages are of 7B and 8B models."""
    rows, paper = [], {"qwen2_vl": "78.7 61.4", "qwen2_5_vl": "80.2 63.0", "internvl": "72.1 76.8"}
    for model_type, width in itertools.product(FAMILIES, (64, 128)):
        name = f"{model_type} {width}"
        folder = here / name.replace(" ", "-")
        if not (folder / "backbone").exists():
            texts = train.vocabulary_texts([data.synthetic(2000, seed)])
            tiny_backbone(folder / "backbone", texts, seed, model_type, width=width)
        rows.append((name, paper.get(model_type, ""),
                     [["train.py", "--backbone", folder / "backbone", "--out", folder / "run", "--seed", seed,
                       TINY.format(lr="6e-4"), "--eval_size 60"]], f"{folder.name}/run", "--on_bad_row skip"))
    return rows


def table_7(here: Path, seed: int, options) -> list[tuple]:
    """Two members with vision and a text-only third; three rules, and prompts without images to the third alone. The
    paper's multimodal average; with the third, its text average."""
    validation = here / "validation"
    if not validation.exists():
        data.write_comparisons(validation, data.synthetic(200, 7, held_out=True), progress=False)
        texts = train.vocabulary_texts([data.synthetic(2000, seed)])
        for name, model_type in (("a", "qwen2_5_vl"), ("b", "internvl"), ("c", "qwen3")):
            tiny_backbone(here / f"backbone-{name}", texts, seed, model_type)
    run = lambda name: ["train.py", "--backbone", here / f"backbone-{name}", "--out", here / name, "--seed", seed,
                        TINY.format(lr="6e-4"), "--eval_size 60", "--train_size", 2 * options.rows, "--on_bad_row skip"]
    weigh = f"--validation {validation} --ensemble"
    return [("a: Qwen2.5-VL", "81.0", [run("a")], "a", ""), ("b: InternVL", "", [run("b")], "b", ""),
            ("a + b, average", "82.6", [], "a b", ""), ("a + b, accuracy", "81.2", [], "a b", f"{weigh} accuracy"),
            ("a + b, confidence", "80.4", [], "a b", f"{weigh} confidence"),
            ("a + b, texts to c alone", "80.7 -> 82.7", [run("c")], "a b c", "--route")]


def cell(here: Path, row: tuple, options) -> dict:
    """Trains and measures one row: accuracy in percent, by category, and what it cost."""
    name, _, commands, models, flags = row
    start_time = time.time()
    for command in commands:
        if "--out" in command:  # what was left of a cell that was stopped
            shutil.rmtree(command[command.index("--out") + 1], ignore_errors=True)
        script(here, *command)
    training_seconds = time.time() - start_time
    held_out, out = here.parent / "held", here / "results" / name.replace(" ", "_")
    models = [here / model for model in models.split()]
    script(here, "evaluate.py", "--model", *models, "--data", held_out, "--out", out, "--no_control_passes", flags)
    summary = json.loads((out / "held" / "summary.json").read_text())
    predictions = [json.loads(line) for line in (out / "held" / "predictions.jsonl").read_text().splitlines()[1:]]
    read = written = 0
    for path in models:
        tokens_read, tokens_written = count_tokens(path, data.read_comparisons(held_out), predictions, flags)
        read += tokens_read
        written += tokens_written
    beyond = {key.removeprefix("judge: "): figure["value"] for key, figure in summary["beyond"].items()
              if key.startswith("judge")}
    return {"accuracy": summary["figures"]["accuracy"]["value"], "trained": training_seconds,
            "scored": summary["seconds"] * 1000 / NUM_HELD_OUT,
            "read": read * 1000 / NUM_HELD_OUT, "written": written * 1000 / NUM_HELD_OUT, "beyond": beyond,
            "by_category": {key: figure["value"] for key, figure in summary["figures"].items() if key != "accuracy"}}


def count_tokens(path: Path, comparisons, predictions: list[dict], flags: str) -> tuple[int, int]:
    """Tokens that a model read and wrote to score the comparisons."""
    model = RewardModel.from_pretrained(path)
    if model.paradigm != "naive":
        model.critiques_from = "given" if "given" in flags else "own"
    read = written = 0
    for comparison in comparisons:
        with contextlib.suppress(ValueError):  # a text-only model and an image
            for item in model.encode_for_scoring(comparison).encoded:
                # a thinking judge does not read the response, which it has to write
                read += len(item.prompt_ids) if model.paradigm == "think" else item.num_tokens
    for prediction in predictions:
        for text in prediction.get("critiques", {}).get(str(path), []):
            written += len(model.processor.tokenizer(text).input_ids) + 1
    return read, written


def start_seed(here: Path, seed: int, options) -> list[tuple]:
    """What the rows of a seed start from; returns the rows."""
    here.mkdir(exist_ok=True)
    if options.table in ("1", "2", "algorithm1", "4") and not (here / "stand_in").exists():
        script(here, "tests/recipe.py", "--stand_in", here / "stand_in", "--seeds", seed, "--stand_in_steps",
               options.stand_in_steps)
    return [row for row in TABLES[options.table](here, seed, options) if options.only in row[0]]


def finish(here: Path, r: int, rows, options, earlier, bar) -> dict:
    """The cell of row r, made or, if it is finished, read. rows: future of the seed's. One that is not a model of its
    own, trained by one command, takes what the rows before it made: it waits for them."""
    row = rows.result()[r]
    if len(row[2]) != 1 or len(row[3].split()) > 1:
        wait(earlier)
    file = here / f"{row[0].replace(' ', '_')}.json"
    if not file.exists():
        file.write_text(json.dumps(cell(here, row, options)))
    bar.update()
    return json.loads(file.read_text())


TABLES = {"1": table_1, "2": table_2, "algorithm1": algorithm_1, "4": table_4, "6": table_6, "7": table_7}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=list(TABLES), default="1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=3000, help="comparisons each model is trained on")
    parser.add_argument("--stand_in_steps", type=int, default=1500, help="of fine-tuning, 16 answers each")
    parser.add_argument("--rl_steps", type=int, default=60, help="of GRPO, 16 prompts each")
    parser.add_argument("--lr", default="6e-4")
    parser.add_argument("--out", default="runs/recipe")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, each on one thread")
    parser.add_argument("--stand_in", default="", help=argparse.SUPPRESS)  # folder in which to make it
    options = parser.parse_args()
    if options.stand_in:
        return make_stand_in(Path(options.stand_in), options.seeds[0], options.stand_in_steps)
    out = Path(options.out).resolve() / f"table{options.table}"
    out.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({name: vars(options)[name] for name in ("rows", "stand_in_steps", "rl_steps", "lr")})
    if (out / "settings.json").exists() and (out / "settings.json").read_text() != settings:
        raise SystemExit(f"{out} has cells of other settings; choose another --out")
    (out / "settings.json").write_text(settings)
    if not (out / "held").exists():
        data.write_comparisons(out / "held", data.synthetic(NUM_HELD_OUT, held_out=True), progress=False)
    with ThreadPoolExecutor(options.jobs) as pool:
        seeds = [pool.submit(start_seed, out / str(seed), seed, options) for seed in options.seeds]
        rows = seeds[0].result()
        with tqdm(desc="cells", unit="cell", total=len(rows) * len(seeds)) as bar:
            futures = {}  # {(row, seed): its cell to come}; row by row, so that no seed is left for the end
            for r, s in itertools.product(range(len(rows)), range(len(seeds))):
                futures[r, s] = pool.submit(finish, out / str(options.seeds[s]), r, seeds[s], options,
                                            [futures[q, s] for q in range(r)], bar)
            cells = {row[0]: [futures[r, s].result() for s in range(len(seeds))] for r, row in enumerate(rows)}
    print(evaluate.markdown_table(result_table(rows, cells)))


def result_table(rows: list, cells_of_row: dict) -> list[list[str]]:
    categories = sorted({name for cells in cells_of_row.values() for c in cells for name in c["by_category"]})
    table = [["row", "paper", "accuracy", *categories, "orders agree", "training s", "s per 1,000", "read", "written"]]
    for name, paper, *_ in rows:
        cells = cells_of_row.get(name, [])
        if not cells:
            continue
        mean = lambda get: fmean(get(c) for c in cells)
        spread = f" +- {stdev(c['accuracy'] for c in cells):.1f}" if len(cells) > 1 else ""
        agree = f"{mean(lambda c: c['beyond']['both orders agree']):.1f}" if cells[0]["beyond"] else ""
        table.append([name, paper, f"{mean(lambda c: c['accuracy']):.1f}{spread}",
                      *(f"{mean(lambda c: c['by_category'][k]):.0f}" if k in cells[0]["by_category"] else ""
                        for k in categories), agree,
                      *(f"{mean(lambda c: c[k]):,.0f}" for k in ("trained", "scored", "read", "written"))])
    return table


if __name__ == "__main__":
    main()
