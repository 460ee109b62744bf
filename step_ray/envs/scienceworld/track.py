"""Where an episode stands on its gold path, read off its texts.

Takes the path and the executed (action, observation) pairs, gives the next action and what each
step was to the path. It knows the path, but of the world only what has been read.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from step_ray.envs.scienceworld.text import choices, is_look, is_noop

_ROOM = re.compile(r"This (?:room|outside location) is called the ([a-z ]+?)\.")
_MOVED = re.compile(r"You (?:move|teleport)(?: through the door)? to the ([a-z ]+?)\.$")
_GO = re.compile(r"(?:go|teleport) to (?:the )?([a-z ]+)$")
_TOOK = re.compile(r"You move the (.+) to the inventory\.$")
_PUT = re.compile(r"You move the (.+) to the (.+)\.$")
_NOW = re.compile(r".+ is now (?:open|closed|activated|deactivated)\.$")
_JOINED = re.compile(r".+? on (.+?) is now connected to .+? on (.+?)$")
_PARTED = re.compile(r"(?:The )?(.+?) has been disconnected")
_WHERE = re.compile(r" in (?:inventory|the [a-z ]+|[a-z ]*(?:pot|cup|jar|bowl|box)[a-z ]*)$")
_STATE = re.compile(
    r"\b(?:adult|baby|juvenile|reproducing|seedling|solid|liquid|gaseous) (?=\w)"
    r"| in the \w+ stage| containing [a-z ,]+?(?= (?:in|on|to|into|with) |$)| in inventory"
)
UNDO = {"close": "open", "activate": "deactivate", "deactivate": "activate"}
"""What the agent did to a device or door -> what takes it back; opening harms nothing."""
NUM_MEASURES = 2
"""Failed attempts at a gold step that only measures before it is passed over."""


class Move(StrEnum):
    """What a step was to the path."""

    ON = "on_path"
    REPAIR = "repair"
    """Takes back what went wrong before."""
    LOOK = "look"
    IDLE = "idle"
    """A look without news, or waiting."""
    NO_OP = "no_op"
    DETOUR = "detour"
    """Another room than the path's."""
    NEEDLESS = "needless"
    """Changes something that the path does not need and that harms nothing."""
    HARM = "off_path"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """A gold path: three lists of one length."""

    actions: tuple[str, ...]
    observations: tuple[str, ...]
    subgoals: tuple[str, ...]


@dataclass(slots=True)
class Track:
    """The standing after some steps.

    Args:
        gold: the path.
        room: where the agent is.
        start: where it began.
    """

    gold: Gold
    room: str
    start: str
    next: int = 0
    """Index of the gold step that is due."""
    tries: int = 0
    """Failed attempts at it."""
    offers: list[str] = field(default_factory=list)
    """What an open question offers."""
    asked_by: int | None = None
    """The gold step that the open question came from."""
    repairs: list[str] = field(default_factory=list)
    """Actions that lead back to the path, the first one last."""
    given_up: list[int] = field(default_factory=list)
    """Gold steps that were passed over; they are tried once more at the end."""
    trail: list[str] = field(default_factory=list)
    """Rooms left since the path was left, where teleporting is not known to work."""
    held: set[str] = field(default_factory=set)
    """Objects taken into the inventory."""
    looked: set[str] = field(default_factory=set)
    """Looks since something last changed."""
    can_teleport: bool = True
    again: bool = False
    """The path is walked for the second time."""

    @classmethod
    def begin(cls, gold: Gold, first_observation: str) -> "Track":
        """The standing before the first step."""
        match = _ROOM.search(first_observation)
        room = match[1] if match else ""
        return cls(gold=gold, room=room, start=room)

    def over(self) -> bool:
        """The whole path has been walked."""
        return self.next >= len(self.gold.actions)

    def wanted_room(self) -> str:
        """The room in which the due step is done."""
        for action in reversed(self.gold.actions[: self.next]):
            if match := _GO.match(action):
                return match[1]
        return self.start

    def subgoal(self) -> str:
        """The sub-goal of the due step."""
        return "" if self.over() else self.gold.subgoals[self.next]

    def proposal(self) -> str:
        """The action that is due: an answer, the way back, a repair, or the gold step."""
        if self.offers and self.asked_by is not None:
            return self._answer()
        if self.over():
            return "wait1" if "look around" in self.looked else "look around"
        due = self.gold.actions[self.next]
        goal = _GO.match(due)
        if self.repairs:
            return self.repairs[-1]
        if self.room != self.wanted_room():
            target = goal[1] if goal else self.wanted_room()
            if target != self.room or not goal:
                return self._way_to(target)
        return self._wording(due)

    def _answer(self) -> str:
        """The words of the offer that the path takes, else the first one."""
        after = self.gold.actions[self.next]
        return after if after in self.offers else sorted(self.offers)[0]

    def _way_to(self, room: str) -> str:
        if self.can_teleport or not self.trail:
            return f"teleport to {room}"
        return f"go to {self.trail[-1]}"

    def _wording(self, due: str) -> str:
        """The gold step in the wording that has not failed yet."""
        ways = _ways(due)
        return ways[min(self.tries, len(ways) - 1)]

    def read(self, action: str, observation: str) -> Move:
        """Take one executed step in; says what it was. An unreadable answer has no action."""
        if not action:
            return Move.NO_OP
        offers, asked_by = self.offers, self.asked_by
        self.offers, self.asked_by = choices(observation), None
        if offers and asked_by is not None:
            if action in offers or action.isdecimal():
                return self._advance(1, action, observation)
            self.next = asked_by  # the question was cancelled
        if self.repairs and action == self.repairs[-1]:
            self.repairs.pop()
            self.looked.clear()
            self._follow(action, observation)
            return Move.REPAIR
        ahead = self.ahead(action, observation)
        if self.offers:
            return self._question(ahead)
        if ahead is not None and not self._failed(ahead, observation):
            return self._advance(ahead + 1, action, observation)
        if action.startswith("wait") and self.tries and not self.over():
            self.tries += 1
            return Move.ON
        return self._beside(action, observation)

    def _question(self, ahead: int | None) -> Move:
        if ahead is None:
            return Move.NO_OP
        self.next += ahead
        self.asked_by = self.next
        # where the gold step was asked back too, its answer is the next gold step
        self.next += int(bool(choices(self.gold.observations[self.next])))
        return Move.ON

    def ahead(self, action: str, observation: str) -> int | None:
        """How many gold steps the step passes over: looks and ways elsewhere only.

        None: it is not the path's. A step is a gold step by its words or by its effect.
        """
        text = action.lower()
        reached = _MOVED.match(observation)
        for offset, due in enumerate(self.gold.actions[self.next :]):
            there = self.gold.observations[self.next + offset]
            goal = _GO.match(due)
            if text == due.lower() or (
                offset == 0 and self.tries and text in (_short(due).lower(), _plain(due).lower())
            ):
                return offset
            if there and there == observation and not is_noop(there):
                return offset
            if reached and goal and goal[1] == reached[1]:
                return offset
            if not (is_look(due) or goal or due.startswith("open door")):
                return None
        return None

    def _failed(self, ahead: int, observation: str) -> bool:
        """A gold step that did not work as in the gold world; after some tries it is given up."""
        due = self.gold.actions[self.next + ahead]
        refused = is_noop(observation) and "already" not in observation
        if not refused or is_noop(self.gold.observations[self.next + ahead]) or is_look(due):
            return False
        if self.room == self.wanted_room():
            self.tries += 1
        if self.tries >= (NUM_MEASURES if due.startswith("use ") else len(_ways(due))):
            self.given_up.append(self.next + ahead)
            self.next += ahead + 1
            self.tries = 0
            self._try_again()
        return True

    def _try_again(self) -> None:
        """At the end of the path, go back once to the first step that did not work."""
        if self.over() and self.given_up and not self.again:
            self.next, self.again = min(self.given_up), True

    def _advance(self, num_steps: int, action: str, observation: str) -> Move:
        self.next += num_steps
        self.tries = 0
        self.trail.clear()
        if not is_look(action):
            self.looked.clear()
        self._follow(action, observation)
        self._try_again()
        return Move.ON

    def _beside(self, action: str, observation: str) -> Move:
        """A step that is not the path's: what it was, and what takes it back."""
        if is_noop(observation):
            self.can_teleport &= not action.startswith("teleport")
            return Move.NO_OP
        if self.over() and (is_look(action) or action.startswith("wait")):
            self.looked = {action}  # nothing better is known
            return Move.LOOK
        if is_look(action):
            news = action not in self.looked
            self.looked.add(action)
            return Move.LOOK if news else Move.IDLE
        if action.startswith("wait"):
            self.looked.clear()
            return Move.IDLE
        self.looked.clear()
        before, held = self.room, set(self.held)
        if self._follow(action, observation):
            self.trail.append(before)
            back = self.room == self.wanted_room()
            return Move.REPAIR if back else Move.DETOUR
        return self._side_effect(action, observation, held)

    def _side_effect(self, action: str, observation: str, held: set[str]) -> Move:
        focuses = [a for a in self.gold.actions[: self.next] if a.startswith("focus ")]
        if observation.startswith("You focus on "):
            # the first focus counts: where it was not yet the path's, the engine must forget it
            self.repairs += focuses[-1:] or ["reset task"]
        if observation.startswith("You reset the goal progress"):
            self.repairs += reversed(focuses)
        if _NOW.match(observation):
            verb, _, what = action.partition(" ")
            if verb not in UNDO:
                return Move.NEEDLESS
            self.repairs.append(f"{UNDO[verb]} {what}")
            return Move.HARM
        if _TOOK.match(observation):
            return Move.NEEDLESS
        if match := _PUT.match(observation):
            if match[1] in held:
                self.repairs.append(f"pick up {match[1]}")
            return Move.HARM
        if match := _JOINED.match(observation):
            self._rewire(match[2], parted=False)
            return Move.HARM
        if match := _PARTED.match(observation):
            self._rewire(match[1], parted=True)
        return Move.HARM

    def _rewire(self, part: str, *, parted: bool) -> None:
        """Cut a part loose and put back the path's own wires to it."""
        own = [
            action
            for action in self.gold.actions[: self.next]
            if action.startswith("connect ") and part in action
        ]
        self.repairs += [*reversed(own), *([] if parted else [f"disconnect {part}"])]

    def _follow(self, action: str, observation: str) -> bool:
        """Keep room and inventory; True when the agent has changed rooms."""
        if match := _MOVED.match(observation):
            changed, self.room = self.room != match[1], match[1]
            return changed or action.startswith(("go", "teleport"))
        if match := _TOOK.match(observation):
            self.held.add(match[1])
        elif match := _PUT.match(observation):
            self.held.discard(match[1])
        elif (match := _ROOM.search(observation)) and is_look(action):
            self.room = match[1]
        return False


def _ways(due: str) -> list[str]:
    """What to try for a gold step: other words for its objects, a moment's wait, and again."""
    return [*dict.fromkeys([due, _short(due), _plain(due)]), "wait1", due]


def _short(due: str) -> str:
    """A gold step without where its object is: that may have changed."""
    return _WHERE.sub("", due)


def _plain(due: str) -> str:
    """A gold step without what grows, melts or fills up with time."""
    return _STATE.sub("", due)


def gold_of(lists: Mapping[str, Sequence[str]]) -> Gold:
    """A path from its lists."""
    return Gold(**{name: tuple(lists[name]) for name in ("actions", "observations", "subgoals")})
