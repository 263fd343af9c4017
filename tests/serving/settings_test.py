"""Checks settings of `serve`, before jax, a web framework or a bundle is loaded."""

import socket
import subprocess
import sys

import pytest

from musicrl_jax import serve as serving
from musicrl_jax.serving import settings
from musicrl_jax.serving.settings import ServiceLimits


@pytest.fixture
def refused(tmp_path):
    """Returns `refused(error, why, **settings)`, which expects an error of `serve`."""

    def refused(error, why, **changes):
        with pytest.raises(error, match=why):
            serving.serve(str(tmp_path), **changes)

    return refused


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"port": 70000}, r"serve.port=70000 must be a whole number from 0 to 65535"),
        ({"port": -1}, "serve.port=-1"),
        ({"port": "http"}, "serve.port='http'"),
        ({"port": 80.5}, "serve.port=80.5"),
        ({"rows": 0}, "serve.rows=0 must be a whole number of 1 or more"),
        ({"rows": 2.5}, "serve.rows=2.5"),
        ({"rows": True}, "serve.rows=True"),
        (
            {"limits": ServiceLimits(waiting_clips=250)},
            "connections=256 must be more than waiting_clips=250 and serve.rows=8 together",
        ),
        ({"public_status": "yes"}, "serve.public_status='yes' must be True or False"),
        ({"host": ""}, "serve.host='' must be a name, an address"),
        ({"host": "no such host"}, "serve.host='no such host'"),
        ({"host": "a" * 70}, "serve.host='aaa.*' is unknown to this machine"),
        ({"host": "198.51.100.7"}, "198.51.100.7.*no such address on this machine"),
        (
            {"allowed_hosts": "https://music.example"},
            "'https://music.example' is not a host; give names without scheme",
        ),
        ({"allowed_hosts": "music.example:80"}, "'music.example:80' is not a host"),
        ({"allowed_hosts": "*.example"}, "is not a host"),
        ({"allowed_hosts": "müsik.example"}, "write a name with letters other than a to z as xn--"),
        ({"allowed_hosts": 3}, "serve.allowed_hosts=3 must be a text"),
        (
            {"allowed_origins": "music.example"},
            "'music.example' is not an origin; give only scheme, host and port",
        ),
        ({"allowed_origins": "https://music.example/"}, "is not an origin"),
        ({"allowed_origins": "null"}, "is not an origin"),
    ],
)
def test_a_setting_out_of_range_is_named(refused, changes, why):
    refused(ValueError, why, **changes)


@pytest.mark.parametrize(
    ("limit", "why"),
    [
        ({"connections": 0}, "ServiceLimits.connections=0 must be a whole number of 1 or more"),
        ({"connections": 1.5}, "ServiceLimits.connections=1.5"),
        ({"waiting_clips": 0}, "ServiceLimits.waiting_clips=0"),
        ({"candidates": 0}, "ServiceLimits.candidates=0"),
        ({"piece_seconds": -1}, "ServiceLimits.piece_seconds=-1 must be a number of 0 or more"),
        ({"piece_seconds": float("nan")}, "ServiceLimits.piece_seconds=nan"),
        ({"piece_seconds": float("inf")}, "ServiceLimits.piece_seconds=inf"),
        ({"request_seconds": 0}, "ServiceLimits.request_seconds=0"),
        ({"idle_seconds": float("inf")}, "ServiceLimits.idle_seconds=inf"),
        ({"answer_seconds": "1"}, "ServiceLimits.answer_seconds='1'"),
        ({"grace_seconds": -1}, "ServiceLimits.grace_seconds=-1 must be a number of 0 or more"),
        ({"window_ms": float("nan")}, "ServiceLimits.window_ms=nan"),
    ],
)
def test_a_limit_out_of_range_is_named(limit, why):
    with pytest.raises(ValueError, match=why):
        ServiceLimits(**limit)


def test_more_connections_than_files_are_refused(monkeypatch, refused):
    resource = pytest.importorskip("resource")
    raised = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: raised.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 1024))
    settings.check_files(256)
    assert raised == [(256 + settings.SPARE_FILES, 1024)]
    refused(
        ValueError,
        "connections=1000 needs 1576 open files, and this process may have 1024: raise `ulimit -n`",
        limits=ServiceLimits(connections=1000),
    )


def test_an_address_in_use_is_refused(refused):
    with socket.create_server(("127.0.0.1", 0)) as other:
        refused(
            ValueError, "Address already in use.*give another port", port=other.getsockname()[1]
        )


def test_a_name_with_several_addresses_has_one_port(monkeypatch):
    addresses = [
        (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET, 1, 6, "", ("127.0.0.2", 0)),
    ]
    absent = [(socket.AF_INET, 1, 6, "", ("198.51.100.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses + absent)
    sockets = settings.listen("localhost", 0)
    assert [each.getsockname()[0] for each in sockets] == ["127.0.0.1", "127.0.0.2"]
    assert len({each.getsockname()[1] for each in sockets}) == 1 and settings.only_loopback(sockets)
    for each in sockets:
        each.close()


def test_a_missing_bundle_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no bundle in .*nothing: `musicrl export` writes one"
    ):
        serving.serve(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("content", "token"),
    [
        (b"open sesame\n", "open sesame"),
        (b"\xef\xbb\xbfsesame\r\n", "sesame"),
        ("schlüssel".encode(), "schlüssel"),
        ("ключ".encode(), "ключ"),
    ],
)
def test_a_token_is_read_without_white_space(tmp_path, content, token):
    (tmp_path / "token").write_bytes(content)
    assert settings.read_token(str(tmp_path / "token")) == token


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty: write a token into it"),
        (b"\xef\xbb\xbf \n", "is empty"),
        ("sesame".encode("utf-16"), r"is not UTF-8 \(byte 0\): save it as UTF-8"),
        ("schlüssel".encode("latin-1"), r"is not UTF-8 \(byte 4\)"),
        (b"sesame\nother\n", "has more than one line"),
        (b"ses\x00ame", r"control character '\\x00' at place 4, which an HTTP header cannot have"),
        (b"a" * 5000, "more than 4096 bytes"),
    ],
)
def test_a_token_that_no_header_can_have_is_refused(tmp_path, refused, content, why):
    (tmp_path / "token").write_bytes(content)
    refused(ValueError, f"serve.token_file=.*{why}", token_file=str(tmp_path / "token"))


def test_a_token_is_read_only_from_a_regular_file(tmp_path, refused):
    refused(
        FileNotFoundError, "serve.token_file=.* does not exist", token_file=str(tmp_path / "token")
    )
    refused(ValueError, "is not a regular file", token_file=str(tmp_path))
    refused(ValueError, "is not a regular file", token_file="/dev/zero")


def test_hosts_and_origins_are_read_as_browsers_send_them():
    assert settings.read_hosts("Music.example, [::1],10.0.0.5 ,") == {
        "music.example",
        "::1",
        "10.0.0.5",
    }
    origins = (
        "https://Music.example:443,http://a.example:80,http://a.example:8080, https://[::1]:80"
    )
    assert settings.read_origins(origins) == (
        "https://music.example",
        "http://a.example",
        "http://a.example:8080",
        "https://[::1]:80",
    )
    assert settings.url("::1", 80) == "http://[::1]:80/" and settings.url("a", 80) == "http://a:80/"


def test_nothing_heavy_is_loaded_before_the_settings_are_checked(tmp_path):
    """It runs in another process, since this one has loaded them."""
    code = """if True:
        import sys
        from musicrl_jax.serve import serve
        try:
            serve(sys.argv[1], port=70000)
        except ValueError as error:
            assert "serve.port=70000" in str(error)
        assert not {"jax", "fastapi", "uvicorn", "numpy"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
