"""ScienceWorld's expert: walks a gold path, judges by it, and leads back to it.

Takes a task whose params hold its gold path (goldcache.py), gives moves and verdicts, with thoughts
written from the task and the path's sub-goals. It never touches a world.
"""

import copy
import json
import re
from collections.abc import Sequence

from step_ray.envs.scienceworld.goldcache import GOLD
from step_ray.envs.scienceworld.text import is_look, not_understood
from step_ray.envs.scienceworld.track import Move, Track, gold_of
from step_ray.errors import DataError
from step_ray.types import Task, Verdict, VerdictLabel

LABELS = {
    Move.IDLE: VerdictLabel.SUBOPTIMAL,
    Move.DETOUR: VerdictLabel.SUBOPTIMAL,
    Move.NEEDLESS: VerdictLabel.SUBOPTIMAL,
    Move.NO_OP: VerdictLabel.ERROR,
    Move.HARM: VerdictLabel.ERROR,
}
"""Verdicts of the moves that are not good."""
BAD_FORMAT = "My answer had no single action in it."
_DOING = re.compile(
    r"(?:be|have|move|activate|deactivate|focus|heat|cool|ignite|read|pick|stay|connect|use|put"
    r"|power)\b",
    re.I,
)
"""Sub-goals that are worded as something to do; the others are states."""
_PLAIN = {
    "look around": "I look at what is here.",
    "wait": "I wait.",
    "wait1": "I wait a moment.",
    "inventory": "I look at what I carry.",
    "task": "I read the task again.",
}


class GoldExpert:
    """The expert of one task.

    Raises:
        DataError: the task holds no gold path.
    """

    def __init__(self, task: Task) -> None:
        if GOLD not in task.params:
            raise DataError(
                f"{task.task_id}: no gold path reaches the full score, or none was made;"
                " see jobs/gold.py"
            )
        self._gold = gold_of(json.loads(task.params[GOLD]))

    def _track(self, first_observation: str, history: Sequence[tuple[str, str]]) -> Track:
        track = Track.begin(self._gold, first_observation)
        for action, observation in history:
            track.read(action, observation)
        return track

    def propose(
        self, first_observation: str, history: Sequence[tuple[str, str]]
    ) -> tuple[str, str]:
        """The next (thought, action) on the way to or along the path."""
        return _move(self._track(first_observation, history), first_observation, bool(history))

    def judge(
        self,
        first_observation: str,
        history: Sequence[tuple[str, str]],
        action: str,
        observation: str | None,
    ) -> Verdict:
        """Compare a step with the path; with a fault, correct from the state it has left.

        Looks that show something new are good, as is every step that leads back to the path.
        """
        track = self._track(first_observation, history)
        room, before = track.room, copy.deepcopy(track)
        if not action:
            move, reflection = Move.NO_OP, BAD_FORMAT
        elif observation is None:
            move = _guess(before, action)
            reflection = _reflection(move, action, "", room)
        else:
            move = track.read(action, observation)
            reflection = _reflection(move, action, observation, track.room)
        label = LABELS.get(move, VerdictLabel.GOOD)
        if label is VerdictLabel.GOOD:
            return Verdict(label=label)
        thought, correction = _move(track, first_observation, True)
        error_type = move.value if action else "bad_format"
        return Verdict(
            label=label,
            reflection=reflection,
            thought=thought,
            action=correction,
            error_type=error_type,
        )


def _guess(track: Track, action: str) -> Move:
    """What an action would be, before it is executed: by its words only."""
    if track.ahead(action, "") is not None or action == track.proposal():
        return Move.ON
    if is_look(action):
        return Move.IDLE if action in track.looked else Move.LOOK
    if action.startswith(("go ", "teleport ")):
        return Move.DETOUR
    return Move.NEEDLESS if action.startswith(("open ", "pick up ", "wait")) else Move.HARM


def _reflection(move: Move, action: str, observation: str, room: str) -> str:
    said = " ".join(observation.split("\n", 1)[0].split()).rstrip(".")
    if move is Move.NO_OP:
        unknown = not said or not_understood(observation) or said.startswith("Ambiguous")
        return f"That did nothing: {'it was not understood' if unknown else said}."
    if move is Move.IDLE:
        waited = action.startswith("wait")
        return "Waiting does not help here." if waited else "That showed nothing new."
    if move is Move.DETOUR:
        return f"I have nothing to do in the {room}." if observation else "That leads elsewhere."
    if move is Move.NEEDLESS:
        return "I did not need to do that."
    return f"That was a mistake: {said}." if said else "That would be a mistake."


def _move(track: Track, first_observation: str, begun: bool) -> tuple[str, str]:
    """The thought and the action that are due."""
    action = track.proposal()
    parts = [] if begun else [_first_sentence(first_observation)]
    if track.repairs and action == track.repairs[-1]:
        parts.append("First I put right what I changed.")
    elif subgoal := track.subgoal():
        parts.append(_aim(subgoal))
    parts.append(_doing(action))
    return " ".join(parts), action


def _first_sentence(first_observation: str) -> str:
    """The task in the agent's words: `My task is to ...`."""
    sentence = re.split(r"(?<=\.)\s", first_observation.strip(), maxsplit=1)[0]
    return sentence.replace("Your task", "My task", 1)


def _aim(subgoal: str) -> str:
    words = subgoal[:1].lower() + subgoal[1:]
    return f"I want to {words}." if _DOING.match(subgoal) else f"I want this: {words}."


def _doing(action: str) -> str:
    """An action as a sentence; all actions of the game are imperatives."""
    return _PLAIN.get(action, f"I {action}.")
