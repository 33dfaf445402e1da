"""Ask the filetype model about files, with the standard library alone.

    python request.py FILE...      print an inference request with one row per file
    python request.py --answer     read the server's answer on stdin and print a name and a score per file

`features` follows magika 1.0.3 (`Magika._extract_features_from_seekable`). `--answer` takes the names of the types from
the installed package. The package adds rules on top of the model, such as a threshold per type; this script does not.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

BLOCK = 4096  # bytes read at either end
SIZE = 1024  # bytes of each block that the model sees
PADDING = 256  # a value that no byte has
FEWEST = 8  # the model was not trained on anything shorter


def features(path: Path) -> list[int]:
    """The 2,048 integers that stand for a file: its first and last 1,024 bytes without the white space around it."""
    with path.open("rb") as file:
        first = file.read(BLOCK).lstrip()[:SIZE]
        file.seek(max(0, path.stat().st_size - BLOCK))
        last = file.read(BLOCK).rstrip()[-SIZE:]
    if len(first) < FEWEST:
        raise ValueError(f"{path}: the model needs at least {FEWEST} bytes after leading white space")
    return [*first, *[PADDING] * (SIZE - len(first)), *[PADDING] * (SIZE - len(last)), *last]


def request(paths: list[Path]) -> dict[str, object]:
    data = [value for path in paths for value in features(path)]
    return {"inputs": [{"name": "bytes", "shape": [len(paths), 2 * SIZE], "datatype": "INT32", "data": data}]}


def answers(response: dict[str, list[dict[str, list[float]]]]) -> list[tuple[str, float]]:
    """The likeliest type and its score, one for each row."""
    spec = importlib.util.find_spec("magika")
    if spec is None or spec.origin is None:
        raise SystemExit("the names of the types come with the package: pip install magika==1.0.3")
    config = Path(spec.origin).parent / "models/standard_v3_3/config.min.json"
    names = json.loads(config.read_text())["target_labels_space"]
    scores = response["outputs"][0]["data"]
    rows = [scores[start : start + len(names)] for start in range(0, len(scores), len(names))]
    return [(names[row.index(max(row))], max(row)) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the filetype model about files.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--answer", action="store_true", help="read the server's answer on stdin")
    arguments = parser.parse_args()
    if arguments.answer:
        for name, score in answers(json.load(sys.stdin)):
            print(f"{name} {score:.2f}")
    elif arguments.files:
        print(json.dumps(request(arguments.files)))
    else:
        parser.error("name at least one file")


if __name__ == "__main__":
    main()
