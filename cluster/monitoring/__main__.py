"""``python -m cluster.monitoring DIRECTORY``: write what Prometheus and Grafana need to watch this installation.

The files kept beside this module are for a cluster whose Ray has its files in /tmp/ray; these have the places of the
service that `aidocks up` starts. They stay right when it is started again.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from aidocks.settings import Settings
from cluster.head import ray_dir

HERE = Path(__file__).parent
#: What the kept files say, to be replaced.
RAY_DIRECTORY = "/tmp/ray"  # noqa: S108 - where Ray puts its files where nobody tells it otherwise
DASHBOARDS = "/etc/grafana/dashboards"


def write_configuration(settings: Settings, directory: Path) -> None:
    """Write the configuration of both programs.

    Args:
        settings: Of the installation to be watched.
        directory: Is made; what is in it of the same names is replaced.
    """
    directory = directory.absolute()
    shutil.copytree(HERE / "grafana", directory / "grafana", dirs_exist_ok=True)
    shutil.copy(HERE / "alerts.yml", directory)
    prometheus = (HERE / "prometheus.yml").read_text()
    (directory / "prometheus.yml").write_text(prometheus.replace(RAY_DIRECTORY, str(ray_dir(settings))))
    provider = directory / "grafana" / "provisioning" / "dashboards" / "aidocks.yml"
    provider.write_text(provider.read_text().replace(DASHBOARDS, str(directory / "grafana" / "dashboards")))


def main() -> None:
    """Write the configuration into the directory that is named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cluster.monitoring DIRECTORY")
    write_configuration(Settings(), Path(sys.argv[1]))
    sys.stdout.write(f"prometheus --config.file={Path(sys.argv[1]).absolute() / 'prometheus.yml'}\n")


if __name__ == "__main__":
    main()
