"""The exceptions of step_ray, and the one wrapper that turns foreign exceptions into them.

Every exception here carries one message line (key, value, what to do) and pickles, because Ray
moves exceptions between processes. `StepRayError.exit_code` is what the command line exits with.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class StepRayError(Exception):
    """Base of all errors that are shown to the user as one line, without a traceback."""

    exit_code = 1


class ConfigError(StepRayError):
    """The user's configuration is wrong: unknown key, missing folder, bad model path."""

    exit_code = 2


class DataError(StepRayError):
    """A file or dataset cannot be used: empty, of another schema version, broken."""

    exit_code = 2


class RunStateError(StepRayError):
    """A run folder holds work made with another configuration, or is in use."""

    exit_code = 2


class TemplateError(StepRayError):
    """A chat template breaks the rules that the loss mask relies on (prefix rule)."""

    exit_code = 2


class EndpointError(StepRayError):
    """An OpenAI-compatible endpoint is unreachable or refuses the request for good."""

    exit_code = 2


class ClusterError(StepRayError):
    """A Ray cluster cannot be joined, or its nodes do not fit together for a run."""

    exit_code = 2


class StorageError(StepRayError):
    """An object store cannot be reached, or refuses what is asked of it."""

    exit_code = 2


class EnvError(StepRayError):
    """A text environment failed while resetting or stepping."""


class EpisodesError(StepRayError):
    """Too many episodes of a stage ended by a fault of the machinery; their rows are kept."""


class LLMError(StepRayError):
    """One LLM call failed after its retries."""


class TeacherError(StepRayError):
    """The teacher gave no usable verdict after its re-asks."""


class ContextLengthError(LLMError):
    """The conversation no longer fits the model's context."""


class BudgetError(StepRayError):
    """The budget of teacher calls or tokens is spent."""


@contextmanager
def boundary(error_type: type[StepRayError], what: str) -> Iterator[None]:
    """Turn any foreign exception inside the block into `error_type`, naming `what` was done.

    Our own errors and cancellations pass through unchanged.
    """
    try:
        yield
    except StepRayError:
        raise
    except Exception as exc:
        first_line = (str(exc).strip().splitlines() or [""])[0]
        raise error_type(f"{what}: {type(exc).__name__}: {first_line}") from exc
