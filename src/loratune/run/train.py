"""`train`: config in, components wired, run folder out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratune.adapt import Adapters, attach
from loratune.config import TrainConfig
from loratune.data.batch import Batch
from loratune.data.pack import batches
from loratune.data.tasks import DATA_TASKS
from loratune.errors import DivergedError, LoratuneError, RunInterrupted
from loratune.evaluation import held_out_loss
from loratune.model import adapter_training, find_base, freed_memory_kept, given_back, quietly, recompute_activations
from loratune.quant import drop_originals
from loratune.run.decide import keep_plan, warmup_steps
from loratune.run.events import Noticed, RunListener
from loratune.run.folder import (
    RunFolder,
    WatchedFolder,
    choose_folder,
    refuse_changed,
    refuse_damaged,
    refuse_foreign,
    refuse_other_run,
)
from loratune.run.journal import Journal
from loratune.run.prepare import Rows, data_line
from loratune.run.proof import Proof
from loratune.run.put_together import put_together, trained_tensors
from loratune.run.record import effective_ranks, first_record
from loratune.run.samples import measure_both, metrics_line, take_samples
from loratune.run.setup import Setup, plan_line, set_up
from loratune.run.signals import stop_signals, terminated_like_interrupted
from loratune.run.smaller import smaller_ranks
from loratune.run.spread import spread_out
from loratune.run.start import start_from_data
from loratune.run.task import choose_head, next_command
from loratune.training.checkpoint import Checkpoint, latest_checkpoint, restore, save_checkpoint
from loratune.training.checks import all_finite, same_everywhere
from loratune.training.loop import LOWER, Hooks, Loop, Progress, Work
from loratune.training.memory import memory_errors
from loratune.training.optimizer import make_optimizer
from loratune.training.processes import Processes, join
from loratune.training.schedule import Schedule
from loratune.training.sharding import shard
from loratune.training.trackers import check_trackers, make_accelerator, tracker_listener


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, which is also the adapter's, and its record.

    `written_here` is False in those of several processes that left the folder to another one.
    """

    path: Path
    record: dict[str, Any]
    written_here: bool = True


def train(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    held_out: Any = None,
    listen: RunListener | None = None,
    **settings: Any,
) -> Run:
    """Train an adapter, check it, and leave a run folder.

    Args:
        model: hub id, folder, GGUF file, or a loaded model (which is given back as it was).
        data: file, hub data set id, rows, or a `datasets.Dataset`.
        tokenizer: for a loaded model whose tokenizer is not found by its name.
        held_out: rows to validate on, as `data`, in place of the setting `val`.
        listen: told everything that happens, as events; of several processes, in the first.
        settings: the options of `loratune train` by name; see `TrainConfig`.

    Raises:
        LoratuneError: the kind tells what went wrong; see `loratune.errors`.
    """
    processes = join()
    alone = nullcontext() if processes.first else quietly()
    with (
        alone, terminated_like_interrupted(), processes.one_failure(), given_back(model), memory_errors(),
        processes.hearing(),
    ):  # fmt: skip
        config = TrainConfig(**settings)
        check_trackers(config.log_with)
        return _run(model, Rows(data, held_out), tokenizer, config, listen, processes)


def _run(
    model: Any, rows: Rows, tokenizer: Any, config: TrainConfig, listen: RunListener | None, processes: Processes
) -> Run:
    spread = spread_out(model, config, processes)
    folder = processes.from_first(lambda: choose_folder(config.out))
    before = processes.from_first(lambda: refuse_foreign(folder))
    if not processes.first:
        folder, listen = WatchedFolder(folder.path), None
    loftq = config.init_lora_weights == "loftq"
    head, rows = choose_head(model, rows, config)
    loading = {"quant": config.quant, "keep_originals": loftq, "head": head, **spread.loading(config)}
    base = find_base(model, tokenizer, **loading)
    setup = set_up(base, rows, config, spread)
    if before is not None:
        keep_plan(setup.decisions, before["settings"])
    record = first_record(setup, folder.name)
    processes.refuse_different({**setup.decisions.values, **record["identity_of"]})
    journal = Journal(folder, record, [listen] if listen else [])
    journal.say("data", data_line(setup.prepared))
    journal.say("plan", plan_line(setup))
    if before is not None:
        refuse_other_run(folder, before, record, config.resume)
        if before["state"] == "finished":
            processes.from_first(lambda: refuse_damaged(folder))
            journal.say("saved", f"{folder.path} is finished already; nothing was done")
            return Run(folder.path, before, folder.written_here)
        processes.from_first(lambda: len(folder.metrics(whole=False)))  # damaged, they are refused before all work
    with folder.writing():
        # Loading took a while, in which another process may have trained here.
        processes.from_first(lambda: refuse_changed(folder, before))
        return _recorded(setup, folder, journal, before)


def _recorded(setup: Setup, folder: RunFolder, journal: Journal, before: dict[str, Any] | None) -> Run:
    """Train; whatever happens, the record says how it ended."""
    journal.open(before)
    try:
        with freed_memory_kept(setup.device), memory_errors(), setup.processes.hearing():
            _train(setup, folder, journal, resume=before is not None)
    except LoratuneError as error:
        journal.close("interrupted" if error.exit_code == RunInterrupted.exit_code else "failed", str(error))
        raise
    except BaseException as error:
        journal.close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", repr(error))
        raise
    return Run(folder.path, setup.processes.from_first(lambda: journal.record), folder.written_here)


def _train(setup: Setup, folder: RunFolder, journal: Journal, *, resume: bool) -> None:
    decisions, processes = setup.decisions, setup.processes
    torch.manual_seed(decisions["seed"])
    proof = Proof(setup)
    lora = attach(setup.model, setup.lora)
    try:
        start_from_data(setup, lora, journal, resume=resume)
        proof.remember(lora)
        if decisions["recompute"] == "on":
            recompute_activations(setup.model)
        if decisions["checks"] != "off":
            journal.take("checks", processes.from_first(lambda: proof.before(lora)))
        drop_originals(setup.model)
        with _trackers(setup, folder, journal):
            progress = _fit(setup, folder, journal, lora, resume=resume)
        if setup.spread.sharded:
            tensors = trained_tensors(lora)  # every process gives its parts
            processes.from_first(lambda: _finish(*put_together(setup, tensors), folder, journal, progress))
        else:
            if decisions["checks"] != "off" and processes.count > 1:
                journal.take("verify", [same_everywhere(lora, processes)])
            processes.from_first(lambda: _finish(setup, lora, proof, folder, journal, progress))
    finally:
        if not setup.spread.sharded:  # nobody can take the parts' classes off, and the model is of no further use
            lora.detach()
        setup.model.eval()


def _finish(
    setup: Setup, lora: Adapters, proof: Proof, folder: RunFolder, journal: Journal, progress: Progress
) -> None:
    """Check what was trained, and write it: for one process, with the whole model, alone."""
    if setup.decisions["checks"] != "off":
        journal.take("verify", proof.after(lora))
    if setup.decisions["checks"] == "full":
        _look_at_smaller_ranks(setup, journal, lora)
    _save(setup, folder, journal, lora, progress)


def _fit(setup: Setup, folder: RunFolder, journal: Journal, lora: Adapters, *, resume: bool) -> Progress:
    decisions, processes = setup.decisions, setup.processes
    objective = shard(setup.model, setup.device) if setup.spread.sharded else setup.model
    plus = decisions.values.get("lora_plus_ratio")
    groups = lora.param_groups(decisions["lr"], plus, weight_decay=decisions["weight_decay"])
    optimizer = make_optimizer(decisions["optimizer"], groups, decisions["lr"])
    progress = _start(setup, folder, journal, lora, optimizer, resume=resume)
    steps = decisions["max_steps"]
    schedule = Schedule(decisions["schedule"], decisions["lr"], steps, warmup_steps(decisions["warmup"], steps))
    evaluate = _evaluation(setup, objective, processes)

    def save(at: Progress) -> None:
        finite = all_finite(lora)
        if not finite.passed:
            raise DivergedError(f"step {at.step}: NaN or infinity in {finite.detail}", hint=LOWER)
        save_checkpoint(
            folder.checkpoints, lora, optimizer, at,
            keep=decisions["keep"], run=journal.record["identity"], write=folder.written_here,
        )  # fmt: skip

    def asked_to_stop() -> bool:
        return processes.some(stop.is_set())

    hooks = Hooks(journal.hear, evaluate, save, asked_to_stop)
    loop = Loop(objective, lora, _work(setup), optimizer, schedule, processes, progress, hooks)
    if evaluate is not None and "base_val_loss" not in journal.record["result"]:
        with lora.disabled():
            base_loss = loop.held_out_loss()
        if not math.isfinite(base_loss):
            raise DivergedError(f"the base's held-out loss is {base_loss:g}", hint="try --dtype fp32")
        journal.base_loss(base_loss)
    journal.begin(progress.step, steps)
    if adapter_training(setup.model) and not resume:
        journal.hear(Noticed(0, "base dropout", "the base's own dropout is off: a step must not depend on its split"))
    with stop_signals() as stop:
        loop.run()
        stopped = asked_to_stop() and not progress.ended(schedule)
    if stopped:
        raise RunInterrupted(
            f"stopped after step {progress.step} of {steps}, checkpoint saved",
            hint=f"run the same command with --out {folder.path} to continue",
        )
    return progress


@contextmanager
def _trackers(setup: Setup, folder: RunFolder, journal: Journal) -> Iterator[None]:
    """Inside the block the trackers that were asked for hear what the journal hears."""
    names = setup.decisions["log_with"]
    if not names or not folder.written_here:
        yield
        return
    accelerator = make_accelerator(setup.base.device, names, folder.path)
    journal.trackers.append(tracker_listener(accelerator, folder.name, setup.decisions.values))
    try:
        yield
    finally:  # not `end_training`: it would end what the processes talk through, too
        for tracker in accelerator.trackers:
            tracker.finish()


def _start(
    setup: Setup, folder: RunFolder, journal: Journal, lora: Adapters, optimizer: torch.optim.Optimizer, *, resume: bool
) -> Progress:
    """The first step's state, or that of the newest sound checkpoint."""
    run = journal.record["identity"]
    checkpoint, damaged = _newest(setup.processes, folder, run) if resume else (None, [])
    if resume:
        journal.go_on_after(checkpoint.step if checkpoint else 0)
    for text in damaged:
        journal.hear(Noticed(0, "checkpoint", text))
    if checkpoint is None:
        return Progress(0, setup.decisions["micro_batch_tokens"])
    journal.hear(Noticed(checkpoint.step, "resumed", f"continued after step {checkpoint.step}"))
    progress = restore(checkpoint, lora, optimizer)
    # What memory forced stays; a smaller micro-batch may have been asked for since.
    limit = min(progress.micro_batch_tokens, setup.decisions["micro_batch_tokens"])
    if limit != progress.micro_batch_tokens:
        text = f"{limit} tokens at once instead of {progress.micro_batch_tokens}: equal within rounding, not in bits"
        journal.hear(Noticed(checkpoint.step, "micro-batch", text))
    progress.micro_batch_tokens = limit
    return progress


def _newest(processes: Processes, folder: RunFolder, run: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest sound checkpoint, read by one process for all, and what was wrong with newer ones."""
    read, damaged = latest_checkpoint(folder.checkpoints, run) if processes.first else (None, [])
    found = processes.from_first(lambda: (read.step, read.state) if read else None)
    if found is None:
        return None, damaged
    step, state = found
    return Checkpoint(step, processes.tensors_from_first(read.tensors if read else {}), state), damaged


def _work(setup: Setup) -> Work:
    decisions = setup.decisions
    return Work(
        rows=setup.prepared.rows,
        order=setup.order,
        layout=decisions.layout,
        pad_id=setup.base.pad_id,
        seed=decisions["seed"],
        clip=decisions["clip"],
        eval_every=decisions.values.get("eval_every"),
        save_every=decisions["save_every"],
        patience=decisions["early_stop"],
        device=setup.device,
        choices=_choices(setup),
    )


def _choices(setup: Setup) -> int:
    """Among how many answers a supervised token, row or word is one; 0 where each has another number of them."""
    head = setup.base.head
    if DATA_TASKS[head.task].writes:
        return int(setup.model.config.get_text_config().vocab_size)
    return len(head.labels)


def _evaluation(setup: Setup, objective: nn.Module, processes: Processes) -> Callable[[int], float] | None:
    """The held-out loss with so many tokens at once, of which each of the processes computes its part."""
    if setup.prepared.val is None:
        return None
    decisions, rows, device = setup.decisions, setup.prepared.val.rows, setup.device

    @cache
    def cut(limit: int) -> list[Batch]:
        return batches(rows, decisions.layout, limit=limit, pad_id=setup.base.pad_id, part=processes.part)

    return lambda limit: held_out_loss(objective, cut(limit), device, summed=processes.sums).loss


def _look_at_smaller_ranks(setup: Setup, journal: Journal, lora: Adapters) -> None:
    evaluate = _evaluation(setup, setup.model, Processes())
    if evaluate is None:
        return
    base = journal.record["result"]["base_val_loss"]
    measured = partial(evaluate, setup.decisions["micro_batch_tokens"])
    found = smaller_ranks(lora, measured, base=base, tuned=measured())
    if found is not None:
        journal.record["adapter"]["smaller_ranks"] = found
        losses = ", ".join(f"{one['val_loss']:.4f} at rank {one['r']}" for one in found["tried"])
        r = setup.decisions["r"]
        words = f"rank {found['enough']} would do" if found["enough"] < r else f"all of rank {r} is used"
        journal.say("ranks", f"{words}: held-out loss {found['val_loss']:.4f}, cut to fewer directions {losses}")


def _save(setup: Setup, folder: RunFolder, journal: Journal, lora: Adapters, progress: Progress) -> None:
    """The adapter and all that belongs beside it; the record is last, since it says that the run is finished."""
    record, decisions = journal.record, setup.decisions
    record["result"]["best_step"] = progress.best_step or progress.step
    if decisions["early_stop"] and progress.best_step:
        record["result"]["val_loss"] = progress.best_val
    record["adapter"]["effective_rank"] = effective_ranks(lora)
    metrics = measure_both(setup, lora)
    if metrics:
        record["result"]["metrics"] = metrics
        journal.say("metrics", f"held out: {metrics_line(metrics)}")
    lora.save(folder.path, tokenizer=setup.base.tokenizer, about=_about(record["result"]))
    folder.write_samples(take_samples(setup, lora) if decisions["samples"] else [])
    journal.close("finished")
    journal.say("saved", f"{folder.path}    next: loratune {next_command(setup.base.head, folder.path)}")


def _about(result: dict[str, Any]) -> str:
    if result.get("val_loss") is None:
        return ""
    losses = f"{result['base_val_loss']:.3f} (base) → {result['val_loss']:.3f}"
    measured = f" Of held-out rows: {metrics_line(result['metrics'])}." if "metrics" in result else ""
    return f"Held-out loss {losses}, after {result['steps']} steps.{measured}"
