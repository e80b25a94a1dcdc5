"""What the loops here learn from: questions that are sums, and their answers."""

from __future__ import annotations

from typing import Any

ROWS = [{"prompt": f"{n} + {n + 1} =", "completion": f" {2 * n + 1}"} for n in range(32)]

# Of two answers to a question the right one is preferred.
PREFERENCES = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no idea"} for row in ROWS]


def tokenized(tokenizer: Any) -> list[dict[str, list[int]]]:
    """The rows as token ids; a label of -100 keeps the question out of the loss."""
    found = []
    for row in ROWS:
        prompt, answer = (tokenizer(row[key], add_special_tokens=False).input_ids for key in ("prompt", "completion"))
        answer.append(tokenizer.eos_token_id)
        ids, labels = prompt + answer, [-100] * len(prompt) + answer
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return found
