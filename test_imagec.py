#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of imagec, in the order of its rooms; standard library only.

    python3 test_imagec.py                 all, side by side on the cores there are
    python3 test_imagec.py [-v] ProxyTest DocumentsTest.test_canonical_json

Most talk to a registry double on loopback whose faults are data. Those that need a real
program (docker-registry, skopeo, podman, ...) are skipped where it is missing. With
IMAGEC_TEST_NO_SKIP=1 whatever is skipped fails, save what the machine cannot have; with
IMAGEC_TEST_NO_PROGRAMS=1 no program is looked for; with IMAGEC_TEST_ALL=1 every fault
meets every operation.
"""

import ast
import base64
import bisect
import builtins
import bz2
import collections
import concurrent.futures
import contextlib
import copy
import errno
import functools
import gc
import glob
import gzip
import hashlib
import hmac
import http.client
import io
import itertools
import json
import logging
import lzma
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import symtable
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
import types
import unittest
import urllib.parse
import urllib.request
import warnings
import zlib
from email.message import Message
from unittest import mock

import imagec

MODULE_PATH = os.path.abspath(imagec.__file__)
HOME = os.path.dirname(MODULE_PATH)
#: In memory where the system has such a place: thousands of files come and go.
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
#: Runs the command line argv[2:] of the module in the directory argv[1].
LAUNCHER = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import imagec; "
            "sys.exit(imagec.main())")
#: What lives as long as the tests of this process.
FIXTURES = contextlib.ExitStack()


def setUpModule():
    """One environment for every test, and for every process that one starts.

    Whatever runs the tests, no variable, file or mask of its own has a part in them.
    All that they write is in one directory, in which nothing may be left.
    """
    place = tempfile.mkdtemp(prefix="imagec-test-", dir=SCRATCH)
    FIXTURES.callback(remove, place)
    os.chmod(place, 0o755)  # some tests become another user
    roots = os.path.join(place, "roots.pem")
    write_file(roots, TEST_CERT)  # to read the system's takes longer than a pull
    FIXTURES.callback(os.environ.update, dict(os.environ))
    FIXTURES.callback(os.environ.clear)
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT")
            if name in os.environ}
    os.environ.clear()
    os.environ.update(kept, HOME=os.path.join(place, "home"), TMPDIR=place,
                      XDG_RUNTIME_DIR=os.path.join(place, "run"), SSL_CERT_FILE=roots,
                      SSL_CERT_DIR=os.path.join(place, "no-such"))
    FIXTURES.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
    tempfile.tempdir = place
    FIXTURES.callback(os.umask, os.umask(0o022))
    FIXTURES.callback(nothing_left_in, place)


def nothing_left_in(place):
    """Raises AssertionError where the tests have left something behind."""
    left = sorted(set(os.listdir(place)) - {"roots.pem"})
    assert not left, "left behind: %s" % left


def tearDownModule():
    FIXTURES.close()


def kept(thing):
    """Something that is closed when all is done: each class runs in its own process."""
    FIXTURES.callback(thing.close)
    return thing


def remove(path):
    """Removes a file or tree, whatever modes are in it."""
    if os.path.islink(path) or not os.path.isdir(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    for folder, names, _ in os.walk(path):
        os.chmod(folder, 0o700)
        for name in names:
            if not os.path.islink(os.path.join(folder, name)):
                os.chmod(os.path.join(folder, name), 0o700)
    shutil.rmtree(path, ignore_errors=True)


def field_base64(text):
    return base64.b64encode(text.encode("utf-8")).decode("ascii")


def file_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def file_text(path):
    return file_bytes(path).decode("utf-8", "replace")


def write_file(path, data):
    """Write bytes or a text to a file, and the directories above it; its path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
    return path


def below(top):
    """(path, its lstat) of all that stands below a place."""
    for folder, names, files in os.walk(top):
        for path in [os.path.join(folder, name) for name in names + files]:
            with contextlib.suppress(FileNotFoundError):
                yield path, os.lstat(path)


def contents(top):
    """{relative path: bytes, or where a link leads} of all below a place."""
    return {os.path.relpath(path, top): os.readlink(path) if stat.S_ISLNK(
        facts.st_mode) else file_bytes(path) if stat.S_ISREG(facts.st_mode) else None
        for path, facts in below(top) if not stat.S_ISDIR(facts.st_mode)}


def noise(size, seed=0):
    """Bytes that no codec makes smaller, the same each time."""
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, "little")


# --------------------------------------------------------------------------------------
# Fixtures: images built in memory, and a registry double whose faults are data
# --------------------------------------------------------------------------------------

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = None

# Every key here is public knowledge, and guards nothing. TEST_CERT is for localhost and
# 127.0.0.1, until 2126; like the others it is its own CA.
TEST_CERT, TEST_KEY = re.findall("(?s)-----BEGIN.*?-----END[^\n]+\n", imagec._TEST_PEM)
P256_ORDER = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551
P256_BASE = bytes.fromhex(
    "6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"
    "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5")
TEST_SECRET = int.from_bytes(
    ssl.PEM_cert_to_DER_cert(TEST_KEY.replace("PRIVATE KEY", "CERTIFICATE"))[36:68],
    "big")


def ecdsa(message, secret=TEST_SECRET):
    """(r, s) of SHA-256, P-256 and the nonce 1, which gives every secret away."""
    r = int.from_bytes(P256_BASE[:32], "big")
    number = int.from_bytes(hashlib.sha256(message).digest(), "big")
    return r, (number + r * secret) % P256_ORDER


def der(kind, *parts):
    """A value of ASN.1."""
    data = b"".join(parts)
    size = len(data).to_bytes(2, "big").lstrip(b"\0") or b"\0"
    return bytes([kind]) + (
        bytes([0x80 + len(size)]) + size if len(data) >= 128 else size) + data


def certificate(*changes, secret=TEST_SECRET):
    """TEST_CERT with changes (old bytes, new bytes), signed again."""
    signed = ssl.PEM_cert_to_DER_cert(TEST_CERT)[4:301]  # all but the signature
    for old, new in changes:
        assert old in signed
        signed = signed.replace(old, new)
    pair = [der(2, number.to_bytes(number.bit_length() // 8 + 1, "big"))
            for number in ecdsa(signed, secret)]
    return ssl.DER_cert_to_PEM_cert(der(
        0x30, signed, bytes.fromhex("300a06082a8648ce3d040302"),
        der(3, b"\0", der(0x30, *pair))))


EXPIRED_CERT = certificate((b"21260101", b"20210101"))
# Of the key 1, whose public half is the base itself.
OTHER_CERT = certificate(
    (b"localhost", b"elsewhere"), (b"\x87\4\x7f\0\0\1", b"\x87\4\xc0\0\2\1"),
    (ssl.PEM_cert_to_DER_cert(TEST_CERT)[141:205], P256_BASE),  # the public key
    secret=1)
OTHER_KEY = ssl.DER_cert_to_PEM_cert(bytes.fromhex(
    "3041020100301306072a8648ce3d020106082a8648ce3d030107042730250201010420")
    + (1).to_bytes(32, "big")).replace("CERTIFICATE", "PRIVATE KEY")

CREATED = "2020-01-01T00:00:00Z"
RUN_CONFIG = {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]}

# The blob that stands in schema1 for a layer that changed nothing: an empty tar,
# gzipped by the first docker; its digest (a3ed95ca...) is known to every client.
EMPTY_LAYER = bytes.fromhex(
    "1f8b080000096e8800ff621805a360148c5800080000ffff2eafb5ef00040000")

# The public half of TEST_KEY; `kid` is its libtrust fingerprint, as clients check.
JWK = {"crv": "P-256", "kty": "EC",
       "kid": "6JRW:KSZO:5PDT:2UL4:XFVA:IJ32:EXSA:A6Y5:ESDW:SY4L:JGXE:7FU7",
       "x": "P9ICVfqLsw5-qPg5Y4_8mIzRmWMnn9sytv16WvL1nWg",
       "y": "blbmBUc-fKabLDxyJdrqGmljp-BqbM26TtAq25iuZAg"}

TITLE = "org.opencontainers.image.title"
_OCI = "application/vnd.oci.image."
_DOCKER = "application/vnd.docker."
MEDIA_TYPES = {
    "oci": {"manifest": _OCI + "manifest.v1+json", "index": _OCI + "index.v1+json",
            "config": _OCI + "config.v1+json", "layer": _OCI + "layer.v1.tar",
            "gzip": "+gzip", "zstd": "+zstd"},
    "docker": {"manifest": _DOCKER + "distribution.manifest.v2+json",
               "index": _DOCKER + "distribution.manifest.list.v2+json",
               "config": _DOCKER + "container.image.v1+json",
               "layer": _DOCKER + "image.rootfs.diff.tar",
               "gzip": ".gzip", "zstd": ".zstd"},
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
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT,
                      encoding="utf-8", errors="surrogateescape") as tar:
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


def zstd_bytes(data):
    return subprocess.run(["zstd", "-qc"], input=data, stdout=subprocess.PIPE,
                          check=True).stdout


def build_image(layers, kind="oci", platform=("linux", "amd64", None),
                compress=gzip_bytes, **config_extra):
    """Build an image of kind oci, docker, schema1 or schema1-signed.

    `layers` are uncompressed tars, oldest first; None is a step without a layer.
    `compress` may be None; `config_extra` overrides members of the image config.
    """
    steps = [tar if tar is None or compress is None else compress(tar)
             for tar in layers]
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
    document = {"schemaVersion": 2, "mediaType": MEDIA_TYPES[kind]["index"],
                "manifests": entries + list(extra_entries)}
    index = BuiltImage(json_bytes(document, 3), document["mediaType"])
    index.children = [image for image, _ in images_with_platforms]
    return index


def build_artifact(blobs, kind="application/vnd.example", config=b"{}",
                   config_type="application/vnd.oci.empty.v1+json", **members):
    """Build an artifact of rows (media type, bytes, annotations or a title)."""
    document = {"schemaVersion": 2, "mediaType": MEDIA_TYPES["oci"]["manifest"],
                "config": _descriptor(config_type, config), "layers": []}
    if kind:
        document["artifactType"] = kind
    for media_type, data, notes in blobs:
        notes = {TITLE: notes} if isinstance(notes, str) else notes
        document["layers"].append(_descriptor(
            media_type, data, **{"annotations": notes} if notes else {}))
    image = BuiltImage(json_bytes(dict(document, **members)), document["mediaType"],
                       config=config)
    image.blobs = {sha256(data): data for data in [config] + [row[1] for row in blobs]}
    image.layers = [sha256(row[1]) for row in blobs]
    return image


def json_bytes(document, indent=None):
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
    history = []
    for number, blob in enumerate(steps):
        history.append({"created": CREATED, "created_by": _command(number, blob)})
        if blob is None:
            history[-1]["empty_layer"] = True
    config = json_bytes(dict(dict(
        _platform(platform), created=CREATED, config=RUN_CONFIG, history=history,
        rootfs={"type": "layers", "diff_ids": diff_ids}), **extra))
    types = MEDIA_TYPES[kind]
    layers = [blob for blob in steps if blob is not None]
    codings = {b"\x1f\x8b": types["gzip"], b"\x28\xb5": types["zstd"]}
    document = {
        "schemaVersion": 2,
        "mediaType": types["manifest"],
        "config": _descriptor(types["config"], config),
        "layers": [_descriptor(types["layer"] + codings.get(blob[:2], ""), blob)
                   for blob in layers],
    }
    image = BuiltImage(json_bytes(document, 3), types["manifest"], config=config)
    image.blobs[sha256(config)] = config
    return image


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
        "history": [{"v1Compatibility": json_bytes(entry).decode("ascii") + "\n"}
                    for entry in reversed(history)],
    }
    payload = json_bytes(document, 3)
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
        entry = {"id": hashlib.sha256(seed.encode("ascii")).hexdigest(),
                 "created": CREATED,
                 "container_config": {"Cmd": [_command(number, blob)]}}
        if parent:
            entry["parent"] = parent
        if blob is None:
            entry["throwaway"] = True
        history.append(entry)
        parent = entry["id"]
    if history:
        history[-1].update(_platform(platform), docker_version="1.12.6",
                           config=RUN_CONFIG)
        history[-1].update(extra)
    return history


def _sign(payload):
    """Append libtrust's `signatures` before the closing brace of a JSON document.

    The signature is arbitrary bytes: registries have long stopped checking it.
    """
    return pretty(payload, [dict(
        protected(formatLength=len(payload) - 2, formatTail=b"\n}", time=CREATED),
        header={"jwk": JWK, "alg": "ES256"},
        signature=url64(hashlib.sha512(payload).digest()))])


def url64(data):
    """Base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def base64url_decode(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


# -- Wire: Request, Reply and Server, which know HTTP and nothing of registries

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
        _with_headers(self, dict(headers))

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
        body = iter(()) if bare else body
        # Head and body in one packet: apart they cost a delayed ACK.
        yield self.head() + next(body, b"")
        for block in body:
            yield block

    def _span(self, phase):
        """The offset and length of a phase within the reply."""
        head = self.head()
        status_line = head.find(b"\n") + 1
        return {"status": (0, status_line),
                "headers": (status_line, len(head) - status_line),
                "body": (len(head), len(self.body))}[phase]

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

    def retire(self):
        """It strikes no more: the next row of a table finds the server well."""
        assert self.used, "%s: never met" % self.match
        self.times = self.used


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
                sock, server_side=True, do_handshake_on_connect=False)
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
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # The ssl module takes a key from a file only.
    with tempfile.TemporaryDirectory() as folder:
        context.load_cert_chain(write_file(os.path.join(folder, "pair.pem"), {
            True: TEST_CERT + TEST_KEY, "expired": EXPIRED_CERT + TEST_KEY,
            "wrong-host": OTHER_CERT + OTHER_KEY}[kind]))
    return context


# -- Faults: each takes the true Reply and returns the one to send
# An amount is a number of bytes (negative: from the end) or a fraction of the whole.

def action(change):
    """What is called with all but the Reply, and gives what is done to one."""

    @functools.wraps(change)
    def given(*args, **options):
        def done(reply):
            return change(reply, *args, **options)
        done.early = "accept" in args or options.get("phase") == "accept"
        return done
    return given


@action
def status(reply, code, headers=(), body=b""):
    """Answer `code` instead."""
    return Reply(code, body, headers)


@action
def body(reply, data, **headers):
    """Answer 200 with `data`; of the true headers only Content-Type remains."""
    kind = {"Content-Type": reply.headers["Content-Type"]}
    return _with_headers(Reply(200, data, kind), headers)


@action
def headers(reply, **changed):
    """Replace headers of the true reply, or remove those given as None."""
    return _with_headers(reply, changed)


@action
def redirect(reply, location, code=307):
    """Point elsewhere; None leaves the Location out."""
    return Reply(code, headers={"Location": location})


@action
def flip(reply, offset=-1):
    """Flip one bit of the body about to be sent."""
    spoiled = bytearray(reply.body)
    spoiled[offset] ^= 1
    return _set(reply, body=bytes(spoiled))


@action
def truncate(reply, amount=0.5):
    """Close cleanly in mid-body; truncate(1.0) closes an idle connection unannounced.

    Over TLS there is no close_notify, as when an attacker cuts the connection.
    """
    return _set(reply, cut=("body", amount), ending="fin")


@action
def reset(reply, amount=0.5, phase="body"):
    """Send RST in mid-phase: accept, status, headers or body.

    At accept it strikes the next connection, before TLS and whatever the match.
    """
    cut = ("status", 0) if phase == "accept" else (phase, amount)
    return _set(reply, cut=cut, ending="reset")


@action
def extra(reply, count, lie=False):
    """Add zero bytes to the true body; with `lie` past its Content-Length.

    The connection stays open after a lie, its next reply out of step.
    """
    if lie:
        return _set(reply, more=[bytes(count)])
    reply.fill(reply.body + bytes(count))
    return reply


@action
def endless(reply, chunk=bytes(BLOCK), interval=0, framing="chunked"):
    """Let the true body be followed by `chunk` again and again, for a gigabyte.

    `framing` is chunked, length (all of it declared) or close. With an interval all
    of the body comes at the pace of one chunk.
    """
    count = (1 << 30) // len(chunk)
    reply.more = itertools.repeat(chunk, count)
    if interval:
        reply.pace = ("body", interval, len(chunk))
    if framing == "chunked":
        return chunked(BLOCK)(reply)
    if framing == "close":
        return close_delimited()(reply)
    reply.put("Content-Length", str(len(reply.body) + count * len(chunk)))
    return reply


@action
def chunked(reply, size=4096):
    """Send the true body with chunked transfer coding."""
    reply.chunk = size
    return _with_headers(
        reply, {"content_length": None, "transfer_encoding": "chunked"})


@action
def close_delimited(reply):
    """Send the true body without a length; only the end of the connection ends it."""
    reply.ending = "close"
    return _with_headers(reply, {"content_length": None, "connection": "close"})


@action
def no_range(reply):
    """Answer 200 with the whole blob to a request for a part."""
    reply.code = 200
    reply.fill(reply.whole)
    return _with_headers(reply, {"content_range": None, "accept_ranges": None})


@action
def partial(reply, content_range, start):
    """Answer 206 with this Content-Range and the blob from `start` on."""
    reply.code = 206
    reply.fill(reply.whole[start:])
    return _with_headers(reply, {"content_range": content_range})


@action
def delay(reply, seconds):
    """Wait, then send the true reply."""
    return _set(reply, pause=seconds)


@action
def drip(reply, interval, chunk=1, phase="body"):
    """Send `chunk` bytes each interval, from status, headers or body on."""
    return _set(reply, pace=(phase, interval, chunk))


@action
def garbage(_reply, data, phase="request"):
    """Send raw bytes in place of an HTTP reply, then close.

    With phase "accept" they answer the first bytes of a connection, also of TLS.
    """
    return _set(Reply(200), raw=data, ending="fin")


@action
def hang(_reply, seconds=60, phase="request"):
    """Close without an answer after some time; phase "accept" stalls TLS too."""
    return _set(Reply(200), raw=b"", ending="fin", pause=seconds)


def _set(reply, **attributes):
    vars(reply).update(attributes)
    return reply


def _with_headers(reply, changed):
    for name, value in changed.items():
        reply.put(name, value)
    return reply


# -- Registry: FakeRegistry, also a token server and a CDN, and RegistryCase

# One word in every secret, so that a leak is found by searching for it.
PASSWORD = "S3CR3T"
SIGNATURE = "S3CR3T-SIG"
IDENTITY_TOKEN = "S3CR3T-IDENTITY"


class FakeRegistry(Server):
    """A registry of the distribution API; all attributes may be changed live."""

    auth = None  # or basic, bearer
    realm = None  # token URL; None = its own
    anonymous = True  # gives tokens without credentials
    service = "fixture"
    token_field = "token"  # or access_token, both
    token_uses = None  # requests a token is good for, None = any number
    challenge = None  # WWW-Authenticate: a str, or a list for several headers
    version_header = True
    redirect_blobs_to = None  # base URL of the FakeRegistry that serves /cdn/
    page_size = None  # most tags, or referrers, in one reply
    lists_referrers = True

    # {token: scopes}, of all registries: one may trust the tokens of another.
    tokens = {}

    def __init__(self, tls=False, **attributes):
        self.users = {"alice": PASSWORD}
        self.blobs = {}  # {digest: bytes}
        self.repositories = {}  # {name: {tag or digest: (bytes, media type, digest)}}
        self._uses = collections.Counter()
        vars(self).update(attributes)
        super().__init__(tls)

    def add(self, repository, tag, image):
        """Store an image or index with all that it refers to; return its digest."""
        for child in image.children:
            self.add(repository, None, child)
        for blob in image.blobs.values():
            self.add_blob(repository, blob)
        return self.add_manifest(repository, tag, image.manifest, image.media_type,
                                 image.digest)

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

    def _manifest(self, request, repository, reference):
        entry = self.repositories.get(repository, {}).get(reference)
        if entry is None:
            return _error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        data, media_type, digest = entry
        return Reply(200, data, {"Content-Type": media_type,
                                 "Docker-Content-Digest": digest})

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
            reply.put("Link",
                      '</v2/%s/tags/list?%s>; rel="next"' % (repository, more))
        return reply

    def _referrers(self, request, repository, subject):
        if repository not in self.repositories or not self.lists_referrers:
            return _error(404, "UNSUPPORTED", "no such endpoint")
        entries = {}
        for data, media_type, digest in self.repositories[repository].values():
            said = json.loads(data.decode("utf-8")) if b'"subject"' in data else {}
            if said.get("subject", {}).get("digest") == subject:
                entries[digest] = _descriptor(
                    media_type, data, artifactType=said.get("artifactType", ""),
                    annotations=said.get("annotations", {}))
        first = int(request.query.get("first", ["0"])[0])
        end = first + (self.page_size or len(entries))
        reply = Reply(200, json_bytes({
            "schemaVersion": 2, "mediaType": MEDIA_TYPES["oci"]["index"],
            "manifests": [entries[digest] for digest in sorted(entries)][first:end]}),
            {"Content-Type": MEDIA_TYPES["oci"]["index"]})
        if end < len(entries):
            reply.put("Link", '</v2/%s/referrers/%s?first=%d>; rel="next"' % (
                repository, subject, end))
        return reply

    def _token(self, request):
        if self.auth != "bearer" or self.realm:
            return _error(404, "UNSUPPORTED", "not a token server")
        form = request.query
        if request.method == "POST":
            form = urllib.parse.parse_qs(request.body.decode("ascii"))
        if not self._trusts(request, form):
            return _error(401, "UNAUTHORIZED", "incorrect username or password")
        known = request.method == "POST" or "Authorization" in request.headers
        token = self.token(known, " ".join(form.get("scope", [])).split())
        document = {field: token for field in ("token", "access_token")
                    if self.token_field in (field, "both")}
        # Only token_uses ends a token.
        return _json_reply(dict(document, expires_in=300))

    def token(self, known, scopes):
        """A new token of who has these scopes, for a known user or for anybody."""
        token = "S3CR3T-TOKEN-" + os.urandom(16).hex()
        self.tokens[token] = scopes
        return token

    def _trusts(self, request, form):
        """May whoever asks for a token have one?"""
        first = {name: values[0] for name, values in form.items()}
        if first.get("service", self.service) != self.service:
            return False
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
        found = re.match("/v2/(.+)/(?:manifests|blobs|tags|referrers)/", request.route)
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
            for resource, _, actions in resources)

    _routes = (
        ("(?:GET|HEAD) /v2/", lambda self, request: _json_reply({})),
        ("(?:GET|HEAD) /v2/(.+)/manifests/([^/]+)", _manifest),
        ("(?:GET|HEAD) /v2/(.+)/blobs/([^/]+)", _blob),
        ("(?:GET|HEAD) /v2/(.+)/tags/list", _tags),
        ("(?:GET|HEAD) /v2/(.+)/referrers/([^/]+)", _referrers),
        ("(?:GET|HEAD) /cdn/([^/]+)", _cdn),
        ("(?:GET|POST) /token", _token),
    )


def _credentials(request):
    """The scheme, in lower case, and the secret of an Authorization header."""
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower(), secret


def _json_reply(document, code=200):
    return Reply(code, json_bytes(document), {"Content-Type": "application/json"})


def _error(code, name, message):
    return _json_reply({"errors": [{"code": name, "message": message}]}, code)


Ended = collections.namedtuple("Ended", "status out err")


class RegistryCase(unittest.TestCase):
    """A directory and registries of its own, and imagec to run against them.

    No fault of a registry may stay unused. `naps` are the seconds it waited for another
    try, `said` its warnings.
    """

    OFFERED = "lab/app:1"

    def setUp(self):
        self.root = tempfile.mkdtemp()
        self.addCleanup(remove, self.root)
        os.chmod(self.root, 0o755)
        self.work = os.path.join(self.root, "work")
        os.mkdir(self.work)
        self.patch(mock.patch.dict(os.environ))
        # What other tests have learnt would be hidden in this one.
        self.patch(mock.patch.object(imagec, "SECRETS", imagec.Secrets()))
        self.naps, self.said = [], []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.said.append(record.getMessage())
        self.patch(mock.patch.object(imagec.log, "handlers", [handler]))
        self.patch(mock.patch.object(imagec.log, "propagate", False))

    def patch(self, patcher):
        started = patcher.start()
        self.addCleanup(patcher.stop)
        return started

    def at(self, *parts):
        return os.path.join(self.work, *parts)

    def clear(self):
        remove(self.work)
        os.mkdir(self.work)

    def file(self, name, content=b""):
        """Write a file below the root, JSON unless it is text or bytes; its path."""
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        return write_file(os.path.join(self.root, *name.split("/")), content)

    def registry(self, **options):
        """Start a FakeRegistry that ends with the test."""
        registry = FakeRegistry(**options)
        self.addCleanup(self._end_registry, registry)
        return registry

    def _end_registry(self, registry):
        registry.close()
        unused = [f.match for f in registry.faults if f.times and not f.used]
        self.assertEqual(unused, [], "faults that were never used")

    def filled(self, image=None, name=None, **options):
        """A registry that has the image, or self.image."""
        registry = self.registry(**options)
        repository, _, tag = (name or self.OFFERED).partition(":")
        registry.add(repository, tag or "1", image or self.image)
        return registry

    def session(self, **options):
        session = imagec.Session(**dict({"idle_timeout": 5}, **options))
        session.transport.wait = self.naps.append
        self.addCleanup(session.transport.close)
        return session

    @staticmethod
    def pulled_by(session, path, format, *references):
        """Pull for linux/amd64: the Images."""
        return session.pull(list(map(imagec.Reference.parse, references)),
                            imagec.new_output(path, format),
                            imagec.Platform.parse("linux/amd64"))

    def transport(self, named=(), **options):
        transport = imagec.Transport(**dict({"idle_timeout": 5}, **options))
        transport.wait = self.naps.append
        for host in named:
            transport.tls.name(host)
        self.addCleanup(transport.close)
        return transport

    # Building the parser takes as long as a small pull.
    parser = staticmethod(functools.lru_cache(maxsize=None)(imagec.argument_parser))

    def main(self, *argv, stdin="", stderr=None, **environ):
        """Run a command line here; it retries at once, and syncs nothing."""
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n")
        given = io.TextIOWrapper(io.BytesIO(
            stdin.encode("utf-8", "surrogateescape")), encoding="utf-8")
        err = io.StringIO() if stderr is None else stderr
        with warnings.catch_warnings(), mock.patch.dict(os.environ, environ), \
                mock.patch.multiple(sys, stdin=given, stdout=out, stderr=err), \
                mock.patch.object(os, "fsync"), \
                mock.patch.multiple(imagec, BACKOFF=0,
                                    argument_parser=lambda words: self.parser()):
            # What another test has left open may be told at any moment.
            warnings.simplefilter("ignore", ResourceWarning)
            status = imagec.main(list(argv))
        out.flush()
        return Ended(status, out.buffer.getvalue(), err.getvalue())

    def start(self, *argv, redirections="", python=sys.executable, environ=None,
              **options):
        """A command line in a process of its own, which does not outlive the test."""
        command = [python, "-c", LAUNCHER, HOME] + list(argv)
        if redirections:
            command = ["sh", "-c", 'exec "$@" ' + redirections, "sh"] + command
        options = dict({"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
                        "stderr": subprocess.PIPE}, **options)
        process = subprocess.Popen(command, env=dict(os.environ, **environ or {}),
                                   **options)
        self.addCleanup(self.reap, process)
        return process

    @staticmethod
    def end_of(process):
        """The end of what was started."""
        out, err = process.communicate(timeout=20)
        return Ended(process.returncode, out or b"",
                     (err or b"").decode("utf-8", "replace"))

    @staticmethod
    def reap(process):
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def assert_one_line(self, ended, code, words="."):
        """A command came to nothing but an error in words that match, one line."""
        self.assertEqual(ended.status, code, ended.err)
        self.assertRegex(ended.err, r"\Aimagec: [^\n]+\n\Z")
        self.assertNotIn("Traceback", ended.err)
        self.assertRegex(ended.err, words)
        self.assertEqual(ended.out, b"")

    def wait_until(self, true):
        """Wait until `true()`, not for ever."""
        deadline = time.monotonic() + 60
        while not true():
            self.assertLess(time.monotonic(), deadline, "never came")
            time.sleep(0.002)

    @contextlib.contextmanager
    def fails(self, kind, *words):
        """The block raises `kind`, in words that hold no secret and fit one line."""
        with self.assertRaises(kind) as caught:
            yield caught
        text = str(caught.exception)
        for word in words:
            self.assertIn(word, text)
        self.assertNotIn(PASSWORD, text)
        self.assertNotIn("\n", text)


#: Starts command lines in processes of their own, forked off one that has imported all
#: that is needed. A line of JSON in (a job, or the process ID to wait for), one out.
SERVANT = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import imagec, concurrent.futures.thread, shutil, tarfile, bz2, lzma, queue, tempfile
import http.client, encodings.idna, encodings.ascii, getpass, select, socket, threading
parser = imagec.argument_parser()
imagec.argument_parser = lambda words: parser
class Small(socket.socket):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # What the kernel holds is lost with us, and by default it may hold megabytes.
        self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
# The C library opens libgcc when the first thread ends: not under a limit, please.
thread = threading.Thread(target=int)
thread.start()
thread.join()
def child(job):
    import resource
    out = os.open(job["files"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.close(out)
    os.chdir(job["cwd"])
    os.umask(job["umask"])
    os.environ.update(job["environ"])
    for name, value in job["limits"].items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        resource.setrlimit(getattr(resource, name), (value, hard))
    for name, value in job["patches"].items():
        setattr(imagec, name, value)
    if job["small"]:
        socket.socket = Small
    if job["user"]:
        os.setgroups([])
        os.setgid(job["user"])
        os.setuid(job["user"])
    sys.argv[1:] = job["argv"]
    return imagec.main()
for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    if isinstance(job, int):
        _, status, usage = os.wait4(job, 0)
        print(json.dumps([status, usage.ru_maxrss]), flush=True)
        continue
    process = os.fork()
    if not process:
        code = 99
        try:
            code = child(job)
        except KeyboardInterrupt:  # before main began, or after it ended
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)  # as Python itself does
        except Exception:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(process, flush=True)
"""


class Servant:
    """Runs command lines in processes that can be limited, killed and measured."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVANT, HOME], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, universal_newlines=True)

    def _ask(self, value):
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *argv, cwd=".", environ=None, umask=0o22, limits=None, patches=None,
              small=False, user=None):
        """Start a command line: (process ID, where its stderr goes).

        `limits` are of the resource module, `patches` of imagec; `small` is how much of
        what was sent the kernel may hold. What another user may not read is imported.
        """
        number, path = tempfile.mkstemp(prefix="stderr")
        os.close(number)
        return self._ask({
            "argv": argv, "files": path, "cwd": cwd, "umask": umask, "small": small,
            "user": user, "environ": environ or {}, "limits": limits or {},
            "patches": dict({"BACKOFF": 0}, **patches or {})}), path

    def end(self, started):
        """Wait for it; its peak of memory is in KiB."""
        process, path = started
        status, peak = self._ask(process)
        code = status >> 8 if not status & 127 else -(status & 127)
        words = file_text(path)
        os.unlink(path)
        return Measured(code, b"", words, peak)

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


Measured = collections.namedtuple("Measured", "status out err peak")


# --------------------------------------------------------------------------------------
# Fixtures: programs that are not ours
# --------------------------------------------------------------------------------------

REAL_USER = "alice"
REAL_PASSWORD = "S3CR3T-alice"
HTPASSWD = "alice:$2y$05$iDvtX8u8w5YZoCLdJ05Lju5JHv5DI7R3BLLUsGlllgBJcffhe47cy\n"


#: In CI: what is skipped fails, but for what a kind of machine cannot have.
NO_SKIP = bool(os.environ.get("IMAGEC_TEST_NO_SKIP"))
#: Whether to leave out what needs other programs: they are the same for all Pythons.
NO_PROGRAMS = bool(os.environ.get("IMAGEC_TEST_NO_PROGRAMS"))
CANNOT, LEFT_OUT = "this machine cannot ", "left out: needs "


def excused(reason):
    """Whether a test may be skipped for this reason even in CI."""
    return all(part.startswith((CANNOT, LEFT_OUT)) for part in reason.split("; "))


def cannot(what):
    """Skips the running test, for what no installing would bring to this machine."""
    raise unittest.SkipTest(CANNOT + what)


def lacking(what):
    """Skips the running test, for what could be put right on this machine."""
    raise unittest.SkipTest("not here: " + what)


def needs(*programs):
    """Skips the decorated test or class unless every program is on the PATH."""
    missing = [name for name in programs if shutil.which(name) is None]
    if NO_PROGRAMS:
        return unittest.skip(LEFT_OUT + ", ".join(programs))
    return unittest.skipUnless(not missing, "not installed: " + ", ".join(missing))


#: Where it is False, rows with zstd are left out, and a test that says so is skipped.
CAN_ZSTD = bool(shutil.which("zstd"))
needs_zstd = unittest.skipUnless(CAN_ZSTD, "not installed: zstd")


def able(condition, what):
    """Skips the decorated test or class where this machine cannot do a thing."""
    return unittest.skipUnless(condition, CANNOT + what)


class TokenServer(FakeRegistry):
    """A token server whose tokens the real docker-registry takes.

    Anonymous may pull outside private/, alice may do all. A token truly expires after
    `valid_for` seconds; registries grant up to 60 more.
    """
    auth, service, issuer = "bearer", "registry.test", "issuer.test"
    token_field = "both"
    valid_for = 300

    def __init__(self):
        super().__init__(users={REAL_USER: REAL_PASSWORD})

    def token(self, known, scopes):
        """A JWT with those of the scopes (type:name:action,action) one may have."""
        now = int(time.time())
        claims = {
            "iss": self.issuer, "aud": self.service, "sub": REAL_USER if known else "",
            "iat": now, "nbf": now - 60, "exp": now + self.valid_for,
            "jti": os.urandom(12).hex(),
            "access": [self._access(known, scope) for scope in scopes]}
        # x5c and not kid: registry 2.x and 3.x compute a key's id differently.
        header = {"typ": "JWT", "alg": "ES256",
                  "x5c": ["".join(TEST_CERT.split("\n")[1:-2])]}
        parts = [url64(json_bytes(part)) for part in (header, claims)]
        signed = ".".join(parts)
        pair = [number.to_bytes(32, "big") for number in ecdsa(signed.encode("ascii"))]
        return "%s.%s" % (signed, url64(b"".join(pair)))

    @staticmethod
    def _access(known, scope):
        # A repository's name may hold a colon of its own ("host:port/name").
        rest, _, actions = scope.rpartition(":")
        kind, _, name = rest.partition(":")
        asked = actions.split(",")
        if not known:
            public = kind == "repository" and not name.startswith("private/")
            asked = [action for action in asked if public and action == "pull"]
        return {"type": kind, "name": name, "actions": asked}


def _free_port():
    """A port nobody has, of those that a system does not give out by itself: the next
    server of a test could get one of these before ours does, and answer in its place.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def start_guarded(command, log, env=None):
    """Starts a server program, which ends when we do, with its output in file `log`."""
    # A watchdog waits for the end of its standard input, which comes even when the
    # test process is killed and can run no cleanup.
    script = 'exec 3<&0; (read _ <&3; kill $$) & exec "$@" 3<&- </dev/null'
    with open(log, "wb") as file:
        return subprocess.Popen(["sh", "-c", script, "sh"] + command, env=env,
                                stdin=subprocess.PIPE, stdout=file, stderr=file)


def comes_up(process, answers, patience=20):
    """Whether a server program answers before it ends, or we have waited enough."""
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if answers():
                return True
        time.sleep(0.01)
    return False


def stop_guarded(process, patience=5):
    """Ends what start_guarded started; kills it after `patience` seconds."""
    process.stdin.close()
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class DockerRegistry:
    """The real docker-registry on 127.0.0.1, schema 1 enabled, stored below `root`.

    `auth` is None, "htpasswd" or "token"; with `clients` a client certificate is asked
    for. What was stored stays after close(), so that another registry with the same
    `root` serves it under other conditions. `env_extra` may override any setting
    (REGISTRY_STORAGE_DELETE_ENABLED=true).
    """
    def __init__(self, root, auth=None, tls=False, env_extra=None, clients=False):
        self.auth, self.tls, self.clients = auth, tls, clients
        self.storage = os.path.join(root, "storage")
        self.directory = tempfile.mkdtemp(prefix="registry-", dir=root)
        self.token_server = TokenServer() if auth == "token" else None
        self._start(env_extra or {})

    def close(self):
        """Stop the registry and its token server; may be called twice."""
        stop_guarded(self._process)
        if self.token_server is not None:
            self.token_server.close()

    def put(self, repository, tag, image):
        """Store an artifact, or an index of what is there, as oras would."""
        for digest, data in image.blobs.items():
            _, found, _ = self.request("/v2/%s/blobs/uploads/" % repository, {}, "POST")
            place = urllib.parse.urlsplit(found["Location"])
            done = self.request("%s?%s&digest=%s" % (place.path, place.query, digest), {
                "Content-Type": "application/octet-stream"}, "PUT", data)
            assert done[0] == 201, done
        done = self.request("/v2/%s/manifests/%s" % (repository, tag), {
            "Content-Type": image.media_type}, "PUT", image.manifest)
        assert done[0] == 201, done

    def request(self, path, headers=None, method="GET", body=None):
        """Return (status, headers, body) of one request, without any proxy."""
        connection = http.client.HTTPConnection(self.host, timeout=10)
        if self.tls:
            context = ssl.create_default_context(cadata=TEST_CERT)
            context.load_cert_chain(self._path("cert.pem"), self._path("key.pem"))
            connection = http.client.HTTPSConnection(
                self.host, timeout=10, context=context)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def _start(self, env_extra):
        for _ in range(3):
            self._spawn(env_extra)
            if comes_up(self._process, lambda: self.request("/v2/")[0] in (200, 401)):
                return
            stop_guarded(self._process)
            said = file_text(self._path("log"))
            # Another program may have taken the free port in the meantime.
            if "address already in use" not in said:
                break
        raise RuntimeError("docker-registry does not answer:\n" + said)

    def _spawn(self, env_extra):
        self.host = "127.0.0.1:%d" % _free_port()
        self.url = "%s://%s" % ("https" if self.tls else "http", self.host)
        # The exporter of version 3 would look for a collector.
        env = dict(os.environ, OTEL_TRACES_EXPORTER="none", **env_extra)
        self._process = start_guarded(["docker-registry", "serve", self._configure()],
                                      self._path("log"), env)

    def _path(self, name, text=None):
        """The path of a file of ours, written first if `text` is given."""
        path = os.path.join(self.directory, name)
        return path if text is None else write_file(path, text)

    def _configure(self):
        http_part = {"addr": self.host, "secret": "not secret"}
        if self.tls:
            http_part["tls"] = {"certificate": self._path("cert.pem", TEST_CERT),
                                "key": self._path("key.pem", TEST_KEY)}
        if self.clients:
            http_part["tls"]["clientcas"] = [self._path("cert.pem")]
        config = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": self.storage},
                        "maintenance": {"uploadpurging": {"enabled": False}}},
            "http": http_part, "compatibility": {"schema1": {"enabled": True}}}
        if self.auth == "htpasswd":
            config["auth"] = {"htpasswd": {"realm": "registry.test",
                                           "path": self._path("htpasswd", HTPASSWD)}}
        elif self.auth == "token":
            config["auth"] = {"token": {
                "realm": self.token_server.url + "/token",
                "service": TokenServer.service, "issuer": TokenServer.issuer,
                "rootcertbundle": self._path("token.pem", TEST_CERT)}}
        # JSON is YAML, and needs no thought about quoting.
        return self._path("config.yml", json.dumps(config, indent=1))


def _skopeo(*arguments):
    done = subprocess.run(
        ["skopeo", "--insecure-policy"] + list(arguments), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120,
        env=dict(os.environ, NO_PROXY="*", no_proxy="*"))
    assert not done.returncode, (arguments, done.stderr.decode("utf-8", "replace"))
    return done.stdout


def skopeo_copy(source, destination, *options):
    """Copy an image with skopeo; both sides may be insecure registries."""
    _skopeo("copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false",
            *(options + (source, destination)))


def skopeo_inspect(ref, *options):
    """What `skopeo inspect` says of `ref`, as a dict."""
    told = _skopeo("inspect", "--tls-verify=false", *(options + (ref,)))
    return json.loads(told.decode("utf-8"))


def skopeo_raw(ref, creds=None):
    """The manifest of `ref` byte by byte, as skopeo, "user:password", is served it."""
    options = () if creds is None else ("--creds", creds)
    return _skopeo("inspect", "--raw", "--tls-verify=false", *(options + (ref,)))


@contextlib.contextmanager
def offered(images):
    """A double has {name: image}: its host, and how to push one on as it is."""
    def push(registry, name):
        skopeo_copy("docker://%s/%s" % (double.host, name), "docker://%s/%s" % (
            registry.host, name), "--all", "--preserve-digests")

    with contextlib.closing(FakeRegistry()) as double:
        for name, image in images.items():
            double.add(*name.split(":"), image)
        yield double.host, push


def seed(registry, repository, layers):
    """Push `layers` (tars) as tags v2s1, v2s2, oci and zstd of `repository`."""
    creds = ()
    if registry.auth is not None:
        creds = ("--dest-creds", REAL_USER + ":" + REAL_PASSWORD)
    tag_at = "docker://%s/%s:" % (registry.host, repository)
    with offered({"x:1": build_image(layers)}) as (host, _), \
            tempfile.TemporaryDirectory() as directory:
        plain = "docker://%s/x:1" % host
        for name in ("v2s1", "v2s2", "oci"):
            skopeo_copy(plain, tag_at + name, "--format", name, *creds)
        # On the way to a registry skopeo would rather reuse the gzip blobs it knows to
        # be there than compress anew; a fresh directory offers it nothing to reuse.
        zstd = "oci:%s:latest" % directory
        skopeo_copy(plain, zstd, "--dest-compress-format", "zstd")
        skopeo_copy(zstd, tag_at + "zstd", "--preserve-digests", *creds)


# --------------------------------------------------------------------------------------
# Fixtures: tables, and what cases share
# --------------------------------------------------------------------------------------

# -- Tables, rows

#: (format, where it goes): everything a pull can write.
IMAGE_FORMATS = [name for name, output in imagec.OUTPUTS.items() if output.images]
OUTPUTS = (
    ("layers", "images"), ("oci", "layout"), ("archive", "image.tar"),
    ("rootfs", "root"), ("rootfs", "root.tar"),
)
SEED = 20140612  # of every random choice: a failure repeats itself


@contextlib.contextmanager
def cpu_within(seconds):
    """The block takes no more of the processor; how long it waits is the machine's."""
    started = time.process_time()
    yield
    used = time.process_time() - started
    assert used < seconds, "%.1f s of the processor" % used


def rows(*tables):
    """The decorated method is a test, called with each row of the tables.

    Each is a subTest named by its first cell.
    """
    table = [row for rows in tables for row in rows]
    assert table, "an empty table proves nothing"

    def decorate(check):
        @functools.wraps(check)
        def test(self):
            for row in table:
                with self.subTest(row[0]):
                    check(self, *row)
        del test.__wrapped__  # whose arguments unittest need not know
        return test
    return decorate


class TableCase(unittest.TestCase):
    """A test whose rows are data."""

    def refused(self, kind, words, call, *args):
        """Return the error, of exactly that kind and with those words, of a call."""
        with self.assertRaises(kind) as caught:
            call(*args)
        self.assertIs(type(caught.exception), kind)
        self.assertIn(words, str(caught.exception))
        self.assertTrue(str(caught.exception).isprintable())  # T07
        return caught.exception

    def none_stray(self, call, cases):
        """Call with each (name, argument); no error but ImagecError may come out."""
        strays = []
        for name, argument in cases:
            try:
                outcome(call, argument)
            except Exception as error:
                strays.append((name, repr(error)))
        self.assertEqual(strays, [])


def faults_of(path):
    """What verify finds at a place; of a root file system, that nothing is cut off."""
    try:
        return imagec.Audit().check(path).faults
    except imagec.OutputError:
        if os.path.isdir(path):
            return []
        with open(path, "rb") as file, tarfile.open(path) as tar:
            data = file.read()
            last = max(tar.getmembers(), key=lambda member: member.offset)
            end = last.offset_data + -(-last.size // 512) * 512
            return [] if data[end:] == bytes(1024) else [path + ": cut short"]


def outcome(call, *args, **options):
    """What a call returns, or the error it raises; none but ImagecError may."""
    try:
        return call(*args, **options)
    except imagec.ImagecError as error:
        return str(error) and error


def worded(*groups):
    """Rows that end with the words of the message, of groups that begin with them."""
    return tuple((row if isinstance(row, tuple) else (row,)) + (words,)
                 for words, *group in groups for row in group)


# -- Servers of any kind, names that resolve as they should

HTML = b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"
#: Host name -> the address it has here. No test asks the real DNS for anything.
NET_PLACES = {
    "registry.test": "127.0.0.1",
    "other.test": "127.0.0.1",
    "public.test": "93.184.216.34",
    "public2.test": "93.184.216.35",
    "private.test": "10.1.2.3",
    "metadata.test": "169.254.169.254",
    "shared.test": "100.64.1.2",
}
EVER = None  # of a fault: for ever
NET_TLS = ((False,), (True,))
BEARER = {"Authorization": "Bearer S3CR3T"}
NET_TARS = [
    tar_bytes([("etc", None), ("etc/os-release", b"fixture")]),
    tar_bytes([("bin", None), ("bin/sh", b"\x7fELF" * 300)]),
    tar_bytes([("var", None), ("var/log", b"quiet")]),
]
NET_OTHER = build_image(NET_TARS[:1])


class NetworkCase(RegistryCase):
    """Names are resolved by NET_PLACES, or by `places` alone where these are others;
    `reached` is where connections were to go.
    """

    image, OFFERED = build_image(NET_TARS), "app:1"

    def setUp(self):
        super().setUp()
        self.reached = reached = []
        self.places, resolve = NET_PLACES, socket.getaddrinfo

        class Routed(socket.socket):
            def connect(self, target):
                reached.append(target[0])
                super().connect(("127.0.0.1", target[1]))

        def lookup(host, *rest, **named):
            if host.endswith(".invalid") or (
                    self.places is not NET_PLACES and host not in self.places):
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return resolve(self.places.get(host, host), *rest, **named)

        self.patch(mock.patch("socket.getaddrinfo", lookup))
        self.patch(mock.patch("socket.socket", Routed))

    def client(self, registry, credentials=None, host=None, transport=None, **options):
        """An imagec.Registry that talks to the FakeRegistry."""
        if isinstance(credentials, str):
            credentials = imagec.Credentials(credentials, PASSWORD)
        return imagec.Registry(host or registry.host, transport or self.transport(),
                               credentials, **options)

    def asking(self, url, realm, credentials=None, rank=imagec.ANYWHERE, **options):
        """An imagec.Registry at a URL that wants a token from that realm."""
        found = imagec.Registry(urllib.parse.urlsplit(url).netloc, self.transport(),
                                credentials, **options)
        found.url, found.rank = url, rank
        found.challenge = imagec.Challenge("bearer", {"realm": realm})
        return found

    def server(self, replies, tls=False):
        server = Scripted(replies, tls)
        self.addCleanup(server.close)
        return server

    def get(self, transport, url, **options):
        """(status, bytes) of a GET."""
        with transport.open("GET", url, **options) as response:
            return response.status, response.read(imagec.MIB, "test")

    def gives(self, expected, call, *failure):
        """`call` returns what is expected; where that is None, it fails that way."""
        if expected is None:
            with self.fails(*failure):
                call()
        else:
            self.assertEqual(call(), expected)


class Scripted(Server):
    """Answers from a table {path: function of the request}; all else is 404."""

    def __init__(self, replies, tls=False):
        self.replies = replies
        super().__init__(tls)

    @property
    def port(self):
        return int(self.host.rpartition(":")[2])

    def answer(self, request):
        found = self.replies.get(request.route)
        return found(request) if found else Reply(404)


def to(location, code=307):
    """A scripted redirect."""
    return lambda request: Reply(code, headers={"Location": location})


def say(data, code=200, **changed):
    """A scripted reply."""
    return lambda request: headers(**changed)(Reply(code, data))


def spoken(data):
    """A scripted reply of raw bytes, after which the connection ends."""
    return lambda request: garbage(data)(None)


def authorizations(*servers):
    """Every Authorization header these servers have seen."""
    found = [r.headers.get("Authorization") for s in servers for r in s.requests]
    return [value for value in found if value is not None]


def by_name(host, server):
    """Where the server is by another name of its host."""
    return "%s:%s" % (host, server.host.rpartition(":")[2])


def paths(server, word=""):
    """"METHOD path" of the requests that hold `word`."""
    lines = ("%s %s" % (r.method, r.route) for r in server.requests)
    return [line for line in lines if word in line]


# -- A home of its own, no DNS

FIELD_SMALL = (tar_bytes([("etc/a", b"one")]), tar_bytes([("etc/b", b"two" * 1000)]))
FIELD_HUB = "https://index.docker.io/v1/"
FIELD_JSON_KEY = '{\n\t"type": "service_account",\r\n\t"private_key": "S3CR3T"\n}\n'


@functools.lru_cache(maxsize=None)
def field_noisy_image(size, step=0, compress=gzip_bytes):
    """An image of three layers of noise, each `step` bytes smaller than the last."""
    tars = [tar_bytes([("f%d" % n, noise(size - step * n, n))]) for n in range(3)]
    return build_image(tars, compress=compress)


def field_entry(user, password=PASSWORD):
    """An entry of `auths`."""
    return {"auth": field_base64("%s:%s" % (user, password))}


def field_auths(*keys):
    """A config in which each key has a user of its own name."""
    return {"auths": {key: field_entry(key.replace(":", "-")) for key in keys}}


class FieldCase(NetworkCase):
    """A home of its own, no DNS."""

    image, OFFERED = build_image(FIELD_SMALL), RegistryCase.OFFERED

    def setUp(self):
        super().setUp()
        self.work = self.root
        self.home = os.path.join(self.root, "home")
        os.environ.update(HOME=self.home, XDG_RUNTIME_DIR=self.at("run"))
        self.places = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1"}

    def docker_config(self, config):
        return self.file("home/.docker/config.json", config)

    def helper(self, name, script):
        """Put a program on the PATH."""
        path = self.file("bin/docker-credential-" + name, "#!/bin/sh\n" + script + "\n")
        os.chmod(path, 0o755)
        if not os.environ["PATH"].startswith(self.at("bin")):
            os.environ["PATH"] = self.at("bin") + os.pathsep + os.environ["PATH"]
        return path

    def at(self, name="out"):
        return super().at(name)

    def pull(self, host, name="lab/app:1", to="out", format=None, **options):
        """Pull with a Session; the imagec.Image."""
        with self.session(**options) as session:
            return self.pulled_by(session, self.at(to), format,
                                  "%s/%s" % (host, name) if host else name)[0]

    def main(self, *argv, **options):
        ended = super().main(*argv, **options)
        return ended._replace(out=ended.out.decode("utf-8"))


# -- Members and layers in a word each

STORED_NOBODY = 65534  # a user no file belongs to
FLAT_MARKS = (("=>", "hardlink"), ("->", "symlink"), ("=", "file"))


def flat_row(word):
    """What Tree.apply takes, from a word: d/  f=content  s->target  h=>target."""
    for mark, kind in FLAT_MARKS:
        name, found, rest = word.partition(mark)
        if found:
            break
    else:
        kind, name, rest = "dir", word, ""
    link = rest.encode() if kind in ("hardlink", "symlink") else b""
    data = rest if kind == "file" else None
    entry = imagec.Entry(name.encode(), kind, len(data or ""), 0o644, 0, 0, 0, link)
    return entry, data


def flat_tree(layers):
    """The Tree that layers make, each a text of words."""
    tree = imagec.Tree()
    for layer in layers:
        tree.apply([flat_row(word) for word in layer.split()])
    return tree


def flat_words(rows):
    """Sorted words of (path, key of the inode, kind, content or target) rows."""
    first, words = {}, []
    marks = {kind: mark for mark, kind in FLAT_MARKS}
    for path, key, kind, rest in sorted(rows):
        if kind == "dir":
            words.append(path + "/")
        elif first.setdefault(key, path) != path:
            words.append(path + "=>" + first[key])
        else:
            words.append(path + marks[kind] + rest)
    return sorted(words)


def flat_tree_words(tree):
    return flat_words(
        (path.decode(), id(node), node.entry.kind,
         node.entry.link.decode() if node.entry.kind == "symlink" else node.data or "")
        for path, node, _ in tree.walk())


def flat_directory_words(directory):
    """The words of a directory on disk."""
    rows, held = [], contents(directory)
    for path, facts in below(directory):
        name = os.path.relpath(path, directory)
        rest = held.get(name, "")  # a text of a link
        kind = ("dir" if name not in held else
                "symlink" if stat.S_ISLNK(facts.st_mode) else "file")
        rows.append((name, facts.st_ino, kind, rest if isinstance(rest, str)
                     else rest.decode("latin-1")))
    return flat_words(rows)


def flat_tar_words(tar):
    """The words of a tar as tarfile reads it."""
    rows, keys = [], {}
    for member in tar:
        path = member.name
        if path in (".", "./"):
            continue
        target = tar.getmember(member.linkname) if member.islnk() else member
        keys[path] = keys.get(target.name, path)
        kind = ("dir" if target.isdir() else "symlink" if target.issym() else "file")
        rest = target.linkname if target.issym() else ""
        if target.isreg():
            rest = tar.extractfile(target).read().decode("latin-1")
        rows.append((path, keys[path], kind, rest))
    return flat_words(rows)


#: Where the fields of a header are: (offset, bytes), POSIX.1-2017 pax, ustar.
RAW_FIELDS = {"mode": (100, 8), "uid": (108, 8), "gid": (116, 8), "size": (124, 12),
              "mtime": (136, 12), "magic": (257, 8), "major": (329, 8), "minor": (337, 8),
              "tail": (345, 167)}


def raw_member(name, data=b"", kind=b"0", link=b"", pax=(), **fields):
    """One member under a header of our own making: tarfile refuses to write most.

    A field is an int or the raw bytes; `pax` are (key, value) pairs; `tail` is what
    stands where ustar has its name prefix.
    """
    pax = list(pax)
    if len(name) > 100:
        pax.append((b"path", name))
    if len(link) > 100:
        pax.append((b"linkpath", link))
    patches = [(157, link[:100])]
    for key, value in dict({"mtime": 1}, **fields).items():
        at, width = RAW_FIELDS[key]
        patches.append((at, value if isinstance(value, bytes) else
                        b"%0*o" % (width - 1, value)))
    extended = raw_member(b"pax", pax_records(*pax), b"x") if pax else b""
    return extended + tar_header(len(data), kind, name[:100], patches) + in_blocks(data)


def raw_layer(*members):
    return b"".join(members) + bytes(1024)


def raw_words(text):
    """A layer of the words of `text`."""
    return raw_layer(*[raw_word(word) for word in text.split()])


def raw_word(word):
    entry, data = flat_row(word)
    kind = {"file": b"0", "dir": b"5", "symlink": b"2", "hardlink": b"1"}[entry.kind]
    mode = 0o755 if entry.kind == "dir" else 0o644
    return raw_member(entry.path, (data or "").encode(), kind, entry.link, mode=mode)


def stored_state(directory, besides=()):
    """All there is to know about the files below a directory, to compare later."""
    held = contents(directory)
    return {path: (facts.st_mode, facts.st_uid, facts.st_gid, facts.st_nlink,
                   stat.S_ISREG(facts.st_mode) and facts.st_mtime_ns,
                   held.get(os.path.relpath(path, directory)))
            for path, facts in below(directory)
            if set(path.split(os.sep)).isdisjoint(besides)}


class StoredCase(RegistryCase):
    """A registry, and imagec.main to pull from it into a directory."""

    def setUp(self):
        super().setUp()
        self.origin = self.registry()

    def serve(self, layers, name="lab/app:1", **options):
        """Offer an image; (its reference, the BuiltImage)."""
        image = build_image(layers, **options)
        repository, _, tag = name.partition(":")
        self.origin.add(repository, tag, image)
        return self.origin.host + "/" + name, image

    def pull(self, *argv, expect=0):
        run = self.main("pull", "-q", *argv)
        self.assertEqual(run.status, expect, run.err)
        self.assertNotIn("Traceback", run.err)
        return run

    def as_nobody(self, *work):
        """Run command lines as a user without rights: (their statuses, stderr)."""
        with contextlib.closing(Servant()) as servant:
            ended = [servant.end(servant.start(*argv, cwd=self.work, user=STORED_NOBODY))
                     for argv in work]
        err = "".join(one.err for one in ended)
        self.assertNotIn("Traceback", err)
        return [one.status for one in ended], err

    def verify(self, path, expect=0):
        run = self.main("verify", path)
        self.assertEqual(run.status, expect, run.err)
        return run.err

    def blob_gets(self, digest=""):
        return sum("/blobs/" + digest in request.path and request.method == "GET"
                   for request in self.origin.requests)

    def members(self, path):
        """{name: bytes} of a tar, in its order."""
        with tarfile.open(path, "r:") as tar:
            return collections.OrderedDict(
                (one.name, tar.extractfile(one).read() if one.isreg() else None)
                for one in tar)


# -- A pull under threat

THREAT_POSIX = able(hasattr(os, "fork"), "fork")
THREAT_TARS = [
    tar_bytes([("etc", None), ("etc/a", b"one"), ("etc/n", noise(9000, 1))]),
    tar_bytes([("bin", None), ("bin/sh", noise(5000, 2), {"mode": 0o755})]),
    tar_bytes([("etc/b", b"two" * 50), ("etc/.wh.a", b"")]),
]


def threat_rows(path=None, blob=None):
    """Name and bytes of each file in a tar, at a path or in a blob."""
    with tarfile.open(path, fileobj=blob and io.BytesIO(blob)) as tar:
        return [[one.name, tar.extractfile(one).read()] for one in tar if one.isfile()]


class ThreatHang(BaseException):
    """Something took too long; nothing that is tested may catch it."""


@contextlib.contextmanager
def threat_alarm(seconds):
    """The block ends in time, where the system has alarms."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(_number, _frame):
        raise ThreatHang("hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except ThreatHang:
        raise AssertionError("not done within %g seconds" % seconds) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class FailsOnce:
    """Stands in for a function of os; fails at the call of that number."""

    def __init__(self, name, code, at):
        self.true, self.code, self.at = getattr(os, name), code, at
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise OSError(self.code, os.strerror(self.code))
        return self.true(*args, **kwargs)


def threat_tree(image):
    """{name: digest} of the files in an image without directories whited out."""
    files = {}
    for digest in image.layers:
        for name, data in threat_rows(blob=image.blobs[digest]):
            folder, slash, last = name.rpartition("/")
            if last.startswith(".wh."):
                files.pop(folder + slash + last[4:], None)
            else:
                files[name] = sha256(data)
    return files


def everywhere(check):
    """The decorated method is a test, called with each format and its place."""
    @functools.wraps(check)
    def test(self):
        self.each(functools.partial(check, self))
    del test.__wrapped__  # whose arguments unittest need not know
    return test


class ThreatCase(RegistryCase):
    """A registry with one image, and a place to pull it to in each format."""

    image = build_image(THREAT_TARS)

    def setUp(self):
        super().setUp()
        os.environ["HOME"] = self.root
        self.patch(mock.patch.object(os, "fsync"))  # as slow as the disk is
        self.good = set(self.image.layers)
        self.source = self.filled(self.image)
        self.ref = self.source.host + "/lab/app:1"

    turns = itertools.cycle(OUTPUTS)

    def each(self, check, *args, outputs=OUTPUTS):
        """Call with each format, its place, and the rest."""
        for format, name in outputs:
            with self.subTest(format=format, name=name):
                check(format, self.at(name), *args)
            self.clear()

    def fetch(self, ref, format, path, session=None, **options):
        """Pull by the library, so that exceptions come out."""
        with session or self.session(**options) as session:
            return self.pulled_by(session, path, format, ref)

    def pull(self, format, path, *more, tag="1"):
        return self.main(*self.pull_argv(self.ref[:-1] + tag, format, path, *more))

    def pull_argv(self, ref, format, path, *more):
        return ("pull", "-q", "--platform", "linux/amd64", "--format", format,
                "-o", path, ref) + more

    def assert_whole(self, path):
        """What stands there passes verify, or is the file system of an image."""
        self.assertEqual(faults_of(path), [])
        if os.path.basename(path) in ("root", "root.tar"):
            rows = contents(path).items() if os.path.isdir(path) else (
                threat_rows(path))
            found = {name: sha256(data) for name, data in rows}
            self.assertIn(found, (threat_tree(self.image), {"old": sha256(b"old")}))

    def assert_only_verified(self, path, good=None):
        """No final name holds bytes that were not proved; the path need not exist."""
        good = self.good if good is None else good
        if os.path.isfile(path) or os.path.basename(path) == "root":
            return os.path.lexists(path) and self.assert_whole(path)
        for name, data in contents(path).items():
            base = os.path.basename(name)
            if base.endswith(".tar"):
                self.assertIn(sha256(data), good, name)
            elif re.fullmatch("[0-9a-f]{64}", base):
                self.assertEqual(sha256(data), "sha256:" + base)
            elif base == "manifest.json":
                self.assert_whole(os.path.join(path, os.path.dirname(name)))
        if os.path.exists(os.path.join(path, "index.json")):
            faults = faults_of(path)
            self.assertEqual([f for f in faults if "extra, nothing" not in f], [])

    def assert_no_leftovers(self):
        self.assertFalse([n for n in contents(self.work) if ".partial" in n])

    def assert_nothing_beside(self, *paths):
        """Only these, and what a later run goes on with, are there."""
        bases = "|".join(re.escape(os.path.basename(path)) for path in paths)
        for name in os.listdir(os.path.dirname(paths[0])):
            self.assertRegex(name, r"\A(%s)(\.partial|\.partial\.d|\.blobs\.partial)?\Z"
                             % bases)


class ThreatProcessCase(ThreatCase):
    """Command lines in processes of their own."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.servant = kept(Servant())

    def start(self, *argv, **options):
        return self.servant.start(*argv, cwd=self.work, **options)

    def end(self, started):
        return self.servant.end(started)

    def run_alone(self, *argv, **options):
        return self.end(self.start(*argv, **options))


SERVE_TARS = (tar_bytes([("etc/a", b"one")]), tar_bytes([("etc/b", noise(25600))]))
SERVE_AMD = ("linux", "amd64", None)
SERVE_ARM = ("linux", "arm64", "v8")
SERVE_CANARY = b"canary that nobody may see"

ServeAnswer = collections.namedtuple("ServeAnswer", "status headers body")


def serve_images():
    """{repository: BuiltImage} of every kind there is."""
    # Images of one configuration are one image to podman.
    images = {"lab/" + kind: build_image(SERVE_TARS, kind, author=kind)
              for kind in ("schema1", "schema1-signed", "docker", "oci")}
    other = build_image([tar_bytes([("etc/arm", b"arm")])], platform=SERVE_ARM)
    images["lab/index"] = images["library/alpine"] = build_index(
        [(images["lab/oci"], SERVE_AMD), (other, SERVE_ARM)])
    return images


def serve_ask(host, path, method="GET", headers=None, tls=None):
    """The ServeAnswer to a request: to a host, or on a connection that stays."""
    if isinstance(host, str):
        connection = http.client.HTTPConnection(host, timeout=5) if tls is None else \
            http.client.HTTPSConnection(host, timeout=5, context=tls)
        with contextlib.closing(connection):
            return serve_ask(connection, path, method, headers)
    host.request(method, path, headers=headers or {})
    response = host.getresponse()
    return ServeAnswer(response.status, response.headers, response.read())


def serve_connect(host, timeout=5):
    name, _, port = host.rpartition(":")
    return socket.create_connection((name, int(port)), timeout)


def serve_raw(host, data, timeout=5):
    """All that comes back for raw bytes, up to the end of the connection."""
    found = b""
    with serve_connect(host, timeout) as sock:
        # A server that has hung up already leaves nothing to shut down.
        with contextlib.suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            for piece in iter(lambda: sock.recv(65536), b""):
                found += piece
    return found


def serve_target(host, target, extra=b""):
    """The status (0: none) and the bytes that a request target as it is gets."""
    if isinstance(target, str):
        target = target.encode("latin-1")
    found = serve_raw(host, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n"
                      + extra + b"Connection: close\r\n\r\n")
    match = re.match(rb"HTTP/1\.1 ([0-9]{3}) ", found)
    return int(match.group(1)) if match else 0, found


def serve_document(raw):
    """Bytes as what decode_manifest gives."""
    return imagec.Manifest(raw, "x/y", imagec.Digest.of(raw), None, ())


def serve_raw_of(shelf, name, reference, namespace=None):
    """The bytes of a document on a Shelf."""
    return shelf.documents[shelf.tags(name, namespace).get(reference, reference)][0]


class ServeCase(RegistryCase):
    """Images pulled once into a tree, a layout and an archive; servers of them."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.store = tempfile.mkdtemp()
        FIXTURES.callback(remove, cls.store)
        with mock.patch.object(os, "fsync"), mock.patch.object(imagec, "BACKOFF", 0):
            cls._fill()

    @classmethod
    def _fill(cls):
        cls.images = serve_images()
        #: Which of them are in the tree, in the layout and in the archive.
        cls.held = {"layers": list(cls.images), "archive": ["lab/docker"],
                    "oci": [name for name in cls.images if "schema1" not in name]}
        cls.tree, cls.layout, cls.archive = (
            os.path.join(cls.store, name) for name in ("tree", "Lay Out", "images.tar"))
        cls.places = {"layers": cls.tree, "oci": cls.layout, "archive": cls.archive}
        with contextlib.closing(FakeRegistry()) as origin:
            cls.origin = origin.host
            for repository, image in cls.images.items():
                origin.add(repository, "1", image)
            for format, names in cls.held.items():
                for name in names:
                    whole = format == "oci" and cls.images[name].children
                    # By its mirror it is pulled as of Docker Hub, which is not asked.
                    hub = name.startswith("library/")
                    imagec.pull(("" if hub else cls.origin + "/") + name + ":1",
                                cls.places[format], format, no_creds=True,
                                platform="all" if whole else "linux/amd64",
                                mirrors=[cls.origin] if hub else [])

    def serve(self, shelf, credentials=None, tls=None):
        """The host of a server of a Shelf, or of what is at a path, until the end."""
        if not isinstance(shelf, imagec.Shelf):
            shelf = imagec.Shelf(shelf)
        self.server = server = imagec.new_server(
            shelf, ("127.0.0.1", 0), credentials, tls)
        # As `imagec.serving`, which ends later.
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        for end in (thread.join, server.server_close, server.shutdown):
            self.addCleanup(end)  # the last is the first to be called
        return "127.0.0.1:%d" % server.server_address[1]

    def connect(self, host):
        """A connection that is kept, for more than one request."""
        connection = http.client.HTTPConnection(host, timeout=5)
        self.addCleanup(connection.close)
        return connection

    def pulled(self, host, name, format="oci", platform="linux/amd64", **options):
        path = os.path.join(tempfile.mkdtemp(dir=self.work), "out")
        path += ".tar" if format == "archive" else ""
        image = imagec.pull(host + "/" + name, path, format, platform=platform,
                            no_creds=True, **options)
        self.assertEqual(faults_of(image.path), [])
        return image

    def pair(self):
        """The files of a certificate and its key, for a server."""
        return (write_file(self.at("cert.pem"), TEST_CERT),
                write_file(self.at("key.pem"), TEST_KEY))

    @staticmethod
    def client_context():
        return ssl.create_default_context(cadata=TEST_CERT)

    def copied(self):
        """A copy of the layout that may be damaged, and the paths of a layer in it."""
        path = self.at("layout")
        shutil.copytree(self.layout, path)
        digest = self.images["lab/oci"].layers[1]
        return path, digest, os.path.join(path, "blobs", *digest.split(":"))

    def shelf_of(self, data, name="lab/app"):
        """A Shelf with one blob; its digest and path too."""
        shelf, digest = imagec.Shelf(), imagec.Digest.of(data)
        path = write_file(self.at("blob"), data)
        shelf.blobs[digest] = imagec.Region(path, 0, len(data))
        shelf.add([name], None, serve_document(data[:1]))
        return shelf, str(digest), path

    def refused(self, answer, status, code=None):
        """`answer` is an error in the distribution-spec's form."""
        self.assertEqual(answer.status, status, answer.body)
        self.assertEqual(answer.headers["Content-Type"], "application/json")
        errors = json.loads(answer.body.decode("ascii"))["errors"]
        self.assertRegex(errors[0]["code"], "^[A-Z_]+$")
        self.assertIsInstance(errors[0]["message"], str)
        if code:
            self.assertEqual(errors[0]["code"], code)

    def main(self, *argv, **options):
        """A command line run here; whatever waits is interrupted instead."""
        with mock.patch.object(imagec.time, "sleep", side_effect=KeyboardInterrupt):
            ended = super().main(*argv, **options)
        self.assertNotIn("Traceback", ended.err)
        return ended._replace(out=ended.out.decode("utf-8"))

    def failed(self, run, status, *words):
        """`run` told what is wrong in one line, behind what it has passed over."""
        self.assertEqual(run.status, status, run.err)
        self.assertNotRegex(run.out, "serving|this host can pull images")
        self.assertRegex(run.err, r"\A(imagec: warning: passed over: [^\n]+\n)*"
                                  r"imagec: [^\n]+\n\Z")
        for word in words:
            self.assertIn(word, run.err)

    def process(self, *argv, stdin=b""):
        """`imagec.py serve` as a process, and the first line it prints."""
        process = self.start("serve", *argv, stdin=subprocess.PIPE)
        process.stdin.write(stdin)
        process.stdin.close()
        return process, process.stdout.readline().decode("utf-8")


# --------------------------------------------------------------------------------------
# 3  Names
# --------------------------------------------------------------------------------------

HEX64 = "0123456789abcdef" * 4
SHA256_A = "sha256:" + HEX64
SHA512_A = "sha512:" + HEX64 * 2
ARABIC_DIGITS = "\u0661\u0662\u0663"
LONG_TAG = "t" * 128

GOOD_REFERENCES = (
    # in full, then what is read as it: as by distribution/reference's ParseDockerRef
    ("docker.io/library/ubuntu:latest", "ubuntu", "docker.io/ubuntu"),
    ("docker.io/library/ubuntu:22.04", "ubuntu:22.04", "index.docker.io/ubuntu:22.04"),
    ("docker.io/me/app:latest", "me/app", "docker.io/me/app"),
    ("docker.io/me/team/app:v1", "me/team/app:v1"),
    # the API's own host is an ordinary one
    ("registry-1.docker.io/ubuntu:latest", "registry-1.docker.io/ubuntu"),
    ("localhost/app:latest", "localhost/app"),
    ("localhost:5000/app:1", "localhost:5000/app:1"),
    # without a slash there is no host, whatever it looks like
    ("docker.io/library/localhost:5000", "localhost:5000"),
    ("docker.io/library/example.com:latest", "example.com"),
    ("example.com/app:latest", "example.com/app"),
    ("example.com:443/a/b:latest", "example.com:443/a/b"),
    ("docker.io/myhost/app:latest", "myhost/app"),
    ("myhost:5000/app:latest", "myhost:5000/app"),
    ("127.0.0.1:5000/a:latest", "127.0.0.1:5000/a"),
    ("[::1]:5000/a:1", "[::1]:5000/a:1"), ("[fd00::1]/a:latest", "[fd00::1]/a"),
    # an uppercase letter makes it a host
    ("Foo/bar:latest", "Foo/bar"), ("FOO.com/bar:Tag", "FOO.com/bar:Tag"),
    ("docker.io/a__b/c:latest", "a__b/c"), ("docker.io/library/a--b:latest", "a--b"),
    ("docker.io/library/a---b.c_d:latest", "a---b.c_d"),
    ("docker.io/library/app:" + LONG_TAG, "app:" + LONG_TAG),
    ("docker.io/library/app:_x.Y-z", "app:_x.Y-z"),
    ("docker.io/library/app@" + SHA256_A, "app@" + SHA256_A),
    ("docker.io/library/app@" + SHA512_A, "app@" + SHA512_A),
    ("docker.io/library/app:1@" + SHA256_A, "app:1@" + SHA256_A),
    ("gcr.io/p/i:tag@" + SHA256_A, "gcr.io/p/i:tag@" + SHA256_A),
    # only the bare string looks like an image ID
    ("docker.io/library/%s:x" % HEX64, HEX64 + ":x"),
    ("docker.io/me/%s:latest" % HEX64, "me/" + HEX64),
    ("h.io/scratch:latest", "h.io/scratch"),
    ("h.io:1/a:latest", "h.io:1/a"), ("h.io:65535/a:latest", "h.io:65535/a"),
    # T05: 255 characters of repository, the host not counted
    ("h.io/%s:latest" % ("a" * 255), "h.io/" + "a" * 255),
    ("docker.io/library/%s:latest" % ("a" * 247), "a" * 247),
)

BAD_REFERENCES = worded(
    ("expected [HOST[:PORT]/]REPOSITORY", ""),
    ("expected",
     "::1/a", "a___b/c", "a..b", "a.-b", "-a/b", "a-", "app//b", "/app", "app/", "a b",
     "a/b:", "a:b:c", ":tag", "a:-tag", "a:.tag", "http://x/y", "app:" + LONG_TAG + "t",
     "app@", "h.io./a", "-h.io/a", "h_o.io/a", "[::1%25eth0]/a", "[::ffff:127.0.0.1]/a",
     # T02: `$` takes a final newline, \d and int() other scripts' digits
     "ubuntu\n", "ubuntu:22.04\n", "h.io:80\n/a", "app:" + ARABIC_DIGITS,
     "h.io:8" + ARABIC_DIGITS + "/a", "h.io:8_0/a", "h.io:+80/a",
     "h.io:1000443/x", "h.io:" + "9" * 9000 + "/x", "h.io/a:" + "t" * 5000,
     # T05
     "host/../x", "h.io/../x", "h.io/a/./x", "host/a?b#c", "h.io/a%2f..", "h.io/a\\b",
     "user:pw@host/x", "user@h.io/x", "h.io/x y", "h.io\r\n/x", "h.io/x\0",
     "h.io/\u00e9", "h.io/\u0131", "h.io/\ud800", "h.io/\x1b]0;x\x07"),
    ("lowercase", "foo/Bar", "UPPER", "a/SUM_B@" + SHA256_A, "h.io/x\r\nHost: evil",
     "h.io/\u212a"),  # the Kelvin sign, whose lower case is k
    ("invalid digest",
     "app@sha256:" + HEX64.upper(), "app@sha256:" + HEX64[:32], "app@sha512:" + HEX64,
     "app@md5:" + HEX64[:32], "app@" + SHA256_A + "@" + SHA256_A,
     "app@" + SHA256_A + "\n", "app@sha256:" + HEX64[:61] + ARABIC_DIGITS),
    ("looks like an image ID", HEX64),
    ("reserved", "scratch", "scratch:1", "docker.io/library/scratch"),
    # not a word of what stands before an @, unless a digest follows
    ("'***@h.io/x'",
     "u:S3CR3T@h.io/x", "u:S3/CR3T@h.io/x", "https://u:S3CR3T@h.io/x"),
    ("invalid digest 'h.io'", "u:S3CR3T@h.io"),
    ("invalid digest '***@h.io'", "u:S3@CR3T@h.io"),
    ("'***@h.io/x:1'", "u:S3@CR3T@h.io/x:1"),
    ("'***@h.io/x@sha256:", "u:S3CR3T@h.io/x@" + SHA256_A),
    ("'a//b@sha256:", "a//b@" + SHA256_A),
    ("port", "h.io:0/x", "h.io:99999/x", "h.io:65536/x"),
    ("longer than 255", "h.io/" + "a" * 256, "a" * 248),
)

REFERENCE_PARTS = (
    # text, host, repository, tag, digest, tag_or_digest, api_host, name
    ("ubuntu", "docker.io", "library/ubuntu", "latest", None, "latest",
     "registry-1.docker.io", "docker.io/library/ubuntu"),
    # the digest decides, the tag stays for the name
    ("h.io:5/a/b:1@" + SHA256_A, "h.io:5", "a/b", "1", ("sha256", HEX64), SHA256_A,
     "h.io:5", "h.io:5/a/b"),
)

GOOD_DIGESTS = (
    # algorithm, hex
    ("sha256", HEX64), ("sha384", HEX64 + HEX64[:32]), ("sha512", HEX64 * 2),
)

# T01, T02, T14
BAD_DIGESTS = worded(
    ("expected sha256:", "", "../x", HEX64, "md5:" + HEX64[:32], "sha1:" + HEX64[:40],
     "SHA256:" + HEX64, "sha256+b64u:" + HEX64, " " + SHA256_A, ":" + HEX64, None, 5,
     ["sha256", HEX64]),
    ("expected 64 lowercase",
     "sha256:", "sha256:../../../x", "sha256:" + HEX64[:63], SHA256_A + "0",
     SHA256_A + "\n", SHA256_A + "\0", "sha256:\n" + HEX64[1:],
     "sha256:" + HEX64[:60] + "/../", "sha256:" + HEX64[:60] + "\\..\\",
     "sha256:" + HEX64.upper(), "sha256:" + HEX64[:61] + ARABIC_DIGITS,
     "sha256:" + HEX64[:61] + "\uff11\uff12\uff13"),
    ("expected 96 lowercase", "sha384:" + HEX64),
    ("expected 128 lowercase", "sha512:" + HEX64),
)

# containerd/platforms, normalize
GOOD_PLATFORMS = (
    # platform, what is read as it
    ("linux/amd64", "linux/amd64", "LINUX/AMD64", "linux/x86_64", "linux/x86-64",
     "linux/amd64/v1"),
    ("linux/amd64/v3", "linux/amd64/v3"),
    ("linux/386", "linux/i386", "linux/i686"),
    ("darwin/arm64", "macos/arm64"),
    # one word that is no system is an architecture
    ("linux/arm64", "linux/aarch64", "linux/arm64/8", "linux/arm64/v8",
     "linux/arm64/v8.0", "aarch64"),
    ("linux/arm64/v8.2", "linux/arm64/v8.2"),
    ("linux/arm64/v9", "linux/arm64/9", "linux/arm64/9.0", "linux/arm64/v9.0"),
    ("linux/arm64/v9.2", "linux/arm64/v9.2"),
    ("linux/arm/v5", "linux/arm/5"),
    ("linux/arm/v6", "linux/arm/6", "linux/arm/V6", "linux/armel", "linux/armhf/v6"),
    ("linux/arm/v7", "linux/arm/7", "linux/arm", "linux/armhf", "armhf"),
    ("linux/arm/v8", "linux/arm/8"),
    ("linux/loong64", "linux/loongarch64"),
    ("windows/amd64", "windows/amd64"),
    ("linux/s390x", "s390x"),
)

BAD_PLATFORMS = worded(
    ("expected OS/ARCH", "", "/", "linux/", "/amd64", "linux//v7", "linux/amd64/v2/x",
     "linux amd64", "linux/amd64\n", "linux/amd64\0", "linux/\uff41rm", "linux,amd64",
     "linux/a:b", "\x1b[2J"),
)

# The order in which docker tries them: containerd/platforms, platformVector.
CANDIDATES = tuple(row.split() for row in (
    # platform, then architecture/variant, best first
    "linux/amd64 amd64 386",
    "linux/amd64/v1 amd64 386",
    "linux/amd64/v2 amd64/v2 amd64 386",
    "linux/amd64/v4 amd64/v4 amd64/v3 amd64/v2 amd64 386",
    "linux/386 386",
    "linux/arm/v8 arm/v8 arm/v7 arm/v6 arm/v5",
    "linux/arm arm/v7 arm/v6 arm/v5",
    "linux/arm/v6 arm/v6 arm/v5",
    "linux/arm/v5 arm/v5",
    "linux/arm64 arm64 arm/v8 arm/v7 arm/v6 arm/v5",
    "linux/arm64/v8.2 arm64/v8.2 arm64/v8.1 arm64 arm/v8 arm/v7 arm/v6 arm/v5",
    "linux/arm64/v9 arm64/v9 arm64/v8.5 arm64/v8.4 arm64/v8.3 arm64/v8.2 arm64/v8.1"
    " arm64 arm/v8 arm/v7 arm/v6 arm/v5",
    "linux/arm64/v9.2 arm64/v9.2 arm64/v9.1 arm64/v9 arm64/v8.7 arm64/v8.6 arm64/v8.5"
    " arm64/v8.4 arm64/v8.3 arm64/v8.2 arm64/v8.1 arm64 arm/v8 arm/v7 arm/v6 arm/v5",
    "linux/arm64/v9.6 arm64/v9.6 arm64/v9.5 arm64/v9.4 arm64/v9.3 arm64/v9.2 arm64/v9.1"
    " arm64/v9 arm64/v8.9 arm64/v8.8 arm64/v8.7 arm64/v8.6 arm64/v8.5 arm64/v8.4"
    " arm64/v8.3 arm64/v8.2 arm64/v8.1 arm64 arm/v8 arm/v7 arm/v6 arm/v5",
    "linux/s390x s390x",
    "windows/amd64 amd64 386",
    "linux/riscv64/rva20u64 riscv64/rva20u64",
))

HOSTS = (
    # uname's machine, bytes of a pointer, platform
    ("x86_64", 8, "linux/amd64"), ("AMD64", 8, "linux/amd64"),
    ("x86_64", 4, "linux/386"), ("i686", 4, "linux/386"), ("aarch64", 8, "linux/arm64"),
    ("arm64", 8, "linux/arm64"), ("aarch64", 4, "linux/arm/v7"),
    ("armv8l", 4, "linux/arm/v8"), ("armv7l", 4, "linux/arm/v7"),
    ("armv6l", 4, "linux/arm/v6"), ("armv5tel", 4, "linux/arm/v5"),
    ("ppc64le", 8, "linux/ppc64le"), ("s390x", 8, "linux/s390x"),
    ("riscv64", 8, "linux/riscv64"), ("loongarch64", 8, "linux/loong64"),
    ("mips64", 8, "linux/mips64"), ("", 8, "linux/amd64"),
)


class NamesTest(TableCase):
    """Text becomes a value, or an InvalidReference."""

    @rows(GOOD_REFERENCES)
    def test_good_references(self, name, *texts):
        for text in texts + (name,):
            self.assertEqual(str(imagec.Reference.parse(text)), name, text)

    @rows(BAD_REFERENCES)
    def test_bad_references(self, text, words):
        error = self.refused(imagec.InvalidReference, words, imagec.Reference.parse,
                             text)
        self.assertNotIn("CR3T", str(error))

    @rows(REFERENCE_PARTS)
    def test_reference_parts(self, text, *parts):
        found = imagec.Reference.parse(text)
        self.assertEqual(
            found + (found.tag_or_digest, found.api_host, found.name), parts)

    def test_any_reference_reads_or_is_refused(self):
        pieces = ["a", "B", ".", "_", "-", "/", ":", "@", "[", "]", "1", "\n", " "]
        pieces += [SHA256_A, "docker.io", "sha256", "\u0661", "\ud800"]
        choices = random.Random(SEED)
        for _ in range(2000):
            text = "".join(choices.choices(pieces, k=choices.randrange(9)))
            found = outcome(imagec.Reference.parse, text)
            if isinstance(found, imagec.Reference):
                self.assertEqual(imagec.Reference.parse(str(found)), found, text)

    @rows(GOOD_DIGESTS)
    def test_good_digests(self, *parts):
        found = imagec.Digest.parse(":".join(parts))
        self.assertEqual((found, str(found)), (parts, ":".join(parts)))

    @rows(BAD_DIGESTS)
    def test_bad_digests(self, text, words):
        self.refused(imagec.InvalidReference, words, imagec.Digest.parse, text)

    def test_digest_of_bytes(self):
        digest = imagec.Digest.of(b"")
        self.assertEqual(str(digest), sha256(b""))
        self.assertEqual(len(imagec.Digest.of(b"", "sha512").hex), 128)
        digest.check(b"", "nothing")
        error = self.refused(imagec.DigestMismatch, "thing: expected", digest.check,
                             b"x", "thing")
        self.assertEqual(error.what, "thing")
        self.assertEqual((error.expected, error.actual), (digest, digest.of(b"x")))

    @rows(GOOD_PLATFORMS)
    def test_good_platforms(self, name, *texts):
        expected = imagec.Platform(*name.split("/"))
        for text in texts:
            self.assertEqual(imagec.Platform.parse(text), expected, text)
        self.assertEqual(imagec.Platform.normal(*expected), expected)
        self.assertEqual(str(expected), name)
        self.assertEqual(str(expected._replace(os_version="10.0")), name + " (10.0)")

    @rows(BAD_PLATFORMS)
    def test_bad_platforms(self, text, words):
        self.refused(imagec.InvalidReference, words, imagec.Platform.parse, text)

    @rows([("linux", "linux"), ("Windows", "windows"), ("macos", "darwin")])
    def test_a_system_alone_means_this_architecture(self, text, system):
        expected = imagec.Platform.host()._replace(os=system)
        self.assertEqual(imagec.Platform.parse(text), expected)

    @rows(CANDIDATES)
    def test_candidates(self, text, *expected):
        found = imagec.Platform.parse(text).candidates()
        names = tuple("/".join(filter(None, each[1:3])) for each in found)
        self.assertEqual(names, expected)

    @rows(itertools.product(HOSTS, (True, False)))
    def test_host(self, row, posix):
        machine, pointer, expected = row
        with mock.patch.object(os, "uname", create=True) as uname, mock.patch(
                "platform.machine", return_value=machine), mock.patch(
                    "struct.calcsize", return_value=pointer):
            uname.return_value.machine = machine
            if not posix:
                del os.uname
            self.assertEqual(str(imagec.Platform.host()), expected)


# --------------------------------------------------------------------------------------
# 4  Documents
# --------------------------------------------------------------------------------------

JSON_READ = (
    # text, value
    (b"{}", {}), (b'"\\ud83d\\udc33"', "\U0001f433"),
    (b' \r\n\t{"a": [1, -2, 1.5, null, true]}\n', {"a": [1, -2, 1.5, None, True]}),
    (b"[%s]" % (b"9" * 32), [10 ** 32 - 1]),
    ('"\u00e9\U0001f433"'.encode("utf-8"), "\u00e9\U0001f433"),
    (b'{"a": {"x": 1}, "b": {"x": 1}}', {"a": {"x": 1}, "b": {"x": 1}}),
)

HTML_HINT = "is that host a registry"
JSON_REFUSED = worded(
    ("not valid JSON", b"", b" \n", b'{"a": 1', b"{}{}", b"{} x", b"{}\0", b"{} // x",
     b"[1,]", b'"a\nb"', b'{"\x1b]0;x\x07', b"[01]", b"[+1]", b"[1_0]",
     '[1\u0661]'.encode("utf-8"), b"\xef\xbb\xbf{}", "{}".encode("utf-16-le")),
    # T37: json.loads would guess the encoding
    ("not UTF-8", "{}".encode("utf-16"), "{}".encode("utf-32"), b'{"a": "\xe9"}',
     b'"\xc0\xaf"', b'"\xed\xa0\x80"'),
    # T35: Python keeps the last, others the first
    ("a key stands twice", b'{"a": 1, "a": 1}', b'{"a": 1, "\\u0061": 2}',
     b'[{"x": {"a": 1, "b": 2, "a": 3}}]'),
    # T36
    ("is not a finite number", b"[NaN]", b'{"a": Infinity}', b"-Infinity", b"[1e999]",
     b"[-1e999]", b"[%se5]" % (b"7" * 200000)),
    # T54
    ("nested too deep", b"[" * 100000, b'{"a":' * 100000, b"[" * 101 + b"]" * 101,
     b'{"a":' * 101 + b"1" + b"}" * 101,
     b'[{}, 1, "", {"a": %s}]' % (b"[" * 99 + b"]" * 99)),
    # T55: had it been converted, the number would not be in the message
    ("a number of 33 digits", b"[%s]" % (b"9" * 33)),
    ("a number of 200000 digits", b"[%s]" % (b"7" * 200000)),
    (HTML_HINT, b"<html><body>Sign in</body></html>", b"\n <!DOCTYPE html>",
     b'<?xml version="1.0"?><Error/>'),
)

# The member a of a Document: its JSON text, method, more arguments, value.
MEMBERS_READ = (
    ('"x"', "get", (str,), "x"), ('null', "get", (str,), None),
    ('null', "get", (str, "d"), "d"), ('null', "get", (dict,), None),
    ('false', "get", (bool, True), False), ('""', "need", (str,), ""),
    ('0', "need", (int,), 0), ('"\\ud83d\\udc33"', "get", (str,), "\U0001f433"),
    ('0', "size", (), 0), ('-0', "size", (), 0),
    ('9007199254740991', "size", (), 2 ** 53 - 1),
    ('"%s"' % SHA256_A, "digest", (), ("sha256", HEX64)), ('[]', "children", (0,), []),
    # keys nobody asks for may be anything
    ('3, "b": 1, "B": 2', "get", (int,), 3),
)

# The member a of a Document: method, type, words, its JSON texts.
MEMBERS_REFUSED = (
    ("need", str, "has no 'a'", "null"), ("need", dict, "has no 'a'", "null"),
    ("get", str, "must be a JSON string", "5", "true", "[]"),
    ("get", int, "must be a JSON integer", '"5"', "true", "1.0"),
    ("get", list, "must be a JSON array", "{}"),
    ("get", dict, "must be a JSON object", "[]"),
    ("get", bool, "must be a JSON boolean", "1"),
    # T36
    ("size", None, "must be a JSON integer", "true", "1.0", "1e3", '"5"'),
    ("size", None, "has no 'a'", "null"),
    ("size", None, "not a size", "-1", "9007199254740992", str(2 ** 70)),
    ("digest", None, "must be a JSON string", "5"),
    ("digest", None, "doc.a: invalid digest", '"sha256:../x"'),
    ("children", 2, "doc.a[1] is not a JSON object", "[{}, 5]"),
    ("children", 2, "doc.a[0] is not a JSON object", "[null]"),
    # T13
    ("get", str, "not valid Unicode", '"\\ud800"', '"x\\udc33\\ud83d"'),
)

# T35: Go reads keys in any case, and folds the last two characters as well
OTHER_CASES = ('{"Skin": 1}', '{"skin": 1, "SKIN": 2}', '{"Skin": 1, "skin": 2}',
               '{"Skin": null}', '{"\u017fkin": 1}', '{"s\u212ain": 1}')


class DocumentsTest(TableCase):
    """Bytes become a JSON value that every parser agrees on, or an InvalidDocument."""

    @rows(JSON_READ)
    def test_json_read(self, raw, value):
        self.assertEqual(imagec.parse_json(raw, "doc"), value)

    @rows(JSON_REFUSED)
    def test_json_refused(self, raw, words):
        error = self.refused(imagec.InvalidDocument, words, imagec.parse_json, raw,
                             "doc")
        self.assertLess(len(str(error)), 200)
        self.assertEqual(HTML_HINT in str(error), words == HTML_HINT)

    def test_as_deep_as_may_be(self):
        for text in (b"[" * 100 + b"5" + b"]" * 100,
                     b'{"a":' * 100 + b"5" + b"}" * 100):
            value = imagec.parse_json(text, "doc")
            self.assertEqual(imagec.canonical_json(value), text)

    @rows(MEMBERS_READ)
    def test_members_read(self, text, method, args, value):
        document = imagec.Document.parse(b'{"a": %s}' % text.encode(), "doc")
        self.assertEqual(getattr(document, method)("a", *args), value)
        self.assertEqual(document.get("c", list, [1]), [1])

    @rows(MEMBERS_REFUSED)
    def test_members_refused(self, method, argument, words, *texts):
        for text in texts:
            document = imagec.Document.parse(b'{"a": %s}' % text.encode(), "doc")
            self.refused(imagec.InvalidDocument, words, getattr(document, method), "a",
                         *[argument] * bool(argument))

    def test_other_cases(self):
        for text in OTHER_CASES:
            document = imagec.Document.parse(text.encode("utf-8"), "doc")
            self.refused(imagec.InvalidDocument, "in another case", document.get,
                         "skin", int)

    def test_children_are_counted_first(self):
        document = imagec.Document.parse(b'{"a": [1, 2, 3]}', "doc")
        self.refused(imagec.LimitExceeded, "3 entries, more than the limit of 2",
                     document.children, "a", 2)

    def test_canonical_json(self):
        value = {"b": [1, {"d": None, "c": "\u00e9"}], "a": "<&>"}
        text = '{"a":"<&>","b":[1,{"c":"\u00e9","d":null}]}'
        self.assertEqual(imagec.canonical_json(value), text.encode("utf-8"))


# -- 5  Signatures

# moby v24, distribution/fixtures/validate_manifest/good_manifest, deflated.
SIGNED_MANIFEST = zlib.decompress(base64.b85decode("".join("""
c-rk(S#R4$5Pr|E5ZIR%h~mAM<eRO-rzAU6d?YH2y(q0skqSx4k`4d&E-59J6DK`T6fGJ-0J+~ByL0T!@ZnXX(e
Mg2F;j7F^1^1R7dGJQ8cxO3xRsY!nTve2Gcie$HSe-K(cYS)6yusfl%^;*n8?+{mPVEHyp|SI&B%rp7bjxnwsH7
}3UI%N&9frQB$Ls6T1gcXfhY?FHaeh67zt1u8|EvmgIN270LFYEOn^1RSV_nTLK*<$3$73fD3ye1;%&4)zWzho0
UQ%X{n(e>M+PE<fr8w}1Tm?x6iOLJp)%A*g2b_8v6QhufCmKmM#<0HRnK47HcxC(X8GzHCNE$so6baOrA=&Ead{
6T&+3sEjyw@#0w^IyGo%f02FHXz#bGR<@PU%RCye{C(F93haDWXZI2J}=K{-+*@Ab%=iQJ@Rt&d^~5K!1T$+=N8
DFHK7C`bij&~U5+iJ<c+iX~EzXikyz4fGu>1BhyUDmO0N>jNSHX%qNOz=jBi6o&}CVZf)H`;fd}vu9~3Y-;jaKq
1K?g_OmN0L6vkI`9ccMj(PQ6;e0@kboFrfu-aKv49(<F*mVua{OH7wR?;0*lBh?JIIQ%%Gi3Jpvo8kSR4yp%e1q
p6ZuT9v3JGhRP}1NEQOjxrM9U9W04eQ8_nkBOR&lFE%-Fc%V=g);jna`Bo68<XIWu%McG1!<!Vc8Ff-|w8`tYWs
>~MFNf%ElTGJ{9A4cAewCPSUsf}o^WB$|6X*T<%(dxAuA4Vg`QeWNb?N|4A42M%OHh*7EoM*{=YPRfK1MS={wq1
OY<+nB+x9t|zNy~gS%WR#Z8|l6&U6r|Q+d{~sPPI=S=n1u}b#98{Ny8xBo7+S`iJu5*l8WKs@zE`HrfyxXEY{_%
mV<Bj8~7=geq_)lJ^pu@vE8cH1-I%|wP?0hlh|~=tbxehS3KZxlzz9Ve7B(gBLx@{h$-TTzf^#?(;5jM`J6JMgl
ic-XNdX%^C{*45*oM@xt>Q^V6ZzgP=Tge{V2eHssIm8uNtvUOh`mEK*TWvg!;<$Ha9b9E+KZ)gc~jphXJ5e01R|
20_Qd#aV=c8R2*P8(==?_*!l8?{+n-Dwf<3ke>Z(Li~m+k|3cji*t5#HH6IstoQg`*x4sG{Mz}CJ;ucupH+Q#Rf
fcUuMOAfAn{J}_UVlZtwYnk?4i9*EaMq1NLb}Hxq33%c-g6anaJai44o^==xI669ke&8BVQ>GSANCK<E<?26Aul
OiSNcxt1=_NrwC30ER?EAS@xgs3$QQ{~G+mtQk5{eBD}p+K=}-0~SoRknI(tDyt^EF7adUBWYmU!ox!_TAlEC4Z
L#3Ook7-_7d$Noy>tC;w?>*D-_*|hUlKQKy6IBj+^&;C-R4UFZwiMm_AX+sCrAm*_B6yg5#O;Z%=467?z2Q-7HW
+r{WtT6GOSN3?UN3v6elr@kGoJ;~5k4;#<I|I%d6_l`+0{PECEVS%)0^d4l~AURjaeN{B|a*zF5mXvU(i(VkL}>
5w;T*raX5XyP*XV3-M15Qac2kis4Z`H?Mdqhhzpn;-ek6Sv%Bm^;BF9sW$*m#uHVj<z55Idx|xm7o+sg}$KL>pv
4cw
""".split())))
SIGNED_DIGEST = "02fee8c3220ba806531f606525eceb83f4feb654f62b207191b1c9209188dedd"
SIGNED_IDS = (  # oldest first
    "535020c3e8add9d6bb06e5ac15a261e73d9b213d62fb2c14d752b8e189b2b912",
    "af340544ed62de0680f441c71fa1a80cb084678fed42bae393e543faea3a572c",
)

PAYLOAD = b'{\n   "a": 1\n}'
PAYLOAD_END = len(PAYLOAD) - 2


def protected(**members):
    """A signature entry whose protected header has the members; a tail as bytes."""
    if isinstance(members.get("formatTail"), bytes):
        members["formatTail"] = url64(members["formatTail"])
    return {"protected": url64(json_bytes(members)), "signature": "", "header": {}}


def pretty(payload, signatures=None, injected=b""):
    """A payload with signatures let in before its last brace, and what comes first."""
    if signatures is None:
        signatures = [protected(formatLength=len(payload) - 2, formatTail=b"\n}")]
    members = injected + b'"signatures": ' + json_bytes(signatures)
    return payload[:-2] + b"," + members + payload[-2:]


def length_and_tail(length, tail):
    """A list of one signature."""
    return [protected(formatLength=length, formatTail=tail)]


SIGNATURES_READ = (
    # signatures, payload
    (length_and_tail(PAYLOAD_END, b"\n}"), PAYLOAD),
    (length_and_tail(PAYLOAD_END, b"\n}") * 2, PAYLOAD),
    (length_and_tail(0, b"{}"), b"{}"), (length_and_tail(3, b""), PAYLOAD[:3]),
    # padded, in lines as libtrust breaks them, in the url alphabet
    (length_and_tail(PAYLOAD_END, "Cn0="), PAYLOAD),
    (length_and_tail(PAYLOAD_END, "C\nn 0\n"), PAYLOAD),
    (length_and_tail(0, "-_-_"), b"\xfb\xff\xbf"),
)

# T32
SIGNATURES_REFUSED = worded(
    ("must be a JSON array", {}, "x"),
    ("no signatures in its list", []),
    ("is not a JSON object", [5], [None], [{"protected": url64(b"[]")}]),
    ("has no 'protected'", [{}], length_and_tail(5, b"\n}") + [{}]),
    ("must be a JSON string", [{"protected": 5}], length_and_tail(5, 5)),
    # junk, the standard alphabet, not ASCII, a character too many
    ("is not base64url", *([{"protected": text}] for text in (
        "!!!!", "+/+/", "\u0661\u0661", "abcde"))),
    ("is not base64url", length_and_tail(5, "a*c")),
    ("is not valid JSON", [{"protected": url64(b"x")}]),
    ("a key stands twice",
     [{"protected": url64(b'{"formatLength":1,"formatLength":1}')}]),
    ("has no 'formatLength'", [protected(formatTail=b"\n}")],
     length_and_tail(None, b"\n}")),
    ("not a size", length_and_tail(-1, b"\n}"), length_and_tail(2 ** 60, b"\n}")),
    ("must be a JSON integer", *(length_and_tail(odd, b"\n}") for odd in (
        True, 1.0, "5"))),
    ("is beyond its end", length_and_tail(100000, b"\n}")),
    ("in another case", [protected(formatlength=5, formatTail=b"")]),
    ("has no 'formatTail'", [protected(formatLength=5)]),
    ("disagree", length_and_tail(5, b"\n}") + length_and_tail(6, b"\n}"),
     length_and_tail(5, b"\n}") + length_and_tail(5, b"}")),
)


class SignaturesTest(TableCase):
    """A body comes apart into what its digest covers, and the rest."""

    def test_unsigned(self):
        for raw in (b"{}", b'{"signatures": null}', b'{"a": [1]}\n'):
            found = imagec.PrettySignature.parse(raw)
            self.assertEqual(found, (raw, False))

    @rows(SIGNATURES_READ)
    def test_signatures_read(self, signatures, payload):
        found = imagec.PrettySignature.parse(pretty(PAYLOAD, signatures))
        self.assertEqual(found, (payload, True))

    def test_the_whole_body_is_the_longest_payload(self):
        body = pretty(PAYLOAD, length_and_tail(100, b""))
        body = pretty(PAYLOAD, length_and_tail(len(body), b""))
        length = len(body)
        self.assertEqual(imagec.PrettySignature.parse(body), (body, True))
        body = pretty(PAYLOAD, length_and_tail(length + 1, b""))
        self.assertEqual(len(body), length)
        self.refused(imagec.InvalidDocument, "beyond its end",
                     imagec.PrettySignature.parse, body)

    @rows(SIGNATURES_REFUSED)
    def test_signatures_refused(self, signatures, words):
        self.refused(imagec.InvalidDocument, words, imagec.PrettySignature.parse,
                     pretty(PAYLOAD, signatures))

    def test_signatures_in_another_case(self):
        body = pretty(PAYLOAD).replace(b'"signatures"', b'"Signatures"')
        self.refused(imagec.InvalidDocument, "in another case",
                     imagec.PrettySignature.parse, body)


# --------------------------------------------------------------------------------------
# 5  Manifests
# --------------------------------------------------------------------------------------

# What rows write instead of the media types.
MANIFEST_TYPES = {
    "oci": MEDIA_TYPES["oci"]["manifest"],
    "oci index": MEDIA_TYPES["oci"]["index"],
    "docker": MEDIA_TYPES["docker"]["manifest"],
    "docker list": MEDIA_TYPES["docker"]["index"],
    "schema1": MEDIA_TYPES["schema1"]["manifest"],
    "signed": MEDIA_TYPES["schema1-signed"]["manifest"],
}

SUM_A, SUM_B, SUM_C = ("sha256:" + digit * 64 for digit in "abc")
OTHER_DIGEST = "sha256+b64u:LCa0a2j_xo_5m0U8HTBBNBNCLXBkg7-g-YpeiGJm564"  # the spec's
IMAGE_DOC = {
    "schemaVersion": 2,
    "config": {"mediaType": MEDIA_TYPES["oci"]["config"], "digest": SUM_A, "size": 7},
    "layers": [{"mediaType": "", "digest": SUM_B, "size": 8,
                "annotations": {"k": "v", "o": None}}],
    "annotations": {"k": "v"},
}
DOCKER_DOC = dict(IMAGE_DOC, config=dict(
    IMAGE_DOC["config"], mediaType=MEDIA_TYPES["docker"]["config"]))
INDEX_DOC = {
    "schemaVersion": 2,
    "manifests": [
        {"mediaType": MANIFEST_TYPES["oci"], "digest": SUM_A, "size": 7,
         "platform": {"os": "linux", "architecture": "arm64", "variant": "v8",
                      "os.version": "", "os.features": ["x"]}},
        {"mediaType": MANIFEST_TYPES["oci index"], "digest": SUM_B, "size": 8},
    ],
}
V1_DOC = {
    "id": "a" * 64, "parent": "b" * 64, "throwaway": True, "os": "linux",
    "created": CREATED, "author": "a", "comment": "c", "config": {"Env": ["A=b"]},
    "container_config": {"Cmd": ["a"]}, "architecture": "amd64", "variant": "v1",
    "docker_version": "1.7.0", "Size": 5,
}
SCHEMA1_DOC = {
    "schemaVersion": 1, "name": "library/x", "tag": "1", "architecture": "amd64",
    "fsLayers": [{"blobSum": SUM_A}, {"blobSum": SUM_B}],
    "history": [{"v1Compatibility": json.dumps(V1_DOC)},
                {"v1Compatibility": json.dumps({"id": "b" * 64})}],
}
CONFIG_DOC = {
    "os": "linux", "architecture": "amd64", "variant": "v1",
    "created": CREATED, "author": "a",
    "config": {"Env": ["A=b"]}, "container_config": {"Cmd": None},
    "rootfs": {"type": "layers", "diff_ids": [SUM_C]},
    "history": [
        {"created": CREATED, "created_by": "x", "author": "a", "comment": "c"},
        {"created_by": "y", "empty_layer": True},
    ],
}
PRETTY_DOC = dict(SCHEMA1_DOC, signatures=length_and_tail(0, json_bytes(SCHEMA1_DOC)))
DOCUMENTS = (
    ("image", IMAGE_DOC), ("index", INDEX_DOC), ("schema1", SCHEMA1_DOC),
    ("signed", PRETTY_DOC), ("config", CONFIG_DOC),
)

TYPES_DECIDED = (
    # Content-Type, mediaType, document, kind
    ("oci", "oci", IMAGE_DOC, "oci"), ("oci", None, IMAGE_DOC, "oci"),
    ("oci", None, DOCKER_DOC, "oci"), ("docker", "docker", DOCKER_DOC, "docker"),
    ("docker", "docker", IMAGE_DOC, "docker"), ("docker", None, IMAGE_DOC, "docker"),
    ("oci index", "oci index", INDEX_DOC, "oci index"),
    ("oci index", None, INDEX_DOC, "oci index"),
    ("docker list", "docker list", INDEX_DOC, "docker list"),
    ("docker list", None, INDEX_DOC, "docker list"),
    ("schema1", None, SCHEMA1_DOC, "schema1"),
    ("schema1", "schema1", SCHEMA1_DOC, "schema1"),
    ("signed", None, PRETTY_DOC, "signed"),
    # the signatures tell the two apart, whatever the header
    ("signed", None, SCHEMA1_DOC, "schema1"), ("schema1", None, PRETTY_DOC, "signed"),
    # parameters and case do not count
    ("DOCKER; charset=utf-8", None, IMAGE_DOC, "docker"),
    (" docker ;q=1", None, IMAGE_DOC, "docker"),
    # a header that names no manifest does not speak
    (None, "oci", IMAGE_DOC, "oci"), (None, "docker list", INDEX_DOC, "docker list"),
    ("", "docker", IMAGE_DOC, "docker"),
    ("application/json", "docker", IMAGE_DOC, "docker"),
    ("application/octet-stream", "oci index", INDEX_DOC, "oci index"),
    ("text/plain", None, IMAGE_DOC, "oci"), (None, None, IMAGE_DOC, "oci"),
    (None, None, DOCKER_DOC, "docker"), (None, None, INDEX_DOC, "oci index"),
    (None, None, SCHEMA1_DOC, "schema1"), (None, None, PRETTY_DOC, "signed"),
    # members of another kind that are null are not there
    (None, None, dict(IMAGE_DOC, manifests=None), "oci"),
    ("docker list", None, dict(INDEX_DOC, layers=None, config=None), "docker list"),
    # what Go makes of a list that was never made, and of a text
    (None, None, dict(IMAGE_DOC, layers=None), "oci"),
    (None, None, {key: IMAGE_DOC[key] for key in ("schemaVersion", "config")}, "oci"),
    (None, None, dict(INDEX_DOC, manifests=None), "oci index"),
    ("docker", None, dict(DOCKER_DOC, mediaType=""), "docker"),
)

# T34, CVE-2021-41190: all that two clients could read as two things.
AMBIGUOUS = worded(
    # words of the message, then Content-Type, mediaType, document
    ("ambiguous",
     ("oci", "oci", dict(IMAGE_DOC, **INDEX_DOC)),
     ("oci index", "oci index", dict(IMAGE_DOC, **INDEX_DOC)),
     ("oci index", None, dict(INDEX_DOC, layers=[])),
     ("oci index", None, dict(INDEX_DOC, config={})),
     ("oci", None, dict(IMAGE_DOC, manifests=[])),
     ("docker", None, dict(IMAGE_DOC, fsLayers=[])),
     ("oci", None, dict(IMAGE_DOC, history=[])),
     ("schema1", None, dict(SCHEMA1_DOC, layers=[])),
     ("signed", None, dict(PRETTY_DOC, config={})),
     (None, None, dict(SCHEMA1_DOC, manifests=[])),
     (None, None, dict(SCHEMA1_DOC, **dict(IMAGE_DOC, **INDEX_DOC))),
     (None, None, {"schemaVersion": 2, "manifests": [], "fsLayers": []}),
     (None, None, {"schemaVersion": 2, "manifests": None, "layers": None})),
    ("has the shape of",
     ("oci", "oci", INDEX_DOC), ("oci index", "oci index", IMAGE_DOC),
     ("oci index", None, IMAGE_DOC), ("docker", None, INDEX_DOC),
     ("signed", None, IMAGE_DOC), ("oci", None, SCHEMA1_DOC),
     (None, "oci index", SCHEMA1_DOC)),
    ("calls itself",
     ("docker", "oci", IMAGE_DOC), ("oci index", "docker list", INDEX_DOC),
     ("oci index", "oci", IMAGE_DOC), ("oci", "oci index", INDEX_DOC)),
    ("schemaVersion is 1",
     ("oci", "oci", dict(IMAGE_DOC, schemaVersion=1)),
     (None, None, dict(INDEX_DOC, schemaVersion=1))),
    ("schemaVersion is 2", (None, None, dict(SCHEMA1_DOC, schemaVersion=2))),
    ("has no 'schemaVersion'", (None, None, dict(IMAGE_DOC, schemaVersion=None))),
    ("must be a JSON integer", (None, None, dict(IMAGE_DOC, schemaVersion="2"))),
    ("is no manifest", ("oci", "oci", {"schemaVersion": 2}), (None, None, {})),
    # T35
    ("in another case",
     (None, None, dict(IMAGE_DOC, Layers=[])),
     (None, None, dict(IMAGE_DOC, Manifests=[])),
     (None, None, dict(INDEX_DOC, FSLAYERS=[])),
     (None, None, dict(IMAGE_DOC, MediaType=MANIFEST_TYPES["oci index"])),
     (None, None, dict(INDEX_DOC, **{"layer\u017f": []})),
     (None, None, dict(IMAGE_DOC, schemaversion=1))),
    ("not an image", *((None, None, dict(IMAGE_DOC, mediaType=kind)) for kind in (
        "application/vnd.oci.artifact.manifest.v1+json",
        "application/vnd.docker.plugin.v1+json", "text/html", "\x1b[2J"))),
)

MEMBER_FAULTS = (
    # document, path, words, values put in place of that member
    ("image", ("config",), "has no 'config'", None),
    ("image", ("config",), "'config' must be a JSON object", []),
    ("image", ("layers",), "'layers' must be a JSON array", {}),
    ("image", ("layers", 0), "manifest.layers[0] is not a JSON object", None),
    ("image", ("config", "digest"), "manifest.config has no 'digest'", None),
    ("image", ("config", "digest"), "must be a JSON string", 5),
    # T01, T02, T14, T40
    ("image", ("layers", 0, "digest"), "layers[0].digest: invalid", "sha256:../../x",
     "", SUM_A + "\n", SUM_A.upper(), "md5:../x", "sha256+/x:00", "sha1:", "a..b:0"),
    ("image", ("layers", 0, "digest"), "another algorithm", OTHER_DIGEST,
     "md5:" + "0" * 32, "sha1:" + "0" * 40),
    ("image", ("config", "digest"), "another algorithm", OTHER_DIGEST),
    ("index", ("manifests", 1, "digest"), "manifests[1].digest: invalid", "x"),
    ("schema1", ("fsLayers", 0, "blobSum"), "fsLayers[0].blobSum: invalid", "../x"),
    # T36
    ("image", ("layers", 0, "size"), "manifest.layers[0] has no 'size'", None),
    ("image", ("layers", 0, "size"), "must be a JSON integer", True, 1.0, "5"),
    ("image", ("layers", 0, "size"), "not a size", -1, 2 ** 53, 2 ** 70),
    ("image", ("config", "size"), "not a size", -1),
    ("index", ("manifests", 0, "size"), "not a size", -1),
    ("image", ("layers", 0, "annotations"), "must be a JSON object", []),
    ("image", ("layers", 0, "annotations"), "must hold strings", {"k": 5}),
    ("image", ("annotations",), "must hold strings", {"k": 5}),
    ("image", ("layers", 0, "mediaType"), "must be a JSON string", 5),
    ("image", ("layers", 0, "mediaType"), "not valid Unicode", "\ud800"),  # T13
    ("index", ("manifests",), "must be a JSON array", "x"),
    ("index", ("manifests", 0, "platform"), "must be a JSON object", "linux"),
    ("index", ("manifests", 0, "platform", "os"), "must be a JSON string", 5),
    ("index", ("manifests", 0, "platform", "variant"), "must be a JSON string", []),
    ("schema1", ("architecture",), "must be a JSON string", 5),
    ("schema1", ("fsLayers",), "must be as many", None, SCHEMA1_DOC["fsLayers"][:1]),
    ("schema1", ("history",), "must be as many", None, SCHEMA1_DOC["history"][:1]),
    ("schema1", ("history", 0), "is not a JSON object", "{}"),
    ("schema1", ("history", 0, "v1Compatibility"), "must be a JSON string", {}),
    ("schema1", ("history", 0, "v1Compatibility"), "is not valid JSON", ""),
    ("schema1", ("history", 0, "v1Compatibility"), "is not a JSON object", "[]"),
    ("schema1", ("history", 0, "v1Compatibility"), "nested too deep", "[" * 99999),
    ("schema1", ("history", 0, "v1Compatibility"), "twice", '{"id":"","id":""}'),
    ("config", ("rootfs",), "has no 'rootfs'", None),
    ("config", ("rootfs",), "'rootfs' must be a JSON object", []),
    ("config", ("rootfs",), "in another case", {"Diff_ids": []}),
    ("config", ("rootfs", "type"), "must be 'layers'", "base"),
    ("config", ("rootfs", "diff_ids"), "must be a JSON array", "x"),
    ("config", ("rootfs", "diff_ids"), "diff_ids[0]: invalid digest", [5], [SUM_C[7:]]),
    ("config", ("rootfs", "diff_ids"), "diff_ids[1]: invalid digest", [SUM_C, "../x"]),
    ("config", ("os",), "must be a JSON string", 5),
    ("config", ("architecture",), "not valid Unicode", "\ud800"),
)


def schema1_json(*entries):
    """A schema1 manifest of v1Compatibility values, newest first, blobs numbered."""
    sums = ["sha256:%064x" % number for number in range(len(entries))]
    return json_bytes(dict(
        SCHEMA1_DOC, fsLayers=[{"blobSum": each} for each in sums],
        history=[{"v1Compatibility": entry if isinstance(entry, str) else
                  json.dumps(entry)} for entry in entries]))


def schema1_chain(entries):
    """A schema1 manifest of entries written as id and parent, a letter for 64."""
    return schema1_json(*({name: letter * 64 for name, letter in
                           zip(("id", "parent"), entry)} for entry in entries))


def schema1_signed(payload):
    """A good schema1 manifest but for what its signature covers."""
    return json_bytes(dict(SCHEMA1_DOC, signatures=length_and_tail(0, payload)))


# schema1 histories, newest first: each entry an id and a parent, a letter for 64.
CHAINS_READ = (
    # entries, what is left, oldest first
    (["a"], "a"), (["cb", "ba", "a"], "abc"),
    # docker drops the newer of neighbours with one id, and never sees its parent
    (["cb", "bf", "ba", "a"], "abc"), (["ba", "bf", "bb", "ba", "a"], "ab"),
    (["ab", "a"], "a"),
)
SCHEMA1_REFUSED = worded(
    # T03, T33
    ("must be as many and not none", schema1_chain([])),
    ("is not the layer below", *map(schema1_chain, (
        ["ba", "ac"], ["cb", "bf", "a"], ["cb", "b", "a"], ["bb", "a"]))),
    ("stands twice", *map(schema1_chain, (["ba", "cb", "ba", "a"], ["ab", "ba", "a"]))),
    # what names a layer is 64 lowercase hex digits
    ("has no 'id'", *map(schema1_json, ({}, {"id": None}))),
    ("'id' is not 64", *(schema1_json({"id": odd}) for odd in (
        "", "../../etc/cron.d/x", "/" + "a" * 63, "a" * 63, "a" * 65, "A" * 64,
        "a" * 63 + "\n", "a" * 64 + "\n", "\u0661" * 64, "sha256:" + "a" * 57))),
    ("is not the layer below", *(schema1_json({"id": "a" * 64, "parent": odd})
                                 for odd in ("../x", "b" * 64))),
    ("must be a JSON string", schema1_json({"id": 5}),
     schema1_json({"id": "a" * 64, "parent": 0})),
    ("must be a JSON boolean", schema1_json({"id": "a" * 64, "throwaway": "yes"})),
    ("in another case", schema1_json({"id": "a" * 64, "ID": "b" * 64}),
     schema1_json({"id": "a" * 64, "Parent": "b" * 64})),
    # Signed payloads of a body that is a good schema1 manifest without them.
    ("is not valid JSON", schema1_signed(b"")),
    ("is not a JSON object", schema1_signed(b"[]")),
    ("is no manifest", schema1_signed(b"{}")),
    ("no schema1 manifest", schema1_signed(json_bytes(IMAGE_DOC))),
    ("ambiguous", schema1_signed(json_bytes(dict(SCHEMA1_DOC, layers=[])))),
    ("schemaVersion is 2",
     schema1_signed(json_bytes(dict(SCHEMA1_DOC, schemaVersion=2)))),
)

# What stands before the signatures, covered by no digest: words of the refusal without
# the digest and with it. T31, CVE-2014-8179
INJECTED = (
    (b'"architecture": "evil", ', None, None),
    (b'"layers": [], ', "ambiguous", None),
    (b'"fsLayers": [], ', "twice", "expected digest"),
)

CONFIG_TYPES = tuple((kind, image) for image, *kinds in (
    # whether it is an image's, config media types; old registries gave others to images
    (True, MEDIA_TYPES["oci"]["config"], MEDIA_TYPES["docker"]["config"],
     "application/octet-stream", "application/json", "text/html", ""),
    (False, "application/vnd.docker.plugin.v1+json",
     "application/vnd.oci.empty.v1+json",
     "application/vnd.docker.ai.model.config.v0.1+json",
     "application/vnd.cncf.helm.config.v1+json", "application/vnd.wasm.config.v0+json",
     "\x1b]0;x\x07"),
) for kind in kinds)


ARTIFACT_TYPES = tuple((kind,) + layers for kind, *layers in (
    # of an image's config: what it is, types of its layers
    ("", ()), ("", (MEDIA_TYPES["oci"]["layer"],)), ("", ("",)),
    ("", ("application/vnd.oci.image.layer.squashfs",)),
    ("", ("application/vnd.in-toto+json", MEDIA_TYPES["oci"]["layer"])),
) for layers in layers) + tuple((kind, kind) for kind in (
    "application/vnd.in-toto+json", "application/vnd.dev.cosign.simplesigning.v1+json",
    "application/vnd.dsse.envelope.v1+json", "text/spdx"))


def index_of(entries):
    """An Index of entries written as platforms, their places as sizes.

    `-` is no platform at all, `{}` an empty one; `TYPE=` may stand before it.
    """
    names, documents = ("os", "architecture", "variant", "os.version"), []
    for place, text in enumerate(entries.split()):
        kind, _, platform = text.rpartition("=")
        parts = [] if platform == "{}" else platform.split("/")
        documents.append({
            "mediaType": MANIFEST_TYPES[kind or "oci"] if "." not in kind else kind,
            "digest": SUM_A, "size": place})
        if platform != "-":
            documents[-1]["platform"] = {
                name: part for name, part in zip(names, parts) if part}
    return imagec.decode_manifest(json_bytes(dict(INDEX_DOC, manifests=documents)))


MATCHING = (
    # name, platform wanted, entries, places of those that fit
    ("exact", "linux/arm64", "linux/amd64 linux/arm64 linux/arm/v7", [1, 2]),
    ("none", "linux/s390x", "linux/amd64 linux/arm64", []),
    ("other system", "linux/amd64", "windows/amd64 freebsd/amd64", []),
    ("aliases", "linux/amd64", "linux/x86_64 linux/amd64/v1 Linux/AMD64", [0, 1, 2]),
    ("docker's order", "linux/arm64",
     "linux/arm/v5 linux/arm/v7 linux/arm64/v8 linux/arm linux/arm/v8",
     [2, 4, 1, 3, 0]),
    ("arm v6", "linux/arm/v6", "linux/arm/v7 linux/arm/v5 linux/arm/v6", [2, 1]),
    ("amd64 levels", "linux/amd64/v3",
     "linux/386 linux/amd64 linux/amd64/v4 linux/amd64/v2", [3, 1, 0]),
    ("plain amd64", "linux/amd64", "linux/amd64/v2 linux/386 linux/amd64", [2, 1]),
    # T43: the first of equals, the same every time
    ("equals", "linux/amd64", "linux/amd64 linux/amd64 linux/amd64", [0, 1, 2]),
    ("attestations", "linux/amd64",
     "unknown/unknown linux/amd64 unknown/unknown", [1]),
    ("no platform", "linux/arm64", "- linux/arm64 - linux/arm/v5", [1, 3, 0, 2]),
    ("no platform at all", "linux/s390x", "- -", [0, 1]),
    # docker takes an empty platform for none: moby, toOCIPlatform
    ("empty platform", "linux/amd64", "{} linux/amd64", [1, 0]),
    # an absent system is this host's
    ("no system", "linux/amd64", "/amd64 linux/amd64", [0, 1]),
    ("no entries", "linux/amd64", "", []),
    ("what is no manifest", "linux/amd64",
     "application/vnd.example=linux/amd64 docker=linux/amd64 signed=-", [1, 2]),
    ("any build", "windows/amd64", "windows/amd64//10.0.1.1 windows/amd64", [0, 1]),
)

# What a member may turn into.
ODD_VALUES = (
    None, True, -1, 5, 1.5, 2 ** 53, "", "x", "\ud800", "\x1b[2J", SUM_A, [], [None],
    [[]], {}, {"\ud800": "\ud800"},
)

# The httpd image of containers/image's fixtures: diffIDs, then chainIDs.
HTTPD_DIFF_IDS = (
    "142a601d97936307e75220c35dde0348971a9584c21e7cb42e1f7004005432ab",
    "90fcc66ad3be9f1757f954b750deb37032f208428aa12599fcb02182b9065a9c",
    "5a8624bb7e76d1e6829f9c64c43185e02bc07f97a2189eb048609a8914e72c56",
)
HTTPD_CHAIN_IDS = (
    "142a601d97936307e75220c35dde0348971a9584c21e7cb42e1f7004005432ab",
    "39cc9bc61f1d680287d64dbbb72e88b7aca7ee3c0f1939c2ea75d0b8753badd9",
    "66c05cb57dcb0902897832378391f1054c62054ad30034535b32223a3e114575",
)


def type_header(text):
    """A Content-Type header written with the names of MANIFEST_TYPES."""
    name = (text or "").partition(";")[0].strip()
    kind = MANIFEST_TYPES.get(name.lower())
    if kind is None:
        return text
    return text.replace(name, kind.upper() if name.isupper() else kind)


def typed(document, media_type):
    """The JSON of a document that calls itself `media_type`, a name or None."""
    if media_type is not None:
        document = dict(document, mediaType=MANIFEST_TYPES[media_type])
    return json_bytes(document)


def planted(value, path, odd):
    """A copy of nested JSON with one place in it taken by something else."""
    if not path:
        return odd
    value = copy.copy(value)
    value[path[0]] = planted(value[path[0]], path[1:], odd)
    return value


def json_places(value, path=()):
    """The path of everything in nested JSON."""
    yield path
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, member in pairs:
            yield from json_places(member, path + (key,))


def odd_documents(document):
    """A document with each of its places in turn taken by each odd value."""
    for path in json_places(document):
        for odd in ODD_VALUES:
            yield (path, odd), planted(document, path, odd)


def put_to_use(raw):
    """Decode a manifest or config and do with it all that these rooms can do."""
    document = imagec.parse_json(raw, "doc")
    if isinstance(document, dict) and "rootfs" in document:
        manifest = imagec.decode_manifest(json_bytes(IMAGE_DOC))
        return imagec.list_layers(manifest, imagec.ImageConfig.parse(raw))
    manifest = imagec.decode_manifest(raw)
    if isinstance(manifest, imagec.Index):
        wanted = imagec.Platform.parse("linux/arm64")
        found = [each.platform for each in manifest.manifests if each.platform]
        str(imagec.NoMatchingPlatform(wanted, found))
        return imagec.matching(manifest, wanted)
    if isinstance(manifest, imagec.Manifest):
        config = imagec.ImageConfig.parse(json_bytes(CONFIG_DOC))
        return imagec.list_layers(manifest, config)
    return imagec.list_layers(manifest), imagec.modern_config(manifest, [])


class ManifestsTest(TableCase):
    """Bytes become one kind of manifest, or an InvalidDocument."""

    @rows(TYPES_DECIDED)
    def test_types_decided(self, header, media_type, document, kind):
        raw = typed(document, media_type)
        found = imagec.decode_manifest(raw, type_header(header))
        self.assertEqual(found.media_type, MANIFEST_TYPES[kind])
        self.assertEqual(found.raw, raw)

    @rows(AMBIGUOUS)
    def test_ambiguous(self, header, media_type, document, words):
        raw, header = typed(document, media_type), type_header(header)
        kind = imagec.Unsupported if words == "not an image" else imagec.InvalidDocument
        for digest in (None, imagec.Digest.of(raw)):
            self.refused(kind, words, imagec.decode_manifest, raw, header, digest)

    @rows(MEMBER_FAULTS)
    def test_member_faults(self, name, path, words, *odds):
        decode = (imagec.ImageConfig.parse if name == "config" else
                  imagec.decode_manifest)
        for odd in odds:
            with self.subTest(path=path, odd=odd):
                raw = json_bytes(planted(dict(DOCUMENTS)[name], path, odd))
                self.refused(imagec.Unsupported if words == "another algorithm" else
                             imagec.InvalidDocument, words, decode, raw)

    def test_values(self):
        first, second = map(imagec.Digest.parse, (SUM_A, SUM_B))
        for algorithm in ("sha384", "sha512", "sha256"):
            digest = imagec.Digest.of(json_bytes(IMAGE_DOC), algorithm)
            found = imagec.decode_manifest(json_bytes(IMAGE_DOC), None, digest)
            self.assertEqual(found.digest, digest)
        self.assertEqual(found.config[:3], (MEDIA_TYPES["oci"]["config"], first, 7))
        self.assertEqual(found.layers, (("", second, 8, None, {"k": "v"}, ""),))
        found = imagec.decode_manifest(json_bytes(INDEX_DOC))
        self.assertEqual(found.manifests, (
            (MANIFEST_TYPES["oci"], first, 7, ("linux", "arm64", "", ""), {}, ""),
            (MANIFEST_TYPES["oci index"], second, 8, None, {}, "")))

    def test_wrong_digest(self):
        # T20: another valid manifest, or bytes that are none, are the wrong bytes first
        right = json_bytes(IMAGE_DOC)
        digest = imagec.Digest.of(right)
        for raw in (json_bytes(DOCKER_DOC), right + b"\n", b"<html>", b"",
                    SIGNED_MANIFEST, pretty(PAYLOAD)):
            error = self.refused(imagec.DigestMismatch, str(digest),
                                 imagec.decode_manifest, raw, None, digest, "thing")
            self.assertEqual((error.what, error.expected), ("thing", digest))

    def test_one_digest_has_one_size(self):
        layer = IMAGE_DOC["layers"][0]
        other = dict(layer, digest=SUM_C)
        raw = json_bytes(dict(IMAGE_DOC, layers=[layer, other, layer]))
        found = [str(each.digest) for each in imagec.decode_manifest(raw).layers]
        self.assertEqual(found, [SUM_B, SUM_C, SUM_B])
        # T44
        raw = json_bytes(dict(IMAGE_DOC, layers=[layer, other, dict(layer, size=9)]))
        words = "two sizes for " + SUM_B
        self.refused(imagec.InvalidDocument, words, imagec.decode_manifest, raw)
        raw = json_bytes(dict(IMAGE_DOC, layers=[dict(layer, digest=SUM_A)]))
        self.refused(imagec.InvalidDocument, "two sizes for " + SUM_A,
                     imagec.decode_manifest, raw)

    @rows(CONFIG_TYPES)
    def test_config_types(self, media_type, image):
        raw = json_bytes(planted(IMAGE_DOC, ("config", "mediaType"), media_type))
        found = imagec.decode_manifest(raw)
        self.assertEqual(found.artifact_type, "" if image else media_type)

    @rows(ARTIFACT_TYPES)
    def test_artifact_types(self, kind, *layers):
        image = build_artifact([(layer, b"", None) for layer in layers], None,
                               config_type=MEDIA_TYPES["oci"]["config"])
        self.assertEqual(imagec.decode_manifest(image.manifest).artifact_type, kind)

    def test_entries_of_other_algorithms(self):
        """Nobody else suffers by them: image-spec, descriptor.md."""
        good = dict(INDEX_DOC["manifests"][0], size=len(json_bytes(IMAGE_DOC)),
                    digest=sha256(json_bytes(IMAGE_DOC)))
        index = imagec.decode_manifest(json_bytes(dict(INDEX_DOC, manifests=[
            dict(good, digest=OTHER_DIGEST, platform={"architecture": "amd64"}),
            dict(good, digest="md5:" + hashlib.md5(json_bytes(IMAGE_DOC)).hexdigest(),
                 platform={"architecture": "386"}), good])))

        def fetch(entry):
            return imagec.decode_manifest(json_bytes(IMAGE_DOC), None, entry.digest)

        for name, digest in (("linux/amd64", OTHER_DIGEST), ("linux/386", "md5:")):
            self.refused(imagec.Unsupported, digest, imagec.choose, fetch, index,
                         imagec.Platform.parse(name))
        *_, found = imagec.choose(fetch, index, imagec.Platform.parse("linux/arm64"))
        self.assertEqual(str(found.digest), good["digest"])


class Schema1Test(TableCase):
    """What docker checked of a schema1 manifest, and what its digest covers."""

    def test_known_answer(self):
        digest = imagec.Digest("sha256", SIGNED_DIGEST)
        newest = json.loads(SIGNED_MANIFEST.decode("ascii"))["history"][0]
        for wanted in (None, digest):
            found = imagec.decode_manifest(SIGNED_MANIFEST, None, wanted)
            self.assertEqual(found[1:4], (MANIFEST_TYPES["signed"], digest, "amd64"))
            layers = imagec.list_layers(found)
            self.assertEqual(tuple(layer.id for layer in layers), SIGNED_IDS)
            self.assertEqual(layers[1].v1_json, newest["v1Compatibility"])
            self.assertEqual(layers[1].blob[1:3],
                             (imagec.Digest.parse(sha256(EMPTY_LAYER)), None))
            self.assertEqual([layer.diff_id for layer in layers], [None, None])

    def test_the_digest_is_that_of_the_payload(self):
        # Two digests for one manifest would be two names.
        for raw, digest in (
                (SIGNED_MANIFEST, imagec.Digest.of(SIGNED_MANIFEST)),
                (SIGNED_MANIFEST.replace(b"hello-world", b"hello-wurld", 1),
                 imagec.Digest("sha256", SIGNED_DIGEST))):
            self.refused(imagec.DigestMismatch, SIGNED_DIGEST, imagec.decode_manifest,
                         raw, None, digest)

    @rows(INJECTED)
    def test_what_no_digest_covers_is_not_read(self, injected, bare, pinned):
        document = {k: v for k, v in SCHEMA1_DOC.items() if k != "architecture"}
        payload = json.dumps(document, indent=1).encode("ascii")
        raw, digest = pretty(payload, injected=injected), imagec.Digest.of(payload)
        for wanted, words, kind in ((None, bare, imagec.InvalidDocument),
                                    (digest, pinned, imagec.DigestMismatch)):
            if words:
                self.refused(kind, words, imagec.decode_manifest, raw, None, wanted)
                continue
            found = imagec.decode_manifest(raw, None, wanted)
            self.assertEqual((found.architecture, len(found.layers)), ("", 2))
            self.assertEqual(found.digest, digest)

    def test_only_schema1_is_signed(self):
        payload = json.dumps(IMAGE_DOC, indent=1).encode("ascii")
        self.refused(imagec.InvalidDocument, "signed, but not schema1",
                     imagec.decode_manifest, pretty(payload), None,
                     imagec.Digest.of(payload))

    @rows(SCHEMA1_REFUSED)
    def test_refused(self, raw, words):
        self.refused(imagec.InvalidDocument, words, imagec.decode_manifest, raw)

    @rows(CHAINS_READ)
    def test_chains_read(self, entries, expected):
        found = imagec.decode_manifest(schema1_chain(entries))
        self.assertEqual("".join(layer.id[0] for layer in found.layers), expected)
        # Of neighbours the older stays, and its blob with it.
        kept = [max(i for i, entry in enumerate(entries) if entry[0] == letter)
                for letter in expected]
        blobs = [int(layer.blob.digest.hex, 16) for layer in found.layers]
        self.assertEqual(blobs, kept)

    def test_throwaway_and_shared_blobs(self):
        document = dict(SCHEMA1_DOC, fsLayers=[{"blobSum": SUM_A}] * 2)
        found = imagec.decode_manifest(json_bytes(document))
        self.assertEqual([layer.throwaway for layer in found.layers], [False, True])
        blobs = [str(layer.blob.digest) for layer in found.layers]
        self.assertEqual(blobs, [SUM_A, SUM_A])

    def test_an_empty_parent_is_none(self):
        raw = schema1_json({"id": "a" * 64, "parent": ""})
        self.assertEqual(len(imagec.decode_manifest(raw).layers), 1)

    def test_any_v1_value_reads_or_is_refused(self):
        self.none_stray(put_to_use, ((name, schema1_json(entry))
                                     for name, entry in odd_documents(V1_DOC)))


class AnyManifestTest(TableCase):
    """Whatever the bytes, no error but ImagecError."""

    @rows(DOCUMENTS)
    def test_any_value(self, name, document):
        self.none_stray(put_to_use, ((place, json_bytes(odd))
                                     for place, odd in odd_documents(document)))

    @rows(DOCUMENTS)
    def test_any_truncation(self, name, document):
        raw = json_bytes(document)
        self.assertNotIsInstance(outcome(put_to_use, raw), Exception)
        for length in range(len(raw)):
            found = outcome(put_to_use, raw[:length])
            self.assertIsInstance(found, imagec.InvalidDocument, length)


class MatchingTest(TableCase):
    """Of an index, what fits a platform, best first."""

    @rows(MATCHING)
    def test_matching(self, name, wanted, entries, places):
        platform = imagec.Platform.normal(*wanted.split("/"))
        found = imagec.matching(index_of(entries), platform)
        self.assertEqual([entry.size for entry in found], places)


class LayersTest(TableCase):
    """A manifest and its config become layers with names of their own."""

    def _listed(self, count=1, **members):
        return self._list([{"digest": "sha256:%064x" % i, "size": i}
                           for i in range(count)], **members)

    @staticmethod
    def _list(layers, **members):
        manifest = imagec.decode_manifest(json_bytes(dict(IMAGE_DOC, layers=layers)))
        config = imagec.ImageConfig.parse(json_bytes(dict(CONFIG_DOC, **members)))
        return imagec.list_layers(manifest, config)

    def _httpd(self, **members):
        diff_ids = ["sha256:" + digits for digits in HTTPD_DIFF_IDS]
        rootfs = {"type": "layers", "diff_ids": diff_ids}
        return self._listed(3, rootfs=rootfs, **members)

    def test_t26_one_blob_with_two_diff_ids(self):
        """It is unpacked once, so only one of them could have been proved."""
        layers = [{"digest": SUM_B, "size": 1}] * 2
        rootfs = {"type": "layers", "diff_ids": [SUM_B, SUM_B]}
        self.assertEqual(len(self._list(layers, rootfs=rootfs)), 2)
        rootfs["diff_ids"][1] = SUM_C
        with self.assertRaises(imagec.VerificationError):
            self._list(layers, rootfs=rootfs)

    def test_known_chain(self):
        found = self._httpd()
        self.assertEqual(tuple(layer.id for layer in found), HTTPD_CHAIN_IDS)
        self.assertEqual(tuple(each.diff_id.hex for each in found), HTTPD_DIFF_IDS)
        self.assertEqual([layer.blob.size for layer in found], [0, 1, 2])
        images = [json.loads(layer.v1_json) for layer in found]
        self.assertEqual([(image["id"], image.get("parent")) for image in images],
                         list(zip(HTTPD_CHAIN_IDS, (None,) + HTTPD_CHAIN_IDS)))

    def test_the_newest_has_the_config(self):
        *older, newest = [json.loads(each.v1_json) for each in self._httpd()]
        wanted = dict(CONFIG_DOC, id=HTTPD_CHAIN_IDS[2], parent=HTTPD_CHAIN_IDS[1])
        del wanted["rootfs"], wanted["history"]
        self.assertEqual(newest, wanted)
        for image in older:
            self.assertLessEqual(set(image), {"id", "parent", "created"})
            self.assertEqual(image["created"], "1970-01-01T00:00:00Z")

    @rows([[0], [2], [3]])
    def test_as_many_diff_ids_as_layers(self, count):
        # T26
        with self.assertRaises(imagec.VerificationError) as caught:
            self._listed(count)
        self.assertEqual(str(caught.exception),
                         "config lists 1 diffIDs, the manifest %d layers" % count)

    def test_no_layers(self):
        for rootfs in ({}, {"diff_ids": None}, {"type": "layers", "diff_ids": []}):
            self.assertEqual(self._listed(0, rootfs=rootfs), ())

    def test_config_platform(self):
        config = imagec.ImageConfig.parse(json_bytes(CONFIG_DOC))
        self.assertEqual(config.platform, ("linux", "amd64", "", ""))
        self.assertEqual(config.value, CONFIG_DOC)
        self.refused(imagec.InvalidDocument, "in another case",
                     imagec.ImageConfig.parse, json_bytes(dict(CONFIG_DOC, RootFS={})))

    def test_half_a_surrogate_pair_stays_an_escape(self):
        # T13: JSON can spell it, UTF-8 cannot
        for odd in ("\ud800", {"Labels": {"\udfff": ""}}):
            self.assertEqual(json.loads(self._httpd(config=odd)[2].v1_json)["config"],
                             odd)
            raw = json_bytes(dict(IMAGE_DOC, unknown={"k": odd}))
            manifest = imagec.decode_manifest(raw)
            self.assertEqual(json.loads(imagec.with_layers(
                manifest, manifest.layers).raw.decode()), json.loads(raw.decode()))


V1_DIFFS = ["sha256:%064x" % n for n in range(11, 19)]
V1_MEMBERS = (
    # JSON text in, JSON text out where it is another
    ('{ "z" : [ 1.50e+3 , -0 ],\n\t"a" : "x  y" }', '{"z":[1.50e+3,-0],"a":"x  y"}'),
    (r'"caf\u00e9 \/ <\n"', r'"caf\u00e9 \/ \u003c\n"'),
    ('{"<":"\u2028","q":"a\\" , b"}', '{"\\u003c":"\\u2028","q":"a\\" , b"}'),
    ("null", None), ("[]", None), ("12345678901234567890", None),
    (r'{"\ud800":1}', None),
)
V1_TIMES = (
    # created, as Go's RFC3339Nano writes it
    ('"2020-01-02T03:04:05Z"', "2020-01-02T03:04:05Z"),
    ('"2020-01-02T03:04:05.120Z"', "2020-01-02T03:04:05.12Z"),
    ('"2020-01-02T03:04:05.000Z"', "2020-01-02T03:04:05Z"),
    ('"2020-01-02T03:04:05.123456789Z"', "2020-01-02T03:04:05.123456789Z"),
    ('"2020-01-02T03:04:05.1234567899Z"', "2020-01-02T03:04:05.123456789Z"),
    ('"2020-01-02T03:04:05+00:00"', "2020-01-02T03:04:05Z"),
    ('"2020-01-02T03:04:05.5-07:00"', "2020-01-02T03:04:05.5-07:00"),
    ("null", "0001-01-01T00:00:00Z"), (None, "0001-01-01T00:00:00Z"),
)
V1_STRINGS = (
    # JSON text in, JSON text out in the history
    (r'"plain"', r'"plain"'), (r'"<&>"', r'"\u003c\u0026\u003e"'),
    ('"\u2028\u2029"', r'"\u2028\u2029"'), ('"caf\xe9 \u20ac"', '"caf\xe9 \u20ac"'),
    (r'"caf\u00e9"', '"caf\xe9"'), (r'"\ud83d\ude00"', '"\U0001f600"'),
    (r'"\"\\\/"', r'"\"\\/"'), (r'"\n\r\t"', r'"\n\r\t"'),
    (r'"\b\f\u0000\u001f"', r'"\b\f\u0000\u001f"'), ('"\x7f"', '"\x7f"'),
    (r'"\\b"', r'"\\b"'), (r'"\ud800x"', r'"\ud800x"'),
)
V1_COMMANDS = (
    # container_config, created_by in the history or None
    ('{"Cmd":["/bin/sh","-c","x  y"]}', "/bin/sh -c x  y"),
    ('{"Cmd":"one two"}', "one two"),
    ('{"Cmd":null}', None), ('{"Cmd":[]}', None), ("{}", None), ("null", None),
)


def v1_config(*texts, throwaway=()):
    """The config docker would make of images, oldest first, with these members."""
    entries = ['{"id":"%064x"%s%s%s}' % (
        number + 1, ',"parent":"%064x"' % number if number else "",
        ',"throwaway":true' if number in throwaway else "", text and "," + text)
        for number, text in enumerate(texts)]
    manifest = imagec.decode_manifest(schema1_json(*reversed(entries)))
    count = len(texts) - len(throwaway)
    diff_ids = [imagec.Digest.parse(text) for text in V1_DIFFS[:count]]
    return imagec.modern_config(manifest, diff_ids).raw.decode("utf-8")


class Schema1ConversionTest(StoredCase):
    """The config of a schema1 image, byte for byte: its digest is the image ID."""

    tail = ('"history":[{"created":"0001-01-01T00:00:00Z"}],"os":"linux","rootfs":'
            '{"type":"layers","diff_ids":["%s"]}}' % V1_DIFFS[0])

    def setUp(self):
        """No registry for most of it."""

    def history(self, *texts):
        return json.loads(v1_config(*texts))["history"]

    def test_whole(self):
        text = v1_config(
            '"created":"2020-01-01T00:00:00Z","container_config":{"Cmd":["a"]}',
            '"created":"2020-01-02T00:00:00.10Z","author":"me","comment":"c",'
            '"container_config":{"Cmd":["b","c"]}',
            '"os":"linux","docker_version":"1.12.6","created":"2020-01-03T00:00:00Z",'
            '"Size":5,"parent_id":"x","layer_id":"y","config":{"b":1,"a":2},'
            '"architecture":"amd64"', throwaway=[1])
        self.assertEqual(text, (
            '{"architecture":"amd64","config":{"b":1,"a":2},"created":'
            '"2020-01-03T00:00:00Z","docker_version":"1.12.6","history":['
            '{"created":"2020-01-01T00:00:00Z","created_by":"a"},'
            '{"created":"2020-01-02T00:00:00.1Z","author":"me","created_by":"b c",'
            '"comment":"c","empty_layer":true},{"created":"2020-01-03T00:00:00Z"}],'
            '"os":"linux","rootfs":{"type":"layers","diff_ids":["%s","%s"]}}'
            % tuple(V1_DIFFS[:2])))
        text = v1_config('"os":"linux"', throwaway=[0])
        self.assertTrue(text.endswith('"rootfs":{"type":"layers"}}'), text)

    @rows(V1_MEMBERS)
    def test_members_stay_as_they_stand(self, given, wanted):
        text = v1_config('"docker_version":"1.12.6","os":"linux","K":' + given)
        self.assertEqual(text, '{"K":%s,"docker_version":"1.12.6",%s' % (
            wanted or given, self.tail))

    def test_keys_are_sorted_by_bytes(self):
        text = v1_config('"os":"linux","\xe9":1,"b":2,"B":3,"\U0001f600":4,"\uffee":5')
        keys = list(json.loads(text, object_pairs_hook=collections.OrderedDict))
        self.assertEqual(keys, ["B", "b", "history", "os", "rootfs", "\xe9", "\uffee",
                                "\U0001f600"])

    @rows(V1_TIMES)
    def test_times(self, given, wanted):
        text = "" if given is None else '"created":' + given
        self.assertEqual(self.history(text)[0]["created"], wanted)

    @rows([['"created":5'], ['"created":true'], ['"container_config":5']])
    def test_members_of_the_wrong_type(self, given):
        with self.assertRaisesRegex(imagec.InvalidDocument, "of the wrong type"):
            v1_config(given)

    @rows(V1_STRINGS)
    def test_strings(self, given, wanted):
        self.assertIn('"author":%s}' % wanted, v1_config('"author":' + given, ""))

    @rows(V1_COMMANDS)
    def test_commands(self, given, wanted):
        found = self.history('"container_config":' + given)[0]
        self.assertEqual(found.get("created_by"), wanted)

    def test_manifest(self):
        config = imagec.ImageConfig.parse(v1_config('"os":"linux"').encode())
        blob = imagec.Descriptor("x", imagec.Digest.parse(V1_DIFFS[3]), 9)
        manifest = imagec.modern_manifest(config, [blob])
        self.assertEqual(manifest.raw, (
            b'{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.'
            b'manifest.v2+json","config":{"mediaType":"application/vnd.docker.'
            b'container.image.v1+json","size":%d,"digest":"%s"},"layers":[{'
            b'"mediaType":"x","size":9,"digest":"%s"}]}' % (
                len(config.raw), sha256(config.raw).encode(), V1_DIFFS[3].encode())))

    def test_image_id_is_the_same_everywhere(self):
        super().setUp()
        ids = set()
        for kind in ("schema1", "schema1-signed"):
            reference, image = self.serve(ARCHIVE_TARS[:1] + [None] + ARCHIVE_TARS[1:],
                                          kind=kind)
            for format in ("layers", "oci", "archive"):
                run = self.pull("--json", "--format", format, "-o",
                                self.at(kind + format), reference)
                value = json.loads(run.out.decode())
                ids.add(value["image_id"])
                self.assertEqual(value["digest"], image.digest)
        self.assertEqual(len(ids), 1)
        digest = ids.pop()
        members = self.members(self.at("schema1archive"))
        config = json.loads(members["blobs/sha256/" + digest[7:]].decode())
        self.assertEqual(config["rootfs"]["diff_ids"], image.diff_ids)
        self.assertEqual([entry.get("empty_layer") for entry in config["history"]],
                         [None, True, None, None])

    def test_throwaway_flags_missing(self):
        # Old images have none: the empty blob is then a layer as any other.
        super().setUp()
        reference, _ = self.serve([ARCHIVE_TARS[0], bytes(1024)], kind="schema1")
        self.pull("--format", "oci", "-o", self.at("out"), reference)
        self.verify(self.at("out"))


# --------------------------------------------------------------------------------------
# 6, 7  Tar, Proof
# --------------------------------------------------------------------------------------

# Tars are written here field by field: tarfile refuses to make most of these.
TAR_END = bytes(1024)
GNU_MAGIC = (257, b"ustar  \0")


def tar_header(size=0, kind=b"0", name=b"f", patches=()):
    """A ustar header; `size` may be the field itself, patches are (offset, bytes)."""
    size = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(name.ljust(100, b"\0"))
    block += b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0" + b" " * 8 + kind
    block = block.ljust(257, b"\0") + b"ustar\00000"
    block = block.ljust(512, b"\0")
    for offset, data in patches:
        block[offset:offset + len(data)] = data
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def in_blocks(data):
    """Data padded to whole blocks."""
    return data + bytes(-len(data) % 512)


def tar_member(content=b"", size=None, **header):
    """A header and its content; the header may claim another size."""
    size = len(content) if size is None else size
    return tar_header(size, **header) + in_blocks(content)


def pax_records(*pairs):
    """Pax records, each with its own length in front."""
    records = b""
    for key, value in pairs:
        text = b" %s=%s\n" % (key, value)
        length = next(n for n in itertools.count(len(text) + 1)
                      if len(b"%d" % n) + len(text) == n)
        records += b"%d%s" % (length, text)
    return records


def pax(*pairs, kind=b"x"):
    """An extended header for the next member, or with kind g for all."""
    return tar_member(pax_records(*pairs), kind=kind)


def old_sparse(extents, size, empty=0, name=b"f"):
    """An old GNU sparse file of (offset, data) pairs, so many `empty` ones before them;
    the map goes on in more blocks.
    """
    content = b"".join(data for _, data in extents)
    pairs = [(0, 0)] * empty + [(at, len(data)) for at, data in extents]
    table = b"".join(b"%011o\0%011o\0" % pair for pair in pairs)
    patches = [GNU_MAGIC, (386, table[:96]), (482, bytes([len(table) > 96])),
               (483, b"%011o\0" % size)]
    header = tar_header(len(content), b"S", name, patches)
    for at in range(96, len(table), 504):
        header += table[at:at + 504].ljust(504, b"\0") + (
            bytes([len(table) > at + 504]) + bytes(7))
    return header + in_blocks(content)


def pax_sparse(extents, size, name=b"f"):
    """A sparse file of (offset, data) pairs as GNU tar writes it in pax (1.0)."""
    content = b"".join(data for _, data in extents)
    numbers = [b"%d" % n for at, data in extents for n in (at, len(data))]
    return pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
               (b"GNU.sparse.name", name), (b"GNU.sparse.realsize", b"%d" % size)) + (
        tar_member(in_blocks(b"\n".join([b"%d" % len(extents), *numbers, b""])) + content))


SPARSE_EXTENTS = ((70000, b"middle"), (75006, b"end"))
SPARSE_CONTENT = bytes(70000) + b"middle" + bytes(5000) + b"end"
SPARSE_FILES = (  # (name, bytes): all are that content
    ("old", old_sparse(SPARSE_EXTENTS, 75009)),
    ("old, the data in one more block", old_sparse(SPARSE_EXTENTS, 75009, 4)),
    ("old, a full block", old_sparse(SPARSE_EXTENTS, 75009, 23)),
    ("old, three more", old_sparse(SPARSE_EXTENTS, 75009, 50)),
    ("pax", pax_sparse(SPARSE_EXTENTS, 75009)),
)
NOISE = bytes(random.Random(SEED).choices(range(256), k=600))
TAR_TEXT = b"hello, world\n" * 50  # 650 bytes: two blocks
A_FILE = tar_member(TAR_TEXT)

GOOD_TARS = (
    # name, bytes, size, members
    ("nothing", b"", 0, 0),
    ("an end", TAR_END, 0, 0),
    ("zeros", bytes(10240), 0, 0),
    ("zeros, not in blocks", bytes(1500), 0, 0),
    ("a file", A_FILE + TAR_END, 650, 1),
    ("files", A_FILE * 3 + TAR_END, 1950, 3),
    # Go's archive/tar takes both of these
    ("no end", A_FILE, 650, 1),
    ("half an end", A_FILE + bytes(512), 650, 1),
    # what `umoci insert` writes; docker, podman, skopeo and umoci read it
    ("no padding", A_FILE[:512 + 650], 650, 1),
    ("half the padding", A_FILE[:-1], 650, 1),
    ("padded", A_FILE + bytes(10240 - len(A_FILE)), 650, 1),
    ("an empty file", tar_member() + TAR_END, 0, 1),
    ("old type", tar_member(TAR_TEXT, kind=b"\0") + TAR_END, 650, 1),
    ("contiguous", tar_member(TAR_TEXT, kind=b"7") + TAR_END, 650, 1),
    ("size without NUL", tar_header(b"000000001212") + in_blocks(TAR_TEXT), 650, 1),
    ("size with blanks", tar_header(b"       1212 ") + in_blocks(TAR_TEXT), 650, 1),
    ("blank size", tar_header(b" " * 12), 0, 1),
    ("NULs for a size", tar_header(bytes(12), kind=b"5"), 0, 1),
    ("base-256 size",
     tar_header(b"\x80" + bytes(9) + b"\2\x8a") + in_blocks(TAR_TEXT), 650, 1),
    ("old directory", tar_header(650, kind=b"\0", name=b"d/") + A_FILE, 650, 2),
    # what the whole name says, not what a short field keeps of it
    ("old type, pax name", pax((b"path", b"d/f"))
     + tar_member(TAR_TEXT, kind=b"\0", name=b"d/"), 650, 1),
    ("old type, long name", tar_member(b"d/f\0", kind=b"L")
     + tar_member(TAR_TEXT, kind=b"\0", name=b"d/"), 650, 1),
    ("old directory, pax name", pax((b"path", b"d/"))
     + tar_header(650, kind=b"\0") + A_FILE, 650, 2),
    ("old directory, long name", tar_member(b"d/\0", kind=b"L")
     + tar_header(650, kind=b"\0") + A_FILE, 650, 2),
    ("pax size", pax((b"size", b"650")) + tar_header(0) + in_blocks(TAR_TEXT), 650, 1),
    ("pax size over base-256",
     pax((b"size", b"650")) + tar_header(b"\x80" + b"\x7f" * 11) + in_blocks(TAR_TEXT),
     650, 1),
    ("pax size once", pax((b"size", b"650")) + tar_header(0) + in_blocks(TAR_TEXT)
     + tar_member(b"x"), 651, 2),
    ("pax size twice", pax((b"size", b"9"), (b"size", b"650")) + A_FILE, 650, 1),
    ("pax value with odd bytes", pax((b"path", b"a=\n\0\xff")) + A_FILE, 650, 1),
    ("pax of Solaris", pax((b"path", b"x"), kind=b"X") + A_FILE, 650, 1),
    ("empty pax", tar_member(kind=b"x") + A_FILE, 650, 1),
    ("global pax", pax((b"comment", b"0" * 40), kind=b"g") + A_FILE * 2, 1300, 2),
    ("GNU long name", tar_member(b"n" * 600 + b"\0", kind=b"L") + A_FILE, 650, 1),
    ("GNU long link", tar_member(b"n" * 600 + b"\0", kind=b"K")
     + tar_header(kind=b"2") + A_FILE, 650, 2),
    ("GNU long name and link",
     tar_member(b"n\0", kind=b"L") + tar_member(b"k\0", kind=b"K") + A_FILE, 650, 1),
    ("old sparse, a hole", old_sparse((), 1 << 30, 46) + A_FILE, (1 << 30) + 650, 2),
    # T27: bytes after the end are hashed, and are no members
    ("second tar", A_FILE + TAR_END + A_FILE + TAR_END, 650, 1),
    ("junk after the end", A_FILE + TAR_END + b"junk", 650, 1),
) + tuple(  # POSIX: nothing follows these, whatever size they claim
    ("type %d with a size" % kind, tar_header(650, kind=b"%d" % kind) + A_FILE, 650, 2)
    for kind in range(1, 7)
) + tuple((name, data + A_FILE, 75659, 2) for name, data in SPARSE_FILES)

# Rows that tarfile cannot vouch for: it reads no empty file, gives up at an empty pax
# header, tells an old directory by its short name, and wants padding.
NOT_FOR_TARFILE = ("nothing", "empty pax", "old type, pax name", "old type, long name",
                   "old directory, pax name", "old directory, long name", "no padding",
                   "half the padding")


def with_flipped_checksum(block):
    """A header block whose checksum is off by one."""
    return block[:154] + bytes([block[154] ^ 1]) + block[155:]


BAD_TARS = (
    # name, bytes, words
    ("text", b"not a tar at all", "cut short"),
    ("more text", b"not a tar at all " * 40, "not a valid tar after 0 members"),
    # T30
    ("XML", b"<Error><Code>NoSuchKey</Code></Error>".ljust(600), "after 0 members"),
    ("a gzip inside", gzip_bytes(NOISE), "after 0 members"),
    # T29: tarfile ends here without a word
    ("second checksum", A_FILE + with_flipped_checksum(A_FILE[:512]) + A_FILE[512:],
     "after 1 members"),
    ("second header", A_FILE + b"x" * 512, "after 1 members"),
    ("shifted by one", A_FILE + b"\0" + A_FILE, "after 1 members"),
    ("data after a zero block", A_FILE + bytes(512) + A_FILE, "after a zero block"),
    ("half a header", A_FILE + A_FILE[:300], "cut short"),
    ("one byte of zeros", A_FILE + b"\0", "cut short"),
    ("cut in content", A_FILE[:-600], "cut short"),
    ("a byte less than there are", A_FILE[:512 + 649], "cut short"),
    ("header alone", A_FILE[:512], "cut short"),
    ("cut in a long name", tar_member(b"n" * 600, kind=b"L")[:-1], "cut short"),
    ("cut in a sparse map", old_sparse((), 9, 46)[:-512], "cut short"),
    ("size too large", tar_header(1 << 30) + A_FILE, "cut short"),
    ("size too small", tar_header(5) + in_blocks(TAR_TEXT) + A_FILE, "after 1 members"),
    # T153
    ("negative base-256 size", tar_header(b"\xff" * 12) + A_FILE, "negative size"),
    ("least base-256 size", tar_header(b"\xff" + bytes(11)) + A_FILE, "negative size"),
    ("negative octal size", tar_header(b"-0000000010\0") + A_FILE, "after 0 members"),
    ("negative size of a link", tar_header(b"\xff" * 12, kind=b"1"), "negative size"),
    ("negative size of pax", tar_header(b"\xff" * 12, kind=b"x"), "negative size"),
    ("negative sparse size", tar_header(0, kind=b"S", patches=[
        GNU_MAGIC, (483, b"\xff" * 12)]), "negative size"),
    ("pax size too large", pax((b"size", b"9" * 10)) + A_FILE, "cut short"),
    ("pax realsize", pax((b"GNU.sparse.realsize", b"-1")) + A_FILE, "is not a number"),
    ("global size", pax((b"size", b"5"), kind=b"g") + A_FILE, "renames every member"),
    ("global path", pax((b"path", b"x"), kind=b"g") + A_FILE, "renames every member"),
    ("global link", pax((b"linkpath", b"x"), kind=b"g") + A_FILE, "renames every"),
    # what GNU tar, bsdtar and Go's archive/tar do not read alike
    ("base-256 checksum", A_FILE[:148] + b"\x80" + (
        sum(A_FILE[:148]) + 256 + sum(A_FILE[156:512])).to_bytes(7, "big")
     + A_FILE[156:], "after 0 members"),
    ("sparse, but ustar", tar_header(0, kind=b"S"), "after 0 members"),
    ("sparse map that ends early", tar_header(0, kind=b"S", patches=[
        GNU_MAGIC, (386, b"%011o\0" * 2 % (0, 0)), (482, b"\1"), (483, b"%011o\0" % 9)])
     + bytes(512), "after 1 members"),
    ("two sparse maps", pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"))
     + old_sparse([(0, TAR_TEXT)], 650), "two sparse maps"),
    ("pax sparse 1.1", pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"1"))
     + A_FILE, "unknown kind"),
    ("pax sparse, no map", pax((b"GNU.sparse.realsize", b"3")) + A_FILE, "unknown kind"),
    ("pax sparse 0.0", pax((b"GNU.sparse.offset", b"0")) + A_FILE, "unknown kind"),
    ("pax sparse 0.1", pax((b"GNU.sparse.map", b"0,650")) + A_FILE, "unknown kind"),
    ("two names", tar_member(b"n\0", kind=b"L") + pax((b"path", b"x")) + A_FILE,
     "after 0 members"),
    ("long name of nothing", tar_member(kind=b"L") + A_FILE, "readers disagree"),
    ("long name of NULs", tar_member(bytes(9), kind=b"L") + A_FILE, "readers disagree"),
    ("long link of nothing", tar_member(kind=b"K") + tar_header(kind=b"2"), "disagree"),
    ("long link that begins with NUL", tar_member(b"\0x\0", kind=b"K")
     + tar_header(kind=b"2"), "readers disagree"),
    ("two targets", pax((b"linkpath", b"x")) + tar_member(b"n\0", kind=b"K")
     + tar_header(kind=b"2"), "after 0 members"),
    ("empty pax path", pax((b"path", b"")) + A_FILE, "after 0 members"),
    ("empty pax linkpath", pax((b"linkpath", b"")) + A_FILE, "after 0 members"),
    ("NUL in a pax key", pax((b"SCHILY.xattr.user.a\0b", b"v")) + A_FILE,
     "after 0 members"),
    # T158: an extension of nothing
    ("pax at the end", A_FILE + pax((b"path", b"x")), "cut short"),
    ("long name at the end", A_FILE + tar_member(b"n\0", kind=b"L"), "cut short"),
    ("pax before the end", A_FILE + pax((b"path", b"x")) + TAR_END, "after 1 members"),
    ("long name before the end", A_FILE + tar_member(b"n\0", kind=b"L") + TAR_END,
     "after 1 members"),
    # Go takes the last, tarfile the first
    ("two pax headers", pax((b"size", b"650")) + pax((b"size", b"900")) + A_FILE,
     "after 0 members"),
    ("sparse map endless", pax(
        (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.realsize", b"9")) + tar_member(b"999999\n".ljust(512, b"1")),
     "does not end"),
    ("sparse map of rubbish", SPARSE_FILES[1][1].replace(
        b"%011o\0" % 75006, b"9" * 12), "after 1 members"),
) + tuple(  # T02: what int() takes and no other tar does
    ("size %r" % size, tar_header(size) + bytes(512), "after 0 members") for size in (
        b"00000000018\0", b"0000000000a\0", b"0000000_001\0", b"+0000000001\0",
        b"0o000000001\0", b"\0" b"0000000001\0")  # Python reads 0, Go's archive/tar 1
) + tuple(
    ("pax size %r" % size, pax((b"size", size)) + A_FILE, "is not a number")
    for size in (b"-1", b"+5", b"1_0", b" 650", b"", b"650\0", b"6.5e2", b"9" * 19,
                 "\u0661".encode("utf-8"))
) + tuple(
    ("pax %r" % data[:20], tar_member(data, kind=b"x") + A_FILE, "pax")
    for data in (b"4 a\n", b"a=b\n", b"0 a=b\n", b"1 a=b\n", b"-6 a=b\n", b"5 a=b\n",
                 b"5 a=b6 c=d\n", b"9 a=b\n", b"9" * 400 + b" a=\n", b"6 a=b\njunk",
                 bytes(10))
) + tuple(  # T152
    ("sparse map %r" % numbers, pax(
        (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.realsize", b"9")) + tar_member(in_blocks(numbers) + b"bad"), words)
    for numbers, words in (
        (b"2\n5\n2\n0\n1\n", "makes no sense"), (b"1\n8\n3\n", "makes no sense"),
        (b"1\n9\n0\n", "does not fit"), (b"1\n0\n2\n", "does not fit"),
        (b"1\n0\n-3\n", "pax"), (b"1\n0\n4\n", "does not fit"), (b"\n", "pax")))

ENTRIES = (
    # name, bytes, what it must say
    ("ustar", raw_member(b"f", tail=b"dir"), dict(path=b"dir/f")),
    ("no magic", raw_member(b"f", tail=b"dir", magic=bytes(8)), dict(path=b"f")),
    # GNU tar keeps times there with --incremental.
    ("GNU", raw_member(b"f", tail=b"14000000000\0" * 2, magic=b"ustar  \0"),
     dict(path=b"f")),
    # Go before 1.8, where a number needed base-256.
    ("Go", raw_member(b"f", tail=b"a/dir", magic=b"ustar  \0",
                      uid=b"\x80" + bytes(6) + b"\5"), dict(path=b"a/dir/f", uid=5)),
    ("Go, not ASCII", raw_member(b"f", tail=b"d\xffr", magic=b"ustar  \0"),
     dict(path=b"f")),
    ("long names", tar_member(b"n" * 150 + b"\0", kind=b"L")
     + tar_member(b"l" * 150 + b"\0", kind=b"K") + tar_header(kind=b"2", name=b"n" * 99),
     dict(path=b"n" * 150, link=b"l" * 150)),
) + tuple(("mtime " + text.decode(), raw_member(b"f", pax=[(b"mtime", text)]),
           dict(mtime=mtime)) for text, mtime in (
    (b"0", 0), (b"1.5", 15 * 10 ** 8), (b"1.0000000019", 10 ** 9 + 1),
    (b"-1", -10 ** 9), (b"-1.5", -15 * 10 ** 8), (b"-0.25", -25 * 10 ** 7),
    (b"inf", 0), (b"1e9", 0), (b"", 0), (b"1099511627776", 0),
    (b"-1099511627775.5", -1099511627775500000000)))

# T67
TAR_BOMBS = tuple(  # what each asks for is over the limit of 1 MiB
    (kind, tar_header(size, kind=kind)) for kind in (b"L", b"K", b"x", b"X", b"g")
    for size in ((1 << 20) + 1, b"%012o" % (8 << 30)))


def pieces(data, sizes):
    """Data cut into pieces of those sizes, over and over."""
    start = 0
    for size in sizes:
        if start >= len(data):
            return
        yield data[start:start + size]
        start += size


def feedings(data):
    """Ways to hand data over: whole, by the byte if it is short, in random pieces."""
    yield [data]
    if len(data) <= 2048:
        yield pieces(data, itertools.repeat(1))
    choices = random.Random(SEED)
    for most in (7, 700, 70000):
        if most <= len(data) <= 1000 * most:
            yield pieces(data, iter(lambda: choices.randrange(most + 1), None))


def walked(parts):
    """A Tar of which all members have been drawn."""
    tar = imagec.Tar(parts, "layer")
    for _ in tar:
        pass
    return tar


def unpacked(parts, **options):
    """What a blob unpacks to."""
    return imagec.unpack(iter(parts), "layer 1", **options)


def peak_memory(call):
    """The most bytes that were allocated at once while a call ran."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class ProvedTest(TableCase):
    """A blob is its digest and its size, not a byte less or more."""

    def _proved(self, data, parts, size=None):
        """What is yielded of the parts, which should be the data."""
        return b"".join(imagec.proved(parts, imagec.Digest.of(data), size, "blob"))

    @rows((size,) for size in [0] + [1 << power for power in range(17)])
    def test_each_size(self, size):
        data = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
        for chunk in {1, 3, 4096, max(size, 1)}:
            if chunk * 4096 < size:
                continue
            for told in (size, None):
                parts = pieces(data, itertools.repeat(chunk))
                self.assertEqual(self._proved(data, parts, told), data)
            error = self.refused(
                imagec.SizeMismatch, "blob: expected %d bytes, got %d" % (size + 1, size),
                self._proved, data, pieces(data, itertools.repeat(chunk)), size + 1)
            self.assertEqual((error.expected, error.actual), (size + 1, size))
            # T24: refused by the piece that goes over, not at the end
            drawn = []
            parts = pieces(data + b"x" * 100000, itertools.repeat(chunk))
            self.refused(imagec.SizeMismatch, "got at least", self._proved, data,
                         (drawn.append(part) or part for part in parts), size)
            self.assertTrue(size < sum(map(len, drawn)) <= size + chunk)

    # T22: schema1 gives no sizes, the digest has to tell
    @rows(itertools.product(("sha256", "sha384", "sha512"),
                            ((b"wrong", None), (b"wrong", 5), (b"righ", None))))
    def test_wrong_digest(self, algorithm, row):
        right, wrong = (imagec.Digest.of(one, algorithm) for one in (b"right", row[0]))
        error = self.refused(
            imagec.DigestMismatch, "blob %s: expected digest %s, got %s" % (
                right, right, wrong), list, imagec.proved(row[:1], right, row[1]))
        self.assertEqual((error.expected, error.actual), (right, wrong))
        self.assertEqual(list(imagec.proved([b"right"], right, 5)), [b"right"])

    def test_wrong_diff_id(self):
        for parts in feedings(gzip_bytes(LAYER_TAR)):
            parts = list(parts)
            blob = imagec.Descriptor("", imagec.Digest.of(b"".join(parts)), None)
            for diff_id in (imagec.Digest.of(LAYER_TAR), imagec.Digest.of(b"x")):
                found = outcome(
                    imagec.prove, (part for part in parts), blob,
                    lambda chunks: unpacked(chunks, diff_id=diff_id))
                if diff_id == imagec.Digest.of(LAYER_TAR):
                    self.assertEqual(found.diff_id, diff_id)
                else:
                    self.assertIsInstance(found, imagec.DigestMismatch)


class TarTest(TableCase):
    """The sizes in a tar add up, or the tar is refused."""

    @rows(GOOD_TARS)
    def test_good_tars(self, name, data, size, members):
        for parts in feedings(data):
            walker = walked(parts)
            self.assertEqual((walker.size, walker.members), (size, members))

    @rows([row for row in GOOD_TARS if row[0] not in NOT_FOR_TARFILE])
    def test_tarfile_agrees(self, _name, data, size, members):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            infos = tar.getmembers()
        self.assertEqual(sum(info.size for info in infos if info.isreg()), size)
        self.assertEqual(len(infos), members)

    @rows(itertools.product((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT), (0, 90, 290),
                            (0, 1 << 40), (0, 1, 511, 512, 513, 5000)))
    def test_tars_of_tarfile(self, kind, length, uid, size):
        out, name = io.BytesIO(), ("a/\u00e9\u96ea\udce9 " * 50)[:length] + "n"
        with tarfile.open(fileobj=out, mode="w", format=kind, encoding="utf-8",
                          errors="surrogateescape") as tar:
            for number, kind in enumerate((
                    tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE,
                    tarfile.SYMTYPE)):
                info = tarfile.TarInfo(name)
                info.linkname, info.uid, info.type = name, uid, kind
                info.size = size * (number < 2)
                tar.addfile(info, io.BytesIO(bytes(info.size)))
        walker = walked(pieces(out.getvalue(), itertools.repeat(700)))
        self.assertEqual((walker.size, walker.members), (2 * size, 5))

    @rows(BAD_TARS)
    def test_bad_tars(self, name, data, words):
        for parts in feedings(data):
            self.refused(imagec.InvalidDocument, words, walked, parts)

    @rows(TAR_BOMBS)
    def test_bombs(self, name, data):
        self.refused(imagec.LimitExceeded, "limit of 1048576", walked, [data])

    def test_pax_headers_take_no_memory(self):
        # T67: a member may not be led by headers without end
        headers = (pax((b"key%d" % number, b"v" * 1000000)) for number in range(24))
        self.assertLess(peak_memory(lambda: outcome(walked, headers)), 8 << 20)

    def test_data_need_not_be_drawn(self):
        content = os.urandom(5000)
        tar = tar_member(content) * 3 + TAR_END
        for drawn in (0, 1, 700, 5000):
            for parts in feedings(tar):
                walker = imagec.Tar(parts, "layer")
                for entry, data in walker:
                    self.assertEqual(tar[walker.offset:][:entry.size], content)
                    got = b""
                    while len(got) < drawn:
                        got += bytes(next(data))
                    self.assertTrue(content.startswith(got))
                self.assertEqual((walker.members, walker.offset), (3, len(tar)))

    @rows(SPARSE_FILES)
    def test_sparse_files_are_data_and_holes(self, _, data):
        for parts in feedings(data + A_FILE):
            (entry, spread), *_ = [(entry, list(spread))
                                   for entry, spread in imagec.Tar(parts, "layer")]
            self.assertEqual((entry.path, entry.size), (b"f", 75009))
            self.assertNotIn(0, spread)
            self.assertEqual(b"".join(map(bytes, spread)), SPARSE_CONTENT)

    @rows(ENTRIES)
    def test_entries(self, _, data, wanted):
        (entry, _), = imagec.Tar([data], "layer")
        self.assertEqual({key: getattr(entry, key) for key in wanted}, wanted)

    def test_many_pax_records(self):
        # T67: a copy of what is left for each took seconds
        data = tar_member(b"6 a=b\n" * 130000, kind=b"x") + A_FILE
        with cpu_within(1):
            self.assertRaises(imagec.LimitExceeded, walked, [data])


def zstd_frame(data):
    """Data as a zstd frame of stored blocks (RFC 8878, 3.1.1)."""
    blocks = [data[i:i + 65536] for i in range(0, len(data), 65536)] or [b""]
    frame = b"\x28\xb5\x2f\xfd" + b"\x00\x38"  # no checksum, a window of 128 KiB
    for number, block in enumerate(blocks, 1):
        head = len(block) << 3 | (number == len(blocks))
        frame += struct.pack("<I", head)[:3] + block
    return frame


def named_gzip(data):
    """A gzip with the optional header fields."""
    out = io.BytesIO()
    with gzip.GzipFile("name.tar", "wb", fileobj=out, mtime=1) as stream:
        stream.write(data)
    return out.getvalue()


def greedy_xz(data):
    """An xz whose header asks for a dictionary of 1.5 GiB."""
    blob = bytearray(lzma.compress(data))
    # After the stream header of 12 bytes come size, flags, filter and its properties.
    end = 12 + (blob[12] + 1) * 4
    blob[16] = 37
    blob[end - 4:end] = struct.pack("<I", zlib.crc32(bytes(blob[12:end - 4])))
    return bytes(blob)


LAYER_TAR = tar_bytes([("etc", None), ("etc/motd", TAR_TEXT), ("bin", NOISE[:200])])
HEAD_TAR, TAIL_TAR = LAYER_TAR[:700], LAYER_TAR[700:]
EMPTY_GZIP = gzip_bytes(b"")
SKIPPABLE_FRAME = b"\x5f\x2a\x4d\x18" + b"\3\0\0\0" + b"xyz"

# Each unpacks to LAYER_TAR.
LAYER_BLOBS = (
    ("tar", LAYER_TAR),
    ("gzip", gzip_bytes(LAYER_TAR)),
    ("gzip, stored", gzip_bytes(LAYER_TAR, 0)),
    ("gzip, named", named_gzip(LAYER_TAR)),
    ("gzip, members", gzip_bytes(HEAD_TAR) + gzip_bytes(TAIL_TAR)),
    ("gzip, empty members",
     EMPTY_GZIP + gzip_bytes(HEAD_TAR) + EMPTY_GZIP * 3 + gzip_bytes(TAIL_TAR)
     + EMPTY_GZIP),
    ("gzip, padded", gzip_bytes(LAYER_TAR) + bytes(700)),
    ("gzip, padded between", gzip_bytes(HEAD_TAR) + bytes(5) + gzip_bytes(TAIL_TAR)),
    ("bzip2", bz2.compress(LAYER_TAR)),
    ("bzip2, streams", bz2.compress(HEAD_TAR) + bz2.compress(TAIL_TAR)),
    ("xz", lzma.compress(LAYER_TAR)),
    ("xz, streams", lzma.compress(HEAD_TAR) + lzma.compress(TAIL_TAR)),
    ("xz, padded", lzma.compress(LAYER_TAR) + bytes(8)),
)
ZSTD_BLOBS = (
    ("zstd", zstd_frame(LAYER_TAR)),
    ("zstd, frames", zstd_frame(HEAD_TAR) + zstd_frame(b"") + zstd_frame(TAIL_TAR)),
    ("zstd, skippable", SKIPPABLE_FRAME + zstd_frame(LAYER_TAR) + SKIPPABLE_FRAME),
)
GOOD_LAYERS = LAYER_BLOBS + (ZSTD_BLOBS if CAN_ZSTD else ())

BAD_LAYERS = (
    # name, blob, words
    # T27: junk that one tool ignores and another reads
    ("gzip, zeros, junk", gzip_bytes(LAYER_TAR) + bytes(9) + b"junk", "corrupt gzip"),
    ("gzip, a byte of junk", gzip_bytes(LAYER_TAR) + b"\x1f", "truncated gzip data"),
    ("gzip, tar", gzip_bytes(HEAD_TAR) + TAIL_TAR, "corrupt gzip data"),
    ("gzip, bzip2", gzip_bytes(HEAD_TAR) + bz2.compress(TAIL_TAR), "corrupt gzip data"),
    ("bzip2, zeros", bz2.compress(LAYER_TAR) + bytes(8), "corrupt bzip2 data"),
    # T28
    ("gzip, no trailer", gzip_bytes(LAYER_TAR)[:-8], "truncated gzip data"),
    ("gzip, half", gzip_bytes(LAYER_TAR)[:100], "truncated gzip data"),
    ("gzip, second cut", gzip_bytes(HEAD_TAR) + gzip_bytes(TAIL_TAR)[:-1], "truncated"),
    ("gzip, crc", gzip_bytes(LAYER_TAR)[:-8] + b"\0" * 8, "corrupt gzip data"),
    ("gzip, length", gzip_bytes(LAYER_TAR)[:-4] + b"\0" * 4, "corrupt gzip data"),
    ("xz, greedy", greedy_xz(LAYER_TAR), "corrupt xz data"),  # T51
    ("gzip of text", gzip_bytes(b"x" * 600), "not a valid tar after 0 members"),
    ("gzip of gzip", gzip_bytes(gzip_bytes(NOISE)), "after 0 members"),  # T50
    ("gzip of half a tar", gzip_bytes(LAYER_TAR[:700]), "the tar in it is cut short"),
    ("XML", b'<?xml version="1.0"?><Error/>', "cut short"),  # T30
    ("one byte", b"x", "cut short"),
) + tuple(row for name, magic, pack in (
    ("gzip", b"\x1f\x8b\x08", gzip_bytes), ("bzip2", b"BZh", bz2.compress),
    ("xz", b"\xfd7zXZ\0", lzma.compress)) for row in (
        (name + ", junk", pack(LAYER_TAR) + b"junk" * 9, "corrupt %s data" % name),
        (name + ", short", pack(LAYER_TAR)[:-1], "truncated %s data" % name),
        (name + ", magic alone", magic, "truncated %s data" % name),
        (name + ", data", pack(LAYER_TAR)[:20] + b"\xff" * 400, " %s data" % name)))
BAD_ZSTD_LAYERS = (
    ("zstd, junk", zstd_frame(LAYER_TAR) + b"junkjunk", "corrupt zstd data"),
    ("zstd, zeros", zstd_frame(LAYER_TAR) + bytes(8), "corrupt zstd data"),
    ("zstd, a byte short", zstd_frame(LAYER_TAR)[:-1], " zstd data"),
    ("zstd, half", zstd_frame(LAYER_TAR)[:100], " zstd data"),
    ("zstd, magic alone", b"\x28\xb5\x2f\xfd", " zstd data"),
    ("zstd, first frame of two", zstd_frame(HEAD_TAR), "the tar in it is cut short"),
    ("zstd, bad block", zstd_frame(LAYER_TAR)[:6] + b"\xff" * 9, "corrupt zstd data"),
    ("zstd of text", zstd_frame(b"x" * 600), "not a valid tar after 0 members"),
)

EMPTY_LAYERS = (
    # name, blob, bytes of tar
    ("docker's", EMPTY_LAYER, 1024),
    ("tar", TAR_END, 1024),
    ("gzip", gzip_bytes(TAR_END), 1024),
    ("no bytes", b"", 0),  # docker takes it for an empty tar
)


class UnpackTest(TableCase):
    """A layer unpacks to one diffID, however its bytes come."""

    def good(self, _name, blob):
        expected = (imagec.Digest.of(LAYER_TAR), 850, len(LAYER_TAR))
        for parts in feedings(blob):
            self.assertEqual(unpacked(parts), expected)

    test_layers = rows(LAYER_BLOBS)(good)
    test_zstd_layers = needs_zstd(rows(ZSTD_BLOBS)(good))

    def bad(self, _name, blob, words):
        for parts in feedings(blob):
            error = self.refused(imagec.InvalidDocument, words, unpacked, parts)
            self.assertIn("layer 1", str(error))

    test_bad_layers = rows(BAD_LAYERS)(bad)
    test_bad_zstd_layers = needs_zstd(rows(BAD_ZSTD_LAYERS)(bad))

    @rows(EMPTY_LAYERS)
    def test_empty_layers(self, name, blob, count):
        for parts in [*feedings(blob), [], [b"", b""]][:None if count == 0 else -2]:
            self.assertEqual(unpacked(parts), (imagec.Digest.of(bytes(count)), 0, count))

    def test_edges_of_the_buffers(self):
        # A decompressor gives no more than a chunk at once, and may end just there.
        for size in [imagec.CHUNK * times + extra for times in (1, 2)
                     for extra in (-512, 0, 512)]:
            tar = tar_member(bytes(size - 512))
            expected = (imagec.Digest.of(tar), size - 512, size)
            for pack in (bytes, gzip_bytes, bz2.compress, lzma.compress):
                with self.subTest(size, pack=pack.__name__):
                    self.assertEqual(unpacked([pack(tar)]), expected)

    def test_faults_far_in(self):
        size = 4 * imagec.CHUNK
        data = os.urandom(size)
        tar = tar_header(size) + data + b"\1" * 512
        cut = gzip_bytes(tar_header(size) + data + bytes(1024))[:-imagec.CHUNK]
        for blob, words in ((tar, "not a valid tar"), (gzip_bytes(tar), "not a valid"),
                            (cut, "truncated gzip")):
            with self.subTest(words=words):
                self.refused(imagec.InvalidDocument, words, unpacked, [
                    blob[at:at + 65536] for at in range(0, len(blob), 65536)])

    def test_limit(self):
        length = len(LAYER_TAR)
        for name, blob in GOOD_LAYERS:
            with self.subTest(name):
                self.assertEqual(unpacked([blob], limit=length).bytes, length)
                error = self.refused(imagec.TooLarge, "layer 1 unpacks to more than the",
                                     lambda: unpacked([blob], limit=length - 1))
                self.assertIn("%d bytes" % (length - 1), str(error))

    @rows(itertools.product([bytes] + [zstd_frame] * CAN_ZSTD, (1000, 4 << 20)))
    def test_the_limit_stops_at_once(self, packed, limit):
        drawn = []
        blob = packed(bytes(1 << 20)) * 64  # all of it behind the tar's end
        with self.assertRaises(imagec.LimitExceeded):
            imagec.prove((drawn.append(part) or part
                          for part in pieces(blob, itertools.repeat(1 << 20))),
                         imagec.Descriptor("", imagec.Digest.of(blob), len(blob)),
                         lambda chunks: unpacked(chunks, limit=limit))
        self.assertLess(len(drawn), 32)

    @rows([(bytes,), (gzip_bytes,), (b"\x1f\x8b\x08junkjunkjunk".__add__,),
           (lambda data: b"\x1f\x8b\x08junk" + gzip_bytes(LAYER_TAR),)]
          + [(zstd_frame,)] * CAN_ZSTD)
    def test_a_wrong_digest_is_told_before_what_it_causes(self, packed):
        blob = packed(b"\1" * 512 + noise(4 << 20))
        self.refused(imagec.DigestMismatch, "", lambda: imagec.prove(
            pieces(blob, itertools.repeat(65536)), imagec.Descriptor(
                "", imagec.Digest.of(b""), None), unpacked))

    def test_a_bomb_takes_no_memory(self):
        # T50: a thousandfold
        tar = tar_header(16 << 20) + bytes(16 << 20)
        blob = gzip_bytes(tar)
        self.assertGreater(len(tar), 900 * len(blob))
        expected = (imagec.Digest.of(tar), 16 << 20, len(tar))
        del tar
        found = []
        peak = peak_memory(lambda: found.append(unpacked([blob])))
        self.assertEqual(found, [expected])
        self.assertLess(peak, 8 << 20)

    def test_empty_members_take_no_time(self):
        # T66: 100000 of them are unpacked; the bytes looked at grow with the blob only
        looked_at = []
        decompress = imagec._Gzip.decompress

        def counted(member, data, limit):
            looked_at[-1] += len(data)
            return decompress(member, data, limit)

        with mock.patch.object(imagec._Gzip, "decompress", counted):
            for count in (10000, 20000):
                looked_at.append(0)
                self.assertEqual(unpacked([EMPTY_GZIP * count]).bytes, 0)
        self.assertLess(looked_at[1], 2.5 * looked_at[0])

    @rows([(None,), ("zstd",)])  # not one that is relative: Windows looks where we are
    def test_without_zstd(self, program):
        with mock.patch("shutil.which", return_value=program), \
                mock.patch.dict(sys.modules, compression=None):
            for name, blob in ZSTD_BLOBS:
                for parts in feedings(blob):
                    self.refused(imagec.Unsupported, "layer 1 is compressed with zstd",
                                 unpacked, parts)

    def test_without_a_codec(self):
        # Pythons are built without them where the libraries were missing.
        for name, blob in (("bz2", bz2.compress(LAYER_TAR)),
                           ("lzma", lzma.compress(LAYER_TAR))):
            with self.subTest(name), mock.patch.dict(sys.modules, {name: None}):
                self.refused(imagec.Unsupported, "layer 1", unpacked, [blob])

    @rows(itertools.product(
        GOOD_LAYERS, (0, imagec.CHUNK),
        (imagec.Cancelled("no"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt())))
    def test_what_ends_the_source_comes_out(self, layer, more, end):
        def broken_off():
            yield layer[1][:-100]
            yield bytes(more)
            raise end

        threads = threading.active_count()
        with self.assertRaises(type(end)):
            imagec.prove(broken_off(), imagec.Descriptor(
                "", imagec.Digest.of(b""), None), unpacked)
        self.assertLessEqual(threading.active_count(), threads)

    def test_each_piece_asks_whether_to_go_on(self):
        # T51: a few kilobytes of zeros are unpacked for minutes
        tar = tar_header(32 << 20) + bytes(32 << 20)
        blobs = [bz2.compress(tar), lzma.compress(tar), gzip_bytes(tar)]
        ends = (KeyboardInterrupt(), imagec.Timeout("late"), imagec.Cancelled("no"))
        for blob, end in itertools.product(blobs, ends):
            with self.subTest(blob[:4], end=type(end)):
                asked = []

                def check():
                    asked.append(None)
                    if len(asked) > 3:
                        raise end

                with self.assertRaises(type(end)):
                    unpacked([blob], check=check)
                self.assertEqual(len(asked), 4)


# --------------------------------------------------------------------------------------
# 8  Credentials
# --------------------------------------------------------------------------------------

#: (name, variable, its value below the root, the file it leads to), in order
FIELD_SOURCES = (
    ("DOCKER_CONFIG", "DOCKER_CONFIG", "docker", "docker/config.json"),
    ("docker's home", None, None, "home/.docker/config.json"),
    ("podman's runtime", "XDG_RUNTIME_DIR", "run", "run/containers/auth.json"),
    ("podman's config", "XDG_CONFIG_HOME", "xdg", "xdg/containers/auth.json"),
    ("podman's home", None, None, "home/.config/containers/auth.json"),
    ("dockercfg", None, None, "home/.dockercfg"),
)
_FIELD_NESTED = ("r.test", "r.test/a", "r.test/a/b")

#: (keys of auths, host, repository, the key that wins or None)
FIELD_KEYS = (
    (_FIELD_NESTED, "r.test", "a/b", "r.test/a/b"),
    (_FIELD_NESTED, "r.test", "a/b/c", "r.test/a/b"),
    (_FIELD_NESTED, "r.test", "a/bc", "r.test/a"),
    (_FIELD_NESTED, "r.test", "ab", "r.test"),
    (_FIELD_NESTED, "r.test", "", "r.test"),
    (("r.test/a",), "r.test", "b", None),
    (("r.test/a",), "r.test", "ab", None),
    (("r.test/a/b",), "r.test", "a", None),
    (("r.test:5000",), "r.test:5000", "a", "r.test:5000"),
    (("r.test:5000/a",), "r.test:5000", "a/b", "r.test:5000/a"),
    # URLs, as docker login once wrote them
    (("https://r.test/v2/", "r.test"), "r.test", "a", "r.test"),
    # what docker takes for a host: ConvertToHostname
    (("r.test/v2/", "r.test/a"), "r.test", "b", "r.test/v2/"),
    (("r.test/v2/", "r.test/a"), "r.test", "a", "r.test/a"),
    (("docker.io/",), "docker.io", "library/alpine", "docker.io/"),
    (("/", "", "https://"), "r.test", "a", None),
    # Docker Hub and its names
    ((FIELD_HUB,), "docker.io", "library/alpine", FIELD_HUB),
    ((FIELD_HUB,), "index.docker.io", "library/alpine", FIELD_HUB),
    ((FIELD_HUB,), "registry-1.docker.io", "library/alpine", FIELD_HUB),
    (("docker.io",), "registry-1.docker.io", "library/alpine", "docker.io"),
    (("index.docker.io",), "docker.io", "library/alpine", "index.docker.io"),
    (("registry-1.docker.io",), "docker.io", "a/b", "registry-1.docker.io"),
    (("docker.io/library", FIELD_HUB), "docker.io", "library/a", "docker.io/library"),
    (("docker.io/library", FIELD_HUB), "docker.io", "team/a", FIELD_HUB),
    (("https://docker.io", FIELD_HUB), "docker.io", "a", FIELD_HUB),
    ((FIELD_HUB, "docker.io"), "r.test", "a", None),
    ((FIELD_HUB, "docker.io"), "docker.io.evil.test", "a", None),
    ((FIELD_HUB, "docker.io"), "auth.docker.io", "a", None),
    (("r.test", ""), "docker.io", "library/a", None),
    (("https://index.docker.io.evil.test/v1/",), "docker.io", "library/a", None),
) + tuple(((key,), host, "a", key if right else None) for right, key, hosts in (
    (True, "https://r.test", "r.test"), (True, "http://r.test/v1/", "r.test"),
    (True, "https://r.test:5000/v2/", "r.test:5000"), (True, "r.test/", "r.test"),
    (True, "r.test:5000/v1/", "r.test:5000"), (False, "r.test/v2", "r.test"),
    (False, "r.test/v3/", "r.test"), (False, "r.test//", "r.test"),
    # T81: a secret is for the host its key names
    (False, "r.test", "r.test.evil.test evilr.test sub.r.test r.test:5000"),
    (False, "https://r.test", "r.test.evil.test"), (False, "r.test/", "r.test.evil.test"),
    (False, "https://r.test@evil.test", "r.test evil.test"),
    (False, "evil.test/r.test/", "r.test"), (False, "r.test:5000", "r.test r.test:5001"),
    (False, "https://r.test:5000", "r.test")) for host in hosts.split())

#: (entry, (username, password, identity token, registry token) or None)
FIELD_ENTRIES = (
    ({"auth": "YWxpY2U6UzNDUjNUMQ=="}, ("alice", "S3CR3T1", None, None)),
    ({"auth": "YWxpY2U6UzNDUjNUMQ"}, ("alice", "S3CR3T1", None, None)),
    ({"auth": field_base64("alice:a:b")}, ("alice", "a:b", None, None)),
    ({"auth": "YWxpY2U6\nUzNDUjNU\r\nMQ==\n"}, ("alice", "S3CR3T1", None, None)),
    ({"auth": field_base64("_json_key:" + FIELD_JSON_KEY)},
     ("_json_key", FIELD_JSON_KEY, None, None)),
    ({"auth": field_base64("alice:pw\0\0")}, ("alice", "pw", None, None)),
    ({"auth": field_base64("j\xf6rg:\u2713")}, ("j\xf6rg", "\u2713", None, None)),
    ({"username": "bob", "password": "pw"}, ("bob", "pw", None, None)),
    ({"auth": field_entry("alice", "pw")["auth"], "username": "bob", "password": "x"},
     ("alice", "pw", None, None)),
    ({"auth": "!", "username": "bob", "password": "pw"}, ("bob", "pw", None, None)),
    ({"identitytoken": "id"}, (None, None, "id", None)),
    # as the login of a cloud registry leaves it
    ({"auth": field_base64("0000-00:"), "identitytoken": "id"},
     ("0000-00", "", "id", None)),
    ({"registrytoken": "ready"}, (None, None, None, "ready")),
) + tuple((entry, None) for entry in (
    {"auth": field_base64("alice")}, {"auth": field_base64(":" + PASSWORD)},
    {"auth": field_base64("alice:")}, {"auth": PASSWORD + "!!"}, {"auth": "YQ=YQ="},
    {"auth": "\u2713"}, {"auth": "/////w=="},  # not UTF-8
    {"auth": 7}, {"auth": ""}, {"username": "bob"},
    {"username": "bob", "password": ["pw"]}, {}, [], "alice:pw", None,
    # what would break a header
    {"registrytoken": "S3CR3T\n"}, {"registrytoken": "S3CR3T\rX: y"},
    {"registrytoken": "S3CR3T\0"}, {"registrytoken": "S3CR3T\u00e9"},
    {"identitytoken": "S3CR3T\n"}, {"auth": field_base64("alice:S3CR3T\0S3CR3T")},
    {"auth": field_base64("al\nice:S3CR3T")},
    {"username": "bob", "password": "S3CR3T\x7f"}))

#: Files that hold nothing we can use, which must not stop a pull. T83
FIELD_BAD_FILES = (
    b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe{}", b'{"auths": []}', b'{"auths": 1}',
    b'{"auths": {"r.test": 1}}', b'{"credHelpers": []}',
    b'{"credHelpers": {"r.test": 1}}',
    b'{"credsStore": 1}', b'{"credsStore": ""}', b"[" * 100000, b" " * (5 << 20),
    b'{"auths": {"r.test": {"auth": "YTpi"}}, "auths": {}}',
    b'\xef\xbb\xbf{"auths": {}}', b'{"auths": {"r.test": {"auth": "YTpi"}}} x',
)

_FIELD_ANSWER = '{"ServerURL": "r.test", "Username": "%s", "Secret": "%s"}'
_FIELD_SAYS = "cat >/dev/null; echo '" + _FIELD_ANSWER + "'"

#: (name, script, what is found: (user, password, identity token), None, or the words of
#: the error as text)
FIELD_HELPERS = (
    ("works", _FIELD_SAYS % ("bob", PASSWORD), ("bob", PASSWORD, None)),
    ("token", _FIELD_SAYS % ("<token>", PASSWORD), (None, None, PASSWORD)),
    ("does not read", "exec <&-; echo '%s'" % _FIELD_ANSWER % ("bob", "pw"),
     ("bob", "pw", None)),
    ("knows nothing", "echo 'credentials not found in native keychain'; exit 1", None),
    ("no URL", "echo 'no credentials server URL'; exit 1", None),
    ("no user", "echo 'no credentials username'; exit 1", None),
    ("empty secret", _FIELD_SAYS % ("bob", ""), None),
    ("secret of two lines", _FIELD_SAYS % ("bob", r"S3CR3T\u000aS3"),
     ("bob", PASSWORD + "\nS3", None)),
    ("secret with a NUL", _FIELD_SAYS % ("bob", r"S3CR3T\u0000"), "password"),
    ("token of two lines", _FIELD_SAYS % ("<token>", r"S3CR3T\u000a"), "token"),
    ("fails", "echo S3CR3T; exit 1", "status 1"),
    ("is killed", "kill -9 $$", "docker-credential-"),
    ("says nothing", "exit 0", "protocol"),
    ("not JSON", "echo S3CR3T", "protocol"),
    ("a list", "echo '[\"S3CR3T\"]'", "protocol"),
    ("a number", "echo '{\"Username\": \"bob\", \"Secret\": 1}'", "protocol"),
    ("two secrets", "echo '{\"Secret\": \"S3CR3T\", \"Secret\": \"x\"}'", "protocol"),
    ("too much", "exec cat /dev/zero", "bytes"),
    ("hangs", "exec sleep 5", "seconds"),
    ("hangs unheard", "exec >&-; exec sleep 5", "seconds"),
    ("leaves a child", "sleep 2 & exec echo '%s'" % _FIELD_ANSWER % ("bob", PASSWORD),
     "seconds"),
)

#: credsStore values that name no program of docker's. T82
FIELD_BAD_HELPERS = (
    "../../x", "a b;id", "/bin/x", "x/y", "-x", ".x", "x\ny", "$(id)", "x\0", "\xfc",
    " ",
)


class CredentialsTest(FieldCase):
    """The Keyring, and what of it the wire sees."""

    def keyring(self, authfile=None, **variables):
        os.environ.update(variables)
        return imagec.Keyring(authfile=authfile)

    def user(self, keyring, host="r.test", repository="a"):
        found = keyring.lookup(host, repository)
        return found and found.username

    # -- where they are looked for

    def test_sources_in_order(self):
        variables = {}
        for name, variable, value, path in FIELD_SOURCES[::-1]:
            auths = {"r.test": field_entry(name)}
            self.file(path, auths if path.endswith("cfg") else {"auths": auths})
            if variable:
                variables[variable] = self.at(value)
            self.assertEqual(self.user(self.keyring(**variables)), name)

    def test_docker_auth_config_comes_before_files(self):
        self.docker_config(field_auths("r.test", "s.test"))
        text = json.dumps({"auths": {"r.test": field_entry("env")}})
        for text, user in ((text, "env"), ("{", "r.test"), ("[]", "r.test"),
                           ("\udcff", "r.test")):
            keyring = self.keyring(DOCKER_AUTH_CONFIG=text)
            self.assertEqual(self.user(keyring), user)
            self.assertEqual(self.user(keyring, "s.test"), "s.test")
        self.assertEqual(len(set(self.said)), 3)

    def test_authfile_is_the_only_one(self):
        self.docker_config(field_auths("r.test", "s.test"))
        text = json.dumps(field_auths("s.test"))
        one = self.file("one.json", {"auths": {"r.test": field_entry("one")}})
        two = self.file("two.json", {"auths": {"r.test": field_entry("two")}})
        for authfile, variable, user in ((one, "", "one"), ("", two, "two"),
                                         (one, two, "one")):
            keyring = self.keyring(authfile, REGISTRY_AUTH_FILE=variable,
                                   DOCKER_AUTH_CONFIG=text)
            self.assertEqual(self.user(keyring), user)
            self.assertIsNone(keyring.lookup("s.test", "a"))

    def test_authfile_that_is_missing_or_broken(self):
        self.docker_config(field_auths("r.test"))
        for path in (self.at("none"), self.file("bad.json", "{"), self.root):
            for keyring in (self.keyring(path), self.keyring(REGISTRY_AUTH_FILE=path)):
                with self.subTest(path), self.fails(imagec.CredentialsError, path):
                    keyring.lookup("r.test", "a")

    def test_nothing_anywhere_is_anonymous(self):
        self.assertIsNone(self.keyring().lookup("r.test", "a"))
        self.docker_config(field_auths("r.test"))
        self.assertIsNone(imagec.Keyring(anonymous=True).lookup("r.test", "a"))
        keyring = self.keyring(DOCKER_CONFIG=self.at("empty"))  # replaces the home
        self.assertIsNone(keyring.lookup("r.test", "a"))
        self.assertEqual(self.said, [])

    @rows([(content[:40], content) for content in FIELD_BAD_FILES])
    def test_t83_files_that_hold_nothing(self, _name, content):
        self.file("run/containers/auth.json", field_auths("r.test"))
        self.docker_config(content)
        self.assertEqual(self.user(self.keyring()), "r.test")

    def test_t83_links_are_followed(self):
        os.makedirs(os.path.join(self.home, ".docker"))
        os.symlink(self.file("real.json", field_auths("r.test")),
                   os.path.join(self.home, ".docker", "config.json"))
        self.assertEqual(self.user(self.keyring()), "r.test")

    @able(os.name == "posix", "have no home")
    def test_without_a_home_there_are_no_files(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.root)
        auths = field_auths("r.test")
        for name in (".docker/config.json", ".config/containers/auth.json"):
            self.file("~/" + name, auths)
        self.file("~/.dockercfg", auths["auths"])
        for owner in ("containers", "docker"):
            self.file("~/.config/%s/certs.d/r.test/ca.crt" % owner, TEST_CERT)
        del os.environ["HOME"]
        with mock.patch("pwd.getpwuid", side_effect=KeyError("nobody")):
            self.assertIsNone(self.keyring().lookup("r.test", "a"))
            self.assertEqual(imagec.host_certificates(
                "r.test", imagec.default_certs_dirs()), ([], []))
        os.environ["DOCKER_CONFIG"] = "./~/.docker"  # this one is named
        self.assertEqual(self.user(self.keyring()), "r.test")

    # -- which entry is taken

    @rows(FIELD_KEYS)
    def test_keys(self, keys, host, repository, winner):
        self.docker_config(field_auths(*keys))
        self.assertEqual(self.user(self.keyring(), host, repository),
                         winner and winner.replace(":", "-"), (host, repository))

    @rows((('{"auths": {"r.test": %s, "r.test": %s}}', "two"),
           ('{"auths": {"r.test": %s}, "auths": {"r.test": %s}}', "two"),
           ('{"auths": {"s.test": %s, "s.test": %s}}', None)))
    def test_of_a_key_that_stands_twice_the_last_counts(self, text, winner):
        path = self.docker_config(text % tuple(
            json.dumps(field_entry(user)) for user in ("one", "two")))
        self.assertEqual(self.user(self.keyring()), winner)
        self.assertIn(path + ": a key stands twice", self.said.pop())

    @rows(FIELD_ENTRIES)
    def test_entries(self, entry, expected):
        self.docker_config({"auths": {"r.test": entry}})
        found = self.keyring().lookup("r.test", "a")
        facts = found and (found.username, found.password, found.identity_token,
                           found.registry_token)
        if expected and expected[1] == "":  # no password is as good as none
            facts = (facts[0], facts[1] or "") + facts[2:]
        self.assertEqual(facts, expected)
        self.assertNotIn(PASSWORD, "".join(self.said))

    def test_an_entry_without_a_secret_does_not_end_the_search(self):
        self.docker_config({"auths": {"r.test/a": {}, "r.test": field_entry("alice")}})
        self.assertEqual(self.user(self.keyring()), "alice")
        self.docker_config({"auths": {"r.test": {}}})
        self.file("run/containers/auth.json", field_auths("r.test"))
        self.assertEqual(self.user(self.keyring()), "r.test")

    def test_what_would_break_a_header_is_told_when_it_is_read(self):
        registry = self.filled(auth="bearer", anonymous=False)
        self.docker_config({"auths": {registry.host: {"registrytoken": "S3CR3T\n"}}})
        with self.fails(imagec.AccessDenied, "anonymous"):
            self.pull(registry.host)
        told, = {text for text in self.said if "passed over" in text}
        self.assertIn(registry.host, told)
        self.assertIn("registry token", told)
        self.assertNotIn("S3CR3T", told)
        for user, password in (("alice", "S3CR3T\0"), ("alice", "S3CR3T\udcff"),
                               ("al\tice", PASSWORD)):
            with self.fails(imagec.UsageError):
                imagec.Credentials(user, password)
        for options, stdin, variable in (((), "", "S3CR3T\x1b"),
                                         (("--password-stdin",), "S3CR3T\udcff", "")):
            run = self.main("digest", "-u", "alice", registry.host + "/lab/app",
                            *options, stdin=stdin, IMAGEC_PASSWORD=variable)
            self.assertEqual(run.status, 2, run.err)
            self.assertRegex(run.err, r"\Aimagec: the password, [^\n]+\n\Z")
            self.assertNotIn("S3CR3T", run.err)

    def test_given_are_for_one_host(self):
        keyring = imagec.Keyring(imagec.Credentials("alice", PASSWORD))
        self.assertEqual(self.user(keyring), "alice")
        with self.fails(imagec.UsageError, "r.test", "s.test"):
            keyring.lookup("s.test", "a")

    # -- helpers

    @rows(FIELD_HELPERS)
    def test_helpers(self, _name, script, expected):
        self.docker_config({"credsStore": "h", "auths": {"r.test": field_entry("no")}})
        self.helper("h", script)
        patience = 0.2 if expected == "seconds" else 10
        with threat_alarm(15), mock.patch.object(imagec, "HELPER_TIMEOUT", patience):
            if isinstance(expected, str):
                with self.fails(imagec.CredentialsError, expected):
                    self.keyring().lookup("r.test", "a")
            else:
                found = self.keyring().lookup("r.test", "a")
                facts = found and (found.username, found.password, found.identity_token)
                self.assertEqual(facts, expected)

    def test_helper_is_asked_by_the_protocol(self):
        self.helper("h", 'echo "$@" >$0.args; cat >$0.in; echo "{}"')
        for host, server in (("r.test:5000", b"r.test:5000"),
                             ("docker.io", FIELD_HUB.encode("ascii")),
                             ("registry-1.docker.io", FIELD_HUB.encode("ascii"))):
            self.docker_config({"credsStore": "h"})
            self.assertIsNone(self.keyring().lookup(host, "a/b"))
            with open(self.at("bin/docker-credential-h.in"), "rb") as file:
                self.assertEqual(file.read(), server)
            with open(self.at("bin/docker-credential-h.args"), "rb") as file:
                self.assertEqual(file.read(), b"get\n")

    def test_cred_helpers_before_store_before_auths(self):
        for name in ("one", "two"):
            self.helper(name, _FIELD_SAYS % (name, "pw"))
        everything = {"credHelpers": {"r.test": "one"}, "credsStore": "two",
                      "auths": {"r.test": field_entry("file")}}
        for left_out, user in (((), "one"), (("credHelpers",), "two"),
                               (("credHelpers", "credsStore"), "file")):
            self.docker_config(
                {k: v for k, v in everything.items() if k not in left_out})
            self.assertEqual(self.user(self.keyring()), user)
        self.docker_config(everything)
        self.assertEqual(self.user(self.keyring(), "r.test:5000"), "two")
        everything["credHelpers"]["r.test"] = ""  # not even the store, for this one
        self.docker_config(everything)
        self.assertEqual(self.user(self.keyring()), "file")

    def test_cred_helpers_of_docker_hub(self):
        self.helper("h", _FIELD_SAYS % ("bob", "pw"))
        for key in (FIELD_HUB, "docker.io", "index.docker.io"):
            self.docker_config({"credHelpers": {key: "h"}})
            for host in ("docker.io", "registry-1.docker.io"):
                self.assertEqual(self.user(self.keyring(), host), "bob")
            self.assertIsNone(self.keyring().lookup("r.test", "a"))

    def test_helper_that_knows_nothing_rules_out_its_file_only(self):
        self.helper("h", "echo credentials not found in native keychain; exit 1")
        for helpers in ({"credsStore": "h"}, {"credHelpers": {"r.test": "h"}}):
            self.docker_config(dict(helpers, **field_auths("r.test")))
            self.assertIsNone(self.keyring().lookup("r.test", "a"))
        self.file("run/containers/auth.json",
                  {"auths": {"r.test": field_entry("next")}})
        self.assertEqual(self.user(self.keyring()), "next")

    @rows([(name,) for name in FIELD_BAD_HELPERS])
    def test_t82_bad_names(self, name):
        self.file("bin/docker-credential-x", "#!/bin/sh\ntouch %s\n" % self.at("ran"))
        for config in ({"credsStore": name}, {"credHelpers": {"r.test": name}}):
            self.docker_config(dict(config, **field_auths("r.test")))
            with self.fails(imagec.CredentialsError, "helper"):
                self.keyring().lookup("r.test", "a")
        self.assertFalse(os.path.exists(self.at("ran")))

    def test_t81_helper_that_is_missing_is_an_error(self):
        # CVE-2021-41092 was another entry taken in its place.
        self.docker_config(dict(field_auths("r.test", FIELD_HUB), credsStore="none"))
        with self.fails(imagec.CredentialsError, "docker-credential-none", "PATH"):
            self.keyring().lookup("r.test", "a")

    @rows((("\x7fELF", 0o755), ("", 0o755), ("#!/none\n", 0o755),
           ("#!/bin/sh\n", 0o644)))
    def test_helper_that_is_no_program(self, content, mode):
        path = self.helper("h", "")
        self.docker_config({"credsStore": "h"})
        self.file("bin/docker-credential-h", content)
        os.chmod(path, mode)
        with self.fails(imagec.CredentialsError):
            self.keyring().lookup("r.test", "a")

    def test_t82_helper_in_the_working_directory_is_not_run(self):
        path = self.file("here/docker-credential-h", "#!/bin/sh\ntouch ran\n")
        os.chmod(path, 0o755)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.at("here"))
        self.docker_config({"credsStore": "h"})
        for place in ("", ".", "/none", "../here"):
            os.environ["PATH"] = place + os.pathsep + "/usr/bin"
            with self.subTest(place), self.fails(imagec.CredentialsError, "PATH"):
                self.keyring().lookup("r.test", "a")
        self.assertFalse(os.path.exists("ran"))

    # -- what is told of them

    def test_auth_command(self):
        self.helper("h", _FIELD_SAYS % ("bob", PASSWORD))
        path = self.docker_config({
            "credHelpers": {"h.test": "h"},
            "auths": {"r.test/a": field_entry("alice"),
                      "e.test": field_entry("a\u202eb"),
                      "i.test": {"identitytoken": IDENTITY_TOKEN},
                      "t.test": {"registrytoken": PASSWORD}}})
        for host, words in (
                ("r.test/a/b", ("alice", path, "(r.test/a)")),
                ("r.test", ("anonymous",)), ("e.test", ("a\\u202eb",)),
                ("h.test", ("bob", path, "docker-credential-h", "credHelpers")),
                ("i.test", ("identity token", path)),
                ("t.test", ("registry token", path)), ("docker.io", ("anonymous",))):
            run = self.main("auth", host)
            self.assertEqual((run.status, run.err), (0, ""))
            self.assertEqual(run.out.count("\n"), 1)
            for word in words + (host,):
                self.assertIn(word, run.out)
            self.assertNotIn(PASSWORD, run.out)
        self.assertIn("anonymous", self.main("auth", "r.test/a", "--no-creds").out)

    def test_auth_command_with_a_broken_source(self):
        self.docker_config({"credsStore": "none"})
        run = self.main("auth", "r.test")
        self.assertEqual((run.status, run.out), (5, ""))
        self.assertRegex(run.err, r"\Aimagec: .*docker-credential-none.*\n\Z")
        run = self.main("auth", "r.test", "-u", "bob", IMAGEC_PASSWORD=PASSWORD)
        self.assertRegex(run.out, "^r.test: .*bob.*the command line")
        self.assertNotIn(PASSWORD, run.out)
        run = self.main("auth", "r.test", "--authfile", self.at("none"))
        self.assertEqual((run.status, run.out), (5, ""))

    # -- what the wire sees

    def asked_for_tokens(self, registry):
        """(method, form or query, Authorization) of each request for a token."""
        return [(request.method, dict(urllib.parse.parse_qsl(
            request.body.decode("ascii") or request.path.partition("?")[2])),
            request.headers.get("Authorization"))
            for request in registry.requests if request.route == "/token"]

    def test_password_from_a_config(self):
        for auth in ("basic", "bearer"):
            registry = self.filled(auth=auth, anonymous=False)
            entry = field_entry("alice")
            self.docker_config({"auths": {registry.host + "/lab": entry}})
            self.pull(registry.host, to=auth)
            self.docker_config({"auths": {registry.host + "/else": entry}})
            with self.fails(imagec.AccessDenied):
                self.pull(registry.host, to=auth + "2")

    def test_identity_token(self):
        registry = self.filled(auth="bearer", anonymous=False)
        entry = dict(field_entry("00-00", ""), identitytoken=IDENTITY_TOKEN)
        self.docker_config({"auths": {registry.host: entry}})
        self.pull(registry.host)
        self.assertEqual(self.asked_for_tokens(registry), [("POST", {
            "grant_type": "refresh_token", "refresh_token": IDENTITY_TOKEN,
            "service": "fixture", "scope": "repository:lab/app:pull",
            "client_id": "imagec"}, None)])
        self.assertEqual([r.headers["Content-Type"] for r in registry.requests
                          if r.method == "POST"], ["application/x-www-form-urlencoded"])
        self.assertNotIn("refresh_token", "".join(r.path for r in registry.requests))

    @rows(((404,), (405,)))
    def test_identity_token_falls_back_to_get(self, code):
        registry = self.filled(auth="bearer", anonymous=False)
        entry = dict(field_entry("alice"), identitytoken=IDENTITY_TOKEN)
        self.docker_config({"auths": {registry.host: entry}})
        registry.fault("POST /token", status(code))
        self.pull(registry.host, to=str(code))
        asked = self.asked_for_tokens(registry)
        self.assertEqual([method for method, _, _ in asked], ["POST", "GET"])
        self.assertTrue(asked[1][2].startswith("Basic "))

    def test_identity_token_that_is_refused(self):
        registry = self.filled(auth="bearer")
        self.docker_config({"auths": {registry.host: {"identitytoken": "S3CR3T-OLD"}}})
        with self.fails(imagec.AccessDenied, "identity token", "config.json"):
            self.pull(registry.host)
        self.assertEqual([m for m, _, _ in self.asked_for_tokens(registry)], ["POST"])

    def test_tokens_that_a_token_server_repeats(self):
        registry = self.registry(auth="bearer")
        say = json.dumps({"errors": [{"code": "DENIED", "message": "%s is not valid"}]})
        for old, new, told in (("S3CR3T-OLD", "", "S3CR3T-OLD"),
                               ("S3CR3T-OLD", "S3CR3T-NEW", "S3CR3T-NEW")):
            found = imagec.Credentials(identity_token=old)
            if new:
                reply = {"token": "t", "refresh_token": new}
                registry.fault("POST", body(json.dumps(reply).encode("ascii")), 1)
                imagec.fetch_token(self.transport(), registry.url + "/token?scope=x",
                                   found)
            registry.fault("POST", status(401, body=(say % told).encode("ascii")), 1)
            with self.fails(imagec.AccessDenied, "*** is not valid") as caught:
                imagec.fetch_token(self.transport(), registry.url + "/token?scope=x",
                                   found)
            self.assertNotIn("S3CR3T", "%s %r" % (caught.exception, caught.exception))
            _, form, _ = self.asked_for_tokens(registry)[-1]
            self.assertEqual(form["refresh_token"], told)  # the one it gave last

    def test_registry_token_is_sent_as_it_is(self):
        registry = self.filled(auth="bearer", anonymous=False)
        self.patch(mock.patch.dict(
            registry.tokens, {"S3CR3T-READY": ["repository:lab/app:pull"]}))
        entry = {"registrytoken": "S3CR3T-READY"}
        self.docker_config({"auths": {registry.host: entry}})
        self.pull(registry.host)
        self.assertEqual(self.asked_for_tokens(registry), [])
        self.assertEqual(set(authorizations(registry)), {"Bearer S3CR3T-READY"})

    def test_no_creds(self):
        registry = self.filled(auth="bearer")
        self.docker_config({"auths": {registry.host: field_entry("wrong")}})
        ref = registry.host + "/lab/app:1"
        self.assertEqual(self.main("digest", "-q", ref).status, 5)
        del registry.requests[:]
        run = self.main("digest", "-q", "--no-creds", ref)
        self.assertEqual((run.status, run.err), (0, ""))
        self.assertEqual([a for _, _, a in self.asked_for_tokens(registry)], [None])

    def test_helper_that_fails_stops_a_pull_that_asks(self):
        registry = self.filled(auth="basic")
        self.docker_config({"credsStore": "none"})
        with self.fails(imagec.CredentialsError, "--no-creds"):
            self.pull(registry.host)
        self.assertEqual(authorizations(registry), [])
        self.pull(self.filled().host)


# --------------------------------------------------------------------------------------
# 9  Transport
# --------------------------------------------------------------------------------------

#: Hosts that urllib.request would unquote, or that are neither a name nor an address.
NET_ODD_HOSTS = (
    "10.0.0.5%3a6379%2f%20HTTP%2f1.1%0d%0a%0d%0aFLUSHALL%0d%0aQUIT%3a443",
    "127.0.0.1%3a6379", "127.0.0.1%20x", "%6cocalhost", "a.test%00", "a.test%40b.test",
    "[::1%25lo]", "[::1%0d%0a]", "[::1]x", "x[::1]", "[a.test]", "[v1.x]", "a:b@c",
    "a.test,b.test", "a.test;b", "a.test!", "a(b", "~a", "a=b", "a&b", "$a", "*",
    ":5000", "a:+5",
)

#: (Location, path it must lead to, or None where it must be refused)
NET_LOCATIONS = tuple((location, path) for path, locations in (
    ("/end", (
        "/end", "../end", "//{host}/end", "{url}/end", "{url}/end#part",
        "HTTP://{host}/end", "/end?" + "e" * 9000, "{url}/end#a#/b@c",
        "http:///end")),  # RFC 3986, 5.2.2, as all browsers read it
    ("/a/end", ("end",)),
    ("/a/start", ("?q=1",)),  # RFC 3986, 5.3: the path stays
    ("/end?%C3%A9", ("/end?" + "\xc3\xa9",)),  # UTF-8, as http.client reads it
    ("/hop/0", ("/hop/9",)),
    (None, (
        "", "/a/start",  # is the same URL again
        "/hop/back",  # leads back in two steps
        "/hop/10",  # T56: one more than allowed
        "file:///etc/passwd", "data:text/plain,hello", "gopher://{host}/end",  # T79
        "ftp://{host}/end",  # T79: urllib follows this one
        "javascript:alert(1)", "http://alice:S3CR3T@{host}/end",
        "http://good.test@{host}/end",  # T93
        "http://{host}\\@good.test/end",  # T93: urlsplit says host good.test
        "http://{host}/e\tnd",  # T93: urlsplit drops the tab
        "http://{host}/e nd", "http://{host}:99999/end", "http://{host}:0/end",
        "http://[::1/end", "http://{host}x/end", "http://\xc3\xa9.test/end")
     + tuple("http://%s/end" % host for host in NET_ODD_HOSTS)),
) for location in locations)

_NEAR = ("public", "private", "loopback", "link-local")  # by rank
#: (how near, addresses), by IANA's special-purpose address registries. T74
NET_ADDRESSES = (
    (None, "a.test 1.2.3 0x7f.1 2130706433 [::1]"),
    ("public", "8.8.8.8 93.184.216.34 100.63.255.255 100.128.0.0 172.32.0.0 192.0.1.0 "
               "198.17.255.255 198.20.0.0 223.255.255.255 2606:4700::1 2001:4860::1"),
    ("public", "::ffff:8.8.8.8 ::8.8.8.8 64:ff9b::808:808 2002:808:808::1 "
               "2001:0:808:808::f7f7:f7f7"),
    ("private", "10.1.2.3 172.16.0.1 172.31.255.255 192.168.1.1 100.64.0.0 "
                "100.127.255.255 192.0.0.1 192.0.2.1 198.18.0.1 198.19.255.255 0.0.0.1 "
                "198.51.100.1 203.0.113.1 192.88.99.1 240.0.0.1 255.255.255.255"),
    ("private", "fc00::1 fd00::1 fec0::1 100::1 2001:db8::1 2001:2::1 2001:10::1 1::1 "
                "3fff::1 4000::1 5f00::1 64:ff9b:1::808:808"),
    ("private", "::ffff:10.1.2.3 ::10.1.2.3 64:ff9b::a01:203 2002:a01:203::1 "
                "2001:0:808:808::f5fe:fdfc 2001:0:a01:203::f7f7:f7f7 ::ffff:0:a01:203"),
    ("loopback", "127.0.0.1 127.9.9.9 0.0.0.0 ::1 :: ::ffff:127.0.0.1 64:ff9b::7f00:1 "
                 "2002:7f00:1:: ::127.0.0.1 64:ff9b:1::7f00:1"),
    ("link-local", "169.254.169.254 224.0.0.1 fe80::1 fe80::1%lo ff02::1 "
                   "100.100.100.200 192.0.0.192 168.63.129.16 fd00:ec2::254 "
                   "::ffff:169.254.169.254 64:ff9b::a9fe:a9fe 2002:a9fe:a9fe:: "
                   "::169.254.169.254 64:ff9b:1::a9fe:a9fe 64:ff9b::6464:64c8"),
)

#: (where the redirecting server is, where to, may it). T74; all ports are one server's.
NET_NEARNESS = tuple(
    (source, host, may) for source, reached, refused in (
        # a name (registry.test) is no better than its address
        ("public.test", "public2.test",
         "private.test 127.0.0.1 localhost registry.test 0.0.0.0 0x7f.1 2130706433 "
         "[::ffff:127.0.0.1] metadata.test 169.254.169.254 shared.test 192.0.0.192 "
         "[64:ff9b::a09:909] [2002:a09:909::1] [::10.9.9.9]"),
        ("private.test", "public.test 10.9.9.9 shared.test",
         "127.0.0.1 169.254.169.254 100.100.100.200"),
        ("registry.test", "public.test private.test other.test", "169.254.169.254"),
        ("shared.test", "private.test", "100.100.100.200"))
    for may, hosts in ((True, reached), (False, refused)) for host in hosts.split())

#: (hosts on the way, the last of which is not reached unless it is "", storage hosts).
#: T74; {port} is everybody's.
NET_CHAINS = (
    ("private.test public.test private.test", ""),
    ("registry.test public.test private.test", ""),
    ("registry.test private.test registry.test", ""),
    ("public.test private.test", "private.test:1"),
    ("public.test private.test", "rivate.test te.test 10.1.2.3"),
    ("public.test private.test metadata.test", "private.test"),
    ("public.test private.test shared.test", "private.test"),
    ("private.test public.test public2.test -", ""),
    ("private.test public.test private.test -", "private.test"),
    ("public.test private.test -", "private.test"),
    ("public.test private.test -", "PRIVATE.test:{port}"),
    ("public.test metadata.test private.test public2.test -",
     "metadata.test private.test"),
    ("public.test 127.0.0.1 -", "127.0.0.1:{port}"),
)

#: (name, header lines, body as sent, what is read, None where it must be refused). T113
NET_FRAMINGS = (
    ("length", "Content-Length: 5", b"hello", b"hello"),
    ("the same length twice", "Content-Length: 5\nContent-Length: 5", b"hello",
     b"hello"),
    ("no length", "X: y", b"hello", b"hello"),
    ("chunked", "Transfer-Encoding: Chunked", b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    ("extension", "Transfer-Encoding: chunked", b"5;x=y\r\nhello\r\n0\r\n\r\n",
     b"hello"),
    ("identity", "Content-Length: 5\nContent-Encoding: identity", b"hello", b"hello"),
    ("two lengths", "Content-Length: 5\nContent-Length: 6", b"hello!", None),
    ("length and chunks", "Content-Length: 6\nTransfer-Encoding: chunked",
     b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    ("102 and 103 first", None, b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early "
     b"Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
     b"hello"),
    ("folded", "X: y\n\tz\nContent-Length:\n 5", b"hello", b"hello"),
    ("gzip, chunked", "Transfer-Encoding: gzip, chunked",
     b"5\r\nhello\r\n0\r\n\r\n", None),
    ("chunked twice", "Transfer-Encoding: chunked\nTransfer-Encoding: chunked",
     b"5\r\nhello\r\n0\r\n\r\n", None),
    ("identity coding", "Transfer-Encoding: identity", b"hello", None),
    ("said to be gzip", "Content-Length: 5\nContent-Encoding: gzip", b"hello",
     b"hello"),
    ("gzip, T47", "Content-Encoding: x-gzip", gzip_bytes(b"hello"), b"hello"),
    ("cut gzip", "Content-Encoding: gzip", gzip_bytes(b"hello")[:-1], None),
    ("bomb", "Content-Encoding: gzip", gzip_bytes(bytes(imagec.MIB + 1)), None),
    ("gzip nobody claims", "X: y", gzip_bytes(b"hello"), gzip_bytes(b"hello")),
    ("unknown coding, T47", "Content-Length: 5\nContent-Encoding: X-Rot13", b"h3110",
     b"h3110"),
) + tuple(("length " + text, "Content-Length: " + text, b"hello", None) for text in (
    "-5", "+5", "five", "", "5, 5", "0_5", "9" * 400,
    "6")) + tuple(  # T22: http.client is silent
        (chunks[:20], "Transfer-Encoding: chunked", chunks, None) for chunks in (
            b"6\r\nhello", b"5\r\nhello\r\n", b"5\r\nhello\r\n1", b"\r\nhello\r\n",
            b"five\r\nhello\r\n", b"-5\r\nhello\r\n0\r\n\r\n",  # T59
            b"f" * 16 + b"\r\nhello", b"0" * 100000))

#: Whole replies that are not HTTP, or nearly (T59, T114); none may end in a traceback.
NET_JUNK = (
    b"", b"\0" * 100, b"\xff" * 100 + b"\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n",
    b"220 mail.test ESMTP\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\0\0\x12\4\0\0\0\0\0",  # an HTTP/2 SETTINGS frame
    b"\x15\x03\x01\0\2\2\x46",  # a TLS alert
    b"<html>HTTP/0.9 had no status line</html>", b"ICY 200 OK\r\n\r\n",
    b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/1.1 99 Low\r\n\r\n",
    b"HTTP/1.1 1000 High\r\n\r\n", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Le",
    b"HTTP/1.1 200 " + b"K" * 100000 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100000 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
)

#: (name, action): each leaves us waiting for ever, in a way that THREAT_STALLS has not
NET_STALLS = (
    ("silent in the handshake, T109", hang(30, "accept")),
    ("drip in the handshake, T57",
     [garbage(b"\x16\x03\x03\x40\x00" + bytes(1000), "accept"),
      drip(0.03, 1, "status")]),
    ("drip in chunk sizes and trailers, T57",
     [chunked(1), drip(0.03, 5, "body")]),
    ("100 Continue for ever, T58",
     lambda reply: _net_continues(garbage(b"HTTP/1.1 100 Continue\r\n\r\n")(reply))),
    ("100 Continue, slowly, T58",
     [garbage(b"HTTP/1.1 100 Continue\r\n\r\n" * 500), drip(0.02, 25, "status")]),
    ("100 and more trailers, T58", lambda reply: _set(
        reply, raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        more=itertools.repeat(b"X: y\r\n" * 9999, 1000000))),
)


def _net_continues(reply):
    reply.more = itertools.repeat(reply.raw * 100, 100000)
    return reply


class TransportTest(NetworkCase):
    """One safe HTTP exchange."""

    @rows((("no more", (9, ssl.SSLWantReadError()), 9, 0),
           ("more records", (9, 8, 7, ssl.SSLWantReadError()), 24, 0),
           ("the end", (9, 8, 0), 17, 0),
           ("full", (9, 1 << 20), 9 + (1 << 20), 0),
           ("an error", (9, 8, ConnectionResetError("after")), 17, None),
           ("an error at once", (9, ssl.SSLError("after")), 9, None)))
    def test_TLS_records_that_are_there_come_at_once(self, _name, steps, first, then):
        sock = mock.Mock(spec=ssl.SSLSocket)
        sock.recv_into.side_effect = steps + (0,)
        kept = imagec._Kept(self.transport(), mock.Mock(type="https", host="r.test"))
        kept.start(None)
        buffer = bytearray(9 + (1 << 20))
        self.assertEqual(kept.receive(sock, buffer), first)
        if then is None:
            with self.assertRaisesRegex(OSError, "after"):
                kept.receive(sock, buffer)
        self.assertEqual(kept.receive(sock, buffer), 0)

    def test_requests_say_who_and_what(self):
        server = self.server({"/end": say(b"hello")})
        found = self.get(self.transport(), server.url + "/end")
        self.assertEqual(found, (200, b"hello"))
        sent = server.requests[0].headers
        self.assertEqual(sent["User-Agent"], imagec.USER_AGENT)
        self.assertEqual(sent["Accept-Encoding"], "identity")  # T47
        self.assertNotIn("Authorization", sent)
        self.assertNotIn("Cookie", sent)

    @rows(NET_LOCATIONS)
    def test_t56_t79_t93_locations(self, location, expected):
        server = self.server({"/end": say(b"hello"), "/a/end": say(b"hello"),
                              "/hop/back": to("/a/start")})
        server.replies.update({"/hop/%d" % hop: to("/hop/%d" % (hop - 1))
                               for hop in range(1, 11)}, **{"/hop/0": say(b"hello")})
        where = location.format(host=server.host, url=server.url)
        server.replies["/a/start"] = lambda request: (
            Reply(200, b"hello") if "?" in request.path else to(where)(request))
        self.gives(expected and (200, b"hello"),
                   lambda: self.get(self.transport(), server.url + "/a/start"),
                   imagec.UnsafeRedirect)
        self.assertLessEqual(len(server.requests), imagec.REDIRECT_LIMIT + 1)
        self.assertEqual(server.connections, 1)
        self.assertIn(expected, (server.requests[-1].route, server.requests[-1].path,
                                 None))

    @rows([(code, "/end") for code in (301, 302, 303, 307, 308)],  # urllib: since 3.11
          [(300, "/end"), (304, "/end"), (307, None)])
    def test_redirect_codes(self, code, location):
        server = self.server({"/end": say(b"hello"), "/start": to(location, code)})
        followed = location and code in (301, 302, 303, 307, 308)
        with self.transport().open("GET", server.url + "/start") as response:
            self.assertEqual(response.status, 200 if followed else code)
            self.assertEqual(response.url.endswith("/end"), bool(followed))

    def test_t70_t71_authorization_stays_with_its_origin(self):
        elsewhere = self.server({"/end": say(b"hello")})
        home = self.server({"/same": to("/end"), "/end": say(b"hello")})
        elsewhere.replies["/back"] = to(home.url + "/end")
        transport = self.transport()
        for place, at_home in (
                (home.url + "/end", 2),
                (elsewhere.url + "/end", 1),  # same host, another port
                ("http://localhost:%d/end" % elsewhere.port, 1),
                ("http://localhost:%d/end" % home.port, 1),  # another name of one host
                (elsewhere.url + "/back", 1)):  # it does not come back either
            with self.subTest(place=place):
                home.replies["/start"] = to(place)
                del home.requests[:]
                self.get(transport, home.url + "/start", headers=BEARER)
                self.assertEqual(len(authorizations(home)), at_home)
                self.assertEqual(authorizations(elsewhere), [])

    def test_t92_no_cookies(self):
        elsewhere = self.server({"/end": say(b"hello")})
        home = self.server({"/start": lambda request: headers(set_cookie="a=S3CR3T")(
            to(elsewhere.url + "/end")(request)), "/end": say(b"", set_cookie="b=1")})
        transport = self.transport()
        for path in ("/start", "/end", "/start"):
            self.get(transport, home.url + path)
        cookies = [r.headers["Cookie"] for r in home.requests + elsewhere.requests]
        self.assertEqual(set(cookies), {None})

    @rows(NET_NEARNESS)
    def test_t74_redirects_lead_no_nearer(self, home, target, allowed):
        server = self.server({"/end": say(b"hello")})
        server.replies["/"] = to("http://%s:%d/end" % (target, server.port))
        url = "http://%s:%d/" % (home, server.port)
        del self.reached[:]
        self.gives((200, b"hello") if allowed else None,
                   lambda: self.get(self.transport(), url), imagec.TransportError)
        self.assertTrue(allowed or len(self.reached) == 1, self.reached)

    @rows([(one, near) for near, many in NET_ADDRESSES for one in many.split()])
    def test_t74_how_near_addresses_are(self, address, near):
        self.assertEqual(imagec._address_rank(address), near and _NEAR.index(near))

    @rows(NET_CHAINS)
    def test_t74_chains_of_redirects(self, way, lent):
        server, good = self.server({"/end": say(b"hello")}), way.endswith("-")
        hops = ["http://%s:%d" % (host, server.port) for host in way.split()]
        if good:
            hops[-1] = hops[-2] + "/end"
        for number, hop in enumerate(hops[1:]):
            server.replies["/%d" % number] = to(
                hop if hop.endswith("/end") else hop + "/%d" % (number + 1))
        transport = self.transport(storage_hosts=lent.format(port=server.port).split())
        last = hops[-1][len("http://"):]
        self.gives((200, b"hello") if good else None,
                   lambda: self.get(transport, hops[0] + "/0", headers=BEARER),
                   imagec.UnsafeRedirect, last.partition(":")[0],
                   "allow it with --storage-host " + last)
        self.assertTrue(good or len(server.requests) == len(hops) - 1)
        self.assertEqual(authorizations(server), ["Bearer S3CR3T"])

    def test_t77_https_leads_to_http_only_at_a_storage_host(self):
        other = self.server({"/end": say(b"hello")})
        plain = self.server({"/end": say(b"hello"), "/on": to(other.url + "/end")})
        secure = self.server({"/start": to(plain.url + "/end"),
                              "/far": to(plain.url + "/on")}, tls=True)
        with self.fails(imagec.UnsafeRedirect, "from https to http",
                        "allow it with --storage-host " + plain.host):
            self.get(self.transport(), secure.url + "/start")
        self.assertEqual(plain.requests, [])
        transport = self.transport(storage_hosts=[plain.host])
        found = self.get(transport, secure.url + "/start", headers=BEARER)
        self.assertEqual(found, (200, b"hello"))
        with self.fails(imagec.UnsafeRedirect, "from https to http", plain.host,
                        "allow it with --storage-host " + other.host):
            self.get(transport, secure.url + "/far", headers=BEARER)
        self.assertEqual(authorizations(plain, other), [])
        self.assertEqual(other.requests, [])

    def test_a_storage_host_is_sent_no_credential_though_it_is_the_registry(self):
        server = self.server({"/start": to("/end"), "/end": say(b"hello")})
        transport = self.transport(storage_hosts=[server.host])
        self.get(transport, server.url + "/start", headers=BEARER)
        self.assertEqual([r.headers["Authorization"] for r in server.requests],
                         ["Bearer S3CR3T", None])

    def test_t74_a_name_that_leads_nearer_by_now(self):
        server = self.server({"/end": say(b"hello")})

        def start(request):
            NET_PLACES["public.test"] = "10.1.2.3"
            return truncate(1.0)(to("/end")(request))

        server.replies["/start"] = start
        with mock.patch.dict(NET_PLACES), self.fails(imagec.UnsafeRedirect, "10.1.2.3"):
            self.get(self.transport(), "http://public.test:%d/start" % server.port)
        self.assertEqual(self.reached, ["93.184.216.34"])

    def test_t74_t110_another_address_may_do(self):
        server, lookup = self.server({"/end": say(b"hello")}), socket.getaddrinfo

        def several(host, port, *rest):
            # One that is too near, one where nothing listens, and then the good one.
            worse = lookup("private.test", port, *rest) + lookup("public.test", 1, *rest)
            return (worse if host == "public2.test" else []) + lookup(host, port, *rest)

        server.replies["/start"] = to("http://public2.test:%d/end" % server.port)
        with mock.patch("socket.getaddrinfo", several):
            self.get(self.transport(), "http://public.test:%d/start" % server.port)
        self.assertEqual(self.reached, ["93.184.216.34", "93.184.216.34",
                                        "93.184.216.35"])

    def test_t74_a_kept_connection_is_no_way_around(self):
        server = self.server({"/end": say(b"hello")})
        private = "http://private.test:%d/end" % server.port
        server.replies["/start"] = to(private)
        transport = self.transport()
        self.assertEqual(self.get(transport, private)[0], 200)  # the user's own choice
        with self.fails(imagec.UnsafeRedirect, "private.test"):
            self.get(transport, "http://public.test:%d/start" % server.port)

    @rows(NET_FRAMINGS, [(junk[:40], None, junk, None) for junk in NET_JUNK])
    def test_t47_t59_t113_t114_framing(self, _name, lines, data, expected):
        if lines is not None:
            head = "HTTP/1.1 200 OK\r\n%s\r\n\r\n" % lines.replace("\n", "\r\n")
            data = head.encode("ascii") + data
        server, made = self.server({"/it": spoken(data)}), []

        class Noted(imagec._Reply):
            def begin(self, *args, **options):
                made.append(self)
                super().begin(*args, **options)

        with mock.patch("imagec._Reply", Noted):
            self.gives(expected and (200, expected),
                       lambda: self.get(self.transport(), server.url + "/it"),
                       imagec.InvalidDocument if b"\x1f\x8b" in data else
                       imagec.TransportError)
        self.assertTrue(all(reply.isclosed() for reply in made))  # and lets go

    def test_t63_headers_take_linear_time(self):
        server = self.server({"/it": say(b"hello", x="a" + " " * 30000 + "b")})
        with cpu_within(5):
            self.get(self.transport(), server.url + "/it")

    def test_t59_odd_chunks_are_read_or_refused(self):
        # Pythons differ on these; what may not happen is a traceback or a wrong body.
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        server, transport = self.server({}), self.transport()
        for chunks in (b"0_5\r\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n",
                       b" 5\r\nhello\r\n0\r\n\r\n", b"+5\r\nhello\r\n0\r\n\r\n",
                       b"5\nhello\n0\n\n",
                       b"5\r\nhello\r\n0\r\n" + b"X: y\r\n" * 50000 + b"\r\n"):
            with self.subTest(chunks=chunks[:20]):
                server.replies["/it"] = spoken(head + chunks)
                try:
                    found = self.get(transport, server.url + "/it")
                except imagec.TransportError:
                    continue
                self.assertEqual(found, (200, b"hello"))

    def test_t112_bodies_where_none_belongs(self):
        server, transport = self.server({}), self.transport()
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
        server.replies["/it"] = spoken(head + b"hello")
        with transport.open("HEAD", server.url + "/it") as response:
            self.assertEqual(response.read(9, "test"), b"")
        server.replies["/it"] = spoken(b"HTTP/1.1 204 No\r\n\r\nhello")
        self.assertEqual(self.get(transport, server.url + "/it"), (204, b""))

    @rows([("lying length, T53", headers(content_length="999999999999"), None),
           ("endless chunks, T52", endless(), None),
           ("endless, T52", endless(framing="close"), None),
           ("one byte too many", body(bytes(imagec.MIB + 1)), None),
           ("as much as may be", body(bytes(imagec.MIB)), (200, bytes(imagec.MIB)))])
    def test_t52_t53_limits(self, _name, action, expected):
        server = self.server({"/it": say(b"hello")})
        server.fault("GET /it", action)
        self.gives(expected, lambda: self.get(self.transport(), server.url + "/it"),
                   imagec.LimitExceeded, "1048576")

    @rows(NET_STALLS)
    def test_t57_t58_t109_stalls(self, name, action):
        server = self.server({"/it": say(b"x" * 5000)}, tls="handshake" in name)
        server.fault("" if "handshake" in name else "GET /it", action)
        # 3.14 counts the 100s by itself, and ends them as no HTTP.
        kind = imagec.TransportError if "100" in name else imagec.Timeout
        with threat_alarm(15), self.fails(kind, server.host) as found:
            self.get(self.transport(idle_timeout=0.08), server.url + "/it")
        self.assertTrue(found.exception.retryable)

    def in_slow_time(self, seconds, size, first=None):
        """A clock by which each receiving takes so long, and gives so much at most;
        the `first` takes longer.
        """
        now, firsts, receive = [0], [first or seconds], imagec._Kept.receive

        def slowly(kept, sock, buffer):
            now[0] += firsts.pop() if firsts else seconds
            return receive(kept, sock, memoryview(buffer)[:size])

        self.patch(mock.patch.object(imagec._Kept, "receive", slowly))
        return lambda: now[0]

    @rows([("document", 1, 20, None), ("blob", 7000, 20, 9000),
           ("blob", 8000, 20, None), ("blob", 7000, 299, 9000)])
    def test_what_may_come_slowly(self, kind, least, first, size):
        server = self.server({"/it": say(b"x" * 9000)})
        transport = self.transport(idle_timeout=60,
                                   clock=self.in_slow_time(20, 500, first))
        with mock.patch("imagec.STALL_BYTES", least), transport.open(
                "GET", server.url + "/it", seconds=300) as response:
            self.gives(size, lambda: len(
                response.read(9999, "it") if kind == "document" else
                b"".join(response.chunks())), imagec.Timeout, "within 300 seconds"
                if kind == "document" else "for 300 seconds")

    def slow_registry(self, seconds, size, first=None):
        """(FakeRegistry, config, its imagec.Registry), in slow time once it is found."""
        registry = self.filled()
        client = self.client(registry, transport=self.transport(
            idle_timeout=60, clock=lambda: clock()))
        clock = time.monotonic
        client.learn_registry_url()
        clock = self.in_slow_time(seconds, size, first)
        return registry, imagec.decode_manifest(self.image.manifest).config, client

    @rows([(59, True, True), (61, False, True), (299, False, True),
           (301, False, False)])
    def test_how_long_an_answer_may_take(self, seconds, document, blob):
        _, config, client = self.slow_registry(seconds, 16 << 10)
        for good, ask in ((document, lambda: client.fetch_manifest("app", "1").raw),
                          (blob, lambda: imagec.fetch_blob(client, "app", config))):
            self.gives(len(ask()) if good else None, lambda: len(ask()),
                       imagec.Timeout, "next to nothing")

    def test_a_config_is_a_document(self):
        registry, config, client = self.slow_registry(20, 30, 299)
        registry.fault("/blobs/", chunked(1))
        with mock.patch("imagec.STALL_BYTES", 1), self.fails(
                imagec.Timeout, "within 300 seconds"):
            imagec.fetch_blob(client, "app", config, str(config.digest))

    def test_deadline_between_two_looks_at_the_clock(self):
        times = iter([0, 1, 2, 4, 6])
        kept = imagec._Kept(self.transport(timeout=5, clock=lambda: next(times)),
                            mock.Mock(type="http", host="registry.test"))
        kept.start(None)
        with self.assertRaises(socket.timeout):
            next(kept.turns())

    def test_deadline_ends_a_wait(self):
        now = [100.0]
        transport = self.transport(timeout=5, clock=lambda: now[0])
        transport._cancelled.wait = lambda seconds: now.__setitem__(0, now[0] + seconds)
        del transport.wait
        with self.fails(imagec.Timeout):
            transport.retrying(mock.Mock(side_effect=imagec.TransportError(
                "it failed", retryable=True)))
        self.assertLess(now[0], 110)

    @rows([("GET /it", False, hang(30)), ("GET /it", True, drip(30, 5, "body")),
           ("", True, hang(30, "accept"))])
    def test_cancel_wakes_whoever_waits(self, match, tls, action):
        server = self.server({"/it": say(b"hello" * 9)}, tls)
        server.fault(match, action)
        self.cancelled(server.url + "/it")

    def test_cancel_wakes_whoever_connects_or_sends(self):
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            # Nobody reads what is sent.
            self.cancelled("http://127.0.0.1:%d/it" % full.getsockname()[1],
                           data=bytes(16 << 20))
        self.cancelled("http://127.0.0.1:%d/it" % self.dead_port())

    def dead_port(self):
        """A port where connections are neither taken nor refused."""
        full = socket.socket()
        self.addCleanup(full.close)
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):  # nobody takes the last of these
            waiting = socket.socket()
            self.addCleanup(waiting.close)
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(full.getsockname())
        return full.getsockname()[1]

    #: Addresses of a host: dead, refusing, alive, or of an unknown kind; how many are
    #: tried, how many the next time, None where there is none.
    @rows((("L D", 1, 1), ("D L", 2, 1), ("D D L D", 3, 1), ("R L", 2, 1),
           ("D R L", 3, 1), ("R R", 2, None), ("R D", 2, None), ("D D D", 3, None),
           ("R U", 1, None)))
    def test_dead_addresses(self, addresses, tried, again):
        server = self.server({"/it": lambda request: Reply(200, b"hello")})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports = {"D": self.dead_port(), "R": free.getsockname()[1], "U": 1,
                     "L": server.port}
        found = [(99 if kind == "U" else socket.AF_INET, socket.SOCK_STREAM, 6, "", (
            "192.0.2.%d" % (number + 1), ports[kind]))
            for number, kind in enumerate(addresses.split())]
        transport, url = self.transport(), "http://registry.test:%d/it" % server.port
        del self.reached[:]
        with mock.patch("imagec.resolved", lambda host, port: list(found)), \
                mock.patch("imagec.CONNECT_DELAY", 0.05), threat_alarm(15), \
                mock.patch("imagec.CONNECT_TIMEOUT", 0.5 if again is None else 10):
            if again is None:
                with self.fails(imagec.TransportError, "registry.test", "no connection "
                                "for 0.5" if "D" in addresses else "refused"):
                    self.get(transport, url)
            else:
                for _ in range(2):
                    with transport.open("GET", url) as response:  # and is not kept
                        self.assertEqual(next(response.chunks(1)), b"h")
        self.assertEqual(self.reached, [target[4][0] for target in found[:tried]]
                         + [found[tried - 1][4][0]] * bool(again))

    @rows((("4", "4"), ("664", "646"), ("446", "464"), ("6", "6"), ("66644", "64646"),
           ("", "")))
    def test_families_in_turn(self, families, expected):
        found = [(int(family), number) for number, family in enumerate(families)]
        with mock.patch("socket.getaddrinfo", return_value=found):
            turns = imagec.resolved("registry.test", 80)
        self.assertEqual("".join(str(family) for family, _ in turns), expected)
        for family in (4, 6):  # in the order of the system's preference
            self.assertEqual(*([one for one in ones if one[0] == family]
                               for ones in (found, turns)))

    def cancelled(self, url, **options):
        transport, started = self.transport(idle_timeout=20), time.monotonic()
        threading.Timer(0.08, transport.cancel).start()
        with self.fails(imagec.Cancelled):
            self.get(transport, url, **options)
        self.assertLess(time.monotonic() - started, 5)
        with self.fails(imagec.Cancelled):  # and nothing new begins
            self.get(transport, url, **options)

    @rows(NET_TLS)
    def test_connections_are_kept(self, tls):
        server, transport = self.server({"/it": say(b"hello")}, tls), self.transport()
        for _ in range(5):
            self.get(transport, server.url + "/it")
        self.assertEqual(server.connections, 1)

    def test_idle_connections_are_bounded(self):
        servers = [self.server({"/it": say(b"hello")}) for _ in range(4)]
        transport = self.transport()
        with mock.patch.object(imagec, "IDLE_CONNECTIONS_LIMIT", 3):
            for server in servers[:3] + servers[:1] + servers[3:]:
                self.get(transport, server.url + "/it")  # the second's is the oldest
            for server in servers[2:] + servers[:1] + servers[1:2]:
                self.get(transport, server.url + "/it")
        self.assertEqual([server.connections for server in servers], [1, 2, 1, 1])

    @rows([("closed while idle", truncate(1.0)),
           ("reset on the next request", reset(0, "status"))])
    def test_t111_stale_connections(self, name, action):
        server, transport = self.server({"/it": say(b"hello")}), self.transport()
        if "idle" not in name:
            self.get(transport, server.url + "/it")
        server.fault("GET /it", action)
        for _ in range(2):
            self.assertEqual(self.get(transport, server.url + "/it"), (200, b"hello"))
        self.assertEqual(server.connections, 2)
        self.assertEqual(self.naps, [])

    def test_t94_unsolicited_bytes_answer_no_request(self):
        server = self.server({"/it": say(b"hello"), "/other": say(b"other")})
        server.fault("GET /it", extra(99, lie=True))
        transport = self.transport()
        self.assertEqual(self.get(transport, server.url + "/it"), (200, b"hello"))
        # Bytes still on their way when the next request leaves cost one try.
        found = transport.retrying(lambda: self.get(transport, server.url + "/other"))
        self.assertEqual(found, (200, b"other"))

    def test_t94_a_body_left_unread_ends_its_connection(self):
        server = self.server({"/it": say(b"x" * 200000), "/other": say(b"other")})
        transport = self.transport()
        transport.open("GET", server.url + "/it").close()
        self.assertEqual(self.get(transport, server.url + "/other"), (200, b"other"))
        self.assertEqual(server.connections, 2)

    def demand(self, server):
        """What /it holds, be it after some tries."""
        transport = self.transport()

        def attempt():
            with transport.open("GET", server.url + "/it") as response:
                if response.status != 200:
                    raise imagec.registry_error(response, "it")
                return response.read(99, "it")

        del self.naps[:]
        return transport.retrying(attempt)

    @rows([(code, 5) for code in (408, 425, 429, 499, 500, 502, 503, 504, 509, 520, 521,
                                  522, 523, 524, 525, 530)],
          [(code, 1) for code in (400, 401, 402, 403, 404, 405, 406, 409, 410, 415, 416,
                                  418, 451, 501, 505)])
    def test_t105_t106_what_is_tried_five_times(self, code, tries):
        server = self.server({"/it": say(b"", code)})
        with self.fails(imagec.RegistryError, str(code)):
            self.demand(server)
        self.assertEqual(len(server.requests), tries)
        self.assertEqual(len(self.naps), tries - 1)
        for number, nap in enumerate(self.naps):
            bound = imagec.BACKOFF * 2 ** number
            self.assertTrue(bound * 0.75 <= nap <= bound * 1.25, self.naps)


# -- TLS files

#: TEST_KEY's like, under a password
FIELD_LOCKED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAiUz4SbqCOHawICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEAQIEEEJ9J+imqQo7poes6mT0Zi0EgZBx
RaIJDURd13YZK2h3PtBajSAX6Kincxg8EDZB3P1gr7eYGra7Ppx2DUho4ERGD/b2
buY6nne+v1ToPQtZzOv1jIz2+vNq2fGl5Hg9MHCLhVZ9fhVE3dJN0VZvPVSCIT3f
tYz0OCv6GeQolk//Z8okEYAgsv8bmqhdumfTETe4q8dYQA3+XqmjCnize6qNzlk=
-----END ENCRYPTED PRIVATE KEY-----
"""

#: (files of the host's directory, CAs, pairs; None where half a pair is an error)
FIELD_CERTS = (
    ("", "", ""),
    ("ca.crt", "ca.crt", ""),
    ("b.crt a.crt", "a.crt b.crt", ""),
    ("me.cert me.key", "", "me"),
    ("ca.crt me.cert me.key you.cert you.key", "ca.crt", "me you"),
    ("ca.pem readme.txt ca.crt.old", "", ""),
    ("me.cert", None, "me.key"),
    ("me.key ca.crt", None, "me.cert"),
    ("me.cert you.key", None, "me.key"),
)

#: (certificate, key, the word of the error)
FIELD_BAD_PAIRS = (
    (TEST_CERT, FIELD_LOCKED_KEY, "encrypted"),
    (TEST_CERT, OTHER_KEY, "client.cert"),
    (TEST_CERT, "", "client.cert"),
    (TEST_CERT, "-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n",
     "client.cert"),
    ("no PEM", TEST_KEY, "client.cert"),
    ("", TEST_KEY, "client.cert"),
    (None, TEST_KEY, "client.cert"),
    (TEST_CERT, None, "client.cert"),
)


#: (whose certificate is bad besides the registry's, is it of the same host name or far,
#: options, what the refusal names, None where it is taken)
FIELD_INSECURE = (
    ("nobody", None, {}, None),
    ("mirror", "far", {"mirrors": "far"}, None),
    ("token", "near", {}, None),
    ("token", "far", {}, "--insecure-skip-verify and --token-host"),
    ("token", "far", {"storage_hosts": "far"}, None),
    ("token", "far", {"token_hosts": "far"}, None),
    ("token", "far", {"token_hosts": "localhost"}, None),
    ("storage", "far", {}, "--insecure-skip-verify and --storage-host"),
    ("storage", "far", {"storage_hosts": "other.test"},
     "--insecure-skip-verify and --storage-host"),
    ("storage", "far", {"storage_hosts": "far"}, None),
    ("storage", "far", {"storage_hosts": "localhost"}, None),
)


class FieldTLSRegistry(FakeRegistry):
    """Asks for a client certificate; keeps what each exchange was shown."""

    def __init__(self, demand=ssl.CERT_REQUIRED, **options):
        super().__init__(tls=True, **options)
        self._tls, self.shown = _tls_context.__wrapped__(True), []
        self._tls.load_verify_locations(cadata=TEST_CERT)
        self._tls.verify_mode = demand

    def _exchange(self, sock, stream):
        done = super()._exchange(sock, stream)
        if done:
            self.shown.append(sock.getpeercert(True))
        return done


class TLSFilesTest(FieldCase):
    """certs.d, --cert and --key, --cacert, and what is said of bad certificates."""

    def client_registry(self, **options):
        registry = FieldTLSRegistry(**options)
        self.addCleanup(registry.close)
        registry.add("lab/app", "1", build_image(FIELD_SMALL))
        return registry

    def pair(self):
        return (self.file("client.cert", TEST_CERT), self.file("client.key", TEST_KEY))

    def certs_d(self, host, owner="containers", **files):
        """Put files (ca_crt for ca.crt) into the user's certs.d for a host."""
        for name, content in files.items():
            self.file("home/.config/%s/certs.d/%s/%s" % (
                owner, host, name.replace("_", ".")), content)

    def no_roots(self):
        os.environ["SSL_CERT_FILE"] = self.file("others.pem", OTHER_CERT)

    def test_places(self):
        os.environ["XDG_CONFIG_HOME"] = "/x"
        self.assertEqual(imagec.default_certs_dirs(), (
            "/x/containers/certs.d", "/etc/containers/certs.d",
            "/x/docker/certs.d", "/etc/docker/certs.d"))

    @rows(FIELD_CERTS)
    def test_files_of_a_host(self, names, roots, pairs):
        base = self.at(names or "none")
        place = os.path.join(base, "r.test:5000", "")
        os.makedirs(place)
        for name in names.split():
            write_file(place + name, b"")
        if roots is None:
            with self.fails(imagec.UsageError, pairs, base):
                imagec.host_certificates("r.test:5000", [base])
            return
        self.assertEqual(imagec.host_certificates("r.test:5000", [base]), (
            [place + name for name in roots.split()],
            [(place + name + ".cert", place + name + ".key")
             for name in pairs.split()]))

    def test_first_directory_of_the_host_is_the_only_one(self):
        bases = [self.at(name) for name in ("none", "one", "two")]
        for name in ("one/r.test/one.crt", "two/r.test/two.crt", "two/s.test:443/s.crt",
                     "two/t.test/t.crt", "two/docker.io/hub.crt"):
            self.file(name, "")
        for host, expected in (("r.test", "one.crt"), ("s.test:443", "s.crt"),
                               ("t.test:444", None), ("../two/t.test", None),
                               (imagec.DOCKER_HUB_API, "hub.crt"),
                               ("..", None), (".", None)):
            roots, _ = imagec.host_certificates(host, bases)
            names = [os.path.basename(path) for path in roots]
            self.assertEqual(names, [expected] if expected else [], host)

    def test_ca_from_certs_d(self):
        for owner in ("containers", "docker"):
            registry = self.filled(tls=True)
            self.no_roots()
            with self.fails(imagec.CertificateError):
                self.pull(registry.host, to=owner)
            self.certs_d("127.0.0.1:1", owner, ca_crt=TEST_CERT)
            with self.fails(imagec.CertificateError):
                self.pull(registry.host, to=owner)
            self.certs_d(registry.host, owner, ca_crt=TEST_CERT)
            self.pull(registry.host, to=owner)

    def test_ca_is_added_to_the_systems(self):
        registry = self.filled(tls=True)
        other = self.file("other.pem", OTHER_CERT)
        self.certs_d(registry.host, ca_crt=OTHER_CERT)
        self.pull(registry.host, cacert=other)

    @rows(((False, None, True), (False, "other.test", True), (False, "r.test", False),
           (True, None, False)))
    def test_own_roots_need_not_be_to_the_letter(self, option, owned, strict):
        if owned:
            self.certs_d(owned, ca_crt=TEST_CERT)
        transport = self.transport(
            cacert=self.file("ca.pem", TEST_CERT) if option else None)
        flag = getattr(ssl, "VERIFY_X509_STRICT", 0)
        found = transport.tls.context("r.test").verify_flags & flag
        self.assertEqual(bool(found), strict and sys.version_info >= (3, 13))

    def test_client_pair_from_certs_d(self):
        registry = self.client_registry()
        with self.fails(imagec.CertificateError, "client certificate", "--cert",
                        "certs.d"):
            self.pull(registry.host)
        self.certs_d(registry.host, me_cert=TEST_CERT, me_key=TEST_KEY)
        self.pull(registry.host)

    def test_cert_and_key_options(self):
        registry = self.client_registry()
        certificate, key = self.pair()
        ref = registry.host + "/lab/app:1"
        run = self.main("digest", "--cert", certificate, "--key", key, ref)
        self.assertEqual((run.status, run.err), (0, ""))
        for half in (("--cert", certificate), ("--key", key)):
            run = self.main("digest", ref, *half)
            self.assertEqual((run.status, run.out), (2, ""))
            self.assertIn("--cert and --key", run.err)

    def test_client_certificate_is_for_named_registries_only(self):
        for named in (False, True):
            store = self.client_registry(demand=ssl.CERT_OPTIONAL)
            registry = self.client_registry(auth="basic", anonymous=False)
            store.blobs, registry.redirect_blobs_to = registry.blobs, store.url
            self.pull(registry.host, to=str(named), client_pair=self.pair(),
                      storage_hosts=[store.host] * named, username="alice",
                      password=PASSWORD)
            self.assertEqual(set(store.shown), {None})
            self.assertNotIn(None, registry.shown)
            self.assertEqual(authorizations(store), [])
            self.assertTrue(authorizations(registry))

    def test_client_certificate_is_not_for_another_token_server(self):
        tokens = self.client_registry(demand=ssl.CERT_OPTIONAL, auth="bearer")
        registry = self.client_registry(auth="bearer", realm=tokens.url + "/token")
        self.pull(registry.host, client_pair=self.pair())
        self.assertEqual(set(tokens.shown), {None})

    @rows(FIELD_BAD_PAIRS)
    def test_bad_pairs(self, certificate, key, word):
        registry = self.client_registry()
        pair = (self.at("client.cert"), self.at("client.key"))
        for path, content in zip(pair, (certificate, key)):
            write_file(path, content or "")
            if content is None:
                os.remove(path)
        with self.fails(imagec.UsageError, word):
            self.pull(registry.host, client_pair=pair)
        self.certs_d(registry.host, me_cert=TEST_CERT)
        with self.fails(imagec.UsageError, "me.key"):
            self.pull(registry.host)
        self.assertEqual(registry.requests, [])

    def test_bad_roots(self):
        registry = self.filled(tls=True)
        for number, content in enumerate(("", "no PEM", TEST_CERT[:200], None)):
            path = self.at("bad%d.pem" % number)
            if content is not None:
                self.file(os.path.relpath(path, self.root), content)
            with self.subTest(content), self.fails(imagec.UsageError, path, "--cacert"):
                self.pull(registry.host, cacert=path)
        with self.fails(imagec.UsageError, self.root):
            self.pull(registry.host, cacert=self.root)
        self.certs_d(registry.host, ca_crt="no PEM")
        with self.fails(imagec.UsageError, "ca.crt"):
            self.pull(registry.host)

    def test_what_is_said_of_a_bad_certificate(self):
        # OpenSSL calls one that is expired and its own root self-signed.
        # 3.6 has no words for what is wrong with a chain.
        unknown = "self" if sys.version_info > (3, 7) else "verify failed"
        for kind, pem, word in (("expired", EXPIRED_CERT, "certificate"),
                                ("wrong-host", OTHER_CERT, "127.0.0.1")):
            registry = self.registry(tls=kind)
            trusted = self.file("trusted.pem", pem)
            for cacert, words in ((trusted, (word,)), (None, (unknown,))):
                with self.subTest(kind=kind, cacert=cacert), self.fails(
                        imagec.CertificateError, registry.host, "--cacert",
                        "--insecure-skip-verify", *words):
                    self.pull(registry.host, cacert=cacert)
            self.assertEqual(registry.requests, [])
            self.assertEqual(registry.connections, 4)  # each by https, then by http

    def test_what_the_insecure_options_are_for(self):
        self.assertTrue(FIELD_INSECURE)
        for part, named, options, words in FIELD_INSECURE:
            registry, other = (self.filled(tls="expired", auth="bearer")
                               for _ in range(2))
            near, far = other.host, other.host.replace("127.0.0.1", "localhost")
            if part == "storage":
                other.blobs, registry.redirect_blobs_to = registry.blobs, (
                    "https://%s" % (near if named == "near" else far))
            elif part == "token":
                registry.realm = "https://%s/token" % (
                    near if named == "near" else far)
            options = {key: [far if value == "far" else value]
                       for key, value in options.items()}
            for flag in ("insecure_skip_verify", "insecure_allow_http"):
                del self.said[:]
                with self.subTest(part, named=named, options=options, flag=flag):
                    given = dict(options, **{flag: True})
                    if words is None:
                        self.pull(registry.host, to=registry.host + flag, **given)
                        self.assertFalse([line for line in self.said
                                          if "leaving the mirror" in line])
                        continue
                    with self.fails(imagec.CertificateError, far, "%s %s" % (
                            words, far)):
                        self.pull(registry.host, to=registry.host + flag, **given)
                    self.assertEqual(other.requests, [])

    def test_tls_1_2_is_the_least(self):
        for skip in (False, True):
            context = imagec.TLSSettings(skip).context("registry.test")
            if hasattr(ssl, "TLSVersion"):
                self.assertGreaterEqual(context.minimum_version, ssl.TLSVersion.TLSv1_2)
            else:
                for option in (ssl.OP_NO_TLSv1, ssl.OP_NO_TLSv1_1):
                    self.assertTrue(context.options & option)

    def test_contexts_are_shared(self):
        # The roots are hundreds: reading them takes longer than a handshake.
        self.certs_d("own.test", ca_crt=TEST_CERT)
        settings = imagec.TLSSettings()
        contexts = [settings.context(host) for host in (
            "a.test", "b.test:5000", "own.test", "a.test")]
        self.assertFalse(settings.forgives("a.test"))
        settings.name("a.test:5000", forgiving=True)
        self.assertIs(settings.context("a.test"), contexts[0])
        self.assertTrue(settings.forgives("a.test"))
        contexts.append(settings.context("a.test"))
        self.assertEqual([context is contexts[0] for context in contexts],
                         [True, True, False, True, False])
        self.assertEqual([context.verify_mode for context in contexts],
                         [ssl.CERT_REQUIRED] * 4 + [ssl.CERT_NONE])
        self.assertEqual([context.check_hostname for context in contexts],
                         [True] * 4 + [False])

    def test_context_is_as_strict_as_the_librarys(self):
        context, library = (imagec.TLSSettings().context("a.test"),
                            ssl.create_default_context())
        self.assertEqual(context.verify_flags, library.verify_flags)
        self.assertEqual(context.options & library.options, library.options)
        self.assertEqual(context.get_ciphers(), library.get_ciphers())

    def test_slow_handshake_behind_a_proxy(self):
        registry, proxy = self.filled(tls=True), FieldProxy()
        self.addCleanup(proxy.close)
        shake = ssl.SSLSocket.do_handshake

        def slow(sock, *args):
            time.sleep(0.1 * sock.server_side)
            shake(sock, *args)

        with mock.patch.object(imagec, "CANCEL_NOTICED", 0.02), \
                mock.patch("ssl.SSLSocket.do_handshake", slow):
            self.pull(registry.host, proxy=proxy.url)


# -- Proxies

class Relay(Server):
    """Hands connections on to a host of this machine, and counts what comes back."""

    def __init__(self, host=None):
        self.onward = host
        self.carried, self.limit = 0, float("inf")  # bytes, and when to hold them back
        self.asked = []  # (digest, offset) of the requests for blobs
        super().__init__()

    def _exchange(self, sock, stream):
        self.carry(sock, self.onward)

    def carry(self, near, host, begun=b""):
        """Send `begun`, then what comes, both ways, until either end has enough."""
        with socket.socket() as far:  # create_connection may be led here again
            far.connect(("127.0.0.1", int(host.rpartition(":")[2])))
            far.sendall(begun)
            back = threading.Thread(target=self._pump, args=(far, near, self._count),
                                    daemon=True)
            back.start()
            self._pump(near, far, self._note)
            back.join(5)

    @staticmethod
    def _pump(source, sink, see):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(BLOCK), b""):
                see(data)
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def let_go(self):
        """Hold back nothing, and wait until every connection is over."""
        self.limit = float("inf")
        while self._live:
            self._closing.wait(0.002)

    def _count(self, data):
        with self._lock:
            self.carried += len(data)
        while self.carried > self.limit and not self._closing.wait(0.002):
            pass

    def _note(self, data):
        """Requests come whole: http.client sends their headers at once."""
        blob = re.match(b"GET [^ ]*/blobs/(sha256:[0-9a-f]*) ", data)
        offset = re.search(br"\r\nRange: bytes=(\d+)-", data)
        if blob:
            self.asked.append((blob.group(1).decode("ascii"),
                               int(offset.group(1)) if offset else 0))


class FieldProxy(Relay):
    """An HTTP proxy for which every host is this machine."""

    wants = None  # the Proxy-Authorization it asks for
    _exchange = Server._exchange

    def answer(self, request):
        if self.wants and request.headers.get("Proxy-Authorization") != self.wants:
            return Reply(407, headers={"Proxy-Authenticate": 'Basic realm="proxy"'})
        reply = Reply(200)
        reply.ending, reply.raw, reply.begun = "fin", b"", b""
        reply.onward, path = re.fullmatch("(?:http://)?([^/]*)(.*)",
                                          request.path).groups()
        if request.method == "CONNECT":
            reply.raw = b"HTTP/1.1 200 Connected\r\n\r\n"
        else:
            lines = ["%s %s HTTP/1.1" % (request.method, path), "Connection: close"]
            lines += ["%s: %s" % pair for pair in request.headers.items()
                      if not re.match("(?i)proxy-|connection", pair[0])]
            reply.begun = "\r\n".join(lines + ["", ""]).encode("latin-1")
        return reply

    def _send(self, sock, reply, bare):
        super()._send(sock, reply, bare)
        if hasattr(reply, "onward"):
            self.carry(sock, reply.onward, reply.begun)


class FieldSocks(Relay):
    """A SOCKS5 server for which every host is this machine."""

    def __init__(self, user=None, refusal=0, raw=None):
        self.user, self.refusal, self.raw = user, refusal, raw
        self.targets = []  # (kind of address, address, port)
        self.logins = []  # (methods offered, user, password)
        super().__init__()

    def _exchange(self, near, stream):
        if self.raw is not None:
            stream.read(1)
            return near.sendall(self.raw)
        # Whoever hangs up in the middle leaves us without a byte to read.
        with contextlib.suppress(IndexError, struct.error):
            methods, login = stream.read(stream.read(2)[1]), (None, None)
            wanted = 0 if self.user is None else 2
            near.sendall(bytes([5, wanted if wanted in methods else 255]))
            if wanted == 2 and wanted in methods:
                login = tuple(stream.read(stream.read(size)[-1]).decode("utf-8")
                              for size in (2, 1))
                near.sendall(bytes([1, login != self.user]))
            self.logins.append((methods,) + login)
            if wanted in methods and login == (self.user or login):
                kind = stream.read(4)[3]
                size = stream.read(1)[0] if kind == 3 else {1: 4, 4: 16}[kind]
                address, (port,) = stream.read(size), struct.unpack(
                    ">H", stream.read(2))
                self.targets.append((kind, address, port))
                # An answer with a name for an address is allowed, and seldom.
                near.sendall(b"\5" + bytes([self.refusal]) + b"\0\3\4name" + b"\0\0")
                if not self.refusal:
                    self.carry(near, ":%d" % port)


#: (variables with P or H for the proxy and X for a dead one, scheme, is it used)
FIELD_ENVIRONMENTS = (
    ("http_proxy=P", "http", True), ("HTTP_PROXY=P", "http", True),
    ("https_proxy=P", "https", True), ("HTTPS_PROXY=P", "https", True),
    ("http_proxy=P", "https", False), ("https_proxy=P", "http", False),
    ("http_proxy=P HTTP_PROXY=X", "http", True),
    ("http_proxy=", "http", False), ("http_proxy=H", "http", True),
    ("http_proxy=X NO_PROXY=registry.test", "http", False),
    ("http_proxy=P no_proxy=registry.test", "http", False),
    ("http_proxy=P NO_PROXY=registry.test", "http", False),
    ("https_proxy=P NO_PROXY=other.test,.test", "https", False),
    ("http_proxy=P no_proxy=other.test NO_PROXY=registry.test", "http", True),
    ("http_proxy=P no_proxy=*", "http", False),
    # CGI scripts get a client's Proxy header in HTTP_PROXY (httpoxy). T89
    ("HTTP_PROXY=P REQUEST_METHOD=GET", "http", False),
)

#: (host, NO_PROXY, is it reached directly), as golang.org/x/net/http/httpproxy. T88
FIELD_NO_PROXY = (
    ("r.test", "", False), ("r.test", ",, ,", False), ("r.test", "*", True),
    ("r.test", "x.test", False), ("r.test", "r.test", True), ("r.test", "R.TEST", True),
    ("r.test", "r.test:80", True), ("r.test", "r.test:443", False),
    ("r.test", "r.test:5000", False),
    ("R.Test", "r.tEST", True), ("r.test.", "r.test", True),
    ("a.r.test", "r.test", True), ("ar.test", "r.test", False),
    ("r.test", ".r.test", False), ("a.r.test", ".r.test", True),
    ("r.test", "*.r.test", False), ("a.r.test", "*.r.test", True),
    ("a.b.r.test", "*.r.test", True),
    ("r.test", " x.test , r.test", True), ("r.test", "x.test r.test", True),
    ("r.test:5000", "x.test, r.test ,y.test", True), ("r.test:5000", "r.test", True),
    ("r.test:5000", "r.test:5000", True), ("r.test:5000", "r.test:5001", False),
    ("r.test:5000", "r.test:50", False), ("a.r.test:5000", "r.test:5000", True),
    ("a.r.test:5000", ".r.test:5000", True), ("r.test", "10.0.0.0/8", False),
    ("10.1.2.3", "10.0.0.0/8", True), ("11.1.2.3", "10.0.0.0/8", False),
    ("10.1.2.3", "10.2.0.0/16", False), ("10.1.2.3", "10.1.2.4/24", True),
    ("10.1.2.3", "10.1.2.0/33", False), ("10.1.2.3:5000", "10.0.0.0/8", True),
    ("10.1.2.3:5000", "10.1.2.0/24", True), ("10.1.2.3", "10.1.2.3", True),
    ("10.1.2.3", "0.1.2.3", False), ("10.1.2.3", "10.1.2.", False),
    ("10.1.2.3:5000", "10.1.2.3", True), ("10.1.2.3:5000", "10.1.2.3:5000", True),
    ("10.1.2.3:5000", "10.1.2.3:5001", False), ("[fd00::1]", "fd00::1", True),
    ("[fd00::a:1]", "fd00::a:1", True), ("[fd00::1]:5000", "fd00::1", True),
    ("[fd00::1]:5000", "[fd00::1]:5000", True), ("[fd00::1]:5000", "fd00::/8", True),
    ("[fd00::1]:5000", "fd00::/16", True), ("[fd00::1]", "fe80::/10", False),
    ("[fd00::1]", "10.0.0.0/8", False), ("localhost.r.test", "localhost", False),
)

#: --proxy values that name no proxy of ours
FIELD_BAD_PROXIES = (
    "", "://", "http://", "socks5://", "http://:80", "ftp://p.test:1",
    "https://p.test:1", "socks4://p.test:1", "socks4://u:S3CR3T@p.test:1",
    "socks4a://p.test:1", "http://p.test:0", "http://p.test:x", "http://p.test:99999",
    "http://[::1", "file:///etc/passwd", "socks5://%s:p@p.test:1" % ("b" * 256),
    "socks5h://b:%s@p.test:1" % ("p" * 256),
    # passwords that were not quoted
    "http://u:S3CR3T#@p.test:1", "http://u:S3CR3T/x@p.test:1",
    "http://u:S3CR3T?@p.test:1",
)

#: (what the SOCKS server says to a request, the word of the error, is it worth a retry)
FIELD_SOCKS_REPLIES = (
    (1, "failed", True), (2, "allow", False), (3, "network", True), (4, "host", True),
    (5, "refused", True), (6, "waiting", True), (7, "cannot", False),
    (8, "address", False), (200, "failed", True),
)


class ProxyTest(FieldCase):
    """Proxies of the environment and of --proxy."""

    def setUp(self):
        super().setUp()
        self.proxy = FieldProxy()
        self.addCleanup(self.proxy.close)
        self.places["registry.test"] = "127.0.0.1"

    def socks(self, *args, **options):
        server = FieldSocks(*args, **options)
        self.addCleanup(server.close)
        return server

    def named(self, server, host="registry.test"):
        """The server's URL by another name."""
        return server.url.replace("127.0.0.1", host) + "/v2/"

    def fetch(self, server, host="registry.test", **options):
        """Get something from the server, by that name."""
        transport = self.transport([host], **dict({"skip_verify": True}, **options))
        self.assertEqual(self.get(transport, self.named(server, host)), (200, b"{}"))

    def taken(self):
        """What the proxy was asked, which is forgotten."""
        found = [(r.method, r.path) for r in self.proxy.requests]
        del self.proxy.requests[:]
        return found

    @rows(FIELD_ENVIRONMENTS)
    def test_environment(self, words, scheme, used):
        registry = self.registry(tls=scheme == "https")
        asked = ("GET", self.named(registry)) if scheme == "http" else (
            "CONNECT", registry.host.replace("127.0.0.1", "registry.test"))
        places = {"P": self.proxy.url, "H": self.proxy.host, "X": "http://127.0.0.1:1"}
        variables = dict(word.split("=") for word in words.split())
        variables = {name: places.get(v, v) for name, v in variables.items()}
        with mock.patch.dict(os.environ, variables):
            self.fetch(registry)
        self.assertEqual(self.taken(), [asked] if used else [])

    @rows(FIELD_NO_PROXY)
    def test_t88_no_proxy(self, host, no_proxy, expected):
        url = urllib.parse.urlsplit("http://%s/v2/" % host)
        self.assertIs(imagec.bypasses_proxy(url, no_proxy), expected, no_proxy)

    def test_option(self):
        os.environ.update(http_proxy="http://127.0.0.1:1",
                          https_proxy="http://127.0.0.1:1")
        for tls, methods in ((False, {"GET", "CONNECT"}), (True, {"CONNECT"})):
            registry = self.filled(tls=tls)
            self.pull(registry.host, to=str(tls), proxy=self.proxy.url)
            asked = [method for method, _ in self.taken()]
            self.assertEqual(set(asked), methods)
            self.assertEqual(registry.connections, len(
                [method for method in asked if method != "CONNECT" or tls])
                + (0 if tls else 1))

    def test_t88_loopback_goes_through_the_option_only(self):
        registry = self.registry()
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy"):
            os.environ[name] = self.proxy.url
        for host in ("[::1]:5000", "127.9.9.9", "localhost:5000", "a.b.localhost:1"):
            self.assertTrue(imagec.loopback(host))
        for host in ("localhost.r.test", "notlocalhost"):
            self.assertFalse(imagec.loopback(host))
        for host in ("127.0.0.1", "localhost", "r.LocalHost"):
            self.fetch(registry, host)
            self.assertEqual(self.taken(), [])
            self.fetch(registry, host, proxy=self.proxy.url)
            self.assertEqual(len(self.taken()), 1)

    def test_t73_who_is_behind_a_proxy_is_no_neighbour(self):
        inner = self.registry()
        self.proxy.fault("/v2/", redirect(inner.url + "/v2/"))
        os.environ["http_proxy"] = self.proxy.url
        with self.fails(imagec.UnsafeRedirect, "127.0.0.1"):
            self.fetch(self.registry())
        self.assertEqual(inner.requests, [])

    def test_no_server_writes_to_the_proxy(self):
        host = NET_ODD_HOSTS[0]  # the others are refused in the same places
        server = self.server({"/v2/": to("https://%s/x" % host)}, tls=True)
        os.environ["https_proxy"] = "http://bob:S3CR3T@" + self.proxy.host
        with self.fails(imagec.UnsafeRedirect):
            self.fetch(server)
        asking = self.asking(self.named(server), "https://%s/token" % host,
                             imagec.Credentials("a", PASSWORD))
        with self.fails(imagec.UnsafeRedirect):
            asking.authorization("app")
        self.assertEqual(self.taken(), [("CONNECT", "registry.test:%d" % server.port)])

    def test_addresses_are_written_in_brackets(self):
        self.places["fd00::1"] = "127.0.0.1"
        proxy = self.proxy.url.replace("127.0.0.1", "[fd00::1]")
        os.environ.update(http_proxy=proxy, https_proxy=proxy)
        for tls, asked in ((True, ("CONNECT", "[fd00::1]:%s")),
                           (False, ("GET", "http://[fd00::1]:%s/v2/"))):
            registry = self.registry(tls=tls)
            self.fetch(registry, "[fd00::1]")
            port = registry.host.partition(":")[2]
            self.assertEqual(self.taken(), [(asked[0], asked[1] % port)])

    def test_tunnel_is_kept_and_sees_no_authorization(self):
        registry = self.registry(tls=True)
        os.environ["https_proxy"] = self.proxy.url
        transport = self.transport(["registry.test"], skip_verify=True)
        for _ in range(3):
            self.get(transport, self.named(registry),
                     headers={"Authorization": "Bearer S3CR3T"})
        self.assertEqual(authorizations(self.proxy), [])
        self.assertEqual(authorizations(registry), ["Bearer S3CR3T"] * 3)
        self.assertEqual(len(self.taken()), 1)

    @rows((("bob", PASSWORD), ("b\xf6b", "p@s:/#?"), ("bob", "")))
    def test_t88_password_is_the_proxys_alone(self, user, password):
        self.proxy.wants = "Basic " + field_base64("%s:%s" % (user, password))
        url = "http://%s%s@%s" % (
            urllib.parse.quote(user, ""),
            ":" + urllib.parse.quote(password, "") if password else "", self.proxy.host)
        for tls in (False, True):
            registry = self.registry(tls=tls)
            self.fetch(registry, proxy=url)
            with mock.patch.dict(os.environ, http_proxy=url, https_proxy=url):
                self.fetch(registry)
            self.assertEqual(len(registry.requests), 2)
            for request in registry.requests:
                self.assertNotIn("Proxy-Authorization", request.headers)

    def test_t89_password_that_is_wanted(self):
        self.proxy.wants = "Basic S3CR3T"
        for tls in (False, True):
            registry = self.registry(tls=tls)
            for url in (self.proxy.url, "http://bob:S3CR3T@" + self.proxy.host):
                client = self.client(registry, transport=self.transport(proxy=url),
                                     allow_http=not tls)
                with self.subTest(tls=tls, url=url), self.fails(
                        imagec.AccessDenied, "407", self.proxy.host, "does not take our"
                        if "@" in url else "wants a user name"):
                    client.learn_registry_url()
                self.assertLessEqual(len(self.taken()), 3)
            self.assertEqual(registry.requests, [])

    @rows((("NTLM\nNegotiate", "by NTLM or Negotiate,"), ("Digest x=y", "by Digest,"),
           ("NTLM\nbasic x", "a user name")))
    def test_password_that_is_not_enough(self, kinds, words):
        wanted = Reply(407, headers={"Proxy-Authenticate": kinds.split("\n")})
        for tls in (False, True):
            with mock.patch.object(self.proxy, "answer", lambda request: wanted):
                with self.fails(imagec.AccessDenied, "407", words, self.proxy.host):
                    self.fetch(self.registry(tls=tls), proxy=self.proxy.url)

    @rows((("http",), ("socks5",), ("socks5h",)))
    def test_refused_proxy_is_named(self, scheme):
        url = scheme + "://bob:S3CR3T@127.0.0.1:1"
        for tls in (False, True):
            registry = self.registry(tls=tls)
            with self.fails(imagec.TransportError, "127.0.0.1:1)", "proxy", "refused"):
                self.fetch(registry, proxy=url)
            self.assertEqual(registry.connections, 0)
        run = self.main("digest", "r.test/a", "--debug", "--proxy", url)
        self.assertEqual((run.status, run.out), (1, ""))
        self.assertIn("127.0.0.1:1", run.err)
        self.assertNotIn(PASSWORD, run.err)

    @rows((("http://p.test", "p.test:80"), ("p.test", "p.test:80"),
           ("socks5://p.test", "p.test:1080"), ("socks5h://p.test:99", "p.test:99"),
           ("http://b:p@[fd00::1]", "[fd00::1]:80")))
    def test_default_ports(self, url, place):
        request = urllib.request.Request("https://r.test/")
        imagec._ProxyHandler(url).proxy_open(request, url, "https")
        self.assertEqual(request.proxy, place)

    @rows([(url,) for url in FIELD_BAD_PROXIES])
    def test_t89_malformed(self, url):
        # In the environment, no more than a word is no proxy at all.
        for argv, environ in ((("--proxy", url), {}),) + (
                (((), {"https_proxy": url}),) if "p.test" in url else ()):
            run = self.main("digest", "r.test/a", *argv, **environ)
            self.assertEqual((run.status, run.out), (2, ""))
            # What to write must not be taken for somebody's password.
            self.assertRegex(run.err,
                             r"\Aimagec: .*proxy.*\[USER:PASSWORD@\]HOST.*\n\Z")
            self.assertNotIn(PASSWORD, run.err)

    @rows((("page", say(b"<html>", content_type="text/html")),
           ("denied", say(b"no", 403)), ("junk", spoken(b"SSH-2.0\r\n")),
           ("hang", lambda request: hang(30)(None)),
           ("drip", lambda request: drip(0.03, 1, "status")(Reply(200)))))
    def test_t89_odd_answers_to_connect(self, _name, action):
        registry = self.registry(tls=True)
        with mock.patch.object(self.proxy, "answer", action), threat_alarm(15):
            with self.fails(imagec.TransportError):
                self.fetch(registry, proxy=self.proxy.url, idle_timeout=0.08)
        self.assertEqual(registry.requests, [])

    # -- SOCKS

    @rows((("socks5",), ("socks5h",), ("SOCKS5H",)))
    def test_socks(self, scheme):
        self.places.pop("registry.test", None)  # nothing is resolved here
        for user, login in ((None, ""), (("b\xf6b", "p:w"), "b%C3%B6b:p%3Aw@")):
            for tls in (False, True):
                server, registry = self.socks(user), self.registry(tls=tls)
                proxy = "%s://%s%s" % (scheme, login, server.host)
                with mock.patch.dict(os.environ, HTTP_PROXY=proxy):
                    self.fetch(registry, proxy=proxy if tls else None)
                kind, address, port = server.targets[0]
                self.assertEqual((kind, address), (3, b"registry.test"))
                self.assertEqual("127.0.0.1:%d" % port, registry.host)
                # No password is offered that was not given.
                self.assertEqual(server.logins, [(b"\0\2",) + user if user
                                                 else (b"\0", None, None)])

    def test_socks_pull(self):
        for tls in (False, True):
            server, registry = self.socks(("bob", PASSWORD)), self.filled(tls=tls)
            self.pull(registry.host, to=str(tls),
                      proxy="socks5://bob:%s@%s" % (PASSWORD, server.host))
            # One connection for each of the layers' workers, one for the documents.
            self.assertLessEqual(len(server.targets), 2 + (not tls) + 1)

    @rows((("", "wants"), ("bob:S3CR3T-WRONG@", "does not take"),
           ("bob@", "does not take")))
    def test_socks_refuses_us(self, login, word):
        server = self.socks(("bob", "right"))
        with self.fails(imagec.AccessDenied, word, server.host, "password"):
            self.fetch(self.registry(), proxy="socks5://%s%s" % (login, server.host))

    @rows(FIELD_SOCKS_REPLIES)
    def test_socks_refuses_the_host(self, code, word, retryable):
        server = self.socks(refusal=code)
        with self.fails(imagec.TransportError, word, server.host,
                        "r.test:80") as caught:
            self.get(self.transport(proxy="socks5h://" + server.host),
                     "http://r.test:80/")
        self.assertIs(caught.exception.retryable, retryable)

    @rows([(raw,) for raw in (b"HTTP/1.1 400 Bad\r\n\r\n", b"SSH-2.0-x\r\n", b"",
                              b"\5", b"\4\0", b"\5\7", b"\5\0\5",
                              b"\5\0\5\0\0\2")])
    def test_socks_proxy_that_is_none(self, raw):
        server = self.socks(raw=raw)
        with self.fails(imagec.ImagecError, server.host):
            self.fetch(self.registry(), proxy="socks5://" + server.host)

    def test_socks_that_hangs(self):
        self.proxy.fault("", hang(30, "accept"))
        with self.fails(imagec.Timeout, self.proxy.host):
            self.fetch(self.proxy, proxy="socks5://" + self.proxy.host,
                       idle_timeout=0.2)


# --------------------------------------------------------------------------------------
# 10  Registry
# --------------------------------------------------------------------------------------

#: (header values, the challenges in them as (scheme, {parameters}))
NET_CHALLENGES = (
    (['Bearer realm="https://a/t",service="s",scope="repository:r:pull"'],
     [("bearer", {"realm": "https://a/t", "service": "s",
                  "scope": "repository:r:pull"})]),
    # The described system split at spaces, and lost what follows the comma.
    (['Bearer realm="r", service="s"'], [("bearer", {"realm": "r", "service": "s"})]),
    # ... and at commas, also those inside quotes.
    (['Bearer realm="r",scope="repository:a:pull,push repository:b:pull"'],
     [("bearer", {"realm": "r", "scope": "repository:a:pull,push repository:b:pull"})]),
    (['Bearer realm="a \\"b\\" \\\\ c"'], [("bearer", {"realm": 'a "b" \\ c'})]),
    # docker and containers/image stop at an empty value.
    (['Bearer realm="r",scope="",service="s"'],
     [("bearer", {"realm": "r", "scope": "", "service": "s"})]),
    # They cut an unquoted URL at its colon.
    (["Bearer realm=https://a/t,service=s"],
     [("bearer", {"realm": "https://a/t", "service": "s"})]),
    (['BEARER REALM="r" , Service="S"'], [("bearer", {"realm": "r", "service": "S"})]),
    (['Bearer realm = "r"'], [("bearer", {"realm": "r"})]),  # RFC 7235: BWS
    (['Bearer realm="r",,service="s",'], [("bearer", {"realm": "r", "service": "s"})]),
    (['Bearer realm="r" service="s"'], [("bearer", {"realm": "r", "service": "s"})]),
    (['Bearer realm="r",realm="other"'], [("bearer", {"realm": "r"})]),
    (['Basic realm="b"', 'Bearer realm="r"'],
     [("basic", {"realm": "b"}), ("bearer", {"realm": "r"})]),
    (['Basic realm="b", Bearer realm="r",service="s"'],
     [("basic", {"realm": "b"}), ("bearer", {"realm": "r", "service": "s"})]),
    # RFC 7235, 4.1: the example of the standard.
    (['Newauth realm="apps", type=1, title="Login to \\"apps\\"", '
      'Basic realm="simple"'],
     [("newauth", {"realm": "apps", "type": "1", "title": 'Login to "apps"'}),
      ("basic", {"realm": "simple"})]),
    (["Negotiate", 'Bearer realm="r"'],
     [("negotiate", {}), ("bearer", {"realm": "r"})]),
    (['Negotiate, Bearer realm="r"'],
     [("negotiate", {}), ("bearer", {"realm": "r"})]),
    (['Negotiate oYG2/+==, Basic realm="b"'],
     [("negotiate", {}), ("basic", {"realm": "b"})]),
    (["Basic"], [("basic", {})]),
    (["Bearer"], [("bearer", {})]),
    (["  , Bearer  "], [("bearer", {})]),
    (['Bearer realm="r",service="un'], [("bearer", {"realm": "r"})]),
    (['Bearer realm="r\\'], [("bearer", {})]),
    (['Bearer =x, realm="r"'], [("bearer", {})]),
    (["\xe9\x00 realm"], []),
    (['realm="r"'], []),
    ([""], []),
    ([], []),
    (["Bearer realm=" + "r" * 70000], []),
    (["Bearer realm=" + "r" * 70000, 'Basic realm="b"'], [("basic", {"realm": "b"})]),
)

#: (realm, service, URL of the token or None where it must be refused)
NET_REALMS = (
    ("https://t.test/token", "s", "https://t.test/token?service=s&scope={scope}"),
    ("https://t.test/token", None, "https://t.test/token?scope={scope}"),
    ("https://t.test/token", "", "https://t.test/token?scope={scope}"),
    ("https://t.test/token?a=b&c=", "s",
     "https://t.test/token?a=b&c=&service=s&scope={scope}"),
    ("https://t.test/token#part", "s", "https://t.test/token?service=s&scope={scope}"),
    # As regclient has it: a realm may be relative.
    ("/token", "s", "https://registry.test/token?service=s&scope={scope}"),
    ("//t.test/token", "s", "https://t.test/token?service=s&scope={scope}"),
    ("https:///token", "s", "https://registry.test/token?service=s&scope={scope}"),
    # T85: a service cannot add parameters of its own
    ("https://t.test/token", "x&scope=repository:other:push#",
     "https://t.test/token?service=x%26scope%3Drepository%3Aother%3Apush%23"
     "&scope={scope}"),
    # nor can the realm
    ("https://t.test/token?scope=repository:x:push&a=b&sc%6fpe=y", None,
     "https://t.test/token?a=b&scope={scope}"),
    # It does not know of the TLS before it.
    ("http://registry.test/token", "s",
     "https://registry.test/token?service=s&scope={scope}"),
    ("http://registry.test:80/token", "s",
     "https://registry.test/token?service=s&scope={scope}"),
    ("http://Registry.test:5001/token", None,
     "https://Registry.test:5001/token?scope={scope}"),
) + tuple((realm, "s", None) for realm in (
    None, "", "http://t.test/token",  # T77
    "file:///etc/passwd", "ftp://t.test/token", "data:application/json,{}",  # T79
    "https://alice:S3CR3T@t.test/token", "https://registry.test@t.test/token",  # T72
    "https://t.test\\@registry.test/token", "https://t.test/to ken",  # T93
    "https://t.test/to\nken", "https://t.test/\x1b[31m", "https://[::1/token",
    "https://t.test:99999/token") + tuple(
        "https://%s/token" % host for host in NET_ODD_HOSTS))

#: (registry, realm, hosts allowed by the user, may it have the password). T72
NET_TRUST = (
    ("https://registry.test/v2/", "https://registry.test/token", (), True),
    ("https://registry.test/v2/", "https://registry.test:8443/token", (), True),
    ("http://registry.test/v2/", "http://registry.test/token", (), True),
    ("https://registry-1.docker.io/v2/", "https://auth.docker.io/token", (), True),
    ("https://registry.a.test/v2/", "https://auth.a.test/token", (), True),
    ("https://registry.a.test/v2/", "https://a.test/jwt/auth", (), True),  # gitlab.com
    ("https://registry.test/v2/", "https://evil.test/token", (), False),
    ("https://registry.test/v2/", "https://evil.test/token", ("evil.test",), True),
    ("https://registry.test/v2/", "https://evil.test/token", ("vil.test",), False),
    ("https://registry.test/v2/", "https://evil.test/token", ("Evil.test:443",), True),
    ("https://registry.test/v2/", "https://evil.test/token", ("evil.test:80",), False),
    ("https://registry-1.docker.io/v2/", "https://auth.docker.io.evil/", (), False),
    ("https://other.test/v2/", "https://auth.docker.io/token", (), False),
    ("https://registry.a.test/v2/", "https://registry.a.test.evil/token", (), False),
    ("https://registry.a.test/v2/", "https://auth.eva.test/token", (), False),
    ("http://registry.a.test/v2/", "http://auth.a.test/token", (), False),  # no TLS
    ("https://10.1.2.3/v2/", "https://10.1.2.4/token", (), False),
    ("https://10.1.2.3/v2/", "https://9.1.2.3/token", (), False),
    ("https://localhost/v2/", "https://127.0.0.1/token", (), False),
    ("https://shop.co.uk/v2/", "https://evil.co.uk/token", (), False),  # two shops
)

#: (JSON of a token server, its token, None where it must be refused). T84
NET_TOKENS = (
    ('{"token": "abc.D-_~+/="}', "abc.D-_~+/="), ('{"access_token": "abc"}', "abc"),
    ('{"token": "abc", "access_token": "abc"}', "abc"),
    ('{"token": "abc", "access_token": "other"}', "abc"),
    ('{"token": "", "access_token": "abc"}', "abc"),
    ('{"token": "%s"}' % ("a" * 65536), "a" * 65536),
    ('{"token": "%s"}' % ("a" * 65537), None), ('{"token": "a\\r\\nX-Evil: 1"}', None),
    ('{"token": "a b"}', None), ('{"token": "\\u00e9"}', None),
    ('{"token": "\\ud800"}', None), ('{"token": "a\\u0000"}', None),
    ('{"token": 5}', None), ('{"token": ["abc"]}', None), ('{"token": ""}', None),
    ("{}", None), ('["abc"]', None), ('"abc"', None), ("abc", None), ("", None),
    ('{"token": "abc"} {"token": "other"}', None),
    ('{"token": "abc", "token": "other"}', None),  # T35
    ("[" * 100000, None),  # T54
    ("<html>Sign in</html>", None),
    (" " * (imagec.TOKEN_LIMIT + 1) + '{"token": "abc"}', None),  # T52
)

#: (expires_in as JSON, seconds the token is used). T107
NET_LIFETIMES = (
    (None, 60), ("300", 300), ("1", 1), ("0", 60), ("-1", 60), ("1.5", 60),
    ('"300"', 60), ("true", 60), ("null", 60), ("[]", 60), ("999999999999", 999999999999),
)


class AuthorizationTest(NetworkCase):
    """Challenge -> token."""

    @rows(NET_CHALLENGES)
    def test_t86_challenges(self, values, expected):
        found = imagec.Challenge.parse(values)
        self.assertEqual([tuple(challenge) for challenge in found], expected)

    def test_t63_challenges_take_linear_time(self):
        with cpu_within(5):
            for unit in ('a="\\', "a=", ",", 'a="', "\\", "Bearer ", "a ", "a=b "):
                imagec.Challenge.parse(["Bearer " + unit * (60000 // len(unit))])

    @rows([(['Basic realm="b"', 'Bearer realm="r"'], "bearer"),
           (['Bearer realm="r"', 'Basic realm="b"'], "bearer"),
           (['Negotiate, Basic realm="b"'], "basic"), (["Negotiate"], None),
           ([], None)])
    def test_bearer_is_preferred(self, values, expected):
        chosen = imagec.Challenge.choose(imagec.Challenge.parse(values))
        self.assertEqual(chosen and chosen.scheme, expected)

    @rows(NET_REALMS)
    def test_t72_t77_t79_t85_t93_realms(self, realm, service, expected):
        named = {"realm": realm, "service": service,
                 "scope": "repository:other:pull,push"}  # the scope is ours
        challenge = imagec.Challenge("bearer", {
            name: value for name, value in named.items() if value is not None})
        self.gives(expected and expected.format(scope="repository%3Aa%2Fb%3Apull"),
                   lambda: imagec.auth_url(challenge, "a/b", "https://registry.test/v2/"),
                   imagec.ImagecError)

    @rows([("repository:x/y:pull", "x/y"), ("repository:a/b:pull", ""), ("", ""),
           ("repository:x:pull,push", ""), ("repository:x:*", ""),
           ("registry:catalog:*", ""), ("repository:x:y:pull", ""),
           ("repository:x:pull repository:y:push repository:x:pull,push "
            "repository:z:pull", "x z")])
    def test_other_scopes_that_only_read(self, scope, more):
        challenge = imagec.Challenge("bearer", {"realm": "/token", "scope": scope})
        url = imagec.auth_url(challenge, "a/b", "https://registry.test/v2/")
        asked = ["repository:%s:pull" % one for one in ["a/b"] + more.split()]
        query = urllib.parse.urlsplit(url).query
        self.assertEqual(urllib.parse.parse_qs(query), {"scope": asked})
        _, _, form = imagec._oauth_form(url, IDENTITY_TOKEN)
        self.assertEqual(urllib.parse.parse_qs(form.decode("ascii"))["scope"],
                         [" ".join(asked)])

    def test_a_scope_is_for_the_repository_it_was_named_for(self):
        # ghcr.io names a made-up one at /v2/, and denies what names one that is denied.
        registry = self.filled(auth="bearer")
        registry.add("other", "1", self.image)
        named = 'Bearer realm="%s/token",service="fixture",scope="repository:%s:%s"'
        registry.fault("/v2/$", headers(www_authenticate=named % (
            registry.url, "user/image", "pull")), None, challenged=True)
        registry.challenge = named % (registry.url, "app", "metadata_read")
        with mock.patch.object(FakeRegistry, "_grants",
                               side_effect=[False, False, True, True]):
            client = self.client(registry, "alice")
            list(client.tags("app"))
            client.fetch_manifest("other", "1")
        app, other = ("repository:%s:pull" % name for name in ("app", "other"))
        self.assertEqual(
            [request.query["scope"] for request in registry.requests
             if request.route == "/token"],
            [[app], [app, "repository:app:metadata_read"], [other]])

    @rows(NET_TRUST)
    def test_t72_whom_the_password_is_trusted_to(self, home, realm, allowed, trusted):
        secret = imagec.Credentials("alice", PASSWORD)
        asking = self.asking(home, realm, secret, token_hosts=allowed)
        with mock.patch("imagec.fetch_token") as fetch:
            fetch.return_value = imagec.Token("t", 1e99)
            self.assertEqual(asking.authorization("s"), "Bearer t")
        self.assertEqual(fetch.call_args[0][2] is secret, trusted, (realm, allowed))

    @rows(NET_TOKENS)
    def test_t84_tokens(self, text, expected):
        server = self.server({"/token": say(text.encode("ascii"))})
        self.gives(expected, lambda: imagec.fetch_token(
            self.transport(), server.url + "/token").value,
            imagec.InvalidDocument, "token")

    @rows(NET_LIFETIMES)
    def test_t107_lifetimes(self, text, seconds):
        said = "" if text is None else ', "expires_in": ' + text
        # issued_at is the server's clock, and no business of ours (T116)
        said = '{"token": "t"%s, "issued_at": "1970-01-01T00:00:00Z"}' % said
        server = self.server({"/token": say(said.encode("ascii"))})
        token = imagec.fetch_token(self.transport(clock=lambda: 1000.0),
                                   server.url + "/token")
        self.assertEqual(token.expires, 1000.0 + seconds)

    #: (whether TLS is spoken at first, then; other name; token hosts; whether the
    #: password goes along, None where the redirect is refused)
    @rows([(False, False, "", (), False), (False, True, "", (), True),
           (True, True, "", (), False), (True, False, "", (), None),
           (False, False, "", ("127.0.0.1",), True),
           (True, True, "", ("127.0.0.1:{port}",), True),
           (False, False, "", ("127.0.0.1:1",), False),
           (False, False, "localhost", (), None),
           (False, True, "localhost", ("localhost",), None)])
    def test_t73_token_requests_stay_at_their_host(self, first, then, name, named, lent):
        other = self.server({"/token": say(b'{"token": "t"}')}, then)
        server = self.server({"/there": to("%s://%s/token" % (
            "https" if then else "http", by_name(name, other) if name else
            other.host))}, first)
        del self.said[:]
        self.gives(None if lent is None else "t", lambda: imagec.fetch_token(
            self.transport(), server.url + "/there",
            imagec.Credentials("alice", PASSWORD),
            token_hosts=[one.format(port=other.port) for one in named]).value,
            imagec.UnsafeRedirect, "another host" if name else "https to http")
        self.assertEqual(len(other.requests), lent is not None)
        self.assertEqual(len(authorizations(other)), bool(lent))
        self.assertEqual(len(authorizations(server)), 1)
        self.assertEqual(["--token-host " + other.host in said for said in self.said],
                         [True] * (lent is False))

    def test_t73_token_requests_may_be_led_on(self):
        server = self.server({"/here": to("/token"), "/token": say(b'{"token": "t"}')})
        imagec.fetch_token(self.transport(storage_hosts=[server.host]),
                           server.url + "/here", imagec.Credentials("alice", PASSWORD))
        self.assertEqual(len(authorizations(server)), 2)

    @rows(NET_NEARNESS)
    def test_t74_realms_lead_no_nearer(self, home, target, allowed):
        server = self.server({"/token": say(b'{"token": "t"}')})
        asking = self.asking("http://%s/v2/" % home,
                             "http://%s/token" % by_name(target, server),
                             rank=imagec._address_rank(NET_PLACES[home]))
        del self.reached[:]
        self.gives("Bearer t" if allowed else None, lambda: asking.authorization("s"),
                   imagec.TransportError)
        self.assertEqual(bool(self.reached), allowed, target)

    @rows([((), False), (("private.test:1", "test"), False), (("private.test",), True),
           (("private.test:{port}",), True)])
    def test_t74_a_token_server_that_the_user_names_may_be_anywhere(self, named, good):
        server = self.server({"/token": say(b'{"token": "t"}')})
        realm = by_name("private.test", server)
        asking = self.asking(
            "http://public.test/v2/", "http://%s/token" % realm, rank=0,
            token_hosts=[one.format(port=server.port) for one in named])
        self.gives("Bearer t" if good else None, lambda: asking.authorization("app"),
                   imagec.UnsafeRedirect, "10.1.2.3",
                   "allow it with --token-host " + realm)
        self.assertEqual(bool(self.reached), good)

    def test_t74_a_private_registry_may_have_a_private_realm(self):
        registry = self.filled(auth="bearer")
        place = by_name("private.test", registry)
        registry.challenge = 'Bearer realm="http://%s/token"' % place
        client = self.client(registry, "alice", host=place, allow_http=True)
        client.fetch_manifest("app", "1")
        self.assertEqual(set(self.reached), {"10.1.2.3"})

    def test_secrets_have_no_repr(self):
        credentials = imagec.Credentials("alice", PASSWORD)
        for secret in (credentials, imagec.Token(PASSWORD, 5)):
            self.assertNotIn(PASSWORD, repr(secret) + str(secret))
        self.assertEqual(imagec.Credentials("a", "\xe9:").basic(), "Basic YTrDqTo=")


class AuthorizedTest(NetworkCase):
    """Registries that ask for tokens and passwords."""

    def bearer(self, **options):
        return self.filled(**dict({"auth": "bearer"}, **options))

    def visit(self, client):
        """The manifest, the config and every layer."""
        manifest = client.fetch_manifest("app", "1")
        imagec.fetch_blob(client, "app", manifest.config)
        for layer in manifest.layers:
            with client.open_blob("app", layer) as response:
                response.read(imagec.MIB, "layer")

    def test_asked_for_nothing_we_give_nothing(self):
        registry, elsewhere = self.bearer(auth=None), self.bearer()
        self.visit(self.client(registry, "alice"))
        self.assertEqual(authorizations(registry, elsewhere), [])
        self.assertEqual(elsewhere.connections, 0)
        self.assertEqual(paths(registry, "token"), [])

    @rows([("bearer", None, "anonymous"), ("bearer", "mallory", "mallory"),
           ("basic", None, "user name and password"),
           ("basic", "mallory", "access denied")])
    def test_denied(self, auth, credentials, words):
        registry = self.bearer(auth=auth, anonymous=False)
        with self.fails(imagec.AccessDenied, words) as caught:
            self.client(registry, credentials).fetch_manifest("app", "1")
        self.assertEqual(imagec.exit_status(caught.exception), 5)
        self.assertLessEqual(len(registry.requests), 3)
        self.assertEqual(self.naps, [])

    def test_basic_asked_where_reading_is_free(self):
        registry = self.bearer(auth=None)
        registry.fault("GET /v2/$", status(401, {"WWW-Authenticate": "Basic x=y"}), EVER)
        client = self.client(registry)
        self.visit(client)
        self.assertEqual(authorizations(registry), [])
        self.assertIsNone(client.learn_auth_url("app", "1"))
        self.visit(self.client(registry, "alice"))
        self.assertTrue(authorizations(registry))

    def test_redirected_to_a_registry_with_tokens_of_its_own(self):
        other, registry = self.bearer(), self.bearer(anonymous=False)
        for word in ("manifests", "blobs"):
            registry.fault("GET .*/%s/" % word, lambda reply: redirect(
                other.url + registry.requests[-1].path)(reply), EVER)
        self.visit(self.client(registry, "alice"))
        self.assertTrue(authorizations(other))
        self.assertFalse(set(authorizations(other)) & set(authorizations(registry)))
        self.assertEqual({value.split()[0] for value in authorizations(other)},
                         {"Bearer"})
        other.fault("/manifests/", status(403))  # who we are at home is not to blame
        with self.fails(imagec.AccessDenied, other.host, "(anonymous)"):
            self.visit(self.client(registry, "alice"))
        other.anonymous = False  # and then nobody else's will do
        with self.fails(imagec.AccessDenied, other.host):
            self.visit(self.client(registry, "alice"))

    def test_t63_where_a_redirect_leads_is_read_in_linear_time(self):
        registry = self.bearer()
        registry.fault("/manifests/", redirect(
            "http://%s/%s" % (by_name("localhost", registry), "v2/" * 18000)))
        registry.fault("/v2/v2/", status(401))
        with cpu_within(5), self.fails(imagec.AccessDenied, "localhost"):
            self.client(registry).fetch_manifest("app", "1")

    def test_bearer_beside_basic(self):
        registry = self.bearer()
        bearer = 'Bearer realm="%s/token"' % registry.url
        for challenge in (['Basic realm="b"', bearer], [bearer, 'Basic realm="b"'],
                          'Negotiate, Basic realm="b", ' + bearer):
            with self.subTest(challenge=challenge):
                registry.challenge = challenge
                del registry.requests[:]
                self.visit(self.client(registry, "alice"))
                basic = [r.route for r in registry.requests
                         if r.headers.get("Authorization", "").startswith("Basic")]
                self.assertEqual(basic, ["/token"])

    def test_t107_a_token_that_runs_out_is_renewed(self):
        registry = self.bearer()
        registry.token_uses = 2
        self.visit(self.client(registry, "alice"))
        blobs = paths(registry, "/blobs/")
        self.assertEqual(len(set(blobs)), 4)
        self.assertEqual(len(paths(registry, "/token")), 3)  # for five requests
        self.assertEqual(self.naps, [])

    def test_t107_the_same_request_is_repeated(self):
        registry = self.bearer()
        client = self.client(registry)
        blob = imagec.Descriptor("", imagec.Digest.parse(self.image.layers[0]), None)
        client.open_blob("app", blob).close()
        registry.token_uses = 1
        with client.open_blob("app", blob, 7) as response:
            self.assertEqual(response.status, 206)
        asked = [r.headers["Range"] for r in registry.requests if "/blobs/" in r.path]
        self.assertEqual(asked, [None] + ["bytes=7-"] * 2)

    def test_expired_tokens_are_not_tried(self):
        now = [0.0]
        registry = self.bearer()
        transport = self.transport(clock=lambda: now[0])
        client = self.client(registry, transport=transport)
        client.fetch_manifest("app", "1")
        for later, tokens in ((299.0, 1), (301.0, 2)):
            now[0] = later
            client.fetch_manifest("app", "1")
            self.assertEqual(len(paths(registry, "/token")), tokens)

    @rows([("bearer", ['Bearer realm="{url}/token"']), ("basic", ['Basic realm="b"']),
           ("alternating, T78", ['Bearer realm="{url}/token"', 'Basic realm="b"']),
           ("unknown", ["Negotiate"]), ("none", [None])])
    def test_t64_t78_401_for_ever(self, _name, challenges):
        registry, turns = self.bearer(), itertools.cycle(challenges)

        def unwelcome(_reply):
            challenge = next(turns)
            return Reply(401, headers={"WWW-Authenticate": challenge and
                                       challenge.format(url=registry.url)})

        registry.fault("/manifests/", unwelcome, EVER, challenged=True)
        with self.fails(imagec.AccessDenied):
            self.client(registry, "alice").fetch_manifest("app", "1")
        self.assertLessEqual(len(registry.requests), 6)
        self.assertEqual(self.naps, [])

    @rows([("", 0), ("localhost", 1), ("LOCALHOST:{port}", 1), ("localhost:1", 0),
           ("http://localhost:{port}/token?x#y", 1), ("HTTP://localhost", 1),
           ("https://localhost:1/token", 0)])
    def test_t72_a_foreign_realm_gets_no_password(self, allowed, seen):
        tokens = self.bearer()
        place = by_name("localhost", tokens)
        registry = self.bearer(realm="http://%s/token" % place)
        allowed = allowed and (
            "--token-host", allowed.format(port=place.rpartition(":")[2]))
        ended = self.main("layers", "-q", "-u", "alice", *allowed,
                          registry.host + "/app:1", IMAGEC_PASSWORD=PASSWORD)
        self.assertEqual(ended.status, 0, ended.err)
        self.assertEqual(len(authorizations(tokens)), seen)
        self.assertEqual(ended.err, "" if seen else (
            "imagec: warning: no password sent to http://%s/token, which is not a token "
            "server of %s: allow it with --token-host %s\n" % (
                place, registry.host, place)))

    @rows([("by the token server", {"anonymous": False}, {}),
           ("by the registry", {}, {"tokens": {}})])
    def test_t72_denied_for_want_of_a_password(self, _name, theirs, ours):
        tokens = self.bearer(**theirs)
        place = by_name("localhost", tokens)
        registry = self.bearer(realm="http://%s/token" % place, **ours)
        ended = self.main("digest", "-q", "-u", "alice", registry.host + "/app:1",
                          IMAGEC_PASSWORD=PASSWORD)
        self.assert_one_line(
            ended, 5, r"\(anonymous\).*; no password sent .*--token-host %s\n" % place)

    def test_t70_a_blob_hosts_401_gets_no_password(self):
        cdn = self.bearer(auth=None)
        cdn.fault("/cdn/", status(401, {"WWW-Authenticate": 'Basic realm="evil"'}))
        registry = self.bearer(auth="basic")
        registry.redirect_blobs_to = cdn.url
        with self.fails(imagec.AccessDenied):
            self.visit(self.client(registry, "alice"))
        self.assertEqual(authorizations(cdn), [])

    def test_t87_each_repository_has_its_token(self):
        registry = self.bearer()
        registry.add("other", "1", self.image)
        client = self.client(registry, "alice")
        for name in ("app", "other", "app", "other"):
            client.fetch_manifest(name, "1")
        asked = [(r.query["scope"], r.query["service"], r.headers["Authorization"][:6])
                 for r in registry.requests if r.route == "/token"]
        self.assertEqual(asked, [(["repository:%s:pull" % name], ["fixture"], "Basic ")
                                 for name in ("app", "other")])
        self.assertEqual(len(set(authorizations(registry))), 3)  # two tokens, one Basic

    @rows([("missing", status(404), 1, imagec.NotFound, "token"),
           ("forbidden", status(403), 1, imagec.AccessDenied, "alice"),
           ("busy for ever", status(503), 5, imagec.RegistryError, "503"),
           ("page", body(b"<html>"), 1, imagec.InvalidDocument, "token"),
           ("endless, T52", endless(), 1, imagec.LimitExceeded, "token")])
    def test_token_server_faults(self, _name, action, times, kind, words):
        registry = self.bearer()
        registry.fault("/token", action, times)
        with self.fails(kind, words):
            self.client(registry, "alice").fetch_manifest("app", "1")
        self.assertEqual(len(paths(registry, "/token")), times)

    def test_a_401_gives_its_connection_back(self):
        registry = self.bearer()
        registry.fault("GET /v2/$", status(200))
        registry.fault("/token", status(403))
        with self.fails(imagec.AccessDenied, "token"):
            self.client(registry).fetch_manifest("app", "1")
        self.assertEqual(registry.connections, 2)  # TLS was tried first


# -- Registry

#: (name, FakeRegistry's options, root to trust, our options, scheme, None where the
#: certificate is refused, connections)
NET_PROBES = (
    ("loopback, plain", {}, None, {}, "http", 2),
    ("loopback, TLS", {"tls": True}, TEST_CERT, {}, "https", 1),
    ("asks for a token", {"tls": True, "auth": "bearer"}, TEST_CERT, {}, "https", 1),
    ("asks for a password", {"tls": True, "auth": "basic"}, TEST_CERT, {}, "https", 1),
    ("untrusted", {"tls": True}, None, {}, None, 2),
    ("wrong host", {"tls": "wrong-host"}, OTHER_CERT, {}, None, 2),
    ("expired", {"tls": "expired"}, EXPIRED_CERT, {}, None, 2),
    ("untrusted, unverified", {"tls": True}, None, {"skip": True}, "https", 1),
    ("wrong host, unverified", {"tls": "wrong-host"}, None, {"skip": True}, "https", 1),
    ("expired, unverified", {"tls": "expired"}, None, {"skip": True}, "https", 1),
    # What does not speak TLS does not speak it unverified.
    ("plain, http allowed", {}, None, {"http": True}, "http", 2),
    ("TLS, http allowed", {"tls": True}, TEST_CERT, {"http": True}, "https", 1),
    ("untrusted, http allowed", {"tls": True}, None, {"http": True}, "https", 2),
)

#: (what answers the first bytes of a connection to the TLS port,). T114
NET_NO_TLS = (
    (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
     "it answers in plain HTTP/1.1 400 Bad Request;"),
    (b"HTTP/1.0 403 No\x1b[2J\r\n\r\nclient sent TLS to plain port",
     "it answers in plain HTTP/1.0 403 No\\x1b[2J;"),
    # What else such words mean, they do not from outside of TLS.
    (b"HTTP/1.1 400 CERTIFICATE_VERIFY_FAILED\r\n\r\n", "400 CERTIFICATE_VERIFY_FAILED;"),
    (b"HTTP/1.1 400 an alert: no certificate\r\n\r\n", "400 an alert: no certificate;"),
    (b"SSH-2.0-OpenSSH_9.6\r\n", "TLS failed"),
    (b"220 mail.test ESMTP ready\r\n", "TLS failed"),
)

#: (name, what the manifest's reply becomes, error unless it is taken, words)
NET_MANIFEST_REPLIES = (
    ("as it is", lambda reply: reply), ("chunked", chunked()),
    ("without a length", close_delimited()),
    ("no digest header", headers(docker_content_digest=None)),
    ("no content type", headers(content_type=None)),
    ("parameter", headers(content_type=MEDIA_TYPES["oci"]["manifest"] + "; a=b")),
    ("lying header, sha512", headers(docker_content_digest="sha512:" + "0" * 128),
     imagec.DigestMismatch, "disagree", "sha512:000"),
    ("senseless header", headers(docker_content_digest="sha256:../../x")),
    ("bare header", headers(docker_content_digest=sha256(b"")[7:])),
    ("empty header", headers(docker_content_digest="")),
    ("compressed besides", lambda reply: body(gzip_bytes(
        reply.body), content_encoding="gzip")(reply)),
    ("said to be compressed", headers(content_encoding="br")),
    ("type of an index", headers(content_type=MEDIA_TYPES["oci"]["index"]),
     imagec.InvalidDocument),  # T34
    ("page, T112", body(b"<!DOCTYPE html><html>", content_type="text/html"),
     imagec.InvalidDocument),
    ("empty, T112", body(b""), imagec.InvalidDocument),
    ("flipped bit", flip(40), imagec.ImagecError),
    ("one byte too many", extra(1), imagec.ImagecError),  # a NUL is no JSON
    ("endless, T52", endless(), imagec.LimitExceeded, "4194304"),
    ("endless drip, T52", endless(bytes(BLOCK), 0.001), imagec.LimitExceeded, "4194304"),
    ("not modified", status(304), imagec.RegistryError, "304"),
)

#: (code, body's errors, error class, words), each one request. T106
NET_REFUSALS = (
    (400, [("TAG_INVALID", "odd")], imagec.RegistryError, "TAG_INVALID: odd"),
    (403, [("DENIED", "go away")], imagec.AccessDenied, "DENIED: go away"),
    (404, [("MANIFEST_UNKNOWN", "no manifest")], imagec.NotFound, "no manifest"),
    (404, [("NAME_UNKNOWN", "no such repository")], imagec.NotFound, "NAME_UNKNOWN"),
    (404, [("DENIED", "not yours")], imagec.AccessDenied, "not yours"),
    (404, [], imagec.NotFound, "HTTP 404"),
    (405, [("UNSUPPORTED", "no")], imagec.RegistryError, "UNSUPPORTED"),
    (410, [], imagec.RegistryError, "HTTP 410"),
    (451, [], imagec.RegistryError, "HTTP 451"),
    (404, [("\x1b]0;x\x07", "\x9b31m\u202e")], imagec.NotFound, "\\x1b]0;x"),  # T07
    (404, [("A", "x" * 9999)], imagec.NotFound, "xxx..."),
    (404, [("A", "\ud800")], imagec.NotFound, "HTTP 404"),  # T13
    (404, [(5, "x")], imagec.NotFound, "HTTP 404"),
)

#: (Link of the first page of two, tags, None where it must be refused). T15
NET_LINKS = tuple((link.format(list="/v2/app/tags/list?last=b", next='rel="next"',
                               host="{host}", port="{port}", url="{url}"), tags)
                  for tags, links in (
    ("abcd", ("<{list}>; {next}", "<{list}>; rel=next", "  <{list}>;  {next}; x=y",
              "<list?last=b>; {next}", "<?last=b>; {next}", "<{url}{list}>; {next}",
              "<https://{host}{list}>; rel=\"Next\"",  # asked as before
              "<http://127.0.0.1{list}>; rel=next")),
    ("ab", ("<{list}>; rel=\"prev\"", "<{list}>; rel=\"nextish\"", "<{list}>", "junk",
            "")),
    (None, ("<>; {next}",  # is the same page again
            "<http://localhost:{port}{list}>; {next}", "<//evil.test{list}>; {next}",
            "<file:///etc/passwd>; {next}", "</other/list>; {next}",
            "<http://a@{host}{list}>; {next}",  # T93
            "<http://[::1/v2/>; {next}", "<http://127.0.0.1%3a{port}{list}>; {next}"))
) for link in links)


class ProbeTest(NetworkCase):
    """Is there a registry, and how is it spoken to?"""

    def probe(self, registry, root=None, skip=False, http=False, host=None):
        cacert = root and self.file("ca.pem", root.encode("ascii"))
        transport = self.transport(skip_verify=skip, cacert=cacert)
        client = self.client(registry, "alice", host, transport, allow_http=http)
        return client.learn_registry_url()

    @rows(NET_PROBES)
    def test_schemes_and_certificates(self, _name, kind, root, options, scheme, tries):
        os.environ["SSL_CERT_FILE"] = self.file("others.pem", OTHER_CERT)
        registry = self.registry(**kind)
        self.gives(scheme and "%s://%s/v2/" % (scheme, registry.host),
                   lambda: self.probe(registry, root, **options),
                   imagec.CertificateError, registry.host, "--insecure-skip-verify")
        self.assertEqual(authorizations(registry), [])
        self.assertEqual([r.method for r in registry.requests], ["GET"] * bool(scheme))
        self.assertEqual((registry.connections, self.naps), (tries, []))

    @rows([(False, imagec.TransportError), (True, imagec.CertificateError)])
    def test_t76_no_fallback_for_other_hosts(self, tls, error):
        registry = self.registry(tls=tls)
        place = by_name("registry.test", registry)
        with self.fails(error, place):
            self.probe(registry, host=place)
        self.assertEqual(registry.requests, [])

    def test_t76_http_comes_last(self):
        place = by_name("registry.test", self.registry(tls=True))
        found = self.probe(None, host=place, http=True)
        self.assertEqual(found, "https://%s/v2/" % place)  # unverified, and stays so

    @rows([(False,), (True,)])
    def test_t76_an_answer_over_tls_is_the_answer(self, http):
        registry = self.registry(tls=True)
        registry.fault("GET /v2/$", status(410))
        with self.fails(imagec.RegistryError, "no registry"):
            self.probe(registry, TEST_CERT, http=http)
        self.assertEqual(registry.connections, 1)

    @rows([row + (skip,) for row in NET_NO_TLS for skip in (False, True)])
    def test_t114_no_tls_spoken(self, junk, words, skip):
        registry = self.registry(tls=True)
        registry.fault("", garbage(junk, "accept"))
        with self.fails(imagec.TransportError, words, "--insecure-allow-http"):
            self.probe(registry, skip=skip, host=by_name("registry.test", registry))
        self.assertEqual(registry.connections, 1)

    @rows([("404", status(404), 1, None, ""), ("403", status(403), 1, None, ""),
           ("405", status(405), 1, None, ""), ("501", status(501), 1, None, ""),
           ("410", status(410), 1, imagec.RegistryError, "no registry"),
           ("page", status(200, {"Content-Type": "text/html"}), 1, None, ""),
           ("no content", status(204), 1, imagec.RegistryError, "204"),
           ("a proxy's word, of none", status(407), 1, imagec.RegistryError,
            "no registry"),
           ("too many for ever", status(429), 5, imagec.RegistryError,
            "is out of order: too many requests"),
           ("busy for ever", status(503), 5, imagec.RegistryError, "503"),
           ("busy once", status(503), 1, None, ""),
           ("reset once", reset(0.5, "headers"), 1, None, "")])
    def test_answers(self, _name, action, times, kind, words):
        registry = self.registry(tls=True)
        registry.fault("GET /v2/$", action, times)
        self.gives(None if kind else registry.url + "/v2/",
                   lambda: self.probe(registry), kind, registry.host, words)
        self.assertTrue(kind is None or len(registry.requests) == times)

    @rows([(404,), (403,), (501,)])
    def test_static_files_have_no_more_than_manifests(self, code):
        registry = self.filled(tls=True)
        registry.fault("GET /v2/$", status(code), EVER)
        client = self.client(registry)
        self.assertEqual(client.fetch_manifest("app", "1").raw, self.image.manifest)
        with self.fails(imagec.NotFound, "its /v2/ answers HTTP %d" % code):
            client.fetch_manifest("app", "2")

    def test_t112_the_version_header_is_a_hint(self):
        registry = self.registry()
        registry.version_header = False
        self.assertEqual(self.probe(registry), registry.url + "/v2/")

    def test_t112_redirects(self):
        registry, other = self.registry(tls=True), self.registry(tls=True)
        for name, location, expected in (
                ("its own path", "/v2/?x=y", registry.url),
                ("another port", other.url + "/v2/", other.url)):
            with self.subTest(name):
                registry.fault("GET /v2/$", redirect(location, 301))
                self.assertEqual(self.probe(registry), expected + "/v2/")
        registry.fault("GET /v2/$", redirect("http://%s/v2/" % other.host))
        with self.fails(imagec.UnsafeRedirect, "https to http"):
            self.probe(registry)
        plain = self.registry()
        plain.fault("GET /v2/$", redirect(other.url + "/v2/"))
        self.assertEqual(self.probe(plain), other.url + "/v2/")

    @rows([("93.184.216.34", "127.0.0.1", False), ("93.184.216.34", "10.1.2.3", False),
           ("10.1.2.3", "169.254.169.254", False), ("10.1.2.3", "10.9.9.9", True),
           ("127.0.0.1", "10.1.2.3", True), ("93.184.216.34", "93.184.216.35", True)])
    def test_t74_a_registry_comes_no_nearer(self, first, then, allowed):
        registry = self.filled()
        registry.fault("GET /v2/$", truncate(1.0))
        place = by_name("public.test", registry)
        client = self.client(registry, "alice", place, allow_http=True)
        del self.reached[:]
        with mock.patch.dict(NET_PLACES):
            NET_PLACES["public.test"] = first
            client.learn_registry_url()
            NET_PLACES["public.test"] = then
            self.gives(self.image.manifest if allowed else None,
                       lambda: client.fetch_manifest("app", "1").raw,
                       imagec.UnsafeRedirect, then)
        self.assertEqual(then in self.reached, allowed)

    @rows([("private.test",), ("localhost",)])
    def test_t74_a_registry_may_send_its_probe_elsewhere(self, home):
        registry, other = self.filled(), self.registry()
        registry.fault("GET /v2/$", [truncate(1.0), redirect(
            "http://%s/v2/" % by_name("public.test", other))])
        client = self.client(registry, host=by_name(home, registry), allow_http=True)
        client.fetch_manifest("app", "1")

    def test_nothing_listens(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and never listens
            place = "127.0.0.1:%d" % taken.getsockname()[1]
            with threat_alarm(15), self.fails(imagec.TransportError, place, "refused"):
                self.probe(None, host=place)
        self.assertEqual(self.naps, [])

    def test_t110_unknown_host(self):
        with self.fails(imagec.TransportError, "cannot resolve host registry.invalid"):
            self.probe(None, host="registry.invalid")
        self.assertEqual(self.naps, [])

    def test_probed_once(self):
        registry = self.filled()
        client = self.client(registry)
        workers = [threading.Thread(target=client.learn_registry_url) for _ in range(5)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        client.fetch_manifest("app", "1")
        self.assertEqual(len([r for r in registry.requests if r.route == "/v2/"]), 1)


class RegistryTest(NetworkCase):
    """The distribution API."""

    def resolve(self, registry, platform="linux/amd64"):
        """What app:1 is for a platform."""
        return self.session().resolve(
            imagec.Reference.parse(registry.host + "/app:1"),
            platform if platform == "all" else imagec.Platform.parse(platform))

    @rows([("oci",), ("docker",), ("schema1",), ("schema1-signed",)])
    def test_every_kind_by_tag_and_by_digest(self, kind):
        image = build_image(NET_TARS, kind)
        client = self.client(self.filled(image))
        for reference in ("1", imagec.Digest.parse(image.digest)):
            found = client.fetch_manifest("app", reference)
            self.assertEqual(found.raw, image.manifest)
            self.assertEqual(str(found.digest), image.digest)

    def test_one_accept_header_for_all(self):
        registry = self.filled()
        self.client(registry).fetch_manifest("app", "1")
        sent = registry.requests[-1].headers.get_all("Accept")
        self.assertEqual(len(sent), 1)  # a poor one is answered with schema1
        kinds = {types["manifest"] for types in MEDIA_TYPES.values()}
        kinds |= {MEDIA_TYPES[kind]["index"] for kind in ("oci", "docker")}
        self.assertEqual(set(sent[0].split(", ")), kinds)

    @rows(NET_MANIFEST_REPLIES)
    def test_manifest_replies(self, _name, action, kind=None, *words):
        registry = self.filled()
        registry.fault("GET .*/manifests/", action)
        self.gives(None if kind else self.image.manifest,
                   lambda: self.client(registry).fetch_manifest("app", "1").raw,
                   kind, *words)
        self.assertEqual(len(registry.requests), 2)  # one is the probe

    @rows([(NetworkCase.image.digest,), (NET_OTHER.digest,), (None,)])
    def test_t20_the_users_digest_decides(self, claimed):
        wanted, registry = imagec.Digest.parse(self.image.digest), self.filled()
        registry.fault("/manifests/", body(
            NET_OTHER.manifest, docker_content_digest=claimed))
        with self.fails(imagec.DigestMismatch, str(wanted), NET_OTHER.digest):
            self.client(registry).fetch_manifest("app", wanted)

    def test_t24_sizes_are_checked_too(self):
        client = self.client(self.filled())
        wanted = imagec.Digest.parse(self.image.digest)
        size = len(self.image.manifest)
        client.fetch_manifest("app", wanted, size)
        for wrong in (0, size - 1, size + 1):
            with self.subTest(size=wrong), self.fails(imagec.SizeMismatch, str(size)):
                client.fetch_manifest("app", wanted, wrong)

    @rows(itertools.product((0, 1, 0.5, -1), (False, True)))
    def test_t22_t23_cut_manifests_are_asked_for_again(self, amount, tls):
        registry = self.filled(tls=tls)
        registry.fault("/manifests/", truncate(amount))
        found = self.client(registry).fetch_manifest("app", "1")
        self.assertEqual(found.raw, self.image.manifest)

    def test_t41_a_tag_is_read_once(self):
        registry = self.filled(build_index([(self.image, ("linux", "amd64", None))]))
        self.resolve(registry)
        self.assertEqual(paths(registry, "/manifests/"),
                         ["GET /v2/app/manifests/1",
                          "GET /v2/app/manifests/" + self.image.digest])

    def test_t42_the_digest_wins_over_the_tag(self):
        registry = self.filled(NET_OTHER)
        registry.add("app", None, self.image)
        text = "%s/app:1@%s" % (registry.host, self.image.digest)
        found = self.session().manifest(imagec.Reference.parse(text))
        self.assertEqual(found.raw, self.image.manifest)

    @rows(itertools.product((1, 2, imagec.INDEX_DEPTH_LIMIT,
                             imagec.INDEX_DEPTH_LIMIT + 1), ("linux/amd64", "all")))
    def test_t60_nested_indexes(self, depth, platform):
        nested = build_index([(self.image, ("linux", "amd64", None))])
        for _ in range(1, depth):
            nested = build_index([(nested, None)])
        registry = self.filled(nested)
        if depth > imagec.INDEX_DEPTH_LIMIT:
            with self.fails(imagec.LimitExceeded, "indexes"):
                self.resolve(registry, platform)
        else:
            found = self.resolve(registry, platform)
            self.assertEqual(len(found.indexes), platform != "all" and depth)
            self.assertEqual(str(found.digest), nested.digest)

    def test_documents_are_asked_for_once(self):
        top = build_index([(self.image, ("plan9", "mips", None))])
        for _ in range(imagec.INDEX_DEPTH_LIMIT - 1):
            top = build_index([(top, None)] * 3)
        registry = self.filled(top)
        with self.fails(imagec.NoMatchingPlatform, registry.host + "/app"):
            self.resolve(registry)
        asked = paths(registry, "sha256:")
        self.assertEqual(len(asked), imagec.INDEX_DEPTH_LIMIT - 1)
        self.assertEqual(len(set(asked)), len(asked))

    @rows(itertools.product(("DOCUMENT_COUNT_LIMIT", "DOCUMENT_BYTES_LIMIT"),
                            ("linux/amd64", "all")))
    def test_documents_of_a_name_are_counted(self, limit, platform):
        unlike = [build_index([], extra_entries=[self.image.descriptor(
            annotations={"n": str(n)}, platform=_platform(("plan9", "mips", None)))])
            for n in range(21)]
        registry = self.filled(build_index([(index, None) for index in unlike]))
        registry.add("app", None, self.image)
        with mock.patch.object(imagec, limit, 20 * (400 if "BYTES" in limit else 1)):
            with self.fails(imagec.LimitExceeded, "one name leads to more"):
                self.resolve(registry, platform)
        self.assertLessEqual(len(paths(registry, "sha256:")), 20)

    @rows([(False,), (True,)])
    def test_the_best_of_an_index_is_taken(self, nested):
        index = build_index([(NET_OTHER, ("linux", "386", None)),
                             (self.image, ("linux", "amd64", None)),
                             (NET_OTHER, ("linux", "386", None))])
        found = self.resolve(self.filled(build_index([(index, None)]) if nested else
                                         index))
        self.assertEqual(str(found.manifest.digest), self.image.digest)

    def test_platform_of_a_later_index(self):
        arm = build_index([(self.image, ("linux", "arm64", None))])
        amd = build_index([(self.image, ("linux", "amd64", None))])
        found = self.resolve(self.filled(build_index([(arm, None), (amd, None)])))
        self.assertEqual([str(index.digest) for index in found.indexes][1:],
                         [amd.digest])

    def test_all_of_an_index_with_schema1_in_it(self):
        index = build_index([(self.image, None),
                             (build_image(NET_TARS, "schema1"), None)])
        with self.fails(imagec.Unsupported):
            self.resolve(self.filled(index), "all")

    def test_all_of_an_index_with_others_in_it(self):
        """image-index.md: "MUST NOT generate an error"."""
        huge = dict(_descriptor("application/x", b"y"), size=1 << 40)  # not there
        index = build_index([(self.image, None)], extra_entries=[
            _descriptor("text/plain", b"x"), huge])
        registry = self.filled(index)
        registry.add_blob("app", b"x")
        found = self.resolve(registry, "all")
        self.assertEqual(found.manifest.raw, index.manifest)
        self.assertEqual({str(layer.digest) for layer in found.layers},
                         set(self.image.blobs) | {sha256(b"x")})

    @rows(NET_REFUSALS)
    def test_t106_refusals(self, code, errors, kind, words):
        registry = self.filled(tls=True)
        listed = [{"code": name, "message": text} for name, text in errors]
        said = json.dumps({"errors": listed}).encode("ascii")
        registry.fault("/manifests/", status(code, (), said))
        with self.fails(kind, words) as caught:
            self.client(registry).fetch_manifest("app", "1")
        self.assertTrue(str(caught.exception).isprintable())
        self.assertEqual(len(paths(registry, "/manifests/")), 1)
        self.assertEqual(self.naps, [])

    def test_t52_error_bodies_have_a_limit(self):
        registry = self.filled()
        registry.fault("/manifests/", [endless(), lambda reply: _set(reply, code=404)])
        with self.fails(imagec.NotFound, "404"):
            self.client(registry).fetch_manifest("app", "1")

    def test_t23_a_config_that_is_cut_without_a_word(self):
        registry = self.filled()
        client = self.client(registry)
        config = client.fetch_manifest("app", "1").config
        registry.fault("/blobs/", [truncate(), close_delimited()])
        with self.fails(imagec.SizeMismatch, str(config.digest)):
            imagec.fetch_blob(client, "app", config, str(config.digest))
        self.assertEqual(imagec.fetch_blob(client, "app", config), self.image.config)

    def test_t52_a_config_that_says_it_is_huge_is_not_asked_for(self):
        registry = self.filled()
        client = self.client(registry)
        config = client.fetch_manifest("app", "1").config
        with self.fails(imagec.LimitExceeded):
            imagec.fetch_blob(client, "app", config._replace(
                size=imagec.DOCUMENT_LIMIT + 1))
        self.assertEqual(paths(registry, "/blobs/"), [])

    def test_learn_auth_url(self):
        registry = self.filled(auth="bearer")
        found = self.client(registry).learn_auth_url("app", "1")
        query = "service=fixture&scope=repository%3Aapp%3Apull"
        self.assertEqual(found, registry.url + "/token?" + query)
        self.assertIsNone(self.client(self.filled()).learn_auth_url("app", "1"))
        with self.fails(imagec.AccessDenied, "user name and password"):
            self.client(self.filled(auth="basic")).learn_auth_url("app", "1")
        with self.fails(imagec.NotFound):
            self.client(self.filled()).learn_auth_url("app", "none")

    # -- tags

    def tags(self, registry):
        return list(self.client(registry).tags("app"))

    def tagged(self, *tags):
        registry = self.registry()
        for tag in tags:
            registry.add("app", tag, self.image)
        return registry

    @rows([(None, 1), (25, 1), (10, 3), (1, 25)])
    def test_tags_page_by_page(self, size, pages):
        names = ["v%03d" % number for number in range(25)]
        registry = self.tagged(*names)
        registry.page_size = size
        self.assertEqual(self.tags(registry), names)
        self.assertEqual(len(paths(registry, "/tags/")), pages)

    @rows(NET_LINKS)
    def test_t15_links(self, link, expected):
        registry = self.tagged(*"abcd")
        where = link.format(host=registry.host, url=registry.url,
                            port=registry.host.partition(":")[2])
        registry.fault("/tags/list", body(b'{"tags": ["a", "b"]}', link=where))
        self.gives(expected and list(expected), lambda: self.tags(registry),
                   imagec.ImagecError)
        self.assertTrue(expected or len(paths(registry, "/tags/")) == 1)

    @rows([("loop", "/v2/app/tags/list?n=1", 2000),
           ("endless", "/v2/app/tags/list?last={}", 2000),
           ("endless, of nothing", "/v2/app/tags/list?last={}", 0)])
    def test_t15_loops_and_endless_chains(self, _name, location, tags):
        registry, count = self.tagged("a"), itertools.count()
        page = json.dumps({"tags": ["a"] * tags}).encode("ascii")
        registry.fault("/tags/list", lambda reply: body(
            page, link='<%s>; rel="next"' % location.format(next(count)))(reply),
            EVER)
        with mock.patch.multiple(imagec, TAG_COUNT_LIMIT=20000, PAGE_COUNT_LIMIT=15):
            with threat_alarm(15), self.fails(imagec.InvalidDocument):
                self.tags(registry)
        self.assertLess(len(registry.requests), 20)

    def test_t16_the_cursor_is_the_servers(self):
        registry = self.tagged("a")
        link = '</v2/app/tags/list?c=%2Fx%20y>; rel="next"'
        registry.fault("/tags/list", body(b'{"tags": ["a"]}', link=link))
        registry.fault(r"/tags/list\?c=%2Fx%20y$", body(b'{"tags": ["b"]}'))
        self.assertEqual(self.tags(registry), ["a", "b"])

    def test_t06_what_is_no_tag_is_passed_over(self):
        odd = ["../x", "-rf", ".x", "a\nb", "a/b", "a:b", "\x1b[31m", "", "x" * 129, 5,
               None, True, ["a"], {"a": 1}, "\u00e9", "\u202e", "ok-1._", "x" * 128]
        registry = self.tagged("a")
        registry.fault("/tags/list", body(json.dumps({"tags": odd}).encode("ascii")))
        with self.assertLogs(imagec.log, "WARNING") as logged:
            self.assertEqual(self.tags(registry), ["ok-1._", "x" * 128])
        self.assertEqual(len(logged.output), len(odd) - 2)
        self.assertTrue("".join(logged.output).isprintable(), logged.output)

    @rows([(b'{"name": "app", "tags": null}', []),  # of an emptied repository
           (b"{}", []), (b'{"tags": []}', []), (b'{"tags": "a"}', None),
           (b'{"tags": {"a": 1}}', None), (b"[]", None), (b"", None),
           (b'{"tags": ["a"], "tags": ["b"]}', None), (b"<html>", None),
           (b'{"tags": ["%s"]}' % (b"a" * imagec.DOCUMENT_LIMIT), None)])
    def test_tag_lists(self, text, expected):
        registry = self.tagged("a")
        registry.fault("/tags/list", body(text))
        self.gives(expected, lambda: self.tags(registry),
                   imagec.InvalidDocument, "tag list")

    def test_no_such_repository(self):
        with self.fails(imagec.NotFound, "app"):
            self.tags(self.registry())


#: The type of an SBOM, and of what cosign signs.
SPDX, SIMPLE_SIGNING = ("application/spdx+json",
                        "application/vnd.dev.cosign.simplesigning.v1+json")
#: (name, what is done to each reply to a request for the list): none is there
NO_REFERRERS_LISTS = tuple(
    (str(code), status(code)) for code in sorted(imagec.NO_REFERRERS_API)) + (
        ("page", body(HTML)), ("200 to all", body(b"{}")),
        ("another's", body(b'{"schemaVersion": 2, "mediaType": "a/b", "layers": []}')))


def referring(image, kind=SPDX, data=b"{}1", **members):
    """An artifact that refers to a BuiltImage."""
    return build_artifact([(kind, data, "x.json")], kind, subject=image.descriptor(),
                          **members)


def tag_of(image, suffix=""):
    """The tag of what refers to an image."""
    return image.digest.replace(":", "-") + suffix


def signature(text=b"{}"):
    """What cosign tags, all but a signature."""
    return build_artifact(
        [(SIMPLE_SIGNING, text, {"dev.cosignproject.cosign/signature": "MEUC"})], None,
        config_type=MEDIA_TYPES["oci"]["config"])


class ReferrersTest(NetworkCase):
    """What refers to a manifest: listed, or by tags."""

    def setUp(self):
        super().setUp()
        self.sboms = [referring(self.image, data=data) for data in (b"1", b"2", b"3")]
        self.offer()

    def offer(self, *sboms, **options):
        """Begin with a new registry, that has these."""
        self.origin = self.filled(**options)
        for sbom in sboms:
            self.origin.add("app", None, sbom)

    def referring(self, digest=None, **options):
        """{tag: digests} of what refers to app:1."""
        with self.session(**options) as session:
            found = session.source(imagec.Reference.parse(
                self.origin.host + "/app:1")).referrers(
                    imagec.Digest.parse(digest or self.image.digest))
        return {tag: sorted(str(entry.digest) for entry in entries)
                for tag, entries in found.items()}

    def listed(self, *sboms):
        return {tag_of(self.image): sorted(sbom.digest for sbom in sboms)}

    def test_nothing(self):
        self.assertEqual(self.referring(), {})

    @rows([(None, 1), (2, 2), (1, 3)])
    def test_listed_page_by_page(self, size, pages):
        self.offer(*self.sboms, page_size=size)
        self.assertEqual(self.referring(), self.listed(*self.sboms))
        self.assertEqual(len(paths(self.origin, "/referrers/")), pages)

    @rows(NO_REFERRERS_LISTS)
    def test_no_list_but_a_tag(self, _name, action):
        self.offer(self.sboms[2])
        self.origin.add("app", tag_of(self.image), build_index(
            [(sbom, None) for sbom in self.sboms[:2]]))
        self.origin.fault("/referrers/", action)
        self.assertEqual(self.referring(), self.listed(*self.sboms[:2]))

    def test_a_tag_of_another_use(self):
        self.origin.add("app", tag_of(self.image), self.image)
        self.assertEqual(self.referring(), {})

    @rows([("denied", status(403), imagec.AccessDenied),
           ("out of order", status(500), imagec.RegistryError),
           ("broken off", truncate(), imagec.TransportError)])
    def test_a_list_that_may_be_there(self, _name, action, kind):
        self.offer(self.sboms[0])
        self.origin.fault("/referrers/", action, EVER)
        with self.fails(kind):
            self.referring()

    def test_a_list_that_breaks_off_on_its_second_page(self):
        self.offer(*self.sboms, page_size=1)
        self.origin.fault("first=1", status(404))
        with self.fails(imagec.InvalidDocument, "breaks off"):
            self.referring()

    def test_a_list_that_is_none_is_told(self):
        self.offer(self.sboms[0])
        self.origin.fault("/referrers/", body(b'{"schemaVersion":2,"manifests":[{}]}'))
        with self.assertLogs("imagec", "WARNING") as told:
            self.assertEqual(self.referring(), {})
        self.assertIn("without lists of referrers: ", told.output[0])

    @rows([("DOCUMENT_BYTES_LIMIT", "%d bytes"), ("INDEX_COUNT_LIMIT", "%d entries")])
    def test_t15_an_endless_list(self, limit, words):
        page = json_bytes({"schemaVersion": 2, "manifests": [
            self.sboms[0].descriptor()] * 1000})
        count = itertools.count()
        self.origin.fault("/referrers/", lambda reply: body(
            page, link='<?%d>; rel="next"' % next(count))(reply), EVER)
        most = 20 * (len(page) if "BYTES" in limit else 1000)
        del self.origin.requests[:]
        with mock.patch.object(imagec, limit, most), \
                self.fails(imagec.InvalidDocument, words % most):
            self.referring()
        self.assertLess(len(self.origin.requests), 30)

    @rows((suffix,) for suffix in ("sig", "att", "sbom"))
    def test_cosign(self, suffix):
        tag, signed = tag_of(self.image, "." + suffix), signature()
        self.offer(self.sboms[0])
        self.origin.add("app", tag, signed)
        self.assertEqual(self.referring(), dict(self.listed(self.sboms[0]),
                                                **{tag: [signed.digest]}))

    def test_sha512(self):
        digest = "sha512:" + "0123" * 32
        self.assertEqual(self.referring(digest=digest), {})
        self.assertEqual({name.rpartition("/")[2].partition(".")[0] for name in paths(
            self.origin, "/manifests/")}, {digest[:71].replace(":", "-")})

    def test_what_a_mirror_lacks_is_looked_for_at_home(self):
        mirror = self.filled(lists_referrers=False)
        self.offer(self.sboms[0])
        self.origin.add("app", tag_of(self.image, ".sig"), signature())
        mirror.add("app", tag_of(self.image, ".att"), signature(b"1"))
        found = self.referring(mirrors=[mirror.host])
        self.assertEqual(len(found), 3)
        self.assertEqual(paths(self.origin, ".att"), [])
        self.assertEqual(self.said, [])  # it is not left


# -- Mirrors

_FIELD_BLOB, _FIELD_MANIFEST = "GET .*/blobs/", "GET .*/manifests/"

#: (name, what strikes, on which requests): a mirror to be left for the next place
FIELD_MIRROR_FAULTS = (
    ("no registry", status(404), "GET "),
    ("busy", status(503), "GET /v2/$"),
    ("page", body(b"<html>"), _FIELD_MANIFEST),
    ("no such image", status(404), _FIELD_MANIFEST),
    ("password wanted", status(401, {"WWW-Authenticate": "Basic realm=x"}),
     _FIELD_MANIFEST),
    ("denied", status(403), _FIELD_MANIFEST),
    ("broken", status(500), _FIELD_MANIFEST),
    ("too many", status(429, {"Retry-After": "9"}), _FIELD_MANIFEST),
    ("manifest spoiled", flip(20), _FIELD_MANIFEST),
    ("manifest cut", truncate(), _FIELD_MANIFEST),
    ("redirect loop", redirect("?"), _FIELD_MANIFEST),
    ("blobs missing", status(404), _FIELD_BLOB),
    ("blobs denied", status(403), _FIELD_BLOB),
    ("blobs broken", status(500), _FIELD_BLOB),
    ("blobs of another size", extra(1), _FIELD_BLOB),
    ("blobs cut for ever", truncate(), _FIELD_BLOB),
    ("blobs reset for ever", reset(), _FIELD_BLOB),
    ("no answer", hang(5), _FIELD_BLOB),
) + tuple(("spoiled " + digest[7:12], flip(), _FIELD_BLOB + digest)
          for digest in FieldCase.image.blobs)


class MirrorTest(FieldCase):
    """--mirror: tried in order, then the origin, whose name is the one that counts."""

    def setUp(self):
        super().setUp()
        self.image = build_image(FIELD_SMALL)
        self.origin = self.filled(self.image)

    def test_order(self):
        one, two = self.filled(self.image), self.filled(self.image)
        self.pull(self.origin.host, mirrors=[one.host, two.host])
        self.assertEqual(len(paths(one, "/blobs/")), 3)
        self.assertEqual(two.requests + self.origin.requests, [])
        self.pull(self.origin.host, to="b", mirrors=["127.0.0.1:1", two.host])
        self.assertEqual(len(paths(two, "/blobs/")), 3)
        self.assertEqual(self.origin.requests, [])

    def test_prefix(self):
        mirror = self.filled(self.image, "cache/hub/lab/app")
        for text in ("%s/cache/hub", "%s/cache/hub/", "http://%s/cache/hub"):
            self.pull(self.origin.host, to=text[:4], mirrors=[text % mirror.host])
        self.assertEqual(self.origin.requests, [])

    def test_docker_hub(self):
        mirror = self.filled(self.image, "library/alpine")
        prefixed = self.filled(self.image, "hub/library/alpine")
        for place in (mirror.host, prefixed.host + "/hub"):
            for name in ("alpine:1", "docker.io/library/alpine:1"):
                image = self.pull(None, name, to=name[:3], mirrors=[place])
                self.assertEqual(str(image.reference), "docker.io/library/alpine:1")

    def test_namespace(self):
        mirror = self.filled(self.image)
        mirror.fault(_FIELD_BLOB, status(404))
        self.pull(self.origin.host, mirrors=[mirror.host])
        asked = [r for r in mirror.requests if r.route != "/v2/"]
        self.assertTrue(asked)
        for request in asked:
            self.assertEqual(request.query.get("ns"), [self.origin.host])
        self.assertEqual([r for r in self.origin.requests if "ns=" in r.path], [])

    def test_name_written_down_is_the_origins(self):
        mirror = self.filled(self.image, "cache/lab/app")
        mirrors, name = [mirror.host + "/cache"], self.origin.host + "/lab/app:1"
        image = self.pull(self.origin.host, to="tree", mirrors=mirrors)
        self.assertTrue(image.path.endswith(
            os.path.join(self.origin.host, "v2", "lab", "app", "1")), image.path)
        self.pull(self.origin.host, to="layout", format="oci", mirrors=mirrors)
        with open(self.at("layout/index.json"), encoding="ascii") as file:
            entry, = json.load(file)["manifests"]
        self.assertEqual(entry["annotations"]["io.containerd.image.name"], name)
        self.pull(self.origin.host, to="a.tar", mirrors=mirrors)
        with tarfile.open(self.at("a.tar")) as tar:
            listed = json.loads(tar.extractfile("manifest.json").read().decode("ascii"))
        self.assertEqual(listed[0]["RepoTags"], [name])
        self.assertEqual(self.origin.requests, [])

    @rows(FIELD_MIRROR_FAULTS)
    def test_faults(self, name, action, match):
        mirror = self.filled(self.image)
        mirror.fault(match, action, EVER)
        del self.said[:], self.naps[:]
        image = self.pull(self.origin.host, to=name, mirrors=[mirror.host],
                          idle_timeout=0.1 if name == "no answer" else 5)
        self.assertEqual(str(image.digest), self.image.digest)
        self.assertEqual(len(self.said), 1, self.said)
        self.assertIn("leaving the mirror %s: " % mirror.host, self.said[0])
        if name in ("busy", "too many"):
            self.assertEqual(self.naps, [])  # another place can be asked
        self.assertTrue(imagec.Audit().check(self.at(name)).images)

    def test_manifest_by_digest_is_proved(self):
        other = build_image(FIELD_SMALL[:1])
        mirror = self.filled(self.image)
        mirror.repositories["lab/app"][self.image.digest] = (
            other.manifest, other.media_type, self.image.digest)
        image = self.pull(self.origin.host, "lab/app@" + self.image.digest,
                          mirrors=[mirror.host])
        self.assertEqual(len(image.layers), 2)
        self.assertEqual(len(self.said), 1)

    def test_index(self):
        index = build_index([(self.image, ("linux", "amd64", None))])
        mirror, origin = self.filled(index), self.filled(index)
        mirror.fault(_FIELD_MANIFEST + self.image.digest, status(404))
        self.pull(origin.host, mirrors=[mirror.host])
        self.assertEqual(len(self.said), 1)

    def test_what_a_mirror_has_begun_the_origin_goes_on_with(self):
        large = build_image([tar_bytes([("a", noise(1 << 19))])])
        mirror, origin = self.filled(large), self.filled(large)
        layer = _FIELD_BLOB + large.layers[0]
        mirror.fault(layer, truncate(), 1)
        mirror.fault(layer, status(404))
        self.pull(origin.host, mirrors=[mirror.host])
        size = len(large.blobs[large.layers[0]])
        self.assertLess(origin.sent_blob_bytes, size * 0.55)

    # -- secrets

    @rows((("basic",), ("bearer",)))
    def test_credentials_of_the_origin_stay_there(self, auth):
        origin = self.filled(self.image, auth=auth, anonymous=False)
        mirror = self.filled(self.image, auth=auth, anonymous=False)
        self.docker_config({"auths": {origin.host: field_entry("alice")}})
        self.pull(origin.host, to=auth + "1", mirrors=[mirror.host])
        self.pull(origin.host, to=auth + "2", mirrors=[mirror.host], username="alice",
                  password=PASSWORD)
        self.assertEqual(authorizations(mirror), [])
        self.assertTrue(authorizations(origin))

    @rows((("basic",), ("bearer",)))
    def test_mirror_has_an_entry_of_its_own(self, auth):
        mirror = self.filled(self.image, "cache/lab/app", auth=auth, anonymous=False)
        self.docker_config({"auths": {mirror.host + "/cache": field_entry("alice"),
                                      self.origin.host: field_entry("other")}})
        self.pull(self.origin.host, to=auth, mirrors=[mirror.host + "/cache"])
        self.assertEqual(self.origin.requests + self.said, [])

    def test_mirror_whose_helper_is_missing_is_left(self):
        mirror = self.filled(self.image, auth="basic")
        self.docker_config({"credHelpers": {mirror.host: "none"}})
        self.pull(self.origin.host, mirrors=[mirror.host])
        self.assertEqual(len(self.said), 1)

    # -- failures

    def test_all_fail(self):
        mirror = self.filled(self.image)
        mirror.fault(_FIELD_MANIFEST, status(500), EVER)
        for code, kind in ((404, imagec.NotFound), (403, imagec.AccessDenied)):
            self.origin.fault(_FIELD_MANIFEST, status(code))
            with self.fails(kind, self.origin.host):
                self.pull(self.origin.host, mirrors=[mirror.host, "127.0.0.1:1"])
        self.assertEqual(len(self.said), 4)

    def test_origin_that_spoils_is_an_error(self):
        mirror = self.filled(self.image)
        for registry in (mirror, self.origin):
            registry.fault(_FIELD_BLOB, flip(), EVER)
        with self.fails(imagec.DigestMismatch):
            self.pull(self.origin.host, mirrors=[mirror.host])

    def test_command_line(self):
        mirror = self.filled(self.image)
        ref = self.origin.host + "/lab/app:1"
        run = self.main("pull", "-o", self.at(), ref, "--mirror", "127.0.0.1:1",
                        "--mirror", mirror.host, "--progress", "none")
        self.assertEqual((run.status, run.out),
                         (0, "%s@%s\n" % (ref, self.image.digest)))
        self.assertRegex(run.err, r"\Aimagec: warning: leaving the mirror "
                         r"127\.0\.0\.1:1: [^\n]*\n\Z")
        self.assertEqual(self.origin.requests, [])

    @rows([(text,) for text in (
        "", "/", "/x", "http://", "ftp://h/x", "u:S3CR3T@h", "h/UPPER", "h/a b", "h//x",
        "h/../x", "h:x", "h?x", "h/x:1", "-h")])
    def test_malformed(self, text):
        run = self.main("digest", "r.test/a", "--mirror=" + text)
        self.assertEqual((run.status, run.out), (2, ""), run.err)
        self.assertRegex(run.err, r"\Aimagec: .*mirror.*\n\Z")


# -- Rate limits

#: (Retry-After at FIELD_NOW, seconds slept before the second try; None where ours are)
FIELD_RETRIES = (
    (None, None), ("0", 0), ("7", 7), (" 7 ", 7), ("60", 60), ("61", 60),
    ("999999999", 60), ("9" * 40, None), ("9" * 50, None), ("-1", None), ("-5", None),
    ("1.5", None), ("0x10", None), ("soon", None), ("", None), ("\xff\xfe", None),
    ("Wed, 21 Oct 2015 07:27:30 GMT", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 10),
    ("Wed, 21 Oct 2015 07:28:20 GMT", 30), ("Wed, 21 Oct 2015 09:27:50 GMT", 60),
    ("Fri, 31 Dec 9999 23:59:59 GMT", 60), ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
    ("Wed, 99 Foo 2015 99:28:00 GMT", None), ("Mon Jan 9  , GMT", None),
    ("Jan 9    , , 1.2", None),
)
FIELD_NOW = 1445412470.0  # ten seconds before 07:28
FIELD_LIMITS = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "0;w=21600",
                "docker-ratelimit-source": "192.0.2.1"}
FIELD_TOO_MANY = (
    b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow \\u001b[1mdown"}]}')

#: (value of Warning, what is shown of it ...)
FIELD_WARNINGS = (
    ('299 - "this is the last week"', "this is the last week"),
    ('299 example.test "said by a proxy"', "said by a proxy"),
    ('299 - "a \\"quoted\\" word"', "quoted"),
    ('299 - "poison \x1b[31m"', "poison \\x1b[31m"),
    (['299 - "one"', '299 - "two"'], "one", "two"),
    ('110 - "Response is Stale"',), ("299 - bare",), ("",), ('299 - ""',),
)


class RateLimitTest(FieldCase):
    """429, Retry-After, fewer requests that count, and what registries have to say."""

    @rows(FIELD_RETRIES)
    def test_t65_t105_retry_after(self, value, seconds):
        registry = self.filled()
        registry.fault(_FIELD_MANIFEST, status(429, {"Retry-After": value}))
        del self.naps[:]
        with mock.patch("time.time", return_value=FIELD_NOW), self.session() as session:
            session.manifest(imagec.Reference.parse(registry.host + "/lab/app:1"))
        nap, = self.naps
        low, high = (0.4, 0.6) if seconds is None else (seconds, seconds)
        self.assertTrue(low <= nap <= high, nap)

    def test_t105_error_names_the_limit(self):
        registry = self.filled()
        fault = registry.fault(_FIELD_MANIFEST, status(429, dict(FIELD_LIMITS, **{
            "Content-Type": "application/json", "Retry-After": "2"}), FIELD_TOO_MANY),
            EVER)
        with self.fails(imagec.RegistryError, "too many requests", "TOOMANYREQUESTS",
                        "slow \\x1b[1mdown", "ratelimit-remaining: 0;w=21600",
                        "100;w=21600", "192.0.2.1", "log in"):
            self.pull(registry.host)
        self.assertEqual((fault.used, self.naps), (5, [2] * 4))

    def test_limit_is_shown_with_debug(self):
        registry = self.filled()
        registry.fault(_FIELD_MANIFEST, headers(ratelimit_remaining="76;w=21600"), 2)
        ref = registry.host + "/lab/app:1"
        self.assertIn("76;w=21600", self.main("digest", "--debug", ref).err)
        self.assertEqual(self.main("digest", ref).err, "")
        registry.fault(_FIELD_MANIFEST, status(429, {"Retry-After": "0"}))
        self.assertRegex(self.main("digest", ref).err,
                         "too many requests.*; trying again in 0.0 s")

    def manifests(self, registry):
        """The methods of requests for manifests, which are forgotten."""
        found = [r.method for r in registry.requests if "/manifests/" in r.path]
        del registry.requests[:]
        return found

    def test_what_a_tag_costs_that_was_pulled_before(self):
        image, other = build_image(FIELD_SMALL), build_image(FIELD_SMALL[:1])
        index = build_index([(image, ("linux", "amd64", None))])
        for format, found in itertools.product(("oci", "layers"), (image, index)):
            registry, place = self.filled(found), format + found.digest

            def pull(name="lab/app:1"):
                del registry.requests[:]
                return str(self.pull(registry.host, name, to=place,
                                     format=format).digest)

            pull()
            self.assertEqual((pull(), self.manifests(registry)),
                             (found.digest, ["HEAD"]))
            if format == "oci":
                pull("lab/app:1@" + found.digest)
                self.assertEqual(self.manifests(registry), [])
            registry.add("lab/app", "1", other)
            self.assertEqual((pull(), self.manifests(registry)),
                             (other.digest, ["HEAD", "GET"]))

    def test_what_is_held_is_proved(self):
        registry = self.filled()
        digest = registry.repositories["lab/app"]["1"][2]
        self.pull(registry.host, format="oci")
        self.file("out/blobs/sha256/" + digest[7:], b"{}")
        self.manifests(registry)
        self.pull(registry.host, format="oci")
        self.assertEqual(self.manifests(registry)[-1:], ["GET"])
        self.assertEqual(faults_of(self.at()), [])

    def test_what_is_held_is_bounded(self):
        registry, more = self.filled(), self.filled()
        more.add("lab/app", "1", build_image(FIELD_SMALL[:1]))
        for one in (registry, more):
            self.pull(one.host, format="oci")
        held = imagec.held(self.at("out"))
        self.assertEqual(len(held), 4)
        with mock.patch.object(imagec, "DOCUMENT_BYTES_LIMIT", len(held[0])):
            self.assertEqual(imagec.held(self.at("out")), held[:2])
        with self.assertRaises(imagec.Timeout):
            imagec.held(self.at("out"), check=mock.Mock(side_effect=imagec.Timeout("")))

    @rows((({"annotations": {"a": None}},), ({"digest": "md5:x"},), ({"size": "1"},)))
    def test_odd_entries_hide_no_other(self, odd):
        registry, path = self.filled(), self.at("out/index.json")
        self.pull(registry.host, format="oci")
        index = json.loads(file_bytes(path).decode())
        index["manifests"].insert(0, dict(index["manifests"][0], **odd))
        write_file(path, json_bytes(index))
        self.manifests(registry)
        self.pull(registry.host, format="oci")
        self.assertEqual(self.manifests(registry), ["HEAD"])

    @rows([(status(code),) for code in (405, 404, 500)],
          [(headers(docker_content_digest=None),)])
    def test_head_that_does_not_work_is_no_obstacle(self, action):
        registry = self.filled()
        self.pull(registry.host, to=registry.host, format="oci")
        self.manifests(registry)
        registry.fault("HEAD .*/manifests/", action, EVER)
        self.pull(registry.host, to=registry.host, format="oci")
        self.assertEqual(self.manifests(registry)[-1], "GET")

    @rows(FIELD_WARNINGS)
    def test_warnings(self, value, *shown):
        registry = self.filled()
        registry.fault("GET", headers(warning=value), EVER)
        del self.said[:]
        self.pull(registry.host, to=registry.host)
        self.assertEqual(len(self.said), len(shown), self.said)
        for text, words in zip(sorted(self.said), shown):
            self.assertIn(words, text)
            self.assertIn(registry.host + " says: ", text)


# --------------------------------------------------------------------------------------
# 11  Store
# --------------------------------------------------------------------------------------

NET_BLOB = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(9000))  # 281 KiB
NET_SIZE = len(NET_BLOB)
NET_HALF = NET_SIZE // 2
NET_JUNK_BLOB = bytes(NET_SIZE)


def good_after(start):
    """A Content-Range that is right for what begins at `start`."""
    return "bytes %d-%d/%d" % (start, NET_SIZE - 1, NET_SIZE)


#: (name, what FINAL.partial holds, action on the first reply, offsets asked for)
NET_PARTIALS = (
    ("none", None, None, [0]),
    ("empty", b"", None, [0]),
    ("good half", NET_BLOB[:NET_HALF], None, [NET_HALF]),
    ("all but a byte", NET_BLOB[:-1], None, [NET_SIZE - 1]),
    ("good and full, T103", NET_BLOB, None, []),
    ("bad and full, T103", NET_JUNK_BLOB, None, [0]),
    ("longer, T103", NET_BLOB + b"x", None, [0]),
    ("much longer, T132", NET_BLOB * 3, None, [0]),
    ("bad half, T104", NET_JUNK_BLOB[:NET_HALF], None, [NET_HALF, 0]),
    ("no ranges, T101", NET_BLOB[:NET_HALF], no_range(), [NET_HALF]),
    ("no ranges, bad half", NET_JUNK_BLOB[:NET_HALF], no_range(), [NET_HALF, 0]),
    ("416, T103", NET_BLOB[:NET_HALF], status(416), [NET_HALF, 0]),
    ("416 with the size", NET_BLOB[:NET_HALF], status(
        416, {"Content-Range": "bytes */%d" % NET_HALF}), [NET_HALF, 0]),
    ("starts early, T102", NET_BLOB[:NET_HALF],
     partial(good_after(0), 0), [NET_HALF, 0]),
    ("starts late, T102", NET_BLOB[:NET_HALF],
     partial(good_after(NET_HALF + 1), NET_HALF + 1), [NET_HALF, 0]),
    ("lies about the start, T102", NET_BLOB[:NET_HALF],
     partial(good_after(NET_HALF), 0), [NET_HALF, 0]),
    ("other total, T102", NET_BLOB[:NET_HALF], partial(
        "bytes %d-%d/%d" % (NET_HALF, NET_SIZE - 1, NET_SIZE + 1), NET_HALF),
     [NET_HALF, 0]),
    ("ends short, T102", NET_BLOB[:NET_HALF], partial(
        "bytes %d-%d/%d" % (NET_HALF, NET_SIZE - 2, NET_SIZE), NET_HALF),
     [NET_HALF, 0]),
    ("unknown total", NET_BLOB[:NET_HALF], partial(
        "bytes %d-%d/*" % (NET_HALF, NET_SIZE - 1), NET_HALF), [NET_HALF]),
    ("no Content-Range, T102", NET_BLOB[:NET_HALF],
     partial(None, NET_HALF), [NET_HALF, 0]),
    ("junk, T102", NET_BLOB[:NET_HALF], partial("bytes x", NET_HALF), [NET_HALF, 0]),
    ("other unit, T102", NET_BLOB[:NET_HALF],
     partial(good_after(NET_HALF).replace("bytes", "items"), NET_HALF), [NET_HALF, 0]),
    ("two of them, T102", NET_BLOB[:NET_HALF],
     partial([good_after(NET_HALF), good_after(0)], NET_HALF), [NET_HALF, 0]),
    ("multipart, T102", NET_BLOB[:NET_HALF],
     [partial(None, 0), headers(content_type="multipart/byteranges; boundary=x")],
     [NET_HALF, 0]),
    ("said to be compressed", NET_BLOB[:NET_HALF], headers(content_encoding="gzip"),
     [NET_HALF]),
    ("cut again", NET_BLOB[:NET_HALF], truncate(1000), [NET_HALF, NET_HALF + 1000]),
    ("other content, T104", NET_BLOB[:NET_HALF], flip(), [NET_HALF, 0]),
)

#: (name, what is at the final name, is it used as it is). T39
NET_EXISTING = (
    ("good", NET_BLOB, True), ("empty", b"", False), ("short", NET_BLOB[:-1], False),
    ("long", NET_BLOB + b"x", False), ("junk of the right size", NET_JUNK_BLOB, False),
)

#: (name, action, error, are there retries): a blob of which nothing may remain
NET_BAD_BLOBS = (
    ("flipped bit, T25", flip(), imagec.DigestMismatch, False),
    ("flipped first bit", flip(0), imagec.DigestMismatch, False),
    ("extra byte, T24", extra(1), imagec.SizeMismatch, False),
    ("shorter, and says so", body(NET_BLOB[:-1]), imagec.SizeMismatch, False),
    ("error page with 200, T30", body(b"<Error>AccessDenied</Error>"),
     imagec.SizeMismatch, False),
    ("empty", body(b""), imagec.SizeMismatch, False),
    ("206 unasked, T102", partial("bytes 0-9/10", 0), imagec.RegistryError, False),
    ("reset, T100", reset(), imagec.TransportError, True),
    ("cut, T22", truncate(), imagec.TransportError, True),
    ("cut after a byte each time, T64", truncate(1), imagec.TransportError, True),
    ("500", status(500), imagec.RegistryError, True),
    ("404", status(404), imagec.NotFound, False),
)


class DownloadCase(NetworkCase):
    """One blob, fetched to self.path."""

    def setUp(self):
        super().setUp()
        self.place = os.path.join(self.root, "place")
        os.mkdir(self.place)
        self.path = os.path.join(self.place, "blob")
        self.events = []

    def filled(self, data=NET_BLOB, **options):
        registry = self.registry(**options)
        registry.add_blob("app", data)
        return registry

    def download(self, registry, data=NET_BLOB, size=True, client=None, **options):
        digest = imagec.Digest.parse(sha256(data))
        blob = imagec.Descriptor("", digest, len(data) if size else None)
        source = imagec.Source([(client or self.client(registry), "app")])
        if options.pop("unpack", False):
            options["unpack"] = functools.partial(
                imagec.unpack, diff_id=options.pop("diff_id", None))
        return imagec.Download(source, blob, imagec.Place(self.path),
                               notify=self.events.append, **options)

    def assert_fetched(self, found, reused=False):
        """It is the blob, whole, and the only file there."""
        self.assertEqual(found, imagec.Fetched(
            found.blob, imagec.Region(self.path, 0, NET_SIZE), None, reused))
        self.assertEqual((str(found.blob.digest), found.blob.size),
                         (sha256(NET_BLOB), NET_SIZE))
        self.assertEqual(self.holds(), {"blob": NET_BLOB})

    def put(self, data, suffix=""):
        """Have the place hold this file and no other."""
        shutil.rmtree(self.place)
        os.mkdir(self.place)
        if data is not None:
            with open(self.path + suffix, "wb") as file:
                file.write(data)

    def holds(self):
        """{name: bytes} of the place."""
        found = {}
        for name in os.listdir(self.place):
            with open(os.path.join(self.place, name), "rb") as file:
                found[name] = file.read()
        return found

    def offsets(self, registry):
        """Where the requests for blobs have begun."""
        asked = [r.headers.get("Range", "bytes=0-") for r in registry.requests
                 if "/blobs/" in r.path]
        return [int(text[len("bytes="):-1]) for text in asked]


RANGED_BLOB = noise(7 << 20, 7)
#: (name, what requests for parts of a blob meet from the third on, how often; whether
#: more of them follow; whether the blob begins anew)
RANGED = (
    ("as asked for", (), 0, True, False),
    ("the whole", no_range(), 1, False, False),
    ("404", status(404), 1, False, False), ("416", status(416), 1, False, False),
    ("429", status(429, {"Retry-After": "0"}), 1, False, False),
    ("a lie about where", partial("bytes 5-9/10", 0), 1, False, False),
    ("another object", headers(etag='"other"'), 1, False, False),
    ("an object of a weak tag", headers(etag='W/"other"'), EVER, True, False),
    ("cut", truncate(1), 1, False, False), ("reset", reset(), 1, False, False),
    ("other bytes", flip(), 1, True, True),
)


class RangesTest(DownloadCase):
    """A large blob that comes slowly comes by several connections."""

    def setUp(self):
        super().setUp()
        self.patch(mock.patch.multiple(
            imagec, RANGE=1 << 18, RANGES_AFTER=0, RANGES_LEFT=1 << 20,
            RANGES_PACE=1 << 60, BACKOFF=0))

    def ranged(self, registry, share=3):
        """What is asked for to have the blob: Range headers."""
        self.put(None)
        self.download(registry, RANGED_BLOB, share=lambda: share).run()
        self.assertEqual(self.holds(), {"blob": RANGED_BLOB})
        return [request.headers.get("Range") for request in registry.requests
                if "/blobs/" in request.path]

    @rows(RANGED)
    def test_answers(self, _name, fault, times, good, anew):
        registry = self.filled(RANGED_BLOB)
        registry.fault("/blobs/", headers(etag='"this"'), 3)
        if fault:
            registry.fault("/blobs/", fault, times)
        asked = self.ranged(registry)
        self.assertEqual(asked[0], None)
        self.assertEqual(asked.count(None), 1 + anew)
        parts = [text for text in asked if text and not text.endswith("-")]
        self.assertGreater(len(parts), 15 if good else 2)
        self.assertEqual(len(set(parts)), len(parts))
        # From where it stands, on one connection; no part is asked for again.
        self.assertEqual(sum(text.endswith("-") for text in filter(None, asked)),
                         not good)

    def test_a_redirect_serves_until_it_is_refused(self):
        cdn, registry = self.registry(auth=None), self.filled(RANGED_BLOB, auth="bearer")
        cdn.blobs, registry.redirect_blobs_to = registry.blobs, cdn.url
        cdn.fault("/cdn/", headers(etag='"this"'), 5)
        cdn.fault("/cdn/", status(403))
        self.assertEqual(len(self.ranged(registry)), 2)
        self.assertGreater(len(cdn.requests), 15)
        self.assertEqual(authorizations(cdn), [])

    @rows((("one connection", {}, 1), ("little is left", {"RANGES_LEFT": 1 << 30}, 3),
           ("it is quick", {"RANGES_PACE": 0}, 3), ("it began now", {"RANGES_AFTER": 60},
            3)))
    def test_where_it_is_of_no_use(self, _name, limits, share):
        with mock.patch.multiple(imagec, **dict({"BACKOFF": 0}, **limits)):
            self.assertEqual(self.ranged(self.filled(RANGED_BLOB), share), [None])

    @rows((("parts", 3), ("all but one", 1)))
    def test_it_ends_when_told(self, _name, count):
        registry = self.filled(RANGED_BLOB)
        client = self.client(registry)
        registry.fault("/blobs/", delay(0))
        registry.fault("/blobs/", hang(60), count)

        def stop():
            client.transport.stop = KeyboardInterrupt()

        timer = threading.Timer(0.5, stop)
        self.addCleanup(timer.join)
        timer.start()
        with threat_alarm(15), self.assertRaises(KeyboardInterrupt):
            self.download(registry, RANGED_BLOB, client=client, share=lambda: 3).run()
        self.assertEqual(list(self.holds()), ["blob.partial"])
        self.assertTrue(RANGED_BLOB.startswith(self.holds()["blob.partial"]))


class DownloadTest(DownloadCase):
    """One verified blob onto disk."""

    def test_fresh(self):
        for tls in (False, True):
            self.put(None)
            found = self.download(self.filled(tls=tls)).run()
            self.assert_fetched(found)

    def test_events(self):
        registry = self.filled()
        for expected in (["Downloading", "Verifying Checksum", "Download complete"],
                         ["Verifying", "Already exists"]):
            del self.events[:]
            self.download(registry).run()
            stages = itertools.groupby(event.status for event in self.events)
            self.assertEqual([stage for stage, _ in stages], expected)
            self.assertEqual({(e.id, e.total) for e in self.events},
                             {(sha256(NET_BLOB)[7:19], NET_SIZE)})

    @rows(NET_EXISTING)
    def test_t39_existing_files_are_checked(self, _, content, good):
        registry = self.filled()
        self.put(content)
        self.assert_fetched(self.download(registry).run(), good)
        self.assertEqual(self.offsets(registry), [] if good else [0])

    def test_t39_a_link_is_replaced_not_followed(self):
        canary = self.file("canary", NET_BLOB)
        os.symlink(canary, self.path)
        self.assertFalse(self.download(self.filled()).run().reused)
        self.assertFalse(os.path.islink(self.path))

    def test_t39_a_failed_replacement_keeps_the_old(self):
        self.put(b"old")
        registry = self.filled()
        registry.fault("/blobs/", flip())
        with self.fails(imagec.DigestMismatch):
            self.download(registry).run()
        self.assertEqual(self.holds(), {"blob": b"old"})

    def test_t122_a_signal_while_it_is_closed(self):
        closing = os.close

        def interrupted(fd):
            closing(fd)
            raise KeyboardInterrupt

        partial = imagec.Partial(self.path)
        with mock.patch.object(os, "close", interrupted), \
                self.assertRaises(KeyboardInterrupt):
            partial.close()
        partial.close()  # by who clears up

    @rows(itertools.product((True, False), NET_PARTIALS))
    def test_t101_t102_t103_t104_partial_files(self, size, row):
        _, content, action, offsets = row
        registry = self.filled()
        self.put(content, ".partial")
        if action and (size or len(content) < NET_SIZE):
            registry.fault("/blobs/", action)
        self.assert_fetched(self.download(registry, size=size).run())
        if size:
            self.assertEqual(self.offsets(registry), offsets)

    #: (name, what is sent for a blob, its coding, is its length told, requests)
    @rows((("raw", lambda blob: blob, "aws-chunked", True, 1),
           ("raw, of no length", lambda blob: blob, "gzip", False, 1),
           ("gzip", gzip_bytes, "gzip", True, 1), ("x-gzip", gzip_bytes, "X-GZIP", False, 1),
           ("stored in gzip", lambda blob: gzip_bytes(blob, 0), "gzip", True, 1),
           ("two members", lambda blob: gzip_bytes(blob[:9]) + gzip_bytes(blob[9:]),
            "gzip", True, 1),
           ("another blob", lambda blob: gzip_bytes(blob[1:]), "gzip", True, None),
           ("too much", lambda blob: gzip_bytes(blob + b"x"), "gzip", True, None),
           ("bomb", lambda blob: gzip_bytes(bytes(len(blob) << 8)), "gzip", False, None),
           ("cut", lambda blob: gzip_bytes(blob)[:-9], "gzip", True, None)))
    def test_t47_codings_nobody_asked_for(self, _name, encode, coding, told, requests):
        for again in (False, True):  # where half of it is here already
            registry = self.filled()
            sent = encode(NET_BLOB)
            registry.fault("/blobs/", lambda reply: body(
                sent, content_encoding=coding)(reply if told else chunked()(reply)), EVER)
            self.put(NET_BLOB[:NET_HALF] if again else None, ".partial")
            if requests is None:
                with self.fails(imagec.ImagecError, sha256(NET_BLOB)):
                    self.download(registry).run()
                self.assertLessEqual(len(registry.requests), 4)
            else:
                self.assert_fetched(self.download(registry).run())
                self.assertLessEqual(len(self.offsets(registry)), requests + again)

    @rows([(True, 1), (False, 2)])
    def test_t47_gzip_that_is_said_to_be(self, told, requests):
        blob = gzip_bytes(NET_BLOB)  # what is in it is no blob
        registry = self.filled(blob)
        registry.fault("/blobs/", lambda reply: headers(content_encoding="gzip")(
            reply if told else chunked()(reply)), EVER)
        self.put(None)
        self.download(registry, blob).run()
        self.assertEqual(self.holds(), {"blob": blob})
        self.assertEqual(len(self.offsets(registry)), requests)

    def test_budget_is_renewed_by_progress(self):
        self.patch(mock.patch.object(imagec, "PROGRESS_BYTES", 20000))
        for cut, times in ((25000, 11), (15000, imagec.ATTEMPTS - 1)):
            registry = self.filled()
            registry.fault("/blobs/", truncate(cut), times)
            self.put(None)
            self.download(registry).run()
            self.assertEqual(registry.sent_blob_bytes, NET_SIZE)
        registry.fault("/blobs/", truncate(15000), imagec.ATTEMPTS)
        self.put(None)
        with self.fails(imagec.TransportError):
            self.download(registry).run()

    def test_reset_costs_little(self):
        # What came before a reset has been paid for too.
        registry = self.filled()
        registry.fault("/blobs/", reset(100000), 2)
        self.download(registry).run()
        self.assertLess(registry.sent_blob_bytes, NET_SIZE * 1.2)

    def test_t104_a_bad_rest_is_fetched_again_once(self):
        registry = self.filled()
        registry.fault("/blobs/", truncate(NET_HALF))
        registry.fault("/blobs/", flip(), 2)
        with self.fails(imagec.DigestMismatch):
            self.download(registry).run()
        self.assertEqual(self.offsets(registry), [0, NET_HALF, 0])
        self.assertEqual(self.holds(), {})

    def test_t104_a_bad_rest_is_not_fetched_for_ever(self):
        registry = self.filled()
        for _ in range(2):
            registry.fault("/blobs/", truncate(NET_HALF))
            registry.fault("/blobs/", flip())
        with self.fails(imagec.DigestMismatch):
            self.download(registry).run()
        self.assertEqual(self.offsets(registry), [0, NET_HALF] * 2)
        self.assertEqual(self.holds(), {})

    @rows(NET_BAD_BLOBS)
    def test_t25_bad_blobs_leave_nothing(self, _, action, kind, retried):
        registry, tries = self.filled(), imagec.ATTEMPTS if retried else 1
        registry.fault("/blobs/", action, EVER)
        self.put(None)
        del self.naps[:]
        with self.fails(kind, sha256(NET_BLOB)):
            self.download(registry).run()
        self.assertEqual((len(self.offsets(registry)), len(self.naps)),
                         (tries, tries - 1))
        # What a broken connection has left is there to go on with.
        wrong = issubclass(kind, imagec.VerificationError)
        self.assertLessEqual(set(self.holds()), set() if wrong else {"blob.partial"})

    def test_t22_t23_cut_blobs_are_resumed(self):
        for tls in (False, True):
            registry = self.filled(tls=tls)
            client = self.client(registry)
            for framing in (lambda reply: reply, chunked(), close_delimited()):
                for count in (0, 1, NET_HALF, NET_SIZE - 1):
                    with self.subTest(tls=tls, count=count):
                        self.put(None)
                        registry.fault("/blobs/", [framing, truncate(count)])
                        self.download(registry, client=client).run()
                        self.assertEqual(self.holds(), {"blob": NET_BLOB})

    def test_t24_t52_no_more_is_read_than_was_promised(self):
        for framing in ("chunked", "length", "close"):
            with self.subTest(framing=framing):
                registry = self.filled()
                registry.fault("/blobs/", endless(framing=framing))
                with self.fails(imagec.SizeMismatch, str(NET_SIZE)):
                    self.download(registry).run()
                self.assertLess(registry.sent_blob_bytes, 16 * imagec.MIB)
                self.assertEqual(self.holds(), {})

    def test_t107_t108_resuming_asks_the_registry_again(self):
        cdn = self.registry(auth=None)
        registry = self.filled(auth="bearer")
        cdn.blobs, registry.redirect_blobs_to = registry.blobs, cdn.url
        registry.token_uses = 1
        cdn.fault("/cdn/", truncate(NET_HALF))
        self.download(registry).run()
        asked = [r.headers.get("Range") for r in cdn.requests]
        self.assertEqual(asked, [None, "bytes=%d-" % NET_HALF])
        self.assertEqual(authorizations(cdn), [])
        self.assertEqual(self.holds(), {"blob": NET_BLOB})

    def test_t12_t132_odd_partial_files(self):
        registry, canary = self.filled(), self.file("canary", b"canary")
        plants = [("link", os.symlink), ("hard link", os.link)]
        if hasattr(os, "mkfifo"):
            plants.append(("fifo", lambda _, path: os.mkfifo(path)))
        for name, plant in plants:
            with self.subTest(name):
                self.put(None)
                plant(canary, self.path + ".partial")
                self.download(registry).run()
                self.assertEqual(self.holds(), {"blob": NET_BLOB})
                with open(canary, "rb") as file:
                    self.assertEqual(file.read(), b"canary")

    @able(hasattr(os, "geteuid"), "tell users apart")
    def test_t132_partial_files_of_others(self):
        """What others could write into gets no final name; ours is gone on with."""
        own, other = os.geteuid(), os.geteuid() + 1
        registry = self.filled()
        for umask, user, mode, used in (
                (0o022, own, 0o644, True), (0o022, own, 0o600, True),
                (0o002, own, 0o664, True), (0o022, own, 0o646, False),
                (0o022, own, 0o666, False), (0, own, 0o666, False),
                (0o022, other, 0o666, False), (0o022, other, 0o644, False)):
            if user != own and own:
                continue  # only root can plant it
            with self.subTest(umask=umask, user=user, mode="%o" % mode):
                del registry.requests[:]
                self.put(NET_BLOB[:NET_HALF], ".partial")
                os.chmod(self.path + ".partial", mode)
                os.chown(self.path + ".partial", user, -1)
                before = os.umask(umask)
                try:
                    self.download(registry).run()
                finally:
                    os.umask(before)
                self.assertEqual(self.offsets(registry), [NET_HALF if used else 0])
                status = os.stat(self.path)
                self.assertEqual((status.st_uid, stat.S_IMODE(status.st_mode)), (
                    own, mode if used else 0o666 & ~umask))
                self.assertEqual(self.holds(), {"blob": NET_BLOB})

    def test_t132_a_partial_file_that_cannot_be_removed(self):
        self.put(NET_BLOB[:NET_HALF], ".partial")
        os.chmod(self.path + ".partial", 0o666)
        refused = PermissionError(errno.EPERM, "Operation not permitted")
        with mock.patch.object(os, "unlink", side_effect=refused), self.fails(
                imagec.OutputError, "blob.partial", "not a file of ours alone"):
            self.download(self.filled()).run()
        self.assertEqual(self.holds(), {"blob.partial": NET_BLOB[:NET_HALF]})

    @able(hasattr(os, "geteuid"), "tell users apart")
    def test_t132_directories_of_others(self):
        place = os.path.join(self.place, "x.partial.d")
        for mode, good in ((0o700, True), (0o755, True), (0o777, False)):
            imagec.private_directory(place)
            os.chmod(place, mode)
            with self.subTest(mode="%o" % mode):
                if good:
                    imagec.private_directory(place)
                    continue
                with self.fails(imagec.OutputError, place):
                    imagec.private_directory(place)

    @able(os.name == "posix", "lock files")
    def test_t124_a_lock_that_is_held(self):
        """It is told, and given up where who holds it does not get on."""
        import fcntl
        for name, grows, freed, told, error in (
                ("at once", False, 0.5, False, None),
                ("soon", False, 9, True, None),
                ("a slow pull", True, 3000, True, None),
                ("for ever", False, None, True, imagec.OutputError)):
            with self.subTest(name), open(self.path + ".partial", "wb") as holder:
                fcntl.flock(holder, fcntl.LOCK_EX)
                now, naps = [1000.0], []

                def wait(seconds):
                    naps.append(seconds)
                    now[0] += 50 * seconds if now[0] > 1010 else seconds
                    if grows:
                        os.write(holder.fileno(), b"x")
                    if freed is not None and now[0] >= 1000 + freed:
                        fcntl.flock(holder, fcntl.LOCK_UN)

                del self.said[:]
                try:
                    imagec.Partial(self.path, wait, lambda: now[0]).close()
                    caught = None
                except imagec.ImagecError as refusal:
                    caught = refusal
                self.assertIs(caught and type(caught), error)
                self.assertEqual(len(self.said), told, self.said)
                for text in self.said + [str(caught)] * bool(error):
                    self.assertIn(self.path + ".partial", text)
                    self.assertIn("another process holds it", text)
                waited = now[0] - 1000
                self.assertLess(abs(waited - (freed or 600)), 10)

    def test_t132_a_directory_in_the_way(self):
        os.mkdir(self.path + ".partial")
        with self.assertRaises(OSError):
            self.download(self.filled()).run()
        self.assertEqual(os.listdir(self.place), ["blob.partial"])

    def test_t124_two_at_once(self):
        registry = self.filled()
        registry.fault("/blobs/", delay(0.1))
        downloads = [self.download(registry) for _ in range(2)]
        for one in downloads:
            del one._source.transport.wait  # they wait for one another
        results = []
        workers = [threading.Thread(target=lambda one=one: results.append(one.run()))
                   for one in downloads]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(5)
        self.assertEqual(sorted(found.reused for found in results), [False, True])
        self.assertEqual(self.offsets(registry), [0])
        self.assertEqual(self.holds(), {"blob": NET_BLOB})

    def test_t134_on_disk_before_it_has_its_name(self):
        calls = []

        def record(name):
            real = getattr(os, name)

            def call(*args):
                calls.append((name, os.path.basename(str(args[-1]))))
                return real(*args)
            return mock.patch("os." + name, call)

        with record("fsync"), record("replace"):
            self.download(self.filled()).run()
        names = [name for name, _ in calls]
        self.assertEqual(names, ["fsync", "replace", "fsync"])  # the directory, too
        self.assertEqual(calls[1][1], "blob")

    @able(hasattr(os, "posix_fadvise"), "be told to write behind")
    def test_written_behind(self):
        data, asked = os.urandom(100000), []

        def advise(fd, offset, length, advice):
            self.assertEqual(advice, os.POSIX_FADV_DONTNEED)
            asked.append((offset, length, os.fstat(fd).st_size))
            raise OSError(errno.EINVAL, "not on this file system")

        for durable in (True, False):
            registry = self.filled(data)
            self.put(data[:7000], ".partial")
            with mock.patch.object(imagec, "CHUNK", 5000), mock.patch.object(
                    imagec, "WRITE_BEHIND", 20000), mock.patch.object(
                        os, "posix_fadvise", advise), self.subTest(durable=durable):
                self.download(registry, data, durable=durable).run()
                self.assertEqual(self.holds(), {"blob": data})
                if not durable:
                    self.assertEqual(asked, [])
                place = 0
                for offset, length, size in asked:
                    self.assertEqual((offset, offset + length), (place, size))
                    self.assertGreaterEqual(length, 20000)
                    place = size
                self.assertGreaterEqual(place, 80000 if durable else 0)
            del asked[:]

    def test_t120_fsync_fails(self):
        with mock.patch("os.fsync", mock.Mock(side_effect=OSError(errno.EIO, "no"))):
            with self.assertRaises(OSError):
                self.download(self.filled()).run()
        self.assertNotIn("blob", self.holds())

    def test_short_writes(self):
        real = os.write
        with mock.patch("os.write", lambda fd, data: real(fd, data[:1000])):
            self.download(self.filled()).run()
        self.assertEqual(self.holds(), {"blob": NET_BLOB})

    def test_t26_what_it_unpacks_to(self):
        tar = NET_TARS[0]
        data = gzip_bytes(tar)
        good, bad = (imagec.Digest.parse(sha256(one)) for one in (tar, data))
        registry = self.filled(data)
        found = self.download(registry, data, unpack=True, diff_id=good).run()
        self.assertEqual((found.unpacked.diff_id, found.unpacked.size), (good, 7))
        # Also of one that is there already: its bytes are right, its meaning is not.
        for content in (data, None):
            self.put(content)
            with self.fails(imagec.DigestMismatch, "diffID", str(good), str(bad)):
                self.download(registry, data, unpack=True, diff_id=bad).run()


# -- Resume

def field_files(top):
    """{path: size} of the files below a place, or of the one that stands there."""
    found = {top: os.path.getsize(top)} if os.path.isfile(top) else {}
    found.update((path, facts.st_size) for path, facts in below(top)
                 if not stat.S_ISDIR(facts.st_mode))
    return found


class ResumeTest(FieldCase):
    """What is on disk is not fetched again, in this run or the next."""

    def setUp(self):
        super().setUp()
        self.image = field_noisy_image(300000, 5000)  # the largest is fetched first
        self.size = sum(map(len, self.image.blobs.values()))

    def failing(self, kind, action, times=EVER, **options):
        """A registry that recovers after a pull that failed at the last layer."""
        registry = self.filled(self.image)
        fault = registry.fault("/blobs/" + self.image.layers[2], action, times)
        with self.fails(kind):
            self.pull(registry.host, jobs=1, **options)
        self.assertIn(times, (fault.used, EVER))
        fault.times = fault.used
        return registry

    @rows(OUTPUTS)
    def test_runs_that_failed_are_gone_on_with(self, format, name):
        registry = self.failing(imagec.TransportError, truncate(40000), 5, to=name,
                                format=format)
        self.pull(registry.host, to=name, format=format)
        # The config is not kept between runs.
        self.assertEqual(registry.sent_blob_bytes, self.size + len(self.image.config))
        self.assertEqual(faults_of(self.at(name)), [])

    def test_archive_has_each_blob_when_its_turn_has_come(self):
        self.failing(imagec.NotFound, status(404), to="a.tar")
        self.assertGreater(os.path.getsize(self.at("a.tar.partial")), 590000)
        self.assertEqual(os.listdir(self.at("a.tar.partial.d/blobs")),
                         [self.image.layers[2][7:] + ".partial"])

# --------------------------------------------------------------------------------------
# 12  Outputs
# --------------------------------------------------------------------------------------

ARCHIVE_TARS = [raw_words("etc/ etc/a=1"), raw_words("etc/b=" + "2" * 5000),
                raw_words("etc/c=3")]
OCI_TAG = "org.opencontainers.image.ref.name"
OCI_NAME = "io.containerd.image.name"
ORIGIN = "io.github.imagec."
LAYOUT = b'{"imageLayoutVersion": "1.0.0"}'
#: What makes something that is no file, or never ends.
NO_FILES = (lambda path: os.mkfifo(path), lambda path: os.symlink("/dev/zero", path),
            lambda path: os.symlink(path + "~", path))


def origin_of(**fields):
    """The annotations that tell where an entry is from."""
    return {ORIGIN + name: text for name, text in fields.items()}


def docker_archive(images, style, links):
    """What `docker save` before 25, or skopeo and podman, make of images lab/app:N."""
    members, entries = collections.OrderedDict(), []
    for number, image in enumerate(images):
        names = []
        for place, digest in enumerate(image.layers):
            legacy = "%063d%d/" % (number, place)
            name = legacy + "layer.tar" if style == "docker" else digest[7:] + ".tar"
            first = members.get(digest)
            if first is None:
                members[digest] = name
                members[name] = raw_member(name.encode(), image.blobs[digest])
            if links and style == "docker" and first:
                members[name] = raw_member(name.encode(), kind=b"2",
                                           link=b"../" + first.encode())
            elif first:
                name = first
            if links and style != "docker":
                members[legacy] = raw_member(legacy.encode() + b"layer.tar", kind=b"2",
                                             link=b"../" + name.encode())
            members[legacy + "VERSION"] = raw_member(legacy.encode() + b"VERSION",
                                                     b"1.0")
            names.append(name)
        config = sha256(image.config)[7:] + ".json"
        members[config] = raw_member(config.encode(), image.config)
        entries.append({"Config": config, "Layers": names,
                        "RepoTags": ["lab/app:%d" % number]})
    return b"".join(one for one in members.values() if type(one) is bytes) + raw_member(
        b"manifest.json", json_bytes(entries)) + raw_member(
            b"repositories", b"{}") + bytes(1024)


def archive_headers(header):
    """What tarfile makes of header blocks."""
    with tarfile.open(fileobj=io.BytesIO(header + bytes(1024))) as tar:
        return tar.next()


class ArchiveOutputTest(StoredCase):
    """One tar that is an OCI layout and a docker-archive."""

    def archive(self, *argv, out="out.tar"):
        self.pull("-o", self.at(out), *argv)
        return self.members(self.at(out))

    def documents(self, members):
        return [json.loads(members[name].decode()) for name in
                ("index.json", "manifest.json")]

    def test_a_lock_is_not_waited_for_for_ever(self):
        reference = self.serve(ARCHIVE_TARS)[0]
        for form, name in (("archive", "a.tar"), ("rootfs", "root"),
                           ("rootfs", "r.tar")):
            with self.subTest(form), imagec.Partial(self.at(name)):
                with self.assertRaises(imagec.Timeout):
                    imagec.pull(reference, self.at(name), form, timeout=0.5)

    def test_partial_that_another_pull_just_renames(self):
        def gone(path, isfile=os.path.isfile):
            found = isfile(path)
            if path.endswith(".partial") and found and os.path.getsize(path) == 1:
                os.unlink(path)
            return found

        self.file("work/out.tar.partial", "x")
        with mock.patch("os.path.isfile", gone):
            self.archive(self.serve(ARCHIVE_TARS)[0])

    def test_schema1_shares_layers_with_others(self):
        # Of the one nobody knows sizes and diffIDs before the layers are there.
        references = [self.serve(ARCHIVE_TARS[:count], "lab/%d:1" % count, kind=kind)[0]
                      for count, kind in ((2, "schema1-signed"), (3, "schema1"),
                                          (1, "docker"), (4, "oci"))]
        for number, order in enumerate(itertools.permutations(references)):
            with self.subTest(order=order):
                if number % 2:
                    self.archive(order[0], out="%d.tar" % number)
                self.archive(*order, out="%d.tar" % number)
                self.verify(self.at("%d.tar" % number))

    def test_archive_in_which_nothing_is_new_stays(self):
        path, reference = self.at("out.tar"), self.serve(ARCHIVE_TARS)[0]
        other = self.serve(ARCHIVE_TARS[:2], "lab/two:1")[0]

        def changed(*references):
            before = os.stat(path)
            self.archive(*references)
            now = os.stat(path)
            return (now.st_ino, now.st_mtime_ns) != (before.st_ino, before.st_mtime_ns)

        self.archive(reference)
        good, gets = file_bytes(path), self.blob_gets()
        with mock.patch.object(imagec, "prove", side_effect=imagec.prove) as proofs:
            self.assertFalse(changed(reference))
        self.assertEqual(proofs.call_count, len(ARCHIVE_TARS))  # each once
        self.assertEqual(self.blob_gets() - gets, 1)  # the config
        for name, damaged in (("cut", good[:-1]), ("longer", good + b"x"),
                              ("another end", good[:-1025] + b"x" + good[-1024:]),
                              ("flipped", good[:2600] + b"?" + good[2601:])):
            with self.subTest(name):
                write_file(path, damaged)
                self.assertTrue(changed(reference))
                self.assertEqual(file_bytes(path), good)
        # The same blobs, but another name beside it.
        self.assertTrue(changed(reference, other))
        self.archive(reference)
        self.assertEqual(file_bytes(path), good)
        # What is unfinished is better than what is finished but bad.
        write_file(path, damaged)
        write_file(path + ".partial", good[:4096])
        gets = self.blob_gets()
        self.assertTrue(changed(reference))
        self.assertEqual(self.blob_gets() - gets, 1)
        self.assertEqual(file_bytes(path), good)
        self.assertEqual(os.listdir(self.work), ["out.tar"])

    @rows(((2600,), (3600,)))
    def test_archive_that_a_larger_one_begins_with(self, at):
        # What is proved is what is copied, or nothing is.
        path, reference = self.at("out.tar"), self.serve(ARCHIVE_TARS)[0]
        more = self.serve(ARCHIVE_TARS + [raw_words("new=1")], "lab/more:1")[0]
        self.archive(reference)
        good, write = file_bytes(path), imagec.Partial.write

        def changing(partial, data):
            damage_at(at)(path)
            write(partial, data)

        damage_at(at)(path)
        self.archive(more)
        self.verify(path)
        write_file(path, good)
        with mock.patch.object(imagec.Partial, "write", changing):
            run = self.pull("-o", path, more, expect=1)
        self.assertIn("another program has changed it", run.err)
        self.archive(more)
        self.verify(path)

    def test_schema1_without_layers_twice(self):
        reference, _ = self.serve([None], kind="schema1")
        self.assertEqual(self.archive(reference), self.archive(reference))

    def test_output_that_is_used_again(self):
        output = imagec.new_output(self.at("out.tar"))
        references = [self.serve(ARCHIVE_TARS[:2])[0],
                      self.serve(ARCHIVE_TARS[1:], "lab/two:1")[0]]
        with imagec.Session() as session:
            for reference in references:
                session.pull([imagec.Reference.parse(reference)], output)
        index, _ = self.documents(self.members(self.at("out.tar")))
        self.assertEqual(len(index["manifests"]), 1)
        self.verify(self.at("out.tar"))

    def test_two_images_that_give_one_blob_two_sizes(self):
        good, image = self.serve(ARCHIVE_TARS)
        manifest = json.loads(image.manifest.decode())
        manifest["layers"][1]["size"] += 1000
        lie = BuiltImage(json.dumps(manifest).encode(), image.media_type)
        lie.blobs = image.blobs
        self.origin.add("lab/lie", "1", lie)
        bad = self.origin.host + "/lab/lie:1"
        told = "expected %d bytes" % manifest["layers"][1]["size"]
        for form, name in (("archive", "o.tar"), ("oci", "o"), ("layers", "l")):
            for pair in ((good, bad), (bad, good)):
                with self.subTest(form, first=pair[0]):
                    run = self.pull("--format", form, "-o", self.at(name), *pair,
                                    expect=3)
                    self.assertIn(told, run.err)
        # An archive that somebody made so is seen through.
        members = self.archive(good, out="good.tar")
        index = json.loads(members["index.json"].decode())
        index["manifests"].append(lie.descriptor())
        members["blobs/sha256/" + lie.digest[7:]] = lie.manifest
        members["index.json"] = json.dumps(index).encode()
        write_file(self.at("lie.tar"), tar_bytes(
            [(name, data) for name, data in members.items() if data is not None]))
        self.assertIn(told, self.verify(self.at("lie.tar"), expect=3))

    #: What tar_header is called with.
    HEADERS = (
        dict(name=b"plain", size=5),
        dict(name=b"big", size=9 << 30), dict(name=b"limit", size=(8 << 30) - 1),
        dict(name=b"n" * 300, size=0), dict(name=b"d/", size=0, kind=b"5"),
        dict(name=b"l", size=0, kind=b"2", link=b"t" * 200),
        dict(name=b"o", size=0, uid=1 << 22, gid=1 << 30),
        dict(name=b"c", size=0, kind=b"3", device=(5, 300), mode=0o4640),
        dict(name=b"time", size=0, mtime=15 * 10 ** 8),
        dict(name=b"x", size=0, xattrs=((b"user.a", b"v"),)))

    @rows((row["name"], row) for row in HEADERS)
    def test_tar_header(self, name, row):
        info = archive_headers(imagec.tar_header(**row))
        found = dict(
            name=info.name.encode(), size=info.size, uid=info.uid, gid=info.gid,
            link=info.linkname.encode(), mtime=int(info.mtime * 10 ** 9),
            mode=info.mode, kind=info.type, device=(info.devmajor, info.devminor),
            xattrs=tuple((key[len("SCHILY.xattr."):].encode(), value.encode())
                         for key, value in info.pax_headers.items()
                         if key.startswith("SCHILY.xattr.")))
        self.assertEqual(found, dict(dict(
            uid=0, gid=0, link=b"", mtime=0, mode=0o644, kind=b"0", device=(0, 0),
            xattrs=()), **dict(row, name=name.rstrip(b"/"))))

    def test_tar_header_is_plain_where_it_can_be(self):
        block = imagec.tar_header(b"blobs/x", 7)
        self.assertEqual(len(block), 512)
        info = tarfile.TarInfo("blobs/x")
        info.size = 7
        # tarfile of some Pythons leaves the fields of devices empty.
        ours, theirs = bytearray(block), bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        for other in (ours, theirs):
            other[148:156], other[329:345] = bytes(8), bytes(16)
        self.assertEqual(ours, theirs)

    def test_members(self):
        reference, image = self.serve(ARCHIVE_TARS)
        members = self.archive(reference)
        blobs = image.layers + [image.digest, sha256(image.config)]
        self.assertEqual(list(members), (
            ["oci-layout", "blobs", "blobs/sha256"] +
            ["blobs/sha256/" + digest[7:] for digest in blobs] +
            ["index.json", "manifest.json", "repositories"]))
        for digest in blobs:
            self.assertEqual(sha256(members["blobs/sha256/" + digest[7:]]), digest)
        with tarfile.open(self.at("out.tar")) as tar:
            facts = {(member.mtime, member.uid, member.gid, member.uname, member.mode)
                     for member in tar}
        self.assertEqual(facts, {(0, 0, 0, "", 0o644), (0, 0, 0, "", 0o755)})

    def test_documents(self):
        reference, image = self.serve(ARCHIVE_TARS)
        members = self.archive(reference)
        index, manifest = self.documents(members)
        self.assertEqual(members["oci-layout"], LAYOUT)
        self.assertEqual(index, {
            "schemaVersion": 2, "mediaType": MEDIA_TYPES["oci"]["index"],
            "manifests": [{
                "mediaType": image.media_type, "digest": image.digest,
                "size": len(image.manifest),
                "platform": {"architecture": "amd64", "os": "linux"},
                "annotations": dict(origin_of(
                    digest=image.digest, repository=reference[:-2],
                    platforms="linux/amd64"), **{OCI_NAME: reference, OCI_TAG: "1"})}]})
        self.assertEqual(manifest, [{
            "Config": "blobs/sha256/" + sha256(image.config)[7:],
            "RepoTags": [reference],
            "Layers": ["blobs/sha256/" + digest[7:] for digest in image.layers]}])
        self.assertTrue(members["manifest.json"].endswith(b"\n"))
        repositories = json.loads(members["repositories"].decode())
        self.assertEqual(list(repositories[reference[:-2]]), ["1"])

    def test_names_it_is_loaded_by(self):
        reference, image = self.serve(ARCHIVE_TARS[:1])
        name, _, _ = reference.rpartition(":")
        hub = "docker.io/library/alpine"
        rows = ((name + "@" + image.digest, (), None),
                (reference + "@" + image.digest, (), reference),
                (reference, ("--tag", "alpine"), hub + ":latest"),
                (reference, ("--tag", "alpine:3"), hub + ":3"),
                (name + "@" + image.digest, ("--tag", "h.example/a/b:c"),
                 "h.example/a/b:c"))
        for number, (asked, options, wanted) in enumerate(rows):
            with self.subTest(asked[-20:], options=options):
                members = self.archive(*options + (asked,), out="%d.tar" % number)
                index, manifest = self.documents(members)
                self.assertEqual(manifest[0]["RepoTags"], wanted and [wanted])
                annotations = index["manifests"][0].get("annotations", {})
                self.assertEqual(annotations.get(OCI_NAME), wanted)
                self.assertEqual("repositories" in members, wanted is not None)

    def test_name_that_few_can_read_is_warned_of(self):
        run = self.main("pull", "--tag", "[::1]:5000/x:1", "-o", self.at("out.tar"),
                        self.serve(ARCHIVE_TARS[:1])[0])
        self.assertIn("may not take the name [::1]:5000/x:1", run.err)

    def test_tag_is_for_one_image(self):
        reference, image = self.serve(ARCHIVE_TARS[:1])
        for options in (("--tag", "a", reference, reference),
                        ("--tag", "a@" + image.digest, reference)):
            self.pull("-o", self.at("out.tar"), *options, expect=2)
        self.assertEqual(os.listdir(self.work), [])

    def test_every_run_and_python_gives_the_same(self):
        reference, _ = self.serve(ARCHIVE_TARS + [raw_words("z=" + "9" * 99999)])
        processes = []
        for number, python in enumerate(self.pythons()):
            out = self.at("p%d.tar" % number)
            processes.append((python, self.start(
                "pull", "-q", "-j", str(1 + number % 8), "-o", out, reference,
                python=python)))
        for number in range(2):
            self.archive("-j", "81"[number], reference, out="o%d.tar" % number)
        for python, process in processes:
            self.assertEqual((process.communicate()[1], process.returncode), (b"", 0),
                             python)
        digests = {sha256(file_bytes(self.at(name)))
                   for name in os.listdir(self.work)}
        self.assertEqual(len(digests), 1)

    @staticmethod
    def pythons():
        """This one, and beside it the oldest and the newest from 3.6 on."""
        beside = os.path.join(os.path.dirname(sys.base_prefix), "*", "bin", "python3")
        found = {os.path.realpath(path): path for path in glob.glob(beside)}
        probe = "import sys; print('%d.%02d' % sys.version_info[:2])"
        running = [(path, subprocess.Popen(
            [path, "-IS", "-c", probe], stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)) for path in found.values()]
        versions = sorted((process.communicate()[0].decode(), path)
                          for path, process in running)
        known = [path for version, path in versions if version >= "3.06"]
        return [sys.executable] + known[:1] + known[1:][-1:]

    def test_several_references(self):
        one, first = self.serve(ARCHIVE_TARS[:2], "lab/one:1")
        two, second = self.serve([ARCHIVE_TARS[1], ARCHIVE_TARS[2]], "lab/two:1")
        again, _ = self.serve(ARCHIVE_TARS[:2], "lab/one:2")
        members = self.archive(one, two, again)
        index, manifest = self.documents(members)
        self.assertEqual([entry["RepoTags"] for entry in manifest],
                         [[one, again], [two]])
        annotations = [entry["annotations"] for entry in index["manifests"]]
        self.assertEqual([one[OCI_NAME] for one in annotations], [one, two, again])
        self.assertEqual(len({one[OCI_TAG] for one in annotations}), 3,
                         "two images by one name")
        self.assertEqual(self.blob_gets(first.layers[1]), 1)
        with tarfile.open(self.at("out.tar")) as tar:
            names = tar.getnames()
        self.assertEqual(len(names), len(set(names)))
        self.verify(self.at("out.tar"))

    def test_archive_that_another_program_changes(self):
        """What stays as it is is what was proved."""
        reference, path = self.serve(ARCHIVE_TARS)[0], self.at("out.tar")
        self.archive(reference)
        opened = imagec.ArchiveOutput.open

        def touched(*args):
            opened(*args)
            os.truncate(path, 2000)

        with mock.patch.object(imagec.ArchiveOutput, "open", touched):
            run = self.pull("-o", path, reference, expect=1)
        self.assertIn("another program has changed it", run.err)
        self.archive(reference)
        self.verify(path)

    def test_from_file(self):
        one, two, three = (self.serve(tars, name)[0] for tars, name in (
            (ARCHIVE_TARS[:1], "lab/one:1"), (ARCHIVE_TARS[1:], "lab/two:1"),
            (ARCHIVE_TARS, "lab/three:1")))
        listed = write_file(self.at("list"), (
            # Windows puts U+FEFF before each file; these are two, one behind the other.
            "\ufeff# caf\xe9\n\n  %s  # the first\r\n\ufeff%s#two\n"
            % (two, three)).encode())
        members = self.archive("--from-file", listed, one)
        tags = [entry["RepoTags"][0] for entry in self.documents(members)[1]]
        self.assertEqual(tags, [one, two, three])

    def test_parents_are_made(self):
        reference = self.serve(ARCHIVE_TARS)[0]
        for format, name in (("archive", "a/b/x.tar"), ("rootfs", "c/d/x.tar"),
                             ("rootfs", "e/f"), ("oci", "g/h"), ("layers", "i/j")):
            with self.subTest(format=format, name=name):
                self.pull("-o", self.at(name), "--format", format, reference)
                self.assertEqual(faults_of(self.at(name)), [])

    def test_pipe_named_as_a_file(self):
        # What /dev has free says nothing about who reads from there.
        reference = self.serve(ARCHIVE_TARS)[0]
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        with mock.patch.object(imagec, "existing_parent",
                               lambda path: self.fail("looked for room at " + path)):
            try:
                self.pull("-o", "/dev/fd/%d" % writing, "--format", "archive", reference)
            finally:
                os.close(writing)
        self.assertIn(b"oci-layout", os.read(reading, 1 << 16))

    @rows(((None, "list"), (b"# caf\xe9\n", "UTF-8"), (b"# only\n", "list"),
           (b"a b\n", "line 1: .*a b"), (b"UPPER\n", "line 1: .*UPPER"),
           (b"\xef\xbb\xbflab/app\nLAB\n", "list, line 2: .*LAB"),
           (b"# x\r\n\r\na//b # c\r\n", "list, line 3: .*a//b")))
    def test_from_file_that_is_no_list(self, data, wanted):
        path = self.at("list")
        remove(path)
        if data is not None:
            write_file(path, data)
        run = self.pull("-o", self.at("out.tar"), "--from-file", path,
                        expect=1 if data is None else 2)
        self.assertRegex(run.err, wanted)
        self.assertEqual(self.origin.requests, [])

    def test_standard_output(self):
        reference, _ = self.serve(ARCHIVE_TARS)
        self.archive(reference)
        process = self.start("pull", "-o", "-", "--progress", "plain", reference)
        out, err = process.communicate()
        self.assertEqual(process.returncode, 0, err)
        self.assertEqual(out, file_bytes(self.at("out.tar")))
        self.assertIn(reference.encode(), err)
        self.assertEqual(os.listdir(self.work), ["out.tar"])

    def test_terminal_is_refused(self):
        reference, _ = self.serve(ARCHIVE_TARS)
        out = io.TextIOWrapper(io.BytesIO())
        out.isatty = lambda: True
        with mock.patch.multiple(sys, stdout=out, stderr=io.StringIO()):
            self.assertEqual(imagec.main(["pull", "-q", "-o", "-", reference]), 2)
        self.assertEqual((out.buffer.getvalue(), self.origin.requests), (b"", []))

    def test_formats_that_are_directories_do_not_stream(self):
        reference, _ = self.serve(ARCHIVE_TARS)
        for format in ("layers", "oci"):
            self.pull("-o", "-", "--format", format, reference, expect=2)
        self.assertEqual(self.origin.requests, [])

    def test_full_device(self):
        if not os.path.exists("/dev/full"):
            cannot("fill /dev/full")
        process = self.start("pull", "-q", "-o", "-", self.serve(ARCHIVE_TARS)[0],
                             redirections=">/dev/full")
        err = process.communicate()[1]
        self.assertEqual((process.returncode, err.count(b"\n")), (1, 1), err)

    def killed(self, image, reference, hangs, *complete):
        """Kills a pull once `hangs` is all it waits for."""
        fault = self.origin.fault(image.layers[hangs], hang())
        process = self.start("pull", "-q", "-o", self.at("out.tar"), reference)
        with threat_alarm(60):
            while not (fault.used and self.on_disk(image, complete)):
                time.sleep(0.005)
        process.kill()
        process.wait()

    def on_disk(self, image, complete):
        """Are these layers in the unfinished archive or in the spool, whole?"""
        with contextlib.suppress(OSError):
            spool = os.listdir(self.at("out.tar.partial.d", "blobs"))
            part = file_bytes(self.at("out.tar.partial"))
            return all(image.layers[n][7:] in spool or
                       image.blobs[image.layers[n]] in part for n in complete)

    @rows(((2, 0, 1, 3), (0, 1, 2, 3)))
    def test_killed_and_run_again(self, hangs, *others):
        tars = [raw_words("%d.%d=%s" % (hangs, n, "x" * n)) for n in range(4)]
        reference, image = self.serve(tars)
        self.killed(image, reference, hangs, *others)
        self.assertFalse(os.path.exists(self.at("out.tar")))
        members = self.archive(reference)
        gets = [self.blob_gets(digest) for digest in image.layers]
        self.assertEqual(gets, [2 if n == hangs else 1 for n in range(4)])
        self.assertEqual(os.listdir(self.work), ["out.tar"])
        self.assertEqual(members, self.archive(reference, out="fresh.tar"))
        for name in os.listdir(self.work):
            remove(self.at(name))

    @rows((("flipped", lambda data: data[:3000] + b"?" + data[3001:]),
           ("empty", lambda data: b""), ("no tar", lambda data: b"no tar"),
           ("longer", lambda data: data + b"more"), ("cut", lambda data: data[:2600]),
           ("first byte", lambda data: b"?" + data[1:])))
    def test_unfinished_archive_is_not_believed(self, _, damage):
        reference, _ = self.serve(ARCHIVE_TARS)
        self.archive(reference)
        good = file_bytes(self.at("out.tar"))
        write_file(self.at("out.tar.partial"), damage(good))
        self.archive(reference)
        self.assertEqual(file_bytes(self.at("out.tar")), good)

    def test_T010_names_in_it(self):
        reference, _ = self.serve(ARCHIVE_TARS, kind="schema1-signed")
        for name in self.archive(reference):
            self.assertRegex(name, "^(blobs(/sha256(/[0-9a-f]{64})?)?|oci-layout|"
                                   r"index\.json|manifest\.json|repositories)$")
        self.verify(self.at("out.tar"))


class StickTest(StoredCase):
    """What crosses an air gap travels on FAT and exFAT."""

    @able(hasattr(os, "geteuid"), "tell users apart")
    @rows(itertools.product((errno.EPERM, errno.ENOSYS), (
        OSError(errno.ENOSYS, "Function not implemented"), mock.Mock(total=0, free=0))))
    def test_no_modes_no_owners_no_statfs(self, code, usage):
        remove(self.at("out.tar"))
        reference, image = self.serve(ARCHIVE_TARS)
        fault, nobody = OSError(code, "chmod"), os.geteuid() + 1
        with mock.patch.object(os, "chmod", side_effect=fault), mock.patch.object(
                os, "geteuid", return_value=nobody), mock.patch.object(
                    shutil, "disk_usage", side_effect=[usage] * 2):
            self.origin.fault(image.layers[-1], flip(), times=None)
            self.pull("-o", self.at("out.tar"), reference, "-j", "1", expect=3)
            self.origin.faults.clear()
            self.pull("-o", self.at("out.tar"), reference)  # and what is there is kept
        self.assertEqual([self.blob_gets(digest) for digest in image.layers], [1, 1, 2])
        self.assertEqual(os.listdir(self.work), ["out.tar"])
        self.verify(self.at("out.tar"))
        del self.origin.requests[:]

    @rows((("archive", "out.tar", 3000, 3500), ("oci", "out", 1000, 5000)))
    def test_file_that_may_not_grow_that_large(self, format, name, *sizes):
        def seek(fd, offset, whence):  # as Linux does beyond what a file system holds
            if offset > 4000:
                raise OSError(errno.EINVAL, "Invalid argument")
            return lseek(fd, offset, whence)

        lseek, (reference, image) = os.lseek, self.serve(
            [tar_bytes([("x", noise(size, 1))]) for size in sizes])
        with mock.patch.object(os, "lseek", seek):
            run = self.pull("--format", format, "-o", self.at(name), reference, "-j",
                            "1", expect=1)
        self.assertRegex(run.err, "no file can have [5-7][0-9]{3} bytes there; "
                                  "--format oci keeps files smaller")
        self.assertEqual(self.blob_gets(image.layers[1]), 0)

    @needs("mkfs.fat", "fusefat", "fusermount")
    @able(os.access("/dev/fuse", os.R_OK | os.W_OK), "mount by FUSE")
    def test_FAT(self):
        with open(self.at("fat"), "wb") as file:
            file.truncate(48 << 20)
        os.mkdir(self.at("stick"))
        for command in (("mkfs.fat", "-F", "32", self.at("fat")),
                        ("fusefat", "-o", "rw+", self.at("fat"), self.at("stick"))):
            done = subprocess.run(command, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
            if done.returncode:
                self.skipTest(CANNOT + "mount by FUSE")
        self.addCleanup(subprocess.check_call, ("fusermount", "-u", self.at("stick")))
        for options, name in (((), "x.tar"), (("--format", "oci"), "layout")) * 2:
            self.pull(*options, "-o", self.at("stick", name),
                      self.serve(ARCHIVE_TARS)[0])
            self.verify(self.at("stick", name))
        self.assertEqual(sorted(os.listdir(self.at("stick"))), ["layout", "x.tar"])


class OCIOutputTest(StoredCase):
    """A layout directory, which collects images."""

    def setUp(self):
        super().setUp()
        self.out = self.at("out")

    def layout(self, *argv, expect=0):
        return self.pull("--format", "oci", "-o", self.out, *argv, expect=expect)

    def blob(self, digest):
        return os.path.join(self.out, "blobs", "sha256", digest[7:])

    def index(self):
        return json.loads(file_bytes(os.path.join(self.out, "index.json")).decode())

    def names(self):
        """(digest, full name or None, tag or None) of each entry."""
        return [(entry["digest"],) + tuple(
            entry.get("annotations", {}).get(key) for key in (OCI_NAME, OCI_TAG))
            for entry in self.index()["manifests"]]

    def blobs(self):
        return {"sha256:" + name for name in os.listdir(self.blob(""))}

    @rows((("oci",), ("docker",)))
    def test_files(self, kind):
        reference, image = self.serve(ARCHIVE_TARS, kind=kind)
        self.out = self.at(kind)
        self.layout(reference)
        self.assertEqual(sorted(os.listdir(self.out)),
                         ["blobs", "index.json", "oci-layout"])
        self.assertEqual(self.names(), [(image.digest, reference, "1")])
        self.assertEqual(self.blobs(), set(image.blobs) | {image.digest})
        self.assertEqual(self.index()["manifests"][0]["mediaType"], image.media_type)
        self.verify(self.out)

    def test_collects(self):
        one, first = self.serve(ARCHIVE_TARS[:2], "lab/one:a")
        two, second = self.serve(ARCHIVE_TARS[1:], "lab/two:b")
        for reference in (one, two, one):
            self.layout(reference)
        self.assertEqual(self.names(), [(second.digest, two, "b"),
                                        (first.digest, one, "a")])
        for digest in first.layers + second.layers:
            self.assertEqual(self.blob_gets(digest), 1)
        self.verify(self.out)

    def test_tag_that_moves(self):
        reference, old = self.serve(ARCHIVE_TARS[:1])
        self.layout(reference)
        reference, new = self.serve(ARCHIVE_TARS[1:])
        self.layout(reference)
        self.assertEqual(self.names(), [(old.digest, None, None),
                                        (new.digest, reference, "1")])
        self.verify(self.out)

    def test_nameless(self):
        reference, image = self.serve(ARCHIVE_TARS)
        by_digest = reference[:-2] + "@" + image.digest
        self.layout(by_digest)
        self.layout(by_digest)
        self.assertEqual(self.names(), [(image.digest, None, None)])
        self.layout(reference)
        self.assertEqual(self.names(), [(image.digest, reference, "1")])
        self.layout(by_digest, "--tag", "other:2")
        self.assertEqual([row[2] for row in self.names()], ["1", "2"])

    def test_same_tag_of_two_repositories(self):
        one, first = self.serve(ARCHIVE_TARS[:1], "lab/one:1")
        two, second = self.serve(ARCHIVE_TARS[1:], "lab/two:1")
        for reference in (one, two, two, one):
            self.layout(reference)
            tags = [row[2] for row in self.names()]
            self.assertEqual(len(tags), len(set(tags)))
        self.assertEqual(sorted(row[1] for row in self.names()), sorted([one, two]))
        self.assertIn("1", tags)

    def test_T125_keeps_what_it_does_not_know(self):
        one, _ = self.serve(ARCHIVE_TARS[:1], "lab/one:a")
        two, _ = self.serve(ARCHIVE_TARS[1:], "lab/two:b")
        self.layout(one)
        index = self.index()
        index.update({"x-unknown": {"deep": [1, 2.5, "\xe9"]},
                      "annotations": {"k": "v"}})
        index["manifests"][0]["x-entry"] = True
        index["manifests"][0]["annotations"]["mine"] = "kept"
        write_file(self.at("out", "index.json"), json.dumps(index).encode())
        self.layout(two)
        found = self.index()
        del found["manifests"][1:]
        self.assertEqual(found, index)

    def refuse(self):
        before = stored_state(self.work)
        run = self.layout(self.serve(ARCHIVE_TARS)[0], expect=1)
        self.assertEqual(run.err.count("\n"), 1, run.err)
        self.assertEqual(stored_state(self.work), before)
        self.assertEqual(self.blob_gets("sha256"), 0)

    #: (oci-layout, index.json or None)
    NO_LAYOUTS = (
        (b"", None), (b"[]", None), (b'{"imageLayoutVersion": 1}', None),
        (b'{"imageLayoutVersion": "2.0.0"}', None)) + tuple(
        (LAYOUT, index) for index in (
            b"", b"[]", b"\xff", b'{"manifests": [}',
            b'{"schemaVersion": 2, "manifests": {}}',
            b'{"schemaVersion": 2, "manifests": [1]}',
            b'{"schemaVersion": 2, "manifests": [{"annotations": 5}]}',
            b'{"schemaVersion": 2, "manifests": [{"annotations": ["a"]}]}'))

    @rows(NO_LAYOUTS)
    def test_T125_refuses_what_it_does_not_understand(self, marker, index):
        remove(self.out)
        write_file(self.at("out", "oci-layout"), marker)
        if index is not None:
            write_file(self.at("out", "index.json"), index)
        self.refuse()

    @rows(((b'{"schemaVersion":2,"manifests":null}',), (b"{}",)))
    def test_layout_of_nothing(self, index):
        """What `umoci init` makes."""
        remove(self.out)
        write_file(self.at("out", "oci-layout"), LAYOUT)
        write_file(self.at("out", "index.json"), index)
        reference, image = self.serve(ARCHIVE_TARS)
        self.layout(reference)
        self.assertEqual(self.names(), [(image.digest, reference, "1")])

    def test_entry_of_another_type_than_its_manifest_says(self):
        """The manifest's own word counts, each time and everywhere."""
        _, image = self.serve(ARCHIVE_TARS[:1], kind="docker")
        entry = image.descriptor(platform={"architecture": "amd64", "os": "linux"})
        index = build_index([], extra_entries=[
            dict(entry, mediaType=MEDIA_TYPES["oci"]["manifest"])])
        index.children = [image]
        self.origin.add("lab/typed", "1", index)
        for options in ((), (), ("--platform", "all")):
            self.layout(*options, self.origin.host + "/lab/typed:1")
            self.verify(self.out)
        self.assertTrue(imagec.Shelf(self.out).repositories)

    def test_T126_refuses_what_is_no_layout(self):
        write_file(self.out, b"mine")
        self.refuse()
        os.unlink(self.out)
        write_file(self.at("out", "mine"), b"")
        self.refuse()
        os.mkdir(self.at("out", "oci-layout"))
        self.refuse()

    @rows((("blobs",), ("blobs", "sha256")))
    def test_T012_links_below_it(self, *parts):
        remove(self.out)
        os.makedirs(self.at("canary"), exist_ok=True)
        write_file(self.at("out", "oci-layout"), LAYOUT)
        os.makedirs(self.at("out", *parts[:-1]), exist_ok=True)
        os.symlink(self.at("canary"), self.at("out", *parts))
        self.layout(self.serve(ARCHIVE_TARS)[0], expect=1)
        self.assertEqual(os.listdir(self.at("canary")), [])

    def test_T012_a_link_to_it_is_the_users(self):
        os.mkdir(self.at("real"))
        os.symlink("real", self.out)
        reference, _ = self.serve(ARCHIVE_TARS)
        self.layout(reference)
        self.assertIn("index.json", os.listdir(self.at("real")))
        self.verify(self.out)

    def test_tag_then_the_same_by_digest(self):
        reference, image = self.serve(ARCHIVE_TARS)
        pinned = reference.rpartition(":")[0] + "@" + image.digest
        for one in (pinned, reference, pinned):
            self.layout(one)
            self.assertEqual(len(self.names()), 1)
        self.assertEqual(self.names(), [(image.digest, reference, "1")])

    def test_T012_planted_links(self):
        reference, image = self.serve(ARCHIVE_TARS)
        os.makedirs(self.blob(""))
        write_file(self.at("victim"), b"untouched")
        write_file(self.at("out", "oci-layout"), LAYOUT)
        for path in (self.blob(image.layers[0]), self.blob(image.digest),
                     self.blob(image.layers[1]) + ".partial",
                     self.at("out", "index.json.partial")):
            os.symlink(self.at("victim"), path)
        self.layout(reference)
        self.assertEqual(file_bytes(self.at("victim")), b"untouched")
        self.verify(self.out)

    def test_blob_that_went_bad(self):
        reference, image = self.serve(ARCHIVE_TARS)
        self.layout(reference)
        for digest in (image.layers[0], image.digest, sha256(image.config)):
            data = file_bytes(self.blob(digest))
            damage_flip(self.blob(digest))
            self.verify(self.out, expect=3)
            self.layout(reference)
            self.assertEqual(file_bytes(self.blob(digest)), data)
        self.assertEqual([self.blob_gets(digest) for digest in image.layers], [2, 1, 1])

    @able(hasattr(os, "mkfifo"), "make fifos")
    @rows(itertools.product(("index.json", "oci-layout"), NO_FILES))
    def test_only_regular_files_are_read(self, name, make):
        remove(self.out)
        reference, _ = self.serve(ARCHIVE_TARS)
        self.layout(reference)
        os.unlink(self.at("out", name))
        make(self.at("out", name))
        with threat_alarm(60):
            run = self.layout(reference, expect=1)
        self.assertIn(name + " is not a regular file", run.err)

    @able(hasattr(os, "mkfifo"), "make fifos")
    def test_documents_there_that_are_none(self):
        # What is there by the name wanted is not believed, and not waited for.
        reference, image = self.serve(ARCHIVE_TARS)
        self.layout(reference)
        damage_json(lambda value: value["config"].update(digest=image.digest))(
            self.blob(image.digest))
        self.layout(reference)
        self.verify(self.out)
        for digest in (image.digest, sha256(image.config)):
            for make in NO_FILES:
                os.unlink(self.blob(digest))
                make(self.blob(digest))
                with self.subTest(digest), threat_alarm(60):
                    self.layout(reference)
                    self.verify(self.out)

    def test_T120_disk_full_at_the_index(self):
        one, _ = self.serve(ARCHIVE_TARS[:1], "lab/one:1")
        two, _ = self.serve(ARCHIVE_TARS[1:], "lab/two:2")
        self.layout(one)
        before, write = self.index(), imagec.Partial.write

        def full(partial, data):
            if partial.final.endswith("index.json"):
                write(partial, data[:10])
                raise OSError(28, "No space left on device", partial.path)
            write(partial, data)

        with mock.patch.object(imagec.Partial, "write", full):
            self.assertIn("No space left", self.layout(two, expect=1).err)
        self.assertEqual(self.index(), before)
        self.layout(two)
        self.assertEqual(len(self.names()), 2)

    @rows(((2,), (8,)))
    def test_T124_many_at_once(self, count):
        self.out = self.at("out%d" % count)
        references = [self.serve([ARCHIVE_TARS[0], raw_words("f=%d" % n)],
                                 "lab/app%d:t%d" % (n, n))[0] for n in range(count)]
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda one: imagec.pull(one, self.out, "oci"), references))
        self.assertEqual(sorted(row[1] for row in self.names()), sorted(references))
        self.verify(self.out)

    def test_T124_another_has_just_begun(self):
        os.makedirs(self.blob(""))
        write_file(self.at("out", "oci-layout.partial"), b"{")
        self.layout(self.serve(ARCHIVE_TARS)[0])
        self.verify(self.out)

    def multi(self):
        """An index: two platforms, one in an index of its own, and an attestation."""
        amd = build_image(ARCHIVE_TARS[:1])
        arm = build_image(ARCHIVE_TARS[1:2], platform=("linux", "arm64", None))
        nested = build_index([(arm, ("linux", "arm64", None))])
        proof = build_image([b'{"_type": "in-toto"}'], compress=None,
                            platform=("unknown", "unknown", None))
        document = json.loads(proof.manifest.decode())
        document["layers"][0]["mediaType"] = "application/vnd.in-toto+json"
        proof.manifest = json.dumps(document).encode()
        proof.digest = sha256(proof.manifest)
        index = build_index([(amd, ("linux", "amd64", None)), (nested, None),
                             (proof, ("unknown", "unknown", None))])
        self.origin.add("lab/multi", "1", index)
        everything = {image.digest for image in (amd, arm, proof, nested, index)}
        everything.update(amd.blobs, arm.blobs, proof.blobs)
        return self.origin.host + "/lab/multi:1", index, arm, everything

    def test_all_platforms(self):
        reference, index, _, everything = self.multi()
        self.layout("--platform", "all", reference)
        self.assertEqual(self.names(), [(index.digest, reference, "1")])
        self.assertEqual(self.blobs(), everything)
        self.verify(self.out)

    def test_one_platform_of_several(self):
        reference, index, arm, _ = self.multi()
        way = [index.digest, index.children[1].digest]
        run = self.layout("--platform", "linux/arm64", reference)
        self.assertIn(index.digest.encode(), run.out)
        self.assertEqual(self.names(), [(arm.digest, reference, "1")])
        self.assertEqual(self.blobs(), set(arm.blobs).union(way, [arm.digest]))
        annotations = self.index()["manifests"][0]["annotations"]
        self.assertEqual(annotations, dict(annotations, **origin_of(
            digest=way[0], repository=reference[:-2], platforms="linux/arm64",
            indexes=" ".join(way))))
        self.verify(self.out)
        shelf = imagec.Shelf(self.out)
        for name, wanted in (("1", arm), (index.digest, index)):
            self.assertEqual(serve_raw_of(shelf, "lab/multi", name), wanted.manifest)
        self.layout("--platform", "linux/amd64", reference)
        self.assertEqual([row[1] for row in self.names()], [None, reference])
        self.layout("--platform", "all", reference)
        self.assertEqual([row[1] for row in self.names()], [None, None, reference])
        self.verify(self.out)

    def test_all_platforms_elsewhere(self):
        reference = self.multi()[0]
        for options in (("--format", "layers"), ("--format", "archive"),
                        ("--format", "rootfs"), ("--format", "oci", "--recompress",
                                                 "gzip")):
            self.pull("--platform", "all", "-o", self.at("x"), reference, *options,
                      expect=2)
        self.assertEqual(os.listdir(self.work), [])

    def test_schema1(self):
        reference, image = self.serve(ARCHIVE_TARS[:1] + [None], kind="schema1-signed")
        self.layout(reference)
        (digest, _, tag), = self.names()
        self.assertEqual((tag, len(self.blobs())), ("1", 3))
        self.assertNotIn(sha256(EMPTY_LAYER), self.blobs())
        self.assertEqual(self.blob_gets(sha256(EMPTY_LAYER)), 0)
        manifest = json.loads(file_bytes(self.blob(digest)).decode())
        self.assertEqual(manifest["mediaType"], MEDIA_TYPES["docker"]["manifest"])
        self.verify(self.out)


#: Types of layers that are no tar to unpack, of images.
OTHER_LAYERS = tuple((kind,) for kind in (
    "application/vnd.oci.image.layer.squashfs", "application/vnd.erofs.layer.v1",
    "application/vnd.wasm.content.layer.v1+wasm",
    MEDIA_TYPES["oci"]["layer"] + "+gzip+encrypted"))


class ArtifactsTest(StoredCase):
    """What is no image, or not of tars: kept as it is, where it can be kept."""

    SBOM = ("application/spdx+json", b'{"spdxVersion": "SPDX-2.3"}', "sbom.json")

    def offered(self, image, name="lab/thing:1"):
        self.clear()
        del self.origin.requests[:]
        repository, _, tag = name.partition(":")
        self.origin.add(repository, tag, image)
        return self.origin.host + "/" + name

    def refused(self, reference, words, *formats):
        """Refused by name, and nothing is fetched for it or left behind."""
        for format in formats:
            run = self.pull("--format", format, "-o", self.at(format), reference,
                            expect=1)
            self.assertRegex(run.err, words)
            self.assertEqual(run.err.count("\n"), 1)
        self.assertEqual(os.listdir(self.work), [])

    def kept(self, reference, image, told=""):
        """It comes whole into a layout and an archive, is good there, and served."""
        for format in ("oci", "archive"):
            for _ in range(2):
                run = self.main("pull", "--progress", "none", "--format", format, "-o",
                                self.at(format), reference)
                self.assertEqual(run.status, 0, run.err)
                self.assertEqual("docker cannot load" in run.err, format == "archive")
                run = self.main("verify", self.at(format))
                self.assertEqual(run.status, 0)
                self.assertRegex(run.err, r"\A%s\Z" % told)
            shelf = imagec.Shelf(self.at(format))
            for digest in image.blobs:
                self.assertTrue(shelf.blob(imagec.Digest.parse(digest)), digest)
            self.assertEqual(shelf.documents[image.digest][0], image.manifest)
        self.assertLessEqual(set(map(self.blob_gets, image.layers)), {2})
        return self.members(self.at("archive"))

    ARTIFACTS = (
        ("empty config", [SBOM], {}), ("of nothing", [], {}),
        ("config of its own", [("application/x", b"x", None)],
         dict(kind=None, config=b'{"a": 1}', config_type="application/vnd.x+json")),
        # `cosign sign`, `cosign attest`: the type of the config is an image's
        ("signature", [("application/vnd.dev.cosign.simplesigning.v1+json", b"{}1",
                        {"dev.cosignproject.cosign/signature": "MEUC"})],
         dict(kind=None, config_type=MEDIA_TYPES["oci"]["config"])),
        ("no image's tar", [(MEDIA_TYPES["oci"]["layer"] + "+gzip", b"no gzip", "x")],
         {}))

    @rows(ARTIFACTS)
    def test_artifacts(self, _, blobs, options):
        image = build_artifact(blobs, **options)
        reference = self.offered(image)
        self.refused(reference, "lab/thing:1 is no container image, but an artifact of "
                     "type (application/vnd.*|text/spdx)$", "layers", "rootfs")
        members = self.kept(reference, image)
        self.assertEqual(json.loads(members["manifest.json"].decode()), [])
        self.assertNotIn("repositories", members)
        entry, = json.loads(members["index.json"].decode())["manifests"]
        self.assertNotIn("platform", entry)

    @rows(OTHER_LAYERS)
    def test_layers_of_other_kinds(self, kind):
        image = build_image(ARCHIVE_TARS[:2])
        document = json.loads(image.manifest.decode())
        document["layers"][1]["mediaType"] = kind
        image.manifest = json_bytes(document)
        image.digest = sha256(image.manifest)
        reference = self.offered(image)
        self.refused(reference, "layer %s .*lab/thing:1 is of type %s, not a tar$" % (
            image.layers[1], re.escape(kind)), "layers", "rootfs")
        self.kept(reference, image, "imagec: warning: not checked: blobs/.*: what it "
                  "unpacks to: it is of type %s\n" % re.escape(kind))

    def test_an_image_beside_it(self):
        one = self.offered(build_artifact([self.SBOM]))
        two, image = self.serve(ARCHIVE_TARS, compress=zstd_bytes if shutil.which("zstd")
                                else gzip_bytes)
        for options in ((), ("--recompress", "gzip")):
            self.pull("-o", self.at("both.tar"), one, two, *options)
            self.verify(self.at("both.tar"))
            entry, = json.loads(self.members(self.at("both.tar"))["manifest.json"])
            self.assertEqual(entry["RepoTags"], [two])
            self.assertTrue(imagec.Shelf(self.at("both.tar")).blob(
                imagec.Digest.parse(sha256(self.SBOM[1]))))


@needs_zstd
class WithoutTest(StoredCase):
    """An update is what is new, beside what is there already."""

    def setUp(self):
        super().setUp()
        self.old, _ = self.serve(ARCHIVE_TARS[:2])
        self.new, self.image = self.serve(ARCHIVE_TARS, "lab/app:2")
        self.other, self.wider = self.serve(
            [ARCHIVE_TARS[0], raw_words("x=1"), ARCHIVE_TARS[1]], "lab/other:1")

    def bases(self):
        """Where the older image is: in the registry, an archive, a layout."""
        self.pull("-o", self.at("old.tar"), self.old)
        self.pull("-o", self.at("old"), "--format", "oci", self.old)
        return self.old, self.at("old.tar"), self.at("old")

    def left_out(self, image, name, *bases):
        """Which layers an update lacks, as --json and the index say and as it is."""
        run = self.pull("--json", "--format", "archive" if name.endswith(".tar") else
                        "oci", "-o", self.at(name), "%s/lab/%s" % (
                            self.origin.host, image), *[
                                word for base in bases for word in ("--without", base)])
        said = json.loads(run.out.decode())["without"]
        there, = imagec.stored(imagec.open_place(self.at(name)))
        self.assertEqual([str(digest) for digest in there.origin.without], said)
        layers = list(there.documents)[-1].layers
        names = there.reader.names()
        self.assertEqual([str(layer.digest) for layer in layers
                          if imagec.blob_name(layer.digest) not in names], said)
        return [[str(layer.digest) for layer in layers].index(one) for one in said]

    def test_what_is_elsewhere_is_not_fetched(self):
        for number, base in enumerate(self.bases()):
            for name in ("new.tar", "new"):
                before = [self.blob_gets(digest) for digest in self.image.layers]
                self.assertEqual(self.left_out("app:2", str(number) + name, base), [0, 1])
                gets = [self.blob_gets(digest) for digest in self.image.layers]
                self.assertEqual([now - then for now, then in zip(gets, before)],
                                 [0, 0, 1])

    def test_docker_needs_the_layers_below(self):
        self.assertEqual(self.left_out("other:1", "x.tar", self.old), [0])
        self.assertEqual(self.left_out("other:1", "x", self.old), [0, 2])
        self.assertEqual(self.left_out("other:1", "y.tar", self.new, self.other),
                         [0, 1, 2])
        self.assertEqual(self.left_out("app:2", "z.tar", self.other), [0])

    def test_it_is_told(self):
        run = self.main("pull", "--without", self.new, "-o", self.at("o.tar"), self.new)
        self.assertIn("left out, for it is elsewhere: 3 of 3 layers, %d bytes" % sum(
            len(self.image.blobs[digest]) for digest in self.image.layers), run.err)
        run = self.main("pull", "--without", self.old, "-o", self.at("o.tar"), self.new)
        run = self.main("verify", self.at("o.tar"))
        self.assertEqual(run.status, 1)
        self.assertIn("incomplete: 2 blobs are elsewhere", run.err)

    @rows((("layers", ()), ("rootfs", ()), ("oci", ("--recompress", "gzip"))))
    def test_what_it_does_not_go_with(self, format, options):
        self.pull("--without", self.old, "--format", format, "-o", self.at("o"),
                  *options, self.new, expect=2)
        self.assertEqual(self.blob_gets(), 0)

    def test_the_two_together(self):
        for base in self.bases()[1:]:
            for name in ("new.tar", "new"):
                self.left_out("app:2", name, base)
                self.pull("-o", self.at("other"), "--format", "oci", self.serve(
                    ARCHIVE_TARS[:1], "lab/less:1")[0])
                run = self.main("verify", self.at(name), "--with", self.at("other"))
                self.assertEqual(run.status, 1, run.err)
                run = self.main("verify", self.at(name), "--with", base)
                self.assertEqual(run.status, 0, run.err)
                remove(self.at(name))


    def test_served_together(self):
        _, *bases = self.bases()
        for base in bases:
            for name in ("new.tar", "new"):
                self.pull("--without", base, "--tag", self.old, "--format", "archive" if
                          "." in name else "oci", "-o", self.at(name), self.new)
                self.pull("-o", self.at("twin.tar"), self.old)
                with self.assertLogs("imagec", "WARNING") as told:
                    shelf = imagec.Shelf(self.at(name), self.at("twin.tar"), base)
                self.assertRegex("".join(told.output), "lab/app:1 is that of .*/new")
                self.assertNotIn("passed over", "".join(told.output))
                self.assertEqual(shelf.tags("lab/app")["1"], self.image.digest)
                for digest in self.image.layers:
                    self.assertTrue(shelf.blob(imagec.Digest.parse(digest)))
                remove(self.at(name))


class RecompressTest(StoredCase):
    """zstd layers as they are, and as gzip for those who cannot read them."""

    def setUp(self):
        super().setUp()
        self.reference, self.image = self.serve(ARCHIVE_TARS, compress=zstd_bytes)

    def recompressed(self, name, *references):
        """Pull them with gzip layers, and verify what is there."""
        format = "archive" if name.endswith(".tar") else "oci"
        self.pull("--recompress", "gzip", "--format", format, "-o", self.at(name),
                  *references)
        self.verify(self.at(name))

    def test_passed_through(self):
        for out, options in (("out.tar", ()), ("out", ("--format", "oci"))):
            self.pull("-o", self.at(out), self.reference, *options)
            self.verify(self.at(out))
        members = self.members(self.at("out.tar"))
        for digest in self.image.layers:
            self.assertIn("blobs/sha256/" + digest[7:], members)

    def test_old_docker_is_warned_of(self):
        run = self.main("pull", "--progress", "none", "-o", self.at("out.tar"),
                        self.reference)
        self.assertEqual(run.err.count("--recompress gzip"), len(ARCHIVE_TARS))

    def test_archive(self):
        self.recompressed("out.tar", self.reference)
        members = self.members(self.at("out.tar"))
        entry, = json.loads(members["index.json"].decode())["manifests"]
        manifest = json.loads(members["blobs/sha256/" + entry["digest"][7:]].decode())
        wanted = json.loads(self.image.manifest.decode())
        self.assertEqual(manifest["config"], wanted["config"])
        for layer, diff_id in zip(manifest["layers"], self.image.diff_ids):
            blob = members["blobs/sha256/" + layer["digest"][7:]]
            self.assertEqual(sha256(zlib.decompress(blob, 31)), diff_id)
            self.assertEqual(layer["mediaType"], MEDIA_TYPES["oci"]["layer"] + "+gzip")
        self.assertEqual(len(members), 3 + 3 + 2 + 3)

    def test_no_way_leads_down_to_what_is_rewritten(self):
        index = build_index([(self.image, ("linux", "amd64", None))])
        self.origin.add("lab/multi", "1", index)
        reference = self.origin.host + "/lab/multi:1"
        run = self.main("pull", "--platform", "linux/amd64", "--recompress", "gzip",
                        "-o", self.at("out.tar"), reference)
        self.assertRegex(run.err, "was rewritten.*%s is only noted" % index.digest)
        self.verify(self.at("out.tar"))
        members = self.members(self.at("out.tar"))
        self.assertNotIn("blobs/sha256/" + index.digest[7:], members)
        entry, = json.loads(members["index.json"].decode())["manifests"]
        self.assertEqual(imagec.Origin.of(entry["annotations"]), (
            imagec.Digest.parse(index.digest), reference[:-2], "linux/amd64", (), None,
            ()))

    def test_what_was_said_of_the_old_bytes_is_gone(self):
        chunked, toc = "io.github.containers.zstd-chunked.", "containerd.io/snapshot/"
        document = json.loads(self.image.manifest.decode())
        document["layers"][0].update(data="eA==", urls=["https://x/"], annotations={
            "mine": "x", chunked + "manifest-checksum": SUM_A,
            chunked + "manifest-position": "1:2:3:1", toc + "stargz/toc.digest": SUM_A})
        self.origin.add_manifest("lab/app", "2", json_bytes(document),
                                 self.image.media_type)
        self.recompressed("noted", self.reference[:-1] + "2")
        blobs = [data for data in contents(self.at("noted")).values()
                 if b'"mine"' in data]
        layer = json.loads(blobs[0].decode())["layers"][0]
        self.assertEqual(set(layer), {"mediaType", "size", "digest", "annotations"})
        self.assertEqual(layer["annotations"], {"mine": "x"})

    def test_layout(self):
        for _ in range(2):
            self.recompressed("out", self.reference)
            self.assertEqual(len(os.listdir(self.at("out", "blobs", "sha256"))), 5)

    def test_archive_that_holds_them_as_they_came(self):
        self.recompressed("fresh.tar", self.reference)
        self.pull("-o", self.at("out.tar"), self.reference)
        self.recompressed("out.tar", self.reference)
        self.assertEqual(*[file_bytes(self.at(out)) for out in ("fresh.tar", "out.tar")])

    def test_layers_that_are_told_of(self):
        image = imagec.pull(self.reference, self.at("out.tar"), recompress="gzip",
                            platform="linux/amd64")
        self.assertEqual([layer.blob for layer in image.layers],
                         list(image.manifest.layers))

    def test_what_is_not_zstd_stays(self):
        layers = iter([gzip_bytes, zstd_bytes, None])
        reference, image = self.serve(
            ARCHIVE_TARS[:2], "lab/mixed:1", compress=lambda tar: next(layers)(tar))
        self.recompressed("out.tar", reference)
        members = self.members(self.at("out.tar"))
        self.assertIn("blobs/sha256/" + image.layers[0][7:], members)
        self.assertNotIn("blobs/sha256/" + image.layers[1][7:], members)

    def test_shared_by_two_images(self):
        other, _ = self.serve(ARCHIVE_TARS[1:], "lab/other:1", compress=zstd_bytes)
        for name in ("out.tar", "out"):
            self.recompressed(name, self.reference, other)

    def test_layers_that_become_the_same(self):
        references = [self.reference] + [
            self.serve(tars, name, compress=compress)[0] for tars, name, compress in (
                (ARCHIVE_TARS, "lab/frame:1",
                 lambda tar: zstd_bytes(tar) + SKIPPABLE_FRAME),
                (ARCHIVE_TARS[::-1], "lab/gzip:1", gzip_bytes))]
        for order in itertools.permutations(references):
            for jobs in ("1", "4"):
                with self.subTest(order=order, jobs=jobs):
                    remove(self.at("out.tar"))
                    for _ in range(2):
                        self.recompressed("out.tar", "-j", jobs, *order)
                    self.assertEqual(len(self.members(self.at("out.tar"))),
                                     3 + len(ARCHIVE_TARS) + 2 * 3 + 3 - 2)

    def test_formats_that_keep_layers(self):
        for format in ("layers", "rootfs"):
            self.pull("--recompress", "gzip", "--format", format, "-o", self.at("out"),
                      self.reference, expect=2)
        self.assertEqual(os.listdir(self.work), [])

    def test_rootfs_of_zstd(self):
        self.pull("--format", "rootfs", "-o", self.at("out"), self.reference)
        self.assertIn("etc/c=3", flat_directory_words(self.at("out")))


# --------------------------------------------------------------------------------------
# 13  Trees
# --------------------------------------------------------------------------------------

FLAT_BAD = imagec.InvalidDocument
FLAT_PLNK = ".wh..wh.plnk/ .wh..wh.plnk/1.2=data "
FLAT_CASES = (
    # where it is from, layers, the tree they make or the error
    ("spec: whiteout", ["a=1 b=2", ".wh.a="], "b=2"),
    ("spec: whiteout of a directory", ["d/x=1 d/y/z=2", ".wh.d="], ""),
    ("spec: whiteout, then again", ["a=1", ".wh.a=", "a=2"], "a=2"),
    ("T150: before what the layer adds", ["a=1", ".wh.a= a=2"], "a=2"),
    ("T150: after it", ["a=1", "a=2 .wh.a="], "a=2"),
    ("T150: of a directory the layer refills", ["d/x=1", ".wh.d= d/ d/y=2"],
     "d/ d/y=2"),
    ("T150: the same, last", ["d/x=1", "d/ d/y=2 .wh.d="], "d/ d/y=2"),
    ("T150: a link takes its place", ["d/x=1 e/", "d->e .wh.d="], "d->e e/"),
    ("T150: of nothing", ["a=1", ".wh.b= no/.wh.c= a/.wh.d="], "a=1"),
    ("T150: of what this layer alone has", ["", "a=1 .wh.a="], "a=1"),
    ("T150: opaque first", ["d/x=1", "d/ d/.wh..wh..opq= d/y=2"], "d/ d/y=2"),
    ("T150: opaque last", ["d/x=1", "d/ d/y=2 d/.wh..wh..opq="], "d/ d/y=2"),
    ("T150: opaque, same name", ["d/x=1", "d/x=2 d/.wh..wh..opq="], "d/ d/x=2"),
    ("T150: opaque is deep", ["d/e/x=1", "d/e/y=2 d/.wh..wh..opq="],
     "d/ d/e/ d/e/y=2"),
    ("T150: opaque, others stay", ["d/x=1 e/x=1", "d/.wh..wh..opq="], "d/ e/ e/x=1"),
    ("T150: opaque of nothing", ["a=1", "no/.wh..wh..opq= a/.wh..wh..opq="], "a=1"),
    ("T149: opaque at the root", ["a=1 d/x=1", "b=2 .wh..wh..opq="], "b=2"),
    ("T149: bare", ["d/x=1", "d/.wh.="], FLAT_BAD),
    ("T149: bare at the root", ["a=1", ".wh.="], FLAT_BAD),
    ("T149: of the directory itself", ["d/x=1", "d/.wh..="], FLAT_BAD),
    ("T149: of its parent", ["d/x=1", "d/.wh...="], FLAT_BAD),
    ("T149: unknown kind", ["a=1 x=1 d/x=2", ".wh..wh.x= d/.wh..wh.x="],
     "a=1 x=1 d/ d/x=2"),
    ("T149: as a component", ["a=1 b=2", ".wh.a/b=3"], "a=1 b=2 .wh.a/ .wh.a/b=3"),
    ("T149: as a directory", ["a=1 b=2", ".wh.a/"], "b=2"),
    ("T149: as a link", ["a=1 b=2", ".wh.a->b"], "b=2"),
    ("T149: with data", ["a=1 b=2", ".wh.a=data"], "b=2"),
    ("docker: AUFS keeps hard links' data apart",
     [FLAT_PLNK + "a=>.wh..wh.plnk/1.2 b=>.wh..wh.plnk/1.2"], "a=data b=>a"),
    ("docker: AUFS's other things", [".wh..wh.aufs= .wh..wh.orph/ a=1"], "a=1"),
    ("root entry", ["./ a=1", "/ ./b=2"], "a=1 b=2"),
    ("implicit parents", ["a/b/c=1"], "a/ a/b/ a/b/c=1"),
    ("names that say the same", ["./a//b/./c=1", "/a/b/c=2"], "a/ a/b/ a/b/c=2"),
    ("T157: twice", ["a=1 a=2"], "a=2"),
    ("T157: twice, a directory first", ["d/x=1 d=2"], "d=2"),
    ("T157: twice, a directory last", ["d/x=1 d/"], "d/ d/x=1"),
    ("T151: file, directory", ["a=1", "a/ a/x=2"], "a/ a/x=2"),
    ("T151: directory, file", ["a/x=1", "a=2"], "a=2"),
    ("T151: directory, link", ["a/x=1 b/", "a->b"], "a->b b/"),
    ("T151: link, directory", ["b/x=1 a->b", "a/ a/y=2"], "a/ a/y=2 b/ b/x=1"),
    ("T151: link, file", ["b=1 a->b", "a=2"], "a=2 b=1"),
    ("T151: file, link", ["a=1", "a->b"], "a->b"),
    ("T151: directory, hard link", ["a/x=1 b=2", "a=>b"], "a=2 b=>a"),
    ("T151: hard link, directory", ["b=1 a=>b", "a/x=2"], "a/ a/x=2 b=1"),
    ("T151: all at once", ["a=1 b/x=2 c->a", "a/x=3 b=4 c/y=5"],
     "a/ a/x=3 a/y=5 b=4 c->a"),
    ("T151: child under a file", ["a=1", "a/x/y=2"], "a/ a/x/ a/x/y=2"),
    ("T141: link as parent", ["usr/lib/ lib->usr/lib", "lib/x=1"],
     "usr/ usr/lib/ usr/lib/x=1 lib->usr/lib"),
    ("T141: absolute link", ["usr/lib/ lib->/usr/lib", "lib/x=1"],
     "usr/ usr/lib/ usr/lib/x=1 lib->/usr/lib"),
    ("T141: chain", ["c/ b->c a->b", "a/x=1"], "c/ c/x=1 b->c a->b"),
    ("T141: link inside a link", ["x/y/ x/z/ l->x/y m->l/../z", "m/f=1"],
     "x/ x/y/ x/z/ x/z/f=1 l->x/y m->l/../z"),
    ("T141: above the root is the root", ["e/ d/l->../../../e", "d/l/x=1"],
     "e/ e/x=1 d/ d/l->../../../e"),
    ("T141: dangling", ["l->no/where", "l/x=1"],
     "l->no/where no/ no/where/ no/where/x=1"),
    ("T141: to a file", ["f=1 l->f", "l/x=2"], "f/ f/x=2 l->f"),
    ("T157: loop", ["a->b b->a", "a/x=1"], FLAT_BAD),
    ("T157: loop of one", ["a->a", "a/x=1"], FLAT_BAD),
    ("T157: chain without end",
     [" ".join("l%d->l%d" % (n, n + 1) for n in range(1000)), "l0/x=1"], FLAT_BAD),
    # as umoci, docker and containerd do
    ("T140: .. in a name", ["a/../../x=1"], "x=1"),
    ("T140: .. that stays inside", ["a/../x=1 ./../y/z=2"], "x=1 y/ y/z=2"),
    ("T140: a hard link to it", ["a/../b=1 c=>./../b"], "b=1 c=>b"),
    ("T140: a whiteout of it", ["b=1 c=2", "x/../.wh.b="], "c=2"),
    ("hard link to a lower layer", ["a=1", "b=>a"], "a=1 b=>a"),
    ("hard link, absolute", ["a=1", "d/b=>/a"], "a=1 d/ d/b=>a"),
    ("hard link to a link", ["s->x h=>s"], "h->x s=>h"),
    ("hard link through a link", ["d/t=1 l->d", "h=>l/t"], "d/ d/t=1 h=>d/t l->d"),
    ("hard link to a hard link", ["a=1 b=>a c=>b"], "a=1 b=>a c=>a"),
    ("T157: before its target", ["h=>t t=1"], "h=1 t=>h"),
    ("T157: two before their target", ["h=>t g=>t t=1"], "g=1 h=>g t=>g"),
    ("T157: chain before its target", ["a=>b b=>c c=1"], "a=1 b=>a c=>a"),
    ("T157: to itself", ["a=1", "a=>a"], "a=1"),
    ("T157: to itself alone", ["a=>a"], FLAT_BAD),
    ("T143: to nothing", ["h=>no"], FLAT_BAD),
    ("T143: to a directory", ["d/ h=>d"], FLAT_BAD),
    ("T143: to the root", ["h=>."], FLAT_BAD),
    ("hard links part when one is replaced", ["a=1 b=>a", "a=2"], "a=2 b=1"),
    ("hard links part when one is deleted", ["a=1 b=>a", ".wh.a="], "b=1"),
    ("hard link to what is deleted", ["a=1", "b=>a .wh.a="], FLAT_BAD),
    ("hard link to what is there again", ["a=1", "b=>a .wh.a= a=2"], "a=2 b=>a"),
    ("T148: whiteout through a link", ["d/x=1 d/y=2 l->d", "l/.wh.x="],
     "d/ d/y=2 l->d"),
    ("T148: through a link the layer replaces", ["d/x=1 l->d", "l/ l/.wh.x="],
     "d/ d/x=1 l/"),
    ("T148: the same, last", ["d/x=1 l->d", "l/.wh.x= l/"], "d/ d/x=1 l/"),
    ("T148: opaque in a link the layer replaces",
     ["d/x=1 l->d", "l/ l/.wh..wh..opq= l/z=3"], "d/ d/x=1 l/ l/z=3"),
    ("T148: opaque deeper in it", ["d/e/x=1 l->d", "l/ l/e/ l/e/.wh..wh..opq="],
     "d/ d/e/ d/e/x=1 l/ l/e/"),
    ("T148: whiteout of the link", ["d/x=1 l->d", ".wh.l="], "d/ d/x=1"),
    # An opaque directory is the layer's own; what a lower link names is not it.
    ("T148: opaque in a link", ["d/x=1 l->d", "l/.wh..wh..opq="], "d/ d/x=1 l->d"),
)

FLAT_NAMES = ("a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "e", "e/a", "e/d")


class FlatModel:
    """The OCI changeset rules taken literally, on the texts of paths.

    Knows nothing of links as parents; `inodes` is path -> [kind, content].
    """

    def __init__(self):
        self.inodes = {}

    def apply(self, words):
        rows = [(flat_row(word)[0], word) for word in words]
        for entry, _ in rows:
            self.delete(entry.path.decode())
        for entry, word in rows:
            if b".wh." not in entry.path:
                self.add(entry, word)

    def delete(self, path):
        folder, _, name = path.rpartition("/")
        if name == ".wh..wh..opq":
            self.remove(lambda known: known.startswith(folder + "/"))
        elif name.startswith(".wh."):
            gone = (folder + "/" + name[4:]).lstrip("/")
            self.remove(lambda known: (known + "/").startswith(gone + "/"))

    def remove(self, is_gone):
        for path in [path for path in self.inodes if is_gone(path)]:
            del self.inodes[path]

    def add(self, entry, word):
        path = entry.path.decode().rstrip("/")
        parts = path.split("/")
        for depth in range(1, len(parts)):
            self.put("/".join(parts[:depth]), ["dir", ""])
        if entry.kind == "hardlink":
            self.put(path, self.inodes[entry.link.decode()])
        else:
            text = re.split("->|=", word, maxsplit=1)[1] if entry.kind != "dir" else ""
            self.put(path, [entry.kind, text])

    def put(self, path, inode):
        if inode[0] == "dir" and self.inodes.get(path, inode)[0] == "dir":
            self.inodes.setdefault(path, inode)
            return
        self.remove(lambda known: (known + "/").startswith(path + "/"))
        self.inodes[path] = inode

    def words(self):
        return flat_words((path, id(inode), inode[0], inode[1])
                          for path, inode in self.inodes.items())

    def others(self):
        """Paths of what is no directory."""
        return sorted(path for path, inode in self.inodes.items() if inode[0] != "dir")


def random_layers(seed):
    """Layers in words, whiteouts anywhere in them, and the words of what they make."""
    dice, model, layers = random.Random(seed), FlatModel(), []
    for number in range(dice.randint(1, 5)):
        deleted = []
        for name in dice.sample(FLAT_NAMES, dice.randint(0, 3)):
            folder, slash, last = name.rpartition("/")
            opaque = folder and dice.random() < 0.4
            hidden = ".wh." + (".wh..opq" if opaque else last)
            deleted.append(folder + slash + hidden + "=")
        model.apply(deleted)
        words = []
        for _ in range(dice.randint(1, 6)):
            words.append(random_word(dice, model, number))
            model.apply(words[-1:])
        for word in deleted:
            words.insert(dice.randint(0, len(words)), word)
        layers.append(" ".join(words))
    return layers, model.words()


def random_word(dice, model, number):
    name = dice.choice(FLAT_NAMES)
    kind = dice.choice(("file", "file", "dir", "hardlink", "symlink"))
    targets = [path for path in model.others()
               if not (name + "/").startswith(path + "/")]
    if kind == "hardlink" and targets:
        target = dice.choice(targets)
        # What ends in .s is a link, and no name ever goes through it.
        return "%s%s=>%s" % (name, ".s" * target.endswith(".s"), target)
    if kind == "symlink":
        return "%s.s->%s" % (name, dice.choice(FLAT_NAMES))
    if kind == "dir":
        return name + "/"
    return "%s=%d.%d" % (name, number, dice.randrange(1000))


def flat_store(tars, folder, kind=imagec.LayerStore):
    """The Tree of real tars, their files' data kept below `folder`."""
    tree = imagec.Tree()
    for number, tar in enumerate(tars):
        store = kind(os.path.join(folder, str(number)))
        imagec.unpack([tar], visit=store.visit)
        tree.apply(store.entries)
    return tree


class FlatteningTest(unittest.TestCase):
    """Layers to one tree, in memory and from there to a directory and to a tar."""

    @rows(FLAT_CASES)
    def test_tree(self, _, layers, wanted):
        if isinstance(wanted, str):
            self.assertEqual(flat_tree_words(flat_tree(layers)), sorted(wanted.split()))
        else:
            with self.assertRaises(wanted):
                flat_tree(layers)

    @rows(((b"d",), (b"./",)))
    def test_attributes_are_those_told_last(self, path):
        tree = flat_tree(["d/x=1"])
        self.assertEqual(tree.root.entry.mode, 0o755)
        for mode in (0o700, 0o711):
            entry = imagec.Entry(path, "dir", 0, mode, 7, 8, mode)
            tree.apply([(entry, None)])
            tree.apply([flat_row("d/y=2")])
            (_, node, _), (inside, _, _), _ = tree.walk()
            self.assertEqual((tree.root if path == b"./" else node).entry, entry)
            self.assertEqual(inside, b"d/x")

    def test_T068_depth_behind_links(self):
        with self.assertRaises(imagec.LimitExceeded):
            flat_tree(["a/" * 600 + "l->" + "a/" * 600, "a/" * 600 + "l/" + "b/" * 600])

    @rows((seed,) for seed in range(400))
    def test_random_layers(self, seed):
        layers, words = random_layers(seed)
        self.assertEqual(flat_tree_words(flat_tree(layers)), words, layers)

    @rows((seed,) for seed in range(1000, 1040))
    def test_random_layers_written(self, seed):
        layers, words = random_layers(seed)
        folder = tempfile.mkdtemp()
        self.addCleanup(remove, folder)
        tars, tar = [raw_words(layer) for layer in layers], io.BytesIO()
        tree = flat_store(tars, os.path.join(folder, "packs"), imagec.LayerPack)
        with mock.patch.object(imagec, "OPEN_PACKS", 2):
            imagec.write_tree_tar(tree, tar.write)
        tar.seek(0)
        with tarfile.open(fileobj=tar) as opened:
            self.assertEqual(flat_tar_words(opened), words, layers)
        place = os.path.join(folder, "root")
        tree = flat_store(tars, os.path.join(folder, "files"))
        imagec.TreeWriter(tree).write(place)
        links = dict(word.split("->") for word in words if "->" in word)
        self.assertEqual(flat_directory_words(place), sorted(
            "%s->%s" % (name, links[first]) if first in links else name + mark + first
            for name, mark, first in (word.partition("=>") for word in words)), layers)


# -- Flattening: layers that want out

def unsafe_names(*names):
    return lambda at: [raw_layer(*[raw_member(name, b"bad") for name in names])]


def unsafe_member(name=b"x", data=b"bad", **fields):
    return lambda at: [raw_layer(raw_member(name, data, **fields))]


def unsafe_words(*layers):
    """Layers in words; @ is the canary directory, as the host knows it."""
    return lambda at: [raw_words(layer.replace("@", at)) for layer in layers]


def unsafe_hard_link(link):
    return lambda at: [raw_layer(
        raw_member(b"h", kind=b"1", link=link.replace(b"@", os.fsencode(at))),
        raw_member(b"h", b"bad"))]


def unsafe_metadata(kind):
    """A link to the canary, then attributes for whatever goes by its name."""
    loud = dict(mode=0o7777, uid=1, gid=1, mtime=2, pax=[
        (b"SCHILY.xattr.user.bad", b"1"), (b"SCHILY.xattr.security.capability", b"1")])
    return lambda at: [
        raw_layer(raw_member(b"x", kind=b"2", link=os.fsencode(at + "/victim"))),
        raw_layer(raw_member(b"x", kind=kind, link=os.fsencode(at + "/victim"),
                             **loud))]


def unsafe_depths(at):
    """The structure of CVE-2025-4517: short links that stand for a very long path."""
    members, path = [], b""
    for letter in b"abcdefghijklmnop":
        long_name = bytes([letter]) * 247
        members.append(raw_member(path + long_name, kind=b"5", mode=0o755))
        members.append(raw_member(path + bytes([letter]), kind=b"2", link=long_name))
        path += long_name + b"/"
    through = b"/".join(bytes([letter]) for letter in b"abcdefghijklmnop")
    up = through + b"/" + b"l" * 254
    members.append(raw_member(up, kind=b"2", link=b"../" * 16))
    members.append(raw_member(b"escape", kind=b"2", link=up + b"/../../../canary"))
    return [raw_layer(*members), raw_layer(raw_member(b"escape/new", b"bad"))]


#: what, layers (a function of the canary directory), status, words if it succeeds
UNSAFE = (
    ("T140: parent", unsafe_names(b"../canary/new"), 0, "canary/ canary/new=bad"),
    ("T140: of the staging directory", unsafe_names(b"../../canary/new"), 0,
     "canary/ canary/new=bad"),
    ("T140: deeper", unsafe_names(b"a/../../canary/victim"), 0,
     "canary/ canary/victim=bad"),
    ("T140: dot first", unsafe_names(b"./../canary/victim"), 0,
     "canary/ canary/victim=bad"),
    ("T140: at the end", unsafe_names(b"a/.."), 3),
    ("T140: a directory", unsafe_member(b"../canary", b"", kind=b"5", mode=0), 0,
     "canary/"),
    ("T140: absolute", lambda at: unsafe_names(os.fsencode(at + "/victim"))(at), 0),
    ("T140: two slashes", unsafe_names(b"//x"), 0, "x=bad"),
    ("T140: empty", unsafe_names(b""), 3),
    ("T140: dot", unsafe_names(b"."), 3),
    ("T140: NUL", unsafe_member(pax=[(b"path", b"a\0/../../canary/new")]), 3),
    ("T140: foreign", unsafe_names(b"..\\x", b"C:\\x"), 0, "..\\x=bad C:\\x=bad"),
    ("T141: same layer", unsafe_words("d->@ d/victim=bad d/new=bad"), 0),
    ("T141: later layer", unsafe_words("d->@", "d/victim=bad d/new=bad"), 0),
    ("T141: relative", unsafe_words("d->../canary", "d/new=bad"), 0,
     "d->../canary canary/ canary/new=bad"),
    ("T141: from the staging directory", unsafe_words("d->../../canary d/new=bad"), 0,
     "d->../../canary canary/ canary/new=bad"),
    ("T141: chain", unsafe_words("a->b b->c c->..", "a/canary/new=bad"), 0),
    ("T141: two steps", unsafe_words("x->. x/y->../..", "x/y/canary/new=bad"), 0),
    ("T141: the root", unsafe_words("l->/", "l/new=bad"), 0, "l->/ new=bad"),
    ("T142: file", unsafe_words("x->@/victim x=bad"), 0, "x=bad"),
    ("T142: file, later", unsafe_words("x->@/victim", "x=bad"), 0, "x=bad"),
    ("T142: directory", unsafe_words("x->@", "x/ x/new=bad"), 0, "x/ x/new=bad"),
    ("T142: attributes of a directory", unsafe_metadata(b"5"), 0, "x/"),
    ("T142: attributes of a link", unsafe_metadata(b"2"), 0),
    ("T142: attributes of a file", unsafe_metadata(b"0"), 0, "x="),
    ("T142: fifo", unsafe_metadata(b"6"), 0),
    ("T142: hard link", unsafe_words("x->@/victim h=>x", "h=bad"), 0),
    ("T143: parent", unsafe_hard_link(b"../canary/victim"), 3),
    ("T143: from the staging directory", unsafe_hard_link(b"../../canary/victim"), 3),
    ("T143: absolute", unsafe_hard_link(b"@/victim"), 3),
    ("T143: to where we are", unsafe_hard_link(b"secret"), 3),
    ("T143: empty", unsafe_hard_link(b""), 3),
    ("T143: through a link", unsafe_words("d->@", "h=>d/victim h=bad"), 3),
    ("T143: to a link", unsafe_words("s->@/victim h=>s"), 0),
    ("T144: link", unsafe_words("a=1", ".->@", "new=bad"), 3),
    ("T144: link by another name", unsafe_words("a=1", "/->@", "new=bad"), 3),
    ("T144: link by a third name", unsafe_words("./.->@", "new=bad"), 3),
    ("T144: hard link", unsafe_words("a=1 .=>a"), 3),
    ("T144: fifo", unsafe_member(b"./", b"", kind=b"6"), 3),
    ("T145: paths too long", unsafe_depths, 1),
    ("T146: character", unsafe_member(b"null", b"", kind=b"3", major=1, minor=3), 0),
    ("T146: block", unsafe_member(b"loop", b"", kind=b"4", major=7), 0),
    ("T146: fifo", unsafe_member(b"pipe", b"", kind=b"6"), 0),
    ("T146: absurd", unsafe_member(b"x", b"", kind=b"3", major=b"\x80" + b"\xff" * 7),
     0),
    ("T147: setuid", unsafe_member(mode=0o6777), 0, "x=bad"),
    ("T148: whiteout", unsafe_words("l->@", "l/.wh.victim="), 0),
    ("T148: opaque", unsafe_words("l->@", "l/.wh..wh..opq="), 0),
    ("T148: whiteout, replaced", unsafe_words("l->@", "l/ l/.wh.victim="), 0, "l/"),
    ("T148: relative", unsafe_words("l->../..", "l/.wh.canary= l/canary/.wh.victim="),
     0, "l->../.."),
    ("T148: with ..", unsafe_words("l/x=1", "l/../../canary/.wh.victim="), 0, "l/ l/x=1"),
    ("T149: as a component", unsafe_words(".wh.a/../../canary/new=bad"), 0,
     "canary/ canary/new=bad"),
    ("T151: a link in what goes", unsafe_words("d/l->@", "d=1"), 0, "d=1"),
    ("T151: a link in what is deleted", unsafe_words("d/l->@ a=1", ".wh.d="), 0,
     "a=1"),
    ("T152: huge hole", lambda at: [pax_sparse([(0, b"bad")], 8388608)], 1),
    ("T152: name", lambda at: [pax_sparse([(0, b"x")], 1, b"../canary/new")], 0,
     "canary/ canary/new=x"),
    ("T153: path", unsafe_member(pax=[(b"path", b"../canary/new")]), 0,
     "canary/ canary/new=bad"),
    ("T153: linkpath", unsafe_member(b"h", b"", kind=b"1", pax=[
        (b"linkpath", b"../canary/victim")]), 3),
    ("T154: times", unsafe_member(pax=[(b"mtime", b"nan")]), 0, "x=bad"),
    ("T154: far times", unsafe_member(pax=[(b"mtime", b"9" * 17)]), 0, "x=bad"),
    ("T154: far time", unsafe_member(pax=[(b"mtime", b"999999999999")]), 0, "x=bad"),
    ("T154: owners", unsafe_member(pax=[(b"uid", b"99999999999"),
                                          (b"gid", b"99999999999")]), 0, "x=bad"),
    ("T154: negative owners", unsafe_member(uid=b"\xff" * 8), 0, "x=bad"),
    ("T154: mode", unsafe_member(mode=b"7777777\0"), 0, "x=bad"),
    ("T158: unknown type", unsafe_member(kind=b"Z"), 0, ""),
    ("T158: a link to nothing", unsafe_member(b"l", b"", kind=b"2"), 3),
    ("T159: overlay", unsafe_member(pax=[
        (b"SCHILY.xattr.trusted.overlay.opaque", b"y"),
        (b"SCHILY.xattr.security.selinux", b"x")]), 0, "x=bad"),
    ("T164: link to a pipe", unsafe_words("etc/passwd->@/pipe"), 0),
)


@able(os.name == "posix", "hold a root file system")
class UnsafeLayersTest(StoredCase):
    """Layers with honest digests and bad intentions: nothing outside is touched."""

    def setUp(self):
        super().setUp()
        self.canary = self.at("canary")
        for name in ("canary/victim", "canary/deep/victim", "secret"):
            os.chmod(write_file(self.at(name), b"untouched"), 0o666)
        os.mkfifo(self.at("canary", "pipe"))
        for path in (self.work, self.canary):
            os.chmod(path, 0o777)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.work)

    def command(self, layers, number=0):
        reference, _ = self.serve(layers(self.canary), "lab/bad:%d" % number)
        return ["pull", "-q", "--format", "rootfs", "--max-layer-size", "4194304",
                "-o", self.at("out%d" % number), reference]

    @rows(UNSAFE)
    def test_nothing_outside_is_touched(self, _, layers, wanted, words=None):
        for path in glob.glob(self.at("out*")):
            remove(path)  # where the row before has failed
        argv = self.command(layers)
        before = stored_state(self.work)
        run = self.main(*argv)
        self.assertEqual(run.status, wanted, run.err)
        self.check_result(0, wanted, words)
        self.check_outside(before, 0)

    def check_outside(self, before, *numbers):
        ours = ["out%d%s" % (number, more) for number in numbers
                for more in ("", ".partial.d")]
        self.assertEqual(stored_state(self.work, ours), before)
        for name in ours:
            remove(self.at(name))

    def check_result(self, number, status, words=None):
        out = self.at("out%d" % number)
        if status:
            self.assertFalse(os.path.lexists(out))
            left = os.listdir(out + ".partial.d")
            self.assertLessEqual(set(left), {"blobs"})
        elif words is not None:
            self.assertEqual(flat_directory_words(out), sorted(words.split()))

    @able(ROOT, "become another user")
    def test_as_nobody(self):
        # What is refused by its headers is refused to every user alike.
        table = [row for row in UNSAFE if row[2] != 3]
        work = [self.command(row[1], number) for number, row in enumerate(table)]
        before = stored_state(self.work)
        statuses, err = self.as_nobody(*work)
        for number, (what, _, wanted, *words) in enumerate(table):
            with self.subTest(what):
                self.assertEqual(statuses[number], wanted, err)
                self.check_result(number, wanted, *words)
        self.check_outside(before, *range(len(table)))

    def test_T163_bad_last_layer(self):
        good = [raw_words("f%d=%d" % (n, n)) for n in range(8)]
        reference, _ = self.serve(good + [raw_words("h=>../x")])
        before = stored_state(self.work)
        os.mkdir(self.at("out0"))
        self.pull("--format", "rootfs", "-o", self.at("out0"), reference, expect=3)
        self.assertEqual(os.listdir(self.at("out0")), [])
        os.rmdir(self.at("out0"))
        self.check_outside(before, 0)

    @rows(itertools.product(
        ("out0.partial", "out0.partial.d", "out0.partial.d/root",
         "out0.partial.d/layers", "out0.partial.d/blobs"), ("rootfs", "archive")))
    def test_T017_planted_links(self, place, format):
        reference, _ = self.serve([raw_words("a=1 d/ d/b=2")])
        os.makedirs(self.at("canary", "layers"), exist_ok=True)
        os.chmod(self.at("canary", "deep"), 0o755)
        before = stored_state(self.work)
        os.makedirs(os.path.dirname(self.at(place)), exist_ok=True)
        os.symlink(self.canary, self.at(place))
        run = self.main("pull", "-q", "--format", format, "-o", self.at("out0"),
                        reference)
        self.assertIn(run.status, (0, 1))
        for name in glob.glob(self.at("out0*")):
            remove(name)
        self.assertEqual(stored_state(self.work), before)

    @rows((("bz2", bz2.compress), ("xz", lzma.compress)))
    def test_T162_no_program_runs(self, kind, compress):
        os.environ["PATH"] = self.at("traps")
        for name in ("unpigz", "pigz", "gzip", "xz", "bzip2", "tar", "sh"):
            trap = write_file(self.at("traps", name), b"#!/bin/sh\n>\"$0.ran\"\n")
            os.chmod(trap, 0o755)
        reference, _ = self.serve([raw_words("a=1")], compress=compress)
        self.pull("--format", "rootfs", "-o", self.at(kind), reference)
        self.assertEqual(flat_directory_words(self.at(kind)), ["a=1"])
        self.assertEqual(glob.glob(self.at("traps", "*.ran")), [])


# -- Rootfs: attributes, names, what cannot be done

#: tarfile makes what we make of these names the same names again.
ROOTFS_NAMES = (
    b"caf\xe9", b"caf\xc3\xa9", b"new\nline", b"tab\there", b" lead and trail ",
    b"back\\slash", b"quote'\"", b"trailing.", b"=equals#hash", b"\x01\x7f\xff",
    b"n" * 255, b"deep/" * 30 + b"x", b"p" * 120 + b"/" + b"q" * 200, b"-rf", b"%s{}",
)


#: name, type, major, minor, the image's mode, may root make it for an image
ROOTFS_DEVICES = (
    (b"null", b"3", 1, 3, 0o600, True), (b"zero", b"3", 1, 5, 0o6777, True),
    (b"full", b"3", 1, 7, 0, True), (b"random", b"3", 1, 8, 0o666, True),
    (b"urandom", b"3", 1, 9, 0o644, True), (b"tty", b"3", 5, 0, 0o620, True),
    (b"disk", b"4", 254, 0, 0o666, False), (b"loop", b"4", 7, 9, 0o660, False),
    (b"null in blocks", b"4", 1, 3, 0o666, False), (b"mem", b"3", 1, 1, 0o666, False),
    (b"kmsg", b"3", 1, 11, 0o666, False), (b"console", b"3", 5, 1, 0o666, False),
    (b"other null", b"3", 0, 259, 0o666, False), (b"fuse", b"3", 10, 229, 0o666, False),
)


@able(os.name == "posix", "hold a root file system")
class RootfsOutputTest(StoredCase):
    """The file system of an image, as a directory and as one tar."""

    def rootfs(self, *layers, name="lab/app:1", out="out"):
        """Pull an image of the layers: (where it is, what was said)."""
        reference, _ = self.serve(list(layers), name)
        run = self.main("pull", "--progress", "none", "--format", "rootfs", "-o",
                        self.at(out), reference)
        self.assertEqual(run.status, 0, run.err)
        # Where we are not root: a directory no layer speaks of is root's.
        err = run.err if ROOT else re.sub(".*owners not set.*\n", "", run.err)
        return os.fsencode(self.at(out)), err

    def test_modes_times_owners(self):
        rows = [(b"plain", 0o644, b"0"), (b"none", 0, b"0"), (b"setuid", 0o4755, b"0"),
                (b"setgid", 0o2755, b"0"), (b"dir", 0o1777, b"5"),
                (b"closed", 0o555, b"5"), (b"closed/x", 0o600, b"0"),
                (b"group", 0o2750, b"5")]
        owner = (1234, 4321) if ROOT else (os.geteuid(), os.getegid())
        out, err = self.rootfs(raw_layer(*[
            raw_member(name, b"", kind, mode=mode, uid=owner[0], gid=owner[1],
                       pax=[(b"mtime", b"1234567890.123456789")])
            for name, mode, kind in rows]))
        self.assertEqual(err, "")
        for name, mode, _ in rows:
            facts = os.lstat(os.path.join(out, name))
            self.assertEqual((stat.S_IMODE(facts.st_mode), facts.st_mtime_ns),
                             (mode, 1234567890123456789), name)
            self.assertEqual((facts.st_uid, facts.st_gid), owner)

    def test_attributes_of_a_hard_link_are_the_inodes(self):
        """As docker and podman do; of what it does not say, the file's stay."""
        out, _ = self.rootfs(raw_layer(
            raw_member(b"f", b"1", mode=0o755, pax=[(b"SCHILY.xattr.user.a", b"1")]),
            raw_member(b"h", kind=b"1", link=b"f", mode=0o4710, mtime=7, uid=3, gid=4,
                       pax=[(b"SCHILY.xattr.user.b", b"2")])))
        facts = os.lstat(os.path.join(out, b"f"))
        self.assertEqual((facts.st_nlink, facts.st_mtime), (2, 7))
        self.assertEqual(stat.S_IMODE(facts.st_mode), 0o4710)
        if ROOT:
            self.assertEqual((facts.st_uid, facts.st_gid), (3, 4))
        out, _ = self.rootfs(raw_layer(
            raw_member(b"f", pax=[(b"SCHILY.xattr.user.a", b"1")]), raw_member(
                b"h", kind=b"1", link=b"f", pax=[(b"SCHILY.xattr.user.b", b"2")])),
            out="out.tar")
        with tarfile.open(self.at("out.tar")) as tar:
            self.assertEqual({"1", "2"}, set(tar.getmember("f").pax_headers.values()))

    def test_python_that_cannot_link_to_a_link(self):
        """PyPy's os.link has no follow_symlinks=False that works: two do as well."""
        true = os.link

        def link(source, target, **options):
            if options:
                raise OSError(errno.EINVAL, "Invalid argument", source)
            true(source, target)

        with mock.patch.object(os, "link", link):
            self.rootfs(raw_words("a=1 b=>a s->x h=>s"))
        self.assertEqual(flat_directory_words(self.at("out")),
                         ["a=1", "b=>a", "h->x", "s->x"])

    @rows((text,) for text in ("1.5", "-1.5", "-1", "-0.25", "5000000000.5"))
    def test_times_in_a_tar(self, text):
        header = imagec.tar_header(b"x", 0, mtime=int(float(text) * 10 ** 9))
        self.assertEqual(archive_headers(header).mtime, float(text))

    def test_fifos_and_devices(self):
        out, err = self.rootfs(raw_layer(
            raw_member(b"pipe", kind=b"6", mode=0o640),
            *[raw_member(name, kind=kind, major=major, minor=minor, mode=mode)
              for name, kind, major, minor, mode, _ in ROOTFS_DEVICES]))
        facts = os.lstat(os.path.join(out, b"pipe"))
        self.assertTrue(stat.S_ISFIFO(facts.st_mode))
        self.assertEqual(stat.S_IMODE(facts.st_mode), 0o640)
        made = {row[0] for row in ROOTFS_DEVICES if row[5]}
        left_out = len(ROOTFS_DEVICES) - len(made)
        if "device nodes not made: %d\n" % left_out not in err:  # no right to make any
            self.assertIn("device nodes not made: %d\n" % len(ROOTFS_DEVICES), err)
            made = set()
        self.assertEqual(set(os.listdir(out)), made | {b"pipe"})
        for name, _, major, minor, _, _ in ROOTFS_DEVICES:
            if name in made:
                facts = os.lstat(os.path.join(out, name))
                self.assertTrue(stat.S_ISCHR(facts.st_mode))
                self.assertEqual((facts.st_rdev, stat.S_IMODE(facts.st_mode)),
                                 (os.makedev(major, minor), 0o666), name)

    @rows((("new",), ("there",)))
    def test_nobody_else_comes_in_before_all_is_there(self, out):
        seen, write, finish = [], imagec.TreeWriter.write, imagec.TreeWriter.finish

        def staged(writer, directory):
            seen.append(stat.S_IMODE(os.stat(os.path.dirname(directory)).st_mode))
            write(writer, directory)

        def done(writer, directory):
            seen.append(stat.S_IMODE(os.stat(directory).st_mode))
            finish(writer, directory)

        if out == "there":
            os.mkdir(self.at(out))
            os.chmod(self.at(out), 0o777)
        with mock.patch.multiple(imagec.TreeWriter, write=staged, finish=done):
            self.rootfs(raw_layer(raw_member(b"./", kind=b"5", mode=0o1777),
                                  raw_member(b"x", b"1")), out=out)
        self.assertEqual(seen, [0o700, 0o700])
        self.assertEqual(stat.S_IMODE(os.stat(self.at(out)).st_mode), 0o1777)

    @able(hasattr(os, "setxattr"), "set extended attributes")
    def test_extended_attributes(self):
        self.work = tempfile.mkdtemp()  # on a disk: few keep them in memory
        self.addCleanup(remove, self.work)
        try:
            os.setxattr(write_file(self.at("probe"), b""), "user.x", b"1")
        except OSError as error:
            cannot("hold user.* attributes: %s" % error)
        out, err = self.rootfs(raw_layer(*[
            raw_member(name, kind=kind, mode=0o555, pax=[
                (b"SCHILY.xattr.user.bytes", b"\0\xff\n"),
                (b"SCHILY.xattr.trusted.overlay.opaque", b"y")])
            for name, kind in ((b"f", b"0"), (b"d", b"5"))]))
        for name in (b"f", b"d"):
            place = os.path.join(out, name)
            self.assertEqual(os.getxattr(place, b"user.bytes"), b"\0\xff\n")
            self.assertNotIn("trusted.overlay.opaque", os.listxattr(place))
        self.assertIn("extended attributes not set: 2", err)

    def test_sparse_files(self):
        out, err = self.rootfs(raw_layer(raw_member(b"before", b"b"), *[
            old_sparse(SPARSE_EXTENTS, 75009, 4, b"old"),
            pax_sparse(SPARSE_EXTENTS, 75009, b"new"), raw_member(b"after", b"a")]))
        self.assertEqual(err, "")
        wanted = dict.fromkeys((b"old", b"new"), SPARSE_CONTENT)
        wanted.update({b"before": b"b", b"after": b"a"})
        self.assertEqual(set(os.listdir(out)), set(wanted))
        for name in wanted:
            self.assertTrue(file_bytes(os.path.join(out, name)) == wanted[name], name)

    def test_names(self):
        data = {name: b"%d" % n for n, name in enumerate(ROOTFS_NAMES)}
        layer = raw_layer(*[raw_member(name, data[name]) for name in ROOTFS_NAMES])
        out, _ = self.rootfs(layer)
        for name in ROOTFS_NAMES:
            self.assertEqual(file_bytes(os.path.join(out, name)), data[name], name)
        self.rootfs(layer, out="out.tar")
        with tarfile.open(self.at("out.tar"), encoding="utf-8",
                          errors="surrogateescape") as tar:
            found = {member.name.encode("utf-8", "surrogateescape"):
                     tar.extractfile(member).read() for member in tar if member.isreg()}
        self.assertEqual(found, data)

    #: What the first two layers make, the first once more above them, and all of it.
    AGAIN = (
        # One blob, two inodes: the link's, of the layer's first time, and the file's.
        ("m=data", "a=>m", "a=data m=data"), ("m=data", "z=>m", "m=data z=data"),
        # Where its file is put, the second time, a link leads elsewhere.
        ("x/ y/ d->x", "d/f=data d->y", "d->y x/ x/f=data y/ y/f=data"))

    @rows(AGAIN)
    def test_a_layer_again(self, first, second, wanted):
        again = second if "d->y" in second else first
        layers = [raw_words(words) for words in (first, second, again)]
        self.rootfs(*layers)
        self.assertEqual(flat_directory_words(self.at("out")), wanted.split())
        self.rootfs(*layers, out="out.tar")
        with tarfile.open(self.at("out.tar")) as tar:
            self.assertEqual(flat_tar_words(tar), wanted.split())
        self.assertEqual(sorted(os.listdir(self.work)), ["out", "out.tar"])
        remove(self.at("out"))

    def test_T156_names_in_the_C_locale(self):
        reference, _ = self.serve([raw_layer(
            raw_member(b"caf\xe9", b"1"), raw_member(b"l", kind=b"2", link=b"\xe9"))])
        process = self.start(
            "pull", "-q", "--format", "rootfs", "-o", self.at("out"), reference,
            environ={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
        err = process.communicate()[1]
        self.assertEqual((process.returncode, err), (0, b""))
        self.assertEqual(sorted(os.listdir(os.fsencode(self.at("out")))),
                         [b"caf\xe9", b"l"])

    def test_T158_unknown_types_are_told(self):
        out, err = self.rootfs(raw_layer(raw_member(b"x", b"data", b"Z"),
                                         raw_member(b"y", b"data", b"M"),
                                         raw_member(b"z", b"data", b"7")))
        self.assertEqual(os.listdir(out), [b"z"])
        self.assertEqual(file_bytes(os.path.join(out, b"z")), b"data")
        self.assertRegex(err, r"\b2\b")

    def test_T165_windows(self):
        reference, image = self.serve([raw_words("Files/a=1")],
                                      platform=("windows", "amd64", None))
        for out in ("out", "out.tar"):
            self.pull("--format", "rootfs", "-o", self.at(out), reference, expect=1)
            self.assertFalse(os.path.exists(self.at(out)))
        self.assertEqual(self.blob_gets(image.layers[0]), 0)

    def test_destinations(self):
        reference, _ = self.serve([raw_words("a=1")])
        for name in ("file", "full/mine"):
            write_file(self.at(name), b"mine")
        os.mkdir(self.at("empty"))
        os.symlink("empty", self.at("link"))
        before = stored_state(self.work)
        for name in ("file", "full", "link", "file/x"):
            self.pull("--format", "rootfs", "-o", self.at(name), reference, expect=1)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.at("empty"))
        for name in (".", "./", "../empty", self.at("empty")):
            run = self.pull("--format", "rootfs", "-o", name, reference, expect=1)
            self.assertIn("where you are", run.err)
        os.chdir("/")
        with mock.patch("os.path.ismount", lambda path: path.endswith("empty")):
            run = self.pull("--format", "rootfs", "-o", self.at("empty"), reference,
                            expect=1)
        self.assertIn("mount point", run.err)
        self.assertEqual(stored_state(self.work), before)
        self.assertEqual(self.origin.requests, [])
        for name in ("empty", "new", "slash/", "nul"):
            self.pull("--format", "rootfs", "-o", self.at(name), reference)
            self.assertEqual(flat_directory_words(self.at(name)), ["a=1"])
        for name in ("two", "two.tar"):  # never half of what was asked for
            self.pull("--format", "rootfs", "-o", self.at(name), reference,
                      self.serve([raw_words("b=1")], "lab/two:1")[0], expect=2)
            self.assertFalse(os.path.exists(self.at(name)))

    def test_tar_keeps_what_a_user_cannot_have(self):
        self.rootfs(raw_layer(
            raw_member(b"null", kind=b"3", major=1, minor=3, uid=7, gid=8, mode=0o4666),
            raw_member(b"x", b"1", pax=[(b"SCHILY.xattr.security.capability", b"\1")])),
            out="out.tar")
        with tarfile.open(self.at("out.tar")) as tar:
            null, other = tar.getmember("null"), tar.getmember("x")
        self.assertEqual((null.ischr(), null.devmajor, null.devminor), (True, 1, 3))
        self.assertEqual((null.uid, null.gid, null.mode), (7, 8, 0o4666))
        self.assertIn("SCHILY.xattr.security.capability", other.pax_headers)

    def test_tar_to_standard_output(self):
        reference, _ = self.serve([raw_words("d/x=1")])
        self.pull("--format", "rootfs", "-o", self.at("out.tar"), reference)
        run = self.pull("--format", "rootfs", "-o", "-", reference)
        self.assertEqual(run.out, file_bytes(self.at("out.tar")))

@able(ROOT, "become another user")
class RootlessTest(StoredCase):
    """What is done, and what is told, where a user has no special rights (T155)."""

    def setUp(self):
        super().setUp()
        os.chmod(self.work, 0o777)

    def command(self, *members, out="out", name="lab/app:1"):
        reference, _ = self.serve([raw_layer(*members)], name)
        return ["pull", "--progress", "none", "--format", "rootfs", "-o", self.at(out),
                reference]

    def rootfs(self, *members):
        (status,), err = self.as_nobody(self.command(*members))
        self.assertEqual(status, 0, err)
        return err

    def test_read_only_directories(self):
        own = dict(uid=STORED_NOBODY, gid=STORED_NOBODY)
        self.assertEqual("", self.rootfs(
            raw_member(b"./", kind=b"5", mode=0o755, **own),
            raw_member(b"ro", kind=b"5", mode=0o555, **own),
            raw_member(b"ro/x", b"1", **own),
            raw_member(b"ro/none", kind=b"5", mode=0, **own),
            raw_member(b"ro/none/y", b"2", **own)))
        self.assertEqual(flat_directory_words(self.at("out")),
                         ["ro/", "ro/none/", "ro/none/y=2", "ro/x=1"])
        facts = os.lstat(self.at("out", "ro"))
        self.assertEqual((stat.S_IMODE(facts.st_mode), facts.st_mtime), (0o555, 1))

    def test_read_only_root(self):
        modes = (0o555, 0o500, 0)
        statuses, err = self.as_nobody(*[self.command(
            raw_member(b"./", kind=b"5", mode=mode), raw_member(b"x", b"1"),
            out="out%o" % mode, name="lab/app:%o" % mode) for mode in modes])
        self.assertEqual(statuses, [0, 0, 0], err)
        for mode in modes:
            out = self.at("out%o" % mode)
            self.assertEqual(flat_directory_words(out), ["x=1"])
            self.assertEqual(stat.S_IMODE(os.stat(out).st_mode), mode)

    def test_what_cannot_be_done_is_told_once(self):
        err = self.rootfs(*[raw_member(b"f%d" % n, uid=n, gid=n) for n in range(20)] + [
            raw_member(b"null", kind=b"3", major=1, minor=3),
            raw_member(b"zero", kind=b"3", major=1, minor=5)])
        self.assertEqual(len(err.splitlines()), 2, err)
        self.assertRegex(err, r"owners not set: \d+")
        self.assertIn("device nodes not made: 2", err)
        self.assertEqual(len(os.listdir(self.at("out"))), 20)

    def test_cleans_up_what_is_deep(self):
        # Deeper than functions may call themselves; its last name no disk can hold.
        deep = b"d/" * 1000
        bad = self.command(raw_member(deep + b"x", b"1"),
                           raw_member(deep + b"z" * 300, b"1"))
        statuses, err = self.as_nobody(
            bad, bad, self.command(raw_member(b"a", b"1"), name="lab/good:1"))
        self.assertEqual(statuses, [1, 1, 0], err)
        self.assertRegex(err, "out/d/d/d/[^\n]*File name too long")
        self.assertNotIn("partial", err)
        self.assertEqual(flat_directory_words(self.at("out")), ["a=1"])
        self.assertEqual(os.listdir(self.work), ["out"])

    def test_cleans_up_what_it_may_not_enter(self):
        (status,), err = self.as_nobody(self.command(
            raw_member(b"none", kind=b"5", mode=0), raw_member(b"none/x", b"1"),
            raw_member(b"./", kind=b"5", mode=0o555), raw_member(b"z" * 300, b"1")))
        self.assertEqual(status, 1, err)
        self.assertRegex(err, "out/zzz[^\n]*zzz: File name too long")
        self.assertFalse(os.path.exists(self.at("out")))
        self.assertFalse(os.path.exists(self.at("out.partial.d", "root")))


# -- The files of artifacts

PACKED = {"io.deis.oras.content.unpack": "true"}
CHART = "application/vnd.cncf.helm."
FILE = "application/vnd.oci.image.layer.v1.tar"  # what ORAS says of any file
DIRECTORY = FILE + "+gzip"


def packed(words, title, compress=gzip_bytes):
    """A layer that ORAS unpacks, of files in words."""
    return DIRECTORY, compress(raw_words(words)), dict(PACKED, **{TITLE: title})


FILES = (
    # what, layers, other members of the artifact, what is there in words
    ("ORAS: files", [(FILE, b"1", "a.txt"), ("text/x", b"2", "deep/er/b.txt")], {},
     "a.txt=1 deep/ deep/er/ deep/er/b.txt=2"),
    ("oras-py: no artifactType, a config of its own", [(FILE, b"1", "a.txt")], dict(
        kind=None, config=b"", config_type="application/vnd.unknown.config.v1+json"),
     "a.txt=1"),
    ("an empty file", [(FILE, b"", "a")], {}, "a="),
    ("one blob, two names", [(FILE, b"1", "a"), (FILE, b"1", "b/c")], {}, "a=1 b/ b/c=1"),
    ("odd names", [(FILE, b"1", ".wh.a"), (FILE, b"2", "./b//c/./d"),
                   (FILE, b"3", "caf\xe9"), (FILE, b"4", "C:\\..\\x")], {},
     ".wh.a=1 b/ b/c/ b/c/d=2 caf\xe9=3 C:\\..\\x=4"),
    ("ORAS: a directory", [packed("d/ d/x=1 d/y/ d/l->x d/h=>d/x", "d"),
                           (FILE, b"2", "z")], {},
     "d/ d/h=1 d/x=>d/h d/y/ d/l->x z=2"),
    ("ORAS: a directory deep down", [packed("a/b/ a/b/x=1", "a/b")], {},
     "a/ a/b/ a/b/x=1"),
    ("by its last part", [packed("b/ b/x=1", "a/b", bz2.compress)], {}, "a/ a/b/ a/b/x=1"),
    ("by no name", [packed("x=1 y/z=2", "a")], {}, "a/ a/x=1 a/y/ a/y/z=2"),
    ("the same twice", [packed("x=1", "a"), packed("x=1", "b")], {},
     "a/ a/x=1 b/ b/x=1"),
    ("out of it", [packed("../../x=1 l->../z l/y=2", "a"), (FILE, b"3", "z")], {},
     "a/ a/x=1 a/l->../z a/z/ a/z/y=2 z=3"),
    ("oras-py packs a directory and does not say so",
     [(DIRECTORY, b"any", "d")], {}, "d=any"),
    ("Helm", [(CHART + "chart.content.v1.tar+gzip", b"tgz", None),
              (CHART + "chart.provenance.v1.prov", b"prov", None)],
     dict(kind=None, config_type=CHART + "config.v1+json", config=json_bytes(
         {"name": "app", "version": "1.0.0+x", "apiVersion": "v2"})),
     "app-1.0.0+x.tgz=tgz app-1.0.0+x.tgz.prov=prov"),
    ("without a name", [
        ("application/spdx+json", b"{1}", None), (DIRECTORY, b"x", None),
        ("application/vnd.oci.empty.v1+json", b"{}", None), ("a/b", b"y", {"k": "v"})],
     {}, "%s.json={1} %s.tar.gz=x %s.json={} %s=y" % tuple(
         sha256(data).replace(":", "-")[:19] for data in (b"{1}", b"x", b"{}", b"y"))),
    ("a config alone", [], dict(config=b"{2}", config_type="application/x+json"),
     sha256(b"{2}").replace(":", "-")[:19] + ".json={2}"),
    ("cosign's attestation", [("application/vnd.dsse.envelope.v1+json", b"{3}", None)],
     dict(kind=None, config_type=MEDIA_TYPES["oci"]["config"]),
     sha256(b"{3}").replace(":", "-")[:19] + ".json={3}"),
)
UNSAFE_FILES = worded(
    ("unsafe name", *[([(FILE, b"1", name)],) for name in (
        "../x", "a/../../x", "a/..", "/x", "//x", ".", "/", "./", "a\0b", "\ud800",
        "a" * 4097)]),
    ("two files of one name", *[([(FILE, b"%d" % number, name) for number, name
                                  in enumerate(names)],) for names in (
        ("a", "a"), ("a", "./a"), ("a/b", "a"), ("a", "a-b", "a/b/c"), ("a/", "a"))]))


@able(os.name == "posix", "hold a root file system")
class FilesTest(StoredCase):
    """The files of an artifact, by their names."""

    def offered(self, layers, members):
        self.clear()
        image = build_artifact(layers, **members)
        self.origin.add("lab/thing", "1", image)
        return self.origin.host + "/lab/thing:1", image

    @rows(FILES)
    def test_files(self, what, layers, members, wanted):
        reference, image = self.offered(layers, members)
        for out in ("out", "out.tar"):
            run = self.main("pull", "--progress", "none", "--format", "files", "-o",
                            self.at(out), reference)
            self.assertEqual(run.status, 0, run.err)
            self.assertEqual(run.out.decode(), "%s@%s\n" % (reference, image.digest))
            unnamed = re.findall("sha256-[^ =]*", wanted)
            self.assertEqual(re.findall("without name is (.*)\n", run.err), unnamed)
        found = flat_directory_words(os.fsencode(self.at("out")).decode("utf-8"))
        self.assertEqual([os.fsencode(word) for word in found], [
            word.encode("utf-8") for word in sorted(wanted.split())])
        with tarfile.open(self.at("out.tar"), encoding="utf-8") as tar:
            self.assertEqual(flat_tar_words(tar), sorted(wanted.split()))
        self.assertEqual(sorted(os.listdir(self.work)), ["out", "out.tar"])

    def test_all_is_ours(self):
        """What an artifact has packed gives nobody a right on this host."""
        layer = raw_layer(
            raw_member(b"d", kind=b"5", mode=0o7777, uid=7),
            raw_member(b"d/f", b"1", mode=0o6755, uid=7, gid=8, pax=[
                (b"SCHILY.xattr.user.a", b"1")]),
            raw_member(b"d/null", kind=b"3", major=1, minor=3, mode=0o666),
            raw_member(b"d/sda", kind=b"4", major=8, mode=0o666))
        reference, _ = self.offered([(DIRECTORY, layer, dict(PACKED, **{TITLE: "d"})),
                                     (FILE, b"2", "e/g")], {})
        statuses, err = [0], ""
        argv = ["pull", "--progress", "none", "--format", "files", reference, "-o"]
        if ROOT:
            os.chmod(self.work, 0o777)
            statuses, err = self.as_nobody(argv + [self.at("nobody")])
        run = self.main(*argv + [self.at("out.tar")])
        with tarfile.open(self.at("out.tar")) as tar:
            self.assertEqual([one.name for one in tar if one.isdev()], [])
        run = self.main(*argv + [self.at("out")])
        self.assertEqual(statuses + [run.status], [0, 0], err + run.err)
        self.assertNotIn("not set", err + run.err)
        self.assertIn("'d': device nodes left out: 2", run.err)
        for path, mode in ((".", 0o755), ("d", 0o777), ("d/f", 0o755), ("e", 0o755),
                           ("e/g", 0o644)):
            facts = os.stat(self.at("out", path))
            self.assertEqual((stat.S_IMODE(facts.st_mode), facts.st_uid, facts.st_gid),
                             (mode, os.geteuid(), os.getegid()), path)

    @rows(UNSAFE_FILES)
    def test_unsafe_names(self, layers, words):
        reference, image = self.offered(layers, {})
        del self.origin.requests[:]
        for out in ("out", "out.tar"):
            run = self.pull("--format", "files", "-o", self.at(out), reference, expect=3)
            self.assertIn(words, run.err)
            self.assertEqual(run.err.count("\n"), 1)
        self.assertEqual((os.listdir(self.work), self.blob_gets()), ([], 0))

    @rows((("../x", "1"), ("/x", "1"), ("x", "1/../../../y"), (None, "1"), ("x", 5)))
    def test_unsafe_charts(self, name, version):
        reference, _ = self.offered([(CHART + "chart.content.v1.tar+gzip", b"1", None)],
                                    dict(config_type=CHART + "config.v1+json",
                                         config=json_bytes({"name": name,
                                                            "version": version})))
        self.pull("--format", "files", "-o", self.at("out"), reference, expect=3)
        self.assertNotIn("out", os.listdir(self.work))

    def test_images_are_no_artifacts(self):
        index = build_index([(build_image(ARCHIVE_TARS), ("linux", "amd64", None))])
        self.origin.add("lab/multi", "1", index)
        for kind, tars in (("oci", ARCHIVE_TARS), ("schema1", ARCHIVE_TARS), ("oci", [])):
            reference, _ = self.serve(tars, kind=kind)
            run = self.pull("--format", "files", "-o", self.at("out"), reference,
                            "--platform", "linux/amd64", expect=1)
            self.assertRegex(run.err, "lab/app:1 is a container image; its files come "
                                      "with --format rootfs\n")
        self.pull("--format", "files", "-o", self.at("out"), "--platform", "linux/amd64",
                  self.origin.host + "/lab/multi:1", expect=1)
        self.assertEqual(os.listdir(self.work), [])

    def test_an_attestation_of_an_index_by_its_digest(self):
        proof = build_artifact([("application/vnd.in-toto+json", b"{4}", None)], None,
                               config_type=MEDIA_TYPES["oci"]["config"])
        index = build_index([(build_image(ARCHIVE_TARS), ("linux", "amd64", None)),
                             (proof, ("unknown", "unknown", None))])
        self.origin.add("lab/multi", "1", index)
        self.pull("-o", self.at("out"), "--format", "files", "%s/lab/multi@%s" % (
            self.origin.host, proof.digest))
        self.assertEqual(list(contents(self.at("out")).values()), [b"{4}"])

    def test_a_directory_that_is_none(self):
        reference, _ = self.offered([packed("h=>no", "a"), (FILE, b"1", "b")], {})
        run = self.pull("--format", "files", "-o", self.at("out"), reference, expect=3)
        self.assertIn("hard link 'h' to 'no'", run.err)
        self.assertNotIn("out", os.listdir(self.work))
        run = self.pull("--format", "files", "-o", self.at("out"), reference,
                        "--max-layer-size", "1", expect=1)
        self.assertIn("--max-layer-size", run.err)


# --------------------------------------------------------------------------------------
# 14  Keys
# --------------------------------------------------------------------------------------

EC_KIND, RSA_KIND = "06072a8648ce3d0201", "06092a864886f70d0101010500"
P256_KIND, P384_KIND = EC_KIND + "06082a8648ce3d030107", EC_KIND + "06052b81040022"
P384_BASE = b"".join(number.to_bytes(48, "big") for number in imagec._P384[3:])


def pem(label, data):
    return ssl.DER_cert_to_PEM_cert(data).replace("CERTIFICATE", label).encode("ascii")


def pem_text(key):
    return key.decode("ascii").replace("PUBLIC KEY", "CERTIFICATE")


def der_number(number):
    return der(2, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def der_pair(r, s):
    return der(0x30, der_number(r), der_number(s))


def public_key(kind, *bits):
    """A SubjectPublicKeyInfo of the AlgorithmIdentifier `kind`, as PEM."""
    return pem("PUBLIC KEY", der(0x30, der(0x30, bytes.fromhex(kind)),
                                 der(3, b"\0", *bits)))


def point_of(jwk):
    return b"\4" + base64url_decode(jwk["x"]) + base64url_decode(jwk["y"])


TEST_PUBLIC = public_key(P256_KIND, point_of(JWK))
OTHER_PUBLIC = public_key(P256_KIND, b"\4" + P256_BASE)  # of the secret 1

# What cosign 2 signed (containers/image, signature/fixtures/dir-img-cosign-valid).
COSIGN_PUBLIC = pem("PUBLIC KEY", base64.b64decode(
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEFNLqFhf4fiN6o/glAuYnq2jYUeL0vRuLu/z39pmbVwS9ff"
    "5AYnlwaP9sxREajdLY9ynM6G1sy6AAmb7Z63TsLg=="))
COSIGN_DIGEST = ("sha256:634a8f35b5f16dcf4aaa0822adc0b1964bb786fca12f6831de8ddc45e5986a"
                 "00")
COSIGN_PAYLOAD = (
    '{"critical":{"identity":{"docker-reference":"192.168.64.2:5000/cosign-signed-singl'
    'e-sample"},"image":{"docker-manifest-digest":"%s"},"type":"cosign container image '
    'signature"},"optional":null}' % COSIGN_DIGEST).encode("ascii")
COSIGN_SIGNATURE = base64.b64decode(
    "MEYCIQDmtamqYPjMg81nqeBhptrPls44aA/r7PwLmspINJY4MwIhANKRpqe2E9UCBtGFdPoz/8jAbaQm4u"
    "P4h+IpwKTE6ClR")
# What openssl signed: "hello".
P384_PUBLIC = pem("PUBLIC KEY", base64.b64decode(
    "MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEy/qBhJiayt77Bw7Mst/d4ro+dkc68MrjTHfFupJ853m43W6zvf"
    "VKCqa5lqbgveAFfRebAvKXu51Mo+qG1gVcrX6Ek1/Fi88H/a8TxUzH2H/FaceTfVjWG/c/HOn9s+qd"))
RSA_PUBLIC = pem("PUBLIC KEY", base64.b64decode("""
    MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEArqVEn12F+ygVqezF0+7R/Iwp/ymHLasr1vN8+hP5
    FfbpVDZLMS5CHTEmDfRmg9Bv8+35Uj8DPlkV3tCwwnL/MSfI64P3fwTPwNvYA4eHV4woWqD/r+OiyRQUFtWL
    9ZXfw2QP0KqqQwJ3i3LpYE8A0oL6xqs0nlNoYn2puwQCvCynKs+uIX3/chnHBLTmE0OIm1SIcUj20t8h9o5Q
    FEAQx2GNUKwFKGyRz190YjqUfUp2SiG7U6shLURd6RBhxGdOXhSguKc9bkZ9XUjJbhAEzUIp4QBhSJ0xYcG4
    2tr76yGt9fbpyDURlopud83Ktcbezum4SE/E/fkrD8pMH9Q8iwIDAQAB"""))
RSA_SIGNATURE = base64.b64decode("""
    WEf2pe+80ULupnVF36P//v1hDb8VNgVsCAR40OljSkkC+0Z5/mefqwNGoEz6su2iGI6YI7J9JJ6KhvCBwqAN
    2CH9iGxfMfAFottP/5NZvwhWVFCnS2/vHkP167JNFCFn8agXzDfjAjQXyedKFN0xfdtpdYXrQsIlmDVH4aKW
    c0rev7Cu/CdEFcxHsrinOxPPNTBP55jRwbObCRSyGw0y1rjpLpmdMtBMV/7916s4OD10o5sW0prahauVSDiT
    mLQ9yc0DrUPWNZhj2XIettwk4RAE8IEQikIhcEzanBUwwoau8w+apIQkrykhaFlSFtuu3e5Dh66+yRDl7zFu
    +tYXng==""")

KEYS_READ = (
    # name, key, message, signature
    ("P-256, cosign", COSIGN_PUBLIC, COSIGN_PAYLOAD, COSIGN_SIGNATURE),
    ("P-384, SHA-384", P384_PUBLIC, b"hello", base64.b64decode(
        "MGYCMQDknutxC1spQZehS6N8vTsGcurKdzd+8zwXcNSnaP9JDGzqIe84yNDKDEx9jQlgYaECMQD3bC"
        "Ts+e0hMJ9z1t9CSroK0Adp1qFEuQcDWW8iPXfxsgTmZfAUEVq3a8B6TTBWtQE=")),
    ("P-384, SHA-256, as older cosigns", P384_PUBLIC, b"hello", base64.b64decode(
        "MGQCMA32Da6J/ba5zBPbp7sBobgW4deui/x2Yt7ViiytaVPoxO72fPs1YGPuRzlKplsTaAIwO0Bl46"
        "9VPHnZ4yjQU6vttib7DGYsw6CpfFw7/sT7XiejkcWuc4P3Gkdi1odFWvHM")),
    ("RSA", RSA_PUBLIC, b"hello", RSA_SIGNATURE),
    ("the base itself", OTHER_PUBLIC, b"x", der_pair(*ecdsa(b"x", 1))),
    ("and its opposite", public_key(P256_KIND, b"\4", P256_BASE[:32], (
        imagec._P256[0] - imagec._P256[4]).to_bytes(32, "big")), b"x",
     der_pair(*ecdsa(b"x", -1))),
    ("lines of Windows, and words around", b"of 2024:\r\n" + TEST_PUBLIC.replace(
        b"\n", b"\r\n") + b"and no other\r\n", b"x", der_pair(*ecdsa(b"x"))),
)

def small_point():
    """(x, y) of a point on P-256 whose x + p has 32 bytes, too."""
    p, b = imagec._P256[:2]
    for x in itertools.count():
        square = (x ** 3 - 3 * x + b) % p
        y = pow(square, (p + 1) // 4, p)
        if y * y % p == square:
            return x, y


SMALL_X, SMALL_Y = small_point()
KEYS_REFUSED = worded(
    ("got no PEM", b"", b"\x30\x59", b"ssh-ed25519 AAAA", TEST_PUBLIC[:-5],
     TEST_PUBLIC.lower(), TEST_PUBLIC.replace(b"BEGIN PUBLIC", b"BEGIN  PUBLIC")),
    ("got PRIVATE KEY", TEST_KEY.encode()), ("got CERTIFICATE", TEST_CERT.encode()),
    ("got ENCRYPTED SIGSTORE PRIVATE KEY",
     pem("ENCRYPTED SIGSTORE PRIVATE KEY", PASSWORD.encode())),
    ("got RSA PUBLIC KEY", pem("RSA PUBLIC KEY", b"")),
    ("got PUBLIC KEY and PUBLIC KEY", TEST_PUBLIC + TEST_PUBLIC),
    ("got EC PARAMETERS and PUBLIC KEY", pem("EC PARAMETERS", b"") + TEST_PUBLIC),
    ("of the kind Ed25519", public_key("06032b6570", bytes(32))),
    ("of the kind P-521", public_key(EC_KIND + "06052b81040023", bytes(133))),
    ("of the kind 06072a8648ce3d020106052b8104000a",  # secp256k1
     public_key(EC_KIND + "06052b8104000a", bytes(65))),
    ("of the kind 06092a864886f70d01010a", public_key("06092a864886f70d01010a")),
    ("of the kind 06072a8648ce3d0201308", public_key(EC_KIND + "308" + "0" * 999)),
    ("not base64", TEST_PUBLIC.replace(b"==", b"="),
     TEST_PUBLIC.replace(b"F", b" F", 1), TEST_PUBLIC.replace(b"A==", b"B=="), TEST_PUBLIC.replace(b"F", b"!F", 1)),
    ("more than DER", pem("PUBLIC KEY", ssl.PEM_cert_to_DER_cert(pem_text(
        TEST_PUBLIC)) + b"\0"), pem("PUBLIC KEY", der(0x30, der(0x30), der(3), b"\0"))),
    ("not DER", pem("PUBLIC KEY", b""), pem("PUBLIC KEY", der(0x31)),
     pem("PUBLIC KEY", ssl.PEM_cert_to_DER_cert(pem_text(TEST_PUBLIC))[:-1]),
     pem("PUBLIC KEY", b"\x30\x83\0" + ssl.PEM_cert_to_DER_cert(  # a length with a 0
         pem_text(RSA_PUBLIC))[2:])),
    ("not on the curve", public_key(P256_KIND, b"\4", P256_BASE[::-1]),
     public_key(P256_KIND, b"\4", bytes(64)),
     public_key(P256_KIND, b"\4", b"\xff" * 64), public_key(P256_KIND, b"\4", P256_BASE[:32], bytes(31), b"\5"),
     public_key(P256_KIND, b"\4", (SMALL_X + imagec._P256[0]).to_bytes(32, "big"),
                SMALL_Y.to_bytes(32, "big")),
     public_key(P256_KIND, b"\6", P256_BASE), public_key(P256_KIND, b"\0", P256_BASE)),
    ("not two numbers of 32 bytes", public_key(P256_KIND, b"\0"),
     public_key(P256_KIND, b"\2", P256_BASE[:32]), public_key(P256_KIND, b"\4",
                                                              P384_BASE)),
    ("not two numbers of 48 bytes", public_key(P384_KIND, b"\4", P256_BASE)),
    ("odd bits", pem("PUBLIC KEY", der(0x30, der(0x30, bytes.fromhex(P256_KIND)), der(
        3, b"\7\4", P256_BASE)))),
    ("RSA of 1024 bits", public_key(RSA_KIND, der_pair(2 ** 1024 - 1, 65537))),
    ("RSA of 2047 bits", public_key(RSA_KIND, der_pair(2 ** 2047 - 1, 65537))),
    ("RSA of 8193 bits", public_key(RSA_KIND, der_pair(2 ** 8193 - 1, 65537))),
    ("RSA of 2048 bits, exponent", *(public_key(RSA_KIND, der_pair(
        2 ** 2048 - 1, exponent)) for exponent in (0, 1, 2, 65536, 2 ** 32 + 1))),
    ("RSA of 2048 bits", public_key(RSA_KIND, der_pair(2 ** 2047, 3))),
)

R, S = ecdsa(b"x")


def der_parts(*parts, tag=0x30):
    return der(tag, *(der(2, part) for part in parts))


#: (name, signature): as Wycheproof has it, of what is no DER, or nothing that was made.
SIGNATURES_BAD = (
    ("nothing", b""), ("only a tag", b"\x30"), ("an empty sequence", der(0x30)),
    ("r and s, side by side", R.to_bytes(32, "big") + S.to_bytes(32, "big")),
    ("a set", der_pair(R, S).replace(b"\x30", b"\x31", 1)),
    ("a context tag", der_pair(R, S).replace(b"\x30", b"\xa0", 1)),
    ("other than integers", der_pair(R, S).replace(b"\2", b"\x0a", 1)),
    ("only r", der(0x30, der_number(R))),
    ("a third number", der(0x30, der_number(R), der_number(S), der_number(1))),
    ("a null inside", der(0x30, der_number(R), der_number(S), b"\5\0")),
    ("a byte behind", der_pair(R, S) + b"\0"), ("cut short", der_pair(R, S)[:-1]),
    ("twice", der_pair(R, S) * 2),
    ("a length in two bytes", b"\x30\x81" + der_pair(R, S)[1:]),
    ("a length in three", b"\x30\x82\0" + der_pair(R, S)[1:]),
    ("an indefinite length", b"\x30\x80" + der_pair(R, S)[2:] + b"\0\0"),
    ("a length without end", b"\x30\xff" + b"\xff" * 127),
    ("a length beyond the end", b"\x30\x84\xff\xff\xff\xff" + der_pair(R, S)[2:]),
    ("a zero more before r", der_parts(b"\0" + R.to_bytes(32, "big"),
                                       S.to_bytes(33, "big"))),
    ("a zero more before s", der_parts(R.to_bytes(32, "big"),
                                       b"\0\0" + S.to_bytes(32, "big"))),
    ("a negative r", der_parts((R - 2 ** 256).to_bytes(33, "big", signed=True),
                               S.to_bytes(33, "big"))),
    ("-s, which reads as s", der_parts(R.to_bytes(32, "big"), S.to_bytes(32, "big"))),
    ("numbers of no bytes", der_parts(b"", b"")),
    ("two zeros", der_pair(0, 0)), ("two ones", der_pair(1, 1)),
    ("r is 0", der_pair(0, S)), ("s is 0", der_pair(R, 0)),
    ("r is n", der_pair(P256_ORDER, S)), ("s is n", der_pair(R, P256_ORDER)),
    ("both are n", der_pair(P256_ORDER, P256_ORDER)),
    ("r is n + 1", der_pair(P256_ORDER + 1, S)), ("s is n + 1", der_pair(
        R, P256_ORDER + 1)),
    ("r + n", der_pair(R + P256_ORDER, S)), ("s + n", der_pair(R, S + P256_ORDER)),
    ("r - n", der_parts((R - P256_ORDER).to_bytes(33, "big", signed=True),
                        S.to_bytes(33, "big"))),
    ("s and r", der_pair(S, R)), ("n - r", der_pair(P256_ORDER - R, S)),
    ("r is huge", der_pair(2 ** 800, S)),
)

RSA_PRIMES = 2 ** 107 - 1, 2 ** 521 - 1  # Mersenne's, and small: nothing is secret
RSA_MODULUS, RSA_SIZE = RSA_PRIMES[0] * RSA_PRIMES[1], 79  # bytes


def inverse(number, modulus):
    """1 / number modulo what it has no divisor in common with."""
    one, other, x, y = number, modulus, 1, 0
    while other:
        one, other, x, y = other, one % other, y, x - one // other * y
    return x % modulus


RSA_SECRET = inverse(65537, (RSA_PRIMES[0] - 1) * (RSA_PRIMES[1] - 1))


def rsa(*parts, tail=b""):
    """The signature whose block is 0, 1, padding, `parts`, and behind them `tail`."""
    block = b"".join(parts)
    block = b"\0\1" + b"\xff" * (RSA_SIZE - len(block) - len(tail) - 2) + block + tail
    assert len(block) == RSA_SIZE
    number = pow(int.from_bytes(block, "big"), RSA_SECRET, RSA_MODULUS)
    return number.to_bytes(RSA_SIZE, "big")


HASHED = hashlib.sha256(b"x").digest()
INFO = bytes.fromhex("3031300d060960864801650304020105000420")
#: (name, signature) that RFC 8017, 8.2.2 refuses.
RSA_BAD = (
    ("no padding", rsa(bytes(RSA_SIZE - 53), INFO, HASHED)),
    ("no zero", rsa(INFO, HASHED)), ("two zeros", rsa(b"\0\0", INFO, HASHED)),
    ("a hole in the padding", rsa(b"\0\xff\0", INFO, HASHED)),
    ("another byte in the padding", rsa(b"\xfe\0", INFO, HASHED)),
    ("bytes behind", rsa(b"\0", INFO, HASHED, tail=bytes(9))),
    ("little padding, much behind (Bleichenbacher, 2006)",
     rsa(b"\0", INFO, HASHED, tail=bytes(RSA_SIZE - 64))),
    ("the hash alone", rsa(b"\0", HASHED)),
    ("without the null", rsa(b"\0", bytes.fromhex(
        "302f300b0609608648016503040201 0420".replace(" ", "")), HASHED)),
    ("a length in two bytes", rsa(b"\0", b"\x30\x81", INFO[1:], HASHED)),
    ("SHA-1", rsa(b"\0", bytes.fromhex("3021300906052b0e03021a05000414"),
                  hashlib.sha1(b"x").digest())),
    ("of another hash", rsa(b"\0", INFO, HASHED[::-1])),
    ("nothing", b""), ("zeros", bytes(RSA_SIZE)), ("n", RSA_MODULUS.to_bytes(
        RSA_SIZE, "big")), ("one", (1).to_bytes(RSA_SIZE, "big")),
    ("too short", rsa(b"\0", INFO, HASHED)[1:]),
    ("too long", b"\0" + rsa(b"\0", INFO, HASHED)),
    ("s + n", (int.from_bytes(rsa(b"\0", INFO, HASHED), "big") + RSA_MODULUS).to_bytes(
        RSA_SIZE, "big")),
)


class PublicKeyTest(TableCase):
    """A key takes the signatures it made, and nothing else."""

    @rows(KEYS_READ)
    def test_its_own_signatures(self, _name, key, message, signature):
        key = imagec.PublicKey.parse(key, "k.pub")
        with cpu_within(0.2):
            self.assertTrue(key.verifies(signature, message))
        for other in (message + b"\0", message[1:], b""):
            self.assertFalse(key.verifies(signature, other))

    def test_keys_of_others(self):
        keys = [imagec.PublicKey.parse(key, "k.pub") for key in (
            TEST_PUBLIC, OTHER_PUBLIC, COSIGN_PUBLIC, P384_PUBLIC, RSA_PUBLIC)]
        for _, key, message, signature in KEYS_READ:
            right = imagec.PublicKey.parse(key, "k.pub")
            for one in keys:
                self.assertEqual(one.verifies(signature, message), one == right)

    @rows(KEYS_REFUSED)
    def test_keys_refused(self, key, words):
        error = self.refused(imagec.UsageError, words, imagec.PublicKey.parse, key,
                             "k.pub")
        self.assertIn("k.pub: expected one PEM PUBLIC KEY", str(error))
        self.assertNotIn(PASSWORD, str(error))

    @rows(((TEST_PUBLIC, [der_pair(R, S), der_pair(R, P256_ORDER - S)], SIGNATURES_BAD),
           (None, [rsa(b"\0", INFO, HASHED)], RSA_BAD)))
    def test_signatures(self, pem, good, bad):
        key = imagec.PublicKey.parse(pem, "k.pub") if pem else imagec.PublicKey(
            "k.pub", None, (RSA_MODULUS, 65537))
        for signature in good:
            self.assertTrue(key.verifies(signature, b"x"))
        for name, signature in bad:
            self.assertFalse(key.verifies(signature, b"x"), name)

    def test_any_byte_of_a_signature_or_key_counts(self):
        """What is read all the same, an exponent say, has not made the signature."""
        choices = random.Random(SEED)
        for _, pem, message, signature in KEYS_READ[:2] + KEYS_READ[3:4]:
            places = [(pem, at) for at in range(len(pem.rstrip()))]
            if pem is not P384_PUBLIC:  # which is slow
                places += [(signature, at) for at in range(len(signature))]
            for data, at in places:
                mutant = bytearray(data)
                mutant[at] ^= 1 << choices.randrange(8)
                key, made = (pem, mutant) if data is signature else (mutant, signature)
                with contextlib.suppress(imagec.UsageError):
                    key = imagec.PublicKey.parse(bytes(key), "k.pub")
                    self.assertFalse(key.verifies(bytes(made), message), at)


def simple(payload, secret=TEST_SECRET, annotations=None):
    """(layer, blob) of cosign's signature before 3, of a payload: bytes or a dict."""
    raw = payload if isinstance(payload, bytes) else json_bytes(payload)
    made = base64.b64encode(der_pair(*ecdsa(raw, secret))).decode("ascii")
    return imagec.Descriptor(
        imagec.SIMPLE_SIGNING, imagec.Digest.of(raw), len(raw), None,
        {imagec.SIGNATURE_ANNOTATION: made}
        if annotations is None else annotations), raw


def simple_payload(digest=SUM_A, name="registry.test/lab/app", critical=(), **extra):
    """What cosign signed before 3."""
    return {"critical": dict({
        "identity": {"docker-reference": name}, "image": {
            "docker-manifest-digest": digest},
        "type": "cosign container image signature"}, **dict(critical)), **extra}


def of_type(media_type, raw):
    """(layer, blob) of any type."""
    return simple(raw)[0]._replace(media_type=media_type), raw


def dsse(kind, payload, secret=TEST_SECRET, **changes):
    """A DSSE envelope, as a dict."""
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode("ascii"), len(payload),
                                       payload)
    made = base64.b64encode(der_pair(*ecdsa(message, secret))).decode("ascii")
    return dict({"payload": base64.b64encode(payload).decode("ascii"),
                 "payloadType": kind, "signatures": [{"sig": made}]}, **changes)


def bundle(envelope):
    """(layer, blob) of a sigstore bundle, as cosign 3 makes it."""
    raw = json_bytes({
        "mediaType": imagec.SIGSTORE_BUNDLE, "verificationMaterial": {
            "publicKey": {"hint": "x"}, "tlogEntries": []}, "dsseEnvelope": envelope})
    return imagec.Descriptor(imagec.SIGSTORE_BUNDLE, imagec.Digest.of(raw),
                             len(raw)), raw


IN_TOTO = "application/vnd.in-toto+json"


def statement(*digests, **changes):
    """An in-toto statement, as cosign 3 signs it."""
    return json_bytes(dict({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"digest": {"sha256": digest[7:]}} for digest in digests],
        "predicateType": "https://sigstore.dev/cosign/sign/v1", "predicate": {}},
        **changes))


SIGNED = (
    # name, (layer, blob), the name it must be signed as
    ("simple", simple(simple_payload(optional=None)), None),
    ("simple, by name", simple(simple_payload(name="registry.test/lab/app:1")),
     "registry.test/lab/app"),
    ("docker's own name", simple(simple_payload(name="index.docker.io/library/app")),
     "docker.io/library/app"),
    ("a digest in the name", simple(simple_payload(name="app@" + SUM_B)),
     "docker.io/library/app"),
    ("bundle", bundle(dsse(IN_TOTO, statement(SUM_A))), None),
    ("one of two subjects", bundle(dsse(IN_TOTO, statement(SUM_B, SUM_A))), None),
    ("a subject of another kind", bundle(dsse(IN_TOTO, statement(subject=[
        {"digest": {"gitCommit": "1"}}, {"name": "x", "digest": {
            "sha256": SUM_A[7:], "sha512": "x"}}]))), None),
)

GOOD_BUNDLE = dsse(IN_TOTO, statement(SUM_A))
#: (error class, words), then the layer with its blob[, the name it must be signed as]
SIGNED_REFUSED = worded(
    ((imagec.VerificationError, "by none of the keys"),
     (simple(simple_payload(), secret=2),), (simple(simple_payload(), annotations={}),),
     ((simple(simple_payload())[0], simple(simple_payload())[1] + b" "),),
     (bundle(dsse(IN_TOTO, statement(SUM_A), secret=2)),),
     (bundle(dict(GOOD_BUNDLE, payloadType=IN_TOTO + "x")),),
     (bundle(dict(GOOD_BUNDLE, payload=field_base64("{}"))),),
     (bundle(dict(GOOD_BUNDLE, signatures=[{"sig": ""}])),),
     (bundle(dict(GOOD_BUNDLE, signatures=[])),),
     # the payload as such, not what DSSE signs
     (bundle(dict(GOOD_BUNDLE, signatures=[{"sig": base64.b64encode(der_pair(
         *ecdsa(statement(SUM_A)))).decode("ascii")}])),)),
    ((imagec.VerificationError, "by k.pub, but of " + SUM_B),
     (simple(simple_payload(SUM_B)),), (bundle(dsse(IN_TOTO, statement(SUM_B))),)),
    ((imagec.VerificationError, "by k.pub, but of sha256:%s, %s" % (
        "A" * 64, SUM_B)), (bundle(dsse(IN_TOTO, statement("sha256:" + "A" * 64,
                                                           SUM_B))),)),
    ((imagec.VerificationError, "by k.pub, but of no image"),
     (simple(simple_payload(critical={"type": "atomic container signature"})),),
     (simple(simple_payload(critical={"new": 1})),),
     (bundle(dsse(IN_TOTO, statement())),),
     (bundle(dsse("text/plain", statement(SUM_A))),),
     (bundle(dsse(IN_TOTO, statement(
         SUM_A, predicateType="https://slsa.dev/provenance/v1"))),),
     (bundle(dsse(IN_TOTO, statement(
         SUM_A, _type="https://in-toto.io/Statement/v0.1"))),)),
    ((imagec.VerificationError, "by k.pub, but as docker.io/library/app"),
     (simple(simple_payload(name="docker.io/library/app")), "registry.test/lab/app")),
    ((imagec.VerificationError, "by k.pub, but as registry.test/lab/app:1"),
     (simple(simple_payload(name="registry.test/lab/app:1")), "registry.test/lab")),
    ((imagec.VerificationError, "by k.pub, but it names no image"),
     (bundle(GOOD_BUNDLE), "registry.test/lab/app")),
    ((imagec.InvalidDocument, "invalid reference"),
     (simple(simple_payload(name="")), "registry.test/lab/app")),
    ((imagec.InvalidDocument, "not base64"),
     (simple(simple_payload(), annotations={imagec.SIGNATURE_ANNOTATION: "=AAA"}),),
     (simple(simple_payload(), annotations={imagec.SIGNATURE_ANNOTATION: "\u00e9"}),),
     (bundle(dict(GOOD_BUNDLE, payload="e30")),),
     (bundle(dict(GOOD_BUNDLE, signatures=[{"sig": "M"}])),)),
    ((imagec.InvalidDocument, "payload is not valid JSON"),
     (simple(b"{]"),), (simple(b'{"critical":{},"critical":{}}'),)),
    ((imagec.InvalidDocument, "payload has no 'critical'"), (simple({"optional": 1}),)),
    ((imagec.InvalidDocument, "in another case"),
     (simple(simple_payload(Critical={})),), (bundle(dict(GOOD_BUNDLE, Payload="")),)),
    ((imagec.InvalidDocument, "invalid digest"), (simple(simple_payload("sha256:x")),)),
    ((imagec.InvalidDocument, "has no 'docker-manifest-digest'"),
     (simple(simple_payload(critical={"image": {}})),)),
    ((imagec.InvalidDocument, "has no 'docker-reference'"),
     (simple(simple_payload(critical={"identity": {}})),)),
    ((imagec.InvalidDocument, "bundle has no 'dsseEnvelope'"), (bundle(None),)),
    ((imagec.LimitExceeded, "'signatures' has 2 entries"),
     (bundle(dict(GOOD_BUNDLE, signatures=2 * GOOD_BUNDLE["signatures"])),)),
    ((imagec.InvalidDocument, "statement is not valid JSON"), (bundle(dsse(IN_TOTO,
                                                                           b"")),)),
    ((imagec.InvalidDocument, "has no 'digest'"),
     (bundle(dsse(IN_TOTO, statement(subject=[{"name": "x"}]))),)),
)


class SignerTest(TableCase):
    """A signature says who signed what: no other image, not by other keys."""

    KEYS = [imagec.PublicKey.parse(key, name) for key, name in (
        (P384_PUBLIC, "other.pub"), (TEST_PUBLIC, "k.pub"))]

    @rows(SIGNED)
    def test_signed(self, _name, signature, name):
        key = imagec.signer(self.KEYS, imagec.Digest.parse(SUM_A), *signature, name)
        self.assertEqual(key.name, "k.pub")

    def test_signed_by_cosign_itself(self):
        layer = imagec.Descriptor(imagec.SIMPLE_SIGNING, None, None, None, {
            imagec.SIGNATURE_ANNOTATION: base64.b64encode(
                COSIGN_SIGNATURE).decode("ascii")})
        digest = imagec.Digest.parse(COSIGN_DIGEST)
        keys = [imagec.PublicKey.parse(COSIGN_PUBLIC, "cosign.pub")]
        for name in (None, "192.168.64.2:5000/cosign-signed-single-sample"):
            self.assertIs(imagec.signer(keys, digest, layer, COSIGN_PAYLOAD, name),
                          keys[0])
        self.refused(imagec.VerificationError, "but of " + COSIGN_DIGEST, imagec.signer,
                     keys, imagec.Digest.parse(SUM_A), layer, COSIGN_PAYLOAD)
        self.refused(imagec.VerificationError, "by none of", imagec.signer, self.KEYS,
                     digest, layer, COSIGN_PAYLOAD)

    def test_signed_by_the_library_of_sigstore(self):
        """@sigstore/sign 5.1.0."""
        key = imagec.PublicKey.parse(pem("PUBLIC KEY", base64.b64decode(
            "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEP+beAwze6TfYpJO90C3AFkggk/RADy+oOsfd8l"
            "CsPUG4bjsiisoxtFTMf0IFjpjA0MKJbhnD/tqU93pPn2PLmw==")), "k.pub")
        made = ("MEUCIAKcaA90Om/x+qU9Dq2vFGkVFVBq0DLF4Do0HTn4GAk5AiEAhoEiuo7RMVld47Jpmp"
                "8UwE6VqNSX+EeGi4QyPpvuc7w=")
        signature = bundle(dsse(IN_TOTO, statement(SUM_A), signatures=[
            {"sig": made, "keyid": "h"}]))
        self.assertIs(imagec.signer([key], imagec.Digest.parse(SUM_A), *signature), key)

    def test_refused(self):
        for signature, *name, (kind, words) in SIGNED_REFUSED:
            with self.subTest(words, blob=signature[1]):
                self.refused(kind, words, imagec.signer, self.KEYS, imagec.Digest.parse(
                    SUM_A), *signature, *name)

    def test_any_byte_of_a_signature_counts(self):
        choices = random.Random(SEED)
        for _, (layer, raw), _ in (SIGNED[0], SIGNED[4]):
            begin = max(0, raw.find(b'"dsseEnvelope"'))
            for at in range(begin, len(raw), 3):
                mutant = bytearray(raw)
                mutant[at] ^= 1 << choices.randrange(8)
                found = outcome(imagec.signer, self.KEYS[1:],
                                imagec.Digest.parse(SUM_A), layer, bytes(mutant))
                self.assertIsInstance(found, imagec.ImagecError, mutant)


def libtrust(*signatures, payload=PAYLOAD):
    """A schema1 body with signatures: (bytes of one, or the secret of its key)."""
    entries = []
    for made in signatures:
        entry, = length_and_tail(len(payload) - 2, payload[-2:])
        message = (entry["protected"] + "." + url64(payload)).encode("ascii")
        if isinstance(made, int):
            made = b"".join(half.to_bytes(32, "big") for half in ecdsa(message, made))
        entries.append(dict(entry, signature=url64(
            made(message) if callable(made) else made)))
    return pretty(payload, entries)


def es384(message):
    """The signature of the P-384 key 1, with the nonce 1."""
    r, n = imagec._P384[3], imagec._P384[2]
    number = int.from_bytes(hashlib.sha384(message).digest(), "big")
    return r.to_bytes(48, "big") + ((number + r) % n).to_bytes(48, "big")


LIBTRUST_LAYER = imagec.Descriptor(imagec.DOCKER_SCHEMA1_SIGNED, None, None)
LIBTRUST_READ = (
    # name, key, body
    ("moby's", public_key(P256_KIND, point_of(json.loads(SIGNED_MANIFEST.decode(
        "ascii"))["signatures"][0]["header"]["jwk"])), SIGNED_MANIFEST),
    ("ours", TEST_PUBLIC, libtrust(TEST_SECRET)),
    ("the last of two", TEST_PUBLIC, libtrust(2, TEST_SECRET)),
    ("ES384", public_key(P384_KIND, b"\4", P384_BASE), libtrust(es384)),
)
LIBTRUST_REFUSED = (
    # error class, words, body
    (imagec.VerificationError, "by none of the keys", SIGNED_MANIFEST),
    (imagec.VerificationError, "by none of the keys", libtrust(2, bytes(64), b"")),
    (imagec.VerificationError, "by none of the keys", libtrust(  # no DER
        lambda message: der_pair(*ecdsa(message)))),
    (imagec.VerificationError, "by none of the keys", libtrust(  # a byte too many
        lambda message: b"\0".join(n.to_bytes(32, "big") for n in ecdsa(message)))),
    (imagec.VerificationError, "by none of the keys", libtrust(TEST_SECRET).replace(
        b'"a": 1', b'"a": 2')),
    (imagec.VerificationError, "by k.pub, but of sha256:", libtrust(TEST_SECRET)),
    (imagec.VerificationError, "by none of the keys", PAYLOAD),
    (imagec.LimitExceeded, "65 entries", libtrust(*[b""] * 65)),
)


class LibtrustTest(TableCase):
    """What docker signed before 1.10: a key that is known proves something."""

    @rows(LIBTRUST_READ)
    def test_signed(self, _name, pem, body):
        key = imagec.PublicKey.parse(pem, "k.pub")
        digest = imagec.Digest.of(imagec.PrettySignature.parse(body).payload)
        self.assertIs(imagec.signer([key], digest, LIBTRUST_LAYER, body), key)

    @rows(LIBTRUST_REFUSED)
    def test_refused(self, kind, words, body):
        key = imagec.PublicKey.parse(TEST_PUBLIC, "k.pub")
        self.refused(kind, words, imagec.signer, [key],
                     imagec.Digest.parse(SUM_A), LIBTRUST_LAYER, body)


# --------------------------------------------------------------------------------------
# 15  Pull
# --------------------------------------------------------------------------------------

NET_PLATFORM = "linux/amd64"


class PullCase(NetworkCase):
    """Whole pulls into self.dest."""

    def setUp(self):
        super().setUp()
        self.dest = os.path.join(self.root, "dest")
        self.events = []
        self.patch(mock.patch("os.fsync"))  # as slow as the disk

    def odd(self, change, image=None, **options):
        """A registry in which app:odd is the image but for its manifest, changed."""
        image = image or self.image
        document = json.loads(image.manifest.decode("ascii"))
        change(document)
        registry = self.filled(image, **options)
        registry.add_manifest("app", "odd", json_bytes(document), image.media_type)
        return registry

    def pull(self, registry, reference="app:1", dest=None, **options):
        options = dict({"notify": self.events.append}, **options)
        platform = imagec.Platform.parse(options.pop("platform", NET_PLATFORM))
        with self.session(**options) as session:
            return session.pull(
                [imagec.Reference.parse("%s/%s" % (registry.host, reference))],
                imagec.LayersOutput(dest or self.dest), platform)[0]

    def tree(self, top=None):
        """{path: bytes} of all files below the destination."""
        top, found = top or self.dest, {}
        for folder, _, names in os.walk(top):
            for name in names:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    found[os.path.relpath(path, top).replace(os.sep, "/")] = file.read()
        return found

    def chain(self, diff_ids):
        """The chainIDs' hex, computed on our own (OCI image-spec, config.md)."""
        chain = []
        for diff_id in diff_ids:
            text = "%s %s" % (chain[-1], diff_id) if chain else diff_id
            chain.append(sha256(text.encode("ascii")) if chain else diff_id)
        return [digest.partition(":")[2] for digest in chain]

    def assert_nothing_final(self, blobs=()):
        """No document, no `.tar` that is not one of these blobs, whole."""
        for path, data in (self.tree() if os.path.exists(self.dest) else {}).items():
            if path.endswith(".partial") or path == "canary":
                continue
            self.assertTrue(path.endswith(".tar"), path)
            self.assertIn(sha256(data), blobs)


class OutputsTest(PullCase):
    """The `layers` tree."""

    def expected(self, image, ids, base):
        """{path: bytes} but for the JSON of layers."""
        tree = {base + "/manifest.json": image.manifest,
                base + "/unpacked.json": self.unpacked(image)}
        if image.config:
            tree[base + "/config.json"] = image.config
        for name, digest in zip(ids, image.layers):
            tree["%s/%s/%s.tar" % (base, name, name)] = image.blobs[digest]
        return tree

    @staticmethod
    def unpacked(image):
        """What its blobs unpack to, found out on our own."""
        found = {}
        for digest in image.layers:
            tar = gzip.decompress(image.blobs[digest])
            with tarfile.open(fileobj=io.BytesIO(tar)) as file:
                size = sum(member.size for member in file)
            found[digest] = {"diff_id": sha256(tar), "size": size, "bytes": len(tar)}
        return json.dumps(found, sort_keys=True, separators=(",", ":")).encode("ascii")

    def split(self, base):
        """The tree, and apart from it {id: v1 JSON as bytes}."""
        tree = self.tree()
        pattern = re.escape(base) + "/([0-9a-f]{64})/\\1.json"
        found = {path: re.fullmatch(pattern, path) for path in tree}
        return tree, {match.group(1): tree.pop(path)
                      for path, match in found.items() if match}

    @rows([("oci",), ("docker",)])
    def test_schema2_and_oci(self, kind):
        self.dest = os.path.join(self.root, kind)
        image = build_image(NET_TARS[:1] + [None] + NET_TARS[1:], kind)
        registry = self.filled(image)
        found = self.pull(registry)
        base = "http/%s/v2/app/1" % registry.host
        ids = self.chain(image.diff_ids)
        tree, texts = self.split(base)
        self.assertEqual(tree, self.expected(image, ids, base))
        self.check_image(found, image, ids, base)
        self.assertEqual(set(texts), set(ids))
        for number, name in enumerate(ids):
            value = json.loads(texts[name].decode("utf-8"))
            self.assertEqual(value["id"], name)
            self.assertEqual(value.get("parent"), ids[number - 1] if number else None)
            self.assertNotIn("rootfs", value)
            self.assertEqual("config" in value, number == len(ids) - 1)

    def check_image(self, found, image, ids, base):
        self.assertEqual(str(found.digest), image.digest)
        self.assertEqual(found.image_id, sha256(image.config))
        self.assertEqual(found.path, os.path.join(self.dest, *base.split("/")))
        self.assertEqual((str(found.platform), found.format), (NET_PLATFORM, "layers"))
        rows = [(layer.id, str(layer.digest), str(layer.diff_id), layer.size,
                 layer.blob_size) for layer in found.layers]
        sizes = [7, 1200, 5]
        self.assertEqual(rows, [
            row + (len(image.blobs[row[1]]),)
            for row in zip(ids, image.layers, image.diff_ids, sizes)])

    @rows([("schema1",), ("schema1-signed",)])
    def test_schema1(self, kind):
        self.dest = os.path.join(self.root, kind)
        image = build_image(NET_TARS, kind)
        registry = self.filled(image)
        found = self.pull(registry)
        base = "http/%s/v2/app/1" % registry.host
        history = json.loads(image.manifest.decode("ascii"))["history"]
        texts = [entry["v1Compatibility"] for entry in reversed(history)]
        ids = [json.loads(text)["id"] for text in texts]
        tree, found_texts = self.split(base)
        self.assertEqual(tree, self.expected(image, ids, base))
        self.assertEqual(found_texts, {
            name: text.encode("ascii") for name, text in zip(ids, texts)})
        self.assertEqual(str(found.digest), image.digest)
        self.assertEqual([str(one.diff_id) for one in found.layers], image.diff_ids)

    def test_schema1_steps_without_a_layer(self):
        image = build_image([NET_TARS[0], None, NET_TARS[1], None], "schema1")
        registry = self.filled(image)
        found = self.pull(registry)
        self.assertEqual(len(found.layers), 4)
        self.assertEqual([one.size for one in found.layers], [7, 0, 1200, 0])
        self.assertEqual(list(self.tree().values()).count(EMPTY_LAYER), 2)
        self.assertEqual(len(paths(registry, "/blobs/" + sha256(EMPTY_LAYER))), 1)

    def test_indexes(self):
        inner = build_index([(self.image, ("linux", "amd64", None))])
        outer = build_index([(inner, None)], "docker")
        for index, names in ((inner, {"index.json": inner}),
                             (outer, {"index.json": outer, "index.1.json": inner})):
            self.dest = os.path.join(self.root, "dest%d" % len(names))
            registry = self.filled(index)
            found = self.pull(registry)
            base = "http/%s/v2/app/1" % registry.host
            expected = self.expected(self.image, self.chain(self.image.diff_ids), base)
            expected.update(("%s/%s" % (base, name), one.manifest)
                            for name, one in names.items())
            self.assertEqual(self.split(base)[0], expected)
            self.assertEqual(str(found.digest), index.digest)

    @rows([("app", ":1", "1"), ("app", "", "latest"), ("a/b/c", ":x", "x"),
           ("app", "@{0}", "sha256-{1}"), ("app", ":1@{0}", "sha256-{1}")])
    def test_names_of_places(self, name, reference, place):
        registry = self.registry(tls=True)
        for tag in ("1", "x", "latest"):
            registry.add(name, tag, self.image)
        digest = self.image.digest
        found = self.pull(registry, name + reference.format(digest))
        self.assertEqual(
            os.path.relpath(found.path, os.path.join(self.dest, "https")),
            os.path.join(registry.host, "v2", *name.split("/"),
                         place.format(digest, digest[len("sha256:"):])))

    def test_t38_odd_white_space_stays(self):
        registry = self.filled()
        odd = b" \n" + self.image.manifest.replace(b"\n", b"\r\n\t") + b"\n\n"
        registry.add_manifest("app", "odd", odd, self.image.media_type)
        found = self.pull(registry, "app:odd")
        with open(os.path.join(found.path, "manifest.json"), "rb") as file:
            self.assertEqual(file.read(), odd)
        self.assertEqual(str(found.digest), sha256(odd))

    def test_the_manifest_comes_last(self):
        written, real = [], os.replace
        registry = self.filled()
        for _ in range(2):  # where nothing is, and where the same is
            with mock.patch("os.replace", lambda source, path: (
                    written.append(os.path.basename(path)), real(source, path))):
                self.pull(registry)
            self.assertEqual(written.pop(), "manifest.json")
            self.assertIn("config.json", written)
            self.assertNotIn("manifest.json", written)
            del written[:]

    def test_t12_links_below_the_destination(self):
        registry = self.filled()
        canary = os.path.join(self.root, "canary")
        os.mkdir(canary)
        parts = ["http", registry.host, "v2", "app", "1"]
        for depth in (1, 2, 3, 5):
            with self.subTest(depth=depth):
                remove(self.dest)
                os.makedirs(os.path.join(self.dest, *parts[:depth - 1]))
                os.symlink(canary, os.path.join(self.dest, *parts[:depth]))
                with self.fails(imagec.OutputError, "not a directory"):
                    self.pull(registry)
                self.assertEqual(os.listdir(canary), [])

    def test_the_destination_itself_may_be_a_link(self):
        real = os.path.join(self.root, "real")
        os.mkdir(real)
        os.symlink(real, self.dest)
        self.pull(self.filled())
        self.assertTrue(self.tree(real))

    def test_t126_destinations(self):
        registry = self.filled()
        file = self.file("file")
        dangling = os.path.join(self.root, "dangling")
        os.symlink(os.path.join(self.root, "none"), dangling)
        places = [file, os.path.join(file, "below"), dangling, os.devnull]
        if not ROOT:
            places.append(os.path.join(self.root, "closed"))
            os.mkdir(places[-1], 0o500)
        for place in places:
            with self.subTest(place=os.path.basename(place)):
                with self.fails(imagec.OutputError, "-o") as caught:
                    self.pull(registry, dest=place)
                self.assertEqual(imagec.exit_status(caught.exception), 1)
        self.assertEqual(registry.connections, 0)

    def test_t126_a_read_only_destination(self):
        os.mkdir(self.dest)
        with mock.patch("os.access", lambda path, mode: False):
            with self.fails(imagec.OutputError, self.dest, "no permission"):
                imagec.LayersOutput(self.dest)


class PullTest(PullCase):
    """From a reference to an output."""

    def test_pull_function(self):
        registry = self.filled(auth="bearer", anonymous=False)
        found = imagec.pull(registry.host + "/app:1", self.dest, platform=NET_PLATFORM,
                            username="alice", password=PASSWORD,
                            progress=self.events.append)
        self.assertEqual(str(found.digest), self.image.digest)
        self.assertEqual(self.events[-1].status, "Digest: " + self.image.digest)

    def test_pull_function_takes_values(self):
        registry = self.filled()
        for output in (pathlib.Path(self.dest), pathlib.Path(self.dest + ".tar")):
            imagec.pull(imagec.Reference.parse(registry.host + "/app:1"), output,
                        platform=imagec.Platform.parse(NET_PLATFORM))
            self.assertEqual(faults_of(str(output)), [])

    @rows([({"reference": "UPPER"},), ({"format": "none"},), ({"jobs": 0},),
           ({"platform": "a/b/c/d/e"},), ({"username": "alice"},), ({"output": ""},),
           ({"mirrors": "m.test"},), ({"token_hosts": "t.test"},), ({"timeout": 0},),
           ({"max_layer_size": -1},), ({"timeout": float("nan")},)])
    def test_pull_function_refuses(self, options):
        with self.fails(imagec.UsageError):
            imagec.pull(**dict({"reference": "app", "output": self.dest}, **options))

    @rows(itertools.product((1, 4), (True, False)))
    def test_connections_are_few(self, jobs, tls):
        self.dest = os.path.join(self.root, "%s%d" % (tls, jobs))
        image = build_image([tar_bytes([("f%d" % n, b"x")]) for n in range(10)])
        registry = self.filled(image, tls=tls, auth="bearer")
        registry.fault("/blobs/", delay(0.005), EVER)
        self.pull(registry, jobs=jobs)
        self.assertLessEqual(registry.connections, jobs + 1)
        self.assertEqual(len(paths(registry, "/token")), 1)

    @rows((("layers",), ("oci",), ("archive",)))
    def test_images_overlap(self, format):
        """Answers come in any order, results in that asked for; a shared blob once."""
        shared, registry = tar_bytes([("shared", noise(5000))]), self.filled()
        images = [build_image([shared, tar_bytes([("own", noise(900, n))])])
                  for n in range(5)]
        names = ["%s/lab/%d:1" % (registry.host, n) for n in (3, 1, 0, 2, 4, 0)]
        for number, image in enumerate(images):
            registry.add("lab/%d" % number, "1", image)
            registry.fault("lab/%d/" % number, delay(0.02 * (5 - number)), EVER)
        registry.faults.insert(0, Fault(images[1].layers[1], status(404), EVER, False))
        written = []
        for jobs in 4, 1:
            output = os.path.join(self.root, "%s-%d" % (format, jobs))
            del registry.requests[:]
            before = registry.connections
            with imagec.Session(jobs=jobs, keep_going=True) as session:
                found = session.pull(list(map(imagec.Reference.parse, names)),
                                     imagec.new_output(output, format))
            self.assertEqual([str(one.reference) for one in found],
                             [name for name in names if "/1:" not in name])
            self.assertEqual([name for name, _ in session.failures], [names[1]])
            self.assertEqual(faults_of(output), [])
            self.assertEqual(len(paths(registry, "/blobs/" + images[0].layers[0])), 1)
            self.assertLessEqual(registry.connections - before, jobs + 1)  # and https
            written.append(contents(output) or file_bytes(output))
        self.assertEqual(*written)

    def fetched(self, registry):
        """The layers that were asked for."""
        asked = [path.rpartition("/")[2] for path in paths(registry, "/blobs/")]
        return [digest for digest in asked if digest in self.image.layers]

    def test_rerun_fetches_nothing(self):
        registry = self.filled()
        first, before = self.pull(registry), self.tree()
        del registry.requests[:], self.events[:]
        self.assertEqual(self.pull(registry), first)
        self.assertEqual(self.tree(), before)
        self.assertEqual(self.fetched(registry), [])
        said = [event.status for event in self.events]
        self.assertEqual(said.count("Already exists"), len(self.image.layers))

    def rerun(self, registry, change=lambda records: records):
        """Pull again over a changed unpacked.json: (image, how many were unpacked)."""
        path, = pathlib.Path(self.dest).glob("**/unpacked.json")
        good = path.read_bytes()
        changed = change(json.loads(good.decode("ascii")))
        self.file(str(path.relative_to(self.root)), changed)
        with mock.patch.object(imagec, "unpack",
                               side_effect=imagec.unpack) as verifier:
            image = self.pull(registry)
        self.assertEqual(path.read_bytes(), good)
        return image, verifier.call_count

    def test_rerun_unpacks_nothing(self):
        registry = self.filled()
        first = self.pull(registry)
        self.assertEqual(self.rerun(registry), (first, 0))
        blob = os.path.join(first.path, first.layers[0].id, first.layers[0].id + ".tar")
        with open(blob, "ab") as file:  # what is hashed is still looked at
            file.write(b"x")
        self.assertEqual(self.rerun(registry), (first, 1))

    @able(hasattr(os, "mkfifo"), "make fifos")
    def test_rerun_over_records_of_rubbish(self):
        registry, count = self.filled(), len(self.image.layers)
        first = self.pull(registry)
        top = str(first.layers[-1].digest)
        other = str(first.layers[0].digest)

        def one(**changes):
            return lambda records: dict(records, **{top: dict(records[top], **changes)})

        for name, change, unpacked in (
                ("no JSON", lambda records: b"{", count),
                ("no object", lambda records: [], count),
                ("nothing", lambda records: {}, count),
                ("null", lambda records: {top: None}, count),
                ("no digest", lambda records: {"x": records[top]}, count),
                ("another diffID", one(diff_id=other), 1),
                ("no diffID", one(diff_id=None), count),
                ("a size of text", one(size="1"), count),
                ("a negative size", one(size=-1), count),
                ("no number of bytes", one(bytes=None), count)):
            with self.subTest(name):
                self.assertEqual(self.rerun(registry, change), (first, unpacked))
        path = os.path.join(first.path, "unpacked.json")
        for make in NO_FILES:
            os.unlink(path)
            make(path)
            with threat_alarm(60):
                self.assertEqual(self.pull(registry), first)
            self.assertTrue(stat.S_ISREG(os.lstat(path).st_mode))

    def test_rerun_under_a_lower_limit(self):
        registry = self.filled()
        self.pull(registry)
        with self.fails(imagec.LimitExceeded, "--max-layer-size"):
            self.pull(registry, max_layer_size=10)

    def test_rerun_of_schema1_unpacks(self):
        # Nothing else says what its diffIDs must be, and the image ID hangs on them.
        registry = self.filled(build_image(NET_TARS, "schema1"))
        first = self.pull(registry)
        self.assertEqual(self.rerun(registry), (first, len(NET_TARS)))

    @rows([(1, 2), (4, 4)])
    def test_t107_tokens_that_run_out_in_the_middle(self, jobs, uses):
        self.dest = os.path.join(self.root, str(jobs))
        registry = self.filled(auth="bearer")
        registry.token_uses = uses
        self.pull(registry, jobs=jobs)
        self.assertGreater(len(paths(registry, "/token")), 1)

    @rows([("oci",), ("docker",), ("schema1",)])
    def test_t44_the_same_blob_twice(self, kind):
        self.dest = os.path.join(self.root, kind)
        image = build_image([NET_TARS[0], NET_TARS[1], NET_TARS[0]], kind)
        registry = self.filled(image)
        found = self.pull(registry)
        self.assertEqual([str(layer.digest) for layer in found.layers], image.layers)
        asked = paths(registry, "/blobs/")
        self.assertEqual(len(asked), len(set(asked)))
        self.assertEqual(sum(path.endswith(".tar") for path in self.tree()), 3)
        self.pull(registry)

    def test_t44_two_sizes_for_one_blob(self):
        image = build_image([NET_TARS[0], NET_TARS[0]])
        size = len(image.blobs[image.layers[1]]) + 1
        registry = self.odd(
            lambda document: document["layers"][1].update(size=size), image)
        with self.fails(imagec.ImagecError, "size") as caught:
            self.pull(registry, "app:odd")
        self.assertEqual(imagec.exit_status(caught.exception), 3)
        self.assert_nothing_final(image.layers)

    def test_t26_diff_ids(self):
        good = self.image.diff_ids
        for name, diff_ids, kind in (
                ("wrong", good[:2] + [sha256(b"x")], imagec.DigestMismatch),
                ("swapped", [good[1], good[0], good[2]], imagec.DigestMismatch),
                ("short", good[:2], imagec.VerificationError),
                ("long", good + good[:1], imagec.VerificationError),
                ("none", [], imagec.VerificationError),
                ("absent", None, imagec.ImagecError),
                ("not digests", ["x", "y", "z"], imagec.InvalidDocument)):
            with self.subTest(name):
                shutil.rmtree(self.dest, ignore_errors=True)
                rootfs = {"type": "layers", "diff_ids": diff_ids}
                if diff_ids is None:
                    del rootfs["diff_ids"]
                image = build_image(NET_TARS, rootfs=rootfs)
                with self.fails(kind) as caught:
                    self.pull(self.filled(image))
                self.assertEqual(imagec.exit_status(caught.exception), 3)
                self.assert_nothing_final(image.layers)

    @rows(itertools.product(
        ("sha256:../../../x", "../x", "", "sha256:", "sha256:" + "a" * 63,
         "sha256:" + "a" * 65, "sha256:" + "A" * 64, "md5:" + "a" * 32,
         "sha256:" + "a" * 63 + "\n", "sha256:" + "a" * 62 + "\\x"), (False, True)))
    def test_t01_hostile_digests_are_not_asked_for(self, digest, of_config):
        registry = self.odd(lambda document: (
            document["config"] if of_config else document["layers"][0]
        ).update(digest=digest))
        with self.fails(imagec.ImagecError, "digest"):
            self.pull(registry, "app:odd")
        self.assertEqual(paths(registry, "/blobs/"), [])
        self.assert_nothing_final()

    @rows([("../../../../canary",), ("/etc/cron.d/x",), ("",), ("a" * 63,), ("A" * 64,),
           ("a" * 64 + "\n",)])
    def test_t03_hostile_v1_ids(self, name):
        before = self.tree(self.root)
        with self.fails(imagec.ImagecError, "id"):
            self.pull(self.filled(build_image(NET_TARS[:1], "schema1", id=name)))
        self.assertEqual(self.tree(self.root), before)

    def test_t04_annotations_are_no_paths(self):
        def annotate(document):
            for entry in [document, document["config"]] + document["layers"]:
                entry["annotations"] = {"org.opencontainers.image.title": "../../evil",
                                        "org.opencontainers.image.ref.name": "/evil"}

        self.pull(self.odd(annotate), "app:odd")
        found = [path for path in self.tree(self.root) if "evil" in path]
        self.assertEqual(found, [])

    def test_t21_t25_earlier_layers_stay(self):
        registry, layers = self.filled(), self.image.layers
        registry.fault("/blobs/" + layers[2], flip())
        with self.fails(imagec.DigestMismatch, layers[2]):
            self.pull(registry, jobs=1)
        self.assert_nothing_final(layers[:2])
        kept = sum(path.endswith(".tar") for path in self.tree())
        del registry.requests[:]
        self.pull(registry, jobs=1)
        self.assertEqual(len(self.fetched(registry)), 3 - kept)

    def test_t115_the_first_error_ends_the_rest(self):
        tars = [tar_bytes([("f%d" % n, os.urandom(9000 + n))]) for n in range(5)]
        image = build_image(tars)
        registry = self.filled(image)
        registry.fault("/blobs/" + image.layers[4], [delay(0.1), status(404)])
        for digest in image.layers[1:4]:
            registry.fault("/blobs/" + digest, drip(0.05, 100), EVER)
        with self.fails(imagec.NotFound, image.layers[4]):
            self.pull(registry, jobs=4, idle_timeout=30)
        self.assertLess(registry.sent_blob_bytes, sum(map(len, image.blobs.values())))
        self.assertEqual(imagec_threads(), 0)
        self.assert_nothing_final(image.layers)

    def test_no_matching_platform(self):
        index = build_index([(build_image(NET_TARS), ("linux", "arm64", None)),
                             (build_image(NET_TARS[:1]), ("unknown", "unknown", None))])
        registry = self.filled(index)
        with self.fails(imagec.NoMatchingPlatform, "linux/arm64") as caught:
            self.pull(registry)
        self.assertNotIn("unknown/unknown", str(caught.exception))
        self.assertEqual(len(paths(registry, "/manifests/")), 1)
        self.assertFalse(os.path.exists(self.dest))

    def test_an_artifact_is_no_platform(self):
        """A signature without platform is not what is meant by one that is not there.
        """
        proof = build_artifact([("application/vnd.in-toto+json", b"{}", None)])
        for entries, words in (
                ([(proof, None), (self.image, ("linux", "arm64", None))], "linux/arm64"),
                ([(proof, None)], "--platform all")):
            registry = self.filled(build_index(entries))
            with self.fails(imagec.NoMatchingPlatform, "for platform linux/amd64", words):
                self.pull(registry)
        index = build_index([(proof, ("linux", "amd64", None))])
        with self.fails(imagec.Unsupported, "artifact of type application/vnd.example"):
            self.pull(self.filled(index))  # this one is meant

    def test_t43_a_platform_that_lies_is_told(self):
        image = build_image(NET_TARS, platform=("linux", "arm64", None))
        index = build_index([(image, ("linux", "amd64", None))])
        with self.assertLogs(imagec.log, "WARNING") as logged:
            found = self.pull(self.filled(index))
        self.assertIn("is for linux/arm64", "".join(logged.output))
        self.assertEqual(found.platform.architecture, "arm64")
        del self.said[:]
        build = build_image(NET_TARS, platform=("windows", "amd64", None),
                            **{"os.version": "10.0.17763.1"})
        self.pull(self.filled(build), platform="windows/amd64")
        self.assertEqual(self.said, [])  # any build will do

    def test_t75_foreign_layers_are_not_fetched_from_their_urls(self):
        elsewhere = self.server({})
        registry = self.odd(lambda document: document["layers"][0].update(
            mediaType="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            urls=[elsewhere.url + "/layer"]), NET_OTHER, auth="basic")
        login = dict(username="alice", password=PASSWORD)
        self.pull(registry, "app:odd", **login)  # a registry that has it is asked
        shutil.rmtree(self.dest)
        del registry.blobs[NET_OTHER.layers[0]]
        with self.fails(imagec.NotFound, "foreign layer"):
            self.pull(registry, "app:odd", **login)
        self.assertEqual(elsewhere.connections, 0)

    def test_t81_a_password_is_for_one_registry(self):
        first, second = (self.filled(auth="basic") for _ in range(2))
        with self.session(username="alice", password=PASSWORD) as session:
            for registry, allowed in ((first, True), (second, False)):
                reference = imagec.Reference.parse(registry.host + "/app:1")
                if allowed:
                    session.manifest(reference)
                    continue
                with self.fails(imagec.UsageError, registry.host):
                    session.manifest(reference)
        self.assertEqual(second.connections, 0)


def imagec_threads():
    """How many of an executor's threads are alive."""
    return sum("ThreadPoolExecutor" in one.name for one in threading.enumerate())


class AlongTest(StoredCase):
    """What refers to an image comes along, into a layout or an archive."""

    def setUp(self):
        super().setUp()
        self.amd = build_image(FIELD_SMALL)
        self.arm = build_image(FIELD_SMALL[:1], platform=("linux", "arm64", None))
        self.index = build_index([(self.amd, ("linux", "amd64", None)),
                                  (self.arm, ("linux", "arm64", None))])
        self.ref = self.offer()

    def offer(self, name="lab/app:1", **options):
        """Offer an index that is signed, an SBOM of one image, signed too."""
        self.origin = self.registry(**options)
        self.sbom = referring(self.amd, annotations={"k": "v"})
        self.signed, self.seal = signature(), signature(b"{}2")
        self.proof = referring(self.sbom, "application/x", b"proof")
        for tag, image in (("1", self.index), (None, self.sbom), (None, self.proof),
                           (tag_of(self.index, ".sig"), self.signed),
                           (tag_of(self.sbom, ".sig"), self.seal)):
            self.origin.add("lab/app", tag, image)
        if not self.origin.lists_referrers:
            for one, other in ((self.amd, self.sbom), (self.sbom, self.proof)):
                self.origin.add("lab/app", tag_of(one), build_index([(other, None)]))
        return self.origin.host + "/" + name

    def along(self, out, format="archive", *more):
        """Pull with what refers to it; {tag: entry} of what came along."""
        run = self.main("pull", "--format", format, "-o", self.at(out), "--referrers",
                        "--platform", "linux/amd64", self.ref, *more)
        self.assertEqual(run.status, 0, run.err)
        self.assertEqual(run.out.decode(), self.ref + "@" + self.index.digest + "\n")
        self.assertEqual(self.verify(self.at(out)), "")
        if format == "oci":
            documents = [json.loads(file_text(self.at(out, "index.json")))]
        else:
            documents = [json.loads(data.decode()) for name, data in self.members(
                self.at(out)).items() if name in ("index.json", "referrers.json")]
            self.assertEqual([len(one["manifests"]) for one in documents][:1], [1])
        return run, {entry["annotations"][imagec.TAG_ANNOTATION]: entry
                     for document in documents for entry in document["manifests"]}

    @rows([("oci", True), ("archive", True), ("oci", False), ("archive", False)])
    def test_all_of_it(self, format, listed):
        self.clear()
        self.ref = self.offer(lists_referrers=listed)
        run, entries = self.along("out", format)
        self.assertIn("what refers to that: 4 manifests", run.err)
        self.assertEqual(set(entries), {
            "1", tag_of(self.amd), tag_of(self.sbom), tag_of(self.index, ".sig"),
            tag_of(self.sbom, ".sig")})
        self.assertEqual(entries[tag_of(self.index, ".sig")]["digest"],
                         self.signed.digest)
        shelf = imagec.Shelf(self.at("out"))
        for one in (self.sbom, self.proof, self.signed, self.seal, self.index):
            self.assertEqual(shelf.documents[one.digest][0], one.manifest)
            for digest in one.blobs:
                self.assertTrue(shelf.blob(imagec.Digest.parse(digest)))
        self.along("out", format)  # again
        self.assertEqual({self.blob_gets(digest) for digest in self.amd.layers}, {1})

    def test_an_archive_that_is_what_it_would_be_stays(self):
        self.along("out")
        before = os.stat(self.at("out"))
        self.along("out")
        self.assertEqual(os.stat(self.at("out")).st_ino, before.st_ino)

    @rows([("oci",), ("archive",)])
    def test_what_is_served_is_pulled_with_it(self, format):
        self.clear()
        self.along("first", format)
        for listed in (True, False):  # by its list, then by its tags
            shelf = imagec.Shelf(self.at("first"))
            if not listed:
                shelf.referrers.clear()
            with imagec.serving(imagec.new_server(shelf, ("127.0.0.1", 0))) as server:
                self.main("pull", "-q", "--referrers", "-o", self.at("second.tar"),
                          "127.0.0.1:%d/lab/app:1" % server.server_address[1])
            self.assertEqual(self.verify(self.at("second.tar")), "")
            again = imagec.Shelf(self.at("second.tar"))
            for one in (self.sbom, self.proof, self.seal):
                self.assertIn(one.digest, again.documents)
            os.unlink(self.at("second.tar"))

    def test_nothing_passes_for_an_image(self):
        """Who knows no such notes takes what has a name: it must be docker's, too."""
        self.along("x.tar")
        members = self.members(self.at("x.tar"))
        beside = json.loads(members["referrers.json"].decode())
        image, entry = build_image(FIELD_SMALL[:1]), beside["manifests"][-1]
        for data in [image.manifest] + list(image.blobs.values()):
            members["blobs/sha256/" + sha256(data)[7:]] = data
        entry.update(image.descriptor())
        notes, names = entry["annotations"], "names other images"
        own, tag, subject = map(notes.get, (
            imagec.NAME_ANNOTATION, imagec.TAG_ANNOTATION,
            imagec.ORIGIN_ANNOTATION + "subject"))
        for name, tag, subject, fault in (
                (self.ref, tag, subject, names), (self.ref + "0", tag, subject, names),
                (own, "latest", subject, names), (None, "latest", subject, names),
                (self.ref + "0", "10", "1", "invalid digest"),
                (self.ref + "0", "10", "sha256+b64u:x", "invalid digest"),
                (own, tag, subject, None), (None, None, subject, None)):
            for key, text in ((imagec.NAME_ANNOTATION, name),
                              (imagec.TAG_ANNOTATION, tag),
                              (imagec.ORIGIN_ANNOTATION + "subject", subject)):
                notes.pop(key, None)
                notes.update({key: text} if text else {})
            members["referrers.json"] = json_bytes(beside)
            write_file(self.at("y.tar"), tar_bytes(
                [(path.rstrip("/"), data) for path, data in members.items()]))
            self.assertIn(fault or "", self.verify(self.at("y.tar"), 3 * bool(fault)))

    def test_what_refers_to_itself(self):
        """A blob may be a document, too, and an image go by two names."""
        self.origin.add("lab/app", tag_of(self.index, ".sig"), self.amd)
        self.origin.add("lab/app", tag_of(self.amd), build_index([(self.amd, None)]))
        self.origin.lists_referrers = False
        self.origin.add("lab/app", tag_of(self.index), build_index([(self.index, None)]))
        for format in ("oci", "archive"):
            self.along(format, format)

    def test_each_image_may_have_so_much(self):
        names = [self.ref]
        for tag in "23":
            image = build_image([*FIELD_SMALL, raw_words("n=" + tag)])
            self.origin.add("lab/app", tag, image)
            names.append(self.origin.host + "/lab/app:" + tag)
            for number in range(3):
                self.origin.add("lab/app", None, referring(image, data=tag.encode() * (
                    number + 1)))
        for limit, status in ((6, 0), (3, 3)):
            with mock.patch.object(imagec, "DOCUMENT_COUNT_LIMIT", limit):
                self.pull("--referrers", "--platform", "amd64", "-o",
                          self.at("%d.tar" % limit), *names, expect=status)

    def test_another_name(self):
        run = self.main("pull", "-q", "--referrers", "--tag", "b/c:2", "-o",
                        self.at("x.tar"), self.ref)
        self.assertEqual(run.status, 0, run.err)
        tags = imagec.Shelf(self.at("x.tar")).tags("b/c")
        self.assertLessEqual({"2", tag_of(self.index, ".sig")}, set(tags))

    def test_what_is_listed_but_not_there_is_told(self):
        self.ref = self.offer(lists_referrers=False)
        gone, other = [referring(self.amd, data=data) for data in (b"gone", b"odd")]
        other.media_type = "application/vnd.cncf.oras.artifact.manifest.v1+json"
        self.origin.add("lab/app", tag_of(self.amd), build_index(
            [(self.sbom, None), (other, None), (gone, None)]))
        del self.origin.repositories["lab/app"][gone.digest]
        run, entries = self.along("x.tar")
        for one in (gone, other):
            self.assertRegex(run.err, "left out, for %s lacks it: %s, of type %s" % (
                self.origin.host, one.digest, re.escape(one.media_type)))
        self.assertEqual(len(entries), 5)

    def test_no_end_of_it(self):
        one = self.amd
        for number in range(12):
            one = referring(one, data=b"%d" % number)
            self.origin.add("lab/app", None, one)
        for name, limit in (("DOCUMENT_COUNT_LIMIT", 9),
                            ("DOCUMENT_BYTES_LIMIT", 9000)):
            with mock.patch.object(imagec, name, limit):
                run = self.main("pull", "-q", "--referrers", "-o", self.at("x.tar"),
                                "--platform", "amd64", self.ref)
            self.assert_one_line(run, 3, "too much refers to|one name leads to more")
        self.assertEqual(os.listdir(self.work), [])

    @rows([("of another size",), ("no manifest",)])
    def test_a_registry_that_lies(self, name):
        entry = self.sbom.descriptor()
        if name == "of another size":
            entry["size"] += 1
        else:
            self.origin.add_manifest("lab/app", None, b"[]", self.sbom.media_type,
                                     self.sbom.digest)
        self.origin.fault("/referrers/", body(json_bytes(
            {"schemaVersion": 2, "manifests": [entry]})), EVER)
        run = self.main("pull", "-q", "--referrers", "-o", self.at("x.tar"), self.ref)
        self.assert_one_line(run, 3, "expected")


class PlatformsTest(StoredCase):
    """Several platforms of an image, and none else."""

    PLATFORMS = ("linux/amd64", "linux/arm/v7", "linux/arm64")

    def setUp(self):
        super().setUp()
        self.images = [build_image([FIELD_SMALL[0], tar_bytes([("a", b"%d" % n)])],
                                   platform=tuple(name.split("/") + [None])[:3])
                       for n, name in enumerate(self.PLATFORMS)]
        inner = build_index([(self.images[0], ("linux", "amd64", None))])
        self.index = build_index([(inner, None),
                                  (self.images[1], ("linux", "arm", "v7")),
                                  (self.images[2], ("linux", "arm64", "v8"))])
        self.origin.add("lab/app", "1", self.index)
        self.ref = self.origin.host + "/lab/app:1"

    def of(self, path, *platforms, format=None, also=()):
        """Pull for some platforms, and verify that; what is told."""
        words = [word for name in platforms for word in ("--platform", name)]
        run = self.main("pull", self.ref, *also, "--progress", "none", "-o",
                        self.at(path), "--format", format or "archive", *words)
        self.assertEqual(run.status, 0, run.err)
        self.assertEqual(self.verify(self.at(path)), "")
        return run

    def test_a_layout_of_two(self):
        run = self.of("out", *self.PLATFORMS[::2], format="oci")
        self.assertEqual(run.out.decode(), self.ref + "@" + self.index.digest + "\n")
        entry, = json.loads(file_text(self.at("out", "index.json")))["manifests"]
        made = json.loads(file_text(self.at(
            "out", "blobs", *entry["digest"].split(":"))))
        self.assertEqual([(one["digest"], one["platform"].get("variant"))
                          for one in made["manifests"]],
                         [(self.images[0].digest, None), (self.images[2].digest, "v8")])
        self.assertEqual(made["annotations"],
                         {imagec.ORIGIN_ANNOTATION + "digest": self.index.digest})
        shelf = imagec.Shelf(self.at("out"))
        self.assertIn(self.index.digest, shelf.documents)
        self.assertNotIn(self.images[1].digest, shelf.documents)
        again = self.of("out", *self.PLATFORMS[::2], format="oci")
        self.assertEqual(again.out, run.out)
        self.assertEqual({self.blob_gets(name) for name in self.images[0].layers}, {1})

    @rows([((1, 2), 1), ((2, 0), 0), ((0, 1), 0)])
    def test_an_archive_of_two(self, wanted, named):
        self.clear()
        with mock.patch.object(imagec.Platform, "host", return_value=(
                imagec.Platform.parse("linux/amd64"))):
            run = self.of("x.tar", *[self.PLATFORMS[number] for number in wanted])
        images = json.loads(self.members(self.at("x.tar"))["manifest.json"].decode())
        self.assertEqual({image["Config"].rpartition("/")[2]: image["RepoTags"]
                          for image in images},
                         {sha256(self.images[number].config)[7:]:
                          [self.ref] if number == named else None for number in wanted})
        self.assertRegex(run.err, "is the one for %s; the one for .* sha256:" % (
            self.PLATFORMS[named]))
        self.assertEqual(run.out.decode().count(self.ref + "@" + self.index.digest), 2)

    def test_one_by_two_words(self):
        for path in ("out", "x.tar"):
            self.of(path, "arm64", "linux/arm64/v8", format="oci" if path == "out" else
                    "archive")
            entry, = imagec.stored(imagec.open_place(self.at(path)))
            self.assertEqual(str(entry.digest), self.images[2].digest)
            self.assertEqual(entry.name, self.ref)

    @rows([("all", "oci"), ("linux/arm64 amd64", "oci"), ("arm64 amd64", "archive")])
    def test_one_platform_is_taken_as_it_is(self, platforms, format):
        self.clear()
        reference, image = self.serve(FIELD_SMALL, "lab/one:1")
        run = self.of("out", *platforms.split(), format=format, also=[reference])
        self.assertIn(reference + "@" + image.digest, run.out.decode())
        self.assertNotIn("warning", run.err)
        self.assertTrue([one for one in imagec.stored(imagec.open_place(self.at("out")))
                         if str(one.digest) == image.digest])

    def test_all_with_what_is_no_manifest(self):
        data = b"<xml/>"
        self.index = build_index([(self.images[0], ("linux", "amd64", None))],
                                 extra_entries=[_descriptor("application/xml", data)])
        self.index.blobs = {sha256(data): data}
        self.origin.add("lab/app", "1", self.index)
        self.pull("--platform", "all", "--format", "oci", "-o", self.at("one"), self.ref)
        shelf = imagec.Shelf(self.at("one"))
        with imagec.serving(imagec.new_server(shelf, ("127.0.0.1", 0))) as server:
            self.pull("--platform", "all", "--format", "oci", "-o", self.at("two"),
                      "127.0.0.1:%d/lab/app:1" % server.server_address[1])
        self.assertIn("not checked", self.verify(self.at("two")))
        del self.origin.blobs[sha256(data)]
        run = self.main("pull", "--platform", "all", "--format", "oci", "-o",
                        self.at("three"), self.ref)
        self.assertRegex(run.err, "left out, for %s lacks it: %s, of type applic" % (
            self.origin.host, sha256(data)))

    def test_one_that_is_not_there(self):
        for out in ("x.tar", "out"):
            run = self.main("pull", "-q", "-o", self.at(out), "--format",
                            "oci" if out == "out" else "archive", "--platform", "amd64",
                            "--platform", "s390x", self.ref)
            self.assert_one_line(run, 4, "linux/s390x; there is: linux/arm/v7, ")

    def test_by_the_library(self):
        image = imagec.pull(self.ref, self.at("out"), "oci",
                            ["linux/amd64", imagec.Platform.parse("arm64")])
        self.assertEqual(image.platform, "linux/amd64,linux/arm64")
        self.assertEqual(str(image.digest), self.index.digest)


class DryRunTest(FieldCase):
    """pull --dry-run, and the look at the disk before a pull."""

    def setUp(self):
        super().setUp()
        self.image = build_image(FIELD_SMALL)
        self.origin = self.filled(self.image)
        self.ref = self.origin.host + "/lab/app:1"
        self.sizes = [len(self.image.blobs[digest]) for digest in self.image.layers]

    def plan(self, *argv, format="layers", name="out", ref=None,
             platform="linux/amd64"):
        """The lines of a plan, which must succeed and write nothing."""
        path = self.at(name)
        before = field_files(self.root), os.path.exists(path)
        run = self.main("pull", "--dry-run", "--platform", platform, "--format", format,
                        "-o", path, ref or self.ref, *argv)
        self.assertEqual((run.status, run.err), (0, ""))
        self.assertEqual((field_files(self.root), os.path.exists(path)), before)
        return run.out.splitlines()

    @rows(OUTPUTS)
    def test_output(self, format, name):
        self.assertEqual(self.plan(format=format, name="new/" + name), [
            "%s@%s" % (self.ref, self.image.digest)] + [
            "%s %d bytes, 0 there, the rest from %s" % (digest, size, self.origin.host)
            for digest, size in zip(self.image.layers, self.sizes)] + [
            "to fetch: %d bytes; already there: 0" % sum(self.sizes)])
        self.assertFalse(os.path.exists(self.at("new")))
        names = {p.rpartition("/")[2] for p in paths(self.origin, "/blobs/")}
        self.assertEqual(names, {sha256(self.image.config)})

    def test_json(self):
        line, = self.plan(self.ref, "--json")
        self.assertEqual(json.loads(line), {
            "images": ["%s@%s" % (self.ref, self.image.digest)] * 2,
            "blobs": [{"digest": digest, "size": size, "present": 0,
                       "from": self.origin.host}
                      for digest, size in zip(self.image.layers, self.sizes)],
            "to_fetch": sum(self.sizes), "present": 0})

    @rows(OUTPUTS[:2])
    def test_what_is_there(self, format, name):
        self.pull(self.origin.host, to=name, format=format)
        lines = self.plan(format=format, name=name)
        self.assertEqual([line.split()[1] for line in lines[1:-1]],
                         [line.split()[3] for line in lines[1:-1]])
        self.assertEqual(
            lines[-1], "to fetch: 0 bytes; already there: %d" % sum(self.sizes))

    @rows(OUTPUTS)
    def test_what_is_half_there(self, format, name):
        fault = self.origin.fault("/blobs/" + self.image.layers[1], truncate(20), 5)
        with self.fails(imagec.TransportError):
            self.pull(self.origin.host, to=name, format=format, jobs=1)
        self.assertEqual(fault.used, 5)
        line = self.plan(format=format, name=name)[-1]
        numbers = [int(n) for n in re.findall("[0-9]+", line)]
        self.assertEqual(sum(numbers), sum(self.sizes))
        self.assertGreaterEqual(numbers[1], 20)

    def test_layers_that_an_unfinished_archive_has(self):
        large = build_image([tar_bytes([("f%d" % n, noise(9000 - 500 * n, n))])
                             for n in range(2)])
        origin = self.filled(large)
        host = origin.host
        fault = origin.fault("/blobs/" + large.layers[1], status(404), EVER)
        with self.fails(imagec.NotFound):
            self.pull(host, to="a.tar", jobs=1)
        fault.times = fault.used
        lines = self.plan(format="archive", name="a.tar", ref=host + "/lab/app:1")
        self.assertEqual(lines[-1], "to fetch: %d bytes; already there: %d" % tuple(
            len(large.blobs[digest]) for digest in large.layers[::-1]))

    def test_mirror_is_named(self):
        mirror = self.filled(self.image)
        lines = self.plan("--mirror", mirror.host)
        self.assertIn("from " + mirror.host, lines[1])
        self.assertEqual(self.origin.requests, [])

    def test_several_images_share_layers(self):
        other = build_image(FIELD_SMALL[:1] + (tar_bytes([("x", b"y")]),))
        self.origin.add("lab/other", "1", other)
        lines = self.plan(self.origin.host + "/lab/other:1", format="archive",
                          name="a.tar")
        self.assertEqual(len([li for li in lines if " bytes, " in li]), 3)
        self.assertEqual(len([li for li in lines if "@sha256:" in li]), 2)

    def test_all_platforms(self):
        index = build_index([(self.image, ("linux", "amd64", None)), (
            build_image(FIELD_SMALL[:1], platform=("linux", "arm64", None)),
            ("linux", "arm64", None))])
        ref = self.filled(index).host + "/lab/app:1"
        lines = self.plan(format="oci", ref=ref, platform="all")
        self.assertEqual(lines[0], "%s@%s" % (ref, index.digest))

    @rows((("--platform", "all", 2), ("--recompress", "gzip", 2),
           ("--platform", "linux/none", 4)))
    def test_refuses_what_a_pull_would_refuse(self, option, value, code):
        index = build_index([(self.image, ("linux", "amd64", None))])
        ref = self.filled(index).host + "/lab/app:1"
        for more in ((), ("--dry-run",)):
            run = self.main("pull", ref, "-o", self.at(), option, value, *more)
            self.assertEqual(run.status, code)

    # -- the disk

    def disk(self, free):
        return mock.patch("shutil.disk_usage", return_value=mock.Mock(free=free))

    @rows(OUTPUTS)
    def test_full_disk_is_told_before_the_first_byte(self, format, name):
        needed = sum(self.sizes)
        with self.disk(needed - 1):
            with self.fails(imagec.OutputError, str(needed), self.at(name)):
                self.pull(self.origin.host, to=name, format=format)
        for digest in self.image.layers:
            self.assertEqual(paths(self.origin, digest), [])
        self.assertEqual(os.listdir(self.root), ["work"])

    def test_enough_is_enough_and_what_is_there_needs_none(self):
        for free in (sum(self.sizes), 0):
            with self.disk(free):
                self.pull(self.origin.host)

    def test_the_disk_asked_about_is_the_outputs(self):
        with self.disk(1 << 40) as asked:
            self.pull(self.origin.host, to="new/er/out")
        self.assertEqual({call[0] for call in asked.call_args_list}, {(self.root,)})


class SignedCase(StoredCase):
    """A registry with an index of two platforms, and signatures beside it."""

    def setUp(self):
        super().setUp()
        self.image = build_image(FIELD_SMALL)
        self.index = build_index([
            (self.image, ("linux", "amd64", None)),
            (build_image(FIELD_SMALL[:1], platform=("linux", "arm64", None)),
             ("linux", "arm64", None))])
        self.origin.add("lab/app", "1", self.index)
        self.reference = self.origin.host + "/lab/app:1"
        self.other_digest = "?"
        self.key = self.file("k.pub", TEST_PUBLIC)
        self.other = self.file("other.pub", OTHER_PUBLIC)

    def sign(self, image, digest=None, registry=None, **options):
        """Puts what cosign 2 would put beside an image: its manifest's digest."""
        return self.put(image, registry, *(simple(simple_payload(
            digest or image.digest, **options.pop("payload", {})), **options),))

    def put(self, image, registry, *signatures):
        made = signature_image(*signatures)
        (registry or self.origin).add("lab/app", image.digest.replace(
            ":", "-") + ".sig", made)
        return made

    def unsign(self, image):
        self.origin.repositories["lab/app"].pop(
            image.digest.replace(":", "-") + ".sig", None)

    def sign_by_bundle(self, image, **options):
        """Puts what cosign 3 would, where a registry has no referrers API."""
        layer, raw = bundle(dsse(IN_TOTO, statement(image.digest), **options))
        made = build_artifact([(layer.media_type, raw, None)], layer.media_type,
                              subject=image.descriptor())
        other = build_artifact([("application/spdx+json", b"{}", None)],
                               "application/spdx+json", subject=image.descriptor())
        for one in (made, other):
            self.origin.add("lab/app", None, one)
        self.other_digest = other.digest  # nobody has to ask for this
        return made

    def run_it(self, command, *argv, expect=0, **environ):
        self.origin.requests.clear()
        run = self.main(command, *argv, "--platform", "linux/amd64", **environ)
        self.assertEqual(run.status, expect, run.err)
        return run


def signature_image(*signatures):
    """cosign's manifest of (layer, blob)s, as a BuiltImage."""
    config = json_bytes({"architecture": "", "os": "", "config": {}, "rootfs": {
        "type": "layers", "diff_ids": [str(layer.digest) for layer, _ in signatures]}})
    return build_artifact([(layer.media_type, raw, layer.annotations)
                           for layer, raw in signatures], None, config,
                          MEDIA_TYPES["oci"]["config"])


class SignedPullTest(SignedCase):
    """What nobody of the right keys has signed is not taken."""

    #: (what is signed, how)
    GOOD = (
        ("index", lambda case: case.sign(case.index)),
        ("image", lambda case: case.sign(case.image)),
        ("index", lambda case: case.sign_by_bundle(case.index)),
        ("image", lambda case: case.sign_by_bundle(case.image)),
        ("image", lambda case: case.put(case.image, None, *[  # the last of many
            simple(simple_payload(SUM_B, "x/" + "a" * count)) for count in range(1, 9)],
            simple(simple_payload(case.image.digest)))),
        ("image", lambda case: [case.sign(case.index, secret=2), case.sign(case.image)]),
    )

    @rows(GOOD)
    def test_taken(self, what, sign):
        self.origin.repositories.clear()
        self.origin.add("lab/app", "1", self.index)
        sign(self)
        for format, path in OUTPUTS:
            remove(self.at(path))
            run = self.run_it("pull", "--verify-key", self.other, "--verify-key",
                              self.key, "--format", format, "-o", self.at(path),
                              self.reference)
            self.assertIn("%s: signed by %s: %s\n" % (
                self.reference, self.key, getattr(self, what).digest), run.err)
            self.assertEqual([one for one in self.origin.requests
                              if self.other_digest in one.path], [])

    #: (words, how it is signed)
    BAD = (
        ("found none", lambda case: None),
        ("found 1 by none of the keys", lambda case: case.sign(case.index, secret=2)),
        ("found 1 by none of the keys", lambda case: case.sign_by_bundle(
            case.index, secret=2)),
        ("but of " + SUM_B, lambda case: case.sign(case.index, SUM_B)),
        ("found 2 by none of the keys; 1 by ", lambda case: case.put(
            case.index, None, *[simple(simple_payload(SUM_A), secret=secret)
                                for secret in (2, 3, TEST_SECRET)])),
        ("blob: expected 2", lambda case: case.origin.blobs.update({
            case.sign(case.index).layers[0]: b"{}"})),
        ("found 1 of which the registry has no bytes", lambda case: case.origin.blobs.pop(
            case.sign(case.index).layers[0])),
        # what is signed as schema1 is, in a layer of a type; what is schema1
        ("found none", lambda case: case.put(case.image, None, of_type(
            imagec.DOCKER_SCHEMA1_SIGNED, libtrust(
                TEST_SECRET, payload=case.image.manifest)))),
        ("found none", lambda case: case.origin.add("lab/app", tag_of(
            case.index, ".sig"), build_image(FIELD_SMALL, "schema1-signed"))),
        # an image besides: it would be kept
        ("found none", lambda case: case.put(
            case.index, None, simple(simple_payload(case.index.digest)),
            of_type(imagec.OCI_LAYER, EMPTY_LAYER))),
        # what another image is signed by, under this one's tag
        ("but of " + SUM_C, lambda case: case.put(
            case.index, None, simple(simple_payload(SUM_C)))),
        # no more are looked at than that
        ("found 64 by none", lambda case: case.put(case.image, None, *[
            simple(simple_payload(SUM_B, "x/" + "a" * count), secret=2)
            for count in range(1, 65)], simple(simple_payload(case.image.digest)))),
    )

    @rows(BAD)
    def test_refused(self, words, sign):
        self.origin.repositories.clear()
        self.origin.blobs.clear()
        self.origin.add("lab/app", "1", self.index)
        sign(self)
        for format, path in OUTPUTS:
            run = self.run_it("pull", "--verify-key", self.key, "--format", format, "-o",
                              self.at(path), self.reference, expect=3)
            self.assert_one_line(run, 3, re.escape(
                "%s: expected a signature by %s, found " % (self.reference, self.key)))
            self.assertIn(words, run.err)
        self.assertEqual(os.listdir(self.work), [])
        for digest in self.image.layers:
            self.assertEqual(self.blob_gets(digest), 0)

    def test_no_list_of_signatures_is_followed_for_ever(self):
        entries = [dict(self.image.descriptor(artifactType=imagec.SIGSTORE_BUNDLE),
                        digest="sha256:%064d" % number) for number in range(100)]
        self.origin.add("lab/app", tag_of(self.image), build_index(
            [], extra_entries=entries))
        self.run_it("digest", "--verify-key", self.key, self.reference, expect=3)
        asked = [one for one in self.origin.requests if "sha256:000" in one.path]
        self.assertEqual(len(asked), imagec.SIGNATURE_COUNT_LIMIT)

    def test_every_command_asks(self):
        """The rule of the host, what gets around it, and who is not bound."""
        rule = {"IMAGEC_VERIFY_KEY": os.pathsep.join([self.other, self.key])}
        for command, *options in (
                ("pull", "-o", self.at("x.tar")), ("pull", "--dry-run", "-o", self.at("y")),
                ("inspect",), ("inspect", "--raw"), ("inspect", "--config"),
                ("layers",), ("digest",), ("ls",)):
            with self.subTest(command, options=options):
                argv = options + [self.reference]
                self.unsign(self.index)
                for given in ((), ("--verify-key", self.key)):
                    run = self.run_it(command, *given, *argv, expect=3, **rule)
                    self.assert_one_line(run, 3, "found none")
                run = self.run_it(command, "--no-verify-key", *argv, **rule)
                self.assertIn("warning: --no-verify-key", run.err)
                self.sign(self.index)
                self.run_it(command, *argv, **rule)
                self.run_it(command, "--verify-key", self.other, *argv, expect=3, **rule)
        for argv in (("tags", self.origin.host + "/lab/app"), ("selftest",)):
            run = self.main(*argv, **rule)
            self.assertEqual(run.status, 0, run.err)
        with mock.patch.dict(os.environ, rule), self.fails(
                imagec.VerificationError, "by none of the keys"):
            imagec.pull(self.reference, self.at("b.tar"), platform="linux/amd64",
                        verify_keys=[self.other])
        with mock.patch.dict(os.environ, rule):
            with self.fails(imagec.UsageError, "'' cannot be read"):
                imagec.pull(self.reference, self.at("a.tar"), verify_keys="")
            for keys in ((), None, [pathlib.Path(self.key)], pathlib.Path(self.key),
                         self.key):
                imagec.pull(self.reference, self.at("a.tar"), platform="linux/amd64",
                            verify_keys=keys)

    def test_a_rule_that_cannot_be_read_is_none_at_all(self):
        bad = self.file("bad.pub", TEST_KEY)
        for value, words in (
                ("", "'' cannot be read: No such file"),
                (self.key + os.pathsep, "'' cannot be read"),
                (self.at("none"), "none' cannot be read: No such file"),
                (self.work, "Is a directory"), (bad, "got PRIVATE KEY")):
            for argv in ((), ("--verify-key", self.key, "--verify-key", value.rpartition(
                    os.pathsep)[2])):
                run = self.main("digest", *argv, self.reference, IMAGEC_VERIFY_KEY=value)
                self.assert_one_line(run, 2, re.escape(words))
        self.assert_one_line(self.main("digest", "--verify-name", "x/y", self.reference),
                             2, "but no key; add --verify-key")
        self.assertEqual(self.origin.requests, [])

    def test_by_name(self):
        name = self.origin.host + "/lab/app"
        argv = ("--verify-key", self.key, "--verify-name", name, self.reference)
        self.sign(self.index, payload={"name": name + ":1"})
        self.run_it("digest", *argv)
        self.sign(self.index, payload={"name": name + "le"})
        self.assert_one_line(self.run_it("digest", *argv, expect=3), 3,
                             "but as %sle$" % name)
        self.put(self.index, None)
        self.sign_by_bundle(self.index)
        self.assert_one_line(self.run_it("digest", *argv, expect=3), 3,
                             "but it names no image$")

    def test_what_is_asked_is_what_is_signed(self):
        """`digest` and `inspect --raw` tell of the index: the image's is not its."""
        self.sign(self.image)
        for command in (["digest"], ["inspect", "--raw"]):
            run = self.main(*command, "--verify-key", self.key, self.reference)
            self.assert_one_line(run, 3, "found none")
        told = self.run_it("inspect", "--verify-key", self.key, self.reference)
        self.assertEqual(json.loads(told.out.decode("ascii"))["signed_by"], [
            {"key": self.key, "digest": self.image.digest}])

    def test_mirrors(self):
        """The home is asked, too, where a mirror has no signature that will do."""
        mirror = self.registry()
        mirror.add("lab/app", "1", self.index)
        argv = ("pull", "-o", self.at("out.tar"), "--mirror", mirror.host,
                "--verify-key", self.key, self.reference)
        self.run_it(*argv, expect=3)
        self.sign(self.index)
        for sign in (lambda: None, lambda: self.sign(self.index, SUM_B, mirror),
                     lambda: self.sign(self.index, registry=mirror, secret=2)):
            sign()
            self.run_it(*argv)
            self.assertEqual(self.blob_gets(self.image.layers[0]), 0)  # not left
        self.sign(self.index, registry=mirror)
        self.run_it(*argv)
        self.assertEqual(self.blob_gets(), 0)

    def test_schema1(self):
        """Its own signatures count, if the key is known."""
        for kind, words in (("schema1", "found none"), ("schema1-signed", "found 1 by "
                                                        "none of the keys")):
            image = build_image(FIELD_SMALL, kind)
            self.origin.add("lab/old", "1", image)
            run = self.run_it("digest", "--verify-key", self.key,
                              self.origin.host + "/lab/old:1", expect=3)
            self.assertIn(words, run.err)
        body = libtrust(TEST_SECRET, payload=json_bytes(json.loads(
            build_image(FIELD_SMALL, "schema1").manifest.decode("ascii")), 3))
        self.origin.add("lab/old", "1", image)
        self.origin.add_manifest("lab/old", "1", body, image.media_type, image.digest)
        run = self.run_it("pull", "--verify-key", self.key, "-o", self.at("out.tar"),
                          self.origin.host + "/lab/old:1")
        self.assertIn("signed by " + self.key, run.err)

    def test_kept(self):
        """Signatures that did come along to oci and archive, and no others."""
        self.put(self.index, None, simple(simple_payload(self.index.digest)),
                 simple(simple_payload(SUM_B), secret=2))
        made = self.sign_by_bundle(self.image)
        self.put(self.image, None, simple(simple_payload(SUM_C)))
        for name, platform in itertools.product(("out", "out.tar"), (
                ["linux/amd64"], ["linux/amd64", "linux/arm64"], ["all"])):
            with self.subTest(name, platform=platform):
                remove(self.at(name))
                if name == "out.tar" and platform == ["all"]:
                    continue
                argv = [part for one in platform for part in ("--platform", one)]
                run = self.main("pull", "-q", "--verify-key", self.key, *argv, "-o",
                                self.at(name), *["--format", "oci"] * (name == "out"),
                                self.reference)
                self.assertEqual(run.status, 0, run.err)
                self.verify(self.at(name))
                for key, status in ((self.key, 0), (self.other, 3)):
                    run = self.main("verify", "--verify-key", key, self.at(name))
                    self.assertEqual(run.status, status, run.err)
                held = contents(self.at(name)) if name == "out" else self.members(
                    self.at(name))
                kept = simple(simple_payload(self.index.digest))[1]
                self.assertIn("blobs/sha256/" + sha256(kept)[7:], held)
                self.assertEqual(made.layers[0][7:] in "".join(held),
                                 platform != ["all"])
                self.assertNotIn("blobs/sha256/" + sha256(simple(simple_payload(
                    SUM_C))[1])[7:], held)


# --------------------------------------------------------------------------------------
# 16  Verify
# --------------------------------------------------------------------------------------

ZEROS = "sha256:" + "0" * 64


def damage_at(at):
    """Flip a bit of the byte at `at`."""
    def damage(path):
        data = bytearray(file_bytes(path))
        data[at] ^= 1
        write_file(path, data)
    return damage


damage_flip = damage_at(-1)


def damage_cut(path):
    os.truncate(path, os.path.getsize(path) // 2)


def damage_json(change):
    """Edit a JSON file by a function that changes its value in place."""
    def damage(path):
        value = json.loads(file_bytes(path).decode())
        change(value)
        write_file(path, json.dumps(value).encode())
    return damage


def damage_write(data):
    return lambda path: write_file(path, data)


def damage_more(data):
    return lambda path: write_file(path, file_bytes(path) + data)


def damage_link(path):
    """The file itself, but behind a link."""
    os.rename(path, path + "~")
    os.symlink(os.path.basename(path) + "~", path)


def beside(path, other):
    return os.path.join(os.path.dirname(path), other)


def damage_swap(path, other):
    """Exchange two files; `other` is relative to the folder of the first."""
    other = beside(path, other)
    first, second = file_bytes(path), file_bytes(other)
    write_file(path, second)
    write_file(other, first)


def damage_type(path):
    """A directory where something else was."""
    os.unlink(path)
    os.mkdir(path)


damage_os = damage_json(lambda value: value.update(os="plan9"))
damage_index = damage_json(lambda value: value["manifests"].clear())
damage_digest = damage_json(lambda value: value["manifests"][0].update(digest=ZEROS))


def damage_origin(**fields):
    return damage_json(lambda value: value["manifests"][0]["annotations"].update(
        origin_of(**fields)))


def damage_way(path):
    """The way down is by an index that does not lead to the image."""
    digest = sha256(b'{"schemaVersion": 2, "manifests": []}')
    write_file(beside(path, AUDIT_BLOBS + digest[7:]),
               b'{"schemaVersion": 2, "manifests": []}')
    damage_origin(digest=digest, indexes=digest)(path)


damage_order = damage_json(lambda value: value["layers"].reverse())


#: What, how, where. {b0} is the hex digest of layer 0, {i0} its id, {m} and {c} those
#: of manifest and config; the fault must name the last component of the path.
AUDIT_LAYERS = (
    ("flipped", damage_flip, "{i1}/{i1}.tar"),
    ("flipped at the start", damage_at(0), "{i1}/{i1}.tar"),
    ("cut", damage_cut, "{i0}/{i0}.tar"),
    ("empty", damage_write(b""), "{i0}/{i0}.tar"),
    ("longer", damage_more(b"\0"), "{i0}/{i0}.tar"),
    ("gone", os.unlink, "{i0}/{i0}.tar"),
    ("a link", damage_link, "{i0}/{i0}.tar"),
    ("swapped", "../{i1}/{i1}.tar", "{i0}/{i0}.tar"),
    ("wrong diffIDs", damage_json(lambda value: [
        one.update(diff_id=ZEROS) for one in value.values()]), "unpacked.json"),
    ("wrong sizes", damage_json(lambda value: [
        one.update(size=1) for one in value.values()]), "unpacked.json"),
    ("no JSON", damage_write(b"{"), "unpacked.json"),
    ("flipped", damage_flip, "{i1}/{i1}.json"),
    ("gone", os.unlink, "{i1}/{i1}.json"),
    ("swapped", "../{i1}/{i1}.json", "{i0}/{i0}.json"),
    ("renamed", lambda path: os.rename(path, path + "x"), "{i0}"),
    ("flipped", damage_flip, "config.json"),
    ("cut", damage_cut, "config.json"),
    ("edited", damage_os, "config.json"),
    ("gone", os.unlink, "config.json"),
    ("emptied", damage_index, "index.json"),
    ("leads elsewhere", damage_digest, "index.json"),
    ("no JSON", damage_write(b"{"), "index.json"),
    ("no JSON", damage_write(b"{"), "manifest.json"),
    ("layers swapped", damage_order, "manifest.json"),
    ("a layer less", damage_json(lambda value: value["layers"].pop()), "manifest.json"),
    ("a space more", damage_more(b"\n"), "manifest.json"),
    ("is a manifest", lambda path: shutil.copy(beside(path, "manifest.json"), path),
     "index.json"),
    ("is an index", lambda path: os.rename(beside(path, "index.json"), path),
     "manifest.json"),
)
AUDIT_BLOBS = "blobs/sha256/"
AUDIT_OCI = (
    ("flipped", damage_flip, AUDIT_BLOBS + "{b0}"),
    ("cut", damage_cut, AUDIT_BLOBS + "{b0}"),
    ("longer", damage_more(b"\0"), AUDIT_BLOBS + "{b1}"),
    ("gone", os.unlink, AUDIT_BLOBS + "{b1}"),
    ("a link", damage_link, AUDIT_BLOBS + "{b1}"),
    ("swapped", "{b1}", AUDIT_BLOBS + "{b0}"),
    ("flipped", damage_flip, AUDIT_BLOBS + "{c}"),
    ("gone", os.unlink, AUDIT_BLOBS + "{c}"),
    ("edited", damage_os, AUDIT_BLOBS + "{c}"),
    ("flipped", damage_flip, AUDIT_BLOBS + "{m}"),
    ("gone", os.unlink, AUDIT_BLOBS + "{m}"),
    ("layers swapped", damage_order, AUDIT_BLOBS + "{m}"),
    ("gone", os.unlink, "index.json"),
    ("a link", damage_link, "index.json"), ("a link", damage_link, "oci-layout"),
    ("a directory", damage_type, "oci-layout"),
    ("cut", damage_cut, "index.json"),
    ("no object", damage_write(b"[]"), "index.json"),
    ("leads elsewhere", damage_digest, "index.json"),
    ("wrong size", damage_json(
        lambda value: value["manifests"][0].update(size=7)), "index.json"),
    ("no JSON", damage_write(b"{"), "oci-layout"),
    ("no version", damage_write(b"{}"), "oci-layout"),
    ("a link", damage_link, "blobs"),
    ("flipped", damage_flip, AUDIT_BLOBS + "{x}"),
    ("gone", os.unlink, AUDIT_BLOBS + "{x}"),
    ("lists none", damage_write(b'{"schemaVersion": 2, "manifests": []}'),
     AUDIT_BLOBS + "{x}"),
    ("no digest", damage_origin(digest="x"), "index.json"),
    ("no way down", damage_origin(indexes="x"), "index.json"),
    ("another way down", damage_origin(digest=ZEROS), "index.json"),
    ("way down to nowhere", damage_way, "index.json"),
) + tuple(("other digest", damage_json(  # T014
    lambda value, digest=digest: value["manifests"][0].update(digest=digest)),
    "index.json") for digest in (
        "sha512:" + "0" * 128, "sha512:" + "0" * 64, "md5:" + "0" * 32,
        "sha256:../../x", ZEROS.upper(), "", "sha256:\ud800", None))
#: What no image needs: of an archive a fault, of a directory it is told.
AUDIT_EXTRA = tuple(("extra", damage_write(b"extra"), where) for where in (
    AUDIT_BLOBS + "f" * 64, AUDIT_BLOBS + "x.partial", "blobs/stray", "stray"))
AUDIT_ARCHIVE = tuple(row for row in AUDIT_OCI if row[1] not in (
    damage_link, damage_type)) + AUDIT_EXTRA + (
    ("emptied", damage_index, "index.json"),
    ("no names", damage_write(b"[]"), "repositories"),
    ("another name", damage_json(lambda value: value.update(x={"1": "0" * 64})),
     "repositories"),
    ("a layer less", damage_json(lambda value: value[0]["Layers"].pop()),
     "manifest.json"),
    ("layers swapped", damage_json(lambda value: value[0]["Layers"].reverse()),
     "manifest.json"),
    ("config is a layer", damage_json(
        lambda value: value[0].update(Config=value[0]["Layers"][0])), "manifest.json"),
    ("leads out", damage_json(
        lambda value: value[0].update(Config="/etc/passwd")), "manifest.json"),
    ("leads up", damage_json(
        lambda value: value[0].update(Layers=["../x", "../y"])), "manifest.json"),
    ("no list", damage_write(b"{}"), "manifest.json"),
    ("no JSON", damage_write(b"["), "manifest.json"),
    ("wrong types", damage_write(b'[{"Config": [], "Layers": [[], 5]}]'),
     "manifest.json"),
)

class AuditTest(StoredCase):
    """verify: what a pull wrote is good; what became of it since is told."""

    def setUp(self):
        super().setUp()
        self.image = build_image([raw_words("etc/ etc/a=11 empty/ l->etc h=>etc/a"),
                                  raw_words("etc/b=2222 etc/a=33 n=>etc/a")])
        index = self.offer(self.image)
        self.reference = self.origin.host + "/lab/app:1"
        self.folder = self.at("layers", "http", self.origin.host, "v2", "lab/app/1")
        one, two = self.image.diff_ids
        self.words = dict(
            b0=self.image.layers[0][7:], b1=self.image.layers[1][7:],
            m=self.image.digest[7:], c=sha256(self.image.config)[7:],
            x=index.digest[7:],
            i0=one[7:], i1=sha256(("%s %s" % (one, two)).encode())[7:])

    def offer(self, image, tag="1", kind="oci"):
        """Let an index lead to an image."""
        index = build_index([(image, ("linux", "amd64", None))], kind)
        self.origin.add("lab/app", tag, index)
        return index

    def good(self, format, name=None, reference=None):
        """The path of what is pulled in a format, by the name of that: it is good."""
        path = self.at(name or format)
        self.pull("--platform", "linux/amd64", "--format", format, "-o", path,
                  reference or self.reference)
        run = self.main("verify", path)
        self.assertEqual((run.status, run.err), (0, ""))
        self.assertRegex(run.out, b"images: 1, blobs or files: [1-9]")
        return path

    def rewritten(self, path, name, data):
        """Write an archive's bytes again, others for those of a member."""
        member, good = self.member(path, name), file_bytes(path)
        end = member.offset_data + -(-member.size // 512) * 512
        write_file(path, good[:member.offset] + data + good[end:])

    @staticmethod
    def member(path, name):
        with tarfile.open(path) as tar:
            return tar.getmember(name)

    def faults(self, path, word, gone=False):
        """Verify what is damaged, or `gone`; nothing but the faults may be said."""
        run = self.main("verify", path)
        self.assertEqual(run.status, 1 if gone else 3, run.err)
        self.assertNotIn("Traceback", run.err)
        self.assertEqual(run.out, b"")
        *lines, last = run.err.splitlines()
        self.assertRegex(last, "incomplete: files missing.*: [1-3]; pull again" if gone
                         else r"faults: \d+$")
        self.assertIn(word, "\n".join(lines))

    def damaged(self, folder, table, check):
        """Check a copy of `folder` for each row, damaged: check(copy, word, gone)."""
        for what, damage, where in table:
            copy, where = os.path.join(self.root, "copy"), where.format(**self.words)
            path = os.path.join(copy, where)
            with self.subTest(what, where=where):
                remove(copy)
                shutil.copytree(folder, copy, symlinks=True)
                if isinstance(damage, str):
                    damage_swap(path, damage.format(**self.words))
                else:
                    damage(path)
                # An index that leads to nothing makes the manifest extra, or missing.
                word = os.path.basename(where)
                check(copy, "" if word == "index.json" else word,
                      what in ("gone", "renamed"))

    def test_layers(self):
        self.good("layers")
        # What is wrong with an index is told of what it should lead to.
        self.damaged(self.folder, AUDIT_LAYERS, lambda copy, word, gone: self.faults(
            copy, word or "manifest.json", gone))

    @rows((("oci",), ("archive",)))
    def test_diff_ids_that_the_pull_did_not_look_at(self, format):
        # Layers kept packed are not unpacked: this is for `verify` to find out.
        one, two = raw_words("a=1"), raw_words("b=2")
        image = build_image([one, two], rootfs={
            "type": "layers", "diff_ids": [sha256(one), ZEROS]})
        self.offer(image)
        path = self.at(format)
        self.pull("--platform", "linux/amd64", "--format", format, "-o", path,
                  self.reference)
        self.faults(path, "%s: layer %s unpacked (diffID): expected digest %s, got %s" % (
            image.layers[1][7:], image.layers[1], ZEROS, sha256(two)))

    def test_index_of_an_earlier_image_is_gone(self):
        self.good("layers")
        self.assertIn("index.json", os.listdir(self.folder))
        self.origin.add("lab/app", "1", self.image)
        self.good("layers")
        self.assertNotIn("index.json", os.listdir(self.folder))

    @rows(itertools.product(("oci", "docker"), IMAGE_FORMATS))
    def test_image_without_layers(self, kind, format):
        self.offer(build_image([], kind), kind=kind)
        name = "%s-%s" % (kind, format)
        if format != "rootfs":
            path = self.good(format, name)
            if format == "archive":  # so docker writes it
                self.rewritten(path, "manifest.json", raw_member(
                    b"manifest.json", self.members(path)["manifest.json"].replace(
                        b'"Layers":[]', b'"Layers":null')))
                self.assertEqual(self.verify(path), "")
            return
        for path in (self.at(name), self.at(name + ".tar")):
            self.pull("--format", format, "-o", path, self.reference)
            self.assertEqual(faults_of(path), [])

    def test_what_two_trees_share_is_checked_in_both(self):
        self.offer(self.image, "2")
        root = self.good("layers")
        self.pull("-o", root, self.reference[:-1] + "2")
        for tag in "12":
            place, = glob.glob(os.path.join(os.path.dirname(self.folder), tag,
                                            self.words["i0"], "*.tar"))
            damage_flip(place)
            self.faults(root, "app/%s/%s" % (tag, self.words["i0"]))
            damage_flip(place)

    #: (format, end of what may not be opened or listed, what is told)
    UNREADABLE = (
        ("archive", "place.tar", "content"),
        ("oci", "oci-layout", "oci-layout"), ("oci", "index.json", "index.json"),
        ("oci", "{m}", "{m}"), ("oci", "{b0}", "{b0}"), ("oci", "{c}", "{c}"),
        ("oci", "blobs", " blobs;"), ("oci", "blobs/sha256", " blobs/sha256;"),
        ("layers", "/manifest.json", "manifest.json"),
        ("layers", "/config.json", "config.json"), ("layers", "/{i0}.tar", "{i0}.tar"),
        ("layers", "/{i1}.json", "{i1}.json"), ("layers", "/v2/lab", "/v2/lab"),
        ("layers", "place.tar", "[.];"), ("layers", "{i0}/{i0}.tar", "{i0}.tar;"),
    )

    @rows(UNREADABLE)
    def test_what_may_not_be_read_is_not_called_good(self, format, end, word):
        path, end = self.at(format + "-place.tar"), end.format(**self.words)
        if not os.path.exists(path):
            self.good(format, os.path.basename(path))

        def refusing(function):
            def refuse(place, *arguments, **options):
                if os.fspath(place).endswith(end):
                    raise PermissionError(errno.EACCES, "Permission denied", place)
                return function(place, *arguments, **options)
            return refuse

        with mock.patch.object(imagec, "open", refusing(open), create=True), \
                mock.patch.object(os, "scandir", refusing(os.scandir)):
            told = self.verify(path, 1)
        self.assertRegex(told, "%s: no permission to read it\n" % re.sub(
            "[;]$", "", word.format(**self.words)))

    def test_directory_that_goes_away_or_cannot_be_read(self):
        path = self.good("oci")
        for code, told in ((errno.ENOENT, " .: missing"), (errno.EIO, "output error")):
            with mock.patch.object(os, "scandir", side_effect=OSError(
                    code, os.strerror(code), path)):
                self.assertIn(told, self.verify(path, 1))

    @rows(itertools.product(("sha256", "sha512"), ("index.json", "manifest.json")))
    def test_layers_by_digest(self, algorithm, name):
        root = self.good("layers", algorithm + name)
        folder = self.folder.replace("/layers/", "/%s%s/" % (algorithm, name))
        digest = hashlib.new(algorithm, file_bytes(os.path.join(folder, name)))
        good, bad = (beside(folder, algorithm + "-" + text) for text in (
            digest.hexdigest(), "0" * 2 * digest.digest_size))
        if name == "manifest.json":
            os.unlink(os.path.join(folder, "index.json"))
        os.rename(folder, good)
        self.verify(root)
        os.rename(good, bad)
        self.faults(root, "%s:%s" % (algorithm, digest.hexdigest()))

    def test_oci(self):
        self.damaged(self.good("oci"), AUDIT_OCI, self.faults)

    def told(self, path, count, *names):
        """Verify what holds something beside its images: good, but for that."""
        run = self.main("verify", path)
        self.assertEqual(run.status, 0, run.err)
        self.assertTrue(run.out.endswith(b"; not looked at: %d\n" % count), run.out)
        self.assertRegex(run.err, r"\Aimagec: warning: [^\n]+\n\Z")
        for name in names:
            self.assertIn(name, run.err)

    def test_what_no_image_of_a_directory_needs(self):
        root = self.good("oci")
        self.damaged(root, AUDIT_EXTRA, lambda copy, word, _: self.told(copy, 1, word))
        for name in ("one", "two"):
            write_file(os.path.join(root, name), b"extra")
        os.symlink("/", os.path.join(root, "blobs", "root"))
        self.told(root, 3, "blobs/root and 2 more")

    def test_pull_that_failed_leaves_a_good_layout(self):
        root = self.good("oci")
        other = build_image([raw_words("x=1"), raw_words("y=2")])
        self.origin.add("lab/app", "2", other)
        self.origin.fault(other.layers[1], flip(), times=None)
        self.pull("--format", "oci", "-o", root, self.reference[:-1] + "2", "-j", "1",
                  expect=3)
        self.told(root, 1, other.layers[0][7:])

    def test_trees_beside_what_is_none(self):
        root = self.good("layers")
        others = os.path.join(os.path.dirname(self.folder), "2")
        shutil.copytree(self.folder, others)
        os.unlink(os.path.join(others, "manifest.json"))  # as after a kill
        write_file(os.path.join(root, "README"), b"hello")
        write_file(os.path.join(self.folder, "more"), b"hello")
        # two layers with their JSON, config.json, index.json, unpacked.json
        self.told(root, 9, "README and 8 more")

    def test_archive(self):
        path, folder = self.good("archive"), os.path.join(self.root, "unpacked")
        with tarfile.open(path) as tar:
            names = tar.getnames()
            tar.extractall(folder, **{"filter": "data"} if hasattr(
                tarfile, "data_filter") else {})
        self.repack(folder, names, path)
        self.verify(path)

        def check(copy, word, gone):
            self.repack(copy, names, path)
            self.faults(path, word, gone)

        self.damaged(folder, AUDIT_ARCHIVE, check)

    @staticmethod
    def repack(folder, names, path):
        """A tar of the folder, in the order of `names`, then what is new in it."""
        found = [os.path.relpath(os.path.join(where, name), folder)
                 for where, _, files in os.walk(folder) for name in files]
        found.sort(key=lambda name: names.index(name) if name in names else len(names))
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name in found:
                tar.add(os.path.join(folder, name), name)

    def test_bytes_of_an_archive(self):
        path = self.good("archive")
        good = file_bytes(path)
        blob = self.member(path, AUDIT_BLOBS + self.words["b0"])
        for what, at in (("header", blob.offset + 10), ("checksum", blob.offset + 150),
                         ("data", blob.offset_data), ("first", 0)):
            with self.subTest(what):
                damage_at(at)(path)
                self.faults(path, "archive")
                write_file(path, good)
        for size in (0, 1, 511, 512, 1000, 1536, len(good) // 2, len(good) - 1500):
            with self.subTest(size=size):
                write_file(path, good[:size])
                self.faults(path, "archive", size in (1000, 1536))

    #: (what, members put before an archive's end, words of the fault)
    MEMBERS = (
        ("another name of one", raw_member(b"./index.json", b"{}"), "./index.json"),
        ("another by pax", raw_member(b"x", b"{}", pax=((b"path", b"./index.json"),)),
         "./index.json"),
        ("one's name", raw_member(b"index.json"), "index.json: stands 2 times"),
        ("one's name by pax", raw_member(b"x", b"{}", pax=((b"path", b"index.json"),)),
         "index.json: stands 2 times"),
        ("a folder twice", raw_member(b"blobs/", kind=b"5"), "blobs/: stands 2 times"),
        ("a folder without its slash", raw_member(b"blobs", kind=b"5"), "blobs/"),
        ("the folder of all", raw_member(b"./", kind=b"5"), "./: extra"),
        ("another folder", raw_member(b"x/", kind=b"5"), "x/: extra"),
        ("a file like a folder", raw_member(b"index.json/"), "index.json/"),
        ("a link", raw_member(b"x", kind=b"2", link=b"index.json"), "x: extra"),
        ("a link of one's name", raw_member(b"index.json", kind=b"2", link=b"x"),
         "index.json"),
        ("a device", raw_member(b"null", kind=b"3"), "null: extra"),
        ("a pipe", raw_member(b"pipe", kind=b"6"), "pipe: extra"),
        ("of no known kind", raw_member(b"z", kind=b"Z"), "z: extra"),
        ("not UTF-8", raw_member(b"\xff\x1b"), "xff"),
    )

    def test_members_that_are_not_of_an_archive(self):
        path = self.good("archive")
        good = file_bytes(path)[:-1024]
        for what, members, words in self.MEMBERS:
            with self.subTest(what):
                write_file(path, good + members + bytes(1024))
                self.faults(path, words)
        for rest in (raw_member(b"x"), bytes(512) + b"x"):
            write_file(path, good + bytes(1024) + rest)
            self.faults(path, "behind the end")
        write_file(path, good + bytes(10240))
        self.verify(path)

    def test_headers_of_an_archive_take_no_time(self):
        path = self.good("archive")
        header = raw_member(b"h", pax_records((b"comment", b"7" * 160000)), kind=b"x")
        write_file(path, file_bytes(path)[:-1024] + raw_layer(
            header, raw_member(b"x")))
        with cpu_within(2), threat_alarm(60):
            self.faults(path, "x: extra")

    def test_T011_members_that_are_no_files_of_an_archive(self):
        path, name = self.good("archive"), AUDIT_BLOBS + self.words["b0"]
        good, data = file_bytes(path), self.members(path)[name]
        outside = os.fsencode(write_file(self.at("blob"), data))
        for member in (raw_member(name.encode(), kind=b"1", link=outside),
                       raw_member(name.encode(), kind=b"2", link=outside),
                       pax_sparse([(0, data)], len(data), name.encode())):
            self.rewritten(path, name, member)
            self.faults(path, name + " is not a regular file")
            write_file(path, good)

    def test_names_that_docker_gives_to_other_images(self):
        path = self.at("both.tar")
        self.offer(self.image, "one")
        self.offer(build_image([raw_words("x=1")]), "two")
        self.pull("--platform", "linux/amd64", "--format", "archive", "-o", path,
                  *[self.reference[:-1] + tag for tag in ("one", "two")])
        self.verify(path)
        data = re.sub(b"one|two", lambda tag: {b"one": b"two"}.get(
            tag.group(), b"one"), self.members(path)["manifest.json"])
        self.rewritten(path, "manifest.json", raw_member(b"manifest.json", data))
        self.faults(path, "manifest.json")

    #: What others have written, in docker's own form. (how, links?)
    @rows((("docker", False), ("docker", True), ("skopeo", True)))
    def test_archives_without_manifests(self, style, links):
        path = self.at("%s%d.tar" % (style, links))
        tars = [raw_words("a=1"), raw_words("b=2"), raw_words("a=1")]
        images = [build_image(tars, compress=None), build_image(tars[:2], compress=None)]
        good = docker_archive(images, style, links)
        digests = []
        for _ in range(2):
            write_file(path, good)
            told = self.verify(path)
            self.assertRegex(told, r"\A[^\n]*has no manifests[^\n]*\n\Z")
            shelf = imagec.Shelf(path)
            self.assertEqual(shelf.catalog(), ["docker.io/lab/app", "lab/app"])
            digests.append(shelf.tags("lab/app"))
        self.assertEqual(*digests)
        for number, image in enumerate(images):
            raw, media_type = shelf.documents[digests[0][str(number)]]
            made = imagec.decode_manifest(raw, media_type)
            self.assertEqual(str(made.config.digest), sha256(image.config))
            for layer in made.layers:
                self.assertEqual(layer.media_type, MEDIA_TYPES["oci"]["layer"])
                self.assertEqual(b"".join(shelf.blob(layer.digest).pieces()),
                                 image.blobs[str(layer.digest)])

    def test_archive_as_docker_has_saved_it_since_25(self):
        # One of ours in the shape of moby's: names are short, v1 configs lie about.
        path, image = self.at("x.tar"), build_image([raw_words("a=1")], compress=None)
        self.offer(image)
        self.pull("--platform", "linux/amd64", "-o", path, self.reference, "--tag",
                  "docker.io/library/app:1")
        members, v1 = self.members(path), b'{"created": "1970-01-01T00:00:00Z"}'
        for name, data in members.items():
            if name in ("manifest.json", "repositories"):
                data = data.replace(b"docker.io/library/", b"")
            if name == "repositories":
                data = json_bytes({"app": {"1": image.layers[0][7:]}})
            members[name] = raw_member(name.encode(), data) if data else raw_member(
                name.encode() + b"/", kind=b"5")
        write_file(path, b"".join(members.values()) + raw_member(
            b"blobs/sha256/" + sha256(v1)[7:].encode(), v1) + bytes(1024))
        self.told(path, 1, sha256(v1)[7:])

    def test_what_is_wrong_with_archives_without_manifests(self):
        image = build_image([raw_words("a=1"), raw_words("b=2")], compress=None)
        path, other = self.at("x.tar"), build_image([raw_words("a=1")])
        good = docker_archive([image], "skopeo", True)[:-1024]
        layer, config = (digest[7:].encode() for digest in (
            image.layers[1], sha256(image.config)))
        legacy = b"0" * 64

        def listing(*entries):
            return raw_member(b"manifest.json", json_bytes([dict({
                "Config": config.decode() + ".json", "RepoTags": None,
                "Layers": [one[7:] + ".tar" for one in image.layers]}, **entry)
                for entry in entries]))

        def made(*members):
            return b"".join([raw_member(config + b".json", image.config)] + [
                raw_member(one[7:].encode() + b".tar", image.blobs[one])
                for one in image.layers] + list(members))

        for data, words in (
                (good, None),
                (good + raw_member(legacy + b"/json", b"{}"), None),
                (good + raw_member(legacy + b"/more", b"{}"), "extra"),
                (good + raw_member(layer + b".tar"), "stands 2 times"),
                (good + raw_member(config + b".json", b"{}"), "stands 2 times"),
                (made(listing({})), None),
                (made(listing({}, {})), "manifest.json has it twice"),
                (made(listing({"Layers": []})), "lists 2 diffIDs"),
                (made(listing({"Layers": [5, []]})), "missing"),
                (made(listing({"Config": "../x"})), "missing"),
                (made(listing({"Layers": ["l", layer.decode() + ".tar"]}), raw_member(
                    b"l", kind=b"2", link=b"/etc/passwd")), "not a regular file"),
                (made(listing({"Config": "c/l"}), raw_member(
                    b"c/l", kind=b"2", link=b"../c/m"), raw_member(
                        b"c/m", kind=b"2", link=b"../" + config + b".json")),
                 "not a regular file"),
                # One config is parsed once, by whatever names.
                (made(listing({}, {"Config": "c/l"}), raw_member(
                    b"c/l", kind=b"2", link=b"../" + config + b".json")),
                 "manifest.json has it twice"),
                # Of a hard link the target is no path from where it stands.
                (made(listing({"Config": "c/l"}), raw_member(
                    b"c/l", kind=b"1", link=b"../" + config + b".json")),
                 "not a regular file"),
                # Others follow it to "c/x", whatever that is.
                (made(listing({"Config": "c/l"}), raw_member(
                    b"c/l", kind=b"2", link=b"x"), raw_member(b"x", image.config)),
                 "not a regular file"),
                (made(listing({"Layers": ["l", layer.decode() + ".tar"]}), raw_member(
                    b"l", image.blobs[image.layers[1]])), "expected digest"),
                (raw_member(b"manifest.json", b"{}"), "must be a JSON array"),
                (docker_archive([other], "skopeo", False)[:-1024], "compressed")):
            with self.subTest(words):
                write_file(path, data + bytes(1024))
                status = {None: 0, "missing": 1, "compressed": 1}.get(words, 3)
                self.assertIn(words or "", self.verify(path, status))

    @rows((("oci", "docker"), ("layers", "schema1-signed"), ("oci", "schema1-signed"),
           ("archive", "schema1-signed"), ("layers", "schema1"), ("archive", "plain")))
    def test_other_images(self, format, kind):
        options = {"compress": None} if kind == "plain" else {"kind": kind}
        layers = ARCHIVE_TARS[:1] + [None] + ARCHIVE_TARS[:1]
        reference, _ = self.serve(layers, **options)
        self.good(format, format + kind, reference)

    def test_what_is_nothing_of_ours(self):
        damage_index(os.path.join(self.good("oci", "emptied"), "index.json"))
        os.mkdir(self.at("empty"))
        write_file(self.at("text"), b"hello")
        write_file(self.at("other.tar"), tar_bytes([("text", b"hello")]))
        for name in ("root", "root.tar", "like a layout"):
            self.pull("--format", "rootfs", "-o", self.at(name), self.reference)
        for name in ("oci-layout", "index.json"):
            shutil.copy(self.at("emptied", name), self.at("like a layout"))
        hint = "; what can be read is a layers tree, an OCI layout or an archive"
        for name, status, words in (
                ("", 1, "''"), ("absent", 1, "not there"), ("text", 3, "content"),
                ("/dev/null", 1, "neither a file nor a directory"),
                ("other.tar", 1, "no image"), ("root.tar", 1, "no image"),
                ("root", 1, "no image"), ("empty", 1, "no image"),
                ("emptied", 1, "no image"), ("like a layout", 1, "no image")):
            with self.subTest(name):
                run = self.main("verify", name and self.at(name))
                self.assertEqual((run.status, run.out), (status, b""))
                self.assertRegex(run.err, r"\A(imagec: [^\n]*\n){1,2}\Z")
                self.assertIn(name, run.err)
                self.assertIn(words, run.err)
                self.assertEqual(hint in run.err, words.startswith("no "))

    def test_nested_indexes_take_no_time(self):
        root = self.good("oci")
        top = os.path.join(root, "index.json")
        descriptor, = json.loads(file_bytes(top).decode())["manifests"]
        for _ in range(imagec.INDEX_DEPTH_LIMIT):
            raw = json_bytes({"schemaVersion": 2, "manifests": [descriptor] * 6})
            blob = write_file(os.path.join(root, AUDIT_BLOBS, sha256(raw)[7:]), raw)
            descriptor = _descriptor(MEDIA_TYPES["oci"]["index"], raw)
        os.rename(blob, top)
        with cpu_within(2), threat_alarm(60):
            self.verify(root)
            shelf = imagec.Shelf(root)
        self.assertTrue(serve_raw_of(shelf, "oci", self.image.digest))
        with mock.patch.object(imagec, "DOCUMENT_COUNT_LIMIT", 5):
            self.faults(root, "one name leads to more than 5")
            self.assertTrue(imagec.Shelf(root).repositories)

    def test_blob_of_many_sizes_or_types_is_hashed_once(self):
        root, data = self.good("oci"), b"<xml/>"
        document = json.loads(self.image.manifest.decode())
        entries = [_descriptor("a/%d" % n, data) for n in range(9)]
        size, document["layers"] = document["layers"][0]["size"], document["layers"][:1]
        for more in range(40):
            document["layers"][0]["size"] = size + more
            raw = json_bytes(document)
            write_file(os.path.join(root, AUDIT_BLOBS, sha256(raw)[7:]), raw)
            entries.append(_descriptor(self.image.media_type, raw))
        write_file(os.path.join(root, "index.json"), json_bytes(
            {"schemaVersion": 2, "manifests": entries}))
        paths = [write_file(os.path.join(root, AUDIT_BLOBS, sha256(data)[7:]), data),
                 os.path.join(root, AUDIT_BLOBS, self.words["b0"])]
        with mock.patch.object(imagec, "open", wraps=open, create=True) as opened:
            audit = imagec.Audit().check(root)
        self.assertEqual(sorted(call[0][0] for call in opened.call_args_list
                                if call[0][0] in paths), sorted(paths))
        self.assertEqual(len([f for f in audit.faults if "expected" in f]), 39)
        self.assertEqual(len(audit.unchecked), 9)

    @able(hasattr(os, "mkfifo"), "make fifos")
    def test_only_regular_files_are_read(self):
        table = [("oci", name) for name in ("oci-layout", "index.json")]
        table += [("oci", AUDIT_BLOBS + self.words[word]) for word in ("m", "c", "b0")]
        tree = os.path.relpath(self.folder, self.at("layers"))
        table += [("layers", os.path.join(tree, name)) for name in (
            "manifest.json", "config.json", "index.json", "unpacked.json",
            "{i0}/{i0}.tar".format(**self.words))]
        places = {format: self.good(format) for format in ("oci", "layers")}
        for (format, name), make in itertools.product(table, NO_FILES):
            path = os.path.join(places[format], name)
            os.rename(path, path + "~")
            make(path)
            with self.subTest(name), threat_alarm(60):
                self.faults(places[format], "not a regular file")
                if not name.endswith("unpacked.json"):
                    with self.assertLogs("imagec", "WARNING") as told, (
                            contextlib.suppress(imagec.OutputError)):
                        imagec.Shelf(places[format])
                    self.assertIn("not a regular file", told.output[0])
            os.unlink(path)
            os.rename(path + "~", path)

    def test_deep_directories(self):
        root = self.good("layers")
        self.addCleanup(subprocess.check_call, ["rm", "-rf", os.path.join(root, "d")])
        where = os.open(root, os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("d", dir_fd=where)
            below = os.open("d", os.O_RDONLY, dir_fd=where)
            os.close(where)
            where = below
        os.close(os.open("x", os.O_CREAT, dir_fd=where))
        os.close(where)
        self.told(root, 1, "/d/x")
        self.assertTrue(imagec.Shelf(root).repositories)

    @rows((("oci",), ("layers",), ("archive",)))
    def test_work_goes_on_only_while_it_may(self, format):
        path = self.good(format)
        for look in (lambda check: imagec.Audit(check).check(path),
                     lambda check: imagec.Shelf(path, check=check)):
            for count in itertools.count():
                calls = iter([None] * count + [imagec.Timeout("not done")])
                try:
                    look(mock.Mock(side_effect=calls))
                except imagec.Timeout:
                    continue
                break
            self.assertGreater(count, 2)

    def test_unpacking_asks_whether_to_go_on(self):
        # T51: a few kilobytes of zeros are unpacked for minutes
        self.offer(build_image([tar_header(8 << 20) + bytes((8 << 20) + 1024)],
                               compress=bz2.compress))
        asked = mock.Mock()
        imagec.Audit(asked).check(self.good("oci"))
        self.assertGreater(asked.call_count, (8 << 20) // imagec.CHUNK)

    @rows(itertools.product(("oci", "layers", "archive"), ("verify", "serve")))
    def test_the_command_has_a_deadline(self, format, command):
        run = self.main(command, self.good(format), "--timeout", "0.000001")
        self.assertEqual((run.status, run.out), (1, b""), run.err)
        self.assertRegex(run.err, r"\Aimagec: not done within [^\n]+\n\Z")

    #: (platforms of which the image is here, whether our pull has noted that, status)
    PARTS = (((0, 1), False, 0), ((1,), False, 0), ((), False, 1), ((1,), True, 1))

    @rows(PARTS)
    def test_parts_of_an_index(self, here, noted, status):
        # As `ctr images export`, `regctl image copy --platforms` and `skopeo copy
        # --multi-arch index-only` leave them.
        images = [self.image, build_image([raw_words("x=1")])]
        index = build_index([(image, None) for image in images])
        root = self.at("%s%d" % ("".join(map(str, here)), noted))
        for digest, data in [(index.digest, index.manifest)] + [
                pair for n in here for pair in [(images[n].digest, images[n].manifest),
                                                *images[n].blobs.items()]]:
            write_file(os.path.join(root, AUDIT_BLOBS, digest[7:]), data)
        write_file(os.path.join(root, "oci-layout"), LAYOUT)
        write_file(os.path.join(root, "index.json"), json_bytes({
            "schemaVersion": 2, "manifests": [index.descriptor(annotations=origin_of(
                digest=index.digest, platforms="all") if noted else {})]}))
        told = self.verify(root, status)
        self.assertEqual("is incomplete" in told, status == 1)
        for n in {0, 1}.difference(here):
            self.assertIn(images[n].digest[7:] + ": missing", told)

    @rows((("layers",), ("oci",), ("archive",)))
    def test_diff_ids_in_another_algorithm(self, format):
        tars = [raw_words("a=1"), raw_words("b=2")]
        self.offer(build_image(tars, rootfs={"type": "layers", "diff_ids": [
            "sha512:" + hashlib.sha512(tar).hexdigest() for tar in tars]}))
        self.good(format)

    def test_limits_are_those_of_a_pull_no_more(self):
        path, name = self.good("archive"), "manifest.json"
        self.rewritten(path, name, raw_member(name.encode(), self.members(path)[
            name] + b" " * imagec.DOCUMENT_LIMIT))
        what, _, *others = imagec.unpack.__defaults__
        with mock.patch.object(imagec.unpack, "__defaults__", (what, 1, *others)):
            self.verify(path)

    @needs_zstd
    def test_window_that_is_not_looked_through(self):
        reference, _ = self.serve(ARCHIVE_TARS[:1], "lab/z:1", compress=lambda tar: (
            subprocess.run(["zstd", "-qc", "--long=28"], input=tar, check=True,
                           stdout=subprocess.PIPE).stdout))
        self.pull("--format", "oci", "-o", self.at("out"), reference)
        self.assertRegex(self.verify(self.at("out")), "not checked: .*more memory")

    @needs_zstd
    def test_codec_this_host_has_not(self):
        reference, _ = self.serve(ARCHIVE_TARS[:1], "lab/z:1", compress=zstd_bytes)
        path = self.good("oci", reference=reference)
        with mock.patch.dict(sys.modules, compression=None), \
                mock.patch.dict(os.environ, PATH=""):
            self.assertIn("not checked", self.verify(path))


class SignedVerifyTest(SignedCase):
    """verify --verify-key: what was carried is proved again, offline."""

    def setUp(self):
        super().setUp()
        self.sign(self.index)

    def pull_signed(self, name="out", platform="linux/amd64"):
        return self.pull("--verify-key", self.key, "--platform", platform, "-o",
                         self.at(name), *["--format", "oci"] * (name == "out"),
                         self.reference)

    def proved(self, name="out", expect=0, words="", *argv):
        run = self.main("verify", "--verify-key", self.key, *argv, self.at(name))
        self.assertEqual(run.status, expect, run.err)
        self.assertIn(words, run.err)
        return run

    def changed(self, change):
        """Has change(index.json as a dict) done to a layout that was pulled."""
        path = self.at("out", "index.json")
        index = json.loads(file_text(path))
        write_file(path, json.dumps(change(index) or index))

    def add_blobs(self, image):
        for data in [image.manifest, *image.blobs.values()]:
            write_file(self.at("out", "blobs", "sha256", sha256(data)[7:]), data)
        return image

    def evil(self, **members):
        """An image that nobody has signed, in the layout; its entry in index.json."""
        image = build_image([tar_bytes([("evil", b"")])])
        image.manifest = json_bytes(dict(json.loads(
            image.manifest.decode("ascii")), **members))
        image.digest = sha256(image.manifest)
        return self.add_blobs(image).descriptor()

    def test_good(self):
        for name in ("out", "out.tar"):
            self.pull_signed(name)
            run = self.proved(name, 0, "%s: signed by %s: %s\n" % (
                self.reference, self.key, self.index.digest))
            self.assertIn("not asked who signed what refers to others here: 1", run.err)
            self.assertIn("by none of the keys", self.main(
                "verify", "--verify-key", self.other, self.at(name)).err)

    def test_another_command_leaves_it_to_verify(self):
        self.pull_signed("out.tar")
        self.assert_one_line(self.main(
            "inspect", "-q", "--verify-key", self.key, self.at("out.tar")), 2,
            "verify PATH --verify-key")

    def test_not_kept(self):
        self.pull("--platform", "linux/amd64", "-o", self.at("out.tar"), self.reference)
        self.proved("out.tar", 3, "found none")
        self.pull("--verify-key", self.key, "--platform", "linux/amd64", "-o",
                  self.at("images"), self.reference)
        self.proved("images", 3, "found none")

    @needs_zstd
    def test_rewritten(self):
        reference, image = self.serve(FIELD_SMALL, "lab/app:z", compress=zstd_bytes)
        self.sign(image)
        self.pull("--verify-key", self.key, "--platform", "linux/amd64", "--recompress",
                  "gzip", "-o", self.at("out.tar"), reference)
        self.proved("out.tar", 1, "was rewritten: it cannot be proved")
        self.assertNotIn("blobs/sha256/" + sha256(simple(simple_payload(image.digest))[
            1])[7:], self.members(self.at("out.tar")))

    def test_another_in_its_place(self):
        for change in (
                # in its name
                lambda index, entry: index["manifests"][0].update(entry, annotations={
                    name: text for name, text in index["manifests"][0][
                        "annotations"].items() if "imagec" not in name}),
                # beside it: named, by its tag only, not at all
                *(lambda index, entry, notes=notes: index["manifests"].append(dict(
                    entry, annotations=notes)) for notes in (
                        {imagec.NAME_ANNOTATION: self.reference + "x"},
                        {imagec.TAG_ANNOTATION: "1"}, {},
                        {imagec.NAME_ANNOTATION: "x/y:" + self.index.digest.replace(
                            ":", "-") + ".sig", imagec.TAG_ANNOTATION: "1"},
                        {imagec.TAG_ANNOTATION: self.index.digest.replace(
                            ":", "-") + ".sig"}))):
            for members in ({}, {"subject": self.index.descriptor()},
                            {"artifactType": "x/y", "subject": self.index.descriptor()}):
                remove(self.at("out"))
                self.pull_signed()
                entry = self.evil(**members)
                self.changed(lambda index: change(index, entry))
                self.assertEqual(faults_of(self.at("out")), [])
                self.proved("out", 3, "found none")

    def test_what_refers_to_nothing_here_or_is_not_read(self):
        self.pull_signed()
        self.proved()
        before = file_bytes(self.at("out", "index.json"))
        for one, words in [(BuiltImage(b'{"mediaType": "application/x"}', "x/y"),
                            "%s: there is no manifest")] + [
                (build_artifact([("text/plain", b"x", None)], **members),
                 "%s: expected a signature by") for members in (
                     {}, {"subject": NET_OTHER.descriptor()})]:
            self.add_blobs(one)
            self.changed(lambda index: index["manifests"].append(one.descriptor()))
            self.proved("out", 3, words % one.digest)
            write_file(self.at("out", "index.json"), before)

    def test_an_index_that_does_not_lead_to_it(self):
        self.pull_signed()
        entry = self.evil()
        self.changed(lambda index: index["manifests"][0].update(entry))
        self.proved("out", 3, "does not lead to")

    def test_an_index_that_claims_to_be_made_here(self):
        """That is asked who signed what it lists: nothing, or what nobody did."""
        self.unsign(self.index)
        self.sign(self.image)
        for entries in ([], [self.image.descriptor()], [{}]):
            remove(self.at("out"))
            self.pull_signed()
            entries = [entry or self.evil() for entry in entries]
            index = build_index([], extra_entries=entries)
            index.manifest = json_bytes(dict(json.loads(index.manifest.decode(
                "ascii")), annotations={imagec.ORIGIN_ANNOTATION + "digest": SUM_A}))
            index.digest = sha256(index.manifest)
            self.add_blobs(index)
            self.changed(lambda told: told["manifests"][0].update(
                index.descriptor(), annotations={imagec.TAG_ANNOTATION: "1"}))
            self.proved("out", 0 if self.image.descriptor() in entries else 3)

    def test_an_index_that_is_not_read(self):
        """What is signed, but cannot be read as an index, leads nowhere."""
        self.pull_signed()
        odd = json_bytes({"schemaVersion": 2, "mediaType": "application/x",
                          "manifests": []})
        image = BuiltImage(odd, "application/x")
        self.add_blobs(image)
        layer, raw = simple(simple_payload(image.digest))
        made = self.add_blobs(signature_image((layer, raw)))
        entry = self.evil()
        self.changed(lambda index: index.update(manifests=[
            dict(entry, annotations=dict(
                index["manifests"][0]["annotations"],
                **{imagec.ORIGIN_ANNOTATION + "digest": image.digest,
                   imagec.ORIGIN_ANNOTATION + "indexes": image.digest})),
            dict(made.descriptor(), annotations={imagec.TAG_ANNOTATION: image.digest
                                                 .replace(":", "-") + ".sig"})]))
        self.proved("out", 3, "found none")

    def test_one_of_several(self):
        self.pull_signed()
        entry = self.evil()
        self.changed(lambda index: index["manifests"].append(dict(entry, annotations={
            imagec.NAME_ANNOTATION: self.origin.host + "/lab/evil:1",
            imagec.TAG_ANNOTATION: "1"})))
        self.proved("out", 3, "found none")
        self.proved("out", 0, "signed by", "--image", "lab/app:1")
        self.proved("out", 3, "found none", "--image", "evil:1")
        self.proved("out", 3, "there is no image vil:1", "--image", "vil:1")
        self.changed(lambda index: index["manifests"][-1]["annotations"].update({
            imagec.NAME_ANNOTATION: self.origin.host + "/lab/evil:2"}))
        self.proved("out", 3, "found none", "--image", "1")  # a reader's tag for it

    def test_served_again(self):
        """What was pulled by key is pulled by key from a server of it, too."""
        self.sign(self.image)
        self.pull_signed("out.tar")
        self.pull_signed("out", "all")
        for name, platform in (("out.tar", "linux/amd64"), ("out", "all")):
            server = imagec.new_server(imagec.Shelf(self.at(name)), ("127.0.0.1", 0))
            with imagec.serving(server):
                run = self.main("digest", "--platform", platform, "--verify-key",
                                self.key, "127.0.0.1:%d/lab/app:1"
                                % server.server_address[1])
            self.assertEqual(run.status, 0, run.err)


# --------------------------------------------------------------------------------------
# 17  Look
# --------------------------------------------------------------------------------------

LOOK_USR = ["usr/ usr/lib/ usr/lib/a=1 usr/lib/b=1 lib->usr/lib", "lib/a=2"]
LOOK_CASES = (
    # where it is from, layers, path, the file's data (None: no file), layers drawn
    ("on top", ["a=1", "a=2 b=3"], "a", "2", 1),
    ("below", ["a=1", "b=3"], "./a", "1", 2),
    ("in no layer", ["a=1", "b=3"], "c", None, 2),
    ("empty", ["a=1", "a="], "/a", "", 1),
    ("deleted", ["d/a=1", "d/ d/.wh.a="], "/d/a", None, 1),
    ("deleted with its directory", ["d/e/a=1", ".wh.d="], "d/e/a", None, 1),
    ("deleted below, there again", ["a=1", ".wh.a=", "a=2"], "a", "2", 1),
    ("deleted, and there again below", ["a=1", "a=2", ".wh.a=", "b=3"], "a", None, 2),
    ("in an opaque directory", ["d/a=1", "d/ d/.wh..wh..opq= d/b=2"], "d/a", None, 1),
    ("opaque, nobody made it", ["x/a=1 d->x", "d/.wh..wh..opq="], "d/a", "1", 2),
    ("a file in its way", ["d/a=1", "d=2"], "d/a", None, 1),
    ("below a file", ["d=1", "e=1"], "d/a", None, 2),
    ("a link on top", ["d/ d/a=1", "l->d"], "l/a", "1", 2),
    ("link and target on top", ["b=1", "d/ l->/d/../a a=2"], "l", "2", 1),
    ("link to a link", ["m->a a=1", "l->m"], "l", "1", 2),
    ("link to nothing", ["b=1", "a->c .wh.c="], "a", None, 1),
    ("link through what may be a link", ["x/ x/y/ b->x/y x/a=1", "a=2 l->b/../a"],
     "l", "1", 2),
    ("links in a loop", ["c=1", "a->b b->a"], "a", imagec.InvalidDocument, 1),
    ("hard link", ["c=1", "a=2 b=>a"], "b", "2", 1),
    ("hard link to a layer below", ["a=1", "b=>a"], "b", "1", 2),
    ("hard link to it, and a file in its place", ["a=1", "b=>a a=2"], "b", "1", 2),
    ("behind a link below", LOOK_USR, "usr/lib/a", "2", 2),
    ("behind it, by its own name", LOOK_USR, "lib/a", "2", 2),
    ("beside it", LOOK_USR, "usr/lib/b", "1", 2),
    # What is written through a link that the same layer turns away, or one above.
    ("T148: not what it seems", ["x/ y/ y/a=1 d->x", "d/a=2 x->y"], "d/a", "1", 2),
    ("T148: nor this", LOOK_USR + ["usr/ usr/lib/ usr/lib/c=2 lib/c=3 b=>usr/lib/c"],
     "b", "3", 3),
    ("T148: a directory comes late", ["x/ d->x", "d/a=2 d/"], "d/a", None, 2),
    ("T148: and later", ["x/ d->x", "d/a=2", "d/"], "d/a", None, 3),
    ("above the root", ["a=1", "b=2"], "../../b", "2", 1),
    ("a layer twice", ["a=1", "b=2", "a=1"], "b", "2", 2),
)
LOOK_TARGETS = ("a", "b", "d", "/e", "d/e", "../e", "..", ".", "b/../d", "d/a", "x")


def look_over(layers):
    """A Look at layers in words."""
    named = types.SimpleNamespace
    image = named(layers=[named(throwaway=False, words=words, digest=None)
                          for words in layers],
                  require_file_system=lambda: None, reference="lab/app", path=None)
    look = imagec.Look(named(transport=named(check=imagec.go_on), max_files=10000),
                       image, ".")
    look._draw = lambda headers: imagec.LayerStore.visit(
        headers, map(flat_row, headers.layer.words.split()))
    return look


def looked_at(node):
    """The data of a file that a Look has found, None for another."""
    if node.data is None:
        return "" if node.entry.kind == "file" else None
    headers, number = node.data
    return flat_row(headers.layer.words.split()[number])[1]


def looked_up(find, path):
    """What stands there and below, as `find` tells; None for nothing."""
    try:
        way, node, tree = find(path)
    except imagec.NotFound:
        return None
    return [(node.entry.kind, looked_at(node), node.entry.link)
            for _, node, _ in tree.walk(way, node)]


def linked_layers(dice):
    """Layers in words, full of links and in no order."""
    layers = []
    for number in range(dice.randint(2, 4)):
        words = []
        for name in dice.choices(FLAT_NAMES, k=dice.randint(1, 5)):
            folder, slash, last = name.rpartition("/")
            words.append(dice.choice((
                name + "/", "%s=%d" % (name, number), "%s=%d" % (name, number),
                "%s->%s" % (name, dice.choice(LOOK_TARGETS)),
                "%s=>%s" % (name, dice.choice(FLAT_NAMES)),
                "%s%s.wh.%s=" % (folder, slash, last),
                "%s%s.wh..wh..opq=" % (folder, slash))))
        if dice.random() < 0.5:  # as most builders have it
            words = sorted({"/".join(word.split("/")[:depth]) + "/" for word in words
                            for depth in range(1, len(re.split(
                                "->|=", word)[0].split("/")))}.union(words))
        layers.append(" ".join(words))
    return layers


class LookTest(StoredCase):
    """`ls` and `cat`: what is where, and of no more layers than it takes."""

    def read(self, *argv, expect=0):
        """(standard output, standard error) of a command."""
        run = self.main(*argv)
        self.assertEqual(run.status, expect, run.err)
        self.assertNotIn("Traceback", run.err)
        self.assertEqual(os.listdir(tempfile.gettempdir()), [])
        return run.out, run.err

    def setUp(self):
        super().setUp()
        os.mkdir(self.at("spool"))
        self.patch(mock.patch.object(tempfile, "tempdir", self.at("spool")))

    @rows(LOOK_CASES)
    def test_no_more_layers_than_it_takes(self, _, layers, path, wanted, drawn):
        look = look_over(layers)
        if wanted is imagec.InvalidDocument:
            self.assertRaises(wanted, look.find, path)
        elif wanted is None:
            self.assertRaises(imagec.NotFound, look.find, path)
        else:
            self.assertEqual(looked_at(look.find(path)[1]), wanted)
        self.assertEqual(len(look._drawn), drawn)

    @rows((seed,) for seed in range(120))
    def test_random_layers_read_as_a_whole(self, seed):
        layers = linked_layers(random.Random(seed))
        with contextlib.suppress(imagec.InvalidDocument):
            flat_tree(layers)
            for path in FLAT_NAMES:
                whole = look_over(layers)
                whole._plain = False  # all are drawn
                wanted = looked_up(whole.find, path)
                self.assertEqual(looked_up(look_over(layers).find, path), wanted,
                                 (path, layers))

    @rows((kind, kind) for kind in ("oci", "docker", "schema1"))
    def test_from_a_registry(self, _, kind):
        big = noise(imagec.CHUNK + 7)
        ref, image = self.serve([tar_bytes([("a", kind.encode())]), None, tar_bytes([
            ("big", big), ("etc", None), ("etc/a", b"1"), ("none", b"")])], kind=kind)
        for path, data in (("/big", big), ("etc/a", b"1"), ("none", b"")):
            self.assertEqual(self.read("cat", ref, path), (data, ""))
        self.assertEqual(self.blob_gets(image.layers[0]), 0)
        self.assertEqual(self.read("cat", ref, "a"), (kind.encode(), ""))
        self.assertEqual(self.blob_gets(image.layers[0]), 1)

    @rows((SPARSE_FILES[0], SPARSE_FILES[-1]))
    def test_sparse_files_have_their_holes(self, _, member):
        ref, _ = self.serve([raw_layer(member)])
        self.assertEqual(self.read("cat", ref, "f")[0], SPARSE_CONTENT)

    @rows((("a bit", flip()), ("longer", extra(1)),
           ("another", body(gzip_bytes(raw_words("a=2"))))))
    def test_nothing_comes_out_of_a_layer_that_is_not_proved(self, _, action):
        ref, image = self.serve([tar_bytes([("a", noise(2 * imagec.CHUNK))])])
        self.origin.fault("/blobs/" + image.layers[0], action)
        out, err = self.read("cat", ref, "a", expect=3)
        self.assertEqual((out, err.count("\n")), (b"", 1))
        self.assertIn(image.layers[0], err)

    @rows((("layers", "tree"), ("oci", "lay"), ("archive", "image.tar")))
    def test_from_disk(self, format, name):
        """The layers below may be missing, or worse, where they do not matter."""
        ref, image = self.serve([raw_words("a=below b=1"), raw_words("a=top")])
        place = self.at(name)
        self.pull(ref, "-o", place, "--format", format)
        self.assertEqual(self.read("cat", "-q", place, "a"), (b"top", ""))
        self.assertEqual(self.read("ls", "-q", place)[0].count(b"\n"), 2)
        blob = image.blobs[image.layers[0]]
        for path in [place] if format == "archive" else [
                path for path, facts in below(place) if stat.S_ISREG(facts.st_mode)]:
            write_file(path, file_bytes(path).replace(blob, blob[:-1] + b"?"))
        for path, expect, out in ("a", 0, b"top"), ("b", 3, b""):
            self.assertEqual(self.read("cat", "-q", place, path, expect=expect)[0], out)

    @needs("skopeo")
    def test_from_an_archive_without_manifests(self):
        ref, _ = self.serve([raw_words("a=below b=1"), raw_words("a=top")])
        self.pull(ref, "-o", self.at("lay"), "--format", "oci")
        skopeo_copy("oci:" + self.at("lay"), "docker-archive:" + self.at("d.tar"))
        for path, out in ("a", b"top"), ("b", b"1"):
            self.assertEqual(self.read("cat", "-q", self.at("d.tar"), path)[0], out)

    @rows(((["d/ s->d"], "d", 1, "'/d' is a dir, not a file; list it with ls"),
           (["d/ s->d"], "s", 1, "'/d' is a dir"),
           (["d/"], "d/x", 4, "lab/app:1: there is no file '/d/x'"),
           (["s->no"], "s", 4, "there is no file '/no'"),
           (["a=1"], "a\nb", 4, r"there is no file '/a\nb'"),
           (["h=>no"], "h", 3, "hard link 'h' to 'no'")))
    def test_what_is_no_file(self, layers, path, expect, words):
        ref, _ = self.serve(list(map(raw_words, layers)))
        out, err = self.read("cat", ref, path, expect=expect)
        self.assertEqual((out, err.count("\n")), (b"", 1))
        self.assertIn(words, err)

    def test_ls(self):
        ref, image = self.serve([raw_words("etc/ etc/a=below etc/b=1 c=1"), raw_layer(
            raw_member(b"etc", kind=b"5", mode=0o1750, uid=3, gid=4, mtime=0),
            raw_member(b"etc/a", b"top", mode=0o4711, uid=1000, mtime=1700000000),
            raw_member(b"etc/s", kind=b"2", link=b"\x1b[1m", mode=0o777),
            raw_member(b"etc/.wh.b"), raw_member(b"\xff\n", kind=b"6", mode=0o600))])
        listing = [
            r"prw------- 0:0 0 1970-01-01T00:00:01Z /\xff\n",
            "-rw-r--r-- 0:0 1 1970-01-01T00:00:01Z /c",
            "drwxr-x--T 3:4 0 1970-01-01T00:00:00Z /etc",
            "-rws--x--x 1000:0 3 2023-11-14T22:13:20Z /etc/a",
            r"lrwxrwxrwx 0:0 0 1970-01-01T00:00:01Z /etc/s -> \x1b[1m"]
        for path, lines in (((), sorted(listing[1:]) + listing[:1]),
                            (("/etc",), listing[2:]), (("etc/a",), listing[3:4])):
            out, err = self.read("ls", ref, *path)
            self.assertEqual(sorted(out.decode().splitlines()), sorted(lines))
        line = self.read("ls", "--json", ref, "etc/a")[0].decode()
        self.assertEqual(json.loads(line), {
            "mode": "-rws--x--x", "uid": 1000, "gid": 0, "size": 3, "path": "/etc/a",
            "mtime": "2023-11-14T22:13:20Z", "target": None})
        self.read("ls", ref, "/no", expect=4)
        self.assertEqual(self.read("ls", self.serve([], "lab/none:1")[0]), (b"", ""))

    def test_artifacts_and_whole_indexes_have_no_files(self):
        ref, image = self.serve([tar_bytes([("a", b"1")])])
        self.origin.add("lab/app", "all", build_index([(image, ("linux", "amd64", None))]))
        for command in (["ls"], ["cat", "--max-files", "5"]):
            self.assertIn("--platform", self.read(
                *command, ref[:-1] + "all", "a", "--platform", "all", expect=2)[1])

    def test_limits(self):
        ref, _ = self.serve([tar_bytes([("a", b"1" * 2000), ("b", b"")])])
        for option in ("--max-files", "--max-layer-size"):
            self.assertIn("raise it with " + option, self.read(
                "ls", option, "1", ref, expect=1)[1])


# --------------------------------------------------------------------------------------
# 18  Serve
# --------------------------------------------------------------------------------------

#: (Range header, size, (first, end), None for all or ValueError); RFC 7233, 2.1
SERVE_RANGES = (
    ("bytes=0-0", 10, (0, 1)), ("bytes=0-9", 10, (0, 10)), ("bytes=0-", 10, (0, 10)),
    ("bytes=3-6", 10, (3, 7)), ("bytes=9-", 10, (9, 10)), ("bytes=5-999", 10, (5, 10)),
    ("bytes=10-", 10, ValueError), ("bytes=10-12", 10, ValueError),
    ("bytes=0-", 0, ValueError),
    # RFC 7233 would have it ignored, RFC 9110 lets a server reject it.
    ("bytes=5-2", 10, ValueError),
) + tuple((value, 10, None) for value in (
    None, "bytes=0-1,3-4", "bytes=-", "bytes=a-b", "bytes=+1-2", "bytes=\u0661-",
    "bytes=-3",  # a server may ignore any (RFC 7233, 3.1)
    "bytes=0x1-2", "bytes = 1-2", "", "lines=1-2",
    "bytes=" + "9" * 400 + "-"))

#: (host, repository, names it goes by)
SERVE_NAMES = (
    ("docker.io", "library/a", "docker.io/library/a library/a a"),
    ("registry-1.docker.io", "library/a", "docker.io/library/a library/a a"),
    ("docker.io", "grafana/loki", "docker.io/grafana/loki grafana/loki"),
    ("quay.io", "library/x", "quay.io/library/x library/x"),
    ("[::1]:5000", "a/b/c", "[::1]:5000/a/b/c a/b/c"),
)

#: Where a layers tree keeps an image, and a name and tag it must be served by: words of
#: the layout itself occur in names.
SERVE_TREES = (
    ("https/quay.io/v2/lab/app/v2", "quay.io/lab/app", "v2"),
    ("https/quay.io/v2/lab/v2/app/1", "quay.io/lab/v2/app", "1"),
    ("https/quay.io/v2/v2/1", "quay.io/v2", "1"),
    ("https/quay.io/v2/v2/v2", "quay.io/v2", "v2"),
    ("http/localhost:5000/v2/a/b/c/d/latest", "localhost:5000/a/b/c/d", "latest"),
    ("https/registry-1.docker.io/v2/library/alpine/3.20", "alpine", "3.20"),
    ("http/localhost_5000/v2/lab/app/1", "localhost:5000/lab/app", "1"),  # Windows
)


class ShelfTest(ServeCase):
    """What is on the shelf, and under which names."""

    def test_directory_that_may_not_be_read_is_passed_over(self):
        closed, listing = os.path.join(self.tree, "lost+found"), os.scandir
        os.mkdir(closed)
        self.addCleanup(os.rmdir, closed)

        def refuse(place):
            if place == closed:
                raise PermissionError(errno.EACCES, "Permission denied", place)
            return listing(place)

        with mock.patch.object(os, "scandir", refuse):
            self.assertIn("lab/oci", imagec.Shelf(self.tree).catalog())
        self.assertIn("lost+found", self.said[0])

    @rows(SERVE_NAMES)
    def test_names_of(self, host, repository, names):
        self.assertEqual(imagec.Shelf.names_of(host, repository), names.split())

    @rows(SERVE_TREES)
    def test_every_tree_is_found_by_its_name(self, place, name, tag):
        path = tempfile.mkdtemp(dir=self.work)
        shutil.copytree(os.path.join(self.tree, "http", self.origin, "v2/lab/oci/1"),
                        os.path.join(path, place))
        self.assertEqual(serve_raw_of(imagec.Shelf(path), name, tag),
                         self.images["lab/oci"].manifest)

    def test_part_of_a_tree_and_what_is_named_like_one(self):
        path, part = self.at("https", "host", "v2", "images"), ("v2", "lab", "oci", "1")
        shutil.copytree(self.tree, path)
        self.assertIn(self.origin + "/lab/oci", imagec.Shelf(path).repositories)
        for count in range(1, len(part) + 1):
            self.assertIn("lab/oci", imagec.Shelf(os.path.join(
                self.tree, "http", self.origin, *part[:count])).repositories)

    def test_all_hold_the_same_names(self):
        for format, names in self.held.items():
            expected = set(names).union(self.origin + "/" + name for name in names)
            if "library/alpine" in names:
                expected.remove(self.origin + "/library/alpine")
                expected.update({"alpine", "docker.io/library/alpine"})
            self.assertEqual(set(imagec.Shelf(self.places[format]).repositories),
                             expected)

    @rows((({}, None), ({OCI_TAG: "1.2"}, "1.2")))  # as skopeo and umoci write it
    def test_nameless_entry_goes_by_the_name_of_its_directory(self, annotations, tag):
        remove(self.at("layout"))
        path, image = self.copied()[0], self.images["lab/oci"]
        write_file(os.path.join(path, "index.json"), json_bytes({
            "schemaVersion": 2,
            "manifests": [image.descriptor(annotations=annotations)]}))
        shelf = imagec.Shelf(path)
        self.assertEqual(list(shelf.repositories), ["layout"])
        for reference in {image.digest, tag} - {None}:
            self.assertEqual(serve_raw_of(shelf, "layout", reference), image.manifest)

    @rows((("Foo Bar",), ("a:b:c",), ("\u2028",), ("x" * 2000,)))
    def test_image_of_a_name_that_is_none_goes_by_its_digest(self, name):
        remove(self.at("layout"))
        del self.said[:]
        path, _, _ = self.copied()
        edit, place = damage_json, os.path.join(path, "index.json")
        edit(lambda index: index["manifests"].insert(0, dict(
            index["manifests"][0], annotations={OCI_NAME: name})))(place)
        self.assertIn("lab/oci", imagec.Shelf(path).catalog())
        warned, = self.said
        self.assertIn(path, warned)
        if len(name) < 100:
            self.assertIn(imagec.printable(name), warned)
        edit(lambda index: index["manifests"].__delitem__(slice(1, None)))(place)
        shelf = imagec.Shelf(path)
        (repository, tags), = shelf.repositories.items()
        self.assertEqual((repository, tags), ("layout", {}))
        self.assertEqual(len(shelf.documents), 1)

    def test_what_cannot_be_served_is_passed_over(self):
        path, image = self.copied()[0], self.images["lab/oci"]
        index = build_index([(image, None)], extra_entries=[
            _descriptor(image.media_type, b"child that is not here")])
        for data in (index.manifest, b"<xml/>"):
            write_file(os.path.join(path, "blobs/sha256", sha256(data)[7:]), data)
        write_file(os.path.join(path, "index.json"), json_bytes({
            "schemaVersion": 2, "manifests": [
                _descriptor("application/xml", b"<xml/>"),
                dict(image.descriptor(), annotations={OCI_TAG: 5}),
                dict(image.descriptor(), annotations={ORIGIN + "digest": "x"}),
                _descriptor(image.media_type, b"image that is not here",
                            annotations={OCI_NAME: "lab/gone:1"}),
                index.descriptor(annotations={OCI_TAG: "quay.io/lab/pod:7"})]}))
        del self.said[:]
        shelf = imagec.Shelf(path)  # podman writes the whole name as if it were a tag
        self.assertEqual(shelf.repositories["quay.io/lab/pod"], {"7": index.digest})
        self.assertEqual(set(shelf.documents), {index.digest, image.digest})
        self.assertNotIn("lab/gone", shelf.repositories)
        for line, words in zip(self.said, (
                r"index.json: index.json.manifests\[1\]", "index.json: .*digest",
                "blobs/sha256/[0-9a-f]{64}: it is of type application/xml",
                "blobs/.*: No such", "blobs/.*: No such")):
            self.assertRegex(line, "passed over: %s/%s" % (path, words))

    def test_namespace_that_is_not_held(self):
        # A mirror that hands out another host's image in place of what is asked for
        # would be believed.
        shelf = imagec.Shelf(self.layout)
        for namespace in ("quay.io", "docker.io"):
            with self.assertRaises(KeyError):
                shelf.tags("lab/oci", namespace)
        self.assertIn("1", shelf.tags("library/alpine", "docker.io"))

    @rows((("layers",), ("oci",)))
    def test_blob_that_is_not_there(self, format):
        path, image = self.at(format), self.images["lab/docker"]
        shutil.copytree(self.places[format], path)
        for name in glob.glob(path + "/**/*", recursive=True):
            if os.path.isfile(name) and sha256(file_bytes(name)) == image.layers[0]:
                os.unlink(name)
        host = self.serve(path)
        for digest, code in ((image.layers[0], 404), (image.layers[1], 200)):
            answer = serve_ask(host, "/v2/lab/docker/blobs/" + digest)
            self.assertEqual(answer.status, code)

    def test_blob_is_proved_once(self):
        shelf, digest, path = self.shelf_of(b"x" * 1000)
        digest = imagec.Digest.parse(digest)
        with mock.patch.object(imagec, "proved", wraps=imagec.proved) as v:
            self.assertEqual(shelf.blob(digest), shelf.blob(digest))
            self.assertEqual(v.call_count, 1)
            os.utime(path, (1, 1))
            shelf.blob(digest)
            self.assertEqual(v.call_count, 2)


# -- Conformance: the expectations of the OCI distribution-spec's pull tests

SERVE_MANIFEST = {"Docker-Content-Digest": "{digest}", "Content-Type": "{type}",
                  "Content-Length": "{size}"}
SERVE_BLOB = {"Docker-Content-Digest": "{blob}", "Accept-Ranges": "bytes",
              "Content-Type": "application/octet-stream",
              "Content-Length": "{blob_size}"}
SERVE_JSON = {"Content-Type": "application/json"}

#: (path below /v2/, status, error code or None, headers); each row by GET and by HEAD
SERVE_CONFORMANCE = (
    ("", 200, None, SERVE_JSON),
    ("{name}/manifests/1", 200, None, SERVE_MANIFEST),
    ("{name}/manifests/{digest}", 200, None, SERVE_MANIFEST),
    ("{name}/manifests/{child}", 200, None, {"Docker-Content-Digest": "{child}"}),
    ("{host}/{name}/manifests/1", 200, None, SERVE_MANIFEST),
    ("{name}/manifests/1?ns={host}", 200, None, SERVE_MANIFEST),
    ("{name}/manifests/.INVALID_MANIFEST_NAME", 404, "MANIFEST_UNKNOWN", {}),
    ("{name}/manifests/2", 404, "MANIFEST_UNKNOWN", {}),
    ("{name}/manifests/{zeros}", 404, "MANIFEST_UNKNOWN", {}),
    ("{name}/manifests/{blob}", 404, "MANIFEST_UNKNOWN", {}),
    ("no/such/manifests/1", 404, "NAME_UNKNOWN", {}),
    ("no/such/manifests/{digest}", 404, "NAME_UNKNOWN", {}),
    ("No_Such/manifests/1", 404, None, {}),
    ("{name}/blobs/{blob}", 200, None, SERVE_BLOB),
    ("{host}/{name}/blobs/{blob}", 200, None, SERVE_BLOB),
    ("{name}/blobs/{blob}?ns={host}", 200, None, SERVE_BLOB),
    ("{name}/blobs/{zeros}", 404, "BLOB_UNKNOWN", {}),
    ("no/such/blobs/{blob}", 404, "NAME_UNKNOWN", {}),
    ("{name}/blobs/sha256:abc", 400, "DIGEST_INVALID", {}),
    ("{name}/blobs/nonsense", 400, "DIGEST_INVALID", {}),
    ("{name}/blobs/md5:d41d8cd98f00b204e9800998ecf8427e", 400, "DIGEST_INVALID", {}),
    ("{name}/tags/list", 200, None, SERVE_JSON),
    ("{name}/tags/list?n=1", 200, None, SERVE_JSON),
    ("no/such/tags/list", 404, "NAME_UNKNOWN", {}),
    ("{name}/referrers/{digest}", 200, MEDIA_TYPES["oci"]["index"], {}),
    ("{name}/tags", 404, None, {}),
    ("{name}", 404, None, {}),
    ("_catalog", 200, None, SERVE_JSON),
    ("_catalogue", 404, None, {}),
)

class ConformanceTest(ServeCase):
    """The pull part of the specification, line by line."""

    def setUp(self):
        super().setUp()
        self.host = self.serve(self.layout)
        index = self.images["lab/index"]
        digest = index.children[0].layers[1]
        self.blob = index.children[0].blobs[digest]
        self.facts = {
            "name": "lab/index", "host": self.origin, "digest": index.digest,
            "type": index.media_type, "size": len(index.manifest),
            "child": index.children[1].digest, "zeros": ZEROS,
            "blob": digest, "blob_size": len(self.blob)}

    def ask(self, *args, **named):
        return serve_ask(self.host, *args, **named)

    @rows(SERVE_CONFORMANCE)
    def test_get_and_head(self, path, status, code, headers):
        path = "/v2/" + path.format(**self.facts)
        answer, head = self.ask(path), self.ask(path, "HEAD")
        self.assertEqual(answer.status, status, answer.body)
        self.assertEqual(answer.headers["Docker-Distribution-API-Version"],
                         "registry/2.0")
        self.assertEqual(answer.headers["Content-Length"], str(len(answer.body)))
        for name, value in headers.items():
            self.assertEqual(answer.headers[name], value.format(**self.facts))
        if status >= 400:
            self.refused(answer, status, code)
        self.assertEqual((head.status, head.body), (status, b""))
        for one in (head, answer):
            del one.headers["Date"]
        self.assertEqual(head.headers.items(), answer.headers.items())

    @rows(itertools.product(("POST", "PUT", "PATCH", "DELETE"), (
        "/v2/lab/index/blobs/uploads/", "/v2/lab/index/manifests/1",
        "/v2/lab/index/blobs/{blob}")))
    def test_writing_is_refused(self, method, path):
        answer = self.ask(path.format(**self.facts), method)
        self.refused(answer, 405, "UNSUPPORTED")
        # RFC 7231, 6.5.5: it MUST say what is allowed.
        allowed = answer.headers.get("Allow", "").split(",")
        self.assertEqual({word.strip() for word in allowed}, {"GET", "HEAD"})
        self.assertEqual(self.ask("/v2/", "TRACE").status, 501)

    @rows(itertools.product((("GET", b"200"), ("PUT", b"405")), (
        b"Content-Length: %d", b"Transfer-Encoding: chunked")))
    def test_body_is_not_taken_for_a_request(self, request, framing):
        method, status = request
        body = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"
        found = serve_raw(self.host, b"%s /v2/ HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n%s" % (
            method.encode(), framing.replace(b"%d", b"%d" % len(body)), body))
        self.assertEqual(re.findall(rb"HTTP/1\.1 ([0-9]+)", found), [status])
        self.assertRegex(found, b"(?i)\r\nconnection: close\r\n")

    def test_ranges(self):
        data = b"0123456789"
        shelf, _, path = self.shelf_of(data)
        shelf.blobs[imagec.Digest.of(b"")] = imagec.Region(path, 0, 0)
        host = self.serve(shelf)
        for value, size, part in SERVE_RANGES:
            answer, head = (serve_ask(
                host, "/v2/lab/app/blobs/" + sha256(data[:size]), method,
                {} if value is None else {"Range": value.encode()})
                for method in ("GET", "HEAD"))
            with self.subTest(value, size=size):
                self.assertEqual(head.status, 200)  # RFC 7233, 3.1
                self.assertEqual(head.headers["Content-Length"], str(size))
                if part is ValueError:
                    self.refused(answer, 416)
                    span = "bytes */%d" % size
                else:
                    first, end = part or (0, size)
                    self.assertEqual(answer.status, 206 if part else 200)
                    self.assertEqual(answer.body, data[first:end])
                    self.assertEqual(answer.headers["Content-Length"], str(end - first))
                    span = "bytes %d-%d/%d" % (first, end - 1, size) if part else None
                self.assertEqual(answer.headers["Content-Range"], span)

    def test_errors_tell_nothing_of_this_host(self):
        for path in ("/v2/no/such/manifests/1", "/v2/lab/index/blobs/x", "/x"):
            answer = self.ask(path)
            self.assertNotIn(self.root.encode(), answer.body)
            self.assertNotIn("Python", str(answer.headers))


class ServeListsTest(ServeCase):
    """tags/list and _catalog, whole and in pages."""

    TAGS = ["1", "1.10", "1.9", "A", "_x", "a", "latest"]

    def setUp(self):
        super().setUp()
        shelf = imagec.Shelf()
        for host, tags in (("a.test", self.TAGS), ("b.test", ["b1", "b2", "b3"])):
            for tag in tags:
                shelf.add(shelf.names_of(host, "lab/app"), tag,
                          serve_document((host + tag).encode("ascii")))
        shelf.add(["lab/tagless"], None, serve_document(b""))
        self.names = sorted(shelf.repositories)
        # A client cannot spell these in a request for a repository.
        shelf.add(["c.test:5000/lab/app", "C.test/lab/app", "[::1]/lab/app"], None,
                  serve_document(b""))
        self.host = self.serve(shelf)

    def test_what_refers_to_a_manifest(self):
        image, config = build_image(FIELD_SMALL), MEDIA_TYPES["oci"]["config"]
        entries, subject = {}, {"subject": image.descriptor()}
        for kind, other, said in (
                (SPDX, referring(image, annotations={"k": "v"}),
                 {"artifactType": SPDX, "annotations": {"k": "v"}}),
                (config, build_image(FIELD_SMALL[:1]), {"artifactType": config}),
                (None, build_index([]), {})):
            raw = json_bytes(dict(json.loads(other.manifest.decode()), **subject))
            one = BuiltImage(raw, other.media_type)
            entries[kind] = one.descriptor(**said)
            for _ in range(2):  # it may be in two places
                self.server.shelf.add((), None, imagec.decode_manifest(raw))
        path = "/v2/a.test/lab/app/referrers/"
        for digest, wanted in (  # a filter is not applied, and does not say it is
                (image.digest, list(entries.values())), (sha256(b"none"), []),
                (image.digest + "?artifactType=a/b", list(entries.values()))):
            answer = serve_ask(self.host, path + digest)
            self.assertEqual((answer.status, answer.headers["Content-Type"],
                              answer.headers["OCI-Filters-Applied"]),
                             (200, MEDIA_TYPES["oci"]["index"], None))
            self.assertEqual(json.loads(answer.body.decode())["manifests"], wanted)
        self.assertEqual(serve_ask(self.host, "/v2/lab/none/referrers/x").status, 404)
        self.assertEqual(serve_ask(self.host, path + "x").status, 400)

    def listed(self, path, key="tags"):
        """The list at a path, and where its Link leads."""
        answer = serve_ask(self.host, path)
        self.assertEqual(answer.status, 200, answer.body)
        link = answer.headers["Link"]
        if link is not None:
            match = re.fullmatch('<(/v2/[^>]+)>; rel="next"', link)
            self.assertTrue(match, link)
            link = match.group(1)
        value = json.loads(answer.body.decode("ascii"))
        self.assertEqual(value.get("name", "_catalog"), re.match(
            "/v2/(_catalog|.*(?=/tags/list))", path).group(1))
        return value[key], link

    def pages(self, path, key="tags"):
        found = []
        while path:
            page, path = self.listed(path, key)
            found.append(page)
            self.assertLess(len(found), 20, "the links go round in circles")
        return found

    #: (below /v2/, the list)
    LISTS = (("lab/tagless/tags/list", []), ("_catalog", None)) + tuple(
        ("a.test/lab/app/tags/list" + query, expected) for query, expected in (
            ("", TAGS), ("?last=1", TAGS[1:]), ("?last=1.5", TAGS[2:]),
            ("?last=latest", []), ("?last=zzz", []), ("?last=", TAGS),
            # distribution-spec: "an empty list", and no Link to follow for ever
            ("?n=0", []))) + tuple(
        ("_catalog?n=" + value, None) for value in (
            "x", "-1", "1.5", "", "9" * 30, "%00"))

    @rows(LISTS)
    def test_lists(self, path, expected):
        key = "repositories" if path.startswith("_catalog") else "tags"
        self.assertEqual(self.listed("/v2/" + path, key), (
            self.names if expected is None else expected, None))

    def test_pages_make_up_the_whole(self):
        for path, key, whole in (("/v2/a.test/lab/app/tags/list", "tags", self.TAGS),
                                 ("/v2/_catalog", "repositories", self.names)):
            for count in range(1, len(whole) + 2):
                with self.subTest(path=path, count=count):
                    pages = self.pages("%s?n=%d" % (path, count), key)
                    self.assertEqual(sum(pages, []), whole)
                    self.assertEqual({len(page) for page in pages[:-1]} - {count},
                                     set())
                    self.assertTrue(pages[-1])

    @rows((("a.test", TAGS), ("b.test", ["b1", "b2", "b3"])))
    def test_namespace_on_every_page(self, namespace, whole):
        pages = self.pages("/v2/lab/app/tags/list?n=2&ns=" + namespace)
        self.assertEqual(sum(pages, []), whole)

    def test_our_own_tags_command_reads_them(self):
        with mock.patch.object(imagec, "TAG_PAGE", 2):
            run = self.main("tags", self.host + "/lab/app", "--no-creds", "-q")
        self.assertEqual(run.status, 0, run.err)
        self.assertEqual(run.out.split(), sorted(self.TAGS + ["b1", "b2", "b3"]))


# -- Serve

#: Request targets that are no names of ours; none may lead to a file.
SERVE_TRICKS = (
    "/", "/etc/passwd", "//etc/passwd", "/../canary", "/v2/../canary",
    "/v2/../../canary", "/v2/%2e%2e/%2e%2e/canary", "/v2/%252e%252e/canary",
    "/v2/..%2f..%2fcanary", "/v2/../../canary/manifests/1",
    "/v2/lab/oci/blobs/../../../../canary", "/v2/lab/oci/blobs/..%2f..%2f..%2fcanary",
    "/v2/lab/oci/blobs/sha256:../../../canary",
    "/v2/lab/oci/blobs/sha256:..%2F..%2Fcanary",
    "/v2/lab/oci/manifests/../../../index.json",
    "/v2/lab/oci/manifests/..%2findex.json", "/v2/lab/oci/manifests/index.json",
    "/v2/lab/oci/manifests/1%00", "/v2/lab/oci/manifests/1%0a",
    "/v2/lab/oci/manifests/%00/canary", "/v2/lab/oci%00/manifests/1",
    "/v2/lab//oci/manifests/1", "/v2//lab/oci/manifests/1", "/v2/lab/oci/manifests//1",
    "/v2/lab/oci/manifests/1/", "/v2/lab\\oci\\manifests\\1",
    "/v2/..\\..\\canary/manifests/1", "\\v2\\", "C:\\canary", "file:///etc/passwd",
    "/oci-layout", "/v2/oci-layout", "/v2/_catalog/../../canary",
    "/v2/\xff\xfe/manifests/1", "/v2/%ff%fe/manifests/1", "/v2/%d9%a1/manifests/1",
    "/v2/lab/oci/manifests/" + "a" * 60000, "/v2/" + "a/" * 5000 + "manifests/1",
    "/v2/" + "a" * 70000, "/v2/[::1/manifests/1", "http://[::1/v2/", "//[/v2/",
    "http://127.0.0.1:bad/canary", "*",
)

#: Bytes that are no request.
SERVE_MALFORMED = (
    b"",
    b"\r\n\r\n",
    b"GARBAGE\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /v2/ HTTP/9.9\r\n\r\n",
    b"GET /v2/ HTTP/x\r\n\r\n",
    b"GET /v2/ x y HTTP/1.1\r\n\r\n",
    b"GET /v2/ HTTP/1.1\r\n: no name\r\n\r\n",
    b"GET /v2/ HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET /v2/ HTTP/1.1\r\nX: " + b"x" * 70000 + b"\r\n\r\n",
    b"GET /v2/ HTTP/1.1\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    b"GET /v2/ HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    b"PUT /v2/ HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"GET /v2/ HTTP/1.1\r\nAuthorization: Basic \xff\xfe\r\n\r\n",
    b"GET /v2/?n=\xff&last=%ff HTTP/1.1\r\n\r\n",
    b"GET //[ HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"\x00" * 1000,
    b"GET /v2/ HTTP/1.1\r\nHost: x",
)

#: Header fields that two programs may read in two ways, and then what follows, too.
SERVE_TWO_WAYS = (
    b"Content-Length: 0\r\nContent-Length: 38",
    b"Content-Length: 38\r\nContent-Length: 0",
    b"Content-Length: 0\r\ncontent-length: 0", b"Content-Length: 0, 0",
    b"Content-Length: x", b"Content-Length: +0", b"Content-Length: -0",
    b"Content-Length: 0x0", b"Content-Length:", b"Content-Length: 0_0",
    b"Content-Length: \xd9\xa1", b"Content-Length:\r\n 0", b"Content-Length: 0\r\n 38",
    b"Transfer-Encoding : chunked", b"Content-Length : 38", b"Content-Length\t: 38",
    b" Content-Length: 38", b"X: y\r\n\tz",
    b"X: y\r\r\nContent-Length: 38", b"X: y\r\rContent-Length: 38",
    b"no colon\r\nContent-Length: 38", b": no name\r\nContent-Length: 38",
    b"Content-Length\0: 38", b"Content(Length): 38", b"X\xff: y", b"X Y: z",
)

#: A path that a pattern may take ages to refuse, and with it the whole process.
SERVE_LONG_NAMES = ("a/" * 22 + "!", "a-" * 2000 + "!", "a." * 2000 + "!",
                    "a__" * 2000 + "!", "a:" * 2000 + "!", "-" * 4000 + "!")

#: (Authorization header, whether it is let in) for alice with PASSWORD
SERVE_ALICE = field_base64("alice:" + PASSWORD)
SERVE_LOGINS = (
    (None, False),
    ("", False),
    ("Basic", False),
    ("Basic " + SERVE_ALICE, True),
    ("basic " + SERVE_ALICE, True),  # RFC 7235, 2.1: in any case
    ("Basic " + SERVE_ALICE[:-4], False),
    ("Basic " + SERVE_ALICE + "AAAA", False),
    ("Basic " + field_base64("alice:wrong"), False),
    ("Basic " + field_base64("bob:" + PASSWORD), False),
    ("Bearer " + SERVE_ALICE, False),
    ("Basic \xff\xfe", False),
)


class ServeTest(ServeCase):
    """Servers and their clients, well-meaning or not."""

    def archived(self, *credentials):
        """The host of a server of the archive, one for all rows of a test."""
        self._host = getattr(self, "_host", None) or self.serve(
            self.archive, *credentials)
        return self._host

    # -- every kind, pulled again

    def test_pulls(self):
        for format, more in (("layers", []), ("oci", ["alpine",
                                                      "docker.io/library/alpine"])):
            host = self.serve(self.places[format])
            for name in self.held[format] + more:
                image = self.images.get(name, self.images["lab/index"])
                platform = "all" if more and image.children else "linux/amd64"
                for reference in (":1", "@" + image.digest)[:1 + bool(more)]:
                    reference = name + reference
                    with self.subTest(reference, format=format):
                        pulled = self.pulled(host, reference, format, platform)
                        self.assertEqual(str(pulled.digest), image.digest)

    @rows((format,) for format in IMAGE_FORMATS)
    def test_pull_from_an_archive(self, format):
        image = self.pulled(self.archived(), "lab/docker:1", format)
        self.assertEqual(str(image.digest), self.images["lab/docker"].digest)

    @rows((("alpine:1", "library/alpine", "docker.io"),
           ("{0}/lab/oci:1", "lab/oci", "{0}")))
    def test_as_a_mirror(self, name, repository, namespace):
        with mock.patch.object(imagec.RegistryHandler, "log_message") as asked:
            image = imagec.pull(
                name.format(self.origin), self.at(repository), platform="linux/amd64",
                no_creds=True, mirrors=[self.serve(self.layout)])
        self.assertEqual(str(image.digest), self.images[repository].digest)
        paths = [call[0][1] for call in asked.call_args_list if repository in call[0][1]]
        self.assertTrue(paths)
        for path in paths:
            self.assertIn("ns=" + urllib.parse.quote(
                namespace.format(self.origin), ""), path)
        self.assertEqual(self.said, [])

    # -- requests that mean no good

    def test_nothing_outside_can_be_reached(self):
        path, _, _ = self.copied()
        write_file(self.at("canary"), SERVE_CANARY)
        write_file(os.path.join(path, "canary"), SERVE_CANARY)
        host = self.serve(path)
        for target in SERVE_TRICKS:
            with self.subTest(target=target[:80]), \
                    mock.patch.object(imagec.Shelf, "blob") as blob:
                status, found = serve_target(host, target)
                self.assertTrue(400 <= status < 500, found[:200])
                blob.assert_not_called()
                for secret in (SERVE_CANARY, b"root:", b"imageLayoutVersion"):
                    self.assertNotIn(secret, found)
        for good in ("/v2/", "http://%s/v2/" % host):  # RFC 7230, 5.3.2: a MUST
            self.assertEqual(serve_target(host, good)[0], 200)

    @rows((name,) for name in SERVE_LONG_NAMES)
    def test_refusing_takes_no_time(self, name):
        host = self.archived()
        with cpu_within(3):
            status, found = serve_target(host, "/v2/" + name)
        self.assertTrue(400 <= status < 500, found[:200])

    def test_malformed_requests_do_not_end_it(self):
        host = self.serve(self.archive)
        with mock.patch.object(sys, "stderr", io.StringIO()) as err:
            for data in SERVE_MALFORMED:
                with self.subTest(data=data[:60]):
                    found = serve_raw(host, data)
                    self.assertNotRegex(found, rb"Traceback|^HTTP/1\.1 50[0-4]")
                    self.assertRegex(found, rb"\A(HTTP/1\.[01] |\Z)")
                    self.assertEqual(serve_ask(host, "/v2/").status, 200)
        self.assertEqual(err.getvalue(), "")

    @rows(itertools.product(SERVE_TWO_WAYS, (b"GET", b"HEAD", b"POST")))
    def test_heads_that_can_be_read_in_two_ways(self, fields, method):
        found = serve_raw(
            self.archived(), method + b" /v2/ HTTP/1.1\r\nHost: x\r\n" + fields
            + b"\r\n\r\nGET /v2/_catalog HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertRegex(found, rb"\AHTTP/1\.1 400 ")
        self.assertEqual(found.count(b"HTTP/1.1 "), 1, found)
        self.assertIn(b"\r\nConnection: close\r\n", found)

    @rows(((b"Content-Length: 0",), (b"Content-Length:0 \t",), (b"X-y.z~: (a)",)))
    def test_heads_that_can_be_read_in_one_way(self, fields):
        found = serve_raw(self.archived(),
                          b"GET /v2/ HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n\r\n")
        self.assertRegex(found, rb"\AHTTP/1\.1 200 ")

    def test_client_that_begins_with_tls(self):
        # Go's, and with it containerd, know an answer in plain http by its "HTTP/";
        # and they wait for one, a line feed in their hello or not.
        host = self.serve(self.tree)
        for rest in (b"\x01" * 400, b"\n" * 400):
            with self.subTest(rest=rest[:1]), serve_connect(host, 3) as sock:
                sock.sendall(b"\x16\x03\x01\x01\x95\x01" + rest)
                self.assertRegex(sock.recv(65536), rb"\AHTTP/1\.1 400 ")
                self.assertEqual(sock.recv(1), b"")

    def test_client_that_resets(self):
        host = self.serve(self.shelf_of(bytes(8 << 20))[0])
        digest = str(imagec.Digest.of(bytes(8 << 20)))
        with mock.patch.object(sys, "stderr", io.StringIO()) as err:
            for _ in range(3):
                with serve_connect(host) as sock:
                    sock.sendall(b"GET /v2/lab/app/blobs/%s HTTP/1.1\r\nHost: x\r\n\r\n"
                                 % digest.encode("ascii"))
                    sock.recv(1000)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                    struct.pack("ii", 1, 0))
            self.assertEqual(serve_ask(host, "/v2/").status, 200)
        self.assertEqual((err.getvalue(), self.said), ("", []))

    # -- connections

    def test_connection_is_kept(self):
        host = self.serve(self.layout)
        connection, image = self.connect(host), self.images["lab/oci"]
        serve_ask(connection, "/v2/")
        sock = connection.sock
        for path in ["/v2/no/such/manifests/1", "/v2/lab/oci/manifests/1",
                     "/v2/lab/oci/blobs/" + ZEROS] + [
                         "/v2/lab/oci/blobs/" + digest for digest in image.layers]:
            for method in ("HEAD", "GET"):
                serve_ask(connection, path, method)
        self.assertIs(connection.sock, sock)
        found = serve_raw(host, b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n" * 5)
        self.assertEqual(found.count(b"HTTP/1.1 200 OK\r\n"), 5)

    def test_http_1_0(self):
        host = self.serve(self.layout)
        image = self.images["lab/oci"]
        for method, body in ((b"GET", image.manifest), (b"HEAD", b"")):
            with serve_connect(host) as sock:
                sock.sendall(method + b" /v2/lab/oci/manifests/1 HTTP/1.0\r\n\r\n")
                found = b"".join(iter(lambda: sock.recv(65536), b""))
            head, _, rest = found.partition(b"\r\n\r\n")
            self.assertRegex(head, rb"^HTTP/1\.[01] 200 ")
            self.assertEqual(rest, body)

    def test_empty_blob(self):
        shelf, digest, _ = self.shelf_of(b"")
        connection = self.connect(self.serve(shelf))
        for method in ("GET", "HEAD", "GET"):
            answer = serve_ask(connection, "/v2/lab/app/blobs/" + digest, method)
            self.assertEqual((answer.status, answer.body), (200, b""))
            self.assertIsNotNone(connection.sock)

    # -- crowds

    def test_parallel_clients(self):
        host, image = self.serve(self.layout), self.images["lab/oci"]
        paths = ["/v2/lab/oci/manifests/1"] + [
            "/v2/lab/oci/blobs/" + digest for digest in image.layers]
        bodies = [image.manifest] + [image.blobs[digest] for digest in image.layers]
        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            for found in pool.map(lambda _: [serve_ask(host, path).body
                                             for path in paths], range(200)):
                self.assertTrue(found == bodies)  # to tell how they differ takes ages

    def test_slow_client_blocks_nobody(self):
        data = bytes(16 << 20)
        shelf, digest, _ = self.shelf_of(data)
        host = self.serve(shelf)
        request = b"GET /v2/lab/app/blobs/%s HTTP/1.1\r\nHost: x\r\n\r\n" % (
            digest.encode("ascii"))
        with serve_connect(host) as deaf, serve_connect(host) as mute, \
                serve_connect(host):
            deaf.sendall(request)
            mute.sendall(request[:30])
            for _ in range(3):
                answer = serve_ask(host, "/v2/lab/app/blobs/" + digest)
                self.assertEqual(len(answer.body), len(data))
            mute.sendall(request[30:])
            self.assertTrue(mute.recv(100).startswith(b"HTTP/1.1 200 "))

    def test_silent_client_is_let_go(self):
        with mock.patch.object(imagec, "SERVE_TIMEOUT", 0.1):
            host = self.serve(self.archive)
            with serve_connect(host) as silent, serve_connect(host) as half:
                half.sendall(b"GET /v2/ HTTP/1.1\r\n")
                self.assertEqual((silent.recv(1), half.recv(1)), (b"", b""))

    @rows((("http",), ("https",)))
    def test_head_that_drips(self, scheme):
        tls = self.pair() if scheme == "https" else None
        with mock.patch.object(imagec, "SERVE_TIMEOUT", 0.3):
            sock = serve_connect(self.serve(self.archive, tls=tls))
            self.addCleanup(sock.close)
            with threat_alarm(60), contextlib.suppress(ConnectionError, ssl.SSLError):
                if tls:
                    sock = self.client_context().wrap_socket(
                        sock, server_hostname="localhost")
                    self.addCleanup(sock.close)
                sock.settimeout(0.02)
                sock.sendall(b"GET /v2/ HTTP/1.1\r\nX: ")
                while True:
                    sock.sendall(b"y")
                    with contextlib.suppress(socket.timeout):
                        self.assertEqual(sock.recv(1), b"")
                        break

    def asking(self, host, path=b"", end=b"{}", sock=None):
        """A connection that has asked for a path, and had its answer up to `end`."""
        if sock is None:
            sock = serve_connect(host)
            self.addCleanup(sock.close)
        sock.sendall(b"GET /v2/%s HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        found = b""
        while not found.endswith(end):
            found += sock.recv(1)
        self.assertTrue(found.startswith(b"HTTP/1.1 200 ") or not end, found)
        return sock

    def narrow(self, shelf):
        """The host of a server for two connections."""
        with mock.patch.object(imagec, "SERVE_THREADS", 2):
            return self.serve(shelf)

    def test_who_is_idle_makes_room(self):
        data = bytes(16 << 20)
        shelf, digest, _ = self.shelf_of(data)
        host = self.narrow(shelf)
        busy = self.asking(host, b"lab/app/blobs/" + digest.encode(), b"\r\n\r\n")
        idle = self.asking(host)
        self.wait_until(lambda: any(list(self.server.since.values())))
        idle.sendall(b"GET ")  # which does not count
        with mock.patch.object(imagec, "SERVE_IDLE", 0):
            self.assertEqual(serve_ask(host, "/v2/").status, 200)
        self.assertEqual(idle.recv(1), b"")
        left = len(data)
        while left:
            piece = busy.recv(1 << 20)
            self.assertTrue(piece)
            left -= len(piece)

    def test_longest_idle_makes_room(self):
        """One for one: who is slow is not cut for a crowd."""
        host, socks = self.narrow(self.archive), []
        for count in (1, 2):
            socks.append(self.asking(host))
            self.wait_until(lambda: sum(map(bool, list(
                self.server.since.values()))) >= count)
        with mock.patch.object(imagec, "SERVE_IDLE", 0):
            self.assertEqual(serve_ask(host, "/v2/").status, 200)
        self.assertEqual(socks[0].recv(1), b"")
        self.asking(host, sock=socks[1])

    def crowded(self):
        """Two connections to a server for so many, and a third that waits."""
        host = self.narrow(self.archive)
        return [self.asking(host, end=end) for end in (b"{}", b"{}", b"")]

    def test_more_connections_than_threads_wait(self):
        first, _, third = self.crowded()
        third.settimeout(0.1)
        with self.assertRaises(socket.timeout):
            third.recv(1)
        first.close()
        third.settimeout(5)
        self.assertTrue(third.recv(1000).startswith(b"HTTP/1.1 200 "))

    def test_stops_though_connections_wait(self):
        socks = self.crowded()
        time.sleep(0.05)
        stopped = threading.Thread(target=self.server.shutdown, daemon=True)
        stopped.start()
        stopped.join(10)
        late = stopped.is_alive()
        for sock in socks:
            sock.close()
        self.assertFalse(late, "the stop waits for clients that say nothing")

    # -- damage

    def test_corrupt_blob(self):
        path, digest, blob = self.copied()
        damage_flip(blob)
        host = self.serve(path)
        url = "/v2/lab/oci/blobs/" + digest
        for headers in ({}, {"Range": "bytes=0-3"}):
            self.refused(serve_ask(host, url, headers=headers), 500)
        self.assertEqual(serve_ask(host, url, "HEAD").status, 500)
        self.assertIn(digest[7:19], self.said[0])
        other = self.images["lab/oci"].layers[0]
        self.assertEqual(serve_ask(host, "/v2/lab/oci/blobs/" + other).status, 200)
        with self.assertRaises(imagec.ImagecError):
            self.pulled(host, "lab/oci:1")

    def test_corrupt_member_of_an_archive(self):
        path = shutil.copy(self.archive, self.at("a.tar"))
        digest, image = self.images["lab/docker"].layers[0], self.images["lab/docker"]
        damage_at(file_bytes(path).index(image.blobs[digest]) + 5)(path)
        self.refused(serve_ask(self.serve(path), "/v2/lab/docker/blobs/" + digest), 500)

    def test_blob_that_changes_after_it_was_served(self):
        def flip_and_put_back_its_time(path):
            damage_flip(path)
            os.utime(path, (1, 1))

        path, digest, blob = self.copied()
        host, url = self.serve(path), "/v2/lab/oci/blobs/" + digest
        good = file_bytes(blob)
        for change in (damage_flip, flip_and_put_back_its_time, damage_cut, os.unlink):
            with self.subTest(change.__name__):
                os.utime(write_file(blob, good), (1, 1))
                self.assertEqual(serve_ask(host, url).body, good)
                time.sleep(0.02)  # clocks of file systems tick every few milliseconds
                change(blob)
                self.refused(serve_ask(host, url), 500)

    #: (what becomes of a file between the proof of it and its way out, how)
    CHANGES = (("shrinks", lambda path: os.truncate(path, 5000)),
               ("emptied", lambda path: os.truncate(path, 0)), ("removed", remove))

    @rows((name, change, tls) for name, change in CHANGES for tls in (False, True))
    def test_blob_that_changes_on_its_way_out(self, _, change, tls):
        data = b"0123456789" * 1000
        shelf, digest, path = self.shelf_of(data)
        proved = shelf.blob

        def blob(wanted):
            found = proved(wanted)
            change(path)
            return found

        shelf.blob = blob
        host = self.serve(shelf, tls=self.pair() if tls else None)
        with threat_alarm(60):  # the client is not left waiting
            try:
                answer = serve_ask(host, "/v2/lab/app/blobs/" + digest,
                                   tls=self.client_context() if tls else None)
            except http.client.IncompleteRead as error:
                self.assertTrue(data.startswith(error.partial), error.partial[:80])
            except (http.client.HTTPException, ConnectionError, ssl.SSLError):
                pass  # cut off before there was any of it
            else:
                self.refused(answer, 500)

    # -- who may ask

    @rows(itertools.product(SERVE_LOGINS, (
        "/v2/", "/v2/lab/docker/manifests/1", "/v2/_catalog")))
    def test_basic_authentication(self, login, path):
        header, good = login
        host = self.archived(imagec.Credentials("alice", PASSWORD))
        answer = serve_ask(host, path, headers={} if header is None else {
            "Authorization": header})
        if good:
            self.assertEqual(answer.status, 200)
        else:
            self.refused(answer, 401, "UNAUTHORIZED")
            self.assertRegex(answer.headers["WWW-Authenticate"], '^Basic realm="')

    def test_secret_is_compared_in_constant_time(self):
        host = self.serve(self.archive, imagec.Credentials("alice", PASSWORD))
        with mock.patch.object(hmac, "compare_digest", return_value=False) as compare:
            answer = serve_ask(host, "/v2/", headers={
                "Authorization": "Basic " + SERVE_ALICE})
        self.assertEqual(answer.status, 401)
        compare.assert_called_once()

    # -- TLS

    def test_tls(self):
        host = self.serve(self.layout, tls=self.pair())
        image = self.images["lab/oci"]
        digest = image.layers[1]
        path = "/v2/lab/oci/blobs/" + digest
        context = self.client_context()
        self.assertEqual(serve_ask(host, path, tls=context).body, image.blobs[digest])
        part = serve_ask(host, path, "GET", {"Range": "bytes=10-29"}, tls=context)
        self.assertEqual(part.body, image.blobs[digest][10:30])
        pulled = self.pulled(host, "lab/oci:1", cacert=self.at("cert.pem"))
        self.assertEqual(str(pulled.digest), image.digest)

    def test_tls_is_patient_with_nobody(self):
        host = self.serve(self.archive, tls=self.pair())
        context = self.client_context()
        with mock.patch.object(sys, "stderr", io.StringIO()) as err, \
                serve_connect(host):
            self.assertNotIn(b"200 OK", serve_raw(
                host, b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"))
            self.assertEqual(serve_ask(host, "/v2/", tls=context).status, 200)
        self.assertEqual((err.getvalue(), self.said), ("", []))


# -- The serve command

#: (--listen, what the printed URL begins with)
SERVE_LISTENS = (
    ("127.0.0.1:0", "http://127.0.0.1:"),
    ("localhost:0", "http://localhost:"),
    (":0", "http://127.0.0.1:"),
    ("[::1]:0", "http://[::1]:"),
    ("::1:0", "http://[::1]:"),
)

SERVE_BAD_LISTENS = ("x", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:-1",
                     "127.0.0.1:70000", "127.0.0.1:99999", "127.0.0.1:1 ", "",
                     "127.0.0.1:\u0661")


class ServeCommandTest(ServeCase):
    """The command: its first line, its errors, its end."""

    def run_it(self, *argv, path=None, **options):
        """Serve what is at a path, the archive, until all is ready."""
        return self.main("serve", path or self.archive, "--listen", "127.0.0.1:0",
                         *argv, **options)

    @rows(SERVE_LISTENS)
    def test_first_line(self, listen, url):
        # Behind an air gap looking names up takes until its time is up.
        with mock.patch.object(socket, "getfqdn", side_effect=AssertionError), \
                mock.patch.object(socket, "gethostbyaddr", side_effect=AssertionError):
            run = self.run_it("--listen", listen)
        if "::1" in listen and "cannot listen on" in run.err:
            cannot("listen on ::1")
        self.assertEqual(run.status, 130, run.err)
        self.assertRegex(run.out, r"\A[^\n]*%s[1-9][0-9]*/v2/: lab/docker\n\Z"
                         % re.escape(url))
        self.assertIn(self.archive, run.out)

    def test_loopback_is_the_default(self):
        args = self.parser().parse_args(["serve", "x"])
        self.assertEqual(args.listen, "127.0.0.1:5000")

    @rows((listen,) for listen in SERVE_BAD_LISTENS)
    def test_bad_listen(self, listen):
        self.failed(self.run_it("--listen", listen), 2, "--listen")

    def test_port_in_use(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            address = "127.0.0.1:%d" % taken.getsockname()[1]
            run = self.run_it("--listen", address)
            self.failed(run, 1, address)
            self.assertNotIn("-o", run.err)

    @rows((("foreign/file", b"text", 1), ("foreign/a/manifest.json", b"{}", 1),
           ("empty", None, 1), ("absent", None, 1),
           ("text", b"some text\n" * 200, 3), ("nothing", b"", 3),
           ("tar", SERVE_TARS[0], 1), ("blank", bytes(10240), 3)))
    def test_path_that_holds_nothing(self, name, data, status):
        if name == "empty":
            os.mkdir(self.at(name))
        elif data is not None:
            write_file(self.at(name), data)
        path = self.at(name.partition("/")[0])
        self.failed(self.run_it(path=path), status, path)

    @rows((("rootfs",), ("rootfs.tar",)))
    def test_flattened_image_cannot_be_served(self, name):
        imagec.pull(self.serve(self.archive) + "/lab/docker:1", self.at(name), "rootfs",
                    platform="linux/amd64", no_creds=True)
        self.failed(self.run_it(path=self.at(name)), 1, self.at(name))

    @rows(((data,) for data in (b"{", b"[]", b'{"manifests": 5}', b"")))
    def test_broken_layout(self, content):
        remove(self.at("layout"))
        path, _, _ = self.copied()
        write_file(os.path.join(path, "index.json"), content)
        self.failed(self.run_it(path=path), 1, "index.json", "holds nothing")

    def test_bad_certificates(self):
        cert, _ = self.pair()
        self.failed(self.run_it("--tls-cert", cert), 2, "--tls-key")
        self.failed(self.run_it("--tls-key", cert), 2, "--tls-cert")
        for key in (cert, self.at("absent")):
            self.failed(self.run_it("--tls-cert", cert, "--tls-key", key), 2,
                        "cert.pem" if key == cert else "No such file")

    def test_sigterm(self):
        cert, key = self.pair()
        process, line = self.process(
            self.layout, "--listen", "127.0.0.1:0", "--tls-cert", cert, "--tls-key",
            key, "-u", "alice", "--password-stdin", stdin=PASSWORD.encode() + b"\n")
        host = re.search("https://(127.0.0.1:[0-9]+)/v2/", line).group(1)
        context = self.client_context()
        self.assertEqual(serve_ask(host, "/v2/", tls=context).status, 401)
        answer = serve_ask(host, "/v2/lab/oci/manifests/1", tls=context, headers={
            "Authorization": "Basic " + SERVE_ALICE})
        self.assertEqual(answer.body, self.images["lab/oci"].manifest)
        with serve_connect(host):
            self.ended(process, signal.SIGTERM, 143)

    def test_sigint(self):
        process, line = self.process(self.tree, "--listen", "127.0.0.1:0")
        host = re.search("http://(127.0.0.1:[0-9]+)/v2/", line).group(1)
        with serve_connect(host) as sock:
            sock.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(sock.recv(1000).startswith(b"HTTP/1.1 200 "))
            self.ended(process, signal.SIGINT, 130)

    def ended(self, process, number, status):
        process.send_signal(number)
        self.assertEqual(process.wait(60), status)
        self.assertRegex(process.stderr.read(), rb"\Aimagec: [^\n]+\n\Z")
        self.assertEqual(process.stdout.read(), b"")


# --------------------------------------------------------------------------------------
# 19  Self-test
# --------------------------------------------------------------------------------------

SERVE_ROWS = ("Python", "TLS", "layers in", "CA roots", "proxies for", "disk here")
SERVE_DEAD_PROXY = "http://user:%s@127.0.0.1:9" % PASSWORD


class SelfTestTest(ServeCase):
    """The first command: what it says of hosts that can pull, and that cannot."""

    @classmethod
    def _fill(cls):
        pass  # it brings its own images

    def proved(self, run):
        """A good run: every row, every format, and the verdict."""
        self.assertEqual(run.status, 0, run.out + run.err)
        for row in SERVE_ROWS + ("proved",):
            self.assertRegex(run.out, "(?m)^%s +[^ ]" % re.escape(row))
        for format in IMAGE_FORMATS:
            self.assertRegex(run.out, "(?m)^proved +%s$" % format)
        self.assertRegex(run.out, "(?m)^proved .*tampered.* refused$")
        self.assertEqual(run.out.splitlines()[-1], "this host can pull images")
        self.assertNotIn("Traceback", run.err)
        self.assertNotIn(PASSWORD, run.out + run.err)

    def hasty(self, *argv, **environ):
        """A run without the pulls."""
        with mock.patch.object(imagec, "pull_test_image", return_value=["stub"]):
            return self.main("selftest", *argv, **environ)

    def test_good_host(self):
        with cpu_within(3), mock.patch.object(tempfile, "tempdir", self.work):
            run = self.main("selftest")
        self.proved(run)
        self.assertEqual(run.err, "")
        self.assertLess(len(run.out.splitlines()), 25)
        self.assertEqual(os.listdir(self.work), [])

    def test_odd_host(self):
        """Dead proxies, no zstd, no bzip2: it still can pull."""
        dead = {name: SERVE_DEAD_PROXY for name in (
            "http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY")}
        missing = {name: None for name in ("bz2", "compression.zstd", "_bz2")}
        with mock.patch.dict(os.environ, dead), \
                mock.patch.dict(sys.modules, missing), \
                mock.patch.object(shutil, "which", return_value=None):
            run = self.main("selftest")
        self.proved(run)
        codecs = re.search("(?m)^layers in +(.*)$", run.out).group(1)
        self.assertNotRegex(codecs, "bzip2|zstd")
        self.assertRegex(run.out, "(?m)^proxies for +all, http, https$")

    @rows((((), 1), (("--cacert", "{roots}"), 0), (("{host}",), 1),
           (("{host}", "--insecure-skip-verify"), 0)))
    def test_no_roots(self, argv, code):
        host, roots = self.registry().host, self.file("roots.pem", TEST_CERT)
        run = self.hasty(*[word.format(roots=roots, host=host) for word in argv],
                         SSL_CERT_FILE=os.devnull, SSL_CERT_DIR="/none")
        row = re.search("(?m)^CA roots .*", run.out).group()
        self.assertEqual("none: install the package ca-certificates" in row, code, row)
        self.assertEqual(run.status, code, run.err)
        self.assertEqual("this host can pull images" in run.out, not code)

    @rows(((error,) for error in (
        imagec.TransportError("no way"), imagec.DigestMismatch("blob", "a", "b"),
        imagec.InvalidDocument("bad"), OSError(28, "full"))))
    def test_pull_that_fails(self, error):
        with mock.patch.object(imagec, "pull", side_effect=error):
            self.failed(self.main("selftest"), 1)

    @rows(((["layer.tar: is not what it was"], "is not what it was"),
           ([], "tampered")))
    def test_pull_that_is_too_good(self, faults, words):
        audit = mock.Mock()
        audit.check.return_value.faults = faults
        with mock.patch.object(imagec, "pull"), \
                mock.patch.object(imagec, "Audit", return_value=audit):
            self.failed(self.main("selftest"), 1, words)

    # -- of a registry

    @rows(((None, False, "nothing"), ("basic", False, "[Bb]asic"),
           ("bearer", False, "[Bb]earer http://127.0.0.1:[0-9]+/token"),
           ("bearer", True, "[Bb]earer https://")))
    def test_registries(self, auth, tls, words):
        registry = self.registry(auth=auth, tls=tls)
        run = self.hasty(registry.host)
        self.assertEqual(run.status, 0, run.err)
        self.assertRegex(run.out, "(?m)^registry +%s/v2/$" % registry.url)
        self.assertRegex(run.out, "(?m)^asks for +" + words)
        self.assertEqual("we would be  anonymous\n" in run.out, auth is not None)

    @rows(((("--no-creds",), {"DOCKER_CONFIG": "{work}"}, "anonymous$"),
           ((), {"DOCKER_CONFIG": "{work}"}, ".*alice"),
           (("--authfile", "{work}/config.json"), {}, ".*alice"),
           (("-u", "alice"), {"IMAGEC_PASSWORD": PASSWORD}, ".*alice")))
    def test_who_we_would_be(self, argv, environ, who):
        registry = self.registry(auth="basic")
        write_file(self.at("config.json"), json_bytes(
            {"auths": {registry.host: {"auth": SERVE_ALICE}}}))
        run = self.hasty(registry.host, *[word.format(work=self.work) for word in argv],
                         **{name: value.format(work=self.work)
                            for name, value in environ.items()})
        self.assertEqual(run.status, 0, run.err)
        self.assertRegex(run.out, "(?m)^we would be +" + who)
        self.assertEqual("lets us in   yes\n" in run.out, who != "anonymous$")
        self.assertNotIn(PASSWORD, run.out + run.err)

    @rows((("basic", "", []), ("basic", "/app", []), ("bearer", "", [None]),
           ("bearer", "/app", [["repository:app:pull"]])))
    def test_a_password_is_tried(self, auth, repository, scopes):
        registry = self.registry(auth=auth)
        for password, code, words in (
                ("S3CR3T-WRONG", 5, "imagec: .*user alice.*; check the .*password.*\n"),
                (PASSWORD, 0, "")):
            del registry.requests[:]
            run = self.hasty(registry.host + repository, "-u", "alice",
                             IMAGEC_PASSWORD=password)
            self.assertEqual(run.status, code, run.err)
            self.assertRegex(run.err, r"\A%s\Z" % words)
            self.assertEqual([request.query.get("scope") for request in
                              registry.requests if request.route == "/token"], scopes)

    def test_a_password_that_is_withheld_is_not_tried(self):
        tokens = self.registry(auth="bearer")
        realm = tokens.url.replace("127.0.0.1", "localhost")
        registry = self.registry(auth="bearer", realm=realm + "/token")
        run = self.hasty(registry.host, "-u", "alice", IMAGEC_PASSWORD=PASSWORD)
        self.assertEqual(run.status, 1, run.err)
        self.assertRegex(run.out, "(?m)^lets us in .*--token-host localhost:.*not enough")
        self.assertEqual(authorizations(tokens), [])

    def test_registries_that_are_none(self):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            closed = "127.0.0.1:%d" % sock.getsockname()[1]
        empty, untrusted = self.registry(), self.registry(tls="expired")
        empty.fault("/v2/", status(404), times=None)
        for host in (closed, empty.host, untrusted.host):
            self.failed(self.hasty(host), 1, host)

    def test_bad_host(self):
        self.assertEqual(self.main("selftest", "-x", "y z").status, 2)
        self.assertEqual(self.hasty("no such host").status, 2)


# --------------------------------------------------------------------------------------
# 20  Command line
# --------------------------------------------------------------------------------------

#: What no terminal may get from a server: C0, DEL, C1, marks that turn text around.
UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e"
                         "\u2066-\u2069\ud800-\udfff]")
POISON = "\x1b]0;x\x07\x1b[31m\x9b31m\u202e\r\nimagec: all is well\x7f\x08"


class FakeTerminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


class TerminalOutput(io.TextIOWrapper):
    """The same for standard output, which has a `buffer` of bytes."""

    def isatty(self):
        return True


class CommandLineCase(RegistryCase):
    """A registry with one small image, and imagec.main to run against it."""

    def setUp(self):
        super().setUp()
        # The command line's own handler is the one that counts.
        self.patch(mock.patch.object(imagec.log, "handlers", []))
        self.output = os.path.join(self.root, "images")
        self.origin = self.registry()
        self.image = build_image(FIELD_SMALL)
        self.digest = self.origin.add("lab/app", "1", self.image)
        self.ref = self.origin.host + "/lab/app:1"

    def pull(self, *argv, **options):
        return self.main("pull", "-o", self.output, *argv, **options)

    def done(self, *argv, **options):
        """The lines a command prints, which must succeed."""
        ended = self.main(*argv, **options)
        self.assertEqual((ended.status, ended.err), (0, ""))
        return ended.out.decode("ascii").splitlines()

    def files(self):
        """What stands in the destination, without its directories."""
        return sorted(contents(self.output))

    def assert_nothing_final(self):
        """Only verified blobs and unfinished ones may be left by a failed pull."""
        for name in self.files():
            self.assertRegex(name, r"\.partial$|/([0-9a-f]{64})/\1\.tar$")
            if name.endswith(".tar"):
                data = file_bytes(os.path.join(self.output, name))
                self.assertIn(sha256(data), self.image.layers)


def ordered(text):
    """JSON with its objects as lists of pairs, so that the order counts."""
    return json.loads(text, object_pairs_hook=collections.OrderedDict)


class CommandLineTest(CommandLineCase):
    """Every command, as a script sees it."""

    def test_pull_prints_what_it_pinned(self):
        bare = self.origin.host + "/lab/app"
        for reference in (self.ref, bare + "@" + self.digest,
                          self.ref + "@" + self.digest):
            pinned = reference.partition("@")[0] + "@" + self.digest
            self.assertEqual(self.done("pull", "-q", "-o", self.output, reference),
                             [pinned])
        both = self.done("pull", "-q", "-o", self.output, self.ref, self.ref)
        self.assertEqual(both, [self.ref + "@" + self.digest] * 2)

    def test_pull_uses_images_by_default(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.root)
        self.done("pull", "-q", self.ref)
        path = os.path.join("http", self.origin.host, "v2", "lab", "app", "1")
        self.assertEqual(file_bytes(os.path.join(self.output, path, "manifest.json")),
                         self.image.manifest)

    def test_pull_json(self):
        line, = self.done("pull", "-q", "--json", "-o", self.output, self.ref)
        value = ordered(line)
        self.assertEqual(list(value.items())[:5], [
            ("reference", self.ref), ("digest", self.digest),
            ("image_id", sha256(self.image.config)), ("platform", "linux/amd64"),
            ("format", "layers")])
        self.assertEqual(list(value)[5:], ["path", "without", "layers"])
        self.assertTrue(os.path.isfile(os.path.join(value["path"], "manifest.json")))
        self.assertEqual([list(layer) for layer in value["layers"]],
                         [["id", "digest", "diff_id", "size", "blob_size"]] * 2)
        self.assertEqual([layer["size"] for layer in value["layers"]], [3, 3000])
        self.assertEqual([layer["diff_id"] for layer in value["layers"]],
                         self.image.diff_ids)

    def test_layers(self):
        rows = [line.split() for line in self.done("layers", self.ref)]
        self.assertEqual([row[1] for row in rows], self.image.layers)
        self.assertEqual([int(row[2]) for row in rows],
                         [len(self.image.blobs[name]) for name in self.image.layers])
        values = list(map(ordered, self.done("layers", "--json", self.ref)))
        self.assertEqual([list(value) for value in values],
                         [["id", "digest", "diff_id", "blob_size"]] * 2)
        self.assertEqual([(value["id"], value["digest"]) for value in values],
                         [(row[0], row[1]) for row in rows])

    def test_schema1(self):
        image = build_image(FIELD_SMALL, "schema1-signed")
        digest = self.origin.add("lab/app", "old", image)
        ref = self.origin.host + "/lab/app:old"
        self.assertEqual(self.done("pull", "-q", "-o", self.output, ref),
                         [ref + "@" + digest])
        rows = [line.split() for line in self.done("layers", ref)]
        self.assertEqual([row[1:] for row in rows],
                         [[layer, "-"] for layer in image.layers])
        self.assertEqual(self.main("inspect", "--raw", ref).out, image.manifest)
        self.assert_one_line(self.main("inspect", "--config", ref), 1, "no config")

    def test_inspect(self):
        value = ordered("\n".join(self.done("inspect", self.ref)))
        self.assertEqual(list(value), [
            "reference", "digest", "media_type", "manifest_digest", "image_id",
            "platform", "artifact_type", "total_size", "layers", "created", "config",
            "history",
            "platforms", "referrers"])
        self.assertEqual(value["reference"], self.ref + "@" + self.digest)
        self.assertEqual(value["media_type"], self.image.media_type)
        self.assertEqual([layer["digest"] for layer in value["layers"]],
                         self.image.layers)
        self.assertEqual(value["total_size"], sum(map(len, self.image.blobs.values())))
        self.assertEqual(self.files(), [])

    @rows([({}, True), ({"history": [{"empty_layer": True, "size": 5}]}, False),
           ({"history": [{"created_by": "x"}] * 3}, False),
           ({"history": {"a": 1}}, False), ({"history": [5, {}]}, False)])
    def test_history_with_the_layers_lined_up(self, changed, lined_up):
        image = build_image([FIELD_SMALL[0], None, FIELD_SMALL[1]], **changed)
        self.origin.add("lab/app", "2", image)
        value = ordered("\n".join(self.done("inspect", self.ref[:-1] + "2")))
        found = [(step["digest"], step["size"]) for step in value["history"]]
        if lined_up:
            first, last = [(one, len(image.blobs[one])) for one in image.layers]
            self.assertEqual(found, [first, (None, 0), last])
            self.assertEqual(value["history"][2]["created_by"], _command(2, b""))
        else:
            self.assertEqual({digest for digest, _ in found} - {None}, set())

    def test_index(self):
        arm = build_image(FIELD_SMALL[:1], platform=("linux", "arm64", "v8"))
        index = build_index([(self.image, ("linux", "amd64", None)),
                             (arm, ("linux", "arm64", "v8"))])
        digest = self.origin.add("lab/app", "many", index)
        ref = self.origin.host + "/lab/app:many"
        choose = ("--platform", "linux/arm64", ref)
        self.assertEqual(self.done("digest", ref), [digest])
        self.assertEqual(self.done("digest", *choose), [arm.digest])
        self.assertEqual(self.main("inspect", "--raw", ref).out, index.manifest)
        self.assertEqual(self.main("inspect", "--raw", *choose).out, arm.manifest)
        self.assertEqual(self.done("pull", "-q", "-o", self.output, *choose),
                         [ref + "@" + digest])
        value = ordered("\n".join(self.done("inspect", *choose)))
        self.assertEqual((value["digest"], value["manifest_digest"]),
                         (digest, arm.digest))
        sizes = [sum(map(len, one.blobs.values())) for one in (self.image, arm)]
        rows = [{"platform": name, "digest": one.digest, "size": len(one.manifest),
                 "total_size": size} for name, one, size in zip(
                     ("linux/amd64", "linux/arm64"), (self.image, arm), sizes)]
        whole = json.loads(self.main("inspect", "--platform", "all", ref).out.decode())
        self.assertEqual(whole["platforms"], rows)
        self.assertEqual(whole["total_size"], sum(sizes) - sum(
            len(self.image.blobs[one]) for one in arm.layers))  # it is in both
        rows[0]["total_size"] = None  # it was not looked at
        self.assertEqual(value["platforms"], list(map(ordered, map(json.dumps, rows))))

    def test_an_artifact_and_what_buildkit_writes_of_an_image(self):
        proof = build_artifact([("application/vnd.in-toto+json", b"{}", None)])
        index = build_index([(self.image, ("linux", "amd64", None))], extra_entries=[
            proof.descriptor(platform={"os": "unknown", "architecture": "unknown"},
                             annotations={
                                 "vnd.docker.reference.digest": self.digest,
                                 "vnd.docker.reference.type": "attestation-manifest"})])
        index.children.append(proof)
        ref = self.ref[:-1] + "2"
        self.origin.add("lab/app", "2", index)
        value = json.loads("\n".join(self.done("inspect", "--platform", "amd64", ref)))
        self.assertEqual(value["referrers"], [
            {"subject": self.digest, "type": "attestation-manifest", "tag": None,
             "digest": proof.digest, "size": len(proof.manifest)}])
        value = json.loads("\n".join(self.done(
            "inspect", ref[:-2] + "@" + proof.digest)))
        self.assertEqual((value["artifact_type"], value["platform"]),
                         ("application/vnd.example", None))

    def test_what_refers_to_it(self):
        found = (("sbom", referring(self.image), None, SPDX),
                 ("signature", signature(), tag_of(self.image, ".sig"), SIMPLE_SIGNING))
        for name, one, tag, kind in found:
            self.origin.add("lab/app", tag, one)
        value = json.loads("\n".join(self.done("inspect", self.ref)))
        self.assertEqual(value["referrers"], [
            {"subject": self.digest, "tag": tag or tag_of(self.image), "type": kind,
             "digest": one.digest, "size": len(one.manifest)}
            for name, one, tag, kind in found])
        self.origin.fault("/referrers/", status(403), EVER)
        for argv, words in (([self.ref], "403"), ([
                "lab.invalid/lab/app:1", "--mirror", self.origin.host], "only a mirror")):
            ended = self.main("inspect", *argv)
            self.assertIsNone(json.loads(ended.out.decode())["referrers"])
            self.assertRegex(ended.err, r"\Aimagec: warning: what refers to it cannot be "
                             "told: .*" + words)

    #: Newest first.
    VERSIONS = ("20240101", "v10.0", "3.20.1", "3.20-slim", "3.20", "3.20rc2",
                "3.20-RC.1", "3.20-beta", "3.20b1", "3.20_alpha2", "3.20a10", "3.20a9",
                "3.9", "v3", "dev-1", "alpha1")

    @rows((((), "no-digit 3.9 v3 latest sha256-%s.sig" % ("a1" * 32)),
           (("--match", "*[0-9]"), "3.9 v3"),
           (("--newest", "9", "--match", "?*"), "3.9 v3"),
           (("--newest", "1", "--full"), "NAME:3.9"), (("--match", "3"), ""),
           (("--match", "v*", "--full", "--json"),
            '{"tag":"v3","reference":"NAME:v3"}')))
    def test_tags(self, options, wanted):
        for tag in ("no-digit", "3.9", "v3", "latest", "sha256-%s.sig" % ("a1" * 32)):
            self.origin.add("lab/tags", tag, self.image)
        name = self.origin.host + "/lab/tags"
        found = " ".join(line.replace(" ", "").replace(name, "NAME") for line in
                         self.done("tags", *options, name))
        self.assertEqual(sorted(found.split()), sorted(wanted.split()))

    def test_tags_by_version(self):
        self.assertEqual(sorted(self.VERSIONS[::-1], key=imagec.version_key,
                                reverse=True), list(self.VERSIONS))
        for wrong in ("0", "-1", "x"):
            self.assert_one_line(self.main("tags", "--newest=" + wrong, self.ref), 2,
                                 "--newest")

    @rows((("layers",), ("oci",), ("archive",)))
    def test_keep_going(self, format):
        bad = [build_image([tar_bytes([(name, noise(3000))])]) for name in "ab"]
        for name, image in zip("ab", bad):
            self.origin.add("lab/bad", name, image)
            self.origin.fault("/blobs/" + image.layers[0], flip())
        self.origin.add("lab/good", "2", build_image([tar_bytes([(format, b"")])]))
        host, self.output = self.origin.host, self.at(format)
        listed = "{0}/lab/no:1\n\n{0}/LAB\n{0}/lab/bad:a\n{0}/lab/good:2\n".format(host)
        ended = self.pull("--format", format, "--keep-going", self.ref, host + "/lab/bad:b",
                          "--from-file", "-", stdin=listed)
        self.assertEqual(ended.status, 2, ended.err)
        self.assertEqual(re.findall("lab/(.*)@", ended.out.decode()), ["app:1", "good:2"])
        self.assertEqual(faults_of(self.output), [])
        *_, invalid, missing, first, second, last = ended.err.splitlines()
        self.assertEqual(last, "imagec: failed: 4")
        for line, words in (
                (invalid, "failed: standard input, line 3: invalid reference"),
                (missing, "failed: %s/lab/no:1: " % host),
                (first, "failed: %s/lab/bad:b: " % host),
                (second, "failed: %s/lab/bad:a: layer" % host)):
            self.assertIn(words, line)

    def test_keep_going_with_nothing_left(self):
        place = self.at("x.tar")
        for names, options in (
                (("no", "none"), ()), (("no", "none"), ("--dry-run",)),
                (("no", "app:1"), ("-o", place))):
            if "app:1" in names:
                self.origin.fault("/blobs/" + self.image.layers[0], flip())
            ended = self.pull("--keep-going", *options, *[
                self.origin.host + "/lab/" + name for name in names])
            self.assertEqual(ended.status, 4, ended.err)
            self.assertIn("\nimagec: failed: 2\n", ended.err)
            self.assertEqual((self.files(), os.path.exists(place)), ([], False))

    def test_a_stream_goes_on_past_what_is_not_there_alone(self):
        bad = build_image([tar_bytes([("a", noise(3000))])])
        self.origin.add("lab/bad", "1", bad)
        host = self.origin.host
        self.origin.fault("/blobs/" + bad.layers[0], flip())
        for name, expect in ("bad:1", 3), ("no", 4):
            ended = self.main("pull", "-o", "-", "--keep-going", self.ref,
                              host + "/lab/" + name)
            self.assertEqual(ended.status, expect, ended.err)
        self.assertEqual(faults_of(self.file("work/out.tar", ended.out)), [])

    def test_version_and_help(self):
        for option, words in (("--version", r"\Aimagec %s\n\Z" % imagec.__version__),
                              ("--help", "(?s)" + ".*".join(imagec.COMMANDS))):
            with self.assertRaises(SystemExit) as caught, \
                    contextlib.redirect_stdout(io.StringIO()) as out:
                imagec.main([option])
            self.assertEqual(caught.exception.code, 0)
            self.assertRegex(out.getvalue(), words)

    def test_debug_logs_each_request_and_where_an_error_came_from(self):
        for tag, status, out, words in (
                ("1", 0, self.digest + "\n", "^imagec: debug: GET http://.*/manifests/1$"),
                ("x", 4, "", "^imagec: debug: Traceback")):
            ended = self.main("digest", "--debug", self.ref[:-1] + tag)
            self.assertEqual((ended.status, ended.out.decode("ascii")), (status, out))
            self.assertRegex(ended.err, "(?m)" + words)
            self.assertRegex(ended.err, r"\A(imagec: [^\n]+\n)+\Z")

    def test_quiet_keeps_errors(self):
        self.assertEqual(self.pull("-q", self.ref).err, "")
        self.assert_one_line(self.pull("-q", self.origin.host + "/lab/none"), 4)

    def test_retries_are_told_unless_quiet(self):
        for quiet in ((), ("-q",)):
            self.origin.fault("manifests", status(503), times=1)
            ended = self.main("digest", self.ref, *quiet)
            self.assertEqual(ended.status, 0)
            self.assertEqual("trying again" in ended.err, not quiet)

    def test_logging_is_left_as_it_was(self):
        log = logging.getLogger("imagec")
        before = log.level, list(log.handlers)
        self.main("digest", "--debug", self.ref)
        self.main("digest", "--debug", "Bad")
        self.assertEqual((log.level, list(log.handlers)), before)

    def test_every_error_has_its_status(self):
        expected = {"UsageError": 2, "InvalidReference": 2, "InvalidDocument": 3,
                    "LimitExceeded": 3, "VerificationError": 3, "DigestMismatch": 3,
                    "SizeMismatch": 3, "NotFound": 4, "NoMatchingPlatform": 4,
                    "AccessDenied": 5, "CredentialsError": 5}
        errors = [kind for kind in map(imagec.__dict__.get, imagec.__all__)
                  if isinstance(kind, type) and issubclass(kind, Exception)]
        for kind in errors + [OSError]:
            self.assertEqual(imagec.exit_status(kind.__new__(kind)),
                             expected.get(kind.__name__, 1), kind)
        self.assertIsNone(imagec.exit_status(ZeroDivisionError()))


class OnDiskTest(CommandLineCase):
    """What is at a path is looked at as what is in a registry."""

    def setUp(self):
        super().setUp()
        self.arm = build_image(FIELD_SMALL[:1], platform=("linux", "arm64", None))
        self.index = build_index([(self.image, ("linux", "amd64", None)),
                                  (self.arm, ("linux", "arm64", None))])
        self.origin.add("lab/app", "many", self.index)
        self.many = self.ref[:-1] + "many"

    def put(self, path, *argv):
        """Pull; the path."""
        self.done("pull", "-q", "-o", self.at(path), *argv)
        return self.at(path)

    def asked(self, *argv):
        """What a command prints that reads from disk, and asks no registry."""
        before = len(self.origin.requests)
        ended = self.main(*argv)
        self.assertEqual((ended.status, len(self.origin.requests)), (0, before),
                         ended.err)
        self.assertRegex(ended.err, r"\Aimagec: reading what is at the path [^\n]*\n\Z")
        return ended.out.decode()

    @rows([("layers", "docker"), ("oci", "oci"), ("archive", "docker"),
           ("oci", "schema1"), ("layers", "schema1")])
    def test_what_is_told_is_what_the_registry_tells(self, format, kind):
        self.clear()
        self.origin.add("lab/app", "2", build_image(FIELD_SMALL, kind))
        ref = self.ref[:-1] + "2"
        path = self.put("out", "--format", format, ref)
        commands = [line.split() for line in (
            "inspect", "inspect --raw", "inspect --config", "layers", "digest",
            "digest --platform all", "layers --json")]
        for command in commands if kind != "schema1" else [] if format == "oci" else (
                commands[1:2] + commands[3:]):
            wanted = self.main(*command, ref)
            self.assertEqual(self.asked(*command, path), wanted.out.decode())
        if kind == "schema1":
            self.assertIn(self.ref[:-1], json.loads(self.asked("inspect", path))[
                "reference"])

    def test_one_platform_of_an_index(self):
        for format in imagec.OUTPUTS:
            if format in ("rootfs", "files"):
                continue
            path = self.put(format, "--format", format, "--platform", "linux/arm64",
                            self.many)
            self.assertEqual(self.asked("digest", path), self.index.digest + "\n")
            self.assertEqual(self.asked("inspect", "--raw", path).encode(),
                             self.index.manifest)
            value = json.loads(self.asked("inspect", path))
            self.assertEqual((value["reference"], value["digest"]), (
                self.many + "@" + self.index.digest, self.index.digest))
            self.assertEqual([one["total_size"] for one in value["platforms"]], [
                None, sum(map(len, self.arm.blobs.values()))])

    def test_all_of_an_index(self):
        path = self.put("out", "--format", "oci", "--platform", "all", self.many)
        for platform, image in (("linux/amd64", self.image), ("arm64", self.arm)):
            self.assertEqual(self.asked("digest", "--platform", platform, path),
                             image.digest + "\n")
        value = json.loads(self.asked("inspect", "--platform", "all", path))
        self.assertNotIn(None, [one["total_size"] for one in value["platforms"]])
        os.unlink(os.path.join(path, "blobs", *self.image.digest.split(":")))
        self.asked("inspect", "--platform", "arm64", path)  # the rest need not be there

    def test_what_refers_to_it(self):
        self.origin.add("lab/app", None, referring(self.image))
        self.origin.add("lab/app", tag_of(self.index, ".sig"), signature())
        wanted = json.loads(self.main("inspect", self.many).out.decode())["referrers"]
        self.assertEqual(len(wanted), 2)
        for format in ("oci", "archive"):
            path = self.put(format, "--format", format, "--referrers", self.many)
            name = ("--image", "many") if format == "oci" else ()
            value = json.loads(self.asked("inspect", path, *name))
            self.assertEqual(value["referrers"], wanted)

    def test_one_of_several(self):
        path = self.put("x.tar", self.ref, self.many)
        for command in ("inspect", "layers", "digest"):
            self.assert_one_line(
                self.main(command, "-q", path), 2, "x.tar holds %s, %s; "
                "choose one with --image" % (self.ref, self.many))
        for name in (self.many, "app:many", "lab/app:many", "many"):
            self.assertEqual(self.asked("digest", path, "--image", name),
                             self.index.digest + "\n")
        for name in ("any", "lab/app", ".*", "app:man", ""):
            self.assert_one_line(self.main("digest", "-q", path, "--image", name), 2,
                                 "choose one")

    def test_what_has_no_name(self):
        by_digest = self.ref[:-2] + "@" + self.digest
        path = self.put("x.tar", by_digest)
        value = json.loads(self.asked("inspect", path))
        self.assertEqual(value["reference"], by_digest)
        self.assertEqual(self.asked("digest", path, "--image", self.digest),
                         self.digest + "\n")

    def test_what_is_a_path(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.work)
        self.put("a/x.tar", self.ref)
        self.put("a/lab", "--format", "oci", self.ref)
        self.put("X.TAR", "--format", "archive", self.ref)
        os.environ["HOME"] = self.at("a")
        above = os.path.join(os.pardir, os.path.basename(self.work))
        for path in ("a/x.tar", "./a/lab", self.at("a", "lab"), "~/lab", "X.TAR",
                     above + "/a/lab", "./X.TAR"):
            self.assertEqual(self.asked("digest", path), self.digest + "\n")
        os.chdir("a/lab")
        for path in (".", "../lab"):
            self.asked("digest", path)
        os.chdir("..")
        for word, words in (
                ("lab", r"for the layout here write \./lab\n"), ("y.tar", r"\A"),
                (".\\lab", "path"), ("C:\\x.tar", "path"), ("/none", "path")):
            ended = self.main("digest", "--mirror", "127.0.0.1:1", "--proxy",
                              "http://127.0.0.1:1", word)
            self.assertNotEqual(ended.status, 0)
            self.assertRegex(ended.err, words)
            self.assertEqual("reading what" in ended.err, words == "path")

    @rows([("config", "config: expected digest", 3), ("manifest", "expected digest", 3),
           ("no config", "No such file", 1), ("no manifest", "lacks blobs/sha256/", 1),
           ("no index", "holds no image", 2), ("nothing", "holds no image", 2)])
    def test_what_is_not_as_it_was(self, what, words, code):
        self.clear()
        path = self.put("out", "--format", "oci", self.ref)
        blob = sha256(self.image.config) if "config" in what else self.digest
        blob = os.path.join(path, "blobs", *blob.split(":"))
        if what == "nothing":
            self.clear()
            os.mkdir(path)
        elif what.startswith("no "):
            os.unlink(os.path.join(path, "index.json") if what == "no index" else blob)
        else:
            write_file(blob, file_bytes(blob)[:-1] + b" ")
        self.assert_one_line(self.main("inspect", "-q", path), code, words)


class CommandLineCredentialsTest(CommandLineCase):
    """-u with its two sources of a password, and where it goes."""

    @rows((  # (what, options, stdin, environment)
        ("stdin", ("--password-stdin",), PASSWORD, {}),
        ("stdin, a line", ("--password-stdin",), PASSWORD + "\r\n", {}),
        ("stdin, lines", ("--password-stdin",), FIELD_JSON_KEY, {}, FIELD_JSON_KEY[:-1]),
        ("stdin, an empty line", ("--password-stdin",), PASSWORD + "\n\n", {},
         PASSWORD + "\n"),
        ("environment", (), "", {"IMAGEC_PASSWORD": PASSWORD}),
        ("environment, a line", (), "", {"IMAGEC_PASSWORD": PASSWORD + "\n"}),
        ("stdin before environment", ("--password-stdin",), PASSWORD,
         {"IMAGEC_PASSWORD": "other"}),
    ))
    def test_password_sources(self, _what, options, stdin, environ, sent=PASSWORD):
        self.origin.auth, self.origin.users = "basic", {"alice": sent}
        self.done("digest", "-u", "alice", self.ref, *options, stdin=stdin, **environ)
        self.assertEqual(self.origin.requests[-1].headers["Authorization"],
                         "Basic " + field_base64("alice:" + sent))

    @rows((  # (options, what is typed, status, words)
        ((), b"S3CR3T\n", 0, "sha256:"), (("--password-stdin",), b"S3CR3T\n", 0, "sha256:"),
        ((), b"\n", 2, "no password"), (("--password-stdin",), b"\4", 2, "no password"),
    ))
    @able(hasattr(os, "openpty"), "a pseudo-terminal")
    def test_a_terminal_is_asked_without_echo(self, options, typed, code, words):
        self.origin.auth, shown = "basic", b""
        ours, theirs = os.openpty()
        with open(ours, "r+b", 0) as terminal, open(theirs, "r+b", 0) as stream:
            # In a session without a terminal of its own, lest it be that of the tests.
            process = self.start(
                "digest", "-u", "alice", self.ref, *options, stdin=stream,
                stdout=stream, stderr=stream, start_new_session=True)
            while not shown.endswith(b"Password of alice: "):
                shown += terminal.read(1)
            terminal.write(typed)
            self.assertEqual(process.wait(20), code)
            shown = terminal.read(1000).decode("ascii")
        self.assertIn(words, shown)
        self.assertNotIn(PASSWORD, shown)

    #: (words of the error, argv): what follows is never repeated, nothing is sent
    @rows((
        ("--password-stdin or in IMAGEC_PASSWORD", (
            "digest -u me --password hunter2 {ref}", "digest --password=hunter2 {ref}",
            "digest {ref} -u me -p hunter2", "digest {ref} -phunter2",
            "digest {ref} -qphunter2", "digest {ref} -qp hunter2",
            "pull -u me --pass hunter2 {ref}", "pull --passwd=hunter2 {ref}",
            "pull --passwordhunter2 {ref}", "pull --password-std hunter2 {ref}",
            "-p hunter2 pull {ref}", "--password=hunter2 pull {ref}",
            "--password hunter2 pull {ref}", "pull {ref} --password HUNTER2!",
            "selftest --password hunter2", "auth -p hunter2 {host}")),
        ("no password", ("digest -u alice {ref}",)),
        ("goes with -u", ("digest --password-stdin {ref}",)),
        ("the list of --from-file", ("pull -u me --password-stdin --from-file -",)),
        ("takes no value", ("digest --password-stdin=hunter2 {ref}",
                            "digest --no-creds=hunter2 {ref}")),
        ("no such option: --pwd;", ("digest --pwd hunter2 {ref}",
                                    "pull --pwd HUNTER2! {ref}",
                                    "--pwd=hunter2 pull {ref}")),
        ("no such option: -P;", ("digest -Phunter2 {ref}", "digest -qPhunter2 {ref}",
                                 "-P hunter2 digest {ref}")),
        ("more arguments", ("digest -u me {ref} hunter2",)),
        ("user name alone", ("digest -u me:hunter2 {ref}", "pull -ume:hunter2 {ref}")),
        # userinfo, wherever a host or a URL is expected
        ("not a mirror", ("pull --mirror https://u:hunter2@h.test {ref}",
                          "pull --mirror u:hunter2@h.test {ref}",
                          "pull --mirror u:hunt/hunter2@h.test {ref}")),
        ("invalid reference", ("digest u:hunter2@{host}/x", "selftest u:hunter2@h.test",
                               "pull https://u:hunter2@h.test/x",
                               "pull {ref} --tag u:hunter2@h.test/x")),
        ("not a registry", ("auth u:hunter2@h.test", "auth https://u:hunter2@h.test",
                            "auth https://u:hunter2@h.test/lab/app")),
        ("proxy's URL", ("digest --proxy http://u:hunter2/@h.test h.test/x",
                         "digest --proxy ftp://u:hunter2@h.test h.test/x")),
        ("--listen", ("serve --listen u:hunter2@h.test images",)),
    ))
    def test_what_may_be_a_password_is_not_repeated(self, words, commands):
        for command in commands:
            argv = command.format(ref=self.ref, host=self.origin.host).split()
            with self.subTest(command), mock.patch.object(
                    imagec, "pull_test_image", return_value=[]):
                ended = self.main(*argv)
                self.assert_one_line(ended._replace(out=b""), 2, re.escape(words))
                self.assertNotIn(b"hunter2", ended.err.lower().encode() + ended.out)
        self.assertEqual(self.origin.requests, [])

    def test_options_are_written_out(self):
        parser = imagec.argument_parser()
        for command, (_, _, own) in imagec.COMMANDS.items():
            rest = ["x"] * sum(not flags[0].startswith("-") for flags, _ in own)
            for option in ("--usern=x", "--no-cred", "--quie", "--rec=gzip", "--js"):
                with self.subTest(command=command, option=option):
                    with self.fails(imagec.UsageError, "no such option: --"):
                        parser.parse_args([command, option] + rest)
        for options, jobs in (("-j1", 1), ("-qj1", 1), ("-j 1", 1), ("-qj 12", 12),
                              ("--jobs=3", 3), ("--jobs 3", 3), ("-j -1", -1)):
            found = parser.parse_args(["pull", "-ux"] + options.split() + ["a", "b"])
            self.assertEqual((found.jobs, found.quiet, found.username),
                             (jobs, "q" in options, "x"))
        self.assertEqual(parser.parse_args(["serve", "--", "-p"]).paths, ["-p"])
        self.assertEqual(parser.parse_args(["pull", "-o", "-"]).output, "-")

    def test_a_registry_that_asks_for_none_gets_none(self):
        self.done("digest", "-u", "alice", self.ref, IMAGEC_PASSWORD=PASSWORD)
        self.assertEqual(authorizations(self.origin), [])

    def test_one_password_is_for_one_registry(self):
        other = self.filled(auth="basic")
        ended = self.pull("-q", "-u", "alice", self.ref, other.host + "/lab/app:1",
                          IMAGEC_PASSWORD=PASSWORD)
        self.assert_one_line(ended, 2, "two registries")
        self.assertEqual(other.requests, [])

    def test_an_insecure_option_is_for_one_registry(self):
        other = self.filled(tls="expired", auth="basic")
        for option in ("--insecure-skip-verify", "--insecure-allow-http"):
            ended = self.pull("-q", option, self.ref, other.host + "/lab/app:1")
            self.assert_one_line(ended, 2, "%s .*two registries.*%s" % (
                option, re.escape(other.host)))
            ended = self.pull("-q", option, self.ref, "--mirror", self.origin.host)
            self.assertEqual((ended.status, ended.err), (0, ""))
        self.assertEqual(other.connections, 0)

    def test_storage_and_token_hosts(self):
        for option in ("--storage-host", "--token-host"):
            for host in ("", "a/b", "https://", "u:S3CR3T@a", "a:b", "a b", "a%3a1",
                         "https://u:S3CR3T@a/b", "https://u@a", "ftp://a"):
                ended = self.main("digest", self.ref, option, host)
                self.assert_one_line(ended, 2, "HOST")
                self.assertNotIn("S3CR3T", ended.err)
            self.done("digest", self.ref, option, "my_store.lan:9000", option, "b",
                      option, "https://c/d")
        self.assertTrue(self.origin.requests)


class CommandLineProgressTest(CommandLineCase):
    """Each kind of --progress, on a terminal and elsewhere."""

    ERASED = "\r\x1b[K"
    REST = (r"[0-9]/[0-9] [0-9.]+[kM]?B/[0-9.]+[kM]B"
            r"( [0-9.]+[kMG]?B/s [0-9]+:[0-9]{2} left)?")

    def setUp(self):
        super().setUp()
        tars = [tar_bytes([("data%d" % number, os.urandom(700000))])
                for number in range(2)]
        self.image = build_image(tars + list(FIELD_SMALL), compress=None)
        self.digest = self.origin.add("lab/app", "1", self.image)

    def often(self):
        self.patch(mock.patch.multiple(imagec, REDRAW_INTERVAL=0, PROGRESS_INTERVAL=0))

    def progress(self, kind, tty, term="xterm"):
        self.often()
        stream = FakeTerminal() if tty else io.StringIO()
        ended = self.pull("--progress", kind, self.ref, stderr=stream, TERM=term)
        self.assertEqual(ended[:2], (0, (self.ref + "@" + self.digest + "\n").encode()))
        return ended.err

    def told(self, *states):
        """The lines of these pulls, but for those of the rest."""
        names = sorted(name[7:19] for name in self.image.layers)
        return sorted(line for state in states for line in [
            "1: Pulling from lab/app", "Digest: " + self.digest]
                      + ["%s: %s" % (name, state) for name in names])

    def listener(self, stream, kind="auto"):
        """A Progress with a clock that stands at `self.now`, told of three layers."""
        self.now = 100.0
        with mock.patch.dict(os.environ, TERM="xterm"):
            progress = imagec.Progress(stream, kind, lambda: self.now)
        progress(imagec.Event("Pulling from lab/app", "1"))
        for name, size in (("aa", 1000000), ("bb", 3000000), ("cc", 500)):
            progress(imagec.Event("Pulling fs layer", name, None, size))
        return progress

    @staticmethod
    def come(progress, name, count, status="Downloading"):
        progress(imagec.Event(status, name, count, None))

    def test_lines(self):
        self.assertEqual(self.progress("none", tty=True), "")
        for kind, tty, term in (("plain", True, "xterm"), ("auto", False, "xterm"),
                                ("plain", False, "xterm"), ("auto", True, "dumb")):
            with self.subTest(kind, tty=tty, term=term):
                self.output += "x"
                text = self.progress(kind, tty, term=term)
                self.assertNotRegex(text, "[^ -~\n]")
                lines = text.splitlines()
                rest = [line for line in lines if re.fullmatch(self.REST, line)]
                self.assertGreater(len(rest), 3)
                self.assertEqual(sorted(set(lines) - set(rest)),
                                 self.told("Download complete"))
                self.assertEqual((lines[0], lines[-1]), (
                    "1: Pulling from lab/app", "Digest: " + self.digest))

    def test_a_terminal_gets_a_live_line(self):
        text = self.progress("auto", True)
        live = re.findall(r"([^\r\n\x1b]+)\r", text.replace(self.ERASED, "\r"))
        self.assertGreater(len(live), 3)
        for line in live:
            self.assertRegex(line, r"\A%s\Z" % self.REST)
            self.assertLess(len(line), 40)
        self.assertEqual(sorted(self.shown(text)[:-1]), self.told("Download complete"))
        self.assertEqual(self.shown(text)[-1], "")

    def test_what_else_is_said_stands_by_itself(self):
        # The same screen shows the progress, warnings in between, and the results.
        self.often()
        screen = FakeTerminal()
        self.origin.fault("/blobs/" + self.image.layers[-1],
                          status(503, {"Retry-After": "0"}), 2)
        with mock.patch.dict(os.environ, TERM="xterm"), \
                mock.patch.multiple(sys, stdout=screen, stderr=screen), \
                mock.patch.object(imagec, "BACKOFF", 0):
            code = imagec.main(["pull", "-o", self.output, self.ref, self.ref])
        self.assertEqual(code, 0)
        lines = self.shown(screen.getvalue())
        warned = [line for line in lines if "trying again" in line]
        self.assertEqual(len(warned), 2)
        pinned = self.ref + "@" + self.digest
        self.assertEqual(sorted(lines), sorted(
            self.told("Download complete") + warned + [pinned] * 2
            + ["1: Pulling from lab/app", "Digest: " + self.digest, ""]))
        self.assertIn(self.ERASED + "imagec: ", screen.getvalue())

    def test_an_error_stands_by_itself(self):
        self.often()
        self.origin.fault("/blobs/" + self.image.layers[-1], status(404), times=None)
        ended = self.pull("-j1", self.ref, stderr=FakeTerminal(), TERM="xterm")
        self.assertEqual(ended.status, 4)
        lines = self.shown(ended.err)
        self.assertRegex(lines[-2], "^imagec: .*" + self.image.layers[-1])
        self.assertFalse([line for line in lines if re.match(self.REST, line)])

    @staticmethod
    def shown(text):
        """The lines on a terminal that was sent `text`."""
        return re.sub(r"[^\n]*\r\x1b\[K", "", text).split("\n")

    def test_rest(self):
        self.often()
        stream = FakeTerminal()
        progress = self.listener(stream)
        self.now += 1
        self.come(progress, "bb", 500000, "Resuming")
        self.come(progress, "bb", 1000000)
        progress(imagec.Event("Already exists", "cc"))
        self.now += 1
        self.come(progress, "bb", 500000)  # begun again
        self.come(progress, "bb", 1500000)
        progress(imagec.Event("Download complete", "bb"))
        self.now += 60
        self.come(progress, "aa", 999700)
        progress.say("enough")
        self.assertEqual(self.shown(stream.getvalue()), [
            "1: Pulling from lab/app", "cc: Already exists", "bb: Download complete",
            "imagec: enough", ""])
        self.assertEqual(re.findall("[0-9]/[^\r\n]*", stream.getvalue())[3:], [
            "0/3 500kB/4MB", "0/3 1MB/4MB 500kB/s 0:06 left",
            "1/3 1MB/4MB 500kB/s 0:06 left", "1/3 500kB/4MB 250kB/s 0:14 left",
            "1/3 1.5MB/4MB 750kB/s 0:03 left", "2/3 3MB/4MB 750kB/s 0:01 left",
            "2/3 4MB/4MB 40.3kB/s 0:00 left"])

    def test_at_most_every_ten_seconds(self):
        for kind, seconds in (("plain", 10), ("auto", 0.1)):
            stream = FakeTerminal()
            progress = self.listener(stream, kind)
            self.assertNotIn("/3", stream.getvalue())
            for part in range(1, 1001):
                self.now = 100 + seconds * part / 250
                self.come(progress, "aa", 1000 * part)
            self.assertEqual(stream.getvalue().count("0/3 "), 4)
            progress(imagec.Event("Download complete", "bb"))
            self.assertIn("bb: Download complete", self.shown(stream.getvalue()))

    def test_width_is_that_of_the_terminal(self):
        if not hasattr(os, "openpty"):
            cannot("open a terminal")
        import fcntl
        import termios
        whole = "0/3 999kB/4MB 999B/s 50:04 left"
        for width, wanted in ((200, whole), (30, whole[:29]), (0, whole)):
            with self.subTest(width):
                master, slave = os.openpty()
                self.addCleanup(os.close, master)
                fcntl.ioctl(slave, termios.TIOCSWINSZ,
                            struct.pack("HHHH", 24, width, 0, 0))
                with open(slave, "w") as stream:
                    progress = self.listener(stream)
                    self.now += 1000
                    self.come(progress, "aa", 999000)
                    text = ""
                    while whole[:12] not in text:
                        text += os.read(master, 65536).decode("ascii")
                self.assertEqual(text.rpartition("\n")[2], wanted)

    @rows((  # (layers, of what size, bytes there, seconds, line)
        (100, 999444000, 999444000, 80.5, "0/100 999MB/99.9GB 12.4MB/s 132:49 left"),
        (1, None, 999, 0, "0/1 999B 999kB/s")))  # as in schema1
    def test_longest_and_shortest(self, count, size, there, seconds, line):
        self.often()
        stream, self.now = io.StringIO(), 0.0
        progress = imagec.Progress(stream, "plain", lambda: self.now)
        for number in range(count):
            progress(imagec.Event("Pulling fs layer", str(number), None, size))
        self.now = seconds
        self.come(progress, "0", there)
        self.come(progress, "0", None, "Verifying Checksum")  # it is all still there
        self.assertEqual(stream.getvalue().splitlines()[-1], line)
        self.assertLess(len(line), 40)


# -- Command line: what goes wrong

LAYER = "GET .*/blobs/{layer}"
MANIFEST = "GET .*/manifests/"

#: (what, command line, status, words[, match, action, times of a fault: 1]). Every
#: fault of a registry is met in FaultsTest.
FAILURES = (
    ("no command", "", 2, "--help"),
    ("unknown command", "fly", 2, "fly"),
    ("unknown option", "digest {ref} --fast", 2, "--fast"),
    ("no reference", "pull", 2, "REF"),
    ("unknown format", "pull --format floppy {ref}", 2, "floppy"),
    ("no job", "pull -j 0 {ref}", 2, "at least one"),
    ("time that is no number", "digest --timeout x {ref}", 2, "float value: 'x'"),
    ("archive in a directory's place", "pull -o {root} --format archive {ref}", 1,
     "is a directory"),
    ("layers of no bytes", "pull --max-layer-size 0 {ref}", 2, "over 0"),
    ("no files", "pull --max-files 0 {ref}", 2, "over 0"),
    ("several platforms to see", "inspect --platform all --platform arm64 {ref}", 2,
     "all goes alone"),
    ("layers of several", "layers --platform amd64 --platform arm64 {ref}", 2,
     "layers takes one --platform"),
    ("several where one fits", "pull --platform amd64 --platform arm64 {ref}", 2,
     "more than one --platform .* --format layers; add --format oci or archive"),
    ("all in an archive", "pull --platform all -o {root}/x.tar {ref}", 2,
     "--platform all .* --format archive; add --format oci$"),
    ("what refers to layers", "pull --referrers {ref}", 2,
     "--referrers .* --format layers; add --format oci or archive"),
    ("layers made small", "pull --recompress gzip {ref}", 2,
     "--recompress .* --format layers; add --format oci or archive"),
    ("what refers to what was made here",
     "pull --referrers --recompress gzip -o {root}/x.tar {ref}", 2, "another image"),
    ("one of several in a registry", "digest --image a {ref}", 2, "--image goes with"),
    ("no path", "pull -o '' {ref}", 2, "empty"),
    ("deep path", "pull -o %sx.tar {ref}" % ("x/" * 1900), 1, "deeper than"),
    ("nothing to serve", "serve {root}/none", 1, "none: is not there$"),
    ("proxy that is not there", "digest --proxy http://nosuch.invalid:1 r.test/a", 1,
     "resolve host nosuch.invalid: "),
    ("host that is not there", "digest --insecure-allow-http r.invalid/a", 1,
     "cannot resolve host r.invalid: .*; check the name"),
    ("host of https that is not there", "pull registry.invalid/lab/app", 1,
     "cannot resolve host registry.invalid"),
    ("neither TLS nor HTTP", "digest {ref}", 1, "TLS[^;]*$", "GET /v2/$",
     garbage(b"SSH-2.0-x\r\n"), EVER),
    ("registry out of order", "digest {ref}", 1, "is out of order: .*HTTP 500",
     "GET /v2/$", status(500), EVER),
    ("compressed archive", "pull -o {root}/x.tar.gz {ref}", 2, "not compressed"),
    ("compressed, short", "pull -o {root}/x.tgz {ref}", 2, "FILE.tar"),
    ("name for a tree", "pull --tag a:1 {ref}", 2, "--tag goes with"),
    ("name for a root", "pull --tag a:1 --format rootfs {ref}", 2, "--tag goes with"),
    ("URL for a registry", "auth https://{host}", 2, "HOST"),
    ("no registry to look up", "auth ''", 2, "HOST"),
    ("registry with a blank", "auth 'a b'", 2, "HOST"),
    ("jobs that are no number", "pull -j x {ref}", 2, "'x'"),
    ("bad reference", "pull lab/App", 2, "lowercase"),
    ("reference with a newline", "pull 'lab/app\n'", 2, r"lab/app\\+n"),
    ("bad second reference", "pull {ref} a//b", 2, "a//b"),
    ("bad digest", "digest {host}/lab/app@sha256:12", 2, "64"),
    ("image ID", "pull " + "0" * 64, 2, "image ID"),
    ("bad platform", "layers --platform a/b/c/d {ref}", 2, "a/b/c/d"),
    ("CA file that is missing", "digest --cacert {root}/none {ref}", 2, "--cacert"),
    ("nothing listens", "digest 127.0.0.1:1/lab/app", 1, "refused"),
    ("no registry", "digest {ref}", 1, "no registry", "GET /v2/$",
     status(405, body=HTML), EVER),
    ("no such image", "digest {ref}", 4, "not found.*its /v2/ answers HTTP 404", "GET",
     status(404, body=HTML), EVER),
    ("manifest with a flipped bit", "pull {host}/lab/app@{digest}", 3,
     "expected digest", MANIFEST, flip(3)),
    ("missing repository", "pull {host}/lab/none:1", 4, "MANIFEST_UNKNOWN"),
    ("missing tag", "pull {host}/lab/app:none", 4, "lab/app:none"),
    ("no platform", "pull --platform linux/s390x {host}/lab/app:many", 4,
     "linux/amd64, linux/arm/v7"),
    ("layer with a flipped bit", "pull {ref}", 3, "{layer}.* expected digest", LAYER,
     flip()),
    ("layer that is too large", "pull --max-layer-size 100 {ref}", 1,
     "--max-layer-size"),
    ("too slow for --timeout", "digest --timeout 0.5 {ref}", 1, "--timeout", MANIFEST,
     hang()),
    ("destination is a file", "pull -o {root}/file {ref}", 1, "file.*not a directory"),
    ("destination below a file", "pull -o {root}/file/a {ref}", 1, "not a directory"),
    ("destination is a device", "pull -o /dev/null {ref}", 1, "not a directory"),
)


class CommandLineFailureTest(CommandLineCase):
    """One clear line and the right status for whatever goes wrong."""

    def setUp(self):
        super().setUp()
        self.words = {
            "ref": self.ref, "host": self.origin.host, "root": self.root,
            "digest": self.digest, "layer": self.image.layers[1],
            "config": sha256(self.image.config)}
        self.origin.add("lab/app", "many", build_index(
            [(self.image, ("linux", "amd64", None)),
             (self.image, ("linux", "arm", "v7"))]))

    @rows(FAILURES)
    def test_failures(self, what, command, code, words, match=None, *fault):
        self.file("file")
        self.output = os.path.join(self.root, what.replace(" ", "-"))
        fault = match and self.origin.fault(match.format(**self.words), *fault)
        argv = [word.format(**self.words) for word in shlex.split(command)]
        if argv[:1] == ["pull"]:
            argv[1:1] = ["-q", "-o", self.output]
        ended = self.main(*argv)
        if fault:
            fault.retire()
        if "-q" not in argv:
            ended = ended._replace(err=ended.err.splitlines(True)[-1])
        self.assert_one_line(ended, code, words.format(**self.words))
        self.assert_nothing_final()

    @able(os.name == "posix", "signal as POSIX has it")
    def test_t123_SIGTERM_in_a_finalizer(self):
        # Python drops what is raised there: before 3.8 with words of its own.
        class Doomed:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0)

        fetch = imagec.Puller._fetch

        def struck(*arguments):
            Doomed()
            return fetch(*arguments)

        self.origin.fault("blobs/" + self.image.layers[0], hang(), EVER)
        with mock.patch.object(imagec.Puller, "_fetch", struck):
            ended = self.pull("-q", "--timeout", "5", self.ref)
        self.assertEqual(ended.status, 143, ended.err)
        said = ended.err.splitlines()[-1 if sys.version_info < (3, 8) else 0:]
        self.assertEqual(said, ["imagec: ended by SIGTERM"])
        self.assert_nothing_final()

    @able(os.name == "posix", "signal as POSIX has it")
    def test_t122_t123_a_signal_while_workers_start(self):
        start, begun = threading.Thread.start, []

        def struck(thread):
            start(thread)
            if threading.current_thread() is threading.main_thread():
                begun.append(thread)
                if len(begun) == 1:
                    os.kill(os.getpid(), number)

        self.origin.fault("/blobs/(?!%s)" % sha256(self.image.config), hang(), EVER)
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            for format in IMAGE_FORMATS:
                with self.subTest(format=format, signal=number), \
                        mock.patch.object(threading.Thread, "start", struck):
                    del begun[:]
                    out = "%s%d%s" % (self.output, number, format)
                    ended = self.pull("-q", "--timeout", "5", "--format", format,
                                      "-o", out, self.ref)
                    self.assertEqual(ended.status, status, ended.err)
                    self.assertTrue(begun)
                    self.assertFalse([one for one in begun if one.is_alive()])
        self.assertIs(signal.getsignal(signal.SIGINT), signal.default_int_handler)

    @rows((  # (what, options, stdin, auth of the registry, words)
        ("wrong password", ("-u", "alice", "--password-stdin"), "S3CR3T-WRONG", "basic",
         "user alice with a password, .*; check the .*password"),
        ("wrong password for a token", ("-u", "alice", "--password-stdin"),
         "S3CR3T-WRONG", "bearer", "user alice with a password, .*; check the .*password"),
        ("a line too many", ("-u", "alice", "--password-stdin"), PASSWORD + "\n\n",
         "basic", "a password of several lines"),
        ("no password", (), "", "basic", "-u USER"),
        ("no token for all", (), "", "bearer", "anonymous"),
    ))
    def test_denials(self, _what, options, stdin, auth, words):
        self.origin.auth, self.origin.anonymous = auth, False
        ended = self.pull("-q", *options + (self.ref,), stdin=stdin)
        self.assert_one_line(ended, 5, words)
        self.assertEqual(self.files(), [])

    @rows((  # (the server's, options, SSL_CERT_FILE, a file in SSL_CERT_DIR, refusal)
        (True, (), "own", None, None),
        (True, (), "other", None, "not to be trusted"),
        (True, (), "none", None, "no CA certificates .*package ca-certif.*--cacert"),
        (True, (), "none", "readme.pem", "this host has no CA certificates"),
        (True, (), "none", "0a1b2c3d.0", "not to be trusted"),
        (True, ("--cacert", "{root}/own.pem"), "none", None, None),
        ("expired", (), "own", None, "not to be trusted"),
        ("wrong-host", (), "own", None, "not to be trusted"),
        ("expired", ("--insecure-skip-verify",), "own", None, None),
        ("expired", ("--insecure-allow-http",), "none", None, None),
    ))
    def test_certificates(self, tls, options, known, name, refusal):
        for roots, pem in (("own", TEST_CERT), ("other", OTHER_CERT), ("none", "")):
            self.file(roots + ".pem", pem)
        self.file("certs/" + (name or "empty"), OTHER_CERT)
        ended = self.main(
            "digest", "-q", self.filled(self.image, tls=tls).host + "/lab/app:1",
            *[word.format(root=self.root) for word in options],
            SSL_CERT_FILE="%s/%s.pem" % (self.root, known),
            SSL_CERT_DIR="/none" + os.pathsep + os.path.join(self.root, "certs"))
        remove(os.path.join(self.root, "certs"))
        if refusal:
            self.assertEqual("ca-certificates" in ended.err, "no CA" in refusal)
            return self.assert_one_line(ended, 1, refusal)
        self.assertEqual((ended.status, ended.err), (0, ""))

    def test_messages_have_an_end(self):
        many = build_index([(self.image, ("os%d" % number, "a" * 30, None))
                            for number in range(3000)])
        self.origin.add("lab/app", "crowd", many)
        ended = self.pull("-q", self.origin.host + "/lab/app:crowd")
        self.assert_one_line(ended, 4, "os0/a+, .*[.]{3}.*--platform")
        self.assertLess(len(ended.err), 2000)
        long = "x" * 300000
        for action in (body(spoiled_manifest(self.image, mediaType=long)),
                       body(b'{"%s":1,"%s":2}' % (2 * (long.encode("ascii"),)))):
            fault = self.origin.fault(MANIFEST, action, EVER)
            for more in ((), ("--debug",)):
                ended = self.main("digest", self.ref, *more)
                self.assertIn(ended.status, (1, 3), ended.err[:2000])
                self.assertLess(max(map(len, ended.err.splitlines())), 5000)
            fault.retire()
        for text in (long, "\x1b" * 300000):
            error = imagec.OutputError("/" + text, "not there", "try another")
            self.assertLess(max(len(str(error)), len(repr(error))), 10000)
            self.assertTrue(str(error).endswith("not there; try another"))

    @rows(((None, ""), (b"/a/b", "/a/b: "), (b"/a/\xff", r"/a/\udcff: "), (3, "3: "),
           ("/a/\x1b", r"/a/\x1b: ")))
    def test_full_disk(self, name, shown):
        error = OSError(28, "No space left on device", name)
        with mock.patch.object(imagec.Partial, "write", side_effect=error):
            ended = self.pull("-q", self.ref)
        self.assert_one_line(ended, 1, "imagec: %sNo space left on device; .*-o"
                             % re.escape(shown))
        self.assert_nothing_final()

    def test_cancel_leaves_no_socket_open(self):
        # The moments at which a cancel may come: with a kept connection in hand, and
        # with a new socket that is not connected yet.
        for kept, place in ((True, "Transport.check"), (False, "_Kept.turns")):
            transport = imagec.Transport()
            if kept:
                transport.open("GET", self.origin.url + "/v2/").read(1000, "reply")
            with warnings.catch_warnings(record=True) as caught, mock.patch(
                    "imagec." + place, side_effect=imagec.Cancelled("cancelled")):
                warnings.simplefilter("always")
                with self.assertRaises(imagec.Cancelled):
                    transport.open("GET", self.origin.url + "/v2/")
                transport.close()
                del transport
                gc.collect()
            self.assertEqual([str(each.message) for each in caught], [], place)


# -- Command line: what a server may not do to a terminal, and may not make us tell

def spoiled_manifest(image, **members):
    """The image's manifest with other members."""
    return json_bytes(dict(json.loads(image.manifest.decode()), **members))


class TerminalInjectionTest(CommandLineCase):
    """Escape sequences in whatever a server sends do not reach the terminal (T07)."""

    def rows(self):
        """(what, command, match, action)"""
        words = {"errors": [{"code": "DENIED" + POISON, "message": POISON}]}
        for code in (400, 401, 403, 404, 429, 500):
            yield "words of %d" % code, "digest", MANIFEST, status(
                code, body=json_bytes(words))
        yield "tags", "tags", "tags/list", body(json_bytes(
            {"name": POISON, "tags": ["good", POISON, 3]}))
        yield "media type", "digest", MANIFEST, body(
            spoiled_manifest(self.image, mediaType=POISON))
        yield "config type", "pull", MANIFEST, body(spoiled_manifest(
            self.image, config={"mediaType": POISON, "size": 1, "digest": self.digest}))
        yield "digest", "pull", MANIFEST, body(spoiled_manifest(self.image, layers=[
            {"mediaType": POISON, "size": 1, "digest": POISON}]))
        yield "key", "pull", MANIFEST, body(b'{"\x1b[31m":1,"\x1b[31m":2}')
        for name, value in (
                ("Content-Type", "\x1b[31m"), ("Content-Encoding", "\x1b[31m"),
                ("Docker-Content-Digest", "\x1b[31m"), ("Retry-After", "\x1b[31m"),
                ("Docker-Distribution-Api-Version", "\x1b[31m")):
            yield name, "pull", MANIFEST, headers(**{name: value})
        for place in ("http://\x1b[31m.test/", "http://h\x9b31m/", "\x1b]0;x\x07://x"):
            yield "Location", "pull", "blobs", redirect(place)
            yield "realm", "digest", MANIFEST, status(401, {
                "WWW-Authenticate": 'Bearer realm="%s",service="\x1b[31m"' % place})
            yield "Link", "tags", "tags/list", headers(Link='<%s>; rel="next"' % place)
        yield "scheme", "digest", MANIFEST, status(
            401, {"WWW-Authenticate": "\x1b[31m"})
        yield "status line", "digest", MANIFEST, garbage(b"\x1b[31m\x9b31m\r\n\r\n")
        yield "reason", "digest", MANIFEST, garbage(
            b"HTTP/1.1 400 \x1b[31m\r\nContent-Length: 0\r\n\r\n")

    def test_faults(self):
        for what, command, match, action in self.rows():
            with self.subTest(what):
                self.output += "x"
                fault = self.origin.fault(match, action, EVER)
                options = ("-o", self.output) if command == "pull" else ()
                ended = self.main(command, "--debug", self.ref, *options)
                fault.retire()
                self.assert_clean(ended)
                self.assertTrue(ended.err)

    def test_exact_bytes(self):
        """A terminal obeys none of them, a file or pipe gets each as it is."""
        config = json.dumps(dict(json.loads(self.image.config.decode("utf-8")),
                                 author=POISON), indent=1, ensure_ascii=False).encode()
        self.assertIn(b"\xc2\x9b31m", config)
        image = build_image(FIELD_SMALL)
        image.blobs[sha256(config)] = config
        manifest = json.loads(image.manifest.decode("utf-8"))
        manifest["config"].update(digest=sha256(config), size=len(config))
        manifest["annotations"] = {"x": POISON}
        raw = json.dumps(manifest, indent=1, ensure_ascii=False).encode("utf-8")
        image.manifest, image.digest = raw, sha256(raw)
        self.origin.add("lab/app", "1", image)
        for option, expected in (("--raw", raw), ("--config", config)):
            self.assertEqual(self.main("inspect", option, self.ref),
                             Ended(0, expected, ""))
            with mock.patch.object(io, "TextIOWrapper", TerminalOutput):
                ended = self.main("inspect", option, self.ref)
            self.assertEqual(ended.status, 0)
            self.assert_clean(ended)
            self.assertEqual(ended.out.count(b"\n"), expected.count(b"\n") + 1)

    def assert_clean(self, ended):
        drawn = ended.err.replace("\r\x1b[K", "")  # the live line's own
        for text in (drawn, ended.out.decode("utf-8")):
            self.assertIsNone(UNPRINTABLE.search(text), ascii(text))
            self.assertNotRegex(text, "(?m)^imagec: all is well")

    def test_images(self):
        poisoned = build_image(
            FIELD_SMALL, platform=(POISON, POISON, POISON), author=POISON,
            config={"Labels": {POISON: POISON}, "Env": [POISON]}, created=POISON)
        index = build_index([(poisoned, (POISON, POISON, POISON))])
        self.origin.add("lab/app", "1", poisoned)
        self.origin.add("lab/app", "many", index)
        many = self.origin.host + "/lab/app:many"
        for argv in (("inspect", self.ref), ("layers", self.ref), ("digest", many),
                     ("inspect", many), ("pull", "-o", self.output, many),
                     ("layers", "--json", self.ref),
                     ("pull", "--json", "-o", self.output, self.ref),
                     ("pull", "--progress", "plain", "-o", self.output, self.ref)):
            with self.subTest(argv=argv):
                for stream in (FakeTerminal(), io.StringIO()):
                    self.assert_clean(self.main(*argv, stderr=stream, TERM="xterm"))


class EchoRegistry(FakeRegistry):
    """A registry and object store whose errors repeat what they were sent."""

    echoing = "manifests"

    def answer(self, request):
        reply = super().answer(request)
        if self.echoing in request.path and reply.code == 200:
            sent = "%s %s" % (request.path, request.headers.get("Authorization"))
            return status(400, body=json_bytes(
                {"errors": [{"code": "INVALID", "message": sent}]}))(reply)
        return reply


def secret_forms(secret):
    """What a secret may look like: plain, quoted, and within any base64."""
    raw = secret.encode("utf-8")
    forms = {raw, urllib.parse.quote(secret).encode(), repr(secret)[1:-1].encode(),
             raw.hex().encode()}
    for offset in range(3):
        code = base64.b64encode(bytes(offset) + raw)
        first, last = -(-offset * 8 // 6), (offset + len(raw)) * 8 // 6
        forms.add(code[first:last])
        forms.add(code[first:last].replace(b"+", b"-").replace(b"/", b"_"))
    return forms


SECRET_ALICE = ("alice", PASSWORD)
#: (what, auth of the registry, (user or None, password or identity token), what the
#: fault strikes, the fault, status)
SECRET_PULLS = (
    ("password", "basic", SECRET_ALICE, None, None, 0),
    ("password for a token", "bearer", SECRET_ALICE, None, None, 0),
    ("identity token", "bearer", (None, IDENTITY_TOKEN), None, None, 0),
    ("wrong password", "basic", ("alice", "S3CR3T%wrong"), None, None, 5),
    ("wrong password for a token", "bearer", ("alice", "S3CR3T wr\u00f6ng"), None,
     None, 5),
    ("user that is none", "bearer", ("al:ice", PASSWORD), None, None, 2),
    ("wrong identity token", "bearer", (None, "S3CR3T-OTHER"), None, None, 5),
    ("identity token that is lost", "bearer", (None, IDENTITY_TOKEN), "/token",
     status(500), 1),
) + tuple((what, "bearer", SECRET_ALICE, match, action, code)
          for what, match, action, code in (
    ("token server fails", "/token", status(500), 1),
    ("token in a page", "/token", body(b"<p>S3CR3T-TOKEN</p>"), 3),
    ("token that is none", "/token", body(b'{"token": "S3CR3T\\u0001"}'), 3),
    ("token with a newline", "/token", body(b'{"token": "S3CR3T\\nX: y"}'), 3),
    ("token refused for ever", MANIFEST, status(401, {
        "WWW-Authenticate": 'Bearer realm="/token"'}), 5),
    ("token refused for a blob", "/blobs/", status(401, {
        "WWW-Authenticate": 'Bearer realm="/token"'}), 5),
    ("realm with a password", "GET /v2/$", status(401, {
        "WWW-Authenticate": 'Bearer realm="http://u:S3CR3T@127.0.0.1/t"'}), 1),
    ("redirect with a password", "/blobs/", redirect(
        "http://u:S3CR3T@127.0.0.1/x?sig=S3CR3T-SIG"), 1),
    ("redirect into nothing", "/blobs/", redirect(
        "http://127.0.0.1:1/x?sig=S3CR3T-SIG#S3CR3T"), 1),
    ("redirect to a bad URL", "/blobs/", redirect("http://[/x?sig=S3CR3T-SIG"), 1),
)) + tuple((what, auth, who, "/cdn/", action, code)
           for auth, who in ((None, ()), ("bearer", SECRET_ALICE))
           for what, action, code in (
    ("signed URL cut", truncate(), 1), ("signed URL spoiled", flip(), 3),
    ("signed URL refused", status(403, body=b"sig S3CR3T"), 5),
    ("signed URL that stutters", garbage(b"junk\r\n"), 1),
    ("signed URL that stalls", hang(9), 1),
    ("signed URL in a loop", redirect("?sig=S3CR3T-SIG&again=1"), 1),
    ("signed URL into nothing", redirect(
        "http://u:S3CR3T@127.0.0.1:1/x?sig=S3CR3T"), 1),
))


class SecretsTest(CommandLineCase):
    """No secret is in any output, exception or file written, --debug or not (T80)."""

    LOGIN = ("-u", "alice", "--password-stdin")

    def assert_no_secret(self, *texts):
        """No exception, with all that led to it, no text, no file written tells one."""
        texts = list(texts)
        for value in texts:
            if isinstance(value, BaseException):
                texts += [str(value), repr(value), repr(value.args), repr(vars(value)),
                          value.__cause__]
                if not value.__suppress_context__:
                    texts.append(value.__context__)
        files = contents(self.root)
        files.pop("auth.json", None)  # ours
        for value in texts + list(files) + list(files.values()):
            if isinstance(value, str):
                value = value.encode("utf-8", "backslashreplace")
            if isinstance(value, bytes):
                for form in secret_forms(PASSWORD):  # which is in every other
                    self.assertNotIn(form, value)

    @rows([row + OUTPUTS[number % len(OUTPUTS)]
           for number, row in enumerate(SECRET_PULLS)])
    def test_pulls(self, what, auth, who, match, action, code, format, name):
        origin, path = self.filled(self.image, auth=auth), self.at(name)
        store = self.registry(blobs=origin.blobs)
        origin.redirect_blobs_to = store.url
        fault = match and (store if match == "/cdn/" else origin).fault(
            match, action, EVER)
        argv, options = (), {"idle_timeout": 0.1 if "stalls" in what else 5}
        if who and who[0]:
            argv = ("-u", who[0], "--password-stdin")
            options.update(username=who[0], password=who[1])
        elif who:
            options["authfile"] = self.file("auth.json", {"auths": {origin.host: {
                "auth": field_base64("<token>:"), "identitytoken": who[1]}}})
            argv = ("--authfile", options["authfile"])
        ref, events = origin.host + "/lab/app:1", []
        told, error = self.told_of_pull(ref, format, path, events, options)
        self.assertEqual(error is not None, bool(code), error)
        self.assert_no_secret(told, repr(events), error)
        self.clear()
        with mock.patch.multiple(imagec, ATTEMPTS=2, SECRETS=imagec.Secrets()):
            ended = self.main("pull", "--debug", "--platform", "linux/amd64",
                              "--format", format, "-o", path, "--timeout",
                              str(options["idle_timeout"]), ref, *argv,
                              stdin=who[1] if who else "")
        self.assertEqual(ended.status, code, ended.err)
        self.assertIn("imagec: debug: ", ended.err)
        self.assert_no_secret(ended.err, ended.out)
        self.assertTrue(fault is None or fault.used, "fault never met")
        self.clear()

    def told_of_pull(self, ref, format, path, events, options):
        """(what is logged, the error) of a pull by the library."""
        told, level = io.StringIO(), imagec.log.level
        self.addCleanup(imagec.log.setLevel, level)
        imagec.log.setLevel(logging.DEBUG)
        with mock.patch.object(imagec.log, "handlers", [logging.StreamHandler(told)]), \
                mock.patch.multiple(imagec, ATTEMPTS=2, SECRETS=imagec.Secrets()), \
                self.session(notify=events.append, **options) as session:
            error = None
            try:
                self.pulled_by(session, path, format, ref)
            except (imagec.ImagecError, OSError) as caught:
                error = caught
        return told.getvalue(), error

    @rows((("http://u:S3CR3T@127.0.0.1:1", 1), ("socks5://u:S3CR3T@127.0.0.1:1", 1),
           ("ftp://u:S3CR3T@127.0.0.1:1", 2)))
    def test_proxies(self, proxy, code):
        ended = self.pull("--debug", "--proxy", proxy, self.ref)
        self.assertEqual(ended.status, code, ended.err)
        self.assert_no_secret(ended.err, ended.out)

    @rows((("registry.test",), ("registry.test:80",)))
    def test_proxy_that_repeats_nothing(self, host):
        proxy = self.registry()
        ended = self.main("digest", "--debug", host + "/lab/app",
                          https_proxy="http://u:S3CR3T@" + proxy.host)
        self.assertEqual(ended.status, 1)
        self.assertEqual(proxy.requests[-1].method, "CONNECT")
        self.assertIn("Proxy-Authorization", proxy.requests[-1].headers)
        self.assert_no_secret(ended.err, ended.out)

    @rows([(auth, echoing) for auth in ("basic", "bearer")
           for echoing in ("manifests", "/cdn/")])
    def test_echoes(self, auth, echoing):
        origin = EchoRegistry(auth=auth)
        self.addCleanup(origin.close)
        origin.echoing, origin.redirect_blobs_to = echoing, origin.url
        origin.add("lab/app", "1", self.image)
        ended = self.pull("--debug", origin.host + "/lab/app:1", *self.LOGIN,
                          stdin=PASSWORD)
        self.assertEqual(ended.status, 1, ended.err)
        self.assert_no_secret(ended.err, ended.out)

    def repeated(self, secret):
        """What a server that has a secret may say, in each place (match, action)."""
        yield MANIFEST, body(spoiled_manifest(self.image, mediaType="a/" + secret))
        yield MANIFEST, headers(docker_content_digest="sha256:" + secret)
        yield MANIFEST, headers(content_encoding=secret)
        yield MANIFEST, headers(Warning='299 - "%s"' % secret)
        yield MANIFEST, headers(ratelimit_limit=secret)
        yield MANIFEST, body(('{"%s": 1, "%s": 2}' % (secret, secret)).encode("ascii"))
        yield MANIFEST, garbage(b"HTTP/1.1 " + secret.encode("ascii") + b"\r\n\r\n")
        yield MANIFEST, status(403, body=json_bytes(
            {"errors": [{"code": secret, "message": secret}]}))
        for place in ("http://127.0.0.1:1/%s", "http://%s.test/", "%s://x/",
                      "http://x:%s/", "http://x@%s/", "http://u:%s@h/",
                      "http://[%s/?x"):
            yield "GET .*/blobs/", redirect(place % secret)

    def test_what_servers_repeat(self):
        secret = "S3CR3T/9"
        base = field_base64("alice:" + secret)
        self.origin.users["alice"] = secret
        token = "S3CR3T-TOKEN"
        self.origin.tokens[token] = ["repository:lab/app:pull"]
        self.origin.fault("GET /token", body(json_bytes({"token": token})), EVER)
        for auth, forms in (
                ("basic", (secret, urllib.parse.quote(secret, safe=""), base)),
                ("bearer", (token,))):
            self.origin.auth = auth
            for form in forms:
                for number, (match, action) in enumerate(self.repeated(form)):
                    self.output += "x"
                    fault = self.origin.fault(match, action, EVER)
                    with self.subTest(auth=auth, form=form, number=number):
                        ended = self.pull("--debug", self.ref, *self.LOGIN,
                                          stdin=secret)
                        for text in (form, form.lower(), form.rstrip("=")):
                            self.assertNotIn(text, ended.err)
                    fault.retire()

    def test_results_and_progress(self):
        self.origin.auth = "basic"
        told = build_image(FIELD_SMALL, author=PASSWORD, config={
            "Labels": {PASSWORD: "x " + PASSWORD, "source": "ssh://git@h/" + PASSWORD}})
        digest = self.origin.add("lab/app", "1", told)
        self.origin.add("lab/app", "t-" + PASSWORD, told)
        runs = [self.main(*argv, *self.LOGIN, stdin=PASSWORD) for argv in (
            ("inspect", self.ref), ("tags", self.origin.host + "/lab/app"),
            ("pull", "--json", "--progress", "plain", "-o", self.output, self.ref))]
        for ended in runs:
            self.assertEqual(ended.status, 0, ended.err)
            for text in (ended.err.encode("utf-8"), ended.out):
                self.assertFalse([form for form in secret_forms(PASSWORD)
                                  if form in text])
        value = ordered(runs[0].out.decode("ascii"))
        self.assertEqual(dict(value["config"]["Labels"]),
                         {"***": "x ***", "source": "ssh://git@h/***"})
        self.assertEqual(value["digest"], digest)
        self.assertEqual(sorted(runs[1].out.decode("ascii").split()), ["1", "t-***"])
        # What a script goes on with is what it asked for, whatever the password.
        self.origin.users["alice"] = "lab/app"
        ended = self.pull("--json", self.ref, *self.LOGIN, stdin="lab/app")
        self.assertEqual(ordered(ended.out.decode("ascii"))["reference"], self.ref)

    #: (secrets, text, what is shown)
    HIDDEN = (
        ((PASSWORD,), "x S3CR3T y S3CR3T", "x *** y ***"),
        ((PASSWORD,), "xS3CR3Ty", "x***y"),
        ((PASSWORD,), "http://s3cr3t.test", "http://***.test"),
        (("a b/c+",), "a b/c+ a%20b/c%2B a+b%2Fc%2B", "*** *** ***"),
        (("S3CR3T", "S3CR3T-LONGER"), "S3CR3T-LONGER", "***"),
        # too short to be hidden, and too short to be hidden inside a word
        (("pw",), "pw", "pw"),
        (("test",), "test latest test. testing :test@", "*** latest ***. testing :***@"),
        ((None, ""), "as it is", "as it is"),
        # what a URL has before its @, but no name before a digest, and no mail
        ((), "see http://u:x@h/p, a@b", "see http://***@h/p, a@b"),
        ((), "http://u:a@b@h", "http://***@h"),
        ((), "ssh://git@h/x", "ssh://git@h/x"),
        ((), "docker://a:1@sha256:12", "docker://a:1@sha256:12"),
    )

    @rows(HIDDEN)
    def test_hide(self, secrets, text, expected):
        known = imagec.Secrets()
        known.add(*secrets)
        self.assertEqual(known.hide(text), expected)

    def test_secrets_are_kept_in_bounds(self):
        known = imagec.Secrets()
        known.add("S3CR3T-0", "S3CR3T-USED")
        for number in range(imagec.SECRET_FORMS_LIMIT):
            known.add("S3CR3T-%d" % number)
            known.add("S3CR3T-USED")  # as a password is for each token
        self.assertEqual(known.hide("S3CR3T-USED"), "***")
        self.assertEqual(known.hide("S3CR3T-499"), "***")
        self.assertEqual(known.hide("S3CR3T-0"), "S3CR3T-0")

    def test_log_records_of_whoever_listens(self):
        imagec.Credentials("alice", PASSWORD)
        log, seen = logging.getLogger("imagec"), []
        handler = logging.Handler()
        handler.emit = seen.append
        with mock.patch.object(log, "handlers", [handler]), mock.patch.object(
                log, "propagate", False):
            log.warning("%s says %s\n%d%%", "h", PASSWORD, 5)
        self.assertEqual([one.getMessage() for one in seen], [r"h says ***\n5%"])
        self.assertNotIn(PASSWORD, repr(vars(seen[0])))

    def test_values(self):
        """What a traceback, a debugger or a log might show of the objects inside."""
        both = imagec.Credentials("alice", PASSWORD, IDENTITY_TOKEN, "S3CR3T-R")
        bare = [both, imagec.Credentials("alice", PASSWORD), imagec.Token(PASSWORD, 1),
                imagec.Credentials(identity_token=IDENTITY_TOKEN),
                imagec.Credentials(registry_token=PASSWORD)]
        with imagec.Session("alice", PASSWORD, proxy="http://u:S3CR3T@127.0.0.1:1",
                            idle_timeout=1) as session:
            for value in bare + [bare] + [imagec.Keyring(who) for who in bare] + [
                    session, session.transport, imagec.Registry(
                        "127.0.0.1:1", session.transport, both)]:
                self.assert_no_secret(repr(value), str(value), "%s" % (value,))
        for value in bare:
            self.assertFalse(hasattr(value, "__dict__"))


# -- Command line: processes, signals, streams

#: A pull whose look-up of a name never returns: the lock is its own already.
STUCK = """
import ctypes, socket, sys, threading
sys.path.insert(0, sys.argv[1])
import imagec
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(128)
asked = threading.Lock()
def tell():
    with asked:
        print("asked", flush=True)
def look_up(*args, **options):
    lock(mutex)
    asked.release()
    lock(mutex)
asked.acquire()
threading.Thread(target=tell, daemon=True).start()
sys.setswitchinterval(1000)  # it runs when the call has been made, not before
imagec.CLEARING_UP = 0.1
socket.getaddrinfo = look_up
imagec.main(["pull", "-q", "registry.invalid/x:1"])
"""


@able(os.name == "posix", "signal as POSIX has it")
class SignalTest(CommandLineCase):
    """Ctrl-C and SIGTERM end a command at once, wherever it waits (T122, T123)."""

    #: (where it hangs, match, action, requests that hang)
    WAITS = (
        ("probe", "GET /v2/$", hang(), 1),
        ("manifest", MANIFEST, hang(), 1),
        ("layers", "blobs/(?!{config})", hang(), 4),
        ("bodies", "blobs/(?!{config})", drip(60, 20), 4),
        ("between tries", MANIFEST, status(503, {"Retry-After": "30"}), 1),
    )

    def hanging(self, match, action, count):
        """A command that waits for a registry of its own: (process, fault, count)."""
        registry = self.registry()
        image = build_image([tar_bytes([("file%d" % n, b"x")]) for n in range(6)])
        registry.add("lab/app", "1", image)
        match = match.replace("{config}", sha256(image.config))
        fault = registry.fault(match, action, EVER)
        process = self.start("pull", "-q", "-o", self.output,
                             registry.host + "/lab/app:1")
        return process, fault, count

    def check(self, waits, signals, statuses):
        rows = [self.hanging(*wait[1:]) for wait in waits]
        self.wait_until(lambda: all(fault.used >= count for _, fault, count in rows))
        time.sleep(0.02)  # from the request sent to the client waiting for its answer
        begin = time.monotonic()
        for number in signals:
            for process, _, _ in rows:
                process.send_signal(number)
            time.sleep(0.01)
        for wait, (process, _, _) in zip(waits, rows):
            with self.subTest(wait[0], signals=signals):
                ended = self.end_of(process)
                self.assertIn(ended.status, statuses, ended.err)
                self.assert_one_line(ended, ended.status)
        self.assertLess(time.monotonic() - begin, 15)
        self.assertFalse([name for name in self.files()
                          if not name.endswith(".partial")])

    @rows(((WAITS, [signal.SIGINT], [130]), (WAITS[1:3], [signal.SIGTERM], [143]),
           # The second may come when Python is on its way out and obeys it by itself.
           (WAITS[1:3], [signal.SIGINT] * 2, [130, -signal.SIGINT])))
    def test_ended(self, waits, signals, statuses):
        self.check(waits, signals, statuses)

    @able(hasattr(signal, "pthread_kill"), "signal a thread")
    def test_a_call_that_does_not_return(self):
        """Python cannot run a handler then; the second signal ends the process."""
        for first, second, status in ((signal.SIGINT, signal.SIGINT, 130),
                                      (signal.SIGINT, signal.SIGTERM, 143),
                                      (signal.SIGTERM, signal.SIGTERM, 143)):
            process = subprocess.Popen(
                [sys.executable, "-c", STUCK, HOME], cwd=self.root,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.addCleanup(self.reap, process)
            with self.subTest(first=first, second=second):
                self.assertEqual(process.stdout.readline(), b"asked\n")
                process.send_signal(first)
                with self.assertRaises(subprocess.TimeoutExpired):
                    process.wait(0.2)
                process.send_signal(second)
                self.assertEqual(process.wait(10), status)

    def test_ignored_interrupt(self):
        # As of a job in the background: Ctrl-C in its terminal is not meant for it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        with imagec._ending(imagec.Transport()):
            os.kill(os.getpid(), signal.SIGINT)
        self.assertIs(signal.getsignal(signal.SIGINT), signal.SIG_IGN)

    def test_t123_terminated_twice(self):
        done = []
        with self.assertRaises(imagec.Terminated):
            with imagec._ending(imagec.Transport()):
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                finally:
                    os.kill(os.getpid(), signal.SIGTERM)
                    done.append("cleared up")
        self.assertEqual(done, ["cleared up"])
        self.assertNotEqual(signal.getsignal(signal.SIGTERM), signal.SIG_IGN)


@able(os.name == "posix", "run a POSIX shell")
class StreamTest(CommandLineCase):
    """Standard streams that are closed, full, or of a poor encoding (T127, T128)."""

    def test_closed_streams(self):
        pull, missing = ("pull", "-o", self.output, self.ref), self.ref + "none"
        rows = [(argv, closed, statuses, self.start(*argv, redirections=closed))
                for argv, closed, statuses in (
                    # Whether it is an error that nobody wants the result is our choice.
                    (pull, ">&-", (0, 1)), (("digest", self.ref), ">&-", (0, 1)),
                    (("inspect", "--raw", self.ref), ">&-", (0, 1)),
                    (("digest", missing), ">&-", (4,)),
                    (("digest", self.ref), "2>&-", (0,)),
                    (("digest", missing), "2>&-", (4,)))]
        for argv, closed, statuses, process in rows:
            with self.subTest(argv=argv, closed=closed):
                ended = self.end_of(process)
                self.assertNotRegex(ended.err, "Traceback|Exception")
                self.assertIn(ended.status, statuses)
                self.assertEqual(bool(ended.out), closed == "2>&-" and 0 in statuses)
        self.assertTrue([name for name in self.files() if name.endswith("fest.json")])

    def test_closed_stdin(self):
        process = self.start("digest", "-u", "alice", "--password-stdin", self.ref,
                             redirections="<&-")
        self.assert_one_line(self.end_of(process), 2, "password")
        listed = self.file("list", "\ufeff%s\r\nUPPER\r\n" % self.ref)
        process = self.start("pull", "--from-file", "-",
                             redirections="<" + shlex.quote(listed))
        self.assert_one_line(self.end_of(process), 2, "standard input, line 2: .*UPPER")
        process = self.start("pull", "--from-file", "-", redirections="<&-")
        self.assert_one_line(self.end_of(process), 2, "standard input is closed")

    def test_without_docstrings(self):
        done = subprocess.check_output(
            [sys.executable, "-OO", MODULE_PATH, "digest", "-q", self.ref])
        self.assertEqual(done, self.digest.encode() + b"\n")

    def printing(self, stdout):
        """Each command that prints, and how it ends where `stdout` takes nothing."""
        commands = (("pull", "-q", "-o", self.output, self.ref), ("tags", self.ref),
                    ("layers", self.ref), ("inspect", "--raw", self.ref),
                    ("inspect", self.ref))
        started = [self.start(*argv, stdout=stdout) for argv in commands]
        return zip(commands, map(self.end_of, started))

    def test_reader_that_has_had_enough(self):
        reading, writing = os.pipe()
        os.close(reading)
        self.addCleanup(os.close, writing)
        for argv, ended in self.printing(writing):
            self.assertEqual((ended.err, ended.status), ("", 1), argv)
        self.assertTrue([name for name in self.files() if name.endswith("fest.json")])

    @able(os.path.exists("/dev/full"), "fill /dev/full")
    def test_full_output(self):
        with open("/dev/full", "wb") as full:
            for path in self.output, "-":  # the image is what counts
                told = self.start("pull", "-o", path, self.ref, stderr=full)
                self.assertEqual(self.end_of(told).status, 0)
            for argv, ended in self.printing(full):
                with self.subTest(argv=argv):
                    self.assert_one_line(ended, 1, "No space left")

    def test_poor_encodings(self):
        self.origin.add("lab/app", "many", build_index(
            [(self.image, ("linux", "b\xe9\u4e2d", None))]))
        many = self.origin.host + "/lab/app:many"
        place = os.fsencode(os.path.join(self.root, "b\xe9"))
        layout = os.fsencode(os.path.join(self.root, "l\xe9")) + b"\xff"
        self.pull("-q", "--format", "oci", "-o", os.fsdecode(layout), self.ref)
        rows = [(environ, argv, code, self.start(
                *argv, environ=dict(environ, PYTHONUTF8="0")))
                for environ in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"})
                for argv, code in (
                    (("pull", "-q", "--json", "-o", place, self.ref), 0),
                    (("pull", "-q", "-o", place, many), 4), ((b"verify", layout), 0),
                    ((b"digest", b"b\xc3\xa9\xff"), 2))]
        for environ, argv, code, process in rows:
            with self.subTest(environ=environ, argv=argv):
                ended = self.end_of(process)
                self.assertEqual(ended.status, code, ended.err)
                self.assertRegex(ended.err, r"\A(imagec: [ -~]+\n)?\Z")
                self.assertRegex(ended.out.decode("ascii"), r"\A([ -~]+\n)?\Z")


# --------------------------------------------------------------------------------------
# The house itself
# --------------------------------------------------------------------------------------

#: Everything the file may import; a guard against a dependency slipping in.
IMPORTS = frozenset("""
    argparse base64 bz2 collections compression concurrent contextlib email errno fcntl
    fnmatch functools gc getpass glob hashlib hmac http io ipaddress itertools json logging
    lzma os platform queue random re selectors shutil signal socket socketserver ssl stat
    struct subprocess sys tempfile threading time typing urllib zlib
""".split())
NEWER_IMPORTS = {"compression"}  # Python 3.14

#: Name -> the only room that may use it.
ROOM_OF_USE = {
    "http": "Transport", "ssl": "Transport", "socket": "Transport",
    "selectors": "Transport", "urllib.request": "Transport",
    "subprocess": "Proof",
    "print": "Command line", "argparse": "Command line", "signal": "Command line",
    "input": "Command line", "getpass": "Command line",
    "sys.exit": "Command line", "sys.argv": "Command line",
    "sys.stdin": "Command line", "sys.stdout": "Command line",
    "sys.stderr": "Command line", "SystemExit": "Command line",
}
#: (name, room) -> why it may stand there all the same.
WAIVED_USES = {
    ("subprocess", "Credentials"): "a credential helper is a program",
    ("http", "Serve"): "a server speaks HTTP too", ("socket", "Serve"): "and listens",
    ("ssl", "Serve"): "with TLS", ("ssl", "Self-test"): "tells what TLS there is",
    ("urllib.request", "Self-test"): "tells which proxies there are",
}

MUTATORS = frozenset("""
    add append appendleft clear discard extend insert pop popitem popleft remove reverse
    setdefault sort update
""".split())
MUTABLE_CALLS = frozenset("""
    dict list set bytearray OrderedDict defaultdict Counter deque
""".split())

IMPORT_SECONDS = 0.15  # of CPU; the promise is 0.1, the rest is for a busy machine
IMPORT_RATIO = 2  # of what importing takes, to that of what any client must import
IMPORT_FLOOR = ("hashlib", "http.client", "json", "logging", "ssl", "urllib.request")
IMPORT_SCRIPT = """
import importlib, sys, time
sys.path.insert(0, sys.argv[1])
start = time.process_time()
for name in sys.argv[2:]:
    importlib.import_module(name)
print(time.process_time() - start)
if "vendor.imagec" in sys.modules:
    print(sys.modules["vendor.imagec"].Reference.parse("alpine"))
"""


def dotted_name(node):
    """`a.b.c` for a chain of attributes of a name, else None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted_name(node.value)
        return owner and owner + "." + node.attr
    return None


def stored_names(statement):
    """The names a module-level statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return {node.id for target in targets for node in ast.walk(target)
            if isinstance(node, ast.Name)}


def imported_modules(node):
    """The dotted modules an import statement names."""
    if isinstance(node, ast.ImportFrom):
        return [node.module] + [node.module + "." + each.name for each in node.names]
    if isinstance(node, ast.Import):
        return [each.name for each in node.names]
    return []


def globals_of(table):
    """The global names read anywhere inside a symbol table."""
    names = {symbol.get_name() for symbol in table.get_symbols()
             if symbol.is_global() and symbol.is_referenced()}
    return names.union(*map(globals_of, table.get_children()))


class House:
    """imagec.py's source, taken apart by its banners."""

    BANNER = re.compile(r"^# (-{80,})\n# ([0-9]+)  (.+)\n# \1$", re.MULTILINE)
    MAP_ROW = re.compile(r"^ +([0-9]+)  (\S+(?: \S+)*)  +(\S.*)$", re.MULTILINE)

    def __init__(self):
        self.source = file_text(MODULE_PATH)
        self.tree = ast.parse(self.source)
        self.rooms, self.starts = [], []
        for match in self.BANNER.finditer(self.source):
            title, _, about = match.group(3).partition(": ")
            self.rooms.append((int(match.group(2)), title, about))
            self.starts.append(self.source.count("\n", 0, match.start()) + 1)

    def room(self, line):
        """The number of the room a line stands in, 0 for the header."""
        return bisect.bisect_right(self.starts, line)

    def title(self, line):
        """The title of the room a line stands in."""
        number = self.room(line)
        return self.rooms[number - 1][1].rstrip("*") if number else "header"

    def definitions(self):
        """{name: the room that defines it} of the module's own names."""
        return {name: self.room(statement.lineno) for statement in self.tree.body
                if self.room(statement.lineno) for name in stored_names(statement)}


@functools.lru_cache(maxsize=None)
def house():
    return House()


class ArchitectureTest(unittest.TestCase):
    """What the docstring and the README promise of the code, checked on the code."""

    def test_map_is_the_banners(self):
        found = [(int(number), title, about) for number, title, about
                 in House.MAP_ROW.findall(imagec.__doc__)]
        self.assertEqual(found, house().rooms)
        self.assertEqual([number for number, _, _ in found],
                         list(range(1, len(found) + 1)))

    def test_a_room_uses_only_rooms_above(self):
        defined = house().definitions()
        self.assertGreater(len(defined), 150)
        whole = symtable.symtable(house().source, MODULE_PATH, "exec")
        for table in whole.get_children():
            here = house().room(table.get_lineno())
            below = ["%s of room %d" % (name, defined[name])
                     for name in sorted(globals_of(table))
                     if defined.get(name, 0) > max(here, 2)]
            with self.subTest(name=table.get_name(), room=here):
                self.assertEqual(below, [])

    def test_all_is_in_room_order(self):
        defined = house().definitions()
        rooms = [defined[name] for name in imagec.__all__]
        self.assertEqual(rooms, sorted(rooms))
        self.assertEqual(len(set(imagec.__all__)), len(rooms))

    def test_a_name_is_defined_once(self):
        names = [name for one in house().tree.body for name in stored_names(one)]
        self.assertEqual(len(names), len(set(names)), collections.Counter(
            names).most_common(1))

    def test_public_names_have_docstrings(self):
        for name in imagec.__all__:
            self.assertFalse(name.startswith("_"))
            self.assertTrue(getattr(imagec, name).__doc__, name)
        for statement in house().tree.body:
            if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                continue
            named = [statement]
            if statement.name in imagec.__all__ and isinstance(statement, ast.ClassDef):
                named += [part for part in statement.body
                          if isinstance(part, ast.FunctionDef)]
            for node in named:
                if not node.name.startswith("_"):
                    self.assertTrue(ast.get_docstring(node), "%s.%s, line %d" % (
                        statement.name, node.name, node.lineno))

    def test_some_names_belong_to_one_room(self):
        wrong = set()
        for node in ast.walk(house().tree):
            title = house().title(getattr(node, "lineno", 1))
            for name in imported_modules(node) + [dotted_name(node)]:
                for key, room in ROOM_OF_USE.items():
                    if name and (name + ".").startswith(key + ".") and (
                            title not in ("header", room)):
                        wrong.add((key, title))
        self.assertEqual(wrong, set(WAIVED_USES))

    def test_imports_are_the_standard_library(self):
        imported = {name.partition(".")[0] for node in ast.walk(house().tree)
                    for name in imported_modules(node)}
        self.assertEqual(imported, IMPORTS)
        standard = getattr(sys, "stdlib_module_names", IMPORTS)  # from 3.10 on
        self.assertLessEqual(IMPORTS - NEWER_IMPORTS, standard)

    @able(sys.version_info >= (3, 8), "tell where a function ends")
    def test_functions_and_classes_are_short(self):
        lengths = {ast.FunctionDef: [], ast.ClassDef: []}
        for node in ast.walk(house().tree):
            if type(node) in lengths:
                lines = node.end_lineno - node.lineno + 1
                lengths[type(node)].append((lines, node.name))
        self.assertLessEqual(max(lengths[ast.FunctionDef]), (51, ""))
        self.assertLessEqual(max(lengths[ast.ClassDef]), (251, ""))
        functions = sorted(lengths[ast.FunctionDef])
        self.assertLessEqual(functions[len(functions) // 2], (11, ""))

    def test_lines_are_short(self):
        wide = [number for number, line in enumerate(house().source.split("\n"), 1)
                if len(line) > 88]
        self.assertEqual(wide, [])

    def test_module_level_values_are_constants(self):
        for statement in house().tree.body:
            if isinstance(statement, ast.Assign) and self.is_mutable(statement.value):
                for name in stored_names(statement):
                    self.assertRegex(name, "^(_?[A-Z][A-Z0-9_]*|__all__)$")
        for node in ast.walk(house().tree):
            if isinstance(node, ast.arguments):
                for default in filter(None, node.defaults + node.kw_defaults):
                    self.assertFalse(self.is_mutable(default), default.lineno)

    @staticmethod
    def is_mutable(value):
        called = isinstance(value, ast.Call) and dotted_name(value.func) or ""
        return called.rpartition(".")[2] in MUTABLE_CALLS or isinstance(value, (
            ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp))

    #: An error or log line may be shown by whoever shares the process, and must not tell
    #: a secret of another session.
    CHANGED = {"SECRETS"}

    def test_only_the_secrets_are_a_state_of_the_process(self):
        ours = {statement.name for statement in house().tree.body
                if isinstance(statement, ast.ClassDef)
                and "NamedTuple" not in map(dotted_name, statement.bases)}
        made = {name for statement in house().tree.body
                if isinstance(statement, ast.Assign) and any(
                    isinstance(node, ast.Call) and dotted_name(node.func) in ours
                    for node in ast.walk(statement.value))
                for name in stored_names(statement)}
        self.assertEqual(made, self.CHANGED)

    def test_module_level_values_are_never_changed(self):
        constants = {name for name in house().definitions() if name.isupper()}
        constants -= self.CHANGED
        for node in ast.walk(house().tree):
            self.assertNotIsInstance(node, ast.Global)
            changed = None
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                changed = dotted_name(node.value)
            elif isinstance(node, ast.AugAssign):
                changed = dotted_name(node.target)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in MUTATORS:
                    changed = dotted_name(node.func.value)
            self.assertNotIn(changed, constants, "line %d" % getattr(node, "lineno", 0))

    @able(sys.version_info >= (3, 8), "parse as an older Python does")
    def test_source_is_python_3_6(self):
        ast.parse(house().source, feature_version=(3, 6))

    def test_import_does_nothing(self):
        loggers = [logging.getLogger(), logging.getLogger("imagec")]
        before = [list(logger.handlers) for logger in loggers], dict(os.environ)
        threads, code = threading.active_count(), compile(
            house().source, "imagec_again.py", "exec")
        module = types.ModuleType("imagec_again")
        with contextlib.ExitStack() as stack:
            # typing.NamedTuple looks its module up by name.
            stack.enter_context(mock.patch.dict(sys.modules, imagec_again=module))
            for target in ("builtins.open", "io.open", "os.open", "os.mkdir", "os.stat",
                           "socket.socket", "socket.getaddrinfo", "signal.signal",
                           "subprocess.Popen", "threading.Thread.start"):
                stack.enter_context(mock.patch(
                    target, side_effect=AssertionError(target + " on import")))
            exec(code, module.__dict__)
        self.assertEqual(before, ([list(logger.handlers) for logger in loggers],
                                  dict(os.environ)))
        self.assertEqual(threads, threading.active_count())

    def test_import_is_quick_and_works_vendored(self):
        with tempfile.TemporaryDirectory() as root:
            for name, text in (("__init__.py", ""), ("imagec.py", house().source)):
                write_file(os.path.join(root, "vendor", name), text)

            def seconds(*modules):
                out = subprocess.check_output(
                    [sys.executable, "-I", "-c", IMPORT_SCRIPT, root, *modules]).split()
                self.assertEqual(out[1:], [b"docker.io/library/alpine:latest"] * (
                    "vendor.imagec" in modules))
                return float(out[0])

            seconds("vendor.imagec")  # which compiles it
            pairs = []
            for _ in range(20):  # the least of some: a busy machine adds to each
                pairs.append((seconds("vendor.imagec"), seconds(*IMPORT_FLOOR)))
                ours, theirs = (min(column) for column in zip(*pairs))
                if len(pairs) > 4 and ours < min(IMPORT_RATIO * theirs, IMPORT_SECONDS):
                    break
        self.assertLess(ours / theirs, IMPORT_RATIO)
        self.assertLess(ours, IMPORT_SECONDS)


COMMAND_ROW = '^    "%s": (?s:.*?)(?=^    "|^})'
#: Annex -> (annexes that cannot be without it, patterns of what else goes with it).
ANNEXES = {
    "Trees": (("Look",), (", RootfsOutput, FilesOutput(?=\\))",)),
    "Keys": ((), ("\"verify_keys\": SignedBy",)),
    "Verify": (("Self-test",), (COMMAND_ROW % "verify",)),
    "Look": ((), (COMMAND_ROW % "ls", COMMAND_ROW % "cat")),
    "Serve": (("Self-test",), ("^    \"new_server\",\n",
                               COMMAND_ROW % "serve")),
    "Self-test": ((), (COMMAND_ROW % "selftest",)),
}


class AnnexTest(RegistryCase):
    """What the map marks with a star is nothing that a plain pull needs."""

    def without(self, *annexes):
        """The source without some annexes; what is left names nothing of them."""
        lines, titles = house().source.split("\n"), [one[1] for one in house().rooms]
        for start, end, title in reversed(list(zip(
                house().starts, house().starts[1:], titles))):
            if title.rstrip("*") in annexes:
                del lines[start - 1:end - 1]
        source = "\n".join(lines)
        for pattern in [r"^ +[0-9]+  %s\* .*\n" % name for name in annexes] + [
                row for name in annexes for row in ANNEXES[name][1]]:
            source, count = re.subn("(?m)" + pattern, "", source)
            self.assertEqual(count, 1, pattern)
        whole = symtable.symtable(source, MODULE_PATH, "exec")
        names = {one.get_name(): one for one in whole.get_symbols()}
        used = globals_of(whole).union(
            name for name in names if names[name].is_referenced())
        made = {name for name in names
                if names[name].is_assigned() or names[name].is_imported()}
        self.assertEqual([name for name in used - made - set(vars(builtins))
                          if not re.fullmatch("__[a-z]+__", name)], [])
        return source

    def test_any_annex_can_be_deleted_with_its_rows(self):
        self.assertEqual(set(ANNEXES), {title[:-1] for _, title, _ in house().rooms
                                        if title.endswith("*")})
        for name, (users, _) in ANNEXES.items():
            with self.subTest(name):
                self.without(name, *users)

    def test_a_program_without_annexes_pulls(self):
        registry = self.filled(build_image(FIELD_SMALL))
        script = self.file("work/imagec.py", self.without(*ANNEXES))
        for format in ("layers", "oci", "archive"):
            path = self.at(format)
            done = subprocess.run([
                sys.executable, "-I", script, "pull", "-q", "--platform", "linux/amd64",
                "--format", format, "-o", path, registry.host + "/lab/app:1"],
                stderr=subprocess.PIPE, stdout=subprocess.PIPE, timeout=60)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            self.assertEqual(faults_of(path), [])

    def test_a_plain_pull_enters_no_annex(self):
        registry = self.filled(build_image(FIELD_SMALL))
        entered = set()

        def note(frame, event, _arg):
            if event == "call" and frame.f_code.co_filename == imagec.__file__:
                entered.add(house().rooms[house().room(
                    frame.f_code.co_firstlineno) - 1][1])

        for format, name in (("layers", "images"), ("oci", "layout"),
                             ("archive", "image.tar")):
            threading.setprofile(note)
            sys.setprofile(note)
            try:
                run = self.main("pull", "-q", "--platform", "linux/amd64", "--format",
                                format, "-o", self.at(name),
                                registry.host + "/lab/app:1")
            finally:
                sys.setprofile(None)
                threading.setprofile(None)
            self.assertEqual(run.status, 0, run.err)
        self.assertLessEqual({"Registry", "Proof", "Tar", "Store", "Outputs"}, entered)
        self.assertEqual([title for title in entered if title.endswith("*")], [])


# -- The README

README_COMMAND = re.compile(
    r"(?m)^\$? ?((?:echo .*\| )?python3 (?:imagec\.py|test_imagec\.py)[^#\n]*)"
    r"|`((?:echo [^`]*\| )?python3 imagec\.py[^`]*)`")


class ReadmeTest(RegistryCase):
    """What README.md says is so: each command runs, on images served here."""

    def setUp(self):
        super().setUp()
        here = imagec.Platform.host()
        here = ("linux", here.architecture, here.variant or None)
        other = ("linux", "riscv64" if here[1] == "arm64" else "arm64", None)
        image = build_image([tar_bytes([("bin/", None), ("bin/sh", b"#!")])],
                            platform=here)
        self.index = build_index([(image, here), (build_image(
            [tar_bytes([("bin/sh", b"other")])], platform=other), other)])
        self.open = self.registry()
        self.open.add("alpine", "latest", self.index)
        self.open.add("debian", "12", build_image([tar_bytes([("etc/", None)])]))
        self.closed = self.filled(image, "team/app", auth="basic",
                                  users={"USER": PASSWORD})
        self.file("work/cosign.pub", TEST_PUBLIC)
        self.open.add("alpine", self.index.digest.replace(":", "-") + ".sig",
                      signature_image(simple(simple_payload(self.index.digest))))
        self.file("work/images.txt", "# two of them\n%s/alpine\n%s/debian:12\n" % (
            self.open.host, self.open.host))
        self.text = file_text(os.path.join(HOME, "README.md"))
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.work)

    def section(self, title):
        found = self.text.partition("\n## %s\n" % title)[2].partition("\n## ")[0]
        self.assertTrue(found, "README.md has no section " + title)
        return found

    def test_options(self):
        parser = imagec.argument_parser()
        parsers = [parser] + [command for action in parser._actions
                              for command in (action.choices or {}).values()
                              if action.dest == "command"]
        options = {option for one in parsers for action in one._actions
                   for option in action.option_strings if option.startswith("--")}
        named = re.findall("(?<![A-Za-z0-9-])--[a-z][a-z-]*", self.section("Options"))
        self.assertEqual(set(named) | {"--help"}, options)

    def test_exit_statuses(self):
        rows = re.findall("^\\* ([0-9]+):", self.section("Exit statuses"), re.M)
        statuses = set(imagec.EXIT_STATUSES.values()) | {0}
        self.assertEqual({int(row) for row in rows}, statuses)

    def localized(self, command):
        """The command with the names of registries that are here."""
        for pattern, text in (
                (r"\bpython3 ", shlex.quote(sys.executable) + " "),
                (r"\bimagec\.py", os.path.join(HOME, "imagec.py")),
                (r"sha256:<digest>", self.index.digest),
                (r"localhost:5000/debian", self.open.host + "/debian"),
                (r"(?<= )alpine(?=[ @]|$)", self.open.host + "/alpine"),
                (r"(?<= )debian:12", self.open.host + "/debian:12"),
                (r"--tag alpine:", "--tag example.com/alpine:"),
                (r"registry\.example\.com", self.closed.host),
                (r"mirror\.example\.com", self.open.host),
                (r"0\.0\.0\.0:5000", "127.0.0.1:0"),
                (r"docker load", "tar tf - >&2")):
            command = re.sub(pattern, lambda match: text, command)
        return command

    def run_it(self, command):
        """(exit status, output): in this process where no shell is needed."""
        if "|" not in command and " serve " not in command:
            ended = self.main(*shlex.split(command)[2:], HOME=self.work)
            return ended.status, ended.err
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=dict(os.environ, HOME=self.work, PASSWORD=PASSWORD),
            start_new_session=True)
        if " serve " in command:
            self.assertIn(b"serving", process.stdout.readline())
            os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output.decode("utf-8", "replace")

    @needs("bash")
    def test_every_command(self):
        commands = [(first or second).replace("\\|", "|").strip()
                    for first, second in README_COMMAND.findall(self.text)]
        self.assertGreater(len(commands), 20)
        for command in commands:
            if "test_imagec.py" in command:
                continue  # this is it
            with self.subTest(command):
                status, output = self.run_it(self.localized(command))
                expected = 143 if " serve " in command else 0
                self.assertIn(status, (expected, -signal.SIGTERM), output)

    def test_tests_named_are_there(self):
        named = set(re.findall(r"`([A-Z][A-Za-z]+Test)`", self.text))
        self.assertGreater(len(named), 8)
        self.assertLessEqual(named, set(vars(sys.modules[__name__])))


# --------------------------------------------------------------------------------------
# Threats: faults at every phase, fuzzing, kills, limits
# --------------------------------------------------------------------------------------


# -- Faults at every phase, for every format

#: Whether each fault meets each format, which takes minutes; else they take turns.
THREAT_PRODUCT = bool(os.environ.get("IMAGEC_TEST_ALL"))
#: Phase -> what its request looks like; {names} are filled in by the test.
THREAT_PHASES = collections.OrderedDict([
    ("probe", "GET /v2/$"),
    ("token", "/token"),
    ("index", "/manifests/1$"),
    ("manifest", "/manifests/{manifest}$"),
    ("config", "/blobs/{config}$"),
    ("first layer", "/blobs/{first}$"),
    ("last layer", "/blobs/{last}$"),
])
THREAT_ALL = tuple(THREAT_PHASES)
THREAT_TOLD, THREAT_PINNED = THREAT_ALL[1:3], THREAT_ALL[3:]
THREAT_BODIES = THREAT_ALL[1:]
THREAT_SOME = ("probe", "token", "manifest", "last layer")  # one of each way to read


def threat_names(image):
    """The digests that THREAT_PHASES speak of."""
    # Largest first: that is the order one worker fetches them in.
    order = sorted(set(image.layers), key=lambda one: -len(image.blobs[one]))
    return {"manifest": image.digest, "config": sha256(image.config),
            "first": order[0], "last": order[-1]}


def threat_cut_headers(reply):
    """Closed in mid-headers, which http.client takes for their end."""
    reply.cut, reply.ending = ("headers", 40), "fin"
    return reply


#: (error class, word) of its message, then name, action, times, phases
THREAT_FAULTS = worded(
    ((imagec.RegistryError, "405"), ("no registry", status(405), 1, ("probe",))),
    ((imagec.NotFound, "404"), ("not there", status(404), 1, THREAT_BODIES)),
    ((imagec.AccessDenied, "access denied"), ("forbidden", status(403), 1, THREAT_ALL[1:])),
    ((imagec.RegistryError, "410"), ("gone", status(410), 1, ("index", "last layer"))),
    ((imagec.RegistryError, "418"), ("teapot", status(418), 1, THREAT_ALL)),
    ((imagec.RegistryError, "500"), ("broken", status(500), EVER, THREAT_SOME)),
    ((imagec.RegistryError, "502"), ("bad gateway", status(502), EVER, THREAT_ALL)),
    ((imagec.RegistryError, "too many requests: HTTP 429"),
     ("busy", status(429), EVER, THREAT_ALL)),
    ((imagec.RegistryError, "204"), ("no content", status(204), 1, THREAT_SOME)),
    ((imagec.AccessDenied, "401"),
     ("never welcome", status(401, {"WWW-Authenticate": "Basic"}), EVER,
      THREAT_ALL[3:6])),
    ((imagec.TransportError, ""),
     ("reset in the status, T100", reset(4, "status"), EVER, THREAT_ALL),
     ("reset in the headers, T100", reset(0.5, "headers"), EVER, THREAT_ALL),
     ("closed in the headers, T100", threat_cut_headers, EVER, THREAT_SOME),
     ("reset in the body, T100", reset(), EVER, THREAT_BODIES),
     ("cut, T22", truncate(), EVER, THREAT_BODIES),
     ("cut chunks, T22", [chunked(7), truncate(0.9)], EVER, THREAT_BODIES)),
    ((imagec.TransportError, "did not answer in HTTP"),
     ("junk, T114", garbage(b"SSH-2.0-x\r\n"), EVER, THREAT_ALL)),
    ((imagec.TransportError, "ambiguous"),
     ("two lengths, T113", headers(content_length=["7", "8"]), 1, THREAT_ALL)),
    ((imagec.UnsafeRedirect, "file:///etc/passwd"),
     ("to a file, T79", redirect("file:///etc/passwd"), 1, THREAT_ALL)),
    ((imagec.UnsafeRedirect, "ftp://127.0.0.1/x"),
     ("to ftp, T79", redirect("ftp://127.0.0.1/x"), 1, ("index", "first layer"))),
    ((imagec.UnsafeRedirect, "from https to http"),
     ("to http, T77", redirect("http://127.0.0.1/x"), 1, THREAT_SOME[:3])),
    ((imagec.UnsafeRedirect, "to another host, https://localhost"),
     ("a token elsewhere", redirect("https://localhost/x"), 1, ("token",))),
    ((imagec.UnsafeRedirect, "127.0.0.1"),
     ("to a user", redirect("https://u:p@127.0.0.1/"), 1, THREAT_ALL)),
    ((imagec.UnsafeRedirect, "loop"),
     ("to itself, T56", redirect("?"), EVER, THREAT_ALL)),
    ((imagec.InvalidDocument, "JSON"), ("page", body(HTML), 1, THREAT_TOLD)),
    ((imagec.VerificationError, "expected"),
     ("page", body(HTML), 1, THREAT_PINNED),
     ("nothing", body(b""), 1, THREAT_PINNED),
     ("one byte more, T24", extra(1), 1, THREAT_PINNED)),
    ((imagec.InvalidDocument, ""),
     ("nothing", body(b""), 1, THREAT_TOLD),
     ("deep", body(b"[" * 99999), 1, THREAT_TOLD)),
    ((imagec.InvalidDocument, "twice"),
     ("twice the key", body(b'{"a": 1, "a": 2}'), 1, THREAT_TOLD)),
    ((imagec.VerificationError, "expected digest"),
     ("flipped bit, T21", flip(7), 1, THREAT_PINNED),
     ("last bit flipped, T21", flip(), 1, THREAT_PINNED)),
    ((imagec.LimitExceeded, "limit"),
     ("endless, T52", endless(), EVER, THREAT_ALL[1:5]),
     ("lying length, T53", headers(content_length="9" * 12), 1, THREAT_ALL[1:4])),
    ((imagec.SizeMismatch, "at least"),
     ("endless, T52", endless(), EVER, THREAT_ALL[5:])),
    ((imagec.DigestMismatch, "disagree"),
     ("lying header", headers(docker_content_digest=sha256(b"")), 1, THREAT_ALL[2:4])),
    ((imagec.TransportError, ""),
     ("many headers", garbage(b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 99999), EVER,
      THREAT_ALL)),
)

THREAT_STALLS = worded(
    ((imagec.Timeout, "next to nothing"),
     ("a byte at a time, T57", drip(0.02, 1), EVER, THREAT_BODIES),
     ("stops in the body, T109", drip(60, 20), EVER, THREAT_BODIES),
     ("a byte of the status at a time, T57", drip(0.02, 1, "status"), EVER, THREAT_ALL),
     ("a byte of the headers at a time, T57", drip(0.02, 1, "headers"), EVER,
      THREAT_ALL),
     ("headers for ever, T58", [garbage(b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 9999),
                                drip(0.02, 17, "status")], EVER, THREAT_ALL),
     ("no answer, T109", hang(30), EVER, THREAT_ALL)),
)

#: (phase, action) of a fault that passes. T100
THREAT_PASSING = (
    ("status", reset(4, "status")), ("headers", reset(0.5, "headers")),
    ("body", reset()), ("nothing sent", garbage(b"")), ("cut body", truncate()),
    ("cut chunks", [chunked(9), truncate()]), ("503", status(503)),
    ("junk", garbage(b"\0" * 50)),
)


class FaultsCase(ThreatCase):
    """What every fault leaves behind: one clear error, and nothing half-made."""

    def setUp(self):
        super().setUp()
        index = build_index([(self.image, ("linux", "amd64", None))])
        self.source = self.filled(index, auth="bearer", tls=True)
        self.ref = self.source.host + "/lab/app:1"
        old = build_image([tar_bytes([("old", b"old")])])
        self.source.add("lab/app", "0", old)
        self.good |= {self.image.digest} | set(old.layers)
        self.names = threat_names(self.image)
        for format, name in OUTPUTS:
            os.mkdir(self.at(name + "-before"))
            if name != "root":
                self.fetch(self.ref[:-1] + "0", format, self.at(name + "-before", name))

    def each(self, table, check):
        """Call `check` with an output, a path to it, a phase and what is in the row."""
        turns, cases = itertools.cycle(OUTPUTS), itertools.count()
        for row, (fault, action, times, phases, *expected) in enumerate(table):
            for phase in phases if THREAT_PRODUCT else phases[row % 2::2] or phases:
                for format, name in OUTPUTS if THREAT_PRODUCT else [next(turns)]:
                    case = self.at("case")
                    shutil.copytree(self.at(name + "-before"), case)
                    struck = self.strike(phase, action, times)
                    with self.subTest(fault=fault, phase=phase, name=name):
                        check(format, os.path.join(case, name), phase, next(cases),
                              *expected)
                        self.assertTrue(struck.used)
                    remove(case)
            next(turns)  # or a phase would always meet the same format

    def strike(self, phase, action, times):
        for _ in range(50):  # a connection that is left could still take a fault
            if self.source._live:
                time.sleep(0.002)
        del self.source.faults[:], self.source.requests[:], self.naps[:]
        match = THREAT_PHASES[phase].format(**self.names)
        return self.source.fault(match, action, times)

    def check(self, format, path, phase, number, error):
        case = os.path.dirname(path)
        before = contents(case)
        kind, word = error
        jobs, stalls = (1, 4)[number % 2], kind is imagec.Timeout
        for idle in (0.4, 5) if stalls else (5,):
            # DownloadTest counts all five tries.
            with mock.patch("imagec.ATTEMPTS", 1 if stalls else 2), mock.patch(
                    "imagec.PATIENCE", 1 if stalls else imagec.PATIENCE):
                with threat_alarm(20), self.fails(kind, word) as caught:
                    self.fetch(self.ref, format, path, jobs=jobs, username="alice",
                               password=PASSWORD, idle_timeout=idle)
            if self.source.faults[0].used:
                break  # else a busy machine was silent before the server was
        self.assertEqual(*map(imagec.exit_status, (caught.exception, kind.__new__(kind))))
        if kind in (imagec.TransportError, imagec.Timeout):
            self.assertIn("127.0.0.1", str(caught.exception))
        # One more for each kept connection that may just have been stale.
        self.assertLessEqual(self.source.faults[0].used, 2 + jobs)
        after = contents(case)
        self.assertEqual({n: after.get(n) for n in before}, before)
        good = self.good - {self.names.get(phase.split()[0])}
        for name in set(after) - set(before):
            if ".partial" not in name:
                self.assertIn(sha256(after[name]), good, name)
        self.assert_only_verified(path)
        self.assert_nothing_beside(path)
        self.assertEqual(imagec_threads(), 0)
        if THREAT_PRODUCT or number % 3 == 0:
            del self.source.faults[:]
            self.fetch(self.ref, format, path)
            self.check_whole(path)

    def check_whole(self, path):
        self.assert_whole(path)
        self.assert_nothing_beside(path)
        self.assert_no_leftovers()


class StallsTest(FaultsCase):
    """A server that is silent, or nearly: T57 T58 T109 T163."""

    def test_every_stall_at_every_phase(self):
        self.each(THREAT_STALLS, self.check)

    def test_t57_t109_the_whole_has_its_limit(self):
        """Slow but steady is no stall; --timeout ends it."""
        self.strike("first layer", drip(0.01, 40), EVER)
        for format, name in OUTPUTS:
            with threat_alarm(20), self.fails(imagec.Timeout, "0.3 seconds", "--timeout"):
                self.fetch(self.ref, format, self.at(name), timeout=0.3)
            self.assert_only_verified(self.at(name))


class FaultsTest(FaultsCase):
    """A server that fails, breaks off or says what it must not: T21 T22 T25 T100 T163.
    """

    def test_every_fault_at_every_phase(self):
        self.each(THREAT_FAULTS, self.check)

    def test_t100_faults_that_pass(self):
        expected = {}
        for format, name in OUTPUTS:
            case = self.at(name + "-whole")
            shutil.copytree(self.at(name + "-before"), case)
            self.fetch(self.ref, format, os.path.join(case, name))
            expected[name] = contents(case)

        def check(format, path, _phase, _number):
            self.fetch(self.ref, format, path, jobs=1)
            self.assertEqual(contents(os.path.dirname(path)),
                             expected[os.path.basename(path)])
            self.check_whole(path)
            self.assertLessEqual(len(self.naps), 1)

        self.each([row + (1, THREAT_BODIES[:-1]) for row in THREAT_PASSING], check)

    def test_t100_faults_before_http_that_pass(self):
        for name, action in (("reset", reset(phase="accept")),
                             ("closed", hang(0, "accept")),
                             ("junk", garbage(b"\x15\x03\x01\0\2\2\x50", "accept"))):
            with self.subTest(name):
                self.strike("probe", action, 1)
                if name == "junk":  # an answer, and none that will change
                    with self.fails(imagec.TransportError):
                        self.fetch(self.ref, "layers", self.at(name))
                    continue
                self.fetch(self.ref, "layers", self.at(name), jobs=1)
                self.assert_whole(self.at(name))


# -- Fuzzing: whatever comes, only ImagecError comes out

THREAT_SEED = int(os.environ.get("IMAGEC_FUZZ_SEED", "20140612"))
THREAT_SECONDS = float(os.environ.get("IMAGEC_FUZZ_SECONDS", "2"))
THREAT_CASE_SECONDS = 10  # after which a case counts as hanging
THREAT_CASE_BYTES = imagec.XZ_MEMORY_LIMIT + (32 << 20)
THREAT_ODD = ODD_VALUES + (
    False, 0, 1, 1e308, 1 << 70, "a\0b", "/", "../../canary", {"": None},
    {"a": {"b": []}}, "sha512:" + "0" * 128, "9" * 40, "application/json",
)
THREAT_WORDS = (
    b"\0", b"\n", b"\r\n", b"\r\n\r\n", b'"', b"\\", b"{", b"}", b"[[[[", b",", b":",
    b"null", b"NaN", b"1e999", b"-1", b"9" * 50, b"\xff\xfe", b"\xed\xa0\x80", b"../",
    b"\\000", b"\\057", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd",
    b"\t",
)
THREAT_HEADS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Type: text/plain\r\n\r\nbody",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4;a=b\r\nbody\r\n0\r\n\r\n",
    b"HTTP/1.0 206 Partial\r\nContent-Range: bytes 0-3/4\r\n\r\nbody",
    b"HTTP/1.1 302 Found\r\nLocation: /again?x=y\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 401 No\r\nWWW-Authenticate: Basic\r\n\r\n",
)
THREAT_CHALLENGES = (
    'Bearer realm="https://auth.test/token",service="a b",scope="repository:x:pull"',
    'Basic realm="x\\"y", Bearer realm=/token, charset=UTF-8', "Negotiate abc==, Basic",
)


class ReplacedTest(ThreatCase):
    """A pull that fails leaves the image that was there as it was (T163).

    The registry has compressed the same layers anew: other blobs, of the same names.
    """

    def setUp(self):
        super().setUp()
        self.old, self.new = (
            build_index([(build_image(
                THREAT_TARS + THREAT_TARS[:1], config={"User": str(level)},
                compress=functools.partial(gzip_bytes, level=level)),
                ("linux", "amd64", None))]) for level in (9, 1))
        self.source = self.filled(self.old)
        self.ref = self.source.host + "/lab/app:1"
        self.image = self.new.children[0]
        self.names = threat_names(self.image)

    def each(self, check, outputs=OUTPUTS):
        """`check(format, path)` where the old image is, and the new one is offered."""
        for format, name in outputs:
            if name != "root":  # that is refused where anything is
                path = self.at(name)
                self.source.add("lab/app", "1", self.old)
                self.fetch(self.ref, format, path)
                self.source.add("lab/app", "1", self.new)
                del self.source.requests[:]
                with self.subTest(format=format, name=name):
                    check(format, path)
                del self.source.faults[:]
                self.clear()

    def state(self, path):
        files = contents(path) if os.path.isdir(path) else {"": file_bytes(path)}
        return {name: data and sha256(data) for name, data in files.items()}

    def assert_kept(self, path, before):
        self.assert_sound(path)
        after = self.state(path)
        self.assertEqual({name: after.get(name) for name in before}, before)

    def assert_sound(self, path):
        """Blobs that the next run goes on with are no fault."""
        self.assertEqual([fault for fault in faults_of(path)
                          if "extra, nothing" not in fault], [])

    def asked(self, digest):
        """How often a blob was asked for."""
        return sum(request.path.endswith("/blobs/" + digest)
                   for request in self.source.requests)

    def rerun(self, format, path, struck):
        """The next run completes, and fetches no layer that came whole before."""
        whole = [digest for digest in self.image.layers if digest not in struck
                 and self.names["last"] in struck]
        del self.source.faults[:], self.source.requests[:]
        self.fetch(self.ref, format, path)
        self.assert_whole(path)
        self.assert_no_leftovers()
        self.assertEqual([self.asked(digest) for digest in whole], [0] * len(whole))

    def test_each_phase(self):
        for phase, match in THREAT_PHASES.items():
            if phase in ("probe", "token"):
                continue  # nothing has been touched then
            for action, kind in ((status(404), imagec.NotFound),
                                 (flip(), imagec.VerificationError)):
                with self.subTest(phase=phase, kind=kind):
                    self.each(functools.partial(self.check_phase, match.format(
                        **self.names), action, kind), OUTPUTS if THREAT_PRODUCT else
                        [next(self.turns), next(self.turns)])

    def check_phase(self, match, action, kind, format, path):
        before = self.state(path)
        self.source.fault(match, action, EVER)
        with self.assertRaises((kind, imagec.InvalidDocument)):
            self.fetch(self.ref, format, path, jobs=1)
        self.assert_kept(path, before)
        self.rerun(format, path, match)
        if format == "layers":
            self.assertLessEqual(set(self.image.layers),
                                 set(self.state(path).values()))

    def test_another_image_of_the_same_command(self):
        """Nothing of the first is replaced when the second fails."""
        self.second = build_image([tar_bytes([("x", b"x")])])
        self.source.add("lab/app", "2", self.second)
        self.each(self.check_second)

    def check_second(self, format, path):
        if path.endswith("root.tar"):
            return  # it holds one image
        before = self.state(path)
        self.source.fault(self.second.layers[0], status(404), EVER)
        with self.assertRaises(imagec.NotFound), imagec.Session(jobs=1) as session:
            self.pulled_by(session, path, format, self.ref, self.ref[:-1] + "2")
        self.assert_kept(path, before)

    def test_each_local_call(self):
        """Up to the last moment the old image is there; then the new one is.

        In other formats each name is that of one blob, or the whole is one file.
        """
        for name, code in (("write", errno.ENOSPC), ("open", errno.EMFILE)):
            for at in range(1, 99, 1 if THREAT_PRODUCT else 3):
                used = []
                with self.subTest(call=name, at=at):
                    self.each(functools.partial(self.check_call, name, code, at, used),
                              OUTPUTS[:1])
                if not any(used):
                    break

    def check_call(self, name, code, at, used, format, path):
        before, broken = self.state(path), FailsOnce(name, code, at)
        with mock.patch.object(os, name, broken):
            try:
                self.fetch(self.ref, format, path, jobs=1)
                failed = False
            except (OSError, imagec.ImagecError):
                failed = True
        used.append(broken.calls >= at)
        if failed:
            self.assert_kept(path, before)
        self.fetch(self.ref, format, path)
        self.assert_whole(path)
        self.assert_no_leftovers()


def threat_mutated(dice, data):
    """Some bytes with a few things changed."""
    data = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(data) + 1)
        to = min(len(data), at + dice.choice((1, 2, 8, 100)))
        change = dice.randrange(6)
        if change == 0 and at < len(data):
            data[at] ^= 1 << dice.randrange(8)
        elif change == 1:
            del data[at:to]
        elif change == 2:
            data[at:at] = dice.choice(THREAT_WORDS)
        elif change == 3:
            data[at:to] = dice.choice(THREAT_WORDS)
        elif change == 4:
            data[at:at] = data[at:to] * dice.choice((1, 2, 30))
        elif dice.random() < 0.3:
            del data[at:]
    return bytes(data)


def threat_odd_json(dice, raw):
    """A JSON text with a member replaced or removed, or with its bytes bent."""
    if dice.random() < 0.4:
        return threat_mutated(dice, raw)
    document = json.loads(raw.decode("utf-8"))
    for _ in range(dice.randint(1, 2)):
        *path, last = dice.choice([p for p in json_places(document) if p] or [("x",)])
        try:
            owner = functools.reduce(lambda value, key: value[key], path, document)
            if dice.random() < 0.15:
                del owner[last]
            else:
                owner[last] = copy.deepcopy(dice.choice(THREAT_ODD))
        except (LookupError, TypeError):
            continue  # went with an earlier change
    return json_bytes(document)


def threat_odd_tar(dice, tar):
    """A tar with changed headers whose checksums fit again, or with bent bytes."""
    if dice.random() < 0.3:
        return threat_mutated(dice, tar)
    data = bytearray(tar)
    for _ in range(dice.randint(1, 3)):
        at = 512 * dice.randrange(max(1, len(data) // 512))
        field, size = dice.choice(((0, 100), (100, 8), (108, 8), (124, 12), (136, 12),
                                   (156, 1), (157, 100), (257, 8), (345, 155)))
        value = dice.choice((b"../../canary/x", b"/", b".wh..wh..opq", b"777", b"-1",
                             b"\x80" + b"\0" * 3 + b"\1", b"\xff" * 12, b"etc/a/b", b"",
                             b"S", b"x", b"g", b"L", b"1", b"2", b"3", b"5", b"etc"))
        data[at + field:at + field + size] = value[:size].ljust(size, b"\0")
        data[at + 148:at + 156] = b" " * 8
        total = sum(data[at:at + 512])
        data[at + 148:at + 156] = b"%06o\0 " % total
    return bytes(data)


class FuzzTest(ThreatCase):
    """Mutations, the same for the same seed; T36 T37 T59 T86 T140 T153 among them.

    IMAGEC_FUZZ_SECONDS is for how long, IMAGEC_FUZZ_SEED where from,
    IMAGEC_FUZZ_CASE=FAMILY:NUMBER a single case.
    """

    FAMILIES = ("manifest", "config", "challenge", "signature", "layer", "http",
                "token", "verify", "output", "pull")
    ON_DISK = ("layer", "verify", "output", "pull")  # OSError may come out

    def setUp(self):
        super().setUp()
        os.mkdir(os.path.join(self.root, "canary"))
        self.raw = Scripted({})
        self.addCleanup(self.raw.close)
        self.images = [build_image(THREAT_TARS, kind=kind) for kind in (
            "oci", "docker", "schema1", "schema1-signed")]
        self.index = build_index([(self.image, ("linux", "amd64", None)),
                                  (self.image, ("linux", "arm64", "v8"))])
        self.manifests = [one.manifest for one in self.images + [self.index]]
        self.outputs = [self.at(name) for _, name in OUTPUTS]
        for (format, _), path in zip(OUTPUTS, self.outputs):
            self.fetch(self.ref, format, path)
        self.decoded = imagec.decode_manifest(self.image.manifest)

    def test_nothing_but_our_errors(self):
        single = os.environ.get("IMAGEC_FUZZ_CASE")
        if single:
            family, _, number = single.partition(":")
            return self.run_case(family, int(number))
        for family in self.FAMILIES:
            with self.subTest(family):
                end = time.monotonic() + THREAT_SECONDS / len(self.FAMILIES)
                for number in itertools.count():
                    self.run_case(family, number)
                    if time.monotonic() > end and number >= 8:
                        break
        self.assertEqual(os.listdir(os.path.join(self.root, "canary")), [])
        self.assertLessEqual(set(os.listdir(self.root)),
                             {"canary", "work", "scratch"})

    def run_case(self, family, number):
        dice = random.Random("%d %s %d" % (THREAT_SEED, family, number))
        allowed = (imagec.ImagecError,) + (OSError,) * (family in self.ON_DISK)

        def case():
            with contextlib.suppress(*allowed):
                getattr(self, "fuzz_" + family)(dice)

        try:
            with threat_alarm(THREAT_CASE_SECONDS):
                if number % 16 == 8:  # to measure takes its time
                    self.assertLess(peak_memory(case), THREAT_CASE_BYTES)
                else:
                    case()
        except Exception as error:
            case = "seed %d, case %s:%d" % (THREAT_SEED, family, number)
            raise AssertionError("%s: %r" % (case, error)) from error

    @contextlib.contextmanager
    def bent(self, path, data):
        """A file holds something else while the block runs."""
        before = file_bytes(path)
        write_file(path, data)
        try:
            yield
        finally:
            write_file(path, before)

    def test_found_by_fuzzing(self):
        """What mutations have found: names of images that are no texts."""
        index, bent = os.path.join(self.outputs[1], "index.json"), self.at("bent.tar")
        files = threat_rows(self.outputs[2])
        for odd in (b"7", b"[1]", b'{"a": 1}'):
            data = re.sub(rb'("io.containerd.image.name":)"[^"]*"',
                          lambda match: match.group(1) + odd, file_bytes(index))
            with self.subTest(odd), self.bent(index, data):
                self.assertTrue(faults_of(self.outputs[1]))
                with self.assertRaises(imagec.ImagecError):
                    imagec.Shelf(self.outputs[1])
            write_file(bent, tar_bytes([
                (name, re.sub(rb'("RepoTags":\[)"[^"]*"',
                              lambda match: match.group(1) + odd, data))
                for name, data in files]))
            self.assertTrue(faults_of(bent))
        self.assertEqual(faults_of(self.outputs[1]) + faults_of(self.outputs[2]), [])

    def fuzz_manifest(self, dice):
        raw = threat_odd_json(dice, dice.choice(self.manifests))
        kind = dice.choice(list(imagec.MANIFEST_SHAPES) + ["text/html", "x\ud800"])
        found = imagec.decode_manifest(raw, dice.choice((None, kind)))
        if isinstance(found, imagec.Index):
            imagec.matching(found, imagec.Platform.parse("linux/arm64"))
        elif isinstance(found, imagec.Manifest):
            imagec.list_layers(found, imagec.ImageConfig.parse(self.image.config))
        else:
            imagec.list_layers(found)
            imagec.modern_config(found, [imagec.Digest.of(b"")] * dice.randrange(4))

    def fuzz_config(self, dice):
        config = imagec.ImageConfig.parse(threat_odd_json(dice, self.image.config))
        str(config.platform)
        for layer in imagec.list_layers(self.decoded, config):
            layer.v1_json.encode("utf-8")

    def fuzz_challenge(self, dice):
        values = [threat_mutated(dice, dice.choice(THREAT_CHALLENGES).encode()).decode(
            "latin-1") for _ in range(dice.randint(1, 2))]
        for challenge in imagec.Challenge.parse(values):
            with contextlib.suppress(imagec.ImagecError):
                url = imagec.auth_url(challenge, "a", "https://r.test/v2/")
                self.assertRegex(url, r"\Ahttps://[^\s@\\]*\Z")
        imagec.Challenge.choose(imagec.Challenge.parse(values))

    def fuzz_signature(self, dice):
        raw = self.images[3].manifest
        protected = json.loads(raw.decode())["signatures"][0]["protected"]
        if dice.random() < 0.5:
            bent = url64(threat_odd_json(dice, base64url_decode(protected)))
            raw = raw.replace(protected.encode(), bent.encode())
        else:
            raw = threat_mutated(dice, raw)
        found = imagec.PrettySignature.parse(raw)
        if found is not None:
            imagec.decode_manifest(raw)

    def fuzz_layer(self, dice):
        tar = threat_odd_tar(dice, dice.choice(THREAT_TARS))
        pack = dice.choice((bytes, gzip_bytes, bz2.compress,
                            functools.partial(lzma.compress, preset=0)))
        blob = pack(tar)
        if dice.random() < 0.3:
            blob = threat_mutated(dice, blob)
        scratch = os.path.join(self.root, "scratch")
        remove(scratch)
        kind = imagec.LayerPack if dice.random() < 0.3 else imagec.LayerStore
        store = kind(os.path.join(scratch, "layer"))
        unpacked(pieces(blob, itertools.repeat(4096)), limit=1 << 20,
                 visit=store.visit)
        tree = imagec.Tree()
        tree.apply(store.entries)
        if isinstance(store, imagec.LayerPack):
            imagec.write_tree_tar(tree, lambda data: None)
        else:
            imagec.TreeWriter(tree).write(os.path.join(scratch, "root"))

    @contextlib.contextmanager
    def told(self, data):
        """A Transport whose server says this and nothing else."""
        self.raw.replies = dict.fromkeys(("/x", "/again"), spoken(data))
        with contextlib.closing(self.transport(timeout=2, idle_timeout=0.2)) as sender:
            yield sender

    def fuzz_http(self, dice):
        data = threat_mutated(dice, dice.choice(THREAT_HEADS))
        with self.told(data) as sender:
            with sender.open("GET", self.raw.url + "/x") as reply:
                reply.read(1 << 20, "body")

    def fuzz_token(self, dice):
        reply = threat_odd_json(dice, b'{"token": "abc", "access_token": "def", '
                                b'"expires_in": 60, "refresh_token": "ghi"}')
        who = imagec.Credentials("alice", PASSWORD, dice.choice((None, IDENTITY_TOKEN)))
        with self.told(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (
                len(reply), reply)) as sender:
            imagec.fetch_token(sender, self.raw.url + "/x", who)

    def fuzz_verify(self, dice):
        """A file of what a pull wrote is bent: verify says so, and serve lives."""
        path = dice.choice(self.outputs)
        victim = dice.choice([path] if os.path.isfile(path) else [
            os.path.join(path, name) for name in sorted(contents(path))
            if not os.path.islink(os.path.join(path, name))])
        bent = self.bend(dice, victim)
        with self.bent(victim, bent):
            imagec.Audit().check(path)
            imagec.Shelf(path)

    @staticmethod
    def bend(dice, path):
        """The bytes of a file with something changed, as suits its kind."""
        before = file_bytes(path)
        if path.endswith("image.tar") and dice.random() < 0.6:
            rows = threat_rows(path)
            row = dice.choice([row for row in rows if row[0].endswith("json")])
            row[1] = threat_odd_json(dice, row[1])
            return tar_bytes(rows)
        if before[:1] == b"{":
            return threat_odd_json(dice, before)
        return (threat_odd_tar if b"ustar" in before else threat_mutated)(dice, before)

    def fuzz_output(self, dice):
        """A pull into a layout whose documents are bent adds to it, or refuses."""
        name = dice.choice(("index.json", "oci-layout"))
        victim = os.path.join(self.outputs[1], name)
        with self.bent(victim, threat_odd_json(dice, file_bytes(victim))):
            self.fetch(self.ref, "oci", self.outputs[1])

    def fuzz_pull(self, dice):
        """An image that is bent, with digests that fit, into any output."""
        tars = [threat_odd_tar(dice, tar) if dice.random() < 0.4 else tar
                for tar in THREAT_TARS]
        image = build_image(tars, kind=dice.choice(("oci", "docker", "schema1")))
        if dice.random() < 0.5:
            raw = threat_odd_json(dice, image.manifest)
            image = BuiltImage(raw, image.media_type)
        self.source.add("lab/app", "bent", image)
        (format, name), case = dice.choice(OUTPUTS), self.at("bent")
        os.mkdir(case)
        try:
            with mock.patch("imagec.ATTEMPTS", 1):
                self.fetch(self.ref[:-1] + "bent", format, os.path.join(case, name))
        finally:
            remove(case)


# -- Killed, interrupted, terminated

THREAT_KILLS = int(os.environ.get("IMAGEC_KILLS", "10"))
THREAT_SIGNALS = ((signal.SIGINT, 130), (signal.SIGTERM, 143)) + (
    ((signal.SIGKILL, -signal.SIGKILL),) if hasattr(signal, "SIGKILL") else ())
KILLS_OF_ONE = 10  # until a pull may end


class KillCase(RegistryCase):
    """Pulls that are ended by a signal."""

    dice = random.Random(SEED)

    def hit(self, servant, argv, is_time, number, late=0, patches=None):
        """Send the signal to a command line when it is time, or that much later."""
        started = servant.start(*argv, small=True, patches=patches)
        self.wait_until(is_time)
        time.sleep(late)
        os.kill(started[0], number)
        return servant.end(started)

    def check_kill_9(self, host, path, image):
        """Into each format, side by side; see pull_killed."""
        layers = {digest: len(image.blobs[digest]) for digest in image.layers}
        table = OUTPUTS[:4]
        with concurrent.futures.ThreadPoolExecutor(len(table)) as pool:
            ends = [pool.submit(self.pull_killed, *row, host, path, layers)
                    for row in table]
            for (format, name), end in zip(table, ends):
                with self.subTest(format):
                    end.result()
                    self.assertEqual(faults_of(self.at(name)), [])

    def pull_killed(self, format, name, host, path, layers):
        """Kill a pull again and again: it costs a buffer, not what is on disk.

        `layers` are {digest: size}.
        """
        def asked():
            return [offset for digest, offset in list(relay.asked) if digest in layers]

        def on_disk():
            """Sizes of the layers; those an archive takes in would count twice."""
            return {path: size for path, size in field_files(self.root).items()
                    if self.at(name) in path
                    and re.search(r"/[0-9a-f]{64}(\.tar)?(\.partial)?$", path)}

        relay, size = Relay(host), sum(layers.values())
        self.addCleanup(relay.close)
        argv = ["pull", "-q", "-j", "1", "--format", format, "-o", self.at(name),
                relay.host + path]
        # What the program, the kernel and the relay hold.
        buffer = imagec.CHUNK + 5 * BLOCK
        with contextlib.closing(Servant()) as servant:
            for number in range(KILLS_OF_ONE):
                before, count, came = on_disk(), len(asked()), relay.carried
                goal = (number + self.dice.random()) / KILLS_OF_ONE * 0.85 * size
                relay.limit = max(goal, came) + BLOCK  # however late we are
                run = self.hit(servant, argv, lambda: relay.carried >= goal
                               and len(asked()) > count, signal.SIGKILL)
                self.assertEqual(run.status, -signal.SIGKILL)
                went = relay.carried - came
                relay.let_go()
                begun = [size for path, size in before.items()
                         if path.endswith(".partial") and size not in layers.values()]
                self.assertEqual(asked()[count], sum(begun))
                self.assertLessEqual(len(begun), 1)
                if format != "archive":
                    more = sum(on_disk().values()) - sum(before.values())
                    self.assertGreaterEqual(more, went - buffer)
            self.assertEqual(servant.end(servant.start(*argv)).status, 0)
        self.assertLessEqual(relay.carried, size * 1.05 + KILLS_OF_ONE * buffer)


@THREAT_POSIX
class KillTest(KillCase, ThreatProcessCase):
    """Signals at any moment of a pull into any format: T121 T122 T123."""

    #: Layers come by several connections.
    RANGED = {"RANGE": 4096, "RANGES_AFTER": 0, "RANGES_LEFT": 4096,
              "RANGES_PACE": 1 << 60}

    def test_kill_9(self):
        image = field_noisy_image(5 << 18, compress=None)
        self.check_kill_9(self.filled(image).host, "/lab/app:1", image)

    def test_any_moment(self):
        self.image = build_image([tar_bytes([
            ("d%d" % n, None), ("d%d/f" % n, noise(6000 * n + 6000, n))])
            for n in range(4)])
        old = build_image([tar_bytes([("old", b"old")])])
        self.good = set(self.image.layers + old.layers)
        self.source.add("lab/app", "1", self.image)
        self.source.add("lab/app", "0", old)
        self.source.fault("/blobs/", drip(0.001, 1500), EVER)
        for kill, (format, name), signalled in zip(
                range(THREAT_KILLS), itertools.cycle(OUTPUTS),
                itertools.cycle(THREAT_SIGNALS)):
            self.patches = self.RANGED if self.dice.random() < 0.5 else {}
            with self.subTest(kill=kill, name=name, signal=signalled,
                              ranged=bool(self.patches)):
                self.check(format, name, *signalled)
            self.clear()

    def check(self, format, name, number, status):
        path = self.at(name)
        beside = path if name != "root" else self.at("old")
        self.complete(self.ref[:-1] + "0", format, beside)
        before = contents(self.work)
        run = self.hit_anywhere(format, path, number)
        if sys.version_info >= (3, 8):  # before, Python tells what a finalizer raised
            self.assertLessEqual(run.err.count("\n"), 1)
        if run.status == -number != -signal.SIGKILL:
            # All was done, and it on its way out: there Python itself obeys.
            self.assert_whole(path)
            self.assert_no_leftovers()
        elif run.status:
            self.assertEqual(run.status, status, run.err)
            self.assertEqual(run.err.count("imagec: "), number != signal.SIGKILL)
        self.assert_only_verified(path)
        after = contents(self.work)
        if name in ("root", "images"):  # the others grow, or are replaced whole
            self.assertEqual({n: after.get(n) for n in before}, before)
        if os.path.isdir(path) and name == "root":
            self.assert_whole(path)  # all but the sweeping was done
        else:
            self.complete(self.ref, format, path)
            self.assert_no_leftovers()
        self.assert_whole(beside)

    def complete(self, ref, format, path):
        """A pull that nothing stops completes what is not complete."""
        run = self.run_alone(*self.pull_argv(ref, format, path))
        self.assertEqual(run.status, 0, run.err)
        self.assert_whole(path)

    def hit_anywhere(self, format, path, number):
        """Pull, and send the signal after so many bytes, or so long after the last."""
        size = sum(map(len, self.image.blobs.values()))
        # At least one: before that Python may still be starting, and obeys by itself.
        goal = self.source.sent_blob_bytes + max(
            1, min(1, self.dice.uniform(0, 1.5)) * size * 0.9)
        return self.hit(self.servant, self.pull_argv(self.ref, format, path),
                        lambda: self.source.sent_blob_bytes >= goal, number,
                        late=self.dice.uniform(0, 0.03), patches=self.patches)


# -- Local faults

#: os function -> what it fails with; each in turn is made to fail at some call.
THREAT_CALLS = (
    ("write", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EXDEV),
    ("mkdir", errno.EACCES), ("open", errno.EMFILE), ("ftruncate", errno.EROFS),
    ("write", errno.EDQUOT), ("rename", errno.EPERM), ("open", errno.EROFS),
    ("unlink", errno.EACCES), ("link", errno.EMLINK), ("chmod", errno.EPERM),
)


class LocalFaultsTest(ThreatCase):
    """The disk and the host fail: T120 T126 T129 T130 T133."""

    def setUp(self):
        super().setUp()
        self.source.add("lab/app", "0", build_image([tar_bytes([("old", b"old")])]))
        self.dice = random.Random(THREAT_SEED)

    def broken(self, name, code, at, format, path):
        """Pull while a function of os fails at one call: (how many, what came out)."""
        fault, error = FailsOnce(name, code, at), None
        with mock.patch.object(os, name, fault):
            try:
                self.fetch(self.ref, format, path, jobs=1)
            except (imagec.ImagecError, OSError) as caught:
                error = caught
        return fault.calls, error

    def test_t120_t126_t129_any_call_may_fail(self):
        """At some call of each kind: nothing half-made, and the next run completes."""
        for name, code in THREAT_CALLS:
            self.each(self.check_calls, name, code, outputs=OUTPUTS if THREAT_PRODUCT
                      else [next(self.turns), next(self.turns)])

    def check_calls(self, format, path, name, code):
        if not path.endswith("root"):
            self.fetch(self.ref[:-1] + "0", format, path)
        calls, _ = self.broken(name, code, 0, format, self.at("dry"))
        at = calls and self.dice.randint(1, calls)
        with self.subTest(call=name, code=errno.errorcode[code], at=at, format=format):
            before = contents(path)
            _, error = self.broken(name, code, at, format, path)
            self.assert_only_verified(
                path, self.good.union(map(sha256, before.values())))
            if isinstance(error, OSError):
                self.assertEqual(error.errno, code)
                self.assertEqual(imagec.exit_status(error), 1)
            if os.path.isdir(path) and path.endswith("root"):
                return  # the last word came late, or was not needed: it is whole
            with threat_alarm(5):
                self.fetch(self.ref, format, path)
            self.assert_whole(path)

    def test_t121_a_root_is_whole_when_it_has_its_name(self):
        """Ended right after the rename, it passes verify."""
        rename = os.rename

        def ended(source, target, **options):
            rename(source, target, **options)
            if target == self.at("root"):
                raise KeyboardInterrupt

        with mock.patch.object(os, "rename", ended), \
                self.assertRaises(KeyboardInterrupt):
            self.fetch(self.ref, "rootfs", self.at("root"))
        self.assert_whole(self.at("root"))

    def test_t133_the_first_error_is_the_one_told(self):
        """Where not even the place for a layer's files can be made."""
        refused = PermissionError(errno.EACCES, "Permission denied", "layers")
        with mock.patch.object(imagec.LayerStore, "__init__", side_effect=refused):
            for name in ("root", "root.tar"):
                self.assert_one_line(self.pull("rootfs", self.at(name)), 1,
                                     "Permission denied")

    @everywhere
    def test_t126_destination_is_a_file(self, format, path):
        """Told before the network is asked; a tar may be replaced, its parent not."""
        place = os.path.join(path, "x.tar") if path.endswith(".tar") else path
        write_file(path, b"mine")
        self.assert_one_line(self.pull(format, place), 1, re.escape(path))
        self.assertEqual(contents(self.work), {os.path.basename(path): b"mine"})
        self.assertEqual(self.source.requests, [])

    @everywhere
    def test_destination_deleted_during_the_pull(self, format, path):
        """One clear error or a whole image, and the next run completes."""
        def emptied(reply):
            for name in os.listdir(self.work):
                remove(self.at(name))
            return reply

        self.source.fault("/blobs/%s" % self.image.layers[-1], emptied)
        run = self.pull(format, path, "-j", "1")
        if run.status:
            self.assert_one_line(run, 1)
            self.assert_only_verified(path)
            run = self.pull(format, path)
            self.assertEqual(run.status, 0, run.err)
        self.assert_whole(path)

    @able(os.path.exists("/dev/full"), "fill /dev/full")
    def test_t120_full_device(self):
        for format in ("archive", "rootfs"):
            self.assert_one_line(self.pull(format, "/dev/full"), 1, "No space left")
            self.assertTrue(stat.S_ISCHR(os.stat("/dev/full").st_mode))
        self.assertEqual(os.listdir(self.work), [])

    @everywhere
    def test_t135_no_locks_no_hard_links(self, format, path):
        """NFS, FAT and the like have neither; a directory pull does without."""
        self.image = build_image(THREAT_TARS + THREAT_TARS[:1])
        self.source.add("lab/app", "2", self.image)
        refused = mock.Mock(side_effect=OSError(errno.ENOTSUP, "not supported"))
        with mock.patch.object(os, "link", refused), \
                mock.patch("fcntl.flock", refused):
            self.fetch(self.ref[:-1] + "2", format, path)
        self.assert_whole(path)

    @staticmethod
    def threads(count):
        """A context in which imagec gets so many threads (the registry gets its own).
        """
        left = [None] * count

        def start(thread, true=threading.Thread.start):
            if thread._target.__module__ in ("imagec", "concurrent.futures.thread"):
                if not left:
                    raise RuntimeError("can't start new thread")
                left.pop()
            true(thread)

        return mock.patch.object(threading.Thread, "start", start)

    @everywhere
    def test_t130_no_threads(self, format, path):
        """A container's limit of processes: one layer after the other."""
        for count in (0, 1, 2):
            with self.threads(count):
                run = self.pull(format, path)
            self.assertEqual((run.status, run.err), (0, ""))
            self.assert_whole(path)
            self.clear()

    @needs_zstd
    def test_t130_no_thread_for_a_program(self):
        self.source.add("lab/app", "1", build_image(THREAT_TARS, compress=zstd_bytes))
        with self.threads(0), mock.patch.dict(sys.modules, compression=None):
            self.assert_one_line(self.pull("rootfs", self.at("root")), 1,
                                 "no thread is to be had: raise the limit")

    @everywhere
    def test_t126_places_that_are_gone(self, format, path):
        os.symlink(self.at("nowhere"), path)
        self.assert_one_line(self.pull(format, path), 1, "%s: is a link to what is not "
                             "there; choose another" % re.escape(path))
        os.mkdir(self.at("gone"))
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.at("gone"))
        os.rmdir(self.at("gone"))
        name = os.path.basename(path)
        self.assert_one_line(self.pull(format, name), 1, "%s: the current directory is "
                             "not there any more; choose another" % re.escape(name))
        os.chdir(self.root)
        self.assertEqual((os.listdir(self.work), self.source.requests), ([name], []))

    @everywhere
    def test_t136_path_too_long(self, format, path):
        deep = os.path.join(self.work, *["d" * 200] * 25 + [os.path.basename(path)])
        self.assert_one_line(self.pull(format, deep), 1, "longer than")
        self.assertFalse(contents(self.work))


@THREAT_POSIX
class LocalLimitsTest(ThreatProcessCase):
    """Limits of the host, and other pulls: in processes of their own."""

    image = build_image([tar_bytes([("f%d" % n, noise(9000, n))]) for n in range(6)])

    def offer(self, files):
        """The image is another one."""
        self.image = build_image([tar_bytes([pair]) for pair in files.items()])
        self.source.add("lab/app", "1", self.image)

    def side_by_side(self, count, **options):
        """`count` pulls at once into each destination: {path: their ends}."""
        started = [(self.at(name), self.start(*self.pull_argv(
            self.ref, format, self.at(name)), **options))
            for format, name in OUTPUTS for _ in range(count)]
        ends = collections.OrderedDict()
        for path, process in started:
            ends.setdefault(path, []).append(self.end(process))
        return ends

    def alone(self, check, **options):
        """Pull into each destination, and call with the path and what came of it."""
        for path, (run,) in self.side_by_side(1, **options).items():
            with self.subTest(os.path.basename(path)):
                check(path, run)

    def check_done(self, path, run):
        self.assertEqual((run.status, run.err), (0, ""))
        self.assert_whole(path)

    def test_t124_several_at_once(self):
        for count in (2, 8):
            for path, runs in self.side_by_side(count).items():
                with self.subTest(path=os.path.basename(path), count=count):
                    good = [run for run in runs if not run.status]
                    self.assertTrue(good, [run.err for run in runs])
                    for run in runs:
                        if path.endswith("root") and run not in good:
                            self.assert_one_line(run, 1)  # it is there already
                        else:
                            self.check_done(path, run)
            self.assert_no_leftovers()
            self.clear()

    def check_too_large(self, path, run):
        self.assert_one_line(run, 1, re.escape(os.path.basename(path)))
        self.assertIn("File too large", run.err)
        self.assert_only_verified(path)

    def test_t120_file_size_limit(self):
        """The limit strikes in mid-blob, or in mid-archive."""
        self.alone(self.check_too_large, limits={"RLIMIT_FSIZE": 8000})
        self.assert_nothing_beside(*[self.at(name) for _, name in OUTPUTS])
        self.alone(self.check_done)

    def test_t120_file_size_limit_where_layers_are_unpacked(self):
        """No fault of the image: its blob is small enough, what is in it is not."""
        def check(path, run):
            if not os.path.basename(path).startswith("root"):
                return self.check_done(path, run)
            if path.endswith("root"):  # who, and not where on its way
                self.assertIn("'zeros' of layer " + self.image.layers[0], run.err)
                self.assertNotIn("partial", run.err)
            self.assert_one_line(run, 1, "File too large")
            self.assertFalse(os.path.lexists(path))

        self.offer({"zeros": bytes(500000)})
        self.alone(check, limits={"RLIMIT_FSIZE": 100000})

    def test_t130_few_files(self):
        """Thirty-two descriptors are enough for four jobs, whatever there is."""
        self.offer({"f%d" % n: b"%d" % n for n in range(60)})
        self.alone(self.check_done, limits={"RLIMIT_NOFILE": 32})

    def test_t130_too_few_files(self):
        def check(path, run):
            self.assert_one_line(run, 1, "Too many open files")
            self.assert_only_verified(path)

        self.alone(check, limits={"RLIMIT_NOFILE": 7})

    def test_t131_umask(self):
        """Nothing is for others to write; what is under way in a rootfs, not to see."""
        def check(path, run):
            self.check_done(path, run)
            if path.endswith("root"):
                return  # the image says
            for _, facts in [(path, os.stat(path))] + list(below(path)):
                wanted = 0o777 if stat.S_ISDIR(facts.st_mode) else 0o666
                self.assertEqual(stat.S_IMODE(facts.st_mode), wanted & ~0o27)

        self.alone(check, umask=0o27)

    def test_t129_temporary_directory_elsewhere(self):
        """Nothing passes through TMPDIR: it may be small, slow, or another's."""
        other = tempfile.mkdtemp(dir="/tmp" if SCRATCH else None)
        self.addCleanup(remove, other)
        os.chmod(other, 0)
        self.alone(self.check_done, environ={"TMPDIR": other})
        os.chmod(other, 0o700)
        self.assertEqual(os.listdir(other), [])


# -- Time that is up

#: (function, of which class or module, format, output, is it pulled twice): where time
#: is up
THREAT_WORK = (
    ("unpack", imagec, "layers", "layers", False),
    ("_existing", imagec.Download, "layers", "layers", True),
    ("_existing", imagec.Download, "oci", "oci", True),
    ("prove", imagec, "oci", "oci", False),
    ("_existing", imagec.Download, "archive", "image.tar", True),
    ("_move", imagec.ArchiveOutput, "archive", "image.tar", False),
    ("apply", imagec.Tree, "rootfs", "root", False),
    ("write", imagec.TreeWriter, "rootfs", "root", False),
    ("_move", imagec.TreeWriter, "rootfs", "root", False),
    ("tree_tar_size", imagec, "rootfs", "root.tar", False),
    ("write_tree_tar", imagec, "rootfs", "root.tar", False),
    ("_copy_data", imagec, "rootfs", "root.tar", False),
)


class WorkTest(ThreatCase):
    """Whatever is done when time is up, or Ctrl-C comes, is not done to its end."""

    image = build_image(THREAT_TARS[1:] + THREAT_TARS[1:2])  # one is there twice

    def ended(self, place, name, format, path, end):
        """Pull; when that function begins, set `end` of it: what came of it all."""
        done, work = [], getattr(place, name)
        session = self.session(jobs=1, timeout=99)

        def late(*args, **options):
            setattr(session.transport, *end)
            done.append("begun")
            result = work(*args, **options)
            done.append("done")
            return result

        with mock.patch.object(place, name, late):
            try:
                self.fetch(self.ref, format, path, session)
            except BaseException as error:
                return error, done
        return None, done

    @rows([row + end for row in THREAT_WORK for end in (
        (imagec.Timeout, "deadline", 0),
        (KeyboardInterrupt, "stop", KeyboardInterrupt()))])
    def test_at_its_beginning(self, name, place, format, output, again, kind, *end):
        path = self.at(output)
        if again:
            self.fetch(self.ref, format, path)
        if name == "prove":  # what an earlier run has left
            blobs = os.path.join(path, "blobs", "sha256")
            os.makedirs(blobs)
            for digest in self.image.layers:
                write_file(os.path.join(blobs, digest[7:] + ".partial"),
                           self.image.blobs[digest][:99])
        error, done = self.ended(place, name, format, path, end)
        self.assertIsInstance(error, kind)
        self.assertEqual(done[-1], "begun")
        self.source.add("lab/app", "1", self.image)
        self.clear()


# -- Bombs

THREAT_ZEROS = 130 << 20  # bytes of the layer that memory is measured with
THREAT_MEMORY = 48 << 10  # KiB


def threat_long(name):
    """A file with a long name, GNU's way."""
    return tar_member(name + b"\0", kind=b"L", name=b"././@LongLink") + tar_header()


def threat_sparse_map():
    """A sparse file whose map of a mebibyte has no end, as often as it fits."""
    return pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + tar_member(
        b"99999999\n" + b"0\n" * (500 << 10))


def threat_link_chain(count):
    """Hard links, each to the one that follows it."""
    return tar_bytes([("l%d" % n, b"", {"type": b"1", "linkname": "l%d" % (n + 1)})
                      for n in range(count)] + [("l%d" % count, b"x")])


def threat_link_maze():
    """A link by way of half a million directories, and members that pass it."""
    target = b"a/../" * 100000 + b"a"
    return tar_header(kind=b"5", name=b"a") + tar_member(
        target + b"\0", kind=b"K", name=b"././@LongLink") + tar_header(
            kind=b"2", name=b"s") + b"".join(
                tar_header(name=b"s/f%d" % n) for n in range(300))


#: (name, layer blob, word of the refusal or None where it may be taken)
THREAT_BOMBS = (
    ("gzip, T50", lambda: gzip_bytes(bytes(5 << 20), 1), "max-layer-size"),
    ("gzip of many members, T50", lambda: gzip_bytes(bytes(1 << 20)) * 20,
     "max-layer-size"),
    ("bzip2, T51", lambda: bz2.compress(bytes(5 << 20), 1), "max-layer-size"),
    ("xz, T51", lambda: lzma.compress(bytes(5 << 20), preset=0), "max-layer-size"),
    ("xz memory, T51", lambda: lzma.compress(b"x", filters=[
        {"id": lzma.FILTER_LZMA2, "dict_size": 256 << 20, "mode": lzma.MODE_FAST,
         "mf": lzma.MF_HC3, "nice_len": 2}]), "emory"),
    ("pax header of 8 GiB, T67", lambda: tar_header((8 << 30) - 1, b"x"), "limit"),
    ("long name of 8 GiB, T67", lambda: tar_header((8 << 30) - 1, b"L"), "limit"),
    ("file of 8 GiB, T50", lambda: tar_header((8 << 30) - 1), "max-layer-size"),
)
#: (name, tar): what a rootfs must refuse, or make, in the time and memory it has.
THREAT_ROOT_BOMBS = (
    ("long names, T67", lambda: b"".join(
        threat_long(b"%06d" % n + b"x" * 900000) for n in range(60))),
    ("long names of directories, T67 T68", lambda: b"".join(
        threat_long(b"%04d/" % n * 100000) for n in range(20))),
    ("many pax records, T67", lambda: b"".join(tar_member(b"".join(
        b"31 SCHILY.xattr.user.%06d=xx\n" % n for n in range(30000)), kind=b"x")
        + tar_header(name=b"f%d" % m) for m in range(20))),
    ("a sparse map without end, T152", threat_sparse_map),
    ("a chain of hard links, T157", lambda: threat_link_chain(2000)),
    ("a link through a maze, T157", threat_link_maze),
    ("many members, T67", lambda: b"".join(
        tar_header(name=b"f%d" % n) for n in range(20000))),
)
THREAT_DOCUMENTS = (
    ("a million layers, T61", b'{"schemaVersion": 2, "mediaType": "%s", "config": {}, '
     b'"layers": [%s]}' % (MEDIA_TYPES["oci"]["manifest"].encode(),
                           b",".join([b"{}"] * 1300000))),
    ("a million entries, T60", b'{"schemaVersion": 2, "manifests": [%s]}'
     % b",".join([b"{}"] * 1300000)),
    ("a million numbers, T61", b'{"schemaVersion": 2, "layers": [%s]}'
     % b",".join([b"0"] * 2000000)),
    ("deep, T54", b'{"a":' * 800000),
    ("many keys, T35", b"{%s}" % b",".join(b'"%x":0' % n for n in range(350000))),
    ("digits, T55", b'{"schemaVersion": %s}' % (b"9" * 4000000)),
    ("a long text, T52", b'{"mediaType": "%s"}' % (b"\\u0000" * 690000)),
)


FIFTY, FIFTY_MORE = (
    b"".join(tar_header(name=b"%s%02d" % (name, n)) for n in range(50)) + TAR_END
    for name in (b"a", b"b"))
DEEP = b"".join(tar_header(name=b"%d/" % n + b"d/" * 33 + b"f") for n in range(2))
#: (name, layers, --max-files, exit status, words)
MEMBERS_COUNTED = (
    ("one layer", [FIFTY], "50", 0, ""),
    ("one more", [FIFTY], "49", 1, "--max-files"),
    ("two layers", [FIFTY, FIFTY_MORE], "100", 0, ""),
    ("one more in both", [FIFTY, FIFTY_MORE], "99", 1, "--max-files"),
    ("one layer twice", [FIFTY, FIFTY], "50", 0, ""),
    ("implied", [DEEP + TAR_END], "70", 0, ""),
    ("one more implied", [DEEP + TAR_END], "69", 1, "--max-files"),
    ("names", [FIFTY, FIFTY_MORE, tar_header(name=b"x") + TAR_END], "1000", 3,
     "limit of 300 bytes"),
)


class BombTest(ThreatCase):
    """Small things that want to be large: T50 T51 T54 T55 T60 T61 T67 T68."""

    @rows(THREAT_BOMBS)
    def test_t50_t51_t67_layers(self, _name, make, word):
        image = build_image([make()], compress=None)
        self.source.add("lab/app", "1", image)
        with cpu_within(3):
            for format, name in OUTPUTS[::3]:
                run = self.pull(format, self.at(name), "--max-layer-size", "100000")
                self.assert_one_line(run, 1 if word == "max-layer-size" else 3, word)
                self.assertLessEqual(set(map(os.path.basename, contents(
                    self.work))), {"lock.partial"})

    @rows(MEMBERS_COUNTED)
    def test_t67_t68_members_are_counted(self, _name, tars, limit, status, words):
        """Those of all layers together, and the directories they imply."""
        image = build_image(tars)
        self.source.add("lab/app", "1", image)
        for path in (self.at("root"), self.at("root.tar")):
            with mock.patch.object(imagec, "MEMBER_NAMES_LIMIT", 300):
                run = self.pull("rootfs", path, "--max-files", limit)
            if not status:
                self.assertEqual((run.status, run.err), (0, ""))
                continue
            self.assert_one_line(run, status, words)
            self.assertTrue(any(one in run.err for one in image.layers))
            self.assertFalse(os.path.lexists(path))
        self.clear()

    def test_t68_a_layer_that_starts_over_is_counted_once(self):
        image = build_image([tar_bytes([("f%02d" % n, noise(50, n))
                                        for n in range(50)])])
        self.source.add("lab/app", "1", image)
        begun = self.file("work/root.partial.d/blobs/%s.partial" % image.layers[0][7:],
                          gzip_bytes(tar_header(9)))  # left by another run, and cut
        os.chmod(os.path.dirname(begun), 0o700)
        os.chmod(self.at("root.partial.d"), 0o700)
        run = self.pull("rootfs", self.at("root"), "--max-files", "50")
        self.assertEqual((run.status, run.err), (0, ""))
        self.assertEqual(len(os.listdir(self.at("root"))), 50)

    def test_t62_t152_holes_that_the_disk_cannot_hold(self):
        """Holes take no room where they are unpacked, but in a tar they are zeros."""
        layer = pax_sparse([], 64 << 20, b"x") + TAR_END
        self.source.add("lab/app", "1", build_image([layer]))
        usage = collections.namedtuple("Usage", "total used free")(1 << 30, 0, 32 << 20)
        with mock.patch("shutil.disk_usage", return_value=usage), mock.patch.object(
                imagec, "write_tree_tar") as written:
            self.assert_one_line(self.pull("rootfs", self.at("root.tar")), 1,
                                 r"root.tar: 6\d{7} bytes are needed, 3355443")
            self.assertEqual(written.mock_calls, [])
        run = self.pull("rootfs", self.at("root.tar"))
        self.assertEqual(run.status, 0, run.err)
        with tarfile.open(self.at("root.tar")) as tar:
            self.assertEqual(tar.getmember("x").size, 64 << 20)

    def test_t54_t55_t60_t61_manifests(self):
        for name, raw in THREAT_DOCUMENTS:
            with self.subTest(name):
                self.assertLess(len(raw), imagec.DOCUMENT_LIMIT)
                with cpu_within(10), self.assertRaises(imagec.InvalidDocument):
                    imagec.decode_manifest(raw)


@THREAT_POSIX
class MemoryTest(ThreatProcessCase):
    """Memory does not depend on what a layer unpacks to: T50 T67."""

    def test_t50_a_layer_of_zeros(self):
        head, block = tar_header(THREAT_ZEROS, name=b"zeros"), bytes(10 << 20)
        count = THREAT_ZEROS // len(block)
        blob = gzip_bytes(head) + gzip_bytes(block, 1) * count + gzip_bytes(TAR_END)
        digest = hashlib.sha256(head)
        for data in [block] * count + [TAR_END]:
            digest.update(data)
        self.source.add("lab/app", "1", build_image([blob], compress=None, rootfs={
            "type": "layers", "diff_ids": ["sha256:" + digest.hexdigest()]}))
        for format, name in OUTPUTS[:3]:
            with self.subTest(format=format):
                run = self.run_alone(*self.pull_argv(self.ref, format, self.at(name),
                                                     "-j", "1"))
                self.assertEqual((run.status, run.err), (0, ""))
                self.assertLess(run.peak, THREAT_MEMORY)

    @rows(THREAT_ROOT_BOMBS)
    def test_t67_t68_t152_t157_root_file_systems(self, _name, make):
        """Refused or made in seconds; what headers hold does not add up."""
        self.source.add("lab/app", "1", build_image([make() + TAR_END], compress=(
            functools.partial(gzip_bytes, level=1))))
        run = self.run_alone(
            *self.pull_argv(self.ref, "rootfs", self.at("root.tar")),
            limits={"RLIMIT_CPU": 10}, patches={"MEMBER_NAMES_LIMIT": 32 << 20})
        self.assertIn(run.status, (0, 3), run.err)
        self.assertLess(run.peak, THREAT_MEMORY + (32 << 10))


# -- Limits

def counted(document, name):
    """decode_manifest() of a document with so many entries of that name."""
    return lambda n: imagec.decode_manifest(json_bytes(dict(
        document, **{name: document[name][:1] * n})))


#: (the limit, what it is set to, what has n of what it counts)
LIMITS = (
    ("PATH_LENGTH_LIMIT", 9, lambda n: imagec.Reference.parse("h.io/" + "a" * n)),
    ("NUMBER_LIMIT", 9, lambda n: imagec.Document.parse(b'{"":' + b"1" * n + b"}", "")),
    ("JSON_COUNT_LIMIT", 9, lambda n: imagec.Document.parse(
        b'{"a":[%s]}' % b",".join([b"{}"] * (n - 2)), "x")),
    ("JSON_DEPTH_LIMIT", 9, lambda n: imagec.Document.parse(
        b'{"":' * n + b"1" + b"}" * n, "")),
    ("INTEGER_LIMIT", 9, lambda n: imagec.Document({"size": n - 1}, "").size("size")),
    ("LAYER_COUNT_LIMIT", 9, counted(IMAGE_DOC, "layers")),
    ("LAYER_COUNT_LIMIT", 9, lambda n: imagec.decode_manifest(
        build_image([bytes(1024)] * n, "schema1").manifest)),
    ("INDEX_COUNT_LIMIT", 9, counted(INDEX_DOC, "manifests")),
    ("HEADER_LIMIT", 9, lambda n: imagec.Challenge.parse(["Basic".ljust(n)])[0]),
    ("TAR_EXTENSION_LIMIT", 900, lambda n: walked(
        [tar_member(b"a" * n, kind=b"L") + A_FILE])),
    ("PAX_COUNT_LIMIT", 9, lambda n: walked(
        [tar_member(b"6 a=b\n" * n, kind=b"x") + A_FILE])),
    ("_DEPTH_LIMIT", 9, lambda n: flat_tree(["a/" * n])),
    ("_LINK_LIMIT", 9, lambda n: flat_tree(["b/ " + " ".join(
        "l%d->l%d" % (i, i + 1) for i in range(1, n)) + " l%d->b l1/x=1" % n])),
    ("PATH_PARTS_LIMIT", 9, lambda n: imagec.new_output("/" * n, "archive", stream=1)),
    ("PATH_MAX", 9, lambda n: imagec.new_output("a" * n, "archive", stream=1)),
)


class LimitsTest(unittest.TestCase):
    """A limit lets through as much as it says, and no more."""

    @rows(LIMITS)
    def test_below_at_and_above(self, name, limit, make):
        with mock.patch.object(imagec, name, limit):
            make(limit - 1)
            make(limit)
            with self.assertRaises((imagec.ImagecError, IndexError)):
                make(limit + 1)


# -- Rows of the catalogue that no other room tests

#: Modules the program imports, early or late: traps of these names lie around.
THREAT_TRAPS = ("json", "tarfile", "queue", "bz2", "lzma", "shutil", "tempfile", "http",
                "concurrent", "select", "fcntl", "signal", "argparse", "subprocess",
                "ipaddress", "ssl", "base64")


class ThreatRowsTest(ThreatCase):
    """Threats that are met by a pull as a whole."""

    def setUp(self):
        super().setUp()
        self.document = json.loads(self.image.manifest.decode("ascii"))

    def everywhere(self, code, words=""):
        """Pull the changed manifest into every format: it ends so."""
        self.source.add_manifest("lab/app", "1", json_bytes(self.document),
                                 MEDIA_TYPES["oci"]["manifest"])
        self.each(self.check, code, words)

    def check(self, format, path, code, words):
        run = self.pull(format, path)
        if code:
            return self.assert_one_line(run, code, words)
        self.assertEqual((run.status, run.err), (0, ""))
        self.assert_whole(path)

    def test_t45_types_that_do_not_fit(self):
        """Magic decides how to unpack; a manifest may mix docker's types and OCI's."""
        tars = THREAT_TARS[:1] * 4
        packs = [bytes, gzip_bytes, bz2.compress, lzma.compress]
        rootfs = {"type": "layers", "diff_ids": [sha256(tar) for tar in tars]}
        self.image = build_image([pack(tar) for pack, tar in zip(packs, tars)],
                                 compress=None, rootfs=rootfs)
        self.source.add("lab/app", "1", self.image)
        self.document = json.loads(self.image.manifest.decode("ascii"))
        kinds = ("vnd.oci.image.layer.v1.tar+gzip", "vnd.oci.image.layer.v1.tar",
                 "vnd.docker.image.rootfs.diff.tar.gzip", "vnd.oci.image.layer.v1.tar")
        for layer, kind in zip(self.document["layers"], kinds):
            layer["mediaType"] = "application/" + kind
        self.everywhere(0)

    def test_t46_layers_that_are_no_tar(self):
        """Refused by what unpacks; what only carries bytes leaves it to verify."""
        def check(format, path, code, good):
            if format in ("layers", "rootfs"):
                self.assertEqual(self.pull(format, path).status, code)
                self.assert_only_verified(path, good)

        for blob, code in ((b"no tar at all" * 99, 3), (b"x", 3), (bytes(1024), 0),
                           (bytes(10240), 0)):
            self.image = build_image([blob], compress=None)
            self.source.add("lab/app", "1", self.image)
            self.each(check, code, set(self.image.layers))

    def test_t48_more_than_an_image(self):
        """Inline data is not believed."""
        config, layer = self.document["config"], self.document["layers"][0]
        config["data"] = base64.b64encode(b"lies").decode("ascii")
        self.document["subject"] = dict(config, mediaType="application/x")
        layer.update(data="AAAA", urls=["http://127.0.0.1:1/elsewhere"])
        self.everywhere(0)

    def test_t62_larger_than_the_disk(self):
        """Told before the first layer is asked for; nothing is set aside for it."""
        self.document["layers"][0]["size"] = 1 << 52
        self.everywhere(1, r"\d bytes are needed, \d+ are free")
        self.assertEqual(paths(self.source, self.image.layers[0]), [])

    def test_t09_t160_names_that_are_one(self):
        """On a file system that folds case, two names are told, never merged."""
        exists = os.path.lexists

        def folded(place):
            if exists(place):
                return True
            folder, name = os.path.split(place)
            return os.path.isdir(folder) and name.lower() in [
                other.lower() for other in os.listdir(folder)]

        for members in ([("A", b"1"), ("a", b"2")], [("d", None), ("D", None)],
                        [("l", b"", {"type": b"2", "linkname": "/etc"}), ("L", None)]):
            self.source.add("lab/app", "1", build_image([tar_bytes(members)]))
            with mock.patch("os.path.lexists", folded), self.subTest(members):
                self.assert_one_line(self.pull("rootfs", self.at("root")), 1,
                                     "two names")
            self.assertFalse(os.path.exists(self.at("root")))

    @able(os.path.isdir("/proc/self/fd"), "list open files in /proc")
    def test_t130_no_descriptor_is_lost(self):
        """Neither a pull that succeeds nor one that fails leaves a file open."""
        def held():
            found = []
            for number in os.listdir("/proc/self/fd"):
                with contextlib.suppress(FileNotFoundError):  # that of the listing
                    found.append(os.readlink("/proc/self/fd/" + number))
            return [name for name in found if self.root in name]

        def check(format, path, spoiled):
            result = outcome(self.fetch, self.ref, format, path)
            self.assertEqual(isinstance(result, imagec.ImagecError), spoiled)
            self.assertEqual(held(), [])  # while an error lives, its frames do

        self.each(check, False)
        self.source.fault(self.image.layers[-1], flip(), EVER)
        self.each(check, True)

    @THREAT_POSIX
    def test_t91_modules_lying_around(self):
        """Run in a directory full of traps, or from one, or with a .netrc, as shipped."""
        home = os.path.join(self.root, "bin")
        os.mkdir(home)
        shutil.copy(imagec.__file__, os.path.join(home, "imagec.py"))
        os.symlink(os.path.join(home, "imagec.py"), self.at("linked.py"))
        for place, name in itertools.product(("work", "bin"), THREAT_TRAPS):
            self.file("%s/%s.py" % (place, name),
                      "import os; os.mkdir(%r)" % self.at("trapped"))
        os.chmod(self.file(".netrc", "machine 127.0.0.1 login alice password %s\n"
                           % PASSWORD), 0o600)
        self.source.auth = "basic"
        ways = ([os.path.join(home, "imagec.py")], ["linked.py"], ["-m", "linked"])
        runs = [subprocess.Popen(
            [sys.executable] + ways[number % 3] + list(self.pull_argv(
                self.ref, format, name)), cwd=self.work,
            stderr=subprocess.PIPE)
            for number, (format, name) in enumerate(OUTPUTS[:3])]
        for run in runs:
            err = run.communicate(timeout=20)[1]
            self.assertEqual(run.returncode, 5, err)
        self.assertFalse(os.path.exists(self.at("trapped")))
        for request in self.source.requests:
            self.assertNotIn("Authorization", request.headers)


# --------------------------------------------------------------------------------------
# Against the real registry
# --------------------------------------------------------------------------------------

#: What an independent witness says of an image: digests as text, layers oldest first.
Witness = collections.namedtuple("Witness", "raw digest layers diff_ids")

CONTRACT_TARS = [
    tar_bytes([("etc", None), ("etc/motd", b"hello\n" * 900)]),
    tar_bytes([("bin", None), ("bin/tool", bytes(range(256)) * 40, {"mode": 0o755})]),
]
CONTRACT_TAGS = ("oci", "v2s1", "v2s2", "zstd")


def payload_of(raw):
    """The part of a manifest its digest covers: a registry may sign anew each time."""
    document = json.loads(raw.decode("utf-8"))
    if "signatures" not in document:
        return raw
    protected = document["signatures"][0]["protected"]
    protected = json.loads(base64url_decode(protected).decode("ascii"))
    return raw[:protected["formatLength"]] + base64url_decode(protected["formatTail"])


class PullContract:
    """What holds of every registry.

    Subclasses have `start_registry()`, which registry it is, and `witness(tag)`, the
    Witness of its lab/app:TAG.
    """

    user = password = None  # what the registry wants, None = nothing
    options = ()  # of the command line

    def setUp(self):
        super().setUp()
        self.host = self.start_registry().host
        self.app = self.host + "/lab/app:"

    def command(self, name, *argv, password=None, **options):
        """Run a command with the user's password, or another one."""
        argv = argv + tuple(self.options)
        password = password or self.password
        if password is not None:
            options["stdin"] = password + "\n"
            argv += ("-u", self.user or "alice", "--password-stdin")
        return self.main(name, *argv, **options)

    def fetch(self, reference, *argv, **options):
        """A pull that must succeed, as `--json` tells of it."""
        ended = self.command("pull", "-q", "--json", "-o", self.output, reference,
                             *argv, **options)
        self.assertEqual((ended.status, ended.err), (0, ""))
        return ordered(ended.out.decode("ascii"))

    def tags_to_pull(self):
        return [tag for tag in CONTRACT_TAGS if tag != "zstd" or CAN_ZSTD]

    def test_pull_every_kind(self):
        for tag in self.tags_to_pull():
            with self.subTest(tag):
                witness = self.witness(tag)
                image = self.fetch(self.app + tag)
                self.assertEqual(image["digest"], witness.digest)
                self.assertEqual([layer["digest"] for layer in image["layers"]],
                                 witness.layers)
                self.assertEqual([layer["diff_id"] for layer in image["layers"]],
                                 witness.diff_ids)
                self.check_tree(image, witness)

    def check_tree(self, image, witness):
        """The tree holds the bytes the witness has seen, by the names it should."""
        def read(*names):
            return file_bytes(os.path.join(image["path"], *names))

        self.assertEqual(payload_of(read("manifest.json")), payload_of(witness.raw))
        self.assertEqual(sha256(payload_of(witness.raw)), witness.digest)
        for layer, name in zip(image["layers"], witness.layers):
            tar = read(layer["id"], layer["id"] + ".tar")
            self.assertEqual((sha256(tar), len(tar)), (name, layer["blob_size"]))
            v1 = json.loads(read(layer["id"], layer["id"] + ".json").decode("utf-8"))
            self.assertEqual(v1["id"], layer["id"])
        manifest = json.loads(witness.raw.decode("utf-8"))
        config = manifest.get("config")
        self.assertEqual(os.path.exists(os.path.join(image["path"], "config.json")),
                         config is not None)
        if config is not None:
            self.assertEqual(sha256(read("config.json")), config["digest"])

    def test_pull_by_digest(self):
        for tag in ("oci", "v2s1"):
            witness = self.witness(tag)
            image = self.fetch(self.host + "/lab/app@" + witness.digest)
            self.assertEqual(image["digest"], witness.digest)
            self.assertEqual(os.path.basename(image["path"]),
                             witness.digest.replace(":", "-"))

    def test_digest_and_inspect(self):
        for tag in CONTRACT_TAGS[:3]:
            witness = self.witness(tag)
            ended = self.command("digest", self.app + tag)
            self.assertEqual(ended, (0, witness.digest.encode("ascii") + b"\n", ""))
            ended = self.command("inspect", self.app + tag, "--raw")
            self.assertEqual((ended.status, ended.err), (0, ""))
            self.assertEqual(payload_of(ended.out), payload_of(witness.raw))

    def test_tags(self):
        ended = self.command("tags", self.host + "/lab/app")
        self.assertEqual(ended.err, "")
        tags = sorted(ended.out.decode("ascii").split())  # not all registries sort
        self.assertEqual(tags, self.expected_tags())

    def expected_tags(self):
        return list(CONTRACT_TAGS)

    def test_second_pull_finds_all_there(self):
        first = self.fetch(self.app + "oci")
        ended = self.command("pull", "--progress", "plain", "-o", self.output,
                             self.app + "oci")
        self.assertEqual(ended.err.count("Already exists"), len(first["layers"]))
        self.assertNotIn("Downloading", ended.err)

    def test_missing(self):
        for name, words in ((self.host + "/lab/none:1", "lab/none:1"),
                            (self.app + "none", "lab/app:none"),
                            (self.host + "/lab/app@sha256:" + "0" * 64, "sha256:000")):
            with self.subTest(name):
                ended = self.command("pull", "-q", "-o", self.output, name)
                self.assert_one_line(ended, 4, words)
                self.assertEqual(self.files(), [])

    def test_wrong_password(self):
        ended = self.command("pull", "-q", "-o", self.output, self.app + "oci",
                             password="wrong")
        if self.password is None:  # never asked for, so never sent
            return self.assertEqual((ended.status, ended.err), (0, ""))
        self.assert_one_line(ended, 5, "denied")
        self.assertEqual(self.files(), [])

    def test_library(self):
        image = imagec.pull(self.app + "oci", self.output, username=self.user,
                            password=self.password)
        witness = self.witness("oci")
        self.assertEqual(str(image.digest), witness.digest)
        self.assertEqual([str(layer.diff_id) for layer in image.layers],
                         witness.diff_ids)


# -- The double

@functools.lru_cache(maxsize=None)
def double_images():
    """{tag: image} as the real registry would hold them."""
    images = {tag: build_image(CONTRACT_TARS, kind) for tag, kind in (
        ("oci", "oci"), ("v2s2", "docker"), ("v2s1", "schema1-signed"))}
    if CAN_ZSTD:
        images["zstd"] = build_image(CONTRACT_TARS, compress=zstd_bytes)
    return images


class DoublePullTest(PullContract, CommandLineCase):
    """The contract with the double, whose own builder is the witness."""

    auth = None
    tls = False

    def start_registry(self):
        registry = self.registry(auth=self.auth, tls=self.tls,
                                 anonymous=self.password is None)
        for tag, image in double_images().items():
            registry.add("lab/app", tag, image)
        return registry

    def witness(self, tag):
        image = double_images()[tag]
        return Witness(image.manifest, image.digest, image.layers, image.diff_ids)

    def expected_tags(self):
        return sorted(double_images())


class DoubleBasicPullTest(DoublePullTest):
    auth, user, password = "basic", "alice", PASSWORD


class DoubleTokenPullTest(DoublePullTest):
    auth, user, password = "bearer", "alice", PASSWORD


class DoubleTLSPullTest(DoublePullTest):
    tls = True


# -- The real registry

def source_tars():
    """Two layers of real files: modules of the Python that runs, with their modes."""
    library = os.path.dirname(os.__file__)
    for names in (("email", "json", "unittest"), ("asyncio", "logging", "http")):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name in names:
                tar.add(os.path.join(library, name), "lib/" + name, filter=source_only)
        yield out.getvalue()


def source_only(info):
    return None if "__pycache__" in info.name or "/test" in info.name else info


class Seeded:
    """What all real registries of this run serve, and what skopeo says of it."""

    TAGS = ("lab/app:oci", "lab/app:v2s1", "lab/app:v2s2", "lab/app:zstd")

    def __init__(self):
        self.root = tempfile.mkdtemp()
        FIXTURES.callback(remove, self.root)
        self.source_tars = list(source_tars())
        app, arm = build_image(CONTRACT_TARS), ("linux", "arm64", "v8")
        images = {"lab/big:1": build_image(self.source_tars), "private/app:1": app,
                  "lab/many:1": build_index([(app, ("linux", "amd64", None)), (
                      build_image(CONTRACT_TARS[:1], platform=arm), arm)])}
        # Each skopeo mostly waits; side by side they take half the time.
        with contextlib.closing(DockerRegistry(self.root)) as registry, \
                offered(images) as (_, push), \
                concurrent.futures.ThreadPoolExecutor(4) as executor:
            pushes = [executor.submit(push, registry, name) for name in images]
            seed(registry, "lab/app", CONTRACT_TARS)
            for pushed in pushes:
                pushed.result()
            asked = {name: executor.submit(self.ask, registry, name)
                     for name in self.TAGS + ("lab/big:1", "private/app:1")}
            self.witnesses = {name: each.result() for name, each in asked.items()}
            self.many = skopeo_raw("docker://%s/lab/many:1" % registry.host)

    @staticmethod
    def ask(registry, name):
        """What skopeo and the registry's own storage say of an image."""
        place = "docker://%s/%s" % (registry.host, name)
        told, raw = skopeo_inspect(place), skopeo_raw(place)
        diff_ids = None
        config = json.loads(raw.decode("utf-8")).get("config")
        if config is not None:
            found = registry.request("/v2/%s/blobs/%s" % (
                name.partition(":")[0], config["digest"]))[2]
            diff_ids = json.loads(found.decode("utf-8"))["rootfs"]["diff_ids"]
        return Witness(raw, told["Digest"], told["Layers"], diff_ids or list(
            map(sha256, CONTRACT_TARS)))


@functools.lru_cache(maxsize=None)
def seeded():
    return Seeded()


class RealPullCase(CommandLineCase):
    """Pulls from a docker-registry, one a class, which is quick to read from."""

    auth, tls = None, False

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.real = kept(DockerRegistry(seeded().root, cls.auth, cls.tls))

    def start_registry(self):
        return self.real

    def witness(self, tag):
        return seeded().witnesses["lab/app:" + tag]


@needs("docker-registry", "skopeo")
class RealRegistryTest(PullContract, RealPullCase):
    """The contract with docker-registry, skopeo the witness; and what only it has."""

    def test_index(self):
        index = json.loads(seeded().many.decode("ascii"))
        for entry in index["manifests"]:
            image = self.fetch(self.host + "/lab/many:1", "--platform",
                               "linux/" + entry["platform"]["architecture"])
            self.assertEqual(image["digest"], sha256(seeded().many))
            for name, digest in (("index.json", image["digest"]),
                                 ("manifest.json", entry["digest"])):
                data = file_bytes(os.path.join(image["path"], name))
                self.assertEqual(sha256(data), digest)

    def test_real_files(self):
        image = self.fetch(self.host + "/lab/big:1")
        witness = seeded().witnesses["lab/big:1"]
        self.assertEqual(image["digest"], witness.digest)
        self.check_tree(image, witness)
        for layer, source in zip(image["layers"], seeded().source_tars):
            with tarfile.open(fileobj=io.BytesIO(source)) as tar:
                self.assertEqual(layer["size"], sum(info.size for info in tar))
            path = os.path.join(image["path"], layer["id"], layer["id"] + ".tar")
            for name, data in threat_rows(path):
                true = os.path.join(os.path.dirname(os.__file__), name[len("lib/"):])
                self.assertEqual(data, file_bytes(true), name)
            with tarfile.open(path) as tar:
                self.assertIn("lib/" + (
                    "email" if layer is image["layers"][0] else "http"), tar.getnames())


@needs("docker-registry", "skopeo")
class RealTLSTest(PullContract, RealPullCase):
    """The contract over TLS with htpasswd; the root comes from SSL_CERT_FILE."""

    auth, tls, user, password = "htpasswd", True, REAL_USER, REAL_PASSWORD

    def setUp(self):
        super().setUp()
        os.environ["SSL_CERT_FILE"] = self.file("real.pem", TEST_CERT)

    def test_unknown_certificate(self):
        self.options = ("--cacert", os.environ.pop("SSL_CERT_FILE"))
        os.environ["SSL_CERT_FILE"] = os.devnull
        ended = self.main("digest", "-q", "--no-creds", self.app + "oci")
        self.assert_one_line(ended, 1, "no CA certificates")
        self.fetch(self.app + "oci")

    def test_without_password(self):
        self.assert_one_line(self.pull("-q", self.app + "oci"), 5, "-u USER")

    def test_tree_says_https(self):
        self.assertIn(os.path.join("images", "https", self.host),
                      self.fetch(self.app + "oci")["path"])


@needs("docker-registry", "skopeo")
class RealTokenTest(PullContract, RealPullCase):
    """The contract with a token server, and tokens that run out."""

    auth, user, password = "token", REAL_USER, REAL_PASSWORD

    def setUp(self):
        super().setUp()
        self.tokens = self.real.token_server
        for name in ("valid_for", "token_field"):
            self.addCleanup(setattr, self.tokens, name, getattr(self.tokens, name))
        del self.tokens.requests[:]

    def asked(self):
        """The token requests so far, with the user's password or without."""
        return ["Authorization" in headers for _, _, headers, _ in self.tokens.requests]

    def test_anonymous(self):
        self.done("pull", "-q", "-o", self.output, self.app + "oci")
        self.assertEqual(self.asked(), [False])

    def test_private(self):
        name = self.host + "/private/app:1"
        self.assert_one_line(self.main("digest", "-q", name), 5, "anonymous|denied")
        self.assertEqual(self.fetch(name)["digest"],
                         seeded().witnesses["private/app:1"].digest)
        self.assertEqual(set(self.asked()), {False, True})

    def test_one_token_does_for_a_pull(self):
        for field in ("token", "access_token", "both"):
            self.tokens.token_field = field
            del self.tokens.requests[:]
            self.fetch(self.app + "oci")
            self.assertEqual(self.asked(), [True])

    def test_token_that_the_registry_no_longer_takes(self):
        true_answer = self.tokens.answer

        def answer(*args):
            self.tokens.valid_for = -120 if len(self.tokens.requests) == 1 else 300
            return true_answer(*args)

        with mock.patch.object(self.tokens, "answer", answer):
            self.fetch(self.app + "oci")
        self.assertEqual(self.asked(), [True, True])

    def test_tokens_that_are_never_taken(self):
        self.tokens.valid_for = -120
        ended = self.command("pull", "-q", "-o", self.output, self.app + "oci")
        self.assert_one_line(ended, 5, "denied")
        self.assertEqual(self.asked(), [True, True])


# --------------------------------------------------------------------------------------
# What real consumers make of our outputs
# --------------------------------------------------------------------------------------

READERS_LAYERS = [
    # rows of tar_bytes; each layer meets what the ones before it left
    [("bin", None), ("bin/sh", b"#!"), ("bin/su", b"set", {"mode": 0o4755}),
     ("lib", None), ("lib/old", b"old"), ("lib/deep/er/file", b"deep"),
     ("etc", None, {"mode": 0o700}), ("etc/passwd", b"root"), ("etc/gone", b"gone"),
     ("tmp", None, {"mode": 0o1777}),
     ("var/run", b"", {"type": b"2", "linkname": "/run"}),
     ("opt/a", b"a" * 3000), ("opt/b", b"", {"type": b"1", "linkname": "opt/a"}),
     ("turns", None), ("turns/into", b"a file"), ("other", b"turns into a directory")],
    [("lib", None), ("lib/new", b"new"), ("lib/.wh..wh..opq", b""),
     ("etc/.wh.gone", b""), ("etc/.wh.never", b""), ("etc", None, {"mode": 0o755}),
     ("opt/c", b"", {"type": b"1", "linkname": "opt/a"}), ("turns", b"file"),
     ("other", None), ("other/x", b"x"), ("run", None), ("var/run/pid", b"1")],
    [("caf\xe9", b"1"), ("new\nline", b"2"), ("n" * 200, b"3"), ("-rf", b"4"),
     ("a b\\c", b"5"), ("d" * 90 + "/" + "e" * 120, b"6"), ("opt/a", b"parted"),
     ("bin/.wh.sh", b""), ("bin/sh", b"again"), ("group", None, {"mode": 0o2770}),
     ("locked", None, {"mode": 0o555}), ("locked/x", b"x", {"mode": 0o400}),
     ("dangling", b"", {"type": b"2", "linkname": "../../no/where"}),
     ("s", b"", {"type": b"2", "linkname": "etc"}), ("lib/deep/again", b"y")],
]
READERS_TARS = [tar_bytes(layer) for layer in READERS_LAYERS]
#: Members of the newest v1 image, where docker and others treat it in a way of its own.
READERS_V1 = (
    {}, {"docker_version": "1.8.3", "unknown": {"z": [1, 2.50], "a": None}},
    {"docker_version": "17.06.0-ce", "unknown": 5, "variant": "v7",
     "author": "A <a@b> & c\u2028",
     "config": {"Labels": {"b": "<>", "a": "caf\xe9"}, "ExposedPorts": {"80/tcp": {}},
                "Cmd": ["x"], "Volumes": {"/b": {}, "/a": {}}, "StopSignal": "9"}},
    {"author": "caf\xe9 \t\x01", "comment": "c", "Size": 7,
     "created": "2015-08-06T23:53:22.608570Z"},
    {"config": None, "container": "c" * 64, "id": "f" * 64,
     "container_config": {"Cmd": ["/bin/sh", "-c", "a && b <c>"]}},
)


def readers_facts(directory):
    """{path: what a file is}, hard links by the first name of their group."""
    facts, groups = {}, {}
    base = os.fsencode(directory)
    held = contents(base)
    for place, status in below(base):
        path = os.path.relpath(place, base)
        if path in held:
            groups.setdefault(status.st_ino, []).append(path)
        facts[path] = (status.st_mode, status.st_uid, status.st_gid, held.get(path),
                       status.st_ino)
    return {path: fact[:-1] + (min(groups.get(fact[-1], [None])),)
            for path, fact in facts.items()}


def readers_blobs(directory):
    """{name: bytes} of a skopeo `dir:`."""
    return {name: file_bytes(os.path.join(directory, name))
            for name in os.listdir(directory)}


#: Tags of what a real registry holds, a row each; the last in schema1.
KINDS = (("v2s2",), ("oci",), ("zstd",), ("v2s1",))


class PodmanCase(RegistryCase):
    """podman, with a storage of its own."""

    def podman(self, *arguments, **options):
        options = dict({"stdin": subprocess.DEVNULL}, **options)
        done = subprocess.run(
            ("podman", "--root", self.at("podman"), "--runroot", self.at("run"),
             "--storage-driver", "vfs", "--events-backend", "none") + arguments,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, **options)
        if done.returncode and arguments == ("images",):
            lacking("a podman that runs")
        if b"operation not permitted" in done.stdout.lower():
            lacking("a podman that unpacks")
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout.decode()


class ReadersCase(RegistryCase):
    """One image in four kinds in a real registry."""

    def taken(self, path, image, name="lab/x", tag="1", absent=0):
        """What another program wrote is good; it is served, with the same config."""
        audit = imagec.Audit().check(path)
        self.assertEqual((audit.faults, list(audit.absent), len(audit.unchecked)),
                         ([], [], absent))
        shelf = imagec.Shelf(path)
        document = json.loads(serve_raw_of(shelf, name, tag).decode())
        for child in document.get("manifests", [])[:1]:
            document = json.loads(serve_raw_of(shelf, name, child["digest"]).decode())
        self.assertEqual(document["config"]["digest"], image)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.base = tempfile.mkdtemp()
        FIXTURES.callback(remove, cls.base)
        cls.registry = kept(DockerRegistry(cls.base))
        seed(cls.registry, "lab/x", READERS_TARS)

    def name(self, tag):
        return "%s/lab/x:%s" % (self.registry.host, tag)

    def pull(self, tag, out, format, **options):
        image = imagec.pull(self.name(tag), self.at(out), format,
                            platform="linux/amd64", **options)
        self.assertEqual(faults_of(self.at(out)), [])
        return image

    def pull_signed(self):
        """Pull an SBOM and a signature along: the Image."""
        raw = skopeo_raw("docker://" + self.name("oci"))
        signed = BuiltImage(raw, MEDIA_TYPES["oci"]["manifest"])
        sbom = referring(signed)
        self.registry.put("lab/x", sbom.digest, sbom)
        for tag, one in ((tag_of(signed), build_index([(sbom, None)])),
                         (tag_of(signed, ".sig"), signature())):
            self.registry.put("lab/x", tag, one)
        image = self.pull("oci", "signed.tar", "archive", referrers=True)
        shelf = imagec.Shelf(self.at("signed.tar"))
        self.assertIn(sbom.digest, shelf.documents)
        self.assertIn(tag_of(signed, ".sig"), shelf.tags("lab/x"))
        return image


@needs("docker-registry", "skopeo")
class ReadersTest(ReadersCase, PodmanCase):
    """Pulled, and read by programs that come and go."""

    def raw(self, tag):
        return skopeo_raw("docker://" + self.name(tag))

    def modern(self, tag):
        """The manifest we should have written: the registry's, or what skopeo makes."""
        if tag != "v2s1":
            return self.raw(tag)
        copy = self.at("modern")
        skopeo_copy("docker://" + self.name(tag), "dir:" + copy, "--format", "v2s2")
        return readers_blobs(copy)["manifest.json"]

    def same_manifest(self, tag, found, wanted):
        if tag == "v2s1":  # skopeo sets white space of its own
            found, wanted = json.loads(found.decode()), json.loads(wanted.decode())
        self.assertEqual(found, wanted)

    @rows(KINDS)
    def test_skopeo_sees_the_same_manifests(self, tag):
        wanted = self.modern(tag)
        self.pull(tag, tag, "oci")
        self.pull(tag, tag + ".tar", "archive")
        places = ["oci:" + self.at(tag), "oci-archive:" + self.at(tag + ".tar")]
        if tag in ("oci", "zstd"):  # by name skopeo 1.9 finds these only
            places += [place + ":" + tag for place in places]
        for place in places:
            self.same_manifest(tag, skopeo_raw(place), wanted)
            layers = skopeo_inspect(place)["Layers"]
            self.assertEqual(layers, [layer["digest"] for layer in
                                      json.loads(wanted.decode())["layers"]])

    @rows(KINDS[:3])
    def test_skopeo_copies_every_byte(self, tag):
        self.pull(tag, tag, "oci")
        self.pull(tag, tag + ".tar", "archive")
        skopeo_copy("docker://" + self.name(tag),
                    "dir:" + self.at("wanted" + tag))
        wanted = readers_blobs(self.at("wanted" + tag))
        for place in ("oci:" + self.at(tag),
                      "oci-archive:" + self.at(tag + ".tar")):
            copy = tempfile.mkdtemp(dir=self.work)
            skopeo_copy(place, "dir:" + copy, "--preserve-digests")
            self.assertEqual(readers_blobs(copy), wanted)

    @rows(KINDS)
    def test_skopeo_takes_the_docker_archive(self, tag):
        config = json.loads(self.modern(tag).decode())["config"]["digest"]
        image = self.pull(tag, tag + ".tar", "archive")
        self.assertEqual(image.image_id, config)
        copy = self.at("copy" + tag)
        # By the name that is in it; what it is loaded by must lead to it.
        skopeo_copy("docker-archive:%s:%s" % (
            self.at(tag + ".tar"), self.name(tag)), "dir:" + copy)
        blobs = readers_blobs(copy)
        manifest = json.loads(blobs["manifest.json"].decode())
        self.assertEqual(manifest["config"]["digest"], config)
        self.assertEqual([layer["digest"] for layer in manifest["layers"]],
                         [sha256(tar) for tar in READERS_TARS])

    def test_skopeo_lists_several_images(self):
        names = [self.name(tag) for tag in ("v2s2", "zstd")]
        with self.session() as session:
            self.pulled_by(session, self.at("both.tar"), "archive", *names)
        listed = json.loads(_skopeo(
            "list-tags", "docker-archive:" + self.at("both.tar")).decode())
        self.assertEqual(listed["Tags"], names)

    @needs_zstd
    def test_skopeo_takes_recompressed_layers(self):
        self.pull("zstd", "gz.tar", "archive", recompress="gzip")
        raw = skopeo_raw("oci-archive:" + self.at("gz.tar"))
        manifest = json.loads(raw.decode())
        wanted = json.loads(self.raw("zstd").decode())
        self.assertEqual(manifest["config"], wanted["config"])
        self.assertEqual({layer["mediaType"][-4:] for layer in manifest["layers"]},
                         {"gzip"})
        skopeo_copy("docker-archive:" + self.at("gz.tar"), "dir:" + self.at("copy"))
        copied = json.loads(readers_blobs(self.at("copy"))["manifest.json"].decode())
        self.assertEqual(copied["config"]["digest"], wanted["config"]["digest"])

    @rows((("docker-archive",), ("oci-archive",)))
    def test_what_skopeo_writes(self, kind):
        config = json.loads(self.raw("v2s2").decode())["config"]["digest"]
        skopeo_copy("docker://" + self.name("v2s2"),
                    "%s:%s:docker.io/lab/x:1" % (kind, self.at(kind)))
        if kind == "oci-archive":  # whose config skopeo writes anew
            config = json.loads(skopeo_raw("oci-archive:" + self.at(kind)).decode())[
                "config"]["digest"]
        self.taken(self.at(kind), config)

    @needs("podman")
    def test_what_podman_saves(self):
        self.podman("images")
        image = build_image(ARCHIVE_TARS)
        with offered({"lab/x:1": image}) as (host, _):
            imagec.pull(host + "/lab/x:1", self.at("one.tar"), tag="lab/x:1",
                        platform="linux/amd64")
        with open(self.at("one.tar"), "rb") as file:
            self.podman("load", stdin=file)
        for form in ("docker-archive", "oci-archive", "oci-dir"):
            self.podman("save", "--format", form, "-o", self.at(form), "lab/x:1")
            self.taken(self.at(form), sha256(image.config))

    @needs("podman")
    def test_what_came_along_is_in_nobodys_way(self):
        image = self.pull_signed()
        for place in ("oci-archive:", "docker-archive:"):
            copy = tempfile.mkdtemp(dir=self.work)
            skopeo_copy(place + self.at("signed.tar"), "dir:" + copy)
            self.assertIn(image.image_id[7:], os.listdir(copy))
        self.podman("images")
        self.assertIn(self.name("oci"), self.podman(
            "load", "-i", self.at("signed.tar")))
        self.assertIn(image.image_id, self.podman(
            "images", "--no-trunc", "--format", "{{.ID}}"))

    @needs("umoci")
    def test_umoci_unpacks_the_same_tree(self):
        self.pull("oci", "layout", "oci")
        self.pull("oci", "rootfs", "rootfs")
        rootless = () if os.geteuid() == 0 else ("--rootless",)
        done = subprocess.run(
            ("umoci", "raw", "unpack") + rootless + (
                "--image", self.at("layout") + ":oci", self.at("umoci")),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(done.returncode, 0, done.stdout)
        ours, theirs = readers_facts(self.at("rootfs")), readers_facts(self.at("umoci"))
        self.assertEqual(sorted(ours), sorted(theirs))
        for path in ours:
            self.assertEqual(ours[path], theirs[path], path)
        self.assertGreater(len(ours), 30)

        options = "--platform", "linux/amd64", self.name("oci")
        listed = self.main("ls", "--json", *options).out.decode().splitlines()
        self.assertEqual(
            sorted([file["path"], file["mode"], file["uid"], file["target"]]
                   for file in map(json.loads, listed)),
            sorted(["/" + path.decode(), stat.filemode(mode), uid,
                    held.decode() if stat.S_ISLNK(mode) else None]
                   for path, (mode, uid, _, held, _) in theirs.items()))
        for path in ("bin/sh", "opt/b", "var/run/pid", "s/passwd"):
            self.assertEqual(self.main("cat", *options, path).out, file_bytes(
                os.path.join(self.at("umoci"), path.replace("s/p", "etc/p").replace(
                    "var/", ""))))

    @needs("podman")
    def test_podman_loads_it_by_its_name(self):
        self.podman("images")
        image = imagec.pull(self.name("v2s1"), self.at("one.tar"),
                            platform="linux/amd64", tag="one:1")
        with open(self.at("one.tar"), "rb") as file:
            self.assertIn("docker.io/library/one:1", self.podman("load", stdin=file))
        listed = self.podman("images", "--no-trunc", "--format", "{{.ID}}")
        self.assertEqual(listed.split(), [image.image_id])


class Docker:
    """A docker daemon with a containerd of its own, all of it below `root`."""

    def __init__(self, root):
        self._root = root
        self._env = dict(os.environ, NO_PROXY="*", DOCKER_CONFIG=root,
                         DOCKER_HOST="unix://" + self._at("docker.sock"))
        config = write_file(self._at("daemon.json"), "{}")  # not this machine's
        self._process = start_guarded(
            ["dockerd", "--config-file", config, "--data-root", self._at("data"),
             "--exec-root", self._at("exec"), "--pidfile", self._at("pid"),
             "--host", self._env["DOCKER_HOST"], "--storage-driver", "vfs",
             "--bridge", "none", "--iptables=false", "--ip6tables=false",
             "--ip-forward=false"], self._at("log"), self._env)

    def _at(self, *parts):
        return os.path.join(self._root, *parts)

    def starts(self):
        """Whether it came up."""
        return comes_up(self._process, lambda: not self._run(
            ["docker", "version"]).returncode, 30)

    def _run(self, command, **options):
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=60, env=self._env, **options)

    def _done(self, command, **options):
        done = self._run(command, **options)
        if done.returncode:
            raise AssertionError("%s: %s" % (" ".join(command), done.stdout.decode()))
        return done.stdout.decode()

    def __call__(self, *arguments, **options):
        """What `docker ARGUMENTS` prints."""
        return self._done(["docker"] + list(arguments), **options)

    def ctr(self, *arguments):
        """What `ctr ARGUMENTS` prints, of its containerd."""
        return self._done(["ctr", "--address", self._at("exec", "containerd",
                                                        "containerd.sock"),
                           "--namespace", "lab"] + list(arguments))

    def close(self):
        stop_guarded(self._process, 30)


@needs("docker-registry", "skopeo", "dockerd", "docker", "containerd", "ctr")
@able(ROOT, "run a dockerd")
class DockerTest(ReadersCase):
    """What docker and containerd make of archives, and of what is served."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.docker = kept(Docker(tempfile.mkdtemp(dir=cls.base)))
        if not cls.docker.starts():
            lacking("a dockerd that runs")

    def inspected(self, name):
        """(image ID, diffIDs) of what docker has by a name."""
        found, = json.loads(self.docker("image", "inspect", name))
        return found["Id"], found["RootFS"]["Layers"]

    diff_ids = [sha256(tar) for tar in READERS_TARS]

    @rows(KINDS)
    def test_docker_loads(self, tag):
        # A layer in zstd is more than this docker may know.
        image = self.pull(tag, tag + ".tar", "archive", recompress=(
            "gzip" if tag == "zstd" else None))
        self.assertIn("Loaded image: " + self.name(tag), self.docker(
            "load", "--input", self.at(tag + ".tar")))
        self.assertEqual(self.inspected(self.name(tag)),
                         (image.image_id, self.diff_ids))

    def test_an_update_is_taken_where_what_it_builds_on_is(self):
        images = {"lab/update:%d" % count: build_image(READERS_TARS[:count])
                  for count in (2, 3)}
        with offered(images) as (host, push):
            old, new = ("%s/%s" % (host, name) for name in images)
            imagec.pull(old, self.at("old.tar"))
            push(self.registry, "lab/update:2")
            imagec.pull(new, self.at("new.tar"), without=[old])
            imagec.pull(new, self.at("new"), "oci", without=[self.at("old.tar")])
        self.assertEqual(len(self.members(self.at("new.tar"))), 3 + 1 + 2 + 3)
        for name in ("old.tar", "new.tar"):
            self.docker("load", "--input", self.at(name))
        self.assertEqual(self.inspected(new)[1], self.diff_ids)
        copy = "docker://%s/lab/update:3" % self.registry.host
        skopeo_copy("oci:" + self.at("new"), copy, "--preserve-digests")
        self.assertEqual(skopeo_raw(copy), images["lab/update:3"].manifest)

    def test_docker_loads_from_a_pipe_by_another_name(self):
        puller = subprocess.Popen(
            [sys.executable, imagec.__file__, "pull", "--quiet", "--platform",
             "linux/amd64", self.name("oci"), "--tag", "lab/piped:1", "--output", "-"],
            stdout=subprocess.PIPE)
        with puller.stdout:
            self.docker("load", stdin=puller.stdout)
        self.assertEqual(puller.wait(), 0)
        self.assertEqual(self.inspected("lab/piped:1")[1], self.diff_ids)

    def test_docker_imports_the_file_system(self):
        self.pull("v2s2", "flat.tar", "rootfs")
        self.docker("import", self.at("flat.tar"), "lab/flat:1")
        self.assertEqual(self.inspected("lab/flat:1")[1],
                         [sha256(file_bytes(self.at("flat.tar")))])

    def test_the_file_system_is_the_one_docker_exports(self):
        self.pull("v2s2", "whole.tar", "archive")
        self.pull("v2s2", "flat.tar", "rootfs")
        self.docker("load", "--input", self.at("whole.tar"))
        self.docker("create", "--name", "lab", "--network", "none", self.name("v2s2"),
                    "sh")
        self.docker("export", "--output", self.at("exported.tar"), "lab")
        ours, theirs = (self.members(self.at(name))
                        for name in ("flat.tar", "exported.tar"))
        # Docker makes some things for itself, and does not say what the root is like.
        for path in list(theirs):
            if path not in ours and path.split("/")[0] in (
                    ".dockerenv", "dev", "proc", "sys", "etc"):
                del theirs[path]
        del ours["."]
        self.assertEqual(sorted(ours), sorted(theirs))
        for path in ours:
            self.assertEqual(ours[path], theirs[path], path)
        self.assertGreater(len(ours), 30)

    @staticmethod
    def members(path):
        """{path: facts} of a tar, hard links by all their names."""
        named = {row[0] for layer in READERS_LAYERS for row in layer}
        facts, groups = {}, {}
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rstrip("/")
                if member.islnk():
                    first = groups[name] = groups.get(member.linkname, member.linkname)
                    facts[name] = facts[first]
                else:
                    facts[name] = (
                        member.type, member.uid, member.gid, member.linkname,
                        # Nor what a directory is like that no layer speaks of, and
                        # others have the time it last did something in them.
                        member.issym() or member.isdir() and name not in named
                        or stat.S_IMODE(member.mode),
                        member.isdir() or int(member.mtime),
                        member.isfile() and tar.extractfile(member).read())
        whole = {}
        for name in facts:
            whole.setdefault(groups.get(name, name), set()).add(name)
        return {name: (fact, whole[groups.get(name, name)])
                for name, fact in facts.items()}

    def test_what_came_along_is_in_nobodys_way(self):
        image = self.pull_signed()
        self.assertIn("Loaded image: " + self.name("oci"), self.docker(
            "load", "--input", self.at("signed.tar")))
        self.assertEqual(self.inspected(self.name("oci"))[0], image.image_id)
        self.docker.ctr("images", "import", "--snapshotter", "native",
                        self.at("signed.tar"))
        self.assertIn(str(image.digest), self.docker.ctr(
            "images", "ls", "name==" + self.name("oci")))

    def test_two_platforms(self):
        images = [build_image(READERS_TARS[:1], platform=("linux", name, None))
                  for name in ("amd64", "arm64")]
        index = build_index([(one, ("linux", name, None)) for one, name in zip(
            images, ("amd64", "arm64"))])
        with offered({"lab/two:1": index}) as (host, _):
            imagec.pull(host + "/lab/two:1", self.at("x.tar"), platform=[
                "linux/arm64", "linux/amd64"])
            imagec.pull(host + "/lab/two:1", self.at("out"), "oci", platform=[
                "linux/arm64", "linux/amd64"])
            name = host + "/lab/two:1"
        self.docker("load", "--input", self.at("x.tar"))
        named = images["amd64" != imagec.Platform.host().architecture]
        self.assertEqual(self.inspected(name)[0], sha256(named.config))
        for one in images:
            self.assertEqual(self.inspected(sha256(one.config))[1], one.diff_ids)
        self.docker.ctr("images", "import", "--snapshotter", "native", self.at("x.tar"))
        self.assertIn(named.digest, self.docker.ctr("images", "ls", "name==" + name))
        for one, architecture in zip(images, ("amd64", "arm64")):
            found = skopeo_inspect("oci:%s:1" % self.at("out"), "--override-arch",
                                   architecture)
            self.assertEqual(found["Layers"], one.layers)

    @rows(KINDS[:3])
    def test_containerd_imports(self, tag):
        image = self.pull(tag, tag + ".tar", "archive")
        self.docker.ctr("images", "import", "--snapshotter", "native",
                        self.at(tag + ".tar"))
        listed = self.docker.ctr("images", "ls", "name==" + self.name(tag))
        self.assertIn(str(image.digest), listed)

    def test_what_docker_saves_and_containerd_exports(self):
        image, other = build_image(ARCHIVE_TARS), build_image(
            ARCHIVE_TARS[:1], platform=("linux", "arm64", None))
        with offered({"lab/x:1": build_index([
                (image, ("linux", "amd64", None)),
                (other, ("linux", "arm64", None))])}) as (host, _):
            name = host + "/lab/x:1"
            self.docker.ctr("images", "pull", "--plain-http", "--snapshotter", "native",
                            "--platform", "linux/amd64", name)
            self.docker.ctr("images", "export", "--platform", "linux/amd64",
                            self.at("part.tar"), name)
            self.docker("pull", name)
        self.docker("save", "--output", self.at("saved.tar"), name)
        for path, absent in (("part.tar", 1), ("saved.tar", 0)):
            self.taken(self.at(path), sha256(image.config), absent=absent)

    def test_they_pull_what_is_served(self):
        for tag in ("v2s2", "oci", "zstd"):
            image = self.pull(tag, "layout", "oci")
            shelf = imagec.Shelf(self.at("layout"))
            server = imagec.new_server(shelf, ("127.0.0.1", 0))
            with self.subTest(tag), imagec.serving(server):
                name = "127.0.0.1:%d/lab/x:%s" % (server.server_address[1], tag)
                self.docker.ctr("images", "pull", "--plain-http", "--snapshotter",
                                "native", name)
                self.assertIn(str(image.digest), self.docker.ctr(
                    "images", "ls", "name==" + name))
                if tag != "zstd":
                    self.assertIn("Digest: " + str(image.digest),
                                  self.docker("pull", name))
                    self.assertEqual(self.inspected(name)[1], self.diff_ids)


@needs("skopeo")
class ReadersSchema1Test(RegistryCase):
    """The image ID of a schema1 image is the one that containers/image computes."""

    @rows((members.get("docker_version"), members) for members in READERS_V1)
    def test_image_ids(self, _version, members):
        image = build_image([READERS_TARS[1], None, READERS_TARS[2]],
                            "schema1-signed", **members)
        reference, copy = self.filled(image).host + "/lab/app:1", self.at("copy")
        remove(copy)
        with mock.patch.dict(os.environ, NO_PROXY="*"):
            skopeo_copy("docker://" + reference, "dir:" + copy, "--format", "v2s2")
        found = readers_blobs(copy)
        wanted = json.loads(found["manifest.json"].decode())
        ours = imagec.pull(reference, self.at("ours.tar"), platform="linux/amd64")
        config, = [data for name, data in threat_rows(self.at("ours.tar"))
                   if name.endswith(ours.image_id[7:])]
        self.assertEqual(config, found[wanted["config"]["digest"][7:]])
        self.assertEqual(ours.image_id, wanted["config"]["digest"])


# --------------------------------------------------------------------------------------
# Against real proxies and client certificates
# --------------------------------------------------------------------------------------

REAL_BIG = 3 << 19  # bytes of each of three layers


@functools.lru_cache(maxsize=None)
def field_seed():
    """A registry's storage with lab/app:1 and lab/big:1."""
    root = tempfile.mkdtemp(prefix="field-")
    FIXTURES.callback(remove, root)
    images = {"lab/app:1": build_image(FIELD_SMALL),
              "lab/big:1": field_noisy_image(REAL_BIG)}
    with contextlib.closing(DockerRegistry(root)) as registry, \
            offered(images) as (_, push):
        for name in images:
            push(registry, name)
    return root


class RealFieldCase(FieldCase):
    """One registry with `options` for a class, which is quick to read from."""

    options = {}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.real = kept(DockerRegistry(field_seed(), **cls.options))

    def setUp(self):
        super().setUp()
        self.ref = self.real.host + "/lab/app:1"
        os.environ["SSL_CERT_FILE"] = self.file("real.pem", TEST_CERT)

    def configure(self, **entry):
        """Put the registry's user into docker's config.json."""
        self.docker_config({"auths": {self.real.host: entry}})

    def take(self, *argv, expect=0, to="out", ref=None):
        """Pull by a command line; its run."""
        run = self.main("pull", "-q", "--platform", "linux/amd64", "-o", self.at(to),
                        ref or self.ref, *argv)
        self.assertEqual(run.status, expect, run.err)
        if not expect:
            self.assertEqual(faults_of(self.at(to)), [])
            shutil.rmtree(self.at(to))
        return run


class FieldProgram:
    """A server program on a port of its own, ended with the test."""

    def __init__(self, case, command, port):
        self.host, self._log = "127.0.0.1:%d" % port, case.at("%d.log" % port)
        process = start_guarded(command, self._log)
        case.addCleanup(stop_guarded, process)
        case.assertTrue(comes_up(process, lambda: socket.create_connection(
            ("127.0.0.1", port)).close() is None), self.log())

    def log(self):
        return file_text(self._log)


# -- Certificates and credentials

@needs("docker-registry", "skopeo")
class RealClientCertTest(RealFieldCase):
    """A registry that wants a client certificate."""

    options = {"tls": True, "clients": True}

    def test_cert_and_key(self):
        self.take("--cert", self.file("me.cert", TEST_CERT),
                  "--key", self.file("me.key", TEST_KEY))

    def test_certs_d(self):
        os.environ["SSL_CERT_FILE"] = self.file("none.pem", OTHER_CERT)
        place = "home/.config/containers/certs.d/%s/" % self.real.host
        for name, content in (("ca.crt", TEST_CERT), ("me.cert", TEST_CERT),
                              ("me.key", TEST_KEY)):
            self.file(place + name, content)
        self.take()
        os.remove(self.at(place + "me.key"))
        self.assertIn("me.key", self.take(expect=2).err)

    def test_without(self):
        self.assertRegex(self.take(expect=1).err, "client certificate.*--cert")

    def test_one_of_another_ca(self):
        # Who loses the race with the registry's farewell does not hear why.
        self.take("--cert", self.file("me.cert", OTHER_CERT),
                  "--key", self.file("me.key", OTHER_KEY), expect=1)


REAL_ENTRY = field_entry(REAL_USER, REAL_PASSWORD)


@needs("docker-registry", "skopeo")
class RealHtpasswdConfigTest(RealFieldCase):
    """htpasswd over TLS."""

    options = {"auth": "htpasswd", "tls": True}

    def test_config(self):
        self.configure(**REAL_ENTRY)
        self.take()
        self.configure(username=REAL_USER, password=REAL_PASSWORD)
        self.take()
        run = self.main("auth", self.real.host)
        self.assertIn(REAL_USER, run.out)
        self.assertNotIn(REAL_PASSWORD, run.out + run.err)

    def test_helper(self):
        answer = json.dumps({"Username": REAL_USER, "Secret": REAL_PASSWORD})
        self.helper("lab", "cat >/dev/null\necho '%s'" % answer)
        self.docker_config({"credHelpers": {self.real.host: "lab"}})
        self.take()

    def test_refused(self):
        self.configure(**field_entry(REAL_USER, "S3CR3T-WRONG"))
        run = self.take(expect=5)
        self.assertIn("config.json", run.err)
        self.assertNotIn("S3CR3T", run.err)
        self.configure(**REAL_ENTRY)
        self.take("--no-creds", expect=5)


@needs("docker-registry", "skopeo")
class RealTokenConfigTest(RealFieldCase):
    """A token server, asked by GET and by POST."""

    options = {"auth": "token"}

    def setUp(self):
        super().setUp()
        self.tokens = self.real.token_server
        del self.tokens.requests[:]

    def methods(self):
        return [method for method, _, _, _ in self.tokens.requests]

    def test_get(self):
        self.configure(**REAL_ENTRY)
        self.take()
        self.assertEqual(self.methods(), ["GET"])
        self.assertIn("Authorization", self.tokens.requests[0][2])

    def test_post(self):
        self.configure(identitytoken=IDENTITY_TOKEN, **REAL_ENTRY)
        self.take()
        self.assertEqual(self.methods(), ["POST"])
        self.assertNotIn("Authorization", self.tokens.requests[0][2])

    def test_registry_token(self):
        token = self.tokens.token(REAL_USER, ["repository:lab/app:pull"])
        self.configure(registrytoken=token)
        self.take()
        self.assertEqual(self.methods(), [])

    def test_refused(self):
        self.configure(identitytoken="S3CR3T-OLD")
        run = self.take(expect=5)
        self.assertIn("identity token", run.err)
        self.assertNotIn("S3CR3T", run.err)


# -- Proxies

class RealProxyCase(RealFieldCase):
    """Pulls through a proxy, from a registry with TLS and from one without."""

    options = {"tls": True}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.plain = kept(DockerRegistry(field_seed()))

    def both(self, *argv, **options):
        """Pull from each; the runs."""
        return [self.take(*argv, ref=real.host + "/lab/app:1", **options)
                for real in (self.real, self.plain)]


@needs("docker-registry", "skopeo", "tinyproxy")
class RealHTTPProxyTest(RealProxyCase):
    """tinyproxy."""

    def start(self, *lines):
        port = _free_port()
        path = self.file("tinyproxy.conf", "\n".join((
            "Port %d" % port, "Listen 127.0.0.1", "Allow 127.0.0.1", "Timeout 20",
            "MaxClients 50", "LogLevel Connect") + lines + ("",)))
        return FieldProgram(self, ["tinyproxy", "-d", "-c", path], port)

    def asked(self, proxy):
        """The methods tinyproxy says it was asked by."""
        return set(re.findall(r"Request \(file descriptor \d+\): (\w+) ", proxy.log()))

    def test_option(self):
        proxy = self.start()
        self.both("--proxy", "http://" + proxy.host)
        self.assertLessEqual({"CONNECT", "GET"}, self.asked(proxy))
        self.assertIn(self.real.host, proxy.log())

    def test_no_proxy(self):
        name, _, port = self.plain.host.partition(":")
        for no_proxy, used in (
                ("127.0.0.1", False), ("127.0.0.0/8", False), ("*", False),
                (self.plain.host, False), ("10.0.0.0/8,.test", True),
                ("127.0.0.1:%d" % (int(port) ^ 1), True)):
            proxy = self.start()
            with self.subTest(no_proxy), mock.patch.dict(os.environ, NO_PROXY=no_proxy):
                self.main("digest", "-q", "--proxy", proxy.host,
                          self.plain.host + "/lab/app:1")
                self.assertEqual("GET" in self.asked(proxy), used)

    def test_environment_spares_loopback(self):
        proxy = self.start()
        with mock.patch.dict(os.environ, HTTPS_PROXY="http://" + proxy.host,
                             http_proxy=proxy.host):
            self.both()
        self.assertEqual(self.asked(proxy), set())

    def test_password(self):
        proxy = self.start("BasicAuth bob S3CR3T")
        self.both("--proxy", "http://bob:S3CR3T@" + proxy.host)
        for run in self.both("--proxy", "http://" + proxy.host, expect=5):
            self.assertRegex(run.err, "proxy.*password")
            self.assertIn(proxy.host, run.err)
        # To a wrong one tinyproxy answers 401, as if it were the registry.
        for run in self.both("--proxy", "http://bob:S3CR3TX@" + proxy.host, expect=5):
            self.assertNotIn("S3CR3T", run.err)

    def test_connect_that_is_not_allowed(self):
        proxy = self.start("ConnectPort 1")
        run = self.take("--proxy", proxy.host, expect=1)
        self.assertRegex(run.err, "proxy.*" + proxy.host)

    def test_a_registry_sends_nothing_of_its_own_through_it(self):
        proxy, inner = self.start("BasicAuth bob S3CR3T"), Server()
        self.addCleanup(inner.close)
        odd = "https://127.0.0.1%%3a%s%%2f%%20HTTP%%2f1.1%%0d%%0a%%0d%%0aFLUSHALL%%3a443/x"
        registry = self.filled(tls=True)
        os.environ["SSL_CERT_FILE"] = self.file("double.pem", TEST_CERT)
        registry.fault("/blobs/", redirect(odd % inner.host.rpartition(":")[2]))
        run = self.take("--proxy", "http://bob:S3CR3T@" + proxy.host, expect=1,
                        ref=registry.host + "/lab/app:1")
        self.assertRegex(run.err, "no plain name or address")
        self.assertEqual(inner.connections, 0)
        self.assertEqual(self.asked(proxy), {"CONNECT"})

    def test_registry_that_is_down(self):
        proxy = self.start()
        run = self.take("--proxy", proxy.host, ref="127.0.0.1:1/lab/app:1", expect=1)
        self.assertIn(proxy.host, run.err)


@needs("docker-registry", "skopeo", "microsocks")
class RealSOCKSTest(RealProxyCase):
    """microsocks."""

    def start(self, *argv):
        port = _free_port()
        return FieldProgram(self, ["microsocks", "-i", "127.0.0.1", "-p", str(port)]
                            + list(argv), port)

    def test_without_password(self):
        proxy = self.start()
        for scheme in ("socks5", "socks5h"):
            before = proxy.log().count("connected to")
            self.both("--proxy", "%s://%s" % (scheme, proxy.host))
            self.assertGreater(proxy.log().count("connected to"), before)

    def test_name_that_only_the_proxy_resolves(self):
        proxy = self.start()
        self.places.pop("localhost")
        port = self.plain.host.partition(":")[2]
        ref = "localhost:%s/lab/app:1" % port
        for number, scheme in enumerate(("socks5", "socks5h")):
            self.take("--proxy", "%s://%s" % (scheme, proxy.host), ref=ref)
            self.assertGreater(proxy.log().count("localhost:" + port), number)

    def test_password(self):
        proxy = self.start("-u", "bob", "-P", "S3CR3T")
        self.both("--proxy", "socks5h://bob:S3CR3T@" + proxy.host)
        for login in ("", "bob:S3CR3TX@"):
            for run in self.both("--proxy", "socks5://%s%s" % (login, proxy.host),
                                 expect=5):
                self.assertIn(proxy.host, run.err)
                self.assertNotIn("S3CR3T", run.err)

    def test_registry_that_is_down(self):
        run = self.take("--proxy", "socks5://" + self.start().host,
                        ref="127.0.0.1:1/lab/app:1", expect=1)
        self.assertIn("SOCKS proxy", run.err)


# -- Resume and mirrors

@needs("openssl")
class RealKeysTest(RegistryCase):
    """openssl makes keys and signatures."""

    def openssl(self, *argv):
        subprocess.run(("openssl",) + argv, check=True, cwd=self.work,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @rows((
        # name, options, whether it will do
        ("P-256", ("EC", "-pkeyopt", "ec_paramgen_curve:P-256"), True),
        ("P-384", ("EC", "-pkeyopt", "ec_paramgen_curve:P-384"), True),
        ("RSA", ("RSA", "-pkeyopt", "rsa_keygen_bits:2056"), True),
        ("RSA, 3", ("RSA", "-pkeyopt", "rsa_keygen_pubexp:3"), True),
        ("secp256k1", ("EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"), False),
        ("explicit", ("EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-pkeyopt",
                      "ec_param_enc:explicit"), False),
        ("RSA-PSS", ("RSA-PSS",), False), ("Ed25519", ("ED25519",), False),
    ))
    def test_what_it_signs(self, name, options, does):
        self.openssl("genpkey", "-algorithm", *options, "-out", "key")
        self.openssl("pkey", "-in", "key", "-pubout", "-out", "public")
        key = outcome(imagec.PublicKey.parse, file_bytes(self.at("public")), name)
        if not does:
            return self.assertIsInstance(key, imagec.UsageError)
        for size in range(8):
            message = noise(100 * size + 1)
            write_file(self.at("message"), message)
            self.openssl("dgst", "-sha256", "-sign", "key", "-out", "made", "message")
            made = file_bytes(self.at("made"))
            self.assertTrue(key.verifies(made, message))
            self.assertFalse(key.verifies(made, message + b"\0"))


@needs("docker-registry", "skopeo")
class RealSignedTest(RegistryCase):
    """cosign's signature in a real registry."""

    def test_by_key(self):
        image = build_image(FIELD_SMALL)
        images = {"lab/app:1": image, "lab/app:%s.sig" % image.digest.replace(":", "-"):
                  signature_image(simple(simple_payload(image.digest)))}
        registry = DockerRegistry(self.root)
        self.addCleanup(registry.close)
        with offered(images) as (_, push):
            for name in images:
                push(registry, name)
        for key, status in ((TEST_PUBLIC, 0), (OTHER_PUBLIC, 3)):
            run = self.main("pull", "-o", self.at("out.tar"), "--verify-key",
                            self.file("k.pub", key), registry.host + "/lab/app:1")
            self.assertEqual(run.status, status, run.err)
        run = self.main("verify", "--verify-key", self.file("k.pub", TEST_PUBLIC),
                        self.at("out.tar"))
        self.assertIn("lab/app:1: signed by ", run.err)


@needs("docker-registry", "skopeo")
@able(hasattr(os, "fork"), "fork")
class RealResumeTest(RealFieldCase, KillCase):
    """kill -9 at random moments of a pull from docker-registry."""

    def test_kill_9(self):
        self.check_kill_9(self.real.host, "/lab/big:1", field_noisy_image(REAL_BIG))

    @rows(OUTPUTS[:2])
    def test_what_is_there_is_not_carried_again(self, format, name):
        """The last byte of each layer is missing: next to nothing has to come."""
        relay = Relay(self.real.host)
        self.addCleanup(relay.close)
        self.pull(relay.host, "lab/big:1", to=name, format=format)
        for path, size in field_files(self.at(name)).items():
            if size > REAL_BIG:
                os.rename(path, path + ".partial")
                os.truncate(path + ".partial", size - 1)
        relay.carried = 0
        self.pull(relay.host, "lab/big:1", to=name, format=format)
        self.assertLess(relay.carried, 10000)
        self.assertEqual(faults_of(self.at(name)), [])


@needs("docker-registry", "skopeo")
class RealMirrorTest(RealFieldCase):
    """docker-registry as a pull-through cache in front of another."""

    def started(self, root=None, **settings):
        registry = DockerRegistry(root or tempfile.mkdtemp(dir=self.root),
                                  env_extra=settings)
        self.addCleanup(registry.close)
        return registry

    def test_cache(self):
        upstream = self.started(field_seed())
        cache = self.started(REGISTRY_PROXY_REMOTEURL=upstream.url)
        ref = upstream.host + "/lab/app:1"
        argv = ("--progress", "none", "--mirror", cache.host, ref)
        run = self.main("pull", "-o", self.at("a.tar"), *argv)
        self.assertEqual((run.status, run.err), (0, ""))
        self.assertTrue(run.out.startswith(ref + "@sha256:"))
        self.assertEqual(faults_of(self.at("a.tar")), [])
        self.wait_until_stored(cache, self.at("a.tar"))
        upstream.close()
        again = self.main("pull", "-o", self.at("b.tar"), *argv)
        self.assertEqual(again, run)
        self.assertEqual(*[file_bytes(self.at(name)) for name in ("a.tar", "b.tar")])

    def wait_until_stored(self, cache, archive):
        """The cache keeps a blob a moment after it has handed it on."""
        with tarfile.open(archive) as tar:
            manifest = json.loads(tar.extractfile("manifest.json").read().decode())[0]
        links = [os.path.join(cache.storage, "docker/registry/v2/repositories/lab/app",
                              "_layers/sha256", name.rpartition("/")[2], "link")
                 for name in manifest["Layers"] + [manifest["Config"]]]
        self.wait_until(lambda: all(map(os.path.exists, links)))

    def test_mirror_that_lacks_it(self):
        run = self.main("pull", "--progress", "none", "-o", self.at(), "--mirror",
                        "127.0.0.1:1", "--mirror", self.started().host, self.ref)
        self.assertEqual(run.status, 0, run.err)
        self.assertEqual(run.err.count("leaving the mirror"), 2)


# --------------------------------------------------------------------------------------
# Real clients of what we serve
# --------------------------------------------------------------------------------------

def serve_real_digest(directory):
    """The digest of the manifest in a skopeo `dir:`."""
    return sha256(file_bytes(os.path.join(directory, "manifest.json")))


class ServeRealCase(ServeCase):
    """What real clients can pull of what is served: no schema1 without a signature."""

    def each(self, check):
        """check(format, host, name, BuiltImage) all that is served, a subtest each."""
        for format, names in self.held.items():
            host = self.serve(self.places[format])
            for name in names:
                if name != "lab/schema1":
                    with self.subTest(format=format, name=name):
                        check(format, host, name, self.images[name])

    @staticmethod
    def child(image):
        """The image for linux/amd64."""
        return image.children[0] if image.children else image


@needs("skopeo")
class ServeSkopeoTest(ServeRealCase):
    """skopeo finds what it expects of a registry."""

    def test_inspect(self):
        def check(_, host, name, image):
            ref = "docker://%s/%s:1" % (host, name)
            self.assertEqual(skopeo_raw(ref), image.manifest)
            found = skopeo_inspect(ref, "--override-arch", "amd64")
            self.assertEqual(found["Digest"], image.digest)
            self.assertEqual(found["Layers"], self.child(image).layers)
            self.assertEqual(found["RepoTags"], ["1"])

        self.each(check)

    def test_copy(self):
        def check(format, host, name, image):
            target = self.at(format + name.replace("/", "-"))
            skopeo_copy("docker://%s/%s:1" % (host, name), "dir:" + target,
                        "--preserve-digests")
            self.assertEqual(serve_real_digest(target),
                             sha256(self.child(image).manifest))
            for digest in self.child(image).layers:
                blob = file_bytes(os.path.join(target, digest.partition(":")[2]))
                self.assertEqual(sha256(blob), digest)

        self.each(check)

    def test_copy_of_all_platforms_by_digest(self):
        image, target = self.images["lab/index"], self.at("all")
        ref = "docker://%s/lab/index@%s" % (self.serve(self.layout), image.digest)
        skopeo_copy(ref, "dir:" + target, "--all", "--preserve-digests")
        self.assertEqual(serve_real_digest(target), image.digest)

    def test_tags(self):
        host = self.serve(self.layout)
        done = subprocess.run(
            ["skopeo", "list-tags", "--tls-verify=false", "docker://%s/lab/oci" % host],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(json.loads(done.stdout.decode())["Tags"], ["1"])

    def test_password(self):
        ref = "docker://%s/lab/oci:1" % self.serve(
            self.layout, imagec.Credentials("alice", PASSWORD))
        self.assertEqual(skopeo_raw(ref, creds="alice:" + PASSWORD),
                         self.images["lab/oci"].manifest)
        with self.assertRaises(AssertionError):
            skopeo_raw(ref, creds="alice:wrong")


@needs("docker-registry")
class ServeCacheTest(ServeRealCase):
    """The real registry as a pull-through cache in front of `serve`."""

    def cache(self, path):
        """The host of the cache, and of what it is in front of."""
        host = self.serve(path)
        registry = DockerRegistry(self.work, env_extra={
            "REGISTRY_PROXY_REMOTEURL": "http://" + host})
        self.addCleanup(registry.close)
        return registry.host, host

    def test_pull_through(self):
        cache, _ = self.cache(self.layout)
        for name in self.held["oci"]:
            for time in ("first", "cached"):
                with self.subTest(name=name, time=time):
                    image = self.images[name]
                    pulled = self.pulled(cache, name + ":1", platform="all"
                                         if image.children else "linux/amd64")
                    self.assertEqual(str(pulled.digest), image.digest)

    @needs("skopeo")
    def test_skopeo_through_it(self):
        cache, _ = self.cache(self.archive)
        skopeo_copy("docker://%s/lab/docker:1" % cache, "dir:" + self.at("copy"),
                    "--preserve-digests")
        self.assertEqual(serve_real_digest(self.at("copy")),
                         self.images["lab/docker"].digest)

    def test_same_answers(self):
        """What both say to one request: status, type, digest, length."""
        hosts, digest = self.cache(self.layout), self.images["lab/oci"].layers[1]
        for path in ("/v2/", "/v2/lab/oci/manifests/1", "/v2/lab/oci/blobs/" + digest):
            for method in ("GET", "HEAD"):
                with self.subTest(method=method, path=path):
                    self.assertEqual(*[self.facts(one, path, method) for one in hosts])

    @staticmethod
    def facts(host, path, method):
        answer = serve_ask(host, path, method, {"Accept": imagec.ACCEPT})
        return (answer.status, sha256(answer.body),
                answer.headers["Content-Type"].partition(";")[0],
                [answer.headers[name] for name in (
                    "Docker-Content-Digest", "Content-Length",
                    "Docker-Distribution-Api-Version")])


@needs("podman")
class ServePodmanTest(ServeRealCase, PodmanCase):
    """podman pulls from it."""

    def test_pull(self):
        self.podman("images")
        for format, name in (("oci", "lab/oci"), ("archive", "lab/docker")):
            with self.subTest(name=name):
                ref = "%s/%s:1" % (self.serve(self.places[format]), name)
                self.podman("pull", "--tls-verify=false", "--arch", "amd64", ref)
                found = self.podman("images", "--digests", "--format", "{{.Digest}}",
                                    ref)
                self.assertEqual(found.split(), [self.images[name].digest])


# --------------------------------------------------------------------------------------
# Running them all
# --------------------------------------------------------------------------------------

CLASS_SECONDS = float(os.environ.get("IMAGEC_TEST_SECONDS", "300"))  # one class may take


class Reporting(unittest.TestResult):
    """Tells of each test when it begins, and of its end what was wrong or not there.

    `tell(id, wrong, lacks)`: texts; all empty for the beginning, `id` None for what is
    wrong with, or not there for, all tests of the class.
    """

    def __init__(self, tell):
        super().__init__()
        self._tell, self._wrong, self._lacks = tell, [], []

    def startTest(self, test):
        super().startTest(test)
        self._tell(test.id(), None, None)

    def stopTest(self, test):
        super().stopTest(test)
        self._tell(test.id(), "\n".join(self._wrong), "; ".join(self._lacks))
        self._wrong, self._lacks = [], []

    def _bad(self, test, error):
        text = "%s\n%s" % (test, self._exc_info_to_string(error, test))
        if hasattr(test, "failureException") and test.failureException is None:
            self._tell(None, text, "")  # of setUpClass, say
        else:
            self._wrong.append(text)

    addError = addFailure = _bad

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self._bad(subtest, error)

    def addSkip(self, test, reason):
        if getattr(test, "failureException", True) is None:
            self._tell(None, "", reason)
        else:
            self._lacks.append(reason)


class Worker:
    """A process that runs tests of one class, in a process group of its own.

    `fates` is what became of each: id -> (wrong, lacks), texts; None before its end.
    """

    def __init__(self, tests):
        import multiprocessing
        self.fates = collections.OrderedDict((test, None) for test in tests)
        self.name = tests[0].rpartition(".")[0].rpartition(".")[2]
        self.pipe, theirs = multiprocessing.Pipe(False)
        self._process = multiprocessing.get_context("fork").Process(
            target=self._run, args=(theirs, [test.partition(".")[2] for test in tests]))
        self._process.start()
        theirs.close()
        self.began = time.monotonic()
        self._at = "the class"  # what runs now

    @staticmethod
    def _run(pipe, names):
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a "&" ignores it
        suite = unittest.defaultTestLoader.loadTestsFromNames(
            names, sys.modules["__main__"])
        suite.run(Reporting(lambda *found: pipe.send(found)))

    def receive(self):
        """Takes the next word of it; False at its end."""
        try:
            test, wrong, lacks = self.pipe.recv()
        except EOFError:
            return False
        if wrong is None:
            self._at = test
        elif test in self.fates:
            self.fates[test] = (wrong, lacks)
        else:
            self._settle(wrong, lacks)
        return True

    def _settle(self, wrong, lacks):
        """The same becomes of every test that has no fate, or of all if it is bad."""
        wrong = wrong and "%s: %s" % (self.name, wrong)
        for test, fate in self.fates.items():
            if fate is None or wrong and not fate[0]:
                self.fates[test] = (wrong, lacks)

    def end(self, why=None):
        """It has ended, or is ended for the reason `why`, with all that it started."""
        if why is None:
            self._process.join(10)
            why = self._left_behind()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        self.pipe.close()
        if why:
            self._settle(why, "")
        elif None in self.fates.values():
            self._settle("it ended in %s, with status %s" % (
                self._at, self._process.exitcode), "")

    def _left_behind(self):
        """What is wrong where a process that the class started goes on; else None."""
        for _ in range(100):  # what was told to end may take a moment
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return None
            time.sleep(0.05)
        return "a process that it started was still there at its end"


def run_side_by_side(groups, verbose=False):
    """Runs lists of tests, each in a process: {test id: (wrong, lacks)}.

    Twice as many at once as there are cores, for most wait for sockets now and then.
    """
    from multiprocessing.connection import wait
    groups, running, fates = groups[::-1], [], {}
    try:
        while groups or running:
            while groups and len(running) < 2 * (os.cpu_count() or 1):
                running.append(Worker(groups.pop()))
            ready = wait([worker.pipe for worker in running], 1)
            for worker in list(running):
                seconds = time.monotonic() - worker.began
                if worker.pipe in ready and not worker.receive():
                    worker.end()
                elif seconds > CLASS_SECONDS:
                    worker.end("not done within %g seconds" % CLASS_SECONDS)
                else:
                    continue
                running.remove(worker)
                fates.update(worker.fates)
                if verbose:
                    print("%6.2f s %4d %s" % (seconds, len(worker.fates), worker.name))
    finally:
        for worker in running:
            worker.end("interrupted")
    return fates


def chosen_tests(names):
    """The ids of the tests in the classes or tests named, or in all, a list a class.

    The slowest classes first, as measured; the rest in the order of the file.
    """
    loader, module = unittest.defaultTestLoader, sys.modules["__main__"]
    classes = [name for name, value in vars(module).items()
               if isinstance(value, type) and issubclass(value, unittest.TestCase)]
    groups = []
    for name in names or sorted(classes, key=lambda name: SLOW_CLASSES.index(
            name) if name in SLOW_CLASSES else len(SLOW_CLASSES)):
        kind, _, test = name.partition(".")
        if kind not in classes or test and not hasattr(vars(module)[kind], test):
            sys.exit("no such test: %s" % name)
        group = [test] if test else loader.getTestCaseNames(vars(module)[kind])
        if group:
            groups.append(["__main__.%s.%s" % (kind, test) for test in group])
    return groups


def main():
    """Runs what is named on the command line, or everything; 0 where all is well."""
    if not hasattr(os, "fork"):
        return unittest.main()
    verbose = "-v" in sys.argv
    groups = chosen_tests([word for word in sys.argv[1:] if word != "-v"])
    started = time.monotonic()
    fates = run_side_by_side(groups, verbose)
    count = sum(map(len, groups))
    lacking = {test: lacks for test, (wrong, lacks) in fates.items()
               if lacks and not wrong}
    bad = {test: wrong for test, (wrong, _) in fates.items() if wrong}
    if NO_SKIP:
        bad.update((test, "%s\nskipped: %s" % (test, lacks))
                   for test, lacks in lacking.items() if not excused(lacks))
    for test, (wrong, _) in [] if len(bad) > 20 else run_side_by_side(
            [[test] for test in bad]).items():
        # It has failed all the same: what passes now and then proves nothing.
        bad[test] += "" if wrong else "\nFLAKY: run once more, it passed"
    for text in bad.values():
        print("=" * 70, text, sep="\n")
    for reason, number in sorted(collections.Counter(lacking.values()).items()):
        print("skipped %d: %s" % (number, reason))
    print("Ran %d of %d tests in %.1f s on Python %s" % (
        len(fates), count, time.monotonic() - started, sys.version.split()[0]))
    skipped = len(set(lacking) - set(bad))
    print("%d passed, %d failed, %d skipped" % (
        len(fates) - len(bad) - skipped, len(bad), skipped))
    return 0 if fates and not bad and len(fates) == count else 1


#: What takes longest begins first, so that it does not end last.
SLOW_CLASSES = (
    "StallsTest", "FaultsTest", "ReadersTest", "MemoryTest", "LocalFaultsTest",
    "MirrorTest", "RealResumeTest", "StreamTest", "UnsafeLayersTest", "ServeTest",
    "ServeSkopeoTest", "KillTest", "ResumeTest", "LocalLimitsTest", "RealRegistryTest")

if __name__ == "__main__":
    sys.exit(main())
