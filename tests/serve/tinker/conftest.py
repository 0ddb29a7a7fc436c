import warnings
from importlib.util import find_spec

import pytest

if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "llguidance", "prometheus_client", "tinker")):
    pytest.skip("a server for Tinker's SDK needs posttrain[tinker]", allow_module_level=True)

import tinker
from tests.serve.conftest import in_thread

from posttrain.serve.options import ServeOptions
from posttrain.serve.tinker.options import TinkerOptions
from posttrain.serve.tinker.run import run_tinker

warnings.filterwarnings("ignore", category=FutureWarning, module="tinker")
KEY = "tml-nothing"


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch):
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


def running(models, folder, *, serve=None, **options):
    """A server on a free port."""
    serving_options = ServeOptions(**{"port": 0, "drain_s": 5.0, "max_body_bytes": 1 << 20, **(serve or {})})
    given = TinkerOptions({name: str(source) for name, source in models.items()}, folder, serving_options, **options)
    return in_thread(lambda ready: run_tinker(given, ready))


@pytest.fixture(name="running", scope="session")
def running_fixture():
    return running


@pytest.fixture(scope="session")
def bases(model_dir):
    """A base whose head is its own, and one whose head is its embedding."""
    return {"tiny": model_dir("llama"), "tied": model_dir("qwen3")}


@pytest.fixture(scope="session")
def serving(bases, tmp_path_factory):
    """One server for tests that leave it as it is, but for models of their own."""
    with running(bases, tmp_path_factory.mktemp("tinker")) as found:
        yield found


@pytest.fixture(name="client_of", scope="session")
def client_of_fixture():
    return client_of


def client_of(serving, key=KEY):
    address = serving if isinstance(serving, str) else serving.address
    return tinker.ServiceClient(base_url=address, api_key=key)


@pytest.fixture
def client(serving):
    with client_of(serving) as found:
        yield found


def datum(ids, weights=None, **streams):
    """A datum of the whole sequence `ids`, shifted by one; weights and streams are those of the targets."""
    inputs = {"target_tokens": list(ids[1:]), **streams}
    if weights is not None:
        inputs["weights"] = [float(weight) for weight in weights]
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(list(ids[:-1])), loss_fn_inputs=inputs)


@pytest.fixture(name="datum", scope="session")
def datum_fixture():
    return datum
