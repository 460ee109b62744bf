"""A drained node is told once, however often training asks."""

from types import SimpleNamespace

import ray.train

from step_ray.stages.training import start_line
from step_ray.training.preemption import Notices


def test_each_node_is_told_once(monkeypatch):
    heard = [None, ["b"], ["b"], ["a", "b"], ["a", "b"]]
    infos = iter([names and SimpleNamespace(preempted_node_ids=names) for names in heard])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(infos))
    notices = Notices()
    assert [notices.has_new() for _ in heard] == [False, True, False, True, False]


def test_a_start_says_from_where_and_with_how_many():
    start = {"step": 0, "workers": 2, "layout": "packed"}
    assert start_line(start) == "2 worker(s); packed"
    assert start_line({**start, "step": 7}) == "goes on after step 7 with 2 worker(s); packed"
