"""Writing answers with an adapter: tokens a second of one prompt alone, as in a chat, and of sixteen at once.

python benchmarks/decode.py            print the table, write benchmarks/results/decode.json
python benchmarks/decode.py --quick    does it run?

SmolLM2-135M with an adapter of rank 16 on all linear layers; function-calling questions, each with an answer of 64
tokens whatever it says. Ours in bf16, and with the base in eight and in four bits; beside it peft and `generate` of
transformers in bf16. Every side has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import weights
from comparison import RESULTS, say, write
from measuring import ratios, spread, surroundings
from workloads import demo_chats

TOKENS, PROMPTS, AT_ONCE, RANK, ROUNDS = 64, 16, (1, 16), 16, 3
Answering = Callable[[Sequence[list[int]], int], None]


def prompts(tokenizer: Any) -> list[list[int]]:
    texts = [
        tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        for messages in demo_chats()[:PROMPTS]
    ]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def ours(base: Path, adapter: Path, quant: str | None) -> Answering:
    from loratune.engine import Sampling, generate, make_ready
    from loratune.run.opened import open_run

    opened = open_run(str(adapter), base=str(base), dtype="bf16", quant=quant)
    make_ready(opened.base.model)

    def answer(asked: Sequence[list[int]], count: int) -> None:
        sampling = Sampling(max_new_tokens=count)
        generate(opened.base.model, opened.base.tokenizer, asked, frozenset(), sampling, batch_size=len(asked))

    return answer


def peft(base: Path, adapter: Path) -> Answering:
    import peft
    import torch

    model = weights.load_model(str(base), "bf16", "cpu")
    tuned: Any = peft.PeftModel.from_pretrained(model, str(adapter)).eval().bfloat16()

    def answer(asked: Sequence[list[int]], count: int) -> None:
        width = max(map(len, asked))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in asked])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in asked])
        tuned.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip

    return answer


SIDES: dict[str, Callable[[Path, Path], Answering]] = {
    "ours, bf16": partial(ours, quant=None),
    "ours, int8": partial(ours, quant="int8"),
    "ours, nf4": partial(ours, quant="nf4"),
    "peft, bf16": peft,
}


def measured(side: str, place: Path, *, quick: bool) -> dict[int, float]:
    """Tokens a second, by how many prompts are answered at once."""
    answer, asked = SIDES[side](place / "base", place / "adapter"), prompts(weights.tokenizer())
    found = {}
    for together in AT_ONCE:
        few = asked[: max(together, 2 if quick else 4)]
        answer(few[:together], 8)  # warms up
        begun = time.perf_counter()
        for start in range(0, len(few), together):
            answer(few[start : start + together], TOKENS)
        found[together] = len(few) * TOKENS / (time.perf_counter() - begun)
    return found


def table(result: dict[str, Any]) -> str:
    lines = [f"{'tokens/s':16}" + "".join(f"{f'{count} at once':>14}" for count in AT_ONCE)]
    for side, rates in result["tokens_per_second"].items():
        lines.append(f"{side:16}" + "".join(f"{rates[str(count)]['median']:>14.0f}" for count in AT_ONCE))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few answers: does it run?")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"(default {ROUNDS})")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="OMP_NUM_THREADS (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"where the result goes (default {RESULTS.name})")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "PLACE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.one[0], Path(given.one[1]), quick=given.quick)))
        return
    os.environ |= {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        base = weights.write_base(weights.REAL, place / "base")
        weights.write_adapter(base, place / "adapter", r=RANK, alpha=2 * RANK)
        found: dict[str, dict[str, list[float]]] = {side: {str(n): [] for n in AT_ONCE} for side in SIDES}
        for number in range(1 if given.quick else given.rounds):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                say(f"round {number + 1}: {side}")
                command = [sys.executable, __file__, "--one", side, folder, *(["--quick"] if given.quick else [])]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                for count, rate in json.loads(done.stdout.splitlines()[-1]).items():
                    found[side][count].append(rate)
    result = {
        "work": {"rank": RANK, "prompts": PROMPTS, "tokens": TOKENS},
        "tokens_per_second": {
            side: {count: spread(several) for count, several in rates.items()} for side, rates in found.items()
        },
        "ratios": {
            side: {count: ratios(rates[count], found["peft, bf16"][count]) for count in rates}
            for side, rates in found.items()
            if side != "peft, bf16"
        },
        **surroundings("loratune", "peft", threads=given.threads),
    }
    print(table(result))
    write(result, given, "decode")


if __name__ == "__main__":
    main()
