"""One evaluation while it is open: who was asked, and which numbers came back."""

from collections.abc import Collection, Iterable

from flwr.app import Message
from flwr.common.logger import log

from corolla.client.protocol import unpack_metrics
from corolla.server.validation import Rejected, check_evaluation, reason_of


class OpenEvaluation:
    """What `clients` were asked, until it is collected: after that, nothing more is taken in."""

    def __init__(self, clients: Collection[str]) -> None:
        self._asked = set(clients)

    def collect(
        self, replies: Iterable[Message], deadline: float
    ) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
        """The numbers by client, and the reason for every client without any; both sorted."""
        found: dict[str, dict[str, float]] = {}
        failed: dict[str, str] = {}
        for message in replies:
            client = message.metadata.group_id.partition(":")[2]
            try:
                found[client] = self._numbers(message, client)
            except ValueError as error:
                failed[reason_of(client or "unknown")] = reason_of(error)
        for client in self._asked - found.keys() - failed.keys():
            failed[client] = f"no reply within {deadline:g} s"
        self._asked = set()
        for client, reason in sorted(failed.items()):
            log(30, "evaluation by %s failed: %s", client, reason)
        return dict(sorted(found.items())), dict(sorted(failed.items()))

    def _numbers(self, message: Message, client: str) -> dict[str, float]:
        """A client's numbers. Raises ValueError where it failed, was not asked, or sent what are no numbers."""
        if client not in self._asked:
            raise Rejected(f"an evaluation must have been asked for, got {message.metadata.group_id!r}")
        if message.has_error():
            raise Rejected(f"the client failed: {message.error.reason or message.error.code}")
        metrics = unpack_metrics(message.content)
        check_evaluation(metrics)
        return metrics
