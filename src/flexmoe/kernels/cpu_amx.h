// Instructions of AMX tiles. Those of the compiler's headers take no template arguments, and some do
// not say what memory they read.

#ifndef CPU_AMX_H
#define CPU_AMX_H

#include <cstdint>

namespace {

#if defined(__AMX_BF16__)
inline void configure_tiles(const uint8_t (&config)[64]) {
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
inline void release_tiles() { __asm__ volatile("tilerelease"); }

template <int I>
void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(I));
}
template <int I>
void load_tile(const void* from, int64_t bytes) {  // from one row to the next
  __asm__ volatile("tileloadd (%0,%1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(I) : "memory");
}
template <int I>
void store_tile(void* to, int64_t bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(to), "r"(bytes), "i"(I) : "memory");
}
template <int TO, int A, int B>  // TO += A . B
void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(TO), "i"(A), "i"(B));
}
#endif

}  // namespace

#endif
