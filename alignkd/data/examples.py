"""Reads a sample of the index: ids, labels and pixel values, ready to be collated."""

from __future__ import annotations

from alignkd.config.schema import DataSection
from alignkd.data.collate import Example, ExpandedExample
from alignkd.data.encoder import SampleEncoder
from alignkd.data.index import Index
from alignkd.data.index_parts import checked_sample
from alignkd.data.json_list import JsonListFile
from alignkd.errors import UserError, raise_if_passing


class ExampleReader:
    """Reads one sample at a time; can be sent to loader workers."""

    def __init__(self, data: DataSection, index: Index, encoder: SampleEncoder) -> None:
        self._sources = data.sources
        self._files = [JsonListFile(source.file) for source in data.sources]
        self._index = index
        self._encoder = encoder

    def __call__(self, number: int) -> Example | ExpandedExample:
        """Element ``number`` of the index; raises BadSample for an unusable image."""
        index = self._index
        source = int(index.source[number])
        settings, file = self._sources[source], self._files[source]
        try:
            value = file.entry(int(index.start[number]), int(index.stop[number]))
            sample = checked_sample(value, settings, source, int(index.entry[number]), self._encoder)
        except OSError as error:
            raise_if_passing(error, settings.file)
            raise
        except UserError as error:  # it was valid when the index was built
            raise UserError(f"{error} (has the file changed since the run began?)") from error
        return self._encoder.encode(sample, settings)
