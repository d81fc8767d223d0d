"""One test over many cases: its failure lists every case that does not pass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def for_each(names: str | tuple[str, ...], cases: Iterable[Any]) -> Callable[[Callable[..., None]], Any]:
    """As `pytest.mark.parametrize`, in one test; fixtures are shared by the cases, decorators stack."""
    keys = (names,) if isinstance(names, str) else names
    rows = [dict(zip(keys, (case,) if isinstance(names, str) else case, strict=True)) for case in cases]
    assert rows, f"nothing to go through: {', '.join(keys)}"

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def test(**others: Any) -> None:
            offenders = []
            for row in rows:
                try:
                    check(**row, **others)
                except (Exception, pytest.fail.Exception) as error:
                    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                    offenders.append(f"{', '.join(map(str, row.values()))}: {kind}{error}")
            assert not offenders, f"{len(offenders)} of {len(rows)}:\n" + "\n".join(offenders)

        signature = inspect.signature(check)
        rest = [part for name, part in signature.parameters.items() if name not in keys]
        del test.__wrapped__  # pytest would ask it for the fixtures
        test.__signature__ = signature.replace(parameters=rest)
        return test

    return decorate
