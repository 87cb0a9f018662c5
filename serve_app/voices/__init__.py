"""Enrolled speakers: ``reference`` checks an uploaded recording, ``store`` keeps voices."""
