"""What the adapters use of lmms-eval and VLMEvalKit, for where these are not installed.

Names and signatures are those of lmms-eval 0.7.3 on PyPI (the same in EvolvingLMMs-Lab/lmms-eval at
75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3) and of open-compass/VLMEvalKit at
e8e78f05f3080fe28154f2130321f17951c3be94, as read on 2026-11-27.
"""

from __future__ import annotations

import abc
import importlib.util
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


class lmms(abc.ABC):
    """`lmms_eval.api.model.lmms`"""

    is_simple = True

    def __init__(self) -> None:
        self._rank = 0
        self._world_size = 1
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        given = dict(item.split("=", 1) for item in arg_string.split(",") if item)
        return cls(
            **given, **{key: value for key, value in (additional_config or {}).items() if value is not None}
        )

    def clean(self) -> None:  # noqa: B027  # the real one deletes modules and empties CUDA's cache
        pass


@dataclass
class Instance:
    """`lmms_eval.api.instance.Instance`"""

    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.task_name = self.metadata["task"]
        self.doc_id, self.repeats = self.metadata["doc_id"], self.metadata["repeats"]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    """`lmms_eval.models.registry_v2.ModelManifest`"""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class BaseModel:
    """`vlmeval.vlm.base.BaseModel`; its `generate` and `chat` take texts and paths in several forms, of which
    a list of dicts is the one that data sets build."""

    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def __init__(self) -> None:
        self.dump_image_func = None

    def use_custom_prompt(self, dataset: str) -> bool:
        return False

    def generate(self, message: list[dict[str, Any]], dataset: str | None = None) -> Any:
        for item in message:
            assert item["type"] in self.allowed_types, f"Invalid input type: {item['type']}"
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]

    def chat(self, messages: list[dict[str, Any]], dataset: str | None = None) -> Any:
        return self.chat_inner(messages, dataset=dataset)  # type: ignore[attr-defined]


def install() -> None:
    """Make `lmms_eval` and `vlmeval` importable, where they are not installed."""
    modules = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.instance": {"Instance": Instance},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "vlmeval": {},
        "vlmeval.vlm": {},
        "vlmeval.vlm.base": {"BaseModel": BaseModel},
    }
    for package in ("lmms_eval", "vlmeval"):
        if package in sys.modules or importlib.util.find_spec(package) is not None:
            continue
        for name, contents in modules.items():
            if name.split(".")[0] == package:
                module = ModuleType(name)
                module.__dict__.update(contents)
                sys.modules[name] = module
