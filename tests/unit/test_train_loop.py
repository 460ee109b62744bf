"""The training loop in Ray Train's local mode: one process, no cluster."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from transformers import AutoConfig

from step_ray.config import ScratchConfig, TrainConfig
from step_ray.errors import ConfigError, DataError, RunStateError, StepRayError
from step_ray.train import train
from step_ray.training.job import TrainJob, read_lines
from step_ray.training.loop import train_loop_per_worker
from step_ray.training.student import new_model, save_student, train_tokenizer

SHAPE = ScratchConfig(vocab_size=300, hidden_size=32, num_layers=1, num_heads=2)
CONFIG = TrainConfig(epochs=2, batch_tokens=64, micro_batch_tokens=64, learning_rate=3e-3)


def write(folder, ids, masks):
    folder.mkdir(exist_ok=True)
    types = {"input_ids": pa.int32()} | dict.fromkeys(masks, pa.bool_())
    schema = pa.schema({name: pa.list_(kind) for name, kind in types.items()})
    pq.write_table(pa.table({"input_ids": ids, **masks}, schema=schema), folder / "a.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["go to shelf 1"], SHAPE.vocab_size)
    save_student(folder, new_model(tokenizer, SHAPE, max_length=64, seed=0), tokenizer)
    return folder


@pytest.fixture
def job(tmp_path, model):
    """Sixteen examples of eight tokens: two steps an epoch, and two held-out examples."""
    ids = [[7 + (i * k) % 40 for k in range(8)] for i in range(1, 17)]
    trained = [[k > 3 for k in range(8)] for _ in ids]
    errors = [[k in (1, 2) for k in range(8)] for _ in ids]
    (tmp_path / "work").mkdir()
    return TrainJob(
        config=CONFIG,
        examples_dir=write(tmp_path / "examples", ids, {"loss_mask": trained}),
        validation_dir=write(
            tmp_path / "held_out", ids[:2], {"loss_mask": trained[:2], "error_mask": errors[:2]}
        ),
        init=str(model),
        dtype="float32",
        output_dir=tmp_path / "out",
        work_dir=tmp_path / "work",
        seed=0,
        name="arm",
    )


def fit(job, **config):
    job = job.model_copy(update={"config": job.config.model_copy(update=config)})
    TorchTrainer(
        train_loop_per_worker,
        train_loop_config=job.model_dump(mode="json"),
        scaling_config=ScalingConfig(num_workers=0),
    ).fit()
    return read_lines(job.work_dir / "metrics.jsonl")


def test_a_step_is_validated_when_it_is_due_and_at_the_end(job):
    lines = fit(job, validate_every=3, epochs=4)

    assert len(lines) == 8
    validated = {line["step"] for line in lines if "validation_loss" in line}
    assert validated == {line["step"] for line in lines if "error_nll" in line} == {3, 6, 8}


def test_without_an_interval_the_end_is_validated(job):
    lines = fit(job)
    result = json.loads((job.output_dir / "train_result.json").read_text())

    assert ["validation_loss" in line for line in lines] == [False, False, False, True]
    assert result["validation_loss"] == lines[-1]["validation_loss"]
    assert (result["exported_step"], result["num_steps"]) == (4, 4)


def test_a_constant_schedule_and_a_warm_up_are_what_the_lines_say(job):
    lines = fit(job, schedule="constant", warmup_fraction=0.5)

    assert [line["lr"] for line in lines] == pytest.approx([1.5e-3, 3e-3, 3e-3, 3e-3])


def test_a_loss_that_is_not_finite_ends_the_training_without_an_export(job):
    with pytest.raises(StepRayError, match=r"^train: .* is \w+ at step \d; lower learning_rate"):
        fit(job, learning_rate=1e38, max_grad_norm=1e38, warmup_fraction=0.0)
    assert not job.output_dir.exists()


def start(job, **changes):
    """The driver's side; every fault below shows before a worker or Ray itself is needed."""
    job = job.model_copy(update=changes)
    names = ("examples_dir", "validation_dir", "init", "dtype", "output_dir", "work_dir", "seed")
    return train(job.config, name=job.name, **{name: getattr(job, name) for name in names})


def test_tokens_of_another_vocabulary_are_refused_before_any_work(job, tmp_path):
    folder = write(tmp_path / "other", [[7, 272, 9]], {"loss_mask": [[False, True, True]]})
    with pytest.raises(DataError, match=r"has token id 272, but .* has 272 tokens; build"):
        start(job, examples_dir=folder)
    assert not (job.work_dir / "train.json").exists()


def test_an_example_longer_than_the_model_reads_is_refused_before_any_work(job, tmp_path):
    most = AutoConfig.from_pretrained(job.init).max_position_embeddings
    mask = [[False] + [True] * most]
    folder = write(tmp_path / "long", [[7] * (most + 1)], {"loss_mask": mask})
    with pytest.raises(DataError, match=rf"has one of {most + 1} tokens, but .* reads {most} "):
        start(job, examples_dir=folder)


def test_examples_of_which_nothing_is_trained_are_refused_before_any_work(job, tmp_path):
    folder = write(tmp_path / "masked", [[7, 8, 9]], {"loss_mask": [[False, False, False]]})
    with pytest.raises(DataError, match="has no trained token; check the loss mask"):
        start(job, examples_dir=folder)


def test_the_best_weights_need_held_out_examples(job):
    with pytest.raises(ConfigError, match=r"^train\.select: 'best' needs held-out examples"):
        start(job, validation_dir=None, config=CONFIG.model_copy(update={"select": "best"}))


def test_the_work_of_another_model_in_the_same_folder_is_refused(job, tmp_path, monkeypatch):
    init = tmp_path / "model"
    shutil.copytree(job.init, init)
    monkeypatch.setattr("step_ray.train._fit", lambda job: None)  # killed before its first step
    with pytest.raises(FileNotFoundError):
        start(job, init=str(init))

    tokenizer = train_tokenizer(["go to shelf 1"], SHAPE.vocab_size)
    save_student(init, new_model(tokenizer, SHAPE, max_length=64, seed=1), tokenizer)

    with pytest.raises(RunStateError, match="holds a training with another weights of init"):
        start(job, init=str(init))


def test_a_training_goes_on_with_other_workers_and_not_with_another_learning_rate(job, monkeypatch):
    monkeypatch.setattr("step_ray.train._fit", lambda job: None)
    for changes in ({}, {"num_workers": (1, 4), "strategy": "fsdp2", "keep_checkpoints": 3}):
        with pytest.raises(FileNotFoundError):
            start(job, config=CONFIG.model_copy(update=changes))
    with pytest.raises(RunStateError, match="holds a training with another learning_rate; delete"):
        start(job, config=CONFIG.model_copy(update={"learning_rate": 1e-4}))
