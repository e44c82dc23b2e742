"""pydocs, a corpus that needs no network: the documentation that is part of every Python."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedrun.data.documents import Documents, named_documents

# Modules without documentation or not installed everywhere: generated codecs, tests, and modules
# that Linux distributions package separately.
PYDOCS_SKIPPED = {
    "distutils", "encodings", "ensurepip", "idle_test", "idlelib", "lib2to3", "test", "tests",
    "tkinter", "turtledemo",
}  # fmt: skip
PYDOCS_HELD_OUT = 0.07  # share of the text that is in the validation split
SHORTEST_REPEAT = 60  # characters: shorter paragraphs ("See also ...") may be repeated


def stdlib_files(folder: Path) -> Iterator[Path]:
    """The standard library's modules below `folder`, without those in PYDOCS_SKIPPED."""
    for path in folder.iterdir():
        # site-packages, lib-dynload and the like are not identifiers, so not packages
        if path.is_dir() and path.name.isidentifier() and path.name not in PYDOCS_SKIPPED:
            yield from stdlib_files(path)
        elif path.suffix == ".py":
            yield path


def read_pydocs(files: list[Path]) -> dict[str, str]:
    """The documents, sorted by name: `topic:<topic>` and `module:<module>`.

    The sources are parsed, never imported, so that platform, side effects and optional modules do
    not matter. Topics quote each other at length, so paragraphs of an earlier document are removed
    from later ones: otherwise validation text would also be in the train split.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents: dict[str, str] = {}
    for file in files:
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(file.read_bytes())
        if module == "pydoc_data.topics":
            (assignment,) = (node for node in tree.body if isinstance(node, ast.Assign))
            for topic, text in ast.literal_eval(assignment.value).items():
                documents[f"topic:{topic}"] = text.strip()
        else:
            documents[f"module:{module}"] = "\n\n\n".join(_docstrings(tree, module))
    seen: set[str] = set()
    fresh = {name: _without_repeats(documents[name], seen) for name in sorted(documents)}
    return {name: text for name, text in fresh.items() if text}


def split_by_hash(documents: Mapping[str, str], share: float = PYDOCS_HELD_OUT
                  ) -> tuple[dict[str, str], dict[str, str]]:
    """Split documents into train and validation, with the same share of topics and of modules.

    Documents are taken in the order of their names' hashes; each is held out if it still fits into
    the share.
    """
    held_out: set[str] = set()
    for kind in ("topic:", "module:"):
        sizes = {name: len(text) for name, text in documents.items() if name.startswith(kind)}
        room = share * sum(sizes.values())
        for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if sizes[name] <= room:
                held_out.add(name)
                room -= sizes[name]
    train = {name: text for name, text in documents.items() if name not in held_out}
    return train, {name: documents[name] for name in documents if name in held_out}


def pydocs_documents(names: Sequence[str]) -> Documents:
    """One document per row. The source of `module:asyncio.events` is asyncio, of topics: topics."""
    sources = [name.partition(":")[2].partition(".")[0] if name.startswith("module:") else "topics"
               for name in names]
    return named_documents("a module or topic", range(len(names)), len(names), sources)


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """The docstrings below `node` in source order, each preceded by its qualified name."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, documented) and (text := ast.get_docstring(node)):
        yield f"{name}\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _docstrings(child, name)


def _without_repeats(text: str, seen: set[str]) -> str:
    """`text` without the long paragraphs in `seen`; adds its paragraphs to `seen`."""
    kept = []
    for paragraph in re.split(r"\n[^\S\n]*\n", text):
        words = " ".join(paragraph.split())
        if len(words) < SHORTEST_REPEAT or words not in seen:
            kept.append(paragraph)
            seen.add(words)
    return "\n\n".join(kept).strip()
