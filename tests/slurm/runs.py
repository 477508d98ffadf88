"""Runs on the real cluster: what a user types, and what is seen of it. Their ranks are the toy."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.run.attempts import Attempt, read_history
from tests.slurm.cluster import Cluster, wait_for

TOY = Path(__file__).with_name("toy.py")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Runs:
    cluster: Cluster
    folder: Path
    config: Path

    def alignkd(
        self, *arguments: object, code: int | None = 0, cwd: Path | None = None, **variables: str
    ) -> str:
        """Output of the command, which must end with ``code`` (None: any)."""
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *map(str, arguments)],
            capture_output=True, text=True, timeout=400, cwd=cwd or ROOT,
            env={**self.cluster.environment, "COLUMNS": "200", **variables},
        )  # fmt: skip
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done.stdout if "--json" in arguments else done.stdout + done.stderr

    def json(self, *arguments: object, **variables: str) -> Any:
        return json.loads(self.alignkd(*arguments, "--json", **variables))

    def prepare(
        self,
        name: str = "run",
        *,
        nodes: int = 2,
        gpus_per_node: int = 1,
        folder: str = "runs",
        slurm: Any = None,
        **plan: Any,
    ) -> Path:
        """A run folder with the toy in place of the training ranks; not submitted."""
        site = self.site(slurm or {})
        place = self.folder / folder
        self.alignkd(
            *("launch", self.config, "--backend", "slurm", "--nodes", nodes, "--name", name, "--dry-run"),
            *("--gpus-per-node", gpus_per_node),
            *("--set", f"run.folder={json.dumps(str(place), ensure_ascii=False)}"),
            *("--set", f"slurm={json.dumps(site)}"),
        )
        run = place / name
        self.plan(run, **plan)
        return run

    def site(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Slurm settings that put the toy in place of the training ranks."""
        return {
            "gpu_option": "none",
            "activate": f"export PYTHON={shlex.quote(str(self._toy_python()))}",
            "signal_seconds": 10,
            "export": {"ALIGNKD_MASTER_ADDR": "127.0.0.1"},  # all nodes are this machine
            **changes,
        }

    def plan(self, run: Path, **plan: Any) -> None:
        """What the toy does in this run."""
        toy = {"steps": 10, "seconds": 0.02, "every": 5, "failures": [], "hold": [], **plan}
        (run / "toy.json").write_text(json.dumps(toy))

    def submit(self, run: Path) -> str:
        """As by hand; returns the job's id."""
        return self.cluster.run("sbatch", "--parsable", str(run / "job.sbatch"))

    def wait_for_step(self, run: Path, step: int) -> None:
        wait_for(lambda: self.step(run) >= step, f"step {step} of {run}")

    def step(self, run: Path) -> int:
        try:
            return int(json.loads((run / "progress.json").read_text())["step"])
        except (OSError, ValueError, KeyError):  # not there, or not training yet
            return 0

    def wait_for_end(self, job: str) -> str:
        """Final state of a job."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        wait_for(lambda: self.cluster.state(job) in final, f"the end of job {job}")
        return self.cluster.state(job)

    def reasons(self, run: Path) -> list[str | None]:
        return [attempt.reason for attempt in self.attempts(run)]

    def attempts(self, run: Path) -> list[Attempt]:
        return read_history(run)

    def log(self, run: Path) -> str:
        return "\n".join(path.read_text() for path in sorted((run / "logs").glob("*.log")))

    def replace_program(self, name: str, body: str) -> str:
        """``activate`` for a job that finds a bash script in place of a program of Slurm.

        In the script ``$REAL`` is the program itself.
        """
        folder = self.folder / "programs"
        folder.mkdir(exist_ok=True)
        path = folder / name
        path.write_text(f"#!/bin/bash\nREAL={shutil.which(name)}\n{body}\n")
        path.chmod(0o755)
        return f"{self.site({})['activate']}; export PATH={shlex.quote(str(folder))}:$PATH"

    def _toy_python(self) -> Path:
        """An interpreter that runs the toy when it is asked for ``-m alignkd.train``."""
        path = self.folder / "toy-python"
        python, toy = shlex.quote(sys.executable), shlex.quote(str(TOY))
        path.write_text(
            "#!/bin/bash\n"
            f'if [[ $2 == alignkd.train ]]; then exec {python} {toy} "$3"; fi\n'
            'if [[ $3 == finish && -e $4/slow ]]; then touch "$4/thinks"; fi\n'
            "while [[ $3 == finish && -e $4/slow ]]; do sleep 0.1; done\n"
            f'exec {python} "$@"\n'
        )
        path.chmod(0o755)
        return path
