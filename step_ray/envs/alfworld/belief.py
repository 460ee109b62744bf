"""What a player of ALFWorld can know from the text it has read, and nothing else.

Takes the first observation and then (action, observation) pairs, gives a `Belief`. It never looks
into the game file, so an expert that plays from it plays fair.
"""

import re
from dataclasses import dataclass, field

NOTHING_HAPPENS = "Nothing happens."

_LISTED = re.compile(r"(?:^|, and |, |^and )an? ([^,]+?)(?=, |$)")
_ROOM = re.compile(r"you see (.+?)\.\n", re.S)
_CONTENTS = re.compile(r"(?:On the (.+?), you see|The (.+? \d+) is open\. In it, you see) (.+?)\.")
_PUT = re.compile(r"(?:put|move) (.+?) (?:in/on|to) (.+)")
_TREATED = {"clean": "clean", "heat": "hot", "cool": "cool"}
TOOL = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
"""Treatment -> class of the receptacle that does it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """The goal sentence, read."""

    target: str
    """Class of the object, e.g. `mug`."""
    count: int = 1
    treatment: str | None = None
    """`clean`, `heat`, `cool` or None."""
    destination: str | None = None
    """Class of the receptacle to put it in; None for the look task."""
    lamp: str | None = None
    """Class of the lamp, for the look task."""

    @property
    def adjective(self) -> str:
        """`clean `, `hot `, `cool ` or nothing, to stand before the object."""
        return f"{_TREATED[self.treatment]} " if self.treatment else ""


def parse_goal(sentence: str) -> Goal:
    """Read one of ALFWorld's twelve goal sentences.

    Raises:
        ValueError: the sentence has none of the known forms.
    """
    text = sentence.strip().lower().rstrip(".")
    if m := re.fullmatch(r"(?:look at|examine)(?: the)? (\w+) (?:under|with) the (\w+)", text):
        return Goal(target=m[1], lamp=m[2])
    if m := re.fullmatch(r"(?:put|find) two (\w+) (?:and put them )?(?:in|on) (\w+)", text):
        return Goal(target=m[1], count=2, destination=m[2])
    if m := re.fullmatch(r"(clean|heat|cool) some (\w+) and put it (?:in|on) (\w+)", text):
        return Goal(target=m[2], treatment=m[1], destination=m[3])
    if m := re.fullmatch(r"put (?:a|some) (clean|hot|cool) (\w+) (?:in|on) (\w+)", text):
        treatment = {adjective: verb for verb, adjective in _TREATED.items()}[m[1]]
        return Goal(target=m[2], treatment=treatment, destination=m[3])
    if m := re.fullmatch(r"put (?:a|an|some) (\w+) (?:in|on) (\w+)", text):
        return Goal(target=m[1], destination=m[2])
    raise ValueError(f"not a goal of ALFWorld: {sentence!r}")


def class_of(name: str) -> str:
    """`mug 2` -> `mug`."""
    return name.rpartition(" ")[0]


def listed(text: str) -> list[str]:
    """`a mug 1, and a cup 2` -> `[mug 1, cup 2]`; `nothing` -> `[]`."""
    return [] if text == "nothing" else _LISTED.findall(text)


@dataclass(slots=True, kw_only=True)
class Belief:
    """The player's knowledge; `read` keeps it up to date."""

    goal: Goal
    receptacles: list[str]
    """In the order of the first observation."""
    contents: dict[str, list[str]] = field(default_factory=dict)
    """What was last seen in the receptacles whose inside has been seen."""
    closed: set[str] = field(default_factory=set)
    """Receptacles known to be closed now."""
    openable: set[str] = field(default_factory=set)
    location: str | None = None
    holding: str | None = None
    treated: set[str] = field(default_factory=set)
    """Objects that have had the goal's treatment."""
    beside: set[str] = field(default_factory=set)
    """Receptacles that could not be gone to from here: most likely they stand right here."""
    unreachable: set[str] = field(default_factory=set)
    """Receptacles that could neither be gone to nor examined."""
    origin: str | None = None
    """Receptacle that the last object in hand was taken from."""
    refused: set[tuple[str, str]] = field(default_factory=set)
    """(object, receptacle): could not be put there, though open and at hand."""

    @classmethod
    def from_observation(cls, observation: str) -> "Belief":
        """Read the first observation.

        Raises:
            ValueError: it does not show a room and a task.
        """
        room = _ROOM.search(observation)
        task = re.search(r"Your task is to: (.+?)\.?\s*$", observation)
        if room is None or task is None:
            raise ValueError("the first observation shows no room or no task")
        return cls(goal=parse_goal(task[1]), receptacles=listed(room[1].replace("\n", " ")))

    def read(self, action: str, observation: str) -> None:
        """Take in the answer to one action."""
        if observation.startswith(NOTHING_HAPPENS):
            self._read_nothing(action)
            return
        examined = action.removeprefix("examine ")
        if m := re.match(r"You arrive at (.+?)\. ", observation):
            self.location = m[1]
            self.beside.clear()
        elif examined != action and examined in self.receptacles:
            self.location = examined
        self._read_contents(observation)
        self._read_hands(observation)
        if m := re.match(r"You close the (.+?)\.", observation):
            self.closed.add(m[1])

    def _read_nothing(self, action: str) -> None:
        """The engine does not go from a place to itself, and two receptacles may share a place."""
        put = _PUT.fullmatch(action)
        if put and put[1] == self.holding and put[2] == self.location:
            if put[2] not in self.closed:
                self.refused.add((put[1], put[2]))
            return
        verb, _, name = action.replace("go to", "goto", 1).partition(" ")
        if name not in self.receptacles or name == self.location:
            return
        if verb == "goto":
            self.beside.add(name)
        elif verb == "examine" and name in self.beside:
            self.unreachable.add(name)

    def _read_contents(self, observation: str) -> None:
        if m := _CONTENTS.search(observation):
            name = m[1] or m[2]
            self.contents[name] = listed(m[3])
            self.closed.discard(name)
            if m[2]:
                self.openable.add(name)
        elif m := re.search(r"The (.+? \d+) is closed\.", observation):
            self.closed.add(m[1])
            self.openable.add(m[1])

    def _read_hands(self, observation: str) -> None:
        if m := re.match(r"You pick up the (.+?) from the (.+?)\.", observation):
            self.holding, self.origin = m[1], m[2]
            if m[1] in self.contents.get(m[2], ()):
                self.contents[m[2]].remove(m[1])
        elif m := re.match(r"You (?:put|move) the (.+?) (?:in/on|to) the (.+?)\.", observation):
            self.holding = None
            self.contents.setdefault(m[2], []).append(m[1])
        elif m := re.match(r"You (clean|heat|cool) the (.+?) using the (.+?)\.", observation):
            # hot and cool undo each other in the engine; clean stays
            if m[1] == self.goal.treatment:
                self.treated.add(m[2])
            elif m[1] != "clean" and self.goal.treatment != "clean":
                self.treated.discard(m[2])

    def where_is(self, wanted: str) -> tuple[str, str] | None:
        """(object, receptacle) of the first seen object of a class, in the room's order."""
        for receptacle in self.receptacles:
            for name in self.contents.get(receptacle, ()):
                if class_of(name) == wanted:
                    return name, receptacle
        return None

    def first(self, wanted: str) -> str | None:
        """The first receptacle of a class."""
        named = (r for r in self.receptacles if class_of(r) == wanted)
        return next((r for r in named if r not in self.unreachable), None)

    def unseen(self) -> list[str]:
        """Receptacles whose inside has not been seen, in the room's order."""
        return [r for r in self.receptacles if r not in {*self.contents, *self.unreachable}]
