"""Lower layers never import higher ones; the order is the list below, lowest first."""

import ast
from pathlib import Path

import pytest

import step_ray

PACKAGE = Path(step_ray.__file__).parent
LAYERS: list[set[str]] = [
    {"", "types", "errors", "data", "progress", "runinfo", "kvcache", "loss", "report.charts"},
    {"report.collection"},
    {"envs.alfworld", "envs.alfworld.tables"},
    {"scores", "envs.scienceworld", "envs.scienceworld.tables", "envs.scienceworld.text"},
    {"envs.webshop", "envs.webshop.tables"},
    {"env_config", "react", "records", "render", "stats", "show"},
    {"shards"},
    {"store"},
    {"compact"},
    {"spending"},
    {"teacher_config", "collect_config", "config"},
    {"llm", "endpoint", "replylimit", "ratelimit", "gate", "desk", "openai_api"},
    {"callcache", "meter"},
    {"failures", "shardwriter", "tally", "totals"},
    {"metrics"},
    {
        "envs.base",
        "report.results",
        "report.cost",
        "player",
        "train_faults",
        "resources",
        "masking",
    },
    {"envs", "envs.alfworld.belief", "envs.alfworld.text", "envs.alfworld.goal"},
    {"envs.alfworld.usual", "envs.scienceworld.jvm"},
    {"envs.scienceworld.env", "envs.scienceworld.track"},
    {"envs.scienceworld.gold", "envs.scienceworld.content"},
    {"envs.scienceworld.goldcache"},
    {"envs.scienceworld.expert", "envs.scienceworld.tasks"},
    {"envs.webshop.analysis", "envs.webshop.products", "envs.webshop.generator"},
    {"envs.webshop.search", "envs.webshop.pages", "envs.webshop.reward"},
    {"envs.webshop.catalogue"},
    {"envs.webshop.goals", "envs.webshop.session"},
    {"envs.webshop.env", "envs.webshop.tasks"},
    {"envs.webshop.expert", "envs.webshop.judge", "envs.webshop.replay", "envs.webshop.nouncheck"},
    {"envs.alfworld.problem", "envs.alfworld.scene", "envs.alfworld.expert"},
    {"envs.alfworld.engine", "envs.alfworld.pddl_text", "envs.alfworld.plan"},
    {"envs.alfworld.judge", "envs.alfworld.official", "envs.alfworld.generator"},
    {"envs.alfworld.env", "envs.alfworld.tasks", "envs.alfworld.explorer", "envs.alfworld.parity"},
    {"judging"},
    {"teacher", "tasks", "student", "batching", "generation", "runfolder", "raysetup"},
    {"report.page", "rollout", "dataset", "learner", "agent_server"},
    {"report", "runner", "train_loop", "serve", "viewer", "play", "claim"},
    {"data.flags", "data.files"},
    {"data.chats", "replay"},
    {"data.formats", "data.stats"},
    {"data.agenttraj", "data.export"},
    {"data.ingest"},
    {"data.commands"},
    {"collect", "train", "serving"},
    {"evaluate", "pretrain", "summary", "listplay"},
    {"stages"},
    {"pipeline"},
    {"cli"},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
HEAVY = {"ray", "torch", "transformers", "tokenizers", "peft"}
LIGHT = {
    *("", "types", "errors", "config", "react", "llm", "teacher", "rollout", "store", "tasks"),
    *("runner", "resources", "teacher_config", "endpoint", "spending", "ratelimit", "gate", "desk"),
    *("callcache", "meter", "judging", "masking", "collect_config", "replylimit"),
    *("claim", "failures", "shardwriter", "tally", "totals", "metrics"),
    *("records", "shards", "compact"),
    *("progress", "runinfo", "stats", "show", "runfolder", "pipeline", "stages", "summary", "cli"),
    *("data", "data.flags", "data.files", "data.chats", "data.formats", "data.stats", "replay"),
    *("data.agenttraj", "data.export", "data.ingest", "data.commands"),
    *("raysetup", "serving", "viewer", "report", "report.page", "report.results"),
    *("report.charts", "report.collection", "report.cost", "envs", "envs.base"),
}
"""What the command line loads before it knows what to do; `step_ray.envs.alfworld` is light too."""


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path, *, top_only=False):
    """Full names of what a module imports, `a.b` for `from a import b` too."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def internal(path):
    """Modules of step_ray that a module imports."""
    for full in imports(path):
        if full.split(".")[0] == "step_ray":
            name = full.removeprefix("step_ray").removeprefix(".")
            yield name if name in MODULES else name.rpartition(".")[0]


def test_every_module_has_a_layer_and_every_layer_a_module():
    assert set(MODULES) == set(HEIGHT)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_lower_layers_and_its_own_only(name):
    higher = {other for other in internal(MODULES[name]) if HEIGHT[other] > HEIGHT[name]}
    assert higher == set()


def test_no_two_modules_import_each_other():
    graph = {name: set(internal(path)) - {name} for name, path in MODULES.items()}
    done: set[str] = set()
    while free := {name for name in graph if name not in done and graph[name] <= done}:
        done |= free
    assert set(graph) - done == set()


@pytest.mark.parametrize("name", sorted(LIGHT | {n for n in MODULES if n.startswith("envs.")}))
def test_a_light_module_loads_nothing_heavy_at_its_top(name):
    roots = {full.split(".")[0] for full in imports(MODULES[name], top_only=True)}
    assert roots & HEAVY == set()
