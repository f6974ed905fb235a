"""What these tests share with the quick ones."""

from preference_collection.tests.conftest import store  # noqa: F401
