"""The whole line on tiny models: tasks, expert, training, collection, evaluation, report."""

import io
import json
import re
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import uvicorn
import yaml
from fastapi import FastAPI, Request
from rich.console import Console

from step_ray.collection.runner import Address
from step_ray.config import ScratchConfig, parse_config
from step_ray.dataset import read_examples
from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.envs.alfworld.judge import judge
from step_ray.errors import RunStateError
from step_ray.evaluate import evaluate
from step_ray.pipeline import run
from step_ray.progress import Reporter
from step_ray.serve import deploy
from step_ray.store import read_json, read_trajectories
from step_ray.training.student import new_model, save_student, train_tokenizer
from step_ray.types import Author, Source, StepKind

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = {
    "name": "scratch",
    "student": {
        "init": "scratch",
        "max_length": 2048,
        "scratch": {"vocab_size": 400, "hidden_size": 32, "num_layers": 1, "num_heads": 2},
    },
    "env": {"prompt": "alfworld_short", "max_steps": 6, "generator": {"size": "tiny"}},
    "tasks": {
        **{"num_expert": 8, "num_collect": 8},
        **{"num_eval": 3, "eval_split": ["valid_seen", "valid_unseen"]},
    },
    "train": {"epochs": 1, "batch_tokens": 4096},
    "collect": {"max_new_tokens": 8},
    "dataset": {"keep": "all"},
    "arms": {
        "golden_only": {"golden_collect": True, "match": "trajectories"},
        "step": {"self_reflected": True},
    },
    "serve": {"port": 0},
}
pytestmark = pytest.mark.usefixtures("ray_cluster")


def start(config, **options):
    """Run the line and give what it has printed."""
    out = io.StringIO()
    run(config, Reporter(Console(file=out, width=200)), **options)
    return out.getvalue()


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def stops(trajectories):
    return Counter(trajectory.stop_reason.value for trajectory in trajectories)


@pytest.fixture(scope="module")
def line(ray_cluster, tmp_path_factory):
    """A finished line from scratch: its settings, its config and its output."""
    settings = {**SCRATCH, "output_dir": str(tmp_path_factory.mktemp("runs"))}
    config = parse_config(settings)
    return settings, config, start(config)


def test_every_stage_is_done_once_and_in_order(line):
    _, _, out = line
    started = re.findall(r"start +(\S+)", out)
    assert started == [
        *("tasks", "expert", "student", "dataset:base", "train:base", "collect"),
        *("dataset:golden_only", "train:golden_only", "dataset:step", "train:step"),
        *("evaluate:base", "evaluate:golden_only", "evaluate:step", "report"),
    ]
    assert re.findall(r"done +(\S+)", out) == started


def test_golden_and_self_reflected_trajectories_are_what_they_say(line):
    folder = line[1].run_dir / "trajectories"
    golden = read_trajectories(folder / "golden")
    assert (len(golden), {t.source for t in golden}) == (8, {Source.EXPERT})
    collected = read_trajectories(folder / "collect")
    assert (len(collected), {t.source for t in collected}) == (8, {Source.SELF_REFLECTED})
    steps = [step for t in collected for step in t.steps]
    assert {s.author for s in steps if s.kind is StepKind.CORRECTION} == {Author.TEACHER}
    assert all(s.verdict is not None for s in steps if s.author is Author.STUDENT)
    assert {t.models["student"] for t in collected} == {"base"}
    assert not {t.task.task_id for t in golden} & {t.task.task_id for t in collected}


def test_the_step_arm_reads_its_errors_and_does_not_learn_them(line):
    folder = line[1].run_dir / "datasets"
    step = read_json(folder / "step" / "summary.json")
    golden = read_json(folder / "golden_only" / "summary.json")
    assert step["by_source"] == {"expert": 8, "self_reflected": 8}
    assert step["num_masked_tokens"] > 0
    assert golden["num_masked_tokens"] == 0
    assert (golden["match_target"], golden["match_reached"]) == (8, 8)


def test_every_model_has_played_every_held_out_task(line):
    folder = line[1].run_dir
    for model in ("base", "golden_only", "step"):
        played = read_trajectories(folder / "evaluate" / model)
        assert (len(played), {t.models["student"] for t in played}) == (6, {model})
        assert not stops(played).keys() & {"env_error", "llm_error", "timeout"}
        report = read_json(folder / "stages" / f"evaluate.{model}.json")["summary"]
        counts = ("num_success", "num_failed", "num_truncated", "num_errors")
        assert sum(report[name] for name in counts) == report["num_tasks"] == 6


def test_where_the_agent_is_the_same_episodes_are_played(line, tmp_path, monkeypatch):
    monkeypatch.setenv("STEP_RAY_TEST_KEY", "sesame, old-sesame")
    config = line[1]
    folder = config.run_dir
    more = {"num_replicas": 2, "api_key_env": "STEP_RAY_TEST_KEY"}
    served = config.served.model_copy(update=more)
    config = config.model_copy(update={"serve": served})
    endpoint = deploy(str(folder / "models/step"), "step", served, max_length=2048)
    try:
        report = evaluate(
            config,
            Address(
                base_url=endpoint.base_url,
                model="step",
                api_key_env="STEP_RAY_TEST_KEY",
                has_many_keys=True,
            ),
            tasks_file=folder / "tasks/evaluate.parquet",
            out_dir=tmp_path,
            where="agent",
        )
    finally:
        endpoint.close()
    asked, there = (
        {
            t.trajectory_id: (t.task, t.stop_reason, [(s.text, s.observation) for s in t.steps])
            for t in read_trajectories(place)
        }
        for place in (folder / "evaluate/step", tmp_path)
    )
    assert there == asked
    assert report.num_tasks == len(there) == 6


def test_the_report_names_every_arm(line):
    folder = line[1].run_dir
    page = (folder / "report" / "index.html").read_text()
    assert all(arm in page for arm in ("base", "golden_only", "step"))
    rows = json.dumps(read_json(folder / "summary.json"))
    assert all(f'"{arm}"' in rows for arm in ("base", "golden_only", "step"))


def test_the_run_says_how_it_was_made(line):
    folder = line[1].run_dir
    record = read_json(folder / "run.json")
    assert parse_config(record["config"]) == line[1]
    assert parse_config(yaml.safe_load((folder / "config.yaml").read_text())) == line[1]
    assert {"ray", "torch", "transformers", "python"} <= record["starts"][0]["versions"].keys()


def test_a_second_run_does_nothing(line):
    before = snapshot(line[1].run_dir)
    assert "every stage is done already" in start(line[1])
    assert snapshot(line[1].run_dir) == before


def test_a_changed_key_is_refused_and_named(line):
    settings, config, _ = line
    before = snapshot(config.run_dir)
    changed = parse_config({**settings, "collect": {"max_new_tokens": 9}})
    with pytest.raises(RunStateError) as caught:
        start(changed)
    assert str(caught.value) == (
        f"run folder '{config.run_dir}': stage collect was made with other settings"
        " (collect.max_new_tokens was 8, is 9); take another name, or --redo to make it again"
    )
    assert snapshot(config.run_dir) == before


def test_a_setting_of_speed_only_may_change(line):
    settings, _, _ = line
    collect = {"max_new_tokens": 8, "num_actors": 2, "episodes_per_actor": 3}
    assert "every stage is done already" in start(parse_config({**settings, "collect": collect}))


def test_redo_makes_again_what_has_changed_and_keeps_the_old(line):
    settings, config, _ = line
    changed = parse_config({**settings, "evaluate": {"confidence": 0.9}})
    out = start(changed, redo=True)
    assert re.findall(r"start +(\S+)", out) == ["report"]
    (old,) = (config.run_dir / "replaced").glob("*-report")
    assert (old / "report" / "index.html").is_file()
    assert (config.run_dir / "report" / "index.html").is_file()


@pytest.mark.slow
def test_rejection_fine_tuning_needs_no_teacher_and_leaves_held_out_tasks_alone(
    ray_cluster, tmp_path
):
    settings = {
        "name": "rft",
        "output_dir": str(tmp_path),
        "student": {"init": "builtin:tiny-base", "max_length": 2048},
        "env": {"prompt": "alfworld_short", "max_steps": 12, "generator": {"size": "tiny"}},
        "tasks": {"num_expert": 8, "num_collect": 8, "num_eval": 2},
        "train": {"epochs": 1, "learning_rate": 3e-4, "batch_tokens": 2048, "lora_rank": 4},
        "train_arm": {"export": "adapter", "validate_every": 1, "select": "best"},
        "own": {"num_samples": 3, "temperature": 0.5},
        "collect": {"max_new_tokens": 48},
        "dataset": {"validation_tasks": 2},
        "arms": {"rft": {"own_success": True}},
        "serve": {"port": 0},
        "evaluate": {"where": "agent"},
    }
    config = parse_config(settings)
    out = start(config)

    assert "collect" not in re.findall(r"start +(\S+)", out)
    own = read_trajectories(config.run_dir / "trajectories" / "own")
    assert (len(own), {t.source for t in own}) == (24, {Source.STUDENT})
    assert {t.models["student"] for t in own} == {"base"}
    assert len({t.seed for t in own}) == 3
    summary = read_json(config.run_dir / "datasets" / "rft" / "summary.json")
    held_out = {t.task.task_id for t in read_trajectories(config.run_dir / "trajectories/golden")}
    assert summary["by_source"]["expert"] == len(held_out) - 2 == 6
    assert summary["num_validation"] == 2
    won = [t for t in own if t.success]
    assert won
    trained = read_examples(config.run_dir / "datasets" / "rft")
    names = {e.trajectory_id for e in trained if e.source == "student"}
    assert names
    assert names <= {t.trajectory_id for t in won}
    validated = read_examples(config.run_dir / "datasets" / "rft" / "validation")
    assert not {e.trajectory_id for e in validated} & {e.trajectory_id for e in trained}
    assert (config.run_dir / "models" / "rft" / "adapter_config.json").is_file()
    played = read_trajectories(config.run_dir / "evaluate" / "rft")
    assert {t.models["student"] for t in played} == {"rft"}
    assert "validation loss" in (config.run_dir / "report" / "index.html").read_text()


# The settings of the shipped config for the reference models, without GPU and vLLM


def make_teacher_app(requests):
    """An OpenAI-compatible server whose model is the rule judge; every fifth answer is broken."""
    app = FastAPI()

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": "judge", "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        body = await request.json()
        requests.append(body)
        asked_again = body["messages"][-1]["content"].startswith("That cannot be used")
        text = "Hm." if len(requests) % 5 == 0 and not asked_again else answer(body["messages"])
        message = {"role": "assistant", "content": text}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }

    return app


def answer(messages):
    """The verdict on the step in a question of `judging.teacher_messages`, or a word."""
    if len(messages) == 1:
        return "ok"
    first, *records = [json.loads(line) for line in messages[1]["content"].split("\n")]
    *history, (action, observation) = [
        (re.search(r"(?:Action: (.*))?\Z", record["agent"])[1] or "", record["observation"])
        for record in records
        if "step" in record
    ]
    verdict = judge(first["first_observation"], history, action, observation)
    fields = ("reflection", "thought", "action")
    return json.dumps({"verdict": verdict.label, **{f: getattr(verdict, f) for f in fields}})


@pytest.fixture
def teacher():
    """Address and requests of a running teacher."""
    requests = []
    config = uvicorn.Config(make_teacher_app(requests), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1", requests
    server.should_exit = True
    thread.join()


def reference_settings(tmp_path, base_url):
    """jobs/configs/alfworld_llama2_7b.yaml with a tiny model and few games, on CPU."""
    settings = yaml.safe_load((ROOT / "jobs/configs/alfworld_llama2_7b.yaml").read_text())
    settings["output_dir"] = str(tmp_path / "runs")
    settings["student"]["init"] = str(tmp_path / "llama")
    settings["tasks"] |= {"num_expert": 6, "num_collect": 6, "num_eval": 4}
    settings["teacher"] |= {"base_url": base_url, "model": "judge", "max_corrections": 40}
    settings["teacher"]["reference"] = True
    # set in tests/conftest.py: actors read it where they run, so it is there before Ray starts
    settings["teacher"]["api_key_env"] = "STEP_RAY_TEST_KEY"
    settings["train"] |= {"num_workers": 1, "use_gpu": False, "epochs": 1}
    settings["collect"] |= {"num_actors": 1, "max_new_tokens": 8}
    settings["serve"] |= {"engine": "transformers", "gpus_per_replica": 0, "port": 0}
    settings["arms"] = {
        name: settings["arms"][name] for name in ("golden_same_tokens", "step_replace")
    }
    return settings


@pytest.mark.slow
def test_official_games_a_model_folder_and_a_teacher_behind_http(tmp_path, teacher, monkeypatch):
    base_url, requests = teacher
    for split, num_games in (("train", 12), ("valid_seen", 4), ("valid_unseen", 4)):
        spec = GeneratorSpec(seed=0, split=split, num_games=num_games, size="tiny")
        generate_games(spec, tmp_path / "alfworld")
    tokenizer = train_tokenizer(["You are in the middle of a room. Thought: Action: go to"], 400)
    shape = ScratchConfig(vocab_size=400, hidden_size=32, num_layers=1, num_heads=2)
    model = new_model(tokenizer, shape, max_length=4096, seed=0)
    save_student(tmp_path / "llama", model, tokenizer)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "alfworld"))
    config = parse_config(reference_settings(tmp_path, base_url))

    start(config)

    collected = read_trajectories(config.run_dir / "trajectories" / "collect")
    assert stops(collected) == {"success": 6}  # the corrections alone lead to the goal
    assert {t.models["teacher"] for t in collected} == {"judge"}
    probe, *asked = requests
    assert "response_format" not in probe  # one word, before any work
    assert sum(t.usage.teacher_calls for t in collected) == len(asked)
    judged = sum(step.verdict is not None for t in collected for step in t.steps)
    assert len(asked) > judged  # broken answers were asked for again
    assert {request["response_format"]["type"] for request in asked} == {"json_schema"}
    questions = [request["messages"][1]["content"] for request in asked]
    assert all('"known_good_actions"' in question for question in questions)
    step = read_json(config.run_dir / "datasets" / "step_replace" / "summary.json")
    assert step["by_source"] == {"expert": 5, "self_reflected": 5}  # one of each is held out
    assert step["num_validation"] == 2
    assert step["num_masked_tokens"] == 0  # the errors are not in the text
    page = (config.run_dir / "report" / "index.html").read_text()
    assert all(arm in page for arm in ("base", "golden_same_tokens", "step_replace"))
