"""The tokenizer of a model, and the text that its chat template makes of a conversation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fitlora.data.formats import Messages, Row
from fitlora.errors import UserError

# For tokenizers without a chat template: plain headings, each turn closed by the end-of-text token.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "### {{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)


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
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise UserError(f"{folder} has chat templates ({names}), and none that is called default")
    return tokenizer


def render(
    tokenizer: Any, messages: Messages, *, prompt: bool, tools: list[Any] | None = None
) -> str:
    """The conversation as text; with `prompt`, up to where the assistant would go on."""
    text: str = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=prompt
    )
    return text


def render_many(tokenizer: Any, parts: Sequence[tuple[Row, int]], *, prompt: bool) -> list[str]:
    """The first `count` messages of each row as text; rows with tools of their own one by one."""
    plain = [row.messages[:count] for row, count in parts if row.tools is None]
    texts: list[str] = (
        tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
        if plain
        else []
    )
    rest = iter(texts)
    return [
        next(rest)
        if row.tools is None
        else render(tokenizer, row.messages[:count], prompt=prompt, tools=row.tools)
        for row, count in parts
    ]
