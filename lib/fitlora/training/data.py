"""From rows of a file to sequences of tokens, each knowing which of its tokens are learned.

A row is a conversation: `{"messages": [{"role": ..., "content": ...}, ...]}`. The tokenizer's chat
template turns it into text; a tokenizer without one gets `DEFAULT_TEMPLATE`. The loss counts the
assistant's turns, end-of-turn token included, as the model must learn to stop. Which tokens those are
is read off the text: the template is rendered up to each answer and through it, and the characters
in between are the answer.

Every bad row of a file is reported at once, with its line and the reason.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitlora.artifacts import Percentiles, SequenceSize, Split
from fitlora.errors import UserError
from fitlora.params import DataParams
from fitlora.step.batch import TokenSequence

# For tokenizers without a chat template: plain headings, each turn closed by the end-of-text token.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "### {{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)
ROLES = ("system", "user", "assistant", "tool")
_SHOWN = 20  # problems listed in one message; the rest are counted


@dataclass(frozen=True)
class Row:
    """One conversation, and the line of the file it stands in."""

    line: int
    messages: list[dict[str, str]]

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The messages before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class TokenizedSplit:
    """A file of rows as sequences, and the facts that planning needs."""

    sequences: list[TokenSequence]
    facts: Split


def read_rows(path: Path) -> list[Row]:
    """Reads a JSONL file of conversations; raises UserError that lists every bad row."""
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: rows are read from .jsonl files, one JSON object a line")
    if not path.is_file():
        raise UserError(f"{path} is missing (data.train, data.validation)")
    rows: list[Row] = []
    problems: list[str] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                rows.append(Row(number, _check_messages(json.loads(raw.decode("utf-8-sig")))))
            except UnicodeDecodeError as error:
                problems.append(f"{path}:{number}: not UTF-8 ({error.reason})")
            except json.JSONDecodeError as error:
                problems.append(f"{path}:{number}: not JSON ({error.msg})")
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
    if not rows and not problems:
        problems.append(f"{path}: no rows")
    _raise(problems)
    return rows


def _raise(problems: Sequence[str]) -> None:
    if not problems:
        return
    more = len(problems) - _SHOWN
    tail = [f"and {more} more"] if more > 0 else []
    raise UserError("\n".join([f"{len(problems)} bad row(s):", *problems[:_SHOWN], *tail]))


def _check_messages(content: Any) -> list[dict[str, str]]:
    if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
        raise ValueError('no "messages" list')
    messages: list[dict[str, str]] = content["messages"]
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {index} is no object")
        role, text = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {index} has role {role!r}, not one of {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise ValueError(f"message {index} has content that is no text")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"message {index} has half a character (a lone surrogate)")
        if role == "assistant" and not text.strip():
            raise ValueError(f"message {index} is an empty answer")
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    return messages


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


def render(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool) -> str:
    """The conversation as text; with `prompt`, up to where the assistant would go on."""
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )
    return text


def tokenize(
    path: Path, tokenizer: Any, *, max_length: int, train_on: str, vocabulary: int
) -> TokenizedSplit:
    """Reads and tokenizes a file of rows.

    max_length: tokens that are kept of a sequence. vocabulary: the model's, to catch a tokenizer that
    belongs to another model. Raises UserError for bad rows, those among them that are left without an
    answer by the cut.
    """
    rows = read_rows(path)
    sequences: list[TokenSequence] = []
    problems: list[str] = []
    truncated = 0
    for index, (row, ids, learned) in enumerate(_encode(path, rows, tokenizer, train_on, problems)):
        if len(ids) > max_length:
            truncated += 1
            ids, learned = ids[:max_length], learned[:max_length]
        if max(ids, default=0) >= vocabulary:
            raise UserError(
                f"{path}:{row.line}: token id {max(ids)} is beyond the model's {vocabulary}"
            )
        sequence = TokenSequence(index, tuple(ids), tuple(learned))
        if sequence.target_tokens == 0:
            problems.append(
                f"{path}:{row.line}: nothing of the answer is within data.max_length {max_length}"
            )
        sequences.append(sequence)
    _raise(problems)
    return TokenizedSplit(sequences, _facts(path, sequences, truncated))


def _encode(
    path: Path, rows: list[Row], tokenizer: Any, train_on: str, problems: list[str]
) -> Iterator[tuple[Row, list[int], list[bool]]]:
    """Token ids of each row and which are learned; rows that the template refuses are `problems`."""
    from jinja2 import TemplateError

    for row in rows:
        try:
            text = render(tokenizer, row.messages, prompt=False)
            spans = _answer_spans(tokenizer, row, text) if train_on == "answers" else []
        except TemplateError as error:
            problems.append(f"{path}:{row.line}: the chat template refuses it ({error})")
            continue
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = list(encoded["input_ids"])
        offsets = encoded["offset_mapping"]
        if train_on == "all":
            learned = [True] * len(ids)
        else:
            learned = [any(a <= start and end <= b for a, b in spans) for start, end in offsets]
        yield row, ids, learned


def _answer_spans(tokenizer: Any, row: Row, text: str) -> list[tuple[int, int]]:
    """Where the assistant's turns stand in the rendered text, as (start, end) characters."""
    spans = []
    for index, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, row.messages[:index], prompt=True)
        through = render(tokenizer, row.messages[: index + 1], prompt=False)
        if not (text.startswith(before) and text.startswith(through)):
            raise UserError(
                "this chat template renders earlier turns differently once later ones follow, so the "
                "answers cannot be told from the prompts; use data.train_on: all"
            )
        spans.append((len(before), len(through.rstrip("\n"))))
    return spans


def _facts(path: Path, sequences: list[TokenSequence], truncated: int) -> Split:
    lengths = sorted(len(s.tokens) for s in sequences)
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(
            struct.pack(f"<I{len(sequence.tokens)}I", len(sequence.tokens), *sequence.tokens)
        )
        digest.update(bytes(sequence.learned))

    def at(share: float) -> int:
        return lengths[min(len(lengths) - 1, int(share * len(lengths)))]

    return Split(
        source=str(path),
        rows=len(sequences),
        tokens=sum(lengths),
        target_tokens=sum(s.target_tokens for s in sequences),
        truncated_rows=truncated,
        length=Percentiles(p50=at(0.5), p90=at(0.9), p99=at(0.99), maximum=lengths[-1]),
        fingerprint=digest.hexdigest(),
    )


def longest(sequences: Sequence[TokenSequence], count: int) -> list[TokenSequence]:
    """The `count` longest, longest first; the earlier row where two are alike."""
    return sorted(sequences, key=lambda s: (-len(s.tokens), -s.target_tokens, s.sample))[:count]


def sizes(sequences: Sequence[TokenSequence]) -> tuple[SequenceSize, ...]:
    """The sequences as far as memory is concerned."""
    return tuple(
        SequenceSize(tokens=len(s.tokens), target_tokens=s.target_tokens) for s in sequences
    )


def load_splits(
    data: DataParams, folder: Path, vocabulary: int, *, trust_remote_code: bool = False
) -> tuple[TokenizedSplit, TokenizedSplit]:
    """Training and validation rows as params name them, with the tokenizer of the model's folder."""
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    train, validation = (
        tokenize(
            Path(file),
            tokenizer,
            max_length=data.max_length,
            train_on=data.train_on,
            vocabulary=vocabulary,
        )
        for file in (data.train, data.validation)
    )
    return train, validation
