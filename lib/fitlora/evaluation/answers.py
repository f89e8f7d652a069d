"""What a model answers: greedy, in batches, and the same as for each prompt alone.

transformers' own `generate` does the decoding, with its own attention: the step's attention is for
sequences that lie behind each other, and generation pads them to a rectangle and keeps keys and
values. Prompts are sorted by length, so that little is padding, and padded on the left.

Decoding is greedy whatever the model's generation settings say, with no penalties: the answer is then
a function of the weights, and two models can be compared. Of those settings only the tokens that end
an answer are taken.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fitlora.artifacts import read_json
from fitlora.data.formats import Messages, Row
from fitlora.data.templates import render
from fitlora.errors import UserError
from fitlora.evaluation.overflow import each_batch
from fitlora.step.training_step import TrainingStep


@dataclass(frozen=True)
class Question:
    """A held-out row to answer. tokens: the prompt up to where the assistant goes on."""

    prompt: str
    expected: str
    tokens: tuple[int, ...]


def make_questions(rows: Sequence[Row], tokenizer: Any) -> list[Question]:
    """The rows' last answers as questions, tokenized as in training.

    A text has no question; its first half, in tokens, is one, and what is expected is the rest.
    """
    return [
        _make_question(row, tokenizer) if row.text is None else _continuation(row.text, tokenizer)
        for row in rows
    ]


def _make_question(row: Row, tokenizer: Any) -> Question:
    before = render(tokenizer, row.prompt, prompt=True, tools=row.tools)
    expected = row.answer
    if row.messages[-1].get("tool_calls"):  # what a call looks like is the template's to say
        whole = render(tokenizer, row.messages, prompt=False, tools=row.tools)
        ids = tokenizer(whole.removeprefix(before), add_special_tokens=False)["input_ids"]
        expected = _plain_text(tokenizer, ids)
    tokens = tokenizer(before, add_special_tokens=False)["input_ids"]
    return Question(_readable(row.prompt), expected.strip(), tuple(tokens))


def _continuation(text: str, tokenizer: Any) -> Question:
    tokens = tokenizer(text, verbose=False)["input_ids"]
    half = max(1, len(tokens) // 2)
    before, after = (_plain_text(tokenizer, part) for part in (tokens[:half], tokens[half:]))
    return Question(before, after.strip(), tuple(tokens[:half]))


def _plain_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def _readable(messages: Messages) -> str:
    """The prompt for people: its text, with the speakers where there are several turns."""
    texts = [m.get("content") or json.dumps(m.get("tool_calls")) for m in messages]
    if len(messages) == 1:
        return texts[0]
    return "\n".join(f"{m['role']}: {text}" for m, text in zip(messages, texts, strict=True))


def end_tokens(folder: Path, config: Any, tokenizer: Any, rows: Sequence[Row]) -> tuple[int, ...]:
    """Every token that ends an answer, ascending.

    The tokenizer's and the config's end of text, those of generation_config.json in `folder` (chat
    models list their end of turn there), and what the chat template puts behind an answer, if that is
    a special token. Raises UserError for a damaged generation_config.json.
    """
    found = {tokenizer.eos_token_id, *_ends_of_turn(tokenizer, rows)}
    found.update(_listed(config.get_text_config().eos_token_id))
    path = folder / "generation_config.json"
    if path.is_file():
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path} is damaged (it holds no object)")
        found.update(_listed(content.get("eos_token_id")))
    return tuple(sorted(token for token in found if token is not None))


def _listed(tokens: int | list[int] | None) -> list[int]:
    if tokens is None:
        return []
    return tokens if isinstance(tokens, list) else [tokens]


def _ends_of_turn(tokenizer: Any, rows: Sequence[Row]) -> list[int]:
    """The special token that the template closes an answer with; none where it closes with text.

    Told by the first row whose answer is text and nothing else.
    """
    plain = (r for r in rows if r.text is None and not r.messages[-1].get("tool_calls"))
    row = next(plain, None)
    if row is None:
        return []
    before = render(tokenizer, row.prompt, prompt=True, tools=row.tools)
    through = render(tokenizer, row.messages, prompt=False, tools=row.tools)
    rest = through.removeprefix(before).strip()  # templates may trim the answer
    answer = row.answer.strip()
    if not through.startswith(before) or not rest.startswith(answer):
        return []
    tail = tokenizer(rest.removeprefix(answer).strip(), add_special_tokens=False)["input_ids"]
    return tail[:1] if tail and tail[0] in _special_tokens(tokenizer) else []


def _special_tokens(tokenizer: Any) -> set[int]:
    """All of them: chat models have more than the tokenizer has roles for."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, entry in added if entry.special)}


def prompt_limit(config: Any, max_new_tokens: int) -> int | None:
    """The longest prompt that leaves room for an answer, in tokens; None where nothing limits it.

    Raises UserError where the model has no room for a prompt at all.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    if positions <= max_new_tokens:
        raise UserError(
            f"evaluate.max_new_tokens {max_new_tokens} leaves no room for a prompt: the model has "
            f"{positions} positions; lower it"
        )
    return int(positions - max_new_tokens)


@torch.no_grad()
def generate_answers(
    step: TrainingStep,
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    rows: int,
    advance: Callable[[int], None],
) -> list[str]:
    """The model's greedy answer to each question, stripped, in the questions' order.

    A prompt that leaves no room for an answer (`prompt_limit`) has the empty one. ends: tokens that end
    an answer. rows: how many are answered at once, fewer where the device overflows. advance: is
    called with how many were answered. Raises the overflow's own error where a single row is too much.
    """
    limit = prompt_limit(cast(Any, step.model).config, max_new_tokens)
    short = [i for i, q in enumerate(questions) if limit is None or len(q.tokens) <= limit]
    answers = [""] * len(questions)
    advance(len(questions) - len(short))
    # the longest first, so that what overflows does so at the start
    order = sorted(short, key=lambda i: -len(questions[i].tokens))
    settings = generation_settings(tokenizer, ends, max_new_tokens)
    with generating(step.model):

        def answer(batch: Sequence[int]) -> list[list[int]]:
            return _generate(step, [questions[i].tokens for i in batch], settings)

        for batch, found in each_batch(order, rows, answer):
            for index, tokens in zip(batch, found, strict=True):
                answers[index] = _plain_text(tokenizer, tokens).strip()
            advance(len(batch))
    return answers


def generation_settings(
    tokenizer: Any, ends: Sequence[int], max_new_tokens: int, *, temperature: float = 0.0
) -> Any:
    """transformers' settings of an answer: greedy, or drawn at a temperature above 0."""
    from transformers import GenerationConfig

    padding = tokenizer.pad_token_id
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0}
    return GenerationConfig(
        **(drawn if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=tokenizer.eos_token_id if padding is None else padding,
        use_cache=True,
    )


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """The model with an attention that knows padding, and without generation settings of its own."""
    from transformers import GenerationConfig

    attention, settings = model.config._attn_implementation, model.generation_config
    # sdpa has no soft-capped scores, and transformers then leaves the cap out without a word
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    model.set_attn_implementation("sdpa" if model._supports_sdpa and not capped else "eager")
    model.generation_config = GenerationConfig()  # generate() fills what ours leaves open from it
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.generation_config = settings


def _generate(
    step: TrainingStep, prompts: Sequence[Sequence[int]], settings: Any
) -> list[list[int]]:
    """The new tokens of each prompt, without the one that ends them and what follows it."""
    longest = max(len(prompt) for prompt in prompts)
    padding = settings.pad_token_id
    ids = [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    found = cast(Any, step.model).generate(
        input_ids=torch.tensor(ids, device=step.device),
        attention_mask=torch.tensor(mask, device=step.device),
        generation_config=settings,
    )
    ends = set(settings.eos_token_id)
    answers = []
    for tokens in found[:, longest:].tolist():
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        answers.append(tokens[:stop])
    return answers
