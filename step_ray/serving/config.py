"""The settings of the served agent.

Takes plain values, gives a `ServeConfig`. It starts nothing; see serve.py.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from step_ray.cluster.labels import NodeLabels
from step_ray.env_config import EnvConfig, Section


class AgentConfig(Section):
    """What the agent's own routes (`/v1/agent/act`, `/v1/episodes`) work with."""

    prompt: str = "alfworld_v1"
    """Instruction of `/v1/agent/act` where a request names none; take that of the training."""
    before_execution: bool = False
    """The agent was trained with `teacher.when: before_execution`: an answer may give up actions
    before its last one."""
    envs: dict[str, EnvConfig] = Field(default={})
    """Environment -> its settings in episodes; one that is not here has its defaults."""
    work_dir: str = ""
    """Where games are generated for episodes; empty: a temporary folder of the replica."""
    num_generated: int = Field(default=100, ge=1)
    """Games per split of an environment that generates them."""
    max_episodes: int = Field(default=1000, ge=1)
    """Most episodes of one request."""
    max_concurrency: int = Field(default=64, ge=1)
    """Most episodes at once in a replica, over all requests."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Per turn, where a request says nothing else."""
    max_format_errors: int = Field(default=3, ge=1)
    """Unreadable answers in a row before an episode ends."""
    step_timeout_s: float = Field(default=300.0, gt=0)
    episode_timeout_s: float = Field(default=3600.0, gt=0)
    timeout_s: float = Field(default=14400.0, gt=0)
    """Of one request for episodes; those that are unfinished then are reported as missing."""

    @property
    def said(self) -> frozenset[str]:
        """Fields that are not as by default: a resolved configuration sets all of them."""
        return frozenset(self.model_dump(exclude_defaults=True))

    def with_defaults(self, **of_run: Any) -> "AgentConfig":
        """With what a run says, where nothing else is said; what is None is not said."""
        said = self.said
        new = {k: v for k, v in of_run.items() if v is not None and k not in said}
        envs = {"envs": {**of_run["envs"], **self.envs}}
        return self.model_copy(update={**new, **envs})


class AutoscalingConfig(Section):
    """Replicas by load, in place of a fixed number of them."""

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(ge=1)
    target_ongoing_requests: float | None = Field(default=None, gt=0)
    """Requests per replica, those that wait included, which replicas are added or taken away to
    keep; None: `max_batch_size`, so that batches are full before another replica starts."""
    upscale_delay_s: float = Field(default=30.0, ge=0)
    """How long there must be too many requests before replicas are added."""
    downscale_delay_s: float = Field(default=600.0, ge=0)
    """How long there must be too few before replicas are taken away; a replica that goes loses the
    prefixes that it holds."""
    look_back_period_s: float = Field(default=30.0, gt=10)
    """Requests are counted as the mean over this time; Serve hears of them every 10 s."""

    @model_validator(mode="after")
    def _most_is_not_less(self) -> "AutoscalingConfig":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas: {self.max_replicas} is less than min_replicas: {self.min_replicas}"
            )
        return self


class ServeConfig(Section):
    """The served agent."""

    engine: Literal["transformers", "vllm"] = "transformers"
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0: any free port."""
    num_replicas: int = Field(default=1, ge=1)
    autoscaling: AutoscalingConfig | None = None
    """Replicas by load; then leave `num_replicas` out."""
    max_surge_percent: int = Field(default=0, ge=0, le=100)
    """Replicas beside `num_replicas`, in percent of them (rounded up), while a redeploy with other
    settings replaces processes. 0 takes no room, but the old replicas end before new ones start:
    requests wait, with one replica all of them. Another model alone needs no new process."""
    cpus_per_replica: float = Field(default=1.0, gt=0)
    gpus_per_replica: float = Field(default=0.0, ge=0)
    node_labels: NodeLabels = Field(default={})
    """Replicas run on the nodes with these Ray labels only; see `collect.node_labels`."""
    max_batch_size: int = Field(default=32, ge=1)
    """Requests generated together."""
    prefix_cache_mb: int = Field(default=512, ge=0)
    """MiB per replica for keys and values of past prompts (engine `transformers`); 0: no reuse
    between turns. Those of the running batch come on top."""
    batch_wait_s: float = Field(default=0.01, ge=0)
    """How long an idle replica gathers requests before it starts to generate."""
    num_threads: int = Field(default=1, ge=1)
    """Torch threads per replica on CPU."""
    max_queued_requests: int = Field(default=1024, ge=-1)
    """Prompts that wait at a replica beside its batch before HTTP 429; -1: no limit."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most new tokens of one answer; a request for more is HTTP 400. None: what fits."""
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    """A larger request is HTTP 413."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """For one answer, its wait in the queue included; then HTTP 504."""
    drain_timeout_s: float = Field(default=600.0, gt=0)
    """How long a replica that is to stop goes on with what it was asked before."""
    api_key_env: str = ""
    """Environment variable with the key that clients must send, or several keys with commas between
    them (clients of step_ray send the first); empty: no key."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may call from a browser, `https://host`; `*`: all."""
    agent: AgentConfig = AgentConfig()

    @model_validator(mode="after")
    def _one_number_of_replicas(self) -> "ServeConfig":
        if self.autoscaling is not None and self.num_replicas != 1:
            raise ValueError(
                f"num_replicas: {self.num_replicas} beside autoscaling; give one of the two"
            )
        return self

    @property
    def least_replicas(self) -> int:
        """Replicas that there are at any time."""
        return self.autoscaling.min_replicas if self.autoscaling else self.num_replicas

    @property
    def most_replicas(self) -> int:
        """Replicas under load."""
        return self.autoscaling.max_replicas if self.autoscaling else self.num_replicas
