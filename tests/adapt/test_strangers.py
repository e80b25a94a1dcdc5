"""Another base, another tokenizer, and adapters that come as values (BEHAVIOUR 19, 27a)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loratune as lt
from loratune.errors import AdapterFileError, ConfigError
from tests.adapt.model import CONFIG, IDS, Net, attached, bits, net, picture
from tests.tiny import LLAMA3, tiny_tokenizer

OTHER_BASE = "it was trained on another base than this model"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "bias behind B": {"lora_bias": True, "init_lora_weights": False},
    "replaced": {"modules_to_save": ["norm"], "bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
}


def adapted(kind: str) -> tuple[Net, lt.Adapters]:
    model = net()
    handle = lt.attach(model, CONFIG.replace(**{"init_lora_weights": True, **KINDS[kind]}))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, handle


# -- another base ------------------------------------------------------------------------------------------------------


def nudge(model: Any) -> None:
    with torch.no_grad():
        model.blocks[1].v.weight[0, 0] += 0.1


def other_weights(model: Net) -> None:
    model.load_state_dict(net(seed=7).state_dict())


BASES: dict[str, Callable[[Net], object]] = {"one number": nudge, "all numbers": other_weights}


@pytest.mark.parametrize("other", BASES)
def test_another_base_is_refused_unless_told(tmp_path: Path, other: str) -> None:
    attached()[1].save(tmp_path)
    model = net()
    BASES[other](model)
    before = picture(model)
    with pytest.raises(AdapterFileError) as caught:
        lt.attach(model, tmp_path)
    assert caught.value.problems == (f"{tmp_path}: {OTHER_BASE}",)
    assert "any_base=True" in caught.value.hint
    assert picture(model) == before

    handle = lt.attach(model, CONFIG.replace(init_lora_weights=True))
    before = picture(model, handle)
    with pytest.raises(AdapterFileError, match=OTHER_BASE):
        handle.load(tmp_path, "second")
    assert picture(model, handle) == before
    handle.load(tmp_path, "second", any_base=True)
    handle.activate("second")
    assert bits(model(IDS)) != before["output"]


def test_the_same_base_is_known_again_in_other_states(tmp_path: Path) -> None:
    model, handle = attached()
    handle.merge()
    handle.save(tmp_path / "merged")
    handle.unmerge()
    with handle.disabled():
        handle.save(tmp_path / "disabled")
    for folder in ("merged", "disabled"):
        lt.attach(net(), tmp_path / folder)
        lt.attach(net(torch.bfloat16), tmp_path / folder)
        frozen = net().requires_grad_(False)
        lt.attach(frozen, tmp_path / folder)
    beside = attached("second")[1]
    beside.load(tmp_path / "merged", "third")
    assert bits(model(IDS)) == bits(attached()[0](IDS))


def test_the_base_is_known_after_it_was_given_up(tmp_path: Path) -> None:
    """Merged without keeping the base, an adapter still says on which base it stands."""
    _, handle = attached()
    handle.merge(keep_base=False)
    handle.save(tmp_path)
    lt.attach(net(), tmp_path)
    with pytest.raises(AdapterFileError, match=OTHER_BASE):
        lt.attach(net(seed=7), tmp_path)


def test_files_that_say_nothing_of_their_base_load_anywhere(tmp_path: Path) -> None:
    attached()[1].save(tmp_path)
    (tmp_path / "loratune.json").unlink()
    lt.attach(net(seed=7), tmp_path)


# -- another tokenizer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with-tokenizer")
    attached()[1].save(folder, tokenizer=tiny_tokenizer())
    return folder


def test_the_tokenizer_stands_beside_the_adapter(with_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(with_tokenizer)
    assert again.get_vocab() == tiny_tokenizer().get_vocab()
    assert again.chat_template == tiny_tokenizer().chat_template
    for tokenizer in (None, tiny_tokenizer(), again):
        model, handle = attached()
        handle.load(with_tokenizer, "second", tokenizer=tokenizer)
        handle.activate("second")
        assert bits(model(IDS)) == bits(attached()[0](IDS))


STRANGERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "vocabulary": ({"vocabulary": 300}, ["tokenizer"]),
    "template": ({"template": LLAMA3}, ["chat template"]),
    "no template": ({"template": None}, ["chat template"]),
    "both": ({"template": LLAMA3, "vocabulary": 300}, ["tokenizer", "chat template"]),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_another_tokenizer_is_refused(with_tokenizer: Path, stranger: str) -> None:
    settings, words = STRANGERS[stranger]
    model, handle = attached()
    before = picture(model, handle)
    with pytest.raises(AdapterFileError) as caught:
        handle.load(with_tokenizer, "second", tokenizer=tiny_tokenizer(**settings))
    where = str(with_tokenizer)
    assert caught.value.problems == tuple(f"{where}: it was trained with another {word}" for word in words)
    assert caught.value.hint == "take the tokenizer that stands beside the adapter"
    assert picture(model, handle) == before


def test_another_base_and_tokenizer_are_said_together(with_tokenizer: Path) -> None:
    handle = lt.attach(net(seed=7), CONFIG)
    with pytest.raises(AdapterFileError) as caught:
        handle.load(with_tokenizer, "second", tokenizer=tiny_tokenizer(LLAMA3, vocabulary=300))
    assert len(caught.value.problems) == 3
    with pytest.raises(AdapterFileError) as caught:
        handle.load(with_tokenizer, "second", tokenizer=tiny_tokenizer(LLAMA3, vocabulary=300), any_base=True)
    assert len(caught.value.problems) == 2
    assert handle.names == ("default",)


def test_one_saved_without_a_tokenizer_takes_any(tmp_path: Path) -> None:
    attached()[1].save(tmp_path)
    handle = attached()[1]
    handle.load(tmp_path, "second", tokenizer=tiny_tokenizer(LLAMA3, vocabulary=300))


# -- adapters as values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_attached_and_loaded_like_a_folder(tmp_path: Path, kind: str) -> None:
    model, handle = adapted(kind)
    expected = bits(model(IDS))
    other = net()
    theirs = lt.attach(other, handle.saved())
    assert theirs.parameters() == []
    assert bits(other(IDS)) == expected
    handle.load(handle.saved(), "second")
    handle.activate("second")
    assert bits(model(IDS)) == expected
    handle.save(tmp_path / "first", "default")
    theirs.save(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_a_value_of_another_base_is_refused() -> None:
    saved = attached()[1].saved()
    with pytest.raises(AdapterFileError) as caught:
        lt.attach(net(seed=7), saved)
    assert caught.value.problems == (f"the adapter: {OTHER_BASE}",)


@pytest.mark.parametrize("kind", ["plain", "dora", "replaced"])
def test_training_a_loaded_value_leaves_the_other_alone(kind: str) -> None:
    model, handle = adapted(kind)
    expected = bits(model(IDS))
    handle.load(handle.saved(), "second", trainable=True)
    with torch.no_grad():
        for parameter in handle.parameters("second"):
            parameter.add_(1.0)
    assert bits(model(IDS)) == expected


@pytest.mark.parametrize("what", [{"r": 2}, 3, None, CONFIG.model_dump])
def test_what_describes_no_adapter_is_refused(what: Any) -> None:
    model = net()
    before = picture(model)
    with pytest.raises(ConfigError, match="describes no adapter"):
        lt.attach(model, what)
    assert picture(model) == before
