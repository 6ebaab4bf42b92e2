"""A PostgreSQL server of the tests' own, where its programs are installed: on no port, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def find_programs() -> Path | None:
    """Return the directory of initdb and pg_ctl: on the path, or where Debian keeps them."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((place for place in reversed(places) if (place / "pg_ctl").exists()), None)


@contextmanager
def private_postgres(programs: Path) -> Iterator[str]:
    """Yield the URL of a running server. PostgreSQL refuses to run as root, so root hands it to `nobody`."""
    user = "nobody" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    directory = Path(tempfile.mkdtemp(prefix="aidocks-pg-"))
    if user == "nobody":
        shutil.chown(directory, user)

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs / program, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=directory,
            user=user if os.getuid() == 0 else None,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        )

    try:
        run("initdb", "-D", f"{directory}/data", "-U", "aidocks", "--auth=trust", "--no-sync")
        options = f"-k {directory} -c listen_addresses= -c fsync=off"
        run("pg_ctl", "-D", f"{directory}/data", "-o", options, "-l", f"{directory}/log", "-w", "start")
        try:
            # Its socket is a file: also whoever is in another network reaches it.
            yield f"postgresql://aidocks@/postgres?host={directory}"
        finally:
            run("pg_ctl", "-D", f"{directory}/data", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
