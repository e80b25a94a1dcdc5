"""The commands: each parses, calls one library function, and prints what it returns.

Rooms that need torch are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from loratune.cli.adapters import AnyTokenizer, Json, combine, diff, export, show
from loratune.cli.answers import BaseOption, RunArgument, chat, evaluate, generate
from loratune.cli.options import parse_given, with_settings
from loratune.cli.output import emit, gigabytes, stderr, table, write
from loratune.cli.serve import serve
from loratune.config import read_settings
from loratune.config.tasks import CAUSAL_LM
from loratune.errors import ConfigError, DivergedError, LoratuneError, RegressionError

app = typer.Typer(
    name="loratune",
    help="LoRA fine-tuning that is fast, exact, and proves itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Model = Annotated[str, typer.Argument(help="hub id, folder or GGUF file", show_default=False)]
Data = Annotated[
    str, typer.Argument(help="JSONL, JSON, CSV, Parquet or text file, or a hub data set id", show_default=False)
]
Config = Annotated[str | None, typer.Option("--config", help="settings in a TOML or YAML file")]
Set = Annotated[list[str] | None, typer.Option("--set", help="one setting as name=value; may be repeated")]


# Commands that write, and that several processes do not do together: each would do the whole, into the same files.
_ALONE = ("generate", "eval", "chat", "merge", "export", "combine", "compare", "serve", "report", "doctor")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    processes = os.environ.get("WORLD_SIZE") or "1"
    command = context.invoked_subcommand
    if command in _ALONE and processes != "1" and "--help" not in sys.argv:
        hint = "start it without torchrun or accelerate launch; these are for train"
        raise ConfigError(f"WORLD_SIZE={processes}: `loratune {command}` runs in one process", hint=hint)
    if version:
        from importlib.metadata import version as version_of

        write(f"loratune {version_of('loratune')}\n")
        raise typer.Exit


@app.command()
@with_settings()
def train(
    model: Model,
    data: Data,
    config: Config = None,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done and stop")] = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """From a data file to a tested adapter; everything not given is decided and explained."""
    chosen = read_settings(config, set_ or [], parse_given(settings))
    if dry_run:
        _show_plan(model, data, chosen, as_json=as_json)
        return
    from loratune.cli.progress import Screen
    from loratune.run import train as run_training

    screen = Screen(stderr())
    try:
        run = run_training(model, data, listen=screen, **chosen)
    finally:
        screen.close()
    if run.written_here:
        emit({"path": str(run.path), "record": run.record}, as_json=as_json, text=[str(run.path)])


@app.command()
@with_settings(groups=("Data",), also=("task_type",))
def data(
    data: Data,
    model: Annotated[str, typer.Option("--model", help="whose tokenizer and chat template are used")],
    show_mask: Annotated[int, typer.Option("--show-mask", min=0, help="print the loss mask of so many rows")] = 0,
    val: Annotated[
        str | None, typer.Option("--val", help="held-out rows: a share, a count, a file; 0 for none")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of the split")] = 0,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Rows, bad rows by number, columns, lengths, truncation, labels, and the coloured loss mask."""
    from loratune.run.look import look_at_data

    chosen = parse_given({**settings, "val": val, "seed": seed})
    found = look_at_data(model, data, show_masks=show_mask, **chosen)
    emit(found, as_json=as_json, text=_data_text(found))


@app.command()
@with_settings(leave_out=("out", "resume", "log_with"))
def plan(
    model: Model,
    data: Annotated[
        str | None, typer.Argument(help="data file; without it only parameters and memory", show_default=False)
    ] = None,
    config: Config = None,
    set_: Set = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """What train would do: parameters, memory, steps; reads the config and loads no weights."""
    _show_plan(model, data, read_settings(config, set_ or [], parse_given(settings)), as_json=as_json)


@app.command()
@with_settings(leave_out=("method", "out", "resume", "log_with", "early_stop"))
def compare(
    model: Model,
    data: Data,
    methods: Annotated[
        str, typer.Option("--methods", help="what is compared, the first with full, else with the second; base too")
    ] = "lora,full",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="runs of each method")] = 2,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", min=0.0, help="how much worse the first may be before exit code 7"),
    ] = 0.02,
    answers: Annotated[int, typer.Option("--answers", min=0, help="held-out rows to answer; 0 for none")] = 50,
    elsewhere: Annotated[
        str | None, typer.Option("--elsewhere", help="text outside the task, for what is forgotten")
    ] = None,
    out: Annotated[str, typer.Option("--out", help="folder of the comparison")] = "comparison",
    config: Config = None,
    set_: Set = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Does LoRA cost quality here, and what does it save? Several methods on the same rows, and a verdict."""
    from loratune.report.comparison import PAGE, heads_of, rows_of
    from loratune.run.compare import compare as race

    chosen = read_settings(config, set_ or [], parse_given(settings))
    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    found = race(
        model,
        data,
        methods=names,
        seeds=seeds,
        tolerance=tolerance,
        answers=answers,
        elsewhere=elsewhere,
        out=out,
        say=lambda line: stderr().print(line, highlight=False, soft_wrap=True),
        **chosen,
    )
    heads = ["", *heads_of(found.found)]
    text = [table(heads, [[name, *cells] for name, cells in rows_of(found.found)]), found.found["verdict"]["text"]]
    emit(found.found, as_json=as_json, text=[*text, str(found.path / PAGE)])
    lost: LoratuneError | None = None
    if found.regressed:
        lost = RegressionError(
            found.found["verdict"]["text"], hint="more rank, more data or other targets may close it"
        )
    elif found.failed:
        lost = DivergedError(found.failed, hint="lower --lr, or leave it out so that it is searched")
    if lost is not None:  # what was printed as JSON says it already: one document
        raise typer.Exit(lost.exit_code) if as_json else lost


@app.command()
def merge(
    run: RunArgument,
    out: Annotated[str, typer.Option("--out", help="folder for the plain model")],
    base: BaseOption = None,
    any_tokenizer: AnyTokenizer = False,
    dtype: Annotated[Literal["auto", "bf16", "fp32"], typer.Option("--dtype", help="of the merged model")] = "auto",
    as_json: Json = False,
) -> None:
    """A plain model folder with the adapter folded in, verified against the adapter."""
    from loratune.run.merge import merge as fold_in
    from loratune.run.opened import open_run

    found = fold_in(open_run(run, base=base, dtype=dtype, any_tokenizer=any_tokenizer, decoded=True), out)
    emit(found, as_json=as_json, text=[f"✓ merged ≡ adapter ({found['verified']})", found["out"]])


@app.command()
def reproduce(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder", show_default=False)],
    out: Annotated[str | None, typer.Option("--out", help="keep the new run in this folder")] = None,
    base: BaseOption = None,
    data: Annotated[
        str | None, typer.Option("--data", help="where the rows are now, if not where the run found them")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="another one than the run's")] = None,
    any_versions: Annotated[
        bool, typer.Option("--any-versions", help="go on with other versions of packages than the run had")
    ] = False,
    as_json: Json = False,
) -> None:
    """Do a run again from its record: the same bits on the same machine, elsewhere losses within two percent."""
    from loratune.cli.progress import Screen
    from loratune.run import reproduce as do_again

    screen = Screen(stderr())
    try:
        found = do_again(run, model=base, data=data, out=out, device=device, any_versions=any_versions, listen=screen)
    finally:
        screen.close()
    text = [f"✓ {found.line}", *(f"another machine: {why}" for why in found.elsewhere)]
    emit(found.to_json(), as_json=as_json, text=[*text, *([found.path] if found.path else [])])


for command in (chat, generate, evaluate, show, diff, combine, export, serve):
    app.command("eval" if command is evaluate else None)(command)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder", show_default=False)], as_json: Json = False
) -> None:
    """Write the HTML report of a run folder again."""
    from loratune.report import write_report

    path = write_report(Path(run).expanduser())
    emit({"report": str(path)}, as_json=as_json, text=[str(path)])


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices, memory, and a tiny real training run with its checks."""
    from loratune.run.doctor import doctor as examine

    found = examine()
    rows = [
        ["device", found["device"]],
        ["threads", found["threads"]],
        ["dtype", f"{found['dtype']}: {found['dtype_reason']}"],
        ["fused blocks", f"by {found['kernels']}"],
    ]
    rows += [["memory", f"{gigabytes(found['available_bytes'])} free of {gigabytes(found['memory_bytes'])}"]]
    rows += [["matrix products", f"{found['gflops']:,} GFLOP/s"], ["tiny run", f"{found['tiny_run_seconds']} s"]]
    rows += [[name, version] for name, version in found["versions"].items()]
    marks = [f"{'✓' if c['passed'] else '✗'} {c['name']} ({c['detail']})" for c in found["checks"]]
    emit(found, as_json=as_json, text=[table(["", ""], rows), *marks])


# -- what several commands print ---------------------------------------------------------------------------------


def _size(module: Mapping[str, Any]) -> Any:
    """The rank; of (IA)³ what is rescaled."""
    return module["r"] if "r" in module else module["rescaled"]


def _show_plan(model: str, data: str | None, settings: dict[str, Any], *, as_json: bool) -> None:
    from loratune.run.look import look_at_plan

    found = look_at_plan(model, data, **settings)
    modules = [
        [m["name"], m["count"], f"{m['out']} × {m['in']}", _size(m), f"{m['each']:,}", f"{m['parameters']:,}"]
        for m in found["adapter"]["modules"]
    ]
    modules += [
        [m["name"], m["count"], "its own", "", "", f"{m['parameters']:,}"] for m in found["adapter"]["replaced"]
    ]
    memory, parts = found["memory"], ("base", "constants", "masters", "gradients", "optimizer", "activations")
    planned = {"this run": memory, **found["methods"]}
    sizes = [
        [name, *(gigabytes(one[name]) for one in planned.values())] for name in (*parts, "logits", "layer", "total")
    ]
    text = [
        *([found["data"]] if "data" in found else []),
        found["line"] + (f" · lr {found['lr']:g} · {found['steps']} steps" if "steps" in found else ""),
        table(["module", "count", "weight", "r", "each", "trainable"], modules),
        _layer_line(found),
        "",
        table([f"memory, {memory['micro_batch_tokens']:,} tokens at once", *planned], sizes),
        "logits and a layer's gradients are never there together: the total has the larger",
        *(f"--shard on, {count} processes: {gigabytes(size)} each" for count, size in found["sharded"].items()),
        "",
        *found["decisions"],
        *found["notes"],
    ]
    emit(found, as_json=as_json, text=text)


def _layer_line(found: dict[str, Any]) -> str:
    """Parameters a layer, and how many times fewer train than the base has."""
    counts = found["layers"].values()
    each = f"{min(counts):,}" if len(set(counts)) == 1 else f"{min(counts, default=0):,} to {max(counts, default=0):,}"
    layers = f"{len(counts)} layers × {each} trainable, " if counts else ""
    return f"{layers}{found['fewer']:,.0f}× fewer than the base's {found['base_parameters']:,}"


def _data_text(found: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    fit = found["fit"]
    text: list[Any] = [found["line"]]
    lengths = f"lengths: median {fit['median']}, longest {fit['longest']}"
    text.append(f"{found['train']:,} to train on, {found['val']:,} held out; {lengths}")
    if found["task"]["type"] != CAUSAL_LM:
        text.append(f"task: {found['task']['type']} ({found['task']['reason']})")
    listed = ("columns", "ignored_columns", "truncated", "dropped")
    text += [f"{key.replace('_', ' ')}: {', '.join(found[key])}" for key in listed if found[key]]
    if "labels" in found["taught"]:
        text.append("labels: " + ", ".join(f"{name} {count:,}" for name, count in found["taught"]["labels"].items()))
    for mask in found["masks"]:
        text.append(f"\n{mask['place']}")
        row = Text()
        for piece, supervised in mask["pieces"]:
            row.append(piece, style="black on green" if supervised else "dim")
        text.append(row)
        text += [Text(f"→ {mask['said']}")] if mask["said"] else []
    return text
