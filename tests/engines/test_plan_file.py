import hashlib
import os
from pathlib import Path

import pytest

from onnxtools.engines.tensorrt.plan_file import PlanFile


def test_pieces_are_written_and_hashed_in_order(tmp_path: Path) -> None:
    pieces = [os.urandom(size) for size in (3 << 20, 1, 5 << 20, 0, 7, 1 << 20, 2 << 20, 11)]
    with PlanFile(tmp_path / "plan") as plan:
        assert [plan.take(piece) for piece in pieces] == [len(piece) for piece in pieces]
        plan.finish()
    whole = b"".join(pieces)
    assert (tmp_path / "plan").read_bytes() == whole
    assert (plan.size, plan.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_error_at_the_end_and_stops_the_pieces_before() -> None:
    with PlanFile(Path("/dev/full")) as plan:
        taken = [plan.take(bytes(1 << 20)) for _ in range(10)]
        with pytest.raises(OSError, match="No space left"):
            plan.finish()
    assert taken[-1] == 0
