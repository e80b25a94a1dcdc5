"""Decoding."""

from loratune.engine.generate import GREEDY, Answer, Sampling, generate

__all__ = ["GREEDY", "Answer", "Sampling", "generate"]
