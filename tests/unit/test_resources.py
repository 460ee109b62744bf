"""What can never run on a cluster is said in one line; what may run is let through."""

import pytest

from step_ray.cluster.resources import Node, fault, has_label, local_nodes, taken
from step_ray.config import RayConfig, parse_config
from step_ray.stages.line import build_stages

BOX = [Node(amounts={"CPU": 4.0, "memory": 1e9})]
GPU_BOX = Node(amounts={"CPU": 8.0, "GPU": 1.0})


def line(nodes, only=None, **sections):
    config = parse_config({"name": "r", **sections})
    names = [stage.name for stage in build_stages(config)]
    return fault(config, [name for name in names if only is None or name in only], nodes)


def test_the_default_run_fits_on_four_cpus():
    assert line(BOX) is None


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"train": {"num_workers": 5}},
            "train.num_workers: 5 x (1 CPU) does not fit; the cluster has 4 CPU, 0 GPU;"
            " lower it or use a larger cluster",
        ),
        (
            {"train": {"use_gpu": True}},
            "train.num_workers: 1 x (1 CPU, 1 GPU) does not fit; the cluster has 4 CPU, 0 GPU;"
            " lower it or use a larger cluster",
        ),
        (
            {"train_arm": {"num_workers": 4}},
            "train.num_workers: 4 x (1 CPU) does not fit beside serve.num_replicas: 1 x (1 CPU);"
            " the cluster has 4 CPU, 0 GPU; lower it or use a larger cluster",
        ),
        (
            {"serve": {"autoscaling": {"min_replicas": 3, "max_replicas": 9}}},
            "serve.autoscaling.min_replicas: 3 x (1 CPU) does not fit beside"
            " collect.cpus_per_actor: 1 x (0.5 CPU) and the reader of the task list: 1 x (1 CPU);"
            " the cluster has 4 CPU,"
            " 0 GPU; lower it or use a larger cluster",
        ),
        (
            {"serve": {"num_replicas": 3}},
            "serve.num_replicas: 3 x (1 CPU) does not fit beside collect.cpus_per_actor:"
            " 1 x (0.5 CPU) and the reader of the task list: 1 x (1 CPU); the cluster has 4 CPU,"
            " 0 GPU; lower it or use a larger cluster",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_what_there_is(sections, expected):
    assert line(BOX, **sections) == expected


def test_what_others_hold_is_told_with_what_is_left():
    config = parse_config({"name": "r"})
    stages = [stage.name for stage in build_stages(config)]
    assert taken(config, stages, {"CPU": 4.0}) is None
    assert taken(config, stages, {"CPU": 0.5}) == (
        "1.5 CPU are wanted at once (collect.cpus_per_actor: 1 x (0.5 CPU) and the reader of the"
        " task list: 1 x (1 CPU)), 0.5 are free; others on the cluster hold the rest"
    )
    assert taken(config, ["report"], {}) is None


def test_a_worker_larger_than_every_node_does_not_fit_though_the_sum_does():
    assert line([*BOX, *BOX], train={"cpus_per_worker": 5}) == (
        "train.num_workers: 1 x (5 CPU) does not fit; the 2 nodes of the cluster have 8 CPU, 0 GPU;"
        " lower it or use a larger cluster"
    )
    assert line([Node(amounts={"CPU": 5.0})], train={"cpus_per_worker": 4}) is None


def test_workers_are_spread_over_nodes_by_all_that_they_need():
    two = {"train": {"num_workers": 2, "use_gpu": True, "cpus_per_worker": 4}}
    assert line([GPU_BOX, GPU_BOX], **two) is None
    nodes = [Node(amounts={"CPU": 16.0}), Node(amounts={"CPU": 1.0, "GPU": 2.0})]
    assert line(nodes, **two).startswith("train.num_workers: 2")


def test_only_the_stages_to_do_are_asked_for():
    gpus = {"train": {"use_gpu": True}, "serve": {"gpus_per_replica": 1}}
    assert line(BOX, only=("tasks", "expert", "dataset:base", "report"), **gpus) is None
    assert line(BOX, only=("evaluate:base",), **gpus).startswith("serve.num_replicas: 1 x")


def test_a_served_agent_that_holds_a_gpu_is_stopped_before_the_arms_train():
    config = {"train": {"use_gpu": True}, "serve": {"gpus_per_replica": 1}}
    assert line([GPU_BOX], **config) is None


def test_tenths_of_a_gpu_add_up():
    serve = {"num_replicas": 10, "gpus_per_replica": 0.1, "cpus_per_replica": 0.1}
    assert line([GPU_BOX], serve=serve) is None
    assert line([GPU_BOX], serve={**serve, "num_replicas": 11}) is not None


def test_a_local_cluster_has_the_cpus_that_it_is_given():
    assert local_nodes(RayConfig(num_cpus=7), with_gpus=False) == [
        Node(amounts={"CPU": 7, "GPU": 0})
    ]


@pytest.mark.parametrize(
    ("section", "stage"),
    [("collect", "expert"), ("serve", "evaluate:base"), ("train", "train:base")],
)
def test_labels_that_no_node_has_are_named_with_those_there_are(section, stage):
    nodes = [Node(amounts={"CPU": 8.0}, labels={"role": "other"})]
    assert line(nodes, only=(stage,), **{section: {"node_labels": {"role": "mine"}}}) == (
        f"{section}.node_labels: no node of the cluster has role: mine (there: other);"
        " label nodes with `ray start --labels`, or mend the setting"
    )


def test_training_is_counted_on_the_nodes_with_its_labels_only():
    nodes = [
        Node(amounts={"CPU": 8.0}, labels={"role": "rollout"}),
        Node(amounts={"CPU": 1.0}, labels={"role": "train"}),
    ]
    train = {"num_workers": 2, "node_labels": {"role": "train"}}
    assert line(nodes, only=("train:base",), train=train) == (
        "train.num_workers: 2 x (1 CPU on role: train) does not fit; the nodes with these labels"
        " have 1 CPU, 0 GPU; lower it or use a larger cluster"
    )
    assert line(nodes, only=("train:base",), train={"num_workers": 2}) is None


LABELLED = [
    Node(amounts={"CPU": 4.0}, labels={"role": "head"}),
    Node(amounts={"CPU": 1.0}, labels={"role": "rollout", "zone": "a"}),
]


@pytest.mark.parametrize(
    ("wanted", "takes"),
    [
        ("rollout", [False, True]),
        ("!rollout", [True, False]),
        ("in(a, rollout)", [False, True]),
        ("!in(head,rollout)", [False, False]),
    ],
)
def test_a_label_is_read_as_ray_reads_it(wanted, takes):
    assert [has_label(node, "role", wanted) for node in LABELLED] == takes


def test_a_node_without_the_label_has_none_of_its_values():
    assert [has_label(node, "zone", "!a") for node in LABELLED] == [True, False]


def test_rollouts_on_a_label_that_no_node_has_are_refused():
    assert line(LABELLED, collect={"node_labels": {"role": "cpu"}}) == (
        "collect.node_labels: no node of the cluster has role: cpu (there: head, rollout);"
        " label nodes with `ray start --labels`, or mend the setting"
    )
    assert line(LABELLED, collect={"node_labels": {"role": "rollout"}}) is None


def test_rollouts_must_fit_on_the_nodes_of_their_label():
    collect = {"node_labels": {"role": "rollout"}, "cpus_per_actor": 2}
    assert line(LABELLED, collect=collect) == (
        "collect.cpus_per_actor: 1 x (2 CPU on role: rollout) does not fit; the nodes with these"
        " labels have 1 CPU, 0 GPU; lower it or use a larger cluster"
    )


def test_a_student_behind_an_address_takes_nothing_of_the_cluster():
    student = {"endpoint": {"base_url": "http://h/v1", "model": "m"}}
    gpus = {"serve": {"gpus_per_replica": 1}}
    assert line(BOX, only=("collect",), **gpus) is not None
    assert line(BOX, only=("collect",), collect=student, **gpus) is None


def test_a_range_of_workers_on_labelled_nodes_is_refused_where_ray_would_count_others_too():
    train = {"num_workers": [1, 2], "node_labels": {"role": "train"}, "use_gpu": True}
    trainer = Node(amounts={"CPU": 8.0, "GPU": 1.0}, labels={"role": "train"})
    server = Node(amounts={"CPU": 8.0, "GPU": 1.0})
    players = Node(amounts={"CPU": 8.0})
    assert line([trainer, players], ["train:base"], train=train) is None
    assert line([trainer, server], ["train:base"], train={**train, "num_workers": 1}) is None
    assert line([trainer, server], ["train:base"], train=train) == (
        "train.num_workers: with a range, Ray counts nodes without train.node_labels too, and"
        " others here have room for a worker"
        " (train.num_workers: 1 x (1 CPU, 1 GPU on role: train));"
        " give one number, or start those nodes without such resources"
    )
