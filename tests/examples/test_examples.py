"""The example models: reproducible, what their READMEs say, and blind to who shares a batch."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
OURS = ["iris", "digits", "text", "fraud"]
NUMPY = {"FP32": np.float32, "INT32": np.int32, "INT64": np.int64, "BYTES": np.object_}
ONNX = {"tensor(float)": "FP32", "tensor(int32)": "INT32", "tensor(int64)": "INT64", "tensor(string)": "BYTES"}
BATCH_SIZES = [1, 2, 3, 5, 8, 13, 32]

Array = npt.NDArray[Any]
RealRows = Callable[[str], tuple[dict[str, Array], Array, Array]]


def model_store() -> Path:
    # The package is looked up, not imported: the model is a file, and importing magika loads much else.
    spec = importlib.util.find_spec("magika")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "models"


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((EXAMPLES / name / "model.yaml").read_text())
    return loaded


def model_path(name: str) -> Path:
    uri = manifest(name)["spec"]["model"]["uri"]
    return (model_store() if name == "filetype" else EXAMPLES) / uri


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def request_of(name: str) -> dict[str, Array]:
    """The inputs of the example's request, completed with features from the table beside the manifest."""
    inputs = tensors(name, "request.json", "inputs")
    features = manifest(name)["spec"].get("features")
    if features:
        parameters = json.loads((EXAMPLES / name / "request.json").read_text())["parameters"]
        with (EXAMPLES / name / "features.csv").open(newline="") as file:
            table = {row[features["entityParameter"]]: row for row in csv.DictReader(file)}
        rows = [table[entity] for entity in json.loads(parameters[features["entityParameter"]])]
        inputs[features["input"]] = np.array([[row[field] for field in features["names"]] for row in rows], np.float32)
    return inputs


def tensors(name: str, file: str, side: str) -> dict[str, Array]:
    message = json.loads((EXAMPLES / name / file).read_text(encoding="utf-8"))
    return {t["name"]: np.array(t["data"], NUMPY[t["datatype"]]).reshape(t["shape"]) for t in message[side]}


def run(model: ort.InferenceSession, inputs: dict[str, Array]) -> dict[str, Array]:
    return dict(zip([o.name for o in model.get_outputs()], model.run(None, inputs), strict=True))


def same_bits(a: Array, b: Array) -> bool:
    if a.dtype == object:
        return a.tolist() == b.tolist()
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "build.py"))


@pytest.fixture(scope="module")
def real_rows(build: dict[str, Any]) -> RealRows:
    """Inputs, expected labels and which rows are held out, of an example's data set."""

    def rows(name: str) -> tuple[dict[str, Array], Array, Array]:
        if name == "text":
            texts, classes, names, held_out = build["messages"]()
            return {"text": np.array(texts, dtype=object)}, np.array(names, dtype=object)[classes], held_out
        x, classes, held_out = build[f"{name}_rows"]()
        x = x.astype(np.float32)
        inputs = {"fraud": {"payment": x[:, :2], "features": x[:, 2:]}, "iris": {"x": x}, "digits": {"image": x}}
        return inputs[name], classes, held_out

    return rows


@pytest.mark.parametrize("blas", [{}, {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"}])
def test_build_makes_the_committed_files_whatever_the_cpu(
    blas: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in blas.items():
        monkeypatch.setenv(key, value)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "build.py", "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_build_check_fails_on_a_changed_file(
    build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = build["main"]
    changed = tmp_path / "iris/model.onnx"
    changed.parent.mkdir()
    changed.write_bytes(b"other")
    monkeypatch.setitem(main.__globals__, "HERE", tmp_path)
    monkeypatch.setitem(main.__globals__, "files", lambda: {changed: b"made"})
    monkeypatch.setattr(sys, "argv", ["build.py", "--check"])
    assert main() == 1
    assert "differs" in capsys.readouterr().out
    assert changed.read_bytes() == b"other"


@pytest.mark.parametrize("name", [*OURS, "filetype"])
def test_manifest_states_the_digest_of_the_model(name: str) -> None:
    text = (EXAMPLES / name / "model.yaml").read_text()
    loaded = manifest(name)
    assert text.startswith("# yaml-language-server: $schema=../../crds/phoenixmodel.schema.json\n")
    assert (loaded["apiVersion"], loaded["kind"]) == ("phoenix-ml.io/v1alpha1", "PhoenixModel")
    assert loaded["metadata"] == {"name": name}
    assert loaded["spec"]["model"]["sha256"] == hashlib.sha256(model_path(name).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", OURS)
def test_committed_model_is_small(name: str) -> None:
    assert model_path(name).stat().st_size < 200_000


@pytest.mark.parametrize("name", [*OURS, "filetype"])
def test_signature_is_the_one_in_the_index(name: str) -> None:
    model = session(model_path(name))
    row = next(r for r in (EXAMPLES / "README.md").read_text().splitlines() if r.startswith(f"| [{name}]"))
    stated = re.findall(r"`(\w+)` (\w+) \[([-\d, ]+)\]", row)
    actual = []
    for t in [*model.get_inputs(), *model.get_outputs()]:
        shape = ", ".join(str(d) if isinstance(d, int) else "-1" for d in t.shape)
        actual.append((t.name, ONNX[t.type], shape))
    assert actual == stated


# Our answers are exact to float32; those of filetype were recorded on one CPU, and its graph amplifies rounding.
@pytest.mark.parametrize(("name", "tolerance"), [*((name, 1e-6) for name in OURS), ("filetype", 2e-3)])
def test_request_gets_the_expected_answer(name: str, tolerance: float) -> None:
    answer = run(session(model_path(name)), request_of(name))
    expected = tensors(name, "response.json", "outputs")
    assert list(answer) == list(expected)
    for key, value in expected.items():
        assert answer[key].dtype == value.dtype
        assert answer[key].shape == value.shape
        if value.dtype == np.float32:
            np.testing.assert_allclose(answer[key], value, rtol=0, atol=tolerance)
        else:
            assert same_bits(answer[key], value)


@pytest.mark.parametrize("name", [*OURS, "filetype"])
def test_response_is_an_oip_response_with_shortest_floats(name: str) -> None:
    message = json.loads((EXAMPLES / name / "response.json").read_text(encoding="utf-8"))
    assert list(message) == ["model_name", "model_version", "outputs"]
    assert (message["model_name"], message["model_version"]) == (name, "1")
    for output in message["outputs"]:
        if output["datatype"] == "FP32":
            assert output["data"] == [float(str(np.float32(v))) for v in output["data"]]


@pytest.mark.parametrize("name", OURS)
def test_batch_never_changes_a_bit_of_a_row(name: str, real_rows: RealRows) -> None:
    inputs, classes, _ = real_rows(name)
    model = session(model_path(name))
    alone = [run(model, {key: rows[i : i + 1] for key, rows in inputs.items()}) for i in range(len(classes))]
    order = np.random.default_rng(1).permutation(len(classes))
    for size in BATCH_SIZES:
        for start in range(0, len(classes) - size + 1, size):
            members = order[start : start + size]
            together = run(model, {key: rows[members] for key, rows in inputs.items()})
            for output, values in together.items():
                assert same_bits(values, np.concatenate([alone[i][output] for i in members])), (size, output)


@pytest.mark.parametrize("name", OURS)
def test_empty_batch_gives_an_empty_answer(name: str, real_rows: RealRows) -> None:
    model = session(model_path(name))
    answer = run(model, {key: rows[:0] for key, rows in real_rows(name)[0].items()})
    assert answer["label"].shape == (0,)
    assert answer["probabilities"].shape[0] == 0


@pytest.mark.parametrize(("name", "floor"), [("iris", 0.96), ("digits", 0.96), ("text", 0.85), ("fraud", 0.9)])
def test_accuracy_is_what_the_readme_says(name: str, floor: float, real_rows: RealRows) -> None:
    inputs, classes, held_out = real_rows(name)
    model = session(model_path(name))
    right = run(model, inputs)["label"] == classes
    accuracy = right[held_out].mean()
    assert accuracy >= floor
    stated = f"| accuracy | {accuracy:.3f} ({right[held_out].sum()} of {held_out.sum()}) on held-out "
    assert stated in (EXAMPLES / name / "README.md").read_text()


@pytest.mark.parametrize("name", OURS)
def test_readme_shows_the_expected_answer(name: str) -> None:
    text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    block = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)[0]
    assert block == (EXAMPLES / name / "response.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "message",
    ["", " ", "\n", "...", "日本語のメッセージ", "🙂🙂", "Ünïcödé", "a\x00b", "word " * 5000, "x" * 100_000],
    ids=lambda m: ascii(m[:12]),
)
def test_text_without_a_known_word_gets_the_answer_for_the_empty_message(message: str) -> None:
    model = session(model_path("text"))
    both = run(model, {"text": np.array([message, ""], dtype=object)})
    assert both["label"][0] == both["label"][1]
    assert same_bits(both["probabilities"][0], both["probabilities"][1])


def test_text_is_split_as_the_training_did(build: dict[str, Any]) -> None:
    texts, _, _, _ = build["messages"]()
    model = session(model_path("text"))
    rewritten = ["; ".join(build["words"](t)) for t in texts]
    as_written = run(model, {"text": np.array([t.upper() for t in texts], dtype=object)})
    as_split = run(model, {"text": np.array(rewritten, dtype=object)})
    assert same_bits(as_written["probabilities"], as_split["probabilities"])


def sample_files() -> list[Path]:
    files = [p for p in sorted(EXAMPLES.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    return [*files, model_path("filetype"), Path(np.__file__), Path(sys.executable)]


def test_filetype_says_what_magika_says() -> None:
    import magika

    script = runpy.run_path(str(EXAMPLES / "filetype/request.py"))
    model = session(model_path("filetype"))
    original = magika.Magika()
    for path in sample_files():
        [tensor] = script["request"]([path])["inputs"]
        scores = run(model, {tensor["name"]: np.array(tensor["data"], np.int32).reshape(tensor["shape"])})
        [(label, score)] = script["answers"]({"outputs": [{"data": scores["target_label"].ravel().tolist()}]})
        theirs = original.identify_path(path)
        assert label == theirs.dl.label, path
        assert score == pytest.approx(theirs.score, abs=1e-5), path


def test_filetype_finds_rust_in_the_sample(capsys: pytest.CaptureFixture[str]) -> None:
    script = EXAMPLES / "filetype/request.py"
    asked = subprocess.run(
        [sys.executable, script, EXAMPLES / "filetype/sample.txt"], capture_output=True, text=True, check=True
    )
    assert json.loads(asked.stdout) == json.loads((EXAMPLES / "filetype/request.json").read_text())
    response = (EXAMPLES / "filetype/response.json").read_text()
    answer = subprocess.run(
        [sys.executable, script, "--answer"], input=response, capture_output=True, text=True, check=True
    )
    assert answer.stdout == "rust 1.00\n"
    assert answer.stdout in (EXAMPLES / "filetype/README.md").read_text()


def test_filetype_refuses_a_file_that_is_too_short(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"   1234567")
    features = runpy.run_path(str(EXAMPLES / "filetype/request.py"))["features"]
    with pytest.raises(ValueError, match="at least 8 bytes"):
        features(short)


def test_filetype_row_keeps_its_label_in_a_batch() -> None:
    # Not bit for bit: that is why its manifest sets maxRows to 1.
    features = runpy.run_path(str(EXAMPLES / "filetype/request.py"))["features"]
    rows = np.array([features(p) for p in sample_files()], np.int32)
    model = session(model_path("filetype"))
    alone = np.concatenate([model.run(None, {"bytes": rows[i : i + 1]})[0] for i in range(len(rows))])
    [together] = model.run(None, {"bytes": rows})
    assert (together.argmax(axis=1) == alone.argmax(axis=1)).all()
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-3)
    assert manifest("filetype")["spec"]["batching"] == {"maxRows": 1}


def test_benchmark_models_build_with_the_stated_sizes(tmp_path: Path) -> None:
    write = runpy.run_path(str(ROOT / "benchmarks/models.py"))["write"]
    # 11,689,512 is the number of parameters of ResNet-18 in torchvision.
    assert write(tmp_path) == {"mlp": 4_725_514, "resnet": 11_689_512}
    for name, shape, outputs in [("mlp", (256,), 10), ("resnet", (3, 224, 224), 1000)]:
        path = tmp_path / name / "model.onnx"
        stated = yaml.safe_load((path.parent / "model.yaml").read_text())
        assert stated["metadata"] == {"name": name}
        assert stated["spec"]["model"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        x = np.random.default_rng(1).standard_normal((3, *shape), np.float32)
        model = session(path)
        [together] = model.run(None, {"x": x})
        assert together.shape == (3, outputs)
        assert np.isfinite(together).all()
        for i in range(3):
            assert same_bits(model.run(None, {"x": x[i : i + 1]})[0], together[i : i + 1])


def test_benchmark_models_are_the_same_each_time() -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks/models.py"))
    first, second = (benchmark["mlp"]().SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
