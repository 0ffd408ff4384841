"""Facts of machine code, checked against the disassembler's own listing and against ptxas."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels_for_build import LOOPS, tiny
from tuner import sass, toolchain
from tuner.build import Built, build
from tuner.cubin import read_cubin
from tuner.errors import TunerError
from tuner.targets import ARCHS


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    results = build([LOOPS], ARCHS, root=tmp_path_factory.mktemp("sass"))
    builts = {arch: b for (_, arch), b in results.items() if isinstance(b, Built)}
    sass.facts_of(builts.values())
    return builts


@pytest.mark.parametrize("arch", ["sm_90", "sm_121"])
def test_facts_agree_with_the_listing(built: dict[str, Built], arch: str) -> None:
    facts = sass.facts(built[arch])
    assert (facts.kernel, facts.arch) == ("wph_decode", arch)
    assert facts.registers == built[arch].registers
    assert facts.shared_bytes == built[arch].shared_bytes == 4096
    text = subprocess.run(
        [toolchain.find_nvdisasm(), "-c", built[arch].cubin], capture_output=True, text=True, check=True
    ).stdout
    section = text.split(".text.wph_decode:")[1].split(".section")[0]
    listed = re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", section)
    trap = len(listed) - 1 - listed[::-1].index("BRA")  # then NOPs
    assert Counter(listed[:trap]) == facts.opcodes
    assert facts.instructions == trap


@pytest.mark.parametrize("arch", ARCHS)
def test_loops(built: dict[str, Built], arch: str) -> None:
    facts = sass.facts(built[arch])
    inner, outer = facts.loops
    assert (inner.depth, outer.depth) == (2, 1)
    assert outer.contains(inner)
    assert not inner.contains(outer)
    assert sass.count(inner.opcodes, "FFMA") == 2
    assert sass.count(inner.opcodes, "SHFL") == 1
    assert inner.opcodes["LDS.128"] == 1
    assert sass.count(inner.opcodes, "BAR", "STS", "LDG") == 0
    assert sass.count(outer.opcodes, "BAR") == 2
    assert sass.count(outer.opcodes, "STS") == sass.count(outer.opcodes, "LDG") == 1
    assert inner.instructions < inner.stall_cycles < outer.stall_cycles < facts.stall_cycles
    # Two dependent FFMAs of four cycles each are the least that an iteration takes.
    assert inner.stall_cycles >= inner.instructions + 2 * 3


def test_many_cubins_at_once_equal_one_by_one(built: dict[str, Built]) -> None:
    cubin = built["sm_121"].cubin
    together = sass.disassemble([(cubin, "wph_decode_reduce"), (cubin, None), (cubin, "wph_decode_reduce")])
    assert [f.kernel for f in together] == ["wph_decode_reduce", "wph_decode", "wph_decode_reduce"]
    assert together[2] == together[0] == sass.disassemble([(cubin, "wph_decode_reduce")])[0]
    assert not together[0].loops
    assert together[1] == sass.facts(built["sm_121"])


def test_facts_are_kept_and_damage_is_repaired(built: dict[str, Built], monkeypatch: pytest.MonkeyPatch) -> None:
    first = sass.facts(built["sm_90"])
    cache = built["sm_90"].cubin.with_name("facts.json")
    text = cache.read_text()
    for damage in ("{", text.replace('"version": 1', '"version": 0'), text.replace("instructions", "count")):
        cache.write_text(damage)
        assert sass.facts(built["sm_90"]) == first
        assert cache.read_text() == text
    # With everything cached no disassembler is needed.
    monkeypatch.setattr(toolchain, "find_nvdisasm", lambda *_: pytest.fail("disassembled again"))
    assert sass.facts_of([built["sm_90"]] * 2) == [first, first]


def test_access_bytes() -> None:
    widths = {"LDG.E.128": 16, "LDG.E.64.CONSTANT": 8, "LDS": 4, "LDS.U8": 1, "LDG.E.U16": 2, "LDGSTS.E.BYPASS.128": 16}
    assert {opcode: sass.access_bytes(opcode) for opcode in widths} == widths


def test_bad_files(tmp_path: Path, built: dict[str, Built]) -> None:
    (tmp_path / "text").write_text("no cubin")
    with pytest.raises(TunerError, match="not a cubin"):
        sass.disassemble([(tmp_path / "text", None)])
    with pytest.raises(TunerError, match="cannot read cubin"):
        sass.disassemble([(tmp_path / "absent", None)])
    with pytest.raises(TunerError, match="no kernel other: it has wph_decode"):
        sass.disassemble([(built["sm_90"].cubin, "other")])


def test_truncated_cubin_is_refused(tmp_path: Path, built: dict[str, Built]) -> None:
    image = built["sm_90"].cubin.read_bytes()

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, len(image) - 1))
    def truncate(size: int) -> None:
        path = tmp_path / "damaged.cubin"
        path.write_bytes(image[:size])
        with pytest.raises(TunerError, match=r"damaged|not a cubin"):
            read_cubin(path)

    truncate()


def test_straight_code_has_no_loop(tmp_path: Path) -> None:
    (result,) = build([tiny(1)], ["sm_121"], root=tmp_path).values()
    assert isinstance(result, Built)
    assert sass.facts(result).loops == ()
