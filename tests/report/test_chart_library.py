"""The chart library that is kept is the one that was fetched, and its licences lie beside it."""

import hashlib

import pytest

from scripts.fetch_vega import ASSETS, FILES, cleaned

KEPT = [
    (package, target, expected)
    for package, (_, wanted) in FILES.items()
    for target, expected in wanted.values()
]


@pytest.mark.parametrize(("package", "target", "expected"), KEPT)
def test_files_are_as_they_were_fetched(package: str, target: str, expected: str) -> None:
    assert hashlib.sha256((ASSETS / target).read_bytes()).hexdigest() == expected


def test_versions_and_licences_are_told() -> None:
    told = (ASSETS / "README.md").read_text(encoding="utf-8")
    for package, (version, wanted) in FILES.items():
        assert f"`{package}` {version}" in told
        for target, _ in wanted.values():
            assert f"`{target}`" in told
    assert "`LICENSE.d3`" in told
    assert (ASSETS / "LICENSE.d3").is_file()


def test_no_browser_looks_for_a_source_map() -> None:
    assert cleaned(b"code\n//# sourceMappingURL=x.map") == b"code\n"
    for path in ASSETS.glob("*.js"):
        assert b"sourceMappingURL" not in path.read_bytes()
