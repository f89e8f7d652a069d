"""Where answers stand: by the frame of their roles, and by asking the template about each row."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitlora.data import answers as module
from fitlora.data.answers import NO_SPAN, Rendered, Template
from fitlora.data.formats import Messages, Row
from fitlora.data.templates import DEFAULT_TEMPLATE
from tests.tiny_models import CHAT_TEMPLATE, make_tokenizer

# As the families' own templates do it, shortened.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (  # trims
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim }}"
    "{{ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (  # no heading for the assistant, the system message within the first question, strict
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{{ bos_token }}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ ' [INST] ' + (system if loop.first else '') + m['content'] }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (  # another name for the assistant, no system
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) }}"
    "{{ '\n' + m['content'] | trim + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
QWEN_3 = (  # earlier turns without their thoughts, the last with an empty thought where it has none
    "{% for m in messages %}"
    "{% set content = m['content'] %}{% set thought = '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK = (  # no answer has its thoughts
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<' + m['role'] + '>' + content }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
GPT_OSS = (  # the last answer ends otherwise
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MARKED = (  # with the marks that some libraries read
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
BARE = (  # nothing at all around contents
    "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
)
CUTS = (  # the question itself is another one once the answer follows
    "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] if loop.last else m['content'][:1]) }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEMPLATES = {
    "default": DEFAULT_TEMPLATE, "tiny": CHAT_TEMPLATE, "chatml": CHATML, "llama-3": LLAMA_3,
    "mistral": MISTRAL, "gemma": GEMMA, "qwen-3": QWEN_3, "deepseek": DEEPSEEK,
    "gpt-oss": GPT_OSS, "marked": MARKED, "bare": BARE, "cuts": CUTS,
}  # fmt: skip
FRAMED = set(TEMPLATES) - {"cuts"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def by_asking(tokenizer: Any, messages: Messages) -> Rendered | str | None:
    """Each answer by two renders of its own; None where the template refuses the conversation."""

    def render(part: Messages, *, prompt: bool) -> str:
        (text,) = tokenizer.apply_chat_template(
            [part], tokenize=False, add_generation_prompt=prompt
        )
        return str(text)

    try:
        text = render(messages, prompt=False)
        spans: list[tuple[int, int] | None] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = render(messages[:index], prompt=True)
                through = render(messages[: index + 1], prompt=False)
                stands = text.startswith(before) and text.startswith(through)
                spans.append((len(before), len(through.rstrip("\n"))) if stands else None)
    except Exception:
        return None
    if spans[-1] is None:
        return NO_SPAN
    return Rendered(text, tuple(s for s in spans if s is not None), spans.count(None))


def conversation(roles: str, contents: list[str]) -> Messages:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [
        {"role": names[role], "content": content}
        for role, content in zip(roles, contents, strict=False)
    ]


PIECES = st.sampled_from(
    ["yes", "Mark00000of2.", "<think>", "</think>", "\n", " ", "user", "</s>", "<|im_end|>", "é⏰",
     "[INST]", "assistant: ", "{{ x }}", "### user\n", "7"]
)  # fmt: skip
CONTENTS = st.lists(PIECES, max_size=4).map("".join)
ROLES = st.sampled_from(["ua", "uaua", "sua", "suaua", "uauaua", "ua", "uaa", "uuata", "a"])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(st.tuples(ROLES, st.lists(CONTENTS, min_size=6, max_size=6)), min_size=1, max_size=5),
)
def test_frames_say_what_asking_says(
    tokenizer: Any, name: str, conversations: list[tuple[str, list[str]]]
) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    rows = [Row(0, conversation(roles, contents)) for roles, contents in conversations]
    rows = [
        r for r in rows if all(m["content"].strip() or m["role"] != "assistant" for m in r.messages)
    ]
    found = Template(tokenizer).render(rows, "answers")
    for row, one in zip(rows, found, strict=True):
        expected = by_asking(tokenizer, row.messages)
        if expected is None:
            assert isinstance(one, str)
            assert "refuses it" in one
        else:
            assert one == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_is_rendered_once(tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a frame is for: after the first row of its roles, one render a row and no more."""
    tokenizer.chat_template = TEMPLATES[name]
    counts: list[int] = []
    original = module.render_many

    def counted(tokenizer: Any, parts: Any, *, prompt: bool) -> list[str]:
        counts.append(len(parts))
        return original(tokenizer, parts, prompt=prompt)

    monkeypatch.setattr(module, "render_many", counted)
    template = Template(tokenizer)
    rows = [Row(0, conversation("uaua", [f"q{i}", "yes", "more?", f"no, {i}"])) for i in range(50)]
    template.render(rows, "answers")
    counts.clear()
    template.render(rows, "answers")
    assert (sum(counts) == len(rows)) == (name in FRAMED)


def learned(tokenizer: Any, messages: Messages) -> list[str]:
    (found,) = Template(tokenizer).render([Row(0, messages)], "answers")
    assert isinstance(found, Rendered)
    assert found.spans is not None
    return [found.text[start:end] for start, end in found.spans]


def test_what_is_learned_where_earlier_turns_are_rewritten(tokenizer: Any) -> None:
    thoughts = conversation("uaua", ["1+1?", "<think>\neasy\n</think>\n\n2", "2+2?", "4"])
    tokenizer.chat_template = QWEN_3
    assert learned(tokenizer, thoughts) == ["<think>\n\n</think>\n\n4<|im_end|>"]
    assert learned(tokenizer, thoughts[:2]) == ["<think>\neasy\n</think>\n\n2<|im_end|>"]
    tokenizer.chat_template = GPT_OSS
    assert learned(tokenizer, conversation("uaua", list("qapb"))) == ["<|message|>b<|return|>"]
    tokenizer.chat_template = DEEPSEEK
    assert learned(tokenizer, conversation("uaua", list("qapb"))) == ["a</s>", "b</s>"]


def test_a_row_whose_last_answer_cannot_be_told(tokenizer: Any) -> None:
    tokenizer.chat_template = CUTS
    rows = [
        Row(0, conversation("ua", ["question", "yes"])),
        Row(0, conversation("ua", ["q", "yes"])),
    ]
    assert Template(tokenizer).render(rows, "answers") == [
        NO_SPAN,
        Rendered("user: q</s>assistant: yes</s>", ((22, 29),)),
    ]
    whole = Template(tokenizer).render(rows, "all")
    assert [one.spans for one in whole if isinstance(one, Rendered)] == [None, None]
