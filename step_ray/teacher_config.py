"""The settings of the teacher: who it is, what it sees, how often it may be asked.

Takes plain values, gives a `TeacherConfig`. It opens no connection and reads no key.
"""

from typing import Literal

from pydantic import Field, model_validator

from step_ray.env_config import Section


class TeacherConfig(Section):
    """Who judges and corrects."""

    kind: Literal["oracle", "llm"] = "oracle"
    """`oracle`: the environment's expert, no LLM; `llm`: a model behind `base_url`."""
    base_url: str = ""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself never enters a config or a run."""
    when: Literal["after_execution", "before_execution"] = "after_execution"
    """Judge a step with its observation, or before it is executed."""
    show_admissible: bool = True
    """Show the teacher the valid actions, where the environment lists them."""
    reference: bool = False
    """Also show the teacher a golden trajectory of the same task."""
    reflection: bool = True
    """False: corrections carry no reflection (ablation step_no_reflection)."""
    max_corrections: int = Field(default=5, ge=0)
    """Corrections per episode."""
    max_reasks: int = Field(default=2, ge=0)
    """How often an unusable answer is asked for again."""
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=512, ge=1)
    timeout_s: float = Field(default=120.0, gt=0)
    max_concurrency: int = Field(default=32, ge=1)
    """Requests in flight, per rollout actor."""
    prompt: str = "teacher_v1"
    """Version of the teacher's prompt."""
    max_calls: int | None = Field(default=None, ge=1)
    """Budget of teacher calls for the whole collection; None: no limit. Raised, it lets a finished
    collection play on the episodes that it had ended."""

    @model_validator(mode="after")
    def _llm_needs_endpoint(self) -> "TeacherConfig":
        if self.kind == "llm" and not (self.base_url and self.model):
            raise ValueError("teacher.kind is 'llm': give teacher.base_url and teacher.model")
        return self
