"""The commands that have a model answer: one message at a time, a file of prompts, and how well it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from loratune.cli.adapters import AnyTokenizer, Json
from loratune.cli.options import parse_given, with_settings
from loratune.cli.output import emit, refuse_taken_file, table, write_json

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="run folder, adapter folder or model", show_default=False)
]
BaseOption = Annotated[str | None, typer.Option("--base", help="where the base is now, if not where the run found it")]
_Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps")]
_Quant = Annotated[
    Literal["nf4", "int8"] | None, typer.Option("--quant", help="keep the base in few bits; the run's own otherwise")
]
_MaxNew = Annotated[int, typer.Option("--max-new-tokens", min=1, help="longest answer in tokens")]
_Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token")]
_TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="sample from the likeliest tokens of this mass")
]
_Seed = Annotated[int, typer.Option("--seed", min=0, help="seed of the sampling")]


def chat(
    run: RunArgument,
    vs: Annotated[str | None, typer.Option("--vs", help="answer side by side: base, or another run")] = None,
    base: BaseOption = None,
    any_tokenizer: AnyTokenizer = False,
    device: _Device = None,
    quant: _Quant = None,
    max_new_tokens: _MaxNew = 256,
    temperature: _Temperature = 0.0,
    top_p: _TopP = 1.0,
    seed: _Seed = 0,
    system: Annotated[str | None, typer.Option("--system", help="system message")] = None,
    as_json: Json = False,
) -> None:
    """Talk to a run, beside its base or another run; each line of standard input is a message."""
    from loratune.cli.chat import converse
    from loratune.engine import Sampling
    from loratune.run.conversation import Conversation

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    opening = {"base": base, "device": device, "quant": quant, "any_tokenizer": any_tokenizer}
    converse(Conversation.open(run, vs=vs, system=system, sampling=sampling, **opening), as_json=as_json)


def generate(
    run: RunArgument,
    prompts: Annotated[
        str, typer.Option("--prompts", help="data file, with or without answers, or a text file with a prompt a line")
    ],
    out: Annotated[
        str | None, typer.Option("--out", help="JSONL file for the answers; standard output otherwise")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="names of the data's columns: prompt=question")
    ] = None,
    base: BaseOption = None,
    any_tokenizer: AnyTokenizer = False,
    device: _Device = None,
    quant: _Quant = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="only the first rows")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="prompts answered together")] = 16,
    max_new_tokens: _MaxNew = 256,
    temperature: _Temperature = 0.0,
    top_p: _TopP = 1.0,
    seed: _Seed = 0,
    as_json: Json = False,
) -> None:
    """Answer every prompt of a file; one JSON object a line."""

    from loratune.cli.progress import counting
    from loratune.data.read import read
    from loratune.engine import Sampling
    from loratune.files import to_json_lines, write_bytes
    from loratune.run.answer import generate as answer
    from loratune.run.opened import open_run

    if out is not None:
        refuse_taken_file(out)
    corpus = read(prompts, answers=False, **parse_given({"columns": columns}))
    examples = corpus.examples[:limit]
    opened = open_run(run, base=base, device=device, quant=quant, any_tokenizer=any_tokenizer)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    with counting(len(examples), "answers") as done:
        rows = answer(opened, examples, sampling, batch_size=batch_size, done=done)
    if out is None and not as_json:
        for row in rows:
            write_json(row, indent=None)
        return
    if out is not None:
        write_bytes(Path(out).expanduser(), to_json_lines(rows))
    emit(
        {"out": out, "rows": rows if out is None else len(rows)},
        as_json=as_json,
        text=[f"{len(rows)} answers in {out}"],
    )


@with_settings(groups=("Data",), leave_out=("pack",))
def evaluate(
    run: RunArgument,
    data: Annotated[str, typer.Option("--data", help="rows to measure on")],
    base: BaseOption = None,
    any_tokenizer: AnyTokenizer = False,
    device: _Device = None,
    quant: _Quant = None,
    vs_base: Annotated[bool, typer.Option("--vs-base/--no-vs-base", help="measure the base beside it")] = True,
    answers: Annotated[int, typer.Option("--answers", min=0, help="answer so many rows and count exact matches")] = 0,
    max_new_tokens: _MaxNew = 256,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Loss, perplexity and exact matches on a file, of a run and of its base."""
    from loratune.cli.progress import counting
    from loratune.engine import Sampling
    from loratune.run.answer import evaluate as measure
    from loratune.run.opened import open_run

    opened = open_run(run, base=base, device=device, quant=quant, any_tokenizer=any_tokenizer)
    options = {"answers": answers, "sampling": Sampling(max_new_tokens), **parse_given(settings)}
    both = vs_base and opened.lora is not None
    with counting(answers * (2 if both else 1), "answers") as done:
        found = {"run": measure(opened, data, done=done, **options)}
        if both and opened.lora is not None:
            with opened.lora.disabled():
                found["base"] = measure(opened, data, done=done, **options)
    rows = [[key, *(_figure(found[who].get(key)) for who in found)] for key in found["run"]]
    emit(found, as_json=as_json, text=[table(["", *found], rows)])


def _figure(value: Any) -> str:
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
