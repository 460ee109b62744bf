"""Facts about where and with what a run was made: versions, git revision, machine, time.

Takes nothing, gives plain data; never fails for a fact that cannot be had.
"""

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("step-ray", "ray", "torch", "transformers", "peft", "pyarrow", "openai", "vllm")


def run_info() -> dict[str, Any]:
    """Everything that run.json says about one start of a run."""
    return {
        "created": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git_revision": git_revision(),
        "versions": versions(),
        "machine": machine(),
    }


def git_revision() -> str:
    """The commit of the source tree, `+` when it has uncommitted changes; empty outside git."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Python and the packages that results depend on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Processor, cores and memory in one line."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_processor()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
