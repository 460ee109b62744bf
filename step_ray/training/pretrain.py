"""Makes the tiny pretrained base model that ships with step_ray (`builtin:tiny-base`).

Takes a `PretrainPlan`, gives a Hugging Face folder. Generated games of the split `pretrain`
(disjoint by content from every other split) are played by the expert, and some also at random. The
model reads both as chats. It stands in for a general chat model where none can be downloaded: it
knows the language of the games and clean play, and can say why a command did nothing, but has never
seen a mistake on the way to a goal noticed or mended.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from jinja2 import Template

from step_ray.config import ScratchConfig, TrainConfig
from step_ray.dataset import Example, build_examples, write_examples
from step_ray.envs import make_env
from step_ray.envs.alfworld.explorer import Explorer
from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.envs.alfworld.judge import judge
from step_ray.llm import ChatModel
from step_ray.render import Renderer
from step_ray.rollout import EpisodeSettings, run_episode
from step_ray.storage.runinfo import run_info
from step_ray.teacher import ExpertStudent, executed_pairs
from step_ray.train import train
from step_ray.training.job import TrainResult
from step_ray.training.recipe import DatasetConfig, Recipe
from step_ray.training.student import load_tokenizer, new_model, save_student, train_tokenizer
from step_ray.types import Source, Task, Trajectory

EXPLORE_PROMPT = "alfworld_explore"


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainPlan:
    """How the base is made; the defaults made the one that ships."""

    num_games: int = 12_000
    seed: int = 77
    size: str = "tiny"
    explore_every: int = 2
    """Every so many-th game is also played at random."""
    prompt: str = "alfworld_short"
    explore_steps: int = 10
    """Length of the random episodes."""
    vocab_size: int = 1024
    shape: ScratchConfig = field(default_factory=ScratchConfig)
    """The default is 4 layers of width 128: under 1M parameters."""
    max_length: int = 2048
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            num_workers=2,
            epochs=1,
            learning_rate=3e-3,
            weight_decay=0.01,
            batch_tokens=2048,
            micro_batch_tokens=2400,
            checkpoint_every=500,
        )
    )


def make_base(
    plan: PretrainPlan,
    work_dir: Path,
    output_dir: Path,
    on_progress: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Play, render and train; Ray must be running. Called again after a kill, training goes on.

    Args:
        plan: games, shape and training.
        work_dir: games, examples, checkpoints and metrics.
        output_dir: the model folder to write.
        on_progress: called with a line now and then.
    """
    start, examples = work_dir / "start", work_dir / "examples"
    if not (examples / "examples.parquet").is_file():
        on_progress(f"playing {plan.num_games} games")
        expert, explored = play_corpus(plan, work_dir / "games")
        texts = [*_texts([*expert, *explored]), *judged_texts(explored)]
        tokenizer = train_tokenizer(texts, plan.vocab_size)
        model = new_model(tokenizer, plan.shape, max_length=plan.max_length, seed=plan.seed)
        save_student(start, model, tokenizer)
        on_progress("rendering")
        write_examples(examples, _examples(expert, explored, start, plan))
    result = train(
        plan.train,
        examples_dir=examples,
        init=str(start),
        dtype="float32",
        output_dir=output_dir,
        work_dir=work_dir / "train",
        seed=plan.seed,
        name="pretrain",
        on_progress=lambda metrics: on_progress(
            f"step {metrics['step']}/{metrics['num_steps']}, loss {metrics['loss']:.3f}"
        ),
    )
    (output_dir / "README.md").write_text(model_card(plan, result), encoding="utf-8")
    return result


def model_card(plan: PretrainPlan, result: TrainResult) -> str:
    """The README of the model folder: what it is made of, and the numbers of its training."""
    template = resources.files("step_ray") / "templates" / "model_card.md.j2"
    text = template.read_text(encoding="utf-8")
    return Template(text).render(plan=plan, result=result, info=run_info())


def play_corpus(plan: PretrainPlan, folder: Path) -> tuple[list[Trajectory], list[Trajectory]]:
    """The expert's episodes, one per game, and the random ones."""
    spec = GeneratorSpec(
        seed=plan.seed,
        split="pretrain",
        num_games=plan.num_games,
        size=plan.size,  # type: ignore[arg-type]
    )
    tasks = [
        Task(
            task_id=f"alfworld/pretrain/{path.parts[-3]}/{path.parts[-2]}",
            env="alfworld",
            split="pretrain",
            goal="",
            params={"game": str(path)},
        )
        for path in generate_games(spec, folder)
    ]
    clean = EpisodeSettings(prompt=plan.prompt, max_steps=60)
    wild = EpisodeSettings(prompt=EXPLORE_PROMPT, max_steps=plan.explore_steps)
    expert = asyncio.run(_play(tasks, ExpertStudent, clean, Source.EXPERT, plan.seed))
    some = tasks[:: plan.explore_every]
    return expert, asyncio.run(
        _play(some, lambda task: Explorer(), wild, Source.STUDENT, plan.seed)
    )


async def _play(
    tasks: Sequence[Task],
    player: Callable[[Task], ChatModel],
    settings: EpisodeSettings,
    source: Source,
    seed: int,
) -> list[Trajectory]:
    return [
        await run_episode(
            task, make_env("alfworld"), player(task), settings=settings, source=source, seed=seed
        )
        for task in tasks
    ]


def _texts(trajectories: Sequence[Trajectory]) -> list[str]:
    prompts = [message.content for t in trajectories for message in t.prompt]
    steps = [text for t in trajectories for s in t.steps for text in (s.text, s.observation or "")]
    return prompts + steps


def judged_texts(explored: Sequence[Trajectory], num_episodes: int = 300) -> list[str]:
    """What the rule judge would say of random play, for the tokenizer only.

    The model never reads these sentences; their words being single tokens is what a chat model's
    tokenizer would offer too.
    """
    texts = []
    for trajectory in explored[:num_episodes]:
        pairs = executed_pairs(trajectory.steps)
        for count, (action, observation) in enumerate(pairs):
            texts.append(
                judge(trajectory.prompt[-1].content, pairs[:count], action, observation).reflection
            )
    return texts


def _examples(
    expert: Sequence[Trajectory], explored: Sequence[Trajectory], start: Path, plan: PretrainPlan
) -> list[Example]:
    """Expert play with the agent's tokens trained; random play with everything after the prompt.

    Reading the random episodes whole is what teaches a small model to copy names and numbers.
    """
    renderer = Renderer(load_tokenizer(str(start)), plan.max_length)
    everything = DatasetConfig(keep="all")
    clean, _ = build_examples(expert, renderer, Recipe(), everything)
    wild, _ = build_examples(explored, renderer, Recipe(), everything)
    return clean + [_after_prompt(example) for example in wild]


def _after_prompt(example: Example) -> Example:
    first = example.loss_mask.index(True)
    num_after = len(example.loss_mask) - first
    return replace(example, loss_mask=(False,) * first + (True,) * num_after)
