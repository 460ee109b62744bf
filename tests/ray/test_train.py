"""Training on real Ray Train workers (CPU, gloo): world size, kills and restarts do not matter."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tfevents import scalars
from transformers import AutoModelForCausalLM, AutoTokenizer

from step_ray.config import ScratchConfig, TrainConfig
from step_ray.errors import ConfigError, DataError, RunStateError, StepRayError
from step_ray.train import train
from step_ray.training.config import TrackingConfig
from step_ray.training.job import read_lines
from step_ray.training.student import new_model, save_student, train_tokenizer

SHAPE = ScratchConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2)
CONFIG = TrainConfig(
    epochs=4, learning_rate=3e-3, batch_tokens=128, micro_batch_tokens=128, checkpoint_every=20
)
VALIDATED = CONFIG.model_copy(
    update={"validate_every": 30, "tracking": TrackingConfig(tensorboard=True)}
)
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """A model and examples, see `make_inputs`."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def make_inputs(folder: Path) -> dict:
    """A model of 0.03M parameters and 120 examples in which the second half is trained."""
    tokenizer = train_tokenizer(["go to shelf 1"], SHAPE.vocab_size)
    save_student(folder / "model", new_model(tokenizer, SHAPE, max_length=64, seed=0), tokenizer)
    draw = random.Random(0)
    lengths = [draw.randint(8, 24) for _ in range(120)]
    ids = [[draw.randint(7, 40) for _ in range(n)] for n in lengths]
    mask = [[position >= n // 2 for position in range(n)] for n in lengths]
    types = {"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_())}
    columns = {"input_ids": ids, "loss_mask": mask}
    write(folder / "examples", columns, types)
    held_out = {name: values[:10] for name, values in columns.items()}
    # the first quarter of a text stands for its errors, in words that no trained text has
    held_out["error_mask"] = [[i < len(row) // 4 for i in range(len(row))] for row in ids[:10]]
    held_out["input_ids"] = [
        [x + 100 * (i < len(r) // 4) for i, x in enumerate(r)] for r in ids[:10]
    ]
    write(folder / "held_out", held_out, types | {"error_mask": pa.list_(pa.bool_())})
    return {"init": str(folder / "model"), "examples_dir": folder / "examples", "dtype": "float32"}


def write(folder: Path, columns: dict, types: dict) -> None:
    folder.mkdir()
    pq.write_table(pa.table(columns, schema=pa.schema(types)), folder / "part-0.parquet")


def run(folder: Path, inputs: dict, config: TrainConfig = CONFIG, **options):
    settings = {"output_dir": folder / "out", "work_dir": folder / "work", "seed": 3, "name": "t"}
    return train(config, **{**inputs, **settings, **options})


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "work" / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()


def assert_same_weights(folder: Path, other: Path) -> None:
    torch.testing.assert_close(weights(folder), weights(other), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, inputs) -> Path:
    """One worker, from start to end, with validations and TensorBoard."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder, inputs, VALIDATED, validation_dir=held_out(inputs))
    return folder


def held_out(inputs: dict) -> Path:
    return inputs["examples_dir"].with_name("held_out")


def kill_worker_after_a_checkpoint(work_dir: Path) -> threading.Thread:
    """SIGKILL rank 0, once, as soon as Ray has taken note of a checkpoint."""

    def watch() -> None:
        wait_for_a_checkpoint(work_dir)
        os.kill(read_lines(work_dir / "starts.jsonl")[-1]["pid"], signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def wait_for_a_checkpoint(work_dir: Path) -> None:
    """Return as soon as Ray has taken note of one."""
    deadline = time.monotonic() + 200
    while not (work_dir / "t" / "checkpoint_manager_snapshot.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def start_steps(folder: Path) -> list[int]:
    return [start["step"] for start in read_lines(folder / "work" / "starts.jsonl")]


def checkpoints_of(folder: Path) -> list[Path]:
    """Those that are kept."""
    return [path for path in (folder / "work" / "t").glob("checkpoint_*") if path.is_dir()]


def test_training_learns_and_leaves_a_loadable_model_and_one_line_per_step(uninterrupted):
    lines = read_lines(uninterrupted / "work" / "metrics.jsonl")
    result = json.loads((uninterrupted / "out" / "train_result.json").read_text())
    assert [line["step"] for line in lines] == list(range(1, result["num_steps"] + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert result["trained_tokens"] == sum(line["trained_tokens"] for line in lines)
    assert result["num_restarts"] == 0
    assert result["exported_step"] == result["num_steps"]
    assert len(checkpoints_of(uninterrupted)) == 1  # of several that were written
    assert AutoTokenizer.from_pretrained(uninterrupted / "out").chat_template


def test_validations_come_every_so_many_steps_and_at_the_end(uninterrupted):
    lines = read_lines(uninterrupted / "work" / "metrics.jsonl")
    result = json.loads((uninterrupted / "out" / "train_result.json").read_text())
    validated = [line for line in lines if "validation_loss" in line]
    last = result["num_steps"]
    assert [line["step"] for line in validated] == [*range(30, last, 30), last]
    assert validated[-1]["validation_loss"] < validated[0]["validation_loss"]
    assert validated[-1]["error_nll"] > validated[-1]["validation_loss"] + 1
    assert result["validation_loss"] == validated[-1]["validation_loss"]
    assert result["error_nll"] == validated[-1]["error_nll"]


def test_metrics_tell_speed_and_memory_and_go_to_tensorboard_too(uninterrupted):
    lines = read_lines(uninterrupted / "work" / "metrics.jsonl")
    for line in lines:
        assert line["trained_tokens_per_s"] < line["tokens_per_s"]
        assert 100 < line["peak_memory_mb"] < 4000
        assert "mfu" not in line  # a CPU has no peak
    curve = scalars(uninterrupted / "work" / "tracking" / "tensorboard", "loss")
    assert curve == pytest.approx({line["step"]: line["loss"] for line in lines})


@pytest.mark.slow
def test_two_ddp_workers_train_the_same_weights_as_one(tmp_path, inputs, uninterrupted):
    config = CONFIG.model_copy(update={"num_workers": 2, "micro_batch_tokens": 64})
    seen = []
    watch = {"on_progress": lambda line: seen.append(line["step"])}
    result = run(tmp_path, inputs, config, validation_dir=held_out(inputs), **watch)
    assert_same_weights(tmp_path, uninterrupted)
    alone = json.loads((uninterrupted / "out" / "train_result.json").read_text())
    assert result.validation_loss == pytest.approx(alone["validation_loss"], rel=1e-4)
    assert result.error_nll == pytest.approx(alone["error_nll"], rel=1e-4)
    assert seen[-1] == result.num_steps


@pytest.mark.slow
def test_an_elastic_training_starts_with_the_workers_that_fit_and_keeps_its_batches(
    tmp_path, inputs, uninterrupted
):
    # of two workers with three CPUs each, one fits on four
    config = CONFIG.model_copy(update={"num_workers": (1, 2), "cpus_per_worker": 3})
    run(tmp_path, inputs, config)
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), rel=1e-4)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_exported(tmp_path, inputs):
    # held out: after words that are trained come words that never are, so training makes it worse
    columns = pq.read_table(held_out(inputs) / "part-0.parquet").to_pydict()
    rows = columns["input_ids"]
    columns["input_ids"] = [[200 + k if k % 2 else 7 + k for k in range(len(row))] for row in rows]
    for name in ("loss_mask", "error_mask"):
        columns[name] = [[m and k % 2 == 1 for k, m in enumerate(row)] for row in columns[name]]
    types = {"input_ids": pa.list_(pa.int32())}
    types |= dict.fromkeys(("loss_mask", "error_mask"), pa.list_(pa.bool_()))
    write(tmp_path / "contrary", columns, types)
    changes = {"epochs": 2, "validate_every": 5, "checkpoint_every": 7, "select": "best"}
    config = CONFIG.model_copy(update=changes)

    result = run(tmp_path, inputs, config, validation_dir=tmp_path / "contrary")

    lines = read_lines(tmp_path / "work" / "metrics.jsonl")
    scores = {line["step"]: line["validation_loss"] for line in lines if line["step"] % 5 == 0}
    assert result.exported_step == min(scores, key=scores.get) == 5
    assert result.validation_loss == scores[5]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert mean_nll(model, columns, "loss_mask") == pytest.approx(scores[5], rel=1e-4)
    assert mean_nll(model, columns, "error_mask") == pytest.approx(result.error_nll, rel=1e-4)
    assert len(checkpoints_of(tmp_path)) == 2  # the best and the newest


def mean_nll(model, columns: dict, mask: str) -> float:
    """Mean negative log probability of masked tokens, text by text and without any of our code."""
    total = count = 0
    for ids, flags in zip(columns["input_ids"], columns[mask], strict=True):
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(1, len(ids)):
            if flags[position]:
                total -= log_probs[position - 1, ids[position]].item()
                count += 1
    return total / count


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_nothing_happened(
    tmp_path, inputs, uninterrupted
):
    killer = kill_worker_after_a_checkpoint(tmp_path / "work")
    result = run(tmp_path, inputs)
    killer.join()
    lines = read_lines(tmp_path / "work" / "metrics.jsonl")
    assert result.num_restarts == 1
    assert start_steps(tmp_path)[1] >= 20
    assert [line["step"] for line in lines] == list(range(1, result.num_steps + 1))
    assert losses(tmp_path) == losses(uninterrupted)
    assert_same_weights(tmp_path, uninterrupted)


DRIVER = """
import json, sys
from pathlib import Path
import ray
from step_ray.config import TrainConfig
from step_ray.train import train

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
             object_store_memory=100 * 1024**2)
    paths = {k: Path(job.pop(k)) for k in ("examples_dir", "output_dir", "work_dir")}
    train(TrainConfig(**job.pop("config")), **paths, **job)
"""


@pytest.mark.slow
def test_after_the_driver_is_killed_the_same_command_goes_on_with_the_same_losses(
    tmp_path, inputs, uninterrupted
):
    job = {
        **inputs,
        "output_dir": tmp_path / "out",
        "work_dir": tmp_path / "work",
        "seed": 3,
        "name": "t",
        "config": CONFIG.model_dump(mode="json"),
    }
    command = [sys.executable, "-c", DRIVER, json.dumps(job, default=str)]
    driver = subprocess.Popen(command)
    wait_for_a_checkpoint(tmp_path / "work")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "out").exists()

    subprocess.run(command, check=True, timeout=200)

    assert len(start_steps(tmp_path)) == 2
    assert start_steps(tmp_path)[1] >= 20
    assert losses(tmp_path) == losses(uninterrupted)
    assert_same_weights(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_failed_training_goes_on_when_called_again_even_with_two_fsdp2_workers(
    tmp_path, inputs, uninterrupted
):
    killer = kill_worker_after_a_checkpoint(tmp_path / "work")
    with pytest.raises(StepRayError, match="max_failures"):
        run(tmp_path, inputs, CONFIG.model_copy(update={"max_failures": 0}))
    killer.join()
    run(tmp_path, inputs, CONFIG.model_copy(update={"num_workers": 2, "strategy": "fsdp2"}))
    assert start_steps(tmp_path)[1] >= 20
    assert_same_weights(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_lora_learns_resumes_and_is_merged_at_export(tmp_path, inputs, strategy):
    changes = {"lora_rank": 4, "num_workers": 2, "strategy": strategy, "learning_rate": 1e-2}
    killer = kill_worker_after_a_checkpoint(tmp_path / "work")
    result = run(tmp_path, inputs, CONFIG.model_copy(update=changes))
    killer.join()
    first = read_lines(tmp_path / "work" / "metrics.jsonl")[0]["loss"]
    original = AutoModelForCausalLM.from_pretrained(inputs["init"]).state_dict()
    trained = weights(tmp_path)
    assert trained.keys() == original.keys()
    changed = {name for name in trained if not torch.equal(trained[name], original[name])}
    assert any("q_proj" in name for name in changed)
    assert not any("embed" in name or "norm" in name for name in changed)
    assert result.final_loss < first - 0.1
    assert start_steps(tmp_path)[1] >= 20


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_at_once_and_the_last_good_checkpoint_is_kept(
    tmp_path, inputs
):
    changes = {"learning_rate": 1e30, "max_grad_norm": 1e30, "checkpoint_every": 1}
    config = CONFIG.model_copy(update=changes)
    fault = r"^train: .* is nan at step (\d+); lower learning_rate"
    steps = []
    for _ in range(2):
        with pytest.raises(StepRayError, match=fault) as caught:
            run(tmp_path, inputs, config)
        steps.append(int(re.match(fault, str(caught.value))[1]))
    # not repeated by Ray; and the second call goes on from the step before the fault
    assert steps[0] == steps[1] > 1
    assert start_steps(tmp_path) == [0, steps[0] - 1]


def test_a_finished_training_is_not_repeated_and_its_folder_not_reused(
    tmp_path, inputs, uninterrupted
):
    before = (uninterrupted / "out" / "model.safetensors").stat().st_mtime_ns
    again = {"config": VALIDATED, "validation_dir": held_out(inputs)}
    run(uninterrupted, inputs, **again)
    elsewhere = shutil.copytree(inputs["init"], tmp_path / "copy")  # each job has one of its own
    run(uninterrupted, inputs, **again, init=str(elsewhere))
    assert (uninterrupted / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RunStateError, match="another seed"):
        run(uninterrupted, inputs, **again, seed=4)


def test_a_wrong_model_path_is_a_config_error_before_any_work(tmp_path, inputs):
    with pytest.raises(ConfigError, match="no config"):
        run(tmp_path, inputs, init=str(tmp_path / "nowhere"))


def test_an_empty_folder_of_examples_is_a_data_error_before_any_work(tmp_path, inputs):
    with pytest.raises(DataError, match="no training example"):
        run(tmp_path, inputs, examples_dir=tmp_path)
