"""Two nodes on one machine, which test_train.py compares with one process: `two_nodes.py FOLDER FLAGS OF TRAIN.PY`.

Each node has a launcher, whose output goes to FOLDER/node-0.log and node-1.log; both write into FOLDER/run. After the
first checkpoint the second node's worker is killed; both launchers start new ones, which resume from the checkpoint.
The launchers are torchrun's, and their workers what torchrun starts, but forks of this process: torch is loaded once
and not six times.
"""
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# Trap: torch 2.13's launchers share their store with the new workers, which find the addresses of the dead ones there
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

from torch.distributed import run  # noqa: E402
from torch.distributed.launcher.api import elastic_launch  # noqa: E402

from train import Config, command_line, main  # noqa: E402


def train():
    """`python train.py FLAGS`, which ends the process with its exit status."""
    command_line(main, Config, "train.py")


def node(log, port):
    """`torchrun --nnodes=2 ... train.py FLAGS`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    words = ["--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", "--rdzv_backend=c10d",
             f"--rdzv_endpoint=127.0.0.1:{port}", "--start-method=fork", "train.py"]
    settings, *_ = run.config_from_args(run.parse_args(words))
    elastic_launch(settings, train)()


here, sys.argv[1:] = Path(sys.argv[1]), sys.argv[2:]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
logs = [here / "node-0.log", here / "node-1.log"]
launchers = [multiprocessing.get_context("fork").Process(target=node, args=(log, port)) for log in logs]
for launcher in launchers:
    launcher.start()
while not any(here.glob("run/checkpoint-*")):
    if launchers[0].exitcode is not None:
        sys.exit(logs[0].read_text()[-3000:])
    time.sleep(0.02)
worker = subprocess.run(["pgrep", "-P", str(launchers[1].pid)], capture_output=True, text=True).stdout
os.kill(int(worker), signal.SIGKILL)
for launcher in launchers:
    launcher.join()
sys.exit(logs[0].read_text()[-3000:] if any(launcher.exitcode for launcher in launchers) else 0)
