#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of imagec, in the order of its rooms; standard library only.

    python3 test_imagec.py                  all, side by side on the cores there are
    python3 test_imagec.py NamesTest ...    one room, as unittest runs it

Most talk to a registry double on loopback whose faults are data. Those that need a real
program (docker-registry, skopeo, umoci, podman, ...) are skipped where it is missing,
unless IMAGEC_TEST_NO_SKIP is set: then they fail.
"""

import base64
import collections
import contextlib
import functools
import hashlib
import http.client
import io
import itertools
import json
import os
import re
import socket
import ssl
import struct
import sys
import tarfile
import tempfile
import threading
import unittest
import urllib.parse
import zlib
from email.message import Message

import imagec


# --------------------------------------------------------------------------------------
# Fixtures: images built in memory, and a registry double whose faults are data
# --------------------------------------------------------------------------------------

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = None

# ------------------------------------------------------------------------------
# Certificates: every key here is public knowledge, and guards nothing.
# All are self-signed P-256 and their own CA; a client trusts TEST_CERT as cafile.
# ------------------------------------------------------------------------------

# localhost and 127.0.0.1, until 2126
TEST_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBfzCCASWgAwIBAgIJAKRd+JGKWNTbMAoGCCqGSM49BAMCMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDAgFw0yMDAxMDEwMDAwMDBaGA8yMTI2MDEwMTAwMDAwMFowFDES
MBAGA1UEAwwJbG9jYWxob3N0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEP9IC
VfqLsw5+qPg5Y4/8mIzRmWMnn9sytv16WvL1nWhuVuYFRz58ppssPHIl2uoaaWOn
4GpszbpO0CrbmK5kCKNeMFwwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMC
AoQwHQYDVR0OBBYEFELrN7IAbqtb33WLQHMMbK+ajeKpMBoGA1UdEQQTMBGCCWxv
Y2FsaG9zdIcEfwAAATAKBggqhkjOPQQDAgNIADBFAiEA/Ig5vuCtrSRqLZo3NBDM
sN/XFInbo+ml/LMHJx9bGuUCIEvrAVbMJ/02PKUecuf2fXVR+8wmKCAsWL9zIL/J
uoIe
-----END CERTIFICATE-----
"""
TEST_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgfDLjV1FGjkXrmDnL
j7cB+rj0xUrmGIIwpBWzrEIa/RyhRANCAAQ/0gJV+ouzDn6o+Dljj/yYjNGZYyef
2zK2/Xpa8vWdaG5W5gVHPnymmyw8ciXa6hppY6fgamzNuk7QKtuYrmQI
-----END PRIVATE KEY-----
"""

# wrong.example, until 2126
WRONG_HOST_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBhTCCASqgAwIBAgIIXi5uvrblcI0wCgYIKoZIzj0EAwIwGDEWMBQGA1UEAwwN
d3JvbmcuZXhhbXBsZTAgFw0yMDAxMDEwMDAwMDBaGA8yMTI2MDEwMTAwMDAwMFow
GDEWMBQGA1UEAwwNd3JvbmcuZXhhbXBsZTBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABJHhoh20i7uwt5g7ZkLIu90nap5sqs/zmnmoGBdAqGMVsPliMVXXJMoUQ6GP
n2uWytdnMnsb12hugFPIOnZ7tP6jXDBaMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0P
AQH/BAQDAgKEMB0GA1UdDgQWBBRRxs6PaQyJxOtHudJeqxD5BIekBTAYBgNVHREE
ETAPgg13cm9uZy5leGFtcGxlMAoGCCqGSM49BAMCA0kAMEYCIQD2A5VEYVLVY84F
GfoiIgwEx9Yqk/MIfBCg0g4NJMjymgIhAKG53z6KnaF9P3en5GMeH3AacEhX0Lug
fFCLgSFk30um
-----END CERTIFICATE-----
"""
WRONG_HOST_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQga7P3GJEW8Bk+b8NP
/klUYew6nupe+0wRk0sU1+h5DIKhRANCAASR4aIdtIu7sLeYO2ZCyLvdJ2qebKrP
85p5qBgXQKhjFbD5YjFV1yTKFEOhj59rlsrXZzJ7G9doboBTyDp2e7T+
-----END PRIVATE KEY-----
"""

# localhost and 127.0.0.1, ended in 2021
EXPIRED_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBfTCCASOgAwIBAgIJAPJ9SFKookU8MAoGCCqGSM49BAMCMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDAeFw0yMDAxMDEwMDAwMDBaFw0yMTAxMDEwMDAwMDBaMBQxEjAQ
BgNVBAMMCWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABJfxtS8/
+VcwkJUfcYHArW+eiCNd2JRbHSquIfVecWEhRQ6hMrK113ktdNyZDV1RnU+zyUJs
dGDgQ0dEyEmEMMqjXjBcMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKE
MB0GA1UdDgQWBBTmIsUm+6hFRnxBeoFcC9NHO2sR3jAaBgNVHREEEzARgglsb2Nh
bGhvc3SHBH8AAAEwCgYIKoZIzj0EAwIDSAAwRQIhAMqxMzCWECPconGAbieSDeI+
0mXsGIarQQazLYznV78OAiBKWCV1K1KTgClPs4XDW8+cVbVWt3Zk0JPIUxqf55GJ
qw==
-----END CERTIFICATE-----
"""
EXPIRED_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgyPcID0fkJ4M3cpKI
eFJTZMoo8LB0kgsqPucoSp62IXuhRANCAASX8bUvP/lXMJCVH3GBwK1vnogjXdiU
Wx0qriH1XnFhIUUOoTKytdd5LXTcmQ1dUZ1Ps8lCbHRg4ENHRMhJhDDK
-----END PRIVATE KEY-----
"""

# ------------------------------------------------------------------------------
# Image builder: tar_bytes, build_image, build_index
# ------------------------------------------------------------------------------

CREATED = "2020-01-01T00:00:00Z"

# The blob that stands in schema1 for a layer that changed nothing: an empty tar,
# gzipped by the first docker; its digest (a3ed95ca...) is known to every client.
EMPTY_LAYER = bytes.fromhex(
    "1f8b080000096e8800ff621805a360148c5800080000ffff2eafb5ef00040000"
)

# The public half of TEST_KEY; `kid` is its libtrust fingerprint, as clients check.
JWK = {
    "crv": "P-256",
    "kid": "6JRW:KSZO:5PDT:2UL4:XFVA:IJ32:EXSA:A6Y5:ESDW:SY4L:JGXE:7FU7",
    "kty": "EC",
    "x": "P9ICVfqLsw5-qPg5Y4_8mIzRmWMnn9sytv16WvL1nWg",
    "y": "blbmBUc-fKabLDxyJdrqGmljp-BqbM26TtAq25iuZAg",
}

_OCI = "application/vnd.oci.image."
_DOCKER = "application/vnd.docker."
MEDIA_TYPES = {
    "oci": {
        "manifest": _OCI + "manifest.v1+json",
        "index": _OCI + "index.v1+json",
        "config": _OCI + "config.v1+json",
        "layer": _OCI + "layer.v1.tar",
        "gzip": "+gzip",
        "zstd": "+zstd",
    },
    "docker": {
        "manifest": _DOCKER + "distribution.manifest.v2+json",
        "index": _DOCKER + "distribution.manifest.list.v2+json",
        "config": _DOCKER + "container.image.v1+json",
        "layer": _DOCKER + "image.rootfs.diff.tar",
        "gzip": ".gzip",
        "zstd": ".zstd",
    },
    "schema1": {"manifest": _DOCKER + "distribution.manifest.v1+json"},
    "schema1-signed": {"manifest": _DOCKER + "distribution.manifest.v1+prettyjws"},
}


class BuiltImage:
    """An image or index as a registry stores it; layers and diff_ids oldest first."""

    def __init__(self, manifest, media_type, digest=None, config=None):
        self.manifest = manifest
        self.media_type = media_type
        self.digest = digest or sha256(manifest)
        self.config = config
        self.blobs = {}
        self.layers = []
        self.diff_ids = []
        self.children = []  # the images of an index

    def descriptor(self, **extra):
        """What an index says of this image."""
        return _descriptor(self.media_type, self.manifest, digest=self.digest, **extra)


def sha256(data):
    """Return the digest `sha256:<hex>` of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tar_bytes(members):
    """Build a tar from rows (name, content or None for a directory[, attributes])."""
    out = io.BytesIO()
    # Both the default format and the default encoding depend on the Python running.
    with tarfile.open(
        fileobj=out,
        mode="w",
        format=tarfile.PAX_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as tar:
        for name, content, *attributes in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            info.size = len(content or b"")
            for key, value in dict(*attributes).items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content or b""))
    return out.getvalue()


def gzip_bytes(data, level=6):
    """Compress to gzip; zlib's own header holds neither time nor Python version."""
    packer = zlib.compressobj(level, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()


def build_image(
    layers,
    kind="oci",
    platform=("linux", "amd64", None),
    compress=gzip_bytes,
    **config_extra
):
    """Build an image of kind oci, docker, schema1 or schema1-signed.

    `layers` are uncompressed tars, oldest first; None is a step without a layer.
    `compress` may be None; `config_extra` overrides members of the image config.
    """
    steps = [
        tar if tar is None or compress is None else compress(tar) for tar in layers
    ]
    diff_ids = [sha256(tar) for tar in layers if tar is not None]
    if kind.startswith("schema1"):
        image = _schema1(steps, kind, platform, config_extra)
    else:
        image = _schema2(steps, kind, platform, diff_ids, config_extra)
    packed = [blob for blob in steps if blob is not None]
    image.layers = [sha256(blob) for blob in packed]
    image.blobs.update(zip(image.layers, packed))
    image.diff_ids = diff_ids
    return image


def build_index(images_with_platforms, kind="oci", extra_entries=()):
    """Build an index over rows (image or index, platform triple or None)."""
    entries = []
    for image, platform in images_with_platforms:
        extra = {"platform": _platform(platform)} if platform else {}
        entries.append(image.descriptor(**extra))
    document = {
        "schemaVersion": 2,
        "mediaType": MEDIA_TYPES[kind]["index"],
        "manifests": entries + list(extra_entries),
    }
    index = BuiltImage(_json(document, 3), document["mediaType"])
    index.children = [image for image, _ in images_with_platforms]
    return index


def _json(document, indent=None):
    """Encode as Go does: compact, or indented by three as docker's manifests are."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(document, indent=indent, separators=separators).encode("ascii")


def _platform(platform):
    system, architecture, variant = platform
    members = {"architecture": architecture, "os": system, "variant": variant}
    return {key: value for key, value in members.items() if value is not None}


def _descriptor(media_type, data, digest=None, **extra):
    entry = {"mediaType": media_type, "size": len(data)}
    return dict(entry, digest=digest or sha256(data), **extra)


def _schema2(steps, kind, platform, diff_ids, extra):
    config = _image_config(steps, platform, diff_ids, extra)
    types = MEDIA_TYPES[kind]
    layers = [blob for blob in steps if blob is not None]
    document = {
        "schemaVersion": 2,
        "mediaType": types["manifest"],
        "config": _descriptor(types["config"], config),
        "layers": [_descriptor(_layer_type(types, blob), blob) for blob in layers],
    }
    image = BuiltImage(_json(document, 3), types["manifest"], config=config)
    image.blobs[sha256(config)] = config
    return image


def _layer_type(types, blob):
    """The media type that fits a layer's first bytes."""
    coding = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd"}.get(blob[:2])
    return types["layer"] + types.get(coding, "")


def _image_config(steps, platform, diff_ids, extra):
    history = []
    for number, blob in enumerate(steps):
        history.append({"created": CREATED, "created_by": _command(number, blob)})
        if blob is None:
            history[-1]["empty_layer"] = True
    document = dict(
        _platform(platform),
        created=CREATED,
        config={"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]},
        rootfs={"type": "layers", "diff_ids": diff_ids},
        history=history,
    )
    document.update(extra)
    return _json(document)


def _command(number, blob):
    return "/bin/sh -c #(nop) %s %d" % ("ENV" if blob is None else "ADD", number)


def _schema1(steps, kind, platform, extra):
    blobs = [EMPTY_LAYER if blob is None else blob for blob in steps]
    history = _v1_history(steps, platform, extra)
    document = {
        "schemaVersion": 1,
        "name": "library/fixture",
        "tag": "latest",
        "architecture": platform[1],
        "fsLayers": [{"blobSum": sha256(blob)} for blob in reversed(blobs)],
        "history": [
            {"v1Compatibility": _json(entry).decode("ascii") + "\n"}
            for entry in reversed(history)
        ],
    }
    payload = _json(document, 3)
    body = _sign(payload) if kind == "schema1-signed" else payload
    media_type = MEDIA_TYPES[kind]["manifest"]
    image = BuiltImage(body, media_type, digest=sha256(payload))
    image.blobs.update((sha256(blob), blob) for blob in blobs)
    return image


def _v1_history(steps, platform, extra):
    """The v1 images of a schema1 manifest, oldest first, each naming its parent."""
    history, parent = [], None
    for number, blob in enumerate(steps):
        seed = "%s %d %s" % (parent, number, sha256(blob or EMPTY_LAYER))
        entry = {"id": hashlib.sha256(seed.encode("ascii")).hexdigest()}
        if parent:
            entry["parent"] = parent
        entry["created"] = CREATED
        entry["container_config"] = {"Cmd": [_command(number, blob)]}
        if blob is None:
            entry["throwaway"] = True
        history.append(entry)
        parent = entry["id"]
    if history:
        history[-1].update(_platform(platform), docker_version="1.12.6")
        history[-1]["config"] = {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]}
        history[-1].update(extra)
    return history


def _sign(payload):
    """Append libtrust's `signatures` before the closing brace of a JSON document.

    The signature is arbitrary bytes: registries have long stopped checking it.
    """
    tail = b"\n}"
    length = len(payload) - len(tail)
    protected = {
        "formatLength": length,
        "formatTail": _base64url(tail),
        "time": CREATED,
    }
    signature = {
        "header": {"jwk": JWK, "alg": "ES256"},
        "signature": _base64url(hashlib.sha512(payload).digest()),
        "protected": _base64url(_json(protected)),
    }
    # The new member's text, without the brace that opens its document.
    return payload[:length] + b"," + _json({"signatures": [signature]}, 3)[1:]


def _base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


# ------------------------------------------------------------------------------
# Wire: Request, Reply and Server, which know HTTP and nothing of registries
# ------------------------------------------------------------------------------

BLOCK = 1 << 16  # bytes handed to the kernel at a time


class Request(collections.namedtuple("Request", "method path headers body")):
    """A request as it came: `path` is the target as sent, query and all."""

    __slots__ = ()

    @property
    def route(self):
        """The decoded path alone, also of the absolute form sent to proxies."""
        path = re.sub(r"^https?://[^/?]*", "", self.path).partition("?")[0]
        return urllib.parse.unquote(path)

    @property
    def query(self):
        """The query as {name: [values]}."""
        return urllib.parse.parse_qs(self.path.partition("?")[2])


class Reply:
    """What answers one request: bytes, their pace, and how the connection ends."""

    def __init__(self, code, body=b"", headers=()):
        self.code = code
        self.headers = Message()
        self.whole = body  # what the fault no_range falls back on
        self.more = ()  # blocks that follow the body
        self.raw = None  # bytes sent in place of status line and headers
        self.chunk = None  # size of the chunks; None = no transfer coding
        self.pause = 0  # seconds before the first byte
        self.pace = None  # (phase it starts at, seconds, bytes at a time)
        self.cut = None  # (phase, bytes or fraction of it) where sending stops
        self.ending = "keep"  # or close, fin (close without TLS farewell), reset
        self.is_blob = False  # counted in sent_blob_bytes
        self.is_challenge = False  # faults wait for the reply behind it
        self.fill(body)
        for name, value in dict(headers).items():
            self.put(name, value)

    def put(self, name, value):
        """Set a header, given as content_type or Content-Type.

        None removes it, a list makes several.
        """
        name = name.replace("_", "-").title()
        del self.headers[name]
        values = value if isinstance(value, (list, tuple)) else [value]
        for one in values:
            if one is not None:
                self.headers[name] = one

    def fill(self, body):
        """Set the body, with the Content-Length that fits."""
        self.body = body
        self.put("Content-Length", str(len(body)))

    def head(self):
        """The status line and headers, as sent."""
        if self.raw is not None:
            return self.raw
        reason = http.client.responses.get(self.code, "Unknown")
        lines = ["HTTP/1.1 %d %s" % (self.code, reason)]
        lines += ["%s: %s" % pair for pair in self.headers.items()]
        return "\r\n".join(lines + ["", ""]).encode("latin-1")

    def pieces(self, bare):
        """Yield (seconds to wait, bytes to send); `bare` leaves out the body."""
        blocks = self._blocks(bare)
        if self.cut:
            blocks = _cut(blocks, self._cut_offset())
        if self.pace:
            phase, seconds, size = self.pace
            return _drip(blocks, self._span(phase)[0], seconds, size)
        return ((0, block) for block in blocks)

    def _blocks(self, bare):
        body = itertools.chain(_split(self.body, BLOCK), self.more)
        if self.chunk:
            body = _chunked(body, self.chunk)
        if bare:
            body = iter(())
        # Head and body in one packet: apart they cost a delayed ACK.
        yield self.head() + next(body, b"")
        for block in body:
            yield block

    def _span(self, phase):
        """The offset and length of a phase within the reply."""
        head = self.head()
        status_line = head.find(b"\n") + 1
        return {
            "status": (0, status_line),
            "headers": (status_line, len(head) - status_line),
            "body": (len(head), len(self.body)),
        }[phase]

    def _cut_offset(self):
        phase, amount = self.cut
        start, length = self._span(phase)
        if isinstance(amount, float):
            return start + int(length * amount)
        return start + (amount if amount >= 0 else length + amount)


def _split(data, size):
    return (data[at : at + size] for at in range(0, len(data), size))


def _chunked(blocks, size):
    for block in blocks:
        for piece in _split(block, size):
            yield b"%x\r\n%s\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def _cut(blocks, limit):
    """Let `limit` bytes through."""
    for block in blocks:
        yield block[:limit]
        limit -= len(block)
        if limit <= 0:
            return


def _drip(blocks, start, seconds, size):
    """Send up to `start` at once, then `size` bytes at a time."""
    for block in blocks:
        yield 0, block[:start]
        for piece in _split(block[start:], size):
            yield seconds, piece
        start = max(0, start - len(block))


class Fault:
    """An action, the requests it strikes, and how often it has."""

    def __init__(self, match, action, times, challenged):
        self.match = match
        self.actions = action if isinstance(action, list) else [action]
        self.times = times  # None = for ever
        self.challenged = challenged
        self.used = 0
        self._early = any(getattr(one, "early", False) for one in self.actions)

    def fits(self, subject, reply):
        """Is this fault due for "METHOD path", or for a bare connection (None)?"""
        if self.times is not None and self.used >= self.times:
            return False
        if self._early or subject is None:
            return self._early and subject is None
        if reply.is_challenge and not self.challenged:
            return False
        return re.search(self.match, subject) is not None


class Server:
    """HTTP/1.1 on a raw socket, since http.server can neither lie nor reset.

    Subclasses answer requests; faults then spoil the answers.
    """

    def __init__(self, tls=False):
        self.requests = []
        self.connections = 0
        self.sent_blob_bytes = 0
        self.faults = []
        self._tls = _tls_context(tls) if tls else None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._live = {}  # socket: thread
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(128)
        self.host = "127.0.0.1:%d" % self._listener.getsockname()[1]
        self.url = ("https://" if tls else "http://") + self.host
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def answer(self, request):
        """Return the true Reply to a Request."""
        raise NotImplementedError

    def fault(self, match, action, times=1, challenged=False):
        """Spoil the next `times` replies to a "METHOD path" that `match` finds.

        The first fault still due is the one that strikes; a list of actions strikes
        as one. A 401 that asks for a token is passed over unless `challenged`.
        """
        self.faults.append(Fault(match, action, times, challenged))
        return self.faults[-1]

    def close(self):
        """Stop at once, whatever the connections are doing."""
        if self._closing.is_set():
            return
        self._closing.set()
        # Closing a listening socket does not wake its accept() everywhere.
        socket.create_connection(self._listener.getsockname(), timeout=1).close()
        self._acceptor.join()
        self._listener.close()
        live = list(self._live.items())
        for sock, _ in live:
            with contextlib.suppress(OSError):
                # SSLSocket.shutdown would pull the TLS state from under its reader.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for _, thread in live:
            thread.join(1)

    def _accept(self):
        while not self._closing.is_set():
            with contextlib.suppress(OSError):
                sock = self._listener.accept()[0]
                if self._closing.is_set():
                    sock.close()
                else:
                    self._admit(sock)

    def _admit(self, sock):
        self.connections += 1
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Small, or sent_blob_bytes would count what only the kernel has taken.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BLOCK)
        early = self._strike(None, Reply(200))
        if self._tls and early is None:
            # Wrapped here and shaken later, so that close() sees one socket only.
            sock = self._tls.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False
            )
        thread = threading.Thread(target=self._serve, args=(sock, early), daemon=True)
        self._live[sock] = thread
        thread.start()

    def _serve(self, sock, early):
        # Clients under test hang up at any moment; that is no news here.
        with contextlib.suppress(OSError, http.client.HTTPException):
            with sock, sock.makefile("rb") as stream:
                if early is not None:
                    if early.raw:
                        # Unread bytes would turn the closing FIN into a reset.
                        sock.recv(BLOCK)
                    self._send(sock, early, bare=True)
                else:
                    if self._tls:
                        sock.do_handshake()
                    while self._exchange(sock, stream):
                        pass
        self._live.pop(sock, None)

    def _exchange(self, sock, stream):
        """Answer one request; tell whether the connection can carry another."""
        request = _read_request(stream)
        if request is None:
            return False
        self.requests.append(request)
        reply = self.answer(request)
        reply = self._strike("%s %s" % request[:2], reply) or reply
        wants_close = request.headers.get("Connection", "").lower() == "close"
        if wants_close and reply.ending == "keep":
            reply.put("Connection", "close")
            reply.ending = "close"
        self._send(sock, reply, bare=request.method == "HEAD")
        return reply.ending == "keep"

    def _strike(self, subject, reply):
        """Return the reply as spoiled by the first fault due, None without one."""
        with self._lock:
            due = next((f for f in self.faults if f.fits(subject, reply)), None)
            if due is None:
                return None
            due.used += 1
        for action in due.actions:
            reply = action(reply)
        return reply

    def _send(self, sock, reply, bare):
        self._closing.wait(reply.pause)
        head_left = len(reply.head())
        for pause, piece in reply.pieces(bare):
            if pause:
                self._closing.wait(pause)
            if reply.is_blob:
                # Counted first: whoever has the bytes must find them counted.
                with self._lock:
                    self.sent_blob_bytes += max(0, len(piece) - head_left)
            head_left = max(0, head_left - len(piece))
            if piece:
                sock.sendall(piece)
        self._end(sock, reply.ending)

    def _end(self, sock, ending):
        if ending == "reset":
            # A reset discards what the client's side has not acknowledged.
            for _ in range(250):
                self._closing.wait(0.002)
                if not _is_undelivered(sock):
                    break
            linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        elif ending == "close" and self._tls:
            # Without a timeout this would wait for the client's farewell as well.
            sock.settimeout(0)
            with contextlib.suppress(OSError):
                sock.unwrap()


def _read_request(stream):
    """Return the next request, None at the end of the connection."""
    # A TLS hello may look like a line of three words, and then wait for its answer.
    if not re.match(b"[A-Z]", stream.peek(1)):
        return None
    words = stream.readline(BLOCK).decode("latin-1").split()
    if len(words) != 3:
        return None
    headers = http.client.parse_headers(stream)
    body = stream.read(int(headers.get("Content-Length", 0)))
    return Request(words[0], words[1], headers, body)


def _is_undelivered(sock):
    """Are sent bytes still on their way, as far as the system can tell?"""
    try:
        # Linux can tell what is unsent from what only waits for a delayed ACK.
        question = 0x894B if sys.platform == "linux" else termios.TIOCOUTQ
        return fcntl is not None and any(fcntl.ioctl(sock, question, bytes(4)))
    except OSError:
        return False


@functools.lru_cache(maxsize=None)
def _tls_context(kind):
    """The server side of TLS for kind True, "expired" or "wrong-host"."""
    pem = {
        True: TEST_CERT + TEST_KEY,
        "expired": EXPIRED_CERT + EXPIRED_KEY,
        "wrong-host": WRONG_HOST_CERT + WRONG_HOST_KEY,
    }[kind]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        # The ssl module takes a key from a file only.
        path = os.path.join(folder, "pair.pem")
        with open(path, "w") as file:
            file.write(pem)
        context.load_cert_chain(path)
    return context


# ------------------------------------------------------------------------------
# Faults: each takes the true Reply and returns the one to send
# An amount is a number of bytes (negative: from the end) or a fraction of the whole.
# ------------------------------------------------------------------------------


def status(code, headers=(), body=b""):
    """Answer `code` instead."""
    return lambda reply: Reply(code, body, headers)


def body(data, **headers):
    """Answer 200 with `data`; of the true headers only Content-Type remains."""

    def change(reply):
        spoiled = Reply(200, data, {"Content-Type": reply.headers["Content-Type"]})
        return _with_headers(spoiled, headers)

    return change


def headers(**changed):
    """Replace headers of the true reply, or remove those given as None."""
    return lambda reply: _with_headers(reply, changed)


def redirect(location, code=307):
    """Point elsewhere; None leaves the Location out."""
    return lambda reply: Reply(code, headers={"Location": location})


def flip(offset=-1):
    """Flip one bit of the body about to be sent."""

    def change(reply):
        spoiled = bytearray(reply.body)
        spoiled[offset] ^= 1
        reply.body = bytes(spoiled)
        return reply

    return change


def truncate(amount=0.5):
    """Close cleanly in mid-body; truncate(1.0) closes an idle connection unannounced.

    Over TLS there is no close_notify, as when an attacker cuts the connection.
    """
    return lambda reply: _set(reply, cut=("body", amount), ending="fin")


def reset(amount=0.5, phase="body"):
    """Send RST in mid-phase: accept, status, headers or body.

    At accept it strikes the next connection, before TLS and whatever the match.
    """
    cut = ("status", 0) if phase == "accept" else (phase, amount)
    return _at(phase, lambda reply: _set(reply, cut=cut, ending="reset"))


def extra(count, lie=False):
    """Add zero bytes to the true body; with `lie` past its Content-Length.

    The connection stays open after a lie, its next reply out of step.
    """

    def change(reply):
        if lie:
            reply.more = [bytes(count)]
        else:
            reply.fill(reply.body + bytes(count))
        return reply

    return change


def endless(chunk=bytes(BLOCK), interval=0, limit=1 << 30, framing="chunked"):
    """Let the true body be followed by `chunk` again and again, up to `limit` bytes.

    `framing` is chunked, length (all of it declared) or close. With an interval all
    of the body comes at the pace of one chunk.
    """

    def change(reply):
        count = limit // len(chunk)
        reply.more = itertools.repeat(chunk, count)
        if interval:
            reply.pace = ("body", interval, len(chunk))
        if framing == "chunked":
            return chunked(BLOCK)(reply)
        if framing == "close":
            return close_delimited()(reply)
        reply.put("Content-Length", str(len(reply.body) + count * len(chunk)))
        return reply

    return change


def chunked(size=4096):
    """Send the true body with chunked transfer coding."""

    def change(reply):
        reply.chunk = size
        return headers(content_length=None, transfer_encoding="chunked")(reply)

    return change


def close_delimited():
    """Send the true body without a length; only the end of the connection ends it."""

    def change(reply):
        reply.ending = "close"
        return headers(content_length=None, connection="close")(reply)

    return change


def no_range():
    """Answer 200 with the whole blob to a request for a part."""

    def change(reply):
        reply.code = 200
        reply.fill(reply.whole)
        return headers(content_range=None, accept_ranges=None)(reply)

    return change


def partial(content_range, start):
    """Answer 206 with this Content-Range and the blob from `start` on."""

    def change(reply):
        reply.code = 206
        reply.fill(reply.whole[start:])
        return headers(content_range=content_range)(reply)

    return change


def delay(seconds):
    """Wait, then send the true reply."""
    return lambda reply: _set(reply, pause=seconds)


def drip(interval, chunk=1, phase="body"):
    """Send `chunk` bytes each interval, from status, headers or body on."""
    return lambda reply: _set(reply, pace=(phase, interval, chunk))


def garbage(data, phase="request"):
    """Send raw bytes in place of an HTTP reply, then close.

    With phase "accept" they answer the first bytes of a connection, also of TLS.
    """
    return _at(phase, lambda reply: _set(Reply(200), raw=data, ending="fin"))


def hang(seconds=60, phase="request"):
    """Close without an answer after some time; phase "accept" stalls TLS too."""
    return _at(
        phase, lambda reply: _set(Reply(200), raw=b"", ending="fin", pause=seconds)
    )


def _at(phase, change):
    change.early = phase == "accept"
    return change


def _set(reply, **attributes):
    for name, value in attributes.items():
        setattr(reply, name, value)
    return reply


def _with_headers(reply, changed):
    for name, value in changed.items():
        reply.put(name, value)
    return reply


# ------------------------------------------------------------------------------
# Registry: FakeRegistry, also a token server and a CDN, and RegistryCase
# ------------------------------------------------------------------------------

# One word in every secret, so that a leak is found by searching for it.
PASSWORD = "S3CR3T"
SIGNATURE = "S3CR3T-SIG"
IDENTITY_TOKEN = "S3CR3T-IDENTITY"


class FakeRegistry(Server):
    """A registry of the distribution API; all attributes may be changed live."""

    service = "fixture"
    token_field = "token"  # or access_token, both
    expires_in = 300  # seconds, None = not said; only token_uses ends a token
    token_uses = None  # requests a token is good for, None = any number
    challenge = None  # WWW-Authenticate: a str, or a list for several headers
    version_header = True
    redirect_blobs_to = None  # base URL of the FakeRegistry that serves /cdn/
    page_size = None  # most tags in one reply

    # {token: scopes}, of all registries: one may trust the tokens of another.
    tokens = {}

    def __init__(
        self, auth=None, tls=False, users=None, realm=None, anonymous=True, blobs=None
    ):
        self.auth = auth  # or basic, bearer
        self.users = {"alice": PASSWORD} if users is None else users
        self.realm = realm  # token URL; None = its own
        self.anonymous = anonymous  # gives tokens without credentials
        self.blobs = {} if blobs is None else blobs  # {digest: bytes}
        self.repositories = {}  # {name: {tag or digest: (bytes, media type, digest)}}
        self._uses = collections.Counter()
        super().__init__(tls)

    def add(self, repository, tag, image):
        """Store an image or index with all that it refers to; return its digest."""
        for child in image.children:
            self.add(repository, None, child)
        for blob in image.blobs.values():
            self.add_blob(repository, blob)
        return self.add_manifest(
            repository, tag, image.manifest, image.media_type, image.digest
        )

    def add_blob(self, repository, data):
        """Store a blob; return its digest."""
        self.repositories.setdefault(repository, {})
        self.blobs[sha256(data)] = data
        return sha256(data)

    def add_manifest(self, repository, tag, data, media_type, digest=None):
        """Store a manifest by digest, and by tag unless that is None."""
        digest = digest or sha256(data)
        entries = self.repositories.setdefault(repository, {})
        for reference in {tag, digest} - {None}:
            entries[reference] = (data, media_type, digest)
        return digest

    def answer(self, request):
        """Refuse or route a request; what no route knows is 404."""
        reply = self._refusal(request) or self._routed(request)
        if self.version_header and request.route.startswith("/v2/"):
            reply.put("Docker-Distribution-Api-Version", "registry/2.0")
        return reply

    def _routed(self, request):
        for pattern, method in self._routes:
            found = re.fullmatch(pattern, "%s %s" % (request.method, request.route))
            if found:
                return method(self, request, *found.groups())
        return _error(404, "UNSUPPORTED", "no such endpoint")

    def _ping(self, request):
        return Reply(200, b"{}", {"Content-Type": "application/json"})

    def _manifest(self, request, repository, reference):
        entry = self.repositories.get(repository, {}).get(reference)
        if entry is None:
            return _error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        data, media_type, digest = entry
        return Reply(
            200, data, {"Content-Type": media_type, "Docker-Content-Digest": digest}
        )

    def _blob(self, request, repository, digest):
        if repository not in self.repositories or digest not in self.blobs:
            return _error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        if self.redirect_blobs_to:
            place = (self.redirect_blobs_to, digest, SIGNATURE)
            return Reply(307, headers={"Location": "%s/cdn/%s?sig=%s" % place})
        reply = self._content(request, digest)
        reply.put("Docker-Content-Digest", digest)
        return reply

    def _cdn(self, request, digest):
        # Object stores refuse two kinds of credentials in one request.
        if "Authorization" in request.headers:
            return _error(400, "INVALID", "only one auth mechanism allowed")
        if request.query.get("sig") != [SIGNATURE]:
            return _error(403, "DENIED", "signature does not match")
        if digest not in self.blobs:
            return _error(404, "BLOB_UNKNOWN", "no such key")
        return self._content(request, digest)

    def _content(self, request, digest):
        """Reply with a blob or the range of it that is asked for."""
        data = self.blobs[digest]
        size = len(data)
        kind = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        reply = Reply(200, data, kind)
        reply.is_blob = True
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if wanted:
            start = int(wanted.group(1))
            end = min(int(wanted.group(2) or size), size - 1)
            if start > end:
                return Reply(416, headers={"Content-Range": "bytes */%d" % size})
            reply.code = 206
            reply.fill(data[start : end + 1])
            reply.put("Content-Range", "bytes %d-%d/%d" % (start, end, size))
        return reply

    def _tags(self, request, repository):
        if repository not in self.repositories:
            return _error(404, "NAME_UNKNOWN", "repository name not known to registry")
        last = request.query.get("last", [""])[0]
        # A digest has a colon, a tag cannot.
        names = (name for name in self.repositories[repository] if ":" not in name)
        tags = sorted(name for name in names if name > last)
        asked = [int(count) for count in request.query.get("n", [])]
        size = min(asked + [self.page_size or len(tags), len(tags)])
        reply = _json_reply({"name": repository, "tags": tags[:size]})
        if 0 < size < len(tags):
            more = urllib.parse.urlencode([("last", tags[size - 1]), ("n", size)])
            link = '</v2/%s/tags/list?%s>; rel="next"' % (repository, more)
            reply.put("Link", link)
        return reply

    def _token(self, request):
        if self.auth != "bearer" or self.realm:
            return _error(404, "UNSUPPORTED", "not a token server")
        form = request.query
        if request.method == "POST":
            form = urllib.parse.parse_qs(request.body.decode("ascii"))
        if not self._trusts(request, form):
            return _error(401, "UNAUTHORIZED", "incorrect username or password")
        token = "S3CR3T-TOKEN-" + os.urandom(16).hex()
        self.tokens[token] = " ".join(form.get("scope", [])).split()
        both = ("token", "access_token")
        fields = both if self.token_field == "both" else (self.token_field,)
        document = {field: token for field in fields}
        if self.expires_in is not None:
            document["expires_in"] = self.expires_in
        return _json_reply(document)

    def _trusts(self, request, form):
        """May whoever asks for a token have one?"""
        first = {name: values[0] for name, values in form.items()}
        if request.method == "POST" and first.get("grant_type") == "refresh_token":
            return first.get("refresh_token") == IDENTITY_TOKEN
        if request.method == "POST":
            user = (first.get("username"), first.get("password"))
            return first.get("grant_type") == "password" and user in self.users.items()
        if "Authorization" in request.headers:
            return self._knows(*_credentials(request))
        return self.anonymous

    def _refusal(self, request):
        """The 401 due to a request, None if it is welcome."""
        if not self.auth or not request.route.startswith("/v2/"):
            return None
        found = re.match("/v2/(.+)/(?:manifests|blobs|tags)/", request.route)
        repository = found.group(1) if found else None
        scheme, secret = _credentials(request)
        if self.auth == "basic" and self._knows(scheme, secret):
            return None
        if self.auth == "bearer" and self._grants(scheme, secret, repository):
            return None
        reply = _error(401, "UNAUTHORIZED", "authentication required")
        reply.put("WWW-Authenticate", self.challenge or self._challenge(repository))
        # At /v2/ the challenge is all the answer there is to spoil.
        reply.is_challenge = repository is not None
        return reply

    def _challenge(self, repository):
        if self.auth == "basic":
            return 'Basic realm="%s"' % self.service
        realm = self.realm or self.url + "/token"
        text = 'Bearer realm="%s",service="%s"' % (realm, self.service)
        return text + (',scope="repository:%s:pull"' % repository if repository else "")

    def _knows(self, scheme, secret):
        pairs = (("%s:%s" % pair).encode("utf-8") for pair in self.users.items())
        known = [base64.b64encode(pair).decode("ascii") for pair in pairs]
        return scheme == "basic" and secret in known

    def _grants(self, scheme, token, repository):
        """Does the token let its bearer pull from the repository (None = ping)?"""
        if scheme != "bearer" or token not in self.tokens:
            return False
        with self._lock:
            self._uses[token] += 1
            if self.token_uses is not None and self._uses[token] > self.token_uses:
                return False
        resources = [scope.rpartition(":") for scope in self.tokens[token]]
        return repository is None or any(
            resource == "repository:" + repository and "pull" in actions.split(",")
            for resource, _, actions in resources
        )

    _routes = (
        ("(?:GET|HEAD) /v2/", _ping),
        ("(?:GET|HEAD) /v2/(.+)/manifests/([^/]+)", _manifest),
        ("(?:GET|HEAD) /v2/(.+)/blobs/([^/]+)", _blob),
        ("(?:GET|HEAD) /v2/(.+)/tags/list", _tags),
        ("(?:GET|HEAD) /cdn/([^/]+)", _cdn),
        ("(?:GET|POST) /token", _token),
    )


def _credentials(request):
    """The scheme, in lower case, and the secret of an Authorization header."""
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower(), secret


def _json_reply(document, code=200):
    return Reply(code, _json(document), {"Content-Type": "application/json"})


def _error(code, name, message):
    return _json_reply({"errors": [{"code": name, "message": message}]}, code)


class RegistryCase(unittest.TestCase):
    """A test with registries of its own, none of whose faults may stay unused."""

    def registry(self, **options):
        """Start a FakeRegistry that ends with the test."""
        registry = FakeRegistry(**options)
        self.addCleanup(self._end_registry, registry)
        return registry

    def _end_registry(self, registry):
        registry.close()
        unused = [f.match for f in registry.faults if f.times and not f.used]
        self.assertEqual(unused, [], "faults that were never used")


# --------------------------------------------------------------------------------------
# Running them all
# --------------------------------------------------------------------------------------

class Tally(unittest.TextTestResult):
    """What a worker found, in a form that passes between processes."""

    def found(self):
        """(tests run, bad ones as (name, text), skipped ones as (name, reason))."""
        bad = self.failures + self.errors + [
            (test, "unexpected success") for test in self.unexpectedSuccesses]
        return (self.testsRun, [(str(test), text) for test, text in bad],
                [(str(test), reason) for test, reason in self.skipped])


def run_class(name):
    """Runs one test class in this process: (name, seconds, found)."""
    started = time.time()
    suite = unittest.defaultTestLoader.loadTestsFromName(name, sys.modules["__main__"])
    result = Tally(unittest.runner._WritelnDecorator(io.StringIO()), False, 0)
    suite.run(result)
    return name, time.time() - started, result.found()


def run_side_by_side(names):
    """Runs test classes in a few processes; whether all went well.

    More processes than cores, for many tests wait for clocks and sockets.
    """
    import multiprocessing
    context = multiprocessing.get_context("fork")
    started, ran, bad, skipped = time.time(), 0, [], []
    with context.Pool((os.cpu_count() or 1) + 1, maxtasksperchild=None) as pool:
        for name, seconds, (count, faults, skips) in pool.imap_unordered(
                run_class, names, chunksize=1):
            ran, bad, skipped = ran + count, bad + faults, skipped + skips
            if os.environ.get("IMAGEC_TEST_TIMES"):
                print("%6.2f s %4d %s" % (seconds, count, name))
    for test, text in bad:
        print("=" * 70, test, "-" * 70, text, sep="\n")
    for reason, count in sorted(collections.Counter(
            reason for _, reason in skipped).items()):
        print("skipped %d: %s" % (count, reason))
    print("Ran %d tests in %.1f s on Python %s" % (
        ran, time.time() - started, sys.version.split()[0]))
    print("%d passed, %d failed, %d skipped" % (ran - len(bad) - len(skipped), len(bad),
                                                len(skipped)))
    return not bad and ran > 0


def main():
    """Runs what is named on the command line, or everything."""
    if len(sys.argv) > 1 or not hasattr(os, "fork"):
        return unittest.main()
    names = [name for name, value in globals().items()
             if isinstance(value, type) and issubclass(value, unittest.TestCase)
             and unittest.defaultTestLoader.getTestCaseNames(value)]
    # The slowest first, as measured; the rest in the order of the file.
    names.sort(key=lambda name: SLOW_CLASSES.index(name) if name in SLOW_CLASSES
               else len(SLOW_CLASSES))
    sys.exit(0 if run_side_by_side(names) else 1)


SLOW_CLASSES = ()

if __name__ == "__main__":
    main()
