"""`train`: config in, components wired, run folder out."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.adapt import Adapters, attach
from loratune.config import TrainConfig
from loratune.data.batch import Batch, make_batch, needed
from loratune.data.pack import Order
from loratune.data.render import Rendered
from loratune.errors import DivergedError, LoratuneError, RunInterrupted
from loratune.evaluation import held_out_batches, held_out_loss
from loratune.model import Base, find_base, fingerprint, recompute_activations, stop_ids, tokenizer_hashes
from loratune.report import write_report
from loratune.run.decide import warmup_steps
from loratune.run.events import Begun, Event, Noticed, RunListener, Said, StepDone, Validated
from loratune.run.folder import RunFolder, choose_folder, refuse_foreign, refuse_other_run
from loratune.run.prepare import data_line
from loratune.run.record import adapter_facts, effective_ranks, hardware, identity_of, now, places, versions
from loratune.run.samples import take_samples
from loratune.run.setup import Setup, plan_line, set_up
from loratune.training import checks
from loratune.training.checkpoint import latest_checkpoint, restore, save_checkpoint
from loratune.training.loop import Hooks, Progress, Work, fit
from loratune.training.optimizer import make_optimizer
from loratune.training.processes import check_trackers, make_accelerator, tracker_listener
from loratune.training.schedule import Schedule

_PROBE_TOKENS = 512


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, which is also the adapter's, and its record."""

    path: Path
    record: dict[str, Any]


def train(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    listen: RunListener = lambda event: None,
    **settings: Any,
) -> Run:
    """Train an adapter, check it, and leave a run folder.

    Args:
        model: hub id, folder, GGUF file, or a loaded model (which is given back without adapters).
        data: file, hub data set id, rows, or a `datasets.Dataset`.
        tokenizer: for a loaded model whose tokenizer is not found by its name.
        listen: told everything that happens, as events.
        settings: the options of `loratune train` by name; see `TrainConfig`.

    Raises:
        LoratuneError: the kind tells what went wrong; see `loratune.errors`.
    """
    config = TrainConfig(**settings)
    check_trackers(config.log_with)
    folder = choose_folder(config.out)
    before = refuse_foreign(folder)
    torch.manual_seed(config.seed)
    base = find_base(model, tokenizer, dtype=config.dtype, device=config.device)
    setup = set_up(base, data, config)
    listen(Said("data", data_line(setup.prepared)))
    listen(Said("plan", plan_line(setup)))
    return _Training(setup, folder, before, listen).run()


class _Training:
    def __init__(self, setup: Setup, folder: RunFolder, before: dict[str, Any] | None, listen: RunListener) -> None:
        self.setup = setup
        self.folder = folder
        self.before = before
        self.outer = listen
        self.base: Base = setup.base
        self.model = setup.base.model
        self.record = self._first_record()
        self.checks: list[checks.Check] = []

    # -- the way of a run ----------------------------------------------------------------------------------------

    def run(self) -> Run:
        if self.before is not None:
            refuse_other_run(self.folder, self.before, self.record, self.setup.decisions["resume"])
            if self.before["state"] == "finished":
                self.outer(Said("saved", f"{self.folder.path} is finished already; nothing was done"))
                return Run(self.folder.path, self.before)
            self.record["events"] = self.before.get("events", [])
            self.record["created"] = self.before["created"]
        self.folder.write_record(self.record)
        try:
            self._train()
        except LoratuneError as error:
            self._close("interrupted" if isinstance(error, RunInterrupted) else "failed", str(error))
            raise
        except BaseException as error:
            self._close("failed", repr(error))
            raise
        finally:
            if self.model.__dict__.get("_loratune") is not None:
                self.model.__dict__["_loratune"].detach()
        return Run(self.folder.path, self.record)

    def _train(self) -> None:
        probe = self._probe_batch()
        base_logits = checks.eval_logits(self.model, probe)
        lora = attach(self.model, self.setup.lora)
        start = {path: low_rank.B.detach().clone() for path, low_rank in lora.factors().items()}
        if self.setup.decisions["recompute"] == "on":
            recompute_activations(self.model)
        if self.setup.decisions["checks"] != "off":
            self._check_before(lora, probe, base_logits)
        started = time.perf_counter()
        progress = self._fit(lora)
        self.record["measured"] = {
            "seconds": round(time.perf_counter() - started, 2),
            "peak_memory_bytes": self.peak,
            "tokens_per_second": round(self.tokens / max(1e-9, self.busy), 1),
        }
        if self.setup.decisions["checks"] != "off":
            self._check_after(lora, probe, base_logits, start)
        self._save(lora, progress)

    # -- training ------------------------------------------------------------------------------------------------

    def _fit(self, lora: Adapters) -> Progress:
        d = self.setup.decisions
        accelerator = make_accelerator(self.base.device, d["log_with"], self.folder.path)
        optimizer = make_optimizer(
            d["optimizer"], lora.param_groups(d["lr"], weight_decay=d["weight_decay"]), d["lr"]
        )
        progress = Progress(0, d["micro_batch_tokens"])
        checkpoint, damaged = latest_checkpoint(self.folder.checkpoints) if self.before is not None else (None, [])
        for text in damaged:
            self._hear(Noticed(0, "checkpoint", text))
        if checkpoint is not None:
            progress = restore(checkpoint, lora, optimizer)
            self._hear(Noticed(progress.step, "resumed", f"continued after step {progress.step}"))
        self.folder.keep_metrics_until(progress.step if checkpoint is not None else -1)
        self.peak, self.tokens, self.busy = 0, 0, 0.0
        evaluate = self._evaluate()
        self.record["result"]["base_val_loss"] = self._base_loss(lora, evaluate, resumed=checkpoint is not None)
        self.trackers = (
            [tracker_listener(accelerator, self.folder.name, d.values)] if d["log_with"] else []
        )
        schedule = Schedule(d["schedule"], d["lr"], d["max_steps"], warmup_steps(d["warmup"], d["max_steps"]))
        self.model.train()
        self.outer(Begun(progress.step, schedule.steps))

        def save(at: Progress) -> None:
            save_checkpoint(self.folder.checkpoints, lora, optimizer, at, keep=d["keep"])

        with _stop_signals() as stop, ExitStack() as stack:
            stack.callback(self.model.eval)
            stack.callback(accelerator.end_training)
            fit(
                self.model,
                lora,
                self._work(),
                optimizer,
                schedule,
                accelerator,
                progress,
                Hooks(self._hear, evaluate, save, stop.is_set),
            )
            if stop.is_set() and progress.step < schedule.steps:
                save(progress)
                raise RunInterrupted(
                    f"stopped after step {progress.step} of {schedule.steps}, checkpoint saved",
                    hint=f"run the same command with --out {self.folder.path} to continue",
                )
        save(progress)
        return progress

    def _work(self) -> Work:
        d = self.setup.decisions
        rows = self.setup.prepared.rows
        return Work(
            rows,
            Order(len(rows), d["batch_size"], d["seed"]),
            d["pack"],
            self._pad_id(),
            d["seed"],
            d["clip"],
            d.values.get("eval_every"),
            d["save_every"],
            d["early_stop"],
        )

    def _evaluate(self) -> Callable[[], float] | None:
        if self.setup.prepared.val is None:
            return None
        d = self.setup.decisions
        batches = held_out_batches(
            self.setup.prepared.val.rows, packed=d["pack"], limit=d["micro_batch_tokens"], pad_id=self._pad_id()
        )
        return lambda: held_out_loss(self.model, batches, self.base.device).loss

    def _base_loss(self, lora: Adapters, evaluate: Callable[[], float] | None, *, resumed: bool) -> float | None:
        if evaluate is None:
            return None
        if resumed and self.before is not None and self.before["result"].get("base_val_loss") is not None:
            return float(self.before["result"]["base_val_loss"])
        with lora.disabled():
            loss = evaluate()
        self._hear(Validated(0, loss))
        return loss

    def _hear(self, event: Event) -> None:
        """Everything the loop says: into metrics and record, to trackers, and on to whoever listens."""
        if isinstance(event, StepDone):
            self.folder.add_metrics(asdict(event))
            self.peak = max(self.peak, event.peak_memory_bytes)
            self.tokens += event.tokens
            self.busy += event.step_seconds
            self.record["result"].update(steps=event.step, train_loss=event.loss)
        elif isinstance(event, Validated):
            self.folder.add_metrics(asdict(event))
            if event.step:
                self.record["result"]["val_loss"] = event.val_loss
        else:
            self.record["events"].append(asdict(event))
        for listener in getattr(self, "trackers", []):
            listener(event)
        self.outer(event)

    # -- checks --------------------------------------------------------------------------------------------------

    def _check_before(self, lora: Adapters, probe: Batch, base_logits: Tensor) -> None:
        found = [
            checks.step0_is_base(self.model, probe, base_logits),
            checks.gradients_only_in_adapter(self.model, lora, probe),
        ]
        if self.setup.decisions["loss"] != "all":
            stops = stop_ids(self.model, self.base.tokenizer) | set(self.setup.prepared.train.end_of_turn)
            found.append(checks.end_of_turn_supervised(self.setup.prepared.rows, frozenset(stops)))
        if self.setup.decisions["checks"] == "full":
            small = self._batch(self._short_rows(4))
            found.append(checks.one_batch_overfits(self.model, lora, small, self.setup.decisions["lr"]))
        self._take("checks", found)

    def _check_after(self, lora: Adapters, probe: Batch, base_logits: Tensor, start: dict[str, Tensor]) -> None:
        found = [checks.every_b_moved(lora, start), checks.all_finite(lora), checks.reload_is_live(self.model, lora, probe)]
        if self.setup.decisions["checks"] == "full":
            found.append(checks.merged_is_adapter(self.model, lora, probe, base_logits))
        found.append(
            checks.off_is_base(self.model, lora, probe, base_logits, self.base.fingerprint, self._fingerprint)
        )
        self._take("verify", found)

    def _take(self, topic: str, found: list[checks.Check]) -> None:
        self.checks += found
        self.record["checks"] = [asdict(check) for check in self.checks]
        marks = (f"{'✓' if check.passed else '✗'} {check.name} ({check.detail})" for check in found)
        self.outer(Said(topic, "  ".join(marks)))
        checks.require(found)

    def _fingerprint(self) -> str:
        base = ((n, p) for n, p in self.model.named_parameters() if ".lora." not in n)
        return fingerprint(base)

    # -- rows for checks -----------------------------------------------------------------------------------------

    def _probe_batch(self) -> Batch:
        """A few rows with at most about 512 tokens, from the held-out ones where there are some."""
        prepared = self.setup.prepared
        rows, total = [], 0
        for row in (prepared.val or prepared.train).rows:
            if rows and total + needed(row) > _PROBE_TOKENS:
                break
            rows.append(row)
            total += needed(row)
        return self._batch(rows)

    def _short_rows(self, count: int) -> list[Rendered]:
        return sorted(self.setup.prepared.rows, key=needed)[:count]

    def _batch(self, rows: list[Rendered]) -> Batch:
        return make_batch(rows, packed=self.setup.decisions["pack"], pad_id=self._pad_id()).to(self.base.device)

    def _pad_id(self) -> int:
        pad = self.base.tokenizer.pad_token_id
        return int(pad) if pad is not None else 0

    # -- the folder ----------------------------------------------------------------------------------------------

    def _save(self, lora: Adapters, progress: Progress) -> None:
        path = self.folder.path
        lora.save(path, tokenizer=self.base.tokenizer, about=self._about())
        self.record["adapter"]["effective_rank"] = effective_ranks(lora)
        self.record["result"]["best_step"] = progress.best_step or progress.step
        if self.setup.decisions["early_stop"] and progress.best_step:
            self.record["result"]["val_loss"] = progress.best_val
        if self.setup.decisions["samples"]:
            self.folder.write_samples(take_samples(self.setup, lora))
        self._close("finished")
        self.outer(Said("saved", f"{path}    next: loratune chat {path} --vs base"))

    def _close(self, state: str, error: str | None = None) -> None:
        self.record.update(state=state, ended=now())
        if error is not None:
            self.record["error"] = error
        self.folder.write_record(self.record)
        write_report(self.folder.path)

    def _about(self) -> str:
        result = self.record["result"]
        if result.get("val_loss") is None:
            return ""
        return f"Held-out loss {result['base_val_loss']:.3f} (base) → {result['val_loss']:.3f}, after {result['steps']} steps."

    def _first_record(self) -> dict[str, Any]:
        s, d = self.setup, self.setup.decisions
        tokenizer, template = tokenizer_hashes(self.base.tokenizer)
        facts = {"data_sha256": s.prepared.corpus.sha256, "base_fingerprint": self.base.fingerprint}
        settings = d.to_json()
        identity, parts = identity_of(settings, **facts, tokenizer_sha256=tokenizer, chat_template_sha256=template)
        return {
            "format": 1,
            "loratune": versions()["loratune"],
            "name": self.folder.name,
            "state": "running",
            "created": now(),
            "identity": identity,
            "identity_of": parts,
            "settings": {name: {**entry, "value": _plain(entry["value"])} for name, entry in settings.items()},
            "base": {
                "name": self.base.name,
                "source": self.base.source,
                "revision": self.base.revision,
                "fingerprint": self.base.fingerprint,
                "parameters": s.targets.base_parameters,
                "dtype": d["dtype"],
                "family": self.model.config.model_type,
            },
            "tokenizer": {"sha256": tokenizer, "chat_template_sha256": template},
            "data": {
                "source": s.prepared.corpus.source,
                "sha256": s.prepared.corpus.sha256,
                "shape": s.prepared.corpus.shape,
                "rows": len(s.prepared.corpus),
                "train": len(s.prepared.rows),
                "val": len(s.prepared.val.rows) if s.prepared.val else 0,
                "duplicates": [[str(a), str(b)] for a, b in s.prepared.split.duplicates],
                "truncated": places(s.prepared.train.truncated),
                "dropped": places(s.prepared.train.dropped),
                "fit": asdict(s.prepared.fit),
            },
            "adapter": adapter_facts(s.targets),
            "plan": {
                "steps": d["max_steps"],
                "epochs": d["epochs"],
                "micro_batch_tokens": d["micro_batch_tokens"],
                "packed": d["pack"],
                "pack_reason": s.pack_reason,
                "recompute": d["recompute"] == "on",
                "estimate": {"memory_bytes": s.memory.total, "seconds": round(s.seconds, 1)},
                "notes": list(s.targets.notes),
            },
            "checks": [],
            "result": {},
            "events": [],
            "versions": versions(),
            "hardware": hardware(self.base.device),
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM ask the loop to stop after its step; a second one stops at once, as Python does."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
