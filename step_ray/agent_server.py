"""The replica of the served agent: OpenAI routes over a `BatchGenerator`.

Takes checked chat requests, gives answers. Prompts come from the same `Renderer` as training
examples, so what is served is what was trained. How replicas are deployed is said in serve.py.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from fastapi import FastAPI
from ray import serve

from step_ray.errors import StepRayError
from step_ray.generation import BatchGenerator, Generated, SamplingParams
from step_ray.openai_api import ApiError, ChatAnswer, ChatRequest, make_api
from step_ray.render import Renderer
from step_ray.student import load_model, load_tokenizer


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model ready to answer."""

    name: str
    renderer: Renderer
    generator: BatchGenerator


@dataclass(frozen=True, slots=True)
class _Job:
    """A request on its way through a batch; it keeps the model that its prompt is for."""

    loaded: _Loaded
    prompt: list[int]
    params: SamplingParams


@serve.deployment(max_constructor_retry_count=3)
@serve.ingress()
class AgentServer:
    """One replica: the OpenAI routes over a `BatchGenerator`.

    The model is set and replaced by `reconfigure`, so that deploying another checkpoint does not
    start a new process. Models are loaded and run on one thread; the event loop stays free.
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
        self._prefix_cache_mb = prefix_cache_mb
        self._api_key_digest = api_key_digest
        self._loaded: _Loaded | None = None
        self._thread = ThreadPoolExecutor(
            max_workers=1, initializer=torch.set_num_threads, initargs=(num_threads,)
        )
        self._generate.set_max_batch_size(max_batch_size)  # type: ignore[attr-defined]
        self._generate.set_batch_wait_timeout_s(batch_wait_s)  # type: ignore[attr-defined]

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self, self._api_key_digest)

    async def reconfigure(self, model_spec: dict[str, Any]) -> None:
        """Load a model; requests that already wait are answered by the one they came for."""
        self._loaded = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._load, model_spec
        )

    def _load(self, spec: dict[str, Any]) -> _Loaded:
        tokenizer = load_tokenizer(spec["model_dir"])
        model = load_model(spec["model_dir"], spec["dtype"])
        cast(torch.nn.Module, model).to(self._device)
        generator = BatchGenerator(
            model,
            tokenizer,
            max_length=spec["max_length"],
            prefix_cache_mb=self._prefix_cache_mb,
        )
        return _Loaded(spec["served_name"], Renderer(tokenizer, spec["max_length"]), generator)

    @property
    def model(self) -> str:
        """Name of the model that is loaded."""
        return self._ready().name

    async def chat(self, request: ChatRequest) -> ChatAnswer:
        """Answer one conversation; see `ChatBackend.chat`."""
        loaded = self._ready()
        try:
            prompt = loaded.renderer.render_prompt([m.to_message() for m in request.messages])
        except StepRayError as exc:
            raise ApiError(400, str(exc), param="messages") from exc
        params = to_params(request, len(prompt), loaded.generator.max_length)
        result = await self._generate(_Job(loaded, prompt, params))
        return ChatAnswer(
            text=result.text,
            finish_reason=cast(Literal["stop", "length"], result.finish_reason),
            prompt_tokens=len(prompt),
            completion_tokens=len(result.ids),
            cached_tokens=result.cached_tokens,
        )

    @serve.batch
    async def _generate(self, jobs: list[_Job]) -> list[Generated]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, _run_jobs, jobs)

    def _ready(self) -> _Loaded:
        if self._loaded is None:
            raise ApiError(503, "the model is being loaded", kind="server_error")
        return self._loaded


def _run_jobs(jobs: list[_Job]) -> list[Generated]:
    """Generate for a batch; jobs of two models meet only while one replaces the other."""
    results: dict[int, Generated] = {}
    for loaded in {id(job.loaded): job.loaded for job in jobs}.values():
        places = [i for i, job in enumerate(jobs) if job.loaded is loaded]
        answers = loaded.generator.generate(
            [jobs[i].prompt for i in places], [jobs[i].params for i in places]
        )
        results.update(zip(places, answers, strict=True))
    return [results[i] for i in range(len(jobs))]


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
