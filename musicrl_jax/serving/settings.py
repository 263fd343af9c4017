"""Settings of the service: who may ask, how long clients may take, and the address.

All of it is checked before jax, a web framework or the bundle is loaded, and needs none of them.
"""

import dataclasses
import errno
import hmac
import ipaddress
import math
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path

EVERY = "*"  # of allowed hosts or origins
LOCALHOST = "localhost"
MOST_TOKEN_LETTERS = 4096  # the head of a request has at most 16 KiB
BACKLOG = 512  # connections that the system accepts before the service sees them
SPARE_FILES = BACKLOG + 64  # open files of the process that are no connections of the service

HOST_NAME = re.compile(r"[\w.-]+", re.ASCII)
HOST_HEADER = re.compile(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d*)?", re.IGNORECASE | re.ASCII)
ORIGIN = re.compile(r"https?://(?:\[[0-9a-f:.]+\]|[\w.-]+)(?::\d+)?", re.ASCII)


def check_number(
    name: str, value: float, low: float, high: float = math.inf, whole: bool = False
) -> None:
    """Raises ValueError unless `value` is a finite number, or a whole one, in [low, high]."""
    kind = int if whole else int | float
    if (
        isinstance(value, bool)
        or not isinstance(value, kind)
        or not low <= value <= high
        or value == math.inf
    ):
        limits = f"from {low:g} to {high:g}" if high < math.inf else f"of {low:g} or more"
        raise ValueError(f"{name}={value!r} must be a {'whole ' if whole else ''}number {limits}")


@dataclasses.dataclass(frozen=True)
class ServiceLimits:
    """Time and room that the service gives its clients.

    Attributes:
      waiting_clips: clips that may wait, 1 or more; beyond, a request is answered 429.
      piece_seconds: longest piece; 0 is four times the bundle's clips. A piece longer than a clip
        goes on from half of one (MusicLM 5.5: a stride of 15 s).
      candidates: clips that a request may have drawn to choose from, 1 or more.
      connections: open connections, 1 or more. When one more opens, the one whose client has not
        sent a whole request for the longest time is closed; else one whose client does not read.
      request_seconds: time to send a request, its head and its body, above 0.
      idle_seconds: time that a connection may stay open between two requests, above 0.
      answer_seconds: time to read an answer, above 0.
      grace_seconds: time to finish requests once the service is told to stop, 0 or more.
      window_ms: time that a clip waits for others to be drawn in its batch, 0 or more.
    """

    waiting_clips: int = 64
    piece_seconds: float = 0.0
    candidates: int = 8
    connections: int = 256
    request_seconds: float = 10.0
    idle_seconds: float = 5.0
    answer_seconds: float = 120.0
    grace_seconds: float = 60.0
    window_ms: float = 5.0

    def __post_init__(self) -> None:
        """Raises ValueError where a limit is out of its range."""
        for name in ("waiting_clips", "candidates", "connections"):
            check_number(f"ServiceLimits.{name}", getattr(self, name), 1, whole=True)
        for name in ("request_seconds", "idle_seconds", "answer_seconds"):
            check_number(f"ServiceLimits.{name}", getattr(self, name), 0.001)
        for name in ("piece_seconds", "grace_seconds", "window_ms"):
            check_number(f"ServiceLimits.{name}", getattr(self, name), 0)


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may ask the service.

    Attributes:
      token: bearer token that requests must carry; '' asks for none.
      hosts: names that a Host header may hold beside localhost, in lower case; '*' allows every
        name.
      only_loopback: whether the service listens on loopback alone. Otherwise a Host header may hold
        every IP address, since only names can be rebound.
      origins: origins of web pages that may read answers (CORS), as 'https://music.example'; '*'
        allows every page.
      public_status: whether /metrics and /v1/model answer without the token.
    """

    token: str = ""
    hosts: frozenset[str] = frozenset()
    only_loopback: bool = True
    origins: tuple[str, ...] = ()
    public_status: bool = False

    def serves(self, host: str) -> bool:
        """Returns whether a request with this Host header is answered."""
        header = HOST_HEADER.fullmatch(host)
        if not header:
            return False
        name = (header[1] or header[2]).lower().removesuffix(".")
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name == LOCALHOST or not self.hosts.isdisjoint((name, EVERY))
        return address.is_loopback or not self.only_loopback or name in self.hosts

    def admits(self, credentials: bytes) -> bool:
        """Returns whether the bytes of a bearer token are those of `token`, in UTF-8 or Latin-1.

        Clients differ in letters outside ASCII: curl sends UTF-8, Python's requests Latin-1.
        """
        spellings = [self.token.encode()]
        if all(ord(letter) < 256 for letter in self.token):
            spellings.append(self.token.encode("latin-1"))
        return any([hmac.compare_digest(credentials, spelling) for spelling in spellings])


def only_loopback(sockets: Sequence[socket.socket]) -> bool:
    """Returns whether this machine alone reaches what listens at these sockets."""
    return all(ipaddress.ip_address(each.getsockname()[0]).is_loopback for each in sockets)


def url(host: str, port: int) -> str:
    """Returns the service's address as a browser takes it."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def read_token(path: str) -> str:
    """Returns the token in a file, without white space around it and without a byte order mark.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no regular file, not UTF-8, empty, too long, or holds what no HTTP
        header can.
    """
    name = f"serve.token_file={path!r}"
    if not Path(path).exists():
        raise FileNotFoundError(f"{name} does not exist: write a token into it")
    if not Path(path).is_file():
        raise ValueError(f"{name} is no regular file: write the token into one")
    content = Path(path).read_bytes()
    try:
        token = content.decode("utf-8-sig").strip(" \t\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    if not token:
        raise ValueError(f"{name} is empty: write a token into it")
    if len(token.encode()) > MOST_TOKEN_LETTERS:
        raise ValueError(
            f"{name} has more than {MOST_TOKEN_LETTERS} bytes: write a shorter token into it"
        )
    if "\n" in token or "\r" in token:
        raise ValueError(f"{name} has more than one line: leave the token alone in it")
    if control := re.search(r"[\x00-\x1f\x7f]", token):
        raise ValueError(
            f"{name} has the control character {control[0]!r} at place {control.start() + 1}, "
            "which no HTTP header can hold: write another token into it"
        )
    return token


def check_files(connections: int) -> None:
    """Raises the process's limit of open files to what so many connections need.

    Raises ValueError where the system does not allow it.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"ServiceLimits.connections={connections} needs {needed} open files, and this process may "
            f"have {hard}: raise `ulimit -n` or give fewer connections"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def listen(host: str, port: int) -> list[socket.socket]:
    """Returns sockets that listen at every address of `host`.

    They listen at once, so that a second service at the same port is refused before it loads its
    bundle. Raises ValueError where there is no such address, or it is in use.
    """
    where = f"serve: host={host!r}, port={port}"
    if not isinstance(host, str) or not host or re.search(r"\s", host):
        raise ValueError(
            f"serve.host={host!r} must be a name or an address, as 127.0.0.1, or 0.0.0.0 for all"
        )
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(
            f"serve.host={host!r} is no name or address that this machine knows ({error})"
        ) from error
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, address in sorted({(family, address) for family, *_, address in found}):
        try:
            sockets.append(_listening(family, (address[0], port or _port(sockets), *address[2:])))
        except OSError as error:
            if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # as ::1 where IPv6 is off
                missing = error
                continue
            for opened in sockets:
                opened.close()
            raise ValueError(
                f"{where} cannot be listened at ({os.strerror(error.errno)}): {_remedy(error)}"
            ) from error
    if not sockets:
        raise ValueError(
            f"{where}: no such address on this machine ({missing}); give one that it has"
        ) from missing
    return sockets


def _port(sockets: list[socket.socket]) -> int:
    """Returns the port of the first socket, which all addresses of a host share; 0 before that."""
    return sockets[0].getsockname()[1] if sockets else 0


def _listening(family: int, address: tuple) -> socket.socket:
    """Returns a socket that listens; raises OSError where it cannot."""
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
        opened.listen(BACKLOG)
    except OSError:
        opened.close()
        raise
    return opened


def _remedy(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another process uses it; give another port"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "ports below 1024 are the system's; give a higher one"
    return "give another host or port"


def read_hosts(text: str) -> frozenset[str]:
    """Returns names and addresses as Host headers hold them; raises ValueError for others."""
    names = [
        name.removeprefix("[").removesuffix("]") for name in _parts("serve.allowed_hosts", text)
    ]
    for name in names:
        if (
            name != EVERY
            and not HOST_HEADER.fullmatch(f"[{name}]")
            and not HOST_NAME.fullmatch(name)
        ):
            raise ValueError(
                f"serve.allowed_hosts={text!r}: {name!r} is no host; give names without scheme and "
                "port, as music.example, or * for every name"
            )
    return frozenset(name.removesuffix(".") for name in names)


def read_origins(text: str) -> tuple[str, ...]:
    """Returns origins as browsers send them; raises ValueError for anything else."""
    origins = _parts("serve.allowed_origins", text)
    for origin in origins:
        if origin != EVERY and not ORIGIN.fullmatch(origin):
            raise ValueError(
                f"serve.allowed_origins={text!r}: {origin!r} is no origin; give scheme, host and port "
                "alone, as https://music.example, or * for every page"
            )
    # Browsers leave out the port that a scheme has by itself.
    return tuple(re.sub(r"^(http:.*):80$|^(https:.*):443$", r"\1\2", origin) for origin in origins)


def _parts(setting: str, text: str) -> list[str]:
    """Returns the parts of a comma-separated setting, in lower case."""
    if not isinstance(text, str) or not text.isascii():
        raise ValueError(
            f"{setting}={text!r} must be a text with commas between its parts; write a name with "
            "other letters than a to z as xn--..., as browsers send it"
        )
    return [part.strip().lower() for part in text.split(",") if part.strip()]
