"""`python -m phoenix_api crd|schema|reference`: prints, writes or checks a generated file."""

import argparse
import difflib
import sys
from pathlib import Path

from phoenix_api import crd, reference, schema

_RENDER = {"crd": crd.render, "schema": schema.render, "reference": reference.render}


def main(arguments: list[str] | None = None) -> int:
    """Print the text, write it with `--output`, or compare it with `--check`; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m phoenix_api", description="Render what is generated from the API.")
    parser.add_argument("what", choices=sorted(_RENDER))
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output", type=Path, metavar="FILE", help="write FILE instead of printing")
    place.add_argument("--check", type=Path, metavar="FILE", help="exit 1 and show the difference if FILE is stale")
    asked = parser.parse_args(arguments)
    text = _RENDER[asked.what]()
    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(text, encoding="utf-8")
    elif asked.check:
        return _check(asked.check, text, asked.what)
    else:
        sys.stdout.write(text)
    return 0


def _check(file: Path, text: str, what: str) -> int:
    old = file.read_text(encoding="utf-8") if file.exists() else ""
    if old == text:
        return 0
    diff = difflib.unified_diff(old.splitlines(), text.splitlines(), str(file), "generated", lineterm="", n=1)
    print(f"{file} is stale: run `python -m phoenix_api {what} --output {file}`", file=sys.stderr)
    print("\n".join(list(diff)[:20]), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
