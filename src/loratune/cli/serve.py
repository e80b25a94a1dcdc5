"""`loratune serve`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from loratune.cli.output import stderr
from loratune.errors import MissingExtraError


def serve(
    model: Annotated[str, typer.Argument(help="hub id, folder or .gguf file of the base", show_default=False)],
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]…", help="run or adapter folders or hub ids; NAME=FOLDER names one"),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="port to listen on")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="LORATUNE_API_KEY", help="what callers must show", show_envvar=True),
    ] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="requests that are answered at once")] = 32,
    queue: Annotated[int, typer.Option("--queue", min=0, help="requests that may wait beside them")] = 256,
    max_adapters: Annotated[
        int, typer.Option("--max-adapters", min=1, help="adapters in memory; others are loaded when asked for")
    ] = 16,
    adapter_dir: Annotated[
        str | None, typer.Option("--adapter-dir", help="folder from which requests may load adapters")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=2, help="longest prompt and answer in tokens; the model's context")
    ] = None,
    dtype: Annotated[Literal["auto", "bf16", "fp32"], typer.Option("--dtype", help="of the base")] = "auto",
    quant: Annotated[Literal["nf4", "int8"] | None, typer.Option("--quant", help="format of its linear layers")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps")] = None,
) -> None:
    """OpenAI's interface over one base and many adapters, and a page to try them."""
    try:
        from loratune.serve import ServeConfig
        from loratune.serve import serve as run
    except ImportError as error:
        raise MissingExtraError(f"serving needs the package {error.name}", extra="serve") from None

    config = ServeConfig(host, port, api_key, slots, queue, max_adapters, adapter_dir, max_length)
    run(model, runs or (), config, say=stderr().print, dtype=dtype, quant=quant, device=device)
