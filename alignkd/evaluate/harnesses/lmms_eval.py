"""``lmms-eval --model alignkd --model_args folder=FOLDER``: models of alignkd in lmms-eval.

lmms-eval finds :func:`manifest` through the entry point `lmms_eval.models` of pyproject.toml. It builds the
prompts, opens the images and scores; this adapter only answers. Written for lmms-eval 0.7.3, whose interface
is ``lmms_eval.api.model.lmms`` ("simple" models: a text, and the images of ``doc_to_visual``).
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

import alignkd
from alignkd.data.records import IMAGE_MARKER, Turn
from alignkd.errors import UserError
from alignkd.evaluate.answering_model import Request
from alignkd.evaluate.generation import Decoding

LONGEST_ANSWER = 1024  # where a task names none, as in lmms-eval's own LLaVA


def manifest() -> Any:
    """What lmms-eval registers."""
    return ModelManifest(model_id="alignkd", simple_class_path=f"{__name__}.{AlignKD.__name__}")


class AlignKD(lmms):  # type: ignore[misc]
    """An export, a run or a published folder; arguments as of :func:`alignkd.load`."""

    def __init__(
        self,
        folder: str,
        step: int | None = None,
        precision: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # always passed where given; it only matters to `auto`
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size!r:.80} must be a number above 0")
        self.batch_size = int(batch_size)
        self.model = alignkd.load(folder, step=step, device=device, precision=precision)
        # lmms-eval counts the requests of all ranks on this device, even after `clean`.
        self.device: torch.device = self.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request. Those with the same decoding are answered in batches."""
        batches: dict[Decoding, list[tuple[int, int]]] = {}  # -> numbers of requests and their seeds
        asked: Counter[str] = Counter()
        for number, request in enumerate(requests):
            _, settings, _, doc_id, task, _ = request.args
            name = f"{task} {doc_id}"
            seed = zlib.crc32(f"{name} {asked[name]}".encode())  # the repeats of a question must differ
            asked[name] += 1
            batches.setdefault(_decoding(settings, task), []).append((number, seed))
        answers = [""] * len(requests)
        for decoding, members in batches.items():
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                asks = [self._request(requests[number].args, seed) for number, seed in batch]
                for (number, _), answer in zip(batch, self.model.answers(asks, decoding), strict=True):
                    answers[number] = answer
        return answers

    def _request(self, arguments: tuple[Any, ...], seed: int) -> Request:
        context, _, doc_to_visual, doc_id, task, split = arguments
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise UserError(f"task {task}: found a {type(visual).__name__}; only images can be shown")
        images = tuple(self.model.request(visual, "").images[0] for visual in visuals)
        if context.count(IMAGE_MARKER) != len(images):  # the task has not said where images belong
            text = context.replace(IMAGE_MARKER, "")
            context = f"{' '.join([IMAGE_MARKER] * len(images))}\n{text}" if images else text
        return Request((Turn("human", context),), images, seed)

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        _refuse("loglikelihood", requests)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        _refuse("generate_until_multi_round", requests)

    def clean(self) -> None:
        """Free the weights, for a judge that may run on the same device."""
        del self.model
        super().clean()


def _refuse(kind: str, requests: Sequence[Any]) -> NoReturn:
    tasks = sorted({str(request.task_name) for request in requests})
    raise UserError(
        f"{', '.join(tasks)}: alignkd answers tasks whose output_type is generate_until, not {kind}"
    )


def _decoding(settings: dict[str, Any], task: str) -> Decoding:
    """A task's ``generation_kwargs``. Those without a meaning here (``image_aspect_ratio``) are ignored."""
    if (settings.get("num_beams") or 1) != 1:
        raise UserError(f"task {task}: num_beams is {settings['num_beams']}; alignkd has no beam search")
    temperature, top_p = settings.get("temperature"), settings.get("top_p")
    if temperature is None:
        temperature = 1.0 if settings.get("do_sample") else 0.0  # as in transformers
    if settings.get("do_sample") is False or top_p == 0:
        temperature = 0.0
    if temperature == 0 or top_p is None:
        top_p = 1.0
    until = settings.get("until") or []
    stop = [until] if isinstance(until, str) else until
    longest = settings.get("max_new_tokens") or LONGEST_ANSWER
    return Decoding(int(longest), float(temperature), float(top_p), tuple(text for text in stop if text))
