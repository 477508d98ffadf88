"""A folder's processor without what only videos and sound need: torchvision, and for SmolVLM num2words.

transformers' video processors want torchvision, whose wheels must match torch's build. Images go through
Pillow, whatever is installed: the other back end's pixels differ.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging

from alignkd.errors import CheckpointError

if not sys.stderr.isatty():
    logging.disable_progress_bar()  # a log keeps every state of one

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
LEFT_OUT = ("video_processor", "feature_extractor")  # the latter is for sound


def read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers cannot read its config.json: {error}") from error


def read_processor(folder: Path) -> Any:
    """Raises CheckpointError when the folder has no usable processor or no chat template."""
    try:
        processor = _build(folder)
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load its processor: {error}") from error
    if not getattr(processor, "chat_template", None):
        raise CheckpointError(f"{folder}: has no chat template (chat_template.jinja)")
    return processor


def _build(folder: Path) -> Any:
    known = images_only(PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder, **LOCAL))])
    parts = [
        AutoImageProcessor.from_pretrained(folder, backend="pil", **LOCAL),
        AutoTokenizer.from_pretrained(folder, **LOCAL),
    ]
    settings, unused = known.get_processor_dict(folder, **LOCAL)
    return known.from_args_and_dict(parts, settings, **unused)


@functools.cache  # one class for each, also in another process
def images_only(processor_class: Any) -> Any:
    """The class, without the parts for videos and sound if it has them."""
    given = processor_class.get_attributes()
    if not set(LEFT_OUT) & set(given):
        return processor_class
    module = sys.modules[processor_class.__module__]
    if getattr(module, "num2words", "") is None:
        module.num2words = _no_videos  # type: ignore[attr-defined]  # its __init__ asks for the package

    class ImagesOnly(processor_class, _WithoutLeftOut):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in given if name not in LEFT_OUT]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: Any, **kwargs: Any) -> Any:
            settings = {name: value for name, value in processor_dict.items() if name not in LEFT_OUT}
            parts = iter(args)  # in the order of the constructor
            every = [None if name in LEFT_OUT else next(parts) for name in given]
            return super().from_args_and_dict(every, settings, **kwargs)

        def __reduce__(self) -> tuple[Any, ...]:
            """A data loader's worker gets its processor as a pickle, which finds no class in a function."""
            return _new_images_only, (processor_class,), self.__dict__

    ImagesOnly.__name__ = processor_class.__name__  # which is saved with it
    return ImagesOnly


def _new_images_only(processor_class: Any) -> Any:
    made = images_only(processor_class)
    return made.__new__(made)


class _WithoutLeftOut(ProcessorMixin):  # type: ignore[misc]
    """Between a processor's class and its base, which takes no argument for a part that it does not have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{key: value for key, value in kwargs.items() if key not in LEFT_OUT})


def _no_videos(*_: object) -> str:
    raise ValueError("videos are not supported")
