"""Everything in cluster/ is what KubeRay, Ray and this package know: fields, paths, settings.

KubeRay's own schemas are read from the folder that KUBERAY_CRDS names (`make crds` fetches them);
Kubernetes' from its client library (extra `dev`), AWS's from botocore, which wants an older
python-dateutil than that and so an environment of its own.
"""

import copy
import importlib
import lzma
import os
import re
import shlex
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray._private import ray_constants
from ray._private.label_utils import parse_node_labels_string
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import (
    HTTPOptionsSchema,
    LoggingConfig,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from step_ray import __version__
from step_ray.cluster.resources import Node, fault
from step_ray.cluster.spot import CLOUDS
from step_ray.config import load_config
from step_ray.serve import ServeArgs
from step_ray.stages.line import build_stages

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RAY_UP = sorted((CLUSTER / "ray-up").glob("*.yaml"))
CRD_NAMES = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
IMAGE_ROOT = "/home/ray/step_ray/"
"""Where the images have this repository."""
ROLES = ("rollout", "train", "serve")


def documents():
    return [doc for path in KUBERAY for doc in yaml.safe_load_all(path.read_text())]


def named(kind):
    (doc,) = (doc for doc in documents() if doc["kind"] == kind)
    return doc


def cluster_of(doc):
    spec = doc["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


RAY_KINDS = [doc for doc in documents() if doc["kind"] in CRD_NAMES]
GROUPS = [
    pytest.param(group, id=f"{doc['kind']}-{group.get('groupName', 'head')}")
    for doc in RAY_KINDS
    for group in (cluster_of(doc)["headGroupSpec"], *cluster_of(doc)["workerGroupSpecs"])
]
ray_kinds = pytest.mark.parametrize("doc", RAY_KINDS, ids=lambda doc: doc["kind"])
ray_up = pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)


# Schemas, strictly: a field that they do not know is a fault


def closed(schema):
    """The schema with every object closed that lists its properties, in JSON Schema's words."""
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        schema["properties"] = {key: closed(part) for key, part in schema["properties"].items()}
        if "additionalProperties" not in schema:
            schema["additionalProperties"] = bool(
                schema.get("x-kubernetes-preserve-unknown-fields", False)
            )
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = closed(schema["additionalProperties"])
    if isinstance(schema.get("items"), dict):
        schema["items"] = closed(schema["items"])
    return schema


@pytest.fixture(scope="module")
def crds():
    folder = os.environ.get("KUBERAY_CRDS", "")
    if not folder or not list(Path(folder).glob("ray.io_*.yaml*")):
        pytest.skip("KUBERAY_CRDS names no folder with KubeRay's ray.io_*.yaml; run `make crds`")
    return Path(folder)


def crd_schema(folder, kind):
    stem = folder / f"ray.io_{CRD_NAMES[kind]}.yaml"
    packed = stem.with_name(stem.name + ".xz")
    text = stem.read_bytes() if stem.exists() else lzma.decompress(packed.read_bytes())
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(text, Loader=loader)["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    # the API server checks metadata by itself; the definition says no more than `object`
    schema["properties"]["metadata"] = {"type": "object"}
    return closed(schema)


@ray_kinds
def test_kuberays_own_schema_takes_the_manifest_and_no_unknown_field(crds, doc):
    schema = crd_schema(crds, doc["kind"])
    jsonschema.Draft7Validator(schema).validate(doc)
    for spoil in (
        lambda d: d["spec"].__setitem__("rayClusterSpek", {}),
        lambda d: cluster_of(d)["headGroupSpec"].__setitem__("replicas", 1),
        lambda d: _container(cluster_of(d)["workerGroupSpecs"][0]).__setitem__("livenesProbe", {}),
    ):
        wrong = copy.deepcopy(doc)
        spoil(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft7Validator(schema).validate(wrong)


def _container(group):
    return group["template"]["spec"]["containers"][0]


def unknown_fields(value, type_name, models, where=""):
    """Fields that Kubernetes' client does not know, by its own lists of fields."""
    list_of = re.fullmatch(r"[Ll]ist\[(.+)\]", type_name)
    dict_of = re.fullmatch(r"[Dd]ict\[str, (.+)\]", type_name)
    if list_of:
        parts = [(part, list_of[1], f"{where}[{i}]") for i, part in enumerate(value)]
    elif dict_of:
        parts = [(part, dict_of[1], f"{where}.{key}") for key, part in value.items()]
    elif hasattr(models, type_name):
        model = getattr(models, type_name)
        types = {json: model.openapi_types[name] for name, json in model.attribute_map.items()}
        parts = [(v, types.get(key), f"{where}.{key}") for key, v in value.items()]
    else:
        return [] if not isinstance(value, dict) or type_name == "object" else [where]
    faults = [path for _, type_, path in parts if type_ is None]
    for part, type_, path in parts:
        if type_ is not None:
            faults += unknown_fields(part, type_, models, path)
    return faults


@pytest.fixture(scope="module")
def models():
    return pytest.importorskip("kubernetes.client.models", reason="pip install kubernetes")


CORE_TYPES = {
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "NetworkPolicy": "V1NetworkPolicy",
    "PodDisruptionBudget": "V1PodDisruptionBudget",
}


def test_kubernetes_knows_every_field_of_its_own_kinds(models):
    others = [doc for doc in documents() if doc["kind"] not in CRD_NAMES]
    assert {doc["kind"] for doc in others} == set(CORE_TYPES)
    for doc in others:
        assert unknown_fields(doc, CORE_TYPES[doc["kind"]], models) == []


@pytest.mark.parametrize("group", GROUPS)
def test_kubernetes_knows_every_field_of_the_pods(models, group):
    assert unknown_fields(group["template"], "V1PodTemplateSpec", models) == []


def test_an_unknown_field_of_a_pod_is_seen(models):
    template = {"spec": {"containers": [{"name": "a", "readynessProbe": {}}], "volumez": []}}
    assert unknown_fields(template, "V1PodTemplateSpec", models) == [
        ".spec.volumez",
        ".spec.containers[0].readynessProbe",
    ]


@ray_up
def test_rays_own_validator_takes_the_cluster_file(path):
    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    wrong = {**config, "idle_timeout": 5}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(wrong)


def test_aws_takes_the_machines_of_the_cluster_file():
    session = pytest.importorskip("botocore.session", reason="pip install botocore").get_session()
    from botocore.validate import ParamValidator

    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    config = yaml.safe_load((CLUSTER / "ray-up" / "aws.yaml").read_text())
    for node in config["available_node_types"].values():
        asked = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(asked, shape)
        assert not report.has_errors(), report.generate_report()


def serve_configs():
    yield "RayService", yaml.safe_load(named("RayService")["spec"]["serveConfigV2"])
    for file in (ROOT / "jobs" / "serve.yaml", CLUSTER / "serve.yaml"):
        if file.is_file():
            yield file.name, yaml.safe_load(file.read_text())


@pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in serve_configs()])
def test_serve_takes_the_config_and_the_application_takes_its_arguments(config):
    # Serve's own models leave out what they do not know, so the keys are compared with theirs
    parsed = ServeDeploySchema.model_validate(config)
    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert set(config.get("http_options", {})) <= set(HTTPOptionsSchema.model_fields)
    assert set(config.get("logging_config", {})) <= set(LoggingConfig.model_fields)
    assert all(
        set(app) <= set(ServeApplicationSchema.model_fields) for app in config["applications"]
    )
    for app in parsed.applications:
        module, _, name = app.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        args = ServeArgs.model_validate(app.args)
        assert args.model_dir


# What is named there exists here


def entrypoints():
    """Commands that run something of this repository, with where they stand."""
    yield "RayJob", named("RayJob")["spec"]["entrypoint"]
    for path in (*KUBERAY, *RAY_UP):
        comment = re.sub(r"\\\n# *", "", path.read_text())
        for line in re.findall(r"^# .*ray job submit .*? -- (.*)$", comment, re.MULTILINE):
            yield path.name, line


@pytest.mark.parametrize(("where", "command"), list(entrypoints()))
def test_an_entrypoint_runs_a_job_with_a_config_and_keys_that_exist(where, command):
    python, script, flag, config, *overrides = shlex.split(command)
    assert (python, flag) == ("python", "--config")
    files = [ROOT / name.removeprefix(IMAGE_ROOT) for name in (script, config)]
    assert all(file.is_file() for file in files), files
    loaded = load_config(files[1], overrides)
    assert (loaded.output_dir, loaded.serve.host) == ("/data/runs", "0.0.0.0")


def test_comments_have_as_many_entrypoints_as_there_are_ways_to_a_cluster():
    assert [where for where, _ in entrypoints()] == [
        "RayJob",
        "raycluster.yaml",
        "aws.yaml",
        "gcp.yaml",
    ]


def test_images_are_this_version_on_the_ray_that_is_pinned():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    text = (CLUSTER / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    assert arguments["RAY_VERSION"] == pins["ray"]
    assert f"torch=={pins['torch']}" in text
    targets = re.findall(
        r"^FROM rayproject/ray:\$\{RAY_VERSION\}-\$\{PYTHON\}-(\w+) AS (\w+)$", text, re.M
    )
    assert targets == [("cpu", "cpu"), ("gpu", "gpu")]
    used = set(
        re.findall(r"step-ray:([\w.-]+)", "".join(p.read_text() for p in (*KUBERAY, *RAY_UP)))
    )
    assert used == {f"{__version__}-cpu", f"{__version__}-gpu"}
    assert all(cluster_of(doc)["rayVersion"] == pins["ray"] for doc in RAY_KINDS)


def test_the_image_has_a_python_that_the_project_supports():
    text = (CLUSTER / "Dockerfile").read_text()
    major, minor = re.search(r"^ARG PYTHON=py(\d)(\d+)$", text, re.M).groups()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={major}.{minor}"
    extras = {
        name for found in re.findall(r"^ARG EXTRAS=(\S+)$", text, re.M) for name in found.split(",")
    }
    assert extras <= set(project["optional-dependencies"])


def test_the_image_copies_what_exists_and_what_it_ignores_not():
    text = (CLUSTER / "Dockerfile").read_text()
    ignore = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY --chown=1000:100 (.+)$", text, re.M):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources)
        assert {f"!{source}" for source in sources} <= set(ignore)


def text_of_all():
    return "".join(path.read_text() for path in (*KUBERAY, *RAY_UP, CLUSTER / "Dockerfile"))


def test_health_is_asked_where_this_ray_answers():
    urls = set(re.findall(r"http://localhost:(\d+)(/\S+)", text_of_all()))
    import ray

    sources = Path(ray.__file__).parent
    known = (sources / "dashboard" / "http_server_head.py").read_text()
    agent = str(ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT)
    head = str(ray_constants.DEFAULT_DASHBOARD_PORT)
    assert urls == {
        (agent, "/api/local_raylet_healthz"),
        (head, "/api/gcs_healthz"),
        ("8000", "/-/healthz"),
    }
    assert '"/api/local_raylet_healthz"' in known
    assert '"/api/gcs_healthz"' in known


def test_variables_of_ray_exist_in_this_ray():
    import ray

    constants = (Path(ray.__file__).parent / "_private" / "ray_constants.py").read_text()
    own = {"RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_HEAD_IP"}
    for name in set(re.findall(r"\bRAY_[A-Z_]+\b", text_of_all())) - own - {"RAY_VERSION"}:
        assert f'"{name}"' in constants, name


def test_commands_of_step_ray_exist():
    from step_ray.cli import app

    known = {
        (info.name or info.callback.__name__).replace("_", "-") for info in app.registered_commands
    }
    text = text_of_all()
    called = set(re.findall(r"(?<![/\w-])step-ray ([a-z-]+)", text))
    called |= set(re.findall(r'"step-ray", "([a-z-]+)"', text))
    assert "doctor" in called
    assert called <= known


# What the manifests promise


def labels_of(group):
    return group.get("labels", {})


@ray_kinds
def test_the_job_asks_for_labels_that_groups_have(doc):
    groups = cluster_of(doc)["workerGroupSpecs"]
    have = {labels_of(group)["step-ray/role"] for group in groups}
    for group in groups:
        text = ",".join(f"{key}={value}" for key, value in labels_of(group).items())
        assert parse_node_labels_string(text) == labels_of(group)
    if doc["kind"] == "RayJob":
        config = load_config(ROOT / "jobs" / "configs" / "demo.yaml", overrides_of(doc))
        asked = [config.collect.node_labels, config.train.node_labels, config.serve.node_labels]
        assert [labels["step-ray/role"] for labels in asked] == list(ROLES)
        assert have == set(ROLES)
    elif doc["kind"] == "RayService":
        ((_, config), *_) = serve_configs()
        args = ServeArgs.model_validate(config["applications"][0]["args"])
        assert {args.node_labels["step-ray/role"]} == have == {"serve"}


def overrides_of(doc):
    return [w for w in shlex.split(doc["spec"]["entrypoint"]) if "=" in w]


def autoscaled(doc):
    """What Ray's autoscaler makes of a manifest, once KubeRay has made a cluster of it."""
    resource = {"metadata": {"name": "c", "namespace": "n"}, "spec": cluster_of(doc)}
    return _derive_autoscaling_config_from_ray_cr(resource)


@ray_kinds
def test_rays_autoscaler_reads_groups_labels_resources_and_time_outs(doc):
    config = autoscaled(doc)
    validate_config(config)
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert config["idle_timeout_minutes"] == 5
    for group in cluster_of(doc)["workerGroupSpecs"]:
        node, limits = types[group["groupName"]], _container(group)["resources"]["limits"]
        assert node["labels"] == labels_of(group)
        assert node["resources"]["CPU"] == int(limits["cpu"])
        assert node["resources"].get("GPU", 0) == int(limits.get("nvidia.com/gpu", 0))
        assert node.get("idle_timeout_s") == group.get("idleTimeoutSeconds")


def largest(config):
    """The nodes of a cluster that has grown as far as it may."""
    return [
        Node(amounts=node["resources"], labels=node["labels"])
        for name, node in config["available_node_types"].items()
        for _ in range(1 if name == config["head_node_type"] else node["max_workers"])
    ]


def test_the_run_of_the_job_fits_on_its_cluster_at_the_largest():
    job = named("RayJob")
    words = shlex.split(job["spec"]["entrypoint"])
    config = load_config(ROOT / words[3].removeprefix(IMAGE_ROOT), words[4:])
    stages = [stage.name for stage in build_stages(config)]
    assert fault(config, stages, largest(autoscaled(job))) is None
    assert fault(config, stages, largest(autoscaled(named("RayService")))) is not None


@ray_up
def test_the_run_of_the_comment_fits_on_the_cloud_cluster_at_its_largest(path):
    (command,) = (command for where, command in entrypoints() if where == path.name)
    words = shlex.split(command)
    config = load_config(ROOT / words[3], words[4:])
    nodes = largest(yaml.safe_load(path.read_text()))
    assert fault(config, [stage.name for stage in build_stages(config)], nodes) is None


@ray_up
def test_a_cloud_cluster_has_the_same_roles_spot_rollouts_and_ends_when_idle(path):
    config = yaml.safe_load(path.read_text())
    types = config["available_node_types"]
    assert {name: labels_of(node)["step-ray/role"] for name, node in types.items()} == {
        name: name for name in ("head", *ROLES)
    }
    workers = [types[name] for name in ROLES]
    assert all(node["min_workers"] == 0 and node["idle_timeout_s"] > 0 for node in workers)
    assert sum(node["max_workers"] for node in workers) <= config["max_workers"]
    spot = yaml.safe_dump(types["rollout"]["node_config"])
    assert "MarketType: spot" in spot or "preemptible: true" in spot
    assert types["head"]["resources"] == {"CPU": 0}
    assert [types[name]["resources"].get("GPU", 0) > 0 for name in ROLES] == [False, True, True]


@ray_up
def test_a_cloud_cluster_uses_a_token_and_keeps_secrets_out_of_the_file(path):
    config = yaml.safe_load(path.read_text())
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in c for c in starts if "ray start" in c)
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert config["setup_commands"] == config["worker_setup_commands"] == []
    cloud = config["provider"]["type"]
    assert f"step-ray spot-watch --cloud {cloud} " in config["worker_start_ray_commands"][-1]
    assert cloud in CLOUDS


@ray_kinds
def test_a_kuberay_cluster_is_guarded_and_grows_by_autoscaler_v2(doc):
    cluster = cluster_of(doc)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "step-ray-token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("group", GROUPS)
def test_a_pod_is_limited_probed_unprivileged_and_outlives_the_drain(group):
    spec, container = group["template"]["spec"], _container(group)
    labels = group["template"]["metadata"]["labels"]
    policy = named("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    assert policy.items() <= labels.items()
    for name in ("cpu", "memory", "ephemeral-storage"):
        assert name in container["resources"]["limits"]
    assert (
        container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    )
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)
    context = container["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert spec["securityContext"]["runAsNonRoot"] is True
    env = {var["name"]: var for var in container["env"]}
    drain_s = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]["value"])
    assert drain_s + 15 <= spec["terminationGracePeriodSeconds"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"]}
    assert mounted == {"data": "/data"}
    assert claims == {"data": named("PersistentVolumeClaim")["metadata"]["name"]}
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert container["image"].endswith("-gpu" if gpus else "-cpu")


@pytest.mark.parametrize("group", GROUPS)
def test_keys_come_from_secrets_only(group):
    for var in _container(group)["env"]:
        is_secret = re.search(r"KEY|TOKEN|PASSWORD|SECRET", var["name"])
        assert bool(is_secret) == ("secretKeyRef" in var.get("valueFrom", {})), var["name"]


def test_every_secret_that_is_named_is_made_by_the_commands_in_the_comment():
    text = (CLUSTER / "kuberay" / "base.yaml").read_text()
    made = dict(re.findall(r"create secret generic (\S+) --from-literal=(\S+?)=", text))
    named_in = set()
    for doc in RAY_KINDS:
        cluster = cluster_of(doc)
        named_in.add((cluster["authOptions"]["secretName"], "auth_token"))
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            for var in _container(group)["env"]:
                if "valueFrom" in var:
                    reference = var["valueFrom"]["secretKeyRef"]
                    named_in.add((reference["name"], reference["key"]))
    assert named_in == set(made.items())


def test_the_claim_is_for_many_writers():
    assert named("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_job_is_tried_again_and_leaves_nothing_running():
    spec = named("RayJob")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] >= 1
    labels = spec["submitterPodTemplate"]["metadata"]["labels"]
    policy = named("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    assert policy.items() <= labels.items()


def test_the_served_agent_asks_for_a_key_that_its_pods_have():
    (_, config), *_ = serve_configs()
    key = config["applications"][0]["args"]["api_key_env"]
    for group in cluster_of(named("RayService"))["workerGroupSpecs"]:
        assert key in {var["name"] for var in _container(group)["env"]}
    assert LoggingConfig(**config["logging_config"]).encoding == "JSON"
