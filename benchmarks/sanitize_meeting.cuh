// How warps meet without the rest of their CTA in what racecheck is asked about: at an mbarrier, in the place of a named
// barrier. sanitize_twin.py puts this into kernels, sanitize_control.cu includes it; both have primitives and `smem`.
// From its byte MEETINGS_AT on lie sixteen mbarriers, by id, and a word per thread: the parity of its next phase.
static_assert(MEETINGS_AT % 8 == 0, "mbarriers are aligned");

WPH_DEVICE unsigned long long *meeting_barrier(int id) {
    return reinterpret_cast<unsigned long long *>(smem + MEETINGS_AT) + id;
}
WPH_DEVICE int &meeting_parity() { return reinterpret_cast<int *>(smem + MEETINGS_AT + 128)[threadIdx.x]; }

// The first thing that a kernel does: ids 1 to `ids`, for `threads` threads each.
WPH_DEVICE void open_meetings(int ids, int threads) {
    if (threadIdx.x == 0) {
        for (int id = 1; id <= ids; ++id) mbarrier_init(meeting_barrier(id), threads);
        mbarrier_fence_init();
    }
    meeting_parity() = 0;
    sync_cta();
}
// As sync_named: every thread arrives and waits, so that no edge depends on what racecheck makes of __syncwarp.
WPH_DEVICE void meet(int id, int) {
    mbarrier_arrive(meeting_barrier(id));
    mbarrier_wait(meeting_barrier(id), meeting_parity());
    meeting_parity() ^= 1;
    sync_warp();  // together again, for matrix instructions
}
