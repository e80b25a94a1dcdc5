"""The composition root: settings in, components wired, run folder out."""

from loratune.run.train import Run, train

__all__ = ["Run", "train"]
