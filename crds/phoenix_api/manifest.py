"""Finds PhoenixModels in files and folders. The server, the operator's `render` and the tests read manifests with it.

It hides where documents come from: multi-document YAML, JSON, `kind: List`, folders with other files in them, and
ConfigMap mounts, whose files are links into a hidden folder. Every fault of every file is reported at once.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from phoenix_api import documents
from phoenix_api.faults import Fault, Location, ManifestError, close_match, explain, path_of, shown
from phoenix_api.types import API_VERSION, GROUP, KIND, PhoenixModel

MANIFEST_SUFFIXES = (".yaml", ".yml", ".json")
_WANTED = f"a {KIND} (apiVersion: {API_VERSION}, kind: {KIND})"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A PhoenixModel and where it was read; `document` counts from 1."""

    model: PhoenixModel
    file: Path
    document: int


def read_manifests(paths: Iterable[str | Path], *, strict: bool = True) -> list[Manifest]:
    """Read all PhoenixModels in files and folders, in the order of `paths`, folders sorted by name.

    In a folder, files and documents that are no PhoenixModel are passed over; in a file that is named they are a
    fault, unless a PhoenixModel is beside them. `strict=False` ignores unknown fields. Raises `ManifestError`.
    """
    reading = _Reading(strict=strict)
    for path in map(Path, paths):
        if path.is_dir():
            reading.read_folder(path)
        else:
            reading.read_file(path, is_named=True)
    return reading.result()


def parse_manifests(text: str, *, file: str | Path, strict: bool = True) -> list[Manifest]:
    """Read the PhoenixModels of one text as if it stood in `file`, whose name decides between YAML and JSON."""
    reading = _Reading(strict=strict)
    reading.read_text(text, Path(file), is_named=True)
    return reading.result()


class _Reading:
    """What was found so far, good and bad."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._manifests: list[Manifest] = []
        self._faults: list[Fault] = []
        self._files_read: set[str] = set()

    def result(self) -> list[Manifest]:
        """Return the manifests. Raises `ManifestError` if anything was wrong."""
        self._faults += _clashes(self._manifests)
        if self._faults:
            raise ManifestError(self._faults)
        return self._manifests

    @property
    def _found(self) -> int:
        return len(self._manifests) + len(self._faults)

    def read_folder(self, folder: Path) -> None:
        found, was_read_before = self._found, False
        try:
            for file in manifest_files(folder):
                was_read_before |= os.path.realpath(file) in self._files_read
                self.read_file(file, is_named=False)
        except OSError as error:
            self._faults.append(_unreadable(Path(error.filename or folder), error))
        if found == self._found and not was_read_before:
            kinds = ", ".join(f"*{suffix}" for suffix in MANIFEST_SUFFIXES)
            self._faults.append(Fault(folder, 0, "", f"expected {_WANTED} in {kinds} files below it, found none"))

    def read_file(self, file: Path, *, is_named: bool) -> None:
        real = os.path.realpath(file)
        if real in self._files_read:
            return
        self._files_read.add(real)
        try:
            if not is_named and file.stat().st_size > documents.MAX_BYTES:
                return  # data beside a manifest, for example a large request.json
            text = file.read_text(encoding="utf-8-sig")
        except OSError as error:
            self._faults.append(_unreadable(file, error))
        except UnicodeDecodeError as error:
            if is_named:
                self._faults.append(
                    Fault(file, 0, "", f"expected UTF-8 text, got something else at byte {error.start}")
                )
        else:
            # what never speaks of us is not even parsed: it may be a template or a dataset
            if is_named or GROUP in text or KIND in text:
                self.read_text(text, file, is_named=is_named)

    def read_text(self, text: str, file: Path, *, is_named: bool) -> None:
        found, first_fault = self._found, len(self._faults)
        read, faults = documents.parse(text, file=file, is_json=file.suffix == ".json")
        self._faults += faults
        for document in read:
            for value, prefix in _unpacked(document.value):
                self._take(value, prefix, document, file, is_named=is_named)
        self._faults[first_fault:] = sorted(self._faults[first_fault:], key=lambda fault: fault.document)
        if is_named and found == self._found:
            self._faults.append(Fault(file, 0, "", f"expected at least one {_WANTED[2:]}, found {_summary(read)}"))

    def _take(self, value: Any, prefix: Location, document: documents.Document, file: Path, *, is_named: bool) -> None:
        problems: list[tuple[Location, str]] = []
        if not isinstance(value, dict):
            if is_named or file.suffix != ".json":
                problems = [((), f"expected {_WANTED}, got {shown(value)}")]
        elif (problem := _kind_problem(value)) is not None:
            problems = [problem]
        elif value.get("kind") == KIND:
            try:
                model = PhoenixModel.read(value, strict=self._strict)
            except ValidationError as error:
                problems = explain(error)
            else:
                self._manifests.append(Manifest(model, file, document.number))
        for location, message in problems:
            place = (*prefix, *location)
            line = document.line_of(place)
            self._faults.append(Fault(file, document.number, path_of(place), message, line))


def _kind_problem(document: dict[Any, Any]) -> tuple[Location, str] | None:
    """Tell what is nearly a PhoenixModel from what is another object, which is nobody's fault."""
    version, kind = document.get("apiVersion"), document.get("kind")
    if kind == KIND and version != API_VERSION:
        came = shown(version) if "apiVersion" in document else "nothing"
        return ("apiVersion",), f"expected {API_VERSION}, got {came}"
    is_ours = isinstance(version, str) and version.startswith(f"{GROUP}/")
    if kind != KIND and (is_ours or close_match(kind, [KIND])):
        came = shown(kind) if "kind" in document else "nothing"
        return ("kind",), f"expected {KIND}, got {came}{close_match(kind, [KIND])}"
    return None


def _unpacked(value: Any, prefix: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, tuple[str | int, ...]]]:
    is_list = isinstance(value, dict) and value.get("kind") in ("List", f"{KIND}List")
    if is_list and isinstance(value.get("items"), list):
        for index, item in enumerate(value["items"]):
            yield item, (*prefix, "items", index)
    else:
        yield value, prefix


def _summary(read: list[documents.Document]) -> str:
    kinds = {
        str(value.get("kind", "an object without kind")) if isinstance(value, dict) else shown(value)
        for document in read
        for value, _ in _unpacked(document.value)
    }
    return ", ".join(sorted(kinds)) or "nothing"


def manifest_files(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield manifest files, sorted. Hidden entries are skipped: a ConfigMap mount keeps its real files there."""
    real = os.path.realpath(folder)
    if real in above:
        return  # a link to a folder around it
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from manifest_files(entry, above | {real})
        elif entry.suffix in MANIFEST_SUFFIXES:
            yield entry


def _clashes(manifests: list[Manifest]) -> list[Fault]:
    first: dict[tuple[str, str, str], Manifest] = {}
    faults = []
    for manifest in manifests:
        metadata, version = manifest.model.metadata, manifest.model.spec.model.version
        known = first.setdefault((metadata.namespace, metadata.name, version), manifest)
        if known is not manifest:
            message = (
                f"model {metadata.namespace}/{metadata.name} version {version} is already declared in "
                f"{known.file}, document {known.document}: change the name or spec.model.version of one"
            )
            faults.append(Fault(manifest.file, manifest.document, "metadata.name", message))
    return faults


def _unreadable(file: Path, error: OSError) -> Fault:
    return Fault(file, 0, "", f"cannot be read: {error.strerror or error}")
