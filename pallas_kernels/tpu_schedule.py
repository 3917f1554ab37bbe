"""The static schedules of TPU kernels, which libtpu writes while it compiles.

It is told to when it is loaded, by LIBTPU_INIT_ARGS, and writes the bundles (instructions of all
units that begin in the same cycle) of whatever it compiles from then on into a folder.
"""

import atexit
import dataclasses
import functools
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

_FLAG = "--xla_jf_dump_to="
_DELAY = 4  # bundles after a branch that run whether it is taken or not


@dataclasses.dataclass(frozen=True)
class Region:
    """A piece of a kernel's code.

    Attributes:
      kind: the whole kernel; a loop's body; what a branch may pass over.
      bundles: of its own, without those of the regions in it. A bundle takes a cycle, or more if it
        waits for copies or for the matrix unit.
      inner: the regions directly in it, in the order of the code.
    """

    kind: Literal["kernel", "loop", "branch"]
    bundles: int
    inner: tuple["Region", ...] = ()

    @property
    def total(self) -> int:
        """Bundles, with those of the regions in it, each counted once."""
        return self.bundles + sum(region.total for region in self.inner)

    def all(self, kind: str) -> Iterator["Region"]:
        """The regions of a kind in it, the outer before the inner ones."""
        for region in self.inner:
            if region.kind == kind:
                yield region
            yield from region.all(kind)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The bundles of a kernel.

    Attributes:
      grid: how often the outermost loop runs, along each axis.
      body: the kernel.
      spill_stores: of registers to VMEM, in the code.
      spill_loads: back.
    """

    grid: tuple[int, ...]
    body: Region
    spill_stores: int
    spill_loads: int


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="libtpu")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def init_args(given: str) -> str:
    """LIBTPU_INIT_ARGS with which schedules are written; who has them written elsewhere has none.

    Args:
      given: the variable, as it is.
    """
    if _FLAG in given:
        return given
    labels = "--xla_jf_dump_llo_pass_label_regex=final_bundles|final_hlo"
    return f"{given} {_FLAG}{_folder()} --xla_jf_dump_llo_text=true {labels}".strip()


def forget() -> None:
    """Removes what was written so far."""
    for path in _folder().iterdir():
        path.unlink()


def read(instruction: str) -> Schedule | None:
    """The schedule of a kernel that was compiled since `forget`.

    Args:
      instruction: its name in the compiled program.

    Returns:
      None if libtpu was loaded before it was told to write schedules.
    """
    name = re.escape(instruction)
    found = {}
    for what in ("final_bundles", "final_hlo-static-per-bundle-utilization"):
        pattern = re.compile(rf"\d+-{name}-\d+-{what}\.txt")
        paths = [path for path in _folder().iterdir() if pattern.fullmatch(path.name)]
        if not paths:
            return None
        found[what] = max(paths).read_text()  # names begin with the time
    return parse(*found.values())


def parse(bundles: str, utilization: str) -> Schedule:
    """The schedule that two files of libtpu describe.

    Args:
      bundles: "final_bundles", an instruction word a line, with comments.
      utilization: "final_hlo-static-per-bundle-utilization", slots taken in each.
    """
    head, rows = utilization.split("== UTILIZATION:")
    units = [unit.strip() for unit in head.splitlines()[1].split(",")]
    taken = [
        dict(zip(units, map(int, row.split()), strict=True)) for row in rows.split("\n") if row
    ]
    grids = re.findall(r"^iteration_bounds: \(([\d, ]+)\)", bundles, re.MULTILINE)
    return Schedule(
        tuple(map(int, grids[0].split(","))) if grids else (),
        _parse_body(bundles),
        sum(row["VSTORE:SPILL"] for row in taken),
        sum(row["VLOAD:FILL"] for row in taken),
    )


def _parse_body(text: str) -> Region:
    """The regions of a kernel.

    A loop begins where a region does to which there is a branch back. Another branch, to region
    n, passes over region n - 1.
    """
    first: dict[str, int] = {}  # region: bundle
    jumps: list[tuple[int, str]] = []  # bundle, region that it goes to
    last: dict[str, int] = {}
    count = 0
    for line in text.splitlines():
        # A bundle's comments may go on in the next lines.
        count += re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:", line) is not None
        first |= dict.fromkeys(re.findall(r"Start region (\d+)", line), count - 1)
        last |= dict.fromkeys(re.findall(r"End region (\d+)", line), count - 1)
        jumps += [(count - 1, region) for region in re.findall(r"target = \$region(\d+)", line)]
    spans: list[tuple[int, int, Literal["loop", "branch"]]] = []
    for bundle, region in jumps:
        after = bundle + 1 + _DELAY
        if first.get(region, count) <= bundle:
            spans.append((first[region], after, "loop"))
        else:
            end = last.get(str(int(region) - 1), -1) + 1
            spans.append((after, end, "branch"))
    # A branch may pass over a loop, so where both begin and end together the loop is the inner one.
    spans = sorted((span for span in spans if span[0] < span[1]), key=lambda x: (x[0], -x[1], x[2]))
    return _nest("kernel", 0, count, spans)


def _nest(kind: Literal["kernel", "loop", "branch"], begin: int, end: int, spans: list) -> Region:
    """The region of bundles from `begin` to `end`; takes those in it from the ordered `spans`."""
    inner, own = [], end - begin
    while spans and spans[0][0] < end:
        start, stop, what = spans.pop(0)
        stop = min(stop, end)
        inner.append(_nest(what, start, stop, spans))
        own -= stop - start
    return Region(kind, own, tuple(inner))
