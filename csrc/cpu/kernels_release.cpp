// As kernels.cpp, for what comes after the backward; for AVX-512 too.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/isa_release.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dpk {
namespace DPK_ISA {
namespace {

#include "cpu/vector.h"

#include "cpu/clip_kernel.h"
#include "cpu/product_kernel.h"
#include "cpu/ghost_squares_kernel.h"
#include "cpu/chacha20.h"
#include "cpu/four.h"
#include "cpu/normal.h"

}  // namespace

extern const ReleaseKernels release_table;
const ReleaseKernels release_table = {
    sum_of_squares, ghost_squares, add_outer_sum, add_rounded, words, normals, add_noise,
};

}  // namespace DPK_ISA
}  // namespace dpk
