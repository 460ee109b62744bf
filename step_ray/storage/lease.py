"""Who works in a run that lies in an object store: a small object that its owner renews.

Takes the folder of a run, gives a context. The lock of a folder (runfolder.py) does not reach other
machines; this does. It says host, process and start, and is renewed in the background; one that has
not been renewed for `STALE_S`, by the store's own clock, belongs to a process that is gone. A store
has no lock: of two that start at once the later writer keeps the lease, and the other gives way
after `SETTLE_S`, or at its next renewal if the later one was slow.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from step_ray.errors import RunStateError, StorageError
from step_ray.storage.objects import age_s, delete, read_bytes, write_bytes
from step_ray.storage.places import cache_root, url_of
from step_ray.storage.remote import held

FILE = "lease.json"
RENEW_S = 15.0
STALE_S = 60.0
"""The wait after a kill, at most, before the same command goes on elsewhere."""
POLL_S = 2.0
SETTLE_S = 1.0
"""Between taking the lease and looking whether somebody else has taken it, too."""


@contextmanager
def leased(folder: Path, tell: Callable[[str], object]) -> Iterator[None]:
    """Keep a run, and its mirror, for this process; of a folder in no mirror nothing is asked.

    The lease of a process that is gone is waited for, at most `STALE_S`.

    Args:
        folder: of the run.
        tell: called with a line when there is something to wait for.

    Raises:
        RunStateError: another process has it, or takes it meanwhile.
        StorageError: the store cannot be used.
    """
    url = url_of(folder)
    if url is None:
        yield
        return
    lease = _Lease(url)
    lease.take(tell)
    lease.start()
    try:
        with held(folder):
            yield
    except KeyboardInterrupt:
        if lease.lost_to is None:
            raise
        raise RunStateError(_in_use(url, lease.lost_to)) from None
    finally:
        lease.give_back()


class _Lease:
    """The lease of one process."""

    def __init__(self, url: str) -> None:
        self._url, self._place = url, f"{url}/{FILE}"
        self._record: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "node": _node(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "renewals": 0,
        }
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.lost_to: dict[str, Any] | None = None

    def take(self, tell: Callable[[str], object]) -> None:
        """Write the lease, once nobody has one that is renewed.

        The caller has the lock of the folder, so an owner on this node has ended.
        """
        other = self._other()
        if other is not None and other.get("node") != self._record["node"]:
            self._outwait(other, tell)
        self._write()
        time.sleep(SETTLE_S)
        if (other := self._other()) is not None:
            raise RunStateError(_in_use(self._url, other))

    def _outwait(self, other: dict[str, Any], tell: Callable[[str], object]) -> None:
        """Wait until a lease is stale; one that is renewed meanwhile has an owner."""
        left_s = STALE_S - age_s(self._place)
        if left_s > 0:
            tell(f"waits up to {left_s:.0f} s for the lease of {_owner(other)}")
        while left_s > 0:
            time.sleep(min(POLL_S, left_s))
            found = self._other()
            if found is None:
                return
            if found != other:
                raise RunStateError(_in_use(self._url, found))
            left_s = STALE_S - age_s(self._place)

    def start(self) -> None:
        """Renew it from now on."""
        self._thread.start()

    def give_back(self) -> None:
        """Delete the lease, unless it is another's by now."""
        self._over.set()
        self._thread.join()
        with suppress(StorageError):  # it grows stale by itself
            if self.lost_to is None and self._other() is None:
                delete(self._place)

    def _renew(self) -> None:
        while not self._over.wait(RENEW_S):
            with suppress(StorageError):  # what is written next says so, too
                self.lost_to = self._other()
                if self.lost_to is None:
                    self._record["renewals"] += 1
                    self._write()
                else:
                    # two may not write into one run; a signal ends what the main thread waits for
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return

    def _other(self) -> dict[str, Any] | None:
        """The lease that is there, if it is another's."""
        try:
            found: dict[str, Any] = json.loads(read_bytes(self._place))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return None if found.get("id") == self._record["id"] else found

    def _write(self) -> None:
        write_bytes(self._place, json.dumps(self._record).encode())


def _node() -> str:
    """A name of this node's cache folder that no other has."""
    file = cache_root() / "node"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex, encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _in_use(url: str, record: dict[str, Any]) -> str:
    return f"run folder {url!r} is in use by another step-ray ({_owner(record)}); wait or stop it"


def _owner(record: dict[str, Any]) -> str:
    return f"process {record.get('pid')} on {record.get('host')}, since {record.get('since')}"
