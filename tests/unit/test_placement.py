"""The label selectors of the config are in what Ray Train and Ray Serve are given."""

import pytest
from ray import serve
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from step_ray import train as train_module
from step_ray.config import TrainConfig
from step_ray.serve import ServeArgs, build_app


def deployment(app):
    assert isinstance(app, serve.Application)
    return app._bound_deployment


def test_replicas_carry_the_selector():
    args = ServeArgs(model_dir="builtin:tiny-base", node_labels={"step-ray/role": "serve"})
    options = deployment(build_app(args)).ray_actor_options
    assert options["label_selector"] == {"step-ray/role": "serve"}


def test_replicas_without_labels_run_anywhere():
    options = deployment(build_app(ServeArgs(model_dir="builtin:tiny-base"))).ray_actor_options
    assert options.get("label_selector") is None


@pytest.mark.parametrize(("switch", "router"), [("1", "PowerOfTwo"), ("0", "ConsistentHash")])
def test_haproxy_gets_no_router_because_ray_refuses_it(monkeypatch, switch, router):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", switch)
    built = deployment(build_app(ServeArgs(model_dir="builtin:tiny-base")))
    config = built._deployment_config.request_router_config
    assert router in str(config.request_router_class)


@pytest.mark.parametrize(("labels", "expected"), [({"r": "train"}, {"r": "train"}), ({}, None)])
def test_workers_carry_the_selector(labels, expected):
    scaling = train_module.scaling_config(
        TrainConfig(num_workers=2, cpus_per_worker=3, node_labels=labels)
    )
    assert isinstance(scaling, ScalingConfig)
    assert scaling.label_selector == expected
    assert scaling.resources_per_worker == {"CPU": 3}
    assert TorchTrainer(lambda: None, scaling_config=scaling).scaling_config is scaling
