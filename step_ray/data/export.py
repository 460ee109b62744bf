"""`step-ray data export`: trajectories -> a file that other training tools read.

Takes folders of trajectories, writes one file whole or not at all. Flags come from the same policy
as the training mask (masking.py).
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from step_ray.data.chats import Chat, ExportPolicy, to_chat
from step_ray.data.files import check_fresh
from step_ray.data.flags import check_name
from step_ray.data.formats import DEFAULT_FLAGS, Format, parquet_schema, row_writer
from step_ray.errors import ConfigError, DataError
from step_ray.store import iter_trajectories, write_lines, write_rows

ENDINGS: dict[Format, str] = {"openai": ".jsonl", "sharegpt": ".jsonl", "parquet": ".parquet"}


@dataclass(slots=True, kw_only=True)
class ExportSummary:
    """What became of the trajectories: `num_trajectories = num_written + dropped`."""

    num_trajectories: int = 0
    num_written: int = 0
    num_trained: int = 0
    """Turns flagged as trained."""
    num_masked: int = 0
    """Turns of the agent flagged as not trained."""
    dropped: Counter[str] = field(default_factory=Counter)


def export_file(
    folders: Iterable[Path], out: Path, form: Format, flag: str, policy: ExportPolicy
) -> ExportSummary:
    """Write the trajectories of the folders to a new file.

    Args:
        folders: read one after the other.
        out: the file; its name ends as the format's files do.
        form: the format.
        flag: name of the per-turn flag; empty: the format's own.
        policy: what is kept and what is trained.

    Raises:
        ConfigError: the file is there, its ending is another format's, or the flag is unknown.
        DataError: nothing is left to write, or a shard is broken.
    """
    flag = flag or DEFAULT_FLAGS[form]
    check_name(flag)
    check_fresh(out)
    if out.is_dir() or out.suffix != ENDINGS[form]:
        raise ConfigError(f"OUT: {str(out)!r} is no name for {form}; end it with {ENDINGS[form]}")
    summary = ExportSummary()
    chats = _chats(folders, policy, summary)
    first = next(chats, None)
    if first is None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.dropped.items())
        raise DataError(f"export: no trajectory is left ({reasons}); try --keep all")
    rows = map(row_writer(form, flag), chain([first], chats))
    if form == "parquet":
        write_rows(out, parquet_schema(flag), rows)
    else:
        write_lines(out, (json.dumps(row, ensure_ascii=False) for row in rows))
    return summary


def _chats(folders: Iterable[Path], policy: ExportPolicy, summary: ExportSummary) -> Iterator[Chat]:
    for folder in folders:
        for trajectory in iter_trajectories(folder):
            summary.num_trajectories += 1
            outcome = to_chat(trajectory, policy)
            if isinstance(outcome, str):
                summary.dropped[outcome] += 1
                continue
            summary.num_written += 1
            summary.num_trained += sum(turn.trained is True for turn in outcome.turns)
            summary.num_masked += sum(turn.trained is False for turn in outcome.turns)
            yield outcome
