"""Lower layers never import higher ones; the order is the list below, lowest first."""

import ast
from pathlib import Path

import pytest

import step_ray

PACKAGE = Path(step_ray.__file__).parent
LAYERS = """
step_ray calls cluster collection evaluation serving stages storage tools training
step_ray data errors progress report.charts serving.kvcache storage.runinfo
    training.loss types
storage.places
storage.objects
storage.remote
storage.lease
serving.decodegraph serving.rowtext
training.attention training.encoding training.headloss training.kernels training.sharding
    training.turnend
report.collection
envs.alfworld envs.alfworld.tables
envs.scienceworld envs.scienceworld.tables envs.scienceworld.text evaluation.scores
envs.webshop envs.webshop.tables
env_config evaluation.stats react storage.records tools.show
evaluation.behaviour
evaluation.evalreport
storage.shards
store
storage.compact
calls.spending cluster.labels
training.recipe
collection.config collection.teacher_config serving.config training.config
config
cluster.logs storage.mirror training.chat_template
render
calls.endpoint
calls.desk calls.gate calls.ratelimit calls.reply calls.replylimit calls.request llm
serving.api serving.api.agent_schemas serving.api.errors serving.api.metrics
    serving.api.schemas
serving.api.backend serving.api.checks serving.api.guard
serving.api.acting serving.api.answers
serving.api.agent_routes
serving.api.app
calls.cache calls.firstcall calls.meter
collection.failures collection.tally collection.totals storage.shardwriter
collection.metrics
report.cost
cluster.resources collection.player envs.base report.results training.faults
    training.holdout training.masking
training.flops training.job training.model_files training.schedule training.tracking
envs envs.alfworld.belief envs.alfworld.goal envs.alfworld.text
envs.alfworld.usual envs.scienceworld.jvm
envs.scienceworld.env envs.scienceworld.track
envs.scienceworld.gold
envs.scienceworld.goldcache
envs.scienceworld.expert envs.scienceworld.tasks
envs.scienceworld.content
envs.webshop.analysis envs.webshop.generator envs.webshop.products
envs.webshop.pages envs.webshop.reward envs.webshop.search
envs.webshop.catalogue
envs.webshop.goals envs.webshop.session
envs.webshop.env envs.webshop.tasks
envs.webshop.expert envs.webshop.judge envs.webshop.nouncheck envs.webshop.replay
envs.webshop.recordings
envs.alfworld.expert envs.alfworld.problem envs.alfworld.scene
envs.alfworld.usual_count
envs.alfworld.engine envs.alfworld.pddl_text envs.alfworld.plan
envs.alfworld.generator envs.alfworld.judge envs.alfworld.official
envs.alfworld.env envs.alfworld.explorer envs.alfworld.parity envs.alfworld.tasks
collection.judging
cluster.joining cluster.nodes serving.generation storage.runfolder tasks teacher
    training.batching training.student
serving.args serving.generation_thread
cluster.spot serving.vllm_fetch
cluster.raysetup
dataset report.page rollout serving.local_model training.mask_view training.trainee
training.batch_view training.layout
training.learner
training.speed training.state training.validation
training.checkpoints training.export training.preemption
report.episodes report.runs
collection.runner report storage.claim tools.play tools.viewer training.loop
serving.episode_service
serving.agent_server
serving.vllm_ingress
serving.vllm_app
serve
data.files data.flags
data.chats tools.replay
data.formats data.stats
data.agenttraj data.export data.inspect_log
data.ingest
data.commands
collect serving.command tools.episodes train
collection.expert_scores
collection.agentplay collection.listplay evaluation.compare stages.summary training.pretrain
evaluate stages.base
stages.training
stages.line
pipeline
cluster.doctor
evaluation.outside
cli
"""
"""A layer per line, the lowest first; an indented line goes on with the one above."""

ROOT = "step_ray"
HEIGHT = {
    name: height
    for height, line in enumerate(LAYERS.strip().replace("\n    ", " ").splitlines())
    for name in line.split()
}
HEAVY = {"ray", "torch", "transformers", "tokenizers", "peft"}
LOADS_HEAVY = """
collect render serve serving.agent_server serving.decodegraph serving.generation
serving.generation_thread serving.kvcache serving.vllm_app serving.vllm_fetch
serving.vllm_ingress train training.attention training.batch_view training.batching
training.checkpoints training.encoding training.export training.faults training.flops
training.headloss training.layout training.learner training.loop training.loss training.mask_view
training.model_files training.preemption training.sharding training.speed training.state
training.student
training.trainee training.turnend training.validation
"""
"""The modules that load one of these at their top; all others are light for the command line."""

RAYLESS = """
render training.batching training.loss training.headloss training.attention training.layout
training.sharding training.trainee training.learner training.state training.export training.speed
training.kernels
"""
"""The training step from conversation to weights; it runs on a machine without Ray."""


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or ROOT


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
            yield name if name in MODULES else name.rpartition(".")[0] or ROOT


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


def test_a_light_module_loads_nothing_heavy_at_its_top():
    loads = {
        name
        for name, path in MODULES.items()
        if {full.split(".")[0] for full in imports(path, top_only=True)} & HEAVY
    }
    assert loads == set(LOADS_HEAVY.split())


@pytest.mark.parametrize("name", RAYLESS.split())
def test_the_training_step_imports_no_ray_at_any_depth(name):
    reached, todo = set(), {name}
    while todo:
        reached |= todo
        todo = {below for module in todo for below in internal(MODULES[module])} - reached
    with_ray = {
        module
        for module in reached
        if any(full.split(".")[0] == "ray" for full in imports(MODULES[module]))
    }
    assert with_ray == set()
