"""Asking a model behind an OpenAI-compatible address, with retries, a few at a time, each question once.

What was answered is kept in a folder under a hash of address, model and messages. The key comes from the environment, goes
into the request's header and nowhere else.
"""

import contextlib
import hashlib
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO

from tunesmith.errors import ModelError, NotFoundError, RecipeError, StorageError
from tunesmith.storage import make_room, read_json, write_json

Messages = list[dict[str, str]]
AT_A_TIME = 4
ATTEMPTS = 5
BACKOFF_SECONDS = 1.0
MAX_WAIT_SECONDS = 60.0
MAX_RESPONSE_BYTES = 1 << 20
MAX_CACHE_BYTES = 1 << 28
TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another address."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def key_of(variable: str | None) -> str:
    """The key in an environment variable; RecipeError where it is not set. Empty where no variable is named."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RecipeError(f"the environment variable {variable} is not set", hint=f"export {variable}=KEY")
    if not key.isascii() or not key.isprintable():
        raise RecipeError(f"the environment variable {variable} holds no key", hint="a key is printable ASCII")
    return key


@dataclass(frozen=True)
class ChatClient:
    """`model` at `url` (to which `/chat/completions` is added); a question may take `timeout_seconds` each time."""

    url: str
    model: str
    cache: Path
    key: str = field(default="", repr=False)
    timeout_seconds: float = 60.0

    def answers(self, questions: Sequence[Messages]) -> list[str]:
        """The answer to each question. ModelError where an answer cannot be had; what was answered until then is kept."""
        failed: list[BaseException] = []  # once there is one, nothing more is asked

        def asked(messages: Messages) -> str:
            try:
                return "" if failed else self.answer(messages)
            except BaseException as error:
                failed.append(error)
                raise

        with ThreadPoolExecutor(AT_A_TIME) as pool:
            futures = [pool.submit(asked, messages) for messages in questions]
            try:
                found = [future.result() for future in futures]
            except BaseException as error:
                failed.append(error)
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def answer(self, messages: Messages) -> str:
        """As `answers`, of one question."""
        named = json.dumps([self.url, self.model, messages]).encode()
        path = self.cache / f"{hashlib.sha256(named).hexdigest()[:32]}.json"
        with contextlib.suppress(NotFoundError, StorageError, KeyError):  # a damaged entry is written anew
            found = str(read_json(path)["answer"])
            os.utime(path)
            return found
        text = self._asked(messages)
        with contextlib.suppress(StorageError, OSError):  # a full disk costs the entry and not the answer
            self.cache.mkdir(parents=True, exist_ok=True)
            if make_room(self.cache, num_bytes=len(text.encode()), max_bytes=MAX_CACHE_BYTES):
                write_json(path, value={"answer": text})
        return text

    def _asked(self, messages: Messages) -> str:
        for attempt in range(1, ATTEMPTS + 1):
            wait = BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
            try:
                return self._once(messages)
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"status {error.code}: {self._without_key(error.read(1000))}"
                if error.code not in TRY_AGAIN:
                    break
                asked_for = error.headers.get("Retry-After", "")
                wait = max(wait, float(asked_for)) if asked_for.isdecimal() else wait
            except (OSError, HTTPException) as error:  # no connection, a time-out, half an answer
                problem = f"{type(error).__name__}: {error}"
            except (ValueError, LookupError, TypeError) as error:
                problem = f"what it sends is no chat completion ({type(error).__name__})"
            if attempt < ATTEMPTS:
                time.sleep(min(wait, MAX_WAIT_SECONDS))
        raise ModelError(
            f"{self.model} at {self.url} does not answer: {problem}",
            hint="check evaluate.judge (url, model, key_environment) and run it again: what was answered is kept",
        )

    def _once(self, messages: Messages) -> str:
        headers = {"Content-Type": "application/json", "User-Agent": "tunesmith"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", data=body, headers=headers)
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout_seconds) as response:
            content = json.loads(response.read(MAX_RESPONSE_BYTES))["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError("the content is no text")
        return content.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written down

    def _without_key(self, text: bytes) -> str:
        shown = " ".join(text.decode("utf-8", "replace").split())
        return (shown.replace(self.key, "[key]") if self.key else shown)[:300]
