import pytest

from tests.deploy.federation import as_simulated, federation


@pytest.fixture(scope="module")
def live(tmp_path_factory, tiny_folder):
    """A federation of three clients with their workers, one for each file of tests."""
    folder = tmp_path_factory.mktemp("federation")
    with federation(folder, tiny_folder, folder) as found:
        found.start_server()
        for k in (1, 2, 3):
            found.start_client(k, as_simulated(k))
        yield found
