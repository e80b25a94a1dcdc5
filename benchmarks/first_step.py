"""One training step from a data file, as a user would have it; prints the moment at which it was done.

python first_step.py ours|ours-unchecked|trl BASE DATA OUT
"""

from __future__ import annotations

import sys
import time


def ours(base: str, data: str, out: str, checks: str) -> None:
    import loratune as lt

    lt.train(base, data, out=out, r=16, max_steps=1, val=0, samples=0, checks=checks, listen=_listen)


def _listen(event: object) -> None:
    if type(event).__name__ == "StepDone":
        _done()


def trl(base: str, data: str, out: str) -> None:
    import datasets
    import peft
    import transformers
    import trl as library

    class Done(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            _done()

    library.SFTTrainer(
        model=base,
        args=library.SFTConfig(output_dir=out, max_steps=1, report_to="none", save_strategy="no", use_cpu=True),
        train_dataset=datasets.load_dataset("json", data_files=data, split="train"),
        peft_config=peft.LoraConfig(r=16, target_modules="all-linear"),
        callbacks=[Done()],
    ).train()


def _done() -> None:
    print(f"first step at {time.time()}", flush=True)


if __name__ == "__main__":
    who, *where = sys.argv[1:]
    if who == "trl":
        trl(*where)
    else:
        ours(*where, checks="off" if who == "ours-unchecked" else "fast")
