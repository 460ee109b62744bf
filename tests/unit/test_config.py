"""Configurations: the shipped ones parse, wrong ones name the key, nothing heavy is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from step_ray.config import expand_path, load_config, parse_config
from step_ray.errors import ConfigError
from step_ray.training.recipe import POLICIES, Recipe

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))


def fault(data, *, name="r"):
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": name} | data)
    line = str(caught.value)
    assert "\n" not in line
    return line


def written(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


# What is shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_parses_and_is_named_like_its_file(path):
    assert load_config(path).name == path.stem


def test_there_are_shipped_configs():
    assert {"demo", "alfworld_llama2_7b"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_resolved_config_can_be_read_back(path):
    config = load_config(path)
    plain = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert parse_config(plain) == config


def test_defaults_compare_golden_only_with_step_and_with_step_without_mask():
    config = parse_config({"name": "r"})
    assert list(config.arms) == ["golden_only", "step", "step_no_mask"]
    assert config.run_dir == Path("runs/r")


def test_a_policy_sets_the_fields_that_an_arm_does_not_give():
    given = {"a": "no_reflection", "b": {"policy": "no_mask", "golden": False}, "c": {}}
    arms = parse_config({"name": "r", "arms": given}).arms
    assert arms["a"] == Recipe(policy="no_reflection", self_reflected=True, reflection=False)
    assert arms["b"] == Recipe(
        policy="no_mask", self_reflected=True, mask_errors=False, golden=False
    )
    assert arms["c"] == Recipe()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_a_recipe_with_all_of_its_fields(policy):
    fields = Recipe.model_validate(policy).model_dump()
    assert POLICIES[policy].items() <= fields.items()


# What is wrong


def test_an_unknown_policy_is_refused_with_the_known_ones():
    line = fault({"arms": {"a": "no_masks"}})
    assert line.startswith("arms.a.policy: ")
    assert "'no_mask'" in line and "'no_masks'" in line


def test_an_arm_cannot_train_all_steps_and_mask_some():
    arm = {"policy": "no_mask", "mask_suboptimal": True}
    assert "mask_errors: false trains all; drop one" in fault({"arms": {"a": arm}})


def test_an_unknown_key_is_named_with_the_known_ones():
    line = fault({"train": {"lr": 1e-3}})
    assert line.startswith("train.lr: unknown key; use one of ['attention', 'autocast',")
    assert "'learning_rate'" in line
    assert fault({"models": 1}).startswith("models: unknown key; use one of ['arms', 'collect',")


def test_an_unknown_key_of_an_arm_is_named():
    line = fault({"arms": {"a": {"mask": True}}})
    assert line.startswith("arms.a.mask: unknown key; use one of ['error_steps', 'golden',")


def test_an_unknown_key_two_levels_down_is_named():
    line = fault({"student": {"scratch": {"width": 8}}})
    assert line.startswith("student.scratch.width: unknown key; use one of ['hidden_size',")


def test_a_served_student_has_its_own_keys_and_no_secret_in_its_address():
    student = {"base_url": "http://h/v1", "model": "m"}
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "r", "collect": {"endpoint": {**student, "key": "k"}}})
    assert str(caught.value) == (
        "collect.endpoint.key: unknown key; use one of ['api_key_env', 'base_url', 'model']"
    )
    student["base_url"] = "http://user:secret@h/v1"
    with pytest.raises(
        ConfigError, match=r"collect\.endpoint\.base_url: an address with"
    ) as caught:
        parse_config({"name": "r", "collect": {"endpoint": student}})
    assert "secret@" not in str(caught.value)


def test_arms_train_with_their_own_settings():
    config = parse_config({"name": "r", "train": {"epochs": 2}, "train_arm": {"learning_rate": 1}})
    assert (config.train.epochs, config.arm_train().epochs) == (2, 2)
    assert (config.train.learning_rate, config.arm_train().learning_rate) == (1e-3, 1.0)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"train": {"epochs": 0}}, "train.epochs: Input should be greater than or equal to 1"),
        ({"train": {"epochs": "many"}}, "train.epochs: Input should be a valid integer"),
        ({"train": None}, "train: Input should be a valid dictionary"),
        ({"teacher": {"kind": "human"}}, "teacher.kind: Input should be 'oracle' or 'llm'"),
        ({"teacher": {"kind": "llm", "model": "m"}}, "teacher: teacher.kind is 'llm': give"),
        ({"teacher": {"budget": {"calls": 0}}}, "teacher.budget.calls: Input should be greater"),
        ({"teacher": {"budget": {"cals": 1}}}, "teacher.budget.cals: unknown key; use one of ['at"),
        ({"teacher": {"budget": {"money": 1}}}, "teacher.budget.money: prices has no ''"),
        ({"teacher": {"requests_per_minute": 0}}, "teacher.requests_per_minute: Input should be g"),
        (
            {"prices": {"m": {"prompt": -1, "completion": 0}}},
            "prices.m.prompt: Input should be greater than or equal to 0 (value: -1)",
        ),
        (
            {"prices": {"m": {"prompt": 1, "completion": 0, "input": 1}}},
            "prices.m.input: unknown key; use one of ['completion', 'prompt']",
        ),
        ({"serve": {"port": 70000}}, "serve.port: Input should be less than or equal to 65535"),
        ({"evaluate": {"seeds": []}}, "evaluate.seeds: Tuple should have at least 1 item"),
        ({"train_arm": {"lr": 1}}, "train_arm.lr: unknown key; use one of ['attention',"),
        ({"train_arm": {"epochs": 0}}, "train_arm.epochs: Input should be greater than"),
        ({"arms": {"base": {}}}, "arms: the name 'base' is taken; rename the arm"),
        ({"arms": {"student": {}}}, "arms: the name 'student' is taken; rename the arm"),
        ({"arms": {"../x": {}}}, "arms: '../x' is no folder name; use letters, digits and . _ -"),
        ({"name": "../x"}, "name: String should match pattern"),
        (
            {"arms": {"cut": {"match": "trajectories"}}},
            "arms.cut: match 'trajectories' cuts golden_collect; set golden_collect: true",
        ),
        (
            {"arms": {"fill": {"match": "trained_tokens", "self_reflected": True}}},
            "arms.fill: match 'trained_tokens' is for golden data; drop self_reflected or match",
        ),
        ({"arms": {"none": {"golden": False}}}, "arms.none: the arm trains on nothing; set golden"),
        (
            {"arms": {"fill": {"match": "trained_tokens", "own_success": True}}},
            "arms.fill: match 'trained_tokens' is for golden data; drop own_success or match",
        ),
        ({"own": {"temperature": 0}}, "own: temperature 0 plays every sample alike; raise it"),
        (
            {"dataset": {"validation_share": 0.1, "validation_tasks": 3}},
            "dataset: validation_share and validation_tasks are both set; keep one",
        ),
        (
            {"train": {"select": "best"}},
            "train.select: 'best' needs a validation loss; set dataset",
        ),
        ({"train_arm": {"select": "best"}}, "train_arm.select: 'best' needs a validation loss"),
        (
            {"train": {"lora_rank": 4, "export": "adapter"}},
            "train.export: the base agent is what arms start from and what is served; use",
        ),
        ({"train_arm": {"num_workers": [2, 1]}}, "train_arm.num_workers: give a number of 1 or"),
    ],
)
def test_a_bad_value_is_named(data, line):
    assert fault(data).startswith(line)


@pytest.mark.parametrize("url", ["http://me:s3cret@host/v1", "https://host/v1?key=s3cret"])
def test_an_address_with_a_secret_is_refused_and_not_shown(url):
    line = fault({"teacher": {"base_url": url}})
    assert line.startswith("teacher.base_url: an address with a password or a query; put the key")
    assert "s3cret" not in line


def test_the_value_and_the_number_of_further_faults_are_shown():
    line = fault({"train": {"epochs": 0, "learning_rate": -1, "num_workers": 0}})
    assert line.endswith("(value: 0) (and 2 more)")


def test_a_missing_name_is_named():
    with pytest.raises(ConfigError, match=r"^name: Field required"):
        parse_config({})


# Files and overrides


def test_overrides_are_laid_over_the_file_in_order(tmp_path):
    path = written(tmp_path, "name: r\ntrain: {epochs: 2}\n")
    overrides = ["train.epochs=3", "train.epochs=4", "env.max_steps=7", "evaluate.seeds=[1, 2]"]
    config = load_config(path, [*overrides, "teacher.budget.calls=null", "env.generator.size=tiny"])
    assert (config.train.epochs, config.env.max_steps) == (4, 7)
    assert (config.evaluate.seeds, config.teacher.budget.calls) == ((1, 2), None)
    assert config.env.generator.size == "tiny"


def test_an_override_may_hold_an_equals_sign(tmp_path):
    path = written(tmp_path, "name: r\n")
    assert load_config(path, ["teacher.model=a=b"]).teacher.model == "a=b"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("epochs", "override: 'epochs' is not of the form a.b=value"),
        ("=3", "override: '=3' is not of the form a.b=value"),
        ("seed.x=3", "override: 'seed.x' goes through 'seed', which is no section"),
        ("seed=[1", "override: 'seed=[1': the value is not valid YAML"),
        ("train.lr=3", "train.lr: unknown key"),
    ],
)
def test_a_bad_override_is_named(tmp_path, override, line):
    path = written(tmp_path, "name: r\nseed: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: [r\n", "is not valid YAML: "),
        ("", "must be a mapping of keys, see jobs/configs"),
        ("- name\n", "must be a mapping of keys, see jobs/configs"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, line):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"config: '{path}' {line}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)$"):
        load_config(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)$"):
        load_config(tmp_path)


def test_a_variable_in_a_path_is_expanded_or_missed(monkeypatch):
    monkeypatch.setenv("STEP_RAY_TEST_DIR", "/games")
    assert expand_path("env.data_dir", "${STEP_RAY_TEST_DIR}/a") == Path("/games/a")
    monkeypatch.delenv("STEP_RAY_TEST_DIR")
    with pytest.raises(ConfigError) as caught:
        expand_path("env.data_dir", "${STEP_RAY_TEST_DIR}/a")
    assert str(caught.value) == (
        "env.data_dir: '${STEP_RAY_TEST_DIR}/a' names a variable that is not set; export it"
    )


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path("env.data_dir", "~/games") == Path("/home/me/games")


# Imports


@pytest.mark.parametrize(
    "module", ["step_ray", "step_ray.types", "step_ray.config", "step_ray.cli"]
)
def test_importing_loads_neither_ray_nor_torch(module):
    code = (
        f"import sys, {module}\n"
        "heavy = {'ray', 'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
