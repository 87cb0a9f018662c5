"""Enrolled speakers: ``reference`` checks a recording, ``voice`` describes one, ``store`` keeps it."""
