"""How much Hypothesis tries: a few examples, the same ones in every run."""

from __future__ import annotations

from hypothesis import settings

few_examples = settings(max_examples=50, deadline=None, derandomize=True, database=None)
