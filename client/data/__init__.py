"""From a client's files to encoded examples, dealt out round by round."""

from corolla.client.data.load import ClientData, encode_rows, load_client_data, read_rows
from corolla.client.data.order import round_order

__all__ = ["ClientData", "encode_rows", "load_client_data", "read_rows", "round_order"]
