"""Where the answers stand in the text that a chat template makes of a conversation.

No template says so in a way that can be relied on, but it can be asked: rendered up to an answer, with
the assistant's heading, and rendered through it, it gives two beginnings of the whole text, and the
answer lies between their ends. Some templates write a turn otherwise once later ones follow (they drop
its reasoning, say). The model never sees such an answer as it would have given it, so it is read as a
part of the conversation and not learned; the last answer always is.

Asking twice an answer is most of the work of reading long conversations. So a template is asked once
for each order of roles, with marks for contents; what stands between the marks is that order's frame.
A row whose text is its frame filled with its contents, character by character, has its answers where
the frame has them. Any other row is asked about itself, and so is one that contains what the template
looks for in contents: that might change how the answer stands where it is last.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fitlora.data.formats import Row, called_names
from fitlora.data.templates import render_many

Span = tuple[int, int]
Roles = tuple[str, ...]

NO_SPAN = (
    "this chat template shows earlier turns differently once the last answer follows, so the answer "
    "cannot be told from its prompt; use data.train_on: all, or a tokenizer with another template"
)
_PLAIN = {"role", "content"}
# A text between quotes that a template may look for: `'x' in content`, `content.split('x')`, `y = 'x'`
_SOUGHT = re.compile(r"""[=(,]\s*(['"])(.+?)\1|(['"])([^'"]+?)\3\s+(?:not\s+)?in\b""")
_TELLING = re.compile(r"\\[ntr]|[\w\s]")  # nothing else in it: a word, or white space


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and where the learned answers stand in it, their ends included.

    spans: None where all of it is learned. rewritten: earlier answers that are not learned.
    """

    text: str
    spans: tuple[Span, ...] | None
    rewritten: int = 0


@dataclass(frozen=True)
class Frame:
    """What a template writes around contents: one text before each, and one behind the last.

    answers: for each answer that can be learned, its message, and how many characters before its
    content it begins and behind its content it ends.
    """

    between: tuple[str, ...]
    answers: tuple[tuple[int, int, int], ...]

    def spans_in(self, text: str, contents: Sequence[str]) -> tuple[Span, ...] | None:
        """Where the answers stand in `text`; None where it is not this frame around the contents."""
        pieces = [piece for pair in zip(self.between, contents, strict=False) for piece in pair]
        if text != "".join([*pieces, self.between[-1]]):
            return None
        ends, end = [], 0
        for before, content in zip(self.between, contents, strict=False):
            end += len(before) + len(content)
            ends.append(end)
        return tuple(
            (ends[index] - len(contents[index]) - before, _trimmed(text, ends[index] + behind))
            for index, before, behind in self.answers
        )


class Template:
    """A tokenizer's chat template, with what has been learned of it so far."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._frames: dict[Roles, Frame | None] = {}
        source = tokenizer.get_chat_template()
        sought = {match[1] or match[3] for match in _SOUGHT.findall(source)}
        telling = [re.escape(text) for text in sorted(sought) if _TELLING.sub("", text)]
        self._sought = re.compile("|".join(telling)) if telling else None

    def render(self, rows: Sequence[Row], train_on: str) -> list[Rendered | str]:
        """Each conversation as text, or why it has none. train_on: "answers" or "all"."""
        try:
            return self._render(rows, train_on)
        except _refusals():
            return [self._render_one(row, train_on) for row in rows]

    def _render_one(self, row: Row, train_on: str) -> Rendered | str:
        try:
            (found,) = self._render([row], train_on)
        except _refusals() as error:
            return f"the chat template refuses it ({error})"
        return found

    def _render(self, rows: Sequence[Row], train_on: str) -> list[Rendered | str]:
        """One call of the template for all whole rows, and two for those without a frame."""
        texts = render_many(
            self._tokenizer, [(row, len(row.messages)) for row in rows], prompt=False
        )
        if train_on == "all":
            found: list[Rendered | str] = [Rendered(text, None) for text in texts]
        else:
            known = [self._framed(row, text) for row, text in zip(rows, texts, strict=True)]
            other = [index for index, spans in enumerate(known) if spans is None]
            asked = self._ask([rows[index] for index in other], [texts[index] for index in other])
            found = [
                _rendered(row, text, next(asked) if spans is None else spans)
                for row, text, spans in zip(rows, texts, known, strict=True)
            ]
        return [
            _unseen_call(row, text) or one
            for row, text, one in zip(rows, texts, found, strict=True)
        ]

    def _framed(self, row: Row, text: str) -> tuple[Span, ...] | None:
        """Where the answers stand by the frame of the row's roles; None where it has to be asked."""
        if row.tools is not None or any(message.keys() != _PLAIN for message in row.messages):
            return None
        contents = [message["content"] for message in row.messages]
        if self._sought is not None and any(map(self._sought.search, contents)):
            return None
        roles = tuple(message["role"] for message in row.messages)
        if roles not in self._frames:
            try:
                self._frames[roles] = self._frame(roles)
            except _refusals():  # of the marks, perhaps; the row is asked about itself
                self._frames[roles] = None
        frame = self._frames[roles]
        return None if frame is None else frame.spans_in(text, contents)

    def _frame(self, roles: Roles) -> Frame | None:
        """The frame of an order of roles; None where the template does not keep contents as they are."""
        marks = [f"Mark{index:05d}of{len(roles)}." for index in range(len(roles))]
        row = Row(0, [{"role": r, "content": c} for r, c in zip(roles, marks, strict=True)])
        (text,) = render_many(self._tokenizer, [(row, len(roles))], prompt=False)
        if [match[0] for match in re.finditer(r"Mark\d+of\d+\.", text)] != marks:
            return None
        between = re.split(r"Mark\d+of\d+\.", text)
        (spans,) = self._ask([row], [text], trim=False)
        starts = [text.index(mark) for mark in marks]
        answers = []
        for start, end in spans:
            index = next(i for i, s in enumerate(starts) if s >= start)
            answers.append((index, starts[index] - start, end - starts[index] - len(marks[index])))
        return Frame(tuple(between), tuple(answers))

    def _ask(
        self, rows: Sequence[Row], texts: Sequence[str], *, trim: bool = True
    ) -> Iterator[tuple[Span, ...]]:
        """Where the answers of each row stand in its text, by rendering its beginnings.

        Empty where the last one cannot be told. trim: leave line breaks at the ends out.
        """
        answers = [
            (row, index)
            for row in rows
            for index, message in enumerate(row.messages)
            if message["role"] == "assistant"
        ]
        # the last answer ends where the whole does; only those before it are rendered once more
        inner = [(row, index + 1) for row, index in answers if index + 1 < len(row.messages)]
        starts = iter(render_many(self._tokenizer, answers, prompt=True))
        ends = iter(render_many(self._tokenizer, inner, prompt=False))
        for row, text in zip(rows, texts, strict=True):
            spans, told = [], False
            for index, message in enumerate(row.messages):
                if message["role"] != "assistant":
                    continue
                before = next(starts)
                through = next(ends) if index + 1 < len(row.messages) else text
                told = text.startswith(before) and text.startswith(through)
                if told:
                    end = len(through)
                    spans.append((len(before), _trimmed(text, end) if trim else end))
            yield tuple(spans) if told else ()  # nothing without the last one


def _trimmed(text: str, end: int) -> int:
    """`end` without the line breaks before it: they belong to the next turn's heading."""
    while end and text[end - 1] == "\n":
        end -= 1
    return end


def _rendered(row: Row, text: str, spans: tuple[Span, ...]) -> Rendered | str:
    answers = sum(message["role"] == "assistant" for message in row.messages)
    return Rendered(text, spans, answers - len(spans)) if spans else NO_SPAN


def _refusals() -> tuple[type[Exception], ...]:
    """What templates raise: on purpose, or for a message without what they read."""
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError)


def _unseen_call(row: Row, text: str) -> str | None:
    """What is wrong with a template that has no place for tool calls; most of them say nothing."""
    for name in called_names(row):
        if name not in text:
            return f"the chat template leaves the call of {name} out; it knows no tool calls"
    return None
