"""Rows as tokens: the tokenizer's chat template, and which tokens of what it makes are learned.

The template turns a conversation into text; a tokenizer without one gets `DEFAULT_TEMPLATE`. The loss
counts the assistant's turns, end-of-turn token included, as the model must learn to stop. Which tokens
those are is read off the text: the template is rendered up to each answer and through it, and the
characters in between are the answer. Rows go through in batches, which the tokenizer spreads over the
cores.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fitlora.data.formats import Messages, Row, called_names
from fitlora.errors import UserError

# For tokenizers without a chat template: plain headings, each turn closed by the end-of-text token.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "### {{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """A row's token ids (int32) and, for each, 1 where it is learned; or why it has none."""

    ids: "array[int]"
    learned: bytes
    problem: str | None = None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, with a chat template in any case."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} has no usable tokenizer: {error}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder} has a slow tokenizer; FitLoRA needs its tokenizer.json")
    if tokenizer.eos_token is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-text token, so no answer could end")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_TEMPLATE
    return tokenizer


def render(
    tokenizer: Any, messages: Messages, *, prompt: bool, tools: list[Any] | None = None
) -> str:
    """The conversation as text; with `prompt`, up to where the assistant would go on."""
    text: str = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=prompt
    )
    return text


def encode(tokenizer: Any, rows: Sequence[Row], train_on: str) -> Iterator[Encoded]:
    """The rows as tokens, in order. train_on: "answers" or "all"; texts are learned as a whole.

    Raises UserError for a template that shows earlier turns otherwise once later ones follow.
    """
    chats = [row for row in rows if row.text is None]
    rendered = _render_all(tokenizer, chats, train_on)
    texts = [found for found in rendered if isinstance(found, _Text)]
    conversations = iter(_tokens(tokenizer, [found.text for found in texts], special=False))
    plain = iter(
        _tokens(tokenizer, [row.text for row in rows if row.text is not None], special=True)
    )
    chat = iter(rendered)
    for row in rows:
        if row.text is not None:
            ids = array("i", next(plain).ids)
            if not ids or ids[-1] != tokenizer.eos_token_id:
                ids.append(tokenizer.eos_token_id)
            yield Encoded(ids, b"\1" * len(ids))
            continue
        found = next(chat)
        if isinstance(found, str):
            yield Encoded(array("i"), b"", found)
            continue
        encoding = next(conversations)
        ids = array("i", encoding.ids)
        if found.spans is None:
            yield Encoded(ids, b"\1" * len(ids))
            continue
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        learned = np.zeros(len(ids), dtype=np.uint8)
        for start, end in found.spans:
            learned |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
        yield Encoded(ids, learned.tobytes())


def _tokens(tokenizer: Any, texts: list[str], *, special: bool) -> list[Any]:
    """Encodings of the texts: uncut, unpadded, special tokens in the text recognized."""
    if not texts:
        return []
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer's file may ask for both
    backend.no_padding()
    backend.encode_special_tokens = False
    encodings: list[Any] = backend.encode_batch(texts, add_special_tokens=special)
    return encodings


@dataclass(frozen=True)
class _Text:
    """A rendered conversation, and where its answers stand; spans: None to learn all of it."""

    text: str
    spans: list[tuple[int, int]] | None


def _render_all(tokenizer: Any, rows: Sequence[Row], train_on: str) -> list[_Text | str]:
    """Each conversation as text; the reason, for those that the template refuses."""
    try:
        return _render_batch(tokenizer, rows, train_on)
    except UserError:
        raise
    except _refusals():
        return [_render_one(tokenizer, row, train_on) for row in rows]


def _render_one(tokenizer: Any, row: Row, train_on: str) -> _Text | str:
    try:
        (found,) = _render_batch(tokenizer, [row], train_on)
    except UserError:
        raise
    except _refusals() as error:
        return f"the chat template refuses it ({error})"
    return found


def _refusals() -> tuple[type[Exception], ...]:
    """What templates raise: on purpose, or for a message without what they read."""
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError)


def _render_batch(tokenizer: Any, rows: Sequence[Row], train_on: str) -> list[_Text | str]:
    """One call of the template for all whole rows, one for the starts of all answers."""
    whole = _render_many(tokenizer, [(row, len(row.messages)) for row in rows], prompt=False)
    unseen = [_unseen_call(row, text) for row, text in zip(rows, whole, strict=True)]
    if train_on == "all":
        return [bad or _Text(text, None) for bad, text in zip(unseen, whole, strict=True)]
    answers = [
        (row, index)
        for row in rows
        for index, message in enumerate(row.messages)
        if message["role"] == "assistant"
    ]
    # the last answer ends where the whole does; only those before it are rendered once more
    inner = [(row, index + 1) for row, index in answers if index + 1 < len(row.messages)]
    starts = iter(_render_many(tokenizer, answers, prompt=True))
    ends = iter(_render_many(tokenizer, inner, prompt=False))
    found: list[_Text | str] = []
    for row, text, bad in zip(rows, whole, unseen, strict=True):
        spans = []
        for index, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            before = next(starts)
            through = next(ends) if index + 1 < len(row.messages) else text
            if not (text.startswith(before) and text.startswith(through)):
                raise UserError(
                    "this chat template renders earlier turns differently once later ones follow, so "
                    "the answers cannot be told from the prompts; use data.train_on: all"
                )
            spans.append((len(before), len(through.rstrip("\n"))))
        found.append(bad or _Text(text, spans))
    return found


def _unseen_call(row: Row, text: str) -> str | None:
    """What is wrong with a template that has no place for tool calls; most of them say nothing."""
    for name in called_names(row):
        if name not in text:
            return f"the chat template leaves the call of {name} out; it knows no tool calls"
    return None


def _render_many(tokenizer: Any, parts: list[tuple[Row, int]], *, prompt: bool) -> list[str]:
    """The first `count` messages of each row as text; rows with tools of their own one by one."""
    plain = [row.messages[:count] for row, count in parts if row.tools is None]
    texts: list[str] = (
        tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
        if plain
        else []
    )
    rest = iter(texts)
    return [
        next(rest)
        if row.tools is None
        else render(tokenizer, row.messages[:count], prompt=prompt, tools=row.tools)
        for row, count in parts
    ]
