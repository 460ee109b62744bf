"""One object of a store: read, written whole, deleted; what is wrong with a store, in one line.

Takes addresses (places.py), works through pyarrow's filesystems. Credentials are those of the
environment or of the machine's role, as AWS's and Google's own libraries find them; none is read,
kept or shown here. What a run has as files, and where, is remote.py's.
"""

import math
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from step_ray.errors import ConfigError, StorageError
from step_ray.storage.places import ENDPOINTS, endpoint, is_url, url_of

CONNECT_S, SILENT_S = 4, 20
"""A server that cannot be connected to, or says nothing, for so long is tried again; a quarter of
`SILENT_S` before a run."""
TRIES, PATIENT_TRIES = 2, 6
"""Of a request: before a run, and in it, where the waits between them grow to some 20 s."""
MOST_SAID = 200
"""Letters of what a store says of a fault."""
FAULTS = {
    "NO_SUCH_BUCKET|RESOURCE_NOT_FOUND|NOT_FOUND": (
        "there is no such bucket; make it, or mend the address"
    ),
    "ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|TOKEN|HTTP status 40[13]|OAuth2|PERMISSION_DENIED"
    "|UNAUTHENTICATED": (
        "access is refused; give credentials that may read, write and delete there, in the"
        " environment or as the machine's role"
    ),
    "NETWORK_CONNECTION|UNAVAILABLE|DEADLINE|REQUEST_TIMEOUT": (
        "the store cannot be reached; look at the network, and at"
        f" {ENDPOINTS['s3'][-1]} or {ENDPOINTS['gs'][-1]} where it is not the cloud's own"
    ),
}
"""What a store's fault looks like -> what it means and what to do; the first one counts."""

SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
"""Environment variables whose values are never shown."""
SHORT = 4
"""Letters of what is no secret, and may be part of a word."""


def check_access(path: Path) -> None:
    """Write, read and delete one small object where a mirror's run will be; within 30 s.

    Raises:
        ConfigError: that does not work, and why.
    """
    url = url_of(path)
    if url is None:
        return
    probe = f"{url}/.seen-{uuid.uuid4().hex}"
    try:
        with told(url):
            store, key = open_store(probe, tries=TRIES)
            write_object(store, key, b"seen")
            with store.open_input_stream(key) as stream:
                stream.read()
            store.delete_file(key)
    except StorageError as exc:
        raise ConfigError(f"output_dir: {exc}") from exc
    except FileNotFoundError as exc:  # as Google's says it
        raise ConfigError(f"output_dir: {url}: {_fault(exc)}") from exc


def read_bytes(place: str) -> bytes:
    """What is at a place, read from the store itself and not kept.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: the store cannot be read.
    """
    if not is_url(place):
        return Path(place).read_bytes()
    with told(place):
        store, key = open_store(place)
        with store.open_input_stream(key) as stream:
            data: bytes = stream.read()
            return data


def write_bytes(place: str, data: bytes) -> None:
    """Put one object, whole; nothing is kept on this node.

    Raises:
        StorageError: the store does not take it.
    """
    with told(place):
        store, key = open_store(place)
        write_object(store, key, data)


def delete(place: str) -> None:
    """Delete one object; it need not be there."""
    with told(place), suppress(FileNotFoundError):
        store, key = open_store(place)
        store.delete_file(key)


def age_s(place: str) -> float:
    """Seconds since an object was written, by the store's clock; endless for one that is gone."""
    probe = f"{place.rpartition('/')[0]}/.now-{uuid.uuid4().hex}"
    with told(place):
        store, key = open_store(place)
        info = store.get_file_info(key)
        write_bytes(probe, b"now")
        now = store.get_file_info(open_store(probe)[1])
        delete(probe)
    return float(now.mtime_ns - info.mtime_ns) / 1e9 if info.is_file else math.inf


def open_store(url: str, tries: int = PATIENT_TRIES) -> tuple[Any, str]:
    """pyarrow's filesystem for an address, and the path in it."""
    scheme, _, key = url.partition("://")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    return _filesystem(scheme, key.partition("/")[0], endpoint(scheme), region, tries), key


@lru_cache(maxsize=64)
def _filesystem(scheme: str, bucket: str, server: str, region: str, tries: int) -> Any:
    from pyarrow import fs

    protocol, _, host = server.rstrip("/").rpartition("://")
    if scheme == "gs":
        wait = timedelta(seconds=10 * tries / TRIES)
        other = {"endpoint_override": host, "scheme": protocol or "http", "anonymous": True}
        return fs.GcsFileSystem(retry_time_limit=wait, **(other if server else {}))
    other = {"endpoint_override": host, "scheme": protocol or "https"} if server else {}
    return fs.S3FileSystem(
        region=region or ("us-east-1" if server else fs.resolve_s3_region(bucket)),
        connect_timeout=CONNECT_S,
        request_timeout=SILENT_S / (4 if tries == TRIES else 1),
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=tries),
        allow_delayed_open=True,  # a small object is one request
        **other,
    )


def write_object(store: Any, key: str, data: bytes | Iterator[bytes]) -> None:
    """Write an object of an open store; one that is given up on the way is deleted."""
    stream = store.open_output_stream(key)
    is_whole = False
    try:
        for part in [data] if isinstance(data, bytes) else data:
            stream.write(part)
        is_whole = True
        stream.close()
    finally:
        if not is_whole:  # pyarrow completes an object that is given up, too
            with suppress(OSError):
                stream.close()
                store.delete_file(key)


@contextmanager
def told(url: str) -> Iterator[None]:
    """Faults of the store as one line; that nothing is there stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as exc:  # pyarrow's for what makes no address is a ValueError
        raise StorageError(f"{url}: {_fault(exc)}") from exc


def _fault(exc: Exception) -> str:
    text = " ".join(str(exc).split())
    for name in SECRETS:
        secret = os.environ.get(name, "")
        text = text.replace(secret, "<key>") if len(secret) > SHORT else text
    said = next((line for signs, line in FAULTS.items() if re.search(signs, text)), "")
    return f"{said} ({text[:MOST_SAID]})" if said else text[:MOST_SAID]
