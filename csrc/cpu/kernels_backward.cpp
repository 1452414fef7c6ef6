// As kernels.cpp, for the ops that keep little for backward.
#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dpk {
namespace DPK_ISA {
namespace {

#include "cpu/vector.h"

#include "cpu/lanes.h"
#include "cpu/elements.h"

#include "cpu/activation_kernel.h"
#include "cpu/block_sum_kernel.h"
#include "cpu/packed_kernel.h"

#include "cpu/norm_kernel.h"

using F = PlainFloat32;
using B = PlainBFloat16;
using H = PlainFloat16;

}  // namespace

extern const BackwardKernels backward_table;
const BackwardKernels backward_table = {
    pack_bits,
    {clamp_pack<F>, clamp_pack<B>, clamp_pack<H>},
    {bit_scale<F>, bit_scale<B>, bit_scale<H>},
    {{activation_grad<F, Gelu>, activation_grad<B, Gelu>, activation_grad<H, Gelu>},
     {activation_grad<F, GeluTanh>, activation_grad<B, GeluTanh>, activation_grad<H, GeluTanh>},
     {activation_grad<F, Silu>, activation_grad<B, Silu>, activation_grad<H, Silu>},
     {activation_grad<F, QuickGelu>, activation_grad<B, QuickGelu>, activation_grad<H, QuickGelu>}},
    {slope_pack<Gelu>, slope_pack<GeluTanh>, slope_pack<Silu>, slope_pack<QuickGelu>},
    slope_scale,
    {level_pack<F>, level_pack<B>, level_pack<H>},
    {level_scale<F>, level_scale<B>, level_scale<H>},
    {quantize_row<F>, quantize_row<B>, quantize_row<H>},
    {{layer_norm_row<F, F>, layer_norm_row<F, Int8>},
     {layer_norm_row<B, B>, layer_norm_row<B, Int8>},
     {layer_norm_row<H, H>, layer_norm_row<H, Int8>}},
    {{group_norm_group<F, F>, group_norm_group<F, Int8>},
     {group_norm_group<B, B>, group_norm_group<B, Int8>},
     {group_norm_group<H, H>, group_norm_group<H, Int8>}},
    {normed_product<F>, normed_product<B>, normed_product<H>},
    {scale_by<F>, scale_by<B>, scale_by<H>},
    {scale_all<F>, scale_all<B>, scale_all<H>},
    {add_rows<F>, add_rows<B>, add_rows<H>},
};

}  // namespace DPK_ISA
}  // namespace dpk
