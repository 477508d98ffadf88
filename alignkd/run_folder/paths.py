"""Every name in a run folder, the contract between ``launcher`` and the ranks (``python -m alignkd.train``).

"Launch" is ``launcher.run.folder``; a resume on another number of ranks replaces what depends on it.

| name | written by | what it is |
|---|---|---|
| config.yaml | launch | the resolved configuration |
| manifest.json | launch | size, back end, versions, hashes of the data: ``launcher.run.manifest`` |
| ds/student.json, ds/teacher.json | launch | DeepSpeed's configurations; a replicated teacher has none |
| job.sbatch, rank.sh, env.sh | launch | scripts of the Slurm and ssh back ends: ``launcher.render`` |
| hosts.json | launch | hosts of the ssh back end, in node order: ``launcher.backends.ssh`` |
| resize.json | resume | the size that the files above are being replaced for: ``launcher.commands.resize`` |
| .lock | launcher | flock of the only launcher: ``launcher.run.lock`` |
| job.json | launcher, job | the job that was submitted last: ``launcher.backends.slurm.backend`` |
| next.json | launcher | the folder of the next stage or evaluation: ``launcher.commands.stages`` |
| previous.json | launcher | the run folder of the stage before: ``launcher.commands.stages`` |
| attempt.json | launcher, job | the open attempt: ``launcher.run.attempts`` |
| attempts.jsonl | launcher, job | one line per closed attempt: ``launcher.run.attempts`` |
| exits/rank-R | rank.sh | exit code of rank R in this attempt, Unix time, number of ranks that ended before |
| exits/hang | launcher, job | which rank hangs, if the attempt is ended for it: ``launcher.run.hangs`` |
| beats/rank-R | rank R | what the rank is doing: ``run_folder.heartbeat`` |
| exits/step | rank.sh | JOB.STEP, the Slurm step that the ranks are |
| stop | stop, cancel | a signal's name, then the jobs it is meant for |
| allowed_changes.json | resume | keys that may differ from the checkpoint's: ``run_folder.drift`` |
| from_scratch.json | resume | up to which attempt saves were given up: ``run_folder.saved_steps`` |
| logs/rank-R.log | back end | output of rank R; every attempt appends |
| logs/ssh-R.log | back end | what ssh itself said about rank R |
| logs/slurm-JOB.log | job.sbatch | output of the batch script |
| writers/G.json | rank 0, resume | who writes the run, with a heartbeat: ``run_folder.writer_lock`` |
| index.bin | rank 0 | where each sample lies and how long it is: ``alignkd.data.index_file`` |
| held-out.bin | rank 0 | the same for the held-out data |
| answers.jsonl | rank 0 | the student's newest answers to ``evaluation.task``: ``alignkd.engine.accuracy`` |
| progress.json | rank 0 | what the run is doing now: ``run_folder.progress`` |
| metrics.jsonl | rank 0 | one row per optimizer step: ``run_folder.metrics`` |
| metrics.jsonl.after-step-N | rank 0 | rows that a resume from step N cut off |
| metrics.jsonl.given-up | resume | rows from before `--from-scratch` |
| tracking/ | rank 0's tracker | event files of TensorBoard and W&B: ``alignkd.tracking`` |
| checkpoints/ | all ranks | ``run_folder.checkpoints`` |
| result.json | rank 0 | how training ended, written last: ``run_folder.result`` |
| student/ | rank 0 | the trained student, a model folder: ``alignkd.models.saving`` |
| adapters.safetensors | rank 0 | P_attn and P_V for the next stage: ``alignkd.models.adapters`` |
| eval/ | launch | the evaluation that follows the run: ``launcher.commands.follow_up`` |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

JOB_SCRIPT, RANK_SCRIPT, ENVIRONMENT_SCRIPT = "job.sbatch", "rank.sh", "env.sh"


@dataclass(frozen=True)
class RunPaths:
    """Paths in the run folder ``run``. Nothing is read or created."""

    run: Path

    @property
    def config(self) -> Path:
        return self.run / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.run / "manifest.json"

    @property
    def deepspeed(self) -> Path:
        return self.run / "ds"

    @property
    def student_deepspeed(self) -> Path:
        return self.deepspeed / "student.json"

    @property
    def teacher_deepspeed(self) -> Path:
        return self.deepspeed / "teacher.json"

    @property
    def job_script(self) -> Path:
        return self.run / JOB_SCRIPT

    @property
    def rank_script(self) -> Path:
        return self.run / RANK_SCRIPT

    @property
    def environment_script(self) -> Path:
        return self.run / ENVIRONMENT_SCRIPT

    @property
    def hosts(self) -> Path:
        return self.run / "hosts.json"

    @property
    def resize_journal(self) -> Path:
        return self.run / "resize.json"

    @property
    def launcher_lock(self) -> Path:
        return self.run / ".lock"

    @property
    def job(self) -> Path:
        return self.run / "job.json"

    @property
    def next_stage(self) -> Path:
        return self.run / "next.json"

    @property
    def previous_stage(self) -> Path:
        return self.run / "previous.json"

    @property
    def open_attempt(self) -> Path:
        return self.run / "attempt.json"

    @property
    def attempts(self) -> Path:
        return self.run / "attempts.jsonl"

    @property
    def exits(self) -> Path:
        return self.run / "exits"

    def exit_file(self, rank: int) -> Path:
        return self.exits / exit_name(rank)

    @property
    def slurm_step(self) -> Path:
        return self.exits / "step"

    @property
    def hang(self) -> Path:
        return self.exits / "hang"

    @property
    def beats(self) -> Path:
        return self.run / "beats"

    def beat(self, rank: int) -> Path:
        return self.beats / f"rank-{rank}"

    @property
    def stop(self) -> Path:
        return self.run / "stop"

    @property
    def allowed_changes(self) -> Path:
        return self.run / "allowed_changes.json"

    @property
    def from_scratch(self) -> Path:
        return self.run / "from_scratch.json"

    @property
    def logs(self) -> Path:
        return self.run / "logs"

    def log(self, rank: int) -> Path:
        return self.logs / log_name(rank)

    def ssh_log(self, rank: int) -> Path:
        return self.logs / f"ssh-{rank}.log"

    def job_log(self, job: str) -> Path:
        return self.logs / f"slurm-{job}.log"

    @property
    def writers(self) -> Path:
        return self.run / "writers"

    @property
    def index(self) -> Path:
        return self.run / "index.bin"

    @property
    def held_out_index(self) -> Path:
        return self.run / "held-out.bin"

    @property
    def answers(self) -> Path:
        return self.run / "answers.jsonl"

    @property
    def progress(self) -> Path:
        return self.run / "progress.json"

    @property
    def metrics(self) -> Path:
        return self.run / "metrics.jsonl"

    @property
    def tracking(self) -> Path:
        return self.run / "tracking"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def result(self) -> Path:
        return self.run / "result.json"

    @property
    def student(self) -> Path:
        return self.run / "student"

    @property
    def adapters(self) -> Path:
        return self.run / "adapters.safetensors"

    @property
    def evaluation(self) -> Path:
        return self.run / "eval"


def log_name(rank: int | str) -> str:
    """``"*"`` gives the pattern of all ranks' logs."""
    return f"rank-{rank}.log"


def exit_name(rank: int | str) -> str:
    """In ``exits``; ``"*"`` gives the pattern of all ranks'."""
    return f"rank-{rank}"
