"""The command line: a wrong input is one clear line, exit code 2, and nothing on disk."""

import asyncio
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from jsonserver import JsonHandler, running
from run_folders import small_config, write_small_run

from step_ray import __version__
from step_ray.cli import run_as_job
from step_ray.config import ScratchConfig, load_config
from step_ray.envs.alfworld.env import AlfworldEnv
from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.errors import ConfigError, DataError, TemplateError
from step_ray.pipeline import plan_lines
from step_ray.progress import Reporter
from step_ray.rollout import EpisodeSettings, run_episode
from step_ray.stages.base import StageContext
from step_ray.stages.line import build_stages
from step_ray.storage.runfolder import RunFolder
from step_ray.store import write_shard
from step_ray.teacher import ExpertStudent
from step_ray.training.student import CHAT_TEMPLATE, new_model, save_student, train_tokenizer
from step_ray.types import Source, StopReason, Task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path):
    """Writes a config; keys given replace those of a small run that needs no model."""

    def write(**sections):
        path = tmp_path / "config.yaml"
        data = {"name": "r", "student": {"init": "scratch"}} | sections
        path.write_text(yaml.safe_dump(data))
        return path

    return write


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refusal(outcome):
    """The one line of a refused command that has written nothing."""
    code, out, lines = outcome
    assert (code, out, len(lines)) == (2, "", 1)
    assert list(Path.cwd().iterdir()) == []
    assert lines[0].startswith("step-ray: ")
    return lines[0].removeprefix("step-ray: ")


# Reports of runs, wherever their folders are now


def test_the_folder_of_a_run_is_reported_in_one_file(step_ray, tmp_path):
    config = write_small_run(small_config(tmp_path / "runs"))
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (config.run_dir / "run.json").write_text('{"starts": [{}]}')
    moved = (tmp_path / "runs").rename(tmp_path / "archive") / config.name
    code, _, err = step_ray("report", moved, "-o", tmp_path / "one.html", "evaluate.confidence=0.9")
    assert (code, err) == (0, [])
    page = (tmp_path / "one.html").read_text()
    assert "90 % Wilson interval" in page
    assert 'id="chunk-0"' in page
    assert not (moved / "report").exists()


def test_a_folder_without_a_run_is_refused(step_ray, tmp_path):
    assert refusal(step_ray("report", tmp_path, "-o", "one.html")).startswith("config: ")


# Wrong input, seen before any work


def test_a_replica_that_has_no_place_here_is_refused_and_not_waited_for(step_ray, config):
    path = config(serve={"cpus_per_replica": 9}, ray={"num_cpus": 4})
    assert refusal(step_ray("serve", path)) == (
        "serve.num_replicas: 1 x (9 CPU) does not fit; the cluster has 4 CPU, 0 GPU;"
        " lower it or use a larger cluster"
    )


def test_an_unknown_key(step_ray, config):
    path = config(train={"lr": 1})
    assert refusal(step_ray("run", path)).startswith(
        "train.lr: unknown key; use one of ['attention'"
    )


def test_an_unknown_key_in_an_override(step_ray, config):
    assert refusal(step_ray("run", config(), "--set", "seeds=1")).startswith("seeds: unknown key")


def test_a_missing_config_file(step_ray):
    assert refusal(step_ray("run", "no.yaml")) == (
        "config: 'no.yaml' cannot be read (No such file or directory)"
    )


def test_a_missing_alfworld_folder(step_ray, config, tmp_path):
    games = tmp_path / "games"
    path = config(env={"source": "official", "data_dir": str(games)})
    assert refusal(step_ray("run", path)) == (
        f"env.data_dir: '{games}' holds no json_2.1.1; run alfworld-download or mend it"
    )


def test_an_alfworld_variable_that_is_not_set(step_ray, config, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    assert refusal(step_ray("run", config(env={"source": "official"}))) == (
        "env.data_dir: '${ALFWORLD_DATA}' names a variable that is not set; export it"
    )


@pytest.mark.parametrize(
    ("init", "line"),
    [
        ("./nowhere", "'./nowhere' holds no config.json; give a model folder"),
        ("/no/such/model", "'/no/such/model' holds no config.json; give a model folder"),
        ("builtin:huge", "'builtin:huge' is not shipped with this version"),
    ],
)
def test_a_wrong_model_path(step_ray, config, init, line):
    path = config(student={"init": init})
    assert refusal(step_ray("run", path)) == f"student.init: {line}"


def test_an_unreachable_teacher(step_ray, config, monkeypatch):
    url = f"http://127.0.0.1:{free_port()}/v1"
    path = config(teacher={"kind": "llm", "base_url": url, "model": "m", "api_key_env": "MY_KEY"})
    monkeypatch.setenv("MY_KEY", "any")
    assert refusal(step_ray("run", path)) == (
        f"teacher.base_url: '{url}' cannot be reached; start the server or mend the URL"
    )


@pytest.mark.parametrize("key", [None, ""])
def test_a_teacher_without_key(step_ray, config, monkeypatch, key):
    monkeypatch.delenv("MY_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("MY_KEY", key)
    teacher = {"kind": "llm", "base_url": "http://h/v1", "model": "m", "api_key_env": "MY_KEY"}
    assert refusal(step_ray("run", config(teacher=teacher))) == (
        "teacher.api_key_env: 'MY_KEY' is not set; export the key"
    )


class Gateway(JsonHandler):
    """Lists its models to anybody, and is particular about who asks them what."""

    def do_GET(self):
        self.reply({"object": "list", "data": [{"id": "m", "object": "model"}]})

    def do_POST(self):
        body = self.read()
        self.server.asked.append(body["max_tokens"])
        if self.headers["authorization"] != "Bearer right":
            self.reply({"error": {"message": "unknown key"}}, 401)
        elif body["max_tokens"] > 4000:
            words = "This model's maximum context length is 4096 tokens"
            self.reply({"error": {"message": words}}, 400)
        else:
            self.reply({"error": {"message": "no such deployment"}}, 404)


@pytest.fixture
def gateway():
    with running(Gateway, asked=[]) as server:
        yield server


@pytest.mark.parametrize(
    ("key", "teacher", "line"),
    [
        (
            "wrong",
            {},
            "teacher.base_url: 'URL' refuses a chat request; check the key and the model",
        ),
        ("right", {}, "teacher.model: URL has no 'm' (HTTP 404: Error code: 404 - no such"),
        ("right", {"model": "n"}, "teacher.model: 'n' is not served at URL; it has ['m']"),
        ("right", {"max_tokens": 5000}, "teacher.max_tokens: 5000 do not fit the context of 'm'"),
    ],
)
def test_a_teacher_that_would_refuse_every_call(
    step_ray, config, monkeypatch, gateway, key, teacher, line
):
    url = f"http://127.0.0.1:{gateway.server_port}/v1"
    monkeypatch.setenv("MY_KEY", key)
    address = {"kind": "llm", "base_url": url, "model": "m", "api_key_env": "MY_KEY"}
    path = config(teacher={**address, **teacher})
    assert refusal(step_ray("run", path)).replace(url, "URL").startswith(line)


def test_a_served_student_that_would_refuse_every_call(step_ray, config, gateway):
    url = f"http://127.0.0.1:{gateway.server_port}/v1"
    path = config(collect={"endpoint": {"base_url": url, "model": "m"}})
    assert (
        refusal(step_ray("run", path))
        .replace(url, "URL")
        .startswith(
            "collect.endpoint.base_url: 'URL' refuses a chat request; check the key and the model"
        )
    )


def test_a_dry_run_asks_for_no_reply(step_ray, config, gateway):
    url = f"http://127.0.0.1:{gateway.server_port}/v1"
    code, _, _ = step_ray(
        "run", config(collect={"endpoint": {"base_url": url, "model": "m"}}), "--dry-run"
    )
    assert (code, gateway.asked) == (0, [])


@pytest.mark.parametrize("limit", ["calls=0", "tokens=0", "money=0"])
def test_a_budget_of_nothing(step_ray, config, limit):
    name, _ = limit.split("=")
    line = refusal(step_ray("run", config(), "--set", f"teacher.budget.{limit}"))
    assert line.startswith(f"teacher.budget.{name}: Input should be greater than")


def test_a_turn_that_leaves_no_room_for_a_prompt(step_ray, config):
    path = config(student={"init": "scratch", "max_length": 256})
    assert refusal(step_ray("run", path)) == (
        "collect.max_new_tokens: 256 leaves no room for a prompt in student.max_length 256; lower"
        " it"
    )


def test_more_actors_at_first_than_at_most(step_ray, config):
    assert refusal(step_ray("run", config(collect={"min_actors": 2}))).startswith(
        "collect: collect.min_actors 2 is more than collect.num_actors 1; raise num_actors"
    )


def test_a_label_that_a_local_cluster_has_not(step_ray, config):
    assert refusal(step_ray("run", config(collect={"node_labels": {"role": "cpu"}}))) == (
        "collect.node_labels: no node of the cluster has role: cpu (there: none);"
        " label nodes with `ray start --labels`, or mend the setting"
    )


@pytest.mark.parametrize("key", ["env.prompt", "teacher.prompt"])
def test_an_unknown_prompt(step_ray, config, key):
    line = refusal(step_ray("run", config(), "--set", f"{key}=v9"))
    assert line.startswith("prompt: 'v9' is not a known prompt version; use one of ['alf")


def test_an_unknown_environment(step_ray, config):
    line = refusal(step_ray("run", config(env={"name": "kitchen"})))
    known = ["alfworld", "scienceworld", "webshop"]
    assert line == f"env.name: 'kitchen' is not known; use one of {known}"


@pytest.mark.parametrize("command", ["dataset", "train", "evaluate"])
def test_an_unknown_arm(step_ray, config, command):
    assert refusal(step_ray(command, config(), "--arm", "steps")) == (
        "--arm: 'steps' is not an arm; use one of ['base', 'golden_only', 'step', 'step_no_mask']"
    )


def test_more_cpus_than_there_are(step_ray, config):
    ray, train = {"num_cpus": 4}, {"cpus_per_worker": 5}
    assert refusal(step_ray("run", config(ray=ray, train=train))) == (
        "train.num_workers: 1 x (5 CPU) does not fit; the cluster has 4 CPU, 0 GPU;"
        " lower it or use a larger cluster"
    )


def test_a_report_without_a_run(step_ray, config):
    assert refusal(step_ray("report", config())) == (
        "name: there is no run in 'runs/r'; start it with `step-ray run`"
    )


def test_showing_what_is_not_there(step_ray):
    assert refusal(step_ray("show", "nowhere")) == (
        "trajectories: no folder 'nowhere'; collect first or give another"
    )


# A run folder that holds other work


def done_tasks(path, **settings):
    """A run folder in which the stage `tasks` is done."""
    resolved = load_config(path)
    stage = build_stages(resolved)[0]
    RunFolder(resolved.run_dir).finish(
        "tasks", {**stage.settings, **settings, "needs": {}}, {}, seconds=1.0
    )
    return resolved.run_dir


def test_a_changed_key_is_refused_and_named(step_ray, config):
    folder = done_tasks(config())
    before = sorted(folder.rglob("*"))
    code, out, lines = step_ray("run", config(), "--set", "tasks.num_eval=7")
    assert (code, out) == (2, "")
    assert lines == [
        "step-ray: run folder 'runs/r': stage tasks was made with other settings"
        " (tasks.num_eval was 100, is 7); take another name, or --redo to make it again"
    ]
    assert sorted(folder.rglob("*")) == before


def test_a_stage_whose_needs_are_not_done_is_refused_before_ray_starts(step_ray, config):
    assert refusal(step_ray("train", config(), "--arm", "step")) == (
        "stage train:step needs dataset:step, train:base; run `step-ray run` or that stage first"
    )


# What only a running stage can see; the stage is called without Ray


BROKEN_TEMPLATE = CHAT_TEMPLATE.replace(
    "m['content']", "m['content'] if loop.last else m['content'].split('Action:')[-1]"
)
"""Renders earlier answers without their thought, as some reasoning models do."""


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """One trajectory of the expert."""
    spec = GeneratorSpec(
        seed=0,
        split="train",
        num_games=1,
        size="tiny",
        task_types=("pick_clean_then_place_in_recep",),
    )
    (path,) = generate_games(spec, tmp_path_factory.mktemp("games"))
    task = Task(task_id="t", env="alfworld", split="train", goal="", params={"game": str(path)})
    return asyncio.run(
        run_episode(
            task,
            AlfworldEnv(),
            ExpertStudent(task),
            settings=EpisodeSettings(prompt="alfworld_short"),
            source=Source.EXPERT,
        )
    )


def build_base_dataset(path, trajectory, tmp_path, template=CHAT_TEMPLATE):
    tokenizer = train_tokenizer([step.text for step in trajectory.steps], 300)
    tokenizer.chat_template = template
    shape = ScratchConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2)
    model = new_model(tokenizer, shape, max_length=4096, seed=0)
    save_student(tmp_path / "model", model, tokenizer)
    resolved = load_config(path, [f"student.init={tmp_path / 'model'}", f"output_dir={tmp_path}"])
    write_shard(resolved.run_dir / "trajectories" / "golden", [trajectory])
    (stage,) = [s for s in build_stages(resolved) if s.name == "dataset:base"]
    return stage.run(StageContext(resolved, Reporter()))


def test_a_dataset_is_built_without_ray(config, golden, tmp_path):
    summary = build_base_dataset(config(), golden, tmp_path)
    assert (summary["num_examples"], summary["num_masked_tokens"]) == (1, 0)
    assert (tmp_path / "r" / "datasets" / "base" / "summary.json").is_file()


def test_a_template_that_breaks_the_prefix_rule_is_refused(config, golden, tmp_path):
    with pytest.raises(TemplateError) as caught:
        build_base_dataset(config(), golden, tmp_path, template=BROKEN_TEMPLATE)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"trajectory {golden.trajectory_id!r}: chat template: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r" / "datasets").exists()


def test_an_empty_dataset_is_refused(config, golden, tmp_path):
    lost = replace(golden, success=False, stop_reason=StopReason.MAX_STEPS)
    with pytest.raises(DataError) as caught:
        build_base_dataset(config(), lost, tmp_path)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "dataset: no training examples (golden: 1 trajectories, 1 not successful); collect more"
        " tasks or set dataset.keep: all"
    )
    assert not (tmp_path / "r" / "datasets").exists()


# What works without a run


def test_a_dry_run_shows_plan_and_faults_and_writes_nothing(step_ray, config, tmp_path):
    path = config(student={"init": "./nowhere"}, env={"source": "official", "data_dir": "games"})
    code, out, lines = step_ray("run", path, "--dry-run")
    assert code == 2
    assert lines == ["step-ray: --dry-run: 2 of 5 checks failed, see MISSING above"]
    assert list(Path.cwd().iterdir()) == []
    assert "stage     evaluate:step_no_mask\nstage     report\n" in out
    assert "tasks     300 expert (U1), 300 collect (U2), 100 evaluate (valid_unseen) x 1" in out
    assert "held out  nothing, no validation (dataset.validation_share or" in out
    assert "MISSING   student.init: './nowhere' holds no config.json; give a model folder" in out
    assert "MISSING   env.data_dir: 'games' holds no json_2.1.1;" in out
    assert "ready     environment alfworld\n" in out


@pytest.mark.parametrize("name", ["alfworld", "scienceworld", "webshop"])
def test_the_llama_configs_hold_tasks_out_and_validate_on_the_way(monkeypatch, name):
    for variable in ("ALFWORLD_DATA", "WEBSHOP_DATA"):
        monkeypatch.setenv(variable, "nowhere")
    lines = plan_lines(load_config(ROOT / "jobs" / "configs" / f"{name}_llama2_7b.yaml"))
    line = "held out  0.02 of the tasks of U1 and of U2, validated every 50 steps and at the end"
    assert line in lines


def test_the_printed_plan_is_the_resolved_config(step_ray, config):
    _, out, _ = step_ray("run", config(), "--set", "train.epochs=9", "--dry-run")
    plan = yaml.safe_load(out.partition("\nstage ")[0])
    assert (plan["name"], plan["train"]["epochs"], plan["teacher"]["kind"]) == ("r", 9, "oracle")


def test_the_version(step_ray):
    assert step_ray("version") == (0, f"{__version__}\n", [])


def test_a_config_error_has_exit_code_2_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "--config", "no.yaml", "--redo"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (ConfigError.exit_code, "")
    assert done.stderr == (
        "step-ray: config: 'no.yaml' cannot be read (No such file or directory)\n"
    )


def test_ctrl_c_says_how_to_go_on():
    code = (
        "import sys; from step_ray import cli\n"
        "@cli.app.command()\n"
        "def wait(): raise KeyboardInterrupt\n"
        "sys.argv = ['step-ray', 'wait']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "step-ray: interrupted; the same command goes on from here\n"


def test_every_job_runs_a_command_of_the_command_line():
    from step_ray.cli import app

    commands = {info.name or info.callback.__name__ for info in app.registered_commands}
    called = {
        line.partition('run_as_job("')[2].partition('"')[0]
        for path in (ROOT / "jobs").glob("*.py")
        for line in path.read_text().splitlines()
        if 'run_as_job("' in line
    }
    assert called
    assert called <= commands


# Overrides, and the scripts of jobs/


def test_overrides_come_bare_or_with_set_and_the_bare_ones_win(step_ray, config):
    call = ("run", config(), "train.epochs=8", "--set", "train.epochs=9", "seed=5", "--dry-run")
    _, out, _ = step_ray(*call)
    plan = yaml.safe_load(out.partition("\nstage ")[0])
    assert (plan["train"]["epochs"], plan["seed"]) == (8, 5)


@pytest.mark.parametrize("command", ["run", "expert", "collect", "report"])
def test_a_bare_word_that_is_no_override(step_ray, config, command):
    assert refusal(step_ray(command, config(), "demo")) == (
        "override: 'demo' is not of the form a.b=value"
    )


def test_a_job_passes_overrides_and_flags_on_and_uses_its_own_cluster(
    step_ray, config, monkeypatch, capsys
):
    path = str(config())
    monkeypatch.setattr(
        sys, "argv", ["pipeline.py", "--config", path, "seed=5", "--dry-run", "--set", "name=s"]
    )
    with pytest.raises(SystemExit) as caught:
        run_as_job("run")
    plan = yaml.safe_load(capsys.readouterr().out.partition("\nstage ")[0])
    assert not caught.value.code
    assert (plan["seed"], plan["name"], plan["ray"]["address"]) == (5, "s", "auto")


def test_every_stage_has_a_job():
    called = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    assert called >= {"expert", "dataset", "train", "collect", "evaluate", "report", "serve"}


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_a_job_is_short_because_the_library_does_the_work(path):
    assert len(path.read_text().splitlines()) <= 40
