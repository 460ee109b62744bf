"""Files between mirrors and a store: a real S3 server, asked through pyarrow."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import yaml
from builders import make_trajectory
from jsonserver import JsonHandler
from jsonserver import running as serving
from peft import LoraConfig, get_peft_model
from storeserver import KEYS, gcs_server, make_bucket, s3_server

from step_ray.calls.cache import CallCache, Lookup, call_key
from step_ray.calls.desk import TeacherDesk, read_ledger
from step_ray.calls.spending import Spending
from step_ray.cluster.nodes import node_fault, report
from step_ray.collection.teacher_config import TeacherConfig
from step_ray.config import ScratchConfig, TrainConfig, parse_config
from step_ray.envs.alfworld.env import AlfworldEnv
from step_ray.errors import ConfigError, RunStateError, StorageError
from step_ray.llm import Completion
from step_ray.progress import Reporter
from step_ray.serving.vllm_fetch import FetchModels
from step_ray.stages.base import StageContext
from step_ray.stages.line import build_stages
from step_ray.storage import lease
from step_ray.storage.compact import compact
from step_ray.storage.mirror import given_path
from step_ray.storage.objects import check_access, read_bytes, write_bytes
from step_ray.storage.places import mirror, url_of
from step_ray.storage.remote import exists, fetch, held, pull, push, remove, tail
from step_ray.storage.runfolder import RunFolder
from step_ray.storage.runinfo import versions
from step_ray.storage.shardwriter import ShardWriter
from step_ray.store import read_trajectories, write_json, write_shard
from step_ray.tasks import read_tasks
from step_ray.training.export import place_model
from step_ray.training.job import RESULT_FILE, TrainJob
from step_ray.training.model_files import set_base
from step_ray.training.student import (
    check_model,
    load_model,
    load_tokenizer,
    new_model,
    resolve_init,
    save_student,
    train_tokenizer,
)

RUN = "s3://runs/team/demo"
HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Moves this process to a node of a name, which has a cache folder of its own."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)

    def go_to(name):
        monkeypatch.setenv("STEP_RAY_CACHE", str(tmp_path / name))

    go_to("a")
    return go_to


@pytest.fixture
def run(server, node, monkeypatch, request):
    """The mirror of an empty run of the test's own."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    make_bucket(server, "runs")
    return mirror(f"s3://runs/{request.node.name[:40].replace('[', '_')}/demo")


def mirror_of(path):
    """The same place on the node that this process is on now."""
    parts = Path(path).parts
    store = next(i for i, part in enumerate(parts) if part.startswith("s3@"))
    return mirror("s3://" + "/".join(parts[store + 1 :]))


def written(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def texts(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()
    }


def key_of(path):
    return url_of(path).removeprefix("s3://")


def test_what_one_node_pushes_another_fetches(run, node):
    written(run, config="c", models__base__weights="w" * 1000)
    push(run)
    node("b")
    assert fetch(url_of(mirror_of(run)) + "/models").is_dir()
    assert texts(mirror_of(run)) == {"models/base/weights": "w" * 1000}


def test_only_what_is_new_moves(run, server):
    written(run, one="1", two="2")
    push(run)
    before, inode = len(server.asked("PUT")), (run / "one").stat().st_ino
    written(run, two="22", three="3")
    push(run)
    moved = [key for _, key in server.asked("PUT")[before:]]
    assert sorted(moved) == [key_of(run / "three"), key_of(run / "two")]
    pull(run)
    assert (run / "one").stat().st_ino == inode


def test_a_pulled_folder_is_what_the_store_has(run, node):
    written(run, kept="k", gone="g", late="old")
    push(run)
    node("b")
    pull(mirror_of(run))
    there = mirror_of(run)
    written(there, half="h", **{".half.tmp": "under way"})
    node("a")
    remove(run / "gone")
    written(run, late="new text")
    push(run)
    node("b")
    pull(there)
    assert texts(there) == {"kept": "k", "late": "new text", ".half.tmp": "under way"}


def test_the_file_that_says_that_all_are_there_comes_last(run, server):
    written(run, **{f"weights{i}": "w" for i in range(20)}, a_result="r")
    before = len(server.asked("PUT"))
    push(run, last="a_result")
    assert server.asked("PUT")[before:][-1] == ("PUT", key_of(run / "a_result"))
    assert len(server.asked("PUT")) == before + 21


def test_a_file_that_was_written_whole_is_in_the_store(run):
    write_json(run / "stages" / "x.json", {"status": "done"})
    assert read_bytes(url_of(run / "stages" / "x.json")) == b'{\n  "status": "done"\n}\n'


def test_the_end_of_an_object(run):
    written(run, lines="one\ntwo\n")
    push(run)
    assert tail(run / "lines", 4) == b"two\n"
    assert tail(run / "lines", 400) == b"one\ntwo\n"
    with pytest.raises(FileNotFoundError):
        tail(run / "nothing", 4)


FETCH = "import sys; from step_ray.storage.remote import fetch; print(fetch(sys.argv[1]))"


def fetching(url):
    path = os.pathsep.join([str(HERE.parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url], env={**os.environ, "PYTHONPATH": path}
    )


def test_processes_of_a_node_fetch_once(run, node, server):
    written(run, **{f"file{i}": "x" * 10_000 for i in range(20)})
    push(run)
    node("b")
    before = len(server.asked("GET"))
    processes = [fetching(url_of(mirror_of(run))) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    got = Counter(key for _, key in server.asked("GET")[before:] if "file" in key)
    assert set(got.values()) == {1}
    assert len(got) == 20


def test_a_killed_fetch_leaves_whole_files_and_the_next_one_completes_it(run, node):
    written(run, **{f"file{i}": "x" * 100_000 for i in range(80)})
    push(run)
    node("b")
    there = mirror_of(run)
    process = fetching(url_of(there))
    while len(list(there.glob("file*"))) < 8:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    some = list(there.glob("file*"))
    assert len(some) < 80
    assert {path.stat().st_size for path in some} == {100_000}
    fetch(url_of(there))
    assert len(list(there.glob("file*"))) == 80


def test_a_shard_is_in_the_store_as_soon_as_it_is_written(run, node):
    folder = run / "trajectories" / "collect"
    with ShardWriter(folder, rows_per_shard=2) as writer:
        for name in "abc":
            writer.add(make_trajectory(name=name))
        node("b")
        pull(mirror_of(folder))
        assert [t.trajectory_id for t in read_trajectories(mirror_of(folder))] == ["a", "b"]
        node("a")
    node("b")
    pull(mirror_of(folder))
    assert [t.trajectory_id for t in read_trajectories(mirror_of(folder))] == ["a", "b", "c"]


def test_merged_shards_are_there_before_those_that_they_replace_go(run, node, server):
    folder = run / "trajectories" / "collect"
    for name in "abcd":
        write_shard(folder, [make_trajectory(name=name)])
    before = len(server.asked("PUT", "DELETE"))
    assert compact(folder, fan_in=2) == 3
    asked = server.asked("PUT", "DELETE")[before:]
    assert [method for method, _ in asked] == ["PUT", "DELETE", "DELETE"] * 3
    node("b")
    pull(mirror_of(folder))
    assert len(list(mirror_of(folder).glob("*.parquet"))) == 1
    assert [t.trajectory_id for t in read_trajectories(mirror_of(folder))] == list("abcd")


def test_what_is_set_aside_moves_in_the_store_too(run, node):
    folder = RunFolder(run)
    folder.begin("train:step", {"seed": 0})
    written(run, models__step__weights="w")
    push(run)
    write_bytes(url_of(run) + "/train/step/step/checkpoint_1/shard", b"of Ray Train")
    shutil.rmtree(run / "models")  # another node has made it
    folder.set_aside("train:step", [run / "models/step", run / "train/step"])
    (aside,) = (run / "replaced").iterdir()
    assert not exists(run / "models/step/weights")
    assert not exists(run / "stages/train.step.json")
    assert exists(aside / "models/step/weights")
    assert exists(aside / "stages/train.step.json")
    assert read_bytes(url_of(aside) + "/train/step/step/checkpoint_1/shard") == b"of Ray Train"


def test_replies_of_a_teacher_are_shared_by_nodes_and_not_kept_on_them(run, node):
    key, place = call_key("m", "v1", []), url_of(run) + "/cache/teacher"
    reply = Completion(text="yes", finish_reason="stop")
    assert CallCache(place).get(key) == Lookup()
    assert CallCache(place).put(key, reply)
    node("b")
    found = CallCache(place).get(key)
    assert found.reply is not None
    assert (found.reply.text, found.reply.cached) == ("yes", True)
    write_bytes(f"{place}/{key[:2]}/{key}.json", b"{")
    assert CallCache(place).get(key) == Lookup(is_broken=True)
    assert not mirror(place).exists()


def test_a_ledger_outlives_the_node_of_its_desk(run, node):
    place = url_of(run) + "/teacher_ledger.json"
    spent = Spending(calls=3, tokens=50, money=0.5)
    TeacherDesk(TeacherConfig(), spent, place).close()
    node("b")
    assert read_ledger(mirror(place)) == spent
    assert TeacherDesk(TeacherConfig(), Spending(), place).close() == spent


# Who works in a run


def test_who_looks_at_a_run_leaves_alone_what_a_process_of_this_node_is_writing(run, node):
    write_json(run / "run.json", {})
    url = url_of(run)
    with RunFolder(run).locked():
        written(run, tasks__new="not pushed yet")
        assert texts(given_path(url) / "tasks") == {"new": "not pushed yet"}
    with held(run / "train"):  # rank 0
        written(run, train__step__metrics="new")
        given_path(url)
        assert texts(run / "train/step") == {"metrics": "new"}
    given_path(url)
    assert not (run / "tasks/new").exists()
    assert not (run / "train/step/metrics").exists()


def test_a_second_machine_is_refused_and_told_who_works_there(run, node, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.5)
    with RunFolder(run).locked():
        node("b")
        with (
            pytest.raises(RunStateError) as caught,
            RunFolder(mirror_of(run)).locked(),
        ):
            pass
        node("a")
    assert str(caught.value).startswith(
        f"run folder '{url_of(run)}' is in use by another step-ray (process {os.getpid()} on"
        f" {socket.gethostname()}, since "
    )
    node("b")
    with RunFolder(mirror_of(run)).locked():  # given back
        pass


def test_a_lease_that_nobody_renews_ends(run, node, monkeypatch):
    lease._Lease(url_of(run)).take(print)  # and its process is killed
    told = []
    with RunFolder(run).locked(told.append):  # the same node, whose lock is free
        assert told == []
    lease._Lease(url_of(run)).take(print)
    node("b")
    monkeypatch.setattr(lease, "STALE_S", 4.0)
    with RunFolder(mirror_of(run)).locked(told.append):
        (line,) = told
    assert re.fullmatch(r"waits up to [34] s for the lease of process \d+ on \S+, since .*", line)


def test_a_process_that_was_away_and_lost_its_lease_stops(run, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    with pytest.raises(RunStateError, match="process 7 on elsewhere"), RunFolder(run).locked():
        other = b'{"id": "x", "node": "y", "pid": 7, "host": "elsewhere"}'
        for _ in range(20):  # it renews its lease, too: one write may fall into ours
            write_bytes(url_of(run) + "/lease.json", other)
            threading.Event().wait(1)
    assert read_bytes(url_of(run) + "/lease.json").startswith(b'{"id": "x"')


# What travels between nodes


def test_games_dealt_out_on_one_node_are_played_on_another(run, node):
    settings = {
        "name": run.name,
        "output_dir": url_of(run.parent),
        "env": {"generator": {"size": "tiny"}},
        "tasks": {"num_expert": 2, "num_collect": 2, "num_eval": 1},
    }
    config = parse_config(settings)
    assert config.run_dir == run
    build_stages(config)[0].run(StageContext(config, Reporter()))
    push(run / "games")
    node("b")
    pull(mirror_of(run) / "tasks")
    task, other = read_tasks(mirror_of(run) / "tasks/collect.parquet")
    assert task.params["game"].startswith(url_of(mirror_of(run)) + "/games/json_2.1.1/train/")
    assert "Your task is to" in AlfworldEnv().reset(task)
    assert mirror(task.params["game"]).is_file()
    assert not mirror(other.params["game"]).exists()


def test_a_job_finds_its_inputs_on_the_node_of_a_worker(run, node):
    written(run, datasets__step__examples="e", models__base__weights="w")
    push(run)
    job = TrainJob(
        config=TrainConfig(),
        examples_dir=run / "datasets/step",
        init=str(run / "models/base"),
        dtype="float32",
        output_dir=run / "models/step",
        work_dir=run / "train/step",
        seed=0,
        name="step",
    )
    told = json.loads(json.dumps(job.to_nodes()))
    assert TrainJob.on_node(told) == job
    node("b")
    there = TrainJob.on_node(told)
    assert texts(there.examples_dir) == {"examples": "e"}
    assert texts(Path(there.init)) == {"weights": "w"}
    assert there.output_dir == mirror_of(run) / "models/step"
    assert not there.output_dir.exists()
    hub = job.model_copy(update={"init": "meta-llama/Llama-2-7b-chat-hf"})
    assert TrainJob.on_node(hub.to_nodes()).init == "meta-llama/Llama-2-7b-chat-hf"


def test_an_adapter_finds_its_base_on_another_node(run, node):
    tokenizer = train_tokenizer(["go to the desk"], 300)
    shape = ScratchConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=1)
    model = new_model(tokenizer, shape, max_length=64, seed=0)
    save_student(run / "models/base", model, tokenizer)
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = str(run / "models/base")
    adapter.save_pretrained(run / "models/step")
    set_base(run / "models/step", url_of(run / "models/base"))
    tokenizer.save_pretrained(run / "models/step")
    adapter.get_base_model().generation_config.save_pretrained(run / "models/step")
    push(run / "models")
    node("b")
    source = resolve_init(url_of(mirror_of(run)) + "/models/step")
    assert source == str(mirror_of(run) / "models/step")
    assert not (mirror_of(run) / "models/base").exists()
    check_model(source, load_tokenizer(source))
    assert load_model(source, "float32").config.hidden_size == 16


def test_a_model_appears_with_its_result(run, node, server):
    written(run, models__step__old="of another training")
    written(
        run,
        **{"models__.step.partial__weights": "w", "models__.step.partial__" + RESULT_FILE: "{}"},
    )
    place_model(run / "models/.step.partial", run / "models/step")
    assert texts(run / "models/step") == {"weights": "w", RESULT_FILE: "{}"}
    assert server.asked("PUT")[-1] == ("PUT", key_of(run / "models/step" / RESULT_FILE))


def test_a_vllm_replica_fetches_what_it_loads(run, node):
    written(run, models__base__weights="w")
    push(run)
    node("b")
    place = url_of(mirror_of(run)) + "/models/base"
    callback = FetchModels(llm_config=None, places=[place])
    asyncio.run(callback.run_callback("on_before_node_init"))
    assert texts(mirror(place)) == {"weights": "w"}


# What a user names by its address


def test_a_part_of_a_run_by_its_address(run, node):
    write_json(run / "run.json", {"config": {"name": "demo"}})
    write_shard(run / "trajectories/collect", [make_trajectory(name="a")])
    written(run, models__base__config="c", **{"models__base__model.safetensors": "w"})
    push(run)
    node("b")
    part = given_path(url_of(mirror_of(run)) + "/trajectories/collect")
    assert [t.trajectory_id for t in read_trajectories(part)] == ["a"]
    assert (mirror_of(run) / "run.json").is_file()
    assert not (mirror_of(run) / "models").exists()
    whole = given_path(url_of(mirror_of(run)))
    assert [p.name for p in (whole / "models/base").iterdir()] == ["config"]  # no weights
    assert given_path("runs/demo") == Path("runs/demo")
    with pytest.raises(ConfigError, match="PATH: there is no run in 's3://runs/nobody'"):
        given_path("s3://runs/nobody")


def test_commands_take_an_address_where_they_take_a_folder(step_ray, run, node, monkeypatch):
    write_json(run / "run.json", {"config": {"name": "demo"}})
    write_shard(
        run / "trajectories/collect", [make_trajectory(name="a"), make_trajectory(name="b")]
    )
    url = url_of(run)
    node("b")
    for place in (url, f"{url}/trajectories/collect"):
        code, out, _ = step_ray("data", "stats", place, "--json")
        assert (code, json.loads(out)["collect"]["num_episodes"]) == (0, 2)
    code, out, _ = step_ray("show", f"{url}/trajectories/collect", "--index", "1")
    assert (code, out.splitlines()[0]) == (0, "b")
    code, out, lines = step_ray("show", f"{url}/trajectories/nothing")
    assert (code, out, len(lines)) == (2, "", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    code, out, lines = step_ray("show", url)
    assert (code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith(f"step-ray: {url}")
    assert "the store cannot be reached" in lines[0]


# Stores that do not work: one line, soon; those that do


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "student": {"init": "scratch"}}))
    return path


def refused(step_ray, config, place):
    """The line of a refused run, which took less than 30 s."""
    started = time.monotonic()
    code, out, lines = step_ray("run", config, "--set", f"output_dir={place}")
    assert time.monotonic() - started < 30
    assert (code, out, len(lines)) == (2, "", 1)
    assert not any(value in lines[0] for value in KEYS.values() if value.startswith("secret"))
    return lines[0].removeprefix(f"step-ray: output_dir: {place}/r: ")


def test_a_dry_run_looks_at_the_store_and_leaves_nothing(step_ray, config, run, server):
    place = url_of(run.parent)
    _, out, _ = step_ray("run", config, "--dry-run", "--set", f"output_dir={place}")
    assert f"ready     store {place}/r" in out
    assert f"folder    {place}/r" in out
    written = [key for method, key in server.asked("PUT") if run.parent.name in key]
    gone = [key for method, key in server.asked("DELETE") if run.parent.name in key]
    assert written == gone
    assert len(gone) == 1


def test_games_of_a_served_agent_are_in_no_mirror():
    config = parse_config({"name": "r", "output_dir": "s3://bucket/runs"})
    assert config.served.agent.work_dir == ""


def test_a_bucket_that_is_missing(step_ray, config, run):
    del run
    assert refused(step_ray, config, "s3://no-such-bucket/runs").startswith(
        "there is no such bucket; make it, or mend the address"
    )


def test_an_endpoint_where_nothing_listens(step_ray, config, node, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert refused(step_ray, config, "s3://runs/x").startswith("the store cannot be reached;")


@pytest.mark.slow
def test_an_endpoint_that_says_nothing(step_ray, config, node, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert refused(step_ray, config, "s3://runs/x").startswith("the store cannot be reached;")


@pytest.fixture
def strict_server(server, monkeypatch):
    """The server, which now wants keys that it has given out itself."""

    def checks(after):
        request = urllib.request.Request(
            f"{server.url}/moto-api/reset-auth", data=after, headers={"content-type": "text/plain"}
        )
        urllib.request.urlopen(request).close()

    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.replace("127.0.0.1", "localhost"))
    checks(b"0")
    yield
    checks(b"inf")


class Refusal(JsonHandler):
    """Answers as AWS does to who may not; moto knows no requests without a signature."""

    def do_PUT(self):
        self.server.signed.append("authorization" in self.headers)
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("content-type", "application/xml")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


def test_no_credentials_at_all(step_ray, config, node, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with serving(Refusal, signed=[]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.removesuffix("/v1"))
        assert refused(step_ray, config, "s3://runs/x").startswith("access is refused; give cred")
    assert server.signed == [False]


def test_keys_that_the_store_does_not_know(step_ray, config, node, strict_server):
    assert refused(step_ray, config, "s3://runs/x").startswith("access is refused; give creden")


def test_a_node_that_cannot_read_the_store_says_so(run, monkeypatch):
    written(run, seen="")
    push(run / "seen")
    ours = versions()
    assert node_fault(run, [report(url_of(run / "seen"), "a")], ours) is None
    blind = report(url_of(run / "other"), "b")
    assert node_fault(run, [blind], ours) == (
        f"output_dir: '{url_of(run)}' is not seen on b; look at credentials and"
        " AWS_ENDPOINT_URL there"
    )
    url, seen = url_of(run), url_of(run / "seen")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    line = node_fault(mirror(url), [report(seen, "b")], ours)
    assert line.startswith(f"output_dir: '{url}' is not seen on b: {seen}: the store cannot be")


@pytest.mark.slow
def test_a_store_that_goes_away_is_one_line(run, monkeypatch):
    url = url_of(run)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match="the store cannot be reached"):
        write_json(mirror(url) / "stages/x.json", {})


# Google's protocol


def test_the_same_in_a_store_of_google(node, tmp_path, monkeypatch):
    with gcs_server(tmp_path) as google:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
        run = mirror("gs://runs/team/demo")
        with pytest.raises(ConfigError, match="there is no such bucket"):
            check_access(run)
        bucket = json.dumps({"name": "runs"}).encode()
        request = urllib.request.Request(
            f"{google.url}/storage/v1/b?project=p",
            data=bucket,
            headers={"content-type": "application/json"},
        )
        urllib.request.urlopen(request).close()
        check_access(run)
        with RunFolder(run).locked():
            RunFolder(run).begin("collect", {"seed": 0})
            for name in "abc":
                write_shard(run / "trajectories/collect", [make_trajectory(name=name)])
            compact(run / "trajectories/collect", fan_in=2)
        node("b")
        there = fetch("gs://runs/team/demo")
        assert [t.trajectory_id for t in read_trajectories(there / "trajectories/collect")] == [
            *"abc"
        ]
        RunFolder(there).set_aside("collect", [there / "trajectories/collect"])
        assert not (there / "stages/collect.json").exists()
        assert fetch("gs://runs/team/demo/stages").exists() is False or not any(
            (there / "stages").iterdir()
        )
