"""Keeps fetched models on disk under their digest, and hashes model files wherever they lie.

Hides the layout of the cache, its locks, what a killed or a second process leaves behind, and what a digest covers.
Called by `artifacts` only, which decides what is fetched and when a copy will do.

Digest: the SHA-256 of the model file. With external data files it is the SHA-256 of the list that
`sha256sum model.onnx model.onnx.data | LC_ALL=C sort -k2` prints in the model's folder, so that it covers every file.

Layout: `<root>/<digest>/` with `files/` and `meta.json`, named by content and never changed. A download goes into
`.partial-<pid>-<random>` beside it, locked as long as its process lives, and the whole folder is renamed at the end: a
kill leaves nothing half in use, and of two processes the first wins. Each use hashes the copy again and drops it if it
is damaged.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from phoenix_server.errors import ModelLoadError, Reason
from phoenix_server.onnx_file import OnnxFileError, read_facts

_log = logging.getLogger(__name__)
# Where the file system knows no locks, a partial folder that nothing was written to for so long is dead.
_DEAD_AFTER_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model on this machine. `sha256` is the digest that a manifest gives; `files` is `path`, then external data."""

    path: Path
    sha256: str
    size_bytes: int
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """What `meta.json` keeps of a cached model: which file is the model, and what the store said of each file."""

    name: str
    sha256: str
    source: str
    stamps: dict[str, str]


@dataclass(frozen=True, slots=True)
class ModelCache:
    """The folders of fetched models; see the module's docstring for the layout and what it withstands."""

    root: Path

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the errors of the disk into one that names the folder and the way out."""
        try:
            yield
        except OSError as error:
            raise ModelLoadError(
                Reason.FETCH_FAILED,
                f"cannot write to {os.path.abspath(self.root)}: {error.strerror or error}; "
                "set PHOENIX_STATE_DIR to a writable folder with room for the model",
            ) from error

    def find(self, sha256: str) -> Artifact | None:
        """Return a copy after hashing it; drop it if it is not what its name says."""
        entry = self.root / sha256
        if not entry.exists():
            return None
        try:
            return inspect(entry / "files" / self._meta(entry).name, sha256)
        except (ModelLoadError, OSError, ValueError, TypeError) as error:
            _log.warning("cached model is damaged and dropped", extra={"digest": sha256, "cause": str(error)})
        trash = self.root / _partial_name()
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            shutil.rmtree(entry.rename(trash), ignore_errors=True)
        return None

    def copies_of(self, source: str) -> list[CacheEntry]:
        """Return what came from an address, newest first."""
        found = []
        for file in self.root.glob("[!.]*/meta.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                meta = self._meta(file.parent)
                if meta.source == source and meta.sha256 == file.parent.name:
                    found.append((file.stat().st_mtime_ns, meta))
        return [meta for _, meta in sorted(found, key=lambda pair: pair[0], reverse=True)]

    def _meta(self, entry: Path) -> CacheEntry:
        meta = CacheEntry(**json.loads((entry / "meta.json").read_bytes()))
        if meta.name != os.path.basename(meta.name) or not isinstance(meta.stamps, dict):
            raise ValueError("meta.json is not what this program writes")
        return meta

    @contextlib.contextmanager
    def partial(self) -> Iterator[Path]:
        """Give a locked folder to download into; what is left of it at the end is removed."""
        self.root.mkdir(parents=True, exist_ok=True)
        name = _partial_name()
        folder = self.root / f".new{name}"
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # no locks on this file system: age decides
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Only now does it carry a name that others look for: none of them sees it without its lock.
            folder = folder.rename(self.root / name)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # renamed when all went well
            os.close(lock)

    def sweep(self) -> None:
        """Remove the partial folders of dead processes."""
        for folder in self.root.glob(".partial-*"):
            with contextlib.suppress(OSError):
                lock = os.open(folder, os.O_RDONLY)
                try:
                    # A process id would not do: containers that share a volume do not share process ids.
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    is_dead = True
                except OSError:
                    is_dead = time.time() - max(f.stat().st_mtime for f in (folder, *folder.rglob("*"))) > _DEAD_AFTER_S
                finally:
                    os.close(lock)
                if is_dead:
                    shutil.rmtree(folder)

    def publish(self, folder: Path, meta: CacheEntry) -> Artifact:
        """Move a complete download to its place, or leave a good copy there that another process put first."""
        with (folder / "meta.json").open("w") as file:
            json.dump(asdict(meta), file)
            file.flush()
            os.fsync(file.fileno())
        for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
            _sync_folder(path)
        entry = self.root / meta.sha256
        while True:
            try:
                folder.rename(entry)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if self.find(meta.sha256):
                (folder / "meta.json").replace(entry / "meta.json")  # newer stamps of the same content
                break
        _sync_folder(self.root)
        files = tuple(entry / "files" / name for name in meta.stamps)
        return Artifact(files[0], meta.sha256, sum(file.stat().st_size for file in files), files)


def inspect(path: Path, wanted: str | None, label: str = "") -> Artifact:
    """Hash a model file and the external data beside it; raise DigestMismatch where another digest is `wanted`."""
    try:
        hashes = {path.name: _sha256(path)}
        for name in external_files(path, hashes[path.name], wanted, str(path)):
            try:
                hashes[name] = _sha256(path.parent / name)
            except FileNotFoundError:
                raise external_missing(str(path.parent / name)) from None
        files = tuple(path.parent / name for name in hashes)
        artifact = Artifact(path, digest_of(hashes), sum(file.stat().st_size for file in files), files)
    except OSError as error:
        message = f"cannot read {error.filename or path}: {error.strerror or error}"
        raise ModelLoadError(Reason.FETCH_FAILED, message) from error
    if wanted and artifact.sha256 != wanted:
        raise mismatch(label or str(path), wanted, artifact.sha256)
    return artifact


def external_files(path: Path, sha256: str, wanted: str | None, label: str) -> tuple[str, ...]:
    """Return what else belongs to the model. Raises InvalidModel, or DigestMismatch where that explains more."""
    try:
        return tuple(name for name in read_facts(path).external_files if name != path.name)
    except OnnxFileError as error:
        if wanted and sha256 != wanted:
            other = mismatch(label, wanted, sha256)
            raise ModelLoadError(other.reason, f"{other.message} ({error})") from error
        raise ModelLoadError(Reason.INVALID_MODEL, f"{label}: {error}") from error


def external_missing(label: str) -> ModelLoadError:
    """Return the error for external data that is not beside its model."""
    message = (
        f"external data file {label} is not found; it has to lie beside the model under the name the model gives it"
    )
    return ModelLoadError(Reason.EXTERNAL_DATA_MISSING, message)


def mismatch(label: str, wanted: str, got: str) -> ModelLoadError:
    """Return the error for a model whose digest is not the one that the manifest gives."""
    return ModelLoadError(Reason.DIGEST_MISMATCH, f"{label}: spec.model.sha256 expects {wanted}, got {got}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(hashes: Mapping[str, str]) -> str:
    """Return the digest of a model from the SHA-256 of each of its files by name; the module's docstring says how."""
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes, key=os.fsencode))
    return hashlib.sha256(lines.encode()).hexdigest()


def _partial_name() -> str:
    return f".partial-{os.getpid()}-{secrets.token_hex(6)}"


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
