"""What the episode viewer is given, by hand; its page lets nothing run but its script."""

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from builders import make_step, make_task, make_trajectory
from hypothesis import given
from hypothesis import strategies as st
from run_folders import mended, played, small_config, small_tokenizer, write_small_run

from step_ray.report.episodes import Group, episode_of, facts_of, pack, row_of, write_episodes
from step_ray.store import write_shard
from step_ray.tools.episodes import first_by_hash, pieces, token_marks, write_run_episodes
from step_ray.types import StepKind, StopReason, Usage

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    '<img src=x onerror="alert(1)">',
    "line\u2028separator",
    "]]>{{ 7 * 7 }}",
]


class Page(HTMLParser):
    """Scripts by id, and everything else that could do something."""

    def __init__(self, html):
        super().__init__()
        self.scripts, self.styles, self.tags, self.links = {}, [], set(), []
        self.policy, self._inside = "", None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert not [name for name in attributes if name.startswith("on")]
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in {"src", "href", "action", "srcset"}]
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        self._inside = (tag, attributes.get("type"), attributes.get("id"))

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside and self._inside[0] == "script":
            self.scripts[self._inside[1:]] = data
        elif self._inside and self._inside[0] == "style":
            self.styles.append(data)

    def unpacked(self, name):
        packed = self.scripts["text/plain", name]
        return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    config = write_small_run(small_config(tmp_path_factory.mktemp("runs")))
    path = config.run_dir / "report" / "episodes.html"
    assert write_run_episodes(config, path) == (8, 8)
    return Page(path.read_text(encoding="utf-8"))


def test_a_row_is_what_the_list_shows_and_is_filtered_by():
    assert row_of(mended("x/1")) == {
        "id": "x/1#self_reflected#0",
        "task": "x/1",
        "seed": 0,
        "outcome": "success",
        "stop": "success",
        "reward": "1",
        "steps": 3,
        "has": ["error", "correction"],
    }


@pytest.mark.parametrize(
    ("stop", "outcome"),
    [("env_done", "failed"), ("context_length", "truncated"), ("timeout", "error")],
)
def test_outcomes_are_those_of_the_evaluation(stop, outcome):
    trajectory = make_trajectory(success=False, stop_reason=StopReason(stop))
    assert row_of(trajectory)["outcome"] == outcome


def test_an_episode_has_its_verdicts_reflections_and_faults():
    episode = episode_of(mended("x/1", error="HTTP 500"), {})
    assert episode["error"] == "HTTP 500"
    assert episode["prompt"] == [["system", "rules"], ["user", "room"]]
    error, correction, step = episode["steps"]
    assert error["kind"] == "error" and error["invalid"]
    assert error["verdict"] == {
        "label": "error",
        "type": "no_op",
        "reflection": "No mug.",
        "thought": "",
        "action": "go to desk",
    }
    assert correction["author"] == "teacher"
    assert correction["parts"] == ("Thought: ", "No mug.", " I go.\nAction: go to desk")
    assert (step["reward"], step["verdict"], step["invalid"]) == ("+1", None, False)


def test_what_was_not_executed_has_no_observation():
    step = make_step(observation=None, kind=StepKind.UNJUDGED)
    assert episode_of(make_trajectory(step), {})["steps"][0]["observation"] is None


def test_facts_leave_out_what_does_not_apply():
    usage = Usage(prompt_tokens=1200, completion_tokens=30, teacher_calls=2, teacher_cost=0.5)
    facts = dict(facts_of(make_trajectory(usage=usage, models={"student": "base"})))
    assert facts["agent tokens"] == "1,200 read, 30 written"
    assert (facts["teacher calls"], facts["cost"], facts["models"]) == ("2", "0.5", "student base")
    assert not {"engine", "requests sent again"} & facts.keys()
    assert "teacher calls" not in dict(facts_of(make_trajectory()))


def test_a_reward_that_is_no_number_is_shown_as_it_is():
    assert row_of(make_trajectory(reward=float("nan")))["reward"] == "nan"


@given(st.recursive(st.text() | st.integers(), st.lists))
def test_packed_values_come_back_and_hold_no_markup(value):
    packed = pack(value)
    assert re.fullmatch("[A-Za-z0-9+/=]*", packed)
    assert json.loads(gzip.decompress(base64.b64decode(packed))) == value


def test_groups_are_the_evaluations_and_the_collection(page):
    groups = page.unpacked("index")["groups"]
    assert [(g["folder"], g["kind"], g["label"], g["shown"], g["total"]) for g in groups] == [
        ("evaluate/base", "Evaluation", "base", 3, 3),
        ("evaluate/step", "Evaluation", "step", 3, 3),
        ("trajectories/collect", "Collection", "collection", 2, 2),
    ]


def test_rows_stand_in_the_order_of_the_episodes(page):
    index = page.unpacked("index")
    rows, episodes = index["episodes"], page.unpacked("chunk-0")
    assert [row["id"][:3] for row in rows] == ["a/1", "b/2", "c/3"] * 2 + ["x/1", "x/2"]
    assert [row["steps"] for row in rows] == [len(e["steps"]) for e in episodes]
    assert index["tasks"]["a/1"] == {"type": "a", "goal": "find the mug of a/1"}


def test_each_arm_says_what_it_trains_of_an_episode(page):
    kept, lost = page.unpacked("chunk-0")[6:]
    arms = kept["arms"]
    assert {arm: view["marks"] for arm, view in arms.items()} == {
        "base": "",
        "step": "mtt",
        "step_no_mask": "ttt",
        "replace": "rtt",
    }
    assert {arm: view["reason"] for arm, view in arms.items()} == {
        "base": "the arm does not train on these",
        "step": "",
        "step_no_mask": "",
        "replace": "the training set is not built",
    }
    assert (arms["step"]["ids"], arms["step"]["tokens"]) == ([0, 1, 2, 3, 4, 2], "cmmttt")
    assert arms["step_no_mask"]["tokens"] == "cttttt"
    assert lost["arms"]["step"]["reason"] == "not successful"
    assert lost["arms"]["step"]["marks"] == "mtt"


def test_episodes_of_an_evaluation_are_not_for_training(page):
    assert [episode["arms"] for episode in page.unpacked("chunk-0")[:6]] == [{}] * 6


def test_the_vocabulary_has_the_text_of_every_token_that_is_shown(page):
    assert page.unpacked("vocabulary") == {
        "0": "a",
        "1": " look",
        "2": "<end>",
        "3": "\ufffd",
        "4": "\ufffd",
    }


def test_a_token_reads_as_it_does_inside_a_text():
    assert pieces(small_tokenizer(), {1, 2}) == {1: " look", 2: "<end>"}


def test_token_marks_by_hand():
    assert token_marks([False, True, False], [False, False, True]) == "ctm"
    assert token_marks([False, True], []) == "ct"


def test_only_the_script_of_the_policy_may_run(page):
    scripts = {key: text for key, text in page.scripts.items() if key[0] != "text/plain"}
    assert list(scripts) == [(None, None)]
    (style,) = page.styles
    for kind, text in (("script", scripts[None, None]), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy and "unsafe" not in page.policy
    assert sorted(page.links) == ["data:,", "index.html"]


def test_hostile_text_is_packed_whole_and_adds_nothing_to_the_page(tmp_path, page):
    text = "\n".join(HOSTILE)
    task = make_task(text, goal=text, task_type=text)
    step = make_step(text, text, StepKind.ERROR, reflection=text)
    hostile = make_trajectory(step, name=text, task=task, error=text, models={text: text})
    group = Group(
        folder="evaluate/x",
        kind="Evaluation",
        label=text,
        episodes=[hostile],
        num_shown=1,
        num_total=1,
    )
    path = tmp_path / "episodes.html"
    write_episodes(path, run=text, run_dir=text, groups=[group], vocabulary=lambda: {1: text})
    found = Page(path.read_text(encoding="utf-8"))
    assert found.tags == page.tags
    assert found.scripts.keys() == page.scripts.keys()
    assert found.scripts[None, None] == page.scripts[None, None]
    assert found.unpacked("chunk-0")[0]["steps"][0]["observation"] == text
    assert found.unpacked("index")["tasks"][text]["goal"] == text
    assert found.unpacked("vocabulary") == {"1": text}


def test_a_large_folder_is_shown_in_part_and_says_so(tmp_path):
    config = small_config(tmp_path)
    names = [f"t/{i}" for i in range(9)]
    for arm in ("base", "step"):
        write_shard(config.run_dir / "evaluate" / arm, [played(n, "look") for n in names])
    path = tmp_path / "episodes.html"
    assert write_run_episodes(config, path, most=4) == (8, 18)
    index = Page(path.read_text(encoding="utf-8")).unpacked("index")
    assert [(g["shown"], g["total"]) for g in index["groups"]] == [(4, 9), (4, 9)]
    tasks = [row["task"] for row in index["episodes"]]
    assert sorted(tasks[:4]) == sorted(tasks[4:])


def test_seeds_of_a_task_stay_together_and_folders_agree_on_tasks():
    first = [f"t{i}#student#{seed}" for i in range(5) for seed in (0, 1)]
    other = [f"t{i}#self_reflected#0" for i in range(5)]
    tasks = {name.partition("#")[0] for name in first_by_hash(first, 4)}
    assert len(tasks) == 2
    assert {name.partition("#")[0] for name in first_by_hash(other, 2)} == tasks
    assert first_by_hash(first, 10) == first


def test_a_run_without_episodes_gets_no_file(tmp_path):
    path = tmp_path / "episodes.html"
    path.write_text("of an earlier state")
    assert write_run_episodes(small_config(tmp_path), path) is None
    assert not path.exists()


def test_without_a_tokenizer_tokens_are_ids(tmp_path):
    config = write_small_run(small_config(tmp_path))
    for arm in ("step", "step_no_mask"):
        (config.run_dir / "models" / arm / "tokenizer.json").unlink()
    path = tmp_path / "episodes.html"
    write_run_episodes(config, path)
    assert Page(path.read_text(encoding="utf-8")).unpacked("vocabulary") == {}
