"""``python -m alignkd.evaluate.gguf_server FOLDER THREADS``: llama.cpp with a GGUF export, until stdin ends.

A process of its own, so that nothing in llama.cpp (a failed assertion on a damaged file, a server that hangs
while it is closed) can take the program that asks with it. The first line on standard output is its address.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from alignkd.export.gguf_names import MMPROJ, TEXT


def main(folder: Path, threads: int) -> None:
    import xllamacpp

    # Ctrl-C is for the program that asks; when that ends, so does this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever llama.cpp prints is a message
    watcher = threading.Thread(target=_end_with_stdin)
    watcher.start()
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.mmproj.path = str(folder / TEXT), str(folder / MMPROJ)
    parameters.n_ctx = 0  # the model's own
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = threads
    parameters.warmup = False
    parameters.port, parameters.verbosity = 0, 1  # errors only
    server = xllamacpp.Server(parameters)
    os.write(answers, f"{server.listening_address}\n".encode())
    watcher.join()


def _end_with_stdin() -> None:
    """Also while a model is being loaded, and without closing the server."""
    os.read(0, 1)
    os._exit(0)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the watcher would keep it alive, and the program that asks would wait for an address
