"""`corolla adapters`: a row a kind, with the bytes that a client then really sends."""

from unittest.mock import patch

import tomli_w
from rich.console import Console
from typer.testing import CliRunner

from corolla import cli, kinds, simulate, terminal
from corolla.adapters import KINDS
from tests.simulations.federation import tiny_config


def test_every_kind_is_listed_with_what_it_sends(tiny_folder, tmp_path):
    def config(kind):
        run = {"rounds": 1, "evaluate": "never", "clients_per_round": 1}
        return tiny_config(tiny_folder, tmp_path / kind, adapter={"kind": kind}, clients={"ranks": (4,)}, run=run)

    path = tmp_path / "my.toml"
    path.write_text(tomli_w.dumps(config("lora").model_dump(exclude_none=True, mode="json")))
    wide = Console(width=200)
    with patch.object(kinds, "console", wide), patch.object(terminal, "console", wide):
        done = CliRunner().invoke(cli.app, ["adapters", str(path)])
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line for line in done.output.splitlines() if line[:1].islower()}
    for kind in ("lora", *KINDS):
        (sent,) = simulate(config(kind)).metrics[0]["clients"].values()
        assert f" {sent['bytes_up'] / 1024:.1f} " in rows[kind]
