"""Resuming from checkpoints of adapters in transformers' Trainer, which knows PEFT's own class and no other.

Its checkpoints hold adapters without this too; only reading them again asks for PEFT's class.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratune.compat.peft.model import PeftModel


class AdapterCheckpoints:
    """Mixed in before the Trainer: `class MyTrainer(AdapterCheckpoints, Trainer)`.

    It resumes from its checkpoints and loads the best one, and they hold its tokenizer.
    """

    model: PeftModel
    args: Any
    state: Any
    processing_class: Any

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        self.model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if self.processing_class is not None and self.args.should_save:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        del model
        self._read(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._read(Path(self.state.best_model_checkpoint))

    def _read(self, folder: Path) -> None:
        for name in self.model.peft_config:
            # Trainable, so that the model stays in the mode it is in; what trains is not changed.
            self.model.load_adapter(folder / (name if name != "default" else ""), name, is_trainable=True)
