"""Several processes that train together, started as people start them.

launched("torchrun", ["-m", "loratune", …])        what a launcher and its processes printed, and its exit code
failing("bad row", 1, ["train", …])                 the same, with a fault in one of the processes
together(folder, [Job(["train", …]), …])           many commands one after the other in the same two processes
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"),
    "accelerate": ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"),
    "accelerate fsdp": (
        *("-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"),
        "--main_process_port",
    ),
}
_LIMIT = 600


@dataclass(frozen=True)
class Job:
    """One command for all processes, and what is done to one of them while it runs.

    Attributes:
        fault: a function of this module's `_FAULTS`; rank: of the process that it is done to.
    """

    words: Sequence[str]
    fault: str = "none"
    rank: int = 1


@dataclass(frozen=True)
class Outcome:
    """What one process made of a job. `seen` is what a fault that only looks has written down."""

    code: int
    out: str
    err: str
    seen: Any = None


def launched(
    launcher: str, words: Sequence[str], *, interrupt_after: Path | None = None, gpus: bool = False
) -> subprocess.CompletedProcess[str]:
    """`interrupt_after`: the launcher is sent what Ctrl-C sends once this file is there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, *LAUNCHERS[launcher], port, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            if interrupt_after is not None:
                _wait_for(interrupt_after, process)
                process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=_LIMIT)
        finally:
            process.terminate()  # the launcher ends its processes, where it has not ended by itself
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + _LIMIT
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def failing(fault: str, rank: int, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return launched("torchrun", [str(Path(__file__)), fault, str(rank), *words])


def together(folder: Path, jobs: Sequence[Job]) -> list[list[Outcome]]:
    """For each job what each process made of it."""
    plan = folder / "jobs.json"
    plan.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    done = launched("torchrun", [str(Path(__file__)), str(plan)])
    assert done.returncode == 0, done.stderr
    by_rank = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return [[Outcome(**outcome) for outcome in outcomes] for outcomes in zip(*by_rank, strict=True)]


# -- in the processes --------------------------------------------------------------------------------------------


def _no_fault() -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def _before_loss(act: Any) -> Iterator[Any]:
    """`act(number of the call, model, batch)` before each loss of a step."""
    from loratune.training import loop

    real, calls = loop.summed_loss, iter(range(1 << 30))

    def loss(model: Any, batch: Any) -> Any:
        act(next(calls), model, batch)
        return real(model, batch)

    with mock.patch.object(loop, "summed_loss", loss):
        yield


def _bad_row() -> contextlib.AbstractContextManager[Any]:
    from loratune.errors import DataError

    def act(call: int, *_: Any) -> None:
        if call == 2:
            raise DataError("row 7 is planted", hint="dig it out")

    return _before_loss(act)


def _killed() -> contextlib.AbstractContextManager[Any]:
    return _before_loss(lambda call, *_: os.kill(os.getpid(), signal.SIGKILL) if call == 2 else None)


def _asked_to_stop() -> contextlib.AbstractContextManager[Any]:
    return _before_loss(lambda call, *_: os.kill(os.getpid(), signal.SIGINT) if call == 1 else None)


def _little_memory() -> contextlib.AbstractContextManager[Any]:
    import torch

    def act(_: int, __: Any, batch: Any) -> None:
        if batch.examples > 1:
            raise torch.OutOfMemoryError("planted")

    return _before_loss(act)


@contextlib.contextmanager
def _other_data() -> Iterator[None]:
    """This process reads one row less than the others."""
    from loratune.run import prepare

    real = prepare.read

    def read(data: Any, **rest: Any) -> Any:
        corpus = real(data, **rest)
        return dataclasses.replace(corpus, examples=corpus.examples[:-1], sha256="of one row less")

    with mock.patch.object(prepare, "read", read):
        yield


@contextlib.contextmanager
def _looked_at() -> Iterator[dict[str, Any]]:
    """How a frozen weight and a trained tensor are kept between steps, and what all parts take."""
    import torch
    from torch.distributed.tensor import DTensor

    seen: dict[str, Any] = {}

    def act(_: int, model: Any, batch: Any) -> None:
        if not torch.is_grad_enabled():
            return  # after a pass without a way back the root's own parameters stay whole until the next one
        found = dict(model.named_parameters())
        local = {n: tensor.to_local() if isinstance(tensor, DTensor) else tensor for n, tensor in found.items()}
        seen["kinds"] = sorted({type(tensor).__name__ for tensor in found.values()})
        seen["shapes"] = {name: [list(found[name].shape), list(local[name].shape)] for name in found}
        seen["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in local.values())
        seen.setdefault("examples", []).append(batch.examples)

    with _before_loss(act):
        yield seen


_FAULTS = {
    "none": _no_fault,
    "bad row": _bad_row,
    "killed": _killed,
    "asked to stop": _asked_to_stop,
    "little memory": _little_memory,
    "other data": _other_data,
    "looked at": _looked_at,
}


def _one(fault: str, rank: int, words: Sequence[str]) -> tuple[int, Any]:
    from loratune.cli import main

    with _FAULTS[fault if rank == int(os.environ["RANK"]) else "none"]() as seen:
        return main(words), seen


def _all(plan: Path) -> None:
    outcomes = []
    for job in json.loads(plan.read_text()):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code, seen = _one(job["fault"], job["rank"], job["words"])
        outcomes.append(dataclasses.asdict(Outcome(code, out.getvalue(), err.getvalue(), seen)))
    (plan.parent / f"rank{os.environ['RANK']}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _all(Path(sys.argv[1]))
    else:
        sys.exit(_one(sys.argv[1], int(sys.argv[2]), sys.argv[3:])[0])
