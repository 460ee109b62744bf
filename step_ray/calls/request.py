"""The body of a chat request: what all endpoints read, and what some refuse.

Takes what is asked for, gives a body; takes what an endpoint refused, changes the body and
remembers it for the next ones. It sends nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from step_ray.calls.endpoint import Failure
from step_ray.types import Message

LIMIT, NEWER_LIMIT = "max_tokens", "max_completion_tokens"
"""Two names of one field: most engines read the first, OpenAI's reasoning models the second only.
"""


class RequestForm:
    """How one endpoint wants to be asked.

    Args:
        extra: fields over ours, see `TeacherConfig.extra_body`.
    """

    def __init__(self, extra: Mapping[str, Any] | None = None) -> None:
        self._extra = dict(extra or {})
        self._limit, self._has_schema = LIMIT, True

    def body(
        self,
        model: str,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float | None = None,
        seed: int | None = None,
        json_schema: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The body of a request; what is None is not in it."""
        schema = json_schema if self._has_schema else None
        body = {
            "model": model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            self._limit: max_tokens,
            "temperature": temperature,
            "seed": seed,
            "response_format": schema and {"type": "json_schema", "json_schema": schema},
            **self._extra,
        }
        return {name: value for name, value in body.items() if value is not None}

    def mend(self, body: dict[str, Any], what: Failure) -> bool:
        """Change a body that was refused; False where there is nothing to change."""
        if what is Failure.SCHEMA and "response_format" in body:
            self._has_schema = False
            del body["response_format"]
        elif what is Failure.LIMIT_NAME and LIMIT in body:
            self._limit = NEWER_LIMIT
            body[NEWER_LIMIT] = body.pop(LIMIT)
        else:
            return False
        return True
