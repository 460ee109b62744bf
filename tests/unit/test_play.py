"""`step-ray play`: a person at the keyboard."""

import pytest

from step_ray.envs import make_env, make_expert
from step_ray.errors import ConfigError
from step_ray.tools.play import HELP, Session, alfworld_task, play


@pytest.fixture
def session(tmp_path):
    task = alfworld_task("", tmp_path, seed=0)
    return Session(make_env("alfworld"), task, make_expert(task))


def played(session, *lines):
    written = []
    play(session, lines, written.append)
    return written


def test_shows_the_goal_first_and_the_result_last(session):
    written = played(session, "look", "quit", "look")
    assert "Your task is to: " in written[0]
    assert written[1] == HELP
    assert written[-1] == "Not won after 1 actions, reward 0"


def test_lists_the_valid_actions_only_when_asked(session):
    assert "inventory" in played(session, "?")[2].splitlines()


def test_hints_lead_to_the_win_and_the_win_ends_the_game(session):
    written = [session.start()]
    while not session.over and len(session.history) < 50:
        written.append(session.answer(session.answer("hint").rpartition(" -> ")[2]))
    assert session.over
    assert session.verdict().startswith("Won after ")


def test_undo_brings_back_the_state_before_the_action(session):
    session.start()
    before = session.env.admissible_actions()
    go = next(action for action in before if action.startswith("go to "))
    session.answer(go)
    assert session.env.admissible_actions() != before
    assert session.answer("undo").startswith("Back to step 0.")
    assert session.env.admissible_actions() == before
    assert session.answer("undo") == "There is nothing to undo."


def test_a_path_without_a_game_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match=r"is no game\.tw-pddl and holds none"):
        alfworld_task(str(tmp_path), tmp_path, 0)
