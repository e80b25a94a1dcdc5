"""`combine`: one adapter folder from several, without their base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratune.adapter import Combined, SavedAdapter, adapter_folder, card_of, read_adapter, write_adapter
from loratune.adapter import combine as combine_adapters
from loratune.errors import AdapterFileError, ConfigError
from loratune.run.folder import refuse_taken

Source = str | Path | SavedAdapter


def combine(
    adapters: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    method: str = "concat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
) -> Combined:
    """One adapter from several: the exact sum of their weighted updates, its best of a rank, TIES or DARE.

    `loratune.adapter.combine` says what each method does.

    Args:
        adapters: folders of runs or adapters, hub ids, or adapters as values.
        weights: one for each, of any sign; 1 for each where not given.
        rank: for all methods but concat; the largest of the adapters' ranks where not given.
        density: share of entries that ties and dare keep, in (0, 1].
        seed: of what dare draws, and of where the approximation of large matrices starts.
        out: a new folder for the result; nothing is written without it.

    Raises:
        ConfigError: arguments that cannot be. AdapterFileError: adapters that are damaged or do not fit together.
        RunFolderError: `out` holds something already. Each lists every problem; nothing is written then.
    """
    given: object = adapters
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"adapters: a {type(given).__name__} is no list", hint="combine([first, second])")
    target = None if out is None else Path(out).expanduser()
    if target is not None:
        refuse_taken(target)
    names = [f"adapter {i}" if isinstance(each, SavedAdapter) else str(each) for i, each in enumerate(adapters, 1)]
    chosen = [1.0] * len(adapters) if weights is None else weights
    values = read_adapters(*adapters)
    made = combine_adapters(values, chosen, method=method, rank=rank, density=density, seed=seed, names=names)
    if target is not None:
        write_adapter(target, made.adapter, card=card_of(made.adapter, about=_about(made, names)))
    return made


def read_adapters(*sources: Source) -> list[SavedAdapter]:
    """The adapters of several folders; values are taken as they are.

    Raises:
        AdapterFileError: with the problems of all folders.
    """
    found: list[SavedAdapter] = []
    problems: list[str] = []
    hints: list[str] = []
    for source in sources:
        try:
            found.append(source if isinstance(source, SavedAdapter) else read_adapter(adapter_folder(source)))
        except AdapterFileError as error:
            problems += error.problems
            hints += [error.hint] if error.hint else []
    if problems:
        raise AdapterFileError(problems, hint="; ".join(dict.fromkeys(hints)))
    return found


def _about(made: Combined, names: Sequence[str]) -> str:
    # The last name only: where the folders lie says nothing to who reads the card.
    parts = [f"{weight:g} × `{Path(name).name}`" for weight, name in zip(made.weights, names, strict=True)]
    lost = f", which misses {made.error:.2%} of what was asked for" if made.error else ""
    return f"Combined by {made.method} from {', '.join(parts)}{lost}."
