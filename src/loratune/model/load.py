"""A base model and its tokenizer from a hub id, a folder or a GGUF file."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from loratune.config.tasks import is_head
from loratune.errors import ConfigError, MissingExtraError, ModelError
from loratune.files import cache_folder, locked, new_folder
from loratune.model.agreement import not_found, refuse_incomplete, refuse_more_layers, say_unused
from loratune.model.allocator import give_freed_memory_back
from loratune.model.device import Precision, kind_of_device, pick_device, pick_dtype
from loratune.model.fingerprint import fingerprint
from loratune.model.hub import KINDS, fetched
from loratune.model.kept_products import keep_few_products
from loratune.model.quiet import quietly
from loratune.model.task import LANGUAGE_MODEL, Head, fresh_modules, inside, is_loaded, refuse_loaded
from loratune.quant import known_by, quantize, quantized_format, refuse_format


@dataclass(frozen=True)
class Base:
    """A frozen model ready to be adapted.

    Attributes:
        name: what the user called it; written into adapters as their base.
        fingerprint: tells one base from another, whatever the dtype and the format of its weights.
        quant: the format in which its linear layers are kept, or None where they are dense.
        head: what it is loaded as. fresh: paths of the modules that its files say nothing of, which have to train.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    source: str
    revision: str | None
    precision: Precision
    device: torch.device
    fingerprint: str
    quant: str | None = None
    head: Head = LANGUAGE_MODEL
    fresh: tuple[str, ...] = ()

    @property
    def pad_id(self) -> int:
        """What padding holds; masked by position, so that any id would do but for a decoder with a head.

        That looks for a row's last token which is not its config's pad.
        """
        pad = self.model.config.pad_token_id if self.head.labels else self.tokenizer.pad_token_id
        return int(pad) if pad is not None else 0


def load_base(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    quant: str | None = None,
    keep_originals: bool = False,
    head: Head = LANGUAGE_MODEL,
) -> Base:
    """Load a base for adaptation: evaluation mode, frozen, every weight present and finite.

    Args:
        quant: a format of `loratune.quant.FORMATS` in which its linear layers are kept; the head, embeddings and norms
            stay in `dtype`, and so does what is computed.
        keep_originals: hold on to the weights before quantisation, for `init_lora_weights="loftq"`.
        head: what it is loaded as. A head that its files have none of is drawn from `head.seed`.

    Raises:
        ModelError: not found, of an unsupported kind, incomplete, or holding NaN. ConfigError: no such format, or not
            on this device.
    """
    keep_few_products()
    where = pick_device(device)
    if quant is not None:
        refuse_format(quant, where.type)
    precision = pick_dtype(dtype, where)
    source = _source_of(name, weights=True)
    with quietly(), _as_model_error(name):
        model, info = _load(source.folder, head, dtype=precision.dtype)
    _refuse_no_context(name, model)
    fresh = fresh_modules(model, not_found(info), head.task)
    refuse_incomplete(name, info, fresh)
    refuse_more_layers(name, info, model)
    say_unused(name, info, head)
    model.name_or_path = model.config._name_or_path = name
    tokenizer = _tokenizer_in(source, name)
    _name_pad(model, tokenizer, head)
    known = fingerprint((path, tensor) for path, tensor in model.named_parameters() if not inside(path, fresh))
    if quant is not None:
        heads = [path for path in model._modules if is_head(path, head.task)]
        quantize(model, quant, device=where, keep_originals=keep_originals, without=(*fresh, *heads))
        _let_go(model)
    move: Any = model.to
    move(where).eval().requires_grad_(False)
    return Base(model, tokenizer, name, source.kind, source.revision, precision, where, known, quant, head, fresh)


def _name_pad(model: PreTrainedModel, tokenizer: Any, head: Head) -> None:
    """A decoder with a head looks for each row's last token that is no pad, so that its config has to name the pad."""
    if head.labels and model.config.pad_token_id is None:
        # Where there is none, the end of a text, which no row has within: some vocabularies' 0 is a common token.
        given = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        model.config.pad_token_id = next(token for token in given if token is not None)


def _let_go(model: PreTrainedModel) -> None:
    """Give back what the dense weights took; tensors that are mapped from a file would keep all of it in memory."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    give_freed_memory_back()


def find_base(
    model: Any,
    tokenizer: Any = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    quant: str | None = None,
    keep_originals: bool = False,
    head: Head = LANGUAGE_MODEL,
) -> Base:
    """The base that `model` names, or is."""
    if is_loaded(model):
        _refuse_changing(model, dtype, device, quant)
        return base_of(model, tokenizer, head)
    options: dict[str, Any] = {"quant": quant, "keep_originals": keep_originals, "head": head}
    return load_base(os.fspath(model), dtype=dtype, device=device, **options)


def _refuse_changing(model: PreTrainedModel, dtype: str, device: str | None, quant: str | None) -> None:
    """A loaded model is somebody's: it is neither moved, cast nor quantised, and told to be otherwise it is refused."""
    problems = []
    where = next(model.parameters()).device
    elsewhere = device is not None and kind_of_device(device) != where.type
    if elsewhere or (device not in (None, where.type) and torch.device(str(device)) != where):
        problems.append(f"device={device!r}: the loaded model is on {where}")
    if dtype != "auto" and pick_dtype(dtype, where).dtype != model.dtype:
        problems.append(f"dtype={dtype!r}: the loaded model is in {str(model.dtype).removeprefix('torch.')}")
    if quant is not None and quantized_format(model) != quant:
        problems.append(f"quant={quant!r}: the loaded model's weights are in {quantized_format(model) or 'full'}")
    if problems:
        raise ConfigError(problems, hint="move or cast it before, or leave the setting out")


def base_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, head: Head = LANGUAGE_MODEL
) -> Base:
    """A model that is loaded already, frozen in place; its tokenizer is found by its name where none is given."""
    refuse_loaded(model, head)
    keep_few_products()
    fresh = fresh_modules(model, (), head.task)
    device = next(model.parameters()).device
    name = str(model.name_or_path or type(model).__name__)
    _refuse_no_context(name, model)
    model.eval().requires_grad_(False)
    return Base(
        model,
        tokenizer or load_tokenizer(name),
        name,
        "memory",
        getattr(model.config, "_commit_hash", None),
        Precision(model.dtype, "the loaded model's"),
        device,
        fingerprint((path, tensor) for path, tensor in known_by(model.named_modules()) if not inside(path, fresh)),
        quantized_format(model),
        head,
        fresh,
    )


def load_tokenizer(name: str) -> Any:
    return _tokenizer_in(_source_of(name, weights=False), name)


def _tokenizer_in(source: _Source, name: str) -> Any:
    with quietly(), _as_model_error(name):
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)


def empty_model(name: str, head: Head = LANGUAGE_MODEL) -> PreTrainedModel:
    """The model's modules and shapes on the meta device: nothing but its config is read."""
    source = _source_of(name, weights=False)
    with quietly(), _as_model_error(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False, **head.config())
        model: PreTrainedModel = head.auto.from_config(config)
    _refuse_no_context(name, model)
    return model


def config_of(name: str) -> Any:
    """The config of a model, of which nothing else is read."""
    source = _source_of(name, weights=False)
    with quietly(), _as_model_error(name):
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)


def tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """SHA-256 of the vocabulary with its merges and special tokens, and of the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and (backend.truncation or backend.padding):
        # Files of sentence encoders have both, and every call of the tokenizer leaves them otherwise.
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = repr(sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items()))
    template = str(tokenizer.chat_template or "")
    return _sha256(content + special), _sha256(template)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens at which generation ends: the model's own and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return frozenset(int(i) for i in ids if i is not None)


def _load(folder: str, head: Head = LANGUAGE_MODEL, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    # The stubs of transformers do not know that output_loading_info makes it return a pair.
    load: Any = head.auto.from_pretrained
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(head.seed)
        model, info = load(
            folder,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            **head.config(),
            **options,
        )
    return model, info


def context_of(model: PreTrainedModel) -> int | None:
    """The most positions the model was made for, where its config says."""
    text = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        # XLNet's is a property, which says -1: there is no limit.
        if getattr(text, name, None) is not None and not isinstance(getattr(type(text), name, None), property):
            return int(getattr(text, name))
    return None


def _refuse_no_context(name: str, model: PreTrainedModel) -> None:
    length = context_of(model)
    if length is not None and length < 1:
        raise ModelError(f"{name}: its config says that it has {length} positions", hint="correct its config.json")


# -- sources -----------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """`folder`: what `from_pretrained` takes. `kind`: "folder", "gguf" or "hub", of which `revision` is the commit."""

    folder: str
    kind: str
    revision: str | None = None


def _source_of(name: str, *, weights: bool) -> _Source:
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        return _Source(str(_converted(path)), "gguf")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json, so it is no model folder", hint=_is_adapter(path))
        return _Source(str(path), "folder")
    if path.exists() or name.startswith((".", "/", "~")):
        raise ModelError(f"{name}: no such model folder", hint=KINDS)
    found = fetched(name, weights=weights)
    return _Source(str(found), "hub", found.name)


def _is_adapter(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return "it holds an adapter: name its base model instead"
    return "a model folder holds config.json and *.safetensors"


def _converted(path: Path) -> Path:
    """The folder of safetensors made from a GGUF file, kept in the cache under the file's hash."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    target = cache_folder() / "gguf" / _file_hash(path)[:24]
    if (target / "config.json").is_file():
        return target
    if not _has_gguf():
        raise MissingExtraError(
            f"{path} is a GGUF file, and the package 'gguf' that reads it is missing", hint="pip install gguf"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Processes that train together all come here at once.
    with locked(target.with_name(f".{target.name}.lock"), wait=True):
        if not (target / "config.json").is_file():
            _convert(path, target)
    return target


def _convert(path: Path, target: Path) -> None:
    # The converter draws a bar of its own on stderr, which no setting of transformers reaches.
    silence = redirect_stderr(io.StringIO())
    with quietly(), silence, _as_model_error(str(path)), new_folder(target) as folder:
        # Values become fp32, which holds every dequantised one exactly.
        model, info = _load(str(path.parent), gguf_file=path.name, dtype=torch.float32)
        refuse_incomplete(str(path), info)
        # transformers refuses to save a model that it believes to be quantised; this one no longer is.
        if hasattr(model, "hf_quantizer"):
            del model.hf_quantizer
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        # Among several processes transformers writes in the first alone; this one may be another machine's only one.
        vars(model)["should_save_on_this_rank"] = lambda _: True
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)


def _has_gguf() -> bool:
    from importlib.util import find_spec

    return find_spec("gguf") is not None


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# -- errors ------------------------------------------------------------------------------------------------------


@contextmanager
def _as_model_error(name: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except ImportError as error:
        raise MissingExtraError(f"{name}: {_first_line(error)}", hint="install the package it names") from error
    except Exception as error:
        hint = f"{KINDS} of a supported architecture"
        raise ModelError(f"{name}: cannot be loaded: {_first_line(error)}", hint=hint) from error


def _first_line(error: BaseException) -> str:
    """What a library says, on one line: it often needs a second line to say which name it missed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:400] or type(error).__name__
