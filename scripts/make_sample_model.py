"""Make the sample model: a tokenizer and a tiny Llama that already know the sample language.

A first run of the pipeline should need no hub, so the repository ships a base model of a few
megabytes. Random weights would not do: an adapter of rank 16 can redirect skills, not make them.
So the base is trained here, from a seed and nothing else, on text that this script writes: notes
about transactions, and chats with many small exercises over the same words (repeat, copy a field,
rewrite a date, digits for words, short units, lists, forms). It learns to read, copy and rewrite.

What it must never see is the task of `make_sample_data.py`: its instruction, and an answer made of
bare fields between bars. The exercises keep clear of it by construction: answers with several
fields name each field or hold two at most, and bars only ever stand between single words.

    python scripts/make_sample_model.py --seed 0 --out assets/sample_model

One GPU takes a minute or two. A CPU serves for small sizes (`--steps 2 --documents 200 ...`), which
is how the test runs it. The text is the same on every machine; the weights are the same bit for bit
only on the same kind of device with the same versions, since kernels differ in their order of adding.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from sample_language import (
    CURRENCIES,
    FIRST_NAMES,
    MONTHS,
    PLACES,
    UNITS,
    Statement,
    draw_fact,
    iso_date,
    money,
    number_words,
    quantity,
    quantity_number,
    state,
    written_date,
    written_money,
    written_quantity,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, PAD, END = "<|bos|>", "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# A reply's end token is the last thing in it, so a full chat ends with eos, and the prompt (with
# its generation prompt) is an exact prefix of it.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"
)

MAX_POSITIONS = 512

# Questions are drawn at random, so most of their tokens teach nothing but the distribution.
PROMPT_WEIGHT = 0.1

# ---- Text ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A run of text, and whether the model is to produce it (or only to read it)."""

    text: str
    produced: bool


Exercise = tuple[str, str]  # question, answer


def _with_note(random: Random, instruction: str, note: str) -> str:
    """Put the instruction before or behind the text that it is about."""
    if random.random() < 0.7:
        return f"{instruction}{random.choice((' ', chr(10)))}{note}"
    return f"{note}\n{instruction}"


def _repeat(random: Random, statement: Statement) -> Exercise:
    instruction = random.choice(
        ("Repeat this:", "Copy the text:", "Say it again:", "Write the same sentence:")
    )
    return _with_note(random, instruction, statement.sentence), statement.sentence


# Field -> (words for it, as the sentence writes it, in its fixed form).
def _fields(statement: Statement) -> dict[str, tuple[tuple[str, ...], str, str]]:
    fact = statement.fact
    return {
        "date": (("date", "day"), statement.date, iso_date(fact.date)),
        "party": (("name", "customer", "party"), fact.party, fact.party),
        "quantity": (("quantity", "measure"), statement.quantity, quantity(fact)),
        "item": (("goods", "item"), fact.item, fact.item),
        "money": (("amount", "price", "sum"), statement.money, money(fact)),
    }


def _copy_field(random: Random, statement: Statement) -> Exercise:
    words, written, _ = random.choice(tuple(_fields(statement).values()))
    word = random.choice(words)
    instruction = random.choice(
        (f"What is the {word}?", f"Which {word} is named here?", f"Copy the {word}.", f"{word}?")
    )
    return _with_note(random, instruction, statement.sentence), written


_FIXED_FORMS = {
    "date": ("Give the date as year-month-day.", "When was it, in digits?", "ISO date?"),
    "party": ("Who is it?", "Give only the name.", "Whom is this about?"),
    "quantity": ("How much, in short?", "Give the quantity with a short unit.", "Quantity, short?"),
    "money": ("Give the amount with its code.", "What did it cost, exactly?", "Amount and code?"),
}


def _rewrite_field(random: Random, statement: Statement) -> Exercise:
    field = random.choice(tuple(_FIXED_FORMS))
    instruction = random.choice(_FIXED_FORMS[field])
    return _with_note(random, instruction, statement.sentence), _fields(statement)[field][2]


def _rewrite_alone(random: Random, statement: Statement) -> Exercise:
    """The same rewriting without a sentence around it."""
    fact = statement.fact
    instruction, text, answer = random.choice(
        (
            ("Date in digits:", written_date(random, fact.date), iso_date(fact.date)),
            ("Short unit:", written_quantity(random, fact), quantity(fact)),
            ("Amount with code:", written_money(random, fact), money(fact)),
        )
    )
    return f"{instruction} {text}", answer


def _lexicon(random: Random, statement: Statement) -> Exercise:
    """Single words: numbers, units, months, currencies, both ways."""
    del statement
    number = random.randrange(100)
    unit = random.choice(UNITS)
    month = random.choice(MONTHS)
    code, word = random.choice(tuple(CURRENCIES.items()))
    return random.choice(
        (
            (f"Digits: {number_words(number)}", str(number)),
            (f"In words: {number}", number_words(number)),
            (f"Short for {unit.long}?", unit.short),
            (f"What does {unit.short} stand for?", unit.long),
            (f"Number of the month {month}?", f"{MONTHS.index(month) + 1:02d}"),
            (f"Code of {word}?", code),
            (f"Which money is {code}?", word),
        )
    )


def _spell(random: Random, statement: Statement) -> Exercise:
    """Change letters or digits without changing what they say."""
    fact = statement.fact
    word = random.choice((fact.party, fact.item, fact.place, fact.unit.long))
    number = f"{random.randint(1000, 999999):,}"
    return random.choice(
        (
            (f"Upper case: {word}", word.upper()),
            (f"Lower case: {word}", word.lower()),
            (f"Without commas: {number}", number.replace(",", "")),
            (f"Two decimals: {quantity_number(fact)}", f"{fact.quantity_tenths / 10:.2f}"),
        )
    )


def _words(random: Random, statement: Statement) -> Exercise:
    """Lists of single words."""
    del statement
    pool = random.choice((FIRST_NAMES, PLACES, MONTHS, [unit.short for unit in UNITS]))
    words = random.sample(pool, random.randint(2, 6))
    comma = ", ".join(words)
    mark = random.choice(("|", "/", ";", "-", "+"))
    return random.choice(
        (
            (f"Put {mark} between the words: {comma}", f" {mark} ".join(words)),
            (f"List them with commas: {f' {mark} '.join(words)}", comma),
            (f"Backwards: {comma}", ", ".join(reversed(words))),
            (f"How many words? {comma}", str(len(words))),
            (f"Sort: {comma}", ", ".join(sorted(words))),
            (f"The first word of: {comma}", words[0]),
            (f"The last word of: {comma}", words[-1]),
            (f"One a line: {comma}", "\n".join(words)),
        )
    )


def _form(random: Random, statement: Statement) -> Exercise:
    """Several fields, each with its name, as written or in the fixed forms."""
    fields = _fields(statement)
    keys = random.sample(tuple(fields), random.randint(2, 4))
    if keys == ["date", "party", "quantity", "money"]:  # the ledger's order is the target's own
        keys.reverse()
    names = [random.choice(fields[key][0]) for key in keys]
    fixed = random.random() < 0.7
    values = [fields[key][2 if fixed else 1] for key in keys]
    wanted = ", ".join(names)
    if random.random() < 0.5:
        instruction = random.choice(("Fill in", "Form with", "Find"))
        instruction += f" {wanted}, " + ("in short form:" if fixed else "as written:")
    else:
        instruction = ("Short form: " if fixed else "As written: ") + wanted + "."
    between = random.choice((": ", " = ", "=", " is "))
    after = random.choice((", ", "; ", "\n", " / "))
    answer = after.join(
        f"{name}{between}{value}" for name, value in zip(names, values, strict=True)
    )
    # The separators are part of the question, so that nothing is left to guess.
    shape = after.join(f"{name}{between}..." for name in names)
    return _with_note(random, f"{instruction}\n{shape}", statement.sentence), answer


def _pair(random: Random, statement: Statement) -> Exercise:
    """Two bare fields in a wanted order: never three, never between bars."""
    fields = _fields(statement)
    first, second = random.sample(tuple(fields), 2)
    mark = random.choice((" / ", ", ", "; ", " - ", " and "))
    names = mark.join(random.choice(fields[key][0]) for key in (first, second))
    fixed = random.random() < 0.7
    answer = mark.join(fields[key][2 if fixed else 1] for key in (first, second))
    instruction = f"{'Short' if fixed else 'As written'}: {names}"
    return _with_note(random, instruction, statement.sentence), answer


def _yes_no(random: Random, statement: Statement) -> Exercise:
    fact = statement.fact
    field = random.choice(("item", "place", "name"))
    true = {"item": fact.item, "place": fact.place, "name": fact.party.split()[0]}[field]
    other = {"item": "flour", "place": random.choice(PLACES), "name": random.choice(FIRST_NAMES)}
    word = true if random.random() < 0.5 else other[field]
    answer = "yes" if word in statement.sentence else "no"
    return _with_note(random, f'Is "{word}" in the text?', statement.sentence), answer


# Each with its share of the exercises.
EXERCISES: tuple[tuple[Callable[[Random, Statement], Exercise], int], ...] = (
    (_repeat, 6),
    (_copy_field, 10),
    (_rewrite_field, 24),
    (_rewrite_alone, 10),
    (_lexicon, 6),
    (_spell, 6),
    (_words, 8),
    (_form, 20),
    (_pair, 8),
    (_yes_no, 2),
)

_SYSTEM = ("Answer briefly.", "You read notes and answer.", "Answer with the text only.")


def draw_document(random: Random) -> list[Piece]:
    """One training document: plain notes, or a chat of one or more exercises."""
    if random.random() < 0.1:
        notes = " ".join(state(random, draw_fact(random)).sentence for _ in range(_turns(random)))
        return [Piece(BOS, False), Piece(notes + END, True)]
    pieces = [Piece(BOS, False)]
    if random.random() < 0.05:
        pieces.append(Piece(f"<|system|>\n{random.choice(_SYSTEM)}{END}\n", False))
    tasks, shares = zip(*EXERCISES, strict=True)
    for turn in range(_turns(random)):
        statement = state(random, draw_fact(random))
        question, answer = random.choices(tasks, shares)[0](random, statement)
        start = "\n" if turn else ""
        pieces.append(Piece(f"{start}<|user|>\n{question}{END}\n<|assistant|>\n", False))
        pieces.append(Piece(f"{answer}{END}", True))
    return pieces


def _turns(random: Random) -> int:
    """Mostly one, now and then several, so that later positions are trained as well."""
    return 1 if random.random() < 0.9 else random.randint(2, 6)


CHUNK_DOCUMENTS = 1000


def draw_chunk(seed: int, chunk: int) -> list[list[Piece]]:
    """The documents of one chunk: they depend on the seed and the chunk, not on the workers."""
    random = Random(f"sample model {seed} {chunk}")
    return [draw_document(random) for _ in range(CHUNK_DOCUMENTS)]


# ---- Tokenizer ----------------------------------------------------------------------------------


def train_tokenizer(seed: int, vocabulary: int, documents: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer: any text round-trips, the sample's words are one token.

    Digits stand alone (with the space before them, if any): a number is then read and copied digit
    by digit, which a tiny model learns far sooner than a token for every three digits.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in (PAD, BOS, END, *ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chunks = math.ceil(documents / CHUNK_DOCUMENTS)
    texts = (
        # Special tokens are text to the trainer: without this it would learn pieces of them.
        _without_special(piece.text)
        for chunk in range(chunks)
        for document in draw_chunk(seed, chunk)
        for piece in document
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _without_special(text: str) -> str:
    for token in (BOS, PAD, END, *ROLES):
        text = text.replace(token, "")
    return text


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap it for transformers, with the chat template.

    Nothing is added to encoded text: the template writes bos itself, and a second one would be a
    silent mistake.
    """
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save it under the class name that every release of transformers knows."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# ---- Training data ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Documents one behind another: `tokens[offsets[i]:offsets[i + 1]]` is document i."""

    tokens: torch.Tensor  # (all tokens,) int16
    produced: torch.Tensor  # (all tokens,) bool: the model is to produce it
    offsets: torch.Tensor  # (documents + 1,) int64


def make_corpus(tokenizer: Tokenizer, seed: int, documents: int) -> Corpus:
    """Write and encode the training documents."""
    tokens, produced, offsets = array("h"), array("b"), [0]
    for chunk in range(math.ceil(documents / CHUNK_DOCUMENTS)):
        drawn = draw_chunk(seed, chunk)
        texts = [piece.text for document in drawn for piece in document]
        encodings = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for document in drawn:
            for piece in document:
                ids = next(encodings).ids
                tokens.extend(ids)
                produced.extend([piece.produced] * len(ids))
            offsets.append(len(tokens))
    return Corpus(
        torch.frombuffer(tokens, dtype=torch.int16),
        torch.frombuffer(produced, dtype=torch.bool),
        torch.tensor(offsets),
    )


def batches(
    corpus: Corpus, batch_tokens: int, pad: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (tokens, weights) batches, both (documents, longest), forever.

    Documents of like length go together, so little is padding. Padding is on the right and has no
    weight; under a causal mask no token sees it, so no attention mask is needed.
    """
    lengths = corpus.offsets.diff().clamp(max=MAX_POSITIONS)
    while True:
        order = torch.randperm(len(lengths), generator=generator)
        # Sorted within large groups: whole-corpus sorting would make every epoch's batches alike.
        groups = [group[lengths[group].argsort(stable=True)] for group in order.split(20_000)]
        spans = [span for group in groups for span in _spans(group, lengths[group], batch_tokens)]
        for index in torch.randperm(len(spans), generator=generator).tolist():
            documents = spans[index]
            positions = torch.arange(int(lengths[documents].max()))
            real = positions < lengths[documents, None]
            # Behind a document's end this reads its successor, or the last token; neither is used.
            where = corpus.offsets[documents, None] + positions
            where = where.clamp(max=len(corpus.tokens) - 1)
            tokens = torch.where(real, corpus.tokens[where].long(), pad)
            weights = torch.where(corpus.produced[where], 1.0, PROMPT_WEIGHT) * real
            yield tokens, weights


def _spans(
    documents: torch.Tensor, lengths: torch.Tensor, batch_tokens: int
) -> Iterator[torch.Tensor]:
    """Cut documents, shortest first, into runs of at most `batch_tokens` with their padding."""
    start = 0
    for end, length in enumerate(lengths.tolist()):
        if end > start and (end + 1 - start) * length > batch_tokens:
            yield documents[start:end]
            start = end
    yield documents[start:]


# ---- Training -----------------------------------------------------------------------------------


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def weighted_loss(
    model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The mean next-token loss over the weights of what is predicted."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train(
    model: LlamaForCausalLM,
    corpus: Corpus,
    *,
    pad: int,
    steps: int,
    batch_tokens: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train in place with AdamW: fp32 weights, bf16 arithmetic on a GPU, fp32 on a CPU."""
    device = model.device
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    stream = batches(corpus, batch_tokens, pad, torch.Generator().manual_seed(seed))
    started = time.perf_counter()
    for step in range(steps):
        factor = learning_rate_factor(step, min(200, steps // 4 + 1), steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        tokens, weights = (tensor.to(device, non_blocking=True) for tensor in next(stream))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = weighted_loss(model, tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)


def build_model(
    tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace
) -> LlamaForCausalLM:
    """A Llama with random weights. Every width is a multiple of 64, the quantization block."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            intermediate_size=arguments.intermediate_size,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.kv_heads,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main(argv: list[str] | None = None) -> None:
    """Train the tokenizer and the model, and save both in the Hugging Face layout."""
    parser = argparse.ArgumentParser(description="Make the sample model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("assets/sample_model"))
    parser.add_argument("--vocabulary", type=int, default=1536)
    parser.add_argument("--tokenizer-documents", type=int, default=20_000)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)

    torch.manual_seed(arguments.seed)
    # cuBLAS is deterministic only with a fixed workspace, and reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)

    started = time.perf_counter()
    trained = train_tokenizer(
        arguments.seed,
        arguments.vocabulary,
        min(arguments.tokenizer_documents, arguments.documents),
    )
    tokenizer = wrap_tokenizer(trained)
    corpus = make_corpus(trained, arguments.seed, arguments.documents)
    print(
        f"{len(corpus.offsets) - 1} documents, {len(corpus.tokens)} tokens, vocabulary "
        f"{len(tokenizer)}, {time.perf_counter() - started:.0f} s",
        flush=True,
    )

    model = build_model(tokenizer, arguments).to(arguments.device)
    print(f"{model.num_parameters()} parameters on {model.device}", flush=True)
    train(
        model,
        corpus,
        pad=tokenizer.pad_token_id,
        steps=arguments.steps,
        batch_tokens=arguments.batch_tokens,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.to("cpu", torch.bfloat16).save_pretrained(arguments.out)
    save_tokenizer(tokenizer, arguments.out)
    # Written for the owner alone by default, and this is to be shared.
    (arguments.out / "model.safetensors").chmod(0o644)
    print(f"saved {arguments.out}, {time.perf_counter() - started:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
