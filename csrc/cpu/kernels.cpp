// Compiled once for each vector width (DPK_ISA names it). Includes nothing that emits shared inline functions: a copy
// of one built for a wide processor must not be the one that a narrow processor runs.
#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "plan.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dpk {
namespace DPK_ISA {
namespace {

#include "cpu/vector.h"

#include "cpu/lanes.h"

#include "cpu/bias_grad_kernel.h"

}  // namespace

#define DPK_STRING(name) #name
#define DPK_NAME(name) DPK_STRING(name)

extern const BackwardKernels backward_table;  // kernels_backward.cpp
extern const ReleaseKernels release_table;    // kernels_release.cpp
extern const Kernels table;
const Kernels table = {
    DPK_NAME(DPK_ISA),
    {features_last<Float32>, features_last<BFloat16>, features_last<Float16>},
    {channels_first<Float32>, channels_first<BFloat16>, channels_first<Float16>},
    {strided<Float32>, strided<BFloat16>, strided<Float16>},
    &backward_table,
    &release_table,
};

}  // namespace DPK_ISA
}  // namespace dpk
