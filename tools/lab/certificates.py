"""The cluster's identities: two authorities, a certificate for each component, the kubeconfig files made of them.

`openssl` does the cryptography. The extensions are those that strict verifiers ask for (Python 3.13's among them).
"""

import base64
import subprocess
from pathlib import Path

from . import LabError

_DAYS = "3650"
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make_authority(folder: Path, name: str) -> None:
    """Write `name`.crt and `name`.key: a certificate authority."""
    _openssl(
        *("req", "-x509", *_NEW_KEY, "-days", _DAYS, "-subj", f"/CN=phoenix-lab-{name}"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"),
        *("-keyout", f"{folder / name}.key", "-out", f"{folder / name}.crt"),
    )


def make_certificate(
    folder: Path, name: str, *, subject: str, authority: str, names: tuple[str, ...] = (), is_expired: bool = False
) -> None:
    """Write `name`.crt and `name`.key, good for a server known by `names` (`DNS:…`, `IP:…`) and for a client."""
    path = folder / name
    _openssl("req", *_NEW_KEY, "-subj", subject, "-keyout", f"{path}.key", "-out", f"{path}.csr")
    extensions = [
        "basicConstraints=critical,CA:FALSE",
        "keyUsage=critical,digitalSignature,keyEncipherment",
        "extendedKeyUsage=serverAuth,clientAuth",
        "subjectKeyIdentifier=hash",
        "authorityKeyIdentifier=keyid",
    ]
    if names:
        extensions.append("subjectAltName=" + ",".join(names))
    Path(f"{path}.ext").write_text("\n".join(extensions) + "\n")
    _openssl(
        *(
            "x509",
            "-req",
            "-in",
            f"{path}.csr",
            "-days",
            "0" if is_expired else _DAYS,
            "-extfile",
            f"{path}.ext",
            "-out",
            f"{path}.crt",
        ),
        *("-CA", f"{folder / authority}.crt", "-CAkey", f"{folder / authority}.key", "-CAcreateserial"),
    )
    for leftover in (f"{path}.csr", f"{path}.ext"):
        Path(leftover).unlink()


def make_key_pair(folder: Path, name: str) -> None:
    """Write `name`.key and `name`.pub, with which service account tokens are signed and checked."""
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-out", f"{folder / name}.key")
    _openssl("pkey", "-in", f"{folder / name}.key", "-pubout", "-out", f"{folder / name}.pub")


def kubeconfig(server: str, *, authority: bytes, certificate: bytes, key: bytes) -> str:
    """The text of a kubeconfig whose files are all inside it, so that it can be copied."""

    def inline(data: bytes) -> str:
        return base64.b64encode(data).decode()

    return f"""\
apiVersion: v1
kind: Config
current-context: phoenix-lab
contexts:
- name: phoenix-lab
  context: {{cluster: phoenix-lab, user: phoenix-lab}}
clusters:
- name: phoenix-lab
  cluster:
    server: {server}
    certificate-authority-data: {inline(authority)}
users:
- name: phoenix-lab
  user:
    client-certificate-data: {inline(certificate)}
    client-key-data: {inline(key)}
"""


def write_kubeconfig(path: Path, *, pki: Path, user: str, server: str) -> None:
    """Write the kubeconfig of `user`, whose certificate is in `pki`."""
    text = kubeconfig(
        server,
        authority=(pki / "ca.crt").read_bytes(),
        certificate=(pki / f"{user}.crt").read_bytes(),
        key=(pki / f"{user}.key").read_bytes(),
    )
    path.touch(mode=0o600)
    path.write_text(text)


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
