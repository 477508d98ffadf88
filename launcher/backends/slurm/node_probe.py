"""A short step on every node of a job: does the node respond, and does it see the run folder?"""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from pathlib import Path

LATE_SECONDS = 15  # a shared file system may take this long to show a new file
_ANSWER_SECONDS = 90  # srun gives up on a lost node after time-outs of its own
_SCRIPT = (
    f"for ((i = 0; i < {LATE_SECONDS}; i++)); do\n"
    '    read -r found <"$1" && [[ $found == "$2" ]] && echo "$SLURMD_NODENAME yes" && exit\n'
    "    sleep 1\n"
    'done 2>/dev/null\necho "$SLURMD_NODENAME no"\n'
)


def nodes_that_see(run: Path, count: int) -> dict[str, bool]:
    """Node names, and whether the node sees a file that has just been written into the run folder.

    Nodes that do not respond are missing: all of them when no step can be started. For the batch script: the
    ``count`` nodes are those of its own job.
    """
    token = uuid.uuid4().hex
    path = run / f".token-{token}"  # a new name: a client may have cached that an older one is missing
    path.write_text(token + "\n", encoding="utf-8")
    command = [
        *("srun", "--overlap", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"),
        *("--mem=0", "--mpi=none", "--export=ALL", "--chdir=/"),
        *("bash", "-c", _SCRIPT, "probe", str(path), token),
    ]
    # The job's options for its ranks must not become options of this step.
    of_ranks = ("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_NODE")
    environment = {key: value for key, value in os.environ.items() if key not in of_ranks}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, timeout=LATE_SECONDS + _ANSWER_SECONDS, env=environment,
        )  # fmt: skip
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
    except OSError:
        output = ""
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    answers = [line.split() for line in output.splitlines()]
    return {words[0]: words[1] == "yes" for words in answers if len(words) == 2}
