"""Config files: every setting with values of every kind, and files that are wrong as a whole."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any

from loratune.config import TrainConfig
from tests.malformed.cases import REFUSED, Case, written

# As TOML has them, with what they are in Python.
VALUES: dict[str, Any] = {
    '"x"': "x",
    '""': "",
    "-1": -1,
    "0": 0,
    "nan": float("nan"),
    "inf": float("inf"),
    "1e308": 1e308,
    "100000000000000000000": 10**20,
    "true": True,
    "[]": [],
    "[[1]]": [[1]],
    '["x", 3]': ["x", 3],
    "{ x = 1 }": {"x": 1},
    "1979-05-27": None,
}


def fields() -> Iterator[tuple[str, str]]:
    """Each setting with each value."""
    return ((name, value) for name in TrainConfig.model_fields for value in VALUES)


def takes_text(name: str) -> bool:
    """Whether any text is a value of the setting, so that an error may come later: a name of a module, of a file."""
    return str in typing.get_args(TrainConfig.model_fields[name].annotation) or name in ("target_modules", "columns")


def files() -> Iterator[Case]:
    def refused(name: str, file: str, content: str | bytes, *named: str) -> Case:
        return Case(name, written(file, content), named, REFUSED)

    def accepted(name: str, file: str, content: str | bytes, **settings: Any) -> Case:
        return Case(name, written(file, content), (), settings)

    yield accepted("toml", "a.toml", "rank = 4\nlr = 1e-3\n", r=4, lr=1e-3)
    yield accepted("toml with a mark", "a.toml", "\ufeffrank = 4\n", r=4)
    yield accepted("yaml", "a.yaml", "rank: 4\nlr: 1e-3\n", r=4, lr=1e-3)
    yield accepted("yml", "a.yml", "# nothing\n")
    yield accepted("empty toml", "a.toml", "")
    yield accepted("yaml with on", "a.yaml", "recompute: on\n", recompute="on")
    yield refused("toml: the same name twice", "a.toml", "lr = 1\nlr = 2\n")
    yield refused("toml: two names of one setting", "a.toml", "r = 4\nrank = 8\n", "rank")
    yield refused("toml: no value", "a.toml", "lr =\n")
    yield refused("toml: yaml", "a.toml", "lr: 1\n")
    yield refused("toml: a table", "a.toml", "[train]\nlr = 1\n", "train")
    yield refused("toml: latin-1", "a.toml", 'out = "schön"\n'.encode("latin-1"))
    yield refused("toml: a zero byte", "a.toml", b"lr = 1\x00\n")
    yield refused("toml: very deep", "a.toml", "lr = " + "[" * 50_000 + "]" * 50_000)
    yield refused("yaml: a list", "a.yaml", "- lr\n- 1\n")
    yield refused("yaml: a text", "a.yaml", "lr\n")
    yield refused("yaml: number as name", "a.yaml", "1: 2\n")
    yield refused("yaml: cut off", "a.yaml", "lr: [1, 2\n")
    yield refused("yaml: a tag", "a.yaml", "lr: !!python/object/apply:os.system ['true']\n")
    yield refused("yaml: two documents", "a.yaml", "lr: 1\n---\nlr: 2\n")
    yield refused("yaml: the same name twice", "a.yaml", "lr: 1\nlr: 2\n", "lr")
    yield refused("yaml: a tab", "a.yaml", "lr:\n\t1\n")
    yield refused("yaml: very deep", "a.yaml", "lr: " + "[" * 5_000 + "]" * 5_000)
    yield refused("yaml: itself", "a.yaml", "columns: &a\n  prompt: *a\n", "columns")
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    yield refused("yaml: a billion laughs", "a.yaml", laughs)
    yield refused("json", "a.json", json.dumps({"lr": 1}))
    yield refused("no ending", "config", "lr = 1\n")
    yield refused("empty name", "a.toml", '"" = 1\n')
    yield refused("name of another case", "a.toml", "LR = 1\n", "LR")
    for wrong in ("epoch", "learning_rate", "rnak", "batchsize"):
        yield refused(f"unknown name {wrong}", "a.toml", f"{wrong} = 1\n", wrong)
    yield refused("several at once", "a.toml", 'epoch = 1\nlr = -1\nschedule = "cosin"\n', "epoch", "lr", "schedule")
