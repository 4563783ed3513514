"""Shared test settings."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch is imported; see rice_eval/cli/main.py

# Machines that run tests are shared and noisy: a deadline a case would fail for reasons of its own.
settings.register_profile("rice", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rice")
