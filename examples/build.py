"""Make the example models, and the requests and expected answers beside them.

    python examples/build.py            write the files
    python examples/build.py --check    exit 1 if a committed file is not what this script makes
    python examples/build.py --record   also record the answer of examples/filetype, which needs onnxruntime and magika

The files are the same bytes on every machine. Training is a strictly convex problem, solved in float64 until the
gradient is below 1e-11. Weights are then rounded to a coarse grid, and `on_grid` fails where one lies so close to a
rounding boundary that two machines could disagree. Expected answers are computed in float64 and rounded once: they
favour no CPU.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits, load_iris

HERE = Path(__file__).parent

# Opset 17 and IR 8 are read by every onnxruntime since 1.12; nothing here needs a newer one.
OPSET = 17
IR_VERSION = 8

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Example(NamedTuple):
    """One example's generated files."""

    model: onnx.ModelProto
    request: dict[str, Any]
    response: dict[str, Any]


def fit_softmax(x: Floats, y: Integers, classes: int, penalty: float) -> tuple[Floats, Floats]:
    """Multinomial logistic regression: weights [features, classes] and bias [classes].

    Minimises the summed cross-entropy plus `penalty / 2` times the squared norm of weights and bias: strictly convex,
    so there is one answer. Newton's method with step halving.
    """
    a = np.hstack([x, np.ones((len(x), 1))])
    targets = np.eye(classes)[y]
    size = a.shape[1] * classes
    w = np.zeros((a.shape[1], classes))

    def loss(w: Floats) -> tuple[float, Floats]:
        z = a @ w
        z -= z.max(axis=1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        return float(penalty / 2 * (w * w).sum() - (targets * log_p).sum()), np.exp(log_p)

    value, p = loss(w)
    for _ in range(50):
        gradient = a.T @ (p - targets) + penalty * w
        if np.abs(gradient).max() < 1e-11:  # the error is at most the gradient's norm over the penalty
            return w[:-1], w[-1]
        hessian = np.empty((classes, a.shape[1], classes, a.shape[1]))
        for i in range(classes):
            for j in range(i, classes):
                block = a.T @ (a * (p[:, i] * ((i == j) - p[:, j]))[:, None])
                hessian[i, :, j] = hessian[j, :, i] = block
        square = hessian.reshape(size, size)
        square[np.diag_indices(size)] += penalty
        step = np.linalg.solve(square, gradient.T.ravel()).reshape(classes, -1).T
        scale = 1.0
        while (trial := loss(w - scale * step))[0] > value + 1e-9 * abs(value):
            scale /= 2
        w, (value, p) = w - scale * step, trial
    raise RuntimeError("Newton's method did not converge")


def on_grid(w: Floats, per_unit: int) -> Floats:
    """Round to multiples of 1 / `per_unit`, a power of two, so that float32 holds every value exactly."""
    scaled = w * per_unit
    if np.abs(np.abs(scaled - np.floor(scaled)) - 0.5).min() < 1e-5:
        raise RuntimeError("a weight lies on a rounding boundary: change the penalty or the grid")
    return np.round(scaled) / per_unit


def softmax(z: Floats) -> Floats:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def constant(name: str, values: npt.NDArray[Any]) -> onnx.TensorProto:
    return numpy_helper.from_array(values.astype(np.float32) if values.dtype.kind == "f" else values, name)


def make_model(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Sequence[onnx.TensorProto],
    opsets: Sequence[onnx.OperatorSetIdProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), name, list(inputs), list(outputs), initializer=list(constants))
    model = helper.make_model(
        graph,
        producer_name="phoenix-examples",
        producer_version="1",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET), *opsets],
    )
    onnx.checker.check_model(model, full_check=not opsets)
    return model


def tensor(name: str, datatype: str, values: npt.NDArray[Any]) -> dict[str, Any]:
    """An OIP tensor. Floats are rounded to float32 once and written as the shortest text that reads back the same."""
    data = values.astype(np.float32).astype(str).astype(float) if datatype == "FP32" else values
    return {"name": name, "shape": list(values.shape), "datatype": datatype, "data": data.ravel().tolist()}


def answer(model_name: str, label: dict[str, Any], probabilities: Floats) -> dict[str, Any]:
    outputs = [label, tensor("probabilities", "FP32", probabilities)]
    return {"model_name": model_name, "model_version": "1", "outputs": outputs}


def iris_rows() -> tuple[Floats, Integers, npt.NDArray[np.bool_]]:
    """Rows [150, 4] in centimetres, classes [150], and which rows are held out: every third."""
    data = load_iris()
    return data.data, data.target.astype(np.int64), np.arange(len(data.data)) % 3 == 2


def iris() -> Example:
    rows, classes, held_out = iris_rows()
    weights, bias = (on_grid(w, 1024) for w in fit_softmax(rows[~held_out], classes[~held_out], 3, penalty=1.0))
    model = make_model(
        "iris",
        [
            helper.make_node("Gemm", ["x", "weights", "bias"], ["logits"]),
            helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        outputs=[
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3]),
        ],
        constants=[constant("weights", weights), constant("bias", bias)],
    )
    sample = rows[[2, 59, 137]]
    logits = sample.astype(np.float32).astype(float) @ weights + bias
    label = tensor("label", "INT64", logits.argmax(axis=1))
    return Example(model, {"inputs": [tensor("x", "FP32", sample)]}, answer("iris", label, softmax(logits)))


def digits_rows() -> tuple[Floats, Integers, npt.NDArray[np.bool_]]:
    """Images [1797, 1, 8, 8] of integers 0 to 16, classes [1797], and which images are held out: every fourth."""
    data = load_digits()
    return data.images[:, None], data.target.astype(np.int64), np.arange(len(data.images)) % 4 == 3


def edge_filters() -> Floats:
    """Sobel filters [8, 1, 3, 3] for edges in eight directions."""
    filters = [[-1, -2, -1, 0, 0, 0, 1, 2, 1], [-1, 0, 1, -2, 0, 2, -1, 0, 1]]
    filters += [[-2, -1, 0, -1, 0, 1, 0, 1, 2], [0, -1, -2, 1, 0, -1, 2, 1, 0]]
    half = np.array(filters, dtype=float).reshape(4, 1, 3, 3)
    return np.concatenate([half, -half])


def mixing_filters(outputs: int, inputs: int) -> Floats:
    """Random filters [outputs, inputs, 3, 3] of -1, 0 and 1, from the generator in the C standard."""
    state, values = 1, []
    for _ in range(outputs * inputs * 9):
        state = (1103515245 * state + 12345) % 2**31
        values.append((state >> 16) % 3 - 1)
    return np.array(values, dtype=float).reshape(outputs, inputs, 3, 3)


def convolve(x: Floats, filters: Floats) -> Floats:
    """3x3 convolution with zero padding and ReLU."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    return np.maximum(np.tensordot(windows, filters, axes=((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2), 0)


def quarters(x: Floats) -> Floats:
    """The 2x2 neighbourhoods that pooling reduces, over the last axis."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h // 2, w // 2, 4)


def digits() -> Example:
    images, classes, held_out = digits_rows()
    edges, mixing = edge_filters(), mixing_filters(24, 8)
    features = quarters(convolve(quarters(convolve(images, edges)).mean(axis=4), mixing)).max(axis=4)
    features = features.reshape(len(images), -1)
    weights, bias = fit_softmax(features[~held_out] / 16, classes[~held_out], 10, penalty=1.0)
    weights, bias = on_grid(weights / 16, 4096), on_grid(bias, 4096)

    # Pixels are integers, average pooling divides by four, weights are multiples of 1/4096: every term of a logit is a
    # multiple of 2**-14, and sums below 2**10 are exact in float32 in any order. So batching cannot change a bit.
    if (features @ np.abs(weights) + np.abs(bias)).max() >= 2**10:
        raise RuntimeError("sums are too long to be exact in float32")

    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    model = make_model(
        "digits",
        [
            helper.make_node("Conv", ["image", "edges"], ["conv1"], kernel_shape=[3, 3], pads=[1] * 4),
            helper.make_node("Relu", ["conv1"], ["relu1"]),
            helper.make_node("AveragePool", ["relu1"], ["pool1"], **pool),
            helper.make_node("Conv", ["pool1", "mixing"], ["conv2"], kernel_shape=[3, 3], pads=[1] * 4),
            helper.make_node("Relu", ["conv2"], ["relu2"]),
            helper.make_node("MaxPool", ["relu2"], ["pool2"], **pool),
            helper.make_node("Flatten", ["pool2"], ["features"]),
            helper.make_node("Gemm", ["features", "weights", "bias"], ["logits"]),
            helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        inputs=[helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        outputs=[
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10]),
        ],
        constants=[
            constant(n, v)
            for n, v in zip(("edges", "mixing", "weights", "bias"), (edges, mixing, weights, bias), strict=True)
        ],
    )
    rows = np.flatnonzero(held_out)[:2]
    logits = features[rows] @ weights + bias
    label = tensor("label", "INT64", logits.argmax(axis=1))
    return Example(model, {"inputs": [tensor("image", "FP32", images[rows])]}, answer("digits", label, softmax(logits)))


# Words that say nothing about the subject. With so few messages it pays to leave them out of the vocabulary.
STOP_WORDS = """
a an and are as at be but by can do does for from has have how i in is it me my no not of on or our out so that the
their they this to was we were what when where which who why will with you your
"""
TEXT_SAMPLE = [
    "I was charged twice for my order at Café Zoë, please refund",
    "App CRASHES after the update 😡",
    "¿Dónde está my parcel? The tracking is stuck",
    "",
]


def messages() -> tuple[list[str], Integers, list[str], npt.NDArray[np.bool_]]:
    """Messages, their classes, the names of the classes, and which messages are held out: every fourth."""
    lines = (HERE / "text/messages.tsv").read_text(encoding="utf-8").splitlines()
    names, texts = zip(*(line.split("\t") for line in lines), strict=True)
    classes = sorted(set(names))
    return list(texts), np.array([classes.index(n) for n in names]), classes, np.arange(len(texts)) % 4 == 3


def words(text: str) -> set[str]:
    """What the graph's StringNormalizer and Tokenizer make of a text: ASCII lower case, runs of letters and digits."""
    lower = "".join(c.lower() if c.isascii() else c for c in text)
    return set(re.findall(r"[^\W_]+", lower))


def text() -> Example:
    texts, classes, names, held_out = messages()
    train = [words(t) for t, out in zip(texts, held_out, strict=True) if not out]
    vocabulary = sorted(set().union(*train) - set(STOP_WORDS.split()))

    def presence(bags: list[set[str]]) -> Floats:
        return np.array([[float(word in bag) for word in vocabulary] for bag in bags])

    weights, bias = fit_softmax(presence(train), classes[~held_out], len(names), penalty=0.3)
    weights, bias = on_grid(weights, 1024), on_grid(bias, 1024)
    size = len(vocabulary)
    model = make_model(
        "text",
        [
            # StringNormalizer refuses an empty batch, so it always gets one more row, which is cut off again below.
            helper.make_node("Concat", ["text", "empty"], ["rows"], axis=0),
            # The only locale that every machine has. It leaves letters outside ASCII as they are.
            helper.make_node("StringNormalizer", ["rows"], ["lower"], case_change_action="LOWER", locale="C"),
            helper.make_node(
                "Tokenizer",
                ["lower"],
                ["words"],
                domain="com.microsoft",
                mark=0,
                mincharnum=1,
                pad_value=" ",
                tokenexp=r"[\p{L}\p{N}]+",
            ),
            helper.make_node(
                "TfIdfVectorizer",
                ["words"],
                ["presence_and_empty"],
                mode="IDF",  # the weight of each word that occurs, however often
                min_gram_length=1,
                max_gram_length=1,
                max_skip_count=0,
                ngram_counts=[0],
                ngram_indexes=list(range(size)),
                pool_strings=vocabulary,
                weights=[1.0] * size,
            ),
            helper.make_node("Slice", ["presence_and_empty", "first", "last", "batch_axis"], ["presence"]),
            helper.make_node("Gemm", ["presence", "weights", "bias"], ["logits"]),
            helper.make_node("ArgMax", ["logits"], ["class"], axis=1, keepdims=0),
            helper.make_node("Gather", ["classes", "class"], ["label"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        inputs=[helper.make_tensor_value_info("text", TensorProto.STRING, ["batch"])],
        outputs=[
            helper.make_tensor_value_info("label", TensorProto.STRING, ["batch"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", len(names)]),
        ],
        constants=[
            constant("empty", np.array([""], dtype=object)),
            constant("classes", np.array(names, dtype=object)),
            constant("first", np.array([0])),
            constant("last", np.array([-1])),
            constant("batch_axis", np.array([0])),
            constant("weights", weights),
            constant("bias", bias),
        ],
        opsets=[helper.make_opsetid("com.microsoft", 1)],
    )
    logits = presence([words(t) for t in TEXT_SAMPLE]) @ weights + bias
    label = tensor("label", "BYTES", np.array(names, dtype=object)[logits.argmax(axis=1)])
    request = {"inputs": [tensor("text", "BYTES", np.array(TEXT_SAMPLE, dtype=object))]}
    return Example(model, request, answer("text", label, softmax(logits)))


# A payment (amount in euros, 1 if abroad) and its card's features, in the order of the manifest.
FRAUD_SCALES = np.array([1024.0, 1.0, 1024.0, 16.0, 1024.0])
FRAUD_TRUTH, FRAUD_OFFSET = np.array([4.0, 2.5, 2.0, 2.5, -3.5]), -4.5
FRAUD_SAMPLE = np.array([[18.0, 0.0], [850.0, 1.0], [620.0, 1.0]])
FRAUD_CARDS = ["card-1001", "card-1002", "card-1003"]


def fraud_rows() -> tuple[Floats, Integers, npt.NDArray[np.bool_]]:
    """Rows [1200, 5] of payment and features, classes [1200], and which rows are held out: every third.

    Made up: whole numbers, most of them small, from the generator in the C standard, and a class by chance, the more
    likely fraud the larger a weighted sum of them.
    """
    state, draws = 1, []
    for _ in range(1200 * 6):
        state = (1103515245 * state + 12345) % 2**31
        draws.append((state >> 16) / 2**15)
    u = np.array(draws).reshape(1200, 6)
    rows = np.column_stack(
        [
            np.floor(2000 * u[:, 0] ** 3) + 1,
            u[:, 1] < 0.25,
            np.floor(4000 * u[:, 2] ** 3),
            np.floor(32 * u[:, 3] ** 2),
            np.floor(2500 * u[:, 4] ** 2),
        ]
    )
    chance = 1 / (1 + np.exp(-(rows / FRAUD_SCALES @ FRAUD_TRUTH + FRAUD_OFFSET)))
    return rows, (u[:, 5] < chance).astype(np.int64), np.arange(len(rows)) % 3 == 2


def fraud() -> Example:
    rows, classes, held_out = fraud_rows()
    weights, bias = fit_softmax((rows / FRAUD_SCALES)[~held_out], classes[~held_out], 2, penalty=0.1)
    weights, bias = on_grid(weights, 1024) / FRAUD_SCALES[:, None], on_grid(bias, 1024)
    model = make_model(
        "fraud",
        [
            helper.make_node("Concat", ["payment", "features"], ["x"], axis=1),
            helper.make_node("Gemm", ["x", "weights", "bias"], ["logits"]),
            helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        inputs=[
            helper.make_tensor_value_info("payment", TensorProto.FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 3]),
        ],
        outputs=[
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 2]),
        ],
        constants=[constant("weights", weights), constant("bias", bias)],
    )
    with (HERE / "fraud/features.csv").open(newline="") as file:
        table = {row["card"]: row for row in csv.DictReader(file)}
    names = ("amount_24h", "count_24h", "age_days")
    features = np.array([[float(table[card][name]) for name in names] for card in FRAUD_CARDS])
    logits = np.hstack([FRAUD_SAMPLE, features]) @ weights + bias
    label = tensor("label", "INT64", logits.argmax(axis=1))
    # a parameter of the protocol is a single value: a list travels as its JSON
    request = {
        "parameters": {"card": json.dumps(FRAUD_CARDS)},
        "inputs": [tensor("payment", "FP32", FRAUD_SAMPLE)],
    }
    return Example(model, request, answer("fraud", label, softmax(logits)))


EXAMPLES: dict[str, Callable[[], Example]] = {"iris": iris, "digits": digits, "text": text, "fraud": fraud}


def to_text(message: dict[str, Any]) -> str:
    """JSON with one tensor a line: short enough to read, and it differs line by line."""
    lines = []
    for key, value in message.items():
        text = json.dumps(value, ensure_ascii=False)
        if key in ("inputs", "outputs"):
            text = "[\n    " + ",\n    ".join(json.dumps(t, ensure_ascii=False) for t in value) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def files() -> dict[Path, bytes]:
    """Every generated file. The manifests are written by hand but for the digest in them."""
    made: dict[Path, bytes] = {}
    for name, build in EXAMPLES.items():
        folder, example = HERE / name, build()
        made[folder / "model.onnx"] = example.model.SerializeToString(deterministic=True)
        made[folder / "request.json"] = to_text(example.request).encode()
        made[folder / "response.json"] = to_text(example.response).encode()
        digest = hashlib.sha256(made[folder / "model.onnx"]).hexdigest()
        manifest = (folder / "model.yaml").read_text()
        made[folder / "model.yaml"] = re.sub(r"(?<=sha256: )\S+", digest, manifest, count=1).encode()
    folder = HERE / "filetype"
    request = runpy.run_path(str(folder / "request.py"))["request"]
    made[folder / "request.json"] = to_text(request([folder / "sample.txt"])).encode()
    return made


def recorded() -> dict[Path, bytes]:
    """The answer of examples/filetype, whose weights are not ours: what onnxruntime says here."""
    import magika
    import onnxruntime as ort

    folder = HERE / "filetype"
    [given] = json.loads((folder / "request.json").read_text())["inputs"]
    session = ort.InferenceSession(Path(magika.__file__).parent / "models/standard_v3_3/model.onnx")
    [scores] = session.run(None, {given["name"]: np.array(given["data"], np.int32).reshape(given["shape"])})
    outputs = [tensor("target_label", "FP32", scores)]
    response = {"model_name": "filetype", "model_version": "1", "outputs": outputs}
    return {folder / "response.json": to_text(response).encode()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the example models.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a committed file differs")
    parser.add_argument("--record", action="store_true", help="also record the answer of examples/filetype")
    arguments = parser.parse_args()
    made = files() | (recorded() if arguments.record else {})
    stale = [(path, data) for path, data in made.items() if not path.exists() or path.read_bytes() != data]
    for path, data in stale:
        print(f"{'differs' if arguments.check else 'wrote'}: {path.relative_to(HERE.parent)}")
        if not arguments.check:
            path.write_bytes(data)
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
