from pathlib import Path

import pytest

from alignkd.errors import UserError
from launcher.commands.explain import explain

GOLDEN = Path(__file__).parents[1] / "golden"
HEAD = "#!/bin/bash\n#SBATCH --time=1:00:00\n#SBATCH --signal=USR1@120\n#SBATCH --requeue\n"
SRUN = "srun --kill-on-bad-exit=1 python train.py\n"


def found(tmp_path: Path, text: str) -> list[tuple[int, str]]:
    (tmp_path / "job").write_text(text)
    return [(finding.line, finding.reason) for finding in explain(tmp_path / "job")]


def test_a_good_script_has_no_findings(tmp_path) -> None:
    assert found(tmp_path, HEAD + SRUN) == []


@pytest.mark.parametrize("name", ["plain", "everything", "pyxis", "cpu"])
def test_rendered_job_scripts_have_no_findings(name: str) -> None:
    assert explain(GOLDEN / name / "job.sbatch") == []


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (HEAD + "srun --kill-on-bad-exit=1 \\\n  torchrun --nnodes 2 x.py", 5, "torchrun swallows SIGUSR1"),
        (HEAD + "srun -K1 python -m torch.distributed.run x.py", 5, "torchrun swallows"),
        (HEAD + "deepspeed --hostfile h train.py", 5, "exits with 0"),
        (HEAD + "trap : CONT\n" + SRUN, 5, "SIGCONT"),
        (HEAD + "#SBATCH --gpus-per-task=1\n" + SRUN, 5, "peer access"),
        (HEAD + "srun -K1 --gpu-bind=none x", 5, "CUDA_VISIBLE_DEVICES"),
        (HEAD + 'cd "$(dirname "$0")"\n' + SRUN, 5, "runs a copy"),
        (HEAD + 'srun -K1 bash -c "RANK=$SLURM_PROCID python x"', 5, "0 for every rank"),
        (HEAD + "export MASTER_PORT=29500\n" + SRUN, 5, "same port"),
        (HEAD.replace("USR1@120", "B:USR1@120") + SRUN, 3, "does not forward it"),
        (HEAD.replace("#SBATCH --signal=USR1@120\n", "") + SRUN, 0, "nothing tells the ranks"),
        (HEAD.replace("#SBATCH --requeue\n", "") + SRUN, 0, "left to the cluster"),
        (HEAD + "#SBATCH --output=x.log\n" + SRUN, 4, "--open-mode=append"),
        (HEAD + "trap 'scontrol requeue $SLURM_JOB_ID' TERM\n" + SRUN, 5, "requeues cancelled jobs"),
        (
            HEAD + "again() {\n  scontrol requeue $SLURM_JOB_ID\n}\ntrap again USR1 SIGTERM\n" + SRUN,
            8,
            "requeues cancelled jobs",
        ),
        (HEAD + SRUN + "sbatch next.sh", 6, "options of the new one"),
        (HEAD + "srun python train.py", 5, "wait for a dead rank"),
        (HEAD + "#SBATCH --cpus-per-task=4\n" + SRUN, 6, "repeat it"),
        (HEAD + "#SBATCH --export=NONE\n" + SRUN, 6, "have no PATH"),
        (HEAD + SRUN + "#SBATCH --mem=4G", 6, "does not read it"),
        (HEAD + "#SBATCH --chdir=$HOME/x\n" + SRUN, 5, "not shell code"),
    ],
)
def test_every_pitfall_is_found_in_its_line(tmp_path, text: str, line: int, reason: str) -> None:
    (finding,) = found(tmp_path, text)
    assert finding[0] == line
    assert reason in finding[1]


@pytest.mark.parametrize(
    "text",
    [
        "# torchrun is not used here\n",
        "srun -K1 bash -c 'RANK=$SLURM_PROCID python x'\n",
        "trap 'touch stopped' TERM\n",
        "python -m pip install deepspeed==0.19\n",
        "unset ${!SLURM_@}\nsbatch next.sh\n",
        "MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))\n",
    ],
)
def test_what_only_looks_like_a_pitfall_is_not_reported(tmp_path, text: str) -> None:
    assert found(tmp_path, HEAD + text + SRUN) == []


def test_an_unreadable_script_is_a_user_error(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        explain(tmp_path / "missing")
