"""What went wrong, said to the person who can mend it.

    raise RecipeError("recipes/mine.yaml line 7: ppo.kl_coeff is no key; did you mean ppo.kl_coef?")

Each room has one exception for mistakes of its user: `RecipeError`, `data.errors.DataError` and
`cluster.errors.ClusterError`. The command line prints such a message, without a traceback, and exits with 2.
Anything else is a fault of ours: it keeps its traceback and exits with 1.
"""

from collections.abc import Iterator

from cluster.errors import ClusterError
from data.errors import DataError


class RecipeError(ValueError):
    """The recipe, or a command about it, cannot be carried out. The message says what, where and what to do."""


class TrainingError(RuntimeError):
    """Training cannot go on: a loss that is not finite, an engine that disagrees with its policy. The last checkpoint stands."""


class NotFinite(TrainingError):
    """A loss or a gradient is not finite. `places`: (rank, micro-batch) of each micro-batch that shows it, if any does."""

    def __init__(self, text: str, places: list[tuple[int, int]]) -> None:
        super().__init__(text, places)  # both, so that it survives pickling between Ray's processes
        self.places = places

    def __str__(self) -> str:
        return str(self.args[0])


USER_ERRORS = (RecipeError, DataError, ClusterError, TrainingError)


def user_error(error: BaseException) -> BaseException | None:
    """The user's mistake behind `error`, or None.

    An error raised on a Ray worker arrives wrapped: Ray's `RayTaskError` also inherits from the original class but
    prints a whole traceback, and Ray Train wraps it once more. The innermost user error carries the plain message.
    """
    found = [e for e in _causes(error) if isinstance(e, USER_ERRORS)]
    return found[-1] if found else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and everything it was raised from, outermost first."""
    seen: set[int] = set()
    pending: list[BaseException] = [error]
    while pending:
        e = pending.pop()
        if id(e) in seen:
            continue
        seen.add(id(e))
        yield e
        by_rank = getattr(e, "worker_failures", None)  # ray.train.WorkerGroupError: rank -> exception
        inner = [*(by_rank.values() if isinstance(by_rank, dict) else ()), getattr(e, "cause", None), e.__cause__]
        pending += [i for i in inner if isinstance(i, BaseException)]
