"""Fetches the report's chart library from npm's registry, at pinned versions, and checks its sums.

The files are kept in the repository, so that neither a run nor a test needs the network:

    python -m scripts.fetch_vega
"""

import hashlib
import io
import sys
import tarfile
from pathlib import Path
from urllib.request import urlopen

ASSETS = Path(__file__).resolve().parents[1] / "lib" / "fitlora" / "report" / "assets"
REGISTRY = "https://registry.npmjs.org"
# package: its version, and by file in it: where it goes, and its sha256
FILES = {
    "vega": (
        "6.4.0",
        {
            "build/vega.min.js": (
                "vega.min.js",
                "8f6a3587cf8d4f42c7e08120e3eb05d067e746d554e39d2dcf52acc0bd5ba28f",
            ),
            "LICENSE": (
                "LICENSE.vega",
                "63727832aaf62004a2b249c933e327f3c90caf49e41a72f4bf436edf632cbda8",
            ),
        },
    ),
    "vega-lite": (
        "6.4.3",
        {
            "build/vega-lite.min.js": (
                "vega-lite.min.js",
                "843d20762ca6e52ff5ceab7a3296219272a9c0b5364402d6814f3c7738f4be5e",
            ),
            "LICENSE": (
                "LICENSE.vega-lite",
                "f618900fd0d64046963b29f40590cdd1e341a2f41449f99110d82fd81fea808c",
            ),
        },
    ),
}
# A line that would have the browser look for a file that is not there.
_SOURCE_MAP = b"//# sourceMappingURL="


def cleaned(content: bytes) -> bytes:
    """The file without the comment that names its source map."""
    lines = [line for line in content.splitlines() if not line.startswith(_SOURCE_MAP)]
    return b"\n".join(lines) + b"\n"


def main() -> None:
    for package, (version, wanted) in FILES.items():
        url = f"{REGISTRY}/{package}/-/{package}-{version}.tgz"
        with urlopen(url, timeout=60) as answer:
            packed = io.BytesIO(answer.read())
        with tarfile.open(fileobj=packed) as archive:
            for name, (target, expected) in wanted.items():
                member = archive.extractfile(f"package/{name}")
                assert member is not None, name
                content = cleaned(member.read())
                found = hashlib.sha256(content).hexdigest()
                if found != expected:
                    sys.exit(f"{url}: {name} has the sum {found}, and {expected} was expected")
                (ASSETS / target).write_bytes(content)
                print(f"{target}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
