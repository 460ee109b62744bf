"""Records for tests: the fields that a test is about, the rest filled in."""

from step_ray.types import (
    Author,
    Message,
    Source,
    Step,
    StepKind,
    StopReason,
    Task,
    Trajectory,
)

PROMPT = (Message(role="system", content="rules"), Message(role="user", content="room"))


def make_task(task_id="t", **fields):
    return Task(**{"task_id": task_id, "env": "toy", "split": "train", "goal": ""} | fields)


def make_step(text="Action: look", observation="desk", kind=StepKind.ACT, **fields):
    """A step with this text; corrections are the teacher's, the others the student's."""
    defaults = {
        "index": 0,
        "author": Author.TEACHER if kind is StepKind.CORRECTION else Author.STUDENT,
        "thought": "",
        "action": text.rpartition("Action: ")[2],
    }
    return Step(text=text, observation=observation, kind=kind, **defaults | fields)


def make_trajectory(*steps, name="t", **fields):
    """A successful self-reflected episode of these steps."""
    defaults = {
        "trajectory_id": name,
        "task": make_task(name),
        "prompt": PROMPT,
        "steps": steps,
        "reward": 1.0,
        "success": True,
        "stop_reason": StopReason.SUCCESS,
        "source": Source.SELF_REFLECTED,
        "seed": 0,
    }
    return Trajectory(**defaults | fields)


def make_evaluated(task, *observations, success=False, seed=0, task_type="pick", **fields):
    """An episode of the student alone, with these observations and its success as its reward."""
    defaults = {
        "name": f"{task}#student#{seed}",
        "task": make_task(task, task_type=task_type),
        "reward": float(success),
        "success": success,
        "stop_reason": StopReason.ENV_DONE,
        "seed": seed,
    }
    return make_trajectory(*(make_step(observation=o) for o in observations), **defaults | fields)
