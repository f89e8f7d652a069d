"""Rows as tokens, and which of them are learned.

The loss counts the assistant's turns, end-of-turn token included, as the model must learn to stop. Rows
go through in batches: the tokenizer spreads one over the cores, in a thread of its own, while the next
is read and put through the template here.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from fitlora.data.answers import Rendered, Template
from fitlora.data.formats import Row

_AT_ONCE = 1000  # rows of a batch; two batches are held


@dataclass(frozen=True)
class Encoded:
    """A row's token ids (int32) and, for each, 1 where it is learned; or why it has none.

    rewritten: earlier answers that are not learned, as the template writes them otherwise later.
    """

    ids: "array[int]"
    learned: bytes
    problem: str | None = None
    rewritten: int = 0


def encode(tokenizer: Any, rows: Iterable[Row], train_on: str) -> Iterator[Encoded]:
    """The rows as tokens, in order. train_on: "answers" or "all"; texts are learned as a whole.

    Rows are taken from the iterable up to two batches ahead.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer's file may ask for both
    backend.no_padding()
    backend.encode_special_tokens = False
    template, rows = Template(tokenizer), iter(rows)
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting: _Batch | None = None
        while batch := list(islice(rows, _AT_ONCE)):
            chats = template.render([row for row in batch if row.text is None], train_on)
            texts = [chat.text for chat in chats if isinstance(chat, Rendered)]
            plain = [row.text for row in batch if row.text is not None]
            started = _Batch(
                batch,
                chats,
                thread.submit(backend.encode_batch, texts, add_special_tokens=False),
                thread.submit(backend.encode_batch, plain, add_special_tokens=True),
            )
            if waiting is not None:
                yield from waiting.encoded(tokenizer.eos_token_id)
            waiting = started
        if waiting is not None:
            yield from waiting.encoded(tokenizer.eos_token_id)


@dataclass(frozen=True)
class _Batch:
    """Rows, their conversations as text, and the encodings that are on their way."""

    rows: Sequence[Row]
    chats: Sequence[Rendered | str]
    encodings: "Future[list[Any]]"
    plain_encodings: "Future[list[Any]]"

    def encoded(self, end: int) -> Iterator[Encoded]:
        """The rows as tokens, in order. end: the end-of-text token's id, which closes a text."""
        chats = iter(self.chats)
        encodings, plain = iter(self.encodings.result()), iter(self.plain_encodings.result())
        for row in self.rows:
            if row.text is not None:
                ids = array("i", next(plain).ids)
                if not ids or ids[-1] != end:
                    ids.append(end)
                yield Encoded(ids, b"\1" * len(ids))
                continue
            chat = next(chats)
            if isinstance(chat, str):
                yield Encoded(array("i"), b"", chat)
                continue
            encoding = next(encodings)
            ids = array("i", encoding.ids)
            yield Encoded(ids, _learned(encoding, chat), rewritten=chat.rewritten)


def _learned(encoding: Any, chat: Rendered) -> bytes:
    """1 for each token that lies within an answer."""
    if chat.spans is None:
        return b"\1" * len(encoding)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    learned = np.zeros(len(offsets), dtype=np.uint8)
    for start, end in chat.spans:
        learned |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
    return learned.tobytes()
