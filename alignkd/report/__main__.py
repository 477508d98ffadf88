"""``python -m alignkd.report RUN OUT --samples N --device NAME``: the attention maps of a run, as JSON."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from alignkd.errors import AlignkdError, report_error


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m alignkd.report")
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    given = parser.parse_args(arguments)
    try:
        with redirect_stdout(sys.stderr):  # DeepSpeed greets on standard output
            from alignkd.report.attention_maps import attention_maps
            from alignkd.run_folder.atomic_files import write_json

            write_json(given.out, attention_maps(given.run, given.samples, given.device))
    except AlignkdError as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
