// ThreadSanitizer's side of sanitizer.h. To it a lane is a thread, and so are the copies that a lane starts.
#include <sanitizer/tsan_interface.h>

#include "sanitizer.h"

extern "C" {
// What compilers call, and what a garbage collector does: no header has them.
void __tsan_func_entry(void *call);
void __tsan_func_exit();
void __tsan_read_range(void *p, unsigned long bytes);
void __tsan_write_range(void *p, unsigned long bytes);
void __tsan_java_init(unsigned long heap, unsigned long bytes);
void __tsan_java_alloc(unsigned long p, unsigned long bytes);
void __tsan_java_free(unsigned long p, unsigned long bytes);
}

namespace wph {

const bool spreads_ctas = true;

void create(Fiber &fiber) { fiber.own = __tsan_create_fiber(0); }

void destroy(Fiber &fiber) {
    __tsan_destroy_fiber(fiber.own);
    if (fiber.copies) __tsan_destroy_fiber(fiber.copies);
}

void leave(Fiber &from, const Fiber &to) {
    if (!from.own) from.own = __tsan_get_current_fiber();  // the process's own, which nobody created
    __tsan_switch_to_fiber(to.own, __tsan_switch_to_fiber_no_sync);
}

void arrive(const Fiber &) {}
void check_access(const void *, std::size_t, const char *, int) {}

void happens_before(const void *token) { __tsan_release(const_cast<void *>(token)); }
void happens_after(const void *token) { __tsan_acquire(const_cast<void *>(token)); }
void reads(const void *p, std::size_t bytes) { __tsan_read_range(const_cast<void *>(p), bytes); }
void writes(const void *p, std::size_t bytes) { __tsan_write_range(const_cast<void *>(p), bytes); }

void starts_copy(Fiber &fiber, const void *destination, std::size_t bytes, const void *source, std::size_t valid,
                 const void *call, const void *done) {
    if (!fiber.copies) fiber.copies = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(fiber.copies, 0);  // the copy comes after all that the lane did before
    __tsan_func_entry(const_cast<void *>(call));
    writes(destination, bytes);
    reads(source, valid);
    __tsan_func_exit();
    happens_before(done);
    __tsan_switch_to_fiber(fiber.own, __tsan_switch_to_fiber_no_sync);
}

// The block is the heap of which forget() hands out parts anew; there is but one.
void guard(unsigned char *block, std::size_t block_bytes, unsigned char *, std::size_t) {
    static bool known = false;
    if (!known) __tsan_java_init(reinterpret_cast<unsigned long>(block), block_bytes);
    known = true;
}

void forget(void *p, std::size_t bytes) {
    const auto address = reinterpret_cast<unsigned long>(p);
    const unsigned long words = (bytes + 7) / 8 * 8;
    __tsan_java_free(address, words);
    __tsan_java_alloc(address, words);
}

}  // namespace wph
