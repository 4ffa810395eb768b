"""What the data path costs at the paper's 2.8M pairs: run by hand, asserted nowhere.

    python tests/benchmark_data.py --folder data/million --no_convert      opening 2.8M rows: 3 GB of disk, for a while
    python tests/benchmark_data.py --folder data/million --rows 280000     with the conversion
    python tests/benchmark_data.py --folder data/images --images 300       JPEGs of a megapixel: converting, encoding

Writes a file of invented pairs of about 1 kB, converts it with `data.py pairs`' own function, opens the result for
training, and reads rows at random; with images, encodes them as for the 7B on one thread. Prints seconds (of the clock,
and of this process's CPU), rows a second and resident memory.

Measured with --images 300 (two shared cores, beside other work, twice): 28 JPEGs of a megapixel a second of one core
become some 1,270 tokens each. Of 36 ms decoding takes 6, resizing and cutting 20, the texts 1. In one run,
--images 60, one thread on a quiet machine: 18.7 read and cut, 7.9 by transformers' own processor, which also normalises
and writes every frame twice: 2.37 times as many (once).

Readers, images a second of the clock, OMP_NUM_THREADS=1 and --images 60 (two shared cores with a load of 3, best of
five turns): one thread 25.7, two 35.8; one process 22.7, two 28.3. At a busier time, --images 30, best of twelve:
threads 25.3 and 36.9, processes 18.7 and 41.5; with a load of 6 and more all four gave 13 to 15.
"""
import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import model  # noqa: E402


def resident() -> str:
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
    return f"resident {now / 2**20:.0f} MB, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"


def write_source(file: Path, rows: int, jpegs: int) -> None:
    words = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in "rstn"]
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=100)) for _ in range(1000)]  # 400 characters each
    with open(file, "w") as out:
        for i in range(rows):
            images = []
            if i < jpegs:
                noise = Image.frombytes("RGB", (96, 72), rng.randbytes(96 * 72 * 3))
                images = [f"{i}.jpg"]
                noise.resize((1152, 864), Image.Resampling.BICUBIC).save(file.parent / images[0], quality=88)
            prompt = f"Question {i}: {texts[i % 1000][:150]}?"
            out.write(json.dumps({"id": str(i), "prompt": prompt, "chosen": f"{i} {texts[i * 7 % 1000]}",
                                  "rejected": texts[(i * 13 + 1) % 1000], "images": images}) + "\n")


def convert(folder: Path, args) -> None:
    start = time.time()
    cfg = data.Config(source=[str(folder / "source.jsonl")], out=str(folder / "set"), workers=args.workers)
    report, seconds = data.convert("pairs", cfg), time.time() - start
    print(f"converted {report['comparisons']} in {seconds:.1f} s, {args.rows / seconds:.0f} rows/s, {resident()}",
          flush=True)


def encode_rows(rows) -> None:
    """Images a second of one core, and where they go: an image of 1,280 tokens at most, as from Qwen2.5-VL-7B."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        backbone = model.tiny_backbone(folder, ["What is shown?"])
        processor = model.RewardModel.from_backbone(backbone, max_pixels=1280 * 784).processor
    rows = [row for row in rows if row.images]

    def seconds(work, items) -> float:
        start = time.process_time()
        for item in items:
            work(item)
        return time.process_time() - start

    whole = seconds(lambda row: model.encode(row, processor), rows)
    decoded = [model.open_image(row.images[0]) for row in rows[:20]]
    parts = {"decode": seconds(lambda row: model.open_image(row.images[0]), rows) / len(rows),
             "resize, cut": seconds(lambda image: model.patchify(image, processor.image_processor),
                                    decoded) / len(decoded),
             "texts": seconds(lambda row: model.encode(replace(row, images=[]), processor), rows) / len(rows)}
    stock = seconds(lambda row: processor.image_processor(images=[model.open_image(row.images[0])],
                                                          return_tensors="pt"), rows)
    ours = seconds(lambda row: model.patchify(model.open_image(row.images[0]), processor.image_processor), rows)
    print(f"read and cut {len(rows)} images: {len(rows) / ours:.1f} per CPU second, transformers' own processor "
          f"{len(rows) / stock:.1f}: {stock / ours:.2f} times as many", flush=True)
    print(f"encoded {len(rows)} images, {len(rows) / whole:.1f} per CPU second; of {1000 * whole / len(rows):.1f} ms: "
          + ", ".join(f"{name} {1000 * part:.1f}" for name, part in parts.items()), flush=True)
    compare_readers(rows, processor)


def encode_row(row):
    return model.encode(row, PROCESSOR)


def compare_readers(rows, processor) -> None:
    """Images a second of the clock by one and two threads and processes, in turns; the best of five, since the machine
    has other work. Processes are forks, which must be made before CUDA is used, and send their patches through a pipe.
    """
    global PROCESSOR
    PROCESSOR = processor
    pools = {}
    for workers in (1, 2):  # forks first, while there are no threads
        pools[f"{workers} processes"] = ProcessPoolExecutor(workers, get_context("fork"))
        list(pools[f"{workers} processes"].map(encode_row, rows[:2 * workers]))
    for workers in (1, 2):
        pools[f"{workers} threads"] = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    rates = {name: [] for name in pools}
    for _ in range(5):
        for name, pool in pools.items():
            start = time.perf_counter()
            for _ in pool.map(encode_row, rows):
                pass
            rates[name].append(len(rows) / (time.perf_counter() - start))
    for pool in pools.values():
        pool.shutdown()
    print("images a second of the clock: " + ", ".join(f"{name} {max(values):.1f}"
                                                       for name, values in rates.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="a folder that does not exist yet; it is removed at the end")
    parser.add_argument("--rows", type=int, default=2_800_000)
    parser.add_argument("--workers", type=int, default=0, help="threads of the conversion; 0 takes all cores")
    parser.add_argument("--no_convert", action="store_true", help="open the written rows as they are")
    parser.add_argument("--reads", type=int, default=100_000, help="rows read at random")
    parser.add_argument("--images", type=int, default=0, help="so many rows, each with a JPEG")
    args = parser.parse_args()
    args.rows = args.images or args.rows
    folder = Path(args.folder)
    folder.mkdir(parents=True)
    try:
        write_source(folder / "source.jsonl", args.rows, args.images)
        size = (folder / "source.jsonl").stat().st_size
        print(f"{args.rows} rows, {size / 1e9:.2f} GB; imports and all: {resident()}", flush=True)

        if args.no_convert:
            (folder / "set").mkdir()
            os.rename(folder / "source.jsonl", folder / "set" / "comparisons.jsonl")
        else:  # in a process of its own, so that opening is measured without what conversion left behind
            converter = get_context("fork").Process(target=convert, args=(folder, args))
            converter.start()
            converter.join()

        start, cpu = time.time(), time.process_time()
        rows = data.read_comparisons(folder / "set")
        print(f"opened {len(rows)} rows in {time.time() - start:.1f} s ({time.process_time() - cpu:.1f} of CPU), "
              f"{resident()}", flush=True)

        order = random.Random(1).choices(range(len(rows)), k=args.reads)
        start, cpu = time.time(), time.process_time()
        for i in order:
            rows[i]
        seconds, cpu = time.time() - start, time.process_time() - cpu
        print(f"read {args.reads} rows at random, {args.reads / seconds:.0f} rows/s "
              f"({args.reads / cpu:.0f} per CPU second), {resident()}", flush=True)

        start = time.time()
        first = data.Order([rows.pair_counts], [1.0], batch_size=128, seed=0).rows_of_step(0)
        print(f"shuffled an epoch and chose the {len(first)} rows of its first step in {time.time() - start:.1f} s, "
              f"{resident()}", flush=True)
        if args.images:
            encode_rows(rows)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
