"""What a stage of a run is, and what it works with while it runs.

Takes a `RunConfig`, gives the served model and paths that stages share. Which stages there are is
line.py's and training.py's; whether one has to run is pipeline.py's.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from step_ray.config import RunConfig
from step_ray.progress import Reporter
from step_ray.storage.places import place_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the line."""

    name: str
    needs: tuple[str, ...]
    settings: Mapping[str, Any]
    """What defines the outcome; a change means that the outcome is another one."""
    outputs: tuple[str, ...]
    """Paths under the run folder that the stage owns."""
    run: Callable[["StageContext"], Mapping[str, Any]]
    """Does the work, gives the summary."""
    limits: frozenset[str] = frozenset()
    """Settings that, when raised, only add to the outcome: the stage goes on from what it has."""


class StageContext:
    """What a running stage works with; it keeps one served model between stages."""

    def __init__(self, config: RunConfig, reporter: Reporter) -> None:
        self.config = config
        self.reporter = reporter
        self.root = config.run_dir
        self._served: Any = None

    @property
    def app(self) -> str:
        """Name of the served application: on a cluster that others use too, the run's own."""
        if self.config.ray.address == "local":
            return ""
        place = hashlib.sha256(place_of(self.root).encode()).hexdigest()[:8]
        return f"{self.config.name}-{place}"

    def end_leftovers(self) -> None:
        """Free what an earlier job of this run was serving when it was killed."""
        from step_ray.serve import remove

        if self.config.ray.address != "local":
            remove(self.app)

    def student_source(self) -> str:
        """The model folder or hub id that training starts from."""
        from step_ray.training.student import resolve_init

        if self.config.student.init == "scratch":
            return resolve_init(place_of(self.root / "models" / "student"))
        return resolve_init(self.config.student.init)

    def serve(self, model: str) -> Any:
        """Serve a trained model, replacing the one that was served before."""
        from step_ray.serve import deploy

        if self._served is None or self._served.model != model:
            self.reporter.line(f"  serving [cyan]{model}[/]")
            self._served = deploy(
                place_of(self.root / "models" / model),
                model,
                self.config.served,
                max_length=self.config.student.max_length,
                dtype=self.config.student.dtype,
                app=self.app,
            )
            self.reporter.line(f"  {model} answers at {self._served.base_url}")
        return self._served

    def stop_serving(self) -> None:
        """Free the served model's devices."""
        if self._served is not None:
            self._served.close()
            self._served = None
