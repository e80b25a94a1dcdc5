"""The self-checks on every kind of adapter: sound ones pass, and each planted fault is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import loratune as lt
from loratune.adapt import fold
from loratune.data.batch import make_batch
from loratune.errors import CheckError
from loratune.lora import LowRank
from loratune.loss import summed_loss
from loratune.model import fingerprint
from loratune.training import checks
from tests.models import PAD, rows_of, tiny

ROWS = rows_of(9, 14, 6, 11)
BATCH = make_batch(ROWS, packed=False, pad_id=PAD)

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "olora with dora": ("gpt2", {"init_lora_weights": "olora", "use_dora": True}),
    "swapped": ("llama", {"init_lora_weights": "swapped"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "a bias behind B": ("gpt2", {"lora_bias": True}),
    "all biases": ("gpt2", {"bias": "all"}),
    "modules trained whole": ("llama", {"modules_to_save": ["lm_head", "model.norm"]}),
}


class Kind:
    """An adapter of this kind, after `steps` steps of plain training."""

    def __init__(self, name: str, *, steps: int = 2) -> None:
        family, settings = KINDS[name]
        self.model = tiny(family)
        self.base_logits = checks.eval_logits(self.model, BATCH)
        self.base = fingerprint(self.model.named_parameters())
        self.lora = lt.attach(self.model, lt.LoraConfig(r=4, target_modules="all-linear", **settings))
        self.start = {name: tensor.detach().clone() for name, tensor in checks.must_move(self.lora).items()}
        optimizer = torch.optim.AdamW(self.lora.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            (summed_loss(self.model, BATCH) / BATCH.supervised).backward()
            optimizer.step()
        optimizer.zero_grad()

    def merged(self) -> checks.Check:
        return checks.merged_is_adapter(self.model, self.lora, BATCH)


@pytest.mark.parametrize("name", KINDS)
def test_sound_ones_pass(name: str) -> None:
    fresh, trained = Kind(name, steps=0), Kind(name)
    exact = name != "orthogonal"
    checks.require(
        [
            checks.step0_is_base(fresh.model, BATCH, fresh.base_logits, exact=exact),
            checks.gradients_only_in_adapter(fresh.model, fresh.lora, BATCH),
            checks.one_batch_overfits(fresh.model, fresh.lora, BATCH, 1e-2),
            checks.every_update_moved(trained.lora, trained.start),
            checks.all_finite(trained.lora),
            checks.reload_is_live(trained.model, trained.lora, BATCH),
            trained.merged(),
            checks.off_is_base(
                trained.model,
                trained.lora,
                BATCH,
                trained.base_logits,
                trained.base,
                fingerprint(trained.lora.base_parameters()),
            ),
        ]
    )


def test_a_start_that_is_not_the_base() -> None:
    case = Kind("orthogonal", steps=0)
    with torch.no_grad():
        next(iter(case.lora.factors().values())).A.add_(0.01)
    assert not checks.step0_is_base(case.model, BATCH, case.base_logits, exact=False).passed


@pytest.mark.parametrize(
    ("kind", "still", "moved"),
    [
        ("dora", "model.layers.0.mlp.up_proj.magnitude", "14/14 B moved, 13 of 14 others"),
        ("swapped", "model.layers.0.mlp.up_proj", "13/14 A moved"),
        ("a bias behind B", "transformer.h.1.mlp.c_fc.bias", "8/8 B moved, 7 of 8 others"),
        ("all biases", "transformer.h.1.ln_2.bias", "8/8 B moved, 12 of 13 others"),
        ("modules trained whole", "model.norm.weight", "14/14 B moved, 1 of 2 others"),
    ],
)
def test_what_did_not_move(kind: str, still: str, moved: str) -> None:
    case = Kind(kind)
    assert checks.every_update_moved(case.lora, case.start).passed
    with torch.no_grad():
        checks.must_move(case.lora)[still].copy_(case.start[still])
    check = checks.every_update_moved(case.lora, case.start)
    assert not check.passed
    assert check.detail == f"{moved}; not {still}"


@pytest.mark.parametrize("kind", ["dora", "all biases"])
def test_a_tensor_beside_a_and_b_that_gets_no_gradient(kind: str) -> None:
    case = Kind(kind, steps=0)
    tensor = [*checks.must_move(case.lora).values()][-1]
    tensor.requires_grad_(False)
    assert not checks.gradients_only_in_adapter(case.model, case.lora, BATCH).passed


def test_a_replaced_tensor_that_is_not_finite() -> None:
    case = Kind("modules trained whole")
    case.lora.replaced()["model.norm.weight"].data[3] = torch.nan
    check = checks.all_finite(case.lora)
    assert not check.passed
    assert check.detail == "model.norm.weight"


def test_a_magnitude_left_out_of_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Kind("dora")
    assert case.merged().passed
    monkeypatch.setattr(LowRank, "delta", lambda self, weight: self.scale * (self.B @ self.A).to(weight.dtype))
    assert not case.merged().passed


def test_a_replaced_tensor_left_out_of_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Kind("modules trained whole")
    planted = lambda full, own, dtype: lambda: {full: own.detach().to(dtype) * 1.5}  # noqa: E731
    monkeypatch.setattr(fold, "_once", planted)
    check = case.merged()
    assert not check.passed
    assert "lm_head.weight" in check.detail


def test_what_cannot_be_merged_is_said_and_no_failure() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    lora = lt.attach(model, lt.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    check = checks.merged_is_adapter(model, lora, BATCH)
    assert check.passed
    assert check.detail.startswith("it cannot be merged: lm_head.weight: it is tied to model.embed_tokens.weight")
    assert not lora.merged


def test_a_failed_check_is_an_error() -> None:
    case = Kind("swapped")
    with pytest.raises(CheckError, match="every B moved"):
        checks.require(
            [checks.every_update_moved(case.lora, {n: t.clone() for n, t in checks.must_move(case.lora).items()})]
        )
