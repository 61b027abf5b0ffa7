"""What every test runs under: hypothesis without deadlines, and the same examples each time."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("schedlab", deadline=None, derandomize=True)
settings.load_profile("schedlab")
