"""Samples through a model's own processor: chat template, tokenizer and image processor of its folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from alignkd.config.schema import DataSource
from alignkd.data.batch import IGNORE_INDEX, PADDING_ID
from alignkd.data.chat import Message, Rendered, TemplateError, messages_of, render_supervised, shifted
from alignkd.data.collate import UNSUPERVISED_BOS_ID, CollateSettings, ExpandedExample
from alignkd.data.image_paths import BadImage, resolve_below
from alignkd.data.images import decode_image, image_size
from alignkd.data.records import IMAGE_MARKER, BadSample, Sample, Turn
from alignkd.data.tower_inputs import joined_inputs
from alignkd.errors import UserError

# Of a processor's answer; everything else goes to the vision tower.
TEXT_KEYS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "offset_mapping",
    "text_replacement_offsets",
    "num_soft_tokens_per_image",
)
KEPT_REPLACEMENTS = 4096  # of sizes of images; a data set may have millions of them
DUMMY_SIDE = 64  # pixels
GREY = (90, 120, 150)  # not what any processor normalises to zero


@dataclass(frozen=True)
class _Processed:
    ids: list[int]
    offsets: list[tuple[int, int]]  # characters of each token in the expanded text
    replaced: list[tuple[tuple[int, int], tuple[int, int]]]  # of each image: placeholder, what replaced it
    replacements: list[str]
    inputs: dict[str, torch.Tensor]


class Prompted(NamedTuple):
    """A prompt as the processor encodes it."""

    ids: list[int]
    inputs: dict[str, torch.Tensor]  # of the tower


class ChatEncoder:
    def __init__(
        self, folder: Path, processor: Any, image_token_id: int, max_image_pixels: int, *, by_row: bool
    ) -> None:
        """``by_row``: the processor's tensors have a first dimension for rows of the batch."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked
        self.folder = folder
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._image_token_id = image_token_id
        self._max_image_pixels = max_image_pixels
        self._by_row = by_row
        self._special = sorted(
            {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
            | {processor.image_token}
        )
        self._replacements: dict[tuple[str, tuple[tuple[int, int], ...]], list[str]] = {}
        if image_token_id in (PADDING_ID, UNSUPERVISED_BOS_ID):
            raise UserError(f"{folder}: the image token has id {image_token_id}, which also fills up batches")

    def fingerprint(self) -> dict[str, Any]:
        """Of what the processor does with a text, an image and both, and of the tokenizer."""
        shown = self._process(self._processor.image_token + " a", [_blank((80, 48))], {})
        digest = hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode())
        digest.update(str(self._processor.chat_template).encode())
        digest.update(str((self._image_token_id, shown.ids, shown.replacements)).encode())
        for name, value in sorted(shown.inputs.items()):
            digest.update(f"{name} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        return {"processor": digest.hexdigest()}

    def check(self, sample: Sample, source: DataSource) -> None:
        for number, (speaker, text) in enumerate([("gpt", sample.system), *sample.turns], start=-1):
            written = text.replace(IMAGE_MARKER, "") if speaker == "human" else text
            found = self._special_in(written)
            if found is not None:
                # The processor would take it for the real one: an image, or the end of a turn.
                where = f"turn {number}" if number >= 0 else "the system message"
                detail = f"{where} contains {found!r:.80}"
                raise BadSample(source.file, sample.entry, sample.id, "special token in text", detail)

    def length(self, samples: Sequence[Sample], source: DataSource) -> list[int | BadSample]:
        found: list[int | BadSample] = []
        for sample in samples:
            try:
                sizes = tuple(self._size(sample, path, source) for path in sample.images)
            except BadSample as bad:
                found.append(bad)
                continue
            first, *parts = self.rendered(sample).text.split(self._processor.image_token)
            replaced = zip(self._replacements_of(sizes, source), parts, strict=True)
            text = first + "".join(replacement + part for replacement, part in replaced)
            found.append(len(self._tokenizer(text, **self._special_tokens(text))["input_ids"]))
        return found

    def encode(self, sample: Sample, source: DataSource) -> ExpandedExample:
        return self.encode_images(sample, self.images(sample, source), source)

    def images(self, sample: Sample, source: DataSource) -> list[Image.Image]:
        """Raises BadSample."""
        return [self._image(sample, path, source) for path in sample.images]

    def encode_images(self, sample: Sample, images: list[Image.Image], source: DataSource) -> ExpandedExample:
        """:meth:`encode` with images that are read already."""
        rendered = self.rendered(sample)
        shown = self._process(rendered.text, images, source.image_options)
        ids = np.array(shown.ids, dtype=np.int64)
        starts, stops = np.array(shown.offsets, dtype=np.int64).T
        labels = np.full_like(ids, IGNORE_INDEX)
        for start, stop in rendered.answers:
            inside = (starts >= shifted(start, shown.replaced)) & (stops <= shifted(stop, shown.replaced))
            labels[inside] = ids[inside]
        is_text = np.ones(len(ids), dtype=np.bool_)
        columns = []
        for _, (start, stop) in shown.replaced:
            # What the tokenizer adds has no characters.
            inside = (starts >= start) & (stops <= stop) & (stops > starts)
            columns.append(np.flatnonzero(inside & (ids == self._image_token_id)))
            is_text &= ~inside
        return ExpandedExample(ids.tolist(), labels.tolist(), tuple(columns), is_text, shown.inputs)

    def prompt(
        self, turns: Sequence[Turn], images: Sequence[Image.Image], options: dict[str, Any]
    ) -> Prompted:
        """A conversation that the model is to answer; its turns hold one marker per image. ``options`` are
        the image processor's, as of a source. Raises UserError for a special token in a text."""
        for _, text in turns:
            found = self._special_in(text.replace(IMAGE_MARKER, ""))
            if found is not None:
                raise UserError(f"the text contains {found!r:.80}, a special token of {self.folder}")
        text = self._render(messages_of(turns), True)
        shown = self._process(text, list(images), options)
        return Prompted(shown.ids, shown.inputs)

    def end_token_id(self) -> int:
        """Of the special token that the chat template ends an answer with."""
        messages = messages_of((Turn("human", "a"), Turn("gpt", "a")))
        start, stop = self._supervised(messages).answers[0]
        answer = self._supervised(messages).text[start:stop]
        return int(self._tokenizer(answer, add_special_tokens=False)["input_ids"][-1])

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def collate_settings(self, **chosen: Any) -> CollateSettings:
        inputs = self._process(self._processor.image_token, [_blank((DUMMY_SIDE, DUMMY_SIDE))], {}).inputs
        if self._by_row:
            inputs = {name: value[:1] for name, value in inputs.items()}  # one tile is enough
        return CollateSettings(0, (0, 0, 0), dummy=inputs, **chosen)

    def rendered(self, sample: Sample) -> Rendered:
        """The sample in the chat template, an image token for each image."""
        return self._supervised(messages_of(sample.turns, sample.system))

    def _supervised(self, messages: list[Message]) -> Rendered:
        try:
            return render_supervised(messages, self._render, self._special)
        except TemplateError as error:
            raise UserError(f"{self.folder}: {error}") from error

    def _render(self, messages: list[Message], prompt: bool) -> str:
        text = self._tokenizer.apply_chat_template(
            messages,
            chat_template=self._processor.chat_template,  # not the tokenizer's own
            tokenize=False,
            add_generation_prompt=prompt,
        )
        return str(text)

    def _special_in(self, text: str) -> str | None:
        return next((token for token in self._special if token in text), None)

    def _process(self, text: str, images: list[Image.Image], options: dict[str, Any]) -> _Processed:
        answer = self._processor(
            text=[text],
            images=[images] if images else None,
            return_text_replacement_offsets=True,
            return_offsets_mapping=True,
            **self._special_tokens(text),
            **options,
        )
        spans = answer["text_replacement_offsets"][0] if images else []
        tensors = {key: _tensor(value) for key, value in answer.items() if key not in TEXT_KEYS}
        return _Processed(
            ids=list(answer["input_ids"][0]),
            offsets=[(int(start), int(stop)) for start, stop in answer["offset_mapping"][0]],
            replaced=[(tuple(one["span"]), tuple(one["new_span"])) for one in spans],
            replacements=[one["replacement"] for one in spans],
            inputs={name: value[0] for name, value in tensors.items()} if self._by_row else tensors,
        )

    def _special_tokens(self, text: str) -> dict[str, bool]:
        """Whether the tokenizer adds its first token: not when the template has written it."""
        first = self._tokenizer.bos_token
        return {"add_special_tokens": not (first and text.startswith(first))}

    def _replacements_of(self, sizes: tuple[tuple[int, int], ...], source: DataSource) -> list[str]:
        """What images of these sizes become in a text: it depends on nothing else."""
        if not sizes:
            return []
        key = (str(sorted(source.image_options.items())), sizes)
        if key not in self._replacements:
            text = self._processor.image_token * len(sizes)
            images = [_blank(size) for size in sizes]
            if len(self._replacements) >= KEPT_REPLACEMENTS:
                del self._replacements[next(iter(self._replacements))]  # the oldest
            self._replacements[key] = self._process(text, images, source.image_options).replacements
        return self._replacements[key]

    def _image(self, sample: Sample, path: str, source: DataSource) -> Image.Image:
        try:
            file = resolve_below(str(source.image_folder), path)
            return decode_image(file, path, self._max_image_pixels)
        except BadImage as bad:
            raise BadSample(source.file, sample.entry, sample.id, bad.reason, bad.detail) from bad

    def _size(self, sample: Sample, path: str, source: DataSource) -> tuple[int, int]:
        try:
            return image_size(resolve_below(str(source.image_folder), path), path, self._max_image_pixels)
        except BadImage as bad:
            raise BadSample(source.file, sample.entry, sample.id, bad.reason, bad.detail) from bad


def _blank(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, GREY)


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    parts = [torch.from_numpy(np.asarray(one))[None] for one in value]
    return joined_inputs([{"value": part} for part in parts])["value"]
