"""Loss masks against an oracle that never sees a template: prompts and answers written by hand, tokenised apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loratune.data.fit import show_mask
from loratune.data.read import Example, read
from loratune.data.render import Rendered, render, render_prompt
from loratune.errors import DataError
from tests.tiny import (
    CHATML,
    DEFAULT_SYSTEM,
    FORGETS_THOUGHTS,
    INSTRUCT,
    LLAMA3,
    MARKED,
    TOOLS,
    tiny_tokenizer,
)

Pieces = list[tuple[str, bool]]
Turns = list[tuple[str, str]]


def chatml(turns: Turns) -> Pieces:
    pieces: Pieces = []
    for role, content in turns:
        pieces.append((f"<|im_start|>{role}\n", False))
        pieces.append((f"{content}<|im_end|>", role == "assistant"))
        pieces.append(("\n", False))
    return pieces


def default_system(turns: Turns) -> Pieces:
    own = [] if turns[0][0] == "system" else [("system", "You are a helpful assistant.")]
    return chatml(own + turns)


def llama3(turns: Turns) -> Pieces:
    pieces: Pieces = [("<|begin_of_text|>", False)]
    for role, content in turns:
        pieces.append((f"<|start_header_id|>{role}<|end_header_id|>\n\n", False))
        pieces.append((f"{content.strip()}<|eot_id|>", role == "assistant"))
    return pieces


def instruct(turns: Turns) -> Pieces:
    pieces: Pieces = [("<|begin_of_text|>", False)]
    for role, content in turns:
        pieces.append((f"[INST] {content} [/INST]", False) if role == "user" else (f" {content}<|im_end|>", True))
    return pieces


def marked(turns: Turns) -> Pieces:
    pieces: Pieces = []
    for role, content in turns:
        pieces.append((f"<|im_start|>{role} {len(turns)}\n", False))
        pieces.append((f"{content}<|im_end|>", role == "assistant"))
    return pieces


FAMILIES: dict[str, tuple[str, str, Callable[[Turns], Pieces]]] = {
    "chatml": (CHATML, "<|im_end|>", chatml),
    "default system": (DEFAULT_SYSTEM, "<|im_end|>", default_system),
    "llama3": (LLAMA3, "<|eot_id|>", llama3),
    "instruct": (INSTRUCT, "<|im_end|>", instruct),
    "generation marks": (MARKED, "<|im_end|>", marked),
}
TOKENIZERS = {
    name: tiny_tokenizer(template, eos=eos, bos="<|begin_of_text|>", adds_bos=True)
    for name, (template, eos, _) in FAMILIES.items()
}


class WithoutOffsets:
    """A tokenizer written in Python: no offsets."""

    is_fast = False

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert not kwargs.get("return_offsets_mapping"), "slow tokenizers raise here"
        return self._inner(*args, **kwargs)


def chat(turns: Turns) -> Example:
    return read([{"messages": [{"role": role, "content": content} for role, content in turns]}]).examples[0]


def oracle(pieces: Pieces, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Text before each answer as one prompt, each answer by itself; the first token is never a target."""
    joined: Pieces = []
    for text, supervised in pieces:
        if joined and joined[-1][1] == supervised:
            joined[-1] = (joined[-1][0] + text, supervised)
        else:
            joined.append((text, supervised))
    ids: list[int] = []
    mask: list[bool] = []
    for text, supervised in joined:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        mask += [supervised] * len(piece)
    mask[0] = False
    return ids, mask


def cut_after(pieces: Pieces) -> Pieces:
    """Without the text after the last answer, except the white space its turn ends with."""
    last = max(index for index, (_, supervised) in enumerate(pieces) if supervised)
    return pieces[: last + 1] + [piece for piece in pieces[last + 1 : last + 2] if not piece[0].strip()]


def row_of(example: Example, tokenizer: Any, **options: Any) -> Rendered:
    (row,) = render([example], tokenizer, **{"max_length": 100_000, **options}).rows
    return row


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "<|" not in text
)
spaced = st.one_of(
    words,
    st.builds(
        lambda a, w, b: a + w + b,
        st.sampled_from(["", " ", "\n", "\n\n", "  "]),
        words,
        st.sampled_from(["", " ", "\n\n"]),
    ),
)
rounds = st.lists(st.tuples(spaced, spaced), min_size=1, max_size=3)


def alternating(pairs: list[tuple[str, str]]) -> Turns:
    return [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slow", [False, True])
@settings(max_examples=60, deadline=None)
@given(pairs=rounds)
@example(pairs=[("0", "  \r0")])  # one token from before the answer into it
def test_masks_are_the_oracles(family: str, slow: bool, pairs: list[tuple[str, str]]) -> None:
    tokenizer = WithoutOffsets(TOKENIZERS[family]) if slow else TOKENIZERS[family]
    turns = alternating(pairs)
    row = row_of(chat(turns), tokenizer)
    ids, mask = oracle(FAMILIES[family][2](turns), tokenizer)
    assert list(row.ids) == ids
    assert list(row.supervised) == mask


@pytest.mark.parametrize("family", ["chatml", "default system", "llama3"])
@pytest.mark.parametrize("turns", [
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")],
    [("user", "Hi"), ("assistant", "Hello"), ("assistant", "How are you?"), ("user", "unanswered")],
    [("user", "Hi"), ("user", "there"), ("assistant", "Hello")],
])  # fmt: skip
def test_odd_turns(family: str, turns: Turns) -> None:
    tokenizer = TOKENIZERS[family]
    row = row_of(chat(turns), tokenizer)
    ids, mask = oracle(cut_after(FAMILIES[family][2](turns)), tokenizer)
    assert (list(row.ids), list(row.supervised)) == (ids, mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_settings(family: str) -> None:
    tokenizer = TOKENIZERS[family]
    turns = alternating([("Hi", "Hello"), ("Bye", "See you")])
    pieces = FAMILIES[family][2](turns)
    first, last = (text for text, supervised in pieces if supervised)
    shown = {
        loss: [
            text for text, supervised in show_mask(row_of(chat(turns), tokenizer, loss=loss), tokenizer) if supervised
        ]
        for loss in ("assistant", "completion", "all")
    }
    assert shown["assistant"] == [first, last]
    assert shown["completion"] == [last]
    assert "".join(shown["all"]) == "".join(text for text, _ in pieces).removeprefix(
        "<|begin_of_text|>" if "begin" in pieces[0][0] else "<|im_start|>"
    )


@pytest.mark.parametrize("family", ["chatml", "default system", "llama3", "instruct"])
@settings(max_examples=40, deadline=None)
@given(pairs=rounds)
def test_a_sampling_prompt_is_what_the_row_was_trained_on(family: str, pairs: list[tuple[str, str]]) -> None:
    tokenizer = TOKENIZERS[family]
    example = chat(alternating(pairs))
    row = row_of(example, tokenizer, loss="completion")
    ids, answer = render_prompt(example, tokenizer)
    assert ids == row.ids[: row.supervised.index(True)]
    assert answer == pairs[-1][1]


def test_the_end_of_turn_is_supervised_although_it_is_the_pad() -> None:
    tokenizer = tiny_tokenizer(pad="<|im_end|>")
    made = render([chat([("user", "Hi"), ("assistant", "Hello")])], tokenizer, max_length=99)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert made.end_of_turn == (stop,)
    assert [flag for number, flag in zip(made.rows[0].ids, made.rows[0].supervised, strict=True) if number == stop] == [
        False,
        True,
    ]


def test_messages_of_weight_zero_are_context() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Wrong", "weight": 0},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "Right", "weight": 1},
    ]
    for family in ("chatml", "generation marks"):
        row = row_of(read([{"messages": messages}]).examples[0], TOKENIZERS[family])
        shown = show_mask(row, TOKENIZERS[family])
        assert [text for text, supervised in shown if supervised] == ["Right<|im_end|>"]
        assert "Wrong<|im_end|>" in shown[0][0]


def test_tools_and_tool_results() -> None:
    tokenizer = tiny_tokenizer(TOOLS)
    call = {"function": {"name": "weather", "arguments": '{"city": "Berlin"}'}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "21"},
        {"role": "assistant", "content": "21 degrees"},
    ]
    example = read([{"messages": messages, "tools": [{"name": "weather"}]}]).examples[0]
    shown = show_mask(row_of(example, tokenizer), tokenizer)
    assert [text for text, supervised in shown if supervised] == [
        '<tool_call>{"name": "weather", "arguments": {"city": "Berlin"}}</tool_call><|im_end|>',
        "21 degrees<|im_end|>",
    ]
    assert shown[0][0].startswith('<|im_start|>system\n{"name": "weather"}\n<|im_end|>')
    only_call = read([{"messages": messages[:2]}]).examples[0]
    assert render_prompt(only_call, tokenizer)[1].startswith("<tool_call>")


@settings(max_examples=80, deadline=None)
@given(prompt=spaced, completion=spaced, adds_bos=st.booleans(), slow=st.booleans())
def test_raw_pairs(prompt: str, completion: str, adds_bos: bool, slow: bool) -> None:
    tokenizer = RAW[adds_bos]
    example = read([{"prompt": prompt, "completion": completion}]).examples[0]
    row = row_of(example, WithoutOffsets(tokenizer) if slow else tokenizer)
    bos = [tokenizer.bos_token_id] if adds_bos else []
    asked = bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answered = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert list(row.ids) == asked + answered
    assert list(row.supervised) == [False] * len(asked) + [True] * len(answered)
    assert render_prompt(example, tokenizer) == (tuple(asked), completion)


RAW = {
    adds: tiny_tokenizer(None, eos="<|endoftext|>", bos="<|begin_of_text|>", pad=None, adds_bos=adds)
    for adds in (False, True)
}


def test_joined_tokens_are_cut_at_the_border() -> None:
    tokenizer = RAW[False]
    whole, apart = (
        tokenizer("The capital")["input_ids"],
        tokenizer("The ")["input_ids"] + tokenizer("capital")["input_ids"],
    )
    assert whole != apart, "the tokenizer must join here for this test to say anything"
    row = row_of(read([{"prompt": "The ", "completion": "capital"}]).examples[0], tokenizer)
    assert list(row.ids) == [*apart, tokenizer.eos_token_id]


def test_texts_are_learned_whole() -> None:
    for adds, tokenizer in RAW.items():
        row = row_of(read([{"text": "Hello there 北京"}]).examples[0], tokenizer)
        plain = tokenizer("Hello there 北京", add_special_tokens=False)["input_ids"]
        assert list(row.ids) == [*([tokenizer.bos_token_id] if adds else []), *plain, tokenizer.eos_token_id]
        assert row.supervised == (False, *[True] * (len(row.ids) - 1))
        ids, rest = render_prompt(read([{"text": "Hello there 北京"}]).examples[0], tokenizer)
        assert ids == row.ids[: len(ids)]
        assert tokenizer.decode(ids, skip_special_tokens=True) + rest == "Hello there 北京"


def sentencepiece_like(template: str | None) -> Any:
    """Llama 2's way: a space is put before every text and written as ▁."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789?.[]/\n"
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *letters, "▁y", "▁ye"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[("▁", "y"), ("▁y", "e")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment,list-item]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if template is not None:
        made.chat_template = template
    return made


@pytest.mark.parametrize("slow", [False, True])
def test_a_space_before_every_text_is_not_put_before_answers(slow: bool) -> None:
    inner = sentencepiece_like(None)
    tokenizer = WithoutOffsets(inner) if slow else inner
    row = row_of(read([{"prompt": "ok?", "completion": " yes"}]).examples[0], tokenizer)
    assert inner.convert_ids_to_tokens(row.ids) == ["▁", "o", "k", "?", "▁ye", "s", "</s>"]
    glued = row_of(read([{"prompt": "ok? ", "completion": "yes"}]).examples[0], tokenizer)
    assert inner.convert_ids_to_tokens(glued.ids) == ["▁", "o", "k", "?", "▁", "y", "e", "s", "</s>"]
    assert glued.supervised == (False,) * 5 + (True,) * 4
    assert "".join(text for text, _ in show_mask(row, tokenizer)) == inner.decode(row.ids)


@pytest.mark.parametrize("slow", [False, True])
def test_a_template_over_such_a_tokenizer(slow: bool) -> None:
    inner = sentencepiece_like(INSTRUCT)
    row = row_of(chat(alternating([("Hi", "yes"), ("Bye", "no")])), WithoutOffsets(inner) if slow else inner)
    tokens = inner.convert_ids_to_tokens(row.ids)
    assert [token for token, flag in zip(tokens, row.supervised, strict=True) if flag] == [
        "▁ye", "s", "</s>", "▁", "n", "o", "</s>",
    ]  # fmt: skip


def test_an_end_of_turn_that_swallows_white_space() -> None:
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)], special_tokens=True)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|end|>")
    row = row_of(chat(alternating([("Hi", "  Hello"), ("Bye", "See you")])), tokenizer)
    supervised = [number for number, flag in zip(row.ids, row.supervised, strict=True) if flag]
    assert tokenizer.decode(supervised) == "  Hello<|end|>See you<|end|>"


# What is refused --------------------------------------------------------------------------------------------------


def refused(example: Example, tokenizer: Any, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        row_of(example, tokenizer, **options)
    return caught.value


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = tiny_tokenizer(FORGETS_THOUGHTS)
    turns = alternating([("Hi", "hm</think>Hello"), ("Bye", "so</think>See you")])
    error = refused(chat(turns), tokenizer)
    assert "cannot be masked" in error.problems[0]
    assert "--loss completion" in error.hint
    row = row_of(chat(turns), tokenizer, loss="completion")
    shown = show_mask(row, tokenizer)
    assert [text for text, flag in shown if flag] == ["so</think>See you<|im_end|>"]
    assert "hm" not in shown[0][0]


def test_the_templates_fault_is_told_once_for_all_rows() -> None:
    rows = [chat(alternating([("Hi", "hm</think>Hello"), ("Bye", "See you")]))] * 50
    with pytest.raises(DataError) as caught:
        render(rows, tiny_tokenizer(FORGETS_THOUGHTS), max_length=999)
    assert len(caught.value.problems) == 1
    assert "(50 rows, the first is rows:1)" in caught.value.problems[0]


def test_a_template_that_drops_a_part_of_the_last_answer_is_refused() -> None:
    template = FORGETS_THOUGHTS.replace(" and not loop.last", "")
    error = refused(chat([("user", "Hi"), ("assistant", "hm</think>Hello")]), tiny_tokenizer(template))
    assert error.problems == ("rows:1: the chat template leaves out or changes a part of the answer",)


def test_a_header_that_differs_from_the_prompts_is_refused() -> None:
    template = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    error = refused(chat([("user", "Hi"), ("assistant", "Hello")]), tiny_tokenizer(template))
    assert "no beginning of what it writes with the answer" in error.problems[0]
    assert "{% generation %}" in error.hint


def test_marks_need_every_answer() -> None:
    turns = alternating([("Hi", "Hello"), ("Bye", "See you")])
    partly = MARKED.replace("message.role == 'assistant'", "message.role == 'assistant' and loop.last")
    assert "marks 1 of 2 answers" in refused(chat(turns), tiny_tokenizer(partly)).problems[0]


def test_marks_over_less_than_the_answer_are_refused() -> None:
    template = MARKED.replace(
        "message.content }}<|im_end|>{% endgen", "message.content.split('</think>')[-1] }}<|im_end|>{% endgen"
    )
    error = refused(chat([("user", "Hi"), ("assistant", "hm</think>Hello")]), tiny_tokenizer(template))
    assert "leaves out or changes a part" in error.problems[0]


def test_an_answer_that_begins_inside_the_one_before_is_refused() -> None:
    # Asked to go on after an answer, this template leaves that answer open.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content }}"
        "{% if not (loop.last and m.role == 'assistant' and add_generation_prompt) %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'assistant' %}<|im_start|>assistant:{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)
    assert row_of(chat(alternating([("Hi", "Hello"), ("Bye", "See you")])), tokenizer)
    error = refused(chat([("user", "Hi"), ("assistant", "Hello"), ("assistant", "Bye")]), tokenizer)
    assert "cannot be masked" in error.problems[0]


def test_templates_do_not_see_weights() -> None:
    template = "{% for m in messages %}{% if m.weight is defined %}{{ raise_exception('seen') }}{% endif %}{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 1}]
    for rest in (CHATML, MARKED):
        assert row_of(read([{"messages": messages}]).examples[0], tiny_tokenizer(template + rest))


def test_marks_that_stop_before_the_end_of_turn_are_extended() -> None:
    template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    tokenizer = tiny_tokenizer(template)
    shown = show_mask(row_of(chat([("user", "Hi"), ("assistant", "Hello")]), tokenizer), tokenizer)
    assert [text for text, flag in shown if flag] == ["Hello<|im_end|>"]


@pytest.mark.parametrize("loss", ["assistant", "completion", "all"])
def test_a_turn_without_an_end_is_refused(loss: str) -> None:
    for end in ("", "<|unknown|>"):
        template = CHATML.replace("<|im_end|>", end)
        error = refused(chat([("user", "Hi"), ("assistant", "Hello")]), tiny_tokenizer(template), loss=loss)
        assert "the model would never learn to stop" in error.problems[0]


def test_what_a_template_raises_names_the_row() -> None:
    error = refused(chat([("user", "Hi"), ("user", "Hi"), ("assistant", "Hello")]), TOKENIZERS["instruct"])
    assert error.problems == ("rows:1: the chat template refuses the row: roles must alternate user/assistant",)
    assert "alternate" in str(refused(chat([("user", "a"), ("user", "b"), ("assistant", "c")]), TOKENIZERS["instruct"]))
    with pytest.raises(DataError, match="rows:1: the chat template refuses"):
        render_prompt(chat([("user", "Hi"), ("user", "Hi"), ("assistant", "Hello")]), TOKENIZERS["instruct"])


def test_a_chat_needs_a_template_and_a_text_an_end() -> None:
    error = refused(chat([("user", "Hi"), ("assistant", "Hello")]), RAW[False])
    assert "has no chat template" in error.problems[0]
    with pytest.raises(DataError, match="no chat template"):
        render_prompt(chat([("user", "Hi"), ("assistant", "Hello")]), RAW[False])
    endless = tiny_tokenizer(None, eos=None)
    assert "no end-of-sequence token" in refused(read([{"text": "a"}]).examples[0], endless).problems[0]
