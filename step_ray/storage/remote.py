"""Moves files between a mirror (places.py) and the object store behind it.

Takes paths; those that are in no mirror are left alone, so runs in a folder pay nothing and need no
branch. `push` brings what was written to the store, `fetch` gives what another node wrote, `pull`
makes a mirror what the store is. An object appears whole, and so does a fetched file. Half-written
files (a first dot) and what Ray Train writes there by itself are none of its business.
"""

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from step_ray.storage.objects import PATIENT_TRIES, delete, open_store, told, write_object
from step_ray.storage.places import cache_root, is_url, mirror, url_of

NUM_THREADS = 16
"""Objects that move at once."""
WHOLE_BYTES = 64 * 2**20
"""Files up to this size are read before their object is begun."""
MOST_COPIED_BYTES = 5 * 10**9
"""S3 copies no larger object by itself."""
CHECKPOINT = "checkpoint_"
"""First letters of the folders that Ray Train writes into the store by itself."""

HELD = ".held"
"""Lock of a folder of a mirror that is written to."""

Skip = Callable[[str], bool]


def _nothing(name: str) -> bool:
    del name
    return False


def push(path: Path, last: str = "") -> None:
    """Bring a file, or all that is new in a folder, to the store; on return it is there.

    Args:
        path: in a mirror; elsewhere, or missing, nothing happens.
        last: name of a file of the folder that says that the others are there.

    Raises:
        StorageError: the store does not take it.
    """
    url = url_of(path)
    if url is None or not path.exists():
        return
    with told(url):
        store, key = open_store(url)
        if path.is_file():
            _put(store, path, key)
            return
        there = _objects(store, key)
        new = [name for name in _files(path) if _differs(path / name, there.get(name))]
        _each(lambda name: _put(store, path / name, f"{key}/{name}"), (n for n in new if n != last))
        _each(lambda name: _put(store, path / name, f"{key}/{name}"), (n for n in new if n == last))


def remove(path: Path) -> None:
    """Delete a file, and its object; neither need be there.

    Raises:
        StorageError: the store does not let it go.
    """
    path.unlink(missing_ok=True)
    url = url_of(path)
    if url is not None:
        delete(url)


def move(path: Path, target: Path) -> None:
    """Move a file or folder, where there is one, and its objects; parents are made.

    Raises:
        StorageError: the store does not do it; what has been copied by then is in both places.
    """
    if path.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    url, new_url = url_of(path), url_of(target)
    if url is None or new_url is None:
        return
    with told(url):
        store, key = open_store(url)
        new_key, info = open_store(new_url)[1], store.get_file_info(key)
        found = {"": info} if info.is_file else _objects(store, key, all_of=True)
        names = {f"{key}/{name}" if name else key: one for name, one in found.items()}
        _each(lambda k: _copy(store, k, new_key + k.removeprefix(key), names[k].size), names)
        _each(store.delete_file, names)


def _copy(store: Any, key: str, target: str, size: int) -> None:
    if size <= MOST_COPIED_BYTES:
        store.copy_file(key, target)
        return
    with store.open_input_stream(key) as source:
        write_object(store, target, iter(lambda: source.read(WHOLE_BYTES), b""))


def fetch(place: str) -> Path:
    """The local path of a place, with all that the store has there; once per node.

    Whoever asks for a folder while another process of this node fetches it waits, and a fetch that
    was killed is completed by the next one.

    Args:
        place: an address; a path is given back as it is.

    Raises:
        StorageError: the store cannot be read.
    """
    path = mirror(place)
    if is_url(place):
        pull(path)
    return path


def pull(path: Path, skip: Skip = _nothing) -> None:
    """Make a file or folder of a mirror what the store has; what the store lacks is deleted.

    Args:
        path: elsewhere nothing happens.
        skip: whether to leave a file alone, by its name below the folder.

    Raises:
        StorageError: the store cannot be read.
    """
    url = url_of(path)
    if url is None:
        return
    with told(url):
        store, key = open_store(url)
        info = store.get_file_info(key)
        if info.is_file:  # two may do so at once: the second takes the place of the first
            _get_if_new(store, key, info, path)
        elif path.is_file():
            path.unlink()
        else:
            with _alone(url):
                _pull_folder(store, key, path, skip)


def _pull_folder(store: Any, key: str, path: Path, skip: Skip) -> None:
    there = {name: info for name, info in _objects(store, key).items() if not skip(name)}
    _each(lambda name: _get_if_new(store, f"{key}/{name}", there[name], path / name), there)
    for name in _files(path):
        if name not in there and not skip(name):
            (path / name).unlink(missing_ok=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While this process writes into a folder of a mirror, nobody on this node pulls it."""
    if url_of(folder) is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / HELD).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def free(folder: Path) -> Iterator[bool]:
    """Whether no process of this node holds a folder; none begins to in the block.

    Of several who ask, each waits for the one before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(f"{folder}/{HELD}"), (folder / HELD).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def exists(place: str | Path, tries: int = PATIENT_TRIES) -> bool:
    """Whether there is a file; of a place in a store, whether there is an object.

    Raises:
        StorageError: the store cannot be read.
    """
    url = str(place) if is_url(str(place)) else url_of(place)
    if url is None:
        return Path(place).is_file()
    with told(url):
        store, key = open_store(url, tries)
        return bool(store.get_file_info(key).is_file)


def tail(path: Path, most: int) -> bytes:
    """The last bytes of a file, `most` at most; of one in a mirror, as the store has it.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: the store cannot be read.
    """
    url = url_of(path)
    if url is None:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - most, 0))
            return file.read()
    with told(url):
        store, key = open_store(url)
        with store.open_input_file(key) as file:
            size = file.size()
            data: bytes = file.read_at(min(most, size), max(size - most, 0))
            return data


def for_libraries(path: Path) -> tuple[str, Any]:
    """A path and pyarrow's filesystem (None: the local one) for what reads and writes by itself."""
    url = url_of(path)
    if url is None:
        return str(path.resolve()), None
    store, key = open_store(url)
    return key, store


def _objects(store: Any, key: str, *, all_of: bool = False) -> dict[str, Any]:
    """What the store has below a key, by its name there; `all_of`: what is not for us, too."""
    from pyarrow import fs

    found = store.get_file_info(fs.FileSelector(key, allow_not_found=True, recursive=True))
    names = {info.path.removeprefix(f"{key}/"): info for info in found if info.is_file}
    return {name: info for name, info in names.items() if all_of or _is_ours(name)}


def _files(folder: Path) -> list[str]:
    """Names of the files below a folder that have their place in the store, too."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if _is_ours(name))


def _is_ours(name: str) -> bool:
    """Half-written files and locks have a first dot; checkpoints are Ray Train's."""
    return not any(part.startswith((".", CHECKPOINT)) for part in PurePosixPath(name).parts)


def _differs(path: Path, info: Any) -> bool:
    """Whether a file is another one than the object; times are compared in seconds, as S3 does."""
    if info is None or not path.is_file():
        return True
    stat = path.stat()
    return (stat.st_size, int(stat.st_mtime)) != (info.size, int(info.mtime_ns // 10**9))


def _put(store: Any, path: Path, key: str) -> None:
    """Upload a file and give it the time of its object, by which the two are known as the same."""
    before = path.stat()
    if before.st_size <= WHOLE_BYTES:
        write_object(store, key, path.read_bytes())
    else:
        with path.open("rb") as source:
            write_object(store, key, iter(lambda: source.read(WHOLE_BYTES), b""))
    info, after = store.get_file_info(key), path.stat()
    if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
        os.utime(path, ns=(after.st_atime_ns, info.mtime_ns))


def _get_if_new(store: Any, key: str, info: Any, path: Path) -> None:
    if not _differs(path, info):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with store.open_input_stream(key) as source, temp.open("wb") as file:
            shutil.copyfileobj(source, file, WHOLE_BYTES)
        os.utime(temp, ns=(info.mtime_ns, info.mtime_ns))
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def _each(do: Callable[[str], None], names: Iterable[str]) -> None:
    """Several at once; the first error is raised when all have ended."""
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="store") as pool:
        for _ in pool.map(do, names):
            pass


@contextmanager
def _alone(url: str) -> Iterator[None]:
    """One process or thread of this node at a time fetches an address."""
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / hashlib.sha256(url.encode()).hexdigest()[:24]).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
