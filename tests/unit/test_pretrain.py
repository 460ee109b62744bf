"""The corpus of the tiny base model: whose tokens carry loss, and whose games they are."""

from dataclasses import replace

from step_ray.config import ScratchConfig
from step_ray.dataset import Example
from step_ray.training.job import TrainResult
from step_ray.training.pretrain import PretrainPlan, _after_prompt, model_card, play_corpus

PLAN = PretrainPlan(
    num_games=12, explore_every=3, explore_steps=4, shape=ScratchConfig(hidden_size=32)
)


def test_each_game_is_won_by_the_expert_and_every_third_is_played_at_random(tmp_path):
    expert, explored = play_corpus(PLAN, tmp_path)

    assert [t.success for t in expert] == [True] * 12
    assert len(explored) == 4
    assert all(1 <= len(t.steps) <= 4 for t in explored)
    assert {t.task.split for t in expert} == {"pretrain"}


def test_the_same_plan_plays_the_same_corpus(tmp_path):
    def texts(folder):
        return [s.text for ts in play_corpus(PLAN, folder) for t in ts for s in t.steps]

    assert texts(tmp_path / "a") == texts(tmp_path / "b")


def test_every_game_has_a_room_of_its_own(tmp_path):
    expert, _ = play_corpus(replace(PLAN, num_games=30), tmp_path)

    floors = {t.task.task_id.split("/")[2].rpartition("-")[2] for t in expert}
    assert len(floors) == 30


def test_random_play_is_trained_from_the_first_action_on():
    example = Example(
        trajectory_id="t",
        source="student",
        input_ids=(1, 2, 3, 4, 5, 6),
        loss_mask=(False, False, True, False, False, True),
    )

    assert _after_prompt(example).loss_mask == (False, False, True, True, True, True)


def test_the_model_card_tells_the_numbers_of_its_training():
    result = TrainResult(
        num_steps=1234,
        final_loss=0.25,
        trained_tokens=5_000_000,
        seconds=60.0,
        tokens_per_s=9.0,
        num_restarts=0,
    )

    card = model_card(PLAN, result)

    assert "1,234 steps" in card
    assert "5,000,000" in card
    assert "0.2500" in card
