"""A small but real task that trains in minutes on a CPU and needs no download.

Images hold four real handwritten digits in a 2 x 2 grid; the questions can only be answered by looking.
"""

from alignkd.data.sample_task.write import write_sample_data

__all__ = ["write_sample_data"]
