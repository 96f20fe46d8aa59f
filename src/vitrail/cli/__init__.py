"""The `vitrail` command. Each command imports what it needs when it runs, so `vitrail --help` is quick."""

from vitrail.cli import doctor, export, models, page, studies, training  # noqa: F401 - each registers its commands
from vitrail.cli.entry import app, main

__all__ = ["app", "main"]
