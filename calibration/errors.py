"""The one error of this package; the run wraps it, so it need not know the exporter's tree."""

from __future__ import annotations


class CalibrationError(Exception):
    """Prompts or a recording cannot be used; the message has the form of every error of the program."""
