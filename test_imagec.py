#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of imagec, in the order of its rooms; standard library only.

    python3 test_imagec.py                  all, side by side on the cores there are
    python3 test_imagec.py NamesTest ...    one room, as unittest runs it

Most talk to a registry double on loopback whose faults are data. Those that need a real
program (docker-registry, skopeo, umoci, podman, ...) are skipped where it is missing,
unless IMAGEC_TEST_NO_SKIP is set: then they fail.
"""

import atexit
import base64
import collections
import contextlib
import functools
import gzip
import hashlib
import http.client
import http.server
import io
import itertools
import json
import os
import re
import shutil
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
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
# Fixtures: programs that are not ours
# --------------------------------------------------------------------------------------

REAL_USER = "alice"
REAL_PASSWORD = "S3CR3T-alice"
REAL_IDENTITY_TOKEN = "IDENTITY-alice"
HTPASSWD = "alice:$2y$05$iDvtX8u8w5YZoCLdJ05Lju5JHv5DI7R3BLLUsGlllgBJcffhe47cy\n"

REAL_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBkzCCATmgAwIBAgIITFSbKtuhBqIwCgYIKoZIzj0EAwIwFDESMBAGA1UEAwwJ
bG9jYWxob3N0MCAXDTIwMDEwMTAwMDAwMFoYDzIxOTkxMjMxMjM1OTU5WjAUMRIw
EAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAREdbcD
tnvXiWAt13Gs2RsqwPxfA7F9rkKmVXP1A5CT2UYwmR2lP1qFq3JbH0Jeq4U/kDSI
gugffW/wGl0cixyko3MwcTAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIC
hDATBgNVHSUEDDAKBggrBgEFBQcDATAdBgNVHQ4EFgQUew567fG6n7MFEUWrxFtv
kU54HwUwGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMAoGCCqGSM49BAMCA0gA
MEUCIGX4brYwysohCRSZHyI0ELeEAcvzw9fuCJCe7sRSLLvzAiEA+WoLvth8ctKF
P6pBqbi59KrLy7mB3SE08eBwthWmmJs=
-----END CERTIFICATE-----
"""
REAL_KEY = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIJYXMR6QzZzia+9JVFZVTCROYfw76rGM9WkGdMoYX1fDoAoGCCqGSM49
AwEHoUQDQgAERHW3A7Z714lgLddxrNkbKsD8XwOxfa5CplVz9QOQk9lGMJkdpT9a
hatyWx9CXquFP5A0iILoH31v8BpdHIscpA==
-----END EC PRIVATE KEY-----
"""
TOKEN_CERT = """\
-----BEGIN CERTIFICATE-----
MIIC9DCCAdygAwIBAgIITFSbKtuhBqMwDQYJKoZIhvcNAQELBQAwFzEVMBMGA1UE
AwwMdG9rZW4tc2lnbmVyMCAXDTIwMDEwMTAwMDAwMFoYDzIxOTkxMjMxMjM1OTU5
WjAXMRUwEwYDVQQDDAx0b2tlbi1zaWduZXIwggEiMA0GCSqGSIb3DQEBAQUAA4IB
DwAwggEKAoIBAQCYsdazKFWAGM4Nu8Ys8HvRJLWC2P036R9XeuwNjVzg/pxuTWs0
JfLUOF0heDKYwLKl7FhNyn8nWr6uNVkZ3b+m8DYM41VXs9gRjI20KkGUsPtU3LWC
CGO9lTQc76uW/0NKUHt8j7NG38adsuv1xD9RF9TCZWZDQJ05EOetksgXw7W81CHr
je1IuOTDOhpXhaO0FofQCIqLXNgoJKwB2ij0M6B0amJBUP3cf2wOiDXr3SzZH0rD
c5SHSAzt69NlWRYJW437oUSwblhry+Wh3NVdyNPQFVtoq+QRvBw/n/gf1YqVQRsg
3mTGcLKevXtu+D16PktilWB1Lupj5wQx+7Z7AgMBAAGjQjBAMA8GA1UdEwEB/wQF
MAMBAf8wDgYDVR0PAQH/BAQDAgKEMB0GA1UdDgQWBBSMtoXUscG4waLOf3tSBe7l
wa4mwjANBgkqhkiG9w0BAQsFAAOCAQEAXTgWa3ZpM9uYbxNyok8PjMUAFFjj0KRV
DQrR6BcZf2qrwBgG2xY2I6uRNNtCZw4zlkzeRgdS1pBJy+nyJ1TWky+KkX/HT9Zz
CCLxfemuq3JViLF6UPsr/ACRtBRHTDMhUYPYnu5XyuUoze5cdx6Tzq2Xlrv9d9nm
2BHbjw1WgiJQDVLmyMcHhkoiMUyQCI8Nu6cOGueBzo0gOlI9oPaamgHsLbhANZL/
GN9qJ+7AYuGoQk8NtkW9Z2dK0cUETyaRFIhZESoZhBG+78cLg7LUigNHdWZv1M2b
nyrWDEUD32ufhhK6mUbgY//EjCVp3x3PEZNpVrBaZX6v9qO5MCBHfw==
-----END CERTIFICATE-----
"""
TOKEN_N = int(
    "98b1d6b328558018ce0dbbc62cf07bd124b582d8fd37e91f577aec0d8d5ce0fe9c6e4d6b3425f2d4"
    "385d21783298c0b2a5ec584dca7f275abeae355919ddbfa6f0360ce35557b3d8118c8db42a4194b0"
    "fb54dcb5820863bd95341cefab96ff434a507b7c8fb346dfc69db2ebf5c43f5117d4c2656643409d"
    "3910e7ad92c817c3b5bcd421eb8ded48b8e4c33a1a5785a3b41687d0088a8b5cd82824ac01da28f4"
    "33a0746a624150fddc7f6c0e8835ebdd2cd91f4ac3739487480cedebd3655916095b8dfba144b06e"
    "586bcbe5a1dcd55dc8d3d0155b68abe411bc1c3f9ff81fd58a95411b20de64c670b29ebd7b6ef83d"
    "7a3e4b629560752eea63e70431fbb67b", 16)
TOKEN_D = int(
    "2008a7273cddfb1ab917ce7dfbed93bc43bc44b02b2770a3dfa16d2646b2e68ce3da8c29626e57ac"
    "480ad9bbb2b9b32b877db6e4d307ac04f09df19938c0f9b5170defd43d9241aba1badffb9d25d700"
    "ee29568849b862dc6211e5c42e366665029131e6e6ead0829fd373b6e6ff7ddd1067d5449a989f54"
    "9ca53c4580d6b38d4b7c58fb32c62bba36ee083582ed3db0821eb674b0b00eef85bf595287e679b5"
    "78c864e911d61055ac95a4633631582e3481bf01e9884c78c0471246045e583c5844a79a33be576e"
    "a8148ce91a7b096af731ff371eb0fa6790f5dc5852e381a72587220ebd9546f6d4bc53e05f73a61d"
    "c95c21f58327bb7a5440238d90198589", 16)


def needs(*programs):
    """Skip the decorated test or class unless every program is on the PATH.

    With IMAGEC_TEST_NO_SKIP set nothing is skipped: what lacks its program fails.
    """
    missing = [name for name in programs if shutil.which(name) is None]
    if os.environ.get("IMAGEC_TEST_NO_SKIP"):
        return lambda decorated: decorated
    return unittest.skipUnless(
        not missing, "needs %s: not on this machine" % ", ".join(missing))


def _real_base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _rs256(message):
    """RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, 8.2), so that no openssl is needed."""
    info = bytes.fromhex("3031300d060960864801650304020105000420")
    info += hashlib.sha256(message).digest()
    size = (TOKEN_N.bit_length() + 7) // 8
    padded = b"\0\1" + b"\xff" * (size - len(info) - 3) + b"\0" + info
    number = pow(int.from_bytes(padded, "big"), TOKEN_D, TOKEN_N)
    return number.to_bytes(size, "big")


def make_jwt(claims):
    """Return `claims` as a JWT that a registry trusting TOKEN_CERT accepts."""
    # x5c and not kid: registry 2.x and 3.x compute a key's id differently.
    header = {"typ": "JWT", "alg": "RS256",
              "x5c": ["".join(TOKEN_CERT.split("\n")[1:-2])]}
    parts = [_real_base64url(json.dumps(part).encode("utf-8")) for part in (header, claims)]
    parts.append(_real_base64url(_rs256(".".join(parts).encode("ascii"))))
    return ".".join(parts)


class _ThreadingServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64


class _TokenHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body go out in two writes; Nagle would hold back the second one.
    disable_nagle_algorithm = True
    timeout = 30

    def log_message(self, *args):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        owner = self.server.owner
        owner.requests.append((self.command, self.path, dict(self.headers), body))
        address = urllib.parse.urlsplit(self.path)
        if address.path != "/token":
            return self._reply(404, {"errors": [{"code": "NOT_FOUND"}]})
        query = address.query if self.command == "GET" else body.decode("utf-8")
        fields = urllib.parse.parse_qs(query)
        try:
            user = self._user(fields)
        except ValueError:
            return self._reply(401, {"errors": [{"code": "UNAUTHORIZED"}]})
        self._reply(200, owner.answer(user, fields))

    do_POST = do_GET

    def _user(self, fields):
        """The authenticated user's name, None if anonymous; ValueError if wrong."""
        header = self.headers.get("Authorization")
        if header is None and "grant_type" not in fields:
            return None
        if header is not None:
            scheme, _, value = header.partition(" ")
            given = base64.b64decode(value).decode("utf-8")
            right = (scheme.lower(), given) == ("basic", REAL_USER + ":" + REAL_PASSWORD)
        elif fields["grant_type"] == ["refresh_token"]:
            right = fields.get("refresh_token") == [REAL_IDENTITY_TOKEN]
        else:
            names = ("grant_type", "username", "password")
            given = [fields.get(name) for name in names]
            right = given == [["password"], [REAL_USER], [REAL_PASSWORD]]
        if not right:
            raise ValueError("wrong credentials")
        return REAL_USER

    def _reply(self, status, value):
        data = json.dumps(value).encode("utf-8")
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="token server"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class TokenServer:
    """GET and POST /token: anonymous may pull outside private/, alice may do all.

    A test may change `token_field` ("token", "access_token" or "both"), `expires_in`
    (what the reply says; None: nothing) and `valid_for` (seconds until the token truly
    expires; registries grant up to 60 more) at any time, and read `requests`: a list
    of (method, path with query, headers, body).
    """
    SERVICE = "registry.test"
    ISSUER = "issuer.test"

    def __init__(self):
        self.token_field = "both"
        self.expires_in = 300
        self.valid_for = 300
        self.requests = []
        self._server = _ThreadingServer(("127.0.0.1", 0), _TokenHandler)
        self._server.owner = self
        self.host = "127.0.0.1:%d" % self._server.server_address[1]
        self.url = "http://%s/token" % self.host
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.daemon = True
        self._thread.start()

    def close(self):
        """Stop listening; may be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, user, fields):
        """The JSON reply to an authenticated request for `fields` (as of parse_qs)."""
        scopes = " ".join(fields.get("scope", [])).split()
        service = fields.get("service", [self.SERVICE])[0]
        token = self.token(user, scopes, service)
        names = ["token", "access_token"]
        if self.token_field != "both":
            names = [self.token_field]
        reply = {name: token for name in names}
        if self.expires_in is not None:
            reply["expires_in"] = self.expires_in
        return reply

    def token(self, user, scopes, service=SERVICE):
        """A JWT with those of `scopes` ("type:name:action,action") `user` may have."""
        now = int(time.time())
        return make_jwt({
            "iss": self.ISSUER, "aud": service, "sub": user or "",
            "iat": now, "nbf": now - 60, "exp": now + self.valid_for,
            "jti": _real_base64url(os.urandom(12)),
            "access": [self._access(user, scope) for scope in scopes]})

    @staticmethod
    def _access(user, scope):
        # A repository's name may hold a colon of its own ("host:port/name").
        rest, _, actions = scope.rpartition(":")
        kind, _, name = rest.partition(":")
        asked = actions.split(",")
        if user is None:
            public = kind == "repository" and not name.startswith("private/")
            asked = [action for action in asked if public and action == "pull"]
        return {"type": kind, "name": name, "actions": asked}


def _free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class DockerRegistry:
    """The real docker-registry on 127.0.0.1, schema 1 enabled, stored below `root`.

    `auth` is None, "htpasswd" or "token". What was stored stays after close(), so that
    another registry with the same `root` serves it under other conditions. `env_extra`
    may override any setting (REGISTRY_STORAGE_DELETE_ENABLED=true).
    """
    # A watchdog waits for the end of its standard input, which comes even when the
    # test process is killed and can run no cleanup.
    COMMAND = ('exec 3<&0; (read _ <&3; kill $$) & '
               'exec docker-registry serve "$1" 3<&- </dev/null')

    def __init__(self, root, auth=None, tls=False, env_extra=None):
        if auth not in (None, "htpasswd", "token"):
            raise ValueError("auth: %r" % (auth,))
        self.auth = auth
        self.tls = tls
        self.storage = os.path.join(str(root), "storage")
        self.directory = tempfile.mkdtemp(prefix="registry-", dir=str(root))
        self.token_server = TokenServer() if auth == "token" else None
        self._process = None
        atexit.register(self.close)
        try:
            self._start(env_extra or {})
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        """Stop the registry and its token server; may be called twice."""
        atexit.unregister(self.close)
        self._stop()
        if self.token_server is not None:
            self.token_server.close()

    def log_text(self):
        """What docker-registry has printed so far."""
        with open(self._path("log"), "rb") as file:
            return file.read().decode("utf-8", "replace")

    def request(self, path, headers=None, method="GET"):
        """Return (status, headers, body) of one request, without any proxy."""
        if self.tls:
            context = ssl.create_default_context(cadata=REAL_CERT)
            connection = http.client.HTTPSConnection(
                self.host, timeout=10, context=context)
        else:
            connection = http.client.HTTPConnection(self.host, timeout=10)
        try:
            connection.request(method, path, headers=headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def _start(self, env_extra):
        for _ in range(3):
            self._spawn(env_extra)
            if self._answers():
                return
            self._stop()
            # Another program may have taken the free port in the meantime.
            if "address already in use" not in self.log_text():
                break
        raise RuntimeError("docker-registry does not answer:\n" + self.log_text())

    def _spawn(self, env_extra):
        self.host = "127.0.0.1:%d" % _free_port()
        self.url = "%s://%s" % ("https" if self.tls else "http", self.host)
        # Any REGISTRY_* variable would override our configuration; the exporter
        # (version 3) would look for a collector.
        env = {name: value for name, value in os.environ.items()
               if not name.startswith("REGISTRY_")}
        env["OTEL_TRACES_EXPORTER"] = "none"
        env.update(env_extra)
        with open(self._path("log"), "wb") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", self.COMMAND, "sh", self._configure()],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=env)

    def _stop(self):
        process, self._process = self._process, None
        if process is None:
            return
        process.stdin.close()
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _answers(self):
        deadline = time.monotonic() + 10
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                if self.request("/v2/")[0] in (200, 401):
                    return True
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.01)
        return False

    def _path(self, name, text=None):
        """The path of a file of ours, written first if `text` is given."""
        path = os.path.join(self.directory, name)
        if text is not None:
            with open(path, "w") as file:
                file.write(text)
        return path

    def _configure(self):
        http_part = {"addr": self.host, "secret": "not secret"}
        if self.tls:
            http_part["tls"] = {"certificate": self._path("cert.pem", REAL_CERT),
                                "key": self._path("key.pem", REAL_KEY)}
        config = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": self.storage},
                "maintenance": {"uploadpurging": {"enabled": False}}},
            "http": http_part,
            "compatibility": {"schema1": {
                "enabled": True,
                "signingkeyfile": self._path("schema1.pem", REAL_KEY)}}}
        if self.auth is not None:
            config["auth"] = {self.auth: self._auth_options()}
        # JSON is YAML, and needs no thought about quoting.
        return self._path("config.yml", json.dumps(config, indent=1))

    def _auth_options(self):
        if self.auth == "htpasswd":
            return {"realm": "registry.test",
                    "path": self._path("htpasswd", HTPASSWD)}
        return {"realm": self.token_server.url,
                "service": TokenServer.SERVICE, "issuer": TokenServer.ISSUER,
                "rootcertbundle": self._path("token.pem", TOKEN_CERT)}


def _skopeo(*arguments):
    done = subprocess.run(
        ["skopeo", "--insecure-policy"] + list(arguments), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120,
        env=dict(os.environ, NO_PROXY="*", no_proxy="*"))
    if done.returncode:
        raise AssertionError("skopeo %s: exit code %d\n%s" % (
            " ".join(arguments), done.returncode,
            done.stderr.decode("utf-8", "replace")))
    return done.stdout


def skopeo_copy(source, destination, *options):
    """Copy an image with skopeo; both sides may be insecure registries."""
    _skopeo("copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false",
            *(options + (source, destination)))


def _creds(creds):
    return () if creds is None else ("--creds", creds)


def skopeo_inspect(ref, *options, creds=None):
    """What `skopeo inspect` says of `ref`, as a dict; creds: "user:password"."""
    options = _creds(creds) + options
    return json.loads(_skopeo(
        "inspect", "--tls-verify=false", *(options + (ref,))).decode("utf-8"))


def skopeo_raw(ref, *options, creds=None):
    """The manifest of `ref` byte by byte, as its registry serves it to skopeo."""
    options = _creds(creds) + options
    return _skopeo("inspect", "--raw", "--tls-verify=false", *(options + (ref,)))


def _write_blob(layout, media_type, data):
    digest = hashlib.sha256(data).hexdigest()
    with open(os.path.join(layout, "blobs", "sha256", digest), "wb") as file:
        file.write(data)
    return {"mediaType": media_type, "digest": "sha256:" + digest, "size": len(data)}


def _write_json(layout, kind, value):
    return _write_blob(layout, "application/vnd.oci.image.%s.v1+json" % kind,
                       json.dumps(value, sort_keys=True).encode("utf-8"))


def _gzip(data):
    # Without a fixed time equal layers would have different digests.
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as file:
        file.write(data)
    return out.getvalue()


def oci_layout(path, layers, config_extra=None, platform="linux/amd64"):
    """Write an OCI image layout with tag `latest` to the new directory `path`.

    `layers` are uncompressed tar files (bytes); `config_extra` replaces members of
    the image's configuration; `platform` is "os/architecture[/variant]".
    """
    path = str(path)
    os.makedirs(os.path.join(path, "blobs", "sha256"))
    config = dict(zip(("os", "architecture", "variant"), platform.split("/")))
    diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    created = "2001-02-03T04:05:06Z"
    config.update(created=created, config={},
                  rootfs={"type": "layers", "diff_ids": diff_ids},
                  # Conversion to schema 1 needs one entry for each layer.
                  history=[{"created": created, "created_by": "layer %d" % number}
                           for number in range(len(layers))])
    config.update(config_extra or {})
    manifest = {"schemaVersion": 2, "config": _write_json(path, "config", config),
                "layers": [_write_blob(
                    path, "application/vnd.oci.image.layer.v1.tar+gzip", _gzip(layer))
                    for layer in layers]}
    entry = _write_json(path, "manifest", manifest)
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    with open(os.path.join(path, "index.json"), "w") as file:
        json.dump({"schemaVersion": 2, "manifests": [entry]}, file)
    with open(os.path.join(path, "oci-layout"), "w") as file:
        json.dump({"imageLayoutVersion": "1.0.0"}, file)
    return path


def seed(registry, repository, layers):
    """Push `layers` (tar bytes) as tags v2s1, v2s2, oci and zstd of `repository`."""
    creds = ()
    if registry.auth is not None:
        creds = ("--dest-creds", REAL_USER + ":" + REAL_PASSWORD)
    tag_at = "docker://%s/%s:" % (registry.host, repository)
    with tempfile.TemporaryDirectory() as directory:
        plain = "oci:%s:latest" % oci_layout(os.path.join(directory, "gzip"), layers)
        for name in ("v2s1", "v2s2", "oci"):
            skopeo_copy(plain, tag_at + name, "--format", name, *creds)
        # On the way to a registry skopeo would rather reuse the gzip blobs it knows to
        # be there than compress anew; a fresh directory offers it nothing to reuse.
        zstd = "oci:%s:latest" % os.path.join(directory, "zstd")
        skopeo_copy(plain, zstd, "--dest-compress-format", "zstd")
        skopeo_copy(zstd, tag_at + "zstd", "--preserve-digests", *creds)


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
