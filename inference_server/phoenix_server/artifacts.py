"""Turns `spec.model.uri` into local files whose digest is known; nothing that does not match it leaves this module.

Hides where models lie (by the manifest, in the model store, behind HTTPS, S3, GCS or Azure), credentials, retries,
deadlines, and when the copy in `model_cache` will do. Called by `repository` only; the one importer of `obstore`, and
only for an address that needs it.

With `sha256` a good copy is used without asking the store. Without, the store is asked whether the file is still the
same (ETag, else date and size); if it cannot be reached the model is not served, because nothing says that the copy is
still what the address names. The message then gives the digest that would allow it.
"""

import asyncio
import hashlib
import logging
import os
import re
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from phoenix_server import model_cache
from phoenix_server.errors import ModelLoadError, Reason
from phoenix_server.model_cache import Artifact, CacheEntry, ModelCache

if TYPE_CHECKING:
    from obstore import GetResult, ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

__all__ = ["Artifact", "ArtifactStore", "Progress"]

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 256 * 1024
_PROGRESS_EVERY_S = 0.5
_REMOTE = {"https": "HTTP_", "s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_SECRET_KEYS = {
    "https": "HTTP_AUTHORIZATION, a whole header value such as 'Bearer ...'",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_REGION or AWS_ENDPOINT_URL where they are needed",
    "gs": "GOOGLE_SERVICE_ACCOUNT_KEY, the JSON of a service account key",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY",
}
# What an obstore error means, in words; the first that matches its text.
_CAUSES = (
    (r"(?i)redirect without location", "the bucket is in another region; set AWS_REGION"),
    (r"MissingAccount", "the credentials name no storage account"),
    (r"dns error", "its host name does not resolve"),
    (r"ConnectionRefused", "connection refused"),
    (r"NetworkUnreachable|HostUnreachable", "its host cannot be reached"),
    (r"InvalidCertificate|(?i:certificate|handshake)", "TLS failed: its certificate is not trusted or does not fit; "
     "a private CA goes under the key ca.crt into the Secret, or into the file SSL_CERT_FILE"),
    (r"BadScheme", "plain http is refused; for a store's own endpoint set AWS_, GOOGLE_ or AZURE_ALLOW_HTTP=true"),
    (r"TimedOut|kind: Timeout", "it timed out"),
    (r"MissingContentLength", "the server does not say how long the file is (Content-Length)"),
    (r"IncompleteBody|UnexpectedEof|ConnectionReset|BrokenPipe|RangeNotSupported|kind: Interrupted",
     "the connection broke before the whole file came"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the download of one file is. `uri` carries no secret."""

    uri: str
    done_bytes: int
    total_bytes: int
    elapsed_s: float


class ArtifactStore:
    """Fetches models. `progress` is called on the event loop, every 0.5 s at most and once when a file is whole.

    `attempts` bounds how often a request, and a download that breaks off, is tried; `stall_timeout_s` is the longest
    time without a byte, first answer (with its retries) included.
    """

    def __init__(
        self,
        *,
        model_store: Path,
        cache_dir: Path,
        progress: Callable[[Progress], None] | None = None,
        stall_timeout_s: float = 60.0,
        attempts: int = 4,
        backoff_s: float = 0.5,
    ) -> None:
        self._model_store = model_store
        self._cache = ModelCache(cache_dir / "models")
        self._progress = progress
        self._stall_timeout_s = stall_timeout_s
        self._attempts = attempts
        self._backoff_s = backoff_s

    async def fetch(
        self,
        uri: str,
        *,
        sha256: str | None = None,
        beside: Path | None = None,
        credentials: Mapping[str, str] | None = None,
    ) -> Artifact:
        """Return the files of a model, checked against `sha256` where it is given. Raises `ModelLoadError`.

        A relative `uri` is looked up in `beside` (the manifest's folder), in the folder around that, then in the model
        store: `iris/model.onnx` names the same file for a manifest in `iris/` and for one elsewhere. What the operator
        mounts (`pvc:`, `oci:`, `configmap:`) is at its path in the model store. Links in these folders are followed:
        who owns the folder decides. `credentials` (names as in the environment, and `ca.crt`) serve this fetch only and
        go before the process environment.
        """
        wanted = sha256.lower() if sha256 else None
        if wanted and not re.fullmatch(r"[0-9a-f]{64}", wanted):
            raise ModelLoadError(Reason.INVALID_SPEC, "spec.model.sha256 is not 64 hex digits")
        if ".." in re.split(r"[/\\]", unquote(uri.partition("?")[0])):
            raise ModelLoadError(Reason.INVALID_SPEC, f"spec.model.uri {_label(uri)}: '..' is not allowed")
        if uri.startswith(tuple(f"{scheme}://" for scheme in _REMOTE)):
            return await self._fetch_remote(_Remote.of(uri, credentials or {}, self._obstore_options()), wanted)
        return await asyncio.to_thread(self._read_local, uri, wanted, beside)

    # --- local -------------------------------------------------------------------------------------------------------

    def _read_local(self, uri: str, wanted: str | None, beside: Path | None) -> Artifact:
        return model_cache.inspect(self._locate(uri, beside), wanted, _label(uri))

    def _locate(self, uri: str, beside: Path | None) -> Path:
        scheme, is_url, rest = uri.partition("://")
        hint = ""
        if not is_url and uri and not uri.startswith("/"):
            # Absolute first: the parent of `.` would be `.` again.
            folders = [beside, Path(os.path.abspath(beside)).parent] if beside else []
            places = [folder / uri for folder in (*folders, self._model_store)]
        elif scheme == "file" and rest.startswith("/"):
            places = [Path(unquote(rest))]
        elif scheme in ("pvc", "configmap", "oci"):
            inner = rest.partition("#" if scheme == "oci" else "/")[2].lstrip("/")
            places = [self._model_store / inner] if inner else []
            hint = "; in a cluster the operator mounts it there, elsewhere put the file there yourself"
        else:
            places = []
        if not places:
            known = "a relative path, file:///, https://, s3://, gs://, az://, pvc://, oci:// with #path, configmap://"
            raise ModelLoadError(Reason.INVALID_SPEC, f"spec.model.uri {_label(uri)!r} names no file; use {known}")
        for place in places:
            try:
                if place.is_file():
                    return place
            except OSError as error:
                raise ModelLoadError(Reason.FETCH_FAILED, f"cannot read {place}: {error.strerror}") from error
        looked = ", ".join(dict.fromkeys(os.path.abspath(place) for place in places))
        raise ModelLoadError(Reason.NOT_FOUND, f"model {_label(uri)} is not found; looked at {looked}{hint}")

    # --- remote ------------------------------------------------------------------------------------------------------

    async def _fetch_remote(self, remote: "_Remote", wanted: str | None) -> Artifact:
        with self._cache.writing():
            if wanted and (cached := await asyncio.to_thread(self._cache.find, wanted)):
                _log.info("model taken from the cache", extra={"uri": remote.label, "digest": wanted})
                return cached
            if not wanted and (cached := await self._unchanged(remote)):
                _log.info("model unchanged, taken from the cache", extra={"uri": remote.label, "digest": cached.sha256})
                return cached
            await asyncio.to_thread(self._cache.sweep)
            with self._cache.partial() as folder:
                started = time.monotonic()
                meta = await self._download(remote, wanted, folder / "files")
                artifact = await asyncio.to_thread(self._cache.publish, folder, meta)
        fetched = {"uri": remote.label, "digest": meta.sha256, "size_bytes": artifact.size_bytes}
        _log.info("model fetched", extra=fetched | {"seconds": round(time.monotonic() - started, 3)})
        return artifact

    async def _unchanged(self, remote: "_Remote") -> Artifact | None:
        """Return the copy that is still what the address names, as the store says."""
        copies = await asyncio.to_thread(self._cache.copies_of, remote.source)
        now: dict[str, str] = {}
        try:
            for meta in copies:
                for name, stamp in meta.stamps.items():
                    if name not in now:
                        # GET, with the body left alone: an address that is signed for GET refuses HEAD.
                        now[name] = _stamp((await self._open(remote, name)).meta)
                    if not stamp or now[name] != stamp:
                        break
                else:
                    if artifact := await asyncio.to_thread(self._cache.find, meta.sha256):
                        return artifact
        except ModelLoadError as error:
            if error.reason is not Reason.FETCH_FAILED:
                raise
            advice = f"a copy is in the cache; to serve it all the same, set spec.model.sha256 to {copies[0].sha256}"
            raise ModelLoadError(error.reason, f"{error.message}; {advice}") from error
        return None

    async def _download(self, remote: "_Remote", wanted: str | None, folder: Path) -> CacheEntry:
        hashes, stamps = dict[str, str](), dict[str, str]()
        hashes[remote.name], stamps[remote.name] = await self._download_file(remote, remote.name, folder)
        model = folder / remote.name, hashes[remote.name], wanted, remote.label
        for name in await asyncio.to_thread(model_cache.external_files, *model):
            hashes[name], stamps[name] = await self._download_file(remote, name, folder)
        digest = model_cache.digest_of(hashes)
        if wanted and digest != wanted:
            raise model_cache.mismatch(remote.label, wanted, digest)
        return CacheEntry(name=remote.name, sha256=digest, source=remote.source, stamps=stamps)

    async def _download_file(self, remote: "_Remote", name: str, folder: Path) -> tuple[str, str]:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(self._attempts):
            if attempt:
                await asyncio.sleep(self._backoff_s * 2 ** (attempt - 1))
            try:
                return await self._stream(remote, name, target)
            except _BrokeOffError as error:
                cause = error
        tries = f"after {self._attempts} attempts" if self._attempts > 1 else "and is not tried again"
        raise ModelLoadError(Reason.FETCH_FAILED, f"{remote.label_of(name)}: {cause}, {tries}")

    async def _stream(self, remote: "_Remote", name: str, target: Path) -> tuple[str, str]:
        """Write one file; return its SHA-256 and its stamp. Raises `_BrokeOffError` where another try may help."""
        from obstore.exceptions import BaseError

        started = reported = time.monotonic()
        result = await self._open(remote, name)
        total, done, sha256 = result.meta["size"], 0, hashlib.sha256()
        chunks = aiter(result.stream(min_chunk_size=_CHUNK_BYTES))
        with target.open("wb") as file:

            def take(chunk: bytes) -> None:
                sha256.update(chunk)
                file.write(chunk)

            while True:
                try:
                    async with asyncio.timeout(self._stall_timeout_s):
                        chunk = await anext(chunks)
                except StopAsyncIteration:
                    break
                except TimeoutError:
                    stall = f"no byte came for {self._stall_timeout_s:g} s"
                    raise _BrokeOffError(f"{stall}, {done} of {total} had come") from None
                except BaseError as error:
                    raise _BrokeOffError(f"{remote.cause(error)}, {done} of {total} bytes had come") from None
                await asyncio.to_thread(take, chunk)
                done += len(chunk)
                now = time.monotonic()
                if now - reported >= _PROGRESS_EVERY_S and done < total:
                    reported = now
                    self._report(remote.label_of(name), done, total, started)
            if done != total:
                raise _BrokeOffError(f"{done} bytes came, {total} were announced")
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        self._report(remote.label_of(name), done, total, started)
        return sha256.hexdigest(), _stamp(result.meta)

    def _report(self, label: str, done: int, total: int, started: float) -> None:
        if self._progress:
            self._progress(Progress(label, done, total, time.monotonic() - started))

    async def _open(self, remote: "_Remote", name: str) -> "GetResult":
        """Start a GET. obstore repeats what is worth repeating, so every error here is final."""
        import obstore
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        label = remote.label_of(name)
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                return await obstore.get_async(*remote.at(name))
        except TimeoutError:
            message = f"{label}: no answer within {self._stall_timeout_s:g} s"
        except FileNotFoundError:
            if name != remote.name:
                raise model_cache.external_missing(label) from None
            raise ModelLoadError(Reason.NOT_FOUND, f"{label} is not found (404); check spec.model.uri") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            message = f"{label}: access was refused, {remote.cause(error)}; {remote.advice}"
        except (BaseError, ValueError) as error:
            cause = remote.cause(error)
            message = f"{label}: {cause}" + (f"; {remote.advice}" if "credential" in cause else "")
        raise ModelLoadError(Reason.FETCH_FAILED, message) from None

    def _obstore_options(self) -> "tuple[ClientConfig, RetryConfig]":
        # obstore ends a request after 30 s, body included; a model takes as long as it takes while bytes come.
        stall = timedelta(seconds=self._stall_timeout_s)
        client: ClientConfig = {"timeout": timedelta(days=7), "connect_timeout": min(stall, timedelta(seconds=10))}
        backoff = timedelta(seconds=self._backoff_s)
        retry: RetryConfig = {
            "max_retries": self._attempts - 1,
            "retry_timeout": stall,
            "backoff": {"init_backoff": backoff, "max_backoff": 10 * backoff, "base": 2},
        }
        return client, retry


class _BrokeOffError(Exception):
    """A download that ended early."""


@dataclass(frozen=True, slots=True)
class _Remote:
    """A model behind an address: how to ask for each of its files, and how to speak of them without secrets."""

    name: str
    source: str
    label: str
    scheme: str
    secrets: tuple[str, ...] = field(repr=False)
    at: "Callable[[str], tuple[ObjectStore, str]]" = field(repr=False)

    @classmethod
    def of(cls, uri: str, credentials: Mapping[str, str], options: "tuple[ClientConfig, RetryConfig]") -> "_Remote":
        scheme = uri.partition("://")[0]
        prefix = _REMOTE[scheme]
        try:
            parts = urlsplit(uri)
        except ValueError as error:
            raise ModelLoadError(Reason.INVALID_SPEC, f"spec.model.uri {_label(uri)}: {error}") from None
        path = parts.path if scheme == "https" else uri.partition("://")[2].partition("/")[2]
        folder, _, name = path.rpartition("/")
        name = unquote(name) if scheme == "https" else name
        if not name or "/" in name or not parts.netloc:
            raise ModelLoadError(Reason.INVALID_SPEC, f"spec.model.uri {_label(uri)} names no file")
        environment = {key: value for key, value in os.environ.items() if key.startswith(prefix)}
        given = {key: value for key, value in credentials.items() if key.startswith(prefix)}
        client, retry = options
        if "ca.crt" in credentials:
            client["root_certificate"] = credentials["ca.crt"]
        allow_http = given.pop(f"{prefix}ALLOW_HTTP", environment.get(f"{prefix}ALLOW_HTTP", ""))
        client["allow_http"] = allow_http.lower() in ("1", "true", "yes") and scheme != "https"
        at: Callable[[str], tuple[ObjectStore, str]]
        if scheme == "https":
            user, _, host = parts.netloc.rpartition("@")
            header = credentials.get("HTTP_AUTHORIZATION") or (
                user and f"Basic {b64encode(unquote(user).encode()).decode()}"
            )
            if header:  # not sent on to another host that an answer leads to
                client["default_headers"] = {"authorization": header}

            def at(file: str) -> "tuple[ObjectStore, str]":
                from obstore.store import HTTPStore

                # The model's own path as it was written: another encoding of it may be another address.
                where = path if file == name else f"{folder}/{quote(file)}"
                url = urlunsplit(("https", host, where, parts.query, ""))
                return HTTPStore(url, client_options=client, retry_config=retry), ""

        else:

            def at(file: str) -> "tuple[ObjectStore, str]":
                from obstore import store

                build: Any = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}[scheme]
                bucket = build(parts.netloc, config=given, client_options=client, retry_config=retry)
                return bucket, f"{folder}/{file}".lstrip("/")

        values = {value for value in (*environment.values(), *credentials.values()) if len(value) > 3}
        source = hashlib.sha256(uri.encode()).hexdigest()
        return cls(name, source, _label(uri), scheme, tuple(sorted(values, key=len, reverse=True)), at)

    def label_of(self, name: str) -> str:
        return self.label if name == self.name else f"{self.label.rpartition('/')[0]}/{name}"

    @property
    def advice(self) -> str:
        return f"put {_SECRET_KEYS[self.scheme]} into the Secret that spec.model.credentials.secretRef names"

    def cause(self, error: Exception) -> str:
        """Say in a few words what an obstore error means; its own text holds addresses, bodies and Rust structures."""
        text = str(error)
        # Where a cloud's machines ask for their own credentials; obstore tries it last.
        if re.search(r"performing \w+ http://(169\.254\.|metadata)", text):
            return "no credentials were given, and this machine has none of its own"
        if status := re.search(r"status code: (\d{3})", text):
            code = int(status[1])
            return f"HTTP {code} {HTTPStatus(code).phrase}" if code in set(HTTPStatus) else f"HTTP {code}"
        text = re.sub(r"\w+://[^\s,\"]+", "", text)
        for pattern, meaning in _CAUSES:
            if re.search(pattern, text):
                return meaning
        line = text.partition("\n")[0]
        for secret in self.secrets:
            line = line.replace(secret, "***")
        return line[:200]


def _stamp(meta: "ObjectMeta") -> str:
    """Return what tells this state of a remote file from the next; empty where the store gives nothing to go by."""
    if meta["e_tag"]:
        return f"{meta['e_tag']} {meta['size']}"
    # The epoch is obstore's way to say that no date came.
    return f"{meta['last_modified'].isoformat()} {meta['size']}" if meta["last_modified"].timestamp() else ""


def _label(uri: str) -> str:
    """Return the address as it may stand in a message: without user, password, query and fragment."""
    scheme, is_url, rest = uri.partition("://")
    if not is_url:
        return uri
    rest = rest.partition("?")[0] if scheme != "oci" else rest
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2] if scheme != 'oci' else authority}{slash}{path}"
