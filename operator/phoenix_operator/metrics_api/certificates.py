"""The serving certificate: how it is made, read and judged. The only importer of `cryptography`; no I/O.

Each is signed by an authority of its own whose key is thrown away at once, so that no key that signs is ever stored.
The authorities before it are kept beside it until they expire: while replicas change over, the API server trusts both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_SKEW = timedelta(minutes=5)  # of the clocks of those who verify it
_MOST_AUTHORITIES = 3


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with its key, and whom to trust to accept it, newest first. All PEM."""

    certificate: bytes
    key: bytes
    authorities: bytes = b""

    def __repr__(self) -> str:
        return "Pair(...)"  # a key belongs in no log


class CertificateError(Exception):
    """A certificate or key that cannot be used; the message holds no part of it."""


def make(names: Sequence[str], *, lifetime: timedelta, now: datetime, before: bytes = b"") -> Pair:
    """Return a new certificate for a server of these DNS names. `before` are the authorities that still count."""
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    # each has a name of its own: with the same name, verifiers would mix up an authority with the one before it
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{names[0]} {x509.random_serial_number():x}"[:64])])
    authority = (
        _builder(subject, subject, authority_key.public_key(), now, lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_authority=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    known_as = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
    leaf_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    certificate = (
        _builder(leaf_name, subject, key.public_key(), now, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(is_authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(known_as, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    authorities = [authority, *(old for old in _all(before) if old.not_valid_after_utc > now)][:_MOST_AUTHORITIES]
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Pair(_pem([certificate]), key_pem, _pem(authorities))


def expiry(pair: Pair) -> datetime:
    """Return when a certificate ends. Raises `CertificateError` for one that cannot be used with its key."""
    return _leaf(pair).not_valid_after_utc


def is_due(pair: Pair, names: Sequence[str], *, now: datetime) -> bool:
    """Return whether another should take its place: two thirds of its time are over, or it is not for these names."""
    try:
        leaf = _leaf(pair)
        known_as = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        has_names = set(names) <= set(known_as.get_values_for_type(x509.DNSName))
        is_trusted = any(_signed(leaf, authority) for authority in _all(pair.authorities))
    except (CertificateError, x509.ExtensionNotFound):
        return True
    start, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    return not (has_names and is_trusted and now < start + (end - start) * 2 / 3)


def _leaf(pair: Pair) -> x509.Certificate:
    found = _all(pair.certificate)
    try:
        key = serialization.load_pem_private_key(pair.key, password=None)
        is_pair = bool(found) and found[0].public_key() == key.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError("tls.key: expected a private key in PEM without a password") from None
    if not is_pair:
        raise CertificateError("tls.crt: expected the certificate of tls.key in PEM")
    return found[0]


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # one of many kinds, by what differs
        return False
    return True


def _all(pem: bytes) -> list[x509.Certificate]:
    if not pem.strip():
        return []
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise CertificateError("expected certificates in PEM") from None


def _pem(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    start = now.astimezone(UTC) - _SKEW
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
