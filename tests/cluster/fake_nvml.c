/* A stand-in for NVIDIA's driver library: the symbols of NVML that `cluster.gpus` reaches through pynvml.

   FAKE_NVML_INIT is what initialisation returns, FAKE_NVML_COUNT how many GPUs there are (at most 3). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, INSUFFICIENT_SIZE = 7, UNINITIALIZED = 1 };

typedef struct {
    const char *uuid, *name;
    unsigned long long total_bytes;
    int major, minor;
} Device;
typedef struct {
    unsigned long long total, free, used;
} Memory;

static const Device devices[] = {
    {"GPU-aaaa1111-0000-0000-0000-000000000000", "NVIDIA H100 80GB HBM3", 85520809984ULL, 9, 0},
    {"GPU-aabb2222-0000-0000-0000-000000000000", "NVIDIA GeForce RTX 4090", 25757220864ULL, 8, 9},
    {"GPU-cccc3333-0000-0000-0000-000000000000", "Tesla T4", 15828320256ULL, 7, 5},
};
static int users = 0;

static unsigned number(const char *name, unsigned otherwise) {
    const char *value = getenv(name);
    return value ? (unsigned)atoi(value) : otherwise;
}

static int copy(char *target, unsigned length, const char *text) {
    if (strlen(text) >= length) return INSUFFICIENT_SIZE;
    strcpy(target, text);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    int result = (int)number("FAKE_NVML_INIT", SUCCESS);
    (void)flags;
    if (result == SUCCESS) users++;
    return result;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

/* Says on standard error when the last user has gone, so that a test can tell. */
int nvmlShutdown(void) {
    if (users == 0) return UNINITIALIZED;
    if (--users == 0) fputs("nvml is shut down\n", stderr);
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *version, unsigned length) { return copy(version, length, "580.65.06"); }

int nvmlSystemGetDriverVersion(char *version, unsigned length) { return copy(version, length, "580.65.06"); }

int nvmlDeviceGetCount_v2(unsigned *count) {
    if (users == 0) return UNINITIALIZED;
    *count = number("FAKE_NVML_COUNT", 3);
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, const Device **device) {
    if (users == 0) return UNINITIALIZED;
    if (index >= number("FAKE_NVML_COUNT", 3)) return INVALID_ARGUMENT;
    *device = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetUUID(const Device *device, char *uuid, unsigned length) {
    return copy(uuid, length, device->uuid);
}

int nvmlDeviceGetName(const Device *device, char *name, unsigned length) {
    return copy(name, length, device->name);
}

int nvmlDeviceGetMemoryInfo(const Device *device, Memory *memory) {
    memory->total = memory->free = device->total_bytes;
    memory->used = 0;
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(const Device *device, int *major, int *minor) {
    *major = device->major;
    *minor = device->minor;
    return SUCCESS;
}

const char *nvmlErrorString(int result) { return result == SUCCESS ? "Success" : "Fake error"; }
