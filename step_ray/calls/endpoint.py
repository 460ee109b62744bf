"""What an OpenAI-compatible endpoint's failures mean, and the questions before a run.

Takes exceptions of the openai client, says whether to send again, without what, and when; gives
lines that can be shown, because the key is not in them. It plays no episode.
"""

import json
import math
from enum import Enum

import openai

from step_ray.errors import EndpointError

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
REFUSED_STATUS = frozenset({401, 402, 403, 404})
"""Key, account, rights or model are wrong, whatever is asked."""
NO_MONEY = "insufficient_quota"
"""Code of a 429 that does not pass."""
SCHEMA_STATUS = frozenset({400, 422})
SCHEMA_WORDS = ("response_format", "json_schema", "guided_json", "structured output")
"""What an endpoint without structured output names when it refuses the request."""
CONTEXT_CODE = "context_length_exceeded"
CONTEXT_WORDS = ("maximum context length", "maximum model length")
"""OpenAI names the code; vLLM says it in words only."""
SHOWN_CHARS = 300
"""Of what an endpoint says in an error."""
NO_KEY = "none"
"""Sent to an endpoint that needs no key."""


class Failure(Enum):
    """What to do about a failed request."""

    PASSING = "send it again"
    CONTEXT = "the prompt does not fit"
    SCHEMA = "send it without a schema"
    FINAL = "sending it again cannot help"


def failure_of(exc: Exception) -> Failure:
    """Read an error; one without a status (connection, time-out, no chat completion) passes."""
    if not isinstance(exc, openai.APIStatusError):
        return Failure.PASSING
    text, code = str(exc).lower(), getattr(exc, "code", None)
    if exc.status_code == 400 and (code == CONTEXT_CODE or any(w in text for w in CONTEXT_WORDS)):
        return Failure.CONTEXT
    if exc.status_code in SCHEMA_STATUS and any(word in text for word in SCHEMA_WORDS):
        return Failure.SCHEMA
    passes = exc.status_code in RETRIED_STATUS and code != NO_MONEY
    return Failure.PASSING if passes else Failure.FINAL


def is_refusal(exc: Exception) -> bool:
    """Whether an error is about who asks, or for which model, and not about what was asked."""
    if not isinstance(exc, openai.APIStatusError):
        return False
    return exc.status_code in REFUSED_STATUS or getattr(exc, "code", None) == NO_MONEY


def words_of(exc: Exception) -> str:
    """What an error says; openai calls every failed connection by one of two names."""
    if isinstance(exc, openai.APIConnectionError):
        return str(exc.__cause__ or "") or str(exc)
    return str(exc)


def shown(text: str, api_key: str) -> str:
    """The first line of an endpoint's words, without the key, at a length one can read."""
    if api_key not in ("", NO_KEY):
        forms = {api_key, json.dumps(api_key)[1:-1], repr(api_key)[1:-1]}
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, "<key>")
    line = (text.splitlines() or [""])[0]
    rest = len(line) - SHOWN_CHARS
    return line if rest <= 0 else f"{line[:SHOWN_CHARS]}... ({rest} characters more)"


def retry_after_s(exc: Exception) -> float:
    """Seconds that the endpoint asks for; 0 where it asks for none or for no number."""
    response = getattr(exc, "response", None)
    value = response.headers.get("retry-after", "0") if response is not None else "0"
    try:
        seconds = float(value)
    except ValueError:
        return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


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
    key: str, base_url: str, model: str, api_key: str, timeout_s: float, tokens: tuple[str, int]
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

    Raises:
        EndpointError: the key, the model, or a call with so many tokens is refused.
    """
    question = [{"role": "user", "content": "Say only: ok"}]
    try:
        with _client(base_url, api_key, timeout_s) as client:
            client.chat.completions.create(
                model=model,
                messages=question,  # type: ignore[arg-type]
                max_tokens=tokens[1],
            )
    except openai.APIStatusError as exc:
        what = failure_of(exc)
        line = f"HTTP {exc.status_code}: {shown(str(exc), api_key)}"
        if what is Failure.CONTEXT:
            raise EndpointError(
                f"{tokens[0]}: {tokens[1]} do not fit the context of {model!r}; lower it ({line})"
            ) from None
        if exc.status_code == 404:
            raise EndpointError(f"{key}.model: {base_url} has no {model!r} ({line})") from None
        if what is not Failure.PASSING:
            raise EndpointError(
                f"{key}.base_url: {base_url!r} refuses a chat request; check the key and the model"
                f" ({line})"
            ) from None
    except (openai.OpenAIError, ValueError):  # ValueError: a page that is no JSON
        return


def _client(base_url: str, api_key: str, timeout_s: float) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout_s, max_retries=0)
