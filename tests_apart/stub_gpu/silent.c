/* Functions of CUDA's runtime and of cuBLAS that only succeed, and what compiled kernels call to register and to launch.
 *
 * No header is included: a function that reads no argument may be declared without any.
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))
#define SUCCEEDS(name) PUBLIC int name() { return 0; }

SUCCEEDS(cudaSetDevice)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaDeviceEnablePeerAccess)
SUCCEEDS(cudaFreeHost)
SUCCEEDS(cudaHostUnregister)
SUCCEEDS(cudaMemcpyPeerAsync)
SUCCEEDS(cudaMemcpyToSymbol)
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaStreamAddCallback)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode)
SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaFuncSetAttribute)

/* ---- kernels of torch's own libraries ------------------------------------------------------------------------------ */

extern int cudaLaunchKernel();
PUBLIC int __cudaLaunchKernel() { return cudaLaunchKernel(); }
PUBLIC int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
SUCCEEDS(__cudaPushCallConfiguration)
PUBLIC int __cudaPopCallConfiguration(unsigned *grid, unsigned *block, size_t *shared, void **stream) {
    for (int each = 0; each < 3; each++) grid[each] = block[each] = 1;
    *shared = 0, *stream = 0;
    return 0;
}
PUBLIC void **__cudaRegisterFatBinary() { static void *handle; return &handle; }
SUCCEEDS(__cudaRegisterFatBinaryEnd)
SUCCEEDS(__cudaRegisterFunction)
SUCCEEDS(__cudaRegisterVar)
SUCCEEDS(__cudaUnregisterFatBinary)

/* ---- cuBLAS: every handle and description is some memory ----------------------------------------------------------- */

#define MAKES(name) PUBLIC int name(void **made) { *made = calloc(1, 512); return 0; }
MAKES(cublasCreate_v2)
MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatmulPreferenceCreate)
MAKES(cublasLtMatrixLayoutCreate)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
PUBLIC int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
PUBLIC int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
PUBLIC size_t cublasLtGetVersion() { return 130000; }
PUBLIC int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference, int asked, void *found, int *count) {
    memset(found, 0, 64);
    *count = 1;
    return 0;
}
SUCCEEDS(cublasLtMatmul)
SUCCEEDS(cublasSgemm_v2)
SUCCEEDS(cublasDgemm_v2)
SUCCEEDS(cublasGemmEx)
SUCCEEDS(cublasSgemmEx)
SUCCEEDS(cublasGemmStridedBatchedEx)
SUCCEEDS(cublasSgemmStridedBatched)
SUCCEEDS(cublasDgemmStridedBatched)
SUCCEEDS(cublasSgemv_v2)
SUCCEEDS(cublasDgemv_v2)
SUCCEEDS(cublasSdot_v2)
SUCCEEDS(cublasDdot_v2)
SUCCEEDS(cublasDotEx)
