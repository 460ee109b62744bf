"""With `ray.log_format: json` every line is an object with the ids of run, stage, task, episode."""

import json
import logging
import subprocess
import sys

import openai
import pytest
import yaml
from jsonserver import JsonHandler, running
from ray._common.formatters import JSONFormatter

from step_ray.cluster.logs import LOGGER, JsonReporter, quiet_clients, reporter_for
from step_ray.cluster.raysetup import _logging
from step_ray.collection.runner import EpisodePlan, _log
from step_ray.config import RayConfig, parse_config
from step_ray.progress import Reporter
from step_ray.types import Source, StopReason
from tests.builders import make_trajectory


class Models(JsonHandler):
    """Serves one model."""

    def do_GET(self):
        self.reply({"object": "list", "data": [{"id": "m", "object": "model"}]})


@pytest.fixture
def package_logger():
    logger = logging.getLogger(LOGGER)
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield logger
    logger.handlers, logger.level, logger.propagate = before


def json_lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def config(log_format):
    return parse_config({"name": "r7", "ray": {"log_format": log_format}})


def test_progress_is_json_with_run_and_stage(package_logger, capsys):
    reporter = reporter_for(config("json"))
    reporter.stage = "collect"
    reporter.line("[green]done[/]    collect [dim]in 3 s[/]")
    reporter.line("  [yellow]2 episodes failed[/]")
    with reporter.counter("golden", 3) as counter:
        counter.update(3, "2 won")
    lines = json_lines(capsys)
    assert [(line["levelname"], line["message"]) for line in lines] == [
        ("INFO", "done collect in 3 s"),
        ("WARNING", "2 episodes failed"),
        ("INFO", "golden 3/3 2 won"),
    ]
    assert {(line["run"], line["stage"]) for line in lines} == {("r7", "collect")}


def test_text_is_the_default():
    assert type(reporter_for(config("text"))) is Reporter
    assert not isinstance(reporter_for(config("text")), JsonReporter)


def test_an_error_with_its_traceback_is_one_line(package_logger, capsys):
    reporter_for(config("json"))
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger(f"{LOGGER}.x").exception("failed")
    (line,) = json_lines(capsys)
    assert line["exc_text"].endswith("ValueError: two\nlines")


@pytest.mark.parametrize(
    ("error", "level"), [(None, logging.INFO), ("the engine died", logging.WARNING)]
)
def test_an_episode_is_logged_with_its_ids_in_rays_own_form(error, level, caplog):
    trajectory = make_trajectory(error=error, stop_reason=StopReason.SUCCESS)
    plan = EpisodePlan(source=Source.EXPERT, settings=None, env="alfworld", run="r7")
    with caplog.at_level(logging.INFO, LOGGER):
        _log(plan, trajectory)
    (record,) = caplog.records
    assert record.levelno == level
    line = json.loads(JSONFormatter().format(record))
    assert line["run"] == "r7"
    assert line["task"] == trajectory.task.task_id
    assert line["episode"] == trajectory.trajectory_id
    assert line["stop_reason"] == "success"
    assert ("the engine died" in line["message"]) is bool(error)


def test_calls_of_the_client_that_is_installed_are_not_logged(caplog):
    quiet_clients()
    with running(Models) as server, caplog.at_level(logging.INFO):
        url = f"http://127.0.0.1:{server.server_port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list().data] == ["m"]
    assert caplog.records == []


def test_workers_are_told_the_format():
    assert _logging(RayConfig(log_format="json")).encoding == "JSON"
    assert _logging(RayConfig()) is None


def test_the_error_of_a_run_that_fails_is_json_too(tmp_path):
    path = tmp_path / "c.yaml"
    sections = {"name": "r", "student": {"init": "./nowhere"}, "ray": {"log_format": "json"}}
    path.write_text(yaml.safe_dump(sections))
    code = (
        f"import sys; from step_ray.cli import main; sys.argv = ['s', 'run', {str(path)!r}]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["message"].startswith("student.init: './nowhere' holds no config.json")
