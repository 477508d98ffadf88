"""``alignkd eval MODEL ...``: check the request, then run the ranks that answer and score."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

from alignkd.evaluate.options import EvalOptions, write_options
from alignkd.evaluate.scoring import check_data
from launcher.commands.local_ranks import rank_variables, run_ranks


def evaluation_command(out: Path | str) -> list[str]:
    """One rank of an evaluation; it reads the options in ``out`` and its rank from the environment."""
    return [sys.executable, "-m", "alignkd.evaluate", str(out)]


def absolute(options: EvalOptions) -> EvalOptions:
    """The same with absolute paths, for ranks that start in another folder."""
    own = options.own
    if own is not None and own.image_folder is not None:
        own = replace(own, image_folder=os.path.abspath(own.image_folder))
    return replace(
        options,
        models=tuple(replace(model, folder=os.path.abspath(model.folder)) for model in options.models),
        data=os.path.abspath(options.data),
        out=os.path.abspath(options.out),
        own=own,
    )


def run_evaluation(options: EvalOptions, ranks: int, device: Literal["auto", "cpu"]) -> int:
    """Run an evaluation on this machine, and return its exit code. Rank 0 prints the result.

    Raises UserError for a wrong request, before any model is loaded.
    """
    options.check()
    check_data(options.chosen_tasks(), Path(options.data))
    environments = rank_variables(ranks, device, "--device cpu")
    write_options(absolute(options))
    failed = run_ranks(evaluation_command(options.out), environments, Path(options.out) / "logs")
    if failed is None:
        return 0
    if options.as_json:
        print(json.dumps({"error": failed.message, "code": failed.code}))
    return failed.code
