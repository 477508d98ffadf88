"""LLaMA's sentencepiece tokenizer, applied to one chunk of text at a time.

The authors tokenise with transformers' slow ``LlamaTokenizer`` in its *legacy* mode: text is split at
special tokens, and every chunk is encoded separately, with its own leading-space piece. Calling
sentencepiece for each chunk gives the same ids, whatever the version of transformers. Imports neither torch
nor transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from alignkd.errors import UserError, raise_if_passing

MODEL_FILE = "tokenizer.model"


class PieceKind(IntEnum):
    """Numbered as in sentencepiece's ``ModelProto.SentencePiece.Type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """One entry of the vocabulary; ``score``: its log-probability."""

    text: str
    score: float
    kind: PieceKind


class SentencePieceTokenizer:
    """Converts text to ids and back. Ordinary text never becomes a special id.

    A literal ``</s>``, ``<s>`` or ``<unk>`` in a text is encoded character by character: only templates
    insert special ids. (The authors' tokenizer would turn such text into the special token.)
    """

    def __init__(self, model: bytes, where: str) -> None:
        """``model``: the bytes of a ``tokenizer.model``; ``where``: its name in error messages."""
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{where}: not a sentencepiece model ({error})") from error
        for name, token_id in (("<s>", self.bos_id), ("</s>", self.eos_id), ("<unk>", self.unk_id)):
            if token_id < 0:
                raise UserError(f"{where}: has no {name} token; a LLaMA tokenizer needs <unk>, <s> and </s>")

    @classmethod
    def from_folder(cls, folder: str | Path) -> SentencePieceTokenizer:
        """Read ``tokenizer.model`` from a model folder."""
        path = Path(folder) / MODEL_FILE
        try:
            model = path.read_bytes()
        except OSError as error:
            raise_if_passing(error, path)
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); every model folder needs one"
            ) from error
        return cls(model, str(path))

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[bytes, str]]:
        return type(self), (self.model, MODEL_FILE)

    def __len__(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def bos_id(self) -> int:
        return int(self._processor.bos_id())

    @property
    def eos_id(self) -> int:
        return int(self._processor.eos_id())

    @property
    def unk_id(self) -> int:
        return int(self._processor.unk_id())

    def encode(self, text: str) -> list[int]:
        """The ids of one chunk of text, without ``<s>``; none for an empty chunk."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many chunks."""
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=1)  # the default is all cores
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special ids and those outside the vocabulary (such as an image's)."""
        special = {self.bos_id, self.eos_id, self.unk_id}
        known = [int(i) for i in ids if 0 <= int(i) < len(self) and int(i) not in special]
        text: str = self._processor.decode(known)
        return text

    def pieces(self) -> list[Piece]:
        """The vocabulary, by id."""
        model = self._processor
        kinds = (
            (PieceKind.UNKNOWN, model.is_unknown),
            (PieceKind.CONTROL, model.is_control),
            (PieceKind.UNUSED, model.is_unused),
            (PieceKind.BYTE, model.is_byte),
        )
        return [
            Piece(
                str(model.id_to_piece(i)),
                float(model.get_score(i)),
                next((kind for kind, holds in kinds if holds(i)), PieceKind.NORMAL),
            )
            for i in range(len(self))
        ]

    def fingerprint(self) -> str:
        """sha256 of the model file; it must be equal for teacher and student."""
        return hashlib.sha256(self.model).hexdigest()
