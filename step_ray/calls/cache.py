"""Replies of a model on disk, keyed by all that was asked, so that no question is paid for twice.

Takes the request, gives the reply that was stored, or none. One small file per reply, written
beside its place and renamed into it: no lock, so any number of processes on any number of nodes may
share a folder, on NFS too, and a killed writer leaves nothing that is read. A database in one file
(sqlite3, and diskcache on top of it) has one writer at a time and locks that NFS does not keep.
A file costs an inode and a block of the file system: about 4 KiB a call. In an object store a reply
is an object that is read and written where it is, with no copy on the node: one small request
beside a call of seconds, and a new cluster has all of them.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_ray.errors import StorageError
from step_ray.llm import Completion
from step_ray.storage.objects import read_bytes, write_bytes
from step_ray.storage.places import is_url
from step_ray.types import Message

FORMAT = 1
"""Version of an entry; part of the key, so that entries of another one are not found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What the cache has for a key."""

    reply: Completion | None = None
    is_broken: bool = False
    """There is an entry, and it cannot be used."""


def call_key(model: str, prompt_version: str, messages: Sequence[Message], **sampling: Any) -> str:
    """The name of a request: 64 hexadecimal digits, the same in every process.

    Args:
        model: name of the model.
        prompt_version: of the text that tells it what to do.
        messages: the conversation.
        sampling: max_tokens, temperature, seed and whatever else may change the reply; plain JSON.
    """
    request = {
        "format": FORMAT,
        "model": model,
        "prompt_version": prompt_version,
        "messages": [[message.role, message.content] for message in messages],
        "sampling": sampling,
    }
    return _digest(request)


class CallCache:
    """A folder of replies; may be used from several threads."""

    def __init__(self, place: Path | str) -> None:
        """Take a folder, or an address in a store, which then has one object per reply."""
        self._folder, self._url = Path(place), str(place) if is_url(str(place)) else ""

    def get(self, key: str) -> Lookup:
        """The reply for a key, marked as cached and free of charge."""
        try:
            text = self._read(key)
        except FileNotFoundError:
            return Lookup()
        except (OSError, StorageError):
            return Lookup(is_broken=True)
        try:
            entry = json.loads(text)
            reply = _reply(entry["reply"])
            is_whole = entry["key"] == key and entry["check"] == _digest(entry["reply"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return Lookup(is_broken=True)
        return Lookup(reply=reply) if is_whole else Lookup(is_broken=True)

    def put(self, key: str, completion: Completion) -> bool:
        """Store a reply, in place of a broken one too; False when the disk does not take it."""
        reply = {
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "unstructured": completion.unstructured,
        }
        # for who reads the folder: the prices of then
        paid = {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "cost": completion.cost,
        }
        entry = json.dumps({"key": key, "check": _digest(reply), "reply": reply, "paid": paid})
        try:
            self._write(key, entry.encode())
        except (OSError, StorageError):
            return False
        return True

    def _read(self, key: str) -> bytes:
        if self._url:
            return read_bytes(f"{self._url}/{_name(key)}")
        return (self._folder / _name(key)).read_bytes()

    def _write(self, key: str, entry: bytes) -> None:
        if self._url:
            write_bytes(f"{self._url}/{_name(key)}", entry)
            return
        path = self._folder / _name(key)
        temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        # no fsync: what a power cut spoils fails its check and costs one call
        temp.write_bytes(entry)
        os.replace(temp, path)  # noqa: PTH105 - the name of the guarantee


def _name(key: str) -> str:
    return f"{key[:2]}/{key}.json"


def _reply(entry: Mapping[str, Any]) -> Completion:
    text, finish_reason = entry["text"], entry["finish_reason"]
    if not (isinstance(text, str) and isinstance(finish_reason, str)):
        raise TypeError("a reply is text")
    return Completion(
        text=text,
        finish_reason=finish_reason,
        unstructured=bool(entry["unstructured"]),
        cached=True,
    )


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
