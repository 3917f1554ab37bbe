"""Schedules of TPU kernels: what libtpu writes, read."""

import pytest

from pallas_kernels import tpu_schedule
from pallas_kernels.tpu_schedule import Region

# A loop over the grid with a branch over a loop with a branch; comments may span lines.
LINES = (
    {0: "/* a window\niteration_bounds: (2, 3)\nstrides: (1, 1) */"}
    | {1: "/* Start region 9 */", 3: "sbr.rel (%p1) target = $region5"}
    | {8: "/* Start region 4 :: Start region 7 */", 10: "sbr.rel (%p2) target = $region3"}
    | {15: "/* Start region 2 */", 18: "\n/* End region 2 */"}
    | {20: "sbr.rel (!%p3) target = $region7", 24: "/* End region 7 :: End region 4 */"}
    | {30: "sbr.rel (!%p4) target = $region9", 34: "/* End region 9 */"}
)
LABELS = {1: "LB", 8: "LB", 19: "PF"}
BUNDLES = "= control target key start\nLB: loop body\n\n" + "\n".join(
    f"  {hex(n) if n else 0} {LABELS.get(n, '  ')}: > {{ %1 = nop  {LINES.get(n, '')} }}"
    for n in range(40)
)
UTILIZATION = """\
== CAPACITY:
MXU, VLOAD:FILL, VSTORE:SPILL
  4   3   1
== UTILIZATION:
0 2 0
0 1 1
"""


def test_regions():
    schedule = tpu_schedule.parse(BUNDLES, UTILIZATION)
    assert schedule.grid == (2, 3)
    assert (schedule.spill_stores, schedule.spill_loads) == (1, 3)
    inner = Region("loop", 13, (Region("branch", 4),))
    grid = Region("loop", 17, (Region("branch", 0, (inner,)),))
    assert schedule.body == Region("kernel", 6, (grid,))
    assert schedule.body.total == 40
    assert [x.total for x in schedule.body.all("loop")] == [34, 17]
    assert [x.total for x in schedule.body.all("branch")] == [17, 4]


def test_arguments_of_libtpu():
    told = tpu_schedule.init_args("--some_flag=1")
    assert told.startswith("--some_flag=1 --xla_jf_dump_to=") and "final_bundles" in told
    assert tpu_schedule.init_args(told) == told
    assert tpu_schedule.init_args("--xla_jf_dump_to=here") == "--xla_jf_dump_to=here"


def test_reads_what_was_written_last(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_schedule, "_folder", lambda: tmp_path)
    assert tpu_schedule.read("kernel.1") is None
    for time, bundles in ((1, "nothing"), (2, BUNDLES)):
        (tmp_path / f"{time}-kernel.1-02-final_bundles.txt").write_text(bundles)
        (tmp_path / f"{time}-a_kernel.1-02-final_bundles.txt").write_text("nothing")
        name = f"{time}-kernel.1-00-final_hlo-static-per-bundle-utilization.txt"
        (tmp_path / name).write_text(UTILIZATION)
    assert tpu_schedule.read("kernel.1").body.total == 40
    assert tpu_schedule.read("kernel.2") is None
    tpu_schedule.forget()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "   0   :  { %1 = nop }"])
def test_kernels_without_regions(text):
    schedule = tpu_schedule.parse(text, UTILIZATION)
    assert schedule.grid == () and schedule.body.inner == ()
