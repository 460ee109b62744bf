"""Replay: equal episodes are counted equal, and the first difference is shown to the byte."""

import asyncio
from dataclasses import replace

import pytest
from builders import make_step, make_trajectory

from step_ray.envs.alfworld.env import AlfworldEnv
from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.errors import ConfigError
from step_ray.rollout import EpisodeSettings, run_episode
from step_ray.store import write_shard
from step_ray.teacher import ExpertStudent
from step_ray.tools.replay import Difference, moved, parse_moves, replay
from step_ray.types import Source, StepKind, Task


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    """A golden episode of a real game."""
    spec = GeneratorSpec(seed=0, split="train", num_games=1, size="tiny")
    (path,) = generate_games(spec, tmp_path_factory.mktemp("games"))
    task = Task(task_id="t", env="alfworld", split="train", goal="", params={"game": str(path)})
    settings = EpisodeSettings(prompt="alfworld_short")
    playing = run_episode(
        task, AlfworldEnv(), ExpertStudent(task), settings=settings, source=Source.EXPERT
    )
    return asyncio.run(playing)


def native(_):
    return AlfworldEnv()


def with_observation(trajectory, index, text):
    steps = list(trajectory.steps)
    steps[index] = replace(steps[index], observation=text)
    return replace(trajectory, steps=tuple(steps))


def test_a_stored_episode_repeats(episode):
    report = replay([episode, episode], native)
    assert report.ok
    assert (report.num_identical, report.num_different) == (2, 0)
    assert report.num_observations == 2 * (1 + len(episode.steps))


def test_one_changed_byte_is_found(episode):
    text = episode.steps[1].observation
    report = replay([episode, with_observation(episode, 1, text + " ")], native)
    assert not report.ok
    assert (report.num_identical, report.num_different) == (1, 1)
    assert report.num_observations_different == 1
    assert report.first == Difference(
        trajectory_id=episode.trajectory_id,
        place="step 1",
        action=episode.steps[1].action,
        recorded=text + " ",
        replayed=text,
    )
    assert report.first.offset == len(text.encode())


@pytest.mark.parametrize(("old", "new", "offset"), [("a", "b", 0), ("éa", "éb", 2), ("a", "ab", 1)])
def test_the_offset_is_in_bytes(old, new, offset):
    place = {"trajectory_id": "t", "place": "step 0", "action": ""}
    assert Difference(**place, recorded=old, replayed=new).offset == offset


def test_the_first_observation_is_compared_too(episode):
    first = replace(episode.prompt[-1], content="Welcome.")
    report = replay([replace(episode, prompt=(*episode.prompt[:-1], first))], native)
    assert report.first.place == "first observation"
    assert report.num_observations_different == 1


def test_an_outcome_that_does_not_repeat_is_a_difference(episode):
    report = replay([replace(episode, reward=0.5)], native)
    assert (report.num_different, report.num_observations_different) == (1, 0)
    assert (report.first.recorded, report.first.replayed) == (
        "solved, reward 0.5",
        "solved, reward 1",
    )


def test_steps_that_never_reached_the_environment_are_passed_over(episode):
    unexecuted = make_step("Action: jump", None, StepKind.ERROR)
    unread = make_step("?", "Your answer could not be read.", StepKind.ERROR, action="")
    report = replay([replace(episode, steps=(unexecuted, unread, *episode.steps))], native)
    assert report.ok
    assert report.num_unexecuted == 2


def test_episodes_that_cannot_be_played_are_counted_by_reason(episode):
    lost = replace(episode.task, params={"game": "/nowhere/game.tw-pddl"})
    report = replay([replace(episode, task=lost), make_trajectory(make_step())], native)
    assert not report.ok
    assert report.unplayed == {
        "the game file '<path>' is missing": 1,
        "the game file '.' is missing": 1,
    }


def test_another_engine_is_named(episode):
    report = replay([replace(episode, engine="alfworld/old")], native)
    assert report.other_engines == {"alfworld/old -> alfworld/native": 1}
    assert report.ok


def test_paths_move_by_whole_folders():
    task = Task(task_id="t", env="e", split="s", goal="", params={"game": "/a/b/g", "n": "1"})
    trajectory = replace(make_trajectory(make_step()), task=task)
    assert moved(trajectory, {"/a/": "/c"}).task.params == {"game": "/c/b/g", "n": "1"}
    assert moved(trajectory, {"/a/bb": "/c"}).task.params == task.params


def test_a_move_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="'/a' is not of the form OLD=NEW"):
        parse_moves(["/a"])


# The command


def test_the_command_exits_with_0_when_all_repeats(step_ray, episode, tmp_path):
    write_shard(tmp_path / "run", [episode])
    code, out, lines = step_ray("replay", tmp_path / "run")
    assert (code, lines) == (0, [])
    num = 1 + len(episode.steps)
    assert out == (
        "episodes: 1 identical, 0 different, 0 not played\n"
        f"observations: {num} identical, 0 different\n"
    )


def test_the_command_exits_with_1_and_shows_the_difference_without_control_characters(
    step_ray, episode, tmp_path
):
    write_shard(tmp_path / "run", [with_observation(episode, 0, "\x1b]0;owned\x07")])
    code, out, lines = step_ray("replay", tmp_path / "run")
    assert (code, lines) == (1, [])
    assert f"first difference: {episode.trajectory_id}, step 0\n" in out
    assert r"  recorded: '\x1b]0;owned\x07'" in out
    assert "  from byte 0 on\n" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("nowhere",), "step-ray: PATH: 'nowhere' holds no trajectories; give a run folder"),
        (("{run}", "--id", "x9"), "step-ray: --id: no trajectory of"),
        (("{run}", "--moved", "a"), "step-ray: --moved: 'a' is not of the form OLD=NEW"),
    ],
)
def test_wrong_input_is_one_line(step_ray, episode, tmp_path, args, line):
    write_shard(tmp_path / "run", [episode])
    args = [arg.replace("{run}", str(tmp_path / "run")) for arg in args]
    code, out, lines = step_ray("replay", *args)
    assert (code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith(line)
