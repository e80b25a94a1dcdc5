"""The processes that train one adapter together, and everything that they say to each other.

`torchrun` and `accelerate launch` start them and tell each its number. All hold the same rows and the same plan; each
computes its part of every step, and sums do the rest.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loratune.data.pack import Part
from loratune.errors import ConfigError, LoratuneError, PeerError
from loratune.training.sharding import is_sharded

T = TypeVar("T")

# While the first process checks, answers and writes, the others wait; one that ends is noticed at once all the same.
_PATIENCE = timedelta(hours=4)
# What a process that fails says, it says before it ends; a message takes no longer than this.
_WORD = timedelta(seconds=5)
_FAILURE = "failure"
# Gradients are summed in pieces of so many values, each a tensor of its own for as long.
_PIECE = 1 << 24


class Processes:
    """One process, which talks to nobody. `Group` is several.

    Attributes:
        rank: number of this one. count: how many there are. here: how many of them on this machine.
    """

    rank, count, here = 0, 1, 1

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.rank == 0

    @property
    def part(self) -> Part:
        return Part(self.rank, self.count)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes; the others wait for it and get a copy."""
        return make()

    def tensors_from_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's tensors, on the CPU, whatever the others give."""
        return tensors

    def sums(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        return list(values)

    def least(self, value: float) -> float:
        return value

    def some(self, flag: bool) -> bool:
        """Whether it is so in one of them."""
        return flag

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make each gradient the sum over all processes; those of sharded parameters are that already."""

    def gathered(self, value: T) -> list[T]:
        """What each process gives, by rank."""
        return [value]

    def refuse_different(self, values: Mapping[str, Any]) -> None:
        """Raise unless all processes have the same values.

        Raises:
            ConfigError: with one line for each that differs.
        """
        first, *others = self.gathered(dict(values))
        problems = [
            f"{name}: {first.get(name)!r} in process 0, {other.get(name)!r} in process {rank}"
            for rank, other in enumerate(others, 1)
            for name in sorted({*first, *other})
            if first.get(name) != other.get(name)
        ]
        if problems:
            hint = "give every process the same data, base and versions, or say the setting"
            raise ConfigError(["the processes would not train the same adapter", *problems], hint=hint)

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Turns the end of another process, which breaks off what was said to it, into a `PeerError`."""
        yield

    @contextmanager
    def one_failure(self) -> Iterator[None]:
        """What ends the block in several processes ends it in all, and one of them says why."""
        yield


class Group(Processes):
    """Several processes, as `torch.distributed` knows them. All must call the same methods in the same order."""

    def __init__(self, run: int) -> None:
        """`run`: number of the run in these processes, so that its messages are its own."""
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.here = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        # Words go through the CPU, wherever gradients are.
        self._words = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._store = dist.distributed_c10d.PrefixStore(f"loratune/{run}", dist.distributed_c10d._get_default_store())

    def from_first(self, make: Callable[[], T]) -> T:
        found: list[Any] = [None, None]
        try:
            if self.first:
                found[0] = make()
        except BaseException as error:
            found[1] = self._word_for(error)  # the others need not wait until this process has ended
            raise
        finally:
            dist.broadcast_object_list(found, src=0, group=self._words, device=torch.device("cpu"))
        if found[1] is not None:
            raise _peer_error(found[1])
        made: T = found[0]
        return made

    def tensors_from_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes = self.from_first(lambda: {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
        if not self.first:
            tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        for name in shapes:
            dist.broadcast(tensors[name], src=0, group=self._words)
        return tensors

    def sums(self, *values: float) -> list[float]:
        return self._reduced(values, dist.ReduceOp.SUM)

    def least(self, value: float) -> float:
        return self._reduced([value], dist.ReduceOp.MIN)[0]

    def some(self, flag: bool) -> bool:
        return self._reduced([flag], dist.ReduceOp.MAX)[0] > 0

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        whole = [parameter for parameter in parameters if not is_sharded(parameter)]
        # An optimizer leaves alone what has no gradient, and moves what has one of zero.
        having = self.sums(*(float(parameter.grad is not None) for parameter in whole))
        gradients = []
        for parameter, processes in zip(whole, having, strict=True):
            if processes:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for piece in _pieces(gradients):
            together = torch.cat([gradient.flatten() for gradient in piece])
            dist.all_reduce(together)
            parts = together.split([gradient.numel() for gradient in piece])
            for gradient, part in zip(piece, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def gathered(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._words)
        return found

    @contextmanager
    def hearing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Launchers end all as soon as one has failed. This one ends too, but first writes why, and its exit code is
            # to be that of the failure: nobody sets this back.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if isinstance(error, LoratuneError) or not _is_broken_off(error):
                raise
            raise self._of_peer() from error

    @contextmanager
    def one_failure(self) -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                if not self.first:
                    warnings.simplefilter("ignore")
                yield
        except BaseException as error:
            atexit.unregister(dist.destroy_process_group)  # it would wait for those that are gone
            if isinstance(error, PeerError) and error.said:
                raise
            first = self._say(error)
            if first is None:
                raise
            raise first from error

    def _say(self, error: BaseException) -> PeerError | None:
        """None if this process is the first that fails, else what the first one says."""
        mine = self._word_for(error)
        try:
            found = self._store.compare_set(_FAILURE, "", mine).decode()
        except RuntimeError:  # who kept the words is gone, and was the first
            return PeerError("process 0 is gone")
        return None if found == mine else _peer_error(found)

    def _word_for(self, error: BaseException) -> str:
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        return json.dumps({"rank": self.rank, "said": str(error) or type(error).__name__, "exit_code": code})

    def _of_peer(self) -> PeerError:
        try:
            self._store.wait([_FAILURE], _WORD)
            return _peer_error(self._store.get(_FAILURE).decode())
        except RuntimeError:
            return PeerError(
                "another process of this run has ended without a word",
                hint="it may have been killed for its memory: see what its machine says",
                said=False,
            )

    def _reduced(self, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=how, group=self._words)
        found: list[float] = tensor.tolist()
        return found


def join() -> Processes:
    """The processes that this one was started with, or this one alone.

    Raises:
        ConfigError: the environment speaks of several, and does not say where they meet.
    """
    if not dist.is_available() or not (dist.is_initialized() or int(os.environ.get("WORLD_SIZE") or 1) > 1):
        return Processes()
    if not dist.is_initialized():
        _meet()
    return Group(next(_runs))


_runs = iter(range(1 << 62))


def _meet() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # transformers would load weights in the first process alone and wait for accelerate to send them on.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        # Without a backend's name there is one for each kind of device.
        dist.init_process_group(timeout=_PATIENCE)
    except ValueError as error:
        hint = "start them with torchrun or accelerate launch, or unset WORLD_SIZE"
        raise ConfigError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {error}", hint=hint) from None
    atexit.register(dist.destroy_process_group)


def check_device(processes: Processes, device: torch.device, asked: str | None) -> None:
    """Raise unless every process has a device of its own, or they are on the CPU.

    Raises:
        ConfigError: fewer GPUs than processes, one GPU named for all, or a kind that cannot talk.
    """
    if processes.count == 1 or device.type == "cpu":
        return
    if device.type != "cuda":
        raise ConfigError(f"device: several processes cannot train on {device.type}", hint="--device cpu")
    if asked is not None and ":" in asked:
        raise ConfigError(f"device={asked!r}: each process has a GPU of its own", hint="--device cuda")
    if processes.here > torch.cuda.device_count():
        problem = f"{processes.here} processes on this machine, and {torch.cuda.device_count()} GPUs"
        raise ConfigError(problem, hint="start as many processes as there are GPUs, or say --device cpu")


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype that stand side by side, in lists of not much more than `_PIECE` values."""
    piece: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if piece and (size >= _PIECE or tensor.dtype != piece[0].dtype):
            yield piece
            piece, size = [], 0
        piece.append(tensor)
        size += tensor.numel()
    if piece:
        yield piece


def _is_broken_off(error: BaseException) -> bool:
    """NCCL and the store have exceptions of their own; gloo's is a RuntimeError that names its source file."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _peer_error(word: str) -> PeerError:
    found = json.loads(word)
    return PeerError(f"process {found['rank']} failed: {found['said']}", exit_code=found["exit_code"])
