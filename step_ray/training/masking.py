"""Which trajectories are trained on, and which of their steps: the policy, without tokens.

Takes records and the settings of the dataset and of an arm, gives yes, no or a reason. Training
examples (dataset.py), exports and counts (data/) all ask here, so they cannot disagree.
"""

from collections.abc import Iterable

from step_ray.react import without_reflection
from step_ray.training.recipe import DatasetConfig, Recipe
from step_ray.types import Source, Step, StepKind, Trajectory

NOT_SUCCESSFUL = "not successful"
LOW_REWARD = "reward below min_reward"
TOO_LONG = "longer than student.max_length"
NOTHING_TRAINED = "nothing trained"
OTHER_SOURCE = "of a source that the policy leaves out"
SAME_ROLLOUT = "same as another rollout"


def unwanted(trajectory: Trajectory, config: DatasetConfig) -> str | None:
    """Why the filter drops a trajectory; None when it stays."""
    if config.min_reward is not None:
        return LOW_REWARD if trajectory.reward < config.min_reward else None
    return NOT_SUCCESSFUL if config.keep == "success" and not trajectory.success else None


def is_left_out(trajectory: Trajectory, recipe: Recipe) -> bool:
    """Whether an arm trains on no trajectory of this source; those of unknown players stay."""
    if trajectory.source is Source.SELF_REFLECTED:
        return not recipe.self_reflected
    is_golden = trajectory.source is Source.EXPERT
    return is_golden and not (recipe.golden or recipe.golden_collect)


def distinct(trajectories: Iterable[Trajectory]) -> tuple[list[Trajectory], int]:
    """The first of all rollouts of a task that are equal word for word, and how many are left out.

    A model that is sure of itself plays a task the same way again; trained as often, one easy task
    would weigh more than several hard ones.
    """
    first: dict[tuple[str, ...], Trajectory] = {}
    num_seen = 0
    for trajectory in trajectories:
        num_seen += 1
        texts = (step.text for step in trajectory.steps)
        first.setdefault((trajectory.task.task_id, *texts), trajectory)
    return list(first.values()), num_seen - len(first)


def steps_in_text(
    trajectory: Trajectory, recipe: Recipe, config: DatasetConfig
) -> tuple[Step, ...]:
    """The steps that the learner reads, in the words that it reads.

    `error_steps: remove` (ablation) deletes error steps with their observations. What is left is
    text of an episode that never happened: the correction answers an observation that it never saw.
    `reflection: false` (ablation) takes the reflection out of each correction; the episode happened
    as it stands, for the same action was executed.
    """
    steps = trajectory.steps
    if recipe.error_steps == "remove":
        faulty = _faulty_kinds(recipe, config)
        steps = tuple(step for step in steps if step.kind not in faulty)
    return steps if recipe.reflection else tuple(map(without_reflection, steps))


def is_trained(step: Step, recipe: Recipe, config: DatasetConfig) -> bool:
    """Whether the learner is trained on a step (delta_i of STeP, arXiv 2505.20023)."""
    if step.kind is StepKind.UNJUDGED:
        return False
    return not (recipe.mask_errors and step.kind in _faulty_kinds(recipe, config))


def masks_suboptimal(recipe: Recipe, config: DatasetConfig) -> bool:
    """Whether an arm takes suboptimal steps for errors; its own word comes before the run's."""
    return config.mask_suboptimal if recipe.mask_suboptimal is None else recipe.mask_suboptimal


def _faulty_kinds(recipe: Recipe, config: DatasetConfig) -> frozenset[StepKind]:
    suboptimal = {StepKind.SUBOPTIMAL} if masks_suboptimal(recipe, config) else set()
    return frozenset({StepKind.ERROR} | suboptimal)
