// libcuda.so.1 without a device
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
static void *runtime(const char *name) {
    void *f = dlsym(RTLD_DEFAULT, name), *h;
    if (!f && (h = dlopen("libcudart.so.13", RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL)))
        f = dlsym(h, name);
    return f;
}
static int attr(int a) {
    static int (*f)(int);
    if (!f)
        f = runtime("pretended_attribute");
    if (f)
        return f(a);
    switch (a) {
    case 75:
        return 9;
    case 16:
        return 132;
    case 97:
        return 232448;
    case 10:
        return 32;
    case 12:
        return 65536;
    case 1:
        return 1024;
    default:
        return 0;
    }
}
static void counted(void) {
    static void (*f)(void);
    if (!f)
        f = runtime("pretended_count_triton");
    if (f)
        f();
}
CUresult cuInit(unsigned f) { return 0; }
CUresult cuDriverGetVersion(int *v) {
    *v = 13000;
    return 0;
}
CUresult cuDeviceGetCount(int *n) {
    *n = getenv("PRETEND_GPU_DEVICES") ? atoi(getenv("PRETEND_GPU_DEVICES")) : 1;
    return 0;
}
CUresult cuDeviceGet(CUdevice *d, int i) {
    *d = i;
    return 0;
}
CUresult cuDeviceGetName(char *s, int n, CUdevice d) {
    snprintf(s, n, "NVIDIA H100 80GB HBM3");
    return 0;
}
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
    *v = attr((int)a);
    return 0;
}
CUresult cuDeviceGetUuid_v2(CUuuid *u, CUdevice d) {
    memset(u, d + 1, sizeof *u);
    return 0;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *f, int *a) {
    *f = 0;
    *a = 1;
    return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) {
    *c = (CUcontext)0x10;
    return 0;
}
CUresult cuCtxGetCurrent(CUcontext *c) {
    *c = (CUcontext)0x10;
    return 0;
}
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuCtxPushCurrent_v2(CUcontext c) { return 0; }
CUresult cuCtxPopCurrent_v2(CUcontext *c) { return 0; }
CUresult cuCtxGetDevice(CUdevice *d) {
    *d = 0;
    return 0;
}
CUresult cuCtxGetLimit(size_t *v, CUlimit l) {
    *v = 1 << 20;
    return 0;
}
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
CUresult cuGetErrorString(CUresult e, const char **s) {
    *s = "pretended driver error";
    return 0;
}
CUresult cuGetErrorName(CUresult e, const char **s) {
    *s = "CUDA_NULL";
    return 0;
}
CUresult cuModuleLoadData(CUmodule *m, const void *i) {
    *m = (CUmodule)strdup("module");
    return 0;
}
CUresult cuModuleLoadDataEx(CUmodule *m, const void *i, unsigned n, CUjit_option *o, void **v) {
    return cuModuleLoadData(m, i);
}
CUresult cuModuleLoad(CUmodule *m, const char *f) { return cuModuleLoadData(m, f); }
CUresult cuModuleUnload(CUmodule m) { return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) {
    *f = (CUfunction)strdup(n);
    return 0;
}
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
    *v = a == 0 ? 1024 : a == 4 ? 128 : 0;
    return 0;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
    if (a == 8 && v > 232448) {
        fprintf(stderr, "pretended CUDA: TOO MUCH SHARED %s %d\n", (char *)f, v);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return 0;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
CUresult cuLaunchKernel(CUfunction f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g,
                        unsigned s, CUstream st, void **p, void **x) {
    counted();
    return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **x) {
    counted();
    if (c->sharedMemBytes > 232448) {
        fprintf(stderr, "pretended CUDA: TOO MUCH SHARED %s %u\n", (char *)f, c->sharedMemBytes);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return 0;
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g,
                                   unsigned s, CUstream st, void **p) {
    counted();
    return 0;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int b, size_t s) {
    *n = 2;
    return 0;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
    *n = 66;
    return 0;
}
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) {
    *(CUdeviceptr *)v = p;
    return 0;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *t, CUtensorMapDataType a, cuuint32_t r, void *g, const cuuint64_t *d,
                                const cuuint64_t *s, const cuuint32_t *b, const cuuint32_t *e, CUtensorMapInterleave i,
                                CUtensorMapSwizzle w, CUtensorMapL2promotion l, CUtensorMapFloatOOBfill o) {
    return 0;
}
CUresult cuStreamWriteValue32_v2(CUstream s, CUdeviceptr p, cuuint32_t v, unsigned f) { return 0; }
CUresult cuLinkCreate_v2(unsigned n, CUjit_option *o, void **v, CUlinkState *s) { return 1; }
CUresult cuLinkAddData_v2(CUlinkState s, CUjitInputType t, void *d, size_t z, const char *n, unsigned k,
                          CUjit_option *o, void **v) {
    return 1;
}
CUresult cuLinkComplete(CUlinkState s, void **c, size_t *z) { return 1; }
// Expandable segments: a range of addresses, memory, and the one mapped to the other.
typedef struct {
    size_t size;
    int device;
} Taken;
CUresult cuMemGetAllocationGranularity(size_t *g, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags f) {
    *g = 2 << 20;
    return 0;
}
CUresult cuMemAddressReserve(CUdeviceptr *p, size_t n, size_t align, CUdeviceptr at, unsigned long long f) {
    void *q = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *p = (CUdeviceptr)q;
    return q == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : 0;
}
CUresult cuMemAddressFree(CUdeviceptr p, size_t n) { return munmap((void *)p, n) ? CUDA_ERROR_INVALID_VALUE : 0; }
CUresult cuMemCreate(CUmemGenericAllocationHandle *h, size_t n, const CUmemAllocationProp *p, unsigned long long f) {
    int (*take)(long, int) = runtime("pretended_take");
    if (!take(n, p->location.id))
        return CUDA_ERROR_OUT_OF_MEMORY;
    Taken *taken = malloc(sizeof *taken);
    *taken = (Taken){n, p->location.id};
    *h = (CUmemGenericAllocationHandle)(size_t)taken;
    return 0;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle h) {
    int (*take)(long, int) = runtime("pretended_take");
    Taken *taken = (Taken *)(size_t)h;
    take(-(long)taken->size, taken->device);
    free(taken);
    return 0;
}
CUresult cuMemMap(CUdeviceptr p, size_t n, size_t from, CUmemGenericAllocationHandle h, unsigned long long f) {
    void (*map)(void *, size_t, int) = runtime("pretended_map");
    map((void *)p, n, 1);
    return 0;
}
CUresult cuMemUnmap(CUdeviceptr p, size_t n) {
    void (*map)(void *, size_t, int) = runtime("pretended_map");
    map((void *)p, n, 0);
    madvise((void *)p, n, MADV_DONTNEED);
    return 0;
}
CUresult cuMemSetAccess(CUdeviceptr p, size_t n, const CUmemAccessDesc *d, size_t count) { return 0; }
CUresult cuMemsetD32Async(CUdeviceptr p, unsigned value, size_t count, CUstream s) {
    if (count <= 1 << 20)
        for (size_t i = 0; i < count; i++)
            ((unsigned *)p)[i] = value;
    return 0;
}
CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char value, size_t n, CUstream s) {
    if (n <= 1 << 22)
        memset((void *)p, value, n);
    return 0;
}
