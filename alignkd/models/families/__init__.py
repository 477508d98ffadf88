"""Families of vision-language models behind one interface (``interface``): MobileVLM, and those that
transformers implements."""

import sys

from transformers.utils import logging

if not sys.stderr.isatty():  # a log keeps every state of a progress bar
    logging.disable_progress_bar()
