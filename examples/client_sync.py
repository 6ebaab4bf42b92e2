"""The client from Python: submit, watch, use the typed result.

python examples/client_sync.py MODEL [NAME]
"""

from __future__ import annotations

import sys

from aidocks import AIDocksError, Client, LaserSpec


def main(model: str, name: str) -> None:
    with Client() as client:  # AIDOCKS_URL, or the service that `aidocks up` started
        # Small numbers, so that the example takes seconds; the defaults are for real work.
        spec = LaserSpec(base_model_name=model, laser_model_name=name, candidates=2, chunks=8, seqlen=32)
        result = client.laser(spec).wait(progress=True)
        print(f"{result.model}: perplexity {result.held_out.before:.2f} -> {result.held_out.after:.2f}")

        # Fields work without a spec class as well; an error has a code, a field and a hint.
        try:
            client.laser(base_model_name=model, laser_model_name=name)
        except AIDocksError as error:
            print(f"{error.code}: {error}")

        for info in client.models():
            print(f"{info.name:30} {info.operation:10} {info.parameters:>15,} parameters")


if __name__ == "__main__":
    model = sys.argv[1]
    main(model, sys.argv[2] if len(sys.argv) > 2 else f"{model}-client")
