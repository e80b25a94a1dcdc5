"""Decoding."""

from loratune.engine.generate import Answer, Sampling, generate

__all__ = ["Answer", "Sampling", "generate"]
