"""What llama.cpp is told of a model, and which models it is not given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loratune.errors import ModelError
from loratune.gguf import FAMILIES, refuse_family, shape_of
from tests.models import tiny

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def shape(family: str = "llama", **changes: Any) -> Any:
    model = tiny(family, **changes)
    return shape_of(model.config, model.model.rotary_emb.inv_freq)


def test_factors_of_scaled_positions() -> None:
    assert shape().factors is None
    linear = shape(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0})
    assert torch.allclose(torch.from_numpy(linear.factors), torch.full((4,), 4.0))
    scaled = shape(rope_parameters=LLAMA3)
    # As llama.cpp's own converter computes them: whole waves stay, long ones are stretched, between them it is blended.
    expected = []
    for power in range(0, 8, 2):
        wave = 2 * torch.pi * 500.0 ** (power / 8)
        blend = (32 / wave - 1) / (4 - 1)
        expected.append(1.0 if wave < 32 / 4 else 8.0 if wave > 32 / 1 else 1 / ((1 - blend) / 8 + blend))
    assert torch.allclose(torch.from_numpy(scaled.factors), torch.tensor(expected))
    assert expected[0] == 1
    assert expected[-1] == 8
    assert 1 < expected[1] < 8
    assert "does not read the scaling of positions" in scaled.notes[0]
    assert set(ROPE_INIT_FUNCTIONS) >= {"linear", "llama3", "yarn"}


def test_a_window_bounds_the_context() -> None:
    found = shape("mistral", sliding_window=64)
    assert found.context == 64
    assert "context 64" in found.notes[0]
    for sliding_window in (None, 128, 4096):
        found = shape("mistral", sliding_window=sliding_window)
        assert (found.context, found.notes) == (128, ())
    assert shape("qwen2", sliding_window=64, use_sliding_window=False).context == 128


def test_what_transformers_does_not_read_is_said() -> None:
    assert "heads of 8 (it takes 128)" in shape("qwen3").notes[0]
    assert shape("qwen3", head_dim=128).notes == ()
    assert shape("qwen2").notes == ()
    assert shape(head_dim=16).notes == ()
    assert "attention_bias, mlp_bias" in shape(attention_bias=True, mlp_bias=True).notes[0]


YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"rope_parameters": YARN}, "rope_type='yarn'"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type='llama3'.*qwen2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"hidden_act": "gelu", "rope_parameters": YARN}, "(?s)gelu.*yarn"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
    ],
    ids=str,
)
def test_what_is_computed_otherwise_is_refused(family: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        shape(family, **changes)


def test_other_families_are_refused() -> None:
    for family in ("gemma3", "phi3", "gpt2", "mixtral", "smollm3"):
        with pytest.raises(ModelError, match="no GGUF models of") as caught:
            refuse_family(tiny(family).config)
        assert all(name in caught.value.hint for name in FAMILIES)
