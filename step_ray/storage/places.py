"""Where a run lies: in a folder, or in an object store with a copy (its mirror) on each node.

Takes an address (`s3://bucket/prefix`, `gs://...`) or a path, gives the one for the other. Every
address has exactly one place below the node's cache folder, and what lies there one address, so
code works with paths, and an address is what travels to other nodes. It reads and writes nothing.
"""

import os
import re
from pathlib import Path

CACHE_VARIABLE = "STEP_RAY_CACHE"
"""Environment variable with the cache folder of a node; else ~/.cache/step_ray."""
SCHEMES = ("s3", "gs")
ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST",),
}
"""Environment variables with the address of another server that speaks the same protocol."""
_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+]*)://(?P<rest>.*)", re.DOTALL)


def is_url(place: str) -> bool:
    """Whether a place is an address, and no path."""
    return _ADDRESS.fullmatch(place) is not None


def url_fault(url: str) -> str | None:
    """What is wrong with the address of a place in a store; None: nothing."""
    match = _ADDRESS.fullmatch(url)
    if match is None or match["scheme"] not in SCHEMES:
        return "runs lie in a folder, or in s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
    parts = match["rest"].rstrip("/").split("/")
    if any(part in ("", ".", "..") or part.startswith(".") for part in parts):
        return f"an address is {match['scheme']}://BUCKET/PREFIX, no part empty or with a first dot"
    return None


def holds_secret(url: str) -> bool:
    """Whether an address holds a user, a query or a fragment, and so perhaps a key."""
    return is_url(url) and any(sign in url for sign in "@?#")


def endpoint(scheme: str) -> str:
    """The server that the environment names for a scheme; empty: the cloud's own."""
    return next((value for name in ENDPOINTS[scheme] if (value := os.environ.get(name))), "")


def cache_root() -> Path:
    """The cache folder of this node."""
    given = os.environ.get(CACHE_VARIABLE) or "~/.cache/step_ray"
    return Path(given).expanduser().resolve()


def mirror(place: str | Path) -> Path:
    """Where this node keeps what has this address; a path is its own place."""
    match = _ADDRESS.fullmatch(str(place))
    if match is None:
        return Path(place)
    server = re.sub(r"[^A-Za-z0-9.-]", "_", endpoint(match["scheme"]).partition("//")[2])
    store = f"{match['scheme']}@{server}" if server else match["scheme"]
    return cache_root() / "runs" / store / match["rest"].rstrip("/")


def url_of(path: str | Path) -> str | None:
    """The address of what lies in a mirror; None: the path is in none."""
    parent, full = str(cache_root() / "runs") + os.sep, str(Path(path).absolute())
    if not full.startswith(parent):
        return None
    store, _, rest = full[len(parent) :].partition(os.sep)
    return f"{store.partition('@')[0]}://{Path(rest).as_posix()}" if rest else None


def place_of(path: str | Path) -> str:
    """What to tell other nodes of a path: its address if it is in a mirror, else the full path."""
    return url_of(path) or str(Path(path).resolve())


def shown(path: str | Path) -> str:
    """What to tell the user of a path: the address of what is in a mirror, else the path."""
    return url_of(path) or str(path)
