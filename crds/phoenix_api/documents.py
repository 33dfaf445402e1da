"""Turns the text of a YAML or JSON file into plain values, and remembers on which line each field stands.

It hides PyYAML and its dangers: aliases that expand without end, nesting that overruns the C stack, keys that are given
twice, scalars that YAML reads as dates. Called by `manifest` only.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from phoenix_api.faults import Fault, Location, path_of, shown

MAX_BYTES = 4 * 1024 * 1024  # etcd takes objects up to 1.5 MiB; a file may hold several
_MAX_DEPTH = 100
_MAX_NODES = 200_000
_STRING, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_FastLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_FastLoader):  # type: ignore[misc]  # the C loader is missing where libyaml is
    """A safe loader that reads `2024-01-01` as the string it is for Kubernetes."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's own way
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a file; `number` counts from 1."""

    number: int
    value: Any
    _node: yaml.Node | None = None

    def line_of(self, location: Location) -> int | None:
        """Return the line of a field, or of the nearest object around it; None for JSON."""
        node = self._node
        if node is None:
            return None
        line: int = node.start_mark.line + 1
        for part in location:
            if isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == part), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                found = (node.value[part], node.value[part])
            else:
                found = None
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        return line


def parse(text: str, *, file: Path, is_json: bool) -> tuple[list[Document], list[Fault]]:
    """Return the documents that can be read (empty ones left out) and what is wrong with the others."""
    if len(text) > MAX_BYTES:
        return [], [Fault(file, 0, "", f"expected at most {MAX_BYTES} characters, got {len(text)}")]
    return _parse_json(text, file) if is_json else _parse_yaml(text, file)


def _parse_json(text: str, file: Path) -> tuple[list[Document], list[Fault]]:
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        known: dict[str, Any] = {}
        for key, value in pairs:
            if key in known:
                twice.append(key)
            known[key] = value
        return known

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        return [], [Fault(file, 1, "", f"JSON syntax: {error.msg} at line {error.lineno}, column {error.colno}")]
    except (RecursionError, ValueError) as error:
        return [], [Fault(file, 1, "", f"JSON cannot be read: {error}")]
    faults = [Fault(file, 1, "", f"expected each key once, got {shown(key)} twice in one object") for key in twice]
    return ([] if faults else [Document(1, value)]), faults


def _parse_yaml(text: str, file: Path) -> tuple[list[Document], list[Fault]]:
    if fault := _depth_fault(text, file):
        return [], [fault]
    documents: list[Document] = []
    faults: list[Fault] = []
    number = 1
    loader = None
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            if problems := _Inspection(file, number).faults_of(node):
                faults += problems
            elif (value := loader.construct_document(node)) is not None:
                documents.append(Document(number, value, node))
            number += 1
    except yaml.YAMLError as error:
        faults.append(_syntax_fault(error, file, number))
    finally:
        if loader is not None:
            loader.dispose()
    return documents, faults


def _depth_fault(text: str, file: Path) -> Fault | None:
    """Events come without recursion, nodes do not: PyYAML overruns the C stack at a depth of some thousands."""
    depth = document = 0
    try:
        for event in yaml.parse(text, _Loader):
            if isinstance(event, yaml.DocumentStartEvent):
                document += 1
            elif isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > _MAX_DEPTH:
                    line = event.start_mark.line + 1 if event.start_mark else None
                    return Fault(file, document, "", f"expected a nesting of at most {_MAX_DEPTH} levels", line)
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
    except yaml.YAMLError:
        pass  # told by the reader itself, after the documents before it
    return None


def _syntax_fault(error: yaml.YAMLError, file: Path, document: int) -> Fault:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    context = f" {error.context}" if getattr(error, "context", None) else ""  # type: ignore[attr-defined]
    return Fault(file, document, "", f"YAML syntax{context}: {problem}{where}")


class _Inspection:
    """A walk over one document's nodes before values are made of them."""

    def __init__(self, file: Path, number: int) -> None:
        self._file, self._number = file, number
        self._sizes: dict[int, int] = {}
        self._faults: list[Fault] = []

    def faults_of(self, root: yaml.Node) -> list[Fault]:
        """Return what makes the document unreadable or ambiguous."""
        if self._size(root, ()) > _MAX_NODES:
            self._complain((), f"expected at most {_MAX_NODES} values once aliases are expanded", root)
        return self._faults

    def _size(self, node: yaml.Node, path: tuple[str | int, ...]) -> int:
        """Count the values that a node expands to; what aliases share is walked once."""
        key = id(node)
        if key not in self._sizes:
            self._sizes[key] = _MAX_NODES + 1  # stands while the node is open: an alias to it has no end
            self._sizes[key] = 1 + sum(self._size(child, where) for child, where in self._children(node, path))
        return self._sizes[key]

    def _children(
        self, node: yaml.Node, path: tuple[str | int, ...]
    ) -> Iterator[tuple[yaml.Node, tuple[str | int, ...]]]:
        if isinstance(node, yaml.SequenceNode):
            yield from ((child, (*path, index)) for index, child in enumerate(node.value))
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, child in node.value:
                name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
                where = (*path, name)
                if key.tag not in (_STRING, _MERGE):
                    self._complain(path, f"expected a string as key, got {name}; quote it", key)
                elif name in seen:
                    self._complain(where, "expected each key once, got it twice", key)
                seen.add(name)
                yield child, where

    def _complain(self, path: Location, message: str, node: yaml.Node) -> None:
        self._faults.append(Fault(self._file, self._number, path_of(path), message, node.start_mark.line + 1))
