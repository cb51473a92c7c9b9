"""What a client does: data, local training, evaluation, and what travels between it and the server."""
