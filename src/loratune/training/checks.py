"""The self-checks of a run: each compares what is with what must be, and each can fail.

Before training: the attached model is the base bit for bit, gradients reach the adapter and nothing else, every answer
ends in a supervised stop token, and one batch can be overfitted. After it: every update has moved and is finite, the
saved adapter reloads to the same logits, merging computes the same function, and off the model is the base again.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from loratune.adapt import Adapters
from loratune.data.batch import Batch
from loratune.data.render import Rendered
from loratune.errors import AdapterStateError, CheckError
from loratune.lora import LowRank, Rescaling
from loratune.loss import logits_of, summed_loss
from loratune.model import evaluating
from loratune.quant import FORMATS, QuantizedLinear, adaptable, lost, quantized_format, stacked_weight
from loratune.training.processes import Processes

OVERFIT_STEPS = 30
# Halving the loss ends the check at once; a wide or untrained base that only loses a tenth in all its steps learns too.
_OVERFIT_RATIO = 0.5
_OVERFIT_LEAST = 0.9
_OVERFIT_FLOOR = 0.1
_MERGE_ROWS = 64
# What of each method must have moved.
_OUTER = {"LORA": "B", "VERA": "b", "IA3": "l"}
_MERGE_EXPERTS = 8


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: what was looked at, whether it held, and the figure."""

    name: str
    when: str
    passed: bool
    detail: str


@torch.no_grad()
def eval_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at the batch's scored positions in evaluation mode."""
    with evaluating(model):
        return logits_of(model, batch)


# -- before ------------------------------------------------------------------------------------------------------


def step0_is_base(model: nn.Module, batch: Batch, base_logits: Tensor, *, exact: bool = True) -> Check:
    """The freshly attached model against the model before `attach`: bit for bit, or within the dtype's rounding."""
    deviation = float((eval_logits(model, batch) - base_logits).abs().max())
    allowed = 0.0 if exact else 16 * torch.finfo(base_logits.dtype).eps * float(base_logits.abs().max())
    return Check("step 0 ≡ base", "before", deviation <= allowed, f"largest deviation {deviation:g}")


def starts_closer(model: nn.Module, lora: Adapters) -> Check:
    """LoftQ's start: every adapted weight is nearer to the one before quantisation than the quantised weight is."""
    worse, ratios = [], []
    for path, low_rank in lora.factors().items():
        residual = lost(model.get_submodule(path))
        if residual is not None:
            A, B = (factor.detach().float() for factor in low_rank.factors())
            ratios.append(float((residual - low_rank.scale * B @ A).norm() / residual.norm()))
            worse += [path] if not ratios[-1] < 1 else []
    detail = f"{len(ratios)} weights, {min(ratios):.0%} to {max(ratios):.0%} of the distance is left" if ratios else ""
    if worse or not ratios:
        detail = f"not nearer: {', '.join(worse[:3])}" if worse else "no weight is known as it was before"
    return Check("nearer to the unquantised base", "before", not worse and bool(ratios), detail)


def gradients_only_in_adapter(model: nn.Module, lora: Adapters, batch: Batch) -> Check:
    """After one backward pass: every adapter tensor has a gradient, every update a non-zero one, nothing else any."""
    model.zero_grad()
    summed_loss(model, batch).backward()
    allowed = {id(parameter) for parameter in lora.parameters()}
    strangers = [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in allowed]
    idle = [
        path
        for path, term in lora.terms().items()
        if any(p.grad is None for p in term.parameters()) or not _any_gradient(term.inner, term.outer)
    ]
    idle += [name for name, parameter in lora.replaced().items() if parameter.grad is None]
    model.zero_grad()
    detail = f"{len(allowed)} adapter tensors"
    if strangers:
        detail = f"gradients also in {', '.join(strangers[:3])}"
    elif idle:
        detail = f"no gradient reaches {', '.join(idle[:3])}"
    return Check("grads only in A, B", "before", not strangers and not idle, detail)


def _any_gradient(*parameters: Tensor) -> bool:
    """One of two factors starts at zero, and then the other one's gradient is zero too."""
    return any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters)


def end_of_turn_supervised(rows: Sequence[Rendered], stop_ids: frozenset[int]) -> Check:
    """Every row that was not cut teaches the model to stop: its last supervised token is a stop token."""
    whole = [row for row in rows if not row.truncated]
    missing = [row.place for row in whole if _last_supervised(row) not in stop_ids]
    detail = f"{len(whole)} rows" if not missing else f"not in {len(missing)} rows, first {missing[0]}"
    return Check("end of turn supervised", "before", not missing, detail)


def _last_supervised(row: Rendered) -> int:
    return row.ids[max(i for i, supervised in enumerate(row.supervised) if supervised)]


def one_batch_overfits(model: nn.Module, lora: Adapters, batch: Batch, lr: float) -> Check:
    """A few steps on one batch must bring its loss down; the adapter is put back as it was."""
    parameters = lora.parameters()
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    first = last = float("nan")
    steps = 0
    with evaluating(model):
        for steps in range(OVERFIT_STEPS + 1):
            optimizer.zero_grad()
            loss = summed_loss(model, batch) / batch.supervised
            last = float(loss.detach())
            first = last if steps == 0 else first
            if last <= max(first * _OVERFIT_RATIO, _OVERFIT_FLOOR) or not math.isfinite(last):
                break
            loss.backward()
            optimizer.step()
    model.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    passed = last <= max(first * _OVERFIT_LEAST, _OVERFIT_FLOOR)
    return Check("one batch overfits", "before", passed, f"loss {first:.2f} → {last:.2f} in {steps} steps")


# -- after -------------------------------------------------------------------------------------------------------


def must_move(lora: Adapters) -> dict[str, Tensor]:
    """What any training changes: of each update the factor that starts at zero or B, and all that stands beside it."""
    swapped = lora.config().init_lora_weights == "swapped"
    looked_up = {target.path for target in lora.plan().targets if target.form.use == "lookup"}  # whose A starts at zero
    tensors: dict[str, Tensor] = {}
    for path, term in lora.terms().items():
        tensors[path] = term.inner if swapped or path in looked_up else term.outer
        beside = {"bias": term.bias, "magnitude": term.magnitude} if isinstance(term, LowRank) else {}
        tensors |= {f"{path}.{name}": tensor for name, tensor in beside.items() if tensor is not None}
    return tensors | lora.replaced()


def every_update_moved(lora: Adapters, start: Mapping[str, Tensor]) -> Check:
    """Every tensor of `must_move` differs from what it was before the first step."""
    still = [name for name, tensor in must_move(lora).items() if torch.equal(tensor.detach(), start[name])]
    config = lora.config()
    letter = "A" if config.init_lora_weights == "swapped" else _OUTER[config.peft_type]
    terms = lora.terms()
    moved = f"{sum(path not in still for path in terms)}/{len(terms)} {letter} moved"
    if len(start) > len(terms):
        moved += (
            f", {sum(name not in still for name in start if name not in terms)} of {len(start) - len(terms)} others"
        )
    return Check("every B moved", "after", not still, moved + (f"; not {', '.join(still[:3])}" if still else ""))


def all_finite(lora: Adapters) -> Check:
    tensors = {path: list(term.parameters()) for path, term in lora.terms().items()}
    tensors |= {name: [parameter] for name, parameter in lora.replaced().items()}
    bad = [name for name, parts in tensors.items() if not all(bool(t.isfinite().all()) for t in parts)]
    return Check("finite", "after", not bad, ", ".join(bad[:3]) or "no NaN, no infinity")


def same_everywhere(lora: Adapters, processes: Processes) -> Check:
    """Every process holds the same bits: none has taken a step that the others have not."""
    digest = hashlib.sha256()
    for parameter in lora.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    first, *others = processes.gathered(digest.hexdigest())
    strangers = [str(rank) for rank, other in enumerate(others, 1) if other != first]
    detail = f"{processes.count} processes" if not strangers else f"not in {', '.join(strangers)}"
    return Check("one adapter everywhere", "after", not strangers, detail)


def reload_is_live(model: nn.Module, lora: Adapters, batch: Batch) -> Check:
    """The adapter written to disk and read back gives the live one's logits, bit for bit."""
    live = eval_logits(model, batch)
    (name,) = lora.active
    folder = Path(tempfile.mkdtemp())
    try:
        lora.save(folder, name)
        lora.load(folder, "reloaded")
        lora.activate("reloaded")
        deviation = float((eval_logits(model, batch) - live).abs().max())
    finally:
        lora.activate(name)
        if "reloaded" in lora.names:
            lora.remove("reloaded")
        shutil.rmtree(folder)
    return Check("reload ≡ live", "after", deviation == 0.0, f"largest deviation {deviation:g}")


def merged_is_adapter(model: nn.Module, lora: Adapters, batch: Batch) -> Check:
    """Sampled rows of every merged weight against W + s · B A in fp64, within its dtype's rounding.

    The outputs' divergence is shown beside it: what rounding costs there depends on the text, so it decides nothing.
    """
    live = eval_logits(model, batch)
    expected = {path: _merged_rows(model, lora, path) for path in _active_paths(lora)}

    try:
        lora.merge()
    except AdapterStateError as error:
        return Check("merged ≡ adapter", "after", True, f"it cannot be merged: {error.problems[0]}")
    try:
        merged = eval_logits(model, batch)
        wrong = [path for path, rows in expected.items() if not _holds(model, path, rows)]
        wrong += [name for name, parameter in lora.replaced().items() if not _is_now(model, lora, name, parameter)]
    finally:
        lora.unmerge()
    restored = torch.equal(eval_logits(model, batch), live)
    same = float((live.argmax(-1) == merged.argmax(-1)).float().mean())
    detail = f"{len(expected)} weights, KL {divergence(live, merged):.1e}, same first choice {same:.1%}"
    if (bits := quantized_format(model)) is not None:
        detail += f": {bits} rounds again; `loratune merge` writes the decoded base with the adapter in it"
    if wrong:
        detail = f"not W + s·BA: {', '.join(wrong[:3])} and {max(0, len(wrong) - 3)} more"
    elif not restored:
        detail = "unmerging did not restore the model"
    return Check("merged ≡ adapter", "after", not wrong and restored, detail)


def _active_paths(lora: Adapters) -> list[str]:
    return list(dict.fromkeys(path for name in lora.active for path in lora.terms(name)))


def _rows(model: nn.Module, path: str) -> Tensor:
    """Up to 64 evenly spaced output rows (rows, in) of a module's weight, in fp64 on the CPU; so of some experts'."""
    return torch.cat([_sampled(matrix) for matrix in _matrices(model, path)]).cpu().double()


def _matrices(model: nn.Module, path: str) -> list[Tensor]:
    """The weight (out, in) of the module of that path, or those of some experts in the parameter of that name."""
    owner, _, name = path.rpartition(".")
    stack = stacked_weight(model.get_submodule(owner), name) if owner else None
    if stack is not None:
        return [stack.one(number) for number in _some(range(stack.experts), _MERGE_EXPERTS)]
    weight = adaptable(model.get_submodule(path))
    assert weight is not None
    return [weight.dense()]


def _merged_rows(model: nn.Module, lora: Adapters, path: str) -> Tensor:
    """What these rows must be after a merge: formed from the factors, not by the code that merges."""
    rows = base = _rows(model, path)
    for name in lora.active:
        low_rank = lora.terms(name).get(path)
        if isinstance(low_rank, Rescaling):
            (weight,) = _matrices(model, path)
            rows = rows + _rescaled_rows(base, low_rank, len(weight))
        elif low_rank is not None:
            pairs = _some(low_rank.parts(), _MERGE_EXPERTS)
            exact = [tuple(factor.detach().cpu().double() for factor in pair) for pair in pairs]
            update = low_rank.scale * torch.cat([_sampled(B) @ A for A, B in exact])
            if low_rank.magnitude is not None:
                adapted = base + update
                length = adapted.norm(dim=1).where(adapted.norm(dim=1) > 0, 1.0)
                update = (_sampled(low_rank.magnitude.detach().cpu().double()) / length)[:, None] * adapted - base
            rows = rows + update
    return rows


def _rescaled_rows(base: Tensor, term: Rescaling, outputs: int) -> Tensor:
    """What (IA)³ adds to sampled rows: each times what its output's factor, or those of its inputs, is more than 1."""
    change = term.l.detach().cpu().double() - 1
    if not term.on_input:
        return base * _sampled(change)[:, None]
    by_group = change.view(term.groups, -1)
    group = _sampled(torch.arange(outputs)) // (outputs // term.groups)
    return base * by_group[group].repeat_interleave(base.shape[1] // by_group.shape[1], 1)


def _sampled(by_output: Tensor) -> Tensor:
    """Up to 64 evenly spaced entries of the first dimension."""
    return cast(Tensor, _some(by_output, _MERGE_ROWS))


def _some(entries: Any, most: int) -> Any:
    """Evenly spaced ones."""
    return entries[:: max(1, len(entries) // most)][:most]


def _is_now(model: nn.Module, lora: Adapters, full_name: str, parameter: Tensor) -> bool:
    """Whether the base's tensor of that name holds the adapter's own, or its table the adapter's rows."""
    for rows in lora.plan().token_rows:
        if full_name in rows.full_names():
            table: Any = model.get_submodule(rows.path)._parameters["weight"]
            return torch.equal(table[list(rows.tokens)], parameter.to(table.dtype))
    path, _, name = full_name.rpartition(".")
    merged: Any = model.get_submodule(path)._parameters[name]
    return torch.equal(merged, parameter.to(merged.dtype))


def _holds(model: nn.Module, path: str, exact: Tensor) -> bool:
    """Whether sampled rows of the weight are the exact ones, but for one rounding to what it is stored in."""
    merged = _rows(model, path)
    bits = {name: module.format for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if path in bits:
        return bool((merged - exact).norm() <= FORMATS[bits[path]].coarseness * exact.norm())
    # ... and the fp32 sum before it.
    step = float(torch.finfo(_matrices(model, path)[0].dtype).eps)
    return bool(((merged - exact).abs() <= exact.abs() * step + 1e-6 * exact.abs().max()).all())


def off_is_base(
    model: nn.Module, lora: Adapters, batch: Batch, base_logits: Tensor, base_fingerprint: str, now: str
) -> Check:
    """Switched off the model gives the base's logits bit for bit and its weights are the base's; on, it differs."""
    with lora.disabled():
        off = float((eval_logits(model, batch) - base_logits).abs().max())
    on = float((eval_logits(model, batch) - base_logits).abs().max())
    untouched = now == base_fingerprint
    detail = f"off {off:g}, on {on:g}" + ("" if untouched else ", base weights changed")
    return Check("off ≡ base, on ≠ base", "after", off == 0.0 and on > 0.0 and untouched, detail)


def divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL(reference ‖ other) in nats over the rows of two (N, vocabulary) logits."""
    # On the CPU: Apple's GPUs have no fp64.
    p, q = (logits.cpu().double().log_softmax(-1) for logits in (reference, other))
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))


def require(checks: Sequence[Check], hint: str = "the record holds every check; --checks off skips them") -> None:
    """Raise if one of the checks failed."""
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    if failed:
        raise CheckError(failed, hint=hint)
