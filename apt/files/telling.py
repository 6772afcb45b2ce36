"""Text that comes from files and names, on its way to a terminal or into Markdown: it says nothing but itself."""

import sys
import unicodedata

UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories: control, format (which turn text round), surrogates, line ends
MARKS = "\\`*[]|"  # of Markdown; what stands inside words, as "_" does, is none
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def printable(text: object, *, keep: str = "") -> str:
    """A text with its control characters spelt out: a terminal obeys none of them.

    Args:
        text: anything; of what is no text, its `str`.
        keep: characters that may stay as they are, such as line ends.
    """
    return "".join(
        character if character in keep or unicodedata.category(character) not in UNSAFE else _spelt(character)
        for character in str(text)
    )


def _spelt(character: str) -> str:
    code = ord(character)
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\u{code:04x}" if code > 0xFF else f"\\x{code:02x}"


def markdown(text: object) -> str:
    """A text as Markdown shows it literally, in one line: no tag, link, table or emphasis comes of it."""
    escaped = (ENTITIES.get(character, character) for character in printable(text))
    return "".join(f"\\{character}" if character in MARKS else character for character in escaped)


def tell(line: str) -> None:
    """Say a line on the standard error."""
    print(f"apt: {printable(line)}", file=sys.stderr)
