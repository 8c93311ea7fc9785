"""`enginehouse certs`: certificates for a trial of TLS."""

from collections.abc import Sequence
from pathlib import Path

from enginehouse.certificates import generate
from enginehouse.tables import print_json


def run(directory: Path, hosts: Sequence[str], *, as_json: bool) -> None:
    """Writes them and says how they are used."""
    written = generate(directory, hosts)
    if as_json:
        print_json({"directory": str(directory), "files": [path.name for path in written], "hosts": list(hosts)})
        return
    print(f"wrote an authority and certificates of {', '.join(hosts)} to {directory}: keep *-key.pem secret")
    print(f"next:   enginehouse up MODEL --certs {directory}")
