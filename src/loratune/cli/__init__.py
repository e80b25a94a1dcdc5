"""The command `loratune`: parse, call one library function, print. `--help` never imports torch."""

from loratune.cli.main import main

__all__ = ["main"]
