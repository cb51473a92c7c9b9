import socket
import urllib.request

import pytest

from corolla.server.metrics import serve_metrics

LINE = {
    "kind": "round", "round": 4, "successful": True, "seconds": 2.5, "update": {"norm": 0.5}, "received_loss": None,
    "clients": {"ann": {"bytes_up": 10, "bytes_down": 7}, "bob": {"bytes_up": 1}}, "quarantined": {"bob": "NaN"},
}  # fmt: skip


def test_what_prometheus_reads_is_what_the_lines_say(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("COROLLA_METRICS", f"127.0.0.1:{port}")
    take = serve_metrics()
    take({"kind": "evaluation"})
    take(LINE)
    take(LINE)
    take({**LINE, "round": 5, "successful": False, "update": {}})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        found = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    assert float(found["corolla_round"]) == 5
    assert float(found["corolla_update_norm"]) == 0.5
    assert float(found["corolla_failed_rounds_total"]) == 1
    assert float(found['corolla_quarantined_total{client="bob"}']) == 3
    assert float(found['corolla_adapter_bytes_total{client="ann",way="up"}']) == 30


def test_an_address_that_is_taken_costs_the_metrics_and_not_the_run(monkeypatch, caplog):
    """Two runs at a time are two ServerApps of one container."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("COROLLA_METRICS", f"127.0.0.1:{other.getsockname()[1]}")
        serve_metrics()(LINE)
    assert any("no metrics of this run" in record.getMessage() for record in caplog.records)


def test_without_an_address_nothing_is_served(monkeypatch):
    monkeypatch.delenv("COROLLA_METRICS", raising=False)
    assert serve_metrics()(LINE) is None


@pytest.mark.parametrize("address", ["9100", "host:", ":9100", "host:port"])
def test_another_form_of_address_is_refused(address, monkeypatch):
    monkeypatch.setenv("COROLLA_METRICS", address)
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        serve_metrics()
