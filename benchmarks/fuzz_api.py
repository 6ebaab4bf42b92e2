"""Requests by the ten thousand, made from the OpenAPI document: ``python -m benchmarks.fuzz_api --cases 10000``.

Half of them are what the document allows, half what it forbids; each answer is held against the document (status, media
type, headers, schema) and none may be a failure of the service. Ends with 1 when one was.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> None:
    from tests.support.api_fuzzing import ask, furnished

    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_api", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="how many (default 10000)")
    parser.add_argument("--seed", type=int, default=1, help="another number makes other requests (default 1)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aidocks-fuzz-") as home, furnished(Path(home)) as api:
        asked = ask(api, arguments.cases, number=arguments.seed)
    print(
        f"{asked.cases} requests to {len(asked.operations)} operations in {asked.seconds:.0f} s: "
        f"{asked.cases / asked.seconds:.0f} a second"
    )
    print("| status | answers |\n|---|---:|")
    for status, count in sorted(asked.statuses.items()):
        print(f"| {status} | {count} |")
    print(f"faults: {len(asked.faults)}")
    for what, curl in asked.faults.items():
        print(f"  {what}\n      {curl}")
    sys.exit(bool(asked.faults))


if __name__ == "__main__":
    main()
