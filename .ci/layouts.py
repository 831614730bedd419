"""OCI layouts of tars of any size, for what seeds real registries with them."""

import hashlib
import io
import json
import os
import zlib

from test_imagec import MEDIA_TYPES, json_bytes


def _write_blob(layout, media_type, chunks):
    """Write what is drawn; its descriptor."""
    digest, partial, size = hashlib.sha256(), os.path.join(layout, "partial"), 0
    with open(partial, "wb") as file:
        for data in chunks:
            digest.update(data)
            size += file.write(data)
    os.rename(partial, os.path.join(layout, "blobs", "sha256", digest.hexdigest()))
    return {"mediaType": media_type, "digest": "sha256:" + digest.hexdigest(),
            "size": size}


def _write_json(layout, kind, value):
    return _write_blob(layout, MEDIA_TYPES["oci"][kind], [json_bytes(value)])


def _write_layer(layout, layer, level):
    """(descriptor, diffID) of a tar: its bytes, or the path of one of any size."""
    # Without a time in its header, or equal layers would have different digests.
    deflate = zlib.compressobj(level, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    digest = hashlib.sha256()

    def packed(file):
        for data in iter(lambda: file.read(1 << 20), b""):
            digest.update(data)
            yield deflate.compress(data)
        yield deflate.flush()

    with io.BytesIO(layer) if isinstance(layer, bytes) else open(layer, "rb") as file:
        written = _write_blob(layout, MEDIA_TYPES["oci"]["layer"] + "+gzip", packed(file))
    return written, "sha256:" + digest.hexdigest()


def oci_layout(path, layers, platform="linux/amd64", level=6):
    """Write an OCI image layout with tag `latest` to the new directory `path`.

    `layers` are uncompressed tar files (bytes, or paths), packed by gzip at `level`.
    """
    os.makedirs(os.path.join(path, "blobs", "sha256"))
    config = dict(zip(("os", "architecture", "variant"), platform.split("/")))
    descriptors, diff_ids = zip(*(_write_layer(path, layer, level) for layer in layers))
    created = "2001-02-03T04:05:06Z"
    config.update(created=created, config={},
                  rootfs={"type": "layers", "diff_ids": diff_ids},
                  # Conversion to schema 1 needs one entry for each layer.
                  history=[{"created": created, "created_by": "layer %d" % number}
                           for number in range(len(layers))])
    manifest = {"schemaVersion": 2, "config": _write_json(path, "config", config),
                "layers": descriptors}
    entry = _write_json(path, "manifest", manifest)
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    with open(os.path.join(path, "index.json"), "w") as file:
        json.dump({"schemaVersion": 2, "manifests": [entry]}, file)
    with open(os.path.join(path, "oci-layout"), "w") as file:
        json.dump({"imageLayoutVersion": "1.0.0"}, file)
    return path
