#include <stdio.h>
int cuMemExportToShareableHandle(void) {
    fprintf(stderr, "pretended CUDA: cuMemExportToShareableHandle called\n");
    return 1;
}
int cuMemImportFromShareableHandle(void) {
    fprintf(stderr, "pretended CUDA: cuMemImportFromShareableHandle called\n");
    return 1;
}
int cuMemRetainAllocationHandle(void) {
    fprintf(stderr, "pretended CUDA: cuMemRetainAllocationHandle called\n");
    return 1;
}
int cuMemGetAllocationPropertiesFromHandle(void) {
    fprintf(stderr, "pretended CUDA: cuMemGetAllocationPropertiesFromHandle called\n");
    return 1;
}
int cuMulticastAddDevice(void) {
    fprintf(stderr, "pretended CUDA: cuMulticastAddDevice called\n");
    return 1;
}
int cuMulticastBindMem(void) {
    fprintf(stderr, "pretended CUDA: cuMulticastBindMem called\n");
    return 1;
}
int cuMulticastCreate(void) {
    fprintf(stderr, "pretended CUDA: cuMulticastCreate called\n");
    return 1;
}
int cuMulticastUnbind(void) {
    fprintf(stderr, "pretended CUDA: cuMulticastUnbind called\n");
    return 1;
}
int cuGreenCtxCreate(void) {
    fprintf(stderr, "pretended CUDA: cuGreenCtxCreate called\n");
    return 1;
}
int cuGreenCtxDestroy(void) {
    fprintf(stderr, "pretended CUDA: cuGreenCtxDestroy called\n");
    return 1;
}
int cuGreenCtxStreamCreate(void) {
    fprintf(stderr, "pretended CUDA: cuGreenCtxStreamCreate called\n");
    return 1;
}
int cuCtxFromGreenCtx(void) {
    fprintf(stderr, "pretended CUDA: cuCtxFromGreenCtx called\n");
    return 1;
}
int cuDevResourceGenerateDesc(void) {
    fprintf(stderr, "pretended CUDA: cuDevResourceGenerateDesc called\n");
    return 1;
}
int cuDevSmResourceSplitByCount(void) {
    fprintf(stderr, "pretended CUDA: cuDevSmResourceSplitByCount called\n");
    return 1;
}
int cuDeviceGetDevResource(void) {
    fprintf(stderr, "pretended CUDA: cuDeviceGetDevResource called\n");
    return 1;
}
int cuMemGetAddressRange_v2(void) {
    fprintf(stderr, "pretended CUDA: cuMemGetAddressRange_v2 called\n");
    return 1;
}
