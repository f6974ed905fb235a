"""Fixtures shared with the fast tests."""

from preference_collection.tests.conftest import store  # noqa: F401
