"""A conversation about one image, for a quick look at a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from alignkd.data.records import IMAGE_MARKER, Turn
from alignkd.evaluate.answering_model import AnsweringModel, Request
from alignkd.evaluate.generation import Decoding
from alignkd.evaluate.tasks.pictures import PictureFile


def chat(model: AnsweringModel, image: Path, decoding: Decoding) -> None:
    """Answer every line of standard input. Earlier lines are part of the conversation; an empty line starts
    a new one. Raises UserError for an unusable image."""
    pixels = model.prepare(PictureFile(image.parent, image.name))
    turns: tuple[Turn, ...] = ()
    for line in _lines():
        if not line:
            turns = ()
            continue
        question = line.replace(IMAGE_MARKER, "")
        turns = (*turns, Turn("human", question if turns else f"{IMAGE_MARKER}\n{question}"))
        (answer,) = model.answers([Request(turns, (pixels,), seed=len(turns))], decoding)
        print(answer, flush=True)
        turns = (*turns, Turn("gpt", answer))


def _lines() -> Iterator[str]:
    """Lines of standard input without surrounding white space; a person sees a prompt."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401  # gives `input` a history and the arrow keys

    try:
        while True:
            yield input("> ").strip()
    except EOFError:
        print()
