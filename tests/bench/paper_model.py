"""On paper: a collection of 10^6 episodes on 64 GPUs and 1,000 cores. What saturates first?

    python tests/bench/paper_model.py [--gpus 64] [--turns 20] [--student-decode 2500] ...

Each resource alone would allow so many episodes a second; the smallest is the run's. GPUs are
divided between student and teacher so that both are full together. What was measured is the
evaluation of bench_scaling.py, per call and episode. What is assumed (rates of engines, lengths of
turns) was not measured, for there was no GPU. Every number is an option.
"""

import argparse
from collections.abc import Callable

MEASURED = {
    "actor-ms": (6.0, "CPU of an actor per turn, ms: two calls, student and teacher, of 3 ms each"),
    "ray-ms": (116.0, "CPU of the rest of Ray per episode, ms, on all nodes; with its start"),
    "driver-ms": (36.0, "CPU of the driver per episode, ms, one process; with its start"),
}
ASSUMED = {
    "episodes": (1e6, "episodes of the run"),
    "gpus": (64, "GPUs of student and teacher together"),
    "cores": (1000, "CPU cores of the rollout nodes"),
    "turns": (20, "turns of an episode"),
    "student-out": (40, "tokens that the student writes in a turn"),
    "student-in": (120, "new prompt tokens of a turn; earlier ones are in the prefix cache"),
    "teacher-out": (90, "tokens that the teacher writes about a turn"),
    "teacher-in": (200, "new prompt tokens of a judgement"),
    "student-decode": (2500, "tokens/s that a GPU writes, 7B student, bf16, full batches"),
    "student-prefill": (12000, "prompt tokens/s of a GPU, 7B student"),
    "teacher-decode": (400, "tokens/s of a GPU of the teacher, 70B, tensor parallel"),
    "teacher-prefill": (2000, "prompt tokens/s of a GPU of the teacher"),
    "turn-s": (6.0, "seconds of a turn, both calls, under full batches"),
    "per-actor": (32, "episodes at once in an actor"),
    "kib": (5, "KiB on disk per episode"),
}


def limits(of: Callable[[str], float]) -> dict[str, float]:
    """Resource -> episodes a second that it allows.

    Args:
        of: name of an option -> its value.
    """
    student_s = of("turns") * (
        of("student-out") / of("student-decode") + of("student-in") / of("student-prefill")
    )
    teacher_s = of("turns") * (
        of("teacher-out") / of("teacher-decode") + of("teacher-in") / of("teacher-prefill")
    )
    cpu_s = (of("turns") * of("actor-ms") + of("ray-ms")) / 1e3
    return {
        "GPUs": of("gpus") / (student_s + teacher_s),
        "rollout cores": of("cores") / cpu_s,
        "driver (one core)": 1e3 / of("driver-ms"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (value, what) in {**ASSUMED, **MEASURED}.items():
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{what} ({value:g})")
    values = {name.replace("_", "-"): value for name, value in vars(parser.parse_args()).items()}
    of = values.__getitem__
    allowed = limits(of)
    first = min(allowed, key=allowed.__getitem__)
    rate = allowed[first]
    for kind, options in (("assumed", ASSUMED), ("measured", MEASURED)):
        print(f"{kind}: " + ", ".join(f"{name} {of(name):g}" for name in options))
    print(f"{'':18} {'episodes/s':>10} {'hours alone':>11} {'used':>6}")
    for name, number in sorted(allowed.items(), key=lambda item: item[1]):
        hours = of("episodes") / number / 3600
        print(f"{name:18} {number:10.1f} {hours:11.1f} {100 * rate / number:5.0f} %")
    in_flight = rate * of("turns") * of("turn-s")
    free = min(number for name, number in allowed.items() if name != "GPUs")
    print(
        f"{first} saturate first: {of('episodes') / rate / 3600:.1f} h,"
        f" {of('episodes') * of('kib') / 2**20:.1f} GiB of shards. In flight"
        f" {in_flight:,.0f} episodes in {in_flight / of('per-actor'):,.0f} actors;"
        f" {rate * of('turns') * 2:,.0f} calls/s. The next limit comes at"
        f" {of('gpus') * free / allowed['GPUs']:,.0f} GPUs."
    )


if __name__ == "__main__":
    main()
