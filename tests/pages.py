"""README and docs/ as data: their code blocks, the paths and messages they quote, and toy models behind their names."""

import ast
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_tasks import SIZES, tiny_decoder, tiny_encoder_decoder, tiny_reader, word_tokenizer
from torch import Tensor

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(\w+=\S* )*(python3?|apt-lm|make) ")
SPAN = re.compile(r"`([^`\n]+)`")
WRITTEN = ("apt_kernels/tables/", "modeling_apt.py", "configuration_decilm.py")  # by a benchmark and by exports
CUT = "…"  # stands for what a message fills in


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    line: int  # of the page, on which the code begins


def blocks(text: str, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order."""
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(match[2], textwrap.dedent(match[3]), line))
    return [block for block in found if block.language in languages]


def commands(text: str) -> list[str]:
    """The lines of shell blocks that call Python, make or us, without prompts and comments; a backslash joins two."""
    lines = [line for block in blocks(text, "", "bash", "sh") for line in block.code.replace("\\\n", " ").splitlines()]
    lines = [line.strip().removeprefix("$ ").partition(" #")[0].strip() for line in lines]
    return [line for line in lines if COMMAND.match(line)]


@cache
def files() -> frozenset[str]:
    """Every file of the repository that is text of ours, from the root."""
    tops = ("apt", "apt_kernels", "bench", "configs", "docs", "examples", "requirements", "tests")
    inner = (path for top in tops for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts)
    return frozenset(str(path.relative_to(ROOT)) for path in (*ROOT.iterdir(), *inner) if path.is_file())


def lost_paths(text: str) -> list[str]:
    """Quoted paths that look like files or folders of this repository and are none."""
    tops = {name.partition("/")[0] for name in files() if "/" in name}
    lost = []
    for span in SPAN.findall(FENCE.sub("", text)):
        if not re.fullmatch(r"[\w./-]+", span) or span in WRITTEN:
            continue
        if span.partition("/")[0] in tops and "/" in span:
            there = (ROOT / span).exists()
        elif span.endswith(".py"):  # of a room, or a bare name
            there = any(f"/{name}".endswith(f"/{span}") for name in files())
        else:
            continue
        if not there:
            lost.append(span)
    return lost


def texts_of(path: Path) -> Iterator[str]:
    """Every text of a module, `CUT` where it fills something in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else CUT for part in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def messages() -> tuple[str, ...]:
    """Every text of the packages that may be a message."""
    ours = [path for top in ("apt", "apt_kernels") for path in sorted((ROOT / top).rglob("*.py"))]
    return tuple(text for path in [*ours, ROOT / "apt_lm.py"] for text in texts_of(path))


def is_a_message(quoted: str) -> bool:
    """Whether the code can say this."""
    pattern = re.compile(".*".join(re.escape(part) for part in quoted.split(CUT)), re.DOTALL)
    return any(pattern.search(message) for message in messages())


def anchors(text: str) -> set[str]:
    """What links to the headings of a page end in."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def lost_anchors(page: Path, text: str) -> list[str]:
    """Links into a page whose heading is not there; pages themselves are looked for in test_repository.py."""
    lost = []
    for name, anchor in re.findall(r"\]\(([^)\s:]*\.md)?#([^)\s]+)\)", FENCE.sub("", text)):
        target = page.parent / name if name else page
        if anchor not in anchors(target.read_text(encoding="utf-8") if name else text):
            lost.append(f"{name}#{anchor}")
    return lost


def first_cells(text: str) -> Iterator[str]:
    """What is quoted in the first cell of each row of a page's tables."""
    for line in text.splitlines():
        cell = re.match(r"\| *`([^`]+)` *\|", line)
        if cell:
            yield cell[1]


def refusals(text: str) -> list[tuple[str, str, str]]:
    """What is refused, why, and what to use instead: the rows of the tables of a page with these heads."""
    rows = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        inside = line.startswith("|") and (inside or cells == ["what", "why", "instead"])
        if inside and not line.startswith("|---"):
            what, why, instead = cells
            rows.append((what, why, instead))
    return [row for row in rows if row != ("what", "why", "instead")]


def quoted_first(cell: str) -> str:
    """What a cell quotes at its beginning; empty where it begins otherwise."""
    found = re.match(r"`([^`]+)`", cell)
    return found[1] if found else ""


def obstacles() -> list[str]:
    """Every reason for which a linear is kept as it is."""
    return [text for text in texts_of(ROOT / "apt/families/plain.py") if text.startswith(("is ", "has "))]


def tiny_pretrained(kind: str, **settings: Any) -> Any:
    """A random model for what ``kind.from_pretrained`` names, with the vocabulary of `word_tokenizer`."""
    if kind == "AutoModelForCausalLM":
        return tiny_decoder()
    if kind == "AutoModelForSeq2SeqLM":
        return tiny_encoder_decoder()
    if kind == "AutoModelForQuestionAnswering":
        return tiny_reader()
    if kind != "AutoModelForSequenceClassification":
        raise ValueError(f"there is no toy model for {kind}")
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "eos_token_id"}
    labels = {
        name: settings[name] for name in ("num_labels", "id2label", "label2id", "problem_type") if name in settings
    }
    return BertForSequenceClassification(BertConfig(vocab_size=len(word_tokenizer()), **sizes, **labels)).eval()


def toy_rows(count: int) -> list[dict[str, Tensor]]:
    """Sequences of 8 tokens in two classes, which the first token tells."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, len(word_tokenizer()), (count, 8), generator=draw)
    labels = torch.arange(count) % 2
    ids[:, 0] = 8 + labels
    mask = torch.ones_like(ids[0])
    return [{"input_ids": ids[i], "attention_mask": mask, "labels": labels[i]} for i in range(count)]
