"""From a client's files to encoded examples, dealt out round by round."""

from corolla.client.data.load import (
    ClientData,
    DataError,
    Encoded,
    State,
    client_sources,
    encode_source,
    load_client_data,
    read_questions,
    state_of,
)
from corolla.client.data.order import round_order
from corolla.client.data.sources import Source, read_source

__all__ = [
    "ClientData",
    "DataError",
    "Encoded",
    "Source",
    "State",
    "client_sources",
    "encode_source",
    "load_client_data",
    "read_questions",
    "read_source",
    "round_order",
    "state_of",
]
