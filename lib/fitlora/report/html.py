"""HTML out of text. All text is escaped on its way in; what is `Html` has been made here.

That `Html` is a type of its own makes it an error of types to put text where markup belongs.
"""

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Markup, as opposed to text."""

    __slots__ = ()


Content = str | Html  # text is escaped, markup is not


def escaped(content: Content) -> Html:
    """The content as markup."""
    return content if isinstance(content, Html) else Html(escape(content, quote=True))


def join(*parts: Html) -> Html:
    """Markup behind each other."""
    return Html("\n".join(parts))


def tag(name: str, *content: Content, **attributes: str) -> Html:
    """`<name …>content</name>`; `class_` stands for class, and `_` in a name for `-`."""
    pairs = (
        f' {key.rstrip("_").replace("_", "-")}="{escape(value, quote=True)}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{''.join(pairs)}>{''.join(map(escaped, content))}</{name}>")


def table(
    head: Sequence[Content], rows: Iterable[Sequence[Content]], *, numbers: Sequence[int] = ()
) -> Html:
    """A table that scrolls by itself where the page is narrow. numbers: columns set to the right."""

    def row(cells: Sequence[Content], name: str) -> Html:
        return tag(
            "tr",
            *(
                tag(name, cell, **({"class_": "number"} if i in numbers else {}))
                for i, cell in enumerate(cells)
            ),
        )

    body = [row(cells, "td") for cells in rows]
    inner = join(tag("thead", row(head, "th")), tag("tbody", *body))
    return tag("div", tag("table", inner), class_="scroll")


def facts(pairs: Iterable[tuple[str, Content]]) -> Html:
    """Names and what they are."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs))


def chart(name: str, caption: str) -> Html:
    """The place where the chart `name` is drawn."""
    place = tag("div", id=f"chart-{name}", class_="chart", role="img", aria_label=caption)
    return tag("figure", tag("figcaption", caption), place)


def section(title: str, *content: Html, note: Content = "") -> Html:
    """A part of the page. note: what it says, in a sentence."""
    head = [tag("h2", title)] + ([tag("p", note, class_="note")] if note else [])
    return tag("section", *head, *content)
