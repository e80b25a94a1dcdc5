"""One process as several see it, and what is said where they cannot train together; pairs are in tests/run."""

from __future__ import annotations

import pickle

import pytest
import torch

import loratune as lt
from loratune.cli.output import complain
from loratune.errors import ConfigError, DataError, PeerError
from loratune.training import processes
from loratune.training.checks import same_everywhere
from loratune.training.processes import Processes, check_device, join
from tests.models import tiny


class Several(Processes):
    count, here = 2, 2


class Different(Processes):
    """What each of three processes gives, whatever this one does."""

    def gathered(self, value: object) -> list[object]:
        return [{"seed": 1, "fused": True}, {"seed": 1, "fused": True}, {"seed": 2, "pack": True}]  # type: ignore[misc]


def test_one_process_talks_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False) if size is None else monkeypatch.setenv("WORLD_SIZE", size)
        alone = join()
        assert type(alone) is Processes
        assert alone.first
        assert (alone.part.number, alone.part.of) == (0, 1)
    assert alone.from_first(lambda: 7) == 7
    assert alone.sums(1, 2.5) == [1, 2.5]
    assert alone.gathered("x") == ["x"]
    with pytest.raises(DataError, match="row"), alone.one_failure(), alone.hearing():
        raise DataError("row 3")


def test_all_differences_are_named() -> None:
    Processes().refuse_different({"seed": 1})
    with pytest.raises(ConfigError) as caught:
        Different().refuse_different({})
    assert caught.value.problems == (
        "the processes would not train the same adapter",
        "fused: True in process 0, None in process 2",
        "pack: None in process 0, True in process 2",
        "seed: 1 in process 0, 2 in process 2",
    )


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_device(Several(), torch.device("cpu"), None)
    check_device(Processes(), torch.device("cuda"), "cuda:1")
    for kind, asked, said in (
        ("cuda", None, "2 processes on this machine, and 1 GPUs"),
        ("cuda", "cuda:1", "each process has a GPU of its own"),
        ("mps", None, "cannot train on mps"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_device(Several(), torch.device(kind), asked)


def test_what_another_process_has_said_is_not_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    said = PeerError("process 1 failed: row 7", exit_code=3)
    assert complain(said, as_json=False) == complain(said, as_json=True) == 3
    assert capsys.readouterr() == ("", "")
    assert complain(PeerError("gone without a word", said=False), as_json=False) == 1
    assert "gone without a word" in capsys.readouterr().err
    again = pickle.loads(pickle.dumps(said))
    assert (str(again), again.exit_code, again.said) == ("process 1 failed: row 7", 3, True)


def test_a_process_that_went_its_own_way_is_found() -> None:
    """The last of the trained tensors differs in its last bit."""

    class Together(Several):
        def gathered(self, value: object) -> list[object]:  # type: ignore[override]
            heard.append(value)
            return [heard[0], value]

    heard: list[object] = []
    lora = lt.attach(tiny(), lt.LoraConfig(r=4, target_modules="all-linear"))
    assert same_everywhere(lora, Together()).passed
    last = lora.parameters()[-1]
    with torch.no_grad():
        last.view(-1)[-1:].copy_(torch.nextafter(last.view(-1)[-1:], torch.tensor(1.0)))
    check = same_everywhere(lora, Together())
    assert (check.passed, check.detail) == (False, "not in 1")


def test_gradients_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PIECE", 10)
    tensors = [torch.zeros(n, dtype=d) for n, d in ((4, torch.float32), (7, torch.float32), (3, torch.float32))]
    tensors += [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(25, dtype=torch.bfloat16)]
    assert [[t.numel() for t in piece] for piece in processes._pieces(tensors)] == [[4, 7], [3], [2, 25]]
    assert list(processes._pieces([])) == []
