"""What a base answered is kept: asked the same again, by whichever run or evaluation, it is not computed again.

An entry's name is a hash of all that decides the answers: who is asked, the tokens of all prompts and references, how long
an answer may be, the code and the versions of the libraries.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import NotFoundError, StorageError
from tunesmith.models.load import Model
from tunesmith.storage import code_digest, make_room, read_json, versions, write_json

MAX_BYTES = 1 << 30  # of all entries


@dataclass(frozen=True)
class Answered:
    """What `model` was asked and said before, in a folder of a cache."""

    folder: Path
    model: Model

    def get(self, asked: Iterable[bytes], *, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was answered to all of this before, or else what `ask` gives: finite numbers and texts."""
        path = self.folder / f"{self._digest(asked)}.json"
        with contextlib.suppress(NotFoundError, StorageError):  # a damaged entry is written anew
            found = read_json(path)
            os.utime(path)
            return found
        found = ask()
        with contextlib.suppress(StorageError, OSError):  # a full disk costs the entry and not the answers
            self.folder.mkdir(parents=True, exist_ok=True)
            if make_room(self.folder, num_bytes=len(json.dumps(found)), max_bytes=MAX_BYTES):
                write_json(path, value=found)
        return found

    def _digest(self, asked: Iterable[bytes]) -> str:
        parameter = next(self.model.causal.parameters())
        who = [self.model.digest, str(parameter.dtype), parameter.device.type]
        how = [code_digest("data", "evaluate", "generate", "models", "objectives"), versions()]
        digest = hashlib.sha256(json.dumps([who, how]).encode())
        for part in asked:
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.hexdigest()[:32]
