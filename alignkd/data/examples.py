"""A checked sample -> what is collated: ids, labels and pixel values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alignkd.config.schema import DataSection, DataSource
from alignkd.data.batch import IGNORE_INDEX, Batch
from alignkd.data.collate import CollateSettings, Example, collate
from alignkd.data.images import BadImage, ImageProcessor
from alignkd.data.index import Index, checked_sample
from alignkd.data.json_list import JsonListFile
from alignkd.data.records import BadSample, Sample, parse_sample
from alignkd.data.templates import encode, encode_prompt
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import UserError


class ExampleReader:
    """Reads the samples of an index, one at a time, in any process."""

    def __init__(
        self, data: DataSection, index: Index, tokenizer: SentencePieceTokenizer, processor: ImageProcessor
    ) -> None:
        self._sources = data.sources
        self._files = [JsonListFile(source.file) for source in data.sources]
        self._index = index
        self._tokenizer = tokenizer
        self._processor = processor

    def __call__(self, number: int) -> Example:
        """Element ``number`` of the index; raises BadSample for an image that cannot be used."""
        index = self._index
        source = int(index.source[number])
        settings, file = self._sources[source], self._files[source]
        try:
            value = file.entry(int(index.start[number]), int(index.stop[number]))
            sample = checked_sample(value, settings, source, int(index.entry[number]))
        except UserError as error:  # it was fine when the index was built
            raise UserError(f"{error} (has the file changed since the run began?)") from error
        encoded = encode(sample.turns, settings.template, self._tokenizer)
        images = _read_images(sample, settings, self._processor)
        return Example(sample.id, encoded.ids, encoded.labels, images)


def read_samples(source: DataSource, number: int = 0, *, answered: bool = True) -> list[Sample]:
    """All samples of a (small) file; raises BadSample for the first bad one.

    ``answered=False`` also takes conversations that end with a question.
    """
    file = JsonListFile(source.file)
    return [
        parse_sample(file.entry(*byte_range), source.file, number, entry, answered=answered)
        for entry, byte_range in enumerate(file.ranges())
    ]


def collate_prompts(
    samples: Sequence[Sample],
    source: DataSource,
    tokenizer: SentencePieceTokenizer,
    processor: ImageProcessor,
    vision_tokens: int,
) -> Batch:
    """Questions to generate from, without labels; an answer at the end of a sample is left out.

    ``source`` says how the samples are rendered: template, image folder, padding. ``lengths_B`` says where
    each prompt ends.
    """
    examples = []
    for sample in samples:
        asked = sample.turns[:-1] if sample.turns[-1].speaker == "gpt" else sample.turns
        ids = encode_prompt(asked, source.template, tokenizer)
        images = _read_images(sample, source, processor)
        examples.append(Example(sample.id, ids, [IGNORE_INDEX] * len(ids), images))
    return collate(examples, CollateSettings(vision_tokens, processor.shape))


def _read_images(sample: Sample, source: DataSource, processor: ImageProcessor) -> tuple[torch.Tensor, ...]:
    if sample.images and source.image_folder is None:
        raise BadSample(source.file, sample.entry, sample.id, "has an image, but no image folder is set")
    try:
        return tuple(
            processor.read(str(source.image_folder), path, source.image_aspect_ratio)
            for path in sample.images
        )
    except BadImage as bad:
        raise BadSample(source.file, sample.entry, sample.id, bad.reason, bad.detail) from bad
