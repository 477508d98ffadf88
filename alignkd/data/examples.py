"""Reads a sample of the index: ids, labels and pixel values, ready to be collated."""

from __future__ import annotations

import torch

from alignkd.config.schema import DataSection, DataSource
from alignkd.data.collate import Example
from alignkd.data.images import BadImage, ImageProcessor
from alignkd.data.index import Index
from alignkd.data.index_parts import checked_sample
from alignkd.data.json_list import JsonListFile
from alignkd.data.records import BadSample, Sample
from alignkd.data.templates import encode
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import UserError, raise_if_passing


class ExampleReader:
    """Reads one sample at a time; can be sent to loader workers."""

    def __init__(
        self, data: DataSection, index: Index, tokenizer: SentencePieceTokenizer, processor: ImageProcessor
    ) -> None:
        self._sources = data.sources
        self._files = [JsonListFile(source.file) for source in data.sources]
        self._index = index
        self._tokenizer = tokenizer
        self._processor = processor

    def __call__(self, number: int) -> Example:
        """Element ``number`` of the index; raises BadSample for an unusable image."""
        index = self._index
        source = int(index.source[number])
        settings, file = self._sources[source], self._files[source]
        try:
            value = file.entry(int(index.start[number]), int(index.stop[number]))
            sample = checked_sample(value, settings, source, int(index.entry[number]))
        except OSError as error:
            raise_if_passing(error, settings.file)
            raise
        except UserError as error:  # it was valid when the index was built
            raise UserError(f"{error} (has the file changed since the run began?)") from error
        encoded = encode(sample.turns, settings.template, self._tokenizer)
        images = _read_images(sample, settings, self._processor)
        return Example(encoded.ids, encoded.labels, images)


def _read_images(sample: Sample, source: DataSource, processor: ImageProcessor) -> tuple[torch.Tensor, ...]:
    try:
        return tuple(
            processor.read(str(source.image_folder), path, source.image_aspect_ratio)
            for path in sample.images
        )
    except BadImage as bad:
        raise BadSample(source.file, sample.entry, sample.id, bad.reason, bad.detail) from bad
