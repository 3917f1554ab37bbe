"""Compiled programs, read from their text."""

import pytest

from sparsex_jax.benchmarks.hlo import Program

TEXT = """\
HloModule jit_f, is_scheduled=true

%fused (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0:T(256)} parameter(0)
  ROOT %twice = f32[8]{0:T(256)} add(%p.1, %p.1)
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  ROOT %next = (s32[]{:T(128)}, /*index=1*/f32[4,8]{1,0:T(8,128)}) fusion(%state), kind=kLoop, \
calls=%fused, backend_config={"estimated_cycles":"30","a":"b(c"}
}

%condition (state.1: (s32[], f32[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7)
  %state.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%called (x.1: bf16[16]) -> bf16[16] {
  ROOT %x.1 = bf16[16]{0:T(256)(128)(2,1)} parameter(0)
}

ENTRY %main (x: bf16[16]) -> bf16[16] {
  %x = bf16[16]{0:T(256)(128)(2,1)S(1)} parameter(0)
  %begin = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) custom-call(), custom_call_target="make"
  %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%begin), condition=%condition, body=%body
  ROOT %out = bf16[16]{0:T(256)(128)(2,1)} call(%x), to_apply=%called
}
"""


def test_what_runs_and_how_often():
    found = {each.name: (each, times) for each, _, times in Program(TEXT).executed()}
    assert {name: times for name, (_, times) in found.items()} == {
        "x": 1, "begin": 1, "state": 7, "next": 7, "x.1": 1,
    }  # fmt: skip
    following, _ = found["next"]
    assert following.opcode == "fusion" and following.operands == ["state"]
    assert following.number("estimated_cycles") == 30 and following.number("flops") is None
    assert following.shapes == [(), (4, 8)] and following.bytes == 4 + 4 * 32
    assert found["x"][0].bytes == 32 and found["begin"][0].operands == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=NE"),
        ("while(%begin), condition", "conditional(%begin), condition"),
        (
            "%counter = s32[]{:T(128)} get-tuple-element(%state.1), index=0",
            "%y = s32[] constant(1)",
        ),
    ],
)
def test_trip_counts_that_are_not_known(old, new):
    with pytest.raises(ValueError, match="is not known"):
        list(Program(TEXT.replace(old, new)).executed())
