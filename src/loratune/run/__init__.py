"""The composition root: settings in, components wired, run folder out."""

from loratune.run.answer import evaluate, generate
from loratune.run.merge import merge
from loratune.run.opened import Opened, open_run
from loratune.run.show import show
from loratune.run.train import Run, train

__all__ = ["Opened", "Run", "evaluate", "generate", "merge", "open_run", "show", "train"]
