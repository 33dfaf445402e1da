"""Which models are served: loads them from manifests, swaps versions under load, and says what state each is in.

Hides fetching, loading, warming up, measuring, draining and reloading. A version is loaded beside the one it replaces
and takes over in one assignment; whatever fails, what served before goes on serving.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from phoenix_api import Manifest, ManifestError, manifest_files, read_manifests
from phoenix_server.artifacts import ArtifactStore
from phoenix_server.errors import Code, ModelLoadError, PhoenixError, Reason
from phoenix_server.features import Features
from phoenix_server.metrics import Metrics
from phoenix_server.served_model import Loader, ServedModel, stamps_of
from phoenix_server.settings import Settings

_log = logging.getLogger(__name__)
# Traffic-free time after which the capacity measurement may (re)start.
_QUIET_S = 0.3
_WATCH_S = 1.0
_Key = tuple[str, str]


class State(StrEnum):
    """The states of the model repository extension."""

    READY = "READY"
    LOADING = "LOADING"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(slots=True)
class _Slot:
    """One declared version: what it should be, what it is, and why not more."""

    manifest: Manifest
    state: State = State.LOADING
    reason: str = ""
    served: ServedModel | None = None
    is_wanted: bool = True
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Repository:
    """All declared models. Lives on one event loop; loading happens in threads."""

    def __init__(
        self, settings: Settings, metrics: Metrics, store: ArtifactStore, features: Features | None = None
    ) -> None:
        """`features` completes the requests of models that ask for it; None: such models are refused."""
        self._settings = settings
        self._metrics = metrics
        self._loader = Loader(settings, metrics, store, features)
        self._slots: dict[_Key, _Slot] = {}
        # (name, version) and (name, "") -> what answers; the one look-up of the hot path.
        self._answering: dict[_Key, ServedModel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_started = False
        self.is_draining = False
        # Each is called on the event loop with everything that is loaded, whenever that has changed.
        self.followers: list[Callable[[list[ServedModel]], None]] = []

    # --- what requests ask -----------------------------------------------------------------------------------

    def get(self, name: str, version: str = "") -> ServedModel:
        """Return the model that answers for that name and version (empty: the newest).

        Raises `PhoenixError`: NOT_FOUND for what nobody declared, UNAVAILABLE for what is not loaded.
        """
        try:
            return self._answering[name, version]
        except KeyError:
            raise self._why_not(name, version) from None

    def versions(self, name: str) -> list[str]:
        """Return the loaded versions of a model, oldest first."""
        return sorted((key[1] for key, slot in self._slots.items() if key[0] == name and slot.served), key=_age)

    def served(self) -> list[ServedModel]:
        """Return everything that is loaded."""
        return [slot.served for slot in self._slots.values() if slot.served]

    def index(self) -> Iterator[tuple[str, str, State, str]]:
        """Yield name, version, state and reason of everything declared."""
        for (name, version), slot in sorted(self._slots.items()):
            yield name, version, slot.state, slot.reason

    def reason(self, name: str, version: str) -> str:
        """Return why the last load of a version failed; empty if it did not."""
        return self._slots[name, version].reason

    @property
    def is_ready(self) -> bool:
        """Whether everything that should be served is served, and the server is not on its way out."""
        return (
            self._is_started
            and not self.is_draining
            and all(slot.served for slot in self._slots.values() if slot.is_wanted)
        )

    def _why_not(self, name: str, version: str) -> PhoenixError:
        slots = {key[1]: slot for key, slot in self._slots.items() if key[0] == name}
        if not slots:
            known = sorted({key[0] for key in self._slots})
            return PhoenixError(Code.NOT_FOUND, f"model '{name}' is not found; served: {', '.join(known) or 'none'}")
        if version and version not in slots:
            return PhoenixError(
                Code.NOT_FOUND, f"model '{name}' has no version '{version}'; it has: {', '.join(sorted(slots))}"
            )
        slot = slots[version or max(slots, key=_age)]
        why = f": {slot.reason}" if slot.reason else ""
        return PhoenixError(
            Code.UNAVAILABLE, f"model '{name}' is not ready, its state is {slot.state}{why}", retry_after_s=5
        )

    # --- what changes them -----------------------------------------------------------------------------------

    async def start(self, manifests: Iterable[Manifest]) -> None:
        """Load all manifests, one after the other; raise the first `ModelLoadError` if settings say so."""
        manifests = list(manifests)
        for manifest in manifests:
            self._declare(manifest)
        for manifest in manifests:
            try:
                await self.load(manifest)
            except ModelLoadError:
                if self._settings.exit_on_error:
                    raise
        self._is_started = True

    async def load(self, manifest: Manifest) -> None:
        """Load a version and let it answer; what answered before is drained afterwards. Raises `ModelLoadError`."""
        slot = self._declare(manifest)
        name, version = _key(manifest)
        async with slot.lock:
            if not slot.is_wanted:
                slot.is_wanted, slot.reason = True, ""
            if slot.served is None:
                slot.state = State.LOADING  # why it failed the last time is told until it is there
            try:
                served = await self._loader.load(manifest)
            except ModelLoadError as error:
                slot.state = State.READY if slot.served else State.UNAVAILABLE
                slot.reason = f"{error.reason}: {error.message}"
                _log.error(
                    "model not loaded", extra={"model": name, "version": version, "reason": error.reason,
                                               "cause": error.message, "still_serving": slot.served is not None},
                )  # fmt: skip
                raise
            old, slot.served, slot.manifest = slot.served, served, manifest
            slot.state, slot.reason = State.READY, ""
            self._route()
        _log.info(
            "model ready",
            extra={
                "model": name, "version": version, "digest": served.artifact.sha256, "provider": served.engine.provider,
                "inline": served.engine.is_inline, "seconds": round(served.metrics.load_s, 3),
            },
        )  # fmt: skip
        if old is not None:
            self._spawn(old.retire(self._settings.shutdown_seconds))
        if self._settings.measure_capacity:
            self._spawn(self._measure_when_quiet(served))

    async def unload(self, name: str, version: str = "") -> None:
        """Stop serving a model (all versions, or one) once what is in flight is answered. Raises NOT_FOUND."""
        slots = [slot for key, slot in self._slots.items() if key[0] == name and version in ("", key[1])]
        if not slots:
            raise self._why_not(name, version)
        for slot in slots:
            async with slot.lock:
                served, slot.served = slot.served, None
                slot.is_wanted = False
                slot.state, slot.reason = State.UNLOADING, "unloaded by request"
                self._route()
                if served is not None:
                    await served.retire(self._settings.shutdown_seconds)
                slot.state = State.UNAVAILABLE

    async def load_named(self, name: str) -> None:
        """Read the manifests of that name again and load them. Raises NOT_FOUND, or INVALID with the reason."""
        slots = [slot for key, slot in self._slots.items() if key[0] == name]
        if not slots:
            raise self._why_not(name, "")
        try:
            manifests = await asyncio.to_thread(
                read_manifests, sorted({slot.manifest.file for slot in slots}), strict=False
            )
            for manifest in manifests:
                if manifest.model.metadata.name == name:
                    await self.load(manifest)
        except (ManifestError, ModelLoadError) as error:
            raise PhoenixError(Code.INVALID, f"failed to load '{name}': {error}") from error

    async def reload(self, paths: Iterable[Path]) -> None:
        """Make what is served what the manifests now say. Faults are logged and keep the old version serving."""
        try:
            manifests = await asyncio.to_thread(read_manifests, list(paths), strict=False)
        except ManifestError as error:
            _log.error("manifests not reloaded; serving what was", extra={"cause": str(error)})
            return
        declared = {_key(manifest): manifest for manifest in manifests}
        for key, manifest in declared.items():
            slot = self._slots.get(key)
            has_failed = slot is not None and slot.is_wanted and slot.state is State.UNAVAILABLE
            if slot is None or slot.manifest.model != manifest.model or has_failed or (
                slot.served is not None and slot.served.stamps != stamps_of(slot.served.artifact)
            ):  # fmt: skip
                with contextlib.suppress(ModelLoadError):  # logged and kept as the slot's reason
                    await self.load(manifest)
        for key in self._slots.keys() - declared.keys():
            successors = [slot.served for other, slot in self._slots.items() if other[0] == key[0] and other != key]
            if any(new in declared for new in self._slots if new[0] == key[0]) and not any(successors):
                continue  # its successor did not load: the old version goes on
            await self.unload(*key)
            del self._slots[key]
            self._metrics.forget(*key)

    async def watch(self, paths: list[Path]) -> None:
        """Reload whenever a manifest, or a file beside one, changes; runs until cancelled.

        Looks once a second instead of asking the kernel: that works on every file system, and for the symbolic links of
        a ConfigMap mount, and costs microseconds.
        """
        seen: dict[Path, tuple[int, int, int]] | None = None
        while True:
            files = {slot.manifest.file for slot in self._slots.values()}
            files |= {file for model in self.served() for file in model.artifact.files}
            try:
                found = await asyncio.to_thread(_fingerprint, paths, files)
                if found != seen:
                    await self.reload(paths)  # the first time too: something may have changed during the start
                    seen = found
            except Exception:  # a folder that vanishes while it is read must not end the watching
                _log.exception("looking for changed files failed; trying again")
            await asyncio.sleep(_WATCH_S)

    async def close(self) -> None:
        """Finish what is in flight, then free every model."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        served = self.served()
        self._answering.clear()
        await asyncio.gather(*(model.retire(self._settings.shutdown_seconds) for model in served))

    # --- how -------------------------------------------------------------------------------------------------

    def _declare(self, manifest: Manifest) -> _Slot:
        slot = self._slots.setdefault(_key(manifest), _Slot(manifest))
        if slot.manifest.model.metadata.namespace != manifest.model.metadata.namespace:
            raise ModelLoadError(
                Reason.NAME_CLASH,
                f"{manifest.file}: model '{manifest.model.metadata.name}' is already served from {slot.manifest.file} "
                "for another namespace; rename one",
            )
        return slot

    def _route(self) -> None:
        """Recompute who answers; the newest version answers where none is named."""
        answering: dict[_Key, ServedModel] = {}
        for (name, version), slot in sorted(self._slots.items(), key=lambda item: _age(item[0][1])):
            if slot.served is not None:
                answering[name, version] = answering[name, ""] = slot.served
        self._answering = answering
        for follower in self.followers:
            follower(self.served())

    async def _measure_when_quiet(self, model: ServedModel) -> None:
        """Measure capacity while no request is in flight; start again later when one comes."""
        metrics = model.metrics

        def is_quiet() -> bool:
            return metrics.inflight == 0 and self._answering.get((model.name, model.version)) is model

        while self._answering.get((model.name, model.version)) is model:
            await asyncio.sleep(_QUIET_S)
            if not is_quiet() or not self._is_started:
                continue
            measured = await model.measure(may_go_on=is_quiet)
            if measured is not None or is_quiet():
                return

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _key(manifest: Manifest) -> _Key:
    return manifest.model.metadata.name, manifest.model.spec.model.version


def _age(version: str) -> tuple[int, str]:
    """Order versions: numbers by value, before anything else by name."""
    return (int(version), "") if version.isdecimal() else (-1, version)


def _fingerprint(paths: Iterable[Path], files: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """Return what changes when a manifest under `paths`, or a file in the folder of one of `files`, does."""
    candidates: set[Path] = set()
    for path in paths:
        candidates.update(manifest_files(path) if path.is_dir() else [path])
    for folder in {file.parent for file in files}:
        with contextlib.suppress(OSError):
            candidates.update(folder.iterdir())
    stamps = {}
    for file in candidates:
        with contextlib.suppress(OSError):
            stat = file.stat()
            stamps[file] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return stamps
