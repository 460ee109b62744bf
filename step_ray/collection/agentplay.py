"""Episodes where the agent is: the served agent's own replicas play them (`POST /v1/episodes`).

Takes an address, tasks and seeds, gives trajectories as they end, as `collect.ActorPlayer` does.
The replicas play the same episode loop; what is saved is the way of each turn through HTTP and
Serve. It writes no files.
"""

import asyncio
import json
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from typing import Any

import httpx2

from step_ray.calls.endpoint import shown
from step_ray.collect import Ended
from step_ray.collection.runner import EpisodePlan
from step_ray.errors import EpisodesError
from step_ray.storage.records import from_row
from step_ray.types import Task, Trajectory

PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
MAX_TRIES = 6
"""Of one episode; how its own faults end is in its record, so these are the server's."""
LONGEST_WAIT_S = 30.0
CONNECT_S = 30.0


class _PassingError(Exception):
    """A request that may do better when it is sent again."""

    def __init__(self, line: str, wait_s: float = 0.0) -> None:
        super().__init__(line)
        self.wait_s = wait_s


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
        client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(CONNECT_S, read=self._plan.settings.episode_timeout_s + 60),
            limits=httpx2.Limits(max_connections=None),
            headers={"authorization": f"Bearer {self._key}"},
        )
        try:
            async with client, asyncio.TaskGroup() as group:
                for _ in range(number):
                    group.create_task(self._lane(pending, client))
        finally:
            self._arrived.put_nowait(None)

    async def _lane(self, pending: Iterator[tuple[Task, int]], client: httpx2.AsyncClient) -> None:
        for task, seed in pending:
            self._arrived.put_nowait(await self._episode(task, seed, client))

    async def _episode(self, task: Task, seed: int, client: httpx2.AsyncClient) -> Trajectory:
        """Ask for it until it comes."""
        for num_tries in range(1, MAX_TRIES + 1):
            try:
                record = await self._ask(task, seed, client)
                # with the task as the run has it: the replica's names files of its own
                return replace(from_row(record["trajectory"]), task=task)
            except httpx2.TransportError as exc:
                fault = _PassingError(f"{type(exc).__name__}: {exc}")
                self.num_restarts += not isinstance(exc, httpx2.ConnectError)
            except _PassingError as exc:
                fault = exc
            if num_tries < MAX_TRIES:
                await asyncio.sleep(fault.wait_s or min(LONGEST_WAIT_S, 0.5 * 2**num_tries))
        raise self._error(f"gave up {task.task_id} after {MAX_TRIES} tries: {fault}")

    async def _ask(self, task: Task, seed: int, client: httpx2.AsyncClient) -> dict[str, Any]:
        """One request; gives the record of the episode."""
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
        response = await client.post(url, json=body)
        if response.status_code != httpx2.codes.OK:
            raise self._refusal(response)
        # the episode and a report; or an error that came too late for a status
        try:
            records = [dict(json.loads(line)) for line in response.text.splitlines()]
        except (ValueError, TypeError):
            raise _PassingError("what came is no list of records") from None
        for record in records:
            if record.get("object") == "episode":
                return record
        raise _PassingError(_message(records[-1]) if records else "nothing came")

    def _refusal(self, response: httpx2.Response) -> Exception:
        try:
            line = _message(response.json())
        except ValueError:
            line = response.text
        line = f"HTTP {response.status_code}: {shown(line, self._key)}"
        if response.status_code not in PASSING_STATUS:
            return self._error(line)
        wait = response.headers.get("retry-after", "")
        return _PassingError(line, float(wait) if wait.isdecimal() else 0.0)

    def _error(self, line: str) -> EpisodesError:
        return EpisodesError(
            f"evaluate.where: the agent at {self._agent.base_url} does not play: {line}; what has"
            " ended is kept"
        )


def _message(record: Any) -> str:
    """What an error in OpenAI's form says."""
    error = record.get("error") if isinstance(record, dict) else None
    return str(error["message"]) if isinstance(error, dict) else "no episode came"
