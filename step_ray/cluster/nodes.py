"""Whether the nodes of a cluster fit for a run: one folder or store, one set of versions.

Takes the folder of a run on a cluster that Ray is connected to, gives what each node answers or
raises one line. It changes nothing but a file of its own there, which it takes away again.
"""

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from step_ray.errors import ClusterError, ConfigError, StorageError
from step_ray.storage.objects import TRIES
from step_ray.storage.places import place_of, url_of
from step_ray.storage.remote import exists, push, remove
from step_ray.storage.runinfo import machine, versions

ANSWER_S = 25.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
JOB_COPIES = "working_dir_files"
"""Folder in which Ray unpacks the working dir of a job; it goes with the cluster."""
SAME_ON_ALL = ("python", "ray", "step-ray", "torch", "transformers", "pyarrow")
"""What pickles, shards and checkpoints that go from node to node depend on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What one node says of itself."""

    name: str
    sees_folder: bool
    """Or, of a run in a store, reads an object there."""
    versions: Mapping[str, str]
    machine: str
    fault: str = ""
    """What a node says that does not see it."""


def check_folder(folder: Path) -> None:
    """Refuse a folder that would not outlive the cluster.

    Raises:
        ConfigError: it lies in a job's copy of the working dir.
    """
    if JOB_COPIES in folder.resolve().parts:
        raise ConfigError(
            f"output_dir: {str(folder.parent)!r} is in the job's copy of the working dir, which"
            " goes with the cluster; give an absolute folder, on a cluster a shared one"
        )


def check_nodes(folder: Path) -> list[NodeReport]:
    """Ask all nodes of the cluster; those that have not answered within 25 s are left out.

    Args:
        folder: folder of the run; made if it is not there.

    Raises:
        ClusterError: a node does not see the folder, or has other versions than this process.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f".seen-{uuid.uuid4().hex}"
    note.touch()
    try:
        push(note)
        reports = _ask(place_of(note))
    finally:
        remove(note)
    fault = node_fault(folder, reports, versions())
    if fault:
        raise ClusterError(fault)
    return reports


def _ask(note: str) -> list[NodeReport]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(report)
    asked = [
        remote.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(note, node["NodeManagerHostname"])
        for node in ray.nodes()
        if node["Alive"]
    ]
    ready, late = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
    for reference in late:
        ray.cancel(reference, force=True)
    return [answer for reference in ready if (answer := _answer(reference)) is not None]


def _answer(reference: Any) -> NodeReport | None:
    import ray

    try:
        return cast(NodeReport, ray.get(reference))
    except ray.exceptions.RayTaskError as exc:
        line = str(exc).strip().splitlines()[-1]
        raise ClusterError(
            f"nodes: step_ray does not run on all of them ({line}); use one image or environment"
        ) from exc
    except ray.exceptions.RayError:  # the node went away meanwhile; the run will see to that
        return None


def report(note: str, name: str) -> NodeReport:
    """What this machine says; runs on each node."""
    try:
        sees, fault = exists(note, tries=TRIES), ""
    except StorageError as exc:
        sees, fault = False, str(exc)
    return NodeReport(
        name=name, sees_folder=sees, versions=versions(), machine=machine(), fault=fault
    )


def node_fault(folder: Path, reports: Sequence[NodeReport], ours: Mapping[str, Any]) -> str | None:
    """Why these nodes cannot work on a run together; None when they can."""
    blind = [report.name for report in reports if not report.sees_folder]
    url = url_of(folder)
    if blind and url:
        said = next((report.fault for report in reports if report.fault), "")
        return f"output_dir: {url!r} is not seen on {_some(blind)}" + (
            f": {said}" if said else "; look at credentials and AWS_ENDPOINT_URL there"
        )
    if blind:
        return (
            f"output_dir: {str(folder)!r} is not seen on {_some(blind)}; all nodes need the same"
            " folder under the same path (NFS, a ReadWriteMany volume)"
        )
    for package in SAME_ON_ALL:
        here = ours.get(package)
        other = {r.name: r.versions.get(package, "none") for r in reports}
        odd = [name for name, version in other.items() if _base(version) != _base(here or "none")]
        if odd:
            return (
                f"versions: {package} is {here or 'not installed'} here and {other[odd[0]]} on"
                f" {_some(odd)}; use one image or environment on all nodes"
            )
    return None


def reach_fault(serve_host: str, addresses: Collection[str]) -> str | None:
    """Why players on other machines would not reach the served agent; None when they do.

    Args:
        serve_host: `serve.host`.
        addresses: IPs of the cluster's nodes; nodes on one machine share theirs.
    """
    if serve_host not in LOOPBACK or len(set(addresses)) < 2:
        return None
    return (
        f"serve.host: {serve_host!r} is reached from one machine only, and the cluster has"
        f" {len(set(addresses))}; set serve.host=0.0.0.0, and let no other network in"
    )


def node_addresses() -> list[str]:
    """The IPs of the living nodes."""
    import ray

    return [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]


def _base(version: str) -> str:
    """Without the local part: torch 2.13.0+cpu and 2.13.0+cu130 go together."""
    return version.partition("+")[0]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
