"""What an OpenAI-compatible endpoint's failures mean.

Takes exceptions of the openai client, says whether to send again, how else, and when; gives lines
that can be shown, because the key is not in them. It sends nothing.
"""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum

import openai

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
REFUSED_STATUS = frozenset({401, 402, 403, 404})
"""Key, account, rights or model are wrong, whatever is asked."""
NO_MONEY = "insufficient_quota"
"""Code of a 429 that does not pass."""
REQUEST_STATUS = frozenset({400, 422})
"""A field of the request is refused."""
SCHEMA_WORDS = ("response_format", "json_schema", "guided_json", "structured output")
"""What an endpoint without structured output names when it refuses the request."""
LIMIT_NAME = "max_completion_tokens"
"""What an endpoint names when it refuses `max_tokens`."""
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
    LIMIT_NAME = "send it with the newer name of max_tokens"
    FINAL = "sending it again cannot help"


def failure_of(exc: Exception) -> Failure:
    """Read an error; one without a status (connection, time-out, no chat completion) passes."""
    if not isinstance(exc, openai.APIStatusError):
        return Failure.PASSING
    text, code = str(exc).lower(), getattr(exc, "code", None)
    if exc.status_code == 400 and (code == CONTEXT_CODE or any(w in text for w in CONTEXT_WORDS)):
        return Failure.CONTEXT
    if exc.status_code in REQUEST_STATUS and any(word in text for word in SCHEMA_WORDS):
        return Failure.SCHEMA
    if exc.status_code in REQUEST_STATUS and LIMIT_NAME in text:
        return Failure.LIMIT_NAME
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
    """Seconds that the endpoint asks for; 0 where it asks for none, or says no time.

    Read are `retry-after-ms` (Azure), and `retry-after` as seconds or as a date (RFC 9110).
    """
    response = getattr(exc, "response", None)
    headers: Mapping[str, str] = response.headers if response is not None else {}
    seconds = _number(headers.get("retry-after-ms", "")) / 1000
    text = headers.get("retry-after", "")
    return seconds or _number(text) or _until(text, headers.get("date", ""))


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return max(0.0, number) if math.isfinite(number) else 0.0


def _until(text: str, now: str) -> float:
    """Seconds to a date by the endpoint's own clock, if it says what that shows."""
    date, clock = _date(text), _date(now) or datetime.now(UTC)
    return max(0.0, (date - clock).total_seconds()) if date else 0.0


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return date.replace(tzinfo=date.tzinfo or UTC)
