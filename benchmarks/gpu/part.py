"""One part, in its own process: ``python -m benchmarks.gpu.part NAME [--tiny] FILE``.

Every row is written to FILE when it is known, as a line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.sizes import full_sizes, tiny_sizes


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.part", description=__doc__)
    parser.add_argument("name", choices=[part.name for part in PARTS])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    part = importlib.import_module(f"benchmarks.gpu.{options.name}")
    with options.file.open("w", encoding="utf-8") as file:
        for row in part.measure(tiny_sizes() if options.tiny else full_sizes()):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
