"""What each section of the page shows, from the values of a run: rows of label and text, ready to be laid out."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.config import TrainConfig, group_of
from loratune.report import words
from loratune.report.curves import Outcome
from loratune.report.folder import Check, Data, Record, Run, Sample, Setting, Task

_OTHER_GROUP = "Other"


@dataclass(frozen=True)
class Fact:
    label: str
    value: str
    note: str = ""


def _facts(*rows: tuple[str, str | None]) -> list[Fact]:
    return [Fact(label, value) for label, value in rows if value is not None]


def tiles(run: Run, outcome: Outcome) -> list[Fact]:
    """The figures that people look for first."""
    record = run.record
    found = []
    if outcome.tuned is not None:
        before, after = words.losses(outcome.base, outcome.tuned) if outcome.base is not None else ("", "")
        best = record.result.best_step
        note = f"best at step {words.count(best)}" if best is not None else ""
        found.append(Fact("Held-out loss", f"{before} → {after}" if before else words.loss(outcome.tuned), note))
        found += _metrics(record) if record.result.metrics else [_perplexity(outcome.base, outcome.tuned)]
    if record.adapter.trainable is not None:
        share = record.adapter.share
        of = f" of {words.short(record.adapter.total)}" if record.adapter.total else ""
        note = f"{words.percent(share)}{of}" if share is not None else of.strip()
        found.append(Fact("Trainable", words.short(record.adapter.trainable), note))
    measured = record.measured
    if measured.seconds is not None:
        speed = measured.tokens_per_second
        found.append(
            Fact(
                "Time", words.duration(measured.seconds), f"{words.short(speed)} tokens/s" if speed is not None else ""
            )
        )
    if measured.peak_memory_bytes is not None:
        memory = record.hardware.memory_bytes
        note = f"of {words.size(memory)}" if memory else ""
        found.append(Fact("Peak memory", words.size(measured.peak_memory_bytes), note))
    done = [check for check in record.checks if check.passed is not None]
    if done:
        found.append(Fact("Checks", f"{sum(bool(check.passed) for check in done)} of {len(done)}", "passed"))
    return found


def _perplexity(base: float | None, tuned: float) -> Fact:
    before = f"{words.perplexity(base)} → " if base is not None else ""
    return Fact("Perplexity", before + words.perplexity(tuned), "held-out rows")


def _metrics(record: Record) -> list[Fact]:
    """What a task other than writing is measured by."""
    found = record.result.metrics
    base, tuned = (found.get(name, {}) for name in ("base", "tuned"))
    names = [name for name in tuned if name in base]
    return [Fact(name.replace("_", " "), f"{base[name]:.3f} → {tuned[name]:.3f}", "held-out rows") for name in names]


def check_groups(checks: Sequence[Check]) -> list[tuple[str, list[Check]]]:
    titles = {"before": "Before training", "after": "After training"}
    groups: dict[str, list[Check]] = {}
    for check in sorted(checks, key=lambda check: list(titles).index(check.when) if check.when in titles else 2):
        groups.setdefault(titles.get(check.when or "", "At other times"), []).append(check)
    return list(groups.items())


@dataclass(frozen=True)
class Answers:
    """One sample: the same prompt, answered by the base and by the tuned model."""

    place: str
    prompt: str
    reference: str | None
    base: str | None
    tuned: str | None

    @property
    def columns(self) -> list[tuple[str, str | None, bool]]:
        """(heading, text, whether it equals the reference)."""
        rows = (("Reference", self.reference), ("Base", self.base), ("Tuned", self.tuned))
        return [(name, text, name != "Reference" and self.is_reference(text)) for name, text in rows]

    def is_reference(self, text: str | None) -> bool:
        return text is not None and self.reference is not None and text.strip() == self.reference.strip()


def answers(samples: Iterable[Sample]) -> list[Answers]:
    def text(value: Any) -> str | None:
        return None if value is None else words.text_of(value)

    return [
        Answers(
            words.place(sample.place) if sample.place is not None else "",
            text(sample.prompt) or "",
            text(sample.reference),
            text(sample.base),
            text(sample.tuned),
        )
        for sample in samples
    ]


def matches(samples: Sequence[Answers]) -> str:
    """How many answers are the reference's, in words; empty where there are no references."""
    known = [sample for sample in samples if sample.reference is not None]
    if not known:
        return ""
    base, tuned = (sum(sample.is_reference(getattr(sample, name)) for sample in known) for name in ("base", "tuned"))
    return f"Of {words.counted(len(known), 'reference')}, the tuned model gave {tuned} word for word, its base {base}."


@dataclass(frozen=True)
class Comparison:
    """An estimate against what was measured, as text and as shares of the longer bar."""

    label: str
    estimate: str | None
    measured: str | None
    estimate_share: float
    measured_share: float
    difference: str


def comparisons(record: Record) -> list[Comparison]:
    estimate, measured = record.plan.estimate, record.measured
    rows = (
        ("Peak memory", estimate.memory_bytes, measured.peak_memory_bytes, words.size),
        ("Time", estimate.seconds, measured.seconds, words.duration),
    )
    found = []
    for label, expected, actual, text in rows:
        if expected is None and actual is None:
            continue
        longest = max(expected or 0, actual or 0) or 1
        difference = ""
        if expected and actual is not None:
            change = actual / expected - 1
            side = "above" if change > 0 else "below"
            difference = "as estimated" if abs(change) < 0.005 else f"{abs(change):.0%} {side} the estimate"
        shown = (text(expected) if expected is not None else None, text(actual) if actual is not None else None)
        found.append(Comparison(label, *shown, (expected or 0) / longest, (actual or 0) / longest, difference))
    return found


def plan_facts(record: Record) -> list[Fact]:
    plan, hardware = record.plan, record.hardware
    packed = None
    if plan.packed is not None:
        packed = ("yes" if plan.packed else "no") + (f": {plan.pack_reason}" if plan.pack_reason else "")
    return _facts(
        ("Steps", words.count(plan.steps) if plan.steps is not None else None),
        ("Epochs", f"{plan.epochs:g}" if plan.epochs is not None else None),
        (
            "Micro-batch",
            words.counted(plan.micro_batch_tokens, "token") if plan.micro_batch_tokens is not None else None,
        ),
        ("Packed", packed),
        ("Recompute", None if plan.recompute is None else "on" if plan.recompute else "off"),
        ("Device", hardware.device),
        ("Device memory", words.size(hardware.memory_bytes) if hardware.memory_bytes is not None else None),
    )


def data_facts(data: Data, task: Task) -> list[Fact]:
    fit = data.fit
    supervised = None
    if fit.supervised_tokens is not None:
        of_tokens = bool(fit.tokens) and task.unit == "tokens"
        share = f" ({words.percent(fit.supervised_tokens / (fit.tokens or 1))})" if of_tokens else ""
        supervised = words.count(fit.supervised_tokens) + share
    return _facts(
        ("Source", data.source),
        ("Shape", data.shape),
        ("Rows", words.count(data.rows) if data.rows is not None else None),
        ("Training rows", words.count(data.train) if data.train is not None else None),
        ("Held-out rows", words.count(data.val) if data.val is not None else None),
        ("Tokens", words.count(fit.tokens) if fit.tokens is not None else None),
        (f"Supervised {task.unit}", supervised),
        ("Longest row", words.counted(fit.longest, "token") if fit.longest is not None else None),
        ("Median row", f"{fit.median:,g} tokens" if fit.median is not None else None),
        ("Characters a token", f"{fit.characters_per_token:.2f}" if fit.characters_per_token is not None else None),
        ("Unknown tokens", words.count(fit.unknown_tokens) if fit.unknown_tokens is not None else None),
    )


def data_places(data: Data) -> list[tuple[str, str, list[str] | None]]:
    """(what, how it is to be read, places); None for places that were not recorded."""
    duplicates = None if data.duplicates is None else [" = ".join(map(words.place, pair)) for pair in data.duplicates]
    truncated = None if data.truncated is None else [words.place(item) for item in data.truncated]
    dropped = None if data.dropped is None else [words.place(item) for item in data.dropped]
    return [
        ("Truncated", "cut at the longest length allowed", truncated),
        ("Dropped", "left out because they were too long", dropped),
        ("Duplicates across the split", "held-out rows that training has seen", duplicates),
    ]


@dataclass(frozen=True)
class SettingRow:
    name: str
    value: str
    reason: str
    is_given: bool
    help: str


def setting_groups(settings: Mapping[str, Setting]) -> list[tuple[str, list[SettingRow]]]:
    """In the order of the reference page; names that this loratune does not know come last."""
    fields = TrainConfig.model_fields
    groups: dict[str, list[SettingRow]] = {}
    for name in [*(name for name in fields if name in settings), *sorted(settings.keys() - fields.keys())]:
        setting = settings[name]
        known = fields.get(name)
        group = group_of(known) if known else _OTHER_GROUP
        text = words.value_text(setting.value)
        about = (known.description or "") if known else ""
        groups.setdefault(group, []).append(SettingRow(name, text, setting.reason, setting.is_given, about))
    return list(groups.items())


def origin_facts(record: Record) -> list[Fact]:
    """What the run was made from: the same of each gives the same run."""
    seed = record.settings.get("seed")
    base, tokenizer = record.base, record.tokenizer
    return _facts(
        ("Seed", words.value_text(seed.value) if seed else None),
        ("Base", base.name),
        ("Base source", base.source),
        ("Base revision", base.revision),
        ("Base weights", base.fingerprint),
        ("Base parameters", words.count(base.parameters) if base.parameters is not None else None),
        ("Base dtype", base.dtype),
        ("Base family", base.family),
        ("Tokenizer", tokenizer.sha256),
        ("Chat template", tokenizer.chat_template_sha256),
        ("Data", record.data.sha256),
        ("Run identity", record.identity),
    )


def machine_facts(record: Record) -> list[Fact]:
    hardware = record.hardware
    return _facts(
        ("Device", hardware.device),
        ("Processor", hardware.processor),
        ("Cores", words.count(hardware.cores) if hardware.cores is not None else None),
        ("Memory", words.size(hardware.memory_bytes) if hardware.memory_bytes is not None else None),
        ("loratune", record.loratune),
        *((name, version) for name, version in sorted(record.versions.items()) if name != "loratune"),
    )


def run_path(record: Record, name: str) -> str:
    """The folder as commands name it: the one asked for, or the default place."""
    out = record.settings.get("out")
    return out.value if out and isinstance(out.value, str) and out.value else f"runs/{name}"


def commands(path: str, task: Task) -> list[tuple[str, str]]:
    """(what it does, command) of each way to use the adapter."""
    run = shlex.quote(path)
    written = [
        ("Talk to it, beside its base", f"loratune chat {run} --vs base"),
        ("Answer a file of prompts", f"loratune generate {run} --prompts prompts.jsonl"),
    ]
    return [
        *(written if task.writes else []),
        ("Measure it on other data", f"loratune eval {run} --data test.jsonl"),
        ("See what it changed, layer by layer", f"loratune show {run}"),
        ("Make a plain model of it", f"loratune merge {run} --out merged"),
    ]


# The class that transformers loads each task's base with.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def python_lines(path: str, base: str | None, task: Task) -> str:
    if base and base.endswith(".gguf"):
        # transformers alone would keep such a model quantised.
        loading = ("from loratune.model import load_base", "", f"model = load_base({base!r}).model")
    else:
        name = base or "BASE"
        loading = (
            f"from transformers import {_CLASSES.get(task.type, 'AutoModel')}",
            "",
            f"model = {_CLASSES.get(task.type, 'AutoModel')}.from_pretrained({name!r}{_labelled(task)})",
        )
    return "\n".join(("import loratune as lt", *loading, f"lora = lt.attach(model, {path!r})"))


def _labelled(task: Task) -> str:
    """How transformers is told that the head has a label's name for each number."""
    return f", id2label={dict(enumerate(task.labels))!r}" if task.labels else ""
