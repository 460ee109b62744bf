"""Which failures of a training are survived: deaths of workers, not errors that would come again.

Takes the exceptions of Ray Train's workers, gives the error of step_ray among them. It is imported
by Ray's controller and so loads neither torch nor transformers.
"""

from collections.abc import Iterable
from typing import Any

from ray.train import UserCallback

from step_ray.errors import StepRayError


def own_error(failures: Iterable[BaseException]) -> StepRayError | None:
    """The first error of step_ray among workers' exceptions, which Ray may have wrapped."""
    causes = (getattr(failure, "_base_exc", failure) for failure in failures)
    return next((cause for cause in causes if isinstance(cause, StepRayError)), None)


class StopAtOwnErrors(UserCallback):
    """Ends the training at an error of step_ray, which says what the user has to change.

    Ray Train restarts workers after any exception; but what a callback raises is an error of the
    controller, which is final.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise our own error, if there is one."""
        error = own_error(worker_exceptions.values())
        if error is not None:
            raise error
