"""The cache of replies: found again by all that was asked, whole or not at all."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_ray.calls.cache import CallCache, Lookup, call_key
from step_ray.llm import Completion
from step_ray.types import Message

ASKED = [Message(role="system", content="rules"), Message(role="user", content="step")]
SAMPLING = {"max_tokens": 5, "temperature": 0.0, "seed": 1}
KEY = call_key("m", "v1", ASKED, **SAMPLING)
PAID = Completion(text="hi", prompt_tokens=7, completion_tokens=2, retries=1, cost=0.5)
STORED = Completion(text="hi", cached=True)


def entry_of(folder):
    (path,) = folder.rglob("*.json")
    return path


def test_a_reply_comes_back_free_and_marked(tmp_path):
    cache = CallCache(tmp_path / "deep")
    assert cache.get(KEY) == Lookup()
    assert cache.put(KEY, PAID)
    assert CallCache(tmp_path / "deep").get(KEY) == Lookup(reply=STORED)


@pytest.mark.parametrize(
    "other",
    [
        call_key("n", "v1", ASKED, **SAMPLING),
        call_key("m", "v2", ASKED, **SAMPLING),
        call_key("m", "v1", ASKED[1:], **SAMPLING),
        call_key("m", "v1", ASKED[::-1], **SAMPLING),
        call_key("m", "v1", ASKED, **SAMPLING | {"temperature": 0.5}),
        call_key("m", "v1", ASKED, **SAMPLING | {"seed": 2}),
        call_key("m", "v1", ASKED, **SAMPLING | {"max_tokens": 6}),
    ],
)
def test_whatever_differs_makes_another_key(other):
    assert other != KEY
    assert len(other) == 64


def test_the_order_of_the_sampling_parameters_does_not_matter():
    assert call_key("m", "v1", ASKED, **dict(reversed(SAMPLING.items()))) == KEY


@given(text=st.text(), asked=st.text())
def test_any_text_comes_back(tmp_path_factory, text, asked):
    cache = CallCache(tmp_path_factory.getbasetemp() / "any")
    key = call_key("m", "v1", [Message(role="user", content=asked)])
    assert cache.put(key, Completion(text=text))
    assert cache.get(key).reply == Completion(text=text, cached=True)


def spoil_text(content):
    entry = json.loads(content)
    entry["reply"]["text"] = "ho"
    return json.dumps(entry)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: "",
        lambda content: content[:-10],
        lambda content: "[]",
        lambda content: "[" * 100_000,
        lambda content: '{"reply": 3}',
        lambda content: content.replace(KEY, KEY[::-1]),
        spoil_text,
    ],
)
def test_a_spoilt_entry_is_broken_until_it_is_written_again(tmp_path, spoil):
    cache = CallCache(tmp_path)
    cache.put(KEY, PAID)
    path = entry_of(tmp_path)
    path.write_text(spoil(path.read_text()))
    assert cache.get(KEY) == Lookup(is_broken=True)
    assert cache.put(KEY, PAID)
    assert cache.get(KEY) == Lookup(reply=STORED)


def test_bytes_that_are_no_text_are_broken(tmp_path):
    cache = CallCache(tmp_path)
    cache.put(KEY, PAID)
    entry_of(tmp_path).write_bytes(b"\xff\xfe")
    assert cache.get(KEY) == Lookup(is_broken=True)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    cache = CallCache(tmp_path / "file")
    assert cache.put(KEY, PAID) is False
    assert cache.get(KEY).reply is None


def test_many_writers_of_one_key_leave_one_whole_entry(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: CallCache(tmp_path).put(KEY, PAID), range(64)))
    assert all(done)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{KEY}.json"]
    assert CallCache(tmp_path).get(KEY) == Lookup(reply=STORED)


WRITER = """
import sys
from pathlib import Path
from step_ray.calls.cache import CallCache, call_key
from step_ray.llm import Completion
cache, number = CallCache(Path(sys.argv[1])), 0
while True:
    cache.put(call_key("m", "v", [], seed=number), Completion(text="x" * 100_000))
    print(number, flush=True)
    number += 1
"""


def test_a_killed_writer_leaves_nothing_that_is_read_and_all_that_it_announced(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        for line in writer.stdout:
            last = int(line)
            if last == 50:
                writer.kill()
    cache = CallCache(tmp_path)
    found = [cache.get(call_key("m", "v", [], seed=number)) for number in range(last + 1)]
    assert [lookup.reply is not None for lookup in found] == [True] * (last + 1)
    after = cache.get(call_key("m", "v", [], seed=last + 1))
    assert not after.is_broken
