"""The proxy of docker/nginx.conf as a process: what it does while the SuperLink behind it moves."""

import http.server
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from corolla.server.keys import write_keys

CONFIG = Path(__file__).parents[1] / "docker" / "nginx.conf"

pytestmark = [pytest.mark.process, pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx")]


def free_port(kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def name_server(addresses):
    """A name server's port; every name has the last of `addresses`, for a second."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def answer():
            while True:
                try:
                    asked, whom = server.recvfrom(512)
                except OSError:
                    return
                question = asked[12 : asked.index(b"\0", 12) + 5]
                found = b"\xc0\x0c\0\x01\0\x01\0\0\0\x01\0\x04" + socket.inet_aton(addresses[-1])
                server.sendto(asked[:2] + b"\x81\x80\0\x01\0\x01\0\0\0\0" + question + found, whom)

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]


@contextmanager
def superlink(address, port, secrets):
    """What stands for a SuperLink at an address: it answers with that and the path it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            body = f"{address} {self.path}".encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer((address, port), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(secrets / "server" / "server.pem", secrets / "server" / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def proxy(folder, secrets, names, port, behind):
    """nginx with the file's own words, but for ports, the name server's address and where files are."""
    text = CONFIG.read_text().replace("/tmp/nginx", f"{folder}/nginx").replace("0.0.0.0:8443", f"127.0.0.1:{port}")
    text = text.replace("superlink:8000", f"superlink:{behind}").replace("/secrets/", f"{secrets}/server/")
    text = re.sub(r"127\.0\.0\.11 valid=\S+", f"127.0.0.1:{names} valid=1s", text)
    (folder / "nginx.conf").write_text(text)
    words = ["nginx", "-g", "daemon off;", "-c", folder / "nginx.conf", "-p", folder]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def post(port, secrets, path):
    context = ssl.create_default_context(cafile=str(secrets / "ca.crt"))
    request = urllib.request.Request(f"https://127.0.0.1:{port}{path}", data=b"x", method="POST")
    try:
        with urllib.request.urlopen(request, context=context, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def until(wanted, ask, seconds=20.0):
    end = time.monotonic() + seconds
    while (found := ask()) != wanted and time.monotonic() < end:
        time.sleep(0.2)
    return found


def test_a_superlink_with_another_address_is_found_and_paths_arrive_as_they_were_checked(tmp_path):
    secrets, addresses = tmp_path / "secrets", ["127.0.0.2"]
    write_keys(secrets, [], ["superlink"])
    port, behind = free_port(), free_port()
    with name_server(addresses) as names, proxy(tmp_path, secrets, names, port, behind):
        with superlink("127.0.0.2", behind, secrets):
            first = "127.0.0.2 /v1/fleet/get-run"
            assert until(first, lambda: post(port, secrets, "/v1/fleet/get-run")) == first
            assert post(port, secrets, "/v1/control/list-runs") == 403
            assert post(port, secrets, "/v1/control/../fleet/get-run") == first
        addresses.append("127.0.0.3")
        with superlink("127.0.0.3", behind, secrets):
            second = "127.0.0.3 /v1/fleet/get-run"
            assert until(second, lambda: post(port, secrets, "/v1/fleet/get-run")) == second
