"""Builds the container images of this checkout, with Docker, also on a bare Debian that reaches no image registry.

    images.py              build what is not up to date; print each image's name
    images.py server       the same for one of them
    images.py down         stop the Docker engine, if this program started it

An image carries a digest of everything it was built from; while that is unchanged, nothing is built. Where no engine
runs, root on Debian gets one (`docker.io`), with its data, log and process id under the cache folder. Where the base
image cannot be pulled, one that serves as well is made of Debian packages. Needs the standard library only.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCKERFILES = {"server": "inference_server/Dockerfile", "operator": "operator/Dockerfile"}
DEFAULT_BASE = "python:3.13-slim-bookworm"
LOCAL_BASE = "phoenix-ml/base:bookworm"
SOURCES_LABEL = "io.phoenix-ml.sources"
BUILD_LABEL = "io.phoenix-ml.build"
STATE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phoenix/docker"
PID_FILE = STATE / "dockerd.pid"
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
# What the build stage needs to know of this machine; passed by name, so that no value shows in a process list.
INDEX_SETTINGS = (
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT",
    "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INSECURE_HOST", "UV_HTTP_TIMEOUT",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
PULL_DEADLINE_S = 120
ENGINE_DEADLINE_S = 60


class ImagesError(Exception):
    """What went wrong and what to do about it, for a person."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def version() -> str:
    """Return the project's version, which is the images' tag."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def image_name(name: str) -> str:
    return f"phoenix-ml/phoenix-{name}:{version()}"


# --- the engine ------------------------------------------------------------------------------------------------------


def ensure_engine() -> None:
    """Return when a Docker engine answers; start one if this machine allows it. Raises `ImagesError`."""
    if engine_answers():
        return
    is_debian = Path("/etc/debian_version").exists() and shutil.which("apt-get") is not None
    if os.geteuid() != 0 or os.environ.get("DOCKER_HOST") or not (shutil.which("dockerd") or is_debian):
        raise ImagesError(
            "no Docker engine answers: `docker version` tells why. Start one, or run this as root on Debian or Ubuntu "
            "without DOCKER_HOST, and it is installed and started"
        )
    if not shutil.which("dockerd"):
        install("docker.io")
    if Path("/run/systemd/system").is_dir():
        run(["systemctl", "start", "docker"])
        if wait_until(engine_answers, ENGINE_DEADLINE_S):
            return
    if not start_engine():
        say("trying without iptables: images build, but containers reach nothing outside and publish no ports")
        if not start_engine("--iptables=false"):
            raise ImagesError(f"dockerd does not come up; see {STATE}/dockerd.log")
    if engine("info", "--format", "{{.Driver}}") == "vfs" and not shutil.which("fuse-overlayfs") and is_debian:
        say("overlay2 does not work here and vfs copies every layer whole: using fuse-overlayfs")
        stop_engine()
        install("fuse-overlayfs")
        if not start_engine("--storage-driver=fuse-overlayfs") and not start_engine():
            raise ImagesError(f"dockerd does not come up again; see {STATE}/dockerd.log")


def start_engine(*options: str) -> bool:
    """Start dockerd apart from this process and say whether it came to answer."""
    say(f"starting dockerd{''.join(f' {option}' for option in options)}; its data and log are in {STATE}")
    STATE.mkdir(parents=True, exist_ok=True)
    if engine_pid() is None:
        PID_FILE.unlink(missing_ok=True)  # of an earlier boot: dockerd refuses to start while any process has that id
    with (STATE / "dockerd.log").open("w") as log:
        process = subprocess.Popen(
            ["dockerd", "--data-root", STATE / "data", "--pidfile", PID_FILE, *options],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    wait_until(lambda: engine_answers() or process.poll() is not None, ENGINE_DEADLINE_S)
    if process.poll() is None and engine_answers():
        return True
    say("dockerd did not come up:\n" + tail(STATE / "dockerd.log", 5))
    process.terminate()
    process.wait(ENGINE_DEADLINE_S)
    return False


def stop_engine() -> bool:
    """Stop the dockerd that this program started; say whether there was one. Raises `ImagesError`."""
    pid = engine_pid()
    if pid is None:
        return False
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        if not select.select([handle], [], [], ENGINE_DEADLINE_S)[0]:
            raise ImagesError(f"dockerd (process {pid}) does not end; see {STATE}/dockerd.log")
    finally:
        os.close(handle)
    return True


def engine_pid() -> int | None:
    """Return the recorded process id, if that process is still a dockerd."""
    with suppress(OSError, ValueError):
        pid = int(PID_FILE.read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() == "dockerd":
            return pid
    return None


def engine_answers() -> bool:
    try:
        return bool(engine("version", "--format", "{{.Server.Version}}"))
    except (OSError, subprocess.SubprocessError):
        return False


def engine(*arguments: str) -> str:
    """Run a short docker command and return what it printed. Raises `subprocess.SubprocessError`."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def install(*packages: str) -> None:
    say(f"installing {' '.join(packages)} (Debian packages)")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "-qq"], environment)
    run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], environment)


# --- the base --------------------------------------------------------------------------------------------------------


def choose_base() -> str:
    """Return the base to build on: the default where it is at hand, else one that this machine can have."""
    if labels(DEFAULT_BASE) is not None:
        return DEFAULT_BASE
    if labels(LOCAL_BASE) is None:
        say(f"pulling {DEFAULT_BASE}")
        try:
            subprocess.run(["docker", "pull", "--quiet", DEFAULT_BASE], check=True, timeout=PULL_DEADLINE_S,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
            return DEFAULT_BASE
        except subprocess.CalledProcessError as error:
            say(f"it cannot be pulled: {error.stderr.strip()}")
        except subprocess.TimeoutExpired:
            say(f"it did not come within {PULL_DEADLINE_S} s")
        make_local_base()
    return LOCAL_BASE


def make_local_base() -> None:
    """Make a small Debian with Python, and this machine's trusted certificates, and give it to the engine."""
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        raise ImagesError("making a base image takes root on Debian or Ubuntu; else name one with --base IMAGE")
    if not shutil.which("debootstrap"):
        install("debootstrap")
    say(f"making {LOCAL_BASE} with debootstrap (a minute, once)")
    started = time.monotonic()
    STATE.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="base-", dir=STATE))
    try:
        packages = "ca-certificates,python3,python3-venv"
        run(["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(folder)])
        for waste in ("cache/apt/archives", "lib/apt/lists"):
            shutil.rmtree(folder / "var" / waste)
        for waste in ("man", "info", "locale"):
            shutil.rmtree(folder / "usr/share" / waste, ignore_errors=True)
        for path in (folder / "usr/share/doc").rglob("*"):
            if path.is_file() and path.name != "copyright":  # the licences have to stay
                path.unlink()
        if Path(CA_BUNDLE).exists():
            shutil.copyfile(CA_BUNDLE, folder / CA_BUNDLE.lstrip("/"))
        archive = subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE)
        run(["docker", "import", "--change", "ENV LANG=C.UTF-8", "-", LOCAL_BASE], stdin=archive)
    finally:
        shutil.rmtree(folder)
    say(f"made {LOCAL_BASE} in {time.monotonic() - started:.0f} s")


# --- the images ------------------------------------------------------------------------------------------------------


def build_all(names: Sequence[str], base: str | None) -> None:
    """Build images, one after the other, and print their names. Raises `ImagesError`."""
    ensure_engine()
    base = base or choose_base()
    if base == LOCAL_BASE and labels(LOCAL_BASE) is None:
        make_local_base()
    for name in names:
        build(name, base)
        print(image_name(name), flush=True)


def build(name: str, base: str) -> None:
    """Build one image unless what it would be made of is what it was made of."""
    dockerfile = ROOT / DOCKERFILES[name]
    arguments = {"BASE": base, "VERSION": version()}
    sources = digest_of(dockerfile, arguments)
    found = labels(image_name(name))
    if found is not None and found.get(SOURCES_LABEL) == sources:
        say(f"{image_name(name)} is up to date")
        return
    say(f"building {image_name(name)} on {base}")
    started = time.monotonic()
    environment = machine_settings(base)
    before = {engine("image", "inspect", "--format", "{{.Id}}", image_name(name))} if found is not None else set()
    stages = build_stages(name)
    command = ["docker", "build", "--network=host", "--force-rm", "--file", str(dockerfile), "--tag", image_name(name)]
    command += ["--label", f"{SOURCES_LABEL}={sources}"]
    command += [f"--build-arg={key}={value}" for key, value in arguments.items()]
    command += [f"--build-arg={key}" for key in environment]
    log = STATE / f"build-{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [*command, str(ROOT)], env={**os.environ, **environment, "BUILDKIT_PROGRESS": "plain"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with log.open("w") as file:
        for line in process.stdout:
            file.write(line)
            if step := re.match(r"Step \d+/\d+ : (?:FROM|RUN|COPY) .*|#\d+ \[[^]]*\d+/\d+\] .*", line):
                say(f"  {time.monotonic() - started:4.0f} s  {step[0][:110]}")
    if process.wait() != 0:
        raise ImagesError(f"{image_name(name)} does not build:\n{tail(log, 30)}\nthe whole log is {log}")
    # What was replaced; a build stage that was not made anew is the cache of the next build.
    for image in before | (stages if build_stages(name) - stages else set()):
        with suppress(subprocess.CalledProcessError):  # still tagged, or in use
            engine("image", "rm", image)
    size_mb = int(engine("image", "inspect", "--format", "{{.Size}}", image_name(name))) / 1e6
    say(f"built {image_name(name)}: {size_mb:.0f} MB, in {time.monotonic() - started:.0f} s")


def build_stages(name: str) -> set[str]:
    """Return what the legacy builder keeps of an image's build stages; BuildKit has a cache of its own."""
    return set(
        engine("image", "ls", "--no-trunc", "--quiet", "--filter=dangling=true", f"--filter=label={BUILD_LABEL}={name}")
        .split()
    )  # fmt: skip


def digest_of(dockerfile: Path, arguments: Mapping[str, str]) -> str:
    """Return the SHA-256 of all that goes into an image: its Dockerfile, the arguments, every file that it copies."""
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode())
    for path in [dockerfile, ROOT / ".dockerignore", *copied_files(dockerfile)]:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_mode & 0o111:o}\0{content}\n".encode())
    return digest.hexdigest()


def copied_files(dockerfile: Path) -> Iterator[Path]:
    """Yield the files of this checkout that a Dockerfile copies, each folder's in order."""
    for line in dockerfile.read_text().splitlines():
        words = line.split()
        if words[:1] != ["COPY"] or words[1].startswith("--from="):
            continue
        for source in [word for word in words[1:-1] if not word.startswith("--")]:
            path = ROOT / source
            yield from (
                [path]
                if path.is_file()
                else sorted(file for file in path.rglob("*") if file.is_file() and file.parent.name != "__pycache__")
            )


def machine_settings(base: str) -> dict[str, str]:
    """Return how this machine reaches package indexes, as variables for the build stage."""
    settings = {name: os.environ[name] for name in INDEX_SETTINGS if os.environ.get(name)}
    if "PIP_INDEX_URL" not in settings and (index := configured("index-url")):
        settings["PIP_INDEX_URL"] = index
    if base == LOCAL_BASE and Path(CA_BUNDLE).exists():  # the bundle was put there
        settings |= {"PIP_CERT": CA_BUNDLE, "SSL_CERT_FILE": CA_BUNDLE}
    return settings


def configured(key: str) -> str:
    """Return what pip's configuration files say, or nothing."""
    for section in ("global", "install"):
        done = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", f"{section}.{key}"], capture_output=True, text=True
        )
        if done.returncode == 0:
            return done.stdout.strip()
    return ""


def labels(image: str) -> dict[str, str] | None:
    """Return the labels of an image that the engine has, else None."""
    try:
        return json.loads(engine("image", "inspect", "--format", "{{json .Config.Labels}}", image)) or {}
    except subprocess.CalledProcessError:
        return None


# --- processes -------------------------------------------------------------------------------------------------------


def run(
    command: Sequence[str], environment: Mapping[str, str] | None = None, stdin: subprocess.Popen[bytes] | None = None
) -> None:
    """Run a command, `stdin` piped into it; its output is kept for the message if it fails. Raises `ImagesError`."""
    with tempfile.TemporaryFile("w+") as output:
        source = stdin.stdout if stdin else subprocess.DEVNULL
        code = subprocess.run(command, env=environment, stdin=source, stdout=output, stderr=output).returncode
        if stdin and stdin.wait() != 0:
            code = code or stdin.returncode
        if code != 0:
            output.seek(0)
            text = "".join(output.readlines()[-20:])
            raise ImagesError(f"`{' '.join(command)}` ended with {code}:\n{text}")


@contextmanager
def alone() -> Iterator[None]:
    """Keep other runs of this program waiting: they will find done what they came for."""
    STATE.mkdir(parents=True, exist_ok=True)
    with (STATE / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another run of images.py")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wait_until(condition: Callable[[], bool], deadline_s: float) -> bool:
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def tail(path: Path, lines: int) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def main() -> int:
    """Build, or stop the engine; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="IMAGE", help=f"{', '.join(DOCKERFILES)} (default: all), or: down")
    parser.add_argument("--base", help=f"base image (default: {DEFAULT_BASE} where it can be had, else {LOCAL_BASE})")
    options = parser.parse_args()
    if unknown := set(options.what) - {*DOCKERFILES, "down"}:
        parser.error(f"no such image: {', '.join(sorted(unknown))}; known: {', '.join(DOCKERFILES)}")
    try:
        with alone():
            if "down" in options.what:
                say("dockerd stopped" if stop_engine() else "no dockerd of ours runs")
            else:
                build_all(options.what or list(DOCKERFILES), options.base)
    except (ImagesError, OSError, subprocess.SubprocessError) as error:
        say(f"images.py: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
