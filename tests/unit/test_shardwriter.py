"""Finished episodes reach the disk by number, by time, and at the end whatever happens."""

import time

import pytest
from test_failures import episode

from step_ray.storage.shardwriter import ShardWriter
from step_ray.store import read_trajectories
from step_ray.types import StopReason


def one(number):
    return episode(StopReason.SUCCESS, number)


def shards(folder):
    return len(list(folder.glob("*.parquet")))


def test_a_full_shard_is_written_at_once(tmp_path):
    with ShardWriter(tmp_path, rows_per_shard=2, flush_s=1000) as writer:
        writer.add(one(0))
        assert shards(tmp_path) == 0
        writer.add(one(1))
        assert shards(tmp_path) == 1
    assert shards(tmp_path) == 1


def test_an_episode_does_not_wait_for_the_next_one(tmp_path):
    with ShardWriter(tmp_path, rows_per_shard=100, flush_s=0.05) as writer:
        writer.add(one(0))
        deadline = time.monotonic() + 30
        while not shards(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_what_waits_is_kept_when_something_else_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 100, flush_s=1000) as writer:
        writer.add(one(0))
        raise KeyboardInterrupt
    assert [t.trajectory_id for t in read_trajectories(tmp_path)] == ["t0"]


def test_a_disk_that_takes_nothing_is_told_with_the_next_episode(tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    writer = ShardWriter(in_the_way, rows_per_shard=100, flush_s=0.05)

    def add_two():
        with writer:
            writer.add(one(0))
            writer._clock.join(timeout=30)
            writer.add(one(1))

    with pytest.raises(OSError):
        add_two()
