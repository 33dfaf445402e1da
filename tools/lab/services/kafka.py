"""Kafka: one broker that is its own controller (KRaft), from the jars of Maven Central.

With logins: SCRAM-SHA-512 (and PLAIN, for admin alone) over TLS, mutual TLS on a port of its own, and rights by ACLs
that the metadata log keeps. The listeners that the broker speaks to itself on are on loopback and know only admin.
Topics are never made by being named.
"""

import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .. import LabError, machine
from ..state import HOME, only_one, say
from .service import Login, Service, write_secret

VERSION = "4.1.1"
_JARS = HOME / "bin" / f"kafka-{VERSION}"
_OLDEST_JAVA = 17
_POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>phoenix.lab</groupId>
  <artifactId>kafka</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>{VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId>
      <artifactId>slf4j-simple</artifactId>
      <version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
"""
_COMMON = """\
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller_port}
controller.listener.names=CONTROLLER
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
# a broker that was killed may come back as soon as its controller has forgotten it
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
# disk is taken as records come, and mapped memory as the index grows
log.index.size.max.bytes=1048576
num.network.threads=2
num.io.threads=4
num.recovery.threads.per.data.dir=1
log.cleaner.dedupe.buffer.size=16777216
"""
_PLAIN = """\
listeners=PLAINTEXT://{host}:{port},BROKER://127.0.0.1:{broker_port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{advertised_port},BROKER://127.0.0.1:{broker_port}
inter.broker.listener.name=BROKER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,BROKER:PLAINTEXT,PLAINTEXT:PLAINTEXT
"""
_SECURE = """\
listeners=SASL_SSL://{host}:{port},MUTUAL://{host}:{mutual_port},BROKER://127.0.0.1:{broker_port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=SASL_SSL://{host}:{advertised_port},MUTUAL://{host}:{mutual_port},BROKER://127.0.0.1:{broker_port}
inter.broker.listener.name=BROKER
listener.security.protocol.map=CONTROLLER:SASL_PLAINTEXT,BROKER:SASL_PLAINTEXT,SASL_SSL:SASL_SSL,MUTUAL:SSL
sasl.mechanism.inter.broker.protocol=PLAIN
sasl.mechanism.controller.protocol=PLAIN
sasl.enabled.mechanisms=PLAIN
listener.name.controller.plain.sasl.jaas.config={plain}
listener.name.broker.plain.sasl.jaas.config={plain}
listener.name.mutual.ssl.client.auth=required
ssl.principal.mapping.rules=RULE:^CN=([^,]+)$/$1/
listener.name.sasl_ssl.sasl.enabled.mechanisms={mechanisms}
listener.name.sasl_ssl.plain.sasl.jaas.config={plain}
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config={scram}
listener.name.sasl_ssl.oauthbearer.sasl.jaas.config={oauthbearer}
ssl.keystore.type=PEM
ssl.keystore.location={keystore}
ssl.truststore.type=PEM
ssl.truststore.location={truststore}
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:{username}
"""
_MODULE = "org.apache.kafka.common.security"
_STARTED = b"Kafka Server started"
_JVM = (
    # small and quick to start: the compiler's second tier pays off only in brokers that run for long
    *("-Xmx256m", "-Xms64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"),
    *("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.showDateTime=true"),
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX",
    "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaRaftServer=info",
)


class Kafka(Service):
    """A Kafka broker. Without TLS anybody may do everything; with it, `admin` is the super user.

    `takes_tokens`: with TLS, it takes OAUTHBEARER too, and believes any unsigned token (`alg: none`): who can make one
    is whoever it names. For tests of clients that bring tokens. `advertised_port`: where clients are told to find it,
    if not on `port`: a proxy before it sees all that they say, and not only their first question.
    """

    kind = "kafka"

    def __init__(
        self, folder: Path, *, takes_tokens: bool = False, advertised_port: int | None = None, **options: Any
    ) -> None:
        super().__init__(folder, **options)
        self.takes_tokens = takes_tokens
        self.advertised_port = advertised_port or self.port

    @classmethod
    def install(cls) -> None:
        """A Java that is new enough, and the jars."""
        _java()
        with only_one("kafka"):
            if not _JARS.exists():
                _fetch()

    @property
    def admin(self) -> Login:
        """The super user; without TLS nobody logs in."""
        return Login("admin", self._password())

    @property
    def bootstrap(self) -> str:
        """`host:port`."""
        return f"{self.host}:{self.port}"

    @property
    def mutual_tls_bootstrap(self) -> str:
        """`host:port` where a client certificate is the login (`client_certificate`); once started, with TLS only."""
        found = re.search(
            r"^listeners=.*MUTUAL://([^,]+)", (self.folder / "server.properties").read_text(), re.MULTILINE
        )
        assert found is not None
        return found[1]

    def _binding(self) -> dict[str, str]:
        # PLAIN's password stands in the configuration. A broker of 4.1.1 that is started again may have forgotten every
        # SCRAM user, if one was removed before (ScramDelta.apply drops the map that it goes on to fill), and an admin
        # must still get in then, to make them again.
        sasl = {"sasl-mechanism": "PLAIN"} if self.is_secure else {}
        protocol = "SASL_SSL" if self.is_secure else "PLAINTEXT"
        return {"bootstrap-servers": self.bootstrap, "security-protocol": protocol, **sasl}

    def _prepare(self) -> None:
        values = {
            "host": self.host,
            "port": self.port,
            "advertised_port": self.advertised_port,
            "broker_port": machine.free_port("127.0.0.1"),
            "controller_port": machine.free_port("127.0.0.1"),
            "data": self.folder / "data",
        }
        text = _COMMON
        users = []
        if self.is_secure:
            text += _SECURE
            admin = self.admin
            login = f'username="{admin.username}" password="{admin.password}"'
            server, key = (self._pki / f"server.{kind}" for kind in ("crt", "key"))
            write_secret(self._pki / "server.pem", key.read_text() + server.read_text())
            values |= {
                "username": admin.username,
                "mutual_port": machine.free_port(self.host),
                "mechanisms": "SCRAM-SHA-512,PLAIN" + (",OAUTHBEARER" if self.takes_tokens else ""),
                "oauthbearer": f"{_MODULE}.oauthbearer.OAuthBearerLoginModule required;",
                "plain": f'{_MODULE}.plain.PlainLoginModule required {login} user_{admin.username}="{admin.password}";',
                "scram": f"{_MODULE}.scram.ScramLoginModule required;",
                "keystore": self._pki / "server.pem",
                "truststore": self._pki / "ca.crt",
            }
            users = ["--add-scram", f"SCRAM-SHA-512=[name={admin.username},password={admin.password}]"]
        else:
            text += _PLAIN
        write_secret(self.folder / "server.properties", text.format(**values))
        cluster = secrets.token_urlsafe(16).replace("-", "a")  # StorageTool takes a leading dash for an option
        self._format("--standalone", "--cluster-id", cluster, *users)

    def _format(self, *arguments: str) -> None:
        config = ("--config", self.folder / "server.properties")
        command = [*_jvm(), "kafka.tools.StorageTool", "format", *config, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        if done.returncode:
            raise LabError(f"Kafka's storage cannot be formatted:\n{done.stdout.strip()}\n{done.stderr.strip()}")

    def _before_start(self) -> None:
        self._log_begins = self.log.stat().st_size if self.log.exists() else 0

    def _command(self) -> Sequence[str | Path]:
        return [*_jvm(), "kafka.Kafka", self.folder / "server.properties"]

    def _is_ready(self) -> bool:
        # it accepts connections before it is a member of its own cluster; only its log tells when it is done
        with self.log.open("rb") as log:
            log.seek(self._log_begins)
            return _STARTED in log.read()


def _jvm() -> list[str | Path]:
    return [_java(), *_JVM, "-cp", f"{_JARS}/*"]


@cache
def _java() -> str:
    """A Java that Kafka runs on; Debian's where there is none."""
    for is_last in (False, True):
        for java in _javas():
            if _version(java) >= _OLDEST_JAVA:
                return java
        if not is_last:
            machine.install([f"openjdk-{_OLDEST_JAVA}-jre-headless"])
    raise LabError(f"Kafka {VERSION} needs Java {_OLDEST_JAVA} or newer")


def _javas() -> Iterator[str]:
    if home := os.environ.get("JAVA_HOME"):
        yield f"{home}/bin/java"
    if on_path := shutil.which("java"):
        yield on_path
    yield from map(str, sorted(Path("/usr/lib/jvm").glob("*/bin/java")))


def _version(java: str) -> int:
    try:
        said = subprocess.run([java, "-version"], capture_output=True, text=True).stderr
    except OSError:
        return 0
    found = re.search(r'version "(\d+)', said)
    return int(found[1]) if found else 0


def _fetch() -> None:
    """Ask Maven for the jars, completely or not at all."""
    if not shutil.which("mvn"):
        machine.install(["maven"])
    draft = _JARS.with_name(f".{_JARS.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    (draft / "pom.xml").write_text(_POM)
    say(f"downloading Kafka {VERSION} from Maven Central (46 files, 43 MB), once …")
    begun = time.monotonic()
    goal = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
    command = ["mvn", "--batch-mode", "--quiet", "--file", str(draft / "pom.xml"), goal, f"-DoutputDirectory={draft}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if done.returncode:
        raise LabError(f"Maven cannot fetch Kafka {VERSION}:\n{(done.stdout + done.stderr).strip()}")
    draft.replace(_JARS)
    say(f"  downloaded in {time.monotonic() - begun:.0f} s")
