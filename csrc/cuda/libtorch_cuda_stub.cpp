// Stands in for libtorch_cuda.so while _C_cuda is linked, so that it also builds beside a CPU-only torch. Only the
// name of the library and of this function go into _C_cuda; the stub itself is not shipped and never loaded.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) {
  return 1;
}
