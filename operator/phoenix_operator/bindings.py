"""Gives each model its access to backends, and takes it away again: Secrets, logins, rotation, release.

State is kept where it cannot be lost: which backends a model may have something on stands on the PhoenixModel (an
annotation beside the finalizer, written before anything is made), and how far a login is stands on its Secret. So a
step that was cut off is done again from what is there. Called by `reconcile`: `settle` before the model's objects are
applied, `tidy` after, `release` when the model is deleted.

A password is made once. The first is stored before the backend hears of it; a later one is given to the backend under
the login that no pod uses, before pods can see it. The login before it goes when no pod of an older template is left.
"""

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeVar

from phoenix_api import DeletionPolicy, Reason
from phoenix_operator.backend_pool import BackendPool
from phoenix_operator.backends import SLOTS, Backend, BackendError, Login, Tenant
from phoenix_operator.binding_marks import (
    FINALIZER,
    FORCE,
    RECORD,
    Home,
    SecretMarks,
    homes_of,
    tenant_of,
    tenant_to_release,
    was_bound,
)
from phoenix_operator.cluster import ApiError, Cluster
from phoenix_operator.desired import bindings as desired
from phoenix_operator.desired.bindings import Asked
from phoenix_operator.desired.deployment import is_settled
from phoenix_operator.desired.naming import digest, is_of_predecessor, is_owned
from phoenix_operator.difference import is_as_wanted
from phoenix_operator.kinds import PHOENIX_MODEL, SECRET
from phoenix_operator.observed import ROTATE, BindingSeen, Missing, Object, Observed, Reference, Subject
from phoenix_operator.recorder import Happening, Recorder
from phoenix_operator.settings import Settings
from phoenix_operator.store import Key, Store

_FIRST_PAUSE_S, _LAST_PAUSE_S = 2.0, 300.0
_PASSWORD_BYTES = 32
_UNREAD = "unread"
_RIGHTS = "install with `phoenix-operator manifests FOLDER --bindings SECRETS`"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Trial:
    """What came of the last look at a backend for one model."""

    next_at: float  # before then it is not asked again, unless something else is wanted
    wish: str
    error: BackendError | None = None
    failures: int = 0


@dataclass(frozen=True, slots=True)
class _Access:
    """One model on one backend."""

    subject: Subject
    home: Home

    @property
    def place(self) -> tuple[Key, Home]:
        return (self.subject.namespace, self.subject.name), self.home

    @property
    def tenant(self) -> Tenant:
        return tenant_of(self.subject, self.home[0])


class _Refused(Exception):
    """The API server will not have an object of ours; the message has no secret."""


class Bindings:
    """Access of models to backends."""

    def __init__(
        self, cluster: Cluster, store: Store, pool: BackendPool, recorder: Recorder, settings: Settings
    ) -> None:
        self._cluster, self._store, self._pool = cluster, store, pool
        self._recorder, self._settings = recorder, settings
        self._trials: dict[tuple[Key, Home], _Trial] = {}
        self._retiring: dict[tuple[Key, Home], Object] = {}  # Secrets that name a login that is to go

    def forget(self, key: Key) -> None:
        """Forget a model that is gone."""
        for known in (self._trials, self._retiring):
            for place in [place for place in known if place[0] == key]:
                known.pop(place)

    def look_again_s(self, key: Key) -> float | None:
        """Return in how many seconds a backend is to be asked again for a model; None without any."""
        due = [trial.next_at for (of, _), trial in self._trials.items() if of == key]
        return max(min(due) - time.monotonic(), 0.5) if due else None

    # --- before the model's objects are applied ----------------------------------------------------------------------

    async def settle(self, subject: Subject, document: Object, observed: Observed) -> Observed:
        """Bring Secrets and backends to what the spec asks for; return what was seen, with the bindings in it.

        With a foreign Secret in the way (`foreign`) nothing was done. Raises `ApiError` for what another try may mend.
        """
        wanted = desired.asked(subject)
        own = [each for each in wanted if each.backend is not None]
        recorded = homes_of(document)
        if not wanted and not recorded:
            return observed
        live = dict(zip([each.kind for each in own], await _all(self._get(subject, each) for each in own), strict=True))
        foreign = [(SECRET, each.secret) for each in own if _is_foreign(subject, live[each.kind])]
        if foreign:
            return replace(observed, foreign=foreign)
        wished = {(each.kind, each.backend or "") for each in own}
        # a backend that cannot even be addressed holds nothing: without it there is no finalizer to stand in the way
        unknown = {home: error for home in wished - recorded if (error := await self._unknown(home)) is not None}
        missing = wished - recorded - unknown.keys()
        if missing:
            try:
                await self._write_record(document, recorded | missing)
            except ApiError as error:
                if error.code != 403 or error.is_namespace_ending:
                    raise
                words = f"the operator may not add its finalizer; {_RIGHTS}"
                denied = [BindingSeen(each.kind, reason=Reason.ACCESS_DENIED, message=words) for each in wanted]
                return replace(observed, bindings={seen.kind: seen for seen in denied})

        async def look(each: Asked) -> tuple[BindingSeen, Missing | None]:
            if each.backend is None:
                return await self._brought(subject, each)
            home = (each.kind, each.backend)
            if home in unknown:
                return _failed(each, unknown[home]), None
            return await self._provisioned(subject, each, live[each.kind], is_known=home in recorded), None

        seen = await _all(look(each) for each in wanted)
        absent = [missing for _, missing in seen if missing is not None]
        return replace(
            observed,
            bindings={row.kind: row for row, _ in seen},
            missing=[*observed.missing, *absent],
        )

    async def _unknown(self, home: Home) -> BackendError | None:
        """Return why a backend cannot be addressed."""
        try:
            await self._pool.get(*home)
        except BackendError as error:
            return error
        return None

    async def _get(self, subject: Subject, each: Asked) -> Object | None:
        return await self._cluster.get(SECRET, subject.namespace, each.secret)

    async def _brought(self, subject: Subject, each: Asked) -> tuple[BindingSeen, Missing | None]:
        """Look at a Secret of the model's own. Its content is read here and not kept: what the pods see is hashed."""
        field = f"{each.field}.secretRef"
        try:
            secret = await self._get(subject, each)
        except ApiError as error:
            if error.code != 403:
                raise
            words = f"{each.kind}: Secret {each.secret}, which the operator may not read"
            return BindingSeen(each.kind, digest=_UNREAD, message=words), None
        if secret is None:
            missing = Missing(Reference.SECRET, each.secret, field)
            words = f"{field}: Secret {each.secret} does not exist; create it"
            return BindingSeen(each.kind, reason=Reason.SECRET_MISSING, message=words), missing
        values = desired.values_of(secret)
        if faults := desired.faults_of(each.kind, values):
            words = f"{field}: Secret {each.secret}: {', '.join(faults)}; see the layout of bindings"
            key = next((fault.partition("has no key ")[2] for fault in faults if "has no key" in fault), "type")
            return (
                BindingSeen(each.kind, reason=Reason.SECRET_MISSING, message=words),
                Missing(Reference.SECRET, each.secret, field, key=key),
            )
        return (
            BindingSeen(
                each.kind,
                digest=desired.content_hash(secret),
                ports=desired.ports_of(each.kind, values),
                access=desired.access_of(each.kind, values),
                message=f"{each.kind}: Secret {each.secret}",
            ),
            None,
        )

    # --- one binding to a backend ------------------------------------------------------------------------------------

    async def _provisioned(self, subject: Subject, each: Asked, live: Object | None, *, is_known: bool) -> BindingSeen:
        access = _Access(subject, (each.kind, each.backend or ""))
        stored: Object | None
        error: BackendError | None
        try:
            stored, error = await self._bring(access, live, is_known=is_known)
        except BackendError as failure:  # not even the Secret's content can be known
            stored, error = live, failure
        except _Refused as refused:
            stored, error = live, BackendError(Reason.SECRET_MISSING, str(refused))
        if stored is None:
            assert error is not None
            return _failed(each, error)
        self._retiring.pop(access.place, None)
        if SecretMarks.read(stored).retiring:
            self._retiring[access.place] = stored
        values = desired.values_of(stored)
        return BindingSeen(
            each.kind,
            digest=desired.content_hash(stored),
            ports=desired.ports_of(each.kind, values),
            access=desired.access_of(each.kind, values),
            reason=error.reason if error else Reason.BOUND,
            message=f"{each.field}: {error.message}" if error else f"{each.kind}: backend {each.backend}",
        )

    async def _bring(
        self, access: _Access, live: Object | None, *, is_known: bool
    ) -> tuple[Object, BackendError | None]:
        """Return the Secret as it is stored, and what the backend has against it.

        Raises `BackendError` if its content cannot be made, `_Refused` if it cannot be stored.
        """
        subject, (kind, name), tenant = access.subject, access.home, access.tenant
        backend = await self._pool.get(kind, name)
        rotate = subject.annotations.get(ROTATE, "")
        if live is None:
            # whatever login there was, its password is lost: pods get the new one, and the other login is taken away
            login = SecretMarks(name, SLOTS[0], rotate, "", SLOTS[1] if is_known else "")
            live = await self._write_secret(subject, kind, None, _content(backend, tenant, login, _password()), login)
        login, values = SecretMarks.read(live), desired.values_of(live)
        kept = _content(backend, tenant, login, values.get("password", ""))
        is_same_user = values.get("username") == kept.get("username") and kept.get("password") != ""
        is_same_login = kept == values or is_same_user
        if login.backend == name and is_same_login and (rotate in ("", login.rotated) or login.retiring):
            return await self._keep(access, live, login, kept)
        other = _other(login.slot) if login.backend == name and is_same_login else login.slot
        retiring = login.slot if login.backend == name and is_same_login else ""
        fresh = SecretMarks(name, other, rotate or login.rotated, "", retiring)
        content = _content(backend, tenant, fresh, _password())
        wish = self._wish(access, content, fresh)
        failure = await self._ensure(access, fresh, content, f"rotate {rotate}")
        if failure is not None:
            return live, failure
        stored = await self._write_secret(subject, kind, live, content, replace(fresh, provisioned=wish))
        self._trials[access.place] = self._later(wish)
        what = "a new login" if login.backend == name else f"a login on backend {name}"
        await self._tell(subject, "Rotated", f"{kind}: pods get {what}; the one before goes with the last of its pods")
        return stored, None

    async def _keep(
        self, access: _Access, live: Object, login: SecretMarks, content: Mapping[str, str]
    ) -> tuple[Object, BackendError | None]:
        """Keep the login that there is: the backend and the Secret's other keys are brought up to date."""
        subject, home, place = access.subject, access.home, access.place
        wish = self._wish(access, content, login)
        trial = self._trials.get(place)
        if trial is None and login.provisioned == wish and was_bound(subject):
            # a new leader trusts what is written, and asks all backends again over time
            spread_s = random.uniform(0, self._settings.resync_seconds)
            trial = self._trials[place] = _Trial(time.monotonic() + spread_s, wish)
        is_due = trial is None or time.monotonic() >= trial.next_at
        failure = trial.error if trial else None
        if is_due or login.provisioned != wish or (trial and trial.wish != wish):
            failure = await self._ensure(access, login, content, wish)
        if failure is not None:
            return live, failure
        stored = await self._write_secret(subject, home[0], live, content, replace(login, provisioned=wish))
        if not login.provisioned:
            await self._tell(subject, "Provisioned", f"{home[0]}: the model has a login on backend {home[1]}")
        return stored, None

    async def _ensure(
        self, access: _Access, login: SecretMarks, content: Mapping[str, str], wish: str
    ) -> BackendError | None:
        """Make the backend hold the login; what it says against it is remembered for a while, and returned."""
        tenant, place = access.tenant, access.place
        trial = self._trials.get(place)
        is_waiting = trial is not None and trial.error is not None and time.monotonic() < trial.next_at
        if trial is not None and is_waiting and trial.wish == wish:
            return trial.error

        async def ensure(backend: Backend) -> None:
            password = content.get("password", "")
            await backend.ensure(tenant, Login(backend.username(tenant, login.slot), password))

        try:
            await self._pool.call(*access.home, ensure)
        except BackendError as error:
            failures = trial.failures + 1 if trial is not None and trial.error is not None else 1
            pause_s = min(_FIRST_PAUSE_S * 2 ** min(failures - 1, 10), _LAST_PAUSE_S) * random.uniform(0.8, 1.2)
            self._trials[place] = _Trial(time.monotonic() + pause_s, wish, error, failures)
            return error
        self._trials[place] = self._later(wish)
        return None

    def _later(self, wish: str) -> _Trial:
        return _Trial(time.monotonic() + self._settings.resync_seconds * random.uniform(0.8, 1.2), wish)

    def _wish(self, access: _Access, content: Mapping[str, str], login: SecretMarks) -> str:
        """Return a hash of all that a backend is asked to hold; it stands on the Secret, whose content it covers."""
        config = self._pool.config(*access.home)
        told = config.model_dump(mode="json", exclude={"timeout_seconds"}) if config else {}
        rows = [[topic.name, topic.partitions, topic.retention_hours] for topic in access.tenant.topics]
        return digest([dict(content), rows, told, login.slot])

    async def _write_secret(
        self, subject: Subject, kind: str, live: Object | None, content: Mapping[str, str], login: SecretMarks
    ) -> Object:
        """Make the Secret so, unless it is; nobody else may have changed it since it was read. Raises `_Refused`."""
        manifest = desired.secret(subject, kind, content, login.annotations())
        if live is not None and is_as_wanted(manifest, live) and SecretMarks.read(live) == login:
            return live
        if live is not None:
            version = {"resourceVersion": live["metadata"]["resourceVersion"], "uid": live["metadata"]["uid"]}
            manifest = manifest | {"metadata": manifest["metadata"] | version}
        try:
            return await self._cluster.apply(SECRET, manifest, is_first=live is None)
        except ApiError as error:
            if not error.is_refusal or error.is_namespace_ending:
                raise
            name = manifest["metadata"]["name"]
            if error.code == 403 and not error.is_quota:
                words = f"the operator may not write it; {_RIGHTS}"
            else:
                words = error.message if error.is_quota else f"the API server refuses it ({error.code} {error.reason})"
            raise _Refused(f"Secret {name}: {words}") from None

    # --- after the model's objects were applied ----------------------------------------------------------------------

    async def tidy(self, subject: Subject, document: Object, observed: Observed) -> Observed:
        """Take away what no pod uses any more: the login before, and access that the spec no longer asks for."""
        wanted = {(each.kind, each.backend) for each in desired.asked(subject) if each.backend is not None}
        left = homes_of(document) - wanted
        is_forced = subject.annotations.get(FORCE) == "true"
        if not is_forced and not is_settled(subject, observed, self._settings):
            return observed
        unreleased: list[str] = []
        for kind, name in sorted(wanted):
            if (words := await self._retire(subject, kind, name, is_forced=is_forced)) is not None:
                unreleased.append(words)
        for home in sorted(left):
            policy = subject.spec.bindings.deletion_policy if subject.spec.bindings else DeletionPolicy.RETAIN
            words = None if is_forced else await self._let_go(tenant_of(subject, home[0], is_last=True), home, policy)
            if words is not None:
                unreleased.append(words)
                continue
            if home[0] not in {kind for kind, _ in wanted}:
                await self._delete_secret(subject, home[0])
            current = self._store.model((subject.namespace, subject.name)) or document
            await self._write_record(current, homes_of(current) - {home})
            self._trials.pop(((subject.namespace, subject.name), home), None)
            await self._tell(subject, "Released", _released(home, policy, is_forced=is_forced))
        return replace(observed, unreleased=unreleased)

    async def _retire(self, subject: Subject, kind: str, name: str, *, is_forced: bool) -> str | None:
        """Take the login away that pods had before; return what is in the way."""
        place = ((subject.namespace, subject.name), (kind, name))
        live = self._retiring.get(place)
        if live is None:
            return None
        login, tenant = SecretMarks.read(live), tenant_of(subject, kind)

        async def drop(backend: Backend) -> None:
            await backend.drop_login(tenant, backend.username(tenant, login.retiring))

        try:
            if not is_forced:
                await self._pool.call(kind, name, drop)
            await self._write_secret(subject, kind, live, desired.values_of(live), replace(login, retiring=""))
            del self._retiring[place]
        except BackendError as error:
            return f"the login that {kind} had before is still there: {error.message}"
        except _Refused as error:
            return str(error)
        return None

    async def _delete_secret(self, subject: Subject, kind: str) -> None:
        live = await self._cluster.get(SECRET, subject.namespace, desired.secret_name(subject.name, kind))
        if live is not None and is_owned(subject, live):
            metadata = live["metadata"]
            await self._cluster.delete(SECRET, subject.namespace, metadata["name"], uid=metadata["uid"])

    # --- when the model is deleted -----------------------------------------------------------------------------------

    async def release(self, document: Object, subject: Subject | None) -> list[str]:
        """Take all access away, and data where the policy says so, then let the model go; return what is in the way.

        `subject` is None where the spec cannot be read: then all data stays.
        """
        metadata = document["metadata"]
        key = metadata["namespace"], metadata["name"]
        if FINALIZER not in metadata.get("finalizers", []):
            self.forget(key)
            return []
        homes = homes_of(document)
        if subject is not None:
            homes |= {(each.kind, each.backend) for each in desired.asked(subject) if each.backend is not None}
        bindings = subject.spec.bindings if subject else None
        policy = bindings.deletion_policy if bindings else DeletionPolicy.RETAIN
        is_forced = (metadata.get("annotations") or {}).get(FORCE) == "true"
        blocked: dict[Home, str] = {}
        if not is_forced:
            ordered = sorted(homes)
            tenants = [tenant_to_release(metadata, subject, kind) for kind, _ in ordered]
            answers = await _all(
                self._let_go(tenant, home, policy) for tenant, home in zip(tenants, ordered, strict=True)
            )
            blocked = {home: words for home, words in zip(ordered, answers, strict=True) if words is not None}
        if subject is not None:
            for home in sorted(homes - blocked.keys()):
                if home in homes_of(document) or is_forced:
                    await self._tell(subject, "Released", _released(home, policy, is_forced=is_forced))
        if not blocked or blocked.keys() != homes_of(document):
            await self._write_record(document, set(blocked))
        if not blocked:
            self.forget(key)
        return list(blocked.values())

    async def _let_go(self, tenant: Tenant, home: Home, policy: DeletionPolicy) -> str | None:
        """Take both logins away, and data where the policy says so; return what is in the way."""

        async def drop(backend: Backend) -> None:
            for slot in SLOTS:
                await backend.drop_login(tenant, backend.username(tenant, slot))
            if policy is DeletionPolicy.DELETE:
                await backend.drop_data(tenant)

        try:
            await self._pool.call(*home, drop)
        except BackendError as error:
            return f"access to {home[0]} backend {home[1]} is still there: {error.message}"
        return None

    async def _write_record(self, document: Object, homes: set[Home]) -> None:
        """Write down on the model what may be there; the finalizer stands exactly as long as there is something."""
        metadata = document["metadata"]
        finalizers = [name for name in metadata.get("finalizers", []) if name != FINALIZER]
        by_kind: dict[str, tuple[str, ...]] = {}
        for kind, name in sorted(homes):
            by_kind[kind] = (*by_kind.get(kind, ()), name)
        stored = await self._cluster.patch_metadata(
            PHOENIX_MODEL,
            metadata,
            finalizers=[*finalizers, FINALIZER] if homes else finalizers,
            annotations={RECORD: desired.as_text(by_kind) if homes else None},
        )
        if stored is None or ("deletionTimestamp" in stored["metadata"] and not stored["metadata"].get("finalizers")):
            return  # gone with its last finalizer
        self._store.put(PHOENIX_MODEL, stored)

    async def _tell(self, subject: Subject, reason: str, message: str) -> None:
        await self._recorder.record(subject, Happening("Normal", reason, message), datetime.now(UTC))


def _failed(each: Asked, error: BackendError) -> BindingSeen:
    return BindingSeen(each.kind, reason=error.reason, message=f"{each.field}: {error.message}")


def _content(backend: Backend, tenant: Tenant, login: SecretMarks, password: str) -> dict[str, str]:
    return backend.binding(tenant, Login(backend.username(tenant, login.slot), password))


def _password() -> str:
    return secrets.token_urlsafe(_PASSWORD_BYTES)


def _other(slot: str) -> str:
    return SLOTS[1] if slot == SLOTS[0] else SLOTS[0]


def _is_foreign(subject: Subject, body: Object | None) -> bool:
    """Whether a Secret of the name that we need is somebody else's. Raises `ApiError` while one of ours goes away."""
    if body is None or is_owned(subject, body):
        return False
    if is_of_predecessor(subject, body):
        raise ApiError(409, "Conflict", "a Secret of the deleted model is still going away")
    return True


def _released(home: Home, policy: DeletionPolicy, *, is_forced: bool) -> str:
    where = f"{home[0]} backend {home[1]}"
    if is_forced:
        return f"{where} was not asked, because {FORCE} says so: look there for what is left"
    data = "and data were taken away" if policy is DeletionPolicy.DELETE else "was taken away; data stays"
    return f"access to {where} {data}"


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """Await all, and only then raise what one of them raised: nothing goes on behind the caller's back."""
    answers = await asyncio.gather(*work, return_exceptions=True)
    found: list[T] = []
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        found.append(answer)
    return found
