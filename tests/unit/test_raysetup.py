"""What is kept off the terminal while Ray runs, and what is not."""

import threading

import pytest

from step_ray.cluster.raysetup import quiet_listing


@pytest.mark.parametrize(
    ("name", "error", "is_told"),
    [
        ("pool-1/completion-signaler", InterruptedError(), False),
        ("pool-1/completion-signaler", ValueError(), True),
        ("shards", InterruptedError(), True),
    ],
)
def test_only_the_end_of_a_listing_is_not_told(monkeypatch, name, error, is_told):
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    hook = threading.excepthook

    def die():
        raise error

    with quiet_listing():
        thread = threading.Thread(target=die, name=name)
        thread.start()
        thread.join()
    assert [args.exc_type for args in told] == ([type(error)] if is_told else [])
    assert threading.excepthook == hook
