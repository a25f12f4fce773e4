"""Where the shared reference values and data lie; tests that need them skip where they are absent."""

import pathlib

import pytest

SHARED = pathlib.Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")
