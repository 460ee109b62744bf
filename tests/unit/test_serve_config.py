"""The settings of the served agent, and the application that they give; nothing is started."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

import step_ray.serve
from step_ray.config import parse_config
from step_ray.errors import ConfigError
from step_ray.serve import ServeArgs, build_app
from step_ray.serving.config import AgentConfig, ServeConfig

JOBS = Path(__file__).parents[2] / "jobs"


def test_the_agent_is_bound_to_this_machine_by_default():
    assert ServeConfig().host == "127.0.0.1"


def test_the_file_for_serve_deploy_gives_an_application():
    data = yaml.safe_load((JOBS / "serve.yaml").read_text())
    (app,) = ServeDeploySchema.model_validate(data).applications
    assert app.import_path == "step_ray.serve:build_app"
    args = ServeArgs(**app.args)
    assert args.agent.envs["alfworld"].prompt == args.agent.prompt == "alfworld_short"
    assert isinstance(build_app(args), ray_serve.Application)


def test_serve_build_finds_an_application(monkeypatch):
    monkeypatch.setenv("STEP_RAY_MODEL_DIR", "builtin:tiny-base")
    assert isinstance(step_ray.serve.app, ray_serve.Application)
    with pytest.raises(AttributeError, match="no attribute 'apps'"):
        step_ray.serve.apps  # noqa: B018


@pytest.mark.parametrize("value", ["", ",", " , "])
def test_a_variable_without_a_key_is_refused(monkeypatch, value):
    monkeypatch.setenv("STEP_RAY_KEYS", value)
    with pytest.raises(ConfigError, match=r"serve.api_key_env: 'STEP_RAY_KEYS' is not set"):
        build_app(ServeArgs(model_dir="builtin:tiny-base", api_key_env="STEP_RAY_KEYS"))


def test_replicas_come_by_load_until_batches_are_not_more_than_full():
    args = ServeArgs(model_dir="m", max_batch_size=24, autoscaling={"max_replicas": 3})
    options = args.replica_options()
    scaling = AutoscalingConfig(**options["autoscaling_config"])
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert scaling.target_ongoing_requests == 24
    assert "num_replicas" not in options


@pytest.mark.parametrize(
    ("serve", "line"),
    [
        ({"autoscaling": {}}, r"^serve.autoscaling.max_replicas: "),
        (
            {"autoscaling": {"min_replicas": 3, "max_replicas": 2}},
            "max_replicas: 2 is less than min_replicas: 3",
        ),
        (
            {"num_replicas": 2, "autoscaling": {"max_replicas": 2}},
            "num_replicas: 2 beside autoscaling; give one of the two",
        ),
    ],
)
def test_contradicting_numbers_of_replicas_are_refused(serve, line):
    with pytest.raises(ConfigError, match=line):
        parse_config({"name": "x", "serve": serve})


def test_an_unknown_setting_of_the_agent_is_refused():
    with pytest.raises(ConfigError, match=r"^serve.agent.promt: unknown key"):
        parse_config({"name": "x", "serve": {"agent": {"promt": "a"}}})
    with pytest.raises(ValidationError):
        ServeArgs(model_dir="m", agent={"envs": {"alfworld": {"max_step": 1}}})


def test_a_served_run_plays_its_own_environment_apart_from_its_own_games():
    config = parse_config(
        {
            **{"name": "demo", "output_dir": "/runs"},
            "env": {"prompt": "alfworld_short", "max_steps": 16},
            "tasks": {"num_eval": 7},
            "collect": {"max_new_tokens": 48, "max_format_errors": 2},
            "teacher": {"when": "before_execution"},
            "evaluate": {"concurrency": 256},
        }
    )
    agent = config.served.agent
    assert (agent.prompt, agent.envs, agent.before_execution) == (
        "alfworld_short",
        {"alfworld": config.env},
        True,
    )
    assert (agent.work_dir, agent.num_generated) == ("/runs/demo/serve", 7)
    assert (agent.max_new_tokens, agent.max_format_errors, agent.max_concurrency) == (48, 2, 256)


def test_what_is_said_of_the_agent_wins_over_the_run():
    env = {"max_steps": 3}
    mine = {"prompt": "mine", "work_dir": "/w", "envs": {"alfworld": env}, "max_concurrency": 5}
    config = parse_config({"name": "x", "env": {"max_steps": 16}, "serve": {"agent": mine}})
    agent = config.served.agent
    assert (agent.prompt, agent.work_dir, agent.max_concurrency) == ("mine", "/w", 5)
    assert agent.envs["alfworld"].max_steps == 3


def test_an_agent_plays_all_official_games_of_a_split():
    official = {"source": "official", "data_dir": "/data"}
    config = parse_config({"name": "x", "env": official, "tasks": {"num_eval": "all"}})
    assert config.served.agent.num_generated == AgentConfig().num_generated


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("envs", {"alfworld": {"max_steps": 3}}),
        ("max_format_errors", 9),
        ("num_generated", 1),
        ("max_episodes", 8),
        ("episode_timeout_s", 9.0),
        ("before_execution", True),
    ],
)
def test_an_agent_that_would_play_something_else_than_is_recorded_is_refused(key, value):
    settings = {"name": "x", "serve": {"agent": {key: value}}}
    parse_config(settings)
    with pytest.raises(ConfigError, match=f"serve.agent.{key}: differs from what the run's"):
        parse_config({**settings, "evaluate": {"where": "agent"}})


def test_an_agent_that_plays_the_evaluation_may_play_other_environments_too():
    agent = {"envs": {"webshop": {"name": "webshop"}}, "prompt": "mine", "max_concurrency": 4}
    parse_config({"name": "x", "serve": {"agent": agent}, "evaluate": {"where": "agent"}})
