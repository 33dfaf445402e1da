"""Makes a container image from files, without an engine: an OCI archive that `ctr images import` takes."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_archive(out: Path, name: str, *, files: Mapping[str, bytes], entrypoint: Sequence[str], cpu: str) -> None:
    """Write an image of one layer to `out`. `files` maps paths without leading slash to contents, all executable."""
    blobs: dict[str, bytes] = {}

    def add(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    layer = _tar(files)
    config = {
        "architecture": cpu,
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint), "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    kind = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{kind}.manifest.v1+json",
        "config": add(json.dumps(config).encode(), f"{kind}.config.v1+json"),
        "layers": [add(layer, f"{kind}.layer.v1.tar")],
    }
    entry = add(json.dumps(manifest).encode(), f"{kind}.manifest.v1+json")
    entry["annotations"] = {"io.containerd.image.name": name}
    index = {"schemaVersion": 2, "mediaType": f"{kind}.index.v1+json", "manifests": [entry]}
    contents = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(index).encode()}
    out.write_bytes(_tar(contents | {f"blobs/sha256/{digest}": data for digest, data in blobs.items()}))


def _tar(files: Mapping[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
    return archive.getvalue()
