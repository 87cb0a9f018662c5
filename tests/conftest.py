"""Runs before any test module is imported, and so before Ray is."""

from __future__ import annotations

from serve_app.environment import prepare_environment

prepare_environment()
