"""A script as two ranks: on GPUs by torchrun; on a CPU one interpreter imports and forks, where that starts three."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(script: Path, *arguments: str, ranks: int = 2) -> str:
    """Return what a script's ranks said; with ranks=0 it runs by itself."""
    how = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    how = how if "cuda" in arguments else [__file__]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *how, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def fork() -> int:
    """Run the script of this command line in two forks, joined over gloo; return the exit status of both."""
    import torch.distributed as dist

    import pelagos.engine.over_ranks  # noqa: F401  what all scripts want
    from pelagos.parallel import TIMEOUT

    sys.argv = sys.argv[1:]
    failed, ranks = 0, set[int]()
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(2):
            if pid := os.fork():
                ranks.add(pid)
                continue
            try:
                store = dist.FileStore(f"{folder}/store", 2)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=TIMEOUT)
                runpy.run_path(sys.argv[0], run_name="__main__")
            except BaseException as ended:
                if not (isinstance(ended, SystemExit) and ended.code in (0, None)):
                    traceback.print_exc()
                    failed = 1
            sys.stdout.flush()
            os._exit(failed)
        while ranks:
            pid, status = os.wait()
            ranks.remove(pid)
            failed = failed or int(status != 0)
            for other in ranks if status else ():  # it would wait for the one that is lost
                os.kill(other, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    sys.exit(fork())
