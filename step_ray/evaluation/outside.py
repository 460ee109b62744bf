"""`step-ray evaluate --base-url`: a model that is served elsewhere plays a run's held-out tasks.

Takes a config and an address, makes `evaluate/<name>` of the run folder, which the report shows as
another model. It serves nothing and trains nothing; the episode loop and the prompts are those of
the run's own agents.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from step_ray.calls.endpoint import NO_KEY
from step_ray.calls.firstcall import CHECK_TIMEOUT_S, check_chat, check_endpoint
from step_ray.config import BASE, NAME, RunConfig
from step_ray.errors import ConfigError
from step_ray.pipeline import run
from step_ray.progress import Reporter
from step_ray.stages.line import Stage, StageContext, build_stages, play_held_out
from step_ray.storage.mirror import bring_state
from step_ray.storage.runfolder import DONE, RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class OutsideModel:
    """A model behind an OpenAI-compatible endpoint."""

    base_url: str
    model: str
    """As the endpoint calls it."""
    api_key_env: str = ""
    """Environment variable with the key; empty: none is sent."""
    name: str = ""
    """In the report, and of the folder; default: `model` as a file name."""

    @property
    def shown_name(self) -> str:
        """What the report calls it."""
        return self.name or re.sub(r"[^A-Za-z0-9._-]+", "-", self.model).strip("-._")


def evaluate_outside(
    config: RunConfig, outside: OutsideModel, reporter: Reporter, *, redo: bool = False
) -> None:
    """Deal out the tasks, if that is not done, and play those that are held out.

    A killed evaluation goes on where it was; another model under the same name is refused.

    Raises:
        ConfigError: the name is taken or is no file name, the address holds a secret, no key.
        EndpointError: the endpoint cannot be reached, or refuses the key, the model or a call.
        RunStateError: see `pipeline.run`.
    """
    key = check_outside(config, outside)
    stage = outside_stage(config, outside)
    bring_state(config)
    if RunFolder(config.run_dir).state(stage.name).status != DONE:
        where = ("evaluate", outside.base_url, outside.model, key, CHECK_TIMEOUT_S)
        check_endpoint(*where)
        check_chat(
            *where,
            ("collect.max_new_tokens", config.collect.max_new_tokens),
            temperature=config.evaluate.temperature,
            seed=config.evaluate.seeds[0],
        )
    run(config, reporter, only=("tasks", stage.name), redo=redo, more=(stage,))


def check_outside(config: RunConfig, outside: OutsideModel) -> str:
    """Look at what was given, and return the key; nothing is asked or written.

    Raises:
        ConfigError: see `evaluate_outside`.
    """
    name = outside.shown_name
    if name in (BASE, "student", *config.arms):
        raise ConfigError(f"--name: {name!r} is an agent of this run; give another")
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"--name: {name!r} is no folder name; use letters, digits and . _ -")
    address = urlsplit(outside.base_url)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise ConfigError(f"--base-url: {outside.base_url!r} is no address; give http://HOST/v1")
    if "@" in address.netloc or address.query:
        raise ConfigError(
            "--base-url: an address with a password or a query; put the key in --api-key-env"
        )
    key = os.environ.get(outside.api_key_env, "") if outside.api_key_env else NO_KEY
    if not key:
        raise ConfigError(f"--api-key-env: {outside.api_key_env!r} is not set; export the key")
    return key


def outside_stage(config: RunConfig, outside: OutsideModel) -> Stage:
    """The stage of a run's own agents, played by another model; where it answers may change."""
    own = next(stage for stage in build_stages(config) if stage.name == f"evaluate:{BASE}")
    name = outside.shown_name

    def play(context: StageContext) -> Mapping[str, Any]:
        from step_ray.collection.runner import Address

        address = Address(
            base_url=outside.base_url, model=outside.model, api_key_env=outside.api_key_env
        )
        # it may have no /v1/episodes
        return play_held_out(context, address, name, where="actors")

    return replace(
        own,
        name=f"outside:{name}",
        needs=("tasks",),
        settings={**own.settings, "model": outside.model},
        outputs=(f"evaluate/{name}",),
        run=play,
    )
