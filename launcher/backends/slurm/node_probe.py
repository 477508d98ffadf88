"""One short step on every node of a job: does it answer, and does it see the run folder?"""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from pathlib import Path

LATE_SECONDS = 15  # a shared file system may show a new file late
_ANSWER_SECONDS = 90  # a node that is gone is given up by srun after its own time-outs
_SCRIPT = (
    f"for ((i = 0; i < {LATE_SECONDS}; i++)); do\n"
    '    read -r found <"$1" && [[ $found == "$2" ]] && echo "$SLURMD_NODENAME yes" && exit\n'
    "    sleep 1\n"
    'done 2>/dev/null\necho "$SLURMD_NODENAME no"\n'
)


def nodes_that_see(run: Path, count: int) -> dict[str, bool]:
    """Does a node see a file that was written into the run folder just now? Nodes that do not answer are
    left out; none do where no step can be started.

    For the batch script: the ``count`` nodes are those of the job around it.
    """
    token = uuid.uuid4().hex
    path = run / f".token-{token}"  # a new name, which no cache of a file system has missed before
    path.write_text(token + "\n", encoding="utf-8")
    command = [
        *("srun", "--overlap", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"),
        *("--mem=0", "--mpi=none", "--export=ALL", "--chdir=/"),
        *("bash", "-c", _SCRIPT, "probe", str(path), token),
    ]
    # What the job wants for a rank is no option of this step.
    unwanted = ("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_NODE")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, timeout=LATE_SECONDS + _ANSWER_SECONDS, env=environment,
        )  # fmt: skip
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
    except OSError:
        said = ""
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    answers = [line.split() for line in said.splitlines()]
    return {words[0]: words[1] == "yes" for words in answers if len(words) == 2}
