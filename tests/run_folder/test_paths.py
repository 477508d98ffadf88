"""The names in a run folder are a format: folders of earlier versions are resumed, scripts read them."""

from __future__ import annotations

import re
from pathlib import Path

from alignkd.run_folder import paths
from alignkd.run_folder.paths import RunPaths, exit_name, log_name

ROOT = Path(__file__).parents[2]
NAMES = {
    "config": "config.yaml",
    "manifest": "manifest.json",
    "deepspeed": "ds",
    "student_deepspeed": "ds/student.json",
    "teacher_deepspeed": "ds/teacher.json",
    "job_script": "job.sbatch",
    "rank_script": "rank.sh",
    "environment_script": "env.sh",
    "hosts": "hosts.json",
    "resize_journal": "resize.json",
    "launcher_lock": ".lock",
    "job": "job.json",
    "next_stage": "next.json",
    "previous_stage": "previous.json",
    "open_attempt": "attempt.json",
    "attempts": "attempts.jsonl",
    "exits": "exits",
    "slurm_step": "exits/step",
    "hang": "exits/hang",
    "beats": "beats",
    "stop": "stop",
    "allowed_changes": "allowed_changes.json",
    "from_scratch": "from_scratch.json",
    "logs": "logs",
    "writers": "writers",
    "index": "index.bin",
    "progress": "progress.json",
    "held_out_index": "held-out.bin",
    "answers": "answers.jsonl",
    "metrics": "metrics.jsonl",
    "tracking": "tracking",
    "checkpoints": "checkpoints",
    "result": "result.json",
    "student": "student",
    "adapters": "adapters.safetensors",
    "evaluation": "eval",
}


def test_every_path_has_its_name_on_disk() -> None:
    run = Path("/runs/one")
    found = {
        name: str(getattr(RunPaths(run), name).relative_to(run))
        for name, value in vars(RunPaths).items()
        if isinstance(value, property)
    }
    assert found == NAMES
    assert RunPaths(run).log(3) == run / "logs" / "rank-3.log"
    assert RunPaths(run).ssh_log(3) == run / "logs" / "ssh-3.log"
    assert RunPaths(run).beat(3) == run / "beats" / "rank-3"
    assert RunPaths(run).exit_file(3) == run / "exits" / "rank-3"
    assert (log_name("*"), exit_name("*")) == ("rank-*.log", "rank-*")


def test_every_name_is_in_the_table_of_the_module() -> None:
    assert paths.__doc__ is not None
    for name in NAMES.values():
        assert re.search(rf"\b{re.escape(name)}\b" if name != ".lock" else r"\.lock", paths.__doc__), name


def test_the_shell_templates_use_the_same_names() -> None:
    used = {
        found
        for template in (ROOT / "slurm").glob("*.j2")
        for found in re.findall(r"\$RUN/([\w.-]+)", template.read_text())
    }
    assert used
    assert used <= set(NAMES.values())


def test_no_other_module_spells_a_name_out() -> None:
    """Names that mean nothing else in Python source."""
    unique = {"config.yaml", "result.json", "progress.json", "metrics.jsonl", "attempts.jsonl", "index.bin"}
    pattern = re.compile("|".join(f'"{re.escape(name)}"' for name in sorted(unique)))
    sources = [path for room in ("alignkd", "launcher") for path in (ROOT / room).rglob("*.py")]
    assert len(sources) > 100
    spelt = {path.name for path in sources if pattern.search(path.read_text(encoding="utf-8"))}
    assert spelt == {"paths.py"}
