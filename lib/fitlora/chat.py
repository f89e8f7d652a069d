"""Talking to what came out: the quantized base with its adapter, or the merged model.

The model is built by the evaluation's own loader, so what answers here is what was measured. Tokens
are written as they come. Greedy unless a temperature is given; then the seed is the run's, so that the
same questions get the same answers.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fitlora.artifacts import (
    ADAPTER,
    HARDWARE,
    MERGED_MODEL,
    PLAN,
    QUANTIZED_MODEL,
    Hardware,
    PlanArtifact,
    names_remedy,
)
from fitlora.data.formats import Row
from fitlora.data.templates import load_tokenizer, render
from fitlora.device import limit_memory, torch_device
from fitlora.errors import UserError
from fitlora.evaluation.answers import end_tokens, generating, generation_settings, prompt_limit
from fitlora.evaluation.models import (
    Memory,
    check_adapter,
    check_folder,
    choose_place,
    contenders,
    load,
)
from fitlora.params import Params, with_found
from fitlora.step.training_step import TrainingStep

Message = dict[str, str]


@dataclass
class Chat:
    """A model that answers. `ends`: tokens that end an answer."""

    step: TrainingStep
    tokenizer: Any
    ends: tuple[int, ...]
    temperature: float
    max_new_tokens: int

    def answer(self, messages: Sequence[Message], write: Callable[[str], None]) -> str:
        """The answer to a conversation, and each piece of it to `write` as soon as it is there.

        Raises UserError where the conversation leaves no room for an answer.
        """
        text = render(self.tokenizer, list(messages), prompt=True)
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        limit = prompt_limit(cast(Any, self.step.model).config, self.max_new_tokens)
        if limit is not None and len(tokens) > limit:
            raise UserError(
                f"the conversation has {len(tokens)} tokens, and {limit} leave room for an answer of "
                f"{self.max_new_tokens}; begin a new one, or ask for less (--max-new-tokens)"
            )
        settings = generation_settings(
            self.tokenizer, self.ends, self.max_new_tokens, temperature=self.temperature
        )
        stream = _Stream(self.tokenizer, self.ends, write)
        with generating(self.step.model), torch.no_grad():
            cast(Any, self.step.model).generate(
                input_ids=torch.tensor([tokens], device=self.step.device),
                attention_mask=torch.ones(
                    1, len(tokens), dtype=torch.long, device=self.step.device
                ),
                generation_config=settings,
                streamer=stream,
            )
        return stream.text


class _Stream:
    """Takes tokens as transformers' `generate` makes them, and passes whole characters on."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], write: Callable[[str], None]) -> None:
        self._tokenizer, self._ends, self._write = tokenizer, set(ends), write
        self._tokens: list[int] = []
        self._prompt_seen = False
        self._written = ""
        self.text = ""

    def put(self, value: Any) -> None:
        """The prompt first, then one token at a time."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        token = int(value.flatten()[0])
        if token in self._ends:
            return
        self._tokens.append(token)
        text = self._decode()
        if not text.endswith("\ufffd"):  # half of a character; its other tokens follow
            self._pass_on(text)

    def end(self) -> None:
        """Called when the answer is complete."""
        self._pass_on(self._decode())
        self.text = self._written.strip()

    def _decode(self) -> str:
        text = self._tokenizer.decode(
            self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).lstrip()

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text


@names_remedy
def load_chat(
    params: Params, root: Path, *, merged: bool, temperature: float, max_new_tokens: int
) -> Chat:
    """The model that a run left under `root`; raises ArtifactError that names what is missing."""
    planned = PlanArtifact.read(root / PLAN)
    plan, params = planned.plan, with_found(params, planned.found, str(root / PLAN))
    hardware = Hardware.read(root / HARDWARE)
    if merged:
        check_folder(root / MERGED_MODEL, "merge_and_evaluate")
    else:
        check_folder(root / QUANTIZED_MODEL, "quantize_model")
        check_adapter(root / ADAPTER, params.lora)
    folder = root / (MERGED_MODEL if merged else QUANTIZED_MODEL)
    trusted = params.model.trust_remote_code
    by_name = {
        contender.name: contender
        for contender in contenders(
            original=folder,  # unused here, and perhaps not on this machine
            quantized=root / QUANTIZED_MODEL,
            adapter=root / ADAPTER,
            merged=root / MERGED_MODEL,
            quantization=params.quantization,
            lora=params.lora,
            trust_remote_code=trusted,
        )
    }
    limit_memory(hardware)
    torch.manual_seed(params.train.seed)
    memory = Memory(torch_device(hardware), hardware.allocator_bytes, hardware.host_budget_bytes)
    contender = by_name["merged" if merged else "adapter"]
    place, _ = choose_place(
        contender, plan, memory, prompt_tokens=plan.sequence_length, new_tokens=max_new_tokens
    )
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    step = load(contender, plan, place)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ends = end_tokens(folder, cast(Any, step.model).config, tokenizer, [Row(0, turns)])
    return Chat(step, tokenizer, ends, temperature, max_new_tokens)


def converse(chat: Chat, prompt: str | None = None) -> None:
    """One answer to `prompt`; or a conversation in a terminal; or an answer to each line of input."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    def ask(messages: Sequence[Message]) -> str:
        found = chat.answer(messages, write)
        print(flush=True)
        return found

    if prompt is not None:
        if not prompt.strip():
            raise UserError("--prompt is empty")
        ask([{"role": "user", "content": prompt}])
    elif sys.stdin.isatty():
        _in_terminal(ask)
    else:
        for line in sys.stdin:
            if line.strip():
                ask([{"role": "user", "content": line.rstrip("\n")}])


def _in_terminal(ask: Callable[[Sequence[Message]], str]) -> None:
    print("/new begins a new conversation, Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    messages: list[Message] = []
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print(flush=True)
            return
        if text.strip() == "/new":
            messages.clear()
        elif text.strip():
            messages.append({"role": "user", "content": text})
            try:
                messages.append({"role": "assistant", "content": ask(messages)})
            except KeyboardInterrupt:
                messages.pop()
                print(flush=True)
            except UserError as error:
                messages.pop()
                print(f"error: {error}", file=sys.stderr)
