"""A vision-language model's opinion: does the picture show what its prompt says?

Shapes: N pictures `[N, 3, S, S]` in [0, 1]. Any server that speaks OpenAI's chat completions will do: vLLM,
Ollama, llama.cpp, a hosted one. Source of the idea: DDPO, arXiv:2305.13301, section 5.2, with LLaVA.
"""

import base64
import io
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrl.errors import DiffRLError
from diffrl.types import Context, to_pixels

_QUESTION = (
    "How well does this picture show '{prompt}'? Answer with one number alone, from 0 (not at all) to 10 "
    "(perfectly)."
)
_ALONE = "Answer with the number alone, from 0 to 10."


@dataclass
class VLM:
    """A vision-language model's mark, 0 to 10, of how well the picture shows its prompt: a black box."""

    model: str | None = None  # as the server calls it
    base_url: str = "http://localhost:8000/v1"  # of an OpenAI-compatible server
    question: str = _QUESTION  # {prompt} stands for the picture's; the answer must hold one number, 0 to 10
    key_variable: str | None = None  # environment variable that holds the API key; null: none is sent
    temperature: float | None = 0.0  # null: the server's own
    timeout: float = 60.0  # seconds that the server may be silent
    attempts: int = 5  # at each picture
    backoff: float = 1.0  # seconds before the second attempt; each later wait is twice as long
    concurrency: int = 8  # pictures asked about at once

    differentiable: ClassVar[bool] = False
    num_classes: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        if not self.model:
            raise DiffRLError("reward.model=null: give the name under which the server knows its model.")
        if not self.base_url.startswith(("http://", "https://")):
            raise DiffRLError(f"reward.base_url={self.base_url}: must start with http:// or https://.")
        if "{prompt}" not in self.question:
            raise DiffRLError(
                f"reward.question={self.question}: must have {{prompt}} where the prompt goes."
            )
        for name, least in (("timeout", 0.001), ("attempts", 1), ("backoff", 0), ("concurrency", 1)):
            if not getattr(self, name) >= least:
                raise DiffRLError(f"reward.{name}={getattr(self, name)}: must be {least} or more.")

    def __call__(self, images: Tensor, context: Context) -> Tensor:
        """Return the mark of each picture, `[N]`, 0 to 10.

        Raises:
            DiffRLError: a picture without a mark after all attempts, or a request the server calls wrong.
        """
        pictures, prompts = to_pixels(images), context.prompts
        headers = {"Content-Type": "application/json"} | self._authorisation()
        with ThreadPoolExecutor(self.concurrency) as pool:
            marks = pool.map(self._mark, range(len(pictures)), pictures, prompts, [headers] * len(pictures))
            return torch.tensor(list(marks), dtype=torch.float32, device=images.device)

    def _authorisation(self) -> dict[str, str]:
        if self.key_variable is None:
            return {}
        if not (key := os.environ.get(self.key_variable)):
            raise DiffRLError(
                f"reward.key_variable={self.key_variable}: no such environment variable. Put the key there."
            )
        return {"Authorization": f"Bearer {key}"}

    def _mark(self, number: int, picture: np.ndarray, prompt: str, headers: dict[str, str]) -> float:
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        body = self._body(picture, prompt)
        for attempt in range(1, self.attempts + 1):
            answer = None
            try:
                request = Request(url, json.dumps(body).encode(), headers)
                with build_opener(_NoRedirects).open(request, timeout=self.timeout) as response:
                    answer = json.load(response)["choices"][0]["message"]["content"]
                return read_mark(answer)
            except HTTPError as error:
                reason = f"HTTP {error.code}: "
                with suppress(OSError, HTTPException):
                    reason += " ".join(error.read(300).decode(errors="replace").split())
                if error.code < 500 and error.code not in (408, 429):  # it will be so again
                    break
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
            if isinstance(answer, str):
                # asked the same, a model at temperature 0 says the same
                said = {"role": "assistant", "content": answer}
                body["messages"] += [said, {"role": "user", "content": _ALONE}]
            if attempt < self.attempts:
                time.sleep(self.backoff * 2 ** (attempt - 1))
        raise DiffRLError(
            f"reward=vlm: no mark of picture {number} ({prompt!r}) from {url} in {attempt} attempt(s): "
            f"{reason}"
        )

    def _body(self, picture: np.ndarray, prompt: str) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [
            {"type": "text", "text": self.question.replace("{prompt}", prompt)},
            {"type": "image_url", "image_url": {"url": data}},
        ]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        return body if self.temperature is None else body | {"temperature": self.temperature}


class _NoRedirects(HTTPRedirectHandler):
    """The API key goes to no other address than the one that it was given for."""

    def redirect_request(self, *_: Any) -> None: ...


def read_mark(answer: str) -> float:
    """Return the one number in `answer`, such as '7', 'Score: 7.5' or '8/10'.

    Raises:
        ValueError: none, several, or one below 0 or above 10.
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?:/|out of)\s*10\b", "", answer))
    if len(numbers) != 1 or not 0 <= float(numbers[0]) <= 10:
        raise ValueError(f"the answer {answer[:200]!r} does not hold one number from 0 to 10.")
    return float(numbers[0])
