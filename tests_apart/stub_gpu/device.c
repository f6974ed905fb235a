/* A CUDA runtime without a device: its memory is the host's, copies are made, kernels are counted and do nothing.
 *
 * Preloaded, it takes the place of libcudart: what torch allocates, copies and waits for is real and can be counted, what it
 * computes is not. silent.c has the functions that only succeed.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cuda_runtime_api.h>

#define PUBLIC __attribute__((visibility("default")))
#define DONE return cudaSuccess

/* In the order of COUNTED in gpu.py. */
enum { KERNELS, TO_DEVICE, FROM_DEVICE, ON_DEVICE, STREAM_WAITS, DEVICE_WAITS, EVENT_WAITS, ALLOCATIONS, FILLS, COUNTED };
static atomic_long counted[COUNTED];

PUBLIC void stub_counts(long *out) {
    for (int each = 0; each < COUNTED; each++) out[each] = counted[each];
}

/* ---- the device: an H100 with 80 GiB ------------------------------------------------------------------------------- */

enum { MULTIPROCESSORS = 132, MAJOR = 9, MINOR = 0, THREADS_OF_BLOCK = 1024, THREADS = 2048, WARP = 32 };
enum { SHARED = 49152, SHARED_OPT_IN = 232448, SHARED_ALL = 233472, L2 = 50 << 20, REGISTERS = 65536 };
static const size_t MEMORY = 80ull << 30;

PUBLIC cudaError_t cudaGetDeviceCount(int *count) { *count = 1; DONE; }
PUBLIC cudaError_t cudaGetDevice(int *device) { *device = 0; DONE; }
PUBLIC cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; DONE; }
PUBLIC cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; DONE; }
PUBLIC cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; DONE; }
PUBLIC cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; DONE; }
PUBLIC cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:01:00.0");
    DONE;
}

PUBLIC cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
        case cudaDevAttrComputeCapabilityMajor: *value = MAJOR; break;
        case cudaDevAttrComputeCapabilityMinor: *value = MINOR; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = THREADS_OF_BLOCK; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = THREADS; break;
        case cudaDevAttrMaxBlocksPerMultiprocessor:
        case cudaDevAttrWarpSize: *value = WARP; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_OPT_IN; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = SHARED_ALL; break;
        case cudaDevAttrL2CacheSize: *value = L2; break;
        case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        default: *value = 1;
    }
    DONE;
}

PUBLIC cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "NVIDIA H100 (stub)");
    found->totalGlobalMem = MEMORY;
    found->major = MAJOR, found->minor = MINOR, found->multiProcessorCount = MULTIPROCESSORS, found->warpSize = WARP;
    found->maxThreadsPerBlock = THREADS_OF_BLOCK, found->maxThreadsPerMultiProcessor = THREADS;
    found->maxBlocksPerMultiProcessor = WARP, found->regsPerBlock = found->regsPerMultiprocessor = REGISTERS;
    found->sharedMemPerBlock = SHARED, found->sharedMemPerBlockOptin = SHARED_OPT_IN;
    found->sharedMemPerMultiprocessor = SHARED_ALL, found->l2CacheSize = L2, found->textureAlignment = 512;
    found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
    found->maxGridSize[0] = 2147483647, found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    DONE;
}

/* ---- memory -------------------------------------------------------------------------------------------------------- */

PUBLIC cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    /* Little, so that packs stay small enough for a host. */
    *total = MEMORY, *available = 4ull << 30;
    DONE;
}

static cudaError_t allocate(void **place, size_t size, size_t alignment) {
    if (posix_memalign(place, alignment, size ? size : 1)) return cudaErrorMemoryAllocation;
    memset(*place, 0, size);
    DONE;
}

PUBLIC cudaError_t cudaMalloc(void **place, size_t size) {
    counted[ALLOCATIONS]++;
    return allocate(place, size, 512);
}
PUBLIC cudaError_t cudaMallocAsync(void **place, size_t size, cudaStream_t stream) { return cudaMalloc(place, size); }
PUBLIC cudaError_t cudaFree(void *place) { free(place); DONE; }
PUBLIC cudaError_t cudaFreeAsync(void *place, cudaStream_t stream) { free(place); DONE; }
/* Never given back: which memory is pinned stays known. */
enum { MOST_PINNED = 1 << 16 };
static struct { char *start; size_t size; } pinned[MOST_PINNED];
static atomic_int num_pinned;

static void remember(void *place, size_t size) {
    int index = num_pinned++;
    if (index < MOST_PINNED) pinned[index].start = place, pinned[index].size = size;
}

static int is_pinned(const void *place) {
    int last = num_pinned < MOST_PINNED ? num_pinned : MOST_PINNED;
    for (int each = 0; each < last; each++)
        if ((char *)place >= pinned[each].start && (char *)place < pinned[each].start + pinned[each].size) return 1;
    return 0;
}

PUBLIC cudaError_t cudaHostAlloc(void **place, size_t size, unsigned flags) {
    cudaError_t error = allocate(place, size, 4096);
    if (!error) remember(*place, size);
    return error;
}
PUBLIC cudaError_t cudaHostRegister(void *place, size_t size, unsigned flags) { remember(place, size); DONE; }

PUBLIC cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *place) {
    memset(found, 0, sizeof *found);
    found->type = is_pinned(place) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    DONE;
}

static cudaError_t copy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    counted[kind == cudaMemcpyHostToDevice ? TO_DEVICE : kind == cudaMemcpyDeviceToHost ? FROM_DEVICE : ON_DEVICE]++;
    memmove(to, from, size);
    DONE;
}
PUBLIC cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return copy(to, from, size, kind);
}
PUBLIC cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, size, kind);
}
PUBLIC cudaError_t cudaMemset(void *place, int value, size_t size) {
    counted[FILLS]++;
    memset(place, value, size);
    DONE;
}
PUBLIC cudaError_t cudaMemsetAsync(void *place, int value, size_t size, cudaStream_t stream) {
    return cudaMemset(place, value, size);
}
PUBLIC cudaError_t cudaGetSymbolAddress(void **place, const void *symbol) {
    static char room[1 << 20];
    *place = room;
    DONE;
}
PUBLIC cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) { *pool = 0; DONE; }

/* ---- streams, events and kernels ----------------------------------------------------------------------------------- */

PUBLIC cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    static long next = 16;
    *stream = (cudaStream_t)(next += 16);
    DONE;
}
PUBLIC cudaError_t cudaStreamSynchronize(cudaStream_t stream) { counted[STREAM_WAITS]++; DONE; }
PUBLIC cudaError_t cudaDeviceSynchronize(void) { counted[DEVICE_WAITS]++; DONE; }
PUBLIC cudaError_t cudaEventSynchronize(cudaEvent_t event) { counted[EVENT_WAITS]++; DONE; }
PUBLIC cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    DONE;
}
PUBLIC cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *number, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
    *status = cudaStreamCaptureStatusNone;
    DONE;
}
PUBLIC cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = malloc(8); DONE; }
PUBLIC cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = malloc(8); DONE; }
PUBLIC cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) { *milliseconds = 1; DONE; }
PUBLIC const char *cudaGetErrorString(cudaError_t error) { return "an error of the stub"; }
PUBLIC const char *cudaGetErrorName(cudaError_t error) { return "stub"; }

PUBLIC cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = THREADS_OF_BLOCK, found->numRegs = 32, found->binaryVersion = found->ptxVersion = 90;
    DONE;
}
PUBLIC cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function, int threads, size_t shared, unsigned flags) {
    *blocks = 2;
    DONE;
}
PUBLIC cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **given, size_t shared, cudaStream_t stream) {
    counted[KERNELS]++;
    DONE;
}
PUBLIC cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **given) {
    counted[KERNELS]++;
    DONE;
}
PUBLIC cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **place, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
    *place = 0;
    if (found) *found = cudaDriverEntryPointSymbolNotFound;
    return cudaErrorSymbolNotFound;
}
