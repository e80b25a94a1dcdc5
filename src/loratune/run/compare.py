"""`compare`: one task, several methods, several seeds; what each costs and what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratune.config import TrainConfig
from loratune.config.train import METHODS
from loratune.data.example import Corpus, Example, hash_of
from loratune.data.read import read
from loratune.data.split import split
from loratune.errors import ConfigError, DivergedError, nearest
from loratune.estimation import Shape
from loratune.evaluation import other_text
from loratune.files import write_json
from loratune.model import empty_model, pick_device
from loratune.report import write_comparison
from loratune.run.apart import apart
from loratune.run.contender import BASE, Task, contend
from loratune.run.decide import Decisions, decide_steps, decide_val, learning_rate
from loratune.run.record import hardware, now, versions
from loratune.run.task import refuse_other_tasks
from loratune.run.verdict import note_goal, verdict

COMPARISON = "comparison.json"
# Learning rates tried for each method: its usual one and half a decade to both sides, further out where the best is at
# the end; then one between the best and the better of its neighbours.
_STEP, _FURTHER = math.sqrt(10), 2
# A search run has a third of the steps, and its rows to validate on are training rows of the comparison.
_SEARCH_STEPS, _SEARCH_ROWS = 3, 100
_CURVE_POINTS = 8

Say = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: its folder, and the content of `comparison.json`."""

    path: Path
    found: dict[str, Any]

    @property
    def regressed(self) -> bool:
        """Whether the first method is worse than the one it is compared with, by more than the tolerance."""
        return bool(self.found["verdict"]["regressed"])

    @property
    def failed(self) -> tuple[str, ...]:
        """The runs that gave no finite loss, each with why; the verdict is no answer where it needs one of them."""
        return tuple(self.found["verdict"]["failed"])


@dataclass(frozen=True)
class _Plan:
    """What all runs of a comparison have in common."""

    model: str
    folder: Path
    train: Corpus
    held_out: Corpus
    settings: dict[str, Any]
    steps: int
    answers: int
    elsewhere: tuple[str, ...]

    def task(self, method: str, where: str, **changes: Any) -> Task:
        """A run that is measured: in the folder `where`, with some settings of its own."""
        told = self.trial(method, where, self.train, self.held_out, **changes)
        return replace(told, answers=self.answers, elsewhere=self.elsewhere)

    def trial(self, method: str, where: str, train: Corpus, held_out: Corpus, **changes: Any) -> Task:
        """A run of which only the held-out loss counts, on other rows."""
        return Task(self.model, method, train, held_out, str(self.folder / where), {**self.settings, **changes})


def compare(
    model: str,
    data: Any,
    *,
    methods: Sequence[str] = ("lora", "full"),
    seeds: int = 2,
    tolerance: float = 0.02,
    answers: int = 50,
    elsewhere: str | Path | None = None,
    out: str = "comparison",
    say: Say = lambda _: None,
    **settings: Any,
) -> Comparison:
    """Train each method with each seed on the same rows in the same order for the same steps, and measure alike.

    Each run has a process of its own. A method's learning rate is the best of a short search on rows that are not the
    held-out ones, unless `lr` is given. A comparison that was interrupted goes on with the runs that are there.

    Args:
        model: a hub id, folder or GGUF file.
        methods: as `--method` has them; "base" measures the base. The first that trains is compared with "full", or
            with the second where that is not among them.
        tolerance: by how much, relative, the first's held-out loss may be worse.
        answers: how many held-out rows are answered, for exact matches; 0 for none.
        elsewhere: a file of text outside the task, for what is forgotten; documentation of Python where none is given.
        say: told what is being done, a line at a time.
        settings: of `train`; `val` says what is held out.

    Raises:
        ConfigError, DataError: what cannot be compared, before anything starts.
    """
    config = _checked(model, methods, seeds, tolerance, settings)
    refuse_other_tasks(model, config, "compare")
    trained = [method for method in dict.fromkeys(methods) if method != BASE]
    plan = _planned(model, data, config, settings, Path(out), answers, elsewhere)
    say(f"{len(plan.train)} rows to train on, {len(plan.held_out)} held out, {plan.steps} steps")
    searched = {method: _searched(plan, method, config, say) for method in trained}
    measured: dict[str, list[dict[str, Any]]] = {method: [] for method in trained}
    for seed in range(seeds):
        for method in trained:
            lr = searched[method]["lr"]
            found = _run(plan.task(method, f"{method}-{seed}", seed=config.seed + seed, lr=lr))
            measured[method].append({"seed": config.seed + seed, **found})
            say(f"{method}, seed {config.seed + seed}: {_outcome(found)}")
    base = _run(plan.task(BASE, BASE)) if BASE in methods or plan.answers or plan.elsewhere else {}
    found = _found(plan, searched, measured, base, tolerance)
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / COMPARISON, found)
    write_comparison(plan.folder)
    say(found["verdict"]["text"])
    return Comparison(plan.folder, found)


# -- before ----------------------------------------------------------------------------------------------------------


def _checked(model: Any, methods: Sequence[str], seeds: int, tolerance: float, settings: dict[str, Any]) -> TrainConfig:
    """The settings of every run, once all of them are known to be possible."""
    problems = []
    if not isinstance(model, str):
        problems.append("model: each method starts from it anew, in a process of its own: name it")
    known = [BASE, *METHODS]
    problems += [f"methods: no method {m!r}{nearest(m, known)}" for m in methods if m not in known]
    trained = [method for method in dict.fromkeys(methods) if method in METHODS]
    if len(trained) < 2 and not problems:
        problems.append(f"methods: {', '.join(methods)} leaves nothing to compare; there are {', '.join(known)}")
    if seeds < 1:
        problems.append(f"seeds={seeds}: at least one")
    if not 0 <= tolerance < 1:
        problems.append(f"tolerance={tolerance}: a share, such as 0.02")
    problems += [f"{name}: compare decides it for each run" for name in ("method", "resume") if name in settings]
    if settings.get("early_stop"):
        problems.append(
            f"early_stop={settings['early_stop']}: runs would end after unequal numbers of steps; leave it out "
            "(--set early_stop=0 where a config file has it)"
        )
    for method in trained:
        try:
            TrainConfig(**{**settings, "method": method})
        except ConfigError as error:
            problems += [f"{method}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems, hint="loratune compare --help says what can be compared")
    return TrainConfig(**settings)


def _planned(
    model: str,
    data: Any,
    config: TrainConfig,
    settings: dict[str, Any],
    folder: Path,
    answers: int,
    elsewhere: str | Path | None,
) -> _Plan:
    decisions = Decisions(config)
    corpus = read(data, columns=config.columns)
    val = decide_val(decisions, len(corpus))
    parts = split(corpus, read(val, columns=config.columns) if isinstance(val, str) else val, config.seed)
    if len(parts.val) < 2:
        raise ConfigError("val: a comparison needs held-out rows", hint="give more rows, or say --val COUNT")
    train, held_out = (_corpus_of(corpus, examples) for examples in (parts.train, parts.val))
    steps = decide_steps(decisions, len(train))
    kept = {name: value for name, value in settings.items() if name not in ("val", "seed")}
    kept |= {"checks": settings.get("checks", "fast"), "max_steps": steps, "samples": settings.get("samples", 2)}
    kept.pop("epochs", None)
    kept.setdefault("eval_every", max(1, steps // _CURVE_POINTS))
    texts = other_text() if elsewhere is None else _texts_of(elsewhere)
    return _Plan(model, folder, train, held_out, kept, steps, min(answers, len(held_out)), texts)


def _texts_of(file: str | Path) -> tuple[str, ...]:
    examples = read(file).examples
    if any(example.kind != "text" for example in examples):
        raise ConfigError(
            f"elsewhere: {file} holds rows of another shape", hint="a .txt file, or a column `text` alone"
        )
    return tuple(example.text for example in examples)


def _corpus_of(corpus: Corpus, examples: Sequence[Example]) -> Corpus:
    return replace(corpus, examples=tuple(examples), sha256=hash_of(examples))


# -- the rate --------------------------------------------------------------------------------------------------------


def _searched(plan: _Plan, method: str, config: TrainConfig, say: Say) -> dict[str, Any]:
    """The best of a few learning rates after a third of the steps, and what finding it cost."""
    if config.lr is not None:
        return {"lr": config.lr, "tried": [], "seconds": 0.0}
    usual, _ = learning_rate(Shape.of(empty_model(plan.model)).hidden, method)
    parts = split(plan.train, min(_SEARCH_ROWS, max(2, len(plan.train) // 10)), config.seed + 1)
    rows = _corpus_of(plan.train, parts.train), _corpus_of(plan.train, parts.val)
    steps = max(4, plan.steps // _SEARCH_STEPS)
    quick: dict[str, Any] = {"max_steps": steps, "eval_every": steps, "samples": 0, "checks": "off"}
    tried: dict[float, dict[str, Any]] = {}

    def try_out(power: float) -> float:
        if power not in tried:
            lr = float(f"{usual * _STEP**power:.2g}")
            task = plan.trial(method, f"search/{method}-{lr:g}", *rows, lr=lr, seed=config.seed, **quick)
            tried[power] = {"lr": lr, **_or_lost(task)}
            say(f"{method}: lr {lr:g} gives {tried[power]['val_loss']:.4f} after {steps} steps")
        return float(tried[power]["val_loss"])

    best = _best(try_out)
    # JSON has no infinity; a loss of None says that it diverged.
    shown = [
        {"lr": one["lr"], "seconds": one["seconds"], "val_loss": _finite(one["val_loss"])}
        for _, one in sorted(tried.items())
    ]
    return {"lr": tried[best]["lr"], "tried": shown, "seconds": sum(one["seconds"] for one in shown), "steps": steps}


def _best(loss_at: Callable[[float], float]) -> float:
    """The power of `_STEP` with the least loss of those that are looked at."""
    best: float = min((-1, 0, 1), key=loss_at)
    for _ in range(_FURTHER):
        outwards = best + (1 if best > 0 else -1)
        if best == 0 or loss_at(outwards) >= loss_at(best):
            break
        best = outwards
    towards_better = 0.5 if loss_at(best + 1) < loss_at(best - 1) else -0.5
    return min((best, best + towards_better), key=loss_at)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_lost(task: Task) -> dict[str, Any]:
    """A rate at which training diverges is the worst, and no failure of the search."""
    try:
        found = dict(apart(contend, task))
    except DivergedError:
        return {"val_loss": math.inf, "seconds": 0.0}
    return found if math.isfinite(found["val_loss"]) else {**found, "val_loss": math.inf}


# -- a run -----------------------------------------------------------------------------------------------------------


def _run(task: Task) -> dict[str, Any]:
    """What was found of a run; one whose loss is not finite has none, and says why."""
    try:
        found = dict(apart(contend, task))
    except DivergedError as error:
        return {"val_loss": None, "failed": "; ".join(error.problems)}
    figures = {"val_loss": "held-out loss", "elsewhere_loss": "loss on other text"}
    lost = {name: found[name] for name in figures if name in found and not math.isfinite(found[name])}
    if lost:
        found |= {**dict.fromkeys(lost), "failed": "; ".join(f"{figures[name]} {lost[name]:g}" for name in lost)}
    return found


def _outcome(found: dict[str, Any]) -> str:
    return found.get("failed") or f"held-out loss {found['val_loss']:.4f} in {found['seconds']:.0f} s"


# -- after -----------------------------------------------------------------------------------------------------------


def _found(
    plan: _Plan,
    searched: dict[str, dict[str, Any]],
    measured: dict[str, list[dict[str, Any]]],
    base: dict[str, Any],
    tolerance: float,
) -> dict[str, Any]:
    """All that is known, as `comparison.json` has it."""
    goal = note_goal([run for runs in measured.values() for run in runs])
    first, *others = measured
    other = "full" if "full" in others else others[0]
    return {
        "format": 1,
        "created": now(),
        "model": plan.model,
        "data": plan.train.source,
        "rows": {"train": len(plan.train), "held_out": len(plan.held_out), "answered": plan.answers},
        "steps": plan.steps,
        "settings": {name: str(value) for name, value in sorted(plan.settings.items())},
        "goal": goal,
        "base": base,
        "methods": {
            method: {"search": searched[method], "runs": runs, "summary": _summary(runs)}
            for method, runs in measured.items()
        },
        "verdict": verdict(first, other, {**measured, BASE: [base]}, tolerance),
        "versions": versions(),
        "hardware": hardware(pick_device(plan.settings.get("device"))),
    }


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and most of each figure over the seeds."""
    losses = ("base_val_loss", "val_loss", "exact_match", "elsewhere_loss")
    names = (*losses, "seconds", "peak_memory_bytes", "adapter_bytes", "trainable")
    found = {}
    for name in names:
        values = [run[name] for run in runs if run.get(name) is not None]
        if values:
            found[name] = {"mean": sum(values) / len(values), "least": min(values), "most": max(values)}
    return found
