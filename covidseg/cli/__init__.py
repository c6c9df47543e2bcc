"""The command ``covidseg``."""

from covidseg.cli.app import app, main

__all__ = ["app", "main"]
