"""``python -m alignkd.engine.operators``: compile what DeepSpeed compiles at its first start on the CPU.

The launcher runs it once before the ranks start, which would all build at the same time.
"""

from __future__ import annotations


def build_operators() -> None:
    """Compile and load the shared-memory communication operator; nothing to do on a GPU."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm.torch import build_shm_op

    if get_accelerator().device_name() == "cpu":
        build_shm_op()


if __name__ == "__main__":
    build_operators()
