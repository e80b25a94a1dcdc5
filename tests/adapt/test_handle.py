"""The handle's verbs, and that each refusal leaves everything unchanged (BEHAVIOUR 6, 18 to 20)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loratune as lt
from loratune.errors import AdapterStateError, LoratuneError, MergedError, TargetError
from tests.adapt.model import CONFIG, IDS, attached, bits, net, picture


def outputs(model: nn.Module, handle: lt.Adapters, *sets: tuple[str, ...]) -> list[bytes]:
    found = []
    for names in sets:
        handle.activate(*names)
        found.append(bits(model(IDS)))
    return found


def test_deltas_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4))
    config = lt.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    handle = lt.attach(model, config, name="a")
    handle.add(config.replace(r=3, lora_alpha=1), "b")
    x = torch.randn(7, 5)
    handle.activate()
    base = model(x)
    parts = []
    for name in ("a", "b"):
        handle.activate(name)
        parts.append(model(x) - base)
    handle.activate("a", "b")
    assert torch.allclose(model(x), base + parts[0] + parts[1], atol=1e-6)
    handle.activate("b", "a", "b")
    assert handle.active == ("b", "a")
    assert torch.allclose(model(x), base + parts[0] + parts[1], atol=1e-6)


def test_add_is_not_yet_active_and_switching_is_exact() -> None:
    model, handle = attached()
    before = bits(model(IDS))
    handle.add(CONFIG, "second")
    assert handle.names == ("default", "second")
    assert handle.active == ("default",)
    assert bits(model(IDS)) == before
    default, second, none, both, again = outputs(
        model, handle, ("default",), ("second",), (), ("default", "second"), ("default",)
    )
    assert default == before == again
    assert none == bits(net()(IDS))
    assert len({default, second, none, both}) == 4


def test_an_adapter_on_other_modules_leaves_the_rest_alone() -> None:
    model, handle = attached()
    handle.add(CONFIG.replace(target_modules=["head"]), "head")
    handle.activate("head")
    x = torch.randn(2, 6)
    plain = net()
    assert torch.equal(model.blocks[0](x), plain.blocks[0](x))
    assert not torch.equal(model.head(x), plain.head(x))
    assert set(handle.factors("head")) == {"head"}


def test_switching_touches_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = attached("second")[1]

    def touched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a module was touched")

    for name in ("__getattr__", "__setattr__", "modules", "named_modules", "children", "parameters", "apply", "train"):
        monkeypatch.setattr(nn.Module, name, touched)
    monkeypatch.setattr(handle, "model", None)
    monkeypatch.setattr(handle, "_placement", None)
    handle.activate("second")
    with handle.disabled():
        handle.activate("default")
    handle.activate("default", "second")
    handle.activate()
    monkeypatch.undo()
    assert handle.active == ()


def test_disabled_restores_what_was() -> None:
    model, handle = attached("second")
    base = bits(net()(IDS))
    for names in ((), ("default",), ("second", "default")):
        handle.activate(*names)
        before = bits(model(IDS))
        with handle.disabled():
            assert bits(model(IDS)) == base
            with handle.disabled():
                assert handle.active == ()
            assert handle.active == ()
        assert handle.active == names
        with pytest.raises(KeyError), handle.disabled():
            raise KeyError
        assert bits(model(IDS)) == before


def test_names_changed_inside_a_disabled_block() -> None:
    model, handle = attached("second")
    before = bits(model(IDS))
    with handle.disabled():
        handle.rename("default", "renamed")
        with pytest.raises(AdapterStateError, match="'renamed' is active"):
            handle.remove("renamed")
        handle.remove("second")
    assert handle.active == ("renamed",)
    assert bits(model(IDS)) == before


def test_load_is_frozen_unless_told(tmp_path: Path) -> None:
    model, handle = attached()
    handle.save(tmp_path)
    before = picture(model, handle)
    handle.load(tmp_path, "loaded")
    handle.load(tmp_path, "trains", trainable=True)
    assert handle.parameters("loaded") == []
    assert len(handle.parameters("trains")) == 8
    assert outputs(model, handle, ("loaded",), ("trains",)) == [before["output"]] * 2
    assert {p.requires_grad for p in lt.attach(net(), tmp_path).model.parameters()} == {False}
    assert len(lt.attach(net(), tmp_path, trainable=True).parameters()) == 8
    assert lt.attach(net(), CONFIG, trainable=False).parameters() == []


def test_others_are_never_touched(tmp_path: Path) -> None:
    model, handle = attached("second")
    handle.freeze("second")
    handle.save(tmp_path, "second")

    def of(name: str) -> list[tuple[int, bytes, bool]]:
        low_ranks = handle.factors(name).values()
        return [(id(p), bits(p), p.requires_grad) for low_rank in low_ranks for p in low_rank.parameters()]

    before = of("default"), of("second")
    base = {n: (id(p), bits(p), p.requires_grad) for n, p in model.named_parameters() if ".lora." not in n}
    handle.add(CONFIG, "third")
    handle.load(tmp_path, "fourth")
    handle.activate("third", "fourth")
    handle.freeze("third")
    handle.unfreeze("fourth")
    handle.rename("fourth", "fifth")
    handle.activate("second")
    handle.remove("third")
    handle.merge()
    handle.unmerge()
    with handle.disabled():
        pass
    assert (of("default"), of("second")) == before
    assert {n: (id(p), bits(p), p.requires_grad) for n, p in model.named_parameters() if ".lora." not in n} == base


def test_freeze_and_unfreeze_whatever_is_active() -> None:
    model, handle = attached("second")
    handle.freeze("second")
    assert handle.parameters("second") == []
    assert len(handle.parameters()) == len(handle.parameters("default")) == 8
    model(IDS).sum().backward()
    handle.unfreeze("second")
    assert len(handle.parameters()) == 16
    handle.activate("second")
    for parameter in handle.parameters():
        parameter.grad = None
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in handle.parameters("second"))
    assert all(p.grad is None for p in handle.parameters("default"))


def test_rename() -> None:
    model, handle = attached("second")
    before = bits(model(IDS))
    handle.rename("default", "first")
    assert handle.names == ("first", "second"), "in its place"
    assert handle.active == ("first",)
    assert bits(model(IDS)) == before
    assert handle.config("first") == CONFIG
    assert any(".lora.first.A" in key for key in model.state_dict())
    assert not any(".lora.default." in key for key in model.state_dict())


def test_remove() -> None:
    model, handle = attached("second")
    keys = {key for key in model.state_dict() if ".lora.second." not in key}
    handle.remove("second")
    assert set(model.state_dict()) == keys
    assert handle.names == ("default",)
    handle.activate()
    handle.remove("default")
    assert not any("lora" in key for key in model.state_dict())
    assert type(model.blocks[0].q) is nn.Linear
    with pytest.raises(AdapterStateError, match="no adapter left"):
        handle.save("anywhere")
    handle.add(CONFIG, "default")
    handle.activate("default")
    assert len(handle.factors()) == 4


def test_which_one_is_meant() -> None:
    _, handle = attached()
    handle.activate()
    assert len(handle.factors()) == 4, "the only one"
    handle.add(CONFIG.replace(target_modules=["head"]), "second")
    with pytest.raises(AdapterStateError, match="which adapter"):
        handle.factors()
    handle.activate("second")
    assert list(handle.factors()) == ["head"], "the only active one"


def test_param_groups() -> None:
    _, handle = attached("second")
    handle.freeze("second")
    (group,) = handle.param_groups(0.1, weight_decay=0.01)
    assert {id(p) for p in group["params"]} == {id(p) for p in handle.parameters()}
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.01)
    a, b = handle.param_groups(0.1, lora_plus_ratio=16.0)
    assert {tuple(p.shape) for p in a["params"]} == {(2, 6)}
    assert {tuple(p.shape) for p in b["params"]} == {(6, 2)}
    assert (a["lr"], b["lr"]) == (0.1, pytest.approx(1.6))
    assert len(a["params"]) == len(b["params"]) == 4
    torch.optim.AdamW(handle.param_groups(0.1, lora_plus_ratio=16.0)).step()


def test_counts_and_summary() -> None:
    _, handle = attached("second")
    base = sum(p.numel() for p in net().parameters())
    each = 4 * 2 * (6 + 6)
    assert handle.count() == (2 * each, base + 2 * each)
    assert handle.count().share == 2 * each / (base + 2 * each)
    handle.freeze("second")
    assert handle.count().trainable == each
    lines = handle.summary().splitlines()
    share = each / (base + 2 * each)
    assert lines[0] == f"trainable {each:,} of {base + 2 * each:,} ({share:.2%})"
    assert lines[1] == f"default (active): {each} in 4 modules"
    assert any(line.startswith("second (not active)") for line in lines)
    assert any(line.split() == ["q", "2", "×", "(6", "×", "6),", "r=2:", "24", "each,", "48"] for line in lines)


# -- refusals ----------------------------------------------------------------------------------------------------------

# What is refused with `default` active and `second` beside it.
REFUSED: dict[str, tuple[Callable[[lt.Adapters, Path], object], str]] = {
    "add: name taken": (lambda h, _: h.add(CONFIG, "second"), "there already"),
    "add: no such target": (lambda h, _: h.add(CONFIG.replace(target_modules=["w"]), "x"), "matches no module"),
    "add: impossible name": (lambda h, _: h.add(CONFIG, "a.b"), "cannot name"),
    "load: name taken": (lambda h, p: h.load(p, "second"), "there already"),
    "load: no folder": (lambda h, p: h.load(p / "nowhere", "x"), "no such folder"),
    "activate: unknown": (lambda h, _: h.activate("default", "secnd"), "did you mean 'second'?"),
    "freeze: unknown": (lambda h, _: h.freeze("third"), "no adapter 'third'"),
    "unfreeze: unknown": (lambda h, _: h.unfreeze("third"), "no adapter 'third'"),
    "rename: unknown": (lambda h, _: h.rename("third", "fourth"), "no adapter 'third'"),
    "rename: taken": (lambda h, _: h.rename("default", "second"), "there already"),
    "rename: to itself": (lambda h, _: h.rename("default", "default"), "there already"),
    "rename: impossible name": (lambda h, _: h.rename("default", "items"), "cannot name"),
    "remove: unknown": (lambda h, _: h.remove("third"), "no adapter 'third'"),
    "remove: active": (lambda h, _: h.remove("default"), "is active"),
    "parameters: unknown": (lambda h, _: h.parameters("third"), "no adapter 'third'"),
    "save: unknown": (lambda h, p: h.save(p / "x", "third"), "no adapter 'third'"),
    "unmerge: nothing merged": (lambda h, _: h.unmerge(), "nothing is merged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_changes_nothing(tmp_path: Path, case: str) -> None:
    model, handle = attached("second")
    handle.save(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    before = picture(model, handle)
    act, message = REFUSED[case]
    with pytest.raises((AdapterStateError, TargetError, LoratuneError), match=None) as caught:
        act(handle, tmp_path)
    assert message in str(caught.value)
    assert picture(model, handle) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == files


OF_VALUES: dict[str, Callable[[lt.Adapters, Path], object]] = {
    "save": lambda handle, place: handle.save(place / "new"),
    "saved": lambda handle, _: handle.saved(),
    "merge": lambda handle, _: handle.merge(),
    "merge for good": lambda handle, _: handle.merge(keep_base=False),
    "load": lambda handle, place: handle.load(place / "old", "other"),
}


@pytest.mark.parametrize("verb", OF_VALUES)
def test_shapes_without_values_are_refused(tmp_path: Path, verb: str) -> None:
    attached()[1].save(tmp_path / "old")
    model = net().to("meta")
    handle = lt.attach(model, CONFIG)
    parameters = dict(model.named_parameters())
    with pytest.raises(AdapterStateError, match=r"embed\.weight and \d+ more on the meta device") as caught:
        OF_VALUES[verb](handle, tmp_path)
    assert "load the model with its weights" in caught.value.hint
    assert (handle.names, handle.active, handle.merged) == (("default",), ("default",), False)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_an_adapter_without_values_on_a_base_with_them_is_not_written(tmp_path: Path) -> None:
    _, handle = attached()
    for low_rank in handle.factors().values():
        low_rank.to("meta")
    with pytest.raises(LoratuneError, match=r"blocks\.0\.q: A is on the meta device and holds no values"):
        handle.save(tmp_path / "new")
    with pytest.raises(AdapterStateError, match="on the meta device"):
        handle.merge()
    assert not list(tmp_path.iterdir())


def test_merging_nothing_and_merging_in_a_disabled_block_are_refused() -> None:
    model, handle = attached("second")
    handle.activate()
    before = picture(model, handle)
    with pytest.raises(AdapterStateError, match="no adapter is active"):
        handle.merge()
    assert picture(model, handle) == before
    handle.activate("default")
    before = picture(model, handle)
    with handle.disabled():
        handle.activate("second")
        with pytest.raises(AdapterStateError, match="disabled"):
            handle.merge()
    assert picture(model, handle) == before


MERGED: dict[str, Callable[[lt.Adapters, Path], object]] = {
    "add": lambda h, _: h.add(CONFIG, "third"),
    "load": lambda h, p: h.load(p, "third"),
    "activate": lambda h, _: h.activate("second"),
    "activate the same": lambda h, _: h.activate("default"),
    "activate none": lambda h, _: h.activate(),
    "disabled": lambda h, _: h.disabled().__enter__(),
    "merge": lambda h, _: h.merge(),
    "rename": lambda h, _: h.rename("second", "third"),
    "rename the merged one": lambda h, _: h.rename("default", "third"),
    "remove": lambda h, _: h.remove("second"),
    "remove the merged one": lambda h, _: h.remove("default"),
}


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("verb", MERGED)
def test_while_merged_all_of_these_are_refused(tmp_path: Path, verb: str, keep_base: bool) -> None:
    model, handle = attached("second")
    handle.save(tmp_path)
    handle.merge(keep_base=keep_base)
    before = picture(model, handle)
    with pytest.raises(MergedError, match="adapter 'default' is merged into the weights") as caught:
        MERGED[verb](handle, tmp_path)
    assert caught.value.hint == "unmerge first"
    assert picture(model, handle) == before


def test_while_merged_reading_is_allowed(tmp_path: Path) -> None:
    _, handle = attached("second")
    handle.save(tmp_path / "before")
    handle.merge()
    handle.save(tmp_path / "merged")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes()
    assert (handle.merged, handle.active, handle.names) == (True, ("default",), ("default", "second"))
    assert "default (active)" in handle.summary()


def test_a_list_in_place_of_names_is_refused() -> None:
    handle = lt.attach(net(), lt.LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(AdapterStateError, match="is a string"):
        handle.activate(["default"])  # type: ignore[arg-type]
    assert handle.active == ("default",)
