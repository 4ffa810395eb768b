"""Two nodes on one machine, which test_train.py compares with one process: `two_nodes.py FOLDER FLAGS OF TRAIN.PY`.

Each node has a launcher and a disk of its own, FOLDER/node-0 and FOLDER/node-1. After the first checkpoint the second
node's worker is killed; both launchers start new ones, which go on from the checkpoint.
"""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

here, flags = Path(sys.argv[1]), sys.argv[2:]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
# Trap: torch 2.13's launchers hand their store on to the new workers, who find the addresses of the dead there
environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=3",
           "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", Path(__file__).parent.parent / "train.py", *flags]
nodes, disks = [], [here / "node-0", here / "node-1"]
for disk in disks:
    disk.mkdir()
    with open(disk / "said", "w") as said:
        nodes.append(subprocess.Popen(command, cwd=disk, env=environment, stdout=said, stderr=said))
while not (disks[0] / "run" / "checkpoint.pt").exists():
    if nodes[0].poll() is not None:
        sys.exit((disks[0] / "said").read_text()[-3000:])
    time.sleep(0.02)
worker = subprocess.run(["pgrep", "-P", str(nodes[1].pid)], capture_output=True, text=True).stdout
os.kill(int(worker), signal.SIGKILL)
ends = [node.wait() for node in nodes]
sys.exit((disks[0] / "said").read_text()[-3000:] if any(ends) else 0)
