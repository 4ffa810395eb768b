"""Requests a second of `evaluate.py --serve` against one `score` call after another, in one run: by hand, asserted
nowhere.

    OMP_NUM_THREADS=1 python tests/benchmark_server.py                    the tiny shape with random weights, two cores
    python tests/benchmark_server.py --model runs/7b --rows 2000          a model of yours, on a GPU if there is one

The server is a process of its own, started by its command. Clients are threads of this process, each of which posts
one comparison (/score: prompt, PNG in base64, K responses), waits for its rewards and posts the next. `score` gets the
same comparisons, its images as the same PNG files in memory. Both must give the same rewards (1e-3; in bf16 0.1) before
the medians are printed. All ways take turns.

Measured, two shared cores (load 6 to 9), one thread in each process, torch 2.13, the command as it stands above, run
twice: 400 comparisons of K = 3, 334 with an image of 84 x 84; medians of 3 turns, requests a second:

    way                              first run       second run
    score, one call after another     62.2            36.7
    server, 1 client                  56.8  (0.91)    37.3  (1.02)
    server, 8 clients                 96.2  (1.55)    91.8  (2.50)
    server, 32 clients               174.3  (2.80)   104.8  (2.85)

`score` calls one model for one comparison; the server has a core of its own, as the clients have, and packs what waits.
"""
import argparse
import base64
import http.client
import io
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import synthetic  # noqa: E402
from model import RewardModel, tiny_backbone  # noqa: E402


def save_tiny(folder: Path) -> Path:
    """A reward model of train.py's default shape."""
    torch.manual_seed(0)
    texts = [text for c in synthetic(200) for text in (c.prompt, *c.responses)]
    tiny_backbone(folder / "backbone", texts)
    RewardModel.from_backbone(folder / "backbone").save_pretrained(folder / "model")
    return folder / "model"


def start_server(model: Path) -> tuple[subprocess.Popen, tuple[str, int]]:
    words = [sys.executable, "evaluate.py", "--model", str(model.resolve()), "--serve", "0"]
    server = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in server.stdout:
        if found := re.search(r"http://(.+):(\d+)", line):
            return server, (found[1], int(found[2]))
    raise SystemExit("the server ended; its error is above")


def post(address, body: bytes) -> list[float]:
    connection = http.client.HTTPConnection(*address)
    connection.request("POST", "/score", body)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    assert response.status == 200, answer
    return answer["rewards"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()

    comparisons, bodies = [], []
    for comparison in synthetic(args.rows, seed=7):
        files = []
        for image in comparison.images:
            file = io.BytesIO()
            image.save(file, "PNG")
            files.append(file.getvalue())
        responses = list(comparison.responses)
        comparisons.append((comparison.prompt, responses, files))
        images = [base64.b64encode(file).decode() for file in files]
        bodies.append(json.dumps({"prompt": comparison.prompt, "responses": responses, "images": images}).encode())

    with tempfile.TemporaryDirectory() as folder:
        path = args.model or save_tiny(Path(folder))
        server, address = start_server(path)
        try:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            model = RewardModel.from_pretrained(path, dtype=dtype).to(device)
            rates, rewards = {}, {}
            for _ in range(args.turns):
                for clients in (0, *args.clients):  # 0: `score`
                    start = time.perf_counter()
                    if clients == 0:
                        answers = [model.score(*comparison) for comparison in comparisons]
                    else:
                        with ThreadPoolExecutor(clients) as pool:
                            answers = list(pool.map(lambda body: post(address, body), bodies))
                    name = f"server, {clients} clients" if clients else "score, one call after another"
                    rates.setdefault(name, []).append(len(answers) / (time.perf_counter() - start))
                    rewards[name] = answers
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)

    first, *others = rewards.values()
    for answers in others:
        for a, b in zip(first, answers, strict=True):
            assert max(abs(x - y) for x, y in zip(a, b)) < (1e-3 if dtype == torch.float32 else 0.1)
    base = statistics.median(rates["score, one call after another"])
    print(f"{args.rows} comparisons of K = {statistics.mean(map(len, first)):.1f}, {device.type}, "
          f"{torch.get_num_threads()} threads, medians of {args.turns} turns (lowest to highest):")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:32}{median:7.1f} a second ({min(values):.1f} to {max(values):.1f}), {median / base:.2f} of score")


if __name__ == "__main__":
    main()
