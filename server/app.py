"""The ServerApp: Flower's run config to `corolla.server.run`. A thin shell."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from corolla.client.events import emit, use_json_logs
from corolla.client.process import MESSAGES, keep_freed_memory_low, use_threads
from corolla.server.config import Config
from corolla.server.folder import CONFIG, RunFolder
from corolla.server.metrics import serve_metrics
from corolla.server.run import prepare_folder, run_server

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the configuration; a folder that `corolla simulate` has prepared is gone on with."""
    config = Config.from_flat(context.run_config)
    use_threads(config.run.threads)
    keep_freed_memory_low(MESSAGES)
    if prepared := os.environ.get("COROLLA_RUN_FOLDER"):
        run_server(grid, config, RunFolder.open(Path(prepared)))
        return
    use_json_logs()
    take = serve_metrics()

    def tell(line: Mapping[str, Any]) -> None:
        take(line)
        emit(line)

    resume = config.run.resume and (Path(config.run.out) / CONFIG).is_file()
    folder = prepare_folder(config, resume)
    emit({"kind": "begin", "run": folder.run_id(), "rounds": config.run.rounds, "resumed": resume})
    run_server(grid, config, folder, tell)
