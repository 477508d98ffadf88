"""A real llama.cpp (the ``xllamacpp`` wheel), in this process: log-probabilities of the next token."""

from __future__ import annotations

import base64
import json
import math
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    def __init__(self, folder: Path, context: int = 2048) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(folder / "text.gguf")
        parameters.mmproj.path = str(folder / "mmproj.gguf")
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = 1
        parameters.warmup = False
        parameters.port = 0
        self.server = xllamacpp.Server(parameters)
        self.properties = self._ask("props")

    @property
    def marker(self) -> str:
        return str(self.properties["media_marker"])

    def next_token(self, prompt: str, images: Sequence[Path], vocab_size: int) -> tuple[list[float], int]:
        """(log-probability of each id, number of prompt tokens); ``<image>`` in ``prompt`` is an image."""
        request: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": vocab_size,
            "temperature": -1.0,
            "cache_prompt": False,
            # Probabilities are those before sampling, but come only with a token that is text by itself: not
            # with an end, or with one byte of a longer character.
            "logit_bias": [["d", 1000.0]],
        }
        if images:
            request["prompt"] = {
                "prompt_string": prompt.replace("<image>", self.marker),
                "multimodal_data": [base64.b64encode(path.read_bytes()).decode() for path in images],
            }
        result = self._ask("completion", request)
        values = [-math.inf] * vocab_size
        for entry in result["completion_probabilities"][0]["top_logprobs"]:
            values[entry["id"]] = entry["logprob"]
        return values, int(result["tokens_evaluated"])

    def chat(self, messages: list[dict[str, Any]], max_tokens: int) -> str:
        """The greedy answer to messages, through the chat template of the file."""
        request = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0}
        return str(self._ask("v1/chat/completions", request)["choices"][0]["message"]["content"])

    def prompt_of(self, messages: list[dict[str, Any]]) -> str:
        """The text that the file's chat template makes of messages."""
        return str(self._ask("apply-template", {"messages": messages})["prompt"])

    def _ask(self, path: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if request is None else json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        url = f"{self.server.listening_address}/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as reply:
            result: dict[str, Any] = json.load(reply)
        return result
