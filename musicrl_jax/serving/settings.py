"""Settings of the service: access, limits of requests, and the address.

All are checked before jax, a web framework or the bundle is loaded, and need none of them.
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

EVERY = "*"  # allows every host or origin
LOCALHOST = "localhost"
MOST_TOKEN_LETTERS = 4096  # the head of a request has at most 16 KiB
BACKLOG = 512  # connections that the system holds until the service accepts them
SPARE_FILES = BACKLOG + 64  # open files of the process beside the service's connections
# What to do where an address cannot be used.
REMEDIES = {
    errno.EADDRINUSE: "another process uses it; give another port",
    errno.EACCES: "ports below 1024 are the system's; give a higher one",
    errno.EPERM: "ports below 1024 are the system's; give a higher one",
}

# A name; the value of a Host header, with a port; and of an Origin header.
HOST_NAME = re.compile(r"[\w.-]+", re.ASCII)
HOST_HEADER = re.compile(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d*)?", re.IGNORECASE | re.ASCII)
ORIGIN = re.compile(r"https?://(?:\[[0-9a-f:.]+\]|[\w.-]+)(?::\d+)?", re.ASCII)


# --- limits and access ---


def check_number(
    name: str, value: float, low: float, high: float = math.inf, whole: bool = False
) -> None:
    """Raises ValueError unless `value` is a finite number in [low, high], and whole if asked."""
    kind = int if whole else int | float
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or value == math.inf:
        limits = f"from {low:g} to {high:g}" if high < math.inf else f"of {low:g} or more"
        raise ValueError(f"{name}={value!r} must be a {'whole ' if whole else ''}number {limits}")


@dataclasses.dataclass(frozen=True)
class ServiceLimits:
    """Limits of requests, connections and times.

    Attributes:
      waiting_clips: maximum of queued clips, 1 or more; a request beyond it gets status 429.
      piece_seconds: longest piece; 0 means four times the bundle's clips. A piece longer than a
        clip continues half of one (MusicLM 5.5: a stride of 15 s).
      candidates: maximum of clips that a request chooses from, 1 or more.
      connections: maximum of open connections, 1 or more. Beyond it, the service closes the
        connection that has waited longest to complete a request, or else one whose client does
        not read.
      request_seconds: time to send a request, head and body, above 0.
      idle_seconds: time that a connection may be idle between two requests, above 0.
      answer_seconds: time to read an answer, above 0.
      grace_seconds: time to finish requests when the service stops, 0 or more.
      window_ms: time that a clip waits for others of its batch, 0 or more.
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
        """Raises ValueError if a limit is out of its range."""
        for name in ("waiting_clips", "candidates", "connections"):
            check_number(f"ServiceLimits.{name}", getattr(self, name), 1, whole=True)
        for name in ("request_seconds", "idle_seconds", "answer_seconds"):
            check_number(f"ServiceLimits.{name}", getattr(self, name), 0.001)
        for name in ("piece_seconds", "grace_seconds", "window_ms"):
            check_number(f"ServiceLimits.{name}", getattr(self, name), 0)


@dataclasses.dataclass(frozen=True)
class Access:
    """Rules for who may use the service.

    Attributes:
      token: bearer token that requests must have; '' needs none.
      hosts: names allowed in a Host header beside localhost, in lower case; '*' allows every name.
      only_loopback: whether the service listens on loopback only. Otherwise a Host header may have
        any IP address, since only names can be rebound.
      origins: origins of web pages that may read answers (CORS), such as 'https://music.example';
        '*' allows every page.
      public_status: whether /metrics and /v1/model answer without the token.
    """

    token: str = ""
    hosts: frozenset[str] = frozenset()
    only_loopback: bool = True
    origins: tuple[str, ...] = ()
    public_status: bool = False

    def serves(self, host: str) -> bool:
        """Returns whether requests with this Host header are answered."""
        header = HOST_HEADER.fullmatch(host)
        if not header:
            return False
        name = (header[1] or header[2]).lower().removesuffix(".")
        # Names can be rebound by DNS, addresses cannot.
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name == LOCALHOST or not self.hosts.isdisjoint((name, EVERY))
        return address.is_loopback or not self.only_loopback or name in self.hosts

    def admits(self, credentials: bytes) -> bool:
        """Returns whether a bearer token is `token`, in UTF-8 or Latin-1.

        Clients differ in letters outside ASCII: curl sends UTF-8, Python's requests Latin-1.
        """
        # compare_digest takes the same time for any wrong token.
        spellings = [self.token.encode()]
        if all(ord(letter) < 256 for letter in self.token):
            spellings.append(self.token.encode("latin-1"))
        return any([hmac.compare_digest(credentials, spelling) for spelling in spellings])


# --- address ---


def only_loopback(sockets: Sequence[socket.socket]) -> bool:
    """Returns whether these sockets listen on loopback only."""
    return all(ipaddress.ip_address(each.getsockname()[0]).is_loopback for each in sockets)


def url(host: str, port: int) -> str:
    """Returns the service's address for a browser."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def listen(host: str, port: int) -> list[socket.socket]:
    """Returns sockets that listen at every address of `host`.

    They listen at once, so a second service at the same port stops before it loads its bundle.
    Raises ValueError if there is no such address, or it is in use.
    """
    # The addresses of the host.
    where = f"serve: host={host!r}, port={port}"
    if not isinstance(host, str) or not host or re.search(r"\s", host):
        raise ValueError(
            f"serve.host={host!r} must be a name, an address such as 127.0.0.1, or 0.0.0.0 for all"
        )
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(
            f"serve.host={host!r} is unknown to this machine ({error}): give another"
        ) from error

    # A socket for each. All share the port of the first, which the system chooses for port 0.
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, address in sorted({(family, address) for family, *_, address in infos}):
        try:
            address = (address[0], port, *address[2:])
            sockets.append(socket.create_server(address, family=family, backlog=BACKLOG))
            port = sockets[0].getsockname()[1]
        except OSError as error:
            if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # ::1 if IPv6 is off
                missing = error
                continue
            for opened in sockets:
                opened.close()
            remedy = REMEDIES.get(error.errno, "give another host or port")
            raise ValueError(
                f"{where} cannot be used ({os.strerror(error.errno)}): {remedy}"
            ) from error
    if not sockets:
        raise ValueError(
            f"{where}: no such address on this machine ({missing}); give one that it has"
        ) from missing
    return sockets


# --- token and files ---


def read_token(path: str) -> str:
    """Returns the token in a file, without white space around it or a byte order mark.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a regular file, not UTF-8, empty or too long, or has characters
        that an HTTP header cannot have.
    """
    # The file.
    name = f"serve.token_file={path!r}"
    if not Path(path).exists():
        raise FileNotFoundError(f"{name} does not exist: write a token into it")
    if not Path(path).is_file():
        raise ValueError(f"{name} is not a regular file: write the token into one")
    try:
        token = Path(path).read_text("utf-8-sig").strip(" \t\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}): save it as UTF-8") from error

    # The token.
    if not token:
        raise ValueError(f"{name} is empty: write a token into it")
    if len(token.encode()) > MOST_TOKEN_LETTERS:
        raise ValueError(
            f"{name} has more than {MOST_TOKEN_LETTERS} bytes: write a shorter token into it"
        )
    if "\n" in token:
        raise ValueError(f"{name} has more than one line: write only the token into it")
    if control := re.search(r"[\x00-\x1f\x7f]", token):
        raise ValueError(
            f"{name} has the control character {control[0]!r} at place {control.start() + 1}, "
            "which an HTTP header cannot have: write another token into it"
        )
    return token


def check_files(connections: int) -> None:
    """Raises the process's limit of open files to the need of so many connections.

    Raises ValueError if the system does not allow it.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    # The soft limit may be raised to the hard one.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"ServiceLimits.connections={connections} needs {needed} open files, and this process "
            f"may have {hard}: raise `ulimit -n` or give fewer connections"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


# --- names in headers ---


def read_hosts(text: str) -> frozenset[str]:
    """Returns names and addresses as in Host headers; raises ValueError for others."""
    hosts = set()
    for part in _parts("serve.allowed_hosts", text):
        name = part.removeprefix("[").removesuffix("]")
        is_host = HOST_HEADER.fullmatch(f"[{name}]") or HOST_NAME.fullmatch(name)
        if name != EVERY and not is_host:
            raise ValueError(
                f"serve.allowed_hosts={text!r}: {name!r} is not a host; give names without scheme "
                "and port, such as music.example, or * for every name"
            )
        hosts.add(name.removesuffix("."))
    return frozenset(hosts)


def read_origins(text: str) -> tuple[str, ...]:
    """Returns origins as browsers send them; raises ValueError for anything else."""
    origins = _parts("serve.allowed_origins", text)
    for origin in origins:
        if origin != EVERY and not ORIGIN.fullmatch(origin):
            raise ValueError(
                f"serve.allowed_origins={text!r}: {origin!r} is not an origin; give only scheme, "
                "host and port, such as https://music.example, or * for every page"
            )
    # Browsers leave out the default port of a scheme.
    return tuple(re.sub(r"^(http:.*):80$|^(https:.*):443$", r"\1\2", origin) for origin in origins)


def _parts(setting: str, text: str) -> list[str]:
    """Returns the parts of a comma-separated setting, in lower case."""
    if not isinstance(text, str) or not text.isascii():
        raise ValueError(
            f"{setting}={text!r} must be a text with commas between its parts; write a name with "
            "letters other than a to z as xn--..., as browsers send it"
        )
    return [part.strip().lower() for part in text.split(",") if part.strip()]
