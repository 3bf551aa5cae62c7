
#include <nccl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int rank_of[1 << 16];
struct ncclComm {
    int rank, size, aborted;
};
static size_t size_of(ncclDataType_t t) {
    switch (t) {
    case ncclInt8:
    case ncclUint8:
        return 1;
    case ncclFloat16:
    case ncclBfloat16:
        return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
        return 4;
    default:
        return 8;
    }
}
ncclResult_t ncclGetVersion(int *v) {
    *v = 22809;
    return 0;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId *i) {
    memset(i, 7, sizeof *i);
    return 0;
}
static ncclResult_t make(ncclComm_t *c, int n, int r) {
    *c = calloc(1, sizeof(struct ncclComm));
    (*c)->rank = r;
    (*c)->size = n;
    return 0;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *c, int n, ncclUniqueId i, int r, ncclConfig_t *g) {
    return make(c, n, r);
}
ncclResult_t ncclCommInitRank(ncclComm_t *c, int n, ncclUniqueId i, int r) { return make(c, n, r); }
ncclResult_t ncclCommInitRankScalable(ncclComm_t *c, int n, int r, int k, ncclUniqueId *i, ncclConfig_t *g) {
    return make(c, n, r);
}
ncclResult_t ncclCommSplit(ncclComm_t p, int color, int key, ncclComm_t *c, ncclConfig_t *g) {
    return make(c, p->size, p->rank);
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *e) {
    *e = 0;
    return 0;
}
ncclResult_t ncclCommAbort(ncclComm_t c) {
    if (c)
        c->aborted = 1;
    return 0;
}
ncclResult_t ncclCommCount(const ncclComm_t c, int *n) {
    *n = c->size;
    return 0;
}
ncclResult_t ncclCommUserRank(const ncclComm_t c, int *n) {
    *n = c->rank;
    return 0;
}
const char *ncclGetErrorString(ncclResult_t r) { return "null nccl error"; }
const char *ncclGetLastError(ncclComm_t c) { return "null nccl last error"; }
ncclResult_t ncclAllGather(const void *s, void *d, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t st) {
    char *at = (char *)d + c->rank * n * size_of(t);
    if (at != s)
        cudaMemcpyAsync(at, s, n * size_of(t), 4, st);
    return 0;
}
ncclResult_t ncclReduceScatter(const void *s, void *d, size_t n, ncclDataType_t t, ncclRedOp_t o, ncclComm_t c,
                               cudaStream_t st) {
    const char *at = (const char *)s + c->rank * n * size_of(t);
    if (at != d)
        cudaMemcpyAsync(d, at, n * size_of(t), 4, st);
    return 0;
}
ncclResult_t ncclAllReduce(const void *s, void *d, size_t n, ncclDataType_t t, ncclRedOp_t o, ncclComm_t c,
                           cudaStream_t st) {
    if (s != d)
        cudaMemcpyAsync(d, s, n * size_of(t), 4, st);
    return 0;
}
