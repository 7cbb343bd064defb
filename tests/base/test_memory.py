import mmap
import re
import sys
import time
from pathlib import Path

import pytest

from onnxtools.base.memory import releasing_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(path: Path) -> int:
    """Bytes of `path` in this process, as the kernel counts them (proc(5), smaps)."""
    found = re.search(
        rf"^[^\n]* {re.escape(str(path))}\n.*?^Rss: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.M | re.S
    )
    assert found
    return int(found[1]) << 10


@pytest.mark.parametrize(
    ("name", "access", "released"),
    [("w eights", mmap.ACCESS_READ, True), ("other", mmap.ACCESS_READ, False), ("w eights", mmap.ACCESS_COPY, False)],
)
def test_pages_of_the_named_files_that_nobody_can_write_to_are_given_back(
    tmp_path: Path, name: str, access: int, released: bool
) -> None:
    path, content = tmp_path / name, bytes(range(256)) * (4 << 12)
    path.write_bytes(content)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=access) as mapped:
        assert mapped[:] == content
        assert resident(path) == len(content)
        with releasing_pages([tmp_path / "w eights"]):
            deadline = time.monotonic() + (30 if released else 0.5)
            while resident(path) and time.monotonic() < deadline:
                time.sleep(0.01)
        assert resident(path) == (0 if released else len(content))
        assert mapped[:] == content
