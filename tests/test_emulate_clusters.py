"""The emulator's clusters: CTAs that run together, meet, and read each other's shared memory between two meetings, or
store there."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from emulated import needs_gxx
from emulated_sources import skip_without_thread_sanitizer, source

from tuner.emulate import EmulationError, Launch, compile_many, emulate

pytestmark = needs_gxx
SEEDS = pytest.mark.parametrize("seed", range(6))


class Params(ctypes.Structure):
    _fields_ = [("out", ctypes.c_uint64), ("n", ctypes.c_int32)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    compile_many([source("clusters.cu")], root=folder)
    return folder


def run(root, entry, n, *, grid=(8, 1, 2), **options):
    """Words [CTAs, 64] that ``entry`` of clusters.cu wrote."""
    out = np.full((16, 64), np.nan, np.float32)
    emulate(source("clusters.cu"), Launch(entry, grid, 64, 512), Params(n=n), {"out": out}, root=root, **options)
    return out[: grid[0]]


@SEEDS
def test_ctas_read_their_neighbours(root, seed):
    out = run(root, "next_words", 3, seed=seed, concurrent_ctas=1 + 2 * seed)
    expected = [64 * (cta // 4 * 4 + (cta + 1) % 4) + (np.arange(64) ^ 32) for cta in range(8)]
    np.testing.assert_array_equal(out, expected)


@SEEDS
def test_ctas_store_in_their_neighbours(root, seed):
    out = run(root, "stored_words", 7, seed=seed, concurrent_ctas=1 + 2 * seed)
    expected = [64 * (cta // 4 * 4 + (cta + 3) % 4) + (np.arange(64) ^ 32) for cta in range(8)]
    np.testing.assert_array_equal(out, expected)


@SEEDS
def test_addresses_of_shared_memory_tell_the_cta(root, seed):
    np.testing.assert_array_equal(run(root, "by_address", 1, seed=seed), np.arange(512).reshape(8, 64))


@SEEDS
@pytest.mark.parametrize("n", [2, 3])
def test_what_lies_behind_an_ordering_barrier_may_be_read(root, seed, n):
    np.testing.assert_array_equal(run(root, "behind_a_barrier", n, seed=seed), np.tile(np.arange(64), (8, 1)))


@SEEDS
@pytest.mark.parametrize(
    ("entry", "n", "message"),
    [
        ("next_words", 2, r"nothing says that CTA \d of the cluster has begun"),
        ("next_words", 1, r"CTA \d of the cluster (exits while another reads|has exited)"),
        ("behind_a_barrier", 0, r"nothing says that CTA \d of the cluster has begun"),
        ("behind_a_barrier", 1, r"data race: CTA \d of the cluster has written shared memory's byte \d+"),
        ("written_too_early", 0, r"data race: CTA \d of the cluster (has written|writes) shared memory's byte \d+"),
        ("no_such_cta", 4, r"CTA 4 of a cluster of 4"),
        ("no_such_cta", -1, r"CTA -1 of a cluster of 4"),
        ("by_address", 0, r"an address of CTA 0 of the cluster, expected one of CTA [123]"),
        ("one_stays_away", 0, r"deadlock: 64 threads wait at sync_cluster"),
        ("stored_words", 5, r"nothing says that CTA \d of the cluster has begun: expected wait_cluster"),
        ("stored_words", 4, r"nothing says that CTA \d of the cluster has begun: expected wait_cluster"),
        ("stored_words", 6, "wait_cluster: the warp has not arrived, expected arrive_cluster"),
        ("stored_words", 15, "arrive_cluster: the warp has arrived already, expected wait_cluster"),
        ("stored_words", 3, r"CTA \d of the cluster (exits while a store_cluster|has exited)"),
        ("stored_words", 23, "store_cluster: CTA 4 of a cluster of 4"),
        ("stored_twice", 8, r"data race: two stores to byte 0 of CTA \d's shared memory are in flight"),
    ],
)
def test_what_a_cluster_does_wrong_is_named_under_every_seed(root, seed, entry, n, message):
    with pytest.raises(EmulationError, match=message):
        run(root, entry, n, seed=seed, concurrent_ctas=1 + seed)


def test_a_grid_is_made_of_whole_clusters(root):
    with pytest.raises(EmulationError, match="a grid of 6 CTAs in x, expected whole clusters of 4"):
        run(root, "next_words", 3, grid=(6, 1, 1))


@SEEDS
def test_the_barrier_orders_global_memory(root, seed):
    """Under the thread sanitizer; shared memory is compared in either mode."""
    options = {"grid": (8, 1, 1), "seed": seed, "races": True}
    try:
        out = run(root, "by_way_of_memory", 1, **options)
    except EmulationError as error:
        skip_without_thread_sanitizer(error)
        raise
    np.testing.assert_array_equal(out[:, 0], [64, 128, 192, 0, 320, 384, 448, 256])
    with pytest.raises(EmulationError, match="data race in global memory at byte"):
        run(root, "by_way_of_memory", 0, **options)
