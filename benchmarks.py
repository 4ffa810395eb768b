"""The five benchmarks: rows as comparisons, official metrics, published results (BaseReward, arXiv 2509.16127, section 5).

    1  rows               a published row -> a Comparison with its id and category
    2  files              JSON, JSONL, parquet or the hub -> rows, and rows that share a prompt -> one comparison to be scored
    3  metrics            prediction rows -> what the official scripts count
    4  published rows     as printed, and what keeps them from being on one footing

A pair is right when margin > 0: a tie is wrong, as in the official scripts. Rows that share prompt and images are scored as one
comparison, but counted row by row, and repeated ids stay apart.

Where the published rows are not on one footing (arithmetic over the public ids, recomputed in tests/test_evaluate.py):
- VL-RewardBench: the official script groups 1,250 ids as 183 general, 749 hallucination, 318 reasoning. R1-Reward's looks for lower-case
  "rlhf" and "rlaif" where the ids are upper-case: 484, 448, 318, here `--grouping paper`. BaseReward's columns general and reasoning are
  exchanged, and two of its rows were scored on 1,225 ids, since 25 occur twice. Overall does not depend on the grouping, macro does.
- Multimodal RewardBench: BaseReward's Qwen2.5-VL row has the average over 4,711 rows, the older rows the mean of seven columns.
- MM-RLHF-RewardBench: three cells of BaseReward's Qwen2.5-VL row are no possible fraction of their 42, 37 and 34 pairs.
"""
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

from data import BadRow, held_out, inside, read_comparisons, synthetic, text_of
from model import MARK, Comparison

# ---------------------------------------------------------------------------------------------------------------------------------
# 1  Rows: a published row -> a Comparison with its id and category. A ValueError says what is wrong with the row.


def need(row, *keys) -> list:
    if not isinstance(row, dict) or any(row.get(key) is None for key in keys):
        found = ", ".join(sorted(row)[:12]) if isinstance(row, dict) else repr(row)[:80]
        raise ValueError(f"want the fields {', '.join(keys)}; found {found}. Is this the file of another benchmark?")
    return [row[key] for key in keys]


def row_of(prompt, responses, pairs, id, category, image=None, folder: Path | None = None) -> Comparison:
    """`image`: what parquet holds (bytes), or the path of an image or of a folder of frames, which must be there. It goes in front."""
    if not all(isinstance(text, str) for text in responses):
        raise ValueError("a response is not a text")
    image = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
    if isinstance(image, bytes):
        images = [io.BytesIO(image)]  # opened anew for each use, so that no decoded picture stays in memory
    else:
        places = [inside(place, image) for place in (folder, folder / "images", folder.parent, folder.parent / "images")] if image else []
        images = [place for place in places if os.path.exists(place)][:1]
        if image and not images:
            raise ValueError(f"{image} is neither in {folder} nor in its images/; fetch the benchmark's images to there")
    if isinstance(prompt, str) and len(MARK.findall(prompt)) != len(images):
        prompt = MARK.sub("", prompt)  # a mark that stands for no image is only text
    return Comparison(prompt, list(responses), pairs, images, id=str(id), category=category)


def vl_group(id: str, grouping: str) -> str:
    prefix = re.split("[_-]", id)[0]
    if prefix in ("mathverse", "mmmu"):
        return "reasoning"
    return "hallucination" if prefix == "hallucination" or grouping == "official" and prefix in ("RLAIF", "RLHF") else "general"


def vl_row(row, folder, part) -> Comparison:
    if isinstance(row, dict) and "prompt" in row:  # R1-Reward's flat copy
        id, query, chosen, rejected, image = need(row, "id", "prompt", "chosen", "rejected", "image")
        if re.match("(mcq|long|short|safety)/", str(image)):
            raise ValueError(f"image {image} belongs to mm-rlhf-rewardbench")
        responses, ranking = [chosen, rejected], [0, 1]
    else:
        id, query, responses, ranking, image = need(row, "id", "query", "response", "human_ranking", "image")
    if len(responses) != 2 or sorted(ranking) != [0, 1]:
        raise ValueError(f"{len(responses)} responses and human_ranking {ranking}; want two responses, ranked [0, 1] or [1, 0]")
    best = list(ranking).index(0)  # human_ranking holds the rank of each response, 0 the better
    return row_of(query, responses, [(best, 1 - best)], id, vl_group(str(id), "official"), image, folder)


MMRB_CATEGORIES = {"open_generation/correctness_task": "correctness", "open_generation/preference_task": "preference",
                   "knowledge": "knowledge", "vqa": "VQA", "reasoning": "", "safety": ""}
SEVEN = ("correctness", "preference", "knowledge", "math", "coding", "safety", "VQA")


def mmrb_row(row, folder, part) -> Comparison:
    id, text, image, first, second, better, category = need(row, "ID", "Text", "Image", "Output1", "Output2", "Better", "Category")
    if better not in ("Output1", "Output2") or category not in MMRB_CATEGORIES:
        raise ValueError(f"Better {better!r}, Category {category!r}; want Output1 or Output2, and one of {', '.join(MMRB_CATEGORIES)}")
    by_id = {"reasoning": "math" if id.lower().startswith("math") else "coding",
             "safety": "safety/bias" if id.lower().startswith("pairs") else "safety/toxicity"}
    category = by_id.get(category) or MMRB_CATEGORIES[category]
    return row_of(text, [first, second], [(0, 1) if better == "Output1" else (1, 0)], id, category, image, folder)


MM_RLHF_CATEGORIES = ("mcq", "long", "short", "safety", "video")


def mm_rlhf_row(row, folder, part) -> Comparison:
    key = "video" if isinstance(row, dict) and row.get("video") else "image"
    id, prompt, chosen, rejected, path = need(row, "id", "prompt", "chosen", "rejected", key)
    found = [c for c in MM_RLHF_CATEGORIES if c in str(path.get("path") if isinstance(path, dict) else path)]  # as the official script
    if not found:
        raise ValueError(f"{key} {path!r:.60} names none of {', '.join(MM_RLHF_CATEGORIES)}. Is this the file of another benchmark?")
    return row_of(prompt, [chosen, rejected], [(0, 1)], id, found[0], path, folder)


# Each subset's weight (allenai/reward-bench: constants.py). math-prm has 447 rows and weighs as much as all code together.
SECTIONS = {"Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40},
            "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
                          "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
            "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154, "xstest-should-respond": 250,
                       "donotanswer": 136},
            "Reasoning": {"math-prm": 984} | {f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
            "Prior Sets": dict.fromkeys(("anthropic_helpful", "anthropic_hhh", "shp", "summarize"), 1)}
SUBSETS = {subset for subsets in SECTIONS.values() for subset in subsets}


def rewardbench_row(row, folder, part) -> Comparison:
    prompt, chosen, rejected = need(row, "prompt", "chosen", "rejected")
    subset = row.get("subset") or part  # the prior sets are one file or one split each
    if subset not in SUBSETS:
        raise ValueError(f"subset {subset!r} is none of RewardBench's. Is this the file of another benchmark?")
    responses = [text_of(answer[-1]) if isinstance(answer, list) and answer else answer for answer in (chosen, rejected)]
    return row_of(prompt, responses, [(0, 1)], row.get("id", ""), subset)


DOMAINS, LEVELS = ("chat", "math", "code", "safety"), ("easy", "normal", "hard")


def rm_bench_row(row, folder, part) -> Comparison:
    id, prompt, chosen, rejected = need(row, "id", "prompt", "chosen", "rejected")
    domain = str(row.get("domain") or part.removesuffix("_filtered")).split("-")[0]  # safety-refuse and safety-response are one
    if domain not in DOMAINS or not (isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) == len(rejected) == 3):
        raise ValueError(f"domain {domain!r}; want one of {', '.join(DOMAINS)}, with lists of three chosen and three rejected responses")
    return row_of(prompt, [*chosen, *rejected], [(i, 3 + j) for i in range(3) for j in range(3)], id, domain)


# name: (its row, its split on the hub and in names of parquet files, its file in a folder, where to get it)
BENCHMARKS = {"vl-rewardbench": (vl_row, "test", "data.jsonl", "MMInstruction/VL-RewardBench"),
              "multimodal-rewardbench": (mmrb_row, "test", "all_data.json", "the data/ folder of facebookresearch/multimodal_rewardbench"),
              "mm-rlhf-rewardbench": (mm_rlhf_row, "train", "mm_reward_bench.jsonl", "a copy of yifanzhang114/MM-RLHF-RewardBench"),
              "rewardbench": (rewardbench_row, "filtered", "filtered.json", "allenai/reward-bench"),
              "rm-bench": (rm_bench_row, "train", "total_dataset.json", "the data/ folder of THU-KEG/RM-Bench")}


# ---------------------------------------------------------------------------------------------------------------------------------
# 2  Files


def raw_rows(source: str, split: str, name: str):
    """(where it stands, its folder, name of the file or split, row) for every row of a file, a folder or a hub id."""
    path = Path(source)
    if path.is_dir():
        files = [f for f in (path / name, path / "data" / name) if f.is_file()] or sorted(path.glob(f"**/{split}-*.parquet"))
        files = files or sorted(f for f in path.iterdir() if f.suffix in (".json", ".jsonl", ".parquet"))
        if not files:
            raise BadRow(f"{path} holds no .json, .jsonl or .parquet file; want {name}")
    elif not path.exists() and (source.count("/") != 1 or source.startswith((".", "/"))):
        raise BadRow(f"{source} does not exist; want a file, a folder, or a hub id like owner/name")
    else:
        files = [path]
    for file in files:
        try:
            if not path.exists() or file.suffix == ".parquet":
                parts = from_arrow(str(file), split)
            elif file.suffix == ".json":
                parts = {file.stem: json.loads(file.read_text())}
            else:
                parts = {file.stem: [json.loads(line) for line in file.read_text().splitlines() if line.strip()]}
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadRow(f"{file} is not {file.suffix[1:]}: {error}") from None
        for part, rows in parts.items():
            if isinstance(rows, dict) or not len(rows):
                raise BadRow(f"{file} holds {type(rows).__name__} and no rows; want a list of objects")
            yield from ((f"{file} row {i}", file.parent, part, row) for i, row in enumerate(rows, start=1))


def from_arrow(source: str, split: str) -> dict:
    """{name: rows} of a parquet file, or of a hub id's split (without such a split: those that RewardBench names). Images stay bytes."""
    try:
        import datasets
    except ImportError:
        raise BadRow(f"reading {source} needs one more package: pip install datasets") from None
    datasets.disable_progress_bars()
    try:
        parts = datasets.load_dataset("parquet", data_files=source) if source.endswith(".parquet") else datasets.load_dataset(source)
    except Exception as error:  # the hub's client raises a dozen kinds, and of each the user needs only what it says
        raise BadRow(f"{source} could not be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    if source.endswith(".parquet"):
        parts = {Path(source).stem.split("-0")[0]: parts["train"]}
    wanted = [split] if split in parts else [name for name in parts if len(parts) == 1 or name in SUBSETS]
    parts = {name: parts[name] for name in wanted}
    for part, rows in parts.items():
        for column in [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]:
            parts[part] = parts[part].cast_column(column, datasets.Image(decode=False))
    return parts


def read_benchmark(name: str, sources, on_bad_row: str) -> list:
    """Every row as (where it stands, Comparison); with on_bad_row "skip" a bad one as (where, the ValueError that says what is wrong)."""
    rows, makers = [], []
    if name == "comparisons" and not sources:
        makers = [(f"drawn comparison {i + 1}", lambda c=c: c) for i, c in enumerate(default_comparisons())]
    elif name == "comparisons":
        files = [read_comparisons(source) for source in sources]
        makers = [(f"{file.file} row {i + 1}", lambda file=file, i=i: file[i]) for file in files for i in range(len(file))]
    elif not sources:
        raise BadRow(f"--data is missing: where {name} lies. Take {BENCHMARKS[name][3]}")
    else:
        row, split, file, _ = BENCHMARKS[name]
        makers = ((where, lambda: row(raw, folder, part))
                  for source in sources for where, folder, part, raw in raw_rows(source, split, file))
    for where, make in makers:
        try:
            rows.append((where, make()))
        except (ValueError, TypeError, AttributeError) as error:
            error = error if isinstance(error, BadRow) else BadRow(f"{where}: {error}")
            if on_bad_row == "stop":
                raise error from None
            rows.append((where, error))
    if not any(isinstance(comparison, Comparison) for _, comparison in rows):
        raise BadRow(f"not one of {len(rows)} rows can be used; the first: {rows[0][1]}")
    return rows


TRAIN_SIZE, EVAL_SIZE = 14000, 800  # the defaults of train.py, which a test compares


def default_comparisons() -> list[Comparison]:
    """What train.py's embedded default holds out: drawn from another seed, less what its training rows say without a picture."""
    return held_out(synthetic(TRAIN_SIZE), EVAL_SIZE)


SHARED = 16  # responses that go with one prompt at most: with thousands it would not fit a pack


def share_prompts(rows) -> tuple[list, list, list]:
    """Comparisons in which a prompt with its images occurs once for all its rows; where each stands; and of each row
    (its comparison, the places of its responses in it, a number that rows of one prompt share), None for a bad row."""
    prompts, wheres, places, known, numbers = [], [], [], {}, {}
    for where, row in rows:
        if not isinstance(row, Comparison):
            places.append(None)
            continue
        key = (json.dumps(row.prompt), *(image if isinstance(image, str) else id(image) for image in row.images))
        at = known.get(key)
        if at is None or len({*prompts[at].responses, *row.responses}) > max(SHARED, len(row.responses)):
            at = known[key] = len(prompts)
            prompts.append(replace(row, responses=[], pairs=[]))
            wheres.append(where)
        responses = prompts[at].responses  # a text that occurs twice is scored once
        responses += [r for r in dict.fromkeys(row.responses) if r not in responses]
        places.append((at, [responses.index(r) for r in row.responses], numbers.setdefault(key, len(numbers))))
    return prompts, wheres, places


# ---------------------------------------------------------------------------------------------------------------------------------
# 3  Metrics of prediction rows {"id", "category", "prompt", "pairs", "rewards"}; `prompt` is a number that rows of one prompt share


def tally(rows, groups=lambda row, p: (row["category"] or "all",)) -> dict:
    """{group: {prompt: [pairs right, pairs]}}; groups(row, p) names the groups in which the row's p-th pair counts. A tie is wrong."""
    out = {}
    for row in rows:
        for p, (w, l) in enumerate(row["pairs"]):
            for group in groups(row, p):
                cell = out.setdefault(group, {}).setdefault(row["prompt"], [0, 0])
                cell[0] += row["rewards"][w] > row["rewards"][l]
                cell[1] += 1
    return out


def metrics(benchmark: str, rows, grouping: str = "official") -> tuple[dict, dict]:
    """A tally, and {figure: {group: weight}} in the order of the published columns: the weighted mean of its groups' shares."""
    if benchmark == "vl-rewardbench":
        names = ("general", "hallucination", "reasoning")
        return (tally(rows, lambda row, p: (vl_group(row["id"], grouping), "all")),
                {name: {name: 1} for name in names} | {"overall": {"all": 1}, "macro": dict.fromkeys(names, 1)})
    if benchmark == "multimodal-rewardbench":
        return (tally(rows, lambda row, p: {row["category"], row["category"].split("/")[0], "all"}),
                {"overall": {"all": 1}} | {name: {name: 1} for name in SEVEN} |
                {"mean of 7": dict.fromkeys(SEVEN, 1), "bias": {"safety/bias": 1}, "toxicity": {"safety/toxicity": 1}})
    if benchmark == "mm-rlhf-rewardbench":
        by_id = {}
        for row in rows:
            by_id.setdefault(row["id"], []).append(row)
        right = [all(row["rewards"][w] > row["rewards"][l] for row in of_id for w, l in row["pairs"]) for of_id in by_id.values()]
        whole = [of_id[0] | {"pairs": [[0, 1]], "rewards": [r, 0]} for r, of_id in zip(right, by_id.values())]  # Acc+: all pairs of an id
        return (tally(rows, lambda row, p: (row["category"], "Acc")) | tally(whole, lambda row, p: (row["category"] + "+", "Acc+")),
                {name: {name: 1} for name in (*MM_RLHF_CATEGORIES, "Acc", "Acc+", *(name + "+" for name in MM_RLHF_CATEGORIES))})
    if benchmark == "rewardbench":
        shares = {name: {subset: w / sum(subsets.values()) for subset, w in subsets.items()} for name, subsets in SECTIONS.items()}
        double = {subset: 2 * w for name, subsets in shares.items() if name != "Prior Sets" for subset, w in subsets.items()}
        return tally(rows), shares | {"score": double, "score with prior sets": double | shares["Prior Sets"]}
    if benchmark == "rm-bench":  # pair 3 i + j: chosen style i meets rejected style j, of concise, plain, markdown
        level = ["normal", "hard", "hard", "easy", "normal", "hard", "easy", "easy", "normal"]  # hard: the wrong one is the fancier
        return (tally(rows, lambda row, p: ((row["category"], level[p]),)),
                {d: {(d, l): 1 for l in LEVELS} for d in DOMAINS} | {l: {(d, l): 1 for d in DOMAINS} for l in LEVELS} |
                {"overall": {(d, l): 1 for d in DOMAINS for l in LEVELS}})
    cells = tally(rows, lambda row, p: (row["category"] or "no category", "accuracy"))
    largest = sorted(cells, key=lambda name: -sum(n for _, n in cells[name].values()))[:13]  # a table with more columns is no table
    return cells, {name: {name: 1} for name in (*sorted({*largest} - {"accuracy"}), "accuracy")}


# ---------------------------------------------------------------------------------------------------------------------------------
# 4  Published rows (Tables 8 to 10 of the paper, as printed) and what keeps them from being on one footing

PUBLISHED = {"vl-rewardbench": """
GPT-4o (2024-08-06) [a]             | 49.10 67.60 70.50 65.80 62.40
Claude-3.7-Sonnet [c]               | 68.08 70.70 60.81 66.31 66.53
IXC-2.5-Reward 7B [a]               | 84.70 62.50 62.90 65.80 70.00
MM-RLHF-Reward 7B [b]               | 45.04 50.45 57.55 50.15 51.01
R1-Reward 7B [b]                    | 63.84 85.71 64.78 71.92 71.44
BaseReward (Qwen2-VL) 7B [b d e]    | 62.12 84.82 82.64 78.53 76.53
BaseReward (Qwen2.5-VL) 7B [b d]    | 68.55 92.19 81.82 82.16 80.85
BaseReward (ensemble) 7B+7B [b d e] | 71.67 91.74 85.33 84.41 82.91""", "multimodal-rewardbench": """
GPT-4o [a]                      | 70.8 62.6 69.0 72.0 67.6 62.1 74.8 87.2
Claude 3.7 Sonnet [a]           | 71.9 58.4 60.7 78.1 76.3 71.3 72.0 86.8
MM-RLHF-Reward 7B [a]           | 67.1 61.7 67.5 54.3 58.4 57.9 92.9 76.8
IXC-2.5-Reward 7B [a]           | 66.6 60.7 64.2 56.8 63.0 50.5 89.9 81.1
R1-Reward 7B                    | 82.2 77.5 74.0 74.9 83.1 79.6 99.6 86.5
BaseReward (Qwen2-VL) 7B [b]    | 68.7 68.2 56.3 64.9 73.1 48.6 72.4 83.5
BaseReward (Qwen2.5-VL) 7B      | 72.8 65.7 65.0 70.6 82.7 50.3 81.5 85.0
BaseReward (ensemble) 7B+7B [b] | 73.6 68.5 68.0 70.3 82.8 51.2 81.3 85.6""", "mm-rlhf-rewardbench": """
GPT-4o (2024-08-06)            | 64.28 78.37 44.11 56.25 40.00 58.23 26.01
Claude-3.7-Sonnet              | 66.67 91.89 91.18 87.50 76.00 82.35 65.22
IXC-2.5-Reward 7B              | 52.38 91.89 67.65 62.50 88.00 71.18 50.00
MM-RLHF-Reward 7B              | 83.00 97.00 74.00 69.00 88.00 82.00 63.00
R1-Reward 7B                   | 80.95 89.19 82.35 75.00 72.00 80.59 54.35
BaseReward (Qwen2-VL) 7B       | 80.95 100.00 88.24 90.62 96.00 90.59 78.26
BaseReward (Qwen2.5-VL) 7B [a] | 95.74 97.38 94.13 81.25 88.00 91.76 80.43
BaseReward (ensemble) 7B+7B    | 88.10 100.00 97.06 87.50 92.00 92.94 80.43"""}

NOTES = {"vl-rewardbench": [
    "[a] grouped as the official script does: 183 general, 749 hallucination, 318 reasoning.",
    "[b] grouped as R1-Reward's script does: 484, 448, 318 (--grouping paper).   [c] fits neither grouping.",
    "[d] printed with two columns exchanged: 318 rows stand under general, 484 under reasoning.   [e] scored on 1,225 of the rows."],
    "multimodal-rewardbench": [
    "[a] overall is the mean of the seven columns: compare with `mean of 7`. Without a mark it is the average over all rows.",
    "[b] overall fits neither: from the columns, the average over 4,711 rows is 68.6 and 73.8."],
    "mm-rlhf-rewardbench": [
    "[a] mcq, long, short are no fractions of 42, 37, 34 pairs; 40/42 = 95.24, 36/37 = 97.30, 32/34 = 94.12 give the printed Acc."]}


def footing(benchmark: str, grouping: str) -> list[str]:
    """Which published rows this model's may be laid beside."""
    if benchmark != "vl-rewardbench":
        return NOTES.get(benchmark, [])
    like, unlike, other = {"official": ("[a]", "[b] and [c]", "paper"),
                           "paper": ("[b] (mind [d] and [e])", "[a] and [c]", "official")}[grouping]
    return [f"Grouping: {grouping}. This model's row compares in every column with rows {like}, in overall alone with {unlike}; "
            f"--grouping {other} for the others."] + NOTES[benchmark]
