"""A folder of trajectories belongs to one collection."""

import pytest

from step_ray.errors import RunStateError
from step_ray.storage.claim import claim_folder

IDENTITY = {"env": "alfworld", "teacher": {"model": "a"}, "seed": 0}


def test_the_same_collection_finds_its_folder_again(tmp_path):
    first = claim_folder(tmp_path, IDENTITY)
    assert claim_folder(tmp_path, dict(reversed(IDENTITY.items()))) == first


def test_another_collection_is_refused_and_the_difference_named(tmp_path):
    claim_folder(tmp_path, IDENTITY)
    with pytest.raises(RunStateError) as caught:
        claim_folder(tmp_path, {**IDENTITY, "teacher": {"model": "b"}})
    assert str(caught.value) == (
        f"folder '{tmp_path}' holds the trajectories of another collection (teacher.model was 'a',"
        " is 'b'); take another folder, or move these away"
    )


def test_trajectories_that_nobody_claimed_are_refused(tmp_path):
    (tmp_path / "1.parquet").touch()
    with pytest.raises(RunStateError, match=r"and no collection\.json that says whose they are"):
        claim_folder(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["1.parquet"]


def test_two_collections_have_two_ids(tmp_path):
    assert claim_folder(tmp_path / "a", IDENTITY) != claim_folder(tmp_path / "b", IDENTITY)
