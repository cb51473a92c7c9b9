"""What keeps a node from taking part, found before it tries: each check says what it found and what to do about it."""

import importlib.metadata
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import torch
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from corolla.adapters import base_hash, find_base, require_mixable
from corolla.client.config import DataConfig
from corolla.client.data import client_sources

CLOCK_SECONDS = 30.0
"""Flower's node authentication signs the time: a request from too far off is refused."""

EXPIRY_DAYS, FREE_GIB = 30, 2.0


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it is fit, what was found, and the cure where it is not."""

    what: str
    fit: bool
    found: str
    cure: str = ""


@dataclass(frozen=True)
class Patient:
    """What is to be examined: the node's configuration, its folder of keys, the server's proxy as HOST:PORT, and the
    hash that its base must have; None for what is not there to be examined."""

    node: Mapping[str, Any]
    secrets: Path | None = None
    server: str | None = None
    hash: str | None = None


def examine(patient: Patient) -> Iterator[Finding]:
    """Every check that applies; one that fails for a reason nobody foresaw is a finding too."""
    for check in CHECKS:
        try:
            yield from check(patient)
        except Exception as error:  # a doctor reports what it runs into
            name = check.__name__.removeprefix("_")
            yield Finding(name, False, f"{type(error).__name__}: {error}", "mend what the message names")


def _versions(patient: Patient) -> Iterator[Finding]:
    names = ("corolla", "flwr", "torch", "transformers", "peft")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    yield Finding("versions", True, f"{found}: corolla must be the server's, flwr the same 1.x")


def _device(patient: Patient) -> Iterator[Finding]:
    wanted = str(patient.node.get("device", "auto"))
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield Finding("device", free > FREE_GIB * 2**30, found, "end what else uses the GPU: nvidia-smi lists it")
    else:
        cure = "install a driver and a CUDA build of torch, give the container the GPU, or set device='cpu'"
        yield Finding("device", wanted in ("auto", "cpu"), f"no GPU, device = {wanted!r}", cure)


def _memory(patient: Patient) -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    found = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    yield Finding(
        "memory", memory.available > FREE_GIB * 2**30, found, "end other programs; corolla plan says what a rank needs"
    )


def _disk(patient: Patient) -> Iterator[Finding]:
    if not (state := patient.node.get("state")):
        return
    folder = Path(str(state)).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".doctor"
    probe.write_bytes(b"x")
    probe.unlink()
    free = psutil.disk_usage(str(folder)).free
    yield Finding(
        "disk", free > FREE_GIB * 2**30, f"{folder} is writable, {free / 2**30:.1f} GiB free", "make room there"
    )


def _base(patient: Patient) -> Iterator[Finding]:
    if not (name := patient.node.get("model")):
        yield Finding("base", True, "none named by the node: the run's model.name must be found here")
        return
    found = base_hash(find_base(str(name)))
    cure = f"the federation's base has {patient.hash}: copy the same checkpoint, tokenizer included"
    yield Finding("base", patient.hash in (None, found), f"{name} has the hash {found}", cure)


def _data(patient: Patient) -> Iterator[Finding]:
    if not patient.node.get("data"):
        yield Finding("data", True, "none named by the node: the run's data.train must be found here")
        return
    own = {"train": str(patient.node["data"]), "held_out": patient.node.get("held-out")}
    train, held_out = client_sources(DataConfig(**own), "doctor", 0, 1, 0)
    found = f"{own['train']}: {len(train)} rows to train on, {len(held_out or ())} held out"
    yield Finding("data", len(train) > 0, found, "put examples into the file")


def _kind(patient: Patient) -> Iterator[Finding]:
    if not (kind := patient.node.get("kind")):
        return
    try:
        require_mixable(str(kind))
        yield Finding("kind", True, f"{kind}: for runs with clients.kinds")
    except ValueError as error:
        yield Finding("kind", False, str(error), "name another one, or leave it to the run's clients.kinds")


def _keys(patient: Patient) -> Iterator[Finding]:
    if not patient.secrets:
        return
    folder = patient.secrets
    private = serialization.load_ssh_private_key((folder / "node.key").read_bytes(), None)
    mode = (folder / "node.key").stat().st_mode & 0o077
    yield Finding("key", not mode, f"{folder / 'node.key'}", f"others can read it: chmod 600 {folder / 'node.key'}")
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    own, named = private.public_key().public_bytes(encoding, form), (folder / "node.pub").read_bytes().strip()
    yield Finding("key pair", own == named, "node.key and node.pub", "they do not belong together: make new ones")
    for name in ("ca.crt", "runtime.pem"):
        certificate = x509.load_pem_x509_certificate((folder / name).read_bytes())
        days = (certificate.not_valid_after_utc - datetime.now(UTC)).days
        yield Finding(name, days > EXPIRY_DAYS, f"valid for {days} days", "make new ones: corolla keys, docs/deploy.md")


def _server(patient: Patient) -> Iterator[Finding]:
    if not patient.server:
        return
    host, _, port = patient.server.rpartition(":")
    if not host or not port.isdigit():
        yield Finding("server", False, f"{patient.server!r}", "name it as HOST:PORT")
        return
    try:
        socket.create_connection((host, int(port)), 10).close()
    except OSError as error:
        yield Finding("server", False, f"{patient.server}: {error}", "open the firewall to it, or mend the address")
        return
    authority = str(patient.secrets / "ca.crt") if patient.secrets else None
    context = ssl.create_default_context(cafile=authority)
    try:
        answers = {path: _post(patient.server, path, context) for path in ("fleet/get-run", "control/list-runs")}
    except httpx.HTTPError as error:
        cure = (
            "the server's certificate must name this host and be signed by the ca.crt in --secrets: corolla keys --host"
        )
        yield Finding("TLS", False, f"{patient.server}: {error}", cure)
        return
    yield Finding("server", True, f"{patient.server} answers over TLS")
    fleet, control = answers["fleet/get-run"], answers["control/list-runs"]
    cure = "the address must be the server's proxy (docker/nginx.conf) or a SuperLink"
    yield Finding("Fleet API", fleet.status_code in (400, 401, 415, 422), f"answers with {fleet.status_code}", cure)
    cure = "anybody who reaches it can run code on every client: put the proxy of docker/compose.yml in front"
    yield Finding("Control API", control.status_code in (403, 404), f"answers with {control.status_code}", cure)
    if when := fleet.headers.get("date"):
        off = time.time() - parsedate_to_datetime(when).timestamp()
        yield Finding("clock", abs(off) < CLOCK_SECONDS, f"{off:+.0f} s from the server's", "set it: NTP (timedatectl)")


def _post(server: str, path: str, context: ssl.SSLContext) -> httpx.Response:
    return httpx.post(f"https://{server}/v1/{path}", content=b"", verify=context, timeout=15, trust_env=False)


def _worker(patient: Patient) -> Iterator[Finding]:
    if not (path := patient.node.get("worker")):
        return
    with grpc.insecure_channel(f"unix:{path}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=3)
        except grpc.FutureTimeoutError:
            yield Finding("worker", False, f"none at {path}", f"start it: corolla worker --socket {path}")
            return
    yield Finding("worker", True, f"listens at {path}")


CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    _versions, _device, _memory, _disk, _base, _data, _kind, _keys, _server, _worker,
)  # fmt: skip
"""In the order in which an operator mends things."""
