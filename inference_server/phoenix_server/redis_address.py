"""Where a Redis is and how to log in, read from one URL. Its password is in no text that this module makes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit

DEFAULT_PORT = 6379
_SHAPE = "expected redis://[[user]:password@]host[:port][/database], or rediss:// for TLS"


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A Redis server or the endpoint of a managed one. An empty `username` is Redis' own `default`."""

    host: str
    port: int = DEFAULT_PORT
    username: str = ""
    password: str = field(default="", repr=False)
    database: int = 0
    is_tls: bool = False

    def __str__(self) -> str:
        """Return the address without the login."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.is_tls else 'redis'}://{host}:{self.port}/{self.database}"

    def without_password(self, text: str) -> str:
        """Return what a server said without the password, which some servers quote when they refuse it."""
        return text.replace(self.password, "***") if self.password else text


def parse_redis_url(url: str) -> RedisAddress:
    """Return the address in a URL; raise `ValueError`, which never quotes the URL, for any other text."""
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORT
    except ValueError:
        raise ValueError(f"{_SHAPE}; the host or the port is wrong") from None
    if parts.scheme not in ("redis", "rediss"):
        raise ValueError(f"{_SHAPE}; the scheme is another")
    if not parts.hostname:
        raise ValueError(f"{_SHAPE}; the host is missing (a password with /, @, : or # has to be percent-encoded)")
    if parts.query or parts.fragment:
        raise ValueError(f"{_SHAPE}, and nothing behind (a password with # or ? has to be percent-encoded)")
    database = parts.path.strip("/") or "0"
    if not database.isdecimal() or len(database) > 4:
        raise ValueError(f"{_SHAPE}; the database has to be a number")
    username, password = unquote(parts.username or ""), unquote(parts.password or "")
    if username and not password:
        raise ValueError(f"{_SHAPE}; the user has no password")
    return RedisAddress(parts.hostname, port, username, password, int(database), is_tls=parts.scheme == "rediss")


def redis_url_of(binding: Mapping[str, str]) -> str | None:
    """Return the URL of a Service Binding that has none of its own, from `host` and what else is there."""
    host = binding.get("host")
    if not host:
        return None
    scheme = "rediss" if binding.get("ssl", "").lower() in ("true", "1", "yes") else "redis"
    login = ""
    if password := binding.get("password"):
        login = f"{quote(binding.get('username', ''), safe='')}:{quote(password, safe='')}@"
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{login}{host}:{binding.get('port') or DEFAULT_PORT}/{binding.get('database') or 0}"
