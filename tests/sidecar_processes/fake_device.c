/* Stands in for libcudart, libcuda and libascendcl: device memory is a file in /dev/shm, named by its key.
 * Device addresses carry a tag that no CPU address has, so that code which touches one itself dies of it. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define TAG (1ULL << 62)
#define FAILED 999
typedef struct { char reserved[64]; } cuda_handle;
static struct { uint64_t base; uint64_t size; char key[64]; } all[16];
static int num, device_set;

static void *map(const char *key, uint64_t size) {
    char path[96];
    struct stat status;
    snprintf(path, sizeof path, "/dev/shm/%.60s", key);
    int fd = open(path, size ? O_RDWR | O_CREAT | O_EXCL : O_RDWR, 0600);
    if (fd < 0 || num == 16) return NULL;
    if (size) { if (ftruncate(fd, size)) return NULL; } else { fstat(fd, &status); size = status.st_size; }
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    all[num].base = (uint64_t)at | TAG;
    all[num].size = size;
    snprintf(all[num++].key, 64, "%.60s", key);
    return (void *)((uint64_t)at | TAG);
}
static int find(uint64_t address) {
    for (int i = 0; i < num; i++)
        if (address >= all[i].base && address < all[i].base + all[i].size) return i;
    return -1;
}
static int copy(void *to, const void *from, size_t size, int kind) {
    uint64_t a = (uint64_t)to, b = (uint64_t)from, device = kind == 1 ? a : b;
    int i = find(device);
    if (!device_set || i < 0 || device + size > all[i].base + all[i].size) return FAILED;
    if (((a & TAG) != 0) != (kind == 1) || ((b & TAG) != 0) != (kind == 2)) return FAILED;
    memcpy((void *)(a & ~TAG), (void *)(b & ~TAG), size);
    return 0;
}
/* For tests: memory of `size` under `key`; its CPU address, and the device's by out. */
void *fake_allocate(const char *key, uint64_t size, uint64_t *device) {
    *device = (uint64_t)map(key, size);
    return (void *)(*device & ~TAG);
}
int cuMemGetAddressRange_v2(uint64_t *base, size_t *size, uint64_t address) {
    int i = find(address);
    if (i < 0) return FAILED;
    *base = all[i].base; *size = all[i].size;
    return 0;
}
int cudaIpcGetMemHandle(cuda_handle *handle, void *base) {
    int i = find((uint64_t)base);
    if (i < 0 || all[i].base != (uint64_t)base) return FAILED;
    memcpy(handle->reserved, all[i].key, 64);
    return 0;
}
int cudaSetDevice(int device) { device_set = 1; return device == 0 ? 0 : 101; }
int cudaIpcOpenMemHandle(void **at, cuda_handle handle, unsigned flags) {
    return flags == 1 && (*at = map(handle.reserved, 0)) ? 0 : 201;
}
int cudaIpcCloseMemHandle(void *at) { int i = find((uint64_t)at); if (i < 0) return FAILED; all[i].size = 0; return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { return copy(to, from, size, kind); }

int aclInit(const char *path) { static int done; if (path) return FAILED; return done++ ? 100002 : 0; }
int aclrtSetDevice(int device) { return cudaSetDevice(device); }
int aclrtIpcMemGetExportKey(void *at, size_t size, char *key, size_t length, uint64_t flag) {
    int i = find((uint64_t)at);
    if (i < 0 || size > all[i].size || length < 65 || flag != 1) return FAILED;
    memset(key, 0, length);
    memcpy(key, all[i].key, 64);
    return 0;
}
int aclrtIpcMemImportByKey(void **at, const char *key, uint64_t flag) {
    return flag == 1 && (*at = map(key, 0)) ? 0 : 507899;
}
int aclrtIpcMemClose(const char *key) { (void)key; return 0; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) {
    return room < size ? FAILED : copy(to, from, size, kind);
}
