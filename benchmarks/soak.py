"""A thousand requests for adapters that come and go: nothing is lost, mistaken or kept.

python benchmarks/soak.py            write benchmarks/results/soak.json (about ten minutes on two cores)
python benchmarks/soak.py --quick    does it run?

SmolLM2-135M in fp32, eight adapters of which seven fit on the model at a time, so that requests push each other's
adapters out; 32 callers, and beside them somebody who unloads adapters and loads them again under the same name. Each
answer is compared with the one that whole passes without a server, a batch or a cache give for its adapter alone. A
request for an adapter that is gone is told 404 and asked again. Memory is the server's resident set.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import serve
import weights
from comparison import RESULTS, say, write
from measuring import surroundings

REQUESTS, PROMPTS, TOKENS, ON_THE_MODEL = 1000, 6, 6, 7
# So that each adapter answers otherwise: what a wrong one would say must be seen.
ALPHA = 640
# Two likeliest tokens nearer than this may change places with the shape of a batch.
NEAREST = 1e-3


@dataclass(frozen=True)
class Known:
    """What an adapter alone answers to a prompt."""

    adapter: str | None
    ids: list[int]
    text: str


@dataclass
class Seen:
    """What came of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    unloads: int = 0
    loads: int = 0
    resident: list[int] = field(default_factory=list)


def known_answers(base: Path, adapters: Path, prompts: Sequence[list[int]]) -> list[Known]:
    """By whole passes over all tokens so far, of each adapter alone."""
    import torch

    import loratune as lt

    model = weights.load_model(str(base), "fp32", "cpu").eval()
    tokenizer = weights.tokenizer()
    found, near = [], 0
    for number in (None, *range(serve.ADAPTERS)):
        handle = None if number is None else lt.attach(model, str(adapters / str(number)))
        for ids in prompts:
            row, gap = list(ids), float("inf")
            with torch.no_grad():
                for _ in range(TOKENS):
                    logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]
                    two = logits.topk(2).values
                    gap = min(gap, float(two[0] - two[1]))
                    row.append(int(logits.argmax()))
            if gap < NEAREST:
                near += 1
                continue
            name = None if number is None else f"adapter-{number}"
            found.append(Known(name, ids, tokenizer.decode(row[len(ids) :], skip_special_tokens=True)))
        if handle is not None:
            handle.detach()
    say(f"{len(found)} known answers, {len({one.text for one in found})} different; {near} too near to call left out")
    return found


async def soak(port: int, process: psutil.Process, base: str, known: Sequence[Known], count: int) -> Seen:
    dice, seen = random.Random(0), Seen()
    waiting = [dice.choice(known) for _ in range(count)]

    async def caller() -> None:
        while waiting:
            one = waiting.pop()
            body = {"model": one.adapter or base, "prompt": one.ids, "max_tokens": TOKENS, "temperature": 0}
            body |= {"ignore_eos": True, "stream": bool(len(waiting) % 2)}
            status = 0
            while status != 200:
                status, _, text = await serve.post(port, "/v1/completions", body)
                seen.statuses[status] += 1
                if status not in (200, 404, 429):
                    raise SystemExit(text.decode(errors="replace")[:1000])
                if status != 200:
                    await asyncio.sleep(1)
            seen.answered += 1
            said = text_of(text)
            if said != one.text:
                seen.wrong.append(f"{one.adapter}: {said!r} instead of {one.text!r}")
            if seen.answered % 20 == 0:
                seen.resident.append(process.memory_info().rss)

    async def meddler() -> None:
        while waiting:
            number = dice.randrange(serve.ADAPTERS)
            name = {"lora_name": f"adapter-{number}"}
            status, *_ = await serve.post(port, "/v1/unload_lora_adapter", name)
            if status == 200:
                seen.unloads += 1
                await asyncio.sleep(0.3)
                again = {**name, "lora_path": str(number)}
                while (await serve.post(port, "/v1/load_lora_adapter", again))[0] != 200:
                    await asyncio.sleep(0.1)
                seen.loads += 1
            await asyncio.sleep(0.5)

    await asyncio.gather(meddler(), *(caller() for _ in range(serve.CALLERS)))
    return seen


def text_of(answer: bytes) -> str:
    """Of a completion, streamed or whole."""
    body, found = answer.split(b"\r\n\r\n", 1)[1].decode(), []
    for begin in (one.start() for one in re.finditer(r'\{"id"', body)):
        choices = json.JSONDecoder().raw_decode(body, begin)[0]["choices"]
        found += [choice["text"] for choice in choices]
    return "".join(found)


def growth(resident: Sequence[int]) -> float:
    """How much larger the last quarter is than the second."""
    quarter = max(1, len(resident) // 4)
    return statistics.median(resident[-quarter:]) / statistics.median(resident[quarter : 2 * quarter]) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few requests: does it run?")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="OMP_NUM_THREADS (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"where the result goes (default {RESULTS.name})")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        base, adapters = weights.write_base(weights.REAL, Path(folder) / "base"), Path(folder) / "adapters"
        for number in range(serve.ADAPTERS):
            weights.write_adapter(base, adapters / str(number), r=serve.RANK, alpha=ALPHA, seed=number)
        prompts = [one.ids for one in serve.requests(weights.tokenizer(), 2 if given.quick else PROMPTS, TOKENS + 16)]
        known = known_answers(base, adapters, prompts)
        runs = [f"adapter-{number}={adapters / str(number)}" for number in range(serve.ADAPTERS)]
        words = ["--dtype", "fp32", "--max-adapters", str(ON_THE_MODEL), "--adapter-dir", str(adapters)]
        begun = time.perf_counter()
        with serve.serving(base, *runs, *words) as (port, pid):
            count = 40 if given.quick else REQUESTS
            seen = asyncio.run(soak(port, psutil.Process(pid), base.name, known, count))
        seconds = time.perf_counter() - begun
    result: dict[str, Any] = {
        "requests": count,
        "answered": seen.answered,
        "wrong": seen.wrong,
        "known_answers": len(known),
        "different_answers": len({one.text for one in known}),
        "statuses": {str(status): number for status, number in sorted(seen.statuses.items())},
        "unloads": seen.unloads,
        "loads": seen.loads,
        "resident_bytes": seen.resident,
        "resident_growth": growth(seen.resident),
        "seconds": seconds,
        **surroundings("loratune", threads=given.threads),
    }
    print(json.dumps({name: value for name, value in result.items() if name != "resident_bytes"}, indent=2))
    write(result, given, "soak")


if __name__ == "__main__":
    main()
