"""Facts of ScienceWorld 1.2 as data: task types, variations per split, and the eto preset.

Takes nothing, does nothing. A test compares the numbers with the engine.
"""

from types import MappingProxyType

SPLITS = ("train", "dev", "test")
SPLIT_SIZES: MappingProxyType[str, tuple[int, int, int]] = MappingProxyType(
    {
        "boil": (14, 7, 9),
        "change-the-state-of-matter-of": (14, 7, 9),
        "chemistry-mix": (16, 8, 8),
        "chemistry-mix-paint-secondary-color": (18, 9, 9),
        "chemistry-mix-paint-tertiary-color": (18, 9, 9),
        "find-animal": (150, 75, 75),
        "find-living-thing": (150, 75, 75),
        "find-non-living-thing": (150, 75, 75),
        "find-plant": (150, 75, 75),
        "freeze": (14, 7, 9),
        "grow-fruit": (62, 31, 33),
        "grow-plant": (62, 31, 33),
        "identify-life-stages-1": (6, 3, 5),
        "identify-life-stages-2": (4, 2, 4),
        "inclined-plane-determine-angle": (84, 42, 42),
        "inclined-plane-friction-named-surfaces": (692, 346, 348),
        "inclined-plane-friction-unnamed-surfaces": (80, 40, 42),
        "lifespan-longest-lived": (62, 31, 32),
        "lifespan-longest-lived-then-shortest-lived": (62, 31, 32),
        "lifespan-shortest-lived": (62, 31, 32),
        "measure-melting-point-known-substance": (218, 109, 109),
        "measure-melting-point-unknown-substance": (150, 75, 75),
        "melt": (14, 7, 9),
        "mendelian-genetics-known-plant": (60, 30, 30),
        "mendelian-genetics-unknown-plant": (240, 120, 120),
        "power-component": (10, 5, 5),
        "power-component-renewable-vs-nonrenewable-energy": (10, 5, 5),
        "test-conductivity": (450, 225, 225),
        "test-conductivity-of-unknown-substances": (300, 150, 150),
        "use-thermometer": (270, 135, 135),
    }
)
"""Task type -> variations of train, dev and test; the splits are consecutive from variation 0."""

TASK_TYPES = tuple(SPLIT_SIZES)
ELECTRICAL = frozenset(
    name for name in TASK_TYPES if "power-component" in name or "conductivity" in name
)
"""Tasks that need electrical actions; the engine refuses `noElectricalAction` there."""

SIMPLIFICATIONS = (
    *("easy", "teleportAction", "selfWateringFlowerPots"),
    *("openContainers", "openDoors", "noElectricalAction"),
)

ETO_MAX_STEPS: MappingProxyType[str, int] = MappingProxyType(
    {
        "boil": 100,
        "change-the-state-of-matter-of": 80,
        "chemistry-mix": 60,
        "chemistry-mix-paint-secondary-color": 15,
        "chemistry-mix-paint-tertiary-color": 30,
        "find-animal": 15,
        "find-living-thing": 15,
        "find-non-living-thing": 15,
        "find-plant": 15,
        "freeze": 80,
        "grow-fruit": 60,
        "grow-plant": 30,
        "identify-life-stages-1": 30,
        "identify-life-stages-2": 30,
        "lifespan-longest-lived": 10,
        "lifespan-longest-lived-then-shortest-lived": 12,
        "lifespan-shortest-lived": 10,
        "measure-melting-point-known-substance": 120,
        "melt": 80,
        "power-component": 20,
        "power-component-renewable-vs-nonrenewable-energy": 30,
        "test-conductivity": 30,
        "test-conductivity-of-unknown-substances": 30,
        "use-thermometer": 30,
    }
)
"""Task types and action limits of ETO (arXiv 2403.02502), read off its released settings."""

ETO_EXCLUDED = (
    "inclined-plane-determine-angle",
    "inclined-plane-friction-named-surfaces",
    "inclined-plane-friction-unnamed-surfaces",
    "measure-melting-point-unknown-substance",
    "mendelian-genetics-known-plant",
    "mendelian-genetics-unknown-plant",
)
"""Task types that ETO leaves out."""
ETO_PER_TYPE = 10
"""Most held-out variations per task type in ETO: the first ones of the split."""


def variations(task_type: str, split: str) -> range:
    """The official variations of one task type in one split."""
    train, dev, test = SPLIT_SIZES[task_type]
    start, stop = {
        "train": (0, train),
        "dev": (train, train + dev),
        "test": (train + dev, train + dev + test),
    }[split]
    return range(start, stop)


def num_variations(task_type: str) -> int:
    """All variations of a task type, over the splits."""
    return sum(SPLIT_SIZES[task_type])


def check_simplification(names: str) -> None:
    """Refuse what the engine does not know.

    Raises:
        ValueError: an unknown name in the comma-separated list.
    """
    unknown = [n for n in names.split(",") if n and n not in SIMPLIFICATIONS]
    if unknown:
        known = ", ".join(SIMPLIFICATIONS)
        raise ValueError(
            f"simplification: {unknown[0]!r} is not known; use some of {known}, joined by commas,"
            " or nothing"
        )
