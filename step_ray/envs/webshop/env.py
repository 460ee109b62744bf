"""WebShop as a `TextEnv`: one visit to the shop, from the search bar to the purchase.

Takes tasks whose params name a catalogue and a goal; gives the pages as text. The only reward comes
with the purchase, which ends the episode; success is the full reward 1. It limits no steps.
"""

from step_ray.envs.base import EnvStep
from step_ray.envs.webshop import pages
from step_ray.envs.webshop.catalogue import open_catalogue
from step_ray.envs.webshop.goals import LoadedTask, load_task
from step_ray.envs.webshop.pages import SEPARATOR, Page
from step_ray.envs.webshop.reward import Score, score
from step_ray.envs.webshop.session import Place, Session
from step_ray.errors import ConfigError, EnvError
from step_ray.types import Task

FORMS = {"text": pages.as_text, "text_rich": pages.as_rich_text}
"""Observation modes."""
ANY_SEARCH = "search[<keywords>]"
"""Stands for every search among the admissible actions."""


class WebshopEnv:
    """One WebShop episode.

    Args:
        observation: `text` or `text_rich`.
        show_attributes: item pages have a button for the product's attributes.
        num_prev_obs: earlier observations that stand before each observation.
        num_prev_actions: the same of actions.

    Raises:
        ConfigError: an observation mode that does not exist.
    """

    engine = "webshop/step_ray 1"

    def __init__(
        self,
        observation: str = "text",
        show_attributes: bool = False,
        num_prev_obs: int = 0,
        num_prev_actions: int = 0,
    ) -> None:
        if observation not in FORMS:
            raise ConfigError(
                f"env.webshop.observation: {observation!r} is not known; use one of {list(FORMS)}"
            )
        self._form = FORMS[observation]
        self._show_attributes = show_attributes
        self._num_obs, self._num_actions = num_prev_obs, num_prev_actions
        self._observations: list[str] = []
        self._actions: list[str] = []
        self._session: Session | None = None
        self._loaded: LoadedTask | None = None
        self.score: Score | None = None
        """The judged purchase, once there is one."""

    def reset(self, task: Task) -> str:
        """Open the shop; gives the start page with the instruction.

        Raises:
            EnvError: the task is no WebShop goal, or its catalogue is missing.
        """
        self._loaded, self.score = load_task(task), None
        self._session = open_session(task, self._show_attributes)
        self._observations, self._actions = [], []
        return self._observe(self._session.page())

    def step(self, action: str) -> EnvStep:
        """Carry out `search[<keywords>]` or `click[<name>]`; anything else changes nothing."""
        session = self._running()
        understood = session.do(action)
        self._actions.append(action)
        if session.state.place is not Place.DONE:
            text = self._observe(session.page())
            return EnvStep(
                observation=text, reward=0.0, done=False, success=False, noop=not understood
            )
        reward = self._judge(session) if understood else 0.0
        text = self._observe(pages.done_page(self.score.reward if self.score else 0.0))
        success = self.score is not None and self.score.reward == 1.0
        return EnvStep(
            observation=text, reward=reward, done=True, success=success, noop=not understood
        )

    def _judge(self, session: Session) -> float:
        loaded = self._loaded
        assert loaded is not None
        bought = session.product()
        values = list(session.state.options.values())
        goal = loaded.goal(session.catalogue)
        self.score = score(bought, values, bought.price(loaded.price_seed), goal)
        return self.score.reward

    def _observe(self, page: Page) -> str:
        """The page as text, after as much of the past as is asked for."""
        text = self._form(page)
        past: list[str] = []
        for back in range(1, 1 + max(self._num_obs, self._num_actions)):
            if back <= min(self._num_actions, len(self._actions)):
                past.insert(0, self._actions[-back])
            if back <= min(self._num_obs, len(self._observations)):
                past.insert(0, self._observations[-back])
        self._observations.append(text)
        return SEPARATOR.join([*past, text])

    def admissible_actions(self) -> list[str]:
        """`search[<keywords>]`, which stands for every search, and all clicks."""
        session = self._running()
        if session.state.place is Place.DONE:
            return []
        names = [name for name in pages.clickables(session.page()) if name != "search"]
        return [ANY_SEARCH, *(f"click[{name}]" for name in names)]

    def _running(self) -> Session:
        if self._session is None:
            raise EnvError("webshop: called before reset or after close")
        return self._session

    def close(self) -> None:
        """Leave the shop; the catalogue stays open for the next episode."""
        self._session = self._loaded = None


def open_session(task: Task, show_attributes: bool = False) -> Session:
    """A fresh visit for a task."""
    folder = load_task(task).folder
    return Session(open_catalogue(folder), task.goal, show_attributes, task.task_id)
