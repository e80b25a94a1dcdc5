"""Decoding: rows with adapters of their own, continued together."""

from loratune.engine.batch import Chosen, Engine, Limits, Request
from loratune.engine.choose import GREEDY, Sampling
from loratune.engine.generate import Answer, generate
from loratune.engine.ready import make_ready
from loratune.engine.trial import why_not_batched

__all__ = [
    "GREEDY",
    "Answer",
    "Chosen",
    "Engine",
    "Limits",
    "Request",
    "Sampling",
    "generate",
    "make_ready",
    "why_not_batched",
]
