"""A base from a hub: downloads that break off, no network, and nothing asked for once training has begun.

Each run is a real process, and the hub is a real server; the files are those of a tiny Llama.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loratune as lt
from loratune.adapter import adapter_folder, read_adapter
from loratune.errors import AdapterFileError, ModelError
from loratune.model.hub import fetched
from loratune.run import open_run
from tests.hub import Hub, loratune

NAME = "someone/base"
QUICK = ("--max-steps=3", "--samples=0", "--checks=off", "--dtype=fp32")


@dataclass(frozen=True)
class Fetched:
    """A base that was fetched at the second attempt, and the run on it."""

    hub: Hub
    cache: Path
    run: Path
    data: str


@pytest.fixture(scope="module")
def after_a_break(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fetched]:
    folder = tmp_path_factory.mktemp("hub")
    run, cache = folder / "run", folder / "cache"
    with Hub({NAME: Path(base)}, late=(run / "record.json").exists) as hub:
        command = ("train", NAME, data, "--out", run, *QUICK)
        hub.cut_after = 20_000
        broken = loratune(*command, hub=hub, cache=cache)
        assert (broken.returncode, broken.stdout, run.exists()) == (1, "", False)
        assert "error someone/base: the download broke off: peer closed connection" in broken.stderr
        assert "hint: run the same command again" in broken.stderr
        assert "Traceback" not in broken.stderr
        hub.cut_after = None
        whole = loratune(*command, hub=hub, cache=cache)
        assert whole.returncode == 0, whole.stderr
        yield Fetched(hub, cache, run, data)


def test_the_same_command_again(after_a_break: Fetched) -> None:
    """What came whole is kept, the rest is fetched, and the record names the commit."""
    assert len(after_a_break.hub.of("/tokenizer.json")) == 1
    assert len(after_a_break.hub.of("/model.safetensors")) > 1
    base = json.loads((after_a_break.run / "record.json").read_text())["base"]
    assert (base["name"], base["source"], base["revision"]) == (NAME, "hub", after_a_break.hub.commit(NAME))


def test_training_and_saving_ask_for_nothing(after_a_break: Fetched) -> None:
    hub, run = after_a_break.hub, after_a_break.run
    assert json.loads((run / "record.json").read_text())["state"] == "finished"
    assert (run / "adapter_model.safetensors").is_file()
    assert [request for request in hub.requests if request.late] == []
    assert hub.late(), "what comes now would be late"


def test_offline_asks_for_nothing(after_a_break: Fetched, tmp_path: Path) -> None:
    hub, cache = after_a_break.hub, after_a_break.cache
    asked = len(hub.requests)
    done = loratune("eval", after_a_break.run, "--data", after_a_break.data, hub=hub, cache=cache, offline=True)
    assert done.returncode == 0, done.stderr
    assert len(hub.requests) == asked


@pytest.mark.full
@pytest.mark.parametrize("command", ["merge", "export", "reproduce", "train"])
def test_every_command_offline(command: str, after_a_break: Fetched, tmp_path: Path) -> None:
    hub, cache, run = after_a_break.hub, after_a_break.cache, after_a_break.run
    words: dict[str, tuple[object, ...]] = {
        "merge": (run, "--out", tmp_path / "merged"),
        "export": (run, "--to", "vllm", "--out", tmp_path / "exported"),
        "reproduce": (run,),
        "train": (NAME, after_a_break.data, "--out", tmp_path / "run", *QUICK),
    }
    asked = len(hub.requests)
    done = loratune(command, *words[command], hub=hub, cache=cache, offline=True)
    assert done.returncode == 0, done.stderr
    assert len(hub.requests) == asked


# -- in this process -----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The only hub there is, reachable, and an empty cache."""
    with Hub({NAME: Path(base)}) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def test_small_files_alone(hub: Hub) -> None:
    folder = fetched(NAME, weights=False)
    assert (folder / "config.json").is_file()
    assert hub.of(".safetensors") == []
    assert sorted(p.name for p in fetched(NAME, weights=True).iterdir()) == sorted(
        p.name for p in hub.models[NAME].iterdir()
    )


def test_other_formats_are_left_there(hub: Hub, tmp_path: Path) -> None:
    """Nor the same weights under another name, nor what stands in folders."""
    more = tmp_path / "more"
    shutil.copytree(hub.models[NAME], more)
    for other in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", "flax_model.msgpack"):
        (more / other).write_bytes(b"weights")
    hub.models[NAME] = more
    folder = fetched(NAME, weights=True)
    assert {path.name for path in folder.iterdir()} == {path.name for path in Path(more).iterdir()} - {
        "consolidated.safetensors",
        "pytorch_model.bin",
        "model.gguf",
        "flax_model.msgpack",
    }


def test_pickled_weights_where_there_are_no_others(hub: Hub, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(hub.models[NAME], pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    hub.models[NAME] = pickled
    assert (fetched(NAME, weights=True) / "pytorch_model.bin").is_file()


@pytest.mark.parametrize("weights", [False, True])
def test_no_such_model(weights: bool, hub: Hub) -> None:
    with pytest.raises(ModelError, match="someone/bose: no such folder, and nothing of this name on the hub"):
        fetched("someone/bose", weights=weights)


def test_gated_model(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(ModelError, match="someone/base: access has to be asked for"):
        fetched(NAME, weights=True)


def test_hub_out_of_reach(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"not all of it is in the cache .*, and http://127.0.0.1:9 cannot be reached"):
        fetched(NAME, weights=True)


def test_offline_without_a_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"not all of it is in the cache .*, and HF_HUB_OFFLINE forbids to fetch it"):
        fetched(NAME, weights=True)
    assert hub.requests == []


def test_offline_with_part_of_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `loratune plan` leaves it, which reads no weights."""
    fetched(NAME, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert (fetched(NAME, weights=False) / "tokenizer.json").is_file()
    with pytest.raises(ModelError, match="someone/base: no such folder, and not all of it is in the cache"):
        fetched(NAME, weights=True)
    assert len(hub.requests) == asked


def test_a_shard_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    shutil.copytree(hub.models[NAME], sharded)
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (name == names[0])}-of-00002.safetensors" for name in names}
    save_file({name: tensors[name] for name in names[1:]}, sharded / "model-00001-of-00002.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    hub.models[NAME] = sharded
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors not in"):
        fetched(NAME, weights=True)
    save_file({names[0]: tensors[names[0]]}, sharded / "model-00002-of-00002.safetensors")
    assert len(list(fetched(NAME, weights=True).glob("model-*"))) == 2


def test_an_adapter_that_breaks_off(hub: Hub, base: str, tmp_path: Path) -> None:
    lora = lt.attach(AutoModelForCausalLM.from_pretrained(base), lt.LoraConfig(r=64, target_modules="all-linear"))
    lora.save(tmp_path / "adapter")
    hub.models["someone/adapter"] = tmp_path / "adapter"
    hub.cut_after = 20_000
    with pytest.raises(AdapterFileError, match=r"someone/adapter: .*peer closed connection"):
        adapter_folder("someone/adapter")
    hub.cut_after = None
    assert read_adapter(adapter_folder("someone/adapter")).factors


def test_a_command_on_an_adapter_that_breaks_off(hub: Hub, base: str, tmp_path: Path) -> None:
    """It is no model of that name, and what the adapter needs is not guessed from the base alone."""
    lora = lt.attach(AutoModelForCausalLM.from_pretrained(base), lt.LoraConfig(r=64, target_modules="all-linear"))
    lora.save(tmp_path / "adapter")
    hub.models["someone/adapter"] = tmp_path / "adapter"
    hub.cut_after = 20_000
    with pytest.raises(AdapterFileError, match="someone/adapter: the download broke off"):
        open_run("someone/adapter", base=base)


def test_files_of_tokenizers_are_fetched(hub: Hub, tmp_path: Path) -> None:
    """Those of Marian, PhoBERT and ProphetNet have names of their own."""
    more = tmp_path / "more"
    shutil.copytree(hub.models[NAME], more)
    for own in ("source.spm", "vocab.txt", "bpe.codes", "prophetnet.tokenizer", "spiece.model", "merges.txt"):
        (more / own).write_text("words")
    hub.models[NAME] = more
    assert {path.name for path in fetched(NAME, weights=True).iterdir()} == {path.name for path in more.iterdir()}
