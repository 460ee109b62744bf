"""The rule judge of ALFWorld: is a step good, and if not, what went wrong.

Takes the belief before a step, the action and its observation (None: not executed), gives a
`Verdict` with a reflection and the expert's next move from the state that the error left. It knows
only what the agent has read.
"""

import copy
import re
from collections.abc import Sequence

from step_ray.envs.alfworld.belief import NOTHING_HAPPENS, TOOL, Belief, class_of
from step_ray.envs.alfworld.expert import Move, next_move, wanted_objects
from step_ray.types import Task, Verdict, VerdictLabel

Fault = tuple[VerdictLabel, str, str]
"""Label, error type, reflection."""
ERROR, SUBOPTIMAL = VerdictLabel.ERROR, VerdictLabel.SUBOPTIMAL


def replay(first_observation: str, history: Sequence[tuple[str, str]]) -> Belief:
    """The belief after an episode's (action, observation) pairs."""
    belief = Belief.from_observation(first_observation)
    for action, observation in history:
        belief.read(action, observation)
    return belief


class RuleExpert:
    """The expert of any ALFWorld game: it knows only what the agent has read."""

    def __init__(self, task: Task) -> None:
        del task

    def propose(
        self, first_observation: str, history: Sequence[tuple[str, str]]
    ) -> tuple[str, str]:
        """See `propose`."""
        return propose(first_observation, history)

    def judge(
        self,
        first_observation: str,
        history: Sequence[tuple[str, str]],
        action: str,
        observation: str | None,
    ) -> Verdict:
        """See `judge`."""
        return judge(first_observation, history, action, observation)


def propose(first_observation: str, history: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The expert's (thought, action) after a history."""
    move = next_move(replay(first_observation, history))
    return move.thought, move.action


def judge(
    first_observation: str,
    history: Sequence[tuple[str, str]],
    action: str,
    observation: str | None,
) -> Verdict:
    """Judge `action` after `history`; with a fault, correct from the state it has left."""
    before = replay(first_observation, history)
    fault = find_fault(before, action, observation)
    if fault is None:
        return Verdict(label=VerdictLabel.GOOD)
    after = copy.deepcopy(before)
    if observation is not None:
        after.read(action, observation)
    move = next_move(after)
    label, error_type, reflection = fault
    return Verdict(
        label=label,
        reflection=reflection,
        thought=move.thought,
        action=move.action,
        error_type=error_type,
    )


def find_fault(before: Belief, action: str, observation: str | None) -> Fault | None:
    """What is wrong with a step, or None."""
    if not action:
        return ERROR, "bad_format", "My answer had no single action in it."
    if observation is not None and observation.startswith(NOTHING_HAPPENS):
        return ERROR, "no_op", nothing_text(before, action)
    plan = next_move(before)
    if action == plan.action:
        return None
    verb, _, rest = action.partition(" ")
    if action.startswith("go to "):
        return _fault_of_going(before, plan, action.removeprefix("go to "))
    if verb == "open":
        unseen = rest not in before.contents
        return None if unseen else (SUBOPTIMAL, "revisit", f"I have already seen {rest}.")
    if m := re.fullmatch(r"take (.+) from (.+)", action):
        return _fault_of_taking(before, m[1], m[2])
    if m := re.fullmatch(r"(?:move|put) (.+) (?:to|in/on) (.+)", action):
        return _fault_of_putting(before, m[1], m[2])
    if m := re.fullmatch(r"(clean|heat|cool) (.+) with (.+)", action):
        return _fault_of_treating(before, m[1], m[2])
    if verb == "use":
        return _fault_of_using(before)
    return SUBOPTIMAL, "idle", f"That did not help: {verb} shows nothing new."


def _fault_of_going(before: Belief, plan: Move, place: str) -> Fault | None:
    goal, held = before.goal, before.holding
    if plan.place == place:
        return None
    if plan.action.startswith(("go to", "open")) and _searching(before):
        if place in before.contents:
            return SUBOPTIMAL, "revisit", f"I have already seen {place}."
        if plan.action.startswith("open"):
            return SUBOPTIMAL, "skipped", f"I left {plan.place} without opening it."
        return None
    ready = held is not None and class_of(held) == goal.target
    if ready and goal.count == 1 and class_of(place) == goal.destination:
        untreated = goal.treatment is not None and held not in before.treated
        if not untreated:
            return None
    if held is not None:
        return SUBOPTIMAL, "detour", f"I hold {held}, I have nothing to do at {place}."
    return SUBOPTIMAL, "detour", f"I know where a {goal.target} is, it is not at {place}."


def _searching(before: Belief) -> bool:
    """The agent lacks a place or an object and has to look for it."""
    goal, held = before.goal, before.holding
    if held is None:
        return not any(True for _ in wanted_objects(before))
    if class_of(held) != goal.target:
        return False
    if goal.lamp:
        return before.where_is(goal.lamp) is None
    wanted = TOOL[goal.treatment] if goal.treatment and held not in before.treated else None
    return before.first(wanted or goal.destination or "") is None


def _fault_of_taking(before: Belief, name: str, place: str) -> Fault | None:
    target = before.goal.target
    if class_of(name) != target:
        return ERROR, "wrong_object", f"I took {name}, but I need a {target}."
    if (name, place) in set(wanted_objects(before)):
        return None
    return ERROR, "undone", f"{name} was already where it belongs."


def _fault_of_putting(before: Belief, name: str, place: str) -> Fault | None:
    goal = before.goal
    if class_of(name) != goal.target:
        return None
    if goal.lamp:
        return ERROR, "wrong_place", f"I need to hold {name} under the {goal.lamp}."
    if goal.treatment and name not in before.treated:
        return ERROR, "untreated", f"I put {name} down before I {goal.treatment} it."
    if class_of(place) != goal.destination:
        return ERROR, "wrong_place", f"{name} does not go to {place}, but to a {goal.destination}."
    if goal.count > 1 and place != before.first(goal.destination):
        return ERROR, "wrong_place", f"Both go to {before.first(goal.destination)}, not {place}."
    return None


def _fault_of_treating(before: Belief, verb: str, name: str) -> Fault | None:
    goal = before.goal
    if verb != goal.treatment:
        return ERROR, "wrong_tool", f"I do not need to {verb} {name}."
    if name in before.treated:
        return SUBOPTIMAL, "repeated", f"{name} is already {goal.adjective.strip()}."
    return None


def _fault_of_using(before: Belief) -> Fault | None:
    goal, held = before.goal, before.holding
    if goal.lamp and held is not None and class_of(held) == goal.target:
        return None
    if goal.lamp:
        return SUBOPTIMAL, "too_early", f"I need to hold a {goal.target} first."
    return SUBOPTIMAL, "idle", "I do not need that for the task."


def nothing_text(before: Belief, action: str) -> str:
    """The sentence on an action without effect, with its likeliest reason as far as is known."""
    return f"That did nothing: {_why_nothing(before, action)}."


def _why_nothing(before: Belief, action: str) -> str:
    m = re.fullmatch(r"(take|move|put|clean|heat|cool) (.+?) (?:from|to|in/on|with) (.+)", action)
    if m is None:
        place = action.removeprefix("go to ").removeprefix("open ").removeprefix("close ")
        if action.startswith(("go to", "open", "close")) and place not in before.receptacles:
            return f"there is no {place}"
        if action.startswith("go to"):
            return f"I am already at {place}"
        if action.startswith(("open", "close")) and before.location != place:
            return f"I am not at {place}"
        return "that is not possible here"
    verb, name, place = m[1], m[2], m[3]
    if before.location != place:
        return f"I am not at {place}"
    if verb == "take":
        return _why_not_taken(before, name, place)
    if before.holding != name:
        return f"I do not hold {name}"
    return f"{place} is closed" if place in before.closed else f"{place} is not for that"


def _why_not_taken(before: Belief, name: str, place: str) -> str:
    if before.holding is not None:
        return f"I already hold {before.holding}"
    if place in before.closed:
        return f"{place} is closed"
    return f"{name} is not at {place}"
