"""Brings finished episodes to disk soon: in shards of a fixed size, or sooner when they wait.

Takes trajectories one by one, leaves whole shards (store.py), which are merged when they are many
(compact.py). A clock of its own writes what waits, because the next episode may be long in coming.
It decides nothing about episodes.
"""

import threading
import time
from pathlib import Path
from types import TracebackType

from step_ray.storage.compact import Compactor
from step_ray.store import write_shard
from step_ray.types import Trajectory

FLUSH_S = 10.0
"""A finished episode waits at most about this long for its shard to fill."""


class ShardWriter:
    """A context in which trajectories are added; on leaving it, whatever happened, all are kept."""

    def __init__(self, folder: Path, rows_per_shard: int, flush_s: float = FLUSH_S) -> None:
        self._folder, self._rows_per_shard, self._flush_s = folder, rows_per_shard, flush_s
        self._rows: list[Trajectory] = []
        self._compactor = Compactor(folder)
        self._since = 0.0
        self._lock = threading.Lock()
        self._fault: Exception | None = None
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._watch, name="shards", daemon=True)

    def __enter__(self) -> "ShardWriter":
        self._clock.start()
        return self

    def add(self, trajectory: Trajectory) -> None:
        """Keep a trajectory.

        Raises:
            OSError: the disk takes no shard, now or while this one's predecessors waited.
        """
        with self._lock:
            if self._fault is not None:
                raise self._fault
            if not self._rows:
                self._since = time.monotonic()
            self._rows.append(trajectory)
            if len(self._rows) >= self._rows_per_shard:
                self._flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._clock.join()
        try:
            if self._rows:
                self._flush()
        finally:
            self._compactor.close(settled=kind is None)

    def _flush(self) -> None:
        write_shard(self._folder, self._rows)
        self._rows = []
        self._compactor.wrote()

    def _watch(self) -> None:
        while not self._closed.wait(self._flush_s / 10):
            with self._lock:
                if not self._rows or time.monotonic() - self._since < self._flush_s:
                    continue
                try:
                    self._flush()
                except Exception as exc:  # told to whoever adds the next one
                    self._fault = exc
                    return
