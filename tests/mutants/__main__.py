"""``python -m tests.mutants``: break the product in one place after another, and see a test notice each.

Exits with 1 when a mutant survives without a written reason, or its tests cannot judge it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter

from tests.chaos.report import git_commit_short
from tests.mutants.catalogue import ROOT, read_mutants
from tests.mutants.runner import Verdict, judge


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--only", default="", metavar="TEXT", help="those whose file or first line has TEXT")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mutants = [mutant for mutant in read_mutants() if options.only in f"{mutant.file}: {mutant.breaks}"]
    problems = [
        f"{mutant.file}: {mutant.breaks}: {problem}"
        for mutant in mutants
        if (problem := mutant.problem(ROOT)) is not None
    ]
    if problems or not mutants:
        print("\n".join(problems) or "no mutant matches")
        return 1
    started, counts = time.monotonic(), Counter[str]()
    for outcome in judge(mutants, ROOT, options.jobs):
        counts[outcome.verdict] += 1
        mutant = outcome.mutant
        print(f"{outcome.verdict:9} {outcome.seconds:5.1f} s  {mutant.file}: {mutant.breaks}", flush=True)
        if outcome.verdict is Verdict.EXPLAINED:
            print(f"          {mutant.survives}", flush=True)
        if outcome.verdict is Verdict.ERROR:
            print(outcome.output, flush=True)
    minutes = (time.monotonic() - started) / 60
    shown = ", ".join(f"{counts[verdict]} {verdict.lower()}" for verdict in Verdict)
    print(f"\n{len(mutants)} mutants at commit {git_commit_short()}: {shown}; {minutes:.0f} minutes")
    return 1 if counts[Verdict.SURVIVED] or counts[Verdict.ERROR] else 0


if __name__ == "__main__":
    sys.exit(main())
