// A libnvidia-ml.so.1 of a machine whose devices are not linked to each other.
typedef int nvmlReturn_t;
enum { SUCCESS = 0, NOT_SUPPORTED = 3 };
nvmlReturn_t nvmlInit_v2(void) { return SUCCESS; }
nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) {
    *device = (void *)16;
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, int *type) { return NOT_SUPPORTED; }
nvmlReturn_t nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *pci) { return NOT_SUPPORTED; }
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, void *processes) {
    *count = 0;
    return SUCCESS;
}
nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = 13000;
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { return SUCCESS; }
const char *nvmlErrorString(nvmlReturn_t code) { return "pretended NVML error"; }
