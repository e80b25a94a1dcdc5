"""A run folder as a value: `record.json`, `metrics.jsonl` and `samples.jsonl`, of which any part may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from loratune.errors import RunFolderError
from loratune.report.decode import decode
from loratune.report.lines import Lines, parse, read_lines

FORMAT = 1
RECORD, METRICS, SAMPLES = "record.json", "metrics.jsonl", "samples.jsonl"

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    value: Any = None
    reason: str = ""

    @property
    def is_given(self) -> bool:
        return self.reason == "given"


@dataclass(frozen=True)
class Base:
    name: str | None = None
    source: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    parameters: int | None = None
    dtype: str | None = None
    family: str | None = None


@dataclass(frozen=True)
class Tokenizer:
    sha256: str | None = None
    chat_template_sha256: str | None = None


@dataclass(frozen=True)
class Fit:
    """How the tokenizer fits the data."""

    rows: int | None = None
    tokens: int | None = None
    supervised_tokens: int | None = None
    longest: int | None = None
    median: float | None = None
    characters_per_token: float | None = None
    unknown_tokens: int | None = None


@dataclass(frozen=True)
class Data:
    source: str | None = None
    sha256: str | None = None
    shape: str | None = None
    rows: int | None = None
    train: int | None = None
    val: int | None = None
    duplicates: tuple[tuple[Any, ...], ...] | None = None
    truncated: tuple[Any, ...] | None = None
    dropped: tuple[Any, ...] | None = None
    fit: Fit = field(default_factory=Fit)


@dataclass(frozen=True)
class Module:
    """Target modules of one kind and shape, `each` parameters in one and `parameters` in all of them."""

    name: str = ""
    count: int | None = None
    in_features: int | None = field(default=None, metadata={"key": "in"})
    out_features: int | None = field(default=None, metadata={"key": "out"})
    r: int | None = None
    each: int | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class EffectiveRank:
    path: str = ""
    effective: float | None = None
    r: int | None = None


@dataclass(frozen=True)
class Cut:
    """The held-out loss of the trained update cut to rank r."""

    r: int | None = None
    val_loss: float | None = None


@dataclass(frozen=True)
class SmallerRanks:
    enough: int | None = None
    val_loss: float | None = None
    tried: tuple[Cut, ...] = ()


@dataclass(frozen=True)
class Adapter:
    trainable: int | None = None
    total: int | None = None
    share: float | None = None
    modules: tuple[Module, ...] = ()
    effective_rank: tuple[EffectiveRank, ...] = ()
    smaller_ranks: SmallerRanks = field(default_factory=SmallerRanks)


@dataclass(frozen=True)
class Estimate:
    memory_bytes: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    steps: int | None = None
    epochs: float | None = None
    micro_batch_tokens: int | None = None
    packed: bool | None = None
    pack_reason: str | None = None
    recompute: bool | None = None
    estimate: Estimate = field(default_factory=Estimate)


@dataclass(frozen=True)
class Measured:
    peak_memory_bytes: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Check:
    name: str = ""
    when: str | None = None
    passed: bool | None = None
    detail: str = ""


@dataclass(frozen=True)
class Result:
    base_val_loss: float | None = None
    val_loss: float | None = None
    best_step: int | None = None
    steps: int | None = None
    train_loss: float | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What the model was trained to do: of a causal LM, to go on."""

    type: str = "CAUSAL_LM"
    labels: tuple[str, ...] = ()
    unit: str = "tokens"

    @property
    def writes(self) -> bool:
        return self.type == "CAUSAL_LM"


@dataclass(frozen=True)
class Event:
    step: int | None = None
    kind: str = ""
    text: str = ""


@dataclass(frozen=True)
class Hardware:
    processor: str | None = None
    cores: int | None = None
    memory_bytes: float | None = None
    device: str | None = None


@dataclass(frozen=True)
class Record:
    loratune: str | None = None
    name: str | None = None
    state: str | None = None
    created: str | None = None
    identity: str | None = None
    settings: dict[str, Setting] = field(default_factory=dict)
    base: Base = field(default_factory=Base)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    data: Data = field(default_factory=Data)
    task: Task = field(default_factory=Task)
    adapter: Adapter = field(default_factory=Adapter)
    plan: Plan = field(default_factory=Plan)
    measured: Measured = field(default_factory=Measured)
    checks: tuple[Check, ...] = ()
    result: Result = field(default_factory=Result)
    events: tuple[Event, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    hardware: Hardware = field(default_factory=Hardware)


@dataclass(frozen=True)
class Metric:
    """One line of `metrics.jsonl`: an optimizer step if it has a `loss`, a validation if it has a `val_loss`."""

    step: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens: float | None = None
    computed_tokens: float | None = None
    supervised_tokens: float | None = None
    examples: float | None = None
    step_seconds: float | None = None
    peak_memory_bytes: float | None = None


@dataclass(frozen=True)
class Sample:
    place: Any = None
    prompt: Any = None
    reference: Any = None
    base: Any = None
    tuned: Any = None


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        metrics: the lines of `metrics.jsonl`, None where there is no such file.
        samples: likewise.
        damage: a sentence for each half-written last line that was left out.
    """

    record: Record
    metrics: tuple[Metric, ...] | None
    samples: tuple[Sample, ...] | None
    damage: tuple[str, ...]


def read_run(folder: Path, record: Mapping[str, Any] | None = None) -> Run:
    """What the folder holds, with `record` in place of its own where one is given.

    Raises:
        RunFolderError: with every problem found, if the folder holds no run or something unreadable.
    """
    problems: list[str] = []
    damage: list[str] = []
    decoded = _read_record(folder, problems) if record is None else decode(Record, dict(record), RECORD, problems)
    metrics = _values(folder / METRICS, Metric, problems, damage)
    samples = _values(folder / SAMPLES, Sample, problems, damage)
    if problems:
        raise RunFolderError(problems, hint=f"restore the files of {folder} from a copy, or train again")
    return Run(decoded, metrics, samples, tuple(damage))


def _read_record(folder: Path, problems: list[str]) -> Record:
    path = folder / RECORD
    if not path.is_file():
        what = f"{folder} has no {RECORD}" if folder.is_dir() else f"{folder} is not a folder"
        raise RunFolderError(what, hint="name a folder that `loratune train` wrote")
    content = parse(path.read_bytes(), RECORD, problems)
    if not isinstance(content, Mapping):
        if not problems:
            problems.append(f"{RECORD} holds a {type(content).__name__}, not an object")
        return Record()
    if content.get("format") != FORMAT:
        problem = f"{path} has format {content.get('format')!r}; this loratune reads format {FORMAT}"
        raise RunFolderError(problem, hint="use the loratune that wrote the run, or a newer one")
    return decode(Record, content, RECORD, problems)


def _values(path: Path, kind: type[T], problems: list[str], damage: list[str]) -> tuple[T, ...] | None:
    """What the lines say; None where there is no file."""
    if not path.is_file():
        return None
    found = read_lines(path, kind, problems)
    if found.is_cut:
        damage.append(f"The last line of {path.name} is half-written and was left out.")
    return tuple(line.value for line in found.lines)


def read_metrics(folder: Path) -> Lines[Metric]:
    """The lines of `metrics.jsonl`; none where there is no such file.

    Raises:
        RunFolderError: with each line that is no JSON or has a value of another type.
    """
    path = folder / METRICS
    if not path.is_file():
        return Lines((), is_cut=False)
    problems: list[str] = []
    found = read_lines(path, Metric, problems)
    if problems:
        raise damaged_metrics(path, problems)
    return found


def damaged_metrics(path: Path, problems: Sequence[str]) -> RunFolderError:
    hint = "restore it from a copy, or train again with another --out"
    return RunFolderError([f"{path} is damaged", *problems], hint=hint)
