"""The settings of the teacher: who it is, what it sees, how often it may be asked.

Takes plain values, gives a `TeacherConfig`. It opens no connection and reads no key.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from step_ray.calls.spending import NOTHING, Spending
from step_ray.env_config import Section

TEACHER_ADDRESS: dict[str, Any] = {
    **dict.fromkeys(("base_url", "api_key_env", "max_concurrency", "timeout_s"), True),
    **dict.fromkeys(("try_timeout_s", "requests_per_minute", "tokens_per_minute"), True),
    **dict.fromkeys(("cache", "cache_dir"), True),
    "budget": {"at_limit"},
}
"""Where and how fast the teacher answers, and what of it is paid again; which model it is stays a
setting."""


OWN_FIELDS = ("model", "messages", "max_tokens", "max_completion_tokens", "n", "stream")
"""Fields of a request that settings above decide, or that would change what a reply is."""


def refuse_secret(url: str) -> str:
    """A validator of addresses: they are written down and shown, so they hold no password."""
    # not quoted: the message would show what must not be shown
    if "@" in url.partition("://")[2].partition("/")[0] or "?" in url:
        raise PydanticCustomError(
            "secret_in_url", "an address with a password or a query; put the key in api_key_env"
        )
    return url


class Price(Section):
    """What a model costs, in any one currency."""

    prompt: float = Field(ge=0, allow_inf_nan=False)
    """Per million prompt tokens."""
    completion: float = Field(ge=0, allow_inf_nan=False)
    """Per million completion tokens."""

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of a call."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


class BudgetConfig(Section):
    """What a whole collection may spend: calls and tokens of its teacher, money of teacher and
    student. A limit that is raised, or lifted, lets a finished collection play on what it had not
    begun or had abandoned."""

    calls: int | None = Field(default=None, ge=1)
    """LLM calls, re-asks included (of the oracle: judgements); None: no limit."""
    tokens: int | None = Field(default=None, ge=1)
    """Prompt and completion tokens; a call must fit with all of its `max_tokens`."""
    money: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """In the unit of `prices`, which must then have the teacher's model; a student that has a price
    there is counted when its calls end, so those under way may exceed the limit."""
    at_limit: Literal["abandon", "finish"] = "abandon"
    """No episode starts at a limit. Those in flight are ended before their next call (abandon: the
    limit holds), or play to their end (finish: it is exceeded by what they need)."""

    @property
    def limits(self) -> dict[str, int | float]:
        """Field of `Spending` -> its limit, those that there are."""
        both = {"calls": self.calls, "tokens": self.tokens, "money": self.money}
        return {name: limit for name, limit in both.items() if limit is not None}

    def refusal(self, spent: Spending, more: Spending = NOTHING) -> str | None:
        """One line if a limit is reached, or would be exceeded by `more`."""
        for name, limit in self.limits.items():
            before, after = getattr(spent, name), getattr(spent + more, name)
            if before >= limit or after > limit:
                return f"teacher.budget.{name}: all {limit:,} are spent or reserved"
        return None


class TeacherConfig(Section):
    """Who judges and corrects."""

    kind: Literal["oracle", "llm"] = "oracle"
    """`oracle`: the environment's expert, no LLM; `llm`: a model behind `base_url`."""
    base_url: str = ""
    """OpenAI-compatible endpoint of the teacher, `http://host:port/v1`; without password or key."""
    model: str = ""
    """What to ask the endpoint for; also its name in `prices`."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself never enters a config or a run."""
    when: Literal["after_execution", "before_execution"] = "after_execution"
    """Judge a step with its observation, or before it is executed."""
    show_admissible: bool = True
    """Show the teacher the valid actions, where the environment lists them. Shown or not, an action
    of its that is none of them is asked for again."""
    reference: bool = False
    """Also show the teacher a golden trajectory of the same task."""
    reflection: bool = True
    """False: corrections carry no reflection (ablation step_no_reflection)."""
    max_corrections: int = Field(default=5, ge=0)
    """Corrections per episode."""
    max_reasks: int = Field(default=2, ge=0)
    """How often an unusable answer is asked for again."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the teacher's sampling; its seed is the episode's."""
    max_tokens: int = Field(default=512, ge=1)
    """Longest reply; one that is cut off here is asked for again."""
    timeout_s: float = Field(default=120.0, gt=0)
    """For a call with its retries, without the time it waits for its turn; no call outlives its
    episode."""
    try_timeout_s: float = Field(default=60.0, gt=0)
    """For one try; one that hangs is sent again."""
    max_concurrency: int = Field(default=32, ge=1)
    """Requests in flight, per rollout actor."""
    extra_body: dict[str, Any] = Field(default={})
    """Fields of each request beside ours or over them, as the endpoint names them; null leaves one
    out: `{reasoning_effort: low}`, `{chat_template_kwargs: {enable_thinking: false}}`,
    `{seed: null}`. A key is no such field: it would be written down."""
    prompt: str = "teacher_v2"
    """Version of the teacher's prompt, a file of `prompts/`."""
    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Limit of the endpoint, kept by all actors together, retries included; None: no limit."""
    tokens_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The same for prompt and completion tokens."""
    budget: BudgetConfig = BudgetConfig()
    """What the whole collection may spend."""
    cache: bool = True
    """Keep the replies that led to a verdict on disk, so that no question is paid for twice."""
    cache_dir: str = ""
    """Folder of the cache, to share it between runs (environment variables are expanded); it must
    be the same on every node. Empty: `cache/teacher` in the run folder."""

    @property
    def needs_desk(self) -> bool:
        """Whether something must be counted over all actors."""
        rates = (self.requests_per_minute, self.tokens_per_minute)
        return bool(self.budget.limits) or any(rate is not None for rate in rates)

    @model_validator(mode="after")
    def _llm_needs_endpoint(self) -> "TeacherConfig":
        if self.kind == "llm" and not (self.base_url and self.model):
            raise ValueError("teacher.kind is 'llm': give teacher.base_url and teacher.model")
        return self

    @field_validator("extra_body")
    @classmethod
    def _own_fields_stay(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = [name for name in OWN_FIELDS if name in value]
        if taken:
            raise ValueError(f"{taken[0]!r} is not for extra_body; set teacher.model or max_tokens")
        return value

    _address = field_validator("base_url")(refuse_secret)
