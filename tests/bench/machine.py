"""What a bench says about the machine beside its times: load, stolen time, CPU and memory."""

import os
import re
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def tree(pid: int | None = None) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _fields(int(stat.parent.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid or os.getpid()]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def _fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended."""
    fields = _fields(pid)
    return sum(map(int, fields[11:15])) / TICKS if fields else 0.0


def cpu_of_tree(pid: int | None = None) -> dict[str, float]:
    """CPU seconds by kind of process: `driver`, `actors` (of Ray Data), `ray` (all else)."""
    root = pid or os.getpid()
    spent = {"driver": cpu_s(root), "actors": 0.0, "ray": 0.0}
    for process in tree(root)[1:]:
        spent["actors" if "EpisodeRunner" in name_of(process) else "ray"] += cpu_s(process)
    return spent


def name_of(pid: int) -> str:
    """The command line; Ray writes into it what a worker is."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def memory_mb(pid: int | None = None) -> dict[str, float]:
    """MiB of a process: resident, its share of it (PSS), and what is its own and no file."""
    text = Path(f"/proc/{pid or os.getpid()}/smaps_rollup").read_text()
    kb = {key: int(value) for key, value in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
    return {name: kb[key] / 1024 for name, key in FIELDS.items()}


FIELDS = {"rss": "Rss", "pss": "Pss", "own": "Anonymous"}


class Stolen:
    """Share of the CPU time that other machines and other processes took since it was made."""

    def __init__(self) -> None:
        self._before = _cpu_line()

    def __str__(self) -> str:
        now = _cpu_line()
        spent = [b - a for a, b in zip(self._before, now, strict=True)]
        whole = sum(spent[:8]) or 1
        load = " ".join(f"{x:.1f}" for x in os.getloadavg())
        return (
            f"load {load}, {os.cpu_count()} cores, busy {100 - 100 * spent[3] / whole:.0f} %,"
            f" stolen {100 * spent[7] / whole:.1f} %"
        )


def _cpu_line() -> list[int]:
    return [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
