"""Models that are served elsewhere: what is refused, what defines their evaluation, the report."""

import contextlib
import io
from pathlib import Path

import pytest
import yaml
from jsonserver import JsonHandler, running
from rich.console import Console
from run_folders import played, small_config, write_small_run

from step_ray.cluster import resources
from step_ray.cluster.resources import Node, together
from step_ray.collection.runner import Address
from step_ray.errors import ConfigError, EndpointError, RunStateError
from step_ray.evaluation import outside
from step_ray.evaluation.outside import OutsideModel, check_outside, evaluate_outside, outside_stage
from step_ray.progress import Reporter
from step_ray.stages import line
from step_ray.stages.line import build_stages
from step_ray.stages.summary import gather
from step_ray.store import write_shard

URL = "http://127.0.0.1:9/v1"


def given(**fields):
    return OutsideModel(**{"base_url": URL, "model": "m"} | fields)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-x.1", "gpt-x.1"),
        ("meta-llama/Llama 3", "meta-llama-Llama-3"),
        ("/weights/a/", "weights-a"),
    ],
)
def test_a_model_is_shown_by_its_name_as_a_file_name(model, name):
    assert given(model=model).shown_name == name
    assert given(model=model, name="other").shown_name == "other"


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"name": "step"}, "--name: 'step' is an agent of this run; give another"),
        ({"model": "base"}, "--name: 'base' is an agent of this run; give another"),
        ({"name": "../x"}, "--name: '../x' is no folder name; use letters, digits and . _ -"),
        ({"model": "/"}, "--name: '' is no folder name; use letters, digits and . _ -"),
        ({"base_url": "h:8000"}, "--base-url: 'h:8000' is no address; give http://HOST/v1"),
        (
            {"base_url": "http://u:secret@h/v1"},
            "--base-url: an address with a password or a query; put the key in --api-key-env",
        ),
        ({"api_key_env": "NO_KEY_X"}, "--api-key-env: 'NO_KEY_X' is not set; export the key"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, fields, line):
    with pytest.raises(ConfigError) as caught:
        check_outside(small_config(tmp_path), given(**fields))
    assert str(caught.value) == line


def test_the_key_comes_from_its_variable_and_only_from_there(tmp_path, monkeypatch):
    monkeypatch.setenv("THEIR_KEY", "k1")
    monkeypatch.setenv("OUR_KEY", "k2")
    config = small_config(tmp_path, serve={"api_key_env": "OUR_KEY"})
    assert check_outside(config, given(api_key_env="THEIR_KEY")) == "k1"
    assert check_outside(config, given()) == "none"


@pytest.mark.parametrize(
    "flags", [("--base-url", URL), ("--model", "m"), ("--name", "x"), ("--api-key-env", "K")]
)
def test_flags_that_need_each_other(step_ray, flags):
    Path("c.yaml").write_text(yaml.safe_dump({"name": "r"}))
    code, _, lines = step_ray("evaluate", "c.yaml", *flags)
    assert (code, lines) == (
        2,
        ["step-ray: --base-url and --model: give both, the address and the model there"],
    )


def test_an_address_that_does_not_answer(step_ray):
    Path("c.yaml").write_text(yaml.safe_dump({"name": "r"}))
    code, _, lines = step_ray("evaluate", "c.yaml", "--base-url", URL, "--model", "m")
    assert (code, lines) == (
        2,
        [
            f"step-ray: evaluate.base_url: '{URL}' cannot be reached;"
            " start the server or mend the URL"
        ],
    )
    assert not Path("runs").exists()


def test_the_evaluation_is_that_of_the_own_agents_but_for_the_model(tmp_path):
    config = small_config(tmp_path)
    stage = outside_stage(config, given(model="org/m"))
    own = next(s for s in build_stages(config) if s.name == "evaluate:base")
    assert stage.settings == {**own.settings, "model": "org/m"}
    assert (stage.name, stage.needs, stage.outputs) == (
        "outside:org-m",
        ("tasks",),
        ("evaluate/org-m",),
    )
    moved = outside_stage(config, given(model="org/m", base_url="http://other/v1"))
    assert moved.settings == stage.settings


def test_it_takes_rollout_actors_and_no_replica(tmp_path):
    (demands,) = together(small_config(tmp_path), ["outside:m"])
    assert [d.key for d in demands] == ["collect.cpus_per_actor", "the reader of the task list"]


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluates without Ray and endpoint; gives the calls of the evaluation."""
    monkeypatch.setattr(resources, "cluster_nodes", lambda: [Node(amounts={"CPU": 4.0})])
    monkeypatch.setattr(
        "step_ray.cluster.raysetup.connected", lambda config: contextlib.nullcontext()
    )
    for check in ("check_endpoint", "check_chat"):
        monkeypatch.setattr(outside, check, lambda *args, **options: None)
    calls = []

    def play(config, agent, **options):
        calls.append({"agent": agent, **options})
        return 1

    monkeypatch.setattr(line, "asdict", lambda report: {"num": report})
    monkeypatch.setattr("step_ray.evaluate.evaluate", play)
    # an LLM teacher that cannot be reached, and a student that is not there
    config = small_config(
        tmp_path / "runs",
        student={"init": "/no/model"},
        teacher={"kind": "llm", "base_url": URL, "model": "t"},
        tasks={"num_expert": 2, "num_collect": 2, "num_eval": 2},
    )

    def start(**fields):
        calls.clear()
        evaluate_outside(config, given(**fields), Reporter(Console(file=io.StringIO())))
        return list(calls)

    return start


def test_neither_teacher_nor_student_is_needed_and_a_done_one_is_not_played_again(evaluate):
    (call,) = evaluate(name="x")
    assert call["agent"] == Address(base_url=URL, model="m")
    assert call["where"] == "actors"  # it may have no /v1/episodes
    assert call["out_dir"].parts[-2:] == ("evaluate", "x")
    assert call["tasks_file"].is_file()
    assert evaluate(name="x") == []
    assert len(evaluate(name="y")) == 1
    with pytest.raises(RunStateError, match="stage outside:x was made with other settings"):
        evaluate(name="x", model="m2")


class OnlyOne(JsonHandler):
    """Lists its model, and takes no temperature but 1."""

    def do_GET(self):
        self.reply({"object": "list", "data": [{"id": "m", "object": "model"}]})

    def do_POST(self):
        self.server.asked.append(self.read())
        words = "Unsupported value: 'temperature' does not support 0"
        self.reply({"error": {"message": words}}, 400)


def test_a_call_that_the_endpoint_would_refuse_is_tried_before_any_work(tmp_path):
    config, told = small_config(tmp_path), Reporter(Console(file=io.StringIO()))
    with running(OnlyOne, asked=[]) as server, pytest.raises(EndpointError) as caught:
        evaluate_outside(config, given(base_url=server.url), told)
    (body,) = server.asked
    assert (body["temperature"], body["max_tokens"]) == (0.0, config.collect.max_new_tokens)
    line = str(caught.value).replace(server.url, "URL")
    assert line.startswith("evaluate.base_url: 'URL' refuses a chat request; mend the setting that")
    assert not config.run_dir.exists()


def test_the_report_has_it_as_another_model(tmp_path):
    config = write_small_run(small_config(tmp_path))
    write_shard(config.run_dir / "evaluate" / "gpt-x", [played("a/1", "look")])
    inputs = gather(config)
    assert [report.model for report in inputs.evals] == ["base", "step", "gpt-x"]
    assert inputs.outcomes["gpt-x"] == {"a/1": 1.0}
    assert "gpt-x" not in inputs.datasets
