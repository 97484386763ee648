"""The Triton kernels: correct in the interpreter, and compiled as intended for GPUs that are not here."""

import re

import pytest
from kernel_interpreter import run_interpreted

from mergemix_kernels import ahead_of_time, tiles


def test_in_the_interpreter():
    run_interpreted("interpreted_triton.py")


@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
@pytest.mark.parametrize("outputs", [1, 8])
def test_machine_code(capability, outputs):
    tiling = tiles.tiling_for("", capability, outputs)
    code = ahead_of_time.compile_for(capability, outputs)
    ptx, sass = code["ptx"], code["sass"]
    # Two bytes an element and four; from each source twice, as the first and as the next one.
    bytes_per_thread = 2 * tiling.elements // (32 * tiling.warps)
    kinds = 3
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == 2 * kinds * bytes_per_thread // 16
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == outputs * kinds * bytes_per_thread // 16
    assert not re.search(r"(ld|st)\.global\S*\.v(2|8)", ptx), (
        "wide accesses are those of aligned full tiles only"
    )
    assert re.search(r"\bLDG\.E\.128", sass)
    assert re.search(r"\bSTG\.E\.128", sass)
    assert "fma.rn" not in ptx
    assert "FFMA" not in sass
    assert "mul.rn.f32" in ptx, "a product without .rn may be fused by the assembler"
    assert "add.rn.f32" in ptx
    assert ".ftz" not in ptx, "subnormals must survive"
    used = dict(re.findall(r"(\w+):(\d+)", code["resources"]))
    assert used["STACK"] == used["LOCAL"] == "0", "registers spilled to memory"
    threads = 32 * tiling.warps * tiling.programs
    assert int(used["REG"]) * threads <= 65_536, "not all programs of a multiprocessor are resident"
    assert "bar.sync" not in ptx, "no layout is converted through shared memory"
    # first tile and SIZE are multiplied in 64 bits: tensors have more than 2**31 elements
    for elements in (tiling.elements, tiling.elements // 2):
        assert re.search(rf"shl\.b64\s+%rd\d+, %rd\d+, {elements.bit_length() - 1};", ptx)


def test_a_tiling_is_found_by_name_then_by_capability_then_one_for_all(monkeypatch):
    named = {8: tiles.Tiling(512, 2, 3, "measured")}
    monkeypatch.setitem(tiles.TILINGS, "Some GPU", named)
    assert tiles.tiling_for("Some GPU", (9, 0), 5).source == "measured"
    assert tiles.tiling_for("Other GPU", (9, 0), 1) == tiles.TILINGS[9, 0][1]
    assert tiles.tiling_for("Other GPU", (9, 0), 2) == tiles.TILINGS[9, 0][4]
    assert tiles.tiling_for("Other GPU", (9, 0), 8) == tiles.TILINGS[9, 0][8]
    assert tiles.tiling_for("Other GPU", (7, 5), 1) == tiles.ELSEWHERE[1]


@pytest.mark.parametrize("by_outputs", [*tiles.TILINGS.values(), tiles.ELSEWHERE])
def test_every_tiling_suits_the_kernel_and_says_where_it_is_from(by_outputs):
    assert max(by_outputs) == 8
    for tiling in by_outputs.values():
        assert tiling.elements & (tiling.elements - 1) == 0
        assert tiling.elements // 2 >= 32 * tiling.warps * 4, "16 bytes of fp32 per thread"
        assert tiling.source.startswith(("not measured: ", "measured: "))
