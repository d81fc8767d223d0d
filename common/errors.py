"""Errors that a user can mend, shown as one line instead of a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn


class UserError(Exception):
    """A mistake in input, configuration or environment.

    The message is one line: where, what, and the remedy, in that order, lower case start, no full stop at the end.
    Several mistakes that are known at once are one argument each.
    """

    def __str__(self) -> str:
        """The messages on one line."""
        return "; and ".join(map(str, self.args))


def run_main(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Run a script's `main(argv)` and exit: 0 or its return value, 2 after a `UserError` (one line on stderr each).

    In a run of several processes the first rank speaks; the others wait a moment, so that a mistake
    they all share is printed once.
    """
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        prefix = ""
        if rank != "0":
            time.sleep(3)  # the launcher ends the other ranks as soon as rank 0 has failed
            prefix = f"rank {rank}: "
        lines = [f"error: {prefix}{' '.join(str(line).split())}" for line in error.args]
        print("\n".join(lines), file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code or 0)


def reason(error: BaseException) -> str:
    """The readable part of an exception, on one line; an `OSError` behind it explains more than what it led to."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())
    return text[:120] or type(error).__name__


@contextlib.contextmanager
def writing(
    where: object, remedy: str = "free space or check permissions", done: str = "written"
) -> Iterator[None]:
    """Context in which an `OSError` becomes the one line that `where` cannot be `done`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where}: cannot be {done} ({reason(error)}); {remedy}") from error
