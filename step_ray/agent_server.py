"""The replica of the served agent: OpenAI routes over a `BatchGenerator`.

Takes checked chat requests, gives answers. Prompts come from the same `Renderer` as training
examples, so what is served is what was trained. How replicas are deployed is said in serve.py.
"""

import asyncio
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from fastapi import FastAPI
from ray import serve

from step_ray.errors import StepRayError
from step_ray.generation import BatchGenerator, Generated, SamplingParams
from step_ray.openai_api import ApiError, ChatAnswer, ChatRequest, make_api
from step_ray.render import Renderer
from step_ray.student import load_model, load_tokenizer

RETRY_AFTER_S = 1
"""What a client is told to wait when there is no room, or no model yet."""


@dataclass(frozen=True, slots=True)
class _Job:
    prompt: list[int]
    params: SamplingParams
    answer: Future[Generated] = field(default_factory=Future)


class GenerationThread:
    """Runs a `BatchGenerator` on a thread of its own; requests join its batch as they come.

    `@serve.batch` is not used: it closes a batch after a fixed wait even while the last one still
    runs, and so many clients that wait for each answer end up in batches of one.

    Args:
        generator: used by this thread only from now on.
        max_batch_size: rows at once; more requests wait.
        batch_wait_s: how long an idle thread gathers requests before it starts.
        num_threads: torch threads of this thread.
    """

    def __init__(
        self,
        generator: BatchGenerator,
        *,
        max_batch_size: int,
        batch_wait_s: float,
        num_threads: int,
    ) -> None:
        self._generator = generator
        self._max_batch_size = max_batch_size
        self._batch_wait_s = batch_wait_s
        self._num_threads = num_threads
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._running: dict[int, _Job] = {}
        self._is_closing = False
        self.num_open = 0
        """Requests that have no answer yet."""
        threading.Thread(target=self._run, name="generation", daemon=True).start()

    async def generate(self, prompt: list[int], params: SamplingParams) -> Generated:
        """Continue one prompt together with those of other callers."""
        job = _Job(prompt, params)
        self._waiting.put(job)
        self.num_open += 1
        try:
            return await asyncio.wrap_future(job.answer)
        finally:
            self.num_open -= 1

    def close(self) -> None:
        """End the thread once all requests made so far are answered."""
        self._waiting.put(None)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        while not self._is_closing or self._running:
            try:
                self._admit(self._next_jobs())
                for ticket, answer in self._generator.step():
                    self._running.pop(ticket).answer.set_result(answer)
            except Exception as exc:  # whoever waits must hear of it, and the thread must go on
                self._fail(exc)

    def _next_jobs(self) -> list[_Job]:
        """Requests that fit into the batch; waits for one when there is nothing to do."""
        jobs: list[_Job] = []
        if not self._running:
            self._collect(jobs, block=True)
            time.sleep(self._batch_wait_s)
        while len(self._running) + len(jobs) < self._max_batch_size and not self._waiting.empty():
            self._collect(jobs, block=False)
        return jobs

    def _collect(self, jobs: list[_Job], *, block: bool) -> None:
        job = self._waiting.get(block=block)
        if job is None:
            self._is_closing = True
        elif job.answer.set_running_or_notify_cancel():  # False: the client has gone
            jobs.append(job)

    def _admit(self, jobs: list[_Job]) -> None:
        try:
            tickets = self._generator.add([j.prompt for j in jobs], [j.params for j in jobs])
        except Exception:
            self._running.update(enumerate(jobs, start=-len(jobs)))  # so that they fail as well
            raise
        self._running.update(zip(tickets, jobs, strict=True))

    def _fail(self, exc: Exception) -> None:
        self._generator.drop_all()
        for job in self._running.values():
            job.answer.set_exception(exc)
        self._running.clear()


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model ready to answer."""

    name: str
    max_length: int
    max_open: int | None
    """Requests at once, in the batch and waiting; None: no limit."""
    renderer: Renderer
    thread: GenerationThread

    def refuse_if_full(self) -> None:
        """Serve's own limit would answer in plain text, before any of our code runs."""
        if self.max_open is not None and self.thread.num_open >= self.max_open:
            raise ApiError(
                503,
                f"{self.thread.num_open} requests are being answered or wait; try again later",
                kind="server_error",
                code="overloaded",
                retry_after_s=RETRY_AFTER_S,
            )


@serve.deployment(max_constructor_retry_count=3)
@serve.ingress()
class AgentServer:
    """One replica.

    The model is set and replaced by `reconfigure`, so that deploying another checkpoint starts no
    process.
    """

    def __init__(
        self,
        *,
        device: str,
        num_threads: int,
        max_batch_size: int,
        batch_wait_s: float,
        prefix_cache_mb: int,
        api_key_digest: str,
    ) -> None:
        self._device = device
        self._batching: dict[str, Any] = {
            "max_batch_size": max_batch_size,
            "batch_wait_s": batch_wait_s,
            "num_threads": num_threads,
        }
        self._prefix_cache_mb = prefix_cache_mb
        self._api_key_digest = api_key_digest
        self._loaded: _Loaded | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self, self._api_key_digest)

    async def reconfigure(self, model_spec: dict[str, Any]) -> None:
        """Load a model; requests that already wait are answered by the one they came for."""
        old = self._loaded
        self._loaded = await asyncio.to_thread(self._load, model_spec)
        if old is not None:
            old.thread.close()

    def _load(self, spec: dict[str, Any]) -> _Loaded:
        tokenizer = load_tokenizer(spec["model_dir"])
        model = load_model(spec["model_dir"], spec["dtype"])
        cast(torch.nn.Module, model).to(self._device)
        max_length: int = spec["max_length"]
        max_queued: int = spec["max_queued_requests"]
        generator = BatchGenerator(
            model, tokenizer, max_length=max_length, prefix_cache_mb=self._prefix_cache_mb
        )
        return _Loaded(
            name=spec["served_name"],
            max_length=max_length,
            max_open=None if max_queued < 0 else self._batching["max_batch_size"] + max_queued,
            renderer=Renderer(tokenizer, max_length),
            thread=GenerationThread(generator, **self._batching),
        )

    @property
    def model(self) -> str:
        """Name of the model that is loaded."""
        return self._ready().name

    async def chat(self, request: ChatRequest) -> ChatAnswer:
        """Answer one conversation; see `ChatBackend.chat`."""
        loaded = self._ready()
        loaded.refuse_if_full()
        try:
            prompt = loaded.renderer.render_prompt([m.to_message() for m in request.messages])
        except StepRayError as exc:
            raise ApiError(400, str(exc), param="messages") from exc
        params = to_params(request, len(prompt), loaded.max_length)
        result = await loaded.thread.generate(prompt, params)
        return ChatAnswer(
            text=result.text,
            finish_reason=cast(Literal["stop", "length"], result.finish_reason),
            prompt_tokens=len(prompt),
            completion_tokens=len(result.ids),
            cached_tokens=result.cached_tokens,
        )

    def _ready(self) -> _Loaded:
        if self._loaded is None:
            raise ApiError(
                503,
                "the model is being loaded; try again later",
                kind="server_error",
                retry_after_s=RETRY_AFTER_S,
            )
        return self._loaded


def to_params(request: ChatRequest, num_prompt: int, max_length: int) -> SamplingParams:
    """Sampling parameters of a request; without a limit the answer may fill the context.

    Raises:
        ApiError: 400 `context_length_exceeded`, when the prompt and the tokens asked for (at least
            one) do not fit. As OpenAI and vLLM do, an explicit limit is never lowered.
    """
    room = max_length - num_prompt
    wanted = request.token_limit
    if room < (wanted or 1):
        raise ApiError(
            400,
            f"this model's maximum context length is {max_length} tokens, but {num_prompt} prompt "
            f"tokens and {wanted or 1} new tokens were requested; shorten one of them",
            code="context_length_exceeded",
            param="messages",
        )
    return SamplingParams(
        max_tokens=wanted or room,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=request.stop_texts,
    )
