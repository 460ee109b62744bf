"""Whose a folder of trajectories is: one collection's, for good.

Takes a folder and the identity of a collection, writes `collection.json` into a fresh folder and
refuses one that belongs to another. It reads no trajectory.
"""

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step_ray.errors import RunStateError
from step_ray.storage.runfolder import differences
from step_ray.store import read_json, write_json

CLAIM = "collection.json"
"""File beside the shards: id, time of the first start, and what defines the episodes."""


def claim_folder(folder: Path, identity: Mapping[str, Any]) -> str:
    """Make a folder this collection's, or see that it is; gives the collection's id.

    Args:
        folder: where trajectories are, or will be.
        identity: what defines them, plain JSON.

    Raises:
        RunStateError: it is another collection's, or holds trajectories that nobody claimed.
    """
    file = folder / CLAIM
    if file.is_file():
        record = read_json(file)
        changes = differences(record["identity"], identity)
        if changes:
            shown = "; ".join(map(str, changes[:3]))
            raise RunStateError(
                f"folder {str(folder)!r} holds the trajectories of another collection ({shown});"
                " take another folder, or move these away"
            )
        return str(record["id"])
    if any(folder.glob("*.parquet")):
        raise RunStateError(
            f"folder {str(folder)!r} holds trajectories and no {CLAIM} that says whose they are;"
            " take another folder, or move these away"
        )
    name = uuid.uuid4().hex
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(file, {"id": name, "started": started, "identity": dict(identity)})
    return name
