"""Addresses of runs in a store, and the places that nodes keep them in."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_ray.config import parse_config
from step_ray.errors import ConfigError
from step_ray.storage.places import mirror, place_of, shown, url_of

PART = st.text("abcXYZ0189_-.", min_size=1).filter(lambda part: not part.startswith("."))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEP_RAY_CACHE", str(tmp_path))
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    return tmp_path


def test_a_run_in_a_store_has_its_mirror_below_the_cache_folder(cache):
    config = parse_config({"name": "demo", "output_dir": "s3://bucket/team/runs/"})
    assert config.run_dir == cache / "runs/s3/bucket/team/runs/demo"
    assert url_of(config.run_dir / "stages/collect.json") == (
        "s3://bucket/team/runs/demo/stages/collect.json"
    )


def test_another_server_has_mirrors_of_its_own(cache, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    place = mirror("s3://bucket/demo")
    assert place == cache / "runs/s3@minio_9000/bucket/demo"
    assert url_of(place) == "s3://bucket/demo"
    assert mirror("gs://bucket/demo") == cache / "runs/gs/bucket/demo"


def test_a_path_is_its_own_place(cache):
    assert mirror("runs/demo") == Path("runs/demo")
    assert url_of("runs/demo") is None
    assert url_of(cache / "runs") is None
    assert place_of("runs/demo") == str(Path.cwd() / "runs/demo")
    assert shown("runs/demo") == "runs/demo"


@given(st.sampled_from(["s3", "gs"]), st.lists(PART, min_size=1))
def test_every_address_comes_back_from_its_place(scheme, parts):
    url = f"{scheme}://{'/'.join(parts)}"
    assert url_of(mirror(url)) == url
    assert parse_config({"name": "r", "output_dir": url}).output_dir == url


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("hdfs://host/runs", "runs lie in a folder, or in s3://BUCKET/PREFIX or gs://BUCKET"),
        ("s3://", "an address is s3://BUCKET/PREFIX, no part empty or with a first dot"),
        ("s3://bucket//runs", "an address is s3://BUCKET/PREFIX"),
        ("gs://bucket/../runs", "an address is gs://BUCKET/PREFIX"),
    ],
)
def test_what_is_no_address_of_a_run(place, line):
    with pytest.raises(ConfigError, match=r"^output_dir: ") as caught:
        parse_config({"name": "r", "output_dir": place})
    assert line in str(caught.value)


@pytest.mark.parametrize(
    "place", ["s3://key:hushhush@bucket/runs", "s3://bucket/runs?secret_key=hushhush"]
)
def test_a_key_in_an_address_is_refused_and_not_shown(place):
    with pytest.raises(ConfigError, match="credentials come from the environment") as caught:
        parse_config({"name": "r", "output_dir": place})
    assert "hushhush" not in str(caught.value)
