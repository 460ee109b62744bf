"""The rule judge of WebShop: is a step good, and if not, what went wrong.

Takes a task, the history and an action, gives a `Verdict` with a reflection and the expert's next
move. It replays the visit in a shop of its own, so it needs no environment.
"""

from collections.abc import Sequence

from step_ray.envs.webshop import pages
from step_ray.envs.webshop.expert import Shopper, Visit
from step_ray.envs.webshop.session import Place, parse_action
from step_ray.types import Task, Verdict, VerdictLabel

Fault = tuple[VerdictLabel, str, str]
"""Label, error type, reflection."""
ERROR, SUBOPTIMAL = VerdictLabel.ERROR, VerdictLabel.SUBOPTIMAL


class ShopExpert:
    """The expert of one task; see `expert.Shopper`."""

    def __init__(self, task: Task) -> None:
        self._shopper = Shopper(task)

    def propose(
        self, first_observation: str, history: Sequence[tuple[str, str]]
    ) -> tuple[str, str]:
        """The next (thought, action)."""
        del first_observation
        move = self._shopper.next_move(self._shopper.replay(history))
        return move.thought, move.action

    def judge(
        self,
        first_observation: str,
        history: Sequence[tuple[str, str]],
        action: str,
        observation: str | None,
    ) -> Verdict:
        """Judge a step; with a fault, correct from the state it has left.

        An action that was not executed has left the state before it.
        """
        del first_observation
        before = self._shopper.replay(history)
        after = before.copied()
        understood = bool(action) and after.do(action)
        fault = self._fault(before, after, action) if understood else _nothing(before, action)
        if fault is None:
            return Verdict(label=VerdictLabel.GOOD)
        label, error_type, reflection = fault
        move = self._shopper.next_move(before if observation is None else after)
        return Verdict(
            label=label,
            reflection=reflection,
            thought=move.thought,
            action=move.action,
            error_type=error_type,
        )

    def _fault(self, before: Visit, after: Visit, action: str) -> Fault | None:
        """What is wrong with an action that was understood."""
        name, argument = parse_action(action)
        if parse_action(self._shopper.next_move(before).action) == (name, argument):
            return None
        if name == "search":
            return self._fault_of_searching(before, after)
        then, now = before.session.state, after.session.state
        if now.place is Place.DONE:
            return self._fault_of_buying(before)
        if then.place is Place.RESULTS and now.place is Place.ITEM:
            if self._shopper.here(after.session):
                return None
            text = f"I opened {now.asin}, but it is not what I was asked for."
            return ERROR, "wrong_product", text
        if now.place is Place.RESULTS and then.place is Place.RESULTS:
            return self._fault_of_paging(before, after)
        if now == then:
            return SUBOPTIMAL, "repeated", f"{argument} was already chosen."
        if now.chosen != then.chosen and now.place is Place.ITEM:
            return self._fault_of_choosing(before, after)
        return self._fault_of_moving(before, argument)

    def _fault_of_searching(self, before: Visit, after: Visit) -> Fault | None:
        shopper = self._shopper
        if shopper.here(before.session):
            return SUBOPTIMAL, "detour", "I already had the product that I want."
        if before.session.state.place is not Place.START and shopper.near(before.session):
            return SUBOPTIMAL, "needless_search", "The results already had what I want."
        if shopper.near(after.session):
            return None
        return SUBOPTIMAL, "poor_search", "These words do not find what I want."

    def _fault_of_buying(self, before: Visit) -> Fault | None:
        shopper, asin = self._shopper, before.session.state.asin
        if not shopper.here(before.session):
            return ERROR, "wrong_product", f"{asin} is not what I was asked for, I must not buy it."
        pending = shopper.pending(before.session)
        if not pending:
            return None
        missing = " and ".join(f"the {name} {value}" for name, value in pending.items())
        return ERROR, "bought_early", f"I bought before I had chosen {missing}."

    def _fault_of_choosing(self, before: Visit, after: Visit) -> Fault | None:
        shopper = self._shopper
        if not shopper.here(before.session):
            asin = before.session.state.asin
            return SUBOPTIMAL, "wrong_product", f"{asin} is not what I want, its options neither."
        was, now = before.session.state.options, after.session.state.options
        name = next(name for name in now if now[name] != was.get(name))
        wanted = shopper.choices.get(name)
        if wanted is None:
            return SUBOPTIMAL, "needless_option", f"Nobody asked for a {name}."
        if now[name] == wanted:
            return None
        return ERROR, "wrong_option", f"I chose {now[name]}, but the {name} should be {wanted}."

    def _fault_of_paging(self, before: Visit, after: Visit) -> Fault | None:
        page = self._shopper.target_page(before.session)
        was, now = before.session.state.number, after.session.state.number
        if page == was:
            return SUBOPTIMAL, "needless_page", "What I want was on the page that I left."
        if page is not None and abs(page - now) < abs(page - was):
            return None
        return SUBOPTIMAL, "needless_page", "That page does not show what I want."

    def _fault_of_moving(self, before: Visit, argument: str) -> Fault | None:
        """Sub-pages, and ways back."""
        here = self._shopper.here(before.session)
        if argument in {name.lower() for name in pages.SUB_PAGES}:
            return SUBOPTIMAL, "needless_look", "I did not need to read that."
        if here and before.session.state.place is Place.ITEM:
            return SUBOPTIMAL, "detour", "I left the product that I want."
        if before.session.state.place is Place.RESULTS and self._shopper.near(before.session):
            return SUBOPTIMAL, "detour", "I left the results that have what I want."
        if here and argument == pages.BACK.lower():
            return SUBOPTIMAL, "detour", "I left the product that I want."
        return None


def _nothing(before: Visit, action: str) -> Fault:
    """The fault of an action that was not understood."""
    if not action:
        return ERROR, "bad_format", "My answer had no single action in it."
    name, argument = parse_action(action)
    if name != "click" or not argument:
        why = "an action is search[...] or click[...]"
    elif argument == pages.SEARCH.lower() and before.session.state.place is Place.START:
        why = "to search I have to write search[...] with words"
    else:
        why = f"there is no {argument} on this page"
    return ERROR, "no_op", f"That did nothing: {why}."
