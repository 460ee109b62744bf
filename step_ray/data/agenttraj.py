"""AgentTraj-L, the expert episodes that AgentGym released: what is special in it.

Takes its records and texts, gives chats and today's wording. Conversations with `item_id` go the
way of all ShareGPT records (formats.py); here are ids, the compact ALFWorld form (`init` and
`steps`), its `Thought:` / `Action:` layout, and ALFWorld's old wording.
"""

import re
from collections.abc import Mapping
from typing import Any

from step_ray.data.chats import Chat, ChatTurn
from step_ray.data.formats import record_id, text_of
from step_ray.errors import DataError
from step_ray.react import Turn, format_turn
from step_ray.types import Source

ENVS = {"sciworld": "scienceworld"}
"""AgentGym's names of environments, where ours differ."""

_OLD_PUT = re.compile(r"put (.+) in/on (.+)")
_OLD_PUT_ANSWER = re.compile(r"You put the (.+) in/on the (.+)\.")


def env_of(item_id: str) -> str:
    """The environment of an item such as `sciworld_12`; empty: not of that form."""
    name, _, number = item_id.rpartition("_")
    return ENVS.get(name, name) if number.isdecimal() else ""


def is_compact(row: Mapping[str, Any]) -> bool:
    """Whether a record is an ALFWorld episode of first observation and steps."""
    return "init" in row and "steps" in row


def read_compact(row: Mapping[str, Any], place: str, default_id: str) -> Chat:
    """The chat of a compact ALFWorld episode; all its turns are trained.

    Raises:
        DataError: a step that is none, or text that is missing.
    """
    if not isinstance(row["steps"], list):
        raise DataError(f"{place}: steps is no list; give AgentTraj records")
    turns = [ChatTurn(role="user", content=text_of(row["init"], f"{place} init"))]
    for number, step in enumerate(row["steps"]):
        where = f"{place} step {number}"
        if not isinstance(step, Mapping):
            raise DataError(f"{where}: {type(step).__name__} where a step is expected")
        thought, action = (text_of(step.get(k) or "", where) for k in ("thought", "action"))
        turns.append(ChatTurn(role="assistant", content=format_turn(thought, action), trained=True))
        if step.get("observation") is not None:
            turns.append(ChatTurn(role="user", content=text_of(step["observation"], where)))
    return Chat(
        chat_id=record_id(row, place) or default_id,
        turns=tuple(turns),
        env="alfworld",
        task_type=_task_type(row),
        goal=text_of(row.get("goal") or "", f"{place} goal"),
        source=Source.EXPERT,
    )


def _task_type(row: Mapping[str, Any]) -> str:
    """The type in which all candidate games agree; their names begin with it."""
    games = row.get("candidate_games")
    names = {str(game).partition("-")[0] for game in games} if isinstance(games, list) else set()
    return names.pop() if len(names) == 1 else ""


def read_turn(text: str) -> Turn | None:
    """Read a turn whose thought and action may stand below their labels; None when unreadable.

    Reads all that `react.parse_turn` reads an action from; it is linear in the (untrusted) text.
    """
    lines = text.strip().split("\n")
    starts = [n for n, line in enumerate(lines) if line.lstrip().startswith("Action:")]
    if len(starts) != 1:
        return None
    head = "\n".join(lines[: starts[0]]).strip()
    action = "\n".join(lines[starts[0] :]).strip().removeprefix("Action:").strip()
    if not action or "\n" in action or (head and not head.startswith("Thought:")):
        return None
    return Turn(thought=head.removeprefix("Thought:").strip(), action=action)


def current_action(action: str) -> str:
    """ALFWorld's `put X in/on Y`, which today's engine does not know, as `move X to Y`."""
    old = _OLD_PUT.fullmatch(action)
    return f"move {old[1]} to {old[2]}" if old else action


def current_observation(observation: str) -> str:
    """The engine's old answer to a placed object in today's words."""
    old = _OLD_PUT_ANSWER.fullmatch(observation)
    return f"You move the {old[1]} to the {old[2]}." if old else observation
