"""Keys of a federation: a certificate authority, the server's certificate, and a key pair for every node.

They are what `flower-superlink`, `flower-supernode` and `flower-superexec` take. Made here they suit development and a
federation run by one hand; docs/deploy.md says what production does instead.
"""

import datetime
import ipaddress
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VALID_DAYS = 825
"""The longest that common TLS clients accept."""

LOCAL = ("localhost", "127.0.0.1")

CONNECTION = """\
# Flower's connections: FLWR_HOME is the folder of this file.
[superlink]
default = "prod"

[superlink.prod]
address = "{address}"
root-certificates = "{ca}"
"""


def write_keys(out: Path, nodes: Sequence[str], hosts: Sequence[str], address: str = "superlink:8000") -> list[Path]:
    """The folders that were written below `out`, each to be carried whole to its machine.

    `server/` is the SuperLink's, with a certificate for `hosts`; `nodes/<name>/` is a node's, `operator/` is Flower's
    home of whoever starts runs, at `address`; `ca.key` signs further nodes and belongs offline. Private files are
    readable by their owner alone. Nodes that are added later get the authority that is there. Raises FileExistsError
    where a node's or the server's folder exists already, ValueError for a name that is no folder's.
    """
    for name in nodes:
        if not name or not all(letter.isalnum() or letter in "._-" for letter in name) or name.startswith("."):
            raise ValueError(f"a node's name must be letters, digits, '.', '_' or '-', got {name!r}")
    targets = [out / "nodes" / name for name in nodes]
    if taken := [str(path) for path in targets if path.exists()]:
        raise FileExistsError(f"keys are never overwritten, got {taken[0]}: choose other names, or another --out")
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    key, certificate = _authority(out)
    made = []
    if not (server := out / "server").exists():
        _write_tls(server, "server", (*hosts, *LOCAL), key, certificate)
        _write_private(server / "runtime.secret", secrets.token_hex(32).encode())
        made.append(server)
    if not (operator := out / "operator").exists():
        operator.mkdir(mode=0o700)
        _write(operator / "ca.crt", _pem(certificate))
        _write(operator / "config.toml", CONNECTION.format(address=address, ca=operator.resolve() / "ca.crt").encode())
        made.append(operator)
    for folder in targets:
        _write_node(folder, certificate)
    return made + targets


def _write_node(folder: Path, authority: x509.Certificate) -> None:
    """A node's key pair for the SuperLink (OpenSSH, P-384), and TLS and a secret between its own processes."""
    node = ec.generate_private_key(ec.SECP384R1())
    encoding, raw = serialization.Encoding, serialization.PublicFormat.OpenSSH
    own = ec.generate_private_key(ec.SECP384R1())
    # Its own authority: a certificate of the federation's would let a node pass for the server.
    _write_tls(folder, "runtime", (folder.name, "node", *LOCAL), own, _self_signed(own, f"{folder.name} runtime"))
    _write(folder / "ca.crt", _pem(authority))
    private = node.private_bytes(encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    _write_private(folder / "node.key", private)
    _write(folder / "node.pub", node.public_key().public_bytes(encoding.OpenSSH, raw) + b"\n")
    _write_private(folder / "runtime.secret", secrets.token_hex(32).encode())


def _authority(out: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The authority in `out`, made where there is none."""
    if not (out / "ca.key").exists():
        key = ec.generate_private_key(ec.SECP384R1())
        _write(out / "ca.crt", _pem(_self_signed(key, "corolla authority")))
        _write_private(out / "ca.key", _private_pem(key))
    loaded = serialization.load_pem_private_key((out / "ca.key").read_bytes(), None)
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{out / 'ca.key'} must be a key on an elliptic curve, got {type(loaded).__name__}")
    return loaded, x509.load_pem_x509_certificate((out / "ca.crt").read_bytes())


def _self_signed(key: ec.EllipticCurvePrivateKey, name: str) -> x509.Certificate:
    return _sign(key, name, key.public_key(), name, (), authority=True)


def _write_tls(
    folder: Path, name: str, hosts: Iterable[str], key: ec.EllipticCurvePrivateKey, authority: x509.Certificate
) -> None:
    """`<name>.pem` for `hosts` signed by `authority`, its key, and the authority as `<name>-ca.crt`."""
    folder.mkdir(parents=True, mode=0o700)
    own = ec.generate_private_key(ec.SECP384R1())
    issuer = str(authority.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    names = list(dict.fromkeys(hosts))
    _write(folder / f"{name}.pem", _pem(_sign(key, issuer, own.public_key(), names[0], names, authority=False)))
    _write_private(folder / f"{name}.key", _private_pem(own))
    _write(folder / f"{name}-ca.crt", _pem(authority))


def _sign(
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    public: ec.EllipticCurvePublicKey,
    subject: str,
    hosts: Sequence[str],
    *,
    authority: bool,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(_usage(authority), critical=True)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return builder.sign(key, hashes.SHA384())


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write_private(path: Path, data: bytes) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_bytes(data)
