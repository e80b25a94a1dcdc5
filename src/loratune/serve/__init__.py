"""The engine over HTTP: OpenAI's interface, one base, many adapters."""

from loratune.serve.server import ServeConfig, serve

__all__ = ["ServeConfig", "serve"]
