"""A backend in memory: it keeps homes and logins as the real ones do, and can be down."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from phoenix_api import Reason
from phoenix_operator.backends import SLOTS, BackendError, Login, Tenant
from phoenix_operator.settings import BackendSettings


@dataclass
class Service:
    """What runs somewhere: it outlives the operator and each of its connections."""

    kind: str
    is_up: bool = True
    refuses: Reason | None = None
    logins: dict[str, str] = field(default_factory=dict)
    homes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by model: its topics
    calls: list[str] = field(default_factory=list)
    changes: int = 0
    before: Callable[[str], None] = lambda what: None  # told of each call

    def works(self, values: Mapping[str, str]) -> bool:
        """Return whether these keys of a binding let somebody in."""
        return self.is_up and self.logins.get(values["username"]) == values["password"]


class MemoryBackend:
    """The operator's way to a service."""

    def __init__(self, service: Service, config: BackendSettings, admin: Mapping[str, str]) -> None:
        self.service, self.config, self.admin, self.kind = service, config, admin, service.kind
        self.is_closed = False

    def username(self, tenant: Tenant, slot: str) -> str:
        return f"phx.{tenant.namespace}.{tenant.name}.{slot}"

    def binding(self, tenant: Tenant, login: Login) -> dict[str, str]:
        if not self.config.capabilities.manage_users:
            login = Login("admin", self.admin["password"])
        port = self.admin.get("port", "7001")
        address = {"uri": f"{self.kind}://{login.username}:{login.password}@{self.admin['host']}:{port}/0"}
        if self.kind == "kafka":
            address = {"bootstrap-servers": f"{self.admin['host']}:{port}"}
        return {
            "type": self.kind,
            "provider": "phoenix",
            "username": login.username,
            "password": login.password,
        } | address

    async def ensure(self, tenant: Tenant, login: Login) -> None:
        self._ask("ensure", login.username)
        home = tuple(topic.name for topic in tenant.topics)
        if self.service.homes.get(tenant.name) != home:
            self.service.homes[tenant.name] = home
            self.service.changes += 1
        if self.config.capabilities.manage_users and self.service.logins.get(login.username) != login.password:
            self.service.logins[login.username] = login.password
            self.service.changes += 1

    async def drop_login(self, tenant: Tenant, username: str) -> None:
        self._ask("drop_login", username)
        self.service.logins.pop(username, None)

    async def drop_data(self, tenant: Tenant) -> None:
        self._ask("drop_data", tenant.name)
        for slot in SLOTS:
            self.service.logins.pop(self.username(tenant, slot), None)
        self.service.homes.pop(tenant.name, None)

    async def close(self) -> None:
        self.is_closed = True

    def _ask(self, what: str, about: str) -> None:
        assert not self.is_closed
        self.service.before(f"{what} {about}")
        self.service.calls.append(f"{what} {about}")
        if not self.service.is_up:
            raise BackendError(
                Reason.BACKEND_UNREACHABLE, f"{self.kind} {self.config.name} at {self.admin['host']} is down"
            )
        if self.service.refuses is not None:
            raise BackendError(self.service.refuses, f"{self.kind} {self.config.name} refuses")
