"""Many adapters on one base, many requests at once: tokens a second, and how long the first token takes.

python benchmarks/serve.py            print the table, write benchmarks/results/serve.json
python benchmarks/serve.py --quick    does it run?

SmolLM2-135M in bf16 with 8 adapters of rank 16; function-calling questions, each for an adapter or the base drawn at
random, each with an answer of 16 to 128 tokens whatever it says. Ours is the server itself, asked over HTTP by 32
callers at once. Beside it peft: `generate` with `adapter_names`, 32 rows at once padded on the left, each batch as long
as its longest answer, in the order in which they come and, as if the answers' lengths were known beforehand, sorted by
them; and one request after the other, `set_adapter` before each. Every side has a process of its own; tokens are those
that were asked for. peft's rates do not depend on how many there are, so that it is given a part of the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import weights
from comparison import RESULTS, say, write
from measuring import ratios, spread, surroundings
from workloads import demo_chats

SIDES = ("ours", "peft, mixed batch", "peft, mixed batch, sorted", "peft, switching")
ADAPTERS, RANK, CALLERS, REQUESTS, ROUNDS = 8, 16, 32, 256, 3


@dataclass(frozen=True)
class Asked:
    """A request: the adapter's name (None for the base), the prompt's ids, and how many tokens are answered."""

    adapter: str | None
    ids: list[int]
    count: int


@dataclass(frozen=True)
class Found:
    """Tokens answered, the seconds that took, and those to each request's first token where they are known."""

    tokens: int
    seconds: float
    first: list[float]


def requests(tokenizer: Any, count: int, longest: int) -> list[Asked]:
    dice = random.Random(0)
    names = [None, *(f"adapter-{number}" for number in range(ADAPTERS))]
    chats = demo_chats()
    found = []
    for number in range(count):
        messages = chats[number % len(chats)][:-1]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        found.append(Asked(dice.choice(names), ids, dice.randrange(16, longest + 1)))
    return found


# -- ours --------------------------------------------------------------------------------------------------------------


async def call_all(port: int, asked: Sequence[Asked], base: str) -> Found:
    """As many callers as the benchmark has, each with one request at a time, streamed."""
    waiting, first = list(reversed(asked)), []
    tokens = 0

    async def caller() -> None:
        nonlocal tokens
        while waiting:
            one = waiting.pop()
            body = {"model": one.adapter or base, "prompt": one.ids, "max_tokens": one.count, "temperature": 0}
            body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
            begun = time.perf_counter()
            heard, text = await call(port, body)
            first.append(heard - begun)
            tokens += int(re.findall(rb'"completion_tokens": ?([0-9]+)', text)[-1])

    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return Found(tokens, time.perf_counter() - begun, first)


async def call(port: int, body: dict[str, Any]) -> tuple[float, bytes]:
    """When the first event came, and the whole answer."""
    status, heard, text = await post(port, "/v1/completions", body)
    if status != 200:
        raise SystemExit(text.decode(errors="replace")[:1000])
    return heard, text


async def post(port: int, path: str, body: dict[str, Any]) -> tuple[int, float, bytes]:
    """Status, when the first event came, and all that was answered.

    By hand: a client's work is not what is measured, and the two share the processor.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(sent)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + sent)
    text, heard = b"", 0.0
    while piece := await reader.read(1 << 16):
        text += piece
        if not heard and b"data: " in text:
            heard = time.perf_counter()
    writer.close()
    return int(text.split(None, 2)[1]), heard, text


@contextmanager
def serving(base: Path, *words: str) -> Iterator[tuple[int, int]]:
    """A server of this base, in a process of its own: its port and its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "loratune", "serve", str(base), "--port", str(port), *words]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(port, server)
        yield port, server.pid
    finally:
        server.terminate()
        server.wait(60)


def ours(base: Path, adapters: Path, asked: Sequence[Asked]) -> Found:
    runs = [f"adapter-{number}={adapters / str(number)}" for number in range(ADAPTERS)]
    with serving(base, *runs, "--dtype", "bf16", "--slots", str(CALLERS)) as (port, _):
        asyncio.run(call_all(port, asked[:CALLERS], base.name))  # warms up
        return asyncio.run(call_all(port, asked, base.name))


def wait_for(port: int, server: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if server.poll() is not None:
            raise SystemExit(server.communicate()[1])
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit("the server did not come up")


# -- peft --------------------------------------------------------------------------------------------------------------


def peft_model(base: Path, adapters: Path) -> Any:
    import peft

    model = weights.load_model(str(base), "bf16", "cpu")
    found: Any = peft.PeftModel.from_pretrained(model, str(adapters / "0"), adapter_name="adapter-0")
    for number in range(1, ADAPTERS):
        found.load_adapter(str(adapters / str(number)), adapter_name=f"adapter-{number}")
    return found.eval().bfloat16()  # A and B as the base: the faster choice for it


def mixed(base: Path, adapters: Path, asked: Sequence[Asked], *, by_length: bool = False) -> Found:
    import torch

    model = peft_model(base, adapters)

    def answer(group: Sequence[Asked], most: int) -> None:
        width = max(len(one.ids) for one in group)
        ids = torch.tensor([[0] * (width - len(one.ids)) + one.ids for one in group])
        mask = torch.tensor([[0] * (width - len(one.ids)) + [1] * len(one.ids) for one in group])
        model.generate(
            input_ids=ids, attention_mask=mask, adapter_names=[one.adapter or "__base__" for one in group],
            max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    answer(asked[:CALLERS], 4)
    asked = asked[: max(CALLERS, len(asked) // 4)]
    order = sorted(asked, key=lambda one: one.count) if by_length else asked
    begun = time.perf_counter()
    for start in range(0, len(order), CALLERS):
        group = order[start : start + CALLERS]
        answer(group, max(one.count for one in group))
    return Found(sum(one.count for one in asked), time.perf_counter() - begun, [])


def switching(base: Path, adapters: Path, asked: Sequence[Asked]) -> Found:
    import contextlib

    import torch

    model = peft_model(base, adapters)

    def answer(one: Asked, count: int) -> None:
        if one.adapter is not None:
            model.set_adapter(one.adapter)
        ids = torch.tensor([one.ids])
        with model.disable_adapter() if one.adapter is None else contextlib.nullcontext():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip

    few = asked[: max(1, len(asked) // 16)]
    answer(few[0], 4)
    begun = time.perf_counter()
    for one in few:
        answer(one, one.count)
    return Found(sum(one.count for one in few), time.perf_counter() - begun, [])


RUN = dict(zip(SIDES, (ours, mixed, partial(mixed, by_length=True), switching), strict=True))


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':26}{'tokens/s':>12}{'ours, times':>14}"]
    for side, rate in result["tokens_per_second"].items():
        times = "" if side == "ours" else f"{result['ratios'][side]['median']:.1f}"
        lines.append(f"{side:26}{rate['median']:>12.0f}{times:>14}")
    first = result["first_token_seconds"]
    return "\n".join([*lines, f"first token after {first['median']:.2f} s, 95 % within {first['p95']:.2f} s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few short answers: does it run?")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"(default {ROUNDS})")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="OMP_NUM_THREADS (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"where the result goes (default {RESULTS.name})")
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "PLACE", "REQUESTS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        side, place, file = given.one[0], Path(given.one[1]), Path(given.one[2])
        asked = [Asked(**one) for one in json.loads(file.read_text())]
        print(json.dumps(asdict(RUN[side](place / "base", place / "adapters", asked))))
        return
    os.environ |= {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
    count, longest = (6, 20) if given.quick else (REQUESTS, 128)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        base = weights.write_base(weights.REAL, place / "base")
        for number in range(ADAPTERS):
            weights.write_adapter(base, place / "adapters" / str(number), r=RANK, alpha=2 * RANK, seed=number)
        asked = requests(weights.tokenizer(), count, longest)
        (place / "requests.json").write_text(json.dumps([asdict(one) for one in asked]))
        found: dict[str, list[Found]] = {side: [] for side in SIDES}
        for number in range(1 if given.quick else given.rounds):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                say(f"round {number + 1}: {side}")
                command = [sys.executable, __file__, "--one", side, str(place), str(place / "requests.json")]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[side].append(Found(**json.loads(done.stdout.splitlines()[-1])))
    rates = {side: [one.tokens / one.seconds for one in several] for side, several in found.items()}
    first = sorted(seconds for one in found["ours"] for seconds in one.first)
    result = {
        "work": {"adapters": ADAPTERS, "rank": RANK, "callers": CALLERS, "requests": count, "longest": longest},
        "tokens_per_second": {side: spread(several) for side, several in rates.items()},
        "ratios": {side: ratios(rates["ours"], rates[side]) for side in SIDES[1:]},
        "first_token_seconds": {"median": statistics.median(first), "p95": first[int(0.95 * (len(first) - 1))]},
        **surroundings("loratune", "peft", threads=given.threads),
    }
    print(table(result))
    write(result, given, "serve")


if __name__ == "__main__":
    main()
