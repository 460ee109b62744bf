"""The arguments of the served application: the `serve` section without an address, and the model.

Takes plain values, gives a `ServeArgs` and what the engines make of it alike. It starts nothing.
"""

import os
from typing import Any, Literal

from pydantic import Field, model_validator

from step_ray.errors import ConfigError
from step_ray.serving.api.guard import key_digest
from step_ray.serving.config import ServeConfig
from step_ray.storage.places import is_url
from step_ray.training.student import resolve_init

SESSION_ROUTING = {
    "request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
}
"""An episode (header x-session-id) stays where its prefix is cached."""


class ServeArgs(ServeConfig):
    """Arguments of `serve.build_app`."""

    model_dir: str
    """A model folder, that of a LoRA adapter, its address in a store (`s3://...`), a Hugging Face
    hub id or `builtin:<name>`."""
    served_name: str = "agent"
    """Model name that clients give."""
    max_length: int = Field(default=4096, ge=64)
    """Context in tokens, prompt and answer together."""
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _address_is_not_ours(self) -> "ServeArgs":
        if self.model_fields_set & {"host", "port"}:
            raise ValueError("host and port belong to Serve: set them with http_options")
        return self

    def model_spec(self) -> dict[str, Any]:
        """What `AgentServer.reconfigure` takes; only this may change without a restart."""
        return {
            # an address is brought to the node of each replica
            "model_dir": self.model_dir if is_url(self.model_dir) else resolve_init(self.model_dir),
            "served_name": self.served_name,
            "max_length": self.max_length,
            "dtype": self.dtype,
            "max_queued_requests": self.max_queued_requests,
        }

    def replica_options(self) -> dict[str, Any]:
        """Options of a deployment: how many replicas, always and while some are replaced."""
        surge = {"max_surge_percent": self.max_surge_percent}
        if self.autoscaling is None:
            return {"num_replicas": self.num_replicas, **surge}
        scaling = self.autoscaling.model_dump()
        target = scaling["target_ongoing_requests"] or self.max_batch_size
        return {"autoscaling_config": {**scaling, "target_ongoing_requests": target}, **surge}

    def api_keys(self) -> list[str]:
        """The keys of which clients must send one; none where no variable is named.

        Raises:
            ConfigError: the variable is not set.
        """
        if not self.api_key_env:
            return []
        keys = [key.strip() for key in os.environ.get(self.api_key_env, "").split(",")]
        if not any(keys):
            raise ConfigError(f"serve.api_key_env: {self.api_key_env!r} is not set; export the key")
        return [key for key in keys if key]

    def key_digests(self) -> list[str]:
        """`guard.key_digest` of each key."""
        return [key_digest(key) for key in self.api_keys()]
