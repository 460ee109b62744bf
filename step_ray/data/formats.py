"""Chats <-> the records of other tools: OpenAI messages, ShareGPT, Hugging Face rows.

Takes one `Chat` or one record, gives the other. It reads no files and makes no trajectories. What
it reads is untrusted: every value is checked, and a fault names its place.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import pyarrow as pa

from step_ray.data.chats import Chat, ChatTurn
from step_ray.data.flags import NAMES, NUMBERS, read_flag, write_flag
from step_ray.errors import DataError
from step_ray.types import Source

Format = Literal["openai", "sharegpt", "parquet"]
DEFAULT_FLAGS: dict[Format, str] = {"openai": "weight", "sharegpt": "loss", "parquet": "train"}
"""The flag that each format's users know: OpenAI's fine-tuning, AgentGym's data, a bare boolean."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "observation": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
_TEXT_FACTS = ("task_id", "env", "split", "task_type", "goal")
_IDS = ("trajectory_id", "item_id", "id")


def row_writer(form: Format, flag: str) -> Callable[[Chat], dict[str, Any]]:
    """What turns a chat into a record of the format, with the flag under that name.

    `openai` has nothing but messages, the flag on the agent's only: its readers refuse more.
    """
    writers = {"openai": _openai_row, "sharegpt": _sharegpt_row, "parquet": _parquet_row}
    return lambda chat: writers[form](chat, flag)


def parquet_schema(flag: str) -> pa.Schema:
    """Columns of the Parquet export: facts, and `messages` as `datasets` and trainers expect it."""
    message = pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            (flag, pa.int64() if flag in NUMBERS else pa.bool_()),
            ("kind", pa.string()),
        ]
    )
    return pa.schema(
        [("trajectory_id", pa.string())]
        + [(name, pa.string()) for name in (*_TEXT_FACTS, "source")]
        + [("success", pa.bool_()), ("reward", pa.float64()), ("messages", pa.list_(message))]
    )


def _openai_row(chat: Chat, flag: str) -> dict[str, Any]:
    messages = []
    for turn in chat.turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.trained is not None:
            message[flag] = write_flag(flag, turn.trained)
        messages.append(message)
    return {"messages": messages}


def _sharegpt_row(chat: Chat, flag: str) -> dict[str, Any]:
    turns = [
        {
            "from": _SPEAKERS[turn.role],
            "value": turn.content,
            flag: None if turn.trained is None else write_flag(flag, turn.trained),
        }
        for turn in chat.turns
    ]
    return {**_facts(chat), "conversations": turns}


def _parquet_row(chat: Chat, flag: str) -> dict[str, Any]:
    messages = [
        {
            "role": turn.role,
            "content": turn.content,
            flag: write_flag(flag, bool(turn.trained)),
            "kind": turn.kind,
        }
        for turn in chat.turns
    ]
    return {**_facts(chat), "messages": messages}


def _facts(chat: Chat) -> dict[str, Any]:
    return {
        "trajectory_id": chat.chat_id,
        **{name: getattr(chat, name) for name in _TEXT_FACTS},
        "source": chat.source.value if chat.source else None,
        "success": chat.success,
        "reward": chat.reward,
    }


def read_chat(row: Mapping[str, Any], place: str, default_id: str) -> Chat:
    """The chat of a foreign record: `messages` (role, content) or `conversations` (from, value).

    Facts such as the outcome are read from records that step_ray has exported; elsewhere the same
    names may mean other things.

    Args:
        row: the record as it came.
        place: where it stands, for errors.
        default_id: its id if it has none.

    Raises:
        DataError: no conversation, or a turn or flag that cannot be read.
    """
    key = next((name for name in ("messages", "conversations") if name in row), None)
    if key is None or not isinstance(row[key], list):
        raise DataError(f"{place}: no list 'messages' or 'conversations'; give chat records")
    beside = _flags_beside(row, len(row[key]), place)
    turns = tuple(
        _turn(turn, beside[number], f"{place} turn {number}")
        for number, turn in enumerate(row[key])
    )
    facts = _read_facts(row, place) if "trajectory_id" in row else {}
    return Chat(chat_id=record_id(row, place) or default_id, turns=turns, **facts)


def record_id(row: Mapping[str, Any], place: str) -> str:
    """The id that a record gives itself; empty: none.

    Raises:
        DataError: it is neither text nor a whole number.
    """
    value = next((row[name] for name in _IDS if row.get(name) is not None), "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{place}: its id {value!r:.40} is neither text nor a number; mend it")
    return text_of(str(value), place)


def text_of(value: Any, place: str) -> str:
    """The value if it is text that can be stored.

    Raises:
        DataError: no text, or half of a surrogate pair in it.
    """
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{place}: {kind} where text is expected; give plain text messages")
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"{place}: no valid Unicode at character {exc.start}; mend it") from exc
    return value


def _turn(turn: Any, beside: bool | None, place: str) -> ChatTurn:
    if not isinstance(turn, Mapping):
        raise DataError(f"{place}: {type(turn).__name__} where a message is expected")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{place}: role {name!r:.40} is not known; use one of {list(ROLES)}")
    if turn.get("tool_calls"):
        raise DataError(f"{place}: tool calls are no text; write the action into the content")
    kind, own = turn.get("kind"), read_flag(turn, place)
    if None not in (own, beside) and own != beside:
        raise DataError(f"{place}: its flag and the list beside the conversation disagree")
    return ChatTurn(
        role=role,
        content=text_of(turn.get("content", turn.get("value")), place),
        trained=own if beside is None else beside,
        kind=kind if isinstance(kind, str) else "",
    )


def _flags_beside(row: Mapping[str, Any], num_turns: int, place: str) -> list[bool | None]:
    """Flags that stand beside the conversation as a list, one for each turn."""
    found = [name for name in NAMES if row.get(name) is not None]
    if not found:
        return [None] * num_turns
    values = row[found[0]]
    if len(found) > 1 or not isinstance(values, list) or len(values) != num_turns:
        raise DataError(
            f"{place}: {found[0]} beside the conversation must be one list of {num_turns} flags,"
            " one for each turn; mend it, or put the flags into the turns"
        )
    return [read_flag({found[0]: value}, f"{place} turn {n}") for n, value in enumerate(values)]


def _read_facts(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The facts of a record of our own; a null is a fact that is not known."""
    facts: dict[str, Any] = {
        name: text_of(row[name], f"{place} {name}")
        for name in _TEXT_FACTS
        if row.get(name) is not None
    }
    source, success, reward = (row.get(name) for name in ("source", "success", "reward"))
    if source is not None:
        if source not in list(Source):
            raise DataError(
                f"{place}: source {source!r:.40} is none of {[s.value for s in Source]}"
            )
        facts["source"] = Source(source)
    if success is not None and not isinstance(success, bool):
        raise DataError(f"{place}: success {success!r:.40} is neither true nor false")
    number = isinstance(reward, int | float) and not isinstance(reward, bool)
    if reward is not None and not number:
        raise DataError(f"{place}: reward {reward!r:.40} is no number")
    return {**facts, "success": success, "reward": reward}
