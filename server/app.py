"""The ServerApp: Flower's run config to `corolla.server.run`. A thin shell."""

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from corolla.client.answers import use_threads
from corolla.server.config import Config
from corolla.server.folder import RunFolder
from corolla.server.run import prepare_folder, run_server

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the configuration; a folder that `corolla simulate` has prepared is gone on with."""
    config = Config.from_flat(context.run_config)
    use_threads(config.run.threads)
    prepared = os.environ.get("COROLLA_RUN_FOLDER")
    folder = RunFolder.open(Path(prepared)) if prepared else prepare_folder(config)
    run_server(grid, config, folder)
