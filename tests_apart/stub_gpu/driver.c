/* libcuda.so.1 for the stub: what torch and Triton look up in a driver when they are loaded. */
#define PUBLIC __attribute__((visibility("default")))
#define SUCCEEDS(name) PUBLIC int name() { return 0; }

PUBLIC int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
PUBLIC int cuDeviceGetCount(int *count) { *count = 1; return 0; }
PUBLIC int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
PUBLIC int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
PUBLIC int cuGetErrorString(int error, const char **text) { *text = "an error of the stub"; return 0; }

SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuDeviceGet)
SUCCEEDS(cuDeviceGetAttribute)
SUCCEEDS(cuDevicePrimaryCtxRetain)
SUCCEEDS(cuFuncGetAttribute)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuGetProcAddress_v2)
SUCCEEDS(cuLaunchCooperativeKernel)
SUCCEEDS(cuLaunchKernel)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuLinkCreate_v2)
SUCCEEDS(cuMemAddressReserve)
SUCCEEDS(cuMemCreate)
SUCCEEDS(cuMemGetAddressRange_v2)
SUCCEEDS(cuModuleGetFunction)
SUCCEEDS(cuModuleLoad)
SUCCEEDS(cuModuleLoadData)
SUCCEEDS(cuModuleLoadDataEx)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuMulticastCreate)
SUCCEEDS(cuOccupancyMaxActiveBlocksPerMultiprocessor)
SUCCEEDS(cuPointerGetAttribute)
SUCCEEDS(cuTensorMapEncodeTiled)
