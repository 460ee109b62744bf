"""Trajectories on disk: round trip, shards that are whole or absent, one row per id."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_step, make_trajectory
from hypothesis import given
from hypothesis import strategies as st

from step_ray.errors import DataError
from step_ray.storage.records import SCHEMA, VERSION_KEY, from_row, to_row
from step_ray.store import (
    completed_ids,
    read_json,
    read_trajectories,
    total_usage,
    write_json,
    write_shard,
)
from step_ray.types import (
    SCHEMA_VERSION,
    Author,
    Message,
    Source,
    Step,
    StepKind,
    StopReason,
    Task,
    Trajectory,
    Usage,
    Verdict,
    VerdictLabel,
)

FULL = Trajectory(
    trajectory_id="toy/1#self_reflected#7",
    task=Task(
        task_id="toy/1",
        env="toy",
        split="train",
        goal="find the mug",
        task_type="find",
        params={"game": "g1", "also": "x"},
    ),
    prompt=(Message(role="system", content="rules"), Message(role="user", content="room")),
    steps=(
        Step(
            index=0,
            kind=StepKind.ERROR,
            author=Author.STUDENT,
            text="Action: go",
            thought="",
            action="go",
            observation="Nothing happens.",
            verdict=Verdict(label=VerdictLabel.ERROR, reflection="no", error_type="no_op"),
            prompt_tokens=5,
            seconds=0.25,
        ),
        Step(
            index=1,
            kind=StepKind.CORRECTION,
            author=Author.TEACHER,
            text="Action: take",
            thought="",
            action="take",
            reflection="no",
            reward=1.0,
        ),
    ),
    reward=1.0,
    success=True,
    stop_reason=StopReason.SUCCESS,
    source=Source.SELF_REFLECTED,
    seed=7,
    error=None,
    models={"teacher": "oracle", "student": "tiny"},
    prompt_version="alfworld_v1",
    engine="native 1",
    usage=Usage(env_steps=2, student_calls=1, teacher_calls=2, prompt_tokens=5, seconds=0.5),
    producer="step_ray 0.1.0 abc",
)


def named(name, stop_reason=StopReason.SUCCESS, engine=""):
    return replace(FULL, trajectory_id=name, stop_reason=stop_reason, engine=engine)


def test_a_trajectory_with_every_field_comes_back_equal(tmp_path):
    write_shard(tmp_path, [FULL])

    assert read_trajectories(tmp_path) == [FULL]


def test_a_row_holds_plain_values_only():
    row = to_row(FULL)

    assert type(row["stop_reason"]) is str
    assert row["stop_reason"] == "success"
    assert row["models"] == [("student", "tiny"), ("teacher", "oracle")]
    assert type(row["steps"][0]["verdict"]["label"]) is str
    assert row["steps"][1]["verdict"] is None
    assert set(row) == set(SCHEMA.names)


any_text = st.text(max_size=20)
string_maps = st.dictionaries(any_text, any_text, max_size=3)


@given(text=any_text, error=st.none() | any_text, maps=string_maps, prompt=st.lists(any_text))
def test_any_text_survives_the_arrow_table(text, error, maps, prompt):
    trajectory = replace(
        FULL,
        task=replace(FULL.task, goal=text, params=maps),
        models=maps,
        error=error,
        prompt=tuple(Message(role="user", content=content) for content in prompt),
        steps=(replace(FULL.steps[0], text=text, observation=error),),
    )

    [row] = pa.Table.from_pylist([to_row(trajectory)], schema=SCHEMA).to_pylist()

    assert from_row(row) == trajectory


@pytest.mark.parametrize("reason", StopReason)
def test_every_stop_reason_survives(tmp_path, reason):
    write_shard(tmp_path, [named("a", reason)])

    assert read_trajectories(tmp_path)[0].stop_reason is reason


def test_maps_may_be_dicts_as_ray_data_gives_them():
    assert from_row(to_row(FULL) | {"models": {"student": "m"}}).models == {"student": "m"}


def test_a_row_without_a_later_field_takes_its_default():
    row = to_row(FULL)
    del row["producer"]

    assert from_row(row) == replace(FULL, producer="")


def test_a_row_from_before_the_best_score_takes_it_from_its_steps():
    steps = tuple(make_step(reward=reward) for reward in (0.25, 0.5, -0.75))
    row = to_row(make_trajectory(*steps, reward=0.0))
    del row["best_reward"]
    assert from_row(row).best_reward == 0.75


def test_a_newer_row_is_refused():
    row = to_row(FULL) | {"schema_version": SCHEMA_VERSION + 1}

    with pytest.raises(DataError, match=r"toy/1#self_reflected#7.*upgrade step_ray"):
        from_row(row)


@pytest.mark.parametrize("change", [{"source": "oracle"}, {"task": None}, {"steps": [{}]}])
def test_a_row_that_is_no_trajectory_is_a_data_error(change):
    with pytest.raises(DataError, match="not a trajectory record"):
        from_row(to_row(FULL) | change)


def test_the_file_says_its_version_and_a_newer_file_is_refused(tmp_path):
    path = write_shard(tmp_path, [FULL])
    assert pq.read_schema(path).metadata[VERSION_KEY] == b"1"

    table = pq.read_table(path).replace_schema_metadata({VERSION_KEY: b"2"})
    pq.write_table(table, path)

    for read in (read_trajectories, completed_ids):
        with pytest.raises(DataError, match=rf"{path.name}.*schema_version 2"):
            read(tmp_path)


def test_a_parquet_file_of_somebody_else_is_refused(tmp_path):
    pq.write_table(
        pa.table({"trajectory_id": ["a"], "stop_reason": ["success"]}), tmp_path / "x.parquet"
    )

    with pytest.raises(DataError, match=r"x\.parquet.*no schema_version"):
        completed_ids(tmp_path)


def test_shards_never_overwrite_each_other_and_sort_by_time(tmp_path):
    paths = [write_shard(tmp_path / "new", [named(name)]) for name in "abc"]

    assert sorted(paths) == paths
    assert sorted((tmp_path / "new").iterdir()) == paths


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_shard(tmp_path, [named("a"), named("lone \ud800 surrogate")])

    assert list(tmp_path.iterdir()) == []


def test_a_failed_json_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "run.json", {"a": 1})

    with pytest.raises(UnicodeEncodeError):
        write_json(tmp_path / "run.json", {"a": "\ud800"})

    assert read_json(tmp_path / "run.json") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_half_written_files_are_ignored(tmp_path):
    path = write_shard(tmp_path, [FULL])
    (tmp_path / f".{path.name}.0123.tmp").write_bytes(path.read_bytes()[:50])

    assert completed_ids(tmp_path) == {FULL.trajectory_id}
    assert read_trajectories(tmp_path) == [FULL]


@pytest.mark.parametrize("content", [b"", b"PAR1 and then noise"])
def test_a_broken_shard_is_named(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)

    for read in (read_trajectories, completed_ids):
        with pytest.raises(DataError, match=r"a\.parquet.*broken") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_cut_shard_is_named(tmp_path):
    path = write_shard(tmp_path, [FULL])
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(DataError, match=path.name):
        read_trajectories(tmp_path)


def test_trajectories_come_sorted_by_id(tmp_path):
    write_shard(tmp_path, [named("b"), named("c")])
    write_shard(tmp_path, [named("a")])

    assert [t.trajectory_id for t in read_trajectories(tmp_path)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        (StopReason.SUCCESS, StopReason.MAX_STEPS, "second"),
        (StopReason.SUCCESS, StopReason.LLM_ERROR, "first"),
        (StopReason.TIMEOUT, StopReason.BAD_FORMAT, "second"),
        (StopReason.TIMEOUT, StopReason.ENV_ERROR, "second"),
    ],
)
def test_of_two_rows_the_one_that_is_no_error_wins_else_the_later(tmp_path, first, second, winner):
    write_shard(tmp_path, [named("a", first, "first")])
    write_shard(tmp_path, [named("a", second, "second")])

    [trajectory] = read_trajectories(tmp_path)

    assert trajectory.engine == winner


def test_completed_ids_leave_errors_to_be_retried(tmp_path):
    write_shard(tmp_path, [named("won"), named("lost", StopReason.MAX_STEPS)])
    write_shard(
        tmp_path, [named("broke", StopReason.TIMEOUT), named("mended", StopReason.LLM_ERROR)]
    )
    write_shard(tmp_path, [named("mended")])

    assert completed_ids(tmp_path) == {"won", "lost", "mended"}
    assert completed_ids(tmp_path, retry=()) == {"won", "lost", "mended", "broke"}
    assert completed_ids(tmp_path, retry={StopReason.MAX_STEPS}) == {"won", "mended", "broke"}


def test_usages_are_those_of_episodes_that_were_played_again_too(tmp_path):
    for stop, calls in ((StopReason.LLM_ERROR, 3), (StopReason.SUCCESS, 4)):
        usage = Usage(teacher_calls=calls)
        write_shard(tmp_path, [replace(named("a", stop), usage=usage)])

    assert total_usage(tmp_path).teacher_calls == 7
    assert total_usage(tmp_path / "none") == Usage()


LATER_USAGE = (
    "teacher_cached_calls",
    "teacher_unstructured_calls",
    "cache_faults",
    "student_cost",
    "teacher_cost",
)


def test_a_shard_from_before_money_was_counted_is_read_as_free(tmp_path):
    row = to_row(FULL)
    for name in LATER_USAGE:
        del row["usage"][name]
    usage = pa.struct([f for f in SCHEMA.field("usage").type if f.name not in LATER_USAGE])
    index = SCHEMA.get_field_index("usage")
    old = SCHEMA.set(index, pa.field("usage", usage)).with_metadata(SCHEMA.metadata)
    pq.write_table(pa.Table.from_pylist([row], schema=old), tmp_path / "old.parquet")

    assert read_trajectories(tmp_path) == [FULL]
    assert total_usage(tmp_path) == FULL.usage


def test_completed_ids_read_two_columns_only(tmp_path):
    table = pa.table(
        {"trajectory_id": ["a"], "stop_reason": ["success"]},
        schema=pa.schema(
            [("trajectory_id", pa.string()), ("stop_reason", pa.string())],
            metadata={VERSION_KEY: b"1"},
        ),
    )
    pq.write_table(table, tmp_path / "a.parquet")

    assert completed_ids(tmp_path) == {"a"}


def test_a_missing_folder_has_no_completed_ids_and_no_trajectories_to_read(tmp_path):
    assert completed_ids(tmp_path / "none") == set()
    with pytest.raises(DataError, match="no folder"):
        read_trajectories(tmp_path / "none")


def test_an_empty_shard_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="no trajectories"):
        write_shard(tmp_path, [])


def test_json_comes_back_equal_and_replaces_the_old_file(tmp_path):
    write_json(tmp_path / "deep" / "run.json", {"a": 1})
    write_json(tmp_path / "deep" / "run.json", {"b": ["é", None, 0.5]})

    assert read_json(tmp_path / "deep" / "run.json") == {"b": ["é", None, 0.5]}


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_unreadable_json_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)

    with pytest.raises(DataError, match=r"run\.json"):
        read_json(tmp_path / "run.json")
