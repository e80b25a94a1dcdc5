"""What a child of the warmed process does: a command, with a fault planted at a moment of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from tests.faults.moments import Fault, Moments


class Teller:
    """A child's pipe to who started it; its last line counts."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __call__(self, value: Any) -> None:
        os.write(self._handle, (json.dumps(value) + "\n").encode())


def warm() -> None:
    """Import what a run imports, and nothing that starts a thread."""
    import matplotlib.pyplot as plt  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import loratune.cli
    import loratune.evaluation
    import loratune.report
    import loratune.run
    import loratune.run.setup

    # What it measures is the machine.
    loratune.run.setup.forward_rate = lambda *_: 1e4


def command(_: Teller, words: Sequence[str]) -> int:
    """`loratune …`."""
    from loratune.cli import main

    return main(list(words))


def watched(tell: Teller, words: Sequence[str], place: str, fault: dict[str, Any] | None = None) -> int:
    """The same, its moments counted; with a fault at one of them."""
    from loratune.cli import main

    moments = Moments(place, tell, Fault(**fault) if fault else None)
    with moments.counted():
        code = main(list(words))
    tell({"moments": moments.names, "calls": moments.calls})
    return code
