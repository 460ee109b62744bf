"""The folder of a run: which stage is done, with which settings, and who is working in it.

Takes stage names and the settings that define them, gives skip / go on / refuse. It runs nothing.
A stage's record holds its settings word for word, so that a refusal can name the key that changed.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_ray.errors import RunStateError
from step_ray.storage.lease import leased
from step_ray.storage.places import shown
from step_ray.storage.remote import move
from step_ray.store import read_json, write_json

DONE, PARTIAL, STARTED = "done", "partial", "started"
FINISHED = frozenset({DONE, PARTIAL})
"""States in which others may use what a stage has made."""
UNFINISHED = "unfinished"
"""Key of a summary: a line on what is missing and how to go on; empty when nothing is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageState:
    """What the folder knows of one stage."""

    status: str | None
    """`done`; `partial`: all that its limits allowed; `started`: killed, failed or running; None:
    never begun."""
    summary: Mapping[str, Any]

    @property
    def unfinished(self) -> str:
        """What a partial stage lacks, and how to go on; empty when it lacks nothing."""
        return str(self.summary.get(UNFINISHED, "")) if self.status == PARTIAL else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting of a stage that is another one now; None: not there, or no limit."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.old!r}, is {self.new!r}"

    @property
    def is_rise(self) -> bool:
        """Whether a limit was raised or lifted."""
        return self.old is not None and (self.new is None or self.new > self.old)


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A short digest of a stage's settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class RunFolder:
    """The stage records of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self, tell: Callable[[str], object] = str) -> Iterator[None]:
        """Keep the folder for this process; the lock goes with the process, however it ends.

        Of a run in a store other machines are kept out, too (lease.py).

        Args:
            tell: called with a line when there is something to wait for.

        Raises:
            RunStateError: another process works in the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                raise RunStateError(
                    f"run folder {shown(self.path)!r} is in use by another step-ray; wait or stop"
                    " it"
                ) from exc
            with leased(self.path, tell):
                yield

    def state(self, stage: str) -> StageState:
        """The state of a stage, whatever its settings were."""
        record = self._record(stage)
        return StageState(status=record.get("status"), summary=record.get("summary", {}))

    def digest(self, stage: str) -> str:
        """What a stage's outcome follows from: fingerprint of its settings, and how often it was
        reopened since; empty if it was never begun."""
        record = self._record(stage)
        reopened = f"+{record['reopened']}" if record.get("reopened") else ""
        return str(record.get("fingerprint", "")) + reopened

    def changes(self, stage: str, settings: Mapping[str, Any]) -> list["Change"]:
        """The settings that differ from the stage's record."""
        record = self._record(stage)
        if not record or record["fingerprint"] == fingerprint(settings):
            return []
        return differences(record["settings"], settings)

    def begin(self, stage: str, settings: Mapping[str, Any]) -> None:
        """Note that a stage is being worked on; one that was finished is thereby reopened."""
        record = self._record(stage)
        is_same = record.get("fingerprint") == fingerprint(settings)
        times = record.get("reopened", 0) if is_same else 0
        reopens = is_same and record["status"] in FINISHED
        self._write(stage, settings, STARTED, {}, times + reopens)

    def finish(
        self, stage: str, settings: Mapping[str, Any], summary: Mapping[str, Any], seconds: float
    ) -> None:
        """Note that a stage is complete, or partial where its summary says what is missing."""
        status = PARTIAL if summary.get(UNFINISHED) else DONE
        reopened = self._record(stage).get("reopened", 0)
        self._write(stage, settings, status, summary, reopened, seconds=seconds)

    def set_aside(self, stage: str, outputs: Sequence[Path]) -> None:
        """Move a stage's outputs and record to `replaced/`, so that it is made again."""
        target = self.path / "replaced" / f"{time.strftime('%Y%m%d-%H%M%S')}-{_file_name(stage)}"
        for output in [*outputs, self._file(stage)]:
            move(output, target / output.relative_to(self.path))  # two outputs may share a name

    def _write(
        self,
        stage: str,
        settings: Mapping[str, Any],
        status: str,
        summary: Mapping[str, Any],
        reopened: int,
        **more: Any,
    ) -> None:
        write_json(
            self._file(stage),
            {
                "stage": stage,
                "status": status,
                "fingerprint": fingerprint(settings),
                "settings": json.loads(json.dumps(settings, default=str)),
                "summary": dict(summary),
                "reopened": reopened,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "pid": os.getpid(),
                **more,
            },
        )

    def _record(self, stage: str) -> dict[str, Any]:
        file = self._file(stage)
        record: dict[str, Any] = read_json(file) if file.is_file() else {}
        return record

    def _file(self, stage: str) -> Path:
        return self.path / "stages" / f"{_file_name(stage)}.json"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The values that differ, nested keys joined by dots."""
    was, now = _flat(old), _flat(json.loads(json.dumps(new, default=str)))
    keys = [k for k in {**was, **now} if was.get(k) != now.get(k)]
    return [Change(key=k, old=was.get(k), new=now.get(k)) for k in keys]


def _file_name(stage: str) -> str:
    return stage.replace(":", ".")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
