"""The questions that an endpoint is asked before a run spends anything.

Takes an address, a key and the settings of the calls, raises what every call would meet. It plays
no episode.
"""

from collections.abc import Mapping
from typing import Any

import openai

from step_ray.calls.endpoint import REQUEST_STATUS, Failure, failure_of, shown
from step_ray.calls.request import RequestForm
from step_ray.errors import EndpointError
from step_ray.types import Message

CHECK_TIMEOUT_S = 10.0
"""Long enough for one word."""
QUESTION = Message(role="user", content="Say only: ok")


def check_endpoint(key: str, base_url: str, model: str, api_key: str, timeout_s: float) -> None:
    """Ask `<base_url>/models` once, so that a wrong address shows before any work is done.

    Raises:
        EndpointError: unreachable, refuses the key, or does not serve `model`.
    """
    try:
        with _client(base_url, api_key, timeout_s) as client:
            names = [m.id for m in client.models.list().data]
    except openai.APIStatusError as exc:
        if exc.status_code == 404:  # an endpoint may have no /models; the first call will tell
            return
        raise EndpointError(
            f"{key}.base_url: {base_url!r} answered HTTP {exc.status_code}; check the key and URL"
        ) from exc
    except openai.APIConnectionError as exc:
        raise EndpointError(
            f"{key}.base_url: {base_url!r} cannot be reached; start the server or mend the URL"
        ) from exc
    except Exception as exc:  # a page that is no JSON, a URL or key that cannot be sent
        raise EndpointError(
            f"{key}.base_url: {base_url!r} gives no OpenAI answer; mend the URL or the key"
        ) from exc
    if names and model not in names:
        raise EndpointError(f"{key}.model: {model!r} is not served at {base_url}; it has {names}")


def check_chat(
    key: str,
    base_url: str,
    model: str,
    api_key: str,
    timeout_s: float,
    tokens: tuple[str, int],
    *,
    temperature: float | None = None,
    seed: int | None = None,
    extra_body: Mapping[str, Any] | None = None,
) -> None:
    """Ask for one word, because many endpoints list their models to anybody.

    What may pass (busy, slow) is no reason to refuse a run: its client waits and asks again.

    Args:
        key: section of the config that names the endpoint.
        base_url: the endpoint.
        model: what to ask.
        api_key: never shown.
        timeout_s: of the request.
        tokens: key and value of the longest answer that calls will ask for.
        temperature: of the calls, as all that follows.
        seed: some endpoints refuse any.
        extra_body: see `TeacherConfig.extra_body`.

    Raises:
        EndpointError: the key, the model, or a call with these settings is refused.
    """
    form = RequestForm(extra_body)
    body = form.body(model, [QUESTION], max_tokens=tokens[1], temperature=temperature, seed=seed)
    try:
        with _client(base_url, api_key, timeout_s) as client:
            _ask(client, form, body)
    except openai.APIStatusError as exc:
        line = f"HTTP {exc.status_code}: {shown(str(exc), api_key)}"
        fault = _refusal(exc, key, base_url, model, tokens)
        if fault:
            raise EndpointError(f"{fault} ({line})") from None
    except (openai.OpenAIError, ValueError):  # ValueError: a page that is no JSON
        return


def _ask(client: openai.OpenAI, form: RequestForm, body: dict[str, Any]) -> None:
    """Send it, and again as often as its form can be mended."""
    while True:
        try:
            client.post("/chat/completions", cast_to=object, body=body)
        except openai.APIStatusError as exc:
            if not form.mend(body, failure_of(exc)):
                raise
        else:
            return


def _refusal(
    exc: openai.APIStatusError, key: str, base_url: str, model: str, tokens: tuple[str, int]
) -> str:
    """What is wrong and what to do; empty where it may pass."""
    what = failure_of(exc)
    if what is Failure.CONTEXT:
        return f"{tokens[0]}: {tokens[1]} do not fit the context of {model!r}; lower it"
    if exc.status_code == 404:
        return f"{key}.model: {base_url} has no {model!r}"
    if what is Failure.PASSING:
        return ""
    remedy = "check the key and the model"
    if exc.status_code in REQUEST_STATUS:
        remedy = "mend the setting that it names"
        remedy += ", or leave it out by teacher.extra_body" if key == "teacher" else ""
    return f"{key}.base_url: {base_url!r} refuses a chat request; {remedy}"


def _client(base_url: str, api_key: str, timeout_s: float) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout_s, max_retries=0)
