"""An S3 of the test's own, over real HTTP on loopback."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

SECRET = "tests-only-secret"


@contextmanager
def s3_bucket() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the URL of an empty bucket, and the environment in which it can be reached."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    from tests.conftest import free_port

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server._port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    bucket = f"tests-{uuid.uuid4().hex[:12]}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            for name in [name for name in os.environ if name.startswith("AWS_") and name not in environment]:
                patch.delenv(name)
            import s3fs

            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
            yield f"s3://{bucket}/some/prefix", environment
    finally:
        server.stop()
