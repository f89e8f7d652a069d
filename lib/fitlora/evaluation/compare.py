"""The comparison at the end: four models, one after the other, on the same held-out rows.

The adapter comes first, as the others are compared with what it predicts; then the merged model, which
has to pass the gate; then the bases. The adapter on the original weights is measured too, by its
predictions alone: what a merge into those changes. Where it was merged into those they come before all
else, as a merge is compared with the adapter on the weights that it went into.

One model is in memory at a time, and what it took is given back before the next one. A model that
overflows the device even row by row is evaluated on the CPU; where each was evaluated is recorded.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fitlora.artifacts import Evaluation, Gate, Group, Metrics, Sample
from fitlora.console import say
from fitlora.data.templates import load_tokenizer
from fitlora.device import give_back_memory, is_overflow
from fitlora.evaluation.answers import (
    Question,
    end_tokens,
    generate_answers,
    make_questions,
    prompt_limit,
)
from fitlora.evaluation.gate import (
    answer_problems,
    distance_problems,
    fidelity,
    gate_of,
    reject,
)
from fitlora.evaluation.groups import by_length, by_source, sources_of
from fitlora.evaluation.metrics import exact_matches, metrics_of, perplexity
from fitlora.evaluation.models import (
    ON_ORIGINAL,
    Contender,
    Memory,
    Place,
    choose_place,
    load,
    on_cpu,
)
from fitlora.evaluation.scores import Reference, RowScore, mean_loss, score
from fitlora.model import load_config
from fitlora.params import DataParams, EvaluateParams, MergeParams
from fitlora.plan import Plan
from fitlora.progress import progress
from fitlora.step.batch import TokenSequence
from fitlora.training.data import load_validation, rows_of

GroupKind = Literal["length", "source"]
MODELS = ("base", "quantized_base", "adapter", "merged")  # as they are shown
# As they are measured, behind the one that the others are held against.
_ORDER = ("adapter", "merged", "base", "quantized_base", ON_ORIGINAL)


@dataclass(frozen=True)
class HeldOut:
    """The rows that all models are measured on, as sequences with a loss and as questions.

    groups: by "length" and "source", the positions of the rows in each group by its name.
    """

    sequences: Sequence[TokenSequence]
    questions: Sequence[Question]
    groups: Mapping[GroupKind, Mapping[str, Sequence[int]]]
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
    """What came out for one model, row by row; without answers where it was not asked."""

    scores: Sequence[RowScore]
    answers: Sequence[str]
    matches: Sequence[bool]

    def metrics(self, rows: Sequence[int]) -> Metrics:
        """The figures of some of the rows, by their positions."""
        return metrics_of([self.scores[i] for i in rows], [self.matches[i] for i in rows])


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
    groups: dict[GroupKind, dict[str, list[int]]] = {
        "length": by_length([len(s.tokens) for s in sequences]),
        "source": by_source(sources_of(split, evaluate.rows)),
    }
    ends = end_tokens(model, config, tokenizer, rows)
    return HeldOut(sequences, questions, groups, tokenizer, ends, evaluate.max_new_tokens)


def compare(
    models: Sequence[Contender],
    held_out: HeldOut,
    plan: Plan,
    memory: Memory,
    *,
    limits: MergeParams,
    samples: int,
) -> Evaluation:
    """Evaluates the models (`contenders`) in turn. samples: how many answers are kept side by side.

    Raises MergeRejected where the merged model is beyond the limits, before the bases are evaluated;
    ArtifactError for a model whose files are damaged; UserError for one without a finite loss.
    """
    reference = Reference()
    gate = gate_of(limits, _against(models, limits))
    results: dict[str, Result] = {}
    devices: dict[str, str] = {}
    for model in sorted(models, key=lambda m: (m.name != gate.against, _ORDER.index(m.name))):
        is_reference = model.name == gate.against

        def measured(
            place: Place, model: Contender = model, is_reference: bool = is_reference
        ) -> Result:
            seen = {"record": reference} if is_reference else {"against": reference}
            return measure(model, held_out, plan, place, **seen)

        start = time.monotonic()
        results[model.name], place = _somewhere(model, held_out, plan, memory, measured)
        devices[model.name] = str(place)
        line = _line(model, results[model.name], gate)
        say(f"{line} ({place}, {time.monotonic() - start:.1f} s)")
        if model.name == "merged":
            _check_merged(results, gate)
    (trained_on,) = (model for model in models if model.name == "quantized_base")
    answered = {name: results[name] for name in MODELS}
    everything = range(len(held_out.questions))
    return Evaluation(
        rows=len(held_out.questions),
        base_bits=trained_on.quantization.bits,
        **{name: result.metrics(everything) for name, result in answered.items()},
        gate=gate,
        fidelity={n: fidelity(r.scores) for n, r in results.items() if n != gate.against},
        groups=tuple(
            Group(
                by=kind,
                name=name,
                rows=len(rows),
                models={key: result.metrics(rows) for key, result in answered.items()},
            )
            for kind, groups in held_out.groups.items()
            for name, rows in groups.items()
        ),
        devices={name: devices[name] for name in MODELS},
        samples=_samples(held_out.questions[:samples], answered),
    )


def _against(models: Sequence[Contender], limits: MergeParams) -> str:
    """The adapter on the weights that it was merged into, where those are not what it was trained on."""
    into_original = limits.base == "original" and any(m.name == ON_ORIGINAL for m in models)
    return ON_ORIGINAL if into_original else "adapter"


def _check_merged(results: Mapping[str, Result], gate: Gate) -> None:
    adapter, merged = results["adapter"], results["merged"]
    problems = distance_problems(fidelity(merged.scores), gate)
    problems += answer_problems(adapter.matches, merged.matches, gate)
    reject(problems, gate)


def _line(model: Contender, result: Result, gate: Gate) -> str:
    loss = mean_loss(result.scores)
    found = f"{model.title:<15} loss {loss:.4f}, perplexity {perplexity(loss):.3f}"
    if result.answers:
        found += f", exact match {sum(result.matches) / len(result.matches):.1%}"
    if model.name not in ("base", "quantized_base", gate.against):
        distance = fidelity(result.scores)
        found += (
            f"; from {gate.reference}: KL {distance.kl_divergence:.2g} nats, "
            f"top-1 agreement {distance.top1_agreement:.2%}"
        )
    return found


def _samples(questions: Sequence[Question], results: Mapping[str, Result]) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            prompt=question.prompt,
            expected=question.expected,
            answers={name: result.answers[index] for name, result in results.items()},
        )
        for index, question in enumerate(questions)
    )


def _somewhere(
    model: Contender,
    held_out: HeldOut,
    plan: Plan,
    memory: Memory,
    measured: Callable[[Place], Result],
) -> tuple[Result, Place]:
    """On the Plan's device where the model fits there, and on the CPU otherwise."""
    tokens = {"prompt_tokens": held_out.longest_tokens, "new_tokens": held_out.max_new_tokens}
    place, reason = choose_place(model, plan, memory, **tokens)
    if reason is not None:
        say(f"{model.title} is evaluated on the CPU: {reason}")
    result = None
    try:
        result = measured(place)
    except (RuntimeError, MemoryError) as error:
        if not is_overflow(error):
            raise
        place = on_cpu(model, memory, **tokens)
        say(f"{model.title} overflows the device even row by row; it is evaluated on the CPU")
    give_back_memory()
    if result is None:
        result = measured(place)
        give_back_memory()
    return result, place


def measure(
    model: Contender,
    held_out: HeldOut,
    plan: Plan,
    place: Place,
    *,
    record: Reference | None = None,
    against: Reference | None = None,
) -> Result:
    """Scores and answers of one model. Its memory is free when this has returned.

    record and against: as for `score`. Raises the overflow's own error (`fitlora.device.is_overflow`)
    where the device cannot hold the model and one row.
    """
    step = load(model, plan, place)
    answers: list[str] = []
    asked = model.name in MODELS
    questions = held_out.questions if asked else ()
    with progress(model.title, len(held_out.sequences) + len(questions)) as advance:
        scores = score(step, held_out.sequences, advance, record=record, against=against)
        if asked:
            answers = generate_answers(
                step,
                questions,
                held_out.tokenizer,
                ends=held_out.ends,
                max_new_tokens=held_out.max_new_tokens,
                rows=place.rows,
                advance=advance,
            )
    expected = [question.expected for question in questions]
    return Result(scores, answers, exact_matches(answers, expected))
