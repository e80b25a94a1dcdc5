"""The commands about adapters as values: no model is loaded, but for a whole one to export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loratune.cli.output import emit, table
from loratune.errors import ConfigError

if TYPE_CHECKING:
    from loratune.adapter import Difference
    from loratune.adapter.difference import Distance

Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
AnyTokenizer = Annotated[
    bool, typer.Option("--any-tokenizer", help="accept another tokenizer or chat template than it was trained with")
]


def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run or adapter folder", show_default=False)],
    as_json: Json = False,
) -> None:
    """What an adapter is and what it changed, layer by layer."""
    from loratune.run.show import show as look

    found = look(run)
    columns = ["layer", "r", "scale", "effective", "stable", "dead", "‖ΔW‖", "largest σ", "parameters"]
    rows = [
        [
            x["path"],
            x["r"],
            f"{x['scale']:.3g}",
            *(_figure(x[name], ".1f") for name in ("effective_rank", "stable_rank")),
            _figure(x["dead"], "d"),
            *(_figure(x[name], ".3g") for name in ("norm", "largest")),
            f"{x['parameters']:,}",
        ]
        for x in found["layers"]
    ]
    text: list[Any] = [f"{key} = {value}" for key, value in found["config"].items()]
    text += [f"{found['parameters']:,} parameters · ‖ΔW‖ {_figure(found['norm'], '.3g')}", ""]
    vectors = [
        [x["path"], x["name"], f"{x['size']:,}", *(_figure(x[name], ".4g") for name in ("least", "mean", "largest"))]
        for x in found["vectors"]
    ]
    text += [table(["layer", "vector", "values", "least", "mean", "largest"], vectors)] if vectors else []
    text += [table(columns, rows)] if rows else []
    unused = [
        f"{x['path']} ({', '.join(map(str, x['zero_components']))})" for x in found["layers"] if x["zero_components"]
    ]
    beside = [f"{x['path']} ({', '.join(x['beside'])})" for x in found["layers"] if x["beside"]]
    text += _listed("components with a zero row of A or column of B", unused)
    text += _listed("beside A and B", beside)
    text += _listed("replaced tensors of the base", found["replaced"])
    text += _listed("✗ NaN or infinity in", found["non_finite"])
    text += found["caveats"]
    emit(found, as_json=as_json, text=text)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="run or adapter folder", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="another one", show_default=False)],
    as_json: Json = False,
) -> None:
    """How far two adapters are apart, layer by layer: sizes, distance, cosine, overlap of their subspaces."""
    from dataclasses import asdict

    from loratune.run.diff import diff as compare

    found = compare(a, b)
    emit({"a": a, "b": b, **asdict(found)}, as_json=as_json, text=_difference(found))


def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="RUN", help="run or adapter folders", show_default=False)],
    out: Annotated[str, typer.Option("--out", help="new folder for the adapter")],
    weights: Annotated[
        str | None, typer.Option("--weights", help="one for each: 0.7,0.3 or =-1,0.5 (default 1 for each)")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="concat: the exact sum; svd: its best approximation of a rank; ties; dare", metavar="NAME"
        ),
    ] = "concat",
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="largest rank of the result, not for concat (default the inputs' largest)"),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="share of entries that ties and dare keep, in (0, 1]")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of what is drawn")] = 0,
    as_json: Json = False,
) -> None:
    """One adapter from several: the weighted sum of their updates, exact or of a given rank."""
    from loratune.run.combine import combine as add_up

    given = None if weights is None else _numbers(weights)
    made = add_up(adapters, given, method=method, rank=rank, density=density, seed=seed, out=out)
    modules = [
        {"path": path, "r": factors.A.shape[0], "error": made.errors[path]}
        for path, factors in made.adapter.factors.items()
    ]
    found: dict[str, Any] = {
        "out": out,
        "method": made.method,
        "adapters": [{"path": path, "weight": weight} for path, weight in zip(adapters, made.weights, strict=True)],
        "parameters": sum(tensor.numel() for _, tensor in made.adapter.named_tensors()),
        "error": made.error,
        "modules": modules,
    }
    rows = [[module["path"], module["r"], f"{module['error']:.2%}"] for module in modules]
    text = [
        " + ".join(f"{each['weight']:g} × {each['path']}" for each in found["adapters"]),
        "",
        table(["layer", "r", "error"], rows),
        "",
        f"{method} · {found['parameters']:,} parameters · error {made.error:.2%}",
        out,
    ]
    emit(found, as_json=as_json, text=text)


def _numbers(words: str) -> list[float]:
    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {words}: not a list of numbers", hint="--weights 0.7,0.3") from None


def _difference(found: Difference) -> list[Any]:
    columns = ["layer", "‖a‖", "‖b‖", "‖a − b‖", "relative", "b : a", "cosine", "input overlap", "output overlap"]
    rows = [
        [*_distance(module.path, module), *(_figure(x, ".3f") for x in (module.input_overlap, module.output_overlap))]
        for module in found.modules
    ]
    rows.append([*_distance("all", found.total), "", ""])
    text: list[Any] = [table(columns, rows)]
    text += _listed("only in a", found.only_a)
    text += _listed("only in b", found.only_b)
    text += _listed("settings", [f"{name}: {x!r} / {y!r}" for name, (x, y) in found.settings.items()])
    text += _listed("tensors beside A and B that differ", found.tensors)
    return text


def _distance(name: str, found: Distance) -> list[str]:
    sizes = (_figure(value, ".3g") for value in (found.norm_a, found.norm_b, found.distance))
    return [name, *sizes, f"{found.relative:.1%}", _figure(found.ratio, ".3g"), _figure(found.cosine, ".4f")]


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run or adapter folder, or a hub id", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="who reads it: peft, vllm or gguf (llama.cpp)", show_default=False)],
    out: Annotated[str, typer.Option("--out", help="folder for what is written", show_default=False)],
    base: Annotated[str | None, typer.Option("--base", help="where the base is, if not where the run says")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="gguf: the whole model, with the adapter folded in")] = False,
    dtype: Annotated[
        Literal["auto", "fp32", "fp16", "bf16"], typer.Option("--dtype", help="of the merged model's matrices")
    ] = "auto",
    any_tokenizer: AnyTokenizer = False,
    as_json: Json = False,
) -> None:
    """An adapter, or the model merged with it, as other programs read it; read back and compared."""
    from loratune.run.export import export as write

    found = write(run, out, to=to, base=base, merged=merged, dtype=dtype, any_tokenizer=any_tokenizer)
    emit(found, as_json=as_json, text=[found["out"], *found["notes"], f"✓ {found['verified']}"])
