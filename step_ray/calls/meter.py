"""The meter of one episode: counts its calls, tokens, money and environment steps as they happen.

Takes completions the moment they arrive, gives a `Usage`; so what was paid is counted however the
episode ends. It knows no limit.
"""

from dataclasses import replace

from step_ray.llm import Completion
from step_ray.types import Usage


class Meter:
    """Adds up one episode."""

    def __init__(self) -> None:
        self.usage = Usage()

    def env_step(self) -> None:
        """One action was carried out."""
        self.usage = replace(self.usage, env_steps=self.usage.env_steps + 1)

    def student(self, completion: Completion) -> None:
        """One answer of the student."""
        usage = self.usage
        self.usage = replace(
            usage,
            student_calls=usage.student_calls + 1,
            prompt_tokens=usage.prompt_tokens + completion.prompt_tokens,
            completion_tokens=usage.completion_tokens + completion.completion_tokens,
            student_cost=usage.student_cost + completion.cost,
            retries=usage.retries + completion.retries,
        )

    def teacher(self, completion: Completion) -> None:
        """One reply of the teacher, or one judgement of a teacher that asks no model."""
        usage = self.usage
        if completion.cached:
            self.usage = replace(usage, teacher_cached_calls=usage.teacher_cached_calls + 1)
            return
        self.usage = replace(
            usage,
            teacher_calls=usage.teacher_calls + 1,
            teacher_prompt_tokens=usage.teacher_prompt_tokens + completion.prompt_tokens,
            teacher_completion_tokens=usage.teacher_completion_tokens
            + completion.completion_tokens,
            teacher_cost=usage.teacher_cost + completion.cost,
            teacher_unstructured_calls=usage.teacher_unstructured_calls + completion.unstructured,
            retries=usage.retries + completion.retries,
        )

    def cache_fault(self) -> None:
        """An entry of the cache could not be read or written."""
        self.usage = replace(self.usage, cache_faults=self.usage.cache_faults + 1)
