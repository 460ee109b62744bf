"""Episodes where the agent is: the served agent's own replicas play them (`POST /v1/episodes`).

Takes an address, tasks and seeds, gives trajectories as they end, as `collect.ActorPlayer` does.
The replicas play the same episode loop; what is saved is the way of each turn through HTTP and
Serve. It writes no files.
"""

import asyncio
import json
import random
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from typing import Any

import httpx2

from step_ray.calls.endpoint import shown
from step_ray.collect import Ended
from step_ray.collection.runner import EpisodePlan, failed_episode
from step_ray.errors import EpisodesError
from step_ray.storage.records import from_row
from step_ray.types import Task, Trajectory

PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
LONGEST_WAIT_S = 30.0
PATIENCE_S = 300.0
"""How long an agent may be away or busy before the evaluation ends."""
CONNECT_S = 30.0
LATE_S = 60.0
"""After the time of an episode: by then its replica has ended it, or does nothing any more."""


class _AwayError(Exception):
    """The agent has not begun the episode, and may do so later."""

    def __init__(self, line: str, wait_s: float = 0.0) -> None:
        super().__init__(line)
        self.wait_s = wait_s


class _BrokenError(Exception):
    """The agent began the episode and did not bring it."""


class AgentPlayer:
    """Lets the replicas of one served agent play; see `collect.EpisodePlayer`.

    A request per episode: so Serve spreads them over the replicas, however many there are at the
    moment, and what breaks off is one episode.

    Args:
        plan: the agent's address, the limits of its turns, and how many episodes at once.
    """

    def __init__(self, plan: EpisodePlan) -> None:
        assert plan.student is not None, "an agent plays"
        assert plan.teacher is None, "an agent plays without a teacher"
        self._plan, self._agent = plan, plan.student
        self._key = self._agent.key()
        self._episode_s = plan.settings.episode_timeout_s + LATE_S
        self._arrived: asyncio.Queue[Trajectory | None] = asyncio.Queue()
        self.num_restarts = 0

    def play(self, pending: Iterable[tuple[Task, int]]) -> Generator[Ended]:
        """See `EpisodePlayer`.

        Raises:
            EpisodesError: the agent refuses, or is not there.
        """
        # the loop runs while an episode is waited for; leaving the block cancels what is open
        with asyncio.Runner() as runner:
            all_played = runner.get_loop().create_task(self._play_all(iter(pending)))
            while (trajectory := runner.run(self._arrived.get())) is not None:
                yield trajectory, ""
            try:
                all_played.result()
            except ExceptionGroup as group:
                raise group.exceptions[0] from None

    async def _play_all(self, pending: Iterator[tuple[Task, int]]) -> None:
        number = self._plan.episodes_per_actor
        try:
            async with self._client() as client, asyncio.TaskGroup() as group:
                for _ in range(number):
                    group.create_task(self._lane(pending, client))
        finally:
            self._arrived.put_nowait(None)

    def _client(self) -> httpx2.AsyncClient:
        try:
            return httpx2.AsyncClient(
                timeout=httpx2.Timeout(CONNECT_S, read=self._episode_s),
                limits=httpx2.Limits(max_connections=None),
                headers={"authorization": f"Bearer {self._key}"},
            )
        except Exception as exc:  # a key or a proxy that cannot be used
            raise self._error(f"{type(exc).__name__}: {exc}") from None

    async def _lane(self, pending: Iterator[tuple[Task, int]], client: httpx2.AsyncClient) -> None:
        for task, seed in pending:
            self._arrived.put_nowait(await self._episode(task, seed, client))

    async def _episode(self, task: Task, seed: int, client: httpx2.AsyncClient) -> Trajectory:
        """Ask for it until it comes; one that breaks off too often is a row with an error."""
        now = asyncio.get_running_loop().time
        num_begun, num_tries, patience_ends = 0, 0, now() + PATIENCE_S
        while True:
            num_tries += 1
            wait_s = min(LONGEST_WAIT_S, 0.5 * 2**num_tries) * random.uniform(0.5, 1.5)
            try:
                # with the task as the run has it: the replica's names files of its own
                return replace(await self._ask(task, seed, client), task=task)
            except _AwayError as exc:
                if now() > patience_ends:
                    raise self._error(f"gave up after {PATIENCE_S:g} s: {exc}") from None
                wait_s += exc.wait_s
            except _BrokenError as exc:
                num_begun += 1
                if num_begun >= self._plan.max_starts:
                    line = f"begun {num_begun} times (collect.max_starts): {exc}"
                    return failed_episode(task, self._plan, seed, shown(line, self._key))
                self.num_restarts += 1
                patience_ends = now() + wait_s + PATIENCE_S
            await asyncio.sleep(wait_s)

    async def _ask(self, task: Task, seed: int, client: httpx2.AsyncClient) -> Trajectory:
        """One request.

        Raises:
            _AwayError, _BrokenError, EpisodesError: it brought no episode.
        """
        settings = self._plan.settings
        body = {
            "environment": self._plan.env,
            "split": task.split,
            "ids": [task.task_id],
            "seed": seed,
            "model": self._agent.model,
            "temperature": settings.temperature,
            "max_tokens": settings.max_new_tokens,
        }
        url = f"{self._agent.base_url}/episodes"
        try:
            response = await client.post(url, json=body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as exc:
            raise _AwayError(f"{type(exc).__name__}: {exc}") from None
        except httpx2.TransportError as exc:
            raise _BrokenError(f"{type(exc).__name__}: {exc}") from None
        if response.status_code != httpx2.codes.OK:
            raise self._refusal(response)
        return _episode_in(response.text)

    def _refusal(self, response: httpx2.Response) -> Exception:
        try:
            line = _message(response.json())
        except ValueError:
            line = response.text
        line = f"HTTP {response.status_code}: {line}"
        if response.status_code not in PASSING_STATUS:
            return self._error(line)
        wait = response.headers.get("retry-after", "")
        return _AwayError(line, float(wait) if wait.isdecimal() else 0.0)

    def _error(self, line: str) -> EpisodesError:
        return EpisodesError(
            f"evaluate.where: the agent at {self._agent.base_url} does not play:"
            f" {shown(line, self._key)}; what has ended is kept"
        )


def _episode_in(text: str) -> Trajectory:
    """Of the lines of an answer: the episode, a report; or an error too late for a status."""
    try:
        records = [dict(json.loads(line)) for line in text.splitlines()]
        for record in records:
            if record.get("object") == "episode":
                return from_row(record["trajectory"])
    except (ValueError, TypeError, KeyError):
        raise _BrokenError("what came is no list of records") from None
    raise _BrokenError(_message(records[-1]) if records else "nothing came")


def _message(record: Any) -> str:
    """What an error in OpenAI's form says."""
    error = record.get("error") if isinstance(record, dict) else None
    return str(error["message"]) if isinstance(error, dict) else "no episode came"
