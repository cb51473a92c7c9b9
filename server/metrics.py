"""Prometheus metrics of a run, where COROLLA_METRICS names an address to serve them at (`corolla[metrics]`)."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from flwr.common.logger import log


def serve_metrics() -> Callable[[Mapping[str, Any]], None]:
    """Takes each line of metrics.jsonl; serves http://ADDRESS/metrics for COROLLA_METRICS=HOST:PORT, else does nothing.

    An address that is taken, as by another run at the same time, costs the metrics and not the run: the log says so.
    Raises ValueError for another form of address, ImportError without prometheus-client.
    """
    address = os.environ.get("COROLLA_METRICS", "")
    if not address:
        return lambda line: None
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"COROLLA_METRICS must be HOST:PORT, such as 0.0.0.0:9100, got {address!r}")
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise ImportError("COROLLA_METRICS needs prometheus-client: pip install 'corolla[metrics]'") from error
    registry = CollectorRegistry()
    take = _collect(registry)
    try:
        start_http_server(int(port), host, registry=registry)
    except OSError as error:
        log(30, "no metrics of this run: COROLLA_METRICS = %s cannot be listened on, got %s", address, error)
    return take


def _collect(registry: Any) -> Callable[[Mapping[str, Any]], None]:
    from prometheus_client import Counter, Gauge

    gauges = {
        name: Gauge(f"corolla_{name}", text, registry=registry)
        for name, text in (
            ("round", "rounds done, failed ones counted"),
            ("clients", "clients asked in the last round"),
            ("update_norm", "Frobenius norm of the last round's update"),
            ("received_loss", "mean probe loss of the model that the last round began with"),
            ("round_seconds", "duration of the last round"),
        )
    }
    failed = Counter("corolla_failed_rounds", "rounds that changed nothing", registry=registry)
    quarantined = Counter("corolla_quarantined", "replies kept out, by client", ["client"], registry=registry)
    moved = Counter(
        "corolla_adapter_bytes", "bytes of adapters, by client and way", ["client", "way"], registry=registry
    )

    def take(line: Mapping[str, Any]) -> None:
        if line["kind"] != "round":
            return
        found = {"round": line["round"], "clients": len(line["clients"]), "round_seconds": line["seconds"]}
        found |= {"update_norm": line["update"].get("norm"), "received_loss": line.get("received_loss")}
        for name, value in found.items():
            if value is not None:
                gauges[name].set(value)
        failed.inc(not line["successful"])
        for client in line["quarantined"]:
            quarantined.labels(client).inc()
        for client, facts in line["clients"].items():
            for way in ("up", "down"):
                moved.labels(client, way).inc(facts.get(f"bytes_{way}", 0))

    return take
