"""The WebShop simulator against recordings of the official one: purchases, goals, episodes.

Takes files of recordings and a catalogue, tells what differs and gives how much. The comparison of
one record is replay.py's.
"""

import json
from collections.abc import Callable
from pathlib import Path

from step_ray.envs.webshop import replay
from step_ray.envs.webshop.catalogue import Catalogue
from step_ray.envs.webshop.goals import list_goals

Tell = Callable[[str], object]
"""Called with each line of the report."""


def check_vectors(path: Path, catalogue: Catalogue, tell: Tell) -> int:
    """Reward vectors; gives how many differ."""
    vectors = json.loads(path.read_text(encoding="utf-8"))
    checked = ((number, replay.check_vector(v, catalogue)) for number, v in enumerate(vectors))
    wrong = [(number, faults) for number, faults in checked if faults]
    for number, faults in wrong[:10]:
        tell(f"vector {number}: {', '.join(faults)}")
    tell(f"reward: {len(vectors) - len(wrong)} of {len(vectors)} purchases as recorded")
    return len(wrong)


def check_goals(path: Path, catalogue: Catalogue, tell: Tell) -> int:
    """Goals in the official order; gives how many differ."""
    recorded = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ours = list_goals(catalogue, "synthetic", 0)
    same = sum(
        (g.asin, dict(g.options), list(g.attributes))
        == (r["asin"], r["goal_options"], r["attributes"])
        for g, r in zip(ours, recorded, strict=False)
    )
    tell(f"goals: {same} of {len(recorded)} in their place, {len(ours)} ours")
    return max(len(recorded), len(ours)) - same


def check_episodes(path: Path, catalogue: Catalogue, tell: Tell) -> int:
    """Searches and whole episodes; gives how many observations differ beyond the price limit."""
    episodes = list(replay.read_episodes(path))
    found = replay.compare_searches([turns for _, turns in episodes], catalogue)
    number = max(found.searches, 1)
    tell(
        f"searches: {found.searches}, same first hit {100 * found.first_same / number:.2f} %,"
        f" same page in order {100 * found.all_same / number:.2f} %,"
        f" mean overlap of the first ten {found.overlap / number:.4f}"
    )
    goals, beyond = list_goals(catalogue, "synthetic", 0), 0
    for recorded_limits in (False, True):
        report = replay.replay(episodes, goals, catalogue, recorded_limits)
        limits = "recorded" if recorded_limits else "our own"
        tell(f"replay of {report.episodes} episodes with {limits} price limits:")
        for kind, count in report.steps.most_common():
            tell(f"  {count:6} {kind} (first: {report.examples[kind]})")
        harmless = {"identical"} if recorded_limits else {"identical", replay.PRICE_LIMIT}
        beyond += report.steps.total() - sum(report.steps[kind] for kind in harmless)
    return beyond


CHECKS = {"vectors": check_vectors, "goals": check_goals, "episodes": check_episodes}
"""What recordings hold -> their comparison."""
