"""What an arm trains on: the settings of the filter, and of the mask over kinds of steps.

Takes fields or the name of a policy, gives a validated `Recipe`; one collection serves them all.
What the settings mean for a step is said in masking.py. Nothing here reads data.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from step_ray.env_config import Section


class DatasetConfig(Section):
    """What becomes a training example."""

    keep: Literal["success", "all"] = "success"
    """Trajectories that are kept."""
    min_reward: float | None = None
    """Keep by reward instead of success."""
    mask_suboptimal: bool = True
    """Mask suboptimal steps like errors, in the arms that do not say otherwise."""
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the tasks of U1 and of U2 whose trajectories are held out; at least one of each."""
    validation_tasks: int = Field(default=0, ge=0)
    """The same as a number, of each. All models hold out the same tasks; they are validated on the
    golden and self-reflected trajectories of these, with errors masked, whatever the arm trains."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> "DatasetConfig":
        if self.validation_share and self.validation_tasks:
            raise ValueError("validation_share and validation_tasks are both set; keep one")
        return self

    @property
    def holds_out(self) -> bool:
        """Whether any task is held out."""
        return bool(self.validation_share or self.validation_tasks)


Policy = Literal[
    "golden_only",
    "step",
    "no_mask",
    "no_reflection",
    "replace",
    "mask_suboptimal",
    "train_suboptimal",
]
POLICIES: dict[str, dict[str, Any]] = {
    "golden_only": {"golden_collect": True, "match": "trajectories"},
    "step": {"self_reflected": True},
    "no_mask": {"self_reflected": True, "mask_errors": False},
    "no_reflection": {"self_reflected": True, "reflection": False},
    "replace": {"self_reflected": True, "error_steps": "remove"},
    "mask_suboptimal": {"self_reflected": True, "mask_suboptimal": True},
    "train_suboptimal": {"self_reflected": True, "mask_suboptimal": False},
}
"""Fields of a `Recipe` that a policy sets: STeP, its ablations from the same collection, and the
control without self-reflected data."""


class Recipe(Section):
    """One training arm: its data, its mask, its start. A comparison is a list of arms.

    A bare policy name stands for an arm of that policy.
    """

    policy: Policy | None = None
    """Sets the fields below that are not given, see `POLICIES`."""
    golden: bool = True
    """Golden trajectories of U1."""
    golden_collect: bool = False
    """Golden trajectories of U2 tasks (control: golden-only with as many trajectories)."""
    self_reflected: bool = False
    """Self-reflected trajectories of U2."""
    own_success: bool = False
    """The base agent's own successful rollouts on U2, without a teacher (rejection fine-tuning,
    see `own`); equal ones count once."""
    mask_errors: bool = True
    """False: all agent steps are trained, suboptimal ones too (policy no_mask)."""
    mask_suboptimal: bool | None = None
    """Mask suboptimal steps like errors, or train them; default: `dataset.mask_suboptimal`."""
    reflection: bool = True
    """False: corrections are read and trained without their reflection (policy no_reflection)."""
    error_steps: Literal["keep", "remove"] = "keep"
    """`remove` deletes error steps from the text (policy replace)."""
    match: Literal["none", "trajectories", "trained_tokens"] = "none"
    """Cut golden_collect to the number of kept self-reflected trajectories, or repeat or cut the
    golden data to the trained tokens of golden + self-reflected."""
    init: Literal["base_agent", "student"] = "base_agent"
    """Where the arm starts: the base agent, or the model of `student.init`."""

    @model_validator(mode="before")
    @classmethod
    def _policy_fills_in(cls, data: Any) -> Any:
        data = {"policy": data} if isinstance(data, str) else data
        policy = data.get("policy") if isinstance(data, dict) else None
        return {**POLICIES.get(policy, {}), **data} if isinstance(policy, str) else data

    @model_validator(mode="after")
    def _mask_fits(self) -> "Recipe":
        if self.mask_suboptimal and not self.mask_errors:
            raise ValueError(
                "mask_suboptimal: true masks some steps, mask_errors: false trains all; drop one"
            )
        return self

    @model_validator(mode="after")
    def _sources_fit(self) -> "Recipe":
        if not (self.golden or self.golden_collect or self.self_reflected or self.own_success):
            raise ValueError(
                "the arm trains on nothing; set golden, golden_collect, self_reflected or"
                " own_success: true"
            )
        if self.match == "trajectories" and not self.golden_collect:
            raise ValueError(
                "match 'trajectories' cuts golden_collect; set golden_collect: true or match: none"
            )
        extra = next((n for n in ("self_reflected", "own_success") if getattr(self, n)), None)
        if self.match == "trained_tokens" and extra:
            raise ValueError(f"match 'trained_tokens' is for golden data; drop {extra} or match")
        return self
