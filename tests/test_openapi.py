"The description in /openapi.json, taken at its word: generated requests, good and bad, and what comes back."
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from conftest import free_port, serving
from samples import encoded, patch

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope='module')
def address(digits_run, tmp_path_factory):
    "Where a service listens."
    port = free_port()
    with serving(digits_run['bundle'], port, tmp_path_factory.mktemp('described')/'stderr', '--workers', 1): yield f'http://127.0.0.1:{port}'


@pytest.fixture(scope='module')
def described(address):
    "The service's own description, with a fixed seed."
    return schemathesis.openapi.from_url(f'{address}/openapi.json', config=SchemathesisConfig(seed=1))


PLACES = 'GET /health', 'GET /ready', 'GET /info', 'POST /predict'


@pytest.mark.parametrize('place, mode', [*((place, GenerationMode.POSITIVE) for place in PLACES), ('POST /predict', GenerationMode.NEGATIVE)])
def test_what_is_answered_is_what_is_described(described, place, mode):
    "Requests that the description allows, and requests that it does not."
    method, path = place.split()

    @given(case=described[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=60 if method == 'POST' else 5, deadline=None, derandomize=True, database=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def ask(case): case.call_and_validate(checks=CHECKS, timeout=20)
    ask()


def test_every_place_is_described(described):
    assert {operation.ok().label for operation in described.get_all_operations()} == set(PLACES)


def test_real_images_are_answered_as_described(described):
    "Bodies made of noise are refused: the answers that count are those to images, one and several."
    operation = described['/predict']['POST']
    files = [('file', ('a.png', encoded(patch('brick', i, 16), 'PNG'))) for i in range(2)] + [('file', ('b.png', b'no image'))]
    for kwargs, status in [(dict(data=files[0][1][1]), 200), (dict(files=files), 200), (dict(files=files[:1]), 200), (dict(data=b'no image'), 415)]:
        case = operation.Case(method='POST', query=dict(top=2), media_type='image/*')
        response = case.call(**kwargs)
        assert response.status_code == status, response.text
        case.validate_response(response, checks=CHECKS)
