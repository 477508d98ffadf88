"""An ``alignkd export --format gguf`` that answers, by llama.cpp (the wheel ``xllamacpp``).

What comes out is what a phone would answer: pictures are resized by llama.cpp's own code, and the prompt is
template ``v1``, as in the chat template of the file. Requests are answered one at a time, on the CPU.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image

from alignkd.data.templates import Mark, Part, conversation_parts
from alignkd.errors import UserError
from alignkd.evaluate import gguf_server
from alignkd.evaluate.answering_model import AnsweringModel, Padding, Request
from alignkd.evaluate.generation import Decoding
from alignkd.evaluate.gguf_limits import refuse_choices, require_llama_cpp
from alignkd.export.gguf_names import MMPROJ, TEXT

_ANSWER_SECONDS = 3600.0  # a 3B model on an old CPU takes minutes
_ENDING_SECONDS = 10.0  # from a closed connection to an ended process
_HERE = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for this machine


class GgufModel(AnsweringModel):
    """Images of a request are PNG files in base64."""

    precision = "gguf"  # that of the file
    in_batches: ClassVar[bool] = False

    def __init__(self, folder: Path) -> None:
        """Raises UserError without the wheel, and for files that llama.cpp does not load."""
        require_llama_cpp(folder)
        self._folder = folder
        program = [sys.executable, "-m", gguf_server.__name__, str(folder), str(torch.get_num_threads())]
        # A pipe that nobody reads would fill up.
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the model
        # It ends when its input does: with this object, or with this process, however that dies.
        self._server = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True
        )
        assert self._server.stdout is not None
        self._address = self._server.stdout.readline().strip()
        if not self._address:
            raise UserError(f"{folder}: llama.cpp does not load it ({self._reason()})")
        self._marker = str(self._ask("props")["media_marker"])  # a random one

    def close(self) -> None:
        """End llama.cpp: a later question is a UserError."""
        with self._server:  # waits for it, and closes the pipes
            self._server.kill()
        self._messages.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never started
            self.close()

    def _reason(self) -> str | None:
        """Why llama.cpp has ended, if it has: the first error among its messages, else its exit code
        and the last message."""
        try:
            code = self._server.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        self._messages.seek(0)
        lines = [line for line in self._messages.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line.partition(" E ")[2] for line in lines if " E " in line]
        return errors[0] if errors else ": ".join([f"it ended with exit code {code}", *lines[-1:]])

    def answers(self, requests: Sequence[Request], decoding: Decoding = Decoding()) -> list[str]:  # noqa: B008
        return [self._answer(request, decoding) for request in requests]

    def _answer(self, request: Request, decoding: Decoding) -> str:
        prompt: Any = "".join(map(self._text, conversation_parts(request.turns, "v1")))
        if request.images:
            prompt = {"prompt_string": prompt, "multimodal_data": list(request.images)}
        asked = {
            "prompt": prompt,
            "n_predict": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": 0,  # these two are on by default
            "min_p": 0.0,
            "seed": request.seed,
            "stop": list(decoding.stop),
            "cache_prompt": False,  # an answer does not depend on the one before it
        }
        return str(self._ask("completion", asked)["content"]).strip()

    def _text(self, part: Part) -> str:
        if isinstance(part, Mark):
            return self._marker if part is Mark.IMAGE else "</s>"
        return part.prompt + part.answer

    def _ask(self, path: str, asked: dict[str, Any] | None = None) -> dict[str, Any]:
        if self._messages.closed:  # its port may be another program's by now
            raise UserError(f"{self._folder}: the model has been closed")
        data = None if asked is None else json.dumps(asked).encode()
        request = urllib.request.Request(f"{self._address}/{path}", data)
        try:
            with _HERE.open(request, timeout=_ANSWER_SECONDS) as reply:
                found: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as error:  # a prompt that is too long, say
            raise UserError(f"{self._folder}: llama.cpp refuses: {error.read().decode()[:300]}") from None
        except (OSError, http.client.HTTPException) as error:  # no connection, or half an answer
            reason = self._reason() or str(error)
            raise UserError(f"{self._folder}: llama.cpp no longer answers ({reason})") from None
        return found

    def _prepared(self, image: Image.Image, name: str, padding: Padding | None) -> str:
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    def padding_for(self, wanted: Literal["pad", "crop"] | None, pads: bool) -> Padding:
        refuse_choices(self._folder, image_padding=wanted)
        return "processor"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in (TEXT, MMPROJ):
            with (self._folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")
