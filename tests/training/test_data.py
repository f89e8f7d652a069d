"""Rows to tokens: which tokens are learned, and how every bad row is reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fitlora.data.templates import DEFAULT_TEMPLATE, load_tokenizer
from fitlora.errors import UserError
from fitlora.params import DataParams
from fitlora.training.data import TokenizedSplit, load_splits, longest, sizes
from tests.rows import rows_in, tokenized
from tests.tiny_models import make_tokenizer

ASSETS = Path(__file__).parent.parent.parent / "assets"
SAMPLE = ASSETS / "sample_model"
VOCABULARY = 100_000
Write = Callable[..., Path]


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def row(*contents: str, system: str | None = None) -> dict[str, Any]:
    """A conversation of a user and the assistant in turn."""
    messages = [message("system", system)] if system is not None else []
    messages += [message("user" if i % 2 == 0 else "assistant", c) for i, c in enumerate(contents)]
    return {"messages": messages}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def lines(*rows: Any, name: str = "rows.jsonl") -> Path:
        """rows: objects to dump, or bytes as they are."""
        raw = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
        (tmp_path / name).write_bytes(b"\n".join(raw) + b"\n")
        return tmp_path / name

    return lines


def untemplated(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes and no template."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<end>"]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"pad_token": "<pad>", "eos_token": "<end>", **special}
    )


@pytest.fixture(scope="module")
def sample() -> Any:
    return load_tokenizer(SAMPLE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer without a template, as `load_tokenizer` hands it out."""
    folder = tmp_path_factory.mktemp("plain")
    untemplated().save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == DEFAULT_TEMPLATE
    return tokenizer


@pytest.fixture(params=["sample", "plain"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def split(path: Path, tokenizer: Any, **options: Any) -> TokenizedSplit:
    return tokenized(path, tokenizer, **{"vocabulary": VOCABULARY, "max_length": 10_000, **options})


def learned_text(found: TokenizedSplit, tokenizer: Any) -> list[str]:
    """What each sequence learns, in words."""
    return [
        tokenizer.decode([t for t, learned in zip(s.tokens, s.learned, strict=True) if learned])
        for s in found.sequences
    ]


CONVERSATIONS = [
    (row("Wie spät?", "Zehn vor acht – 7:50 ⏰."), ["Zehn vor acht – 7:50 ⏰."]),
    (row("one", "1", "two", "2", "three", " 3 "), ["1", "2", " 3 "]),
    (row("one", "line\nline", system="Be brief."), ["line\nline"]),
    (row("same", "same"), ["same"]),
    (row("", "no question"), ["no question"]),
]


def test_learned_are_the_answers_and_their_ends(tokenizer: Any, write: Write) -> None:
    end = tokenizer.eos_token
    found = split(write(*(conversation for conversation, _ in CONVERSATIONS)), tokenizer)
    for text, (_, answers) in zip(learned_text(found, tokenizer), CONVERSATIONS, strict=True):
        assert text == "".join(answer + end for answer in answers)
    assert found.facts.target_tokens == sum(sum(s.learned) for s in found.sequences)


def test_the_whole_conversation_is_read(tokenizer: Any, write: Write) -> None:
    conversation = row("one", "1", "two", "2", system="Be brief.")
    (sequence,) = split(write(conversation), tokenizer).sequences
    text = tokenizer.decode(list(sequence.tokens))
    assert text == tokenizer.apply_chat_template(conversation["messages"], tokenize=False)
    for content in ("Be brief.", "one", "1", "two", "2"):
        assert content in text


def test_learning_all_tokens(tokenizer: Any, write: Write) -> None:
    (sequence,) = split(write(row("one", "1")), tokenizer, train_on="all").sequences
    assert all(sequence.learned)
    assert sequence.target_tokens == len(sequence.tokens) - 1  # the first is never predicted


def test_a_padding_token_that_ends_too_is_learned(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    untemplated(pad_token="<end>").save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (sequence,) = split(write(row("one", "1")), tokenizer).sequences
    ends = [i for i, t in enumerate(sequence.tokens) if t == tokenizer.eos_token_id]
    assert [sequence.learned[i] for i in ends] == [False, True]  # the user's and the assistant's


def test_what_is_too_long_is_cut_and_counted(plain: Any, write: Write) -> None:
    path = write(row("one", "1"), row("one", "1" * 50), row("one", "1" * 100))
    whole = split(path, plain)
    lengths = [len(s.tokens) for s in whole.sequences]
    limit = lengths[1] - 10
    cut = split(path, plain, max_length=limit)
    assert cut.facts.truncated_rows == 2
    assert [len(s.tokens) for s in cut.sequences] == [lengths[0], limit, limit]
    for short, full in zip(cut.sequences, whole.sequences, strict=True):
        assert short.tokens == full.tokens[:limit]
        assert short.learned == full.learned[:limit]
    exact = split(path, plain, max_length=lengths[1])
    assert exact.facts.truncated_rows == 1


def test_answers_that_are_cut_away_are_all_reported(plain: Any, write: Write) -> None:
    path = write(row("q" * 90, "1"), row("short", "1"), row("q" * 95, "1"))
    with pytest.raises(UserError) as caught:
        split(path, plain, max_length=60)
    assert str(caught.value).splitlines() == [
        "2 bad row(s):",
        f"{path}:1: nothing of the answer is within data.max_length 60",
        f"{path}:3: nothing of the answer is within data.max_length 60",
    ]


BAD_ROWS: list[tuple[Any, str]] = [
    (b'{"messages": [', "not JSON"),
    (b'{"messages": "\xff"}', "not UTF-8"),
    (b"[]", "no object with columns"),
    ({"question": "x", "answer": "y"}, "no columns that are known"),
    ({"prompt": "x"}, 'no "completion"'),
    ({"completion": "x"}, 'no "prompt"'),
    ({"instruction": "x"}, 'no "output"'),
    ({"text": 5}, '"text" is no text'),
    ({"text": " "}, '"text" is empty'),
    ({"prompt": "x", "completion": ""}, "message 1 is an empty answer"),
    ({"messages": "x"}, 'no "messages" list'),
    ({"messages": []}, "the last message is not the assistant's"),
    ({"messages": ["x"]}, "message 0 is no object"),
    ({"messages": [message("bot", "x")]}, "message 0 has role 'bot', not one of system, user"),
    ({"messages": [message("user", None)]}, "message 0 has content that is no text"),
    ({"messages": [message("user", ["x"])]}, "message 0 has content that is no text"),
    (row("x", ""), "message 1 is an empty answer"),
    (row("x", " \n"), "message 1 is an empty answer"),
    (row("x"), "the last message is not the assistant's"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "message 0 has half a character"),
]


def test_every_bad_row_is_reported_at_once(write: Write) -> None:
    rows = [row("good", "good")]
    for bad, _ in BAD_ROWS:
        rows += [bad, row("good", "good")]
    path = write(*rows)
    with pytest.raises(UserError) as caught:
        rows_in(path)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{len(BAD_ROWS)} bad row(s):"
    for index, (line, (_, reason)) in enumerate(zip(lines, BAD_ROWS, strict=True)):
        assert line.startswith(f"{path}:{2 * index + 2}: {reason}")


def test_a_long_list_of_bad_rows_is_cut(write: Write) -> None:
    with pytest.raises(UserError) as caught:
        rows_in(write(*[{}] * 25))
    first, *lines = str(caught.value).splitlines()
    assert first == "25 bad row(s):"
    assert len(lines) == 21
    assert lines[-1] == "and 5 more"


def test_lines_are_those_of_the_file(write: Write) -> None:
    path = write(b"\xef\xbb\xbf" + json.dumps(row("a", "b")).encode(), b"", b"  \r", row("c", "ä"))
    rows = rows_in(path)
    assert [(r.line, r.answer) for r in rows] == [(1, "b"), (4, "ä")]
    assert [m["content"] for m in rows[1].prompt] == ["c"]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert [r.line for r in rows_in(path)] == [1, 4]


def test_a_line_separator_in_a_text_ends_no_line(write: Write) -> None:
    path = write(json.dumps(row("a\u2028b", "c\x85d"), ensure_ascii=False).encode())
    assert [r.answer for r in rows_in(path)] == ["c\x85d"]


def test_a_file_without_rows(plain: Any, write: Write) -> None:
    path = write(b" ")
    with pytest.raises(UserError, match=r"rows\.jsonl has no rows; add some"):
        split(path, plain)


def test_the_fingerprint_changes_with_any_token_or_mask(plain: Any, write: Write) -> None:
    base = [row("one", "1"), row("two", "2")]
    variants = [
        base,
        [row("one", "1"), row("two", "3")],
        [row("onf", "1"), row("two", "2")],
        base[::-1],
        base[:1],
        [*base, base[0]],
        [row("one", "1", "x", "2"), row("two", "2")],
    ]
    prints = [split(write(*rows), plain).facts.fingerprint for rows in variants]
    prints.append(split(write(*base), plain, train_on="all").facts.fingerprint)
    assert len(set(prints)) == len(prints)
    again = split(write(*base, name="elsewhere.jsonl"), plain)
    assert again.facts.fingerprint == prints[0]
    assert again.facts.source.endswith("elsewhere.jsonl")


REWRITES = (  # as templates do that drop earlier reasoning: only the last turn is shown whole
    "{% for m in messages %}{{ m['role'] }}: "
    "{{ m['content'] if loop.last else m['content'][:1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = (  # as some templates do
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}"
    "{% endif %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def with_template(template: str) -> Any:
    tokenizer = untemplated()
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_rewrites_earlier_turns(write: Write) -> None:
    tokenizer = with_template(REWRITES)
    path = write(row("question", "answer", "more", "again"))
    with pytest.raises(UserError, match=r"earlier turns differently.*data\.train_on: all"):
        split(path, tokenizer)
    # the way out that it names is one
    (sequence,) = split(path, tokenizer, train_on="all").sequences
    assert all(sequence.learned)


def test_rows_that_the_template_refuses(write: Write) -> None:
    path = write(
        row("a", "b"),
        row("a", "b", system="no system here"),
        {"messages": [message("assistant", "x")]},
        row("a", "b", "c", "d"),
    )
    with pytest.raises(UserError) as caught:
        split(path, with_template(STRICT))
    assert str(caught.value).splitlines() == [
        "2 bad row(s):",
        f"{path}:2: the chat template refuses it (roles must alternate)",
        f"{path}:3: the chat template refuses it (roles must alternate)",
    ]


def test_a_token_beyond_the_vocabulary(plain: Any, write: Write) -> None:
    path = write(row("one", "1"))
    biggest = plain.eos_token_id
    assert split(path, plain, vocabulary=biggest + 1).facts.rows == 1
    with pytest.raises(UserError, match=f"rows.jsonl:1: token id {biggest} is beyond .* {biggest}"):
        split(path, plain, vocabulary=biggest)


def test_facts(plain: Any, write: Write) -> None:
    path = write(*(row("q", "a" * count) for count in range(1, 101)))
    found = split(path, plain)
    base = len(found.sequences[0].tokens) - 1
    facts = found.facts
    assert facts.rows == 100
    assert facts.length.maximum == base + 100
    assert facts.length.p50 == base + 51
    assert facts.length.p90 == base + 91
    assert facts.length.p99 == base + 100
    assert facts.tokens == sum(len(s.tokens) for s in found.sequences)
    assert [s.sample for s in found.sequences] == list(range(100))
    most = longest(found.sequences, 3)
    assert [s.sample for s in most] == [99, 98, 97]
    assert [s.tokens for s in sizes(most)] == [base + 100, base + 99, base + 98]
    assert sizes(most)[0].target_tokens == 101  # the answer and its end


def test_the_longest_are_the_same_for_rows_alike(plain: Any, write: Write) -> None:
    found = split(write(*[row("q", "a")] * 5), plain)
    assert [s.sample for s in longest(found.sequences, 3)] == [0, 1, 2]


def test_both_files_with_the_tokenizer_of_the_folder(write: Write, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model")
    data = DataParams(
        train=str(write(row("a", "b"), name="train.jsonl")),
        validation=str(write(row("c", "d"), row("e", "f"), name="validation.jsonl")),
    )
    train, validation = load_splits(data, tmp_path / "model", VOCABULARY)
    assert (train.facts.rows, validation.facts.rows) == (1, 2)


def test_tokenizers_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer = untemplated()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(tmp_path)


def test_the_shipped_data_is_what_it_was(sample: Any) -> None:
    """What the shipped result was trained on, token by token."""
    prints = [
        tokenized(ASSETS / f"data/{name}.jsonl", sample, vocabulary=1536).facts.fingerprint
        for name in ("train", "validation")
    ]
    assert [found[:16] for found in prints] == ["5f5b1d54a765d7a5", "1d38e4211b3fd4cc"]
