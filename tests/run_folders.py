"""A small finished run folder for tests: two arms, a collection, training sets, a tokenizer."""

import pyarrow as pa
from builders import make_step, make_task, make_trajectory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from step_ray.config import parse_config
from step_ray.dataset import EXAMPLE_SCHEMA, Example
from step_ray.store import write_shard, write_table
from step_ray.types import Source, StepKind, StopReason, Verdict, VerdictLabel

ARMS = {
    "step": {"self_reflected": True},
    "step_no_mask": {"self_reflected": True, "mask_errors": False},
    "replace": {"self_reflected": True, "error_steps": "remove"},
}
VOCABULARY = ["a", "Ġlook", "<end>", "Ã", "©"]
"""Tokens 0 to 4 of the byte-level tokenizer; the last two are the halves of an e with acute."""


def small_config(output_dir, **changes):
    return parse_config({"name": "small", "output_dir": str(output_dir), "arms": ARMS} | changes)


def mended(task_id, **fields):
    """An error, its correction and an ordinary step, under a teacher."""
    fault = Verdict(
        label=VerdictLabel.ERROR, error_type="no_op", reflection="No mug.", action="go to desk"
    )
    steps = (
        make_step("Action: take mug", "Nothing happens.", StepKind.ERROR, verdict=fault),
        make_step(
            "Thought: No mug. I go.\nAction: go to desk",
            kind=StepKind.CORRECTION,
            index=1,
            reflection="No mug.",
        ),
        make_step(index=2, reward=1.0),
    )
    task = make_task(task_id, goal=f"find the mug of {task_id}", task_type="find")
    name = f"{task_id}#self_reflected#0"
    return make_trajectory(*steps, **{"name": name, "task": task} | fields)


def played(task_id, *actions, success=True, seed=0, **fields):
    """An evaluation episode with these actions."""
    steps = [make_step(f"Action: {a}", f"you {a}", index=i) for i, a in enumerate(actions)]
    task = make_task(task_id, goal=f"find the mug of {task_id}", task_type=task_id[0])
    defaults = {
        "name": f"{task_id}#student#{seed}",
        "task": task,
        "seed": seed,
        "success": success,
        "reward": float(success),
        "stop_reason": StopReason.SUCCESS if success else StopReason.MAX_STEPS,
        "source": Source.STUDENT,
    }
    return make_trajectory(*steps, **defaults | fields)


def write_training_set(folder, *examples):
    """The file of `dataset.write_examples`, without its checks."""
    columns = [
        pa.array([getattr(e, name) for e in examples], EXAMPLE_SCHEMA.field(name).type)
        for name in EXAMPLE_SCHEMA.names
    ]
    write_table(folder / "examples.parquet", pa.Table.from_arrays(columns, schema=EXAMPLE_SCHEMA))


def example(trajectory, ids, trained, errors):
    """An example whose masks are written as 0 and 1, one per token."""
    return Example(
        trajectory_id=trajectory.trajectory_id,
        source=trajectory.source.value,
        input_ids=tuple(ids),
        loss_mask=tuple(c == "1" for c in trained),
        error_mask=tuple(c == "1" for c in errors),
    )


def small_tokenizer():
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(VOCABULARY)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_small_run(config):
    """Evaluations of base and step on tasks a/1, b/2, c/3; a collection of x/1 and x/2 (failed)."""
    root = config.run_dir
    base = [
        played("a/1", "look", success=False),
        played("b/2", "look", "open"),
        played("c/3", "look"),
    ]
    step = [played("a/1", "look", "take"), played("b/2", "look", "open")]
    step.append(played("c/3", stop_reason=StopReason.LLM_ERROR, success=False, error="HTTP 500"))
    write_shard(root / "evaluate" / "base", base)
    write_shard(root / "evaluate" / "step", step)
    kept = mended("x/1")
    lost = mended("x/2", success=False, reward=0.0, stop_reason=StopReason.MAX_STEPS)
    write_shard(root / "trajectories" / "collect", [kept, lost])
    ids = [0, 1, 2, 3, 4, 2]
    write_training_set(root / "datasets" / "step", example(kept, ids, "000111", "011000"))
    write_training_set(root / "datasets" / "step_no_mask", example(kept, ids, "011111", "000000"))
    for arm in ("step", "step_no_mask"):
        (root / "models" / arm).mkdir(parents=True)
        small_tokenizer().save(str(root / "models" / arm / "tokenizer.json"))
    return config
