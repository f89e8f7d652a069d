"""The comparison at the end: four models, one after the other, on the same held-out rows.

One model is in memory at a time, and what it took is given back before the next one. A model that
overflows the device even row by row is evaluated on the CPU; where each was evaluated is recorded.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fitlora.artifacts import Evaluation, Metrics, Sample
from fitlora.console import say
from fitlora.data.templates import load_tokenizer
from fitlora.device import give_back_memory
from fitlora.evaluation.answers import (
    Question,
    end_tokens,
    generate_answers,
    make_questions,
    prompt_limit,
)
from fitlora.evaluation.metrics import exact_match, mean_loss, perplexity
from fitlora.evaluation.models import Contender, Memory, Place, choose_place, load, on_cpu
from fitlora.model import load_config
from fitlora.params import DataParams, EvaluateParams
from fitlora.plan import Plan
from fitlora.progress import progress
from fitlora.step.batch import TokenSequence
from fitlora.training.data import load_validation, rows_of


@dataclass(frozen=True)
class HeldOut:
    """The rows that all models are measured on, as sequences with a loss and as questions."""

    sequences: Sequence[TokenSequence]
    questions: Sequence[Question]
    tokenizer: Any
    ends: tuple[int, ...]
    max_new_tokens: int

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest sequence or prompt."""
        return max(
            *(len(s.tokens) for s in self.sequences), *(len(q.tokens) for q in self.questions)
        )


@dataclass(frozen=True)
class Result:
    """What came out for one model."""

    metrics: Metrics
    answers: list[str]


def read_held_out(
    model: Path, data: DataParams, evaluate: EvaluateParams, *, trust_remote_code: bool = False
) -> HeldOut:
    """The first `evaluate.rows` validation rows. model: the original model's folder.

    Says how many prompts leave no room for an answer. Raises UserError for bad rows.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    split = load_validation(data, tokenizer, config.get_text_config().vocab_size)
    sequences = split.sequences[: evaluate.rows]
    rows = rows_of(split, data, evaluate.rows)
    questions = make_questions(rows, tokenizer)
    limit = prompt_limit(config, evaluate.max_new_tokens)
    too_long = sum(limit is not None and len(q.tokens) > limit for q in questions)
    if too_long:
        say(
            f"{too_long} of {len(rows)} prompts are longer than {limit} tokens, so that "
            f"{evaluate.max_new_tokens} new ones would go beyond the model's positions; they are "
            "not answered and count as wrong"
        )
    ends = end_tokens(model, config, tokenizer, rows)
    return HeldOut(sequences, questions, tokenizer, ends, evaluate.max_new_tokens)


def compare(
    models: Sequence[Contender], held_out: HeldOut, plan: Plan, memory: Memory, *, samples: int
) -> Evaluation:
    """Evaluates the models in turn. samples: how many answers are kept side by side.

    Raises ArtifactError for a model whose files are damaged, UserError for one without a finite loss.
    """
    results: dict[str, Result] = {}
    devices: dict[str, str] = {}
    for model in models:
        start = time.monotonic()
        result, place = _measure_somewhere(model, held_out, plan, memory)
        results[model.name], devices[model.name] = result, str(place)
        metrics = result.metrics
        say(
            f"{model.title:<12} loss {metrics.loss:.4f}, perplexity {metrics.perplexity:.3f}, exact "
            f"match {metrics.exact_match:.1%} ({place}, {time.monotonic() - start:.1f} s)"
        )
    return Evaluation(
        rows=len(held_out.questions),
        devices=devices,
        samples=_samples(held_out.questions[:samples], results),
        **{name: result.metrics for name, result in results.items()},
    )


def _samples(questions: Sequence[Question], results: dict[str, Result]) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            prompt=question.prompt,
            expected=question.expected,
            answers={name: result.answers[index] for name, result in results.items()},
        )
        for index, question in enumerate(questions)
    )


def _measure_somewhere(
    model: Contender, held_out: HeldOut, plan: Plan, memory: Memory
) -> tuple[Result, Place]:
    """On the Plan's device where the model fits there, and on the CPU otherwise."""
    tokens = {"prompt_tokens": held_out.longest_tokens, "new_tokens": held_out.max_new_tokens}
    place, reason = choose_place(model, plan, memory, **tokens)
    if reason is not None:
        say(f"{model.title} is evaluated on the CPU: {reason}")
    result = None
    try:
        result = measure(model, held_out, plan, place)
    except torch.OutOfMemoryError:
        place = on_cpu(model, memory, **tokens)
        say(f"{model.title} overflows the device even row by row; it is evaluated on the CPU")
    give_back_memory()
    if result is None:
        result = measure(model, held_out, plan, place)
        give_back_memory()
    return result, place


def measure(model: Contender, held_out: HeldOut, plan: Plan, place: Place) -> Result:
    """Loss, answers and exact match of one model. Its memory is free when this has returned.

    Raises torch.OutOfMemoryError where the device cannot hold the model and one row.
    """
    step = load(model, plan, place)
    steps = len(held_out.sequences) + len(held_out.questions)
    with progress(model.title, steps) as advance:
        loss = mean_loss(step, held_out.sequences, advance)
        answers = generate_answers(
            step,
            held_out.questions,
            held_out.tokenizer,
            ends=held_out.ends,
            max_new_tokens=held_out.max_new_tokens,
            rows=place.rows,
            advance=advance,
        )
    match = exact_match(answers, [question.expected for question in held_out.questions])
    return Result(Metrics(loss=loss, perplexity=perplexity(loss), exact_match=match), answers)
