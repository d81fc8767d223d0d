"""The genuine files, where they are at hand."""

from tests.conftest import published_lists, shared_data

__all__ = ["published_lists", "shared_data"]
