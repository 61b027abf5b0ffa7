"""What every test runs under: hypothesis without deadlines, the same fifty examples each time unless a test asks for more."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("schedlab", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("schedlab")
