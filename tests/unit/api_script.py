"""A backend that answers from what it is asked, and one call of its routes; no model, no Ray."""

import asyncio

import httpx

from step_ray.errors import ContextLengthError, TemplateError
from step_ray.serving.api.app import make_api
from step_ray.serving.api.backend import Answer
from step_ray.serving.api.errors import ApiError
from step_ray.serving.api.guard import key_digest
from step_ray.serving.api.metrics import ServeMetrics, exposition
from step_ray.serving.config import ServeConfig

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ACT = "/v1/agent/act"
EPISODES = "/v1/episodes"
ASK = {"model": "echo", "messages": [{"role": "user", "content": "go"}]}

FAULTS = {
    "too long": ContextLengthError("it does not fit"),
    "odd": TemplateError("chat template: it refuses the conversation"),
    "too many": ApiError(429, "no room", kind="server_error", code="overloaded", retry_after_s=1),
    "crash": RuntimeError("secret detail"),
}
LATE_FAULTS = {"too slow": TimeoutError(), "late crash": RuntimeError("secret detail")}


class Echoed:
    """Says a text letter by letter."""

    def __init__(self, text):
        self.text, self.is_cancelled = text, False

    async def pieces(self):
        for letter in self.text[:3] if self.text in LATE_FAULTS else self.text:
            await asyncio.sleep(0)
            yield letter

    async def answer(self):
        if self.text in LATE_FAULTS:
            raise LATE_FAULTS[self.text]
        return Answer(
            text=self.text,
            finish_reason="stop",
            prompt_tokens=3,
            completion_tokens=2,
            cached_tokens=1,
            token_ids=(5, 6),
        )

    def cancel(self):
        self.is_cancelled = True


class Echo:
    """Repeats the last message, the prompts, or the last observation."""

    model = "echo"

    def __init__(self, metrics):
        self._metrics = metrics

    def _say(self, text):
        if text in FAULTS:
            raise FAULTS[text]
        return Echoed(text)

    async def chat(self, request):
        return self._say(request.messages[-1].to_message().content)

    async def complete(self, request):
        return [self._say(p if isinstance(p, str) else f"{len(p)} ids") for p in request.prompts]

    async def act(self, request):
        return self._say(request.history[-1].observation if request.history else request.task)

    async def episodes(self, request):
        if request.environment in FAULTS:
            raise FAULTS[request.environment]

        async def records():
            for number in range(request.count or len(request.ids)):
                yield {"object": "episode", "number": number + 1, "reward": float("inf")}
            if request.environment == "late":
                raise RuntimeError("secret detail")
            yield {"object": "episodes.report"}

        return records()

    async def metrics(self):
        return exposition([self._metrics.snapshot()])


def echo_api(keys=(), metrics=None, **config):
    metrics = metrics or ServeMetrics("0", lambda: 0, lambda: 0)
    digests = [key_digest(key) for key in keys]
    return make_api(Echo(metrics), ServeConfig(**config), metrics, digests)


def call(method, path, *, key="", keys=(), headers=None, metrics=None, config=None, **kwargs):
    """The answer to one request; fields of `ServeConfig` may stand among the arguments."""
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name in ServeConfig.model_fields}
    api = echo_api(keys, metrics, **fields)

    async def send():
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        sent = {**(headers or {}), **({"authorization": f"Bearer {key}"} if key else {})}
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, headers=sent, **kwargs)

    return asyncio.run(send())
