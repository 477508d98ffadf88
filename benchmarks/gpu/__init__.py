"""The first minutes on a GPU: ``python -m benchmarks.gpu`` measures in one go what a CPU cannot tell.

Each part (``parts.PARTS``) is a module with one function ``measure(sizes)`` that yields rows, and runs in a
process of its own. With ``--tiny`` all of it runs on a CPU.
"""
