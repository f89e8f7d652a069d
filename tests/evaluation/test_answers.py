"""Answers in padded batches are those of each prompt alone, greedy and cut where they end."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from fitlora.data.formats import Row
from fitlora.data.templates import load_tokenizer
from fitlora.errors import UserError
from fitlora.evaluation import answers as module
from fitlora.evaluation.answers import (
    Question,
    end_tokens,
    generate_answers,
    make_questions,
    prompt_limit,
)
from fitlora.evaluation.models import Place, load
from fitlora.model import load_config
from fitlora.step.training_step import TrainingStep
from tests.evaluation.forms import CPU, PROMPTS, Tiny
from tests.evaluation.stock import (
    prompt_tokens,
    stock_adapter,
    stock_answer,
    stock_base,
    stock_quantized,
)
from tests.rows import rows_in
from tests.tiny_models import make_config

NEW_TOKENS = 20
NEVER = [287]  # a token that nothing uses
HERE = Place(CPU, "float32", 8)
STOCK = {
    "base": lambda tiny: stock_base(tiny.original),
    "quantized_base": stock_quantized,
    "adapter": stock_adapter,
    "merged": lambda tiny: stock_base(tiny.merged),
}


def questions_of(tiny: Tiny) -> list[Question]:
    return make_questions(rows_in(tiny.rows), load_tokenizer(tiny.original))


def answer(
    step: TrainingStep, questions: list[Question], tiny: Tiny, **options: Any
) -> tuple[list[str], list[int]]:
    """The answers, and how many were told to be done at a time."""
    done: list[int] = []
    settings = {"ends": NEVER, "max_new_tokens": NEW_TOKENS, "rows": 3, **options}
    tokenizer = load_tokenizer(tiny.original)
    found = generate_answers(step, questions, tokenizer, advance=done.append, **settings)
    return found, done


def decoded(tiny: Tiny, tokens: list[int]) -> str:
    text: str = load_tokenizer(tiny.original).decode(tokens, skip_special_tokens=True)
    return text.strip()


@pytest.mark.parametrize("name", list(STOCK))
def test_answers_are_those_of_each_prompt_alone(tiny: Tiny, name: str) -> None:
    stock = STOCK[name](tiny)
    prompts = prompt_tokens(tiny)
    free = [stock_answer(stock, p, ends=NEVER, new_tokens=NEW_TOKENS) for p in prompts]
    # The token that ends answers here is one that is said early by some and by others never or late.
    counts = Counter(token for tokens in free for token in set(tokens[1:]))
    ends = [min(counts, key=lambda token: (abs(counts[token] - len(prompts) / 2), token))]
    alone = [stock_answer(stock, p, ends=ends, new_tokens=NEW_TOKENS) for p in prompts]
    assert len({len(tokens) for tokens in alone}) > 1
    expected = [decoded(tiny, tokens) for tokens in alone]
    assert len(set(expected)) > 2
    assert len({len(prompt) for prompt in prompts}) > 3

    step = load(tiny.models()[name], tiny.plan, HERE)
    for rows in (1, 3, 8):
        assert answer(step, questions_of(tiny), tiny, ends=ends, rows=rows)[0] == expected
    assert answer(step, questions_of(tiny), tiny, ends=ends, rows=3)[1] == [0, 3, 3, 2]


def test_answers_of_weights_on_the_host(tiny: Tiny) -> None:
    layers = {"streamed_layers": (0, 1), "recompute_layers": (0, 1)}
    away = tiny.plan.replace(**layers, embedding="host", head="host", checkpoints="host")
    found, expected = (
        answer(load(tiny.models()["adapter"], plan, HERE), questions_of(tiny), tiny)
        for plan in (away, tiny.plan)
    )
    assert found == expected


def test_generation_settings_of_the_model_are_ignored_and_put_back(tiny: Tiny) -> None:
    step = load(tiny.models()["base"], tiny.plan, HERE)
    model: Any = step.model
    expected, _ = answer(step, questions_of(tiny), tiny)
    own = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, min_new_tokens=3, num_beams=2
    )
    model.generation_config = own
    attention = model.config._attn_implementation
    assert answer(step, questions_of(tiny), tiny)[0] == expected
    assert model.generation_config is own
    assert attention == "fitlora"
    assert model.config._attn_implementation == attention
    with torch.random.fork_rng(devices=[]):
        tokens = torch.tensor([questions_of(tiny)[1].tokens])
        model.set_attn_implementation("sdpa")
        torch.manual_seed(0)
        loose = model.generate(tokens, max_new_tokens=NEW_TOKENS, eos_token_id=NEVER)
    assert decoded(tiny, loose[0, tokens.shape[1] :].tolist()) != expected[1]  # they do matter


def test_longest_prompts_come_first_in_batches_of_like_length(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = load(tiny.models()["base"], tiny.plan, HERE)
    seen: list[list[int]] = []

    def generate(step: TrainingStep, prompts: Any, settings: Any) -> list[list[int]]:
        seen.append([len(prompt) for prompt in prompts])
        return [[len(prompt)] for prompt in prompts]

    monkeypatch.setattr(module, "_generate", generate)
    questions = questions_of(tiny)
    found, _ = answer(step, questions, tiny)
    lengths = [length for batch in seen for length in batch]
    assert [len(batch) for batch in seen] == [3, 3, 2]
    assert lengths == sorted(lengths, reverse=True)
    assert found == [decoded(tiny, [len(q.tokens)]) for q in questions]  # in the rows' order


def test_blanks_before_a_full_stop_stay(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    step = load(tiny.models()["base"], tiny.plan, HERE)
    tokenizer = load_tokenizer(tiny.original)
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    said = tokenizer("yes , it is .", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(said) == "yes, it is."
    monkeypatch.setattr(module, "_generate", lambda step, prompts, settings: [said])
    found = generate_answers(
        step,
        questions_of(tiny)[:1],
        tokenizer,
        ends=NEVER,
        max_new_tokens=NEW_TOKENS,
        rows=1,
        advance=lambda count: None,
    )
    assert found == ["yes , it is ."]


def test_attention_is_put_back_after_an_error(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    step = load(tiny.models()["base"], tiny.plan, HERE)
    seen: list[str] = []

    def fail(**inputs: Any) -> None:
        seen.append(step.model.config._attn_implementation)  # type: ignore[union-attr]
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(step.model, "generate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        answer(step, questions_of(tiny), tiny, rows=1)
    assert seen == ["sdpa"]
    assert step.model.config._attn_implementation == "fitlora"  # type: ignore[union-attr]


def test_soft_capped_scores_are_not_left_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    step = load(tiny.models()["base"], tiny.plan, HERE)
    model: Any = step.model
    model.config.attn_logit_softcapping = 50.0
    seen: list[str] = []

    def generate(step: TrainingStep, prompts: Any, settings: Any) -> list[list[int]]:
        seen.append(model.config._attn_implementation)
        return [[] for _ in prompts]

    monkeypatch.setattr(module, "_generate", generate)
    answer(step, questions_of(tiny)[:1], tiny)
    assert seen == ["eager"]


def test_prompt_without_room_for_an_answer_is_not_answered(tiny: Tiny) -> None:
    step = load(tiny.models()["base"], tiny.plan, HERE)
    questions = questions_of(tiny)
    longest = max(len(q.tokens) for q in questions)
    index = next(i for i, q in enumerate(questions) if len(q.tokens) == longest)
    expected, _ = answer(step, questions, tiny)
    assert expected[index] != ""
    step.model.config.max_position_embeddings = longest + NEW_TOKENS - 1  # type: ignore[union-attr]
    found, done = answer(step, questions, tiny)
    expected[index] = ""
    assert found == expected
    assert done[0] == 1
    assert sum(done) == len(questions)


def test_limit_of_prompts() -> None:
    config = make_config("llama", max_position_embeddings=64)
    assert prompt_limit(config, 24) == 40
    with pytest.raises(UserError, match=r"max_new_tokens 64 leaves no room.* 64 positions"):
        prompt_limit(config, 64)
    assert prompt_limit(AutoConfig.for_model("bloom"), 10**6) is None  # ALiBi: no last position


def test_questions_are_the_prompts_up_to_the_answer(tiny: Tiny) -> None:
    tokenizer = load_tokenizer(tiny.original)
    questions = questions_of(tiny)
    assert [q.prompt for q in questions] == list(PROMPTS)
    assert questions[3].expected == "answer 3"
    text = tokenizer.decode(questions[0].tokens)
    assert text == "<|user|>one</s><|assistant|>"
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", " yes \n")]
    row = Row(1, [{"role": role, "content": content} for role, content in turns])
    (question,) = make_questions([row], tokenizer)
    assert question.prompt == "system: be brief\nuser: hi"
    assert question.expected == "yes"


# --- what ends an answer --------------------------------------------------------------------------

EOS, USER, ASSISTANT, UNUSED = 258, 259, 260, 285


def ends_of(folder: Path, template: str | None = None, **config: Any) -> tuple[int, ...]:
    tokenizer = load_tokenizer(folder)
    if template is not None:
        tokenizer.chat_template = template
    rows = [Row(1, [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}])]
    return end_tokens(folder, make_config("llama", **config), tokenizer, rows)


def test_end_of_text_of_tokenizer_config_and_generation_config(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.original, tmp_path / "model")
    settings = folder / "generation_config.json"
    settings.unlink()
    assert ends_of(folder) == (EOS,)
    assert ends_of(folder, eos_token_id=[3, EOS]) == (3, EOS)
    assert ends_of(folder, eos_token_id=None) == (EOS,)
    for listed, expected in (([EOS, UNUSED], (EOS, UNUSED)), (UNUSED, (EOS, UNUSED))):
        settings.write_text(json.dumps({"eos_token_id": listed, "do_sample": True}))
        assert ends_of(folder) == expected
    for damaged in ("{", "[]"):
        settings.write_text(damaged)
        with pytest.raises(UserError, match=r"generation_config.json is damaged"):
            ends_of(folder)


TURN = "{% for message in messages %}<|user|>{{ message['content'] CUT }}END{% endfor %}"


@pytest.mark.parametrize(
    ("closing", "cut", "expected"),
    [
        ("<|assistant|>\n", "", (EOS, ASSISTANT)),
        ("\n<|assistant|>", "| trim", (EOS, ASSISTANT)),
        ("</s>", "", (EOS,)),
        ("\n###\n", "", (EOS,)),  # text, of which the first token ends nothing
        ("", "", (EOS,)),
    ],
)
def test_end_of_turn_is_read_off_the_template(
    tiny: Tiny, closing: str, cut: str, expected: tuple[int, ...]
) -> None:
    turn = TURN.replace("END", closing).replace("CUT", cut)
    template = turn + "{% if add_generation_prompt %}<|user|>{% endif %}"
    assert ends_of(tiny.original, template) == expected


def test_template_that_rewrites_its_prompt_ends_nothing(tiny: Tiny) -> None:
    template = "{{ messages | length }}{{ messages[-1]['content'] }}<|assistant|>"
    assert ends_of(tiny.original, template) == (EOS,)
    assert load_config(tiny.original).eos_token_id == EOS
