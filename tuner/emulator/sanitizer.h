// What the emulator needs of a sanitizer. A build takes one of two: address.cpp finds accesses outside of the memory
// that a kernel was given, races.cpp those of two lanes that nothing orders. What only the other does is empty.
#pragma once
#include <cstddef>

#include "emulate.h"  // happens_before(), happens_after()

namespace wph {

// A stack, and what the sanitizer holds for it.
struct Fiber {
    unsigned char *stack = nullptr;  // null: the process's own
    std::size_t stack_bytes = 0;
    void *own = nullptr;
    void *copies = nullptr;  // the same for the asynchronous copies that it starts
};

// Whether a CTA best begins in another slot than that of the CTA which ended, with which it would count as ordered.
extern const bool spreads_ctas;

void create(Fiber &fiber);
void destroy(Fiber &fiber);
void leave(Fiber &from, const Fiber &to);  // immediately before the jump
void arrive(const Fiber &now);             // immediately after it

// Nothing but these bytes of the block may be touched.
void guard(unsigned char *block, std::size_t block_bytes, unsigned char *begin, std::size_t bytes);
// Ends the process where a byte may not be touched.
void check_access(const void *p, std::size_t bytes, const char *what, int line);

// Accesses of the current fiber that the run time makes for the kernel.
void reads(const void *p, std::size_t bytes);
void writes(const void *p, std::size_t bytes);
// An asynchronous copy that the fiber asks for at the address `call`. It goes on by itself, to be over for those who
// pass happens_after(done).
void starts_copy(Fiber &fiber, const void *destination, std::size_t bytes, const void *source, std::size_t valid,
                 const void *call, const void *done);
// Earlier accesses to these bytes, of another CTA's shared memory, do not count.
void forget(void *p, std::size_t bytes);

}  // namespace wph
