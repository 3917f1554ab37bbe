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


def test_trip_counts_that_the_compiler_tells():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"5"},"a":{}}'
    text = TEXT.replace("body=%body", known).replace("direction=LT", "direction=NE")
    times = {each.name: times for each, _, times in Program(text, 2).executed()}
    assert times["next"] == 5


SENDING = """\
HloModule jit_f, is_scheduled=true

%inside (p: f32[8]) -> f32[64] {
  %p = f32[8]{0} parameter(0)
  ROOT %gathered = f32[64]{0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%state), index=1
  %start = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0}}
  %y = f32[8]{0} collective-permute-done(%start)
  ROOT %next = (s32[], f32[8]{0}) tuple(%state, %y)
}

%condition (state.1: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[], f32[8]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%state.1), index=0
  %bound = s32[] get-tuple-element(%state.1), index=1
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

ENTRY %main (x.1: f32[8], z: bf16[32]) -> f32[64] {
  %x.1 = f32[8]{0} parameter(0)
  %z = bf16[32]{0} parameter(1)
  %sum = f32[8]{0} all-reduce(%x.1), replica_groups=[2,4]<=[8], to_apply=%add
  %part = bf16[8]{0} reduce-scatter(%z), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, \\
dimensions={0}, to_apply=%add
  %swapped = bf16[32]{0} all-to-all(%z), replica_groups={{0,2},{1,3}}, dimensions={0}
  %loop = (s32[], f32[8]{0}) while(%sum), condition=%condition, body=%body
  ROOT %all = f32[64]{0} fusion(%x.1), kind=kCustom, calls=%inside
}
"""


def test_bytes_that_a_device_sends():
    assert Program(SENDING, 5).sent() == {
        "all-gather": 7 * 32,
        "all-reduce": 2 * 3 * 32 // 4,
        "reduce-scatter": 3 * 64 // 4,
        "all-to-all": 64 // 2,
        "collective-permute": 5 * 32,
    }
    with pytest.raises(ValueError, match="how often loop runs is not known"):
        Program(SENDING).sent()
    with pytest.raises(ValueError, match="which devices sum is among is not known"):
        Program(SENDING.replace("(%x.1), replica_groups=[2,4]<=[8]", "(%x.1)"), 5).sent()
