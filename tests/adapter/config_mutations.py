"""Damage to `adapter_config.json`: its encoding, its JSON, and every key at values that it must not have.

The good adapter has r=4, lora_alpha=12, q_proj and v_proj of two layers, `rank_pattern` {"v_proj": 2} and
`alpha_pattern` {"layers.1.self_attn.v_proj": 5}, so that a setting that is lost changes the outputs.
"""

from __future__ import annotations

import gzip
import json
import math
from typing import Any

from tests.adapter.mutations import (
    CONFIG,
    EITHER,
    HUGE,
    REFUSED,
    SAME,
    Change,
    Found,
    Mutation,
    edit_config,
    put,
    rewrite,
    shown,
)

GONE = object()
_NOT_A_NUMBER: tuple[Any, ...] = ("8", "x", "", True, None, [], {}, [8], math.nan, math.inf, -math.inf)
_NOT_A_FLAG: tuple[Any, ...] = ("yes", "true", 1, 0, [], {}, 1.0)
_NOT_NAMES: tuple[Any, ...] = ([], {}, "", 5, 1.5, True, [5], [None], [[]], [""], [{}], {"q_proj": 1}, ["q_proj", None])
_BAD_PATTERNS = (
    "(",
    "*",
    "[",
    "a{2,1}",
    "(?P<n>",
    "\\",
    "a{99999999999}",
    "(" * 5000 + ")" * 5000,
    "(?<=a*)b",
    "\ud800",
    "(?:(?:(?:q_proj){1000}){1000}){1000}",
    "(?:.|.)*[!?]",
)
_NOT_A_RANK: tuple[Any, ...] = ("2", 0, -2, 2.5, True, None, [], 3, HUGE)
_NOT_AN_ALPHA: tuple[Any, ...] = ("2", 0, -2, True, None, [], math.nan, math.inf, HUGE, 1e308)
# Slow enough to show that it was tried, not so slow that nobody can wait for it.
_SLOW = "(.*)(.*)(.*)(.*)!"

# Key → values that must be refused. 10**400 stands for numbers that no float holds.
REFUSED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": (
        GONE,
        None,
        "",
        "lora",
        "LOHA",
        "ADALORA",
        "IA3",
        "PROMPT_TUNING",
        "X",
        5,
        True,
        ["LORA"],
        {"LORA": 1},
    ),
    "r": (*_NOT_A_NUMBER, GONE, -1, 0, 3, 5, 1e9, 4.5, 10**9, HUGE, -HUGE),
    "lora_alpha": (*_NOT_A_NUMBER, 0, -12, -0.0, HUGE, 1e308),
    "lora_dropout": (*_NOT_A_NUMBER, -0.1, 1, 1.5, HUGE),
    "target_modules": (
        *_NOT_NAMES,
        *_BAD_PATTERNS,
        _SLOW,
        "q_proj,v_proj",
        "all-linear",
        "ALL-LINEAR",
        ".*",
        ["q_proj"],
        ["q_proj", "v_proj", "k_proj"],
        ["q_proj", "v_proj", "nope"],
        ["q_proj", "v_proj", "../../../etc/passwd"],
        ["q_proj", "v_prój"],
        ["ｑ_proj", "v_proj"],
        ["q_proj\x00", "v_proj"],
        ["q_proj", "v_proj", "\ud800"],
        ["q_proj", "v_proj", "x" * 100_000],
        ["q_proj", "v_proj", "model.layers"],
        ["q_proj", "v_proj", "model.norm"],
        [f"n{number}" for number in range(300)],
    ),
    "exclude_modules": (*_NOT_NAMES[2:], *_BAD_PATTERNS, _SLOW, ["q_proj"], ["nope"], ".*"),
    "layers_to_transform": ([0], 0, [-1], [7], "x", "0", 1.5, True, [True], {"a": 1}, [None], [[0]], ["0"], [0, HUGE]),
    "layers_pattern": ("layers", 5, [5], [None], True),
    "rank_pattern": (
        *([["v_proj", 2]], 5, "v_proj", True, {}, None, GONE),
        *({"v_proj": value} for value in _NOT_A_RANK),
        *({"v_proj": 2, pattern: 4} for pattern in (*_BAD_PATTERNS, _SLOW, "nope", "(?i)q_proj", "(?x)q_proj")),
    ),
    "alpha_pattern": (
        *([["v_proj", 2]], 5, "v_proj", True),
        *({"v_proj": value} for value in _NOT_AN_ALPHA),
        *({pattern: 4} for pattern in (*_BAD_PATTERNS, _SLOW, "nope", "(?i)q_proj")),
    ),
    "use_rslora": _NOT_A_FLAG,
    "init_lora_weights": (5, "x", [], {}, 1.5),
    "fan_in_fan_out": ("yes", [1], 5),
    "task_type": ("X", "causal_lm", 5, [], True),
    "bias": ("x", 5, ["none"], True),
    "use_dora": (True, "yes", 1),
    "lora_bias": (True, "yes"),
    "modules_to_save": (["lm_head"], ["nope"], "lm_head", 5, [5]),
    "target_parameters": (["mlp.experts.gate_up_proj"], "x", 5, ["model.layers.0.self_attn.q_proj.weight"]),
    "trainable_token_indices": ([1, 2], {"embed_tokens": [0]}, "x", 5),
    "layer_replication": ([[0, 2], [1, 2]], "x", 5),
    "use_qalora": (True, "yes"),
    "use_bdlora": (True, {"nblocks": 2}),
    "alora_invocation_tokens": ([1, 2], "x"),
    "arrow_config": ({"top_k": 2}, "x"),
    "kasa_config": ({"beta": 0.1}, "x"),
    "monteclora_config": ({"x": 1}, "x"),
    "velora_config": ({"x": 1}, "x"),
    "megatron_config": ({"x": 1}, "x"),
}

# Key → values that change nothing.
SAME_VALUES: dict[str, tuple[Any, ...]] = {
    "lora_dropout": (0, 0.5, 0.999, GONE),
    "target_modules": (
        ["v_proj", "q_proj"],
        ["q_proj", "q_proj", "v_proj"],
        ["self_attn.q_proj", "self_attn.v_proj"],
        ".*\\.(q|v)_proj",
        "model\\.layers\\.[01]\\.self_attn\\.[qv]_proj",
    ),
    "exclude_modules": (["k_proj"], "lm_head", None, GONE),
    "layers_to_transform": ([0, 1], [1, 0], None),
    "rank_pattern": ({"v_proj": 2, "q_proj": 4}, {".*self_attn.v_proj": 2}),
    "alpha_pattern": ({"layers.1.self_attn.v_proj": 5, "q_proj": 12},),
    "init_lora_weights": (True, False, "gaussian", GONE),
    "fan_in_fan_out": (False, True, None, GONE),
    "task_type": ("CAUSAL_LM", None, GONE),
    "inference_mode": (False, True, GONE),
    "revision": ("main", None, GONE),
    "base_model_name_or_path": ("someone/tiny", "../../x", "", "ü🙂", None, GONE),
    "an_unknown_key": (None, 1, "x", [], {"a": [1, {"b": None}]}, "ü🙂", "x" * 100_000),
    "": ("x",),
    "self": ("x",),
    "model_config": ("x",),
}

# Key → values that are another valid adapter, or that one may refuse.
EITHER_VALUES: dict[str, tuple[Any, ...]] = {
    "r": (4.0,),
    "lora_alpha": (13, 12.0, 0.5, 1e-30, 1e-300, GONE),
    "target_modules": (None, GONE),
    "exclude_modules": ([], {}),
    "layers_to_transform": ([], {}, [1.0, 0.0], [0, 1, 1]),
    "layers_pattern": ([], "", None),
    "rank_pattern": ({"v_proj": 2.0}, {"(a)|v_proj": 2}, {"v_proj": 2, "v_pro.": 3}),
    "alpha_pattern": (
        {},
        None,
        GONE,
        [],
        {".*": 7},
        {"v_proj": 5.5, ".*v_proj": 9},
        {"v_proj": 1e-320},
        {"(q|v)_proj": 3},
    ),
    "use_rslora": (True, None, GONE),
    "init_lora_weights": (None, "eva", "orthogonal", "True"),
    "fan_in_fan_out": (1, []),
    "task_type": ("SEQ_CLS", "FEATURE_EXTRACTION", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM"),
    "bias": ("all", "lora_only", None),
    "inference_mode": ("x", None, [], 5),
    "peft_version": (None, 5, "99.0", "x", [], GONE),
    "auto_mapping": ({"base_model_class": "X"}, "x", 5),
    "revision": (5, [], {}, "\ud800"),
    "base_model_name_or_path": (5, [], {"a": 1}, True, "a\nb: c\n---", "\ud800", "x" * 10_000),
    "loftq_config": ({"loftq_bits": 4}, "x"),
    "corda_config": ({"x": 1}, "x"),
    "eva_config": ({"rho": 2.0}, "x"),
    "lora_ga_config": ({"x": 1}, "x"),
    "megatron_core": ("x", 5, None),
    "qalora_group_size": (32, "x"),
    "ensure_weight_tying": (True, "x"),
    "an_unknown_key": (math.nan, math.inf, HUGE, "\ud800", "\0"),
    "\ud800": (1,),
    "rank": (64,),
    "alpha": (64,),
    "dropout": ("x",),
    "peft_kwargs": ({"x": 1},),
}

# The base that these were trained on is not the model as it comes: peft changes it when it loads them.
PEFT_VALUES: dict[str, tuple[Any, ...]] = {"init_lora_weights": ("pissa", "olora", "pissa_niter_4", "loftq", "corda")}


def values() -> Found:
    for expect, table in ((REFUSED, REFUSED_VALUES), (SAME, SAME_VALUES), (EITHER, EITHER_VALUES)):
        for key, wrong in table.items():
            for value in wrong:
                yield Mutation(f"config/{_said(key, value)}", expect, setting(key, value))
    for key, wrong in PEFT_VALUES.items():
        for value in wrong:
            yield Mutation(f"config/{_said(key, value)}", EITHER, setting(key, value), judge="peft")


def setting(key: str, value: Any) -> Change:
    return lambda folder: edit_config(folder, lambda c: c.pop(key, None) if value is GONE else c.update({key: value}))


def _said(key: str, value: Any) -> str:
    said = ascii(value).replace(str(HUGE), "10**400")
    return ascii(key)[1:-1] + (" is gone" if value is GONE else f"={shown(said)}")


def texts() -> Found:
    """The file as text: encodings, JSON that is none, and JSON that is too much."""
    for what, content in _NO_OBJECT.items():
        yield Mutation(f"json/{what}", REFUSED, put(CONFIG, content))
    for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-7"):
        expect = EITHER if encoding == "utf-7" else REFUSED  # letters are letters in UTF-7
        yield Mutation(f"json/in {encoding}", expect, rewrite(CONFIG, _encoded(encoding)))
    yield Mutation("json/with a BOM", EITHER, rewrite(CONFIG, lambda b: b"\xef\xbb\xbf" + b))
    yield Mutation("json/gzip", REFUSED, rewrite(CONFIG, gzip.compress))
    yield Mutation("json/CRLF", SAME, rewrite(CONFIG, lambda b: b.replace(b"\n", b"\r\n")))
    yield Mutation("json/compact", SAME, rewrite(CONFIG, lambda b: json.dumps(json.loads(b)).encode()))
    yield Mutation("json/single quotes", REFUSED, rewrite(CONFIG, lambda b: b.replace(b'"', b"'")))
    yield Mutation("json/a comment", REFUSED, rewrite(CONFIG, lambda b: b"// ours\n" + b))
    yield Mutation("json/a trailing comma", REFUSED, rewrite(CONFIG, lambda b: b.rstrip()[:-1] + b",}"))
    yield Mutation("json/not UTF-8", REFUSED, rewrite(CONFIG, _with(b'"an_unknown_key": "\xff"')))
    yield Mutation("json/the same key twice", EITHER, rewrite(CONFIG, _with(b'"r": 4')))
    yield Mutation("json/another alpha before", EITHER, rewrite(CONFIG, _with(b'"lora_alpha": 99')))
    yield Mutation("json/another alpha after", EITHER, rewrite(CONFIG, _with(b'"lora_alpha": 99', last=True)))
    yield Mutation("json/another rank after", REFUSED, rewrite(CONFIG, _with(b'"r": 64', last=True)))
    deep = b"[" * 100_000 + b"]" * 100_000
    yield Mutation("json/100,000 brackets inside", EITHER, rewrite(CONFIG, _with(b'"an_unknown_key": ' + deep)))
    nested = b'{"a":' * 900 + b"1" + b"}" * 900
    yield Mutation("json/900 objects inside", EITHER, rewrite(CONFIG, _with(b'"an_unknown_key": ' + nested)))
    digits = b"9" * 5000
    for key in (b"an_unknown_key", b"r", b"lora_alpha", b"revision"):
        change = rewrite(CONFIG, _with(b'"' + key + b'": ' + digits, last=True))
        yield Mutation(
            f"json/{key.decode()} of 5,000 digits", REFUSED if key in (b"r", b"lora_alpha") else EITHER, change
        )
    many = b", ".join(b'"k%d": %d' % (number, number) for number in range(5000))
    yield Mutation("json/5,000 unknown keys", SAME, rewrite(CONFIG, _with(many)))


_NO_OBJECT: dict[str, bytes] = {
    "null": b"null",
    "[]": b"[]",
    "{}": b"{}",
    "5": b"5",
    "a string": b'"LORA"',
    "true": b"true",
    "NaN": b"NaN",
    "a list of one": b'[{"peft_type": "LORA"}]',
    "spaces": b" \n\t ",
    "zeros": b"\0\0\0\0",
    "{": b"{",
    "}": b"}",
    '{"peft_type"': b'{"peft_type"',
    "a word": b"LORA",
    "YAML": b"peft_type: LORA\nr: 4\n",
    "100,000 brackets": b"[" * 100_000,
    "100,000 objects": b'{"a":' * 100_000,
    "5,000 digits": b"9" * 5000,
    "only the type": b'{"peft_type": "LORA"}',
}


def _encoded(encoding: str) -> Any:
    return lambda content: content.decode("utf-8").encode(encoding)


def _with(member: bytes, *, last: bool = False) -> Any:
    """One more member at the object's start, or at its end."""
    if last:
        return lambda content: content.rstrip()[:-1] + b", " + member + b"}"
    return lambda content: b"{" + member + b", " + content.lstrip()[1:]
