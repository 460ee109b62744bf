"""Which chat template a student speaks with: its own, one of ours, or a file; its system role.

Takes the settings and the tokenizer's own template, gives the template that the student is trained
and saved with. So whoever serves the saved folder, with whatever engine, prompts as we trained. It
renders nothing.
"""

from dataclasses import dataclass
from importlib import resources
from typing import Literal

from step_ray.config import StudentConfig, expand_path
from step_ray.errors import ConfigError

FOLD_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set messages = [{'role': messages[1]['role'],"
    " 'content': messages[0]['content'] + '\n\n' + messages[1]['content']}] + messages[2:] %}"
    "{%- endif %}{{- '' }}"
)
"""Written before a template; the last part keeps the template's own first newline."""
TODAY = "strftime_now"
"""What a template calls to write today's date."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """How the template of a tokenizer is changed; by default not at all."""

    chat_template: str = ""
    """See `StudentConfig.chat_template`."""
    system: Literal["role", "fold"] = "role"
    """See `StudentConfig.system`."""

    @classmethod
    def of(cls, student: StudentConfig) -> "ChatSettings":
        """Those of a run."""
        return cls(chat_template=student.chat_template, system=student.system)


def effective_template(own: str | None, settings: ChatSettings) -> str | None:
    """The template to train and serve with; None when there is none.

    Args:
        own: the tokenizer's.
        settings: of the run.

    Raises:
        ConfigError: the template that the settings name is not there, or cannot be read.
    """
    template = _named(settings.chat_template) if settings.chat_template else own
    if template is None or settings.system == "role" or template.startswith(FOLD_SYSTEM):
        return template
    return FOLD_SYSTEM + template


def refuse_today(template: str) -> None:
    """Refuse a template that writes today's date.

    Raises:
        ConfigError: the prompts of tomorrow would not be those that were trained.
    """
    if TODAY in template:
        raise ConfigError(
            f"student.chat_template: the template writes today's date ({TODAY}), so a prompt would"
            " change from one day to the next; name a copy of it with a fixed date"
        )


def _named(name: str) -> str:
    if name.startswith("builtin:"):
        file = resources.files("step_ray") / "templates" / f"{name.removeprefix('builtin:')}.jinja"
        if not file.is_file():
            raise ConfigError(f"student.chat_template: {name!r} is unknown; use builtin:chatml")
        return file.read_text(encoding="utf-8")
    path = expand_path("student.chat_template", name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"student.chat_template: {name!r} cannot be read ({type(exc).__name__}); give a Jinja"
            " file or builtin:chatml"
        ) from exc
