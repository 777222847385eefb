"""A body whose model is mapped: only the name changes, byte for byte."""

import json
import time
import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limiter.config.settings import METERED_PATHS
from limiter.relay.requests.json_members import InvalidBody, MissingModel, read_members, with_model
from tests.support.openai_backend import Backend
from tests.support.relay import StartRelay, client_of

NUMBERS = [
    "18446744073709551616",
    "12345678901234567890123",
    "-9223372036854775809",
    "0.1000000000000000055511151231257827",
    "1E400",
    "-0.0",
    "1.0",
    "1e2",
    "9" * 5000,
]


@pytest.mark.parametrize(
    ("body", "renamed"),
    [
        ('{"model":"m"}', '{"model":"new"}'),
        (' \t\r\n{ "model" :\n"m" , "x" : 1 } \n', ' \t\r\n{ "model" :\n"new" , "x" : 1 } \n'),
        ('{"x":{"model":"m"},"model":"m"}', '{"x":{"model":"m"},"model":"new"}'),
        (
            '{"x":[{"model":"m"}],"model":"m","y":"\\"model\\":\\"m\\""}',
            '{"x":[{"model":"m"}],"model":"new","y":"\\"model\\":\\"m\\""}',
        ),
        ('{"model":"a","x":1,"model":"m"}', '{"model":"new","x":1,"model":"new"}'),
        ('{"model":{"model":[1,"}"]},"model":"m"}', '{"model":"new","model":"new"}'),
        ('{"model":null,"model":5,"model":"m"}', '{"model":"new","model":"new","model":"new"}'),
        ('{"\\u006dodel":"m"}', '{"\\u006dodel":"new"}'),
        ('{"Model":"m","model ":"m","model":"m"}', '{"Model":"m","model ":"m","model":"new"}'),
        ('{"model":"a\\"b\\\\","x":"y"}', '{"model":"new","x":"y"}'),
        ('{"ключ":"模型","model":"ü","😀":"😀"}', '{"ключ":"模型","model":"new","😀":"😀"}'),
        ('{"x":1,"x":2,"model":"m"}', '{"x":1,"x":2,"model":"new"}'),
        ('{"x":"a\\/b\\u00fc\\ud83d\\ude00","model":"m"}', '{"x":"a\\/b\\u00fc\\ud83d\\ude00","model":"new"}'),
        *((f'{{"a":{n},"model":"m","b":[{n}]}}', f'{{"a":{n},"model":"new","b":[{n}]}}') for n in NUMBERS),
    ],
)
def test_model_when_renamed_then_no_other_byte_changes(body: str, renamed: str) -> None:
    assert with_model(body.encode(), "new") == renamed.encode()


def test_model_when_its_new_name_needs_escapes_then_it_has_them() -> None:
    assert orjson.loads(with_model(b'{"model":"m"}', 'a"b\\c\n模')) == {"model": 'a"b\\c\n模'}


@pytest.mark.parametrize("depth", [1, 253, 254, 900])
@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_model_when_a_body_is_nested_as_deeply_as_is_accepted_then_it_is_renamed(depth: int, pair: str) -> None:
    begin = "[" if pair == "[]" else '{"model":'
    nested = begin * depth + '"]}"' + pair[1] * depth
    body = f'{{"x":{nested},"model":"m"}}'
    read_members(body.encode())
    assert with_model(body.encode(), "new").decode() == f'{{"x":{nested},"model":"new"}}'


def test_model_when_a_body_is_large_and_deep_then_no_time_is_lost_on_it() -> None:
    body = b'{"x":' + b"[" * 1000 + b"1" + b"]" * 1000 + b',"y":[' + b"[]," * 1_000_000 + b'1],"model":"m"}'
    began_s = time.process_time()
    assert with_model(body, "new").endswith(b',1],"model":"new"}'.replace(b",1]", b"1]"))
    deep = b'{"x":' + b"[" * 900 + b"[]," * 1_000_000 + b"1" + b"]" * 900 + b',"model":"m","y":"model"}'
    assert with_model(deep, "new").endswith(b',"model":"new","y":"model"}')
    assert time.process_time() - began_s < 5


@pytest.mark.parametrize("depth", [1_001, 1_000_000])
def test_body_when_it_is_nested_too_deeply_then_it_is_invalid(depth: int) -> None:
    body = b'{"x":' + b"[" * depth + b"]" * depth + b',"model":"m","y":"model"}'
    with pytest.raises(InvalidBody, match="deep"):
        read_members(body)
    with pytest.raises(InvalidBody, match="deep"):
        with_model(body, "new")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","model":"n"}',
        b'{"model":"m","\\u006dodel":"n"}',
        b'{"\\u006Dodel":"m","model":"n"}',
        b'{"model":"m","n":128,"n":1}',
        b'{"model":"m","n":128,"\\u006e":1}',
        b'{"model":"m","max\\u005ftokens":1,"max_tokens":2}',
        b'{"model":"m","max\\u005Ftokens":1,"x":{"max_tokens":1},"max_tokens":2}',
        b'{"model":"m","input":"a","x":"\\u0061","input":["a"]}',
    ],
)
def test_body_when_a_known_member_is_there_twice_then_it_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidBody, match="twice"):
        read_members(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"x":[{"model":"x","n":9}],"model":"m","n":1,"y":"\\"model\\":\\"z\\""}',
        b'{"tools":[{"required":["model","n"]}],"model":"m","n":1}',
        b'{"\\u006dodel":"m","\\u006e":1,"model ":"x","Model":"y"}',
        b'{"x":"a text about \\\\u0061","model":"m" , "n" : 1 , "x" : 2}',
        b' \n{"n":1, "model" : "m" } ',
    ],
)
def test_member_when_its_name_is_elsewhere_or_escaped_then_its_value_is_that_of_the_top_level(body: bytes) -> None:
    members = read_members(body)
    assert (members.model, bytes(members.n), bytes(members.stream)) == ("m", b"1", b"")
    assert orjson.loads(with_model(body, "new")) == {**orjson.loads(body)} | {"model": "new"}


@pytest.mark.parametrize("body", [b'{"n":1}', b'{"model":5}', b'{"model":null}', b'{"model":""}', b'{"model":["m"]}'])
def test_body_when_it_names_no_model_then_that_is_said(body: bytes) -> None:
    with pytest.raises(MissingModel):
        read_members(body)
    with pytest.raises(MissingModel):
        read_members(b'{"model":"' + b"m" * 2000 + b'"}')


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b"1", b'"model"', b"{", b'{"model":"m"', b'{"model":"m"}x', b'{"model":"m",}', b'{"model":"m","x":-}',
     b'{"model":"m","x":"\xff"}', b'{"model":"\xff"}', b'\xef\xbb\xbf{"model":"m"}', b'{"model":"m","x":"\xe6\xa8"}'],
)  # fmt: skip
def test_body_when_it_is_no_json_object_then_it_is_invalid(body: bytes) -> None:
    with pytest.raises(InvalidBody) as raised:
        read_members(body)
    assert not isinstance(raised.value, MissingModel)


@pytest.mark.parametrize(
    "filling",
    [b"[],", b'{"":0},', b"1,", b'"model",', b'"\\u006d",', '"模😀",'.encode()],
    ids=["lists", "objects", "numbers", "names", "escapes", "text"],
)
def test_body_when_it_is_of_very_many_values_then_it_is_read_without_building_them(filling: bytes) -> None:
    body = b'{"x":[' + filling * (4_000_000 // len(filling)) + b'0],"model":"m"}'
    tracemalloc.start()
    try:
        assert read_members(body).model == "m"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert with_model(body, "new") == body[:-3] + b'new"}'


def test_body_when_it_has_very_many_members_then_it_is_read_without_building_them() -> None:
    body = b'{"model":"m"' + b"".join(b',"%07x":1' % number for number in range(300_000)) + b"}"
    tracemalloc.start()
    try:
        assert read_members(body).model == "m"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(InvalidBody, match="more than 1000 members"):
        read_members(body[:-1] + b',"model":"n"}')


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
documents = st.dictionaries(
    TEXT,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
        lambda inner: st.lists(inner) | st.dictionaries(TEXT | st.just("model"), inner),
    ),
)


@given(document=documents, old=TEXT, new=TEXT, indent=st.sampled_from([None, 1, "\t"]), ascii_only=st.booleans())
def test_model_when_any_body_is_renamed_then_it_reads_as_if_written_with_the_name(
    document: dict[str, Any], old: str, new: str, indent: Any, *, ascii_only: bool
) -> None:
    written = json.dumps({**document, "model": old}, indent=indent, ensure_ascii=ascii_only)
    found = with_model(written.encode(), new)
    wanted = {**document, "model": new}
    again = json.dumps(wanted, indent=indent, ensure_ascii=ascii_only).encode()
    assert json.loads(found) == json.loads(again)


@pytest.mark.parametrize("path", [path for path in METERED_PATHS if path != "/v1/audio/transcriptions"])
@pytest.mark.parametrize("name", ["gemini", "hardware"])
async def test_request_when_its_model_is_mapped_then_a_backend_gets_the_bytes_of_the_client(
    start_relay: StartRelay, gemini: Backend, path: str, name: Any
) -> None:
    relay = await start_relay(client_of(name, gemini.url, models={"recap": "llama"}))
    numbers = ",".join(number for number in NUMBERS if abs(float(number)) < float("inf"))
    for model, sent in (("plain", "plain"), ("recap", "llama")):
        body = f'{{ "x" : [{numbers}], "x":1,\n"model": "%s", "messages":[]}}'
        answer = await relay.send(
            "POST", path, (body % model).encode(), X_Install_Id=relay.install_id, Content_Type="application/json"
        )
        assert answer.status == 200
        assert gemini.last.body.decode() == body % sent
