"""What turns samples into tokens and pixels, one encoder for each kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from alignkd.config.schema import DataSource
from alignkd.data.collate import CollateSettings, Example, ExpandedExample
from alignkd.data.image_paths import BadImage
from alignkd.data.images import ImageProcessor
from alignkd.data.records import BadSample, Sample
from alignkd.data.templates import conversation_parts, embedded_lengths, encode, template_problem
from alignkd.data.token_counts import TokenCounter
from alignkd.data.tokenizer import SentencePieceTokenizer

IntArray = np.ndarray[Any, np.dtype[np.int64]]


class SampleEncoder(Protocol):
    """Created once per process; works on one source's samples at a time."""

    def fingerprint(self) -> dict[str, Any]:
        """What determines the encoding, beside data and configuration: JSON, equal on every machine."""
        ...

    def check(self, sample: Sample, source: DataSource) -> None:
        """Raises BadSample for a sample that cannot be encoded, as far as its text says so."""
        ...

    def length(self, samples: Sequence[Sample], source: DataSource) -> list[int | BadSample]:
        """Tokens of each sample, vision tokens included, or what is wrong with it. Reads no pixels."""
        ...

    def encode(self, sample: Sample, source: DataSource) -> Example | ExpandedExample:
        """Raises BadSample."""
        ...

    def collate_settings(self, **chosen: Any) -> CollateSettings:
        """How its examples are collated; ``chosen`` are settings that do not depend on the model."""
        ...


@dataclass
class MobileVLMEncoder:
    """The authors' templates and CLIP's preprocessing. ``processor`` is needed for pixels only."""

    tokenizer: SentencePieceTokenizer
    vision_tokens: int  # V of every image
    processor: ImageProcessor | None = None

    def __post_init__(self) -> None:
        self._counter: TokenCounter | None = None

    def fingerprint(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.fingerprint(), "vision_tokens": self.vision_tokens}

    def check(self, sample: Sample, source: DataSource) -> None:
        assert source.template != "chat", "refused before the run"
        problem = template_problem(sample.turns, source.template)
        if problem := problem or (sample.system and "a system message, and the template has its own"):
            raise BadSample(source.file, sample.entry, sample.id, "does not fit the template", problem)

    def length(self, samples: Sequence[Sample], source: DataSource) -> list[int | BadSample]:
        assert source.template != "chat", "refused before the run"
        self._counter = self._counter or TokenCounter(self.tokenizer)
        parts = [conversation_parts(sample.turns, source.template) for sample in samples]
        lengths: list[int | BadSample] = embedded_lengths(parts, self._counter, self.vision_tokens).tolist()
        return lengths

    def encode(self, sample: Sample, source: DataSource) -> Example:
        assert source.template != "chat", "refused before the run"
        encoded = encode(sample.turns, source.template, self.tokenizer)
        return Example(encoded.ids, encoded.labels, self._pixels(sample, source))

    def collate_settings(self, **chosen: Any) -> CollateSettings:
        assert self.processor is not None, "batches have pixels"
        return CollateSettings(self.vision_tokens, self.processor.shape, **chosen)

    def _pixels(self, sample: Sample, source: DataSource) -> tuple[torch.Tensor, ...]:
        assert self.processor is not None, "examples have pixels"
        try:
            return tuple(
                self.processor.read(str(source.image_folder), path, source.image_aspect_ratio)
                for path in sample.images
            )
        except BadImage as bad:
            raise BadSample(source.file, sample.entry, sample.id, bad.reason, bad.detail) from bad
