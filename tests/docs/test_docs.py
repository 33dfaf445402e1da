"""What the documentation says is run: commands, answers, links, settings."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import phoenix_process
import pytest
from phoenix_process import Running

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*/README.md"))]
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/*.md", "tools/**/*.md", "helm/**/*.md")
    for page in sorted(ROOT.glob(pattern))
]
# What the fixture does in their place.
SET_UP = re.compile(r"(\.venv/bin/)?phoenix-server serve|pip install|export ")
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    import importlib.util

    magika = importlib.util.find_spec("magika")
    assert magika is not None
    assert magika.origin is not None
    with phoenix_process.start(
        [ROOT / "examples"], {"PHOENIX_MODEL_STORE": str(Path(magika.origin).parent / "models")}
    ) as running:
        yield running


def steps(page: Path) -> list[tuple[str, str]]:
    """Return (command, expected output) for each `$ ` line of the page's console blocks.

    The expected output is what follows the command in its block, or the JSON block after it.
    """
    found: list[tuple[str, str]] = []
    for language, text in BLOCK.findall(page.read_text()):
        if language == "console":
            for line in text.splitlines():
                if line.startswith("$ "):
                    found.append((line[2:], ""))
                else:
                    command, expected = found[-1]
                    found[-1] = (command, f"{expected}{line}\n")
        elif language == "json" and found and not found[-1][1]:
            found[-1] = (found[-1][0], text)
    return found


def close(got: Any, expected: Any) -> bool:
    """Whether two JSON values are equal, floats up to the last bits that depend on the processor."""
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(close(got[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(close, got, expected))
    return bool(got == pytest.approx(expected, rel=1e-3, abs=1e-6)) if isinstance(expected, float) else got == expected


COMMANDS = [(page, *step) for page in READMES for step in steps(page) if not SET_UP.match(step[0])]


@pytest.mark.parametrize(
    ("page", "command", "expected"),
    COMMANDS,
    ids=[f"{page.parent.name}:{command[:40]}" for page, command, _ in COMMANDS],
)
def test_command_prints_what_the_page_says(server: Running, page: Path, command: str, expected: str) -> None:
    address = server.rest_url.removeprefix("http://")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", re.sub(r"(localhost|127\.0\.0\.1):8000", address, command)],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if not expected:
        return
    try:
        answer = json.loads(expected)
    except json.JSONDecodeError:
        assert done.stdout == expected
    else:
        got = json.loads(done.stdout)
        assert got.pop("id")
        got.pop("parameters", None)  # what differs from one moment to the next, as the age of features does
        assert close(got, answer), got


def test_pages_have_commands_to_run() -> None:
    assert {page for page, *_ in COMMANDS} == set(READMES)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^( *)```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = page.parent / file if file else page
        assert place.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(place), f"{page}: {target}"


def test_make_prints_every_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text()
    targets = [name for line in re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE) for name in shlex.split(line)]
    assert len(targets) > 10
    for target in targets:
        assert f"m{target} " in listed, target


def test_operator_is_no_package() -> None:
    """`operator/__init__.py` would hide the standard library's module from an interpreter started in the root."""
    assert not (ROOT / "operator" / "__init__.py").exists()
    done = subprocess.run([sys.executable, "-c", "import re, operator; operator.add"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_make_run_serves_and_ends_cleanly(tmp_path: Path) -> None:
    """The environment is there already, so nothing is fetched: `make run` works without a network."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PHOENIX_")}
    environment |= {
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_HTTP_PORT": "0",
        "PHOENIX_GRPC_PORT": "0",
        "PHOENIX_STATE_DIR": str(tmp_path),
        "UV_OFFLINE": "1",
    }
    with subprocess.Popen(
        ["make", "run"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        deadline = time.monotonic() + 60
        for line in process.stderr:
            assert time.monotonic() < deadline
            if '"ready"' in line:
                ready = json.loads(line)
                break
        else:
            pytest.fail(f"make run ended with {process.wait()}")
        body = (ROOT / "examples" / "iris" / "request.json").read_bytes()
        command = ["curl", "-sf", f"{ready['rest']}/v2/models/iris/infer", "-d", body]
        answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert answer["outputs"][0]["data"] == [0, 1, 2]
        assert sorted(ready["models"]) == ["digits/1", "filetype/1", "fraud/1", "iris/1", "text/1"]
        os.killpg(process.pid, 2)  # Ctrl-C reaches the whole foreground group
        rest = process.stderr.read()
        assert '"stopped"' in rest
        assert "Traceback" not in rest
        process.wait(30)
