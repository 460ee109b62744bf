"""The batch plan: every example once, the same everywhere, little padding."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_ray.errors import DataError
from step_ray.training.batching import (
    collate,
    load_examples,
    padding_share,
    plan_epoch,
    split_batch,
)

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def write(folder, ids, mask):
    types = {"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_())}
    folder.mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"input_ids": ids, "loss_mask": mask}, schema=pa.schema(types)),
        folder / f"part-{len(list(folder.iterdir()))}.parquet",
    )


@given(lengths=LENGTHS, batch_tokens=st.integers(1, 200), seed=st.integers(-5, 5))
def test_an_epoch_holds_every_example_once_in_batches_near_the_budget(lengths, batch_tokens, seed):
    batches = plan_epoch(lengths, batch_tokens, seed, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= batch_tokens + max(lengths) for b in batches)


def test_order_changes_with_the_epoch_and_the_seed_and_with_nothing_else():
    lengths = [3] * 100
    plan = plan_epoch(lengths, 30, seed=1, epoch=2)
    assert plan == plan_epoch(lengths, 30, seed=1, epoch=2)
    assert plan != plan_epoch(lengths, 30, seed=1, epoch=3)
    assert plan != plan_epoch(lengths, 30, seed=2, epoch=2)


def test_the_last_batch_is_as_large_as_the_others():
    batches = plan_epoch([10] * 21, batch_tokens=100, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [7, 7, 7]


@given(lengths=LENGTHS, num_ranks=st.integers(1, 4), budget=st.integers(1, 200))
def test_a_batch_is_divided_over_ranks_without_loss_and_within_the_budget(
    lengths, num_ranks, budget
):
    batch = list(range(len(lengths)))
    shares = split_batch(batch, lengths, num_ranks, budget)
    passes = [one for share in shares for one in share]
    assert sorted(i for one in passes for i in one) == batch
    assert len({len(share) for share in shares}) == 1
    assert all(len(p) <= 1 or len(p) * max(lengths[i] for i in p) <= budget for p in passes)


def test_ranks_get_equal_work_and_similar_lengths_share_a_pass():
    lengths = [10, 100, 10, 100, 10, 100, 10, 100]
    shares = split_batch(range(8), lengths, num_ranks=2, micro_batch_tokens=200)
    assert shares == [[[1, 5], [0, 4]], [[3, 7], [2, 6]]]


@given(lengths=LENGTHS, num_ranks=st.integers(1, 4), budget=st.integers(1, 200))
def test_packed_passes_hold_every_example_once_within_the_budget(lengths, num_ranks, budget):
    batch = list(range(len(lengths)))
    shares = split_batch(batch, lengths, num_ranks, budget, packed=True)
    passes = [one for share in shares for one in share]
    assert sorted(i for one in passes for i in one) == batch
    assert len({len(share) for share in shares}) == 1
    assert all(len(p) <= 1 or sum(lengths[i] for i in p) <= budget for p in passes)


def test_packed_examples_fill_the_first_pass_with_room():
    lengths = [60, 50, 40, 30, 20]
    assert split_batch(range(5), lengths, 1, 100, packed=True) == [[[0, 2], [1, 3, 4]]]
    assert split_batch(range(5), lengths, 1, 100) == [[[0], [1, 2], [3, 4]]]


def test_the_padding_share_counts_all_ranks_and_no_empty_pass():
    lengths = [10, 5, 5]
    assert padding_share([[[0, 1]], [[2]]], lengths) == pytest.approx(5 / 25)
    assert padding_share([[[1], []], [[2], [0]]], lengths) == 0


def test_a_rank_without_examples_gets_an_empty_pass():
    assert split_batch([7], {7: 20}, num_ranks=2, micro_batch_tokens=8) == [[[7]], [[]]]


def test_examples_of_all_files_are_read_in_the_order_of_the_file_names(tmp_path):
    write(tmp_path, [[1, 2, 3], [4, 5]], [[False, True, True], [True, False]])
    write(tmp_path, [[6, 7]], [[False, True]])
    examples = load_examples(tmp_path)
    assert examples.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert examples.starts.tolist() == [0, 3, 5]
    assert examples.num_trained.tolist() == [2, 0, 1]


def test_collate_pads_on_the_right_and_finds_the_trained_tokens(tmp_path):
    write(tmp_path, [[1, 2, 3], [4, 5]], [[False, True, True], [False, True]])
    batch = collate(load_examples(tmp_path), [0, 1])
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch.positions_N.tolist() == [0, 1, 3]
    assert batch.targets_N.tolist() == [2, 3, 5]


def test_no_examples_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no training example"):
        load_examples(tmp_path)


def test_examples_without_trained_tokens_are_a_data_error(tmp_path):
    write(tmp_path, [[1, 2]], [[True, False]])
    with pytest.raises(DataError, match="no trained token"):
        load_examples(tmp_path)


def test_a_mask_of_another_length_is_a_data_error(tmp_path):
    write(tmp_path, [[1, 2]], [[True]])
    with pytest.raises(DataError, match="another length"):
        load_examples(tmp_path)


def test_a_file_that_is_no_parquet_is_a_data_error(tmp_path):
    (tmp_path / "part-0.parquet").write_bytes(b"half a file")
    with pytest.raises(DataError, match="cannot be read"):
        load_examples(tmp_path)


def test_files_that_are_still_being_written_are_not_read(tmp_path):
    write(tmp_path, [[1, 2]], [[False, True]])
    (tmp_path / ".part-1.parquet").write_bytes(b"half a file")
    assert load_examples(tmp_path).input_ids.tolist() == [1, 2]
