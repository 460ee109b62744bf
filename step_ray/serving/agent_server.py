"""The replica of the served agent: what the routes ask for, over a `BatchGenerator`.

Takes checked requests, gives answers, steps and episodes. How replicas are deployed is said in
serve.py.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, cast

import torch
from fastapi import FastAPI
from prometheus_client.metrics_core import Metric
from ray import serve

from step_ray.render import Renderer
from step_ray.serving.api.acting import act_messages
from step_ray.serving.api.agent_schemas import ActRequest, EpisodesRequest
from step_ray.serving.api.app import make_api
from step_ray.serving.api.backend import Answer
from step_ray.serving.api.errors import ApiError
from step_ray.serving.api.guard import too_many
from step_ray.serving.api.metrics import ServeMetrics, exposition
from step_ray.serving.api.schemas import DEFAULT_TOKENS, ChatRequest, CompletionRequest, Sampling
from step_ray.serving.config import ServeConfig
from step_ray.serving.episode_service import EpisodeService
from step_ray.serving.generation import BatchGenerator, SamplingParams
from step_ray.serving.generation_thread import GenerationThread
from step_ray.serving.local_model import LocalAnswer, LocalModel, LocalStudent, new_tokens
from step_ray.training.student import load_model, load_tokenizer, resolve_init

RETRY_AFTER_S = 1
"""What a client is told to wait when there is no room, or no model yet."""
SCRAPE_S = 5.0
"""How long a scrape waits for the counts of the other replicas."""


class ReplicaBackend:
    """What one replica does, apart from being one of Ray Serve's.

    The model is set and replaced by `load`.

    Args:
        config: limits and batching.
        device: torch device.
        prefix_cache_mb: MiB for keys and values of past prompts.
        replica: its name among the others.
    """

    def __init__(
        self, config: ServeConfig, *, device: str, prefix_cache_mb: int, replica: str = "0"
    ) -> None:
        self._config, self._device, self._prefix_cache_mb = config, device, prefix_cache_mb
        self._loaded: LocalModel | None = None
        self._max_queued = config.max_queued_requests
        self.counts = ServeMetrics(replica, self._num_running, self._num_open)
        self._episodes = EpisodeService(config.agent, self.counts)

    async def load(self, spec: dict[str, Any]) -> None:
        """Load a model; requests that already wait are answered by the one they came for."""
        old = self._loaded
        self._loaded = await asyncio.to_thread(self._load, spec)
        self._max_queued = spec["max_queued_requests"]
        if old is not None:
            old.close()

    def _load(self, spec: dict[str, Any]) -> LocalModel:
        config, max_length = self._config, spec["max_length"]
        source = resolve_init(spec["model_dir"])
        tokenizer = load_tokenizer(source)
        model = load_model(source, spec["dtype"])
        cast(torch.nn.Module, model).to(self._device)
        generator = BatchGenerator(
            model, tokenizer, max_length=max_length, prefix_cache_mb=self._prefix_cache_mb
        )
        thread = GenerationThread(
            generator,
            max_batch_size=config.max_batch_size,
            batch_wait_s=config.batch_wait_s,
            num_threads=config.num_threads,
        )
        return LocalModel(
            name=spec["served_name"],
            renderer=Renderer(tokenizer, max_length),
            thread=thread,
            max_length=max_length,
            timeout_s=config.request_timeout_s,
            on_answer=self._count,
        )

    def _count(self, answer: Answer) -> None:
        self.counts.answered(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens)

    def _num_running(self) -> int:
        return self._loaded.thread.num_running if self._loaded else 0

    def _num_open(self) -> int:
        return self._loaded.thread.num_open if self._loaded else 0

    @property
    def model(self) -> str:
        """Name of the model that is loaded."""
        return self._ready().name

    def _ready(self) -> LocalModel:
        if self._loaded is None:
            raise ApiError(
                503,
                "the model is being loaded; try again later",
                kind="server_error",
                retry_after_s=RETRY_AFTER_S,
            )
        return self._loaded

    def _refuse_if_full(self, num_new: int) -> None:
        """Serve's own limit would answer in plain text, before any of our code runs."""
        num_open = self._num_open()
        if 0 <= self._max_queued < num_open + num_new - self._config.max_batch_size:
            raise too_many(num_open, RETRY_AFTER_S)

    async def chat(self, request: ChatRequest) -> LocalAnswer:
        """See `Backend.chat`."""
        messages = [message.to_message() for message in request.messages]
        model = self._ready()
        self._refuse_if_full(1)
        with model.in_use():
            prompt = await model.render(messages)
            params = self._params(request, request.token_limit, len(prompt), model.max_length)
            return model.start(prompt, params, in_pieces=bool(request.stream))

    async def complete(self, request: CompletionRequest) -> list[LocalAnswer]:
        """See `Backend.complete`."""
        model = self._ready()
        self._refuse_if_full(len(request.prompts))
        with model.in_use():
            prompts = [await model.encode(prompt) for prompt in request.prompts]
            params = [
                self._params(
                    request, request.max_tokens, len(prompt), model.max_length, DEFAULT_TOKENS
                )
                for prompt in prompts
            ]
            return [
                model.start(*pair, in_pieces=bool(request.stream))
                for pair in zip(prompts, params, strict=True)
            ]

    async def act(self, request: ActRequest) -> LocalAnswer:
        """See `Backend.act`."""
        agent, model = self._config.agent, self._ready()
        self._refuse_if_full(1)
        with model.in_use():
            prompt = await model.render(act_messages(request, agent.prompt))
            wanted = self._allowed(request.max_tokens)
            most = self._at_most(agent.max_new_tokens)
            params = SamplingParams(
                max_tokens=new_tokens(wanted, len(prompt), model.max_length, most),
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
            )
            return model.start(prompt, params)

    async def episodes(self, request: EpisodesRequest) -> AsyncGenerator[dict[str, Any], None]:
        """See `Backend.episodes`."""
        self._allowed(request.max_tokens)
        model = self._ready()
        records = await self._episodes.open(request, LocalStudent(model))

        async def kept() -> AsyncGenerator[dict[str, Any], None]:
            with model.in_use():
                async with aclosing(records):
                    async for record in records:
                        yield record

        return kept()

    async def metrics(self) -> bytes:
        """The counts of this replica; see `Backend.metrics`."""
        return exposition([self.counts.snapshot()])

    def _params(
        self,
        request: Sampling,
        wanted: int | None,
        num_prompt: int,
        max_length: int,
        default: int | None = None,
    ) -> SamplingParams:
        """Sampling parameters; without a wish `default`, without one what fits the context."""
        most = self._at_most(default)
        return SamplingParams(
            max_tokens=new_tokens(self._allowed(wanted), num_prompt, max_length, most),
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=request.stop_texts,
            ignore_eos=bool(request.ignore_eos),
        )

    def _at_most(self, default: int | None) -> int | None:
        """New tokens that a request without a wish gets where they fit; None: all that fit."""
        limits = [n for n in (default, self._config.max_new_tokens) if n is not None]
        return min(limits, default=None)

    def _allowed(self, wanted: int | None) -> int | None:
        most = self._config.max_new_tokens
        if most is not None and (wanted or 0) > most:
            raise ApiError(
                400,
                f"max_tokens: {wanted} asked for, this server gives {most} at most",
                param="max_tokens",
            )
        return wanted


@serve.deployment(max_constructor_retry_count=3)
@serve.ingress()
class AgentServer(ReplicaBackend):
    """One replica.

    The model is set and replaced by `reconfigure`, so that deploying another checkpoint starts no
    process.
    """

    def __init__(
        self,
        *,
        config: ServeConfig,
        device: str,
        prefix_cache_mb: int,
        key_digests: Sequence[str],
    ) -> None:
        self._context = serve.get_replica_context()
        self._key_digests = key_digests
        self._peers: Any = None
        super().__init__(
            config,
            device=device,
            prefix_cache_mb=prefix_cache_mb,
            replica=self._context.replica_id.unique_id,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self, self._config, self.counts, self._key_digests)

    async def reconfigure(self, model_spec: dict[str, Any]) -> None:
        """Load a model."""
        await self.load(model_spec)

    async def snapshot(self) -> tuple[str, list[Metric]]:
        """Name and counts of this replica, for the others."""
        return self.counts.replica, self.counts.snapshot()

    async def metrics(self) -> bytes:
        """The counts of all replicas: a scrape reaches any one of them."""
        counts = dict([await self.snapshot()])
        context = self._context
        try:
            if self._peers is None:
                self._peers = serve.get_deployment_handle(context.deployment, context.app_name)
            found = await self._peers.broadcast("snapshot").results_async(
                timeout_s=SCRAPE_S, return_exceptions=True
            )
        except Exception:  # the list of replicas is not there yet, or one of them hangs
            found = []
        # a replica that starts or stops has none to show
        counts.update(one for one in found if not isinstance(one, BaseException))
        return exposition(counts.values())
