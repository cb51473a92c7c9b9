"""What the server does: the configuration, the Flower strategy, validation, and the folder of a run."""
