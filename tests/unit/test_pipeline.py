"""Which stages run, go on, are refused or made again; the stages here count their calls."""

import contextlib
import io
import re

import pytest
from rich.console import Console

from step_ray import pipeline
from step_ray.cluster import resources
from step_ray.cluster.resources import Node
from step_ray.config import parse_config
from step_ray.errors import ConfigError, RunStateError
from step_ray.progress import Reporter
from step_ray.stages.base import Stage, StageContext
from step_ray.stages.line import build_stages
from step_ray.storage.runfolder import DONE, PARTIAL, RunFolder


@pytest.fixture
def line(tmp_path, monkeypatch):
    """Runs `collect -> dataset` with a limit; gives what was printed and made."""
    monkeypatch.setattr(pipeline, "preflight", lambda config, stages, ask: [])
    monkeypatch.setattr(resources, "cluster_nodes", lambda: [Node(amounts={"CPU": 4.0})])
    monkeypatch.setattr(resources, "can_grow", lambda: False)
    monkeypatch.setattr(
        "step_ray.cluster.raysetup.connected", lambda config: contextlib.nullcontext()
    )
    made, summaries = [], {}

    def stage(name, needs, settings, limits=frozenset()):
        def run(context):
            (context.root / name).mkdir(exist_ok=True)
            made.append(name)
            return dict(summaries.get(name, {}))

        return Stage(
            name=name, needs=needs, settings=settings, outputs=(name,), run=run, limits=limits
        )

    def start(limit, *, other=0, redo=False, only=None, retry_errors=False, **summary):
        collect = {"retry_errors": retry_errors}
        config = parse_config({"name": "r", "output_dir": str(tmp_path), "collect": collect})
        summaries["collect"] = summary
        settings = {"teacher": {"budget": {"calls": limit}}, "other": other}
        limits = frozenset({"teacher.budget.calls"})
        stages = [stage("collect", (), settings, limits), stage("dataset", ("collect",), {})]
        monkeypatch.setattr(pipeline, "build_stages", lambda config: stages)
        out = io.StringIO()
        made.clear()
        pipeline.run(config, Reporter(Console(file=out, width=200)), redo=redo, only=only)
        return out.getvalue(), list(made)

    return start


def test_a_raised_limit_lets_a_stage_go_on_and_keeps_its_outputs(line, tmp_path):
    assert line(10, only=("collect",))[1] == ["collect"]
    out, made = line(20, only=("collect",))
    assert (made, "go on" in out) == (["collect"], True)
    assert not (tmp_path / "r" / "replaced").exists()
    assert line(20, only=("collect",)) == ("  0:00 every stage is done already\n", [])
    assert line(None, only=("collect",))[1] == ["collect"]


@pytest.mark.parametrize(("limit", "other"), [(5, 0), (20, 1)])
def test_a_lowered_limit_or_another_change_beside_it_is_refused(line, limit, other):
    line(10, only=("collect",))
    with pytest.raises(RunStateError, match="stage collect was made with other settings"):
        line(limit, other=other)


def test_what_was_made_from_less_is_refused_before_any_work_or_made_again(line, tmp_path):
    assert line(10)[1] == ["collect", "dataset"]
    with pytest.raises(RunStateError) as caught:
        line(20)
    assert str(caught.value) == (
        f"run folder '{tmp_path / 'r'}': stage dataset was made from what is now added to"
        " (collect); --redo makes it again"
    )
    assert line(20, redo=True)[1] == ["collect", "dataset"]
    (aside,) = (tmp_path / "r" / "replaced").iterdir()
    assert aside.name.endswith("-dataset")


def too_small(config, stages, nodes):
    return f"{stages} on {nodes[0].get('CPU')} CPU"


def test_a_cluster_that_is_too_small_is_refused_unless_it_can_grow(line, monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "fault", too_small)
    with pytest.raises(ConfigError) as caught:
        line(10)
    assert str(caught.value) == "['collect', 'dataset'] on 4.0 CPU"
    assert [path.name for path in (tmp_path / "r").iterdir()] == [".lock"]
    monkeypatch.setattr(resources, "can_grow", lambda: True)
    out, made = line(10)
    assert "waits   until the cluster grows: ['collect', 'dataset'] on" in out
    assert made == ["collect", "dataset"]


def test_the_collection_grows_with_the_budget_and_tolerates_without_being_another():
    def collect(**sections):
        stages = build_stages(parse_config({"name": "r", **sections}))
        return next(stage for stage in stages if stage.name == "collect")

    assert collect().limits == {f"teacher.budget.{x}" for x in ("calls", "tokens", "money")}
    assert collect().settings["teacher"]["budget"] == {"calls": None, "tokens": None, "money": None}
    assert collect().settings == collect(collect={"max_error_share": 0.5}).settings
    assert collect().settings == collect(collect={"retry_errors": True}).settings


LEFT = "the budget is spent: 3 episodes did not begin; raise it"


def test_what_a_budget_ended_is_partial_is_used_and_says_so_each_time(line, tmp_path):
    out, made = line(10, unfinished=LEFT)
    assert made == ["collect", "dataset"]
    assert re.search(r"part +collect", out)
    assert f"collect: {LEFT}" in out
    assert RunFolder(tmp_path / "r").state("collect").status == PARTIAL
    out, made = line(10)
    assert made == []
    assert "every stage is done already" in out
    assert f"collect: {LEFT}" in out


def test_a_partial_stage_goes_on_with_a_raised_limit_and_is_done_then(line, tmp_path):
    line(10, only=("collect",), unfinished=LEFT)
    out, made = line(20, only=("collect",))
    assert (made, "go on" in out) == (["collect"], True)
    state = RunFolder(tmp_path / "r").state("collect")
    assert (state.status, state.unfinished) == (DONE, "")


def test_errors_of_a_finished_stage_are_played_again_on_request_only(line):
    line(10, only=("collect",), num_errors=2)
    assert line(10, only=("collect",))[1] == []
    assert line(10, only=("collect",), retry_errors=True)[1] == ["collect"]
    # now there are none
    assert line(10, only=("collect",), retry_errors=True)[1] == []


def test_what_was_made_before_errors_were_played_again_is_refused_or_made_again(line):
    assert line(10, num_errors=2)[1] == ["collect", "dataset"]
    with pytest.raises(RunStateError, match="stage dataset was made from what is now added to"):
        line(10, retry_errors=True)
    assert line(10, retry_errors=True, redo=True)[1] == ["collect", "dataset"]
    assert line(10)[1] == []


def test_a_student_behind_an_address_needs_no_base_agent_and_its_address_may_change():
    def collect(**endpoint):
        student = {"base_url": "http://a/v1", "model": "m", **endpoint}
        stages = build_stages(parse_config({"name": "r", "collect": {"endpoint": student}}))
        return next(stage for stage in stages if stage.name == "collect")

    assert collect().needs == ("tasks",)
    assert collect().settings["student"] == "m"
    assert collect().settings == collect(base_url="http://b/v1", api_key_env="K").settings
    assert collect().settings != collect(model="n").settings


def test_runs_that_share_a_cluster_serve_their_agents_under_names_of_their_own(tmp_path):
    def app(address, place):
        settings = {"name": "r", "output_dir": str(tmp_path / place), "ray": {"address": address}}
        return StageContext(parse_config(settings), Reporter()).app

    assert app("local", "one") == ""
    assert re.fullmatch("r-[0-9a-f]{8}", app("auto", "one"))
    assert app("auto", "one") == app("auto", "two/../one") != app("auto", "two")
