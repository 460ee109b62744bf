"""Training on a GPU, without a cluster: half precision, compiled layers, FSDP2 over NCCL."""

import importlib.util

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from step_ray.config import ScratchConfig, TrainConfig
from step_ray.training import flops, state
from step_ray.training.batching import load_examples
from step_ray.training.learner import Learner
from step_ray.training.speed import Speed
from step_ray.training.student import new_model, save_student, train_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)
SHAPE = ScratchConfig(vocab_size=300, hidden_size=128, num_layers=2, num_heads=4)
LENGTHS = (90, 6, 150, 33)
STEPS = 4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["go to shelf 1"], SHAPE.vocab_size)
    save_student(folder, new_model(tokenizer, SHAPE, max_length=256, seed=0), tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(7, 260, (n,), generator=draw).tolist() for n in LENGTHS]
    masks = [[i % 4 == 3 for i in range(n)] for n in LENGTHS]
    pq.write_table(pa.table({"input_ids": ids, "loss_mask": masks}), folder / "part.parquet")
    return load_examples(folder)


@pytest.fixture
def nccl(tmp_path):
    dist.init_process_group(
        "nccl", store=dist.FileStore(str(tmp_path / "store")), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def make_learner(model_dir, *, dtype="float32", device="cuda", **settings):
    config = TrainConfig(micro_batch_tokens=160, use_gpu=device == "cuda", **settings)
    return Learner(init=model_dir, dtype=dtype, config=config, seed=0, device=torch.device(device))


def losses(learner, examples, first=0, last=STEPS):
    batch = range(len(LENGTHS))
    lines = [learner.train_batch(examples, batch, number=n, lr=1e-3) for n in range(first, last)]
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def on_cpu(model_dir, examples):
    return losses(make_learner(model_dir, device="cpu"), examples)


def test_float32_gives_the_losses_of_the_cpu(model_dir, examples, on_cpu):
    assert losses(make_learner(model_dir), examples) == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"autocast": "bfloat16"},
        {"autocast": "bfloat16", "gradient_checkpointing": True},
        {"autocast": "bfloat16", "compile": True},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "packing": "padded"},
        {"dtype": "bfloat16", "lora_rank": 4},
        pytest.param({"dtype": "bfloat16", "liger": True}, marks=needs_liger),
        pytest.param({"autocast": "bfloat16", "liger": True}, marks=needs_liger),
    ],
    ids=str,
)
def test_half_precision_gives_nearly_the_losses_of_float32(model_dir, examples, on_cpu, settings):
    learner = make_learner(model_dir, **settings)
    found = losses(learner, examples)
    assert learner.layout.packed == (settings.get("packing") != "padded")
    assert found[0] == pytest.approx(on_cpu[0], rel=1e-2)
    assert found[-1] < found[0]
    if "lora_rank" not in settings:
        assert found == pytest.approx(on_cpu, rel=3e-2)


def test_fsdp2_over_nccl_gives_the_losses_of_one_device(nccl, model_dir, examples, on_cpu):
    learner = make_learner(model_dir, strategy="fsdp2")
    assert losses(learner, examples) == pytest.approx(on_cpu, rel=1e-4)


def test_fsdp2_in_half_precision_goes_on_from_its_checkpoint(nccl, model_dir, examples, tmp_path):
    settings = {"strategy": "fsdp2", "autocast": "bfloat16"}
    first = make_learner(model_dir, **settings)
    before = losses(first, examples, 0, 2)
    state.save(first, str(tmp_path / "checkpoint"), 2)
    after = losses(first, examples, 2, STEPS)

    second = make_learner(model_dir, **settings)
    assert state.restore(second, str(tmp_path / "checkpoint")) == 2
    assert losses(second, examples, 2, STEPS) == pytest.approx(after, rel=1e-3)
    assert after[-1] < before[0]


def test_memory_and_mfu_are_those_of_the_device(model_dir, examples, monkeypatch):
    monkeypatch.setattr(flops, "PEAK_TFLOPS_BF16", {"": 1000.0})
    torch.cuda.reset_peak_memory_stats()
    learner = make_learner(model_dir, dtype="bfloat16")
    line = learner.train_batch(examples, range(len(LENGTHS)), number=0, lr=1e-3)
    numbers = Speed(learner).numbers(line, examples.lengths)
    weights = sum(p.numel() * 2 for p in learner.model.parameters()) / 2**20
    assert numbers["peak_memory_mb"] > 4 * weights  # with gradients and two moments
    assert 0 < numbers["mfu"] < 1
