"""What a teacher sees of a step, the question made of it, and the verdict read from the reply.

Takes a `StepView`, gives messages; takes a reply, gives a `Verdict` or what is wrong with it. All
that the environment or the agent wrote stands in the question as JSON strings: data, which no quote
or line of its own can leave.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from step_ray.calls.meter import Meter
from step_ray.llm import Completion
from step_ray.react import load_prompt
from step_ray.types import Message, Step, Task, Verdict, VerdictLabel

PLAIN_PROMPTS = frozenset({"teacher_v1"})
"""Prompts from before observations were delimited; their questions stay as they were."""
SHOWN_REPLY_CHARS = 2000
"""Of an unusable reply, when it is asked for again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """All that a teacher may see of one step."""

    task: Task
    prompt: tuple[Message, ...]
    history: tuple[Step, ...]
    """Steps before the candidate."""
    candidate: Step
    """The step to judge; its observation is None when it has not been executed."""
    admissible: tuple[str, ...] = ()
    """Valid actions now, where the environment lists them: a corrected action is one of these."""
    show_admissible: bool = True
    """The teacher may see them."""
    reference: tuple[Step, ...] = ()
    """A golden trajectory of the same task, where configured."""
    seed: int = 0
    meter: Meter = field(default_factory=Meter)
    """Where the teacher counts what it costs."""

    @property
    def first_observation(self) -> str:
        """The environment's first text."""
        return self.prompt[-1].content


class TeacherReply(BaseModel):
    """The JSON that an LLM teacher must answer with."""

    model_config = ConfigDict(extra="ignore")

    verdict: Literal["good", "suboptimal", "error"]
    reflection: str = ""
    thought: str = ""
    action: str = ""


_PLACEHOLDER = re.compile(r"<[a-z]+>")
TEXT_FIELDS = ("reflection", "thought", "action")
REPLY_SCHEMA: dict[str, Any] = {
    "name": "verdict",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {
            "verdict": {"type": "string", "enum": ["good", "suboptimal", "error"]},
            **{name: {"type": "string"} for name in TEXT_FIELDS},
        },
        "required": ["verdict", *TEXT_FIELDS],
        "additionalProperties": False,
    },
}
"""Written out: pydantic's schema of `TeacherReply` has defaults, which strict mode refuses."""


def teacher_messages(view: StepView, prompt_version: str) -> list[Message]:
    """The conversation that asks an LLM teacher for its verdict on one step."""
    is_plain = prompt_version in PLAIN_PROMPTS
    question = _plain_question(view) if is_plain else _delimited_question(view)
    return [
        Message(role="system", content=load_prompt(prompt_version)),
        Message(role="user", content=question),
    ]


def _delimited_question(view: StepView) -> str:
    """One JSON object a line. A later question of the episode begins like this one, up to what is
    said about the step to be judged, so that an engine can use its prefix again."""
    steps = [*view.history, view.candidate]
    records: list[dict[str, Any]] = [{"first_observation": view.first_observation}]
    if view.reference:
        records.append({"known_good_actions": [step.action for step in view.reference]})
    for number, step in enumerate(steps, start=1):
        records.append({"step": number, "agent": step.text, "observation": step.observation})
    ask: dict[str, Any] = {"judge_step": len(steps)}
    if view.admissible and view.show_admissible:
        ask["valid_actions_now"] = list(view.admissible)
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in [*records, ask])


def _plain_question(view: StepView) -> str:
    parts = [f"Task and first observation:\n{view.first_observation}", "History:"]
    parts += [_step_text(step) for step in view.history] or ["(none yet)"]
    parts += ["Latest step, to be judged:", _step_text(view.candidate)]
    if view.admissible and view.show_admissible:
        parts.append("Valid actions now: " + ", ".join(view.admissible))
    if view.reference:
        golden = "; ".join(step.action for step in view.reference)
        parts.append(f"A known good way to do the task (do not mention it): {golden}")
    return "\n\n".join(parts)


def _step_text(step: Step) -> str:
    observation = step.observation if step.observation is not None else "(not executed)"
    return f"{step.text}\nObservation: {observation}"


def reask(completion: Completion, fault: str) -> list[Message]:
    """What is added to the conversation after an unusable reply."""
    text = completion.text.strip()
    rest = len(text) - SHOWN_REPLY_CHARS
    if rest > 0:
        text = f"{text[:SHOWN_REPLY_CHARS]}... ({rest} characters left out)"
    return [
        Message(role="assistant", content=text or "(nothing)"),
        Message(role="user", content=f"That cannot be used: {fault} Answer again in JSON."),
    ]


def read_reply(
    completion: Completion, view: StepView, max_tokens: int
) -> tuple[Verdict | None, str]:
    """Read a teacher's reply; (None, what is wrong with it) when it is no usable verdict."""
    if not completion.text.strip():
        return None, "it is empty."
    if completion.finish_reason == "length":
        blank = len(completion.text) - len(completion.text.rstrip())
        end = f" in {blank} characters of white space" if blank > 1 else ""
        return None, f"it was cut off at {max_tokens} tokens{end}; be brief."
    return parse_reply(completion.text, view)


def parse_reply(text: str, view: StepView) -> tuple[Verdict | None, str]:
    """Read a teacher's JSON; (None, what is wrong with it) when it is no usable verdict."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        return None, "there is no JSON object in it."
    try:
        reply = TeacherReply.model_validate(json.loads(text[start : end + 1]))
    except json.JSONDecodeError as exc:
        return None, f"the JSON is broken ({exc.msg})."
    except ValidationError as exc:
        first = exc.errors()[0]
        return None, f"the field {'.'.join(map(str, first['loc']))!r} is wrong: {first['msg']}."
    return _checked(reply, view)


def _checked(reply: TeacherReply, view: StepView) -> tuple[Verdict | None, str]:
    label = VerdictLabel(reply.verdict)
    if label is VerdictLabel.GOOD:
        return Verdict(label=label), ""
    fields = {name: " ".join(getattr(reply, name).split()) for name in TEXT_FIELDS}
    action = fields["action"].removeprefix("Action:").strip()
    if not action:
        return None, "a faulty step needs an action that corrects it."
    if view.admissible and not is_listed(action, view.admissible):
        return None, f"{action!r} is not one of the valid actions."
    return Verdict(label=label, **{**fields, "action": action}), ""


def is_listed(action: str, admissible: Sequence[str]) -> bool:
    """The action is one of the valid ones; `<...>` in an entry stands for any words."""
    open_entries = (entry for entry in admissible if _PLACEHOLDER.search(entry))
    return action in admissible or any(
        re.fullmatch(".+".join(map(re.escape, _PLACEHOLDER.split(entry))), action)
        for entry in open_entries
    )
