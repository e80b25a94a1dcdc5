"""`PeftModel`: the module that PEFT wraps around a model, as a thin layer over the handle."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from loratune.adapt import Adapters, attach
from loratune.adapt.heads import task_of_class
from loratune.adapter import read_adapter, to_keys
from loratune.compat.peft.config import LoraConfig, PeftType, folder_of, plain, refuse
from loratune.compat.peft.state import all_matched, read_state, write_state
from loratune.compat.peft.status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from loratune.compat.peft.tuner import LoraModel, dtype_for
from loratune.errors import ConfigError

# PEFT's class for each task.
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {}

# The adapter that is saved in the folder itself; others get a folder of their own in it.
DEFAULT = "default"

# What PEFT calls the model with adapters of a method.
_MODELS = {PeftType.LORA: "LoraModel", PeftType.VERA: "VeraModel", PeftType.IA3: "IA3Model"}


class PeftModel(nn.Module):
    """A model with adapters under PEFT's names.

    What is not found here is looked up in `base_model` and then in the user's model, which is `base_model.model`.
    """

    # Read by transformers' Trainer: without it a quantised base is refused as one that nothing was added to.
    _hf_peft_config_loaded = True

    def __init_subclass__(cls, task: str | None = None) -> None:
        super().__init_subclass__()
        if task is not None:
            MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task] = cls

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = DEFAULT,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        del low_cpu_mem_usage  # saves memory in PEFT's way of building; here nothing is built twice
        dtype = dtype_for(model, autocast_adapter_dtype=autocast_adapter_dtype)
        frozen = getattr(peft_config, "inference_mode", False)
        attach(model, plain(peft_config), name=adapter_name, trainable=not frozen, dtype=dtype)
        self._wrap(model)

    def _wrap(self, model: nn.Module) -> None:
        """Stand around a model that has a handle."""
        nn.Module.__init__(self)
        self.training = model.training
        self.base_model = LoraModel(model)

    @classmethod
    def around(cls, model: nn.Module) -> Self:
        """This class around a model that has a handle already."""
        self = cls.__new__(cls)
        self._wrap(model)
        return self

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """A model with a saved adapter, frozen and in evaluation mode unless `is_trainable`.

        Raises:
            ConfigError: `config` differs from the one in the folder, or an argument is not offered.
            AdapterFileError: the files are damaged or do not fit the model, which is unchanged.
        """
        del low_cpu_mem_usage
        refuse({"key_mapping": key_mapping, "ephemeral_gpu_offload": ephemeral_gpu_offload})
        folder = folder_of(model_id, kwargs)
        there = LoraConfig.from_pretrained(folder)
        if config is not None and plain(config) != plain(there):
            raise ConfigError(
                f"config differs from the one in {folder}", hint="the folder's own is read; leave config out"
            )
        dtype = dtype_for(model, autocast_adapter_dtype=autocast_adapter_dtype)
        attach(model, folder, name=adapter_name, trainable=is_trainable, dtype=dtype)
        wrapped = class_for(model, there.task_type, otherwise=cls).around(model)
        return wrapped if is_trainable else wrapped.eval()

    # -- the base ------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not there yet
                raise
            return getattr(self.base_model, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # `isinstance` asks an object's type first and this second, as for `unittest.mock`. transformers' Trainer calls
        # `save_pretrained` of a `PreTrainedModel` or of peft's own class, and writes the whole base of anything else.
        wrapped = self.__dict__.get("_modules", {}).get("base_model")
        return type(self) if wrapped is None else type(wrapped.model)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (type(self),), self.__dict__

    def _get_name(self) -> str:
        # By this name transformers' Trainer decides whether label smoothing shifts the labels.
        return type(self.get_base_model()).__name__

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def get_base_model(self) -> nn.Module:
        """The user's model itself."""
        return self.base_model.model

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base's forward; `adapter_names` gives each row of the batch its adapter, "__base__" none."""
        if adapter_names is None:
            return self.get_base_model()(*args, **kwargs)
        with self.base_model.rows(adapter_names):
            return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        base: Any = self.get_base_model()
        if adapter_names is None:
            return base.generate(*args, **kwargs)
        # Rows are repeated side by side before the first step.
        repeats = max(kwargs.get(name) or 1 for name in ("num_beams", "num_return_sequences"))
        with self.base_model.rows(adapter_names, repeats):
            return base.generate(*args, **kwargs)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Asked by transformers' Trainer, which divides the loss itself where the base takes no count of tokens."""
        base: Any = self.get_base_model()
        if hasattr(base, "accepts_loss_kwargs"):
            return bool(base.accepts_loss_kwargs)
        parameters = inspect.signature(base.forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    @property
    def base_model_torch_dtype(self) -> Any:
        return getattr(self.get_base_model(), "dtype", None)

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def _handle(self) -> Adapters:
        return self.base_model.handle

    @property
    def peft_type(self) -> PeftType:
        return PeftType(next(iter(self.peft_config.values())).peft_type)

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        return self.base_model.peft_config

    @property
    def active_peft_config(self) -> LoraConfig:
        return self.peft_config[self.base_model.active_adapters[0]]

    @property
    def active_adapter(self) -> str | list[str]:
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def modules_to_save(self) -> set[str] | None:
        wholes = [getattr(config, "modules_to_save", None) or () for config in self.peft_config.values()]
        return {name for names in wholes for name in names} or None

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Parameters that train, and all there are."""
        count = self._handle.count()
        return count.trainable, count.total

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        sys.stdout.write(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}\n")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of each adapted layer."""
        base = self.base_model
        return layer_status(self._handle, base.active_adapters, enabled=not base.adapters_disabled, under="model.")

    def get_model_status(self) -> TunerModelStatus:
        """The state of all adapted layers together."""
        trainable, total = self.get_nb_trainable_parameters()
        return model_status(
            self.get_layer_status(),
            base_model_type=type(self.get_base_model()).__name__,
            adapter_model_type=_MODELS[self.peft_type],
            peft_types={name: config.peft_type for name, config in self.peft_config.items()},
            trainable_params=trainable,
            total_params=total,
        )

    def get_adapter_state_dict(self, adapter_name: str = DEFAULT) -> dict[str, Tensor]:
        """The adapter's tensors under the names of PEFT's files."""
        return read_state(self._handle, adapter_name)

    # -- adapters ------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """One more fresh adapter, frozen until `set_adapter` makes it the active one."""
        del low_cpu_mem_usage
        dtype = dtype_for(self.get_base_model(), autocast_adapter_dtype=autocast_adapter_dtype)
        self._handle.add(plain(peft_config), adapter_name, dtype=dtype)
        self._handle.freeze(adapter_name)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """One more adapter from a folder, not active; into the adapter of that name where there is one.

        Returns:
            PEFT's pair of missing and unexpected keys, both empty: such files are refused.
        """
        del torch_device, low_cpu_mem_usage  # tensors go to where their layer is
        refuse({"key_mapping": key_mapping, "ephemeral_gpu_offload": ephemeral_gpu_offload})
        folder = folder_of(model_id, kwargs)
        handle = self._handle
        if adapter_name in handle.names:
            result = write_state(handle, adapter_name, to_keys(read_adapter(folder)), strict=True)
        else:
            dtype = dtype_for(self.get_base_model(), autocast_adapter_dtype=autocast_adapter_dtype)
            handle.load(folder, adapter_name, trainable=is_trainable, dtype=dtype)
            result = all_matched()
        if not is_trainable:
            self.eval()
        return result

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate this adapter and no other; it trains unless `inference_mode`, the others are frozen."""
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base alone inside the block."""
        with self.base_model.disabled():
            yield

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters in PEFT's files: "default" into the folder, each other into a folder of its name there."""
        asked = {
            **kwargs,
            "save_embedding_layers": save_embedding_layers is True,
            "path_initial_model_for_weight_conversion": path_initial_model_for_weight_conversion,
        }
        refuse(asked)
        if not safe_serialization:
            raise ConfigError("safe_serialization=False would write a pickle, which can run code when it is read")
        names = list(self._handle.names) if selected_adapters is None else selected_adapters
        for name in names:
            self._handle.config(name)  # an unknown one is refused before any is written
        if is_main_process:
            for name in names:
                self._handle.save(Path(save_directory) / (name if name != DEFAULT else ""), name)


def _blank(kind: type[PeftModel]) -> PeftModel:
    return kind.__new__(kind)


def class_for(model: nn.Module, task_type: str | None, *, otherwise: type[PeftModel] = PeftModel) -> type[PeftModel]:
    """PEFT's class for a task, which where the config names none is the one that the model's own class tells."""
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task_type or task_of_class(model) or "", otherwise)
