"""The composition root: settings in, components wired, run folder out."""

from loratune.run.answer import evaluate, generate
from loratune.run.combine import combine
from loratune.run.compare import Comparison, compare
from loratune.run.diff import diff
from loratune.run.export import export
from loratune.run.merge import merge
from loratune.run.opened import Opened, open_run
from loratune.run.reproduce import Reproduction, reproduce
from loratune.run.show import inspect, show
from loratune.run.train import Run, train

__all__ = [
    "Comparison",
    "Opened",
    "Reproduction",
    "Run",
    "combine",
    "compare",
    "diff",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "merge",
    "open_run",
    "reproduce",
    "show",
    "train",
]
