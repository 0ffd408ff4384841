"""Twins of kernels: the same text but for what racecheck cannot follow, which is ordered as much in another way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated
import pytest
import torch
from command_line import ROOT
from emulated import emulate_decode, emulate_dequant, needs_gxx, worst_head_error
from emulated_sources import skip_without_thread_sanitizer

from benchmarks import sanitize
from benchmarks.sanitize_twin import has_named_barriers, needs_twin, twin, with_room
from tuner import launch, toolchain
from tuner.emulate import EmulationError
from tuner.errors import TunerError
from tuner.geometry import decode_geometry
from tuner.reference import synthetic_cache
from tuner.render import render
from tuner.space import Config, Problem, default_config
from tuner.space.plan import DecodePlan
from tuner.suits import reads_head_major
from tuner.table.store import PACKAGE_TABLES

FORMAT = "turboquant_4bit_nc"


def decode(head_dim: int, gqa: int, **values: object) -> Config:
    return default_config(Problem("decode", head_dim, gqa, FORMAT)).with_(dim_warps=2, **values)


COPIES = decode(256, 8, tokens=32, stages=1, lookup="spread", schedule="stream", reduction="tree")
BULK = decode(128, 4, warps=8, load="bulk", head_warps=2, lookup="spread")
FOUR = default_config(Problem("decode", 256, 4, FORMAT)).with_(dim_warps=4, warps=8, reduction="cluster2")
DEQUANT = default_config(Problem("dequant", 256, 1, FORMAT)).with_(dim_warps=2, warps=8)
STORING = default_config(Problem("decode", 128, 4, FORMAT)).with_(reduction="cluster2", beginning="prompt")
TURNS = STORING.with_(load="bulk", warps=4, head_warps=4, tokens=16, lookup="spread", reduction="all")
BOTH = TURNS.with_(reduction="cluster2")
PROMPT = BOTH.with_(beginning="prompt")
BY_LANE = (
    (
        "mbarrier_init(empty_barrier(0, thread), STRIPE_WARPS);",
        "mbarrier_init(empty_barrier(0, thread), 32 * STRIPE_WARPS);",
    ),
    (
        "if (lane == 0) mbarrier_arrive(empty_barrier(stripe, (turn + i) % STAGES));",
        "mbarrier_arrive(empty_barrier(stripe, (turn + i) % STAGES));",
    ),
)


@pytest.mark.parametrize("config", [COPIES, BULK, FOUR, DEQUANT])
def test_a_twin_is_the_kernel_with_another_meeting(config: Config) -> None:
    kernel, made = render(config).text, twin(config).text
    for old, new in BY_LANE if config["load"] == "bulk" else ():
        assert kernel.count(old) == 1
        kernel = kernel.replace(old, new)
    begin = made.index("\nconstexpr int MEETINGS_AT = ")
    end = made.index("#define sync_named meet\n") + len("#define sync_named meet\n")
    opening = f"    open_meetings({config['warps'] // config['dim_warps']}, {32 * config['dim_warps']});\n"
    rest = made[:begin] + made[end:]
    assert rest.count(opening) == 1 and rest.replace(opening, "") == kernel
    assert f" p) {{\n{opening}" in rest and "sync_named(" in made[end:]
    assert made[:begin].count("sync_named(") == 1, "its definition"


@pytest.mark.parametrize(("config", "storing", "turns"), [(STORING, 1, 0), (TURNS, 0, 1), (BOTH, 1, 1), (PROMPT, 1, 1)])
def test_a_twin_meets_after_initialising_and_every_lane_gives_back(config: Config, storing: int, turns: int) -> None:
    before, after = render(config).text.splitlines(), twin(config).text.splitlines()
    more = [line.strip() for line in after if line not in before]
    less = [line.strip() for line in before if line not in after]
    assert len(after) == len(before) + storing and needs_twin(config) and not has_named_barriers(config)
    assert after.count("    sync_cta();") == before.count("    sync_cta();") + storing
    number = "n" if config["beginning"] == "prompt" else "thread"
    assert more == turns * [new.replace("thread", number) for _, new in BY_LANE]
    assert less == turns * [old.replace("thread", number) for old, _ in BY_LANE]


@pytest.mark.parametrize(
    "config", [default_config(Problem("decode", 128, 4, FORMAT)), default_config(Problem("dequant", 128, 1, FORMAT))]
)
def test_a_kernel_that_racecheck_follows_has_no_twin(config: Config) -> None:
    assert not needs_twin(config)
    with pytest.raises(TunerError, match="no twin of"):
        twin(config)


def _meets_only_at_named_barriers(config: Config) -> bool:
    plan = DecodePlan(config) if config.problem.op == "decode" else None
    return has_named_barriers(config) and not (plan and (plan.asks_in_turn or plan.pushes))


def synchronisations(cubin: Path) -> list[str]:
    """Barriers and mbarrier instructions of the main kernel, in order."""
    nvdisasm = toolchain.find_nvdisasm()
    code = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    return re.findall(r"(?<!\w)(SYNCS\.\S+|BAR\.SYNC\S* \w+)", code)


def test_a_twin_of_a_tables_kernel_compiles_and_has_no_named_barrier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them; kernels that need none stay as they are."""
    found = [s for s in sanitize.subjects(PACKAGE_TABLES, "sm_90") if "H200" in s.table.device.name]
    named = next(s for s in found if _meets_only_at_named_barriers(s.kernel.config(s.table.problem)))
    whole = next(s for s in found if not s.needs_twin)
    made, same = sanitize.with_twins([named, whole], "sm_90", tmp_path)
    assert same == whole and made.twin and made.name == f"{named.name} (twin)" and made.cubin != named.cubin
    words = sanitize.command("racecheck", "/bin/compute-sanitizer", [made, whole])
    child = words[words.index("--child") + 1 :]
    assert [child[0], child[4]] == ["twin", "kernel"] and child[2] == str(made.cubin)
    assert words[words.index("--num-cuda-barriers") + 1].isdigit() and "memcheck" not in words

    before, after = synchronisations(named.cubin), synchronisations(made.cubin)
    meetings = [s for s in before if s.startswith("BAR") and not s.endswith(" 0x0")]
    assert meetings and not [s for s in after if s.startswith("BAR") and not s.endswith(" 0x0")]
    for kind, more in (("ARRIVE", len(meetings)), ("BAR", 1 - len(meetings))):
        assert sum(kind in s for s in after) == sum(kind in s for s in before) + more

    stale = replace(named, kernel=replace(named.kernel, source_digest="0" * 64))
    assert sanitize.with_twins([stale], "sm_90", tmp_path) == [stale]
    assert capsys.readouterr().out == f"no twin of {stale.name}: it was made from other templates than these\n"


# --- in the emulator --------------------------------------------------------------------------------------------------


def emulate_twins(monkeypatch: pytest.MonkeyPatch, text: Any = lambda config: twin(config).text) -> None:
    """``emulate_decode`` and ``emulate_dequant`` run ``text(config)``, with a twin's shared memory."""
    monkeypatch.setattr(emulated, "render", lambda config: SimpleNamespace(text=text(config)))
    roomy = lambda config, **sizes: with_room(config, decode_geometry(config, **sizes))  # noqa: E731
    monkeypatch.setattr(emulated, "decode_geometry", roomy)

    def launches(config: Config, *tensors: Any) -> list[Any]:
        return [(entry, with_room(config, g)) for entry, g in launch.dequant_launches(config, *tensors)]

    monkeypatch.setattr(emulated, "dequant_launches", launches)


def run_decode(config: Config, **options: Any) -> None:
    kv_heads = config["head_warps"] if config["load"] == "bulk" else 2
    order = "head" if config["load"] == "bulk" and reads_head_major(config) else "token"
    heads = config.problem.gqa * kv_heads
    case = synthetic_cache(config.problem.layout, (0, 1, 300, 17), q_heads=heads, kv_heads=kv_heads, order=order)
    try:
        out = emulate_decode(config, case, 10, **options)
    except EmulationError as error:
        skip_without_thread_sanitizer(error)
        raise
    assert worst_head_error(out, case.expected()) <= 5e-3


@needs_gxx
@pytest.mark.parametrize("races", [False, True])
@pytest.mark.parametrize("config", [COPIES, BULK, FOUR, BOTH])
def test_a_decode_twin_is_right_and_has_no_races(
    config: Config, races: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate_twins(monkeypatch)
    run_decode(config, seed=1, concurrent_ctas=2, races=races)


@needs_gxx
def test_a_decode_twin_without_a_meeting_races(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(config: Config) -> str:
        text, count = re.subn(
            r"sync_slices\(team\);(?=\s*#pragma unroll\s*for \(int j)", "", twin(config).text, count=1
        )
        assert count == 1
        return text

    emulate_twins(monkeypatch, mutant)
    with pytest.raises(EmulationError, match="data race in shared memory"):
        run_decode(COPIES, seed=1, races=True)


@needs_gxx
@pytest.mark.parametrize("races", [False, True])
def test_a_dequant_twin_is_right_and_has_no_races(races: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = synthetic_cache(DEQUANT.problem.layout, (0, 1, 70, 33), q_heads=2, kv_heads=2)

    def rows(**options: Any) -> torch.Tensor:
        out = torch.zeros(2, case.block_table.numel(), case.block_size, 2, 256, dtype=torch.bfloat16)
        arguments = {"block_table": case.block_table, "seq_lens": case.seq_lens}
        emulate_dequant(DEQUANT, case.codec, case.kv_cache, *out, **arguments, **options)
        return out

    expected = rows()
    emulate_twins(monkeypatch)
    try:
        assert torch.equal(rows(seed=1, concurrent_ctas=2, races=races), expected) and expected.any()
    except EmulationError as error:
        skip_without_thread_sanitizer(error)
        raise


@pytest.mark.gpu
def test_twins_pass_the_gate(tmp_path: Path) -> None:
    from tuner.build import Built, build
    from tuner.kernels import device_arch

    words = []
    for config in (COPIES, FOUR, DEQUANT):
        source, arch = twin(config), device_arch(0)
        made = build([source], [arch], root=tmp_path)[source.digest, arch]
        assert isinstance(made, Built)
        words += ["twin", json.dumps(config.to_dict()), str(made.cubin), "2"]
    command = [sys.executable, ROOT / "benchmarks" / "sanitize.py", "--child", *words]
    assert subprocess.run(command, timeout=300).returncode == 0
