"""One file a method: its rule for clients, its rule for the server, its source."""
