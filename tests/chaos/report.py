"""The table of a chaos run."""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from launcher.run.manifest import git_commit
from tests.chaos.plan import ACCIDENTS, DISTURBED, START, TRAINING, Kill
from tests.checkpoint.faulty_storage import PHASES, VICTIMS


@dataclass
class Report:
    kills: list[Kill] = field(default_factory=list)
    accidents: Counter[str] = field(default_factory=Counter)
    lost_steps: list[int] = field(default_factory=list)  # of each kill
    lost_checkpoints: list[str] = field(default_factory=list)
    wrong_resumes: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)  # starts that saw no checkpoint, and did not stop at once
    finished_runs: int = 0
    missed: int = 0  # starts that were over before their kill came

    @property
    def ok(self) -> bool:
        return not (self.lost_checkpoints or self.wrong_resumes or self.differing or self.silent)

    def table(self, seed: int, seconds: float) -> str:
        counts = Counter((kill.phase, kill.victim) for kill in self.kills)
        lines = [
            f"seed {seed}, {len(self.kills)} kills in {self.finished_runs} runs, {seconds / 60:.0f} minutes; "
            f"commit {git_commit_short()}; {os.cpu_count()} CPU cores, no GPU, {platform.system()}",
            "",
            "| killed at | one rank | all ranks | the launcher |",
            "|---|---|---|---|",
        ]
        for phase in (START, TRAINING, *DISTURBED, *PHASES):
            lines.append(
                f"| {phase} | " + " | ".join(str(counts[phase, victim]) for victim in VICTIMS) + " |"
            )
        lines += ["", "| accident | times |", "|---|---|"]
        lines += [f"| {accident} | {self.accidents[accident]} |" for accident in ACCIDENTS]
        lost = self.lost_steps or [0]
        lines += [
            "",
            "| | |",
            "|---|---|",
            f"| kills | {len(self.kills)} |",
            f"| steps lost by a kill, mean and most | {sum(lost) / len(lost):.2f}, {max(lost)} |",
            f"| committed checkpoints lost | {len(self.lost_checkpoints)} |",
            f"| resumes from another checkpoint than the newest committed | {len(self.wrong_resumes)} |",
            f"| metrics rows or weights that differ from the undisturbed run | {len(self.differing)} |",
            f"| starts that saw no checkpoint and went on, or changed anything | {len(self.silent)} |",
        ]
        problems = [*self.lost_checkpoints, *self.wrong_resumes, *self.differing, *self.silent]
        return "\n".join(lines + [""] + [f"PROBLEM: {problem}" for problem in problems])


def git_commit_short() -> str:
    return (git_commit(Path(__file__).resolve().parents[2]) or "unknown")[:7]
