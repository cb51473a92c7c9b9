import json
import os
import ssl
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from corolla.adapters import base_hash, find_base
from corolla.client.doctor import Patient, examine
from corolla.server.keys import write_keys


@pytest.fixture
def keys(tmp_path):
    write_keys(tmp_path / "secrets", ["node-1", "node-2"], ["localhost"])
    return tmp_path / "secrets"


@pytest.fixture
def server(keys):
    """A server that answers as the proxy does, or as a SuperLink without one; and its clock."""
    opened = {"control": 403, "late": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(401 if "/fleet/" in self.path else opened["control"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp=None):
            import time

            return super().date_time_string(time.time() - opened["late"])

        def log_message(self, *arguments):
            pass

    found = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server" / "server.pem", keys / "server" / "server.key")
    found.socket = context.wrap_socket(found.socket, server_side=True)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{found.server_port}", opened
    found.shutdown()


def troubles(patient):
    return {finding.what: finding for finding in examine(patient) if not finding.fit}


def node(tmp_path, model, **own):
    rows = [json.dumps({"prompt": "a", "completion": "b"}) for _ in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    return {"data": str(tmp_path / "train.jsonl"), "model": str(model), "state": str(tmp_path / "state")} | own


def test_a_fit_node_has_no_trouble(tmp_path, tiny_folder, keys, server):
    patient = Patient(
        node(tmp_path, tiny_folder), keys / "nodes" / "node-1", server[0], base_hash(find_base(str(tiny_folder)))
    )
    assert troubles(patient) == {}
    assert {"base", "data", "key pair", "Fleet API", "Control API", "clock"} <= {f.what for f in examine(patient)}


@pytest.mark.parametrize(
    ("own", "hash", "what", "cure"),
    [
        ({"data": "/nowhere/train.jsonl"}, None, "data", ""),
        ({"device": "cuda"}, None, "device", "driver"),
        ({"state": "/proc/nowhere"}, None, "disk", ""),
        ({"worker": "/nowhere.sock"}, None, "worker", "corolla worker --socket"),
        ({}, "another", "base", "same checkpoint"),
    ],
)
def test_each_trouble_is_found_with_its_cure(own, hash, what, cure, tmp_path, tiny_folder):
    found = troubles(Patient(node(tmp_path, tiny_folder, **own), hash=hash))
    assert list(found) == [what]
    assert cure in found[what].cure


def test_keys_that_do_not_belong_together_or_are_open_are_found(tmp_path, keys):
    one, two = keys / "nodes" / "node-1", keys / "nodes" / "node-2"
    (one / "node.pub").write_bytes((two / "node.pub").read_bytes())
    (one / "node.key").chmod(0o644)
    assert set(troubles(Patient({}, one))) == {"key", "key pair"}


def test_an_open_control_api_and_a_wrong_clock_are_found(keys, server):
    address, opened = server
    opened |= {"control": 200, "late": 90}
    assert set(troubles(Patient({}, keys / "nodes" / "node-1", address))) == {"Control API", "clock"}


def test_a_certificate_of_another_authority_is_found(tmp_path, keys, server):
    write_keys(tmp_path / "other", ["node-1"], ["localhost"])
    assert set(troubles(Patient({}, tmp_path / "other" / "nodes" / "node-1", server[0]))) == {"TLS"}


def test_keys_are_never_overwritten_and_private_ones_are_closed(keys):
    with pytest.raises(FileExistsError, match="never overwritten"):
        write_keys(keys, ["node-1"], [])
    authority = (keys / "ca.crt").read_bytes()
    write_keys(keys, ["node-3"], [])
    assert (keys / "nodes" / "node-3" / "ca.crt").read_bytes() == authority
    private = [path for path in Path(keys).rglob("*") if path.suffix in (".key", ".secret")]
    assert len(private) == 1 + 2 + 3 * 3
    assert all(os.stat(path).st_mode & 0o077 == 0 for path in private)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_a_name_that_is_no_folders_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="a node's name must be"):
        write_keys(tmp_path, [name], [])


def test_a_kind_that_cannot_be_beside_others_is_found():
    assert "kind" not in troubles(Patient({"kind": "svfit"}))
    found = troubles(Patient({"kind": "dora"}))["kind"]
    assert "got 'dora': it scales the rows" in found.found
    assert "clients.kinds" in found.cure
