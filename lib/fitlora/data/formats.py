"""What a row means: a conversation or a text, in the forms that people have it in.

| columns | what it becomes |
|---|---|
| `messages`, or `conversations` (with `role`/`content`, or ShareGPT's `from`/`value`) | itself |
| `prompt` and `completion` (texts, or lists of messages) | a question and its answer |
| `instruction`, `output`, and `input` where there is one | the same; input below the instruction |
| `text` | a text that is learned as a whole, with no template |

A row is told by the first of these that it has the columns of; other columns are left alone, but for
`system` (a system message before a prompt or an instruction) and `tools` (descriptions of tools, which
the chat template is given). Tool calls inside messages go to the template as they are; content in parts
is joined where all of them are texts.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

Format = Literal["messages", "prompt-completion", "instruction", "text"]
Messages = list[dict[str, Any]]
FORMATS: tuple[Format, ...] = get_args(Format)
ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's and its relatives' names of them
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "chatgpt": "assistant", "system": "system", "tool": "tool",
    "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_LISTS = ("messages", "conversations")


@dataclass(frozen=True)
class Row:
    """One conversation, or one text, and the line of the file it stands in."""

    line: int
    messages: Messages
    text: str | None = None
    tools: list[Any] | None = None
    place: str = ""

    @property
    def prompt(self) -> Messages:
        """The messages before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last answer; of one that only calls tools, nothing."""
        return self.messages[-1].get("content") or ""


def format_of(content: Any) -> Format:
    """How the row is told by its columns; raises ValueError with what it has."""
    if not isinstance(content, dict):
        raise ValueError("no object with columns")
    if any(name in content for name in _LISTS):
        return "messages"
    if "completion" in content or ("prompt" in content and "text" not in content):
        return "prompt-completion"
    if "instruction" in content or "output" in content:
        return "instruction"
    if "text" in content:
        return "text"
    has = f"it has {', '.join(map(str, content))}" if content else "it has none"
    raise ValueError(
        'no columns that are known ("messages", "conversations", "prompt" and "completion", '
        f'"instruction" and "output", or "text"); {has}'
    )


def make_row(content: Any, kind: Format, *, place: str = "", line: int = 0) -> Row:
    """The row that the columns of `content` mean; raises ValueError with what is wrong with it."""
    if not isinstance(content, dict):
        raise ValueError("no object with columns")
    if kind == "text":
        text = _text(content, "text")
        if not text.strip():
            raise ValueError('"text" is empty')
        return Row(line, [], text, place=place)
    if kind == "messages":
        messages = _list_of(content)
    elif kind == "prompt-completion":
        messages = _system(content) + _turns(content, "prompt", "user")
        messages += _turns(content, "completion", "assistant")
    else:
        question, more = _text(content, "instruction"), content.get("input")
        if more is not None and more != "":
            question = f"{question}\n\n{_text(content, 'input')}"
        messages = [*_system(content), {"role": "user", "content": question}]
        messages.append({"role": "assistant", "content": _text(content, "output")})
    return Row(line, _checked(messages), tools=_tools(content), place=place)


def _text(content: dict[str, Any], name: str) -> str:
    if content.get(name) is None:
        raise ValueError(f'no "{name}"')
    text = content[name]
    if not isinstance(text, str):
        raise ValueError(f'"{name}" is no text')
    _whole(text, f'"{name}"')
    return text


def _whole(text: str, where: str) -> None:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where} has half a character (a lone surrogate)")


def _parsed(value: Any) -> Any:
    """A list that a CSV or Parquet column holds as JSON."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return None
    return value


def _list_of(content: dict[str, Any]) -> Messages:
    name = next((name for name in _LISTS if name in content), "messages")
    messages = _parsed(content.get(name))
    if not isinstance(messages, list):
        raise ValueError(f'no "{name}" list')
    return [_turn(message, index) for index, message in enumerate(messages)]


def _turn(message: Any, index: int) -> dict[str, Any]:
    """A message with `role` and `content`, without the empty columns that tables give it."""
    if not isinstance(message, dict):
        raise ValueError(f"message {index} is no object")
    if "from" in message and "role" not in message:
        speaker = message["from"]
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
        message = {"role": role, "content": message.get("value"), **rest}
    found = {k: v for k, v in message.items() if v is not None or k == "content"}
    if isinstance(found.get("content"), list):
        found["content"] = _joined(found["content"])
    return found


def _joined(parts: list[Any]) -> Any:
    """Content in parts that are all texts (`{"type": "text", "text": ...}`) as one text."""
    texts: list[str] = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            return parts
        if not isinstance(part.get("text"), str):
            return parts
        texts.append(part["text"])
    return "".join(texts) if texts else parts


def _system(content: dict[str, Any]) -> Messages:
    if content.get("system") in (None, ""):
        return []
    return [{"role": "system", "content": _text(content, "system")}]


def _turns(content: dict[str, Any], name: str, role: str) -> Messages:
    """A column that is a text, or a list of messages."""
    if isinstance(content.get(name), list):
        return [_turn(message, index) for index, message in enumerate(content[name])]
    return [{"role": role, "content": _text(content, name)}]


def _tools(content: dict[str, Any]) -> list[Any] | None:
    if content.get("tools") in (None, "", []):
        return None
    tools = _parsed(content["tools"])
    if not isinstance(tools, list):
        raise ValueError('"tools" is no list')
    return tools


def _checked(messages: Messages) -> Messages:
    for index, message in enumerate(messages):
        role, text = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {index} has role {role!r}, not one of {', '.join(ROLES)}")
        calls = message.get("tool_calls")
        if calls is not None and not (role == "assistant" and isinstance(calls, list)):
            raise ValueError(f"message {index} has tool_calls that are no list of the assistant's")
        if text is None and calls:
            continue
        if not isinstance(text, str):
            raise ValueError(f"message {index} has content that is no text")
        _whole(text, f"message {index}")
        if role == "assistant" and not calls and not text.strip():
            raise ValueError(f"message {index} is an empty answer")
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    return messages


def called_names(row: Row) -> list[str]:
    """Names of the tools that the row's answers call, as far as they have the usual form."""
    names = []
    for message in row.messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                names.append(function["name"])
    return names
