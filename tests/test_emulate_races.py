"""The emulator's second mode names data races of lanes, asynchronous copies and CTAs; our kernels have none."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import emulated
import numpy as np
import pytest
import torch
from command_line import make_table
from emulated import emulate_decode, emulate_dequant, needs_gxx, worst_head_error
from emulated_sources import folder_for_races, run_edge, run_primitive, source

from benchmarks import races
from tuner.emulate import EmulationError, compile_many, compile_source
from tuner.reference import Case, synthetic_cache
from tuner.render import render
from tuner.space import Config, Problem, default_config
from tuner.space.plan import DecodePlan
from tuner.suits import reads_head_major

pytestmark = needs_gxx


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folder_for_races(tmp_path_factory)


# --- one edge at a time -----------------------------------------------------------------------------------------------

LANES = np.arange(64)
EDGES = [
    ("across_warps", LANES ^ 32, "words[i] = i;", "= words[i ^ 32u];"),
    ("across_lanes", LANES ^ 1, "words[i] = i;", "= words[other];"),
    ("by_address", LANES ^ 1, "words[i] = i;", "load_shared("),
    ("copy_unawaited", LANES + 100, "cp_async<4>(words + i,", "= words[i];"),
    ("group_unawaited", 2 * LANES + 200, "cp_async<4>(words + 64 + i,", "+= words[64 + i];"),
    ("copy_of_another", (LANES ^ 32) + 100, "cp_async<4>(words + i,", "= words[i ^ 32u];"),
    ("copy_too_early", LANES ^ 32, "cp_async<4>(words + i,", "= words[i ^ 32u];"),
    ("bulk_unawaited", LANES + 100, "bulk_copy(words,", "= words[i];"),
    ("bulk_too_early", LANES * (LANES >= 32), "bulk_copy(words,", "= words[i];"),
    ("barrier_unpublished", 0 * LANES, "mbarrier_init(bar, 64);", "mbarrier_arrive(bar);"),
]
"""Kernel of races.cu, what it writes when its edge is there, and the lines whose write and read race when it is not."""


def raced(error: EmulationError) -> tuple[str, dict[str, str]]:
    """Where, and by kind of access the line of the source."""
    access = r"a (\w+) \(line (\d+: .*)\)"
    message = re.search(rf"data race in (.*) between {access} and {access}$", str(error))
    assert message, error
    return message[1], {message[2]: message[3], message[4]: message[5]}


@pytest.mark.parametrize(("entry", "expected", "written", "read"), EDGES)
def test_a_missing_edge_is_named_and_a_present_one_suffices(root, entry, expected, written, read):
    for seed in range(3):
        np.testing.assert_array_equal(run_edge(root, entry, 1, seed=seed)[0], expected)
    with pytest.raises(EmulationError) as caught:
        run_edge(root, entry, 0)
    where, lines = raced(caught.value)
    assert re.fullmatch(r"shared memory at byte \d+", where)
    assert written in lines["write"] and read in lines["read"]
    source_lines = source("races.cu").text.splitlines()
    for quoted in lines.values():
        number, _, text = quoted.partition(": ")
        assert source_lines[int(number) - 1].strip() == text


@pytest.mark.parametrize("seed", range(4))
def test_a_race_shows_under_every_seed(root, seed):
    with pytest.raises(EmulationError, match="data race in shared memory"):
        run_edge(root, "across_warps", 0, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_only_the_atomic_orders_ctas(root, seed):
    out = run_edge(root, "across_ctas", 1, grid=4, concurrent_ctas=4, seed=seed)
    assert (out == LANES * np.array([[4], [1], [1], [1]])).all()
    with pytest.raises(EmulationError) as caught:
        run_edge(root, "across_ctas", 0, grid=4, concurrent_ctas=4, seed=seed)
    where, lines = raced(caught.value)
    assert re.fullmatch(r"global memory at byte \d+ of out, which has 1024", where)
    assert "p.out[blockIdx.x * 64 + i] = i;" in lines["write"] and "load_l2(" in lines["read"]


@pytest.mark.parametrize("seed", range(4))
def test_ctas_have_shared_memory_of_their_own(root, seed):
    out = run_edge(root, "across_warps", 1, grid=7, concurrent_ctas=3, seed=seed)
    np.testing.assert_array_equal(out, np.tile(LANES ^ 32, (7, 1)))


@pytest.mark.parametrize("seed", range(3))
def test_pipelines_and_named_barriers_are_in_order(root, seed):
    a = np.arange(5 * 64 * 4, dtype=np.uint32)
    options = {"a": a, "seed": seed, "races": True}
    run_primitive(root, "pipeline", np.zeros_like(a), block=64, shared=2048, n=5, **options)
    run_primitive(root, "partial", np.zeros((64, 7), np.uint32), block=64, shared=2048, **options)
    run_primitive(root, "bulk", np.zeros(7 * 128, np.uint32), block=64, shared=1056, n=7, **options)
    run_primitive(root, "named", np.zeros(128, np.uint32), block=128, shared=512, **options)


def test_the_two_modes_are_built_apart(root):
    first, second = (compile_source(source("races.cu"), races=races, root=root) for races in (False, True))
    assert first != second
    assert compile_many([source("races.cu")], races=True, root=root) == [second]


# --- our kernels ------------------------------------------------------------------------------------------------------


def decode(cache_format: str, head_dim: int, gqa: int, **values: object) -> Config:
    return default_config(Problem("decode", head_dim, gqa, cache_format)).with_(**values)


FORMAT = "turboquant_4bit_nc"
COPIES = decode(FORMAT, 128, 4, lookup="replicated")
BULK = decode(FORMAT, 128, 4, load="bulk", head_warps=2, lookup="spread", schedule="stream", reduction="tree")
CLUSTERED = decode(FORMAT, 128, 4, warps=2, lookup="replicated", reduction="cluster8")
STORING = CLUSTERED.with_(beginning="prompt")
TURNS = decode(FORMAT, 128, 1, load="bulk", head_warps=4, lookup="spread", schedule="deal", beginning="prompt")
# turboquant_seed at head dim 512 with cp_async is left out: for coefficients that are not stored it reads levels from
# staging that is still being filled. That is a race, and a harmless one, since they meet queries of zero.
BORROWS = decode(FORMAT, 128, 8, load="bulk", head_warps=2, dim_warps=2, tokens=32, query="borrowed").with_(
    schedule="deal", beginning="prompt"
)
KERNELS = [
    COPIES,
    decode(FORMAT, 256, 8, dim_warps=2, tokens=32, stages=1, lookup="spread", schedule="stream", reduction="tree"),
    decode("turboquant_outlier", 128, 6, dim_warps=2, load_bytes=4, reduction="kernel"),
    decode("turboquant_k8v4", 128, 4, load="direct", stages=1, schedule="stream"),
    decode("turboquant_k8v4", 128, 4, load="direct", stages=1, schedule="share", reduction="tree"),
    decode("turboquant_3bit_nc", 128, 7, load="direct", stages=1, dim_warps=2, lookup="prmt", reduction="tree"),
    decode("turboquant_seed", 64, 5, load="direct", stages=1, math="fma", accumulate="f32"),
    decode("turboquant_k3v4_nc", 128, 4, load="bulk", head_warps=2, lookup="prmt", stages=3),
    decode("turboquant_k8v4", 128, 1, warps=8, load="bulk_rows", head_warps=4, stages=3, tokens=32, schedule="share"),
    BULK,
    CLUSTERED,
    STORING,
    TURNS,
    TURNS.with_(words="whole"),
    decode("turboquant_k8v4", 128, 1, warps=8, load="bulk_rows", head_warps=4, tokens=32, beginning="prompt"),
    decode("turboquant_3bit_nc", 128, 4, lookup="woven", query="paired", schedule="deal", beginning="prompt"),
    decode("turboquant_outlier", 64, 8, warps=2, load="direct", stages=1, reduction="cluster2"),
    decode(
        FORMAT, 256, 16, warps=2, tokens=32, stages=1, query="joined", tail="apart", reduction="all", beginning="prompt"
    ),
    decode(FORMAT, 128, 4, lookup="woven", query="paired", words="adjacent", schedule="deal", reduction="all"),
    decode(FORMAT, 128, 4, lookup="woven", query="paired", schedule="deal", reduction="all", beginning="prompt"),
    decode(FORMAT, 128, 4, lookup="woven", query="paired", schedule="allot", reduction="all_warps", beginning="prompt"),
    decode(FORMAT, 256, 6, warps=8, schedule="allot", reduction="all_threads", beginning="prompt"),
    decode(FORMAT, 256, 6, warps=8, schedule="allot", reduction="all_segments", beginning="prompt"),
    BORROWS,
]


def divided(reduction: str) -> tuple[Config, Case]:
    """A request of 41 contributions and more, which the last CTA's warps divide, or its four teams of two."""
    head_dim, warps = (64, 4) if reduction == "all_warps" else (256, 8)
    config = decode(FORMAT, head_dim, 1, warps=warps, reduction=reduction, beginning="prompt", schedule="allot")
    return config, synthetic_cache(config.problem.layout, (0, 17, 2600), q_heads=2, kv_heads=2)


@pytest.mark.parametrize("reduction", ["all_warps", "all_threads", "all_segments"])
def test_contributions_that_warps_divide_have_no_races(root, reduction):
    config, case = divided(reduction)
    out = emulate_decode(config, case, 60, seed=1, concurrent_ctas=2, races=True, root=root)
    assert worst_head_error(out, case.expected()) <= 5e-3


def test_ranges_of_segments_that_follow_too_soon_are_a_race(root, monkeypatch):
    """Eight segments, 17 contributions, and a patience and a seed for which some of those who have shares quit: what
    the last to come adds up for them are several ranges, each in parts."""
    monkeypatch.setattr(DecodePlan, "patience", 30)
    config = decode(FORMAT, 64, 8, warps=2, reduction="all_segments", beginning="prompt")
    case = synthetic_cache(config.problem.layout, (17 * 128,), q_heads=8, kv_heads=1)
    whole = render(config)
    meeting = "            if (again) sync_cta();\n"
    assert whole.text.count(meeting) == 1
    broken = replace(whole, text=whole.text.replace(meeting, ""))
    out = emulate_decode(config, case, 17, seed=2, concurrent_ctas=17, races=True, root=root)
    assert worst_head_error(out, case.expected()) <= 5e-3
    with pytest.raises(EmulationError, match="data race"):
        emulate_decode(config, case, 17, seed=2, concurrent_ctas=17, races=True, root=root, source=broken)


@pytest.mark.parametrize("reduction", ["all_warps", "all_threads", "all_segments"])
def test_parts_that_are_added_up_too_early_are_a_race(root, reduction):
    config, case = divided(reduction)
    whole = render(config)
    meeting = "    if (log == 0) return;\n    sync_cta();\n"
    assert whole.text.count(meeting) == 1
    broken = replace(whole, text=whole.text.replace(meeting, "    if (log == 0) return;\n"))
    with pytest.raises(EmulationError, match="data race"):
        emulate_decode(config, case, 60, seed=1, concurrent_ctas=2, races=True, root=root, source=broken)


def case_of(config: Config) -> Case:
    """Requests long enough for a tree of splits. Bulk copies take all heads of a cache, two per warp of heads."""
    kv_heads = {"bulk": 1, "bulk_rows": 2}.get(config["load"], 0) * config["head_warps"] or 2
    return synthetic_cache(
        config.problem.layout,
        (0, 1, 300, 17),
        q_heads=config.problem.gqa * kv_heads,
        kv_heads=kv_heads,
        order="head" if config["load"] == "bulk" and reads_head_major(config) else "token",
    )


@pytest.mark.parametrize("index", range(len(KERNELS)))
def test_decode_has_no_races(root, index):
    config = KERNELS[index]
    case = case_of(config)
    ctas = 2 * DecodePlan(config).cluster
    out = emulate_decode(config, case, 10, seed=index, concurrent_ctas=ctas, races=True, root=root)
    assert worst_head_error(out, case.expected()) <= 5e-3


def test_dequant_has_no_races(root):
    problem = Problem("dequant", 128, 1, FORMAT)
    config = default_config(problem).with_(load="staged", load_bytes=16, dim_warps=2)
    case = synthetic_cache(problem.layout, (0, 1, 70, 33), q_heads=2, kv_heads=2)
    key, value = torch.zeros(2, case.block_table.numel(), case.block_size, 2, 128, dtype=torch.bfloat16)
    emulate_dequant(
        config,
        case.codec,
        case.kv_cache,
        key,
        value,
        block_table=case.block_table,
        seq_lens=case.seq_lens,
        seed=1,
        concurrent_ctas=2,
        races=True,
        root=root,
    )
    assert key.any() and value.any()


MUTATIONS = [
    (COPIES, r"(publish_stats\(.*\);\s*)sync_cta\(\);", "shared memory", "stripe_stats("),
    (COPIES, r"()sync_cta\(\);(?=\s*int \*last =)", r"global memory at byte \d+ of partials", "load_l2("),
    (BULK, r"()if \(use >= STAGES\) mbarrier_wait\(empty_barrier\(.*\);", "shared memory", "bulk_copy("),
    (BULK, r"()sync_warp\(\);(?=\s*if \(lane == 0\) mbarrier_arrive)", "shared memory", "bulk_copy("),
    (TURNS, r"()if \(use >= STAGES\) mbarrier_wait\(empty_barrier\(.*\);", "shared memory", "bulk_copy("),
    (BORROWS, r"(fence_async_proxy\(\);\s*)sync_cta\(\);(?=\s*pipeline.ask)", "shared memory", "bulk_copy("),
]


NOT_BEGUN = "nothing says that CTA . of the cluster has begun"


@pytest.mark.parametrize(
    ("barrier", "message"),
    [
        (r"(fold_stripes\(p, warp, lane\);\s*)sync_cluster\(\);", NOT_BEGUN),
        (r"(fold_stripes\(p, warp, lane\);\s*)sync(?=_cluster\(\);)", NOT_BEGUN),
        (r"()leave_cluster\(\);(?=\s*}\s*// One CTA:)", "CTA . of the cluster (exits|has exited)"),
        (r"()sync_warp\(\);(?=\s*if \(lane == 0\) {\s*float \*stats)", "data race in shared memory"),
        (r"()sync_cta\(\);(?=\s*for \(int row = rank \+ CLUSTER \* warp; \*last)", "data race in shared memory"),
        (r"()sync_cta\(\);(?=\s*if \(threadIdx.x == 0\) {\s*int \*counter)", "data race in global memory"),
    ],
)
def test_a_cluster_without_one_of_its_barriers_races(root, monkeypatch, barrier, message):
    left = "leave" if barrier.endswith(r"sync(?=_cluster\(\);)") else ""  # the barrier that orders no memory
    mutant, count = re.subn(barrier, rf"\1{left}", render(CLUSTERED).text)
    assert count == 1
    monkeypatch.setattr(emulated, "render", lambda _: SimpleNamespace(text=mutant))
    with pytest.raises(EmulationError, match=message):
        emulate_decode(CLUSTERED, case_of(CLUSTERED), 10, seed=1, concurrent_ctas=16, races=True, root=root)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (r"wait_cluster\(\);(?=\s*if \(rank < active\))", f"{NOT_BEGUN}|data race in shared memory"),
        (r"arrive_cluster\(\);(?=\s*merge_warps)", "the warp has not arrived, expected arrive_cluster"),
        (r"mbarrier_wait_cluster\(inbox_barrier\(\), 0\);", "CTA . of the cluster (exits|has exited)"),
        (r"mbarrier_init\(inbox_barrier\(\), 1\);", "no mbarrier"),
        (r"mbarrier_fence_init\(\);", "expected mbarrier_fence_init"),
        (r"sync_cta\(\);(?=\s*for \(int row = rank \+ CLUSTER \* warp; \*last)", "data race in shared memory"),
        (r"sync_cta\(\);(?=\s*if \(threadIdx.x == 0\) {\s*int \*counter)", "data race in global memory"),
    ],
)
def test_a_cluster_that_stores_without_its_order_fails(root, monkeypatch, order, message):
    mutant, count = re.subn(order, "", render(STORING).text)
    assert count == 1
    monkeypatch.setattr(emulated, "render", lambda _: SimpleNamespace(text=mutant))
    with pytest.raises(EmulationError, match=message):
        emulate_decode(STORING, case_of(STORING), 10, seed=1, concurrent_ctas=16, races=True, root=root)


def test_every_mbarrier_needs_its_own_fence(root, monkeypatch):
    """That of the stages, which other lanes open, does not show the inbox."""
    config = TURNS.with_(schedule="grid", reduction="cluster2")
    fence = r"(mbarrier_init\(inbox_barrier\(\), 1\);)\s*mbarrier_fence_init\(\);"
    mutant, count = re.subn(fence, r"\1", render(config).text)
    assert count == 1 and "mbarrier_fence_init();" in mutant
    monkeypatch.setattr(emulated, "render", lambda _: SimpleNamespace(text=mutant))
    with pytest.raises(EmulationError, match="expected mbarrier_fence_init"):
        emulate_decode(config, case_of(config), 10, seed=1, concurrent_ctas=4, root=root)


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_a_cta_that_lets_others_store_while_it_attends_races(root, monkeypatch, seed):
    arrive, text = "arrive_cluster();", render(STORING).text
    late = text.index(arrive, text.index("void attend("))
    text = text[:late] + text[late + len(arrive) :]
    early = text.index("sync_cta();", text.index("void attend("))
    monkeypatch.setattr(
        emulated, "render", lambda _: SimpleNamespace(text=f"{text[:early]}{arrive}\n    {text[early:]}")
    )
    with pytest.raises(EmulationError, match=r"data race: CTA \d of the cluster writes shared memory's byte"):
        emulate_decode(STORING, case_of(STORING), 10, seed=seed, concurrent_ctas=16, root=root)


@pytest.mark.parametrize(("config", "barrier", "space", "text"), MUTATIONS)
def test_a_kernel_without_one_of_its_barriers_races(root, monkeypatch, config, barrier, space, text):
    mutant, count = re.subn(barrier, r"\1", render(config).text)
    assert count == 1
    monkeypatch.setattr(emulated, "render", lambda _: SimpleNamespace(text=mutant))
    with pytest.raises(EmulationError) as caught:
        emulate_decode(config, case_of(config), seed=1, concurrent_ctas=3, races=True, root=root)
    where, lines = raced(caught.value)
    assert re.match(space, where)
    assert any(text in line for line in lines.values())


def test_a_kernel_that_does_not_wait_for_its_copies_races(root, monkeypatch):
    """It would ask for the next ones at the place of those that are on their way."""
    mutant, count = re.subn(r"cp_async_wait<STAGES - 1>\(\);", "", render(COPIES).text)
    assert count == 1
    monkeypatch.setattr(emulated, "render", lambda _: SimpleNamespace(text=mutant))
    with pytest.raises(EmulationError, match=r"data race in shared memory: two copies to byte \d+ are in flight"):
        emulate_decode(COPIES, case_of(COPIES), seed=1, concurrent_ctas=3, races=True, root=root)


def test_the_command_over_tables_says_what_it_finds(root, tmp_path, capsys, monkeypatch):
    make_table(tmp_path)
    options = ["--tables", str(tmp_path), "--root", str(root)]
    assert races.run(races.parser().parse_args(options)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 without a race, 0 with one"
    mutant = re.sub(r"(publish_stats\(.*\);\s*)sync_cta\(\);", r"\1", render(decode(FORMAT, 128, 4)).text)
    monkeypatch.setattr(emulated, "render", lambda _: SimpleNamespace(text=mutant))
    monkeypatch.setattr(races, "emulate_decode", emulate_decode)
    assert races.run(races.parser().parse_args(options)) == 1
    assert "data race in shared memory" in capsys.readouterr().out
