"""schemathesis asks what the server's own OpenAPI document allows, and much that it does not."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from standin import Scripted, serving, wait_for

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
GENTLE = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)


KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def guarded(make_engine):
    with serving(make_engine(), api_key="secret") as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", PATHS)
def test_the_document_is_kept(guarded, path, mode):
    document = schemathesis.openapi.from_url(f"{guarded.url}/openapi.json", headers=KEY)
    (operation,) = [o.ok() for o in document.get_all_operations() if o.ok().path == path]
    told = CHECKS + [checks.negative_data_rejection] * (mode is GenerationMode.NEGATIVE)

    @GENTLE
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case):
        case.validate_response(case.call(timeout=20, headers=KEY), checks=told)

    ask()
    assert guarded.get("/health").status_code == 200
    wait_for(lambda: guarded.here.active == 0)


def test_the_document_names_every_route():
    with serving(Scripted()) as running:
        told = running.get("/openapi.json").json()
    assert {*PATHS, "/v1/models", "/v1/models/{name}", "/health", "/metrics"} == set(told["paths"])
    answers = told["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= set(answers)
    assert "422" not in answers
    assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
