"""The conversation of a request for the agent's next step.

Takes what `/v1/agent/act` was asked, gives chat messages as the episode loop has them. It asks no
model.
"""

from step_ray.errors import ConfigError
from step_ray.react import conversation, initial_messages
from step_ray.serving.api.agent_schemas import ActRequest
from step_ray.serving.api.errors import ApiError
from step_ray.types import Author, Message, Step, StepKind


def act_messages(request: ActRequest, prompt: str) -> list[Message]:
    """The conversation of a request for a step, as the episode loop would have it.

    Raises:
        ApiError: 400, no such instruction.
    """
    try:
        first = initial_messages(request.prompt or prompt, request.task)
    except ConfigError as exc:
        raise ApiError(400, str(exc), param="prompt") from exc
    steps = [
        Step(
            index=index,
            kind=StepKind.ACT,
            author=Author.STUDENT,
            text=turn.message,
            thought=turn.thought,
            action=turn.action or "",
            observation=turn.observation,
        )
        for index, turn in enumerate(request.history)
    ]
    return conversation(first, steps)
