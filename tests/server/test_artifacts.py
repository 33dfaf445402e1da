import asyncio
import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server.artifact_models import external_model, plain_model, write
from server.artifact_web import Answer, Web, serve, start_fetch, wait_until

from phoenix_server import artifacts
from phoenix_server.artifacts import Artifact, ArtifactStore, Progress
from phoenix_server.errors import ModelLoadError, Reason

MODEL = plain_model()
DIGEST = hashlib.sha256(MODEL).hexdigest()
OTHER = plain_model(seed=1)
BIG = plain_model(rows=100_000)  # 1.6 MB: several chunks
WEIGHTS = bytes(range(16))
STAMPS = {"ETag": '"1"', "Last-Modified": "Mon, 02 Nov 2026 10:00:00 GMT"}
needs_mounts = pytest.mark.skipif(
    os.system("unshare -m true 2>/dev/null") != 0, reason="this user may not mount a file system"
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in list(os.environ):
        if key.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(key)


@pytest.fixture(scope="module")
def _web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with serve(tmp_path_factory.mktemp("web")) as web:
        yield web


@pytest.fixture
def web(_web: Web) -> Web:
    _web.answers.clear()
    _web.requests.clear()
    return _web


@dataclasses.dataclass
class World:
    """A model store, a cache, and a way to fetch that needs no event loop."""

    root: Path
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def cache(self) -> Path:
        return self.root / "state"

    def fetch(self, uri: str, **more: Any) -> Artifact:
        options = {"backoff_s": 0.01, "stall_timeout_s": 20.0} | self.options
        store = ArtifactStore(model_store=self.store, cache_dir=self.cache, **options)
        return asyncio.run(store.fetch(uri, **more))

    def refusal(self, uri: str, reason: Reason, **more: Any) -> str:
        with pytest.raises(ModelLoadError) as caught:
            self.fetch(uri, **more)
        assert caught.value.reason is reason, caught.value.message
        message = caught.value.message
        for leak in ("Debug source", "RetryError", "reqwest", "s3cr3t", "\n"):
            assert leak not in message
        return message

    def cached(self) -> list[str]:
        """What lies in the cache, partial folders included."""
        return sorted(path.name for path in (self.cache / "models").glob("*"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "store").mkdir()
    return World(tmp_path)


def trusting(web: Web, **more: str) -> dict[str, str]:
    return {"ca.crt": web.ca, **more}


# --- local files -----------------------------------------------------------------------------------------------------


def test_relative_path_is_looked_up_beside_the_manifest_first(world: World) -> None:
    write(world.store, {"iris/model.onnx": MODEL})
    assert world.fetch("iris/model.onnx", beside=world.root).path == world.store / "iris/model.onnx"
    beside = write(world.root, {"iris/model.onnx": OTHER})
    artifact = world.fetch("iris/model.onnx", beside=world.root)
    assert artifact == Artifact(beside, hashlib.sha256(OTHER).hexdigest(), len(OTHER), (beside,))


def test_relative_path_is_looked_up_around_the_manifests_folder_before_the_store(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(world.store, {"iris/model.onnx": MODEL})
    around = write(world.root, {"examples/iris/model.onnx": OTHER})
    folder = world.root / "examples/iris"
    assert world.fetch("iris/model.onnx", beside=folder).path == around
    monkeypatch.chdir(folder)
    assert world.fetch("iris/model.onnx", beside=Path()).path == around  # `serve model.yaml` in its own folder
    beside = write(world.root, {"examples/iris/iris/model.onnx": MODEL})
    assert world.fetch("iris/model.onnx", beside=folder).path == beside


def test_file_uri_is_an_absolute_path(world: World) -> None:
    path = write(world.root, {"a model.onnx": MODEL})
    assert world.fetch(f"file://{world.root}/a%20model.onnx").path == path


def test_missing_file_names_every_place(world: World) -> None:
    message = world.refusal("iris/model.onnx", Reason.NOT_FOUND, beside=world.root / "manifests")
    places = [f"{folder}/iris/model.onnx" for folder in (world.root / "manifests", world.root, world.store)]
    assert f"looked at {', '.join(places)}" in message


def test_folder_is_no_model(world: World) -> None:
    write(world.store, {"iris/model.onnx": MODEL})
    assert "not found" in world.refusal("iris", Reason.NOT_FOUND)


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("pvc://claim/a/b.onnx", "a/b.onnx"),
        ("configmap://name/b.onnx", "b.onnx"),
        ("oci://registry.example/models/fraud@sha256:0123#a/b.onnx", "a/b.onnx"),
        ("oci://registry.example:5000/fraud:3#/b.onnx", "b.onnx"),
    ],
)
def test_mounted_models_are_found_in_the_store(uri: str, place: str, world: World) -> None:
    message = world.refusal(uri, Reason.NOT_FOUND)
    assert f"{world.store}/{place}; in a cluster the operator mounts it there" in message
    path = write(world.store, {place: MODEL})
    assert world.fetch(uri).path == path


@pytest.mark.parametrize(
    "uri",
    ["", "/abs/model.onnx", "file://relative.onnx", "pvc://claim", "pvc://claim/", "oci://registry/repo:1",
     "http://example.com/model.onnx", "ftp://example.com/model.onnx", "s3://bucket", "s3:///key", "https://host/",
     "gs://bucket/folder/", "https://[::1/model.onnx", "https://host/a%2Fb"],
)  # fmt: skip
def test_uri_that_names_no_file_is_refused(uri: str, world: World) -> None:
    assert "spec.model.uri" in world.refusal(uri, Reason.INVALID_SPEC)


@pytest.mark.parametrize(
    "uri",
    ["../model.onnx", "a/../../b.onnx", "pvc://claim/../x", "https://host/%2e%2e/x", "s3://bucket/a/../x", "a\\..\\b"],
)
def test_parent_folder_in_uri_is_refused(uri: str, world: World) -> None:
    write(world.root, {"model.onnx": MODEL})
    assert "'..' is not allowed" in world.refusal(uri, Reason.INVALID_SPEC, beside=world.store)


def test_links_of_a_configmap_mount_are_followed(world: World) -> None:
    write(world.store, {"..2026/model.onnx": MODEL})
    (world.store / "..data").symlink_to("..2026")
    (world.store / "model.onnx").symlink_to("..data/model.onnx")
    assert world.fetch("configmap://name/model.onnx", sha256=DIGEST).sha256 == DIGEST


def test_digest_is_checked_on_local_files(world: World) -> None:
    write(world.store, {"model.onnx": MODEL})
    assert world.fetch("model.onnx", sha256=DIGEST.upper()).sha256 == DIGEST
    message = world.refusal("model.onnx", Reason.DIGEST_MISMATCH, sha256="0" * 64)
    assert f"expects {'0' * 64}, got {DIGEST}" in message


def test_digest_that_is_none_is_refused(world: World) -> None:
    assert "64 hex digits" in world.refusal("model.onnx", Reason.INVALID_SPEC, sha256="../../x")


def test_digest_of_external_data_is_that_of_sha256sum(world: World) -> None:
    # Names chosen so that the order matters, and is that of bytes.
    names = ["Z.bin", "a.bin", "sub/w", "ä.bin"]
    path = write(world.store, {"model.onnx": external_model(*names), **dict.fromkeys(names, WEIGHTS)})
    command = "find . -type f -printf '%P\\0' | xargs -0 sha256sum | LC_ALL=C sort -k2 | sha256sum"
    expected = subprocess.run(command, shell=True, cwd=world.store, capture_output=True, text=True, check=True)
    artifact = world.fetch("model.onnx")
    assert artifact.sha256 == expected.stdout.split()[0]
    assert artifact.files == (path, *(world.store / name for name in names))
    assert artifact.size_bytes == path.stat().st_size + 16 * len(names)
    (world.store / "a.bin").write_bytes(bytes(16))
    world.refusal("model.onnx", Reason.DIGEST_MISMATCH, sha256=artifact.sha256)


def test_missing_external_data_is_named(world: World) -> None:
    write(world.store, {"model.onnx": external_model("weights")})
    message = world.refusal("model.onnx", Reason.EXTERNAL_DATA_MISSING)
    assert f"{world.store}/weights" in message


def test_external_data_outside_the_folder_is_refused(world: World) -> None:
    write(world.store, {"m/model.onnx": external_model("weights"), "secret": WEIGHTS})
    (world.store / "m/weights").symlink_to("../secret")
    assert "leads out of" in world.refusal("m/model.onnx", Reason.INVALID_MODEL)


def test_local_file_that_is_no_model_is_refused(world: World) -> None:
    write(world.store, {"model.onnx": b"version https://git-lfs.github.com/spec/v1\n"})
    assert "git lfs pull" in world.refusal("model.onnx", Reason.INVALID_MODEL)
    message = world.refusal("model.onnx", Reason.DIGEST_MISMATCH, sha256=DIGEST)
    assert "git lfs pull" in message


def test_local_fetch_does_not_import_obstore() -> None:
    code = "import sys, phoenix_server.artifacts; print('obstore' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


# --- HTTPS -----------------------------------------------------------------------------------------------------------


def test_https_model_is_fetched_once_when_its_digest_is_given(world: World, web: Web) -> None:
    uri = web.put("/a/model.onnx", MODEL)
    for _ in range(2):
        artifact = world.fetch(uri, sha256=DIGEST, credentials=trusting(web))
        assert artifact.path == world.cache / "models" / DIGEST / "files" / "model.onnx"
        assert artifact.path.read_bytes() == MODEL
        assert artifact.size_bytes == len(MODEL)
    assert web.paths == ["/a/model.onnx"]
    assert world.cached() == [DIGEST]


def test_https_address_is_asked_for_as_it_is_written(world: World, web: Web) -> None:
    uri = web.put("/a%20b/m%2B+%C3%A4.onnx?signature=s3cr3t&x=%2F", external_model("w 1", "sub/w+2"))
    web.put("/a%20b/w%201?signature=s3cr3t&x=%2F", WEIGHTS)
    web.put("/a%20b/sub/w%2B2?signature=s3cr3t&x=%2F", WEIGHTS)
    artifact = world.fetch(uri, credentials=trusting(web))
    files = artifact.path.parent
    assert artifact.files == (files / "m++ä.onnx", files / "sub/w+2", files / "w 1")
    again = world.fetch(uri, sha256=artifact.sha256, credentials=trusting(web))
    assert again == artifact


def test_untrusted_certificate_says_where_a_private_ca_goes(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", MODEL)
    message = world.refusal(uri, Reason.FETCH_FAILED)
    assert "TLS failed" in message
    assert "ca.crt" in message
    assert web.requests == []


def test_ca_that_is_none_is_refused(world: World, web: Web) -> None:
    message = world.refusal(web.put("/model.onnx", MODEL), Reason.FETCH_FAILED, credentials={"ca.crt": "s3cr3t"})
    assert "certificate" in message


def test_ca_file_of_the_environment_is_trusted(world: World, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    ca = write(world.root, {"ca.pem": web.ca.encode()})
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    child = start_fetch(world.cache, web.put("/model.onnx", MODEL))
    assert json.loads(child.communicate(timeout=60)[0])["sha256"] == DIGEST


def test_authorization_is_sent_but_not_to_another_host(world: World, web: Web) -> None:
    elsewhere = web.put("/there", MODEL).replace("localhost", "127.0.0.1")
    uri = web.put("/model.onnx", Answer(status=302, headers={"Location": elsewhere}))
    world.fetch(uri, credentials=trusting(web, HTTP_AUTHORIZATION="Bearer s3cr3t"))
    assert [headers.get("authorization") for _, headers in web.requests] == ["Bearer s3cr3t", None]


def test_user_in_address_becomes_basic_authorization_and_is_never_shown(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", Answer(status=403)).replace("https://", "https://me:s3cr3t@")
    message = world.refusal(uri + "?token=s3cr3t", Reason.NOT_FOUND, credentials=trusting(web))
    assert message.startswith(f"{web.url}/model.onnx is not found")
    message = world.refusal(uri, Reason.FETCH_FAILED, credentials=trusting(web))
    assert "access was refused, HTTP 403 Forbidden; put HTTP_AUTHORIZATION" in message
    assert "spec.model.credentials.secretRef" in message
    assert web.requests[-1][1]["authorization"] == "Basic bWU6czNjcjN0"


@pytest.mark.parametrize("status", [401, 403])
def test_refused_access_names_the_secret(status: int, world: World, web: Web) -> None:
    uri = web.put("/model.onnx", Answer(b"token s3cr3t is wrong", status))
    message = world.refusal(uri, Reason.FETCH_FAILED, credentials=trusting(web))
    assert f"HTTP {status}" in message
    assert "spec.model.credentials.secretRef" in message


def test_missing_page_is_not_found(world: World, web: Web) -> None:
    message = world.refusal(f"{web.url}/none.onnx", Reason.NOT_FOUND, credentials=trusting(web))
    assert "(404); check spec.model.uri" in message
    assert world.cached() == []


def test_transient_error_is_tried_again(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", Answer(b"", 500), Answer(b"", 503), MODEL)
    assert world.fetch(uri, credentials=trusting(web)).sha256 == DIGEST
    assert len(web.requests) == 3


def test_lasting_error_ends_after_the_attempts(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", Answer(b"s3cr3t stack trace with dns error", 500))
    message = world.refusal(uri, Reason.FETCH_FAILED, credentials=trusting(web))
    assert message == f"{uri}: HTTP 500 Internal Server Error"
    assert len(web.requests) == 4


def test_error_that_will_not_pass_is_not_tried_again(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", Answer(b"", 410))
    assert "HTTP 410 Gone" in world.refusal(uri, Reason.FETCH_FAILED, credentials=trusting(web))
    assert len(web.requests) == 1


@pytest.mark.parametrize("etag", [{}, {"ETag": '"1"'}])
def test_truncated_download_is_tried_again(etag: dict[str, str], world: World, web: Web) -> None:
    uri = web.put("/model.onnx", Answer(BIG, cut=1_000_000, headers=etag), Answer(BIG, headers=etag))
    assert world.fetch(uri, credentials=trusting(web)).path.read_bytes() == BIG


def test_download_that_is_always_truncated_fails(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", Answer(BIG, cut=1_000_000))
    message = world.refusal(uri, Reason.FETCH_FAILED, credentials=trusting(web))
    assert "the connection broke before the whole file came" in message
    assert f" of {len(BIG)} bytes had come, after 4 attempts" in message
    assert world.cached() == []


def test_stalled_download_fails_within_its_deadline(world: World, web: Web) -> None:
    world.options = {"stall_timeout_s": 0.3, "attempts": 2}
    uri = web.put("/model.onnx", Answer(BIG, gate=threading.Event(), gate_at=1_000_000))
    message = world.refusal(uri, Reason.FETCH_FAILED, credentials=trusting(web))
    assert "no byte came for 0.3 s" in message
    assert len(web.requests) == 2
    assert world.cached() == []


def test_stalled_download_is_tried_again(world: World, web: Web) -> None:
    world.options = {"stall_timeout_s": 1.0}
    uri = web.put("/model.onnx", Answer(BIG, gate=threading.Event(), gate_at=1_000_000), BIG)
    assert world.fetch(uri, credentials=trusting(web)).path.read_bytes() == BIG


def test_server_that_never_answers_fails_within_its_deadline(world: World) -> None:
    import socket

    world.options = {"stall_timeout_s": 0.3}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"https://127.0.0.1:{silent.getsockname()[1]}/model.onnx"
        message = world.refusal(uri, Reason.FETCH_FAILED)
    assert "no answer within 0.3 s" in message or "timed out" in message


def test_connection_refused_and_unknown_host_are_told(world: World) -> None:
    assert "connection refused" in world.refusal("https://127.0.0.1:1/certificate/model.onnx", Reason.FETCH_FAILED)
    assert "does not resolve" in world.refusal("https://no-such-host.invalid/model.onnx", Reason.FETCH_FAILED)


def test_answer_without_length_is_told(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", Answer(MODEL, has_length=False))
    assert "Content-Length" in world.refusal(uri, Reason.FETCH_FAILED, credentials=trusting(web))


def test_redirect_to_plain_http_is_refused(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", Answer(status=302, headers={"Location": "http://127.0.0.1:1/model.onnx"}))
    assert "plain http is refused" in world.refusal(uri, Reason.FETCH_FAILED, credentials=trusting(web))


def test_page_instead_of_a_model_is_refused_and_not_kept(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", b"<!doctype html><title>Sign in</title>")
    assert "HTML page" in world.refusal(uri, Reason.INVALID_MODEL, credentials=trusting(web))
    message = world.refusal(uri, Reason.DIGEST_MISMATCH, sha256=DIGEST, credentials=trusting(web))
    assert f"expects {DIGEST}" in message
    assert "HTML page" in message
    assert world.cached() == []


def test_digest_mismatch_is_refused_and_not_kept(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", OTHER)
    message = world.refusal(uri, Reason.DIGEST_MISMATCH, sha256=DIGEST, credentials=trusting(web))
    assert f"expects {DIGEST}, got {hashlib.sha256(OTHER).hexdigest()}" in message
    assert world.cached() == []


def test_external_data_is_fetched_and_covered_by_the_digest(world: World, web: Web) -> None:
    uri = web.put("/m/model.onnx", external_model("weights"))
    missing = world.refusal(uri, Reason.EXTERNAL_DATA_MISSING, credentials=trusting(web))
    assert f"{web.url}/m/weights" in missing
    web.put("/m/weights", WEIGHTS)
    artifact = world.fetch(uri, credentials=trusting(web))
    local = write(world.store, {"model.onnx": external_model("weights"), "weights": WEIGHTS})
    assert world.fetch("model.onnx", sha256=artifact.sha256).path == local
    web.put("/m/weights", bytes(16))
    world.cache.rename(world.root / "old")
    world.refusal(uri, Reason.DIGEST_MISMATCH, sha256=artifact.sha256, credentials=trusting(web))


# --- the cache -------------------------------------------------------------------------------------------------------


def test_unchanged_model_without_digest_is_not_downloaded_again(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", BIG, etag="1")
    first = world.fetch(uri, credentials=trusting(web))
    seen: list[Progress] = []
    world.options = {"progress": seen.append}
    assert world.fetch(uri, credentials=trusting(web)) == first
    assert seen == []
    web.put("/model.onnx", OTHER, etag="2")
    assert world.fetch(uri, credentials=trusting(web)).path.read_bytes() == OTHER
    assert first.path.read_bytes() == BIG  # whoever still serves the old one keeps it
    web.put("/model.onnx", BIG, etag="1")
    seen.clear()
    assert world.fetch(uri, credentials=trusting(web)) == first
    assert seen == []


def test_date_and_size_stand_in_for_an_etag(world: World, web: Web) -> None:
    dated = {"Last-Modified": "Mon, 02 Nov 2026 10:00:00 GMT"}
    uri = web.put("/model.onnx", Answer(MODEL, headers=dated))
    first = world.fetch(uri, credentials=trusting(web))
    seen: list[Progress] = []
    world.options = {"progress": seen.append}
    assert world.fetch(uri, credentials=trusting(web)) == first
    assert seen == []


def test_model_without_etag_and_date_is_downloaded_every_time(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", MODEL)
    world.fetch(uri, credentials=trusting(web))
    web.put("/model.onnx", OTHER)
    assert world.fetch(uri, credentials=trusting(web)).path.read_bytes() == OTHER


def test_changed_external_data_is_noticed(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", external_model("weights"), etag="m")
    web.put("/weights", WEIGHTS, etag="1")
    first = world.fetch(uri, credentials=trusting(web))
    web.put("/weights", bytes(16), etag="2")
    second = world.fetch(uri, credentials=trusting(web))
    assert second.files[1].read_bytes() == bytes(16)
    assert second.sha256 != first.sha256


def test_same_content_under_a_new_etag_keeps_its_place(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", MODEL, etag="1")
    first = world.fetch(uri, credentials=trusting(web))
    web.put("/model.onnx", MODEL, etag="2")
    assert world.fetch(uri, credentials=trusting(web)) == first
    seen: list[Progress] = []
    world.options = {"progress": seen.append}
    world.fetch(uri, credentials=trusting(web))
    assert seen == []
    assert world.cached() == [DIGEST]


def test_unreachable_store_serves_the_copy_with_the_right_digest_only(
    world: World, web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    uri = web.put("/model.onnx", MODEL, etag="1")
    world.fetch(uri, credentials=trusting(web))
    web.put("/model.onnx", Answer(b"", 500))
    message = world.refusal(uri, Reason.FETCH_FAILED, credentials=trusting(web))
    assert f"set spec.model.sha256 to {DIGEST}" in message
    with caplog.at_level("INFO"):
        assert world.fetch(uri, sha256=DIGEST, credentials=trusting(web)).sha256 == DIGEST
    assert "model taken from the cache" in caplog.messages
    assert "s3cr3t" not in caplog.text


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "meta", "meta-escape"])
def test_damaged_copy_is_dropped_and_fetched_again(damage: str, world: World, web: Web) -> None:
    uri = web.put("/model.onnx", MODEL, etag="1")
    path = world.fetch(uri, sha256=DIGEST, credentials=trusting(web)).path
    meta = path.parent.parent / "meta.json"
    match damage:
        case "flip":
            path.write_bytes(MODEL[:-1] + bytes([MODEL[-1] ^ 1]))
        case "truncate":
            path.write_bytes(MODEL[:50])
        case "remove":
            path.unlink()
        case "meta":
            meta.write_text("{")
        case "meta-escape":
            meta.write_text(json.dumps(json.loads(meta.read_text()) | {"name": "../../../other.onnx"}))
    again = world.fetch(uri, sha256=DIGEST, credentials=trusting(web))
    assert again.path.read_bytes() == MODEL
    assert len(web.requests) == 2
    assert world.cached() == [DIGEST]


def test_damaged_copy_is_not_used_when_the_store_says_unchanged(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", MODEL, etag="1")
    world.fetch(uri, credentials=trusting(web)).path.write_bytes(OTHER)
    assert world.fetch(uri, credentials=trusting(web)).path.read_bytes() == MODEL


def test_kill_in_the_middle_leaves_nothing_in_use(world: World, web: Web) -> None:
    gate = threading.Event()
    uri = web.put("/model.onnx", Answer(BIG, gate=gate, gate_at=1_000_000), BIG)
    digest = hashlib.sha256(BIG).hexdigest()
    child = start_fetch(world.cache, uri, sha256=digest, ca=web.ca)

    def is_half_way() -> bool:
        return any(file.stat().st_size for file in world.cache.glob("models/.partial-*/files/model.onnx"))

    wait_until(is_half_way, "half a model in the cache")
    child.kill()
    child.communicate(timeout=60)
    assert is_half_way()  # what a crash leaves behind
    assert digest not in world.cached()
    assert world.fetch(uri, sha256=digest, credentials=trusting(web)).path.read_bytes() == BIG
    assert world.cached() == [digest]


@pytest.mark.parametrize("sha256", ["", hashlib.sha256(BIG).hexdigest()])
def test_two_processes_at_once_both_succeed(sha256: str, world: World, web: Web) -> None:
    gate = threading.Event()
    uri = web.put("/model.onnx", Answer(BIG, gate=gate, gate_at=1_000_000, headers={"ETag": '"1"'}))
    children = [start_fetch(world.cache, uri, sha256=sha256, ca=web.ca) for _ in range(2)]
    wait_until(lambda: len(web.requests) == 2, "both downloads under way")
    wait_until(lambda: len(world.cached()) == 2, "two partial folders: neither removes the other's")
    gate.set()
    answers = [json.loads(child.communicate(timeout=60)[0]) for child in children]
    digest = hashlib.sha256(BIG).hexdigest()
    assert [answer.get("sha256") for answer in answers] == [digest, digest], answers
    assert Path(answers[0]["path"]).read_bytes() == BIG
    assert world.cached() == [digest]


@pytest.mark.parametrize(("age_s", "is_removed"), [(0, False), (100_000, True)])
def test_partial_folder_goes_by_age_where_there_are_no_locks(
    age_s: int, is_removed: bool, world: World, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    left = write(world.cache / "models" / ".partial-1-abc", {"files/model.onnx": MODEL[:9]})
    for path in (left, left.parent, left.parent.parent):
        os.utime(path, times=(time.time() - age_s,) * 2)
    world.fetch(web.put("/model.onnx", MODEL), credentials=trusting(web))
    assert left.exists() is not is_removed
    assert DIGEST in world.cached()


def test_cancelled_fetch_leaves_nothing(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", Answer(BIG, gate=threading.Event(), gate_at=1_000_000))
    store = ArtifactStore(model_store=world.store, cache_dir=world.cache)

    async def cancel_half_way() -> None:
        task = asyncio.create_task(store.fetch(uri, credentials=trusting(web)))
        await asyncio.to_thread(wait_until, lambda: bool(web.requests), "the request")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_half_way())
    assert world.cached() == []


def test_cache_that_is_a_file_names_the_setting(world: World, web: Web) -> None:
    world.cache.write_text("in the way")
    message = world.refusal(web.put("/model.onnx", MODEL), Reason.FETCH_FAILED, credentials=trusting(web))
    assert f"cannot write to {world.cache}/models: " in message
    assert "set PHOENIX_STATE_DIR to a writable folder" in message


def test_unwritable_cache_names_the_setting(web: Web, world: World) -> None:
    store = ArtifactStore(model_store=world.store, cache_dir=Path("/proc/phoenix"))
    with pytest.raises(ModelLoadError, match=r"cannot write to /proc/phoenix/models: .*PHOENIX_STATE_DIR"):
        asyncio.run(store.fetch(web.put("/model.onnx", MODEL), credentials=trusting(web)))


def test_full_disk_names_the_setting(world: World, web: Web) -> None:
    # A limit on file size stands in for the end of the disk: the same OSError on the same write.
    child = start_fetch(world.cache, web.put("/model.onnx", BIG), ca=web.ca, max_file_bytes=500_000)
    answer = json.loads(child.communicate(timeout=60)[0])
    assert answer["reason"] == Reason.FETCH_FAILED
    assert "with room for the model" in answer["message"]
    assert world.cached() == []


@needs_mounts
def test_real_full_disk_names_the_setting(world: World, web: Web) -> None:
    world.cache.mkdir()
    child = start_fetch(world.cache, web.put("/model.onnx", BIG), ca=web.ca, mount="-t tmpfs -o size=512k none")
    answer = json.loads(child.communicate(timeout=60)[0])
    assert "No space left on device; set PHOENIX_STATE_DIR" in answer["message"]


@needs_mounts
def test_read_only_cache_serves_what_it_holds_and_names_the_setting_for_the_rest(world: World, web: Web) -> None:
    uri = web.put("/model.onnx", MODEL)
    world.fetch(uri, credentials=trusting(web))
    read_only = f"-o bind,ro {world.cache}"
    child = start_fetch(world.cache, uri, sha256=DIGEST, mount=read_only)
    assert json.loads(child.communicate(timeout=60)[0])["sha256"] == DIGEST
    child = start_fetch(world.cache, web.put("/other.onnx", OTHER), ca=web.ca, mount=read_only)
    assert "Read-only file system; set PHOENIX_STATE_DIR" in json.loads(child.communicate(timeout=60)[0])["message"]


def test_progress_counts_up_to_the_whole(world: World, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []
    world.options = {"progress": seen.append}
    monkeypatch.setattr(artifacts, "_PROGRESS_EVERY_S", 0.0)
    uri = web.put("/model.onnx?token=s3cr3t", BIG)
    world.fetch(uri, credentials=trusting(web))
    done = [progress.done_bytes for progress in seen]
    assert len(done) > 1
    assert done == sorted(set(done))
    assert done[-1] == len(BIG)
    assert {(p.uri, p.total_bytes) for p in seen} == {(f"{web.url}/model.onnx", len(BIG))}
    seen.clear()
    monkeypatch.setattr(artifacts, "_PROGRESS_EVERY_S", 3600.0)
    world.fetch(uri, credentials=trusting(web))
    assert [progress.done_bytes for progress in seen] == [len(BIG)]


# --- object stores ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real S3 protocol server with the bucket `models`."""
    import httpx
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    httpx.put(f"{url}/models").raise_for_status()
    yield url
    server.stop()


def s3_credentials(url: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "s3cr3t",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "unrelated": "key",
    }


def put(url: str, key: str, data: bytes) -> None:
    from obstore.store import S3Store

    config: Any = {key: value for key, value in s3_credentials(url).items() if key.startswith("AWS_")}
    S3Store("models", config=config).put(key, data)


def test_s3_model_with_external_data_is_fetched(s3: str, world: World) -> None:
    put(s3, "fraud/3/model v1.onnx", external_model("weights"))
    put(s3, "fraud/3/weights", WEIGHTS)
    uri = "s3://models/fraud/3/model v1.onnx"
    artifact = world.fetch(uri, credentials=s3_credentials(s3))
    assert [file.name for file in artifact.files] == ["model v1.onnx", "weights"]
    seen: list[Progress] = []
    world.options = {"progress": seen.append}
    assert world.fetch(uri, credentials=s3_credentials(s3)) == artifact
    assert seen == []
    put(s3, "fraud/3/weights", bytes(16))
    assert world.fetch(uri, credentials=s3_credentials(s3)).sha256 != artifact.sha256
    assert seen


def test_s3_settings_of_the_process_environment_serve_as_well(
    s3: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, "env.onnx", MODEL)
    for key, value in s3_credentials(s3).items():
        monkeypatch.setenv(key, value)
    assert world.fetch("s3://models/env.onnx", sha256=DIGEST).sha256 == DIGEST


def test_s3_credentials_go_before_the_environment(s3: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    put(s3, "env.onnx", MODEL)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert world.fetch("s3://models/env.onnx", credentials=s3_credentials(s3)).sha256 == DIGEST


@pytest.mark.parametrize("uri", ["s3://models/none.onnx", "s3://no-such-bucket/model.onnx"])
def test_s3_object_that_is_not_there_is_not_found(uri: str, s3: str, world: World) -> None:
    assert "check spec.model.uri" in world.refusal(uri, Reason.NOT_FOUND, credentials=s3_credentials(s3))


def test_s3_refused_key_names_the_secret(s3: str, world: World) -> None:
    import httpx

    put(s3, "model.onnx", MODEL)
    httpx.post(f"{s3}/moto-api/reset-auth", content=b"0").raise_for_status()
    try:
        message = world.refusal("s3://models/model.onnx", Reason.FETCH_FAILED, credentials=s3_credentials(s3))
    finally:
        httpx.post(f"{s3}/moto-api/reset-auth", content=b"inf").raise_for_status()
    assert "access was refused, HTTP 403 Forbidden" in message
    assert "put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message
    assert "spec.model.credentials.secretRef" in message


def test_s3_plain_http_needs_to_be_allowed(s3: str, world: World) -> None:
    credentials = s3_credentials(s3) | {"AWS_ALLOW_HTTP": "false"}
    message = world.refusal("s3://models/model.onnx", Reason.FETCH_FAILED, credentials=credentials)
    assert "AWS_" in message
    assert "ALLOW_HTTP=true" in message


def test_s3_setting_that_does_not_exist_is_named(s3: str, world: World) -> None:
    credentials = s3_credentials(s3) | {"AWS_ACESS_KEY": "typo"}
    message = world.refusal("s3://models/model.onnx", Reason.FETCH_FAILED, credentials=credentials)
    assert "aws_acess_key" in message


def test_s3_setting_that_is_wrong_keeps_its_value_to_itself(s3: str, world: World) -> None:
    credentials = s3_credentials(s3) | {"AWS_SKIP_SIGNATURE": "s3cr3t value"}
    assert "boolean" in world.refusal("s3://models/model.onnx", Reason.FETCH_FAILED, credentials=credentials)


def test_gcs_object_is_asked_for_at_its_endpoint(world: World, web: Web) -> None:
    web.put("/models/fraud%2Fmodel%2Eonnx", Answer(MODEL, headers=STAMPS))
    credentials = trusting(web, GOOGLE_BASE_URL=web.url, GOOGLE_SKIP_SIGNATURE="true")
    assert world.fetch("gs://models/fraud/model.onnx", credentials=credentials).sha256 == DIGEST


def test_gcs_key_that_is_none_is_told_without_its_text(world: World) -> None:
    message = world.refusal(
        "gs://models/model.onnx", Reason.FETCH_FAILED, credentials={"GOOGLE_SERVICE_ACCOUNT_KEY": '{"key": "s3cr3t"'}
    )
    assert "GOOGLE_SERVICE_ACCOUNT_KEY" in message


def test_azure_blob_is_asked_for_with_a_signature(world: World, web: Web) -> None:
    web.put("/models/fraud/model.onnx", Answer(MODEL, headers=STAMPS))
    credentials = trusting(
        web,
        AZURE_STORAGE_ACCOUNT_NAME="account",
        AZURE_STORAGE_ACCOUNT_KEY="czNjcjN0",
        AZURE_STORAGE_ENDPOINT=web.url,
    )
    assert world.fetch("az://models/fraud/model.onnx", credentials=credentials).sha256 == DIGEST
    assert web.requests[0][1]["authorization"].startswith("SharedKey account:")


def test_azure_without_account_says_what_is_missing(world: World) -> None:
    message = world.refusal("az://models/model.onnx", Reason.FETCH_FAILED, credentials={})
    assert "the credentials name no storage account" in message
    assert "AZURE_STORAGE_ACCOUNT_NAME" in message
