"""Merging shards: the same rows in fewer files, for readers that look on and after every kill."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_step, make_trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from step_ray.errors import DataError
from step_ray.storage import compact as module
from step_ray.storage.compact import TOP_LEVEL, Compactor, compact, merge, settle
from step_ray.storage.records import SCHEMA, VERSION_KEY, to_row
from step_ray.storage.shards import shard_paths
from step_ray.storage.shardwriter import ShardWriter
from step_ray.store import (
    finished_ids,
    iter_outcomes,
    iter_trajectories,
    read_trajectories,
    total_usage,
    write_shard,
)
from step_ray.types import StepKind, StopReason, Usage


def episode(number, stop=StopReason.SUCCESS, engine=""):
    return replace(
        make_trajectory(make_step(), make_step(kind=StepKind.CORRECTION)),
        trajectory_id=f"t{number:04}",
        stop_reason=stop,
        engine=engine,
        usage=Usage(teacher_calls=1, student_cost=0.5),
    )


def fill(folder, num_shards, rows=1, first=0):
    """Shards of `rows` episodes each, of which every other shard repeats the first episode."""
    for shard in range(num_shards):
        numbers = [first + shard * rows + row for row in range(rows)]
        write_shard(folder, [episode(0 if shard % 2 and not n % rows else n) for n in numbers])
    return folder


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_merging_keeps_every_row_and_bounds_the_files(tmp_path):
    fill(tmp_path, 20, rows=3)
    before, spent = read_trajectories(tmp_path), total_usage(tmp_path)

    assert compact(tmp_path, fan_in=4) == 5 + 1

    # 20 shards are 5 of the first level, of which 4 are one of the second
    assert len(names(tmp_path)) == 2
    assert read_trajectories(tmp_path) == before
    assert total_usage(tmp_path) == spent == Usage(teacher_calls=60, student_cost=30.0)
    rows = [row for path in shard_paths(tmp_path) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 60


def test_a_merged_file_is_ordered_by_id_and_is_a_shard_like_any_other(tmp_path):
    for number in (3, 1, 2):
        write_shard(tmp_path, [episode(number)])

    path = merge(shard_paths(tmp_path), 1)

    table = pq.read_table(path)
    assert table["trajectory_id"].to_pylist() == ["t0001", "t0002", "t0003"]
    assert table.schema.metadata[VERSION_KEY] == b"1"
    assert table.schema.names == SCHEMA.names


@pytest.mark.parametrize(
    ("stops", "winner"),
    [
        ((StopReason.SUCCESS, StopReason.LLM_ERROR, StopReason.MAX_STEPS), "2"),
        ((StopReason.SUCCESS, StopReason.LLM_ERROR, StopReason.TIMEOUT), "0"),
        ((StopReason.TIMEOUT, StopReason.LLM_ERROR, StopReason.ENV_ERROR), "2"),
    ],
)
@pytest.mark.parametrize("merged", [slice(0, 2), slice(1, 3), slice(0, 3)])
def test_which_row_counts_is_the_same_after_a_merge(tmp_path, stops, winner, merged):
    for number, stop in enumerate(stops):
        write_shard(tmp_path, [episode(0, stop, engine=str(number))])

    merge(shard_paths(tmp_path)[merged], 1)

    assert [t.engine for t in read_trajectories(tmp_path)] == [winner]


stops = st.sampled_from([StopReason.SUCCESS, StopReason.MAX_STEPS, StopReason.TIMEOUT])
shards = st.lists(st.lists(st.tuples(st.integers(0, 4), stops), min_size=1, max_size=3), max_size=9)


@given(shards=shards, fan_in=st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_whatever_was_written_reads_the_same_after_merging(shards, fan_in):
    with TemporaryDirectory() as folder:
        for number, shard in enumerate(shards):
            write_shard(folder, [episode(n, stop, engine=f"{number}") for n, stop in shard])
        before = (read_trajectories(folder), total_usage(folder), finished_ids(folder))

        settle(folder, fan_in)

        assert (read_trajectories(folder), total_usage(folder), finished_ids(folder)) == before
        below_the_top = [name for name in names(folder) if f"merged{TOP_LEVEL}" not in name]
        assert len(below_the_top) <= fan_in


def test_files_of_an_older_version_merge_with_new_ones(tmp_path):
    row = to_row(episode(1))
    del row["usage"]["student_cost"], row["best_reward"]
    usage = pa.struct([f for f in SCHEMA.field("usage").type if f.name != "student_cost"])
    old = pa.schema([f.with_type(usage) if f.name == "usage" else f for f in SCHEMA][:-1])
    table = pa.Table.from_pylist([row], schema=old.with_metadata(SCHEMA.metadata))
    pq.write_table(table, tmp_path / f"{0:020}-{0:012}.parquet")
    write_shard(tmp_path, [episode(2)])
    before = read_trajectories(tmp_path)
    assert [t.usage.student_cost for t in before] == [0.0, 0.5]

    merge(shard_paths(tmp_path), 1)

    assert read_trajectories(tmp_path) == before
    assert total_usage(tmp_path).student_cost == 0.5


def test_files_that_somebody_put_there_are_left_alone(tmp_path):
    fill(tmp_path, 8)
    mine = tmp_path / "mine.parquet"
    shutil.copy(shard_paths(tmp_path)[0], mine)

    assert compact(tmp_path, fan_in=4) == 2
    assert mine in shard_paths(tmp_path)


def test_a_reader_goes_on_where_files_were_merged_under_it(tmp_path, monkeypatch):
    monkeypatch.setattr("step_ray.storage.shards.WINDOW_ROWS", 2)
    monkeypatch.setattr("step_ray.storage.shards.CACHE_BYTES", 1)
    monkeypatch.setattr("step_ray.storage.shards.OPEN_FILES", 1)
    fill(tmp_path, 12)
    wanted = read_trajectories(tmp_path)
    reader = iter_trajectories(tmp_path)
    seen = [next(reader) for _ in range(3)]

    compact(tmp_path, fan_in=4)

    assert [*seen, *reader] == wanted


CHILD = """
import os, signal, sys
from pathlib import Path
from step_ray.storage import compact

def dies_at(function, count):
    calls = iter(range(count))
    def dying(*args, **kwargs):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return dying

if sys.argv[2] == "rename":
    os.replace = dies_at(os.replace, int(sys.argv[3]))
else:
    Path.unlink = dies_at(Path.unlink, int(sys.argv[3]))
compact.compact(sys.argv[1], fan_in=4)
"""


@pytest.mark.parametrize(
    ("call", "count"),
    # the first removal is that of the temporary file, which is not there any more
    [("rename", 0), ("rename", 1), ("unlink", 1), ("unlink", 3), ("unlink", 9)],
)
def test_a_kill_at_any_point_loses_nothing_and_repeats_nothing(tmp_path, call, count):
    fill(tmp_path, 8)
    before, spent = read_trajectories(tmp_path), total_usage(tmp_path)
    command = [sys.executable, "-c", CHILD, str(tmp_path), call, str(count)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (read_trajectories(tmp_path), total_usage(tmp_path)) == (before, spent)

    compact(tmp_path, fan_in=4)

    assert (read_trajectories(tmp_path), total_usage(tmp_path)) == (before, spent)
    assert len([name for name in names(tmp_path) if not name.startswith(".")]) == 2


def test_old_half_written_files_are_removed_and_young_ones_are_not(tmp_path, monkeypatch):
    fill(tmp_path, 1)
    (tmp_path / ".a.parquet.0.tmp").touch()
    compact(tmp_path)
    assert ".a.parquet.0.tmp" in names(tmp_path)

    monkeypatch.setattr(module, "OLD_S", -1.0)
    compact(tmp_path)
    assert len(names(tmp_path)) == 1


def test_a_half_written_file_that_gets_its_name_meanwhile_is_no_fault(tmp_path, monkeypatch):
    fill(tmp_path, 2)
    half = tmp_path / ".late.parquet.0a.tmp"
    half.touch()
    glob = Path.glob

    def listed(folder, pattern):
        found = list(glob(folder, pattern))
        if half in found:
            half.rename(tmp_path / "elsewhere")
        return iter(found)

    monkeypatch.setattr(Path, "glob", listed)
    assert compact(tmp_path, fan_in=2) == 1


def test_at_the_end_few_files_stay_and_many_become_one(tmp_path):
    fill(tmp_path, 15)
    settle(tmp_path, fan_in=16)
    assert len(names(tmp_path)) == 15

    settle(tmp_path, fan_in=4)  # more than four files are left when fours are merged
    assert [name.partition("-merged")[2] for name in names(tmp_path)] == ["2.parquet"]
    assert len(read_trajectories(tmp_path)) == 8


def test_a_compactor_merges_while_shards_are_written(tmp_path):
    compactor = Compactor(tmp_path, fan_in=4)
    for number in range(30):
        write_shard(tmp_path, [episode(number)])
        compactor.wrote()
    compactor.close(settled=True)

    assert len(names(tmp_path)) <= 4
    assert [t.trajectory_id for t in read_trajectories(tmp_path)] == [
        f"t{number:04}" for number in range(30)
    ]


def test_a_writer_of_many_shards_leaves_few(tmp_path):
    with ShardWriter(tmp_path, rows_per_shard=1) as writer:
        for number in range(66):
            writer.add(episode(number))

    # 64 of them are one file
    assert len(names(tmp_path)) == 3
    assert len(read_trajectories(tmp_path)) == 66


def test_a_merge_that_meets_a_broken_shard_says_so(tmp_path):
    fill(tmp_path, 3)
    broken = tmp_path / f"{0:020}-{0:012}.parquet"
    broken.write_bytes(b"PAR1 and then noise")

    with pytest.raises(DataError, match=broken.name):
        compact(tmp_path, fan_in=4)
    assert len(names(tmp_path)) == 4


def test_outcomes_say_what_the_trajectories_say(tmp_path):
    write_shard(tmp_path, [episode(1), episode(2, StopReason.LLM_ERROR)])

    good, bad = iter_outcomes(tmp_path)

    assert (good.trajectory_id, good.num_steps, good.num_corrections) == ("t0001", 2, 1)
    assert (bad.stop_reason, bad.usage) == (StopReason.LLM_ERROR, episode(2).usage)
    assert finished_ids(tmp_path).to_pylist() == ["t0001"]
    only = pa.array(["t0002", "none"], pa.large_string())
    assert [o.trajectory_id for o in iter_outcomes(tmp_path, only)] == ["t0002"]
