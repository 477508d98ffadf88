"""``python -m alignkd.evaluate OUT``: one rank of an evaluation, whose options lie in OUT/evaluation.json.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from the environment; without them, this
process is the only one. Rank 0 scores the answers and prints the result.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path

from alignkd.folder_program import run_on_folder
from alignkd.garbage import paused_collector


def main(arguments: list[str]) -> int:
    return run_on_folder("alignkd.evaluate OUT", arguments, _run)


def _run(out: Path) -> int:
    from rich.console import Console

    from alignkd.evaluate.options import read_options

    options = read_options(out)
    options.check()
    with redirect_stdout(sys.stderr):  # DeepSpeed greets on standard output, which is for the result
        with paused_collector():
            from alignkd.evaluate.program import answer_all

        ranks = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from alignkd.distributed.ranks import start_ranks

            ranks = start_ranks(timeout=timedelta(days=2))  # the slowest rank is waited for
        elif "LOCAL_RANK" in os.environ:  # by a launcher, which may insist on a GPU
            from deepspeed.accelerator import get_accelerator

            from alignkd.distributed.device import take_device

            take_device(get_accelerator())
        answer_all(options, ranks)
    if ranks is not None and not ranks.is_first:
        return 0
    from alignkd.evaluate.program import score_all
    from alignkd.evaluate.report import print_report, report_json
    from alignkd.run_folder.atomic_files import write_json

    scores = score_all(options)
    report = report_json(scores, options.limit)
    write_json(out / "scores.json", report)
    if options.as_json:
        print(json.dumps(report))
    else:
        print_report(scores, Console(), categories=options.categories, limit=options.limit)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
