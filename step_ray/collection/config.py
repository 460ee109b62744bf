"""The settings of rollouts: where actors run, whom they ask, and when a stage has failed.

Takes plain values, gives a `CollectConfig`. It opens no connection and starts nothing.
"""

from pydantic import Field, field_validator, model_validator

from step_ray.cluster.labels import NodeLabels
from step_ray.collection.teacher_config import refuse_secret
from step_ray.env_config import Section


class StudentEndpoint(Section):
    """A student that is served already."""

    base_url: str = Field(min_length=1)
    """OpenAI-compatible endpoint, `http://host:port/v1`; without password or key."""
    model: str = Field(min_length=1)
    """What to ask the endpoint for; also its name in `prices`."""
    api_key_env: str = ""
    """Environment variable that holds the key; empty: no key."""

    _address = field_validator("base_url")(refuse_secret)


class CollectConfig(Section):
    """Rollouts of the base agent under the teacher; the actors are those of golden play and
    evaluation too."""

    num_actors: int = Field(default=1, ge=1)
    """Most rollout actors."""
    min_actors: int = Field(default=1, ge=1)
    """Rollout actors from the start; as many as `num_actors`: a pool of fixed size."""
    node_labels: NodeLabels = Field(default={})
    """Rollout actors run on the nodes with these Ray labels only: label -> `value`, `!value`,
    `in(a,b)` or `!in(a,b)`. Empty: on any node."""
    endpoint: StudentEndpoint | None = None
    """Collect from this student; None: the base agent is served on the cluster by the run."""
    episodes_per_actor: int = Field(default=32, ge=1)
    """Episodes at once in one actor; they wait for LLMs concurrently."""
    cpus_per_actor: float = Field(default=0.5, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    max_new_tokens: int = Field(default=256, ge=1)
    """Per turn, for the student."""
    max_format_errors: int = Field(default=3, ge=1)
    """Unparsable answers of the student in a row before the episode ends."""
    try_timeout_s: float = Field(default=120.0, gt=0)
    """For one try of a call to the student; one that hangs is sent again."""
    step_timeout_s: float = Field(default=300.0, gt=0)
    """For a turn of the student, all tries together."""
    episode_timeout_s: float = Field(default=3600.0, gt=0)
    rows_per_shard: int = Field(default=16, ge=1)
    """Episodes in one Parquet shard: what a killed job may lose of what had ended."""
    max_error_share: float = Field(default=0.05, ge=0, lt=1)
    """A stage of episodes (evaluation too) fails if a larger share ends by a fault of the machinery
    (env_error, llm_error, teacher_error, timeout). It stops as soon as that is certain, or all but
    certain (see `errors_judged_after`); what has ended is kept."""
    max_errors: int | None = Field(default=None, ge=0)
    """The same as a number of episodes; None: the share alone counts."""
    errors_judged_after: int = Field(default=20, ge=1)
    """Episodes of a start after which a share of errors that is significantly too large (Wilson
    interval of 99.9 %) stops the stage."""
    retry_errors: bool = False
    """Play what ended by an error again, in a finished stage too; the flag `--retry-errors` sets
    it. False: a restart plays only what is missing."""
    max_starts: int = Field(default=5, ge=1)
    """An episode that was under way in so many actors when they died is an error: it may be what
    kills them."""

    @model_validator(mode="after")
    def _pool_is_a_range(self) -> "CollectConfig":
        if self.min_actors > self.num_actors:
            raise ValueError(
                f"collect.min_actors {self.min_actors} is more than collect.num_actors"
                f" {self.num_actors}; raise num_actors or lower min_actors"
            )
        return self
