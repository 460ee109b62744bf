"""Bodies of the agent's own routes, `/v1/agent/act` and `/v1/episodes`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from step_ray.react import format_turn
from step_ray.serving.api.schemas import Body, Seed

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
"""A name that may become a part of a path."""
TaskId = Annotated[str, Field(min_length=1, max_length=300)]


class PastTurn(Body):
    """One turn of the agent that was carried out, and what the environment answered."""

    text: str | None = None
    """The assistant message word for word, as `/v1/agent/act` gave it; or give its parts."""
    thought: str = ""
    action: str | None = None
    observation: str

    @model_validator(mode="after")
    def _has_one_form(self) -> "PastTurn":
        if (self.text is None) == (self.action is None):
            raise ValueError("give text, or action and maybe thought")
        if self.text is not None and self.thought:
            raise ValueError("the thought is in the text already; leave one out")
        return self

    @property
    def message(self) -> str:
        """The assistant message."""
        return format_turn(self.thought, self.action or "") if self.text is None else self.text


class ActRequest(Body):
    """Body of `/v1/agent/act`: the agent's next step in an environment of the caller's."""

    task: str = Field(min_length=1)
    """What the environment said first, the goal in it."""
    history: list[PastTurn] = Field(default=[])
    """All turns so far, in order."""
    prompt: Word | None = None
    """Version of the instruction, see the folder prompts; None: the server's."""
    model: str | None = None
    """None: the one that is served."""
    max_tokens: int | None = Field(default=None, ge=1)
    """None: the server's `agent.max_new_tokens`."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0: greedy."""
    top_p: float = Field(default=1.0, ge=0, le=1)
    seed: Seed = None


class EpisodesRequest(Body):
    """Body of `/v1/episodes`: whole episodes in environments of the server's."""

    environment: Word
    split: Word
    ids: list[TaskId] | None = Field(default=None, min_length=1, max_length=100_000)
    """Task ids; or give a count."""
    count: int | None = Field(default=None, ge=1, le=100_000)
    """So many tasks, drawn from the sorted ids by `seed`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Draws the tasks, and is the seed of the sampling in each episode."""
    model: str | None = None
    """None: the one that is served."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    max_steps: int | None = Field(default=None, ge=1, le=1000)
    """None: the environment's limits."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Per turn; None: the server's `agent.max_new_tokens`."""
    concurrency: int | None = Field(default=None, ge=1)
    """Episodes at once; None, or more than the server allows: as many as it allows."""
    trajectories: bool = True
    """Whole records of the episodes, as they are stored by a collection; False: outcomes only."""
    format: Literal["ndjson", "sse"] = "ndjson"
    """A line per episode, or a server-sent event."""

    @model_validator(mode="after")
    def _says_which(self) -> "EpisodesRequest":
        if (self.ids is None) == (self.count is None):
            raise ValueError("give ids or count")
        if self.ids is not None and len(set(self.ids)) < len(self.ids):
            raise ValueError("an id is there twice")
        return self
