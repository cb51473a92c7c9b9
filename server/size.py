"""How large a client's messages are, before they are sent."""

from collections.abc import Sequence

from corolla.aggregation import ClientRule, ClientShare
from corolla.client.protocol import Hello


def upload_bytes(hello: Hello, rank: int, rule: ClientRule) -> int:
    """Bytes of the reply of a client with this rank: what it trains of its modules, and its heads whole, in float32."""
    whole = "W" in rule.trains
    numbers = sum(out * inner for out, inner in hello.heads.values())
    for out, inner in hello.shapes.values():
        numbers += out * inner if whole else rank * (out * ("B" in rule.trains) + inner * ("A" in rule.trains))
        numbers += out * ("d" in rule.trains)
    return 4 * numbers


def too_large(hello: Hello, rank: int, rule: ClientRule, share: ClientShare, largest: float) -> str | None:
    """Why a client cannot be sent its share, or send its reply, in messages of `largest` GiB; None where it can."""
    cure = "set aggregation.download_rank, or aggregation.download_error higher"
    return _beyond("download", share.nbytes, largest, cure) or reply_too_large(hello, rank, [rule], largest)


def reply_too_large(hello: Hello, rank: int, rules: Sequence[ClientRule], largest: float) -> str | None:
    """Why a client cannot send its reply by any of the rules in a message of `largest` GiB; None where it can."""
    size = min(upload_bytes(hello, rank, rule) for rule in rules)
    return _beyond("reply", size, largest, "give the client a smaller rank, or fewer target modules")


def _beyond(way: str, size: int, largest: float, cure: str) -> str | None:
    if size <= largest * 2**30:
        return None
    return (
        f"a message must have at most run.largest_message = {largest:g} GiB, got a {way} of {size / 2**30:.2f} GiB: "
        f"{cure}, or raise it as docs/deploy.md says"
    )
