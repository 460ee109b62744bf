"""A model behind somebody else's endpoint plays the held-out tasks over Ray."""

import io

import pytest
from jsonserver import JsonHandler, running
from rich.console import Console

from step_ray.config import parse_config
from step_ray.evaluation.outside import OutsideModel, evaluate_outside
from step_ray.progress import Reporter
from step_ray.stages.summary import gather
from step_ray.store import read_trajectories
from step_ray.types import StopReason

pytestmark = pytest.mark.usefixtures("ray_cluster")
ANSWER = "Thought: I look around.\nAction: look"


class Endpoint(JsonHandler):
    """Serves the model `org/looks`, which always looks; the server keeps keys and models."""

    def do_GET(self):
        self.reply({"object": "list", "data": [{"id": "org/looks", "object": "model"}]})

    def do_POST(self):
        body = self.read()
        self.server.seen.add((self.headers["Authorization"], body["model"]))
        self.server.num_requests += 1
        message = {"role": "assistant", "content": ANSWER}
        self.reply(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14},
            }
        )


@pytest.fixture
def server():
    with running(Endpoint, seen=set(), num_requests=0) as server:
        yield server


def test_it_plays_every_held_out_task_once_and_is_in_the_report(server, tmp_path):
    config = parse_config(
        {
            "name": "r",
            "output_dir": str(tmp_path),
            "student": {"init": "/no/model"},
            "env": {"max_steps": 3, "generator": {"size": "tiny"}},
            "tasks": {"num_expert": 2, "num_collect": 2, "num_eval": 3},
        }
    )
    model = OutsideModel(
        base_url=f"http://127.0.0.1:{server.server_port}/v1",
        model="org/looks",
        api_key_env="STEP_RAY_TEST_KEY",  # set in tests/conftest.py, before Ray starts
    )
    for _ in range(2):
        evaluate_outside(config, model, Reporter(Console(file=io.StringIO())))
    assert server.seen == {("Bearer any", "org/looks")}
    assert server.num_requests == 1 + 9  # one word, before any work
    trajectories = read_trajectories(tmp_path / "r" / "evaluate" / "org-looks")
    assert [t.stop_reason for t in trajectories] == [StopReason.MAX_STEPS] * 3
    assert [t.models["student"] for t in trajectories] == ["org/looks"] * 3
    assert [report.model for report in gather(config).evals] == ["org-looks"]
